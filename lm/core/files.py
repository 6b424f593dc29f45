"""Small files on any file system: written whole or not at all, local, shared or gs://."""

import json
import os
import uuid
from typing import Any, BinaryIO

from etils import epath


def path(name: str | os.PathLike) -> epath.Path:
    """An epath.Path: local, or behind a scheme such as gs://."""
    return epath.Path(os.fspath(name))


def absolute(name: str | os.PathLike) -> epath.Path:
    """`path`, independent of the working directory where it is local."""
    return path(os.path.abspath(name) if is_local(name) else name)


def is_local(name: str | os.PathLike) -> bool:
    return "://" not in os.fspath(name)


def modified(name: str | os.PathLike) -> float | None:
    """When a file was last written, in seconds of `time.time`; None where there is none."""
    try:
        # epath cuts a local file's time to whole seconds.
        return os.stat(name).st_mtime if is_local(name) else path(name).stat().mtime
    except FileNotFoundError:
        return None


def write_bytes(name: str | os.PathLike, data: bytes) -> None:
    """Writes the whole file durably; a reader sees the old content or the new, never a part.

    On an object store a single put is atomic already; locally it takes a temporary name, two fsyncs and a rename.
    """
    if not is_local(name):
        path(name).write_bytes(data)
        return
    name = os.fspath(name)
    temporary = f"{name}.{uuid.uuid4().hex[:8]}.tmp"
    try:
        with open(temporary, "wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, name)
    except BaseException:
        if os.path.exists(temporary):
            os.unlink(temporary)
        raise
    fsync_folder(os.path.dirname(name) or ".")


def fsync_folder(name: str | os.PathLike) -> None:
    """Makes renames inside a local folder survive a loss of power; nothing to do elsewhere."""
    if not is_local(name):
        return
    descriptor = os.open(name, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(name: str | os.PathLike, value: Any) -> None:
    """Indented, with a final newline; NaN is refused, because no other reader takes it."""
    write_bytes(name, (json.dumps(value, indent=1, allow_nan=False) + "\n").encode())


def read_json(name: str | os.PathLike) -> Any:
    return json.loads(path(name).read_text())


def append_line(name: str | os.PathLike, line: str) -> None:
    """Appends one line in place of a torn last one; where appending does not exist, the file is rewritten whole."""
    if is_local(name):
        with open(name, "a+b", buffering=0) as f:
            _drop_torn_line(f)
            # One write of one whole line: concurrent appenders never interleave inside it.
            f.write((line + "\n").encode())
        return
    old = path(name).read_text() if path(name).exists() else ""
    path(name).write_text(old + line + "\n")


def _drop_torn_line(f: BinaryIO) -> None:
    """Cuts what a killed writer left after the last newline, so that every line of the file is whole."""
    start = max(0, f.seek(0, os.SEEK_END) - 2**20)
    f.seek(start)
    tail = f.read()
    if tail and not tail.endswith(b"\n"):
        f.truncate(start + tail.rfind(b"\n") + 1)


def find(folder: str | os.PathLike, name: str) -> list[epath.Path]:
    """Every file of that name in the folder and below it, sorted by path."""
    return sorted(root / name for root, _, names in path(folder).walk() if name in names)


def read_jsonl(name: str | os.PathLike) -> list[Any]:
    """The rows of a JSON-lines file; a torn last line (a killed writer) is left out."""
    rows = []
    lines = path(name).read_text().split("\n")
    for i, line in enumerate(lines):
        if not line.strip():
            continue
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            if any(later.strip() for later in lines[i + 1 :]):
                raise
    return rows
