r"""Names and layouts that the weights of every layer have in torch.

torch needs no such file: its tensors have their names. Weights travel; options that torch's twin lacks stay behind.
Where the arrays of a layer do not say it all:

- Norms over several axes know the product of their sizes only, and no order. Name torch's sizes where the layer is
  made, and the axis here of each; over an image, which torch has as (C, H, W) and Flax as (H, W, C), in scale and bias:
  `nnx.LayerNorm(C * H * W, ..., scale_metadata={"torch_shape": (C, H, W), "torch_axes": (-1, -3, -2)}, ...)`.
- nnx.Conv with a mask is torch's with zeros in the kernel: they are written, and read where they are zeros there.
- nnx cells have one bias where torch's have two. It is written as bias_ih, beside a bias_hh of zeros, and read as their
  sum. The part of a GRU's bias_hh that belongs to n cannot be summed: nnx.GRUCell takes zeros only, unless its dense_h
  is given a bias. Where dense_i and dense_h both have one, both travel as they are, in every cell.
- nnx.LoRA adds x A B as it is; peft adds lora_alpha / r times it. A and B travel unscaled: build peft's with
  lora_alpha=r, or multiply B by lora_alpha / r.
- Statistics of nnx.BatchNorm are float32 whatever param_dtype is, and torch's have the dtype of the module. They take
  the dtype that they are given, of these two.
- nnx.WeightNorm replaces the kernel of its layer by the normalised one when it is called, which is the same function
  except for its epsilon, 1e-12. nnx.PReLU has a slope of shape (), torch's of shape (1,).
- torch's recurrent layers of num_layers > 1 are lists of nnx.RNN or nnx.Bidirectional, which are `0.weight_ih_l0`,
  `1.weight_ih_l0`, ... in torch: load with rename={r"(\w+_[ih]h)_l(\d)": r"\2.\1_l0"}.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from flax import nnx
from jax import Array, ShapeDtypeStruct
from jax.core import Tracer

from probly_common.weights.files import contiguous
from probly_flax.layers.norm import BatchEnsembleBatchNorm
from probly_flax.layers.recurrent import INPUT_GATES, STATE_GATES


class Weight(NamedTuple):
    """How the arrays of some variables make one of torch's, and come out of it again."""

    variables: tuple[Any, ...]
    to_torch: Callable[..., np.ndarray]
    from_torch: Callable[..., Sequence[np.ndarray]]
    also: tuple[str, ...] = ()  # names of other arrays of torch's that from_torch takes
    dtypes: tuple[str, ...] = ()  # those that are read, the one that is written first, unless it is the variables'
    refuses: bool = False  # whether from_torch may raise


Weights = dict[str, Weight]  # of a layer, by their names in torch

CELLS = (nnx.LSTMCell, nnx.OptimizedLSTMCell, nnx.GRUCell, nnx.SimpleCell)


class NoTwinError(Exception):
    """Why torch has no such layer."""


# How a weight is laid out


def as_it_is(variable: Any) -> Weight:
    return Weight((variable,), lambda array: array, lambda array: [array])


def _permuted(variable: nnx.Variable, axes: tuple[int, ...]) -> Weight:
    """Puts the axes into their order in torch, counted from the last.

    An axis is given by a positive number where torch has it reversed. Axes in front of those that are named, such as
    that of the members, stay first.
    """
    rank = len(variable.shape)
    order = (*range(rank - len(axes)), *(rank - abs(axis) for axis in axes))
    flipped = tuple(rank - axis for axis in axes if axis > 0)
    return Weight(
        (variable,),
        lambda array: contiguous(np.flip(array, flipped).transpose(order)),
        lambda array: [contiguous(np.flip(array.transpose(np.argsort(order)), flipped))],
    )


def _relaid(
    variable: nnx.Variable, shape: Sequence[int], torch_shape: Sequence[int], order: Sequence[int] | None = None
) -> Weight:
    """Brings the variable into this shape, its axes into this order, and the result into torch's shape."""
    order = range(len(shape)) if order is None else order
    return Weight(
        (variable,),
        lambda array: array.reshape(shape).transpose(order).reshape(torch_shape),
        lambda array: [
            array.reshape([shape[axis] for axis in order]).transpose(np.argsort(order)).reshape(variable.shape)
        ],
    )


