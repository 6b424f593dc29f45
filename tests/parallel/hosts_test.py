"""Processes find each other by whatever started them, and agree."""

import json
import os
import pathlib
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from lm.core.errors import UsageError
from lm.parallel import hosts, rules
from lm.parallel.hosts import Layout
from lm.parallel.mesh import Mesh

ROOT = pathlib.Path(__file__).resolve().parents[2]
LM = {"LM_COORDINATOR": "a:1", "LM_NUM_PROCESSES": "2", "LM_PROCESS_ID": "1"}
SLURM = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_ID": "1",
    "SLURM_STEP_NODELIST": "node[003-004,7]-ib",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_PROCID": "2",
}
OMPI = {
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_RANK": "0",
    "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911",
}


def test_the_first_that_says_anything_wins():
    flags = {"coordinator": "f:1", "num_processes": 3, "process_id": 0}
    assert hosts.resolve(LM | SLURM | OMPI, flags) == Layout("f:1", 3, 0, "flags")
    assert hosts.resolve(LM | SLURM | OMPI, {"num_processes": None}) == Layout("a:1", 2, 1, "LM_*")
    assert hosts.resolve(SLURM | OMPI) == Layout("node003-ib:20218", 4, 2, "Slurm")
    assert hosts.resolve(OMPI).source == "Open MPI" and hosts.resolve(OMPI).coordinator.startswith("10.96.0.1:")
    assert hosts.resolve({"TPU_WORKER_HOSTNAMES": "a,b"}) == Layout(None, None, None, "TPU pod")
    assert hosts.resolve({"TPU_WORKER_HOSTNAMES": "localhost"}) == Layout() == hosts.resolve({})


def test_a_batch_script_outside_srun_is_one_process():
    assert hosts.resolve({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_PROCID": "0"}) == Layout()


def test_two_steps_of_one_job_do_not_share_a_port():
    first, second = hosts.resolve(SLURM), hosts.resolve(SLURM | {"SLURM_STEP_ID": "2"})
    assert first.coordinator != second.coordinator


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("n1", "n1"), ("n1,n2", "n1"), ("n[1-4]", "n1"), ("n[001-004]-ib", "n001-ib"), ("a-1,n[1-4]", "a-1")],
)
def test_the_first_node_of_a_slurm_list(nodes, first):
    assert hosts.resolve(SLURM | {"SLURM_STEP_NODELIST": nodes}).coordinator.split(":")[0] == first


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"LM_PROCESS_ID": "2"}, "process id 2 of 2"),
        ({"LM_PROCESS_ID": "x"}, "'x'"),
        ({"LM_NUM_PROCESSES": "0"}, "of 0 processes"),
        ({"LM_COORDINATOR": ""}, "need a coordinator"),
    ],
)
def test_a_layout_that_cannot_be_is_refused(changed, said):
    with pytest.raises(UsageError, match=said):
        hosts.resolve(LM | changed)


@pytest.mark.parametrize("coordinator", ("no.such.host.invalid:1234", "here", "here:port"))
def test_a_coordinator_that_does_not_resolve_is_refused_at_once(coordinator):
    with pytest.raises(UsageError, match="coordinator"):
        hosts.initialize(Layout(coordinator, 2, 1, "flags"))


def test_one_process_starts_nothing():
    hosts.initialize(Layout())
    assert hosts.is_main() and hosts.broadcast({"a": 1}) == {"a": 1} and not hosts.any_process(False)


