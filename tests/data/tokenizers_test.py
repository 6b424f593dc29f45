"""Every kind gives its text back, the same tokenizer for the same text, and one line for what is wrong."""

import io

import numpy as np
import pytest
import sentencepiece

from lm.core.errors import UsageError
from lm.data import sources, tokenizers

KINDS = [kind for kind in tokenizers.KINDS if kind != "wordpiece"]  # See huggingface_test.py.
AWKWARD = [
    "",
    " ",
    "\n\n \n",
    "tab\tand\0nul and\r\nCRLF\r",
    "  leading and trailing   ",
    "<s></s><unk><pad><0x0A> \u2581\u2581x\u2581 <eos>",
    "😀👩‍👩‍👧 漢字 ñ\u0301 ﬁ ａ \ufeff\ufffd\u00a0\u2028\u3000",
    "x" * 5000,
    "\u2581",
]


@pytest.fixture(scope="module")
def library():
    return list(sources.documents("python"))


@pytest.fixture(scope="module")
def trained(library):
    return {
        "bpe": tokenizers.train("bpe", library[::10], 2000),
        "unigram": tokenizers.train("unigram", library[::60], 600),
    }


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_every_file_of_the_library_comes_back_exactly(library, trained, kind):
    tokenizer = trained[kind]
    for text, ids in zip(library, tokenizer.encode_batch(library), strict=True):
        assert tokenizer.decode(ids) == text


@pytest.mark.parametrize("text", AWKWARD)
@pytest.mark.parametrize("kind", ["bpe", "unigram", "byte"])
def test_awkward_text_comes_back_exactly(trained, kind, text):
    tokenizer = trained[kind] if kind != "byte" else tokenizers.Byte()
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int32 and tokenizer.decode(ids) == text
    assert tokenizer.eos_id is None or tokenizer.eos_id not in ids


def test_pieces_are_those_of_sentencepiece_itself(trained):
    theirs = sentencepiece.SentencePieceProcessor(model_proto=trained["bpe"].serialize())
    text = "def main(argv):\n    return [x for x in argv]\n" * 3
    assert trained["bpe"].encode(text).tolist() == theirs.encode(text)
    assert trained["bpe"].pieces == [theirs.id_to_piece(i) for i in range(2000)]


def test_a_document_cut_into_blocks_encodes_as_the_whole(library, trained, monkeypatch):
    text = max(library, key=len)[:200_000]
    whole = sentencepiece.SentencePieceProcessor(model_proto=trained["bpe"].serialize()).encode(text)
    monkeypatch.setattr(tokenizers, "_BLOCK_CHARACTERS", 1000)
    assert trained["bpe"].encode(text).tolist() == whole


@pytest.mark.parametrize("kind", KINDS)
def test_any_ids_decode(trained, kind):
    tokenizer = trained.get(kind) or tokenizers.train(kind, ["some words\n"])
    ids = np.random.default_rng(0).integers(-5, tokenizer.vocab_size + 5, 2000)
    tokenizer.decode(ids).encode()
    assert tokenizer.decode([]) == ""


@pytest.mark.parametrize("kind", KINDS)
def test_lone_surrogates_count_as_replacement_characters(trained, kind):
    tokenizer = trained.get(kind) or tokenizers.train(kind, ["a\ud800b \ufffd"])
    assert np.array_equal(tokenizer.encode("a\ud800b"), tokenizer.encode("a\ufffdb"))


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_tokenizer_is_the_same_and_trains_the_same_again(tmp_path, library, kind):
    size = {"bpe": 400, "unigram": 400}.get(kind)
    first, again = (tokenizers.train(kind, library[:3], size) for _ in range(2))
    assert first.digest == again.digest and first.kind == kind
    path = first.save(tmp_path)
    assert path.endswith(first.file_name)
    for loaded in (tokenizers.load(tmp_path), tokenizers.load(path)):
        assert (loaded.digest, loaded.kind, loaded.eos_id) == (first.digest, kind, first.eos_id)
        assert np.array_equal(loaded.encode(library[3]), first.encode(library[3]))
        assert loaded.pieces == first.pieces and len(loaded.pieces) == loaded.vocab_size


