"""Dropout, and the keys that turn it on."""

import jax
import jax.numpy as jnp


def dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """x with a share `rate` of its elements set to zero and the rest scaled up; x itself without a key."""
    if key is None or rate == 0.0:
        return x
    kept = jax.random.bernoulli(key, 1 - rate, x.shape)
    return jnp.where(kept, x / (1 - rate), jnp.zeros((), x.dtype))


def fold(key: jax.Array | None, i: int) -> jax.Array | None:
    """The i-th key made from `key`; None, which turns dropout off, stays None."""
    return None if key is None else jax.random.fold_in(key, i)
