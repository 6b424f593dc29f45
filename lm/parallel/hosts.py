"""Which processes make up a run, how they find each other, and what they tell one another."""

import dataclasses
import json
import os
import re
import socket
import sys
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from lm.core.errors import UsageError
from lm.parallel import rules

BARRIER_MS = 24 * 3600 * 1000  # While process 0 builds a corpus; a death in that time ends all at once anyway.


@dataclasses.dataclass(frozen=True)
class Layout:
    """The processes of a run; with `num_processes=None` jax finds them itself (TPU pods)."""

    coordinator: str | None = None
    num_processes: int | None = 1
    process_id: int | None = 0
    source: str = "single"

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
    """The layout from the first that says anything: flags, LM_*, Slurm, Open MPI, a TPU pod; else one process.

    `flags` has `coordinator`, `num_processes` and `process_id`; a number of processes of "auto" leaves all three
    to jax, for a Cloud TPU VM. Inside a Slurm allocation but outside `srun` (a batch script) there is one
    process. Raises UsageError for a part that is missing or no number.
    """
    if flags and flags.get("num_processes") is not None:
        return _given(flags.get("coordinator"), flags["num_processes"], flags.get("process_id"), "flags")
    if "LM_NUM_PROCESSES" in environ:
        names = ("LM_COORDINATOR", "LM_NUM_PROCESSES", "LM_PROCESS_ID")
        coordinator, count, process_id = (environ.get(name) for name in names)
        return _given(coordinator, count, process_id, "LM_*")
    if "SLURM_STEP_NODELIST" in environ and "SLURM_PROCID" in environ:
        coordinator = environ.get("LM_COORDINATOR") or _slurm_coordinator(environ)
        return _given(coordinator, environ.get("SLURM_STEP_NUM_TASKS"), environ["SLURM_PROCID"], "Slurm")
    if "OMPI_COMM_WORLD_SIZE" in environ:
        coordinator = environ.get("LM_COORDINATOR") or _ompi_coordinator(environ)
        return _given(coordinator, environ["OMPI_COMM_WORLD_SIZE"], environ.get("OMPI_COMM_WORLD_RANK"), "Open MPI")
    pod = "," in environ.get("TPU_WORKER_HOSTNAMES", "") or "," in environ.get("TPU_PROCESS_ADDRESSES", "")
    if pod or "MEGASCALE_COORDINATOR_ADDRESS" in environ:
        return Layout(None, None, None, "TPU pod")
    return Layout()


def initialize(layout: Layout) -> None:
    """Joins the processes; a single one starts nothing. Call it before any device is touched.

    Raises UsageError where the coordinator's name does not resolve: jax itself would abort after its timeout.
    """
    if layout.num_processes == 1:
        return
    if jax.config.jax_platforms in (None, "", "cpu"):  # type: ignore[attr-defined]  # Made at import.
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
    if layout.num_processes is None:
        jax.distributed.initialize(initialization_timeout=120, heartbeat_timeout_seconds=30)
        return
    address = _resolved(layout.coordinator or "")
    jax.distributed.initialize(
        coordinator_address=address,
        num_processes=layout.num_processes,
        process_id=layout.process_id,
        # jax would take one device a Slurm task; a process drives those that it can see.
        local_device_ids=None,
        cluster_detection_method="deactivate",
        initialization_timeout=120,
        heartbeat_timeout_seconds=30,
        # The service takes no credential, so it listens on the coordinator's own address alone.
        coordinator_bind_address=address,
    )


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


def is_main() -> bool:
    return jax.process_index() == 0


def barrier(name: str) -> None:
    """Returns once every process has come to the barrier of that name, be it hours later."""
    if jax.process_count() == 1:
        return
    from orbax.checkpoint import multihost

    # Through the coordinator: gloo, whose collectives jax's own barrier takes on CPU, gives up after 30 s.
    multihost.get_barrier_sync_fn()(key=name, timeout_ms=BARRIER_MS)


