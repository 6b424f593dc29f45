import jax.numpy as jnp
import numpy as np
import pytest

from lm.core.errors import UsageError
from lm.layers import alibi
from lm.layers.attention import Form, attention
from lm.models.decoder import Decoder

B, L, H, K, C = 2, 12, 6, 3, 8


@pytest.mark.hf
def test_slopes_and_biases_equal_those_of_bloom():
    torch, bloom = pytest.importorskip("torch"), pytest.importorskip("transformers.models.bloom.modeling_bloom")
    for heads in range(1, 34):
        theirs = bloom.build_alibi_tensor(torch.ones(1, 5, dtype=torch.int64), heads, torch.float32).numpy()
        np.testing.assert_allclose(alibi.slopes(heads)[:, None] * np.arange(5)[None], theirs[:, 0], rtol=1e-6)


@pytest.mark.parametrize("scale", [C**-0.5, 0.2])
def test_attention_equals_the_papers_biases_by_distance(scale):
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((B, L, h, C), np.float32) for h in (H, K, K))
    documents = np.array([[0] * 5 + [1] * 7, [0] * 12])
    positions = np.array([[*range(5), *range(7)], range(12)])
    wide = alibi.widened(q, k, v, jnp.asarray(positions), scale)
    actual = attention(Form(scale=scale), *wide, documents=(jnp.asarray(documents),) * 2)
    assert not actual[..., C:].any()
    k, v = (np.repeat(x.astype(np.float64), H // K, 2) for x in (k, v))
    distance = positions[:, :, None] - positions[:, None, :]
    scores = scale * np.einsum("blhc,bshc->bhls", q, k) - alibi.slopes(H)[None, :, None, None] * distance[:, None]
    seen = np.tri(L, dtype=bool) & (documents[:, :, None] == documents[:, None, :])
    weights = np.where(seen[:, None], np.exp(scores), 0)
    expected = np.einsum("bhls,bshc->blhc", weights / weights.sum(-1, keepdims=True), v)
    np.testing.assert_allclose(actual[..., :C], expected, atol=1e-5)


def test_far_positions_are_exact_in_bfloat16():
    positions, heads = np.array([[0, 255, 256, 4097, 30001, 65535]]), 8  # Whose slopes are powers of two.
    zeros = jnp.zeros((1, 6, heads, C), jnp.bfloat16)
    q, k, _ = alibi.widened(zeros, zeros, zeros, jnp.asarray(positions), 0.125)
    scores = 0.125 * jnp.einsum("blhc,bshc->hls", q, k, preferred_element_type=jnp.float32)
    np.testing.assert_array_equal(scores[:, 0], alibi.slopes(heads)[:, None] * positions)


@pytest.mark.parametrize("settings", [{"attention_soft_cap": 5.0}, {"rope_base": 500.0}], ids=str)
def test_settings_without_sense_are_refused(settings):
    with pytest.raises(UsageError, match="alibi"):
        Decoder(positions="alibi", **settings)


def test_a_prefix_seen_both_ways_is_not_offered():
    assert "prefix" not in Decoder(positions="alibi").offers
