"""One run a folder: a lock that outlives no process, and that two starters never both win."""

import contextlib
import os
import platform
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any

from lm.core import files
from lm.core.errors import UsageError

NAME = "lock.json"
_MISSED = 3  # Heartbeats that a holder on another host may miss before its lock is taken over.
_Holder = dict[str, Any]


class Held(UsageError):
    """Another process has the folder, and lives."""


class RunLock:
    """Holds `lock.json` of a run folder from `acquire` to `release`, or inside a `with`.

    A thread moves its heartbeat every `interval_s` seconds. A lock whose process is dead on this host is taken
    over at once; one of another host when its heartbeat, watched from here, stands still for three of its
    intervals: clocks are never compared. `report(event, **fields)` is told (a `Ledger.write`). `steal` takes it
    from a live process too, whose `lost` then turns true.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        *,
        interval_s: float = 10.0,
        steal: bool = False,
        report: Callable[..., None] | None = None,
    ):
        self._file = files.path(folder) / NAME
        self._steal = steal
        self._report = report or (lambda event, **fields: None)
        self._mine: _Holder = {
            "id": uuid.uuid4().hex,
            **_process(),
            "since": time.strftime("%Y-%m-%d %H:%M:%S %z"),
            "interval_s": interval_s,
            "beats": 0,
        }
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self.lost = False

    @property
    def id(self) -> str:
        """Of this lock alone, as `lock.json` has it."""
        return self._mine["id"]

    def acquire(self) -> "RunLock":
        """Raises Held where another process holds the lock and lives."""
        self._file.parent.mkdir(parents=True, exist_ok=True)
        holder = self._take(_is_dead)
        if holder is not None and self._steal:
            holder = self._take(lambda now: "stolen")
        elif holder is not None and not _is_here(holder):
            self._report("lock_watched", **_named(holder))
            time.sleep(_MISSED * float(holder.get("interval_s", 10.0)))
            pulse = holder.get("id"), holder.get("beats")
            holder = self._take(lambda now: "no heartbeat" if (now.get("id"), now.get("beats")) == pulse else None)
        if holder is not None:
            raise Held(
                f"{self._file.parent} is in use by process {holder.get('pid')} on {holder.get('host')} since "
                f"{holder.get('since')}: wait for it, stop it, or take the folder away from it with --steal"
            )
        self._thread = threading.Thread(target=self._beat, name="run lock", daemon=True)
        self._thread.start()
        return self

    def release(self) -> None:
        """Gives the folder up; a lock that has been stolen is the thief's and stays."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
            with self._guard():
                if self._is_mine():
                    self._file.unlink()

    def __enter__(self) -> "RunLock":
        return self.acquire()

    def __exit__(self, *_: object) -> None:
        self.release()

    def _take(self, why: Callable[[_Holder], str | None]) -> _Holder | None:
        """None if the lock is ours now: there was none, or `why` gave a reason; else its holder."""
        with self._guard():
            holder = self._read()
            reason = why(holder) if holder else None
            if holder and reason is None:
                return holder
            files.write_json(self._file, self._mine)
        if not files.is_local(self._file):
            # An object store has no lock to guard with: the last of two racing writers wins, and both look.
            time.sleep(1.0)
            if not self._is_mine():
                return self._read()
        if holder:
            self._report("lock_taken_over", reason=reason, **_named(holder))
        return None

    def _beat(self) -> None:
        while not self._stop.wait(self._mine["interval_s"]):
            # A full disk must not end the thread: the next beat may fit again.
            with contextlib.suppress(OSError), self._guard():
                if not self._is_mine():
                    self.lost = True
                    return
                self._mine["beats"] += 1
                files.write_json(self._file, self._mine)

    def _is_mine(self) -> bool:
        return (self._read() or {}).get("id") == self.id

    def _read(self) -> _Holder | None:
        return holder(self._file.parent)

    @contextlib.contextmanager
    def _guard(self) -> Iterator[None]:
        """Reading and writing as one act among processes; the kernel frees it when one dies."""
        if not files.is_local(self._file):
            yield
            return
        import fcntl

        with open(f"{self._file}.guard", "ab") as f:
            fcntl.flock(f, fcntl.LOCK_EX)
            yield


def holder(folder: str | os.PathLike) -> _Holder | None:
    """What `lock.json` of a run folder says of the lock's holder; None where there is none."""
    try:
        found = files.read_json(files.path(folder) / NAME)
    except FileNotFoundError:
        return None
    except ValueError:
        found = None
    # Written whole or not at all, so anything else is damage: nobody's lock, judged by its heartbeat.
    return found if isinstance(found, dict) else {"id": "unreadable", "interval_s": 1.0}


def _process() -> _Holder:
    """This process, so that neither another host's, nor a container's, nor a reused number is taken for it."""
    pid = os.getpid()
    return {"host": platform.node(), "boot": _boot(), "pid": pid, "started": started(pid)}


def _is_here(holder: _Holder) -> bool:
    here = _process()
    return all(holder.get(k) == here[k] for k in ("host", "boot"))


def _is_dead(holder: _Holder) -> str | None:
    if _is_here(holder) and started(holder["pid"]) != holder.get("started"):
        return "its process is dead"
    return None


def started(pid: int) -> int | str | None:
    """When a live process started, in the kernel's ticks; None where there is none (or its parent buries it late)."""
    try:
        with open(f"/proc/{pid}/stat") as f:
            fields = f.read().rpartition(")")[2].split()
        return None if fields[0] in "ZX" else int(fields[19])
    except FileNotFoundError:
        pass
    if os.path.exists("/proc/self/stat"):
        return None
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass
    return "unknown"


def _boot() -> str:
    """One start of one kernel, and the space that its process numbers belong to."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as f:
            return f"{f.read().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _named(holder: _Holder) -> _Holder:
    return {name: holder.get(name) for name in ("host", "pid", "since")}
