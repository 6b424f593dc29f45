import collections

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.core.errors import UsageError
from lm.objectives.span import Noise, SpanCorruption, partition
from tests.objectives.fake import Fake

PAD, END, FIRST = 1000, 1001, 1002
OBJECTIVE = SpanCorruption(ids=tuple(range(1000, 1102)), vocab_size=1000)
ROW = {"tokens": np.arange(568, dtype=np.int32), "documents": np.zeros(568, np.int32)}


def corrupt(seed, row=ROW, objective=OBJECTIVE):
    return objective.corrupt(np.random.default_rng(seed), row)


def parts(row):
    """(source, target) without padding and ends."""
    source = row["source_tokens_BS"][row["source_documents_BS"] >= 0].tolist()
    target = row["targets_BL"][row["weights_BL"] > 0].tolist()
    assert source.pop() == END and target.pop() == END
    return source, target


def restore(source, target, sentinels):
    """The text: each sentinel of the source as what follows it in the target."""
    spans = collections.defaultdict(list)
    for token in target:
        if token in sentinels:
            current = spans[token]
        else:
            current.append(token)
    return [t for token in source for t in (spans[token] if token in sentinels else [token])]


def test_five_hundred_and_twelve_places_take_568_tokens_and_114_targets_as_in_the_reference():
    assert OBJECTIVE.window(512) == 568
    for seed in range(20):
        row = corrupt(seed)
        assert {k: v.shape for k, v in row.items()} == {
            "source_tokens_BS": (512,),
            "source_documents_BS": (512,),
            "tokens_BL": (114,),
            "targets_BL": (114,),
            "weights_BL": (114,),
        }
        assert row["weights_BL"].sum() == 114 and (row["source_documents_BS"] == 0).all()


@pytest.mark.parametrize("seq_len", [4, 5, 16, 100, 511, 1024])
@pytest.mark.parametrize("settings", [{}, {"density": 0.5}, {"mean_span": 1.0}, {"density": 0.3, "mean_span": 20.0}])
def test_a_source_is_as_long_as_asked_for(seq_len, settings):
    objective = SpanCorruption(**settings, sentinels=1000, ids=tuple(range(5000, 6002)))
    window = objective.window(seq_len)
    row = corrupt(0, {"tokens": np.arange(window), "documents": np.zeros(window, np.int32)}, objective)
    assert row["source_tokens_BS"].shape == (seq_len,) and (row["source_documents_BS"] == 0).all()


def test_source_and_target_give_back_the_text():
    for seed in range(20):
        source, target = parts(corrupt(seed))
        assert restore(source, target, range(FIRST, FIRST + 100)) == list(range(568))


def test_sentinels_are_in_order_and_noise_is_exact():
    for seed in range(20):
        source, target = parts(corrupt(seed))
        ordered = list(range(FIRST, FIRST + 28))
        assert [t for t in source if t >= FIRST] == ordered and [t for t in target if t >= FIRST] == ordered
        assert len(target) - 28 == 85 == round(0.15 * 568)
        assert source[0] == 0 and target[-1] == 567  # Kept and lost spans take turns, kept first.


def test_descending_ids_are_sentinels_by_their_names():
    row = corrupt(0, objective=SpanCorruption(ids=(0, 1, *range(32099, 31999, -1))))
    for name in ("source_tokens_BS", "targets_BL"):
        assert [t for t in row[name] if t > 568] == list(range(32099, 32099 - 28, -1))


def test_the_decoder_reads_the_target_one_place_later():
    row = corrupt(3)
    np.testing.assert_array_equal(row["tokens_BL"], [PAD, *row["targets_BL"][:-1]])


def test_the_same_generator_gives_the_same_row_and_another_another():
    first, again, other = corrupt(1), corrupt(1), corrupt(2)
    assert all(np.array_equal(first[k], again[k]) for k in first)
    assert not np.array_equal(first["source_tokens_BS"], other["source_tokens_BS"])


@pytest.mark.parametrize("real", [0, 1, 2, 3, 100, 567])
def test_padding_is_never_read_or_predicted(real):
    documents = np.where(np.arange(568) < real, 0, -1)
    row = corrupt(0, ROW | {"documents": documents})
    assert row["source_tokens_BS"].shape == (512,) and row["targets_BL"].shape == (114,)
    if real == 0:
        assert row["weights_BL"].sum() == 0 and (row["source_documents_BS"] == -1).all()
        return
    source, target = parts(row)
    assert restore(source, target, range(FIRST, FIRST + 100)) == list(range(real))
    assert len(target) == sum(Noise().counts(real))


def test_all_partitions_are_equally_likely():
    rng = np.random.default_rng(0)
    found = collections.Counter(tuple(partition(rng, 5, 3).tolist()) for _ in range(6000))
    assert set(found) == {(1, 1, 3), (1, 3, 1), (3, 1, 1), (1, 2, 2), (2, 1, 2), (2, 2, 1)}
    assert all(abs(n - 1000) < 150 for n in found.values())  # 5 standard deviations.


@pytest.mark.slow
def test_a_model_that_guesses_evenly_pays_log_vocabulary_and_learns():
    objective = SpanCorruption(ids=(100, 101, *range(102, 120)), sentinels=18)
    window = objective.window(32)
    rows = [{"tokens": np.arange(i, i + window), "documents": np.zeros(window, np.int32)} for i in range(4)]
    corrupted = [corrupt(i, row, objective) for i, row in enumerate(rows)]
    batch = {k: jnp.array(np.stack([row[k] for row in corrupted])) for k in corrupted[0]}
    terms = objective.loss(Fake(), {"table": jnp.zeros((128, 8))}, batch)
    assert float(terms["loss"][1]) == float(batch["weights_BL"].sum()) == 4 * corrupted[0]["weights_BL"].sum()
    np.testing.assert_allclose(terms["loss"][0] / terms["loss"][1], np.log(120), rtol=1e-5)
    text = (batch["weights_BL"] > 0) & ~np.isin(batch["targets_BL"], objective.ids)
    params = {"table": jax.random.normal(jax.random.key(0), (128, 8))}
    terms = objective.loss(Fake(), params, batch)
    scores = jax.nn.log_softmax(Fake().logits(params["table"], Fake().apply(params, batch).hidden_BLD))
    nll = -np.take_along_axis(scores, batch["targets_BL"][..., None], -1)[..., 0]
    assert float(terms["text_nll"][1]) == text.sum() < batch["weights_BL"].sum()
    assert abs(nll[text].mean() - nll[~text].mean()) > 0.1
    np.testing.assert_allclose(terms["text_nll"][0], nll[text].sum(), rtol=1e-5)
    slope = jax.grad(lambda p: objective.loss(Fake(), p, batch)["loss"][0])(params)["table"]
    before, after = (
        objective.loss(Fake(), {"table": params["table"] - s * slope}, batch)["loss"][0] for s in (0, 0.01)
    )
    assert after < before


@pytest.mark.parametrize(
    ("settings", "seq_len", "message"),
    [
        ({"density": 0.0}, 512, "density=0"),
        ({"density": 1.0}, 512, "density=1"),
        ({"mean_span": 0.5}, 512, r"mean_span=0\.5"),
        ({"sentinels": 20}, 512, "28 spans"),
        ({}, 3, "seq_len=3"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, seq_len, message):
    with pytest.raises(UsageError, match=message):
        SpanCorruption(**settings).window(seq_len)
