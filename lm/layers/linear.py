"""The one matrix product of the project, and the spec of its kernel and bias."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from lm.core.params import Constant, Param
from lm.parallel.rules import is_sharded


def linear_spec(inputs: dict[str, int], outputs: dict[str, int], init: Callable, bias: bool) -> dict[str, Param]:
    """{"kernel": [*inputs, *outputs], "bias": [*outputs]}; both arguments are {axis name: size}."""
    shape, axes = (*inputs.values(), *outputs.values()), (*inputs, *outputs)
    spec = {"kernel": Param(shape, axes, init, inputs=tuple(inputs))}
    if bias:
        spec["bias"] = Param(tuple(outputs.values()), tuple(outputs), Constant(), role="vector")
    return spec


def linear(p: dict[str, jax.Array], x: jax.Array, contracted: int = 1) -> jax.Array:
    """[..., *outputs] in x's dtype: the last `contracted` dimensions of x times the kernel, plus the bias.

    Products and bias are summed in float32.
    """
    kernel = p["kernel"]
    lead, outputs = x.shape[: x.ndim - contracted], kernel.shape[contracted:]
    x_in = x.reshape(*lead, -1)
    y = project(x_in, kernel.reshape(x_in.shape[-1], -1))
    if "bias" in p:
        y = y + p["bias"].astype(y.dtype).reshape((1,) * len(lead) + (-1,))
    return y.astype(x.dtype).reshape(*lead, *outputs)


def project(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """[..., outputs] in float32: x [..., inputs] times kernel [inputs, outputs], multiplied in x's dtype.

    Leading dimensions are flattened into one, which halves the time on XLA:CPU, except where the length is
    sharded: there flattening would gather it.
    """
    if is_sharded("length"):
        return matmul(x, kernel)
    y = matmul(x.reshape(-1, x.shape[-1]), kernel)
    return y.reshape(*x.shape[:-1], -1)


@jax.custom_vjp
def matmul(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """x times kernel in float32, multiplied in x's dtype, forward and backward.

    Autodiff would multiply float32 cotangents by a bfloat16 operand, and round the kernel's gradient to x's dtype.
    """
    return _dot(x, kernel.astype(x.dtype), ((x.ndim - 1,), (0,)))


def _forward(x, kernel):
    return matmul(x, kernel), (x, kernel)


def _backward(residuals, g):
    x, kernel = residuals
    g = g.astype(x.dtype)
    lead = tuple(range(x.ndim - 1))
    dx = _dot(g, kernel.astype(x.dtype), ((g.ndim - 1,), (1,)))
    dkernel = _dot(x, g, (lead, lead))
    return dx.astype(x.dtype), dkernel.astype(kernel.dtype)


def _dot(a, b, contract):
    return jax.lax.dot_general(a, b, (contract, ((), ())), preferred_element_type=jnp.float32)


matmul.defvjp(_forward, _backward)
