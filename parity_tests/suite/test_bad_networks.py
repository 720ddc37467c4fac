"""Bad input to whole networks: both packages say what is wrong in one sentence, and nothing is changed."""

import re
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from torch import nn

import probly_flax
import probly_torch
from parity_tests.kit.trees import jax_of
from parity_tests.suite.subject import randomized, without_draws


def drawn(make, *args):
    return randomized(without_draws(lambda: make(*args, rngs=nnx.Rngs(0))))


def torch_mlp():
    return nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 3))


def flax_mlp(rngs):
    return nnx.Sequential(nnx.Linear(5, 6, rngs=rngs), nnx.relu, nnx.Linear(6, 3, rngs=rngs))


class TorchCNN(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 5, 3, padding=1, **options))
        self.head = nn.Linear(5, 2)

    def forward(self, x):
        return self.head(self.features(x).mean((2, 3)))


class FlaxCNN(nnx.Module):
    def __init__(self, padding=1, *, rngs):
        conv = nnx.Conv(4, 5, (3, 3), padding=padding, rngs=rngs)
        self.features = nnx.Sequential(nnx.Conv(3, 4, (3, 3), padding=0, rngs=rngs), nnx.relu, conv)
        self.head = nnx.Linear(5, 2, rngs=rngs)

    def __call__(self, x):
        return self.head(self.features(x).mean((1, 2)))


