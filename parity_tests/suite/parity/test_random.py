"""The random twins: the same key gives the same bits, and layers drawn from one seed start equal."""

import copy
import math
import pickle
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from probly_torch import random
from probly_torch.random import _instead

SEEDS = (0, 1, 42, 2**31, 2**32 - 1)
SHAPES = ((), (1,), (7,), (3, 0), (2, 3, 5))


def words(jax_key):
    return np.asarray(jax.random.key_data(jax_key)).astype(np.int64)


def assert_same(tensor, array):
    tensor = tensor.float() if tensor.dtype == torch.bfloat16 else tensor
    np.testing.assert_array_equal(tensor.numpy().astype(np.float64), np.asarray(array).astype(np.float64))


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


@pytest.mark.parametrize("size", [0, 1, 2, 5, 1000, 70_000])
def test_permutation_of_a_range(size):
    assert_same(random.permutation(random.key(3), size), jax.random.permutation(jax.random.key(3), size))


@pytest.mark.parametrize("axis", [0, 1, -1])
@pytest.mark.parametrize("independent", [False, True])
def test_permutation_of_an_array(axis, independent):
    x = np.arange(50).reshape(5, 2, 5)
    ours = random.permutation(random.key(3), torch.tensor(x), axis, independent)
    assert_same(ours, jax.random.permutation(jax.random.key(3), x, axis, independent))


@pytest.mark.parametrize("bounds", [(-1.5, 1.5), (0.0, 3.0)])
def test_bounds_of_a_truncated_normal_broadcast_and_are_kept(bounds):
    lower, upper = bounds[0], bounds[1] + np.arange(3.0)[:, None]
    ours = random.truncated_normal(random.key(1), lower, torch.tensor(upper), (3, 500), torch.float32)
    assert_same(ours, jax.random.truncated_normal(jax.random.key(1), lower, upper, (3, 500), "float32"))
    assert lower <= ours.min()
    assert (ours.amax(1) < torch.tensor(upper[:, 0])).all()
    assert random.truncated_normal(random.key(1), lower, torch.tensor(upper)).shape == (3, 1)


def test_uniform_takes_bounds_that_broadcast():
    low, high = np.arange(3.0), 4 + np.arange(2.0)[:, None]
    ours = random.uniform(random.key(1), (2, 3), torch.float32, torch.tensor(low), torch.tensor(high))
    assert_same(ours, jax.random.uniform(jax.random.key(1), (2, 3), "float32", low, high))


