"""Similarity and analogies, beside gensim's on the same random vectors."""

import types

import numpy as np
import pytest

from lm.core.errors import UsageError
from lm.evals.word_vectors import Vectors, analogies, similarity, suite

WORDS = ["<eos>", "<unk>", *(f"Word{i}" for i in range(60))]
TABLE = np.random.default_rng(0).standard_normal((len(WORDS), 5)).astype(np.float32)


class Model:
    def apply(self, params, batch):
        return types.SimpleNamespace(hidden_BLD=TABLE[batch["tokens_BL"]])


VECTORS = Vectors(Model(), {}, WORDS, None)


def gensims():
    models = pytest.importorskip("gensim.models")
    vectors = models.KeyedVectors(5)
    vectors.add_vectors(WORDS[2:], TABLE[2:])
    return vectors


def pairs():
    rng = np.random.default_rng(1)
    drawn = rng.integers(0, 70, (50, 2))
    return [f"word{a}\tWORD{b}\t{rng.random():.2f}" for a, b in drawn]


def questions():
    rng = np.random.default_rng(2)
    lines = []
    for section in ("capital", "gram1-adverb", "gram2-plural"):
        lines.append(f": {section}")
        for _ in range(200):
            a, b, c, d = rng.choice(64, 4, replace=False)
            if min(a, b, c) >= 0 and max(a, b, c) < 60 and rng.random() < 0.5:
                x = [TABLE[i + 2] / np.linalg.norm(TABLE[i + 2]) for i in range(60)]
                order = np.argsort(-np.stack(x) @ (x[b] - x[a] + x[c]))
                d = next(i for i in order if i not in (a, b, c))
            lines.append(f"word{a} Word{b} WORD{c} word{d}")
    return lines


def test_similarity_is_gensims(tmp_path):
    (tmp_path / "pairs").write_text("\n".join(pairs()))
    _, spearman, unknown = gensims().evaluate_word_pairs(tmp_path / "pairs")
    found = suite(f"similarity:{tmp_path / 'pairs'}", VECTORS)
    np.testing.assert_allclose(found["spearman"], spearman[0], rtol=1e-6)
    assert found["known"] == round(50 * (1 - unknown / 100)) < found["pairs"] == 50


def test_analogies_are_gensims(tmp_path):
    (tmp_path / "questions").write_text("\n".join(questions()))
    score, sections = gensims().evaluate_word_analogies(tmp_path / "questions")
    found = suite(f"analogies:{tmp_path / 'questions'}", VECTORS)
    for section in sections:
        name = "all" if section["section"].startswith("Total") else section["section"]
        right, wrong = len(section["correct"]), len(section["incorrect"])
        assert (found[f"{name}_right"], found[f"{name}_known"]) == (right, right + wrong)
    assert found["all"] == pytest.approx(score) and 0.2 < score < 0.8
    assert found["syntactic_known"] + found["semantic_known"] + found["skipped"] == 600


def test_files_of_another_form_are_refused(tmp_path):
    for read, line, words in (
        (similarity, "a b 3", "parted by tabs"),
        (similarity, "a\tb\t3", "0 of 1 pairs"),
        (analogies, "a b c d", "headed"),
    ):
        with pytest.raises(UsageError, match=words):
            read([line], VECTORS)
    with pytest.raises(UsageError, match="there is no file"):
        suite("similarity:nowhere", VECTORS)
    with pytest.raises(UsageError, match="similarity"):
        suite("similarities:nowhere", VECTORS)
