"""The hidden Markov model, against sums and maxima over every path."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from lm.core import params as specs
from lm.core.errors import UsageError
from lm.generate.sample import generate
from lm.models.hmm import HMM
from lm.objectives.causal import Causal
from lm.parallel import rules

B, L, Z, V = 8, 5, 3, 7
MODEL = HMM(states=Z, vocab_size=V + 2, valid_vocab_size=V)
TOKENS = np.random.default_rng(0).integers(0, V, (B, L)).astype(np.int32)
PATHS = np.array(list(itertools.product(range(Z), repeat=L)))


@functools.cache
def weights():
    return specs.initialize(MODEL.spec(), jax.random.key(0))


def tables():
    """Probabilities in float64."""
    return {name: np.exp(np.asarray(t, np.float64)) for name, t in MODEL.log_probs(weights()).items()}


def joint(tokens):
    """p(path, tokens) of every path, by its definition."""
    p, steps = tables(), range(1, len(tokens))
    paths = np.unique(PATHS[:, : len(tokens)], axis=0)
    moves = [p["transition"][paths[:, t - 1], paths[:, t]] for t in steps]
    emits = [p["emission"][paths[:, t], tokens[t]] for t in range(len(tokens))]
    return paths, np.prod([p["begin"][paths[:, 0]], *moves, *emits], 0)


def log_p(batch, carry=None, real_BL=None):
    """(log p of each row, the carry)."""
    tokens_BL = batch["tokens_BL"]
    real_BL = np.ones(tokens_BL.shape, bool) if real_BL is None else real_BL
    total_B, _, left = MODEL.filter(MODEL.log_probs(weights()), tokens_BL, real_BL, batch.get("documents_BL"), carry)
    return total_B, left


def new_carry(rows):
    return specs.initialize(MODEL.carry_spec(rows), jax.random.key(0))


def test_the_likelihood_is_the_sum_over_all_paths():
    wanted = [np.log(joint(row)[1].sum()) for row in TOKENS]
    np.testing.assert_allclose(log_p({"tokens_BL": TOKENS})[0], wanted, rtol=1e-5)


def test_posteriors_are_the_shares_of_the_paths():
    got = MODEL.posteriors(weights(), TOKENS)
    for row, tokens in enumerate(TOKENS):
        paths, p = joint(tokens)
        wanted = [[p[paths[:, t] == z].sum() / p.sum() for z in range(Z)] for t in range(L)]
        np.testing.assert_allclose(got[row], wanted, atol=1e-5)


def test_viterbi_finds_the_likeliest_path_and_its_probability():
    got, scores = MODEL.viterbi(weights(), TOKENS)
    for row, tokens in enumerate(TOKENS):
        paths, p = joint(tokens)
        np.testing.assert_array_equal(got[row], paths[p.argmax()])
        np.testing.assert_allclose(scores[row], np.log(p.max()), rtol=1e-5)


def test_logits_are_the_log_probabilities_of_each_next_token():
    out = MODEL.apply(weights(), {"tokens_BL": TOKENS}).hidden_BLD
    logits = MODEL.logits(MODEL.head(weights()), out)
    np.testing.assert_allclose(jax.nn.logsumexp(logits, -1), np.zeros((B, L)), atol=1e-5)
    np.testing.assert_allclose(jnp.exp(out).sum(-1), np.ones((B, L)), atol=1e-5)
    assert logits[..., V:].max() <= -1e9
    for t in range(L - 1):
        wanted = [np.log(joint([*row[: t + 1], v])[1].sum() / joint(row[: t + 1])[1].sum()) for row in TOKENS[:3]
                  for v in range(V)]  # fmt: skip
        np.testing.assert_allclose(logits[:3, t, :V].ravel(), wanted, atol=1e-5)


def test_a_document_begins_anew_and_padding_is_passed_over():
    documents = np.repeat([[0, 0, 1, 1, 1]], B, 0)
    whole = log_p({"tokens_BL": TOKENS, "documents_BL": documents})[0]
    parts = [log_p({"tokens_BL": TOKENS[:, i:j]})[0] for i, j in ((0, 2), (2, 5))]
    np.testing.assert_allclose(whole, sum(parts), rtol=1e-5)
    padded, left = log_p({"tokens_BL": TOKENS}, real_BL=np.repeat([np.arange(L) < 2], B, 0))
    np.testing.assert_allclose(padded, parts[0], rtol=1e-5)
    np.testing.assert_allclose(left["state"], log_p({"tokens_BL": TOKENS[:, :2]})[1]["state"], atol=1e-5)


def test_rows_that_continue_others_are_scored_as_one():
    first, carry = log_p({"tokens_BL": TOKENS[:, :2]}, new_carry(B))
    second, _ = log_p({"tokens_BL": TOKENS[:, 2:]}, carry)
    np.testing.assert_allclose(first + second, log_p({"tokens_BL": TOKENS})[0], rtol=1e-5)


def test_cached_decoding_of_ragged_rows_equals_the_full_pass():
    lengths, rows = np.array([3, 1, 2, 3, 1, 2, 3, 1], np.int32), np.arange(B)
    full = MODEL.apply(weights(), {"tokens_BL": TOKENS}).hidden_BLD
    padding = {"documents_BL": np.where(np.arange(3) < lengths[:, None], 0, -1)}
    out = MODEL.apply(weights(), {"tokens_BL": TOKENS[:, :3]} | padding, cache=new_carry(B))
    for step in range(2):
        at = lengths + step
        out = MODEL.apply(weights(), {"tokens_BL": TOKENS[rows, at][:, None]}, cache=out.cache)
        np.testing.assert_allclose(out.hidden_BLD[:, 0], full[rows, at], atol=1e-5)


def test_it_generates_what_the_next_probabilities_say():
    rows = generate(MODEL, weights(), [TOKENS[0]] * 2000, 1, seed=1)
    found = np.bincount(np.concatenate(rows), minlength=V) / 2000
    out = MODEL.apply(weights(), {"tokens_BL": TOKENS[:1]}).hidden_BLD[0, -1]
    wanted = np.exp(MODEL.logits(MODEL.head(weights()), out))[:V]
    np.testing.assert_allclose(found, wanted, atol=0.05)  # 4 standard errors of 2,000 draws.


def test_long_texts_and_impossible_moves_stay_exact():
    """Against Rabiner's scaled recursion in float64, with states that nothing but one way leads to."""
    p = weights() | {"transition": jnp.where(jnp.eye(Z, k=1) + jnp.eye(Z, k=-2) > 0, 0.0, -80.0)}
    tokens = np.random.default_rng(1).integers(0, V, (1, 4000)).astype(np.int32)
    probabilities = {name: np.exp(np.asarray(t, np.float64)) for name, t in MODEL.log_probs(p).items()}
    state, total = probabilities["begin"], 0.0
    for token in tokens[0]:
        state = state * probabilities["emission"][:, token]
        total += np.log(state.sum())
        state = state / state.sum() @ probabilities["transition"]
    got = MODEL.filter(MODEL.log_probs(p), tokens, np.ones(tokens.shape, bool))[0]
    np.testing.assert_allclose(got[0], total, rtol=1e-5)


