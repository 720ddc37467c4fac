"""Checks of the embedding and normalisation layers, and the sentences they raise.

The same file, byte for byte, in probly_torch and probly_flax; it imports no framework. The axis of the features is
another one in each, so that these sentences count rows and features.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def check_base_type(what: str, kind: str, base_layer: Any, expected: tuple[type, ...], call: str) -> None:
    """A layer of one of these types, whose forward is that type's own."""
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


def check_floating(what: str, name: str, floating: bool, dtype: Any) -> None:
    if not floating:
        raise TypeError(
            f"{what} expects {name} of a floating dtype, which r and s can scale; got {_dtype_name(dtype)}. Build the "
            f"base layer in float32."
        )


def check_tokens(what: str, shape: Sequence[int], num_members: int, integer: bool, dtype: Any) -> None:
    """Integers [num_members*B, ...]."""
    requirement = f"{what} expects integer tokens of shape [num_members*B, ...] with num_members={num_members}"
    if not integer:
        raise TypeError(
            f"{requirement}; got {_dtype_name(dtype)}. Pass token numbers: of one-hot vectors, x.argmax(-1)."
        )
    _check_rows(requirement, shape, num_members, 1, "")


def check_query(what: str, shape: Sequence[int], num_members: int, features: int) -> None:
    requirement = (
        f"{what} expects queries of shape [num_members*B, ..., features] with num_members={num_members}, "
        f"features={features}"
    )
    other = "" if not shape or shape[-1] == features else f"whose last axis is {shape[-1]} instead of {features}"
    _check_rows(requirement, shape, num_members, 2, other, f"Pass queries of {features} features: x[..., :{features}].")


def check_norm_rows(
    what: str,
    shape: Sequence[int],
    num_members: int,
    num_features: Sequence[int],
    found: Sequence[int],
    ranks: Sequence[int],
) -> None:
    """Rows that divide by num_members, and the features (found in the shape) that the layer has scales for.

    `ranks` are the numbers of axes that the layer takes; a single one is a minimum.
    """
    wanted, features = (str(v[0] if len(v) == 1 else tuple(v)) for v in (num_features, found or (0,)))
    requirement = (
        f"{what} expects inputs of num_members*B rows and num_features features with num_members={num_members}, "
        f"num_features={wanted}"
    )
    other = "" if wanted == features else f"which has {features} features instead of {wanted}"
    next_step = f"For these inputs, build the layer from one with num_features={features}."
    _check_rows(requirement, shape, num_members, ranks, other, next_step)


def check_enough_values(what: str, shape: Sequence[int], values: int, place: str, next_step: str) -> None:
    """A variance takes two values; torch's layers refuse to make one of a single value."""
    if values == 1:
        raise ValueError(f"{what} expects more than 1 value in {place}; got {tuple(shape)}, which has 1. {next_step}")


def check_mask(what: str, shape: Sequence[int], inputs: Sequence[int]) -> None:
    if len(shape) > len(inputs) or (len(shape) == len(inputs) and shape[0] not in (1, inputs[0])):
        raise ValueError(
            f"{what} expects a mask that fits inputs of shape {tuple(inputs)}; got {tuple(shape)}. Give it the rows of "
            f"the inputs: jnp.broadcast_to(mask, x.shape)."
        )


def check_dtype(what: str, dtype: Any, expected: Any, accepted: bool) -> None:
    if not accepted:
        raise TypeError(
            f"{what} expects inputs of the layer's dtype, {expected}; got {dtype}. Convert them: x.to({expected})."
        )


def _check_rows(
    requirement: str,
    shape: Sequence[int],
    num_members: int,
    ranks: int | Sequence[int],
    problem: str,
    next_step: str = "",
) -> None:
    ranks = (ranks,) if isinstance(ranks, int) else tuple(ranks)
    if (len(shape) < ranks[0]) if len(ranks) == 1 else (len(shape) not in ranks):
        wanted = f"at least {ranks[0]}" if len(ranks) == 1 else " or ".join(map(str, sorted(set(ranks))))
        problem = f"which has {len(shape)} axes instead of {wanted}"
        next_step = "To give every member one input, call tile_members(x[None], {E})."
    elif not problem and shape[0] % num_members:
        problem = f"whose {shape[0]} rows do not divide by {num_members}"
        next_step = "To give every member the same batch, call tile_members(x, {E})."
    if problem:
        raise ValueError(f"{requirement}; got {tuple(shape)}, {problem}. {next_step.format(E=num_members)}")


def _dtype_name(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")
