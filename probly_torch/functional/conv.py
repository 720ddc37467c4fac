"""Convolutions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from probly_common.checks.layers import check_conv_kernel, check_fast_weights
from probly_common.checks.rows import check_conv_rows, tiled
from probly_torch.functional._common import promoted

__all__ = ["batch_ensemble_conv", "batch_ensemble_conv_transpose"]

_CONV: dict[int, Callable[..., Tensor]] = {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}
_CONV_TRANSPOSE: dict[int, Callable[..., Tensor]] = {
    1: functional.conv_transpose1d,
    2: functional.conv_transpose2d,
    3: functional.conv_transpose3d,
}


def batch_ensemble_conv(
    x: Tensor,
    weight: Tensor,
    r: Tensor,
    s: Tensor,
    bias: Tensor | None = None,
    *,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    shared: bool = False,
) -> Tensor:
    r"""Applies to each member's rows the convolution whose weight is W, scaled by s_i and r_i along its channels.

    Member i computes  y_i = conv(x_i * r_i, W) * s_i + b_i        (Wen et al. 2020, eq. 5)

    Shape:
        x: (E*B, in_channels, *spatial) of 1 to 3 spatial axes, rows [k*B, (k+1)*B) belong to member k; if shared,
            (B, in_channels, *spatial), the same for every member. Returns
            (E*B, out_channels, *spatial), of the sizes that torch.nn.functional.conv1d, conv2d and conv3d give.
    Weights:
        weight (out_channels, in_channels / groups, *kernel_size), r (E, in_channels), s (E, out_channels),
            bias (E, out_channels) or None.
    Raises:
        ValueError: if the rows do not divide by E, axis 1 is not in_channels, or r, s and bias do not have E rows
            each.
        TypeError: if x has another dtype than the weight, outside autocast.
    Example:
        >>> import torch
        >>> x, weight = torch.ones(2, 3, 4), torch.ones(1, 3, 2)
        >>> r, s = torch.tensor([[1.0, 1, 1], [2, 2, 2]]), torch.tensor([[1.0], [10]])
        >>> batch_ensemble_conv(x, weight, r, s)
        tensor([[[  6.,   6.,   6.]],
        <BLANKLINE>
                [[120., 120., 120.]]])
    """
    what = "batch_ensemble_conv"
    check_conv_kernel(what, weight.shape, at_most=3)
    _check(what, (weight.shape[1] * groups, weight.shape[0]), x, weight, r, s, bias, shared)
    options: dict[str, Any] = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    return members_conv(*promoted(what, x, weight, r, s, bias), shared, **options)


def batch_ensemble_conv_transpose(
    x: Tensor,
    weight: Tensor,
    r: Tensor,
    s: Tensor,
    bias: Tensor | None = None,
    *,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    output_padding: int | Sequence[int] = 0,
    groups: int = 1,
    shared: bool = False,
) -> Tensor:
    r"""Applies to each member's rows the transposed convolution of W, scaled by s_i and r_i along its channels.

    Member i computes  y_i = conv_transpose(x_i * r_i, W) * s_i + b_i        (Wen et al. 2020, eq. 5)

    Shape:
        x: (E*B, in_channels, *spatial) of 1 to 3 spatial axes, rows [k*B, (k+1)*B) belong to member k; if shared,
            (B, in_channels, *spatial), the same for every member. Returns
            (E*B, out_channels, *spatial), of the sizes that torch.nn.functional.conv_transpose2d and its like give.
    Weights:
        weight (in_channels, out_channels / groups, *kernel_size), r (E, in_channels), s (E, out_channels),
            bias (E, out_channels) or None.
    Raises:
        ValueError: if the rows do not divide by E, axis 1 is not in_channels, or r, s and bias do not have E rows
            each.
        TypeError: if x has another dtype than the weight, outside autocast.
    Example:
        >>> import torch
        >>> x, weight = torch.ones(2, 3, 2), torch.ones(3, 1, 2)
        >>> r, s = torch.tensor([[1.0, 1, 1], [2, 2, 2]]), torch.tensor([[1.0], [10]])
        >>> batch_ensemble_conv_transpose(x, weight, r, s)
        tensor([[[  3.,   6.,   3.]],
        <BLANKLINE>
                [[ 60., 120.,  60.]]])
    """
    what = "batch_ensemble_conv_transpose"
    check_conv_kernel(what, weight.shape, at_most=3)
    _check(what, (weight.shape[0], weight.shape[1] * groups), x, weight, r, s, bias, shared)
    options: dict[str, Any] = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    options |= {"output_padding": output_padding}
    return members_conv_transpose(*promoted(what, x, weight, r, s, bias), shared, **options)


def members_conv(
    x: Tensor, weight: Tensor, r: Tensor, s: Tensor, bias: Tensor | None, shared: bool, groups: int, **options: Any
) -> Tensor:
    """Computes batch_ensemble_conv for arguments that are checked and promoted, as a layer does at its door."""
    conv = partial(_CONV[weight.ndim - 2], groups=groups, **options)
    return _members_conv(conv, partial(scaled_weights, weight, s, r, groups), x, weight, r, s, bias, shared)


def members_conv_transpose(
    x: Tensor, weight: Tensor, r: Tensor, s: Tensor, bias: Tensor | None, shared: bool, groups: int, **options: Any
) -> Tensor:
    """Computes batch_ensemble_conv_transpose for arguments that are checked and promoted."""
    conv = partial(_CONV_TRANSPOSE[weight.ndim - 2], groups=groups, **options)
    return _members_conv(conv, partial(scaled_weights, weight, r, s, groups), x, weight, r, s, bias, shared)


def scaled_weights(weight: Tensor, first: Tensor, second: Tensor, groups: int) -> Tensor:
    """Returns the weight of each member, (E, *weight.shape), scaled along its channels.

    It is scaled by `first` along its axis 0, and by `second` along its axis 1. Channels of axis 1 are those of one
    group.
    """
    num_members, axes = first.shape[0], (1,) * (weight.ndim - 2)
    scales = first.reshape(num_members, groups, -1, 1, *axes) * second.reshape(num_members, groups, 1, -1, *axes)
    return (weight.unflatten(0, (groups, -1)) * scales).flatten(1, 2)


def _check(
    what: str,
    channels: tuple[int, int],
    x: Tensor,
    weight: Tensor,
    r: Tensor,
    s: Tensor,
    bias: Tensor | None,
    shared: bool,
) -> None:
    check_fast_weights(what, *channels, r.shape, s.shape, None if bias is None else bias.shape)
    shape = tiled(x.shape, r.shape[0]) if shared else x.shape
    check_conv_rows(what, shape, r.shape[0], channels[0], weight.ndim - 2, channels_first=True)


def _members_conv(
    conv: Callable[..., Tensor],
    member_weights: Callable[[], Tensor],
    x: Tensor,
    weight: Tensor,
    r: Tensor,
    s: Tensor,
    bias: Tensor | None,
    shared: bool,
) -> Tensor:
    num_members = r.shape[0]
    batches = 1 if shared else num_members
    # On a CPU, members with many activations are faster one by one, each with a weight of its own: no pass over the
    # activations but one that joins them. Elsewhere, and for few, E convolutions would cost more than they save. What
    # is exported may serve any number of rows.
    one_by_one = num_members <= 16 and x.device.type == "cpu" and not torch.compiler.is_exporting()
    if one_by_one and x.numel() >= 4 * batches * weight.numel():
        biases = [None] * num_members if bias is None else bias
        inputs = [x] * num_members if shared else x.chunk(num_members)
        return torch.cat([conv(*each) for each in zip(inputs, member_weights(), biases, strict=True)])
    y = conv((_members(x, batches) * _rows(r, x)).flatten(0, 1), weight)
    members = _members(y, num_members)
    scaled = members * _rows(s, y) if bias is None else torch.addcmul(_rows(bias, y), members, _rows(s, y))
    return scaled.reshape(y.shape)


def _members(x: Tensor, num_members: int) -> Tensor:
    """Reshapes (E*B, ...) to (E, B, ...)."""
    return x.reshape(num_members, x.shape[0] // num_members, *x.shape[1:])


def _rows(weights: Tensor, x: Tensor) -> Tensor:
    """Reshapes (E, channels) to (E, 1, channels, 1, ...), against members (E, B, channels, *spatial)."""
    return weights.reshape(weights.shape[0], 1, weights.shape[1], *(1,) * (x.ndim - 2))
