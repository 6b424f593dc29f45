"""Recurrent language models: Elman's, GRU and LSTM, with the ways in which dropout is applied to them."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lm.core import params as specs
from lm.core.errors import UsageError, check_choice, check_given, check_positive
from lm.core.params import Constant, Param, Uniform
from lm.layers import cache as caches
from lm.layers.adaptive import Adaptive
from lm.layers.char_cnn import CharCNN
from lm.layers.dropout import dropout, fold
from lm.layers.embed import biased_logits, embed_spec, embed_tokens
from lm.layers.recurrent import CELLS, continuing, last, recurrent, recurrent_spec, state_spec
from lm.models.flops import forward_flops
from lm.models.output import Output
from lm.parallel.rules import constrain


@dataclasses.dataclass(frozen=True)
class Recurrent:
    """The config, hashable, and the pure functions over its parameters (Mikolov et al. 2010; Zaremba et al. 2014,
    1409.2329).

    `hidden` is the width of the layers (None: that of the embeddings); where `tied` the last has the embeddings', whose
    table then scores the words (Press and Wolf 2016, 1608.05859; Inan et al. 2016, 1611.01462). `embed_dropout` is on
    what enters the first layer, `dropout` on what enters the others and the head, both with one mask for all times
    where `locked` (Gal and Ghahramani 2015, 1512.05287); `word_dropout` drops words from the embedding table,
    `weight_dropout` entries of the kernels between states (Merity et al. 2017, 1708.02182). With `characters` a word's
    vector is made of its spelling instead of looked up (Kim et al. 2016, 1508.06615), and `width` is that of the
    layers. Values start uniform within `init_limit`, those of the layers within `cell_limit` (None: hidden^-0.5), and
    biases from zero.
    With `adaptive` the logits are the log probabilities of an adaptive softmax. `valid_vocab_size`: logits from there
    on stand for no token and are masked.
    """

    cell: str = "lstm"
    layers: int = 2
    width: int = 200
    hidden: int | None = None
    tied: bool = False
    embed_dropout: float = 0.0
    dropout: float = 0.0
    locked: bool = False
    word_dropout: float = 0.0
    weight_dropout: float = 0.0
    vocab_size: int | None = None
    valid_vocab_size: int | None = None
    init_limit: float = 0.1
    cell_limit: float | None = None
    characters: CharCNN | None = None
    adaptive: Adaptive | None = None
    dtype: str = "float32"

    offers = ("causal",)  # What an objective may need of it.
    context_limit = None  # Any length.

    def __post_init__(self):
        check_choice("cell", self.cell, CELLS)
        check_choice("dtype", self.dtype, ("float32", "bfloat16"))
        check_positive(layers=self.layers, width=self.width, init_limit=self.init_limit)
        check_given(self, "hidden", "cell_limit")
        for name in ("embed_dropout", "dropout", "word_dropout", "weight_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise UsageError(f"{name}={getattr(self, name)} must be at least 0 and below 1")
        if self.adaptive and self.tied:
            raise UsageError(
                "tied=True has no effect with adaptive=, whose scores have tables of their own: leave it out"
            )
        if self.locked and not (self.embed_dropout or self.dropout):
            raise UsageError("locked=True has no effect with embed_dropout=0 and dropout=0: leave it out")
        if self.tied and self.layers == 1 and self.hidden not in (None, self.width):
            raise UsageError(
                f"hidden={self.hidden} has no effect: the one layer of a tied model has width={self.width}"
            )
        if self.characters and (self.hidden or self.tied or self.word_dropout):
            name = next(name for name in ("hidden", "tied", "word_dropout") if getattr(self, name))
            raise UsageError(
                f"{name}={getattr(self, name)} has no effect with characters=, which leave no table of words, and the "
                f"layers to width={self.width}: leave it out"
            )
        if self.valid_vocab_size is not None and not 0 < self.valid_vocab_size <= (self.vocab_size or 0):
            raise UsageError(f"valid_vocab_size={self.valid_vocab_size} is not within vocab_size={self.vocab_size}")

    @property
    def sizes(self) -> tuple[int, ...]:
        """The width of the embeddings and of every layer."""
        if self.characters:
            return (self.characters.features, *[self.width] * self.layers)
        hidden = self.hidden or self.width
        return (self.width, *[hidden] * (self.layers - 1), self.width if self.tied else hidden)

    @property
    def hidden_width(self) -> int:
        """Of what the head sees."""
        return self.sizes[-1]

    def spec(self) -> dict[str, Any]:
        """{"embed" (with `characters` a CharCNN's), "layer_0", ..., "head"}, whose head is {"bias" [V]} and, where not
        tied, "table" [V, H]."""
        if self.vocab_size is None:
            raise UsageError("vocab_size=None is not resolved: take it from the tokenizer or set it")
        init = Uniform(self.init_limit)
        words = self.characters.spec(self.vocab_size, init) if self.characters else None
        spec: dict[str, Any] = {"embed": words or embed_spec(self.vocab_size, self.width, init)}
        for i, (inputs, width) in enumerate(zip(self.sizes, self.sizes[1:], strict=False)):
            spec[f"layer_{i}"] = recurrent_spec(self.cell, inputs, width, Uniform(self.cell_limit or width**-0.5))
        if self.adaptive:
            return spec | {"head": self.adaptive.spec(self.vocab_size, self.sizes[-1], init)}
        spec["head"] = {"bias": Param((self.vocab_size,), ("vocab",), Constant(), role="vector")}
        if not self.tied:
            table = embed_spec(self.vocab_size, self.sizes[-1], init)["table"]
            spec["head"]["table"] = dataclasses.replace(table, inputs=("embed",), role="head")
        return spec

    def apply(
        self,
        params: dict[str, Any],
        batch: dict[str, jax.Array],
        *,
        key: jax.Array | None = None,
        cache: dict[str, Any] | None = None,
        capture: tuple[str, ...] = (),
    ) -> Output:
        """Hidden states of the last layer [B, L, H] in `dtype`.

        `batch` has tokens_BL and may have documents_BL: states start from zero where its number changes, and a cache
        goes on from the last token before those of document -1, which are padding. `key` turns dropout on.
        """
        if capture:
            raise UsageError("Recurrent has no states to capture")
        tokens_BL = batch["tokens_BL"]
        x_LBD = self._embed(params["embed"], tokens_BL, fold(key, 0)).swapaxes(0, 1)
        documents_BL = batch.get("documents_BL")
        keep_LB = None if documents_BL is None else continuing(documents_BL)
        states = cache or specs.initialize(self.carry_spec(tokens_BL.shape[0]), jax.random.key(0))
        left = {}
        for i in range(self.layers):
            name = f"layer_{i}"
            p = params[name] | {"state": dropout(params[name]["state"], self.weight_dropout, fold(key, 2 * i + 1))}
            x_LBD = self._drop(x_LBD, self.dropout if i else self.embed_dropout, fold(key, 2 * i + 2))
            after = recurrent(self.cell, p, x_LBD, states[name], keep_LB)
            x_LBD = after["h"].astype(x_LBD.dtype)
            left[name] = last(states[name], after, caches.lengths(documents_BL))
        out_BLD = self._drop(x_LBD, self.dropout, fold(key, 2 * self.layers + 1)).swapaxes(0, 1)
        out_BLD = constrain(out_BLD, "batch", "residual_length", "act_embed")
        return Output(out_BLD, None if cache is None else left)

    def with_pieces(self, params: dict[str, Any], pieces: Sequence[str]) -> dict[str, Any]:
        """The parameters for a tokenizer with these pieces: with `characters` they hold each one's spelling."""
        return params | {"embed": self.characters.with_pieces(params["embed"], pieces)} if self.characters else params

    def carry_spec(self, batch_size: int) -> dict[str, Any]:
        """The states of every layer, {"layer_0": {"h" [B, H], ...}, ...}."""
        return {f"layer_{i}": state_spec(self.cell, batch_size, width) for i, width in enumerate(self.sizes[1:])}

    def cache_spec(self, batch_size: int, length: int) -> dict[str, Any]:
        """The same: it does not grow with the `length`."""
        return self.carry_spec(batch_size)

    def forward_flops(self, spec: dict[str, Any], lengths: dict[str, int]) -> float:
        """Floating-point operations of a row, see lm.models.flops.forward_flops."""
        return forward_flops(self, spec, lengths)

    def attention_flops(self, length: int) -> float:
        """Zero: nothing is attended to."""
        return 0.0

    def head(self, params: dict[str, Any]) -> dict[str, Any]:
        """The parameters that make logits, the embedding's table among them where tied."""
        return params["head"] | ({"table": params["embed"]["table"]} if self.tied else {})

    def logits(self, head: dict[str, Any], x: jax.Array) -> jax.Array:
        """[..., V] in float32 for any hidden states; logits that stand for no token are masked."""
        if self.adaptive:
            return self.adaptive.log_probs(head, x, self.valid_vocab_size)
        return biased_logits(head, x, self.valid_vocab_size)

    def _drop(self, x_LBD: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
        if not self.locked or key is None:
            return dropout(x_LBD, rate, key)
        return x_LBD * dropout(jnp.ones_like(x_LBD[:1]), rate, key)

    def _embed(self, p: dict[str, Any], tokens_BL: jax.Array, key: jax.Array | None) -> jax.Array:
        if self.characters:
            return self.characters.apply(p, tokens_BL, self.dtype)
        table_VD = p["table"]
        if self.word_dropout and key is not None:
            table_VD = table_VD * dropout(jnp.ones_like(table_VD[:, :1]), self.word_dropout, key)
        return embed_tokens({"table": table_VD}, tokens_BL, self.dtype)
