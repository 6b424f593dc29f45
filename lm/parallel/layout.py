"""Which processes make up a run, as whatever started them says: read from the environment alone, without jax."""

import dataclasses
import os
import re
import zlib
from collections.abc import Mapping
from typing import Any

from lm.core.errors import UsageError

# Below the range that Linux hands out on its own (32768 and up), so that nobody else's connection has the port.
FIRST_PORT, PORTS = 20000, 12000
POD_PATIENCE_S = 120.0


@dataclasses.dataclass(frozen=True)
class Layout:
    """The processes of a run; with `num_processes=None` jax finds them itself (TPU pods)."""

    coordinator: str | None = None
    num_processes: int | None = 1
    process_id: int | None = 0
    source: str = "single"
    patience_s: float = 0.0  # For the coordinator's name: that of a pod is known only once it has started.

    def __post_init__(self):
        if self.num_processes is None:
            return
        if not self.num_processes >= 1 or self.process_id is None or not 0 <= self.process_id < self.num_processes:
            raise UsageError(
                f"process id {self.process_id} of {self.num_processes} processes (from {self.source}): "
                "ids go from 0 to the number of processes less one"
            )
        if self.num_processes > 1 and not self.coordinator:
            raise UsageError(f"{self.num_processes} processes (from {self.source}) need a coordinator: host:port")


def resolve(environ: Mapping[str, str], flags: Mapping[str, Any] | None = None) -> Layout:
    """The layout from the first that speaks: flags, LM_*, Slurm, Open MPI, a TPU pod, SkyPilot; else one process.

    `flags` has `coordinator`, `num_processes` and `process_id`; a number of processes of "auto" leaves all three
    to jax, for a Cloud TPU VM. In an Indexed Job of Kubernetes the process id is the pod's completion index. Inside a
    Slurm allocation but outside `srun` (a batch script) there is one process. Raises UsageError for a part that is
    missing or no number.
    """
    if flags and flags.get("num_processes") is not None:
        return _given(flags.get("coordinator"), flags["num_processes"], flags.get("process_id"), "flags")
    if "LM_NUM_PROCESSES" in environ:
        return _ours(environ)
    if "SLURM_STEP_NODELIST" in environ and "SLURM_PROCID" in environ:
        coordinator = environ.get("LM_COORDINATOR") or _slurm_coordinator(environ)
        return _given(coordinator, environ.get("SLURM_STEP_NUM_TASKS"), environ["SLURM_PROCID"], "Slurm")
    if "OMPI_COMM_WORLD_SIZE" in environ:
        coordinator = environ.get("LM_COORDINATOR") or _ompi_coordinator(environ)
        return _given(coordinator, environ["OMPI_COMM_WORLD_SIZE"], environ.get("OMPI_COMM_WORLD_RANK"), "Open MPI")
    pod = "," in environ.get("TPU_WORKER_HOSTNAMES", "") or "," in environ.get("TPU_PROCESS_ADDRESSES", "")
    if pod or "MEGASCALE_COORDINATOR_ADDRESS" in environ:
        return Layout(None, None, None, "TPU pod")
    if "SKYPILOT_NODE_IPS" in environ:
        coordinator = environ.get("LM_COORDINATOR") or _sky_coordinator(environ)
        return _given(coordinator, environ.get("SKYPILOT_NUM_NODES"), environ.get("SKYPILOT_NODE_RANK"), "SkyPilot")
    return Layout()


def cpu_devices(batch_size: int, environ: Mapping[str, str]) -> int | None:
    """How many host devices to start on CPU: one a core, at most as many as divide `batch_size`.

    One a process in a run of several, whose rows are split already. None where XLA_FLAGS or
    JAX_NUM_CPU_DEVICES has decided. Hand it to `jax.config.update("jax_num_cpu_devices", n)`.
    """
    if forced_cpu_devices(environ) is not None:
        return None
    if resolve(environ).num_processes != 1:
        return 1
    return max(n for n in range(1, cores() + 1) if batch_size % n == 0)


def forced_cpu_devices(environ: Mapping[str, str]) -> int | None:
    """The number of host devices that XLA_FLAGS or JAX_NUM_CPU_DEVICES asks for, if one of them does."""
    flag = re.search(r"xla_force_host_platform_device_count=(\d+)", environ.get("XLA_FLAGS", ""))
    asked = flag[1] if flag else environ.get("JAX_NUM_CPU_DEVICES", "")
    return int(asked) if asked.isdigit() else None


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _ours(environ: Mapping[str, str]) -> Layout:
    coordinator, count = environ.get("LM_COORDINATOR"), environ["LM_NUM_PROCESSES"]
    if "LM_PROCESS_ID" in environ or "JOB_COMPLETION_INDEX" not in environ:
        return _given(coordinator, count, environ.get("LM_PROCESS_ID"), "LM_*")
    layout = _given(coordinator, count, environ["JOB_COMPLETION_INDEX"], "an Indexed Job")
    return dataclasses.replace(layout, patience_s=POD_PATIENCE_S)


def _given(coordinator: Any, num_processes: Any, process_id: Any, source: str) -> Layout:
    if num_processes == "auto":
        return Layout(None, None, None, source)
    try:
        return Layout(coordinator, int(num_processes), int(process_id), source)
    except (TypeError, ValueError) as error:
        if isinstance(error, UsageError):
            raise
        raise UsageError(
            f"the number of processes {num_processes!r} and the process id {process_id!r} (from {source}) "
            "must both be given, as whole numbers"
        ) from None


def _port(number: int) -> int:
    return FIRST_PORT + number % PORTS


def _slurm_coordinator(environ: Mapping[str, str]) -> str:
    """First node of the step; the port comes from job and step, so that steps of one job do not collide."""
    job, step = int(environ.get("SLURM_JOB_ID", 0)), int(environ.get("SLURM_STEP_ID", 0))
    return f"{_first_node(environ['SLURM_STEP_NODELIST'])}:{_port(job * 31 + step)}"


def _first_node(nodes: str) -> str:
    """The first name of a Slurm list, suffix included: node[001-004,7]-ib -> node001-ib."""
    head, bracket, rest = nodes.partition("[")
    if not bracket or "," in head:
        return nodes.split(",")[0]
    numbers, _, suffix = rest.partition("]")
    return head + numbers.split(",")[0].split("-")[0] + _first_node(suffix)


def _ompi_coordinator(environ: Mapping[str, str]) -> str:
    """The launcher's own address: "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911" -> the first, port from its id."""
    uri = environ.get("OMPI_MCA_orte_hnp_uri", "")
    job, _, address = uri.partition(";tcp://")
    if not address:
        raise UsageError("this Open MPI does not say where its launcher runs: set LM_COORDINATOR=host:port")
    return f"{address.split(',')[0].split(':')[0]}:{_port(int(job.split('.')[0]))}"


def _sky_coordinator(environ: Mapping[str, str]) -> str:
    """The first of the nodes' addresses, one a line; the port comes from the task, whose nodes others may share."""
    port = _port(zlib.crc32(environ.get("SKYPILOT_TASK_ID", "").encode()))
    return f"{environ['SKYPILOT_NODE_IPS'].split()[0]}:{port}"
