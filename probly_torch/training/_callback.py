"""Metrics for a LightningModule of your own."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from probly_common.checks.training import check_attribute, check_batch, check_task
from probly_torch.losses import to_gaussian
from probly_torch.training._metrics import StageMetrics, Task
from probly_torch.training._mixin import member_outputs


class EnsembleMetrics(Callback):
    """Logs for validation and test of any LightningModule what EnsembleClassifier and EnsembleRegressor log.

    That is val_nll, val_accuracy, val_brier, val_ece and val_mutual_information, or for regression val_nll, val_rmse,
    val_crps and val_coverage, and the same for test; the loss is the module's own to log. Batches are (inputs,
    targets), and the network runs once more on each.

    Args:
        task: "classification", where the network returns logits (E, B, C); or "regression", where it returns a tuple of
            mean and variance, (E, B, ...) each, or one tensor (E, B, 2K) that losses.to_gaussian splits. A single
            network is one member, and returns no axis E.
        attribute: where the module has its network.
    Raises:
        ValueError: if task is unknown, or the module has no such attribute.
    Example:
        >>> trainer = Trainer(callbacks=[EnsembleMetrics()], accelerator="cpu", logger=False)
        >>> trainer.callbacks[0].task
        'classification'
    """

    def __init__(self, task: Task = "classification", attribute: str = "model") -> None:
        check_task("EnsembleMetrics", task)
        self.task, self.attribute = task, attribute
        self._metrics = {stage: StageMetrics(task, stage) for stage in ("val", "test")}

    def _start(self, stage: str, module: LightningModule, num_dataloaders: int) -> None:
        check_attribute("EnsembleMetrics", module, self.attribute)
        self._metrics[stage].to(module.device).start(num_dataloaders)

    def _update(self, stage: str, trainer: Trainer, module: LightningModule, batch: Any, dataloader_idx: int) -> None:
        inputs, targets = check_batch("EnsembleMetrics", batch)
        with torch.no_grad(), trainer.precision_plugin.forward_context():
            outputs = member_outputs("EnsembleMetrics", getattr(module, self.attribute), inputs)
        if self.task == "regression" and not isinstance(outputs, tuple):
            outputs = to_gaussian(outputs)
        self._metrics[stage].update(outputs, targets, dataloader_idx)

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._start("val", pl_module, len(trainer.num_val_batches))

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._update("val", trainer, pl_module, batch, dataloader_idx)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        pl_module.log_dict(self._metrics["val"].compute(), sync_dist=True, add_dataloader_idx=False)

    def on_test_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._start("test", pl_module, len(trainer.num_test_batches))

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._update("test", trainer, pl_module, batch, dataloader_idx)

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        pl_module.log_dict(self._metrics["test"].compute(), sync_dist=True, add_dataloader_idx=False)
