"""Floating-point work and the peak that it is measured against."""

import functools
import time
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

# Dense bfloat16 peaks in FLOP/s a chip, from the makers' data sheets; keys are found in jax's device_kind.
PEAK_FLOPS = {
    "H200": 989e12,
    "H100": 989e12,
    "B200": 2250e12,
    "A100": 312e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5p": 459e12,
    "TPU v5": 459e12,
    "TPU v6": 918e12,
    "TPU7x": 2307e12,
}


def flops_per_row(model: Any, spec: Any, batch: Mapping[str, Any]) -> float:
    """Floating-point operations a row and training step, without recomputation; of `batch` only shapes are read.

    6 x the matmul parameters that each token passes (the head where there is a target, embedding look-ups not, of
    experts the chosen ones) + 3 x the forward work of attention, causal pairs alone where it is causal: the convention
    of Megatron-LM and of MaxText since July 2025.
    """
    return 3 * model.forward_flops(spec, {name: x.shape[1] for name, x in batch.items() if len(x.shape) > 1})


def peak_flops(devices: list[jax.Device]) -> tuple[float, str]:
    """(FLOP/s of all the devices, the convention in words).

    Accelerators go by their data sheet. A CPU goes by the best rate that it reaches here on float32
    matrix products, because no table lists it.
    """
    kind = devices[0].device_kind
    for name, peak in PEAK_FLOPS.items():
        if name in kind:
            return peak * len(devices), f"of {peak / 1e12:.0f} TFLOP/s bfloat16 a chip"
    rate = _measured_matmul_rate()
    return rate, f"of {rate / 1e9:.0f} GFLOP/s, the best float32 matrix product measured at the start"


@functools.lru_cache(maxsize=1)
def _measured_matmul_rate(size: int = 1024, tries: int = 5) -> float:
    product = jax.jit(jnp.matmul)
    x = jnp.ones((size, size), jnp.float32)
    product(x, x).block_until_ready()
    times = []
    for _ in range(tries):
        start = time.perf_counter()
        product(x, x).block_until_ready()
        times.append(time.perf_counter() - start)
    return 2 * size**3 / min(times)
