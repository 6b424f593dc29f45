"""One pass with Hugging Face's names of inputs and outputs, to compare with."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lm.core.errors import UsageError, unknown
from lm.models.decoder import Decoder
from lm.models.encoder import Encoder

_DECODER_INPUTS = ("input_ids", "attention_mask", "position_ids")
_ENCODER_INPUTS = (*_DECODER_INPUTS, "token_type_ids")


def forward(model: Any, params: dict[str, Any], **inputs: Any) -> dict[str, Any]:
    """Numpy arrays by name, from integer arrays [B, L] by name: "hidden_states" are layers + 1 of [B, L, D].

    "logits" are scores of tokens [B, L, V], or what else the class is for; beside scores of tokens an encoder's pair
    head gives "seq_relationship_logits" [B, 2], ALBERT's "sop_logits". `attention_mask` is 0 at padding, whose own
    rows of the output mean nothing. Raises UsageError for an input that the class does not take, and for ids outside
    the vocabulary.
    """
    if not isinstance(model, Decoder | Encoder):
        raise UsageError(f"forward takes a Decoder or an Encoder, not a {type(model).__name__}")
    allowed = _ENCODER_INPUTS if isinstance(model, Encoder) else _DECODER_INPUTS
    for name in inputs:
        if name not in allowed:
            raise unknown(f"input of {type(model).__name__}", name, allowed)
    given = {name: np.asarray(array) for name, array in inputs.items() if array is not None}
    ids = given.get("input_ids")
    if ids is None or ids.ndim != 2:
        raise UsageError(f"input_ids must be [rows, tokens], not {None if ids is None else ids.shape}")
    if ids.size and not 0 <= ids.min() <= ids.max() < model.vocab_size:
        raise UsageError(f"input_ids go from {ids.min()} to {ids.max()}, outside the vocabulary of {model.vocab_size}")
    batch = {"tokens_BL": ids}
    if "attention_mask" in given:
        batch["documents_BL"] = np.where(given["attention_mask"] > 0, 0, -1).astype(np.int32)
    if "token_type_ids" in given:
        batch["types_BL"] = given["token_type_ids"]
    if "position_ids" in given:
        batch["positions_BL"] = given["position_ids"] - getattr(model, "position_offset", 0)
    elif isinstance(model, Encoder) and model.position_offset:
        # RoBERTa counts what is no padding, by its id: the row before the first token's is the padding's.
        real = ids != model.position_offset - 1
        batch["positions_BL"] = np.cumsum(real, 1) * real - 1
    # XLA's fast products on accelerators round to fewer bits; here numbers are compared.
    with jax.default_matmul_precision("highest"):
        out = jax.jit(lambda params, batch: _outputs(model, params, batch))(params, jax.tree.map(jnp.asarray, batch))
    return {name: tuple(map(np.asarray, x)) if isinstance(x, tuple) else np.asarray(x) for name, x in out.items()}


def _outputs(model: Any, params: dict[str, Any], batch: dict[str, Any]) -> dict[str, Any]:
    out = model.apply(params, batch, capture=("hidden_states",))
    # The last of Hugging Face's has been through the final norm.
    found: dict[str, Any] = {"hidden_states": (*out.captured["hidden_states"][:-1], out.hidden_BLD)}
    if isinstance(model, Decoder) or "tokens" in model.outputs:
        found["logits"] = model.logits(model.head(params), out.hidden_BLD)
    if isinstance(model, Encoder) and "pair" in model.outputs:
        beside = "seq_relationship_logits" if model.shared_groups is None else "sop_logits"
        found[beside if "tokens" in model.outputs else "logits"] = model.pair_logits(params, out.hidden_BLD)
    if isinstance(model, Encoder) and "detect" in model.outputs:
        found["logits"] = model.detect_logits(params, out.hidden_BLD)
    return found
