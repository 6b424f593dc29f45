"""Write a sentence again from a reading of it, or of what is left when words are deleted and swapped."""

import dataclasses
from typing import Any

import jax
import numpy as np

from lm.core.errors import UsageError
from lm.objectives.causal import Causal
from lm.objectives.encdec import encdec_row


@dataclasses.dataclass(frozen=True)
class Autoencode:
    """The sentence autoencoder, and the denoising one where its noise is not zero (SDAE: Hill et al. 2016, 1602.03483,
    section 3.1; after Hinton and Salakhutdinov 2006 and Vincent et al. 2008).

    Each word is deleted with probability `deleted`; then each pair of neighbours, no two of which overlap, changes
    places with probability `swapped`. Source: the words that are left. Target: the sentence, </s>, and the decoder
    starts from </s>. With `deleted` 1 it is a language model of sentences.

    A row is one sentence: of those that begin in a window of the text, one drawn at random, cut to the row's length. It
    ends with </s> (at kind word the end of a line), or with its document.
    """

    deleted: float = 0.0
    swapped: float = 0.0
    chunk_tokens: int | None = None
    ids: tuple[int, ...] | None = None  # Of extra_ids; with vocab_size, the tokenizer's, filled in by resolve.
    vocab_size: int | None = None

    extra_ids = ("</s>",)
    needs = ("source",)  # Of a model, see lm.train.run.resolve.
    scores_text = False

    def __post_init__(self):
        for name in ("deleted", "swapped"):
            if not 0 <= getattr(self, name) <= 1:
                raise UsageError(f"{name}={getattr(self, name)} must be from 0 to 1")
        if self.deleted == 1 and self.swapped:
            raise UsageError(f"swapped={self.swapped} has no effect with deleted=1: leave it out")
        self._causal()

    @property
    def start_id(self) -> int:
        """What the decoder starts from."""
        assert self.ids is not None  # Filled in by lm.train.run.resolve.
        return self.ids[0]

    def window(self, seq_len: int) -> int:
        """The raw tokens of which a row of `seq_len` takes a sentence."""
        return seq_len

    def corrupt(self, rng: np.random.Generator, row: dict[str, Any]) -> dict[str, np.ndarray]:
        """source_tokens, source_documents [S]; tokens, targets, weights [L], both of the window's length.

        A row in whose window no sentence begins weighs nothing.
        """
        length = len(row["tokens"])
        text = self._sentence(rng, row)
        left = text[rng.random(len(text)) >= self.deleted]
        pairs = left[: len(left) // 2 * 2].reshape(-1, 2)
        swapped = rng.random(len(pairs)) < self.swapped
        pairs[swapped] = pairs[swapped, ::-1]
        target = np.append(text, self.start_id)[:length] if len(text) else text
        return encdec_row(left, target, (length, length), self.start_id)

    def loss(
        self,
        model: Any,
        params: dict[str, Any],
        batch: dict[str, jax.Array],
        *,
        key: jax.Array | None = None,
        frozen: Any = None,
    ) -> dict[str, tuple[jax.Array, jax.Array, float]]:
        """{name: (sum over the sentences with their ends, the number of tokens, coefficient)}."""
        return self._causal().loss(model, params, batch, key=key, frozen=frozen)

    def _causal(self):
        return Causal(chunk_tokens=self.chunk_tokens)

    def _sentence(self, rng, row):
        """Its words without the end, a copy; none where no sentence begins in the window."""
        tokens, documents, split = np.asarray(row["tokens"]), np.asarray(row["documents"]), row["split"]
        after_end = np.append(row["start"] == 0, (tokens[:-1] == self.start_id) | (np.diff(documents) > 0))
        begins = np.flatnonzero(after_end & (documents >= 0) & (tokens != self.start_id))
        if not len(begins):
            return np.zeros(0, np.int32)
        first = row["start"] + int(rng.choice(begins))
        text = split.window(first, min(len(tokens), split.bounds(first)[1] - first))
        ends = np.flatnonzero(text == self.start_id)
        return text[: ends[0]] if len(ends) else text
