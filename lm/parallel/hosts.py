"""How the processes of a run find each other, and what they tell one another."""

import json
import os
import socket
import sys
import time
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from lm.core.errors import UsageError
from lm.parallel import rules
from lm.parallel.layout import Layout

BARRIER_MS = 24 * 3600 * 1000  # While process 0 builds a corpus; a death in that time ends all at once anyway.

_PEERS_FAILURES = tuple(
    f"{code}: " for code in ("ABORTED", "CANCELLED", "DEADLINE_EXCEEDED", "INTERNAL", "UNAVAILABLE", "UNKNOWN")
)


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
    address, bind_address = _resolved(layout.coordinator or "", layout.patience_s)
    _reach_directly(address)
    jax.distributed.initialize(
        coordinator_address=address,
        num_processes=layout.num_processes,
        process_id=layout.process_id,
        # jax would take one device a Slurm task; a process drives those that it can see.
        local_device_ids=None,
        cluster_detection_method="deactivate",
        initialization_timeout=120,
        heartbeat_timeout_seconds=30,
        coordinator_bind_address=bind_address,
    )


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


def post(name: str, text: str) -> None:
    """Leaves a note for all processes with the coordinator, over this process's last of that name; waits for nobody."""
    if (client := _client()) is not None:
        client.key_value_set(f"lm/{name}/{jax.process_index()}", text, allow_overwrite=True)


def posted(name: str) -> dict[int, str]:
    """{process: its last note of that name}, of those that have left one."""
    if (client := _client()) is None:
        return {}
    return {int(key.rpartition("/")[2]): text for key, text in client.key_value_dir_get(f"lm/{name}/")}


def is_peers_failure(error: BaseException) -> bool:
    """Whether an error of this process, in a run of several, is what a collective says when another one has ended.

    The runtime's errors begin with a status code. A program or a machine at fault has others than these, such as
    INVALID_ARGUMENT and RESOURCE_EXHAUSTED.
    """
    return jax.process_count() > 1 and str(error).startswith(_PEERS_FAILURES)


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


def _resolved(address: str, patience_s: float = 0.0) -> tuple[str, str]:
    """(the coordinator's address, that on which its service listens), once the name is known.

    The service takes no credential, so it listens on the coordinator's own address alone; on all where a host has its
    own name for a loopback address, as Debian's have, at which no other host finds it.
    """
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise UsageError(f"coordinator {address!r} must be host:port")
    deadline = time.monotonic() + patience_s
    while True:
        try:
            found = {str(info[4][0]) for info in socket.getaddrinfo(host.strip("[]"), int(port))}
            break
        except (OSError, OverflowError) as error:
            if time.monotonic() >= deadline:
                raise UsageError(
                    f"coordinator {address!r} does not resolve ({error}): check its name and DNS"
                ) from None
            time.sleep(1.0)
    loopback = all(ip.startswith("127.") or ip == "::1" for ip in found)
    meant = host.strip("[]") in ("localhost", *found)
    return address, f"[::]:{port}" if loopback and not meant else address


def _reach_directly(address: str) -> None:
    """Keeps the coordinator's connections off a proxy of the environment, which would hang or end them."""
    if any(name.lower() in ("http_proxy", "https_proxy", "grpc_proxy") for name in os.environ):
        excepted = os.environ.get("no_grpc_proxy") or os.environ.get("no_proxy")
        host = address.rpartition(":")[0].strip("[]")
        os.environ["no_grpc_proxy"] = f"{excepted},{host}" if excepted else host


def _client() -> Any:
    """The coordinator's client; None in a run of one process. jax has no public name for it."""
    from jax._src import distributed

    return distributed.global_state.client
