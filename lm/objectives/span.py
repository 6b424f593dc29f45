"""Predict the spans that a text has lost, one after another."""

import bisect
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lm.core.errors import UsageError, check_positive
from lm.objectives.causal import Causal
from lm.objectives.encdec import encdec_row


def sentinel_names(number: int) -> tuple[str, ...]:
    """T5's names of the tokens that stand for spans. In its vocabulary their ids descend."""
    return tuple(f"<extra_id_{i}>" for i in range(number))


@dataclasses.dataclass(frozen=True)
class Noise:
    """How much of a text is taken out, and in how many spans.

    Of n tokens round(density * n) are noise, in round(noise / mean_span) spans, as in T5's `random_spans_noise_mask`:
    both at least 1, and one token at least stays. Without `mean_span` it is one span at the end.
    """

    density: float = 0.15
    mean_span: float | None = 3.0

    def __post_init__(self):
        if not 0 < self.density < 1:
            raise UsageError(f"density={self.density} must be above 0 and below 1")
        if self.mean_span is not None and self.mean_span < 1:
            raise UsageError(f"mean_span={self.mean_span} must be at least 1")

    def counts(self, length: int) -> tuple[int, int]:
        """(noise tokens, spans) of a text; (0, 0) where there are not two tokens."""
        if length < 2:
            return 0, 0
        noise = min(max(round(length * self.density), 1), length - 1)
        spans = 1 if self.mean_span is None else max(round(noise / self.mean_span), 1)
        return noise, min(spans, length - noise)

    def lengths(self, length: int) -> tuple[int, int]:
        """(source, target) of a text of this length, with sentinels but without an end."""
        noise, spans = self.counts(length)
        return length - noise + spans, noise + spans

    def longest(self, source: int) -> int:
        """The longest text whose source takes no more than `source` places."""
        # Sources grow with their texts; what is kept of a text that is longer than these would not fit by itself.
        texts = range(source, 3 + int((source + 1) / (1 - self.density)))
        return texts[bisect.bisect_right(texts, source, key=lambda length: self.lengths(length)[0]) - 1]

    def mask(self, rng: np.random.Generator, length: int) -> np.ndarray:
        """bool [length], true at noise: kept and lost spans by turns, the lengths of both random partitions."""
        noise, spans = self.counts(length)
        turns = np.zeros((2, spans), np.int64)
        for row, tokens in zip(turns, (length - noise, noise), strict=True):
            row[:] = partition(rng, tokens, spans)
        lost = np.repeat(np.arange(2 * spans) % 2 == 1, turns.T.reshape(-1))
        return lost if spans else np.zeros(length, bool)


def partition(rng: np.random.Generator, items: int, parts: int) -> np.ndarray:
    """Lengths of `parts` parts of at least 1 that sum to `items`, all such partitions equally likely."""
    cuts = np.sort(rng.permutation(items - 1)[: max(parts - 1, 0)]) + 1
    return np.diff(cuts, prepend=0, append=items)[:parts]


def replace_spans(text: np.ndarray, lost: np.ndarray, sentinels: np.ndarray) -> np.ndarray:
    """`text` with its i-th run of `lost` tokens as the one token sentinels[i]."""
    first = lost & ~np.concatenate([[False], lost[:-1]])
    return np.where(first, sentinels[np.cumsum(first) - 1], text)[first | ~lost].astype(np.int32)


@dataclasses.dataclass(frozen=True)
class SpanCorruption:
    """T5's span corruption (Raffel et al. 2019, 1910.10683, section 3.1.4, and the noise of its reference code).

    Source: the text with each lost span as one sentinel, then </s>. Target: each sentinel and its span, then </s>,
    where the paper's figure has one sentinel more. Documents that meet in a window are one text.
    """

    density: float = 0.15
    mean_span: float = 3.0
    sentinels: int = 100
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    chunk_tokens: int | None = None
    ids: tuple[int, ...] | None = None  # Of extra_ids; with vocab_size, the tokenizer's, filled in by resolve.
    vocab_size: int | None = None

    needs = ("source",)  # Of a model, see lm.train.run.resolve.
    scores_text = False

    def __post_init__(self):
        check_positive(sentinels=self.sentinels)
        self._noise()
        self._causal()

    @property
    def extra_ids(self) -> tuple[str, ...]:
        """The decoder starts from "<pad>", and sources and targets end with "</s>"."""
        return ("<pad>", "</s>", *sentinel_names(self.sentinels))

    @property
    def start_id(self) -> int:
        """What the decoder starts from."""
        assert self.ids is not None  # Filled in by lm.train.run.resolve.
        return self.ids[0]

    def window(self, seq_len: int) -> int:
        """The raw tokens whose source is `seq_len` long, or as near as there is: 568 for 512."""
        if seq_len < 4:
            raise UsageError(f"seq_len={seq_len} must be at least 4: two tokens, a sentinel and an end")
        length = self._noise().longest(seq_len - 1)
        spans = self._noise().counts(length)[1]
        if spans > self.sentinels:
            raise UsageError(f"sentinels={self.sentinels} are too few for the {spans} spans of seq_len={seq_len}")
        return length

    def corrupt(self, rng: np.random.Generator, row: dict[str, Any]) -> dict[str, np.ndarray]:
        """source_tokens, source_documents [S]; tokens, targets, weights [L]: 512 and 114 of 568 raw tokens."""
        assert self.ids is not None
        start, end, *sentinels = self.ids
        tokens, real = np.asarray(row["tokens"], np.int32), np.asarray(row["documents"]) >= 0
        source, target = split_text(rng, self._noise(), tokens[real], np.array(sentinels))
        ends = np.array([end], np.int32)[: len(source)]  # A row of padding alone has none.
        lengths = (1 + n for n in self._noise().lengths(len(tokens)))
        return encdec_row(np.append(source, ends), np.append(target, ends), tuple(lengths), start)

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

    def _noise(self):
        return Noise(self.density, self.mean_span)

    def _causal(self):
        return Causal(self.label_smoothing, self.z_loss, self.chunk_tokens)


def split_text(
    rng: np.random.Generator, noise: Noise, text: np.ndarray, sentinels: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """(source, target) of a text: what is lost stands as sentinels in the one, what is kept in the other."""
    lost = noise.mask(rng, len(text))
    if not lost.any():
        return text, text[:0]
    return replace_spans(text, lost, sentinels), replace_spans(text, ~lost, sentinels)
