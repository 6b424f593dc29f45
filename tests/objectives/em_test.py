"""Baum-Welch through the ordinary step, against enumeration, hmmlearn, and a planted model."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from lm.core import keys
from lm.core import params as specs
from lm.core.errors import UsageError
from lm.models.decoder import Decoder
from lm.models.hmm import HMM
from lm.objectives.causal import Causal
from lm.objectives.em import Expectation
from lm.parallel import rules
from lm.train import optimizers, step
from lm.train.optimizers import Maximization
from lm.train.run import Run, resolve

B, L, Z, V = 8, 6, 2, 5
MODEL = HMM(states=Z, vocab_size=V + 1, valid_vocab_size=V)
BAUM_WELCH = Maximization()


def made(tokens_BL):
    """The batch of the rows, the last of which is shorter and has two documents."""
    rows = [{"tokens": row, "documents": np.zeros(len(row), np.int32)} for row in tokens_BL]
    rows[-1]["documents"][2:] = 1
    rows[-1]["documents"][-1] = -1
    batches = [Expectation().corrupt(np.random.default_rng(0), row) for row in rows]
    return {name: np.stack([b[name] for b in batches]) for name in batches[0]}


BATCH = made(np.random.default_rng(0).integers(0, V, (B, L)).astype(np.int32))


def initial(model, seed=0):
    return specs.initialize(model.spec(), jax.random.key(seed))


def probabilities(model, params):
    return {name: np.exp(np.asarray(t, np.float64)) for name, t in model.log_probs(params).items()}


def counted(p, batch):
    """(log p of all sequences, expected counts) by enumeration of paths."""
    total, counts = 0.0, {name: np.zeros_like(t) for name, t in p.items()}
    for tokens, documents in zip(batch["tokens_BL"], batch["documents_BL"], strict=True):
        for document in np.unique(documents[documents >= 0]):
            x = tokens[documents == document]
            paths = np.array(list(itertools.product(range(Z), repeat=len(x))))
            odds = p["begin"][paths[:, 0]] * p["emission"][paths, x[None]].prod(1)
            odds = odds * p["transition"][paths[:, :-1], paths[:, 1:]].prod(1)
            total, share = total + np.log(odds.sum()), odds / odds.sum()
            np.add.at(counts["begin"], paths[:, 0], share)
            np.add.at(counts["transition"], (paths[:, :-1], paths[:, 1:]), share[:, None])
            np.add.at(counts["emission"], (paths, np.broadcast_to(x, paths.shape)), share[:, None])
    return total, counts


def trained(model, batch, optimizer=BAUM_WELCH, steps=1, params=None, rate=1.0, **settings):
    """(the parameters after each of some steps over one batch, the loss before each)."""
    transformation = optimizer.build(model.spec())
    state = step.initialize(model.spec(), transformation, keys.run_key(0), False)
    state = state.replace(params=params or initial(model))
    take, found, losses = jax.jit(step.make_step(model, Expectation(), transformation, **settings)), [], []
    for _ in range(steps):
        state, metrics = take(state, batch, jnp.float32(rate), keys.run_key(0))
        found.append(state.params)
        losses.append(float(metrics["loss"]))
    return found, losses


def test_the_gradient_is_minus_the_expected_counts_per_token():
    params = initial(MODEL)

    def loss(params):
        total, weight, coefficient = Expectation().loss(MODEL, params, BATCH)["loss"]
        return coefficient * total / weight

    value, gradient = jax.value_and_grad(lambda p: 3 * loss(p))(params)
    total, counts = counted(probabilities(MODEL, params), BATCH)
    tokens = BATCH["weights_BL"].sum()
    np.testing.assert_allclose(value, -3 * total / tokens, rtol=1e-5)
    for name, g in gradient.items():
        np.testing.assert_allclose(g, -3 * counts[name] / tokens, atol=1e-5)


@pytest.mark.parametrize("accumulate", [1, 4])
def test_a_step_divides_the_expected_counts(accumulate):
    (after,), _ = trained(MODEL, BATCH, accumulate=accumulate)
    _, counts = counted(probabilities(MODEL, initial(MODEL)), BATCH)
    for name, t in probabilities(MODEL, after).items():
        np.testing.assert_allclose(t, shares(counts[name]), atol=1e-5)


def test_a_prior_adds_even_counts():
    (after,), _ = trained(MODEL, BATCH, Maximization(prior=0.5))
    _, counts = counted(probabilities(MODEL, initial(MODEL)), BATCH)
    for name, t in probabilities(MODEL, after).items():
        # The id that is no token's takes its part as well, and loses it where the model normalises.
        wanted = (counts[name] + 0.5 * counts[name].mean())[..., : V if name == "emission" else Z]
        np.testing.assert_allclose(t[..., : wanted.shape[-1]], shares(wanted), atol=1e-5)


def test_a_power_mixes_with_the_counts_of_earlier_batches():
    (once, twice), _ = trained(MODEL, BATCH, Maximization(power=0.7), steps=2)
    counts = [counted(probabilities(MODEL, p), BATCH)[1] for p in (initial(MODEL), once)]
    for name, t in probabilities(MODEL, twice).items():
        mixed = (1 - 2**-0.7) * counts[0][name] + 2**-0.7 * counts[1][name]
        np.testing.assert_allclose(t, shares(mixed), atol=1e-5)


def shares(counts):
    return counts / counts.sum(-1, keepdims=True)


def text(states, symbols, rows, length, seed):
    """(Tokens of a planted model [rows, length], its transition and emission)."""
    rng = np.random.default_rng(seed)
    transition = rng.dirichlet(np.full(states, 0.5), states)
    emission = rng.dirichlet(np.full(symbols, 0.3), states)
    tokens, state = np.zeros((rows, length), np.int32), rng.integers(states, size=rows)
    for t in range(length):
        tokens[:, t], state = drawn(rng, emission[state]), drawn(rng, transition[state])
    return tokens, transition, emission


def drawn(rng, p):
    return (p.cumsum(1) < rng.random((len(p), 1))).sum(1).clip(max=p.shape[1] - 1)


def whole(tokens_BL):
    return {
        "tokens_BL": tokens_BL,
        "documents_BL": np.zeros_like(tokens_BL),
        "weights_BL": np.ones(tokens_BL.shape, np.float32),
    }


def test_the_likelihood_never_falls():
    batch = whole(text(4, 12, 16, 60, seed=3)[0])
    for seed in range(3):
        model = HMM(states=6, vocab_size=12)
        _, losses = trained(model, batch, steps=60, params=initial(model, seed))
        # The mean over 960 tokens in float32, of sums in any order.
        assert np.diff(losses).max() < 2e-6 and losses[-1] < losses[0] - 0.1


def test_over_relaxation_gets_further_in_as_many_steps():
    batch, model = whole(text(4, 12, 16, 60, seed=3)[0]), HMM(states=4, vocab_size=12)
    (_, plain), (_, relaxed) = (trained(model, batch, steps=30, rate=r) for r in (1.0, 1.5))
    assert relaxed[-1] < plain[-1] and np.diff(relaxed).max() < 2e-6


def test_a_planted_model_is_recovered_up_to_the_order_of_its_states():
    tokens, transition, emission = text(3, 8, 32, 400, seed=5)
    model = HMM(states=3, vocab_size=8)
    batch = whole(tokens)
    best, _ = min(
        (trained(model, batch, steps=150, params=initial(model, s)) for s in range(3)), key=lambda r: r[1][-1]
    )
    found = probabilities(model, best[-1])
    orders = itertools.permutations(range(3))
    order = np.array(min(orders, key=lambda o: np.abs(found["emission"][list(o)] - emission).sum()))
    # 12,800 tokens leave a standard error of about 0.01 of each probability, and more where states look alike.
    np.testing.assert_allclose(found["emission"][order], emission, atol=0.04)
    np.testing.assert_allclose(found["transition"][np.ix_(order, order)], transition, atol=0.06)


def test_hmmlearn_takes_the_same_steps():
    hmmlearn = pytest.importorskip("hmmlearn.hmm")
    tokens, _, _ = text(3, 8, 6, 40, seed=1)
    model = HMM(states=3, vocab_size=8)
    params = initial(model, 1)
    p = probabilities(model, params)
    theirs = hmmlearn.CategoricalHMM(3, n_iter=1, init_params="", implementation="log")
    theirs.startprob_, theirs.transmat_, theirs.emissionprob_ = p["begin"], p["transition"], p["emission"]
    for after in trained(model, whole(tokens), steps=5, params=params)[0]:
        theirs.fit(tokens.reshape(-1, 1), [40] * 6)
        p = probabilities(model, after)
        np.testing.assert_allclose(p["begin"], theirs.startprob_, atol=1e-5)
        np.testing.assert_allclose(p["transition"], theirs.transmat_, atol=1e-5)
        np.testing.assert_allclose(p["emission"], theirs.emissionprob_, atol=1e-5)


def test_the_loss_is_that_of_causal_predictions():
    batch, params = whole(BATCH["tokens_BL"]), initial(MODEL)
    tokens = batch["tokens_BL"]
    rest = {"tokens_BL": tokens[:, :-1], "targets_BL": tokens[:, 1:], "weights_BL": batch["weights_BL"][:, 1:]}
    p = probabilities(MODEL, params)
    first = -np.log((p["begin"] @ p["emission"])[tokens[:, 0]])
    causal = Causal().loss(MODEL, params, rest)["nll"][0] + first.sum()
    np.testing.assert_allclose(Expectation().loss(MODEL, params, batch)["loss"][0], causal, rtol=1e-5)


def test_rows_continue_those_of_the_step_before():
    params, tokens = initial(MODEL), BATCH["tokens_BL"]
    carry = specs.initialize(MODEL.carry_spec(B), jax.random.key(0))
    first, carry = Expectation().carried(MODEL, params, whole(tokens[:, :2]), carry)
    second, _ = Expectation().carried(MODEL, params, whole(tokens[:, 2:]), carry)
    at_once = Expectation().loss(MODEL, params, whole(tokens))["loss"][0]
    np.testing.assert_allclose(first["loss"][0] + second["loss"][0], at_once, rtol=1e-5)


@pytest.mark.slow
def test_a_mesh_takes_the_same_steps():
    model = HMM(states=4, vocab_size=6, valid_vocab_size=V)
    alone, losses = trained(model, BATCH, steps=3)
    shape = tuple({"data": 2, "fsdp": 2, "tensor": 2}.get(axis, 1) for axis in rules.MESH_AXES)
    mesh = jax.make_mesh(shape, rules.MESH_AXES, axis_types=(AxisType.Auto,) * len(shape))
    with jax.set_mesh(mesh):
        params = jax.device_put(initial(model), rules.shardings(model.spec(), mesh))
        state, found = trained(model, jax.device_put(BATCH, rules.batch_sharding(mesh)), steps=3, params=params)
    np.testing.assert_allclose(found, losses, rtol=2e-6)
    got, wanted = probabilities(model, state[-1]), probabilities(model, alone[-1])
    for name in got:
        np.testing.assert_allclose(got[name], wanted[name], atol=1e-5)


@dataclasses.dataclass
class Tokenizer:
    vocab_size: int = 100
    eos_id: int | None = None


def test_expected_counts_and_their_optimizer_need_each_other():
    run = Run(model=HMM(), objective=Expectation(), optimizer=Maximization())
    assert resolve(run, Tokenizer()).model.valid_vocab_size == 100
    with pytest.raises(UsageError, match="need each other"):
        resolve(dataclasses.replace(run, optimizer=optimizers.AdamW()), Tokenizer())
    with pytest.raises(UsageError, match="need each other"):
        resolve(dataclasses.replace(run, objective=Causal()), Tokenizer())
    with pytest.raises(UsageError, match="use lm.models.hmm.HMM"):
        resolve(dataclasses.replace(run, model=Decoder(layers=1, width=8, heads=1, max_len=256)), Tokenizer())
    with pytest.raises(UsageError, match="power=0.3"):
        Maximization(power=0.3)
    with pytest.raises(UsageError, match="prior=-1"):
        Maximization(prior=-1)
