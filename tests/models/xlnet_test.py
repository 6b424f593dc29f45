"""The model contract for XLNet, and what is its own: two streams, orders and a memory."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from lm.core import params as specs
from lm.core import tree
from lm.core.errors import UsageError
from lm.models.xlnet import XLNet
from lm.objectives.permutation import Permutation
from lm.parallel import rules
from tests.models.contract_test import assert_same, compiled, randomized

B, L, V = 8, 18, 128
MODELS = {
    "bi": XLNet(layers=2, width=32, heads=4, vocab_size=V, valid_vocab_size=V - 3),
    "uni": XLNet(layers=2, width=32, heads=4, vocab_size=V, valid_vocab_size=V - 3, causal=True, memory=20),
}
BI, UNI = MODELS["bi"], MODELS["uni"]


@pytest.fixture(params=MODELS)
def model(request):
    return MODELS[request.param]


def make_batch():
    objective, rng = Permutation(share=3, ids=(V - 5, V - 4)), np.random.default_rng(1)
    row = {"documents": np.repeat([0, 1], [6, 10]).astype(np.int32)}
    rows = [objective.corrupt(rng, row | {"tokens": rng.integers(0, V - 5, L - 2, np.int32)}) for _ in range(B)]
    return {name: np.stack([r[name] for r in rows]) for name in rows[0]}


def loss_and_gradients(model, params, batch, key=None):
    return compiled(model, Permutation(ids=(V - 5, V - 4)))(params, batch, key)


def reaches(model, params, batch, out):
    """Which tokens of row 0 change out(hidden [.., D])."""

    def value(table):
        hidden = model.apply(params | {"embed": {"table": table}}, batch).hidden_BLD
        return jnp.sum(out(hidden) * jnp.arange(model.width))

    gradient = jax.jit(jax.grad(value))(params["embed"]["table"])
    return np.abs(gradient[batch["tokens_BL"][0]]).max(-1) > 0


def test_hidden_states_and_logits_have_the_declared_shapes(model):
    params, batch = randomized(model, 0), make_batch()
    out = model.apply(params, batch, capture=("hidden_states",))
    P = batch["picks_BP"].shape[1]
    assert out.hidden_BLD.shape == (B, P, 32)
    assert out.captured["hidden_states"].shape == (3, B, L, 32)
    assert out.captured["query_states"].shape == (3, B, P, 32)
    logits = model.logits(model.head(params), jnp.ones((5, 32)))
    assert logits.shape == (5, V) and logits.dtype == jnp.float32 and logits[:, V - 3 :].max() <= -1e9


@pytest.mark.parametrize("place", [0, 3, 7])
def test_the_query_stream_sees_lower_places_only_and_never_its_own_token(place):
    params, order = randomized(BI, 0), np.random.default_rng(0).permutation(8) + 1
    order[:2] = 0  # Something to see for the first in the order.
    batch = {"tokens_BL": np.arange(8)[None], "order_BL": order[None], "picks_BP": np.array([[place]])}
    if order[place] == 0:
        batch["picks_BP"] = np.array([[2]])
        place = 2
    np.testing.assert_array_equal(reaches(BI, params, batch, lambda h: h[0, 0]), order < order[place])


def test_the_content_stream_sees_places_up_to_its_own():
    order = np.random.default_rng(0).permutation(8)
    batch = {"tokens_BL": np.arange(8)[None], "order_BL": order[None]}
    np.testing.assert_array_equal(reaches(BI, randomized(BI, 0), batch, lambda h: h[0, 5]), order <= order[5])


def test_without_an_order_a_causal_model_sees_no_later_token():
    seen = reaches(UNI, randomized(UNI, 0), {"tokens_BL": np.arange(8)[None]}, lambda h: h[0, 5])
    assert seen.tolist() == [True] * 6 + [False] * 2


def test_packing_does_not_leak(model):
    tokens, params = np.random.default_rng(0).integers(0, V - 3, (B, L)), randomized(model, 0)
    documents = np.repeat([[0] * 6 + [1] * (L - 6)], B, 0)
    together = model.apply(params, {"tokens_BL": tokens, "documents_BL": documents}).hidden_BLD
    alone = model.apply(params, {"tokens_BL": tokens[:, 6:]}).hidden_BLD
    np.testing.assert_allclose(together[:, 6:], alone, atol=1e-5, rtol=1e-5)


def test_segments_matter_by_same_or_different_alone():
    tokens, params = np.arange(8)[None], randomized(BI, 0)
    types = np.array([[0, 0, 0, 1, 1, 1, 2, 2]])
    a, b, c = (BI.apply(params, {"tokens_BL": tokens, "types_BL": t}).hidden_BLD for t in (types, 2 - types, types * 0))
    np.testing.assert_allclose(a, b, atol=1e-6)
    assert np.abs(a - c).max() > 1e-3


def test_segments_with_memory_equal_one_long_pass_in_a_causal_model():
    tokens, params = np.random.default_rng(0).integers(0, V - 3, (2, 20)), randomized(UNI, 0)
    whole = UNI.apply(params, {"tokens_BL": tokens}).hidden_BLD
    cache = specs.initialize(UNI.carry_spec(2), jax.random.key(0))
    parts = []
    for first in range(0, 20, 5):
        out = UNI.apply(params, {"tokens_BL": tokens[:, first : first + 5]}, cache=cache)
        cache = out.cache
        parts.append(out.hidden_BLD)
    np.testing.assert_allclose(np.concatenate(parts, 1), whole, atol=1e-5, rtol=1e-5)
    np.testing.assert_array_equal(cache["length"], [20, 20])


def test_memory_takes_no_gradient():
    params, tokens = randomized(UNI, 0), np.arange(5)[None]

    def kept(params):
        cache = specs.initialize(UNI.carry_spec(1), jax.random.key(0))
        return UNI.apply(params, {"tokens_BL": tokens}, cache=cache).cache["memory"].sum()

    assert all(not np.any(g) for g in jax.tree.leaves(jax.grad(kept)(params)))


@pytest.mark.slow
def test_scan_remat_and_the_unrolled_stack_agree_even_with_dropout(model):
    model = dataclasses.replace(model, dropout=0.1)
    params, batch, key = randomized(model, 0), make_batch(), jax.random.key(3)
    expected = loss_and_gradients(model, params, batch, key)
    for change in ({"scan": False}, {"remat": "full"}):
        assert_same(loss_and_gradients(dataclasses.replace(model, **change), params, batch, key), expected)


@pytest.mark.slow
def test_a_mesh_gives_the_same_loss_and_gradients(model):
    params, batch = randomized(model, 0), make_batch()
    expected = loss_and_gradients(model, params, batch)
    sizes = {"data": 2, "fsdp": 2, "tensor": 2}
    shape = tuple(sizes.get(axis, 1) for axis in rules.MESH_AXES)
    mesh = jax.make_mesh(shape, rules.MESH_AXES, axis_types=(AxisType.Auto,) * len(shape))
    with jax.set_mesh(mesh):
        sharded = jax.device_put(params, rules.shardings(model.spec(), mesh))
        batch = jax.device_put(batch, rules.batch_sharding(mesh))
        assert_same(loss_and_gradients(model, sharded, batch), expected)


def test_every_parameter_gets_a_gradient_and_a_step_down_lowers_the_loss(model):
    params, batch = randomized(model, 0), make_batch()
    loss, gradients = loss_and_gradients(model, params, batch)
    assert all(np.abs(g).max() > 0 for g in tree.flatten(gradients).values())
    lower = jax.tree.map(lambda p, g: p - 0.02 * g, params, gradients)
    assert loss_and_gradients(model, lower, batch)[0] < loss


@pytest.mark.slow
def test_bfloat16_agrees_with_float32_to_its_precision(model):
    params, batch = randomized(model, 0), make_batch()
    expected = loss_and_gradients(model, params, batch)
    loss, gradients = loss_and_gradients(dataclasses.replace(model, dtype="bfloat16"), params, batch)
    np.testing.assert_allclose(loss, expected[0], rtol=1e-2)
    flat, exact = (np.concatenate([g.ravel() for g in jax.tree.leaves(x)]) for x in (gradients, expected[1]))
    assert flat.dtype == np.float32 and np.linalg.norm(flat - exact) < 5e-2 * np.linalg.norm(exact)


@pytest.mark.parametrize(
    "settings", [{"clamp": 0}, {"memory": 0}, {"same_length": True}, {"heads": 5}, {"dropout": 1.0}], ids=str
)
def test_settings_without_sense_or_effect_are_refused(settings):
    with pytest.raises(UsageError, match="|".join(settings)):
        XLNet(**{"width": 48} | settings)


def test_a_memory_without_a_size_is_not_carried():
    assert BI.carry_spec(2) is None
