"""Linear layers."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from probly_common.checks.layers import check_fast_weights, check_weight
from probly_common.checks.rows import check_member_rows, tiled
from probly_torch.functional._common import promoted

__all__ = ["batch_ensemble_linear"]


def batch_ensemble_linear(
    x: Tensor, weight: Tensor, r: Tensor, s: Tensor, bias: Tensor | None = None, *, shared: bool = False
) -> Tensor:
    r"""Applies to each member's rows the linear map whose weight is W * s_i r_i^T.

    Member i computes  y_i = ((x_i * r_i) W^T) * s_i + b_i        (Wen et al. 2020, eq. 5)

    For few rows r and s scale the activations, as written; for many, with B*(in + out) >= 4*in*out, they scale the
    weight, x_i (W * s_i r_i^T)^T + b_i, which is faster and keeps nothing but x for the backward pass.

    Shape:
        x: (E*B, ..., in_features), rows [k*B, (k+1)*B) belong to member k; if shared, (B, ..., in_features), the
            same for every member. Returns (E*B, ..., out_features).
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
    what = "batch_ensemble_linear"
    check_weight(what, weight.shape)
    out_features, in_features = weight.shape
    check_fast_weights(what, in_features, out_features, r.shape, s.shape, None if bias is None else bias.shape)
    check_member_rows(what, tiled(x.shape, r.shape[0]) if shared else x.shape, r.shape[0], in_features)
    return members_linear(*promoted(what, x, weight, r, s, bias), shared)


def members_linear(
    x: Tensor, weight: Tensor, r: Tensor, s: Tensor, bias: Tensor | None, shared: bool = False
) -> Tensor:
    """Computes batch_ensemble_linear for arguments that are checked and promoted, as a layer does at its door.

    If shared, x (B, ..., in_features) is the batch of every member.
    """
    num_members, in_features = r.shape
    out_features = weight.shape[0]
    batches = 1 if shared else num_members
    rows = math.prod(x.shape[:-1]) // batches
    members = x.reshape(batches, rows, in_features)
    if torch.compiler.is_exporting() or rows * (in_features + out_features) < 4 * in_features * out_features:
        y = _scale_activations(members, weight, r, s, bias)
    else:
        # The compiler knows no jvp, and decides by itself what to keep.
        scale_weights = _ScaledWeights.forward if torch.compiler.is_compiling() else _ScaledWeights.apply
        y = scale_weights(members.expand(num_members, -1, -1) if shared else members, weight, r, s, bias)
    return y.reshape(num_members // batches * x.shape[0], *x.shape[1:-1], out_features)


def _scale_activations(x: Tensor, weight: Tensor, r: Tensor, s: Tensor, bias: Tensor | None) -> Tensor:
    """Costs about E*B*(in + out) more than a linear layer, as the paper has it: for few rows, x (E or 1, B, in)."""
    y = linear(x * r.unsqueeze(1), weight)
    return y * s.unsqueeze(1) if bias is None else torch.addcmul(bias.unsqueeze(1), y, s.unsqueeze(1))


class _ScaledWeights(torch.autograd.Function):
    """Costs about E*in*out more than a linear layer: for many rows, x (E, B, in), where it saves nothing but x.

    All gradients of the weights come from one product for each member, G_i = g_i^T x_i.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor, r: Tensor, s: Tensor, bias: Tensor | None) -> Tensor:
        weights = _member_weights(weight, r, s).mT
        return torch.bmm(x, weights) if bias is None else torch.baddbmm(bias[:, None], x, weights)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *saved, bias = inputs
        ctx.save_for_backward(*saved)
        ctx.save_for_forward(*saved)
        ctx.has_bias = bias is not None

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight, r, s = ctx.saved_tensors
        needs_x, needs_weight, needs_r, needs_s, needs_bias = ctx.needs_input_grad
        products = torch.bmm(g.mT, x)
        by_weight = products * weight
        return (
            torch.bmm(g, _member_weights(weight, r, s)) if needs_x else None,
            (products * r[:, None] * s[:, :, None]).sum(0) if needs_weight else None,
            torch.bmm(s[:, None], by_weight)[:, 0] if needs_r else None,
            torch.bmm(by_weight, r[:, :, None])[:, :, 0] if needs_s else None,
            g.sum(1) if ctx.has_bias and needs_bias else None,
        )

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        x, weight, r, s = ctx.saved_tensors
        dx, dweight, dr, ds, dbias = tangents
        terms = [] if dx is None else [torch.bmm(dx, _member_weights(weight, r, s).mT)]
        if dweight is not None:
            terms.append(torch.bmm(x, _member_weights(dweight, r, s).mT))
        if dr is not None:
            terms.append(torch.bmm(x, _member_weights(weight, dr, s).mT))
        if ds is not None:
            terms.append(torch.bmm(x, _member_weights(weight, r, ds).mT))
        if dbias is not None:
            terms.append(dbias[:, None].expand(-1, x.shape[1], -1))
        return sum(terms[1:], terms[0])


def _member_weights(weight: Tensor, r: Tensor, s: Tensor) -> Tensor:
    """Returns W * s_i r_i^T of each member: (E, out, in)."""
    return weight * r[:, None] * s[:, :, None]
