"""Hardware by name, such as v5p:8x8x8 or h100:64, and the devices that stand for it where there is none."""

import dataclasses
import math
import os

import jax

from lm.core import quiet
from lm.core.errors import UsageError, unknown
from lm.parallel import chips

MOST_CHIPS = {"v4": 4096, "v5e": 256, "v5p": 8960, "v6e": 256, "tpu7x": 9216}  # Of one slice.
FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")  # What the chips with a two-dimensional torus have.
SMALL = ("1x1x1", "2x2x1", "2x2x2", "2x2x4", "2x4x4")  # Below whole cubes of 4 x 4 x 4.


@dataclasses.dataclass(frozen=True)
class Hardware:
    """`chips` chips of a kind in `slices` equal parts with the network between; `chip` is None for a CPU."""

    name: str
    kind: str
    shape: tuple[int, ...]
    slices: int = 1

    @property
    def chip(self) -> chips.Chip | None:
        return chips.CHIPS.get(self.kind)

    @property
    def chips(self) -> int:
        return math.prod(self.shape) * self.slices

    @property
    def devices(self) -> int:
        return self.chips * (1 if self.chip is None else self.chip.devices)


def parse(name: str) -> Hardware:
    """KIND:SHAPE, of slices KIND:SHAPE*N: v5p:4x4x8, v6e:16x16*2, h100:64 (hosts of 8), cpu:8 (forced host devices).

    Raises UsageError for a kind or a shape that there is none of, with those nearest.
    """
    kind, _, rest = name.partition(":")
    if kind not in (*chips.CHIPS, "cpu"):
        raise unknown("hardware", kind, (*chips.CHIPS, "cpu"))
    shape, star, slices = rest.partition("*")
    sizes = shape.split("x")
    if not all(part.isdigit() and int(part) for part in (*sizes, *([slices] if star else []))):
        raise UsageError(f"--hardware={name}: give KIND:SHAPE, such as v5p:4x4x4, v6e:16x16*2, h100:64 or cpu:8")
    found = Hardware(name, kind, tuple(map(int, sizes)), int(slices) if star else 1)
    if kind in MOST_CHIPS:
        _check_torus(found, shape)
    elif len(sizes) > 1 or found.chip is None and found.slices > 1:
        raise UsageError(f"--hardware={name}: {kind} takes a number, such as {kind}:8")
    elif found.chip is not None and found.chips > found.chip.together and found.shape[0] % found.chip.together:
        host = found.chip.together
        below = found.chips // host * host
        raise UsageError(f"--hardware={name}: hosts have {host} of them: take {below} or {below + host}")
    return found


def _check_torus(hardware: Hardware, shape: str) -> None:
    most = MOST_CHIPS[hardware.kind]
    if chips.CHIPS[hardware.kind].torus_axes == 2:
        good, known = shape in FLAT, ", ".join(FLAT)
    else:
        cubes = all(n % 4 == 0 for n in hardware.shape) and list(hardware.shape) == sorted(hardware.shape)
        good = shape in SMALL or len(hardware.shape) == 3 and cubes and math.prod(hardware.shape) <= most
        known = f"{', '.join(SMALL)}, or three rising multiples of 4 of up to {most} chips, such as 4x4x8 and 8x8x16"
    if not good:
        raise UsageError(f"--hardware={hardware.name}: there is no topology {shape}; {hardware.kind} has {known}")


def describe(hardware: Hardware) -> list[jax.Device]:
    """Devices to compile for; those of a CPU are forced host devices, the others exist in name alone.

    Call it before any device is touched. Raises UsageError where the compiler's library is not installed.
    """
    with quiet.libraries():
        if hardware.chip is None:
            jax.config.update("jax_num_cpu_devices", hardware.devices)
            return jax.devices("cpu")
        return _tpus(hardware) if hardware.chip.torus_axes else _gpus(hardware)


def _tpus(hardware: Hardware) -> list[jax.Device]:
    from jax.experimental import topologies

    # Without them libtpu asks a metadata server about the TPU of this machine; and two processes may plan at once.
    os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "none")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    shape = "x".join(map(str, hardware.shape))
    try:
        found = topologies.get_topology_desc(f"{hardware.kind}:{shape}", "tpu", num_slices=hardware.slices)
    except Exception as error:  # What an absent libtpu raises differs between versions of jax.
        raise _missing("libtpu", error) from None
    return list(found.devices)


def _gpus(hardware: Hardware) -> list[jax.Device]:
    from jax.experimental import topologies

    assert hardware.chip is not None
    os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"
    hosts = max(1, hardware.shape[0] // hardware.chip.together)
    try:
        found = topologies.get_topology_desc(
            hardware.name,
            "cuda",
            target_config=_TARGETS[hardware.kind],
            topology=f"{hardware.slices}x{hosts}x{hardware.shape[0] // hosts}",
        )
    except KeyError:
        raise UsageError(f"--hardware={hardware.name}: the compiler knows {' and '.join(_TARGETS)} alone") from None
    except Exception as error:
        raise _missing("JAX's CUDA plugin", error) from None
    return list(found.devices)


def _missing(what: str, error: Exception) -> UsageError:
    return UsageError(f"{what} cannot compile here ({str(error).splitlines()[0][:200]}): pip install -e '.[plan]'")


# What XLA's GpuTargetConfig says of a chip, from NVIDIA's data sheet of Hopper and its CUDA programming guide, table of
# compute capability 9.0.
_HOPPER = """
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_core: 233472 shared_memory_per_block_optin: 232448
  core_count: 132 fpus_per_core: 128 block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: {rate:.0f} device_memory_size: {memory:.0f} l2_cache_size: 52428800 clock_rate_ghz: 1.98
  registers_per_core_limit: 65536 registers_per_block_limit: 65536 cuda_compute_capability {{ major: 9 }}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 8 }}
runtime_version {{ major: 12 minor: 9 }}
device_description_str: "NVIDIA {kind} 80GB HBM3"
"""
_TARGETS = {
    name: _HOPPER.format(kind=chips.CHIPS[name].kind, rate=chips.CHIPS[name].memory_rate, memory=memory)
    for name, memory in (("h100", chips.CHIPS["h100"].memory_bytes), ("h200", chips.CHIPS["h200"].memory_bytes))
}
