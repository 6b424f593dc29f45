"""Llama and the decoders that took over its names: Mistral, Qwen 3, OLMo 2, and Cohere, whose block is PaLM's."""

from typing import Any

from lm.interop.decoders import (
    ACTIVATION_NAMES,
    ACTIVATIONS,
    layer_tensors,
    numbers,
    outer_tensors,
    read_rotation,
    repeated,
    write_rotation,
)
from lm.interop.fields import Fields
from lm.interop.hf import Tensor
from lm.layers.block import Layer
from lm.models.decoder import Decoder

__all__ = ["ARCHITECTURES", "MODEL", "PREFIX", "UNPREFIXED", "numbers", "read", "tensors", "write"]

MODEL, PREFIX, UNPREFIXED = Decoder, "model.", ("lm_head.weight",)
ARCHITECTURES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen3ForCausalLM": "qwen3",
    "Olmo2ForCausalLM": "olmo2",
    "CohereForCausalLM": "cohere",
}
_RMS = {"norm": "rmsnorm"}
_FORM: dict[str, dict[str, Any]] = {
    "LlamaForCausalLM": _RMS,
    "MistralForCausalLM": _RMS,
    "Qwen3ForCausalLM": _RMS | {"qk_norm": "head"},
    "Olmo2ForCausalLM": _RMS | {"qk_norm": "projection", "norm_place": "output"},
    "CohereForCausalLM": {"norm": "layernorm", "block": "parallel", "rope_style": "interleaved"},
}
_NORMS = {
    "LlamaForCausalLM": ("attention_norm", "mlp_norm"),
    "MistralForCausalLM": ("attention_norm", "mlp_norm"),
    "Qwen3ForCausalLM": ("attention_norm", "mlp_norm"),
    "CohereForCausalLM": ("attention_norm", "none"),
}
_FULL, _SLIDING = "full_attention", "sliding_attention"


def read(fields: Fields, architecture: str) -> Decoder:
    """The model of the class's config."""
    layers, heads, width = fields["num_hidden_layers"], fields["num_attention_heads"], fields["hidden_size"]
    head_dim = fields.get("head_dim") or width // heads
    cohere = architecture == "CohereForCausalLM"
    fields.expect("use_qk_norm", False)
    # Classes without these biases ignore the settings: they would be lost.
    if architecture == "MistralForCausalLM":
        fields.expect("attention_bias", False)
    if architecture != "LlamaForCausalLM":
        fields.expect("mlp_bias", False)
    return Decoder(
        layers=layers,
        width=width,
        heads=heads,
        kv_heads=fields.get("num_key_value_heads"),
        head_dim=head_dim,
        mlp_width=fields["intermediate_size"],
        pattern=_pattern(fields, layers, architecture),
        vocab_size=fields["vocab_size"],
        positions="rotary",
        norm_bias=False,
        norm_eps=fields.get("layer_norm_eps", 1e-5) if cohere else fields.get("rms_norm_eps", 1e-6),
        activation=fields.choice("hidden_act", ACTIVATIONS, "silu"),
        gated=True,
        attention_bias=fields.get("attention_bias", False),
        mlp_bias=fields.get("mlp_bias", False),
        tied=fields.get("tie_word_embeddings", cohere),
        logit_scale=fields.get("logit_scale", 0.0625) if cohere else 1.0,
        attention_dropout=fields.get("attention_dropout", 0.0),
        init="normal",
        **read_rotation(fields),
        **_FORM[architecture],
    )


def write(model: Decoder, architecture: str) -> dict[str, Any]:
    """The settings of the class's config."""
    block, windows = model.stack.block, [layer.window for layer in model.stack.layers]
    eps = "layer_norm_eps" if architecture == "CohereForCausalLM" else "rms_norm_eps"
    config: dict[str, Any] = {
        "num_hidden_layers": model.layers,
        "num_attention_heads": model.heads,
        "num_key_value_heads": block.kv_heads,
        "hidden_size": model.width,
        "head_dim": block.head_dim,
        "intermediate_size": block.mlp_width,
        "vocab_size": model.vocab_size,
        eps: model.norm_eps,
        "hidden_act": ACTIVATION_NAMES[model.activation],
        "attention_bias": model.attention_bias,
        "tie_word_embeddings": model.tied,
        "attention_dropout": model.attention_dropout,
    }
    if architecture == "LlamaForCausalLM":
        config["mlp_bias"] = model.mlp_bias
    if architecture == "CohereForCausalLM":
        config["logit_scale"] = model.logit_scale
    if architecture in ("MistralForCausalLM", "Qwen3ForCausalLM"):
        config["sliding_window"] = next((w for w in windows if w is not None), None)
    if architecture == "Qwen3ForCausalLM":
        config["use_sliding_window"] = any(windows)
        config["layer_types"] = [_SLIDING if w else _FULL for w in windows]
    return config | write_rotation(model)


def tensors(model: Decoder, architecture: str) -> list[Tensor]:
    """Every tensor of the file."""
    parts: list[tuple[str, tuple[str, ...], dict[str, Any]]] = [
        *((f"self_attn.{name}_proj", (f"attention/{name}",), {}) for name in "qkvo"),
        *((f"self_attn.{name}_norm", (f"attention/{name}_norm",), {}) for name in "qk"),
        *((f"mlp.{name}_proj", (f"mlp/{name}",), {}) for name in ("gate", "up", "down")),
    ]
    if architecture == "Olmo2ForCausalLM":
        parts.append(("post_attention_layernorm", ("attention_out_norm",), {}))
        parts.append(("post_feedforward_layernorm", ("mlp_out_norm",), {}))
    else:
        first, second = _NORMS[architecture]
        parts += [("input_layernorm", (first,), {}), ("post_attention_layernorm", (second,), {})]
    outer = {
        "embed/table": "model.embed_tokens.weight",
        "final_norm/scale": "model.norm.weight",
        "head/table": "lm_head.weight",
    }
    return outer_tensors(model, outer) + layer_tensors(model, "model.layers.{}.", parts)


def _pattern(fields: Fields, layers: int, architecture: str) -> tuple[Layer, ...]:
    if architecture not in ("MistralForCausalLM", "Qwen3ForCausalLM"):
        return (Layer(),)
    window, types = fields.get("sliding_window"), fields.get("layer_types")
    if architecture == "MistralForCausalLM":
        return (Layer(window=window),)
    on, first = fields.get("use_sliding_window", False), fields.get("max_window_layers", layers)
    if types is None:
        types = [_SLIDING if on and window and i >= first else _FULL for i in range(layers)]
    return repeated(tuple(Layer(window=window if kind == _SLIDING else None) for kind in types))
