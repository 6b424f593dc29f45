"""Logits with a bias: as a sum, and as one column more of the table."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.layers.embed import MASKED_LOGIT, biased_logits

VALID = 13


@pytest.mark.parametrize("tokens", [3, 40])  # Fewer than features, and more.
@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-5), ("bfloat16", 2e-2)])
def test_values_and_gradients_are_those_of_the_sum(tokens, dtype, tolerance):
    shapes = (2, tokens, 64), (16, 64), (16,), (2, tokens, VALID)
    x, table, bias, cotangent = (jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate(shapes))
    x, head = x.astype(dtype), {"table": table, "bias": bias}

    def plain(head, x):
        y = jnp.einsum("btd,vd->btv", x, head["table"].astype(dtype), preferred_element_type=jnp.float32)
        return (0.5 * y + head["bias"][None, None])[..., :VALID]

    def ours(head, x):
        return biased_logits(head, x, VALID, 0.5)[..., :VALID]

    assert (biased_logits(head, x, VALID, 0.5)[..., VALID:] < MASKED_LOGIT / 2).all()
    results = []
    for function in (ours, plain):
        value, pull = jax.vjp(function, head, x)
        results.append(jax.tree.leaves((value, pull(cotangent))))
    for got, want in zip(*results, strict=True):
        np.testing.assert_allclose(np.float32(got), np.float32(want), rtol=tolerance, atol=10 * tolerance)
