"""GPT-2: fused queries, keys and values, and kernels that lie as [inputs, outputs]."""

from typing import Any

from lm.interop.decoders import ACTIVATION_NAMES, ACTIVATIONS, layer_tensors, numbers, outer_tensors
from lm.interop.fields import Fields
from lm.interop.hf import Tensor
from lm.layers.block import Layer
from lm.models.decoder import Decoder

__all__ = ["ARCHITECTURES", "MODEL", "PREFIX", "UNPREFIXED", "numbers", "read", "tensors", "write"]

MODEL, PREFIX, UNPREFIXED = Decoder, "transformer.", ("lm_head.weight",)
ARCHITECTURES = {"GPT2LMHeadModel": "gpt2"}
_QKV = ("attention/q", "attention/k", "attention/v")
_CONV = {"conv1d": True}


def read(fields: Fields, architecture: str) -> Decoder:
    """The model of a GPT2Config."""
    layers, heads, width = fields["n_layer"], fields["n_head"], fields["n_embd"]
    scale = (width // heads) ** -0.5 if fields.get("scale_attn_weights", True) else 1.0
    pattern: tuple[Layer, ...] = (Layer(),)
    if fields.get("scale_attn_by_inverse_layer_idx", False):
        pattern = tuple(Layer(attention_scale=scale / (i + 1)) for i in range(layers))
    elif not fields.get("scale_attn_weights", True):
        pattern = (Layer(attention_scale=1.0),)
    return Decoder(
        layers=layers,
        width=width,
        heads=heads,
        mlp_width=fields.get("n_inner"),
        pattern=pattern,
        vocab_size=fields["vocab_size"],
        max_len=fields["n_positions"],
        norm_eps=fields.get("layer_norm_epsilon", 1e-5),
        activation=fields.choice("activation_function", ACTIVATIONS, "gelu_new"),
        tied=fields.get("tie_word_embeddings", True),
        embed_dropout=fields.get("embd_pdrop", 0.1),
        residual_dropout=fields.get("resid_pdrop", 0.1),
        attention_dropout=fields.get("attn_pdrop", 0.1),
    )


def write(model: Decoder, architecture: str) -> dict[str, Any]:
    """The settings of a GPT2Config."""
    block, scales = model.stack.block, [layer.attention_scale for layer in model.stack.layers]
    own = block.head_dim**-0.5
    inverse = scales == [own / (i + 1) for i in range(model.layers)]
    return {
        "n_layer": model.layers,
        "n_head": model.heads,
        "n_embd": model.width,
        "n_inner": block.mlp_width,
        "vocab_size": model.vocab_size,
        "n_positions": model.max_len,
        "layer_norm_epsilon": model.norm_eps,
        "activation_function": ACTIVATION_NAMES[model.activation],
        "scale_attn_weights": scales != [1.0] * model.layers,
        "scale_attn_by_inverse_layer_idx": inverse,
        "tie_word_embeddings": model.tied,
        "embd_pdrop": model.embed_dropout,
        "resid_pdrop": model.residual_dropout,
        "attn_pdrop": model.attention_dropout,
    }


def tensors(model: Decoder, architecture: str) -> list[Tensor]:
    """Every tensor of the file."""
    parts: list[tuple[str, tuple[str, ...], dict[str, Any]]] = [
        ("ln_1", ("attention_norm",), {}),
        ("attn.c_attn", _QKV, _CONV),
        ("attn.c_proj", ("attention/o",), _CONV),
        ("ln_2", ("mlp_norm",), {}),
        ("mlp.c_fc", ("mlp/up",), _CONV),
        ("mlp.c_proj", ("mlp/down",), _CONV),
    ]
    outer = {
        "embed/table": "transformer.wte.weight",
        "positions/table": "transformer.wpe.weight",
        "final_norm/scale": "transformer.ln_f.weight",
        "final_norm/bias": "transformer.ln_f.bias",
        "head/table": "lm_head.weight",
    }
    return outer_tensors(model, outer) + layer_tensors(model, "transformer.h.{}.", parts)
