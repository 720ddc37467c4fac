"""Plots show the numbers that they say they show, the same in both packages, and can be read."""

import warnings
from itertools import pairwise

import jax.numpy as jnp
import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from scipy.stats import binomtest, norm

import probly_flax.plots
import probly_torch.plots
from parity_tests.kit.trees import jax_of
from parity_tests.standard import assert_close
from probly_common import drawing as drawing

PACKAGES = (probly_torch, probly_flax)
RANDOM = np.random.default_rng(0)
LABELS = RANDOM.integers(0, 4, 60)
LOGITS = RANDOM.standard_normal((3, 60, 4)) + 2 * np.eye(4)[LABELS]
X = RANDOM.permutation(np.linspace(-2, 2, 60))
MOMENTS = [np.sin(X), 0.3 + X**2 / 10, 0.1 + 0 * X, 0.2 + X**2 / 10]
DATA = RANDOM.standard_normal((30, 2)) / 2
GRID = np.stack(np.meshgrid(np.linspace(-2, 2, 9), np.linspace(-1, 1, 7)), -1)
VALUES = np.exp(-(GRID**2).sum(-1))
HISTORY = [{"train_loss": 1.0, "val_nll": 1.2, "val_accuracy": 0.5}, {"train_loss": 0.7, "val_nll": 0.9}]


def uncertainty(package, moments):
    return package.uncertainty.Uncertainty(*moments)


PLOTS = {
    "reliability_diagram": lambda p, **on: p.plots.reliability_diagram(LOGITS, LABELS, num_bins=10, **on),
    "confidence_histogram": lambda p, **on: p.plots.confidence_histogram(LOGITS, LABELS, num_bins=10, **on),
    "risk_coverage_curve": lambda p, **on: p.plots.risk_coverage_curve(LOGITS, LABELS, **on),
    "uncertainty_map": lambda p, **on: p.plots.uncertainty_map(GRID, VALUES, data=(DATA, LABELS[:30]), **on),
    "predictive_band": lambda p, **on: p.plots.predictive_band(X, uncertainty(p, MOMENTS), data=(X, MOMENTS[0]), **on),
    "member_spread": lambda p, **on: p.plots.member_spread(LOGITS[..., 0], x=X, **on),
    "member_spread, in order": lambda p, **on: p.plots.member_spread(LOGITS[..., 0], **on),
    "training_curves": lambda p, **on: p.plots.training_curves(HISTORY, **on),
}


@pytest.fixture(autouse=True)
def _no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def drawn(ax):
    """Returns all the numbers on axes, and all the words."""
    lines = [np.stack(line.get_data()).astype(float) for line in ax.lines]
    areas = [path.vertices for each in ax.collections for path in each.get_paths()]
    values = [np.ma.filled(each.get_array(), np.nan) for each in ax.collections if each.get_array() is not None]
    bars = [bar.get_bbox().get_points() for bar in ax.patches]
    words = [ax.get_xlabel(), ax.get_ylabel(), *ax.get_legend_handles_labels()[1]]
    return [*lines, *areas, *values, *bars], words


@pytest.mark.parametrize("name", PLOTS)
def test_twins_draw_the_same(name):
    (ours, our_words), (theirs, their_words) = (drawn(PLOTS[name](package)) for package in PACKAGES)
    assert our_words == their_words
    assert len(ours) == len(theirs) > 0
    for a, b in zip(ours, theirs, strict=True):
        assert_close(a, b, "float64")


@pytest.mark.parametrize("name", PLOTS)
def test_axes_go_in_and_come_out(name):
    before = dict(matplotlib.rcParams)
    axes = Figure(layout="constrained").subplots(1, 2)
    assert PLOTS[name](probly_torch, ax=axes[1]) is axes[1]
    assert not axes[0].has_data()
    assert PLOTS[name](probly_torch).figure is not PLOTS[name](probly_torch).figure
    assert dict(matplotlib.rcParams) == before


def test_pyplot_keeps_none_of_it():
    before = plt.get_fignums()
    PLOTS["training_curves"](probly_torch)
    assert plt.get_fignums() == before


