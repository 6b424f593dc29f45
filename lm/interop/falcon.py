"""Falcon's two newer layouts: one head of keys and values on one norm (7B), or several heads on two norms (40B)."""

from typing import Any

from lm.interop.decoders import (
    ACTIVATION_NAMES,
    ACTIVATIONS,
    layer_tensors,
    numbers,
    outer_tensors,
    read_rotation,
    write_rotation,
)
from lm.interop.fields import Fields
from lm.interop.hf import Tensor
from lm.models.decoder import Decoder

__all__ = ["ARCHITECTURES", "MODEL", "PREFIX", "UNPREFIXED", "numbers", "read", "tensors", "write"]

MODEL, PREFIX, UNPREFIXED = Decoder, "transformer.", ("lm_head.weight",)
ARCHITECTURES = {"FalconForCausalLM": "falcon"}


def read(fields: Fields, architecture: str) -> Decoder:
    """The model of a FalconConfig; raises UsageError for ALiBi and for the layout of the first models."""
    width, heads = fields["hidden_size"], fields["num_attention_heads"]
    fields.expect("alibi", False)
    fields.expect("apply_residual_connection_post_layernorm", False)
    fields.expect("parallel_attn", True)
    new = fields.get("new_decoder_architecture", False)
    kv_heads = fields.get("num_kv_heads") or heads
    if not new:
        fields.expect("multi_query", True)
        kv_heads = 1
    fields.get("multi_query")
    norms = fields.get("num_ln_in_parallel_attn") or (2 if new else 1)
    bias = fields.get("bias", False)
    dropout = fields.get("hidden_dropout", 0.0)
    fields.get("ff_factor")  # Read by nothing.
    return Decoder(
        layers=fields["num_hidden_layers"],
        width=width,
        heads=heads,
        kv_heads=kv_heads,
        mlp_width=fields.get("ffn_hidden_size"),
        vocab_size=fields["vocab_size"],
        positions="rotary",
        norm_eps=fields.get("layer_norm_epsilon", 1e-5),
        block="parallel_two_norms" if norms == 2 and new else "parallel",
        activation=fields.choice("activation", ACTIVATIONS, "gelu"),
        attention_bias=bias,
        mlp_bias=bias,
        tied=fields.get("tie_word_embeddings", True),
        residual_dropout=dropout,
        attention_dropout=fields.get("attention_dropout", 0.0),
        **read_rotation(fields),
    )


def write(model: Decoder, architecture: str) -> dict[str, Any]:
    """The settings of a FalconConfig."""
    block = model.stack.block
    two_norms = block.block == "parallel_two_norms"
    new = two_norms or block.kv_heads > 1
    return {
        "num_hidden_layers": model.layers,
        "hidden_size": model.width,
        "num_attention_heads": model.heads,
        "num_kv_heads": block.kv_heads,
        "ffn_hidden_size": block.mlp_width,
        "vocab_size": model.vocab_size,
        "layer_norm_epsilon": model.norm_eps,
        "new_decoder_architecture": new,
        "num_ln_in_parallel_attn": 2 if two_norms else 1,
        "multi_query": True,
        "parallel_attn": True,
        "alibi": False,
        "bias": model.mlp_bias,
        "activation": ACTIVATION_NAMES[model.activation],
        "tie_word_embeddings": model.tied,
        "hidden_dropout": model.residual_dropout,
        "attention_dropout": model.attention_dropout,
        **write_rotation(model),
    }


def tensors(model: Decoder, architecture: str) -> list[Tensor]:
    """Every tensor of the file: queries, keys and values follow one another for each head of keys."""
    block = model.stack.block
    two_norms = block.block == "parallel_two_norms"
    parts: list[tuple[str, tuple[str, ...], dict[str, Any]]] = [
        ("ln_attn" if two_norms else "input_layernorm", ("attention_norm",), {}),
        ("ln_mlp", ("mlp_norm",), {}),
        (
            "self_attention.query_key_value",
            ("attention/q", "attention/k", "attention/v"),
            {"groups": block.kv_heads},
        ),
        ("self_attention.dense", ("attention/o",), {}),
        ("mlp.dense_h_to_4h", ("mlp/up",), {}),
        ("mlp.dense_4h_to_h", ("mlp/down",), {}),
    ]
    outer = {
        "embed/table": "transformer.word_embeddings.weight",
        "final_norm/scale": "transformer.ln_f.weight",
        "final_norm/bias": "transformer.ln_f.bias",
        "head/table": "lm_head.weight",
    }
    return outer_tensors(model, outer) + layer_tensors(model, "transformer.h.{}.", parts)
