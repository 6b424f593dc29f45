"""Attention: the spec of its projections, what it computes, and which kernel computes it."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from lm.core.errors import UsageError, check_choice
from lm.layers import attention_context, attention_cudnn, attention_splash
from lm.layers.attention_blocks import attend_in_blocks
from lm.layers.linear import linear_spec
from lm.parallel.mesh import platform
from lm.parallel.rules import is_sharded

KERNELS = ("auto", "blocks", "splash", "cudnn")
# The platforms that have a kernel of their own: why it refuses a call (None: it does not), and the call.
_OWN = {
    "tpu": ("splash", attention_splash.refusal, attention_splash.attend),
    "gpu": ("cudnn", attention_cudnn.refusal, attention_cudnn.attend),
}


def attention_spec(
    width: int, heads: int, kv_heads: int, head_dim: int, bias: bool, init: Callable, out_init: Callable
) -> dict[str, Any]:
    """{"q": D -> [H, C], "k", "v": D -> [K, C], "o": [H, C] -> D}; `out_init` draws the way back."""
    queries, keys = {"heads": heads, "head_dim": head_dim}, {"kv_heads": kv_heads, "head_dim": head_dim}
    return {
        "q": linear_spec({"embed": width}, queries, init, bias),
        "k": linear_spec({"embed": width}, keys, init, bias),
        "v": linear_spec({"embed": width}, keys, init, bias),
        "o": linear_spec(queries, {"embed": width}, out_init, bias),
    }


@dataclasses.dataclass(frozen=True)
class Form:
    """What attention computes besides the products, and by which kernel: all static.

    `kernel`: "blocks" runs anywhere and takes every mask; "splash" is for TPUs, "cudnn" for GPUs; "auto" is that of
    the platform that the program is compiled for where it takes the call, else blocks.
    """

    causal: bool = True
    window: int | None = None
    scale: float | None = None
    soft_cap: float | None = None
    dropout: float = 0.0
    kernel: str = "auto"

    def __post_init__(self):
        check_choice("attention_kernel", self.kernel, KERNELS)


def attention(
    form: Form,
    q_BLHC: jax.Array,
    k_BSKC: jax.Array,
    v_BSKC: jax.Array,
    *,
    starts_B: jax.Array | None = None,
    documents: tuple[jax.Array, jax.Array] | None = None,
    places: tuple[jax.Array, jax.Array] | None = None,
    bias: jax.Array | None = None,
    key: jax.Array | None = None,
) -> jax.Array:
    """o_BLHC: softmax(scale * q k' + bias + mask) v with softmax in float32; query head h reads key head h // G.

    `starts_B` is the place among the keys of each row's first query (0 without it); `documents`, (of queries
    [B, L], of keys [B, S]), keeps attention inside equal numbers; `places`, of the same shapes, are what "causal"
    and "window" compare instead of indices. `bias` is [B or 1, H or 1, L, S], added after the soft-cap. `scale` is
    C^-0.5 unless given; `key` turns dropout of the weights on. Vaswani et al. 2017 (1706.03762); grouped heads:
    Ainslie et al. 2023 (2305.13245). Raises UsageError where the kernel that the form names cannot do this.
    """
    if places is not None and starts_B is not None:
        raise ValueError("places already say where each query stands: leave starts_B out")
    form = dataclasses.replace(form, scale=q_BLHC.shape[-1] ** -0.5 if form.scale is None else form.scale)
    given: dict[str, Any] = {"starts_B": starts_B, "documents": documents, "places": places, "bias": bias}
    given["key"] = key if form.dropout else None
    given = {name: value for name, value in given.items() if value is not None}
    name, refusal, attend = _OWN.get(platform(), ("blocks", None, None))
    reason = "" if refusal is None else refusal(form, q_BLHC, k_BSKC, frozenset(given))
    if form.kernel not in ("auto", "blocks") and (form.kernel != name or reason):
        why = reason or f"this program is compiled for {platform()}"
        raise UsageError(f"attention_kernel={form.kernel!r} cannot: {why}; set it to 'auto' or 'blocks'")
    if form.kernel == "blocks" or attend is None or reason:
        # Of a cache each row's queries stand elsewhere: that is left to the partitioner.
        sharded = is_sharded("length") and starts_B is None
        return (attention_context.attend if sharded else attend_in_blocks)(form, q_BLHC, k_BSKC, v_BSKC, **given)
    return attend(form, q_BLHC, k_BSKC, v_BSKC, given.get("documents"))
