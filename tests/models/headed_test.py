"""Models with a head for a task: what is pooled, what padding changes, and whose parameters fit."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from lm.core import config
from lm.core import params as specs
from lm.core.errors import UsageError
from lm.layers.heads import POOLS, TaskHead
from lm.models.decoder import Decoder
from lm.models.encoder import Encoder
from lm.models.headed import Headed, with_vocabulary
from lm.models.xlnet import XLNet
from lm.parallel import rules
from tests.models.contract_test import randomized

B, L, V = 8, 10, 64
SIZES: dict[str, Any] = {"layers": 2, "width": 32, "heads": 4, "vocab_size": V}
BASES = {
    "encoder": Encoder(**SIZES, max_len=L, outputs=()),
    "decoder": Decoder(**SIZES, positions="rotary", tied=False),
    "xlnet": XLNet(**SIZES),
}
TASKS = {
    "sequence": TaskHead("sequence", ("no", "so", "yes"), pool="mean", dense="tanh", norm_eps=1e-5),
    "tokens": TaskHead("tokens", ("O", "B", "I")),
    "span": TaskHead("span"),
    "choice": TaskHead("choice", pool="last_real"),
}


@pytest.fixture(params=[f"{base} {task}" for base in BASES for task in TASKS])
def model(request):
    base, task = request.param.split()
    return Headed(BASES[base], TASKS[task])


def make_batch(model):
    """Rows of which two thirds are text and the rest is padding at the end."""
    shape = (B, 3, L) if model.task.kind == "choice" else (B, L)
    tokens = np.random.default_rng(0).integers(0, V, shape, np.int32)
    return {"tokens_BL": tokens, "documents_BL": np.broadcast_to(np.where(np.arange(L) < 7, 0, -1), shape)}


def shapes(model):
    return {"sequence": (B, 3), "tokens": (B, L, 3), "span": (B, L, 2), "choice": (B, 3)}[model.task.kind]


def test_scores_have_the_shape_of_their_kind_and_padding_changes_none(model):
    params, batch = randomized(model, 0), make_batch(model)
    scores, out = model.scores(params, batch)
    assert scores.shape == shapes(model) and scores.dtype == jnp.float32 and out.hidden_BLD.shape[1:] == (L, 32)
    other = batch | {"tokens_BL": np.where(batch["documents_BL"] < 0, 5, batch["tokens_BL"])}
    real = (slice(None), slice(7)) if model.task.kind in ("tokens", "span") else ...
    np.testing.assert_allclose(model.scores(params, other)[0][real], scores[real], atol=1e-5)


def test_a_choice_is_scored_as_if_it_were_alone():
    model = Headed(BASES["encoder"], TASKS["choice"])
    params, batch = randomized(model, 0), make_batch(model)
    together = model.scores(params, batch)[0]
    alone = model.scores(params, {name: x[:, 1:2] for name, x in batch.items()})[0]
    np.testing.assert_allclose(alone[:, 0], together[:, 1], atol=1e-6)


def test_every_parameter_gets_a_gradient(model):
    if isinstance(model.base, XLNet):
        pytest.skip("segments and the mask vector take part only where a batch has them")
    params, batch = randomized(model, 0), make_batch(model)
    gradients = jax.jit(jax.grad(lambda p: jnp.sum(model.scores(p, batch)[0] ** 2)))(params)
    assert all(np.abs(g).max() > 0 for g in jax.tree.leaves(gradients))


def test_pools_are_the_places_that_they_name():
    x = jnp.arange(2 * 4 * 3, dtype=jnp.float32).reshape(2, 4, 3)
    real = jnp.array([[False, True, True, False], [True, True, True, True]])
    places = {"first": [0, 0], "last": [3, 3], "first_real": [1, 0], "last_real": [2, 3]}
    for pool in POOLS:
        pooled = TaskHead("choice", pool=pool).pooled(x, real)
        expected = (
            jnp.stack([x[0, 1:3].mean(0), x[1].mean(0)])
            if pool == "mean"
            else x[jnp.arange(2), jnp.array(places[pool])]
        )
        np.testing.assert_allclose(pooled, expected)


def test_padding_by_its_id_is_passed_over():
    model = Headed(BASES["decoder"], TaskHead("sequence", ("a", "b"), pool="last_real", pad_id=0))
    params, tokens = randomized(model, 0), np.array([[5, 6, 7, 0, 0], [5, 6, 7, 8, 9]])
    scores = model.scores(params, {"tokens_BL": tokens})[0]
    np.testing.assert_allclose(scores[0], model.scores(params, {"tokens_BL": tokens[:1, :3]})[0][0], atol=1e-6)


def test_a_pretrained_base_keeps_its_names():
    base = Decoder(**SIZES, max_len=L)
    spec = Headed(base, TASKS["tokens"]).spec()
    assert {name: part for name, part in spec.items() if name != "task"} == base.spec()
    assert "head" in BASES["decoder"].spec() and "head" not in Headed(BASES["decoder"], TASKS["tokens"]).spec()


def test_a_key_drops_before_the_scores():
    model = Headed(BASES["encoder"], dataclasses.replace(TASKS["tokens"], dropout=0.5))
    params, batch = randomized(model, 0), make_batch(model)
    plain, one, two = (model.scores(params, batch, key=key)[0] for key in (None, jax.random.key(0), jax.random.key(1)))
    assert not np.allclose(plain, one) and not np.allclose(one, two)


def test_a_mesh_gives_the_same_scores(model):
    params, batch = randomized(model, 0), make_batch(model)
    expected = model.scores(params, batch)[0]
    sizes = {"data": 2, "fsdp": 2, "tensor": 2}
    shape = tuple(sizes.get(axis, 1) for axis in rules.MESH_AXES)
    mesh = jax.make_mesh(shape, rules.MESH_AXES, axis_types=(AxisType.Auto,) * len(shape))
    with jax.set_mesh(mesh):
        sharded = jax.device_put(params, rules.shardings(model.spec(), mesh))
        batch = jax.device_put(batch, rules.batch_sharding(mesh))
        scores = jax.jit(lambda p, b: model.scores(p, b)[0])(sharded, batch)
    np.testing.assert_allclose(scores, expected, atol=1e-5)


def test_the_config_comes_back_from_json_and_takes_another_vocabulary(model):
    assert config.from_json(config.to_json(model)) == model
    grown = with_vocabulary(model, 128, 100)
    assert (grown.vocab_size, grown.valid_vocab_size) == (128, 100)
    assert specs.abstract(grown.spec())["embed"]["table"].shape == (128, 32)


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"kind": "spans"}, "did you mean span"),
        ({"labels": ()}, "alone need them"),
        ({"kind": "span"}, "alone need them"),
        ({"kind": "tokens", "pool": "mean"}, "have no effect with kind='tokens'"),
        ({"norm_eps": 1e-5}, "dense=None"),
        ({"dense": "tan"}, "did you mean tanh"),
        ({"dropout": 1.0}, "dropout=1.0"),
    ],
)
def test_settings_without_sense_or_effect_are_refused(settings, words):
    with pytest.raises(UsageError, match=words):
        TaskHead(**{"labels": ("a", "b")} | settings)


def test_a_base_that_scores_by_itself_is_refused():
    with pytest.raises(UsageError, match=r"set outputs=\(\)"):
        Headed(Encoder(**SIZES), TASKS["span"])


@pytest.mark.parametrize("settings", [{"tied": False}, {"head_bias": False}, {"head_activation": "relu"}], ids=str)
def test_settings_of_an_encoders_scores_without_the_scores_are_refused(settings):
    with pytest.raises(UsageError, match="have no effect with outputs=\\('pair',\\)"):
        Encoder(**SIZES, outputs=("pair",), **settings)
