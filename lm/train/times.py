"""Where the wall time of a start goes: every second is of one class, and the ledger has the sums."""

import contextlib
import datetime
import os
import threading
import time
from collections.abc import Iterator
from typing import Any

from jax import monitoring

from lm.core import files
from lm.train import ledger, lock, metrics
from lm.train.ledger import Ledger

CLASSES = ("start", "compile", "data", "step", "evaluate", "checkpoint", "other")
_COMPILING = "/jax/core/compile/"  # Of jax's events: tracing, lowering, and compiling or reading from the cache.
_SAME_S = 5.0  # Between a row's time and its file's; object stores count whole seconds.


class Times:
    """Sums the seconds of this process by class, from its start on where that is given, else from now on.

    "start" lasts until the first step; "compile" is what jax says of the main thread's tracing and compiling, whatever
    it is for; "data" the wait for batches, also where a device works meanwhile; "step" the rest of the loop. Inside a
    `with` jax is listened to.
    """

    def __init__(self, ledger: Ledger, process_began: float | None = None):
        self.counted_from = "call" if process_began is None else "process"
        self._ledger = ledger
        self._seconds = dict.fromkeys(CLASSES, 0.0)
        self._name = "start"
        self._since = time.monotonic() if process_began is None else process_began
        self._thread = threading.get_ident()
        self._compiled: list[tuple[float, float]] = []  # Begin and end, disjoint.

    def enter(self, name: str) -> str:
        """Of class `name` is what comes from now on; returns the class until now."""
        now, before = time.monotonic(), self._name
        self._seconds[before] += now - self._since
        self._name, self._since = name, now
        return before

    @contextlib.contextmanager
    def within(self, name: str) -> Iterator[None]:
        """Of class `name` is what is done inside."""
        before = self.enter(name)
        try:
            yield
        finally:
            self.enter(before)

    def move(self, name: str, seconds: float) -> None:
        """So many of the seconds that went by last were of class `name`."""
        self._seconds[self._name] -= seconds
        self._seconds[name] += seconds

    def spent(self) -> dict[str, float]:
        """{class: seconds} until now, which add up to the time since the beginning."""
        self.enter(self._name)
        return {name: round(seconds, 3) for name, seconds in self._seconds.items()}

    def write(self, event: str, **fields: Any) -> None:
        """A row of the ledger with the sums until now: `spent`, {class_s: seconds}."""
        self._ledger.write(event, **fields, spent={f"{name}_s": seconds for name, seconds in self.spent().items()})

    def __enter__(self) -> "Times":
        monitoring.register_event_time_span_listener(self._compiles)
        return self

    def __exit__(self, *_: object) -> None:
        monitoring.unregister_event_time_span_listener(self._compiles)

    def _compiles(self, event: str, start_time: float, end_time: float, **_: str | int) -> None:
        if not event.startswith(_COMPILING) or threading.get_ident() != self._thread:
            return
        seconds = end_time - start_time
        while self._compiled and self._compiled[-1][0] >= start_time:  # Spans nest, and the inner one ends first.
            inner = self._compiled.pop()
            seconds -= inner[1] - inner[0]
        self._compiled.append((start_time, end_time))
        self.move("compile", seconds)


def process_start() -> float | None:
    """When this process started, by `time.monotonic`; None where the kernel does not say."""
    ticks = lock.started(os.getpid())
    if not isinstance(ticks, int):
        return None
    return time.monotonic() - (time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK"))


def last_sign(folder: str | os.PathLike) -> str | None:
    """When the last start was last seen alive (UTC), by its metrics and its lock's heartbeat: a kill leaves no word.

    None where there is nothing, and where the files' times say nothing, being those of a copy or of another clock.
    """
    rows = Ledger(folder).rows()
    starts = [row for row in rows if row["event"] == "start"]
    written = files.modified(files.path(folder) / ledger.NAME)
    if not starts or written is None or abs(written - _instant(rows[-1]["time"])) > _SAME_S:
        return None
    held = (lock.holder(folder) or {}).get("id") == starts[-1].get("lock")  # Else of a start that came to no row.
    signs = [files.modified(files.path(folder) / name) for name in (metrics.NAME, *[lock.NAME] * held)]
    newest = max((sign for sign in signs if sign is not None), default=None)
    if newest is None:
        return None
    return datetime.datetime.fromtimestamp(newest, datetime.UTC).isoformat(timespec="milliseconds")


def _instant(text: str) -> float:
    return datetime.datetime.fromisoformat(text).timestamp()
