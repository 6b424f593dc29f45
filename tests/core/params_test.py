"""Declared parameters and the arrays made from them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.core import params, tree
from lm.core.params import Constant, Normal, Param, Uniform


def spec():
    return {
        "a": Param((4, 6), ("embed", "mlp"), Normal(0.5), ("embed",)),
        "b": {"c": Param((6,), ("mlp",), Constant(2.0), role="vector"), "d": Param((9,), ("norm",), Uniform(0.1))},
    }


def test_a_parameter_does_not_depend_on_its_neighbours():
    key, full = jax.random.key(0), spec()
    alone = params.initialize({"a": full["a"]}, key)
    np.testing.assert_array_equal(alone["a"], params.initialize(full, key)["a"])


def test_shapes_dtypes_and_counts_follow_the_declaration():
    weights = params.initialize(spec(), jax.random.key(1))
    assert jax.tree.map(jnp.shape, weights) == {"a": (4, 6), "b": {"c": (6,), "d": (9,)}}
    assert params.count(spec()) == 39 and params.count(spec(), "vector") == 6
    assert set(tree.flatten(weights)) == {"a", "b/c", "b/d"}


def test_stacking_keeps_what_is_contracted():
    stacked = params.stack(spec(), 3)["a"]
    assert stacked.shape == (3, 4, 6) and stacked.axes == ("layers", "embed", "mlp") and stacked.fan_in == 4


@pytest.mark.parametrize(
    "arguments", [((2, 3), ("embed",)), ((2, 3), ("embed", "embed")), ((2,), ("embed",), Normal(1.0), ("mlp",))]
)
def test_contradictory_declarations_are_refused(arguments):
    shape, axes, *rest = arguments
    with pytest.raises(ValueError):
        Param(shape, axes, *(rest or [Normal(1.0)]))
