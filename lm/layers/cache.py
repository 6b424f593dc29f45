"""Keys and values of the tokens so far, each row with a length of its own."""

import jax
import jax.numpy as jnp

from lm.core.params import Constant, Param


def length_spec(batch_size: int) -> Param:
    """int32 [B]: how many tokens each row holds; setting it back forgets the rest."""
    return Param((batch_size,), ("batch",), Constant(), role="vector", trainable=False, dtype="int32")


def lengths(documents_BL: jax.Array | None) -> jax.Array | None:
    """[B]: how many tokens of each row are none of the padding at its end, whose document is -1; None: all are."""
    return None if documents_BL is None else jnp.sum(documents_BL >= 0, 1)


def grown(lengths_B: jax.Array, tokens_BL: jax.Array, documents_BL: jax.Array | None) -> jax.Array:
    """[B]: the rows' lengths with these tokens, of which those of document -1 are padding at a row's end."""
    added_B = lengths(documents_BL)
    return lengths_B + (tokens_BL.shape[1] if added_B is None else added_B)


def key_value_spec(batch_size: int, length: int, kv_heads: int, head_dim: int, dtype: str) -> dict[str, Param]:
    """{"k", "v"}: [B, S, K, C], slot i for the row's token i."""
    shape, axes = (batch_size, length, kv_heads, head_dim), ("batch", "length", "act_kv_heads", "head_dim")
    return {n: Param(shape, axes, Constant(), role="vector", trainable=False, dtype=dtype) for n in ("k", "v")}


def append(cache_BSKC: jax.Array, new_BLKC: jax.Array, starts_B: jax.Array) -> jax.Array:
    """The cache with each row's new entries from its own start on; the caller sees to it that they fit."""

    def write(row, new, start):
        return jax.lax.dynamic_update_slice(row, new.astype(row.dtype), (start, 0, 0))

    return jax.vmap(write)(cache_BSKC, new_BLKC, starts_B)
