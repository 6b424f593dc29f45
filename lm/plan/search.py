"""Meshes, rematerialisation and micro-batches for a run on given hardware, ranked by the time of a step."""

import collections
import contextlib
import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping
from typing import Any

import jax

from lm.core import tree
from lm.core.errors import UsageError
from lm.layers.attention_splash import LANES
from lm.parallel import chips, rules
from lm.parallel.mesh import Mesh
from lm.plan import program
from lm.plan.hardware import Hardware
from lm.plan.roofline import COMPUTE_BYTES, Roofline, held, passed, roofline, schedule

REMATS = ("none", "dots", "attention", "full")  # From fast to lean.
FREE = 0.92  # Of a device's memory: the rest goes to the runtime and to what an estimate leaves out.
LONG = 32_768  # Rows from this many tokens on are divided over seq too, into parts of at least a quarter of it.
_STATE_BYTES = 18  # A parameter's weight, gradient and two moments in float32, and a copy in the compute type.
_HEAD_BYTES = 12  # Of a parameter of the loss's head, whole over fsdp: a copy, its gradient's sum and a chunk's share.
_LAYER_BYTES = 6  # Of a parameter of the repeat at work, whole over fsdp: its copy in the compute type, its gradient.
# What a scan over the ticks of stages keeps and makes, each as large as the residual stream of all its micro-batches:
# their inputs, what leaves, the gradients of both, and copies of them (compiled programs for v5p had 8 to 13).
_TICK_ARRAYS = 10
_LOGITS_BYTES = 2**30  # Of a chunk of the loss: logits, their exponents and gradients, see lm.objectives.cross_entropy.


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A run that fits by estimate, with that estimate in bytes a device, and its step."""

    run: Any
    memory_bytes: float
    line: Roofline


def on_devices(run: Any, devices: list[jax.Device], slices: int = 1) -> Any:
    """The run, whose vocabulary is known, with the mesh that is the fastest of those that fit by estimate.

    On devices whose speed is not known, such as a CPU's, rows are divided and nothing else. Raises UsageError where
    nothing fits.
    """
    chip = chips.of_device(devices[0])
    if chip is None:
        return dataclasses.replace(run, mesh=Mesh(slices=slices))
    kind = next(name for name, found in chips.CHIPS.items() if found is chip)
    hardware = Hardware(kind, kind, (len(devices) // chip.devices // slices,), slices)
    found = candidates(run, hardware, program.batch_shapes(run), meshes_alone=True)
    if not found:
        raise UsageError(f"mesh.preset=auto: no mesh of {len(devices)} x {chip.kind} fits: see lm plan --search")
    return found[0].run


def candidates(run: Any, hardware: Hardware, batch: Mapping[str, Any], meshes_alone: bool = False) -> list[Candidate]:
    """Those that fit, the fastest first. The global batch stays, and so does what the run computes; `meshes_alone`
    leaves rematerialisation and micro-batches as they are."""
    assert hardware.chip is not None
    room = FREE * hardware.chip.memory_bytes / hardware.chip.devices
    found = [
        Candidate(changed, memory, roofline(changed, hardware, sizes, batch))
        for memory, changed, sizes in _estimated(run, hardware, meshes_alone)
        if memory <= room
    ]
    return sorted(found, key=lambda c: c.line.step_s)


def leanest(run: Any, hardware: Hardware, meshes_alone: bool) -> Any:
    """The run as it takes the least memory by estimate, where nothing fits; as it is where nothing divides."""
    return min(_estimated(run, hardware, meshes_alone), key=lambda found: found[0], default=(0, run))[1]


def _estimated(run: Any, hardware: Hardware, meshes_alone: bool) -> Iterator[tuple[float, Any, dict[str, int]]]:
    for changed, sizes in _variants(run, hardware, meshes_alone):
        with contextlib.suppress(UsageError):  # Heads, experts or features that this mesh does not divide.
            yield estimate(changed, sizes), changed, sizes


def estimate(run: Any, sizes: Mapping[str, int]) -> float:
    """Bytes a device, by formula: state over the axes that shard it, and what the policy keeps of each layer, with
    stages once a tick."""
    spec, form = run.model.spec(), schedule(run, sizes)
    state = _STATE_BYTES * held(spec, sizes) + _HEAD_BYTES * held(run.model.head(spec), dict(sizes) | {"fsdp": 1})
    devices = math.prod(sizes[a] for a in (*rules.BATCH_AXES, "seq"))
    tokens = run.train.batch_size * run.train.seq_len / devices / run.train.accumulate
    kept, at_work = _features(run.model, sizes["tensor"])
    features = kept * passed(run, sizes) + at_work / form.micro_batches
    state += _LAYER_BYTES * _largest_repeat(spec, sizes)
    if sizes["stage"] > 1:
        state += 4 * held(spec, sizes)  # The gradients of one tick, beside their sum.
        features += _TICK_ARRAYS * run.model.stacks[0].block.width * form.ticks / form.micro_batches
    return state + COMPUTE_BYTES * tokens * features + _LOGITS_BYTES


def _largest_repeat(spec: Any, sizes: Mapping[str, int]) -> float:
    """Parameters a device of one repeat of the largest group of layers, gathered over fsdp."""
    gathered, groups = dict(sizes) | {"fsdp": 1, "stage": 1}, collections.defaultdict[str, float](float)
    for path, p in tree.flatten(spec).items():
        if p.axes[:1] == ("layers",):
            groups[path.partition("/layer")[0]] += math.prod(p.shape[1:]) / rules.shards(p, gathered)
    return max(groups.values(), default=0)


def _features(model: Any, tensor: int) -> tuple[float, float]:
    """Numbers a token that a layer's forward pass leaves for its backward pass, and those of the layer at work."""
    if not hasattr(model, "stack"):
        return 0.0, 0.0
    block = model.stack.block
    stream = block.width / tensor  # Between products a part of the sequence; what enters them is whole.
    heads, keys = block.heads * block.head_dim / tensor, 2 * block.kv_heads * block.head_dim / tensor
    mlp = (3 if block.gated else 2) * block.mlp_width / tensor
    whole = 4 * stream + 2 * block.width + 2 * heads + keys + mlp
    kept = {"none": whole, "dots": 3 * stream + 2 * heads + keys + mlp, "attention": stream + heads}
    return kept.get(model.remat, stream), 2 * whole


