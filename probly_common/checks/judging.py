"""Checks of what losses, uncertainties, metrics and plots are given."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, get_args

import numpy as np

from probly_common.checks.values import dtype_name, is_integer


def check_logits(what: str, shape: Sequence[int]) -> None:
    if len(shape) != 3 or 0 in (shape[0], shape[2]):
        raise ValueError(
            f"{what} expects logits of shape [E, B, C] (members, batch, classes); got {tuple(shape)}. "
            f"For a single network, add the member axis: logits[None]."
        )


def check_labels(what: str, logits: Sequence[int], labels: Sequence[int], dtype: Any, each: bool = True) -> None:
    """Raises unless labels are those of the batch or, for losses of members, of each member."""
    num_members, batch = logits[0], logits[1]
    if tuple(labels) != (batch,) and not (each and tuple(labels) == (num_members, batch)):
        allowed = f"[B] or [E, B] with E={num_members}, B={batch}" if each else f"[B] with B={batch}"
        raise ValueError(
            f"{what} expects labels of shape {allowed}; got {tuple(labels)}. For one-hot labels, pass "
            f"labels.argmax(-1)."
        )
    if not is_integer(dtype):
        raise TypeError(
            f"{what} expects integer class indices as labels; got {dtype_name(dtype)}. Pass labels.argmax(-1)."
        )


def check_member_losses(what: str, shape: Sequence[int], num_members: int) -> None:
    if tuple(shape) != (num_members,):
        raise ValueError(
            f"{what} expects a loss that returns a scalar for one network; got {tuple(shape[1:])}. Take the mean: "
            f"{what}(lambda outputs, targets: loss(outputs, targets).mean(), outputs, targets)."
        )


Unit = Literal["nats", "bits"]


def check_unit(what: str, unit: Any) -> None:
    if unit not in get_args(Unit):
        raise ValueError(f"{what} expects unit to be 'nats' or 'bits'; got {unit!r}. Pass unit='nats'.")


def check_cross_entropy_options(
    what: str, num_classes: int, weight: Any, label_smoothing: Any, ignore_index: Any
) -> None:
    """Refuses options that torch's cross-entropy does not take."""
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
    """Raises unless the last axis has K means and K values for variances."""
    if not shape or shape[-1] % 2 or not shape[-1]:
        raise ValueError(
            f"{what} expects outputs of shape [..., 2K], K means and K variances before softplus; got {tuple(shape)}. "
            f"Give the network two outputs for each target: Linear(features, 2 * K)."
        )
    _check_number(what, "min_variance", min_variance, "above 0 and finite", lambda value: 0 < value < math.inf, 1e-6)


def check_gaussian(what: str, mean: Sequence[int], variance: Sequence[int]) -> None:
    """Raises unless members' means and variances have equal shapes. Nothing is broadcast."""
    if len(mean) < 2 or not mean[0] or tuple(mean) != tuple(variance):
        raise ValueError(
            f"{what} expects mean and variance of one shape [E, B, ...] (members, batch); got {tuple(mean)} and "
            f"{tuple(variance)}. For a single network, add the member axis: mean[None], variance[None]."
        )


def check_variance(what: str, variance: Any, zero: bool) -> None:
    """Refuses variances below 0, or at 0 too, for callers that can look at values. Traced ones become NaN instead."""
    wrong = variance < 0 if zero else variance <= 0
    if wrong.any():
        raise ValueError(
            f"{what} expects variances {'of at least 0' if zero else 'above 0'}; got {float(variance[wrong].min()):g}. "
            f"Use softplus: mean, variance = to_gaussian(outputs)."
        )


def check_targets(what: str, mean: Sequence[int], targets: Sequence[int], each: bool) -> None:
    """Raises unless targets are those of the batch or, for losses of members, of each member."""
    allowed = (tuple(mean[1:]), tuple(mean)) if each else (tuple(mean[1:]),)
    if tuple(targets) not in allowed:
        raise ValueError(
            f"{what} expects targets of shape {' or '.join(map(str, allowed))}, that of mean without"
            f"{' or with' * each} its member axis; got {tuple(targets)}. Pass targets.reshape({allowed[0]})."
        )


def check_same_inputs(what: str, first: Sequence[int], other: Sequence[int]) -> None:
    """Raises unless updates of a stream are members' outputs for the same inputs."""
    if tuple(first) != tuple(other):
        raise ValueError(
            f"{what} expects outputs for the same inputs in every update, {tuple(first)} after the axis "
            f"of members; got {tuple(other)}. For other inputs, make another stream: {what.partition('.')[0]}()."
        )


