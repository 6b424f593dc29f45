"""Validation loss over tokens, or over FLOPs where models differ in kind, and loss over learning rate."""

import io
from collections.abc import Sequence
from typing import Any

import numpy as np

from lm.report.arms import Arm, work
from lm.train import metrics


def draw(arms: Sequence[Arm]) -> str:
    """The picture as an SVG document: curves at each arm's best rate, and beside them the rates where several ran."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    rates = [arm for arm in arms if len({row["learning_rate"] for row in arm.rows}) > 1]
    figure = Figure(figsize=(11 if rates else 7.5, 4.6), layout="constrained")
    FigureCanvasSVG(figure)
    panels = figure.subplots(1, 2 if rates else 1, squeeze=False, width_ratios=(3, 2) if rates else None)[0]
    _curves(panels[0], arms)
    if rates:
        _rates(panels[1], rates)
    for axes in panels:
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    out = io.StringIO()
    figure.savefig(out, format="svg", metadata={"Date": None})
    return out.getvalue()


def _curves(axes: Any, arms: Sequence[Arm]) -> None:
    """Models of several kinds are compared by the work they were trained with."""
    ends, families = [], work(arms) != "C"
    for i, arm in enumerate(arms):
        curves = [_validation(row) for row in arm.best]
        curves = [curve for curve in curves if len(curve)]
        if not curves:
            continue
        steps = sorted(set.intersection(*(set(curve) for curve in curves)))
        if not steps:
            continue
        first = arm.rows[0]
        spent = np.array(steps) / steps[-1] * first[work(arms) if families else "D"]
        losses = np.array([[curve[step] for step in steps] for curve in curves])
        style = {"color": f"C{i % 10}", "linestyle": ("-", "--", ":")[i // 10 % 3], "linewidth": 1.2}
        if len(steps) == 1:  # A level to hold the curves of others against.
            axes.axhline(losses.mean(), **style, alpha=0.4)
            axes.plot(spent, losses.mean(0), "D", color=style["color"], label=arm.label, markersize=5)
        else:
            axes.plot(spent, losses.mean(0), marker=".", markersize=4, label=arm.label, **style)
        if len(losses) > 1:
            axes.fill_between(spent, losses.min(0), losses.max(0), color=style["color"], alpha=0.2, linewidth=0)
        ends.append(losses[:, len(steps) // 4 :].max())
    axes.set(xlabel="training FLOPs" if families else "tokens", ylabel="validation loss (nats per token)")
    axes.set(title="best rate; band: all seeds", xscale="log" if families else "linear")
    if ends:
        axes.set_ylim(top=max(ends) + 0.02 * max(ends))
    axes.legend(frameon=False, fontsize=8, ncols=1 + len(arms) // 12)


def _rates(axes: Any, arms: Sequence[Arm]) -> None:
    for i, arm in enumerate(arms):
        by_rate: dict[float, list[float]] = {}
        for row in arm.rows:
            if row["status"] == "done" and row.get("loss") is not None:
                by_rate.setdefault(row["learning_rate"], []).append(row["loss"])
        rates = sorted(by_rate)
        axes.plot(rates, [np.mean(by_rate[r]) for r in rates], ".-", color=f"C{i % 10}", label=arm.label)
    axes.set_xscale("log")
    axes.set(xlabel="peak learning rate", ylabel="final validation loss", title="mean over seeds")


def _validation(row: dict[str, Any]) -> dict[int, float]:
    found = metrics.read(row["run"])
    return {line["step"]: line["val_loss"] for line in found if line.get("val_loss") is not None}
