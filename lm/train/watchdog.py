"""Ends a run that makes no step any more, with every thread's stack, so that its launcher starts it again."""

import collections
import contextlib
import faulthandler
import os
import pathlib
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator

import jax

from lm.core import files
from lm.parallel import hosts
from lm.train.ledger import Ledger

STACKS = "stacks"
PAUSE_S = 1800.0  # How long an evaluation or a save may take.
POLL_S, LINGER_S = 1.0, 1.5
_NOTE = "hung"
_PACKAGE = pathlib.Path(__file__).parents[1]


class Watchdog:
    """Inside a `with`, ends all processes of the run with exit code `code` where no step ends in time.

    The time is `limit_s`, or 10 times the median of the last steps where that is longer; with `limit_s` 0 there is no
    limit at all. It begins once two steps have ended: by then the first one, which compiles, is over on the device too.

    jax's own heartbeats come from a thread of their own, and go on where a process sleeps in Python: without this its
    peers wait for it in a collective for ever. Each process watches itself and the notes of the others, and leaves
    `stacks/<step>-<process>.txt` in the run folder; process 0 writes the row "hung" of the ledger, with where the main
    thread of each process is.
    """

    def __init__(self, limit_s: float, folder: str | os.PathLike, ledger: Ledger, code: int):
        self._limit_s, self._folder, self._ledger, self._code = limit_s, folder, ledger, code
        self._steps: collections.deque[float] = collections.deque(maxlen=64)
        self._done = 0
        self._since: float | None = None
        self._deadline = float("inf")
        self._stop = threading.Event()
        self._main = threading.current_thread()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def step(self, done: int) -> None:
        """A step has ended, or at least the one before it."""
        now = time.monotonic()
        if self._since is not None:
            self._steps.append(now - self._since)
            self._deadline = now + max(self._limit_s, 10 * statistics.median(self._steps))
        self._done, self._since = done, now

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """No step is due meanwhile: there is half an hour for what is done instead."""
        start, deadline = time.monotonic(), self._deadline
        self._deadline = start + PAUSE_S
        yield
        spent = time.monotonic() - start
        self._deadline = deadline + spent
        if self._since is not None:
            self._since += spent

    def __enter__(self) -> "Watchdog":
        if self._limit_s:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if self._limit_s:
            self._thread.join(POLL_S)

    def _watch(self) -> None:
        before = time.monotonic()
        while not self._stop.wait(POLL_S):
            now = time.monotonic()
            # A process that was stopped as a whole (Ctrl-Z, a debugger) has lost that time and does not hang.
            self._deadline += max(0.0, now - before - 2 * POLL_S)
            before = now
            if now > self._deadline:
                self._leave(f"no step has ended in time since step {self._done}")
            notes = {}
            with contextlib.suppress(Exception):  # Without its coordinator, this process is ended by jax.
                notes = hosts.posted(_NOTE)
            if notes:
                self._leave(f"process {min(notes)} says that the run hangs")

    def _leave(self, why: str) -> None:
        try:
            where = self._where()
            say = f"watchdog: process {jax.process_index()} is at {where}: {why}"
            print(f"{say}. Its stacks:", file=sys.stderr, flush=True)
            faulthandler.dump_traceback(sys.stderr)
            # The file system or the coordinator may be what hangs.
            telling = threading.Thread(target=self._tell, args=(where, say), daemon=True)
            telling.start()
            if jax.process_count() > 1:
                # Until the peers have read the note; the coordinator lives in process 0, whose end would abort them.
                time.sleep(LINGER_S + POLL_S * hosts.is_main())
            telling.join(LINGER_S)
            sys.stdout.flush()
        finally:
            os._exit(self._code)

    def _tell(self, where: str, say: str) -> None:
        hosts.post(_NOTE, where)
        with tempfile.TemporaryFile() as f:
            faulthandler.dump_traceback(f)
            f.seek(0)
            stacks = f.read()
        folder = files.path(self._folder) / STACKS
        folder.mkdir(parents=True, exist_ok=True)
        files.write_bytes(folder / f"{self._done}-{jax.process_index()}.txt", say.encode() + b"\n" + stacks)
        if hosts.is_main():
            time.sleep(POLL_S * (jax.process_count() > 1))
            places: dict[str, list[int]] = {}
            for process, place in sorted(hosts.posted(_NOTE).items()):
                places.setdefault(place, []).append(process)
            self._ledger.write("hung", step=self._done, processes_at=places or {where: [0]})

    def _where(self) -> str:
        """The line of ours that the main thread is in: of a run that hangs, one process is elsewhere than the rest."""
        frame = sys._current_frames().get(self._main.ident or 0)
        found = "a place unknown"
        while frame is not None:
            file = pathlib.Path(frame.f_code.co_filename)
            if file.is_relative_to(_PACKAGE):
                return f"{file.relative_to(_PACKAGE.parent)}:{frame.f_lineno} {frame.f_code.co_name}"
            frame = frame.f_back
        return found
