"""Which source of a mixture the i-th example comes from: exact shares, evenly spread, in closed form."""

import math

import numpy as np

from lm.core.errors import UsageError

_LONGEST_PERIOD = 1 << 20


class Schedule:
    """A period of sum(weights) examples in which source k comes exactly weights[k] times.

    Within the period the j-th example of source k is due at (j + 1/2) / weights[k], and the examples come in
    the order in which they are due.
    """

    def __init__(self, weights: tuple[int, ...]):
        if not weights or any(not isinstance(w, int) or w < 1 for w in weights):
            raise UsageError(f"mixture weights {weights} must be whole numbers above 0, such as 3 and 1")
        self.weights = np.array(weights, np.int64) // math.gcd(*weights)
        self.period = int(self.weights.sum())
        if self.period > _LONGEST_PERIOD:
            raise UsageError(f"mixture weights {weights} sum to {self.period} in lowest terms: use at most 2^20")
        due = np.concatenate([(np.arange(w) + 0.5) / w for w in self.weights])
        source = np.repeat(np.arange(len(weights)), self.weights)
        self._source = source[np.argsort(due, kind="stable")]
        taken = np.zeros(len(weights), np.int64)
        self._before = np.empty(self.period, np.int64)
        for i, k in enumerate(self._source.tolist()):
            self._before[i] = taken[k]
            taken[k] += 1

    def locate(self, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(source, example within the source) of each example of the mixture, int64."""
        period, place = np.divmod(np.asarray(index, np.int64), self.period)
        source = self._source[place]
        return source, period * self.weights[source] + self._before[place]
