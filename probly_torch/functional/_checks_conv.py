"""Checks of convolutions, and the sentences they raise.

The same file, byte for byte, in probly_torch and probly_flax. It imports no framework. Channels are on axis 1 in
torch and on the last one in Flax, so the sentences about shapes say which, and differ in that.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_SPATIAL = {1: "L", 2: "H, W", 3: "D, H, W"}


def check_conv_base_layer(what: str, kind: str, base_layer: Any, expected: tuple[type, ...], call: str) -> None:
    """A convolution whose forward is the framework's own; kind is the name of the layer without its dimensions."""
    found = next((each for each in expected if isinstance(base_layer, each)), None)
    got = type(base_layer).__name__
    if found is None:
        raise TypeError(
            f"{what} expects base_layer to be a {kind} layer; got {got}. To convert every layer of a network that can "
            f"be, call batchensemble(network, num_members=4)."
        )
    if getattr(type(base_layer), call) is not getattr(found, call):
        raise TypeError(
            f"{what} expects base_layer to compute what {kind} computes; got {got}, which has a {call} of its own. "
            f"Pass a {kind} layer with its weights."
        )


def check_conv_kernel(what: str, shape: Sequence[int], at_most: int | None = None) -> None:
    """Two axes of channels, and at least one and at most so many of space."""
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


def check_conv_rows(
    what: str, shape: Sequence[int], num_members: int, in_channels: int, spatial_axes: int, channels_first: bool
) -> None:
    """Rows [k*B, (k+1)*B) belong to member k; more batch axes may follow the first where channels are last."""
    axes, rank = spatial_axes + 2, len(shape)
    spatial = _SPATIAL.get(spatial_axes, f"{spatial_axes} spatial axes")
    channel, other = (1, -1) if channels_first else (-1, 1)
    problem = next_step = ""
    if rank == axes - 1:
        problem = f"which has {rank} axes instead of {axes}, so no rows to tell members apart"
        next_step = f"To give every member this one input, call tile_members(x[None], {num_members})."
    elif rank < axes or (rank > axes and channels_first):
        order = f"{in_channels}, {spatial}" if channels_first else f"{spatial}, {in_channels}"
        problem = f"which has {rank} axes instead of {axes}"
        next_step = f"Give it these axes: x.reshape(-1, {order})."
    elif shape[channel] != in_channels:
        where = "axis 1" if channels_first else "last axis"
        problem = f"whose {where} is {shape[channel]} instead of {in_channels}"
        kind = "ConvTranspose" if "ranspose" in what else "Conv"
        next_step = f"For these inputs, build the layer from one of as many channels: {kind}({shape[channel]}, ...)."
        if rank == axes and shape[other] == in_channels:
            move = "x.movedim(-1, 1)" if channels_first else "jnp.moveaxis(x, 1, -1)"
            next_step = f"If axis {other} holds the channels, move it: {move}."
    elif shape[0] % num_members:
        problem = f"whose {shape[0]} rows do not divide by {num_members}"
        next_step = f"To give every member the same batch, call tile_members(x, {num_members})."
    if problem:
        layout = (
            f"[num_members*B, in_channels, {spatial}] (channels first)"
            if channels_first
            else f"[num_members*B, {spatial}, in_channels] (channels last)"
        )
        raise ValueError(
            f"{what} expects inputs of shape {layout} with num_members={num_members}, in_channels={in_channels}; got "
            f"{tuple(shape)}, {problem}. {next_step}"
        )


def check_padding(what: str, padding: Any, modes: Sequence[str]) -> None:
    """Of the modes of padding that torch has, Flax lacks some, and says so in a call only."""
    if isinstance(padding, str) and padding.upper() not in modes:
        raise ValueError(
            f"{what} expects padding of numbers or one of {', '.join(modes)}; got {padding!r}. For another mode, pad "
            f"the inputs, as with jnp.pad(x, widths, mode='edge') in the place of torch's 'replicate', and pass "
            f"padding='VALID'."
        )


def check_output_size(what: str, output_size: Sequence[int], smallest: Sequence[int], stride: Sequence[int]) -> None:
    """Sizes that a transposed convolution can have, one for each spatial axis: several inputs share one output size."""
    largest = [size + step - 1 for size, step in zip(smallest, stride, strict=True)]
    if len(output_size) != len(smallest) or any(
        not low <= size <= high for low, size, high in zip(smallest, output_size, largest, strict=True)
    ):
        raise ValueError(
            f"{what} expects an output_size from {list(smallest)} to {largest} for these inputs; got "
            f"{list(output_size)}. Pass output_size={list(smallest)}."
        )
