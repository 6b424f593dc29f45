import jax
import numpy as np
import pytest
from jax.sharding import AxisType

from lm.layers.dropout import dropout, keep_mask


@pytest.mark.parametrize("shape", [(), (7,), (3, 5, 11)])
@pytest.mark.parametrize("rate", [0.1, 0.2, 0.5, 0.65])
def test_the_mask_is_jaxs_own_bit_for_bit(rate, shape):
    for seed in range(3):
        key = jax.random.fold_in(jax.random.key(5), seed)
        theirs = jax.random.bernoulli(key, 1 - rate, shape)
        np.testing.assert_array_equal(jax.jit(lambda key: keep_mask(key, rate, shape))(key), theirs)


def test_the_mask_is_the_same_under_vmap_and_on_a_mesh():
    keys = jax.random.split(jax.random.key(1), 3)
    each = jax.vmap(lambda key: keep_mask(key, 0.3, (4, 6)))(keys)
    np.testing.assert_array_equal(each, [jax.random.bernoulli(key, 0.7, (4, 6)) for key in keys])
    mesh = jax.make_mesh((2, 2), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
    sharding = jax.NamedSharding(mesh, jax.P("a", "b"))
    masked = jax.jit(lambda key: keep_mask(key, 0.3, (4, 6)), out_shardings=sharding)
    np.testing.assert_array_equal(masked(keys[0]), each[0])
    assert "all-" not in masked.lower(keys[0]).compile().as_text()


def test_keys_of_other_generators_work_too():
    key = jax.random.key(0, impl="rbg")
    np.testing.assert_array_equal(keep_mask(key, 0.3, (50,)), jax.random.bernoulli(key, 0.7, (50,)))


def test_a_share_is_zero_and_the_rest_scaled_up():
    dropped = np.asarray(dropout(np.ones(10_000, np.float32), 0.2, jax.random.key(0)))
    assert set(np.unique(dropped)) == {np.float32(0), np.float32(1) / np.float32(0.8)}
    assert abs((dropped == 0).mean() - 0.2) < 0.016  # Four standard deviations.
