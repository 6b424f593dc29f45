"""What fits say about data: published points, known sources, units, misfits, noise."""

import csv
import dataclasses
import os
import subprocess
import sys

import numpy as np
import pytest

from lm.report.result import Settings
from tests.main.helpers import ROOT
from tests.report.rows import QUICK, Quanta, fit, surface

TRUTH = (1.69, 406.4, 410.7, 0.34, 0.28)
MISFIT = "lack of fit"


@pytest.fixture(scope="module")
def noisy():
    return surface(*TRUTH, noise=0.003)


def chinchilla(shared_data):
    with open(shared_data / "scaling" / "svg_extracted_data.csv") as f:
        rows = list(csv.DictReader(f))
    N, C, loss = (np.array([float(r[c]) for r in rows]) for c in ("Model Size", "Training FLOP", "loss"))
    return {"N": N, "D": C / 6 / N, "loss": loss}


def test_the_chinchilla_points_give_the_exact_minimiser(shared_data):
    found = fit("chinchilla", Settings(bootstrap=0, drop_highest=5), **chinchilla(shared_data))
    assert found.rows == 240
    assert found.params == pytest.approx(
        {"E": 1.81722, "A": 477.83, "B": 2143.4, "alpha": 0.347310, "beta": 0.367172}, rel=1e-5
    )
    assert found.objective == pytest.approx(1.018274018e-3, rel=1e-7)
    assert found.derived["a"] == pytest.approx(0.51390, abs=1e-5)
    drops, deltas = (found.diagnostics[f"{name}_sensitivity"] for name in ("drop", "delta"))
    assert [round(drops[k]["a"], 3) for k in ("0", "1", "3", "10", "20")] == [0.565, 0.544, 0.524, 0.509, 0.484]
    assert [round(deltas[k]["a"], 3) for k in ("lad", "1e-2", "mse")] == [0.513, 0.518, 0.530]
    assert found.diagnostics["share_at_best"] > 0.9 and found.diagnostics["gradient_norm"] < 1e-7


@pytest.mark.slow
def test_the_chinchilla_bootstrap_has_the_published_standard_errors(shared_data):
    found = fit("chinchilla", Settings(bootstrap=2000, drop_highest=5), **chinchilla(shared_data))
    published = {"E": 0.0257, "A": 124.5, "B": 1293, "alpha": 0.0154, "beta": 0.0206, "a": 0.020}
    assert {name: found.standard_errors[name] for name in published} == pytest.approx(published, rel=0.15)
    assert found.intervals["a"] == pytest.approx([0.481, 0.555], abs=0.004)


@pytest.mark.parametrize("a", [0.3, 0.5, 0.8])
def test_the_quanta_source(a):
    source = Quanta(a)
    N = np.unique(np.geomspace(100, 1e6, 15).astype(int))
    axis = fit("power", N=N, loss=[source.loss(n) for n in N]).params
    assert axis["alpha"] == pytest.approx(a, abs=0.003) and axis["E"] == pytest.approx(1, abs=4e-4)
    budgets = source.budgets()
    optimal = fit("isoflop", **budgets).derived
    assert optimal["a"] == pytest.approx(source.beta / (source.alpha + source.beta), abs=3e-4)
    joint = fit("chinchilla", **budgets)
    assert abs(joint.params["alpha"] - a) > 0.1 * a and any(MISFIT in w for w in joint.warnings)


@pytest.mark.parametrize("budgets, sizes", [(9, 9), (4, 6)])
@pytest.mark.parametrize("noise", [0.001, 0.01])
@pytest.mark.parametrize("seed", range(2))
def test_a_true_law_with_noise_is_not_called_a_misfit(budgets, sizes, noise, seed):
    found = fit("chinchilla", **surface(*TRUTH, budgets, sizes, noise=noise, seed=seed))
    assert not any(MISFIT in w for w in found.warnings)


