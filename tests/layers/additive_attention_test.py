"""Additive attention; its values and gradients are compared with torch's in the tests of Seq2Seq."""

import jax
import jax.numpy as jnp
import numpy as np

from lm.core import params as specs
from lm.core.params import Uniform
from lm.layers.additive_attention import additive_spec, as_source, attentive
from lm.layers.recurrent import recurrent_spec

L, S, B, D, H = 3, 4, 2, 6, 5


def test_half_precision_rounds_no_kernels_gradient():
    spec = {"cell": recurrent_spec("gru", 2 * D, H, Uniform(0.5)), "attention": additive_spec(H, D, H, Uniform(0.5))}
    params = specs.initialize(spec, jax.random.key(0))
    rng = np.random.default_rng(1)
    x, memory = (jnp.asarray(rng.standard_normal(s), jnp.bfloat16) for s in ((L, B, D), (B, S, D)))
    state = {"h": rng.standard_normal((B, H)).astype(np.float32)}

    def loss(p):
        source = as_source(p["attention"], memory, jnp.ones((B, S)))
        return jnp.sum(attentive("gru", p["cell"], p["attention"], x, state, source)[0]["h"] ** 2)

    grads = jax.grad(loss)(params)
    for kernel in (grads["cell"]["input"], grads["cell"]["state"], grads["attention"]["query"]):
        assert np.any(kernel != kernel.astype(jnp.bfloat16).astype(jnp.float32))
