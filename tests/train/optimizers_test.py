"""Optimizers against torch, numpy, and themselves on one layer at a time."""

import dataclasses
import typing

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lm.core import params
from lm.core.errors import UsageError
from lm.core.params import Constant, Normal, Param
from lm.layers.moe import Experts, experts_spec
from lm.train import optimizers

SPEC = {
    "embed": Param((160, 130), ("vocab", "embed"), Normal(0.5), role="embedding"),
    "block": {
        "w": Param((3, 130, 4, 40), ("layers", "embed", "heads", "head_dim"), Normal(0.5), ("embed",)),
        "b": Param((3, 4, 40), ("layers", "heads", "head_dim"), Constant(0.3), role="vector"),
    },
}


def weights_and_grads(steps=4):
    weights = params.initialize(SPEC, jax.random.key(0))
    draw = lambda i: jax.tree.map(lambda x: jax.random.normal(jax.random.key(i), x.shape), weights)  # noqa: E731
    return weights, [draw(i) for i in range(1, steps + 1)]


def descend(transformation, weights, grads, rate=1e-2):
    state = transformation.init(weights)
    for g in grads:
        direction, state = transformation.update(g, state, weights)
        weights = jax.tree.map(lambda w, d: w - rate * d, weights, direction)
    return weights


def test_adamw_equals_torch_with_decay_on_all_but_vectors():
    torch = pytest.importorskip("torch")
    weights, grads = weights_and_grads()
    ours = descend(optimizers.AdamW(b1=0.9, b2=0.99, weight_decay=0.1, clip_norm=1.0).build(SPEC), weights, grads)
    leaves = [torch.tensor(np.array(x), requires_grad=True) for x in jax.tree.leaves(weights)]
    is_vector = [p.role == "vector" for p in jax.tree.leaves(SPEC, is_leaf=params.is_param)]
    groups = [{"params": [w], "weight_decay": 0.0 if v else 0.1} for w, v in zip(leaves, is_vector, strict=True)]
    theirs = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.99), eps=1e-8)
    for g in grads:
        for w, x in zip(leaves, jax.tree.leaves(g), strict=True):
            w.grad = torch.tensor(np.array(x))
        torch.nn.utils.clip_grad_norm_(leaves, 1.0)
        theirs.step()
    for a, b in zip(jax.tree.leaves(ours), leaves, strict=True):
        np.testing.assert_allclose(a, b.detach().numpy(), atol=2e-6)


@pytest.mark.parametrize(
    "config", [optimizers.Adafactor(), optimizers.Lamb(clip_norm=None), optimizers.Muon(clip_norm=None)]
)
def test_each_matrix_of_a_stack_moves_as_it_would_alone(config):
    weights, grads = weights_and_grads()
    whole = descend(config.build(SPEC), weights, grads)
    for layer in range(3):
        spec = {"block": jax.tree.map(lambda p: Param(p.shape[1:], p.axes[1:], p.init, p.inputs, p.role), SPEC["block"],
                                      is_leaf=params.is_param)}  # fmt: skip
        pick = lambda t, i=layer: {"block": jax.tree.map(lambda x: x[i], t["block"])}  # noqa: E731
        alone = descend(config.build(spec), pick(weights), [pick(g) for g in grads])
        for name in ("w", "b"):
            np.testing.assert_allclose(alone["block"][name], whole["block"][name][layer], atol=1e-5)


@pytest.mark.parametrize(
    "config", [pytest.param(optimizers.Adafactor(), marks=pytest.mark.slow), optimizers.Muon(clip_norm=None)]
)
def test_each_expert_of_each_layer_moves_as_it_would_alone_and_the_router_as_one_matrix(config):
    one = experts_spec(Experts(3, 2), 130, 140, True, Normal(0.5), Normal(0.5))
    spec = params.stack(one, 2)
    weights = params.initialize(spec, jax.random.key(0))
    grads = [jax.tree.map(lambda x, i=i: jax.random.normal(jax.random.key(i), x.shape), weights) for i in range(1, 4)]
    whole = descend(config.build(spec), weights, grads)
    single = {"router": one["router"], "up": {"kernel": Param((130, 140), ("embed", "mlp"), Normal(0.5), ("embed",))}}

    def pick(t):
        return {"router": {"kernel": t["router"]["kernel"][1]}, "up": {"kernel": t["up"]["kernel"][1, 2]}}

    alone = descend(config.build(single), pick(weights), [pick(g) for g in grads])
    for name in single:
        np.testing.assert_allclose(alone[name]["kernel"], pick(whole)[name]["kernel"], atol=1e-5)


def test_experts_and_router_decay():
    spec = experts_spec(Experts(3, 2), 4, 5, True, Normal(0.5), Normal(0.5))
    weights = params.initialize(spec, jax.random.key(0))
    zero = jax.tree.map(jnp.zeros_like, weights)
    transformation = optimizers.AdamW(weight_decay=0.1).build(spec)
    direction, _ = transformation.update(zero, transformation.init(weights), weights)
    jax.tree.map(lambda d, w: np.testing.assert_allclose(d, 0.1 * w, rtol=1e-6), direction, weights)


