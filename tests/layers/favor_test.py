import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.core.errors import UsageError
from lm.layers.attention import Form, attention
from lm.layers.block import Layer
from lm.layers.favor import Favor, attend
from lm.models.decoder import Decoder
from lm.models.encoder import Encoder

B, L, H, K, C = 2, 13, 4, 2, 8
PACKED = np.array([[0, 0, 0, 0, 0, 1, 1, 1, 1, 2, -1, -1, -1], [-1, 3, 3, 3, 3, -1, 3, 3, 3, 3, 3, 3, 4]])
DOCUMENTS = {"none": None, "packed": (PACKED, PACKED), "encoder": (np.maximum(PACKED, 0), PACKED)}


def draw(length=L, heads=H, kv_heads=K, head_dim=C, rows=B):
    rng = np.random.default_rng(0)
    return tuple(rng.standard_normal((rows, length, h, head_dim), np.float32) for h in (heads, kv_heads, kv_heads))


def features(form, w, x):
    """Of x over the fourth root of the head's width: lemma 1, and section 4.3 of the paper."""
    x = x * x.shape[-1] ** -0.25
    if form.kernel == "relu":
        return np.maximum(x @ w.T, 0) + 1e-3
    return np.exp(x @ w.T - np.sum(x**2, -1, keepdims=True) / 2) / np.sqrt(len(w))


