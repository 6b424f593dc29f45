"""Figures of fits: the rows under their law, and what the law leaves over."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from lm.report.laws import Law
from lm.report.optimum import derived
from lm.report.points import Points

COLORS = "viridis"


def save(result: Any, path: Any) -> None:
    """Writes the figure of a result as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.2), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    result.draw(figure)
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    with path.open("wb") as f:
        figure.savefig(f, format="png")


def draw_laws(figure: Any, laws: Sequence[Law], thetas: Sequence[np.ndarray], points: Points) -> None:
    """A row of panels a law: the target with the law's curves, and residuals in per cent."""
    panels = figure.subplots(len(laws), 2, squeeze=False)
    if len(laws) > 1:
        figure.set_size_inches(10, 4.2 * len(laws))
    for law, theta, (left, right) in zip(laws, thetas, panels, strict=True):
        x, y = points.logs(law.columns), points[law.target]
        joint = {"N", "D"} <= set(law.columns)
        across = 6 * points["N"] * points["D"] if joint else points[law.columns[0]]
        color = {"c": np.log10(points["N"]), "cmap": COLORS} if joint else {"color": "tab:blue"}
        left.scatter(across, y, s=14, zorder=3, **color)
        _curves(left, law, theta, points, joint)
        dots = right.scatter(across, 100 * np.expm1(np.log(y) - law.predict(theta, x)[0]), s=14, **color)
        right.axhline(0, color="0.5", linewidth=0.8)
        for axes in (left, right):
            axes.set_xlabel("6ND (FLOPs)" if joint else law.columns[0])
            if law.columns != ("loss",):
                axes.set_xscale("log")
            axes.grid(alpha=0.3)
        left.set_ylabel(law.target)
        left.set_title(law.formula, fontsize=10)
        right.set_ylabel(f"{law.target} above the law (%)")
        if joint:
            figure.colorbar(dots, ax=right, label="log10 N")


def _curves(axes: Any, law: Law, theta: np.ndarray, points: Points, joint: bool) -> None:
    """The law along D for eight sizes, and at the best size of each budget; or along its one column."""
    from matplotlib import colormaps

    if not joint:
        low, high = points[law.columns[0]].min(), points[law.columns[0]].max()
        grid = np.geomspace(low, high, 200)
        axes.plot(grid, np.exp(law.predict(theta, np.log(grid)[:, None])[0]), color="0.3", linewidth=1)
        return
    logs = np.log10(points["N"])
    for size in np.linspace(logs.min(), logs.max(), 8):
        x = points.logs(law.columns)[np.abs(logs - size) < 0.2]
        if len(x) > 1:
            path = np.repeat(x[:1], 50, axis=0)
            path[:, 0] = size * np.log(10)
            path[:, 1] = np.linspace(x[:, 1].min(), x[:, 1].max(), 50)
            shade = colormaps[COLORS]((size - logs.min()) / max(np.ptp(logs), 1e-9))
            axes.plot(
                6 * np.exp(path[:, 0] + path[:, 1]), np.exp(law.predict(theta, path)[0]), color=shade, linewidth=1
            )
    compute = 6 * np.exp(points.logs(["N", "D"]).sum(axis=1))
    budgets = np.geomspace(compute.min(), compute.max(), 50)
    best = [derived(law, theta, 6.0, c)["loss*"] for c in budgets]
    axes.plot(budgets, best, "k--", linewidth=1.2, label="the best size at each budget")
    axes.legend(frameon=False)


def draw_isoflop(
    figure: Any, slices: Any, found: Any, values: dict[str, float], interval: Any, k: float, budget: float
) -> None:
    """Loss over size at each budget with its minimum, and the line through the minima."""
    from matplotlib import colormaps
    from scipy.interpolate import Akima1DInterpolator

    left, right = figure.subplots(1, 2)
    for i, s in enumerate(slices):
        shade = colormaps[COLORS](i / max(len(slices) - 1, 1))
        grid = np.linspace(s.sizes[0], s.sizes[-1], 200)
        left.plot(np.exp(grid), Akima1DInterpolator(s.sizes, s.losses)(grid), color=shade, linewidth=1)
        left.plot(np.exp(s.sizes), s.losses, ".", color=shade, label=f"{s.budget:.1e}")
    for s, (size, loss) in found:
        left.plot(np.exp(size), loss, "k*", markersize=9, zorder=4)
        right.plot(s.budget, np.exp(size), "k*", markersize=9, zorder=4)
    c = np.geomspace(min(s.budget for s, _ in found), max(budget, *(s.budget for s, _ in found)), 2)
    label = f"a = {values['a']:.3f}" + (f" ({interval[0]:.3f} to {interval[1]:.3f})" if interval else "")
    right.plot(c, values["N*"] * (c / budget) ** values["a"], color="tab:red", label=label)
    left.set(xscale="log", xlabel="N", ylabel="loss", title="minima by Akima interpolation")
    right.set(xscale="log", yscale="log", xlabel="C (FLOPs)", ylabel="N*", title="N* over compute")
    left.legend(title="C", fontsize=7, frameon=False)
    right.legend(frameon=False)
    for axes in (left, right):
        axes.grid(alpha=0.3)


def draw_hparams(figure: Any, surfaces: Any, predicted: np.ndarray, choices: Sequence[str], points: Points) -> None:
    """For each choice: its optimum in each setting over what the law predicts, and the losses around the first."""
    panels = figure.subplots(1, 1 + len(choices))
    for i, s in enumerate(surfaces):
        z = points.logs([choices[0]])[s.rows, 0] - s.best[0]
        panels[0].plot(z / np.log(2), points["loss"][s.rows] - s.level, ".", color=f"C{i % 10}", markersize=5)
    panels[0].set(xlabel=f"octaves of {choices[0]} above {choices[0]}*", ylabel="loss above the optimum (nats)")
    for j, (axes, choice) in enumerate(zip(panels[1:], choices, strict=True)):
        best = np.exp([s.best[j] for s in surfaces])
        axes.plot(np.exp(predicted[:, j]), best, "o", markersize=5)
        ends = [min(best), max(best)]
        axes.plot(ends, ends, color="0.5", linewidth=0.8)
        axes.set(xscale="log", yscale="log", xlabel=f"{choice}* of the law", ylabel=f"{choice}* of the setting")
    for axes in panels:
        axes.grid(alpha=0.3, which="both")
