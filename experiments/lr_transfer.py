"""Does the best learning rate of a narrow model serve a wide one?

Claim: in muP the best learning rate moves by at most an octave from any width to 4 times it, and at the narrowest one's
best the loss falls with width; in the standard parametrization, the control, the best moves by at least one and a half
octaves over all widths. (Yang et al. 2022, 2203.03466, figure 1.)
Command: lm sweep --experiment=lr_transfer --workdir=runs/lr --parallel=2
Hardware and time: 2 CPU cores, 4 minutes; seen: 0.89 octaves in muP, 2.81 in the control (LOG.md).
"""

import dataclasses
import itertools
import math
import pathlib
from typing import Any

import numpy as np

from experiments import mup_width
from lm.train.run import Run
from lm.train.schedules import Constant

WIDTHS = (128, 256, 512)
# Learning rates are 2 to these powers: around the best of either, which in the control falls with width.
OCTAVES = {"mup": tuple(range(-11, -5)), "sp": tuple(range(-13, -6))}
LARGEST, CONTROL = 1.0, 1.5  # Octaves: of muP's drift over a 4-fold width; of the control's over all widths.


def run() -> list[Run]:
    """3 widths, 6 learning rates in muP and 7 in the standard parametrization: 150 steps each."""
    return [
        dataclasses.replace(
            base,
            name=f"{base.model.parametrization}/w{width}/lr2^{octave}",
            model=dataclasses.replace(base.model, width=width),
            # A schedule that falls to zero makes twice or half the best rate nearly as good, and the best one noise.
            schedule=Constant(peak=2.0**octave, warmup_steps=10),
        )
        for base in (mup_width.run(), mup_width.sp())
        for width in WIDTHS
        for octave in OCTAVES[base.model.parametrization]
    ]


def verdict(rows: list[dict[str, Any]], folder: pathlib.Path) -> tuple[str, bool]:
    """The losses, the best learning rates and whether they are as claimed; a picture in the folder."""
    losses: dict[str, dict[int, np.ndarray]] = {}
    for row in rows:
        kind = row["name"].split("/")[0]
        curve = losses.setdefault(kind, {}).setdefault(row["width"], np.full(len(OCTAVES[kind]), np.inf))
        loss = row["loss"] if row["status"] == "done" else None
        curve[OCTAVES[kind].index(round(math.log2(row["learning_rate"])))] = math.inf if loss is None else loss
    best = {
        kind: {width: _best(OCTAVES[kind], curve) for width, curve in curves.items()} for kind, curves in losses.items()
    }
    lines = []
    for kind, curves in losses.items():
        lines.append(f"{'':5} {'width':>5}" + "".join(f"   2^{octave:<3}" for octave in OCTAVES[kind]) + "   best")
        for width, curve in curves.items():
            shown = "".join(f"{loss:8.4f}" for loss in curve)
            lines.append(f"{kind:5} {width:5}{shown}   2^{best[kind][width]:.2f}")
    checks = _checks(losses["mup"], best)
    lines += [f"{'PASS' if good else 'FAIL'}  {text}" for text, good in checks]
    _plot(losses, best, folder / "lr_transfer.png")
    return "\n".join(lines), all(good for _, good in checks)


def _checks(mup: dict[int, np.ndarray], best: dict[str, dict[int, float]]) -> list[tuple[str, bool]]:
    ends = {kind: (octaves[0], octaves[-1]) for kind, octaves in OCTAVES.items()}
    edges = [f"{kind} {w}" for kind in best for w, octave in best[kind].items() if octave in ends[kind]]
    pairs = [(a, b) for a, b in itertools.combinations(WIDTHS, 2) if b == 4 * a]
    drift = max(abs(best["mup"][a] - best["mup"][b]) for a, b in pairs)
    control = best["sp"][WIDTHS[0]] - best["sp"][WIDTHS[-1]]
    shared = round(best["mup"][WIDTHS[0]])
    at_shared = [float(mup[width][OCTAVES["mup"].index(shared)]) for width in WIDTHS]
    falls = all(b < a for a, b in itertools.pairwise(at_shared))
    return [
        (f"best learning rates lie inside the grid{': not those of ' + ', '.join(edges) if edges else ''}", not edges),
        (f"mup: drift over a 4-fold width {drift:.2f} octaves, wanted at most {LARGEST}", drift <= LARGEST),
        (f"sp: drift {control:.2f} octaves, wanted at least {CONTROL}, or the check is blind", control >= CONTROL),
        (f"mup: loss at 2^{shared} by width: {', '.join(f'{x:.4f}' for x in at_shared)}, wanted falling", falls),
    ]


def _best(octaves: tuple[int, ...], curve: np.ndarray) -> float:
    """The octave of the lowest point of the parabola through the minimum and its neighbours."""
    i = int(np.argmin(curve))
    if not 0 < i < len(curve) - 1 or not np.isfinite(curve[i - 1 : i + 2]).all():
        return float(octaves[i])
    left, middle, right = curve[i - 1 : i + 2]
    return octaves[i] + float((left - right) / (2 * (left - 2 * middle + right)))


def _plot(losses: dict[str, dict[int, np.ndarray]], best: dict[str, dict[int, float]], file: pathlib.Path) -> None:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(losses), figsize=(9, 3.6), sharey=True, squeeze=False)
    colors = pyplot.get_cmap("viridis")(np.linspace(0.1, 0.85, len(WIDTHS)))
    for panel, (kind, curves) in zip(panels[0], losses.items(), strict=True):
        for color, (width, curve) in zip(colors, curves.items(), strict=True):
            panel.plot(OCTAVES[kind], curve, "o-", color=color, label=f"{width} wide")
            panel.axvline(best[kind][width], color=color, linestyle=":", linewidth=1)
        panel.set(title=kind, xlabel="log2 of the learning rate", xticks=OCTAVES[kind])
        panel.grid(alpha=0.3)
    finite = np.concatenate([curve[np.isfinite(curve)] for curves in losses.values() for curve in curves.values()])
    panels[0][0].set(ylabel="validation loss, nats a token", ylim=(finite.min() - 0.05, np.quantile(finite, 0.9)))
    panels[0][-1].legend()
    figure.tight_layout()
    figure.savefig(file, dpi=120)
    pyplot.close(figure)
