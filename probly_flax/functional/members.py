"""The rows of each member: giving them, and telling them apart."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array

from probly_common.checks.rows import check_split, check_tile
from probly_common.checks.values import check_num_members

__all__ = ["split_members", "tile_members"]


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
