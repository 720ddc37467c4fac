"""Plots of how an ensemble does, what it knows and how it was trained. They need matplotlib.

Each function draws on the axes that it is given, or on those of a new figure, and returns them: pyplot has no part in
it. Called again with the same axes it adds a series, in another colour, line and marker. A legend is below the axes
where the figure has a layout engine, as one made with layout="constrained" has.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from torch import Tensor

from probly_common import drawing
from probly_common.checks.judging import check_inputs, check_logits, check_moments
from probly_torch.metrics import ece, reliability_bins
from probly_torch.metrics._selection import _risks, _uncertainty_and_wrong
from probly_torch.uncertainty import Uncertainty

__all__ = [
    "confidence_histogram",
    "member_spread",
    "predictive_band",
    "reliability_diagram",
    "risk_coverage_curve",
    "training_curves",
    "uncertainty_map",
]


def reliability_diagram(
    logits: Tensor | np.ndarray,
    labels: Tensor | np.ndarray,
    *,
    num_bins: int = 15,
    label: str | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draws accuracy against confidence, in bins of confidence.

    On the diagonal, predictions are right as often as they say. A point is a bin of the mean prediction
    (metrics.reliability_bins); an empty bin has none. The line through a point is the 95 % interval of its accuracy
    (Wilson 1927). The legend has the calibration error, metrics.ece.

    Shape:
        logits (E, B, C), labels (B,) of class indices.
    Args:
        logits: of the members.
        labels: class indices.
        num_bins: n bins (k/n, (k+1)/n].
        label: what the legend calls them.
        ax: axes to draw on; None makes a figure.
    Returns:
        The axes.
    Raises:
        ValueError: if the shapes do not fit, num_bins is below 1, there are no inputs, or logits are NaN.
        TypeError: if labels are not integers, or ax is no Axes.
    Example:
        >>> logits, labels = torch.tensor([[[0.0, 1.0], [2.0, 0.0]]]), torch.tensor([1, 1])
        >>> ax = reliability_diagram(logits, labels, label="single network")
        >>> ax.get_legend_handles_labels()[1]
        ['perfectly calibrated', 'single network, ECE 0.5749']
    """
    logits, labels = _inputs("reliability_diagram", logits, labels)
    bins = [_array(values) for values in reliability_bins(logits, labels, num_bins=num_bins)]
    error = float(ece(logits, labels, num_bins=num_bins))
    return drawing.reliability_diagram(bins, error, logits.shape[-1], label, ax)


def confidence_histogram(
    logits: Tensor | np.ndarray, labels: Tensor | np.ndarray, *, num_bins: int = 15, ax: Axes | None = None
) -> Axes:
    """Draws how many inputs are predicted with which confidence, right and wrong (Guo et al. 2017, fig. 1).

    An ensemble whose mean confidence is above its accuracy is overconfident.

    Shape:
        logits (E, B, C), labels (B,) of class indices.
    Args:
        logits: of the members.
        labels: class indices.
        num_bins: n bins (k/n, (k+1)/n].
        ax: axes to draw on; None makes a figure.
    Returns:
        The axes.
    Raises:
        ValueError: if the shapes do not fit, num_bins is below 1, there are no inputs, or logits are NaN.
        TypeError: if labels are not integers, or ax is no Axes.
    Example:
        >>> ax = confidence_histogram(torch.tensor([[[0.0, 1.0], [2.0, 0.0]]]), torch.tensor([1, 1]))
        >>> ax.get_legend_handles_labels()[1]
        ['mean confidence 0.8059', 'accuracy 0.5000', 'right', 'wrong']
    """
    logits, labels = _inputs("confidence_histogram", logits, labels)
    bins = [_array(values) for values in reliability_bins(logits, labels, num_bins=num_bins)]
    return drawing.confidence_histogram(bins, logits.shape[-1], ax)


