"""Gemma 3's text model: norms on both sides of each sublayer, and two kinds of layers with a rotation each."""

from typing import Any

from lm.interop.decoders import (
    ACTIVATIONS,
    layer_tensors,
    numbers,
    outer_tensors,
    read_scaling,
    repeated,
    scaling_fields,
)
from lm.interop.fields import Fields
from lm.interop.hf import Tensor
from lm.layers.block import Layer
from lm.models.decoder import Decoder

__all__ = ["ARCHITECTURES", "MODEL", "PREFIX", "UNPREFIXED", "numbers", "read", "tensors", "write"]

MODEL, PREFIX, UNPREFIXED = Decoder, "model.", ("lm_head.weight",)
ARCHITECTURES = {"Gemma3ForCausalLM": "gemma3_text"}
_FULL, _SLIDING = "full_attention", "sliding_attention"
_NAMES = {"gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh", "relu": "relu", "silu": "silu"}


def read(fields: Fields, architecture: str) -> Decoder:
    """The model of a Gemma3TextConfig."""
    layers, width = fields["num_hidden_layers"], fields["hidden_size"]
    heads = fields["num_attention_heads"]
    fields.expect("use_bidirectional_attention", False, None)
    fields.expect("attn_logit_softcapping", None)  # transformers (5.23) reads it and applies none.
    window, period = fields.get("sliding_window", 4096), fields.first("sliding_window_pattern", default=6)
    types = fields.get("layer_types") or [_FULL if (i + 1) % period == 0 else _SLIDING for i in range(layers)]
    ropes = fields.get("rope_parameters") or {
        _FULL: {"rope_theta": fields.get("rope_theta", 1e6)} | (fields.get("rope_scaling") or {}),
        _SLIDING: {"rope_theta": fields.get("rope_local_base_freq", 1e4)},
    }
    for name in ("rope_theta", "rope_scaling", "rope_local_base_freq"):
        fields.get(name)
    longest = fields.get("max_position_embeddings", 131_072)
    rotations = {kind: read_scaling(dict(ropes[kind]), longest) for kind in sorted(set(types))}
    stack = tuple(Layer(window if kind == _SLIDING else None, rotations[kind][0], rotations[kind][1]) for kind in types)
    return Decoder(
        layers=layers,
        width=width,
        heads=heads,
        kv_heads=fields["num_key_value_heads"],
        head_dim=fields.get("head_dim", 256),
        mlp_width=fields["intermediate_size"],
        pattern=repeated(stack),
        vocab_size=fields["vocab_size"],
        positions="rotary",
        norm="rmsnorm",
        norm_bias=False,
        norm_eps=fields.get("rms_norm_eps", 1e-6),
        norm_offset=1.0,
        norm_place="sandwich",
        qk_norm="head",
        activation=fields.choice("hidden_activation", ACTIVATIONS, "gelu_pytorch_tanh"),
        gated=True,
        attention_bias=fields.get("attention_bias", False),
        mlp_bias=False,
        attention_scale=fields.get("query_pre_attn_scalar", 256) ** -0.5,
        logit_soft_cap=fields.get("final_logit_softcapping"),
        tied=fields.get("tie_word_embeddings", True),
        embed_scale=width**0.5,
        attention_dropout=fields.get("attention_dropout", 0.0),
        init="normal",
    )


def write(model: Decoder, architecture: str) -> dict[str, Any]:
    """The settings of a Gemma3TextConfig."""
    block, layers = model.stack.block, model.stack.layers
    types = [_FULL if layer.window is None else _SLIDING for layer in layers]
    ropes = {
        kind: {"rope_theta": layer.rope_base or model.rope_base} | scaling_fields(layer.rope_scaling)
        for kind, layer in zip(types, layers, strict=True)
    }
    full = ropes.get(_FULL, {"rope_theta": 1e6, "rope_type": "default"})
    sliding = ropes.get(_SLIDING, {"rope_theta": 1e4, "rope_type": "default"})
    scaling = {name: value for name, value in full.items() if name != "rope_theta"}
    return {
        "num_hidden_layers": model.layers,
        "hidden_size": model.width,
        "num_attention_heads": model.heads,
        "num_key_value_heads": block.kv_heads,
        "head_dim": block.head_dim,
        "intermediate_size": block.mlp_width,
        "vocab_size": model.vocab_size,
        "rms_norm_eps": model.norm_eps,
        "hidden_activation": _NAMES.get(model.activation, model.activation),
        "attention_bias": model.attention_bias,
        "query_pre_attn_scalar": _square_of_inverse(model.attention_scale or block.head_dim**-0.5),
        "attn_logit_softcapping": None,
        "final_logit_softcapping": model.logit_soft_cap,
        "tie_word_embeddings": model.tied,
        "attention_dropout": model.attention_dropout,
        "sliding_window": next((layer.window for layer in layers if layer.window), 4096),
        "layer_types": types,
        "rope_parameters": {_FULL: full, _SLIDING: sliding},
        "rope_theta": full["rope_theta"],
        "rope_local_base_freq": sliding["rope_theta"],
        "rope_scaling": None if scaling == {"rope_type": "default"} else scaling,
    }


def tensors(model: Decoder, architecture: str) -> list[Tensor]:
    """Every tensor of the file."""
    parts: list[tuple[str, tuple[str, ...], dict[str, Any]]] = [
        *((f"self_attn.{name}_proj", (f"attention/{name}",), {}) for name in "qkvo"),
        *((f"self_attn.{name}_norm", (f"attention/{name}_norm",), {}) for name in "qk"),
        *((f"mlp.{name}_proj", (f"mlp/{name}",), {}) for name in ("gate", "up", "down")),
        ("input_layernorm", ("attention_norm",), {}),
        ("post_attention_layernorm", ("attention_out_norm",), {}),
        ("pre_feedforward_layernorm", ("mlp_norm",), {}),
        ("post_feedforward_layernorm", ("mlp_out_norm",), {}),
    ]
    outer = {
        "embed/table": "model.embed_tokens.weight",
        "final_norm/scale": "model.norm.weight",
        "head/table": "lm_head.weight",
    }
    return outer_tensors(model, outer) + layer_tensors(model, "model.layers.{}.", parts)


def _square_of_inverse(scale: float) -> float:
    """The whole number whose inverse root is `scale`, where there is one."""
    square = scale**-2
    return round(square) if round(square) ** -0.5 == scale else square
