"""Weights of every layer that has a twin: names, layouts, bit for bit in every dtype, and the same function."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import linen, nnx
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

import probly_flax as pf
import probly_torch as pt
from parity_tests import standard
from parity_tests.kit.trees import jax_of
from parity_tests.standard import assert_close
from probly_flax import _layouts

DTYPES = ("float64", "float32", "float16", "bfloat16")
MEMBERS = 3


def last(x):
    """Moves channels last, as nnx has them."""
    return jnp.moveaxis(x, 1, -1)


def first(y):
    return jnp.moveaxis(y, -1, 1)


@dataclass(frozen=True)
class Twins:
    """A layer in both frameworks, as functions of a dtype, and how each is called on an input in torch's layout."""

    name: str
    torch: Callable[[Any], nn.Module]
    flax: Callable[[Any], nnx.Module]
    x: tuple[int, ...]
    run_torch: Callable[[Any, Any], Any] = lambda layer, x: layer(x)
    run_flax: Callable[[Any, Any], Any] = lambda layer, x: layer(x)
    tokens: bool = False

    def __str__(self) -> str:
        return self.name

    def layers(self, dtype: str) -> tuple[nn.Module, nnx.Module]:
        """Makes torch's layer with random weights, and nnx's without any."""
        ours = randomize(self.torch({"dtype": getattr(torch, dtype)})).eval()
        options = {"param_dtype": jnp.dtype(dtype)}
        return ours, nnx.eval_shape(lambda: self.flax(options | {"rngs": nnx.Rngs(0)}))

    def input(self) -> np.ndarray:
        rng = np.random.default_rng(0)
        return rng.integers(0, 7, self.x) if self.tokens else rng.standard_normal(self.x)


def randomize(model: nn.Module) -> nn.Module:
    """Draws distinct values everywhere, with positive variances.

    A GRU's bias for n, which nnx lacks, gets zeros.
    """
    for i, (name, value) in enumerate(model.state_dict().items()):
        if value.is_floating_point():
            values = torch.randn(value.shape, generator=torch.Generator().manual_seed(i), dtype=torch.float64)
            values = values.abs() + 0.5 if name.endswith("running_var") else values
            keep = name.rpartition(".")[2].startswith("bias_hh") and not getattr(model, "two_biases", False)
            value.copy_(torch.zeros_like(value) if keep else values)
    return model


def two_biases(model):
    model.two_biases = True
    return model


class StackedLinear(nn.Module):
    """E Linear layers by stacked weights, as torch.func.stack_module_state has them."""

    def __init__(self, inputs, outputs, dtype):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(MEMBERS, outputs, inputs, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(MEMBERS, outputs, dtype=dtype))

    def forward(self, x):
        return x @ self.weight.mT + self.bias[:, None]


class TorchUser(nn.Module):
    """Parameters, buffers and containers of a user."""

    def __init__(self, dtype):
        super().__init__()
        self.scale = nn.Parameter(torch.zeros(5, dtype=dtype))
        self.matrix = nn.Parameter(torch.zeros(4, 4, dtype=dtype))
        self.register_buffer("offset", torch.zeros(4, dtype=dtype))
        self.slopes = nn.ParameterList([torch.zeros(4, dtype=dtype), torch.zeros((), dtype=dtype)])
        self.layers = nn.ModuleList([nn.Linear(5, 4, dtype=dtype), nn.Linear(4, 4, dtype=dtype)])
        self.heads = nn.ModuleDict({"main": nn.Sequential(nn.Linear(4, 4, bias=False, dtype=dtype), nn.Tanh())})
        self.tied = self.layers[1]

    def forward(self, x):
        x = self.layers[0](x * self.scale) @ self.matrix + self.offset
        x = x * self.slopes[0] + self.slopes[1]
        return self.tied(self.heads["main"](self.layers[1](x)))


class Buffer(nnx.Variable):
    """A tensor that register_buffer keeps."""


class FlaxUser(nnx.Module):
    """The twin."""

    def __init__(self, param_dtype, rngs):
        def zeros(*shape):
            return jnp.zeros(shape, param_dtype)

        def linear(*sizes, **options):
            return nnx.Linear(*sizes, **options, param_dtype=param_dtype, rngs=rngs)

        self.scale = nnx.Param(zeros(5))
        self.matrix = nnx.Param(zeros(4, 4))
        self.offset = Buffer(zeros(4))
        self.slopes = nnx.List([nnx.Param(zeros(4)), nnx.Param(zeros())])
        self.layers = nnx.List([linear(5, 4), linear(4, 4)])
        self.heads = nnx.Dict(
            {"main": nnx.Sequential(linear(4, 4, use_bias=False), nnx.Dropout(0.5, rngs=rngs), nnx.tanh)}
        )
        self.tied = self.layers[1]

    def __call__(self, x):
        x = self.layers[0](x * self.scale[None]) @ self.matrix[...] + self.offset[None]
        x = x * self.slopes[0][None] + self.slopes[1][None, None]
        head = self.heads["main"].layers
        return self.tied(head[2](head[0](self.layers[1](x))))


class Peft(nn.Module):
    """A Linear layer as peft makes it, where lora_alpha is r."""

    def __init__(self, dtype, base=True):
        super().__init__()
        self.base_layer = nn.Linear(5, 4, dtype=dtype) if base else None
        self.lora_A = nn.ModuleDict({"default": nn.Linear(5, 2, bias=False, dtype=dtype)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(2, 4, bias=False, dtype=dtype)})

    def forward(self, x):
        y = self.lora_B["default"](self.lora_A["default"](x))
        return y if self.base_layer is None else self.base_layer(x) + y