def _matrix(*kernels: nnx.Variable, inputs: int = 1, outputs: int = 1) -> Weight:
    """Packs n kernels, (..., *in, *out) each, into (..., n * out, in)."""

    def to_torch(*arrays: np.ndarray) -> np.ndarray:
        first = arrays[0].ndim - inputs - outputs
        sizes = [(math.prod(a.shape[first:-outputs]), math.prod(a.shape[-outputs:])) for a in arrays]
        parts = [a.reshape(*a.shape[:first], *size).mT for a, size in zip(arrays, sizes, strict=True)]
        return np.concatenate(parts, -2)

    def from_torch(array: np.ndarray) -> list[np.ndarray]:
        parts = np.split(array, len(kernels), axis=-2)
        return [contiguous(part.mT).reshape(k.shape) for part, k in zip(parts, kernels, strict=True)]

    return Weight(kernels, to_torch, from_torch)


def _vector(*biases: Any, axes: int = 1) -> Weight:
    """Packs n biases, (..., *axes) each, into (..., n * size)."""

    def to_torch(*arrays: np.ndarray) -> np.ndarray:
        return np.concatenate([a.reshape(*a.shape[: a.ndim - axes], math.prod(a.shape[-axes:])) for a in arrays], -1)

    def from_torch(array: np.ndarray) -> list[np.ndarray]:
        parts = np.split(array, len(biases), axis=-1)
        return [np.ascontiguousarray(part).reshape(bias.shape) for part, bias in zip(parts, biases, strict=True)]

    return Weight(biases, to_torch, from_torch)


def _named(layer: Any, *names: str, **others: str) -> Weights:
    """Returns the variables that the layer has of these, as they are.

    Those with another name in torch are given as name=attribute.
    """
    attributes = {name: name for name in names} | others
    variables = {name: getattr(layer, attribute, None) for name, attribute in attributes.items()}
    return {name: as_it_is(v) for name, v in variables.items() if isinstance(v, nnx.Variable)}


class Item:
    """An array that a layer has in a dict, not in a Variable."""

    def __init__(self, items: dict[Any, Array], key: Any) -> None:
        self.items, self.key = items, key

    def get_value(self) -> Array:
        return self.items[self.key]

    def set_value(self, value: Array) -> None:
        self.items[self.key] = value

    def __getitem__(self, index: Any) -> Array:
        return self.get_value()[index]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.get_value().shape

    @property
    def dtype(self) -> Any:
        return self.get_value().dtype


# Layers


def linear(layer: nnx.Linear) -> Weights:
    return {"weight": _permuted(layer.kernel, (-1, -2))} | _named(layer, "bias", "r", "s")


def linear_general(layer: nnx.LinearGeneral) -> Weights:
    """Merges the axes that the layer contracts into one, and those that it makes into another.

    Batch axes are torch's of stacked layers.
    """
    outputs = len(layer.out_features)
    bias = {} if layer.bias is None else {"bias": _vector(layer.bias, axes=outputs)}
    return {"weight": _matrix(layer.kernel, inputs=len(layer.in_features), outputs=outputs)} | bias


def einsum(layer: nnx.Einsum) -> Weights:
    """Treats it as a linear layer, if each axis of the kernel is contracted, made, or one of stacked layers."""
    operands, _, y = (layer.einsum_str or "").partition("->")
    x, _, kernel = operands.partition(",")
    stacked = [axis for axis in y if axis in x and axis in kernel]
    outputs = [axis for axis in y if axis not in x and axis in kernel]
    inputs = [axis for axis in x if axis not in y and axis in kernel]
    if not (inputs and outputs and kernel.isalpha() and sorted([*stacked, *outputs, *inputs]) == sorted(kernel)):
        raise NoTwinError(f"{layer.einsum_str!r}, which is no linear layer")
    size = dict(zip(kernel, layer.kernel.shape[-len(kernel) :], strict=True))
    front = layer.kernel.shape[: -len(kernel)]

    def relaid(variable: nnx.Variable, axes: Sequence[str], order: Sequence[str], *merged: Sequence[str]) -> Weight:
        torch_shape = [math.prod(size[axis] for axis in part) for part in (*stacked, *merged)]
        places = [*range(len(front)), *(len(front) + axes.index(axis) for axis in order)]
        return _relaid(variable, [*front, *(size[axis] for axis in axes)], [*front, *torch_shape], places)

    weights = {"weight": relaid(layer.kernel, kernel, [*stacked, *outputs, *inputs], outputs, inputs)}
    if layer.bias is not None:
        axes = [axis for axis in y if axis in (*stacked, *outputs)]
        weights["bias"] = relaid(layer.bias, axes, [*stacked, *outputs], outputs)
    return weights


