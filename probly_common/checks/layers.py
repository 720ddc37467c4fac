"""Checks of layers: the one that a layer is made of, its weights and its options."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

from probly_common.checks.values import F, dtype_name, index, type_name

INITS = ("normal", "random_sign", "ones")


def check_init(what: str, init: Any, r_mean: Any, r_std: Any, s_mean: Any, s_std: Any) -> None:
    if init not in INITS:
        raise ValueError(
            f"{what} expects init to be 'normal', 'random_sign' or 'ones'; got {init!r}. Pass init='normal'."
        )
    for name, value in (("r_mean", r_mean), ("s_mean", s_mean), ("r_std", r_std), ("s_std", s_std)):
        spread = name.endswith("std")
        requirement = f"{what} expects {name} to be a finite number" + (" of at least 0" if spread else "")
        example = f"Pass {name}={0.5 if spread else 1.0}."
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"{requirement}; got {value!r} ({type_name(value)}). {example}")
        if not math.isfinite(value) or (spread and value < 0):
            raise ValueError(f"{requirement}; got {value!r}. {example}")


def check_base_layer(what: str, base_layer: Any, expected: type, call: str) -> None:
    """Refuses anything except a Linear layer whose forward is Linear's own."""
    if not isinstance(base_layer, expected):
        raise TypeError(
            f"{what} expects base_layer to be a {expected.__name__} layer; got {type_name(base_layer)}. To convert "
            f"every {expected.__name__} layer of a network, call batchensemble(network, num_members=4)."
        )
    if getattr(type(base_layer), call) is not getattr(expected, call):
        raise TypeError(
            f"{what} expects base_layer to compute what {expected.__name__} computes; got {type_name(base_layer)}, "
            f"which has a {call} of its own. Pass a {expected.__name__} layer with its weights."
        )


def seed_is_not_num_members(init: F) -> F:
    """Refuses `Layer(base, 4)`, which would make 4 the seed and leave one member."""

    @functools.wraps(init)
    def checked(self: Any, *args: Any, **kwargs: Any) -> None:
        if len(args) == 2 and "num_members" not in kwargs and index(args[1]) is not None:
            what = type(self).__name__
            raise TypeError(
                f"{what} expects rngs, a seed, as its second positional argument and num_members by name; got "
                f"{what}(base_layer, {args[1]}). For {args[1]} members call {what}(base_layer, num_members={args[1]}); "
                f"for one member drawn from seed {args[1]} call {what}(base_layer, rngs={args[1]}, num_members=1)."
            )
        init(self, *args, **kwargs)

    return checked  # type: ignore[return-value]


def check_fast_weights(
    what: str,
    in_features: int,
    out_features: int,
    r: Sequence[int],
    s: Sequence[int],
    bias: Sequence[int] | None,
) -> None:
    """Raises unless r, s and bias all have one row for each member. None of them is broadcast."""
    if len(r) == 2 and r[1] == in_features and tuple(s) == (r[0], out_features) and r[0] and bias in (None, s):
        return
    num_members = max(1, r[0]) if r else 1
    for name, shape, features in (("r", r, in_features), ("s", s, out_features), ("bias", bias, out_features)):
        if shape is not None and (len(shape) != 2 or tuple(shape) != (num_members, features)):
            axis = "in_features" if name == "r" else "out_features"
            raise ValueError(
                f"{what} expects {name} of shape [num_members, {axis}] with num_members={num_members}, "
                f"{axis}={features}; got {tuple(shape)}. For one row shared by all members, repeat it: "
                f"tile_members({name}, {num_members})."
            )


def check_weight(what: str, shape: Sequence[int]) -> None:
    if len(shape) != 2:
        raise ValueError(
            f"{what} expects a weight matrix, of 2 axes; got {tuple(shape)}. For members with weights of their "
            f"own, call ensemble(network, num_members)."
        )


def check_conv_base_layer(what: str, kind: str, base_layer: Any, expected: tuple[type, ...], call: str) -> None:
    """Refuses anything except a convolution whose forward is the framework's own.

    `kind` is the name of the layer without its dimensions.
    """
    found = next((each for each in expected if isinstance(base_layer, each)), None)
    got = type(base_layer).__name__
    if found is None:
        raise TypeError(
            f"{what} expects base_layer to be a {kind} layer; got {got}. To convert a whole network, call "
            f"batchensemble(network, num_members=4)."
        )
    if getattr(type(base_layer), call) is not getattr(found, call):
        raise TypeError(
            f"{what} expects base_layer to compute what {kind} computes; got {got}, which has a {call} of its own. "
            f"Pass a {kind} layer with its weights."
        )


