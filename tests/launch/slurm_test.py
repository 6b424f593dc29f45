"""A job under Slurm saves when it is told to, queues itself again, and ends as one that was never stopped."""

import os
import shutil
import socket
import stat
import subprocess
import sys
import time

import pytest

from tests.main.helpers import ROOT, digests, losses, start

SCRIPT = ROOT / "launch" / "slurm.sbatch"
FAULTS = ROOT / "tests" / "main" / "faults.py"
SERVICES = ("munged", "slurmctld", "slurmd")

# A whole cluster on one machine. Control groups are left out: they need more of the machine than a test should ask.
CONF = """
ClusterName=loopback
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=2,bf_interval=2
ReturnToService=2
KillWait=10
NodeName={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs={cores} State=UNKNOWN
PartitionName=debug Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    """Runs a command of Slurm's against a cluster of this machine's own."""
    missing = [name for name in SERVICES if shutil.which(name) is None]
    if missing or os.geteuid() != 0:
        pytest.skip(f"needs root and slurmctld, slurmd and munged (apt-get install slurm-wlm munge): no {missing}")
    folder = tmp_path_factory.mktemp("slurm")
    for name in ("munge", "state", "spool"):
        (folder / name).mkdir(mode=0o755)
    key = folder / "munge" / "key"
    key.touch(0o600)
    key.write_bytes(os.urandom(1024))
    host = socket.gethostname().split(".")[0]
    conf = folder / "slurm.conf"
    conf.write_text(CONF.format(host=host, folder=folder, ports=free_ports(2), cores=os.cpu_count()))
    environ = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "JAX_NUM_CPU_DEVICES")}
    environ |= {"SLURM_CONF": str(conf), "PYTHONPATH": str(ROOT)}
    # Munge wants a path to its socket that nobody else can write to, and warns of pytest's own; --force goes on.
    files = [f"--{name}-file={folder / 'munge' / name}" for name in ("pid", "log", "seed")]
    munged = ["munged", "--foreground", "--force", f"--key-file={key}", f"--socket={folder / 'munge' / 'socket'}"]
    commands = [[*munged, *files], ["slurmctld", "-D"], ["slurmd", "-D", "-N", host]]

    def call(*command, **options):
        result = subprocess.run([*map(str, command)], env=environ, capture_output=True, text=True, **options)
        assert result.returncode == 0, f"{command}: {result.stdout}{result.stderr}"
        return result.stdout.strip()

    running = []
    try:
        for command in commands:
            quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
            running.append(subprocess.Popen(command, env=environ, start_new_session=True, **quiet))
            until(lambda: (folder / "munge" / "socket").exists())
        until(lambda: subprocess.run(["sinfo", "-h", "-o", "%T"], env=environ, capture_output=True).stdout == b"idle\n")
        yield call
        call("scancel", "--user=root", "--signal=KILL", "--full")
        call("scancel", "--user=root")
        until(lambda: not call("squeue", "-h"))
    finally:
        for process in reversed(running):
            process.terminate()
            process.wait(30)


def until(true, timeout_s=30.0):
    deadline = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < deadline, f"not within {timeout_s} s"
        time.sleep(0.05)


def free_ports(count):
    sockets = [socket.socket() for _ in range(count)]
    for s in sockets:
        s.bind(("127.0.0.1", 0))
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


def state(slurm, job):
    return dict(word.split("=", 1) for word in slurm("scontrol", "show", "job", job).split() if "=" in word)


def ended(slurm, job):
    return state(slurm, job)["JobState"] not in ("PENDING", "RUNNING", "COMPLETING")


def again(slurm, job):
    """Waits until the job has queued itself again, and lets it start soon: Slurm would hold it for two minutes.

    Not in the second of its end, whose credentials count as revoked.
    """
    until(lambda: state(slurm, job)["Restarts"] == "1" and state(slurm, job)["JobState"] == "PENDING", 120)
    slurm("scontrol", "update", f"jobid={job}", "StartTime=now+3seconds")


def submit(slurm, folder, *command, tasks=2):
    options = [f"--ntasks={tasks}", f"--ntasks-per-node={tasks}", f"--output={folder}/slurm-%j.txt"]
    return slurm("sbatch", "--parsable", *options, SCRIPT, *command, cwd=folder)


@pytest.mark.slow
def test_a_run_that_was_stopped_and_queued_again_equals_one_never_stopped(slurm, tmp_path):
    train = ("train", f"--experiment={FAULTS}:slow", "--set=train.save_every=1000", "--set=train.steps=40")
    stopped, whole = tmp_path / "stopped", tmp_path / "whole"
    job = submit(slurm, tmp_path, sys.executable, "-m", "lm.main", *train, f"--workdir={stopped}")
    said = tmp_path / f"slurm-{job}.txt"
    until(lambda: said.exists() and "step 10/40" in said.read_text() or ended(slurm, job), 180)
    slurm("scancel", "--signal=TERM", job)
    again(slurm, job)
    until(lambda: ended(slurm, job), 180)
    assert state(slurm, job)["JobState"] == "COMPLETED", said.read_text()
    assert "2 processes (from Slurm)" in said.read_text() and "launch: exit code 75, start 1" in said.read_text()
    assert start(*train, f"--workdir={whole}", stdout=subprocess.DEVNULL).wait(240) == 0
    assert digests(stopped, 40) == digests(whole, 40) and losses(stopped) == losses(whole)


@pytest.mark.slow
@pytest.mark.parametrize("code", (1, 137))
def test_a_job_that_fails_is_not_queued_again(slurm, tmp_path, code):
    """The other task saves and asks for a restart, which its peer's failure outweighs."""
    ends = f"kill -{code - 128} $$" if code > 128 else f"exit {code}"
    job = submit(slurm, tmp_path, "bash", "-c", f"[ $SLURM_PROCID = 1 ] && {ends}; sleep 2; exit 75")
    until(lambda: ended(slurm, job), 60)
    assert (state(slurm, job)["JobState"], state(slurm, job)["Restarts"]) == ("FAILED", "0")


