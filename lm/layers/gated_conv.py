"""Causal convolutions with gated linear units and normalised weights."""

import jax
import jax.numpy as jnp

from lm.core.params import Constant, Normal, Param
from lm.layers.linear import linear

_NORM = 2.0  # Half open gates pass a quarter of a variance: 4 / inputs keeps it (Gehring et al. 2017, appendix A.1).


def gated_conv_spec(kernel: int, inputs: int, width: int) -> dict[str, Param]:
    """{"kernel" [taps, D, 2, F], "norm" [2, F], "bias" [2, F]}, of the values and of their gates; "norm" is that of the
    weights of each output."""
    axes = ("positions", "embed", "gates", "mlp")
    return {
        "kernel": Param(
            (kernel, inputs, 2, width), axes, Normal(_NORM * (kernel * inputs) ** -0.5), inputs=("positions", "embed")
        ),
        "norm": Param((2, width), ("gates", "mlp"), Constant(_NORM), role="vector"),
        "bias": Param((2, width), ("gates", "mlp"), Constant(), role="vector"),
    }


def gated_conv(
    p: dict[str, jax.Array], x_BLD: jax.Array, before_BPD: jax.Array, documents_BS: jax.Array | None = None
) -> jax.Array:
    """[B, L, F] in x's dtype: (X * W + b) sigmoid(X * V + c), each place with the `taps - 1` before it (Dauphin et al.
    2016, 1612.08083, equation 1); W = norm v / |v| (Salimans and Kingma 2016, 1602.07868).

    `before_BPD` are the inputs before the first, P = taps - 1 of them. With `documents_BS`, of these and x, inputs of
    other documents count as zeros.
    """
    taps, _, _, width = p["kernel"].shape
    length = x_BLD.shape[1]
    seen_BSD = jnp.concatenate([before_BPD.astype(x_BLD.dtype), x_BLD], 1)
    windows = [seen_BSD[:, i : i + length] for i in range(taps)]
    if documents_BS is not None:
        own = documents_BS[:, taps - 1 :]
        windows = [
            jnp.where((documents_BS[:, i : i + length] == own)[..., None], window, 0)
            for i, window in enumerate(windows)
        ]
    norm = jnp.sqrt(jnp.sum(jnp.square(p["kernel"]), (0, 1)))
    kernel = p["kernel"] * (p["norm"] / norm)[None, None]
    y_BLGF = linear({"kernel": kernel.reshape(-1, 2, width), "bias": p["bias"]}, jnp.concatenate(windows, -1))
    return y_BLGF[:, :, 0] * jax.nn.sigmoid(y_BLGF[:, :, 1])


def kept_spec(kernel: int, inputs: int, batch_size: int, dtype: str) -> Param:
    """[B, taps - 1, D]: the last inputs of each row, zeros at its begin."""
    axes = ("batch", "positions", "act_embed")
    return Param((batch_size, kernel - 1, inputs), axes, Constant(), role="vector", trainable=False, dtype=dtype)
