"""How long a step should take: work over peaks, bytes over memory's rate, collectives over links, part by part.

Formulas as in the "How to scale your model" book (jax-ml/scaling-book) and its like; the shares of the peaks that real
programs reach are the chips' own, see lm.parallel.chips.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp

from lm.core import params, tree
from lm.core.params import Param
from lm.layers.pipeline import Schedule
from lm.parallel.chips import Chip
from lm.parallel.rules import BATCH_AXES, RULES, shards
from lm.plan.hardware import Hardware
from lm.train import meters

COMPUTE_BYTES = 2  # Of a bfloat16 activation, and of a kernel when it is gathered.
MEMORY_SHARE = 0.85  # Of the memory's rate that fused element-wise work reaches.
HIDDEN = 0.8  # Share of the products' time under which gathers of parameters and their gradients' scatters hide.
NEVER_HIDDEN = 0.1  # Share of them that shows at the edges of loops in any case.
SPREAD = 0.25  # Of the published runs that the shares were fitted to, nearly all lie within it: see LOG.md.
# How often the residual stream is gathered or scattered over tensor: in a layer by what is kept of it, and around the
# vocabulary, where the sum of a lookup counts twice. As compiled for TPUs.
_STREAMS, _VOCABULARY_STREAMS = {"none": 8, "dots": 11, "attention": 11}, 9
_OPTIMIZER_BYTES = 30  # Read and written a parameter: weights, two moments and gradients in float32, a compute copy.


@dataclasses.dataclass(frozen=True)
class Roofline:
    """Seconds of a step by part; what is counted as work; the rates that follow."""

    seconds: dict[str, float]
    tokens: int
    chips: int
    flops_per_token: float
    flops_full: float  # With every pair of attention, as older tables have it.
    peak: float

    @property
    def step_s(self) -> float:
        return sum(self.seconds.values())

    @property
    def bound(self) -> str:
        """The part that takes the longest."""
        return max(self.seconds, key=lambda part: self.seconds[part])

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.step_s

    @property
    def mfu(self) -> float:
        return self.tokens_per_second * self.flops_per_token / (self.chips * self.peak)

    @property
    def mfu_full(self) -> float:
        return self.mfu * self.flops_full / self.flops_per_token


def roofline(run: Any, hardware: Hardware, sizes: Mapping[str, int], batch: Mapping[str, Any]) -> Roofline:
    """Of the run's step on `hardware` with a mesh of `sizes`; of `batch` only shapes are read."""
    chip = hardware.chip
    assert chip is not None
    spec = run.model.spec()
    rows, tokens = run.train.batch_size, run.train.batch_size * run.train.seq_len
    lengths = {name: x.shape[1] for name, x in batch.items() if len(x.shape) > 1}
    forward = rows * run.model.forward_flops(spec, lengths)
    attention = _attention(run.model, lengths) * rows
    head = 2 * tokens * params.count(run.model.head(spec), "embedding", "head")
    again = getattr(run.model, "remat", "none")
    body = forward - attention - head
    # Forward, and twice that backward; the loss takes its gradients in its one pass.
    products = 3 * head + body * (4 if again in ("full", "attention", "offload") else 3)
    # A fused backward pass takes five products to the forward pass's two, because it makes the scores again.
    pairs = attention * (4.5 if again in ("full", "dots", "offload") else 3.5)
    seconds = {
        "products": products / (hardware.chips * chip.flops * chip.products),
        "attention": pairs / (hardware.chips * chip.flops * chip.attention * _filled(run.model)),
        "memory": _traffic(spec, tokens, again) / (hardware.chips * chip.memory_rate * MEMORY_SHARE),
        "optimizer": _OPTIMIZER_BYTES * held(spec, sizes) / (chip.memory_rate / chip.devices * MEMORY_SHARE),
    }
    if sizes["stage"] > 1:
        layers = sum(seconds[part] for part in ("products", "attention", "memory"))
        layers -= 3 * head / (hardware.chips * chip.flops * chip.products)
        # All of a stage's micro-batches, without work for it in some ticks; what is not in stages, each does whole.
        seconds["bubble"] = layers * (sizes["stage"] * passed(run, sizes) / passed(run, {"stage": 1}) - 1)
    compute = seconds["products"] + seconds["attention"] + seconds.get("bubble", 0.0)
    seconds |= _exposed(communication(run, spec, hardware, sizes), compute)
    causal = meters.flops_per_row(run.model, spec, batch) * rows / tokens
    full = causal + (3 * attention / tokens if "causal" in run.model.offers else 0.0)
    return Roofline(seconds, tokens, hardware.chips, causal, full, chip.flops)


