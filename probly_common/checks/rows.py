"""Checks of inputs: their rows, axes and members.

Axes are named, as in ("num_members*B", "T", "in_features"). Channels are on axis 1 in torch and on the last one in
Flax, so the sentences about shapes of images say which.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from probly_common.checks.values import dtype_name, index, is_floating, is_integer, type_name


def check_member_rows(what: str, shape: Sequence[int], num_members: int, in_features: int) -> None:
    """Raises unless the number of rows is a multiple of num_members: rows [k*B, (k+1)*B) belong to member k."""
    problem = next_step = ""
    if len(shape) < 2:
        problem = f"which has {len(shape)} axes instead of at least 2"
        next_step = "To give every member one input, call tile_members(x[None], {E})."
    elif shape[-1] != in_features:
        problem = f"whose last axis is {shape[-1]} instead of {in_features}"
        next_step = "For these inputs, build the layer from a Linear layer with in_features={last}."
    elif shape[0] % num_members:
        problem = f"whose {shape[0]} rows do not divide by {num_members}"
        next_step = "To give every member the same batch, call tile_members(x, {E})."
    if problem:
        raise ValueError(
            f"{what} expects inputs of shape [num_members*B, ..., in_features] with num_members={num_members}, "
            f"in_features={in_features}; got {tuple(shape)}, {problem}. "
            + next_step.format(E=num_members, last=shape[-1] if len(shape) else 1)
        )


def tiled(shape: Sequence[int], num_members: int) -> tuple[int, ...]:
    """Returns the shape of tile_members(x, num_members), for a batch that is not tiled."""
    return tuple(num_members * size if axis == 0 else size for axis, size in enumerate(shape))


def check_rows_of_batch(what: str, inputs: Sequence[int]) -> None:
    if not inputs:
        raise TypeError(
            f"{what} expects inputs that hold tensors or arrays, alone or in tuples, lists and dicts; got none that "
            f"members could share. Pass the arrays themselves: model(x)."
        )
    if any(rows != inputs[0] for rows in inputs):
        raise ValueError(
            f"{what} expects inputs with one number of rows; got {list(inputs)}. Give what all rows share, "
            f"such as a mask, to the network's constructor; or repeat it for each row: mask.expand(len(x), -1, -1)."
        )


def check_output_rows(what: str, shape: Sequence[int], rows: int) -> None:
    if not shape or shape[0] != rows:
        raise ValueError(
            f"{what} expects a network whose outputs have the rows of its inputs on their first axis, {rows}; got "
            f"{tuple(shape)}. Return them so, as with x.movedim(1, 0); or call ensemble(network, num_members)."
        )


CONSTANTS = (bool, int, float, str, type(None))  # that outputs may hold beside tensors


def check_output_leaf(what: str, leaf: Any) -> None:
    if not isinstance(leaf, CONSTANTS):
        raise TypeError(
            f"{what} expects outputs that are tensors or arrays, alone or in tuples, lists and dicts; got "
            f"{type_name(leaf)}. Return its arrays, as in a dict."
        )


def check_outputs_alike(what: str, kind: str, found: Sequence[Any]) -> None:
    """Raises unless what each member returns can be stacked, or is one constant."""
    other = next((each for each in found if each != found[0]), found[0])
    if other != found[0]:
        raise ValueError(
            f"{what} expects members whose outputs have one {kind}; got {found[0]} and {other}. Run each by itself: "
            f"[member(x) for member in model]."
        )


def check_batch_first(what: str, paths: Sequence[str], fix: str) -> None:
    if paths:
        raise ValueError(
            f"{what} expects every layer to have the batch on its first axis, where members are told apart; got "
            f"another order in {', '.join(paths)}. Build them with {fix}."
        )


def check_split(what: str, shape: Sequence[int], num_members: int) -> None:
    if not shape or shape[0] % num_members:
        rows = f"whose {shape[0]} rows do not divide by {num_members}" if shape else "which has no rows"
        raise ValueError(
            f"{what} expects outputs of shape [num_members*B, ...] with num_members={num_members}; got {tuple(shape)}, "
            f"{rows}. Pass the outputs of a layer that was given tile_members(x, {num_members})."
        )


def check_tile(what: str, shape: Sequence[int]) -> None:
    if not shape:
        raise ValueError(f"{what} expects a batch of shape [B, ...]; got (), which has no rows. Add the axis: x[None].")


def check_member_axis(what: str, shapes: Iterable[Sequence[int]], num_members: int, rank: int = 1) -> None:
    """Raises unless every array has one slice for each member, under in_axes=0."""
    for shape in shapes:
        if len(shape) < rank or shape[0] != num_members:
            raise ValueError(
                f"{what} expects inputs of shape [num_members, B, ...] under in_axes=0, with num_members="
                f"{num_members}; got {tuple(shape)}. To give every member the same batch, leave in_axes out: model(x)."
            )


def check_in_axes(what: str, in_axes: Any) -> None:
    if in_axes is not None and (isinstance(in_axes, bool) or in_axes != 0):
        raise ValueError(
            f"{what} expects in_axes to be None (one batch for all members) or 0 (one batch for each, [num_members, "
            f"B, ...]); got {in_axes!r}. Call model(x) or model(x, in_axes=0)."
        )


def check_chunk_size(what: str, chunk_size: Any) -> int | None:
    if chunk_size is None:
        return None
    size = index(chunk_size)
    if size is None or size < 1:
        raise ValueError(
            f"{what} expects chunk_size to be None or an integer of at least 1; got {chunk_size!r}. Pass chunk_size=1."
        )
    return size


_SPATIAL = {1: "L", 2: "H, W", 3: "D, H, W"}


def check_conv_rows(
    what: str, shape: Sequence[int], num_members: int, in_channels: int, spatial_axes: int, channels_first: bool
) -> None:
    """Raises unless rows [k*B, (k+1)*B) belong to member k.

    More batch axes may follow the first where channels are last.
    """
    axes, rank = spatial_axes + 2, len(shape)
    spatial = _SPATIAL.get(spatial_axes, f"{spatial_axes} spatial axes")
    channel, other = (1, -1) if channels_first else (-1, 1)
    problem = next_step = ""
    if rank == axes - 1:
        problem = f"which has {rank} axes instead of {axes}, and so no rows of members"
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


def check_attention_inputs(
    what: str,
    shapes: Mapping[str, Sequence[int]],
    features: Sequence[int],
    num_members: int,
    batch_first: bool = True,
    middle_axes: bool = False,
) -> None:
    """Raises unless query, key and value have the same rows, and rows [k*B, (k+1)*B) of each belong to member k."""
    layout = "[num_members*B, length, features]" if batch_first else "[length, num_members*B, features]"
    axis = 0 if batch_first else 1
    rows = None
    for (name, shape), last in zip(shapes.items(), features, strict=True):
        tile, tile_one = f"tile_members({name}, {num_members})", f"tile_members({name}[None], {num_members})"
        if not batch_first:
            tile, tile_one = f"{name}.repeat(1, {num_members}, 1)", f"{name}[:, None].repeat(1, {num_members}, 1)"
        if len(shape) < 3 or (len(shape) > 3 and not middle_axes):
            problem = f"which has {len(shape)} axes instead of {'at least ' if middle_axes else ''}3"
            next_step = f"To give every member one sequence, call {tile_one}."
            if len(shape) > 3:
                next_step = f"Make one axis of those in between: {name}.flatten(1, -2)."
        elif shape[-1] != last:
            problem = f"whose last axis is {shape[-1]} instead of {last}"
            next_step = f"For these, build the layer from one whose {name} has {shape[-1]} features."
        elif shape[axis] % num_members:
            problem = f"whose {shape[axis]} rows do not divide by {num_members}"
            next_step = f"To give every member the same batch, call {tile}."
        elif rows not in (None, shape[axis]):
            problem = f"whose {shape[axis]} rows are not the {rows} of the query"
            next_step = f"To give every member the same batch, call {tile}."
        else:
            rows = shape[axis]
            continue
        raise ValueError(
            f"{what} expects {name} of shape {layout} with num_members={num_members}, features={last}; got "
            f"{tuple(shape)}, {problem}. {next_step}"
        )
    *_, key, value = shapes.values()
    steps = -2 if batch_first else 0
    if key[steps] != value[steps]:
        raise ValueError(
            f"{what} expects a value for each key; got {value[steps]} values for {key[steps]} keys. Pass the same "
            f"sequence as both: key, key."
        )


def check_mask_rows(
    what: str, name: str, shape: Sequence[int], expected: Mapping[str, Sequence[int]], num_members: int
) -> None:
    """Raises unless a mask has the rows of the inputs.

    It may have one for all where the framework has a form for that, but never B.
    """
    if tuple(shape) not in map(tuple, expected.values()):
        allowed = " or ".join(f"{layout} = {tuple(sizes)}" for layout, sizes in expected.items())
        raise ValueError(
            f"{what} expects {name} of shape {allowed}; got {tuple(shape)}. To give every member the same masks, call "
            f"tile_members({name}, {num_members})."
        )


def check_floating(what: str, name: str, dtype: Any) -> None:
    if not is_floating(dtype):
        raise TypeError(
            f"{what} expects {name} of a floating dtype, which r and s can scale; got {dtype_name(dtype)}. Build the "
            f"base layer in float32."
        )


def check_tokens(what: str, shape: Sequence[int], num_members: int, dtype: Any) -> None:
    """Raises unless tokens are integers [num_members*B, ...]."""
    requirement = f"{what} expects integer tokens of shape [num_members*B, ...] with num_members={num_members}"
    if not is_integer(dtype):
        raise TypeError(
            f"{requirement}; got {dtype_name(dtype)}. Pass token numbers: for one-hot vectors, x.argmax(-1)."
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
    """Raises unless rows divide by num_members, and the layer has scales for the features (found in the shape).

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
    """Refuses a single value, since a variance takes two. torch's layers refuse it too."""
    if values == 1:
        raise ValueError(f"{what} expects more than 1 value in {place}; got {tuple(shape)}, which has 1. {next_step}")