def cell(kind, inputs, hidden, both=False, rngs=None, **options):
    """Makes an nnx cell. With both biases, it is as torch's have them."""
    extra = {"dtype": options["param_dtype"]} if kind is nnx.SimpleCell else {}
    init = nnx.initializers.lecun_normal()  # orthogonal, the default, is for float32 and float64 alone
    made = kind(inputs, hidden, recurrent_kernel_init=init, rngs=rngs, **options, **extra)
    if both:
        gates = {nnx.GRUCell: 3, nnx.SimpleCell: 1}.get(kind, 4)
        for name, size in (("dense_i", inputs), ("dense_h", hidden)):
            setattr(made, name, nnx.Linear(size, gates * hidden, rngs=rngs, **options))
    return made


STATE = np.linspace(-1, 2, 4)  # of 4 hidden features, in every row


def carry_of(layer, x):
    """Returns the state, and its negative as c."""
    h = jax_of(np.tile(STATE, (len(x), 1)))
    return (-h, h) if isinstance(layer, (nnx.LSTMCell, nnx.OptimizedLSTMCell)) else h


def run_cell(layer, x):
    return layer(carry_of(layer, x), x)[1]


def run_torch_cell(layer, x):
    h = torch.tensor(np.tile(STATE, (len(x), 1)))
    return layer(x, (h, -h))[0] if "LSTM" in type(layer).__name__ else layer(x, h)


def run_rnn(layer, x):
    return layer(x, initial_carry=jax.tree.map(jnp.zeros_like, carry_of(layer.cell, x)))


def run_bidirectional(layer, x):
    carries = tuple(
        jax.tree.map(jnp.zeros_like, carry_of(rnn.cell, x)) for rnn in (layer.forward_rnn, layer.backward_rnn)
    )
    return layer(x, initial_carry=carries)


RNNS = {"LSTM": nn.LSTM, "GRU": nn.GRU, "RNN": nn.RNN}
CELLS = {"LSTM": nn.LSTMCell, "GRU": nn.GRUCell, "RNN": nn.RNNCell}
KINDS = [
    ("LSTM", nnx.OptimizedLSTMCell, False),
    ("LSTM", nnx.LSTMCell, False),
    ("LSTM", nnx.OptimizedLSTMCell, True),
    ("GRU", nnx.GRUCell, False),
    ("GRU", nnx.GRUCell, True),
    ("RNN", nnx.SimpleCell, False),
]


def maybe(both, model):
    return two_biases(model) if both else model


def recurrent_twins():
    for kind, flax_kind, both in KINDS:
        name = f"{flax_kind.__name__}{'-both' * both}"
        yield Twins(
            f"{kind}Cell-{name}",
            lambda o, kind=kind, both=both: maybe(both, CELLS[kind](5, 4, **o)),
            lambda o, flax_kind=flax_kind, both=both: cell(flax_kind, 5, 4, both, **o),
            (3, 5),
            run_torch_cell,
            run_cell,
        )
    for kind, flax_kind, both in (KINDS[1], KINDS[3], KINDS[5]):
        yield Twins(
            f"{kind}-{flax_kind.__name__}",
            lambda o, kind=kind, both=both: maybe(both, RNNS[kind](4, 4, batch_first=True, **o)),
            lambda o, flax_kind=flax_kind, both=both: nnx.RNN(cell(flax_kind, 4, 4, both, **o)),
            (3, 5, 4),
            lambda layer, x: layer(x)[0],
            run_rnn,
        )
    yield Twins(
        "Bidirectional-GRU",
        lambda o: two_biases(nn.GRU(4, 4, batch_first=True, bidirectional=True, **o)),
        lambda o: nnx.Bidirectional(*(nnx.RNN(cell(nnx.GRUCell, 4, 4, True, **o)) for _ in range(2))),
        (3, 5, 4),
        lambda layer, x: layer(x)[0],
        run_bidirectional,
    )
    yield Twins(
        "BatchEnsembleLSTM",
        lambda o: pt.layers.BatchEnsembleLSTM(nn.LSTM(5, 4, batch_first=True, **o), num_members=MEMBERS),
        lambda o: pf.layers.BatchEnsembleLSTM(nnx.RNN(cell(nnx.OptimizedLSTMCell, 5, 4, **o)), num_members=MEMBERS),
        (6, 3, 5),
        lambda layer, x: layer(x)[0],
        run_rnn,
    )
    for kind, flax_kind, both in (KINDS[0], KINDS[4]):
        yield Twins(
            f"BatchEnsemble{kind}Cell{'-both' * both}",
            lambda o, kind=kind, both=both: maybe(
                both, getattr(pt.layers, f"BatchEnsemble{kind}Cell")(CELLS[kind](5, 4, **o), num_members=MEMBERS)
            ),
            lambda o, kind=kind, flax_kind=flax_kind, both=both: getattr(pf.layers, f"BatchEnsemble{kind}Cell")(
                cell(flax_kind, 5, 4, both, **o), num_members=MEMBERS
            ),
            (6, 5),
            run_torch_cell,
            run_cell,
        )


def attend_torch(layer, x):
    return layer(*parts(x), need_weights=False)[0]


def parts(x):
    """Returns queries, keys and values of their own sizes and lengths, from one input."""
    return x[:, :, :6], x[:, 1:, 6:], x[:, 1:, 6:] * 2


def attend_flax(layer, x):
    return layer(*parts(x), deterministic=True)


