"""Options that change what a layer computes travel with its weights, and every difference is named."""

import json
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import numpy as np
import pytest
import torch
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

import probly_flax as pf
import probly_torch as pt
from parity_tests.kit.trees import jax_of
from probly_common.weights.kinds import KINDS, Missing, check_same_options
from probly_common.weights.match import renamed_paths
from probly_flax._arguments import _LACKING

Arguments = dict[str, Any]
FRAMEWORKS = ("torch", "flax")
TORCH, FLAX = pt.weights.Inventory.words, pf.weights.Inventory.words


@dataclass(frozen=True)
class SameLayer:
    """A layer in both frameworks, arguments that make them equal, and changes of one option in both."""

    torch: Callable[..., nn.Module]
    flax: Callable[..., nnx.Module]
    equal: tuple[Arguments, Arguments]
    changes: tuple[tuple[Arguments, Arguments], ...]

    def make(self, framework: str, change: Arguments | None = None) -> Any:
        """Makes the layer in a Sequential."""
        arguments = self.equal[FRAMEWORKS.index(framework)] | (change or {})
        if framework == "torch":
            return nn.Sequential(self.torch(**arguments))
        return nnx.Sequential(self.flax(**arguments))


def flax(constructor, *sizes, **fixed):
    """Returns a constructor of layers without values, which take long to draw."""
    return lambda **options: nnx.eval_shape(lambda: constructor(*sizes, **fixed, **options, rngs=nnx.Rngs(0)))


def rnn(cell):
    """Returns a function that makes an nnx.RNN of a cell, and takes the arguments of both."""

    def make(**arguments):
        own = {name: arguments.pop(name) for name in ("activation_fn", "residual") if name in arguments}
        return nnx.RNN(flax(cell, 5, 3, **own)(), **arguments)

    return make


def function(activation):
    return lambda **arguments: partial(activation, **arguments) if arguments else activation


