"""Checks of what losses and uncertainties are given, and the sentences they raise.

The same file, byte for byte, in probly_torch and probly_flax. It imports no framework.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

Unit = Literal["nats", "bits"]


def check_unit(what: str, unit: Any) -> None:
    if unit not in get_args(Unit):
        raise ValueError(f"{what} expects unit to be 'nats' or 'bits'; got {unit!r}. Pass unit='nats'.")


def check_cross_entropy_options(
    what: str, num_classes: int, weight: Any, label_smoothing: Any, ignore_index: Any
) -> None:
    """The options of torch's cross-entropy."""
    got = tuple(weight.shape) if hasattr(weight, "shape") else repr(weight)
    if weight is not None and got != (num_classes,):
        raise ValueError(
            f"{what} expects weight to be None or of shape [C], one number for each class, with C={num_classes}; got "
            f"{got}. For equal classes, leave it out: weight=None."
        )
    _check_number(what, "label_smoothing", label_smoothing, "from 0 to 1", lambda value: 0 <= value <= 1, 0.1)
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):
        raise TypeError(f"{what} expects ignore_index to be an integer; got {ignore_index!r}. Pass ignore_index=-100.")


def check_beta(what: str, beta: Any) -> None:
    requirement = "from 0 (as the likelihood has it) to 1 (as the squared error has it)"
    _check_number(what, "beta", beta, requirement, lambda value: 0 <= value <= 1, 0.5)


def check_gaussian_outputs(what: str, shape: Sequence[int], min_variance: Any) -> None:
    """K means and K values for variances on the last axis."""
    if not shape or shape[-1] % 2 or not shape[-1]:
        raise ValueError(
            f"{what} expects outputs of shape [..., 2K], K means and K variances before softplus; got {tuple(shape)}. "
            f"Give the network two outputs for each target: Linear(features, 2 * K)."
        )
    _check_number(what, "min_variance", min_variance, "above 0 and finite", lambda value: 0 < value < math.inf, 1e-6)


def check_gaussian(what: str, mean: Sequence[int], variance: Sequence[int]) -> None:
    """Members' means and variances; nothing is broadcast."""
    if len(mean) < 2 or not mean[0] or tuple(mean) != tuple(variance):
        raise ValueError(
            f"{what} expects mean and variance of one shape [E, B, ...] (members, batch); got {tuple(mean)} and "
            f"{tuple(variance)}. For a single network, add the member axis: mean[None], variance[None]."
        )


def check_variance(what: str, holds: bool, bound: str = "above 0") -> None:
    """For what can look at values: traced ones become NaN instead."""
    if not holds:
        raise ValueError(
            f"{what} expects variances {bound}; got others among them. Make them so with softplus: "
            f"mean, variance = to_gaussian(outputs)."
        )


def check_targets(what: str, mean: Sequence[int], targets: Sequence[int], each: bool) -> None:
    """Targets of the batch; or, for losses of members, of each member."""
    allowed = (tuple(mean[1:]), tuple(mean)) if each else (tuple(mean[1:]),)
    if tuple(targets) not in allowed:
        raise ValueError(
            f"{what} expects targets of shape {' or '.join(map(str, allowed))}, as mean {tuple(mean)} has without its "
            f"members{' or with them' * each}; got {tuple(targets)}. Pass targets.reshape({allowed[0]})."
        )


def check_same_inputs(what: str, first: Sequence[int], other: Sequence[int]) -> None:
    """Updates of a stream are members' outputs for the same inputs."""
    if tuple(first) != tuple(other):
        raise ValueError(
            f"{what} expects outputs for the same inputs in every update, {tuple(first)} after the axis "
            f"of members; got {tuple(other)}. For other inputs, make another stream: {what.partition('.')[0]}()."
        )


def check_updated(what: str, call: str, num_members: int) -> None:
    if not num_members:
        raise RuntimeError(f"{what} expects the outputs of at least one member; got none. Call {call} first.")


def _check_number(
    what: str, name: str, value: Any, requirement: str, allowed: Callable[[float], bool], example: float
) -> None:
    sentence = f"{what} expects {name} to be a number {requirement}; got {value!r}. Pass {name}={example}."
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(sentence)
    if not allowed(value):
        raise ValueError(sentence)
