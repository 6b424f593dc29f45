"""`lm train` as a whole: continuing to the bit, damage, bad input, what it leaves behind."""

import datetime
import json
import random
import signal
import subprocess
import time

import numpy as np
import pytest

from lm.parallel import layout
from tests.main.helpers import ROOT, TINY, call, digests, events, losses, start

TRAIN = ("train", f"--experiment={TINY}")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """A finished run of `tiny` in this process, over 8 devices."""
    workdir = tmp_path_factory.mktemp("undisturbed")
    assert call(*TRAIN, f"--workdir={workdir}") == 0
    return workdir


@pytest.fixture(scope="module")
def undisturbed_process(tmp_path_factory):
    """A finished run of `tiny` in a process of its own, over 2 devices."""
    workdir = tmp_path_factory.mktemp("undisturbed2")
    assert start(*TRAIN, f"--workdir={workdir}", stdout=subprocess.DEVNULL).wait(240) == 0
    return workdir


def test_a_run_learns_and_leaves_its_folder(undisturbed):
    found = {f.name for f in undisturbed.iterdir()}
    made = {"config.json", "ledger.jsonl", "metrics.jsonl", "tokenizer.json", "checkpoints", "samples", "loss.png"}
    assert made <= found
    assert {f.name for f in (undisturbed / "checkpoints").iterdir()} == {"50", "60"}
    loss = losses(undisturbed)
    assert set(loss) == {1, 10, 20, 30, 40, 50, 60} and loss[60] < loss[1] - 0.3
    rows = [json.loads(line) for line in (undisturbed / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "val_loss" in row] == [30, 60]
    assert all("tokens_per_second" in row and row["mfu"] > 0 for row in rows if row["step"] == 20)


def test_a_finished_run_says_so(undisturbed, capfd):
    assert call(*TRAIN, f"--workdir={undisturbed}") == 0
    out = capfd.readouterr().out
    assert "is done: all 60 steps" in out and "lm generate" in out


def test_a_run_cut_and_continued_equals_one_never_stopped(undisturbed, tmp_path):
    assert call(*TRAIN, f"--workdir={tmp_path}", "--set=train.steps=60", "--set=train.save_every=7") == 0
    step = max(int(f.name) for f in (tmp_path / "checkpoints").iterdir() if f.name != "60")
    (tmp_path / "checkpoints" / "60").rename(tmp_path / "lost")
    assert call(*TRAIN, f"--workdir={tmp_path}") == 0
    assert step == 56 and digests(tmp_path, 60) == digests(undisturbed, 60)
    assert losses(tmp_path) == losses(undisturbed)


def test_a_rate_that_follows_evaluations_does_so_over_a_cut_and_whatever_else_is_evaluated(tmp_path, capfd):
    plateau, halved = tmp_path / "plateau", tmp_path / "halved"
    again = ("train", f"--experiment={TINY}:plateau", f"--workdir={plateau}", "--set=train.eval_every=7")
    assert call("train", f"--experiment={TINY}:halved", f"--workdir={halved}") == 0
    assert call(*again) == 0
    assert digests(plateau, 50) == digests(halved, 50)
    assert "step 30  gained too little: the learning rate is 0.25 of its peak" in capfd.readouterr().out
    assert json.loads((plateau / "row.json").read_text())["decayed"]
    (plateau / "checkpoints" / "50").rename(tmp_path / "lost")
    assert call(*again) == 0  # From step 48, of four evaluations that count.
    assert "the learning rate is 0.125 of its peak, after 4 evaluations" in capfd.readouterr().out
    assert digests(plateau, 50) == digests(halved, 50)


def test_a_rate_that_follows_evaluations_outlives_losses_that_are_not_finite(tmp_path):
    arguments = (f"--experiment={TINY}:plateau", f"--workdir={tmp_path}", "--set=schedule.peak=1e30")
    assert call("train", *arguments, "--set=train.max_skipped=99") == 0
    meta = json.loads((tmp_path / "checkpoints" / "50" / "meta" / "metadata").read_text())["meta"]
    assert None in meta["val_losses"]


def test_a_rate_that_follows_evaluations_needs_some(tmp_path, capfd):
    arguments = (f"--experiment={TINY}:plateau", f"--workdir={tmp_path}", "--set=data.validation=0")
    assert call("train", *arguments) == 2
    assert "the corpus has none: build it with --validation" in capfd.readouterr().err


def test_every_second_of_an_undisturbed_run_is_accounted_for(undisturbed):
    row = json.loads((undisturbed / "row.json").read_text())
    spent = {name.removeprefix("seconds_"): row[name] for name in row if name.startswith("seconds_")}
    first, last = events(undisturbed, "start")[0], events(undisturbed, "stop")[0]
    wall = instant(last) - instant(first) + sum(first["spent"].values())
    assert sum(spent.values()) == pytest.approx(wall, rel=0.01) and first["counted_from"] == "call"
    assert spent["lost"] == spent["down"] == spent["other"] == 0
    assert all(spent[name] > 0 for name in ("start", "step", "evaluate", "checkpoint"))
    # Batches made ahead may cost no millisecond, and programs that a run before in this process has compiled none.
    assert spent["data"] >= 0 and spent["compile"] >= 0
    assert row["goodput"] == pytest.approx(spent["step"] / wall, rel=0.01)


def instant(row):
    return datetime.datetime.fromisoformat(row["time"]).timestamp()


@pytest.mark.slow
def test_every_second_of_a_killed_run_is_accounted_for(tmp_path, capfd):
    """The batches take 0.1 s each; the first start dies between two saves, the second is told to stop."""
    experiment = TINY.with_name("faults.py")
    arguments = ("train", f"--experiment={experiment}:slow", f"--workdir={tmp_path}", "--set=train.log_every=1")
    arguments += ("--set=train.save_every=10", "--set=train.steps=40")

    def run_until(step):
        process = start(*arguments, stdout=subprocess.DEVNULL)
        begun = time.time()
        while f'"step": {step},' not in (losses_or_none(tmp_path) or ""):
            assert process.poll() is None
            time.sleep(0.01)
        return process, begun

    process, begun = run_until(16)
    process.kill()
    killed = time.time()
    process.wait()
    assert call("report", f"--workdir={tmp_path}") == 0 and "has not ended" in capfd.readouterr().out
    time.sleep(2)
    process, again = run_until(26)
    process.terminate()
    assert process.wait(60) == 75
    stopped = instant(events(tmp_path, "stop")[0])
    last = time.time()
    assert start(*arguments, stdout=subprocess.DEVNULL).wait(120) == 0
    row = json.loads((tmp_path / "row.json").read_text())
    spent = {name.removeprefix("seconds_"): row[name] for name in row if name.startswith("seconds_")}
    wall = instant(events(tmp_path, "stop")[1]) - begun
    assert sum(spent.values()) == pytest.approx(wall, rel=0.01, abs=0.2)
    assert spent["down"] == pytest.approx(again - killed + last - stopped, abs=0.4)
    assert 0.5 < spent["lost"] < 1.5 and spent["lost"] + spent["data"] > 4.0
    assert call("report", f"--workdir={tmp_path}") == 0
    assert "| lost | " in capfd.readouterr().out and "<!-- lost " in (tmp_path / "report.html").read_text()


@pytest.mark.slow
def test_sigterm_saves_and_asks_for_a_restart(undisturbed_process, tmp_path):
    process = start(*TRAIN, f"--workdir={tmp_path}", "--set=train.save_every=1000", stdout=subprocess.DEVNULL)
    metrics = tmp_path / "metrics.jsonl"
    while not (metrics.exists() and '"step": 10' in metrics.read_text()):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    if process.wait(60) == 0:
        pytest.skip("the run ended before the signal came")
    assert process.returncode == 75
    assert start(*TRAIN, f"--workdir={tmp_path}", stdout=subprocess.DEVNULL).wait(120) == 0
    assert digests(tmp_path, 60) == digests(undisturbed_process, 60)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
def test_five_kills_at_random_instants_change_nothing(undisturbed_process, tmp_path, seed):
    rng = random.Random(seed)
    kills, arguments = 0, (*TRAIN, f"--workdir={tmp_path}", "--set=train.save_every=3")
    while kills < 5:
        process = start(*arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        # Half of the kills fall while the run starts or restores, the others among its steps and saves.
        if kills % 2:
            rows = losses_or_none(tmp_path)
            while losses_or_none(tmp_path) == rows and process.poll() is None:
                time.sleep(0.01)
        time.sleep(rng.uniform(0, 1 if kills % 2 else 4))
        if process.poll() is not None:
            break
        process.kill()
        process.wait()
        kills += 1
    assert kills >= 3
    assert start(*arguments, stdout=subprocess.DEVNULL).wait(120) == 0
    assert digests(tmp_path, 60) == digests(undisturbed_process, 60)
    assert losses(tmp_path) == losses(undisturbed_process)


def losses_or_none(workdir):
    return (workdir / "metrics.jsonl").read_text() if (workdir / "metrics.jsonl").exists() else None


@pytest.mark.slow
def test_two_processes_of_one_device_equal_one_process_of_two(undisturbed_process, tmp_path):
    launcher = (ROOT / "launch" / "local.py", "-n", "2", "--")
    process = start(*TRAIN, f"--workdir={tmp_path}", devices=None, launcher=launcher, stdout=subprocess.DEVNULL)
    assert process.wait(300) == 0
    assert digests(tmp_path, 60) == digests(undisturbed_process, 60)
    assert losses(tmp_path) == losses(undisturbed_process)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [("fsdp=8",), ("fsdp=2", "tensor=2")])
def test_another_mesh_gives_the_same_losses(tmp_path, mesh):
    # Adam turns the rounding of gradients near zero into whole steps; SGD leaves it as small as it is.
    for name, axes in (("one", ()), ("other", mesh)):
        sets = ["--set=optimizer=SGD", *(f"--set=mesh.{axis}" for axis in axes), "--set=train.log_every=1"]
        assert call(*TRAIN, f"--workdir={tmp_path / name}", *sets) == 0
    ours, theirs = (list(losses(tmp_path / name).values()) for name in ("other", "one"))
    assert len(ours) == 60 and ours[-1] < ours[0] - 0.1
    np.testing.assert_allclose(ours, theirs, rtol=2e-6)


def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_used(undisturbed, tmp_path, capfd):
    assert call(*TRAIN, f"--workdir={tmp_path}") == 0
    for file in (tmp_path / "checkpoints" / "60" / "state").rglob("*"):
        if file.is_file() and file.stat().st_size > 1000:
            data = bytearray(file.read_bytes())
            data[len(data) // 2] ^= 1
            file.write_bytes(data)
    capfd.readouterr()
    assert call(*TRAIN, f"--workdir={tmp_path}") == 0
    assert [(row["step"], row["used"]) for row in events(tmp_path, "quarantined")] == [(60, 50)]
    assert "60" in capfd.readouterr().out
    assert digests(tmp_path, 60) == digests(undisturbed, 60)


@pytest.mark.slow
def test_steps_without_finite_numbers_stop_the_run_and_move_nothing(tmp_path):
    arguments = ("train", f"--experiment={TINY}:poisoned", f"--workdir={tmp_path}")
    assert call(*arguments, "--set=train.save_every=1") == 17
    saved = sorted(int(f.name) for f in (tmp_path / "checkpoints").iterdir())
    before, after = digests(tmp_path, saved[-2]), digests(tmp_path, saved[-1])
    moved = {path for path in before if before[path] != after[path]}
    assert saved[-2] >= 20 and moved <= {"step", "examples", "skipped"}
    report = events(tmp_path, "not_finite")[0]
    assert report["in_a_row"] == 3 and report["parameter_norms"] and len(report["examples"]) == 2


@pytest.mark.slow
def test_one_step_without_finite_numbers_is_skipped_and_counted(tmp_path):
    assert call("train", f"--experiment={TINY}:hiccup", f"--workdir={tmp_path}") == 0
    assert [row["step"] for row in events(tmp_path, "skipped")] == [21]


def test_a_second_process_on_a_run_folder_is_refused(tmp_path, capfd):
    from lm.train.lock import RunLock

    with RunLock(tmp_path):
        assert call(*TRAIN, f"--workdir={tmp_path}") == 2
    assert "in use by process" in capfd.readouterr().err


@pytest.mark.slow
def test_a_changed_setting_is_named_at_resume(tmp_path, capfd):
    assert call(*TRAIN, f"--workdir={tmp_path}", "--set=train.steps=10") == 0
    assert call(*TRAIN, f"--workdir={tmp_path}", "--set=train.steps=12", "--set=schedule.peak=0.001") == 0
    out = capfd.readouterr().out
    assert "schedule.peak was 0.01, is 0.001" in out and "train.steps was 10, is 12" in out


@pytest.mark.slow
def test_another_corpus_at_resume_is_refused(tmp_path, capfd):
    for seed in (1, 2):
        source = f"synthetic:markov?symbols=8&tokens=40000&seed={seed}"
        assert call("corpus", f"--source={source}", "--tokenizer=char", f"--out={tmp_path / str(seed)}") == 0
    arguments = (*TRAIN, f"--workdir={tmp_path / 'run'}")
    assert call(*arguments, "--set=train.steps=10", f"--corpus={tmp_path / '1'}") == 0
    assert call(*arguments, "--set=train.steps=20", f"--corpus={tmp_path / '2'}") == 2
    assert "was trained with corpus" in capfd.readouterr().err
    assert call(*arguments, "--set=train.steps=20", f"--corpus={tmp_path / '2'}", "--allow_changed_data") == 0


def test_relative_folders_work(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    assert call("corpus", "--source=synthetic:markov?symbols=8&tokens=9000", "--tokenizer=char", "--out=runs/c") == 0
    assert call(*TRAIN, "--workdir=runs/a", "--corpus=runs/c", "--set=train.steps=2") == 0
    assert call("evaluate", "--checkpoint=runs/a", "--corpus=runs/c", "--split=train", "--max_tokens=64") == 0
    assert call("generate", "--checkpoint=runs/a/checkpoints/2", "--prompt=!", "--tokens=3") == 0
    assert "bits_per_byte: " in capfd.readouterr().out


def test_a_new_run_starts_from_given_weights(undisturbed, tmp_path):
    arguments = (*TRAIN, f"--workdir={tmp_path}", "--set=train.steps=1", "--set=schedule.warmup_steps=0")
    assert call(*arguments, f"--init_from={undisturbed}") == 0
    assert losses(tmp_path)[1] < losses(undisturbed)[1] - 0.3


@pytest.mark.slow
def test_a_profile_is_written(tmp_path):
    assert call(*TRAIN, f"--workdir={tmp_path}", "--set=train.steps=6", "--profile=3:4") == 0
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--experiment=quikstart"], "quickstart"),
        (["--experiment=quickstart:rnu"], "variant"),
        (["--experiment=nowhere.py"], "no file"),
        (["--experiment=quickstart", "--set=model.layrs=3"], "layers"),
        (["--experiment=quickstart", "--set=model.layers=many"], "type int"),
        (["--experiment=quickstart", "--set=schedule=Linaer"], "Linear"),
        (["--experiment=quickstart", "--set=train.steps=0"], "train.steps"),
        (["--experimnt=quickstart"], "experiment"),
        (["--experiment=quickstart", "train.steps=3"], "unexpected argument"),
        (["--experiment=gpt2_124m"], "--corpus=DIR"),
        (["--experiment=quickstart", "--corpus=/nowhere/at/all"], "nowhere"),
        (["--experiment=quickstart", "--set=mesh.tensor=3"], "tensor=3"),
        (["--experiment=quickstart", "--set=train.batch_size=3"], "batch_size=3"),
        (["--experiment=gpt2_124m", "--set=train.seq_len=100000"], "model.max_len"),
        (["--experiment=quickstart", "--set=train.keep_every=0"], "keep_every"),
        (["--experiment=quickstart", "--profile=5"], "FIRST:LAST"),
        ([], "--experiment is missing"),
    ],
)
def test_bad_input_is_refused_in_one_line_and_nothing_is_made(tmp_path, capfd, arguments, words):
    workdir = tmp_path / "run"
    assert call("train", f"--workdir={workdir}", *arguments) == 2
    err = capfd.readouterr().err.strip()
    assert words in err and "\n" not in err and not workdir.exists()


@pytest.mark.slow
def test_few_tokens_a_step_get_one_device_where_the_corpus_has_many_words(tmp_path):
    (tmp_path / "words.txt").write_text("\n".join(f"w{i} w{i + 1}" for i in range(10_000)))
    assert call("corpus", f"--source=text:{tmp_path}/words.txt", "--tokenizer=word", f"--out={tmp_path}/corpus") == 0
    # 2.7M parameters, of which 2.6M are the words', and 0.2M.
    for width, devices in ((128, 1), (8, layout.cpu_devices(8, {}))):
        flags = f"--corpus={tmp_path}/corpus", f"--set=model.width={width}", "--set=train.steps=1"
        command = ("train", f"--experiment={TINY}:lanes", f"--workdir={tmp_path}/{width}", *flags)
        process = start(*command, devices=None, stdout=subprocess.PIPE)
        out, _ = process.communicate(timeout=200)
        assert process.returncode == 0 and f"parameters on {devices} cpu" in out