@pytest.mark.parametrize("form", [{}, {"factored": False, "momentum": 0.9}], ids=["factored", "palm"])
def test_adafactor_on_one_matrix_is_optax_adafactor(form):
    spec = {"w": Param((130, 140), ("embed", "mlp"), Normal(0.5), ("embed",))}
    weights = params.initialize(spec, jax.random.key(0))
    grads = [jax.tree.map(lambda x, i=i: jax.random.normal(jax.random.key(i), x.shape), weights) for i in range(1, 4)]
    ours = descend(optimizers.Adafactor(clip_norm=None, **form).build(spec), weights, grads, rate=1e-2)
    theirs, state = weights, (reference := optax.adafactor(1e-2, **form)).init(weights)
    for g in grads:
        updates, state = reference.update(g, state, theirs)
        theirs = optax.apply_updates(theirs, updates)
    np.testing.assert_allclose(ours["w"], theirs["w"], atol=1e-6)


def test_lamb_on_matrices_is_optax_lamb_and_on_vectors_adam():
    weights, grads = weights_and_grads()
    ours = descend(optimizers.Lamb(weight_decay=0.1, clip_norm=None).build(SPEC), weights, grads)
    adam = descend(optimizers.AdamW(b2=0.999, eps=1e-6, weight_decay=0.1, clip_norm=None).build(SPEC), weights, grads)
    theirs, state = weights, (reference := optax.lamb(1e-2, weight_decay=0.1)).init(weights)
    for g in grads:
        updates, state = reference.update(g, state, theirs)
        theirs = optax.apply_updates(theirs, updates)
    np.testing.assert_allclose(ours["embed"], theirs["embed"], atol=1e-5)
    np.testing.assert_allclose(ours["block"]["b"], adam["block"]["b"], atol=1e-6)


def test_adafactor_keeps_two_vectors_a_matrix():
    weights, _ = weights_and_grads()
    slots = sum(x.size for x in jax.tree.leaves(optimizers.Adafactor().build(SPEC).init(weights)))
    assert slots < 0.1 * params.count(SPEC)


def test_muon_orthogonalises_over_the_contracted_side():
    weights, grads = weights_and_grads(1)
    transformation = optimizers.Muon(weight_decay=0.0, clip_norm=None).build(SPEC)
    direction, _ = transformation.update(grads[0], transformation.init(weights), weights)
    for matrix in np.asarray(direction["block"]["w"]).reshape(3, 130, 160):
        singular = np.linalg.svd(matrix, compute_uv=False) / (0.2 * 160**0.5)
        assert singular.min() > 0.5 and singular.max() < 1.3


def test_a_group_changes_its_own_parameters_alone():
    weights, grads = weights_and_grads(1)
    base, slow = optimizers.AdamW(), optimizers.AdamW(groups=(optimizers.Group("embedding", 0.1, 0.0),))
    a, b = (
        config.build(SPEC).update(grads[0], config.build(SPEC).init(weights), weights)[0] for config in (base, slow)
    )
    np.testing.assert_array_equal(a["block"]["w"], b["block"]["w"])
    np.testing.assert_allclose(b["embed"], 0.1 * (a["embed"] - 0.1 * weights["embed"]), atol=1e-6)


def test_a_group_that_selects_nothing_is_refused():
    with pytest.raises(UsageError, match="selects no parameter"):
        optimizers.AdamW(groups=(optimizers.Group("router", 0.1),)).build(SPEC)


@pytest.mark.parametrize("optimizer", typing.get_args(optimizers.Optimizer))
def test_a_parameter_that_is_not_trainable_has_no_slots_and_changes_nothing_for_the_others(optimizer):
    fixed = {"fixed": Param((130, 140), ("embed", "mlp"), Normal(0.5), ("embed",), trainable=False)}
    settings = {"weight_decay": 0.1, "clip_norm": 1.0, "groups": (optimizers.Group(".", 2.0, 0.2),)}
    config = optimizer(**{f.name: settings[f.name] for f in dataclasses.fields(optimizer) if f.name in settings})
    weights, grads = weights_and_grads(2)
    frozen = params.initialize(fixed, jax.random.key(5))
    alone, beside = config.build(SPEC), config.build(SPEC | fixed)
    after = descend(beside, weights | frozen, [g | frozen for g in grads])
    jax.tree.map(np.testing.assert_array_equal, after, descend(alone, weights, grads) | frozen)
    shapes = [jax.tree.map(jnp.shape, t.init(w)) for t, w in ((alone, weights), (beside, weights | frozen))]
    assert shapes[0] == shapes[1]


def test_lion_moves_by_the_sign():
    weights, grads = weights_and_grads(1)
    transformation = optimizers.Lion(weight_decay=0.0).build(SPEC)
    direction, _ = transformation.update(grads[0], transformation.init(weights), weights)
    assert all(np.all(np.abs(x) == 1) for x in jax.tree.leaves(jax.tree.map(jnp.asarray, direction)))
