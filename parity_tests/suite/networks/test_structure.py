"""Members are compared as objects: what one of them does by itself, it does in the ensemble; or it is refused."""

import re
import weakref
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from torch import nn

import probly_flax as pf
import probly_torch as pt
from parity_tests.kit.trees import jax_of

X = np.random.default_rng(0).standard_normal((4, 3)).astype("float32")


class TorchNet(nn.Module):
    def __init__(self, **attributes):
        super().__init__()
        self.linear = nn.Linear(3, 3)
        vars(self).update(attributes)

    def forward(self, x):
        return self.linear(x)


class FlaxNet(nnx.Module):
    def __init__(self, **attributes):
        self.linear = nnx.Linear(3, 3, rngs=nnx.Rngs(0))
        vars(self).update(attributes)

    def __call__(self, x):
        return self.linear(x)


class Slots:
    __slots__ = ("k",)

    def __init__(self, k):
        self.k = k

    def method(self, x):
        return self.k * x


def times(k):
    return lambda x: k * x


def of_global(k):
    scope = {"k": k}
    exec("def f(x):\n    return k * x", scope)
    return scope["f"]


# Attributes by a number: equal for equal numbers, whatever their text says.
ATTRIBUTES = {
    "private": lambda k: k,
    "array": lambda k: Slots(np.full(2, k)),
    "closure": times,
    "global": of_global,
    "default": lambda k: lambda x, k=k: k * x,
    "partial": lambda k: partial(max, k, key=times(k)),
    "method": lambda k: Slots(k).method,
    "slots": Slots,
    "dict": lambda k: {"a": [1, {"b": k}]},
    "order": lambda k: dict.fromkeys(("a", "b") if k == 1 else ("b", "a")),
    "class": lambda k: type("Config", (), {"k": k})(),
    "property": lambda k: type("Config", (), {"k": property(lambda self: k)}),
}


@pytest.mark.parametrize("net", [TorchNet, FlaxNet])
@pytest.mark.parametrize("name", ATTRIBUTES)
def test_private_attributes_and_code_are_compared(name, net):
    make = ATTRIBUTES[name]
    package = pt if net is TorchNet else pf
    package.Ensemble([net(_own=make(1)), net(_own=make(1)), net(_own=make(1))])
    with pytest.raises(
        ValueError, match=r"got member 0, where _own.* is .*, and member 2, where it is .*\. Build them"
    ):
        package.Ensemble([net(_own=make(1)), net(_own=make(1)), net(_own=make(2))])


def hooked(k):
    network = TorchNet()
    network.linear.register_forward_hook(lambda module, args, y: k * y)
    return network


def patched(k):
    network = TorchNet()
    network.forward = partial(scaled, network, k)
    return network


def scaled(network, k, x):
    return k * network.linear(x)


def defined_again(k):
    """Returns a network of a class that is defined anew, as a cell of a notebook that is run twice does."""
    scope = {"TorchNet": TorchNet}
    exec(f"class Net(TorchNet):\n    def forward(self, x):\n        return {k} * self.linear(x)", scope)
    return scope["Net"]()


def with_extra_state(k):
    class Net(TorchNet):
        def get_extra_state(self):
            return self._k

    return Net(_k=k)


def frozen(k):
    network = TorchNet()
    network.linear.weight.requires_grad_(k == 1)
    return network


def tied(k):
    network = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    if k == 1:
        network[1].weight = network[0].weight
    return network


def untied(k):
    return tied(3 - k)


def normalised(k):
    return nn.utils.parametrizations.weight_norm(nn.Linear(3, 3), dim=k - 1)


OF_TORCH = (hooked, patched, defined_again, with_extra_state, frozen, tied, untied, normalised)


@pytest.mark.parametrize("make", OF_TORCH, ids=lambda make: make.__name__)
def test_hooks_classes_gradients_and_ties_are_compared(make):
    members = [make(1) for _ in range(3)]
    y = pt.Ensemble(members)(torch.from_numpy(X))
    torch.testing.assert_close(y, torch.stack([member(torch.from_numpy(X)) for member in members]))
    with pytest.raises(
        ValueError, match=r"expects members of one structure; got member 0, where .* Build them all alike"
    ):
        pt.Ensemble([*members, make(2)])


