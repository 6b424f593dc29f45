import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.core import params as specs
from lm.core.errors import UsageError
from lm.core.params import Normal
from lm.layers import relative
from lm.layers.attention import Form
from lm.layers.block import Layer
from lm.layers.relative import Relative
from lm.models.decoder import Decoder

B, L, S, H, K, C = 2, 7, 9, 4, 2, 8
DOCUMENTS = np.array([[0, 0, 0, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0, -1]])


def draw(keys=L):
    rng = np.random.default_rng(0)
    return tuple(rng.standard_normal(s, np.float32) for s in ((B, L, H, C), (B, keys, K, C), (B, keys, K, C)))


def tables(causal, clip=3, values=True):
    return specs.initialize(Relative(clip, values).spec(C, causal, Normal(1.0)), jax.random.key(0))


def naive(causal, clip, p, q, k, v, starts, documents=None):
    """A loop over rows, heads and queries in float64."""
    p, out = {name: np.asarray(x, np.float64) for name, x in p.items()}, np.zeros(q.shape)
    for b, i, h in np.ndindex(q.shape[:3]):
        at, seen = starts[b] + i, np.ones(k.shape[1], bool)
        behind = at - np.arange(k.shape[1])
        rows = np.clip(behind, 0, clip) if causal else np.clip(behind, -clip, clip) + clip
        if causal:
            seen &= behind >= 0
        if documents is not None:
            seen &= documents[b] == documents[b, i]
        scores = (k[b, :, h // (H // K)] + p["keys"][rows]) @ q[b, i, h] * C**-0.5
        weights = np.where(seen, np.exp(scores), 0)
        given = v[b, :, h // (H // K)] + (p["values"][rows] if "values" in p else 0)
        out[b, i, h] = weights / weights.sum() @ given
    return out


@pytest.mark.parametrize("values", [True, False])
@pytest.mark.parametrize("causal", [True, False])
def test_attention_equals_a_loop(causal, values):
    p, (q, k, v) = tables(causal, values=values), draw()
    for documents in (None, DOCUMENTS):
        pair = None if documents is None else (jnp.asarray(documents),) * 2
        actual = relative.attend(Form(causal), p, q, k, v, documents=pair)
        np.testing.assert_allclose(actual, naive(causal, 3, p, q, k, v, [0, 0], documents), atol=1e-5)


def test_queries_start_where_their_row_stands():
    p, (q, k, v), starts = tables(True), draw(S), np.array([2, 0], np.int32)
    actual = relative.attend(Form(), p, q, k, v, starts_B=jnp.asarray(starts))
    np.testing.assert_allclose(actual, naive(True, 3, p, q, k, v, starts), atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("causal", [True, False])
def test_query_blocks_change_neither_values_nor_gradients(causal, monkeypatch):
    p, qkv = tables(causal), draw()

    def weighted(p, q, k, v):
        return jnp.sum(relative.attend(Form(causal), p, q, k, v) ** 2)

    one = jax.value_and_grad(weighted, (0, 1, 2, 3))(p, *qkv)
    monkeypatch.setattr(relative, "MIN_QUERIES", 3)
    monkeypatch.setattr(relative, "MAX_QUERIES", 3)
    several = jax.value_and_grad(weighted, (0, 1, 2, 3))(p, *qkv)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-5), several, one)


@pytest.mark.hf
@pytest.mark.parametrize("causal", [True, False])
def test_gradients_equal_those_of_torch_with_a_vector_for_each_pair(causal):
    torch = pytest.importorskip("torch")
    p, qkv, clip = tables(causal), draw(), 3
    g = np.random.default_rng(1).standard_normal(qkv[0].shape).astype(np.float32)
    theirs = [torch.tensor(np.array(x), requires_grad=True) for x in (p["keys"], p["values"], *qkv)]
    keys, values, q, k, v = theirs
    k, v = (x.repeat_interleave(H // K, 2) for x in (k, v))
    behind = torch.arange(L)[:, None] - torch.arange(L)[None]
    rows = behind.clamp(0, clip) if causal else behind.clamp(-clip, clip) + clip
    pairs_k, pairs_v = keys[rows], values[rows]
    scores = torch.einsum("blhc,bshc->bhls", q, k) + torch.einsum("blhc,lsc->bhls", q, pairs_k)
    if causal:
        scores = scores.masked_fill(behind < 0, -torch.inf)
    weights = torch.softmax(scores * C**-0.5, -1)
    o = torch.einsum("bhls,bshc->blhc", weights, v) + torch.einsum("bhls,lsc->blhc", weights, pairs_v)
    (o * torch.tensor(g)).sum().backward()

    def ours(keys, values, *qkv):
        return jnp.sum(relative.attend(Form(causal), {"keys": keys, "values": values}, *qkv) * g)

    actual = jax.jit(jax.grad(ours, range(5)))(p["keys"], p["values"], *qkv)
    for own, other in zip(actual, theirs, strict=True):
        np.testing.assert_allclose(own, other.grad.numpy(), atol=1e-5, rtol=1e-5)


def test_dropped_weights_keep_their_mean():
    p, (q, k, v), form = tables(True), draw(), Form(dropout=0.5)
    keys = jax.random.split(jax.random.key(0), 1000)
    mean = jnp.mean(jax.vmap(lambda key: relative.attend(form, p, q, k, v, key=key))(keys), 0)
    # The mean of 1,000 draws with deviation of order one to two: five standard errors.
    np.testing.assert_allclose(mean, relative.attend(form, p, q, k, v), atol=0.3)


@pytest.mark.parametrize(
    "settings", [{"attention_soft_cap": 5.0}, {"positions": "alibi"}, {"pattern": (Layer(window=3),)}], ids=str
)
def test_settings_that_it_has_no_place_for_are_refused(settings):
    with pytest.raises(UsageError, match="does not go with|leave one of them out"):
        Decoder(**{"positions": "none", "relative": Relative()} | settings)


def test_its_products_are_twice_those_of_plain_attention():
    plain, shaw = (Decoder(positions="none", relative=each) for each in (None, Relative()))
    assert shaw.attention_flops(64) == 2 * plain.attention_flops(64)
    assert "prefix" not in shaw.offers
