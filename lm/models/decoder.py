"""The decoder-only Transformer: GPT-2, Llama, PaLM's block and the Performer are settings of one class."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from lm.core.config import setting
from lm.core.errors import UsageError, check_choice, check_given, check_positive, unknown
from lm.core.parametrization import Ratios, ratios_of
from lm.core.params import Normal
from lm.layers import cache as caches
from lm.layers.block import Block, Context, Layer
from lm.layers.dropout import dropout, fold
from lm.layers.embed import embed, embed_spec, embed_tokens, mask_padding, soft_cap, unembed
from lm.layers.favor import Favor
from lm.layers.positions import Scaling, rotary_table, sinusoids
from lm.layers.relative import Relative
from lm.layers.stack import Stack, groups
from lm.models.flops import forward_flops
from lm.models.output import Output
from lm.parallel.rules import constrain

POSITIONS = ("learned", "sinusoidal", "rotary", "alibi", "none")
CAPTURES = ("hidden_states",)


@dataclasses.dataclass(frozen=True)
class Decoder:
    """The config, hashable, and the pure functions over its parameters.

    `prefix` are the first layers, the rest repeat `pattern` (Gemma's is five windows and one full), which may be cut
    short at the end. What the layers share is explained at lm.layers.block.Block. `init_std` is with init="fan_in"
    the embeddings' alone. `valid_vocab_size`: logits from there on stand for no token and are masked. With another
    `parametrization` than "sp" all settings are those of the base, see lm.core.parametrization.ratios_of; its tunable
    multipliers of input and output are `embed_scale` and `logit_scale`.
    """

    layers: int = 12
    width: int = 768
    heads: int = 12
    kv_heads: int | None = None
    head_dim: int | None = None
    mlp_width: int | None = None
    prefix: tuple[Layer, ...] = ()
    pattern: tuple[Layer, ...] = (Layer(),)
    vocab_size: int | None = None
    valid_vocab_size: int | None = None
    positions: str = "learned"
    max_len: int | None = None
    rope_base: float = 10000.0
    rope_scaling: Scaling | None = None
    rope_fraction: float = 1.0
    rope_style: str = "half"
    norm: str = "layernorm"
    norm_bias: bool = True
    norm_eps: float = 1e-5
    norm_offset: float = 0.0
    norm_place: str = "pre"
    block: str = "serial"
    activation: str = "gelu"
    gated: bool = False
    attention_bias: bool = True
    mlp_bias: bool = True
    qk_norm: str = "none"
    relative: Relative | None = None
    favor: Favor | None = None
    attention_scale: float | None = None
    attention_soft_cap: float | None = None
    tied: bool = True
    embed_scale: float = 1.0
    logit_scale: float = 1.0
    logit_soft_cap: float | None = None
    embed_dropout: float = 0.0
    residual_dropout: float = 0.0
    attention_dropout: float = 0.0
    mlp_dropout: float = 0.0
    init: str = "gpt2"
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
        check_given(self, "kv_heads", "head_dim", "mlp_width", "max_len", "logit_soft_cap")
        check_choice("positions", self.positions, POSITIONS)
        if self.width % self.heads and self.head_dim is None:
            raise UsageError(f"width={self.width} is no multiple of heads={self.heads}: set head_dim")
        if (self.positions == "learned") != (self.max_len is not None):
            raise UsageError(
                f"max_len={self.max_len} with positions={self.positions!r}: learned positions alone need it"
            )
        block = self.stack.block
        if self.positions == "rotary" and (self._rotated % 2 or not 0 < self._rotated <= block.head_dim):
            raise UsageError(
                f"rope_fraction={self.rope_fraction} turns {self._rotated} of {block.head_dim} features: "
                "an even number of them is needed"
            )
        if self.positions != "rotary" and self._rotation_settings() != {10000.0, 1.0, "half", None}:
            raise UsageError(
                "rope_base, rope_scaling, rope_fraction and rope_style have no effect with "
                f"positions={self.positions!r}: set positions='rotary' or leave them out"
            )
        if self.positions == "sinusoidal" and self.width % 2:
            raise UsageError(f"width={self.width} with positions='sinusoidal' must be even")
        if not 0 <= self.embed_dropout < 1:
            raise UsageError(f"embed_dropout={self.embed_dropout} must be at least 0 and below 1")
        if self.valid_vocab_size is not None and not 0 < self.valid_vocab_size <= (self.vocab_size or 0):
            raise UsageError(f"valid_vocab_size={self.valid_vocab_size} is not within vocab_size={self.vocab_size}")

    @property
    def offers(self) -> tuple[str, ...]:
        """What an objective may need of it."""
        block = self.stack.block
        backward = block.alibi or block.relative or block.favor or any(layer.window for layer in self.stack.layers)
        return ("causal",) if backward else ("causal", "prefix")

    @property
    def context_limit(self) -> int | None:
        """The longest sequence that has positions; None where any length has."""
        return self.max_len

    @functools.cached_property
    def stack(self) -> Stack:
        """The layers, with every size filled in."""
        own = {f.name: getattr(self, f.name) for f in dataclasses.fields(Block) if hasattr(self, f.name)}
        sizes = {
            "kv_heads": self.kv_heads or self.heads,
            "head_dim": self.head_dim or self.width // self.heads,
            "mlp_width": self.mlp_width or 4 * self.width,
            "rope_base": self.rope_base if self.positions == "rotary" else None,
            "alibi": self.positions == "alibi",
        }
        return Stack(Block(**own | sizes), groups(self.layers, self.pattern, self.prefix), self.remat, self.scan)

    @property
    def stacks(self) -> tuple[Stack, ...]:
        return (self.stack,)

    @property
    def ratios(self) -> Ratios:
        """Its sizes over those of the base, by which it is parametrized."""
        return ratios_of(self, self.head_dim or self.width // self.heads)

    def spec(self) -> dict[str, Any]:
        """A tree of Param; each group's layers are stacked along a leading "layers" axis."""
        if self.vocab_size is None:
            raise UsageError("vocab_size=None is not resolved: take it from the tokenizer or set it")
        embeddings = Normal(self.init_std)
        spec: dict[str, Any] = {"embed": embed_spec(self.vocab_size, self.width, embeddings)}
        if self.max_len is not None:
            spec["positions"] = embed_spec(self.max_len, self.width, embeddings, axis="positions")
        spec |= self.stack.spec()
        if self.norm_place != "post":
            spec["final_norm"] = self.stack.block.norm_spec({"norm": self.width})
        if not self.tied:
            head = embed_spec(self.vocab_size, self.width, self.stack.block.kernel_init(self.width))["table"]
            spec["head"] = {"table": dataclasses.replace(head, inputs=("embed",), role="head")}
        return self.ratios.apply(spec)

    def apply(
        self,
        params: dict[str, Any],
        batch: dict[str, jax.Array],
        *,
        key: jax.Array | None = None,
        cache: dict[str, Any] | None = None,
        capture: tuple[str, ...] = (),
    ) -> Output:
        """Hidden states [B, L, D] in `dtype`, normalised and ready for `logits`.

        `batch` has tokens_BL and may have positions_BL (otherwise the index in the row),
        documents_BL (attention stays inside equal numbers) and prefix_B (how many first tokens all see one another).
        `key` turns dropout on. With a `cache` the tokens continue each row from its own length; those of document -1,
        behind the others, are padding that the cache does not keep. capture=("hidden_states",) adds
        [layers + 1, B, L, D]: the embeddings and what each layer leaves on the residual stream.
        """
        for name in capture:
            if name not in CAPTURES:
                raise unknown("capture", name, CAPTURES)
        positions, context = self._context(batch, cache, key)
        x = self._embed(params, batch["tokens_BL"], positions, fold(key, 0))
        stacked = self.stack.apply(params, x, context, key=key, cache=cache, capture=bool(capture))
        x = stacked.x
        if cache is not None:
            length_B = caches.grown(cache["length"], batch["tokens_BL"], batch.get("documents_BL"))
            cache = stacked.cache | {"length": length_B}
        if self.norm_place != "post":
            x = self.stack.block.normalize(params["final_norm"], x)
        captured = {} if stacked.states is None else {"hidden_states": stacked.states}
        return Output(constrain(x, "batch", "residual_length", "act_embed"), cache, stacked.aux, captured)

    def cache_spec(self, batch_size: int, length: int) -> dict[str, Any]:
        """Keys and values of `length` tokens a row, or `favor`'s sums, and each row's own length; windows keep all too.

        Raises UsageError where `length` has no positions.
        """
        self._check_length(length)
        return {"length": caches.length_spec(batch_size)} | self.stack.cache_spec(batch_size, length)

    def attention_flops(self, length: int) -> float:
        """Forward floating-point operations a token in the products of attention, masked pairs not counted."""
        block = self.stack.block
        if self.favor is not None:
            return self.layers * self.favor.flops(length, self.heads, block.kv_heads, block.head_dim, causal=True)
        shown = [min(layer.window or length, length) for layer in self.stack.layers]
        keys = sum(w - w * w / (2 * length) for w in shown)
        tables = 0 if self.relative is None else 1 + self.relative.values
        return (4 + 2 * tables) * self.heads * block.head_dim * keys

    def forward_flops(self, spec: dict[str, Any], lengths: dict[str, int]) -> float:
        """Floating-point operations of a row, see lm.models.flops.forward_flops."""
        return forward_flops(self, spec, lengths)

    def head(self, params: dict[str, Any]) -> dict[str, Any]:
        """The parameters that make logits: the embedding's where tied."""
        return params["embed" if self.tied else "head"]

    def logits(self, head: dict[str, Any], x: jax.Array) -> jax.Array:
        """[..., V] in float32 for any hidden states [..., D]; logits that stand for no token are masked."""
        logits = unembed(head, x) * (self.logit_scale * self.ratios.forward("head"))
        if self.logit_soft_cap is not None:
            logits = soft_cap(logits, self.logit_soft_cap)
        return mask_padding(logits, self.valid_vocab_size)

    def _context(
        self, batch: dict[str, jax.Array], cache: dict[str, Any] | None, key: jax.Array | None
    ) -> tuple[jax.Array, Context]:
        length = batch["tokens_BL"].shape[1]
        self._check_length(length)
        documents, starts_B = batch.get("documents_BL"), None if cache is None else cache["length"]
        positions = batch.get("positions_BL")
        if positions is None:
            positions = jnp.arange(length)[None, :] + (0 if starts_B is None else starts_B[:, None])
        tables = {}
        if self.positions == "rotary":
            rotations = {self.stack.block.rotation(layer) for layer in self.stack.layers}
            tables = {r: rotary_table(positions, self._rotated, *r) for r in rotations}
        pair = None if documents is None else (documents, documents)
        if cache is not None:
            # One document a row: by its length keys are hidden, padding alone has to be kept out of sums.
            pair = None if self.favor is None or documents is None else (jnp.minimum(documents, 0),) * 2
        favor_1RC = None if self.favor is None else self.favor.draw(self.stack.block.head_dim, key)
        places = None
        if "prefix_B" in batch:
            if cache is not None or "prefix" not in self.offers:
                raise ValueError(
                    "prefix_B, a prefix that is seen both ways, goes with no cache and what looks back only"
                )
            index = jnp.broadcast_to(jnp.arange(length)[None, :], batch["tokens_BL"].shape)
            places = (index, jnp.where(index < batch["prefix_B"][:, None], 0, index))
        given: dict[str, Any] = {"starts_B": starts_B, "documents": pair, "places": places, "favor_1RC": favor_1RC}
        return positions, Context(tables, **given, positions_BL=positions if self.positions == "alibi" else None)

    def _embed(
        self, params: dict[str, Any], tokens_BL: jax.Array, positions: jax.Array, key: jax.Array | None
    ) -> jax.Array:
        x = embed_tokens(params["embed"], tokens_BL, self.dtype) * jnp.asarray(self.embed_scale, self.dtype)
        if self.positions == "learned":
            x = x + embed(params["positions"], positions, self.dtype)
        elif self.positions == "sinusoidal":
            x = x + sinusoids(positions, self.width).astype(self.dtype)
        return constrain(dropout(x, self.embed_dropout, key), "batch", "residual_length", "act_embed")

    def _rotation_settings(self) -> set[Any]:
        own = {self.rope_base, self.rope_fraction, self.rope_style, self.rope_scaling}
        return own | {setting for layer in self.stack.layers for setting in (layer.rope_base, layer.rope_scaling)}

    def _check_length(self, length: int) -> None:
        if self.context_limit is not None and length > self.context_limit:
            raise UsageError(
                f"a sequence of {length} tokens is longer than max_len={self.max_len}: raise model.max_len"
            )

    @property
    def _rotated(self) -> int:
        return int(self.stack.block.head_dim * self.rope_fraction)
