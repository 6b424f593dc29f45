"""The fit of a law, or of one law after another: point fit, intervals, derived quantities and diagnostics."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from lm.core.errors import UsageError
from lm.report import bootstrap, diagnostics, doubts, exponents, figures
from lm.report.laws import Law
from lm.report.minimize import descend, fit
from lm.report.optimum import derived
from lm.report.points import Points, listed
from lm.report.result import Result, Settings


def fit_laws(
    form: str, laws: Sequence[Law], points: Points, settings: Settings, progress: bootstrap.Progress
) -> Result:
    """The result of `laws` in turn; the second (of a task) reads the measured target of the first.

    Raises:
      UsageError: fewer rows than parameters, or a column of too few distinct values.
    """
    every, points = points, points.drop_highest(settings.drop_highest, laws[0].target)
    for law in laws:
        check(law, points)
    if settings.predict and len(settings.predict) != len(laws[0].columns):
        raise UsageError(f"--predict takes {','.join(laws[0].columns)}, and got {len(settings.predict)} values")
    data = [_data(law, points) for law in laws]
    minima = [fit(law, x, y, settings.objective) for law, (x, y) in zip(laws, data, strict=True)]
    thetas = [found.theta for found in minima]
    unit, warning = bootstrap.units(points)

    def draw(rng: np.random.Generator) -> dict[str, float]:
        weights = bootstrap.weights(unit, rng)
        drawn = [
            descend(law, theta, x, y, settings.objective, weights, rounds=2)
            for law, theta, (x, y) in zip(laws, thetas, data, strict=True)
        ]
        return _params(laws, drawn) | _derived(laws, drawn, points, settings)

    edges, errors = bootstrap.intervals(draw, settings.bootstrap, settings.seed, progress)
    params = _params(laws, thetas)
    checks: dict[str, Any] = {}
    warnings = [*points.warnings, *([warning] if warning else [])]
    for law, found, (x, y) in zip(laws, minima, data, strict=True):
        own = diagnostics.examine(law, found, x, y, settings.objective)
        own["drop_sensitivity"] = _named(
            law, points, diagnostics.drops(law, found.theta, *_data(law, every), settings.objective)
        )
        own["delta_sensitivity"] = _named(law, points, diagnostics.deltas(law, found.theta, x, y))
        checks |= own if law is laws[0] else {law.target: own}
        warnings += doubts.of_fit(law, own, len(points))
    if laws[0].inner is not None:
        checks |= exponents.of_law(laws[0], points, settings.objective)
    warnings += doubts.of_use(laws[0], points, params, errors, settings)
    return Result(
        form=form,
        formula="; ".join(law.formula for law in laws),
        rows=len(points),
        params=params,
        derived=_derived(laws, thetas, points, settings),
        objective=sum(found.value for found in minima),
        intervals=edges,
        standard_errors=errors,
        diagnostics=checks,
        warnings=warnings,
        draw=lambda figure: figures.draw_laws(figure, laws, thetas, points),
    )


def check(law: Law, points: Points) -> None:
    """Raises UsageError where the rows cannot determine the law's parameters."""
    if len(points) < law.size:
        raise UsageError(
            f"{len(points)} rows are fewer than the {law.size} parameters of {law.formula}: {listed(points.names)}"
        )
    needed = 3 if "E" in law.coefficients or len(law.columns) == 1 and law.size > 2 else 2
    for column in law.columns:
        values = np.unique(points[column])
        if column not in ("U", "U_N") and len(values) < needed:
            raise UsageError(
                f"{column} has {len(values)} distinct values ({', '.join(f'{v:g}' for v in values)}) in {len(points)} "
                f"rows, and {law.formula} needs at least {needed}: {listed(points.names)}"
            )


def _data(law: Law, points: Points) -> tuple[np.ndarray, np.ndarray]:
    return points.logs(law.columns), np.log(points[law.target])


def _params(laws: Sequence[Law], thetas: Sequence[np.ndarray]) -> dict[str, float]:
    return {k: v for law, theta in zip(laws, thetas, strict=True) for k, v in law.params(theta).items()}


def _derived(laws: Sequence[Law], thetas: Sequence[np.ndarray], points: Points, settings: Settings) -> dict[str, float]:
    """Optimal exponents and sizes, and the predictions of --predict."""
    values = {}
    if laws[0].inner is not None:
        compute = points["C"] if "C" in points else 6 * points["N"] * points["D"]
        k = float(np.exp(np.mean(np.log(compute / points["N"] / points["D"]))))
        values = derived(laws[0], thetas[0], k, settings.budget or float(compute.max()))
    if laws[0].name == "cbs":
        p = laws[0].params(thetas[0])
        values["critical_batch"] = p["E_min"] / p["S_min"]
    if settings.predict:
        x = np.log([settings.predict])
        for law, theta in zip(laws, thetas, strict=True):
            x = law.predict(theta, x)[0][:, None]
            values[f"predicted_{law.target}"] = float(np.exp(x[0, 0]))
        if "predicted_right" in values:
            values["predicted_error"] = 1 - values.pop("predicted_right")
    return values


def _named(law: Law, points: Points, thetas: dict[str, np.ndarray]) -> dict[str, dict[str, float]]:
    """The parameters and optimal exponents of each fit, by name."""
    found = {}
    for name, theta in thetas.items():
        optimal = _derived([law], [theta], points, Settings())
        found[name] = law.params(theta) | {k: optimal[k] for k in ("a", "b") if k in optimal}
    return found
