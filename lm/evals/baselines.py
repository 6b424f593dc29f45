"""What counting and compressing say about held-out text: the bits per byte that a model has to beat."""

import lzma

import numpy as np


def unigram_bits(train_counts: np.ndarray, held_out: np.ndarray) -> float:
    """Total bits of the token ids `held_out` under add-one estimates from `train_counts` [V]."""
    log2_p = np.log2(train_counts + 1.0) - np.log2(train_counts.sum() + len(train_counts))
    return float(-log2_p[held_out].sum())


def xz_bits(text: bytes) -> float:
    """Total bits of `text` after xz at its highest setting, which sees this text alone."""
    return 8.0 * len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME))


def byte_ngram_bits(train: bytes, held_out: bytes, order: int = 5) -> float:
    """Total bits of `held_out` under an interpolated byte n-gram model of `train`.

    Witten-Bell smoothing (Witten and Bell 1991, method C; Chen and Goodman 1998, section 2.5): an order gives
    its lower order the weight of the number of distinct bytes seen after the context. Orders up to 8 fit a word.
    """
    seen, new = (np.frombuffer(text, np.uint8).astype(np.uint64) for text in (train, held_out))
    probability = np.full(len(new), 1 / 256)
    train_codes, new_codes = np.zeros_like(seen), np.zeros_like(new)
    for n in range(1, order + 1):
        # A code holds the last n bytes; the first n - 1 positions have shorter contexts, and keep their estimate.
        train_codes = _with_earlier(train_codes, seen, n)
        new_codes = _with_earlier(new_codes, new, n)
        grams, counts = np.unique(train_codes[n - 1 :], return_counts=True)
        contexts, first = np.unique(grams >> np.uint64(8), return_index=True)
        totals = np.add.reduceat(counts, first)
        distinct = np.diff(np.append(first, len(grams)))
        queries = new_codes[n - 1 :]
        gram_count = _lookup(grams, counts, queries)
        total = _lookup(contexts, totals, queries >> np.uint64(8))
        kinds = _lookup(contexts, distinct, queries >> np.uint64(8))
        lower = probability[n - 1 :]
        known = total > 0
        lower[known] = (gram_count[known] + kinds[known] * lower[known]) / (total[known] + kinds[known])
    return float(-np.log2(probability).sum())


def _with_earlier(codes: np.ndarray, text: np.ndarray, n: int) -> np.ndarray:
    """Codes of n bytes from codes of n - 1: the byte n - 1 places back becomes the highest."""
    shifted = np.concatenate([np.zeros(n - 1, np.uint64), text[: len(text) - n + 1]])
    return codes | (shifted << np.uint64(8 * (n - 1)))


def _lookup(keys: np.ndarray, values: np.ndarray, queries: np.ndarray) -> np.ndarray:
    """values[keys == query] for sorted `keys`, 0 where a query is not among them."""
    at = np.searchsorted(keys, queries).clip(max=len(keys) - 1)
    return np.where(keys[at] == queries, values[at], 0)
