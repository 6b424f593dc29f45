"""One layer of a Transformer: attention, attention to a memory, a feed-forward layer, and the norms around them."""

import dataclasses
import math
from typing import Any, NamedTuple

import jax

from lm.core.errors import UsageError, check_choice, check_given, check_positive
from lm.core.parametrization import Ratios
from lm.core.params import Normal
from lm.layers import alibi, favor, relative
from lm.layers import cache as caches
from lm.layers.activations import ACTIVATIONS
from lm.layers.attention import KERNELS, Form, attention, attention_spec
from lm.layers.buckets import Buckets, bucket_bias
from lm.layers.dropout import dropout, fold
from lm.layers.favor import Favor
from lm.layers.linear import linear, linear_spec
from lm.layers.mlp import mlp, mlp_spec
from lm.layers.moe import Experts, experts, experts_spec
from lm.layers.norm import NORMS, norm, norm_spec
from lm.layers.positions import Scaling, rotate
from lm.layers.relative import Relative
from lm.parallel.rules import constrain

_CHOICES: dict[str, tuple[str, ...]] = {
    "rope_style": ("half", "interleaved"),
    "norm": NORMS,
    "norm_place": ("pre", "post", "sandwich", "output"),
    "block": ("serial", "parallel", "parallel_two_norms"),
    "activation": tuple(ACTIVATIONS),
    "qk_norm": ("none", "head", "projection"),
    "init": ("gpt2", "normal", "fan_in", "t5"),
    "attention_kernel": KERNELS,
    "dtype": ("float32", "bfloat16"),
}
# What else each form of attention has no place for, and its value where it is not asked for.
_WITHOUT: dict[str, dict[str, Any]] = {
    "alibi": {"attention_soft_cap": None},
    "relative": {"attention_soft_cap": None, "attention_kernel": "auto", "buckets": None, "alibi": False},
    "favor": {
        "attention_soft_cap": None,
        "attention_dropout": 0.0,
        "attention_kernel": "auto",
        "buckets": None,
        "alibi": False,
        "relative": None,
    },
}


@dataclasses.dataclass(frozen=True)
class Layer:
    """What may differ between the layers of a stack; None takes the model's own setting.

    `window` counts the token itself: a token sees that many, all of them without one; in both directions, it sees
    window - 1 to each side. `attention_norm=False` leaves out the norm before attention (ModernBERT's first layer).
    `experts` take the place of the feed-forward layer.
    """

    window: int | None = None
    rope_base: float | None = None
    rope_scaling: Scaling | None = None
    attention_scale: float | None = None
    attention_norm: bool = True
    experts: Experts | None = None

    def __post_init__(self):
        check_given(self, "window", "rope_base", "attention_scale")


Rotation = tuple[float, Scaling | None]  # The base, and what is done to the frequencies.


class Context(NamedTuple):
    """What every layer of a stack reads and none changes.

    `tables` are the rotations (cos, sin) by `Block.rotation`; `starts_B` the rows' lengths in the cache; `documents`
    and `memory_documents` pairs (of queries [B, L], of keys [B, S]) inside whose equal numbers attention stays;
    `places` (of queries [B, L], of keys [B, S]) are compared instead of indices: a query sees the keys whose place is
    not above its own (a permutation's order, or a prefix). `bias` [B or 1, H or 1, L, S] is added to the scores;
    `bucket_rows` [B or 1, L, S] say which rows of its own table a layer with `Block.buckets` adds instead.
    `favor_1RC` are the draws of `Block.favor`, `positions_BL` what `Block.alibi` counts by.
    `memory_BSD` is an encoder's output; without it the cache has its keys and values.
    """

    tables: dict[Rotation, tuple[jax.Array, jax.Array]] = {}
    starts_B: jax.Array | None = None
    documents: tuple[jax.Array, jax.Array] | None = None
    places: tuple[jax.Array, jax.Array] | None = None
    bias: jax.Array | None = None
    bucket_rows: jax.Array | None = None
    favor_1RC: jax.Array | None = None
    positions_BL: jax.Array | None = None
    memory_BSD: jax.Array | None = None
    memory_documents: tuple[jax.Array, jax.Array] | None = None

    @property
    def real_BL(self) -> jax.Array | None:
        """False at padding, whose document is -1; None where nothing is known to be padding."""
        return None if self.documents is None else self.documents[1] >= 0


