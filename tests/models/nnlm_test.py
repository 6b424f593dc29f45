"""The neural probabilistic language model, against its equation."""

import dataclasses

import jax
import numpy as np
import pytest
from jax.sharding import AxisType

from lm.core import params as specs
from lm.core.errors import UsageError
from lm.models.nnlm import NNLM
from lm.objectives.causal import Causal
from lm.parallel import rules

B, L, V = 8, 10, 24
MODEL = NNLM(context=3, width=6, hidden=8, direct=True, vocab_size=V, valid_vocab_size=V - 2)
TOKENS = np.random.default_rng(0).integers(0, V - 2, (B, L)).astype(np.int32)


def randomized(model):
    weights = specs.initialize(model.spec(), jax.random.key(0))
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda w: np.float32(w + 0.1 * rng.standard_normal(w.shape)), weights)


def logits(model, params, batch):
    return model.logits(model.head(params), model.apply(params, batch).hidden_BLD)


def test_logits_are_those_of_equation_1():
    p = randomized(MODEL)
    got = logits(MODEL, p, {"tokens_BL": TOKENS})
    for row, t in ((0, 0), (3, 1), (5, 9)):
        earlier = [p["embed"]["table"][TOKENS[row, t - i]] if t >= i else np.zeros(6) for i in range(3)]
        x = np.concatenate(earlier)
        h = np.tanh(p["layer_0"]["bias"] + x @ p["layer_0"]["kernel"])
        y = p["head"]["bias"] + p["head"]["table"] @ np.concatenate([h, x])
        np.testing.assert_allclose(got[row, t, : V - 2], y[: V - 2], atol=1e-5, rtol=1e-5)
    assert got[..., V - 2 :].max() <= -1e9


def test_a_place_sees_its_context_and_nothing_else():
    p = randomized(MODEL)
    for documents, seen in ((None, [4, 5, 6]), (np.repeat([[0] * 5 + [1] * 5], B, 0), [5, 6])):
        batch = {"tokens_BL": TOKENS} | ({} if documents is None else {"documents_BL": documents})
        base = MODEL.apply(p, batch).hidden_BLD[:, 6]
        moved = []
        for t in range(L):
            other = batch | {"tokens_BL": np.where(np.arange(L) == t, (TOKENS + 1) % (V - 2), TOKENS)}
            if np.abs(MODEL.apply(p, other).hidden_BLD[:, 6] - base).max() > 0:
                moved.append(t)
        assert moved == seen


@pytest.mark.slow
def test_a_mesh_gives_the_same_loss_and_it_falls():
    model = dataclasses.replace(MODEL, layers=2, activation="gelu")
    p = randomized(model)
    batch = {"tokens_BL": TOKENS, "targets_BL": TOKENS[:, ::-1], "weights_BL": np.ones((B, L), np.float32)}

    def loss(p, batch):
        terms = Causal().loss(model, p, batch)
        return terms["loss"][0] / terms["loss"][1]

    value, gradient = jax.value_and_grad(loss)(p, batch)
    assert loss(jax.tree.map(lambda w, g: w - 0.05 * g, p, gradient), batch) < value
    shape = tuple({"data": 2, "fsdp": 2, "tensor": 2}.get(axis, 1) for axis in rules.MESH_AXES)
    mesh = jax.make_mesh(shape, rules.MESH_AXES, axis_types=(AxisType.Auto,) * len(shape))
    with jax.set_mesh(mesh):
        sharded = jax.device_put(p, rules.shardings(model.spec(), mesh))
        np.testing.assert_allclose(
            jax.jit(loss)(sharded, jax.device_put(batch, rules.batch_sharding(mesh))), value, rtol=2e-6
        )


def test_settings_that_cannot_be_are_refused():
    with pytest.raises(UsageError, match="context=0"):
        NNLM(context=0)
    with pytest.raises(UsageError, match="cache"):
        MODEL.apply(randomized(MODEL), {"tokens_BL": TOKENS}, cache={})