AFFINE = ({"affine": False}, {"use_scale": False, "use_bias": False})
EPS = ({"eps": 1e-3}, {"epsilon": 1e-3})
BIAS = ({"bias": False}, {"use_bias": False})
CONV = (
    ({"padding": 2}, {"padding": 2}),
    ({"padding": (1, 0)}, {"padding": (1, 0)}),
    ({"padding": "valid"}, {"padding": "VALID"}),
    ({"stride": 2}, {"strides": 2}),
    ({"dilation": (1, 2)}, {"kernel_dilation": (1, 2)}),
    ({"groups": 2}, {"feature_group_count": 2}),
    ({"padding_mode": "circular"}, {"padding": "CIRCULAR"}),
    ({"padding_mode": "reflect"}, {"padding": "REFLECT"}),
    ({"kernel_size": (3, 5), "padding": (1, 2)}, {"kernel_size": (3, 5), "padding": (1, 2)}),
    BIAS,
)
LAYERS = {
    "Linear": SameLayer(partial(nn.Linear, 5, 3), flax(nnx.Linear, 5, 3), ({}, {}), (BIAS,)),
    "LinearGeneral": SameLayer(partial(nn.Linear, 5, 6), flax(nnx.LinearGeneral, 5, (2, 3)), ({}, {}), (BIAS,)),
    "Conv": SameLayer(
        partial(nn.Conv2d, 4, 6),
        flax(nnx.Conv, 4, 6),
        ({"kernel_size": 3, "padding": 1}, {"kernel_size": (3, 3), "padding": 1}),
        CONV,
    ),
    "Conv of the same size": SameLayer(
        partial(nn.Conv2d, 4, 6, (4, 3), dilation=(1, 2)),
        flax(nnx.Conv, 4, 6, (4, 3), kernel_dilation=(1, 2)),
        ({"padding": (1, 2)}, {"padding": (1, 2)}),
        (
            ({"padding": "same"}, {"padding": "SAME"}),
            ({"padding": "same"}, {"padding": ((1, 2), (2, 2))}),
            ({"padding_mode": "circular", "padding": "same"}, {"padding": "CIRCULAR"}),
        ),
    ),
    "Conv of one pixel": SameLayer(
        partial(nn.Conv1d, 4, 6, 1, stride=2),
        flax(nnx.Conv, 4, 6, 1, strides=2),
        ({}, {"padding": "SAME"}),
        (),
    ),
    "Conv3d": SameLayer(
        partial(nn.Conv3d, 4, 6, (3, 2, 1)),
        flax(nnx.Conv, 4, 6, (3, 2, 1)),
        ({}, {"padding": 0}),
        (({"padding": (2, 1, 0), "stride": (1, 2, 3)}, {"padding": (2, 1, 0), "strides": (1, 2, 3)}),),
    ),
    "ConvTranspose": SameLayer(
        partial(nn.ConvTranspose2d, 4, 6, (3, 2)),
        flax(nnx.ConvTranspose, 4, 6, (3, 2), transpose_kernel=True),
        (
            {"dilation": 2, "stride": (2, 3)},
            {"kernel_dilation": 2, "strides": (2, 3), "padding": ((4, 4), (2, 2))},
        ),
        (
            ({"padding": (1, 2)}, {"padding": ((3, 3), (0, 0))}),
            ({"output_padding": (1, 1)}, {"padding": ((4, 5), (2, 3))}),
            ({"stride": 3}, {"strides": 3}),
            BIAS,
        ),
    ),
    "Embedding": SameLayer(partial(nn.Embedding, 7, 3), flax(nnx.Embed, 7, 3), ({}, {}), ()),
    "BatchNorm": SameLayer(
        partial(nn.BatchNorm2d, 5),
        flax(nnx.BatchNorm, 5),
        ({}, {"momentum": 0.9}),
        (EPS, ({"momentum": 0.01}, {"momentum": 0.99}), AFFINE),
    ),
    "LayerNorm": SameLayer(
        nn.LayerNorm,
        flax(nnx.LayerNorm, 5),
        ({"normalized_shape": 5}, {"epsilon": 1e-5}),
        (
            ({"eps": 1e-6}, {"epsilon": 1e-6}),
            BIAS,
            ({"elementwise_affine": False}, {"use_scale": False, "use_bias": False}),
            ({"normalized_shape": (3, 5)}, {"reduction_axes": (-1, -2), "feature_axes": (-2, -1)}),
        ),
    ),
    "RMSNorm": SameLayer(
        nn.RMSNorm,
        flax(nnx.RMSNorm, 5),
        ({"normalized_shape": 5}, {"epsilon": float(np.finfo(np.float32).eps)}),
        (
            EPS,
            ({"elementwise_affine": False, "eps": 1e-3}, {"use_scale": False, "epsilon": 1e-3}),
            ({"normalized_shape": (3, 5)}, {"reduction_axes": (-2, -1), "feature_axes": (-2, -1)}),
        ),
    ),
    "GroupNorm": SameLayer(
        partial(nn.GroupNorm, num_channels=6),
        flax(nnx.GroupNorm, 6),
        ({"num_groups": 3, "eps": 1e-6}, {"num_groups": 3}),
        (EPS, ({"num_groups": 2}, {"num_groups": 2}), AFFINE),
    ),
    "InstanceNorm": SameLayer(
        partial(nn.InstanceNorm2d, 5),
        flax(nnx.InstanceNorm, 5),
        ({"affine": True, "eps": 1e-6}, {}),
        (EPS, AFFINE),
    ),
    "PReLU": SameLayer(nn.PReLU, lambda: nnx.PReLU(), ({}, {}), ()),
    "MultiHeadAttention": SameLayer(
        partial(nn.MultiheadAttention, 6),
        flax(nnx.MultiHeadAttention, in_features=6, decode=False),
        ({"num_heads": 3}, {"num_heads": 3}),
        (({"num_heads": 2}, {"num_heads": 2}), BIAS),
    ),
    "LSTM": SameLayer(
        partial(nn.LSTM, 5, 3),
        rnn(nnx.OptimizedLSTMCell),
        ({"batch_first": True}, {}),
        (({"batch_first": False}, {"time_major": True}),),
    ),
    "GRU": SameLayer(
        partial(nn.GRU, 5, 3),
        rnn(nnx.GRUCell),
        ({}, {"time_major": True}),
        (({"batch_first": True}, {"time_major": False}),),
    ),
    "RNN": SameLayer(
        partial(nn.RNN, 5, 3),
        rnn(nnx.SimpleCell),
        ({}, {"time_major": True}),
        (({"nonlinearity": "relu"}, {"activation_fn": nnx.relu}),),
    ),
    "bidirectional": SameLayer(
        partial(nn.LSTM, 5, 3, bidirectional=True),
        lambda **options: nnx.Bidirectional(rnn(nnx.LSTMCell)(), rnn(nnx.LSTMCell)(), **options),
        ({"batch_first": True}, {}),
        (({"batch_first": False}, {"time_major": True}),),
    ),
    "LSTMCell": SameLayer(partial(nn.LSTMCell, 5, 3), flax(nnx.LSTMCell, 5, 3), ({}, {}), ()),
    "GRUCell": SameLayer(partial(nn.GRUCell, 5, 3), flax(nnx.GRUCell, 5, 3), ({}, {}), ()),
    "RNNCell": SameLayer(
        partial(nn.RNNCell, 5, 3),
        flax(nnx.SimpleCell, 5, 3),
        ({}, {}),
        (({"nonlinearity": "relu"}, {"activation_fn": nnx.relu}),),
    ),
    "gelu": SameLayer(
        nn.GELU,
        function(nnx.gelu),
        ({}, {"approximate": False}),
        (({"approximate": "tanh"}, {"approximate": True}),),
    ),
    "gelu of tanh": SameLayer(nn.GELU, function(nnx.gelu), ({"approximate": "tanh"}, {}), ()),
    "leaky_relu": SameLayer(
        nn.LeakyReLU,
        function(nnx.leaky_relu),
        ({}, {}),
        (({"negative_slope": 0.2}, {"negative_slope": 0.2}),),
    ),
    "elu": SameLayer(nn.ELU, function(nnx.elu), ({}, {}), (({"alpha": 0.5}, {"alpha": 0.5}),)),
    "celu": SameLayer(nn.CELU, function(nnx.celu), ({}, {}), (({"alpha": 0.5}, {"alpha": 0.5}),)),
    **{
        ours.__name__: SameLayer(ours, function(theirs), ({}, {}), ())
        for ours, theirs in (
            *((nn.ReLU, nnx.relu), (nn.ReLU6, nnx.relu6), (nn.SiLU, nnx.swish), (nn.Mish, jax.nn.mish)),
            *((nn.SELU, nnx.selu), (nn.Sigmoid, nnx.sigmoid), (nn.LogSigmoid, nnx.log_sigmoid), (nn.Tanh, nnx.tanh)),
            *((nn.Softsign, nnx.soft_sign), (nn.Hardswish, nnx.hard_silu), (nn.Hardsigmoid, nnx.hard_sigmoid)),
            *((nn.Softplus, nnx.softplus), (nn.Hardtanh, nnx.hard_tanh), (nn.Softmax, nnx.softmax)),
            *((nn.LogSoftmax, nnx.log_softmax), (nn.GLU, nnx.glu)),
        )
    },
}


def options(model):
    """Returns options as a file holds them."""
    package = pt if isinstance(model, nn.Module) else pf
    own = package.weights.Inventory(model).options
    read = json.loads(json.dumps(own))
    assert read == own
    return read


def outcome(model, recorded):
    """Returns the sentence that refuses a record, or None."""
    package = pt if isinstance(model, nn.Module) else pf
    try:
        check_same_options("load_weights", package.weights.Inventory(model), recorded)
    except ValueError as error:
        return str(error)
    return None


def differences(model, recorded):
    sentence = outcome(model, recorded)
    if sentence is None:
        return []
    first, *lines, last = sentence.splitlines()
    assert first == f"load_weights expects layers with the options of those in the file; got {len(lines)} that differ:"
    assert last == "Pass these arguments, or load the weights all the same: check_options=False."
    return [line.removeprefix("  ") for line in lines]


@pytest.mark.parametrize("name", LAYERS)
def test_twins_with_equal_options_are_equal_and_each_changed_one_is_named(name):
    layer = LAYERS[name]
    models = {framework: layer.make(framework) for framework in FRAMEWORKS}
    kinds = {options(model)["0"]["kind"] for model in models.values()}
    assert len(kinds) == 1
    assert kinds < KINDS.keys()
    assert not any(differences(a, options(b)) for a in models.values() for b in models.values())
    for change in layer.changes:
        changed = {framework: layer.make(framework, change[i]) for i, framework in enumerate(FRAMEWORKS)}
        recorded = [options(model) for model in changed.values()]
        assert not any(differences(model, each) for model in changed.values() for each in recorded)
        for i, framework in enumerate(FRAMEWORKS):
            lines = differences(models[framework], recorded[0])
            assert lines == differences(models[framework], recorded[1])
            suggested = dict(map(suggestion, lines))
            assert len(lines) == len(suggested)
            assert suggested.keys() == change[i].keys(), lines
            assert not differences(layer.make(framework, suggested), recorded[0])


