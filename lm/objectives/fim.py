"""Predict the middle of a text after both its ends."""

import dataclasses
from typing import Any

import jax
import numpy as np

from lm.core.errors import UsageError, check_choice
from lm.objectives.causal import Causal

MODES = ("psm", "spm")


@dataclasses.dataclass(frozen=True)
class FillInTheMiddle:
    """Causal prediction of documents of which a share `rate` is reordered (Bavarian et al. 2022, 2207.14255).

    A document's part of the row is cut in three at two uniform places: between tokens, as corpora hold tokens, where
    the paper's best cuts lie between characters. "psm" writes [PRE] prefix [SUF] suffix [MID] middle [EOT]; of
    reordered documents a share `spm` becomes [PRE] [SUF] suffix [MID] prefix middle [EOT]. What no longer fits the
    row is cut off its end. `predicted`: "all" tokens, or of reordered documents the "middle" and its [EOT] alone.
    """

    rate: float = 0.5
    spm: float = 0.5
    predicted: str = "all"
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    chunk_tokens: int | None = None
    ids: tuple[int, ...] | None = None  # Of extra_ids; with vocab_size, the tokenizer's, filled in by resolve.
    vocab_size: int | None = None

    extra_ids = ("[PRE]", "[SUF]", "[MID]", "[EOT]")
    needs = ("causal",)  # Of a model, see lm.train.run.resolve.
    context = 1  # See lm.data.stream.Objective.
    scores_text = False

    def __post_init__(self):
        check_choice("predicted", self.predicted, ("all", "middle"))
        for name in ("rate", "spm"):
            if not 0 <= getattr(self, name) <= 1:
                raise UsageError(f"{name}={getattr(self, name)} must be from 0 to 1")
        self._causal()

    def window(self, seq_len: int) -> int:
        """The raw tokens behind a row of `seq_len`: each target is the token after."""
        return seq_len + 1

    def corrupt(self, rng: np.random.Generator, row: dict[str, Any]) -> dict[str, np.ndarray]:
        """The causal row of the reordered text."""
        tokens, documents = (np.asarray(row[name], np.int32) for name in ("tokens", "documents"))
        borders = np.flatnonzero(np.diff(documents)) + 1
        parts = []
        for text, number in zip(np.split(tokens, borders), np.split(documents, borders), strict=True):
            reordered, predicted = text, np.ones(len(text), bool)
            if number[0] >= 0 and rng.random() < self.rate:
                reordered, predicted = self._reorder(rng, text)
            parts.append((reordered, np.full(len(reordered), number[0], np.int32), predicted))
        text, numbers, predicted = (np.concatenate(x)[: len(tokens)] for x in zip(*parts, strict=True))
        batch = self._causal().corrupt(rng, row | {"tokens": text, "documents": numbers})
        return batch | {"weights_BL": batch["weights_BL"] * predicted[1:].astype(np.float32)}

    def loss(
        self,
        model: Any,
        params: dict[str, Any],
        batch: dict[str, jax.Array],
        *,
        key: jax.Array | None = None,
        frozen: Any = None,
    ) -> dict[str, tuple[jax.Array, jax.Array, float]]:
        """{name: (sum over the predicted tokens, their number, coefficient)}."""
        return self._causal().loss(model, params, batch, key=key, frozen=frozen)

    def _reorder(self, rng, text):
        """(the reordered text, which of its tokens are predicted)."""
        assert self.ids is not None  # Filled in by lm.train.run.resolve.
        pre, suf, mid, eot = (np.array([i], np.int32) for i in self.ids)
        first, last = np.sort(rng.integers(0, len(text) + 1, 2))
        prefix, middle, suffix = text[:first], text[first:last], text[last:]
        context = [pre, prefix, suf, suffix, mid]
        if rng.random() < self.spm:
            context = [pre, suf, suffix, mid, prefix]
        before = np.concatenate(context)
        predicted = np.ones(len(before) + len(middle) + 1, bool)
        predicted[: len(before)] = self.predicted == "all"
        return np.concatenate([before, middle, eot]).astype(np.int32), predicted

    def _causal(self):
        return Causal(self.label_smoothing, self.z_loss, self.chunk_tokens)
