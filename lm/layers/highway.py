"""Highway layers: each feature is a gated mixture of what a layer makes of its input and the input itself."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from lm.core.params import Constant
from lm.layers.linear import linear, linear_spec


def highway_spec(width: int, init: Callable, gate_bias: float) -> dict[str, Any]:
    """{"change", "gate"}, both from `width` to `width`; gates start at sigmoid(gate_bias), those below 0 closed."""
    change, gate = (linear_spec({"embed": width}, {"embed_out": width}, init, bias=True) for _ in range(2))
    return {"change": change, "gate": gate | {"bias": dataclasses.replace(gate["bias"], init=Constant(gate_bias))}}


def highway(p: dict[str, Any], x: jax.Array) -> jax.Array:
    """[..., D] in x's dtype: t relu(W x + b) + (1 - t) x, where t = sigmoid(W_t x + b_t) (Srivastava et al. 2015,
    1505.00387, equation 3)."""
    gate = jax.nn.sigmoid(linear(p["gate"], x))
    return gate * jax.nn.relu(linear(p["change"], x)) + (1 - gate) * x
