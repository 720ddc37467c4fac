"""Bad input of plots."""

import numpy as np
from matplotlib.figure import Figure

from parity_tests.suite.sentences.harness import Row

RANDOM = np.random.default_rng(0)
LABELS = RANDOM.integers(0, 4, 60)
LOGITS = RANDOM.standard_normal((3, 60, 4)) + 2 * np.eye(4)[LABELS]
X = np.linspace(-2, 2, 60)
VALUES = 1 + X**2
DATA = np.zeros((30, 2))
GRID = np.zeros((7, 9, 2))
HISTORY = [{"train_loss": 1.0, "val_accuracy": 0.5}, {"train_loss": 0.7}]


def band(f, x=X, total=VALUES, **options):
    return f.package.plots.predictive_band(x, f.package.uncertainty.Uncertainty(X, total, VALUES, VALUES), **options)


ROWS = {
    "NaN": Row(
        lambda f: f.package.plots.reliability_diagram(np.where(LOGITS > 4, np.nan, LOGITS), LABELS),
        ValueError,
        "Find the layer: torch.autograd.set_detect_anomaly(True), or jax.config.update('jax_debug_nans', True).",
    ),
    "infinity": Row(
        lambda f: f.package.plots.risk_coverage_curve(np.where(LOGITS > 4, np.inf, LOGITS), LABELS),
        ValueError,
        "Find the layer: torch.autograd.set_detect_anomaly(True), or jax.config.update('jax_debug_nans', True).",
    ),
    "no inputs": Row(
        lambda f: f.package.plots.confidence_histogram(LOGITS[:, :0], LABELS[:0]),
        ValueError,
        "Pass more rows: logits[:, :100].",
    ),
    "no member axis": Row(
        lambda f: f.package.plots.risk_coverage_curve(LOGITS[0], LABELS),
        ValueError,
        "For a single network, add the member axis: logits[None].",
    ),
    "labels of another length": Row(
        lambda f: f.package.plots.reliability_diagram(LOGITS, LABELS[1:]),
        ValueError,
        "For one-hot labels, pass labels.argmax(-1).",
    ),
    "no bins": Row(
        lambda f: f.package.plots.confidence_histogram(LOGITS, LABELS, num_bins=0), ValueError, "Pass num_bins=15."
    ),
    "uncertainty that is NaN": Row(
        lambda f: f.package.plots.risk_coverage_curve(LOGITS, LABELS, uncertainty=np.where(X > 0, X, np.nan)),
        ValueError,
        "To use the largest probability, leave it out: uncertainty=None.",
    ),
    "uncertainty of another length": Row(
        lambda f: f.package.plots.risk_coverage_curve(LOGITS, LABELS, uncertainty=X[1:]),
        ValueError,
        "To use the largest probability, leave it out: uncertainty=None.",
    ),
    "an array of axes": Row(
        lambda f: f.package.plots.reliability_diagram(LOGITS, LABELS, ax=Figure().subplots(1, 2)),
        TypeError,
        "Pass one: reliability_diagram(..., ax=figure.subplots()).",
    ),
    "a grid that is none": Row(
        lambda f: f.package.plots.uncertainty_map(DATA, GRID[..., 0]),
        ValueError,
        "Make it: np.stack(np.meshgrid(x1, x2), -1).",
    ),
    "values of another grid": Row(
        lambda f: f.package.plots.uncertainty_map(GRID, GRID[1:, :, 0]),
        ValueError,
        "Pass one number for each point: mutual_information(model(grid.reshape(-1, 2))).",
    ),
    "points of three features": Row(
        lambda f: f.package.plots.uncertainty_map(GRID, GRID[..., 0], data=(LOGITS[0], LABELS)),
        ValueError,
        "Choose two features: (x[:, :2], labels).",
    ),
    "a band over two features": Row(
        lambda f: band(f, DATA), ValueError, "Choose one feature and one target: x[:, 0], mean[:, 0]."
    ),
    "data of another length": Row(
        lambda f: band(f, data=(X, X[1:])), ValueError, "Choose one feature and one target: x[:, 0], data[:, 0]."
    ),
    "variances below 0": Row(lambda f: band(f, total=X), ValueError, "Pass regression_uncertainty(mean, variance)."),
    "a mean alone": Row(
        lambda f: f.package.plots.predictive_band(X, X), TypeError, "Pass regression_uncertainty(mean, variance)."
    ),
    "a level of 95": Row(lambda f: band(f, level=95), ValueError, "Pass level=0.95."),
    "logits of a spread": Row(
        lambda f: f.package.plots.member_spread(LOGITS),
        ValueError,
        "Choose a target, mean[..., 0], or the probability of a class, logits.softmax(-1)[..., 1].",
    ),
    "a spread over other inputs": Row(
        lambda f: f.package.plots.member_spread(LOGITS[..., 0], x=X[1:]),
        ValueError,
        "Choose one feature and one target: x[:, 0], values[0][:, 0].",
    ),
    "an empty history": Row(lambda f: f.package.plots.training_curves([]), ValueError, "Train for one: epochs=1."),
    "a name that is not logged": Row(
        lambda f: f.package.plots.training_curves(HISTORY, names=["train_los"]),
        ValueError,
        "Pass names=['train_loss', 'val_accuracy'].",
    ),
    "no losses": Row(
        lambda f: f.package.plots.training_curves([{"val_accuracy": 0.5}]), ValueError, "Pass names=['val_accuracy']."
    ),
    "a dict of lists": Row(
        lambda f: f.package.plots.training_curves({"train_loss": [1.0]}),
        TypeError,
        "Pass [{'train_loss': 0.7}, {'train_loss': 0.5}].",
    ),
}
