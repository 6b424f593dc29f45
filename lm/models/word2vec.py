"""Word2vec and fastText: a vector for each word, and one for each thing that is predicted from it."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from lm.core.errors import UsageError, check_given, check_positive
from lm.core.params import Constant, Param, Uniform
from lm.layers.embed import embed_spec, embed_tokens
from lm.models.output import Output


@dataclasses.dataclass(frozen=True)
class Word2Vec:
    """The config, hashable, and the pure functions over its parameters (Mikolov et al. 2013, 1301.3781, 1310.4546).

    It learns vectors; no text has a probability. With `buckets` a word's vector is the mean of its own and those of its
    character n-grams, which share that many rows by their hashes (Bojanowski et al. 2016, 1607.04606, section 3.2: the
    sum; their code has the mean). The head's rows are words, or the inner nodes of a tree over them, which are fewer.
    """

    width: int = 100
    buckets: int | None = None
    vocab_size: int | None = None
    valid_vocab_size: int | None = None
    dtype: str = "float32"

    context_limit = None  # Any length has positions: there are none.

    def __post_init__(self):
        check_positive(width=self.width)
        check_given(self, "buckets")
        if self.valid_vocab_size is not None and not 0 < self.valid_vocab_size <= (self.vocab_size or 0):
            raise UsageError(f"valid_vocab_size={self.valid_vocab_size} is not within vocab_size={self.vocab_size}")

    @property
    def offers(self) -> tuple[str, ...]:
        """What an objective may need of it."""
        return ("vectors", "ngrams" if self.buckets else "words")

    def spec(self) -> dict[str, Any]:
        """{"embed", "ngrams" with `buckets`, "head"}, tables of [rows, D]; the head starts at zero (word2vec.c)."""
        if self.vocab_size is None:
            raise UsageError("vocab_size=None is not resolved: take it from the tokenizer or set it")
        init = Uniform(0.5 / self.width)
        ngrams = {"ngrams": embed_spec(self.buckets, self.width, init)} if self.buckets else {}
        head = Param((self.vocab_size, self.width), ("vocab", "embed"), Constant(), inputs=("embed",), role="head")
        return {"embed": embed_spec(self.vocab_size, self.width, init), **ngrams, "head": {"table": head}}

    def apply(
        self,
        params: dict[str, Any],
        batch: dict[str, jax.Array],
        *,
        key: jax.Array | None = None,
        cache: None = None,
        capture: tuple[str, ...] = (),
    ) -> Output:
        """The vectors [B, L, D] of the words tokens_BL.

        With `buckets` also of words that are not in the vocabulary, whose token is -1: ngrams_BG holds a row's hashes
        one word after another, and owners_BG the places of their words, L where there is none.
        """
        if cache is not None or capture:
            raise UsageError("Word2Vec has neither a cache nor states to capture: leave them out")
        x_BLD = embed_tokens(params["embed"], batch["tokens_BL"], self.dtype)
        if not self.buckets:
            return Output(x_BLD)
        rows_BG = (batch["ngrams_BG"] % self.buckets).astype(jnp.int32)
        ngrams_BGD = embed_tokens(params["ngrams"], rows_BG, self.dtype)
        known_BL = (batch["tokens_BL"] >= 0).astype(x_BLD.dtype)
        add = jax.vmap(lambda total, owners, part: total.at[owners].add(part, mode="drop", indices_are_sorted=True))
        x_BLD = add(x_BLD * known_BL[..., None], batch["owners_BG"], ngrams_BGD)
        parts_BL = add(known_BL, batch["owners_BG"], jnp.ones(rows_BG.shape, x_BLD.dtype))
        return Output(x_BLD / jnp.maximum(parts_BL, 1)[..., None])

    def forward_flops(self, spec: dict[str, Any], lengths: dict[str, int]) -> float:
        """Floating-point operations of a row: its words' products with its negative samples; the others are few."""
        return 2.0 * self.width * lengths["tokens_BL"] * lengths.get("negatives_BK", 1)

    def head(self, params: dict[str, Any]) -> dict[str, Any]:
        """The parameters that score: "table" [V, D]."""
        return params["head"]
