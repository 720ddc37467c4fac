"""How well uncertainty tells which inputs to leave to others: those predicted wrongly, and those unlike any."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from probly_common.checks.judging import check_is_ood, check_scores, check_uncertainty
from probly_torch.metrics._calibration import _mean_of_ties
from probly_torch.metrics._classification import _at_least_float32, _hits, _probs
from probly_torch.metrics._states import _Scores


def aurc(logits: Tensor, labels: Tensor, *, uncertainty: Tensor | None = None) -> Tensor:
    """Returns the area under the risk-coverage curve.

    It is the error among the k most certain inputs, averaged over k = 1..N. The error is that of the mean prediction
    (Geifman, Uziel and El-Yaniv 2019). Inputs of equal uncertainty count as equally wrong, so that their order does not
    matter. Where members give an input the same numbers in another order, its uncertainty can differ in the last bit.
    Then it is no longer equal.

    Shape:
        logits (E, B, C), labels (B,) of class indices, uncertainty (B,). Returns a scalar, from 0 to 1.
    Args:
        logits: of the members.
        labels: class indices.
        uncertainty: larger for less certain inputs, as mutual_information(logits); unless given, 1 - the largest mean
            probability.
    Raises:
        ValueError: if the shapes do not fit.
        TypeError: if labels are not integers.
    Example:
        >>> logits = torch.tensor([[[9.0, 0.0], [0.0, 5.0], [1.0, 0.0]]])
        >>> aurc(logits, torch.tensor([0, 1, 1]))  # wrong in the least certain of three
        tensor(0.1111)
    """
    return _aurc(*_uncertainty_and_wrong("aurc", logits, labels, uncertainty))


def ood_auroc(in_scores: Tensor, out_scores: Tensor) -> Tensor:
    """Returns the probability that an input from outside the distribution has a larger score than one from inside.

    It is the area under the ROC curve with out-of-distribution as the positive class. Equal scores count one half.
    Scores are compared as they are: torchmetrics' BinaryAUROC takes those outside [0, 1] through a sigmoid, which makes
    large ones equal.

    Shape:
        in_scores (N,), out_scores (M,). Returns a scalar, from 0 to 1; NaN if a score is.
    Args:
        in_scores: of inputs from inside the distribution, larger for less familiar ones: any uncertainty.
        out_scores: of inputs from outside.
    Raises:
        ValueError: if there are no inputs of one kind, or scores have more axes than one.
    Example:
        >>> ood_auroc(torch.tensor([0.0, 1.0]), torch.tensor([1.0, 2.0]))
        tensor(0.8750)
    """
    return _auroc(*_floats("ood_auroc", in_scores, out_scores))


def ood_fpr95(in_scores: Tensor, out_scores: Tensor) -> Tensor:
    """Returns the share of inputs from inside that are flagged when at least 95 % of those from outside are.

    Inside and outside are those of the distribution. An input is flagged if score >= threshold. The share is the false
    positive rate at the largest threshold whose true positive rate is 95 % or more, with out-of-distribution as the
    positive class (Hendrycks, Mazeika and Dietterich 2019, sec. 4.1).

    Shape:
        in_scores (N,), out_scores (M,). Returns a scalar, from 0 to 1; NaN if a score is.
    Args:
        in_scores: of inputs from inside the distribution, larger for less familiar ones: any uncertainty.
        out_scores: of inputs from outside.
    Raises:
        ValueError: if there are no inputs of one kind, or scores have more axes than one.
    Example:
        >>> ood_fpr95(torch.tensor([0.0, 1.0]), torch.tensor([1.0, 2.0]))
        tensor(0.5000)
    """
    return _fpr95(*_floats("ood_fpr95", in_scores, out_scores))


class AURC(_Scores):
    """Area under the risk-coverage curve: metrics.aurc of all batches.

    The order is known when all inputs are, so two numbers are kept of each.

    Shape:
        update: logits (E, B, C), labels (B,) of class indices, uncertainty (B,), or (E, B) with per_member. compute: a
        scalar, or (E,) with per_member.
    Args:
        per_member: each member's own value.
    Raises:
        ValueError: if the shapes do not fit.
        TypeError: if labels are not integers.
        RuntimeError: from compute, before any update.
    Example:
        >>> metric = AURC()
        >>> metric.update(torch.tensor([[[9.0, 0.0], [0.0, 5.0], [1.0, 0.0]]]), torch.tensor([0, 1, 1]))
        >>> metric.compute()
        tensor(0.1111, dtype=torch.float64)
    """

    higher_is_better = False

    def __init__(self, *, per_member: bool = False, **kwargs: Any) -> None:
        super().__init__("uncertainty", "wrong", **kwargs)
        self.per_member = per_member

    def update(self, logits: Tensor, labels: Tensor, uncertainty: Tensor | None = None) -> None:
        """Adds a batch."""
        uncertainty, wrong = _uncertainty_and_wrong("AURC", logits, labels, uncertainty, self.per_member)
        self._append(uncertainty=uncertainty, wrong=wrong)

    def compute(self) -> Tensor:
        """Returns the area over all inputs since the last reset."""
        areas = [_aurc(*each) for each in zip(self._all("uncertainty"), self._all("wrong"), strict=True)]
        return torch.stack(areas) if self.per_member else areas[0]


class _DetectionScores(_Scores):
    """Scores, and which of them are of inputs from outside."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__("scores", "is_ood", **kwargs)

    def update(self, scores: Tensor, is_ood: Tensor) -> None:
        """Adds a batch, of inputs from inside, from outside or both."""
        check_is_ood(type(self).__name__, scores.shape, is_ood.shape, is_ood.dtype)
        self._append(scores=scores, is_ood=is_ood)