def communication(run: Any, spec: Any, hardware: Hardware, sizes: Mapping[str, int]) -> dict[str, float]:
    """Seconds of each mesh axis's collectives, were nothing hidden; bytes by the formulas of `sent_bytes`."""
    rates, times = links(hardware, sizes), counts(run, sizes)
    assert hardware.chip is not None
    return {
        axis: sent / rates[axis][0] + times[axis] * rates[axis][1] * hardware.chip.hop_s
        for axis, sent in sent_bytes(run, spec, sizes).items()
        if sent
    }


def counts(run: Any, sizes: Mapping[str, int]) -> dict[str, int]:
    """How many collectives of each mesh axis wait for one another in a step: every one pays for its hops."""
    form, micro = schedule(run, sizes), run.train.accumulate
    layers, routed = (round(form.micro_batches * n) for n in (passed(run, sizes), passed(run, sizes, is_routed)))
    return {
        "stage": (2 * form.ticks + 4) * len(_staged(run.model)) * micro,
        "fsdp": 3 * layers * micro,
        "data": 1,
        "tensor": 8 * layers,
        "seq": 3 * layers,
        "expert": 6 * routed,
    }


def schedule(run: Any, sizes: Mapping[str, int]) -> Schedule:
    """That of the run's stages, on a mesh without them of a single tick."""
    stages = sizes["stage"]
    return Schedule(stages, run.mesh.micro_batches or stages, run.mesh.rounds) if stages > 1 else Schedule(1, 1)


def sent_bytes(run: Any, spec: Any, sizes: Mapping[str, int]) -> dict[str, float]:
    """Bytes that leave a device in a step along each mesh axis.

    fsdp: kernels gathered forward and backward in the compute type, gradients scattered in float32, once a
    micro-batch, and with stages in every tick. data: gradients reduced, over experts' and sequence's devices too where
    those hold the same. tensor: two gathers and two scatters of the residual stream a layer, forward and backward, what
    `remat` makes again, and those around the vocabulary. seq: keys and values gathered, their gradients scattered,
    halves of what is made of queries swapped, and the gradient of the embedded tokens gathered in float32. expert: with
    the forward pass's gathers once more where it is made again, tokens gathered to the experts and their sums
    scattered, forward and backward. stage: a micro-batch in every tick, forward and backward; what enters and leaves
    all of them gathered or reduced, six sides of it in all; for rounds their parameters, and their gradients back.
    """
    micro, form, again = run.train.accumulate, schedule(run, sizes), getattr(run.model, "remat", "none")
    compute = jnp.dtype(getattr(run.model, "dtype", "bfloat16")).itemsize
    tokens = run.train.batch_size * run.train.seq_len / math.prod(sizes[a] for a in (*BATCH_AXES, "seq"))
    ring = {axis: (n - 1) / n for axis, n in sizes.items()}
    stream = compute * tokens * getattr(run.model, "width", 0)
    layers, kernels = passed(run, sizes), leaves(spec)
    gathered = sum(
        math.prod(p.shape) / shards(p, dict(sizes), but="fsdp") * (form.ticks / form.rounds if _is_staged(p) else 1)
        for p in kernels
        if lies_on(p, "fsdp")
    )
    permuted = 2 * form.ticks / form.micro_batches + 6 * ring["stage"] if sizes["stage"] > 1 else 0
    return {
        "stage": stream * permuted * len(_staged(run.model)) + micro * (compute + 4) * _dealt(kernels, form, sizes),
        "fsdp": micro * ring["fsdp"] * gathered * (2 * compute + 4),
        # Tied, the table's gradients as the head and as the embedding come at different times.
        "data": 2 * 4 * sum(_reduced(p, sizes) for p in (*kernels, *_tied(run.model, spec))),
        "tensor": ring["tensor"] * stream * (_STREAMS.get(again, 12) * layers + _VOCABULARY_STREAMS),
        "seq": tokens
        * (
            compute * layers * _context_features(run.model, sizes["seq"], again)
            + 4 * (sizes["seq"] - 1) * getattr(run.model, "width", 0)
        ),
        "expert": (6 if again == "none" else 7) * (sizes["expert"] - 1) * stream * passed(run, sizes, is_routed),
    }


