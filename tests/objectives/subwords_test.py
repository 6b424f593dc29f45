"""The hashes of fastText's n-grams."""

import pytest

from lm.objectives.subwords import fnv1a, hashes


@pytest.mark.parametrize(
    "text, value", [(b"", 0x811C9DC5), (b"a", 0xE40C292C), (b"b", 0xE70C2DE5), (b"foobar", 0xBF9CF968)]
)
def test_hashes_are_the_published_ones(text, value):
    assert fnv1a(text) == value  # draft-eastlake-fnv, appendix C.


def test_ngrams_and_hashes_are_gensims():
    fasttext = pytest.importorskip("gensim.models.fasttext")
    for word in ("where", "a", "naïve", "语言模型", "well-known"):
        rows = fasttext.ft_ngram_hashes(word, 3, 6, 2_000_000)
        assert sorted(rows) == sorted((hashes(word, 3, 6) % 2_000_000).tolist())
