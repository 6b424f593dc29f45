"""A step of cached decoding: what it holds and sends, and what it should take."""

import dataclasses

import jax
import pytest

from experiments import llama_8b, llama_70b
from lm.core.errors import UsageError
from lm.layers.buckets import Buckets
from lm.layers.moe import Experts
from lm.models.decoder import Decoder
from lm.models.encdec import EncDec
from lm.models.encoder import Encoder
from lm.objectives.causal import Causal
from lm.parallel.mesh import Mesh
from lm.plan import decode, hardware
from lm.train.run import Run, Train

TINY = {"layers": 4, "width": 64, "heads": 8, "vocab_size": 256}
DECODER = Decoder(**TINY, kv_heads=4, positions="rotary", mlp_bias=False, attention_bias=False)
LAYER = DECODER.pattern[0]
CPU = hardware.parse("cpu:8")


def make(model, mesh, rows=16, context=32):
    run = Run(model, Causal(), mesh=mesh, train=Train(batch_size=8, seq_len=16, steps=1))
    return decode.make(run, CPU, jax.devices()[:8], rows, context).plan


@pytest.mark.parametrize("mesh", [Mesh(tensor=4), Mesh(fsdp=4)], ids=str)
def test_weights_and_a_donated_cache_are_held_and_sums_sent(mesh):
    plan = make(DECODER, mesh)
    kernels = 4 * (64 * 64 * 2 + 64 * 32 * 2 + 2 * 64 * 256) + 64 * 256
    assert plan.program.memory["weights"] == pytest.approx(4 * kernels / 4, rel=0.03)  # Norms are whole.
    # Keys and values of 4 layers, 4 heads of 8 and 32 places, for each row; over rows by 8, or by 2 and heads by 4.
    assert plan.program.memory["cache"] == pytest.approx(2 * 4 * 4 * 8 * 32 * 16 * 4 / 8, rel=0.01)
    assert plan.program.donated and plan.line is None
    (axis,) = plan.sent
    sent = sum(c.sent_bytes for c in plan.found if c.axes == (axis,))
    assert sent == pytest.approx(plan.sent[axis], rel=0.25)  # Embedding and choosing an id meet too.


@pytest.mark.parametrize(
    "model, mesh",
    [
        (EncDec(**TINY, positions="none", norm_place="pre", buckets=Buckets(8, 6)), Mesh(tensor=2)),
        (DECODER, Mesh(stage=2, tensor=2)),
        (
            dataclasses.replace(DECODER, pattern=(dataclasses.replace(LAYER, experts=Experts(4, 2)),)),
            Mesh(expert=4),
        ),
    ],
    ids=["encdec", "stages", "experts"],
)
def test_every_model_with_a_cache_is_planned(model, mesh):
    plan = make(model, mesh)
    assert plan.program.donated and plan.program.memory["cache"] > 0


@pytest.mark.parametrize(
    "model, mesh, rows, words",
    [
        (Encoder(**TINY, max_len=16), Mesh(), 8, "which Encoder does not have"),
        (DECODER, Mesh(fsdp=4), 12, "do not divide over data=2 x fsdp=4: take a multiple of 8"),
        (DECODER, Mesh(seq=2), 8, "mesh.seq=2"),
        (dataclasses.replace(DECODER, positions="learned", max_len=16), Mesh(), 8, "longer than max_len=16"),
    ],
    ids=["encoder", "rows", "seq", "context"],
)
def test_what_cannot_be_decoded_is_refused(model, mesh, rows, words):
    with pytest.raises(UsageError, match=words):
        make(model, mesh, rows)


@pytest.mark.parametrize("given", ["0", "8:", "8:0", "x", "8:8:8", "-1"])
def test_rows_and_context_are_two_numbers(given):
    with pytest.raises(UsageError, match="ROWS:CONTEXT"):
        decode.parse(given, llama_8b.run())
    assert decode.parse("8", llama_8b.run()) == (8, 8192) and decode.parse("8:64", llama_8b.run()) == (8, 64)


def test_a_token_takes_as_long_as_reading_weights_and_cache():
    """70B in bfloat16 over 8 H100: 141 GB at 85 % of 8 x 3.35 TB/s; each row's 8,192 tokens are 2.7 GB more."""
    model, h100 = llama_70b.run().model, hardware.parse("h100:8")
    model = dataclasses.replace(model, vocab_size=128_256)
    sizes = Mesh(tensor=8).sizes(8)

    def seconds(rows, context):
        spec = decode.held_spec(model)
        sent = decode.sent_bytes(model, spec, sizes, rows)
        return decode.line(model, h100, sizes, rows, spec, model.cache_spec(rows, context), sent).seconds

    read = seconds(8, 8192)
    assert read["weights"] == pytest.approx((141.1e9 - 2.1e9) / (0.85 * 8 * 3.35e12), rel=0.01)
    assert read["cache"] == pytest.approx(8 * 2 * 2 * 80 * 8 * 128 * 8192 / (0.85 * 8 * 3.35e12), rel=0.01)
    assert read["products"] == 0 and seconds(2048, 1)["products"] > 0
