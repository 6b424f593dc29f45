"""The run folder: where things stand in it, and the resolved config that it keeps."""

import hashlib
import json
import os
from typing import Any

from lm.core import config, files
from lm.core.errors import UsageError
from lm.data.tokenizers import Tokenizer
from lm.train.run import Run

CONFIG = "config.json"
TOKENIZERS = ("tokenizer.model", "tokenizer.json")


def write_config(folder: str | os.PathLike, run: Run, experiment: str) -> None:
    """Writes `config.json`: the experiment, the run's digest, the resolved run, and the sha256 of that."""
    data = config.to_json(run)
    record = {"experiment": experiment, "digest": config.digest(run), "run": data, "sha256": _sha256(data)}
    files.write_json(files.path(folder) / CONFIG, record)


def read_config(folder: str | os.PathLike) -> Run | None:
    """The run that the folder keeps; None where it has none. Raises UsageError for a damaged file."""
    name = files.path(folder) / CONFIG
    if not name.exists():
        return None
    try:
        record: dict[str, Any] = files.read_json(name)
        whole = record["sha256"] == _sha256(record["run"])
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{name} cannot be read ({error!r}): restore it, or move the run folder away") from None
    if not whole:
        raise UsageError(f"{name} is damaged or was edited: restore it; settings are changed with --set")
    return config.from_json(record["run"])


def _sha256(data: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


def keep_tokenizer(folder: str | os.PathLike, tokenizer: Tokenizer) -> None:
    """Writes the tokenizer into the run folder, under its kind's file name."""
    files.write_bytes(files.path(folder) / tokenizer.file_name, tokenizer.serialize())


def tokenizer_file(folder: str | os.PathLike) -> Any:
    """The tokenizer that the run folder keeps; raises UsageError where there is none."""
    found = [name for name in TOKENIZERS if (files.path(folder) / name).exists()]
    if not found:
        raise UsageError(f"{os.fspath(folder)} keeps no tokenizer: is it a run folder?")
    return files.path(folder) / found[0]
