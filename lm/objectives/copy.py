"""Predict the second half of each document from its first."""

import dataclasses
from typing import Any

import jax
import numpy as np

from lm.core.errors import UsageError
from lm.objectives.causal import Causal


@dataclasses.dataclass(frozen=True)
class Copy:
    """The duplication task (Kitaev et al. 2020, 2001.04451, section 5): documents 0w0w, of which the second w counts.

    A row is a whole document, of exactly its length; its last token predicts nothing.
    """

    chunk_tokens: int | None = None

    extra_ids = ()
    needs = ("causal",)  # Of a model, see lm.train.run.resolve.
    scores_text = False

    def window(self, seq_len: int) -> int:
        """The raw tokens of a document."""
        return seq_len

    def corrupt(self, rng: np.random.Generator, row: dict[str, Any]) -> dict[str, np.ndarray]:
        """The document in which the window begins: tokens, targets and weights [L], 1 in the second half behind its 0.

        Raises UsageError for a document of another length.
        """
        length = len(row["tokens"])
        if row["documents"][0] < 0:  # Past the end of the split.
            zero = np.zeros(length, np.int32)
            return {"tokens_BL": zero, "targets_BL": zero, "weights_BL": zero.astype(np.float32)}
        first, end = row["split"].bounds(row["start"])
        if end - first != length:
            raise UsageError(f"a document has {end - first} tokens, and a row {length}: they must be as long")
        tokens = row["split"].window(first, length)
        counts = (np.arange(length) >= length // 2) & (np.arange(length) < length - 1)
        return {"tokens_BL": tokens, "targets_BL": np.roll(tokens, -1), "weights_BL": counts.astype(np.float32)}

    def loss(
        self,
        model: Any,
        params: dict[str, Any],
        batch: dict[str, jax.Array],
        *,
        key: jax.Array | None = None,
        frozen: Any = None,
    ) -> dict[str, tuple[jax.Array, jax.Array, float]]:
        """{name: (sum over the second halves, their tokens, coefficient)}."""
        return Causal(chunk_tokens=self.chunk_tokens).loss(model, params, batch, key=key, frozen=frozen)
