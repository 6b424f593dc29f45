import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from lm.core.params import Normal, initialize
from lm.layers.linear import linear, linear_spec, project
from lm.parallel.mesh import Mesh
from lm.parallel.rules import MESH_AXES, constrain


def mesh_of(**sizes):
    shape = tuple(sizes.get(axis, 1) for axis in MESH_AXES)
    return jax.make_mesh(shape, MESH_AXES, axis_types=(AxisType.Auto,) * len(shape))


def test_linear_equals_einsum_over_several_inputs_and_outputs():
    spec = linear_spec({"heads": 3, "head_dim": 4}, {"embed": 5}, Normal(1.0), bias=True)
    p = initialize(spec, jax.random.key(0)) | {"bias": jnp.arange(5.0)}
    x = np.random.default_rng(0).standard_normal((2, 6, 3, 4), np.float32)
    expected = np.einsum("blhc,hcd->bld", x, p["kernel"]) + np.arange(5.0)
    np.testing.assert_allclose(linear(p, x, contracted=2), expected, atol=1e-5)
    assert spec["kernel"].inputs == ("heads", "head_dim") and spec["kernel"].fan_in == 12


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("sharded", [False, True])
def test_gradients_of_both_operands_equal_numpy_in_both_dtypes(axis, sharded):
    rng = np.random.default_rng(1)
    x, kernel, g = (rng.standard_normal(s, np.float32) for s in ((4, 6, 8), (8, 16), (4, 6, 16)))
    stored = kernel if axis == 0 else kernel.T
    dkernel = np.einsum("bli,blo->io", x, g)
    dkernel = dkernel if axis == 0 else dkernel.T

    def weighted(x, kernel):
        return jnp.sum(project(x, kernel, axis) * g)

    with jax.set_mesh(mesh_of(data=4, seq=2 if sharded else 1) if sharded else mesh_of(data=8)):
        for dtype, tolerance in ((jnp.float32, 1e-5), (jnp.bfloat16, 3e-2)):  # bfloat16 keeps 8 bits of the operands
            dx, dk = jax.jit(jax.grad(weighted, (0, 1)))(x.astype(dtype), stored)
            assert dx.dtype == dtype and dk.dtype == jnp.float32
            np.testing.assert_allclose(dx.astype(jnp.float32), g @ kernel.T, atol=tolerance * 10)
            np.testing.assert_allclose(dk, dkernel, atol=tolerance * 10)


def test_a_bfloat16_kernel_gradient_is_not_rounded_to_bfloat16():
    x, kernel = jnp.full((300, 1), 1.0, jnp.bfloat16), jnp.ones((1, 1))
    gradient = jax.jit(jax.grad(lambda k: jnp.sum(project(x, k))))(kernel)
    # 300 terms of one: bfloat16 has no 301 and stops adding ones at 256.
    assert float(gradient[0, 0]) == 300.0


def collectives(mesh, function, *arrays):
    """[(kind, the result's shape)] of the compiled function."""
    with jax.set_mesh(mesh):
        text = jax.jit(function).lower(*arrays).compile().as_text()
    kinds = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"
    return [(kind, shape.split("{")[0]) for shape, kind in re.findall(rf"= (\S+) ({kinds})\(", text)]


def test_a_product_gathers_no_sequence_that_is_sharded():
    mesh = Mesh(seq=4, fsdp=2, data=1).build(jax.devices()[:8])
    kernel = jax.ShapeDtypeStruct((16, 24), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec("fsdp")))

    def loss(kernel, x):
        x = constrain(x, "batch", "length", None)
        return jnp.sum(constrain(linear({"kernel": kernel}, x), "batch", "length", None) ** 2)

    found = collectives(mesh, jax.grad(loss, (0, 1)), kernel, jnp.zeros((4, 8, 16)))
    assert ("all-gather", "f32[16,24]") in found
    assert all(shape in ("f32[16,24]", "f32[8,24]") for _, shape in found), found


def test_a_pair_of_products_gathers_the_parts_of_a_sequence_once_and_scatters_their_sums_once():
    mesh = Mesh(tensor=4, data=2).build(jax.devices()[:8])
    place = {"up": PartitionSpec(None, "tensor"), "down": PartitionSpec("tensor")}
    shapes = {"up": (16, 32), "down": (32, 16)}
    kernels = {n: jax.ShapeDtypeStruct(shapes[n], jnp.float32, sharding=NamedSharding(mesh, place[n])) for n in shapes}

    def pair(kernels, x):
        x = constrain(x, "batch", "residual_length", "act_embed")
        hidden = constrain(jax.nn.relu(linear({"kernel": kernels["up"]}, x)), "batch", "length", "act_mlp")
        return constrain(linear({"kernel": kernels["down"]}, hidden), "batch", "residual_length", "act_embed")

    found = collectives(mesh, pair, kernels, jnp.zeros((4, 8, 16)))
    # XLA:CPU reduces all and keeps a part, where others scatter.
    assert sorted(kind for kind, _ in found) == ["all-gather", "all-reduce"], found