def check_conv_kernel(what: str, shape: Sequence[int], at_most: int | None = None) -> None:
    """Raises unless there are two axes of channels, and at least one and at most so many of space."""
    spatial = len(shape) - 2
    problem = next_step = ""
    if spatial < 1:
        problem = "which has no spatial axis"
        next_step = "For a matrix, call batch_ensemble_linear(x, weight, r, s)."
    elif at_most is not None and spatial > at_most:
        problem = f"which has {spatial} spatial axes instead of at most {at_most}"
        next_step = "For members with weights of their own, call ensemble(network, num_members)."
    if problem:
        raise ValueError(
            f"{what} expects a weight with two axes of channels and one for each spatial axis; got {tuple(shape)}, "
            f"{problem}. {next_step}"
        )


def check_padding(what: str, padding: Any, modes: Sequence[str]) -> None:
    """Refuses the modes of padding that torch has and Flax lacks. Flax says so in a call only."""
    if isinstance(padding, str) and padding.upper() not in modes:
        raise ValueError(
            f"{what} expects padding of numbers or one of {', '.join(modes)}; got {padding!r}. For another mode, "
            f"pad the inputs and pass padding='VALID': jnp.pad(x, widths, mode='edge') is torch's 'replicate'."
        )


def check_output_size(what: str, output_size: Sequence[int], smallest: Sequence[int], stride: Sequence[int]) -> None:
    """Refuses sizes that a transposed convolution cannot have, one for each spatial axis.

    Several inputs share one output size.
    """
    largest = [size + step - 1 for size, step in zip(smallest, stride, strict=True)]
    if len(output_size) != len(smallest) or any(
        not low <= size <= high for low, size, high in zip(smallest, output_size, largest, strict=True)
    ):
        raise ValueError(
            f"{what} expects an output_size from {list(smallest)} to {largest} for these inputs; got "
            f"{list(output_size)}. Pass output_size={list(smallest)}."
        )


def check_base_type(what: str, kind: str, base_layer: Any, expected: tuple[type, ...], call: str) -> None:
    """Refuses anything except a layer of one of these types, whose forward is that type's own."""
    got = type(base_layer).__name__
    example = f"{what}(network.layer, num_members=4)"
    base_type = next((each for each in expected if isinstance(base_layer, each)), None)
    if base_type is None:
        raise TypeError(f"{what} expects base_layer to be {kind} layer; got {got}. Pass that layer: {example}.")
    if getattr(type(base_layer), call) is not getattr(base_type, call):
        raise TypeError(
            f"{what} expects base_layer to compute what {base_type.__name__} computes; got {got}, which has a {call} "
            f"of its own. Pass a {base_type.__name__} layer with its weights: {example}."
        )


def check_option_unset(what: str, name: str, value: Any, reason: str) -> None:
    if value is not None:
        raise ValueError(
            f"{what} expects a base_layer without {name}, {reason}; got {name}={value!r}. Unset it: "
            f"base_layer.{name} = None."
        )


def check_dtype(what: str, dtype: Any, expected: Any) -> None:
    """Refuses another dtype than the weights'. Half precision is taken too where they are float32."""
    half = ("float16", "bfloat16") if dtype_name(expected) == "float32" else ()
    if dtype_name(dtype) not in (dtype_name(expected), *half):
        raise TypeError(
            f"{what} expects inputs of the layer's dtype, {expected}; got {dtype}. Convert them: x.to({expected})."
        )


def check_cell(what: str, cell: Any, *kinds: type) -> None:
    """Raises unless the cell that a sequence layer runs is of one of these kinds."""
    if not isinstance(cell, kinds):
        expected = " or ".join(kind.__name__ for kind in kinds)
        raise TypeError(
            f"{what} expects base_layer to run a cell of type {expected}; got one that runs {type_name(cell)}. Pass a "
            f"layer of {expected}; or convert the whole network, batchensemble(network, num_members=4)."
        )


def check_not_packed(what: str, x: Any, packed: type) -> None:
    if isinstance(x, packed):
        raise TypeError(
            f"{what} expects a padded batch, whose rows are shared out among members; got a PackedSequence. Pad it, "
            f"and pick the outputs at each length: pad_packed_sequence(x, batch_first=True)."
        )


def check_recurrent_dtype(what: str, name: str, dtype: object, expected: object) -> None:
    if dtype != expected:
        raise TypeError(
            f"{what} expects {name} of the weights' dtype, {expected}; got {dtype}. Convert it: {name}.to({expected})."
        )
