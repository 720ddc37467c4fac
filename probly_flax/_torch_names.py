r"""Names and layouts that the weights of every layer have in torch: one table, and a walk through a model by it.

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
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from flax import nnx
from jax import Array, ShapeDtypeStruct
from jax.core import Tracer

from probly_common.weights.files import contiguous
from probly_flax.ensemble import Ensemble
from probly_flax.layers._common import Rule
from probly_flax.layers.norm import BatchEnsembleBatchNorm
from probly_flax.layers.recurrent import INPUT_GATES, STATE_GATES

# A layer's weights, or layers in it, by their names in torch; layers not mentioned keep their attributes' names.
Rules = dict[str, Rule]
Names = Mapping[str, Rule | nnx.Module]

_is_weight = nnx.filterlib.to_predicate(nnx.Not(nnx.Any(nnx.RngState, nnx.Cache, nnx.Intermediate, nnx.Perturbation)))


class NoTwinError(Exception):
    """Why torch has no such layer."""


def torch_rules(what: str, model: nnx.Module) -> Iterator[tuple[str, Rule]]:
    """Yields every weight under every name that it has in torch.

    The weights of a layer that is used twice have two names.

    Raises:
        ValueError: naming every weight that has no rule, its layer and why; or two weights of one name.
    """
    reasons: dict[int, str] = {}
    rules: dict[str, Rule] = {}
    try:
        for name, rule in _walk(model, "", False, False, reasons):
            if name in rules:
                raise ValueError(
                    f"{what} expects a name in torch for each parameter; got two parameters named {name!r}. Take other "
                    f"keys or attributes, without dots: nnx.Dict({{'a_b': layer}})."
                )
            rules[name] = rule
    except RecursionError:
        raise ValueError(
            f"{what} expects modules that hold each other as a tree; got a {type(model).__name__} with one that holds "
            f"itself. Take that attribute away: del module.parent."
        ) from None
    covered = {_id(variable) for rule in rules.values() for variable in rule.variables}
    layers = dict(nnx.iter_modules(model))
    missed = []
    for path, variable in nnx.to_flat_state(nnx.state(model, _is_weight)):
        layer = next(layers[path[:end]] for end in reversed(range(len(path))) if path[:end] in layers)
        is_mask = path[-1:] == ("mask",) and isinstance(layer, (nnx.Conv, nnx.ConvTranspose))
        if id(variable) not in covered and not is_mask:
            reason = reasons.get(id(variable), f"{type(layer).__name__}, which has no rule")
            if isinstance(variable, nnx.Variable) and not hasattr(variable.get_value(), "shape"):
                reason = f"{type(layer).__name__}, which is no array; nnx.Param(jnp.asarray(value)) holds one"
            missed.append(f"  {'.'.join(map(str, path))} of {reason}")
    if missed:
        raise ValueError(
            f"{what} expects layers whose names and layouts in torch it knows; got parameters of others:\n"
            + "\n".join(missed)
            + "\nHold such a parameter in a module of your own: self.scale = nnx.Param(scale) is torch's self.scale."
        )
    yield from rules.items()


def _walk(layer: Any, prefix: str, of_user: bool, stacked: bool, reasons: dict[int, str]) -> Iterator[tuple[str, Rule]]:
    try:
        names = _names(layer, stacked)
    except NoTwinError as error:
        reasons.update(dict.fromkeys(_ids(layer), f"{type(layer).__name__}, {error}"))
        return
    stacked = stacked or isinstance(layer, Ensemble)
    covered: set[int] = set()
    for name, rule in names.items():
        if isinstance(rule, Rule):
            yield prefix + name, rule._replace(also=tuple(prefix + other for other in rule.also))
            covered.update(map(_id, rule.variables))
        else:
            yield from _walk(rule, f"{prefix}{name}." if name else prefix, of_user, stacked, reasons)
            covered.add(id(rule))
    attributes: Iterable[tuple[Any, Any]]
    if isinstance(layer, nnx.Module):
        attributes = vars(layer).items()
        package = type(layer).__module__.partition(".")[0]
        of_user = type(layer) in (nnx.List, nnx.Dict) or package not in ("flax", "probly_flax")
    else:
        attributes = layer.items() if isinstance(layer, dict) else enumerate(layer)
    for attribute, value in attributes:
        if isinstance(value, nnx.Variable):
            if of_user and _id(value) not in covered and _is_weight((), value) and hasattr(value.get_value(), "shape"):
                yield f"{prefix}{attribute}", _as_it_is(value)
        elif id(value) in covered or (covered and isinstance(value, nnx.Module) and _ids(value) <= covered):
            continue
        elif isinstance(value, (nnx.Module, dict, list, tuple)):
            yield from _walk(value, f"{prefix}{attribute}.", of_user, stacked, reasons)


def _names(layer: Any, stacked: bool = False) -> Names:
    if stacked and isinstance(layer, nnx.PReLU):  # (E,), which would be one slope for each of E channels otherwise
        slope = layer.negative_slope
        return {"weight": _relaid(slope, slope.shape, (*slope.shape[:1], math.prod(slope.shape[1:])))}
    return next((TORCH_NAMES[kind](layer) for kind in type(layer).__mro__ if kind in TORCH_NAMES), {})


def _ids(layer: Any) -> set[int]:
    return {id(variable) for _, variable in nnx.to_flat_state(nnx.state(layer, _is_weight))}


def _id(variable: Any) -> int:
    return id(variable.get_value() if isinstance(variable, _Item) else variable)


# Rules


def _as_it_is(variable: Any) -> Rule:
    return Rule((variable,), lambda array: array, lambda array: [array])


def _permuted(variable: nnx.Variable, axes: tuple[int, ...]) -> Rule:
    """Puts the axes into their order in torch, counted from the last.

    An axis is given by a positive number where torch has it reversed. Axes in front of those that are named, such as
    that of the members, stay first.
    """
    rank = len(variable.shape)
    order = (*range(rank - len(axes)), *(rank - abs(axis) for axis in axes))
    flipped = tuple(rank - axis for axis in axes if axis > 0)
    return Rule(
        (variable,),
        lambda array: contiguous(np.flip(array, flipped).transpose(order)),
        lambda array: [contiguous(np.flip(array.transpose(np.argsort(order)), flipped))],
    )


def _relaid(
    variable: nnx.Variable, shape: Sequence[int], torch_shape: Sequence[int], order: Sequence[int] | None = None
) -> Rule:
    """Brings the variable into this shape, its axes into this order, and the result into torch's shape."""
    order = range(len(shape)) if order is None else order
    return Rule(
        (variable,),
        lambda array: array.reshape(shape).transpose(order).reshape(torch_shape),
        lambda array: [
            array.reshape([shape[axis] for axis in order]).transpose(np.argsort(order)).reshape(variable.shape)
        ],
    )


