import jax
import numpy as np
import pytest

from lm.core import params as specs
from lm.core.errors import UsageError
from lm.models.xlnet import XLNet
from lm.objectives.permutation import Permutation

OBJECTIVE = Permutation(ids=(100, 101))
ROW = {"tokens": np.arange(60, dtype=np.int32), "documents": np.zeros(60, np.int32)}


def corrupt(seed, row=ROW):
    return OBJECTIVE.corrupt(np.random.default_rng(seed), row)


def test_a_sixth_is_predicted_last_in_the_order_and_targets_are_the_text():
    for seed in range(20):
        row = corrupt(seed)
        picks = row["picks_BP"]
        assert len(set(picks)) == 10 and (row["weights_BP"] == 1).all()
        np.testing.assert_array_equal(row["targets_BP"], ROW["tokens"][picks])
        np.testing.assert_array_equal(row["order_BL"][picks], np.arange(1, 11))
        assert np.delete(row["order_BL"], picks).max() == 0
    assert any((corrupt(s)["picks_BP"] != np.sort(corrupt(s)["picks_BP"])).any() for s in range(3))


def test_a_row_ends_with_separator_and_class():
    row = corrupt(0)
    np.testing.assert_array_equal(row["tokens_BL"], [*range(60), 100, 101])
    np.testing.assert_array_equal(row["types_BL"], [0] * 61 + [2])
    assert OBJECTIVE.window(62) == 60


def test_predicted_tokens_are_often_neighbours():
    neighbours = np.mean([np.mean(np.diff(np.sort(corrupt(s)["picks_BP"])) == 1) for s in range(50)])
    assert neighbours > 0.3  # Single tokens at random would have one in six.


def test_every_predicted_token_sees_something_of_its_document():
    documents = np.repeat(np.arange(30), 2).astype(np.int32)
    for seed in range(20):
        row = corrupt(seed, ROW | {"documents": documents})
        picks = row["picks_BP"][row["weights_BP"] > 0]
        for pick in picks:
            mine = np.flatnonzero(row["documents_BL"][:60] == documents[pick])
            assert (row["order_BL"][mine] == 0).any()


def test_padding_is_never_predicted():
    documents = np.where(np.arange(60) < 30, 0, -1).astype(np.int32)
    row = corrupt(0, ROW | {"documents": documents})
    assert row["weights_BP"].sum() == 5 and row["picks_BP"][row["weights_BP"] > 0].max() < 30
    assert corrupt(0, ROW | {"documents": np.full(60, -1, np.int32)})["weights_BP"].sum() == 0


def test_the_loss_of_an_untrained_model_is_that_of_a_uniform_guess():
    model = XLNet(layers=1, width=8, heads=2, vocab_size=128, valid_vocab_size=102)
    params = specs.initialize(model.spec(), jax.random.key(0))
    batch = {k: np.stack([corrupt(0)[k], corrupt(1)[k]]) for k in corrupt(0)}
    terms = OBJECTIVE.loss(model, params, batch)
    assert float(terms["loss"][1]) == 20 and abs(terms["nll"][0] / 20 - np.log(102)) < 0.1


def test_settings_that_leave_nothing_to_see_are_refused():
    with pytest.raises(UsageError, match="share=1"):
        Permutation(share=1)
    with pytest.raises(UsageError, match="seq_len=4"):
        OBJECTIVE.window(4)
