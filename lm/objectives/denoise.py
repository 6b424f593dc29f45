"""Write a text again from a noised copy of it."""

import dataclasses
from typing import Any

import jax
import numpy as np

from lm.core.errors import UsageError
from lm.objectives.causal import Causal
from lm.objectives.encdec import encdec_row
from lm.objectives.noises import Noise, SentencePermutation, TextInfilling


@dataclasses.dataclass(frozen=True)
class Denoise:
    """BART's objective (Lewis et al. 2019, 1910.13461): `noises` one after another, then all of the text again.

    Source: <s>, the noised text, </s>. Target: <s>, the text, </s>, and the decoder starts from </s>. The
    default noises are those that the paper chose in the end (section 3): sentences permuted, 30 % of tokens infilled.
    Documents that meet in a window are one text.
    """

    noises: tuple[Noise, ...] = (SentencePermutation(), TextInfilling())
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    chunk_tokens: int | None = None
    ids: tuple[int, ...] | None = None  # Of extra_ids; with vocab_size, the tokenizer's, filled in by resolve.
    vocab_size: int | None = None

    extra_ids = ("<s>", "</s>", "[MASK]")
    needs = ("source",)  # Of a model, see lm.train.run.resolve.
    scores_text = False

    def __post_init__(self):
        if not self.noises:
            raise UsageError("noises=() leaves the text as it is: name at least one")
        self._causal()

    @property
    def start_id(self) -> int:
        """What the decoder starts from."""
        assert self.ids is not None  # Filled in by lm.train.run.resolve.
        return self.ids[1]

    def window(self, seq_len: int) -> int:
        """The raw tokens behind a row of `seq_len`: <s> and </s> take two places."""
        if seq_len < 4:
            raise UsageError(f"seq_len={seq_len} must be at least 4: <s>, two tokens and </s>")
        return seq_len - 2

    def corrupt(self, rng: np.random.Generator, row: dict[str, Any]) -> dict[str, np.ndarray]:
        """source_tokens, source_documents [S]; tokens, targets, weights, lost [L], both window + 2 long."""
        assert self.ids is not None
        start, end, mask = self.ids
        tokens, real = np.asarray(row["tokens"], np.int32), np.asarray(row["documents"]) >= 0
        text = tokens[real]
        # Noises move places instead of tokens, so that the lost ones are known; len(text) stands for [MASK].
        places = np.arange(len(text))
        for noise in self.noises if len(text) else ():
            places = noise.apply(rng, places, len(text), row["split"].sentence_ends[text])
        noised = np.append(text, mask)[places]
        source, target = (np.concatenate([[start], x, [end]]) if len(text) else x for x in (noised, text))
        lost = np.zeros(len(tokens) + 2, np.float32)
        lost[1 + np.setdiff1d(np.arange(len(text)), places)] = 1
        return encdec_row(source, target, (len(tokens) + 2, len(tokens) + 2), end) | {"lost_BL": lost}

    def loss(
        self,
        model: Any,
        params: dict[str, Any],
        batch: dict[str, jax.Array],
        *,
        key: jax.Array | None = None,
        frozen: Any = None,
    ) -> dict[str, tuple[jax.Array, jax.Array, float]]:
        """{name: (sum over the text with its start and end, their number, coefficient)}.

        "lost_nll" is over the tokens that the source has lost, the only ones which copying does not give.
        """
        lost = ("lost_nll", batch["lost_BL"])
        return self._causal().loss(model, params, batch, key=key, frozen=frozen, subset=lost)

    def _causal(self):
        return Causal(self.label_smoothing, self.z_loss, self.chunk_tokens)