def attention(o, kv=6, **options):
    """Makes attention with dropout, since the softmax is float32 in nnx's path without."""
    return nnx.MultiHeadAttention(2, 6, in_kv_features=kv, decode=False, dropout_rate=0.5, **options, **o)


def norm(kind, *sizes, **options):
    return lambda o: kind(*sizes, epsilon=1e-5, use_fast_variance=False, **options, **o)


def conv_flax(kind, *sizes, **options):
    return lambda o: kind(*sizes, **options, **o)


def channels_last(layer, x):
    return first(layer(last(x)))


TWO_AXES = {
    "reduction_axes": (-2, -1),
    "feature_axes": (-2, -1),
    "scale_metadata": {"torch_shape": (3, 5), "torch_axes": (-2, -1)},
}
IMAGE = {
    "reduction_axes": (-3, -2, -1),
    "feature_axes": (-3, -2, -1),
    "scale_metadata": {"torch_shape": (2, 3, 5), "torch_axes": (-1, -3, -2)},
    "bias_metadata": {"torch_shape": (2, 3, 5), "torch_axes": (-1, -3, -2)},
}
TWINS = [
    Twins("Linear", lambda o: nn.Linear(5, 3, **o), lambda o: nnx.Linear(5, 3, **o), (2, 5)),
    Twins("Linear-square", lambda o: nn.Linear(4, 4, **o), lambda o: nnx.Linear(4, 4, **o), (2, 4)),
    Twins(
        "Linear-no-bias",
        lambda o: nn.Linear(4, 4, bias=False, **o),
        lambda o: nnx.Linear(4, 4, use_bias=False, **o),
        (2, 4),
    ),
    Twins(
        "LinearGeneral-outputs",
        lambda o: nn.Linear(6, 6, **o),
        lambda o: nnx.LinearGeneral(6, (2, 3), **o),
        (5, 6),
        lambda layer, x: layer(x).reshape(5, 2, 3),
    ),
    Twins(
        "LinearGeneral-inputs",
        lambda o: nn.Linear(6, 6, **o),
        lambda o: nnx.LinearGeneral((2, 3), 6, axis=(-2, -1), **o),
        (5, 2, 3),
        lambda layer, x: layer(x.reshape(5, 6)),
    ),
    Twins(
        "LinearGeneral-both",
        lambda o: nn.Linear(6, 6, bias=False, **o),
        lambda o: nnx.LinearGeneral((2, 3), (3, 2), axis=(-2, -1), use_bias=False, **o),
        (5, 2, 3),
        lambda layer, x: layer(x.reshape(5, 6)).reshape(5, 3, 2),
    ),
    Twins(
        "LinearGeneral-stacked",
        lambda o: StackedLinear(4, 4, **o),
        lambda o: nnx.LinearGeneral(4, 4, batch_axis={0: MEMBERS}, **o),
        (MEMBERS, 2, 4),
    ),
    Twins(
        "Einsum",
        lambda o: nn.Linear(4, 4, **o),
        lambda o: nnx.Einsum("...i,io->...o", (4, 4), (4,), **o),
        (2, 5, 4),
    ),
    Twins(
        "Einsum-transposed",
        lambda o: nn.Linear(4, 4, **o),
        lambda o: nnx.Einsum("bi,oi->bo", (4, 4), (4,), **o),
        (2, 4),
    ),
    Twins(
        "Einsum-axes",
        lambda o: nn.Linear(6, 6, **o),
        lambda o: nnx.Einsum("bij,qjpi->bpq", (2, 3, 3, 2), (3, 2), **o),
        (5, 2, 3),
        lambda layer, x: layer(x.reshape(5, 6)).reshape(5, 3, 2),
    ),
    Twins(
        "Einsum-stacked",
        lambda o: StackedLinear(4, 4, **o),
        lambda o: nnx.Einsum("ebi,eio->ebo", (MEMBERS, 4, 4), (MEMBERS, 1, 4), **o),
        (MEMBERS, 2, 4),
    ),
    Twins(
        "Einsum-stacked-last",
        lambda o: StackedLinear(4, 4, **o),
        lambda o: nnx.Einsum("ebi,oie->boe", (4, 4, MEMBERS), (4, MEMBERS), **o),
        (MEMBERS, 2, 4),
        lambda layer, x: layer(x).permute(1, 2, 0),
    ),
    Twins(
        "Conv1d",
        lambda o: nn.Conv1d(4, 4, 4, padding=2, **o),
        lambda o: nnx.Conv(4, 4, (4,), padding=2, **o),
        (2, 4, 7),
        run_flax=channels_last,
    ),
    Twins(
        "Conv2d-groups",
        lambda o: nn.Conv2d(4, 6, (3, 3), stride=2, groups=2, padding=1, **o),
        lambda o: nnx.Conv(4, 6, (3, 3), strides=2, feature_group_count=2, padding=1, **o),
        (2, 4, 7, 6),
        run_flax=channels_last,
    ),
    Twins(
        "Conv2d-square",
        lambda o: nn.Conv2d(3, 3, (3, 3), **o),
        lambda o: nnx.Conv(3, 3, (3, 3), padding=0, **o),
        (2, 3, 5, 6),
        run_flax=channels_last,
    ),
    Twins(
        "Conv2d-depthwise",
        lambda o: nn.Conv2d(3, 3, (2, 2), groups=3, bias=False, **o),
        lambda o: nnx.Conv(3, 3, (2, 2), feature_group_count=3, padding=0, use_bias=False, **o),
        (2, 3, 5, 4),
        run_flax=channels_last,
    ),
    Twins(
        "Conv3d",
        lambda o: nn.Conv3d(2, 2, (2, 2, 2), **o),
        lambda o: nnx.Conv(2, 2, (2, 2, 2), padding=0, **o),
        (2, 2, 4, 3, 5),
        run_flax=channels_last,
    ),
    *(
        Twins(
            f"ConvTranspose{n}d-{'transposed' if transposed else 'flipped'}",
            lambda o, n=n: (nn.ConvTranspose1d if n == 1 else nn.ConvTranspose2d)(3, 3, 3, stride=2, padding=1, **o),
            lambda o, n=n, transposed=transposed: nnx.ConvTranspose(
                3, 3, (3,) * n, strides=(2,) * n, padding=[(1, 1)] * n, transpose_kernel=transposed, **o
            ),
            (2, 3, 5, 4)[: n + 2],
            run_flax=channels_last,
        )
        for n, transposed in ((1, True), (2, False))
    ),
    Twins("Embedding", lambda o: nn.Embedding(7, 7, **o), lambda o: nnx.Embed(7, 7, **o), (3, 4), tokens=True),
    Twins(
        "BatchNorm1d",
        lambda o: nn.BatchNorm1d(5, **o),
        lambda o: nnx.BatchNorm(5, use_running_average=True, use_fast_variance=False, **o),
        (4, 5),
    ),
    Twins(
        "BatchNorm2d-not-affine",
        lambda o: nn.BatchNorm2d(5, affine=False, **o),
        lambda o: nnx.BatchNorm(5, use_running_average=True, use_bias=False, use_scale=False, **o),
        (2, 5, 3, 4),
        run_flax=channels_last,
    ),
    Twins("LayerNorm", lambda o: nn.LayerNorm(5, **o), norm(nnx.LayerNorm, 5), (3, 5)),
    Twins(
        "LayerNorm-no-bias", lambda o: nn.LayerNorm(5, bias=False, **o), norm(nnx.LayerNorm, 5, use_bias=False), (3, 5)
    ),
    Twins(
        "LayerNorm-axes",
        lambda o: nn.LayerNorm((3, 5), **o),
        norm(nnx.LayerNorm, 15, **TWO_AXES, bias_metadata=TWO_AXES["scale_metadata"]),
        (2, 3, 5),
    ),
    Twins(
        "LayerNorm-image",
        lambda o: nn.LayerNorm((2, 3, 5), **o),
        norm(nnx.LayerNorm, 30, **IMAGE),
        (7, 2, 3, 5),
        run_flax=channels_last,
    ),
    Twins(
        "GroupNorm",
        lambda o: nn.GroupNorm(2, 6, **o),
        norm(nnx.GroupNorm, 6, num_groups=2),
        (2, 6, 3, 5),
        run_flax=channels_last,
    ),
    Twins(
        "InstanceNorm",
        lambda o: nn.InstanceNorm2d(5, affine=True, **o),
        norm(nnx.InstanceNorm, 5),
        (2, 5, 3, 4),
        run_flax=channels_last,
    ),
    Twins("RMSNorm", lambda o: nn.RMSNorm(5, eps=1e-5, **o), lambda o: nnx.RMSNorm(5, epsilon=1e-5, **o), (3, 5)),
    Twins(
        "RMSNorm-axes",
        lambda o: nn.RMSNorm((3, 5), eps=1e-5, **o),
        lambda o: nnx.RMSNorm(15, epsilon=1e-5, **TWO_AXES, **o),
        (2, 3, 5),
    ),
    Twins("PReLU", lambda o: nn.PReLU(**o), lambda o: nnx.PReLU(param_dtype=o["param_dtype"]), (3, 4)),
    Twins("PReLU-channels", lambda o: nn.PReLU(4, **o), lambda o: prelu(4, o["param_dtype"]), (3, 4)),
    Twins(
        "Attention",
        lambda o: nn.MultiheadAttention(6, 2, batch_first=True, **o),
        attention,
        (2, 5, 12),
        attend_torch,
        attend_flax,
    ),
    Twins(
        "Attention-no-bias",
        lambda o: nn.MultiheadAttention(6, 2, bias=False, batch_first=True, **o),
        lambda o: attention(o, use_bias=False),
        (2, 5, 12),
        attend_torch,
        attend_flax,
    ),
    Twins(
        "Attention-separate",
        lambda o: nn.MultiheadAttention(6, 2, kdim=4, vdim=4, batch_first=True, **o),
        lambda o: attention(o, 4),
        (2, 5, 10),
        attend_torch,
        attend_flax,
    ),
    *recurrent_twins(),
    Twins("LoRA", lambda o: Peft(**o), lambda o: nnx.LoRA(5, 2, 4, base_module=nnx.Linear(5, 4, **o), **o), (3, 5)),
    Twins("LoRA-alone", lambda o: Peft(**o, base=False), lambda o: nnx.LoRA(5, 2, 4, **o), (3, 5)),
    Twins(
        "LoRALinear",
        lambda o: Peft(**o),
        lambda o: nnx.LoRALinear(5, 4, lora_rank=2, lora_param_dtype=o["param_dtype"], **o),
        (3, 5),
    ),
    Twins(
        "WeightNorm-Linear",
        lambda o: weight_norm(nn.Linear(4, 4, **o)),
        lambda o: nnx.WeightNorm(nnx.Linear(4, 4, **o), epsilon=0.0, rngs=o["rngs"]),
        (3, 4),
    ),
    Twins(
        "WeightNorm-Conv",
        lambda o: weight_norm(nn.Conv2d(3, 3, (2, 3), **o)),
        lambda o: nnx.WeightNorm(nnx.Conv(3, 3, (2, 3), padding=0, **o), epsilon=0.0, rngs=o["rngs"]),
        (2, 3, 5, 4),
        run_flax=channels_last,
    ),
    Twins("user", lambda o: TorchUser(**o), lambda o: FlaxUser(**o), (3, 5)),
]


