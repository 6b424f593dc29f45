"""A run that makes no step is ended, with its stacks; one that is slow, or does something else, is not."""

import json
import os
import pathlib
import subprocess
import sys
import time

import pytest

from lm.core.errors import UsageError
from lm.train import watchdog
from lm.train.ledger import Ledger
from lm.train.run import Train
from lm.train.watchdog import Watchdog

ROOT = pathlib.Path(__file__).resolve().parents[2]
HANGS = """
import sys, threading, time
from lm.train.ledger import Ledger
from lm.train.watchdog import Watchdog
def reads_for_ever():
    threading.Event().wait(60)
with Watchdog(0.5, sys.argv[1], Ledger(sys.argv[1]), 75) as watchdog:
    for step in (1, 2, 3):
        watchdog.step(step)
    reads_for_ever()
"""


def test_a_process_that_hangs_ends_with_its_code_and_its_stacks(tmp_path):
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", HANGS, str(tmp_path)]
    result = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=40)
    assert result.returncode == 75
    assert "process 0 is at a place unknown: no step has ended in time since step 3" in result.stderr
    stacks = (tmp_path / "stacks" / "3-0.txt").read_text()
    assert all('File "<string>", line 6 in reads_for_ever' in text for text in (result.stderr, stacks))
    (row,) = [json.loads(line) for line in (tmp_path / "ledger.jsonl").read_text().splitlines()]
    assert (row["event"], row["step"], row["processes_at"]) == ("hung", 3, {"a place unknown": [0]})


@pytest.fixture
def fired(monkeypatch):
    """What the watchdog found, instead of the end of this process."""
    found = []
    monkeypatch.setattr(Watchdog, "_leave", lambda self, why: found.append(why))
    monkeypatch.setattr(watchdog, "POLL_S", 0.02)
    return found


def guard(folder, limit_s=0.1):
    return Watchdog(limit_s, folder, Ledger(folder), 75)


def test_nothing_is_due_before_two_steps_have_ended(tmp_path, fired):
    with guard(tmp_path) as dog:
        time.sleep(0.3)
        dog.step(1)
        time.sleep(0.3)
    assert not fired


def test_slow_steps_have_ten_times_their_median(tmp_path, fired):
    with guard(tmp_path) as dog:
        for step in (1, 2, 3):
            dog.step(step)
            time.sleep(0.08)
        dog.step(4)
        time.sleep(0.4)
        assert not fired
        time.sleep(1.0)
        assert fired


def test_what_is_done_instead_of_steps_has_half_an_hour(tmp_path, fired, monkeypatch):
    assert watchdog.PAUSE_S == 1800
    with guard(tmp_path) as dog:
        dog.step(1)
        dog.step(2)
        with dog.paused():
            time.sleep(0.3)
        dog.step(3)
        assert not fired
        monkeypatch.setattr(watchdog, "PAUSE_S", 0.1)
        with dog.paused():
            time.sleep(0.3)
        assert fired


def test_after_a_pause_the_time_goes_on_where_it_stood(tmp_path, fired):
    with guard(tmp_path, 0.2) as dog:
        dog.step(1)
        dog.step(2)
        with dog.paused():
            time.sleep(0.3)
        time.sleep(0.05)
        assert not fired
        time.sleep(0.4)
        assert fired


def test_zero_switches_it_off(tmp_path, fired):
    with guard(tmp_path, 0.0) as dog:
        dog.step(1)
        dog.step(2)
        time.sleep(0.2)
    assert not fired
    with pytest.raises(UsageError, match="0 switches the watchdog off"):
        Train(watchdog_s=-1)


def test_a_note_of_a_peer_is_enough(tmp_path, fired, monkeypatch):
    notes = {}
    monkeypatch.setattr(watchdog.hosts, "posted", lambda name: notes)
    with guard(tmp_path, 60.0):
        time.sleep(0.1)
        assert not fired
        notes[3] = "lm/train/loop.py:1 fit"
        time.sleep(0.2)
    assert fired[0] == "process 3 says that the run hangs"
