import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.layers.norm import norm

torch = pytest.importorskip("torch")


@pytest.mark.parametrize("kind", ["layernorm", "rmsnorm"])
@pytest.mark.parametrize("bias", [True, False])
def test_values_and_gradients_equal_torch(kind, bias):
    rng = np.random.default_rng(0)
    x, g = rng.standard_normal((2, 3, 5, 8)).astype(np.float32) + 1, rng.standard_normal((2, 3, 5, 8), np.float32)
    p = {"scale": rng.standard_normal(8, np.float32)}
    if bias:
        p["bias"] = rng.standard_normal(8, np.float32)
    tx, tp = torch.tensor(x, requires_grad=True), {k: torch.tensor(v, requires_grad=True) for k, v in p.items()}
    if kind == "layernorm":
        expected = torch.nn.functional.layer_norm(tx, (8,), tp["scale"], tp.get("bias"), 1e-5)
    else:
        expected = torch.nn.functional.rms_norm(tx, (8,), tp["scale"], 1e-5) + tp.get("bias", 0.0)
    (expected * torch.tensor(g)).sum().backward()
    dp, dx = jax.grad(lambda p, x: jnp.sum(norm(p, x, kind, 1e-5) * g), (0, 1))(p, x)
    np.testing.assert_allclose(norm(p, x, kind, 1e-5), expected.detach(), atol=1e-5)
    np.testing.assert_allclose(dx, tx.grad, atol=1e-5)
    for name in p:
        np.testing.assert_allclose(dp[name], tp[name].grad, atol=1e-5)


def test_a_scale_of_two_dimensions_takes_its_moments_over_both():
    rng = np.random.default_rng(0)
    x, scale = rng.standard_normal((2, 3, 4, 5), np.float32), rng.standard_normal((4, 5), np.float32)
    root = np.sqrt((x**2).mean((-2, -1), keepdims=True) + 1e-6)
    np.testing.assert_allclose(norm({"scale": scale}, x, "rmsnorm", 1e-6), x / root * scale, atol=1e-5)


def test_bfloat16_takes_its_moments_in_float32():
    x = jnp.full((1, 4096), 1.0, jnp.bfloat16).at[0, 0].set(3.0)
    y = norm({"scale": jnp.ones(4096)}, x, "rmsnorm", 0.0)
    # A bfloat16 sum of 4,096 ones stops at 256.
    assert y.dtype == jnp.bfloat16 and abs(float(y[0, 1]) - 1) < 0.01