def suggestion(line):
    """Evaluates the argument at the end of a line, as Python reads it."""
    name, code = re.fullmatch(r"0: \w+ .+ here, .+ in the file; [\w./]+\(.+?, (\w+)=(.+)\)", line).groups()
    return name, eval(code, {"nnx": nnx, "x": torch.zeros(2, 3, 5)})


@pytest.mark.parametrize(
    ("model", "recorded", "line"),
    [
        (
            flax(nnx.LayerNorm, 5),
            lambda: nn.LayerNorm(5),
            "(root): epsilon 1e-06 here, 1e-05 in the file; nnx.LayerNorm(..., epsilon=1e-05)",
        ),
        (
            lambda: nn.LayerNorm(5),
            flax(nnx.LayerNorm, 5),
            "(root): eps 1e-05 here, 1e-06 in the file; nn.LayerNorm(..., eps=1e-06)",
        ),
        (
            flax(nnx.BatchNorm, 5),
            lambda: nn.BatchNorm1d(5),
            "(root): momentum 0.99 here, 0.9 in the file; nnx.BatchNorm(..., momentum=0.9)",
        ),
        (
            lambda: nn.BatchNorm1d(5),
            flax(nnx.BatchNorm, 5),
            "(root): momentum 0.1 here, 0.01 in the file; nn.BatchNorm1d/2d/3d(..., momentum=0.01)",
        ),
        (
            lambda: nnx.Sequential(nnx.gelu),
            lambda: nn.Sequential(nn.GELU()),
            "0: approximate True here, False in the file; partial(nnx.gelu, approximate=False)",
        ),
        (
            lambda: nnx.Sequential(nnx.relu),
            lambda: nn.Sequential(nn.GELU()),
            "0: ReLU here, GELU in the file; nnx.gelu",
        ),
        (
            flax(nnx.LayerNorm, 5),
            lambda: nn.RMSNorm(5),
            "(root): LayerNorm here, RMSNorm in the file; nnx.RMSNorm(...)",
        ),
        (
            flax(nnx.Conv, 3, 4, 3),
            lambda: nn.Conv2d(3, 4, 3),
            "(root): Conv1d here, Conv2d in the file; nnx.Conv(..., kernel_size=(3, 3))",
        ),
        (
            flax(nnx.Conv, 3, 4, (3, 3), strides=2),
            lambda: nn.Conv2d(3, 4, 3, stride=2, padding=1),
            "(root): padding 'SAME' here, (1, 1) in the file; nnx.Conv(..., padding=(1, 1))",
        ),
        (
            lambda: nn.Conv2d(3, 4, 3, stride=2, padding=1),
            flax(nnx.Conv, 3, 4, (3, 3), strides=2),
            "(root): padding (1, 1) here, 'same' of strides in the file; nn.Conv2d has no padding 'same' of strides",
        ),
        (
            lambda: nn.Conv1d(3, 4, 3),
            flax(nnx.Conv, 3, 4, 3, padding="CAUSAL"),
            "(root): padding (0,) here, ((2, 0),) in the file; nn.Conv1d has no padding ((2, 0),)",
        ),
        (
            flax(nnx.Conv, 3, 4, 3),
            lambda: nn.Conv1d(3, 4, 3, padding=1, padding_mode="replicate"),
            "(root): padding (1,) here, (1,) of 'replicate' values in the file; "
            "nnx.Conv has no padding (1,) of 'replicate' values",
        ),
        (
            flax(nnx.ConvTranspose, 4, 6, 3, transpose_kernel=True, padding=2),
            lambda: nn.ConvTranspose1d(4, 6, 3, groups=2),
            "(root): groups 1 here, 2 in the file; nnx.ConvTranspose has no groups 2",
        ),
        (
            lambda: nn.ConvTranspose1d(4, 6, 3),
            flax(nnx.ConvTranspose, 4, 6, 3, padding="CIRCULAR"),
            "(root): padding_mode 'zeros' here, 'circular' in the file; "
            "nn.ConvTranspose1d has no padding_mode 'circular'",
        ),
        (
            flax(nnx.ConvTranspose, 4, 6, 3, padding="CIRCULAR"),
            lambda: nn.ConvTranspose1d(4, 6, 3),
            "(root): padding 'CIRCULAR' here, (2,) in the file; nnx.ConvTranspose(..., padding=(2,))",
        ),
        (
            flax(nnx.Embed, 7, 3),
            lambda: nn.Embedding(7, 3, max_norm=2.0),
            "(root): max_norm None here, 2.0 in the file; nnx.Embed has no max_norm 2.0",
        ),
        (
            lambda: nn.Embedding(7, 3, max_norm=2.0),
            flax(nnx.Embed, 7, 3),
            "(root): max_norm 2.0 here, None in the file; nn.Embedding(..., max_norm=None)",
        ),
        (
            lambda: rnn(nnx.OptimizedLSTMCell)(),
            lambda: nn.LSTM(5, 3, num_layers=2, batch_first=True),
            "(root): num_layers 1 here, 2 in the file; nnx.RNN has no num_layers 2",
        ),
        (
            lambda: rnn(nnx.GRUCell)(),
            lambda: nn.GRU(5, 3, bidirectional=True, batch_first=True),
            "(root): bidirectional False here, True in the file; nnx.Bidirectional(nnx.RNN(...), nnx.RNN(...))",
        ),
        (
            lambda: nn.RNN(5, 3, batch_first=True),
            lambda: rnn(nnx.SimpleCell)(residual=True),
            "(root): residual False here, True in the file; nn.RNN has no residual True",
        ),
        (
            lambda: nn.GRU(5, 3, batch_first=True),
            lambda: rnn(nnx.GRUCell)(reverse=True),
            "(root): reverse False here, True in the file; nn.GRU has no reverse True",
        ),
        (
            flax(nnx.MultiHeadAttention, 3, 6, decode=False),
            lambda: nn.MultiheadAttention(6, 3, add_zero_attn=True),
            "(root): add_zero_attn False here, True in the file; nnx.MultiHeadAttention has no add_zero_attn True",
        ),
        (
            flax(nnx.BatchNorm, 5, momentum=0.9),
            lambda: nn.BatchNorm1d(5, track_running_stats=False),
            "(root): track_running_stats True here, False in the file; nnx.BatchNorm has no track_running_stats False",
        ),
        (
            flax(nnx.BatchNorm, 5),
            lambda: nn.BatchNorm1d(5, momentum=None),
            "(root): momentum 0.99 here, None in the file; nnx.BatchNorm has no momentum None",
        ),
        (
            lambda: nnx.Sequential(nnx.softplus),
            lambda: nn.Sequential(nn.Softplus(beta=2.0)),
            "0: beta 1.0 here, 2.0 in the file; nnx.softplus has no beta 2.0",
        ),
        (
            lambda: nn.RMSNorm(5, dtype=torch.float64),
            lambda: nn.RMSNorm(5),
            "(root): eps 2.220446049250313e-16 here, "
            "1.1920928955078125e-07 in the file; nn.RMSNorm(..., eps=1.1920928955078125e-07)",
        ),
        (
            lambda: nnx.Bidirectional(rnn(nnx.LSTMCell)(), rnn(nnx.LSTMCell)(activation_fn=nnx.relu)),
            lambda: nn.LSTM(5, 3, bidirectional=True, batch_first=True),
            "(root): activation_fn mixed here, nnx.tanh in the file; "
            "nnx.OptimizedLSTMCell(..., activation_fn=nnx.tanh)",
        ),
        (
            lambda: nnx.Bidirectional(rnn(nnx.LSTMCell)(), rnn(nnx.LSTMCell)()),
            lambda: nn.LSTM(5, 3, batch_first=True),
            "(root): bidirectional True here, False in the file; nnx.RNN(...)",
        ),
        (
            flax(nnx.LayerNorm, 5, epsilon=1e-5, reduction_axes=(2, 3)),
            lambda: nn.LayerNorm(5),
            "(root): reduction_axes (2, 3) here, (-1,) in the file; nnx.LayerNorm(..., reduction_axes=(-1,))",
        ),
        (
            lambda: nn.LayerNorm(5),
            flax(nnx.LayerNorm, 5, epsilon=1e-5, feature_axes=-2),
            "(root): feature_axes all that it normalises here, (-2,) in the file; "
            "nn.LayerNorm has no feature_axes (-2,)",
        ),
        (
            flax(nnx.GroupNorm, 6, 3, epsilon=1e-5, reduction_axes=(-1,)),
            lambda: nn.GroupNorm(3, 6),
            "(root): reduction_axes (-1,) here, None in the file; nnx.GroupNorm(..., reduction_axes=None)",
        ),
        (
            lambda: nn.GroupNorm(3, 6),
            flax(nnx.GroupNorm, 6, 3, epsilon=1e-5, reduction_axes=-1),
            "(root): axes None here, (-1,) in the file; nn.GroupNorm has no axes (-1,)",
        ),
        (
            flax(nnx.Conv, 3, 4, 4, padding="SAME_LOWER"),
            lambda: nn.Conv1d(3, 4, 4, padding="same"),
            "(root): padding ((2, 1),) here, ((1, 2),) in the file; nnx.Conv(..., padding=((1, 2),))",
        ),
        (
            lambda: nn.ConvTranspose1d(4, 6, 3, stride=2, padding=1, output_padding=1),
            flax(nnx.ConvTranspose, 4, 6, 3, strides=2),
            "(root): padding (1,) here, ((0, 1),) in the file; nn.ConvTranspose1d has no padding ((0, 1),)",
        ),
        (
            lambda: nnx.Sequential(nnx.softplus),
            lambda: nn.Sequential(nn.Softplus(threshold=1)),
            "0: threshold 20.0 here, 1 in the file; nnx.softplus has no threshold 1",
        ),
        (
            lambda: nnx.Sequential(nnx.jit(nnx.gelu)),
            lambda: nn.Sequential(nn.GELU()),
            "0: approximate True here, False in the file; partial(nnx.gelu, approximate=False)",
        ),
        (
            lambda: nnx.Sequential(nnx.tanh),
            lambda: nn.Sequential(nn.Tanhshrink()),
            "0: Tanh here, Tanhshrink in the file; nnx has no Tanhshrink",
        ),
        (
            lambda: nnx.Sequential(nnx.relu),
            lambda: nn.Sequential(nn.Identity()),
            "0: ReLU here, Identity in the file; nnx.identity",
        ),
        (
            flax(nnx.Embed, 7, 3),
            lambda: nn.EmbeddingBag(7, 3),
            "(root): Embedding here, EmbeddingBag in the file; nnx has no EmbeddingBag",
        ),
        (
            flax(nnx.RMSNorm, 5, use_scale=False),
            lambda: nn.RMSNorm(5, elementwise_affine=False),
            "(root): epsilon 1e-06 here, 1.1920928955078125e-07 in the file; "
            "nnx.RMSNorm(..., epsilon=1.1920928955078125e-07)",
        ),
        (
            lambda: pt.BatchEnsembleLinear(nn.Linear(5, 3), num_members=4),
            flax(lambda rngs: pf.BatchEnsembleLinear(nnx.Linear(5, 3, rngs=rngs), num_members=3)),
            "(root): num_members 4 here, 3 in the file; batchensemble(..., num_members=3)",
        ),
    ],
)
def test_a_difference_is_one_line(model, recorded, line):
    assert differences(model(), options(recorded())) == [line]


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (lambda: nn.Sequential(nn.Softplus(beta=1)), lambda: nnx.Sequential(nnx.softplus)),
        (lambda: nn.Sequential(nn.Hardtanh(-1, 1)), lambda: nnx.Sequential(nnx.hard_tanh)),
        (
            lambda: nn.LayerNorm((3, 5), elementwise_affine=False),
            flax(nnx.LayerNorm, 5, epsilon=1e-5, use_scale=False, use_bias=False, reduction_axes=(-2, -1)),
        ),
        (lambda: nn.Conv1d(3, 4, 3, padding=1, stride=2), flax(nnx.Conv, 3, 4, 3, padding="SAME_LOWER", strides=2)),
        (lambda: nn.Conv1d(3, 4, 3, padding=1), flax(nnx.Conv, 3, 4, 3, padding="SAME_LOWER")),
        (lambda: nn.Sequential(nn.Softmax(1)), lambda: nnx.Sequential(nnx.softmax)),
    ],
)
def test_twins_that_are_right_say_nothing(ours, theirs):
    assert not differences(ours(), options(theirs()))
    assert not differences(theirs(), options(ours()))


