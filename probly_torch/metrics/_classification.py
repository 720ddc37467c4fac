"""How good predictions of classes are, and how much members differ."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from probly_common.checks.judging import check_labels, check_logits
from probly_torch.metrics._states import _Mean, _Sums
from probly_torch.uncertainty import disagreement, log_mean_probs, mutual_information


def accuracy(logits: Tensor, labels: Tensor) -> Tensor:
    """Returns the share of the inputs whose class has the largest mean probability.

    Shape:
        logits (E, B, C), labels (B,) of class indices. Returns a scalar.
    Raises:
        ValueError: if the shapes do not fit.
        TypeError: if labels are not integers.
    Example:
        >>> accuracy(torch.tensor([[[0.0, 0.0], [1.0, 0.0]], [[0.0, 9.0], [0.0, 0.5]]]), torch.tensor([1, 1]))
        tensor(0.5000)
    """
    probs = _probs("accuracy", logits, labels)
    return _hits(probs, labels).to(probs.dtype).mean()


def nll(logits: Tensor, labels: Tensor) -> Tensor:
    """Returns the negative log-likelihood of the mean prediction, -log (1/E) sum_i softmax(z_i)[label], in nats.

    It is losses.mixture_cross_entropy without options.

    Shape:
        logits (E, B, C), labels (B,) of class indices. Returns a scalar.
    Raises:
        ValueError: if the shapes do not fit.
        TypeError: if labels are not integers.
    Example:
        >>> nll(torch.tensor([[[0.0, 0.0]], [[0.0, 100.0]]]), torch.tensor([1])).exp()
        tensor(1.3333)
    """
    return _nll("nll", logits, labels).mean()


def brier(logits: Tensor, labels: Tensor) -> Tensor:
    """Returns the Brier score of the mean prediction, sum_c (p_c - [c = label])^2 (Brier 1950): from 0 to 2.

    Shape:
        logits (E, B, C), labels (B,) of class indices. Returns a scalar.
    Raises:
        ValueError: if the shapes do not fit.
        TypeError: if labels are not integers.
    Example:
        >>> brier(torch.tensor([[[0.0, 0.0]], [[0.0, 100.0]]]), torch.tensor([1]))
        tensor(0.1250)
    """
    return _brier(_probs("brier", logits, labels), labels).mean()


def diversity(logits: Tensor, labels: Tensor) -> Tensor:
    """Returns how often two members differ, relative to how often one is wrong.

    It is their mean disagreement / (1 - their mean accuracy). It goes from 0, where members predict the same, to 2,
    where only one member is wrong at a time (Fort, Hu and Lakshminarayanan 2019, sec. 4.2.2). It is NaN where no member
    errs.

    Shape:
        logits (E, B, C), labels (B,) of class indices. Returns a scalar.
    Raises:
        ValueError: if the shapes do not fit.
        TypeError: if labels are not integers.
    Example:
        >>> diversity(torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]]), torch.tensor([1]))
        tensor(2.)
    """
    differing, wrong = _diversity("diversity", logits, labels)
    return differing.mean() / wrong.mean()


class Accuracy(_Mean):
    """Share of the inputs whose class is predicted: metrics.accuracy over batches.

    Shape:
        update: logits (E, B, C), labels (B,) of class indices. compute: a scalar, or (E,) with per_member.
    Args:
        per_member: each member's own value.
    Raises:
        ValueError: if the shapes do not fit.
        TypeError: if labels are not integers.
    Example:
        >>> metric = Accuracy()
        >>> metric.update(torch.tensor([[[0.0, 1.0], [1.0, 0.0]]]), torch.tensor([1, 1]))
        >>> metric.compute()
        tensor(0.5000, dtype=torch.float64)
    """

    higher_is_better = True

    def __init__(self, *, per_member: bool = False, **kwargs: Any) -> None:
        super().__init__("correct", per_member=per_member, **kwargs)

    def update(self, logits: Tensor, labels: Tensor) -> None:
        """Adds a batch."""
        self._add_values(_hits(_probs("Accuracy", logits, labels, self.per_member), labels))


class NLL(_Mean):
    """Negative log-likelihood of the mean prediction, in nats: metrics.nll over batches.

    Shape:
        update: logits (E, B, C), labels (B,) of class indices. compute: a scalar, or (E,) with per_member.
    Args:
        per_member: each member's own value.
    Raises:
        ValueError: if the shapes do not fit.
        TypeError: if labels are not integers.
    Example:
        >>> metric = NLL()
        >>> metric.update(torch.zeros(3, 4, 2), torch.tensor([0, 1, 1, 0]))
        >>> metric.compute().exp()
        tensor(2.0000, dtype=torch.float64)
    """

    higher_is_better = False

    def __init__(self, *, per_member: bool = False, **kwargs: Any) -> None:
        super().__init__("nll", per_member=per_member, **kwargs)

    def update(self, logits: Tensor, labels: Tensor) -> None:
        """Adds a batch."""
        self._add_values(_nll("NLL", logits, labels, self.per_member))


class Brier(_Mean):
    """Brier score of the mean prediction, from 0 to 2: metrics.brier over batches.

    Shape:
        update: logits (E, B, C), labels (B,) of class indices. compute: a scalar, or (E,) with per_member.
    Args:
        per_member: each member's own value.
    Raises:
        ValueError: if the shapes do not fit.
        TypeError: if labels are not integers.
    Example:
        >>> metric = Brier()
        >>> metric.update(torch.zeros(3, 4, 2), torch.tensor([0, 1, 1, 0]))
        >>> metric.compute()
        tensor(0.5000, dtype=torch.float64)
    """

    higher_is_better = False

    def __init__(self, *, per_member: bool = False, **kwargs: Any) -> None:
        super().__init__("brier", per_member=per_member, **kwargs)

    def update(self, logits: Tensor, labels: Tensor) -> None:
        """Adds a batch."""
        self._add_values(_brier(_probs("Brier", logits, labels, self.per_member), labels))


class MutualInformation(_Mean):
    """Mean epistemic uncertainty of the inputs, in nats: uncertainty.mutual_information over batches.

    Shape:
        update: logits (E, B, C); labels are not needed. compute: a scalar.
    Raises:
        ValueError: if logits have no member axis.
    Example:
        >>> metric = MutualInformation()
        >>> metric.update(torch.tensor([[[100.0, 0.0]], [[0.0, 100.0]]]))
        >>> metric.compute().exp()
        tensor(2.0000, dtype=torch.float64)
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__("mutual_information", **kwargs)

    def update(self, logits: Tensor, labels: Tensor | None = None) -> None:
        """Adds a batch."""
        self._add_values(mutual_information(_at_least_float32(logits)))


