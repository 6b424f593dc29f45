"""The counting baselines against a model written with dictionaries."""

import collections
import lzma
import math

import numpy as np
import pytest

from lm.evals import baselines


def naive_ngram_bits(train: bytes, held_out: bytes, order: int) -> float:
    followers = [collections.defaultdict(collections.Counter) for _ in range(order)]
    for n in range(order):
        for i in range(n, len(train)):
            followers[n][train[i - n : i]][train[i]] += 1

    def probability(context: bytes, byte: int) -> float:
        lower = probability(context[1:], byte) if context else 1 / 256
        seen = followers[len(context)].get(context)
        if not seen:
            return lower
        return (seen[byte] + len(seen) * lower) / (seen.total() + len(seen))

    return -sum(math.log2(probability(held_out[max(0, i - order + 1) : i], b)) for i, b in enumerate(held_out))


@pytest.mark.parametrize("order", [1, 2, 5])
def test_byte_ngram_equals_a_dictionary_of_counts(order):
    rng = np.random.default_rng(order)
    train, held_out = (bytes(rng.choice([0, 65, 66, 67, 255], n).astype(np.uint8)) for n in (3000, 400))
    assert baselines.byte_ngram_bits(train, held_out + b"z", order) == pytest.approx(
        naive_ngram_bits(train, held_out + b"z", order), rel=1e-12
    )


def test_unigram_is_a_distribution_over_the_vocabulary():
    counts = np.array([5, 0, 2])
    p = [2 ** -baselines.unigram_bits(counts, np.array([i])) for i in range(3)]
    assert sum(p) == pytest.approx(1) and p[0] == pytest.approx(6 / 10)


def test_xz_counts_the_bits_of_the_file():
    text = b"the same words again " * 50
    assert baselines.xz_bits(text) == 8 * len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME))