def test_integers():
    key, twin = random.key(9), jax.random.key(9)
    for name in ("int8", "uint8", "int16", "int32", "uint32", "int64"):
        least, most = np.iinfo(name).min, np.iinfo(name).max
        halves = [(least // 2, most // 2)] if name == "int64" else [(least, most), (least, most + 1)]
        for low, high in [(0, 1), (5, 105), (0, most), (max(least, -3), 2), *halves]:
            ours = random.randint(key, (300,), low, high, getattr(torch, name)).numpy()
            assert ours.dtype == name
            np.testing.assert_array_equal(ours, jax.random.randint(twin, (300,), low, high, name))
    low, high = np.arange(-3, 0)[None, :, None], np.arange(1, 6)[None, None]
    ours = random.randint(key, (2, 3, 5), torch.tensor(low), torch.tensor(high))
    assert_same(ours, jax.random.randint(twin, (2, 3, 5), low, high, "int32"))


def test_choices():
    key, twin = random.key(2), jax.random.key(2)
    x, p = np.arange(24.0).reshape(2, 4, 3), np.array([0.1, 0.0, 0.6, 0.3])
    ours, weights = torch.tensor(x), torch.tensor(p)
    with jax.enable_x64(False):  # JAX draws 64 bits with it
        assert_same(random.choice(key, 6, (5, 3)), jax.random.choice(twin, 6, (5, 3)))
    assert_same(random.choice(key, 6, 4, False), jax.random.choice(twin, 6, (4,), False))
    assert_same(random.choice(key, ours, (2, 2), False, axis=1), jax.random.choice(twin, x, (2, 2), False, axis=1))
    assert_same(random.choice(key, ours, (9,), p=weights, axis=-2), jax.random.choice(twin, x, (9,), p=p, axis=-2))
    for mode in ("low", "high"):
        assert_same(
            random.choice(key, 4, 3, False, weights, 0, mode), jax.random.choice(twin, 4, (3,), False, p, 0, mode)
        )
    assert random.choice(key, 0, 0).shape == (0,)


@pytest.mark.parametrize(
    ("axis", "shape", "replace"), [(1, None, True), (-1, (5, 2, 3), True), (0, (3, 4), True), (1, (3, 2, 4), False)]
)
def test_classes(axis, shape, replace):
    logits = np.random.default_rng(0).normal(0, 3, (2, 3, 4))
    ours = random.categorical(random.key(2), torch.tensor(logits), axis, shape, replace)
    assert_same(ours, jax.random.categorical(jax.random.key(2), logits, axis, shape, replace))


def test_default_dtypes_without_x64():
    with jax.enable_x64(False):
        assert_same(random.randint(random.key(0), (9,), 0, 70), jax.random.randint(jax.random.key(0), (9,), 0, 70))
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


DRAWN = {
    "bits": ((), "uint32"),
    "uniform": ((3,), "float32"),
    "normal": ((3,), "float32"),
    "truncated_normal": (-1.0, 2.0, (3,), "float32"),
    "bernoulli": (0.5, (3,)),
    "categorical": (np.arange(4, dtype="float32"),),
    "randint": ((3,), 0, 9, "int32"),
    "choice": (5, (3,), False),
    "permutation": (5,),
}


@pytest.mark.parametrize("of", [lambda rngs: rngs, lambda rngs: rngs.params, lambda rngs: rngs["dropout"]])
def test_rngs_and_their_streams_draw(of):
    ours, theirs = of(random.Rngs(0, params=3)), of(nnx.Rngs(0, params=3))
    for name, arguments in DRAWN.items():
        with jax.enable_x64(False):  # with it, a float is of 64 bits in JAX
            twin = getattr(theirs, name)(*arguments)
        arguments = [getattr(torch, a) if isinstance(a, str) else a for a in arguments]
        arguments = [torch.tensor(a) if isinstance(a, np.ndarray) else a for a in arguments]
        assert_same(getattr(ours, name)(*arguments), twin)


def test_every_name_of_nnx_draws_the_same_or_says_what_to_write():
    names = {n for n in dir(nnx.Rngs) if not n.startswith("_")}
    assert names == {*DRAWN, *_instead.INSTEAD, "split", "fork", "items"}
    for name, instead in _instead.INSTEAD.items():
        rngs = random.Rngs(0)
        for each in (rngs, rngs.params):
            with pytest.raises(AttributeError, match=re.escape(instead)):
                getattr(each, name)
        code = instead.removeprefix("Write ")
        made = eval(code, {"torch": torch, "rngs": rngs, "numpy": np, "Rngs": random.Rngs})
        assert isinstance(made, random.Rngs) or made.numel() > 1, code
        assert_same(random.Rngs(0)[name](), words(nnx.Rngs(0)[name]()))
        assert_same(getattr(random.Rngs(**{name: 1}), name)(), words(nnx.Rngs(1)()))  # a stream of this name


def test_rngs_split_by_name():
    ours, theirs = random.Rngs(0, params=1, dropout=2), nnx.Rngs(0, params=1, dropout=2)
    sizes = {"params": 3, "dropout": None, ...: (2, 2)}
    for (name, stream), (other, twin) in zip(ours.split(sizes).items(), theirs.split(sizes).items(), strict=True):
        assert name == other
        assert_same(stream.key, words(twin.key[...]))
        assert_same(stream.count, twin.count[...])
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


def test_attributes_that_a_stream_lacks():
    with pytest.raises(AttributeError, match="no attribute 'dropout'"):
        random.Rngs(params=0).params.dropout()
