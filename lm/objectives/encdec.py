"""The row of an encoder-decoder's batch that a source and a target make."""

import numpy as np

PADDING = -1  # In documents: no text.


def encdec_row(source: np.ndarray, target: np.ndarray, lengths: tuple[int, int], start: int) -> dict[str, np.ndarray]:
    """source_tokens and source_documents [S], tokens, targets and weights [L], with (S, L) = lengths.

    The decoder reads the target one place later, after the id `start`; sources and targets that are shorter than
    their place are followed by padding, which is no document and weighs nothing.
    """
    S, L = lengths
    inputs = np.append(np.int32(start), target[:-1])[: len(target)]
    return {
        "source_tokens_BS": _fill(source, S),
        "source_documents_BS": _fill(np.zeros(len(source), np.int32), S, PADDING),
        "tokens_BL": _fill(inputs, L),
        "targets_BL": _fill(target, L),
        "weights_BL": _fill(np.ones(len(target), np.float32), L),
    }


def _fill(x, length, value=0):
    if len(x) > length:
        raise ValueError(f"{len(x)} ids do not fit into {length} places")
    return np.pad(x, (0, length - len(x)), constant_values=value).astype(
        np.float32 if x.dtype.kind == "f" else np.int32
    )
