"""Scaling laws as data: each a sum of positive terms, by its terms' logarithms and their exact gradients.

A law's parameters are theta = (log of each term's coefficient, then the shape parameters), and
    log y = [outer] * log sum_j exp(log coefficient_j + log term_j(shape, x)).
With the shape given, the coefficients are a linear problem, which is where the starts come from. A further law is an
entry of LAWS: names, columns, a function of its terms, and a grid of shapes to start from.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
from scipy.special import expit, log_expit

Terms = Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]
EXPONENTS = np.array([0.02, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.5, 0.6, 0.8, 1.0, 1.5])


@dataclasses.dataclass(frozen=True)
class Law:
    """`terms(shape, x)` returns log terms [rows, terms] and their gradient [rows, terms, shapes]; x are log columns.

    `outer` is the index of the shape that is the outer exponent. `inner` gives (E, A, B, alpha, beta, outer exponent)
    where the law is of N and D, for the compute-optimal split. `report` renames parameters to the published ones.
    """

    name: str
    formula: str
    columns: tuple[str, ...]
    target: str
    coefficients: tuple[str, ...]
    shapes: tuple[str, ...]
    terms: Terms
    grid: Callable[[np.ndarray], list[np.ndarray]]
    outer: int | None = None
    inner: Callable[[dict[str, float]], tuple[float, ...]] | None = None
    report: Callable[[dict[str, float]], dict[str, float]] = dict

    @property
    def size(self) -> int:
        return len(self.coefficients) + len(self.shapes)

    def split(self, theta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return theta[: len(self.coefficients)], theta[len(self.coefficients) :]

    def raw(self, theta: np.ndarray) -> dict[str, float]:
        """Coefficients and shapes by name."""
        logs, shape = self.split(theta)
        values = (*np.exp(logs), *shape)
        return dict(zip(self.coefficients + self.shapes, values, strict=True))

    def params(self, theta: np.ndarray) -> dict[str, float]:
        """The parameters under their published names."""
        return self.report(self.raw(theta))

    def predict(self, theta: np.ndarray, x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The log-prediction [rows], its gradient by theta [rows, size], and each term's share [rows, terms]."""
        logs, shape = self.split(theta)
        terms, slopes = self.terms(shape, x)
        terms = terms + logs
        top = terms.max(axis=1)
        share = np.exp(terms - top[:, None])
        total = share.sum(axis=1)
        share /= total[:, None]
        y = top + np.log(total)
        gradient = np.concatenate([share, (share[:, :, None] * slopes).sum(axis=1)], axis=1)
        if self.outer is not None:
            scale = shape[self.outer]
            gradient *= scale
            gradient[:, len(logs) + self.outer] += y
            y = y * scale
        return y, gradient, share