def risk_coverage_curve(
    logits: Tensor | np.ndarray,
    labels: Tensor | np.ndarray,
    *,
    uncertainty: Tensor | np.ndarray | None = None,
    label: str | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draws the error rate among the inputs that are kept, when the most uncertain ones are left to others.

    This is selective prediction (Geifman and El-Yaniv 2017). The legend has the area under the curve, metrics.aurc.

    Shape:
        logits (E, B, C), labels (B,) of class indices, uncertainty (B,).
    Args:
        logits: of the members.
        labels: class indices.
        uncertainty: larger for less certain inputs, as mutual_information(logits); unless given, 1 - the largest mean
            probability.
        label: what the legend calls them.
        ax: axes to draw on; None makes a figure.
    Returns:
        The axes.
    Raises:
        ValueError: if the shapes do not fit, there are no inputs, or logits or uncertainty are NaN.
        TypeError: if labels are not integers, or ax is no Axes.
    Example:
        >>> logits, labels = torch.tensor([[[9.0, 0.0], [0.0, 5.0], [1.0, 0.0]]]), torch.tensor([0, 1, 1])
        >>> ax = risk_coverage_curve(logits, labels, label="single network")
        >>> ax.get_legend_handles_labels()[1]
        ['single network, AURC 0.1111']
    """
    what = "risk_coverage_curve"
    logits, labels = _inputs(what, logits, labels)
    scores = None if uncertainty is None else torch.as_tensor(uncertainty, device=logits.device).detach()
    risks = _array(_risks(*_uncertainty_and_wrong(what, logits, labels, scores)))
    return drawing.risk_coverage_curve(risks, label, ax)


def uncertainty_map(
    grid: Tensor | np.ndarray,
    values: Tensor | np.ndarray,
    *,
    data: tuple[Tensor | np.ndarray, Tensor | np.ndarray] | None = None,
    label: str = "uncertainty (nats)",
    vmax: float | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draws uncertainty over the plane.

    Larger values are lighter. The plane is hatched where they are NaN.

    Shape:
        grid (H, W, 2), values (H, W) or (H*W,).
    Args:
        grid: the points, as np.meshgrid makes them: np.stack(np.meshgrid(x1, x2), -1).
        values: the uncertainty at each, from 0.
        data: points (N, 2) and their class indices (N,), such as those of training; each class has its marker.
        label: what the values are, and their unit.
        vmax: where the colours end, to compare maps; None takes the largest value.
        ax: axes to draw on; None makes a figure.
    Returns:
        The axes. Their figure has new axes too, for the colour bar.
    Raises:
        ValueError: if the shapes do not fit.
        TypeError: if ax is no Axes.
    Example:
        >>> grid = np.stack(np.meshgrid(np.linspace(-1, 1, 3), np.linspace(-1, 1, 2)), -1)
        >>> ax = uncertainty_map(grid, torch.arange(6.0), label="mutual information (nats)")
        >>> ax.figure.axes[1].get_ylabel()
        'mutual information (nats)'
    """
    pair = None if data is None else (_array(data[0]), _array(data[1]))
    return drawing.uncertainty_map(_array(grid), _array(values), pair, label, vmax, ax)


def predictive_band(
    x: Tensor | np.ndarray,
    uncertainty: Uncertainty,
    *,
    data: tuple[Tensor | np.ndarray, Tensor | np.ndarray] | None = None,
    level: float = 0.95,
    ax: Axes | None = None,
) -> Axes:
    """Draws the mean of a regression over its input, with two intervals around it.

    The inner band, that of noise alone, is mean ± q sqrt(aleatoric). The outer one, that with ignorance too, is mean ±
    q sqrt(total). Here q is the quantile of a Gaussian. What epistemic uncertainty adds is hatched.

    Shape:
        x (B,) or (B, 1), in any order; mean, total, aleatoric and epistemic each (B,) or (B, 1).
    Args:
        x: the inputs.
        uncertainty: regression_uncertainty(mean, variance) there.
        data: inputs and targets, such as those of training.
        level: how much of the probability a band holds.
        ax: axes to draw on; None makes a figure.
    Returns:
        The axes.
    Raises:
        ValueError: if the shapes do not fit, a variance is negative, or level is not between 0 and 1.
        TypeError: if uncertainty has other fields, level is no number, or ax is no Axes.
    Example:
        >>> variance = torch.ones(3)
        >>> ax = predictive_band(torch.arange(3.0), Uncertainty(torch.zeros(3), 2 * variance, variance, variance))
        >>> ax.get_legend_handles_labels()[1]
        ['mean', 'aleatoric (95%)', 'added by epistemic (95%)']
    """
    check_moments("predictive_band", uncertainty, Uncertainty._fields)
    moments = [_array(getattr(uncertainty, field)) for field in Uncertainty._fields]
    pair = None if data is None else (_array(data[0]), _array(data[1]))
    return drawing.predictive_band(_array(x), moments, pair, level, ax)


def member_spread(values: Tensor | np.ndarray, *, x: Tensor | np.ndarray | None = None, ax: Axes | None = None) -> Axes:
    """Draws each member's own prediction, their mean, and the range from the lowest to the highest.

    Shape:
        values (E, B), x (B,) or (B, 1), in any order.
    Args:
        values: one number for each member and input: a mean, or the probability of a class.
        x: the inputs, of one feature; None puts inputs in the order of the members' mean.
        ax: axes to draw on; None makes a figure.
    Returns:
        The axes.
    Raises:
        ValueError: if the shapes do not fit.
        TypeError: if ax is no Axes.
    Example:
        >>> ax = member_spread(torch.tensor([[0.0, 1.0], [0.5, 0.5]]))
        >>> ax.get_legend_handles_labels()[1]
        ['lowest to highest', 'each of 2 members', 'mean of the members']
    """
    return drawing.member_spread(_array(values), None if x is None else _array(x), ax)


def training_curves(
    history: Sequence[Mapping[str, Any]], *, names: Sequence[str] | None = None, ax: Axes | None = None
) -> Axes:
    """Draws what was logged, over epochs.

    Args:
        history: a dict for each epoch, such as probly_flax.training.fit returns; or rows with an "epoch", such as those
            of the metrics.csv that Lightning's CSVLogger writes, [{k: float(v) for k, v in row.items() if v} for row in
            csv.DictReader(file)], where the last value in an epoch counts.
        names: what to draw; None draws what ends in loss or nll, which is in nats.
        ax: axes to draw on; None makes a figure.
    Returns:
        The axes.
    Raises:
        ValueError: if history lacks a name.
        TypeError: if history is no list of dicts, or ax is no Axes.
    Example:
        >>> ax = training_curves([{"train_loss": 0.7, "val_nll": 0.8}, {"train_loss": 0.5, "val_nll": 0.6}])
        >>> ax.get_legend_handles_labels()[1]
        ['train_loss', 'val_nll']
    """
    return drawing.training_curves(history, names, lambda value: float(_array(value)), ax)


def _inputs(what: str, logits: Any, labels: Any) -> tuple[Tensor, Tensor]:
    logits = torch.as_tensor(logits).detach()
    check_logits(what, logits.shape)
    check_inputs(what, logits.shape[1], int(logits.softmax(-1).isnan().any(-1).any(0).sum()))
    return logits, torch.as_tensor(labels, device=logits.device)


def _array(values: Any) -> np.ndarray:
    return np.asarray(values.detach().cpu().double() if isinstance(values, Tensor) else values, np.float64)
