"""Starts JAX: the processes that make up a run, and on CPU one host device a core."""

import os

import jax

from lm.parallel import hosts, layout

# Each device holds a copy of weights and moments, and the products of larger models keep all cores busy from one.
MOST_COPIED_PARAMETERS = 32_000_000


def start(batch_size: int, parameters: int = 0) -> None:
    """Joins the processes of the environment; on CPU starts as many devices as cores that divide the batch.

    A model of more than MOST_COPIED_PARAMETERS gets one device there, unless the environment says otherwise.
    """
    found = layout.resolve(os.environ)
    if os.environ.get("JAX_PLATFORMS") == "cpu":
        count = layout.cpu_devices(batch_size if parameters <= MOST_COPIED_PARAMETERS else 1, os.environ)
        if count is not None:
            jax.config.update("jax_num_cpu_devices", count)
        # Devices that wait in a collective hold threads, and can hold every one that the last device needs: no
        # programs in flight, and more threads where devices outnumber cores (XLA's pools go by this variable).
        jax.config.update("jax_cpu_enable_async_dispatch", False)
        forced = layout.forced_cpu_devices(os.environ) or 1
        if forced > layout.cores():
            os.environ.setdefault("PJRT_NPROC", str(4 * forced))
    hosts.initialize(found)
    if found.source != "single" and hosts.is_main():
        print(f"{jax.process_count()} processes (from {found.source}), {jax.device_count()} devices")
