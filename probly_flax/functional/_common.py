"""Helpers that the functions share."""

from __future__ import annotations

from jax import Array


def rows(weights: Array, members: Array) -> Array:
    """Reshapes (E, features) to (E, 1, ..., features), against members (E, B, ..., features)."""
    return weights.reshape(weights.shape[0], *(1,) * (members.ndim - 2), weights.shape[-1])
