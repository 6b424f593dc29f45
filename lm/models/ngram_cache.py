"""An n-gram model that expects recent words again: interpolated with the frequencies of the last few hundred tokens."""

import dataclasses
import os
from typing import Any

import numpy as np

from lm.core.errors import UsageError, check_positive
from lm.models.ngram import NGram, Tables
from lm.models.ngram_counts import Progress, spans


@dataclasses.dataclass(frozen=True)
class Cached:
    """p = (1 - weight) p_ngram + weight p_cache, of the last `tokens` tokens (Kuhn and De Mori 1990, IEEE PAMI 12(6)).

    One cache, of words, where the paper has one for each part of speech. Lines do not empty it, and their ends count
    as words; before the first token it is empty, and the n-gram model alone decides. Nothing more is fitted.
    """

    base: NGram = NGram()
    tokens: int = 200
    weight: float = 0.1

    offers = ("causal",)  # What an objective may need of it.
    context_limit = None  # It sees the last tokens of any length.

    def __post_init__(self):
        check_positive(tokens=self.tokens)
        if not 0 < self.weight < 1:
            raise UsageError(f"weight={self.weight} must be above 0 and below 1; without a cache take NGram itself")

    @property
    def vocab_size(self) -> int | None:
        """That of the n-gram model, and so is all else."""
        return self.base.vocab_size

    @property
    def valid_vocab_size(self) -> int | None:
        return self.base.valid_vocab_size

    @property
    def order(self) -> int:
        return self.base.order

    def with_boundary(self, boundary_id: int | None) -> "Cached":
        """See lm.models.ngram.NGram.with_boundary."""
        return dataclasses.replace(self, base=self.base.with_boundary(boundary_id))

    def fit(self, split: Any, folder: str | os.PathLike, progress: Progress | None = None) -> None:
        """See lm.models.ngram.NGram.fit."""
        self.base.fit(split, folder, progress)

    def open(self, folder: str | os.PathLike) -> Tables:
        """See lm.models.ngram.NGram.open."""
        return self.base.open(folder)

    def counts(self, tables: Tables) -> dict[int, int]:
        """See lm.models.ngram.NGram.counts."""
        return self.base.counts(tables)

    def score(self, tables: Tables, tokens_T: np.ndarray) -> np.ndarray:
        """ln p of each token given those before it, float64 [T]."""
        log_p_T = self.base.score(tables, tokens_T)
        for a, b in spans(len(tokens_T), self.base.chunk_tokens):
            first = max(0, a - self.tokens)
            p_cache = self._shares(np.asarray(tokens_T[first:b], np.int64))[a - first :]
            log_p_T[a:b] = self._mix(log_p_T[a:b], p_cache, np.arange(a, b) > 0)
        return log_p_T

    def next_log_probs(self, tables: Tables, context_T: np.ndarray) -> np.ndarray:
        """ln p of every token after those of the context, float64 [V]."""
        log_p_V = self.base.next_log_probs(tables, context_T)
        recent = np.asarray(context_T, np.int64)[-self.tokens :]
        shares_V = np.bincount(recent, minlength=self.base.classes) / max(1, len(recent))
        return self._mix(log_p_V, shares_V, np.array(len(recent) > 0))

    def _shares(self, tokens_T: np.ndarray) -> np.ndarray:
        """The share of each token among those up to `tokens` before it; of the first one 0."""
        at, span = np.arange(len(tokens_T)), len(tokens_T) + 1
        # Sorted by token, then by place: between two searches lie a token's occurrences in a window.
        places = np.sort(tokens_T * span + at)
        first = np.maximum(at - self.tokens, 0)
        seen = places.searchsorted(tokens_T * span + at) - places.searchsorted(tokens_T * span + first)
        return seen / np.maximum(1, at - first)

    def _mix(self, log_p: np.ndarray, p_cache: np.ndarray, filled: np.ndarray) -> np.ndarray:
        weight = np.where(filled, self.weight, 0.0)
        with np.errstate(divide="ignore"):  # Maximum likelihood gives zeros.
            return np.log((1 - weight) * np.exp(log_p) + weight * p_cache)
