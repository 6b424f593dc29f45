"""Layers in stages: the schedule, and that a model computes the same with it, with little moved between the stages."""

import dataclasses
import functools
import re
from typing import Any

import jax
import numpy as np
import pytest

from lm.core import keys as run_keys
from lm.core import params as specs
from lm.core import tree
from lm.core.errors import UsageError
from lm.generate.sample import generate
from lm.layers.block import Layer
from lm.layers.buckets import Buckets
from lm.layers.moe import Experts
from lm.layers.pipeline import Schedule
from lm.models.decoder import Decoder
from lm.models.encdec import EncDec
from lm.models.encoder import Encoder
from lm.models.nnlm import NNLM
from lm.models.xlnet import XLNet
from lm.objectives.causal import Causal
from lm.parallel import rules
from lm.parallel.mesh import Mesh, under
from lm.train import loop
from lm.train.checkpoint import Checkpoints
from lm.train.run import Run, Train
from tests.models.contract_test import assert_same, randomized

B, L, V = 16, 8, 64
TINY: dict[str, Any] = {"layers": 4, "width": 16, "heads": 4, "vocab_size": V}
GATED: dict[str, Any] = {"positions": "rotary", "activation": "silu", "gated": True, "mlp_bias": False}
MODELS = {
    "decoder": Decoder(**TINY, kv_heads=2, **GATED, remat="dots"),
    "encoder": Encoder(**TINY, max_len=L),
    "encdec": EncDec(**TINY, positions="none", norm_place="pre", buckets=Buckets(8, 6)),
    "moe": Decoder(
        **TINY,
        positions="rotary",
        mlp_bias=False,
        mlp_width=24,
        pattern=(Layer(experts=Experts(4, 2, router_z=0.001)),),
    ),
    "uneven": Decoder(
        **TINY | {"layers": 10},
        **GATED,
        prefix=(Layer(),),
        pattern=(Layer(window=3, rope_base=500.0), Layer()),
        remat="full",
        scan=False,
    ),
}
MESHES = {
    "data": Mesh(stage=2, data=4),
    "tensor": Mesh(stage=2, fsdp=2, tensor=2, data=1),
    "fsdp": Mesh(stage=4, fsdp=2, data=1),
    "rounds": Mesh(stage=2, fsdp=2, data=2, micro_batches=4, rounds=2),
}
FAST = {("decoder", "tensor")}


def make_batch(source=False):
    """Packed rows, some with padding at the end."""
    rng = np.random.default_rng(1)
    tokens = rng.integers(0, V, (B, L + 1), dtype=np.int32)
    batch = {"tokens_BL": tokens[:, :-1], "targets_BL": tokens[:, 1:], "documents_BL": make_documents(rng, L)}
    if source:
        batch["source_tokens_BS"] = rng.integers(0, V, (B, L + 2), dtype=np.int32)
        batch["source_documents_BS"] = make_documents(rng, L + 2)
    return batch | {"weights_BL": (batch["documents_BL"] >= 0).astype(np.float32)}


def make_documents(rng, length):
    documents = np.sort(rng.integers(0, 3, (B, length)), 1).astype(np.int32)
    return np.where(np.arange(length) < length - rng.integers(0, 2, (B, 1)), documents, -1)


@functools.cache
def compiled(model):
    """Loss, with all its terms, and gradients of (params, batch, key)."""

    def loss(params, batch, key):
        terms = Causal().loss(model, params, batch, key=key).values()
        return sum(coefficient * total / weight for total, weight, coefficient in terms if coefficient)

    return jax.jit(jax.value_and_grad(loss))


@functools.cache
def on_one_device(name):
    """(parameters, loss and gradients)."""
    params = randomized(MODELS[name], 0)
    return params, compiled(MODELS[name])(params, make_batch(name == "encdec"), None)


