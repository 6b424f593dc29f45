"""The Transformer encoder: BERT, RoBERTa, ALBERT, DistilBERT, ELECTRA and ModernBERT are settings of one class."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from lm.core.config import setting
from lm.core.errors import UsageError, check_choice, check_given, check_positive, unknown
from lm.core.parametrization import Ratios, ratios_of
from lm.core.params import Constant, Normal, Param
from lm.layers.activations import activation
from lm.layers.block import Block, Context, Layer
from lm.layers.dropout import dropout, fold
from lm.layers.embed import biased_logits, embed, embed_spec, embed_tokens
from lm.layers.favor import Favor
from lm.layers.linear import linear, linear_spec
from lm.layers.positions import Scaling, rotary_table
from lm.layers.stack import Group, Stack, groups
from lm.models.flops import body_flops, forward_flops
from lm.models.output import Output
from lm.parallel.rules import constrain

POSITIONS = ("learned", "rotary")
OUTPUTS = ("tokens", "pair", "detect")
CAPTURES = ("hidden_states",)


@dataclasses.dataclass(frozen=True)
class Encoder:
    """The config, hashable, and the pure functions over its parameters.

    Embeddings of tokens, learned positions and, with `types`, segments are summed, normalised and, with `embed_width`,
    mapped to the width (ALBERT, 1909.11942, section 3.1). `prefix` are the first layers, the rest repeat `pattern`
    (ModernBERT's, 2412.13663, is two windows and one full). With `shared_groups` the layers fall into that many runs,
    each of which repeats one set of parameters, those of `pattern` (ALBERT's inner group). `position_offset` rows of
    the table come before that of the first token (RoBERTa has 2). `outputs`: "tokens" scores the vocabulary, from a
    dense layer, with a bias where `head_bias`, with norm and the embedding table (BERT, 1810.04805); "pair" two classes
    from the pooled first token; "detect" one number a token (ELECTRA, 2003.10555). What the layers share is explained
    at lm.layers.block.Block. With another `parametrization` than "sp" all settings are those of the base, see
    lm.core.parametrization.ratios_of.
    """

    layers: int = 12
    width: int = 768
    heads: int = 12
    mlp_width: int | None = None
    embed_width: int | None = None
    prefix: tuple[Layer, ...] = ()
    pattern: tuple[Layer, ...] = (Layer(),)
    shared_groups: int | None = None
    vocab_size: int | None = None
    valid_vocab_size: int | None = None
    positions: str = "learned"
    max_len: int | None = 512
    position_offset: int = 0
    rope_base: float = 10000.0
    rope_scaling: Scaling | None = None
    types: int = 2
    outputs: tuple[str, ...] = ("tokens",)
    norm_bias: bool = True
    norm_eps: float = 1e-12
    norm_place: str = "post"
    activation: str = "gelu"
    gated: bool = False
    attention_bias: bool = True
    mlp_bias: bool = True
    favor: Favor | None = None
    head_activation: str | None = None
    head_bias: bool = True
    tied: bool = True
    embed_dropout: float = 0.0
    residual_dropout: float = 0.0
    attention_dropout: float = 0.0
    mlp_dropout: float = 0.0
    init: str = "normal"
    init_std: float = 0.02
    parametrization: str = "sp"
    base_width: int | None = None
    base_layers: int | None = None
    base_head_dim: int | None = None
    decay_keeps: str = "product"
    dtype: str = "float32"
    attention_kernel: str = setting("auto", identity=False)
    remat: str = "none"
    scan: bool = True

    def __post_init__(self):
        check_positive(layers=self.layers, width=self.width, heads=self.heads, rope_base=self.rope_base)
        check_given(self, "mlp_width", "embed_width", "max_len", "shared_groups")
        check_choice("positions", self.positions, POSITIONS)
        if self.width % self.heads:
            raise UsageError(f"width={self.width} is no multiple of heads={self.heads}")
        if (self.positions == "learned") != (self.max_len is not None):
            raise UsageError(
                f"max_len={self.max_len} with positions={self.positions!r}: learned positions alone need it"
            )
        if self.positions == "rotary" and (self.width // self.heads % 2 or self.position_offset):
            raise UsageError(
                f"positions='rotary' needs heads of an even width, not {self.width // self.heads}, "
                f"and position_offset=0, not {self.position_offset}"
            )
        if self.positions != "rotary" and self._rotation_settings() != {10000.0, None}:
            raise UsageError(
                f"rope_base and rope_scaling have no effect with positions={self.positions!r}: "
                "set positions='rotary' or leave them out"
            )
        if self.types < 0 or self.position_offset < 0:
            raise UsageError(f"types={self.types} and position_offset={self.position_offset} must not be negative")
        if self.shared_groups is not None and (self.shared_groups > self.layers or self.prefix):
            raise UsageError(
                f"shared_groups={self.shared_groups} needs at most layers={self.layers} and no prefix of other layers"
            )
        if self.parametrization != "sp" and self.embed_width is not None:
            raise UsageError(f"embed_width={self.embed_width}, a second width, goes with parametrization='sp' alone")
        if self.parametrization == "completep" and self.shared_groups is not None:
            raise UsageError("parametrization='completep' is for layers of their own: leave shared_groups out")
        for name in self.outputs:
            check_choice("outputs", name, OUTPUTS)
        if "tokens" not in self.outputs and (not self.tied or not self.head_bias or self.head_activation is not None):
            raise UsageError(
                f"tied={self.tied}, head_bias={self.head_bias} and head_activation={self.head_activation!r} have no "
                f"effect with outputs={self.outputs}: add 'tokens' or leave them out"
            )
        if not 0 <= self.embed_dropout < 1:
            raise UsageError(f"embed_dropout={self.embed_dropout} must be at least 0 and below 1")
        if self.valid_vocab_size is not None and not 0 < self.valid_vocab_size <= (self.vocab_size or 0):
            raise UsageError(f"valid_vocab_size={self.valid_vocab_size} is not within vocab_size={self.vocab_size}")
        _ = self.stack

    @property
    def offers(self) -> tuple[str, ...]:
        """What an objective may need of it."""
        pair = ("pair",) if "pair" in self.outputs and self.types >= 2 else ()
        return (("masked",) if "tokens" in self.outputs else ()) + pair

    @property
    def context_limit(self) -> int | None:
        """The longest sequence that has positions; None where any length has."""
        return self.max_len

    @functools.cached_property
    def stack(self) -> Stack:
        """The layers, with every size filled in."""
        own = {f.name: getattr(self, f.name) for f in dataclasses.fields(Block) if hasattr(self, f.name)}
        sizes = {
            "kv_heads": self.heads,
            "head_dim": self.width // self.heads,
            "mlp_width": self.mlp_width or 4 * self.width,
            "rope_base": self.rope_base if self.positions == "rotary" else None,
        }
        block = Block(**own | sizes, causal=False)
        if self.shared_groups is None:
            parts = groups(self.layers, self.pattern, self.prefix)
        else:
            # Layer l takes the parameters of group floor(l * groups / layers).
            chosen = [i * self.shared_groups // self.layers for i in range(self.layers)]
            parts = tuple(Group(self.pattern, chosen.count(g), shared=True) for g in range(self.shared_groups))
        return Stack(block, parts, self.remat, self.scan)

    @property
    def stacks(self) -> tuple[Stack, ...]:
        return (self.stack,)

    @property
    def ratios(self) -> Ratios:
        """Its sizes over those of the base, by which it is parametrized."""
        return ratios_of(self, self.width // self.heads)

    def spec(self) -> dict[str, Any]:
        """A tree of Param."""
        if self.vocab_size is None:
            raise UsageError("vocab_size=None is not resolved: take it from the tokenizer or set it")
        init, narrow = Normal(self.init_std), self._embed_width
        spec: dict[str, Any] = {
            "embed": embed_spec(self.vocab_size, narrow, init),
            "embed_norm": self.stack.block.norm_spec({"norm": narrow}),
        }
        if self.max_len is not None:
            spec["positions"] = embed_spec(self.max_len + self.position_offset, narrow, init, axis="positions")
        if self.types:
            spec["types"] = embed_spec(self.types, narrow, init, axis="types")
        if self.embed_width is not None:
            spec["embed_map"] = linear_spec({"embed": narrow}, {"embed_out": self.width}, init, True)
        spec |= self.stack.spec()
        if self.norm_place != "post":
            spec["final_norm"] = self.stack.block.norm_spec({"norm": self.width})
        if "tokens" in self.outputs:
            spec["head"] = {
                "dense": linear_spec({"embed": self.width}, {"embed_out": narrow}, init, self.head_bias),
                "norm": self.stack.block.norm_spec({"norm": narrow}),
                "bias": Param((self.vocab_size,), ("vocab",), Constant(), role="vector"),
            }
            if not self.tied:
                table = embed_spec(self.vocab_size, narrow, init)["table"]
                spec["head"]["table"] = dataclasses.replace(table, inputs=("embed",), role="head")
        if "pair" in self.outputs:
            spec["pooler"] = linear_spec({"embed": self.width}, {"embed_out": self.width}, init, True)
            spec["pair"] = linear_spec({"embed": self.width}, {"classes": 2}, init, True)
        if "detect" in self.outputs:
            spec["detect"] = {
                "dense": linear_spec({"embed": self.width}, {"embed_out": self.width}, init, True),
                "out": linear_spec({"embed": self.width}, {"classes": 1}, init, True),
            }
        return self.ratios.apply(spec)

    def apply(
        self,
        params: dict[str, Any],
        batch: dict[str, jax.Array],
        *,
        key: jax.Array | None = None,
        cache: None = None,
        capture: tuple[str, ...] = (),
    ) -> Output:
        """Hidden states [B, L, D] in `dtype`, normalised.

        `batch` has tokens_BL and may have types_BL (0 without), positions_BL (otherwise the index in the row) and
        documents_BL (attention stays inside equal numbers; -1 is padding, which no token sees). `key` turns dropout on.
        capture=("hidden_states",) adds [layers + 1, B, L, D]: the embeddings and what each layer leaves.
        """
        for name in capture:
            if name not in CAPTURES:
                raise unknown("capture", name, CAPTURES)
        tokens_BL = batch["tokens_BL"]
        length = tokens_BL.shape[1]
        if self.max_len is not None and length > self.max_len:
            raise UsageError(
                f"a sequence of {length} tokens is longer than max_len={self.max_len}: raise model.max_len"
            )
        positions = batch.get("positions_BL", jnp.arange(length)[None, :])
        x = embed_tokens(params["embed"], tokens_BL, self.dtype)
        if self.positions == "learned":
            x = x + embed(params["positions"], positions + self.position_offset, self.dtype)
        if self.types:
            x = x + embed(params["types"], batch.get("types_BL", jnp.zeros_like(tokens_BL)), self.dtype)
        x = dropout(self.stack.block.normalize(params["embed_norm"], x), self.embed_dropout, fold(key, 0))
        if self.embed_width is not None:
            x = linear(params["embed_map"], x)
        x = constrain(x, "batch", "residual_length", "act_embed")
        documents = batch.get("documents_BL")
        # What padding itself sees matters only where its own state is read, as from the first or last place.
        pair = None if documents is None else (jnp.maximum(documents, 0), documents)
        favor_1RC = None if self.favor is None else self.favor.draw(self.stack.block.head_dim, key)
        context = Context(self._tables(positions), documents=pair, favor_1RC=favor_1RC)
        stacked = self.stack.apply(params, x, context, key=key, capture=bool(capture))
        x = stacked.x
        if self.norm_place != "post":
            x = self.stack.block.normalize(params["final_norm"], x)
        captured = {} if stacked.states is None else {"hidden_states": stacked.states}
        return Output(x, None, stacked.aux, captured)

    def attention_flops(self, length: int) -> float:
        """Forward floating-point operations a token in the products of attention."""
        if self.favor is not None:
            return self.layers * self.favor.flops(
                length, self.heads, self.heads, self.width // self.heads, causal=False
            )
        return 4 * self.width * sum(min(2 * (layer.window or length) - 1, length) for layer in self.stack.layers)

    def forward_flops(self, spec: dict[str, Any], lengths: dict[str, int]) -> float:
        """Floating-point operations of a row, see lm.models.flops.forward_flops: pairs are scored at one token."""
        once = {name: spec[name] for name in ("pooler", "pair") if name in spec}
        each = {name: part for name, part in spec.items() if name not in once}
        return forward_flops(self, each, lengths) + body_flops(once, 1)

    def head(self, params: dict[str, Any]) -> dict[str, Any]:
        """The parameters that score the vocabulary."""
        return {"table": params["embed"]["table"]} | params["head"]

    def logits(self, head: dict[str, Any], x: jax.Array) -> jax.Array:
        """[..., V] in float32 for any hidden states [..., D]; logits that stand for no token are masked."""
        y = activation(self.head_activation or self.activation, linear(head["dense"], x))
        y = self.stack.block.normalize(head["norm"], y)
        return biased_logits(head, y, self.valid_vocab_size, self.ratios.forward("head"))

    def pair_logits(self, params: dict[str, Any], x_BLD: jax.Array) -> jax.Array:
        """[B, 2] in float32 from the first token; class 0 is "belongs together"."""
        return linear(params["pair"], jnp.tanh(linear(params["pooler"], x_BLD[:, 0]))).astype(jnp.float32)

    def detect_logits(self, params: dict[str, Any], x_BLD: jax.Array) -> jax.Array:
        """[B, L] in float32: above zero where the token seems replaced."""
        y = activation(self.activation, linear(params["detect"]["dense"], x_BLD))
        return linear(params["detect"]["out"], y)[..., 0].astype(jnp.float32)

    def _tables(self, positions: jax.Array) -> dict[Any, tuple[jax.Array, jax.Array]]:
        if self.positions != "rotary":
            return {}
        block = self.stack.block
        rotations = {block.rotation(layer) for layer in self.stack.layers}
        return {rotation: rotary_table(positions, block.head_dim, *rotation) for rotation in rotations}

    def _rotation_settings(self) -> set[Any]:
        layers = (*self.prefix, *self.pattern)
        return {self.rope_base, self.rope_scaling} | {x for each in layers for x in (each.rope_base, each.rope_scaling)}

    @property
    def _embed_width(self) -> int:
        return self.embed_width or self.width
