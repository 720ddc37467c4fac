"""How good predictions of numbers are, whose members are Gaussians: an ensemble is their mixture.

Targets of several numbers are judged number by number.
"""

from __future__ import annotations

import math
from statistics import NormalDist
from typing import Any

import torch
from torch import Tensor

from probly_common.checks.judging import check_gaussian, check_level, check_targets
from probly_torch.losses import _log_density
from probly_torch.metrics._classification import _at_least_float32
from probly_torch.metrics._states import _Mean
from probly_torch.uncertainty import _check_variance, regression_uncertainty


def crps(mean: Tensor, variance: Tensor, targets: Tensor) -> Tensor:
    """Returns the continuous ranked probability score of the mixture of Gaussians, E|X - y| - E|X - X'| / 2.

    It is the integral of (F(x) - [x >= y])^2, in units of the targets (Gneiting and Raftery 2007, eq. 21), in the
    closed form of Grimit et al. (2006).

    Shape:
        mean, variance (E, B, ...), targets (B, ...). Returns a scalar.
    Raises:
        ValueError: if the shapes do not fit, or a variance is negative.
    Example:
        >>> crps(torch.tensor([[0.0]]), torch.tensor([[1.0]]), torch.tensor([0.0]))
        tensor(0.2337)
    """
    return _crps(*_gaussians("crps", mean, variance, targets)).mean()


def interval_coverage(mean: Tensor, variance: Tensor, targets: Tensor, *, level: float = 0.95) -> Tensor:
    """Returns the share of the targets in the central interval of a level.

    For a calibrated ensemble it is the level. The interval is mean +- z sqrt(variance) of the Gaussian with the
    mixture's mean and variance, as deep ensembles are summarized (Lakshminarayanan et al. 2017, sec. 2.4); z is 1.96 at
    0.95. Sharpness is its width.

    Shape:
        mean, variance (E, B, ...), targets (B, ...). Returns a scalar, from 0 to 1.
    Args:
        mean: of the members.
        variance: of the members.
        targets: what happened.
        level: the probability inside the interval.
    Raises:
        ValueError: if the shapes do not fit, a variance is negative, or level is not between 0 and 1.
    Example:
        >>> interval_coverage(torch.zeros(1, 2), torch.ones(1, 2), torch.tensor([1.9, 2.0]))
        tensor(0.5000)
    """
    check_level("interval_coverage", level)
    mean, variance, targets = _gaussians("interval_coverage", mean, variance, targets)
    return _covered(mean, variance, targets, level).to(mean.dtype).mean()


def sharpness(mean: Tensor, variance: Tensor, *, level: float = 0.95) -> Tensor:
    """Returns the mean width of the central interval of a level.

    Of two intervals that cover alike, the narrower says more. The interval is that of interval_coverage, in units of
    the targets (Gneiting, Balabdaoui and Raftery 2007).

    Shape:
        mean, variance (E, B, ...). Returns a scalar.
    Args:
        mean: of the members.
        variance: of the members.
        level: the probability inside the interval.
    Raises:
        ValueError: if the shapes do not fit, a variance is negative, or level is not between 0 and 1.
    Example:
        >>> sharpness(torch.zeros(1, 2), torch.ones(1, 2))
        tensor(3.9199)
    """
    check_level("sharpness", level)
    mean, variance, _ = _gaussians("sharpness", mean, variance, None)
    return 2 * _half_width(regression_uncertainty(mean, variance).total, level).mean()


