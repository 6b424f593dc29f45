"""ModernBERT: norms before the sublayers, windows with a rotation of their own, fused projections."""

import dataclasses
from typing import Any

from lm.core.errors import UsageError
from lm.interop.bert import numbers
from lm.interop.decoders import (
    ACTIVATION_NAMES,
    ACTIVATIONS,
    layer_tensors,
    longest_position,
    outer_tensors,
    read_scaling,
    repeated,
    scaling_fields,
)
from lm.interop.fields import Fields
from lm.interop.hf import Tensor
from lm.layers.block import Layer
from lm.models.encoder import Encoder

__all__ = ["ARCHITECTURES", "MODEL", "PREFIX", "UNPREFIXED", "numbers", "read", "tensors", "write"]

MODEL, PREFIX, UNPREFIXED = Encoder, "", ()
UNUSED = r"decoder\.weight"
ARCHITECTURES = {"ModernBertForMaskedLM": "modernbert"}
_FULL, _SLIDING = "full_attention", "sliding_attention"
_BASES = {_FULL: 160_000.0, _SLIDING: 10_000.0}
_OLD_BASES = {_FULL: "global_rope_theta", _SLIDING: "local_rope_theta"}

# How it was drawn, where its scores are computed, what is of other heads, and what nothing reads.
_IGNORED = (
    *("initializer_cutoff_factor", "sparse_prediction", "sparse_pred_ignore_index", "repad_logits_with_grad"),
    *("classifier_pooling", "embedding_size", "layer_norm_eps", "position_embedding_type"),
)


def read(fields: Fields, architecture: str) -> Encoder:
    """The model of a ModernBertConfig."""
    layers, period = fields["num_hidden_layers"], fields.get("global_attn_every_n_layers", 3)
    types = fields.get("layer_types") or [_SLIDING if i % period else _FULL for i in range(layers)]
    rotations = _rotations(fields)
    half = fields.get("local_attention", 128) // 2
    stack = tuple(Layer() if kind == _FULL else Layer(half + 1, *rotations[_SLIDING]) for kind in types)
    first = dataclasses.replace(stack[0], attention_norm=False)  # Its input is normalised already.
    prefix, pattern = ((first,), repeated(stack[1:])) if layers > 1 else ((), (first,))
    fields.expect("decoder_bias", True)
    for name in _IGNORED:
        fields.get(name)
    return Encoder(
        layers=layers,
        width=fields["hidden_size"],
        heads=fields["num_attention_heads"],
        mlp_width=fields["intermediate_size"],
        prefix=prefix,
        pattern=pattern,
        vocab_size=fields["vocab_size"],
        positions="rotary",
        max_len=None,
        rope_base=rotations[_FULL][0],
        rope_scaling=rotations[_FULL][1],
        types=0,
        norm_bias=fields.get("norm_bias", False),
        norm_eps=fields.get("norm_eps", 1e-5),
        norm_place="pre",
        activation=fields.choice("hidden_activation", ACTIVATIONS, "gelu"),
        gated=True,
        attention_bias=fields.get("attention_bias", False),
        mlp_bias=fields.get("mlp_bias", False),
        head_activation=fields.choice("classifier_activation", ACTIVATIONS, "gelu"),
        head_bias=fields.get("classifier_bias", False),
        tied=fields.get("tie_word_embeddings", True),
        embed_dropout=fields.get("embedding_dropout", 0.0),
        attention_dropout=fields.get("attention_dropout", 0.0),
        mlp_dropout=fields.get("mlp_dropout", 0.0),
        init="gpt2",
    )


def write(model: Encoder, architecture: str) -> dict[str, Any]:
    """The settings of a ModernBertConfig, for transformers 5.x and, with bases and cadence, for 4.x."""
    layers = model.stack.layers
    types = [_FULL if layer.window is None else _SLIDING for layer in layers]
    window = next((layer for layer in layers if layer.window), Layer(65, _BASES[_SLIDING]))
    local = (window.rope_base, window.rope_scaling) if window.rope_base else (model.rope_base, model.rope_scaling)
    ropes = {_FULL: (model.rope_base, model.rope_scaling), _SLIDING: local}
    return {
        "num_hidden_layers": model.layers,
        "hidden_size": model.width,
        "num_attention_heads": model.heads,
        "intermediate_size": model.stack.block.mlp_width,
        "vocab_size": model.vocab_size,
        "layer_types": types,
        "global_attn_every_n_layers": next((i for i, kind in enumerate(types) if i and kind == _FULL), model.layers),
        "local_attention": 2 * ((window.window or 1) - 1),
        "rope_parameters": {kind: {"rope_theta": base} | scaling_fields(s) for kind, (base, s) in ropes.items()},
        "global_rope_theta": model.rope_base,
        "local_rope_theta": local[0],
        "norm_bias": model.norm_bias,
        "norm_eps": model.norm_eps,
        "hidden_activation": ACTIVATION_NAMES[model.activation],
        "attention_bias": model.attention_bias,
        "mlp_bias": model.mlp_bias,
        "classifier_activation": ACTIVATION_NAMES[model.head_activation or model.activation],
        "classifier_bias": model.head_bias,
        "tie_word_embeddings": model.tied,
        "embedding_dropout": model.embed_dropout,
        "attention_dropout": model.attention_dropout,
        "mlp_dropout": model.mlp_dropout,
        "pad_token_id": 0,
    } | longest_position(model.rope_scaling)


def tensors(model: Encoder, architecture: str) -> list[Tensor]:
    """Every tensor of the file."""
    parts: list[tuple[str, tuple[str, ...], dict[str, Any]]] = [
        ("attn_norm", ("attention_norm",), {}),
        ("attn.Wqkv", ("attention/q", "attention/k", "attention/v"), {}),
        ("attn.Wo", ("attention/o",), {}),
        ("mlp_norm", ("mlp_norm",), {}),
        ("mlp.Wi", ("mlp/gate", "mlp/up"), {}),
        ("mlp.Wo", ("mlp/down",), {}),
    ]
    norms = {"embed_norm": "model.embeddings.norm", "final_norm": "model.final_norm", "head/norm": "head.norm"}
    outer = {"embed/table": "model.embeddings.tok_embeddings.weight", "head/dense/kernel": "head.dense.weight"}
    outer |= {f"{ours}/scale": f"{name}.weight" for ours, name in norms.items()}
    outer |= {f"{ours}/bias": f"{name}.bias" for ours, name in norms.items()}
    outer |= {"head/dense/bias": "head.dense.bias", "head/bias": "decoder.bias", "head/table": "decoder.weight"}
    return outer_tensors(model, outer) + layer_tensors(model, "model.layers.{}.", parts)


def _rotations(fields: Fields) -> dict[str, tuple[float, Any]]:
    """{type of layer: (base, scaling)}, from either spelling."""
    ropes, shared = fields.get("rope_parameters") or {}, fields.get("rope_scaling") or {}
    longest = fields.get("max_position_embeddings", 8192)
    for name in _OLD_BASES.values():
        if fields.get(name, 0) is None:
            raise UsageError(f"{name} is null, which versions of transformers read differently: write the number")
    return {
        kind: read_scaling(
            {"rope_theta": fields.first(_OLD_BASES[kind], default=base)} | shared | (ropes.get(kind) or {}), longest
        )
        for kind, base in _BASES.items()
    }
