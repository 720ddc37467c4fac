"""Finds the layers that read a flattened convolution, whose order of features differs between the frameworks."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from probly_common.checks.values import index, shown, type_name
from probly_common.checks.weights import listed
from probly_common.weights.match import MAX_AXES


def linear_sizes(options: Mapping[str, Mapping[str, Any]], shapes: Mapping[str, Sequence[int]]) -> dict[str, int]:
    """Returns in_features of each Linear layer, and of each normalisation that may stand before one, by path."""
    sizes: dict[str, int] = {}
    for path, option in options.items():
        names = {"Linear": ("weight",), "BatchNorm": ("weight", "running_mean")}.get(option["kind"], ())
        if option["kind"] in ("LayerNorm", "RMSNorm") and option.get("axes") == [-1]:
            names = ("weight", "bias")
        found = [shapes[name] for own in names if (name := f"{path}.{own}" if path else own) in shapes]
        if found:
            sizes[path] = found[0][-1]
    return sizes


def check_flatten(what: str, flatten: Any, linear: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
    """Returns (channels, *spatial) of the convolution outputs that Linear layers read, by the layers' paths."""
    if not isinstance(flatten, Mapping):
        raise TypeError(
            f"{what} expects flatten to map paths of Linear layers to (channels, *spatial); got {type_name(flatten)}. "
            f'Pass flatten={{"fc1": (64, 7, 7)}}.'
        )
    sizes, problems = {}, []
    for path, given in flatten.items():
        shape = tuple(index(size) for size in given) if isinstance(given, Sequence) else ()
        if not isinstance(path, str) or path not in linear:
            problems.append(f"  {shown(str(path))}: no Linear layer of this model, nor a normalisation")
        elif not 1 <= len(shape) <= MAX_AXES or any(size is None or not 1 <= size <= linear[path] for size in shape):
            problems.append(f"  {shown(path)}: {shown(repr(given))} is not (channels, *spatial) of {linear[path]}")
        elif math.prod(size or 0 for size in shape) != linear[path]:
            count = math.prod(size or 0 for size in shape)
            problems.append(f"  {shown(path)}: {given} has {count} elements, not {linear[path]}")
        sizes[path] = tuple(size or 0 for size in shape)
    if problems:
        layers = [f"{shown(path)} ({features})" for path, features in linear.items()]
        example = next(iter(linear), "fc1")
        raise ValueError(
            f"{what} expects flatten to give (channels, *spatial) of the outputs that Linear layers read flattened, of "
            f"in_features elements; got others:\n{listed(problems)}\nLinear layers here, with in_features: "
            f'{", ".join(layers[:50]) or "none"}. Pass flatten={{"{example}": (channels, height, width)}}.'
        )
    return sizes


def check_flattened(
    what: str, options: Mapping[str, Any], flatten: Mapping[str, Any], linear: Mapping[str, int], save: str = ""
) -> None:
    """Raises unless layers that are known to read a flattened convolution of more than one position have a flatten.

    0 channels mean that it is not known how many they are. `save` is the function in Flax that should have been told.
    """
    channels = {
        path: index(options[path].get("flatten_channels"))
        for path in linear
        if path not in flatten and isinstance(options.get(path), Mapping)
    }
    needed = {
        path: c
        for path, c in channels.items()
        if c is not None and (c == 0 < linear[path] - 1 or (1 < c < linear[path] and linear[path] % c == 0))
    }
    if needed:
        example = ", ".join(f'"{path}": ({c or "channels"}, height, width)' for path, c in needed.items())
        counts = ", ".join(
            f"{shown(path)} reads {linear[path]}" + (f" = {c} x {linear[path] // c}" if c else "")
            for path, c in needed.items()
        )
        there = f"to {save} in Flax, which wrote this file" if save else ""
        place = "the network in Flax" if save else "this network"
        raise ValueError(
            f"{what} expects the shape of a convolution's output where a Linear layer reads it flattened, since torch "
            f"has channels first there, and Flax last; got none: {counts}. Pass "
            f"flatten={{{'..., ' if flatten else ''}{example}}}"
            f"{f' {there}' if there else ''}; or flatten={{}}{', there or here,' if save else ''} if {place} "
            f"transposes to channels first before it flattens, or flattens nothing."
        )


def warn_flattened(
    what: str, options: Mapping[str, Mapping[str, Any]], shapes: Mapping[str, Sequence[int]], where: str
) -> None:
    """Warns of a Linear layer that follows a convolution and may read it flattened.

    It has so many inputs as if it read a square image of the convolution's channels.
    """
    last, found = (0, 0), {}
    for name, shape in shapes.items():
        path, _, own = name.rpartition(".")
        kind = options.get(path, {}).get("kind", "")
        if own == "weight" and kind.startswith("Conv"):
            rank = int(kind[-2])
            of_group = shape[-rank - 1] * options[path].get("groups", 1)
            last = of_group if kind.startswith("ConvTranspose") else shape[-rank - 2], rank
        elif own == "weight" and kind.endswith("Norm"):
            last = shape[-1], last[1]
        elif own == "weight" and kind == "Linear":
            channels, rank = last
            count = shape[-1] // channels if channels > 1 and shape[-1] % channels == 0 else 1
            if count > 1 and rank > 1 and round(count ** (1 / rank)) ** rank == count:
                found[path] = (channels, *[round(count ** (1 / rank))] * rank)
            last = 0, 0
        elif kind != "PReLU" and (
            own == "weight" or not (kind.startswith(("Conv", "Linear")) or kind.endswith("Norm"))
        ):
            last = 0, 0
    if found:
        warnings.warn(
            f"{what} expects to be told where a Linear layer reads the output of a convolution flattened, since torch "
            f"has channels first there, and Flax last; got no flatten, and "
            f"{', '.join(f'{shown(path)} after a convolution of {shape[0]} channels' for path, shape in found.items())}"
            f". If it reads that, pass flatten={found!r}{where}; if not, flatten={{}}.",
            stacklevel=3,
        )
