"""The rows that a fit reads, from a CSV or from the row.json files of runs, with what was left out and why."""

import csv
import dataclasses
import json
import os
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from lm.core import files
from lm.core.errors import UsageError, unknown

ALIASES = {"lr": "learning_rate", "batch": "batch_tokens", "U": "unique_tokens"}  # As row.json has them.
FALSE = ("false", "0", "no", "")
NAMED = 8  # Rows that a message lists before it only counts them.


@dataclasses.dataclass(frozen=True)
class Points:
    """Columns of equal length in float64 (`group` as text), the rows' names, and warnings about the rows left out."""

    columns: dict[str, np.ndarray]
    names: tuple[str, ...]
    warnings: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, column: str) -> np.ndarray:
        return self.columns[column]

    def __contains__(self, column: str) -> bool:
        return column in self.columns

    def logs(self, columns: Sequence[str]) -> np.ndarray:
        """[rows, columns] of natural logarithms."""
        return np.log(np.stack([self[c] for c in columns], axis=1))

    def select(self, index: np.ndarray, *warnings: str) -> "Points":
        """The rows of an index or a mask, in that order."""
        columns = {name: values[index] for name, values in self.columns.items()}
        return Points(columns, tuple(np.array(self.names)[index]), (*self.warnings, *warnings))

    def drop_highest(self, count: int, column: str) -> "Points":
        """All but the `count` rows of the highest values."""
        return self.select(np.sort(np.argsort(self[column], kind="stable")[: max(len(self) - count, 0)]))


def read(name: str | os.PathLike, needed: Sequence[str], optional: Iterable[str] = ()) -> Points:
    """The usable rows of a CSV file, or of every row.json below a folder.

    Left out with a warning: runs whose `status` is not "done", whose `decayed` is false, or with a needed value that
    is missing or not a positive number. D is C / 6N, and C is 6ND, where the file lacks the one and has the others.

    Raises:
      UsageError: no such file, no row, a missing column, rows of several values of `convention`, or none left.
    """
    rows = _read_folder(name) if files.path(name).is_dir() else _read_csv(name)
    if not rows:
        raise UsageError(f"--runs={name} holds no rows: give a CSV file, or a folder with row.json files below it")
    rows = [{short: row[name] for short, name in ALIASES.items() if name in row} | row for row in rows]
    warnings: list[str] = []
    rows = _keep(rows, lambda r: r.get("status", "done") == "done", "status is not done", warnings)
    rows = _keep(
        rows, lambda r: str(r.get("decayed", True)).lower() not in FALSE, "learning rate not decayed", warnings
    )
    _refuse_mixed(rows)
    present = {column for row in rows for column in row}
    warnings += _complete(rows, present, needed)
    for column in needed:
        if rows and column not in present:
            missing = unknown("column", column, present - {"name"})
            raise UsageError(f"--runs={name} has no column {column!r}, needs {', '.join(needed)}; {missing}")
    rows = _keep(rows, lambda r: all(_number(r.get(c)) > 0 for c in needed), _why(rows, needed), warnings)
    if not rows:
        raise UsageError(f"--runs={name} has no row left to fit: {'; '.join(warnings)}")
    given = [c for c in dict.fromkeys([*needed, *optional]) if all(_number(r.get(c)) > 0 for r in rows)]
    columns = {c: np.array([_number(r[c]) for r in rows]) for c in given}
    if all(r.get("group") not in (None, "") for r in rows):
        columns["group"] = np.array([str(r["group"]) for r in rows])
    return Points(columns, tuple(r["name"] for r in rows), tuple(warnings))


def listed(names: Sequence[str]) -> str:
    """The names for a message, the first few of them where they are many."""
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more


def _read_csv(name: str | os.PathLike) -> list[dict[str, Any]]:
    if not files.path(name).exists():
        raise UsageError(f"--runs={name}: there is no such file or folder")
    try:
        lines = csv.DictReader(files.path(name).read_text(encoding="utf-8-sig").splitlines(), skipinitialspace=True)
        rows = [{(k or "").strip(): v for k, v in row.items()} for row in lines]
    except (UnicodeDecodeError, csv.Error) as error:
        raise UsageError(f"--runs={name} is not a CSV file in UTF-8: {error}") from None
    return [row | {"name": row.get("name") or f"row {i}"} for i, row in enumerate(rows, 1)]


def _read_folder(name: str | os.PathLike) -> list[dict[str, Any]]:
    rows = []
    for file in files.find(name, "row.json"):
        try:
            row = json.loads(file.read_text())
        except ValueError as error:
            raise UsageError(f"{file} is not JSON: {error}") from None
        if not isinstance(row, dict):
            raise UsageError(f"{file} is not one JSON object")
        rows.append(row | {"name": str(row.get("name") or file.parent.name)})
    return rows


def _keep(rows: list[dict[str, Any]], wanted: Any, why: str, warnings: list[str]) -> list[dict[str, Any]]:
    left_out = [row["name"] for row in rows if not wanted(row)]
    if left_out:
        warnings.append(f"left out, {why}: {listed(left_out)}")
    return [row for row in rows if wanted(row)]


def _refuse_mixed(rows: list[dict[str, Any]]) -> None:
    conventions: dict[str, list[str]] = {}
    for row in rows:
        if row.get("convention"):
            conventions.setdefault(str(row["convention"]), []).append(row["name"])
    if len(conventions) > 1:
        mixed = "; ".join(f"{name!r} ({listed(members)})" for name, members in conventions.items())
        raise UsageError(f"the rows mix conventions of N and C: {mixed}; fit the rows of one convention at a time")


def _complete(rows: list[dict[str, Any]], present: set[str], needed: Sequence[str]) -> list[str]:
    """Fills D or C in from the other two; returns the warning that says so."""
    if "D" in needed and "D" not in present and {"N", "C"} <= present:
        for row in rows:
            row["D"] = _number(row.get("C")) / (6 * _number(row.get("N")) or np.nan)
        present.add("D")
        return ["the rows have no D: it is C / 6N"]
    if "C" in needed and "C" not in present and {"N", "D"} <= present:
        for row in rows:
            row["C"] = 6 * _number(row.get("N")) * _number(row.get("D"))
        present.add("C")
    return []


def _why(rows: list[dict[str, Any]], needed: Sequence[str]) -> str:
    bad = [c for c in needed if any(not _number(r.get(c)) > 0 for r in rows)]
    return f"{' or '.join(bad)} is no positive number"


def _number(value: Any) -> float:
    """A float; NaN for what is none, or not finite."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        return np.nan
    return number if np.isfinite(number) else np.nan
