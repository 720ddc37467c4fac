"""What an ensemble knows and does not: total, aleatoric and epistemic uncertainty of its members' logits.

All functions take logits [E, B, C] and work in log space: no finite logits give NaN, infinity, or a negative
entropy or mutual information. Entropies are in nats.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax import Array

from probly_flax._checks import check_logits

__all__ = [
    "disagreement",
    "expected_entropy",
    "log_mean_probs",
    "mean_probs",
    "mutual_information",
    "predictive_entropy",
]


def log_mean_probs(logits: Array) -> Array:
    """Logarithm of the mean prediction, log (1/E) sum_i softmax(z_i).

    Shape:
        logits (E, B, C). Returns (B, C).
    Example:
        >>> jnp.exp(log_mean_probs(jnp.zeros((3, 1, 2))))
        Array([[0.5, 0.5]], dtype=float32)
    """
    return _log_mean(_log_probs("log_mean_probs", logits))


def mean_probs(logits: Array) -> Array:
    """Mean prediction of the members, (1/E) sum_i softmax(z_i).

    Shape:
        logits (E, B, C). Returns (B, C), rows that add up to 1.
    Example:
        >>> mean_probs(jnp.array([[[0.0, 0.0]], [[0.0, 100.0]]]))
        Array([[0.25, 0.75]], dtype=float32)
    """
    return jnp.exp(_log_mean(_log_probs("mean_probs", logits)))


def predictive_entropy(logits: Array) -> Array:
    """Total uncertainty: the entropy of the mean prediction, in nats.

    Shape:
        logits (E, B, C). Returns (B,), from 0 to log C.
    Example:
        >>> jnp.exp(predictive_entropy(jnp.zeros((3, 1, 2))))
        Array([2.], dtype=float32)
    """
    return _entropy(_log_mean(_log_probs("predictive_entropy", logits)))


def expected_entropy(logits: Array) -> Array:
    """Aleatoric uncertainty: the mean of the members' entropies, in nats.

    Shape:
        logits (E, B, C). Returns (B,), from 0 to log C.
    Example:
        >>> expected_entropy(jnp.array([[[200.0, 0.0]], [[0.0, 200.0]]]))
        Array([0.], dtype=float32)
    """
    return _entropy(_log_probs("expected_entropy", logits)).mean(0)


def mutual_information(logits: Array) -> Array:
    """Epistemic uncertainty: the mean divergence KL(p_i || p) of the members from their mean, in nats.

    It equals predictive_entropy - expected_entropy (Houlsby et al. 2011, eq. 2), without their cancellation.

    Shape:
        logits (E, B, C). Returns (B,), from 0 to log E.
    Example:
        >>> jnp.exp(mutual_information(jnp.array([[[100.0, 0.0]], [[0.0, 100.0]]])))
        Array([2.], dtype=float32)
    """
    log_probs = _log_probs("mutual_information", logits)
    divergence = (jnp.exp(log_probs) * (log_probs - _log_mean(log_probs)[None])).sum(-1)
    return divergence.mean(0).clip(min=0)


def disagreement(logits: Array) -> Array:
    """Fraction of the pairs of members that predict different classes; 0 for a single member.

    Shape:
        logits (E, B, C). Returns (B,), from 0 to 1.
    Example:
        >>> disagreement(jnp.array([[[1.0, 0.0]], [[0.0, 1.0]], [[0.0, 1.0]]]))
        Array([0.6666667], dtype=float32)
    """
    check_logits("disagreement", logits.shape)
    num_members, _, num_classes = logits.shape
    votes = jax.nn.one_hot(logits.argmax(-1), num_classes, dtype=jnp.int32).sum(0)
    differing = num_members**2 - (votes * votes).sum(-1)
    return differing.astype(logits.dtype) / max(1, num_members * (num_members - 1))


def _log_probs(what: str, logits: Array) -> Array:
    """log softmax, kept finite: below this bound the probability is 0 anyway."""
    check_logits(what, logits.shape)
    return jnp.maximum(jax.nn.log_softmax(logits, -1), jnp.finfo(logits.dtype).min / 4)


def _log_mean(log_probs: Array) -> Array:
    log_mean = jax.nn.logsumexp(log_probs, 0) - math.log(len(log_probs))
    return jnp.where(log_mean > 0, 0.0, log_mean)  # rounding could make a probability larger than 1


def _entropy(log_probs: Array) -> Array:
    return -(jnp.exp(log_probs) * log_probs).sum(-1)
