"""Which ids begin a word, from tokenizers of each kind."""

import types

import pytest

from lm.data import corpus, tokenizers
from lm.data.words import word_starts

TEXT = "the cat sat on the mat, and the dog's bowl is empty. " * 20 + "été 中文"


def split(tokenizer, text):
    """The words of a text."""
    ids = tokenizer.encode(text)
    found, begins = [], word_starts(tokenizer)[ids]
    begins[0] = True
    for number, begin in zip(ids, begins, strict=True):
        found[len(found) :] = [[]] if begin else []
        found[-1].append(number)
    return [tokenizer.decode(word) for word in found]


@pytest.mark.parametrize("kind", ["char", "byte", "bpe:300"])
def test_words_are_letters_with_the_space_before_them(kind):
    name, size = tokenizers.parse(kind)
    tokenizer = tokenizers.train(name, [TEXT], size)
    assert split(tokenizer, "the cat, the dog's été")[1:4] == [" cat", ",", " the"]
    assert split(tokenizer, "the dog's été")[-1] == " été"


@pytest.mark.parametrize("kind", ["word", "folded"])
def test_every_id_of_the_word_kinds_is_one(kind):
    assert word_starts(tokenizers.train(kind, [TEXT], None)).all()


def test_the_counts_of_words_leave_out_line_ends_and_unknown_ones(tmp_path):
    (tmp_path / "text").write_text("the cat the dog\nthe cat bird\n")
    built = corpus.build(f"text:{tmp_path / 'text'}", "word:4", tmp_path / "corpus")
    counts = dict(zip(built.tokenizer().pieces, built.split("train").word_counts.tolist(), strict=True))
    assert counts == {"<eos>": 0, "<unk>": 0, "the": 3, "cat": 2}


def test_ideographs_stand_alone():
    assert split(tokenizers.train("char", [TEXT], None), "été中文") == ["été", "中", "文"]


@pytest.mark.parametrize(
    ("pieces", "begins"),
    [
        (["[CLS]", "un", "##aff", "##able", ",", "##'", "cat"], [1, 1, 0, 0, 1, 0, 1]),
        (["\u0120cat", "\u0120the", "s", ",", "##", "\u0120"], [1, 1, 0, 1, 1, 1]),
        (["\u2581cat", "s", "\u2581", "##", "<0xC3>", "<0x20>"], [1, 0, 1, 1, 0, 1]),
    ],
    ids=["wordpiece", "byte-level", "sentencepiece"],
)
def test_the_commonest_mark_decides(pieces, begins):
    tokenizer = types.SimpleNamespace(pieces=pieces, kind="pretrained")
    assert word_starts(tokenizer).tolist() == [bool(b) for b in begins]
