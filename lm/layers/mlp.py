"""The feed-forward layer, plain or gated."""

from collections.abc import Callable
from typing import Any

import jax

from lm.layers.activations import activation
from lm.layers.dropout import dropout
from lm.layers.linear import linear, linear_spec
from lm.parallel.rules import constrain


def mlp_spec(width: int, mlp_width: int, gated: bool, bias: bool, init: Callable, out_init: Callable) -> dict[str, Any]:
    """{"up", "down"} and, where `gated`, {"gate"}; `out_init` draws the projection back to the residual."""
    names = ("gate", "up") if gated else ("up",)
    spec = {name: linear_spec({"embed": width}, {"mlp": mlp_width}, init, bias) for name in names}
    return spec | {"down": linear_spec({"mlp": mlp_width}, {"embed": width}, out_init, bias)}


def mlp(p: dict[str, Any], x_BLD: jax.Array, name: str, rate: float = 0.0, key: jax.Array | None = None) -> jax.Array:
    """down(act(up(x))), or down(act(gate(x)) * up(x)) where the spec is gated (Shazeer 2020, 2002.05202).

    With a `key`, a share `rate` of the inner features is dropped.
    """
    up_BLF = linear(p["up"], x_BLD)
    if "gate" in p:
        hidden_BLF = activation(name, linear(p["gate"], x_BLD)) * up_BLF
    else:
        hidden_BLF = activation(name, up_BLF)
    hidden_BLF = dropout(constrain(hidden_BLF, "batch", "length", "act_mlp"), rate, key)
    return linear(p["down"], hidden_BLF)
