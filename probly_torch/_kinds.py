"""What is known about each kind of layer: a row for each, from which all else follows.

`batchensemble` converts by it, files have options by it, and weight decay goes by it. torch's layers name and draw
their own weights. A new layer is a row here and a file in `layers`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from probly_common.weights.kinds import Table, known_options, same_padding
from probly_torch.layers import (
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

Options = dict[str, Any]


class Kind(NamedTuple):
    """What is known about layers of some types, and of types derived from them unless these have a row of their own.

    A field that is None is that of the next base class.
    """

    types: tuple[type[nn.Module], ...]
    kind: str | None = None  # what files call it, unless its options say that
    options: Callable[[Any], Options | None] | None = None
    members: type[nn.Module] | None = None  # the layer of members that batchensemble makes of it
    is_norm: bool = False  # which batchensemble converts under per_member_norms
    decays: bool | None = None  # whether its weights do; biases never do


# How options are read


def _attributes(*names: str) -> Callable[[Any], Options]:
    return lambda layer: {name: getattr(layer, name) for name in names if hasattr(layer, name)}


def _has(layer: Any, *names: str) -> dict[str, bool]:
    return {name: getattr(layer, name, None) is not None for name in names}


def _conv(layer: Any) -> Options:
    options = {name: list(getattr(layer, name)) for name in ("kernel_size", "stride", "dilation")}
    padding = layer.padding
    if padding == "same":
        padding = same_padding(*options.values())
    elif padding == "valid":
        padding = [[0, 0] for _ in layer.kernel_size]
    else:
        padding = [[p, p] for p in padding]
    return {
        "kind": f"Conv{len(padding)}d",
        **options,
        "input_dilation": [1] * len(padding),
        "padding": padding,
        "padding_mode": layer.padding_mode,
        "groups": layer.groups,
        **_has(layer, "bias"),
    }


def _conv_transpose(layer: Any) -> Options:
    options = {name: list(getattr(layer, name)) for name in ("kernel_size", "stride", "dilation")}
    padding = [[p, p - more] for p, more in zip(layer.padding, layer.output_padding, strict=True)]
    return {
        "kind": f"ConvTranspose{len(padding)}d",
        **options,
        "padding": padding,
        "padding_mode": "zeros",
        "groups": layer.groups,
        **_has(layer, "bias"),
    }


def _embedding(layer: Any) -> Options:
    max_norm = getattr(layer, "max_norm", None)  # a BatchEnsemble layer has none
    norm = {} if max_norm is None else {"norm_type": layer.norm_type}
    return {"padding_idx": layer.padding_idx, "max_norm": max_norm, **norm}


def _layer_norm(layer: Any) -> Options:
    return {"eps": layer.eps, **_has(layer, "weight", "bias"), **_axes(layer)}


def _rms_norm(layer: Any) -> Options:
    eps = layer.eps
    if eps is None:  # torch's default is that of the dtype
        eps = torch.finfo(torch.get_default_dtype() if layer.weight is None else layer.weight.dtype).eps
    return {"eps": eps, **_has(layer, "weight"), **_axes(layer)}


def _axes(layer: Any) -> dict[str, list[int]]:
    axes = list(range(-len(layer.normalized_shape), 0))
    return dict.fromkeys(("axes",) if layer.weight is None else ("axes", "feature_axes"), axes)


def _statistics(layer: Any) -> Options:
    momentum = {"momentum": layer.momentum} if layer.track_running_stats else {}
    tracked = {"track_running_stats": layer.track_running_stats}
    return {"eps": layer.eps, **_has(layer, "weight", "bias"), **momentum, **tracked}


def _attention(layer: Any) -> Options:
    options = _attributes("num_heads", "batch_first", "add_zero_attn")(layer)
    return {**options, "bias": layer.in_proj_bias is not None, "add_bias_kv": layer.bias_k is not None}


def _cell(layer: Any) -> Options:
    return {
        "bias": layer.bias,
        "nonlinearity": getattr(layer, "nonlinearity", "tanh"),
        "gate": "sigmoid",
        "residual": False,
    }


def _sequence(layer: Any) -> Options:
    sizes = _attributes("num_layers", "bidirectional", "batch_first", "proj_size")(layer)
    return {**_cell(layer), **sizes, "reverse": False}


def _linear(layer: Any) -> Options:
    return _has(layer, "bias")


def _group_norm(layer: Any) -> Options:
    return {**_attributes("eps", "num_groups")(layer), **_has(layer, "weight", "bias"), "axes": None}


# Activations as functions, and their defaults.
FUNCTIONS: dict[Any, tuple[str, dict[str, Any]]] = {
    functional.gelu: ("GELU", {"approximate": "none"}),
    functional.leaky_relu: ("LeakyReLU", {"negative_slope": 0.01}),
    **dict.fromkeys((functional.relu, torch.relu), ("ReLU", {})),
    **dict.fromkeys((functional.sigmoid, torch.sigmoid), ("Sigmoid", {})),
    **dict.fromkeys((functional.tanh, torch.tanh), ("Tanh", {})),
    functional.elu: ("ELU", {"alpha": 1.0}),
    functional.silu: ("SiLU", {}),
    functional.mish: ("Mish", {}),
    functional.celu: ("CELU", {"alpha": 1.0}),
}

_CONV = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_CONV_TRANSPOSE = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_BATCH_NORM = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_WITHOUT_OPTIONS = (
    *(nn.ReLU, nn.ReLU6, nn.SiLU, nn.Mish, nn.SELU, nn.Sigmoid, nn.LogSigmoid, nn.Tanh, nn.Softsign, nn.Hardswish),
    *(nn.Hardsigmoid, nn.Softmax, nn.LogSoftmax, nn.GLU, nn.Identity),
    *(nn.Threshold, nn.Softshrink, nn.Hardshrink, nn.Tanhshrink),
)
_ROWS = (
    Kind((nn.Linear,), "Linear", _linear, BatchEnsembleLinear, decays=True),
    Kind((nn.Bilinear,), decays=True),
    Kind(_CONV, None, _conv, BatchEnsembleConv, decays=True),
    Kind(_CONV_TRANSPOSE, None, _conv_transpose, BatchEnsembleConvTranspose, decays=True),
    Kind((nn.Embedding,), "Embedding", _embedding, BatchEnsembleEmbed, decays=True),
    Kind((nn.EmbeddingBag,), "EmbeddingBag", _attributes(), decays=True),
    Kind(_BATCH_NORM, "BatchNorm", _statistics, BatchEnsembleBatchNorm, is_norm=True, decays=False),
    Kind((nn.SyncBatchNorm,), "BatchNorm", _statistics, decays=False),
    Kind((nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d), "InstanceNorm", _statistics, decays=False),
    Kind((nn.LayerNorm,), "LayerNorm", _layer_norm, BatchEnsembleLayerNorm, is_norm=True, decays=False),
    Kind((nn.RMSNorm,), "RMSNorm", _rms_norm, decays=False),
    Kind((nn.GroupNorm,), "GroupNorm", _group_norm, BatchEnsembleGroupNorm, is_norm=True, decays=False),
    Kind((nn.MultiheadAttention,), "MultiheadAttention", _attention, BatchEnsembleMultiHeadAttention, decays=True),
    Kind((nn.LSTM,), "LSTM", _sequence, BatchEnsembleLSTM, decays=True),
    Kind((nn.GRU,), "GRU", _sequence, BatchEnsembleGRU, decays=True),
    Kind((nn.RNN,), "RNN", _sequence, decays=True),
    Kind((nn.LSTMCell,), "LSTMCell", _cell, BatchEnsembleLSTMCell, decays=True),
    Kind((nn.GRUCell,), "GRUCell", _cell, BatchEnsembleGRUCell, decays=True),
    Kind((nn.RNNCell,), "RNNCell", _cell, decays=True),
    Kind((_ConvNd, nn.RNNBase, nn.RNNCellBase), decays=True),
    Kind((_NormBase,), decays=False),
    Kind((nn.PReLU,), "PReLU", _attributes(), decays=False),
    Kind((nn.GELU,), "GELU", _attributes("approximate")),
    Kind((nn.LeakyReLU,), "LeakyReLU", _attributes("negative_slope")),
    Kind((nn.ELU,), "ELU", _attributes("alpha")),
    Kind((nn.CELU,), "CELU", _attributes("alpha")),
    Kind((nn.Softplus,), "Softplus", _attributes("beta", "threshold")),
    Kind((nn.Hardtanh,), "Hardtanh", _attributes("min_val", "max_val")),
    *(Kind((each,), each.__name__, _attributes()) for each in _WITHOUT_OPTIONS),
)
# Layers of members, which are no subclasses of torch's, have the rows of those that they are made of.
KINDS = Table(row._replace(types=(*row.types, row.members)) if row.members else row for row in _ROWS)


def options_of_function(function: Any) -> Options | None:
    """Returns the options of an activation that is kept as a function, if it is one that is known."""
    keywords: Mapping[str, Any] = {}
    if isinstance(function, partial):
        function, keywords = function.func, {} if function.args else function.keywords
    known = (known_options(kind, {**own, **keywords}) for each, (kind, own) in FUNCTIONS.items() if each is function)
    return next(known, None)
