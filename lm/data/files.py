"""Bytes out of files that may be compressed, damaged or hostile, in memory that does not grow with them."""

import glob
import gzip
import os
import pathlib
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import BinaryIO

from lm.core.errors import UsageError, unknown
from lm.data import clean

LINE_BYTES = 1 << 24
DOCUMENT_BYTES = 1 << 27  # Above enwik8 and text8, the largest single files that are split by text.
BOMB_RATIO = 100  # Text compresses 3 to 20 times; gzip's limit is 1,032, zstd's above 10,000.
BOMB_FREE_BYTES = 1 << 26
_CHUNK_BYTES = 1 << 20
_ZSTD_INPUT_BYTES = 1 << 12  # A block of 4 bytes can stand for 128 KiB: at most 128 MiB come out at once.
_BOM = b"\xef\xbb\xbf"


def find(pattern: str) -> list[str]:
    """The sorted files that a path or glob names (`**` goes into folders); raises UsageError for none."""
    if os.path.isfile(pattern):
        return [pattern]
    if os.path.isdir(pattern):
        raise UsageError(f"{pattern} is a folder: name its files, as in {os.path.join(pattern, '**', '*.txt')}")
    if any(c in pattern for c in "*?["):
        files = sorted(f for f in glob.glob(pattern, recursive=True) if os.path.isfile(f))
        if not files:
            raise UsageError(f"no file matches {pattern}")
        return files
    folder = os.path.dirname(pattern) or "."
    if not os.path.isdir(folder):
        raise UsageError(f"there is no file {pattern}, and no folder {folder}")
    raise unknown(f"file in {folder}", os.path.basename(pattern), os.listdir(folder))


def pieces(file: str, limit: int = DOCUMENT_BYTES) -> Iterator[bytes]:
    """The file's content, whole or in consecutive pieces of at most `limit` bytes that cut no character."""
    held = bytearray()
    for chunk in _content(file):
        held += chunk
        while len(held) > limit:
            cut = held.rfind(b"\n", 0, limit) + 1 or clean.utf8_cut(held, limit)
            yield bytes(held[:cut])
            del held[:cut]
    if held:
        yield bytes(held)


def lines(file: str, limit: int = LINE_BYTES) -> Iterator[tuple[bytes, bool]]:
    """(line without its end, whether the same line goes on); one above `limit` bytes comes in several parts."""
    held = bytearray()
    for chunk in _content(file):
        held += chunk
        if b"\n" in chunk:
            *whole, held = held.split(b"\n")
            for line in whole:
                *cut, last = _parts(line, limit)
                yield from ((part, True) for part in cut)
                yield last.removesuffix(b"\r"), False
        if len(held) > limit:
            *cut, last = _parts(held, limit)
            yield from ((part, True) for part in cut)
            held = bytearray(last)
    if held:
        yield bytes(held.removesuffix(b"\r")), False


def _parts(line: bytearray, limit: int) -> Iterator[bytes]:
    while len(line) > limit:
        cut = clean.utf8_cut(line, limit)
        yield bytes(line[:cut])
        line = line[cut:]
    yield bytes(line)


def _content(file: str) -> Iterator[bytes]:
    """The decompressed chunks of a file, without a byte order mark."""
    chunks = _chunks(file)
    first = next(chunks, b"")
    if first.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise UsageError(f"{file} is UTF-16: convert it with iconv -f UTF-16 -t UTF-8")
    yield first.removeprefix(_BOM)
    yield from chunks


def _chunks(file: str) -> Iterator[bytes]:
    decompress = _DECOMPRESSORS.get(pathlib.Path(file).suffix)
    with open(file, "rb") as f:
        if decompress is None:
            yield from _read(f)
        else:
            yield from _bounded(decompress(f), file)


def _read(f: BinaryIO | gzip.GzipFile) -> Iterator[bytes]:
    while chunk := f.read(_CHUNK_BYTES):
        yield chunk


def _bounded(chunks: Iterable[bytes], file: str) -> Iterator[bytes]:
    limit = max(BOMB_FREE_BYTES, BOMB_RATIO * os.path.getsize(file))
    total = 0
    try:
        for chunk in chunks:
            total += len(chunk)
            if total > limit:
                raise UsageError(f"{file} unpacks to more than {BOMB_RATIO} times its size: unpack it yourself")
            yield chunk
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UsageError(f"{file} is damaged: {error}") from None


def _gzip(f: BinaryIO) -> Iterator[bytes]:
    return _read(gzip.GzipFile(fileobj=f))


def _zstd(f: BinaryIO) -> Iterator[bytes]:
    import zstandard

    decompressor = zstandard.ZstdDecompressor(max_window_size=1 << 27)
    frame, inside = decompressor.decompressobj(), False
    try:
        while data := f.read(_ZSTD_INPUT_BYTES):
            while data:
                yield frame.decompress(data)
                inside, data = not frame.eof, frame.unused_data
                if frame.eof:
                    frame = decompressor.decompressobj()
    except zstandard.ZstdError as error:
        raise zlib.error(str(error)) from None
    if inside:
        raise EOFError("it ends inside a frame")


_DECOMPRESSORS: dict[str, Callable[[BinaryIO], Iterator[bytes]]] = {".gz": _gzip, ".zst": _zstd}
