"""The random twins: the same key gives the same bits, and layers drawn from one seed start equal."""

import copy
import math
import os
import pickle
import subprocess
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from parity_tests.conftest import ROLLED
from parity_tests.standard import ulps
from probly_torch import random

SEEDS = (0, 1, 42, 2**31, 2**32 - 1)
FLOATS = ("float32", "float64", "float16", "bfloat16")
SHAPES = ((), (1,), (7,), (3, 0), (2, 3, 5))


def words(jax_key):
    return np.asarray(jax.random.key_data(jax_key)).astype(np.int64)


def assert_same(tensor, array):
    tensor = tensor.float() if tensor.dtype == torch.bfloat16 else tensor
    np.testing.assert_array_equal(tensor.numpy().astype(np.float64), np.asarray(array).astype(np.float64))


DRAWS = """
import hashlib, jax
key, shape = jax.random.key(7), (3, 41)
truncated_normal = lambda key, *rest: jax.random.truncated_normal(key, -2, 2, *rest)
draws = (jax.random.uniform, jax.random.normal, truncated_normal)
bits = [draw(key, shape, dtype).tobytes() for draw in draws for dtype in ("float32", "float64")]
digest = hashlib.sha256(b"".join(bits)).hexdigest()
"""


def test_draws_have_the_bits_that_users_see_without_the_flag_of_the_suite():
    flags = os.environ["XLA_FLAGS"]
    assert ROLLED in flags
    usual = os.environ | {"XLA_FLAGS": flags.replace(ROLLED, "").strip()}
    command = [sys.executable, "-c", f'import jax; jax.config.update("jax_enable_x64", True){DRAWS}print(digest)']
    here = {}
    exec(DRAWS, here)
    assert (
        subprocess.run(command, env=usual, capture_output=True, text=True, check=True).stdout.strip() == here["digest"]
    )


@pytest.mark.parametrize("seed", SEEDS)
def test_keys(seed):
    ours, theirs = random.key(seed), jax.random.key(seed)
    assert_same(ours, words(theirs))
    assert_same(random.split(ours), words(jax.random.split(theirs)))
    assert_same(random.split(ours, (2, 3)), words(jax.random.split(theirs, (2, 3))))
    for data in (0, 1, 2**32 - 1):
        assert_same(random.fold_in(ours, data), words(jax.random.fold_in(theirs, data)))
    many = jax.vmap(jax.random.fold_in, (None, 0))(theirs, jnp.arange(4))
    assert_same(random.fold_in(ours, torch.arange(4)), words(many))


@pytest.mark.parametrize("seed", SEEDS)
def test_bits(seed):
    for width in (8, 16, 32, 64):
        for shape in SHAPES:
            ours = random.bits(random.key(seed), shape, getattr(torch, f"uint{width}"))
            theirs = np.asarray(jax.random.bits(jax.random.key(seed), shape, f"uint{width}"))
            assert ours.numpy().dtype == theirs.dtype
            np.testing.assert_array_equal(ours.numpy(), theirs)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), data=st.integers(0, 2**32 - 1), size=st.sampled_from([1, 5, 64]))
def test_bits_of_any_key(seed, data, size):
    ours = random.bits(random.fold_in(random.key(seed), data), (size,))
    theirs = jax.random.bits(jax.random.fold_in(jax.random.key(seed), data), (size,), "uint32")
    np.testing.assert_array_equal(ours.numpy(), np.asarray(theirs))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("bounds", [(0.0, 1.0), (-1.0, 1.0), (-2.3, 1.7), (0.1, 0.7)])
def test_uniform(dtype, bounds):
    ours = random.uniform(random.key(3), (1000,), getattr(torch, dtype), *bounds)
    assert_same(ours, jax.random.uniform(jax.random.key(3), (1000,), dtype, *bounds))


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("mode", ["low", "high"])
def test_bernoulli(p, mode):
    for dtype in ("float32", "float64"):
        probability = torch.tensor(p, dtype=getattr(torch, dtype))
        ours = random.bernoulli(random.key(3), probability, (200,), mode)
        assert_same(ours, jax.random.bernoulli(jax.random.key(3), jnp.array(p, dtype), (200,), mode))


@pytest.mark.parametrize("size", [0, 1, 2, 5, 1000, 70_000])
def test_permutation_of_a_range(size):
    assert_same(random.permutation(random.key(3), size), jax.random.permutation(jax.random.key(3), size))


@pytest.mark.parametrize("axis", [0, 1, -1])
@pytest.mark.parametrize("independent", [False, True])
def test_permutation_of_an_array(axis, independent):
    x = np.arange(50).reshape(5, 2, 5)
    ours = random.permutation(random.key(3), torch.tensor(x), axis, independent)
    assert_same(ours, jax.random.permutation(jax.random.key(3), x, axis, independent))


def assert_draws_equal(ours, theirs):
    """float32 bit for bit; float64 to 2 ULP, but for the few where two correct logarithms round apart: 3 ULP."""
    distance = ulps(ours, theirs)
    assert distance.max() <= (0 if ours.dtype == np.float32 else 3)
    assert (distance > 2).mean() < 1e-5


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_normal_and_truncated_normal(dtype):
    size, ours, theirs = (1 << 18,), random.key(5), jax.random.key(5)
    torch_dtype = getattr(torch, dtype)
    assert_draws_equal(
        random.normal(ours, size, torch_dtype).numpy(), np.asarray(jax.random.normal(theirs, size, dtype))
    )
    for lower, upper, shape in ((-2.0, 2.0, size), (-1.0, 3.0, (1 << 12,)), (0.5, 4.0, (1 << 12,))):
        a = random.truncated_normal(ours, lower, upper, shape, torch_dtype).numpy()
        b = np.asarray(jax.random.truncated_normal(theirs, lower, upper, shape, dtype))
        assert_draws_equal(a, b)
        assert lower < a.min()
        assert a.max() < upper


