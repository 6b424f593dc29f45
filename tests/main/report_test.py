"""`lm report` over rows made for it: arms, best rates, every format."""

import csv
import dataclasses
import json

import numpy as np
import pytest

from lm.core import config
from lm.report import row
from lm.train.run import resolve
from tests.main import tiny
from tests.main.helpers import call


class Letters:
    vocab_size = 8

    def special(self, name):
        return None


def add_run(folder, arm, rate, seed, loss, status="done", **model):
    """A run folder with what a report reads of it."""
    base = resolve(tiny.run(), Letters())
    run = dataclasses.replace(
        base,
        name=f"{arm}/lr{rate:g}/seed{seed}",
        model=dataclasses.replace(base.model, **model),
        schedule=dataclasses.replace(base.schedule, peak=rate, final=rate / 10),
        train=dataclasses.replace(base.train, seed=seed),
    )
    workdir = folder / run.name
    workdir.mkdir(parents=True)
    row = {"name": run.name, "run": str(workdir), "status": status, "loss": loss, "learning_rate": rate, "seed": seed}
    row |= {
        "data_seed": 0,
        "N": 5e6,
        "D": 1e8,
        "C": 3e15,
        "params_total": 6e6,
        "device_hours": 0.5,
        "batch_tokens": 256,
    }
    row |= {"decayed": True, "commit": "abc", "config": config.to_json(run)}
    (workdir / "row.json").write_text(json.dumps(row))
    curve = [{"step": s, "val_loss": (loss or 9.0) + 1 / s} for s in (10, 20, 30)]
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in curve))


@pytest.fixture
def sweep(tmp_path):
    rng = np.random.default_rng(0)
    for rate, mean in ((1e-3, 3.1), (2e-3, 3.0), (4e-3, 3.2)):
        for seed in range(3):
            add_run(tmp_path, "plain", rate, seed, mean + rng.normal(0, 0.002))
    for rate, mean in ((1e-3, 3.0), (2e-3, 2.95)):
        for seed in range(3):
            add_run(tmp_path, "wide_mlp", rate, seed, mean + rng.normal(0, 0.002), mlp_width=96)
    add_run(tmp_path, "wide_mlp", 5e-4, 0, None, "diverged", mlp_width=96)
    names = [str(f.parent.relative_to(tmp_path)) for f in sorted(tmp_path.glob("*/*/*/row.json"))]
    (tmp_path / "sweep.json").write_text(json.dumps({"experiment": "x", "runs": [*names, "plain/lr0.001/seed9"]}))
    return tmp_path


def test_arms_are_compared_at_their_best_rates_in_every_format(sweep, capfd):
    assert call("report", f"--workdir={sweep}", "--margin=0.1") == 0
    out = capfd.readouterr().out
    plain, wide = csv.DictReader((sweep / "report.csv").read_text().splitlines())
    assert (plain["arm"], wide["arm"]) == ("plain", "wide_mlp") and plain["seeds"] == wide["seeds"] == "3"
    assert float(plain["learning rate"]) == float(wide["learning rate"]) == 2e-3
    assert plain["rate at edge"] == "no" and wide["rate at edge"] == "highest"
    assert wide["diverged"] == "1 of 7" and wide["settings"] == "model.mlp_width=96"
    low, high = float(wide["difference interval low"]), float(wide["difference interval high"])
    assert low < -0.05 < high and float(wide["p"]) == float(wide["p (Holm)"]) < 0.001
    assert float(wide["equivalence p"]) < 0.001 and plain["difference"] == ""
    assert "wide_mlp (highest)" in out and "plain/lr0.001/seed9" in out
    for name in ("report.md", "report.tex", "report.html"):
        text = (sweep / name).read_text()
        assert "2.95" in text and "mlp" in text and "nan" not in text, name
    assert r"wide\_mlp" in (sweep / "report.tex").read_text()
    page = (sweep / "report.html").read_text()
    assert "<svg" in page and "<table>" in page and "http" not in page.replace("http://www.w3.org", "").split("<svg")[0]


