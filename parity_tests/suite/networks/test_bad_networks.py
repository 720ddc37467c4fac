"""Bad input to whole networks: both packages say what is wrong in one sentence, and nothing is changed."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from torch import nn

from parity_tests.suite.sentences.frameworks import (
    FLAX,
    TORCH,
    drawn,
    flax_mlp,
    model,
    torch_mlp,
)


def test_modes_of_padding_that_flax_lacks_or_spells_otherwise():
    assert TORCH.package.batchensemble(TORCH.cnn(padding_mode="replicate"), 3)(torch.zeros(2, 3, 6, 7)).shape == (
        3,
        2,
        2,
    )
    assert FLAX.package.batchensemble(FLAX.cnn("same"), 3)(FLAX.zeros(2, 6, 7, 3)).shape == (3, 2, 2)


def test_images_of_the_other_layout_fit_once_they_are_moved():
    assert model(TORCH, "cnn")(torch.zeros(2, 6, 7, 3).movedim(-1, 1)).shape == (3, 2, 2)
    assert model(FLAX, "cnn")(jnp.moveaxis(FLAX.zeros(2, 3, 6, 7), 1, -1)).shape == (3, 2, 2)


def failures(f):
    """Yields networks whose conversion fails after its first layers, and its options."""
    yield f.lstm(), {"exclude": "embde"}
    yield f.mlp(), {"exclude": "*"}
    yield (f.lstm(max_norm=1.0) if f is TORCH else f.cnn("REPLICATE")), {}
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
