"""Attention on TPUs by Splash, the kernel in JAX's own library: no scores in memory, hidden blocks skipped.

Where the sequence is sharded each device gathers all keys and values, and keeps its queries (context parallelism),
where they are causal by `swap`.
"""

import functools
import math
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from lm.layers.attention_shards import SEQ, gathered, own_keys, partitions, swap
from lm.parallel import rules

LANES = 128  # Of the vector unit: blocks are multiples of it.
MAX_BLOCK = 1024


def refusal(form: Any, q_BLHC: jax.Array, k_BSKC: jax.Array, given: frozenset[str]) -> str | None:
    """Why Splash cannot take a call with these further arrays by name; None where it can."""
    if other := given - {"documents"}:
        return f"it takes no {', '.join(sorted(other))}"
    parts = rules.sizes().get(SEQ, 1)
    # Half of a device's queries are a block at least, where they are swapped.
    least = LANES if parts == 1 else 2 * LANES * parts
    if q_BLHC.shape[1] % least or k_BSKC.shape[1] % (LANES * parts):
        lengths = f"lengths {q_BLHC.shape[1]} and {k_BSKC.shape[1]}"
        return f"{lengths} must be multiples of {least}" + (f" over {SEQ}={parts}" if parts > 1 else "")
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
    rows, sizes = documents or (), rules.sizes()
    parts = sizes.get(SEQ, 1)
    # Every query of a full mask sees all keys: its shards are alike.
    masks = parts if form.causal or form.window is not None else 1
    kernel = _kernel(form, (q_BLHC.shape[1] // (parts // masks), k_BSKC.shape[1]), q_BLHC.shape[2], masks, interpret)
    if math.prod(sizes.values()) == 1:
        return _local(form, None, 1, kernel, q_BLHC, k_BSKC, v_BSKC, *rows)
    queries, keys, over_heads = partitions(q_BLHC, k_BSKC)
    by_row = rules.partition(("batch", "length"), q_BLHC.shape[:2], sizes)
    # Its shape alone is read, and stages around the caller, which it cannot name, are no part of that.
    mesh = jax.sharding.get_abstract_mesh()
    whole = jax.sharding.AbstractMesh(mesh.axis_sizes, mesh.axis_names)
    over = NamedSharding(whole, PartitionSpec(None, SEQ if masks > 1 else None))
    return jax.shard_map(
        functools.partial(_local, form, over_heads, parts),
        in_specs=(kernel.manual_sharding_spec(over), queries, keys, keys, *(by_row for _ in rows)),
        out_specs=queries,
        check_vma=False,
    )(kernel, q_BLHC, k_BSKC, v_BSKC, *rows)


def _kernel(form, lengths, all_heads, parts, interpret):
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels

    heads = all_heads // rules.sizes().get("tensor", 1)
    return kernels.make_splash_mha(
        _mask(form, heads, lengths, parts),
        # A block ends where a swapped half begins.
        block_sizes=_block_sizes(kernels, lengths[0] // parts // (2 if parts > 1 else 1), lengths[1]),
        attn_logits_soft_cap=form.soft_cap,
        head_shards=1,
        q_seq_shards=parts,
        # The name that the rematerialisation policy "attention" keeps.
        residual_checkpoint_name="attention",
        interpret=interpret,
    )


def _local(form, over_heads, parts, kernel, q_BLHC, k_BSKC, v_BSKC, *documents):
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels

    if parts > 1:
        q_BLHC, documents = swap(q_BLHC), tuple(swap(d) for d in documents[:1]) + documents[1:]
        k_BSKC, v_BSKC, *last = (gathered(x) for x in (k_BSKC, v_BSKC, *documents[1:]))
        documents = (*documents[:1], *last)
    k_BSKC, v_BSKC = (own_keys(x, q_BLHC.shape[2], over_heads) for x in (k_BSKC, v_BSKC))
    q_BHLC, k_BKSC, v_BKSC = (x.swapaxes(1, 2) for x in ((q_BLHC * form.scale).astype(q_BLHC.dtype), k_BSKC, v_BSKC))
    segments = kernels.SegmentIds(*documents) if documents else None
    o_BHLC = jax.vmap(lambda q, k, v, s: kernel(q, k, v, segment_ids=s))(q_BHLC, k_BKSC, v_BKSC, segments)
    o_BLHC = o_BHLC.swapaxes(1, 2).astype(q_BLHC.dtype)
    return swap(o_BLHC) if parts > 1 else o_BLHC


def _mask(form, heads, lengths, parts):
    """Lazy: a function of indices that the kernel evaluates in each block, never an array [L, S]."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    mask: masks.Mask = masks.CausalMask(lengths) if form.causal else masks.FullMask(lengths)
    if form.window is not None:
        mask = masks.LocalMask(lengths, (form.window - 1, 0 if form.causal else form.window - 1), 0)
    if parts > 1 and not isinstance(mask, masks.FullMask):
        halves = np.arange(lengths[0], dtype=np.int32).reshape(parts, 2, -1)
        mask.q_sequence = np.stack([halves[:, 0], halves[::-1, 1]], 1).reshape(-1)  # type: ignore[attr-defined]
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
