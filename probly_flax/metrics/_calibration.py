"""Calibration in bins of confidence: are predictions as often right as they say?

Bin k of n is (k/n, (k+1)/n], closed on the right: a confidence of 1 is in the last, and one of 0 in the first.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from probly_common.checks.judging import check_ignored, check_num_bins
from probly_flax.metrics._classification import _hits, _is_label, _probs
from probly_flax.metrics._states import _Scores, _Sums


class ReliabilityBins(NamedTuple):
    """Values of a reliability diagram, by bins of confidence.

    Shape:
        each (num_bins,), or (E, num_bins) with per_member.
    Args:
        confidence: the mean largest probability of the inputs of each bin; NaN where it has none.
        accuracy: the share of them whose class is predicted; NaN where it has none.
        count: their number.
    Example:
        >>> reliability_bins(jnp.zeros((3, 4, 2)), jnp.array([0, 0, 0, 1]), num_bins=2).accuracy
        Array([0.75,  nan], dtype=float32)
    """

    confidence: Array
    accuracy: Array
    count: Array  # type: ignore[assignment]


def reliability_bins(logits: Array, labels: Array, *, num_bins: int = 15) -> ReliabilityBins:
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
        >>> reliability_bins(jnp.zeros((3, 4, 2)), jnp.array([0, 0, 0, 1]), num_bins=2).count
        Array([4, 0], dtype=int32)
    """
    return _means(*_top_label("reliability_bins", logits, labels, num_bins))


def ece(logits: Array, labels: Array, *, num_bins: int = 15) -> Array:
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
        >>> ece(jnp.zeros((3, 4, 2)), jnp.array([0, 0, 0, 1]))
        Array(0.25, dtype=float32)
    """
    return _error(*_top_label("ece", logits, labels, num_bins))


def adaptive_ece(logits: Array, labels: Array, *, num_bins: int = 15) -> Array:
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
        >>> adaptive_ece(jnp.zeros((3, 4, 2)), jnp.array([0, 0, 0, 1]), num_bins=2)
        Array(0.25, dtype=float32)
    """
    check_num_bins("adaptive_ece", num_bins)
    probs = _probs("adaptive_ece", logits, labels)
    return _adaptive(probs.max(-1), _hits(probs, labels), num_bins)


