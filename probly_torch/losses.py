"""Losses of members' logits [E, B, C] and labels."""

from __future__ import annotations

import torch
from torch import Tensor

from probly_torch._checks import check_labels
from probly_torch.uncertainty import _log_mean, _log_probs

__all__ = ["member_cross_entropy", "mixture_cross_entropy"]


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
