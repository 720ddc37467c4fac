"""What an ensemble knows and does not: total, aleatoric and epistemic uncertainty of its members' logits.

All functions take logits [E, B, C] and work in log space: no finite logits give NaN, infinity, or a negative
entropy or mutual information. Entropies are in nats.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from probly_torch._checks import check_logits

__all__ = [
    "disagreement",
    "expected_entropy",
    "log_mean_probs",
    "mean_probs",
    "mutual_information",
    "predictive_entropy",
]


def log_mean_probs(logits: Tensor) -> Tensor:
    """Logarithm of the mean prediction, log (1/E) sum_i softmax(z_i).

    Shape:
        logits (E, B, C). Returns (B, C).
    Example:
        >>> log_mean_probs(torch.zeros(3, 1, 2)).exp()
        tensor([[0.5000, 0.5000]])
    """
    return _log_mean(_log_probs("log_mean_probs", logits))


def mean_probs(logits: Tensor) -> Tensor:
    """Mean prediction of the members, (1/E) sum_i softmax(z_i).

    Shape:
        logits (E, B, C). Returns (B, C), rows that add up to 1.
    Example:
        >>> mean_probs(torch.tensor([[[0.0, 0.0]], [[0.0, 100.0]]]))
        tensor([[0.2500, 0.7500]])
    """
    return _log_mean(_log_probs("mean_probs", logits)).exp()


def predictive_entropy(logits: Tensor) -> Tensor:
    """Total uncertainty: the entropy of the mean prediction, in nats.

    Shape:
        logits (E, B, C). Returns (B,), from 0 to log C.
    Example:
        >>> predictive_entropy(torch.zeros(3, 1, 2)).exp()
        tensor([2.])
    """
    return _entropy(_log_mean(_log_probs("predictive_entropy", logits)))


def expected_entropy(logits: Tensor) -> Tensor:
    """Aleatoric uncertainty: the mean of the members' entropies, in nats.

    Shape:
        logits (E, B, C). Returns (B,), from 0 to log C.
    Example:
        >>> expected_entropy(torch.tensor([[[200.0, 0.0]], [[0.0, 200.0]]]))
        tensor([0.])
    """
    return _entropy(_log_probs("expected_entropy", logits)).mean(0)


def mutual_information(logits: Tensor) -> Tensor:
    """Epistemic uncertainty: the mean divergence KL(p_i || p) of the members from their mean, in nats.

    It equals predictive_entropy - expected_entropy (Houlsby et al. 2011, eq. 2), without their cancellation.

    Shape:
        logits (E, B, C). Returns (B,), from 0 to log E.
    Example:
        >>> mutual_information(torch.tensor([[[100.0, 0.0]], [[0.0, 100.0]]])).exp()
        tensor([2.])
    """
    log_probs = _log_probs("mutual_information", logits)
    divergence = (log_probs.exp() * (log_probs - _log_mean(log_probs)[None])).sum(-1)
    return divergence.mean(0).clamp(min=0)


def disagreement(logits: Tensor) -> Tensor:
    """Fraction of the pairs of members that predict different classes; 0 for a single member.

    Shape:
        logits (E, B, C). Returns (B,), from 0 to 1.
    Example:
        >>> disagreement(torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]], [[0.0, 1.0]]]))
        tensor([0.6667])
    """
    check_logits("disagreement", logits.shape)
    num_members, _, num_classes = logits.shape
    votes = torch.nn.functional.one_hot(logits.argmax(-1), num_classes).sum(0)
    differing = num_members**2 - (votes * votes).sum(-1)
    return differing.to(logits.dtype) / max(1, num_members * (num_members - 1))


def _log_probs(what: str, logits: Tensor) -> Tensor:
    """log softmax, kept finite: below this bound the probability is 0 anyway."""
    check_logits(what, logits.shape)
    return logits.log_softmax(-1).clamp(min=torch.finfo(logits.dtype).min / 4)


def _log_mean(log_probs: Tensor) -> Tensor:
    log_mean = log_probs.logsumexp(0) - math.log(len(log_probs))
    return torch.where(log_mean > 0, 0.0, log_mean)  # rounding could make a probability larger than 1


def _entropy(log_probs: Tensor) -> Tensor:
    return -(log_probs.exp() * log_probs).sum(-1)
