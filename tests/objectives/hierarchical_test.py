"""Huffman's tree and the softmax over it."""

import heapq

import numpy as np
import pytest

from lm.objectives.hierarchical import huffman

COUNTS = np.array([0, 40, 3, 17, 1, 1, 0, 9, 9, 120, 2])


def expected_length(counts):
    """The least sum of counts x code lengths: what is joined, summed, is that (Huffman 1952)."""
    heap, total = list(counts), 0
    heapq.heapify(heap)
    while len(heap) > 1:
        joined = heapq.heappop(heap) + heapq.heappop(heap)
        total += joined
        heapq.heappush(heap, joined)
    return total


def codes(nodes, signs):
    return {w: tuple(signs[w][signs[w] != 0].tolist()) for w in np.flatnonzero(COUNTS)}


def test_codes_are_prefix_free_and_as_short_as_can_be():
    nodes, signs = huffman(COUNTS)
    found = codes(nodes, signs)
    for a in found:
        assert not [b for b in found if a != b and found[b][: len(found[a])] == found[a]]
    assert sum(COUNTS[w] * len(code) for w, code in found.items()) == expected_length(COUNTS[COUNTS > 0].tolist())
    assert nodes.max() == (COUNTS > 0).sum() - 2 and not signs[COUNTS == 0].any()


def test_lengths_are_those_of_gensims_tree():
    word2vec = pytest.importorskip("gensim.models.word2vec")
    model = word2vec.Word2Vec(hs=1, negative=0, min_count=1, vector_size=4)
    model.build_vocab_from_freq({f"w{w}": int(COUNTS[w]) for w in np.flatnonzero(COUNTS)})
    nodes, signs = huffman(COUNTS)
    lengths = {w: len(code) for w, code in codes(nodes, signs).items()}
    theirs = {w: len(model.wv.get_vecattr(f"w{w}", "code")) for w in lengths}
    assert sum(COUNTS[w] * n for w, n in lengths.items()) == sum(COUNTS[w] * n for w, n in theirs.items())


def test_probabilities_of_all_words_sum_to_one():
    nodes, signs = huffman(COUNTS)
    rng = np.random.default_rng(0)
    h, table = rng.standard_normal(6), rng.standard_normal((len(COUNTS), 6))
    each = 1 / (1 + np.exp(-signs * (table[nodes] @ h)))
    probabilities = np.where(signs == 0, 1, each).prod(1)[COUNTS > 0]
    np.testing.assert_allclose(probabilities.sum(), 1, rtol=1e-6)


def test_two_words_are_one_choice_and_one_word_is_none():
    assert huffman(np.array([3, 5]))[1].tolist() == [[-1.0], [1.0]]
    assert huffman(np.array([0, 5]))[1].shape == (2, 0)
