"""The options of a torch model's layers, which travel with its weights, and their comparison at loading."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from probly_common.weights.kinds import KINDS, Missing, Options, Text, check_same_options, known_options, same_padding
from probly_torch import layers as probly
from probly_torch.ensemble import Ensemble


def layer_options(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Returns the options of every layer that has a kind, by its path in torch.

    The options are numbers, strings, booleans, None and lists of these.

    Example:
        >>> layer_options(nn.Sequential(nn.Linear(4, 3), nn.GELU()))
        {'0': {'kind': 'Linear', 'bias': True}, '1': {'kind': 'GELU', 'approximate': 'none'}}
    """
    options = dict(_walk(model, ""))
    for path, channels in _flattened(model):
        if path in options:  # not inside a layer that has a kind itself
            options[path]["flatten_channels"] = channels
    return options


def check_options(what: str, model: nn.Module, recorded: Any) -> None:
    """Compares a model's options with those of a file, layer by layer, where both are known.

    Raises:
        ValueError: with a line for every difference, which ends with the argument to change.

    Example:
        >>> recorded = {"": {"kind": "LayerNorm", "eps": 1e-6}}
        >>> try:
        ...     check_options("load_weights", nn.LayerNorm(3), recorded)
        ... except ValueError as error:
        ...     print(str(error).splitlines()[1].strip())
        (root): eps 1e-05 here, 1e-06 in the file; nn.LayerNorm(..., eps=1e-06)
    """
    defaults = {kind: known_options(kind, options) for kind, options in _FUNCTIONS.values()}
    sequentials = {path: len(module._modules) for path, module, _ in _modules(model, "") if _is_sequential(module)}
    parts = {path: module for path, module, _ in _modules(model, "")}
    own, names = layer_options(model), model.state_dict
    check_same_options(what, own, recorded, _arguments, _advice, sequentials, defaults, names, parts)


