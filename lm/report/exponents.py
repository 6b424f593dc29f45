"""The exponent of the optimal size under each convention of counting work, all from the same runs.

A convention's size is its work a token over 6, so that C = 6 N D holds under each (DeepSeek-AI 2024, 2401.02954).
"""

from collections.abc import Iterable
from typing import Any

import numpy as np

from lm.report.laws import Law
from lm.report.minimize import Objective, fit
from lm.report.optimum import derived
from lm.report.points import Points

# As lm.report.conventions has them, which fits do not import: it needs JAX.
FLOPS = (
    "flops_kaplan",
    "flops_kaplan_attention",
    "flops_head",
    "flops_head_causal",
    "flops_head_full",
    "flops_deepseek",
    "flops_all",
    "flops_chinchilla",
)


def of_law(law: Law, points: Points, objective: Objective) -> dict[str, dict[str, float]]:
    """{"a_by_flops": {convention: a}} of a law of N and D, fitted to each convention's sizes; {} without columns."""
    y = np.log(points[law.target])
    exponents = {}
    for name, sizes in _sizes(points).items():
        theta = fit(law, np.log(np.stack([sizes, points["D"]], 1)), y, objective).theta
        exponents[name] = derived(law, theta, 6.0, float(6 * (sizes * points["D"]).max()))["a"]
    return _named(exponents)


def of_minima(minima: Iterable[tuple[float, float]], points: Points) -> dict[str, dict[str, float]]:
    """The same of optima (log N*, D*): the line through them, each at the size and work that the convention counts."""
    log_sizes, tokens = np.array(list(minima)).T
    order = np.argsort(points["N"])
    exponents = {}
    for name, sizes in _sizes(points).items():
        # Between the sizes of a ladder the work grows as a power of N.
        counted = np.interp(log_sizes, np.log(points["N"][order]), np.log(sizes[order]))
        exponents[name] = float(np.polyfit(counted + np.log(tokens), counted, 1)[0])
    return _named(exponents)


def _sizes(points: Points) -> dict[str, np.ndarray]:
    if "D" not in points:
        return {}
    return {name.removeprefix("flops_"): points[name] / (6 * points["D"]) for name in FLOPS if name in points}


def _named(exponents: dict[str, float]) -> dict[str, Any]:
    return {"a_by_flops": exponents} if exponents else {}