def placed(model, params, settings, batch):
    """(the mesh, the parameters, the batch) on it."""
    mesh = settings.build()
    sharded = jax.device_put(params, rules.shardings(model.spec(), mesh))
    return mesh, sharded, jax.device_put(batch, rules.batch_sharding(mesh))


@pytest.mark.parametrize("stages, micro_batches, rounds", [(2, 2, 1), (4, 6, 1), (4, 1, 1), (4, 8, 2), (2, 4, 4)])
def test_what_a_stage_works_on_is_what_the_one_before_has_just_left(stages, micro_batches, rounds):
    form = Schedule(stages, micro_batches, rounds)
    number, turn, works = form.work()
    assert number.shape == (form.ticks, stages) and (works.sum(0) == form.ticks - (stages - 1)).all()
    for stage in range(stages):
        done = {(number[t, stage], turn[t, stage]) for t in range(form.ticks) if works[t, stage]}
        assert done == set(np.ndindex(micro_batches, rounds))
    for t, stage in zip(*np.nonzero(works), strict=True):
        if stage or turn[t, 0]:
            before = number[t - 1, stage - 1], turn[t - 1, stage - 1], works[t - 1, stage - 1]
            assert before == (number[t, stage], turn[t, stage] - (stage == 0), True)
    for r, m in np.ndindex(rounds, micro_batches):
        t = form.starts()[r, m]
        assert (number[t, 0], turn[t, 0], works[t, 0]) == (m, r, True)


@pytest.mark.parametrize(
    "name, mesh",
    [pytest.param(n, m, marks=() if (n, m) in FAST else pytest.mark.slow) for n in MODELS for m in MESHES],
)
def test_stages_give_the_same_loss_and_gradients(name, mesh):
    params, reference = on_one_device(name)
    built, sharded, batch = placed(MODELS[name], params, MESHES[mesh], make_batch(name == "encdec"))
    assert_same(under(built, compiled(MODELS[name]), MESHES[mesh])(sharded, batch, None), reference)


@pytest.mark.slow
def test_stages_and_experts_share_a_mesh():
    params, reference = on_one_device("moe")
    settings = Mesh(stage=2, expert=2, tensor=2, data=1)
    mesh, sharded, batch = placed(MODELS["moe"], params, settings, make_batch())
    assert_same(under(mesh, compiled(MODELS["moe"]), settings)(sharded, batch, None), reference)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["decoder", "encdec", "moe"])
def test_bfloat16_is_as_far_from_float32_as_on_one_device(name):
    params, (loss, gradients) = on_one_device(name)
    model, settings = dataclasses.replace(MODELS[name], dtype="bfloat16"), MESHES["tensor"]
    _, alone = compiled(model)(params, make_batch(name == "encdec"), None)
    mesh, sharded, batch = placed(model, params, settings, make_batch(name == "encdec"))
    actual = under(mesh, compiled(model), settings)(sharded, batch, None)
    np.testing.assert_allclose(actual[0], loss, rtol=1e-2)
    flat, expected, alone = (
        np.concatenate([g.ravel() for g in jax.tree.leaves(x)]) for x in (actual[1], gradients, alone)
    )
    # XLA leaves out roundings where it fuses, here and there in other places, and a router's ties then fall otherwise.
    assert np.linalg.norm(flat - expected) < 2.5 * np.linalg.norm(alone - expected)


def test_a_tick_moves_one_micro_batch_and_no_parameter_or_gradient():
    model, settings = MODELS["decoder"], MESHES["data"]
    mesh, params, batch = placed(model, on_one_device("decoder")[0], settings, make_batch())
    text = under(mesh, lambda *a: compiled(model).lower(*a).compile().as_text(), settings)(params, batch, None)
    kinds = "all-gather|all-reduce|all-to-all|reduce-scatter|collective-permute"
    found = re.findall(rf'= (.*?) ({kinds})\(.*?op_name="(.*?)"', text)
    inside = {(kind, shape.split("{")[0]) for shape, kind, name in found if "/shard_map/while/" in name.split(":")[0]}
    assert inside == {("collective-permute", f"f32[2,{L},16]")}
    # What leaves the loss, of which each stage has scored a share.
    assert [shape.split("{")[0] for shape, kind, _ in found if kind == "all-gather"] == [f"f32[4,{L},16]"]


