"""Classes with a head for a task, over the families that read and write what is below it."""

import dataclasses
from typing import Any

from lm.core import tree
from lm.core.errors import UsageError
from lm.interop import hf
from lm.interop.decoders import ACTIVATION_NAMES, ACTIVATIONS, outer_tensors
from lm.interop.fields import Fields
from lm.layers.heads import TaskHead
from lm.models.headed import Headed

MODEL, PREFIX, UNPREFIXED = Headed, "", ()
# Heads of the class that was trained before.
UNUSED = r"(.*\.pooler\.dense\..*|albert\.pooler\..*|(cls|lm_head|lm_loss|predictions|discriminator_predictions)\..*)"


@dataclasses.dataclass(frozen=True)
class _Form:
    """Where a class keeps its head, what that computes, and the settings that its rate of dropout comes from.

    With `summary` the config names place and activation; `dense_dropout` is as the rate before the scores.
    """

    out: str
    dense: str | None = None
    activation: str | None = None
    norm: str | None = None
    pool: str = "first"
    bias: bool = True
    summary: bool = False
    dropout: tuple[str, ...] = ()
    rate: float = 0.1
    dense_dropout: bool = False


_SUFFIXES = {
    "sequence": "ForSequenceClassification",
    "tokens": "ForTokenClassification",
    "span": "ForQuestionAnswering",
    "choice": "ForMultipleChoice",
}
_RATE, _OWN_RATE = ("classifier_dropout", "hidden_dropout_prob"), ("classifier_dropout_prob", "hidden_dropout_prob")
_BERT = _Form("classifier", "bert.pooler.dense", "tanh", dropout=_RATE)
_ALBERT = _Form("classifier", "albert.pooler", "tanh", dropout=_OWN_RATE)
_DISTILBERT = _Form("classifier", "pre_classifier", "relu", dropout=("seq_classif_dropout",), rate=0.2)
_MODERNBERT = _Form("classifier", "head.dense", norm="head.norm", dropout=("classifier_dropout",), rate=0.0)
_XLNET = _Form(
    "logits_proj", "sequence_summary.summary", "tanh", summary=True, pool="last", dropout=("summary_last_dropout",)
)
_TOKENS, _SPAN = _Form("classifier", dropout=_RATE), _Form("qa_outputs")
_LAST = _Form("score", pool="last_real", bias=False)
_DECODER_RATE = ("classifier_dropout", "hidden_dropout")
_DECODER_TOKENS = _Form("classifier", dropout=_DECODER_RATE)
_LLAMA_TOKENS = _Form("score", dropout=_DECODER_RATE)
_FAMILIES: dict[str, tuple[str, str, dict[str, _Form]]] = {
    "Bert": ("bert", "BertForMaskedLM", {"sequence": _BERT, "tokens": _TOKENS, "span": _SPAN, "choice": _BERT}),
    "Roberta": (
        "roberta",
        "RobertaForMaskedLM",
        {
            "sequence": _Form("classifier.out_proj", "classifier.dense", "tanh", dropout=_RATE, dense_dropout=True),
            "tokens": _TOKENS,
            "span": _SPAN,
            "choice": _Form("classifier", "roberta.pooler.dense", "tanh", dropout=("hidden_dropout_prob",)),
        },
    ),
    "DistilBert": (
        "distilbert",
        "DistilBertForMaskedLM",
        {
            "sequence": _DISTILBERT,
            "tokens": _Form("classifier", dropout=("dropout",)),
            "span": _Form("qa_outputs", dropout=("qa_dropout",)),
            "choice": _DISTILBERT,
        },
    ),
    "Albert": (
        "albert",
        "AlbertForMaskedLM",
        {"sequence": _ALBERT, "tokens": _Form("classifier", dropout=_OWN_RATE), "span": _SPAN, "choice": _ALBERT},
    ),
    "Electra": (
        "electra",
        "ElectraForMaskedLM",
        {
            "sequence": _Form("classifier.out_proj", "classifier.dense", "gelu", dropout=_RATE, dense_dropout=True),
            "tokens": _TOKENS,
            "span": _SPAN,
            "choice": _Form(
                "classifier", "sequence_summary.summary", "gelu", summary=True, dropout=("summary_last_dropout",)
            ),
        },
    ),
    "ModernBert": ("modernbert", "ModernBertForMaskedLM", dict.fromkeys(_SUFFIXES, _MODERNBERT)),
    "XLNet": (
        "xlnet",
        "XLNetLMHeadModel",
        {"sequence": _XLNET, "tokens": _Form("classifier"), "span": _SPAN, "choice": _XLNET},
    ),
    "GPT2": ("gpt2", "GPT2LMHeadModel", {"sequence": _LAST, "tokens": _DECODER_TOKENS, "span": _SPAN}),
    "OpenAIGPT": ("openai-gpt", "OpenAIGPTLMHeadModel", {"sequence": _LAST}),
    "Llama": ("llama", "LlamaForCausalLM", {"sequence": _LAST, "tokens": _LLAMA_TOKENS}),
    "Mistral": ("mistral", "MistralForCausalLM", {"sequence": _LAST, "tokens": _LLAMA_TOKENS, "span": _SPAN}),
    "Qwen3": ("qwen3", "Qwen3ForCausalLM", {"sequence": _LAST, "tokens": _LLAMA_TOKENS}),
    "Olmo2": ("olmo2", "Olmo2ForCausalLM", {"sequence": _LAST}),
    "Gemma3Text": ("gemma3_text", "Gemma3ForCausalLM", {"sequence": _LAST}),
    "GPTNeoX": ("gpt_neox", "GPTNeoXForCausalLM", {"sequence": _LAST, "tokens": _DECODER_TOKENS, "span": _SPAN}),
    "Falcon": ("falcon", "FalconForCausalLM", {"sequence": _LAST, "tokens": _DECODER_TOKENS, "span": _SPAN}),
}


