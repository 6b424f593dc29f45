"""Routed experts against a loop over tokens, and what their losses, capacity and meshes promise."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.core import params as specs
from lm.core import tree
from lm.core.errors import UsageError
from lm.core.params import Normal
from lm.generate.sample import generate
from lm.layers.block import Layer
from lm.layers.grouped import grouped_matmul
from lm.layers.moe import Experts, experts, experts_spec
from lm.models.decoder import Decoder
from lm.models.encoder import Encoder
from lm.objectives.causal import Causal
from lm.parallel import rules
from lm.parallel.mesh import Mesh

B, L, D, F, E = 4, 9, 8, 12, 6
PLAIN = Experts(count=E, chosen=2, balance=0.01)


def make_params(form=PLAIN, gated=True, seed=0):
    spec = experts_spec(form, D, F, gated, Normal(0.5), Normal(0.5))
    return specs.initialize(spec, jax.random.key(seed))


def make_x(seed=1, shape=(B, L, D)):
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def collapsed(p, expert):
    """A router that gives all the mass to one expert, for inputs that are all positive."""
    kernel = np.zeros((D, E), np.float32)
    kernel[:, expert] = 10.0
    return p | {"router": {"kernel": kernel}}


def silu(x):
    return x / (1 + np.exp(-x))


def by_token(form, p, x_BLD, real_BL=None):
    """(y, balance, router_z) one token after the other, in float64."""
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), p)
    y, balance, z = np.zeros(x_BLD.shape), 0.0, 0.0
    for b, row in enumerate(x_BLD.astype(np.float64)):
        real = [t for t in range(len(row)) if real_BL is None or real_BL[b, t]]
        room = np.inf
        if form.capacity_factor is not None:
            room = np.ceil(form.capacity_factor * form.chosen * len(real) / form.count)
        choices, mass = np.zeros(form.count), np.zeros(form.count)
        for t in real:
            logits = row[t] @ p["router"]["kernel"]
            share = np.exp(logits) / np.exp(logits).sum()
            mass += share
            z += np.log(np.exp(logits).sum()) ** 2
            best = np.argsort(-share)[: form.chosen]
            total = share[best].sum() if form.normalize else 1.0
            for e in best:
                choices[e] += 1
                if choices[e] <= room:
                    up = row[t] @ p["up"]["kernel"][e]
                    hidden = silu(row[t] @ p["gate"]["kernel"][e]) * up if "gate" in p else silu(up)
                    y[b, t] += share[e] / total * (hidden @ p["down"]["kernel"][e])
        balance += form.count * (choices / form.chosen) @ mass / max(len(real), 1)
    return y, balance, z


@pytest.mark.parametrize(
    "form",
    [
        PLAIN,
        Experts(count=E, chosen=1, normalize=False, router_z=0.1),
        Experts(count=E, chosen=3, normalize=False),
        Experts(count=E, chosen=1, normalize=False, capacity_factor=1.0),
        Experts(count=E, chosen=2, capacity_factor=0.7),
    ],
    ids=str,
)
@pytest.mark.parametrize("gated", [True, False])
def test_equals_a_loop_over_tokens(form, gated):
    p, x = make_params(form, gated), make_x()
    y, sums = jax.jit(lambda p, x: experts(form, p, x, "silu"))(p, x)
    expected, balance, z = by_token(form, p, x)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(sums["balance"], balance, rtol=1e-5)
    assert sums.keys() == form.coefficients.keys()
    if form.router_z:
        np.testing.assert_allclose(sums["router_z"], z, rtol=1e-5)


@pytest.mark.parametrize("sizes", [[3, 0, 200, 7], [0, 0, 0, 0], [0, 210, 0, 0], [64, 64, 64, 18], [1, 2, 3, 4]])
def test_grouped_rows_meet_their_own_kernel_alone(sizes):
    rng = np.random.default_rng(0)
    x, w, c = (rng.standard_normal(shape, np.float32) for shape in ((210, 8), (4, 8, 6), (210, 6)))
    rows = sum(sizes)
    x[rows:] = np.nan  # Nothing there may reach a result or a gradient.
    group = np.repeat(np.arange(4), sizes)
    y, pull = jax.vjp(lambda x, w: grouped_matmul(x, w, jnp.asarray(sizes)), x, w)
    dx, dw = pull(c)
    expected = np.zeros_like(w)
    np.add.at(expected, group, x[:rows, :, None] * c[:rows, None, :])
    np.testing.assert_allclose(y[:rows], np.einsum("rd,rdf->rf", x[:rows], w[group]), atol=1e-5)
    np.testing.assert_allclose(dx[:rows], np.einsum("rf,rdf->rd", c[:rows], w[group]), atol=1e-5)
    np.testing.assert_allclose(dw, expected, atol=1e-4)  # Sums of 200.
    assert not np.any(y[rows:]) and not np.any(dx[rows:])


def test_nothing_is_dropped_even_where_all_tokens_choose_one_expert():
    form = Experts(count=E, chosen=1, normalize=False)
    p, x = collapsed(make_params(form), expert=3), np.abs(make_x()) + 0.1
    y, _ = experts(form, p, x, "silu")
    one = jax.tree.map(lambda a: np.asarray(a)[3], {k: p[k]["kernel"] for k in ("gate", "up", "down")})
    np.testing.assert_allclose(y, (silu(x @ one["gate"]) * (x @ one["up"])) @ one["down"], rtol=1e-4, atol=1e-4)


def test_capacity_drops_the_last_arrivals_and_no_others():
    form = Experts(count=E, chosen=1, normalize=False, capacity_factor=2.0)  # Room for 2 x 9 / 6 = 3 of a row.
    p, x = collapsed(make_params(form), expert=3), np.abs(make_x()) + 0.1
    y, _ = experts(form, p, x, "silu")
    free, _ = experts(dataclasses.replace(form, capacity_factor=None), p, x, "silu")
    np.testing.assert_array_equal(y[:, :3], free[:, :3])
    assert not np.any(y[:, 3:]) and np.all(np.any(free != 0, -1))


def test_what_is_dropped_does_not_depend_on_later_tokens():
    form = Experts(count=E, chosen=2, capacity_factor=0.5)
    p, x, other = make_params(form), make_x(1), make_x(2)
    changed = np.concatenate([x[:, :5], other[:, 5:]], 1)
    y, z = (experts(form, p, a, "silu")[0] for a in (x, changed))
    np.testing.assert_allclose(y[:, :5], z[:, :5], atol=1e-6)


def test_balance_is_1_where_routing_is_even_and_the_count_where_it_collapses():
    form = Experts(count=E, chosen=1, normalize=False)
    x = np.abs(make_x(shape=(B, E, D))) + 0.1
    _, sums = experts(form, collapsed(make_params(form), 2), x, "silu")
    np.testing.assert_allclose(sums["balance"] / (B * E), E, rtol=1e-4)
    each = {"router": {"kernel": 1e-3 * np.eye(D, E, dtype=np.float32)}}
    turns = np.tile(np.eye(E, D, dtype=np.float32), (B, 1, 1))  # Token t prefers expert t, and hardly.
    _, sums = experts(form, make_params(form) | each, turns, "silu")
    np.testing.assert_allclose(sums["balance"] / (B * E), 1, rtol=1e-5)


@pytest.mark.parametrize("form", [PLAIN, Experts(count=E, chosen=1, normalize=False)], ids=str)
def test_gradient_reaches_the_router_through_the_outputs_and_through_each_loss(form):
    form = dataclasses.replace(form, router_z=0.1)
    p, x = make_params(form), make_x()

    def norm(pick):
        gradient = jax.jit(jax.grad(lambda p: pick(*experts(form, p, x, "silu"))))(p)
        return np.linalg.norm(gradient["router"]["kernel"])

    assert norm(lambda y, _: jnp.sum(y**2)) > 1e-2
    assert norm(lambda _, sums: sums["balance"]) > 1e-2
    assert norm(lambda _, sums: sums["router_z"]) > 1e-2


@pytest.mark.parametrize("form", [PLAIN, Experts(count=E, chosen=2, capacity_factor=0.7, router_z=0.1)], ids=str)
@pytest.mark.parametrize("left", [True, False])
def test_padding_changes_neither_outputs_nor_losses(form, left):
    p, x = make_params(form), make_x()
    alone, sums = experts(form, p, x, "silu")
    side = (4, 0) if left else (0, 4)
    padded = np.pad(x, ((0, 0), side, (0, 0)), constant_values=3.0)
    real = np.pad(np.ones((B, L), bool), ((0, 0), side))
    y, padded_sums = experts(form, p, padded, "silu", real)
    np.testing.assert_allclose(y[:, 4:] if left else y[:, :-4], alone, atol=1e-6)
    for name in sums:
        np.testing.assert_allclose(padded_sums[name], sums[name], rtol=1e-6)


V, ROWS = 128, 8
SWITCH = Decoder(
    layers=4,
    width=32,
    heads=4,
    mlp_width=48,
    vocab_size=V,
    positions="rotary",
    gated=True,
    mlp_bias=False,
    activation="silu",
    pattern=(Layer(), Layer(experts=Experts(4, 2, capacity_factor=1.0, router_z=0.001))),
)


def make_batch(length=16):
    rng = np.random.default_rng(1)
    tokens = rng.integers(0, V, (ROWS, length + 1), dtype=np.int32)
    documents = np.zeros((ROWS, length), np.int32)
    documents[::2, -5:] = -1
    weights = (documents >= 0).astype(np.float32)
    return {"tokens_BL": tokens[:, :-1], "targets_BL": tokens[:, 1:], "weights_BL": weights, "documents_BL": documents}


def loss_and_gradients(model, params, batch):
    def total(params):
        terms = Causal().loss(model, params, batch)
        return sum(c * s / w for s, w, c in terms.values()), terms

    (loss, terms), gradients = jax.jit(jax.value_and_grad(total, has_aux=True))(params)
    return loss, terms, tree.flatten(gradients)


def assert_same(actual, expected):
    np.testing.assert_allclose(actual[0], expected[0], rtol=2e-6)
    for name in ("balance", "router_z"):
        np.testing.assert_allclose(actual[1][name], expected[1][name], rtol=2e-6)
    for path, g in actual[2].items():
        assert np.linalg.norm(g - expected[2][path]) <= 1e-5 * max(np.linalg.norm(expected[2][path]), 1e-2), path


@pytest.fixture(scope="module")
def params():
    return jax.tree.map(lambda w: 3 * w, specs.initialize(SWITCH.spec(), jax.random.key(0)))


@pytest.fixture(scope="module")
def reference(params):
    return loss_and_gradients(SWITCH, params, make_batch())


@pytest.mark.parametrize(
    "change",
    [
        *(pytest.param(c, marks=pytest.mark.slow) for c in ({"scan": False}, {"remat": "full"}, {"remat": "dots"})),
        {"remat": "attention"},
    ],
    ids=str,
)
def test_how_the_stack_is_run_changes_nothing(params, reference, change):
    assert_same(loss_and_gradients(dataclasses.replace(SWITCH, **change), params, make_batch()), reference)


@pytest.mark.parametrize(
    "sizes",
    [
        {"data": 2, "expert": 2, "tensor": 2},
        pytest.param({"fsdp": 2, "expert": 4}, marks=pytest.mark.slow),
        pytest.param({"expert": 2, "seq": 2, "tensor": 2}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_mesh_gives_the_same_losses_and_gradients(params, reference, sizes):
    mesh = Mesh(**{"data": 1} | sizes).build()
    with jax.set_mesh(mesh):
        sharded = jax.device_put(params, rules.shardings(SWITCH.spec(), mesh))
        kernel = sharded["group0"]["layer1"]["mlp"]["up"]["kernel"]
        assert kernel.sharding.shard_shape(kernel.shape)[1] == 4 // sizes["expert"]
        batch = jax.device_put(make_batch(), rules.batch_sharding(mesh))
        assert_same(loss_and_gradients(SWITCH, sharded, batch), reference)


def test_each_layer_adds_its_loss_with_the_full_coefficient(reference):
    total, weight, coefficient = reference[1]["balance"]
    assert coefficient == 2 * 0.01 and weight == 2 * make_batch()["weights_BL"].sum()
    assert 1 <= total / weight < 4


def test_accumulated_micro_batches_have_the_same_sums(params, reference):
    loss = jax.jit(lambda batch: Causal().loss(SWITCH, params, batch))
    halves = [loss({name: x[half::2] for name, x in make_batch().items()}) for half in range(2)]
    for name in ("loss", "balance", "router_z"):
        for i in range(2):
            np.testing.assert_allclose(halves[0][name][i] + halves[1][name][i], reference[1][name][i], rtol=2e-6)


def test_cached_generation_equals_a_full_pass(params):
    free = dataclasses.replace(SWITCH, pattern=(Layer(), Layer(experts=Experts(4, 2))))
    prompt = list(range(5))
    new = generate(free, params, [prompt], 6, temperature=0)[0]
    tokens = np.array([[*prompt, *new[:-1]]], np.int32)
    hidden_BLD = jax.jit(lambda p: free.apply(p, {"tokens_BL": tokens}).hidden_BLD)(params)
    np.testing.assert_array_equal(new, np.argmax(free.logits(free.head(params), hidden_BLD[0, 4:]), -1))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"count": 4, "chosen": 5}, "experts.chosen=5 is more than experts.count=4"),
        ({"count": 0, "chosen": 1}, "experts.count=0"),
        ({"count": 4, "chosen": 1}, "experts.chosen=1 with experts.normalize=True"),
        ({"count": 4, "chosen": 2, "capacity_factor": 0.0}, "capacity_factor=0.0"),
        ({"count": 4, "chosen": 2, "balance": -0.1}, "experts.balance=-0.1"),
    ],
    ids=str,
)
def test_experts_without_sense_are_refused(settings, message):
    with pytest.raises(UsageError, match=message):
        Experts(**settings)


def test_settings_that_experts_do_not_have_are_refused():
    routed: dict[str, Any] = {"layers": 1, "width": 8, "heads": 1, "positions": "none"}
    routed["pattern"] = (Layer(experts=Experts(2, 2)),)
    with pytest.raises(UsageError, match="set mlp_bias=False"):
        Decoder(**routed)
    with pytest.raises(UsageError, match="use residual_dropout"):
        Decoder(**routed, mlp_bias=False, mlp_dropout=0.1)
    both = (Layer(experts=Experts(2, 2)), Layer(experts=Experts(2, 2, balance=0.0)))
    with pytest.raises(UsageError, match="the same in all layers"):
        Decoder(**routed | {"pattern": both, "layers": 2}, mlp_bias=False)


def test_padding_of_an_encoder_takes_no_room_and_counts_for_no_balance():
    routed = Experts(4, 2, capacity_factor=1.0)
    sizes = {"layers": 1, "width": 16, "heads": 2, "vocab_size": 32, "types": 0}
    model = Encoder(**sizes, pattern=(Layer(experts=routed),), mlp_bias=False)
    params = specs.initialize(model.spec(), jax.random.key(0))
    tokens = np.arange(8)[None]
    alone = model.apply(params, {"tokens_BL": tokens})
    documents = np.repeat([[0, -1]], 8, 1).astype(np.int32)
    padded = model.apply(params, {"tokens_BL": np.pad(tokens, ((0, 0), (0, 8))), "documents_BL": documents})
    np.testing.assert_allclose(padded.hidden_BLD[:, :8], alone.hidden_BLD, atol=1e-5)
    for name, (total, weight, _) in alone.aux.items():
        np.testing.assert_allclose(padded.aux[name][:2], (total, weight), rtol=1e-5)
