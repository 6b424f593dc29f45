"""Means over a split, and how sure they are."""

import math

import numpy as np

from lm.evals import perplexity


class Given:
    """An objective whose sums are those of the batch."""

    def loss(self, model, params, batch, *, key, frozen):
        return {"loss": (batch["sums"].sum(), batch["weights"].sum(), 1.0)}


def batches(seed, count=40, spread=1.0):
    rng = np.random.default_rng(seed)
    for _ in range(count):
        weights = rng.integers(0, 2, (4, 8)).astype(np.float32)
        yield {"sums": weights * np.float32(3 + spread * rng.standard_normal()), "weights": weights}


def test_the_error_covers_the_mean_when_batches_are_the_clusters():
    evaluate, covered = perplexity.make_evaluate(None, Given()), 0
    for seed in range(100):
        found = evaluate(None, None, batches(seed))
        covered += abs(found["loss"] - 3) < 1.96 * found["loss_error"]
    assert 88 <= covered <= 99


def test_a_mean_is_that_of_all_positions_and_one_batch_has_no_error():
    evaluate = perplexity.make_evaluate(None, Given())
    all_of_them = list(batches(0))
    found = evaluate(None, None, all_of_them)
    total, weight = (sum(float(b[name].sum()) for b in all_of_them) for name in ("sums", "weights"))
    np.testing.assert_allclose(found["loss"], total / weight, rtol=1e-6)
    assert math.isnan(evaluate(None, None, all_of_them[:1])["loss_error"])
