"""Reformer: one projection for queries and keys, axial tables, and a bias of the head under two names."""

import dataclasses
from typing import Any

from lm.core import tree
from lm.interop.decoders import ACTIVATION_NAMES, ACTIVATIONS
from lm.interop.fields import Fields
from lm.interop.hf import Tensor, subtree_tensors
from lm.layers.axial import Axial
from lm.layers.local import Local
from lm.layers.lsh import LSH
from lm.models.reformer import Reformer

MODEL, PREFIX = Reformer, "reformer."
ARCHITECTURES = {"ReformerModelWithLMHead": "reformer", "ReformerForMaskedLM": "reformer"}
_BIASES = ("lm_head.bias", "lm_head.decoder.bias")
UNPREFIXED = ("lm_head.decoder.weight", *_BIASES)
# transformers 4 has one bias and may save it under either name; 5 came to have two, of which the decoder's, here the
# last, counts.
ZERO = _BIASES
# Old files hold the scores of what is hidden.
UNUSED = r".*\.(self_)?mask_value_float(16|32)"
_WINDOW = {
    "chunk": "attn_chunk_length",
    "before": "num_chunks_before",
    "after": "num_chunks_after",
    "dropout": "attention_probs_dropout_prob",
}
_PARTS = {
    "attention/norm": "attention.layer_norm",
    "attention/qk": "attention.self_attention.query_key",
    "attention/q": "attention.self_attention.query",
    "attention/k": "attention.self_attention.key",
    "attention/v": "attention.self_attention.value",
    "attention/o": "attention.output.dense",
    "mlp/norm": "feed_forward.layer_norm",
    "mlp/up": "feed_forward.dense.dense",
    "mlp/down": "feed_forward.output.dense",
}


def read(fields: Fields, architecture: str) -> Reformer:
    """The model of a ReformerConfig."""
    kinds = tuple(fields.get("attn_layers", ("local", "lsh") * 3))
    causal = architecture == "ReformerModelWithLMHead"
    fields.expect("num_hidden_layers", len(kinds), None)
    fields.expect("tie_word_embeddings", False)
    fields.expect("is_decoder", causal)
    fields.get("chunk_size_lm_head")  # How a program runs the model.
    buckets = fields.get("num_buckets")
    lsh = LSH(
        rounds=fields.get("num_hashes", 1),
        buckets=(buckets,) if isinstance(buckets, int) else buckets and tuple(buckets),
        masking="chunks",
        **_window(fields, "lsh", 0.0),
    )
    local = Local(**_window(fields, "local", 0.05))
    axial = Axial(
        shape=tuple(fields.get("axial_pos_shape", (64, 64))),
        widths=tuple(fields.get("axial_pos_embds_dim", (64, 192))),
        init_std=fields.get("axial_norm_std", 1.0),
    )
    return Reformer(
        layers=len(kinds),
        width=fields.get("hidden_size", 256),
        heads=fields.get("num_attention_heads", 12),
        head_dim=fields.get("attention_head_size", 64),
        mlp_width=fields.get("feed_forward_size", 512),
        pattern=_repeated(kinds),
        lsh=lsh if "lsh" in kinds else LSH(),
        local=local if "local" in kinds else Local(),
        mlp_chunk=fields.get("chunk_size_feed_forward") or None,
        vocab_size=fields.get("vocab_size", 320),
        max_len=fields.get("max_position_embeddings", 4096),
        axial=axial if fields.get("axial_pos_embds", True) else None,
        causal=causal,
        hash_seed=fields.get("hash_seed"),
        activation=fields.choice("hidden_act", ACTIVATIONS, "relu"),
        norm_eps=fields.get("layer_norm_eps", 1e-12),
        dropout=fields.get("hidden_dropout_prob", 0.05),
        init_std=fields.get("initializer_range", 0.02),
    )


