"""Reversible layers against the same layers, differentiated as they stand."""

import jax
import jax.numpy as jnp
import numpy as np

from lm.layers.reversible import plain, reversible

REPEATS, D = 5, 8
SEEN = []


def first(p, x, own, shared, kept):
    """A half that keeps a choice, which rounding could change: signs of x."""
    signs = jnp.sign(x) if kept is None else kept
    SEEN.append(kept is None)
    kept_share = jax.random.bernoulli(own, 0.7, x.shape)
    return jnp.tanh(x @ p["w"]) * signs * shared * kept_share, signs


def second(p, x, own, shared, kept):
    return jnp.sin(x @ p["w"]) + p["b"][None], None


def loss(run):
    def function(params, streams):
        a, b = run((first, second), 1, params, jax.random.split(jax.random.key(2), REPEATS), 0.5, streams)
        return jnp.sum(jnp.square(a)) + jnp.sum(a * b)

    return function


def test_gradients_are_those_of_the_plain_stack_with_dropout_and_choices_that_are_kept():
    rng = np.random.default_rng(0)
    params = (
        {"w": rng.standard_normal((REPEATS, D, D)).astype(np.float32)},
        {"w": rng.standard_normal((REPEATS, D, D)).astype(np.float32), "b": np.ones((REPEATS, D), np.float32)},
    )
    streams = tuple(rng.standard_normal((3, D)).astype(np.float32) for _ in range(2))
    expected = jax.value_and_grad(loss(lambda *x: plain(*x)[0]), (0, 1))(params, streams)
    SEEN.clear()
    found = jax.value_and_grad(loss(reversible), (0, 1))(params, streams)
    assert SEEN == [True, False]  # Chosen once, and read in the backward pass.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-4), found, expected)
