"""Checks of training."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any


def check_group_options(what: str, weight_decay: Any, fast_lr_multiplier: Any) -> None:
    for name, value in (("weight_decay", weight_decay), ("fast_lr_multiplier", fast_lr_multiplier)):
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not number:
            raise TypeError(f"{what} expects {name} as a number; got {type(value).__name__}. Pass {name}=0.5.")
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"{what} expects {name} of 0 or more; got {value}. Pass {name}=0.5.")


def check_groups(
    what: str,
    weight_decay: float,
    slow: Sequence[str],
    fast: Sequence[str],
    unknown: Mapping[str, str],
    model: str = "model, ",
) -> None:
    """Raises unless all parameters have a group.

    `slow` and `fast` are the names of the parameters of each group. `unknown` has those in none, with the type of
    module that holds them.
    """
    if unknown:
        name, kind = next(iter(unknown.items()))
        more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
        raise ValueError(
            f"{what} expects to know what decays in each module; got {name!r} of a {kind}{more}. Say it: "
            f"{what}({model}{weight_decay}, decay=({kind},)), or no_decay=({kind},)."
        )
    if not fast:
        raise ValueError(
            f"{what} expects a model with fast weights, r and s of BatchEnsemble layers; got one with {len(slow)} slow "
            f"weights and no fast ones. Convert it: model = batchensemble(model, 4)."
        )
    if not slow:
        raise ValueError(
            f"{what} expects a model with slow weights, which decay; got one with {len(fast)} fast weights and no slow "
            f"ones. Leave types out of no_decay."
        )


def check_types(what: str, name: str, types: Any, expected: type, example: str) -> None:
    """Raises unless types of modules are given as isinstance takes them in a tuple."""
    if not (isinstance(types, tuple) and all(isinstance(each, type) and issubclass(each, expected) for each in types)):
        raise TypeError(
            f"{what} expects {name} as a tuple of types of modules; got {types!r}. Pass {name}=({example},)."
        )


def check_same_parameters(what: str, others: Sequence[str]) -> None:
    if others:
        raise ValueError(
            f"{what} expects an optimizer of this model's parameters; got one of other parameters, such as "
            f"{others[0]!r}. Make both of one model: {what}(model, weight_decay)."
        )


def check_batch(what: str, batch: Any) -> tuple[Any, Any]:
    if not isinstance(batch, (tuple, list)) or len(batch) != 2:
        got = f"{len(batch)} of them" if isinstance(batch, (tuple, list)) else type(batch).__name__
        raise ValueError(f"{what} expects a batch of inputs and targets; got {got}. Pass (inputs, targets).")
    inputs, targets = batch
    return inputs, targets


def check_loss(what: str, shape: Sequence[int] | None) -> None:
    """Raises unless a loss returns a scalar. The shape is None if it returns no tensor."""
    if shape is None or tuple(shape) != ():
        got = "no array" if shape is None else f"one of shape {tuple(shape)}"
        raise ValueError(f"{what} expects a loss that returns a scalar; got {got}. Return its mean: loss.mean().")


def check_lr_ratios(what: str, schedule: str, before: Sequence[float], after: Sequence[float]) -> None:
    """Raises unless a schedule keeps the ratios of the groups' learning rates to the first one's.

    They are taken before and after the schedule took over.
    """
    if not all(math.isclose(a, b, rel_tol=1e-3) for a, b in zip(before, after, strict=False)):
        raise ValueError(
            f"{what} expects a schedule that keeps the ratios of the groups' learning rates, {list(before)}; got "
            f"{schedule}, which makes them {list(after)}. Give it a rate for each group: lambda optimizer: "
            f'{schedule}(optimizer, [group["lr"] for group in optimizer.param_groups], ...).'
        )


def check_task(what: str, task: Any) -> None:
    if task not in ("classification", "regression"):
        raise ValueError(
            f"{what} expects task 'classification' or 'regression'; got {task!r}. Pass task='regression' for a model "
            f"that returns mean and variance."
        )


def check_attribute(what: str, owner: Any, name: str) -> None:
    if not hasattr(owner, name):
        raise ValueError(
            f"{what} expects a module with its network in {name}; got {type(owner).__name__}, which has no such "
            f"attribute. Say where it is: {what}(attribute='network')."
        )
