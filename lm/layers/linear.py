"""The one matrix product of the project, and the spec of its kernel and bias."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from lm.core.params import Constant, Param
from lm.parallel.mesh import platform
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

    Products are summed in float32.
    """
    kernel = p["kernel"]
    lead, outputs = x.shape[: x.ndim - contracted], kernel.shape[contracted:]
    x_in = x.reshape(*lead, -1)
    y = project(x_in, kernel.reshape(x_in.shape[-1], -1), dtype=_sums_dtype(x))
    if "bias" in p:
        y = y + p["bias"].astype(y.dtype).reshape((1,) * len(lead) + (-1,))
    return y.astype(x.dtype).reshape(*lead, *outputs)


def project(x: jax.Array, kernel: jax.Array, axis: int = 0, dtype: Any = jnp.float32) -> jax.Array:
    """[..., outputs] in `dtype`: x [..., inputs] times the kernel, whose inputs lie along `axis`.

    Leading dimensions are flattened into one, which halves the time on XLA:CPU, except where the length is
    sharded: there flattening would gather it.
    """
    if is_sharded("length"):
        return _matmul(x, kernel, axis, dtype)
    return _matmul(x.reshape(-1, x.shape[-1]), kernel, axis, dtype).reshape(*x.shape[:-1], -1)


def _sums_dtype(x: jax.Array) -> Any:
    """In what a product leaves its matrix unit, which adds in float32 itself, when x's dtype is what is wanted.

    Where inputs are sharded, partial sums then meet in half the bytes. XLA:CPU is fast for float32 results alone.
    """
    return jnp.float32 if platform() == "cpu" else x.dtype


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _matmul(x, kernel, axis, dtype):
    """Multiplied in x's dtype, forward and backward, and summed in float32.

    Autodiff would multiply float32 cotangents by a bfloat16 operand, and round the kernel's gradient to x's dtype.
    """
    return _dot(x, kernel.astype(x.dtype), (x.ndim - 1,), (axis,), dtype)


def _forward(x, kernel, axis, dtype):
    # Not by way of `_matmul`, which would hide the product from the rematerialisation policy "dots".
    return _dot(x, kernel.astype(x.dtype), (x.ndim - 1,), (axis,), dtype), (x, kernel)


def _backward(axis, dtype, residuals, g):
    x, kernel = residuals
    g = g.astype(x.dtype)
    dx = _dot(g, kernel.astype(x.dtype), (g.ndim - 1,), (1 - axis,), _sums_dtype(x)).astype(x.dtype)
    dkernel = _sum_over_rows
    if x.dtype == jnp.bfloat16:
        dkernel = functools.partial(jax.lax.platform_dependent, cpu=_sum_over_rows_on_cpu, default=_sum_over_rows)
    sides = (x, g) if axis == 0 else (g, x)
    return dx, dkernel(*sides, kernel).astype(kernel.dtype)


_matmul.defvjp(_forward, _backward)


def _sum_over_rows(a, b, kernel):
    """The kernel's gradient, a' b: [inputs, outputs] or, where the kernel lies so, [outputs, inputs]."""
    rows = tuple(range(a.ndim - 1))
    return _dot(a, b, rows, rows)


def _sum_over_rows_on_cpu(a, b, kernel):
    """The same in half the time: XLA:CPU (jaxlib 0.10) widens a bfloat16 product that contracts both first
    dimensions to float32, so `a` is transposed in memory. A plain transpose is folded back into the product; one
    behind a slice whose start is known at run time only (zero, unless the kernel is NaN) cannot be.
    """
    if a.ndim > 2:
        # With two row dimensions it neither widens nor multiplies, but fails when it runs.
        return _sum_over_rows(a.astype(jnp.float32), b.astype(jnp.float32), kernel)
    zero = jnp.isnan(kernel[0, 0]).astype(jnp.int32)
    transposed = jax.lax.dynamic_slice(jnp.pad(a.T, ((0, 8), (0, 0))), (zero, 0), (a.shape[1], a.shape[0]))
    return _dot(transposed, b, (1,), (0,))


def _dot(a, b, contracted_a, contracted_b, dtype=jnp.float32):
    dimensions = ((contracted_a, contracted_b), ((), ()))
    return jax.lax.dot_general(a, b, dimensions, preferred_element_type=dtype)
