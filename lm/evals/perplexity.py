"""Loss, perplexity and bits per byte over a whole split."""

import functools
import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp


def make_evaluate(model: Any, objective: Any) -> Callable[[Any, Any, Iterable[dict[str, jax.Array]]], dict[str, float]]:
    """evaluate(params, frozen, batches) -> {term: mean over all positions of all batches}.

    Each batch's sums are float32 on the device; they are added up in float64 on the host. Padded positions
    carry weight 0, so batches of any size give the same means.
    """

    sums = _sums(model, objective)

    def evaluate(params, frozen, batches):
        totals: dict[str, list[float]] = {}
        waiting = None
        for batch in batches:
            running, waiting = waiting, sums(params, frozen, batch)
            _add(totals, running)
        _add(totals, waiting)
        return {name: total / weight if weight else math.nan for name, (total, weight) in totals.items()}

    return evaluate


@functools.lru_cache(maxsize=4)
def _sums(model: Any, objective: Any) -> Callable:
    """Jitted once for all runs of a process with this model and objective."""

    @jax.jit
    def sums(params, frozen, batch):
        terms = objective.loss(model, params, batch, key=None, frozen=frozen)
        return {name: jnp.stack([jnp.asarray(x, jnp.float32) for x in term[:2]]) for name, term in terms.items()}

    return sums


def bits_per_byte(nats_per_token: float, tokens: int, text_bytes: int) -> float:
    """Bits a byte of the original text; exact where the tokenizer loses none of it (byte, bpe, unigram, whole char)."""
    return nats_per_token * tokens / (text_bytes * math.log(2))


def _add(totals: dict[str, list[float]], sums: dict[str, jax.Array] | None) -> None:
    for name, pair in (sums or {}).items():
        total, weight = (float(x) for x in jax.device_get(pair))
        old = totals.setdefault(name, [0.0, 0.0])
        old[0] += total
        old[1] += weight