def test_every_kind_has_twins():
    kinds = {options(layer.make(framework))["0"]["kind"] for layer in LAYERS.values() for framework in FRAMEWORKS}
    of_other_rank = {f"{kind}{n}d" for kind in ("Conv", "ConvTranspose") for n in (1, 2, 3)}
    assert kinds | of_other_rank == KINDS.keys() - {*_LACKING, "Identity"}  # a placeholder in Flax
    assert not any(hasattr(module, kind) for module in (nnx, jax.nn) for kind in _LACKING)


@pytest.mark.parametrize("padding", ["SAME", "VALID"])
@pytest.mark.parametrize(("size", "stride", "dilation"), [(4, 1, 1), (3, 1, 2), (1, 2, 1), (2, 3, 1), (3, 2, 2)])
def test_padding_by_a_word_is_the_padding_that_is_recorded(padding, size, stride, dilation):
    x = np.arange(3 * 11 * 2, dtype="float32").reshape(3, 11, 2)
    kernel, bias = np.arange(size * 2 * 5, dtype="float32").reshape(size, 2, 5) - 7, np.zeros(5, "float32")
    for layer in (nnx.Conv, nnx.ConvTranspose):
        named = flax(layer, 2, 5, size, strides=stride, kernel_dilation=dilation)(padding=padding)
        (record,) = options(named).values()
        assert (record["padding"] == "same") == (layer is nnx.Conv and padding == "SAME" and size > 1 < stride)
        explicit = FLAX.arguments(record["kind"], record)["padding"]
        outputs = []
        for each in (named, flax(layer, 2, 5, size, strides=stride, kernel_dilation=dilation)(padding=explicit)):
            each.kernel.set_value(jax_of(kernel))
            each.bias.set_value(jax_of(bias))
            outputs.append(np.asarray(each(jax_of(x))))
        np.testing.assert_array_equal(*outputs)
        arguments = TORCH.arguments(record["kind"], record)
        if not isinstance(arguments["padding"], Missing):
            twin = getattr(nn, record["kind"])(
                2, 5, **{k: v for k, v in arguments.items() if not isinstance(v, Missing)}
            )
            weight = kernel.transpose(2, 1, 0) if layer is nnx.Conv else kernel[::-1].transpose(1, 2, 0)
            with torch.no_grad():
                twin.weight.copy_(torch.tensor(weight.copy()))
                twin.bias.zero_()
                output = twin(torch.tensor(x).mT).mT
            np.testing.assert_array_equal(outputs[0], output)


