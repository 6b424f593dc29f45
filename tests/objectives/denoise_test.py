import types

import numpy as np
import pytest

from lm.core.errors import UsageError
from lm.data import corpus
from lm.objectives import noises
from lm.objectives.denoise import Denoise
from tests.objectives.fake import Fake

START, END, MASK = 1000, 1001, 1002
STOP = 9  # Every tenth token ends a sentence.
ENDS = np.arange(1000) % 10 == STOP
TEXT = np.arange(400, dtype=np.int32)


def noised(noise, seed=0, text=TEXT):
    return noise.apply(np.random.default_rng(seed), text, MASK, ENDS).tolist()


def corrupt(seed, real=400, **settings):
    objective = Denoise(ids=(START, END, MASK), vocab_size=1000, **settings)
    split = types.SimpleNamespace(sentence_ends=ENDS)
    row = {"tokens": TEXT, "documents": np.where(np.arange(400) < real, 0, -1), "split": split}
    return objective.corrupt(np.random.default_rng(seed), row)


@pytest.mark.parametrize("seed", range(5))
def test_masking_replaces_its_share_one_by_one(seed):
    out = np.array(noised(noises.TokenMasking(0.15), seed))
    assert (out == MASK).sum() == 60 and (out[out != MASK] == TEXT[out != MASK]).all()


@pytest.mark.parametrize("seed", range(5))
def test_deletion_leaves_the_rest_in_order_and_no_trace(seed):
    out = noised(noises.TokenDeletion(0.15), seed)
    assert len(out) == 340 and out == sorted(set(out)) and MASK not in out


@pytest.mark.parametrize("seed", range(20))
def test_infilling_loses_its_share_and_keeps_the_rest_in_order(seed):
    out = noised(noises.TextInfilling(), seed)
    kept = [t for t in out if t != MASK]
    assert len(kept) == 400 - round(0.3 * 400) and kept == sorted(set(kept)) and len(out) <= 400


def test_infilled_spans_have_poisson_lengths_and_some_have_none():
    text = np.arange(20_000, dtype=np.int32)
    out = noised(noises.TextInfilling(), 0, text)
    spans = out.count(MASK)
    assert abs(spans - 2000) < 5 * np.sqrt(2000 / 3)  # 6,000 tokens in spans of 3, a renewal process.
    # Between neighbours with nothing between them, a [MASK] stands for nothing; spans that meet hide some of these.
    lone = sum(b == MASK and a + 1 == c for a, b, c in zip(out, out[1:], out[2:], strict=False))
    assert 0.5 < lone / (np.exp(-3) * spans) < 1.2


@pytest.mark.parametrize("length", [0, 1, 2, 3, 5])
@pytest.mark.parametrize("noise", [noises.TextInfilling(0.5), noises.TextInfilling(1.0), noises.TokenDeletion()])
def test_short_texts_never_grow(noise, length):
    assert all(len(noised(noise, seed, TEXT[:length])) <= length for seed in range(50))


@pytest.mark.parametrize("seed", range(5))
def test_permutation_moves_whole_sentences(seed):
    out = noised(noises.SentencePermutation(), seed)
    sentences = [tuple(out[i : i + 10]) for i in range(0, 400, 10)]
    assert all(s == tuple(range(s[0], s[0] + 10)) and s[0] % 10 == 0 for s in sentences)
    assert sorted(out) == list(range(400)) and out != sorted(out)


def test_stops_in_a_row_end_one_sentence_and_the_last_needs_none():
    text = np.array([1, 2, 9, 19, 29, 3, 9, 4, 5], np.int32)
    found = {tuple(noised(noises.SentencePermutation(), seed, text)) for seed in range(100)}
    assert len(found) == 6 and (4, 5, 3, 9, 1, 2, 9, 19, 29) in found


@pytest.mark.parametrize("seed", range(5))
def test_rotation_starts_somewhere_and_goes_round(seed):
    out = noised(noises.DocumentRotation(), seed)
    assert out == [*range(out[0], 400), *range(out[0])]


def test_the_target_is_the_text_between_start_and_end_whatever_the_noise():
    for seed in range(20):
        row = corrupt(seed)
        np.testing.assert_array_equal(row["targets_BL"], [START, *TEXT, END])
        np.testing.assert_array_equal(row["tokens_BL"], [END, START, *TEXT])
        assert row["weights_BL"].sum() == 402 and row["source_tokens_BS"].shape == (402,)
        source = row["source_tokens_BS"][row["source_documents_BS"] >= 0]
        assert source[0] == START and source[-1] == END and (source == MASK).sum() > 20
        assert len(source) == (row["source_documents_BS"] >= 0).cumprod().sum()