def write(model: Reformer, architecture: str) -> dict[str, Any]:
    """The settings of a ReformerConfig."""
    config = {
        "attn_layers": list(model.kinds),
        "num_hidden_layers": model.layers,
        "hidden_size": model.width,
        "num_attention_heads": model.heads,
        "attention_head_size": model.head_size,
        "feed_forward_size": model.mlp_width or 4 * model.width,
        "chunk_size_feed_forward": model.mlp_chunk or 0,
        "vocab_size": model.vocab_size,
        "max_position_embeddings": model.max_len,
        "axial_pos_embds": model.axial is not None,
        "is_decoder": model.causal,
        "hash_seed": model.hash_seed,
        "hidden_act": ACTIVATION_NAMES[model.activation],
        "layer_norm_eps": model.norm_eps,
        "hidden_dropout_prob": model.dropout,
        "initializer_range": model.init_std,
        "tie_word_embeddings": False,
    }
    if model.axial is not None:
        config["axial_pos_shape"] = list(model.axial.shape)
        config["axial_pos_embds_dim"] = list(model.axial.widths)
        config["axial_norm_std"] = model.axial.init_std
    for kind, form in (("lsh", model.lsh), ("local", model.local)):
        if kind in model.pattern:
            config |= {f"{kind}_{name}": getattr(form, field) for field, name in _WINDOW.items()}
    if "lsh" in model.pattern:
        buckets = model.lsh.buckets
        config["num_hashes"] = model.lsh.rounds
        config["num_buckets"] = buckets[0] if buckets and len(buckets) == 1 else buckets and list(buckets)
    return config


def numbers(model: Reformer) -> Reformer:
    """The model with all that decides its scores written out, and nothing else: equal ones compute the same."""
    free = ("mlp_chunk", "dropout", "init_std", "dtype", "remat", "scan")
    defaults: dict[str, Any] = {f.name: f.default for f in dataclasses.fields(model) if f.name in free}
    return dataclasses.replace(
        model,
        head_dim=model.head_size,
        mlp_width=model.mlp_width or 4 * model.width,
        pattern=model.kinds,
        lsh=dataclasses.replace(model.lsh, dropout=0.0),
        local=dataclasses.replace(model.local, dropout=0.0),
        axial=model.axial and dataclasses.replace(model.axial, init_std=1.0),
        **defaults,
    )


def tensors(model: Reformer, architecture: str) -> list[Tensor]:
    """Every tensor of the file."""
    known, embeddings = tree.flatten(model.spec()), "reformer.embeddings."
    found = subtree_tensors(known, "embed", embeddings + "word_embeddings", None)
    found += subtree_tensors(known, "positions", embeddings + "position_embeddings.embedding", None)
    if model.axial is not None:
        (rows, columns), (wide, narrow) = model.axial.shape, model.axial.widths
        at = embeddings + "position_embeddings.weights."
        found.append(Tensor(at + "0", (("positions/rows/table", None),), shape=(rows, 1, wide)))
        found.append(Tensor(at + "1", (("positions/columns/table", None),), shape=(1, columns, narrow)))
    for i in range(model.layers):
        repeat, j = divmod(i, len(model.pattern))
        for part, name in _PARTS.items():
            found += subtree_tensors(known, f"layers/layer{j}/{part}", f"reformer.encoder.layers.{i}.{name}", repeat)
    found += subtree_tensors(known, "final_norm", "reformer.encoder.layer_norm", None)
    found.append(Tensor("lm_head.decoder.weight", (("head/table", None),)))
    return found + [Tensor(name, (("head/bias", None),)) for name in _BIASES]


def _window(fields, kind, dropout):
    defaults = {"chunk": 64, "before": 1, "after": 0, "dropout": dropout}
    return {field: fields.get(f"{kind}_{name}", defaults[field]) for field, name in _WINDOW.items()}


def _repeated(kinds):
    """The shortest pattern that, repeated, gives the layers."""
    lengths = (n for n in range(1, len(kinds) + 1) if kinds == kinds[:n] * (len(kinds) // n))
    return kinds[: next(lengths, 0)]
