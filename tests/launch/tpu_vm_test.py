"""Queued resources are made, waited for, used and made again, by calls that a stand-in for gcloud records."""

import json
import os
import pathlib
import shlex
import subprocess
import sys

import pytest

SCRIPT = pathlib.Path(__file__).resolve().parents[2] / "launch" / "tpu_vm.sh"
HARDWARE = ("--zone=us-east5-b", "--type=v6e-16", "--runtime=v2-alpha-tpuv6e")
QUEUED = "alpha compute tpus queued-resources"
DESCRIBE = f"{QUEUED} describe run1 --zone=us-east5-b --format=value(state.state)"
DELETE = f"{QUEUED} delete run1 --zone=us-east5-b --force --quiet"
CREATE = (
    f"{QUEUED} create run1 --zone=us-east5-b --accelerator-type=v6e-16 --runtime-version=v2-alpha-tpuv6e "
    "--node-id=run1 --quiet"
)
# Answers `describe` and `ssh` with the next of what the test has laid out for them, all else with success.
GCLOUD = """#!{python}
import json, os, pathlib, sys
folder = pathlib.Path({folder!r})
with open(folder / "calls", "a") as f:
    print(json.dumps(sys.argv[1:]), file=f)
plan = folder / sys.argv[5]
if plan.exists():
    first, *rest = plan.read_text().split("\\n")
    plan.write_text("\\n".join(rest or [first]))
    if sys.argv[5] == "ssh":
        sys.exit(int(first))
    print(first)
    sys.exit(first == "")
"""


@pytest.fixture
def tpu_vm(tmp_path):
    """Runs the script: (exit code, the calls of gcloud, standard output and error)."""
    file = tmp_path / "gcloud"
    file.write_text(GCLOUD.format(python=sys.executable, folder=str(tmp_path)))
    file.chmod(0o755)

    def run(*arguments, states=(), codes=()):
        for name, answers in (("describe", states), ("ssh", codes)):
            if answers:
                (tmp_path / name).write_text("\n".join(map(str, answers)))
        environ = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "LM_POLL_S": "0"}
        result = subprocess.run(["bash", SCRIPT, *arguments], env=environ, capture_output=True, text=True, timeout=30)
        calls = tmp_path / "calls"
        made = [json.loads(line) for line in calls.read_text().splitlines()] if calls.exists() else []
        return result.returncode, [" ".join(call) for call in made], result.stdout + result.stderr

    return run


def kinds(calls):
    return [call.split()[4] for call in calls]


def test_it_waits_until_the_resource_is_active(tpu_vm):
    states = ["", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"]
    assert tpu_vm("create", "run1", *HARDWARE, states=states)[:2] == (0, [DESCRIBE, CREATE, *[DESCRIBE] * 3])


def test_what_was_suspended_or_has_failed_is_made_again(tpu_vm):
    states = ["SUSPENDED", "FAILED", "SUSPENDING", "ACTIVE"]
    code, calls, _ = tpu_vm("create", "run1", *HARDWARE, states=states)
    assert (code, calls) == (0, [DESCRIBE, DELETE, CREATE, DESCRIBE, DELETE, CREATE, DESCRIBE, DESCRIBE])


def test_slices_and_spot_are_asked_for(tpu_vm):
    _, calls, _ = tpu_vm("create", "run1", *HARDWARE, "--slices=2", "--spot", states=["", "ACTIVE"])
    nodes = "--node-count=2 --node-prefix=run1 --spot"
    assert calls == [DESCRIBE, CREATE.replace("--node-id=run1", nodes), DESCRIBE]


def test_one_that_never_comes_into_being_ends_in_an_error(tpu_vm):
    code, calls, said = tpu_vm("create", "run1", *HARDWARE, states=["FAILED"])
    assert code == 1 and calls.count(CREATE) == 5 and "did not come into being in 5 tries" in said


def test_the_command_runs_on_all_workers_at_once(tpu_vm):
    command = ("lm", "train", "--set=evals.prompt=it's", "--workdir=gs://b/run1")
    options = (*HARDWARE, "--setup=pip install -e lm[tpu]")
    code, calls, _ = tpu_vm("run", "run1", *options, "--", *command, states=["ACTIVE"], codes=[0])
    start = f"{QUEUED} ssh run1 --zone=us-east5-b --node=all --worker=all --batch-size=all --command="
    assert code == 0 and calls[0] == DESCRIBE and len(calls) == 2 and calls[1].startswith(start)
    setup, separator, remote = calls[1].removeprefix(start).partition(" && ")
    assert setup == "{ pip install -e lm[tpu]; }" and separator
    words = shlex.split(remote)
    assert words[:7] == "flock --close --timeout 120 --conflict-exit-code 75 /tmp/lm.lock".split()
    assert words[7:9] == ["env", "LM_NUM_PROCESSES=auto"] and words[9].startswith("LM_LAUNCH=tpu-run1-")
    assert tuple(words[10:]) == command


def test_75_starts_the_same_launch_again_and_a_bug_does_not(tpu_vm):
    code, calls, _ = tpu_vm("run", "run1", *HARDWARE, "--", "lm", states=["ACTIVE"], codes=[75, 75, 1])
    runs = [call for call in calls if " ssh " in call]
    assert code == 1 and len(runs) == 3 and len(set(runs)) == 1 and CREATE not in calls


def test_a_preemption_in_the_middle_makes_new_machines(tpu_vm):
    states = ["ACTIVE", "SUSPENDED", "SUSPENDED", "ACTIVE"]
    code, calls, _ = tpu_vm("run", "run1", *HARDWARE, "--spot", "--", "lm", states=states, codes=[255, 0])
    again = ["describe", "describe", "delete", "create", "describe", "ssh"]
    assert code == 0 and kinds(calls) == ["describe", "ssh", *again]


def test_machines_that_cannot_be_reached_end_in_an_error(tpu_vm):
    code, calls, _ = tpu_vm("run", "run1", *HARDWARE, "--", "lm", states=["ACTIVE"], codes=[255])
    assert code == 255 and kinds(calls).count("ssh") == 5


def test_status_and_delete(tpu_vm):
    assert tpu_vm("status", "run1", "--zone=us-east5-b", states=["ACTIVE"]) == (0, [DESCRIBE], "ACTIVE\n")
    assert tpu_vm("delete", "run1", "--zone=us-east5-b")[1][-1] == DELETE


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "a verb and a name"),
        (("begin", "run1", "--zone=z"), "no verb begin"),
        (("create", "run1"), "--zone is missing"),
        (("create", "run1", "--zone=z"), "--type and --runtime"),
        (("run", "run1", *HARDWARE), "-- COMMAND is missing"),
        (("create", "run1", "--zonee=z"), "no option --zonee=z"),
    ],
)
def test_what_is_missing_is_named(tpu_vm, arguments, said):
    code, calls, out = tpu_vm(*arguments)
    assert code == 2 and not calls and said in out and "launch/tpu_vm.sh run NAME" in out