def check_any_members(what: str, call: str, num_members: int) -> None:
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


def check_ax(what: str, ax: Any, axes: type) -> None:
    if not (ax is None or isinstance(ax, axes)):
        raise TypeError(
            f"{what} expects ax to be the Axes of one plot, or None; got {type(ax).__name__}. Pass one: "
            f"{what}(..., ax=figure.subplots())."
        )


def check_inputs(what: str, inputs: int, nan: int) -> None:
    """Refuses NaN, which has no place among probabilities: it would be left out without a word."""
    if not inputs:
        raise ValueError(f"{what} expects at least one input; got none. Pass more rows: logits[:, :100].")
    if nan:
        raise ValueError(
            f"{what} expects logits whose softmax is finite; got NaN or infinity for {nan} of {inputs} inputs. Find "
            f"the layer: torch.autograd.set_detect_anomaly(True), or jax.config.update('jax_debug_nans', True)."
        )


def check_grid(what: str, grid: Sequence[int], values: Sequence[int]) -> None:
    if len(grid) != 3 or grid[2] != 2 or 0 in grid:
        raise ValueError(
            f"{what} expects grid of shape [H, W, 2], the points of a grid in the plane; got {tuple(grid)}. Make it: "
            f"np.stack(np.meshgrid(x1, x2), -1)."
        )
    if tuple(values) not in ((grid[0], grid[1]), (grid[0] * grid[1],)):
        raise ValueError(
            f"{what} expects values of shape [H, W] or [H*W] with H={grid[0]}, W={grid[1]}; got {tuple(values)}. Pass "
            f"one number for each point: mutual_information(model(grid.reshape(-1, 2)))."
        )


def check_curve(what: str, name: str, x: Sequence[int], values: Sequence[int]) -> None:
    """Raises unless there is one number for each input. Both may have a last axis of one feature."""
    sizes = [shape[0] for shape in (x, values) if len(shape) == 1 or (len(shape) == 2 and shape[1] == 1)]
    if len(sizes) < 2 or sizes[0] != sizes[1] or not sizes[0]:
        raise ValueError(
            f"{what} expects x and {name} of shape [B] or [B, 1]; got {tuple(x)} and {tuple(values)}. Choose one "
            f"feature and one target: x[:, 0], {name}[:, 0]."
        )


def check_variances(what: str, values: Sequence[np.ndarray]) -> None:
    smallest = min((each[each < 0].min(initial=0.0) for each in values), default=0.0)
    if smallest < 0:
        raise ValueError(
            f"{what} expects uncertainties of at least 0, which are variances; got {smallest:g}. Pass "
            f"regression_uncertainty(mean, variance)."
        )


def check_values_of_members(what: str, values: Sequence[int]) -> None:
    if len(values) != 2 or 0 in values:
        raise ValueError(
            f"{what} expects values of shape [E, B], one number for each member and input; got {tuple(values)}. "
            f"Choose a target, mean[..., 0], or the probability of a class, logits.softmax(-1)[..., 1]."
        )


def check_history(what: str, history: Any) -> None:
    if not isinstance(history, Sequence) or not all(isinstance(row, Mapping) for row in history):
        raise TypeError(
            f"{what} expects history to be a list of dicts, one for each epoch; got {type(history).__name__}. "
            f"Pass [{{'train_loss': 0.7}}, {{'train_loss': 0.5}}]."
        )


def check_names(what: str, missing: Sequence[str], chosen: Sequence[str], logged: Sequence[str]) -> None:
    if not logged:
        raise ValueError(f"{what} expects the history of at least one epoch; got none. Train for one: epochs=1.")
    if missing or not chosen:
        raise ValueError(
            f"{what} expects names that history has, or losses in it; got {list(missing or chosen)} and a history of "
            f"{', '.join(logged)}. Pass names={list(logged)}."
        )


def check_moments(what: str, uncertainty: Any, fields: Sequence[str]) -> None:
    if not all(hasattr(uncertainty, field) for field in fields):
        raise TypeError(
            f"{what} expects uncertainty with {', '.join(fields)}; got {type(uncertainty).__name__}. Pass "
            f"regression_uncertainty(mean, variance)."
        )


