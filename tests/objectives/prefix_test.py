import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.layers.block import Layer
from lm.models.decoder import Decoder
from lm.objectives.prefix import Prefix
from tests.models.contract_test import randomized

ROW = {"tokens": np.arange(13, dtype=np.int32), "documents": np.zeros(13, np.int32)}
MODEL = Decoder(layers=2, width=16, heads=2, vocab_size=64, max_len=12)


def test_only_what_follows_the_prefix_is_predicted():
    found = set()
    for seed in range(200):
        row = Prefix().corrupt(np.random.default_rng(seed), ROW)
        found.add(int(row["prefix_B"]))
        np.testing.assert_array_equal(row["weights_BL"], row["targets_BL"] >= row["prefix_B"])
        assert row["weights_BL"].sum() > 0
    assert found == set(range(1, 13))


def test_the_prefix_sees_itself_and_nobody_sees_the_future():
    params = randomized(MODEL, 0)

    def reached(t):
        def hidden(table):
            batch = {"tokens_BL": jnp.arange(12)[None], "prefix_B": jnp.array([5])}
            out = MODEL.apply(params | {"embed": {"table": table}}, batch)
            return jnp.sum(out.hidden_BLD[0, t] * jnp.arange(16))

        gradient = jax.grad(hidden)(params["embed"]["table"])
        return (np.abs(gradient[:12]).max(-1) > 0).tolist()

    assert reached(0) == reached(4) == [True] * 5 + [False] * 7
    assert reached(5) == [True] * 6 + [False] * 6
    assert reached(11) == [True] * 12


def test_a_prefix_of_one_token_is_the_causal_model():
    params, tokens = randomized(MODEL, 0), jnp.arange(12)[None]
    one = MODEL.apply(params, {"tokens_BL": tokens, "prefix_B": jnp.array([1])}).hidden_BLD
    np.testing.assert_allclose(one, MODEL.apply(params, {"tokens_BL": tokens}).hidden_BLD, atol=1e-5)


def test_a_prefix_with_windows_is_refused():
    model = dataclasses.replace(MODEL, pattern=(Layer(window=3),))
    with pytest.raises(ValueError, match="prefix_B"):
        model.apply(randomized(model, 0), {"tokens_BL": jnp.arange(12)[None], "prefix_B": jnp.array([5])})
