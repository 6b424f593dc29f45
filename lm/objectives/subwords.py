"""The character n-grams of a word, by their hashes: what fastText makes a word's vector of."""

import numpy as np

_OFFSET, _PRIME = 2166136261, 16777619  # Of the 32-bit FNV-1a hash (Fowler, Noll and Vo).


def hashes(word: str, shortest: int, longest: int) -> np.ndarray:
    """uint32, one for each n-gram of "<word>" of those lengths (Bojanowski et al. 2016, 1607.04606, section 3.2)."""
    text = f"<{word}>"
    lengths = range(shortest, min(longest, len(text)) + 1)
    ngrams = (text[i : i + n] for n in lengths for i in range(len(text) - n + 1))
    return np.array([fnv1a(ngram.encode()) for ngram in ngrams], np.uint32)


def fnv1a(data: bytes) -> int:
    """The 32-bit FNV-1a hash; bytes above 127 count as negative ones, as in fastText's code."""
    value = _OFFSET
    for byte in data:
        value = (value ^ (byte | (0xFFFFFF00 if byte > 127 else 0))) * _PRIME & 0xFFFFFFFF
    return value