def powers(exponents: Any) -> Terms:
    """Terms x^-exponent: `exponents` [terms, shapes, columns] says how each shape enters each term."""
    weights = np.asarray(exponents, float)

    def terms(shape: np.ndarray, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        slopes = -np.einsum("nc,tsc->nts", x, weights)
        return slopes @ shape, slopes

    return terms


def _kaplan_terms(shape: np.ndarray, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    slopes = np.zeros((len(x), 2, 2))
    slopes[:, 0, 0] = -x[:, 0]
    return np.stack([-shape[0] * x[:, 0], -x[:, 1]], axis=1), slopes


def _kaplan_report(p: dict[str, float]) -> dict[str, float]:
    alpha_n = p["ratio"] * p["alpha_D"]
    return {"N_c": p["N_c^ratio"] ** (1 / p["ratio"]), "D_c": p["D_c"], "alpha_N": alpha_n, "alpha_D": p["alpha_D"]}


def _effective(size: np.ndarray, unique: np.ndarray, log_r: float) -> tuple[np.ndarray, np.ndarray]:
    """The log of u + u R (1 - exp(-(size/u - 1)/R)), u = min(size, unique), and its slope by log R; sizes are logs."""
    excess, r = np.expm1(np.maximum(size - unique, 0)), np.exp(log_r)
    decay = np.exp(-excess / r)
    gained = r * (1 - decay)
    return np.minimum(size, unique) + np.log1p(gained), (gained - excess * decay) / (1 + gained)


def _repeat_terms(shape: np.ndarray, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    alpha, beta, log_r_n, log_r_d = shape
    size, slope_n = _effective(x[:, 0], x[:, 3], log_r_n)
    tokens, slope_d = _effective(x[:, 1], x[:, 2], log_r_d)
    slopes = np.zeros((len(x), 3, 4))
    slopes[:, 1, 0], slopes[:, 1, 2] = -size, -alpha * slope_n
    slopes[:, 2, 1], slopes[:, 2, 3] = -tokens, -beta * slope_d
    return np.stack([np.zeros(len(x)), -alpha * size, -beta * tokens], axis=1), slopes


def _repeat_report(p: dict[str, float]) -> dict[str, float]:
    return {k.removeprefix("log "): np.exp(v) if k.startswith("log ") else v for k, v in p.items()}


def _sigmoid_terms(shape: np.ndarray, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    loss = np.exp(x[:, 0])
    z = shape[0] * (shape[1] - loss)
    slopes = np.zeros((len(x), 2, 2))
    slopes[:, 1] = np.stack([shape[1] - loss, np.full(len(x), shape[0])], axis=1) * expit(-z)[:, None]
    return np.stack([np.zeros(len(x)), log_expit(z)], axis=1), slopes


def _decay_terms(shape: np.ndarray, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    slopes = np.stack([np.zeros(len(x)), -np.exp(x[:, 0])], axis=1)[:, :, None]
    return slopes[:, :, 0] * shape[0], slopes


def _steepness(x: np.ndarray) -> np.ndarray:
    return np.geomspace(0.5, 20, 8) / max(np.ptp(np.exp(x[:, 0])), 1e-9)


FEW = EXPONENTS[1:-1:3]
LAWS = {
    law.name: law
    for law in (
        Law(
            "chinchilla",  # Hoffmann et al. 2022, 2203.15556, eq. 2.
            "loss = E + A/N^alpha + B/D^beta",
            ("N", "D"),
            "loss",
            ("E", "A", "B"),
            ("alpha", "beta"),
            powers([[[0, 0], [0, 0]], [[1, 0], [0, 0]], [[0, 0], [0, 1]]]),
            lambda x: [EXPONENTS, EXPONENTS],
            inner=lambda p: (p["E"], p["A"], p["B"], p["alpha"], p["beta"], 1.0),
        ),
        Law(
            "kaplan",  # Kaplan et al. 2020, 2001.08361, eq. 1.5.
            "loss = ((N_c/N)^(alpha_N/alpha_D) + D_c/D)^alpha_D",
            ("N", "D"),
            "loss",
            ("N_c^ratio", "D_c"),
            ("ratio", "alpha_D"),
            _kaplan_terms,
            lambda x: [np.geomspace(0.2, 5, 15), EXPONENTS],
            outer=1,
            inner=lambda p: (0.0, p["N_c^ratio"], p["D_c"], p["ratio"], 1.0, p["alpha_D"]),
            report=_kaplan_report,
        ),
        Law(
            "overtrain",  # Gadre et al. 2024, 2403.08540, eq. 4 with C = 6ND and M = D/N.
            "loss = E + A/N^eta + B/D^eta",
            ("N", "D"),
            "loss",
            ("E", "A", "B"),
            ("eta",),
            powers([[[0, 0]], [[1, 0]], [[0, 1]]]),
            lambda x: [EXPONENTS],
            inner=lambda p: (p["E"], p["A"], p["B"], p["eta"], p["eta"], 1.0),
        ),
        Law(
            "repeat",  # Muennighoff et al. 2023, 2305.16264, eq. 5 to 7.
            "loss = E + A/N'^alpha + B/D'^beta, D' = U + U R_D (1 - exp(-(D/U - 1)/R_D)), N' likewise from U_N",
            ("N", "D", "U", "U_N"),
            "loss",
            ("E", "A", "B"),
            ("alpha", "beta", "log R_N", "log R_D"),
            _repeat_terms,
            lambda x: [FEW, FEW, np.log([1, 4, 16, 64]), np.log([1, 4, 16, 64])],
            inner=lambda p: (p["E"], p["A"], p["B"], p["alpha"], p["beta"], 1.0),
            report=_repeat_report,
        ),
        Law(
            "cbs",  # McCandlish et al. 2018, 1812.06162, eq. 2.11: B_crit = E_min / S_min.
            "steps = S_min + E_min/batch",
            ("batch",),
            "steps",
            ("S_min", "E_min"),
            (),
            lambda shape, x: (np.stack([np.zeros(len(x)), -x[:, 0]], axis=1), np.zeros((len(x), 2, 0))),
            lambda x: [],
        ),
        Law(
            "accuracy",  # Bhagia et al. 2024, 2412.04403, eq. 3.
            "accuracy = floor + rise / (1 + exp(-k (L_0 - loss)))",
            ("loss",),
            "accuracy",
            ("floor", "rise"),
            ("k", "L_0"),
            _sigmoid_terms,
            lambda x: [_steepness(x), np.quantile(np.exp(x[:, 0]), [0, 0.25, 0.5, 0.75, 1])],
        ),
        Law(
            "error",  # Gadre et al. 2024, 2403.08540, eq. 5, of the share that is right: its terms are positive.
            "1 - error = floor + k exp(-gamma loss)",
            ("loss",),
            "right",
            ("floor", "k"),
            ("gamma",),
            _decay_terms,
            lambda x: [_steepness(x)],
        ),
    )
}


def power(column: str, target: str, floor: bool) -> Law:
    """The law of one variable, y = [E +] A / x^alpha."""
    exponents = [[[0]], [[1]]] if floor else [[[1]]]
    formula = f"{target} = {'E + ' if floor else ''}A/{column}^alpha"
    names = ("E", "A") if floor else ("A",)
    return Law("power", formula, (column,), target, names, ("alpha",), powers(exponents), lambda x: [EXPONENTS])


def without_excess_parameters() -> Law:
    """`repeat` for rows of which none has more parameters than its unique data calls for: they say nothing of R_N."""
    law = LAWS["repeat"]

    def terms(shape: np.ndarray, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        logs, slopes = law.terms(np.insert(shape, 2, 0.0), x)
        return logs, np.delete(slopes, 2, axis=2)

    shapes = tuple(s for s in law.shapes if s != "log R_N")
    return dataclasses.replace(law, shapes=shapes, terms=terms, grid=lambda x: law.grid(x)[:2] + law.grid(x)[3:])
