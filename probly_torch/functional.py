"""The arithmetic beneath the layers: pure functions of tensors, member axis first."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear

from probly_torch._checks import (
    check_fast_weights,
    check_member_rows,
    check_num_members,
    check_split,
    check_tile,
    check_weight,
)

__all__ = ["batch_ensemble_linear", "split_members", "tile_members"]


def batch_ensemble_linear(x: Tensor, weight: Tensor, r: Tensor, s: Tensor, bias: Tensor | None = None) -> Tensor:
    r"""Applies to each member's rows the linear map whose weight is W * s_i r_i^T.

    Member i computes  y_i = ((x_i * r_i) W^T) * s_i + b_i        (Wen et al. 2020, eq. 5)

    Shape:
        x: (E*B, ..., in_features), rows [k*B, (k+1)*B) belong to member k. Returns (E*B, ..., out_features).
    Weights:
        weight (out_features, in_features), r (E, in_features), s (E, out_features), bias (E, out_features) or None.
    Raises:
        ValueError: if the rows do not divide by E, the last axis is not in_features, or r, s and bias do not
            have E rows each.
        TypeError: if x has another dtype than the weight, outside autocast.
    Example:
        >>> x, weight = torch.ones(4, 3), torch.ones(2, 3)
        >>> r, s = torch.tensor([[1.0, 1, 1], [2, 2, 2]]), torch.tensor([[1.0, 1], [1, 10]])
        >>> batch_ensemble_linear(x, weight, r, s)
        tensor([[ 3.,  3.],
                [ 3.,  3.],
                [ 6., 60.],
                [ 6., 60.]])
    """
    check_weight("batch_ensemble_linear", weight.shape)
    out_features, in_features = weight.shape
    check_fast_weights(
        "batch_ensemble_linear", in_features, out_features, r.shape, s.shape, None if bias is None else bias.shape
    )
    num_members = r.shape[0]
    check_member_rows("batch_ensemble_linear", x.shape, num_members, in_features)
    x, weight, r, s = _autocast(x), _autocast(weight), _autocast(r), _autocast(s)
    if x.dtype != weight.dtype:
        raise TypeError(
            f"batch_ensemble_linear expects inputs of the weight's dtype, {weight.dtype}; got {x.dtype}. "
            f"Convert them: x.to({weight.dtype})."
        )
    members = x.reshape(num_members, x.shape[0] // num_members, *x.shape[1:])
    y = linear(members * _rows(r, members), weight) * _rows(s, members)
    return (y if bias is None else y + _rows(_autocast(bias), members)).reshape(*x.shape[:-1], out_features)


def tile_members(x: Tensor, num_members: int) -> Tensor:
    """Gives every member the same batch.

    Shape:
        x: (B, ...). Returns (E*B, ...), member-major: rows [k*B, (k+1)*B) are x, for member k.
    Raises:
        ValueError: if x has no rows or num_members is below 1.
    Example:
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
        >>> split_members(torch.arange(6), 3).tolist()
        [[0, 1], [2, 3], [4, 5]]
    """
    num_members = check_num_members("split_members", num_members)
    check_split("split_members", y.shape, num_members)
    return y.reshape(num_members, y.shape[0] // num_members, *y.shape[1:])


def _rows(weights: Tensor, members: Tensor) -> Tensor:
    """(E, features) -> (E, 1, ..., features), against members (E, B, ..., features)."""
    return weights.reshape(weights.shape[0], *(1,) * (members.ndim - 2), weights.shape[-1])


def _autocast(tensor: Tensor) -> Tensor:
    """Casts as torch.autocast casts the arguments of a linear layer, so that r, s and bias do not widen the result."""
    device = tensor.device.type
    enabled = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return tensor.to(torch.get_autocast_dtype(device)) if enabled and tensor.dtype != torch.float64 else tensor
