"""Checks of networks and of their members."""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from probly_common.checks.values import index, type_name
from probly_common.mismatch import Mismatch
from probly_common.structure import HELD_BY_FUNCTION, Difference


def common_num_members(counts: Iterable[int]) -> int:
    """Returns the num_members that all BatchEnsemble layers of a network share."""
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


def check_base_options(what: str, kind: str, unused: Mapping[str, bool]) -> None:
    given = [name for name, is_given in unused.items() if is_given]
    if given:
        raise TypeError(
            f"{what} expects {', '.join(given)} with a network to copy; got {kind}, for which it has no meaning. Leave "
            f"it out: {what}(base, num_members)."
        )


def member_indices(what: str, item: Any, num_members: int) -> list[int]:
    """Returns the members that `model[item]` selects, for a slice or a list of integers."""
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


def check_list_of_members(what: str, members: Any, lists: tuple[Any, ...]) -> None:
    """Refuses a network, which is no list of members, even one that can be iterated over."""
    if not isinstance(members, lists):
        raise TypeError(
            f"{what} expects a list of modules; got {type_name(members)}. To make members of one network, call "
            f"ensemble(network, num_members=4)."
        )
    if not len(members):
        raise ValueError(f"{what} expects at least one member; got none. Pass a list of modules, {what}([network]).")


def check_same_structure(what: str, difference: Difference | None, i: int, num_members: int) -> None:
    """Raises if member i differs from member 0 in what is not stacked."""
    if difference is not None:
        path, first, other = difference
        if first is HELD_BY_FUNCTION:
            raise ValueError(
                f"{what} expects functions that hold no part of the network, since a copy would call the original's; "
                f"got {path}. Make it a method of the network's class: def act(self, x): return self.linear(x)."
            )
        raise ValueError(
            f"{what} expects members of one structure; got member 0, where {path or 'the network'} is {first}, and "
            f"member {i}, where it is {other}. Build them all alike: ensemble(network, num_members={num_members})."
        )


def check_stackable(what: str, packed: Sequence[str]) -> None:
    if packed:
        raise ValueError(
            f"{what} expects members whose weights are parameters and buffers, which can be stacked; got {packed[0]}, "
            f"which packs its own. Run the members one by one: torch.stack([member(x) for member in members])."
        )


def check_initialized(what: str, names: Sequence[str]) -> None:
    if names:
        raise ValueError(
            f"{what} expects layers that know their shapes; got lazy ones, without {names[0]}. Call the network once "
            f"first: network(x)."
        )


def check_run_once(what: str, backward_pass: int) -> None:
    """Refuses a call in a backward pass, which has a number there and -1 outside."""
    if backward_pass != -1:
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


def warn_of_other_starts(what: str, names: Sequence[str], num_parameters: int, num_members: int) -> None:
    if names:
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        warnings.warn(
            f"{what} expects a network whose weights are as its layers draw them, to draw them anew for each member; "
            f"got other spreads in {len(names)} of {num_parameters} parameters: {', '.join(names[:3])}{more}. To keep "
            f"the weights, pass reset_params=False: {what}(network, {num_members}, reset_params=False). For members "
            f"that start as the network did, pass its constructor: {what}(Network, {num_members}), or "
            f"{what}(lambda rngs: Network(...), {num_members}).",
            stacklevel=3,
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


def construct(what: str, constructor: Callable[..., Any], rngs: Any) -> Any:
    """Calls a function, a class or a partial with rngs: by that name, or as the one argument that it needs, if any."""
    function: Any = constructor
    given, named = 0, set[str]()
    while isinstance(function, functools.partial):
        given, named = given + len(function.args), named | function.keywords.keys()
        function = function.func
    if isinstance(function, type):  # an nnx class hides the signature of its __init__
        function, given = next(vars(c)["__init__"] for c in function.__mro__ if "__init__" in vars(c)), given + 1
    parameters = inspect.signature(function).parameters
    if "rngs" in parameters:
        return constructor(rngs=rngs)
    positional = [p for p in parameters.values() if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)][given:]
    takes_any = not positional and any(p.kind is p.VAR_POSITIONAL for p in parameters.values())
    required = [p.name for p in positional if p.default is p.empty and p.name not in named]
    if len(required) > 1:
        raise TypeError(
            f"{what} expects a constructor that takes the member's rngs, or nothing; got one that takes "
            f"{', '.join(required)}. Wrap it: {what}(lambda rngs: Network(...), num_members)."
        )
    return constructor(rngs) if required or takes_any else constructor()


def check_independent(what: str, num_members: int, differ: bool) -> None:
    if num_members > 1 and not differ:
        raise ValueError(
            f"{what} expects members that differ; got {num_members} equal ones. Draw from the rngs that are given: "
            f"{what}(lambda rngs: Network(rngs=rngs), {num_members})."
        )


def check_members_alone(what: str, mismatch: Mismatch | None, num_members: int) -> None:
    """Raises if a member's outputs are others than those that it has alone."""
    if mismatch is None:
        return
    advice = f"For members that share nothing, call ensemble(network, {num_members})."
    if mismatch.suspects:
        reasons = "; ".join(f"{path or 'the network'}: {reason}" for path, reason in mismatch.suspects.items())
        exclude = list(mismatch.suspects)
        advice = f"Layers to leave shared: {reasons}. Pass exclude={exclude!r} to batchensemble, or example_input=x."
    raise ValueError(
        f"{what} expects each member's outputs to be those that it has alone; got member {mismatch.member}, "
        f"{mismatch.distance:.1e} of their largest value apart. {advice}"
    )
