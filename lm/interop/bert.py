"""BERT, and what has its layers under other names: RoBERTa, DistilBERT, ALBERT and ELECTRA."""

import dataclasses
from typing import Any

from lm.core import tree
from lm.core.errors import UsageError
from lm.interop.decoders import ACTIVATION_NAMES, ACTIVATIONS
from lm.interop.fields import Fields
from lm.interop.hf import Tensor, subtree_tensors, without_training
from lm.layers.block import Layer
from lm.models.encoder import Encoder

MODEL, PREFIX, UNPREFIXED = Encoder, "", ()
# Heads of other classes that a file may hold beside, and the second name of a bias.
UNUSED = r"(.*\.pooler\..*|cls\.seq_relationship\..*|.*(predictions|lm_head)\.decoder\.bias|sop_classifier\..*)"
ARCHITECTURES = {
    "BertForMaskedLM": "bert",
    "BertForPreTraining": "bert",
    "BertForNextSentencePrediction": "bert",
    "RobertaForMaskedLM": "roberta",
    "DistilBertForMaskedLM": "distilbert",
    "AlbertForMaskedLM": "albert",
    "AlbertForPreTraining": "albert",
    "ElectraForMaskedLM": "electra",
    "ElectraForPreTraining": "electra",
}
_OUTPUTS = {
    "BertForPreTraining": ("tokens", "pair"),
    "BertForNextSentencePrediction": ("pair",),
    "AlbertForPreTraining": ("tokens", "pair"),
    "ElectraForPreTraining": ("detect",),
}
_BERT = {
    "attention/q": "attention.self.query",
    "attention/k": "attention.self.key",
    "attention/v": "attention.self.value",
    "attention/o": "attention.output.dense",
    "attention_norm": "attention.output.LayerNorm",
    "mlp/up": "intermediate.dense",
    "mlp/down": "output.dense",
    "mlp_norm": "output.LayerNorm",
}
_EMBEDDINGS = {
    "embed": "embeddings.word_embeddings",
    "positions": "embeddings.position_embeddings",
    "types": "embeddings.token_type_embeddings",
    "embed_norm": "embeddings.LayerNorm",
}


@dataclasses.dataclass(frozen=True)
class _Names:
    """Where a kind of model keeps what: a layer's prefix, its parts, and the parts outside, by our sub-trees."""

    layer: str
    parts: dict[str, str]
    outer: dict[str, str]
    table: str  # Of the scores of tokens, where it is not the embeddings'.
    bias: str  # Of the same scores.


