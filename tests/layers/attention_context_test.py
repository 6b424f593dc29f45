"""Attention over a sharded sequence: what one device computes, with equal work on each device."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.layers import attention_context as module
from lm.layers.attention import Form, attention
from lm.parallel.mesh import Mesh
from tests.layers.attention_test import FORMS

B, L, H, C = 4, 64, 4, 8
MESHES = {"seq4": (4, Mesh(seq=4, tensor=2, data=1)), "fewer_keys": (2, Mesh(seq=2, tensor=4, data=1))}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Several to a device, of queries and of keys."""
    monkeypatch.setattr(module, "MIN_QUERIES", 2)
    monkeypatch.setattr(module, "MAX_QUERIES", 4)


def draw(kv_heads, keys=L):
    rng = np.random.default_rng(0)
    shapes = (B, L, H, C), (B, keys, kv_heads, C), (B, keys, kv_heads, C), (B, L, H, C)
    return [jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in shapes]


def further(name):
    """What else a call is given."""
    rng = np.random.default_rng(1)
    if name == "documents":
        return {"documents": (jnp.asarray(np.sort(rng.integers(0, 3, (B, L)), 1)),) * 2}
    if name == "places":
        return {"places": (jnp.asarray(rng.permuted(np.tile(np.arange(L), (B, 1)), axis=1)),) * 2}
    if name == "bias":
        return {"bias": jnp.asarray(rng.standard_normal((1, H, L, L)), jnp.float32)}
    return {}


def sharded(mesh, function, *arrays):
    with jax.set_mesh(mesh.build(jax.devices()[:8])):
        return jax.jit(function)(*arrays)


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["alone", "documents", "places", "bias"])
def test_values_and_gradients_are_those_of_one_device(name, form, mesh):
    kv_heads, settings = MESHES[mesh]
    q, k, v, g = draw(kv_heads)
    given = further(name)
    bias = given.pop("bias", None)

    def gradients(q, k, v, bias):
        def weighed(q, k, v, bias):
            return jnp.sum(attention(FORMS[form], q, k, v, bias=bias, **given) * g)

        return jax.value_and_grad(weighed, (0, 1, 2) if bias is None else (0, 1, 2, 3))(q, k, v, bias)

    actual = sharded(settings, gradients, q, k, v, bias)
    expected = gradients(q, k, v, bias)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4, rtol=1e-5), actual, expected)


def test_queries_read_a_memory_of_another_length():
    q, k, v, _ = draw(2, keys=24)
    form = Form(causal=False)
    documents = jnp.zeros((B, L), int), (jnp.arange(24) >= 20).astype(int)[None].repeat(B, 0)
    actual = sharded(Mesh(seq=4, data=2), lambda *a: attention(form, *a, documents=documents), q, k, v)
    np.testing.assert_allclose(actual, attention(form, q, k, v, documents=documents), atol=1e-5)


def test_a_length_without_a_good_divisor_is_one_block(monkeypatch):
    monkeypatch.setattr(module, "MIN_QUERIES", 128)
    monkeypatch.setattr(module, "MAX_QUERIES", 512)
    assert [module._block(n) for n in (64, 128, 521, 1021, 1024, 1536)] == [64, 128, 521, 1021, 512, 512]


@pytest.mark.parametrize("window", [None, 20])
def test_devices_share_the_scores_of_a_causal_sequence_evenly(window):
    plan = module.Plan(Form(window=window), 4, L, L, anywhere=False, swapped=True)
    shares = plan.table[:, :, 2].mean(1)
    blocks = L // 4
    seen = sum(
        t * 4 <= i * 4 + 3 and (window is None or t * 4 + 3 > i * 4 - window) for i, t in np.ndindex(blocks, blocks)
    )
    assert plan.table[:, :, 2].sum() == seen
    assert (shares == 1).all() if window is None else shares.mean() > 0.8


def test_each_weight_is_dropped_by_itself_and_the_gradient_knows_which():
    form, key = Form(dropout=0.5), jax.random.key(0)
    q, k, v, g = draw(2)

    def loss(q, k, v):
        return jnp.sum(attention(form, q, k, v, key=key) * g)

    mesh = Mesh(seq=2, data=2, tensor=2)
    value, slopes = sharded(mesh, jax.value_and_grad(loss, (0, 1, 2)), q, k, v)
    move = 1e-2 * g, 1e-2 * v, 1e-2 * k
    ahead, back = (sharded(mesh, loss, *(x + s * d for x, d in zip((q, k, v), move, strict=True))) for s in (1, -1))
    np.testing.assert_allclose(
        (ahead - back) / 2, sum(jnp.vdot(s, d) for s, d in zip(slopes, move, strict=True)), rtol=2e-2
    )
    # The same of all rows and heads: what is left differs by what was dropped alone, and is right in the mean.
    same = (jnp.zeros_like(q), jnp.zeros_like(k), jnp.ones_like(v))
    kept_BLH = np.asarray(sharded(mesh, lambda *a: attention(form, *a, key=key), *same))[..., 0]
    assert len(np.unique(kept_BLH[:, L // 2 :].transpose(0, 2, 1).reshape(B * H, -1), axis=0)) == B * H
    np.testing.assert_allclose(kept_BLH[:, L // 2 :].mean(), 1, atol=0.02)
