"""Whatever started the processes, each finds its place among them."""

import os

import pytest

from lm.core.errors import UsageError
from lm.parallel import layout
from lm.parallel.layout import Layout

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
POD = {"LM_COORDINATOR": "run1-lm-0-0.run1:8476", "LM_NUM_PROCESSES": "4", "JOB_COMPLETION_INDEX": "3"}
SKY = {
    "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2\n",
    "SKYPILOT_NUM_NODES": "2",
    "SKYPILOT_NODE_RANK": "1",
    "SKYPILOT_TASK_ID": "sky-2026-11-26-1",
}


def test_the_first_that_says_anything_wins():
    flags = {"coordinator": "f:1", "num_processes": 3, "process_id": 0}
    assert layout.resolve(LM | SLURM | OMPI, flags) == Layout("f:1", 3, 0, "flags")
    assert layout.resolve(LM | SLURM | OMPI, {"num_processes": None}) == Layout("a:1", 2, 1, "LM_*")
    assert layout.resolve(SLURM | OMPI) == Layout("node003-ib:20218", 4, 2, "Slurm")
    assert layout.resolve(OMPI).source == "Open MPI" and layout.resolve(OMPI).coordinator.startswith("10.96.0.1:")
    assert layout.resolve(LM | POD).process_id == 1 and layout.resolve(POD | SLURM).process_id == 3
    for pod in ({"TPU_WORKER_HOSTNAMES": "a,b"}, {"MEGASCALE_COORDINATOR_ADDRESS": "a"}):
        assert layout.resolve(pod | SKY) == Layout(None, None, None, "TPU pod")
    assert layout.resolve(OMPI | SKY).source == "Open MPI" and layout.resolve(SKY).source == "SkyPilot"
    assert layout.resolve({"TPU_WORKER_HOSTNAMES": "localhost"}) == Layout() == layout.resolve({})


def test_a_batch_script_outside_srun_is_one_process():
    assert layout.resolve({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_PROCID": "0"}) == Layout()


def test_a_pod_is_numbered_by_its_completion_index_and_waits_for_the_name_of_the_first():
    found = layout.resolve(POD)
    assert (found.coordinator, found.num_processes, found.process_id) == ("run1-lm-0-0.run1:8476", 4, 3)
    assert found.patience_s >= 60 and layout.resolve(LM).patience_s == 0


def test_a_completion_index_alone_is_one_process():
    assert layout.resolve({"JOB_COMPLETION_INDEX": "3"}) == Layout()


def test_nodes_of_skypilot_meet_at_the_first_on_a_port_of_the_task():
    first, second = (layout.resolve(SKY | {"SKYPILOT_NODE_RANK": rank}) for rank in "01")
    assert first.coordinator == second.coordinator and first.coordinator.startswith("10.0.0.1:")
    assert (first.process_id, second.process_id, second.num_processes) == (0, 1, 2)
    assert layout.resolve(SKY | {"SKYPILOT_TASK_ID": "sky-2026-11-26-2"}).coordinator != first.coordinator
    one = layout.resolve(SKY | {"SKYPILOT_NUM_NODES": "1", "SKYPILOT_NODE_RANK": "0"})
    assert (one.num_processes, one.source) == (1, "SkyPilot")


@pytest.mark.parametrize("environ", (SLURM, OMPI, SKY), ids=("slurm", "ompi", "sky"))
def test_a_given_coordinator_is_taken(environ):
    assert layout.resolve(environ | {"LM_COORDINATOR": "here:5"}).coordinator == "here:5"


def test_two_steps_of_one_job_do_not_share_a_port():
    first, second = layout.resolve(SLURM), layout.resolve(SLURM | {"SLURM_STEP_ID": "2"})
    assert first.coordinator != second.coordinator


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("n1", "n1"), ("n1,n2", "n1"), ("n[1-4]", "n1"), ("n[001-004]-ib", "n001-ib"), ("a-1,n[1-4]", "a-1")]
    + [("n[003-004,7]-ib,x1", "n003-ib"), ("rack[1-2]node[3-4]", "rack1node3"), ("rack[1-2]node[3-4],x", "rack1node3")],
)
def test_the_first_node_of_a_slurm_list(nodes, first):
    assert layout.resolve(SLURM | {"SLURM_STEP_NODELIST": nodes}).coordinator.split(":")[0] == first


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
        layout.resolve(LM | changed)


def test_cpu_devices_are_as_many_cores_as_divide_the_batch(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(6), raising=False)
    assert [layout.cpu_devices(n, {}) for n in (1, 7, 8, 12)] == [1, 1, 4, 6]
    assert layout.cpu_devices(12, LM) == 1
    assert layout.cpu_devices(12, {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"}) is None
    assert layout.cpu_devices(12, {"JAX_NUM_CPU_DEVICES": "3"}) is None
