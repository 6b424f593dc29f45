"""One run a folder: never two, and never none because of one that died."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from lm.core.errors import UsageError
from lm.train import lock
from lm.train.lock import RunLock

ROOT = pathlib.Path(__file__).resolve().parents[2]
# Waits for the starting gun (a file), takes the lock, says so, and holds it until it is told or killed.
HOLDER = """
import pathlib, sys, time
from lm.core.errors import UsageError
from lm.train.lock import RunLock
folder, gun = map(pathlib.Path, sys.argv[1:3])
print("ready", flush=True)
while not gun.exists(): time.sleep(0.001)
try:
    RunLock(folder, report=lambda event, **fields: print(event, fields["reason"], flush=True)).acquire()
except UsageError as error:
    print("refused", error, flush=True)
else:
    print("held", flush=True)
    sys.stdin.readline()
"""


def start(folder, gun):
    command = [sys.executable, "-c", HOLDER, str(folder), str(gun)]
    process = subprocess.Popen(
        command, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "ready\n"
    return process


def stop(*processes):
    for process in processes:
        process.kill()
        process.communicate()


def foreign(folder, **fields):
    """Writes the lock of a holder that this machine cannot look up."""
    holder = {"id": "x", "host": "elsewhere", "boot": "?", "pid": 1, "started": 1, "interval_s": 0.1, "beats": 0}
    (folder / lock.NAME).write_text(json.dumps(holder | fields))


def test_a_second_run_is_refused_by_host_and_pid_until_the_first_has_gone(tmp_path):
    gun = tmp_path / "gun"
    gun.touch()
    first = start(tmp_path / "run", gun)
    assert first.stdout.readline() == "held\n"
    with pytest.raises(UsageError, match=rf"in use by process {first.pid} on .* since \d{{4}}-.*--steal"):
        RunLock(tmp_path / "run").acquire()
    first.send_signal(signal.SIGKILL)
    first.wait()
    events = []
    with RunLock(tmp_path / "run", report=lambda event, **fields: events.append((event, fields["pid"]))):
        assert events == [("lock_taken_over", first.pid)]
    assert not (tmp_path / "run" / lock.NAME).exists()
    stop(first)


@pytest.mark.parametrize("stale", (False, True))
def test_of_many_that_start_at_once_one_wins(tmp_path, stale):
    for attempt in range(3):
        folder, gun = tmp_path / str(attempt), tmp_path / f"gun{attempt}"
        folder.mkdir()
        if stale:
            here = RunLock(folder)._mine
            (folder / lock.NAME).write_text(json.dumps(here | {"id": "dead", "pid": 2**22 + 1}))
        racers = [start(folder, gun) for _ in range(4)]
        gun.touch()
        said = [racer.stdout.readline() for racer in racers]
        said = [
            racer.stdout.readline() if line.startswith("lock_taken") else line
            for racer, line in zip(racers, said, strict=True)
        ]
        stop(*racers)
        assert sum(line == "held\n" for line in said) == 1, said
        assert sum(line.startswith("refused") for line in said) == 3, said


def test_a_reused_process_number_does_not_hold_a_dead_ones_lock(tmp_path):
    here = RunLock(tmp_path)._mine
    (tmp_path / lock.NAME).write_text(json.dumps(here | {"id": "dead", "pid": os.getppid(), "started": 1}))
    RunLock(tmp_path).acquire().release()


def test_another_hosts_lock_is_taken_after_three_intervals_without_a_beat(tmp_path):
    foreign(tmp_path)
    events = []
    before = time.monotonic()
    RunLock(tmp_path, report=lambda event, **fields: events.append(event)).acquire().release()
    assert time.monotonic() - before >= 0.3 and events == ["lock_watched", "lock_taken_over"]


def test_another_hosts_lock_that_beats_is_refused_whatever_the_clocks_say(tmp_path, monkeypatch):
    foreign(tmp_path)
    sleep = time.sleep

    def beat(seconds):
        sleep(seconds / 10)
        foreign(tmp_path, beats=1)

    monkeypatch.setattr(time, "sleep", beat)
    monkeypatch.setattr(time, "time", lambda: 4e9)
    with pytest.raises(UsageError, match="on elsewhere"):
        RunLock(tmp_path).acquire()


def test_a_damaged_lock_is_nobodys(tmp_path):
    (tmp_path / lock.NAME).write_text('{"id"')
    RunLock(tmp_path).acquire().release()


def test_stealing_is_told_to_the_robbed_who_leaves_the_thiefs_lock_alone(tmp_path):
    robbed = RunLock(tmp_path, interval_s=0.05).acquire()
    with pytest.raises(UsageError):
        RunLock(tmp_path).acquire()
    thief = RunLock(tmp_path, steal=True).acquire()
    deadline = time.monotonic() + 5
    while not robbed.lost and time.monotonic() < deadline:
        time.sleep(0.01)
    assert robbed.lost
    robbed.release()
    assert thief._is_mine()
    thief.release()


def test_the_heartbeat_moves(tmp_path):
    with RunLock(tmp_path, interval_s=0.02):
        time.sleep(0.3)
        assert json.loads((tmp_path / lock.NAME).read_text())["beats"] >= 3