def prelu(channels, dtype):
    layer = nnx.PReLU(param_dtype=dtype)
    layer.negative_slope.set_value(jnp.zeros(channels, dtype))
    return layer


each_pair = pytest.mark.parametrize("twins", TWINS, ids=str)


@each_pair
def test_torch_to_flax_to_torch_is_bit_for_bit(twins):
    for dtype in DTYPES:
        ours, theirs = twins.layers(dtype)
        arrays = pt.to_arrays(ours)
        pf.load_arrays(theirs, arrays)
        back = pf.to_arrays(theirs)
        assert back.keys() == arrays.keys()
        for name, array in arrays.items():
            assert (back[name].dtype, back[name].shape) == (array.dtype, array.shape), name
            assert back[name].tobytes() == array.tobytes(), name
        other = twins.torch({"dtype": getattr(torch, dtype)})
        pt.load_arrays(other, back)
        for name, value in ours.state_dict().items():
            assert torch.equal(other.state_dict()[name], value), name


def outputs(twins):
    """Returns torch's output, nnx's as a function of torch's arrays, and these, all in float64."""
    ours, theirs = twins.layers("float64")
    x, weights = twins.input(), nnx.Not(nnx.RngState)
    with torch.no_grad():
        y = twins.run_torch(ours, torch.tensor(x)).numpy()
    pf.load_arrays(theirs, pt.to_arrays(ours))
    graph, _, rest = nnx.split(theirs, weights, ...)
    run = jax.jit(lambda params: twins.run_flax(nnx.merge(graph, params, rest), jax_of(x)))

    def flax(arrays):
        pf.load_arrays(theirs, arrays)
        with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):  # which nnx's own norms need
            return np.asarray(run(nnx.state(theirs, weights)))

    return y, flax, pt.to_arrays(ours)


