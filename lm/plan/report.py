"""A plan: a run, the program that it compiles to, and its step by formula, as text, JSON and a picture."""

import dataclasses
import io
import math
from typing import Any

import jax

from lm.core import config, files, params
from lm.parallel import rules
from lm.plan import collectives, program, roofline, search
from lm.plan.hardware import Hardware

GB = 1e9
SHOWN = 8  # Candidates of a search that are printed.
TRIED = 5  # Of them, how many are compiled before it gives up.


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is known of a run on hardware; on a CPU no times, without a readable program no collectives of its own."""

    run: Any
    hardware: Hardware
    sizes: dict[str, int]
    program: program.Program
    line: roofline.Roofline | None
    sent: dict[str, float]  # Bytes along each mesh axis, by formula.
    found: list[collectives.Collective] | None
    tokens: float
    ranked: list[search.Candidate]
    notes: list[str]

    @property
    def room_bytes(self) -> float:
        """Of a device's memory; infinite where it is not known."""
        chip = self.hardware.chip
        return math.inf if chip is None else chip.memory_bytes / chip.devices

    @property
    def fits(self) -> bool:
        return self.program.total_bytes <= search.FREE * self.room_bytes


def make(run: Any, hardware: Hardware, devices: list[jax.Device], searching: bool, tokens: float | None) -> Plan:
    """Compiles the run, or the fastest that a search finds to fit, and where a given one does not, the ones that may.

    Where a search finds none, what needs the least memory is compiled. Raises UsageError for a mesh or a batch that
    does not divide.
    """
    batch = program.batch_shapes(run)
    ranked: list[search.Candidate] = []
    auto = run.mesh.preset == "auto" and hardware.chip is not None
    if searching or auto:
        ranked = search.candidates(run, hardware, batch, meshes_alone=not searching)
        if not ranked:
            run = search.leanest(run, hardware, meshes_alone=not searching)
    plan = _compile(ranked[0].run if ranked else run, hardware, devices, batch, tokens, ranked)
    low: dict[str, float] = {}  # By policy: how much more a compiled program took than was estimated.
    for _ in range(TRIED - 1):
        if plan.fits or not ranked:
            break
        tried = next(c for c in ranked if c.run is plan.run)
        low[plan.run.model.remat] = plan.program.total_bytes / tried.memory_bytes
        room = search.FREE * plan.room_bytes
        ranked = [c for c in ranked if c is not tried and c.memory_bytes * low.get(c.run.model.remat, 1.0) <= room]
        if ranked:
            plan = _compile(ranked[0].run, hardware, devices, batch, tokens, ranked)
    if not plan.fits and hardware.chip is not None and not ranked:
        plan = dataclasses.replace(plan, ranked=search.candidates(run, hardware, batch))
    return plan


