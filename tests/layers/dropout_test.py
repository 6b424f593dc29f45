import jax
import numpy as np
import pytest

from lm.layers.dropout import dropout, keep_mask


@pytest.mark.parametrize("shape", [(), (7,), (3, 5, 11)])
@pytest.mark.parametrize("rate", [0.1, 0.2, 0.5, 0.65])
def test_the_mask_is_jaxs_own_bit_for_bit(rate, shape):
    for seed in range(3):
        key = jax.random.fold_in(jax.random.key(5), seed)
        theirs = jax.random.bernoulli(key, 1 - rate, shape)
        np.testing.assert_array_equal(jax.jit(lambda key: keep_mask(key, rate, shape))(key), theirs)


def test_keys_of_other_generators_work_too():
    key = jax.random.key(0, impl="rbg")
    np.testing.assert_array_equal(keep_mask(key, 0.3, (50,)), jax.random.bernoulli(key, 0.7, (50,)))


def test_a_share_is_zero_and_the_rest_scaled_up():
    dropped = np.asarray(dropout(np.ones(10_000, np.float32), 0.2, jax.random.key(0)))
    assert set(np.unique(dropped)) == {np.float32(0), np.float32(1) / np.float32(0.8)}
    assert abs((dropped == 0).mean() - 0.2) < 0.016  # Four standard deviations.
