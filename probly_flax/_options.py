"""The options of a Flax model's layers, which travel with its weights, and their comparison at loading."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import jax
from flax import nnx

from probly_common.weights.kinds import KINDS, Missing, Options, Text, check_same_options, known_options, same_padding
from probly_flax._torch_names import torch_rules
from probly_flax.ensemble import Ensemble


def layer_options(model: nnx.Module) -> dict[str, dict[str, Any]]:
    """Returns the options of every layer that has a kind, by its path in torch.

    The options are numbers, strings, booleans, None and lists of these.

    Example:
        >>> layer_options(nnx.Sequential(nnx.Linear(4, 3, rngs=nnx.Rngs(0)), nnx.gelu))
        {'0': {'kind': 'Linear', 'bias': True}, '1': {'kind': 'GELU', 'approximate': 'tanh'}}
    """
    return dict(_walk(model, ""))


def check_options(what: str, model: nnx.Module, recorded: Any) -> None:
    """Compares a model's options with those of a file, layer by layer, where both are known.

    Raises:
        ValueError: with a line for every difference, which ends with the argument to change.

    Example:
        >>> recorded = {"": {"kind": "LayerNorm", "eps": 1e-5}}
        >>> try:
        ...     check_options("load_weights", nnx.LayerNorm(3, rngs=nnx.Rngs(0)), recorded)
        ... except ValueError as error:
        ...     print(str(error).splitlines()[1].strip())
        (root): epsilon 1e-06 here, 1e-05 in the file; nnx.LayerNorm(..., epsilon=1e-05)
    """
    defaults = {
        kind: options for function in _FUNCTIONS if (options := _function(function)) for kind in [options["kind"]]
    }
    parts = dict(_parts(model, ""))
    sequentials = {path: len(part.layers) for path, part in parts.items() if isinstance(part, nnx.Sequential)}
    own, names = layer_options(model), lambda: (name for name, _ in torch_rules(what, model))
    check_same_options(what, own, recorded, _arguments, _advice, sequentials, defaults, names, parts)


def _walk(value: Any, path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields the layers and activations in a module, under the names that `_torch_names` gives to weights."""
    options = _options(value) if isinstance(value, nnx.Module) else _function(value)
    if options is not None:
        yield _joined(path, "base_layer" if isinstance(value, nnx.LoRALinear) else ""), options
    else:
        for inner, child in _children(value, path):
            yield from _walk(child, inner)


def _children(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, (nnx.Module, dict)):
        renamed: dict[str, str] = next((_RENAMED[each] for each in type(value).__mro__ if each in _RENAMED), {})
        for name, child in (value if isinstance(value, dict) else vars(value)).items():
            yield _joined(path, renamed.get(name, name)), child
    elif isinstance(value, (list, tuple)):
        for i, child in enumerate(value):
            yield _joined(path, i), child


