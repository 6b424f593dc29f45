"""Softmax attention in blocks of queries: for every mask, bias and platform, in memory linear in the length."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from lm.layers.dropout import keep_mask
from lm.layers.masks import visible

# Scores are made one block of queries at a time, and causal blocks skip the future. Where the compiler runs the blocks
# together, as XLA:CPU does in the backward pass, their scores are in memory together too.
# Two blocks already gain on CPU at 256 tokens; below 128 rows the products get too small.
MIN_QUERIES, MAX_QUERIES = 128, 512

HIDDEN = -1e30


def attend_in_blocks(
    form: Any,
    q_BLHC: jax.Array,
    k_BSKC: jax.Array,
    v_BSKC: jax.Array,
    *,
    starts_B: jax.Array | None = None,
    documents: tuple[jax.Array, jax.Array] | None = None,
    places: tuple[jax.Array, jax.Array] | None = None,
    bias: jax.Array | None = None,
    key: jax.Array | None = None,
) -> jax.Array:
    """o_BLHC, see lm.layers.attention.attention; `form.scale` is given."""
    (B, L, H, C), (S, K) = q_BLHC.shape, k_BSKC.shape[1:3]
    k_BKSC, v_BKSC = k_BSKC.transpose(0, 2, 1, 3), v_BSKC.transpose(0, 2, 1, 3)
    blocks = []
    for i, (rows, columns) in enumerate(_blocks(form, L, S, aligned=starts_B is None and places is None)):
        mask = _mask(form, rows, columns, H // K, starts_B, documents, places)
        bias_BKRS = None if bias is None else _grouped(bias[:, :, rows, columns], H, K)
        block_key = None if key is None or form.dropout == 0.0 else jax.random.fold_in(key, i)
        q_BKRC = by_key_head(q_BLHC[:, rows], K)
        o_BKRC = _block(form, q_BKRC, k_BKSC[:, :, columns], v_BKSC[:, :, columns], bias_BKRS, mask, block_key)
        blocks.append(o_BKRC.reshape(B, K, H // K, -1, C))
    o_BKGLC = blocks[0] if len(blocks) == 1 else jnp.concatenate(blocks, 3)
    return o_BKGLC.transpose(0, 3, 1, 2, 4).reshape(B, L, H, C)


def by_key_head(q_BLHC: jax.Array, kv_heads: int) -> jax.Array:
    """[B, K, R, C]: the heads that share keys become more rows of one product; R counts both."""
    B, L, H, C = q_BLHC.shape
    q_BKGLC = q_BLHC.reshape(B, L, kv_heads, H // kv_heads, C).transpose(0, 2, 3, 1, 4)
    return q_BKGLC.reshape(B, kv_heads, -1, C)


def _blocks(form: Any, L: int, S: int, aligned: bool) -> list[tuple[slice, slice]]:
    """Slices (queries, the keys that they may see); only aligned causal blocks know their keys beforehand."""
    spans, size = [], max(MIN_QUERIES, min(L // 2, MAX_QUERIES))
    for first in range(0, L, size):
        last = min(first + size, L)
        causal = form.causal and aligned
        low = max(0, first - form.window + 1) if causal and form.window is not None else 0
        spans.append((slice(first, last), slice(low, last if causal else S)))
    return spans


def _grouped(bias_BHLS, heads, kv_heads):
    """[B or 1, K, R, S] for queries that lie as rows of their key head's product."""
    B, _, L, S = bias_BHLS.shape
    return jnp.broadcast_to(bias_BHLS.astype(jnp.float32), (B, heads, L, S)).reshape(B, kv_heads, -1, S)


def _mask(form, rows, columns, groups, starts_B, documents, places):
    """What `visible` needs for one block, or None where every query sees every key."""
    if not form.causal and form.window is None and documents is None:
        return None
    if places is None:
        query_BL, key_BS = jnp.arange(rows.start, rows.stop)[None, :], jnp.arange(columns.start, columns.stop)[None, :]
        if starts_B is not None:
            query_BL = query_BL + starts_B[:, None]
    else:
        query_BL, key_BS = places[0][:, rows], places[1][:, columns]
    mask = (jnp.tile(query_BL, groups), key_BS)
    return mask if documents is None else (*mask, jnp.tile(documents[0][:, rows], groups), documents[1][:, columns])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _block(form, q_BKRC, k_BKSC, v_BKSC, bias_BKRS, mask, key):
    return _block_forward(form, q_BKRC, k_BKSC, v_BKSC, bias_BKRS, mask, key)[0]


def _block_forward(form, q, k, v, bias, mask, key):
    scores, _ = masked_scores(form, q, k, bias, mask)
    peak = jnp.max(scores, -1, keepdims=True)
    exponent = jnp.exp(scores - peak)
    total = jnp.sum(exponent, -1, keepdims=True)
    # Normalised after the product with v: that is C numbers a row, not S.
    o = (dot("bkrs,bksc->bkrc", drop(form, exponent, key).astype(v.dtype), v) / total).astype(q.dtype)
    # Named where the backward pass takes them, so that the policy "attention" spares it the softmax.
    kept = checkpoint_name((o, peak + jnp.log(total)), "attention")
    return kept[0], (q, k, v, bias, mask, key, *kept)


def _block_backward(form, residuals, do):
    q, k, v, bias, mask, key, o, logsumexp = residuals
    # Weights are made again rather than kept (Dao et al. 2022, 2205.14135): no R x S array outlives the forward
    # pass, and even at 64 tokens the product is faster than the memory. The barrier keeps the compiler from
    # finding and keeping the old ones.
    q, k, v = jax.lax.optimization_barrier((q, k, v))
    scores, slope = masked_scores(form, q, k, bias, mask)
    weights = jnp.exp(scores - logsumexp)
    # sum over s of weights * dweights, as a sum over c. Without the barrier XLA:CPU sums again for every score.
    delta = jax.lax.optimization_barrier(jnp.sum(do.astype(jnp.float32) * o.astype(jnp.float32), -1, keepdims=True))
    dv = dot("bkrs,bkrc->bksc", drop(form, weights, key).astype(do.dtype), do)
    dmasked = weights * (drop(form, dot("bkrc,bksc->bkrs", do, v), key) - delta)
    dbias = None
    if bias is not None:
        dbias = jnp.sum(dmasked, 0, keepdims=True) if bias.shape[0] == 1 else dmasked
    dscores = (dmasked * slope).astype(q.dtype)
    dq = dot("bkrs,bksc->bkrc", dscores, k)
    dk = dot("bkrs,bkrc->bksc", dscores, q)
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), dbias, None, None


_block.defvjp(_block_forward, _block_backward)


def masked_scores(form, q, k, bias, mask):
    """Masked scores in float32, and their slope with respect to the bare products."""
    scores, slope = form.scale * dot("bkrc,bksc->bkrs", q, k), form.scale
    if form.soft_cap is not None:
        squashed = jnp.tanh(scores / form.soft_cap)
        scores, slope = form.soft_cap * squashed, form.scale * (1 - jnp.square(squashed))
    if bias is not None:
        scores = scores + bias
    if mask is not None:
        seen = visible(*mask, causal=form.causal, window=form.window)
        scores = jnp.where(seen[:, None], scores, HIDDEN)
    return scores, slope


def drop(form, x, key):
    """`x` with dropout of `form.dropout` where there is a key."""
    if key is None:
        return x
    return jnp.where(keep_mask(key, form.dropout, x.shape), x / (1 - form.dropout), 0.0)


def dot(equation, a, b):
    """The einsum, summed in float32."""
    return jnp.einsum(equation, a, b, preferred_element_type=jnp.float32)