def _masked(weight: Weight, mask: Any) -> Weight:
    """Takes the kernel as it is once such a layer has multiplied it by its mask."""
    mask = mask.get_value() if isinstance(mask, nnx.Variable) else mask
    if mask is None or isinstance(mask, (ShapeDtypeStruct, Tracer)):  # of an abstract model
        return weight
    mask = np.asarray(mask)

    def from_torch(array: np.ndarray) -> Sequence[np.ndarray]:
        (kernel,) = weight.from_torch(array)
        others = int(((kernel != 0) & (mask == 0)).sum())
        if others:
            raise ValueError(
                f"A convolution with a mask expects a kernel of zeros where the mask has them; got {others} others. "
                f"Build it without: nnx.Conv(..., mask=None)."
            )
        return [kernel]

    return weight._replace(
        to_torch=lambda array: weight.to_torch((array * mask).astype(array.dtype)),
        from_torch=from_torch,
        refuses=True,
    )


def conv(layer: nnx.Conv | nnx.ConvTranspose) -> Weights:
    """Permutes (*kernel_size, a, b) to (b, a, *kernel_size)."""
    axes = -1, -2, *range(-len(layer.kernel_size) - 2, -2)
    return {"weight": _masked(_permuted(layer.kernel, axes), layer.mask)} | _named(layer, "bias", "r", "s")


def conv_transpose(layer: nnx.ConvTranspose) -> Weights:
    """Permutes as `conv` does, or (*kernel_size, in, out) to (in, out, *kernel_size) of the mirror image.

    The mirror image has its axes reversed.
    """
    if layer.transpose_kernel:
        return conv(layer)
    axes = -2, -1, *range(len(layer.kernel_size) + 2, 2, -1)
    return {"weight": _masked(_permuted(layer.kernel, axes), layer.mask)} | _named(layer, "bias", "r", "s")


def embed(layer: nnx.Embed) -> Weights:
    return _named(layer, "r", "s", weight="embedding")


def norm(layer: Any) -> Weights:
    weights = _named(layer, "bias", weight="scale")
    axes = getattr(layer, "feature_axes", -1)
    if isinstance(axes, int) or len(axes) == 1:
        return weights
    for name, weight in weights.items():
        (variable,) = weight.variables
        shape, order = (tuple(variable.get_metadata(key, None) or ()) for key in ("torch_shape", "torch_axes"))
        if len(shape) != len(order) or sorted(order) != sorted(axes) or math.prod(shape) != variable.shape[-1]:
            example = (-1, *sorted(axes)[:-1])
            option = f"{{'torch_shape': ({', '.join('abcdefgh'[: len(axes)])}), 'torch_axes': {example}}}"
            raise NoTwinError(
                f"over axes of unknown sizes or order; pass scale_metadata={option}, bias_metadata={option}, torch's "
                f"sizes and the axes here that they are of"
            )
        front, places = len(variable.shape) - 1, [sorted(order).index(axis) for axis in order]
        own = [shape[places.index(place)] for place in range(len(shape))]
        weights[name] = _relaid(
            variable,
            (*variable.shape[:-1], *own),
            (*variable.shape[:-1], *shape),
            (*range(front), *(front + place for place in places)),
        )
    return weights


