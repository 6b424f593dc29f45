"""Gated convolutions against torch's, forward and backward."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.core import params as specs
from lm.layers.gated_conv import gated_conv, gated_conv_spec

B, L, D, F, TAPS = 2, 9, 5, 4, 3


def made():
    rng = np.random.default_rng(0)
    p = specs.initialize(gated_conv_spec(TAPS, D, F), jax.random.key(0))
    p = jax.tree.map(lambda w: w + jnp.float32(0.1) * rng.standard_normal(w.shape, np.float32), p)
    return p, rng.standard_normal((B, L, D), np.float32), rng.standard_normal((B, TAPS - 1, D), np.float32)


def test_outputs_and_all_gradients_are_those_of_torch_with_weight_norm():
    torch = pytest.importorskip("torch")
    p, x, before = made()
    slopes = np.random.default_rng(1).standard_normal((B, L, F), np.float32)
    conv = torch.nn.utils.parametrizations.weight_norm(torch.nn.Conv1d(D, 2 * F, TAPS))
    weights = conv.parametrizations.weight
    weights.original1.data = torch.tensor(np.array(p["kernel"]).transpose(2, 3, 1, 0).reshape(2 * F, D, TAPS))
    weights.original0.data = torch.tensor(np.array(p["norm"]).reshape(2 * F, 1, 1))
    conv.bias.data = torch.tensor(np.array(p["bias"]).ravel())
    theirs_in = torch.tensor(np.concatenate([before, x], 1), requires_grad=True)
    theirs = torch.nn.functional.glu(conv(theirs_in.transpose(1, 2)), 1).transpose(1, 2)
    (theirs * torch.tensor(slopes)).sum().backward()

    def loss(p, x):
        y = gated_conv(p, x, before)
        return jnp.sum(y * slopes), y

    (dp, dx), ours = jax.grad(loss, (0, 1), has_aux=True)(p, x)
    np.testing.assert_allclose(ours, theirs.detach(), atol=1e-5, rtol=1e-5)
    np.testing.assert_allclose(dx, theirs_in.grad[:, TAPS - 1 :], atol=1e-5, rtol=1e-5)
    kernel = weights.original1.grad.reshape(2, F, D, TAPS).permute(3, 2, 0, 1)
    np.testing.assert_allclose(dp["kernel"], kernel, atol=1e-5, rtol=1e-5)
    np.testing.assert_allclose(dp["norm"].ravel(), weights.original0.grad.ravel(), atol=1e-5, rtol=1e-5)
    np.testing.assert_allclose(dp["bias"].ravel(), conv.bias.grad, atol=1e-5, rtol=1e-5)


def test_inputs_of_other_documents_count_as_zeros():
    p, x, before = made()
    documents = np.array([[0, 0, 0, 0, 1, 1, 1, 2, 2, 2, 2]] * B)
    together = gated_conv(p, x, before, documents)
    for first, last, start in ((0, 2, before), (2, 5, 0 * before), (5, 9, 0 * before)):
        alone = gated_conv(p, x[:, first:last], start)
        np.testing.assert_allclose(together[:, first:last], alone, atol=1e-6)


def test_a_new_layer_keeps_the_variance_of_its_input():
    p = specs.initialize(gated_conv_spec(4, 256, 512), jax.random.key(0))
    x = np.random.default_rng(0).standard_normal((4, 64, 256), np.float32)
    # Gates that are far from half open, as with unit inputs, pass somewhat more than a quarter.
    assert 1 < np.var(gated_conv(p, x, np.zeros((4, 3, 256), np.float32))) < 1.5