@pytest.mark.parametrize("name", PLOTS)
def test_the_legend_covers_nothing(name):
    ax = PLOTS[name](probly_torch)
    ax.set_title("a title")
    ax.figure.draw_without_rendering()
    legend = ax.get_legend().get_window_extent()
    for other in (ax.bbox, ax.xaxis.label.get_window_extent(), ax.title.get_window_extent()):
        assert not legend.overlaps(other)
    page = ax.figure.bbox
    assert page.x0 <= legend.x0 < legend.x1 <= page.x1
    assert page.y0 <= legend.y0


def test_legends_of_narrow_panels_do_not_touch():
    figure = Figure(figsize=(12, 4), layout="constrained")
    panels = figure.subplots(1, 4, sharey=True)
    for panel in panels:
        for label in ("a deep ensemble", "BatchEnsemble"):
            probly_torch.plots.reliability_diagram(LOGITS, LABELS, num_bins=10, label=label, ax=panel)
    figure.draw_without_rendering()
    legends = [panel.get_legend().get_window_extent() for panel in panels]
    assert all(a.x1 < b.x0 for a, b in pairwise(legends))
    assert legends[0].x0 >= 0
    assert panels[0].bbox.width > 0.6 * figure.bbox.width / 4


def test_a_figure_without_a_layout_has_its_legend_inside():
    ax = PLOTS["training_curves"](probly_torch, ax=Figure().subplots())
    ax.figure.draw_without_rendering()
    assert ax.bbox.fully_containsx(ax.get_legend().get_window_extent().x0)
    assert ax.bbox.fully_containsy(ax.get_legend().get_window_extent().y0)


def test_series_are_told_apart_without_colour():
    ax = None
    for name in "abcdef":
        ax = probly_torch.plots.risk_coverage_curve(LOGITS, LABELS, label=name, ax=ax)
    lines = ax.lines
    assert len({line.get_marker() for line in lines}) == len({str(line._dash_pattern) for line in lines}) == 6
    assert len({line.get_color() for line in lines}) == 6


def test_areas_are_told_apart_in_greyscale():
    ax = PLOTS["predictive_band"](probly_torch)
    assert [bool(area.get_hatch()) for area in ax.collections] == [False, True, True]
    ax = PLOTS["confidence_histogram"](probly_torch)
    assert {bool(bar.get_hatch()) for bar in ax.patches} == {False, True}
    lightness = [np.dot(to_rgb(colour), (0.2126, 0.7152, 0.0722)) for colour in (drawing.SKY, drawing.VERMILION)]
    assert lightness[0] > lightness[1] + 0.1
    mesh = PLOTS["uncertainty_map"](probly_torch).collections[0]
    shades = mesh.cmap(np.linspace(0, 1, 50))[:, :3] @ (0.2126, 0.7152, 0.0722)
    assert (np.diff(shades) > 0).all()


# What they show


def kinds(values):
    """Returns the same numbers as each package may be given them."""
    return (
        (probly_torch, torch.tensor(values, requires_grad=True)),
        (probly_torch, torch.tensor(values, dtype=torch.bfloat16)),
        (probly_torch, values),
        (probly_flax, jax_of(values)),
        (probly_flax, jax_of(values, "bfloat16")),
    )


def test_arrays_of_any_kind():
    values = np.round(LOGITS[..., 0] * 8) / 8
    expected, _ = drawn(probly_torch.plots.member_spread(values))
    for package, given in kinds(values):
        for a, b in zip(drawn(package.plots.member_spread(given))[0], expected, strict=True):
            assert_close(a, b, "float64")
    for package, given in kinds(LOGITS):
        assert package.plots.reliability_diagram(given, LABELS, num_bins=10).lines


def test_a_reliability_diagram_has_the_bins_that_are_not_empty():
    probs = np.exp(LOGITS) / np.exp(LOGITS).sum(-1, keepdims=True)
    confidence, right = probs.mean(0).max(-1), probs.mean(0).argmax(-1) == LABELS
    points, intervals = [], []
    for k in range(10):
        rows = (confidence > k / 10) & (confidence <= (k + 1) / 10)
        if rows.any():
            points.append((confidence[rows].mean(), right[rows].mean()))
            interval = binomtest(int(right[rows].sum()), int(rows.sum())).proportion_ci(method="wilson")
            intervals.append((interval.low, interval.high))
    assert 3 < len(points) < 10
    ax = PLOTS["reliability_diagram"](probly_torch)
    assert_close(ax.lines[1].get_xydata(), np.array(points), "float64")
    bars = np.array([segment[:, 1] for segment in ax.collections[0].get_segments()])
    assert_close(bars, np.array(intervals), "float32")  # scipy solves for them
    assert_close(ax.lines[0].get_xydata(), np.array([[0.25, 0.25], [1, 1]]), "float64")