def test_every_layer_and_micro_batch_has_dropout_of_its_own():
    model = dataclasses.replace(MODELS["decoder"], layers=2, residual_dropout=0.5, remat="none")
    settings = Mesh(stage=2, data=2, tensor=2, micro_batches=2)
    batch = {"tokens_BL": np.repeat(make_batch()["tokens_BL"][:1], 4, 0)}
    mesh, params, batch = placed(model, randomized(model, 0), settings, batch)
    apply = jax.jit(lambda params, batch, key: model.apply(params, batch, key=key, capture=("hidden_states",)).captured)

    def rows(key):
        states_NBLD = np.asarray(under(mesh, apply, settings)(params, batch, key)["hidden_states"])
        return states_NBLD.swapaxes(0, 1).reshape(4, -1)

    first, again, other = rows(jax.random.key(0)), rows(jax.random.key(0)), rows(jax.random.key(1))
    np.testing.assert_array_equal(first, again)
    assert len(np.unique(np.concatenate([first, other]), axis=0)) == 8
    assert len(np.unique(rows(None), axis=0)) == 1


@pytest.mark.parametrize("name", ["decoder", pytest.param("uneven", marks=pytest.mark.slow)])
def test_captured_states_and_cached_decoding_are_those_of_one_device(name):
    model, settings = MODELS[name], MESHES["rounds"]
    tokens = make_batch()["tokens_BL"]
    mesh, params, rows = placed(model, on_one_device(name)[0], settings, tokens)
    full = jax.jit(lambda params, tokens: model.apply(params, {"tokens_BL": tokens}, capture=("hidden_states",)))
    expected, out = full(on_one_device(name)[0], tokens), under(mesh, full, settings)(params, rows)
    np.testing.assert_allclose(out.captured["hidden_states"], expected.captured["hidden_states"], atol=1e-5)
    step = under(mesh, jax.jit(lambda p, tokens, cache: model.apply(p, {"tokens_BL": tokens}, cache=cache)), settings)
    spec = model.cache_spec(B, L)
    cache = jax.device_put(specs.initialize(spec, jax.random.key(0)), rules.shardings(spec, mesh))
    for first, last in ((0, L - 1), (L - 1, L)):
        out = step(params, rows[:, first:last], cache)
        cache = out.cache
        np.testing.assert_allclose(out.hidden_BLD, expected.hidden_BLD[:, first:last], atol=1e-5)


@pytest.mark.slow
def test_weights_over_stages_generate_without_their_mesh_in_context():
    params = on_one_device("decoder")[0]
    _, sharded, _ = placed(MODELS["decoder"], params, MESHES["fsdp"], make_batch())
    ours, theirs = (generate(MODELS["decoder"], p, [[1, 2, 3]], 5, temperature=0)[0] for p in (sharded, params))
    np.testing.assert_array_equal(ours, theirs)


