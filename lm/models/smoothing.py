"""How an n-gram model shares out its counts: five smoothings, each a function of one order and the order below it.

An estimate gets the counts of n-grams that lie sorted by context, the places at which a context starts, and the
probability of each n-gram's last word one order lower. It returns the probability of each n-gram, and for each
context h the weight that words never seen after h get of the lower order: p(w | h) = weight(h) p(w | h').
Dims here: G n-grams of one order, U contexts.
"""

import numpy as np

FALLBACK = (0.5, 1.0, 1.5)  # lmplz's, with --discount_fallback.
Estimate = tuple[np.ndarray, np.ndarray]


def maximum_likelihood(counts_G: np.ndarray, starts_U: np.ndarray, lower_G: np.ndarray) -> Estimate:
    """The relative frequencies; nothing is left for other words."""
    totals_U = np.add.reduceat(counts_G, starts_U)
    return counts_G / _spread(totals_U, starts_U, len(counts_G)), np.zeros(len(starts_U))


def add_mass(counts_G: np.ndarray, starts_U: np.ndarray, lower_G: np.ndarray, *, mass: float) -> Estimate:
    """Relative frequencies after each context got `mass` more counts, shared out as the lower order says.

    Over the uniform distribution of V words, and with k V, this adds k to each count (Lidstone 1920).
    """
    totals_U = np.add.reduceat(counts_G, starts_U) + mass
    return (counts_G + mass * lower_G) / _spread(totals_U, starts_U, len(counts_G)), mass / totals_U


def kneser_ney(
    counts_G: np.ndarray, starts_U: np.ndarray, lower_G: np.ndarray, *, discounts: tuple[float, float, float]
) -> Estimate:
    """Counts of 1, 2 and 3 or more lose a discount each, and the lower order is interpolated with what they lost.

    Chen and Goodman 1998, TR-10-98, equations 24 and 25; with three equal discounts Kneser and Ney 1995, interpolated.
    """
    totals_U = np.add.reduceat(counts_G, starts_U)
    lost_G = np.array((0.0, *discounts))[np.minimum(counts_G, 3)]
    weight_U = np.add.reduceat(lost_G, starts_U) / totals_U
    total_G, weight_G = (_spread(x_U, starts_U, len(counts_G)) for x_U in (totals_U, weight_U))
    return (counts_G - lost_G) / total_G + weight_G * lower_G, weight_U


def katz(
    counts_G: np.ndarray, starts_U: np.ndarray, lower_G: np.ndarray, *, ratios: tuple[float, ...], classes: int
) -> Estimate:
    """Count r is multiplied by `ratios[r]`, from the last of them on by that, and backs off with what was lost.

    Katz 1987, IEEE ASSP 35(3). A context that lost nothing, since all its counts are high, counts one word more, as
    in SRILM, so that no word has probability zero; one that all `classes` followed has nobody to lose to, and keeps
    its relative frequencies.
    """
    size = len(counts_G)
    totals_U = np.add.reduceat(counts_G, starts_U)
    full_U = np.diff(starts_U, append=size) == classes
    kept_G = counts_G * np.array(ratios)[np.minimum(counts_G, len(ratios) - 1)]
    kept_G = np.where(_spread(full_U, starts_U, size), counts_G, kept_G)
    kept_U = np.add.reduceat(kept_G, starts_U)
    totals_U = totals_U + ((kept_U == totals_U) & ~full_U)
    free_U = np.where(full_U, 1.0, 1.0 - np.add.reduceat(lower_G, starts_U))
    weight_U = np.where(full_U, 1.0, (1.0 - kept_U / totals_U) / free_U)
    return kept_G / _spread(totals_U, starts_U, size), weight_U


def one_discount(n: np.ndarray) -> tuple[float, float, float]:
    """n1 / (n1 + 2 n2) thrice, for the numbers n[r] of n-grams with count r; 0.5 where n1 or n2 is zero."""
    discount = float(n[1] / (n[1] + 2 * n[2])) if n[1] and n[2] else FALLBACK[0]
    return (discount,) * 3


def three_discounts(n: np.ndarray) -> tuple[float, float, float]:
    """r - (r + 1) n1 / (n1 + 2 n2) n[r+1] / n[r] for r of 1, 2 and 3 or more (Chen and Goodman 1998, equation 26).

    FALLBACK where one of n1 to n3 is zero, or a discount is not above 0 and at most r: text of few types (characters),
    or little of it.
    """
    if not n[1:4].all():
        return FALLBACK
    share = n[1] / (n[1] + 2 * n[2])
    first, second, third = (float(r - (r + 1) * share * n[r + 1] / n[r]) for r in (1, 2, 3))
    return (first, second, third) if 0 < first <= 1 and 0 < second <= 2 and 0 < third <= 3 else FALLBACK


def good_turing(n: np.ndarray, cutoff: int) -> tuple[float, ...]:
    """Ratios d[r] of counts 0 to `cutoff`, then 1, which counts above it keep (Katz 1987, equation 15).

    Good-Turing's estimate (r + 1) n[r+1] / n[r] breaks down where counts of counts are zero or do not fall; then the
    largest smaller cutoff for which each ratio lies between 0 and 1 is taken, and without any no count is changed.
    """
    for k in range(cutoff, 0, -1):
        r = np.arange(1, k + 1)
        if n[1 : k + 1].all():
            above = (k + 1) * n[k + 1] / n[1]
            ratios = ((r + 1) * n[2 : k + 2] / (r * n[1 : k + 1]) - above) / (1 - above) if above != 1 else np.zeros(k)
            if above < 1 and ((ratios > 0) & (ratios < 1)).all():
                return (1.0, *ratios.tolist(), 1.0)
    return (1.0, 1.0)


def _spread(x_U: np.ndarray, starts_U: np.ndarray, size: int) -> np.ndarray:
    """[G] of [U]: each context's value at all of its n-grams."""
    return np.repeat(x_U, np.diff(starts_U, append=size))