_NAMES = {
    "bert": _Names(
        "bert.encoder.layer.{}.",
        _BERT,
        {ours: f"bert.{name}" for ours, name in _EMBEDDINGS.items()}
        | {
            "head/dense": "cls.predictions.transform.dense",
            "head/norm": "cls.predictions.transform.LayerNorm",
            "pooler": "bert.pooler.dense",
            "pair": "cls.seq_relationship",
        },
        "cls.predictions.decoder.weight",
        "cls.predictions.bias",
    ),
    "roberta": _Names(
        "roberta.encoder.layer.{}.",
        _BERT,
        {ours: f"roberta.{name}" for ours, name in _EMBEDDINGS.items()}
        | {"head/dense": "lm_head.dense", "head/norm": "lm_head.layer_norm"},
        "lm_head.decoder.weight",
        "lm_head.bias",
    ),
    "distilbert": _Names(
        "distilbert.transformer.layer.{}.",
        {
            "attention/q": "attention.q_lin",
            "attention/k": "attention.k_lin",
            "attention/v": "attention.v_lin",
            "attention/o": "attention.out_lin",
            "attention_norm": "sa_layer_norm",
            "mlp/up": "ffn.lin1",
            "mlp/down": "ffn.lin2",
            "mlp_norm": "output_layer_norm",
        },
        {ours: f"distilbert.{name}" for ours, name in _EMBEDDINGS.items()}
        | {"head/dense": "vocab_transform", "head/norm": "vocab_layer_norm"},
        "vocab_projector.weight",
        "vocab_projector.bias",
    ),
    "albert": _Names(
        "albert.encoder.albert_layer_groups.{}.albert_layers.{}.",
        {
            "attention/q": "attention.query",
            "attention/k": "attention.key",
            "attention/v": "attention.value",
            "attention/o": "attention.dense",
            "attention_norm": "attention.LayerNorm",
            "mlp/up": "ffn",
            "mlp/down": "ffn_output",
            "mlp_norm": "full_layer_layer_norm",
        },
        {ours: f"albert.{name}" for ours, name in _EMBEDDINGS.items()}
        | {
            "embed_map": "albert.encoder.embedding_hidden_mapping_in",
            "head/dense": "predictions.dense",
            "head/norm": "predictions.LayerNorm",
            "pooler": "albert.pooler",
            "pair": "sop_classifier.classifier",
        },
        "predictions.decoder.weight",
        "predictions.bias",
    ),
    "electra": _Names(
        "electra.encoder.layer.{}.",
        _BERT,
        {ours: f"electra.{name}" for ours, name in _EMBEDDINGS.items()}
        | {
            "embed_map": "electra.embeddings_project",
            "head/dense": "generator_predictions.dense",
            "head/norm": "generator_predictions.LayerNorm",
            "detect/dense": "discriminator_predictions.dense",
            "detect/out": "discriminator_predictions.dense_prediction",
        },
        "generator_lm_head.weight",
        "generator_lm_head.bias",
    ),
}


def numbers(model: Encoder) -> Encoder:
    """The model with all that decides its scores written out, and nothing else: equal ones compute the same."""
    layers: dict[str, Any] = {}
    if model.shared_groups is None:
        layers = {"prefix": (), "pattern": model.stack.layers}
    mapped = None if model.shared_groups is None and model.embed_width == model.width else model.embed_width
    head = (model.head_activation or model.activation) if "tokens" in model.outputs else None
    return dataclasses.replace(
        without_training(model),
        mlp_width=model.stack.block.mlp_width,
        embed_width=mapped,
        head_activation=head,
        **layers,
    )


def read(fields: Fields, architecture: str) -> Encoder:
    """The model of the class's config."""
    kind = ARCHITECTURES[architecture]
    outputs = _OUTPUTS.get(architecture, ("tokens",))
    if kind == "distilbert":
        return _read_distilbert(fields, outputs)
    width, narrow = fields["hidden_size"], fields.get("embedding_size")
    fields.expect("is_decoder", False)
    fields.expect("position_embedding_type", "absolute", None)
    offset = (fields.get("pad_token_id", 1) + 1) if kind == "roberta" else 0
    head_activation = "gelu" if kind in ("electra", "roberta") and "tokens" in outputs else None
    shared: dict[str, Any] = {}
    if kind == "albert":
        shared = {
            "shared_groups": fields.get("num_hidden_groups", 1),
            "pattern": (Layer(),) * fields.get("inner_group_num", 1),
        }
    if kind == "electra" and narrow == width:
        narrow = None
    return Encoder(
        layers=fields["num_hidden_layers"],
        width=width,
        heads=fields["num_attention_heads"],
        mlp_width=fields["intermediate_size"],
        embed_width=narrow if kind in ("albert", "electra") else None,
        vocab_size=fields["vocab_size"],
        max_len=fields["max_position_embeddings"] - offset,
        position_offset=offset,
        types=fields.get("type_vocab_size", 2),
        outputs=outputs,
        norm_eps=fields.get("layer_norm_eps", 1e-12),
        activation=fields.choice("hidden_act", ACTIVATIONS, "gelu_new" if kind == "albert" else "gelu"),
        head_activation=head_activation,
        tied=fields.get("tie_word_embeddings", True) or "tokens" not in outputs,
        embed_dropout=fields.get("hidden_dropout_prob", 0.1),
        residual_dropout=fields.get("hidden_dropout_prob", 0.1),
        attention_dropout=fields.get("attention_probs_dropout_prob", 0.1),
        **shared,
    )


