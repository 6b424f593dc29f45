"""GPT-1: norms after the residual sums, none at the end, and the tanh form of GELU under the name "gelu"."""

from typing import Any

from lm.interop.decoders import layer_tensors, numbers, outer_tensors
from lm.interop.fields import Fields
from lm.interop.hf import Tensor
from lm.models.decoder import Decoder

__all__ = ["ARCHITECTURES", "MODEL", "PREFIX", "UNPREFIXED", "numbers", "read", "tensors", "write"]

MODEL, PREFIX, UNPREFIXED = Decoder, "transformer.", ("lm_head.weight",)
ARCHITECTURES = {"OpenAIGPTLMHeadModel": "openai-gpt"}
_ACTIVATIONS = {"gelu": "gelu_tanh", "relu": "relu", "silu": "silu", "swish": "silu"}
_NAMES = {"gelu_tanh": "gelu", "relu": "relu", "silu": "silu"}
_CONV = {"conv1d": True}


def read(fields: Fields, architecture: str) -> Decoder:
    """The model of an OpenAIGPTConfig."""
    fields.expect("n_special", 0)
    return Decoder(
        layers=fields["n_layer"],
        width=fields["n_embd"],
        heads=fields["n_head"],
        vocab_size=fields["vocab_size"],
        max_len=fields["n_positions"],
        norm_eps=fields.get("layer_norm_epsilon", 1e-5),
        norm_place="post",
        activation=fields.choice("afn", _ACTIVATIONS, "gelu"),
        tied=fields.get("tie_word_embeddings", True),
        embed_dropout=fields.get("embd_pdrop", 0.1),
        residual_dropout=fields.get("resid_pdrop", 0.1),
        attention_dropout=fields.get("attn_pdrop", 0.1),
        init="normal",
    )


def write(model: Decoder, architecture: str) -> dict[str, Any]:
    """The settings of an OpenAIGPTConfig."""
    return {
        "n_layer": model.layers,
        "n_embd": model.width,
        "n_head": model.heads,
        "vocab_size": model.vocab_size,
        "n_positions": model.max_len,
        "layer_norm_epsilon": model.norm_eps,
        "afn": _NAMES.get(model.activation, model.activation),
        "tie_word_embeddings": model.tied,
        "embd_pdrop": model.embed_dropout,
        "resid_pdrop": model.residual_dropout,
        "attn_pdrop": model.attention_dropout,
    }


def tensors(model: Decoder, architecture: str) -> list[Tensor]:
    """Every tensor of the file."""
    parts: list[tuple[str, tuple[str, ...], dict[str, Any]]] = [
        ("attn.c_attn", ("attention/q", "attention/k", "attention/v"), _CONV),
        ("attn.c_proj", ("attention/o",), _CONV),
        ("ln_1", ("attention_norm",), {}),
        ("mlp.c_fc", ("mlp/up",), _CONV),
        ("mlp.c_proj", ("mlp/down",), _CONV),
        ("ln_2", ("mlp_norm",), {}),
    ]
    outer = {
        "embed/table": "transformer.tokens_embed.weight",
        "positions/table": "transformer.positions_embed.weight",
        "head/table": "lm_head.weight",
    }
    return outer_tensors(model, outer) + layer_tensors(model, "transformer.h.{}.", parts)