def naive(form, w, q, k, v, causal, documents=None):
    """All pairs, in float64."""
    w, q, k, v = (np.asarray(x, np.float64) for x in (w, q, k, v))
    k, v = (np.repeat(x, q.shape[2] // x.shape[2], 2) for x in (k, v))
    weights = np.einsum("blhr,bshr->bhls", features(form, w, q), features(form, w, k))
    if causal:
        weights = weights * np.tri(q.shape[1])
    if documents is not None:
        seen = (documents[0][:, :, None] == documents[1][:, None, :]) & (documents[1] >= 0)[:, None, :]
        weights = weights * seen[:, None]
    total = weights.sum(-1, keepdims=True)
    return np.einsum("bhls,bshc->blhc", weights / np.where(total > 0, total, 1), v)


def compiled(form, causal, documents=None, **settings):
    documents = None if documents is None else tuple(map(jnp.asarray, documents))
    return jax.jit(lambda *qkv: attend(form, form.draw(C), *qkv, causal=causal, documents=documents, **settings)[0])


@pytest.mark.parametrize("chunk", [4, *(pytest.param(size, marks=pytest.mark.slow) for size in (1, 128))])
@pytest.mark.parametrize("documents", DOCUMENTS)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("kernel", ["softmax", "relu"])
def test_attention_equals_the_sum_over_all_pairs(kernel, causal, documents, chunk):
    form, (q, k, v), pair = Favor(20, kernel, chunk=chunk), draw(), DOCUMENTS[documents]
    expected = naive(form, form.draw(C)[0], q, k, v, causal, pair)
    actual = compiled(form, causal, pair)(q, k, v)
    real = np.ones((B, L), bool) if pair is None else pair[1] >= 0
    np.testing.assert_allclose(actual[real], expected[real], atol=1e-5)
    assert np.isfinite(actual).all()


@pytest.mark.parametrize("documents", ["none", "packed", pytest.param("encoder", marks=pytest.mark.slow)])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("kernel", ["softmax", pytest.param("relu", marks=pytest.mark.slow)])
def test_gradients_equal_those_of_all_pairs(kernel, causal, documents):
    form, qkv, pair = Favor(20, kernel, chunk=4), draw(), DOCUMENTS[documents]
    g = np.random.default_rng(1).standard_normal(qkv[0].shape).astype(np.float32)
    g *= 1 if pair is None else (pair[1] >= 0)[..., None, None]
    w = form.draw(C)[0]

    def phi(x):
        x = x * C**-0.25
        if kernel == "relu":
            return jax.nn.relu(x @ w.T) + 1e-3
        return jnp.exp(x @ w.T - jnp.sum(x**2, -1, keepdims=True) / 2)

    def plain(q, k, v):
        k, v = (jnp.repeat(x, H // K, 2) for x in (k, v))
        weights = jnp.einsum("blhr,bshr->bhls", phi(q), phi(k)) * (np.tri(L)[None, None] if causal else 1)
        if pair is not None:
            seen = (pair[0][:, :, None] == pair[1][:, None, :]) & (pair[1] >= 0)[:, None, :]
            weights = weights * seen[:, None]
        total = weights.sum(-1, keepdims=True)
        return jnp.sum(jnp.einsum("bhls,bshc->blhc", weights / jnp.where(total > 0, total, 1), v) * g)

    attended = compiled(form, causal, pair)
    actual = jax.jit(jax.grad(lambda *qkv: jnp.sum(attended(*qkv) * g), (0, 1, 2)))(*qkv)
    for ours, theirs in zip(actual, jax.grad(plain, (0, 1, 2))(*qkv), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5, rtol=1e-5)


def test_a_cache_continues_where_the_tokens_end_and_padding_does_not_enter_it():
    form, (q, k, v) = Favor(20, chunk=4), draw()
    lengths = np.array([3, 7])
    w, padding = form.draw(C), jnp.asarray(np.where(np.arange(8) < lengths[:, None], 0, -1))
    cache = {
        name: jnp.full(p.shape, p.init.value, p.dtype) for name, p in form.cache_spec(B, kv_heads=K, head_dim=C).items()
    }
    _, cache = attend(form, w, q[:, :8], k[:, :8], v[:, :8], causal=True, documents=(padding, padding), cache=cache)
    full, rows = compiled(form, True)(q, k, v), np.arange(B)
    for step in range(4):
        now = (x[rows, lengths + step][:, None] for x in (q, k, v))
        o, cache = attend(form, w, *now, causal=True, cache=cache)
        np.testing.assert_allclose(o[:, 0], full[rows, lengths + step], atol=1e-5)


@pytest.mark.parametrize("sizes", [(1, 12), (8, 1)], ids=["growing", "shrinking"])
@pytest.mark.parametrize("causal", [True, False])
def test_large_keys_neither_overflow_nor_hide_others(causal, sizes):
    """The first of shrinking ones has features e^76 times smaller than others in its chunk."""
    form, (q, k, v) = Favor(64), draw(kv_heads=H)
    k, w = k * np.linspace(*sizes, L, dtype=np.float32)[None, :, None, None], form.draw(C)[0]

    def phi(x):
        x = x * C**-0.25
        return jnp.exp(x @ w.T - jnp.sum(x**2, -1, keepdims=True) / 2)

    def plain(q, k, v):
        weights = jnp.einsum("blhr,bshr->bhls", phi(q), phi(k)) * (np.tri(L)[None, None] if causal else 1)
        return jnp.einsum("bhls,bshc->blhc", weights / weights.sum(-1, keepdims=True), v)

    attended = compiled(form, causal)
    actual = attended(q, k, v), *jax.grad(lambda *qkv: jnp.sum(attended(*qkv) ** 2), (0, 1, 2))(q, k, v)
    with jax.enable_x64(True):
        wide = [np.asarray(x, np.float64) for x in (q, k, v)]
        expected = plain(*wide), *jax.grad(lambda *qkv: jnp.sum(plain(*qkv) ** 2), (0, 1, 2))(*wide)
    for ours, theirs in zip(actual, expected, strict=True):
        # Exponents of up to 100 have five digits behind the point.
        np.testing.assert_allclose(ours, theirs, atol=1e-4, rtol=1e-4)


def test_the_error_falls_as_one_over_the_root_of_the_features_and_orthogonal_ones_err_less():
    # With larger ones the variance of a feature, exp(|q + k|^2) in the mean, shows only with far more features.
    q, k, v = (0.3 * x for x in draw(64, 2, 2, 16, rows=1))
    exact = attention(Form(causal=False), q, k, v)

    @functools.partial(jax.jit, static_argnums=0)
    def squares(form, keys):
        errors = jax.lax.map(lambda key: attend(form, form.draw(16, key), q, k, v, causal=False)[0] - exact, keys)
        return jnp.mean(errors**2)

    def error(features, orthogonal):
        return np.sqrt(squares(Favor(features, orthogonal=orthogonal), jax.random.split(jax.random.key(0), 40)))

    iid, orthogonal = ([error(n, kind) for n in (32, 128, 512)] for kind in (False, True))
    # Four times the features halve the error; the mean over 40 draws is known to a few percent.
    assert all(1.8 < a / b < 2.2 for errors in (iid, orthogonal) for a, b in zip(errors, errors[1:], strict=False))
    # Measured: 11% to 16% less.
    assert all(b < 0.98 * a for a, b in zip(iid, orthogonal, strict=True)), (iid, orthogonal)


def test_orthogonal_draws_are_orthogonal_in_blocks_and_each_is_gaussian():
    draws = jax.jit(jax.vmap(functools.partial(Favor(24).draw, 16)))(jax.random.split(jax.random.key(0), 400))
    w = np.asarray(draws).reshape(-1, 16)
    first, rest = w[:16], w[16:24]
    for block in (first, rest):
        products = block @ block.T
        np.testing.assert_allclose(products - np.diag(np.diag(products)), 0, atol=1e-4)
    # 9,600 rows: of mean 0 and variance 1 to five standard errors, also in the first row and place of a block.
    np.testing.assert_allclose(w.mean(0), 0, atol=0.06)
    np.testing.assert_allclose((w**2).mean(0), 1, atol=0.08)
    assert abs(w[::24, 0].mean()) < 0.25


def test_training_draws_anew_in_each_step_and_evaluation_does_not():
    form = Favor(8)
    assert (form.draw(8) == form.draw(8)).all() and (form.draw(8) != Favor(8, seed=1).draw(8)).all()
    assert (form.draw(8, jax.random.key(1)) != form.draw(8, jax.random.key(2))).all()


@pytest.mark.slow
@pytest.mark.parametrize("causal", [True, False])
def test_memory_of_the_gradient_grows_with_the_length_and_holds_no_sums_of_every_token(causal):
    form = Favor(64, chunk=64)

    def size(length):
        shapes = [jax.ShapeDtypeStruct((1, length, 2, 32), jnp.float32)] * 3
        loss = jax.grad(lambda *qkv: jnp.sum(attend(form, form.draw(32), *qkv, causal=causal)[0] ** 2), (0, 1, 2))
        return jax.jit(loss).lower(*shapes).compile().memory_analysis().temp_size_in_bytes

    sizes = [size(n) for n in (1024, 2048, 4096)]
    assert sizes[2] - sizes[1] < 2.2 * (sizes[1] - sizes[0])
    assert sizes[2] < 0.25 * 4096 * 2 * 64 * 32 * 4  # A sum after each token, [L, H, R, C].


@pytest.mark.hf
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("kernel", ["softmax", "relu"])
def test_attention_equals_that_of_performer_pytorch(kernel, causal):
    torch, theirs = pytest.importorskip("torch"), pytest.importorskip("performer_pytorch.performer_pytorch")
    form, (q, k, v) = Favor(20, kernel, chunk=4), draw(kv_heads=H)
    w = torch.tensor(np.array(form.draw(C)[0]))
    q_BHLC, k_BHLC, v_BHLC = (torch.tensor(x.swapaxes(1, 2)) for x in (q, k, v))
    if kernel == "softmax":
        # They add 1e-4 to each feature, where we add nothing.
        q_BHLR = theirs.softmax_kernel(q_BHLC, projection_matrix=w, is_query=True, eps=0)
        k_BHLR = theirs.softmax_kernel(k_BHLC, projection_matrix=w, is_query=False, eps=0)
    else:
        q_BHLR, k_BHLR = (theirs.generalized_kernel(x, projection_matrix=w) for x in (q_BHLC, k_BHLC))
    if causal:
        expected = theirs.causal_linear_attention_noncuda(q_BHLR, k_BHLR, v_BHLC, eps=0)
    else:
        expected = theirs.linear_attention(q_BHLR, k_BHLR, v_BHLC)
    actual = compiled(form, causal)(q, k, v)
    np.testing.assert_allclose(actual, expected.numpy().swapaxes(1, 2), atol=1e-5)


@pytest.mark.parametrize(
    "settings",
    [{"attention_dropout": 0.1}, {"attention_kernel": "blocks"}, {"attention_soft_cap": 5.0}, {"pattern": (Layer(3),)}],
    ids=str,
)
def test_settings_of_exact_attention_are_refused(settings):
    with pytest.raises(UsageError, match="does not go with favor"):
        _ = Decoder(positions="none", favor=Favor(), **settings).stack


def test_a_prefix_is_no_part_of_what_it_offers():
    assert "prefix" not in Decoder(positions="none", favor=Favor()).offers
    with pytest.raises(ValueError, match="prefix_B"):
        tokens = jnp.zeros((1, 4), jnp.int32)
        model = Decoder(layers=1, width=8, heads=1, vocab_size=8, positions="none", favor=Favor())
        jax.eval_shape(lambda: model.apply({}, {"tokens_BL": tokens, "prefix_B": jnp.ones(1, jnp.int32)}))


def test_the_flops_of_attention_are_those_of_its_products():
    form, shape = Favor(128, chunk=16), (1, 64, 2, 64)

    def counted(causal):
        arrays = [jax.ShapeDtypeStruct(shape, jnp.float32)] * 3
        jaxpr = jax.make_jaxpr(lambda *qkv: attend(form, jnp.ones((1, 128, 64)), *qkv, causal=causal)[0])(*arrays)
        return products(jaxpr.jaxpr) / 64

    # Half of a chunk's pairs are hidden, and made all the same; totals are products too.
    hidden = 16 * 2 * (128 + 64)
    decoder = Decoder(layers=3, width=128, heads=2, positions="none", favor=form)
    np.testing.assert_allclose(3 * (counted(True) - hidden), decoder.attention_flops(64), rtol=0.05)
    encoder = Encoder(layers=3, width=128, heads=2, favor=form)
    np.testing.assert_allclose(3 * counted(False), encoder.attention_flops(64), rtol=0.05)


def products(jaxpr):
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            depth = np.prod([equation.invars[0].aval.shape[i] for i in contracted])
            total += 2 * depth * np.prod(equation.outvars[0].aval.shape)
        repeats = equation.params.get("length", 1) if equation.primitive.name == "scan" else 1
        for inner in jax.core.jaxprs_in_params(equation.params):
            total += repeats * products(inner)
    return total
