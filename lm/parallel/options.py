"""Options of XLA that every program is compiled with, by platform."""

import jax

# TPU: with matrix products that gather their operands piece by piece, which it prefers from this many MiB on, gathers
# of parameters cannot hide behind other products, and programs take twice as long to compile.
OPTIONS: dict[str, dict[str, str]] = {"tpu": {"xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000"}}


def of_mesh(mesh: jax.sharding.Mesh) -> dict[str, str] | None:
    """For jax.jit's `compiler_options`; None where a platform has none."""
    return OPTIONS.get(mesh.devices.flat[0].platform)