class Disagreement(_Mean):
    """Share of the pairs of members that predict different classes: uncertainty.disagreement over batches.

    Shape:
        update: logits (E, B, C); labels are not needed. compute: a scalar.
    Raises:
        ValueError: if logits have no member axis.
    Example:
        >>> metric = Disagreement()
        >>> metric.update(torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]]))
        >>> metric.compute()
        tensor(1., dtype=torch.float64)
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__("disagreement", **kwargs)

    def update(self, logits: Tensor, labels: Tensor | None = None) -> None:
        """Adds a batch."""
        self._add_values(disagreement(_at_least_float32(logits)))


class Diversity(_Sums):
    """Mean disagreement of two members / (1 - the members' mean accuracy): metrics.diversity over batches.

    Shape:
        update: logits (E, B, C), labels (B,) of class indices. compute: a scalar.
    Raises:
        ValueError: if the shapes do not fit.
        TypeError: if labels are not integers.
    Example:
        >>> metric = Diversity()
        >>> metric.update(torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]]), torch.tensor([1]))
        >>> metric.compute()
        tensor(2., dtype=torch.float64)
    """

    higher_is_better = True
    differing: Tensor
    wrong: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._add_sum("differing")
        self._add_sum("wrong")

    def update(self, logits: Tensor, labels: Tensor) -> None:
        """Adds a batch."""
        differing, wrong = _diversity("Diversity", logits, labels)
        self._add(differing=differing.sum(dtype=self.dtype), wrong=wrong.sum(dtype=self.dtype))

    def compute(self) -> Tensor:
        """Returns the quotient over all inputs since the last reset; NaN where no member errs."""
        return self.differing / self.wrong


def _at_least_float32(logits: Tensor) -> Tensor:
    """Converts half precision to float32, since its digits are too few for what is summed over thousands of inputs."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _checked(what: str, logits: Tensor, labels: Tensor) -> Tensor:
    check_logits(what, logits.shape)
    check_labels(what, logits.shape, labels.shape, labels.dtype, each=False)
    return _at_least_float32(logits)


def _probs(what: str, logits: Tensor, labels: Tensor, per_member: bool = False) -> Tensor:
    """Returns the probabilities of the mixture (B, C), or of each member (E, B, C)."""
    probs = _checked(what, logits, labels).softmax(-1)
    return probs if per_member else probs.mean(0)


def _of_label(values: Tensor, labels: Tensor) -> Tensor:
    """Returns the entry [..., B] of each label in values [..., B, C].

    Labels out of range are errors.
    """
    return values.gather(-1, labels.long().expand(values.shape[:-1])[..., None])[..., 0]


def _hits(scores: Tensor, labels: Tensor) -> Tensor:
    """Returns 1 where the largest score [..., B, C] is the label's, else 0."""
    return _of_label(one_hot(scores.argmax(-1), scores.shape[-1]), labels)


def _nll(what: str, logits: Tensor, labels: Tensor, per_member: bool = False) -> Tensor:
    logits = _checked(what, logits, labels)
    members_as_inputs = logits.reshape(1, -1, logits.shape[-1])
    log_probs = log_mean_probs(members_as_inputs).reshape(logits.shape) if per_member else log_mean_probs(logits)
    return -_of_label(log_probs, labels)


def _brier(probs: Tensor, labels: Tensor) -> Tensor:
    return (probs - one_hot(labels.long(), probs.shape[-1])).square().sum(-1)


def _diversity(what: str, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Returns for each input how many of the pairs of members differ, and how many of the members are wrong."""
    logits = _checked(what, logits, labels)
    return disagreement(logits), 1 - _hits(logits, labels).to(logits.dtype).mean(0)
