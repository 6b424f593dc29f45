"""What a law of N and D says about compute: the optimal split of a budget C = k N D, its loss, and gains in compute."""

import numpy as np

from lm.report.laws import Law

GAIN = 0.01  # Nats per token: the improvement whose worth in compute is told.


def derived(law: Law, theta: np.ndarray, k: float, budget: float) -> dict[str, float]:
    """Exponents N* ~ C^a, D* ~ C^b, loss - E ~ C^-g, and N*, D*, the loss and the gain at `budget`; NaN where none is.

    Hoffmann et al. 2022, 2203.15556, eq. 4. The gain is the factor of compute that 0.01 nats less are worth there.
    """
    if law.inner is None:
        return {}
    floor, a_n, b_d, alpha, beta, outer = law.inner(law.raw(theta))
    if not min(alpha, beta) > 0:
        alpha = beta = np.nan
    a, b, g = (e / (alpha + beta) for e in (beta, alpha, alpha * beta))
    ratio = (alpha * a_n / (beta * b_d)) ** (1 / (alpha + beta))
    size, tokens = ratio * (budget / k) ** a, (budget / k) ** b / ratio
    excess = a_n * size**-alpha + b_d * tokens**-beta
    loss = (floor + excess) ** outer
    better = np.maximum(loss - GAIN, 0) ** (1 / outer) - floor
    gain = (excess / better) ** (1 / g) if better > 0 else np.nan
    values = {"a": a, "b": b, "g": g * outer, "C": budget, "N*": size, "D*": tokens, "D*/N*": tokens / size}
    values |= {"loss*": loss, "compute_equivalent_gain": gain}
    return {name: float(value) for name, value in values.items()}
