"""One training step, as a pure function of the state and a batch."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.sharding import NamedSharding, PartitionSpec

from lm.core import keys, params
from lm.objectives import carry as carries
from lm.parallel import rules
from lm.train import offload

Terms = Mapping[str, tuple[jax.Array, jax.Array, float]]
_SQUARES = "squares of the micro-batches' gradients"


@struct.dataclass
class State:
    """All that a step reads and replaces; donated to it.

    `step` counts updates asked for and `examples` rows consumed; `skipped` counts the updates skipped in a
    row, because their loss or gradient was not finite. `frozen` takes no gradient; `carry` is what the rows of the
    next batch continue from.
    """

    step: jax.Array
    examples: jax.Array
    skipped: jax.Array
    params: Any
    optimizer: Any
    ema: Any = None
    frozen: Any = None
    carry: Any = None


class Objective(Protocol):
    """What the step needs of an objective."""

    def loss(self, model: Any, params: Any, batch: Any, *, key: Any, frozen: Any = None) -> Terms:
        """{name: (sum, weight, coefficient)} over the batch it is given."""
        ...


def initialize(
    spec: Any, optimizer: optax.GradientTransformation, key: jax.Array, ema: bool, carry_spec: Any = None
) -> State:
    """A new run's state; under `jit` with `shardings` as output shardings it never exists in one piece."""
    weights = params.initialize(spec, keys.named(key, "init"))
    zero = jnp.zeros((), jnp.uint32)
    # The average starts at the weights themselves, in buffers of its own because the state is donated.
    average = jax.tree.map(jnp.copy, weights) if ema else None
    carry = None if carry_spec is None else params.initialize(carry_spec, keys.named(key, "carry"))
    slots = optimizer.init(weights)
    return State(step=zero, examples=zero, skipped=zero, params=weights, optimizer=slots, ema=average, carry=carry)


def shardings(
    spec: Any, abstract: State, mesh: jax.sharding.Mesh, offload_optimizer: bool = False, carry_spec: Any = None
) -> State:
    """A NamedSharding for each leaf of `abstract`: a moment lies like its parameter, a carry like the batch, all else
    is whole.

    With `offload_optimizer` moments are in the memory of the device's host, see lm.train.offload.
    """
    by_path = {_names(path): s for path, s in jax.tree.leaves_with_path(rules.shardings(spec, mesh))}
    shapes = {_names(path): p.shape for path, p in jax.tree.leaves_with_path(params.abstract(spec))}
    whole = NamedSharding(mesh, PartitionSpec())

    def place(path, leaf):
        names = _names(path)
        for i in range(len(names)):
            if shapes.get(names[i:]) == leaf.shape:
                return by_path[names[i:]]
        return whole

    places = jax.tree.map_with_path(place, abstract)
    if carry_spec is not None:
        places = dataclasses.replace(places, carry=rules.shardings(carry_spec, mesh))
    if offload_optimizer:
        slots = jax.tree.map(lambda s: s if s is whole else s.with_memory_kind(offload.HOST), places.optimizer)
        offload.check(slots, mesh)
        places = dataclasses.replace(places, optimizer=slots)
    return places


