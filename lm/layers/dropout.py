"""Dropout, and the keys that turn it on."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from lm.parallel.mesh import platform


def dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """x with a share `rate` of its elements set to zero and the rest scaled up; x itself without a key."""
    if key is None or rate == 0.0:
        return x
    return jnp.where(keep_mask(key, rate, x.shape), x / (1 - rate), jnp.zeros((), x.dtype))


def keep_mask(key: jax.Array, rate: float, shape: tuple[int, ...]) -> jax.Array:
    """bool `shape`, False for a share `rate` of it: jax.random.bernoulli(key, 1 - rate, shape), bit for bit as jax has
    it by default (of 32 bits, and the same on any mesh).

    On a CPU jax's threefry is a loop that goes through memory every four rounds: here it is one expression.
    """
    if platform() != "cpu" or jax.random.key_impl(key) != "threefry2x32" or math.prod(shape) >= 2**32:
        return jax.random.bernoulli(key, 1 - rate, shape)
    counts = jax.lax.iota(jnp.uint32, math.prod(shape)).reshape(shape)
    fraction = _threefry(jax.random.key_data(key), counts) >> 9
    return fraction < np.uint32(math.ceil(np.float32(1 - rate) * 2**23))


def fold(key: jax.Array | None, i: int) -> jax.Array | None:
    """The i-th key made from `key`; None, which turns dropout off, stays None."""
    return None if key is None else jax.random.fold_in(key, i)


@jax.jit  # Traced once.
def _threefry(key_data: jax.Array, counts: jax.Array) -> jax.Array:
    """Both words of Threefry-2x32 with 20 rounds (Salmon et al. 2011, section 4.3) of counts below 2^32, as one."""
    k0, k1 = (k.reshape((1,) * counts.ndim) for k in key_data)
    keys = (k0, k1, k0 ^ k1 ^ jnp.uint32(0x1BD11BDA))
    high, low = jnp.broadcast_to(k0, counts.shape), counts + k1
    for i in range(5):
        for rotation in ((13, 15, 26, 6), (17, 29, 16, 24))[i % 2]:
            high = high + low
            low = high ^ ((low << rotation) | (low >> (32 - rotation)))
        high, low = high + keys[(i + 1) % 3], low + keys[(i + 2) % 3] + jnp.uint32(i + 1)
    return high ^ low
