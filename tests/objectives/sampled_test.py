"""The sampled softmax: exact with all tokens drawn, without bias with few."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.core import params as specs
from lm.core.errors import UsageError
from lm.models.decoder import Decoder
from lm.models.recurrent import Recurrent
from lm.objectives.causal import Causal
from lm.objectives.sampled import Sampled, draw

B, L, V = 2, 5, 40
MODELS = {
    "tied": Decoder(layers=1, width=8, heads=2, vocab_size=V, valid_vocab_size=V - 3, max_len=L, logit_soft_cap=5.0),
    "untied": Recurrent(layers=1, width=8, vocab_size=V, valid_vocab_size=V - 3),
}


@pytest.fixture(params=MODELS)
def model(request):
    return MODELS[request.param]


def made(model):
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda w: w + jnp.float32(0.3) * rng.standard_normal(w.shape, np.float32),
        specs.initialize(model.spec(), jax.random.key(0)),
    )
    tokens = rng.integers(0, V - 3, (B, L + 1)).astype(np.int32)
    weights = rng.uniform(0, 1, (B, L)).astype(np.float32)
    return params, {"tokens_BL": tokens[:, :-1], "targets_BL": tokens[:, 1:], "weights_BL": weights}


def loss_and_gradients(objective, model, params, batch, key):
    return jax.value_and_grad(lambda p: 3 * objective.loss(model, p, batch, key=key)["loss"][0])(params)


@pytest.mark.slow
def test_with_all_tokens_drawn_loss_and_gradients_are_the_full_ones(model):
    params, batch = made(model)
    key = jax.random.key(1)
    ours = loss_and_gradients(Sampled(samples=V - 3), model, params, batch, key)
    full = loss_and_gradients(Causal(), model, params, batch, None)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-5), ours, full)


def test_without_a_key_the_loss_is_the_causal_one(model):
    params, batch = made(model)
    assert Sampled(samples=2).loss(model, params, batch)["nll"] == Causal().loss(model, params, batch)["nll"]


def test_the_estimated_normaliser_has_the_full_one_as_its_mean():
    logits = np.random.default_rng(0).standard_normal(V).astype(np.float32)

    def estimate(key):
        ids, log_drawn = draw(key, V, 6)
        return jnp.sum(jnp.exp(jnp.asarray(logits)[ids] - log_drawn))

    found = np.asarray(jax.vmap(estimate)(jax.random.split(jax.random.key(0), 40_000)))
    error = found.std() / len(found) ** 0.5
    assert abs(found.mean() - np.exp(logits).sum()) < 4 * error < 0.03 * np.exp(logits).sum()


def test_ids_are_distinct_and_low_ones_come_more_often():
    ids = jax.vmap(lambda key: draw(key, V, 6)[0])(jax.random.split(jax.random.key(0), 2000))
    assert all(len(set(row)) == 6 for row in np.asarray(ids).tolist())
    counts = np.bincount(np.asarray(ids).ravel(), minlength=V)
    assert counts[0] > counts[5] > counts[30] > 0


@pytest.mark.slow
def test_more_samples_bring_the_loss_nearer_to_the_full_one(model):
    params, batch = made(model)
    full = Causal().loss(model, params, batch)["loss"][0]
    keys = jax.random.split(jax.random.key(0), 10)

    def error(samples):
        losses = [Sampled(samples).loss(model, params, batch, key=k)["loss"][0] for k in keys]
        return np.abs(np.array(losses) - full).mean()

    assert error(3) > error(12) > error(33)


@pytest.mark.parametrize("causal", [Causal(label_smoothing=0.1), Causal(z_loss=1e-4)], ids=str)
def test_settings_of_the_whole_softmax_are_refused(causal):
    with pytest.raises(UsageError, match="needs the whole softmax"):
        Sampled(causal=causal)


def test_more_samples_than_tokens_are_refused():
    params, batch = made(MODELS["untied"])
    with pytest.raises(UsageError, match="objective.samples=38 exceeds the 37 tokens"):
        Sampled(38).loss(MODELS["untied"], params, batch, key=jax.random.key(0))