def test_noises_follow_one_another():
    both = (noises.TextInfilling(), noises.SentencePermutation())
    out = corrupt(0, noises=both)["source_tokens_BS"]
    kept = out[out < 400][1:-1]
    assert (out == MASK).any() and (np.diff(kept) < 0).any()
    alone = corrupt(0, noises=(noises.TokenMasking(0.15),))["source_tokens_BS"]
    assert (alone == MASK).sum() == 60 and (alone[1:-1][alone[1:-1] != MASK] == TEXT[alone[1:-1] != MASK]).all()


@pytest.mark.parametrize("chosen", [noises.TokenMasking(), noises.TokenDeletion(), noises.TextInfilling()])
def test_lost_are_the_targets_that_the_source_no_longer_has(chosen):
    for seed in range(5):
        row = corrupt(seed, real=350, noises=(noises.SentencePermutation(), chosen))
        missing = np.setdiff1d(np.arange(350), row["source_tokens_BS"][row["source_documents_BS"] >= 0])
        assert len(missing) == round(chosen.share * 350)
        np.testing.assert_array_equal(row["targets_BL"][row["lost_BL"] > 0], missing)


def test_the_same_generator_gives_the_same_row():
    first, again, other = corrupt(1), corrupt(1), corrupt(2)
    assert all(np.array_equal(first[k], again[k]) for k in first)
    assert not np.array_equal(first["source_tokens_BS"], other["source_tokens_BS"])


@pytest.mark.parametrize("real", [0, 1, 2, 100])
def test_padding_is_never_read_or_predicted(real):
    row = corrupt(0, real=real)
    assert row["weights_BL"].sum() == (real + 2 if real else 0) and row["targets_BL"].shape == (402,)
    assert set(row["targets_BL"][row["weights_BL"] > 0]) <= {START, END, *range(real)}
    assert set(row["source_tokens_BS"][row["source_documents_BS"] >= 0]) <= {START, END, MASK, *range(real)}


def test_a_corpus_knows_where_sentences_end(tmp_path):
    (tmp_path / "a.txt").write_text('One two. "Three!" four?\nFive 。six')
    split = corpus.build(f"text:{tmp_path / 'a.txt'}", "char", tmp_path / "c").split("train")
    pieces = corpus.Corpus(tmp_path / "c").tokenizer().pieces
    assert {p for p, end in zip(pieces, split.sentence_ends, strict=True) if end} == {".", "!", "?", "\n", "。"}


def test_sentence_piece_ends_documents_with_the_end_that_the_objective_asks_for(tmp_path):
    (tmp_path / "a.txt").write_text("One two. Three four.\n" * 50)
    built = corpus.build(f"text:{tmp_path / 'a.txt'}", "bpe:280", tmp_path / "c")
    tokenizer, ends = built.tokenizer(), built.split("train").sentence_ends
    assert tokenizer.special("</s>") == tokenizer.eos_id and tokenizer.special("[MASK]") is None
    assert tokenizer.special("<0x0A>") is None and ends[tokenizer.eos_id] and ends[tokenizer.encode("four.")[-1]]


def test_a_model_that_guesses_evenly_pays_log_vocabulary():
    objective = Denoise(ids=(117, 118, 119))
    split = types.SimpleNamespace(sentence_ends=ENDS[:100])
    row = {"tokens": np.arange(30), "documents": np.zeros(30), "split": split}
    batch = {k: v[None] for k, v in objective.corrupt(np.random.default_rng(0), row).items()}
    terms = objective.loss(Fake(), {"table": np.zeros((128, 8), np.float32)}, batch)
    assert float(terms["loss"][1]) == 32
    np.testing.assert_allclose(terms["loss"][0] / 32, np.log(120), rtol=1e-5)
    assert float(terms["lost_nll"][1]) == batch["lost_BL"].sum() == 9


def test_settings_that_cannot_be_are_refused():
    with pytest.raises(UsageError, match="noises"):
        Denoise(noises=())
    with pytest.raises(UsageError, match=r"share=1\.5"):
        noises.TokenMasking(1.5)
    with pytest.raises(UsageError, match="mean_span=0"):
        noises.TextInfilling(mean_span=0)
    with pytest.raises(UsageError, match="seq_len=3"):
        Denoise().window(3)
