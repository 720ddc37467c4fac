"""LightningModules that train ensembles."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from lightning.fabric.utilities.cloud_io import get_filesystem
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CyclicLR, OneCycleLR

from probly_common.checks.rows import check_in_axes
from probly_common.checks.training import check_batch, check_group_options, check_lr_ratios
from probly_common.checks.values import check_module
from probly_torch.losses import member_cross_entropy, member_gaussian_nll, to_gaussian
from probly_torch.training._arguments import pack, unpack
from probly_torch.training._groups import plain_adamw
from probly_torch.training._metrics import StageMetrics, Task
from probly_torch.training._mixin import EnsembleMixin, inputs_of, loss_of
from probly_torch.uncertainty import Uncertainty, classification_uncertainty, regression_uncertainty

_KEY = "probly_torch_arguments"
_OBJECTS = ("model", "loss", "optimizer", "lr_scheduler")  # what a checkpoint keeps beside the plain hyperparameters
_EVERY = 10  # steps between two losses on the progress bar


class _EnsembleModule(EnsembleMixin):
    """Base of the two modules, which share the steps, the optimizer, and checkpoints."""

    loss: Callable[..., Tensor]

    def __init__(
        self,
        model: nn.Module,
        loss: Callable[..., Tensor],
        optimizer: OptimizerCallable,
        lr_scheduler: LRSchedulerCallable | None,
        weight_decay: float | None,
        fast_lr_multiplier: float,
        in_axes: int | None,
        task: Task,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=[*_OBJECTS, "task"])
        if "_instantiator" in self.hparams:  # from the command line: all of it is plain configuration
            self.save_hyperparameters()
        what = type(self).__name__
        check_module(what, "model", model, nn.Module)
        check_in_axes(what, in_axes)
        check_group_options(what, 0.0 if weight_decay is None else weight_decay, fast_lr_multiplier)
        self.model, self.loss, self.optimizer, self.lr_scheduler = model, loss, optimizer, lr_scheduler
        self.weight_decay, self.fast_lr_multiplier, self.in_axes = weight_decay, fast_lr_multiplier, in_axes
        self.val_metrics = StageMetrics(task, "val")
        self.test_metrics = StageMetrics(task, "test")
        self._sums: dict[str, Any] = {}

    def forward(self, inputs: Any) -> Any:
        return self.member_outputs(inputs)

    def training_step(self, batch: Any, batch_idx: int = 0) -> Tensor:
        outputs, targets, loss = self._judge(batch, self.in_axes)
        self._log_step(outputs, targets, loss, batch_idx)
        return loss

    def on_validation_epoch_start(self) -> None:
        self.val_metrics.start(len(self.trainer.num_val_batches))

    def validation_step(self, batch: Any, batch_idx: int = 0, dataloader_idx: int = 0) -> None:
        self._log_judgement(*self._judge(batch), self.val_metrics, dataloader_idx)

    def on_validation_epoch_end(self) -> None:
        self.log_dict(self.val_metrics.compute(), sync_dist=True, add_dataloader_idx=False)

    def on_test_epoch_start(self) -> None:
        self.test_metrics.start(len(self.trainer.num_test_batches))

    def test_step(self, batch: Any, batch_idx: int = 0, dataloader_idx: int = 0) -> None:
        self._log_judgement(*self._judge(batch), self.test_metrics, dataloader_idx)

    def on_test_epoch_end(self) -> None:
        self.log_dict(self.test_metrics.compute(), sync_dist=True, add_dataloader_idx=False)

    def _judge(self, batch: Any, in_axes: int | None = None) -> tuple[Any, Any, Tensor]:
        inputs, targets = check_batch(type(self).__name__, batch)
        outputs = self.member_outputs(inputs, in_axes=in_axes)
        return outputs, targets, loss_of(type(self).__name__, self.loss, outputs, targets)

    @torch.compiler.disable  # what torch.compile cannot trace, of a module that is compiled as a whole
    def _log_judgement(
        self, outputs: Any, targets: Any, loss: Tensor, judged_by: StageMetrics, dataloader_idx: int
    ) -> None:
        judged_by.update(outputs, targets, dataloader_idx)
        self.log(f"{judged_by.stage}_loss", loss, prog_bar=True, batch_size=len(targets), sync_dist=True)

    @torch.compiler.disable
    @torch.no_grad()
    def _log_step(self, outputs: Any, targets: Any, loss: Tensor, batch_idx: int) -> None:
        """Sums up what is logged of the epoch: a call of log costs as much as the step of a small network."""
        size = (outputs[0] if isinstance(outputs, tuple) else outputs).shape[1]
        for name, value in {"loss": loss, **self._train_values(outputs, targets), "size": 1}.items():
            self._sums[name] = self._sums.get(name, 0) + value * size
        if batch_idx % _EVERY == 0:
            self.log("loss", loss.detach(), prog_bar=True, logger=False)

    def _train_values(self, outputs: Any, targets: Any) -> dict[str, Tensor]:
        """Returns what is logged of training beside the loss."""
        return {}

    def on_train_epoch_start(self) -> None:
        self._sums = {}

    def on_train_epoch_end(self) -> None:
        size = self._sums.pop("size", None)  # None where a run resumes after the last step
        self.log_dict({f"train_{name}": value / size for name, value in self._sums.items()}, sync_dist=True)

    def configure_optimizers(self) -> Any:
        parameters: Any = self.parameters()
        if self.weight_decay is not None:
            parameters = self.optimizer_groups(self.weight_decay, self.fast_lr_multiplier)
        optimizer = self.optimizer(parameters)
        optimizer.param_groups[:] = [dict(group) for group in optimizer.param_groups]  # as torch.compile takes them
        if self.lr_scheduler is None:
            return optimizer
        ratios = _lr_ratios(optimizer)
        scheduler = self.lr_scheduler(optimizer)
        check_lr_ratios(type(self).__name__, type(scheduler).__name__, ratios, _lr_ratios(optimizer))
        interval = "step" if isinstance(scheduler, (OneCycleLR, CyclicLR)) else "epoch"
        monitor = getattr(scheduler, "monitor", "val_nll")
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": interval, "monitor": monitor},
        }

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        if "_instantiator" not in self.hparams:  # the command line's checkpoints hold its configuration
            checkpoint[_KEY] = pack({name: getattr(self, name) for name in self._objects()})

    @classmethod
    def load_from_checkpoint(
        cls,
        checkpoint_path: Any,
        map_location: Any = None,
        hparams_file: Any = None,
        strict: bool | None = None,
        weights_only: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Restores the module as it was saved: class, network, functions and weights.

        The file is read as data: networks of torch's and this library's layers, their losses, optimizers and schedules
        are built again. For one with classes of your own pass `model=Net()`, or `weights_only=False` if you trust the
        file, which lets it run code; `torch.serialization.add_safe_globals([Net])` allows a class once for all. A
        function that a file cannot hold, as a lambda, is asked for when it is needed. Rather than `model`, compile the
        module: `trainer.fit(torch.compile(module), ...)`.

        Args:
            checkpoint_path: as in LightningModule.load_from_checkpoint, as are the others.
            map_location: where the weights go.
            hparams_file: plain hyperparameters, if they are not in the file.
            strict: whether the names of the weights have to be the model's.
            weights_only: False trusts the file.
            kwargs: arguments of the constructor, in the place of those in the file.
        Raises:
            ValueError: if the network is neither in the file nor given, or of classes that are not known.
        """
        packed = _read(checkpoint_path, weights_only).get(_KEY, {})
        needed = {name: data for name, data in packed.items() if name in cls._objects() and name not in kwargs}
        kwargs |= unpack(f"{cls.__name__}.load_from_checkpoint", needed, trusted=weights_only is False)
        return super().load_from_checkpoint(checkpoint_path, map_location, hparams_file, strict, weights_only, **kwargs)

    @classmethod
    def _objects(cls) -> list[str]:
        """Lists those packed arguments that the constructor takes: a subclass may make its own."""
        return [name for name in _OBJECTS if name in inspect.signature(cls.__init__).parameters]


