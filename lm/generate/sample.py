"""Sampling: temperature, top-k and top-p, with a cache where the context has room."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lm.core import params as specs
from lm.core.errors import UsageError

_EXCLUDED = -1e30


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How one token is drawn: temperature 0 takes the likeliest; then top-k, then top-p (Holtzman et al. 2019)."""

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self):
        if self.temperature < 0:
            raise UsageError(f"temperature={self.temperature} must not be negative; 0 takes the likeliest token")
        if self.top_k is not None and self.top_k < 1:
            raise UsageError(f"top_k={self.top_k} must be at least 1")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UsageError(f"top_p={self.top_p} must be above 0 and at most 1")


def generate(
    model: Any,
    params: dict[str, Any],
    prompts: Sequence[Sequence[int] | np.ndarray],
    tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    eos_id: int | None = None,
    start: Sequence[int] | None = None,
) -> list[np.ndarray]:
    """For each prompt the new ids, int32, at most `tokens` of them; an `eos_id` ends a row and is its last.

    An encoder-decoder's encoder reads the prompts, and its decoder continues `start`, by default its start_id alone.
    Row r draws from a key of (seed, r), so it does not depend on the other rows. Every token is predicted from the
    `model.context_limit` tokens before it: up to there with a cache, beyond it by a full pass a token, because
    positions then move. A model with `next_hidden`, which has no such cache, makes a full pass a token from the first;
    a counted one looks up the probabilities of each.
    Raises UsageError for an empty prompt.
    """
    if not continues_text(model):
        raise UsageError(f"{type(model).__name__} continues no text: it has neither a cache nor a next token")
    if not prompts:
        return []
    if min(map(len, prompts)) < 1:
        raise UsageError("a prompt has no tokens: give it at least one, such as the end-of-text token")
    _check_ids(prompts, getattr(model, "source_vocab_size", None) or model.vocab_size)
    settings = Sampling(temperature, top_k, top_p)
    limit = model.context_limit
    source: dict[str, np.ndarray] = {}
    if hasattr(model, "encode"):
        source["source_tokens_BS"], sizes = _rows(prompts)
        source["source_documents_BS"] = np.where(np.arange(sizes.max())[None] < sizes[:, None], 0, -1).astype(np.int32)
        prompts = [[model.start_id] if start is None else start] * len(prompts)
    elif start is not None:
        raise UsageError("start is what a decoder beside an encoder continues: without one, put it before the prompts")
    ids, lengths = _rows(prompts, tokens)
    longest = int(lengths.max())
    keys = jax.vmap(functools.partial(jax.random.fold_in, jax.random.key(seed)))(jnp.arange(len(prompts)))
    if hasattr(model, "next_log_probs"):
        rows = _counted(model, settings, tokens, params, prompts, keys)
        return [_until(row, eos_id) for row in rows]
    if hasattr(model, "next_hidden"):
        limit, cached = min(limit or longest + tokens, longest + tokens), 0
    else:
        cached = tokens if limit is None else max(0, min(tokens, limit - longest))
    if cached:
        ids = _cached(model, settings, longest, cached, params, source, ids, lengths, keys)
    if cached < tokens:
        ids = _sliding(model, settings, limit, tokens - cached, params, source, ids, lengths + cached, keys, cached)
    ids = np.asarray(ids)
    return [_until(row[n : n + tokens], eos_id) for row, n in zip(ids, lengths, strict=True)]


