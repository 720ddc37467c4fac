"""Normalisation layers in which each member has its own scale, offset and running statistics."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import batch_norm, group_norm, layer_norm

from probly_common.checks.layers import check_base_type, check_dtype
from probly_common.checks.rows import check_enough_values, check_norm_rows
from probly_common.checks.values import check_num_members
from probly_torch.layers._base import BaseLayer, MemberLayer, copied, member_of, param, repeated

__all__ = ["BatchEnsembleBatchNorm", "BatchEnsembleGroupNorm", "BatchEnsembleLayerNorm"]

_RANKS = {nn.BatchNorm1d: (2, 3), nn.BatchNorm2d: (4, 4), nn.BatchNorm3d: (5, 5)}


class _Norm(MemberLayer[BaseLayer]):
    """The base of the layers: a scale and an offset for each member."""

    weight: nn.Parameter | None
    bias: nn.Parameter | None

    def _of_members(self) -> Iterable[str]:
        return "weight", "bias", "running_mean", "running_var"


class BatchEnsembleBatchNorm(_Norm[nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d]):
    r"""E batch normalisations, each with its own scale, offset and running statistics.

    Member i computes  y_i = (x_i - mean_i) / sqrt(var_i + eps) * weight_i + bias_i, with the mean and variance of its
    own rows in train mode and its running statistics in eval mode. Everything else is the base layer's: eps, momentum,
    affine, track_running_stats. num_batches_tracked counts calls, which are the same for all members.

    Shape:
        x: (E*B, num_features, ...), of the base layer's rank, rows [k*B, (k+1)*B) belong to member k. Returns the same.
    Weights:
        weight and bias (E, num_features) or None; running_mean and running_var (E, num_features) or None,
        num_batches_tracked () or None. All members start as copies of the base layer's.
    Args:
        base_layer: the BatchNorm1d, BatchNorm2d or BatchNorm3d layer to start from, copied.
        num_members: the number of members E.
    Raises:
        TypeError: if base_layer is not such a layer, or x has another dtype than the base layer takes.
        ValueError: if the rows do not divide by num_members, the rank or the features are others, or a member has a
            single value in each channel in train mode.
    Example:
        >>> import torch
        >>> layer = BatchEnsembleBatchNorm(nn.BatchNorm2d(3), num_members=4)
        >>> layer(torch.ones(8, 3, 5, 5)).shape, layer.running_mean.shape
        (torch.Size([8, 3, 5, 5]), torch.Size([4, 3]))
    """

    running_mean: Tensor | None
    running_var: Tensor | None
    num_batches_tracked: Tensor | None

    def __init__(self, base_layer: nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d, num_members: int = 1) -> None:
        super().__init__()
        what = "BatchEnsembleBatchNorm"
        check_base_type(what, "a BatchNorm", base_layer, tuple(_RANKS), "forward")
        self.num_members = check_num_members(what, num_members)
        self.base_type = next(each for each in _RANKS if isinstance(base_layer, each))
        self.num_features, self.eps, self.momentum = base_layer.num_features, base_layer.eps, base_layer.momentum
        self.affine, self.track_running_stats = base_layer.affine, base_layer.track_running_stats
        _for_each_member(self, base_layer)
        for name in ("running_mean", "running_var"):
            values = getattr(base_layer, name)
            self.register_buffer(name, None if values is None else repeated(values, self.num_members))
        count = base_layer.num_batches_tracked
        self.register_buffer("num_batches_tracked", None if count is None else copied(count))
        self.register_load_state_dict_pre_hook(_count_is_optional)
        self.train(base_layer.training)

    def forward(self, x: Tensor) -> Tensor:
        what = "BatchEnsembleBatchNorm"
        check_norm_rows(what, x.shape, self.num_members, (self.num_features,), x.shape[1:2], _RANKS[self.base_type])
        _check_dtype(what, x, self.running_mean if self.weight is None else self.weight)
        batch_statistics = self.training or self.running_mean is None
        values = x.shape[0] // self.num_members * x.shape[2:].numel() if batch_statistics else 0
        check_enough_values(what, x.shape, values, "each channel of a member", "Pass more rows, or call layer.eval().")

        momentum = 0.0 if self.momentum is None else self.momentum
        if self.training and self.track_running_stats and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if self.momentum is None:  # the cumulative average
                momentum = 1.0 / float(self.num_batches_tracked)
        tracked = self.track_running_stats or not self.training
        running = (self.running_mean, self.running_var) if tracked else (None, None)
        mean, var, weight, bias = (None if v is None else v.view(-1) for v in (*running, self.weight, self.bias))
        # Members side by side, as the channels of one batch: (E*B, C, ...) -> (B, E*C, ...). Where the channels are
        # last in memory they stay there.
        last = _channels_last(x)
        axis = x.ndim - 1 if last else 1
        members = x.unflatten(0, (self.num_members, x.shape[0] // self.num_members)).movedim(2, axis + 1)
        side_by_side = members.movedim(0, axis).flatten(axis, axis + 1).movedim(axis, 1)
        y = batch_norm(side_by_side, mean, var, weight, bias, batch_statistics, momentum, self.eps)
        members = y.movedim(1, axis).unflatten(axis, (self.num_members, self.num_features)).movedim(axis, 0)
        return members.flatten(0, 1).movedim(axis, 1)

    def reset_running_stats(self) -> None:
        """Resets every member's statistics to those of a new layer, as `torch.optim.swa_utils.update_bn` does first."""
        for statistics, start in ((self.running_mean, 0), (self.running_var, 1), (self.num_batches_tracked, 0)):
            if statistics is not None and self.track_running_stats:
                statistics.fill_(start)

    def member(self, i: int) -> nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d:
        """Returns member i as an ordinary BatchNorm layer, with its own weights and statistics.

        It is of the base layer's class.

        Example:
            >>> import torch
            >>> layer, x = BatchEnsembleBatchNorm(nn.BatchNorm1d(3), num_members=4), torch.randn(5, 3)
            >>> torch.allclose(layer.member(1)(x), layer(x.repeat(4, 1))[5:10])
            True
        """
        i = self._index(i)
        layer = self.base_type(
            self.num_features, self.eps, self.momentum, self.affine, self.track_running_stats, device="meta"
        )
        for name in ("running_mean", "running_var"):
            values = getattr(self, name)
            setattr(layer, name, None if values is None else copied(values[i]))
        count = self.num_batches_tracked
        layer.num_batches_tracked = None if count is None else copied(count)
        return _of_member(self, i, layer)

    def extra_repr(self) -> str:
        return (
            f"{self.num_features}, num_members={self.num_members}, eps={self.eps}, momentum={self.momentum}, "
            f"affine={self.affine}, bias={self.bias is not None}, track_running_stats={self.track_running_stats}"
        )


