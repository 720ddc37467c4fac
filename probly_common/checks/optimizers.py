"""Checks of an optimizer's state."""

from __future__ import annotations

import math
import warnings
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from probly_common.checks.values import shown
from probly_common.checks.weights import Specs, listed
from probly_common.weights.match import nearest_names


def check_optimizer(what: str, optimizer: Any, known: tuple[type, ...], supported: str, example: str) -> None:
    if not isinstance(optimizer, known):
        raise TypeError(
            f"{what} expects an optimizer of {supported}, whose state both frameworks have; got "
            f"{type(optimizer).__name__}. Pass {example}."
        )


def check_same_in_both(what: str, options: Sequence[str]) -> None:
    """Refuses options under which the frameworks compute something else, or keep it otherwise."""
    if options:
        raise ValueError(
            f"{what} expects SGD, Adam or AdamW as both frameworks compute them; got {', '.join(options)}. Train on "
            f"with torch.optim.SGD, Adam or AdamW, or optax.sgd, adam or adamw, with options that both have."
        )


def check_parameters(what: str, strangers: int) -> None:
    if strangers:
        raise ValueError(
            f"{what} expects the model whose parameters the optimizer updates; got a model without {strangers} of "
            f"them. Pass the model, or the part of it, that the optimizer was made for: {what}(model, ...)."
        )


def check_whole(what: str, names: Sequence[str]) -> None:
    """Refuses to train parts of a weight that torch packs into one, like query, key and value of attention."""
    if names:
        raise ValueError(
            f"{what} expects weights that are one tensor in torch to be trained together; got an optimizer of some "
            f"parts of {', '.join(names)}. Train all of its parts, or none: wrt=nnx.Param."
        )


def check_separate(what: str, names: Sequence[str]) -> None:
    """Refuses the sum of torch's two recurrent biases, which move twice as far as the one that is their sum."""
    if names:
        raise ValueError(
            f"{what} expects parameters that torch has too; got {', '.join(names)}: torch trains two where there is "
            f"one here. Start anew with the weights alone: nnx.Optimizer(model, tx, wrt=nnx.Param)."
        )


def check_state(what: str, expected: Specs, given: Specs, optional: Collection[str]) -> None:
    """Compares (shape, dtype) by name and reports every difference at once, before anything is written."""
    missing = [name for name in expected if name not in given and name not in optional]
    unexpected = [name for name in given if name not in expected]
    near = {name: f" (rename {shown(other)}?)" for name, other in nearest_names(missing, unexpected).items()}
    problems = [f"  missing: {shown(name)}{near.get(name, '')}" for name in missing]
    problems += [f"  unexpected: {shown(name)}" for name in unexpected]
    for name in expected.keys() & given.keys():
        for word, own, other in zip(("shape", "dtype"), expected[name], given[name], strict=True):
            if own != other:
                problems.append(f"  {word}: {shown(name)} is {own} here, {other} there")
    if problems:
        raise ValueError(
            f"{what} expects the names, shapes and dtypes of this optimizer's state; got {len(problems)} differences "
            f"and loaded nothing:\n{listed(problems)}\nPass optimizer_to_arrays(model, optimizer) of the same kind of "
            f"optimizer, over the twins of the same parameters."
        )


def check_steps(what: str, steps: Mapping[str, float]) -> None:
    """Raises unless steps, by name, are whole numbers of 0 or more."""
    wrong = {name: step for name, step in steps.items() if not (math.isfinite(step) and step >= 0 and step % 1 == 0)}
    if wrong:
        name, step = next(iter(wrong.items()))
        raise ValueError(
            f"{what} expects a whole number of steps, 0 or more; got {step} in {shown(name)}, and loaded nothing. Pass "
            f"optimizer_to_arrays(model, optimizer)."
        )


def check_one_step(what: str, steps: Mapping[str, float]) -> None:
    if len(set(steps.values())) > 1:
        low, high = (choose(steps, key=lambda name: steps[name]) for choose in (min, max))
        raise ValueError(
            f"{what} expects one number of steps for all parameters, since optax counts them once; got {steps[low]:g} "
            f"in {shown(low)} and {steps[high]:g} in {shown(high)}. In torch, freeze parameters that get no gradient: "
            f"parameter.requires_grad_(False)."
        )


def check_step_known(what: str, steps: Collection[str], counts: Collection[str], name: str) -> None:
    """Refuses a state without steps, by name, for an optimizer that counts them."""
    if counts and not steps:
        raise ValueError(
            f"{what} expects the number of steps taken, for the schedule of this optimizer; got arrays without it, "
            f"since torch's SGD does not count, and loaded nothing. Add it: arrays[{name!r}] = np.float32(steps)."
        )


def warn_state_not_finite(what: str, names: Sequence[str]) -> None:
    if names:
        lines = listed([f"  {shown(name)}" for name in names])
        warnings.warn(
            f"{what} loads a state with values that are NaN or infinite:\n{lines}\nTo start anew, do not load it.",
            stacklevel=4,
        )
