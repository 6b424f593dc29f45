"""One pass with Hugging Face's names of inputs and outputs, to compare with."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lm.core.errors import UsageError, unknown
from lm.models.decoder import Decoder
from lm.models.encdec import EncDec
from lm.models.encoder import Encoder
from lm.models.headed import ROWS, Headed
from lm.models.reformer import Reformer
from lm.models.xlnet import XLNet


@dataclasses.dataclass(frozen=True)
class Kind:
    """How a class of models takes Hugging Face's inputs and gives their outputs.

    `batch(model, given)` makes a batch of the numpy arrays that were given, `outputs(model, params, batch)` the
    arrays by their names there, under `jit`.
    """

    inputs: tuple[str, ...]
    batch: Callable[[Any, dict[str, np.ndarray]], dict[str, np.ndarray]]
    outputs: Callable[[Any, dict[str, Any], dict[str, Any]], dict[str, Any]]


def forward(model: Any, params: dict[str, Any], **inputs: Any) -> dict[str, Any]:
    """Numpy arrays by name, from integer arrays [B, L] by name: "hidden_states" are layers + 1 of [B, L, D].

    "logits" are scores of tokens [B, L, V], or what else the class is for; beside scores of tokens an encoder's pair
    head gives "seq_relationship_logits" [B, 2], ALBERT's "sop_logits". XLNet takes and gives "mems" [layers, M, B, D],
    and with a `target_mapping` its hidden states come in pairs, of the content and of the query stream. Reformer takes
    `lsh_rotations` [heads, head_dim, hashes, buckets / 2]; without them torch draws them from the model's hash_seed.
    `attention_mask` is 0 at padding, whose own rows of the output mean nothing. Raises UsageError for an input that the
    class does not take, and for ids outside the vocabulary.
    """
    kind = kind_of(model)
    for name in inputs:
        if name not in kind.inputs:
            raise unknown(f"input of {type(model).__name__}", name, kind.inputs)
    given = {name: _array(name, array) for name, array in inputs.items() if array is not None}
    ids = given.get("input_ids")
    sizes = "rows, choices, tokens" if isinstance(model, Headed) and model.task.kind == "choice" else "rows, tokens"
    if ids is None or ids.ndim != len(sizes.split()):
        raise UsageError(f"input_ids must be [{sizes}], not {None if ids is None else ids.shape}")
    _check_shapes(given)
    vocabularies = {"input_ids": getattr(model, "source_vocab_size", None), "decoder_input_ids": None}
    for name, own in vocabularies.items():
        _check_ids(name, given.get(name), own or model.vocab_size)
    batch = jax.tree.map(jnp.asarray, kind.batch(model, given))
    # XLA's fast products on accelerators round to fewer bits; here numbers are compared.
    with jax.default_matmul_precision("highest"):
        out = jax.jit(lambda params, batch: kind.outputs(model, params, batch))(params, batch)
    return {name: tuple(map(np.asarray, x)) if isinstance(x, tuple) else np.asarray(x) for name, x in out.items()}


def _array(name: str, given: Any) -> np.ndarray:
    try:
        array = np.asarray(given)
    except ValueError:
        raise UsageError(f"{name} is ragged: give rows of one length, padded under an attention_mask") from None
    if array.dtype.kind not in ("iu" if name.endswith("_ids") else "iufb"):
        raise UsageError(f"{name} must hold {'whole ' if name.endswith('_ids') else ''}numbers, not {array.dtype}")
    return array


def _check_shapes(given: dict[str, np.ndarray]) -> None:
    ids, target = given["input_ids"], given.get("decoder_input_ids")
    if not ids.size:
        raise UsageError(f"input_ids are empty: {ids.shape}")
    if target is not None and (target.ndim != 2 or len(target) != len(ids)):
        raise UsageError(f"decoder_input_ids must be [{len(ids)}, tokens], not {target.shape}")
    shapes: dict[str, list[tuple[int, ...]]] = {
        "attention_mask": [ids.shape],
        "token_type_ids": [ids.shape],
        "position_ids": [ids.shape, (1, ids.shape[-1])],
        "decoder_attention_mask": [] if target is None else [target.shape],
        "perm_mask": [(*ids.shape, ids.shape[-1])],
    }
    for name, array in given.items():
        if name in shapes and array.shape not in shapes[name]:
            wanted = " or ".join(map(str, shapes[name])) or "left out without decoder_input_ids"
            raise UsageError(f"{name} must be {wanted}, not {array.shape}")
    mapping = given.get("target_mapping")
    if mapping is not None and (mapping.ndim != ids.ndim + 1 or mapping.shape[-1] != ids.shape[-1]):
        raise UsageError(f"target_mapping must be [{len(ids)}, targets, {ids.shape[-1]}], not {mapping.shape}")


def kind_of(model: Any) -> Kind:
    """How the model takes and gives; raises UsageError for a class that has no form here."""
    if isinstance(model, Headed):
        return Kind(kind_of(model.base).inputs, _headed_batch, _headed_outputs)
    if type(model) not in KINDS:
        known = ", ".join(kind.__name__ for kind in KINDS)
        raise UsageError(f"forward takes one of {known}, not a {type(model).__name__}")
    return KINDS[type(model)]


def _check_ids(name: str, ids: np.ndarray | None, rows: int, table: str = "vocabulary") -> None:
    if ids is not None and ids.size and not 0 <= ids.min() <= ids.max() < rows:
        raise UsageError(f"{name} go from {ids.min()} to {ids.max()}, outside the {table} of {rows}")


def _decoder_batch(model: Decoder, given: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    batch = {"tokens_BL": given["input_ids"]}
    if "attention_mask" in given:
        batch["documents_BL"] = _documents(given["attention_mask"])
    if "position_ids" in given:
        if model.max_len is not None:
            _check_ids("position_ids", given["position_ids"], model.max_len, "positions")
        batch["positions_BL"] = given["position_ids"]
    return batch


def _decoder_outputs(model: Decoder, params: dict[str, Any], batch: dict[str, Any]) -> dict[str, Any]:
    out = model.apply(params, batch, capture=("hidden_states",))
    return {"hidden_states": _states(out), "logits": model.logits(model.head(params), out.hidden_BLD)}


def _encoder_batch(model: Encoder, given: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    batch, ids = {"tokens_BL": given["input_ids"]}, given["input_ids"]
    if "attention_mask" in given:
        batch["documents_BL"] = _documents(given["attention_mask"])
    if "token_type_ids" in given:
        _check_ids("token_type_ids", given["token_type_ids"], model.types, "types")
        batch["types_BL"] = given["token_type_ids"]
    if "position_ids" in given:
        if model.max_len is not None:
            _check_ids("position_ids", given["position_ids"], model.max_len + model.position_offset, "positions")
        batch["positions_BL"] = given["position_ids"] - model.position_offset
    elif model.position_offset:
        # RoBERTa counts what is no padding, by its id: the row before the first token's is the padding's.
        real = ids != model.position_offset - 1
        batch["positions_BL"] = np.cumsum(real, 1) * real - 1
    return batch


def _encdec_batch(model: EncDec, given: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    if "decoder_input_ids" not in given:
        raise UsageError("decoder_input_ids is missing: the ids that the decoder has read so far")
    batch = {"source_tokens_BS": given["input_ids"], "tokens_BL": given["decoder_input_ids"]}
    if "attention_mask" in given:
        batch["source_documents_BS"] = _documents(given["attention_mask"])
    if "decoder_attention_mask" in given:
        batch["documents_BL"] = _documents(given["decoder_attention_mask"])
    if model.positions == "sinusoidal" and model.position_offset:
        # FSMT counts what is no padding, by its id, which is that of the row before the first token's.
        for tokens, positions in (("source_tokens_BS", "source_positions_BS"), ("tokens_BL", "positions_BL")):
            real = batch[tokens] != model.position_offset - 1
            batch[positions] = np.cumsum(real, 1) * real - 1
        batch.setdefault("documents_BL", _documents(batch["tokens_BL"] != model.position_offset - 1))
    return batch


def _encdec_outputs(model: EncDec, params: dict[str, Any], batch: dict[str, Any]) -> dict[str, Any]:
    out = model.apply(params, batch, capture=("hidden_states",))
    memory = out.captured["memory"]
    return {
        "logits": model.logits(model.head(params), out.hidden_BLD),
        "decoder_hidden_states": _states(out),
        "encoder_last_hidden_state": memory,
        "encoder_hidden_states": (*out.captured["encoder_states"][:-1], memory),
    }


def _encoder_outputs(model: Encoder, params: dict[str, Any], batch: dict[str, Any]) -> dict[str, Any]:
    out = model.apply(params, batch, capture=("hidden_states",))
    found: dict[str, Any] = {"hidden_states": _states(out)}
    if "tokens" in model.outputs:
        found["logits"] = model.logits(model.head(params), out.hidden_BLD)
    if "pair" in model.outputs:
        beside = "seq_relationship_logits" if model.shared_groups is None else "sop_logits"
        found[beside if "tokens" in model.outputs else "logits"] = model.pair_logits(params, out.hidden_BLD)
    if "detect" in model.outputs:
        found["logits"] = model.detect_logits(params, out.hidden_BLD)
    return found


def _xlnet_batch(model: XLNet, given: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    ids = given["input_ids"]
    batch = {"tokens_BL": ids, "memory_NBMD": np.zeros((model.layers, ids.shape[0], 0, model.width), np.float32)}
    if "attention_mask" in given:
        batch["documents_BL"] = _documents(given["attention_mask"])
    if "token_type_ids" in given:
        batch["types_BL"] = given["token_type_ids"]
    if "perm_mask" in given:
        batch["blocked_BLL"] = given["perm_mask"]
    if "target_mapping" in given:
        mapping_BPL = given["target_mapping"]
        if not ((mapping_BPL == 1).sum(-1) == 1).all() or np.count_nonzero(mapping_BPL) != mapping_BPL[..., 0].size:
            raise UsageError("target_mapping must choose one token a target: a single 1 in each of its last dimension")
        batch["picks_BP"] = mapping_BPL.argmax(-1)
    if "mems" in given:
        shape = given["mems"].shape
        if len(shape) != 4 or (shape[0], *shape[2:]) != (model.layers, len(ids), model.width):
            raise UsageError(f"mems must be [{model.layers}, length, {len(ids)}, {model.width}], not {shape}")
        batch["memory_NBMD"] = given["mems"].transpose(0, 2, 1, 3)
    return batch


def _xlnet_outputs(model: XLNet, params: dict[str, Any], batch: dict[str, Any]) -> dict[str, Any]:
    rest, cache = _memory(batch)
    out = model.apply(params, rest, cache=cache, capture=("hidden_states",))
    return _mems(out) | {"hidden_states": _states(out), "logits": model.logits(model.head(params), out.hidden_BLD)}


def _memory(batch: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """The batch without a memory, and that as a cache."""
    rest = dict(batch)
    memory_NBMD = rest.pop("memory_NBMD", None)
    if memory_NBMD is None:
        return rest, None
    return rest, {"memory": memory_NBMD, "length": jnp.full(memory_NBMD.shape[1], memory_NBMD.shape[2])}


def _mems(out: Any) -> dict[str, Any]:
    return {} if out.cache is None else {"mems": out.cache["memory"].transpose(0, 2, 1, 3)}


def _reformer_batch(model: Reformer, given: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    batch = {"tokens_BL": given["input_ids"]}
    if "attention_mask" in given:
        batch["documents_BL"] = _documents(given["attention_mask"])
    if "position_ids" in given:
        _check_ids("position_ids", given["position_ids"], model.max_len, "positions")
        batch["positions_BL"] = given["position_ids"]
    factors = model.hash_factors(given["input_ids"].shape[1])
    if not factors:
        return batch
    shape = (model.heads, model.head_size, model.lsh.rounds, sum(factors) // 2)
    rotations = given["lsh_rotations"] if "lsh_rotations" in given else _torch_normal(model.hash_seed or 0, shape)
    if rotations.shape != shape:
        raise UsageError(f"lsh_rotations must be {shape}, not {rotations.shape}")
    return batch | {"rotations_HCRK": rotations}


def _torch_normal(seed: int, shape: tuple[int, ...]) -> np.ndarray:
    """What torch draws after `torch.manual_seed(seed)`, as transformers does in each layer."""
    try:
        import torch
    except ImportError:
        raise UsageError("without lsh_rotations torch draws them: give them, or pip install -e '.[hf]'") from None
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).numpy()


def _reformer_outputs(model: Reformer, params: dict[str, Any], batch: dict[str, Any]) -> dict[str, Any]:
    out = model.apply(params, batch, capture=("hidden_states",))
    logits = model.logits(model.head(params), out.hidden_BLD)
    return {"hidden_states": tuple(out.captured["hidden_states"]), "logits": logits}


def _headed_batch(model: Headed, given: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    base, shape = kind_of(model.base), given["input_ids"].shape
    if model.task.kind != "choice":
        return base.batch(model.base, given)
    names = ("input_ids", "attention_mask", "token_type_ids", "position_ids")
    flat = {name: x.reshape(-1, x.shape[-1]) if name in names else x for name, x in given.items()}
    return {name: x.reshape(shape) if name in ROWS else x for name, x in base.batch(model.base, flat).items()}


def _headed_outputs(model: Headed, params: dict[str, Any], batch: dict[str, Any]) -> dict[str, Any]:
    rest, cache = _memory(batch)
    scores, out = model.scores(params, rest, cache=cache, capture=("hidden_states",))
    found = _mems(out) | {"hidden_states": _states(out)}
    if model.task.kind == "span":
        return found | {"start_logits": scores[..., 0], "end_logits": scores[..., 1]}
    return found | {"logits": scores}


def _states(out: Any) -> tuple[jax.Array, ...]:
    states = out.captured["hidden_states"]
    if "query_states" in out.captured:
        return tuple(state for pair in zip(states, out.captured["query_states"], strict=True) for state in pair)
    # The last of Hugging Face's has been through the final norm.
    return (*states[:-1], out.hidden_BLD)


def _documents(mask: np.ndarray) -> np.ndarray:
    return np.where(mask > 0, 0, -1).astype(np.int32)


_DECODER_INPUTS = ("input_ids", "attention_mask", "position_ids")
KINDS: dict[type, Kind] = {
    Decoder: Kind(_DECODER_INPUTS, _decoder_batch, _decoder_outputs),
    Encoder: Kind((*_DECODER_INPUTS, "token_type_ids"), _encoder_batch, _encoder_outputs),
    EncDec: Kind(
        ("input_ids", "attention_mask", "decoder_input_ids", "decoder_attention_mask"), _encdec_batch, _encdec_outputs
    ),
    Reformer: Kind((*_DECODER_INPUTS, "lsh_rotations"), _reformer_batch, _reformer_outputs),
    XLNet: Kind(
        ("input_ids", "attention_mask", "token_type_ids", "perm_mask", "target_mapping", "mems"),
        _xlnet_batch,
        _xlnet_outputs,
    ),
}
