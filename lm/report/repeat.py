"""Repeated data: how many of a run's parameters its unique tokens call for (Muennighoff et al. 2023, 2305.16264)."""

import dataclasses

import numpy as np

from lm.core.errors import UsageError
from lm.report.laws import LAWS, Law, without_excess_parameters
from lm.report.minimize import Objective, descend, fit
from lm.report.points import Points

ROUNDS = 50


def prepare(points: Points, objective: Objective) -> tuple[Law, Points]:
    """The law, and the rows with U = min(U, D) and U_N = min(N, the compute-optimal N of U tokens).

    A column U_N is taken as it is. Else the optimum is of a Chinchilla law through the rows that repeat nothing
    (D <= U), then of the law itself until it no longer moves; the paper takes it from constants of its own. Where no
    row has more parameters than U_N, the law has no R_N. Raises UsageError where too few rows repeat nothing.
    """
    points = _with(points, U=np.minimum(points["U"], points["D"]))
    if "U_N" in points:
        return _law(points), points
    base = LAWS["chinchilla"]
    fresh = points.select(points["D"] <= points["U"] * (1 + 1e-6))
    if len(fresh) <= base.size:
        raise UsageError(
            f"{len(fresh)} rows repeat no data (D <= U), and more than {base.size} are needed to know U_N: "
            "add such rows, or a column U_N"
        )
    y = np.log(points["loss"])
    theta = fit(base, fresh.logs(base.columns), np.log(fresh["loss"]), objective).theta
    law, points = base, _with(points, U_N=np.minimum(points["N"], optimal_size(base.raw(theta), points["U"])))
    for _ in range(ROUNDS):
        x = points.logs(_law(points).columns)
        same = law.shapes == _law(points).shapes
        law = _law(points)
        theta = descend(law, theta, x, y, objective) if same else fit(law, x, y, objective, starts=5).theta
        size = np.minimum(points["N"], optimal_size(law.raw(theta), points["U"]))
        moved = np.abs(np.log(size / points["U_N"])).max()
        points = _with(points, U_N=size)
        if not moved > 1e-10:
            break
    return _law(points), points


def optimal_size(p: dict[str, float], tokens: np.ndarray) -> np.ndarray:
    """The N whose compute-optimal D is `tokens`: alpha A / N^alpha = beta B / D^beta."""
    size = (p["alpha"] * p["A"] / (p["beta"] * p["B"]) * tokens ** p["beta"]) ** (1 / p["alpha"])
    return np.where(np.isfinite(size), np.maximum(size, 1), np.inf)


def _law(points: Points) -> Law:
    return LAWS["repeat"] if np.any(points["N"] > points["U_N"] * 1.01) else without_excess_parameters()


def _with(points: Points, **columns: np.ndarray) -> Points:
    return dataclasses.replace(points, columns=points.columns | columns)
