import jax
import numpy as np

from lm.core.params import Normal, initialize
from lm.layers.mlp import mlp, mlp_spec


def test_a_gated_layer_multiplies_the_activated_gate_with_the_plain_branch():
    p = initialize(mlp_spec(4, 6, True, False, Normal(1.0), Normal(1.0)), jax.random.key(0))
    x = np.random.default_rng(0).standard_normal((2, 3, 4), np.float32)
    gate, up, down = (np.asarray(p[name]["kernel"]) for name in ("gate", "up", "down"))
    expected = (np.maximum(x @ gate, 0) * (x @ up)) @ down
    np.testing.assert_allclose(mlp(p, x, "relu"), expected, atol=1e-5)
    plain = initialize(mlp_spec(4, 6, False, True, Normal(1.0), Normal(1.0)), jax.random.key(0))
    assert set(plain) == {"up", "down"} and set(plain["up"]) == {"kernel", "bias"}