class BatchEnsembleLayerNorm(_Norm[nn.LayerNorm]):
    r"""E layer normalisations, each with its own scale and offset.

    Member i computes  y_i = (x_i - mean) / sqrt(var + eps) * weight_i + bias_i, with the mean and variance of the last
    axes of each row, those of normalized_shape.

    Shape:
        x: (E*B, ..., *normalized_shape), rows [k*B, (k+1)*B) belong to member k. Returns the same.
    Weights:
        weight and bias (E, *normalized_shape) or None. All members start as copies of the base layer's.
    Args:
        base_layer: the LayerNorm layer to start from, copied.
        num_members: the number of members E.
    Raises:
        TypeError: if base_layer is not a LayerNorm layer, or x has another dtype than the base layer takes.
        ValueError: if the rows do not divide by num_members or the last axes are not normalized_shape.
    Example:
        >>> import torch
        >>> layer = BatchEnsembleLayerNorm(nn.LayerNorm((5, 3)), num_members=4)
        >>> layer(torch.ones(8, 5, 3)).shape, layer.weight.shape
        (torch.Size([8, 5, 3]), torch.Size([4, 5, 3]))
    """

    def __init__(self, base_layer: nn.LayerNorm, num_members: int = 1) -> None:
        super().__init__()
        what = "BatchEnsembleLayerNorm"
        check_base_type(what, "a LayerNorm", base_layer, (nn.LayerNorm,), "forward")
        self.num_members = check_num_members(what, num_members)
        self.normalized_shape, self.eps = base_layer.normalized_shape, base_layer.eps
        self.elementwise_affine = base_layer.elementwise_affine
        _for_each_member(self, base_layer)
        self.train(base_layer.training)

    def forward(self, x: Tensor) -> Tensor:
        what, axes = "BatchEnsembleLayerNorm", len(self.normalized_shape)
        check_norm_rows(what, x.shape, self.num_members, self.normalized_shape, x.shape[1:][-axes:], (1 + axes,))
        _check_dtype(what, x, self.weight)
        return _scaled(self, layer_norm(x, self.normalized_shape, eps=self.eps), x.ndim - axes)

    def member(self, i: int) -> nn.LayerNorm:
        """Returns member i as an ordinary LayerNorm layer.

        Example:
            >>> import torch
            >>> layer, x = BatchEnsembleLayerNorm(nn.LayerNorm(3), num_members=4), torch.randn(5, 3)
            >>> torch.allclose(layer.member(1)(x), layer(x.repeat(4, 1))[5:10])
            True
        """
        i = self._index(i)
        layer = nn.LayerNorm(self.normalized_shape, self.eps, self.elementwise_affine, device="meta")
        return _of_member(self, i, layer)

    def extra_repr(self) -> str:
        return (
            f"{self.normalized_shape}, num_members={self.num_members}, eps={self.eps}, "
            f"elementwise_affine={self.elementwise_affine}, bias={self.bias is not None}"
        )


