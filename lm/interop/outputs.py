"""One pass with Hugging Face's names of inputs and outputs, to compare with."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lm.core.errors import UsageError, unknown
from lm.models.decoder import Decoder

_INPUTS = ("input_ids", "attention_mask", "position_ids")


def forward(model: Any, params: dict[str, Any], **inputs: Any) -> dict[str, Any]:
    """{"logits" [B, L, V], "hidden_states" (layers + 1 of [B, L, D])} as numpy arrays, from integer arrays [B, L].

    `attention_mask` is 0 at padding, whose own rows of the output mean nothing. Raises UsageError for an input that
    the class does not take, and for ids outside the vocabulary.
    """
    for name in inputs:
        if name not in _INPUTS:
            raise unknown(f"input of {type(model).__name__}", name, _INPUTS)
    if not isinstance(model, Decoder):
        raise UsageError(f"forward takes a Decoder, not a {type(model).__name__}")
    given = {name: np.asarray(array) for name, array in inputs.items() if array is not None}
    ids = given.get("input_ids")
    if ids is None or ids.ndim != 2:
        raise UsageError(f"input_ids must be [rows, tokens], not {None if ids is None else ids.shape}")
    if ids.size and not 0 <= ids.min() <= ids.max() < model.vocab_size:
        raise UsageError(f"input_ids go from {ids.min()} to {ids.max()}, outside the vocabulary of {model.vocab_size}")
    batch = {"tokens_BL": ids}
    if "attention_mask" in given:
        batch["documents_BL"] = np.where(given["attention_mask"] > 0, 0, -1).astype(np.int32)
    if "position_ids" in given:
        batch["positions_BL"] = given["position_ids"]
    logits, hidden = _run(model, params, batch)
    return {"logits": np.asarray(logits), "hidden_states": tuple(np.asarray(h) for h in hidden)}


def _run(model: Decoder, params: dict[str, Any], batch: dict[str, Any]) -> tuple[jax.Array, list[jax.Array]]:
    @jax.jit
    def run(params, batch):
        out = model.apply(params, batch, capture=("hidden_states",))
        return model.logits(model.head(params), out.hidden_BLD), out

    # XLA's fast products on accelerators round to fewer bits; here numbers are compared.
    with jax.default_matmul_precision("highest"):
        logits, out = run(params, jax.tree.map(jnp.asarray, batch))
    # The last of Hugging Face's has been through the final norm.
    return logits, [*out.captured["hidden_states"][:-1], out.hidden_BLD]
