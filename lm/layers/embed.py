"""Token tables: ids to vectors, and vectors back to logits."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from lm.core.params import Param
from lm.layers.linear import project
from lm.parallel.mesh import platform
from lm.parallel.rules import constrain

MASKED_LOGIT = -1e9


def embed_spec(rows: int, width: int, init: Callable, axis: str = "vocab") -> dict[str, Param]:
    """{"table": [rows, D]}; its input is the row index."""
    return {"table": Param((rows, width), (axis, "embed"), init, inputs=(axis,), role="embedding")}


def embed(p: dict[str, jax.Array], ids: jax.Array, dtype: str) -> jax.Array:
    """[..., D] in `dtype`: the rows of the table at `ids`."""
    return p["table"][ids].astype(dtype)


def embed_tokens(p: dict[str, jax.Array], tokens_BL: jax.Array, dtype: str) -> jax.Array:
    """[B, L, D] in `dtype`; each device looks up what it has of a table whose rows are sharded."""
    # Said here, or the partitioner gathers the table where the layers want parts of the sequence.
    return constrain(embed(p, tokens_BL, dtype), "batch", "length", "act_embed")


def unembed(p: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    """[..., V] logits in float32: x [..., D] times each row of the table [V, D]."""
    return project(x, p["table"], axis=1)


def biased_logits(head: dict[str, jax.Array], x: jax.Array, valid: int | None, multiplier: float = 1.0) -> jax.Array:
    """[..., V] logits in float32: x [..., D] times each row of "table" [V, D], times the multiplier, plus "bias" [V];
    those at and above `valid` at MASKED_LOGIT.

    On a CPU, in float32 and of more tokens than features, which are many, the bias is one column more of the table: its
    sum would be a pass over all logits, and its gradient a slow one.
    """
    width = x.shape[-1]
    if platform() == "cpu" and x.dtype == jnp.float32 and x.size // width > width >= 64:
        added_VE = jnp.pad(mask_padding(head["bias"], valid)[:, None], ((0, 0), (0, 7)))  # Whole vectors of 8.
        one = jnp.zeros((*x.shape[:-1], 8)).at[..., 0].set(1)
        x, table = jnp.concatenate([x * multiplier, one], -1), jnp.concatenate([head["table"], added_VE], 1)
        return unembed({"table": table}, x)
    logits = unembed(head, x)
    logits = logits if multiplier == 1 else logits * multiplier
    return mask_padding(logits + head["bias"].reshape((1,) * (x.ndim - 1) + (-1,)), valid)


def mask_padding(logits: jax.Array, valid: int | None) -> jax.Array:
    """`logits` [..., V] with those at and above `valid` at MASKED_LOGIT; all of them valid without it."""
    if valid is None or valid == logits.shape[-1]:
        return logits
    # A sum, in which the logits are lost: a choice would take a CPU longer.
    mask_V = jnp.where(jnp.arange(logits.shape[-1]) < valid, 0.0, MASKED_LOGIT)
    return logits + mask_V.reshape((1,) * (logits.ndim - 1) + (-1,))


def soft_cap(x: jax.Array, cap: float) -> jax.Array:
    """cap * tanh(x / cap): the identity near zero, never beyond +-cap (Gemma 2, 2408.00118)."""
    return cap * jnp.tanh(x / cap)