def test_char_ids_are_ranks_as_in_nanogpt():
    text = "hello\nWörld 漢"
    tokenizer = tokenizers.train("char", [text[:6], text[6:]])
    ranks = {c: i for i, c in enumerate(sorted(set(text)))}
    assert tokenizer.encode(text).tolist() == [ranks[c] for c in text]
    assert tokenizer.decode(tokenizer.encode(text)) == text and tokenizer.eos_id is None
    with pytest.raises(UsageError, match="'X'"):
        tokenizer.encode("hellX")


def test_char_with_a_size_keeps_the_most_frequent():
    tokenizer = tokenizers.train("char", ["aaabbcde"], 3)
    assert tokenizer.vocab_size == 3 and tokenizer.pieces == ["a", "b", "<unk>"]
    assert tokenizer.encode("abzé").tolist() == [0, 1, 2, 2]


def test_words_end_lines_with_eos_and_keep_every_type():
    tokenizer = tokenizers.train("word", [" the cat \n the <unk> \n"])
    assert tokenizer.pieces == ["<eos>", "<unk>", "the", "cat"]
    ids = tokenizer.encode(" the cat \n the dog \n")
    assert [tokenizer.piece(i) for i in ids] == ["the", "cat", "<eos>", "the", "<unk>", "<eos>"]
    assert tokenizer.decode(ids) == "the cat\nthe <unk>\n"
    with pytest.raises(UsageError, match="'dog'"):
        tokenizers.train("word", ["the cat"]).encode("the dog")


def test_folded_words_have_neither_capitals_nor_punctuation():
    tokenizer = tokenizers.train("folded", ["The U.S. dog's\nwell-known, the DOG."])
    assert tokenizer.words == ["<eos>", "dog", "s", "the", "known", "u", "well"] and tokenizer.kind == "folded"
    assert tokenizer.decode(tokenizer.encode("THE dog!\n(u.s.)")) == "the dog\nu s"


def test_words_with_a_size_keep_the_most_frequent():
    tokenizer = tokenizers.train("word", ["b a a c b a"], 4)
    assert tokenizer.pieces == ["<eos>", "<unk>", "a", "b"]


def test_training_text_is_sampled_evenly_and_bounded():
    documents = [f"{i:04d} " + "x" * 95 for i in range(2000)]
    kept = tokenizers._sample(documents, 50_000, seed=0)
    assert sum(map(len, kept)) <= 50_000 and len(kept) > 200
    numbers = [int(text[:4]) for text in kept]
    assert numbers == sorted(numbers) and 800 < np.mean(numbers) < 1200
    assert tokenizers._sample(documents, 10**9, seed=0) == documents


def test_tabs_and_long_lines_are_learned_from():
    tokenizer = tokenizers.train("bpe", ["\tindented " * 1000 + "\n"] * 3, 280)
    assert len(tokenizer.encode("\tindented " * 100)) < 300


@pytest.mark.parametrize(
    ("kind", "documents", "size", "message"),
    [
        ("bpe", ["abc"], 4000, "vocab_size=4000"),
        ("bpe", [], 400, "empty"),
        ("unigram", ["abc"], 100, "vocab_size=100"),
        ("byte", ["abc"], 300, "256"),
        ("char", [], None, "at least one"),
        ("wrod", [], None, "did you mean word"),
    ],
)
def test_an_impossible_tokenizer_is_refused_in_one_line(kind, documents, size, message):
    with pytest.raises(UsageError, match=message) as error:
        tokenizers.train(kind, documents, size)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"{}", b"noise" * 50, b'{"kind": "char", "symbols": 3, "has_unknown": false}', b'{"kind": 1}'],
)
def test_a_damaged_file_is_refused(tmp_path, content):
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content)
    with pytest.raises(UsageError):
        tokenizers.load(path)
    with pytest.raises(UsageError, match="no tokenizer file"):
        tokenizers.load(tmp_path / "absent")


def test_a_model_that_loses_text_is_refused():
    model = io.BytesIO()
    lines = ["the cat sat on the mat"] * 10
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=model, vocab_size=20, hard_vocab_limit=False, minloglevel=2
    )
    with pytest.raises(UsageError, match="byte fallback"):
        tokenizers.deserialize(model.getvalue())


@pytest.mark.parametrize("text", ["bpe:", "bpe:x", "bpe:-3", "bp:300", "bpe:0"])
def test_a_mistaken_specification_is_refused(text):
    assert tokenizers.parse("bpe:300") == ("bpe", 300) and tokenizers.parse("char") == ("char", None)
    with pytest.raises(UsageError):
        tokenizers.parse(text)
