import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.core.errors import UsageError
from lm.objectives.cross_entropy import TokenLoss, cross_entropy
from lm.parallel.mesh import Mesh
from lm.parallel.rules import batch_sharding

B, L, D, V, CLASSES = 3, 7, 5, 16, 11
FORMS = {
    "plain": TokenLoss(CLASSES),
    "smoothed": TokenLoss(CLASSES, label_smoothing=0.2),
    "z_loss": TokenLoss(CLASSES, z_loss=0.1),
    "both": TokenLoss(CLASSES, label_smoothing=0.1, z_loss=0.05),
}


def logits(head, x):
    """Soft-capped, with the last logits masked as padding is."""
    capped = 4 * jnp.tanh(x @ head / 4)
    valid = (jnp.arange(V) < CLASSES).reshape((1,) * (x.ndim - 1) + (V,))
    return jnp.where(valid, capped, -1e9)


def naive(form, head, x, targets, weights):
    log_p = jax.nn.log_softmax(logits(head, x)[..., :CLASSES], -1)
    nll = -jnp.take_along_axis(log_p, targets[..., None], -1)[..., 0]
    smooth = -jnp.mean(log_p, -1)
    z = jnp.square(jax.nn.logsumexp(logits(head, x), -1))
    loss = (1 - form.label_smoothing) * nll + form.label_smoothing * smooth + form.z_loss * z
    return jnp.sum(loss * weights), jnp.sum(nll * weights), jnp.sum(form.z_loss * z * weights)


@pytest.fixture
def arrays():
    rng = np.random.default_rng(0)
    head, x = rng.standard_normal((D, V), np.float32), rng.standard_normal((B, L, D), np.float32)
    targets = rng.integers(0, CLASSES, (B, L)).astype(np.int32)
    weights = (rng.integers(0, 2, (B, L)) * rng.random((B, L))).astype(np.float32)
    return head, x, targets, weights


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("chunk_tokens", [None, 6, 1], ids=["whole", "uneven_chunks", "one_position"])
def test_sums_and_scaled_gradients_equal_the_naive_form(form, chunk_tokens, arrays):
    head, x, targets, weights = arrays
    subset = targets % 2 == 0

    def ours(head, x):
        loss, sums = cross_entropy(form, logits, head, x, targets, weights, chunk_tokens, subset)
        return 3.7 * jnp.square(loss) / weights.sum(), (loss, sums)

    def theirs(head, x):
        return 3.7 * jnp.square(naive(form, head, x, targets, weights)[0]) / weights.sum()

    gradients, (loss, sums) = jax.jit(jax.grad(ours, (0, 1), has_aux=True))(head, x)
    expected = naive(form, head, x, targets, weights)
    for actual, value in zip((loss, sums["nll"], sums["z_loss"]), expected, strict=True):
        np.testing.assert_allclose(actual, value, rtol=1e-5)
    part = naive(form, head, x, targets, weights * subset)[1]
    np.testing.assert_allclose(sums["subset_nll"], part, rtol=1e-5)
    for actual, value in zip(gradients, jax.grad(theirs, (0, 1))(head, x), strict=True):
        np.testing.assert_allclose(actual, value, rtol=1e-5, atol=1e-5 * float(jnp.abs(value).max()))
    evaluated, _ = cross_entropy(form, logits, head, x, targets, weights, chunk_tokens)
    np.testing.assert_allclose(evaluated, expected[0], rtol=1e-5)


def test_accuracy_counts_the_likeliest_token_and_ties_for_the_first_alone(arrays):
    head, x, targets, weights = arrays
    hits = np.argmax(logits(head, x), -1) == targets
    _, sums = cross_entropy(FORMS["plain"], logits, head, x, targets, weights)
    np.testing.assert_allclose(sums["accuracy"], (hits * weights).sum(), rtol=1e-6)
    _, sums = cross_entropy(FORMS["plain"], logits, 0 * head, x, targets, np.ones_like(weights))
    assert sums["accuracy"] == (targets == 0).sum()


def test_no_array_of_all_tokens_by_vocabulary_exists():
    tokens, vocabulary = 64, 512
    head, x = jnp.ones((4, vocabulary)), jnp.ones((2, tokens // 2, 4))
    targets, weights = jnp.zeros((2, tokens // 2), jnp.int32), jnp.ones((2, tokens // 2))

    def loss(head, x):
        return cross_entropy(TokenLoss(vocabulary), lambda h, x: x @ h, head, x, targets, weights, chunk_tokens=8)[0]

    compiled = jax.jit(jax.grad(loss, (0, 1))).lower(head, x).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < tokens * vocabulary * 4


@pytest.mark.parametrize("sizes", [{"data": 2}, {"fsdp": 2}, {"seq": 2}], ids=lambda sizes: next(iter(sizes)))
def test_devices_meet_once_and_not_once_a_chunk(sizes):
    rng = np.random.default_rng(0)
    head, x = rng.standard_normal((4, 32), np.float32), rng.standard_normal((4, 12, 4), np.float32)
    targets, weights = rng.integers(0, 32, (4, 12), np.int32), rng.random((4, 12), np.float32)

    def loss(head, x):
        return cross_entropy(TokenLoss(32), lambda h, x: x @ h, head, x, targets, weights, chunk_tokens=16)[0]

    mesh = Mesh(**sizes).build(jax.devices()[:2])
    with jax.set_mesh(mesh):
        step = jax.jit(jax.grad(loss, (0, 1)), in_shardings=(None, batch_sharding(mesh)))
        gradients, text = step(head, x), step.lower(head, x).compile().as_text()
    for actual, expected in zip(gradients, jax.grad(loss, (0, 1))(head, x), strict=True):
        np.testing.assert_allclose(actual, expected, atol=1e-5)
    main = text.index("\nENTRY ")
    assert " while(" in text and ("reduce-scatter(" if "fsdp" in sizes else "all-reduce(") in text[main:]
    assert not re.search(r"(all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)\(", text[:main])


@pytest.mark.parametrize("setting", [{"label_smoothing": 1.0}, {"label_smoothing": -0.1}, {"z_loss": -1.0}])
def test_impossible_settings_are_refused(setting):
    with pytest.raises(UsageError, match=next(iter(setting))):
        TokenLoss(CLASSES, **setting)
