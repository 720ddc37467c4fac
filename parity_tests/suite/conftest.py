"""Settings that every comparison needs: float64 in JAX, one thread and one seed in torch, no silent promotion."""

import os
import tempfile
from importlib.metadata import version

import jax
import pytest
import torch

CACHE = "JAX_COMPILATION_CACHE_DIR"
# Most of the suite's time is XLA's, compiling small programs that run once. These flags halve it: no unrolling of the
# short loops of small arrays, and the older of two ways to write the code of an operation, which jaxlib 0.11 no longer
# has. test_machines.py runs draws and the exact tier without them; PLAIN_XLA=1 pytest runs everything so.
FLAGS = ["--xla_backend_extra_options=xla_cpu_disable_loop_unrolling=true"]
if version("jaxlib").startswith("0.10."):
    FLAGS.append("--xla_cpu_use_fusion_emitters=false")


def pytest_configure(config):
    """Keeps compiled programs in pytest's cache, for workers, subprocesses and later runs.

    Tests compile many equal programs.
    """
    jax.config.update("jax_num_cpu_devices", 8)  # for sharding
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # of subprocesses: more threads than cores wait for one another
    if "PLAIN_XLA" not in os.environ:
        flags = os.environ.get("XLA_FLAGS", "").split()
        os.environ["XLA_FLAGS"] = " ".join([*flags, *(flag for flag in FLAGS if flag not in flags)])
    if CACHE not in os.environ:
        os.environ[CACHE] = str(config.cache.mkdir("jax") if hasattr(config, "cache") else tempfile.mkdtemp())
    for option, value in (("MIN_COMPILE_TIME_SECS", "0"), ("MIN_ENTRY_SIZE_BYTES", "-1")):
        os.environ.setdefault(f"JAX_PERSISTENT_CACHE_{option}", value)
    jax.config.update("jax_compilation_cache_dir", os.environ[CACHE])
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def pytest_terminal_summary(terminalreporter):
    """Reports the share of the planted faults that the suite sees. test_faults.py plants each in a test of its own."""
    seen = {}
    for report in (r for outcome in ("passed", "failed", "error") for r in terminalreporter.getreports(outcome)):
        module, _, test = report.nodeid.rpartition("::")
        if module.endswith("test_faults.py") and "_sees[" in test:
            name = test.partition("[")[2]
            seen[name] = report.passed and seen.get(name, True)
    if seen:
        terminalreporter.write_line(f"planted faults: {sum(seen.values())} of {len(seen)} seen")


@pytest.fixture(autouse=True)
def _comparable():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    assert torch.get_float32_matmul_precision() == "highest"
    with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _runs_what_it_compares(request):
    """Asserts that a test which compares public functions, by the table in compared.py, runs them."""
    from parity_tests.suite.parity.compared import TESTS, calls, name_of_test

    expected = TESTS.get(name_of_test(request.node))
    if expected is None:
        yield
        return
    with calls() as called:
        yield
    assert not expected - called, "these did not run in the test that compares them, see compared.py"


@pytest.fixture
def four_devices():
    """Sets a mesh of data and model, two devices each, for sharding."""
    cpus, axis_types = jax.devices("cpu"), (jax.sharding.AxisType.Auto,) * 2
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=axis_types, devices=cpus[:4])
    with jax.default_device(cpus[0]), jax.set_mesh(mesh):
        yield
