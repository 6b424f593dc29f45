import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.core import params as specs
from lm.core.errors import UsageError
from lm.models.encoder import Encoder
from lm.objectives.mlm import MaskedLM, pick

V, W = 1000, 126
MASK, CLS, SEP = IDS = (V, V + 1, V + 2)
# One id in three begins a word.
SPLIT = types.SimpleNamespace(word_starts=np.arange(V) % 3 == 0)


def make_row(seed=0, real=W, start=0, epoch=0):
    text = np.random.default_rng(seed).integers(0, V, W).astype(np.int32)
    documents = np.where(np.arange(W) < real, 0, -1).astype(np.int32)
    place = {"split": SPLIT, "start": start, "epoch": epoch, "seed": 0, "index": 0}
    return {"tokens": text, "documents": documents} | place


def corrupt(row, seed=0, **settings):
    return MaskedLM(**settings, ids=IDS, vocab_size=V).corrupt(np.random.default_rng(seed), row)


def picks_of(batch):
    return batch["picks_BP"][batch["weights_BP"] > 0]


def test_a_row_is_the_text_in_its_marks_with_15_percent_hidden():
    row = make_row()
    batch = corrupt(row)
    whole = np.array([CLS, *row["tokens"], SEP])
    picks = picks_of(batch)
    assert len(set(picks)) == 19 == round(0.15 * W) and 1 <= picks.min() and picks.max() <= W
    np.testing.assert_array_equal(batch["targets_BP"], whole[batch["picks_BP"]])
    np.testing.assert_array_equal(np.delete(batch["tokens_BL"], picks), np.delete(whole, picks))
    assert MaskedLM().window(W + 2) == W


def test_hidden_tokens_become_masks_random_tokens_and_themselves_in_their_shares():
    batches = [corrupt(make_row(seed), seed) for seed in range(400)]
    now = np.concatenate([b["tokens_BL"][b["picks_BP"]] for b in batches])
    target = np.concatenate([b["targets_BP"] for b in batches])
    masked, same = now == MASK, now == target
    n = len(now)
    for share, found in ((0.8, masked), (0.1, same), (0.1, ~masked & ~same)):
        # One in 1,000 random tokens is the target by chance.
        assert abs(found.mean() - share) < 5 * np.sqrt(share * (1 - share) / n) + 1e-3
    drawn = now[~masked & ~same]
    assert drawn.max() < V and abs(drawn.mean() - V / 2) < 5 * V / np.sqrt(12 * len(drawn))


def test_padding_is_never_predicted_and_one_token_always_is():
    for real in (0, 1, 2, 3, 50, W):
        batch = corrupt(make_row(real=real), unit="word", max_ngram=3)
        picks = picks_of(batch)
        assert len(picks) <= min(real, max(1, round(0.15 * real))) and (real == 0 or len(picks) >= 1)
        assert ((1 <= picks) & (picks <= real)).all()
        assert batch["tokens_BL"][0] == CLS and batch["tokens_BL"][real + 1] == SEP
        np.testing.assert_array_equal(batch["documents_BL"], [0] * (real + 2) + [-1] * (W - real))


def test_special_tokens_in_the_text_are_never_predicted():
    row = make_row()
    row["tokens"][::2] = SEP
    assert (corrupt(row)["targets_BP"] < V).all() and corrupt(row)["weights_BP"].sum() == round(0.15 * W / 2)


def test_dynamic_masks_differ_from_example_to_example_and_are_the_same_for_the_same():
    row = make_row()
    assert not np.array_equal(corrupt(row, 0)["picks_BP"], corrupt(row, 1)["picks_BP"])
    for name, array in corrupt(row, 0).items():
        np.testing.assert_array_equal(array, corrupt(row, 0)[name])


def test_static_masks_depend_on_the_place_in_the_text_and_the_copy_alone():
    first = corrupt(make_row(start=300), 0, copies=2)
    for name, array in corrupt(make_row(start=300, epoch=4), 1, copies=2).items():
        np.testing.assert_array_equal(array, first[name])
    assert not np.array_equal(corrupt(make_row(start=300, epoch=1), 0, copies=2)["picks_BP"], first["picks_BP"])
    assert not np.array_equal(corrupt(make_row(start=301), 0, copies=2)["picks_BP"], first["picks_BP"])


def test_static_masks_move_with_the_text_when_windows_begin_elsewhere():
    text = make_row()["tokens"]
    here = corrupt(make_row(start=300), copies=1)
    there = corrupt(make_row(start=310) | {"tokens": np.append(text[10:], text[:10])}, copies=1)
    shared = set(picks_of(here)) & set(picks_of(there) + 10)
    assert len(shared) >= 15  # Of 19: those at the ends are seen by one window alone.


