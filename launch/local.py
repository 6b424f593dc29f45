"""Starts N processes on this machine that find each other: python launch/local.py -n 2 -- COMMAND...

Each gets LM_COORDINATOR, LM_NUM_PROCESSES and LM_PROCESS_ID, and LM_LAUNCH, the same in every attempt. When one dies
the others are ended. The exit code is that of the first that failed (128 + n for signal n), else 75 (saved, wants a
restart) where any says so, else 0.
"""

import argparse
import contextlib
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Sequence
from typing import BinaryIO

RESTART = 75
STUCK = 3  # Restarts in a row after which no newer step is on disk: a crash loop.
SAVING_S, DYING_S = 120.0, 10.0  # How long peers of one that ended well, or died, may take to end themselves.
POLL_S = 0.05


class Group:
    """The processes of one attempt, each the leader of a process group of its own."""

    def __init__(self, command: Sequence[str], count: int, port: int | None = None):
        self.processes: list[subprocess.Popen] = []
        self._pumps: list[threading.Thread] = []
        coordinator = f"127.0.0.1:{port or free_port()}"
        for rank in range(count):
            layout = {"LM_COORDINATOR": coordinator, "LM_NUM_PROCESSES": str(count), "LM_PROCESS_ID": str(rank)}
            self._start(command, {**os.environ, **layout}, rank)

    def _start(self, command: Sequence[str], environ: dict[str, str], rank: int) -> None:
        # Rank 0 keeps a terminal, for its progress bar; else all go line by line, and the others' lines say whose.
        out, err = (subprocess.PIPE, subprocess.STDOUT) if rank else (None, None)
        if out is None and not sys.stdout.isatty():
            out = subprocess.PIPE
        process = subprocess.Popen(
            command, env=environ, stdin=subprocess.DEVNULL, stdout=out, stderr=err, process_group=0
        )
        self.processes.append(process)
        if process.stdout is not None:
            pump = threading.Thread(
                target=_relay_lines, args=(process.stdout, f"[{rank}] " if rank else ""), daemon=True
            )
            pump.start()
            self._pumps.append(pump)

    def send(self, number: int, *, ended: bool = False) -> None:
        """The signal to every process that still runs and to what it started; with `ended`, to all that was started."""
        for process in self.processes:
            if ended or process.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, number)

    def wait(self) -> int:
        """The exit code of the group; once one has ended the others have to follow."""
        failure, deadline = 0, float("inf")
        while None in (codes := [process.poll() for process in self.processes]):
            ended = [_code(code) for code in codes if code is not None]
            if not failure and (failed := [code for code in ended if code not in (0, RESTART)]):
                failure, deadline = failed[0], time.monotonic() + DYING_S
                self.send(signal.SIGTERM)
            elif ended:
                deadline = min(deadline, time.monotonic() + SAVING_S)
            if time.monotonic() > deadline:
                failure = failure or 1
                self.send(signal.SIGKILL)
            time.sleep(POLL_S)
        final = [failure, *(_code(code) for code in codes if code is not None)]
        code = next((code for code in final if code not in (0, RESTART)), RESTART if RESTART in final else 0)
        if code:  # What they started would hold memory and devices that a further attempt needs.
            self.send(signal.SIGKILL, ended=True)
        for pump in self._pumps:
            pump.join(timeout=1.0)
        return code


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code; with --restarts, that of the last attempt, or 1 for a crash loop."""
    options = _parse(arguments)
    stopped: list[int] = []
    groups: list[Group] = []

    def forward(number: int, frame: object) -> None:
        stopped.append(number)
        for group in groups[-1:]:
            group.send(number)

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, forward)
    os.environ.setdefault("LM_LAUNCH", f"local-{uuid.uuid4().hex[:12]}")
    folder = _workdir(options.command)
    stuck, reached = 0, _newest_step(folder)
    for attempt in range(options.restarts + 1):
        groups.append(Group(options.command, options.processes, options.port))
        if stopped:  # It came while the processes were being started.
            groups[-1].send(stopped[-1])
        code = groups[-1].wait()
        if stopped or not _wants_restart(code) or attempt == options.restarts:
            return code
        step = _newest_step(folder)
        stuck = 0 if step > reached else stuck + 1
        reached = max(step, reached)
        if stuck == STUCK and "://" not in folder:  # Behind a scheme, the run itself counts what its ledger says.
            print(
                f"launch: {STUCK} attempts ended at step {max(step, 0)} with exit code {code}: giving up",
                file=sys.stderr,
            )
            return 1
        print(f"launch: exit code {code} at step {max(step, 0)}: starting again", file=sys.stderr)
    return code


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="launch/local.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-n", dest="processes", type=int, default=1, help="processes to start")
    parser.add_argument("--port", type=int, help="the coordinator's port (a free one)")
    parser.add_argument("--restarts", type=int, default=0, help="attempts after exit code 75 or a death by signal")
    parser.add_argument("command", nargs="+", metavar="-- COMMAND", help="what each process runs")
    options = parser.parse_args(arguments)
    if options.processes < 1:
        parser.error(f"-n {options.processes} must be at least 1")
    if shutil.which(options.command[0]) is None:
        parser.error(f"there is no command {options.command[0]!r}")
    return options


def _wants_restart(code: int) -> bool:
    return code == RESTART or code > 128


def _code(returncode: int) -> int:
    return 128 - returncode if returncode < 0 else returncode


def _workdir(command: Sequence[str]) -> str:
    """The command's --workdir, empty where it has none."""
    folder = ""
    for flag, following in zip(command, [*command[1:], ""], strict=True):
        name, equals, value = flag.partition("=")
        if name.lstrip("-") == "workdir" and name.startswith("-"):
            folder = value if equals else following
    return folder


def _newest_step(folder: str) -> int:
    """The newest step folder of a run folder; -1 where there is none."""
    checkpoints = pathlib.Path(folder) / "checkpoints"
    if not folder or not checkpoints.is_dir():
        return -1
    return max((int(p.name) for p in checkpoints.iterdir() if p.name.isdigit()), default=-1)


def _relay_lines(stream: BinaryIO, prefix: str) -> None:
    for line in stream:
        sys.stdout.buffer.write(prefix.encode() + line)
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    sys.exit(main())