def test_a_survivor_is_no_best_rate_and_two_names_are_one_run(tmp_path):
    for seed in range(3):
        add_run(tmp_path, "plain", 1e-3, seed, 3.0 + 0.01 * seed)
        add_run(tmp_path, "plain", 2e-3, seed, 2.5 if seed == 0 else None, "done" if seed == 0 else "diverged")
    add_run(tmp_path / "again", "plain", 1e-3, 0, 3.0)
    assert call("report", f"--workdir={tmp_path}") == 0
    (arm,) = csv.DictReader((tmp_path / "report.csv").read_text().splitlines())
    assert float(arm["learning rate"]) == 1e-3 and arm["seeds"] == "3" and arm["diverged"] == "2 of 6"


def test_arms_at_any_rates_are_one_and_a_moved_folder_keeps_its_curves(tmp_path):
    for rate in (1e-3, 3e-3, 1e-2, 3e-2):
        add_run(tmp_path / "old", "plain", rate, 0, 3.0)
    (tmp_path / "old").rename(tmp_path / "new")
    assert call("report", f"--workdir={tmp_path / 'new'}") == 0
    assert len((tmp_path / "new" / "report.csv").read_text().splitlines()) == 2
    assert (tmp_path / "new" / "report.svg").read_text().count('id="line2d_') > 20


def test_a_gain_in_compute_is_read_off_a_ladder(sweep, tmp_path):
    ladder = tmp_path / "ladder.csv"
    ladder.write_text("C,loss\n" + "".join(f"{c},{2 + 100 * c**-0.1274}\n" for c in np.geomspace(1e14, 1e18, 9)))
    assert call("report", f"--workdir={sweep}", f"--ladder={ladder}", f"--out={tmp_path / 'out'}") == 0
    _, wide = csv.DictReader((tmp_path / "out" / "report.csv").read_text().splitlines())
    expected = (1.0 / 0.95) ** (1 / 0.1274)
    assert float(wide["compute gain"]) == pytest.approx(expected, rel=0.05)
    assert float(wide["gain interval low"]) < expected < float(wide["gain interval high"])
    assert "No compute gain" not in (tmp_path / "out" / "report.md").read_text()
    ladder.write_text("C,loss\n1e14,9\n1e15,8\n")
    assert call("report", f"--workdir={sweep}", f"--ladder={ladder}", f"--out={tmp_path / 'out'}") == 0
    assert "beyond the ladder or the law: wide_mlp" in (tmp_path / "out" / "report.md").read_text()


def test_goodput_is_shown_where_rows_have_it(tmp_path):
    for seed, share in enumerate((0.9, 0.8)):
        add_run(tmp_path, "plain", 1e-3, seed, 3.0)
        row.add(tmp_path / "plain" / "lr0.001" / f"seed{seed}", goodput=share)
    assert call("report", f"--workdir={tmp_path}") == 0
    assert "85.0%" in (tmp_path / "report.md").read_text() and r"85.0\%" in (tmp_path / "report.tex").read_text()
    add_run(tmp_path, "plain", 1e-3, 2, 3.0)
    assert call("report", f"--workdir={tmp_path}") == 0
    assert "goodput |" not in (tmp_path / "report.md").read_text()


def test_what_cannot_be_is_refused(sweep, tmp_path, capfd):
    assert call("report", f"--workdir={sweep}", "--baseline=wide") == 2
    assert "wide_mlp" in capfd.readouterr().err
    assert call("report", f"--workdir={tmp_path / 'plain' / 'none'}") == 2
    assert "lm sweep" in capfd.readouterr().err
    assert call("report", f"--workdir={sweep}", f"--fit={tmp_path}") == 2
    assert "--form=chinchilla" in capfd.readouterr().err


def test_a_row_without_its_work_is_no_match_for_another_kind_of_model(sweep, capfd):
    run = dataclasses.replace(resolve(tiny.lanes(), Letters()), name="lanes")
    row = json.loads(next(sweep.glob("plain/*/*/row.json")).read_text()) | {
        "name": "lanes",
        "config": config.to_json(run),
    }
    (sweep / "lanes").mkdir()
    (sweep / "lanes" / "row.json").write_text(json.dumps(row))
    assert call("report", f"--workdir={sweep}") == 2
    assert "without flops_model" in capfd.readouterr().err