def _matrix(*kernels: nnx.Variable, inputs: int = 1, outputs: int = 1) -> Rule:
    """Packs n kernels, (..., *in, *out) each, into (..., n * out, in)."""

    def to_torch(*arrays: np.ndarray) -> np.ndarray:
        first = arrays[0].ndim - inputs - outputs
        sizes = [(math.prod(a.shape[first:-outputs]), math.prod(a.shape[-outputs:])) for a in arrays]
        parts = [a.reshape(*a.shape[:first], *size).mT for a, size in zip(arrays, sizes, strict=True)]
        return np.concatenate(parts, -2)

    def from_torch(array: np.ndarray) -> list[np.ndarray]:
        parts = np.split(array, len(kernels), axis=-2)
        return [contiguous(part.mT).reshape(k.shape) for part, k in zip(parts, kernels, strict=True)]

    return Rule(kernels, to_torch, from_torch)


def _vector(*biases: Any, axes: int = 1) -> Rule:
    """Packs n biases, (..., *axes) each, into (..., n * size)."""

    def to_torch(*arrays: np.ndarray) -> np.ndarray:
        return np.concatenate([a.reshape(*a.shape[: a.ndim - axes], math.prod(a.shape[-axes:])) for a in arrays], -1)

    def from_torch(array: np.ndarray) -> list[np.ndarray]:
        parts = np.split(array, len(biases), axis=-1)
        return [np.ascontiguousarray(part).reshape(bias.shape) for part, bias in zip(parts, biases, strict=True)]

    return Rule(biases, to_torch, from_torch)


