"""Attention through random features, in time and memory linear in the length (FAVOR+, the Performer's)."""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lm.core import keys
from lm.core.errors import check_choice, check_positive
from lm.core.params import Constant, Param
from lm.layers.attention_blocks import HIDDEN, by_key_head, dot

KERNELS = ("softmax", "relu")
RELU_EPSILON = 1e-3  # Added to the features of "relu", in the authors' code too: a sum of them is never zero.
# The peak of sums without a key: above what hides a key, so that hidden keys have features of exactly 0 there too.
EMPTY = HIDDEN / 2
LEAST_TOTAL = 1e-33  # Of a query that sees a key: below, it sees none, as padding does, and gets zeros.


@dataclasses.dataclass(frozen=True)
class Favor:
    """How attention is approximated (Choromanski et al. 2020, 2009.14794).

    `features` is their number. "softmax" has the positive features exp(w x - |x|^2 / 2) (lemma 1), whose products are
    exp(q k) in the mean; "relu" has max(w x, 0), of the generalised attention (section 4.3). The w are drawn from
    N(0, 1), `orthogonal` ones in blocks of as many as a head is wide. In training they are drawn anew in every step,
    as in the authors' code; the paper redraws them from time to time. Elsewhere they are those of `seed`. One draw
    serves all heads and layers. `chunk` queries at a time are multiplied with the keys among them.
    """

    features: int = 256
    kernel: str = "softmax"
    orthogonal: bool = True
    chunk: int = 128
    seed: int = 0

    def __post_init__(self):
        check_positive(features=self.features, chunk=self.chunk)
        check_choice("kernel", self.kernel, KERNELS)

    def draw(self, head_dim: int, key: jax.Array | None = None) -> jax.Array:
        """w_1RC, from the key of a step in training, without one from `seed`.

        Orthogonal rows have the lengths of Gaussian ones, so that each alone is Gaussian (section 2.4).
        """
        key = jax.random.key(self.seed) if key is None else keys.named(key, "favor")
        rows, lengths = jax.random.split(key)
        w_RC = jax.random.normal(lengths, (self.features, head_dim))
        if self.orthogonal:
            blocks = -(-self.features // head_dim)
            directions = _orthonormal(jax.random.normal(rows, (blocks, head_dim, head_dim)))
            w_RC = jnp.linalg.norm(w_RC, axis=1, keepdims=True) * directions.reshape(-1, head_dim)[: self.features]
        return w_RC[None]

    def cache_spec(self, batch_size: int, kv_heads: int, head_dim: int) -> dict[str, Param]:
        """{"sums": [B, K, R, C], "totals", "peaks": [B, K, R]}: all that is kept of a sequence of any length."""
        shape, axes = (batch_size, kv_heads, self.features), ("batch", "act_kv_heads", "rank")

        def param(shape, axes, value=0.0):
            return Param(shape, axes, Constant(value), role="vector", trainable=False)

        sums = param((*shape, head_dim), (*axes, "head_dim"))
        return {"sums": sums, "totals": param(shape, axes), "peaks": param(shape, axes, EMPTY)}

    def flops(self, length: int, heads: int, kv_heads: int, head_dim: int, causal: bool) -> float:
        """Forward floating-point operations a token in the products, pairs that the chunk's mask hides not counted."""
        sides = 4 * (heads + kv_heads) * self.features * head_dim  # Features, and sums over keys or features.
        return sides + causal * min(self.chunk, length) * heads * (self.features + head_dim)


class Sums(NamedTuple):
    """Of the features of one document's keys, all over exp(peaks): times their values, and alone."""

    sums_BKRC: jax.Array
    totals_BKR: jax.Array
    peaks_BKR: jax.Array
    document_B: jax.Array


class _Chunk(NamedTuple):
    """A part of each row; `first_B` and `last_B` are its first and last document, -1 where all is padding."""

    q_BLHC: jax.Array
    k_BLKC: jax.Array
    v_BLKC: jax.Array
    query_documents_BL: jax.Array
    key_documents_BL: jax.Array
    first_B: jax.Array
    last_B: jax.Array


def attend(
    form: Favor,
    w_1RC: jax.Array,
    q_BLHC: jax.Array,
    k_BLKC: jax.Array,
    v_BLKC: jax.Array,
    *,
    causal: bool,
    scale: float | None = None,
    documents: tuple[jax.Array, jax.Array] | None = None,
    cache: dict[str, jax.Array] | None = None,
) -> tuple[jax.Array, dict[str, jax.Array] | None]:
    """(o_BLHC, the cache with the new keys): phi(q) (phi(k)' v) / phi(q) phi(k)' 1 (equations 4 and 13), in float32.

    `scale` of q k, C^-0.5 unless given, is divided between the two. `documents` (of queries, of keys), each [B, L],
    keep attention inside equal numbers, which must stand together; keys of document -1 are padding, which none sees.
    With a `cache` a row is one document, 0, which continues. Departures: features are divided by the largest that their
    query meets, which cancels exactly, and not by that of all keys, and nothing is added to those of "softmax"; causal
    sums are carried from chunk to chunk, not from token to token.
    """
    scale = q_BLHC.shape[-1] ** -0.5 if scale is None else scale
    exponents = functools.partial(_exponents, form, math.sqrt(scale) * w_1RC[0], scale)
    chunks = _cut(form.chunk, q_BLHC, k_BLKC, v_BLKC, documents)
    start = _empty(form, k_BLKC) if cache is None else _restored(cache)

    def keys_of(chunk):
        return exponents(chunk.k_BLKC.swapaxes(1, 2))

    def queries_of(chunk):
        return exponents(by_key_head(chunk.q_BLHC, chunk.k_BLKC.shape[2]))

    # What a chunk makes is made again for its gradient, from the sums before it: those alone are kept.
    @jax.checkpoint
    def forward(sums, chunk):
        return _add(sums, keys_of(chunk), chunk, chunk.last_B), None

    @jax.checkpoint
    def backward(sums, chunk):
        return _add(sums, keys_of(chunk), chunk, chunk.first_B), sums

    @jax.checkpoint
    def step(sums, now):
        chunk, after = now
        keys_BKSR = keys_of(chunk)
        o_BLHC = _read(queries_of(chunk), chunk, (sums, *after), keys_BKSR, causal)
        return _add(sums, keys_BKSR, chunk, chunk.last_B), o_BLHC

    if causal:
        end, o = jax.lax.scan(step, start, (chunks, ()))
    elif documents is not None:
        _, after = jax.lax.scan(backward, start, chunks, reverse=True)
        end, o = jax.lax.scan(step, start, (chunks, (after,)))
    else:
        end, _ = jax.lax.scan(forward, start, chunks)
        o = jax.lax.map(jax.checkpoint(lambda chunk: _read(queries_of(chunk), chunk, (end,))), chunks)
    o_BLHC = o.swapaxes(0, 1).reshape(q_BLHC.shape[0], -1, *q_BLHC.shape[2:])[:, : q_BLHC.shape[1]]
    kept = None if cache is None else {"sums": end.sums_BKRC, "totals": end.totals_BKR, "peaks": end.peaks_BKR}
    return o_BLHC.astype(q_BLHC.dtype), kept


def _orthonormal(x_BCC):
    """Each block's rows by Gram and Schmidt, twice, as once leaves the rounding of float32.

    Not by a QR decomposition, which makes some signs likelier than others, and in a program for several devices, where
    it is a call into LAPACK, stops XLA:CPU (jaxlib 0.10) for good.
    """

    def step(i, x_BCC):
        row_BC = x_BCC[:, i]
        for _ in range(2):
            shares_BC = dot("brc,bc->br", x_BCC, row_BC) * (jnp.arange(x_BCC.shape[1]) < i)[None]
            row_BC = row_BC - dot("br,brc->bc", shares_BC, x_BCC)
        return x_BCC.at[:, i].set(row_BC / jnp.linalg.norm(row_BC, axis=1, keepdims=True))

    return jax.lax.fori_loop(0, x_BCC.shape[1], step, x_BCC)


def _exponents(form, w_RC, scale, x_BKTC):
    """[B, K, T, R]: logarithms of the features, without their common factor."""
    x_BKTC = x_BKTC.astype(jnp.float32)
    products = dot("bktc,rc->bktr", x_BKTC, w_RC)
    if form.kernel == "relu":
        return jnp.log(jax.nn.relu(products) + RELU_EPSILON)
    return products - scale / 2 * jnp.sum(jnp.square(x_BKTC), -1, keepdims=True)


def _add(sums, exponents_BKSR, chunk, edge_B):
    """The sums with the chunk's keys of document `edge`, without those of another one before."""
    document_B = jnp.where(edge_B < 0, sums.document_B, edge_B)
    counts_BS = (chunk.key_documents_BL == document_B[:, None]) & (chunk.key_documents_BL >= 0)
    kept_BKR = (sums.document_B == document_B)[:, None, None]
    exponents_BKSR = jnp.where(counts_BS[:, None, :, None], exponents_BKSR, HIDDEN)
    before_BKR = jnp.where(kept_BKR, sums.peaks_BKR, EMPTY)
    peaks_BKR = jax.lax.stop_gradient(jnp.maximum(before_BKR, jnp.max(exponents_BKSR, 2)))
    shrink_BKR = jnp.where(kept_BKR, jnp.exp(before_BKR - peaks_BKR), 0.0)
    features_BKSR = jnp.exp(exponents_BKSR - peaks_BKR[:, :, None])
    sums_BKRC = dot("bksr,bskc->bkrc", features_BKSR, chunk.v_BLKC.astype(jnp.float32))
    return Sums(
        shrink_BKR[..., None] * sums.sums_BKRC + sums_BKRC,
        shrink_BKR * sums.totals_BKR + jnp.sum(features_BKSR, 2),
        peaks_BKR,
        document_B,
    )


def _read(exponents_BKTR, chunk, states, keys_BKSR=None, causal=False):
    """o_BLHC in float32 of a chunk's queries: over the sums of their document, and over the `keys` of the chunk.

    A sum has a peak for each feature, a key of the chunk one for all: of the first there are as many as features, of
    the second as many as pairs, and so what a query does not see decides nothing.
    """
    (B, L, H, C), K = chunk.q_BLHC.shape, chunk.k_BLKC.shape[2]
    documents_BT = jnp.tile(chunk.query_documents_BL, H // K)
    reached = []
    for sums in states:
        seen_BT = documents_BT == sums.document_B[:, None]
        reached.append(jnp.where(seen_BT[:, None, :, None], exponents_BKTR + sums.peaks_BKR[:, :, None], HIDDEN))
    peaks = [jnp.max(x, -1, keepdims=True) for x in reached]
    if keys_BKSR is not None:
        query_peaks_BKT1, key_peaks_BKS1 = (
            jax.lax.stop_gradient(jnp.max(x, -1, keepdims=True)) for x in (exponents_BKTR, keys_BKSR)
        )
        seen_BTS = _seen(documents_BT, chunk.key_documents_BL, causal)
        pairs_BKTS = jnp.where(seen_BTS[:, None], query_peaks_BKT1 + key_peaks_BKS1.swapaxes(2, 3), HIDDEN)
        peaks.append(jnp.max(pairs_BKTS, -1, keepdims=True))
    peak_BKT1 = jax.lax.stop_gradient(functools.reduce(jnp.maximum, peaks, jnp.full_like(peaks[0], EMPTY)))
    o_BKTC, totals_BKT = jnp.zeros((*exponents_BKTR.shape[:3], C), jnp.float32), jnp.zeros_like(peak_BKT1[..., 0])
    if keys_BKSR is not None:
        features_BKTR, key_features_BKSR = (
            jnp.exp(x - peak) for x, peak in ((exponents_BKTR, query_peaks_BKT1), (keys_BKSR, key_peaks_BKS1))
        )
        scores_BKTS = dot("bktr,bksr->bkts", features_BKTR, key_features_BKSR) * jnp.exp(pairs_BKTS - peak_BKT1)
        o_BKTC = dot("bkts,bskc->bktc", scores_BKTS, chunk.v_BLKC.astype(jnp.float32))
        totals_BKT = jnp.sum(scores_BKTS, -1)
    for sums, exponents in zip(states, reached, strict=True):
        features_BKTR = jnp.exp(exponents - peak_BKT1)
        o_BKTC += dot("bktr,bkrc->bktc", features_BKTR, sums.sums_BKRC)
        totals_BKT += dot("bktr,bkr->bkt", features_BKTR, sums.totals_BKR)
    totals_BKT1 = jnp.where(totals_BKT > LEAST_TOTAL, totals_BKT, 1.0)[..., None]
    # Of a bare quotient the gradient has the total's square, which float32 does not hold for small ones.
    unit_BKT1 = jax.lax.stop_gradient(totals_BKT1)
    o_BKTC = (o_BKTC / unit_BKT1) / (totals_BKT1 / unit_BKT1)
    return o_BKTC.reshape(B, K, H // K, L, C).transpose(0, 3, 1, 2, 4).reshape(B, L, H, C)


def _seen(documents_BT, key_documents_BS, causal):
    S = key_documents_BS.shape[1]
    seen_BTS = (documents_BT[:, :, None] == key_documents_BS[:, None, :]) & (key_documents_BS >= 0)[:, None, :]
    index_T, index_S = jnp.tile(jnp.arange(S), documents_BT.shape[1] // S), jnp.arange(S)
    return seen_BTS & (index_T[:, None] >= index_S[None, :])[None] if causal else seen_BTS


def _cut(size: int, q_BLHC: Any, k_BLKC: Any, v_BLKC: Any, documents: Any) -> _Chunk:
    """The chunks, along a new leading dimension, the last one padded."""
    B, L = q_BLHC.shape[:2]
    size = min(size, L)

    def cut(x, filling=0):
        padded = jnp.pad(x, ((0, 0), (0, -L % size)) + ((0, 0),) * (x.ndim - 2), constant_values=filling)
        return padded.reshape(B, -1, size, *x.shape[2:]).swapaxes(0, 1)

    pair = (jnp.zeros((B, L), jnp.int32),) * 2 if documents is None else documents
    queries, keys = (cut(jnp.broadcast_to(x, (B, L)), -1) for x in pair)
    first, last = _first(keys), _first(keys[..., ::-1])
    return _Chunk(cut(q_BLHC), cut(k_BLKC), cut(v_BLKC), queries, keys, first, last)


def _first(documents_NBL):
    """[N, B]: the first that is no padding; -1 where all are."""
    place = jnp.argmax(documents_NBL >= 0, -1, keepdims=True)
    return jnp.take_along_axis(documents_NBL, place, -1)[..., 0]


def _empty(form, k_BLKC):
    B, _, K, C = k_BLKC.shape
    zeros = jnp.zeros((B, K, form.features, C), jnp.float32)
    return Sums(zeros, zeros[..., 0], jnp.full(zeros.shape[:3], EMPTY), jnp.full((B,), -1, jnp.int32))


def _restored(cache):
    return Sums(cache["sums"], cache["totals"], cache["peaks"], jnp.zeros(cache["peaks"].shape[:1], jnp.int32))
