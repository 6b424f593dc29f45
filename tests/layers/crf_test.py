import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.core import params as specs
from lm.layers import crf

B, L, T = 4, 5, 3
LENGTHS = np.array([5, 1, 3, 0])
REAL = np.arange(L)[None] < LENGTHS[:, None]


def draw(scale=1.0, rows=B, length=L, tags=T):
    rng = np.random.default_rng(0)
    p = {name: 2 * rng.standard_normal(x.shape, np.float32) for name, x in crf.crf_spec(tags).items()}
    emissions = scale * rng.standard_normal((rows, length, tags), np.float32)
    return p, emissions.astype(np.float32), rng.integers(0, tags, (rows, length))


def enumerated(p, emissions):
    """{tags: score} of one row, in float64."""
    scores = {}
    for tags in itertools.product(range(len(p["start"])), repeat=len(emissions)):
        score = float(p["start"][tags[0]]) + float(p["end"][tags[-1]])
        score += sum(float(emissions[i, t]) for i, t in enumerate(tags))
        scores[tags] = score + sum(float(p["transitions"][a, b]) for a, b in itertools.pairwise(tags))
    return scores


def total(scores):
    peak = max(scores.values())
    return peak + np.log(sum(np.exp(score - peak) for score in scores.values()))


@pytest.mark.parametrize("scale", [1.0, 300.0])
def test_partition_likelihood_and_best_tags_equal_an_enumeration(scale):
    p, emissions, tags = draw(scale)
    partition, likelihood = crf.log_partition(p, emissions, REAL), crf.log_likelihood(p, emissions, tags, REAL)
    best, score = jax.jit(crf.viterbi)(p, emissions, REAL)
    # Sums of five scores of up to 1,000 have seven digits.
    tolerance = {"rtol": 1e-6, "atol": 1e-5 if scale == 1 else 1e-3}
    for b, n in enumerate(LENGTHS[:3]):
        scores = enumerated(p, emissions[b, :n])
        np.testing.assert_allclose(partition[b], total(scores), **tolerance)
        np.testing.assert_allclose(likelihood[b], scores[tuple(tags[b, :n])] - total(scores), **tolerance)
        expected = max(scores, key=scores.__getitem__)
        assert tuple(best[b, :n]) == expected and not best[b, n:].any()
        np.testing.assert_allclose(score[b], scores[expected], **tolerance)
    assert partition[3] == likelihood[3] == score[3] == 0


def test_marginals_equal_an_enumeration():
    p, emissions, _ = draw()
    actual = crf.marginals(p, emissions, REAL)
    for b, n in enumerate(LENGTHS[:3]):
        scores, expected = enumerated(p, emissions[b, :n]), np.zeros((L, T))
        for tags, score in scores.items():
            expected[np.arange(n), list(tags)] += np.exp(score - total(scores))
        np.testing.assert_allclose(actual[b], expected, atol=1e-5)


def test_forbidden_transitions_have_no_probability_no_gradient_and_are_never_taken():
    p, emissions, tags = draw()
    may = np.array([[1, 0, 1], [1, 1, 0], [1, 1, 1]], bool)
    allowed = {"transitions": may, "start": np.array([True, False, True])}
    own = crf.restricted(p, allowed)
    partition, (best, _) = crf.log_partition(own, emissions, REAL), crf.viterbi(own, emissions, REAL)
    for b, n in enumerate(LENGTHS[:3]):
        scores = {
            tags: score
            for tags, score in enumerated(p, emissions[b, :n]).items()
            if tags[0] != 1 and all(may[a, b] for a, b in itertools.pairwise(tags))
        }
        np.testing.assert_allclose(partition[b], total(scores), atol=1e-5)
        assert tuple(best[b, :n]) == max(scores, key=scores.__getitem__)
    gradient = jax.grad(lambda p: jnp.sum(crf.log_partition(crf.restricted(p, allowed), emissions, REAL)))(p)
    assert not gradient["transitions"][~may].any() and gradient["transitions"][may].all()


def test_what_stands_at_padding_changes_nothing():
    p, emissions, tags = draw()
    gradient = jax.grad(lambda e, tags: jnp.sum(crf.log_likelihood(p, e, tags, REAL)))
    other, other_tags = np.where(REAL[..., None], emissions, 1e4), np.where(REAL, tags, 2)
    np.testing.assert_array_equal(gradient(emissions, tags), gradient(other, other_tags))
    assert not gradient(emissions, tags)[~REAL].any()


def test_a_spec_draws_small_scores():
    p = specs.initialize(crf.crf_spec(T), jax.random.key(0))
    assert {name: x.shape for name, x in p.items()} == {"transitions": (T, T), "start": (T,), "end": (T,)}
    assert all(0 < np.abs(x).max() <= 0.1 for x in p.values())


@pytest.mark.hf
def test_loss_gradients_and_tags_equal_those_of_torchcrf():
    torch, torchcrf = pytest.importorskip("torch"), pytest.importorskip("torchcrf")
    p, emissions, tags = draw(rows=3, length=11, tags=7)
    real = np.arange(11)[None] < np.array([11, 4, 1])[:, None]
    theirs = torchcrf.CRF(7, batch_first=True)
    names = {"transitions": "transitions", "start": "start_transitions", "end": "end_transitions"}
    theirs.load_state_dict({names[name]: torch.tensor(x) for name, x in p.items()})
    scores = torch.tensor(emissions, requires_grad=True)
    loss = -theirs(scores, torch.tensor(tags), torch.tensor(real), reduction="sum")
    loss.backward()

    def ours(p, emissions):
        return -jnp.sum(crf.log_likelihood(p, emissions, tags, real))

    value, (own, emitted) = jax.jit(jax.value_and_grad(ours, (0, 1)))(p, emissions)
    np.testing.assert_allclose(value, loss.item(), rtol=1e-6)
    np.testing.assert_allclose(emitted, scores.grad.numpy(), atol=1e-5)
    for name, gradient in own.items():
        np.testing.assert_allclose(gradient, getattr(theirs, names[name]).grad.numpy(), atol=1e-5)
    best, _ = crf.viterbi(p, emissions, real)
    assert [list(row[mask]) for row, mask in zip(np.array(best), real, strict=True)] == theirs.decode(
        torch.tensor(emissions), torch.tensor(real)
    )