def _named(layer: Any, *names: str, **others: str) -> Rules:
    """Returns the variables that the layer has of these, as they are.

    Those with another name in torch are given as name=attribute.
    """
    attributes = {name: name for name in names} | others
    variables = {name: getattr(layer, attribute, None) for name, attribute in attributes.items()}
    return {name: _as_it_is(v) for name, v in variables.items() if isinstance(v, nnx.Variable)}


class _Item:
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


def _linear(layer: nnx.Linear) -> Rules:
    return {"weight": _permuted(layer.kernel, (-1, -2))} | _named(layer, "bias", "r", "s")


def _linear_general(layer: nnx.LinearGeneral) -> Rules:
    """Merges the axes that the layer contracts into one, and those that it makes into another.

    Batch axes are torch's of stacked layers.
    """
    outputs = len(layer.out_features)
    bias = {} if layer.bias is None else {"bias": _vector(layer.bias, axes=outputs)}
    return {"weight": _matrix(layer.kernel, inputs=len(layer.in_features), outputs=outputs)} | bias


def _einsum(layer: nnx.Einsum) -> Rules:
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

    def relaid(variable: nnx.Variable, axes: Sequence[str], order: Sequence[str], *merged: Sequence[str]) -> Rule:
        torch_shape = [math.prod(size[axis] for axis in part) for part in (*stacked, *merged)]
        places = [*range(len(front)), *(len(front) + axes.index(axis) for axis in order)]
        return _relaid(variable, [*front, *(size[axis] for axis in axes)], [*front, *torch_shape], places)

    rules = {"weight": relaid(layer.kernel, kernel, [*stacked, *outputs, *inputs], outputs, inputs)}
    if layer.bias is not None:
        axes = [axis for axis in y if axis in (*stacked, *outputs)]
        rules["bias"] = relaid(layer.bias, axes, [*stacked, *outputs], outputs)
    return rules


def _masked(rule: Rule, mask: Any) -> Rule:
    """Takes the kernel as it is once such a layer has multiplied it by its mask."""
    mask = mask.get_value() if isinstance(mask, nnx.Variable) else mask
    if mask is None or isinstance(mask, (ShapeDtypeStruct, Tracer)):  # of an abstract model
        return rule
    mask = np.asarray(mask)

    def from_torch(array: np.ndarray) -> Sequence[np.ndarray]:
        (kernel,) = rule.from_torch(array)
        others = int(((kernel != 0) & (mask == 0)).sum())
        if others:
            raise ValueError(
                f"A convolution with a mask expects a kernel of zeros where the mask has them; got {others} others. "
                f"Build it without: nnx.Conv(..., mask=None)."
            )
        return [kernel]

    return rule._replace(
        to_torch=lambda array: rule.to_torch((array * mask).astype(array.dtype)),
        from_torch=from_torch,
        refuses=True,
    )


def _conv(layer: nnx.Conv | nnx.ConvTranspose) -> Rules:
    """Permutes (*kernel_size, a, b) to (b, a, *kernel_size)."""
    axes = -1, -2, *range(-len(layer.kernel_size) - 2, -2)
    return {"weight": _masked(_permuted(layer.kernel, axes), layer.mask)} | _named(layer, "bias", "r", "s")


def _conv_transpose(layer: nnx.ConvTranspose) -> Rules:
    """Permutes as `_conv` does, or (*kernel_size, in, out) to (in, out, *kernel_size) of the mirror image.

    The mirror image has its axes reversed.
    """
    if layer.transpose_kernel:
        return _conv(layer)
    axes = -2, -1, *range(len(layer.kernel_size) + 2, 2, -1)
    return {"weight": _masked(_permuted(layer.kernel, axes), layer.mask)} | _named(layer, "bias", "r", "s")


def _embed(layer: nnx.Embed) -> Rules:
    return _named(layer, "r", "s", weight="embedding")


def _norm(layer: Any) -> Rules:
    rules = _named(layer, "bias", weight="scale")
    axes = getattr(layer, "feature_axes", -1)
    if isinstance(axes, int) or len(axes) == 1:
        return rules
    for name, rule in rules.items():
        (variable,) = rule.variables
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
        rules[name] = _relaid(
            variable,
            (*variable.shape[:-1], *own),
            (*variable.shape[:-1], *shape),
            (*range(front), *(front + place for place in places)),
        )
    return rules


