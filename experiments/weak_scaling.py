"""Scaling on paper: MFU of 8B to 405B and of a mixture of experts from 8 to 8,192 chips, by the plan's formulas.

Claim: with a row of 8,192 tokens a chip, parameters spread over all chips (fsdp) pay up to thousands of chips in a TPU
pod; on GPUs their rings cost two points from some thousands on, and copies (data x fsdp) do not. At a fixed batch
(--batch) more chips than rows need tensor parallelism: 2 to 4 points at degree 2, a third of the MFU of 8B at 8.
Command: python -m experiments.weak_scaling --out=runs/weak [--kind=v5p] [--rows=1 | --batch=512]
Hardware and time: seconds; no chip and no compiler is needed.
"""

import dataclasses
import math
from typing import Any

from absl import app, flags

from experiments import llama_8b, llama_70b, llama_405b, moe_16x
from lm.core.errors import UsageError
from lm.parallel.mesh import Mesh
from lm.plan import hardware, program, search
from lm.plan.roofline import roofline

MODELS = {"8B": llama_8b, "70B": llama_70b, "405B": llama_405b, "92B of 16 experts": moe_16x}
COUNTS = tuple(2**i for i in range(3, 14))

_OUT = flags.DEFINE_string("out", None, "a folder for weak_scaling.txt and .png", required=True)
_KIND = flags.DEFINE_enum("kind", "v5p", ["v5p", "h100"], "of the chips")
_ROWS = flags.DEFINE_integer("rows", 1, "a chip: weak scaling", lower_bound=1)
_BATCH = flags.DEFINE_integer("batch", None, "rows in all, whatever the chips: strong scaling", lower_bound=1)


def main(_: list[str]) -> None:
    from lm.core import files

    found = {name: curves(module.run(), _KIND.value, _ROWS.value, _BATCH.value) for name, module in MODELS.items()}
    text = "\n".join(table(name, lines) for name, lines in found.items())
    print(text)
    folder = files.path(_OUT.value)
    folder.mkdir(parents=True, exist_ok=True)
    files.write_bytes(folder / "weak_scaling.txt", text.encode())
    rows = f"{_ROWS.value} rows of 8,192 tokens a chip" if _BATCH.value is None else f"{_BATCH.value} rows in all"
    draw(found, f"{_KIND.value}, {rows}", folder / "weak_scaling.png")


def curves(base: Any, kind: str, rows: int, batch_size: int | None) -> dict[str, dict[int, float]]:
    """{strategy: {chips: MFU}} where the run fits: fsdp over all, copies of it, and tensor beside it."""
    found: dict[str, dict[int, float]] = {"fsdp": {}, "data x fsdp": {}, "fsdp x tensor": {}}
    for chips in COUNTS:
        wanted = hardware.parse(f"{kind}:{shape(kind, chips)}")
        train = dataclasses.replace(base.train, batch_size=batch_size or rows * chips, accumulate=1)
        run = dataclasses.replace(base, train=train)
        batch = program.batch_shapes(run)
        for strategy, mesh in meshes(run, chips):
            changed = dataclasses.replace(run, mesh=mesh)
            sizes = mesh.sizes(wanted.devices)
            if train.batch_size % math.prod(sizes[a] for a in ("data", "fsdp", "expert")):
                continue
            assert wanted.chip is not None
            try:
                if search.estimate(changed, sizes) > search.FREE * wanted.chip.memory_bytes:
                    continue
                mfu = roofline(changed, wanted, sizes, batch).mfu
            except UsageError:  # More devices along an axis than it divides by.
                continue
            found[strategy][chips] = max(mfu, found[strategy].get(chips, 0.0))
    return found


def meshes(run: Any, chips: int) -> list[tuple[str, Mesh]]:
    """(strategy, mesh) of all powers of two; experts are spread over as many chips as there are of them, or all."""
    expert = min(max((layer.experts.count for layer in run.model.pattern if layer.experts), default=1), chips)
    rest = chips // expert
    made = [("fsdp", Mesh(fsdp=rest, expert=expert))]
    made += [("data x fsdp", Mesh(fsdp=2**i, expert=expert)) for i in range(rest.bit_length() - 1)]
    made += [("fsdp x tensor", Mesh(fsdp=rest // n, expert=expert, tensor=n)) for n in (2, 4, 8) if rest >= n]
    return made


def shape(kind: str, chips: int) -> str:
    """The most cubic torus of that many chips; of GPUs their number."""
    if kind == "h100":
        return str(chips)
    exponent = chips.bit_length() - 1
    sides = sorted(2 ** ((exponent + i) // 3) for i in range(3))
    return "x".join(map(str, sides))


def table(name: str, lines: dict[str, dict[int, float]]) -> str:
    """Rows of MFU by strategy, and where each one stops paying: two points below its best for good."""
    out = [f"{name:18}" + "".join(f"{n:>7,}" for n in COUNTS)]
    for strategy, curve in lines.items():
        values = "".join(f"{curve[n]:7.1%}" if n in curve else f"{'-':>7}" for n in COUNTS)
        good = [n for n, mfu in curve.items() if mfu >= max(curve.values()) - 0.02]
        out.append(f"  {strategy:16}{values}   pays to {max(good):,}" if good else f"  {strategy:16}{values}")
    return "\n".join(out) + "\n"


def draw(found: dict[str, dict[str, dict[int, float]]], title: str, file: Any) -> None:
    import io

    from matplotlib.figure import Figure

    from lm.core import files

    figure = Figure(figsize=(11, 3.4), layout="constrained")
    for axes, (name, lines) in zip(figure.subplots(1, len(found), sharey=True), found.items(), strict=True):
        for strategy, curve in lines.items():
            axes.plot(list(curve), [100 * mfu for mfu in curve.values()], "o-", markersize=3, label=strategy)
        axes.set(title=name, xscale="log", xlabel="chips", xlim=(COUNTS[0] / 1.5, COUNTS[-1] * 1.5))
        axes.grid(alpha=0.3)
    best = max((mfu for lines in found.values() for curve in lines.values() for mfu in curve.values()), default=1.0)
    figure.axes[0].set(ylabel="MFU, %", ylim=(0, 110 * best))
    figure.axes[-1].legend(fontsize=8)
    figure.suptitle(title, fontsize=11)
    picture = io.BytesIO()
    figure.savefig(picture, dpi=130)
    files.write_bytes(file, picture.getvalue())


if __name__ == "__main__":
    app.run(main)
