"""Argument and shape checks, and the sentences they raise.

The same file, byte for byte, in probly_torch and probly_flax: bad input reads alike in both. It imports
no framework. Every sentence is "what expects requirement, with names and numbers; got value. Next step".
"""

from __future__ import annotations

import functools
import inspect
import math
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import zip_longest
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable[..., Any])

INITS = ("normal", "random_sign", "ones")
MAX_SEED = 2**32


def index(value: Any) -> int | None:
    """The integer that `value` stands for, or None when it is not one (a bool is not)."""
    try:
        return None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        return None


def type_name(value: Any) -> str:
    return type(value).__name__


def check_num_members(what: str, num_members: Any) -> int:
    count = index(num_members)
    requirement = f"{what} expects num_members to be an integer of at least 1"
    if count is None:
        raise TypeError(f"{requirement}; got {num_members!r} ({type_name(num_members)}). Pass num_members=4.")
    if count < 1:
        raise ValueError(f"{requirement}; got {count}. Pass num_members=4.")
    return count


def check_seed(what: str, rngs: Any) -> int:
    """An int seed, of the 32 bits that every JAX configuration keeps."""
    seed = index(rngs)
    if seed is None:
        raise TypeError(
            f"{what} expects rngs to be an int seed or an Rngs; got {type_name(rngs)}. Pass a seed, rngs=0, or Rngs(0)."
        )
    if not 0 <= seed < MAX_SEED:
        raise ValueError(
            f"{what} expects a seed from 0 to 2**32 - 1 (JAX drops the other bits unless jax_enable_x64 is set); "
            f"got {seed}. Pass {seed % MAX_SEED}, its low 32 bits."
        )
    return seed


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
    """A Linear layer whose forward is Linear's own."""
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


def check_module(what: str, name: str, value: Any, expected: type) -> None:
    if not isinstance(value, expected):
        raise TypeError(
            f"{what} expects {name} to be a {expected.__name__}; got {type_name(value)}. Pass a network, as in "
            f"{what}(network, ...)."
        )


def common_num_members(counts: Iterable[int]) -> int:
    """The num_members that all BatchEnsemble layers of a network share."""
    found = sorted(set(counts))
    if len(found) != 1:
        got = f"layers of {' and '.join(map(str, found))} members" if found else "none"
        raise ValueError(
            f"BatchEnsemble expects a network with BatchEnsemble layers of one num_members; got {got}. To convert a "
            f"network, call batchensemble(network, num_members=4)."
        )
    return found[0]


def check_not_converted(what: str, counts: Iterable[int]) -> None:
    found = len(list(counts))
    if found:
        raise ValueError(
            f"{what} expects a network without BatchEnsemble layers; got one with {found}. Convert the network it was "
            f"made from, or wrap this one: BatchEnsemble(network)."
        )


def check_no_ensemble(what: str, counts: Iterable[int]) -> None:
    found = next(iter(counts), None)
    if found is not None:
        raise ValueError(
            f"{what} expects a network without members of its own; got an Ensemble of {found}. Convert one of its "
            f"members: {what}(model[0], num_members=4)."
        )


def seed_is_not_num_members(init: F) -> F:
    """Refuses `Layer(base, 4)`, which would make 4 the seed and leave one member."""
    what = init.__qualname__.split(".")[0]

    @functools.wraps(init)
    def checked(self: Any, *args: Any, **kwargs: Any) -> None:
        if len(args) == 2 and "num_members" not in kwargs and index(args[1]) is not None:
            raise TypeError(
                f"{what} expects rngs, a seed, as its second positional argument and num_members by name; got "
                f"{what}(base_layer, {args[1]}). For {args[1]} members call {what}(base_layer, num_members={args[1]}); "
                f"for one member drawn from seed {args[1]} call {what}(base_layer, rngs={args[1]}, num_members=1)."
            )
        init(self, *args, **kwargs)

    return checked  # type: ignore[return-value]


def check_member_rows(what: str, shape: Sequence[int], num_members: int, in_features: int) -> None:
    """Rows [k*B, (k+1)*B) belong to member k, so their number is a multiple of num_members."""
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
    """The shape of tile_members(x, num_members), for a batch that is not tiled."""
    return tuple(num_members * size if axis == 0 else size for axis, size in enumerate(shape))


