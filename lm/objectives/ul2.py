"""A mixture of denoisers, each announced by a mode token."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lm.core.errors import UsageError, check_choice, check_positive
from lm.objectives.causal import Causal
from lm.objectives.encdec import encdec_row
from lm.objectives.span import Noise, sentinel_names, split_text

MODES = ("[R]", "[S]", "[X]")


@dataclasses.dataclass(frozen=True)
class Denoiser:
    """One noise, the mode token before its sources, and how many examples it gets in each period of the mixture."""

    mode: str
    noise: Noise
    weight: int = 1

    def __post_init__(self):
        check_choice("mode", self.mode, MODES)
        check_positive(weight=self.weight)


DENOISERS = (
    Denoiser("[R]", Noise(0.15, 3)),
    Denoiser("[R]", Noise(0.15, 8)),
    Denoiser("[S]", Noise(0.25, None)),
    Denoiser("[X]", Noise(0.5, 3)),
    Denoiser("[X]", Noise(0.5, 8)),
    Denoiser("[X]", Noise(0.15, 64)),
    Denoiser("[X]", Noise(0.5, 64)),
)


@dataclasses.dataclass(frozen=True)
class UL2:
    """UL2's mixture of denoisers (Tay et al. 2022, 2205.05131, section 3.1 and table 1, mixed uniformly).

    Source: mode token, text with each lost span as one sentinel, </s>. Target: each sentinel and its span, </s>.
    [R] is T5's span corruption, [X] loses much or long spans, [S] the last quarter, as one span. The example's index
    picks the denoiser, so that shares are exact. All rows have the length of the longest: a denoiser takes as much of
    the window as its source has room for, and padding fills its target.
    """

    denoisers: tuple[Denoiser, ...] = DENOISERS
    sentinels: int = 128  # What rows of 512 need; T5's vocabulary has names for 100.
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    chunk_tokens: int | None = None
    ids: tuple[int, ...] | None = None  # Of extra_ids; with vocab_size, the tokenizer's, filled in by resolve.
    vocab_size: int | None = None

    needs = ("source",)  # Of a model, see lm.train.run.resolve.
    scores_text = False

    def __post_init__(self):
        check_positive(sentinels=self.sentinels, denoisers=len(self.denoisers))
        self._causal()

    @property
    def extra_ids(self) -> tuple[str, ...]:
        """The decoder starts from "<pad>", and sources and targets end with "</s>"."""
        return ("<pad>", "</s>", *MODES, *sentinel_names(self.sentinels))

    @property
    def start_id(self) -> int:
        """What the decoder starts from."""
        assert self.ids is not None  # Filled in by lm.train.run.resolve.
        return self.ids[0]

    def window(self, seq_len: int) -> int:
        """The raw tokens of the denoiser that takes most of them into a source of `seq_len`."""
        if seq_len < 5:
            raise UsageError(f"seq_len={seq_len} must be at least 5: a mode, two tokens, a sentinel and an end")
        for noise in (denoiser.noise for denoiser in self.denoisers):
            spans = noise.counts(noise.longest(seq_len - 2))[1]
            if spans > self.sentinels:
                raise UsageError(
                    f"sentinels={self.sentinels} are too few for the {spans} spans of {noise} at seq_len={seq_len}"
                )
        return max(denoiser.noise.longest(seq_len - 2) for denoiser in self.denoisers)

    def corrupt(self, rng: np.random.Generator, row: dict[str, Any]) -> dict[str, np.ndarray]:
        """source_tokens, source_documents [S]; tokens, targets, weights [L], L for the longest target of all."""
        assert self.ids is not None
        start, end, *others = self.ids
        tokens, real = np.asarray(row["tokens"], np.int32), np.asarray(row["documents"]) >= 0
        # The denoiser that `window` was made for has the shortest source of this many tokens.
        space = min(denoiser.noise.lengths(len(tokens))[0] for denoiser in self.denoisers)
        target_space = max(d.noise.lengths(d.noise.longest(space))[1] for d in self.denoisers)
        denoiser = self._pick(int(row["index"]))
        text = tokens[real][: denoiser.noise.longest(space)]
        source, target = split_text(rng, denoiser.noise, text, np.array(others[len(MODES) :]))
        mode, ends = (np.array([i], np.int32)[: len(text)] for i in (others[MODES.index(denoiser.mode)], end))
        source, target = np.concatenate([mode, source, ends]), np.append(target, ends)
        return encdec_row(source, target, (space + 2, target_space + 1), start)

    def loss(
        self,
        model: Any,
        params: dict[str, Any],
        batch: dict[str, jax.Array],
        *,
        key: jax.Array | None = None,
        frozen: Any = None,
    ) -> dict[str, tuple[jax.Array, jax.Array, float]]:
        """{name: (sum over the targets, their number, coefficient)}; sentinels and ends count, but in "text_nll"."""
        text_BL = ~jnp.isin(batch["targets_BL"], jnp.array(self.ids))
        return self._causal().loss(model, params, batch, key=key, frozen=frozen, subset=("text_nll", text_BL))

    def _pick(self, index):
        """The denoiser of an example: in turns, each as often in a period as its weight says."""
        ends = np.cumsum([denoiser.weight for denoiser in self.denoisers])
        return self.denoisers[int(np.searchsorted(ends, index % ends[-1], "right"))]

    def _causal(self):
        return Causal(self.label_smoothing, self.z_loss, self.chunk_tokens)