def make_step(
    model: Any,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    *,
    accumulate: int = 1,
    ema_decay: float | None = None,
    poison: tuple[int, int] | None = None,
    noise_scale: bool = False,
    update: offload.Update | None = None,
    carry_spec: Any = None,
) -> Callable[[State, dict[str, jax.Array], jax.Array, jax.Array], tuple[State, dict[str, jax.Array]]]:
    """step(state, batch, learning rate, the run's key) -> (state, metrics), to be jitted with the state donated.

    The loss is the sum over terms of coefficient x sum / weight, the weights taken over the whole batch
    before the first of `accumulate` micro-batches. An update with a loss or gradient that is not finite is
    skipped on the device. `poison=(first, last)` makes the gradients of those steps NaN, for drills.
    `update` takes the place of the optimizer's own where its slots are elsewhere, see lm.train.offload. With a
    `carry_spec` rows continue from the state's carry, and where batch["resets_B"] is true from the begin.
    Metrics are scalars: "loss", "grad_norm", "learning_rate", "skipped", and each term by its name; with `noise_scale`
    those of `_noise` too.
    """

    def gradients(weights, batch, carry, frozen, key):
        """(((loss, means), gradients), carry)"""

        def terms(weights, batch, carry, i):
            key_i = jax.random.fold_in(key, i)
            return carries.terms(objective, model, weights, batch, carry, key=key_i, frozen=frozen)

        def loss(weights, batch, carry, i, totals):
            parts, carry = terms(weights, batch, carry, i)
            means = _means(parts, totals or _weights(parts))
            return sum(means[name] * c for name, (_, _, c) in parts.items() if c), (means, carry)

        def one(i, batch, carry, totals):
            (value, (means, carry)), grads = jax.value_and_grad(loss, has_aux=True)(weights, batch, carry, i, totals)
            squares = {_SQUARES: jnp.square(optax.global_norm(grads))} if noise_scale else {}
            return ((value, means | squares), grads), carry

        if accumulate == 1:
            return one(0, batch, carry, None)
        split = jax.tree.map(lambda x: _micro_batches(x, accumulate), (batch, carries.rows_first(carry_spec, carry)))
        micro = (jnp.arange(accumulate), *split)
        # Weights depend on the batch alone: the compiler drops the rest of this pass.
        each = jax.lax.map(
            lambda m: _weights(terms(weights, m[1], carries.rows_back(carry_spec, m[2]), m[0])[0]), micro
        )
        totals = jax.tree.map(lambda x: x.sum(0), each)

        def add(total, m):
            i, batch, carry = m
            found, carry = one(i, batch, carries.rows_back(carry_spec, carry), totals)
            return jax.tree.map(jnp.add, total, found), carries.rows_first(carry_spec, carry)

        first = jax.tree.map(lambda x: x[0], micro)
        shapes = jax.eval_shape(lambda i, b, c: one(i, b, carries.rows_back(carry_spec, c), totals)[0], *first)
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        total, carry = jax.lax.scan(add, zeros, micro)
        carry = jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:]), carry)
        return total, carries.rows_back(carry_spec, carry)

    def step(
        state: State, batch: dict[str, jax.Array], rate: jax.Array, key: jax.Array
    ) -> tuple[State, dict[str, jax.Array]]:
        key = jax.random.fold_in(key, state.step)
        carry = state.carry
        if carry is not None and "resets_B" in batch:
            carry = carries.restart(carry_spec, carry, batch["resets_B"])
        ((value, means), grads), carry = gradients(state.params, batch, carry, state.frozen, key)
        if poison is not None:
            first, last = poison
            bad = (state.step >= first) & (state.step <= last)
            grads = jax.tree.map(lambda g: jnp.where(bad, jnp.nan, g), grads)
        grad_norm = optax.global_norm(grads)
        finite = jnp.isfinite(value) & jnp.isfinite(grad_norm)

        def keep(new, old):
            return jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)

        if update is not None:
            direction, slots = update(grads, state.optimizer, state.params, finite)
        else:
            direction, slots = optimizer.update(grads, state.optimizer, state.params)
            slots = keep(slots, state.optimizer)
        weights = jax.tree.map(lambda w, d: (w - rate * d).astype(w.dtype), state.params, direction)

        average = state.ema
        if ema_decay is not None:
            average = jax.tree.map(lambda a, w: ema_decay * a + (1 - ema_decay) * w, average, weights)
        rows = next(iter(batch.values())).shape[0]
        skipped = jnp.where(finite, 0, state.skipped + 1)
        state = dataclasses.replace(
            state,
            step=state.step + 1,
            examples=state.examples + rows,
            skipped=skipped,
            params=keep(weights, state.params),
            optimizer=slots,
            ema=keep(average, state.ema),
            carry=keep(carry, state.carry),
        )
        metrics = {"loss": value, "grad_norm": grad_norm, "learning_rate": jnp.asarray(rate), "skipped": skipped}
        if noise_scale:
            metrics |= _noise(means.pop(_SQUARES), jnp.square(grad_norm), rows, accumulate)
        return state, {**means, **metrics}

    return step


def _names(path: tuple) -> tuple[str, ...]:
    return tuple(k.key for k in path if isinstance(k, jax.tree_util.DictKey))


def _weights(terms: Terms) -> dict[str, jax.Array]:
    return {name: jnp.asarray(weight, jnp.float32) for name, (_, weight, _) in terms.items()}


def _means(terms: Terms, weights: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    # A batch without a single target has weight 0 and sum 0, and teaches nothing.
    return {name: s / jnp.where(weights[name] > 0, weights[name], 1) for name, (s, _, _) in terms.items()}


def _noise(micro_squares: jax.Array, square: jax.Array, rows: int, accumulate: int) -> dict[str, jax.Array]:
    """Unbiased {"noise_trace": tr Sigma of one row's gradient, "noise_square": |G|^2 of the true one}.

    McCandlish et al. 2018 (1812.06162), appendix A.1, from |g|^2 at two batch sizes: all rows, and those of a
    micro-batch. `micro_squares` is the sum over micro-batches, whose gradients are parts of the whole batch's: each is
    an estimate of G when multiplied by their number. Rows may weigh differently; that is noise like any other.
    """
    small = rows / accumulate
    small_square = accumulate * micro_squares  # The mean of |accumulate * g|^2.
    trace = (small_square - square) / (1 / small - 1 / rows)
    return {"noise_trace": trace, "noise_square": (rows * square - small * small_square) / (rows - small)}


def _micro_batches(x: jax.Array, count: int) -> jax.Array:
    # Every count-th row goes to one micro-batch, so that each device's own rows spread evenly over all of them.
    return x.reshape(x.shape[0] // count, count, *x.shape[1:]).swapaxes(0, 1)