def _batch_norm(layer: nnx.BatchNorm) -> Rules:
    """Adds the count of batches that torch has, since nnx does not count them.

    It is written as 0, and not read.
    """
    rules = _named(layer, "bias", weight="scale")
    own, param_dtype = np.dtype(layer.mean.dtype), np.dtype(layer.param_dtype)
    dtypes = np.promote_types(own, param_dtype).name, param_dtype.name, own.name, "float32"
    for name, rule in _named(layer, running_mean="mean", running_var="var").items():
        rules[name] = rule._replace(to_torch=lambda array: array.astype(dtypes[0]), dtypes=dtypes)
    own_axes = 2 if isinstance(layer, BatchEnsembleBatchNorm) else 1
    count = np.zeros(layer.mean.shape[:-own_axes], np.int64)
    return rules | {"num_batches_tracked": Rule((), lambda: count, lambda array: [])}


def _prelu(layer: nnx.PReLU) -> Rules:
    """Lays out one slope, (1,) in torch, or one for each channel."""
    slope = layer.negative_slope
    return {"weight": _relaid(slope, slope.shape, slope.shape or (1,))}


def _attention(layer: nnx.MultiHeadAttention) -> Rules:
    """Flattens the heads, and packs the three input projections into one if they are of one size."""
    inputs = layer.query, layer.key, layer.value
    if not all(isinstance(p, nnx.LinearGeneral) for p in (*inputs, layer.out)):
        raise NoTwinError("whose projections are of another type")
    if layer.key.kernel.shape[-2:] != layer.query.kernel.shape[-2:]:
        raise NoTwinError("with fewer heads for keys and values")
    if not layer.qkv_features == layer.out_features == layer.in_features:
        raise NoTwinError("whose in_features, qkv_features and out_features differ")
    if layer.in_kv_features == layer.in_features:
        rules = {"in_proj_weight": _matrix(*(p.kernel for p in inputs), outputs=2)}
    else:
        rules = {f"{name}_proj_weight": _matrix(p.kernel, outputs=2) for name, p in zip("qkv", inputs, strict=True)}
    rules["out_proj.weight"] = _matrix(layer.out.kernel, inputs=2)
    if layer.use_bias:
        rules["in_proj_bias"] = _vector(*(p.bias for p in inputs), axes=2)
        rules["out_proj.bias"] = _vector(layer.out.bias)
    for name, p in zip(("q_", "k_", "v_", "out_proj."), (*inputs, layer.out), strict=True):
        rules |= {name + scale: rule for scale, rule in _named(p, "r", "s").items()}
    return rules


def _cell(cell: Any) -> Rules:
    """Packs the gates side by side, in torch's order, which is that of nnx."""
    if isinstance(cell, nnx.LSTMCell):
        sides = [[getattr(cell, name) for name in names] for names in (INPUT_GATES, STATE_GATES)]
    else:
        sides = [[cell.dense_i], [cell.dense_h]]
    if not all(isinstance(dense, nnx.Linear) for side in sides for dense in side):
        raise NoTwinError("whose dense layers are of another type")
    rules = {}
    for name, side in zip(("ih", "hh"), sides, strict=True):
        rules[f"weight_{name}"] = _matrix(*(dense.kernel for dense in side))
        if len(side) == 1:
            rules |= {f"{scale}_{name}": rule for scale, rule in _named(side[0], "r", "s").items()}
    biases = [[dense.bias for dense in side if dense.bias is not None] for side in sides]
    if any(len(own) not in (0, len(side)) for own, side in zip(biases, sides, strict=True)):
        raise NoTwinError("with biases for some of its gates")
    ih, hh = biases
    if ih and hh:
        return rules | {"bias_ih": _vector(*ih), "bias_hh": _vector(*hh)}
    if hh and isinstance(cell, nnx.GRUCell):
        raise NoTwinError("with a bias in dense_h alone")
    return rules | _one_bias(ih or hh, isinstance(cell, nnx.GRUCell)) if ih or hh else rules


def _one_bias(biases: Sequence[nnx.Variable], of_gru: bool) -> Rules:
    """Makes one bias of torch's two, which is their sum."""
    rule = _vector(*biases)

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
        return rule.from_torch(ih + hh)

    *front, size = biases[0].shape
    zeros = np.zeros((*front, size * len(biases)), biases[0].dtype)
    return {
        "bias_ih": rule._replace(from_torch=sum_, also=("bias_hh",), refuses=of_gru),
        "bias_hh": Rule((), lambda: zeros, lambda array: []),
    }