class BatchEnsembleGroupNorm(_Norm[nn.GroupNorm]):
    r"""E group normalisations, each with its own scale and offset.

    Member i computes  y_i = (x_i - mean) / sqrt(var + eps) * weight_i + bias_i, with the mean and variance of each
    group of channels in each row.

    Shape:
        x: (E*B, num_channels, ...), rows [k*B, (k+1)*B) belong to member k. Returns the same.
    Weights:
        weight and bias (E, num_channels) or None. All members start as copies of the base layer's.
    Args:
        base_layer: the GroupNorm layer to start from, copied.
        num_members: the number of members E.
    Raises:
        TypeError: if base_layer is not a GroupNorm layer, or x has another dtype than the base layer takes.
        ValueError: if the rows do not divide by num_members, there are other than num_channels channels, or a member
            has a single value in all.
    Example:
        >>> import torch
        >>> layer = BatchEnsembleGroupNorm(nn.GroupNorm(3, 6), num_members=4)
        >>> layer(torch.ones(8, 6, 5, 5)).shape, layer.weight.shape
        (torch.Size([8, 6, 5, 5]), torch.Size([4, 6]))
    """

    def __init__(self, base_layer: nn.GroupNorm, num_members: int = 1) -> None:
        super().__init__()
        what = "BatchEnsembleGroupNorm"
        check_base_type(what, "a GroupNorm", base_layer, (nn.GroupNorm,), "forward")
        self.num_members = check_num_members(what, num_members)
        self.num_groups, self.num_channels = base_layer.num_groups, base_layer.num_channels
        self.eps, self.affine = base_layer.eps, base_layer.affine
        _for_each_member(self, base_layer)
        self.train(base_layer.training)

    def forward(self, x: Tensor) -> Tensor:
        what = "BatchEnsembleGroupNorm"
        check_norm_rows(what, x.shape, self.num_members, (self.num_channels,), x.shape[1:2], (2,))
        _check_dtype(what, x, self.weight)
        values = x.shape[0] // self.num_members * (self.num_channels // self.num_groups) * x.shape[2:].numel()
        check_enough_values(what, x.shape, values, "each group of a member", "Pass more rows, or take fewer groups.")
        return _scaled(self, group_norm(x, self.num_groups, eps=self.eps), 1)

    def member(self, i: int) -> nn.GroupNorm:
        """Returns member i as an ordinary GroupNorm layer.

        Example:
            >>> import torch
            >>> layer, x = BatchEnsembleGroupNorm(nn.GroupNorm(1, 3), num_members=4), torch.randn(5, 3)
            >>> torch.allclose(layer.member(1)(x), layer(x.repeat(4, 1))[5:10])
            True
        """
        i = self._index(i)
        layer = nn.GroupNorm(self.num_groups, self.num_channels, self.eps, self.affine, device="meta")
        return _of_member(self, i, layer)

    def extra_repr(self) -> str:
        return (
            f"{self.num_groups}, {self.num_channels}, num_members={self.num_members}, eps={self.eps}, "
            f"affine={self.affine}, bias={self.bias is not None}"
        )


def _for_each_member(layer: Any, base_layer: nn.Module) -> None:
    """Gives the layer a copy of the base layer's weight and bias for each member."""
    for name in ("weight", "bias"):
        values = getattr(base_layer, name)
        if values is not None:
            values = param(repeated(values, layer.num_members), values)
        layer.register_parameter(name, values)


def _of_member(layer: Any, i: int, ordinary: Any) -> Any:
    """Gives an ordinary layer the weight, the bias and the mode of member i."""
    for name in ("weight", "bias"):
        setattr(ordinary, name, member_of(getattr(layer, name), i))
    return ordinary.train(layer.training)


def _scaled(layer: Any, y: Tensor, axis: int) -> Tensor:
    """Computes y * weight + bias, each member's own.

    The axes of a member's weight are those of y from `axis` on.
    """
    if layer.weight is None:
        return y
    members = y.unflatten(0, (layer.num_members, y.shape[0] // layer.num_members))
    own = layer.weight.shape[1:]
    shape = (layer.num_members, *(1,) * axis, *own, *(1,) * (y.ndim - axis - len(own)))
    weight = layer.weight.view(shape)
    scaled = members * weight if layer.bias is None else torch.addcmul(layer.bias.view(shape), members, weight)
    return scaled.flatten(0, 1).to(y.dtype)  # of half precision, where only the weights are float32


def _channels_last(x: Tensor) -> bool:
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return x.ndim in formats and not x.is_contiguous() and x.is_contiguous(memory_format=formats[x.ndim])


def _check_dtype(what: str, x: Tensor, weight: Tensor | None) -> None:
    """Checks that x has a dtype that the base layer takes.

    It takes the weight's, half precision with float32 weights, and autocast's on a GPU.
    """
    device = x.device.type
    cast = device != "cpu" and torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    if weight is not None and not cast:
        check_dtype(what, x.dtype, weight.dtype)


def _count_is_optional(layer: Any, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
    """Lets weights without num_batches_tracked load, as into an nn.BatchNorm.

    There is none in Flax.
    """
    if layer.num_batches_tracked is not None:
        state_dict.setdefault(f"{prefix}num_batches_tracked", layer.num_batches_tracked)
