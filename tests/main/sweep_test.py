"""`lm sweep`: all runs of a list, again and again until none is missing."""

import csv
import json
import signal
import subprocess
import time

import pytest

from tests.main.helpers import TINY, call, digests, start

SWEEP = ("sweep", f"--experiment={TINY}:sweep")
NAMES = [f"lr{peak}/seed{seed}" for peak in ("0.01", "0.001") for seed in (0, 1)]


def row(folder, name):
    return json.loads((folder / name / "row.json").read_text())


def starts(folder, name):
    return (folder / name / "ledger.jsonl").read_text().count('"start"')


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """The finished sweep, and what it printed."""
    folder = tmp_path_factory.mktemp("swept")
    process = start(*SWEEP, f"--workdir={folder}", devices=None, stdout=subprocess.PIPE)
    out, _ = process.communicate(timeout=400)
    assert process.returncode == 0, out
    return folder, out


def test_every_run_ends_in_a_row_and_the_verdict_is_said(swept):
    folder, out = swept
    assert out.splitlines()[-1] == "best: 0.01"
    for name in NAMES:
        found = row(folder, name)
        assert found["status"] == "done" and found["decayed"] and found["name"] == name
        assert found["group"] == name.split("/")[0] and found["measured"] and found["D"] == 60 * 8 * 32
        assert 0.5 < found["flops_program"] / found["flops_head_full"] < 1.5 and found["loss_error"] > 0
        assert found["peak"] == found["learning_rate"] and found["C"] == 6 * found["N"] * found["D"]
        assert starts(folder, name) == 1


def test_a_second_time_nothing_runs(swept, capfd):
    folder, _ = swept
    assert call(*SWEEP, f"--workdir={folder}") == 0
    out = capfd.readouterr().out
    assert "4 of 4" in out and "best: 0.01" in out and all(starts(folder, name) == 1 for name in NAMES)


def test_a_run_of_other_settings_is_refused_by_its_difference(swept, capfd):
    folder, _ = swept
    assert call(*SWEEP, f"--workdir={folder}", "--set=train.steps=70") == 2
    err = capfd.readouterr().err
    assert "train.steps was 60, is 70" in err and "lr0.01/seed0" in err


def test_a_sweep_is_no_run_and_a_run_no_sweep(tmp_path, capfd):
    assert call("train", f"--experiment={TINY}:sweep", f"--workdir={tmp_path / 'a'}") == 2
    assert "is it for lm sweep?" in capfd.readouterr().err
    assert call("sweep", f"--experiment={TINY}", f"--workdir={tmp_path / 'a'}") == 2
    assert "for lm train?" in capfd.readouterr().err and not (tmp_path / "a").exists()


def test_other_launchers_get_a_command_a_run(tmp_path, capfd):
    assert call(*SWEEP, f"--workdir={tmp_path}", "--launcher=commands", "--only=lr0.01/*") == 0
    lines = capfd.readouterr().out.splitlines()
    assert [line.rpartition("--only=")[2] for line in lines] == NAMES[:2]
    assert call(*SWEEP, f"--workdir={tmp_path}", "--launcher=slurm") == 0
    script = (tmp_path / "sweep.sbatch").read_text()
    assert "--array=0-3" in script and script.count("--only=") == 4
    assert subprocess.run(["bash", "-n", tmp_path / "sweep.sbatch"]).returncode == 0
    for flags in (("commands", "--retries=2"), ("slurm", "--parallel=2"), ("none", "--only=lr0.01/*")):
        assert call(*SWEEP, f"--workdir={tmp_path}", f"--launcher={flags[0]}", flags[1]) == 2
        assert "has no effect" in capfd.readouterr().err
    assert call(*SWEEP, f"--workdir={tmp_path}", "--only=lr0.1/*") == 2
    assert "lr0.01/seed0" in capfd.readouterr().err


def test_a_plan_has_a_row_a_run_and_trains_nothing(tmp_path, capfd):
    assert call("sweep", f"--experiment={TINY}:families", f"--workdir={tmp_path / 'a'}", "--launcher=none") == 0
    rows = {line.split()[0]: line.split()[1:] for line in capfd.readouterr().out.splitlines() if line.strip()}
    assert not rows["counted"] and len(rows["decoder"]) > len(rows["lanes"]) > 5
    assert not (tmp_path / "a" / "lanes").exists()


@pytest.mark.slow
def test_families_are_compared_by_the_work_of_each(tmp_path, capfd):
    process = start("sweep", f"--experiment={TINY}:families", f"--workdir={tmp_path}", stdout=subprocess.PIPE)
    assert process.wait(timeout=400) == 0
    assert call("report", f"--workdir={tmp_path}") == 0
    with open(tmp_path / "report.csv") as file:
        cells = {cells["arm"]: cells for cells in csv.DictReader(file)}
    assert list(cells) == ["counted", "lanes", "decoder"]
    for name, found in cells.items():
        assert float(found["FLOPs"]) == pytest.approx(row(tmp_path, name)["flops_model"])
    lanes = row(tmp_path, "lanes")
    assert lanes["flops_model"] == pytest.approx(6 * lanes["N"] * lanes["D"])  # Nothing is attended to.
    assert lanes["flops_model"] == pytest.approx(lanes["flops_program"], rel=0.05)
    picture = (tmp_path / "report.svg").read_text()
    assert "training FLOPs" in picture


@pytest.mark.slow
def test_a_run_that_cannot_be_is_named_and_the_others_end(tmp_path):
    command = ("sweep", f"--experiment={TINY}:failing", f"--workdir={tmp_path}", "--parallel=2")
    process = start(*command, devices=None, stdout=subprocess.PIPE)
    out, _ = process.communicate(timeout=400)
    assert process.returncode == 1
    assert "trying again" not in out  # What a user must mend fails again.
    assert "fewer than a window" in next(line for line in out.splitlines() if line.startswith("lr0.01/seed0 failed:"))
    assert row(tmp_path, "lr0.001/seed0")["status"] == "done"


@pytest.mark.slow
def test_a_measure_that_fails_fails_again_and_trains_nothing(tmp_path):
    command = ("sweep", f"--experiment={TINY}:unmeasured", f"--workdir={tmp_path}", "--retries=0")
    for _ in range(2):
        process = start(*command, devices=None, stdout=subprocess.PIPE)
        out, _ = process.communicate(timeout=400)
        assert process.returncode == 1 and "not to be measured" in out
    assert row(tmp_path, "odd/seed0")["status"] == "done" and "measured" not in row(tmp_path, "odd/seed0")
    assert (tmp_path / "odd/seed0" / "metrics.jsonl").read_text().count('"step": 60,') == 2  # Training and validation.


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_sweep_that_is_stopped_or_killed_goes_on_where_it_was(swept, tmp_path, number):
    undisturbed, _ = swept
    command = (*SWEEP, f"--workdir={tmp_path}", "--set=train.save_every=5")
    process = start(*command, devices=None, stdout=subprocess.DEVNULL)
    while not list(tmp_path.glob("*/*/checkpoints/5")):
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(number)
    assert process.wait(120) == (75 if number == signal.SIGTERM else -signal.SIGKILL)
    again = start(*command, devices=None, stdout=subprocess.DEVNULL)
    assert again.wait(400) == 0
    for name in NAMES:
        assert digests(tmp_path / name, 60) == digests(undisturbed / name, 60)
