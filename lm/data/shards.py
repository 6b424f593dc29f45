"""The files of a corpus: tokens and document starts as .npy arrays, written with digests, checked, then mapped."""

import functools
import hashlib
import os
import pathlib
import re
from typing import Any

import numpy as np

from lm.core.errors import UsageError

_OPEN_ARRAYS = 512  # Each holds a file descriptor, of which many systems give a process 1,024.


class Writer:
    """Collects the tokens of one split and writes a shard each time it has enough."""

    def __init__(self, folder: pathlib.Path, split: str, dtype: Any, shard_tokens: int):
        self.folder, self.split, self.dtype, self.shard_tokens = folder, split, dtype, shard_tokens
        self.totals = {"tokens": 0, "documents": 0, "text_bytes": 0}
        self.shards: list[dict[str, Any]] = []
        self.parts: list[np.ndarray] = []
        self.starts: list[int] = []
        self.held, self.last, self.inside = 0, -1, False

    def add(self, ids: np.ndarray, text_bytes: int) -> None:
        """Takes the next tokens of a document."""
        self.totals["text_bytes"] += text_bytes
        while len(ids):
            if not self.inside:
                self.starts.append(self.held)
                self.inside = True
            taken = ids[: self.shard_tokens - self.held].astype(self.dtype)
            self.parts.append(taken)
            self.held += len(taken)
            self.last = int(taken[-1])
            ids = ids[len(taken) :]
            if self.held == self.shard_tokens:
                self._flush()

    def end_document(self, eos_id: int | None) -> None:
        """Ends it with `eos_id`, unless its text did that already (kind word at a newline)."""
        if eos_id is not None and not (self.inside and self.last == eos_id):
            self.add(np.array([eos_id]), 0)
        self.inside = False

    def close(self) -> list[dict[str, Any]]:
        """The manifest's entries of all shards."""
        if self.held:
            self._flush()
        return self.shards

    def _flush(self) -> None:
        name = f"{self.split}-{len(self.shards):05d}"
        tokens, starts = np.concatenate(self.parts), np.array(self.starts, np.int64)
        entry = _save(self.folder / f"{name}.npy", tokens)
        entry |= {"split": self.split, "tokens": len(tokens), "documents": len(starts)}
        self.shards.append(entry | {"starts": _save(self.folder / f"{name}.starts.npy", starts)})
        self.totals["tokens"] += len(tokens)
        self.totals["documents"] += len(starts)
        self.parts, self.starts, self.held = [], [], 0


def inside(folder: pathlib.Path, name: str) -> pathlib.Path:
    """folder / name; raises UsageError where that is not a file of the folder itself."""
    if not re.fullmatch(r"\w[\w.-]*", name) or (folder / name).resolve().parent != folder.resolve():
        raise UsageError(f"the manifest of {folder} names {name!r}, which is not a file in its own folder: refused")
    return folder / name


def check_size(path: pathlib.Path, size: int) -> None:
    """Raises UsageError unless the file has `size` bytes."""
    if not path.is_file():
        raise UsageError(f"{path} is missing: restore it, or build the corpus again")
    if path.stat().st_size != size:
        raise UsageError(f"{path} has {path.stat().st_size} bytes where {size} were written: build the corpus again")


def check_array(path: pathlib.Path, size: int, dtype: str, length: int) -> None:
    """Raises UsageError unless the file is a whole one-dimensional array of that type and length."""
    check_size(path, size)
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise UsageError(f"{path} is damaged ({error}): build the corpus again") from None
    if array.dtype != np.dtype(dtype) or array.shape != (length,):
        raise UsageError(
            f"{path} holds {array.dtype}{array.shape} where {dtype}({length},) was written: build it again"
        )


@functools.lru_cache(maxsize=_OPEN_ARRAYS)
def map_array(path: str, sha256: str) -> np.ndarray:
    """The mapped array; the digest keeps a rebuilt file of the same name apart."""
    return np.load(path, mmap_mode="r", allow_pickle=False).view(np.ndarray)


def _save(path: pathlib.Path, array: np.ndarray) -> dict[str, Any]:
    with open(path, "wb") as f:
        hashing = _Hashing(f)
        np.lib.format.write_array(hashing, array, allow_pickle=False)
        f.flush()
        os.fsync(f.fileno())
    return {"file": path.name, "bytes": path.stat().st_size, "sha256": hashing.sha256.hexdigest()}


class _Hashing:
    """A file that digests what it is given."""

    def __init__(self, file: Any):
        self.file, self.sha256 = file, hashlib.sha256()

    def write(self, data: bytes) -> int:
        self.sha256.update(data)
        return self.file.write(data)
