"""Accelerators by name: peaks, memory and links from their makers' data sheets, and the rates that programs reach."""

import dataclasses

import jax


@dataclasses.dataclass(frozen=True)
class Chip:
    """Rates are in FLOP/s and bytes/s a chip, memory in bytes; a chip may be several devices of jax.

    `axis_rate` is that of one axis of the torus, both directions together, of which there are `torus_axes`; with none
    of them, of a switch that joins the `together` chips of a host (NVLink, each way). `network_rate` is one chip's
    share of the network beyond. A message takes `hop_s` seconds from a chip to its neighbour in a torus, or from a host
    to the next. `products` and `attention` are the shares of the peak that large matrix products and a
    fused kernel of attention reach: those with which published runs come out, see LOG.md.
    """

    kind: str  # Found in jax's device_kind.
    flops: float
    memory_bytes: float
    memory_rate: float
    axis_rate: float
    network_rate: float
    torus_axes: int
    products: float
    attention: float
    together: int = 8
    devices: int = 1
    hop_s: float = 1e-6


# docs.cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e,tpu7x}; jax-ml/scaling-book tpus.md for links; NVIDIA's data sheets.
HOST_HOP_S = 6e-6  # Of InfiniBand through NCCL, about; it is not published with a number.
CHIPS = {
    "v4": Chip("TPU v4", 275e12, 32e9, 1.2e12, 90e9, 6.25e9, 3, 0.80, 0.45),
    "v5e": Chip("TPU v5 lite", 197e12, 16e9, 0.819e12, 90e9, 3.1e9, 2, 0.80, 0.45),
    "v5p": Chip("TPU v5", 459e12, 95e9, 2.765e12, 180e9, 6.25e9, 3, 0.88, 0.50),
    "v6e": Chip("TPU v6", 918e12, 32e9, 1.638e12, 180e9, 12.5e9, 2, 0.74, 0.40),
    "tpu7x": Chip("TPU7x", 2307e12, 192e9, 7.38e12, 180e9, 12.5e9, 3, 0.76, 0.45, devices=2),
    "a100": Chip("A100", 312e12, 80e9, 2.0e12, 300e9, 25e9, 0, 0.80, 0.55, hop_s=HOST_HOP_S),
    "h100": Chip("H100", 989e12, 80e9, 3.35e12, 450e9, 50e9, 0, 0.70, 0.50, hop_s=HOST_HOP_S),
    "h200": Chip("H200", 989e12, 141e9, 4.8e12, 450e9, 50e9, 0, 0.70, 0.50, hop_s=HOST_HOP_S),
    "b200": Chip("B200", 2250e12, 180e9, 8.0e12, 900e9, 50e9, 0, 0.70, 0.50, hop_s=HOST_HOP_S),
}


def of_device(device: jax.Device) -> Chip | None:
    """The chip that a device is, or is a part of; None for a CPU and for what the table lacks."""
    found = [chip for chip in CHIPS.values() if chip.kind in device.device_kind]
    return max(found, key=lambda chip: len(chip.kind), default=None)
