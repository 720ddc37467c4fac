"""What nnx calls the options of layers, and the code that passes them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from probly_common.weights.kinds import Missing, Options, Text, Words, same_padding
from probly_flax._kinds import FUNCTIONS, options_of_function, other_weight

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
    "momentum": ("momentum", lambda value: Missing("None") if value is None else other_weight(value)),
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
    **{kind: f"nnx.{function.__name__}" for function, (kind, _) in FUNCTIONS.items()},
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
    if kind in ("Identity", *(activation for activation, _ in FUNCTIONS.values())):
        return f"partial({layer}{passed})" if passed else layer
    return f"{layer}(...{passed})"


WORDS = Words(
    _arguments,
    _advice,
    {options["kind"]: options for function in FUNCTIONS if (options := options_of_function(function))},
    {name: option for option, (name, _) in _ARGUMENTS.items()},
)
