"""What is handed on from batch to batch: the rows of a lane are one text."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lm.core import params as specs
from lm.core import tree
from lm.evals import perplexity
from lm.models.recurrent import Recurrent
from lm.models.xlnet import XLNet
from lm.objectives import carry as carries
from lm.objectives.causal import Causal
from lm.train import step

B, L, V, PARTS = 4, 6, 32, 3
MODELS = {
    "lstm": Recurrent(layers=2, width=8, tied=True, vocab_size=V),
    # Its memory holds all that came before, as long as the text is no longer.
    "xlnet": XLNet(layers=2, width=8, heads=2, vocab_size=V, causal=True, memory=L * PARTS),
}


def text():
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, V, (B, L * PARTS + 1)).astype(np.int32)
    weights = rng.integers(0, 2, (B, L * PARTS)).astype(np.float32)
    return {"tokens_BL": tokens[:, :-1], "targets_BL": tokens[:, 1:], "weights_BL": weights}


def parts(batch):
    return [{k: v[:, i * L : (i + 1) * L] for k, v in batch.items()} for i in range(PARTS)]


def weights_of(model):
    rng = np.random.default_rng(1)
    shapes = specs.abstract(model.spec())
    return jax.tree.map(lambda w: rng.normal(0, 0.5, w.shape).astype(np.float32), shapes)


@pytest.mark.parametrize("name", MODELS)
def test_windows_that_follow_one_another_are_scored_as_one_text(name):
    model, p = MODELS[name], weights_of(MODELS[name])
    evaluate = perplexity.make_evaluate(model, Causal())
    spec = carries.carry_spec(model, Causal(), B)
    carry = specs.initialize(spec, jax.random.key(0))
    whole = evaluate(p, None, [text()])
    pieces = evaluate(p, None, parts(text()), carry)
    apart = evaluate(p, None, parts(text()))
    np.testing.assert_allclose(pieces["nll"], whole["nll"], rtol=1e-5)
    assert abs(apart["nll"] - whole["nll"]) > 1e-3


@pytest.mark.parametrize("name", MODELS)
def test_accumulated_rows_keep_their_own_states(name):
    model = MODELS[name]
    spec = carries.carry_spec(model, Causal(), B)
    states = {}
    for accumulate in (1, 2):
        state = step.initialize(model.spec(), optax.sgd(0.1), jax.random.key(0), False, spec)
        take = jax.jit(step.make_step(model, Causal(), optax.sgd(0.1), accumulate=accumulate, carry_spec=spec))
        for part in parts(text())[:2]:
            state, metrics = take(state, part | {"resets_B": np.zeros(B, bool)}, 0.1, jax.random.key(0))
        states[accumulate] = tree.flatten({"params": state.params, "carry": state.carry, "loss": metrics["loss"]})
    for path, value in states[1].items():
        np.testing.assert_allclose(states[2][path], value, atol=1e-5, rtol=1e-5, err_msg=path)


def test_a_row_that_is_reset_starts_from_nothing_and_the_others_go_on():
    model = MODELS["lstm"]
    spec = carries.carry_spec(model, Causal(), B)
    full = jax.tree.map(jnp.ones_like, specs.initialize(spec, jax.random.key(0)))
    for leaf in jax.tree.leaves(carries.restart(spec, full, jnp.array([True, False, False, True]))):
        np.testing.assert_array_equal(leaf[:, 0], [0, 1, 1, 0])


def test_a_step_without_finite_numbers_keeps_the_states_too():
    model = MODELS["lstm"]
    spec = carries.carry_spec(model, Causal(), B)
    state = step.initialize(model.spec(), optax.sgd(0.1), jax.random.key(0), False, spec)
    before = jax.tree.map(jnp.ones_like, state.carry)
    take = step.make_step(model, Causal(), optax.sgd(0.1), poison=(0, 0), carry_spec=spec)
    state, _ = take(dataclasses.replace(state, carry=before), parts(text())[0], 0.1, jax.random.key(0))
    jax.tree.map(np.testing.assert_array_equal, state.carry, before)
