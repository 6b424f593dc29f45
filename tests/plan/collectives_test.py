"""Bytes of collectives, read from programs: hand-written ones, and compiled ones whose traffic is known."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from lm.parallel.mesh import Mesh
from lm.plan import collectives

PROGRAM = """HloModule step

%body (p: (s32[], f32[8,16])) -> (s32[], f32[8,16]) {
  %x = f32[1,16] slice(%p)
  %g = f32[8,16] all-gather(%x), replica_groups=[1,8]<=[8], dimensions={0}
  %r = (f32[4]{0}, f32[4]{0}) all-reduce(%a, %b), replica_groups={{0,1},{2,3},{4,5},{6,7}}, to_apply=%add
}

%wide_body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %m = bf16[8,16] all-gather(%x), replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_1'}, dimensions={0}
}

%wide_condition (p: (s32[], f32[8])) -> pred[] {
  %bound = s32[]{:T(128)} constant(3)
}

%add (a: f32[], b: f32[]) -> f32[] {
  %s = f32[] add(%a, %b)
}

%all-reduce-scatter.3.clone (a: f32[8]) -> f32[4] {
  %all = f32[8]{0} all-reduce(%a), channel_id=5, replica_groups={{0,1},{2,3},{4,5},{6,7}}, to_apply=%add
}

%async (a: bf16[32]) -> bf16[4] {
  %rs = bf16[4]{0} reduce-scatter(%a), replica_groups=[1,8]<=[8], dimensions={0}
}

ENTRY %main (a: f32[8,16]) -> f32[8,16] {
  %w = (s32[], f32[8,16]) while(%t), condition=%c, body=%body, backend_config={"known_trip_count":{"n":"5"}}
  %v = (s32[], f32[8]) while(%t), condition=%wide_condition, body=%wide_body
  %s = ((bf16[32]), bf16[4]) async-start(%v), calls=%async
  %f = f32[4]{0} fusion(%v), kind=kCustom, calls=%all-reduce-scatter.3.clone
  %p = f32[8]{0} collective-permute(%x), channel_id=1, source_target_pairs={{0,2},{2,0},{1,3},{3,1}}
  %q = f32[8]{0} collective-permute(%y), channel_id=1, source_target_pairs={{0,2},{2,0},{1,3},{3,1}}
  %u = f32[2]{0} all-gather(%x), channel_id=7, replica_groups={{0,2},{1,3},{4,6},{5,7}}, dimensions={0}
  %o = f32[2]{0} all-gather(%y), channel_id=7, replica_groups={{0,2},{1,3},{4,6},{5,7}}, dimensions={0}
  %h = (f32[2]{0}, f32[16]{0}) all-gather-start(%y), replica_groups=[1,8]<=[8], dimensions={0}
  %k = (f32[16]{0}, f32[16]{0}) collective-permute-start(%z), source_target_pairs={{0,4},{4,0},{1,5},{5,1}}
}
"""


@pytest.fixture(scope="module")
def mesh():
    return Mesh(data=2, fsdp=2, tensor=2).build(jax.devices()[:8])


def test_loops_groups_and_asynchronous_forms_are_counted(mesh):
    everything = ("data", "fsdp", "tensor")
    found = {(c.kind, c.axes): (c.count, c.sent_bytes) for c in collectives.read(PROGRAM, mesh)}
    assert found == {
        ("all-gather", everything): (6, 5 * 8 * 16 * 4 * 7 / 8 + 16 * 4 * 7 / 8),
        ("all-gather", ("fsdp", "tensor")): (3, 3 * 8 * 16 * 2 * 3 / 4),
        ("all-reduce", ("tensor",)): (5, 5 * 2 * 8 * 4 * 1 / 2),
        ("reduce-scatter", everything): (1, 32 * 2 * 7 / 8),
        ("collective-permute", ("data",)): (1, 16 * 4),
        ("all-reduce-scatter", ("tensor",)): (1, 8 * 4 / 2),  # Of which each keeps a part.
        ("collective-permute", ("fsdp",)): (2, 2 * 8 * 4),  # Two that the program asks for.
        ("all-gather", ("fsdp",)): (1, 2 * 4 / 2),  # In pieces, which share a channel.
    }


def test_a_compiled_reduction_moves_what_the_ring_does(mesh):
    """A product over a sharded dimension leaves partial sums, which meet over that axis alone."""
    spread = [NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("data", "tensor"), ("tensor", None))]
    x, w = (jax.ShapeDtypeStruct(s, jnp.float32, sharding=p) for s, p in zip(((8, 64), (64, 32)), spread, strict=True))
    out = NamedSharding(mesh, PartitionSpec("data"))
    text = jax.jit(jnp.matmul, out_shardings=out).lower(x, w).compile().as_text()
    (found,) = collectives.read(text, mesh)
    assert (found.kind, found.axes, found.count) == ("all-reduce", ("tensor",), 1)
    assert found.sent_bytes == 2 * (4 * 32 * 4) / 2


def test_the_largest_buffer_is_found():
    text = jax.jit(lambda x: (x[:, None] * x[None, :]).sum(0) @ x).lower(jnp.ones(96)).as_text("hlo")
    assert collectives.largest_buffer(text) == 96 * 96 * 4


@pytest.mark.parametrize(
    "form,groups",
    [
        ("mesh['a'=2,'b'=4] {'b'}", [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ("mesh['a'=2,'b'=4] {'a'}", [[0, 4], [1, 5], [2, 6], [3, 7]]),
        ("mesh['a'=2,'b'=4] {'b':(1)2}", [[0, 2], [1, 3], [4, 6], [5, 7]]),
        ("mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'a'}", [[0, 1], [2, 3], [4, 5], [6, 7]]),
        ("{{0,2},{1,3},{4,6},{5,7}}", [[0, 2], [1, 3], [4, 6], [5, 7]]),
        ("[4,2]<=[2,4]T(1,0)", [[0, 4], [1, 5], [2, 6], [3, 7]]),
    ],
)
def test_every_form_of_groups_is_read(form, groups):
    assert collectives._groups(f"all-gather(%x), replica_groups={form}, dimensions={{0}}", 8) == groups


def test_a_form_that_is_not_known_is_an_error():
    with pytest.raises(ValueError, match="no such form"):
        collectives._groups("all-gather(%x), replica_groups=@9", 8)