def _variants(run: Any, hardware: Hardware, meshes_alone: bool) -> Iterator[tuple[Any, dict[str, int]]]:
    remats = REMATS if hasattr(run.model, "remat") and not meshes_alone else (None,)
    rows = run.train.batch_size
    for mesh in _meshes(run, hardware):
        sizes = mesh.sizes(hardware.devices)
        parts = math.prod(sizes[a] for a in rules.BATCH_AXES) * (mesh.micro_batches or 1)
        if rows % (parts * (run.train.accumulate if meshes_alone else 1)):
            continue
        micros = [run.train.accumulate] if meshes_alone else _divisors(rows // parts)
        for micro, remat in itertools.product(micros, remats):
            model = run.model if remat is None else dataclasses.replace(run.model, remat=remat)
            train = dataclasses.replace(run.train, accumulate=micro)
            yield dataclasses.replace(run, model=model, train=train, mesh=mesh), sizes


def _meshes(run: Any, hardware: Hardware) -> Iterator[Mesh]:
    """Powers of two along fsdp, tensor and, where there are experts, expert; of more than a host, stage too, and with
    long rows seq; data takes the rest."""
    within = hardware.devices // hardware.slices
    powers = [2**i for i in range(within.bit_length()) if within % 2**i == 0]
    experts, longest = _experts(run.model), 4 * run.train.seq_len // LONG if run.train.seq_len >= LONG else 1
    several = hardware.chip is not None and hardware.chips > hardware.chip.together
    stages = [(1, None)] + [
        (n, n * each) for n in powers[1:] for each in (1, 2, 4) if several and _divides(run.model, n)
    ]
    for tensor, expert, seq in itertools.product(
        (n for n in powers if n <= 16), (n for n in powers if experts % n == 0), (n for n in powers if n <= longest)
    ):
        for fsdp, (stage, micro_batches) in itertools.product(powers, stages):
            if within % (tensor * expert * seq * fsdp * stage) == 0 and not padded(run.model, hardware, fsdp):
                sizes = {"fsdp": fsdp, "tensor": tensor, "expert": expert, "seq": seq, "stage": stage}
                yield Mesh(**sizes, micro_batches=micro_batches, slices=hardware.slices)


def padded(model: Any, hardware: Hardware, fsdp: int) -> bool:
    """Whether a device's share of a kernel's features fills no whole row of lanes.

    TPUs pad it there, and their compiler then gathers and scatters by whole reductions: twice the bytes, at twice the
    memory (llama_8b on v5e:16x16, 7.9 GB a device over fsdp=32, more than 17 over 128).
    """
    return bool(hardware.chip and hardware.chip.torus_axes) and fsdp > 1 and model.width % (LANES * fsdp) != 0


def _divides(model: Any, stages: int) -> bool:
    """Whether the model's layers can be in so many stages."""
    stacks = getattr(model, "stacks", ())
    try:
        for stack in stacks:
            stack.check_stages(stages, 1)
    except UsageError:
        return False
    return bool(stacks)


def _experts(model: Any) -> int:
    layers = model.stack.layers if hasattr(model, "stack") else ()
    return math.gcd(*(layer.experts.count for layer in layers if layer.experts is not None)) or 1


def _divisors(n: int) -> list[int]:
    return [2**i for i in range(n.bit_length()) if n % 2**i == 0]
