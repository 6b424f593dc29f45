"""T5 1.0 and 1.1, mT5 and UMT5."""

from typing import Any

from lm.core.errors import UsageError
from lm.interop.decoders import ACTIVATION_NAMES, ACTIVATIONS
from lm.interop.encdecs import numbers, side_tensors
from lm.interop.fields import Fields
from lm.interop.hf import Tensor
from lm.layers.buckets import Buckets
from lm.models.encdec import EncDec

__all__ = ["ARCHITECTURES", "MODEL", "PREFIX", "UNPREFIXED", "UNUSED", "aliases", "numbers", "read", "tensors", "write"]

MODEL, PREFIX, UNPREFIXED = EncDec, "", ()
ARCHITECTURES = {
    "T5ForConditionalGeneration": "t5",
    "MT5ForConditionalGeneration": "mt5",
    "UMT5ForConditionalGeneration": "umt5",
}
# Old files hold a table for the attention to the memory, which no version reads.
UNUSED = r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight"
_OUTER = {"final_norm": "{}.final_layer_norm", "buckets": "{}.block.0.layer.0.SelfAttention.relative_attention_bias"}


def read(fields: Fields, architecture: str) -> EncDec:
    """The model of the class's config.

    transformers 5.x writes tie_word_embeddings=true for all; whether T5's hidden states are scaled before the head
    it then has in scale_decoder_outputs, and 4.x in tie_word_embeddings itself. mT5 and UMT5 were trained without,
    and 5.x is at fault where it scales UMT5's.
    """
    kind, width, heads = ARCHITECTURES[architecture], fields["d_model"], fields["num_heads"]
    tied = fields.get("tie_word_embeddings", True)
    scaled = fields.get("scale_decoder_outputs", tied) and kind == "t5"
    dropout = fields.get("dropout_rate", 0.1)
    for name in ("initializer_factor", "n_positions", "scalable_attention"):
        fields.get(name)  # How it was drawn, a length that nothing enforces, and a flag that nothing reads.
    activation, gated = _read_mlp(fields, "relu" if kind == "t5" else "gated-gelu")
    return EncDec(
        layers=fields["num_layers"],
        decoder_layers=fields.first("num_decoder_layers"),
        width=width,
        heads=heads,
        head_dim=fields["d_kv"],
        mlp_width=fields["d_ff"],
        vocab_size=fields["vocab_size"],
        start_id=fields.first("decoder_start_token_id", "pad_token_id", default=0),
        positions="none",
        buckets=Buckets(
            fields.get("relative_attention_num_buckets", 32),
            fields.get("relative_attention_max_distance", 128),
            each_layer=kind == "umt5",
        ),
        norm="rmsnorm",
        norm_bias=False,
        norm_eps=fields.get("layer_norm_epsilon", 1e-6),
        norm_place="pre",
        activation=activation,
        gated=gated,
        attention_bias=False,
        mlp_bias=False,
        attention_scale=1.0,
        tied=tied,
        logit_scale=width**-0.5 if scaled else 1.0,
        embed_dropout=dropout,
        residual_dropout=dropout,
        attention_dropout=dropout,
        mlp_dropout=dropout,
        init="t5",
        init_std=1.0,
    )


def write(model: EncDec, architecture: str) -> dict[str, Any]:
    """The settings of the class's config, which 4.x and 5.x read alike.

    A head of its own with scaled states, or a tied one without, exists in 5.x only.
    """
    encoder, decoder = model.encoder_stack.block, model.decoder_stack.block
    buckets = model.buckets or Buckets()  # A model without any is seen to be another when this is read again.
    activation = "gelu" if model.gated and model.activation == "gelu_tanh" else ACTIVATION_NAMES[model.activation]
    return {
        "num_layers": model.layers,
        "num_decoder_layers": decoder.layers,
        "d_model": model.width,
        "num_heads": model.heads,
        "d_kv": encoder.head_dim,
        "d_ff": encoder.mlp_width,
        "vocab_size": model.vocab_size,
        "decoder_start_token_id": model.start_id,
        "pad_token_id": model.start_id,  # T5 starts from its padding.
        "relative_attention_num_buckets": buckets.count,
        "relative_attention_max_distance": buckets.longest,
        "layer_norm_epsilon": model.norm_eps,
        "feed_forward_proj": f"gated-{activation}" if model.gated else activation,
        "tie_word_embeddings": model.tied,
        "scale_decoder_outputs": model.logit_scale != 1.0,
        "dropout_rate": model.residual_dropout,
        "is_encoder_decoder": True,
    }


def aliases(model: EncDec, architecture: str) -> dict[str, str]:
    """{further name of a tensor: its own} in the files of the class."""
    return {f"{side}.embed_tokens.weight": "shared.weight" for side in ("encoder", "decoder")}


def tensors(model: EncDec, architecture: str) -> list[Tensor]:
    """Every tensor of the file."""
    gated, in_each = model.gated, model.buckets is not None and model.buckets.each_layer
    found = [Tensor("shared.weight", (("embed/table", None),))]
    if not model.tied:
        found.append(Tensor("lm_head.weight", (("head/table", None),)))
    for side in ("encoder", "decoder"):
        sublayers = {"attention": "SelfAttention", "memory": "EncDecAttention", "mlp": "DenseReluDense"}
        if side == "encoder":
            del sublayers["memory"]
        parts = {}
        for number, (ours, name) in enumerate(sublayers.items()):
            parts[f"{ours}_norm"] = f"layer.{number}.layer_norm"
            inner = {"gate": "wi_0", "up": "wi_1", "down": "wo"} if gated else {"up": "wi", "down": "wo"}
            for leaf, theirs in (inner if ours == "mlp" else dict(zip("qkvo", "qkvo", strict=True))).items():
                parts[f"{ours}/{leaf}"] = f"layer.{number}.{name}.{theirs}"
        if in_each:
            parts["attention/buckets"] = "layer.0.SelfAttention.relative_attention_bias"
        outer = {ours: name.format(side) for ours, name in _OUTER.items()}
        found += side_tensors(model, side, side + ".block.{}.", parts, outer)
    return found


def _read_mlp(fields: Fields, default: str) -> tuple[str, bool]:
    """(activation, gated) of "relu" or "gated-gelu", whose gelu is the tanh form where it is gated."""
    gate, _, name = fields.get("feed_forward_proj", default).rpartition("-")
    if gate not in ("", "gated"):
        raise UsageError(f"feed_forward_proj={fields['feed_forward_proj']!r} is not known: gated-ACTIVATION is")
    name = "gelu_new" if gate and name == "gelu" else name
    # Both versions write these two as well, made from the first.
    fields.expect("is_gated_act", bool(gate))
    fields.expect("dense_act_fn", name)
    if name not in ACTIVATIONS:
        raise UsageError(f"feed_forward_proj has the activation {name!r}, and only {', '.join(ACTIVATIONS)} are known")
    return ACTIVATIONS[name], bool(gate)
