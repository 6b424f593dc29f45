"""Safetensors files, read and written one tensor at a time: 8 bytes of length, a JSON header, and the bytes of arrays.

Of our own because the library's NumPy side has no bfloat16, and its writer holds all tensors at once.
"""

import json
import math
import os
import pathlib
from collections.abc import Iterable, Iterator
from typing import Any

import ml_dtypes
import numpy as np

from lm.core import files
from lm.core.errors import UsageError

FILE, INDEX = "model.safetensors", "model.safetensors.index.json"
_DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
_MOST_HEADER_BYTES = 100_000_000  # The format's own limit.


class Reader:
    """The tensors of a folder's model.safetensors, or of the shards that its index names; bytes stay on disk.

    Raises UsageError for a folder without either, and for a file that is cut, malformed or outside the folder.
    """

    def __init__(self, folder: str | os.PathLike):
        self.folder = pathlib.Path(folder)
        self._tensors: dict[str, tuple[pathlib.Path, int, np.dtype, tuple[int, ...]]] = {}
        for name in self._file_names():
            self._open(self.folder / name)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """{name: shape} of every tensor."""
        return {name: shape for name, (*_, shape) in self._tensors.items()}

    def read(self, name: str) -> np.ndarray:
        """The tensor as it is stored, mapped from the file."""
        path, offset, dtype, shape = self._tensors[name]
        if 0 in shape:
            return np.zeros(shape, dtype)
        return np.memmap(path, dtype, "r", offset, shape)

    def _file_names(self) -> list[str]:
        if (self.folder / FILE).is_file():
            return [FILE]
        if (self.folder / INDEX).is_file():
            try:
                names = sorted(set(files.read_json(self.folder / INDEX)["weight_map"].values()))
            except (ValueError, KeyError, AttributeError, TypeError) as error:
                raise UsageError(f"{self.folder / INDEX} is no index of shards ({error!r})") from None
            for name in names:
                if pathlib.PurePath(name).name != name:
                    raise UsageError(f"{self.folder / INDEX} names {name!r}, which is not a file of its folder")
                if not (self.folder / name).is_file():
                    raise UsageError(f"{self.folder} lacks the shard {name} that its index names: fetch it again")
            return names
        pickled = sorted(f.name for pattern in ("*.bin", "*.pt", "*.pth") for f in self.folder.glob(pattern))
        if pickled:
            raise UsageError(
                f"{self.folder / pickled[0]} is a pickle, which can run code when it is read: convert it where you "
                "trust it, with transformers' from_pretrained and save_pretrained, which writes model.safetensors"
            )
        raise UsageError(f"{self.folder} has neither {FILE} nor {INDEX}")

    def _open(self, path: pathlib.Path) -> None:
        try:
            with open(path, "rb") as f:
                length = int.from_bytes(f.read(8), "little")
                if not 2 <= length <= min(_MOST_HEADER_BYTES, path.stat().st_size - 8):
                    raise ValueError(f"a header of {length} bytes in a file of {path.stat().st_size}")
                header = json.loads(f.read(length))
            header.pop("__metadata__", None)
            for name, entry in header.items():
                dtype, shape = _DTYPES[entry["dtype"]], tuple(int(n) for n in entry["shape"])
                start, end = entry["data_offsets"]
                if end - start != math.prod(shape) * dtype.itemsize or min(shape, default=1) < 0 or start < 0:
                    raise ValueError(f"{name} has {end - start} bytes for shape {shape} of {dtype}")
                if 8 + length + end > path.stat().st_size:
                    raise ValueError(f"{name} ends behind the end of the file")
                self._tensors[name] = path, 8 + length + start, dtype, shape
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise UsageError(f"{path} is cut or damaged ({type(error).__name__}: {error}): fetch it again") from None


def write(
    folder: str | os.PathLike, tensors: Iterable[tuple[str, Any]], shapes: dict[str, tuple[int, ...]], shard_bytes: int
) -> None:
    """Writes float32 tensors, (name, array) in the order of `shapes`, into shards of up to `shard_bytes`.

    One file without an index where they fit. Each file takes its name once it is whole.
    """
    folder, pending = pathlib.Path(folder), iter(tensors)
    shards = _shards(shapes, shard_bytes)
    names = [FILE] if len(shards) == 1 else [_shard_name(i, len(shards)) for i in range(len(shards))]
    for file_name, names_in_shard in zip(names, shards, strict=True):
        _write_file(folder / file_name, {name: shapes[name] for name in names_in_shard}, pending)
    if len(shards) > 1:
        total = 4 * sum(math.prod(shape) for shape in shapes.values())
        weight_map = {n: file_name for file_name, shard in zip(names, shards, strict=True) for n in shard}
        files.write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _write_file(path: pathlib.Path, shapes: dict[str, tuple[int, ...]], tensors: Iterator[tuple[str, Any]]) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers refuses a file without it.
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as f:
            f.write(len(text).to_bytes(8, "little") + text)
            for expected in shapes:
                name, array = next(tensors)
                array = np.ascontiguousarray(array, np.float32)
                assert name == expected and array.shape == shapes[name], (name, array.shape, expected)
                f.write(array.data if array.ndim else array.tobytes())
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    files.fsync_folder(path.parent)


def _shards(shapes: dict[str, tuple[int, ...]], shard_bytes: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    filled = 0
    for name, shape in shapes.items():
        size = 4 * math.prod(shape)
        if shards[-1] and filled + size > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def _shard_name(i: int, count: int) -> str:
    return f"model-{i + 1:05d}-of-{count:05d}.safetensors"