def _parts(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Yields what is at each path.

    Where there are several, the innermost comes last and is the one that counts.
    """
    if not isinstance(value, nnx.List) and (isinstance(value, nnx.Module) or callable(value)):
        yield path, value
    for inner, child in _children(value, path):
        yield from _parts(child, inner)


def _joined(path: str, name: Any) -> str:
    return ".".join(part for part in (path, str(name)) if part)


# Attributes that have another name in torch, or none.
_RENAMED: dict[type, dict[str, str]] = {
    nnx.Sequential: {"layers": ""},
    Ensemble: {"stacked": ""},
    nnx.WeightNorm: {"layer_instance": ""},
    nnx.SpectralNorm: {"layer_instance": ""},
    nnx.LoRA: {"base_module": "base_layer"},
}


def _options(layer: nnx.Module) -> dict[str, Any] | None:
    kind, read = next((_LAYERS[each] for each in type(layer).__mro__ if each in _LAYERS), ("", _no_kind))
    try:
        options = read(layer)
    except (AttributeError, TypeError, ValueError):  # a class derived from the kind, made in another way
        options = None
    if options is None:
        return None
    kind = options.pop("kind", kind)
    return known_options(kind, options | _attributes("num_members")(layer)) if kind in KINDS else None


def _no_kind(layer: nnx.Module) -> None:
    return None


def _function(function: Any) -> dict[str, Any] | None:
    """Returns the options of an activation that is kept as a function, if it is one that is known."""
    keywords: Mapping[str, Any] = {}
    if isinstance(function, partial):
        function, keywords = function.func, {} if function.args else function.keywords
    for known, (kind, defaults) in _FUNCTIONS.items():
        if known is function:
            options = {**defaults, **keywords}
            if kind == "GELU":
                options["approximate"] = "tanh" if options["approximate"] else "none"
            return known_options(kind, options)
    return _function(function.__wrapped__) if hasattr(function, "__wrapped__") else None  # of jit


def _attributes(*names: str) -> Callable[[Any], dict[str, Any]]:
    return lambda layer: {name: getattr(layer, name) for name in names if hasattr(layer, name)}


def _bias(layer: Any) -> dict[str, Any]:
    return {"bias": layer.bias is not None}


def _per_axis(value: int | Sequence[int] | None, rank: int) -> list[int]:
    return [1 if value is None else value] * rank if value is None or isinstance(value, int) else list(value)


def _pairs(padding: Any, rank: int) -> list[list[int]]:
    sizes = [padding] * rank if isinstance(padding, int) else padding
    return [[size, size] if isinstance(size, int) else list(size) for size in sizes]


def _sizes(layer: Any) -> dict[str, Any]:
    kernel_size = list(layer.kernel_size)
    sizes = {"stride": layer.strides, "dilation": layer.kernel_dilation}
    return {"kernel_size": kernel_size, **{name: _per_axis(each, len(kernel_size)) for name, each in sizes.items()}}


def _conv(layer: Any) -> dict[str, Any]:
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


def _conv_transpose(layer: Any) -> dict[str, Any]:
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


def _affine(layer: Any) -> dict[str, Any]:
    return {"eps": layer.epsilon, "weight": layer.scale is not None, **_bias(layer)}


def _axes(layer: Any) -> dict[str, Any]:
    """Returns the axes as they are.

    Some count from the first axis. Which axes these are in torch depends on the input's rank.
    """
    given = {"axes": layer.reduction_axes}
    if layer.scale is not None:
        given["feature_axes"] = layer.feature_axes
    return {name: sorted([axes] if isinstance(axes, int) else axes) for name, axes in given.items()}


def _group_norm(layer: Any) -> dict[str, Any]:
    axes = layer.reduction_axes
    own = axes if axes is None else sorted([axes] if isinstance(axes, int) else axes)
    return {**_affine(layer), "num_groups": layer.num_groups, "axes": own}


def _batch_norm(layer: Any) -> dict[str, Any]:
    return {**_affine(layer), "momentum": _other_weight(layer.momentum), "track_running_stats": True}


def _rms_norm(layer: Any) -> dict[str, Any]:
    return {"eps": layer.epsilon, "weight": layer.scale is not None, **_axes(layer)}


def _attention(layer: Any) -> dict[str, Any]:
    """Returns the options of attention, without whether batches come first.

    They do in every layer of nnx, so that this is a question of the network around it.
    """
    return {**_attributes("num_heads")(layer), "bias": layer.use_bias, "add_bias_kv": False, "add_zero_attn": False}


def _cell(layer: Any) -> dict[str, Any]:
    functions = {"nonlinearity": layer.activation_fn, "gate": getattr(layer, "gate_fn", None)}
    names = {nnx.tanh: "tanh", nnx.relu: "relu", nnx.sigmoid: "sigmoid"}
    known = {option: name for option, given in functions.items() for each, name in names.items() if given is each}
    dense = (getattr(layer, name, None) for name in ("dense_i", "dense_h", "hi"))
    bias = any(each.bias is not None for each in dense if each is not None)
    return {**known, "residual": getattr(layer, "residual", False), "bias": bias}


def _sequence(layer: Any) -> dict[str, Any] | None:
    both = isinstance(layer, nnx.Bidirectional)
    rnns = (layer.forward_rnn, layer.backward_rnn) if both else (layer,)
    cells = [_options(rnn.cell) if isinstance(rnn, nnx.RNN) else None for rnn in rnns]
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


def _other_weight(momentum: float) -> float:
    """Computes the weight of the new from that of the old, and the other way round, as decimals."""
    return float(f"{1 - momentum:.12g}")


_LAYERS: dict[type, tuple[str, Callable[[Any], dict[str, Any] | None]]] = {
    **dict.fromkeys((nnx.Linear, nnx.LinearGeneral, nnx.Einsum), ("Linear", _bias)),
    nnx.Conv: ("", _conv),
    nnx.ConvTranspose: ("", _conv_transpose),
    nnx.Embed: ("Embedding", lambda layer: {"max_norm": None}),
    nnx.BatchNorm: ("BatchNorm", _batch_norm),
    nnx.InstanceNorm: ("InstanceNorm", lambda layer: {**_affine(layer), "track_running_stats": False}),
    nnx.LayerNorm: ("LayerNorm", lambda layer: {**_affine(layer), **_axes(layer)}),
    nnx.RMSNorm: ("RMSNorm", _rms_norm),
    nnx.GroupNorm: ("GroupNorm", _group_norm),
    nnx.MultiHeadAttention: ("MultiheadAttention", _attention),
    **dict.fromkeys((nnx.LSTMCell, nnx.OptimizedLSTMCell), ("LSTMCell", _cell)),
    nnx.GRUCell: ("GRUCell", _cell),
    nnx.SimpleCell: ("RNNCell", _cell),
    **dict.fromkeys((nnx.RNN, nnx.Bidirectional), ("", _sequence)),
    nnx.PReLU: ("PReLU", _attributes()),
}
# Activations are functions; these are their defaults.
_FUNCTIONS: dict[Any, tuple[str, dict[str, Any]]] = {
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
# How nnx calls torch's options, and what it takes for their values; it has none of the others.
_ARGUMENTS: dict[str, tuple[str, Callable[[Any], Any]]] = {
    **{name: (name, lambda value: value) for name in ("num_heads", "num_groups", "negative_slope", "alpha")},
    **{name: (name, lambda value: value) for name in ("reverse", "residual")},
    **{name: (name, tuple) for name in ("kernel_size", "input_dilation")},
    "eps": ("epsilon", lambda value: value),
    "weight": ("use_scale", lambda value: value),
    "bias": ("use_bias", lambda value: value),
    "groups": ("feature_group_count", lambda value: value),
    "stride": ("strides", tuple),
    "dilation": ("kernel_dilation", tuple),
    "axes": ("reduction_axes", lambda value: value if value is None else tuple(value)),
    "feature_axes": ("feature_axes", tuple),
    "momentum": ("momentum", lambda value: Missing("None") if value is None else _other_weight(value)),
    "approximate": ("approximate", lambda value: value == "tanh"),
    "batch_first": ("time_major", lambda value: not value),
    "nonlinearity": ("activation_fn", lambda value: Text(value if value == "mixed" else f"nnx.{value}")),
    "gate": ("gate_fn", lambda value: Text(value if value == "mixed" else f"nnx.{value}")),
}
_LACKING = ("EmbeddingBag", "Threshold", "Softshrink", "Hardshrink", "Tanhshrink")
_CELLS = {"LSTM": "OptimizedLSTMCell", "GRU": "GRUCell", "RNN": "SimpleCell"}
_CALLS = {
    **{f"Conv{n}d": "nnx.Conv" for n in (1, 2, 3)},
    **{f"ConvTranspose{n}d": "nnx.ConvTranspose" for n in (1, 2, 3)},
    **{f"{kind}Cell": f"nnx.{cell}" for kind, cell in _CELLS.items()},
    **dict.fromkeys(_CELLS, "nnx.RNN"),
    **{kind: f"nnx.{function.__name__}" for function, (kind, _) in _FUNCTIONS.items()},
    "Mish": "jax.nn.mish",
    "Identity": "nnx.identity",
    "Embedding": "nnx.Embed",
    "MultiheadAttention": "nnx.MultiHeadAttention",
}


def _arguments(kind: str, options: Options) -> dict[str, Any]:
    """Translates these options into arguments of nnx's layer."""
    arguments: dict[str, Any] = {}
    for option, value in options.items():
        if option in ("kind", "num_members", "flatten_channels", "padding", "padding_mode"):
            continue
        name, convert = _ARGUMENTS.get(option, (option, None))
        lacking = (
            "groups" if kind.startswith("ConvTranspose") else "bias" if kind.removesuffix("Cell") in _CELLS else None
        )
        if convert is None or option == lacking:
            arguments[option] = Missing(repr(value))
        else:
            arguments[name] = convert(value)
    if {"kernel_size", "dilation", "padding", "padding_mode"} <= options.keys():
        arguments["padding"] = _padding(kind, options)
    return arguments


def _padding(kind: str, options: Options) -> Any:
    pairs, mode, dilation = options["padding"], options["padding_mode"], options["dilation"]
    if kind.startswith("ConvTranspose"):
        if mode == "circular":
            return "CIRCULAR"
        extents = [d * (k - 1) for k, d in zip(options["kernel_size"], dilation, strict=True)]
        pairs = "same" if pairs == "same" else [[e - p, e - q] for e, (p, q) in zip(extents, pairs, strict=True)]
    elif mode in ("circular", "reflect") and pairs == same_padding(
        options["kernel_size"], [1] * len(dilation), dilation
    ):
        return mode.upper()
    if pairs == "same":
        padding: Any = "SAME"
    elif all(low == high for low, high in pairs):
        padding = tuple(low for low, _ in pairs)
    else:
        padding = tuple(map(tuple, pairs))
    return padding if mode == "zeros" else Missing(f"{padding!r} of {mode!r} values")


def _advice(kind: str, arguments: Mapping[str, Any]) -> str:
    if kind in _LACKING:
        return f"nnx has no {kind}"
    layer = _CALLS.get(kind, f"nnx.{kind}")
    if arguments.keys() & {"activation_fn", "gate_fn", "residual"}:
        layer = _CALLS.get(f"{kind}Cell", layer)
    if arguments.get("bidirectional") == "True":
        return "nnx.Bidirectional(nnx.RNN(...), nnx.RNN(...))"
    if arguments.get("bidirectional") == "False":
        return "nnx.RNN(...)"
    passed = "".join(f", {name}={value!r}" for name, value in arguments.items() if not isinstance(value, Missing))
    if arguments and not passed:
        return f"{layer} has no {', '.join(f'{name} {value}' for name, value in arguments.items())}"
    if kind in ("Identity", *(activation for activation, _ in _FUNCTIONS.values())):
        return f"partial({layer}{passed})" if passed else layer
    return f"{layer}(...{passed})"
