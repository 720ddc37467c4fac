"""What is known about each kind of layer: a row for each, from which all else follows.

`batchensemble` converts by it, files have names, layouts and options by it, `ensemble` draws anew by it, and weight
decay goes by it. A new layer is a row here and a file in `layers`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from probly_common.weights.kinds import Table, known_options, same_padding
from probly_flax import _layouts as layouts
from probly_flax import random
from probly_flax.layers import (
    BatchEnsembleBatchNorm,
    BatchEnsembleConv,
    BatchEnsembleConvTranspose,
    BatchEnsembleEmbed,
    BatchEnsembleGroupNorm,
    BatchEnsembleGRU,
    BatchEnsembleGRUCell,
    BatchEnsembleLayerNorm,
    BatchEnsembleLinear,
    BatchEnsembleLSTM,
    BatchEnsembleLSTMCell,
    BatchEnsembleMultiHeadAttention,
)
from probly_flax.random import Rngs

Options = dict[str, Any]


class Kind(NamedTuple):
    """What is known about layers of some types, and of types derived from them unless these have a row of their own.

    A field that is None is that of the next base class.
    """

    types: tuple[type[nnx.Module], ...]
    kind: str | None = None  # what files call it, unless its options say that
    options: Callable[[Any], Options | None] | None = None
    weights: Callable[[Any], layouts.Weights] | None = None
    reset: Callable[[Any, Rngs], None] | None = None
    decays: bool | None = None  # whether its weights do; biases never do
    members: Callable[..., nnx.Module] | None = None  # the layer of members that batchensemble makes of it
    members_of_rnn: Callable[..., nnx.Module] | None = None  # and of an nnx.RNN, if it is a cell
    is_norm: bool = False  # which batchensemble converts under per_member_norms
    paths: Mapping[str, str] | None = None  # of what it holds, where torch has another name, or none


# How options are read


def _attributes(*names: str) -> Callable[[Any], Options]:
    return lambda layer: {name: getattr(layer, name) for name in names if hasattr(layer, name)}


def _bias(layer: Any) -> Options:
    return {"bias": layer.bias is not None}


def _per_axis(value: int | Sequence[int] | None, rank: int) -> list[int]:
    return [1 if value is None else value] * rank if value is None or isinstance(value, int) else list(value)


def _pairs(padding: Any, rank: int) -> list[list[int]]:
    sizes = [padding] * rank if isinstance(padding, int) else padding
    return [[size, size] if isinstance(size, int) else list(size) for size in sizes]


def _sizes(layer: Any) -> Options:
    kernel_size = list(layer.kernel_size)
    sizes = {"stride": layer.strides, "dilation": layer.kernel_dilation}
    return {"kernel_size": kernel_size, **{name: _per_axis(each, len(kernel_size)) for name, each in sizes.items()}}


def _conv(layer: Any) -> Options:
    sizes = _sizes(layer)
    rank, ones, word = len(sizes["kernel_size"]), [1] * len(sizes["kernel_size"]), layer.padding
    word = word.upper() if isinstance(word, str) else None
    if word in ("CIRCULAR", "REFLECT"):
        padding: Any = same_padding(sizes["kernel_size"], ones, sizes["dilation"])
    elif word == "CAUSAL":
        padding = [[d * (k - 1), 0] for k, d in zip(sizes["kernel_size"], sizes["dilation"], strict=True)]
    elif word in ("SAME", "SAME_LOWER"):
        padding = same_padding(*sizes.values())
        if word == "SAME_LOWER":  # of strides, it may be torch's, which depends on the size of the input
            padding = None if padding == "same" else [[high, low] for low, high in padding]
    elif word not in (None, "VALID"):
        padding = None  # which is not recorded
    else:
        padding = _pairs(0 if word == "VALID" else layer.padding, rank)
    return {
        "kind": f"Conv{rank}d",
        **sizes,
        "input_dilation": _per_axis(layer.input_dilation, rank),
        "padding": padding,
        "padding_mode": word.lower() if word in ("CIRCULAR", "REFLECT") else "zeros",
        "groups": layer.feature_group_count,
        **_bias(layer),
    }


def _conv_transpose(layer: Any) -> Options:
    sizes = _sizes(layer)
    extents = [d * (k - 1) for k, d in zip(sizes["kernel_size"], sizes["dilation"], strict=True)]
    steps, word = list(zip(extents, sizes["stride"], strict=True)), layer.padding
    if word == "SAME":  # of jax.lax.conv_transpose
        low = [extent if stride > extent else (extent + stride) // 2 for extent, stride in steps]
        pairs = [[p, extent + stride - 1 - p] for p, (extent, stride) in zip(low, steps, strict=True)]
    elif word in ("VALID", "CIRCULAR"):
        pairs = [[extent, max(extent, stride - 1)] for extent, stride in steps]
    elif not isinstance(word, str):
        pairs = _pairs(word, len(extents))
    known = word in ("SAME", "VALID", "CIRCULAR") or not isinstance(word, str)
    padding = {"padding": [[e - low, e - high] for e, (low, high) in zip(extents, pairs, strict=True)]} if known else {}
    return {
        "kind": f"ConvTranspose{len(extents)}d",
        **sizes,
        **padding,
        "padding_mode": "circular" if word == "CIRCULAR" else "zeros",
        "groups": 1,
        **_bias(layer),
    }


def _affine(layer: Any) -> Options:
    return {"eps": layer.epsilon, "weight": layer.scale is not None, **_bias(layer)}


def _axes(layer: Any) -> Options:
    """Returns the axes as they are.

    Some count from the first axis. Which axes these are in torch depends on the input's rank.
    """
    given = {"axes": layer.reduction_axes}
    if layer.scale is not None:
        given["feature_axes"] = layer.feature_axes
    return {name: sorted([axes] if isinstance(axes, int) else axes) for name, axes in given.items()}


def _embed(layer: Any) -> Options:
    return {"max_norm": None}


def _instance_norm(layer: Any) -> Options:
    return {**_affine(layer), "track_running_stats": False}


def _layer_norm(layer: Any) -> Options:
    return {**_affine(layer), **_axes(layer)}


def _group_norm(layer: Any) -> Options:
    axes = layer.reduction_axes
    own = axes if axes is None else sorted([axes] if isinstance(axes, int) else axes)
    return {**_affine(layer), "num_groups": layer.num_groups, "axes": own}


def _batch_norm(layer: Any) -> Options:
    return {**_affine(layer), "momentum": other_weight(layer.momentum), "track_running_stats": True}


def _rms_norm(layer: Any) -> Options:
    return {"eps": layer.epsilon, "weight": layer.scale is not None, **_axes(layer)}


def _attention(layer: Any) -> Options:
    """Returns the options of attention, without whether batches come first.

    They do in every layer of nnx, so that this is a question of the network around it.
    """
    return {**_attributes("num_heads")(layer), "bias": layer.use_bias, "add_bias_kv": False, "add_zero_attn": False}


def _cell(layer: Any) -> Options:
    functions = {"nonlinearity": layer.activation_fn, "gate": getattr(layer, "gate_fn", None)}
    names = {nnx.tanh: "tanh", nnx.relu: "relu", nnx.sigmoid: "sigmoid"}
    known = {option: name for option, given in functions.items() for each, name in names.items() if given is each}
    dense = (getattr(layer, name, None) for name in ("dense_i", "dense_h", "hi"))
    bias = any(each.bias is not None for each in dense if each is not None)
    return {**known, "residual": getattr(layer, "residual", False), "bias": bias}


def _sequence(layer: Any) -> Options | None:
    both = isinstance(layer, nnx.Bidirectional)
    rnns = (layer.forward_rnn, layer.backward_rnn) if both else (layer,)
    cells = [KINDS.options(rnn.cell) if isinstance(rnn, nnx.RNN) else None for rnn in rnns]
    cell, other = cells[0], cells[-1]
    if cell is None or other is None or cell["kind"] != other["kind"]:
        return None
    mixed = {name for name in cell.keys() | other.keys() if cell.get(name) != other.get(name)}
    cell |= {name: "mixed" if name in ("nonlinearity", "gate") else True for name in mixed}
    return {
        **cell,
        "kind": cell["kind"].removesuffix("Cell"),
        "batch_first": not layer.time_major,
        "bidirectional": both,
        "reverse": rnns[0].reverse,
        "num_layers": 1,
        "proj_size": 0,
    }


def other_weight(momentum: float) -> float:
    """Computes the weight of the new from that of the old, and the other way round, as decimals."""
    return float(f"{1 - momentum:.12g}")


# How weights are drawn anew. nnx layers do not keep their initialisers: these are the ones that they have by default.


def _draw(parameter: nnx.Variable | None, init: Callable[..., Array], rngs: Rngs) -> None:
    if parameter is not None:
        value = init(rngs.params(), parameter.shape, random.draw_dtype(parameter.dtype))
        parameter.set_value(value.astype(parameter.dtype))


def _reset_kernel(layer: Any, rngs: Rngs) -> None:
    _draw(layer.kernel, nnx.initializers.lecun_normal(), rngs)
    _draw(layer.bias, nnx.initializers.zeros, rngs)


def _reset_linear_general(layer: nnx.LinearGeneral, rngs: Rngs) -> None:
    def lecun_normal(key: Array, shape: Sequence[int], dtype: Any) -> Array:
        flat = (math.prod(shape) // math.prod(layer.out_features), math.prod(layer.out_features))
        return nnx.initializers.lecun_normal()(key, flat, dtype).reshape(shape)

    _draw(layer.kernel, lecun_normal, rngs)
    _draw(layer.bias, nnx.initializers.zeros, rngs)


def _reset_embed(layer: nnx.Embed, rngs: Rngs) -> None:
    _draw(layer.embedding, nnx.initializers.variance_scaling(1.0, "fan_in", "normal", out_axis=0), rngs)


def _reset_norm(layer: Any, rngs: Rngs) -> None:
    _draw(layer.scale, nnx.initializers.ones, rngs)
    _draw(getattr(layer, "bias", None), nnx.initializers.zeros, rngs)


def _reset_batch_norm(layer: nnx.BatchNorm, rngs: Rngs) -> None:
    _reset_norm(layer, rngs)
    layer.mean.set_value(jnp.zeros_like(layer.mean[...]))
    layer.var.set_value(jnp.ones_like(layer.var[...]))


def _reset_cell(layer: Any, rngs: Rngs) -> None:
    _draw(layer.dense_h.kernel, nnx.initializers.orthogonal(), rngs)  # after its Linear layers, which come first


def _reset_lstm_cell(layer: nnx.LSTMCell, rngs: Rngs) -> None:
    for linear in (layer.hi, layer.hf, layer.hg, layer.ho):
        _draw(linear.kernel, nnx.initializers.orthogonal(), rngs)


def _reset_lora(layer: nnx.LoRA, rngs: Rngs) -> None:
    _draw(layer.lora_a, nnx.initializers.he_uniform(), rngs)
    _draw(layer.lora_b, nnx.initializers.zeros, rngs)


def _reset_prelu(layer: nnx.PReLU, rngs: Rngs) -> None:
    _draw(layer.negative_slope, nnx.initializers.constant(0.01), rngs)


# Activations are functions; these are their defaults.
FUNCTIONS: dict[Any, tuple[str, dict[str, Any]]] = {
    nnx.gelu: ("GELU", {"approximate": True}),
    nnx.leaky_relu: ("LeakyReLU", {"negative_slope": 0.01}),
    nnx.elu: ("ELU", {"alpha": 1.0}),
    nnx.celu: ("CELU", {"alpha": 1.0}),
    nnx.softplus: (
        "Softplus",
        {"beta": 1.0, "threshold": 20.0},
    ),  # beyond which torch leaves out what float32 cannot hold
    nnx.hard_tanh: ("Hardtanh", {"min_val": -1.0, "max_val": 1.0}),
    nnx.relu: ("ReLU", {}),
    nnx.relu6: ("ReLU6", {}),
    nnx.silu: ("SiLU", {}),
    jax.nn.mish: ("Mish", {}),
    nnx.selu: ("SELU", {}),
    nnx.sigmoid: ("Sigmoid", {}),
    nnx.log_sigmoid: ("LogSigmoid", {}),
    nnx.tanh: ("Tanh", {}),
    nnx.soft_sign: ("Softsign", {}),
    nnx.hard_swish: ("Hardswish", {}),
    nnx.hard_sigmoid: ("Hardsigmoid", {}),
    nnx.softmax: ("Softmax", {}),
    nnx.log_softmax: ("LogSoftmax", {}),
    nnx.glu: ("GLU", {}),
}

_NORM: dict[str, Any] = {"weights": layouts.norm, "reset": _reset_norm, "decays": False}
_LSTM: dict[str, Any] = {"members": BatchEnsembleLSTMCell, "members_of_rnn": BatchEnsembleLSTM}
KINDS = Table(
    (
        Kind((nnx.Linear,), "Linear", _bias, layouts.linear, _reset_kernel, True, BatchEnsembleLinear),
        Kind((nnx.LinearGeneral,), "Linear", _bias, layouts.linear_general, _reset_linear_general, True),
        Kind((nnx.Einsum,), "Linear", _bias, layouts.einsum, _reset_kernel, True),
        Kind((nnx.Conv,), None, _conv, layouts.conv, _reset_kernel, True, BatchEnsembleConv),
        Kind(
            (nnx.ConvTranspose,),
            None,
            _conv_transpose,
            layouts.conv_transpose,
            _reset_kernel,
            True,
            BatchEnsembleConvTranspose,
        ),
        Kind((nnx.Embed,), "Embedding", _embed, layouts.embed, _reset_embed, True, BatchEnsembleEmbed),
        Kind(
            (nnx.BatchNorm,),
            "BatchNorm",
            _batch_norm,
            layouts.batch_norm,
            _reset_batch_norm,
            False,
            BatchEnsembleBatchNorm,
            is_norm=True,
        ),
        Kind((nnx.InstanceNorm,), "InstanceNorm", _instance_norm, **_NORM),
        Kind((nnx.LayerNorm,), "LayerNorm", _layer_norm, members=BatchEnsembleLayerNorm, is_norm=True, **_NORM),
        Kind((nnx.RMSNorm,), "RMSNorm", _rms_norm, **_NORM),
        Kind((nnx.GroupNorm,), "GroupNorm", _group_norm, members=BatchEnsembleGroupNorm, is_norm=True, **_NORM),
        Kind(
            (nnx.MultiHeadAttention,),
            "MultiheadAttention",
            _attention,
            layouts.attention,
            members=BatchEnsembleMultiHeadAttention,
        ),
        Kind((nnx.LSTMCell,), "LSTMCell", _cell, layouts.cell, _reset_lstm_cell, **_LSTM),
        Kind((nnx.OptimizedLSTMCell,), "LSTMCell", _cell, layouts.cell, _reset_cell, **_LSTM),
        Kind((nnx.GRUCell,), "GRUCell", _cell, layouts.cell, _reset_cell, None, BatchEnsembleGRUCell, BatchEnsembleGRU),
        Kind((nnx.SimpleCell,), "RNNCell", _cell, layouts.cell, _reset_cell),
        Kind((nnx.RNN,), None, _sequence, layouts.rnn),
        Kind((nnx.Bidirectional,), None, _sequence, layouts.bidirectional),
        Kind((nnx.PReLU,), "PReLU", _attributes(), layouts.prelu, _reset_prelu, False),
        Kind((nnx.LoRA,), None, None, layouts.lora, _reset_lora, True, paths={"base_module": "base_layer"}),
        Kind((nnx.LoRALinear,), weights=layouts.lora_linear),
        Kind((nnx.WeightNorm,), weights=layouts.weight_norm, decays=False, paths={"layer_instance": ""}),
        Kind((nnx.SpectralNorm,), weights=layouts.spectral_norm, paths={"layer_instance": ""}),
        Kind((nnx.Sequential,), paths={"layers": ""}),
    )
)


def options_of_function(function: Any) -> Options | None:
    """Returns the options of an activation that is kept as a function, if it is one that is known."""
    keywords: Mapping[str, Any] = {}
    if isinstance(function, partial):
        function, keywords = function.func, {} if function.args else function.keywords
    for known, (kind, defaults) in FUNCTIONS.items():
        if known is function:
            options = {**defaults, **keywords}
            if kind == "GELU":
                options["approximate"] = "tanh" if options["approximate"] else "none"
            return known_options(kind, options)
    return options_of_function(function.__wrapped__) if hasattr(function, "__wrapped__") else None  # of jit
