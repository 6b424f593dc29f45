"""The compute-optimal size from the minima of loss over size at fixed compute: IsoFLOP budgets, and slices of curves.

Hoffmann et al. 2022, 2203.15556, approach 2, with the minimum by Akima interpolation in log N (Porian et al. 2024,
2406.19146): a parabola is biased where the curve is lopsided, and stands beside it for comparison.
"""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from scipy.interpolate import Akima1DInterpolator

from lm.core.errors import UsageError
from lm.report import bootstrap, exponents, figures
from lm.report.laws import power
from lm.report.minimize import fit
from lm.report.points import Points, listed
from lm.report.result import Result, Settings

TOLERANCE = 1.2  # Rows of one budget differ in C by less than this factor: sizes and steps are rounded.
SAME_SIZE = 1.01  # Sizes nearer than this are one size, whose losses are averaged.
FEWEST_SIZES = 4
SLICES = 12


@dataclasses.dataclass(frozen=True)
class Slice:
    """Losses over log sizes (rising) at one budget, and how many rows each is the mean of."""

    budget: float
    sizes: np.ndarray
    losses: np.ndarray
    counts: np.ndarray


def fit_isoflop(form: str, points: Points, settings: Settings, progress: bootstrap.Progress) -> Result:
    """The line of log N* over log C, through the minima of budgets (isoflop) or of slices across curves (frontier).

    The intervals are of repeated noise in the losses: replicates' where there are any, else what a cubic leaves.
    Raises UsageError where fewer than two budgets have a minimum.
    """
    points = points.drop_highest(settings.drop_highest, "loss")
    cut = {"isoflop": by_budget, "frontier": across_curves}[form]
    slices, narrow = cut(points)
    warnings = [*points.warnings, *narrow]
    found = [(s, minimum) for s in slices if (minimum := akima(s)) is not None]
    inside = {s.budget for s, _ in found}
    edge = [f"C = {s.budget:.3g} (lowest at N = {_lowest(s):.3g})" for s in slices if s.budget not in inside]
    if edge:
        warnings.append(f"left out, the minimum is at the edge of the sizes: {listed(edge)}")
    if len(found) < 2:
        raise UsageError(f"{len(found)} budgets have a minimum inside their sizes, 2 are needed: {'; '.join(warnings)}")
    if len(found) == 2:
        warnings.append("2 budgets make a line that nothing checks")
    budget = settings.budget or float(points["C"].max())
    k = float(np.exp(np.mean(np.log(points["C"] / points["N"] / points["D"])))) if "D" in points else 6.0
    noise = noise_sd(points, slices)

    def draw(rng: np.random.Generator) -> dict[str, float]:
        noisy = dict(points.columns, loss=points["loss"] + rng.normal(0, noise, len(points)))
        return both_lines(cut(Points(noisy, points.names))[0], k, budget)[0]

    edges, errors = bootstrap.intervals(draw, settings.bootstrap, settings.seed, progress)
    values, residuals = both_lines(slices, k, budget)
    if "a" in errors and abs(values["a_parabola"] - values["a"]) > 3 * errors["a"] + 0.005:
        warnings.append(
            f"a is {values['a']:.3f} by Akima and {values['a_parabola']:.3f} by parabolas: refine the sizes"
        )
    return Result(
        form=form,
        formula="N* = G (C/k)^a",
        rows=len(points),
        params={"a": values["a"], "G": values["N*"] / (budget / k) ** values["a"]},
        derived=values | optimal_loss(found, budget),
        objective=float(residuals @ residuals),
        intervals=edges,
        standard_errors=errors,
        diagnostics={
            "budgets": [s.budget for s, _ in found],
            "minima": [float(np.exp(m[0])) for _, m in found],
            "losses": [float(m[1]) for _, m in found],
            "residual_sd": float(residuals.std()),
            "noise_sd": noise,
            **exponents.of_minima([(size, s.budget / k / np.exp(size)) for s, (size, _) in found], points),
        },
        warnings=warnings,
        draw=lambda figure: figures.draw_isoflop(figure, slices, found, values, edges.get("a"), k, budget),
    )


def by_budget(points: Points) -> tuple[list[Slice], list[str]]:
    """The rows grouped by C, and a warning about groups of too few sizes."""
    order = np.argsort(points["C"], kind="stable")
    groups: list[list[int]] = []
    for i in order:
        if not groups or points["C"][i] > TOLERANCE * points["C"][groups[-1][0]]:
            groups.append([])
        groups[-1].append(int(i))
    slices, few = [], []
    for members in map(np.array, groups):
        budget = float(np.exp(np.log(points["C"][members]).mean()))
        one = _slice(budget, np.log(points["N"][members]), points["loss"][members])
        if len(one.sizes) >= FEWEST_SIZES:
            slices.append(one)
        else:
            few.append(f"C = {budget:.3g} ({listed([points.names[i] for i in members])})")
    return slices, [f"left out, fewer than {FEWEST_SIZES} sizes at a budget: {listed(few)}"] if few else []


