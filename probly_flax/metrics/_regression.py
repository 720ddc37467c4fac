"""How good predictions of numbers are, whose members are Gaussians: an ensemble is their mixture.

Targets of several numbers are judged number by number.
"""

from __future__ import annotations

import math
from statistics import NormalDist
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from probly_common.checks.judging import check_gaussian, check_ignored, check_level, check_targets
from probly_flax.losses import _log_density
from probly_flax.metrics._classification import _at_least_float32
from probly_flax.metrics._states import _Mean
from probly_flax.uncertainty import _nan_if_negative, regression_uncertainty


def crps(mean: Array, variance: Array, targets: Array) -> Array:
    """Returns the continuous ranked probability score of the mixture of Gaussians, E|X - y| - E|X - X'| / 2.

    It is the integral of (F(x) - [x >= y])^2, in units of the targets (Gneiting and Raftery 2007, eq. 21), in the
    closed form of Grimit et al. (2006).

    Shape:
        mean, variance (E, B, ...), targets (B, ...). Returns a scalar.
    Raises:
        ValueError: if the shapes do not fit, or a variance is negative.
    Example:
        >>> round(float(crps(jnp.array([[0.0]]), jnp.array([[1.0]]), jnp.array([0.0]))), 4)
        0.2337
    """
    return _crps(*_gaussians("crps", mean, variance, targets)).mean()


def interval_coverage(mean: Array, variance: Array, targets: Array, *, level: float = 0.95) -> Array:
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
        >>> interval_coverage(jnp.zeros((1, 2)), jnp.ones((1, 2)), jnp.array([1.9, 2.0]))
        Array(0.5, dtype=float32)
    """
    check_level("interval_coverage", level)
    mean, variance, targets = _gaussians("interval_coverage", mean, variance, targets)
    return _covered(mean, variance, targets, level).astype(mean.dtype).mean()


def sharpness(mean: Array, variance: Array, *, level: float = 0.95) -> Array:
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
        >>> round(float(sharpness(jnp.zeros((1, 2)), jnp.ones((1, 2)))), 4)
        3.9199
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
        >>> metric.update(mean=jnp.array([[-1.0], [1.0]]), variance=jnp.ones((2, 1)), targets=jnp.zeros(1))
        >>> round(float(metric.compute()), 4)
        1.4189
    """

    def __init__(self, *, per_member: bool = False) -> None:
        super().__init__(per_member=per_member)

    def update(self, *, mean: Array, variance: Array, targets: Array, **ignored: Any) -> None:  # type: ignore[override]
        """Adds a batch."""
        check_ignored("GaussianNLL", ignored)
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
        >>> metric.update(mean=jnp.array([[1.0, 2.0], [3.0, 6.0]]), variance=jnp.ones((2, 2)), targets=jnp.zeros(2))
        >>> round(float(metric.compute()), 4)
        3.1623
    """

    def __init__(self, *, per_member: bool = False) -> None:
        super().__init__(per_member=per_member)

    def update(self, *, mean: Array, variance: Array, targets: Array, **ignored: Any) -> None:  # type: ignore[override]
        """Adds a batch."""
        check_ignored("RMSE", ignored)
        mean, variance, targets = _gaussians("RMSE", mean, variance, targets, self.per_member)
        errors = regression_uncertainty(mean, variance).mean - targets
        self._add_values(_flat(jnp.square(errors), self.per_member))

    def compute(self) -> Array:
        """Returns the root of the mean over all targets since the last reset; NaN before the first."""
        return jnp.sqrt(super().compute())


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
        >>> metric.update(mean=jnp.array([[0.0]]), variance=jnp.array([[1.0]]), targets=jnp.array([0.0]))
        >>> round(float(metric.compute()), 4)
        0.2337
    """

    def __init__(self, *, per_member: bool = False) -> None:
        super().__init__(per_member=per_member)

    def update(self, *, mean: Array, variance: Array, targets: Array, **ignored: Any) -> None:  # type: ignore[override]
        """Adds a batch."""
        check_ignored("CRPS", ignored)
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
        >>> metric.update(mean=jnp.zeros((1, 2)), variance=jnp.ones((1, 2)), targets=jnp.array([1.9, 2.0]))
        >>> metric.compute()
        Array(0.5, dtype=float32)
    """

    def __init__(self, *, level: float = 0.95, per_member: bool = False) -> None:
        check_level("IntervalCoverage", level)
        super().__init__(per_member=per_member)
        self.level = level

    def update(self, *, mean: Array, variance: Array, targets: Array, **ignored: Any) -> None:  # type: ignore[override]
        """Adds a batch."""
        check_ignored("IntervalCoverage", ignored)
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
        >>> metric.update(mean=jnp.zeros((1, 2)), variance=jnp.ones((1, 2)))
        >>> round(float(metric.compute()), 4)
        3.9199
    """

    def __init__(self, *, level: float = 0.95, per_member: bool = False) -> None:
        check_level("Sharpness", level)
        super().__init__(per_member=per_member)
        self.level = level

    def update(self, *, mean: Array, variance: Array, **ignored: Any) -> None:  # type: ignore[override]
        """Adds a batch."""
        check_ignored("Sharpness", ignored)
        mean, variance, _ = _gaussians("Sharpness", mean, variance, None, self.per_member)
        width = 2 * _half_width(regression_uncertainty(mean, variance).total, self.level)
        self._add_values(_flat(width, self.per_member))


