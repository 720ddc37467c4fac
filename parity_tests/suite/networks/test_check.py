"""Members compute among others what they compute alone; layers of a BatchEnsemble that prevent it are shared."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from torch import nn

import probly_flax as pf
import probly_torch as pt
from parity_tests.kit.trees import jax_of
from parity_tests.standard import assert_close

RANDOM = np.random.default_rng(0)
X = RANDOM.standard_normal((4, 8)).astype("float32")


def tokens(length):
    return RANDOM.integers(0, 10, (2, length))


class TorchPositions(nn.Module):
    """Adds a table of positions, which has no batch."""

    def __init__(self):
        super().__init__()
        self.words, self.positions, self.head = nn.Embedding(10, 8), nn.Embedding(7, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.words(x) + self.positions(torch.arange(x.shape[1])))


class FlaxPositions(nnx.Module):
    def __init__(self, rngs):
        self.words, self.positions = nnx.Embed(10, 8, rngs=rngs), nnx.Embed(7, 8, rngs=rngs)
        self.head = nnx.Linear(8, 3, rngs=rngs)

    def __call__(self, x):
        return self.head(self.words(x) + self.positions(jnp.arange(x.shape[1]))[None])


class TorchPast(nn.Module):
    """Reads a weight past its layer."""

    def __init__(self):
        super().__init__()
        self.qkv, self.head = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.head(nn.functional.linear(x, self.qkv.weight))


class TorchPastBoth(TorchPast):
    """Reads the bias too, whose members do not fit."""

    def forward(self, x):
        return self.head(nn.functional.linear(x, self.qkv.weight) * self.qkv.bias.view(8))


class FlaxPast(nnx.Module):
    def __init__(self, rngs):
        self.qkv, self.head = nnx.Linear(8, 8, rngs=rngs), nnx.Linear(8, 3, rngs=rngs)

    def __call__(self, x):
        return self.head(x @ self.qkv.kernel[...])


class FlaxPastBoth(FlaxPast):
    def __call__(self, x):
        return self.head(x @ self.qkv.kernel[...] + self.qkv.bias[...].reshape(1, 8))


PAST = "it is not called, and its weights may be read past it"
OTHER = "its rows do not follow the batch"
CASES = {  # the networks, an input, and the layer that has to be shared
    "positions": (TorchPositions, FlaxPositions, tokens(6), "positions", OTHER),
    "positions of a length that does not divide": (TorchPositions, FlaxPositions, tokens(7), "positions", OTHER),
    "a weight read past its layer": (TorchPast, FlaxPast, X, "qkv", PAST),
    "a bias read past its layer, of another shape": (TorchPastBoth, FlaxPastBoth, X, "qkv", PAST),
}


def both(torch_class, flax_class, x, *_):
    """Yields the package, the network and the input of each framework."""
    yield pt, torch_class(), torch.from_numpy(x)
    yield pf, flax_class(nnx.Rngs(0)), jax_of(x)


@pytest.mark.parametrize("name", CASES)
def test_layers_that_members_cannot_have_are_named_and_shared(name):
    *_, path, reason = CASES[name]
    for package, network, x in both(*CASES[name]):
        with pytest.raises(ValueError, match=f"{path}: {reason}. Pass exclude=\\['{path}'\\]"):
            package.batchensemble(network, 3).check(x)
        rngs = package.Rngs(0)
        model = package.batchensemble(network, 3, example_input=x, rngs=rngs)
        assert {row.path: row.reason for row in model.report.rows if row.action == "shared"} == {path: reason}
        assert str(model.report).endswith(f"{path} is shared: {reason}")
        y = model(x)
        for i, member in enumerate(model):
            assert_close(numpy(y[i]), numpy(member(x)), "float32")
        excluded = package.batchensemble(network, 3, exclude=path)  # draws the same
        np.testing.assert_array_equal(numpy(excluded(x)), numpy(y))
        excluded.check(x)
        assert int(rngs.params.count[...]) == int(2 * (len(model.report.rows) - 1))


def numpy(y):
    return y.detach().numpy() if isinstance(y, torch.Tensor) else np.asarray(y)


@pytest.mark.parametrize("wrap", ["batchensemble", "ensemble"])
def test_networks_that_are_right_pass_with_statistics_dropout_and_several_inputs(wrap):
    class TorchTwo(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.norm, self.b = nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)

        def forward(self, x, *, scale):
            return {"y": self.b(nn.functional.dropout(self.norm(self.a(x)) * scale, training=self.training))}

    class FlaxTwo(nnx.Module):
        def __init__(self, rngs):
            self.a, self.b = nnx.Linear(8, 8, rngs=rngs), nnx.Linear(8, 3, rngs=rngs)
            self.norm, self.dropout = nnx.BatchNorm(8, rngs=rngs), nnx.Dropout(0.5, rngs=rngs)

        def __call__(self, x, *, scale):
            return {"y": self.b(self.dropout(self.norm(self.a(x)) * scale))}

    for package, network, x in both(TorchTwo, FlaxTwo, X):
        model = getattr(package, wrap)(network, 3)
        before = package.to_arrays(model if wrap == "ensemble" else model.network)
        model.check(x, scale=x)
        after = package.to_arrays(model if wrap == "ensemble" else model.network)
        assert all((before[name] == after[name]).all() for name in before)  # statistics too


def test_weights_read_past_layers_that_are_called_are_refused():
    class TorchTied(nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.inner = nn.Embedding(10, 8), nn.Linear(8, 8)

        def forward(self, x):
            return nn.functional.linear(self.inner(self.words(x)), self.words.weight)

    class FlaxTied(nnx.Module):
        def __init__(self, rngs):
            self.words, self.inner = nnx.Embed(10, 8, rngs=rngs), nnx.Linear(8, 8, rngs=rngs)

        def __call__(self, x):
            return self.inner(self.words(x)) @ self.words.embedding[...].T

    for package, network, x in both(TorchTied, FlaxTied, tokens(6)):
        rngs = package.Rngs(0)
        with pytest.raises(ValueError, match=r"got member 0, .* call ensemble\(network, 3\)\.$"):
            package.batchensemble(network, 3, example_input=x, rngs=rngs)
        assert int(rngs.params.count[...]) == 0
        package.ensemble(network, 3).check(x)


def test_what_a_member_alone_refuses_is_the_callers_error():
    for package, network, x in both(TorchPast, FlaxPast, X[:, :5]):
        with pytest.raises((RuntimeError, TypeError), match=r"8|shape"):
            package.batchensemble(network, 3, example_input=x)


def test_a_network_that_cannot_run_in_float64_is_compared_in_its_own_dtype():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, 3)

        def forward(self, x):
            return self.linear(x) @ torch.eye(3)

    x = torch.randn(4, 3)
    pt.batchensemble(Experts(), 3, example_input=x).check(x)
    pt.Ensemble([Experts() for _ in range(3)]).check(x)
    with pytest.raises(RuntimeError, match="multiplied"):
        pt.Ensemble([Experts() for _ in range(3)]).check(torch.randn(4, 2))
