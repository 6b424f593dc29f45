"""GPT-NeoX: attention and feed-forward layer side by side on a norm each, and a rotation of part of each head."""

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

MODEL, PREFIX, UNPREFIXED = Decoder, "gpt_neox.", ("embed_out.weight",)
ARCHITECTURES = {"GPTNeoXForCausalLM": "gpt_neox"}


def read(fields: Fields, architecture: str) -> Decoder:
    """The model of a GPTNeoXConfig."""
    width, heads = fields["hidden_size"], fields["num_attention_heads"]
    dropout = fields.get("hidden_dropout", 0.0)
    return Decoder(
        layers=fields["num_hidden_layers"],
        width=width,
        heads=heads,
        mlp_width=fields["intermediate_size"],
        vocab_size=fields["vocab_size"],
        positions="rotary",
        norm_eps=fields.get("layer_norm_eps", 1e-5),
        block="parallel_two_norms" if fields.get("use_parallel_residual", True) else "serial",
        activation=fields.choice("hidden_act", ACTIVATIONS, "gelu"),
        attention_bias=fields.get("attention_bias", True),
        tied=fields.get("tie_word_embeddings", False),
        embed_dropout=dropout,
        residual_dropout=dropout,
        attention_dropout=fields.get("attention_dropout", 0.0),
        **read_rotation(fields, partial=True),
    )


def write(model: Decoder, architecture: str) -> dict[str, Any]:
    """The settings of a GPTNeoXConfig."""
    return {
        "num_hidden_layers": model.layers,
        "hidden_size": model.width,
        "num_attention_heads": model.heads,
        "intermediate_size": model.stack.block.mlp_width,
        "vocab_size": model.vocab_size,
        "layer_norm_eps": model.norm_eps,
        "use_parallel_residual": model.block != "serial",
        "hidden_act": ACTIVATION_NAMES[model.activation],
        "attention_bias": model.attention_bias,
        "tie_word_embeddings": model.tied,
        "hidden_dropout": model.residual_dropout,
        "attention_dropout": model.attention_dropout,
        "rotary_pct": model.rope_fraction,
        "rotary_emb_base": model.rope_base,
        **write_rotation(model),
    }


def tensors(model: Decoder, architecture: str) -> list[Tensor]:
    """Every tensor of the file: of each head its queries, keys and values follow one another."""
    parts: list[tuple[str, tuple[str, ...], dict[str, Any]]] = [
        ("input_layernorm", ("attention_norm",), {}),
        ("post_attention_layernorm", ("mlp_norm",), {}),
        ("attention.query_key_value", ("attention/q", "attention/k", "attention/v"), {"groups": model.heads}),
        ("attention.dense", ("attention/o",), {}),
        ("mlp.dense_h_to_4h", ("mlp/up",), {}),
        ("mlp.dense_4h_to_h", ("mlp/down",), {}),
    ]
    outer = {
        "embed/table": "gpt_neox.embed_in.weight",
        "final_norm/scale": "gpt_neox.final_layer_norm.weight",
        "final_norm/bias": "gpt_neox.final_layer_norm.bias",
        "head/table": "embed_out.weight",
    }
    return outer_tensors(model, outer) + layer_tensors(model, "gpt_neox.layers.{}.", parts)
