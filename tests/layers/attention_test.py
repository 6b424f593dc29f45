import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.layers import attention_blocks as module
from lm.layers.attention import Form, attention

B, L, S, H, K, C = 2, 6, 9, 4, 2, 8
FORMS = {
    "causal": Form(),
    "window": Form(window=3),
    "soft_cap": Form(soft_cap=2.0, scale=0.7),
    "bidirectional": Form(causal=False),
    "bidirectional_window": Form(causal=False, window=2),
}


def naive(form, q, k, v, starts, documents=None):
    """A loop over rows, heads and queries in float64."""
    out = np.zeros(q.shape)
    for b, i, h in np.ndindex(q.shape[:3]):
        at = starts[b] + i
        scores = k[b, :, h // (q.shape[2] // k.shape[2])] @ q[b, i, h] * (form.scale or q.shape[-1] ** -0.5)
        if form.soft_cap:
            scores = form.soft_cap * np.tanh(scores / form.soft_cap)
        for j in range(k.shape[1]):
            hidden = form.causal and j > at or form.window is not None and abs(at - j) >= form.window
            if hidden or documents is not None and documents[b, j] != documents[b, i]:
                scores[j] = -np.inf
        weights = np.exp(scores - scores.max())
        out[b, i, h] = weights / weights.sum() @ v[b, :, h // (q.shape[2] // k.shape[2])]
    return out


def draw(length, keys, seed=0):
    rng = np.random.default_rng(seed)
    return tuple(rng.standard_normal(s, np.float32) for s in ((B, length, H, C), (B, keys, K, C), (B, keys, K, C)))


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_attention_equals_a_loop(form):
    q, k, v = draw(L, L)
    np.testing.assert_allclose(attention(form, q, k, v), naive(form, q, k, v, [0, 0]), atol=1e-5)


def test_queries_start_where_their_row_stands():
    q, k, v = draw(L, S)
    starts = np.array([3, 1], np.int32)
    for form in (Form(), Form(window=3)):
        actual = attention(form, q, k, v, starts_B=jnp.asarray(starts))
        np.testing.assert_allclose(actual, naive(form, q, k, v, starts), atol=1e-5)


def test_documents_do_not_see_each_other():
    q, k, v = draw(L, L)
    documents = np.array([[0, 0, 1, 1, 1, 2], [5, 5, 5, 5, 6, 6]], np.int32)
    for form in (Form(), Form(causal=False)):
        actual = attention(form, q, k, v, documents=(jnp.asarray(documents),) * 2)
        np.testing.assert_allclose(actual, naive(form, q, k, v, [0, 0], documents), atol=1e-5)


@pytest.mark.parametrize("packed", [False, True], ids=["one_document", "packed"])
@pytest.mark.parametrize("form", [Form(), Form(window=3), Form(soft_cap=2.0)], ids=["causal", "window", "soft_cap"])
def test_query_blocks_change_neither_values_nor_gradients(form, packed, monkeypatch):
    q, k, v = draw(L, L)
    numbers = jnp.array([[0, 0, 0, 1, 1, 1], [5, 6, 6, 6, 6, 6]])

    def weighted(q, k, v):
        return jnp.sum(attention(form, q, k, v, documents=(numbers, numbers) if packed else None) ** 2)

    one_block = jax.value_and_grad(weighted, (0, 1, 2))(q, k, v)
    monkeypatch.setattr(module, "MIN_QUERIES", 2)
    monkeypatch.setattr(module, "MAX_QUERIES", 2)
    blocks = jax.value_and_grad(weighted, (0, 1, 2))(q, k, v)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-5), blocks, one_block)


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_the_hand_written_gradient_equals_autodiff(form):
    q, k, v = draw(L, L)
    g = np.random.default_rng(5).standard_normal(q.shape).astype(np.float32)
    index = np.arange(L)

    def plain(q, k, v):
        k, v = (jnp.repeat(x, H // K, 2) for x in (k, v))
        scores = jnp.einsum("blhc,bshc->bhls", q, k) * (form.scale or C**-0.5)
        if form.soft_cap:
            scores = form.soft_cap * jnp.tanh(scores / form.soft_cap)
        distance = index[:, None] - index[None, :]
        hidden = form.causal & (distance < 0) | (np.abs(distance) >= (form.window or L))
        weights = jax.nn.softmax(jnp.where(hidden[None, None], -jnp.inf, scores), -1)
        return jnp.sum(jnp.einsum("bhls,bshc->blhc", weights, v) * g)

    actual = jax.grad(lambda q, k, v: jnp.sum(attention(form, q, k, v) * g), (0, 1, 2))(q, k, v)
    for ours, theirs in zip(actual, jax.grad(plain, (0, 1, 2))(q, k, v), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_dropped_weights_keep_their_mean():
    form, (q, k, v) = Form(dropout=0.5), draw(L, L)
    keys = jax.random.split(jax.random.key(0), 1000)
    mean = jnp.mean(jax.vmap(lambda key: attention(form, q, k, v, key=key))(keys), 0)
    # The mean of 1,000 draws with deviation of order one: five standard errors.
    np.testing.assert_allclose(mean, attention(form, q, k, v), atol=0.16)


def test_the_backward_pass_drops_the_weights_that_the_forward_pass_dropped():
    form, (q, k, v), key = Form(dropout=0.5), draw(L, L), jax.random.key(3)
    kept = jax.random.bernoulli(jax.random.fold_in(key, 0), 0.5, (B, K, H // K * L, L)).reshape(B, H, L, L)

    def plain(q, k, v):
        k, v = (jnp.repeat(x, H // K, 2) for x in (k, v))
        scores = jnp.where(jnp.tri(L, dtype=bool)[None, None], jnp.einsum("blhc,bshc->bhls", q, k) * C**-0.5, -jnp.inf)
        return jnp.sum(jnp.einsum("bhls,bshc->blhc", 2 * kept * jax.nn.softmax(scores, -1), v) ** 2)

    actual = jax.grad(lambda q, k, v: jnp.sum(attention(form, q, k, v, key=key) ** 2), (0, 1, 2))(q, k, v)
    for ours, theirs in zip(actual, jax.grad(plain, (0, 1, 2))(q, k, v), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-4, rtol=1e-5)  # Gradients of order ten.


@pytest.mark.parametrize("rows,heads", [(1, H), (B, H), (B, 1)])
def test_a_bias_is_added_to_the_scores_and_gets_its_gradient(rows, heads, monkeypatch):
    form, (q, k, v), rng = Form(causal=False), draw(L, L), np.random.default_rng(4)
    bias = rng.standard_normal((rows, heads, L, L), np.float32)

    def plain(q, k, v, bias):
        k, v = (jnp.repeat(x, H // K, 2) for x in (k, v))
        weights = jax.nn.softmax(jnp.einsum("blhc,bshc->bhls", q, k) * C**-0.5 + bias, -1)
        return jnp.sum(jnp.einsum("bhls,bshc->blhc", weights, v) ** 2)

    def ours(q, k, v, bias):
        return jnp.sum(attention(form, q, k, v, bias=bias) ** 2)

    monkeypatch.setattr(module, "MIN_QUERIES", 4)  # Two blocks, of 4 queries and of 2.
    actual, expected = (jax.value_and_grad(f, (0, 1, 2, 3))(q, k, v, bias) for f in (ours, plain))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-5), actual, expected)


def test_places_decide_what_is_earlier():
    q, k, v = draw(L, L)
    order = np.array([[2, 0, 5, 1, 4, 3], [0, 1, 2, 3, 4, 5]])
    seen = order[:, :, None] >= order[:, None, :]
    bias = np.where(seen, 0, -1e30)[:, None].astype(np.float32)
    actual = attention(Form(), q, k, v, places=(jnp.asarray(order), jnp.asarray(order)))
    np.testing.assert_allclose(actual, attention(Form(causal=False), q, k, v, bias=bias), atol=1e-6)
