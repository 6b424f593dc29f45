"""The optimizer's moments in the memory of the devices' hosts: they visit the device layer by layer to be updated.

Brought over whole, the old ones and the new ones would take more of the device than had they stayed on it.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lm.core import params, tree
from lm.core.errors import UsageError
from lm.core.params import Param

HOST = "pinned_host"  # JAX's name for it on every platform.
Update = Callable[[Any, Any, Any, jax.Array], tuple[Any, Any]]


def check(places: Any, mesh: jax.sharding.Mesh) -> None:
    """Raises UsageError where the mesh's devices have no memory on the host, or none of `places` is in it."""
    device = mesh.devices.flat[0]
    if HOST not in {memory.kind for memory in device.addressable_memories()}:
        raise UsageError(
            f"train.offload_optimizer=True: JAX names no memory {HOST!r} of this {device.device_kind}, as of no GPU "
            "that is only compiled for: leave it False"
        )
    if not any(place.memory_kind == HOST for place in jax.tree.leaves(places)):
        raise UsageError(
            "train.offload_optimizer=True has no effect on an optimizer without moments of its parameters' shapes: "
            "leave it False"
        )


def _owners(slots: Any, spec: Any) -> list[str | None]:
    """For each leaf of an optimizer's state the path of the parameter that it belongs to; None for a counter of all."""
    known = set(tree.flatten(spec))

    def owner(path: tuple) -> str | None:
        names = [k.key for k in path if isinstance(k, jax.tree_util.DictKey)]
        return next((p for i in range(len(names)) if (p := "/".join(names[i:])) in known), None)

    return [owner(path) for path, _ in jax.tree.leaves_with_path(slots)]


def streamed(optimizer: Any, spec: Any, places: Any, stages: int) -> Update:
    """update(gradients, slots, weights, finite) -> (direction, slots): what `optimizer` gives, piece by piece.

    Slots lie by `places` before and after, and come back as they were where not `finite`. An optimizer treats each
    matrix on its own but for the clipping, which is done first.
    """
    flat = tree.flatten(spec)
    pieces = _pieces(flat, stages)
    clip = optax.identity() if optimizer.clip_norm is None else optax.clip_by_global_norm(optimizer.clip_norm)
    unclipped = dataclasses.replace(optimizer, clip_norm=None)
    spaces = [
        jax.memory.Space.Host if place.memory_kind == HOST else jax.memory.Space.Device
        for place in jax.tree.leaves(places)
    ]
    owned = _owners(places, spec)

    def advance(piece: _Piece, i: Any, direction: dict, slots: dict, counters: dict, weights: dict) -> tuple:
        """(direction, slots) of the piece with the i-th slice done, and counters; of other parameters zeros will do."""
        small = {path: piece.cut(p) if path in piece.paths else p for path, p in flat.items()}
        cut = tree.unflatten(small)
        transformation = unclipped.build(cut)
        shapes, structure = jax.tree.flatten(jax.eval_shape(transformation.init, params.abstract(cut)))
        own = {j: jax.device_put(piece.take(x, i), jax.memory.Space.Device) for j, x in slots.items()} | counters
        old = [own[j] if j in own else jnp.zeros(x.shape, x.dtype) for j, x in enumerate(shapes)]
        zeros = {path: jnp.zeros(p.shape, p.dtype) for path, p in small.items()}
        grads, here = (
            tree.unflatten(zeros | {path: piece.take(x[path], i) for path in piece.paths}) for x in (direction, weights)
        )
        moved, new = transformation.update(grads, jax.tree.unflatten(structure, old), here)
        moved, new = tree.flatten(moved), jax.tree.leaves(new)
        direction = {path: piece.put(x, moved[path], i) for path, x in direction.items()}
        slots = {j: piece.put(x, jax.device_put(new[j], spaces[j]), i) for j, x in slots.items()}
        return direction, slots, {j: new[j] for j in counters}

    def update(grads: Any, slots: Any, weights: Any, finite: jax.Array) -> tuple[Any, Any]:
        leaves, structure = jax.tree.flatten(slots)
        grads, weights = tree.flatten(grads), tree.flatten(weights)
        trained = {path: grads[path] for path, p in flat.items() if p.trainable}
        direction = grads | clip.update(trained, optax.EmptyState())[0]
        counters = {j: x for j, x in enumerate(leaves) if owned[j] is None}
        *_, counted = advance(_Piece((), 1, stages), 0, {}, {}, counters, weights)
        new = {j: jnp.where(finite, counted[j], x) for j, x in counters.items()}
        for piece in pieces:
            # A loop around a single slice too, whose end only the step knows: the compiler cannot unroll it, so slots
            # stay where they are until it runs, and one loop follows the other.
            def goes_on(part: tuple, piece: _Piece = piece) -> jax.Array:
                return (part[0] < piece.slices) & finite

            def body(part: tuple, piece: _Piece = piece) -> tuple:
                i, ways, own = part
                return i + 1, *advance(piece, i, ways, own, counters, weights)[:2]

            own = {j: x for j, x in enumerate(leaves) if owned[j] in piece.paths}
            first = jnp.int32(0), {path: direction[path] for path in piece.paths}, own
            _, done, own = jax.lax.while_loop(goes_on, body, first)
            direction, new = direction | done, new | own
        return tree.unflatten(direction), jax.tree.unflatten(structure, [new[j] for j in range(len(leaves))])

    return update


@dataclasses.dataclass(frozen=True)
class _Piece:
    """Parameters that are updated together, in as many slices along their layers; every stage has its own layers."""

    paths: tuple[str, ...]
    slices: int
    stages: int

    def cut(self, p: Param) -> Param:
        """The parameter as it is in a slice."""
        return p if self.slices == 1 else dataclasses.replace(p, shape=(p.shape[0] // self.slices, *p.shape[1:]))

    def take(self, x: jax.Array, i: Any) -> jax.Array:
        if self.slices == 1:
            return x
        return jax.lax.dynamic_index_in_dim(self._view(x), i, 1, keepdims=False).reshape(-1, *x.shape[1:])

    def put(self, x: jax.Array, part: jax.Array, i: Any) -> jax.Array:
        if self.slices == 1:
            return part
        part = part.reshape(self.stages, -1, *x.shape[1:])
        return jax.lax.dynamic_update_index_in_dim(self._view(x), part, i, 1).reshape(x.shape)

    def _view(self, x: jax.Array) -> jax.Array:
        """[stages, slices, matrices of a slice in each stage, ...]."""
        return x.reshape(self.stages, self.slices, x.shape[0] // (self.stages * self.slices), *x.shape[1:])


def _pieces(flat: dict[str, Param], stages: int) -> list[_Piece]:
    """Stacks of the same depth together; of what is stacked in none, as much at a time as the largest slice has."""
    stacks: dict[int, list[str]] = {}
    for path, p in flat.items():
        layers = p.shape[0] if p.axes[:1] == ("layers",) else 1
        stacks.setdefault(max(1, layers // stages), []).append(path)
    whole = stacks.pop(1, [])
    most = max((sum(math.prod(flat[path].shape) for path in paths) // n for n, paths in stacks.items()), default=0)
    together: list[list[str]] = []
    room = 0
    for path in whole:
        room -= math.prod(flat[path].shape)
        if room < 0:
            together.append([])
            room = most - math.prod(flat[path].shape)
        together[-1].append(path)
    sliced = [_Piece(tuple(paths), n, stages) for n, paths in stacks.items()]
    return sliced + [_Piece(tuple(paths), 1, stages) for paths in together]