@pytest.mark.slow
@pytest.mark.parametrize("settings", [Mesh(data=2, fsdp=2, tensor=2), Mesh(fsdp=8)], ids=str)
def test_a_run_goes_on_with_stages_and_without_them(tmp_path, settings):
    """Three steps, each on the other mesh than the last, from its checkpoint: as three on one device."""

    def train(run, devices, batch, steps, state=None):
        mesh = run.mesh.build(devices)
        abstract, new, step = loop.prepare(run, mesh)
        state = new(jax.random.key(0)) if state is None else Checkpoints(tmp_path).restore(abstract)[0]
        for _ in range(steps):
            rows = jax.device_put(batch, rules.batch_sharding(mesh))
            state, metrics = under(mesh, step, run.mesh)(state, rows, np.float32(1e-2), run_keys.run_key(0))
        return state, metrics["loss"]

    batch = make_batch()
    run = Run(MODELS["decoder"], Causal(), mesh=Mesh(), train=Train(batch_size=B, seq_len=L, accumulate=2, steps=3))
    expected, loss = train(run, jax.devices()[:1], batch, 3)
    state = None
    for i, mesh in enumerate((Mesh(stage=2, data=4), settings, Mesh(stage=4, tensor=2))):
        state, last = train(dataclasses.replace(run, mesh=mesh), jax.devices(), batch, 1, state)
        Checkpoints(tmp_path).save(i + 1, state, {}, wait=True)
    np.testing.assert_allclose(last, loss, rtol=1e-5)
    for path, w in tree.flatten(expected.params).items():
        np.testing.assert_allclose(tree.flatten(state.params)[path], w, atol=1e-4, err_msg=path)
    kernels = [x for x in jax.tree.leaves((state.params, state.optimizer)) if x.shape == (4, 16, 4, 4)]
    # The queries' and its two moments.
    assert len(kernels) == 3 and all(x.addressable_shards[0].data.shape[0] == 1 for x in kernels)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"micro_batches": 4}, "mesh.micro_batches=4 and mesh.rounds=1 have no effect with mesh.stage=1"),
        ({"rounds": 2}, "mesh.rounds=2 have no effect"),
        ({"stage": 4, "micro_batches": 0}, "mesh.micro_batches=0 must be at least 1"),
        ({"stage": 4, "rounds": 3, "micro_batches": 4}, "mesh.rounds=3 must divide mesh.stage=4, or be a multiple"),
        ({"stage": 4, "rounds": 2, "micro_batches": 6}, "a multiple of mesh.stage=4 micro-batches, not .*=6"),
    ],
    ids=str,
)
def test_a_schedule_without_sense_is_refused(settings, message):
    with pytest.raises(UsageError, match=message):
        Mesh(**settings)


@pytest.mark.parametrize(
    "model, settings, message",
    [
        (XLNet(**TINY), {"stage": 2}, "mesh.stage=2 divides a stack of layers, which XLNet does not have"),
        (NNLM(vocab_size=V), {"stage": 2}, "which NNLM does not have"),
        (Encoder(**TINY, max_len=L, shared_groups=1), {"stage": 2}, "mesh.stage=2 has no effect on layers that share"),
        (Decoder(**TINY, max_len=L, prefix=(Layer(),)), {"stage": 2}, "3 repeats of a pattern of 1 do not divide over"),
        (
            EncDec(**TINY, decoder_layers=6),
            {"stage": 4},
            "6 repeats .* do not divide over mesh.stage=4 x mesh.rounds=1",
        ),
        (MODELS["decoder"], {"stage": 4, "rounds": 2, "micro_batches": 4}, "over mesh.stage=4 x mesh.rounds=2"),
        (
            MODELS["decoder"],
            {"stage": 2, "micro_batches": 3},
            "train.accumulate=2 do not divide into .*micro_batches=3",
        ),
    ],
    ids=str,
)
def test_stages_that_a_run_cannot_have_are_refused_before_any_device_is_touched(model, settings, message):
    with pytest.raises(UsageError, match=message):
        Run(model, Causal(), mesh=Mesh(**settings), train=Train(batch_size=B, seq_len=L, accumulate=2))


def test_rows_that_do_not_divide_are_refused_with_the_number_that_does():
    model, settings = MODELS["decoder"], Mesh(stage=2, data=4, micro_batches=8)
    mesh = settings.build()
    with pytest.raises(
        UsageError, match="16 rows do not divide into mesh.micro_batches=8, each over data=4: take .* 32"
    ):
        under(mesh, compiled(model).lower, settings)(specs.abstract(model.spec()), make_batch(), None)
