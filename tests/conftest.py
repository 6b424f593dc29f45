"""Eight fake CPU devices, strict shapes, and matmuls at full precision, set before jax starts."""

import os
import pathlib

os.environ["JAX_PLATFORMS"] = "cpu"
# Compiling is most of the time of small tests, and fast code gains them nothing.
COMPILE_FAST = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count=8 {COMPILE_FAST}"

# More devices than cores wait in collectives for each other, and need threads to do it: see lm/main/devices.py.
os.environ["PJRT_NPROC"] = "32"

import jax  # noqa: E402
import pytest  # noqa: E402


def pytest_configure(config):
    """XLA:CPU's older emitters of fusions, which jax 0.11 lost, compile the quick tests in two thirds of the time."""
    if config.option.markexpr == "not slow" and jax.__version_info__ < (0, 11):
        os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"


jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_default_matmul_precision", "highest")
jax.config.update("jax_cpu_enable_async_dispatch", False)  # As the verbs have it: see lm/main/devices.py.


MOST_MAPPINGS = 20_000  # Linux allows a process 65,530; XLA aborts where it gets no further one.


@pytest.fixture(autouse=True, scope="module")
def forgotten_programs():
    """Compiled programs take memory mappings for as long as jax keeps them: it forgets them in time."""
    yield
    maps = pathlib.Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > MOST_MAPPINGS:
        jax.clear_caches()


@pytest.fixture
def shared_data():
    """The folder of real data sets beside the checkout (or at LM_SHARED_DATA); the test skips without it."""
    default = pathlib.Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = pathlib.Path(os.environ.get("LM_SHARED_DATA", default))
    if not folder.is_dir():
        pytest.skip("no folder of shared data")
    return folder
