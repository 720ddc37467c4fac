"""How good predictions of classes are, and how much members differ."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from probly_common.checks.judging import check_ignored, check_labels, check_logits
from probly_flax.losses import _nan_for_no_class
from probly_flax.metrics._states import _Mean, _Sums
from probly_flax.uncertainty import disagreement, log_mean_probs, mutual_information


def accuracy(logits: Array, labels: Array) -> Array:
    """Returns the share of the inputs whose class has the largest mean probability.

    Shape:
        logits (E, B, C), labels (B,) of class indices. Returns a scalar.
    Raises:
        ValueError: if the shapes do not fit.
        TypeError: if labels are not integers.
    Example:
        >>> accuracy(jnp.array([[[0.0, 0.0], [1.0, 0.0]], [[0.0, 9.0], [0.0, 0.5]]]), jnp.array([1, 1]))
        Array(0.5, dtype=float32)
    """
    probs = _probs("accuracy", logits, labels)
    return _hits(probs, labels).mean()


def nll(logits: Array, labels: Array) -> Array:
    """Returns the negative log-likelihood of the mean prediction, -log (1/E) sum_i softmax(z_i)[label], in nats.

    It is losses.mixture_cross_entropy without options.

    Shape:
        logits (E, B, C), labels (B,) of class indices. Returns a scalar.
    Raises:
        ValueError: if the shapes do not fit.
        TypeError: if labels are not integers.
    Example:
        >>> round(float(jnp.exp(nll(jnp.array([[[0.0, 0.0]], [[0.0, 100.0]]]), jnp.array([1])))), 4)
        1.3333
    """
    return _nll("nll", logits, labels).mean()


def brier(logits: Array, labels: Array) -> Array:
    """Returns the Brier score of the mean prediction, sum_c (p_c - [c = label])^2 (Brier 1950): from 0 to 2.

    Shape:
        logits (E, B, C), labels (B,) of class indices. Returns a scalar.
    Raises:
        ValueError: if the shapes do not fit.
        TypeError: if labels are not integers.
    Example:
        >>> brier(jnp.array([[[0.0, 0.0]], [[0.0, 100.0]]]), jnp.array([1]))
        Array(0.125, dtype=float32)
    """
    return _brier(_probs("brier", logits, labels), labels).mean()


def diversity(logits: Array, labels: Array) -> Array:
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
        >>> diversity(jnp.array([[[1.0, 0.0]], [[0.0, 1.0]]]), jnp.array([1]))
        Array(2., dtype=float32)
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
        >>> metric.update(logits=jnp.array([[[0.0, 1.0], [1.0, 0.0]]]), labels=jnp.array([1, 1]))
        >>> metric.compute()
        Array(0.5, dtype=float32)
    """

    def __init__(self, *, per_member: bool = False) -> None:
        super().__init__(per_member=per_member)

    def update(self, *, logits: Array, labels: Array, **ignored: Any) -> None:  # type: ignore[override]
        """Adds a batch."""
        check_ignored("Accuracy", ignored)
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
        >>> metric.update(logits=jnp.zeros((3, 4, 2)), labels=jnp.array([0, 1, 1, 0]))
        >>> jnp.exp(metric.compute())
        Array(2., dtype=float32)
    """

    def __init__(self, *, per_member: bool = False) -> None:
        super().__init__(per_member=per_member)

    def update(self, *, logits: Array, labels: Array, **ignored: Any) -> None:  # type: ignore[override]
        """Adds a batch."""
        check_ignored("NLL", ignored)
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
        >>> metric.update(logits=jnp.zeros((3, 4, 2)), labels=jnp.array([0, 1, 1, 0]))
        >>> metric.compute()
        Array(0.5, dtype=float32)
    """

    def __init__(self, *, per_member: bool = False) -> None:
        super().__init__(per_member=per_member)

    def update(self, *, logits: Array, labels: Array, **ignored: Any) -> None:  # type: ignore[override]
        """Adds a batch."""
        check_ignored("Brier", ignored)
        self._add_values(_brier(_probs("Brier", logits, labels, self.per_member), labels))


class MutualInformation(_Mean):
    """Mean epistemic uncertainty of the inputs, in nats: uncertainty.mutual_information over batches.

    Shape:
        update: logits (E, B, C); labels are not needed. compute: a scalar.
    Raises:
        ValueError: if logits have no member axis.
    Example:
        >>> metric = MutualInformation()
        >>> metric.update(logits=jnp.array([[[100.0, 0.0]], [[0.0, 100.0]]]))
        >>> jnp.exp(metric.compute())
        Array(2., dtype=float32)
    """

    def __init__(self) -> None:
        super().__init__()

    def update(self, *, logits: Array, **ignored: Any) -> None:  # type: ignore[override]
        """Adds a batch."""
        check_ignored("MutualInformation", ignored)
        self._add_values(mutual_information(_at_least_float32(logits)))


