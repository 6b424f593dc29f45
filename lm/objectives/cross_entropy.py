"""Softmax cross-entropy that never holds tokens x vocabulary."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from lm.core.errors import UsageError
from lm.parallel.rules import BATCH_AXES

# What one device holds of the logits at a time: 256 MiB in float32, still a large product for any device.
CHUNK_LOGITS = 2**26

LogitsFunction = Callable[[Any, jax.Array], jax.Array]
Sums = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class TokenLoss:
    """The loss of one token: smoothed negative log likelihood plus z_loss * logsumexp^2.

    `label_smoothing` moves that share of the target onto a uniform one over the first `classes` logits (Szegedy
    et al. 2016, 1512.00567); `z_loss` draws the normaliser to 1 (PaLM, 2204.02311, section 5: 1e-4).
    """

    classes: int
    label_smoothing: float = 0.0
    z_loss: float = 0.0

    def __post_init__(self):
        if not 0 <= self.label_smoothing < 1:
            raise UsageError(f"label_smoothing={self.label_smoothing} must be at least 0 and below 1")
        if self.z_loss < 0:
            raise UsageError(f"z_loss={self.z_loss} must not be negative")


def cross_entropy(
    form: TokenLoss,
    logits: LogitsFunction,
    head: Any,
    x_BLD: jax.Array,
    targets_BL: jax.Array,
    weights_BL: jax.Array,
    chunk_tokens: int | None = None,
    subset_BL: jax.Array | None = None,
) -> tuple[jax.Array, Sums]:
    """(loss, {"nll", "accuracy", "z_loss", "subset_nll"}): weighted float32 sums over the tokens, the last with
    weights of `subset_BL` times theirs (0 unless given); the loss alone has a gradient.

    `logits(head, x [..., D])` gives [..., V] in float32. Works through `chunk_tokens` of the whole batch at a time
    (unless given: CHUNK_LOGITS on each device), a few of every row and on each device its own: they meet once, after
    the last chunk. Differentiated, each chunk's gradients are taken while its logits are there, and the backward pass
    only scales them: three products instead of four, and no second softmax.
    """
    B, L = targets_BL.shape
    chunks = chunk_count(B, L, jax.eval_shape(logits, head, x_BLD).shape[-1], chunk_tokens)
    weights = weights_BL.astype(jnp.float32)
    subset = jnp.zeros_like(weights) if subset_BL is None else weights * subset_BL
    return _cross_entropy(form, logits, chunks, head, x_BLD, targets_BL, weights, subset)


def chunk_count(B: int, L: int, classes: int, chunk_tokens: int | None = None) -> int:
    """In how many parts of `chunk_tokens` [B, L] tokens are scored; unless given, of CHUNK_LOGITS on each device."""
    tokens = chunk_tokens or CHUNK_LOGITS * _shards(B) // classes
    return math.ceil(L / max(1, tokens // B))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _cross_entropy(form, logits, chunks, head, x, *tokens):
    def chunk(head, part):
        x, *tokens = part
        return (_sums(form, logits(head, x), *tokens)[0], None), None

    (totals, _), _ = chunked(chunk, chunks, None, head, x, *tokens)
    return totals.pop("loss"), totals


def _forward(form, logits, chunks, head, x, *tokens):
    def chunk(head, part):
        # As one matrix: XLA:CPU makes the gradient of the logits anew for each of the shapes that products take.
        x, *tokens = (a.reshape(-1, *a.shape[2:]) for a in part)
        values, pull = jax.vjp(logits, head, x)
        sums, dlogits = _sums(form, values, *tokens)
        dhead, dx = pull(dlogits)
        return (sums, jax.tree.map(lambda g: g.astype(jnp.float32), dhead)), dx.reshape(part[0].shape)

    (totals, dhead), dx = chunked(chunk, chunks, head, head, x, *tokens)
    dhead = jax.tree.map(lambda g, p: g.astype(p.dtype), dhead, head)
    return (totals.pop("loss"), totals), (dhead, dx)


def _backward(form, logits, chunks, gradients, cotangents):
    g, _ = cotangents
    dhead, dx = jax.tree.map(lambda a: (a.astype(jnp.float32) * g).astype(a.dtype), gradients)
    return dhead, dx, None, None, None


_cross_entropy.defvjp(_forward, _backward)


def _sums(form, logits, targets, weights, subset):
    """(sums over the tokens of one chunk, gradient of the loss with respect to its logits)."""
    peak = jnp.max(logits, -1, keepdims=True)
    exponent = jnp.exp(logits - peak)
    total = jnp.sum(exponent, -1, keepdims=True)
    normaliser = (peak + jnp.log(total))[..., 0]
    classes = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
    is_target = classes == targets[..., None]
    # As argmax has it, whose pairs of values and indices a CPU reduces one by one.
    first_peak = jnp.min(jnp.where(logits == peak, classes, logits.shape[-1]), -1)
    nll = normaliser - jnp.take_along_axis(logits, targets[..., None], -1)[..., 0]
    z = form.z_loss * jnp.square(normaliser)
    loss, target_share, other_share = nll + z, 1.0, 0.0
    if form.label_smoothing:
        other_share = form.label_smoothing / form.classes
        target_share = 1 - form.label_smoothing
        mean = jnp.mean(logits[..., : form.classes], -1)
        loss = target_share * nll + form.label_smoothing * (normaliser - mean) + z
    sums = {
        "loss": loss,
        "nll": nll,
        "accuracy": (first_peak == targets).astype(jnp.float32),
        "z_loss": z,
    }
    slope = (1 + 2 * form.z_loss * normaliser)[..., None] / total
    dlogits = exponent * slope - target_share * is_target
    if other_share:
        dlogits = dlogits - other_share * (classes < form.classes)
    totals = {k: jnp.sum(v * weights) for k, v in sums.items()} | {"subset_nll": jnp.sum(nll * subset)}
    return totals, dlogits * weights[..., None]


def chunked(chunk, chunks, differentiated, head, *arrays_BL):
    """chunk(head, part) -> ((sums, the gradient of `differentiated`: the head or None), kept [B, length, ...]): the
    first added up over all chunks and devices, and the second put together to [B, L, ...].

    Each device goes through its own rows and positions. Left to the partitioner, the head's gradient would be reduced
    over all devices, and be whole on each, once a chunk. It comes back with its last dimension over "fsdp".
    """

    def local(head, *arrays_BL):
        parts = tuple(_split(a, chunks) for a in arrays_BL)
        (sums, dhead), kept = _total_and_each(functools.partial(chunk, head), parts)
        kept = jax.tree.map(lambda a: _join(a, arrays_BL[0].shape[1]), kept)
        return (jax.lax.psum(sums, axes), jax.tree.map(scattered, dhead)), kept

    def spreads(a):
        return "fsdp" in axes and a.ndim > 0 and a.shape[-1] % sizes["fsdp"] == 0

    def scattered(a):
        if not spreads(a):
            return jax.lax.psum(a, axes)
        others = tuple(axis for axis in axes if axis != "fsdp")
        return jax.lax.psum_scatter(jax.lax.psum(a, others), "fsdp", scatter_dimension=a.ndim - 1, tiled=True)

    def place(a):
        return PartitionSpec(*[None] * (a.ndim - 1), "fsdp") if spreads(a) else PartitionSpec()

    axes, sizes = _token_axes(arrays_BL[0].shape[0]), dict(jax.sharding.get_abstract_mesh().shape)
    if not axes:
        return local(head, *arrays_BL)
    rows = PartitionSpec(tuple(a for a in axes if a != "seq"), "seq" if "seq" in axes else None)
    each = jax.shard_map(
        local,
        in_specs=(PartitionSpec(), *(rows for _ in arrays_BL)),
        out_specs=((PartitionSpec(), jax.tree.map(place, differentiated)), rows),
        axis_names=set(axes),
        check_vma=False,
    )
    return each(head, *arrays_BL)


def _total_and_each(chunk, parts):
    """chunk(part) -> (summed, kept): the sum of the first over the leading dimension, the second stacked."""
    first = jax.tree.map(lambda a: a[0], parts)
    if parts[0].shape[0] == 1:
        summed, kept = chunk(first)
        return summed, jax.tree.map(lambda a: a[None], kept)
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(chunk, first)[0])

    def step(totals, part):
        summed, kept = chunk(part)
        return jax.tree.map(jnp.add, totals, summed), kept

    return jax.lax.scan(step, zeros, parts)


def _split(a_BL, chunks):
    """[chunks, B, ceil(L / chunks), ...]: chunk i has every chunks-th position, the last ones padded with zeros."""
    padding = -a_BL.shape[1] % chunks
    if padding:
        a_BL = jnp.pad(a_BL, [(0, 0), (0, padding)] + [(0, 0)] * (a_BL.ndim - 2))
    split = a_BL.reshape(a_BL.shape[0], -1, chunks, *a_BL.shape[2:])
    return jnp.moveaxis(split, 2, 0)


def _join(parts, length):
    """The inverse of `_split`."""
    joined = jnp.moveaxis(parts, 0, 2)
    return joined.reshape(joined.shape[0], -1, *joined.shape[3:])[:, :length]


def _token_axes(rows):
    """The mesh axes over which tokens are divided. What leaves a stack in stages, all of them have; each scores its own
    share where the rows divide once more, as they do with a multiple of as many micro-batches."""
    sizes = dict(jax.sharding.get_abstract_mesh().shape)
    batch = [a for a in BATCH_AXES if sizes.get(a, 1) > 1]
    if sizes.get("stage", 1) > 1 and rows % math.prod(sizes[a] for a in (*batch, "stage")) == 0:
        batch.append("stage")
    return (*batch, "seq") if sizes.get("seq", 1) > 1 else tuple(batch)


def _shards(rows):
    sizes = dict(jax.sharding.get_abstract_mesh().shape)
    return math.prod(sizes[a] for a in _token_axes(rows))
