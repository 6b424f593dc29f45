"""What real runs of two processes do about a fault in one of them."""

import os
import signal
import subprocess
import sys
import time

import pytest

from lm.train import loop
from lm.train.ledger import Ledger
from tests.main.helpers import ROOT, TINY, call, events, start

FAULTS = TINY.with_name("faults.py")
PAIR = (ROOT / "launch" / "local.py", "-n", "2", "--")


@pytest.mark.slow
def test_when_one_process_hangs_all_leave_for_a_restart(tmp_path):
    limit_s = 4
    arguments = ("train", f"--experiment={FAULTS}:hung", f"--workdir={tmp_path}", f"--set=train.watchdog_s={limit_s}")
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = start(*arguments, devices=None, launcher=PAIR, **pipes)
    said = ""
    while "hangs from now on" not in said:
        said = process.stdout.readline()
        assert said, process.stderr.read()
    begun = time.monotonic()
    out, err = process.communicate(timeout=60)
    assert time.monotonic() - begun < limit_s + 5
    assert process.returncode == 75, out + err
    # Process 1's standard error comes with its output.
    assert "[1] watchdog: process 1 is at lm/train/stragglers.py" in out and "faults.py" in out
    assert "watchdog: process 0 is at lm/" in err and "loop.py" in err
    (row,) = events(tmp_path, "hung")
    (at,) = [place for place, processes in row["processes_at"].items() if processes == [1]]
    assert at.endswith(" next") and row["step"] == 19
    assert {f.name for f in (tmp_path / "stacks").iterdir()} == {"19-0.txt", "19-1.txt"}


@pytest.mark.slow
def test_a_slow_process_is_named(tmp_path):
    arguments = ("train", f"--experiment={FAULTS}:straggler", f"--workdir={tmp_path}", "--set=train.eval_every=1000")
    process = start(*arguments, devices=None, launcher=PAIR, stdout=subprocess.PIPE)
    out, _ = process.communicate(timeout=240)
    assert process.returncode == 0 and "process 1 on" in out and "is slow" in out
    rows = events(tmp_path, "straggler")
    assert {row["process"] for row in rows} == {1} and rows[0]["slowest"]["1"]["data_s"] > 0.045


@pytest.mark.slow
def test_the_peers_of_a_killed_process_leave_for_a_restart(tmp_path):
    """Each process by itself, as on hosts of their own."""
    arguments = ("train", f"--experiment={FAULTS}:slow", f"--workdir={tmp_path}")
    layout = {"LM_COORDINATOR": f"127.0.0.1:{20000 + os.getpid() % 10000}", "LM_NUM_PROCESSES": "2"}
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    environ = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "JAX_NUM_CPU_DEVICES")}
    environ |= layout | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "lm.main", *arguments]
    pair = [subprocess.Popen(command, env=environ | {"LM_PROCESS_ID": str(i)}, text=True, **quiet) for i in (0, 1)]
    metrics = tmp_path / "metrics.jsonl"
    while not (metrics.exists() and '"step": 10' in metrics.read_text()):
        assert [process.poll() for process in pair] == [None, None]
        time.sleep(0.05)
    pair[1].send_signal(signal.SIGKILL)
    _, err = pair[0].communicate(timeout=60)
    pair[1].communicate()
    assert pair[0].returncode == 75 and "another process of the run has ended" in err
    assert events(tmp_path, "peer_lost")


def test_three_starts_without_a_newer_checkpoint_are_enough(tmp_path, monkeypatch, capfd):
    for launch in ("a", "a", "b", "a", None):
        Ledger(tmp_path).write("start", step=0, launch=launch)
    arguments = ("train", f"--experiment={TINY}", f"--workdir={tmp_path}")
    monkeypatch.setattr(loop, "fit", lambda run, state, *_: (state, loop.RESTART))
    monkeypatch.setenv("LM_LAUNCH", "a")
    assert call(*arguments) == 1 and "3 starts from step 0" in capfd.readouterr().err
    assert [row["launch"] for row in events(tmp_path, "crash_loop")] == ["a"]
    monkeypatch.setenv("LM_LAUNCH", "b")
    assert call(*arguments) == 75 and events(tmp_path, "start")[-1]["launch"] == "b"