class GaussianNLL(_Mean):
    """Negative log-likelihood of the mixture of Gaussians, in nats: losses.mixture_gaussian_nll over batches.

    Shape:
        update: mean, variance (E, B, ...), targets (B, ...). compute: a scalar, or (E,) with per_member.
    Args:
        per_member: each member's own value.
    Raises:
        ValueError: if the shapes do not fit, or a variance is not above 0.
    Example:
        >>> metric = GaussianNLL()
        >>> metric.update(torch.tensor([[-1.0], [1.0]]), torch.ones(2, 1), torch.zeros(1))
        >>> metric.compute()
        tensor(1.4189, dtype=torch.float64)
    """

    higher_is_better = False

    def __init__(self, *, per_member: bool = False, **kwargs: Any) -> None:
        super().__init__("gaussian_nll", per_member=per_member, **kwargs)

    def update(self, mean: Tensor, variance: Tensor, targets: Tensor) -> None:
        """Adds a batch."""
        members = _gaussians("GaussianNLL", mean, variance, targets, self.per_member)
        self._add_values(_flat(_gaussian_nll(*members), self.per_member))


class RMSE(_Mean):
    """Root of the mean squared error of the mean prediction, in units of the targets.

    Shape:
        update: mean, variance (E, B, ...), targets (B, ...). compute: a scalar, or (E,) with per_member.
    Args:
        per_member: each member's own value.
    Raises:
        ValueError: if the shapes do not fit.
    Example:
        >>> metric = RMSE()
        >>> metric.update(torch.tensor([[1.0, 2.0], [3.0, 6.0]]), torch.ones(2, 2), torch.zeros(2))
        >>> metric.compute()
        tensor(3.1623, dtype=torch.float64)
    """

    higher_is_better = False

    def __init__(self, *, per_member: bool = False, **kwargs: Any) -> None:
        super().__init__("squared_error", per_member=per_member, **kwargs)

    def update(self, mean: Tensor, variance: Tensor, targets: Tensor) -> None:
        """Adds a batch."""
        mean, variance, targets = _gaussians("RMSE", mean, variance, targets, self.per_member)
        errors = regression_uncertainty(mean, variance).mean - targets
        self._add_values(_flat(errors.square(), self.per_member))

    def compute(self) -> Tensor:
        """Returns the root of the mean over all targets since the last reset; NaN before the first."""
        return super().compute().sqrt()


class CRPS(_Mean):
    """Continuous ranked probability score of the mixture of Gaussians: metrics.crps over batches.

    Shape:
        update: mean, variance (E, B, ...), targets (B, ...). compute: a scalar, or (E,) with per_member.
    Args:
        per_member: each member's own value.
    Raises:
        ValueError: if the shapes do not fit, or a variance is negative.
    Example:
        >>> metric = CRPS()
        >>> metric.update(torch.tensor([[0.0]]), torch.tensor([[1.0]]), torch.tensor([0.0]))
        >>> metric.compute()
        tensor(0.2337, dtype=torch.float64)
    """

    higher_is_better = False

    def __init__(self, *, per_member: bool = False, **kwargs: Any) -> None:
        super().__init__("crps", per_member=per_member, **kwargs)

    def update(self, mean: Tensor, variance: Tensor, targets: Tensor) -> None:
        """Adds a batch."""
        members = _gaussians("CRPS", mean, variance, targets, self.per_member)
        self._add_values(_flat(_crps(*members), self.per_member))


class IntervalCoverage(_Mean):
    """Share of the targets in the central interval of a level: metrics.interval_coverage over batches.

    Shape:
        update: mean, variance (E, B, ...), targets (B, ...). compute: a scalar, or (E,) with per_member.
    Args:
        level: the probability inside the interval.
        per_member: each member's own value.
    Raises:
        ValueError: if the shapes do not fit, a variance is negative, or level is not between 0 and 1.
    Example:
        >>> metric = IntervalCoverage()
        >>> metric.update(torch.zeros(1, 2), torch.ones(1, 2), torch.tensor([1.9, 2.0]))
        >>> metric.compute()
        tensor(0.5000, dtype=torch.float64)
    """

    def __init__(self, *, level: float = 0.95, per_member: bool = False, **kwargs: Any) -> None:
        check_level("IntervalCoverage", level)
        super().__init__(f"covered_at_{level}", per_member=per_member, **kwargs)
        self.level = level

    def update(self, mean: Tensor, variance: Tensor, targets: Tensor) -> None:
        """Adds a batch."""
        members = _gaussians("IntervalCoverage", mean, variance, targets, self.per_member)
        self._add_values(_flat(_covered(*members, self.level), self.per_member))


