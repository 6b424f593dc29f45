"""Whether a fit can be believed: convergence, conditioning, sensitivity, lack of fit, and error beyond the rows."""

from typing import Any

import numpy as np
from scipy import stats

from lm.report.laws import Law
from lm.report.minimize import Minimum, Objective, descend, fit

DROPS = (0, 1, 3, 5, 10, 20)
OBJECTIVES = {
    "lad": Objective("lad"),
    "1e-4": Objective("huber", 1e-4),
    "1e-3": Objective("huber", 1e-3),
    "1e-2": Objective("huber", 1e-2),
    "mse": Objective("mse"),
}
EXACT = 1e-8  # A residual below this is the rounding of a law without noise.


def examine(law: Law, found: Minimum, x: np.ndarray, y: np.ndarray, objective: Objective) -> dict[str, Any]:
    """Convergence, conditioning, residuals, lack of fit and held-out error, by name."""
    prediction, gradient, share = law.predict(found.theta, x)
    residual = prediction - y
    slope = np.clip(residual, -objective.deltas[-1], objective.deltas[-1]) @ gradient
    coefficients = zip(law.coefficients, share.max(axis=0), strict=True)
    shapes = zip(law.shapes, law.split(found.theta)[1], strict=True)
    hits = [name for name, value in [*coefficients, *shapes] if not name.startswith("log") and value < 1e-4]
    free = gradient[:, [name not in hits for name in law.coefficients + law.shapes]]
    return {
        "gradient_norm": float(np.linalg.norm(slope)),
        "share_at_best": found.share,
        "starts": len(found.ends),
        "bound_hits": hits,
        "condition_number": float(np.linalg.cond(free / np.linalg.norm(free, axis=0)) ** 2),
        "residual_sd": float(np.sqrt(residual @ residual / max(len(y) - law.size, 1))),
        "robust_residual_sd": float(stats.median_abs_deviation(residual, scale="normal")),
        "lack_of_fit": lack_of_fit(law, found.theta, x, y),
        "held_out": held_out(law, x, y, objective),
    }


def deltas(law: Law, theta: np.ndarray, x: np.ndarray, y: np.ndarray) -> dict[str, np.ndarray]:
    """{objective: parameters} of the same rows."""
    return {name: descend(law, theta, x, y, other) for name, other in OBJECTIVES.items()}


def drops(law: Law, theta: np.ndarray, x: np.ndarray, y: np.ndarray, objective: Objective) -> dict[str, np.ndarray]:
    """{k: parameters} without the k highest targets, as long as rows are left for a fit."""
    order = np.argsort(y, kind="stable")
    counts = [k for k in DROPS if len(y) - k > law.size + 1 and k <= len(y) / 4]
    return {str(k): descend(law, theta, *_take(order[: len(y) - k], x, y), objective) for k in counts}


def held_out(law: Law, x: np.ndarray, y: np.ndarray, objective: Objective) -> dict[str, float] | None:
    """The error in log target on the fifth of the rows at the far end, of a fit to the rest; None of too few rows.

    The far end is the most compute, the greatest value of a single column, or the lowest loss.
    """
    far = -x[:, 0] if law.columns == ("loss",) else x[:, :2].sum(axis=1)
    order = np.argsort(far, kind="stable")
    count = len(y) // 5
    if count < 1 or len(y) - count < law.size + 2:
        return None
    theta = fit(law, *_take(order[:-count], x, y), objective, starts=5).theta
    error = law.predict(theta, x)[0] - y
    rms = [float(np.sqrt(np.mean(error[part] ** 2))) for part in (order[-count:], order[:-count])]
    return {"rows": count, "rms": rms[0], "mean": float(error[order[-count:]].mean()), "rms_of_fitted_rows": rms[1]}


def lack_of_fit(law: Law, theta: np.ndarray, x: np.ndarray, y: np.ndarray) -> dict[str, Any] | None:
    """An F test on log residuals by least squares; None of too few rows, or of residuals that are rounding.

    Against replicates (rows that differ in the seed alone) where there are at least three more rows than settings;
    else against structure: whether a polynomial in the log columns predicts the residuals better than chance.
    """
    x, y = _distinct(x, y)
    theta = descend(law, theta, x, y, Objective("mse"))
    prediction, gradient, _ = law.predict(theta, x)
    residual = y - prediction
    if np.sqrt(np.mean(residual**2)) < EXACT:
        return None
    settings = np.unique(x.round(9), axis=0, return_inverse=True)[1].ravel()
    count = int(settings.max()) + 1
    if len(y) - count >= 3 and count > law.size:
        means = np.bincount(settings, residual) / np.bincount(settings)
        pure = float(np.sum((residual - means[settings]) ** 2))
        free = (count - law.size, len(y) - count)
        test = _f_test("replicates", float(residual @ residual), pure, *free)
        return test | {"replicate_sd": float(np.sqrt(pure / free[1]))}
    for degree in (3, 2, 1):
        extended = np.concatenate([gradient, _polynomial(x, degree)], axis=1)
        extended /= np.maximum(np.linalg.norm(extended, axis=0), 1e-300)
        solution, _, rank, _ = np.linalg.lstsq(extended, residual, rcond=1e-8)
        added = rank - np.linalg.matrix_rank(extended[:, : law.size], rtol=1e-8)
        if added > 0 and len(y) - rank >= max(4, added):
            left = residual - extended @ solution
            return _f_test("structure", float(residual @ residual), float(left @ left), added, len(y) - rank)
    return None


def _f_test(against: str, total: float, left: float, added: int, free: int) -> dict[str, Any]:
    f = max(total - left, 0.0) / added / (max(left, 1e-300) / free)
    return {"against": against, "F": float(f), "p": float(stats.f.sf(f, added, free)), "df": [int(added), int(free)]}


def _distinct(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Without repetitions of a whole row, which are no replicates."""
    rows = np.unique(np.column_stack([x, y]), axis=0)
    return rows[:, :-1], rows[:, -1]


def _polynomial(x: np.ndarray, degree: int) -> np.ndarray:
    """All monomials of at most `degree` in the standardised columns that vary."""
    x = x[:, np.ptp(x, axis=0) > 1e-9]
    z = (x - x.mean(axis=0)) / x.std(axis=0)
    powers = [p for p in np.ndindex(*[degree + 1] * z.shape[1]) if 0 < sum(p) <= degree]
    return np.stack([np.prod(z ** np.array(p), axis=1) for p in powers], axis=1)


def _take(index: np.ndarray, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return x[index], y[index]
