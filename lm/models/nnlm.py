"""The neural probabilistic language model: the last few tokens' embeddings, a hidden layer, a softmax."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from lm.core.errors import UsageError, check_choice, check_positive
from lm.core.params import Constant, Normal, Param, Uniform
from lm.layers.activations import ACTIVATIONS, activation
from lm.layers.dropout import dropout, fold
from lm.layers.embed import biased_logits, embed_spec, embed_tokens
from lm.layers.linear import linear, linear_spec
from lm.models.flops import forward_flops
from lm.models.output import Output
from lm.parallel.rules import constrain


@dataclasses.dataclass(frozen=True)
class NNLM:
    """The config, hashable, and the pure functions over its parameters (Bengio et al. 2003, JMLR 3, equation 1).

    Each token is predicted from the `context` tokens before it, padded with zero vectors at the begin of a row: their
    embeddings, `width` each, side by side are x, and the logits b + W x + U tanh(d + H x), with W where `direct`.
    Of more than one of `layers` each further one is added to the one before, h + tanh(d + H h). `valid_vocab_size`:
    logits from there on stand for no token and are masked.
    """

    context: int = 4
    width: int = 60
    hidden: int = 50
    layers: int = 1
    activation: str = "tanh"
    direct: bool = False
    dropout: float = 0.0
    vocab_size: int | None = None
    valid_vocab_size: int | None = None
    init_std: float = 0.1
    dtype: str = "float32"

    offers = ("causal",)  # What an objective may need of it.
    context_limit = None  # Any length has positions: there are none.

    def __post_init__(self):
        check_positive(context=self.context, width=self.width, hidden=self.hidden, layers=self.layers)
        check_choice("activation", self.activation, tuple(ACTIVATIONS))
        if not 0 <= self.dropout < 1:
            raise UsageError(f"dropout={self.dropout} must be at least 0 and below 1")
        if self.valid_vocab_size is not None and not 0 < self.valid_vocab_size <= (self.vocab_size or 0):
            raise UsageError(f"valid_vocab_size={self.valid_vocab_size} is not within vocab_size={self.vocab_size}")

    def spec(self) -> dict[str, Any]:
        """{"embed", "layer_0", ..., "head": {"table" [V, hidden (+ context x width)], "bias" [V]}}."""
        if self.vocab_size is None:
            raise UsageError("vocab_size=None is not resolved: take it from the tokenizer or set it")
        seen = self.context * self.width
        spec: dict[str, Any] = {"embed": embed_spec(self.vocab_size, self.width, Normal(self.init_std))}
        for i in range(self.layers):
            inputs = {"embed": seen} if i == 0 else {"embed_out": self.hidden}
            limit = (3 / next(iter(inputs.values()))) ** 0.5
            spec[f"layer_{i}"] = linear_spec(inputs, {"mlp": self.hidden}, Uniform(limit), bias=True)
        features = self.hidden + (seen if self.direct else 0)
        spec["head"] = {
            "table": Param(
                (self.vocab_size, features), ("vocab", "embed"), Normal(features**-0.5), inputs=("embed",), role="head"
            ),
            "bias": Param((self.vocab_size,), ("vocab",), Constant(), role="vector"),
        }
        return spec

    def apply(
        self,
        params: dict[str, Any],
        batch: dict[str, jax.Array],
        *,
        key: jax.Array | None = None,
        cache: None = None,
        capture: tuple[str, ...] = (),
    ) -> Output:
        """Hidden states [B, L, hidden (+ context x width)], of each token and the `context - 1` before it in its row.

        With documents_BL, tokens of other documents count as none. `key` turns dropout on.
        """
        if cache is not None or capture:
            raise UsageError("NNLM has neither a cache nor states to capture: pass its last tokens")
        x_BLD = embed_tokens(params["embed"], batch["tokens_BL"], self.dtype)
        documents = batch.get("documents_BL")
        seen = jnp.concatenate([self._before(x_BLD, documents, i) for i in range(self.context)], -1)
        seen = dropout(seen, self.dropout, fold(key, 0))
        h = activation(self.activation, linear(params["layer_0"], seen))
        for i in range(1, self.layers):
            h = h + activation(self.activation, linear(params[f"layer_{i}"], h))
        h = dropout(h, self.dropout, fold(key, 1))
        out = jnp.concatenate([h, seen], -1) if self.direct else h
        return Output(constrain(out, "batch", "residual_length", "act_embed"))

    def forward_flops(self, spec: dict[str, Any], lengths: dict[str, int]) -> float:
        """Floating-point operations of a row, see lm.models.flops.forward_flops."""
        return forward_flops(self, spec, lengths)

    def attention_flops(self, length: int) -> float:
        """None: nothing is attended to."""
        return 0.0

    def head(self, params: dict[str, Any]) -> dict[str, Any]:
        """The parameters that make logits."""
        return params["head"]

    def logits(self, head: dict[str, Any], x: jax.Array) -> jax.Array:
        """[..., V] in float32 for any hidden states; logits that stand for no token are masked."""
        return biased_logits(head, x, self.valid_vocab_size)

    def _before(self, x_BLD: jax.Array, documents_BL: jax.Array | None, distance: int) -> jax.Array:
        """Each place's embedding `distance` tokens earlier in its document, zero where there is none."""
        if not distance:
            return x_BLD
        earlier = jnp.pad(x_BLD, ((0, 0), (distance, 0), (0, 0)))[:, : x_BLD.shape[1]]
        if documents_BL is None:
            return earlier
        other = jnp.pad(documents_BL, ((0, 0), (distance, 0)), constant_values=-1)[:, : x_BLD.shape[1]]
        return jnp.where((other == documents_BL)[..., None], earlier, 0)
