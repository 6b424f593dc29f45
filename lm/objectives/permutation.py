"""Predict some tokens from the others, in a random order."""

import dataclasses
from typing import Any

import jax
import numpy as np

from lm.core.errors import UsageError, check_positive
from lm.objectives.cross_entropy import TokenLoss, cross_entropy


@dataclasses.dataclass(frozen=True)
class Permutation:
    """Permutation language modelling with partial prediction (Yang et al. 2019, 1906.08237, section 2).

    One token in `share` is predicted: spans of up to `max_span` tokens, of length n in proportion to 1 / n, each in
    `share` times as many tokens; single tokens make up the number. Documents that meet in a window do not see one
    another. All others come first in the order and see one
    another, the predicted ones follow in random order. A row is text, [SEP] and [CLS].
    """

    share: int = 6
    max_span: int = 5
    ids: tuple[int, ...] | None = None  # Of extra_ids; with vocab_size, the tokenizer's, filled in by resolve.
    vocab_size: int | None = None

    extra_ids = ("[SEP]", "[CLS]")
    needs = ("permuted",)  # Of a model, see lm.train.run.resolve.
    scores_text = False

    def __post_init__(self):
        check_positive(max_span=self.max_span)
        if self.share < 2:
            raise UsageError(f"share={self.share} must be at least 2: something has to be seen")

    def window(self, seq_len: int) -> int:
        """The raw tokens behind a row of `seq_len`: [SEP] and [CLS] take two places."""
        if seq_len < self.share + 2:
            raise UsageError(f"seq_len={seq_len} must be at least share + 2 = {self.share + 2}")
        return seq_len - 2

    def corrupt(self, rng: np.random.Generator, row: dict[str, Any]) -> dict[str, np.ndarray]:
        """tokens, order, documents, types [L]; picks, targets, weights [P], P = text // share, unused ones weigh 0."""
        text, documents = (np.asarray(row[name], np.int32) for name in ("tokens", "documents"))
        assert self.ids is not None  # Filled in by lm.train.run.resolve.
        number = len(text) // self.share
        chosen = _leave_context(self._spans(rng, documents >= 0, number), documents)
        picks = rng.permutation(np.flatnonzero(chosen))
        order = np.zeros(len(text) + 2, np.int32)
        order[picks] = 1 + np.arange(len(picks))
        tokens = np.append(text, np.array(self.ids, np.int32))
        last = documents.max() if len(documents) else -1
        padding = (0, number - len(picks))
        return {
            "tokens_BL": tokens,
            "order_BL": order,
            "documents_BL": np.append(documents, np.array([last, last], np.int32)),
            "types_BL": np.append(np.zeros(len(text) + 1, np.int32), np.int32(2)),
            "picks_BP": np.pad(picks, padding).astype(np.int32),
            "targets_BP": np.pad(text[picks], padding),
            "weights_BP": np.pad(np.ones(len(picks), np.float32), padding),
        }

    def loss(
        self,
        model: Any,
        params: dict[str, Any],
        batch: dict[str, jax.Array],
        *,
        key: jax.Array | None = None,
        frozen: Any = None,
    ) -> dict[str, tuple[jax.Array, jax.Array, float]]:
        """{name: (sum over predicted tokens, their number, coefficient)}."""
        out = model.apply(params, batch, key=key)
        form, weights = TokenLoss(model.valid_vocab_size or model.vocab_size), batch["weights_BP"]
        loss, sums = cross_entropy(form, model.logits, model.head(params), out.hidden_BLD, batch["targets_BP"], weights)
        weight = weights.sum()
        return {"loss": (loss, weight, 1.0)} | {n: (sums[n], weight, 0.0) for n in ("nll", "accuracy")} | out.aux

    def _spans(self, rng, real, number):
        """bool [W]: `number` chosen tokens, or a share of the real ones where there is padding."""
        number = min(number, int(real.sum()) // self.share)
        lengths = np.arange(1, self.max_span + 1)
        odds = 1 / lengths / (1 / lengths).sum()
        chosen, start = np.zeros(len(real), bool), 0
        while chosen.sum() < number and start < len(real):
            n = min(int(rng.choice(lengths, p=odds)), number - int(chosen.sum()))
            first = start + int(rng.integers((self.share - 1) * n + 1))
            chosen[first : first + n] = True
            chosen &= real
            start += self.share * n
        rest = np.flatnonzero(real & ~chosen)
        chosen[rng.permutation(rest)[: number - int(chosen.sum())]] = True
        return chosen


def _leave_context(chosen, documents):
    """`chosen` without the first token of each document in which nothing else would be seen."""
    for document in np.unique(documents[chosen]):
        places = np.flatnonzero(documents == document)
        if chosen[places].all():
            chosen[places[0]] = False
    return chosen