def passed(run: Any, sizes: Mapping[str, int], counted: Callable[[Any], bool] = lambda layer: True) -> float:
    """Layers that a device takes all of its tokens through in a step, a stage's own also in the ticks without work."""
    form = schedule(run, sizes)
    share = form.ticks / (form.micro_batches * form.rounds * form.stages)
    if not hasattr(run.model, "stacks"):
        return getattr(run.model, "layers", 0)
    return sum(
        sum(map(counted, group.pattern)) * group.repeats * (share if group.staged else 1)
        for stack in run.model.stacks
        for group in stack.groups
    )


def _dealt(kernels: list[Param], form: Schedule, sizes: Mapping[str, int]) -> float:
    """Parameters that leave a device where several rounds need others than it holds, see lm.layers.pipeline: the
    partitioner makes them whole over "fsdp" for the exchange inside groups of stages, not for the permutation."""
    if form.rounds == 1:
        return 0.0
    met = min(form.stages, form.rounds)
    own, whole = (
        sum(math.prod(p.shape) / shards(p, dict(sizes), but=axis) for p in kernels if _is_staged(p))
        for axis in ("", "fsdp")
    )
    return whole * (met - 1) / met + own * (met < form.stages)


def _staged(model: Any) -> list[Any]:
    """The groups of layers that stages divide."""
    return [group for stack in getattr(model, "stacks", ()) for group in stack.groups if group.staged]


def _is_staged(p: Param) -> bool:
    return p.axes[0] == "layers" and p.shape[0] > 1


def is_routed(layer: Any) -> bool:
    return layer.experts is not None


def _exposed(times: Mapping[str, float], compute: float) -> dict[str, float]:
    """What of the collectives shows: those of parameters hide behind the products, those of activations do not."""
    shown = {f"{axis} collectives": t for axis, t in times.items() if axis not in ("fsdp", "data")}
    room = HIDDEN * compute
    for axis in ("fsdp", "data"):
        if axis in times:
            hidden = min(times[axis] * (1 - NEVER_HIDDEN), room)
            room -= hidden
            shown[f"{axis} collectives"] = times[axis] - hidden
    return shown


