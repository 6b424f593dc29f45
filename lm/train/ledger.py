"""What happened to a run, and when: its starts, stops, saves, skips and take-overs, one line each."""

import datetime
import json
import os
import platform
from typing import Any

from lm.core import files

NAME = "ledger.jsonl"


class Ledger:
    """Appends to `ledger.jsonl` of the run folder; on process 0 alone, the others write nothing."""

    def __init__(self, folder: str | os.PathLike, writes: bool = True):
        self._file = files.path(folder) / NAME
        self._writes = writes

    def write(self, event: str, **fields: Any) -> None:
        """One row: wall time (UTC), event, fields. The event "start" also records host, process and versions."""
        if not self._writes:
            return
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
        row = {"time": now, "event": event, **fields}
        if event == "start":
            row |= {"host": platform.node(), "pid": os.getpid(), "versions": _versions()}
        files.append_line(self._file, json.dumps(row))

    def starts(self, launch: str, step: int) -> int:
        """How often this launch has started the run already at `step` or past it."""
        started = [row for row in self.rows() if row["event"] == "start" and row.get("launch") == launch]
        return sum(row["step"] >= step for row in started)

    def rows(self) -> list[dict[str, Any]]:
        """All rows so far, oldest first."""
        return files.read_jsonl(self._file) if self._file.exists() else []


def _versions() -> dict[str, str]:
    from lm.train.record import versions

    return {"python": platform.python_version(), **versions()}
