"""Attention within chunks of the sequence and their neighbours, in time and memory linear in the length."""

import dataclasses

import jax
import jax.numpy as jnp

from lm.core.errors import UsageError, check_positive
from lm.layers.dropout import dropout

HIDDEN = -1e9


@dataclasses.dataclass(frozen=True)
class Local:
    """Chunks of `chunk` tokens: each sees itself, the `before` chunks before it and the `after` ones behind it."""

    chunk: int = 64
    before: int = 1
    after: int = 0
    dropout: float = 0.0

    def __post_init__(self):
        check_window(self)


def check_window(form) -> None:
    """Raises UsageError for sizes of chunks and neighbourhoods, or a rate of dropout, that cannot be."""
    check_positive(chunk=form.chunk)
    if form.before < 0 or form.after < 0:
        raise UsageError(f"before={form.before} and after={form.after} must not be negative")
    if not 0 <= form.dropout < 1:
        raise UsageError(f"dropout={form.dropout} must be at least 0 and below 1")


def local_attention(
    form: Local,
    q_BLHC: jax.Array,
    k_BLHC: jax.Array,
    v_BLHC: jax.Array,
    *,
    causal: bool,
    documents: tuple[jax.Array, jax.Array] | None = None,
    key: jax.Array | None = None,
) -> jax.Array:
    """o_BLHC: softmax attention with scale C^-0.5, each query to its window of chunks; L is a multiple of the chunk.

    A sequence that fits into one chunk is one. Neighbours go round: the first chunk's `before` are the last ones, as in
    transformers. `documents`, (of queries, of keys) [B, L], keeps attention inside equal numbers; `key` turns dropout
    of the weights on.
    """
    L, C = q_BLHC.shape[1], q_BLHC.shape[3]
    form = fitted(form, L)
    q, k, v = (in_chunks(x.transpose(0, 2, 1, 3), form.chunk) for x in (q_BLHC, k_BLHC, v_BLHC))
    places_BHZQ = in_chunks(jnp.arange(L)[None, None], form.chunk)
    seen = visible(places_BHZQ, window(form, places_BHZQ), causal)
    if documents is not None:
        of_queries, of_keys = (in_chunks(x[:, None], form.chunk) for x in documents)
        seen = seen & (of_queries[..., None] == window(form, of_keys)[..., None, :])
    scores = C**-0.5 * products(q, window(form, k))
    o, _ = weighted(jnp.where(seen, scores, HIDDEN), window(form, v), form.dropout, key)
    return o.reshape(*o.shape[:2], L, C).transpose(0, 2, 1, 3)


def fitted(form, length: int):
    """The form for a sequence of `length`: one chunk without neighbours where it fits into one.

    Raises ValueError where chunks do not divide it.
    """
    if length <= form.chunk:
        return dataclasses.replace(form, chunk=length, before=0, after=0)
    if length % form.chunk:
        raise ValueError(f"a sequence of {length} is no multiple of chunk={form.chunk}: pad it")
    return form


def in_chunks(x_BHL: jax.Array, chunk: int) -> jax.Array:
    """[B, H, Z, Q, ...] of [B, H, L, ...]: Z chunks of Q = `chunk` places."""
    return x_BHL.reshape(*x_BHL.shape[:2], -1, chunk, *x_BHL.shape[3:])


def window(form, x_BHZQ: jax.Array) -> jax.Array:
    """[B, H, Z, W, ...]: for each chunk what lies in it and its neighbours, in order."""
    chunks = [jnp.roll(x_BHZQ, -step, 2) for step in range(-form.before, form.after + 1)]
    return jnp.concatenate(chunks, 3)


def visible(query_places_BHZQ: jax.Array, key_places_BHZW: jax.Array, causal: bool) -> jax.Array:
    """[B, H, Z, Q, W] bool: all of a window, or what stands at or before the query's place."""
    ahead = key_places_BHZW[..., None, :] > query_places_BHZQ[..., None]
    return ~ahead if causal else jnp.full(ahead.shape, True)


def products(q_BHZQC: jax.Array, k_BHZWC: jax.Array) -> jax.Array:
    """[B, H, Z, Q, W] in float32."""
    return jnp.einsum("bhzqc,bhzwc->bhzqw", q_BHZQC, k_BHZWC, preferred_element_type=jnp.float32)


def weighted(
    scores_BHZQW: jax.Array, v_BHZWC: jax.Array, rate: float, key: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """(the values [B, H, Z, Q, C] by the softmax of the scores, its normaliser's logarithm [B, H, Z, Q])."""
    total = jax.nn.logsumexp(scores_BHZQW, -1, keepdims=True)
    weights = dropout(jnp.exp(scores_BHZQW - total), rate, key).astype(v_BHZWC.dtype)
    o = jnp.einsum("bhzqw,bhzwc->bhzqc", weights, v_BHZWC, preferred_element_type=jnp.float32)
    return o.astype(v_BHZWC.dtype), total[..., 0]
