"""Vectors of words made of their characters: convolutions, the maximum over each word, and highway layers."""

import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lm.core.errors import UsageError, check_positive
from lm.core.params import Constant, Param
from lm.layers.embed import embed
from lm.layers.highway import highway, highway_spec
from lm.layers.linear import project
from lm.parallel.rules import constrain

# Characters are the bytes of UTF-8, in which these do not occur. All are below 257, so that bfloat16 holds them too.
PADDING, BEGIN, END = 0xF8, 0xF9, 0xFA
CHARACTERS = 256
_GATE_BIAS = -2.0  # At first a highway layer lets most of its input through (Kim et al. 2016, section 2.3).
_CHARACTER = re.compile("<0x[0-9A-F]{2}>|.", re.DOTALL)


@dataclasses.dataclass(frozen=True)
class CharCNN:
    """The sizes, and the functions over the parameters (Kim et al. 2016, 1508.06615, sections 2.2 and 2.3).

    `filters` are pairs (width in characters, how many), of which each is one feature of a word: the tanh of its largest
    value along the word. `width` is that of a character's vector; `highways` counts the layers that mix the features.
    A word has `max_characters`, its two marks among them: longer ones lose what is before the end mark. The characters
    are bytes of UTF-8, as in ELMo (Peters et al. 2018, 1802.05365): on Penn Treebank they are the paper's.
    """

    width: int = 15
    filters: tuple[tuple[int, int], ...] = ((1, 25), (2, 50), (3, 75), (4, 100), (5, 125), (6, 150))
    highways: int = 1
    max_characters: int = 21  # Of Penn Treebank's longest words.

    def __post_init__(self):
        check_positive(width=self.width, max_characters=self.max_characters)
        if not self.filters or min(min(f) for f in self.filters) < 1:
            raise UsageError(f"filters={self.filters} needs pairs of a width and a number, both above 0")
        if self.highways < 0:
            raise UsageError(f"highways={self.highways} must not be negative")
        if max(width for width, _ in self.filters) > self.max_characters:
            raise UsageError(
                f"filters={self.filters} are wider than the longest word: raise max_characters={self.max_characters}"
            )

    @property
    def features(self) -> int:
        """How long a word's vector is."""
        return sum(count for _, count in self.filters)

    def spec(self, words: int, init: Callable) -> dict[str, Any]:
        """{"table" [256, R], "spelling" [V, max_characters], "filters_0" {"kernel" [width, R, count], "bias"}, ...,
        "highway_0", ...}; the spelling is not trained, and all padding until `with_pieces` fills it."""
        table = Param((CHARACTERS, self.width), ("types", "rank"), init, inputs=("types",), role="embedding")
        # Floats, as gradients are taken for all parameters alike: theirs are zero.
        shape, axes = (words, self.max_characters), ("vocab", "positions")
        spelling = Param(shape, axes, Constant(PADDING), role="vector", trainable=False)
        spec: dict[str, Any] = {"table": table, "spelling": spelling}
        for i, (width, count) in enumerate(self.filters):
            kernel = Param(
                (width, self.width, count),
                ("positions", "rank", "embed_out"),
                init,
                inputs=("positions", "rank"),
                passes=self.max_characters - width + 1,
            )
            spec[f"filters_{i}"] = {
                "kernel": kernel,
                "bias": Param((count,), ("embed_out",), Constant(), role="vector"),
            }
        return spec | {f"highway_{i}": highway_spec(self.features, init, _GATE_BIAS) for i in range(self.highways)}

    def with_pieces(self, p: dict[str, Any], pieces: Sequence[str]) -> dict[str, Any]:
        """The parameters with the spelling of every word; ids past the `pieces` have none.

        Raises UsageError where the pieces are single characters.
        """
        if sum(_CHARACTER.fullmatch(piece) is not None for piece in pieces) > len(pieces) / 2:
            raise UsageError(
                "characters= spells words, and this tokenizer's pieces are single characters: leave it out"
            )
        spelling = np.full(p["spelling"].shape, PADDING, np.float32)
        for row, piece in zip(spelling, pieces, strict=False):
            word = [BEGIN, *piece.encode()[: self.max_characters - 2], END]
            row[: len(word)] = word
        return p | {"spelling": jax.device_put(spelling.astype(p["spelling"].dtype), p["spelling"].sharding)}

    def apply(self, p: dict[str, Any], tokens_BL: jax.Array, dtype: str) -> jax.Array:
        """[B, L, features] in `dtype`, computed for every token of the batch."""
        spelled_BLC = constrain(p["spelling"][tokens_BL], "batch", "length", None)
        ids_BLC = jnp.round(spelled_BLC).astype(jnp.int32)  # An average over steps may lie next to a whole number.
        x_BLCR = jnp.where((ids_BLC == PADDING)[..., None], 0, embed(p, ids_BLC, dtype))
        x_BLD = jnp.concatenate([self._strongest(p[f"filters_{i}"], x_BLCR) for i in range(len(self.filters))], -1)
        x_BLD = constrain(x_BLD, "batch", "length", "act_embed")
        for i in range(self.highways):
            x_BLD = highway(p[f"highway_{i}"], x_BLD)
        return x_BLD

    def _strongest(self, p: dict[str, jax.Array], x_BLCR: jax.Array) -> jax.Array:
        """[B, L, count], each filter's largest value along the word: the bias and the tanh, which rises, come after."""
        width, _, count = p["kernel"].shape
        places = self.max_characters - width + 1
        windows = jnp.concatenate([x_BLCR[:, :, i : i + places] for i in range(width)], -1)
        y_BLPF = project(windows, p["kernel"].reshape(-1, count))
        return jnp.tanh(y_BLPF.max(2) + p["bias"].reshape(1, 1, -1)).astype(x_BLCR.dtype)