def _gaussians(
    what: str, mean: Array, variance: Array, targets: Array | None, per_member: bool = False
) -> tuple[Array, Array, Array]:
    """Returns mixtures over the first axis, and their targets.

    With per_member they are mixtures of one member each, (1, E, B, ...).
    """
    check_gaussian(what, mean.shape, variance.shape)
    targets = mean[0] if targets is None else targets
    check_targets(what, mean.shape, targets.shape, each=False)
    mean, variance, targets = map(_at_least_float32, (mean, _nan_if_negative(variance), targets))
    if not per_member:
        return mean, variance, targets
    return mean[None], variance[None], jnp.broadcast_to(targets[None], mean.shape)


def _flat(values: Array, per_member: bool) -> Array:
    """Flattens values to (B,), or (E, B) with per_member: targets of several numbers count as so many targets."""
    return values.reshape(len(values), -1) if per_member else values.flatten()


def _gaussian_nll(mean: Array, variance: Array, targets: Array) -> Array:
    log_density = _log_density("GaussianNLL", mean, variance, targets, each=False)
    return math.log(len(mean)) - jax.nn.logsumexp(log_density, 0)


def _crps(mean: Array, variance: Array, targets: Array) -> Array:
    to_target = _mean_distance(targets[None] - mean, variance).mean(0)
    between = _mean_distance(mean[:, None] - mean[None], variance[:, None] + variance[None]).mean((0, 1))
    return (to_target - between / 2).clip(min=0)


def _mean_distance(mean: Array, variance: Array) -> Array:
    """Returns E|X| of a Gaussian, sigma (2 phi(z) + z (2 Phi(z) - 1)) with z = mean / sigma.

    It is |mean| where the variance is 0.
    """
    z = mean / jnp.sqrt(variance).clip(min=jnp.finfo(mean.dtype).tiny)
    return jnp.sqrt(variance * (2 / math.pi)) * jnp.exp(-jnp.square(z) / 2) + mean * jax.lax.erf(z / math.sqrt(2))


def _covered(mean: Array, variance: Array, targets: Array, level: float) -> Array:
    mixture = regression_uncertainty(mean, variance)
    return jnp.abs(targets - mixture.mean) <= _half_width(mixture.total, level)


def _half_width(variance: Array, level: float) -> Array:
    return jnp.sqrt(variance) * NormalDist().inv_cdf((1 + level) / 2)
