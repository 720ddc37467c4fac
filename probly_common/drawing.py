"""Draws the plots, by matplotlib and NumPy alone.

Series differ in colour (Okabe and Ito 2008), line and marker, and areas in lightness or hatching, so that none needs to
be told by its colour. Nothing here goes through pyplot, which would keep figures, or changes rcParams.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import NormalDist
from typing import Any

import numpy as np
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from probly_common.checks.judging import (
    check_ax,
    check_curve,
    check_grid,
    check_history,
    check_level,
    check_names,
    check_no_nan,
    check_points,
    check_values_of_members,
    check_variances,
)

BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"

SERIES = (
    cycler(color=[BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY])
    + cycler(linestyle=["-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 1))])
    + cycler(marker=["o", "s", "^", "D", "v", "X"])
)

MARKERS = "o^sDvP*X"

Pair = tuple[np.ndarray, np.ndarray]

Look = dict[str, Any]

HOLLOW: Look = {"fillstyle": "none", "markeredgewidth": 1.5}  # what lies beneath a marker shows


def reliability_diagram(
    bins: Sequence[np.ndarray], ece: float, num_classes: int, label: str | None, ax: Axes | None
) -> Axes:
    """Draws the confidence, accuracy and count of bins."""
    ax = _axes("reliability_diagram", ax)
    if not ax.lines:
        reference: Look = {"color": "0.6", "linestyle": "-", "marker": "", "linewidth": 1, "zorder": 1}
        ax.plot([_lowest(num_classes), 1], [_lowest(num_classes), 1], **reference, label="perfectly calibrated")
    confidence, accuracy, count = (values[bins[2] > 0] for values in bins)
    (line,) = ax.plot(confidence, accuracy, **HOLLOW, label=_named(label, "ECE", ece))
    ax.vlines(confidence, *_wilson(accuracy, count), colors=line.get_color(), linewidth=1, alpha=0.7)
    ax.set(xlabel="confidence", ylabel="accuracy")
    return _legend(ax)


def confidence_histogram(bins: Sequence[np.ndarray], num_classes: int, ax: Axes | None) -> Axes:
    """Draws the confidence, accuracy and count of bins."""
    ax = _axes("confidence_histogram", ax)
    confidence, accuracy, count = (np.where(bins[2] > 0, values, 0) for values in bins)
    share, edges = count / count.sum(), np.linspace(0, 1, len(count) + 1)
    right, wrong = share * accuracy, share * (1 - accuracy)
    bars: Look = {"width": 1 / len(count), "align": "edge", "edgecolor": "white"}
    ax.bar(edges[:-1], right, **bars, color=SKY, label="right")
    ax.bar(edges[:-1], wrong, bottom=right, **bars, color=VERMILION, hatch="///", label="wrong")
    for name, value, style in (("mean confidence", (share * confidence).sum(), "--"), ("accuracy", right.sum(), "-")):
        ax.axvline(value, color="black", linestyle=style, label=f"{name} {value:.4f}")
    ax.set(xlabel="confidence", ylabel="share of the inputs", xlim=(edges[edges <= _lowest(num_classes)].max(), 1))
    ax.yaxis.set_major_formatter(PercentFormatter(1))
    return _legend(ax)


def risk_coverage_curve(risks: np.ndarray, label: str | None, ax: Axes | None) -> Axes:
    """Draws the risks of the k most certain inputs, for k = 1..N."""
    check_no_nan("risk_coverage_curve", risks)
    ax = _axes("risk_coverage_curve", ax)
    coverage = np.arange(1, len(risks) + 1) / len(risks)
    some = max(1, len(risks) // 10)
    ax.plot(coverage, risks, **HOLLOW, markevery=some, label=_named(label, "AURC", risks.mean()))
    ax.set(xlabel="coverage (share of inputs kept, the most certain)", ylabel="risk (error rate of those kept)")
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_formatter(PercentFormatter(1))
    return _legend(ax)


def uncertainty_map(
    grid: np.ndarray, values: np.ndarray, data: Pair | None, label: str, vmax: float | None, ax: Axes | None
) -> Axes:
    what = "uncertainty_map"
    check_grid(what, grid.shape, values.shape)
    ax = _axes(what, ax)
    shown = np.ma.masked_invalid(values.reshape(grid.shape[:2]))
    if shown.mask.any():
        ax.patch.set(facecolor="white", edgecolor="0.7", hatch="xxx")
    highest = shown.max() if vmax is None and shown.count() else vmax
    mesh = ax.pcolormesh(*np.moveaxis(grid, -1, 0), shown, cmap="cividis", vmin=0, vmax=highest or 1, rasterized=True)
    ax.figure.colorbar(mesh, ax=ax, label=label)
    if data is not None:
        points, labels = data
        check_points(what, points.shape, labels.shape)
        classes = np.unique(labels)
        for i, each in enumerate(classes):
            face, edge = ("white", "black") if i % 2 == 0 else ("black", "white")
            marker: Look = {"marker": MARKERS[i % len(MARKERS)], "facecolors": face, "edgecolors": edge}
            name = f"class {each:g}" if len(classes) <= len(MARKERS) else None
            x1, x2 = points[labels == each].T
            ax.scatter(x1, x2, 16, linewidths=0.5, label=name, **marker)
    ax.set(xlabel="$x_1$", ylabel="$x_2$")
    return _legend(ax)


def predictive_band(
    x: np.ndarray, moments: Sequence[np.ndarray], data: Pair | None, level: float, ax: Axes | None
) -> Axes:
    """Draws mean, total, aleatoric and epistemic."""
    what = "predictive_band"
    for name, values in zip(("mean", "total", "aleatoric", "epistemic"), moments, strict=True):
        check_curve(what, name, x.shape, values.shape)
    check_variances(what, moments[1:])
    check_level(what, level)
    ax = _axes(what, ax)
    order = np.argsort(x.ravel())
    x, mean, total, aleatoric = (values.ravel()[order] for values in (x, *moments[:3]))
    quantile = NormalDist().inv_cdf((1 + level) / 2)
    inner, outer = quantile * np.sqrt(aleatoric), quantile * np.sqrt(total)
    ax.plot(x, mean, color="black", linestyle="-", marker="", label="mean")
    noise: Look = {"color": SKY, "alpha": 0.55, "linewidth": 0}
    ax.fill_between(x, mean - inner, mean + inner, **noise, label=f"aleatoric ({level:.0%})")
    ignorance: Look = {"facecolor": ORANGE, "edgecolor": "black", "hatch": "////", "alpha": 0.45, "linewidth": 0}
    ax.fill_between(x, mean - outer, mean - inner, **ignorance, label=f"added by epistemic ({level:.0%})")
    ax.fill_between(x, mean + inner, mean + outer, **ignorance)
    if data is not None:
        check_curve(what, "data", *(values.shape for values in data))
        dots: Look = {"color": "black", "markersize": 4, "markeredgewidth": 0, "alpha": 0.6, "zorder": 1.5}
        ax.plot(*map(np.ravel, data), linestyle="", marker=".", **dots, label="data")
    ax.set(xlabel="$x$", ylabel="$y$")
    return _legend(ax)


def member_spread(values: np.ndarray, x: np.ndarray | None, ax: Axes | None) -> Axes:
    what = "member_spread"
    check_values_of_members(what, values.shape)
    mean = values.mean(0)
    if x is not None:
        check_curve(what, "values[0]", x.shape, mean.shape)
    ax = _axes(what, ax)
    order = np.argsort(mean if x is None else x.ravel())
    at = np.arange(1, len(mean) + 1) if x is None else x.ravel()[order]
    mean, values = mean[order], values[:, order]
    low, high, name = values.min(0), values.max(0), "lowest to highest"
    look: Look
    if x is None:  # neighbours are no neighbours in what the network sees: no lines between them
        ax.vlines(at, low, high, colors=SKY, alpha=0.6, linewidth=1, label=name)
        look = {"linestyle": "", "marker": ".", "markeredgewidth": 0}
    else:
        ax.fill_between(at, low, high, color=SKY, alpha=0.4, linewidth=0, label=name)
        look = {"linestyle": "-", "marker": "", "linewidth": 0.8}
    lines = ax.plot(at, values.T, **look, color=BLUE, alpha=0.7)
    lines[0].set_label(f"each of {len(values)} members" if len(values) > 1 else "one member")
    ax.plot(at, mean, color="black", linestyle="-", marker="", linewidth=2, label="mean of the members")
    ax.set(xlabel="inputs, in the order of the mean" if x is None else "$x$", ylabel="value of each member")
    return _legend(ax)


def training_curves(history: Any, names: Sequence[str] | None, number: Callable[[Any], float], ax: Axes | None) -> Axes:
    """Draws a name's last number in an epoch, or NaN where it is the only one."""
    what = "training_curves"
    check_history(what, history)
    logged = sorted({name for row in history for name in row} - {"epoch", "step"})
    losses = [name for name in logged if name.endswith(("loss", "nll"))]
    chosen = losses if names is None else list(names)
    check_names(what, [name for name in chosen if name not in logged], chosen, logged)
    ax = _axes(what, ax)
    for name in chosen:
        curve: dict[float, float] = {}
        for i, row in enumerate(history):
            if name in row:
                epoch, value = row.get("epoch", i), number(row[name])
                curve[epoch] = curve.get(epoch, value) if np.isnan(value) else value
        ax.plot(list(curve), list(curve.values()), **HOLLOW, markevery=max(1, len(curve) // 10), label=name)
    ax.set(xlabel="epoch", ylabel="loss (nats)" if set(chosen) <= set(losses) else "value")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    return _legend(ax)


def _axes(what: str, ax: Axes | None) -> Axes:
    """Returns the given axes, or those of a new figure. What is drawn on empty ones starts with the first style."""
    check_ax(what, ax, Axes)
    ax = ax or Figure(layout="constrained").subplots()
    if not ax.has_data():
        ax.set_prop_cycle(SERIES)
    return ax


def _lowest(num_classes: int) -> float:
    """Returns the confidence in the likeliest class, when all are equally likely."""
    return 1 / num_classes if num_classes > 1 else 0.0


def _named(label: str | None, metric: str, value: float) -> str:
    return f"{label}, {metric} {value:.4f}" if label else f"{metric} {value:.4f}"


def _legend(ax: Axes) -> Axes:
    """Puts the legend below the axes, where no data is.

    Without a layout engine, which would make room, it is where there is least data.
    """
    if not ax.get_legend_handles_labels()[0]:
        return ax
    if ax.figure.get_layout_engine() is None:
        ax.legend(loc="best", frameon=False)
        return ax
    below: Look = {"loc": "upper center", "bbox_to_anchor": (0.5, 0), "borderaxespad": 3.8, "frameon": False}
    if ax.legend(**below, ncols=2).get_window_extent().width > ax.bbox.width:
        ax.legend(**below)
    return ax


def _wilson(share: np.ndarray, count: np.ndarray) -> Pair:
    """Returns the 95 % interval of a share among count (Wilson 1927).

    It has a width for shares of 0 and 1 too.
    """
    z2 = NormalDist().inv_cdf(0.975) ** 2 / count
    middle = (share + z2 / 2) / (1 + z2)
    half = np.sqrt(z2 * share * (1 - share) + z2**2 / 4) / (1 + z2)
    return middle - half, middle + half
