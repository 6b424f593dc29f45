"""Moments on the host make the same steps, and lie there before and after each."""

import dataclasses
import types

import jax
import numpy as np
import pytest

from lm.core import config, keys
from lm.core.errors import UsageError
from lm.models.decoder import Decoder
from lm.objectives.causal import Causal
from lm.parallel import rules
from lm.parallel.mesh import Mesh, under
from lm.train import loop, offload, optimizers
from lm.train.checkpoint import Checkpoints
from lm.train.run import Run, Train

B, L, V = 8, 16, 128
# Without biases: a key's has a gradient of nothing but rounding, which a step of a given length makes large.
MODEL = Decoder(
    layers=4, width=32, heads=4, vocab_size=V, max_len=L, norm="rmsnorm", attention_bias=False, mlp_bias=False
)
ALONE = Mesh(data=1)


def make_run(offloaded, optimizer=None, mesh=ALONE):
    train = Train(batch_size=B, seq_len=L, offload_optimizer=offloaded)
    return Run(MODEL, Causal(), optimizer=optimizer or optimizers.AdamW(), mesh=mesh, train=train)


def start(run):
    """(the abstract state, a new one, a function from a state and the weights of a batch to the next one)."""
    mesh = run.mesh.build(jax.devices()[:1] if run.mesh == ALONE else None)
    abstract, new, take = loop.prepare(run, mesh)
    take = under(mesh, take, run.mesh)
    tokens = np.random.default_rng(0).integers(0, V, (B, L + 1), dtype=np.int32)

    def step(state, weights=1.0):
        batch = {"tokens_BL": tokens[:, :-1], "targets_BL": tokens[:, 1:]}
        batch["weights_BL"] = np.full((B, L), weights, np.float32)
        return take(state, jax.device_put(batch, rules.batch_sharding(mesh)), np.float32(1e-2), keys.run_key(0))[0]

    return abstract, new(jax.random.key(0)), step


def on_host(tree):
    return [x for x in jax.tree.leaves(tree) if x.sharding.memory_kind == offload.HOST]


def assert_same_bits(a, b):
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(np.asarray(x), np.asarray(y)), a, b)


@pytest.mark.slow
@pytest.mark.parametrize(
    "optimizer,mesh,tolerance",
    [
        (optimizers.AdamW(), Mesh(fsdp=2, tensor=2), 0),
        (optimizers.AdamW(groups=(optimizers.Group("norm", 0.5),)), ALONE, 0),
        # Sums of another shape round otherwise.
        (optimizers.Muon(), ALONE, 1e-5),
        (optimizers.Adafactor(factored=False, momentum=0.9), ALONE, 1e-5),
        (optimizers.Adafactor(momentum=0.9), ALONE, 1e-5),
        pytest.param(optimizers.AdamW(), Mesh(stage=2, fsdp=2), 0, marks=pytest.mark.slow),
        pytest.param(optimizers.Lamb(), Mesh(fsdp=2), 1e-5, marks=pytest.mark.slow),
        pytest.param(optimizers.Lion(), Mesh(fsdp=2), 0, marks=pytest.mark.slow),
        pytest.param(optimizers.SGD(momentum=0.9), Mesh(fsdp=2), 0, marks=pytest.mark.slow),
    ],
    ids=lambda x: type(x).__name__,
)
def test_the_optimizer_makes_the_same_steps_layer_by_layer(optimizer, mesh, tolerance):
    states = []
    for offloaded in (False, True):
        _, state, step = start(make_run(offloaded, optimizer, mesh))
        for weights in (1.0, np.inf, 1.0):  # The second step is skipped.
            state = step(state, weights)
        states.append(state)
    resident, streamed = states
    assert int(resident.step) == 3 and np.isfinite(np.asarray(streamed.params["embed"]["table"])).all()
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=tolerance, atol=tolerance), *states
    )


def test_moments_are_on_the_host_before_and_after_and_are_donated():
    abstract, state, step = start(make_run(True, mesh=Mesh(fsdp=2, tensor=2)))
    moments = sum(x.nbytes for x in jax.tree.leaves(state.params)) * 2
    after = step(state)
    for found in (abstract, after):
        assert sum(x.size * x.dtype.itemsize for x in on_host(found)) == moments
        assert not on_host((found.params, found.step))
    assert all(x.is_deleted() for x in jax.tree.leaves(state))


@pytest.mark.slow
@pytest.mark.parametrize("offloaded", [False, True])
def test_a_checkpoint_moves_between_host_and_device_bit_for_bit(tmp_path, offloaded):
    _, state, step = start(make_run(offloaded))
    state = step(state)
    Checkpoints(tmp_path).save(1, state, {}, wait=True)
    abstract, _, go_on = start(make_run(not offloaded))
    restored, _, _ = Checkpoints(tmp_path).restore(abstract)
    assert bool(on_host(restored)) == (not offloaded) == (not on_host(state))
    assert_same_bits(restored, state)
    assert_same_bits(go_on(restored), step(state))


def test_what_lies_on_the_host_is_no_part_of_a_runs_identity():
    assert config.digest(make_run(True)) == config.digest(make_run(False))


def test_an_optimizer_without_moments_has_nothing_to_move():
    with pytest.raises(UsageError, match="train.offload_optimizer=True has no effect on an optimizer without moments"):
        start(make_run(True, optimizers.SGD()))


def test_devices_without_memory_on_a_host_are_refused():
    device = types.SimpleNamespace(addressable_memories=lambda: [], device_kind="H100")
    mesh = types.SimpleNamespace(devices=np.array([device]))
    with pytest.raises(UsageError, match="train.offload_optimizer=True: .* of this H100.*: leave it False"):
        offload.check({}, mesh)


def test_one_layer_is_a_piece_and_smaller_tables_go_together():
    spec = MODEL.spec()
    pieces = offload._pieces(offload.tree.flatten(spec), 1)
    assert pieces[0].slices == MODEL.layers and all(path.startswith("group0") for path in pieces[0].paths)
    assert all(piece.slices == 1 for piece in pieces[1:])
    assert sorted(path for piece in pieces for path in piece.paths) == sorted(offload.tree.flatten(spec))
    staged = offload._pieces(offload.tree.flatten(spec), 2)[0]
    assert dataclasses.replace(pieces[0], slices=2, stages=2) == staged
