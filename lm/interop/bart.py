"""BART, Marian and FSMT: post-norm layers under the same names, positions and tables under different ones."""

from typing import Any

import jax.numpy as jnp
import numpy as np

from lm.interop.decoders import ACTIVATION_NAMES, ACTIVATIONS
from lm.interop.encdecs import numbers, side_tensors
from lm.interop.fields import Fields
from lm.interop.hf import Tensor
from lm.layers.positions import sinusoids
from lm.models.encdec import EncDec

__all__ = [
    "ARCHITECTURES",
    "MODEL",
    "PREFIX",
    "UNPREFIXED",
    "UNUSED",
    "ZERO",
    "aliases",
    "constants",
    "numbers",
    "read",
    "tensors",
    "write",
]

MODEL, PREFIX, UNPREFIXED = EncDec, "model.", ("lm_head.weight", "final_logits_bias")
ARCHITECTURES = {
    "BartForConditionalGeneration": "bart",
    "MarianMTModel": "marian",
    "FSMTForConditionalGeneration": "fsmt",
}
ZERO = ("final_logits_bias",)
# Sinusoids, which are computed, and fairseq's mark of a version.
UNUSED = r"model\.(en|de)coder\.(embed_positions\.weight|version)"
_LAYER = {
    "attention/q": "self_attn.q_proj",
    "attention/k": "self_attn.k_proj",
    "attention/v": "self_attn.v_proj",
    "attention/o": "self_attn.out_proj",
    "attention_norm": "self_attn_layer_norm",
    "memory/q": "encoder_attn.q_proj",
    "memory/k": "encoder_attn.k_proj",
    "memory/v": "encoder_attn.v_proj",
    "memory/o": "encoder_attn.out_proj",
    "memory_norm": "encoder_attn_layer_norm",
    "mlp/up": "fc1",
    "mlp/down": "fc2",
    "mlp_norm": "final_layer_norm",
}
_FSMT_POSITIONS = 1024  # How many its file holds; it makes more where they are needed.
_SHARED, _SOURCE, _TARGET = (
    f"model.{name}.weight" for name in ("shared", "encoder.embed_tokens", "decoder.embed_tokens")
)
# What old configs say of all checkpoints of these classes, and what changes no number.
_ALWAYS = {
    "normalize_before": False,
    "add_final_layer_norm": False,
    "add_bias_logits": False,
    "do_blenderbot_90_layernorm": False,
    "encoder_layerdrop": 0.0,
    "decoder_layerdrop": 0.0,
}
_IGNORED = (
    *("extra_pos_embeddings", "classif_dropout", "init_std", "langs", "decoder"),
    "force_bos_token_to_be_generated",
)


def read(fields: Fields, architecture: str) -> EncDec:
    """The model of the class's config; `start_id` is where transformers' generate begins."""
    kind, width = ARCHITECTURES[architecture], fields["d_model"]
    fixed = _ALWAYS | {"normalize_embedding": kind == "bart", "static_position_embeddings": kind != "bart"}
    for name, value in fixed.items():
        fields.expect(name, value)
    for name in _IGNORED:
        fields.get(name)
    fields.expect("num_hidden_layers", fields["encoder_layers"])
    dropout = fields.get("dropout", 0.1)
    pad_id = fields.get("pad_token_id", 1)
    own: dict[str, Any] = {"sinusoid_layout": "halves"}
    if kind == "bart":
        longest = fields["max_position_embeddings"]
        own = {"positions": "learned", "position_offset": 2, "max_len": longest, "embed_norm": True}
    elif kind == "fsmt":
        own = {"sinusoid_layout": "tensor2tensor", "position_offset": pad_id + 1}
    return EncDec(
        layers=fields["encoder_layers"],
        decoder_layers=fields["decoder_layers"],
        width=width,
        heads=fields["encoder_attention_heads"],
        decoder_heads=fields["decoder_attention_heads"],
        mlp_width=fields["encoder_ffn_dim"],
        decoder_mlp_width=fields["decoder_ffn_dim"],
        start_id=fields.get("decoder_start_token_id", pad_id if kind == "marian" else 2),
        activation=fields.choice("activation_function", ACTIVATIONS, "relu" if kind == "fsmt" else "gelu"),
        embed_scale=width**0.5 if fields.get("scale_embedding", kind == "fsmt") else 1.0,
        head_bias=kind != "fsmt",
        embed_dropout=dropout,
        residual_dropout=dropout,
        attention_dropout=fields.get("attention_dropout", 0.0),
        mlp_dropout=fields.get("activation_dropout", 0.0),
        **_read_vocabularies(fields, kind),
        **own,
    )


