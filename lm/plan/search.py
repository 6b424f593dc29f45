"""Meshes, rematerialisation and micro-batches for a run on given hardware, ranked by the time of a step."""

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping
from typing import Any

from lm.core.errors import UsageError
from lm.parallel import rules
from lm.parallel.mesh import Mesh
from lm.plan.hardware import Hardware
from lm.plan.roofline import COMPUTE_BYTES, Roofline, held, roofline

REMATS = ("none", "dots", "attention", "full")  # From fast to lean.
FREE = 0.92  # Of a device's memory: the rest goes to the runtime and to what an estimate leaves out.
_STATE_BYTES = 16  # A parameter's weight, gradient and two moments in float32.
_LOGITS_BYTES = 2**30  # Of a chunk of the loss: logits, their exponents and gradients, see lm.objectives.cross_entropy.


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A run that fits by estimate, with that estimate in bytes a device, and its step."""

    run: Any
    memory_bytes: float
    line: Roofline


def candidates(run: Any, hardware: Hardware, batch: Mapping[str, Any]) -> list[Candidate]:
    """Those that fit, the fastest first. The global batch stays, and so does what the run computes."""
    assert hardware.chip is not None
    room = FREE * hardware.chip.memory_bytes / hardware.chip.devices
    found = []
    for changed, sizes in _variants(run, hardware):
        try:
            memory = estimate(changed, sizes)
            line = roofline(changed, hardware, sizes, batch)
        except UsageError:  # Heads, experts or features that this mesh does not divide.
            continue
        if memory <= room:
            found.append(Candidate(changed, memory, line))
    return sorted(found, key=lambda c: c.line.step_s)


def estimate(run: Any, sizes: Mapping[str, int]) -> float:
    """Bytes a device, by formula: state over the axes that shard it, and what the policy keeps of each layer."""
    spec = run.model.spec()
    state = _STATE_BYTES * held(spec, sizes)
    devices = math.prod(sizes[a] for a in (*rules.BATCH_AXES, "seq"))
    tokens = run.train.batch_size * run.train.seq_len / devices / run.train.accumulate
    return state + COMPUTE_BYTES * tokens * _kept_features(run.model, sizes["tensor"]) + _LOGITS_BYTES


def _kept_features(model: Any, tensor: int) -> float:
    """Numbers a token that the forward pass leaves for the backward pass, and those of the layer at work."""
    if not hasattr(model, "stack"):
        return 0.0
    block, layers = model.stack.block, model.layers
    heads, keys = block.heads * block.head_dim / tensor, 2 * block.kv_heads * block.head_dim / tensor
    mlp = (3 if block.gated else 2) * block.mlp_width / tensor
    whole = 6 * block.width + 2 * heads + keys + mlp
    kept = {"none": whole, "dots": 3 * block.width + 2 * heads + keys + mlp, "attention": block.width + heads}
    return layers * kept.get(model.remat, block.width) + 2 * whole


def _variants(run: Any, hardware: Hardware) -> Iterator[tuple[Any, dict[str, int]]]:
    remats = REMATS if hasattr(run.model, "remat") else (None,)
    rows = run.train.batch_size
    for mesh in _meshes(run, hardware):
        sizes = mesh.sizes(hardware.devices)
        shards = math.prod(sizes[a] for a in rules.BATCH_AXES)
        if rows % shards:
            continue
        for micro, remat in itertools.product(_divisors(rows // shards), remats):
            model = run.model if remat is None else dataclasses.replace(run.model, remat=remat)
            train = dataclasses.replace(run.train, accumulate=micro)
            yield dataclasses.replace(run, model=model, train=train, mesh=mesh), sizes


def _meshes(run: Any, hardware: Hardware) -> Iterator[Mesh]:
    """Powers of two along fsdp, tensor and, where there are experts, expert; data takes the rest."""
    within = hardware.devices // hardware.slices
    experts = _experts(run.model)
    powers = [2**i for i in range(within.bit_length()) if within % 2**i == 0]
    for tensor, expert in itertools.product((n for n in powers if n <= 16), (n for n in powers if experts % n == 0)):
        for fsdp in powers:
            if within % (tensor * expert * fsdp) == 0:
                yield Mesh(fsdp=fsdp, tensor=tensor, expert=expert, slices=hardware.slices)


def _experts(model: Any) -> int:
    layers = model.stack.layers if hasattr(model, "stack") else ()
    return math.gcd(*(layer.experts.count for layer in layers if layer.experts is not None)) or 1


def _divisors(n: int) -> list[int]:
    return [2**i for i in range(n.bit_length()) if n % 2**i == 0]
