"""What the seeds of two arms say about their difference: intervals, p values, equivalence, gains in compute."""

import dataclasses
import math
from collections.abc import Callable, Sequence

import numpy as np
from scipy import stats

LEVEL = 0.95
DRAWS = 10_000  # Of a parametric bootstrap, for intervals of gains.

Interval = tuple[float, float]
UNKNOWN: Interval = (math.nan, math.nan)


@dataclasses.dataclass(frozen=True)
class Difference:
    """New minus base. `welch` and `paired` are intervals; the one in use is `interval`, with its p, by `test`.

    `correlation` is that of the losses of equal seeds. Paired is right only where seeds fix what both arms share, data
    order and initial weights, and it gains only where the correlation is positive.
    """

    mean: float
    test: str
    interval: Interval
    p: float
    welch: Interval = UNKNOWN
    paired: Interval = UNKNOWN
    correlation: float = math.nan
    equivalence_p: float = math.nan


def interval(losses: Sequence[float]) -> Interval:
    """Student's interval of a mean; unknown below two losses."""
    if len(losses) < 2:
        return UNKNOWN
    half = stats.t.ppf((1 + LEVEL) / 2, len(losses) - 1) * stats.sem(losses)
    return float(np.mean(losses) - half), float(np.mean(losses) + half)


def difference(
    new: dict[int, float], base: dict[int, float], *, shared: bool, margin: float | None = None
) -> Difference:
    """Of the mean losses of two arms, {seed: loss} each; `shared`: a seed fixes data order and weights alike in both.

    Welch's test unless `shared`, the seeds are the same, at least three, and their correlation is sure (one-sided,
    5 %): to pick by its sign alone would find differences where there are none in 6 to 9 % of cases. With a `margin`,
    the p value of two one-sided tests that the arms differ by less (Schuirmann 1987). Below two seeds an arm, only the
    mean.
    """
    a, b = list(new.values()), list(base.values())
    mean = float(np.mean(a) - np.mean(b))
    if len(a) < 2 or len(b) < 2 or (np.ptp(a) == 0 and np.ptp(b) == 0):
        return Difference(mean, "none", UNKNOWN, math.nan)
    welch = stats.ttest_ind(a, b, equal_var=False)
    bounds = _bounds(welch)
    found = Difference(mean, "Welch", bounds, float(welch.pvalue), bounds)
    seeds = sorted(new.keys() & base.keys())
    if len(seeds) == len(a) == len(b) and len(seeds) >= 3:
        left, right = [new[s] for s in seeds], [base[s] for s in seeds]
        pairs = stats.ttest_rel(left, right)
        related = stats.pearsonr(left, right, alternative="greater") if np.ptp(left) and np.ptp(right) else None
        r = float(related.statistic) if related else math.nan
        found = dataclasses.replace(found, paired=_bounds(pairs), correlation=r)
        if shared and related is not None and related.pvalue < 1 - LEVEL:
            found = dataclasses.replace(found, test="paired", interval=found.paired, p=float(pairs.pvalue))
    if margin is not None:
        found = dataclasses.replace(found, equivalence_p=_equivalence(a, b, margin))
    return found


def holm(values: Sequence[float]) -> list[float]:
    """Holm's step-down correction (1979); NaN is no test and stays."""
    corrected = np.full(len(values), np.nan)
    order = [i for i in np.argsort(values) if not math.isnan(values[i])]
    worst = 0.0
    for rank, i in enumerate(order):
        worst = max(worst, min(1.0, (len(order) - rank) * values[i]))
        corrected[i] = worst
    return corrected.tolist()


def detectable(losses: Sequence[float], power: float = 0.8) -> float:
    """The difference between two arms with this spread and these many seeds that a test at 5 % finds so often."""
    count = len(losses)
    if count < 2:
        return math.nan
    freedom = 2 * count - 2
    reach = stats.t.ppf((1 + LEVEL) / 2, freedom) + stats.t.ppf(power, freedom)
    return float(reach * np.std(losses, ddof=1) * math.sqrt(2 / count))


def gain(
    new: Sequence[float], base: Sequence[float], compute: Callable[[np.ndarray, np.random.Generator], np.ndarray]
) -> tuple[float, Interval]:
    """(compute-equivalent gain, its interval): how many times the compute the base needs for the loss of the new arm.

    `compute(losses [..., 2], rng)` is the compute at which the baseline reaches each loss, [..., 2], drawn anew for
    each row where it is uncertain itself. Means are drawn from Student's distributions of the seeds.
    """
    rng = np.random.default_rng(0)
    means = np.array([np.mean(new), np.mean(base)])
    needed = compute(means[None], rng)[0]
    with np.errstate(all="ignore"):  # Losses that the baseline never reaches cost inf, or cannot be told, NaN.
        point = float(needed[0] / needed[1])
    if len(new) < 2 or len(base) < 2 or not math.isfinite(point):
        return (point if math.isfinite(point) else math.nan), UNKNOWN
    draws = np.stack([np.mean(x) + stats.sem(x) * rng.standard_t(len(x) - 1, DRAWS) for x in (new, base)], 1)
    # A loss that the baseline never reaches costs it infinitely much.
    with np.errstate(all="ignore"):
        ratios = np.divide(*compute(draws, rng).T)
    ratios = ratios[~np.isnan(ratios)]
    if len(ratios) < DRAWS / 2:
        return point, UNKNOWN
    low, high = np.quantile(ratios, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], method="nearest")
    return point, (float(low), float(high))


def law_compute(floor: float, floor_error: float, exponent: float) -> Callable:
    """The inverse of L = floor + c C^-exponent up to its constant, with `floor` uncertain by `floor_error`."""

    def compute(losses: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        floors = floor + (floor_error * rng.standard_normal((len(losses), 1)) if len(losses) > 1 else 0.0)
        return np.maximum(losses - floors, 0.0) ** (-1 / exponent)

    return compute


def ladder_compute(budgets: np.ndarray, losses: np.ndarray) -> Callable:
    """The inverse of a measured ladder, the lowest loss at each compute, by monotone interpolation of logarithms."""
    from scipy.interpolate import PchipInterpolator

    order = np.argsort(budgets)
    budgets, losses = budgets[order], losses[order]
    better = np.flatnonzero(losses < np.minimum.accumulate(np.concatenate([[np.inf], losses]))[:-1])
    if len(better) < 2:
        return lambda wanted, rng: np.full(wanted.shape, np.nan)
    curve = PchipInterpolator(-np.log(losses[better]), np.log(budgets[better]), extrapolate=False)
    least, most = losses[better].min(), losses[better].max()

    def compute(wanted: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        inside = np.exp(curve(-np.log(np.clip(wanted, least, most))))
        return np.where(wanted < least, np.inf, np.where(wanted > most, np.nan, inside))

    return compute


def _bounds(result: object) -> Interval:
    low, high = result.confidence_interval(LEVEL)  # type: ignore[attr-defined]
    return float(low), float(high)


def _equivalence(a: Sequence[float], b: Sequence[float], margin: float) -> float:
    above = stats.ttest_ind(np.array(a) + margin, b, equal_var=False, alternative="greater")
    below = stats.ttest_ind(np.array(a) - margin, b, equal_var=False, alternative="less")
    return float(max(above.pvalue, below.pvalue))
