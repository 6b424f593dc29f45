"""Laws of the best learning rate and batch size in N and D, and the regret of following them.

Each (N, D) is a setting. A quadratic surface in the logs of learning rate and batch, around the best row, gives its
optimum; least squares gives log lr* and log batch* in log N and log D (Li et al. 2025, 2503.04715).
"""

import dataclasses

import numpy as np

from lm.core.errors import UsageError
from lm.report import bootstrap, figures
from lm.report.points import Points, listed
from lm.report.result import Result, Settings

AROUND = 2  # Values of the grid on each side of the best row that the surface is fitted to: far off it is no quadratic.
TIED = 0.999


@dataclasses.dataclass(frozen=True)
class Surface:
    """A setting's quadratic: loss = level + (z - best)' curvature (z - best) / 2, with z the logs of the choices."""

    setting: np.ndarray
    best: np.ndarray
    level: float
    curvature: np.ndarray
    rows: np.ndarray
    residuals: np.ndarray

    def regret(self, z: np.ndarray) -> float:
        """Nats above the optimum at the choice `z`."""
        return float((z - self.best) @ self.curvature @ (z - self.best) / 2)


def fit_hparams(form: str, points: Points, settings: Settings, progress: bootstrap.Progress) -> Result:
    """The laws of lr* and, where several batch sizes were run, of batch*. Raises UsageError of too few settings."""
    points = points.drop_highest(settings.drop_highest, "loss")
    choices = [c for c in ("lr", "batch") if c in points and len(np.unique(points[c])) > 2]
    if not choices:
        raise UsageError(f"neither lr nor batch has three values or more in {len(points)} rows: nothing to choose from")
    surfaces, left_out = surfaces_of(points, choices)
    warnings = [*points.warnings, *left_out]
    columns, tied = predictors(np.array([s.setting for s in surfaces]))
    warnings += tied
    if len(surfaces) < len(columns) + 1 or not columns:
        why = "; ".join(warnings) or "every row has the same N and D"
        raise UsageError(
            f"{len(surfaces)} settings of N and D have an optimum inside the grid, too few for a law: {why}"
        )
    if len(surfaces) < len(columns) + 3:
        warnings.append(
            f"{len(surfaces)} settings for {len(columns) + 1} parameters leave nothing to check the law with"
        )
    residuals = np.concatenate([s.residuals for s in surfaces])
    free = sum(len(s.residuals) - _coefficients(len(choices)) for s in surfaces)
    noise = float(np.sqrt(residuals @ residuals / free)) if free > 0 else 0.0
    if free <= 0 and settings.bootstrap:
        warnings.append("no row is left over by the surfaces: the intervals know no noise")

    def draw(rng: np.random.Generator) -> dict[str, float]:
        noisy = dict(points.columns, loss=points["loss"] + rng.normal(0, noise, len(points)))
        again = surfaces_of(Points(noisy, points.names), choices)[0]
        return law(again, choices, columns, settings.predict)[0] if len(again) > len(columns) else {}

    edges, errors = bootstrap.intervals(draw, settings.bootstrap, settings.seed, progress)
    values, predicted = law(surfaces, choices, columns, settings.predict)
    misses = np.array([s.best for s in surfaces]) - predicted
    regrets = [s.regret(z) for s, z in zip(surfaces, predicted, strict=True)]
    derived = {"mean_regret": float(np.mean(regrets)), "largest_regret": float(np.max(regrets))}
    return Result(
        form=form,
        formula=", ".join(f"{c}* = c {' '.join(f'{x}^p_{x}' for x in columns)}" for c in choices),
        rows=len(points),
        params={k: v for k, v in values.items() if not k.startswith("predicted")},
        derived=derived | {k: v for k, v in values.items() if k.startswith("predicted")},
        objective=float((misses**2).sum()),
        intervals=edges,
        standard_errors=errors,
        diagnostics={
            "settings": [
                dict(zip(("N", "D"), map(float, np.exp(s.setting)), strict=True))
                | {f"{c}*": float(z) for c, z in zip(choices, np.exp(s.best), strict=True)}
                | {"loss*": s.level, "regret": r}
                for s, r in zip(surfaces, regrets, strict=True)
            ],
            "residual_sd": [float(v) for v in misses.std(axis=0)],
            "noise_sd": noise,
        },
        warnings=warnings,
        draw=lambda figure: figures.draw_hparams(figure, surfaces, predicted, choices, points),
    )


