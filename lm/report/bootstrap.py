"""Bootstrap intervals of whatever a fit returns by name."""

from collections.abc import Callable

import numpy as np

from lm.report.points import Points

LEVEL = 0.95
FEWEST_GROUPS = 8
Progress = Callable[[int, int], None]


def intervals(
    draw: Callable[[np.random.Generator], dict[str, float]], count: int, seed: int, progress: Progress
) -> tuple[dict[str, list[float]], dict[str, float]]:
    """The 95 % percentile intervals and the standard errors of `count` draws; non-finite values are left out."""
    rng = np.random.default_rng(seed)
    draws: dict[str, list[float]] = {}
    for i in range(count):
        for name, value in draw(rng).items():
            draws.setdefault(name, []).append(value)
        progress(i + 1, count)
    edges, errors = {}, {}
    for name, values in draws.items():
        finite = np.array([v for v in values if np.isfinite(v)])
        if len(finite) > count / 2 and np.ptp(finite) > 0:
            edges[name] = [float(q) for q in np.quantile(finite, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])]
            errors[name] = float(finite.std(ddof=1))
    return edges, errors


def units(points: Points) -> tuple[np.ndarray, str | None]:
    """What each row is resampled with: its `group` where there are enough of them, else itself, and a warning."""
    rows = np.arange(len(points))
    if "group" not in points:
        return rows, None
    groups = np.unique(points["group"], return_inverse=True)[1]
    if len(set(groups)) >= FEWEST_GROUPS:
        return groups, None
    return rows, f"{len(set(groups))} groups are too few to resample, {FEWEST_GROUPS} are needed: rows are resampled"


def weights(unit: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """How often each row is in one resample of the units with replacement."""
    count = int(unit.max()) + 1
    return np.bincount(rng.integers(0, count, count), minlength=count)[unit].astype(float)
