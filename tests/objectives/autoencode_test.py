import numpy as np
import pytest

from lm.core.errors import UsageError
from lm.data import corpus
from lm.data.stream import Stream
from lm.models.seq2seq import Seq2Seq
from lm.objectives.autoencode import Autoencode
from lm.train.run import Run, resolve

END = 1000
TEXT = np.arange(400, dtype=np.int32)


@pytest.fixture(scope="module", params=["text", "lines"])
def built(request, tmp_path_factory):
    """Sentences of 1 to 9 words that name their sentence and place: as one document, and one a document."""
    folder = tmp_path_factory.mktemp(request.param)
    lines = [" ".join(f"{i}.{j}" for j in range(1 + i % 9)) for i in range(60)]
    (folder / "a.txt").write_text("\n".join(lines) + "\n")
    return corpus.build(f"{request.param}:{folder / 'a.txt'}", "word", folder / "corpus")


def noised(seed, length=400, **settings):
    """The source and the target of a text without ends, of which the first `length` are a document."""
    objective = Autoencode(ids=(END,), vocab_size=END, **settings)
    documents = np.where(np.arange(len(TEXT)) < length, 0, -1)

    class Split:
        def window(self, start, count):
            return TEXT[start : start + count].copy()

        def bounds(self, position):
            return 0, length

    row = {"tokens": TEXT, "documents": documents, "split": Split(), "start": 0}
    out = objective.corrupt(np.random.default_rng(seed), row)
    return out["source_tokens_BS"][out["source_documents_BS"] >= 0], out


def test_rows_are_whole_sentences_and_all_of_them_come(built):
    tokenizer = built.tokenizer()
    objective = resolve(Run(Seq2Seq(), Autoencode()), tokenizer).objective
    assert objective.start_id == tokenizer.eos_id
    batch, seen = Stream(built.split("train"), objective, 12).rows(0, 2000), set()
    for i in range(2000):
        source = batch["source_tokens_BS"][i][batch["source_documents_BS"][i] >= 0]
        target = batch["targets_BL"][i][batch["weights_BL"][i] > 0]
        np.testing.assert_array_equal(target, [*source, tokenizer.eos_id])
        np.testing.assert_array_equal(batch["tokens_BL"][i][: len(target)], [tokenizer.eos_id, *source])
        numbers, places = zip(*(word.split(".") for word in tokenizer.decode(source).split()), strict=True)
        assert len(set(numbers)) == 1 and places == tuple(str(j) for j in range(1 + int(numbers[0]) % 9))
        seen.add(numbers[0])
    assert len(seen) == 60


def test_sentences_longer_than_the_row_are_cut_and_have_no_end():
    source, out = noised(0)
    np.testing.assert_array_equal(source, TEXT)
    np.testing.assert_array_equal(out["targets_BL"], TEXT)
    short = noised(0, length=5)[1]
    assert short["targets_BL"][:6].tolist() == [0, 1, 2, 3, 4, END] and short["weights_BL"].sum() == 6


def test_deletion_is_of_each_word_and_swaps_are_of_neighbours():
    kept = [len(noised(seed, deleted=0.1)[0]) for seed in range(200)]
    # Binomial of 400 and 0.9, whose deviation is 6.
    assert abs(np.mean(kept) - 360) < 5 * 6 / 200**0.5 and 4 < np.std(kept) < 8
    source = noised(0, swapped=0.25)[0]
    moved = np.flatnonzero(source != TEXT)
    assert sorted(source) == TEXT.tolist() and set(np.abs(source - TEXT)) == {0, 1}
    assert 2 * 30 < len(moved) < 2 * 70 and (source[0::2] + source[1::2] == TEXT[0::2] + TEXT[1::2]).all()
    assert noised(0, swapped=1.0, length=5)[0].tolist() == [1, 0, 3, 2, 4]


def test_the_target_is_never_noised_and_a_source_without_words_is_padding():
    source, out = noised(0, deleted=1.0)
    assert not len(source) and (out["targets_BL"] == TEXT).all() and out["weights_BL"].all()


def test_a_window_in_which_no_sentence_begins_weighs_nothing():
    row = {"tokens": np.where(TEXT < 399, 6, END), "documents": np.zeros(400, np.int32), "split": None, "start": 7}
    out = Autoencode(ids=(END,), vocab_size=END).corrupt(np.random.default_rng(0), row)
    assert not out["weights_BL"].any() and (out["source_documents_BS"] == -1).all()


@pytest.mark.parametrize("settings", [{"deleted": -0.1}, {"swapped": 1.5}, {"deleted": 1.0, "swapped": 0.1}], ids=str)
def test_impossible_noise_is_refused(settings):
    with pytest.raises(UsageError, match="must be from 0 to 1|has no effect"):
        Autoencode(**settings)
