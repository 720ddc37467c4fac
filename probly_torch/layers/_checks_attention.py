"""Checks of the inputs of attention, and the sentences they raise.

The same file, byte for byte, in probly_torch and probly_flax, as _checks.py is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence


def check_attention_inputs(
    what: str,
    shapes: Mapping[str, Sequence[int]],
    features: Sequence[int],
    num_members: int,
    batch_first: bool = True,
    middle_axes: bool = False,
) -> None:
    """Query, key and value have the same rows, and rows [k*B, (k+1)*B) of each belong to member k."""
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
    """A mask has the rows of the inputs, or one for all where the framework has a form for that; never B."""
    if tuple(shape) not in map(tuple, expected.values()):
        allowed = " or ".join(f"{layout} = {tuple(sizes)}" for layout, sizes in expected.items())
        raise ValueError(
            f"{what} expects {name} of shape {allowed}; got {tuple(shape)}. To give every member the same masks, call "
            f"tile_members({name}, {num_members})."
        )
