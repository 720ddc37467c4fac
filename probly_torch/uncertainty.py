"""Uncertainty of an ensemble's predictions: total, aleatoric and epistemic, from its members' outputs.

For classification, of logits [E, B, C], and in log space: no finite logits give NaN, infinity, or a negative entropy,
mutual information or divergence. These are in nats unless unit="bits". For regression, of means and variances
[E, B, ...], in units of the target squared. A stream takes the members a few at a time.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from probly_common.checks.judging import (
    Unit,
    check_any_members,
    check_gaussian,
    check_logits,
    check_same_inputs,
    check_unit,
    check_variance,
)

__all__ = [
    "ClassificationStream",
    "RegressionStream",
    "Uncertainty",
    "classification_uncertainty",
    "disagreement",
    "expected_entropy",
    "log_mean_probs",
    "mean_probs",
    "mutual_information",
    "pairwise_kl",
    "predictive_entropy",
    "regression_uncertainty",
]


class Uncertainty(NamedTuple):
    """The mean prediction of an ensemble and what it does not know: total = aleatoric + epistemic.

    Aleatoric is what the members expect in spite of what they know, such as noise; epistemic is what they disagree
    about, and more data would teach them.

    Shape:
        For classification mean (B, C), the others (B,); for regression all (B, ...).
    Example:
        >>> uncertainty = classification_uncertainty(torch.tensor([[[200.0, 0.0]], [[0.0, 200.0]]]), unit="bits")
        >>> uncertainty.aleatoric, uncertainty.epistemic
        (tensor([0.]), tensor([1.]))
    """

    mean: Tensor
    total: Tensor
    aleatoric: Tensor
    epistemic: Tensor


def classification_uncertainty(logits: Tensor, *, unit: Unit = "nats") -> Uncertainty:
    """Returns the mean prediction and predictive_entropy = expected_entropy + mutual_information (Depeweg et al. 2018).

    Shape:
        logits (E, B, C). Returns mean (B, C), and total, aleatoric and epistemic (B,), where total is the sum of the
        others exactly.
    Args:
        logits: of each member.
        unit: "nats" or "bits".
    Raises:
        ValueError: if logits have other axes, or unit is another.
    Example:
        >>> classification_uncertainty(torch.tensor([[[200.0, 0.0]], [[0.0, 200.0]]]), unit="bits").total
        tensor([1.])
    """
    check_unit("classification_uncertainty", unit)
    log_mean, aleatoric, epistemic = _moments(_log_probs("classification_uncertainty", logits))
    return _in_total(log_mean.exp(), aleatoric, epistemic, unit)


def regression_uncertainty(mean: Tensor, variance: Tensor) -> Uncertainty:
    """Returns the mean prediction, and the mixture's variance by the law of total variance.

    Aleatoric is the mean of the variances. Epistemic is the population variance of the means (Lakshminarayanan et al.
    2017, sec. 2.4). Means are taken as differences from the first member's, which are exact where they are close: a
    large mean costs no digits.

    Shape:
        mean, variance (E, B, ...). Returns mean, total, aleatoric and epistemic (B, ...); the last three in units of
        the target squared, where total is the sum of the others exactly.
    Raises:
        ValueError: if the shapes do not fit, or a variance is negative.
    Example:
        >>> regression_uncertainty(torch.tensor([[1.0], [3.0]]), torch.tensor([[0.25], [0.75]])).total
        tensor([1.5000])
    """
    check_gaussian("regression_uncertainty", mean.shape, variance.shape)
    _check_variance("regression_uncertainty", variance, zero=True)
    center, aleatoric, epistemic = _gaussian_moments(mean - mean[:1], variance)
    return _in_total(mean[0] + center, aleatoric, epistemic)


class ClassificationStream:
    """classification_uncertainty of an ensemble that does not fit: members' logits come a few at a time.

    It keeps the mean prediction and two numbers for each input, in float32 or more, and no gradients. The members so
    far and those that come are two groups: what epistemic adds up are their divergences from the group's mean, and
    those of the two means from the mean of all (Lin 1991, sec. V). None is negative, so nothing cancels.

    Args:
        unit: "nats" or "bits".
    Raises:
        ValueError: if unit is another; or, from update, if logits have other axes or are of other inputs.
        RuntimeError: from compute, before any update.
    Example:
        >>> stream = ClassificationStream(unit="bits")
        >>> for logits in torch.tensor([[[[200.0, 0.0]]], [[[0.0, 200.0]]]]):  # one member at a time
        ...     stream.update(logits)
        >>> stream.compute().epistemic
        tensor([1.])
    """

    _moments: tuple[Tensor, ...]  # log mean, aleatoric, epistemic

    def __init__(self, *, unit: Unit = "nats") -> None:
        check_unit("ClassificationStream", unit)
        self.unit = unit
        self.num_members = 0

    def update(self, logits: Tensor) -> None:
        """Takes the logits (k, B, C) of any number of members."""
        log_probs = _log_probs("ClassificationStream.update", _constant(logits))
        moments = _moments(log_probs)
        if self.num_members:
            check_same_inputs("ClassificationStream.update", self._moments[0].shape, log_probs.shape[1:])
            moments = _merged_moments(self._moments, moments, *_shares(self.num_members, len(logits)))
        self._moments = moments
        self.num_members += len(logits)

    def compute(self) -> Uncertainty:
        """Returns the classification_uncertainty of all members so far."""
        check_any_members("ClassificationStream.compute", "stream.update(logits)", self.num_members)
        log_mean, aleatoric, epistemic = self._moments
        return _in_total(log_mean.exp(), aleatoric, epistemic, self.unit)


class RegressionStream:
    """regression_uncertainty of an ensemble that does not fit: members' means and variances come a few at a time.

    It keeps four numbers for each target, in float32 or more, and no gradients. Groups of members are merged as by Chan
    et al. 1983, in differences from the first member's mean.

    Raises:
        ValueError: from update, if the shapes do not fit, a variance is negative, or they are of other inputs.
        RuntimeError: from compute, before any update.
    Example:
        >>> stream = RegressionStream()
        >>> stream.update(torch.tensor([[1.0]]), torch.tensor([[0.25]]))
        >>> stream.update(torch.tensor([[3.0]]), torch.tensor([[0.75]]))
        >>> stream.compute().total
        tensor([1.5000])
    """

    _first: Tensor
    _moments: tuple[Tensor, ...]  # mean, less the first member's; aleatoric, epistemic

    def __init__(self) -> None:
        self.num_members = 0

    def update(self, mean: Tensor, variance: Tensor) -> None:
        """Takes the means and variances (k, B, ...) of any number of members."""
        what, mean, variance = "RegressionStream.update", _constant(mean), _constant(variance)
        check_gaussian(what, mean.shape, variance.shape)
        _check_variance(what, variance, zero=True)
        if self.num_members:
            check_same_inputs(what, self._first.shape, mean.shape[1:])
        first = self._first if self.num_members else mean[0].clone()  # and not a view of all
        moments = _gaussian_moments(mean - first, variance)
        if self.num_members:
            moments = _merged_gaussian_moments(self._moments, moments, *_shares(self.num_members, len(mean)))
        self._first, self._moments = first, moments
        self.num_members += len(mean)

    def compute(self) -> Uncertainty:
        """Returns the regression_uncertainty of all members so far."""
        check_any_members("RegressionStream.compute", "stream.update(mean, variance)", self.num_members)
        center, aleatoric, epistemic = self._moments
        return _in_total(self._first + center, aleatoric, epistemic)


def log_mean_probs(logits: Tensor) -> Tensor:
    """Returns the logarithm of the mean prediction, log (1/E) sum_i softmax(z_i).

    Shape:
        logits (E, B, C). Returns (B, C).
    Example:
        >>> log_mean_probs(torch.zeros(3, 1, 2)).exp()
        tensor([[0.5000, 0.5000]])
    """
    return _log_mean(_log_probs("log_mean_probs", logits))


def mean_probs(logits: Tensor) -> Tensor:
    """Returns the mean prediction of the members, (1/E) sum_i softmax(z_i).

    Shape:
        logits (E, B, C). Returns (B, C), rows that add up to 1.
    Example:
        >>> mean_probs(torch.tensor([[[0.0, 0.0]], [[0.0, 100.0]]]))
        tensor([[0.2500, 0.7500]])
    """
    return _log_mean(_log_probs("mean_probs", logits)).exp()


def predictive_entropy(logits: Tensor, *, unit: Unit = "nats") -> Tensor:
    """Returns the total uncertainty: the entropy of the mean prediction.

    Shape:
        logits (E, B, C). Returns (B,), from 0 to log C, in nats or bits.
    Example:
        >>> predictive_entropy(torch.zeros(3, 1, 2), unit="bits")
        tensor([1.])
    """
    check_unit("predictive_entropy", unit)
    return _in_unit(_entropy(_log_mean(_log_probs("predictive_entropy", logits))), unit)


def expected_entropy(logits: Tensor, *, unit: Unit = "nats") -> Tensor:
    """Returns the aleatoric uncertainty: the mean of the members' entropies.

    Shape:
        logits (E, B, C). Returns (B,), from 0 to log C, in nats or bits.
    Example:
        >>> expected_entropy(torch.tensor([[[200.0, 0.0]], [[0.0, 200.0]]]))
        tensor([0.])
    """
    check_unit("expected_entropy", unit)
    return _in_unit(_entropy(_log_probs("expected_entropy", logits)).mean(0), unit)


def mutual_information(logits: Tensor, *, unit: Unit = "nats") -> Tensor:
    """Returns the epistemic uncertainty: the mean divergence KL(p_i || p) of the members from their mean.

    It equals predictive_entropy - expected_entropy (Houlsby et al. 2011, eq. 2), without their cancellation.

    Shape:
        logits (E, B, C). Returns (B,), from 0 to log E, in nats or bits.
    Example:
        >>> mutual_information(torch.tensor([[[200.0, 0.0]], [[0.0, 200.0]]]), unit="bits")
        tensor([1.])
    """
    check_unit("mutual_information", unit)
    log_probs = _log_probs("mutual_information", logits)
    return _in_unit(_divergence(log_probs, _log_mean(log_probs)[None]).mean(0), unit)


def pairwise_kl(logits: Tensor, *, unit: Unit = "nats") -> Tensor:
    """Returns the divergence KL(p_i || p_j) of each member from each other (Kullback and Leibler 1951).

    Shape:
        logits (E, B, C). Returns (E, E, B), at least 0 and in nats or bits, with [i, j] for KL(p_i || p_j) and 0 on
        the diagonal; on the way it takes E*E*B*C numbers.
    Example:
        >>> pairwise_kl(torch.tensor([[[0.0, 0.0]], [[100.0, 100.0]], [[200.0, 0.0]]]), unit="bits")[2, :, 0]
        tensor([1., 1., 0.])
    """
    check_unit("pairwise_kl", unit)
    log_probs = _log_probs("pairwise_kl", logits)
    return _in_unit(_divergence(log_probs[:, None], log_probs[None]), unit)


def disagreement(logits: Tensor) -> Tensor:
    """Returns the fraction of the pairs of members that predict different classes; 0 for a single member.

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
    at_least_float32 = torch.promote_types(logits.dtype, torch.float32)  # the number of pairs may be beyond float16
    return (differing.to(at_least_float32) / max(1, num_members * (num_members - 1))).to(logits.dtype)


