"""Attention on NVIDIA GPUs by cuDNN, through JAX's own binding: no scores in memory."""

from typing import Any

import jax
import jax.numpy as jnp

from lm.parallel.rules import is_sharded

MAX_HEAD_DIM = 256  # From Hopper on; on Ampere it is 128, which cuDNN itself refuses by name.


def refusal(form: Any, q_BLHC: jax.Array, k_BSKC: jax.Array, given: frozenset[str]) -> str | None:
    """Why cuDNN cannot take a call with these further arrays by name; None where it can."""
    if given:
        return f"it takes no {', '.join(sorted(given))}"  # A mask would become a dense bias.
    if form.soft_cap is not None:
        return "it has no soft-cap"
    if form.window is not None and not form.causal:
        return "its windows look back only"
    if q_BLHC.dtype not in (jnp.bfloat16, jnp.float16):
        return f"it takes bfloat16 and float16, not {q_BLHC.dtype}"
    if q_BLHC.shape[-1] % 8 or q_BLHC.shape[-1] > MAX_HEAD_DIM:
        return f"head_dim={q_BLHC.shape[-1]} must be a multiple of 8 up to {MAX_HEAD_DIM}"
    if form.causal and q_BLHC.shape[1] != k_BSKC.shape[1]:
        return f"{q_BLHC.shape[1]} queries and {k_BSKC.shape[1]} keys differ, and it aligns their ends"
    if is_sharded("length"):
        return "the sequence is sharded"
    return None


def attend(
    form: Any,
    q_BLHC: jax.Array,
    k_BSKC: jax.Array,
    v_BSKC: jax.Array,
    documents: Any = None,
) -> jax.Array:
    """o_BLHC as lm.layers.attention.attention has it."""
    return jax.nn.dot_product_attention(
        q_BLHC,
        k_BSKC,
        v_BSKC,
        scale=form.scale,
        is_causal=form.causal,
        # It counts the tokens before this one, without it.
        local_window_size=None if form.window is None else (form.window - 1, 0),
        implementation="cudnn",
    )
