"""XLNet: projections with an axis of heads, and names of its own for every bias."""

from typing import Any

from lm.interop.decoders import ACTIVATION_NAMES, ACTIVATIONS
from lm.interop.fields import Fields
from lm.interop.hf import Tensor
from lm.models.xlnet import XLNet

__all__ = ["ARCHITECTURES", "MODEL", "PREFIX", "UNPREFIXED", "numbers", "read", "tensors", "write"]

MODEL, PREFIX, UNPREFIXED = XLNet, "transformer.", ("lm_loss.weight", "lm_loss.bias")
ARCHITECTURES = {"XLNetLMHeadModel": "xlnet"}
_VECTORS = {
    "rel_attn.r_w_bias": "attention/content_bias",
    "rel_attn.r_r_bias": "attention/position_bias",
    "rel_attn.r_s_bias": "attention/segment_bias",
}
_PLAIN = {
    "rel_attn.layer_norm.weight": "attention_norm/scale",
    "rel_attn.layer_norm.bias": "attention_norm/bias",
    "ff.layer_norm.weight": "mlp_norm/scale",
    "ff.layer_norm.bias": "mlp_norm/bias",
    "ff.layer_1.weight": "mlp/up/kernel",
    "ff.layer_1.bias": "mlp/up/bias",
    "ff.layer_2.weight": "mlp/down/kernel",
    "ff.layer_2.bias": "mlp/down/bias",
}


def read(fields: Fields, architecture: str) -> XLNet:
    """The model of an XLNetConfig."""
    width, heads = fields["d_model"], fields["n_head"]
    fields.expect("d_head", width // heads, None)
    fields.expect("untie_r", True)
    for name in ("use_mems_eval", "use_mems_train", "start_n_top", "end_n_top"):
        fields.get(name)  # What is returned, and how answers are searched for.
    clamp = fields.get("clamp_len", -1)
    causal = fields.choice("attn_type", {"bi": "bi", "uni": "uni"}, "bi") == "uni"
    return XLNet(
        layers=fields["n_layer"],
        width=width,
        heads=heads,
        mlp_width=fields["d_inner"],
        vocab_size=fields["vocab_size"],
        causal=causal,
        two_directions=fields.get("bi_data", False),
        clamp=clamp if clamp > 0 else None,
        memory=fields.get("mem_len", 512) or None,
        reuse=fields.get("reuse_len") or None,
        same_length=fields.get("same_length", False) and causal,
        activation=fields.choice("ff_activation", ACTIVATIONS, "gelu"),
        norm_eps=fields.get("layer_norm_eps", 1e-12),
        tied=fields.get("tie_word_embeddings", True),
        dropout=fields.get("dropout", 0.1),
    )


def write(model: XLNet, architecture: str) -> dict[str, Any]:
    """The settings of an XLNetConfig."""
    return {
        "n_layer": model.layers,
        "d_model": model.width,
        "n_head": model.heads,
        "d_head": model.head_dim,
        "d_inner": model.mlp_width or 4 * model.width,
        "vocab_size": model.vocab_size,
        "attn_type": "uni" if model.causal else "bi",
        "bi_data": model.two_directions,
        "clamp_len": model.clamp or -1,
        "mem_len": model.memory,
        "reuse_len": model.reuse,
        "same_length": model.same_length,
        "ff_activation": ACTIVATION_NAMES[model.activation],
        "layer_norm_eps": model.norm_eps,
        "tie_word_embeddings": model.tied,
        "dropout": model.dropout,
    }


def numbers(model: XLNet) -> tuple[Any, ...]:
    """What decides the numbers that the model computes."""
    own = (model.layers, model.width, model.heads, model.mlp_width or 4 * model.width, model.vocab_size, model.tied)
    memory = (model.memory, model.reuse, model.same_length)
    return (*own, *memory, model.causal, model.two_directions, model.clamp, model.activation, model.norm_eps)


def tensors(model: XLNet, architecture: str) -> list[Tensor]:
    """Every tensor of the file."""
    heads = (model.heads, model.head_dim)
    found = [
        Tensor("transformer.word_embedding.weight", (("embed/table", None),)),
        Tensor("transformer.mask_emb", (("mask/vector", None),), shape=(1, 1, model.width)),
        Tensor("lm_loss.bias", (("head/bias", None),)),
    ]
    if not model.tied:
        found.append(Tensor("lm_loss.weight", (("head/table", None),)))
    for i in range(model.layers):
        at = f"transformer.layer.{i}."
        for name in "qkvor":
            leaf = ((f"layers/attention/{name}/kernel", i),)
            found.append(Tensor(f"{at}rel_attn.{name}", leaf, conv1d=name != "o", shape=(model.width, *heads)))
        found += [Tensor(at + name, ((f"layers/{leaf}", i),), shape=heads) for name, leaf in _VECTORS.items()]
        found.append(Tensor(f"{at}rel_attn.seg_embed", (("layers/attention/segments", i),), shape=(2, *heads)))
        found += [Tensor(at + name, ((f"layers/{leaf}", i),)) for name, leaf in _PLAIN.items()]
    return found
