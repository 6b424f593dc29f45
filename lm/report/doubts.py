"""The warnings of a fit: what its numbers do not carry, each naming the numbers that say so."""

from typing import Any

import numpy as np

from lm.report.laws import Law
from lm.report.points import Points, listed
from lm.report.result import Settings

REJECT = 0.01  # The p below which a law is said not to fit.
FAR = 10.0  # How far beyond the rows a prediction is pointed out.


def of_fit(law: Law, checks: dict[str, Any], rows: int) -> list[str]:
    """What the diagnostics of one law say against it."""
    found = []
    if rows < law.size + 3:
        found.append(f"{rows} rows for {law.size} parameters leave nothing to check the law with")
    for name in checks["bound_hits"]:
        found.append(f"{name} ended at its bound: the rows show no positive value of it")
    if checks["share_at_best"] < 0.2:
        found.append(f"only {checks['share_at_best']:.0%} of {checks['starts']} starts reached the best objective")
    if checks["condition_number"] > 1e12:
        found.append(f"condition number {checks['condition_number']:.1e}: the rows do not tell the parameters apart")
    test = checks["lack_of_fit"]
    if test and test["p"] < REJECT:
        found.append(
            f"lack of fit of {law.formula} against {test['against']}: F({test['df'][0]}, {test['df'][1]}) = "
            f"{test['F']:.3g}, p = {test['p']:.1e}, residual SD {checks['residual_sd']:.2g} in log {law.target}"
        )
    far = checks["held_out"]
    if far and far["rms"] > 3 * far["rms_of_fitted_rows"] and far["rms"] > 1e-6:
        found.append(
            f"when left out, the far end ({far['rows']} rows) is missed by {far['rms']:.2g} in log {law.target}, "
            f"the fitted rows by {far['rms_of_fitted_rows']:.2g}"
        )
    return found


def of_use(
    law: Law, points: Points, values: dict[str, float], errors: dict[str, float], settings: Settings
) -> list[str]:
    """What the rows do not carry: undetermined exponents, tied columns, predictions far beyond them."""
    found = []
    for name in law.shapes:
        if errors.get(name, 0) > abs(values.get(name, np.inf)) / 2:
            found.append(f"{name} = {values[name]:.3g} has a standard error of {errors[name]:.2g}")
    if {"N", "D"} <= set(law.columns):
        r = np.corrcoef(np.log(points["N"]), np.log(points["D"]))[0, 1]
        if abs(r) > 0.98:
            found.append(f"log N and log D correlate {r:.3f}: their terms are hardly told apart")
        if "C" in points:
            k = points["C"] / points["N"] / points["D"]
            if k.max() > 1.1 * k.min():
                found.append(f"C / ND runs from {k.min():.3g} to {k.max():.3g}: N* and D* take the geometric mean")
    for column, value in zip(law.columns, settings.predict, strict=False):
        low, high = points[column].min(), points[column].max()
        if not low / FAR <= value <= high * FAR:
            found.append(
                f"--predict: {column} = {value:g} is more than {FAR:g} times beyond the rows ({low:g} to {high:g})"
            )
    rows = np.column_stack([points.logs(law.columns), points[law.target]])
    first = np.unique(rows, axis=0, return_index=True)[1]
    if len(first) < len(rows):
        repeated = np.setdiff1d(np.arange(len(rows)), first)
        found.append(f"the same row again, counted each time: {listed([points.names[i] for i in repeated])}")
    return found