def _rows(prompts: Sequence[Any], room: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """(int32 [B, longest + room], zeros behind each prompt; int32 [B], their lengths)."""
    lengths = np.array([len(p) for p in prompts], np.int32)
    ids = np.zeros((len(prompts), lengths.max() + room), np.int32)
    for row, prompt in zip(ids, prompts, strict=True):
        row[: len(prompt)] = prompt
    return ids, lengths


def _check_ids(prompts: Sequence[Sequence[int] | np.ndarray], rows: int) -> None:
    highest = max(int(np.max(prompt)) for prompt in prompts)
    if highest >= rows:
        raise UsageError(f"a prompt has the id {highest}, outside the vocabulary of {rows}: another tokenizer's?")


def continues_text(model: Any) -> bool:
    """Whether the model predicts a next token: one that sees both ways, or has another head, does not."""
    return any(hasattr(model, name) for name in ("cache_spec", "next_hidden", "next_log_probs"))


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _cached(model, settings, prompt_len, tokens, params, source, ids, lengths, keys):
    """`ids` with `tokens` more in each row: one pass over source and prompts, then a token at a time."""
    rows = jnp.arange(ids.shape[0])
    sizes = (ids.shape[0], prompt_len + tokens, *(source["source_tokens_BS"].shape[1:] if source else ()))
    cache = specs.initialize(model.cache_spec(*sizes), jax.random.key(0))
    head = model.head(params)

    def draw(ids, hidden_BD, t):
        chosen = _draw(settings, model.logits(head, hidden_BD), keys, t)
        return ids.at[rows, lengths + t].set(chosen), chosen

    def step(carry, t):
        ids, last, cache = carry
        out = model.apply(params, {"tokens_BL": last[:, None]}, cache=cache)
        ids, last = draw(ids, out.hidden_BLD[:, 0], t)
        return (ids, last, out.cache), None

    # The padding of shorter prompts is no part of the cache.
    documents = jnp.where(jnp.arange(prompt_len)[None] < lengths[:, None], 0, -1)
    out = model.apply(params, {"tokens_BL": ids[:, :prompt_len], "documents_BL": documents} | source, cache=cache)
    ids, last = draw(ids, out.hidden_BLD[rows, lengths - 1], 0)
    return jax.lax.scan(step, (ids, last, out.cache), jnp.arange(1, tokens))[0][0]


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _sliding(model, settings, limit, tokens, params, source, ids, lengths, keys, drawn):
    """`ids` with `tokens` more in each row, each from a full pass over the `limit` tokens before it."""
    rows = jnp.arange(ids.shape[0])
    head = model.head(params)
    ids = jnp.pad(ids, ((0, 0), (0, max(0, limit - ids.shape[1]))))

    def step(ids, t):
        first = jnp.maximum(lengths + t - limit, 0)
        context = jax.vmap(lambda row, i: jax.lax.dynamic_slice(row, (i,), (limit,)))(ids, first)
        hidden_BD = _next_hidden(model, params, source, context, jnp.minimum(lengths + t, limit))
        chosen = _draw(settings, model.logits(head, hidden_BD), keys, drawn + t)
        return ids.at[rows, lengths + t].set(chosen), None

    return jax.lax.scan(step, ids, jnp.arange(tokens))[0]


def _counted(model, settings, tokens, tables, prompts, keys):
    """What a counted model writes after each prompt, [B, tokens]: its next tokens' probabilities are looked up."""
    rows = [list(prompt) for prompt in prompts]
    for t in range(tokens):
        log_p_BV = np.stack([model.next_log_probs(tables, np.array(row, np.int32)) for row in rows])
        for row, chosen in zip(
            rows, np.asarray(_draw(settings, jnp.asarray(log_p_BV, jnp.float32), keys, t)), strict=True
        ):
            row.append(int(chosen))
    return np.array([row[len(row) - tokens :] for row in rows], np.int32)


def _next_hidden(model, params, source, tokens_BL, lengths_B):
    if hasattr(model, "next_hidden"):
        return model.next_hidden(params, tokens_BL, lengths_B)
    out = model.apply(params, {"tokens_BL": tokens_BL} | source)
    return out.hidden_BLD[jnp.arange(len(lengths_B)), lengths_B - 1]


def _draw(settings: Sampling, logits_BV: jax.Array, keys_B: jax.Array, t: jax.Array | int) -> jax.Array:
    """One id a row; the key of a draw is the row's own folded with the number of tokens drawn before."""
    if settings.temperature == 0:
        return jnp.argmax(logits_BV, -1).astype(jnp.int32)
    logits_BV = filter_logits(logits_BV / settings.temperature, settings.top_k, settings.top_p)
    keys_B = jax.vmap(jax.random.fold_in, (0, None))(keys_B, t)
    return jax.vmap(jax.random.categorical)(keys_B, logits_BV).astype(jnp.int32)


def filter_logits(logits_BV: jax.Array, top_k: int | None, top_p: float | None) -> jax.Array:
    """The logits with all but the `top_k` likeliest excluded, then all but the fewest that hold `top_p` of the rest."""
    if top_k is not None and top_k < logits_BV.shape[-1]:
        least = jax.lax.top_k(logits_BV, top_k)[0][:, -1:]
        logits_BV = jnp.where(logits_BV < least, _EXCLUDED, logits_BV)
    if top_p is not None and top_p < 1:
        sorted_BV = jnp.sort(logits_BV, -1, descending=True)
        share_BV = jax.nn.softmax(sorted_BV, -1)
        kept_BV = jnp.cumsum(share_BV, -1) - share_BV < top_p
        least = jnp.min(jnp.where(kept_BV, sorted_BV, jnp.inf), -1, keepdims=True)
        logits_BV = jnp.where(logits_BV < least, _EXCLUDED, logits_BV)
    return logits_BV


def _until(ids: np.ndarray, eos_id: int | None) -> np.ndarray:
    if eos_id is None:
        return ids
    ends = np.flatnonzero(ids == eos_id)
    return ids[: ends[0] + 1] if len(ends) else ids
