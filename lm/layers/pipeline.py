"""The repeats of a group of layers in stages: each part of the mesh holds some, and micro-batches pass between them."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from lm.core.errors import UsageError
from lm.parallel.mesh import settings
from lm.parallel.rules import BATCH_AXES, constrain

STAGE, DATA = "stage", "data"  # Mesh axes.


@dataclasses.dataclass(frozen=True)
class Schedule:
    """When each stage works on what: GPipe's (Huang et al. 2019, 1811.06965), in several `rounds` interleaved as by
    Narayanan et al. 2021 (2104.04473, section 2.2).

    In a tick each stage takes one micro-batch through its repeats of one round. Micro-batches enter in blocks of
    `stages`, which go round together: what leaves the last stage reaches the first one just when it is its turn.
    """

    stages: int
    micro_batches: int
    rounds: int = 1

    @property
    def ticks(self) -> int:
        """In `stages` - 1 of them each stage has nothing to do."""
        return self.micro_batches * self.rounds + self.stages - 1

    def work(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(micro-batch, round, whether there is any), each [ticks, stages]; without work, the first or last one's."""
        since = np.arange(self.ticks)[:, None] - np.arange(self.stages)[None, :]
        turn = np.clip(since, 0, self.micro_batches * self.rounds - 1)
        block, place = np.divmod(turn, self.stages * self.rounds)
        return block * self.stages + place % self.stages, place // self.stages, turn == since

    def starts(self) -> np.ndarray:
        """[rounds, micro-batches]: in which tick the first stage works on each; the others follow one tick apart."""
        block, place = np.divmod(np.arange(self.micro_batches), self.stages)
        return (block * self.rounds + np.arange(self.rounds)[:, None]) * self.stages + place


def stages() -> int:
    """Over how many stages the mesh in context spreads the repeats of a group."""
    return dict(jax.sharding.get_abstract_mesh().shape).get(STAGE, 1)


