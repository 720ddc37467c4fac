"""Linear layers."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import linear

from probly_torch._checks import check_fast_weights, check_member_rows, check_weight
from probly_torch.functional._common import autocast, rows

__all__ = ["batch_ensemble_linear"]


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
        >>> import torch
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
    x, weight, r, s = autocast(x), autocast(weight), autocast(r), autocast(s)
    if x.dtype != weight.dtype:
        raise TypeError(
            f"batch_ensemble_linear expects inputs of the weight's dtype, {weight.dtype}; got {x.dtype}. "
            f"Convert them: x.to({weight.dtype})."
        )
    members = x.reshape(num_members, x.shape[0] // num_members, *x.shape[1:])
    y = linear(members * rows(r, members), weight) * rows(s, members)
    return (y if bias is None else y + rows(autocast(bias), members)).reshape(*x.shape[:-1], out_features)