def test_a_histogram_adds_up_to_all_inputs_and_to_the_accuracy():
    ax = PLOTS["confidence_histogram"](probly_torch)
    right, wrong = (sum(bar.get_height() for bar in bars) for bars in ax.containers)
    accuracy = float(probly_torch.metrics.accuracy(torch.tensor(LOGITS), torch.tensor(LABELS)))
    assert_close(np.array([right, wrong]), np.array([accuracy, 1 - accuracy]), "float64")
    assert_close(ax.lines[1].get_xdata(), np.array([accuracy] * 2), "float64")


def test_a_risk_coverage_curve_leaves_the_least_certain_out_first():
    scores = np.concatenate([np.zeros(10), RANDOM.permutation(50) + 1.0])  # ten inputs are equally certain
    wrong = (np.exp(LOGITS) / np.exp(LOGITS).sum(-1, keepdims=True)).mean(0).argmax(-1) != LABELS
    ordered = np.where(np.arange(60) < 10, wrong[:10].mean(), wrong[np.argsort(scores)])
    coverage = np.arange(1, 61) / 60
    ax = probly_torch.plots.risk_coverage_curve(LOGITS, LABELS, uncertainty=scores, label="by score")
    assert_close(ax.lines[0].get_xydata(), np.stack([coverage, np.cumsum(ordered) / (60 * coverage)], 1), "float64")
    area = probly_torch.metrics.aurc(torch.tensor(LOGITS), torch.tensor(LABELS), uncertainty=torch.tensor(scores))
    assert ax.get_legend_handles_labels()[1] == [f"by score, AURC {area:.4f}"]


def test_an_uncertainty_map_has_each_value_at_its_point():
    values = np.where(GRID[..., 0] < -1, np.nan, VALUES)
    for given in (values, values.ravel()):
        ax = probly_torch.plots.uncertainty_map(GRID, torch.tensor(given), vmax=2.0)
        mesh = ax.collections[0]
        np.testing.assert_array_equal(np.ma.filled(mesh.get_array(), np.nan).ravel(), values.ravel())
        corners = mesh.get_coordinates()
        middle = (corners[:-1, :-1] + corners[1:, 1:]) / 2
        assert_close(middle, GRID, "float64")
        assert mesh.get_clim() == (0, 2)
        assert ax.patch.get_hatch()
    assert not PLOTS["uncertainty_map"](probly_torch).patch.get_hatch()


@pytest.mark.parametrize("shape", [(60,), (60, 1)])
def test_a_band_is_as_wide_as_its_variances(shape):
    given = uncertainty(probly_torch, [torch.tensor(each.reshape(shape)) for each in MOMENTS])
    ax = probly_torch.plots.predictive_band(X.reshape(shape), given, level=0.9)
    order = np.argsort(X)
    x, (mean, total, aleatoric, _) = X[order], (each[order] for each in MOMENTS)
    quantile = norm.ppf(0.95)
    assert_close(ax.lines[0].get_xydata(), np.stack([x, mean], 1), "float64")
    edges = {0: (-aleatoric, aleatoric), 1: (-total, -aleatoric), 2: (aleatoric, total)}
    for i, variances in edges.items():
        vertices = ax.collections[i].get_paths()[0].vertices
        for variance in variances:
            edge = np.stack([x, mean + np.sign(variance) * quantile * np.sqrt(abs(variance))], 1)
            distances = np.abs(vertices[None] - edge[:, None]).max(-1).min(1)
            assert_close(1 + distances, np.ones(60), "float64")