def test_replicates_judge_the_law():
    quanta = {k: np.repeat(v, 3) for k, v in Quanta(0.5).budgets(count=4, sizes=6).items()}
    true = {k: np.repeat(v, 3) for k, v in surface(*TRUTH, 4, 6).items()}
    noise = np.exp(0.002 * np.random.default_rng(0).normal(size=72))
    for columns, misfit in ((quanta, True), (true, False)):
        found = fit("chinchilla", **columns | {"loss": columns["loss"] * noise})
        test = found.diagnostics["lack_of_fit"]
        assert test["against"] == "replicates" and test["replicate_sd"] == pytest.approx(0.002, rel=0.25)
        assert any(MISFIT in w for w in found.warnings) == misfit


@pytest.mark.parametrize("unit", [{"N": 1e-6}, {"D": 1e-9}, {"loss": 1 / np.log(2)}], ids=str)
def test_units_change_neither_exponents_nor_predictions(noisy, unit):
    at = {"N": 7e10, "D": 1.4e12}
    scaled = {name: values * unit.get(name, 1) for name, values in noisy.items() if name != "C"}
    there = fit("chinchilla", Settings(bootstrap=0, predict=tuple(v * unit.get(k, 1) for k, v in at.items())), **scaled)
    here = fit("chinchilla", Settings(bootstrap=0, predict=tuple(at.values())), **noisy)
    assert there.derived["a"] == pytest.approx(here.derived["a"], rel=1e-6)
    assert there.params["alpha"] == pytest.approx(here.params["alpha"], rel=1e-6)
    expected = here.derived["predicted_loss"] * unit.get("loss", 1)
    assert there.derived["predicted_loss"] == pytest.approx(expected, rel=1e-7)


@pytest.mark.parametrize("form", ["chinchilla", "isoflop"])
def test_the_order_of_rows_changes_nothing(noisy, form):
    order = np.random.default_rng(1).permutation(len(noisy["N"]))
    there = fit(form, **{name: values[order] for name, values in noisy.items()})
    assert there.params == pytest.approx(fit(form, **noisy).params, rel=1e-6)


def test_duplicated_rows_leave_the_fit_and_shrink_the_error(noisy):
    settings = dataclasses.replace(QUICK, bootstrap=60)
    twice = {name: np.repeat(values, 2) for name, values in noisy.items()}
    here, there = fit("chinchilla", settings, **noisy), fit("chinchilla", settings, **twice)
    assert there.params == pytest.approx(here.params, rel=1e-5)
    assert there.standard_errors["alpha"] < 0.9 * here.standard_errors["alpha"]
    assert any("the same row again" in w for w in there.warnings) and not any(MISFIT in w for w in there.warnings)


@pytest.mark.slow
def test_nominal_95_per_cent_intervals_cover(noisy):
    names, sets = ("E", "alpha", "beta", "a"), 100
    truth = dict(zip(("E", "A", "B", "alpha", "beta"), TRUTH, strict=True)) | {"a": 0.28 / 0.62}
    inside = dict.fromkeys(names, 0)
    for seed in range(sets):
        rows = surface(*TRUTH, noise=0.003, seed=seed)
        intervals = fit("chinchilla", Settings(bootstrap=200, seed=seed), **rows).intervals
        for name in names:
            inside[name] += intervals[name][0] <= truth[name] <= intervals[name][1]
    assert all(0.87 <= count / sets <= 1 for count in inside.values()), inside  # 90 to 98 %, and a binomial SD of 2 %.


@pytest.mark.parametrize("noise, sds", [(0.001, (0.002, 0.0025)), (0.01, (0.026, 0.031))])
def test_noise_moves_exponents_by_no_more_than_it_should(noise, sds):
    found = fit("chinchilla", **surface(*TRUTH, noise=noise, seed=5)).params
    assert abs(found["alpha"] - 0.34) < 3 * sds[0] and abs(found["beta"] - 0.28) < 3 * sds[1]


