"""Eight fake CPU devices, strict shapes, and matmuls at full precision, set before jax starts."""

import os
import pathlib

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_default_matmul_precision", "highest")


@pytest.fixture
def shared_data():
    """The folder of real data sets beside the checkout (or at LM_SHARED_DATA); the test skips without it."""
    default = pathlib.Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = pathlib.Path(os.environ.get("LM_SHARED_DATA", default))
    if not folder.is_dir():
        pytest.skip("no folder of shared data")
    return folder