def test_a_spread_is_from_the_lowest_to_the_highest():
    values = LOGITS[..., 0]
    ax = probly_torch.plots.member_spread(values)
    order = np.argsort(values.mean(0))
    assert_close(ax.lines[-1].get_ydata(), values.mean(0)[order], "float64")
    ranges = np.array([segment[:, 1] for segment in ax.collections[0].get_segments()])
    assert_close(ranges, np.stack([values.min(0), values.max(0)], 1)[order], "float64")


def test_curves_have_one_number_an_epoch():
    """As Lightning's CSVLogger writes them: a row for training, a row for validation, NaN or nothing elsewhere."""
    nan = float("nan")
    rows = [
        {"epoch": 0, "step": 9, "train_loss": 3.0, "val_nll": nan},
        {"epoch": 0, "step": 9, "val_nll": 2.0, "train_loss": nan},
        {"epoch": 1, "step": 19, "train_loss": torch.tensor(1.0)},
        {"epoch": 2, "step": 29, "train_loss": nan, "val_nll": jnp.array(1.5)},
    ]
    ax = probly_torch.plots.training_curves([{k: v for k, v in row.items() if k != "val_nll"} for row in rows])
    np.testing.assert_array_equal(ax.lines[0].get_xydata(), [[0, 3], [1, 1], [2, nan]])
    ax = probly_flax.plots.training_curves([{k: float(v) for k, v in row.items()} for row in rows], names=["val_nll"])
    np.testing.assert_array_equal(ax.lines[0].get_xydata(), [[0, 2], [2, 1.5]])
    ax = probly_flax.plots.training_curves(HISTORY, names=["val_accuracy"])
    assert (ax.get_ylabel(), ax.get_legend_handles_labels()[1]) == ("value", ["val_accuracy"])


@pytest.mark.parametrize(("num_members", "num_inputs", "num_classes"), [(1, 1, 3), (2, 5, 1), (1, 40, 200)])
def test_the_smallest_and_the_widest(num_members, num_inputs, num_classes):
    logits = RANDOM.standard_normal((num_members, num_inputs, num_classes))
    labels = RANDOM.integers(0, num_classes, num_inputs)
    probs = (np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)).mean(0)
    accuracy = (probs.argmax(-1) == labels).mean()
    diagram, histogram, curve = (
        getattr(probly_torch.plots, name)(logits, labels)
        for name in ("reliability_diagram", "confidence_histogram", "risk_coverage_curve")
    )
    spread = probly_torch.plots.member_spread(logits[..., 0])
    for ax in (diagram, histogram, curve, spread):
        ax.figure.draw_without_rendering()
    bins = np.ceil(probs.max(-1) * 15).clip(1)
    each = np.stack([probs.max(-1), probs.argmax(-1) == labels], -1)  # confidence, and whether it is right
    points = np.stack([each[bins == k].mean(0) for k in np.unique(bins)])
    assert_close(diagram.lines[1].get_xydata(), points, "float64")
    heights = [sum(bar.get_height() for bar in bars) for bars in histogram.containers]
    assert_close(np.array(heights), np.array([accuracy, 1 - accuracy]), "float64")
    assert len(curve.lines[0].get_xdata()) == num_inputs
    assert_close(curve.lines[0].get_xydata()[-1], np.array([1, 1 - accuracy]), "float64")
    ranges = np.array([segment[:, 1] for segment in spread.collections[0].get_segments()])
    order = np.argsort(logits[..., 0].mean(0))
    assert_close(ranges, np.stack([logits[..., 0].min(0), logits[..., 0].max(0)], 1)[order], "float64")


@pytest.mark.parametrize("value", [0.0, np.nan])
def test_maps_without_uncertainty_without_values_and_with_many_classes(value):
    ax = probly_torch.plots.uncertainty_map(GRID, value + 0 * VALUES, data=(DATA, np.arange(30)))
    ax.figure.draw_without_rendering()
    mesh, *classes = ax.collections
    np.testing.assert_array_equal(np.ma.filled(mesh.get_array(), np.nan), np.full(VALUES.shape, value))
    assert mesh.get_clim() == (0, 1)
    assert bool(ax.patch.get_hatch()) == np.isnan(value)
    np.testing.assert_array_equal(np.concatenate([each.get_offsets() for each in classes]), DATA)
    assert len(classes) == 30
    assert ax.get_legend() is None