def network(f):
    """Makes a network of every layer that batchensemble converts."""
    if f is nn:
        norms = [nn.BatchNorm2d(6), nn.LayerNorm(6), nn.GroupNorm(3, 6)]
        convs = [nn.Conv2d(6, 6, 3, groups=2), nn.ConvTranspose2d(6, 6, 3, stride=2, padding=1)]
        recurrent = [
            nn.LSTM(6, 5, batch_first=True),
            nn.GRU(6, 5, batch_first=True),
            nn.LSTMCell(6, 5),
            nn.GRUCell(6, 5),
        ]
        others = [
            nn.Linear(6, 5),
            nn.Embedding(7, 6),
            nn.MultiheadAttention(6, 3, batch_first=True),
            nn.GELU(),
            nn.Dropout(),
        ]
        return nn.Sequential(*norms, *convs, *recurrent, *others)
    rngs = nnx.Rngs(0)
    norms = [nnx.BatchNorm(6, momentum=0.9, rngs=rngs), nnx.LayerNorm(6, epsilon=1e-5, rngs=rngs)]
    norms += [nnx.GroupNorm(6, 3, epsilon=1e-5, rngs=rngs)]
    convs = [nnx.Conv(6, 6, (3, 3), padding=0, feature_group_count=2, rngs=rngs)]
    convs += [nnx.ConvTranspose(6, 6, (3, 3), strides=2, padding=1, transpose_kernel=True, rngs=rngs)]
    cells = [nnx.OptimizedLSTMCell(6, 5, rngs=rngs), nnx.GRUCell(6, 5, rngs=rngs)]
    recurrent = [nnx.RNN(cells[0]), nnx.RNN(cells[1]), *nnx.clone(cells)]
    others = [nnx.Linear(6, 5, rngs=rngs), nnx.Embed(7, 6, rngs=rngs)]
    others += [nnx.MultiHeadAttention(3, 6, decode=False, rngs=rngs), partial(nnx.gelu, approximate=False)]
    return nnx.Sequential(*norms, *convs, *recurrent, *others, nnx.Dropout(0.5, rngs=rngs))


def test_members_have_the_options_of_one_network():
    ours, theirs = network(nn), nnx.eval_shape(lambda: network(nnx))
    one = options(ours)
    assert not differences(theirs, one)
    assert not differences(ours, options(theirs))
    assert options(pt.ensemble(ours, 3)) == one
    assert options(nnx.eval_shape(lambda: pf.ensemble(network(nnx), 3))) == options(theirs)

    batched = pt.batchensemble(ours, 3, per_member_norms=True)
    twin = nnx.eval_shape(lambda: pf.batchensemble(network(nnx), 3, per_member_norms=True))
    assert not differences(twin, options(batched))
    assert not differences(batched, options(twin))
    for model, plain in ((batched, one), (twin, options(theirs))):
        members = {path.removeprefix("network."): each for path, each in options(model).items()}
        assert {path for path, each in members.items() if "num_members" not in each} == {"12"}  # GELU
        assert {path: each | {"num_members": 3} for path, each in plain.items() if path != "12"} == {
            path: each for path, each in members.items() if path != "12"
        }


class TorchBlock(nn.Module):
    """Activations kept as modules and as functions, a layer held twice, and containers."""

    def __init__(self):
        super().__init__()
        self.act, self.gelu = functional.silu, partial(functional.gelu, approximate="tanh")
        self.unknown = lambda x: x
        self.blocks = nn.ModuleList([nn.LayerNorm(5), nn.ReLU()])
        self.by_name = nn.ModuleDict({"tanh": nn.Tanh(), "again": self.blocks[0]})