def across_curves(points: Points) -> tuple[list[Slice], list[str]]:
    """Slices at equal steps of log C through each size's loss over compute (approach 1, between sizes too)."""
    curves = []
    for size, members in _clusters(np.log(points["N"])):
        x, inverse = np.unique(np.log(points["C"][members]), return_inverse=True)
        if len(x) >= 2:
            y = np.bincount(inverse, np.log(points["loss"][members])) / np.bincount(inverse)
            curves.append((size, x[0], x[-1], Akima1DInterpolator(x, y)))
    if len(curves) < FEWEST_SIZES:
        raise UsageError(f"{len(curves)} sizes have two rows or more along C, and frontier needs {FEWEST_SIZES}")
    starts, ends = (np.sort([c[i] for c in curves]) for i in (1, 2))
    slices = []
    for c in np.linspace(starts[FEWEST_SIZES - 1], ends[-FEWEST_SIZES], SLICES):
        met = [(size, float(np.exp(curve(c)))) for size, low, high, curve in curves if low <= c <= high]
        if len(met) >= FEWEST_SIZES:
            sizes, losses = map(np.array, zip(*met, strict=True))
            slices.append(Slice(float(np.exp(c)), sizes, losses, np.ones(len(met))))
    return slices, []


def akima(s: Slice) -> tuple[float, float] | None:
    """The (log size, loss) of the lowest point of the interpolant; None where the lowest row is the first or last."""
    lowest = int(np.argmin(s.losses))
    if lowest in (0, len(s.sizes) - 1):
        return None
    curve = Akima1DInterpolator(s.sizes, s.losses)
    # Roots are infinite or NaN where a piece is flat.
    turns = [x for x in curve.derivative().roots(extrapolate=False) if np.isfinite(x)]
    candidates = np.array([*turns, s.sizes[lowest]])
    best = candidates[np.argmin(curve(candidates))]
    return float(best), float(curve(best))


def parabola(s: Slice) -> tuple[float, float] | None:
    """The (log size, loss) of the vertex of a least-squares parabola; None outside the sizes, or of a maximum."""
    centre = s.sizes.mean()
    curvature, slope, level = np.polyfit(s.sizes - centre, s.losses, 2, w=np.sqrt(s.counts))
    vertex = -slope / (2 * curvature) if curvature > 0 else np.inf
    if not s.sizes[0] < centre + vertex < s.sizes[-1]:
        return None
    return float(centre + vertex), float(level + slope * vertex / 2)


def both_lines(slices: list[Slice], k: float, budget: float) -> tuple[dict[str, float], np.ndarray]:
    """The line by Akima, and the exponent by parabolas beside it: they average noise, and are biased."""
    values, residuals = line(slices, akima, k, budget)
    return values | {"a_parabola": line(slices, parabola, k, budget)[0]["a"]}, residuals


def line(
    slices: Iterable[Slice], minimum: Callable[[Slice], Any], k: float, budget: float
) -> tuple[dict[str, float], np.ndarray]:
    """a, b, and N*, D* at `budget` by least squares of log N* on log C, and the residuals; NaN of fewer than two."""
    minima = [(np.log(s.budget), m[0]) for s in slices if (m := minimum(s)) is not None]
    if len(minima) < 2:
        return dict.fromkeys(("a", "b", "N*", "D*", "D*/N*"), np.nan), np.array([])
    compute, sizes = np.array(minima).T
    a, level = np.polyfit(compute - np.log(budget), sizes, 1)
    size = float(np.exp(level))
    tokens = budget / k / size
    values = {"a": float(a), "b": float(1 - a), "N*": size, "D*": tokens, "D*/N*": tokens / size}
    return values, sizes - level - a * (compute - np.log(budget))


def optimal_loss(found: list[tuple[Slice, Any]], budget: float) -> dict[str, float]:
    """E and g of loss* = E + K C^-g through the minima, and loss* at `budget`, of four budgets or more."""
    if len(found) < 4:
        return {"C": budget}
    law = power("C", "loss", floor=True)
    x = np.log([[s.budget] for s, _ in found])
    theta = fit(law, x, np.log([m[1] for _, m in found]), Settings().objective).theta
    loss = float(np.exp(law.predict(theta, np.log([[budget]]))[0][0]))
    return {"C": budget, "loss*": loss, "E": law.params(theta)["E"], "g": law.params(theta)["alpha"]}


def noise_sd(points: Points, slices: list[Slice]) -> float:
    """The SD of a loss: pooled over rows of equal N and C, or what a cubic in log N leaves of each slice."""
    settings = points.logs(["N", "C"]).round(9)
    _, inverse, counts = np.unique(settings, axis=0, return_inverse=True, return_counts=True)
    inverse = inverse.ravel()
    free = len(points) - len(counts)
    left = points["loss"] - (np.bincount(inverse, points["loss"]) / counts)[inverse]
    if free >= 3:
        return float(np.sqrt(left @ left / free))
    squares, free = 0.0, 0
    for s in slices:
        degree = min(3, len(s.sizes) - 2)
        x = s.sizes - s.sizes.mean()
        residual = s.losses - np.polyval(np.polyfit(x, s.losses, degree), x)
        squares, free = squares + residual @ residual, free + len(x) - degree - 1
    return float(np.sqrt(squares / free))


def _lowest(s: Slice) -> float:
    return float(np.exp(s.sizes[np.argmin(s.losses)]))


def _slice(budget: float, sizes: np.ndarray, losses: np.ndarray) -> Slice:
    groups = _clusters(sizes)
    counts = np.array([float(len(members)) for _, members in groups])
    return Slice(
        budget, np.array([size for size, _ in groups]), np.array([losses[m].mean() for _, m in groups]), counts
    )


def _clusters(sizes: np.ndarray) -> list[tuple[float, np.ndarray]]:
    """(mean log size, rows) of the sizes that are one size."""
    order = np.argsort(sizes, kind="stable")
    breaks = np.flatnonzero(np.diff(sizes[order]) > np.log(SAME_SIZE)) + 1
    return [(float(sizes[members].mean()), members) for members in np.split(order, breaks)]
