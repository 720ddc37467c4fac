"""Losses of members' outputs: logits [E, B, C] and labels, or means and variances [E, B, ...] and targets.

Those of members train each as if it were alone, which keeps members diverse; those of the mixture are what the ensemble
is judged by.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from probly_common.checks.judging import (
    check_beta,
    check_cross_entropy_options,
    check_gaussian,
    check_gaussian_outputs,
    check_labels,
    check_member_losses,
    check_targets,
)
from probly_common.checks.rows import check_in_axes, check_member_axis
from probly_flax.uncertainty import _log_mean, _log_probs

__all__ = [
    "member_beta_nll",
    "member_brier",
    "member_cross_entropy",
    "member_gaussian_nll",
    "member_losses",
    "mixture_brier",
    "mixture_cross_entropy",
    "mixture_gaussian_nll",
    "to_gaussian",
]


def member_cross_entropy(
    logits: Array,
    labels: Array,
    *,
    weight: Array | None = None,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
) -> Array:
    """Returns the mean over members of each member's own cross-entropy, in nats.

    The cross-entropy is torch's F.cross_entropy with its options. Each member is trained as if it were alone, which
    keeps members diverse (Lakshminarayanan et al. 2017). Its gradient is 1/E of the gradient alone.

    Shape:
        logits (E, B, C), labels (B,) or (E, B) of class indices. Returns a scalar.
    Args:
        logits: of each member.
        labels: shared by the members, or of each member.
        weight: (C,), of each class: a member's mean over inputs is weighted by that of their labels.
        label_smoothing: the share a of the target that is spread over all classes, (1 - a) onehot(label) + a / C
            (Szegedy et al. 2016, sec. 7).
        ignore_index: inputs of this label count for nothing. Where a member has no others, the mean is NaN, of gradient
            0, as in torch.
    Raises:
        ValueError: if the shapes do not fit, or label_smoothing is not from 0 to 1.
        TypeError: if labels are not integers, or an option is of another type.
    Example:
        >>> jnp.exp(member_cross_entropy(jnp.zeros((3, 4, 2)), jnp.array([0, 1, 1, 0])))
        Array(2., dtype=float32)
    """
    what = "member_cross_entropy"
    log_probs = _log_probs(what, logits)
    labels = _labels(what, log_probs, labels)
    return _cross_entropy(what, log_probs, labels, weight, label_smoothing, ignore_index)


def member_brier(logits: Array, labels: Array) -> Array:
    """Returns the mean over members and inputs of each member's own Brier score (Brier 1950).

    The score is sum_c (p_c - onehot(label)_c)^2. A squared error is bounded where a logarithm is not: labels that are
    wrong cost at most 2.

    Shape:
        logits (E, B, C), labels (B,) or (E, B) of class indices. Returns a scalar, from 0 to 2.
    Raises:
        ValueError: if the shapes do not fit.
        TypeError: if labels are not integers.
    Example:
        >>> member_brier(jnp.zeros((3, 4, 2)), jnp.array([0, 1, 1, 0]))
        Array(0.5, dtype=float32)
    """
    probs = jnp.exp(_log_probs("member_brier", logits))
    return _brier(probs, _labels("member_brier", probs, labels))


def member_gaussian_nll(mean: Array, variance: Array, targets: Array) -> Array:
    """Returns the mean over members and targets of each member's own -log N(target; mean, variance), in nats.

    It is 0.5 (log 2 pi + log variance + (target - mean)^2 / variance) (Nix and Weigend 1994; Lakshminarayanan et al.
    2017, eq. 1). Targets of several numbers are judged number by number.

    Shape:
        mean, variance (E, B, ...), targets (B, ...) or (E, B, ...). Returns a scalar.
    Raises:
        ValueError: if the shapes do not fit. A variance that is not above 0 gives NaN.
    Example:
        >>> round(float(member_gaussian_nll(jnp.zeros((3, 4)), jnp.ones((3, 4)), jnp.zeros(4))), 4)
        0.9189
    """
    return -_log_density("member_gaussian_nll", mean, variance, targets, each=True).mean()


def member_beta_nll(mean: Array, variance: Array, targets: Array, *, beta: float = 0.5) -> Array:
    """Returns member_gaussian_nll weighted by variance^beta (Seitzer et al. 2022, sec. 4).

    The weight is taken as a constant. The likelihood's gradient by the mean is divided by the variance, so that inputs
    that fit badly are given up for a large variance. With beta=0.5 they are not. With beta=1 the gradient by the mean
    is that of the squared error.

    Shape:
        mean, variance (E, B, ...), targets (B, ...) or (E, B, ...). Returns a scalar.
    Args:
        mean: of each member.
        variance: of each member.
        targets: shared by the members, or of each member.
        beta: from 0, member_gaussian_nll, to 1.
    Raises:
        ValueError: if the shapes do not fit, or beta is not from 0 to 1. A variance that is not above 0 gives NaN.
        TypeError: if beta is not a number.
    Example:
        >>> round(float(member_beta_nll(jnp.zeros((3, 4)), jnp.full((3, 4), 4.0), jnp.zeros(4), beta=0.5)), 4)
        3.2242
    """
    check_beta("member_beta_nll", beta)
    log_density = _log_density("member_beta_nll", mean, variance, targets, each=True)
    return -(jax.lax.stop_gradient(variance) ** beta * log_density).mean()


def member_losses(
    loss: Callable[[Any, Any], Array], outputs: Any, targets: Any, *, in_axes: int | None = None
) -> Array:
    """Returns each member's own loss, for any loss of one network's outputs.

    The gradient of their sum by the weights of member i is the gradient of training member i alone. The same holds for
    each step of an optimizer that treats weights one by one, as SGD and Adam do (clipping by the norm of all gradients
    does not).

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
        >>> import optax
        >>> loss = lambda z, y: optax.softmax_cross_entropy_with_integer_labels(z, y).mean()
        >>> round(float(member_losses(loss, jnp.zeros((3, 4, 2)), jnp.array([0, 1, 1, 0])).sum()), 4)
        2.0794
    """
    check_in_axes("member_losses", in_axes)
    num_members = jax.tree.leaves(outputs)[0].shape[0]
    if in_axes == 0:
        check_member_axis("member_losses", [leaf.shape for leaf in jax.tree.leaves(targets)], num_members)
    losses = jax.vmap(loss, in_axes=(0, in_axes))(outputs, targets)
    check_member_losses("member_losses", losses.shape, num_members)
    return losses


def mixture_cross_entropy(
    logits: Array,
    labels: Array,
    *,
    weight: Array | None = None,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
) -> Array:
    """Returns the mean over inputs of the cross-entropy of the mean prediction, in nats.

    The cross-entropy of an input is -log (1/E) sum_i softmax(z_i)[label]. Its mean is what the ensemble is judged by
    (NLL), and never above member_cross_entropy. As a training loss it lets members share the work, and so lose
    diversity.

    Shape:
        logits (E, B, C), labels (B,) of class indices. Returns a scalar.
    Args:
        logits: of each member.
        labels: of the inputs.
        weight: (C,), of each class: the mean over inputs is weighted by that of their labels.
        label_smoothing: the share a of the target that is spread over all classes, (1 - a) onehot(label) + a / C
            (Szegedy et al. 2016, sec. 7).
        ignore_index: inputs of this label count for nothing. Where there are no others, the mean is NaN, of gradient 0,
            as in torch.
    Raises:
        ValueError: if the shapes do not fit, or label_smoothing is not from 0 to 1.
        TypeError: if labels are not integers, or an option is of another type.
    Example:
        >>> round(float(jnp.exp(mixture_cross_entropy(jnp.array([[[0.0, 0.0]], [[0.0, 100.0]]]), jnp.array([1])))), 4)
        1.3333
    """
    what = "mixture_cross_entropy"
    log_probs = _log_mean(_log_probs(what, logits))[None]
    labels = _labels(what, log_probs, labels, each=False)
    return _cross_entropy(what, log_probs, labels, weight, label_smoothing, ignore_index)


def mixture_brier(logits: Array, labels: Array) -> Array:
    """Returns the mean over inputs of the Brier score of the mean prediction p (Brier 1950).

    The score of an input is sum_c (p_c - onehot(label)_c)^2. Its mean is never above member_brier: their difference is
    the variance of the members' predictions.

    Shape:
        logits (E, B, C), labels (B,) of class indices. Returns a scalar, from 0 to 2.
    Raises:
        ValueError: if the shapes do not fit.
        TypeError: if labels are not integers.
    Example:
        >>> mixture_brier(jnp.array([[[0.0, 0.0]], [[0.0, 100.0]]]), jnp.array([1]))
        Array(0.125, dtype=float32)
    """
    probs = jnp.exp(_log_mean(_log_probs("mixture_brier", logits)))[None]
    return _brier(probs, _labels("mixture_brier", probs, labels, each=False))


def mixture_gaussian_nll(mean: Array, variance: Array, targets: Array) -> Array:
    """Returns the mean over targets of -log (1/E) sum_i N(target; mean_i, variance_i), in nats.

    This is the mixture's own likelihood. It is what the ensemble is judged by, and never above member_gaussian_nll.
    Targets of several numbers are judged number by number, each by the mixture of its own densities.

    Shape:
        mean, variance (E, B, ...), targets (B, ...). Returns a scalar.
    Raises:
        ValueError: if the shapes do not fit. A variance that is not above 0 gives NaN.
    Example:
        >>> round(float(mixture_gaussian_nll(jnp.array([[-1.0], [1.0]]), jnp.ones((2, 1)), jnp.zeros(1))), 4)
        1.4189
    """
    log_density = _log_density("mixture_gaussian_nll", mean, variance, targets, each=False)
    return math.log(len(mean)) - jax.nn.logsumexp(log_density, 0).mean()


def to_gaussian(outputs: Array, *, min_variance: float = 1e-6) -> tuple[Array, Array]:
    """Splits a network's two outputs for each target into its mean and its variance.

    The variance is softplus(.) + min_variance.

    Shape:
        outputs (..., 2K), the K means first. Returns mean and variance (..., K).
    Args:
        outputs: of a network, or of members.
        min_variance: above 0, in units of the target squared: it bounds the likelihood of targets that are fitted
            exactly (Lakshminarayanan et al. 2017, sec. 2.2.1).
    Raises:
        ValueError: if the last axis is odd, or min_variance is not above 0.
        TypeError: if min_variance is not a number.
    Example:
        >>> mean, variance = to_gaussian(jnp.zeros((3, 4, 2)))
        >>> mean.shape, round(float(variance[0, 0, 0]), 4)
        ((3, 4, 1), 0.6931)
    """
    check_gaussian_outputs("to_gaussian", outputs.shape, min_variance)
    mean, raw = jnp.split(outputs, 2, -1)
    return mean, jax.nn.softplus(raw) + min_variance


def _cross_entropy(
    what: str, log_probs: Array, labels: Array, weight: Array | None, label_smoothing: float, ignore_index: int
) -> Array:
    """Returns the mean over members of the weighted and smoothed cross-entropy.

    For one member it is sum_b -((1 - a) w[y_b] log p[y_b] + a sum_c w[c]/C log p[c]) / sum_b w[y_b].
    """
    num_members, _, num_classes = log_probs.shape
    check_cross_entropy_options(what, num_classes, weight, label_smoothing, ignore_index)
    kept = labels != ignore_index
    labels = jnp.where(kept, labels, 0)
    weight = jnp.ones(num_classes, log_probs.dtype) if weight is None else jnp.asarray(weight, log_probs.dtype)
    picked = _nan_for_no_class(jnp.take_along_axis(log_probs, labels[..., None], -1)[..., 0], labels, num_classes)
    weights = weight[labels]
    losses = -weights * picked
    if label_smoothing:
        smooth = -(jnp.broadcast_to(weight / num_classes, log_probs.shape) * log_probs).sum(-1)
        losses = (1 - label_smoothing) * losses + label_smoothing * smooth
    total = num_members * jnp.where(kept, weights, 0.0).sum(-1, keepdims=True)
    return (jnp.where(kept, losses, 0.0) / total).sum()  # divided first: a sum of large ones would be infinite


def _brier(probs: Array, labels: Array) -> Array:
    num_classes = probs.shape[-1]
    squares = jnp.square(probs - jax.nn.one_hot(labels, num_classes, dtype=probs.dtype)).sum(-1)
    return _nan_for_no_class(squares, labels, num_classes).mean()


def _labels(what: str, probs: Array, labels: Array, each: bool = True) -> Array:
    """Returns the class indices for each member: (E, B)."""
    check_labels(what, probs.shape, labels.shape, labels.dtype, each)
    return jnp.broadcast_to(labels.astype(int), probs.shape[:-1])


def _nan_for_no_class(values: Array, labels: Array, num_classes: int) -> Array:
    return jnp.where((labels >= 0) & (labels < num_classes), values, jnp.nan)  # traced, so not to be refused


def _log_density(what: str, mean: Array, variance: Array, targets: Array, each: bool) -> Array:
    """Returns log N(target; mean, variance): (E, B, ...)."""
    check_gaussian(what, mean.shape, variance.shape)
    check_targets(what, mean.shape, targets.shape, each)
    return -0.5 * (
        math.log(2 * math.pi) + jnp.log(variance) + jnp.square(jnp.broadcast_to(targets, mean.shape) - mean) / variance
    )