class FlaxBlock(nnx.Module):
    """The twin."""

    def __init__(self, rngs):
        self.act, self.gelu = nnx.silu, nnx.gelu
        self.unknown = lambda x: x
        self.blocks = nnx.List([nnx.LayerNorm(5, epsilon=1e-5, rngs=rngs), nnx.relu])
        self.by_name = nnx.Dict({"tanh": nnx.tanh, "again": self.blocks[0]})


def test_containers_attributes_and_functions_are_searched():
    ours, theirs = TorchBlock(), FlaxBlock(nnx.Rngs(0))
    paths = {"act", "gelu", "blocks.0", "blocks.1", "by_name.tanh", "by_name.again"}
    assert options(ours).keys() == options(theirs).keys() == paths
    assert not differences(ours, options(theirs))
    assert not differences(theirs, options(ours))
    theirs.blocks[0].epsilon, ours.act = 1e-6, functional.relu
    assert differences(theirs, options(ours)) == [
        "act: SiLU here, ReLU in the file; nnx.relu",
        "blocks.0: epsilon 1e-06 here, 1e-05 in the file; nnx.LayerNorm(..., epsilon=1e-05)",
        "by_name.again: epsilon 1e-06 here, 1e-05 in the file; nnx.LayerNorm(..., epsilon=1e-05)",
    ]


def test_layers_in_layers_have_the_paths_of_their_weights():
    ours = nn.utils.parametrizations.weight_norm(nn.Linear(5, 3))
    theirs = nnx.WeightNorm(flax(nnx.Linear, 5, 3)(), use_scale=False, rngs=nnx.Rngs(0))
    assert options(ours) == options(theirs) == {"": {"kind": "Linear", "bias": True}}
    lora = flax(nnx.LoRALinear, 5, 3, lora_rank=2)()
    wrapped = flax(nnx.LoRA, 5, 2, 3, base_module=flax(nnx.Linear, 5, 3)())()
    assert options(lora) == options(wrapped) == {"base_layer": {"kind": "Linear", "bias": True}}


LONG = "x" * 10**5


def told(model, recorded):
    """Returns what a warning lists of a record."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert not differences(model, recorded)
    if not caught:
        return []
    (sentence,) = [str(each.message) for each in caught]
    first, *lines, last = sentence.splitlines()
    assert re.search(r"; got \d+ that are not, and may compute something else here:$", first)
    assert last.endswith("pass check_options=False.")
    return [line.removeprefix("  ") for line in lines]


def test_what_one_side_does_not_know_is_not_compared():
    ours, theirs = nn.Sequential(nn.GELU(), nn.LayerNorm(5)), nnx.Sequential(lambda x: nnx.gelu(x))
    assert options(theirs) == {}
    assert not told(ours, options(theirs))
    assert not told(ours, {"1": {"kind": "LayerNorm"}, "0": {"eps": 3, "kind": "SwiGLU"}, "5": {"kind": "SwiGLU"}})
    assert not told(ours, {"1": {"eps": 1e-5, "colour": 3, "momentum": 7}})


class OwnNorm(nn.Module):
    """With torch's names, and an epsilon that only it knows."""

    def __init__(self):
        super().__init__()
        self.norm = nn.ParameterDict({"weight": torch.ones(5), "bias": torch.ones(5)})


class FlaxMethod(nnx.Module):
    """Calls a function that it does not hold."""

    def __init__(self, **functions):
        vars(self).update(functions)

    def __call__(self, x):
        return nnx.gelu(x)


class TorchMethod(nn.Module):
    """The twin."""

    def forward(self, x):
        return functional.gelu(x)


