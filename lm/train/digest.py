"""A digest of every array of a tree that no sharding changes, because storage does not notice flipped bits."""

import functools
import hashlib
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

_WORDS = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint32}


def flatten(tree: Any) -> dict[str, Any]:
    """{"params/decoder/q": leaf, ...} for any pytree; None and empty subtrees have no path and vanish."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def digests(tree: Any) -> dict[str, str]:
    """{path: 16 hex digits} over the bits, positions, shape and dtype of each array.

    The sums are of integers modulo 2^32, which associate: any number of devices or processes and any sharding
    give the same digits. In a run of many processes all of them must call it.
    """
    flat = flatten(tree)
    # One compilation a distinct shape: weights and their moments share it, which one program of all would not.
    lanes = jax.device_get([_lanes(x, _replicated(x)) for x in flat.values()])
    return {path: _hex(x, lane) for (path, x), lane in zip(flat.items(), lanes, strict=True)}


@functools.partial(jax.jit, static_argnums=1)
def _lanes(x: jax.Array, replicated: NamedSharding | None) -> jax.Array:
    x = jax.device_put(x, jax.memory.Space.Device)  # It may be in the memory of the host.
    words = _words(x).astype(jnp.uint32)
    position = _positions(words.shape)
    # Two lanes, mixed in two ways: what cancels in one sum does not in the other.
    first = _mix(words ^ _mix(position + 1))
    second = _mix(words + _mix(position ^ jnp.uint32(0x9E3779B9)))
    lanes = jnp.stack([first.sum(dtype=jnp.uint32), second.sum(dtype=jnp.uint32)])
    return lanes if replicated is None else jax.lax.with_sharding_constraint(lanes, replicated)


def _words(x: jax.Array) -> jax.Array:
    """The bits of `x` as unsigned integers; 8-byte elements become two, along a new last axis."""
    if x.dtype == jnp.bool_:
        return x.astype(jnp.uint8)
    return jax.lax.bitcast_convert_type(x, _WORDS[x.dtype.itemsize])


def _positions(shape: tuple[int, ...]) -> jax.Array:
    """A distinct word per element: its row-major index, mixed with a second word past 2^32 elements."""
    split = len(shape)
    while split and math.prod(shape[split - 1 :]) < 2**32:
        split -= 1
    inner = _index(shape, range(split, len(shape)))
    return inner ^ _mix(_index(shape, range(split))) if split else inner


def _index(shape: tuple[int, ...], dims: range) -> jax.Array:
    index = jnp.zeros(shape, jnp.uint32)
    stride = 1
    for d in reversed(dims):
        index += jax.lax.broadcasted_iota(jnp.uint32, shape, d) * jnp.uint32(stride % 2**32)
        stride *= shape[d]
    return index


def _mix(x: jax.Array) -> jax.Array:
    """The finaliser of MurmurHash3 (Appleby 2011): every bit in reaches every bit out."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def _replicated(x: jax.Array) -> NamedSharding | None:
    """The sharding under which every process holds the result whole."""
    sharding = getattr(x, "sharding", None)
    return NamedSharding(sharding.mesh, PartitionSpec()) if isinstance(sharding, NamedSharding) else None


def _hex(x: jax.Array, lanes: np.ndarray) -> str:
    text = f"{x.dtype.name} {tuple(x.shape)} {lanes[0]:08x}{lanes[1]:08x}"
    return hashlib.sha256(text.encode()).hexdigest()[:16]
