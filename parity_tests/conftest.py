"""Settings that every comparison needs: float64 in JAX, one thread and one seed in torch, no silent promotion."""

import os
import shutil
import tempfile

import jax
import pytest
import torch

CACHE = "PARITY_TESTS_CACHE"


def pytest_configure(config):
    """Tests compile many equal programs: JAX keeps them in a folder that the workers of a run share."""
    config.pluginmanager.import_plugin("parity_tests.plugin")  # where it is not installed
    jax.config.update("jax_num_cpu_devices", 8)  # for sharding
    if CACHE not in os.environ:
        os.environ[CACHE] = tempfile.mkdtemp()
    jax.config.update("jax_compilation_cache_dir", os.environ[CACHE])
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def pytest_unconfigure(config):
    if not hasattr(config, "workerinput"):
        shutil.rmtree(os.environ.pop(CACHE), ignore_errors=True)


@pytest.fixture(autouse=True)
def _comparable():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    assert torch.get_float32_matmul_precision() == "highest"
    with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield
    torch.set_num_threads(threads)


@pytest.fixture
def four_devices():
    """A mesh of data and model, two devices each, for sharding."""
    cpus, axis_types = jax.devices("cpu"), (jax.sharding.AxisType.Auto,) * 2
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=axis_types, devices=cpus[:4])
    with jax.default_device(cpus[0]), jax.set_mesh(mesh):
        yield
