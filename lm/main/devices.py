"""Starts JAX: the processes that make up a run, and on CPU one host device a core."""

import ctypes
import os

import jax

from lm.parallel import hosts, layout

# Each device holds a copy of weights and moments, and the products of larger models keep all cores busy from one.
MOST_COPIED_PARAMETERS = 32_000_000
# Updating its copy costs a device as much as the products of about this many tokens: of 6.4M parameters and 256 tokens
# a step, two devices took 251 ms of CPU time and one 148. Below so many parameters that is nothing.
LEAST_TOKENS, FREELY_COPIED_PARAMETERS = 512, 2_000_000
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # Of glibc's malloc.h.


def start(batch_size: int, parameters: int = 0, seq_len: int = LEAST_TOKENS) -> None:
    """Joins the processes of the environment; on CPU starts as many devices as cores that divide the batch.

    A model of more than MOST_COPIED_PARAMETERS, or of more than FREELY_COPIED_PARAMETERS whose devices would have fewer
    than LEAST_TOKENS each, gets one device there, unless the environment says otherwise.
    """
    found = layout.resolve(os.environ)
    if os.environ.get("JAX_PLATFORMS") == "cpu":
        _keep_freed_memory()
        count = layout.cpu_devices(batch_size, os.environ)
        few = count is not None and batch_size * seq_len < LEAST_TOKENS * count
        if count is not None and (parameters > MOST_COPIED_PARAMETERS or few and parameters > FREELY_COPIED_PARAMETERS):
            count = 1
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


def _keep_freed_memory() -> None:
    """Lets glibc keep what is freed, where it is in use: the buffers of every step would else be mapped, and each of
    their pages cleared, anew, which took 20 of 94 ms of a small LSTM's step.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(_M_MMAP_MAX, 0)
        libc.mallopt(_M_TRIM_THRESHOLD, -1)