def check_mask(what: str, shape: Sequence[int], inputs: Sequence[int]) -> None:
    if len(shape) > len(inputs) or (len(shape) == len(inputs) and shape[0] not in (1, inputs[0])):
        raise ValueError(
            f"{what} expects a mask that fits inputs of shape {tuple(inputs)}; got {tuple(shape)}. Give it the rows of "
            f"the inputs: jnp.broadcast_to(mask, x.shape)."
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


CELL = ("num_members*B", "in_features")

BATCH_MAJOR = ("num_members*B", "T", "in_features")

TIME_MAJOR = ("T", "num_members*B", "in_features")


def check_recurrent_rows(
    what: str, shape: Sequence[int], num_members: int, in_features: int, axes: tuple[str, ...], more_axes: bool = False
) -> None:
    """Raises unless rows [k*B, (k+1)*B) of the batch axis belong to member k.

    `more_axes` of the batch may follow the first one.
    """
    tile = "tile_members({x}, {E})" if axes[0] == CELL[0] else "tile_members({x}, {E}).swapaxes(0, 1)"
    batch = "x" if axes[0] == CELL[0] else "x.swapaxes(0, 1)"
    problem = next_step = ""
    if len(shape) < len(axes):
        problem = f"which has {len(shape)} axes instead of {len(axes)}"
        missing = ", ".join(["None"] * (len(axes) - len(shape)))
        next_step = f"To give every member one input, call {tile.format(x=f'x[{missing}]', E=num_members)}."
    elif len(shape) > len(axes) and not more_axes:
        problem = f"which has {len(shape)} axes instead of {len(axes)}"
        next_step = "Pass one step of them, x[:, 0]." if axes == CELL else "Join the axes of time, x.flatten(1, -2)."
    elif shape[-1] != in_features:
        problem = f"whose last axis is {shape[-1]} instead of {in_features}"
        next_step = f"For these inputs, build the layer from a base layer with in_features={shape[-1]}."
    elif shape[axes.index(CELL[0])] % num_members:
        problem = f"whose {shape[axes.index(CELL[0])]} rows do not divide by {num_members}"
        next_step = f"To give every member the same batch, call {tile.format(x=batch, E=num_members)}."
    if problem:
        raise ValueError(
            f"{what} expects inputs of shape [{', '.join(axes)}] with num_members={num_members}, "
            f"in_features={in_features}; got {tuple(shape)}, {problem}. {next_step}"
        )


def check_state_shape(what: str, name: str, shape: Sequence[int], expected: Sequence[int], next_step: str) -> None:
    """Raises unless a state has a row for each row of the inputs. It is not broadcast."""
    if tuple(shape) != tuple(expected):
        raise ValueError(
            f"{what} expects {name} of shape {tuple(expected)}, with a row for each row of the inputs; got "
            f"{tuple(shape)}. {next_step}"
        )


def check_states(what: str, name: str, states: Any, order: Sequence[str]) -> None:
    if not isinstance(states, (tuple, list)) or len(states) != 2:
        pair = f"({', '.join(order)})"
        raise TypeError(f"{what} expects {name} to be the pair {pair}; got {type_name(states)}. Pass {name}={pair}.")
