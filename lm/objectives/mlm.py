"""Predict hidden tokens from the corrupted text around them."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lm.core.errors import UsageError, check_choice, check_given, check_positive
from lm.objectives.cross_entropy import TokenLoss, cross_entropy

UNITS = ("token", "word")
_ORDER, _LENGTH, _FORM, _TOKEN = range(4)  # What the four random numbers of a token decide.
_STATIC = (0, 0, 0, 1)  # A counter that the generators of examples, under keys of the same form, never reach.


@dataclasses.dataclass(frozen=True)
class MaskedLM:
    """Masked language modelling (Devlin et al. 2018, 1810.04805, section 3.1): -log p(token | corrupted text).

    `rate` of a row's tokens are predicted, to the nearest whole number and at least one; of these a share `mask_share`
    becomes [MASK], `random_share` a random token, and the rest stay. What is hidden together is one `unit`, "token" or
    whole "word", or a run of n of them in proportion to 1 / n up to `max_ngram` (ALBERT, 1909.11942, eq. 2); words
    that no longer fit are passed over. Masks are drawn anew each time (RoBERTa, 1907.11692, section 4.1), or with
    `copies` are that many, fixed by the data's seed for each place of the text, which the epochs take in turn (BERT
    has 10).
    A row is [CLS] text [SEP], and text goes on across documents (RoBERTa's FULL-SENTENCES).
    """

    rate: float = 0.15
    mask_share: float = 0.8
    random_share: float = 0.1
    unit: str = "token"
    max_ngram: int = 1
    copies: int | None = None
    ids: tuple[int, ...] | None = None  # Of extra_ids; with vocab_size, the tokenizer's, filled in by resolve.
    vocab_size: int | None = None

    extra_ids = ("[MASK]", "[CLS]", "[SEP]")
    needs = ("masked",)  # Of a model, see lm.train.run.resolve.
    scores_text = False

    def __post_init__(self):
        check_choice("unit", self.unit, UNITS)
        check_positive(max_ngram=self.max_ngram)
        check_given(self, "copies")
        if not 0 < self.rate < 1:
            raise UsageError(f"rate={self.rate} must be above 0 and below 1")
        if min(self.mask_share, self.random_share) < 0 or self.mask_share + self.random_share > 1:
            raise UsageError(
                f"mask_share={self.mask_share} and random_share={self.random_share} must be shares of at most 1 in all"
            )

    def window(self, seq_len: int) -> int:
        """The raw tokens behind a row of `seq_len`: [CLS] and [SEP] take two places."""
        if seq_len < 4:
            raise UsageError(f"seq_len={seq_len} must be at least 4: [CLS], [SEP], a hidden token and one to see")
        return seq_len - 2

    def corrupt(self, rng: np.random.Generator, row: dict[str, Any]) -> dict[str, np.ndarray]:
        """tokens, documents [L], 0 or -1 at padding; picks, targets, weights [P], P the number for a row of text."""
        assert self.ids is not None  # Filled in by lm.train.run.resolve.
        _, cls, sep = self.ids
        text, documents = (np.asarray(row[name], np.int32) for name in ("tokens", "documents"))
        real, padding = int((documents >= 0).sum()), int((documents < 0).sum())
        noise, begins = np.zeros((len(text) + 2, 4)), np.ones(len(text) + 2, bool)
        noise[1 : real + 1] = self.noise(rng, row, 0, real)
        begins[1 : real + 1] = self.begins(row, text[:real]) | (np.diff(documents[:real], prepend=-1) > 0)
        tokens = np.pad(np.concatenate([[cls], text[:real], [sep]]).astype(np.int32), (0, padding))
        return {
            "documents_BL": np.pad(np.zeros(real + 2, np.int32), (0, padding), constant_values=-1),
            **self.mask(tokens, real + 2, begins, noise, len(text)),
        }

    def noise(self, rng: np.random.Generator, row: dict[str, Any], first: int, length: int) -> np.ndarray:
        """[length, 4] uniform numbers, on which alone the mask of the tokens from window place `first` on depends."""
        if self.copies is None:
            return rng.random((length, 4))
        # One step of Philox makes four numbers: those of a token are found by its place in the text.
        key = row["seed"], row["epoch"] % self.copies
        bits = np.random.Philox(counter=_STATIC, key=key).advance(row["start"] + first)
        return np.random.Generator(bits).random((length, 4))

    def begins(self, row: dict[str, Any], text: np.ndarray) -> np.ndarray:
        """bool, for each token of a text: whether a unit begins with it."""
        if self.unit == "token":
            return np.ones(len(text), bool)
        return row["split"].word_starts[text]

    def mask(
        self, tokens: np.ndarray, real: int, begins: np.ndarray, noise: np.ndarray, capacity: int
    ) -> dict[str, np.ndarray]:
        """tokens [L] with some of the first `real` corrupted, and which: picks, targets, weights [P], unused ones 0.

        P is the number for `capacity` tokens, the most that can be text. The tokens of `ids` are never hidden.
        """
        assert self.ids is not None and self.vocab_size is not None  # Filled in by lm.train.run.resolve.
        text = (np.arange(len(tokens)) < real) & ~np.isin(tokens, self.ids)
        picks = np.sort(self._picks(text, begins, noise, self._number(int(text.sum()))))
        targets, form = tokens[picks], noise[picks, _FORM]
        drawn = (noise[picks, _TOKEN] * self.vocab_size).astype(np.int32)
        changed = np.where(form < self.mask_share, self.ids[0], drawn)
        tokens = tokens.copy()
        tokens[picks] = np.where(form < self.mask_share + self.random_share, changed, targets)
        padding = (0, self._number(capacity) - len(picks))
        return {
            "tokens_BL": tokens,
            "picks_BP": np.pad(picks, padding).astype(np.int32),
            "targets_BP": np.pad(targets, padding),
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
        """{name: (sum over hidden tokens, their number, coefficient)}.

        "masked_nll", where some are not [MASK], is over those that are. Of the others, half are what they seem: `loss`
        falls below the entropy of single tokens by copying, this one only with the help of context.
        """
        out = model.apply(params, batch, key=key)
        return self.terms(model, params, pick(out.hidden_BLD, batch), batch) | out.aux

    def terms(self, model: Any, params: dict[str, Any], x_BPD: jax.Array, batch: dict[str, jax.Array]) -> dict:
        """The same from the hidden states of the picked tokens."""
        form, weights = TokenLoss(model.valid_vocab_size or model.vocab_size), batch["weights_BP"]
        assert self.ids is not None  # Filled in by lm.train.run.resolve.
        masked = jnp.take_along_axis(batch["tokens_BL"], batch["picks_BP"], 1) == self.ids[0]
        loss, sums = cross_entropy(
            form, model.logits, model.head(params), x_BPD, batch["targets_BP"], weights, subset_BL=masked
        )
        weight = weights.sum()
        terms = {"loss": (loss, weight, 1.0)} | {n: (sums[n], weight, 0.0) for n in ("nll", "accuracy")}
        if self.mask_share == 1:
            return terms
        return terms | {"masked_nll": (sums["subset_nll"], (weights * masked).sum(), 0.0)}

    def _number(self, tokens):
        """How many of so many tokens are predicted."""
        return min(tokens, max(1, round(self.rate * tokens)))

    def _picks(self, text, begins, noise, number):
        """int [at most `number`]: the places of whole units, taken in random order; tokens where no unit fits."""
        places = np.flatnonzero(text)
        tokens = places[np.argsort(noise[places, _ORDER])[:number]]
        if number == 0 or (self.unit == "token" and self.max_ngram == 1):
            return tokens
        apart = np.diff(places, prepend=-2) > 1  # A special token stands between.
        edges = np.append(np.flatnonzero(begins[places] | apart), len(places))
        firsts, odds = places[edges[:-1]], np.cumsum(1 / np.arange(1, self.max_ngram + 1))
        lengths = 1 + np.searchsorted(odds, noise[firsts, _LENGTH] * odds[-1], "right")
        hidden = np.zeros(len(places), bool)
        for i in np.argsort(noise[firsts, _ORDER]):
            # A shorter run where the end, a border, an earlier run or the number leaves no room.
            for n in range(min(lengths[i], len(firsts) - i), 0, -1):
                run = slice(edges[i], edges[i + n])
                room = run.stop - run.start <= number - hidden.sum()
                if room and not hidden[run].any() and not apart[run.start + 1 : run.stop].any():
                    hidden[run] = True
                    break
            if hidden.sum() == number:
                break
        return places[hidden] if hidden.any() else tokens


def pick(x_BLD: jax.Array, batch: dict[str, jax.Array]) -> jax.Array:
    """[B, P, D]: hidden states at picks_BP, so that the vocabulary is scored there alone."""
    return jnp.take_along_axis(x_BLD, batch["picks_BP"][..., None], 1)
