"""The gated convolutional language model: stacked causal convolutions in residual blocks."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from lm.core import params as specs
from lm.core.errors import UsageError, check_choice, check_positive
from lm.core.params import Constant, Normal, Param
from lm.layers import cache as caches
from lm.layers.adaptive import Adaptive
from lm.layers.dropout import dropout, fold
from lm.layers.embed import biased_logits, embed_spec, embed_tokens
from lm.layers.gated_conv import gated_conv, gated_conv_spec, kept_spec
from lm.layers.linear import linear, linear_spec
from lm.models.flops import forward_flops
from lm.models.output import Output
from lm.parallel.rules import constrain

Block = tuple[tuple[int, int], ...]


@dataclasses.dataclass(frozen=True)
class Convolution:
    """The config, hashable, and the pure functions over its parameters (Dauphin et al. 2016, 1612.08083).

    A block is a tuple of layers, pairs (taps, width), and its input is added to what they make of it, by way of a
    matrix where the widths differ: ((4, 900),) is one layer, ((1, 128), (5, 128), (1, 512)) a bottleneck. `dropout` is
    on what enters the first layer of each block and the head. Two departures keep the variance, as the authors' later
    model does (Gehring et al. 2017, 1705.03122): sums are times sqrt(1/2), and layers do not start as for rectifiers.
    With `adaptive`, as in the paper, the logits are the log probabilities of an adaptive softmax. `valid_vocab_size`:
    logits from there on stand for no token and are masked.
    """

    blocks: tuple[Block, ...] = (((4, 900),),) * 8
    width: int = 280
    dropout: float = 0.0
    vocab_size: int | None = None
    valid_vocab_size: int | None = None
    init_std: float = 0.1
    adaptive: Adaptive | None = None
    dtype: str = "float32"

    offers = ("causal",)  # What an objective may need of it.
    context_limit = None  # Any length.

    def __post_init__(self):
        check_choice("dtype", self.dtype, ("float32", "bfloat16"))
        check_positive(width=self.width, init_std=self.init_std)
        if not self.blocks or not all(block and min(map(min, block)) > 0 for block in self.blocks):
            raise UsageError(f"blocks={self.blocks} needs tuples of pairs of taps and width, all above 0")
        if not 0 <= self.dropout < 1:
            raise UsageError(f"dropout={self.dropout} must be at least 0 and below 1")
        if self.valid_vocab_size is not None and not 0 < self.valid_vocab_size <= (self.vocab_size or 0):
            raise UsageError(f"valid_vocab_size={self.valid_vocab_size} is not within vocab_size={self.vocab_size}")

    @property
    def hidden_width(self) -> int:
        """The width of the last layer."""
        return self.blocks[-1][-1][1]

    @property
    def reach(self) -> int:
        """How many tokens a prediction is made from."""
        return 1 + sum(taps - 1 for block in self.blocks for taps, _ in block)

    def spec(self) -> dict[str, Any]:
        """{"embed", "block_0", ..., "head": {"table" [V, D], "bias" [V]}}; a block is {"layer_0", ...} and, where its
        width changes, "residual"."""
        if self.vocab_size is None:
            raise UsageError("vocab_size=None is not resolved: take it from the tokenizer or set it")
        spec: dict[str, Any] = {"embed": embed_spec(self.vocab_size, self.width, Normal(self.init_std))}
        for i, layers in enumerate(self._layers()):
            block: dict[str, Any] = {
                f"layer_{j}": gated_conv_spec(taps, inputs, width) for j, (taps, inputs, width) in enumerate(layers)
            }
            inputs, width = layers[0][1], layers[-1][2]
            if inputs != width:
                init = Normal(inputs**-0.5)
                block["residual"] = linear_spec({"embed": inputs}, {"mlp": width}, init, bias=False)
            spec[f"block_{i}"] = block
        table = Param(
            (self.vocab_size, self.hidden_width),
            ("vocab", "embed"),
            Normal(self.hidden_width**-0.5),
            inputs=("embed",),
            role="head",
        )
        if self.adaptive:
            init = Normal(self.hidden_width**-0.5)
            return spec | {"head": self.adaptive.spec(self.vocab_size, self.hidden_width, init)}
        return spec | {
            "head": {"table": table, "bias": Param((self.vocab_size,), ("vocab",), Constant(), role="vector")}
        }

    def apply(
        self,
        params: dict[str, Any],
        batch: dict[str, jax.Array],
        *,
        key: jax.Array | None = None,
        cache: dict[str, Any] | None = None,
        capture: tuple[str, ...] = (),
    ) -> Output:
        """Hidden states of the last layer [B, L, D] in `dtype`.

        `batch` has tokens_BL and may have documents_BL, of which none sees another; the first continues the cache, and
        -1 is padding at a row's end, which the cache does not hold. `key` turns dropout on.
        """
        if capture:
            raise UsageError("Convolution has no states to capture")
        tokens_BL, documents_BL = batch["tokens_BL"], batch.get("documents_BL")
        x_BLD = embed_tokens(params["embed"], tokens_BL, self.dtype)
        kept = cache or specs.initialize(self.carry_spec(tokens_BL.shape[0]), jax.random.key(0))
        left: dict[str, Any] = {}
        for i, block in enumerate(self.blocks):
            p, name = params[f"block_{i}"], f"block_{i}"
            y_BLD = dropout(x_BLD, self.dropout, fold(key, i))
            left[name] = {}
            for j, (taps, _) in enumerate(block):
                before_BPD = kept[name][f"layer_{j}"]
                documents = None if documents_BL is None else _with_before(documents_BL, taps - 1)
                left[name][f"layer_{j}"] = _last(
                    before_BPD, y_BLD, documents, caches.lengths(batch.get("documents_BL"))
                )
                y_BLD = gated_conv(p[f"layer_{j}"], y_BLD, before_BPD, documents)
            x_BLD = (y_BLD + (linear(p["residual"], x_BLD) if "residual" in p else x_BLD)) * 0.5**0.5
            x_BLD = constrain(x_BLD, "batch", "residual_length", "act_embed")
        out_BLD = dropout(x_BLD, self.dropout, fold(key, len(self.blocks)))
        return Output(out_BLD, None if cache is None else left)

    def carry_spec(self, batch_size: int) -> dict[str, Any]:
        """The last inputs of every layer, {"block_0": {"layer_0" [B, taps - 1, D], ...}, ...}."""
        return {
            f"block_{i}": {
                f"layer_{j}": kept_spec(taps, inputs, batch_size, self.dtype)
                for j, (taps, inputs, _) in enumerate(layers)
            }
            for i, layers in enumerate(self._layers())
        }

    def cache_spec(self, batch_size: int, length: int) -> dict[str, Any]:
        """The same: it does not grow with the `length`."""
        return self.carry_spec(batch_size)

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
        if self.adaptive:
            return self.adaptive.log_probs(head, x, self.valid_vocab_size)
        return biased_logits(head, x, self.valid_vocab_size)

    def _layers(self) -> list[list[tuple[int, int, int]]]:
        """(taps, inputs, width) of every layer of every block."""
        inputs, found = self.width, list[list[tuple[int, int, int]]]()
        for block in self.blocks:
            found.append([])
            for taps, width in block:
                found[-1].append((taps, inputs, width))
                inputs = width
        return found


def _with_before(documents_BL: jax.Array, count: int) -> jax.Array:
    """The documents of `count` inputs before the first too, which are of its own."""
    return jnp.pad(documents_BL, ((0, 0), (count, 0)), mode="edge")


def _last(
    before_BPD: jax.Array, x_BLD: jax.Array, documents_BS: jax.Array | None, lengths_B: jax.Array | None
) -> jax.Array:
    """The inputs [B, P, D] that come before the token after each row's last, zeros for those of other documents."""
    seen_BSD, count = jnp.concatenate([before_BPD, x_BLD.astype(before_BPD.dtype)], 1), before_BPD.shape[1]
    lengths_B = jnp.full(len(x_BLD), x_BLD.shape[1]) if lengths_B is None else lengths_B
    take = jax.vmap(lambda row, start: jax.lax.dynamic_slice_in_dim(row, start, count))
    last_BPD = take(seen_BSD, lengths_B)
    if documents_BS is None:
        return last_BPD
    own = jnp.take_along_axis(documents_BS, (lengths_B + count - 1)[:, None], 1)
    return jnp.where((take(documents_BS, lengths_B) == own)[..., None], last_BPD, 0)
