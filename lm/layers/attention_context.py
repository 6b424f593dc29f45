"""Attention over a sharded sequence, for any mask and platform: keys are gathered, scores made block by block."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from lm.layers.attention_blocks import HIDDEN, MAX_QUERIES, MIN_QUERIES, by_key_head, dot, drop, masked_scores
from lm.layers.attention_shards import SEQ, gathered, own_keys, partitions, swap
from lm.parallel import rules


def attend(
    form: Any,
    q_BLHC: jax.Array,
    k_BSKC: jax.Array,
    v_BSKC: jax.Array,
    *,
    documents: tuple[jax.Array, jax.Array] | None = None,
    places: tuple[jax.Array, jax.Array] | None = None,
    bias: jax.Array | None = None,
    key: jax.Array | None = None,
) -> jax.Array:
    """o_BLHC, see lm.layers.attention.attention, where "length" is sharded; `form.scale` is given.

    Each device keeps its queries. Those of a causal sequence are balanced by `swap`, unless they have biases, and no
    block of the future is computed. Between blocks of scores only their sums are kept, as in FlashAttention (Dao et
    al. 2022, 2205.14135).
    """
    sizes, (B, L, S) = rules.sizes(), (*q_BLHC.shape[:2], k_BSKC.shape[1])
    swapped = form.causal and places is None and bias is None and L % (2 * sizes[SEQ]) == 0
    plan = Plan(form, sizes[SEQ], L, S, anywhere=places is not None, swapped=swapped)
    queries, keys, over_heads = partitions(q_BLHC, k_BSKC)
    given: dict[str, Any] = {}
    specs: dict[str, Any] = {"masks": rules.partition(("batch", "length"), (B, L), sizes), "key": PartitionSpec()}
    if form.causal or form.window is not None or documents is not None:
        places = places or (jnp.broadcast_to(jnp.arange(L), (B, L)), jnp.broadcast_to(jnp.arange(S), (B, S)))
        given["masks"] = list(zip(places, documents, strict=True)) if documents else [(side,) for side in places]
    if bias is not None:
        given["bias"] = jnp.broadcast_to(bias, (bias.shape[0], q_BLHC.shape[2], L, S))
        axes = ("batch" if bias.shape[0] > 1 else None, "act_heads", "length", None)
        specs["bias"] = rules.partition(axes, given["bias"].shape, sizes)
    if key is not None:
        given["key"] = key
    return jax.shard_map(
        functools.partial(_local, form, plan, over_heads, tuple(sizes)),
        in_specs=(queries, keys, keys, {name: specs[name] for name in given}),
        out_specs=queries,
        check_vma=False,
    )(q_BLHC, k_BSKC, v_BSKC, given)


class Plan:
    """Which blocks of queries and keys each device multiplies; all as many as the one with the most.

    `queries` and `keys` are the blocks' lengths; `table` [devices, pairs, 3] has (which of the device's blocks of
    queries, which block of keys, whether it counts). `anywhere` is for queries that may stand in any order.
    """

    def __init__(self, form: Any, parts: int, L: int, S: int, anywhere: bool, swapped: bool):
        self.swapped, run = swapped, L // parts // (2 if swapped else 1)
        self.queries, self.keys = _block(run), _block(S // parts)
        runs = [[2 * i, 2 * (parts - i) - 1] if swapped else [i] for i in range(parts)]
        pairs = []
        for own in runs:
            firsts = [r * run + n for r in own for n in range(0, run, self.queries)]
            seen = np.array([[anywhere or self._meet(form, q, t) for t in range(S // self.keys)] for q in firsts])
            pairs.append(np.argwhere(seen))
        most = max(map(len, pairs))
        rest = [np.zeros((most - len(p), 3), int) for p in pairs]
        self.table = np.stack([np.r_[np.c_[p, np.ones(len(p), int)], r] for p, r in zip(pairs, rest, strict=True)])

    def _meet(self, form: Any, first: int, t: int) -> bool:
        """Whether any of the queries from `first` on sees any key of block t."""
        last, low, high = first + self.queries - 1, t * self.keys, (t + 1) * self.keys - 1
        if form.causal and low > last:
            return False
        return form.window is None or (high > first - form.window and low < last + form.window)


def _block(length: int) -> int:
    """The largest divisor of a good size; where there is none, as of a prime, all of it."""
    return max((n for n in range(MIN_QUERIES, min(length, MAX_QUERIES) + 1) if length % n == 0), default=length)


def _local(form, plan, over_heads, axes, q_BLHC, k_BSKC, v_BSKC, given):
    H, (queries, keys) = q_BLHC.shape[2], given.get("masks", ((), ()))
    if plan.swapped:
        q_BLHC, queries = jax.tree.map(swap, (q_BLHC, queries))
    k_BSKC, v_BSKC = (own_keys(gathered(x), H, over_heads) for x in (k_BSKC, v_BSKC))
    K = k_BSKC.shape[2]
    q_NBKRC = _blocks(q_BLHC, plan.queries, lambda a: by_key_head(a, K))
    k_TBKSC, v_TBKSC = (_blocks(x, plan.keys, lambda a: a.swapaxes(1, 2)) for x in (k_BSKC, v_BSKC))
    queries = [_blocks(a, plan.queries, lambda a: jnp.tile(a, H // K)) for a in queries]
    masks = queries, [_blocks(gathered(a), plan.keys) for a in keys]
    bias = given.get("bias")
    if bias is not None:
        b, _, L, S = bias.shape
        bias = bias.astype(jnp.float32).reshape(b, K, H // K, L // plan.queries, plan.queries, S // plan.keys, -1)
        bias = bias.transpose(3, 5, 0, 1, 2, 4, 6).reshape(L // plan.queries, S // plan.keys, b, K, -1, plan.keys)
    key = given.get("key")
    if key is not None:
        key = jax.random.fold_in(key, jax.lax.axis_index(axes))
    pairs = jnp.asarray(plan.table)[jax.lax.axis_index(SEQ)]
    o_NBKRC = _sweep(form, q_NBKRC, k_TBKSC, v_TBKSC, bias, masks, key, pairs)
    N, B, _, _, C = o_NBKRC.shape
    o_BLHC = o_NBKRC.reshape(N, B, K, H // K, plan.queries, C).transpose(1, 0, 4, 2, 3, 5).reshape(q_BLHC.shape)
    return swap(o_BLHC) if plan.swapped else o_BLHC


def _blocks(a, length, each=lambda a: a):
    """[blocks, ...] of a [B, length of all, ...], `each` one as wanted."""
    return jax.vmap(each)(a.reshape(a.shape[0], -1, length, *a.shape[2:]).swapaxes(0, 1))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sweep(form, q, k, v, bias, masks, key, pairs):
    """[N, B, K, R, C]: of N blocks of queries, over `pairs` of them with the T blocks of keys."""
    return _sweep_forward(form, q, k, v, bias, masks, key, pairs)[0]


def _sweep_forward(form, q, k, v, bias, masks, key, pairs):
    def pair(carry, which):
        sums, peaks, totals = carry
        n, t, counts = which
        scores, _ = _scores(form, q, k, bias, masks, which)
        peak = jnp.maximum(peaks[n], jnp.max(scores, -1, keepdims=True))
        exponent, shrink = jnp.exp(scores - peak), jnp.exp(peaks[n] - peak)
        part = dot("bkrs,bksc->bkrc", drop(form, exponent, _key(key, k, which)).astype(v.dtype), v[t])
        sums = sums.at[n].set(shrink * sums[n] + part)
        totals = totals.at[n].set(shrink * totals[n] + jnp.sum(exponent, -1, keepdims=True))
        return (sums, peaks.at[n].set(peak), totals), None

    rows = jnp.zeros((*q.shape[:-1], 1), jnp.float32)
    (sums, peaks, totals), _ = jax.lax.scan(pair, (jnp.zeros(q.shape, jnp.float32), rows - jnp.inf, rows), pairs)
    # Named where the backward pass takes them, so that the policy "attention" spares it the softmax.
    o, logsumexp = checkpoint_name(((sums / totals).astype(q.dtype), peaks + jnp.log(totals)), "attention")
    return o, (q, k, v, bias, masks, key, pairs, o, logsumexp)


def _sweep_backward(form, residuals, do):
    q, k, v, bias, masks, key, pairs, o, logsumexp = residuals
    delta = jnp.sum(do.astype(jnp.float32) * o.astype(jnp.float32), -1, keepdims=True)

    def pair(carry, which):
        dq, dk, dv, dbias = carry
        n, t, _ = which
        scores, slope = _scores(form, q, k, bias, masks, which)
        weights, pair_key = jnp.exp(scores - logsumexp[n]), _key(key, k, which)
        dv = dv.at[t].add(dot("bkrs,bkrc->bksc", drop(form, weights, pair_key).astype(do.dtype), do[n]))
        dmasked = weights * (drop(form, dot("bkrc,bksc->bkrs", do[n], v[t]), pair_key) - delta[n])
        if dbias is not None:
            dbias = dbias.at[n, t].add(jnp.sum(dmasked, 0, keepdims=True) if dbias.shape[2] == 1 else dmasked)
        dscores = (dmasked * slope).astype(q.dtype)
        dq = dq.at[n].add(dot("bkrs,bksc->bkrc", dscores, k[t]))
        return (dq, dk.at[t].add(dot("bkrs,bkrc->bksc", dscores, q[n])), dv, dbias), None

    zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, jnp.float32), (q, k, v, bias))
    (dq, dk, dv, dbias), _ = jax.lax.scan(pair, zeros, pairs)
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), dbias, None, None, None


_sweep.defvjp(_sweep_forward, _sweep_backward)


def _scores(form, q, k, bias, masks, which):
    n, t, counts = which
    queries, keys = [a[n] for a in masks[0]], [a[t] for a in masks[1]]
    mask = tuple(a for pair in zip(queries, keys, strict=True) for a in pair) or None
    scores, slope = masked_scores(form, q[n], k[t], None if bias is None else bias[n, t], mask)
    return jnp.where(counts > 0, scores, HIDDEN), slope


def _key(key, k, which):
    return None if key is None else jax.random.fold_in(key, which[0] * k.shape[0] + which[1])
