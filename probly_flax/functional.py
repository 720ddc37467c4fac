"""The arithmetic beneath the layers: pure functions of arrays, member axis first."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from probly_flax._checks import (
    check_fast_weights,
    check_member_rows,
    check_num_members,
    check_split,
    check_tile,
    check_weight,
)

__all__ = ["batch_ensemble_linear", "split_members", "tile_members"]


def batch_ensemble_linear(
    x: Array,
    kernel: Array,
    r: Array,
    s: Array,
    bias: Array | None = None,
    *,
    precision: Any = None,
    dot_general: Callable[..., Array] = lax.dot_general,
    **dot_general_kwargs: Any,
) -> Array:
    r"""Applies to each member's rows the linear map whose kernel is W * r_i s_i^T.

    Member i computes  y_i = ((x_i * r_i) W) * s_i + b_i        (Wen et al. 2020, eq. 5)

    Shape:
        x: (E*B, ..., in_features), rows [k*B, (k+1)*B) belong to member k. Returns (E*B, ..., out_features).
    Weights:
        kernel (in_features, out_features), r (E, in_features), s (E, out_features), bias (E, out_features) or None.
    Raises:
        ValueError: if the rows do not divide by E, the last axis is not in_features, or r, s and bias do not
            have E rows each.
    Example:
        >>> x, kernel = jnp.ones((4, 3)), jnp.ones((3, 2))
        >>> r, s = jnp.array([[1.0, 1, 1], [2, 2, 2]]), jnp.array([[1.0, 1], [1, 10]])
        >>> batch_ensemble_linear(x, kernel, r, s)
        Array([[ 3.,  3.],
               [ 3.,  3.],
               [ 6., 60.],
               [ 6., 60.]], dtype=float32)
    """
    check_weight("batch_ensemble_linear", kernel.shape)
    in_features, out_features = kernel.shape
    check_fast_weights(
        "batch_ensemble_linear", in_features, out_features, r.shape, s.shape, None if bias is None else bias.shape
    )
    num_members = r.shape[0]
    check_member_rows("batch_ensemble_linear", x.shape, num_members, in_features)
    members = x.reshape(num_members, x.shape[0] // num_members, *x.shape[1:])
    scaled = (members * _rows(r, members)).reshape(x.shape)
    y = dot_general(scaled, kernel, (((x.ndim - 1,), (0,)), ((), ())), precision=precision, **dot_general_kwargs)
    y = y.reshape(*members.shape[:-1], out_features) * _rows(s, members).astype(y.dtype)
    return (y if bias is None else y + _rows(bias, members)).reshape(*x.shape[:-1], out_features)


def tile_members(x: Array, num_members: int) -> Array:
    """Gives every member the same batch.

    Shape:
        x: (B, ...). Returns (E*B, ...), member-major: rows [k*B, (k+1)*B) are x, for member k.
    Raises:
        ValueError: if x has no rows or num_members is below 1.
    Example:
        >>> tile_members(jnp.array([[1, 2], [3, 4]]), 2).tolist()
        [[1, 2], [3, 4], [1, 2], [3, 4]]
    """
    check_tile("tile_members", x.shape)
    num_members = check_num_members("tile_members", num_members)
    return jnp.broadcast_to(x, (num_members, *x.shape)).reshape(num_members * x.shape[0], *x.shape[1:])


def split_members(y: Array, num_members: int) -> Array:
    """Gives the outputs of each member an axis of their own.

    Shape:
        y: (E*B, ...), member-major. Returns (E, B, ...).
    Raises:
        ValueError: if the rows do not divide by num_members, or num_members is below 1.
    Example:
        >>> split_members(jnp.arange(6), 3).tolist()
        [[0, 1], [2, 3], [4, 5]]
    """
    num_members = check_num_members("split_members", num_members)
    check_split("split_members", y.shape, num_members)
    return y.reshape(num_members, y.shape[0] // num_members, *y.shape[1:])


def _rows(weights: Array, members: Array) -> Array:
    """(E, features) -> (E, 1, ..., features), against members (E, B, ..., features)."""
    return weights.reshape(weights.shape[0], *(1,) * (members.ndim - 2), weights.shape[-1])