def surfaces_of(points: Points, choices: list[str]) -> tuple[list[Surface], list[str]]:
    """The surfaces of the settings whose optimum lies inside their grid, and warnings about the others."""
    settings, inverse = np.unique(points.logs(["N", "D"]).round(9), axis=0, return_inverse=True)
    surfaces, edge, few = [], [], []
    for i, setting in enumerate(settings):
        rows = np.flatnonzero(inverse.ravel() == i)
        name = f"N = {np.exp(setting[0]):.3g}, D = {np.exp(setting[1]):.3g}"
        z, loss = points.logs(choices)[rows], points["loss"][rows]
        best = z[np.argmin(loss)]
        named = f"{name} (best: {points.names[rows[np.argmin(loss)]]})"
        if np.any((best == z.min(axis=0)) | (best == z.max(axis=0))):
            edge.append(named)
            continue
        near = np.all([_near(z[:, j], best[j]) for j in range(len(choices))], axis=0)
        surface = _surface(setting, z[near], loss[near], rows[near])
        if surface is None:
            few.append(named)
        elif np.any((surface.best < z[near].min(axis=0)) | (surface.best > z[near].max(axis=0))):
            edge.append(named)
        else:
            surfaces.append(surface)
    warnings = [f"left out, the optimum is at the edge of the grid: {listed(edge)}"] if edge else []
    return surfaces, warnings + ([f"left out, the rows give no surface with a minimum: {listed(few)}"] if few else [])


def predictors(settings: np.ndarray) -> tuple[list[str], list[str]]:
    """Which of N and D the laws are in, and a warning where the two rise together."""
    if not len(settings):
        return [], []
    columns = [c for c, values in zip(("N", "D"), settings.T, strict=True) if np.ptp(values) > 1e-6]
    if len(columns) == 2 and len(settings) > 1 and abs(np.corrcoef(settings.T)[0, 1]) > TIED:
        return ["N"], ["N and D rise together in all settings: the laws are in N alone"]
    return columns, []


def law(
    surfaces: list[Surface], choices: list[str], columns: list[str], predict: tuple[float, ...]
) -> tuple[dict[str, float], np.ndarray]:
    """The laws' constants, exponents and predictions by name, and the log choices predicted for each setting."""
    index = [("N", "D").index(c) for c in columns]
    settings = np.array([s.setting for s in surfaces])[:, index]
    design = np.column_stack([np.ones(len(settings)), settings])
    solution, *_ = np.linalg.lstsq(design, np.array([s.best for s in surfaces]), rcond=None)
    values = {}
    for choice, (level, *exponents) in zip(choices, solution.T, strict=True):
        values[f"{choice}_constant"] = float(np.exp(level))
        values |= {f"{choice}_{c}": float(e) for c, e in zip(columns, exponents, strict=True)}
        if predict:
            values[f"predicted_{choice}"] = float(np.exp(level + np.log(predict)[index] @ exponents))
    return values, design @ solution


def _near(z: np.ndarray, best: float) -> np.ndarray:
    grid = np.unique(z)
    return np.abs(np.searchsorted(grid, z) - np.searchsorted(grid, best)) <= AROUND


def _coefficients(dims: int) -> int:
    return 1 + dims + dims * (dims + 1) // 2


def _surface(setting: np.ndarray, z: np.ndarray, loss: np.ndarray, rows: np.ndarray) -> Surface | None:
    """None of too few rows, or of a quadratic without a minimum."""
    dims = z.shape[1]
    centre = z.mean(axis=0)
    u = z - centre
    pairs = [(i, j) for i in range(dims) for j in range(i, dims)]
    design = np.column_stack([np.ones(len(u)), u, *(u[:, i] * u[:, j] for i, j in pairs)])
    if np.linalg.matrix_rank(design) < design.shape[1]:
        return None
    solution, *_ = np.linalg.lstsq(design, loss, rcond=None)
    curvature = np.zeros((dims, dims))
    for (i, j), c in zip(pairs, solution[1 + dims :], strict=True):
        curvature[i, j] += c
        curvature[j, i] += c
    if np.linalg.eigvalsh(curvature)[0] <= 0:
        return None
    slope = solution[1 : 1 + dims]
    best = -np.linalg.solve(curvature, slope)
    level = float(solution[0] + slope @ best / 2)
    return Surface(setting, centre + best, level, curvature, rows, loss - design @ solution)
