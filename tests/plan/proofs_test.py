"""What compiled steps hold: no scores, no logits, no second state, and memory linear in layers, rows and length."""

import dataclasses
import functools
import importlib.util
import math
import re
import statistics

import jax
import numpy as np
import pytest

from lm.models.decoder import Decoder
from lm.objectives.causal import Causal
from lm.parallel.mesh import Mesh
from lm.plan import collectives, hardware, program
from lm.train import loop
from lm.train.run import Run, Train

pytestmark = pytest.mark.slow

LENGTH, VOCAB = 8192, 32_768  # Nothing runs, so that sizes cost nothing.
MODEL = Decoder(
    layers=8, width=256, heads=2, vocab_size=VOCAB, positions="rotary", gated=True, activation="silu", mlp_bias=False,
    attention_bias=False, remat="full", dtype="bfloat16",
)  # fmt: skip
TPU = pytest.param(
    "v5e:2x4",
    marks=pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason="libtpu comes with the extra [plan]"),
)
CHIPS = ["cpu:8", TPU]


def make_run(layers=8, rows=8, length=LENGTH, vocab=VOCAB):
    model = dataclasses.replace(MODEL, layers=layers, vocab_size=vocab)
    return Run(model, Causal(), mesh=Mesh(fsdp=8), train=Train(batch_size=rows, seq_len=length, steps=1))


@functools.cache
def compiled(name, **sizes):
    found = hardware.parse(name)
    devices = jax.devices()[:8] if found.chip is None else hardware.describe(found)
    run = make_run(**sizes)
    # The kernel of attention takes no other.
    with jax.default_matmul_precision("default"):
        return program.compile_step(run, run.mesh.build(devices))


def shapes(text):
    return {tuple(int(n) for n in dims.split(",") if n) for _, dims in collectives._SHAPE.findall(text)}


@pytest.mark.parametrize("name", CHIPS)
def test_no_buffer_has_all_pairs_of_tokens_or_all_logits(name):
    found = shapes(compiled(name).text)
    assert not [s for s in found if sum(n >= LENGTH for n in s) > 1]
    most = max(found, key=math.prod)
    assert math.prod(most) < LENGTH * VOCAB, most  # Of the one row that a device has.


@pytest.mark.parametrize("name", CHIPS)
def test_every_array_of_the_state_is_donated(name):
    run = make_run()
    state = loop.prepare(run, run.mesh.build(jax.devices()[:8]))[0]
    aliased = re.search(r"input_output_alias=\{(.*?)\}, \w+=", compiled(name).text.splitlines()[0])
    # Scalars may be kept apart.
    assert len(re.findall("(?:may|must)-alias", aliased[1])) >= sum(x.ndim > 0 for x in jax.tree.leaves(state))
    assert compiled(name).donated


@pytest.mark.parametrize("name", CHIPS)
def test_ten_times_the_layers_are_the_same_program(name):
    few, many = (len(re.findall(r"^ +\S+ = ", compiled(name, layers=n).text, re.M)) for n in (8, 80))
    assert abs(many / few - 1) < 0.02


def assert_linear(name, what, values):
    parts = ("gradients", "activations and temporaries")
    # With few words the loss, whose chunks are as large for any number of tokens, decides nothing; with many rows what
    # is kept has no room in a TPU's vector memory.
    sizes = {"layers": 8, "rows": 128, "length": 1024, "vocab": 512}
    used = [sum(compiled(name, **sizes | {what: n}).memory[p] for p in parts) for n in values]
    first, second = np.diff(used) / np.diff(values)
    # Of a square the second would be larger by two thirds at least; the compiler's choices move some per cent, and more
    # where rows fill no tiles.
    assert abs(second - first) <= 0.15 * first, used


@pytest.mark.parametrize("name", CHIPS)
@pytest.mark.parametrize("what, values", [("layers", (8, 16, 24)), ("rows", (128, 256, 512))])
def test_memory_is_linear_in_layers_and_rows(name, what, values):
    assert_linear(name, what, values)


@pytest.mark.parametrize("name", [TPU])
def test_memory_is_linear_in_length(name):
    """Not on CPUs, where the scores of all blocks of queries are there together in the backward pass."""
    assert_linear(name, "length", (1024, 2048, 3072))


@pytest.mark.parametrize("name", CHIPS[:1])
def test_ten_times_the_layers_compile_as_fast(name):
    took: dict[int, list[float]] = {8: [], 80: []}
    for _ in range(3):
        for layers, seconds in took.items():
            jax.clear_caches()
            loop._programs.cache_clear()
            seconds.append(compiled.__wrapped__(name, layers=layers).compile_s)
    assert statistics.median(took[80]) <= 1.2 * statistics.median(took[8]), took
