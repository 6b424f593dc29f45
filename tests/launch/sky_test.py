"""The task for SkyPilot starts the run with what SkyPilot says about it."""

import os
import pathlib
import subprocess

import yaml

TASK = yaml.safe_load((pathlib.Path(__file__).resolve().parents[2] / "launch" / "sky.yaml").read_text())


def test_it_comes_back_when_the_run_asks_for_it():
    assert TASK["resources"]["job_recovery"]["recover_on_exit_codes"] == [75]


def test_all_starts_of_a_managed_job_are_one_launch(tmp_path):
    (tmp_path / "lm").write_text('#!/bin/bash\necho "$LM_LAUNCH" "$@"\nexit 75\n')
    (tmp_path / "lm").chmod(0o755)
    given = {"SKYPILOT_TASK_ID": "sky-7", "WORKDIR": "gs://b/run 1", "ARGUMENTS": "--experiment=markov --steal"}
    assert set(TASK["envs"]) == {"WORKDIR", "ARGUMENTS"}
    environ = {"PATH": f"{tmp_path}:{os.environ['PATH']}", **given}
    result = subprocess.run(["bash", "-c", TASK["run"]], env=environ, capture_output=True, text=True)
    assert result.stdout == "sky-7 train --workdir=gs://b/run 1 --experiment=markov --steal\n"
    assert result.returncode == 75
