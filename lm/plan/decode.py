"""One step of cached decoding, a token a row, compiled for devices that need not exist, and its time by formula."""

import contextlib
import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from lm.core import params as specs
from lm.core.errors import UsageError
from lm.core.params import Param
from lm.parallel import options, rules
from lm.parallel.mesh import Mesh, under
from lm.plan import collectives, program, report
from lm.plan.hardware import Hardware
from lm.plan.roofline import MEMORY_SHARE, Roofline, is_routed, leaves, lies_on, links
from lm.plan.search import FREE

_COMPUTED = ("embedding", "matrix", "head")  # Roles of the parameters that are held in the compute type.


@dataclasses.dataclass(frozen=True)
class Decoding:
    """A step for `rows` sequences of up to `context` tokens; the plan's memory is of weights, cache and temporaries."""

    rows: int
    context: int
    plan: report.Plan


def parse(given: str, run: Any) -> tuple[int, int]:
    """(rows, context) of ROWS[:CONTEXT], the run's own length unless given."""
    rows, colon, context = given.partition(":")
    if not all(part.isdigit() and int(part) for part in (rows, *([context] if colon else []))):
        raise UsageError(f"--decode={given}: give ROWS or ROWS:CONTEXT, such as 64:8192")
    return int(rows), int(context) if colon else run.train.seq_len


def make(run: Any, hardware: Hardware, devices: list[jax.Device], rows: int, context: int) -> Decoding:
    """Compiles the step. Raises UsageError for a model without a cache, and for rows that the mesh does not divide."""
    model = run.model
    if not hasattr(model, "cache_spec"):
        raise UsageError(f"--decode continues text with a cache, which {type(model).__name__} does not have")
    if run.mesh.preset == "auto":
        run = dataclasses.replace(run, mesh=_fastest(run, hardware, rows, context))
    sizes = run.mesh.sizes(len(devices))
    if sizes["seq"] > 1:
        raise UsageError(f"--decode has one token a row, for mesh.seq={sizes['seq']} none to divide: leave it out")
    parts = math.prod(sizes[a] for a in rules.BATCH_AXES)
    if rows % parts:
        axes = " x ".join(f"{a}={sizes[a]}" for a in rules.BATCH_AXES if sizes[a] > 1)
        raise UsageError(f"--decode={rows}: the rows do not divide over {axes}: take a multiple of {parts}")
    spec = held_spec(model)
    cache = _cache(model, rows, context)
    mesh = run.mesh.build(devices)
    compiled = _compile(run, mesh, spec, cache, rows)
    sent = {axis: n for axis, n in sent_bytes(model, spec, sizes, rows).items() if n}
    plan = report.Plan(
        run=run,
        hardware=hardware,
        sizes=sizes,
        program=compiled,
        line=None if hardware.chip is None else line(model, hardware, sizes, rows, spec, cache, sent),
        sent=sent,
        found=None if compiled.text is None else collectives.read(compiled.text, mesh),
        tokens=rows,
        ranked=[],
        notes=[],
    )
    return Decoding(rows, context, plan)


def _cache(model: Any, rows: int, context: int) -> Any:
    # An encoder has read as many tokens as its decoder may write.
    return model.cache_spec(rows, context, *([context] if hasattr(model, "encode") else []))


