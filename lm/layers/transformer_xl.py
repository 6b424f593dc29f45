"""Relative positions as terms of the attention scores (Dai et al. 2019, 1901.02860)."""

import jax
import jax.numpy as jnp


def distances(length: int, keys: int, clamp: int | None = None) -> jax.Array:
    """int32 [S + L]: how far a key may lie behind its query, from S down to 1 - L, within +-clamp."""
    steps = jnp.arange(keys, -length, -1)
    return steps if clamp is None else jnp.clip(steps, -clamp, clamp)


def by_key(scores_BHLR: jax.Array, keys: int, picks_BL: jax.Array | None = None, length: int = 0):
    """[B, H, L, S]: scores by distance, R = S + L of them, as scores by key; the queries are the last L of the keys.

    With `picks_BL` the queries stand at those indices of a sequence of `length`.
    """
    B, H, L, R = scores_BHLR.shape
    if picks_BL is None:
        # Row i begins at L - i, and so at a multiple of R - 1 behind the first L of the flat array.
        flat = scores_BHLR.reshape(B, H, L * R)[:, :, L:]
        return flat.reshape(B, H, L, R - 1)[..., :keys]
    index = length - picks_BL[:, None, :, None] + jnp.arange(keys)[None, None, None, :]
    return jnp.take_along_axis(scores_BHLR, jnp.broadcast_to(index, (B, H, L, keys)), -1)