@pytest.mark.parametrize("max_ngram", [1, 3])
def test_words_are_hidden_whole(max_ngram):
    for seed in range(50):
        row = make_row(seed)
        batch = corrupt(row, seed, unit="word", max_ngram=max_ngram)
        hidden = np.isin(np.arange(1, W + 1), picks_of(batch))
        begins = SPLIT.word_starts[row["tokens"]]
        begins[0] = True
        word = np.cumsum(begins)
        assert all(len(set(hidden[word == w])) == 1 for w in set(word))
        assert 0 < hidden.sum() <= 19


def test_a_word_ends_where_its_document_does():
    row = make_row() | {"documents": np.repeat(np.arange(W // 3), 3)}
    row["tokens"][:] = 1  # Never a begin.
    for seed in range(20):
        assert (np.bincount((picks_of(corrupt(row, seed, unit="word")) - 1) // 3) % 3 == 0).all()


def test_a_word_longer_than_the_number_is_hidden_in_part():
    row = make_row()
    row["tokens"][:] = 1
    assert corrupt(row, unit="word")["weights_BP"].sum() == 19


def test_the_length_of_a_run_follows_equation_2():
    objective = MaskedLM(max_ngram=3, ids=IDS, vocab_size=V)
    lengths = []
    for seed in range(3000):
        noise = np.random.default_rng(seed).random((50, 4))
        noise[0, 0] = -1  # The run at the first token is drawn first.
        picks = objective._picks(np.arange(50) < 40, np.ones(50, bool), noise, 3)
        lengths.append(next(n for n in (3, 2, 1) if set(range(n)) <= set(picks)))
    share = np.bincount(lengths, minlength=4)[1:] / 3000
    # Later runs may touch the first: 2 of 40 places for each, hence the margin.
    np.testing.assert_allclose(share, np.array([6, 3, 2]) / 11, atol=0.05)


def test_the_loss_of_an_untrained_model_is_that_of_a_uniform_guess_over_hidden_tokens():
    model = Encoder(layers=1, width=16, heads=2, vocab_size=1024, valid_vocab_size=V + 3, max_len=128)
    params = specs.initialize(model.spec(), jax.random.key(0))
    rows = [corrupt(make_row(real=real)) for real in (W, 60)]
    batch = {k: np.stack([row[k] for row in rows]) for k in rows[0]}
    terms = MaskedLM(ids=IDS, vocab_size=V).loss(model, params, batch)
    assert float(terms["loss"][1]) == 19 + 9 and abs(terms["nll"][0] / 28 - np.log(V + 3)) < 0.1


def test_the_loss_is_a_mean_over_the_hidden_tokens_given_the_corrupted_text():
    model = Encoder(layers=1, width=16, heads=2, vocab_size=V + 3, max_len=128, init_std=0.3)
    params = specs.initialize(model.spec(), jax.random.key(0))
    batch = {k: v[None] for k, v in corrupt(make_row(real=60)).items()}
    hidden = model.apply(params, {k: batch[k] for k in ("tokens_BL", "documents_BL")}).hidden_BLD
    scores = jax.nn.log_softmax(model.logits(model.head(params), hidden[0]))
    picks, targets = batch["picks_BP"][0, :9], batch["targets_BP"][0, :9]
    terms = MaskedLM(ids=IDS, vocab_size=V).loss(model, params, batch)
    np.testing.assert_allclose(terms["loss"][0] / terms["loss"][1], -scores[picks, targets].mean(), rtol=1e-5)
    masked = batch["tokens_BL"][0, picks] == MASK
    assert 0 < masked.sum() < 9 and float(terms["masked_nll"][1]) == masked.sum()
    masked_nll = -scores[picks, targets][masked].sum()
    np.testing.assert_allclose(terms["masked_nll"][0], masked_nll, rtol=1e-5)
    x_BLD = jnp.arange(24.0).reshape(2, 4, 3)
    np.testing.assert_array_equal(pick(x_BLD, {"picks_BP": jnp.array([[3, 0], [1, 1]])})[:, 0], x_BLD[[0, 1], [3, 1]])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rate": 0.0}, "rate=0.0"),
        ({"mask_share": 0.9, "random_share": 0.2}, "random_share=0.2"),
        ({"unit": "words"}, "did you mean word"),
        ({"copies": 0}, "copies=0"),
        ({"max_ngram": 0}, "max_ngram=0"),
    ],
)
def test_settings_without_sense_are_refused(settings, message):
    with pytest.raises(UsageError, match=message):
        MaskedLM(**settings)
