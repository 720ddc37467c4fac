"""Calibration in bins of confidence: are predictions as often right as they say?

Bin k of n is (k/n, (k+1)/n], closed on the right: a confidence of 1 is in the last, and one of 0 in the first.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from probly_common.checks.judging import check_num_bins
from probly_torch.metrics._classification import _hits, _probs
from probly_torch.metrics._states import _Scores, _Sums


class ReliabilityBins(NamedTuple):
    """Values of a reliability diagram, by bins of confidence.

    Shape:
        each (num_bins,), or (E, num_bins) with per_member.
    Args:
        confidence: the mean largest probability of the inputs of each bin; NaN where it has none.
        accuracy: the share of them whose class is predicted; NaN where it has none.
        count: their number.
    Example:
        >>> reliability_bins(torch.zeros(3, 4, 2), torch.tensor([0, 0, 0, 1]), num_bins=2).accuracy
        tensor([0.7500,    nan])
    """

    confidence: Tensor
    accuracy: Tensor
    count: Tensor  # type: ignore[assignment]


def reliability_bins(logits: Tensor, labels: Tensor, *, num_bins: int = 15) -> ReliabilityBins:
    """Returns mean confidence, accuracy and count in bins of equal width (DeGroot and Fienberg 1983).

    They are those of the mean prediction.

    Shape:
        logits (E, B, C), labels (B,) of class indices. Returns three of (num_bins,).
    Args:
        logits: of the members.
        labels: class indices.
        num_bins: n bins (k/n, (k+1)/n].
    Raises:
        ValueError: if the shapes do not fit, or num_bins is below 1.
        TypeError: if labels are not integers.
    Example:
        >>> reliability_bins(torch.zeros(3, 4, 2), torch.tensor([0, 0, 0, 1]), num_bins=2).count
        tensor([4, 0])
    """
    return _means(*_top_label("reliability_bins", logits, labels, num_bins))


def ece(logits: Tensor, labels: Tensor, *, num_bins: int = 15) -> Tensor:
    """Returns the expected calibration error of the mean prediction, sum_k (n_k / N) |accuracy_k - confidence_k|.

    Confidence is the largest mean probability; bins are of equal width (Guo et al. 2017, eq. 3).

    Shape:
        logits (E, B, C), labels (B,) of class indices. Returns a scalar, from 0 to 1.
    Args:
        logits: of the members.
        labels: class indices.
        num_bins: n bins (k/n, (k+1)/n].
    Raises:
        ValueError: if the shapes do not fit, or num_bins is below 1.
        TypeError: if labels are not integers.
    Example:
        >>> ece(torch.zeros(3, 4, 2), torch.tensor([0, 0, 0, 1]))
        tensor(0.2500)
    """
    return _error(*_top_label("ece", logits, labels, num_bins))


def adaptive_ece(logits: Tensor, labels: Tensor, *, num_bins: int = 15) -> Tensor:
    """Returns the expected calibration error in bins that hold the same number of inputs, or one more.

    It is the error of the largest mean probability (Nguyen and O'Connor 2015; AdaECE of Mukhoti et al. 2020). Inputs of
    equal confidence count as equally right, so that their order does not matter. Where members give an input the same
    numbers in another order, its confidence can differ in the last bit. Then it is no longer equal.

    Shape:
        logits (E, B, C), labels (B,) of class indices. Returns a scalar, from 0 to 1.
    Args:
        logits: of the members.
        labels: class indices.
        num_bins: the number of bins.
    Raises:
        ValueError: if the shapes do not fit, or num_bins is below 1.
        TypeError: if labels are not integers.
    Example:
        >>> adaptive_ece(torch.zeros(3, 4, 2), torch.tensor([0, 0, 0, 1]), num_bins=2)
        tensor(0.2500)
    """
    check_num_bins("adaptive_ece", num_bins)
    probs = _probs("adaptive_ece", logits, labels)
    return _adaptive(probs.amax(-1), _hits(probs, labels).to(probs.dtype), num_bins)


def classwise_ece(logits: Tensor, labels: Tensor, *, num_bins: int = 15) -> Tensor:
    """Returns the mean over classes of the calibration error of each class's probability.

    A probability counts whether it is the largest or not. This is the static calibration error of Nixon et al. (2019),
    and the classwise-ECE of Kull et al. (2019).

    Shape:
        logits (E, B, C), labels (B,) of class indices. Returns a scalar, from 0 to 1.
    Args:
        logits: of the members.
        labels: class indices.
        num_bins: n bins (k/n, (k+1)/n].
    Raises:
        ValueError: if the shapes do not fit, or num_bins is below 1.
        TypeError: if labels are not integers.
    Example:
        >>> classwise_ece(torch.zeros(3, 4, 2), torch.tensor([0, 0, 0, 1]))
        tensor(0.2500)
    """
    return _error(*_every_label("classwise_ece", logits, labels, num_bins)).mean(-1)


class _TopLabelSums(_Sums):
    """Sums by bins of the largest probability."""

    confidence: Tensor
    correct: Tensor
    count: Tensor

    def __init__(self, *, num_bins: int = 15, per_member: bool = False, **kwargs: Any) -> None:
        check_num_bins(type(self).__name__, num_bins)
        super().__init__(per_member=per_member, **kwargs)
        self.num_bins = num_bins
        self._add_sum("confidence", num_bins)
        self._add_sum("correct", num_bins)
        self._add_sum("count", num_bins, dtype=torch.int64)

    def update(self, logits: Tensor, labels: Tensor) -> None:
        """Adds a batch."""
        bins = _top_label(type(self).__name__, logits, labels, self.num_bins, self.per_member, self.dtype)
        self._add(**dict(zip(("confidence", "correct", "count"), bins, strict=True)))


class ReliabilityCurve(_TopLabelSums):
    """Values of a reliability diagram: metrics.reliability_bins over batches.

    Memory does not grow with the inputs.

    Shape:
        update: logits (E, B, C), labels (B,) of class indices. compute: three of (num_bins,), or of (E, num_bins) with
        per_member.
    Args:
        num_bins: n bins (k/n, (k+1)/n].
        per_member: each member's own values.
    Raises:
        ValueError: if the shapes do not fit, or num_bins is below 1.
        TypeError: if labels are not integers.
    Example:
        >>> metric = ReliabilityCurve(num_bins=2)
        >>> metric.update(torch.zeros(3, 4, 2), torch.tensor([0, 0, 0, 1]))
        >>> metric.compute().accuracy
        tensor([0.7500,    nan], dtype=torch.float64)
    """

    def compute(self) -> ReliabilityBins:
        """Returns the bins of all inputs since the last reset."""
        return _means(self.confidence, self.correct, self.count)


class ECE(_TopLabelSums):
    """Expected calibration error of the mean prediction: metrics.ece over batches.

    Memory does not grow with the inputs.

    Shape:
        update: logits (E, B, C), labels (B,) of class indices. compute: a scalar, or (E,) with per_member.
    Args:
        num_bins: n bins (k/n, (k+1)/n].
        per_member: each member's own value.
    Raises:
        ValueError: if the shapes do not fit, or num_bins is below 1.
        TypeError: if labels are not integers.
    Example:
        >>> metric = ECE()
        >>> metric.update(torch.zeros(3, 4, 2), torch.tensor([0, 0, 0, 1]))
        >>> metric.compute()
        tensor(0.2500, dtype=torch.float64)
    """

    higher_is_better = False

    def compute(self) -> Tensor:
        """Returns the error over all inputs since the last reset; NaN before the first."""
        return _error(self.confidence, self.correct, self.count)


class ClasswiseECE(_Sums):
    """Mean over classes of the calibration error of each class's probability: metrics.classwise_ece over batches.

    Memory does not grow with the inputs.

    Shape:
        update: logits (E, B, C), labels (B,) of class indices. compute: a scalar, or (E,) with per_member.
    Args:
        num_bins: n bins (k/n, (k+1)/n].
        per_member: each member's own value.
    Raises:
        ValueError: if the shapes do not fit, or num_bins is below 1.
        TypeError: if labels are not integers.
    Example:
        >>> metric = ClasswiseECE()
        >>> metric.update(torch.zeros(3, 4, 2), torch.tensor([0, 0, 0, 1]))
        >>> metric.compute()
        tensor(0.2500, dtype=torch.float64)
    """

    higher_is_better = False
    class_confidence: Tensor
    class_correct: Tensor
    class_count: Tensor

    def __init__(self, *, num_bins: int = 15, per_member: bool = False, **kwargs: Any) -> None:
        check_num_bins("ClasswiseECE", num_bins)
        super().__init__(per_member=per_member, **kwargs)
        self.num_bins = num_bins
        self._add_sum("class_confidence", 1, num_bins)  # one class, until the first update tells how many there are
        self._add_sum("class_correct", 1, num_bins)
        self._add_sum("class_count", 1, num_bins, dtype=torch.int64)

    def update(self, logits: Tensor, labels: Tensor) -> None:
        """Adds a batch."""
        bins = _every_label("ClasswiseECE", logits, labels, self.num_bins, self.per_member, self.dtype)
        self._add(**dict(zip(("class_confidence", "class_correct", "class_count"), bins, strict=True)))

    def compute(self) -> Tensor:
        """Returns the error over all inputs since the last reset; NaN before the first."""
        return _error(self.class_confidence, self.class_correct, self.class_count).mean(-1)


class AdaptiveECE(_Scores):
    """Expected calibration error in bins that hold the same number of inputs: metrics.adaptive_ece of all batches.

    The bins are known when all inputs are, so two numbers are kept of each.

    Shape:
        update: logits (E, B, C), labels (B,) of class indices. compute: a scalar, or (E,) with per_member.
    Args:
        num_bins: the number of bins.
        per_member: each member's own value.
    Raises:
        ValueError: if the shapes do not fit, or num_bins is below 1.
        TypeError: if labels are not integers.
        RuntimeError: from compute, before any update.
    Example:
        >>> metric = AdaptiveECE()
        >>> metric.update(torch.zeros(3, 4, 2), torch.tensor([0, 0, 0, 1]))
        >>> metric.compute()
        tensor(0.2500, dtype=torch.float64)
    """

    higher_is_better = False

    def __init__(self, *, num_bins: int = 15, per_member: bool = False, **kwargs: Any) -> None:
        check_num_bins("AdaptiveECE", num_bins)
        super().__init__("confidence", "correct", **kwargs)
        self.num_bins, self.per_member = num_bins, per_member

    def update(self, logits: Tensor, labels: Tensor) -> None:
        """Adds a batch."""
        probs = _probs("AdaptiveECE", logits, labels, self.per_member)
        self._append(confidence=probs.amax(-1), correct=_hits(probs, labels))

    def compute(self) -> Tensor:
        """Returns the error over all inputs since the last reset."""
        members = zip(self._all("confidence"), self._all("correct"), strict=True)
        errors = [_adaptive(*each, self.num_bins) for each in members]
        return torch.stack(errors) if self.per_member else errors[0]


Bins = tuple[Tensor, Tensor, Tensor]


def _top_label(
    what: str,
    logits: Tensor,
    labels: Tensor,
    num_bins: int,
    per_member: bool = False,
    dtype: torch.dtype | None = None,
) -> Bins:
    """Returns sums [..., num_bins] by bins of the largest probability."""
    check_num_bins(what, num_bins)
    probs = _probs(what, logits, labels, per_member)
    return _binned(probs.amax(-1), _hits(probs, labels), num_bins, dtype or probs.dtype)


def _every_label(
    what: str,
    logits: Tensor,
    labels: Tensor,
    num_bins: int,
    per_member: bool = False,
    dtype: torch.dtype | None = None,
) -> Bins:
    """Returns sums [..., C, num_bins] by bins of each class's probability."""
    check_num_bins(what, num_bins)
    probs = _probs(what, logits, labels, per_member)
    is_label = one_hot(labels.long(), probs.shape[-1]).expand_as(probs)
    return _binned(probs.mT, is_label.mT, num_bins, dtype or probs.dtype)


def _binned(confidence: Tensor, correct: Tensor, num_bins: int, dtype: torch.dtype) -> Bins:
    """Returns sums of confidence and correct [..., B], and counts, by bins of confidence: three of [..., num_bins]."""
    edges = torch.tensor([k / num_bins for k in range(1, num_bins)], dtype=confidence.dtype, device=confidence.device)
    index = torch.bucketize(confidence.contiguous(), edges)  # closed on the right
    empty = confidence.new_zeros(*confidence.shape[:-1], num_bins, dtype=dtype)
    sums, hits = (empty.scatter_add(-1, index, each.to(dtype)) for each in (confidence, correct))
    return sums, hits, empty.long().scatter_add(-1, index, torch.ones_like(index))


def _means(confidence: Tensor, correct: Tensor, count: Tensor) -> ReliabilityBins:
    return ReliabilityBins(confidence / count, correct / count, count)


def _error(confidence: Tensor, correct: Tensor, count: Tensor) -> Tensor:
    """Returns sum_k (n_k / N) |correct_k / n_k - confidence_k / n_k|, where n_k cancels."""
    return (correct - confidence).abs().sum(-1) / count.sum(-1)


def _adaptive(confidence: Tensor, correct: Tensor, num_bins: int) -> Tensor:
    """Returns the adaptive calibration error of all inputs [N]."""
    confidence, order = confidence.sort()
    num_inputs = len(confidence)
    difference = _mean_of_ties(confidence, correct[order]) - confidence
    index = torch.arange(num_inputs, device=confidence.device) * num_bins // max(num_inputs, 1)
    return difference.new_zeros(num_bins).scatter_add(0, index, difference).abs().sum() / num_inputs


def _mean_of_ties(scores: Tensor, values: Tensor) -> Tensor:
    """Replaces each value [N] by the mean of the values that have its score, for sorted scores."""
    first, last = torch.searchsorted(scores, scores), torch.searchsorted(scores, scores, right=True)
    sums = torch.cat([values.new_zeros(1), values.cumsum(0)])
    return (sums[last] - sums[first]) / (last - first)
