"""Rows with known truth: additive surfaces around the optimum of each budget, and the quanta source."""

import numpy as np
from scipy.special import zeta

from lm.report.fit import FORMS
from lm.report.points import Points
from lm.report.result import Settings

QUICK = Settings(bootstrap=0)


def points(**columns):
    columns = {name: np.asarray(values) for name, values in columns.items()}
    return Points(columns, tuple(f"row {i}" for i in range(len(next(iter(columns.values()))))))


def fit(form, settings=QUICK, **columns):
    """The result of a form for columns in memory."""
    with np.errstate(all="ignore"):
        return FORMS[form].fit(form, points(**columns), settings, lambda done, total: None)


def surface(E, A, B, alpha, beta, budgets=9, sizes=9, spread=6.0, compute=(1e18, 1e22), noise=0.0, seed=0):
    """Columns N, D, C and loss: `sizes` at each budget within x/÷ `spread` of the best, noise in log loss."""
    C = np.repeat(np.geomspace(*compute, budgets), sizes)
    best = (alpha * A / (beta * B)) ** (1 / (alpha + beta)) * (C / 6) ** (beta / (alpha + beta))
    N = best * np.tile(np.geomspace(1 / spread, spread, sizes), budgets)
    D = C / 6 / N
    draws = np.random.default_rng(seed).normal(size=len(N))
    return {"N": N, "D": D, "C": C, "loss": (E + A * N**-alpha + B * D**-beta) * np.exp(noise * draws)}


class Quanta:
    """L = 1 + 2 (sum_{k > N} p_k + sum_{k <= N} p_k (1 - p_k)^D), p_k ~ k^-(1+a) (Michaud et al. 2023, 2303.13506).

    Exact: alpha = a, beta = a / (1 + a), E = 1.
    """

    def __init__(self, a, most=10**6):
        self.alpha, self.beta = a, a / (1 + a)
        self._p = np.arange(1, most + 1.0) ** -(1 + a) / zeta(1 + a)
        self._unseen = 1 - np.cumsum(self._p)

    def loss(self, N, D=np.inf):
        p = self._p[: int(N)]
        return 1 + 2 * (self._unseen[int(N) - 1] + (p * np.exp(D * np.log1p(-p))).sum())

    def budgets(self, compute=(1e8, 1e12), count=9, sizes=13, spread=6.0):
        """IsoFLOP columns, centred on the best size of the middle budget and its exact exponent."""
        middle = np.sqrt(compute[0] * compute[1])
        grid = np.unique(np.geomspace(20, 1e5, 60).astype(int))
        for _ in range(2):
            i = int(np.argmin([self.loss(n, middle / 6 / n) for n in grid]))
            best, grid = grid[i], np.unique(np.linspace(grid[max(i - 1, 0)], grid[i + 1], 100).astype(int))
        C = np.repeat(np.geomspace(*compute, count), sizes)
        N = best * (C / middle) ** (self.beta / (self.alpha + self.beta))
        N = np.round(N * np.tile(np.geomspace(1 / spread, spread, sizes), count))
        return {"N": N, "D": C / 6 / N, "C": C, "loss": [self.loss(n, c / 6 / n) for n, c in zip(N, C, strict=True)]}