def check_fast_weights(
    what: str,
    in_features: int,
    out_features: int,
    r: Sequence[int],
    s: Sequence[int],
    bias: Sequence[int] | None,
) -> None:
    """r, s and bias all have one row for each member: none of them is broadcast."""
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


def check_output_leaf(what: str, leaf: Any) -> None:
    if leaf is not None and not isinstance(leaf, (bool, int, float, str)):
        raise TypeError(
            f"{what} expects outputs that are tensors or arrays, alone or in tuples, lists and dicts; got "
            f"{type_name(leaf)}. Return its arrays, as in a dict."
        )


def check_batch_first(what: str, paths: Sequence[str], fix: str) -> None:
    if paths:
        raise ValueError(
            f"{what} expects every layer to have the batch on its first axis, where members are told apart; got "
            f"another order in {', '.join(paths)}. Build them with {fix}."
        )


def check_base_options(what: str, kind: str, unused: Mapping[str, bool]) -> None:
    given = [name for name, is_given in unused.items() if is_given]
    if given:
        raise TypeError(
            f"{what} expects {', '.join(given)} with a network to copy; got {kind}, for which it has no meaning. Leave "
            f"it out: {what}(base, num_members)."
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
    """Under in_axes=0 every array has one slice for each member."""
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


def member_indices(what: str, item: Any, num_members: int) -> list[int]:
    """The members that `model[item]` selects, for a slice or a list of integers."""
    if isinstance(item, slice):
        chosen = list(range(num_members))[item]
    else:
        chosen = [member_index(what, i, num_members) for i in item]
    if not chosen:
        raise ValueError(f"{what} expects at least one member; got {item!r}, which selects none. Call model[[0]].")
    return chosen


def member_index(what: str, item: Any, num_members: int) -> int:
    i = index(item)
    if i is None:
        raise TypeError(
            f"{what} expects an integer, a slice or a list of integers as index; got {type_name(item)}. Call model[0]."
        )
    if not -num_members <= i < num_members:
        raise IndexError(
            f"{what} expects an index from {-num_members} to {num_members - 1}; got {i}. Call model[{num_members - 1}]."
        )
    return i % num_members


def check_logits(what: str, shape: Sequence[int]) -> None:
    if len(shape) != 3 or 0 in (shape[0], shape[2]):
        raise ValueError(
            f"{what} expects logits of shape [E, B, C] (members, batch, classes); got {tuple(shape)}. "
            f"For a single network, add the member axis: logits[None]."
        )


def check_labels(what: str, logits: Sequence[int], labels: Sequence[int], integer: bool, each: bool = True) -> None:
    """Labels of the batch; or, for losses of members, of each member."""
    num_members, batch = logits[0], logits[1]
    if tuple(labels) != (batch,) and not (each and tuple(labels) == (num_members, batch)):
        allowed = f"[B] or [E, B] with E={num_members}, B={batch}" if each else f"[B] with B={batch}"
        raise ValueError(
            f"{what} expects labels of shape {allowed}; got {tuple(labels)}. For one-hot labels, pass "
            f"labels.argmax(-1)."
        )
    if not integer:
        raise TypeError(f"{what} expects integer class indices as labels; got another dtype. Pass labels.argmax(-1).")


def check_member_losses(what: str, shape: Sequence[int], num_members: int) -> None:
    if tuple(shape) != (num_members,):
        raise ValueError(
            f"{what} expects a loss that returns a scalar for one network; got {tuple(shape[1:])}. Take the mean: "
            f"{what}(lambda outputs, targets: loss(outputs, targets).mean(), outputs, targets)."
        )


def check_list_of_members(what: str, members: Any, is_list: bool) -> None:
    """A network is no list of members, even one that can be iterated over."""
    if not is_list:
        raise TypeError(
            f"{what} expects a list of modules; got {type_name(members)}. To make members of one network, call "
            f"ensemble(network, num_members=4)."
        )
    if not len(members):
        raise ValueError(f"{what} expects at least one member; got none. Pass a list of modules, {what}([network]).")


def check_same_structure(what: str, first: Sequence[str], i: int, other: Sequence[str], num_members: int) -> None:
    """Structures are described line by line."""
    for line, other_line in zip_longest(first, other):
        if line != other_line:
            raise ValueError(
                f"{what} expects members of one structure; got member 0 with {line or 'nothing'} where member {i} "
                f"has {other_line or 'nothing'}. Build them all alike: ensemble(network, num_members={num_members})."
            )


def check_initialized(what: str, names: Sequence[str]) -> None:
    if names:
        raise ValueError(
            f"{what} expects layers that know their shapes; got lazy ones, without {names[0]}. Call the network once "
            f"first: network(x)."
        )


def check_run_once(what: str, again: bool) -> None:
    if again:
        raise RuntimeError(
            f"{what} expects one call for each mask of Dropout, which it draws from its own rngs; got a second one in "
            f"the backward pass, as activation checkpointing makes it. Pass chunk_size=1 instead, which does that; or "
            f"draw from torch's generator: Ensemble(list(model))."
        )


def check_dropout_rngs(what: str, paths: Sequence[str], error: Exception) -> None:
    if paths:
        raise ValueError(
            f"{what} expects rngs for the masks of Dropout in train mode; got none for {', '.join(paths)}. Build the "
            f"layer with them, nnx.Dropout(rate, rngs=rngs); or call model.eval() first."
        ) from error


def check_reset_type(what: str, reset_type: Any, expected: tuple[type, ...]) -> None:
    if not (isinstance(reset_type, type) and issubclass(reset_type, expected)):
        names = " or ".join(each.__name__ for each in expected)
        raise TypeError(
            f"{what} expects the type of a layer or a parameter, a subclass of {names}; got {reset_type!r}. Decorate "
            f"the rule with @{what}(type(layer))."
        )


def check_distinct(what: str, members: Sequence[Any]) -> None:
    if len({id(member) for member in members}) < len(members):
        raise ValueError(
            f"{what} expects members that are modules of their own; got one of them more than once. To start "
            f"{len(members)} members from one network, call ensemble(network, {len(members)}, reset_params=False)."
        )


def check_member_count(what: str, found: int, num_members: int) -> None:
    if found != num_members:
        raise ValueError(
            f"{what} expects a list of num_members={num_members} modules; got {found}. Call {what}(modules, {found})."
        )


def check_reset(what: str, uncovered: Sequence[str]) -> None:
    if uncovered:
        raise ValueError(
            f"{what} expects a rule to re-initialise every parameter; got none for {', '.join(uncovered)}. Pass a "
            f"constructor, {what}(lambda rngs: Network(...), num_members); or a rule for this call, "
            f"{what}(network, num_members, reset=lambda parameter, rngs: ...); or register one, @register_reset(type)."
        )


def check_reset_value(what: str, path: str, shape: Sequence[int], value: Any) -> None:
    got = tuple(value.shape) if hasattr(value, "shape") else value
    if got != tuple(shape):
        raise ValueError(
            f"{what} expects reset to return the new value of {path}, of shape {tuple(shape)}; got {got}. "
            f"Draw it of that shape: normal(rngs.params(), parameter.shape)."
        )


def check_example_input(what: str, example_input: Any) -> None:
    if example_input is None:
        raise TypeError(
            f"{what} expects an example_input to initialise a Linen module with; got none. Pass one, "
            f"{what}(module, num_members, example_input=x)."
        )


def takes_rngs_by_name(what: str, constructor: Callable[..., Any]) -> bool:
    """Whether a function, a class or a partial has a parameter called rngs, or takes one argument of any name."""
    function: Any = constructor
    given = 0
    while isinstance(function, functools.partial):
        given += len(function.args)
        function = function.func
    if isinstance(function, type):  # an nnx class hides the signature of its __init__
        function, given = next(vars(c)["__init__"] for c in function.__mro__ if "__init__" in vars(c)), given + 1
    parameters = inspect.signature(function).parameters
    if "rngs" in parameters:
        return True
    positional = [p for p in parameters.values() if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)][given:]
    takes_any = any(p.kind is p.VAR_POSITIONAL for p in parameters.values())
    required = [p.name for p in positional if p.default is p.empty]
    if len(required) > 1 or not (positional or takes_any):
        raise TypeError(
            f"{what} expects a constructor that takes the member's rngs; got one that takes "
            f"{', '.join(required) or 'nothing'}. Wrap it: {what}(lambda rngs: Network(...), num_members)."
        )
    return False


def check_independent(what: str, num_members: int, differ: bool) -> None:
    if num_members > 1 and not differ:
        raise ValueError(
            f"{what} expects members that differ; got {num_members} equal ones. Draw from the rngs that are given: "
            f"{what}(lambda rngs: Network(rngs=rngs), {num_members})."
        )
