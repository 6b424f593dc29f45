"""Attention on TPUs by Splash, the kernel in JAX's own library: no scores in memory, hidden blocks skipped."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from lm.parallel.rules import is_sharded, partition

LANES = 128  # Of the vector unit: blocks are multiples of it.
MAX_BLOCK = 1024


def refusal(form: Any, q_BLHC: jax.Array, k_BSKC: jax.Array, given: frozenset[str]) -> str | None:
    """Why Splash cannot take a call with these further arrays by name; None where it can."""
    if other := given - {"documents"}:
        return f"it takes no {', '.join(sorted(other))}"
    lengths = q_BLHC.shape[1], k_BSKC.shape[1]
    if any(length % LANES for length in lengths):
        return f"lengths {lengths[0]} and {lengths[1]} must be multiples of {LANES}"
    if is_sharded("length"):
        return "the sequence is sharded"
    return None


def attend(
    form: Any,
    q_BLHC: jax.Array,
    k_BSKC: jax.Array,
    v_BSKC: jax.Array,
    documents: tuple[jax.Array, jax.Array] | None = None,
    interpret: bool = False,
) -> jax.Array:
    """o_BLHC as lm.layers.attention.attention has it, each device its own rows and heads; `interpret` runs anywhere."""
    rows = documents or ()
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return _local(form, interpret, None, q_BLHC, k_BSKC, v_BSKC, *rows)
    sizes = dict(mesh.shape)
    queries = partition(("batch", None, "act_heads", None), q_BLHC.shape, sizes)
    keys = partition(("batch", None, "act_kv_heads", None), k_BSKC.shape, sizes)
    by_row = partition(("batch", None), q_BLHC.shape[:2], sizes)
    # Fewer key heads than devices over heads are whole on each, and it takes those that its queries read.
    heads_over = queries[2] if keys[2] is None else None
    return jax.shard_map(
        functools.partial(_local, form, interpret, heads_over),
        in_specs=(queries, keys, keys, *(by_row for _ in rows)),
        out_specs=queries,
        check_vma=False,
    )(q_BLHC, k_BSKC, v_BSKC, *rows)


def _local(form, interpret, heads_over, q_BLHC, k_BSKC, v_BSKC, *documents):
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels

    (L, H), (S, K) = q_BLHC.shape[1:3], k_BSKC.shape[1:3]
    if heads_over is not None:
        group = H * jax.lax.axis_size(heads_over) // K
        wanted = (jax.lax.axis_index(heads_over) * H + jnp.arange(H)) // group
        k_BSKC, v_BSKC = (jnp.take(x, wanted, 2) for x in (k_BSKC, v_BSKC))
    kernel = kernels.make_splash_mha(
        _mask(form, H, L, S),
        block_sizes=_block_sizes(kernels, L, S),
        attn_logits_soft_cap=form.soft_cap,
        head_shards=1,
        q_seq_shards=1,
        # The name that the rematerialisation policy "attention" keeps.
        residual_checkpoint_name="attention",
        interpret=interpret,
    )
    q_BHLC, k_BKSC, v_BKSC = (x.swapaxes(1, 2) for x in ((q_BLHC * form.scale).astype(q_BLHC.dtype), k_BSKC, v_BSKC))
    segments = kernels.SegmentIds(*documents) if documents else None
    o_BHLC = jax.vmap(lambda q, k, v, s: kernel(q, k, v, segment_ids=s))(q_BHLC, k_BKSC, v_BKSC, segments)
    return o_BHLC.swapaxes(1, 2).astype(q_BLHC.dtype)


def _mask(form, heads, L, S):
    """Lazy: a function of indices that the kernel evaluates in each block, never an array [L, S]."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    mask: masks.Mask = masks.CausalMask((L, S)) if form.causal else masks.FullMask((L, S))
    if form.window is not None:
        mask = masks.LocalMask((L, S), (form.window - 1, 0 if form.causal else form.window - 1), 0)
    return masks.MultiHeadMask([mask] * heads)


def _block_sizes(kernels, L, S):
    q, kv = (next(b for b in (MAX_BLOCK, 512, 256, LANES) if length % b == 0) for length in (L, S))
    # The fused backward kernel would hold the queries' gradient once a block of keys, which grows as L x S.
    return kernels.BlockSizes(
        block_q=q,
        block_kv=kv,
        block_kv_compute=min(kv, 512),
        block_q_dkv=q,
        block_kv_dkv=kv,
        block_kv_dkv_compute=min(kv, 512),
        block_q_dq=q,
        block_kv_dq=kv,
    )
