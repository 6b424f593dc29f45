"""Layer norm and RMS norm, with a hand-written gradient."""

import functools

import jax
import jax.numpy as jnp

from lm.core.params import Constant, Param

NORMS = ("layernorm", "rmsnorm")


def norm_spec(axes: dict[str, int], bias: bool, offset: float = 0.0) -> dict[str, Param]:
    """{"scale": 1 - offset, "bias": zeros} over `axes`, {axis name: size}: moments are taken over all of them."""
    shape, names = tuple(axes.values()), tuple(axes)
    spec = {"scale": Param(shape, names, Constant(1.0 - offset), role="vector")}
    if bias:
        spec["bias"] = Param(shape, names, Constant(), role="vector")
    return spec


def norm(p: dict[str, jax.Array], x: jax.Array, kind: str, eps: float, offset: float = 0.0) -> jax.Array:
    """x in its own dtype, normalised in float32 over the trailing dimensions that the scale covers.

    "layernorm" is (x - mean) / sqrt(variance + eps) * scale + bias (Ba et al. 2016, 1607.06450); "rmsnorm"
    divides by the root mean square and leaves the mean alone (Zhang and Sennrich 2019, 1910.07467). `offset` is
    added to the scale, which Gemma keeps less one.
    """
    lead = x.shape[: x.ndim - p["scale"].ndim]
    flat = {name: value.reshape(-1) for name, value in p.items()}
    return _norm(x.reshape(*lead, -1), flat["scale"], flat.get("bias"), kind, eps, offset).reshape(x.shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _norm(x, scale, bias, kind, eps, offset):
    return _forward(x, scale, bias, kind, eps, offset)[0]


def _forward(x, scale, bias, kind, eps, offset):
    wide = x.astype(jnp.float32)
    mean = jnp.mean(wide, -1, keepdims=True) if kind == "layernorm" else 0.0
    inverse = jax.lax.rsqrt(jnp.mean(jnp.square(wide - mean), -1, keepdims=True) + eps)
    y = (wide - mean) * inverse * (_row(scale, x) + offset)
    if bias is not None:
        y = y + _row(bias, x)
    return y.astype(x.dtype), (x, mean, inverse, scale, bias)


def _backward(kind, eps, offset, residuals, g):
    # One pass over x and g a sum: autodiff of the two moments takes several, which showed on CPU.
    x, mean, inverse, scale, bias = residuals
    g = g.astype(jnp.float32)
    normal = (x.astype(jnp.float32) - mean) * inverse
    lead = tuple(range(x.ndim - 1))
    dnormal = g * (_row(scale, x) + offset)
    dx = dnormal - normal * jnp.mean(dnormal * normal, -1, keepdims=True)
    if kind == "layernorm":
        dx = dx - jnp.mean(dnormal, -1, keepdims=True)
    dscale = jnp.sum(g * normal, lead).astype(scale.dtype)
    dbias = None if bias is None else jnp.sum(g, lead).astype(bias.dtype)
    return (dx * inverse).astype(x.dtype), dscale, dbias


_norm.defvjp(_forward, _backward)


def _row(v, x):
    return v.astype(jnp.float32).reshape((1,) * (x.ndim - 1) + (-1,))