def _rnn(layer: nnx.RNN, suffix: str = "_l0") -> Rules:
    """Names these cells as torch does, which has them in RNNs of one layer.

    Any other cell is a layer in it.
    """
    rules = _cell(layer.cell) if isinstance(layer.cell, _CELLS) else {}
    return {
        name + suffix: rule._replace(also=tuple(other + suffix for other in rule.also)) for name, rule in rules.items()
    }


def _bidirectional(layer: nnx.Bidirectional) -> Rules:
    forward, backward = layer.forward_rnn, layer.backward_rnn
    if not (isinstance(forward, nnx.RNN) and isinstance(backward, nnx.RNN)):
        return {}
    return _rnn(forward) | _rnn(backward, "_l0_reverse")


def _lora(layer: nnx.LoRA) -> Names:
    """Names the weights as peft does."""
    rules = {"lora_A.default.weight": _permuted(layer.lora_a, (-1, -2))}
    rules |= {"lora_B.default.weight": _permuted(layer.lora_b, (-1, -2))}
    return rules if layer.base_module is None else {**rules, "base_layer": layer.base_module}


def _lora_linear(layer: nnx.LoRALinear) -> Names:
    return {**{f"base_layer.{name}": rule for name, rule in _linear(layer).items()}, **_lora(layer.lora)}


def _weight_norm(layer: nnx.WeightNorm) -> Rules:
    """Names the weights as torch.nn.utils.parametrizations.weight_norm does."""
    inner: Any = layer.layer_instance
    kind = next((kind for kind in (nnx.Linear, nnx.ConvTranspose, nnx.Conv) if isinstance(inner, kind)), None)
    if kind is None or layer.feature_axes not in (-1, (-1,)) or not layer.scales or set(layer.scales) != {("kernel",)}:
        raise NoTwinError("which torch has for the kernel of a Linear or Conv layer, with scales and feature_axes=-1")
    rules = TORCH_NAMES[kind](inner)
    weight, scales = rules.pop("weight"), _Item(layer.scales, ("kernel",))
    *front, size = scales.shape
    shape = (*front, *(1,) * (inner.kernel.ndim - len(front) - 1), size)
    rules["parametrizations.weight.original0"] = Rule(
        (scales,),
        lambda array: weight.to_torch(array.reshape(shape)),
        lambda array: [weight.from_torch(array)[0].reshape(scales.shape)],
        dtypes=(scales.dtype.name, inner.kernel.dtype.name),
    )
    return rules | {"parametrizations.weight.original1": weight}


def _spectral_norm(layer: nnx.SpectralNorm) -> Rules:
    """Refuses the layer, since its iteration is not torch's.

    nnx keeps u and the normalised kernel. torch keeps u, v and the kernel as it was. They iterate half a step apart.
    """
    raise NoTwinError(
        "whose iteration is not torch's; after training, port its layer_instance, called once in eval mode, to torch's "
        "layer without the parametrization"
    )


_CELLS = (nnx.LSTMCell, nnx.OptimizedLSTMCell, nnx.GRUCell, nnx.SimpleCell)

# Ours are subclasses of these.
TORCH_NAMES: dict[type, Callable[[Any], Any]] = {
    nnx.BatchNorm: _batch_norm,
    nnx.Bidirectional: _bidirectional,
    nnx.Conv: _conv,
    nnx.ConvTranspose: _conv_transpose,
    nnx.Einsum: _einsum,
    nnx.Embed: _embed,
    nnx.GroupNorm: _norm,
    nnx.InstanceNorm: _norm,
    nnx.LayerNorm: _norm,
    nnx.Linear: _linear,
    nnx.LinearGeneral: _linear_general,
    nnx.LoRA: _lora,
    nnx.LoRALinear: _lora_linear,
    nnx.MultiHeadAttention: _attention,
    nnx.PReLU: _prelu,
    nnx.RMSNorm: _norm,
    nnx.RNN: _rnn,
    nnx.Sequential: lambda layer: {"": layer.layers},
    nnx.SpectralNorm: _spectral_norm,
    nnx.WeightNorm: _weight_norm,
    **dict.fromkeys(_CELLS, _cell),
    Ensemble: lambda layer: {"": layer.stacked},
}
