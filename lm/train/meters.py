"""Floating-point work and the peak that it is measured against."""

import functools
import math
import time
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from lm.parallel import chips


def flops_per_row(model: Any, spec: Any, batch: Mapping[str, Any]) -> float:
    """Floating-point operations a row and training step, without recomputation; of `batch` only shapes are read.

    6 x the matmul parameters that each token passes (the head where there is a target, embedding look-ups not, of
    experts the chosen ones) + 3 x the forward work of attention, causal pairs alone where it is causal: the convention
    of Megatron-LM and of MaxText since July 2025.
    """
    return 3 * model.forward_flops(spec, {name: x.shape[1] for name, x in batch.items() if len(x.shape) > 1})


def product_flops(jaxpr: Any) -> tuple[float, float]:
    """(work of plain products, of products with batch dimensions) of a whole program, loops' bodies each time.

    `jaxpr` is that of a jax.make_jaxpr; attention's two products have batch dimensions.
    """
    plain = batched = 0.0
    for equation in jaxpr.eqns:
        repeats = equation.params["length"] if equation.primitive.name == "scan" else 1
        called = [getattr(value, "jaxpr", value) for value in equation.params.values()]
        for more in (product_flops(inner) for inner in called if hasattr(inner, "eqns")):
            plain, batched = plain + repeats * more[0], batched + repeats * more[1]
        if equation.primitive.name == "dot_general":
            (contracted, _), (batch, _) = equation.params["dimension_numbers"]
            left, out = equation.invars[0].aval.shape, equation.outvars[0].aval.shape
            flops = 2 * math.prod(out) * math.prod(left[i] for i in contracted)
            plain, batched = (plain, batched + flops) if batch else (plain + flops, batched)
    return plain, batched


class NoiseScale:
    """The gradient noise scale of the steps since the lap before, from each step's two estimates.

    B_simple = tr Sigma / |G|^2 in rows (sequences), near which the critical batch lies (McCandlish et al. 2018,
    1812.06162, eq. 2.9): below it, twice the batch takes nearly half the steps. Both estimates are averaged over steps,
    and only then divided: one step's |G|^2 may lie near zero, or below. A resumed run begins a new lap.
    """

    def __init__(self) -> None:
        self._steps: list[tuple[float, float]] = []

    def take(self, values: dict[str, float]) -> None:
        """Takes a step's "noise_trace" and "noise_square" out of its figures; what is not finite counts nowhere."""
        if "noise_trace" in values:
            pair = values.pop("noise_trace"), values.pop("noise_square")
            self._steps += [pair] if all(map(math.isfinite, pair)) else []

    def lap(self) -> dict[str, float]:
        """Their means, and "noise_scale" where that of |G|^2 is above zero; nothing without steps."""
        if not self._steps:
            return {}
        trace, square = (sum(x) / len(self._steps) for x in zip(*self._steps, strict=True))
        self._steps = []
        return {"noise_trace": trace, "noise_square": square} | ({"noise_scale": trace / square} if square > 0 else {})


def peak_flops(devices: list[jax.Device]) -> tuple[float, str]:
    """(FLOP/s of all the devices, the convention in words).

    Accelerators go by their data sheet. A CPU goes by the best rate that it reaches here on float32
    matrix products, because no table lists it.
    """
    chip = chips.of_device(devices[0])
    if chip is not None:
        return chip.flops / chip.devices * len(devices), f"of {chip.flops / 1e12:.0f} TFLOP/s bfloat16 a chip"
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
