"""Recurrent layers against torch's, forward and backward."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.core import params as specs
from lm.core.params import Uniform
from lm.layers.recurrent import CELLS, advance, input_gates, last, recurrent, recurrent_spec, state_gates, state_spec

L, B, D, H = 11, 3, 5, 4  # More than the 8 that are unrolled.
TORCH = {"elman": "RNN", "lstm": "LSTM", "gru": "GRU"}


def made(cell, dtype=np.float32):
    spec = recurrent_spec(cell, D, H, Uniform(0.5))
    p = specs.initialize(spec, jax.random.key(0))
    rng = np.random.default_rng(1)
    p["bias"] = p["bias"] + rng.standard_normal(p["bias"].shape, np.float32)
    x_LBD = rng.standard_normal((L, B, D)).astype(dtype)
    state = {k: rng.standard_normal(v.shape).astype(np.float32) for k, v in state_spec(cell, B, H).items()}
    return p, x_LBD, state


def zeros(cell):
    return specs.initialize(state_spec(cell, B, H), jax.random.key(0))


@pytest.mark.parametrize("cell", CELLS)
def test_outputs_and_all_gradients_are_torchs(cell):
    torch = pytest.importorskip("torch")
    p, x, state = made(cell)
    layer = getattr(torch.nn, TORCH[cell])(D, H)
    # Their gates are ours; a GRU's last one has the two biases apart.
    for ours, theirs in (("input", layer.weight_ih_l0), ("state", layer.weight_hh_l0)):
        theirs.data = torch.tensor(np.array(p[ours]).reshape(p[ours].shape[0], -1).T.copy())
    bias = np.array(p["bias"])
    layer.bias_ih_l0.data = torch.tensor(bias[:3].ravel() if cell == "gru" else bias.ravel())
    own = np.concatenate([np.zeros(2 * H, np.float32), bias[3]]) if cell == "gru" else np.zeros(bias.size, np.float32)
    layer.bias_hh_l0.data = torch.tensor(own)

    ours_x = torch.tensor(x, requires_grad=True)
    first = {k: torch.tensor(v[None], requires_grad=True) for k, v in state.items()}
    theirs, last = layer(ours_x, tuple(first.values()) if cell == "lstm" else first["h"])
    last = dict(zip(("h", "c"), last, strict=False)) if cell == "lstm" else {"h": last}
    slopes = np.random.default_rng(2).standard_normal((L, B, H)).astype(np.float32)
    (sum((last[k] ** 2).sum() for k in last) + (theirs * torch.tensor(slopes)).sum()).backward()

    def loss(p, x, state):
        states = recurrent(cell, p, x, state)
        return sum(jnp.sum(states[k][-1] ** 2) for k in states) + jnp.sum(states["h"] * slopes), states

    (dp, dx, dstate), states = jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(p, x, state)
    np.testing.assert_allclose(states["h"], theirs.detach(), atol=1e-5, rtol=1e-5)
    np.testing.assert_allclose(dx, ours_x.grad, atol=1e-5, rtol=1e-5)
    for k in state:
        np.testing.assert_allclose(dstate[k], first[k].grad[0], atol=1e-5, rtol=1e-5)
    for ours, theirs in (("input", layer.weight_ih_l0), ("state", layer.weight_hh_l0)):
        np.testing.assert_allclose(np.array(dp[ours]).reshape(len(dp[ours]), -1).T, theirs.grad, atol=2e-5, rtol=1e-5)
    if cell == "gru":
        np.testing.assert_allclose(dp["bias"][:3].ravel(), layer.bias_ih_l0.grad, atol=1e-5, rtol=1e-5)
        np.testing.assert_allclose(dp["bias"][3], layer.bias_hh_l0.grad[2 * H :], atol=1e-5, rtol=1e-5)
    else:
        np.testing.assert_allclose(dp["bias"].ravel(), layer.bias_ih_l0.grad, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("cell", CELLS)
def test_gradients_are_those_of_differentiating_token_by_token(cell):
    p, x, state = made(cell)
    slopes = np.random.default_rng(2).standard_normal((L, B, H)).astype(np.float32)

    def whole(p, x, state):
        states = recurrent(cell, p, x, state)
        return sum(jnp.sum(jnp.sin(s) * slopes) for s in states.values())

    def token_by_token(p, x, state):
        total = 0.0
        for t in range(L):
            gates = input_gates(cell, p["input"], x[t]) + p["bias"].reshape(1, -1)
            state = advance(cell, gates + state_gates(cell, p["state"], state["h"]), state)
            total += sum(jnp.sum(jnp.sin(s) * slopes[t]) for s in state.values())
        return total

    got, wanted = (jax.grad(f, (0, 1, 2))(p, x, state) for f in (whole, token_by_token))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5, rtol=1e-5), got, wanted)


@pytest.mark.parametrize("cell", CELLS)
def test_the_state_after_padding_is_that_after_the_last_token_or_before_any(cell):
    p, x, state = made(cell)
    states = recurrent(cell, p, x, state)
    left = last(state, states, np.array([3, 0, L]))
    for name, before in state.items():
        np.testing.assert_array_equal(left[name], [states[name][2, 0], before[1], states[name][-1, 2]])


@pytest.mark.parametrize("cell", CELLS)
def test_where_keep_is_zero_a_row_starts_anew(cell):
    p, x, state = made(cell)
    keep_LB = np.ones((L, B), np.float32)
    keep_LB[3, 1] = 0
    slopes = np.random.default_rng(2).standard_normal((L, B, H)).astype(np.float32)

    def marked(p, x, state):
        return recurrent(cell, p, x, state, keep_LB)["h"]

    def apart(p, x, state):
        whole = recurrent(cell, p, x, state)["h"]
        second = recurrent(cell, p, x[3:], zeros(cell))["h"]
        return whole.at[3:, 1].set(second[:, 1])

    np.testing.assert_allclose(marked(p, x, state), apart(p, x, state), atol=1e-6)
    got, wanted = (jax.grad(lambda *a, f=f: jnp.sum(f(*a) * slopes), (0, 1, 2))(p, x, state) for f in (marked, apart))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-5), got, wanted)


@pytest.mark.parametrize("cell", CELLS)
def test_half_precision_keeps_states_in_float32(cell):
    p, x, state = made(cell)
    states = recurrent(cell, p, jnp.asarray(x, jnp.bfloat16), state)
    assert {s.dtype for s in states.values()} == {jnp.dtype(jnp.float32)}
    # The products' inputs have 8 bits, and their rounding passes through a few steps.
    np.testing.assert_allclose(states["h"], recurrent(cell, p, x, state)["h"], atol=5e-2)


@pytest.mark.parametrize("cell", CELLS)
def test_half_precision_rounds_no_kernels_gradient(cell):
    p, x, state = made(cell)
    grads = jax.grad(lambda p: jnp.sum(recurrent(cell, p, jnp.asarray(x, jnp.bfloat16), state)["h"] ** 2))(p)
    for kernel in ("input", "state"):
        assert np.any(grads[kernel] != grads[kernel].astype(jnp.bfloat16).astype(jnp.float32)), kernel
