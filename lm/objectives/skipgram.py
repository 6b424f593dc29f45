"""Words and their neighbours predict each other: skip-gram and CBOW, against negative samples or over a tree."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lm.core.errors import UsageError, check_choice, check_positive
from lm.layers.embed import embed, embed_tokens
from lm.objectives import subwords
from lm.objectives.hierarchical import Hierarchical

KINDS, TEXTS = ("skipgram", "cbow"), ("document", "line")
NGRAMS = 32  # Places for n-grams that a row has for each of its words.
_BLOCK = 16  # Words at least, of which the scores with the blocks around them are one product.


@dataclasses.dataclass(frozen=True)
class Negative:
    """Negative sampling (Mikolov et al. 2013, 1310.4546, equation 4): a target against `count` samples of the noise.

    Noise is in proportion to a word's count to the `power`. All pairs of a row share `draws` samples for each of its
    places, weighted so that a pair meets `count` in the mean: the gradient's expectation is that of samples of its own,
    and the scores are one product (Ji et al. 2016, 1604.04661, section 3.1, share within a window). A sample may be the
    pair's target, which word2vec.c draws anew.
    """

    count: int = 5
    power: float = 0.75
    draws: int = 2

    def __post_init__(self):
        check_positive(count=self.count, draws=self.draws)

    def arrays(self, rng: np.random.Generator, split: Any, tokens: np.ndarray) -> dict[str, np.ndarray]:
        """negatives_BK, a row's samples."""
        drawn = rng.random(self.draws * len(tokens))
        return {"negatives_BK": np.searchsorted(_noise(split, self.power), drawn, "right").astype(np.int32)}

    def loss(
        self,
        head: dict[str, Any],
        h_BNQD: jax.Array,
        pairs_BNQS: jax.Array,
        targets: Callable[[jax.Array], jax.Array],
        batch: dict[str, jax.Array],
    ) -> jax.Array:
        """The sum over pairs of vector and target; `targets` turns what words have, [B, L, ...], to [B, N, S, ...]."""
        v_BNSD = targets(embed_tokens(head, batch["tokens_BL"], h_BNQD.dtype.name))
        n_BKD = embed(head, batch["negatives_BK"], h_BNQD.dtype.name)
        scores = jnp.einsum("bnqd,bnsd->bnqs", h_BNQD, v_BNSD, preferred_element_type=jnp.float32)
        noise = jnp.einsum("bnqd,bkd->bnqk", h_BNQD, n_BKD, preferred_element_type=jnp.float32)
        share_BNQ = pairs_BNQS.sum(-1) * (self.count / n_BKD.shape[1])
        against = jnp.sum(jax.nn.softplus(noise) * share_BNQ[..., None])
        return jnp.sum(jax.nn.softplus(-scores) * pairs_BNQS) + against


