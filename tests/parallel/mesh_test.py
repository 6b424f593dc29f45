"""A mesh takes the devices that there are, and says by its numbers where it cannot."""

import jax
import pytest
from jax.sharding import AxisType

from lm.core.errors import UsageError
from lm.parallel.mesh import Mesh, under
from lm.parallel.rules import MESH_AXES


@pytest.mark.parametrize(
    "mesh, devices, data",
    [
        (Mesh(), 1, 1),
        (Mesh(), 8, 8),
        (Mesh(fsdp=2, tensor=2), 8, 2),
        (Mesh(fsdp=8), 8, 1),
        (Mesh(data=2, fsdp=4), 8, 2),
        (Mesh(fsdp=4, slices=2), 16, 4),
        (Mesh(preset="dp"), 8, 8),
        (Mesh(preset="pp", stage=4), 8, 2),
    ],
)
def test_data_takes_the_devices_that_the_other_axes_leave(mesh, devices, data):
    sizes = mesh.sizes(devices)
    assert tuple(sizes) == MESH_AXES and sizes["data"] == data
    assert (sizes["fsdp"], sizes["tensor"]) == (mesh.fsdp, mesh.tensor)


@pytest.mark.parametrize(
    "mesh, sizes",
    [
        (Mesh(preset="fsdp"), {"fsdp": 16}),
        (Mesh(preset="fsdp", slices=2), {"data": 2, "fsdp": 8}),
        (Mesh(preset="fsdp", fsdp=4), {"data": 4, "fsdp": 4}),
        (Mesh(preset="fsdp_tp"), {"fsdp": 8, "tensor": 2}),
        (Mesh(preset="fsdp_tp", tensor=8), {"fsdp": 2, "tensor": 8}),
        (Mesh(preset="fsdp_cp", data=2), {"data": 2, "fsdp": 4, "seq": 2}),
        (Mesh(preset="fsdp_ep", expert=4), {"fsdp": 4, "expert": 4}),
        (Mesh(preset="pp"), {"data": 8, "stage": 2}),
    ],
    ids=str,
)
def test_a_preset_gives_fsdp_the_devices_that_are_left_and_its_other_axis_two(mesh, sizes):
    assert {a: n for a, n in mesh.sizes(16).items() if n > 1} == sizes


def test_what_is_given_leaves_nothing_to_choose():
    assert Mesh(preset="auto", fsdp=4).preset == "" and Mesh(preset="auto").preset == "auto"


def test_a_preset_refuses_an_axis_that_it_does_not_have():
    with pytest.raises(UsageError, match="mesh.tensor=2 is no axis of mesh.preset=fsdp_cp"):
        Mesh(preset="fsdp_cp", tensor=2)
    with pytest.raises(UsageError, match="fsdp_tpp.*fsdp_tp"):
        Mesh(preset="fsdp_tpp")


@pytest.mark.parametrize(
    "mesh, devices, words",
    [
        (Mesh(fsdp=2, tensor=3), 8, ["fsdp=2 x tensor=3", "multiple of 6", "there are 8"]),
        (Mesh(fsdp=16), 8, ["fsdp=16", "multiple of 16", "there are 8"]),
        (Mesh(data=3), 8, ["data=3", "covers 3", "there are 8", "leave mesh.data unset"]),
        (Mesh(data=4, tensor=4), 8, ["data=4 x tensor=4", "covers 16", "there are 8"]),
        (Mesh(data=1), 8, ["covers 1", "there are 8"]),
        (Mesh(slices=3), 8, ["mesh.slices=3", "mesh.data=8"]),
        (Mesh(preset="fsdp_tp", tensor=3), 8, ["fsdp=2 x tensor=3", "covers 6", "there are 8"]),
    ],
)
def test_a_mesh_that_does_not_fit_names_the_numbers(mesh, devices, words):
    with pytest.raises(UsageError) as caught:
        mesh.sizes(devices)
    assert all(word in str(caught.value) for word in words), caught.value


@pytest.mark.parametrize("axis", ["data", "tensor", "slices"])
def test_a_size_below_1_is_refused(axis):
    with pytest.raises(UsageError, match=rf"mesh\.{axis}=0 must be at least 1"):
        Mesh(**{axis: 0})


def test_the_built_mesh_has_all_axes_in_order_and_each_device_once():
    mesh = Mesh(fsdp=2, tensor=2).build()
    assert mesh.axis_names == MESH_AXES and mesh.devices.shape == (1, 2, 2, 1, 1, 2)
    assert set(mesh.devices.flat) == set(jax.devices()) and set(mesh.axis_types) == {AxisType.Auto}
    assert Mesh(tensor=2).build(jax.devices()[:4]).size == 4


def test_under_puts_the_mesh_in_context_for_the_call_alone():
    mesh = Mesh(fsdp=2).build()
    seen = under(mesh, lambda: jax.sharding.get_abstract_mesh())()
    assert seen == mesh.abstract_mesh and jax.sharding.get_abstract_mesh().empty
