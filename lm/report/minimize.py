"""The minimum of a law's objective: starts by variable projection, then BFGS with exact gradients.

The objective is the sum over rows of Huber(log prediction - log target) (Hoffmann et al. 2022, section 3.3). A sum,
never a mean: an averaged objective is so small that optimisers stop where they stand.
"""

import dataclasses
import itertools

import numpy as np
from scipy.optimize import minimize, nnls
from scipy.special import huber

from lm.report.laws import Law

ROUNDING = 1e-30  # A mean square below this is the rounding of logarithms.
SAME = 1e-6  # Relative distance from the best objective at which a start has reached it too.


@dataclasses.dataclass(frozen=True)
class Objective:
    """huber (`delta`), lad (the sum of absolute deviations) or mse (the sum of squares), of log residuals."""

    name: str = "huber"
    delta: float = 1e-3

    @property
    def deltas(self) -> tuple[float, ...]:
        """The thresholds to go through: absolute deviations are approached from a smooth objective."""
        return {"huber": (self.delta,), "mse": (np.inf,), "lad": (1e-3, 1e-4, 1e-5, 1e-6)}[self.name]

    def sum(self, residuals: np.ndarray) -> float:
        if self.name == "lad":
            return float(np.abs(residuals).sum())
        return float((2 if self.name == "mse" else 1) * huber(self.deltas[-1], residuals).sum())


@dataclasses.dataclass(frozen=True)
class Minimum:
    """The best parameters, the minimised sum, and the objectives that all starts ended at."""

    theta: np.ndarray
    value: float
    ends: np.ndarray

    @property
    def share(self) -> float:
        """The share of starts that reached the best."""
        return float(np.mean(self.ends <= self.value * (1 + SAME) + 1e-20))


def fit(law: Law, x: np.ndarray, y: np.ndarray, objective: Objective, starts: int = 20) -> Minimum:
    """The minimum over starts: the best of the grid, and the others spread over its ranks. y are log targets."""
    thetas = projected(law, x, y)
    chosen = np.unique(np.linspace(0, len(thetas) - 1, starts).round().astype(int))
    ends = [descend(law, thetas[i], x, y, objective) for i in chosen]
    values = np.array([objective.sum(law.predict(theta, x)[0] - y) for theta in ends])
    best = int(np.nanargmin(values))
    return Minimum(ends[best], float(values[best]), values)


def projected(law: Law, x: np.ndarray, y: np.ndarray) -> list[np.ndarray]:
    """A start for each shape of the law's grid, by rising sum of squares of the raw target.

    With the shape given the coefficients are non-negative least squares (variable projection, Golub and Pereyra 1973).
    """
    found = []
    for values in itertools.product(*law.grid(x)):
        shape = np.array(values)
        target = y if law.outer is None else y / shape[law.outer]
        terms = law.terms(shape, x)[0]
        top = terms.max(axis=0)
        solution, _ = nnls(np.exp(terms - top), np.exp(target - target.max()))
        # A coefficient of zero has no logarithm: it starts at a small share instead.
        logs = np.log(np.maximum(solution, 1e-4 * np.exp(target - target.max()).mean())) + target.max() - top
        theta = np.concatenate([logs, shape])
        error = np.exp(law.predict(theta, x)[0] - y.max()) - np.exp(y - y.max())
        found.append((float(error @ error), theta))
    return [theta for _, theta in sorted(found, key=lambda pair: pair[0])]


def descend(
    law: Law,
    theta: np.ndarray,
    x: np.ndarray,
    y: np.ndarray,
    objective: Objective,
    weights: np.ndarray | None = None,
    rounds: int = 10,
) -> np.ndarray:
    """The end of BFGS from `theta`, in coordinates in which the gradients of the predictions are orthonormal.

    Coefficients and exponents correlate 0.999, so BFGS in the parameters themselves stalls. Each round starts from
    fresh coordinates, until the gradient is what rounding leaves of it.
    """
    weights = np.ones(len(y)) if weights is None else weights
    for delta in objective.deltas:
        previous = np.inf
        for _ in range(rounds):
            prediction, gradient, _ = law.predict(theta, x)
            value = float(weights @ huber(delta, prediction - y))
            if not value < previous * (1 - 1e-9) or value < ROUNDING * len(y):
                break
            previous = value
            basis = _whiten(gradient * np.sqrt(weights)[:, None])

            def step(z: np.ndarray, theta=theta, basis=basis, delta=delta) -> tuple[float, np.ndarray]:
                prediction, gradient, _ = law.predict(theta + basis @ z, x)
                residual = prediction - y
                slope = (weights * np.clip(residual, -delta, delta)) @ gradient @ basis
                total = float(weights @ huber(delta, residual))
                return (total, slope) if np.isfinite(total) and np.isfinite(slope).all() else (1e300, np.zeros_like(z))

            # A gradient below this changes the sum by less than it is rounded; fresh coordinates beat many iterations.
            options = {"gtol": 1e-8 * np.sqrt(value), "maxiter": 100}
            ended = minimize(step, np.zeros(len(theta)), jac=True, method="BFGS", options=options)
            if not ended.fun < value:
                break
            theta = theta + basis @ ended.x
    return theta


def _whiten(gradient: np.ndarray) -> np.ndarray:
    """The matrix that makes the columns of `gradient` orthonormal; directions without effect keep a bounded length."""
    norms = np.maximum(np.linalg.norm(gradient, axis=0), 1e-9 * np.linalg.norm(gradient) + 1e-300)
    _, values, rows = np.linalg.svd(gradient / norms, full_matrices=False)
    return (rows.T / np.maximum(values, 1e-7 * values[0])) / norms[:, None]