@dataclasses.dataclass(frozen=True)
class Neighbours:
    """Skip-gram and CBOW (Mikolov et al. 2013, 1301.3781, section 3).

    "skipgram": a word's vector predicts each neighbour; "cbow": the mean of the neighbours' vectors predicts the word.
    Neighbours are words at most r away, r drawn for each word from 1 to `reach`, `within` the same document or line.
    Before, a word of frequency f is left out but for a chance of sqrt(sample / f) + sample / f (word2vec.c; 1310.4546,
    equation 5, has the first term), unless `sample` is 0; those that the tokenizer does not know always are: its size
    stands for a minimum count. With `ngrams`, the shortest and the longest, words are made of theirs too (fastText).
    The loss is the sum over a row's pairs, in the mean over rows: at one row a step the learning rate is word2vec.c's,
    which steps after each pair; at B rows B times that is. CBOW's gradient is divided over the neighbours, as the mean
    has it; word2vec.c gives each of them the whole.
    """

    kind: str = "skipgram"
    reach: int = 5
    sample: float = 1e-3
    output: Negative | Hierarchical = Negative()
    within: str = "document"
    ngrams: tuple[int, int] | None = None

    extra_ids = ()
    scores_text = False

    def __post_init__(self):
        check_choice("kind", self.kind, KINDS)
        check_choice("within", self.within, TEXTS)
        check_positive(reach=self.reach)
        if not 0 <= self.sample < 1:
            raise UsageError(f"sample={self.sample} must be at least 0, which keeps every word, and below 1")
        if self.ngrams is not None and not 0 < self.ngrams[0] <= self.ngrams[-1]:
            raise UsageError(f"ngrams={self.ngrams} needs the shortest and the longest, such as (3, 6)")

    @property
    def needs(self) -> tuple[str, ...]:
        """Of a model, see lm.train.run.resolve."""
        return ("vectors", "ngrams" if self.ngrams else "words")

    def window(self, seq_len: int) -> int:
        """The raw tokens behind a row of `seq_len`."""
        return seq_len

    def corrupt(self, rng: np.random.Generator, row: dict[str, Any]) -> dict[str, np.ndarray]:
        """tokens, documents [L] of the words that stay, moved together, -1 at padding; their reach and weight, 1.

        And what `output` and `ngrams` add. Words whose n-grams find no place in the row are left out.
        """
        split = row["split"]
        tokens, texts = (np.asarray(row[name], np.int32) for name in ("tokens", "documents"))
        places = np.flatnonzero((texts >= 0) & (rng.random(len(tokens)) < _stays(split, self.sample)[tokens]))
        if self.within == "line":
            texts = texts + np.cumsum(tokens == split.eos_id, dtype=np.int32)
        extra: dict[str, np.ndarray] = {}
        if self.ngrams:
            places, extra = self._subwords(split, tokens, places)

        def packed(x, padding):
            return np.pad(x, (0, len(tokens) - len(places)), constant_values=padding)

        kept = packed(tokens[places], 0)
        return {
            "tokens_BL": kept,
            "documents_BL": packed(texts[places], -1),
            "reach_BL": packed(rng.integers(1, self.reach, len(places), np.int32, endpoint=True), 0),
            "weights_BL": packed(np.ones(len(places), np.float32), 0),
            **self.output.arrays(rng, split, kept),
            **extra,
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
        """{"loss": (sum over pairs, rows with text, 1), "pair_loss": (the same, pairs, 0)}."""
        x_BLD, size = model.apply(params, batch, key=key).hidden_BLD, max(self.reach, _BLOCK)
        h_BNQD, pairs_BNQS = _blocks(x_BLD, size), _pairs(batch, size)
        targets = functools.partial(_around, size=size)
        if self.kind == "cbow":
            h_BNQD, pairs_BNQS = (x[:, : x_BLD.shape[1]] for x in _means(pairs_BNQS, targets(x_BLD)))
            targets = functools.partial(_blocks, size=1)  # A mean has one target, its own word.
        total = self.output.loss(model.head(params), h_BNQD, pairs_BNQS, targets, batch)
        rows = (batch["weights_BL"] > 0).any(-1).sum()
        return {"loss": (total, rows, 1.0), "pair_loss": (total, pairs_BNQS.sum(), 0.0)}

    def _subwords(self, split, tokens, places):
        """(the places whose words' n-grams fit in the row, {"ngrams_BG", "owners_BG"})."""
        flat, ends = _ngrams(split, self.ngrams)
        words, room = tokens[places], NGRAMS * len(tokens)
        counts = (ends[words + 1] - ends[words]).cumsum()
        places = places[counts <= room]
        words, total = tokens[places], int(counts[len(places) - 1]) if len(places) else 0
        sizes = ends[words + 1] - ends[words]
        first = np.repeat(ends[words] - (sizes.cumsum() - sizes), sizes)
        padding = (0, room - total)
        return places, {
            "ngrams_BG": np.pad(flat[first + np.arange(total)], padding),
            "owners_BG": np.pad(
                np.repeat(np.arange(len(words), dtype=np.int32), sizes), padding, constant_values=len(tokens)
            ),
        }


def _pairs(batch, size):
    """float32 [B, N, Q, S]: 1 where the s-th word of the blocks around is a neighbour of a block's q-th."""
    away = jnp.abs(jnp.arange(3 * size)[None] - jnp.arange(size)[:, None] - size)[None, None]
    texts_BL = batch["documents_BL"] + 1  # 0 at padding, that of the blocks too.
    same = _blocks(texts_BL, size)[..., None] == _around(texts_BL, size)[:, :, None]
    near = (away > 0) & (away <= _blocks(batch["reach_BL"], size)[..., None])
    return (same & near) * _blocks(batch["weights_BL"], size)[..., None]


def _means(pairs_BNQS, near_BNSD):
    """([B, N * Q, 1, D] the means of each word's neighbours, [B, N * Q, 1, 1] whether there are any)."""
    counts = pairs_BNQS.sum(-1, keepdims=True)
    means = jnp.einsum("bnqs,bnsd->bnqd", pairs_BNQS.astype(near_BNSD.dtype), near_BNSD) / jnp.maximum(counts, 1)
    rows, words = counts.shape[0], counts.shape[1] * counts.shape[2]
    return means.reshape(rows, words, 1, -1), (counts > 0).astype(jnp.float32).reshape(rows, words, 1, 1)


def _blocks(x_BL, size):
    """[B, N, Q, ...]: runs of Q = `size`, the last one padded with zeros."""
    padding = -x_BL.shape[1] % size
    x_BL = jnp.pad(x_BL, [(0, 0), (0, padding)] + [(0, 0)] * (x_BL.ndim - 2))
    return x_BL.reshape(x_BL.shape[0], -1, size, *x_BL.shape[2:])


def _around(x_BL, size):
    """[B, N, S, ...]: each run of `_blocks` between the one before it and the one after, S = 3 Q."""
    x = _blocks(x_BL, size)
    ends = [(0, 0)] * (x.ndim - 2)
    before, after = (jnp.pad(x, [(0, 0), pad, *ends]) for pad in ((1, 0), (0, 1)))
    return jnp.concatenate([before[:, :-1], x, after[:, 1:]], 2)


@functools.lru_cache(maxsize=2)
def _stays(split, sample):
    """float64 [V]: the chance of a word to stay in the text, 0 of what is none."""
    counts = split.word_counts
    ratio = sample * counts.sum() / np.maximum(counts, 1)  # sample / f.
    return np.where(counts > 0, np.sqrt(ratio) + ratio if sample else 1.0, 0.0)


@functools.lru_cache(maxsize=2)
def _noise(split, power):
    """float64 [V]: the cumulated distribution of the noise."""
    odds = split.word_counts.astype(float) ** power
    return odds.cumsum() / odds.sum()


@functools.lru_cache(maxsize=2)
def _ngrams(split, lengths):
    """(uint32: the hashes of all words' n-grams; int64 [V + 1]: where each word's end)."""
    found = [
        subwords.hashes(piece, *lengths) if count else np.zeros(0, np.uint32)
        for piece, count in zip(split.pieces, split.word_counts, strict=True)
    ]
    return np.concatenate(found), np.cumsum([0, *map(len, found)])
