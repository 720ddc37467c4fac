"""The same bits on every machine: under the instructions of other CPUs, and with another number of threads.

A green run on one CPU could hide that a draw rests on how this CPU rounds.
"""

import os
import subprocess
import sys
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from parity_tests.standard import ulps
from parity_tests.suite.parity import draws, test_parity
from probly_torch import random

# The instructions that torch and XLA are allowed. XLA has no fused multiply-add below AVX2, and arithmetic of float16
# with AVX512-FP16 only, which rounds a product and a sum once.
TORCH = {"avx2": {"ATEN_CPU_CAPABILITY": "avx2"}, "default": {"ATEN_CPU_CAPABILITY": "default"}}
FLAX = {"all": {"XLA_FLAGS": ""}, "avx2": {"XLA_FLAGS": "--xla_cpu_max_isa=AVX2"}}
HALF = sys.platform == "linux" and "avx512_fp16" in Path("/proc/cpuinfo").read_text()
SIZE = 1000


def assert_same(ours, theirs, of=lambda name: True):
    """Asserts equality bit for bit, except for float64's normal numbers.

    These agree to 2 ULP, and to 3 where two correct logarithms round apart.
    """
    assert ours.keys() == theirs.keys()
    distances = []
    for name in filter(of, ours):
        a, b = ours[name], theirs[name]
        assert (a.dtype, a.shape) == (b.dtype, b.shape), name
        if a.dtype == np.float64 and "uniform" not in name:
            distances.append(ulps(a, b).ravel())
            assert distances[-1].max() <= 3, name
        else:
            np.testing.assert_array_equal(a, b, err_msg=name)
    assert (np.concatenate(distances) > 2).mean() < 1e-5


def under(settings, framework, path):
    command = [sys.executable, "-m", "parity_tests.suite.parity.draws", framework, path]
    subprocess.run(command, env=os.environ | settings, check=True)
    return dict(np.load(path))


@pytest.fixture(scope="module")
def ours():
    return draws.torch_draws()


@pytest.mark.parametrize("instructions", FLAX)
def test_flax_draws_the_same(instructions, ours, tmp_path):
    theirs = under(FLAX[instructions], "flax", tmp_path / "draws.npz")
    assert_same(ours, theirs, lambda name: instructions == "avx2" or not HALF or "float16" not in name.split())


@pytest.mark.parametrize("instructions", TORCH)
def test_torch_draws_the_same(instructions, ours, tmp_path):
    theirs = under(TORCH[instructions], "torch", tmp_path / "draws.npz")
    assert ours.keys() == theirs.keys()
    for name in ours:
        np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)


@pytest.mark.parametrize("instructions", FLAX)
def test_what_is_exact_is_exact_in_the_programs_that_users_run(instructions):
    command = [sys.executable, "-m", "pytest", "-n0", "-p", "no:cacheprovider", "-k"]
    few = "test_exact and float32 and (BatchEnsemble or batch_each or E3) and not (Conv or Embed)"
    chosen = [few, Path(test_parity.__file__)]
    settings = FLAX[instructions] | TORCH["default"] | {"PLAIN_XLA": "1"}
    run = subprocess.run([*command, *chosen], env=os.environ | settings, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout


def test_half_precision_is_rounded_twice():
    """As XLA does it where the CPU has no arithmetic of float16: a product, then a sum."""
    drawn = random.uniform(random.key(3), SIZE, torch.float16, 0.1, 0.7)
    low, high = (torch.tensor(v, dtype=torch.float16) for v in (0.1, 0.7))
    unit = random.uniform(random.key(3), SIZE, torch.float16)
    expected = ((unit.double() * (high - low).double()).half().double() + low.double()).half()
    assert torch.equal(drawn, expected)
    assert not torch.equal(expected, (unit.double() * (high - low).double() + low.double()).half())


class OtherCPU(TorchDispatchMode):
    """Moves each floating result that IEEE 754 does not fix to one of its neighbours, as another CPU may round it."""

    FIXED: ClassVar[set[str]] = {  # among others, whose results are no floating numbers
        *("abs", "add", "add_", "clamp", "div", "maximum", "mul", "neg", "nextafter", "rsub", "sub"),
        *("cat", "clone", "constant_pad_nd", "copy_", "empty", "expand", "fill_", "full", "full_like", "lift_fresh"),
        *("reshape", "scalar_tensor", "select", "slice", "stack", "unsqueeze", "view", "where", "zeros_like"),
        *("_to_copy", "_unsafe_view"),
    }

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = func.__name__.split(".")[0]
        if name in self.FIXED or not isinstance(result, torch.Tensor) or not result.is_floating_point():
            return result
        up = torch.arange(result.numel(), device=result.device).reshape(result.shape) % 2 == 0
        return torch.nextafter(result, torch.where(up, torch.inf, -torch.inf).to(result.dtype))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_no_draw_rests_on_how_a_cpu_rounds(dtype):
    """Whatever CPU this runs on, and however it rounds a square root or a logarithm."""
    dtype = getattr(torch, dtype)
    key, weights = random.key(3), torch.rand(50, dtype=dtype)

    def drawn():
        yield random.uniform(key, 500, dtype, -0.3, 0.7)
        yield random.normal(key, 500, dtype)
        yield random.truncated_normal(key, -0.3, 2.7, 500, dtype)
        yield from (random.lecun_normal(key, (fan_in, 1), dtype) for fan_in in (3, 5, 20, 100))
        yield random.choice(key, 50, (40,), True, weights)
        yield random.choice(key, 50, (40,), False, weights)
        yield random.categorical(key, weights.reshape(5, 10), shape=(20, 5))
        yield random.bernoulli(key, weights)

    here = list(drawn())
    with OtherCPU():
        there = list(drawn())
    assert all(torch.equal(a, b) for a, b in zip(here, there, strict=True))


def test_another_cpu_rounds_otherwise():
    x = torch.linspace(0.1, 3, 50)
    for function in (torch.sqrt, torch.log, torch.erf, torch.rsqrt):
        expected = function(x)
        with OtherCPU():
            assert not (function(x) == expected).any()
