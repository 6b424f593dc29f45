"""BART's five noises (Lewis et al. 2019, 1910.13461, section 2.2), each a function of a text's ids.

`apply(rng, text, mask, ends)` gives the noised text, never longer than `text`: `mask` is the id of [MASK] and `ends`
a bool [vocab], true for the pieces that end a sentence. Shares are exact up to rounding.
"""

import dataclasses

import numpy as np

from lm.core.errors import UsageError, check_positive


@dataclasses.dataclass(frozen=True)
class TokenMasking:
    """A share of the tokens becomes [MASK], each token for itself."""

    share: float = 0.15

    def __post_init__(self):
        _check_share(self.share)

    def apply(self, rng: np.random.Generator, text: np.ndarray, mask: int, ends: np.ndarray) -> np.ndarray:
        """As long as `text`."""
        return np.where(_choose(rng, len(text), self.share), np.int32(mask), text)


@dataclasses.dataclass(frozen=True)
class TokenDeletion:
    """A share of the tokens is gone: where they were has to be found out too."""

    share: float = 0.15

    def __post_init__(self):
        _check_share(self.share)

    def apply(self, rng: np.random.Generator, text: np.ndarray, mask: int, ends: np.ndarray) -> np.ndarray:
        """The tokens that are left, in order."""
        return text[~_choose(rng, len(text), self.share)]


@dataclasses.dataclass(frozen=True)
class TextInfilling:
    """Spans that hold a share of the tokens become one [MASK] each; a span of length 0 inserts one.

    Lengths are Poisson, the last cut to meet the share, and spans lie anywhere, of tokens where the authors' code takes
    whole words. Where insertions would make the text longer than it was, some are left out.
    """

    share: float = 0.3
    mean_span: float = 3.0

    def __post_init__(self):
        _check_share(self.share)
        check_positive(mean_span=self.mean_span)

    def apply(self, rng: np.random.Generator, text: np.ndarray, mask: int, ends: np.ndarray) -> np.ndarray:
        """The kept tokens in order, with one [MASK] a span between them."""
        lost = round(self.share * len(text))
        spans = self._lengths(rng, lost)
        kept = len(text) - lost
        # Kept tokens and spans take turns at random: each is an item, and some of the items are spans.
        items = np.ones(kept + len(spans), np.int64)
        is_span = np.zeros(len(items), bool)
        is_span[rng.permutation(len(items))[: len(spans)]] = True
        items[is_span] = spans
        first = np.minimum(np.cumsum(items) - items, max(len(text) - 1, 0))
        return np.where(is_span, np.int32(mask), text[first]) if len(items) else text

    def _lengths(self, rng, lost):
        """Random lengths that sum to `lost`, no more than `lost` of them."""
        lengths = np.zeros(0, np.int64)
        while lengths.sum() < lost:
            lengths = np.append(lengths, rng.poisson(self.mean_span, 1 + round(lost / self.mean_span)))
        if lost:
            lengths = lengths[: np.searchsorted(np.cumsum(lengths), lost) + 1]
            lengths[-1] -= lengths.sum() - lost
        spans, insertions = lengths[lengths > 0], lengths[lengths == 0]
        return rng.permutation(np.concatenate([spans, insertions[: lost - len(spans)]]))


@dataclasses.dataclass(frozen=True)
class SentencePermutation:
    """The sentences in random order; one ends with a full stop or the like, at the last of several in a row."""

    def apply(self, rng: np.random.Generator, text: np.ndarray, mask: int, ends: np.ndarray) -> np.ndarray:
        """As long as `text`."""
        # [MASK] may lie beyond the tokenizer's ids.
        last = np.append(ends, False)[np.minimum(text, len(ends))]
        last[:-1] &= ~last[1:]
        sentences = np.split(text, np.flatnonzero(last[:-1]) + 1)
        return np.concatenate([sentences[i] for i in rng.permutation(len(sentences))])


@dataclasses.dataclass(frozen=True)
class DocumentRotation:
    """The text starts at a random token, and what was before it comes last."""

    def apply(self, rng: np.random.Generator, text: np.ndarray, mask: int, ends: np.ndarray) -> np.ndarray:
        """As long as `text`."""
        return np.roll(text, -int(rng.integers(len(text)))) if len(text) else text


Noise = TokenMasking | TokenDeletion | TextInfilling | SentencePermutation | DocumentRotation


def _check_share(share):
    if not 0 <= share <= 1:
        raise UsageError(f"share={share} must be from 0 to 1")


def _choose(rng, length, share):
    chosen = np.zeros(length, bool)
    chosen[rng.permutation(length)[: round(share * length)]] = True
    return chosen
