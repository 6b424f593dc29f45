import jax
import numpy as np

from lm.core import params as specs
from lm.models.decoder import Decoder
from lm.objectives.causal import Causal

ROW = {
    "tokens": np.array([5, 6, 7, 8, 9, 10, 0], np.int32),
    "documents": np.array([3, 3, 3, 4, 4, 4, -1], np.int32),
}
RNG = np.random.default_rng(0)


def test_each_target_is_the_next_token_and_padding_weighs_nothing():
    row = Causal().corrupt(RNG, ROW)
    np.testing.assert_array_equal(row["tokens_BL"], [5, 6, 7, 8, 9, 10])
    np.testing.assert_array_equal(row["targets_BL"], [6, 7, 8, 9, 10, 0])
    np.testing.assert_array_equal(row["weights_BL"], [1, 1, 1, 1, 1, 0])
    assert set(row) == {"tokens_BL", "targets_BL", "weights_BL"}
    assert Causal().window(6) == len(ROW["tokens"])
    assert [row[k].dtype for k in ("tokens_BL", "targets_BL", "weights_BL")] == [np.int32, np.int32, np.float32]


def test_isolated_documents_restart_and_their_first_token_is_not_predicted():
    row = Causal(isolate_documents=True).corrupt(RNG, ROW)
    np.testing.assert_array_equal(row["documents_BL"], [3, 3, 3, 4, 4, 4])
    np.testing.assert_array_equal(row["positions_BL"], [0, 1, 2, 0, 1, 2])
    np.testing.assert_array_equal(row["weights_BL"], [1, 1, 0, 1, 1, 0])


def test_terms_carry_sums_weights_and_one_coefficient():
    model = Decoder(layers=1, width=8, heads=2, vocab_size=128, valid_vocab_size=16, max_len=6)
    params = specs.initialize(model.spec(), jax.random.key(0))
    batch = {k: v[None] for k, v in Causal().corrupt(RNG, ROW).items()}
    terms = Causal(z_loss=1e-3).loss(model, params, batch)
    assert {name: term[2] for name, term in terms.items()} == {"loss": 1.0, "nll": 0.0, "accuracy": 0.0, "z_loss": 0.0}
    assert {float(term[1]) for term in terms.values()} == {5.0}
    # An untrained model is uniform over the real tokens; padding logits take no share.
    assert abs(terms["nll"][0] / 5 - np.log(16)) < 0.05
    assert np.isclose(terms["loss"][0], terms["nll"][0] + terms["z_loss"][0])
    training = Causal(z_loss=1e-3).loss(model, params, batch, key=jax.random.key(1))
    assert set(training) == set(terms) - {"accuracy"} and training["loss"][0] == terms["loss"][0]
