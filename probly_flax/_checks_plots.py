"""Checks of what plots are given, and the sentences they raise.

The same file, byte for byte, in probly_torch and probly_flax. It imports no framework.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def check_ax(what: str, is_axes: bool, ax: Any) -> None:
    if not is_axes:
        raise TypeError(
            f"{what} expects ax to be the Axes of one plot, or None; got {type(ax).__name__}. Pass one: "
            f"{what}(..., ax=figure.subplots())."
        )


def check_inputs(what: str, inputs: int, nan: int) -> None:
    """NaN has no place among probabilities: it would be left out without a word."""
    if not inputs:
        raise ValueError(f"{what} expects at least one input; got none. Pass the logits of a test set.")
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
            f"one number for each point, such as mutual_information(model(grid.reshape(-1, 2)))."
        )


def check_curve(what: str, name: str, x: Sequence[int], values: Sequence[int]) -> None:
    """One number for each input, where each of both may have a last axis of one feature."""
    sizes = [shape[0] for shape in (x, values) if len(shape) == 1 or (len(shape) == 2 and shape[1] == 1)]
    if len(sizes) < 2 or sizes[0] != sizes[1] or not sizes[0]:
        raise ValueError(
            f"{what} expects x and {name} of shape [B] or [B, 1]; got {tuple(x)} and {tuple(values)}. Choose one "
            f"feature and one target: x[:, 0], {name}[:, 0]."
        )


def check_variances(what: str, holds: bool) -> None:
    if not holds:
        raise ValueError(
            f"{what} expects uncertainties of at least 0, which are variances; got others among them. Pass "
            f"regression_uncertainty(mean, variance)."
        )


def check_values_of_members(what: str, values: Sequence[int]) -> None:
    if len(values) != 2 or 0 in values:
        raise ValueError(
            f"{what} expects values of shape [E, B], one number for each member and input; got {tuple(values)}. "
            f"Choose a target, mean[..., 0], or the probability of a class, logits.softmax(-1)[..., 1]."
        )


def check_history(what: str, history: Any, is_history: bool) -> None:
    if not is_history:
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


def check_no_nan(what: str, nan: bool) -> None:
    if nan:
        raise ValueError(
            f"{what} expects uncertainty without NaN, which has no place in an order; got some. To use the largest "
            f"probability, leave it out: uncertainty=None."
        )


def check_points(what: str, points: Sequence[int], labels: Sequence[int]) -> None:
    if len(points) != 2 or points[1] != 2 or tuple(labels) != (points[0],):
        raise ValueError(
            f"{what} expects data of points [N, 2] and labels [N]; got {tuple(points)} and {tuple(labels)}. Choose two "
            f"features: (x[:, :2], labels)."
        )