def write(model: EncDec, architecture: str) -> dict[str, Any]:
    """The settings of the class's config."""
    kind, encoder, decoder = ARCHITECTURES[architecture], model.encoder_stack.block, model.decoder_stack.block
    config: dict[str, Any] = {
        "d_model": model.width,
        "encoder_layers": model.layers,
        "decoder_layers": decoder.layers,
        "encoder_attention_heads": model.heads,
        "decoder_attention_heads": decoder.heads,
        "encoder_ffn_dim": encoder.mlp_width,
        "decoder_ffn_dim": decoder.mlp_width,
        "activation_function": ACTIVATION_NAMES[model.activation],
        "scale_embedding": model.embed_scale != 1.0,
        "decoder_start_token_id": model.start_id,
        "tie_word_embeddings": model.tied,
        "dropout": model.residual_dropout,
        "attention_dropout": model.attention_dropout,
        "activation_dropout": model.mlp_dropout,
        "is_encoder_decoder": True,
    }
    source = model.source_vocab_size or model.vocab_size
    match kind:
        case "bart":
            return config | {"vocab_size": model.vocab_size, "max_position_embeddings": model.max_len}
        case "marian":
            split = model.source_vocab_size is not None
            sizes = {"vocab_size": source, "decoder_vocab_size": model.vocab_size}
            # Marian begins with its padding, and the class wants that inside the vocabulary.
            return config | sizes | {"share_encoder_decoder_embeddings": not split, "pad_token_id": model.start_id}
        case _:
            sizes = {"src_vocab_size": source, "tgt_vocab_size": model.vocab_size}
            positions = {"pad_token_id": model.position_offset - 1, "max_position_embeddings": _FSMT_POSITIONS}
            return config | sizes | positions


def aliases(model: EncDec, architecture: str) -> dict[str, str]:
    """{further name of a tensor: its own} in the files of the class."""
    if model.source_vocab_size is not None:
        return {}
    table = _table(model, architecture)
    return {name: table for name in (_SHARED, _SOURCE, _TARGET) if name != table}


def tensors(model: EncDec, architecture: str) -> list[Tensor]:
    """Every tensor of the file."""
    head = "model.decoder.output_projection" if architecture.startswith("FSMT") else "lm_head"
    table = _table(model, architecture)
    # transformers 5.x ties the tables of the two sides only where it ties the head: untied, each name needs a copy.
    copied = not model.tied and table == _SHARED
    found = [Tensor(name, (("embed/table", None),)) for name in ((_SHARED, _SOURCE, _TARGET) if copied else (table,))]
    if model.source_vocab_size is not None:
        found.append(Tensor(_SOURCE, (("source_embed/table", None),)))
    if not model.tied:
        found.append(Tensor(f"{head}.weight", (("head/table", None),)))
    if model.head_bias:
        found.append(Tensor("final_logits_bias", (("head/bias", None),), shape=(1, model.vocab_size or 0)))
    for side in ("encoder", "decoder"):
        at = f"model.{side}."
        outer = {"positions": f"{at}embed_positions", "embed_norm": f"{at}layernorm_embedding"}
        found += side_tensors(model, side, at + "layers.{}.", _LAYER, outer)
    return found


def constants(model: EncDec, architecture: str) -> dict[str, np.ndarray]:
    """FSMT's sinusoids, which that class alone wants to find in its file: zero at the padding."""
    if ARCHITECTURES[architecture] != "fsmt":
        return {}
    rows = _FSMT_POSITIONS + model.position_offset
    table = np.array(sinusoids(jnp.arange(rows), model.width, model.sinusoid_layout))
    table[model.position_offset - 1] = 0
    return {f"model.{side}.embed_positions.weight": table for side in ("encoder", "decoder")}


def _table(model: EncDec, architecture: str) -> str:
    """The name of the decoder's table, which may be the encoder's too."""
    apart = model.source_vocab_size is not None or architecture.startswith("FSMT")
    return _TARGET if apart else _SHARED


def _read_vocabularies(fields: Fields, kind: str) -> dict[str, Any]:
    """Our vocab_size, source_vocab_size and tied."""
    tied = fields.get("tie_word_embeddings", kind != "fsmt")
    if kind == "fsmt":
        # Tied, all three tables are one.
        source, target = fields["src_vocab_size"], fields["tgt_vocab_size"]
        fields.expect("vocab_size", target)
        if tied:
            fields.expect("src_vocab_size", target)
        shared = tied
    else:
        source = fields["vocab_size"]
        shared = fields.get("share_encoder_decoder_embeddings", True) if kind == "marian" else True
        target = source if kind == "bart" else fields.first("decoder_vocab_size", default=source)
        if shared:
            target = source
    return {"vocab_size": target, "source_vocab_size": None if shared else source, "tied": tied}