def tied(name, array):
    """Adds the other name of the user's layer that has two."""
    return {name: array, name.replace("layers.1", "tied"): array}


def wrong_layouts(arrays):
    """Yields the arrays with one of them in another layout of the same shape: a missed transpose, or swapped axes."""
    for name, array in arrays.items():
        if name in ("num_batches_tracked", "in_proj_bias", "tied.weight", "tied.bias") or not array.any():
            continue  # those that nnx has not, one whose part for keys changes nothing, and others' second names
        for axis in range(array.ndim):
            if array.shape[axis] > 1:
                yield f"{name} reversed along {axis}", arrays | tied(name, np.flip(array, axis))
            for other in range(axis):
                if array.shape[axis] == array.shape[other] > 1:
                    yield f"{name} with {axis} and {other} swapped", arrays | tied(name, array.swapaxes(axis, other))


@each_pair
def test_the_function_is_the_same_and_any_other_layout_is_another(twins):
    y, flax, arrays = outputs(twins)
    assert_close(flax(arrays), y, "float64")
    wrong = dict(wrong_layouts(arrays))
    assert wrong or all(array.size == 1 for array in arrays.values())
    limit = standard.MEANING_LIMIT * standard.NOISE_FLOOR
    assert not [name for name, others in wrong.items() if standard.error(flax(others), y, y, "float64") <= limit]


# Planted faults: each is a rule that a plausible slip would write, and the comparison above has to see it.


def as_it_is(variable, *args, **options):
    return _layouts.as_it_is(variable)


def another_order(rule):
    """Returns the rule with query, key and value, or the gates, from the last."""

    def planted(*variables, **options):
        return rule(*reversed(variables), **options)

    return planted