class Disagreement(_Mean):
    """Share of the pairs of members that predict different classes: uncertainty.disagreement over batches.

    Shape:
        update: logits (E, B, C); labels are not needed. compute: a scalar.
    Raises:
        ValueError: if logits have no member axis.
    Example:
        >>> metric = Disagreement()
        >>> metric.update(logits=jnp.array([[[1.0, 0.0]], [[0.0, 1.0]]]))
        >>> metric.compute()
        Array(1., dtype=float32)
    """

    def __init__(self) -> None:
        super().__init__()

    def update(self, *, logits: Array, **ignored: Any) -> None:  # type: ignore[override]
        """Adds a batch."""
        check_ignored("Disagreement", ignored)
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
        >>> metric.update(logits=jnp.array([[[1.0, 0.0]], [[0.0, 1.0]]]), labels=jnp.array([1]))
        >>> metric.compute()
        Array(2., dtype=float32)
    """

    def __init__(self) -> None:
        super().__init__()
        self._add_sum("differing")
        self._add_sum("wrong")

    def update(self, *, logits: Array, labels: Array, **ignored: Any) -> None:  # type: ignore[override]
        """Adds a batch."""
        check_ignored("Diversity", ignored)
        differing, wrong = _diversity("Diversity", logits, labels)
        self._add(differing=differing.sum(), wrong=wrong.sum())

    def compute(self) -> Array:
        """Returns the quotient over all inputs since the last reset; NaN where no member errs."""
        return self._sum("differing") / self._sum("wrong")


def _at_least_float32(logits: Array) -> Array:
    """Converts half precision to float32, since its digits are too few for what is summed over thousands of inputs."""
    return logits if logits.dtype in (jnp.float32, jnp.float64) else logits.astype(jnp.float32)


def _checked(what: str, logits: Array, labels: Array) -> Array:
    check_logits(what, logits.shape)
    check_labels(what, logits.shape, labels.shape, labels.dtype, each=False)
    return _at_least_float32(logits)


def _probs(what: str, logits: Array, labels: Array, per_member: bool = False) -> Array:
    """Returns the probabilities of the mixture (B, C), or of each member (E, B, C)."""
    probs = jax.nn.softmax(_checked(what, logits, labels))
    if per_member:
        return probs
    total = probs.sum(0)  # XLA divides by a number as times its inverse: 3 * 0.1 is above 0.3, and so in another bin
    return total / jax.lax.optimization_barrier(jnp.full_like(total, len(probs)))


def _of_label(values: Array, labels: Array) -> Array:
    """Returns the entry [..., B] of each label in values [..., B, C].

    Labels out of range give NaN.
    """
    labels = jnp.broadcast_to(labels.astype(int), values.shape[:-1])
    picked = jnp.take_along_axis(values, labels[..., None], -1)[..., 0]
    return _nan_for_no_class(picked, labels, values.shape[-1])


def _hits(scores: Array, labels: Array) -> Array:
    """Returns 1 where the largest score [..., B, C] is the label's, else 0."""
    return _of_label(jax.nn.one_hot(scores.argmax(-1), scores.shape[-1], dtype=scores.dtype), labels)


def _is_label(probs: Array, labels: Array) -> Array:
    """Returns 1 at each label, else 0: [..., B, C].

    Labels out of range give NaN.
    """
    num_classes = probs.shape[-1]
    labels = jnp.broadcast_to(labels.astype(int)[:, None], probs.shape)
    return _nan_for_no_class(jax.nn.one_hot(labels[..., 0], num_classes, dtype=probs.dtype), labels, num_classes)


def _nll(what: str, logits: Array, labels: Array, per_member: bool = False) -> Array:
    logits = _checked(what, logits, labels)
    members_as_inputs = logits.reshape(1, -1, logits.shape[-1])
    log_probs = log_mean_probs(members_as_inputs).reshape(logits.shape) if per_member else log_mean_probs(logits)
    return -_of_label(log_probs, labels)


def _brier(probs: Array, labels: Array) -> Array:
    return jnp.square(probs - _is_label(probs, labels)).sum(-1)


def _diversity(what: str, logits: Array, labels: Array) -> tuple[Array, Array]:
    """Returns for each input how many of the pairs of members differ, and how many of the members are wrong."""
    logits = _checked(what, logits, labels)
    return disagreement(logits), 1 - _hits(logits, labels).mean(0)