def causal_loss(p, batch):
    terms = Causal().loss(MODEL_OF_MESHES, p, batch)
    return terms["loss"][0] / terms["loss"][1]


MODEL_OF_MESHES = HMM(states=4, vocab_size=10, valid_vocab_size=V)


@pytest.mark.slow
def test_the_causal_objective_descends_its_gradient_too():
    p = specs.initialize(MODEL_OF_MESHES.spec(), jax.random.key(0))
    batch = {"tokens_BL": TOKENS, "targets_BL": TOKENS[:, ::-1], "weights_BL": np.ones((B, L), np.float32)}
    value, gradient = jax.value_and_grad(causal_loss)(p, batch)
    assert causal_loss(jax.tree.map(lambda w, g: w - 0.1 * g, p, gradient), batch) < value
    slope = sum(jnp.vdot(g, g) for g in jax.tree.leaves(gradient))
    ahead, behind = (causal_loss(jax.tree.map(lambda w, g, s=s: w + s * g, p, gradient), batch) for s in (0.1, -0.1))
    np.testing.assert_allclose((ahead - behind) / 0.2, slope, rtol=1e-3)  # The curve's third order over so far.


@pytest.mark.slow
def test_a_mesh_gives_the_same_loss():
    p = specs.initialize(MODEL_OF_MESHES.spec(), jax.random.key(0))
    batch = {"tokens_BL": TOKENS, "targets_BL": TOKENS[:, ::-1], "weights_BL": np.ones((B, L), np.float32)}
    shape = tuple({"data": 2, "fsdp": 2, "tensor": 2}.get(axis, 1) for axis in rules.MESH_AXES)
    mesh = jax.make_mesh(shape, rules.MESH_AXES, axis_types=(AxisType.Auto,) * len(shape))
    with jax.set_mesh(mesh):
        sharded = jax.device_put(p, rules.shardings(MODEL_OF_MESHES.spec(), mesh))
        got = jax.jit(causal_loss)(sharded, jax.device_put(batch, rules.batch_sharding(mesh)))
    np.testing.assert_allclose(got, causal_loss(p, batch), rtol=2e-6)


def test_hmmlearn_has_the_same_scores_paths_and_posteriors():
    hmmlearn = pytest.importorskip("hmmlearn.hmm")
    theirs = hmmlearn.CategoricalHMM(Z, implementation="log")
    p = tables()
    theirs.startprob_, theirs.transmat_, theirs.emissionprob_ = p["begin"], p["transition"], p["emission"][:, :V]
    got, scores = MODEL.viterbi(weights(), TOKENS)
    posteriors, totals = MODEL.posteriors(weights(), TOKENS), log_p({"tokens_BL": TOKENS})[0]
    for row, tokens in enumerate(TOKENS[..., None]):
        score, path = theirs.decode(tokens)
        np.testing.assert_array_equal(got[row], path)
        np.testing.assert_allclose([scores[row], totals[row]], [score, theirs.score(tokens)], rtol=1e-5)
        np.testing.assert_allclose(posteriors[row], theirs.predict_proba(tokens), atol=1e-5)


def test_settings_that_cannot_be_are_refused():
    with pytest.raises(UsageError, match="states=0"):
        HMM(states=0)
    with pytest.raises(UsageError, match="init_std=0"):
        HMM(init_std=0)
    with pytest.raises(UsageError, match="valid_vocab_size"):
        dataclasses.replace(MODEL, valid_vocab_size=V + 3)
    with pytest.raises(UsageError, match="capture"):
        MODEL.apply(weights(), {"tokens_BL": TOKENS}, capture=("hidden_states",))
