"""The table from logical axis names to mesh axes, and the specs and constraints read from it."""

import math
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from lm.core import params
from lm.core.errors import UsageError, unknown

MESH_AXES = ("stage", "data", "fsdp", "expert", "seq", "tensor")
BATCH_AXES = ("data", "fsdp", "expert")

# One table serves every mesh: an axis of size 1 shards nothing, so the mesh's sizes are the preset.
RULES: dict[str, tuple[str, ...]] = {
    # Parameters.
    "layers": ("stage",),
    "embed": ("fsdp",),
    "embed_out": (),
    "vocab": ("tensor",),
    "source_vocab": ("tensor",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "head_dim": (),
    "mlp": ("tensor",),
    "gates": (),
    "experts": ("expert",),
    "positions": (),
    "types": (),
    "classes": (),
    "norm": (),
    "rank": (),
    # Activations.
    "batch": BATCH_AXES,
    "length": ("seq",),
    # Between layers' products each device along "tensor" has a part of the sequence, where these would be whole on all
    # (Korthikanti et al. 2022, 2205.05198, sequence parallelism).
    "residual_length": ("seq", "tensor"),
    "act_embed": (),
    "act_heads": ("tensor",),
    "act_kv_heads": ("tensor",),
    "act_mlp": ("tensor",),
    "act_vocab": ("tensor",),
    "act_experts": ("expert",),
}

# Where the dimension does not divide, these go without their last mesh axis: fewer key/value heads than tensor shards
# are whole on each, as every multi-query implementation has them, and so is a single token on its way through layers.
_LAST_WHERE_EVEN = {"kv_heads", "act_kv_heads", "residual_length"}
# Layers that stand alone, or that are the same ones every time, run on all stages.
_WHOLE_WHERE_SINGLE = {"layers"}


def partition(axes: tuple[str | None, ...], shape: tuple[int, ...], sizes: dict[str, int]) -> PartitionSpec:
    """The PartitionSpec of an array with logical `axes` on a mesh of `sizes`.

    Raises UsageError for an unknown name, for two dimensions on one mesh axis, and for a dimension that its
    mesh axes do not divide.
    """
    entries: list[tuple[str, ...] | str | None] = []
    used: dict[str, str] = {}
    for name, dim in zip(axes, shape, strict=True):
        mesh_axes = tuple(a for a in _lookup(name) if sizes.get(a, 1) > 1)
        if name in _WHOLE_WHERE_SINGLE and dim == 1:
            mesh_axes = ()
        if name in _LAST_WHERE_EVEN and dim % _shards(mesh_axes, sizes):
            mesh_axes = mesh_axes[:-1]
        if dim % _shards(mesh_axes, sizes):
            raise UsageError(f"axis {name!r} of length {dim} does not divide over mesh {_sized(mesh_axes, sizes)}")
        for a in mesh_axes:
            if a in used:
                raise UsageError(f"axes {used[a]!r} and {name!r} of one array both map to mesh axis {a!r}")
            used[a] = str(name)
        entries.append(mesh_axes[0] if len(mesh_axes) == 1 else mesh_axes or None)
    return PartitionSpec(*entries)


def shards(p: params.Param, sizes: dict[str, int], but: str = "") -> int:
    """Over how many devices one copy of a parameter is spread, the mesh axis `but` left out."""
    spread = partition(p.axes, p.shape, sizes)
    axes = [a for entry in spread for a in (entry if isinstance(entry, tuple) else (entry,)) if a not in (None, but)]
    return math.prod(sizes[a] for a in axes)


def shardings(spec: Any, mesh: jax.sharding.Mesh) -> Any:
    """A tree of NamedSharding for a tree of Param."""
    sizes = dict(mesh.shape)
    return params.map_spec(lambda p: NamedSharding(mesh, partition(p.axes, p.shape, sizes)), spec)


def batch_sharding(mesh: jax.sharding.Mesh) -> NamedSharding:
    """Rows over the batch axes; the other dimensions whole."""
    return NamedSharding(mesh, PartitionSpec(tuple(a for a in BATCH_AXES if mesh.shape[a] > 1) or None))


def sizes() -> dict[str, int]:
    """Of the mesh in context, the axes that the partitioner sees to: not those of a shard_map around the caller."""
    mesh = jax.sharding.get_abstract_mesh()
    return {axis: mesh.shape[axis] for axis in mesh.auto_axes}


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """`x` with the sharding of its logical axes on the mesh in context; `x` itself where there is none."""
    found = sizes()
    if math.prod(found.values()) == 1:
        return x
    return jax.lax.with_sharding_constraint(x, partition(axes, x.shape, found))


def is_sharded(axis: str) -> bool:
    """Whether the logical `axis` is split over the mesh in context."""
    found = sizes()
    return any(found.get(a, 1) > 1 for a in _lookup(axis))


def _lookup(name: str | None) -> tuple[str, ...]:
    if name is None:
        return ()
    if name not in RULES:
        raise unknown("logical axis", name, RULES)
    return RULES[name]


def _shards(mesh_axes: tuple[str, ...], sizes: dict[str, int]) -> int:
    return math.prod(sizes[a] for a in mesh_axes)


def _sized(mesh_axes: tuple[str, ...], sizes: dict[str, int]) -> str:
    return " x ".join(f"{a}={sizes[a]}" for a in mesh_axes)