def links(hardware: Hardware, sizes: Mapping[str, int]) -> dict[str, tuple[float, float]]:
    """{mesh axis: (bytes a second that a device sends along it, hops around it)}.

    In a torus an axis has as many of its links as it has devices.
    """
    chip = hardware.chip
    assert chip is not None
    if not chip.torus_axes:
        return {axis: _switched(chip, sizes, axis, hardware) for axis in sizes}
    within = {a: n // hardware.slices if a == "data" else n for a, n in sizes.items()}
    total = math.log(max(2, math.prod(within.values())))
    rates = {}
    for axis, n in within.items():
        spanned = min(chip.torus_axes, max(1.0, chip.torus_axes * math.log(max(2, n)) / total))
        rates[axis] = chip.axis_rate / chip.devices * spanned, spanned * n ** (1 / spanned) / 2  # Both ways around.
    if hardware.slices > 1:
        rates["data"] = chip.network_rate / chip.devices, hardware.slices
    return rates


def _switched(chip: Chip, sizes: Mapping[str, int], axis: str, hardware: Hardware) -> tuple[float, float]:
    """GPUs of a host meet through its switch; beyond, an axis has the network of as many GPUs as it fills a host with.

    The mesh is laid out in the order of its axes, the last one innermost.
    """
    names = list(sizes)
    inner = math.prod(sizes[a] for a in names[names.index(axis) + 1 :])
    if inner * sizes[axis] <= min(chip.together, hardware.chips):
        return chip.axis_rate, 1.0
    here = max(1, chip.together // inner)
    return chip.network_rate * here, sizes[axis] / here


def _traffic(spec: Any, tokens: int, again: str) -> float:
    """Bytes of activations that products read and write: their inputs and outputs, three times, four with a second
    forward pass."""
    features = sum(p.passes * _copies(p) * (p.fan_in + _outputs(p)) for p in leaves(spec) if p.role == "matrix")
    return (4 if again in ("full", "offload") else 3) * COMPUTE_BYTES * tokens * features


def _copies(p: Param) -> int:
    return math.prod(n for n, a in zip(p.shape, p.axes, strict=True) if a in ("layers", "experts"))


def _outputs(p: Param) -> int:
    return math.prod(p.shape) // (_copies(p) * p.fan_in)


def _attention(model: Any, lengths: Mapping[str, int]) -> float:
    """Forward work of a row's attention; models of two stacks count it among the products."""
    if not hasattr(model, "attention_flops") or "tokens_BL" not in lengths:
        return 0.0
    return lengths["tokens_BL"] * model.attention_flops(lengths["tokens_BL"])


def _filled(model: Any) -> float:
    """The share of a matrix unit's 128 columns that the heads of attention fill."""
    return min(1.0, model.stack.block.head_dim / 128) if hasattr(model, "stack") else 1.0


def held(spec: Any, sizes: Mapping[str, int]) -> float:
    """Parameters on each device."""
    return sum(math.prod(p.shape) / shards(p, dict(sizes)) for p in leaves(spec))


def leaves(spec: Any) -> list[Param]:
    return list(tree.flatten(spec).values())


def _reduced(p: Param, sizes: Mapping[str, int]) -> float:
    """Numbers of a gradient that leave a device, each way, on the way around those that hold the same shard of it."""
    same = math.prod(sizes[a] for a in ("data", "expert", "seq") if not lies_on(p, a))
    return math.prod(p.shape) / shards(p, dict(sizes)) * (same - 1) / same


def lies_on(p: Param, mesh_axis: str) -> bool:
    return any(mesh_axis in RULES[axis] for axis in p.axes)


def _tied(model: Any, spec: Any) -> list[Param]:
    """Tables that are the embedding and the loss's head both."""
    return [p for p in leaves(model.head(spec)) if p.role == "embedding"]


def _context_features(model: Any, parts: int, again: str) -> float:
    """Numbers a token that a layer sends along the axis of the sequence in so many parts.

    Keys and values go once, a second time unless they are kept, and their gradients come back; causal queries, outputs
    and the gradients of both are halved and swapped, see lm.layers.attention_shards.
    """
    if not hasattr(model, "stack") or parts == 1:
        return 0.0
    block = model.stack.block
    keys, queries = 2 * block.kv_heads * block.head_dim, block.heads * block.head_dim
    swaps = {"none": 4, "attention": 5}.get(again, 6) if block.causal else 0
    return (parts - 1) * keys * (2 if again == "none" else 3) + queries / 2 * swaps
