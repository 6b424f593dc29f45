"""Where text comes from: documents of files, of this Python's library, of a known process, of TFDS.

    text:PATH            one document a file           lines:PATH    one document a line, blank ones left out
    jsonl:PATH[#FIELD]   FIELD ("text") of each line   synthetic:markov[?symbols=64&order=1&seed=0&tokens=2000000]
                                                       synthetic:copy[?symbols=127&length=256&total=20000&seed=0]
    tfds:NAME[/CONFIG][:SPLIT][#FIELD]                 python[:train|:validation]   sorted files of the standard library

A PATH may be a glob (`**` too) and end in .gz or .zst.
"""

import collections
import hashlib
import json
import os
import re
import sysconfig
from collections.abc import Callable, Iterator

from lm.core.errors import UsageError, unknown
from lm.data import clean, files, synthetic

Counts = collections.Counter
_HELD_OUT = 16  # One file of the standard library in so many is for validation.
_NOT_LIBRARY = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


def documents(source: str, counts: Counts | None = None) -> Iterator[str]:
    """The documents of a source, none of them empty, in a fixed order.

    `counts` gets what cleaning did: "malformed_characters" (each now U+FFFD), "cut_documents" (longer than
    `files.DOCUMENT_BYTES` or `LINE_BYTES`, continued as another document), "dropped_lines" (JSON above that).
    Raises UsageError at once for an unknown kind or missing file, and on the way for a damaged one.
    """
    read, rest = _resolve(source)
    return (text for text in read(rest, Counts() if counts is None else counts) if text)


def held_out(source: str) -> tuple[str, str] | None:
    """(training source, validation source) where the source has a division of its own."""
    return ("python:train", "python:validation") if source == "python" else None


def size(source: str) -> dict[str, int]:
    """{"files", "bytes"} on disk, by which a changed source is noticed; {} for one that has no files."""
    _, rest = _resolve(source)
    kind = source.partition(":")[0]
    if kind not in ("text", "lines", "jsonl", "python"):
        return {}
    found = _library(rest) if kind == "python" else files.find(_field(rest)[0] if kind == "jsonl" else rest)
    return {"files": len(found), "bytes": sum(os.path.getsize(f) for f in found)}


def _resolve(source: str) -> tuple[Callable[[str, Counts], Iterator[str]], str]:
    kind, colon, rest = source.partition(":")
    if kind not in _KINDS:
        if os.path.exists(source):
            raise UsageError(f"source {source!r} needs a kind: text:{source} (one document) or lines:{source}")
        raise unknown("kind of source", kind, _KINDS)
    if kind != "python" and not rest:
        raise UsageError(f"source {source!r} needs something after {kind}:")
    if kind == "python":
        if colon and rest not in ("train", "validation"):
            raise unknown("part of source python", rest, ("train", "validation"))
        _library(rest)
    elif kind == "synthetic":
        synthetic.parse(rest)
    elif kind != "tfds":
        files.find(_field(rest)[0] if kind == "jsonl" else rest)
    return _KINDS[kind], rest


def _text(pattern: str, counts: Counts) -> Iterator[str]:
    for file in files.find(pattern):
        yield from _whole(file, counts)


def _whole(file: str, counts: Counts) -> Iterator[str]:
    for i, piece in enumerate(files.pieces(file)):
        counts["cut_documents"] += i > 0
        yield _decode(piece, counts)


def _lines(pattern: str, counts: Counts) -> Iterator[str]:
    for file in files.find(pattern):
        for line, continues in files.lines(file):
            counts["cut_documents"] += continues
            text = _decode(line, counts)
            if not text.isspace():
                yield text


def _jsonl(rest: str, counts: Counts) -> Iterator[str]:
    pattern, field = _field(rest)
    for file in files.find(pattern):
        number, inside = 1, False
        for line, continues in files.lines(file):
            counts["dropped_lines"] += continues and not inside
            if line.strip() and not continues and not inside:
                yield _json_text(_decode(line, counts), field, f"{file}, line {number}", counts)
            number, inside = number + (not continues), continues


def _json_text(line: str, field: str, place: str, counts: Counts) -> str:
    try:
        row = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        raise UsageError(f"{place} is no JSON: {error}") from None
    if not isinstance(row, dict) or field not in row:
        raise unknown(f"field in {place}", field, row if isinstance(row, dict) else ())
    if not isinstance(row[field], str):
        raise UsageError(f"{place}: field {field!r} holds a {type(row[field]).__name__}, not text")
    return _sanitize(row[field], counts)


def _field(rest: str) -> tuple[str, str]:
    match = re.fullmatch(r"(.+)#(\w+)", rest, re.DOTALL)
    return (match[1], match[2]) if match else (rest, "text")


def _python(part: str, counts: Counts) -> Iterator[str]:
    for file in _library(part):
        yield from _whole(file, counts)


def _library(part: str) -> list[str]:
    """This Python's own .py files, without tests: all, or one side of a division by the hash of their names."""
    root = sysconfig.get_path("stdlib")
    names = []
    for folder, inner, found in os.walk(root):
        inner[:] = [name for name in inner if name not in _NOT_LIBRARY]
        names += [os.path.relpath(os.path.join(folder, name), root) for name in found if name.endswith(".py")]
    if part:
        names = [name for name in names if _is_held_out(name) == (part == "validation")]
    if not names:
        raise UsageError(f"source python found no .py files in {root}")
    return [os.path.join(root, name) for name in sorted(names)]


def _is_held_out(name: str) -> bool:
    return hashlib.sha256(name.replace(os.sep, "/").encode()).digest()[0] % _HELD_OUT == 0


def _synthetic(text: str, counts: Counts) -> Iterator[str]:
    yield from synthetic.parse(text).documents()


def _tfds(rest: str, counts: Counts) -> Iterator[str]:
    import tensorflow_datasets as tfds

    name, field = _field(rest)
    name, _, split = name.partition(":")
    split = split or "train"
    try:
        rows = tfds.data_source(name, split=split, builder_kwargs={"file_format": "array_record"})
    except (tfds.core.DatasetNotFoundError, tfds.core.registered.DatasetNotFoundError, ValueError) as error:
        raise UsageError(f"tfds:{name}:{split} cannot be read: {' '.join(str(error).split())[:300]}") from None
    for row in rows:
        if field not in row:
            raise unknown(f"field of tfds:{name}", field, row)
        value = row[field]
        yield _decode(value, counts) if isinstance(value, bytes) else _sanitize(str(value), counts)


def _decode(data: bytes, counts: Counts) -> str:
    text, malformed = clean.decode(data)
    counts["malformed_characters"] += malformed
    return text


def _sanitize(text: str, counts: Counts) -> str:
    text, malformed = clean.sanitize(text)
    counts["malformed_characters"] += malformed
    return text


_KINDS: dict[str, Callable[[str, Counts], Iterator[str]]] = {
    "text": _text,
    "lines": _lines,
    "jsonl": _jsonl,
    "python": _python,
    "synthetic": _synthetic,
    "tfds": _tfds,
}
