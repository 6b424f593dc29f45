"""Differences between arms: published corrections and sample sizes, coverage, gains whose truth is known."""

import math

import numpy as np
import pytest

from lm.report import compare

LAW = {"E": 1.81722, "A": 477.83, "B": 2143.4, "alpha": 0.34731, "beta": 0.367172}  # Through Chinchilla's points.


def seeds(losses):
    return dict(enumerate(losses))


def test_holm_steps_down():
    corrected = compare.holm([0.01, 0.04, math.nan, 0.03, 0.005])
    np.testing.assert_allclose(corrected, [0.03, 0.06, math.nan, 0.06, 0.02])


def test_seeds_that_find_a_difference_are_those_of_a_power_table():
    """With SD 0.002, 4 seeds an arm find 0.005 nats in 80 % of cases, and 17 find 0.002."""
    for count, difference in ((4, 0.005), (17, 0.002)):
        losses = np.tile([-1.0, 1.0], count)[:count]
        losses *= 0.002 / np.std(losses, ddof=1)
        assert compare.detectable(list(losses)) <= difference
        assert compare.detectable(list(losses[: count - 1])) > 0.9 * difference


def test_intervals_of_differences_cover_the_truth():
    rng = np.random.default_rng(0)
    covered = {"Welch": 0, "paired": 0}
    for _ in range(400):
        common = rng.normal(0, 0.004, 5)
        new, base = rng.normal(2.99, 0.002, 5) + common, rng.normal(3.0, 0.002, 5) + common
        found = compare.difference(seeds(new), seeds(base), shared=True)
        for name, (low, high) in (("Welch", found.welch), ("paired", found.paired)):
            covered[name] += low <= -0.01 <= high
    assert 0.92 <= covered["paired"] / 400 <= 0.98 and covered["Welch"] / 400 >= 0.94


def test_pairs_count_only_where_seeds_share_something_and_correlate():
    base = [3.0, 3.1, 3.2, 3.3]
    same = [x - 0.01 + d for x, d in zip(base, (0.001, -0.001, 0.002, -0.002), strict=True)]
    assert compare.difference(seeds(same), seeds(base), shared=True).test == "paired"
    assert compare.difference(seeds(same), seeds(base), shared=False).test == "Welch"
    assert compare.difference(seeds(same[::-1]), seeds(base), shared=True).test == "Welch"
    other = dict(zip((0, 1, 2, 9), same, strict=True))
    assert compare.difference(other, seeds(base), shared=True).test == "Welch"
    lone = compare.difference(seeds([3.0]), seeds(base), shared=True)
    assert math.isnan(lone.p) and lone.mean == pytest.approx(-0.15)


def test_arms_are_equivalent_within_a_margin_that_the_seeds_can_show():
    rng = np.random.default_rng(1)
    a, b = (seeds(rng.normal(3.0, 0.001, 6)) for _ in range(2))
    assert compare.difference(a, b, shared=False, margin=0.005).equivalence_p < 0.01
    assert compare.difference(a, b, shared=False, margin=0.0005).equivalence_p > 0.05


@pytest.mark.parametrize(("compute", "gain"), [(1e18, 1.03), (1e20, 1.08), (1e22, 1.19)])
def test_a_hundredth_of_a_nat_is_worth_more_at_more_compute(compute, gain):
    alpha, beta = LAW["alpha"], LAW["beta"]
    exponent = alpha * beta / (alpha + beta)
    ratio = (alpha * LAW["A"] / (beta * LAW["B"])) ** (1 / (alpha + beta))
    excess = (LAW["A"] * ratio**-alpha + LAW["B"] * ratio**beta) * (compute / 6) ** -exponent
    base = LAW["E"] + excess
    found, interval = compare.gain([base - 0.01], [base], compare.law_compute(LAW["E"], 0.0, exponent))
    assert found == pytest.approx(gain, abs=0.01) and math.isnan(interval[0])


def test_a_gain_by_law_or_ladder_is_the_known_one_and_its_interval_holds_it():
    budgets = np.geomspace(1e15, 1e19, 9)
    losses = 1.7 + 30 * budgets**-0.1
    rng = np.random.default_rng(2)
    base, new = (1.7 + 30 * c**-0.1 + rng.normal(0, 0.002, 5) for c in (1e17, 1.3e17))
    for compute in (compare.law_compute(1.7, 0.01, 0.1), compare.ladder_compute(budgets, losses)):
        found, (low, high) = compare.gain(list(new), list(base), compute)
        assert low < 1.3 < high and found == pytest.approx(1.3, rel=0.2)
    beyond, _ = compare.gain([1.0], [float(base[0])], compare.ladder_compute(budgets, losses))
    assert math.isnan(beyond)