def _fastest(run: Any, hardware: Hardware, rows: int, context: int) -> Mesh:
    """Of those that divide heads and features over more and more devices, and rows over the rest, that which is the
    fastest by formula with weights and cache in memory; where they never are, that which holds the least."""
    spec, cache, chip = held_spec(run.model), _cache(run.model, rows, context), hardware.chip
    if chip is None:
        return Mesh(slices=hardware.slices)
    found = []
    for i in range((hardware.devices // hardware.slices).bit_length()):
        mesh = Mesh(tensor=2**i, slices=hardware.slices)
        with contextlib.suppress(UsageError):
            sizes = mesh.sizes(hardware.devices)
            held = sum(_bytes(p, sizes) for p in (*leaves(spec), *leaves(cache)))
            room = FREE * chip.memory_bytes / chip.devices
            sent = {axis: n for axis, n in sent_bytes(run.model, spec, sizes, rows).items() if n}
            seconds = line(run.model, hardware, sizes, rows, spec, cache, sent).step_s
            found.append((max(held, room), seconds, mesh))
    return min(found, key=lambda f: f[:2])[2] if found else Mesh(slices=hardware.slices)


def held_spec(model: Any) -> Any:
    """The parameters as they are held to generate: kernels and tables in the compute type."""
    return specs.map_spec(
        lambda p: dataclasses.replace(p, dtype=model.dtype) if p.role in _COMPUTED else p, model.spec()
    )


def line(
    model: Any,
    hardware: Hardware,
    sizes: Mapping[str, int],
    rows: int,
    spec: Any,
    cache: Any,
    sent: Mapping[str, float],
) -> Roofline:
    """The step's time. Products hide behind the reading of their weights; those of attention, a few operations for each
    number of the cache, always do, and are not counted."""
    chip = hardware.chip
    assert chip is not None
    # Stages take turns, and in each all of them read what they have.
    turns, rate = sizes["stage"], chip.memory_rate / chip.devices * MEMORY_SHARE
    multiplied = _multiplied(model, spec)
    met = rows / math.prod(sizes[a] for a in ("data", "fsdp"))  # Tokens that go to any expert of a device.
    read = sum(_bytes(p, sizes, but="fsdp") * (1 - (1 - min(1.0, p.passes)) ** met) for p in multiplied)
    work = 2 * sum(p.passes * math.prod(p.shape) for p in multiplied if p.role != "vector")
    seconds = {
        "weights": turns * read / rate,
        "cache": turns * sum(_bytes(p, sizes) for p in leaves(cache)) / rate,
    }
    products = turns * rows * work / (hardware.chips * chip.flops * chip.products)
    seconds["products"] = max(0.0, products - seconds["weights"])
    layers, rates = model.stacks[-1].layers, links(hardware, sizes)
    waits = {"fsdp": len(layers), "tensor": 4 * len(layers), "expert": 2 * sum(map(is_routed, layers)), "stage": turns}
    for axis, number in sent.items():
        seconds[f"{axis} collectives"] = number / rates[axis][0] + waits[axis] * rates[axis][1] * chip.hop_s
    return Roofline(seconds, rows, hardware.chips, work, work, chip.flops)


def sent_bytes(model: Any, spec: Any, sizes: Mapping[str, int], rows: int) -> dict[str, float]:
    """Bytes that leave a device in a step along each mesh axis: those of the forward pass in
    lm.plan.roofline.sent_bytes, for one token a row; with stages in every one of their turns."""
    stream = jnp.dtype(model.dtype).itemsize * rows / math.prod(sizes[a] for a in rules.BATCH_AXES) * model.width
    ring, layers = {axis: (n - 1) / n for axis, n in sizes.items()}, model.stacks[-1].layers
    sides = 6 if hasattr(model, "encode") else 4  # Two of each sum that layers make, one of them over the memory.
    gathered = sum(_bytes(p, sizes, but="fsdp") for p in _multiplied(model, spec) if lies_on(p, "fsdp"))
    return {
        "stage": stream * (sizes["stage"] + 2 * ring["stage"]) if sizes["stage"] > 1 else 0.0,
        "fsdp": ring["fsdp"] * gathered * sizes["stage"],
        "tensor": sides * ring["tensor"] * stream * len(layers),
        "expert": 2 * ring["expert"] * sizes["expert"] * stream * sum(map(is_routed, layers)),
    }


def text(decoding: Decoding, name: str, price: float | None) -> str:
    """For a terminal."""
    plan, line = decoding.plan, decoding.plan.line
    console, out = report.terminal(plan, name)
    console.print(f"one token for {decoding.rows} rows of up to {decoding.context}\n")
    report.print_memory(console, plan)
    if line is not None:
        report.print_parts(console, line)
        cost = "" if price is None else f"; a million cost {_cost(line, price):,.2f} at {price:g} a chip-hour"
        console.print(f"{line.tokens_per_second:,.0f} tokens/s, {1 / line.step_s:,.1f} a row{cost}\n")
    report.print_collectives(console, plan)
    return report.ended(console, out, plan)


def to_json(decoding: Decoding, name: str, price: float | None) -> dict[str, Any]:
    """Every number of the plan."""
    plan, line = decoding.plan, decoding.plan.line
    return report.common_json(plan, name) | {
        "decode": {"rows": decoding.rows, "context": decoding.context},
        "cache_donated": plan.program.donated,
        "tokens_per_second": None if line is None else line.tokens_per_second,
        "cost_of_a_million": None if line is None or price is None else _cost(line, price),
    }


def _compile(run: Any, mesh: jax.sharding.Mesh, spec: Any, cache: Any, rows: int) -> program.Program:
    model = run.model

    def step(params, cache, last_B):
        out = model.apply(params, {"tokens_BL": last_B[:, None]}, cache=cache)
        logits = model.logits(model.head(params), out.hidden_BLD[:, 0])
        return out.cache, jnp.argmax(logits, -1).astype(jnp.int32)

    places = [rules.shardings(spec, mesh), rules.shardings(cache, mesh), rules.batch_sharding(mesh)]
    shapes = [specs.abstract(spec), specs.abstract(cache), jax.ShapeDtypeStruct((rows,), jnp.int32)]
    jitted = jax.jit(
        step,
        donate_argnums=1,
        in_shardings=tuple(places),
        out_shardings=tuple(places[1:]),
        compiler_options=options.of_mesh(mesh),
    )
    sizes = dict(mesh.shape)
    held = {name: sum(_bytes(p, sizes) for p in leaves(part)) for name, part in (("weights", spec), ("cache", cache))}
    lower = under(mesh, jitted.lower, run.mesh)
    compiled = program.compile_timed(lambda: lower(*shapes), sum(held.values()))
    memory = held | {"temporaries": compiled.temporary_bytes, "program": compiled.code_bytes}
    return compiled.program(memory, 0.99 * held["cache"])


def _cost(line: Roofline, price: float) -> float:
    return price * line.chips / 3600 * 1e6 / line.tokens_per_second


def _multiplied(model: Any, spec: Any) -> list[Param]:
    """What a token is multiplied by: not an encoder, which has read, and not the rows of embeddings, unless tied."""
    own = {name: part for name, part in spec.items() if name != "encoder"}
    head = leaves(model.head(spec))
    return [p for p in leaves(own) if p.role != "embedding"] + [p for p in head if p.role == "embedding"]


def _bytes(p: Param, sizes: Mapping[str, int], but: str = "") -> float:
    """Of a device's shard, whole over the mesh axis `but`."""
    return math.prod(p.shape) / rules.shards(p, dict(sizes), but) * jnp.dtype(p.dtype).itemsize
