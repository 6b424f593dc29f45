"""The command line itself: help, verbs, and the difference of two runs."""

import dataclasses
import importlib
import os
import re
import subprocess
import sys

import pytest
from absl import flags

from lm.main import verbs
from lm.train import folder
from tests.main import tiny
from tests.main.helpers import ROOT, call


def exit_code(*arguments):
    """The exit code of `lm ARGUMENTS`, run in this process."""
    with pytest.raises(SystemExit) as stop:
        verbs.main(list(arguments))
    return stop.value.code


def flags_of(verb):
    values = flags.FlagValues()
    importlib.import_module(f"lm.main.{verb}").define(values)
    return list(values)


@pytest.mark.parametrize("verb", verbs.VERBS)
def test_help_lists_every_flag_of_a_verb(verb, capsys):
    assert exit_code(verb, "--help") == 0
    out, err = capsys.readouterr()
    assert f"lm {verb}" in out and all(f"\n  --{flag}" in out for flag in flags_of(verb)) and not err


@pytest.mark.parametrize("verb", verbs.VERBS)
def test_a_verb_is_a_module_too_and_its_help_loads_no_jax(verb):
    command = [sys.executable, "-X", "importtime", "-m", f"lm.main.{verb}", "--help"]
    environ = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and all(f"--{flag}" in done.stdout for flag in flags_of(verb))
    imported = re.findall(r"\| +([\w.]+)$", done.stderr, re.MULTILINE)
    assert "absl.flags" in imported and "jax" not in imported


def test_without_a_verb_the_verbs_are_listed(capsys):
    assert exit_code("--help") == exit_code("help") == 0 and exit_code() == 2
    out = capsys.readouterr().out
    assert all(out.count(f"\n  {verb} ") == 3 for verb in verbs.VERBS)


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["trian"], "did you mean train"),
        (["plot"], "unknown verb 'plot'"),
        (["generate", "--tokns=3"], "tokens"),
        (["generate", "--tokens=many"], "tokens"),
        (["evaluate", "--batch_size=0"], "batch_size"),
        (["generate", "--checkpoint=/nowhere/at/all", "--prompt=x"], "/nowhere/at/all"),
        (["diff", "one"], "takes two run folders, and got 1"),
        (["diff", "/nowhere/a", "/nowhere/b"], "/nowhere/a keeps no config.json"),
    ],
)
def test_a_mistake_exits_2_with_one_line(arguments, words, capfd):
    assert exit_code(*arguments) == 2
    err = capfd.readouterr().err.strip()
    assert words in err and "\n" not in err


@pytest.fixture
def two_runs(tmp_path):
    """Folders of two runs that differ in the schedule's peak and in the number of steps."""
    run = tiny.run()
    schedule = dataclasses.replace(run.schedule, peak=0.004)
    other = dataclasses.replace(run, schedule=schedule, train=dataclasses.replace(run.train, steps=90))
    for name, config in (("a", run), ("b", other)):
        (tmp_path / name).mkdir()
        folder.write_config(tmp_path / name, config, "tiny")
    return tmp_path / "a", tmp_path / "b"


def test_diff_lists_the_settings_in_which_two_runs_differ_and_no_other(two_runs, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert call("diff", *two_runs) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("│")]
    rows = {tuple(cell.strip() for cell in line.strip("│").split("│")) for line in lines}
    assert rows == {("schedule.peak", "0.01", "0.004"), ("train.steps", "60", "90")}


def test_diff_of_a_run_with_itself_says_that_there_is_none(two_runs, capsys):
    assert call("diff", two_runs[0], two_runs[0]) == 0
    assert capsys.readouterr().out == "the two runs have the same settings\n"
