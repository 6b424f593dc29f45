"""Loss, perplexity and bits per byte over a whole split."""

import functools
import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lm.objectives import carry as carries

_CLUSTER_TOKENS = 1000


def make_evaluate(model: Any, objective: Any) -> Callable[..., dict[str, float]]:
    """evaluate(params, frozen, batches, carry=None) -> {term: mean over all positions}, and "loss_error".

    With a `carry`, see lm.objectives.carry, each batch continues the one before. Each batch's sums are float32 on the
    device; they are added up in float64 on the host. Padded positions carry weight 0, so batches of any size give the
    same means. "loss_error" is the standard error of the mean loss (of "nll" where there is one) over batches as
    clusters, since neighbouring tokens share a text; NaN with one batch.
    """

    sums = _sums(model, objective)

    def evaluate(params: Any, frozen: Any, batches: Iterable[dict[str, jax.Array]], carry: Any = None):
        found: list[dict[str, np.ndarray]] = []
        waiting = None
        for batch in batches:
            running, (waiting, carry) = waiting, sums(params, frozen, batch, carry)
            if running is not None:
                found.append(jax.device_get(running))
        found.append(jax.device_get(waiting))
        pairs = {name: np.asarray([sums[name] for sums in found], np.float64) for name in found[0]}
        means = {name: _mean(*pair.T) for name, pair in pairs.items()}
        return means | {"loss_error": _error(*pairs.get("nll", pairs["loss"]).T)}

    return evaluate


@functools.lru_cache(maxsize=4)
def _sums(model: Any, objective: Any) -> Callable:
    """Jitted once for all runs of a process with this model and objective."""

    @jax.jit
    def sums(params, frozen, batch, carry):
        terms, carry = carries.terms(objective, model, params, batch, carry, frozen=frozen)
        pairs = {name: jnp.stack([jnp.asarray(x, jnp.float32) for x in term[:2]]) for name, term in terms.items()}
        return pairs, carry

    return sums


def score_counted(model: Any, tables: Any, split: Any, max_tokens: int | None = None) -> dict[str, float]:
    """{"loss", "loss_error"} of a counted model over the split's first `max_tokens`, or all of them, in nats a token.

    Its clusters are blocks of 1,000 tokens.
    """
    tokens_T = split.window(0, min(split.tokens, max_tokens or split.tokens))
    losses_T = -model.score(tables, tokens_T)
    starts = np.arange(0, len(losses_T), _CLUSTER_TOKENS)
    sums, weights = (np.add.reduceat(x, starts) for x in (losses_T, np.ones_like(losses_T)))
    return {"loss": _mean(sums, weights), "loss_error": _error(sums, weights)}


def bits_per_byte(nats_per_token: float, tokens: int, text_bytes: int) -> float:
    """Bits a byte of the original text; exact where the tokenizer loses none of it (byte, bpe, unigram, whole char)."""
    return nats_per_token * tokens / (text_bytes * math.log(2))


def _mean(sums: np.ndarray, weights: np.ndarray) -> float:
    return float(sums.sum() / weights.sum()) if weights.sum() else math.nan


def _error(sums: np.ndarray, weights: np.ndarray) -> float:
    """Of a ratio of two sums over clusters (Cochran 1977, Sampling Techniques, equation 6.13)."""
    count = np.count_nonzero(weights)
    if count < 2:
        return math.nan
    residuals = sums - _mean(sums, weights) * weights
    return float(math.sqrt(count / (count - 1) * np.square(residuals).sum()) / weights.sum())