def _walk(module: nn.Module, path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    if isinstance(module, Ensemble):
        module = module._network
    options = _options(module)
    if options is not None:
        yield path, options
        return
    functions = ((f"{path}.{name}" if path else name, _function(value)) for name, value in vars(module).items())
    yield from ((inner, options) for inner, options in functions if options is not None)
    for inner, child in _children(module, path):
        yield from _walk(child, inner)


def _options(layer: nn.Module) -> dict[str, Any] | None:
    kind, read = next((_LAYERS[each] for each in type(layer).__mro__ if each in _LAYERS), ("", _no_kind))
    try:
        options = read(layer)
    except (AttributeError, TypeError, ValueError):  # a class derived from the kind, made in another way
        options = None
    if options is None:
        return None
    kind = options.pop("kind", kind)
    return known_options(kind, options | _attributes("num_members")(layer)) if kind in KINDS else None


def _no_kind(layer: nn.Module) -> None:
    return None


def _function(function: Any) -> dict[str, Any] | None:
    """Returns the options of an activation that is kept as a function, if it is one that is known."""
    keywords: Mapping[str, Any] = {}
    if isinstance(function, partial):
        function, keywords = function.func, {} if function.args else function.keywords
    known = (known_options(kind, {**own, **keywords}) for each, (kind, own) in _FUNCTIONS.items() if each is function)
    return next(known, None)


def _attributes(*names: str) -> Callable[[Any], dict[str, Any]]:
    return lambda layer: {name: getattr(layer, name) for name in names if hasattr(layer, name)}


def _has(layer: Any, *names: str) -> dict[str, bool]:
    return {name: getattr(layer, name, None) is not None for name in names}


def _conv(layer: Any) -> dict[str, Any]:
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


def _conv_transpose(layer: Any) -> dict[str, Any]:
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


def _embedding(layer: Any) -> dict[str, Any]:
    max_norm = getattr(layer, "max_norm", None)  # a BatchEnsemble layer has none
    norm = {} if max_norm is None else {"norm_type": layer.norm_type}
    return {"padding_idx": layer.padding_idx, "max_norm": max_norm, **norm}


def _layer_norm(layer: Any) -> dict[str, Any]:
    return {"eps": layer.eps, **_has(layer, "weight", "bias"), **_axes(layer)}


def _rms_norm(layer: Any) -> dict[str, Any]:
    eps = layer.eps
    if eps is None:  # torch's default is that of the dtype
        eps = torch.finfo(torch.get_default_dtype() if layer.weight is None else layer.weight.dtype).eps
    return {"eps": eps, **_has(layer, "weight"), **_axes(layer)}


def _axes(layer: Any) -> dict[str, list[int]]:
    axes = list(range(-len(layer.normalized_shape), 0))
    return dict.fromkeys(("axes",) if layer.weight is None else ("axes", "feature_axes"), axes)


def _statistics(layer: Any) -> dict[str, Any]:
    momentum = {"momentum": layer.momentum} if layer.track_running_stats else {}
    tracked = {"track_running_stats": layer.track_running_stats}
    return {"eps": layer.eps, **_has(layer, "weight", "bias"), **momentum, **tracked}


def _attention(layer: Any) -> dict[str, Any]:
    options = _attributes("num_heads", "batch_first", "add_zero_attn")(layer)
    return {**options, "bias": layer.in_proj_bias is not None, "add_bias_kv": layer.bias_k is not None}


def _cell(layer: Any) -> dict[str, Any]:
    return {
        "bias": layer.bias,
        "nonlinearity": getattr(layer, "nonlinearity", "tanh"),
        "gate": "sigmoid",
        "residual": False,
    }


def _sequence(layer: Any) -> dict[str, Any]:
    sizes = _attributes("num_layers", "bidirectional", "batch_first", "proj_size")(layer)
    return {**_cell(layer), **sizes, "reverse": False}


_LAYERS: dict[type[nn.Module], tuple[str, Callable[[Any], dict[str, Any] | None]]] = {
    **dict.fromkeys((nn.Linear, probly.BatchEnsembleLinear), ("Linear", lambda layer: _has(layer, "bias"))),
    **dict.fromkeys((nn.Conv1d, nn.Conv2d, nn.Conv3d, probly.BatchEnsembleConv), ("", _conv)),
    **dict.fromkeys(
        (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, probly.BatchEnsembleConvTranspose),
        ("", _conv_transpose),
    ),
    **dict.fromkeys((nn.Embedding, probly.BatchEnsembleEmbed), ("Embedding", _embedding)),
    **dict.fromkeys(
        (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, probly.BatchEnsembleBatchNorm),
        ("BatchNorm", _statistics),
    ),
    **dict.fromkeys((nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d), ("InstanceNorm", _statistics)),
    **dict.fromkeys((nn.LayerNorm, probly.BatchEnsembleLayerNorm), ("LayerNorm", _layer_norm)),
    nn.RMSNorm: ("RMSNorm", _rms_norm),
    **dict.fromkeys(
        (nn.GroupNorm, probly.BatchEnsembleGroupNorm),
        (
            "GroupNorm",
            lambda layer: {**_attributes("eps", "num_groups")(layer), **_has(layer, "weight", "bias"), "axes": None},
        ),
    ),
    **dict.fromkeys(
        (nn.MultiheadAttention, probly.BatchEnsembleMultiHeadAttention), ("MultiheadAttention", _attention)
    ),
    **dict.fromkeys((nn.LSTM, probly.BatchEnsembleLSTM), ("LSTM", _sequence)),
    **dict.fromkeys((nn.GRU, probly.BatchEnsembleGRU), ("GRU", _sequence)),
    nn.RNN: ("RNN", _sequence),
    **dict.fromkeys((nn.LSTMCell, probly.BatchEnsembleLSTMCell), ("LSTMCell", _cell)),
    **dict.fromkeys((nn.GRUCell, probly.BatchEnsembleGRUCell), ("GRUCell", _cell)),
    nn.RNNCell: ("RNNCell", _cell),
    nn.GELU: ("GELU", _attributes("approximate")),
    nn.LeakyReLU: ("LeakyReLU", _attributes("negative_slope")),
    nn.ELU: ("ELU", _attributes("alpha")),
    nn.CELU: ("CELU", _attributes("alpha")),
    nn.Softplus: ("Softplus", _attributes("beta", "threshold")),
    nn.Hardtanh: ("Hardtanh", _attributes("min_val", "max_val")),
    **{
        each: (each.__name__, _attributes())
        for each in (
            *(nn.PReLU, nn.ReLU, nn.ReLU6, nn.SiLU, nn.Mish, nn.SELU, nn.Sigmoid, nn.LogSigmoid, nn.Tanh, nn.Softsign),
            *(nn.Hardswish, nn.Hardsigmoid, nn.Softmax, nn.LogSoftmax, nn.GLU, nn.EmbeddingBag, nn.Identity),
            *(nn.Threshold, nn.Softshrink, nn.Hardshrink, nn.Tanhshrink),
        )
    },
}
# Activations as functions, and their defaults.
_FUNCTIONS: dict[Any, tuple[str, dict[str, Any]]] = {
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


def _arguments(kind: str, options: Options) -> dict[str, Any]:
    """Translates these options into arguments of torch's layer."""
    arguments = {name: tuple(value) if isinstance(value, list) else value for name, value in options.items()}
    for name in ("kind", "num_members", "flatten_channels"):
        arguments.pop(name, None)
    lacking = {"gate", "residual", "reverse", "input_dilation"}
    lacking |= {"padding_mode"} if kind.startswith("ConvTranspose") else set()
    lacking |= {"nonlinearity"} if kind not in ("RNN", "RNNCell") else set()
    for name in lacking & arguments.keys():
        arguments[name] = Missing(repr(arguments[name]))
    if "padding" in options:
        arguments |= _padding(kind, options)
    if kind == "GroupNorm" and arguments.get("axes") is not None:
        arguments["axes"] = Missing(repr(arguments["axes"]))
    elif "axes" in options and kind != "GroupNorm":
        axes = arguments.pop("axes")
        if "feature_axes" in arguments:
            of_all = arguments["feature_axes"] == axes
            arguments["feature_axes"] = Missing("all that it normalises" if of_all else repr(arguments["feature_axes"]))
        last = axes == tuple(range(-len(axes), 0))
        arguments["normalized_shape"] = Text(f"x.shape[{axes[0]}:]") if last else Missing(f"of axes {axes}")
    if "weight" in options:
        affine = "elementwise_affine" if kind in ("LayerNorm", "RMSNorm") else "affine"
        arguments[affine] = arguments.pop("weight")
        if affine == "affine" or not arguments[affine]:
            arguments.pop("bias", None)
    return arguments


def _padding(kind: str, options: Options) -> dict[str, Any]:
    pairs = options["padding"]
    if pairs == "same":
        return {"padding": Missing("'same' of strides")}
    low, as_pairs = tuple(p for p, _ in pairs), Missing(repr(tuple(map(tuple, pairs))))
    if kind.startswith("ConvTranspose"):
        possible = all(p >= max(q, 0) for p, q in pairs)
        more = {"output_padding": tuple(p - q for p, q in pairs)}
        return {"padding": low, **more} if possible else {"padding": as_pairs}
    if all(0 <= p == q for p, q in pairs):
        return {"padding": low}
    same = pairs == same_padding(options["kernel_size"], options["stride"], options["dilation"])
    return {"padding": "same" if same else as_pairs}


def _advice(kind: str, arguments: Mapping[str, Any]) -> str:
    layer = f"nn.{kind}1d/2d/3d" if kind in ("BatchNorm", "InstanceNorm") else f"nn.{kind}"
    passed = "".join(f", {name}={value!r}" for name, value in arguments.items() if not isinstance(value, Missing))
    if arguments and not passed:
        return f"{layer} has no {', '.join(f'{name} {value}' for name, value in arguments.items())}"
    return f"{layer}(...{passed})"


def _flattened(model: nn.Module) -> Iterator[tuple[str, int]]:
    """Yields the layers that read something flattened, and how many channels it has.

    The number is 0 if the channels are not known. Layers come in the order of Sequentials, and of the attributes of
    other modules, whose forward is not read.
    """
    for outer, module in (each[:2] for each in _modules(model, "") if each[2]):
        channels, rank, flat, pooled = 0, 4, False, False  # an image, as long as nothing else is known
        for path, layer in _in_order(module, outer):
            if isinstance(layer, nn.Flatten):
                whole = layer.start_dim % rank == 1 and layer.end_dim % rank == rank - 1
                flat = flat or (whole and not pooled)
            elif isinstance(layer, _LINEAR):
                features = layer.weight.shape[-1]
                sure = _is_sequential(module) or not channels or features % channels == 0
                if flat and sure and features != channels:
                    yield path, channels
                channels, flat, pooled = 0, False, False
            elif isinstance(layer, _CONVOLUTIONS):
                channels, rank, flat, pooled = layer.out_channels, layer.weight.dim(), False, False
            elif isinstance(layer, _NORMS):
                if flat:
                    yield path, channels
                elif isinstance(layer, _IMAGE_NORMS):
                    channels = layer.num_features
            elif _is_pooled(layer):
                pooled = True
            elif not isinstance(layer, (*_ELEMENTWISE, *_BY_CHANNEL)):
                channels, rank, pooled = 0, 4, False


def _is_pooled(layer: nn.Module) -> bool:
    """Tells whether the layer leaves one value for each channel.

    Torch's order and any other are then the same.
    """
    return getattr(layer, "output_size", None) in (1, (1,), (1, 1), (1, 1, 1))


def _modules(module: nn.Module, path: str, outermost: bool = True) -> Iterator[tuple[str, nn.Module, bool]]:
    """Yields all modules by their paths, and whether they are no Sequential in another module."""
    if isinstance(module, Ensemble):
        module = module._network
    yield path, module, outermost or not _is_sequential(module)
    for inner, layer in _children(module, path):
        yield from _modules(layer, inner, outermost=False)


def _in_order(module: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
    for inner, layer in _children(module, path):
        if _is_sequential(layer):
            yield from _in_order(layer, inner)
        else:
            yield inner, layer


def _children(module: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
    return ((f"{path}.{name}" if path else name, child) for name, child in module._modules.items() if child is not None)


def _is_sequential(module: nn.Module) -> bool:
    return type(module).forward is nn.Sequential.forward


_CONVOLUTIONS = (
    *(nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
    *(probly.BatchEnsembleConv, probly.BatchEnsembleConvTranspose),
)
_LINEAR = (nn.Linear, probly.BatchEnsembleLinear)
_NORMS = tuple(each for each, (kind, _) in _LAYERS.items() if kind.endswith("Norm"))
_IMAGE_NORMS = (nn.BatchNorm2d, nn.BatchNorm3d, nn.InstanceNorm2d, nn.InstanceNorm3d)
_ACTIVATIONS = tuple({t for t in _LAYERS if t.__module__ == nn.ReLU.__module__} - {nn.MultiheadAttention, nn.GLU})
_ELEMENTWISE = (*_ACTIVATIONS, nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout)
_BY_CHANNEL = (
    *(nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d),
    *(nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d),
    *(nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d),
    *(nn.LocalResponseNorm, nn.Upsample, nn.ZeroPad2d, nn.ReflectionPad2d),
)