def test_isoflop_leaves_out_budgets_whose_minimum_is_at_an_edge():
    columns = surface(*TRUTH)
    exact = 0.28 / 0.62
    found = fit("isoflop", **columns)
    assert found.derived["a"] == pytest.approx(exact, abs=1e-6) and found.warnings == []
    assert found.derived["N*"] == pytest.approx(5.16047e9, rel=0.01) and found.derived["g"] == pytest.approx(
        0.15355, abs=1e-3
    )
    cut = np.arange(81) < 77  # The last budget ends before its best size.
    found = fit("isoflop", **{name: values[cut] for name, values in columns.items()})
    assert "edge of the sizes: C = 1e+22" in found.warnings[0]
    assert found.derived["a"] == pytest.approx(exact, abs=1e-6)


def test_isoflop_takes_rounded_budgets_and_frontier_takes_curves():
    columns = surface(*TRUTH)
    N = columns["N"] * np.random.default_rng(0).uniform(0.96, 1.04, 81)
    rounded = fit("isoflop", N=N, C=6 * N * columns["D"], loss=1.69 + 406.4 * N**-0.34 + 410.7 * columns["D"] ** -0.28)
    assert len(rounded.diagnostics["budgets"]) == 9
    N, D = (v.ravel() for v in np.meshgrid(np.geomspace(1e7, 1e10, 12), np.geomspace(1e8, 3e12, 25)))
    curves = fit("frontier", N=N, D=D, C=6 * N * D, loss=1.69 + 406.4 * N**-0.34 + 410.7 * D**-0.28)
    assert curves.derived["a"] == pytest.approx(0.28 / 0.62, abs=2e-3)


def test_isoflop_intervals_hold_the_truth():
    columns = surface(*TRUTH, noise=0.001)
    found = fit("isoflop", Settings(bootstrap=100), **columns)
    for name in ("a", "a_parabola"):
        low, high = found.intervals[name]
        assert low < 0.28 / 0.62 < high and high - low < 0.1


@pytest.mark.parametrize("form", ["chinchilla", "isoflop"])
def test_each_convention_of_work_has_an_exponent_of_its_own(form):
    """Where it counts 3 sqrt(N) as the size, a law of N^-alpha is one of size^-2 alpha."""
    columns = surface(*TRUTH, sizes=25)
    N, D, (alpha, beta) = columns["N"], columns["D"], TRUTH[3:]
    columns |= {"flops_head": 6 * N * D, "flops_kaplan": 18 * np.sqrt(N) * D}
    found = fit(form, **columns)
    assert found.diagnostics["a_by_flops"] == pytest.approx(
        {"kaplan": beta / (2 * alpha + beta), "head": beta / (alpha + beta)}, abs=1e-3
    )
    assert found.diagnostics["a_by_flops"]["head"] == pytest.approx(found.derived["a"], abs=1e-9)
    assert "a_by_flops" not in fit(form, **surface(*TRUTH)).diagnostics


def test_a_bootstrap_by_group_is_wider_where_groups_share_their_error():
    columns = surface(*TRUTH)
    group = np.repeat(np.arange(27), 3)
    loss = columns["loss"] * np.exp(0.003 * np.random.default_rng(0).normal(size=27)[group])
    settings = Settings(bootstrap=100)
    rows = fit("chinchilla", settings, **columns | {"loss": loss})
    groups = fit("chinchilla", settings, **columns | {"loss": loss}, group=group.astype(str))
    assert groups.standard_errors["alpha"] > 1.2 * rows.standard_errors["alpha"]


def test_a_floor_that_the_rows_do_not_show_is_named():
    found = fit("chinchilla", **surface(0.0, 30.0, 40.0, 0.15, 0.2, noise=0.003))
    assert found.diagnostics["bound_hits"] == ["E"] and any("E ended at its bound" in w for w in found.warnings)
    assert found.params["alpha"] == pytest.approx(0.15, abs=0.01)


def test_a_fit_imports_no_jax():
    rooms = ("fit", "parametric", "isoflop", "hparams", "repeat", "table", "figures", "diagnostics")
    code = "import sys; " + "; ".join(f"import lm.report.{r}" for r in rooms) + "; assert 'jax' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
