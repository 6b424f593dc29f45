"""Logical names become mesh axes by one table, and what the table or the mesh cannot do is refused by name."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from lm.core.errors import UsageError
from lm.core.params import Constant, Param
from lm.parallel import rules
from lm.parallel.mesh import Mesh

SIZES = {"stage": 1, "data": 2, "fsdp": 2, "expert": 1, "seq": 1, "tensor": 2}


@pytest.mark.parametrize(
    "axes, shape, sizes, expected",
    [
        (("layers", "embed", "mlp"), (3, 8, 16), SIZES, P(None, "fsdp", "tensor")),
        (("vocab", "embed"), (128, 8), SIZES, P("tensor", "fsdp")),
        (("embed", "mlp"), (7, 9), dict.fromkeys(SIZES, 1), P(None, None)),
        (("batch", "length", None), (8, 6, 5), SIZES, P(("data", "fsdp"), None, None)),
        (("batch", "length"), (8, 6), SIZES | {"seq": 2, "fsdp": 1}, P("data", "seq")),
    ],
)
def test_an_array_lies_over_the_mesh_axes_of_its_names(axes, shape, sizes, expected):
    assert rules.partition(axes, shape, sizes) == expected


@pytest.mark.parametrize("axis", ["kv_heads", "act_kv_heads"])
def test_fewer_key_heads_than_shards_are_held_whole(axis):
    assert rules.partition((axis, "head_dim"), (3, 4), SIZES) == P(None, None)
    assert rules.partition((axis, "head_dim"), (4, 4), SIZES) == P("tensor", None)


@pytest.mark.parametrize(
    "axes, shape, words",
    [
        (("embd",), (8,), "unknown logical axis 'embd'; did you mean embed"),
        (("heads", "mlp"), (4, 4), "'heads' and 'mlp' of one array both map to mesh axis 'tensor'"),
        (("embed",), (7,), "'embed' of length 7 does not divide over mesh fsdp=2"),
        (("batch",), (6,), "'batch' of length 6 does not divide over mesh data=2 x fsdp=2"),
        (("heads",), (3,), "'heads' of length 3 does not divide over mesh tensor=2"),
    ],
)
def test_what_cannot_be_laid_out_is_named(axes, shape, words):
    with pytest.raises(UsageError) as caught:
        rules.partition(axes, shape, SIZES)
    assert words in str(caught.value)


def test_a_clash_on_an_axis_of_size_1_is_none():
    assert rules.partition(("heads", "mlp"), (4, 4), SIZES | {"tensor": 1}) == P(None, None)


def test_a_spec_becomes_shardings_that_hold_each_part_once():
    mesh = Mesh(fsdp=2, tensor=2).build()
    spec = {"w": Param((8, 16), ("embed", "mlp"), Constant(), ("embed",)), "b": Param((16,), ("norm",), Constant())}
    places = rules.shardings(spec, mesh)
    assert places["w"].shard_shape((8, 16)) == (4, 8) and places["b"].is_fully_replicated


@pytest.mark.parametrize("settings, rows", [({}, 1), ({"fsdp": 8}, 1), ({"fsdp": 2, "tensor": 2}, 2), ({"seq": 8}, 8)])
def test_a_batch_is_split_by_rows_over_data_fsdp_and_expert_alone(settings, rows):
    sharding = rules.batch_sharding(Mesh(**settings).build())
    assert sharding.shard_shape((8, 6)) == (rows, 6)


def test_an_activation_is_constrained_on_the_mesh_in_context_and_nowhere_else():
    mesh = Mesh(fsdp=2, tensor=2).build()

    def constrained(x):
        return rules.constrain(x, "batch", "act_mlp")

    x = jnp.zeros((8, 16))
    assert constrained(x) is x and not rules.is_sharded("act_mlp")
    with jax.set_mesh(mesh):
        assert jax.jit(constrained)(x).sharding.shard_shape(x.shape) == (2, 8)
        assert rules.is_sharded("act_mlp") and rules.is_sharded("batch") and not rules.is_sharded("length")