class TorchLSTM(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.embed, self.head = nn.Embedding(7, 4, **options), nn.Linear(3, 2)
        self.rnn = nn.LSTM(4, 3, batch_first=True)

    def forward(self, x):
        return self.head(self.rnn(self.embed(x))[0][:, -1])


class FlaxLSTM(nnx.Module):
    def __init__(self, rngs):
        self.embed, self.head = nnx.Embed(7, 4, rngs=rngs), nnx.Linear(3, 2, rngs=rngs)
        self.rnn = nnx.RNN(nnx.OptimizedLSTMCell(4, 3, rngs=rngs), rngs=rngs)

    def __call__(self, x):
        return self.head(self.rnn(self.embed(x))[:, -1])


def torch_encoder():
    layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


class FlaxEncoder(nnx.Module):
    """The part of torch's encoder that matters here."""

    def __init__(self, rngs):
        self.self_attn = nnx.MultiHeadAttention(2, 8, decode=False, rngs=rngs)
        self.linear1, self.linear2 = nnx.Linear(8, 12, rngs=rngs), nnx.Linear(12, 8, rngs=rngs)

    def __call__(self, x, mask=None):
        return self.linear2(nnx.relu(self.linear1(x + self.self_attn(x, mask=mask))))


@dataclass(frozen=True)
class Framework:
    package: Any
    mlp: Any
    cnn: Any
    lstm: Any
    encoder: Any
    sequential: Any
    linear: Any
    norm: Any
    array: Any

    def zeros(self, *shape, dtype="float32"):
        return self.array(np.zeros(shape, dtype))


TORCH = Framework(
    probly_torch,
    torch_mlp,
    TorchCNN,
    TorchLSTM,
    torch_encoder,
    nn.Sequential,
    nn.Linear,
    lambda: nn.LayerNorm(4),
    torch.tensor,
)
FLAX = Framework(
    probly_flax,
    partial(drawn, flax_mlp),
    partial(drawn, FlaxCNN),
    partial(drawn, FlaxLSTM),
    partial(drawn, FlaxEncoder),
    nnx.Sequential,
    partial(drawn, nnx.Linear),
    partial(drawn, nnx.LayerNorm, 4),
    jax_of,
)


def converted(f, kind, **options):
    return f.package.batchensemble(getattr(f, kind)(), 3, **options)


@cache
def model(f, kind):
    """Converts a network. What its numbers are does not matter: in Flax they are zeros."""
    return converted(f, kind) if f is TORCH else without_draws(lambda: converted(f, kind))


ENSEMBLE = "call ensemble(network, num_members)."
CASES = {
    "MLP, features": (lambda f: model(f, "mlp")(f.zeros(4, 6)), ValueError, "a Linear layer with in_features=6."),
    "MLP, rows": (lambda f: model(f, "mlp").network(f.zeros(4, 5)), ValueError, "call tile_members(x, 3)."),
    "MLP, one input": (lambda f: model(f, "mlp")(f.zeros(5)), ValueError, "call tile_members(x[None], 3)."),
    "MLP, members": (
        lambda f: model(f, "mlp")(f.zeros(4, 2, 5), in_axes=0),
        ValueError,
        "leave in_axes out: model(x).",
    ),
    "MLP, no input": (lambda f: model(f, "mlp")(), TypeError, "Pass the arrays themselves: model(x)."),
    "LSTM, rows": (
        lambda f: model(f, "lstm").network(f.zeros(4, 5, dtype="int32")),
        ValueError,
        "call tile_members(x, 3).",
    ),
    "LSTM, one sequence": (
        lambda f: model(f, "lstm")(f.zeros(5, dtype="int32")),
        ValueError,
        "call tile_members(x[None], 3).",
    ),
    "LSTM, no tokens": (lambda f: model(f, "lstm")(f.zeros(2, 5)), TypeError, "of one-hot vectors, x.argmax(-1)."),
    "encoder, features": (
        lambda f: model(f, "encoder")(f.zeros(2, 5, 6)),
        ValueError,
        "build the layer from one whose query has 6 features.",
    ),
    "encoder, rows": (
        lambda f: model(f, "encoder").network(f.zeros(4, 5, 8)),
        ValueError,
        "call tile_members(query, 3).",
    ),
    "encoder, one mask for all rows": (
        lambda f: model(f, "encoder")(f.zeros(2, 5, 8), mask=f.zeros(5, 5)),
        ValueError,
        "mask.expand(len(x), -1, -1).",
    ),
    "nothing to convert": (lambda f: f.package.batchensemble(f.sequential(f.norm()), 3), ValueError, ENSEMBLE),
    "no parameters": (lambda f: f.package.batchensemble(f.sequential(), 3), ValueError, ENSEMBLE),
    "everything excluded": (lambda f: converted(f, "mlp", exclude="*"), ValueError, ENSEMBLE),
    "everything excluded by its root": (lambda f: converted(f, "mlp", exclude=f.sequential), ValueError, ENSEMBLE),
    "a misspelt name": (
        lambda f: converted(f, "lstm", exclude=["head", "embde"]),
        ValueError,
        "Pass exclude='embed', or leave it out.",
    ),
    "a type that is not there": (
        lambda f: converted(f, "lstm", exclude=set),
        ValueError,
        "Pass exclude='embed', or leave it out.",
    ),
    "a predicate that never holds": (
        lambda f: converted(f, "lstm", exclude=never),
        ValueError,
        "Pass exclude='embed', or leave it out.",
    ),
    "a single layer by name": (
        lambda f: f.package.batchensemble(f.linear(4, 3), 3, exclude="head"),
        ValueError,
        "Leave it out: exclude=().",
    ),
    "a layer itself": (
        lambda f: converted(f, "mlp", exclude=[f.linear(4, 3)]),
        TypeError,
        "or its type, exclude=Linear.",
    ),
    "None": (lambda f: converted(f, "mlp", exclude=None), TypeError, "Pass exclude='head.*'."),
    "converted already": (
        lambda f: f.package.batchensemble(model(f, "cnn"), 3),
        ValueError,
        "wrap this one: BatchEnsemble(network).",
    ),
    "converted already, the network": (
        lambda f: f.package.batchensemble(model(f, "lstm").network, 3),
        ValueError,
        "wrap this one: BatchEnsemble(network).",
    ),
    "converted already, one layer": (
        lambda f: f.package.batchensemble(
            f.sequential(f.linear(4, 4), f.package.BatchEnsembleLinear(f.linear(4, 3), num_members=3)), 3
        ),
        ValueError,
        "wrap this one: BatchEnsemble(network).",
    ),
    "an Ensemble": (
        lambda f: f.package.batchensemble(f.package.ensemble(f.mlp(), 2, reset_params=False), 3),
        ValueError,
        "batchensemble(model[0], num_members=4).",
    ),
}


def never(path, layer):
    return False


def sentence(call, error):
    with pytest.raises(error) as raised:
        call()
    assert type(raised.value) is error
    text = str(raised.value)
    assert re.match(r"\w+ expects .*; got ", text), text
    return text


@pytest.mark.parametrize("name", CASES)
def test_the_same_sentence_in_both(name):
    call, error, next_step = CASES[name]
    ours, theirs = (sentence(lambda f=f: call(f), error) for f in (TORCH, FLAX))
    assert ours == theirs
    assert ours.endswith(next_step)


def test_images_of_the_other_layout_are_told_which_one_is_expected():
    for f, shape, layout, move in (
        (TORCH, (2, 6, 7, 3), "[num_members*B, in_channels, H, W] (channels first)", "x.movedim(-1, 1)"),
        (FLAX, (2, 3, 6, 7), "[num_members*B, H, W, in_channels] (channels last)", "jnp.moveaxis(x, 1, -1)"),
    ):
        x = f.zeros(*shape)
        text = sentence(lambda f=f, x=x: model(f, "cnn")(x), ValueError)
        assert f"inputs of shape {layout} with num_members=3, in_channels=3; got (6, {shape[1]}" in text
        assert text.endswith(f"move it: {move}.")
        moved = x.movedim(-1, 1) if f is TORCH else jnp.moveaxis(x, 1, -1)
        assert model(f, "cnn")(moved).shape == (3, 2, 2)


@pytest.mark.parametrize(
    ("torch_shape", "flax_shape", "next_step"),
    [
        ((2, 4, 6, 7), (2, 6, 7, 4), "build the layer from one of as many channels: Conv(4, ...)."),
        ((3, 6, 7), (6, 7, 3), "call tile_members(x[None], 3)."),
        ((2, 18), (2, 18), "Give it these axes: x.reshape(-1, {})."),
    ],
    ids=["channels", "one image", "flat"],
)
def test_images_of_other_shapes(torch_shape, flax_shape, next_step):
    for f, shape, order in ((TORCH, torch_shape, "3, H, W"), (FLAX, flax_shape, "H, W, 3")):
        text = sentence(lambda f=f, shape=shape: model(f, "cnn")(f.zeros(*shape)), ValueError)
        assert text.endswith(next_step.format(order))


def test_a_mode_of_padding_that_flax_lacks():
    assert probly_torch.batchensemble(TorchCNN(padding_mode="replicate"), 3)(torch.zeros(2, 3, 6, 7)).shape == (3, 2, 2)
    text = sentence(lambda: probly_flax.batchensemble(drawn(FlaxCNN, "REPLICATE"), 3), ValueError)
    assert "one of SAME, SAME_LOWER, VALID, CIRCULAR, REFLECT, CAUSAL; got 'REPLICATE'" in text
    base = drawn(partial(nnx.ConvTranspose, padding="REFLECT"), 3, 2, (2,))
    text = sentence(lambda: probly_flax.batchensemble(nnx.Sequential(base), 3), ValueError)
    assert "one of SAME, VALID, CIRCULAR; got 'REFLECT'" in text
    assert probly_flax.batchensemble(drawn(FlaxCNN, "same"), 3)(FLAX.zeros(2, 6, 7, 3)).shape == (3, 2, 2)


def test_lazy_layers_are_named():
    base = nn.Sequential(nn.Linear(4, 3), nn.LazyLinear(2))
    text = sentence(lambda: probly_torch.batchensemble(base, 3), ValueError)
    assert text.endswith("got lazy ones, without 1.weight. Call the network once first: network(x).")


def test_of_many_layers_some_are_named():
    for f in (TORCH, FLAX):
        deep = f.sequential(*(f.linear(1, 1) for _ in range(23)))
        assert "19 and 3 more. Pass" in sentence(
            lambda f=f, n=deep: f.package.batchensemble(n, 3, exclude="x"), ValueError
        )


def failures(f):
    """Yields networks whose conversion fails after its first layers, and its options."""
    yield f.lstm(), {"exclude": "embde"}
    yield f.mlp(), {"exclude": "*"}
    yield (TorchLSTM(max_norm=1.0) if f is TORCH else drawn(FlaxCNN, "REPLICATE")), {}
    time_major = f.lstm()
    time_major.rnn = nn.LSTM(4, 3) if f is TORCH else nnx.RNN(time_major.rnn.cell, time_major=True)
    yield time_major, {"use_base_weights": False}


def flat(f, module):
    """Copies everything that could change."""
    if f is TORCH:
        return {name: value.detach().numpy().copy() for name, value in module.state_dict().items()}
    return {path: np.asarray(value[...]) for path, value in nnx.to_flat_state(nnx.state(module, nnx.Not(nnx.RngKey)))}


def test_a_conversion_that_fails_changes_nothing_and_draws_nothing():
    for f in (TORCH, FLAX):
        for base, options in failures(f):
            rngs = f.package.Rngs(3)
            rngs.params()
            before, text = flat(f, base), repr(base)
            with pytest.raises(ValueError, match=" expects "):
                f.package.batchensemble(base, 3, rngs=rngs, **options)
            assert repr(base) == text
            after = flat(f, base)
            assert after.keys() == before.keys()
            for name, value in after.items():
                np.testing.assert_array_equal(value, before[name])
            assert int(rngs.default.count[...]) == 1


def test_a_conversion_that_succeeds_takes_its_keys_from_the_rngs_it_is_given():
    for f in (TORCH, FLAX):
        rngs, base = f.package.Rngs(3), f.mlp()
        first, second = (f.package.batchensemble(base, 3, rngs=rngs) for _ in range(2))
        by_seed = f.package.batchensemble(base, 3, rngs=3)
        assert int(rngs.default.count[...]) == 2 * 2 * 2  # models, layers, r and s
        r = [np.asarray(f.package.to_arrays(each)["network.0.r"]) for each in (first, second, by_seed)]
        np.testing.assert_array_equal(r[0], r[2])
        assert (r[0] != r[1]).all()


class TorchNested(nn.Module):
    def __init__(self):
        super().__init__()
        trunk = nn.ModuleList([torch_mlp(), nn.Linear(3, 5)])
        self.parts = nn.ModuleDict({"trunk": trunk, "head": nn.Linear(5, 2)})

    def forward(self, x):
        for layer in self.parts["trunk"]:
            x = layer(x)
        return self.parts["head"](x)


class FlaxNested(nnx.Module):
    def __init__(self, rngs):
        trunk = nnx.List([flax_mlp(rngs), nnx.Linear(3, 5, rngs=rngs)])
        self.parts = nnx.Dict(trunk=trunk, head=nnx.Linear(5, 2, rngs=rngs))

    def __call__(self, x):
        for layer in self.parts["trunk"]:
            x = layer(x)
        return self.parts["head"](x)


def of_five_inputs(path, layer):
    return getattr(layer, "in_features", None) == 5


@pytest.mark.parametrize(
    ("torch_exclude", "flax_exclude", "excluded"),
    [
        ("parts.trunk.*", "parts.trunk.*", {"trunk.0.0", "trunk.0.2", "trunk.1"}),
        ("parts.trunk.0", "parts.trunk.0", {"trunk.0.0", "trunk.0.2"}),
        ("*.head", "*.head", {"head"}),
        (nn.Sequential, nnx.Sequential, {"trunk.0.0", "trunk.0.2"}),
        (nn.ModuleList, nnx.List, {"trunk.0.0", "trunk.0.2", "trunk.1"}),
        (of_five_inputs, of_five_inputs, {"trunk.0.0", "head"}),
        (["*.0.2", "parts.*.1"], ["*.0.layers.2", "parts.*.1"], {"trunk.0.2", "trunk.1"}),
        (("*.head", nn.Sequential), ("*.head", nnx.Sequential), {"trunk.0.0", "trunk.0.2", "head"}),
    ],
    ids=["inside", "a parent", "end", "type of a parent", "type of a list", "predicate", "several", "mixed"],
)
def test_excluded_inside_containers(torch_exclude, flax_exclude, excluded):
    for f, base, exclude in ((TORCH, TorchNested(), torch_exclude), (FLAX, drawn(FlaxNested), flax_exclude)):
        partly = f.package.batchensemble(base, 3, exclude=exclude)
        actions = {row.path.removeprefix("parts.").replace("layers.", ""): row.action for row in partly.report.rows}
        assert actions.keys() == {"trunk.0.0", "trunk.0.2", "trunk.1", "head"}
        assert {path for path, action in actions.items() if action == "excluded"} == excluded
        assert {path for path, action in actions.items() if action == "converted"} == actions.keys() - excluded
        arrays = f.package.to_arrays(partly)
        with_members = {name.removeprefix("network.parts.")[:-2] for name in arrays if name.endswith(".r")}
        assert with_members == actions.keys() - excluded
        y = partly(f.array(np.ones((2, 5), "float32")))
        y = y.detach().numpy() if f is TORCH else np.asarray(y)
        assert not (y[0] == y[1]).any()
