"""Metrics that are logged for validation and test, by the modules and by the callback."""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor, nn
from torchmetrics import MetricCollection

from probly_torch import metrics

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


class StageMetrics(nn.Module):
    """The metrics of a stage, val or test, once for each of its dataloaders."""

    def __init__(self, task: Task, stage: str) -> None:
        super().__init__()
        classes = _CLASSIFICATION if task == "classification" else _REGRESSION
        self.first = MetricCollection({name: each() for name, each in classes.items()}, compute_groups=False)
        self.others = nn.ModuleList()
        self.stage = stage

    def start(self, num_dataloaders: int) -> None:
        self.first.reset()
        self.others = nn.ModuleList(self.first.clone() for _ in range(num_dataloaders - 1))

    def update(self, outputs: Any, targets: Any, dataloader_idx: int) -> None:
        self._each()[dataloader_idx].update(*(outputs if isinstance(outputs, tuple) else (outputs,)), targets)

    def compute(self) -> dict[str, Tensor]:
        """Returns values by name; for several dataloaders, by the names that Lightning gives them."""
        return {
            f"{self.stage}_{name}/dataloader_idx_{i}" if self.others else f"{self.stage}_{name}": value
            for i, each in enumerate(self._each())
            for name, value in each.compute().items()
        }

    def _each(self) -> list[Any]:
        return [self.first, *self.others]
