"""Metrics that are logged for validation."""

from __future__ import annotations

from typing import Literal

from flax import nnx

from probly_flax import metrics

Task = Literal["classification", "regression"]

_CLASSIFICATION = {
    "nll": metrics.NLL,
    "accuracy": metrics.Accuracy,
    "brier": metrics.Brier,
    "ece": metrics.ECE,
    "mutual_information": metrics.MutualInformation,
}
_REGRESSION = {
    "nll": metrics.GaussianNLL,
    "rmse": metrics.RMSE,
    "crps": metrics.CRPS,
    "coverage": metrics.IntervalCoverage,
}


def metrics_of(task: Task) -> nnx.MultiMetric:
    classes = _CLASSIFICATION if task == "classification" else _REGRESSION
    return nnx.MultiMetric(**{name: each() for name, each in classes.items()})
