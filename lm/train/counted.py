"""Models that are counted rather than descended: their tables are step 1 of a run, whole or not there."""

import hashlib
import os
import pathlib
import shutil
from collections.abc import Callable
from typing import Any

from lm.core import files
from lm.core.errors import UsageError
from lm.train import checkpoint
from lm.train.record import make_record

STEP = 1
_TABLES = "tables"


def is_counted(model: Any) -> bool:
    """Whether the model is fitted by counting: it has `fit`, `open` and `score`, and no spec."""
    return hasattr(model, "fit")


def fit(
    workdir: str | os.PathLike, model: Any, split: Any, meta: dict[str, Any], progress: Callable[..., None]
) -> None:
    """Counts the split and saves the tables, with `meta` (JSON) and the sha256 of each file, as the run's step.

    A fit that is killed leaves nothing, and starts over. Raises UsageError for a folder that is not local.
    """
    if not files.is_local(workdir):
        raise UsageError(f"--workdir={workdir} must be a local path: tables are mapped into memory")
    target = _folder(workdir)
    partial = target.with_name(f"{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    tables = partial / _TABLES
    tables.mkdir(parents=True)
    model.fit(split, tables, progress)
    (partial / "meta").mkdir()
    files.write_json(partial / "meta" / "metadata", make_record(STEP, meta | {_TABLES: _digests(tables)}, {}, {}))
    partial.rename(target)
    files.fsync_folder(target.parent)


def open_tables(workdir: str | os.PathLike, model: Any) -> Any:
    """The tables of a run; raises UsageError where a file is not as it was saved."""
    tables = _folder(workdir) / _TABLES
    saved = checkpoint.read_meta(workdir, STEP)[_TABLES]
    found = _digests(tables) if tables.is_dir() else {}
    wrong = [name for name in saved.keys() | found.keys() if saved.get(name) != found.get(name)]
    if wrong:
        raise UsageError(f"{tables / min(wrong)} is not as it was saved: remove {tables.parent} and train again")
    return model.open(tables)


def _folder(workdir: str | os.PathLike) -> pathlib.Path:
    return pathlib.Path(workdir) / checkpoint.FOLDER / str(STEP)


def _digests(folder: pathlib.Path) -> dict[str, str]:
    found = {}
    for file in sorted(folder.iterdir()):
        with open(file, "rb") as f:
            found[file.name] = hashlib.file_digest(f, "sha256").hexdigest()
    return found