@dataclasses.dataclass(frozen=True)
class Block:
    """The settings that the layers of one stack share; models pass their fields of the same names.

    `causal` hides later tokens; `memory` adds attention to an encoder's output between the two sublayers.
    `norm_place`: "pre" x + f(n(x)); "post" n(x + f(x)) (the original, GPT-1, BERT); "sandwich" x + n(f(n(x)))
    (Gemma); "output" x + n(f(x)) (OLMo 2). `block`: attention, then mlp; or both side by side, on one norm (PaLM,
    Cohere) or two (GPT-NeoX). `qk_norm`: over each "head" (Qwen 3) or the whole "projection" (OLMo 2), before
    rotation. `init`: "gpt2" is N(0, init_std), for projections onto the residual stream over sqrt(2 * layers);
    "normal" leaves that out (Llama, BERT); "fan_in" draws kernels from N(0, 1 / fan-in) (PaLM); "t5" too, and
    queries smaller by sqrt(head_dim), because T5 does not scale their scores. Initial values and `attention_scale` are
    those of the base that `ratios` are over.
    """

    layers: int
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp_width: int
    causal: bool = True
    memory: bool = False
    rope_base: float | None = None  # None: nothing is rotated.
    rope_scaling: Scaling | None = None
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
    buckets: Buckets | None = None  # A table of biases by distance in each layer.
    alibi: bool = False  # Biases that grow with the distance.
    relative: Relative | None = None  # Tables of vectors by distance in each layer.
    favor: Favor | None = None  # Attention through random features.
    attention_scale: float | None = None
    attention_soft_cap: float | None = None
    attention_kernel: str = "auto"  # See lm.layers.attention.Form.
    residual_dropout: float = 0.0
    attention_dropout: float = 0.0
    mlp_dropout: float = 0.0
    init: str = "gpt2"
    init_std: float = 0.02
    ratios: Ratios = Ratios()
    dtype: str = "float32"

    def __post_init__(self):
        numbers = ("layers", "width", "heads", "kv_heads", "head_dim", "mlp_width", "norm_eps", "init_std")
        check_positive(**{name: getattr(self, name) for name in numbers})
        check_given(self, "rope_base", "attention_scale", "attention_soft_cap")
        for name, allowed in _CHOICES.items():
            check_choice(name, getattr(self, name), allowed)
        if self.heads % self.kv_heads:
            raise UsageError(f"heads={self.heads} is no multiple of kv_heads={self.kv_heads}")
        for name, others in _WITHOUT.items():
            for other, default in others.items():
                if getattr(self, name) and getattr(self, other) != default:
                    raise UsageError(f"{other}={getattr(self, other)!r} does not go with {name}: leave one of them out")
        if self.block != "serial" and (self.norm_place != "pre" or self.memory):
            raise UsageError(f"block={self.block!r} needs norm_place='pre', not {self.norm_place!r}, and no memory")
        for name in ("residual_dropout", "attention_dropout", "mlp_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise UsageError(f"{name}={getattr(self, name)} must be at least 0 and below 1")

    def spec(self, layer: Layer) -> dict[str, Any]:
        """{"attention", "memory" where there is one, "mlp"}, and a norm for each by `norm_place`."""
        inputs, heads_width = self.kernel_init(self.width), self.heads * self.head_dim
        shape = (self.width, self.heads, self.kv_heads, self.head_dim)
        attend = attention_spec(*shape, self.attention_bias, inputs, self._out_init(heads_width))
        if self.init == "t5":
            queries = Normal((self.base_width * self.head_dim / self.ratios.head_dim) ** -0.5)
            heads = {"heads": self.heads, "head_dim": self.head_dim}
            attend["q"] = linear_spec({"embed": self.width}, heads, queries, self.attention_bias)
        buckets = {} if self.buckets is None else {"buckets": self.buckets.spec(self.heads, self.base_width)}
        tables = {}
        if self.relative is not None:
            tables = {"relative": self.relative.spec(self.head_dim, self.causal, inputs)}
        spec = {"attention": attend | self._qk_norm_spec() | buckets | tables, "mlp": self._mlp_spec(layer.experts)}
        if self.memory:
            spec["memory"] = attend
        return spec | {name: self.norm_spec({"norm": self.width}) for name in self._norm_names(layer)}

    def cache_spec(self, batch_size: int, length: int, memory_length: int | None = None) -> dict[str, Any]:
        """Keys and values of `length` tokens a row, and those of the memory; windows too keep them all.

        With `favor` it is the sums over them.
        """
        if self.favor is not None:
            return self.favor.cache_spec(batch_size, self.kv_heads, self.head_dim)
        shape = (self.kv_heads, self.head_dim + self.alibi * alibi.WIDTH, self.dtype)
        spec = caches.key_value_spec(batch_size, length, *shape)
        if memory_length is None:
            return spec
        return spec | {"memory": caches.key_value_spec(batch_size, memory_length, *shape)}

    def apply(
        self,
        p: dict[str, Any],
        x: jax.Array,
        layer: Layer,
        context: Context,
        key: jax.Array | None,
        cache: dict[str, Any] | None,
    ) -> tuple[jax.Array, dict[str, Any] | None, dict[str, jax.Array]]:
        """(x [B, L, D], the cache with the new tokens, experts' losses summed over tokens) after one layer.

        `key` turns dropout on.
        """
        h = self._enter(p, "attention", x)
        y, cache = self._attention(p["attention"], h, layer, context, fold(key, 0), cache)
        y = self._drop(y, fold(key, 1))
        if self.block == "serial":
            x = self._leave(p, "attention", x, y)
            if self.memory:
                y, cache = self._attend_memory(p["memory"], self._enter(p, "memory", x), context, fold(key, 2), cache)
                x = self._leave(p, "memory", x, self._drop(y, fold(key, 3)))
            h = self._enter(p, "mlp", x)
        elif self.block == "parallel_two_norms":
            h = self._enter(p, "mlp", x)
        sums: dict[str, jax.Array] = {}
        if layer.experts is None:
            z = mlp(p["mlp"], h, self.activation, self.mlp_dropout, fold(key, 4))
        else:
            z, sums = experts(layer.experts, p["mlp"], h, self.activation, context.real_BL)
        z = self._drop(z, fold(key, 5))
        x = self._leave(p, "mlp", x, z) if self.block == "serial" else x + self._branch(y) + self._branch(z)
        return constrain(x, "batch", "residual_length", "act_embed"), cache, sums

    def remember(self, p: dict[str, Any], memory_BSD: jax.Array) -> dict[str, jax.Array]:
        """{"k", "v"} [B, S, K, C]: the keys and values of the memory, for a cache or for one pass."""
        k_BSKC, v_BSKC = (linear(p[name], memory_BSD) for name in ("k", "v"))
        return {n: constrain(x, "batch", "length", "act_kv_heads", None) for n, x in (("k", k_BSKC), ("v", v_BSKC))}

    def rotation(self, layer: Layer) -> Rotation:
        """How queries and keys of the layer are turned: one with a base of its own has a scaling of its own too."""
        assert self.rope_base is not None
        return (self.rope_base, self.rope_scaling) if layer.rope_base is None else (layer.rope_base, layer.rope_scaling)

    @property
    def base_width(self) -> float:
        """The width that `ratios` are over."""
        return self.width / self.ratios.width

    def kernel_init(self, fan_in: int) -> Normal:
        """How a kernel is drawn at the base, where this one has that many inputs."""
        return Normal((fan_in / self.ratios.width) ** -0.5 if self.init in ("fan_in", "t5") else self.init_std)

    def norm_spec(self, axes: dict[str, int]) -> dict[str, Any]:
        """The parameters of a norm over `axes`."""
        return norm_spec(axes, self.norm_bias, self.norm_offset)

    def normalize(self, p: dict[str, jax.Array], x: jax.Array) -> jax.Array:
        return norm(p, x, self.norm, self.norm_eps, self.norm_offset)

    def _out_init(self, fan_in: int) -> Normal:
        scaled = Normal(self.init_std / math.sqrt(2 * self.layers / self.ratios.layers))
        return scaled if self.init == "gpt2" else self.kernel_init(fan_in)

    def _mlp_spec(self, routed: Experts | None) -> dict[str, Any]:
        width = self.mlp_width if routed is None else routed.mlp_width or self.mlp_width
        inits = self.kernel_init(self.width), self._out_init(width)
        if routed is None:
            return mlp_spec(self.width, width, self.gated, self.mlp_bias, *inits)
        return experts_spec(routed, self.width, width, self.gated, *inits)

    def _qk_norm_spec(self) -> dict[str, Any]:
        if self.qk_norm == "none":
            return {}
        sides = {"q_norm": {"heads": self.heads}, "k_norm": {"kv_heads": self.kv_heads}}
        whole = self.qk_norm == "projection"
        return {
            name: self.norm_spec((axes if whole else {}) | {"head_dim": self.head_dim}) for name, axes in sides.items()
        }

    def _norm_names(self, layer: Layer) -> list[str]:
        names = []
        for sublayer in ("attention", "memory", "mlp") if self.memory else ("attention", "mlp"):
            entered = layer.attention_norm if sublayer == "attention" else self.block != "parallel" or sublayer != "mlp"
            if self.norm_place != "output" and entered:
                names.append(f"{sublayer}_norm")
            if self.norm_place in ("sandwich", "output"):
                names.append(f"{sublayer}_out_norm")
        return names

    def _enter(self, p, sublayer, x):
        name = f"{sublayer}_norm"
        return self.normalize(p[name], x) if self.norm_place in ("pre", "sandwich") and name in p else x

    def _leave(self, p, sublayer, x, y):
        if self.norm_place in ("sandwich", "output"):
            y = self.normalize(p[f"{sublayer}_out_norm"], y)
        y = self._branch(y)
        return self.normalize(p[f"{sublayer}_norm"], x + y) if self.norm_place == "post" else x + y

    def _branch(self, y):
        multiplier = self.ratios.forward("branch")
        return y if multiplier == 1 else y * multiplier

    def _attention(self, p, x_BLD, layer, context, key, cache):
        q_BLHC = constrain(linear(p["q"], x_BLD), "batch", "length", "act_heads", None)
        k_BLKC, v_BLKC = (constrain(linear(p[n], x_BLD), "batch", "length", "act_kv_heads", None) for n in ("k", "v"))
        if self.qk_norm != "none":
            q_BLHC, k_BLKC = self.normalize(p["q_norm"], q_BLHC), self.normalize(p["k_norm"], k_BLKC)
        if self.rope_base is not None:
            table = context.tables[self.rotation(layer)]
            q_BLHC, k_BLKC = rotate(q_BLHC, table, self.rope_style), rotate(k_BLKC, table, self.rope_style)
        form = self._form(self.causal, layer.window, layer.attention_scale)
        if self.favor is not None:
            given: dict[str, Any] = {"causal": form.causal, "scale": form.scale, "documents": context.documents}
            o_BLHC, cache = favor.attend(self.favor, context.favor_1RC, q_BLHC, k_BLKC, v_BLKC, **given, cache=cache)
            return linear(p["o"], o_BLHC, contracted=2), cache
        if self.alibi:
            form = dataclasses.replace(form, scale=form.scale or self.head_dim**-0.5)
            q_BLHC, k_BLKC, v_BLKC = alibi.widened(q_BLHC, k_BLKC, v_BLKC, context.positions_BL, form.scale)
        if cache is not None:
            both = (("k", k_BLKC), ("v", v_BLKC))
            k_BLKC, v_BLKC = (caches.append(cache[n], x, context.starts_B) for n, x in both)
            cache = cache | {"k": k_BLKC, "v": v_BLKC}
        arrays = {name: getattr(context, name) for name in ("starts_B", "documents")}
        if self.relative is not None:
            o_BLHC = relative.attend(form, p["relative"], q_BLHC, k_BLKC, v_BLKC, **arrays, key=key)
            return linear(p["o"], o_BLHC, contracted=2), cache
        arrays |= {"places": context.places, "bias": context.bias}
        if self.buckets is not None:
            arrays["bias"] = bucket_bias(p["buckets"], context.bucket_rows)
        o_BLHC = attention(form, q_BLHC, k_BLKC, v_BLKC, **arrays, key=key)
        return linear(p["o"], o_BLHC[..., : self.head_dim], contracted=2), cache

    def _attend_memory(self, p, x_BLD, context, key, cache):
        kept = cache["memory"] if context.memory_BSD is None else self.remember(p, context.memory_BSD)
        q_BLHC = constrain(linear(p["q"], x_BLD), "batch", "length", "act_heads", None)
        form = self._form(False, None, None)
        o_BLHC = attention(form, q_BLHC, kept["k"], kept["v"], documents=context.memory_documents, key=key)
        return linear(p["o"], o_BLHC, contracted=2), None if cache is None else cache | {"memory": kept}

    def _form(self, causal, window, scale):
        scale = self.ratios.attention(scale or self.attention_scale, self.head_dim)
        return Form(causal, window, scale, self.attention_soft_cap, self.attention_dropout, self.attention_kernel)

    def _drop(self, x, key):
        return dropout(x, self.residual_dropout, key)