def _lr_ratios(optimizer: Optimizer) -> list[float]:
    """Returns each group's learning rate over the first one's."""
    rates = [float(group["lr"]) for group in optimizer.param_groups]
    return [rate / rates[0] for rate in rates if rates[0]]


def _read(file: Any, weights_only: bool | None) -> dict[str, Any]:
    """Reads a checkpoint without the data of its tensors."""
    with torch.serialization.skip_data():
        if hasattr(file, "read"):
            checkpoint = torch.load(file, map_location="cpu", weights_only=weights_only)
            file.seek(0)
            return checkpoint
        with get_filesystem(file).open(str(file), "rb") as stream:
            return torch.load(stream, map_location="cpu", weights_only=weights_only)


class EnsembleClassifier(_EnsembleModule):
    """Trains, judges and queries an ensemble of classifiers: a LightningModule for any network.

    Logs train_loss and train_accuracy for each epoch, and for validation and test (val_..., test_...) loss, nll,
    accuracy, brier, ece and mutual_information of the mean prediction: `EarlyStopping("val_nll")` stops by what the
    ensemble is judged by. The progress bar shows the loss of every tenth step. `trainer.predict` returns
    `uncertainty.Uncertainty(mean, total, aleatoric, epistemic)` for each batch, in nats.

    Each member's own loss is the default, averaged over members: each is trained as if it were alone, which keeps them
    diverse (Lakshminarayanan et al. 2017). A loss of the mean prediction, losses.mixture_cross_entropy, trains them
    jointly: members then lean on each other, agree on the training data by compensating for one another's errors, and
    are worse alone and together (Webb et al. 2021; Jeffares et al. 2023). As a mean over E members the loss gives
    weights of one member 1/E of the gradient that they would have alone: Adam and its kin do not care, for SGD multiply
    the learning rate by E, or pass `lambda logits, labels: len(logits) * member_cross_entropy(logits, labels)`. What
    members share, as the slow weights of a BatchEnsemble, gets the mean of the members' gradients: its learning rate is
    that of a single network.

    `load_from_checkpoint(path)` restores the class, the network and its weights, and the functions; see there. A run
    that is resumed from the end of an epoch is bit for bit the run that was not interrupted.

    Shape:
        batches (inputs, labels): inputs (B, ...) as the model takes them, labels (B,) of class indices. With in_axes=0,
        batches for training are (E, B, ...) and (E, B); those for validation, test and prediction are as without.
        To predict: inputs, (inputs,) or (inputs, labels).
    Args:
        model: an Ensemble, a BatchEnsemble, a network around one of them, or any with `num_members`, which returns
            logits (E, B, C); or a single network that returns (B, C), which is one member.
        loss: maps logits (E, B, C) and labels to a scalar.
        optimizer: maps parameters to an optimizer: a class, or `partial(torch.optim.SGD, lr=0.1)`. By default
            AdamW of lr 1e-3 and of no decay but weight_decay.
        lr_scheduler: maps the optimizer to a schedule, which steps after each epoch, or each batch for OneCycleLR and
            CyclicLR. ReduceLROnPlateau watches val_nll.
        weight_decay: None gives the optimizer all parameters as they are. A number gives it groups: weights decay by
            it, biases and normalisation do not, and a BatchEnsemble's r and s are as in fast_weight_groups.
        fast_lr_multiplier: the learning rate of r and s over the optimizer's, where weight_decay is a number.
        in_axes: 0 if each member trains on batches of its own.
    Raises:
        TypeError: if model is not a module.
        ValueError: if in_axes is unknown; in a step, if a batch is not a pair or the loss no scalar.
    Example:
        >>> from probly_torch import batchensemble
        >>> network = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> module = EnsembleClassifier(batchensemble(network, 4), weight_decay=1e-4)
        >>> module.predict_step(torch.zeros(5, 2)).mean.shape
        torch.Size([5, 3])
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        loss: Callable[..., Tensor] = member_cross_entropy,
        optimizer: OptimizerCallable = plain_adamw,
        lr_scheduler: LRSchedulerCallable | None = None,
        weight_decay: float | None = None,
        fast_lr_multiplier: float = 0.5,
        in_axes: int | None = None,
    ) -> None:
        task: Task = "classification"
        super().__init__(model, loss, optimizer, lr_scheduler, weight_decay, fast_lr_multiplier, in_axes, task)

    def predict_step(self, batch: Any, batch_idx: int = 0, dataloader_idx: int = 0) -> Uncertainty:
        return classification_uncertainty(self.member_outputs(inputs_of(batch)))

    def _train_values(self, logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
        probs = logits.softmax(-1)
        predicted = (probs if self.in_axes == 0 else probs.mean(0)).argmax(-1)
        return {"accuracy": (predicted == labels).float().mean()}


class EnsembleRegressor(_EnsembleModule):
    """Trains, judges and queries an ensemble of regressors whose members predict a mean and a variance.

    It is as EnsembleClassifier, except for what members return and what is logged. It logs train_loss for each epoch,
    and for validation and test loss, nll, rmse, crps and coverage (of intervals of 95 %). `trainer.predict` returns
    `uncertainty.Uncertainty(mean, total, aleatoric, epistemic)`, variances by the law of total variance.

    Shape:
        batches (inputs, targets): inputs (B, ...) as the model takes them, targets (B, ...). With in_axes=0, batches
        for training are (E, B, ...); those for validation, test and prediction are as without. To predict: inputs,
        (inputs,) or (inputs, targets).
    Args:
        model: as in EnsembleClassifier. It returns a tuple of mean and variance, (E, B, ...) each; or one tensor
            (E, B, 2K), which losses.to_gaussian splits.
        loss: maps mean, variance and targets to a scalar: losses.member_gaussian_nll, member_beta_nll,
            mixture_gaussian_nll or your own.
        optimizer: as in EnsembleClassifier.
        lr_scheduler: as in EnsembleClassifier.
        weight_decay: as in EnsembleClassifier.
        fast_lr_multiplier: as in EnsembleClassifier.
        in_axes: 0 if each member trains on batches of its own.
    Raises:
        TypeError: if model is not a module.
        ValueError: if in_axes is unknown; in a step, if a batch is not a pair or the loss no scalar.
    Example:
        >>> from probly_torch import ensemble
        >>> module = EnsembleRegressor(ensemble(nn.Linear(2, 2), 5))
        >>> module.predict_step(torch.zeros(7, 2)).epistemic.shape
        torch.Size([7, 1])
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        loss: Callable[..., Tensor] = member_gaussian_nll,
        optimizer: OptimizerCallable = plain_adamw,
        lr_scheduler: LRSchedulerCallable | None = None,
        weight_decay: float | None = None,
        fast_lr_multiplier: float = 0.5,
        in_axes: int | None = None,
    ) -> None:
        task: Task = "regression"
        super().__init__(model, loss, optimizer, lr_scheduler, weight_decay, fast_lr_multiplier, in_axes, task)

    def member_outputs(self, inputs: Any, *, in_axes: int | None = None) -> tuple[Tensor, Tensor]:
        """Returns the mean and variance of each member: (E, B, ...) each."""
        outputs = super().member_outputs(inputs, in_axes=in_axes)
        return outputs if isinstance(outputs, tuple) else to_gaussian(outputs)

    def predict_step(self, batch: Any, batch_idx: int = 0, dataloader_idx: int = 0) -> Uncertainty:
        return regression_uncertainty(*self.member_outputs(inputs_of(batch)))