FAULTS = {
    "Linear-square": ("_permuted", lambda rule: as_it_is),
    "Conv2d-square": ("_permuted", lambda rule: lambda variable, axes: rule(variable, (-2, -1, *axes[2:]))),
    "ConvTranspose2d-flipped": ("_permuted", lambda rule: lambda v, axes: rule(v, (*axes[:2], -4, -3))),
    "Einsum": ("_relaid", lambda rule: lambda v, shape, torch_shape, order: rule(v, shape, torch_shape)),
    "Attention": ("_matrix", another_order),
    "LSTM-LSTMCell": ("_matrix", another_order),
    "user": ("as_it_is", lambda rule: lambda v: _layouts._permuted(v, (-1, -2)) if v.ndim == 2 else rule(v)),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_wrong_rule_is_seen(name, monkeypatch):
    twins = next(twins for twins in TWINS if twins.name == name)
    function, fault = FAULTS[name]
    monkeypatch.setattr(_layouts, function, fault(getattr(_layouts, function)))
    y, flax, arrays = outputs(twins)
    with pytest.raises(AssertionError, match="distance"):
        assert_close(flax(arrays), y, "float64")


# Two biases


def test_two_biases_of_an_lstm_become_their_sum():
    one = next(twins for twins in TWINS if twins.name == "LSTMCell-OptimizedLSTMCell")
    twins = replace(one, torch=lambda o: two_biases(one.torch(o)))
    y, flax, arrays = outputs(twins)
    assert_close(flax(arrays), y, "float64")
    theirs = twins.layers("float64")[1]
    pf.load_arrays(theirs, arrays)
    back = pf.to_arrays(theirs)
    np.testing.assert_array_equal(back["bias_ih"], arrays["bias_ih"] + arrays["bias_hh"])
    assert arrays["bias_hh"].any()
    assert not back["bias_hh"].any()


def test_layers_of_an_lstm_are_a_list_in_flax():
    ours = randomize(two_biases(nn.LSTM(3, 4, num_layers=2, bidirectional=True)))

    def twin():
        options = {"both": True, "rngs": nnx.Rngs(0), "param_dtype": jnp.float32}
        rnns = [nnx.RNN(cell(nnx.OptimizedLSTMCell, size, 4, **options)) for size in (3, 3, 8, 8)]
        return nnx.List([nnx.Bidirectional(*rnns[:2]), nnx.Bidirectional(*rnns[2:])])

    theirs = nnx.eval_shape(twin)
    pf.load_arrays(theirs, pt.to_arrays(ours), rename={r"(\w+_[ih]h)_l(\d)": r"\2.\1_l0"})
    back = pf.to_arrays(theirs)
    np.testing.assert_array_equal(back["1.weight_hh_l0_reverse"], ours.weight_hh_l1_reverse.detach())
    np.testing.assert_array_equal(back["0.bias_ih_l0"], ours.bias_ih_l0.detach())
    assert len(back) == len(ours.state_dict())


@pytest.mark.parametrize("bidirectional", [False, True])
def test_a_grus_bias_that_nnx_has_not_is_refused(bidirectional):
    ours = randomize(two_biases(nn.GRU(5, 4, bidirectional=bidirectional)))
    arrays = pt.to_arrays(ours)

    def twin():
        rnn = nnx.RNN(cell(nnx.GRUCell, 5, 4, rngs=nnx.Rngs(0), param_dtype=jnp.float32))
        return (
            nnx.Bidirectional(rnn, nnx.RNN(cell(nnx.GRUCell, 5, 4, rngs=nnx.Rngs(0), param_dtype=jnp.float32)))
            if bidirectional
            else rnn
        )

    theirs = nnx.eval_shape(twin)
    pf.load_arrays(theirs, {name: np.zeros_like(array) for name, array in arrays.items()})
    before = pf.to_arrays(theirs)
    if bidirectional:
        arrays["bias_hh_l0"][8:] = 0
    with pytest.raises(ValueError, match=r"got 4 others.*cell\.dense_h = nnx\.Linear\(4, 12, rngs=nnx\.Rngs\(0\)\)"):
        pf.load_arrays(theirs, arrays)
    for name, array in pf.to_arrays(theirs).items():
        np.testing.assert_array_equal(array, before[name])
    for name in [name for name in arrays if name.startswith("bias_hh")]:
        arrays[name][8:] = 0
    pf.load_arrays(theirs, arrays)
    summed = arrays["bias_ih_l0"] + arrays["bias_hh_l0"]
    np.testing.assert_array_equal(pf.to_arrays(theirs)["bias_ih_l0"], summed)


# Stacks


class TorchNet(nn.Module):
    """Layers whose rules could mistake an axis of members for one of theirs."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(3, 3, 3)
        self.act = nn.PReLU()
        self.norm = nn.BatchNorm1d(3)
        self.lstm = nn.LSTM(3, 3)
        self.scale = nn.Parameter(torch.zeros(3))


class FlaxNet(nnx.Module):
    """The twin."""

    def __init__(self, rngs):
        self.conv = nnx.Conv(3, 3, (3,), padding=0, rngs=rngs)
        self.act = nnx.PReLU()
        self.norm = nnx.BatchNorm(3, rngs=rngs)
        self.lstm = nnx.RNN(nnx.OptimizedLSTMCell(3, 3, rngs=rngs))
        self.scale = nnx.Param(jnp.zeros(3, jnp.float32))


def test_an_ensemble_has_its_members_weights():
    members = [randomize(TorchNet()) for _ in range(3)]
    for i, member in enumerate(members):
        with torch.no_grad():
            for parameter in member.parameters():
                parameter += i * (parameter != 0)
    deep = pt.Ensemble(members)
    arrays = pt.to_arrays(deep)
    assert arrays["act.weight"].shape == (3, 1)
    theirs = nnx.eval_shape(lambda: pf.Ensemble([FlaxNet(nnx.Rngs(i)) for i in range(3)]))
    pf.load_arrays(theirs, arrays)
    assert theirs.stacked.act.negative_slope.shape == (3,)
    back = pf.to_arrays(theirs)
    assert back.keys() == arrays.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(back[name], array, err_msg=name)


def test_axes_of_layers_that_vmap_stacks_stay_first():
    def layers(rngs):
        init = nnx.initializers.lecun_normal()
        return nnx.List(
            [
                nnx.Linear(5, 4, rngs=rngs),
                nnx.LinearGeneral((2, 3), (3, 2), axis=(-2, -1), rngs=rngs),
                nnx.Einsum("bij,qjpi->bpq", (2, 3, 3, 2), (3, 2), rngs=rngs),
                nnx.Conv(5, 4, (2, 3), rngs=rngs),
                nnx.ConvTranspose(5, 4, (2, 3), rngs=rngs),
                nnx.MultiHeadAttention(2, 6, decode=False, rngs=rngs),
                nnx.RNN(nnx.GRUCell(5, 4, recurrent_kernel_init=init, rngs=rngs), rngs=rngs),
                nnx.RNN(nnx.LSTMCell(5, 4, recurrent_kernel_init=init, rngs=rngs), rngs=rngs),
                nnx.LayerNorm(15, **TWO_AXES, use_bias=False, rngs=rngs),
                nnx.WeightNorm(nnx.Linear(5, 4, rngs=rngs), rngs=rngs),
                nnx.BatchNorm(5, rngs=rngs),
            ]
        )

    stacked = nnx.eval_shape(lambda: nnx.vmap(layers)(nnx.Rngs(0).split(2)))
    singles = [nnx.eval_shape(lambda: layers(nnx.Rngs(0))) for _ in range(2)]
    rng = np.random.default_rng(0)
    for single in singles:
        for _, variable in nnx.to_flat_state(nnx.state(single, nnx.Any(nnx.Param, nnx.BatchStat))):
            variable.set_value(jax_of(rng.standard_normal(variable.shape), variable.dtype))
        single[9].scales[("kernel",)] = jax_of(rng.standard_normal(4))
    own = [pf.to_arrays(single) for single in singles]
    arrays = {name: np.stack([each[name] for each in own]) for name in own[0]}
    pf.load_arrays(stacked, arrays)
    for name, array in pf.to_arrays(stacked).items():
        np.testing.assert_array_equal(array, arrays[name], err_msg=name)
    for i, single in enumerate(singles):
        for (path, variable), (_, one) in zip(
            *(nnx.to_flat_state(nnx.state(m, nnx.Param)) for m in (stacked, single)), strict=True
        ):
            np.testing.assert_array_equal(variable[i], one[...], err_msg=str(path))


# What no rule covers


class Bare(nnx.Module):
    """An array that is no parameter."""

    def __init__(self):
        self.table = nnx.data(jnp.ones(3, jnp.float32))


def with_bias_in_one_gate():
    made = nnx.LSTMCell(3, 2, rngs=nnx.Rngs(0))
    made.ii = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    return made


def known(rngs):
    return nnx.Linear(4, 4, rngs=rngs)


REFUSED = {
    "depthwise Einsum": (
        lambda o: nnx.Einsum("bij,ij->bij", (4, 4), **o),
        r"layer\.kernel of Einsum, 'bij,ij->bij', which is no linear layer",
    ),
    "axes of unknown sizes": (
        lambda o: nnx.LayerNorm(15, reduction_axes=(-2, -1), feature_axes=(-2, -1), **o),
        r"layer\.scale of LayerNorm, over axes of unknown sizes or order; pass "
        r"scale_metadata=\{'torch_shape': \(a, b\), 'torch_axes': \(-1, -2\)\}, bias_metadata=",
    ),
    "in a Sequential": (
        lambda o: nnx.Sequential(nnx.LayerNorm(6, reduction_axes=(-2, -1), feature_axes=(-2, -1), **o)),
        r"parameters of others:\n  layer\.layers\.0\.bias of LayerNorm, over axes",
    ),
    "axes of unknown order": (
        lambda o: nnx.LayerNorm(15, **TWO_AXES | {"scale_metadata": {"torch_shape": (3, 5)}}, **o),
        r"layer\.scale of LayerNorm, over axes of unknown sizes or order",
    ),
    "grouped heads": (
        lambda o: nnx.MultiHeadAttention(2, 6, num_kv_heads=1, decode=False, **o),
        r"layer\.key\.kernel of MultiHeadAttention, with fewer heads for keys and values",
    ),
    "other features": (
        lambda o: nnx.MultiHeadAttention(2, 6, qkv_features=4, decode=False, **o),
        r"layer\.out\.kernel of MultiHeadAttention, whose in_features, qkv_features and out_features differ",
    ),
    "SpectralNorm": (
        lambda o: nnx.SpectralNorm(known(**o), **o),
        r"layer\.layer_instance\.kernel of SpectralNorm, whose iteration is not torch's; .* port its layer_instance",
    ),
    "WeightNorm without scales": (
        lambda o: nnx.WeightNorm(known(**o), use_scale=False, **o),
        r"layer\.layer_instance\.kernel of WeightNorm, which torch has for the kernel of a Linear or Conv layer",
    ),
    "biases of some gates": (lambda o: with_bias_in_one_gate(), r"layer\.hf\.bias of LSTMCell, with biases for some"),
    "a bare array": (lambda o: Bare(), r"layer\.table of Bare, which has no rule"),
    "a Linen module": (
        lambda o: nnx.bridge.ToNNX(linen.Dense(3), rngs=nnx.Rngs(0)).lazy_init(jnp.ones((1, 4), jnp.float32)),
        r"layer\.kernel of ToNNX, which has no rule",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_parameter_without_a_rule_is_named_with_its_layer_and_the_reason(name):
    make, sentence = REFUSED[name]
    model = nnx.eval_shape(lambda: nnx.Dict({"layer": make({"rngs": nnx.Rngs(0)}), "known": known(nnx.Rngs(0))}))
    with pytest.raises(ValueError, match=sentence) as raised:
        pf.to_arrays(model)
    assert "known." not in str(raised.value)
    with pytest.raises(ValueError, match=sentence):
        pf.load_arrays(model, {})


def test_two_parameters_of_one_name_are_refused():
    def network():
        return nnx.Dict({"a.b": known(nnx.Rngs(0)), "a": nnx.Dict({"b": known(nnx.Rngs(0))})})

    model = nnx.eval_shape(network)
    with pytest.raises(ValueError, match=r"two parameters named 'a\.b\.weight'"):
        pf.to_arrays(model)


def shapes(network):
    abstract = nnx.eval_shape(lambda: network(nnx.Rngs(0)))
    return pf.weights.shapes_of(pf.weights.Inventory(abstract).weights("to_arrays"))


def test_random_state_caches_intermediates_and_masks_are_no_weights():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.conv = nnx.Conv(3, 3, (2,), mask=jnp.ones((2, 3, 3), jnp.float32), rngs=rngs)
            self.drop = nnx.Dropout(0.5, rngs=rngs)
            self.rngs = rngs
            self.attention = nnx.MultiHeadAttention(1, 3, decode=True, use_bias=False, rngs=rngs)
            self.attention.init_cache((1, 4, 3))
            self.seen = nnx.Intermediate((jnp.ones(2),))
            self.nothing = nnx.data(None)

    assert sorted(shapes(Net)) == [
        "attention.in_proj_weight",
        "attention.out_proj.weight",
        "conv.bias",
        "conv.weight",
    ]


@pytest.mark.parametrize("transposed", [False, True])
def test_a_mask_is_in_the_kernel_that_torch_has(transposed):
    mask = np.random.default_rng(0).integers(0, 2, (3, 2, 5)).astype("float32")
    kind = partial(nnx.ConvTranspose, transpose_kernel=False) if transposed else nnx.Conv
    make = partial(kind, 2, 5, (3,), padding="VALID", rngs=nnx.Rngs(0))
    theirs, ours = make(mask=jax_of(mask)), (nn.ConvTranspose1d if transposed else nn.Conv1d)(2, 5, 3)
    pt.load_arrays(ours, arrays := pf.to_arrays(theirs))
    x = np.random.default_rng(1).standard_normal((2, 2, 7)).astype("float32")
    assert_close(np.asarray(first(theirs(last(jax_of(x))))), ours(torch.tensor(x)).detach().numpy(), "float32")
    fresh = make(mask=jax_of(mask))
    pf.load_arrays(fresh, arrays)
    np.testing.assert_array_equal(fresh.kernel[...], theirs.kernel[...] * mask)
    before = np.asarray(fresh.kernel[...])
    with pytest.raises(ValueError, match=r"cannot load weight: .* zeros where the mask has them; got \d+ others"):
        pf.load_arrays(fresh, pf.to_arrays(make()))
    np.testing.assert_array_equal(fresh.kernel[...], before)


def test_a_gru_that_cannot_have_torchs_bias_is_named_and_the_advice_is_followed(tmp_path):
    ours = nn.ModuleDict({"rnn": randomize(nn.GRU(3, 4, dtype=torch.float64, batch_first=True))})
    nn.init.normal_(ours["rnn"].bias_hh_l0)
    rnn = nnx.RNN(nnx.GRUCell(3, 4, param_dtype=jnp.float64, rngs=nnx.Rngs(0)))
    theirs, path = nnx.Dict({"rnn": rnn}), tmp_path / "gru.safetensors"
    pt.save_weights(ours, path)
    with pytest.raises(ValueError, match=r"gru\.safetensors'\) cannot load rnn\.bias_ih_l0: nnx\.GRUCell") as raised:
        pf.load_weights(theirs, path)
    advice = str(raised.value).partition("cell.dense_h = ")[2].removesuffix(".")
    assert advice == "nnx.Linear(4, 12, param_dtype='float64', rngs=nnx.Rngs(0))"
    rnn.cell.dense_h = nnx.Linear(4, 12, param_dtype="float64", rngs=nnx.Rngs(0))
    pf.load_weights(theirs, path)
    np.testing.assert_array_equal(pf.to_arrays(theirs)["rnn.bias_hh_l0"], pt.to_arrays(ours)["rnn.bias_hh_l0"])


def test_a_subclass_keeps_its_own_parameters_and_layers():
    class Scaled(nnx.Linear):
        def __init__(self, rngs):
            super().__init__(3, 2, rngs=rngs)
            self.scale = nnx.Param(jnp.ones(2, jnp.float32))
            self.norms = nnx.data([nnx.RMSNorm(2, rngs=rngs)])

    assert shapes(Scaled) == {"weight": (2, 3), "bias": (2,), "scale": (2,), "norms.0.weight": (2,)}


def test_the_kernel_of_a_spectral_norm_is_normalised_once_it_is_called():
    layer = nnx.SpectralNorm(nnx.Linear(1, 5, rngs=nnx.Rngs(0)), rngs=nnx.Rngs(0))
    layer.eval()
    layer(jnp.ones((1, 1), jnp.float32))
    weight = pf.to_arrays(layer.layer_instance)["weight"]
    assert_close(np.linalg.norm(weight, keepdims=True), np.ones((1, 1), "float32"), "float32")


# Statistics


def test_statistics_take_torchs_dtype_and_keep_their_own_in_flax():
    theirs = nnx.BatchNorm(3, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    theirs.mean.set_value(jnp.asarray([0.1, 0.2, 0.3], jnp.float32))
    arrays = pf.to_arrays(theirs)
    assert [arrays[name].dtype.name for name in ("weight", "running_mean")] == ["bfloat16", "float32"]
    same = nnx.BatchNorm(3, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    pf.load_arrays(same, arrays)
    assert (same.mean[...] == theirs.mean[...]).all()
    with pytest.raises(ValueError, match="running_mean is bfloat16 here, float32 there"):
        pt.load_arrays(nn.BatchNorm1d(3, dtype=torch.bfloat16), arrays)
    double = nnx.BatchNorm(3, param_dtype=jnp.float64, rngs=nnx.Rngs(0))
    pt.load_arrays(nn.BatchNorm1d(3, dtype=torch.float64), pf.to_arrays(double))
    with pytest.raises(ValueError, match="running_mean is float32 here, float64 there"):
        pf.load_arrays(nnx.BatchNorm(3, rngs=nnx.Rngs(0)), arrays | {"running_mean": np.ones(3)})