def classwise_ece(logits: Array, labels: Array, *, num_bins: int = 15) -> Array:
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
        >>> classwise_ece(jnp.zeros((3, 4, 2)), jnp.array([0, 0, 0, 1]))
        Array(0.25, dtype=float32)
    """
    return _error(*_every_label("classwise_ece", logits, labels, num_bins)).mean(-1)


class _TopLabelSums(_Sums):
    """Sums by bins of the largest probability."""

    def __init__(self, *, num_bins: int = 15, per_member: bool = False) -> None:
        check_num_bins(type(self).__name__, num_bins)
        super().__init__(per_member=per_member)
        self.num_bins = num_bins
        self._add_sum("confidence", num_bins)
        self._add_sum("correct", num_bins)
        self._add_sum("count", num_bins, dtype=int)

    def update(self, *, logits: Array, labels: Array, **ignored: Any) -> None:  # type: ignore[override]
        """Adds a batch."""
        check_ignored(type(self).__name__, ignored)
        bins = _top_label(type(self).__name__, logits, labels, self.num_bins, self.per_member)
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
        >>> metric.update(logits=jnp.zeros((3, 4, 2)), labels=jnp.array([0, 0, 0, 1]))
        >>> metric.compute().accuracy
        Array([0.75,  nan], dtype=float32)
    """

    def compute(self) -> ReliabilityBins:
        """Returns the bins of all inputs since the last reset."""
        return _means(*map(self._sum, ("confidence", "correct", "count")))


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
        >>> metric.update(logits=jnp.zeros((3, 4, 2)), labels=jnp.array([0, 0, 0, 1]))
        >>> metric.compute()
        Array(0.25, dtype=float32)
    """

    def compute(self) -> Array:
        """Returns the error over all inputs since the last reset; NaN before the first."""
        return _error(*map(self._sum, ("confidence", "correct", "count")))


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
        >>> metric.update(logits=jnp.zeros((3, 4, 2)), labels=jnp.array([0, 0, 0, 1]))
        >>> metric.compute()
        Array(0.25, dtype=float32)
    """

    def __init__(self, *, num_bins: int = 15, per_member: bool = False) -> None:
        check_num_bins("ClasswiseECE", num_bins)
        super().__init__(per_member=per_member)
        self.num_bins = num_bins
        self._add_sum("class_confidence", 0, num_bins)  # one class, until the first update tells how many there are
        self._add_sum("class_correct", 0, num_bins)
        self._add_sum("class_count", 0, num_bins, dtype=int)

    def update(self, *, logits: Array, labels: Array, **ignored: Any) -> None:  # type: ignore[override]
        """Adds a batch."""
        check_ignored("ClasswiseECE", ignored)
        bins = _every_label("ClasswiseECE", logits, labels, self.num_bins, self.per_member)
        self._add(**dict(zip(("class_confidence", "class_correct", "class_count"), bins, strict=True)))

    def compute(self) -> Array:
        """Returns the error over all inputs since the last reset; NaN before the first."""
        return _error(*map(self._sum, ("class_confidence", "class_correct", "class_count"))).mean(-1)


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
        >>> metric.update(logits=jnp.zeros((3, 4, 2)), labels=jnp.array([0, 0, 0, 1]))
        >>> metric.compute()
        Array(0.25, dtype=float32)
    """

    def __init__(self, *, num_bins: int = 15, per_member: bool = False) -> None:
        check_num_bins("AdaptiveECE", num_bins)
        super().__init__("confidence", "correct")
        self.num_bins, self.per_member = num_bins, per_member

    def update(self, *, logits: Array, labels: Array, **ignored: Any) -> None:  # type: ignore[override]
        """Adds a batch."""
        check_ignored("AdaptiveECE", ignored)
        probs = _probs("AdaptiveECE", logits, labels, self.per_member)
        self._append(confidence=probs.max(-1), correct=_hits(probs, labels))

    def compute(self) -> Array:
        """Returns the error over all inputs since the last reset."""
        error = partial(_adaptive, num_bins=self.num_bins)
        return (jax.vmap(error) if self.per_member else error)(self._all("confidence"), self._all("correct"))


Bins = tuple[Array, Array, Array]


def _top_label(what: str, logits: Array, labels: Array, num_bins: int, per_member: bool = False) -> Bins:
    """Returns sums [..., num_bins] by bins of the largest probability."""
    check_num_bins(what, num_bins)
    probs = _probs(what, logits, labels, per_member)
    return _binned(probs.max(-1), _hits(probs, labels), num_bins)


def _every_label(what: str, logits: Array, labels: Array, num_bins: int, per_member: bool = False) -> Bins:
    """Returns sums [..., C, num_bins] by bins of each class's probability."""
    check_num_bins(what, num_bins)
    probs = _probs(what, logits, labels, per_member)
    return _binned(probs.mT, _is_label(probs, labels).mT, num_bins)


def _binned(confidence: Array, correct: Array, num_bins: int) -> Bins:
    """Returns sums of confidence and correct [..., B], and counts, by bins of confidence: three of [..., num_bins]."""
    edges = jnp.array([k / num_bins for k in range(1, num_bins)], confidence.dtype)
    index = jnp.searchsorted(edges, confidence, method="compare_all")  # closed on the right
    rows = math.prod(confidence.shape[:-1])
    add = jax.vmap(partial(jax.ops.segment_sum, num_segments=num_bins))

    def sums(values: Array) -> Array:
        return add(values.reshape(rows, -1), index.reshape(rows, -1)).reshape(*confidence.shape[:-1], num_bins)

    return sums(confidence), sums(correct), sums(jnp.ones_like(index, int))


def _means(confidence: Array, correct: Array, count: Array) -> ReliabilityBins:
    number = count.astype(confidence.dtype)
    return ReliabilityBins(confidence / number, correct / number, count)


def _error(confidence: Array, correct: Array, count: Array) -> Array:
    """Returns sum_k (n_k / N) |correct_k / n_k - confidence_k / n_k|, where n_k cancels."""
    return jnp.abs(correct - confidence).sum(-1) / count.sum(-1).astype(confidence.dtype)


def _adaptive(confidence: Array, correct: Array, num_bins: int) -> Array:
    """Returns the adaptive calibration error of all inputs [N]."""
    order = confidence.argsort()
    confidence, num_inputs = confidence[order], len(confidence)
    difference = _mean_of_ties(confidence, correct[order]) - confidence
    index = jnp.arange(num_inputs) * num_bins // max(num_inputs, 1)
    return jnp.abs(jax.ops.segment_sum(difference, index, num_bins)).sum() / num_inputs


def _mean_of_ties(scores: Array, values: Array) -> Array:
    """Replaces each value [N] by the mean of the values that have its score, for sorted scores."""
    first, last = jnp.searchsorted(scores, scores), jnp.searchsorted(scores, scores, side="right")
    sums = jnp.concatenate([jnp.zeros(1, values.dtype), values.cumsum()])
    return (sums[last] - sums[first]) / (last - first).astype(values.dtype)