def check_no_nan(what: str, values: np.ndarray) -> None:
    nan = np.isnan(values).sum()
    if nan:
        raise ValueError(
            f"{what} expects uncertainty without NaN, which has no place in an order; got NaN for {nan} of "
            f"{values.size} inputs. To use the largest probability, leave it out: uncertainty=None."
        )


def check_points(what: str, points: Sequence[int], labels: Sequence[int]) -> None:
    if len(points) != 2 or points[1] != 2 or tuple(labels) != (points[0],):
        raise ValueError(
            f"{what} expects data of points [N, 2] and labels [N]; got {tuple(points)} and {tuple(labels)}. Choose two "
            f"features: (x[:, :2], labels)."
        )


def check_num_bins(what: str, num_bins: Any) -> None:
    if isinstance(num_bins, bool) or not isinstance(num_bins, int):
        raise TypeError(
            f"{what} expects num_bins to be an integer of at least 1; got {num_bins!r} ({type(num_bins).__name__}). "
            f"Pass num_bins=15."
        )
    if num_bins < 1:
        raise ValueError(f"{what} expects num_bins to be an integer of at least 1; got {num_bins}. Pass num_bins=15.")


def check_level(what: str, level: Any) -> None:
    sentence = f"{what} expects level to be a number above 0 and below 1; got {level!r}. Pass level=0.95."
    if isinstance(level, bool) or not isinstance(level, (int, float)):
        raise TypeError(sentence)
    if not 0 < level < 1:
        raise ValueError(sentence)


def check_uncertainty(what: str, expected: Sequence[int], uncertainty: Sequence[int]) -> None:
    if tuple(uncertainty) != tuple(expected):
        raise ValueError(
            f"{what} expects uncertainty of shape {tuple(expected)}, one number for each prediction; got "
            f"{tuple(uncertainty)}. To use the largest probability, leave it out: uncertainty=None."
        )


def check_scores(what: str, in_scores: Sequence[int], out_scores: Sequence[int]) -> None:
    if len(in_scores) != 1 or len(out_scores) != 1:
        raise ValueError(
            f"{what} expects in_scores and out_scores of one axis, one number for each input; got {tuple(in_scores)} "
            f"and {tuple(out_scores)}. Pass one score for each: mutual_information(logits)."
        )
    if 0 in (*in_scores, *out_scores):
        raise ValueError(
            f"{what} expects at least one input of each kind; got {in_scores[0]} in-distribution and {out_scores[0]} "
            f"out-of-distribution. Give both: ood_auroc(in_scores, out_scores), or metric.update(scores, is_ood)."
        )


def check_is_ood(what: str, scores: Sequence[int], is_ood: Sequence[int], dtype: Any) -> None:
    if len(scores) != 1 or tuple(scores) != tuple(is_ood):
        raise ValueError(
            f"{what} expects scores and is_ood of one shape [B], one number for each input; got {tuple(scores)} and "
            f"{tuple(is_ood)}. For a batch of one kind, pass full_like(scores, True, dtype=bool)."
        )
    if dtype_name(dtype) != "bool":
        raise TypeError(f"{what} expects is_ood to be booleans; got {dtype_name(dtype)}. Pass is_ood == 1.")


def check_same_members(what: str, before: Sequence[int], now: Sequence[int]) -> None:
    """Raises unless sums over inputs are of one ensemble. Nothing is broadcast."""
    if tuple(before) != tuple(now):
        raise ValueError(
            f"{what} expects the members and classes of its first update, sums of shape {tuple(before)}; got "
            f"{tuple(now)}. For other members, make another metric: {what}()."
        )


def check_any_inputs(what: str, num_inputs: int) -> None:
    if not num_inputs:
        raise RuntimeError(f"{what} expects at least one input; got none. Call metric.update first.")


def check_ignored(what: str, ignored: Iterable[str]) -> None:
    """Refuses a mask. What else update ignores is for other metrics, but a mask is for all of them."""
    if "mask" in ignored:
        raise ValueError(
            f"{what} expects a batch without inputs to leave out; got a mask. Leave them out: logits[:, mask], "
            f"labels[mask]."
        )


def check_outside_jit(what: str, array: Any, traced: type) -> None:
    if isinstance(array, traced):
        raise ValueError(
            f"{what} expects arrays with values, since it keeps every score; got traced ones. Return the outputs from "
            f"jit, and call metric.update with them."
        )
