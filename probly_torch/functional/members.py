"""The rows of each member: giving them, and telling them apart."""

from __future__ import annotations

from torch import Tensor

from probly_common.checks.rows import check_split, check_tile
from probly_common.checks.values import check_num_members

__all__ = ["split_members", "tile_members"]


def tile_members(x: Tensor, num_members: int) -> Tensor:
    """Gives every member the same batch.

    Shape:
        x: (B, ...). Returns (E*B, ...), member-major: rows [k*B, (k+1)*B) are x, for member k.
    Raises:
        ValueError: if x has no rows or num_members is below 1.
    Example:
        >>> import torch
        >>> tile_members(torch.tensor([[1, 2], [3, 4]]), 2).tolist()
        [[1, 2], [3, 4], [1, 2], [3, 4]]
    """
    check_tile("tile_members", x.shape)
    return x.repeat(check_num_members("tile_members", num_members), *(1,) * (x.ndim - 1))


def split_members(y: Tensor, num_members: int) -> Tensor:
    """Gives the outputs of each member an axis of their own.

    Shape:
        y: (E*B, ...), member-major. Returns (E, B, ...), a view.
    Raises:
        ValueError: if the rows do not divide by num_members, or num_members is below 1.
    Example:
        >>> import torch
        >>> split_members(torch.arange(6), 3).tolist()
        [[0, 1], [2, 3], [4, 5]]
    """
    num_members = check_num_members("split_members", num_members)
    check_split("split_members", y.shape, num_members)
    return y.reshape(num_members, y.shape[0] // num_members, *y.shape[1:])