def test_cpu_devices_are_as_many_cores_as_divide_the_batch(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(6), raising=False)
    assert [hosts.cpu_devices(n, {}) for n in (1, 7, 8, 12)] == [1, 1, 4, 6]
    assert hosts.cpu_devices(12, LM) == 1
    assert hosts.cpu_devices(12, {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"}) is None
    assert hosts.cpu_devices(12, {"JAX_NUM_CPU_DEVICES": "3"}) is None


def test_a_process_supplies_its_rows_of_the_global_batch():
    mesh = Mesh(fsdp=2, tensor=2).build()
    assert hosts.host_rows(mesh, 12) == (0, 12)
    rows = {"tokens_BL": np.arange(36).reshape(12, 3)}
    batch = hosts.global_array(rows, rules.batch_sharding(mesh))
    assert batch["tokens_BL"].shape == (12, 3) and np.array_equal(batch["tokens_BL"], rows["tokens_BL"])
    assert {s.data.shape for s in batch["tokens_BL"].addressable_shards} == {(3, 3)}


def test_a_batch_that_does_not_divide_names_the_nearest_that_do():
    with pytest.raises(
        UsageError, match=r"train.batch_size=13 does not divide over mesh data=4 x fsdp=2: take 8 or 16"
    ):
        hosts.host_rows(Mesh(fsdp=2).build(), 13)


# What each process sees and agrees on, as one JSON line from process 0.
WORKER = """
import json, os, sys
import jax, numpy as np
from lm.parallel import hosts, rules
from lm.parallel.mesh import Mesh
from lm.train.checkpoint import Checkpoints
from lm.train.digest import digests
hosts.initialize(hosts.resolve(os.environ))
rank, folder, order = jax.process_index(), sys.argv[1], sys.argv[2]
mesh = Mesh().build()
first, count = hosts.host_rows(mesh, 8)
rows = np.arange(48, dtype=np.float32).reshape(8, 6)[first : first + count]
batch = hosts.global_array({"w": rows}, rules.batch_sharding(mesh))
events = []
checkpoints = Checkpoints(folder, report=lambda event, **fields: events.append([event, fields["step"]]))
if "save" in order:
    for step in (1, 2):
        checkpoints.save(step, {"params": batch}, {"by": jax.process_count()}, wait=True)
hosts.barrier("saved")
wanted = {"params": jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), batch)}
restored, meta, step = checkpoints.restore(wanted, quarantine=True)
said = {
    "rows": [first, count],
    "any": hosts.any_process(rank == jax.process_count() - 1),
    "none": hosts.any_process(False),
    "broadcast": hosts.broadcast({"from": rank}),
    "digest": digests(batch)["w"],
    "restored": digests(restored["params"])["w"],
    "step": step,
    "by": meta["by"],
    "events": events,
    "total": float(batch["w"].sum()),
}
print("said " + json.dumps(said) + "\\n", end="", flush=True)  # One write even where stdout is unbuffered.
"""


def said(processes, folder, order=""):
    environ = {**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": ""}
    if processes == 1:
        environ["JAX_NUM_CPU_DEVICES"] = "2"
    launcher = [sys.executable, str(ROOT / "launch" / "local.py"), "-n", str(processes), "--"]
    command = [*launcher, sys.executable, "-c", WORKER, str(folder), order]
    result = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stdout + result.stderr
    # Gloo's own lines may share one with ours.
    return [json.loads(line.split("said ", 1)[1]) for line in result.stdout.splitlines() if "said {" in line]


@pytest.mark.slow
def test_two_processes_agree_and_equal_one_with_two_devices(tmp_path):
    two = sorted(said(2, tmp_path / "two", "save"), key=lambda each: each["rows"])
    (one,) = said(1, tmp_path / "one", "save")
    assert [each["rows"] for each in two] == [[0, 4], [4, 4]] and one["rows"] == [0, 8]
    assert all(each["any"] and not each["none"] and each["broadcast"] == {"from": 0} for each in two)
    assert {each["digest"] for each in two} == {each["restored"] for each in two} == {one["digest"]}
    assert {each["total"] for each in two} == {one["total"]} == {48 * 47 / 2}
    # Either reads what the other saved; both pass over a damaged step together, and one of them renames it.
    (crossed,) = said(1, tmp_path / "two")
    assert (crossed["step"], crossed["by"], crossed["restored"]) == (2, 2, one["digest"])
    (tmp_path / "one" / "checkpoints" / "2" / "meta" / "metadata").write_text("{}")
    back = said(2, tmp_path / "one")
    assert [(each["step"], each["by"], each["restored"]) for each in back] == [(1, 1, one["digest"])] * 2
    assert sorted(each["events"] for each in back) == [[], [["quarantined", 2]]]
    assert jax.process_count() == 1


def test_an_error_of_one_process_ends_all_at_once():
    code = (
        "import os, sys\nfrom lm.parallel import hosts\nhosts.initialize(hosts.resolve(os.environ))\n"
        "hosts.abandon(2) if hosts.is_main() else hosts.barrier('never')"
    )
    environ = {**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": ""}
    launcher = [sys.executable, str(ROOT / "launch" / "local.py"), "-n", "2", "--", sys.executable, "-c", code]
    start = time.monotonic()
    assert subprocess.run(launcher, env=environ, capture_output=True, timeout=60).returncode == 2
    assert time.monotonic() - start < 25  # A plain exit takes the 30 s of a collective's time-out.


@pytest.mark.slow
def test_a_barrier_waits_longer_than_gloo_does():
    code = (
        "import os, time\nfrom lm.parallel import hosts\nhosts.initialize(hosts.resolve(os.environ))\n"
        "time.sleep(35 if hosts.is_main() else 0)\nhosts.barrier('late')\nassert hosts.broadcast(1) == 1"
    )
    environ = {**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": ""}
    launcher = [sys.executable, str(ROOT / "launch" / "local.py"), "-n", "2", "--", sys.executable, "-c", code]
    assert subprocess.run(launcher, env=environ, capture_output=True, timeout=90).returncode == 0