GELU_LINE = "{}: GELU of approximate 'none'; partial(nnx.gelu, approximate=False)"
UNKNOWN = {
    "a GELU in a function": (
        lambda: nnx.Sequential(lambda x: nnx.gelu(x)),
        lambda: nn.Sequential(nn.GELU()),
        [GELU_LINE.format("'0'")],
    ),
    "a GELU in a function, with its option": (
        lambda: nnx.Sequential(lambda x: nnx.gelu(x, approximate=False), lambda x: nnx.gelu(x, False)),
        lambda: nn.Sequential(nn.GELU(), nn.GELU()),
        [],
    ),
    "a GELU in a method": (FlaxMethod, lambda: nn.ModuleDict({"act": nn.GELU()}), [GELU_LINE.format("'act'")]),
    "a GELU in a module": (
        lambda: nnx.Dict({"act": FlaxMethod()}),
        lambda: nn.ModuleDict({"act": nn.GELU()}),
        [GELU_LINE.format("'act'")],
    ),
    "a GELU in a method, of tanh as nnx has it": (FlaxMethod, lambda: nn.ModuleDict({"act": nn.GELU("tanh")}), []),
    "a GELU in a method, as torch has it": (
        TorchMethod,
        lambda: nnx.Dict({"act": partial(nnx.gelu, approximate=False)}),
        [],
    ),
    "a GELU of tanh in torch": (
        TorchMethod,
        lambda: nnx.Dict({"act": nnx.gelu}),
        ["'act': GELU of approximate 'tanh'; nn.GELU(..., approximate='tanh')"],
    ),
    "a GELU somewhere": (lambda: nnx.Dict({}), lambda: nn.ModuleDict({"act": nn.GELU()}), []),
    "a GELU of another name": (
        lambda: FlaxMethod(gelu=partial(nnx.gelu, approximate=False)),
        lambda: nn.ModuleDict({"act": nn.GELU()}),
        [],
    ),
    "a slope": (
        lambda: nnx.Dict({"act": lambda x: nnx.leaky_relu(x), "default": lambda x: nnx.leaky_relu(x)}),
        lambda: nn.ModuleDict({"act": nn.LeakyReLU(0.2), "default": nn.LeakyReLU(), "relu": nn.ReLU()}),
        ["'act': LeakyReLU of negative_slope 0.2; partial(nnx.leaky_relu, negative_slope=0.2)"],
    ),
    "an end of a Sequential": (
        lambda: nnx.Dict({"net": nnx.Sequential(lambda x: x)}),
        lambda: nn.ModuleDict({"net": nn.Sequential(nn.Tanh(), nn.ReLU(), nn.Identity(), nn.Dropout())}),
        ["'net.1': ReLU; nnx.relu"],
    ),
    "an end of torch's": (
        lambda: nn.ModuleDict({"net": nn.Sequential(nn.Sequential(nn.Identity()))}),
        lambda: nnx.Dict({"net": nnx.Sequential(nnx.Sequential(lambda x: x, nnx.silu))}),
        ["'net.0.1': SiLU; nn.SiLU(...)"],
    ),
    "no Sequential": (
        lambda: nnx.Dict({"net": nnx.List([])}),
        lambda: nn.ModuleDict({"net": nn.Sequential(nn.Tanh(), nn.ReLU())}),
        [],
    ),
    "a norm without weights": (
        lambda: nnx.Dict({"other": flax(nnx.LayerNorm, 5, use_scale=False, use_bias=False)()}),
        lambda: nn.ModuleDict({"norm": nn.LayerNorm(5, elementwise_affine=False)}),
        ["'norm': LayerNorm of eps 1e-05, axes [-1]"],
    ),
    "a norm without weights, of another name": (
        lambda: nnx.Dict({"other": flax(nnx.LayerNorm, 5, use_scale=False, use_bias=False, epsilon=1e-5)()}),
        lambda: nn.ModuleDict({"norm": nn.LayerNorm(5, elementwise_affine=False)}),
        [],
    ),
    "a norm that is no layer here": (
        OwnNorm,
        lambda: nnx.Dict({"norm": flax(nnx.LayerNorm, 5)()}),
        ["'norm': LayerNorm of eps 1e-06, axes [-1], feature_axes [-1]"],
    ),
    "a layer that names say all of": (OwnNorm, lambda: nnx.Dict({"norm": flax(nnx.Linear, 5, 3)()}), []),
    "a layer that is not here": (OwnNorm, lambda: nnx.Dict({"other": flax(nnx.LayerNorm, 5)()}), []),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_what_is_likely_to_differ_unseen_is_told(name):
    model, recorded, lines = UNKNOWN[name]
    assert told(model(), options(recorded())) == lines


@pytest.mark.parametrize("batch_first", [False, True])
def test_stacked_layers_that_become_several_are_compared(batch_first, tmp_path):
    pt.save_weights(nn.ModuleDict({"rnn": nn.LSTM(5, 5, num_layers=2, batch_first=batch_first)}), tmp_path / "w")
    cells = [nnx.OptimizedLSTMCell(5, 5, rngs=nnx.Rngs(0)) for _ in range(2)]
    theirs = nnx.Dict({"rnn": nnx.List(map(nnx.RNN, cells))})
    rename = {r"(\w+_[ih]h)_l(\d)": r"\2.\1_l0"}
    if batch_first:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            pf.load_weights(theirs, tmp_path / "w", rename=rename)
    else:
        with pytest.raises(ValueError, match=r"rnn\.1: time_major False here, True in the file"):
            pf.load_weights(theirs, tmp_path / "w", rename=rename)


def test_what_is_told_of_a_file_is_short():
    hostile = {f"{i}{LONG}": {"kind": "GELU", "approximate": "tanh", LONG: LONG} for i in range(10**3)}
    (first, *_, last) = lines = told(TorchMethod(), hostile)
    assert (len(lines), last) == (21, "...")
    assert len(first) < 100


def test_options_go_where_the_weights_go():
    stacked = {"rnn": {"kind": "LSTM", "num_layers": 2, "batch_first": False}}
    names = [f"rnn.{part}_l{i}" for part in ("bias_ih", "bias_hh", "weight_ih", "weight_hh") for i in (0, 1)]
    rename = {r"(\w+_[ih]h)_l(\d)": r"\2.\1_l0"}
    one = {"kind": "LSTM", "num_layers": 1, "batch_first": False}
    assert renamed_paths("load", stacked, rename, (), names) == {"rnn.0": one, "rnn.1": one}
    assert renamed_paths("load", stacked, rename, "rnn.1.*", names) == {"rnn.0": one}
    assert renamed_paths("load", stacked, None, (), names) == stacked
    assert renamed_paths("load", stacked, {"^rnn": "a.b"}, (), names) == {"a.b": stacked["rnn"]}

    norm = {"norm": {"kind": "LayerNorm"}, "act": {"kind": "GELU"}, "out": {"kind": "Linear"}}
    names = ["norm.bias", "norm.weight", "out.weight", "other.weight"]
    assert renamed_paths("load", norm, None, "norm.weight", names) == norm
    assert renamed_paths("load", norm, None, ["norm.*", "act"], names) == {"out": norm["out"]}
    assert renamed_paths("load", norm, {"^norm": "act"}, (), names)["act"] == norm["norm"]
    assert renamed_paths("load", norm, {r"^norm\.(weight|bias)": r"x.y.\1"}, (), names)["x.y"] == norm["norm"]
    assert renamed_paths("load", {"": one}, {"^": "net."}, (), ["weight_ih_l0"]) == {"net": one}
    assert renamed_paths("load", {"a": one}, {r"^a\.": "b.c."}, (), ["a.out_proj.weight", "a.in_proj_bias"]) == {
        "b.c": one
    }


def test_layers_of_classes_made_in_another_way_are_unknown():
    class TorchNorm(nn.LayerNorm):
        def __init__(self):
            nn.Module.__init__(self)

    class FlaxNorm(nnx.LayerNorm):
        def __init__(self):
            self.unlike = 3

    assert options(TorchNorm()) == options(FlaxNorm()) == {}


def test_layers_are_called_by_names_that_exist():
    for kind in KINDS.keys() - _LACKING:
        for words, names in ((TORCH, {"nn": nn}), (FLAX, {"nnx": nnx, "jax": jax})):
            called = words.advice(kind, {}).replace("1d/2d/3d", "1d").partition("(")[0]
            assert callable(eval(called, names)), called


CONVOLUTION = [nn.Conv2d(3, 7, 3), nn.BatchNorm2d(7), nn.ReLU()]


@pytest.mark.parametrize(
    ("layers", "path", "channels"),
    [
        ([*CONVOLUTION, nn.MaxPool2d(2), nn.Flatten(), nn.Dropout(), nn.Linear(28, 5), nn.Linear(5, 2)], "6", 7),
        ([nn.Sequential(*CONVOLUTION), nn.Sequential(nn.Flatten(), nn.Linear(28, 5))], "1.1", 7),
        ([nn.Conv1d(3, 4, 3), nn.AdaptiveMaxPool1d(2), nn.Flatten(1), nn.Linear(8, 5)], "3", 4),
        ([nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(12, 5)], "2", 3),
        ([*CONVOLUTION, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(7, 5)], None, None),
        ([*CONVOLUTION, nn.AdaptiveAvgPool2d((1, 1)), nn.Flatten(), nn.Linear(7, 5)], None, None),
        ([*CONVOLUTION, nn.Flatten(2), nn.Linear(4, 5)], None, None),
        ([*CONVOLUTION, nn.Linear(2, 5)], None, None),
        ([*CONVOLUTION, nn.Flatten(1, 3), nn.Linear(28, 5)], "4", 7),
        ([*CONVOLUTION, nn.Flatten(-3, -1), nn.Linear(28, 5)], "4", 7),
        ([*CONVOLUTION, nn.Flatten(1, 2), nn.Linear(4, 5)], None, None),
        ([nn.Conv1d(3, 4, 3), nn.Flatten(1, 2), nn.Linear(8, 5)], "2", 4),
        ([*CONVOLUTION, nn.PixelShuffle(1), nn.Flatten(), nn.Linear(28, 5)], "5", 0),
        ([*CONVOLUTION, TorchBlock(), nn.Flatten(), nn.Linear(28, 5)], "5", 0),
        ([*CONVOLUTION, nn.Flatten(), TorchBlock(), nn.Linear(28, 5)], "5", 0),
        ([TorchBlock(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(28, 5)], None, None),
        ([nn.AdaptiveAvgPool2d(1), nn.LayerNorm([7, 1, 1]), nn.Flatten(), nn.Linear(7, 5)], None, None),
        ([nn.Flatten(), nn.Linear(28, 5), nn.ReLU(), nn.Linear(5, 2)], "1", 0),
        ([nn.Linear(2, 4), nn.Flatten(), nn.Linear(28, 5)], "2", 0),
    ],
)
def test_a_linear_layer_that_reads_a_flattened_convolution_says_so(layers, path, channels):
    model = nn.Sequential(*layers)
    for each, prefix in ((model, ""), (nn.ModuleDict({"net": model}), "net.")):
        found = {path: own["flatten_channels"] for path, own in options(each).items() if "flatten_channels" in own}
        assert found == ({} if path is None else {prefix + path: channels})
    assert not differences(model, options(model))


def test_a_normalisation_between_the_two_says_so_too():
    model = nn.Sequential(*CONVOLUTION, nn.Flatten(), nn.BatchNorm1d(28), nn.ReLU(), nn.LayerNorm(28), nn.Linear(28, 5))
    found = {path: own["flatten_channels"] for path, own in options(model).items() if "flatten_channels" in own}
    assert found == {"4": 7, "6": 7, "7": 7}
    assert not differences(model, options(model))


def test_what_is_flattened_in_a_sequential_shows_where_its_forward_does_not():
    conv, linear = nn.Conv2d(3, 7, 3), nn.Linear(28, 5)
    for modules, path, channels in (
        ({"conv": conv, "head": nn.Sequential(nn.Flatten(), linear)}, "head.1", 7),
        ({"conv": nn.Sequential(conv, nn.Flatten()), "head": linear}, "head", 7),
        ({"block": TorchBlock(), "head": nn.Sequential(nn.Flatten(), linear)}, "head.1", 0),
        ({"conv": conv, "pool": nn.AdaptiveAvgPool2d(1), "head": nn.Sequential(nn.Flatten(), linear)}, None, None),
        ({"conv": nn.Sequential(conv, nn.Flatten()), "other": nn.Linear(27, 5)}, None, None),
        ({"conv": conv, "head": linear}, None, None),
        ({"convs": nn.ModuleList([conv, nn.Conv2d(3, 7, 5)]), "head": linear}, None, None),
    ):
        own = options(nn.ModuleDict(modules))
        found = {path: each["flatten_channels"] for path, each in own.items() if "flatten_channels" in each}
        assert found == ({} if path is None else {path: channels}), modules


HOSTILE = {
    "a list": [],
    "a text": LONG,
    "options that are none": {"0": LONG},
    "an epsilon that is a text": {"0": {"eps": LONG}},
    "an epsilon that is infinite": {"0": {"eps": float("inf")}},
    "an epsilon that is no number": {"0": {"eps": float("nan")}},
    "an epsilon that is huge": {"0": {"eps": 10**5000}},
    "a flag for a number": {"0": {"eps": True}},
    "axes without end": {"0": {"axes": list(range(10**5))}},
    "no axes": {"0": {"axes": []}},
    "code": {"0": {"eps": "__import__('os').abort()"}},
    "an activation of another kind": {"1": {"approximate": "__class__"}},
    "nested without end": {"0": {"axes": json.loads("[" * 500 + "]" * 500)}},
    "padding of three axes": {"2": {"padding": [[0, 0]] * 3, "kind": "Conv2d"}},
    "padding of one side": {"2": {"padding": [[0], [0]], "kind": "Conv2d"}},
}


@pytest.mark.parametrize("name", HOSTILE)
def test_what_a_file_says_is_untrusted(name):
    models = (
        nn.Sequential(nn.LayerNorm(5), nn.GELU(), nn.Conv2d(3, 4, 3)),
        nnx.Sequential(flax(nnx.LayerNorm, 5)(), nnx.gelu, flax(nnx.Conv, 3, 4, (3, 3))()),
    )
    first, second = (outcome(model, HOSTILE[name]) for model in models)
    assert first == second
    assert re.fullmatch(r"(?s)load_weights expects .{,400}; got .{,400}check_options=False\.", first)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from([*"0123", "kind", "eps", "padding"]), inner)
    ),
    max_leaves=8,
)


@settings(max_examples=60, deadline=None)
@given(
    st.dictionaries(
        st.sampled_from("0123"),
        st.dictionaries(st.sampled_from(["kind", *{name for each in KINDS.values() for name in each}]), JSON),
    )
    | JSON
)
def test_no_record_makes_another_error_than_a_sentence(recorded):
    for model in FUZZED:
        sentence = outcome(model, recorded)
        assert sentence is None or re.fullmatch(r"(?s)load_weights expects .*; got .*check_options=False\.", sentence)


FUZZED = (
    nn.Sequential(nn.LayerNorm(5), nn.BatchNorm1d(3), nn.Conv2d(3, 4, 3), nn.ConvTranspose1d(3, 4, 3)),
    nnx.Sequential(
        *(flax(nnx.LayerNorm, 5)(), flax(nnx.BatchNorm, 3)(), flax(nnx.Conv, 3, 4, (3, 3))()),
        flax(nnx.ConvTranspose, 3, 4, 3)(),
    ),
)
