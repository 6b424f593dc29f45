"""Every preset computes what one device does, and goes on from every other one's checkpoint."""

import dataclasses
import itertools

import jax
import numpy as np
import pytest

from lm.objectives.causal import Causal
from lm.parallel.mesh import PRESETS, Mesh, under
from lm.train import digest, loop
from lm.train.checkpoint import Checkpoints
from lm.train.run import Run, Train
from tests.layers.pipeline_test import MODELS, B, L, compiled, make_batch, on_one_device, placed
from tests.models.contract_test import assert_same

FAMILIES = ("decoder", "encoder", "encdec", "moe")
NAMES = [name for name in PRESETS if name]
PRODUCTS = {
    "fsdp_tp_cp": Mesh(fsdp=2, tensor=2, seq=2),
    "fsdp_tp_ep": Mesh(fsdp=2, tensor=2, expert=2),
    "pp_tp_cp": Mesh(stage=2, tensor=2, seq=2),
}
FAST = {("decoder", "fsdp_tp"), ("encoder", "fsdp_cp")}


@pytest.mark.parametrize(
    "family, preset",
    [
        pytest.param(f, p, marks=() if (f, p) in FAST else pytest.mark.slow)
        for f, p in itertools.product(FAMILIES, (*NAMES, *PRODUCTS))
    ],
)
def test_loss_and_gradients_are_those_of_one_device(family, preset):
    params, reference = on_one_device(family)
    settings = PRODUCTS.get(preset) or Mesh(preset=preset)
    mesh, sharded, batch = placed(MODELS[family], params, settings, make_batch(family == "encdec"))
    assert_same(under(mesh, compiled(MODELS[family]), settings)(sharded, batch, None), reference)


@pytest.mark.slow
def test_a_checkpoint_moves_between_all_pairs_of_presets(tmp_path):
    run = Run(MODELS["moe"], Causal(), train=Train(batch_size=B, seq_len=L, steps=1))
    states = {}
    for preset in NAMES:
        mesh = Mesh(preset=preset).build()
        abstract, new, _ = loop.prepare(dataclasses.replace(run, mesh=Mesh(preset=preset)), mesh)
        states[preset] = abstract, new(jax.random.key(len(states)))
        Checkpoints(tmp_path / preset).save(1, states[preset][1], {}, wait=True)
    for saved, restored in itertools.product(NAMES, NAMES):
        abstract, _ = states[restored]
        state, _, _ = Checkpoints(tmp_path / saved).restore(abstract)
        assert digest.digests(state) == digest.digests(states[saved][1]), (saved, restored)
        assert jax.tree.map(lambda x: x.sharding, state) == jax.tree.map(lambda x: x.sharding, abstract)
    assert len({np.asarray(jax.tree.leaves(state.params)[0]).tobytes() for _, state in states.values()}) == len(NAMES)
