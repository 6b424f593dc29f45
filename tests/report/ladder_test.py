"""Plans: the budgets, ratios and schedules that were asked for."""

import collections
import dataclasses

import pytest

from experiments import ablate_positions, scaling_python
from lm.core.errors import UsageError
from lm.report import ladder
from lm.report.isoflop import FEWEST_SIZES

BASE = ablate_positions.base()
MODELS = {
    f"d{width}": dataclasses.replace(BASE.model, width=width, vocab_size=256, valid_vocab_size=256)
    for width in (16, 24, 32, 40, 48, 64)
}


def test_an_isoflop_plan_spends_its_budgets_within_its_ratios():
    runs = ladder.isoflop(BASE, MODELS, (1e11, 1e12), ratios=(2, 300))
    rows = {row["name"]: row for row in ladder.plan(runs)}
    assert len(rows) == len(runs)
    for name, row in rows.items():
        assert row["flops_head"] == pytest.approx(float(name[1:].split("/")[0]), rel=5e-3)
        assert 1.9 < row["D/N"] < 301
    with pytest.raises(UsageError, match=r"1e\+15 has 0 models"):
        ladder.isoflop(BASE, MODELS, (1e15,))


@pytest.mark.parametrize("variant", [scaling_python.run, scaling_python.gpu])
def test_every_budget_of_the_isoflop_sweeps_has_the_sizes_that_its_fit_needs(variant):
    budgets = collections.Counter(run.name.split("/")[0] for run in variant())
    assert len(budgets) == 4 and min(budgets.values()) >= FEWEST_SIZES


def test_each_run_has_a_schedule_as_long_as_itself():
    for run in ladder.tokens_per_parameter(BASE, MODELS, (5, 20, 80)):
        rates = run.schedule.build(run.train.steps)
        warmup = run.schedule.warmup_steps
        assert 0 < warmup <= 0.02 * run.train.steps + 1
        assert float(rates(run.train.steps - 1)) < 1.1 * run.schedule.final + 1e-3 * run.schedule.peak
        assert float(rates(warmup)) == pytest.approx(run.schedule.peak, rel=1e-3)
        ratio = float(run.name.rpartition("m")[2])
        assert ladder.plan([run])[0]["D/N"] == pytest.approx(ratio, rel=0.02)


def test_grids_multiply_and_name_what_they_change():
    runs = ladder.seeds(
        ladder.batch_sizes(ladder.learning_rates(ablate_positions.arms()[:1], (1e-3, 2e-3)), (8, 32)), 2
    )
    assert len({run.name for run in runs}) == len(runs) == 8
    assert runs[-1].name == "rotary/lr0.002/b32/seed1" and runs[-1].train.batch_size == 32
    assert {run.train.steps * run.train.batch_size for run in runs} == {400 * 16}
    assert runs[-1].schedule.final == pytest.approx(2e-4) and runs[-1].data.seed == runs[-1].train.seed == 1