def _read_distilbert(fields: Fields, outputs: tuple[str, ...]) -> Encoder:
    fields.expect("sinusoidal_pos_embds", False)
    return Encoder(
        layers=fields["n_layers"],
        width=fields["dim"],
        heads=fields["n_heads"],
        mlp_width=fields["hidden_dim"],
        vocab_size=fields["vocab_size"],
        max_len=fields["max_position_embeddings"],
        types=0,
        outputs=outputs,
        activation=fields.choice("activation", ACTIVATIONS, "gelu"),
        tied=fields.get("tie_word_embeddings", True),
        embed_dropout=fields.get("dropout", 0.1),
        residual_dropout=fields.get("dropout", 0.1),
        attention_dropout=fields.get("attention_dropout", 0.1),
    )


def write(model: Encoder, architecture: str) -> dict[str, Any]:
    """The settings of the class's config."""
    kind, block = ARCHITECTURES[architecture], model.stack.block
    if kind == "distilbert":
        return {
            "n_layers": model.layers,
            "dim": model.width,
            "n_heads": model.heads,
            "hidden_dim": block.mlp_width,
            "vocab_size": model.vocab_size,
            "max_position_embeddings": model.max_len,
            "activation": ACTIVATION_NAMES[model.activation],
            "tie_word_embeddings": model.tied,
            "dropout": model.residual_dropout,
            "attention_dropout": model.attention_dropout,
        }
    config: dict[str, Any] = {
        "num_hidden_layers": model.layers,
        "hidden_size": model.width,
        "num_attention_heads": model.heads,
        "intermediate_size": block.mlp_width,
        "vocab_size": model.vocab_size,
        "max_position_embeddings": (model.max_len or 0) + model.position_offset,
        "type_vocab_size": model.types,
        "layer_norm_eps": model.norm_eps,
        "hidden_act": ACTIVATION_NAMES[model.activation],
        "tie_word_embeddings": model.tied,
        "hidden_dropout_prob": model.residual_dropout,
        "attention_probs_dropout_prob": model.attention_dropout,
        "pad_token_id": max(model.position_offset - 1, 0),
    }
    if kind in ("albert", "electra"):
        config["embedding_size"] = model.embed_width or model.width
    if kind == "albert":
        config |= {"num_hidden_groups": model.shared_groups, "inner_group_num": len(model.pattern)}
    return config


def tensors(model: Encoder, architecture: str) -> list[Tensor]:
    """Every tensor of the file."""
    names, known = _NAMES[ARCHITECTURES[architecture]], tree.flatten(model.spec())
    found: list[Tensor] = []

    for ours, name in names.outer.items():
        found += subtree_tensors(known, ours, name, None)
    if "head/bias" in known:
        found.append(Tensor(names.bias, (("head/bias", None),)))
    if "head/table" in known:
        found.append(Tensor(names.table, (("head/table", None),)))
        own_bias = names.table.replace(".weight", ".bias")
        if own_bias != names.bias:
            # Untied, the class adds its decoder's own bias, and keeps the other one without using it.
            found.append(Tensor(own_bias, (("head/bias", None),)))
    seen: set[tuple[str, int]] = set()
    inner = len(model.pattern)
    for number, (path, index) in enumerate(model.stack.places):
        if (path, index) in seen:
            continue
        if model.shared_groups is None:
            prefix = names.layer.format(number)
        elif ARCHITECTURES[architecture] == "albert":
            prefix = names.layer.format(len(seen) // inner, len(seen) % inner)
        else:
            raise UsageError(f"{architecture} has parameters of its own in every layer, and shared_groups is set")
        seen.add((path, index))
        for part, name in names.parts.items():
            found += subtree_tensors(known, f"{path}/{part}", prefix + name, index)
    return found