def _log_probs(what: str, logits: Tensor) -> Tensor:
    """Returns log softmax, kept finite: below this bound the probability is 0 anyway."""
    check_logits(what, logits.shape)
    return logits.log_softmax(-1).clamp(min=torch.finfo(logits.dtype).min / 4)


def _log_mean(log_probs: Tensor) -> Tensor:
    return _at_most_zero(log_probs.logsumexp(0) - math.log(len(log_probs)))


def _at_most_zero(log_probs: Tensor) -> Tensor:
    return torch.where(log_probs > 0, 0.0, log_probs)  # rounding could make a probability larger than 1


def _entropy(log_probs: Tensor) -> Tensor:
    return (log_probs.exp() * -log_probs).sum(-1)


def _divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Returns KL(p || q) as the sum of p (log p - log q) + q - p.

    Each term is at least 0, and flat where p and q agree.
    """
    d = log_p - log_q
    up = d.relu()
    # the first term where p > q, the second elsewhere; of p and q themselves it would be a difference of roundings
    q_minus_p = log_p.exp() * (-up).expm1() - log_q.exp() * (d - up).expm1()
    return (log_p.exp() * d + q_minus_p).clamp(min=0).sum(-1)


def _moments(log_probs: Tensor) -> tuple[Tensor, ...]:
    """Returns the logarithm of the mean prediction, and aleatoric and epistemic uncertainty, in nats."""
    log_mean = _log_mean(log_probs)
    return log_mean, _entropy(log_probs).mean(0), _divergence(log_probs, log_mean[None]).mean(0)


def _merged_moments(a: tuple[Tensor, ...], b: tuple[Tensor, ...], v: float, w: float) -> tuple[Tensor, ...]:
    """Merges the moments of two groups of members, whose shares of all are v and w."""
    log_mean = _at_most_zero(torch.logaddexp(math.log(v) + a[0], math.log(w) + b[0]))
    of_a, of_b = a[2] + _divergence(a[0], log_mean), b[2] + _divergence(b[0], log_mean)
    return log_mean, v * a[1] + w * b[1], v * of_a + w * of_b


def _gaussian_moments(differences: Tensor, variance: Tensor) -> tuple[Tensor, ...]:
    """Returns mean, aleatoric and epistemic uncertainty of means that are differences from one of them."""
    center = differences.mean(0)
    return center, variance.mean(0), (differences - center[None]).square().mean(0)


def _merged_gaussian_moments(a: tuple[Tensor, ...], b: tuple[Tensor, ...], v: float, w: float) -> tuple[Tensor, ...]:
    """Merges the moments of two groups of members, whose shares of all are v and w."""
    apart = b[0] - a[0]
    return a[0] + w * apart, v * a[1] + w * b[1], v * a[2] + w * b[2] + v * w * apart.square()


def _constant(x: Tensor) -> Tensor:
    return x.detach().float() if x.dtype.itemsize < 4 else x.detach()


def _shares(num_a: int, num_b: int) -> tuple[float, float]:
    return num_a / (num_a + num_b), num_b / (num_a + num_b)


def _in_unit(nats: Tensor, unit: Unit) -> Tensor:
    return nats / math.log(2) if unit == "bits" else nats


def _in_total(mean: Tensor, aleatoric: Tensor, epistemic: Tensor, unit: Unit = "nats") -> Uncertainty:
    aleatoric, epistemic = _in_unit(aleatoric, unit), _in_unit(epistemic, unit)
    return Uncertainty(mean, aleatoric + epistemic, aleatoric, epistemic)


def _check_variance(what: str, variance: Tensor, zero: bool) -> None:
    if not torch.compiler.is_compiling():
        check_variance(what, variance, zero)
