"""Layers one after another: groups of a repeated pattern, each stacked on disk and scanned."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from lm.core import params as specs
from lm.core.errors import UsageError, check_choice
from lm.layers import pipeline
from lm.layers.block import Block, Context, Layer
from lm.layers.dropout import fold
from lm.parallel.mesh import settings
from lm.parallel.rules import constrain

REMAT = ("none", "full", "dots", "attention", "offload")
ENTERED = "entered"  # The name of the residual stream as it enters a repeat.


@dataclasses.dataclass(frozen=True)
class Group:
    """`pattern` run `repeats` times, with parameters of its own each time or, where `shared`, the same ones."""

    pattern: tuple[Layer, ...]
    repeats: int
    shared: bool = False

    @property
    def staged(self) -> bool:
        """Whether stages divide the repeats; a single one, and shared ones, run on all of them."""
        return self.repeats > 1 and not self.shared


def groups(layers: int, pattern: tuple[Layer, ...], prefix: tuple[Layer, ...] = ()) -> tuple[Group, ...]:
    """The stack of `layers`: the prefix, then `pattern` over and over, cut short at the end.

    Raises UsageError where `layers` leaves no room for all of them.
    """
    if not pattern:
        raise UsageError("pattern=() is empty: it needs at least one Layer()")
    if len(prefix) + len(pattern) > layers:
        raise UsageError(f"layers={layers} is fewer than the {len(prefix)} of prefix and {len(pattern)} of pattern")
    repeats, rest = divmod(layers - len(prefix), len(pattern))
    parts = (Group(prefix, 1), Group(pattern, repeats), Group(pattern[:rest], 1))
    return tuple(group for group in parts if group.pattern)


class Stacked(NamedTuple):
    """What a stack leaves: x [B, L, D], the groups' caches, further loss terms as {name: (sum, weight, coefficient)},
    and, where captured, the hidden states [layers + 1, B, L, D] before, between and after the layers.
    """

    x: jax.Array
    cache: dict[str, Any]
    aux: dict[str, Any]
    states: jax.Array | None


@dataclasses.dataclass(frozen=True)
class Stack:
    """The layers of one block, and how they are run: `scan=False` unrolls them, `remat` names what is kept."""

    block: Block
    groups: tuple[Group, ...]
    remat: str = "none"
    scan: bool = True

    def __post_init__(self):
        check_choice("remat", self.remat, REMAT)
        if (self.block.favor or self.block.relative) and any(layer.window for layer in self.layers):
            raise UsageError("window does not go with favor or relative, which see all keys: leave one of them out")
        routed = [layer.experts for layer in self.layers if layer.experts is not None]
        if routed and all(layer.experts for layer in self.layers) and self.block.mlp_bias:
            raise UsageError("mlp_bias=True has no effect where every layer has experts: set mlp_bias=False")
        if routed and self.block.mlp_dropout:
            raise UsageError(f"mlp_dropout={self.block.mlp_dropout} is not for experts: use residual_dropout")
        if any(form.coefficients != routed[0].coefficients for form in routed):
            raise UsageError("experts.balance and experts.router_z must be the same in all layers: they are one term")

    @property
    def layers(self) -> tuple[Layer, ...]:
        """Every layer in the order in which they run."""
        return tuple(layer for group in self.groups for layer in group.pattern * group.repeats)

    @property
    def places(self) -> tuple[tuple[str, int], ...]:
        """Where each layer's parameters are, in the order in which they run: (path, index along the leading axis)."""
        return tuple(
            (f"group{i}/layer{j}", 0 if group.shared else repeat)
            for i, group in enumerate(self.groups)
            for repeat in range(group.repeats)
            for j in range(len(group.pattern))
        )

    def check_stages(self, stages: int, rounds: int) -> None:
        """Raises UsageError where they do not divide the repeats of every group, or have none to divide."""
        if not any(group.staged for group in self.groups):
            raise UsageError(
                f"mesh.stage={stages} has no effect on layers that share their parameters or repeat no pattern: "
                "leave mesh.stage out"
            )
        for group in self.groups:
            if group.staged and group.repeats % (stages * rounds):
                raise UsageError(
                    f"{group.repeats} repeats of a pattern of {len(group.pattern)} do not divide over "
                    f"mesh.stage={stages} x mesh.rounds={rounds}: choose model.layers, or those in model.prefix that "
                    "stand before, so that they do"
                )

    def spec(self) -> dict[str, Any]:
        """{"group0": {"layer0": ...}}: each leaf stacked along a leading "layers" axis, of 1 where shared."""
        spec = {}
        for i, group in enumerate(self.groups):
            copies, passes = (1, group.repeats) if group.shared else (group.repeats, 1)
            spec[f"group{i}"] = specs.stack(_each(group.pattern, self.block.spec), copies, passes=passes)
        return spec

    def cache_spec(self, batch_size: int, length: int, memory_length: int | None = None) -> dict[str, Any]:
        """A cache for every layer, stacked in the same way."""

        def layer_spec(_):
            return self.block.cache_spec(batch_size, length, memory_length)

        return {
            f"group{i}": specs.stack(_each(group.pattern, layer_spec), group.repeats)
            for i, group in enumerate(self.groups)
        }

    def apply(
        self,
        params: dict[str, Any],
        x: jax.Array,
        context: Context,
        *,
        key: jax.Array | None = None,
        cache: dict[str, Any] | None = None,
        capture: bool = False,
    ) -> Stacked:
        """Runs every layer over x [B, L, D]; `key` turns dropout on."""
        if pipeline.stages() > 1:
            self.check_stages(pipeline.stages(), settings().rounds)
        hidden, caches, sums = [x[None]], {}, []
        for i, group in enumerate(self.groups):
            name = f"group{i}"
            group_cache = None if cache is None else cache[name]
            x, caches[name], states, group_sums = self._group(
                group, params[name], x, context, fold(key, i + 1), group_cache, capture
            )
            hidden.append(states)
            sums.append(group_sums)
        return Stacked(x, caches, self._terms(_added(sums), x, context), jnp.concatenate(hidden) if capture else None)

    def _terms(self, sums: dict[str, jax.Array], x: jax.Array, context: Context) -> dict[str, Any]:
        """Means over tokens and layers; each layer's counts with its full coefficient, so they are added up."""
        routed = [layer.experts for layer in self.layers if layer.experts is not None]
        tokens = x.shape[0] * x.shape[1] if context.real_BL is None else context.real_BL.sum()
        weight = jnp.asarray(len(routed) * tokens, jnp.float32)
        return {name: (s, weight, len(routed) * routed[0].coefficients[name]) for name, s in sums.items()}

    def _group(self, group, p, x, context, key, cache, capture):
        keys = None if key is None else jax.random.split(key, group.repeats)
        staged = group.staged and pipeline.stages() > 1
        # As keys of a tree, rotations could not be sorted.
        rotations, rows = list(context.tables), context._replace(tables=list(context.tables.values()))

        def layers(p, keys, cache, x, rows):
            own = rows._replace(tables=dict(zip(rotations, rows.tables, strict=True)))
            return self._repeats(group, p, keys, cache, x, own, capture, staged)

        run = functools.partial(pipeline.run, layers) if staged else layers
        x, cache, states, sums = run(p, keys, cache, x, rows)
        return x, cache, states.reshape(-1, *x.shape) if capture else None, jax.tree.map(jnp.sum, sums)

    def _repeats(self, group, p, keys, cache, x, context, capture, staged):
        """(x, caches, states [repeats, pattern, B, L, D], sums [repeats]) of as many repeats as there are in p."""
        spec = _each(group.pattern, self.block.spec)
        repeats = group.repeats if group.shared else jax.tree.leaves(p)[0].shape[0]

        def body(x, scanned):
            layers, cache, key = scanned
            x = checkpoint_name(x, ENTERED)
            layers = jax.tree.map(lambda a: a[0], p) if group.shared else layers
            # Their gradients are then laid out in the same way, layer by layer: scattered, not reduced whole.
            layers = specs.map_spec(lambda param, a: constrain(a, *param.axes), spec, layers)
            states, new_cache, sums = [], {}, []
            for j, layer in enumerate(group.pattern):
                name = f"layer{j}"
                layer_cache = None if cache is None else cache[name]
                x, new_cache[name], layer_sums = self.block.apply(
                    layers[name], x, layer, context, fold(key, j), layer_cache
                )
                states.append(x)
                sums.append(layer_sums)
            return x, (None if cache is None else new_cache, jnp.stack(states) if capture else None, _added(sums))

        unroll = 1 if self.scan else repeats
        body = _remat(body, self.remat, looped=staged or unroll < repeats)
        scanned = (None if group.shared else p, cache, keys)
        x, (cache, states, sums) = jax.lax.scan(body, x, scanned, length=repeats, unroll=unroll)
        return x, cache, states, sums


def _each(pattern, make):
    return {f"layer{j}": make(layer) for j, layer in enumerate(pattern)}


def _added(sums):
    """{name: the sum over the dicts that have it}."""
    return {name: sum(s[name] for s in sums if name in s) for name in sorted(set().union(*sums))}


def _remat(body, policy, looped):
    if policy == "none":
        return body
    policies = jax.checkpoint_policies
    saved = {
        "full": policies.nothing_saveable,
        "dots": policies.dots_with_no_batch_dims_saveable,
        "attention": policies.save_only_these_names("attention"),
        # Kept in the memory of the device's host; all else is computed again.
        "offload": policies.save_and_offload_only_these_names(
            names_which_can_be_saved=[],
            names_which_can_be_offloaded=[ENTERED],
            offload_src="device",
            offload_dst="pinned_host",
        ),
    }
    # Only a loop keeps the compiler from merging the second forward pass with the first by itself.
    return jax.checkpoint(body, policy=saved[policy], prevent_cse=not looped)