def run(
    layers: Callable[..., tuple[jax.Array, Any, Any, Any]],
    p: Any,
    keys: jax.Array | None,
    cache: Any,
    x_BLD: jax.Array,
    rows: Any,
) -> tuple[jax.Array, Any, Any, Any]:
    """What `layers(p, keys, cache, x, rows)` returns of all repeats at once, computed in stages.

    That is (x [B, L, D], the cache [R, B, ...], states [R, P, B, L, D], sums), R repeats, which p, keys and cache have
    as a leading dimension too; sums come back added up. `rows` are arrays [B, ...], of which each micro-batch has its
    own, or [1, ...]. Dropout's keys are folded with the numbers of the micro-batch and of the devices along "data".
    With a cache all rows are one micro-batch, for which the stages take turns.

    The partitioner sees neither the stages, among which x is permuted, nor the axis "data", over which it would reduce
    gradients in every tick: they meet once, after the last one.
    """
    form = _schedule(x_BLD.shape[0], cached=cache is not None)
    S, M, G = form.stages, form.micro_batches, form.rounds
    leaves, structure = jax.tree.flatten((x_BLD, rows))
    own = [a.shape[0] == x_BLD.shape[0] for a in leaves]
    over_rows = [PartitionSpec(STAGE, DATA if each else None) for each in own]

    def local(p, keys, cache, leaves):
        stage = jax.lax.axis_index(STAGE)
        number_T, turn_T, works_T = (jnp.asarray(a)[:, stage] for a in form.work())
        enters_T = (stage == 0) & (turn_T == 0) & works_T
        p = jax.tree.map(lambda a: _dealt(a, form), p)
        if keys is not None:
            keys = _folded(keys.reshape(G, S, -1)[:, stage], jax.lax.axis_index(DATA))
        by_tick = [_split(a[0], M)[number_T] if each else None for a, each in zip(leaves, own, strict=True)]

        def tick(carry, now):
            left_BLD, old = carry
            by_tick, number, turn, enters, works = now
            every = [a[0] if own is None else own for a, own in zip(leaves, by_tick, strict=True)]
            x_BLD, rows = jax.tree.unflatten(structure, every)
            arrived_BLD = jax.lax.ppermute(left_BLD, STAGE, [(i, (i + 1) % S) for i in range(S)])
            x_BLD = constrain(jnp.where(enters, x_BLD, arrived_BLD), "batch", "residual_length", "act_embed")
            own_p, own_keys = jax.tree.map(lambda a: _of_round(a, turn), (p, keys))
            own_keys = None if keys is None else _folded(own_keys, number)
            left_BLD, new, states, sums = layers(own_p, own_keys, old, x_BLD, rows)
            new = jax.tree.map(lambda a, b: jnp.where(works, a, b), new, old)
            sums = jax.tree.map(lambda a: jnp.where(works, jnp.sum(a), 0), sums)
            return (left_BLD, new), (left_BLD, states, sums)

        first = jnp.zeros((leaves[0].shape[1] // M, *x_BLD.shape[1:]), x_BLD.dtype), cache
        (_, cache), (left, states, sums) = jax.lax.scan(tick, first, (by_tick, number_T, turn_T, enters_T, works_T))
        ended_BLD = _joined(left[S - 1 + form.starts()[-1]])
        if states is not None:
            k, P = states.shape[1:3]
            taken = states[stage + form.starts()]  # [G, M, k, P, B / M, L, D]
            states = jnp.moveaxis(taken, 1, 4).reshape(1, G, k, P, -1, *states.shape[-2:])
        ended_BLD = jnp.where(stage == S - 1, ended_BLD, 0)
        return ended_BLD[None], cache, states, jax.tree.map(lambda a: jnp.sum(a)[None], sums)

    each = jax.shard_map(
        local,
        in_specs=(PartitionSpec(STAGE), PartitionSpec(), PartitionSpec(STAGE, DATA), over_rows),
        out_specs=(
            PartitionSpec(STAGE, DATA),
            PartitionSpec(STAGE, DATA),
            PartitionSpec(STAGE, None, None, None, DATA),
            PartitionSpec((STAGE, DATA)),
        ),
        axis_names={STAGE, DATA},
        check_vma=False,
    )
    # Each stage has a copy of what all read, so that gradients are added up outside, whatever their type: XLA:CPU
    # (jaxlib 0.10) aborts where it reduces bfloat16 over a part of the mesh in here.
    copies = [jnp.broadcast_to(a, (S, *a.shape)) for a in leaves]
    ended, cache, states, sums = each(p, keys, cache, copies)
    if states is not None:
        states = states.swapaxes(0, 1).reshape(-1, *states.shape[3:])
    x_BLD = jax.lax.reduce(ended, np.zeros((), ended.dtype), jax.lax.add, (0,))  # Of which one is not zero.
    x_BLD = constrain(x_BLD, "batch", "residual_length", "act_embed")
    return x_BLD, cache, states, jax.tree.map(jnp.sum, sums)


def _schedule(rows: int, cached: bool) -> Schedule:
    sizes, given = dict(jax.sharding.get_abstract_mesh().shape), settings()
    if cached:
        return Schedule(sizes[STAGE], 1)
    micro_batches = given.micro_batches or sizes[STAGE]
    shards = math.prod(sizes[a] for a in BATCH_AXES)
    if rows % (micro_batches * shards):
        axes = " x ".join(f"{a}={sizes[a]}" for a in BATCH_AXES if sizes[a] > 1)
        raise UsageError(
            f"{rows} rows do not divide into mesh.micro_batches={micro_batches}{axes and ', each over ' + axes}: take "
            f"a multiple of {micro_batches * shards} rows (train.batch_size / train.accumulate), or fewer micro-batches"
        )
    return Schedule(sizes[STAGE], micro_batches, given.rounds)


def _dealt(a: jax.Array, form: Schedule) -> jax.Array:
    """[rounds, repeats, ...] of a stage, from the consecutive repeats that it holds.

    Several rounds need others: those pass through one exchange inside groups of stages and one permutation of stages,
    and so do their gradients on the way back, once a step.
    """
    S, G = form.stages, form.rounds
    if G == 1:
        return a[None]
    n = min(S, G)
    blocks = a.reshape(G // n, n, -1, *a.shape[1:]).swapaxes(0, 1)
    groups = [[i * (S // n) + j for i in range(n)] for j in range(S // n)]
    blocks = jax.lax.all_to_all(blocks, STAGE, 0, 0, axis_index_groups=groups, tiled=True)
    if n < S:
        blocks = jax.lax.ppermute(
            blocks, STAGE, [(i * (S // n) + j, j * n + i) for i in range(n) for j in range(S // n)]
        )
    return blocks.reshape(G, -1, *a.shape[1:])


def _of_round(a: jax.Array, turn: jax.Array) -> jax.Array:
    # Taken at a place known at run time only, its gradient would be as large as `a` in every tick.
    return a[0] if a.shape[0] == 1 else jax.lax.dynamic_index_in_dim(a, turn, keepdims=False)


def _folded(keys: jax.Array, number: jax.Array) -> jax.Array:
    fold = jax.vmap(lambda key: jax.random.fold_in(key, number))
    return fold(keys.reshape(-1)).reshape(keys.shape)


def _split(a: jax.Array, micro_batches: int) -> jax.Array:
    # Every M-th row, so that each device's own rows spread evenly over all of them.
    return a.reshape(-1, micro_batches, *a.shape[1:]).swapaxes(0, 1)


def _joined(a: jax.Array) -> jax.Array:
    return a.swapaxes(0, 1).reshape(-1, *a.shape[2:])
