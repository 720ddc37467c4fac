"""Losses of members' logits [E, B, C] and labels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.func import vmap
from torch.utils._pytree import tree_leaves, tree_map

from probly_torch._checks import check_in_axes, check_labels, check_member_axis, check_member_losses
from probly_torch.uncertainty import _log_mean, _log_probs

__all__ = ["member_cross_entropy", "member_losses", "mixture_cross_entropy"]


def member_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean over members and inputs of each member's own cross-entropy, in nats.

    Each member is trained as if it were alone, which keeps members diverse (Lakshminarayanan et al. 2017);
    its gradient is 1/E of the gradient alone.

    Shape:
        logits (E, B, C), labels (B,) or (E, B) of class indices. Returns a scalar.
    Raises:
        ValueError: if the shapes do not fit.
        TypeError: if labels are not integers.
    Example:
        >>> member_cross_entropy(torch.zeros(3, 4, 2), torch.tensor([0, 1, 1, 0])).exp()
        tensor(2.)
    """
    log_probs = _log_probs("member_cross_entropy", logits)
    return -_pick("member_cross_entropy", log_probs, labels).mean()


def member_losses(
    loss: Callable[[Any, Any], Tensor], outputs: Any, targets: Any, *, in_axes: int | None = None
) -> Tensor:
    """Each member's own loss, of any loss of one network's outputs.

    The gradient of their sum by the weights of member i is the gradient of training member i alone: so is each step of
    an optimizer that treats weights one by one, as SGD and Adam do (clipping by the norm of all gradients does not).

    Shape:
        outputs (E, ...), or several in tuples, lists and dicts; targets as loss takes them, or with in_axes=0 each
        (E, ...). Returns (E,).
    Args:
        loss: maps the outputs of one network and the targets to a scalar.
        outputs: what the members return.
        targets: shared by the members; or, with in_axes=0, of each member.
    Raises:
        ValueError: if loss returns no scalar.
    Example:
        >>> from torch.nn import functional as F
        >>> member_losses(F.cross_entropy, torch.zeros(3, 4, 2), torch.tensor([0, 1, 1, 0])).sum()
        tensor(2.0794)
    """
    check_in_axes("member_losses", in_axes)
    num_members = tree_leaves(outputs)[0].shape[0]
    if in_axes == 0:
        check_member_axis("member_losses", [leaf.shape for leaf in tree_leaves(targets)], num_members)
    try:
        losses = vmap(loss, in_dims=(0, in_axes), randomness="different")(outputs, targets)
    except RuntimeError:  # what vmap cannot run, such as a check of values
        own = [(_row(outputs, i), _row(targets, i) if in_axes == 0 else targets) for i in range(num_members)]
        losses = torch.stack([loss(*each) for each in own])
    check_member_losses("member_losses", losses.shape, num_members)
    return losses


def mixture_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean over inputs of the cross-entropy of the mean prediction, -log (1/E) sum_i softmax(z_i)[label].

    It is what the ensemble is judged by (NLL), and never above member_cross_entropy. As a training loss it
    lets members share the work, and so lose diversity.

    Shape:
        logits (E, B, C), labels (B,) of class indices. Returns a scalar.
    Raises:
        ValueError: if the shapes do not fit.
        TypeError: if labels are not integers.
    Example:
        >>> mixture_cross_entropy(torch.tensor([[[0.0, 0.0]], [[0.0, 100.0]]]), torch.tensor([1])).exp()
        tensor(1.3333)
    """
    log_probs = _log_probs("mixture_cross_entropy", logits)
    return -_pick("mixture_cross_entropy", _log_mean(log_probs)[None], labels).mean()


def _pick(what: str, log_probs: Tensor, labels: Tensor) -> Tensor:
    """The log-probability of each label: (E, B)."""
    integer = not (labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool)
    check_labels(what, log_probs.shape, labels.shape, integer)
    return log_probs.gather(-1, labels.long().expand(log_probs.shape[:-1])[..., None])[..., 0]


def _row(tree: Any, i: int) -> Any:
    return tree_map(lambda x: x[i], tree)
