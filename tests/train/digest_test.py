"""A digest depends on bits and places, and on nothing else."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from lm.train import digest
from lm.train.digest import digests

DTYPES = ("float32", "bfloat16", "float16", "int32", "uint32", "int8", "uint8", "bool")


def array(dtype, shape=(8, 16), seed=0):
    return jnp.asarray(np.random.default_rng(seed).integers(0, 100, shape) % (2 if dtype == "bool" else 100), dtype)


def reference(x):
    """The same two sums in numpy's 64-bit integers, from the bytes."""
    words = np.ascontiguousarray(x).view(f"u{x.dtype.itemsize}").reshape(-1).astype(np.uint64)
    low = np.uint64(2**32 - 1)

    def mix(v):
        v = ((v ^ (v >> np.uint64(16))) * np.uint64(0x85EBCA6B)) & low
        v = ((v ^ (v >> np.uint64(13))) * np.uint64(0xC2B2AE35)) & low
        return v ^ (v >> np.uint64(16))

    i = np.arange(words.size, dtype=np.uint64)
    lanes = mix(words ^ mix(i + np.uint64(1))), mix((words + mix(i ^ np.uint64(0x9E3779B9))) & low)
    return [int(lane.sum() & low) for lane in lanes]


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_sums_are_those_of_a_plain_loop_over_the_bytes(dtype):
    x = array(dtype)
    assert np.asarray(digest._lanes(x, None)).tolist() == reference(np.asarray(x))


@pytest.mark.parametrize("dtype", ("float32", "bfloat16", "bool"))
def test_no_mesh_and_no_sharding_changes_it(dtype):
    x = array(dtype)
    found = set()
    for count in (1, 2, 4, 8):
        mesh = jax.make_mesh((count,), ("a",), devices=jax.devices()[:count])
        for spec in (PartitionSpec(), PartitionSpec("a"), PartitionSpec(None, "a")):
            found.add(digests({"x": jax.device_put(x, NamedSharding(mesh, spec))})["x"])
    assert len(found) == 1


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_single_bit_counts(dtype):
    x = np.asarray(array(dtype, (5, 7)))
    whole = digests({"x": jnp.asarray(x)})["x"]
    data = x.tobytes()
    for bit in range(0, 8 * len(data), 8 if dtype == "bool" else 13):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        y = np.frombuffer(bytes(flipped), x.dtype).reshape(x.shape)
        assert digests({"x": jnp.asarray(y)})["x"] != whole, bit


def test_order_shape_and_type_count():
    x = jnp.arange(12.0).reshape(3, 4)
    others = {
        "rows": x[::-1],
        "columns": x[:, ::-1],
        "shape": x.reshape(4, 3),
        "type": jax.lax.bitcast_convert_type(x, jnp.int32),
        "negative zero": x.at[0, 0].set(-0.0),
        "same": x,
    }
    found = digests(others)
    assert len(set(found.values())) == len(others) and found["same"] == digests({"x": x})["x"]


def test_places_beyond_2_to_the_32_are_told_apart():
    """Shapes alone are traced: rows 2^32 elements apart have one low word and must differ by the high one."""
    shape = (4, 2**16, 2**16)
    high = jax.eval_shape(lambda: digest._positions(shape))
    assert high.shape == shape
    # The same arithmetic on a small slab: two rows whose inner indices are equal.
    inner = digest._index((1, 4), range(1, 2))
    outer = digest._mix(digest._index((3, 4), range(1)))
    assert len(np.unique(np.asarray(jnp.broadcast_to(inner, (3, 4)) ^ outer))) == 12


def test_paths_are_those_of_any_pytree_without_what_is_empty():
    tree = {"a": {"b": jnp.ones(2)}, "none": None, "empty": {}, "slots": ({"mu": jnp.ones(2)}, ())}
    assert list(digests(tree)) == ["a/b", "slots/0/mu"]