class OODAUROC(_DetectionScores):
    """Probability that an input from outside has a larger score than one from inside: metrics.ood_auroc of all batches.

    Every score is kept.

    Shape:
        update: scores (B,), is_ood (B,) of booleans. compute: a scalar.
    Raises:
        ValueError: if the shapes do not fit; or from compute, if there are no inputs of one kind.
        TypeError: if is_ood are not booleans.
        RuntimeError: from compute, before any update.
    Example:
        >>> metric = OODAUROC()
        >>> metric.update(torch.tensor([0.0, 1.0]), torch.tensor([False, False]))
        >>> metric.update(torch.tensor([1.0, 2.0]), torch.tensor([True, True]))
        >>> metric.compute()
        tensor(0.8750, dtype=torch.float64)
    """

    higher_is_better = True

    def compute(self) -> Tensor:
        """Returns the probability over all pairs of inputs since the last reset."""
        (scores,), (is_ood,) = self._all("scores"), self._all("is_ood")
        return _auroc(*_floats("OODAUROC", scores[is_ood == 0], scores[is_ood == 1]))


class OODFPR95(_DetectionScores):
    """Share of the inputs from inside that are flagged when 95 % of those from outside are: metrics.ood_fpr95.

    Every score is kept.

    Shape:
        update: scores (B,), is_ood (B,) of booleans. compute: a scalar.
    Raises:
        ValueError: if the shapes do not fit; or from compute, if there are no inputs of one kind.
        TypeError: if is_ood are not booleans.
        RuntimeError: from compute, before any update.
    Example:
        >>> metric = OODFPR95()
        >>> metric.update(torch.tensor([0.0, 1.0]), torch.tensor([False, False]))
        >>> metric.update(torch.tensor([1.0, 2.0]), torch.tensor([True, True]))
        >>> metric.compute()
        tensor(0.5000, dtype=torch.float64)
    """

    higher_is_better = False

    def compute(self) -> Tensor:
        """Returns the share of all inputs from inside since the last reset."""
        (scores,), (is_ood,) = self._all("scores"), self._all("is_ood")
        return _fpr95(*_floats("OODFPR95", scores[is_ood == 0], scores[is_ood == 1]))


def _uncertainty_and_wrong(
    what: str, logits: Tensor, labels: Tensor, uncertainty: Tensor | None, per_member: bool = False
) -> tuple[Tensor, Tensor]:
    """Returns the uncertainty of each input, and 1 where its prediction is wrong, else 0: both [B], or [E, B]."""
    probs = _probs(what, logits, labels, per_member)
    wrong = 1 - _hits(probs, labels).to(probs.dtype)
    if uncertainty is None:
        return -probs.amax(-1), wrong
    check_uncertainty(what, wrong.shape, uncertainty.shape)
    return uncertainty, wrong


def _aurc(uncertainty: Tensor, wrong: Tensor) -> Tensor:
    """Returns the area under the risk-coverage curve of all inputs [N]."""
    return _risks(uncertainty, wrong).mean()


def _risks(uncertainty: Tensor, wrong: Tensor) -> Tensor:
    """Returns the error among the k most certain of inputs [N], for k = 1..N: [N]."""
    ordered, order = uncertainty.sort()
    errors = _mean_of_ties(ordered, wrong[order]).cumsum(0)
    risks = errors / torch.arange(1, len(errors) + 1, device=errors.device)
    return risks.masked_fill(uncertainty.isnan().any(), torch.nan)


def _floats(what: str, in_scores: Tensor, out_scores: Tensor) -> tuple[Tensor, Tensor]:
    check_scores(what, in_scores.shape, out_scores.shape)
    in_scores, out_scores = _at_least_float32(in_scores), _at_least_float32(out_scores)
    dtype = torch.promote_types(in_scores.dtype, out_scores.dtype)
    return in_scores.to(dtype), out_scores.to(dtype)


def _auroc(in_scores: Tensor, out_scores: Tensor) -> Tensor:
    """Returns the area under the ROC curve.

    For each input from outside it counts those from inside that are below, and those that are not above.
    """
    inside = in_scores.sort().values
    below, not_above = torch.searchsorted(inside, out_scores), torch.searchsorted(inside, out_scores, right=True)
    return _nan_of(in_scores, out_scores, (below + not_above).to(inside.dtype).mean() / (2 * len(inside)))


def _fpr95(in_scores: Tensor, out_scores: Tensor) -> Tensor:
    flagged = (19 * len(out_scores) + 19) // 20  # 95 %, rounded up
    threshold = out_scores.sort(descending=True).values[flagged - 1]
    return _nan_of(in_scores, out_scores, (in_scores >= threshold).to(in_scores.dtype).mean())


def _nan_of(in_scores: Tensor, out_scores: Tensor, value: Tensor) -> Tensor:
    return value.masked_fill(in_scores.isnan().any() | out_scores.isnan().any(), torch.nan)
