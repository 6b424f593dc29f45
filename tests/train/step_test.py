"""A step is one update of the whole batch however it is cut, and none where a number is not finite."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lm.core import keys, tree
from lm.core.errors import UsageError
from lm.models.decoder import Decoder
from lm.objectives.causal import Causal
from lm.parallel import rules
from lm.parallel.mesh import Mesh
from lm.train import loop, meters, optimizers, step
from lm.train.run import Run, Train

B, L, V = 8, 16, 128
MODEL = Decoder(layers=2, width=32, heads=4, vocab_size=V, max_len=L)
DECAY = 0.75
GOLDEN = (4.896751, 4.814215, 4.903203)


def make_batch(seed=0):
    """Random tokens; the weights of the rows span seven orders of magnitude."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, V, (B, L + 1), dtype=np.int32)
    weights = (rng.integers(0, 2, (B, L)) * np.logspace(0, -7, B)[:, None]).astype(np.float32)
    return {"tokens_BL": tokens[:, :-1], "targets_BL": tokens[:, 1:], "weights_BL": weights}


def build(optimizer=None, objective=None, ema=False, accumulate=1, noise_scale=False):
    """(a new state, the jitted step); nothing is donated, so that a test may keep the state before."""
    transformation = (optimizer or optimizers.AdamW()).build(MODEL.spec())
    state = step.initialize(MODEL.spec(), transformation, jax.random.key(0), ema)
    pure = step.make_step(
        MODEL,
        objective or Causal(),
        transformation,
        accumulate=accumulate,
        ema_decay=DECAY if ema else None,
        noise_scale=noise_scale,
    )
    return state, jax.jit(functools.partial(pure, rate=jnp.float32(1e-2), key=keys.run_key(0)))


def dots(function, *arguments):
    """The matrix products of the compiled program, those in a loop's body counted once."""
    return function.lower(*arguments).compile().as_text().count(" dot(")


def assert_same_bits(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_accumulation_changes_neither_figures_nor_weights():
    # Not Adam: its first step is the gradient's sign, which is rounding's where the gradient is zero.
    state, whole = build(optimizers.SGD(momentum=0.9))
    _, cut = build(optimizers.SGD(momentum=0.9), accumulate=4)
    for seed in range(2):
        (expected, figures), (state, metrics) = whole(state, make_batch(seed)), cut(state, make_batch(seed))
        assert metrics.keys() == figures.keys()
        for name in figures:
            np.testing.assert_allclose(metrics[name], figures[name], rtol=1e-5, err_msg=name)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6, rtol=1e-5), state, expected)


@pytest.mark.parametrize("accumulate", [2, 8])
def test_the_noise_scale_of_a_linear_regression_is_that_in_closed_form(accumulate):
    d, rows, sigma, delta, steps = 10, 64, 2.0, 0.5, 400

    class Regression:
        """y = x.w* + sigma e; the gradient's covariance has trace (d + 1) |w - w*|^2 + d sigma^2."""

        def loss(self, model, params, batch, *, key, frozen=None):
            errors_B = batch["x_BD"] @ (params["w"] - 1.0) - batch["noise_B"]
            return {"loss": (jnp.sum(jnp.square(errors_B)) / 2, jnp.float32(len(errors_B)), 1.0)}

    weights = {"w": 1.0 + delta * jnp.eye(d)[0]}
    state = step.State(*[jnp.zeros((), jnp.uint32)] * 3, params=weights, optimizer=optax.sgd(1.0).init(weights))
    pure = step.make_step(None, Regression(), optax.sgd(1.0), accumulate=accumulate, noise_scale=True)

    def still(state, key):
        keys_ = jax.random.split(key)
        x_BD, noise_B = jax.random.normal(keys_[0], (rows, d)), sigma * jax.random.normal(keys_[1], (rows,))
        return state, pure(state, {"x_BD": x_BD, "noise_B": noise_B}, jnp.float32(0), key)[1]

    _, metrics = jax.lax.scan(still, state, jax.random.split(jax.random.key(0), steps))
    noise = meters.NoiseScale()
    for trace, square in zip(metrics["noise_trace"].tolist(), metrics["noise_square"].tolist(), strict=True):
        noise.take({"noise_trace": trace, "noise_square": square})
    found = noise.lap()
    np.testing.assert_allclose(found["noise_trace"], (d + 1) * delta**2 + d * sigma**2, rtol=0.03)
    np.testing.assert_allclose(found["noise_square"], delta**2, rtol=0.1)
    np.testing.assert_allclose(found["noise_scale"], (d + 1) + d * sigma**2 / delta**2, rtol=0.1)
    ratios = metrics["noise_trace"] / metrics["noise_square"]
    assert abs(ratios.mean() - 171) > 30  # What dividing first would give.
    assert "noise_scale" not in noise.lap()


@pytest.mark.slow
def test_measuring_the_noise_scale_changes_no_step_and_needs_micro_batches():
    options = {"optimizer": optimizers.SGD(momentum=0.9), "accumulate": 4}
    state, take = build(**options)
    (expected, figures), (found, metrics) = (
        build(**options, noise_scale=on)[1](state, make_batch()) for on in (False, True)
    )
    # The program is another one, and rounds otherwise.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-7, rtol=1e-5), found, expected)
    assert metrics.keys() - figures.keys() == {"noise_trace", "noise_square"}
    with pytest.raises(UsageError, match="train.accumulate=1 must be at least 2"):
        Train(noise_scale=True)


