"""The decoder-only Transformer: GPT-2, Llama and PaLM's block are settings of one class."""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lm.core import params as specs
from lm.core.errors import UsageError, check_choice, check_positive, unknown
from lm.core.params import Normal
from lm.layers import cache as caches
from lm.layers.activations import ACTIVATIONS
from lm.layers.attention import Form, attention, attention_spec
from lm.layers.dropout import dropout
from lm.layers.embed import embed, embed_spec, mask_padding, soft_cap, unembed
from lm.layers.linear import linear
from lm.layers.mlp import mlp, mlp_spec
from lm.layers.norm import NORMS, norm, norm_spec
from lm.layers.positions import rotary_table, rotate, sinusoids
from lm.models.output import Output
from lm.parallel.rules import constrain

POSITIONS = ("learned", "sinusoidal", "rotary", "none")
NORM_PLACES = ("pre", "post", "sandwich", "output")
BLOCKS = ("serial", "parallel", "parallel_two_norms")
REMAT = ("none", "full", "dots", "attention")
CAPTURES = ("hidden_states",)
_CHOICES = {
    "positions": POSITIONS,
    "rope_style": ("half", "interleaved"),
    "norm": NORMS,
    "norm_place": NORM_PLACES,
    "block": BLOCKS,
    "activation": tuple(ACTIVATIONS),
    "qk_norm": ("none", "head", "projection"),
    "init": ("gpt2", "normal", "fan_in"),
    "dtype": ("float32", "bfloat16"),
    "remat": REMAT,
}


@dataclasses.dataclass(frozen=True)
class Layer:
    """What may differ between the layers of a pattern; None takes the decoder's own setting.

    `window` counts the token itself: a token sees that many, all of them without one.
    """

    window: int | None = None
    rope_base: float | None = None