def _class_name(family: str, kind: str) -> str:
    return family + _SUFFIXES[kind] + ("Simple" if (family, kind) == ("XLNet", "span") else "")


_CLASSES = {
    _class_name(family, kind): (base, kind, form)
    for family, (_, base, forms) in _FAMILIES.items()
    for kind, form in forms.items()
}
ARCHITECTURES = {_class_name(family, kind): t for family, (t, _, forms) in _FAMILIES.items() for kind in forms}


def numbers(model: Headed) -> tuple[Any, ...]:
    """What decides the scores that the model computes."""
    family = next(f for f in hf.architectures().values() if type(model.base) is f.MODEL)
    base = family.numbers(dataclasses.replace(model.base, tied=True))
    return base, dataclasses.replace(model.task, dropout=0.0, dense_dropout=0.0)


def read(fields: Fields, architecture: str) -> Headed:
    """The model of the class's config."""
    name, kind, form = _CLASSES[architecture]
    base = hf.architectures()[name].read(fields, name)
    if hasattr(base, "outputs"):
        base = dataclasses.replace(base, outputs=(), tied=True, head_bias=True, head_activation=None)
    labels, rate = _labels(fields), fields.first(*form.dropout, default=form.rate) if form.dropout else 0.0
    if kind == "span" and len(labels) != 2:
        raise UsageError(f"{architecture} scores starts and ends, and its config has {len(labels)} labels")
    pool, dense, own = form.pool, form.activation, {}
    if form.summary:
        fields.expect("summary_use_proj", True)
        fields.expect("summary_proj_to_labels", False, None)
        pool = fields.choice("summary_type", {"last": "last", "first": "first"}, form.pool)
        dense = fields.choice("summary_activation", ACTIVATIONS, form.activation)
    if form.norm is not None:
        pool = fields.choice("classifier_pooling", {"cls": "first", "mean": "mean"}, "cls")
        pool = "first_real" if (pool, kind) == ("first", "choice") else pool
        dense = fields.choice("classifier_activation", ACTIVATIONS, "gelu")
        own = {
            "dense_bias": fields.get("classifier_bias", False),
            "norm_bias": base.norm_bias,
            "norm_eps": base.norm_eps,
        }
    return Headed(
        base,
        TaskHead(
            kind,
            labels=labels if kind in ("sequence", "tokens") else (),
            pool=pool if kind in ("sequence", "choice") else "first",
            pad_id=fields.get("pad_token_id") if pool == "last_real" else None,
            dense=dense,
            bias=form.bias,
            dense_dropout=rate if form.dense_dropout else 0.0,
            dropout=rate,
            **own,
        ),
    )


def write(model: Headed, architecture: str) -> dict[str, Any]:
    """The settings of the class's config; raises UsageError where the class is over another kind of model."""
    name, _, form = _CLASSES[architecture]
    family, task = hf.architectures()[name], model.task
    if not isinstance(model.base, family.MODEL):
        raise UsageError(f"{architecture} is over a {family.MODEL.__name__}, not a {type(model.base).__name__}")
    config = family.write(model.base, name)
    if form.dropout and form.dropout[0] not in config:
        config[form.dropout[0]] = task.dropout
    if form.summary:
        activation = ACTIVATION_NAMES.get(task.dense or "")
        config |= {"summary_type": task.pool, "summary_activation": activation, "summary_use_proj": True}
    if form.norm is not None:
        config |= {
            "classifier_pooling": "mean" if task.pool == "mean" else "cls",
            "classifier_activation": ACTIVATION_NAMES.get(task.dense or ""),
            "classifier_bias": task.dense_bias,
        }
    if form.pool == "last_real":
        config["pad_token_id"] = task.pad_id
    if task.labels:
        config["id2label"] = {str(i): label for i, label in enumerate(task.labels)}
        config["label2id"] = {label: i for i, label in enumerate(task.labels)}
    return config


def tensors(model: Headed, architecture: str) -> list[hf.Tensor]:
    """Every tensor of the file."""
    name, _, form = _CLASSES[architecture]
    known = tree.flatten(model.spec())
    below = hf.architectures()[name].tensors(model.base, name)
    names = {"task/dense": form.dense, "task/norm": form.norm, "task/out": form.out}
    leaves = {"kernel": "weight", "scale": "weight", "bias": "bias"}
    own = {f"{ours}/{leaf}": f"{theirs}.{kind}" for ours, theirs in names.items() for leaf, kind in leaves.items()}
    return [tensor for tensor in below if tensor.leaves[0][0] in known] + outer_tensors(model, own)


def _labels(fields: Fields) -> tuple[str, ...]:
    """The labels' names in their order; transformers leaves out what would be two without names."""
    named = fields.get("id2label")
    if named is None:
        return tuple(f"LABEL_{i}" for i in range(fields.get("num_labels", 2)))
    return tuple(named[i] for i in sorted(named, key=int))
