"""What the rows of one batch hand on to those that continue them: recurrent states, and memories of hidden states."""

from typing import Any

import jax
import jax.numpy as jnp

from lm.core import params as specs


def carry_spec(model: Any, objective: Any, batch_size: int) -> Any:
    """A tree of Param for a batch of rows; None where the model hands nothing on, or the objective does not take it."""
    return model.carry_spec(batch_size) if hasattr(model, "carry_spec") and hasattr(objective, "carried") else None


def terms(
    objective: Any, model: Any, params: Any, batch: Any, carry: Any, *, key: Any = None, frozen: Any = None
) -> tuple[Any, Any]:
    """(the objective's terms, the carry after the batch): None before is None after."""
    if carry is None:
        return objective.loss(model, params, batch, key=key, frozen=frozen), None
    return objective.carried(model, params, batch, carry, key=key, frozen=frozen)


def restart(spec: Any, carry: Any, resets_B: jax.Array) -> Any:
    """The carry with the rows where `resets_B` is true as they are at the begin of a text."""
    new = specs.initialize(spec, jax.random.key(0))

    def choose(p, old, new):
        shape = [-1 if axis == "batch" else 1 for axis in p.axes]
        return jnp.where(resets_B.reshape(shape), new, old)

    return specs.map_spec(choose, spec, carry, new)


def rows_first(spec: Any, carry: Any) -> Any:
    """Every leaf with its rows as the first dimension, as those of a batch lie."""
    return specs.map_spec(lambda p, x: jnp.moveaxis(x, p.axes.index("batch"), 0), spec, carry)


def rows_back(spec: Any, carry: Any) -> Any:
    """The inverse of `rows_first`."""
    return specs.map_spec(lambda p, x: jnp.moveaxis(x, 0, p.axes.index("batch")), spec, carry)
