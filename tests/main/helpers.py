"""Running the verbs: in this process, or as a process of their own that can be killed."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from lm.main import verbs

ROOT = pathlib.Path(__file__).resolve().parents[2]
TINY = pathlib.Path(__file__).parent / "tiny.py"


def call(verb, *arguments):
    """The exit code of `lm VERB ARGUMENTS`, run in this process."""
    with pytest.raises(SystemExit) as stop:
        verbs.run(verb, [str(a) for a in arguments])
    return stop.value.code


def start(*arguments, devices=2, launcher=(), **options):
    """A process that runs `lm ARGUMENTS`; `devices=None` leaves their number to the verb."""
    environ = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "JAX_NUM_CPU_DEVICES")}
    environ["PYTHONPATH"] = str(ROOT)
    if devices:
        environ["JAX_NUM_CPU_DEVICES"] = str(devices)
    command = [sys.executable, *launcher, *([sys.executable] if launcher else []), "-m", "lm.main"]
    return subprocess.Popen([*command, *map(str, arguments)], env=environ, text=True, **options)


def digests(workdir, step):
    """{path: digest} of what a step holds: equal digests are equal bits."""
    record = json.loads((pathlib.Path(workdir) / "checkpoints" / str(step) / "meta" / "metadata").read_text())
    return {path: array["digest"] for path, array in record["arrays"].items()}


def losses(workdir):
    """{step: training loss} of a run folder."""
    rows = [json.loads(line) for line in (pathlib.Path(workdir) / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["loss"] for row in rows if "loss" in row}


def events(workdir, name):
    """The ledger's rows of one event."""
    rows = [json.loads(line) for line in (pathlib.Path(workdir) / "ledger.jsonl").read_text().splitlines()]
    return [row for row in rows if row["event"] == name]