def _compile(run, hardware, devices, batch, tokens, ranked) -> Plan:
    sizes = run.mesh.sizes(len(devices))
    rules.partition(("batch",), (run.train.batch_size // run.train.accumulate,), sizes)
    mesh, notes = run.mesh.build(devices), []
    if search.padded(run.model, hardware, sizes["fsdp"]):
        share = f"{run.model.width / sizes['fsdp']:g} of {run.model.width} features"
        notes.append(
            f"fsdp={sizes['fsdp']} leaves a device {share}, no multiple of a TPU's {search.LANES} lanes: arrays are "
            "padded, and parameters gathered by reductions"
        )
    try:
        compiled = program.compile_step(run, mesh)
    except RuntimeError as error:
        if "cuDNN" not in str(error) or not hasattr(run.model, "attention_kernel"):
            raise
        blocks = dataclasses.replace(run.model, attention_kernel="blocks")
        compiled = program.compile_step(dataclasses.replace(run, model=blocks), mesh)
        notes.append(
            "cuDNN is not installed here: compiled with attention in blocks of queries, whose memory grows with the "
            "length as cuDNN's does; its time above is that of a fused kernel"
        )
    if compiled.host:
        notes.append("the time above leaves out the way to the host and back")
    return Plan(
        run=run,
        hardware=hardware,
        sizes=sizes,
        program=compiled,
        line=None if hardware.chip is None else roofline.roofline(run, hardware, sizes, batch),
        sent={a: n for a, n in roofline.sent_bytes(run, run.model.spec(), sizes).items() if n},
        found=None if compiled.text is None else collectives.read(compiled.text, mesh),
        tokens=tokens or float(run.train.steps * run.train.batch_size * run.train.seq_len),
        ranked=ranked,
        notes=notes,
    )


def text(plan: Plan, name: str, price: float | None) -> str:
    """For a terminal."""
    console, out = terminal(plan, name)
    run = plan.run
    batch = f"{run.train.batch_size} rows of {run.train.seq_len}"
    console.print(f"{batch}, {run.train.accumulate} micro-batches, remat {getattr(run.model, 'remat', 'none')}\n")
    print_memory(console, plan)
    if plan.line is not None:
        _print_time(console, plan, plan.line, price)
    print_collectives(console, plan)
    if plan.ranked:
        _print_ranked(console, plan)
    for note in plan.notes:
        console.print(note)
    return ended(console, out, plan)


def terminal(plan: Plan, name: str) -> tuple[Any, io.StringIO]:
    """(a console, what is printed on it), with the plan's first line."""
    from rich.console import Console

    out, hardware = io.StringIO(), plan.hardware
    console = Console(file=out, width=110, highlight=False, soft_wrap=True)
    console.print(f"{name} ({_size(plan.run)}) on {hardware.name}: {hardware.chips} chips, mesh {_mesh(plan.sizes)}")
    return console, out


def ended(console: Any, out: io.StringIO, plan: Plan) -> str:
    """What was printed, after the plan's last line."""
    console.print(f"lowered in {plan.program.lower_s:.1f} s, compiled in {plan.program.compile_s:.1f} s")
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines())


def common_json(plan: Plan, name: str) -> dict[str, Any]:
    """What a step of training and one of decoding both have."""
    line = plan.line
    return {
        "experiment": name,
        "hardware": plan.hardware.name,
        "chips": plan.hardware.chips,
        "mesh": plan.sizes,
        "fits": plan.fits,
        "device_bytes": None if math.isinf(plan.room_bytes) else plan.room_bytes,
        "needed_bytes": plan.program.total_bytes,
        "memory_bytes": plan.program.memory,
        "host_bytes": plan.program.host,
        "parameters": params.count(plan.run.model.spec()),
        "seconds": None if line is None else line.seconds | {"step": line.step_s},
        "bound": None if line is None else line.bound,
        "sent_bytes_by_formula": plan.sent,
        "collectives": None if plan.found is None else [dataclasses.asdict(c) for c in plan.found],
        "compile_s": plan.program.compile_s,
        "config": config.to_json(plan.run),
    }


def to_json(plan: Plan, name: str, price: float | None) -> dict[str, Any]:
    """Every number of the plan."""
    line = plan.line
    return common_json(plan, name) | {
        "state_donated": plan.program.donated,
        "tokens_per_second": None if line is None else _range(line.tokens_per_second),
        "mfu": None if line is None else _range(line.mfu),
        "mfu_full_attention": None if line is None else _range(line.mfu_full),
        "flops_per_token": None if line is None else line.flops_per_token,
        "flops_per_token_full_attention": None if line is None else line.flops_full,
        "tokens": plan.tokens,
        "training_seconds": None if line is None else plan.tokens / line.tokens_per_second,
        "cost": None if line is None or price is None else _cost(plan, line, price),
        "notes": plan.notes,
    }


def write(folder: str, numbers: dict[str, Any], figure: Any) -> None:
    """plan.json and plan.png in `folder`."""
    out = files.path(folder)
    out.mkdir(parents=True, exist_ok=True)
    files.write_json(out / "plan.json", numbers)
    picture = io.BytesIO()
    figure.savefig(picture, dpi=130)
    files.write_bytes(out / "plan.png", picture.getvalue())


def draw(plan: Plan, name: str) -> Any:
    """Bytes of a device by what they hold beside what it has, and the seconds of a step by part."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.4), layout="constrained")
    bars = {"memory of a device, GB": ({k: v / GB for k, v in plan.program.memory.items()}, plan.room_bytes / GB)}
    if plan.line is not None:
        bars["time of a step, s"] = (plan.line.seconds, math.inf)
    for axes, (title, (parts, limit)) in zip(
        figure.subplots(1, len(bars), squeeze=False)[0], bars.items(), strict=True
    ):
        parts = {k: v for k, v in parts.items() if v}
        axes.barh(list(parts), list(parts.values()), color="#4477aa")
        axes.invert_yaxis()
        if not math.isinf(limit):
            axes.axvline(limit, color="#bb3333", linestyle="--", linewidth=1)
        total = sum(parts.values())
        axes.set_title(f"{title}: {total:.3g}{'' if math.isinf(limit) else f' of {limit:.3g}'}", fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"{name} on {plan.hardware.name}, {_mesh(plan.sizes)}", fontsize=11)
    return figure


def print_memory(console: Any, plan: Plan) -> None:
    """Bytes of a device by what they hold, and whether it has them."""
    for part, held in plan.program.memory.items():
        console.print(f"  {part:<28} {_bytes(held):>13} a device")
    total, room = plan.program.total_bytes, plan.room_bytes
    free = search.FREE * room
    verdict = "fits" if plan.fits else f"does not fit, {(total - free) / GB:.2f} GB too much"
    verdict = "" if math.isinf(room) else f" of {room / GB:.1f}, {free / GB:.1f} of them to be had: {verdict}"
    console.print(f"  {'together':<28} {_bytes(total):>13}{verdict}")
    for part, held in plan.program.host.items():
        console.print(f"  {part + ', on the host':<28} {_bytes(held):>13} a device")
    if plan.program.donated is False:
        console.print("  what the step replaces is not given to it whole: it is in memory twice")
    console.print()


def print_parts(console: Any, line: roofline.Roofline) -> None:
    """The step's seconds, part by part, in milliseconds where it has few."""
    scale, unit = (1, "s") if line.step_s >= 0.1 else (1e3, "ms")
    for part, seconds in line.seconds.items():
        console.print(f"  {part:<28} {scale * seconds:10.4f} {unit}  {seconds / line.step_s:6.1%}")
    console.print(f"  {'step':<28} {scale * line.step_s:10.4f} {unit}, bound by {line.bound}\n")


def _print_time(console: Any, plan: Plan, line: roofline.Roofline, price: float | None) -> None:
    print_parts(console, line)
    low, high = _range(line.tokens_per_second)
    each = line.tokens_per_second / line.chips
    console.print(f"{line.tokens_per_second:,.0f} tokens/s ({low:,.0f} to {high:,.0f}), {each:,.0f} a chip")
    console.print(
        f"MFU {line.mfu:.1%} ({_range(line.mfu)[0]:.1%} to {_range(line.mfu)[1]:.1%}; {line.mfu_full:.1%} with all "
        f"pairs of attention); {line.flops_per_token / 1e9:.2f} GFLOP a token ({line.flops_full / 1e9:.2f})"
    )
    days = plan.tokens / line.tokens_per_second / 86400
    cost = "" if price is None else f", {_cost(plan, line, price):,.0f} at {price:g} a chip-hour"
    console.print(f"{plan.tokens:.3g} tokens take {days:,.2f} days{cost}\n")


def print_collectives(console: Any, plan: Plan) -> None:
    """What each device sends, by formula and in the compiled program."""
    if not plan.sent and not plan.found:
        return
    formula = ", ".join(f"{axis} {_bytes(sent)}" for axis, sent in plan.sent.items()) or "nothing"
    console.print(f"sent by each device in a step, by formula: {formula}")
    if plan.found is None:
        read, made = "cannot be read back by this jaxlib", "was not made: its memory is the least that it needs"
        reason = made if plan.program.donated is None else read
        console.print(f"(the compiled program {reason}; so its collectives were not counted)")
    for c in plan.found or ():
        console.print(f"  {c.kind:<20} over {'+'.join(c.axes) or 'none':<14} {c.count:5} x, {_bytes(c.sent_bytes):>10}")
    console.print()


def _print_ranked(console: Any, plan: Plan) -> None:
    console.print("fit by estimate, the fastest first:" if plan.fits else "would fit by estimate, the fastest first:")
    for c in plan.ranked[:SHOWN]:
        settings = f"{_settings(c.run.mesh)} --set=train.accumulate={c.run.train.accumulate}"
        remat = f" --set=model.remat={c.run.model.remat}" if hasattr(c.run.model, "remat") else ""
        rate = f"{c.line.tokens_per_second:12,.0f} tokens/s, MFU {c.line.mfu:.1%}"
        console.print(f"  {rate}, {c.memory_bytes / GB:6.1f} GB  {settings}{remat}")
    console.print()


def _bytes(number: float) -> str:
    return f"{number / GB:,.2f} GB" if number >= GB / 10 else f"{number / 1e6:,.2f} MB"


def _settings(mesh: Any) -> str:
    given = {a: getattr(mesh, a) for a in (*rules.MESH_AXES, "micro_batches") if a != "data"}
    return " ".join(f"--set=mesh.{a}={n}" for a, n in given.items() if (n or 1) > 1) or "--set=mesh.preset=dp"


def _range(value: float) -> list[float]:
    return [value * (1 - roofline.SPREAD), value * (1 + roofline.SPREAD)]


def _cost(plan: Plan, line: roofline.Roofline, price: float) -> float:
    return price * plan.hardware.chips * plan.tokens / line.tokens_per_second / 3600


def _size(run: Any) -> str:
    return f"{params.count(run.model.spec()) / 1e6:,.0f}M parameters"


def _mesh(sizes: dict[str, int]) -> str:
    return " x ".join(f"{a}={n}" for a, n in sizes.items() if n > 1) or "of one device"
