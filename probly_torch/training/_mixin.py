"""A mixin that turns a LightningModule into one that trains ensembles."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from probly_common.checks.rows import check_in_axes, check_member_axis
from probly_common.checks.training import check_batch, check_loss
from probly_torch.batchensemble import BatchEnsemble
from probly_torch.ensemble import Ensemble
from probly_torch.losses import member_cross_entropy
from probly_torch.training._groups import Types, decay_groups
from probly_torch.training._random_states import random_states, set_dropout_state, set_random_state

_HALF = (torch.bfloat16, torch.float16)
_KEY = "probly_torch_random_states"


class EnsembleMixin(LightningModule):
    """Adds to a LightningModule of your own what an ensemble needs: the loss and the optimizer's groups.

    The module has its network in `self.model`: an Ensemble, a BatchEnsemble, a network around one of them or any other
    with `num_members` that returns member outputs (E, B, ...); or a single network, which is one member. It stays yours
    otherwise: `class Mine(EnsembleMixin, LightningModule)`, `return self.ensemble_loss(batch)` in training_step, and
    `AdamW(self.optimizer_groups(weight_decay=1e-4), lr=1e-3)` in configure_optimizers. EnsembleMetrics logs metrics.

    A checkpoint also holds the states of the generators of random numbers (each process's of torch on CPU and CUDA, of
    Python and of NumPy, and the ensemble's own for Dropout), and `Trainer.fit(..., ckpt_path=...)` goes on from them: a
    run that is resumed from the end of an epoch is, bit for bit, the run that was not interrupted. Where you define
    on_fit_start, on_save_checkpoint or on_load_checkpoint, call super's.

    Example:
        >>> from probly_torch import batchensemble
        >>> class Mine(EnsembleMixin, LightningModule):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.model = batchensemble(nn.Linear(2, 3), 4)
        ...
        ...     def training_step(self, batch):
        ...         return self.ensemble_loss(batch)
        ...
        ...     def configure_optimizers(self):
        ...         return torch.optim.AdamW(self.optimizer_groups(weight_decay=1e-4), lr=1e-3)
        >>> Mine().training_step((torch.zeros(5, 2), torch.zeros(5, dtype=torch.long))).shape
        torch.Size([])
    """

    model: nn.Module
    _random_states: list[dict[str, Any]] | None = None

    def ensemble_loss(
        self, batch: Any, loss: Callable[..., Tensor] = member_cross_entropy, *, in_axes: int | None = None
    ) -> Tensor:
        """Returns the loss of a batch (inputs, targets).

        Args:
            batch: inputs (B, ...) and targets (B, ...); or, under in_axes=0, (E, B, ...) both.
            loss: maps the members' outputs (E, B, ...) and the targets to a scalar, as those in `losses` do. Outputs in
                a tuple are passed one by one: loss(mean, variance, targets). For a network that returns both in one
                tensor, `lambda outputs, targets: member_gaussian_nll(*to_gaussian(outputs), targets)`.
            in_axes: None gives every member the same batch; 0 gives each its own.
        Raises:
            ValueError: if the batch is not a pair, or loss returns no scalar.
        """
        inputs, targets = check_batch(type(self).__name__, batch)
        outputs = self.member_outputs(inputs, in_axes=in_axes)
        return loss_of(type(self).__name__, loss, outputs, targets)

    def member_outputs(self, inputs: Any, *, in_axes: int | None = None) -> Any:
        """Returns the outputs of each member: (E, B, ...).

        A single network is one member.
        """
        return member_outputs(type(self).__name__, self.model, inputs, in_axes)

    def optimizer_groups(
        self, weight_decay: float, fast_lr_multiplier: float = 0.5, *, decay: Types = (), no_decay: Types = ()
    ) -> list[dict[str, Any]]:
        """Returns parameter groups of the whole module, by type: see fast_weight_groups.

        A module without BatchEnsemble layers gets the same groups without the fast ones. Override this method to say
        what decays of modules of your own:
        `return super().optimizer_groups(weight_decay, fast_lr_multiplier, no_decay=(Mine,))`.
        """
        return decay_groups(self, weight_decay, fast_lr_multiplier, decay, no_decay)

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clips each member of an Ensemble by the norm of its own gradients; all other parameters, by their joint norm.

        Members trained together would else be scaled by the one with the largest gradients. The loss is as it is: one
        that is a mean over members has gradients 1/E as large as those of a member alone.
        """
        stacked = {p: m.num_members for m in self.modules() if isinstance(m, Ensemble) for p in m.parameters()}
        if gradient_clip_val is None or gradient_clip_algorithm == "value" or not stacked:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
            return
        own = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        for num_members in set(stacked.values()):
            clip_by_member([p.grad for p in own if stacked.get(p) == num_members], float(gradient_clip_val))
        nn.utils.clip_grad_norm_([p for p in own if p not in stacked], gradient_clip_val)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint[_KEY] = random_states(self)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self._random_states = checkpoint.get(_KEY)
        if self._random_states:
            set_dropout_state(self, self._random_states[0])

    def on_fit_start(self) -> None:
        super().on_fit_start()
        states, self._random_states = self._random_states, None
        resumes = self.trainer.ckpt_path is not None  # and does not fit a trained module anew
        if resumes and states and len(states) == self.trainer.world_size:
            set_random_state(states[self.global_rank])
            set_dropout_state(self, states[self.global_rank])


@torch.no_grad()
def clip_by_member(gradients: Sequence[Any], max_norm: float) -> None:
    """Scales, in place, the rows of each member to a joint norm of at most max_norm."""
    if gradients:
        norms = torch.stack([g.flatten(1).norm(dim=1) if g.ndim > 1 else g.abs() for g in gradients]).norm(dim=0)
        for g in gradients:
            g.mul_((max_norm / (norms + 1e-6)).clamp(max=1).reshape(-1, *[1] * (g.ndim - 1)))


def member_outputs(what: str, model: nn.Module, inputs: Any, in_axes: int | None = None) -> Any:
    """Returns the outputs of each member, of a model of members or of a network that is one.

    Half precision ends here.
    """
    check_in_axes(what, in_axes)
    if hasattr(model, "num_members") or any(isinstance(m, (Ensemble, BatchEnsemble)) for m in model.modules()):
        outputs = model(inputs) if in_axes is None else model(inputs, in_axes=in_axes)
    else:
        if in_axes == 0:
            check_member_axis(what, [x.shape for x in tree_leaves(inputs) if isinstance(x, Tensor)], 1)
            inputs = tree_map_only(Tensor, lambda x: x[0], inputs)
        outputs = tree_map_only(Tensor, lambda y: y[None], model(inputs))
    return tree_map_only(Tensor, lambda y: y.float() if y.dtype in _HALF else y, outputs)


def inputs_of(batch: Any) -> Any:
    """Returns the inputs x of a batch x, (x,) or (x, y)."""
    return batch[0] if isinstance(batch, (list, tuple)) else batch


def loss_of(what: str, loss: Callable[..., Tensor], outputs: Any, targets: Any) -> Tensor:
    value = loss(*outputs, targets) if isinstance(outputs, tuple) else loss(outputs, targets)
    check_loss(what, getattr(value, "shape", None))
    return value
