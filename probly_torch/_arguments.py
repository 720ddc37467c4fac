"""What torch calls the options of layers, and the code that passes them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from probly_common.weights.kinds import Missing, Options, Text, Words, known_options, same_padding
from probly_torch._kinds import FUNCTIONS


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


WORDS = Words(_arguments, _advice, {kind: known_options(kind, options) for kind, options in FUNCTIONS.values()}, {})