@pytest.mark.slow
def test_tasks_that_ask_for_a_restart_one_after_another_get_it(slurm, tmp_path):
    last = "trap : TERM; sleep $SLURM_PROCID; [ ${SLURM_RESTART_COUNT:-0} = 1 ] || exit 75"
    job = submit(slurm, tmp_path, "bash", "-c", last)
    again(slurm, job)
    until(lambda: ended(slurm, job), 60)
    assert state(slurm, job)["JobState"] == "COMPLETED"


def fake(folder, name, text):
    file = folder / name
    file.write_text(f"#!/bin/bash\n{text}\n")
    file.chmod(file.stat().st_mode | stat.S_IXUSR)


@pytest.fixture
def alone(tmp_path):
    """Runs the script outside Slurm: (exit code, the lines of what it called, standard output)."""
    calls = tmp_path / "calls"
    fake(tmp_path, "scontrol", f'echo scontrol "$@" >> {calls}')
    # Options go on the record, what follows "bash" is run as task 0.
    fake(
        tmp_path,
        "srun",
        f"echo srun ${{@%%bash}} | sed 's/ -c .*//' >> {calls}\n"
        'while [ "$1" != bash ]; do shift; done\nSLURM_PROCID=0 SLURM_STEP_NUM_TASKS=1 "$@"',
    )

    def run(*command, **environ):
        environ = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7", **environ}
        result = subprocess.run(["bash", str(SCRIPT), *command], env=environ, capture_output=True, text=True)
        return result.returncode, calls.read_text().splitlines() if calls.exists() else [], result.stdout

    return run


@pytest.mark.parametrize("code", (0, 1, 2, 17, 56, 75, 137, 255))
def test_only_a_wish_for_a_restart_queues_the_job_again(alone, code):
    returned, calls, out = alone("bash", "-c", f'echo "$LM_LAUNCH"; exit {code}')
    assert out.splitlines() == ["slurm-7", f"launch: exit code {code}, start 1 of job 7"]
    assert (returned, calls) == ((0, ["srun -K1", "scontrol requeue 7"]) if code == 75 else (code, ["srun -K1"]))


def test_a_container_and_its_mounts_come_from_the_environment(alone):
    _, calls, _ = alone("true", LM_CONTAINER="nvcr.io#nvidia/jax:25.01", LM_MOUNTS="/data:/data")
    assert calls == ["srun -K1 --container-image=nvcr.io#nvidia/jax:25.01 --container-mounts=/data:/data"]


def test_a_job_without_a_command_is_a_usage_error(alone):
    assert alone()[0] == 2


def test_the_script_asks_to_be_told_before_its_time_is_over():
    options = {line.split()[1] for line in SCRIPT.read_text().splitlines() if line.startswith("#SBATCH")}
    assert {"--requeue", "--open-mode=append", "--signal=TERM@300"} <= options
    assert subprocess.run(["bash", "-n", SCRIPT]).returncode == 0