def test_functions_that_hold_layers_are_refused_since_copies_would_call_the_originals():
    def torch_net():
        network = TorchNet()
        network.forward = lambda x: 2 * network.linear(x)
        return network

    def flax_net():
        network = FlaxNet()
        vars(network)["_forward"] = lambda x: 2 * network.linear(x)
        return network

    for package, make in ((pt, torch_net), (pf, flax_net)):
        for call, base in ((package.Ensemble, [make(), make()]), (partial(package.ensemble, num_members=2), make())):
            with pytest.raises(ValueError, match=r"functions that hold no part of the network.*; got _?forward"):
                call(base)


def test_what_frameworks_note_of_a_run_is_not_compared():
    members = [TorchNet(_trainer=object(), _fabric=str(i)) for i in range(2)]
    assert len(pt.Ensemble(members)) == 2
    parents = [TorchNet() for _ in range(2)]
    for parent in parents:
        vars(parent)["_parent"] = weakref.ref(parent)
    assert len(pt.Ensemble(parents)) == 2


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_packed_weights_are_refused_and_the_advice_is_followed():
    def quantised():
        return torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(3, 2)), {nn.Linear})

    def scripted():
        return torch.jit.script(nn.Linear(3, 2))

    for make in (quantised, scripted):
        members = [make() for _ in range(2)]
        with pytest.raises(ValueError, match="expects members whose weights are parameters and buffers") as caught:
            pt.Ensemble(members)
        advice = re.search(r"one by one: (.*)\.$", str(caught.value))[1]
        assert eval(advice, {"torch": torch, "members": members, "x": torch.from_numpy(X)}).shape == (2, 4, 2)


class InPlace(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 2)

    def forward(self, x):
        return self.linear(x.mul_(2))


@pytest.mark.parametrize("chunk_size", [None, 1, 2])
@pytest.mark.parametrize("rows", [4, 6000])
@pytest.mark.parametrize("first", [InPlace, lambda: nn.Sequential(nn.LeakyReLU(inplace=True), nn.Linear(3, 2))])
def test_members_get_the_inputs_that_the_ensemble_was_given(first, rows, chunk_size):
    """Runs members in a loop and in chunks too, where the first would change the inputs of the others."""
    members = [first() for _ in range(3)]
    model = pt.Ensemble(members, chunk_size=chunk_size)
    x = torch.randn(rows, 3)
    expected = torch.stack([member(x.clone()) for member in members])
    torch.testing.assert_close(model(x.clone()), expected)
    with torch.inference_mode():
        torch.testing.assert_close(model(x.clone()), expected)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    model(inputs[0] + 0).sum().backward()
    torch.stack([member(inputs[1] + 0) for member in members]).sum().backward()
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad)
    torch.testing.assert_close(
        model.get_parameter(next(model.named_parameters())[0]).grad[2], first_gradient(members[2])
    )


def first_gradient(member):
    return next(member.parameters()).grad


@pytest.mark.parametrize(
    "rngs", [lambda: jax.random.key(5), lambda: nnx.RngStream(5, tag="dropout"), lambda: nnx.Rngs(5)]
)
def test_each_member_draws_a_mask_of_its_own(rngs):
    class Net(nnx.Module):
        def __init__(self):
            self.linear, self.dropout = nnx.Linear(3, 20, rngs=nnx.Rngs(0)), nnx.Dropout(0.5)

        def __call__(self, x, rngs):
            return self.dropout(self.linear(x), rngs=rngs)

    members = [Net() for _ in range(3)]
    y = pf.Ensemble(members)(jax_of(X), rngs=rngs())
    assert len({np.asarray(each == 0).tobytes() for each in y}) == 3
    own = jax.random.split(rngs(), 3) if isinstance(rngs(), jax.Array) else rngs().split(3)
    if isinstance(own, jax.Array):
        for i, member in enumerate(members):
            np.testing.assert_array_equal(member(jax_of(X), rngs=own[i]), y[i])


def test_pairs_beyond_float16_are_counted():
    """Has 300 members, whose 89,700 pairs are more than float16 can hold."""
    logits = np.random.default_rng(0).standard_normal((300, 4, 5)).astype("float16")
    classes = logits.argmax(-1)
    expected = [np.mean([a != b for i, a in enumerate(own) for j, b in enumerate(own) if i != j]) for own in classes.T]
    theirs = np.asarray(pf.uncertainty.disagreement(jnp.asarray(logits, logits.dtype)))
    np.testing.assert_array_equal(theirs, np.array(expected, "float16"))
    np.testing.assert_array_equal(pt.uncertainty.disagreement(torch.from_numpy(logits)), theirs)
