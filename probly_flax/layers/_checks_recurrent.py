"""Checks of recurrent layers and their sentences; the same file, byte for byte, in both packages.

It imports no framework. Axes are named, as in ("num_members*B", "T", "in_features").
"""

from __future__ import annotations

from collections.abc import Sequence

CELL = ("num_members*B", "in_features")
BATCH_MAJOR = ("num_members*B", "T", "in_features")
TIME_MAJOR = ("T", "num_members*B", "in_features")


def check_recurrent_rows(
    what: str, shape: Sequence[int], num_members: int, in_features: int, axes: tuple[str, ...], more_axes: bool = False
) -> None:
    """Rows [k*B, (k+1)*B) of the batch axis belong to member k; `more_axes` of the batch may follow the first one."""
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


def check_state(what: str, name: str, shape: Sequence[int], expected: Sequence[int], next_step: str) -> None:
    """A state has a row for each row of the inputs: it is not broadcast."""
    if tuple(shape) != tuple(expected):
        raise ValueError(
            f"{what} expects {name} of shape {tuple(expected)}, with a row for each row of the inputs; got "
            f"{tuple(shape)}. {next_step}"
        )


def check_states(what: str, name: str, order: str, is_pair: bool, got: str) -> None:
    if not is_pair:
        raise TypeError(f"{what} expects {name} to be the pair {order}; got {got}. Pass {name}={order}.")


def check_cell(what: str, expected: str, is_expected: bool, got: str) -> None:
    """The cell that a sequence layer runs."""
    if not is_expected:
        raise TypeError(
            f"{what} expects base_layer to run a cell of type {expected}; got one that runs {got}. Pass a layer of "
            f"{expected}; or convert the whole network, batchensemble(network, num_members=4)."
        )


def check_not_packed(what: str, is_packed: bool) -> None:
    if is_packed:
        raise TypeError(
            f"{what} expects a padded batch, whose rows the members share out; got a PackedSequence. Pad it, and pick "
            f"the outputs at each length: pad_packed_sequence(x, batch_first=True)."
        )


def check_recurrent_dtype(what: str, name: str, dtype: object, expected: object) -> None:
    if dtype != expected:
        raise TypeError(
            f"{what} expects {name} of the weights' dtype, {expected}; got {dtype}. Convert: {name}.to({expected})."
        )
