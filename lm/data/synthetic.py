"""Text drawn from a known process, of which the best that a model can do is known."""

import bisect
import dataclasses
import functools
import typing
import urllib.parse
from collections.abc import Iterator

import numpy as np
from scipy import special

from lm.core.errors import UsageError, unknown

_FLOOR = 0.01  # This part of every row is uniform, so that no probability is zero and the chain mixes.


@dataclasses.dataclass(frozen=True)
class Markov:
    """A stationary Markov chain whose rows are drawn from a symmetric Dirichlet distribution.

    With `decay` its rows are instead the softmax of a matrix whose k-th term, of rank one, is k^-decay times random
    normal vectors: a model of rank r learns the first r, and its loss falls as a power of r. Symbol i is the i-th
    character of an ascending alphabet, so that kind `char` gives it the id i.
    """

    symbols: int = 64
    order: int = 1
    seed: int = 0
    tokens: int = 2_000_000
    concentration: float = 0.2
    decay: float = 0.0

    def __post_init__(self):
        positive = self.order >= 1 and self.tokens >= 1 and self.concentration > 0
        if not (2 <= self.symbols <= 20_000 and positive and self.decay >= 0):
            raise UsageError(f"synthetic:markov needs 2 to 20,000 symbols and positive settings, got {self}")
        if self.symbols ** (self.order + 1) > 1 << 22:
            raise UsageError(
                f"synthetic:markov with symbols={self.symbols} and order={self.order} has over 2^22 entries"
            )

    @functools.cached_property
    def transition(self) -> np.ndarray:
        """[contexts, symbols] float64; a context is its `order` symbols as digits, the oldest first."""
        rng = np.random.default_rng([self.seed, 0])
        if self.decay:
            scales = np.arange(1, self.symbols + 1) ** -self.decay
            left, right = (rng.standard_normal((n, self.symbols)) for n in (self.symbols**self.order, self.symbols))
            return special.softmax(left * scales @ right.T, axis=1)
        rows = rng.dirichlet(np.full(self.symbols, self.concentration), self.symbols**self.order)
        return (1 - _FLOOR) * rows + _FLOOR / self.symbols

    @functools.cached_property
    def stationary(self) -> np.ndarray:
        """[contexts] float64, the fixed point of the chain."""
        share = np.full(len(self.transition), 1 / len(self.transition))
        for _ in range(10_000):
            joint = (share[:, None] * self.transition).reshape(self.symbols, -1, self.symbols)
            after = joint.sum(0).reshape(-1)
            if np.abs(after - share).max() < 1e-15:
                break
            share = after
        return share / share.sum()

    @functools.cached_property
    def entropy_rate(self) -> float:
        """Nats per symbol, exact."""
        return float(-(self.stationary[:, None] * self.transition * np.log(self.transition)).sum())

    def sample(self) -> np.ndarray:
        """[tokens] int32, started from the stationary distribution."""
        rng = np.random.default_rng([self.seed, 1])
        context = int(rng.choice(len(self.stationary), p=self.stationary))
        cumulative = np.cumsum(self.transition, axis=1)
        cumulative[:, -1] = 1.0
        rows, forget = cumulative.tolist(), self.symbols ** (self.order - 1)
        drawn = []
        for uniform in rng.random(self.tokens).tolist():
            symbol = bisect.bisect_right(rows[context], uniform)
            context = context % forget * self.symbols + symbol
            drawn.append(symbol)
        return np.array(drawn, np.int32)

    def log_probability(self, symbols: np.ndarray) -> np.ndarray:
        """ln p of each symbol after the first `order`, given all before it: [len(symbols) - order] float64."""
        symbols = np.asarray(symbols, np.int64)
        count = len(symbols) - self.order
        context = np.zeros(count, np.int64)
        for i in range(self.order):
            context = context * self.symbols + symbols[i : i + count]
        return np.log(self.transition[context, symbols[self.order :]])

    def documents(self) -> Iterator[str]:
        """One, the whole sample."""
        yield self.text()

    def text(self) -> str:
        """The sample as characters."""
        return _characters(self.sample(), self.symbols)

    def read(self, text: str) -> np.ndarray:
        """The symbols of such text, int32: the inverse of `text`."""
        return (np.frombuffer(text.encode("utf-32-le"), "<u4") - _first(self.symbols)).astype(np.int32)


@dataclasses.dataclass(frozen=True)
class Copy:
    """Documents 0w0w of `length`, w of `symbols` random symbols (Kitaev et al. 2020, 2001.04451, section 5).

    What follows the second 0 can be told from the first half alone, where each symbol costs ln `symbols` nats. Symbol
    i, and 0, are characters as those of Markov.
    """

    symbols: int = 127
    length: int = 256
    total: int = 20_000
    seed: int = 0

    def __post_init__(self):
        if not 1 <= self.symbols < 20_000 or self.length < 4 or self.length % 2 or self.total < 1:
            raise UsageError(
                f"synthetic:copy needs 1 to 19,999 symbols, an even length from 4 on and a positive total, got {self}"
            )

    def sample(self) -> np.ndarray:
        """[total, length] int32."""
        rng = np.random.default_rng([self.seed, 0])
        drawn = rng.integers(1, self.symbols + 1, (self.total, self.length // 2), np.int32)
        drawn[:, 0] = 0
        return np.tile(drawn, 2)

    def documents(self) -> Iterator[str]:
        """The rows of the sample as characters."""
        return (_characters(row, self.symbols + 1) for row in self.sample())


_NAMES: dict[str, type[Markov] | type[Copy]] = {"markov": Markov, "copy": Copy}


def _characters(symbols: np.ndarray, alphabet: int) -> str:
    return (symbols + _first(alphabet)).astype("<u4").tobytes().decode("utf-32-le")


def _first(alphabet: int) -> int:
    return ord("!") if alphabet <= 94 else 0x4E00  # Printable ASCII, else the CJK ideographs.


def parse(text: str) -> Markov | Copy:
    """The source of "NAME[?setting=value&...]", such as "markov?symbols=64&order=1"."""
    name, _, query = text.partition("?")
    if name not in _NAMES:
        raise unknown("synthetic source", name, _NAMES)
    fields = typing.get_type_hints(_NAMES[name])
    settings = {}
    for key, value in urllib.parse.parse_qsl(query, keep_blank_values=True):
        if key not in fields:
            raise unknown(f"setting of synthetic:{name}", key, fields)
        try:
            settings[key] = fields[key](value)
        except ValueError:
            raise UsageError(f"synthetic:{name} has {key}={value!r}, not of type {fields[key].__name__}") from None
    return _NAMES[name](**settings)