def batch_norm(layer: nnx.BatchNorm) -> Weights:
    """Adds the count of batches that torch has, since nnx does not count them.

    It is written as 0, and not read.
    """
    weights = _named(layer, "bias", weight="scale")
    own, param_dtype = np.dtype(layer.mean.dtype), np.dtype(layer.param_dtype)
    dtypes = np.promote_types(own, param_dtype).name, param_dtype.name, own.name, "float32"
    for name, weight in _named(layer, running_mean="mean", running_var="var").items():
        weights[name] = weight._replace(to_torch=lambda array: array.astype(dtypes[0]), dtypes=dtypes)
    own_axes = 2 if isinstance(layer, BatchEnsembleBatchNorm) else 1
    count = np.zeros(layer.mean.shape[:-own_axes], np.int64)
    return weights | {"num_batches_tracked": Weight((), lambda: count, lambda array: [])}


def prelu(layer: nnx.PReLU) -> Weights:
    """Lays out one slope, (1,) in torch, or one for each channel."""
    slope = layer.negative_slope
    return {"weight": _relaid(slope, slope.shape, slope.shape or (1,))}


def stacked_prelu(layer: nnx.PReLU) -> Weights:
    slope = layer.negative_slope
    return {"weight": _relaid(slope, slope.shape, (*slope.shape[:1], math.prod(slope.shape[1:])))}


def attention(layer: nnx.MultiHeadAttention) -> Weights:
    """Flattens the heads, and packs the three input projections into one if they are of one size."""
    inputs = layer.query, layer.key, layer.value
    if not all(isinstance(p, nnx.LinearGeneral) for p in (*inputs, layer.out)):
        raise NoTwinError("whose projections are of another type")
    if layer.key.kernel.shape[-2:] != layer.query.kernel.shape[-2:]:
        raise NoTwinError("with fewer heads for keys and values")
    if not layer.qkv_features == layer.out_features == layer.in_features:
        raise NoTwinError("whose in_features, qkv_features and out_features differ")
    if layer.in_kv_features == layer.in_features:
        weights = {"in_proj_weight": _matrix(*(p.kernel for p in inputs), outputs=2)}
    else:
        weights = {f"{name}_proj_weight": _matrix(p.kernel, outputs=2) for name, p in zip("qkv", inputs, strict=True)}
    weights["out_proj.weight"] = _matrix(layer.out.kernel, inputs=2)
    if layer.use_bias:
        weights["in_proj_bias"] = _vector(*(p.bias for p in inputs), axes=2)
        weights["out_proj.bias"] = _vector(layer.out.bias)
    for name, p in zip(("q_", "k_", "v_", "out_proj."), (*inputs, layer.out), strict=True):
        weights |= {name + scale: weight for scale, weight in _named(p, "r", "s").items()}
    return weights


def cell(layer: Any) -> Weights:
    """Packs the gates side by side, in torch's order, which is that of nnx."""
    if isinstance(layer, nnx.LSTMCell):
        sides = [[getattr(layer, name) for name in names] for names in (INPUT_GATES, STATE_GATES)]
    else:
        sides = [[layer.dense_i], [layer.dense_h]]
    if not all(isinstance(dense, nnx.Linear) for side in sides for dense in side):
        raise NoTwinError("whose dense layers are of another type")
    weights = {}
    for name, side in zip(("ih", "hh"), sides, strict=True):
        weights[f"weight_{name}"] = _matrix(*(dense.kernel for dense in side))
        if len(side) == 1:
            weights |= {f"{scale}_{name}": weight for scale, weight in _named(side[0], "r", "s").items()}
    biases = [[dense.bias for dense in side if dense.bias is not None] for side in sides]
    if any(len(own) not in (0, len(side)) for own, side in zip(biases, sides, strict=True)):
        raise NoTwinError("with biases for some of its gates")
    ih, hh = biases
    if ih and hh:
        return weights | {"bias_ih": _vector(*ih), "bias_hh": _vector(*hh)}
    if hh and isinstance(layer, nnx.GRUCell):
        raise NoTwinError("with a bias in dense_h alone")
    return weights | _one_bias(ih or hh, isinstance(layer, nnx.GRUCell)) if ih or hh else weights


