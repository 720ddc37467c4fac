"""Losses of members' logits [E, B, C] and labels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from probly_flax._checks import check_in_axes, check_labels, check_member_axis, check_member_losses
from probly_flax.uncertainty import _log_mean, _log_probs

__all__ = ["member_cross_entropy", "member_losses", "mixture_cross_entropy"]


def member_cross_entropy(logits: Array, labels: Array) -> Array:
    """Mean over members and inputs of each member's own cross-entropy, in nats.

    Each member is trained as if it were alone, which keeps members diverse (Lakshminarayanan et al. 2017);
    its gradient is 1/E of the gradient alone.

    Shape:
        logits (E, B, C), labels (B,) or (E, B) of class indices. Returns a scalar.
    Raises:
        ValueError: if the shapes do not fit.
        TypeError: if labels are not integers.
    Example:
        >>> jnp.exp(member_cross_entropy(jnp.zeros((3, 4, 2)), jnp.array([0, 1, 1, 0])))
        Array(2., dtype=float32)
    """
    log_probs = _log_probs("member_cross_entropy", logits)
    return -_pick("member_cross_entropy", log_probs, labels).mean()


def member_losses(
    loss: Callable[[Any, Any], Array], outputs: Any, targets: Any, *, in_axes: int | None = None
) -> Array:
    """Each member's own loss, of any loss of one network's outputs.

    The gradient of their sum by the weights of member i is the gradient of training member i alone: so is each step of
    an optimizer that treats weights one by one, as SGD and Adam do (clipping by the norm of all gradients does not).

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
        >>> member_losses(loss, jnp.zeros((3, 4, 2)), jnp.array([0, 1, 1, 0])).sum()
        Array(2.0794415, dtype=float32)
    """
    check_in_axes("member_losses", in_axes)
    num_members = jax.tree.leaves(outputs)[0].shape[0]
    if in_axes == 0:
        check_member_axis("member_losses", [leaf.shape for leaf in jax.tree.leaves(targets)], num_members)
    losses = jax.vmap(loss, in_axes=(0, in_axes))(outputs, targets)
    check_member_losses("member_losses", losses.shape, num_members)
    return losses


def mixture_cross_entropy(logits: Array, labels: Array) -> Array:
    """Mean over inputs of the cross-entropy of the mean prediction, -log (1/E) sum_i softmax(z_i)[label].

    It is what the ensemble is judged by (NLL), and never above member_cross_entropy. As a training loss it
    lets members share the work, and so lose diversity.

    Shape:
        logits (E, B, C), labels (B,) of class indices. Returns a scalar.
    Raises:
        ValueError: if the shapes do not fit.
        TypeError: if labels are not integers.
    Example:
        >>> jnp.exp(mixture_cross_entropy(jnp.array([[[0.0, 0.0]], [[0.0, 100.0]]]), jnp.array([1])))
        Array(1.3333334, dtype=float32)
    """
    log_probs = _log_probs("mixture_cross_entropy", logits)
    return -_pick("mixture_cross_entropy", _log_mean(log_probs)[None], labels).mean()


def _pick(what: str, log_probs: Array, labels: Array) -> Array:
    """The log-probability of each label: (E, B)."""
    integer = jnp.issubdtype(labels.dtype, jnp.integer)
    check_labels(what, log_probs.shape, labels.shape, integer)
    labels = jnp.broadcast_to(labels, log_probs.shape[:-1])
    picked = jnp.take_along_axis(log_probs, labels[..., None], -1)[..., 0]
    return jnp.where((labels >= 0) & (labels < log_probs.shape[-1]), picked, jnp.nan)  # traced, so not to be refused