class Sharpness(_Mean):
    """Mean width of the central interval of a level: metrics.sharpness over batches.

    Shape:
        update: mean, variance (E, B, ...); targets are not needed. compute: a scalar, or (E,) with per_member.
    Args:
        level: the probability inside the interval.
        per_member: each member's own value.
    Raises:
        ValueError: if the shapes do not fit, a variance is negative, or level is not between 0 and 1.
    Example:
        >>> metric = Sharpness()
        >>> metric.update(torch.zeros(1, 2), torch.ones(1, 2))
        >>> metric.compute()
        tensor(3.9199, dtype=torch.float64)
    """

    higher_is_better = False

    def __init__(self, *, level: float = 0.95, per_member: bool = False, **kwargs: Any) -> None:
        check_level("Sharpness", level)
        super().__init__(f"width_at_{level}", per_member=per_member, **kwargs)
        self.level = level

    def update(self, mean: Tensor, variance: Tensor, targets: Tensor | None = None) -> None:
        """Adds a batch."""
        mean, variance, _ = _gaussians("Sharpness", mean, variance, None, self.per_member)
        width = 2 * _half_width(regression_uncertainty(mean, variance).total, self.level)
        self._add_values(_flat(width, self.per_member))


def _gaussians(
    what: str, mean: Tensor, variance: Tensor, targets: Tensor | None, per_member: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns mixtures over the first axis, and their targets.

    With per_member they are mixtures of one member each, (1, E, B, ...).
    """
    check_gaussian(what, mean.shape, variance.shape)
    targets = mean[0] if targets is None else targets
    check_targets(what, mean.shape, targets.shape, each=False)
    _check_variance(what, variance, zero=True)
    mean, variance, targets = map(_at_least_float32, (mean, variance, targets))
    return (mean[None], variance[None], targets.expand_as(mean)) if per_member else (mean, variance, targets)


def _flat(values: Tensor, per_member: bool) -> Tensor:
    """Flattens values to (B,), or (E, B) with per_member: targets of several numbers count as so many targets."""
    return values.flatten(1) if per_member else values.flatten()


def _gaussian_nll(mean: Tensor, variance: Tensor, targets: Tensor) -> Tensor:
    return math.log(len(mean)) - _log_density("GaussianNLL", mean, variance, targets, each=False).logsumexp(0)


def _crps(mean: Tensor, variance: Tensor, targets: Tensor) -> Tensor:
    to_target = _mean_distance(targets - mean, variance).mean(0)
    between = _mean_distance(mean[:, None] - mean, variance[:, None] + variance).mean((0, 1))
    return (to_target - between / 2).clamp(min=0)


def _mean_distance(mean: Tensor, variance: Tensor) -> Tensor:
    """Returns E|X| of a Gaussian, sigma (2 phi(z) + z (2 Phi(z) - 1)) with z = mean / sigma.

    It is |mean| where the variance is 0.
    """
    z = mean / variance.sqrt().clamp(min=torch.finfo(mean.dtype).tiny)
    return (variance * (2 / math.pi)).sqrt() * torch.exp(-z.square() / 2) + mean * torch.erf(z / math.sqrt(2))


def _covered(mean: Tensor, variance: Tensor, targets: Tensor, level: float) -> Tensor:
    mixture = regression_uncertainty(mean, variance)
    return (targets - mixture.mean).abs() <= _half_width(mixture.total, level)


def _half_width(variance: Tensor, level: float) -> Tensor:
    return variance.sqrt() * NormalDist().inv_cdf((1 + level) / 2)
