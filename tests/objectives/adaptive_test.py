"""The adaptive softmax: torch's, and its loss without the clusters that a token is not in."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.core import params as specs
from lm.core.errors import UsageError
from lm.layers.adaptive import Adaptive
from lm.models.convolution import Convolution
from lm.models.recurrent import Recurrent
from lm.objectives import adaptive as objective
from lm.objectives.causal import Causal
from lm.objectives.sampled import Sampled
from lm.parallel.mesh import Mesh, under

B, L, D, V, VALID = 4, 6, 16, 128, 120
FORM = Adaptive(cutoffs=(10, 40, 90), factor=2.0)
SPREAD = Convolution(blocks=(((2, D),),), width=8, vocab_size=V, valid_vocab_size=VALID, adaptive=FORM)


def head():
    rng = np.random.default_rng(0)
    zeros = specs.initialize(FORM.spec(V, D, jax.nn.initializers.zeros), jax.random.key(0))
    return jax.tree.map(lambda w: jnp.asarray(rng.standard_normal(w.shape, np.float32) / 4), zeros)


def tokens(kind):
    rng = np.random.default_rng(1)
    low, high = {"all": (0, VALID), "frequent": (0, 10), "rare": (90, VALID)}[kind]
    x = jnp.asarray(rng.standard_normal((B, L, D), np.float32))
    weights = rng.uniform(0, 1, (B, L)).astype(np.float32) * (rng.uniform(0, 1, (B, L)) > 0.2)
    return x, jnp.asarray(rng.integers(low, high, (B, L))), jnp.asarray(weights)


def in_full(p, x, targets, weights):
    found = FORM.log_probs(p, x, VALID)
    return -jnp.sum(jnp.take_along_axis(found, targets[..., None], -1)[..., 0] * weights)


@pytest.mark.parametrize("kind", ["all", "frequent", "rare"])
@pytest.mark.parametrize("size", [3, 256])
def test_loss_and_gradients_are_those_of_the_full_table(kind, size, monkeypatch):
    monkeypatch.setattr(objective, "TAIL_TOKENS", size)
    x, targets, weights = tokens(kind)

    def in_clusters(p, x):
        return objective.adaptive_cross_entropy(FORM, VALID, p, x, targets, weights)

    ours = jax.jit(jax.value_and_grad(lambda p, x: 3 * in_clusters(p, x), (0, 1)))(head(), x)
    full = jax.value_and_grad(lambda p, x: 3 * in_full(p, x, targets, weights), (0, 1))(head(), x)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5, rtol=1e-4), ours, full)


@pytest.mark.parametrize("mesh", [Mesh(data=4), Mesh(data=2, fsdp=2), Mesh(data=2, tensor=2)], ids=str)
def test_devices_score_their_own_tokens(mesh):
    x, targets, weights = tokens("all")

    def loss(p, x):
        return objective.adaptive_cross_entropy(FORM, VALID, p, x, targets, weights)

    alone = jax.value_and_grad(loss, (0, 1))(head(), x)
    spread = under(mesh.build(jax.devices()[:4]), jax.jit(jax.value_and_grad(loss, (0, 1))))(head(), x)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5, rtol=1e-4), spread, alone)


def test_probabilities_add_up_to_one_and_padding_has_none():
    found = np.exp(np.float64(FORM.log_probs(head(), tokens("all")[0], VALID)))
    np.testing.assert_allclose(found.sum(-1), 1, rtol=1e-5)
    assert (found[..., VALID:] == 0).all() and (found[..., :VALID] > 0).all()


def test_a_cluster_without_tokens_costs_and_learns_nothing():
    x, targets, weights = tokens("frequent")
    grads = jax.grad(lambda p: objective.adaptive_cross_entropy(FORM, VALID, p, x, targets, weights))(head())
    assert all(not np.any(g) for i in range(3) for g in jax.tree.leaves(grads[f"tail_{i}"]))


def test_torch_has_the_same_log_probabilities():
    torch = pytest.importorskip("torch")
    p = head()
    theirs = torch.nn.AdaptiveLogSoftmaxWithLoss(D, V, list(FORM.cutoffs), div_value=FORM.factor)
    with torch.no_grad():
        theirs.head.weight.copy_(torch.tensor(np.array(p["table"])))
        for i, tail in enumerate(theirs.tail):
            tail[0].weight.copy_(torch.tensor(np.array(p[f"tail_{i}"]["down"]).T))
            tail[1].weight.copy_(torch.tensor(np.array(p[f"tail_{i}"]["table"])))
    x, targets, _ = tokens("all")
    flat = torch.tensor(np.array(x).reshape(-1, D))
    np.testing.assert_allclose(
        np.array(FORM.log_probs(p, x)).reshape(-1, V), theirs.log_prob(flat).detach(), atol=2e-6, rtol=1e-5
    )
    ours = objective.adaptive_cross_entropy(FORM, None, p, x, targets, jnp.ones((B, L)))
    loss = theirs(flat, torch.tensor(np.array(targets).reshape(-1))).loss
    assert float(ours) / (B * L) == pytest.approx(loss.item(), rel=1e-5)


@pytest.mark.parametrize(
    "model", [SPREAD, Recurrent(layers=1, width=D, vocab_size=V, valid_vocab_size=VALID, adaptive=FORM)]
)
def test_models_train_in_clusters_and_are_scored_in_full(model):
    params = specs.initialize(model.spec(), jax.random.key(0))
    ids = np.random.default_rng(0).integers(0, VALID, (B, L + 1))
    batch = {"tokens_BL": ids[:, :-1], "targets_BL": ids[:, 1:], "weights_BL": np.ones((B, L), np.float32)}
    trained = Causal().loss(model, params, batch, key=jax.random.key(1))
    scored = Causal().loss(model, params, batch)
    assert set(trained) == {"loss"} and set(scored) == {"loss", "nll", "accuracy"}
    assert float(trained["loss"][0]) == pytest.approx(float(scored["loss"][0]), rel=1e-5)
    whole = dataclasses.replace(model, adaptive=None)
    lengths = {"tokens_BL": L, "targets_BL": L}
    assert model.forward_flops(model.spec(), lengths) < whole.forward_flops(whole.spec(), lengths)


def test_what_cannot_be_is_refused():
    params = specs.initialize(SPREAD.spec(), jax.random.key(0))
    batch = {"tokens_BL": np.zeros((B, L), int), "targets_BL": np.zeros((B, L), int), "weights_BL": np.ones((B, L))}
    for wanted in (Causal(z_loss=1e-4), Causal(label_smoothing=0.1), Sampled(samples=4)):
        with pytest.raises(UsageError, match="adaptive"):
            wanted.loss(SPREAD, params, batch, key=jax.random.key(0))
    for cutoffs in ((), (0, 5), (20, 10)):
        with pytest.raises(UsageError, match="cutoffs"):
            Adaptive(cutoffs=cutoffs)
    with pytest.raises(UsageError, match="lower them"):
        Adaptive(cutoffs=(10, V)).spec(V, D, jax.nn.initializers.zeros)
    with pytest.raises(UsageError, match="none of 90 ids"):
        FORM.log_probs(head(), jnp.zeros((1, D)), 90)
    with pytest.raises(UsageError, match="tied"):
        Recurrent(tied=True, adaptive=FORM)
