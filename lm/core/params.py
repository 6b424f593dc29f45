"""A parameter is declared once, as a `Param`; all else about it is a map over a tree of them."""

import dataclasses
import math
import zlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from lm.core import tree
from lm.core.errors import check_choice

ROLES = ("embedding", "matrix", "vector", "head", "router")


@dataclasses.dataclass(frozen=True)
class Normal:
    """Draws from N(0, std^2)."""

    std: float

    def __call__(self, key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        return self.std * jax.random.normal(key, shape, dtype)


@dataclasses.dataclass(frozen=True)
class Uniform:
    """Draws from U(-limit, limit)."""

    limit: float

    def __call__(self, key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        return jax.random.uniform(key, shape, dtype, -self.limit, self.limit)


@dataclasses.dataclass(frozen=True)
class Constant:
    """Fills with `value`; no randomness."""

    value: float = 0.0

    def __call__(self, key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        return jnp.full(shape, self.value, dtype)


@dataclasses.dataclass(frozen=True)
class Param:
    """What there is to know about one array before it exists.

    `axes` are logical names, one a dimension, distinct within a Param; `inputs` names those that a product
    contracts, so that fan-in and fan-out never have to be guessed from the rank. `role` decides decay,
    learning-rate groups and multipliers; what is not `trainable`, no optimizer touches. `passes` is how many
    times a token's forward pass multiplies by it: below 1 for a stack of experts of which a token meets a few, above
    for a layer that is run again. `rate`, `decay` and `eps` multiply an optimizer's learning rate, weight decay and
    epsilon, see lm.core.parametrization.
    """

    shape: tuple[int, ...]
    axes: tuple[str, ...]
    init: Callable[[jax.Array, tuple[int, ...], Any], jax.Array]
    inputs: tuple[str, ...] = ()
    role: str = "matrix"
    trainable: bool = True
    dtype: str = "float32"
    passes: float = 1.0
    rate: float = 1.0
    decay: float = 1.0
    eps: float = 1.0

    def __post_init__(self):
        check_choice("role", self.role, ROLES)
        if len(self.axes) != len(self.shape) or len(set(self.axes)) != len(self.axes):
            raise ValueError(f"Param of shape {self.shape} needs {len(self.shape)} distinct axes, got {self.axes}")
        if not set(self.inputs) <= set(self.axes):
            raise ValueError(f"Param inputs {self.inputs} are not all among its axes {self.axes}")

    @property
    def fan_in(self) -> int:
        """The number of terms in each sum that this parameter takes part in."""
        return math.prod(n for n, axis in zip(self.shape, self.axes, strict=True) if axis in self.inputs)


def is_param(x: Any) -> bool:
    return isinstance(x, Param)


def map_spec(function: Callable[..., Any], spec: Any, *rest: Any) -> Any:
    """`function` over every Param of `spec`, and the leaves of `rest` that stand in the same places."""
    return jax.tree.map(function, spec, *rest, is_leaf=is_param)


def stack(spec: Any, repeats: int, axis: str = "layers", passes: float = 1.0) -> Any:
    """The spec of `repeats` copies, stacked along a new leading axis; a token passes each `passes` times."""

    def stacked(p: Param) -> Param:
        return dataclasses.replace(p, shape=(repeats, *p.shape), axes=(axis, *p.axes), passes=passes * p.passes)

    return map_spec(stacked, spec)


def abstract(spec: Any) -> Any:
    """The tree of jax.ShapeDtypeStruct."""
    return map_spec(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype), spec)


def initialize(spec: dict[str, Any], key: jax.Array) -> dict[str, Any]:
    """Arrays for every Param; each is drawn from `key` folded with its own path.

    A parameter's values therefore depend on neither the others nor the device mesh.
    """

    def draw(path: str, p: Param) -> jax.Array:
        return p.init(jax.random.fold_in(key, zlib.crc32(path.encode())), p.shape, p.dtype)

    return tree.unflatten({path: draw(path, p) for path, p in tree.flatten(spec).items()})


def count(spec: Any, *roles: str) -> int:
    """The number of parameters, of `roles` only where any are given."""
    return sum(math.prod(p.shape) for p in _of_roles(spec, roles))


def count_passed(spec: Any, *roles: str) -> float:
    """The number of parameters that one token is multiplied by, each as often as that happens."""
    return sum(p.passes * math.prod(p.shape) for p in _of_roles(spec, roles))


def _of_roles(spec: Any, roles: tuple[str, ...]) -> list[Param]:
    leaves = jax.tree.leaves(spec, is_leaf=is_param)
    return [p for p in leaves if not roles or p.role in roles]