def broadcast(value: Any) -> Any:
    """Process 0's `value`, which is JSON; the others' values are ignored."""
    if jax.process_count() == 1:
        return value
    barrier("broadcast")  # Process 0 may come late.
    data = np.frombuffer(json.dumps(value if is_main() else None).encode(), np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.int32(data.size)))
    buffer = np.zeros(size, np.uint8)
    if is_main():
        buffer[:] = data
    return json.loads(np.asarray(multihost_utils.broadcast_one_to_all(buffer)).tobytes())


def any_process(flag: bool) -> bool:
    """Whether `flag` is true in any process: the same answer in all, so that they leave at one step."""
    if jax.process_count() == 1:
        return flag
    return bool(np.any(multihost_utils.process_allgather(np.int32(flag))))


def abandon(code: int) -> None:
    """Ends this process of several now; its peers are then ended by what started them. Returns in a run of one.

    For errors of one process: a plain exit waits at jax's barrier for peers that wait for this one.
    """
    if jax.distributed.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def host_rows(mesh: jax.sharding.Mesh, batch_size: int) -> tuple[int, int]:
    """(first row, number of rows) of the global batch that this process supplies.

    Raises UsageError where the batch does not divide over the batch axes, or where the mesh's order of devices
    would scatter a process's rows.
    """
    shards = int(np.prod([mesh.shape[a] for a in rules.BATCH_AXES]))
    if batch_size % shards:
        below = batch_size // shards * shards
        near = " or ".join(str(n) for n in (below, below + shards) if n)
        axes = " x ".join(f"{a}={mesh.shape[a]}" for a in rules.BATCH_AXES if mesh.shape[a] > 1)
        raise UsageError(f"train.batch_size={batch_size} does not divide over mesh {axes}: take {near}")
    places = rules.batch_sharding(mesh).addressable_devices_indices_map((batch_size,))
    spans = sorted({index[0].indices(batch_size)[:2] for index in places.values() if index is not None})
    first, end = spans[0][0], spans[-1][1]
    if any(a[1] != b[0] for a, b in zip(spans, spans[1:], strict=False)):
        raise UsageError(f"this mesh gives process {jax.process_index()} rows {spans}, which are not contiguous")
    return first, end - first


def global_array(local_rows: dict[str, np.ndarray], sharding: jax.sharding.Sharding) -> dict[str, jax.Array]:
    """Arrays of the global batch from the rows [rows, ...] that `host_rows` gives to each process."""
    return {name: jax.make_array_from_process_local_data(sharding, rows) for name, rows in local_rows.items()}


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


def _slurm_coordinator(environ: Mapping[str, str]) -> str:
    """First node of the step; the port comes from job and step, so that steps of one job do not collide."""
    job, step = int(environ.get("SLURM_JOB_ID", 0)), int(environ.get("SLURM_STEP_ID", 0))
    return f"{_first_node(environ['SLURM_STEP_NODELIST'])}:{20000 + (job * 31 + step) % 12000}"


def _first_node(nodes: str) -> str:
    """The first name of a Slurm list, suffix included: node[001-004,7]-ib -> node001-ib."""
    head, bracket, rest = nodes.partition("[")
    if not bracket or "," in head:
        return nodes.split(",")[0]
    numbers, _, suffix = rest.partition("]")
    first = numbers.split(",")[0].split("-")[0]
    return head + first + suffix.split(",")[0]


def _ompi_coordinator(environ: Mapping[str, str]) -> str:
    """The launcher's own address: "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911" -> the first, port from its id."""
    uri = environ.get("OMPI_MCA_orte_hnp_uri", "")
    job, _, address = uri.partition(";tcp://")
    if not address:
        raise UsageError("this Open MPI does not say where its launcher runs: set LM_COORDINATOR=host:port")
    return f"{address.split(',')[0].split(':')[0]}:{20000 + int(job.split('.')[0]) % 12000}"


def _resolved(address: str) -> str:
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise UsageError(f"coordinator {address!r} must be host:port")
    try:
        socket.getaddrinfo(host.strip("[]"), int(port))
    except (OSError, OverflowError) as error:
        raise UsageError(f"coordinator {address!r} does not resolve ({error}): check its name and DNS") from None
    return address
