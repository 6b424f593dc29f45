import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.core import params as specs
from lm.core.errors import UsageError
from lm.layers.buckets import Buckets, bucket_bias


def naive_bucket(ahead, count, longest, causal):
    """One pair's bucket, in whole numbers: the largest border that the distance reaches."""
    first = 0
    if not causal:
        count //= 2
        first = count if ahead > 0 else 0
    distance = abs(ahead) if not causal else max(-ahead, 0)
    exact = count // 2
    if distance < exact:
        return first + distance
    far = [k for k in range(count - exact) if distance ** (count - exact) >= longest**k * exact ** (count - exact - k)]
    return first + exact + far[-1]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("count, longest", [(32, 128), (16, 64), (10, 7), (4, 3), (7, 20), (32, 512)])
def test_buckets_equal_a_loop_over_pairs_in_whole_numbers(count, longest, causal):
    queries, keys = np.array([[0, 3, 290], [7, 600, 5]]), np.arange(0, 601)[None]
    rows = Buckets(count, longest).rows(jnp.asarray(queries), jnp.asarray(keys), causal)
    expected = [[[naive_bucket(int(k - q), count, longest, causal) for k in keys[0]] for q in row] for row in queries]
    np.testing.assert_array_equal(rows, expected)
    assert rows.max() < count


@pytest.mark.hf
@pytest.mark.parametrize("causal", [True, False])
def test_buckets_equal_those_of_transformers_at_all_distances(causal):
    torch, t5 = pytest.importorskip("torch"), pytest.importorskip("transformers.models.t5.modeling_t5")
    ahead = np.arange(-700, 700)
    for count in (8, 16, 24, 32, 64, 128):
        for longest in (count, 100, 128, 256, 512):
            theirs = t5.T5Attention._relative_position_bucket(torch.tensor(ahead), not causal, count, longest)
            ours = Buckets(count, longest).rows(jnp.array([[0]]), jnp.asarray(ahead)[None], causal)
            np.testing.assert_array_equal(ours[0, 0], theirs.numpy())


def test_the_bias_of_a_pair_is_its_buckets_entry_and_gets_its_gradient():
    buckets = Buckets(8, 16)
    p = specs.initialize(buckets.spec(3, 32), jax.random.key(0))
    index = jnp.arange(20)[None]
    rows = buckets.rows(index, index, causal=False)
    bias = bucket_bias(p, rows)
    assert bias.shape == (1, 3, 20, 20)
    for h, q, k in ((0, 0, 19), (1, 7, 7), (2, 12, 3)):
        assert bias[0, h, q, k] == p["table"][naive_bucket(k - q, 8, 16, False), h]
    weights = np.random.default_rng(0).standard_normal((1, 3, 20, 20)).astype(np.float32)
    gradient = jax.grad(lambda p: (bucket_bias(p, rows) * weights).sum())(p)["table"]
    expected = np.zeros((8, 3))
    for h, q, k in np.ndindex(3, 20, 20):
        expected[rows[0, q, k], h] += weights[0, h, q, k]
    np.testing.assert_allclose(gradient, expected, atol=1e-5)


@pytest.mark.parametrize("settings", [(2, 128), (32, 16)])
def test_buckets_without_room_for_far_distances_are_refused(settings):
    with pytest.raises(UsageError, match="longest more than half"):
        Buckets(*settings)