@dataclasses.dataclass(frozen=True)
class Decoder:
    """The config, hashable, and the pure functions over its parameters.

    Layers repeat `pattern` (Gemma's is five windows and one full), and one that is cut short ends the stack.
    `norm_place`: "pre" x + f(n(x)); "post" n(x + f(x)) (GPT-1); "sandwich" x + n(f(n(x))) (Gemma); "output"
    x + n(f(x)) (OLMo 2). `block`: attention, then mlp; or both side by side, on one norm (PaLM, Cohere) or two
    (GPT-NeoX). `qk_norm`: over each "head" (Qwen 3) or the whole "projection" (OLMo 2), before rotation.
    `init`: "gpt2" is N(0, init_std), for projections onto the residual stream over sqrt(2 * layers); "normal"
    leaves that out (Llama); "fan_in" draws kernels from N(0, 1 / fan-in), `init_std` is then the embeddings' (PaLM).
    `valid_vocab_size`: logits from there on stand for no token and are masked.
    """

    layers: int = 12
    width: int = 768
    heads: int = 12
    kv_heads: int | None = None
    head_dim: int | None = None
    mlp_width: int | None = None
    pattern: tuple[Layer, ...] = (Layer(),)
    vocab_size: int | None = None
    valid_vocab_size: int | None = None
    positions: str = "learned"
    max_len: int | None = None
    rope_base: float = 10000.0
    rope_fraction: float = 1.0
    rope_style: str = "half"
    norm: str = "layernorm"
    norm_bias: bool = True
    norm_eps: float = 1e-5
    norm_place: str = "pre"
    block: str = "serial"
    activation: str = "gelu"
    gated: bool = False
    attention_bias: bool = True
    mlp_bias: bool = True
    qk_norm: str = "none"
    attention_scale: float | None = None
    attention_soft_cap: float | None = None
    tied: bool = True
    embed_scale: float = 1.0
    logit_scale: float = 1.0
    logit_soft_cap: float | None = None
    embed_dropout: float = 0.0
    residual_dropout: float = 0.0
    attention_dropout: float = 0.0
    init: str = "gpt2"
    init_std: float = 0.02
    dtype: str = "float32"
    remat: str = "none"
    scan: bool = True

    def __post_init__(self):
        check_positive(layers=self.layers, width=self.width, heads=self.heads, norm_eps=self.norm_eps)
        check_positive(rope_base=self.rope_base, init_std=self.init_std)
        _check_given(self, "kv_heads", "head_dim", "mlp_width", "max_len", "attention_soft_cap", "logit_soft_cap")
        for name, allowed in _CHOICES.items():
            check_choice(name, getattr(self, name), allowed)
        if self.width % self.heads and self.head_dim is None:
            raise UsageError(f"width={self.width} is no multiple of heads={self.heads}: set head_dim")
        if self.heads % self._kv_heads:
            raise UsageError(f"heads={self.heads} is no multiple of kv_heads={self.kv_heads}")
        if not self.pattern:
            raise UsageError("pattern=() is empty: it needs at least one Layer()")
        if (self.positions == "learned") != (self.max_len is not None):
            raise UsageError(
                f"max_len={self.max_len} with positions={self.positions!r}: learned positions alone need it"
            )
        if self.positions == "rotary" and (self._rotated % 2 or not 0 < self._rotated <= self._head_dim):
            raise UsageError(
                f"rope_fraction={self.rope_fraction} turns {self._rotated} of {self._head_dim} features: "
                "an even number of them is needed"
            )
        for layer in self.pattern:
            _check_given(layer, "window", "rope_base")
        rotation = (self.rope_base, self.rope_fraction, self.rope_style, *(layer.rope_base for layer in self.pattern))
        if self.positions != "rotary" and rotation != (10000.0, 1.0, "half", *(None for _ in self.pattern)):
            raise UsageError(
                f"rope_base, rope_fraction and rope_style have no effect with positions={self.positions!r}: "
                "set positions='rotary' or leave them out"
            )
        if self.positions == "sinusoidal" and self.width % 2:
            raise UsageError(f"width={self.width} with positions='sinusoidal' must be even")
        if self.block != "serial" and self.norm_place != "pre":
            raise UsageError(f"block={self.block!r} needs norm_place='pre', not {self.norm_place!r}")
        for name in ("embed_dropout", "residual_dropout", "attention_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise UsageError(f"{name}={getattr(self, name)} must be at least 0 and below 1")
        if self.valid_vocab_size is not None and not 0 < self.valid_vocab_size <= (self.vocab_size or 0):
            raise UsageError(f"valid_vocab_size={self.valid_vocab_size} is not within vocab_size={self.vocab_size}")

    @property
    def context_limit(self) -> int | None:
        """The longest sequence that has positions; None where any length has."""
        return self.max_len

    @property
    def groups(self) -> tuple[tuple[tuple[Layer, ...], int], ...]:
        """The stack as ((pattern, repeats), ...)."""
        repeats, rest = divmod(self.layers, len(self.pattern))
        groups = ((self.pattern, repeats), (self.pattern[:rest], 1))
        return tuple((pattern, n) for pattern, n in groups if pattern and n)

    def spec(self) -> dict[str, Any]:
        """A tree of Param; each group's layers are stacked along a leading "layers" axis."""
        if self.vocab_size is None:
            raise UsageError("vocab_size=None is not resolved: take it from the tokenizer or set it")
        embeddings = Normal(self.init_std)
        spec: dict[str, Any] = {"embed": embed_spec(self.vocab_size, self.width, embeddings)}
        if self.max_len is not None:
            spec["positions"] = embed_spec(self.max_len, self.width, embeddings, axis="positions")
        for i, (pattern, repeats) in enumerate(self.groups):
            layers = {f"layer{j}": self._layer_spec() for j in range(len(pattern))}
            spec[f"group{i}"] = specs.stack(layers, repeats)
        if self.norm_place != "post":
            spec["final_norm"] = norm_spec({"norm": self.width}, self.norm_bias)
        if not self.tied:
            head = embed_spec(self.vocab_size, self.width, self._kernel_init(self.width))["table"]
            spec["head"] = {"table": dataclasses.replace(head, inputs=("embed",), role="head")}
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
        """Hidden states [B, L, D] in `dtype`, normalised and ready for `logits`.

        `batch` has tokens_BL and may have positions_BL (otherwise the index in the row) and
        documents_BL (attention stays inside equal numbers). `key` turns dropout on. With a `cache` the tokens
        continue each row from its own length. capture=("hidden_states",) adds [layers + 1, B, L, D]: the
        embeddings and what each layer leaves on the residual stream.
        """
        for name in capture:
            if name not in CAPTURES:
                raise unknown("capture", name, CAPTURES)
        context = self._context(batch, cache)
        x = self._embed(params, batch["tokens_BL"], context, _fold(key, 0))
        cache_out = None if cache is None else {"length": cache["length"] + x.shape[1]}
        hidden = [x[None]]
        for i, (pattern, _) in enumerate(self.groups):
            name = f"group{i}"
            group_cache = None if cache is None else cache[name]
            x, group_cache, states = self._group(
                params[name], x, pattern, context, _fold(key, i + 1), group_cache, bool(capture)
            )
            if cache_out is not None:
                cache_out[name] = group_cache
            hidden.append(states)
        if self.norm_place != "post":
            x = self._norm(params["final_norm"], x)
        captured = {"hidden_states": jnp.concatenate(hidden)} if capture else {}
        return Output(constrain(x, "batch", "length", "act_embed"), cache_out, captured=captured)

    def cache_spec(self, batch_size: int, length: int) -> dict[str, Any]:
        """Keys and values of `length` tokens a row, and each row's own length; windows too keep them all.

        Raises UsageError where `length` has no positions.
        """
        self._check_length(length)
        layer = caches.key_value_spec(batch_size, length, self._kv_heads, self._head_dim, self.dtype)
        spec: dict[str, Any] = {"length": caches.length_spec(batch_size)}
        for i, (pattern, repeats) in enumerate(self.groups):
            spec[f"group{i}"] = specs.stack({f"layer{j}": layer for j in range(len(pattern))}, repeats)
        return spec

    def attention_flops(self, length: int) -> float:
        """Forward floating-point operations a token in the two products of attention, masked pairs not counted."""
        windows = [layer.window for pattern, repeats in self.groups for layer in pattern * repeats]
        shown = [min(w or length, length) for w in windows]
        keys = sum(w - w * w / (2 * length) for w in shown)
        return 4 * self._heads_width * keys

    def head(self, params: dict[str, Any]) -> dict[str, Any]:
        """The parameters that make logits: the embedding's where tied."""
        return params["embed" if self.tied else "head"]

    def logits(self, head: dict[str, Any], x: jax.Array) -> jax.Array:
        """[..., V] in float32 for any hidden states [..., D]; logits that stand for no token are masked."""
        logits = unembed(head, x) * self.logit_scale
        if self.logit_soft_cap is not None:
            logits = soft_cap(logits, self.logit_soft_cap)
        return mask_padding(logits, self.valid_vocab_size)

    def _layer_spec(self) -> dict[str, Any]:
        out_init = self._kernel_init(self._heads_width), self._kernel_init(self._mlp_width)
        if self.init == "gpt2":
            out_init = (Normal(self.init_std / math.sqrt(2 * self.layers)),) * 2
        init = self._kernel_init(self.width)
        shape = (self.width, self.heads, self._kv_heads, self._head_dim)
        spec = {
            "attention": attention_spec(*shape, self.attention_bias, init, out_init[0]),
            "mlp": mlp_spec(self.width, self._mlp_width, self.gated, self.mlp_bias, init, out_init[1]),
        }
        if self.qk_norm != "none":
            whole = self.qk_norm == "projection"
            for name, axis, heads in (("q", "heads", self.heads), ("k", "kv_heads", self._kv_heads)):
                axes = {axis: heads} if whole else {}
                spec["attention"][f"{name}_norm"] = norm_spec(axes | {"head_dim": self._head_dim}, self.norm_bias)
        return spec | {name: norm_spec({"norm": self.width}, self.norm_bias) for name in self._norm_names()}

    def _norm_names(self) -> list[str]:
        names = []
        for sublayer in ("attention", "mlp"):
            if self.norm_place != "output" and not (sublayer == "mlp" and self.block == "parallel"):
                names.append(f"{sublayer}_norm")
            if self.norm_place in ("sandwich", "output"):
                names.append(f"{sublayer}_out_norm")
        return names

    def _kernel_init(self, fan_in: int) -> Normal:
        return Normal(fan_in**-0.5 if self.init == "fan_in" else self.init_std)

    def _context(self, batch: dict[str, jax.Array], cache: dict[str, Any] | None) -> "_Context":
        length = batch["tokens_BL"].shape[1]
        self._check_length(length)
        documents, starts = batch.get("documents_BL"), None if cache is None else cache["length"]
        if documents is not None and cache is not None:
            raise ValueError("a cache holds one document a row: leave documents_BL out")
        positions = batch.get("positions_BL")
        if positions is None:
            positions = jnp.arange(length)[None, :] + (0 if starts is None else starts[:, None])
        tables = {}
        if self.positions == "rotary":
            bases = {layer.rope_base or self.rope_base for layer in self.pattern}
            tables = {base: rotary_table(positions, self._rotated, base) for base in bases}
        return _Context(positions, tables, None if documents is None else (documents, documents), starts)

    def _embed(
        self, params: dict[str, Any], tokens_BL: jax.Array, context: "_Context", key: jax.Array | None
    ) -> jax.Array:
        x = embed(params["embed"], tokens_BL, self.dtype) * jnp.asarray(self.embed_scale, self.dtype)
        if self.positions == "learned":
            x = x + embed(params["positions"], context.positions, self.dtype)
        elif self.positions == "sinusoidal":
            x = x + sinusoids(context.positions, self.width).astype(self.dtype)
        return constrain(dropout(x, self.embed_dropout, key), "batch", "length", "act_embed")

    def _group(self, p, x, pattern, context, key, cache, capture):
        """(x, cache, hidden states [repeats * len(pattern), B, L, D] or None) after one scanned group."""
        repeats = jax.tree.leaves(p)[0].shape[0]

        def body(x, scanned):
            p, cache, key = scanned
            states, new_cache = [], {}
            for j, layer in enumerate(pattern):
                name = f"layer{j}"
                layer_cache = None if cache is None else cache[name]
                x, new_cache[name] = self._layer(p[name], x, layer, context, _fold(key, j), layer_cache)
                states.append(x)
            return x, (new_cache if cache is not None else None, jnp.stack(states) if capture else None)

        keys = None if key is None else jax.random.split(key, repeats)
        unroll = 1 if self.scan else repeats
        body = _remat(body, self.remat, looped=unroll < repeats)
        x, (cache, states) = jax.lax.scan(body, x, (p, cache, keys), unroll=unroll)
        return x, cache, states.reshape(-1, *x.shape) if capture else None

    def _layer(self, p, x, layer, context, key, cache):
        """(x, cache) after one layer: attention and mlp in the order of `block`."""
        h = self._enter(p, "attention", x)
        y, cache = self._attention(p["attention"], h, layer, context, _fold(key, 0), cache)
        y = dropout(y, self.residual_dropout, _fold(key, 1))
        if self.block == "serial":
            x = self._leave(p, "attention", x, y)
            h = self._enter(p, "mlp", x)
        elif self.block == "parallel_two_norms":
            h = self._enter(p, "mlp", x)
        z = dropout(mlp(p["mlp"], h, self.activation), self.residual_dropout, _fold(key, 2))
        x = self._leave(p, "mlp", x, z) if self.block == "serial" else x + y + z
        return constrain(x, "batch", "length", "act_embed"), cache

    def _enter(self, p, sublayer, x):
        return self._norm(p[f"{sublayer}_norm"], x) if self.norm_place in ("pre", "sandwich") else x

    def _leave(self, p, sublayer, x, y):
        if self.norm_place in ("sandwich", "output"):
            y = self._norm(p[f"{sublayer}_out_norm"], y)
        return self._norm(p[f"{sublayer}_norm"], x + y) if self.norm_place == "post" else x + y

    def _attention(self, p, x_BLD, layer, context, key, cache):
        q_BLHC, k_BLKC, v_BLKC = (linear(p[name], x_BLD) for name in ("q", "k", "v"))
        if self.qk_norm != "none":
            q_BLHC, k_BLKC = self._norm(p["q_norm"], q_BLHC), self._norm(p["k_norm"], k_BLKC)
        if self.positions == "rotary":
            table = context.tables[layer.rope_base or self.rope_base]
            q_BLHC, k_BLKC = rotate(q_BLHC, table, self.rope_style), rotate(k_BLKC, table, self.rope_style)
        q_BLHC = constrain(q_BLHC, "batch", "length", "act_heads", None)
        k_BLKC, v_BLKC = (constrain(x, "batch", "length", "act_kv_heads", None) for x in (k_BLKC, v_BLKC))
        if cache is not None:
            k_BLKC, v_BLKC = (caches.append(cache[n], x, context.starts) for n, x in (("k", k_BLKC), ("v", v_BLKC)))
            cache = {"k": k_BLKC, "v": v_BLKC}
        form = Form(True, layer.window, self.attention_scale, self.attention_soft_cap, self.attention_dropout)
        arrays = {"starts_B": context.starts, "documents": context.documents, "key": key}
        o_BLHC = attention(form, q_BLHC, k_BLKC, v_BLKC, **arrays)
        return linear(p["o"], o_BLHC, contracted=2), cache

    def _check_length(self, length: int) -> None:
        if self.context_limit is not None and length > self.context_limit:
            raise UsageError(
                f"a sequence of {length} tokens is longer than max_len={self.max_len}: raise model.max_len"
            )

    def _norm(self, p, x):
        return norm(p, x, self.norm, self.norm_eps)

    @property
    def _kv_heads(self) -> int:
        return self.kv_heads or self.heads

    @property
    def _head_dim(self) -> int:
        return self.head_dim or self.width // self.heads

    @property
    def _heads_width(self) -> int:
        return self.heads * self._head_dim

    @property
    def _mlp_width(self) -> int:
        return self.mlp_width or 4 * self.width

    @property
    def _rotated(self) -> int:
        return int(self._head_dim * self.rope_fraction)


class _Context(NamedTuple):
    """What every layer reads and none changes; `starts` are the rows' lengths in the cache."""

    positions: jax.Array
    tables: dict[float, tuple[jax.Array, jax.Array]]
    documents: tuple[jax.Array, jax.Array] | None
    starts: jax.Array | None


def _check_given(config: Any, *names: str) -> None:
    check_positive(**{name: value for name in names if (value := getattr(config, name)) is not None})


def _remat(body, policy, looped):
    if policy == "none":
        return body
    policies = jax.checkpoint_policies
    saved = {
        "full": policies.nothing_saveable,
        "dots": policies.dots_with_no_batch_dims_saveable,
        "attention": policies.save_only_these_names("attention"),
    }
    # Only a loop keeps the compiler from merging the second forward pass with the first by itself.
    return jax.checkpoint(body, policy=saved[policy], prevent_cse=not looped)


def _fold(key, i):
    return None if key is None else jax.random.fold_in(key, i)