def test_lecun_normal():
    ours = random.lecun_normal(random.key(3), (64, 32), torch.float32).numpy()
    theirs = np.asarray(nnx.initializers.lecun_normal()(jax.random.key(3), (64, 32), jnp.float32))
    assert_draws_equal(ours, theirs)


def test_default_dtypes_without_x64():
    with jax.enable_x64(False):
        assert_same(random.uniform(random.key(0), (9,)), jax.random.uniform(jax.random.key(0), (9,)))
        assert_same(random.bernoulli(random.key(0), 0.3, (9,)), jax.random.bernoulli(jax.random.key(0), 0.3, (9,)))
        assert_same(random.key(2**32 - 1), words(jax.random.key(2**32 - 1)))


def test_rngs_gives_the_keys_of_nnx():
    ours, theirs = random.Rngs(0, params=3), nnx.Rngs(0, params=3)
    assert isinstance(ours.params, random.RngStream)
    assert isinstance(theirs.params, nnx.RngStream)
    assert list(ours) == list(theirs) == ["params", "default"]
    assert len(ours) == 2
    assert "params" in ours
    assert "dropout" not in ours
    for _ in range(3):
        for name in ("params", "dropout", "default"):
            assert_same(ours[name](), words(theirs[name]()))
        assert_same(ours(), words(theirs()))
    assert int(ours.params.count) == int(theirs.params.count[...]) == 3
    for make in (lambda r: r.fork(), lambda r: r.split(4), lambda r: r.split((2, 2))):
        for (name, stream), (other, twin) in zip(make(ours).items(), make(theirs).items(), strict=True):
            assert name == other
            assert_same(stream.key, words(twin.key[...]))
            assert_same(stream.count, twin.count[...])
    with pytest.warns(DeprecationWarning, match="fork"):
        twin = theirs.fork(split=3)
    assert_same(ours.fork(split=3).params.key, words(twin.params.key[...]))
    assert_same(ours(), words(theirs()))


def test_a_split_stream_gives_each_lane_its_keys():
    ours, theirs = random.Rngs(0).split(3), nnx.Rngs(0).split(3)
    lanes = nnx.vmap(lambda rngs: jax.random.key_data(rngs.params()))
    for _ in range(2):
        assert_same(ours.params(), lanes(theirs))


def test_rngs_is_copied_pickled_and_moved_with_its_counts():
    rngs = random.Rngs(0, params=1)
    rngs.params()
    expected = copy.deepcopy(rngs).params().tolist()
    assert pickle.loads(pickle.dumps(rngs)).params().tolist() == expected
    assert copy.deepcopy(rngs).to("meta").params().device.type == "meta"
    assert rngs.params().tolist() == expected


# torch.compile as far as its C++ compiler, which takes some 20 s for each draw.
compiled = partial(torch.compile, fullgraph=True, backend="aot_eager")


def test_compiled_draws_and_counts():
    def draw(rngs):
        return rngs.params()

    rngs, twin = random.Rngs(0), random.Rngs(0)
    step = compiled(draw)
    for _ in range(2):
        assert torch.equal(draw(rngs), step(twin))
    assert int(twin.default.count) == 2


@pytest.mark.parametrize("name", ["bits", "uniform", "normal"])
def test_compiled_draws_are_those_of_eager(name):
    draw = getattr(random, name)
    ours, theirs = (each(random.key(3), (64,)).to(torch.float64) for each in (compiled(draw), draw))
    assert torch.equal(ours, theirs)


def test_draws_are_distributed_as_named():
    values = random.normal(random.key(0), (100_000,), torch.float64)
    standard_error = 1 / math.sqrt(len(values))
    assert abs(values.mean()) < 5 * standard_error
    assert abs(values.var() - 1) < 5 * math.sqrt(2) * standard_error
    assert sorted(random.permutation(random.key(0), 50).tolist()) == list(range(50))


@pytest.mark.parametrize(
    ("call", "error", "sentence"),
    [
        (lambda: random.key(2**32), ValueError, "Pass 0, its low 32 bits"),
        (lambda: random.key(-1), ValueError, "Pass 4294967295"),
        (lambda: random.key(1.5), TypeError, "got float. Pass a seed"),
        (lambda: random.normal(0), TypeError, "Make one: key(0)"),
        (lambda: random.normal(random.split(random.key(0))), TypeError, "of shape (2, 2)"),
        (lambda: random.uniform(random.key(0), (), torch.int32), TypeError, "Pass dtype=torch.float32"),
        (lambda: random.bits(random.key(0), (), torch.int32), TypeError, "Pass dtype=torch.uint32"),
        (lambda: random.fold_in(random.key(0), -1), ValueError, "Pass data % 2**32"),
        (lambda: random.bernoulli(random.key(0), 1), TypeError, "Pass a float"),
        (lambda: random.permutation(random.key(0), 2.5), TypeError, "Pass x=10"),
        (lambda: random.truncated_normal(random.key(0), 2.0, -2.0), ValueError, "lower < upper"),
        (lambda: random.Rngs(params=0).dropout(), AttributeError, "Build it with Rngs(0)"),
    ],
)
def test_bad_input(call, error, sentence):
    with pytest.raises(error) as raised:
        call()
    assert sentence in str(raised.value)