def _one_bias(biases: Sequence[nnx.Variable], of_gru: bool) -> Weights:
    """Makes one bias of torch's two, which is their sum."""
    weight = _vector(*biases)

    def sum_(ih: np.ndarray, hh: np.ndarray) -> Sequence[np.ndarray]:
        size = hh.shape[-1]
        n = hh[..., size - size // 3 :]
        if of_gru and n.any():
            dtype = "" if hh.dtype == np.float32 else f", param_dtype={hh.dtype.name!r}"
            raise ValueError(
                f"nnx.GRUCell expects bias_hh to be 0 for n, in its last {n.shape[-1]} elements, since it has no bias "
                f"there; got {n.size - (n == 0).sum()} others. Give it one before it is converted, or loaded: "
                f"cell.dense_h = nnx.Linear({size // 3}, {size}{dtype}, rngs=nnx.Rngs(0))."
            )
        return weight.from_torch(ih + hh)

    *front, size = biases[0].shape
    zeros = np.zeros((*front, size * len(biases)), biases[0].dtype)
    return {
        "bias_ih": weight._replace(from_torch=sum_, also=("bias_hh",), refuses=of_gru),
        "bias_hh": Weight((), lambda: zeros, lambda array: []),
    }


def rnn(layer: nnx.RNN, suffix: str = "_l0") -> Weights:
    """Names these cells as torch does, which has them in RNNs of one layer.

    Any other cell is a layer in it.
    """
    weights = cell(layer.cell) if isinstance(layer.cell, CELLS) else {}
    return {
        name + suffix: weight._replace(also=tuple(other + suffix for other in weight.also))
        for name, weight in weights.items()
    }


def bidirectional(layer: nnx.Bidirectional) -> Weights:
    forward, backward = layer.forward_rnn, layer.backward_rnn
    if not (isinstance(forward, nnx.RNN) and isinstance(backward, nnx.RNN)):
        return {}
    return rnn(forward) | rnn(backward, "_l0_reverse")


def lora(layer: nnx.LoRA) -> Weights:
    """Names the weights as peft does."""
    named = {"lora_A": layer.lora_a, "lora_B": layer.lora_b}
    return {f"{name}.default.weight": _permuted(variable, (-1, -2)) for name, variable in named.items()}


def lora_linear(layer: nnx.LoRALinear) -> Weights:
    return {**{f"base_layer.{name}": weight for name, weight in linear(layer).items()}, **lora(layer.lora)}


def weight_norm(layer: nnx.WeightNorm) -> Weights:
    """Names the weights as torch.nn.utils.parametrizations.weight_norm does."""
    inner: Any = layer.layer_instance
    layouts: dict[type, Callable[[Any], Weights]]
    layouts = {nnx.Linear: linear, nnx.ConvTranspose: conv_transpose, nnx.Conv: conv}
    layout = next((layout for each, layout in layouts.items() if isinstance(inner, each)), None)
    if (
        layout is None
        or layer.feature_axes not in (-1, (-1,))
        or not layer.scales
        or set(layer.scales) != {("kernel",)}
    ):
        raise NoTwinError("which torch has for the kernel of a Linear or Conv layer, with scales and feature_axes=-1")
    weights = layout(inner)
    weight, scales = weights.pop("weight"), Item(layer.scales, ("kernel",))
    *front, size = scales.shape
    shape = (*front, *(1,) * (inner.kernel.ndim - len(front) - 1), size)
    weights["parametrizations.weight.original0"] = Weight(
        (scales,),
        lambda array: weight.to_torch(array.reshape(shape)),
        lambda array: [weight.from_torch(array)[0].reshape(scales.shape)],
        dtypes=(scales.dtype.name, inner.kernel.dtype.name),
    )
    return weights | {"parametrizations.weight.original1": weight}


def spectral_norm(layer: nnx.SpectralNorm) -> Weights:
    """Refuses the layer, since its iteration is not torch's.

    nnx keeps u and the normalised kernel. torch keeps u, v and the kernel as it was. They iterate half a step apart.
    """
    raise NoTwinError(
        "whose iteration is not torch's; after training, port its layer_instance, called once in eval mode, to torch's "
        "layer without the parametrization"
    )