@pytest.mark.slow
def test_counting_the_weights_first_costs_no_forward_pass():
    @dataclasses.dataclass(frozen=True)
    class WeighedByTheModel:
        """Breaks the contract that weights depend on the batch alone, so that the first pass has to run the model."""

        def loss(self, *arguments, **options):
            terms = Causal().loss(*arguments, **options)
            return {name: (s, w + jnp.abs(s), c) for name, (s, w, c) in terms.items()}

    batch = make_batch()
    state, whole = build()
    once = dots(whole, state, batch)
    assert 0 < once == dots(build(accumulate=2)[1], state, batch)
    assert once < dots(build(objective=WeighedByTheModel(), accumulate=2)[1], state, batch)


def test_an_update_that_is_not_finite_leaves_every_bit_and_is_counted():
    state, take = build(ema=True)
    damaged = make_batch() | {"weights_BL": np.full((B, L), np.inf, np.float32)}
    counts = []
    for batch in (make_batch(), damaged, damaged, make_batch(1)):
        before, (state, metrics) = state, take(state, batch)
        counts.append(int(state.skipped))
        assert metrics["skipped"] == state.skipped
        if batch is damaged:
            assert_same_bits((state.params, state.optimizer, state.ema), (before.params, before.optimizer, before.ema))
    assert counts == [0, 1, 2, 0] and (state.step, state.examples) == (4, 4 * B)
    assert np.isfinite(metrics["loss"]) and not np.array_equal(*(s.params["embed"]["table"] for s in (state, before)))


def test_the_average_of_the_weights_follows_its_formula():
    state, take = build(ema=True)
    expected = jax.tree.map(np.float64, state.params)
    for seed in range(3):
        state, _ = take(state, make_batch(seed))
        expected = jax.tree.map(lambda a, w: DECAY * a + (1 - DECAY) * np.float64(w), expected, state.params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), state.ema, expected)


def test_every_leaf_of_the_state_is_donated():
    mesh = Mesh(fsdp=2, tensor=2).build()
    _, new, take = loop.prepare(Run(MODEL, Causal(), train=Train(batch_size=B, seq_len=L, ema_decay=DECAY)), mesh)
    state, batch = new(jax.random.key(0)), jax.device_put(make_batch(), rules.batch_sharding(mesh))
    compiled = take.lower(state, batch, np.float32(1e-2), keys.run_key(0)).compile()
    on_one_device = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(state))
    assert compiled.memory_analysis().alias_size_in_bytes == on_one_device
    leaves = jax.tree.leaves(state)
    take(state, batch, np.float32(1e-2), keys.run_key(0))
    assert all(x.is_deleted() for x in leaves)


def test_the_first_losses_are_those_on_record():
    state, take = build()
    losses = []
    for seed in range(3):
        state, metrics = take(state, make_batch(seed))
        losses.append(float(metrics["loss"]))
    np.testing.assert_allclose(
        losses,
        GOLDEN,
        rtol=1e-5,
        err_msg=f"the first steps have moved. If a change meant to move them (initial values, the model's or the "
        f"optimizer's arithmetic), say so in LOG.md and put GOLDEN = {tuple(losses)}; else it has a bug",
    )


@pytest.mark.parametrize("optimizer", [optimizers.AdamW(), optimizers.Muon()])
def test_moments_lie_like_their_parameters_and_counters_are_whole(optimizer):
    mesh, spec = Mesh(fsdp=2, tensor=2).build(), MODEL.spec()
    transformation = optimizer.build(spec)
    abstract = jax.eval_shape(lambda: step.initialize(spec, transformation, jax.random.key(0), True))
    places = step.shardings(spec, abstract, mesh)
    by_path = tree.flatten(rules.shardings(spec, mesh))
    assert tree.flatten(places.params) == tree.flatten(places.ema) == by_path
    moments = []
    for name in ("mu", "nu"):
        for _, found in optax.tree_utils.tree_get_all_with_path(places.optimizer, name):
            moments += [(path, s) for path, s in tree.flatten(found).items() if not isinstance(s, optax.MaskedNode)]
    assert all(by_path[path] == place for path, place in moments) and {path for path, _ in moments} == set(by_path)
    split = [place for place in jax.tree.leaves(places.optimizer) if not place.is_fully_replicated]
    assert len(split) == sum(not place.is_fully_replicated for _, place in moments) > 0
    assert all(place.is_fully_replicated for place in (places.step, places.examples, places.skipped))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_batch_without_a_target_has_loss_0_and_finite_figures(accumulate):
    state, take = build(accumulate=accumulate)
    state, metrics = take(state, make_batch() | {"weights_BL": np.zeros((B, L), np.float32)})
    assert metrics["loss"] == 0 and metrics["grad_norm"] == 0 and state.skipped == 0
    assert all(np.isfinite(x) for x in metrics.values())
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(state))
