"""Learning rates step by step."""

import math

import numpy as np
import pytest

from lm.core.errors import UsageError
from lm.train.schedules import WSD, Constant, Cosine, InverseSqrt, Linear, Plateau


def rates(schedule, steps):
    function = schedule.build(steps)
    return np.array([float(function(i)) for i in range(steps)])


def nanogpt_rate(i, warmup, decay, peak, final):
    if i < warmup:
        return peak * (i + 1) / (warmup + 1)
    ratio = (i - warmup) / (decay - warmup)
    return final + 0.5 * (1 + math.cos(math.pi * ratio)) * (peak - final)


def test_cosine_is_nanogpts():
    expected = [nanogpt_rate(i, 100, 2000, 1e-3, 1e-4) for i in range(2000)]
    np.testing.assert_allclose(rates(Cosine(1e-3, 1e-4, 100), 2000), expected, rtol=2e-5)


def test_inverse_sqrt_falls_as_the_paper_has_it():
    got = rates(InverseSqrt(1.0, 100), 1600)
    np.testing.assert_allclose(got[100:] * np.sqrt(np.arange(100, 1600) / 100), 1.0, rtol=1e-5)


def test_inverse_sqrt_held_is_one_over_the_larger_root():
    got = rates(InverseSqrt(1e-2, 100, hold=True), 1600)
    np.testing.assert_allclose(got, 1e-2 * np.sqrt(100 / np.maximum(np.arange(1600), 100)), rtol=1e-5)


def test_wsd_is_flat_and_then_falls_to_the_end():
    got = rates(WSD(1.0, 0.0, warmup_steps=10, decay_fraction=0.2), 100)
    assert np.all(np.diff(got[:11]) > 0) and np.all(got[10:81] == 1.0)
    np.testing.assert_allclose(got[80:], 1 - np.arange(20) / 20, atol=1e-6)


@pytest.mark.parametrize(
    ("perplexities", "halvings"),
    [([], 0), ([150], 0), ([150, 140, 130], 0), ([150, 140, 139.5], 1), ([150, 155, 140, 140, 139], 2)],
)
def test_a_plateau_halves_the_rate_after_each_evaluation_of_too_small_a_gain(perplexities, halvings):
    assert Plateau(gain=0.999).lowered(np.log(perplexities)) == 0.5**halvings


def test_a_plateau_takes_losses_without_a_perplexity_for_no_gain():
    assert Plateau().lowered([5.0, 1e4, 1e4, None, 4.0]) == 0.5**4


@pytest.mark.parametrize("kind", [Constant, Linear, Cosine, InverseSqrt, WSD, Plateau])
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_a_long_warmup_is_cut_to_a_short_run(kind, steps):
    got = rates(kind(peak=1.0, warmup_steps=100), steps)
    assert np.all(np.isfinite(got)) and np.all(got > 0) and np.all(got <= 1)


@pytest.mark.parametrize("factor", [0.0, 1.0, 2.0])
def test_a_plateau_that_does_not_lower_is_refused(factor):
    with pytest.raises(UsageError, match="schedule.factor"):
        Plateau(factor=factor)


def test_a_negative_rate_is_refused():
    with pytest.raises(UsageError, match="schedule.peak"):
        Cosine(peak=-1.0)
