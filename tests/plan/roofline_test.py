"""The formulas beside a compiled program, and what stages cost by them."""

import dataclasses

import jax
import pytest

from experiments import llama_8b, llama_70b
from lm.layers.block import Layer
from lm.models.decoder import Decoder
from lm.objectives.causal import Causal
from lm.parallel.mesh import Mesh
from lm.plan import collectives, hardware, program, search
from lm.plan.roofline import roofline, sent_bytes
from lm.train.run import Run, Train

MODEL = Decoder(layers=8, width=64, heads=4, vocab_size=128, positions="rotary", mlp_bias=False, attention_bias=False)
V5P = hardware.parse("v5p:4x4x4")


def staged(base, batch_size=512, **mesh):
    train = dataclasses.replace(base.train, batch_size=batch_size, accumulate=1)
    return dataclasses.replace(base, mesh=Mesh(**mesh), train=train)


def seconds(run):
    return roofline(run, V5P, run.mesh.sizes(V5P.devices), program.batch_shapes(run)).seconds


@pytest.mark.parametrize(
    "settings",
    [
        Mesh(stage=2, fsdp=2),
        pytest.param(Mesh(stage=2, fsdp=4, micro_batches=4), marks=pytest.mark.slow),
        pytest.param(Mesh(stage=2, fsdp=1, data=4, rounds=2, micro_batches=4), marks=pytest.mark.slow),
        pytest.param(Mesh(stage=4, fsdp=2, rounds=2, micro_batches=4), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_stages_send_what_the_formula_says(settings):
    run = Run(MODEL, Causal(), mesh=settings, train=Train(batch_size=32, seq_len=64, steps=1))
    mesh = settings.build(jax.devices()[:8])
    sent = sent_bytes(run, MODEL.spec(), settings.sizes(8))
    text = program.compile_step(run, mesh).text
    found = [c for c in collectives.read(text or "", mesh) if c.axes == ("stage",)]
    assert sum(c.sent_bytes for c in found) == pytest.approx(sent["stage"], rel=0.05)
    if settings.rounds == 1:
        micro_batches = settings.micro_batches or settings.stage
        (permuted,) = (c for c in found if c.kind == "collective-permute")
        ticks = micro_batches + settings.stage - 1
        tokens = 32 * 64 // (8 // settings.stage) // micro_batches
        assert (permuted.count, permuted.sent_bytes) == (2 * ticks, 2 * ticks * tokens * 64 * 4)
        # On CPUs a scatter is a reduction of all, twice as many bytes.
        gathered = sum(c.sent_bytes for c in collectives.read(text or "", mesh) if c.axes == ("fsdp",)) * 3 / 4
        assert gathered == pytest.approx(sent["fsdp"], rel=0.05)


def test_a_stage_waits_for_the_first_and_last_micro_batches():
    base = llama_70b.run()
    parts = seconds(staged(base, fsdp=16, stage=4))
    layers = sum(seconds(staged(base, fsdp=64))[part] for part in ("products", "attention", "memory"))
    assert parts["bubble"] / layers == pytest.approx(3 / 4, rel=0.05)  # The loss's products are in no stage.
    halved = seconds(staged(base, fsdp=16, stage=4, micro_batches=8))
    assert halved["bubble"] == pytest.approx(parts["bubble"] / 2)
    assert seconds(staged(base, fsdp=16, stage=4, micro_batches=4, rounds=2))["bubble"] == pytest.approx(
        parts["bubble"] / 2
    )
    assert "bubble" not in seconds(staged(base, fsdp=64))


def test_layers_that_stand_alone_are_computed_on_every_stage():
    base = llama_8b.run()
    alone = dataclasses.replace(base, model=dataclasses.replace(base.model, layers=33, prefix=(Layer(),)))
    with_it, without = (seconds(staged(run, stage=4, micro_batches=16))["bubble"] for run in (alone, base))
    assert with_it / without == pytest.approx(1 + 3 / (32 * 3 / 16), rel=0.01)


def test_a_search_tries_stages_beyond_a_host_and_parts_of_long_rows():
    run = llama_8b.run()
    several, one = (hardware.parse(f"h100:{n}") for n in (16, 8))
    found = {(mesh.stage, mesh.micro_batches) for mesh in search._meshes(run, several)}
    assert found == {(1, None)} | {(n, n * each) for n in (2, 4, 8, 16) for each in (1, 2, 4)}
    assert {mesh.stage for mesh in search._meshes(run, one)} == {1}
    odd = dataclasses.replace(run, model=dataclasses.replace(run.model, layers=31))
    assert {mesh.stage for mesh in search._meshes(odd, several)} == {1}
    long = dataclasses.replace(run, train=dataclasses.replace(run.train, seq_len=32_768))
    assert {mesh.seq for mesh in search._meshes(long, several)} == {1, 2, 4}
    assert {mesh.seq for mesh in search._meshes(run, several)} == {1}


def test_every_tick_keeps_its_layers_inputs():
    """Compiled for v5p:4x4x4 with its kernel of attention: 79.6 GB in four stages, 52.8 GB without."""
    base = llama_70b.run()
    sizes = V5P.devices
    for settings, compiled in (({"stage": 4, "fsdp": 16}, 79.6e9), ({"fsdp": 64}, 52.8e9)):
        run = staged(base, 64, **settings)
        assert search.estimate(run, run.mesh.sizes(sizes)) == pytest.approx(compiled, rel=0.1)
