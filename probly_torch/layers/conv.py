"""Convolutions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn import functional
from torch.nn.parameter import is_lazy

from probly_common.checks.ensembles import check_initialized, member_index, member_indices
from probly_common.checks.layers import check_conv_base_layer, check_init, check_output_size, seed_is_not_num_members
from probly_common.checks.rows import check_conv_rows, tiled
from probly_common.checks.values import check_num_members
from probly_torch import random
from probly_torch.functional.conv import batch_ensemble_conv, batch_ensemble_conv_transpose, scaled_weights
from probly_torch.layers._common import copied, draw_fast_weights, draw_kernel, keep_rows
from probly_torch.random import Rngs

__all__ = ["BatchEnsembleConv", "BatchEnsembleConvTranspose"]

_CONV: dict[int, Any] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_CONV_TRANSPOSE: dict[int, Any] = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
_OPTIONS = (
    "in_channels",
    "out_channels",
    "kernel_size",
    "stride",
    "padding",
    "dilation",
    "groups",
)


class BatchEnsembleConv(nn.Module):
    r"""E convolutions, of 1 to 3 spatial axes, that share one weight and differ by rank-one scalings.

    Member i computes  y_i = conv(x_i * r_i, W) * s_i + b_i        (Wen et al. 2020, eq. 5)

    Shape:
        x: (E*B, in_channels, *spatial), rows [k*B, (k+1)*B) belong to member k. Returns (E*B, out_channels, *spatial),
            of the sizes that the base layer gives.
    Weights:
        weight (out_channels, in_channels / groups, *kernel_size), r (E, in_channels), s (E, out_channels),
            bias (E, out_channels) or None.
    Args:
        base_layer: the Conv1d, Conv2d or Conv3d layer to start from. It is copied, never changed or shared.
        rngs: a seed or an Rngs; keys come from `rngs.params()` for the weight (if drawn), r and s, in this order.
        num_members: the number of members E.
        use_base_weights: share a copy of the base layer's weight; otherwise draw one, lecun_normal, of shape
            (*kernel_size, in_channels / groups, out_channels).
        init: "normal" (r ~ N(r_mean, r_std), s ~ N(s_mean, s_std)), "random_sign" (+-1 with equal
            probability; Wen et al. 2020, appendix B) or "ones" (r = s = 1: members start equal).
        r_mean: mean of r under init="normal".
        r_std: standard deviation of r under init="normal".
        s_mean: mean of s under init="normal".
        s_std: standard deviation of s under init="normal".
    Raises:
        TypeError: if base_layer is not a Conv layer, or rngs neither a seed nor an Rngs.
        ValueError: if the rows do not divide by num_members, axis 1 is not in_channels, or there is no batch axis.
    Example:
        >>> import torch
        >>> layer = BatchEnsembleConv(nn.Conv2d(3, 2, 3, padding=1), num_members=4)
        >>> layer(torch.ones(8, 3, 6, 5)).shape
        torch.Size([8, 2, 6, 5])
        >>> [tuple(p.shape) for p in (layer.weight, layer.r, layer.s, layer.bias)]
        [(2, 3, 3, 3), (4, 3), (4, 2), (4, 2)]
    """

    @seed_is_not_num_members
    def __init__(
        self,
        base_layer: nn.Conv1d | nn.Conv2d | nn.Conv3d,
        rngs: Rngs | int = 1,
        num_members: int = 1,
        use_base_weights: bool = False,
        init: str = "normal",
        r_mean: float = 1.0,
        r_std: float = 0.5,
        s_mean: float = 1.0,
        s_std: float = 0.5,
    ) -> None:
        super().__init__()
        what = "BatchEnsembleConv"
        check_conv_base_layer(what, "Conv", base_layer, tuple(_CONV.values()), "forward")
        check_initialized(what, [name for name, p in base_layer.named_parameters() if is_lazy(p)])
        check_init(what, init, r_mean, r_std, s_mean, s_std)
        self.num_members = check_num_members(what, num_members)
        self.in_channels, self.out_channels = base_layer.in_channels, base_layer.out_channels
        self.kernel_size, self.stride, self.dilation = base_layer.kernel_size, base_layer.stride, base_layer.dilation
        self.groups, self.padding, self.padding_mode = base_layer.groups, base_layer.padding, base_layer.padding_mode
        rngs = random.as_rngs(what, rngs)

        base, bias = base_layer.weight, base_layer.bias
        weight = base if use_base_weights else _drawn(rngs, base)
        r = draw_fast_weights(rngs, (self.num_members, self.in_channels), init, r_mean, r_std, base)
        s = draw_fast_weights(rngs, (self.num_members, self.out_channels), init, s_mean, s_std, base)
        self.weight = nn.Parameter(copied(weight), requires_grad=base.requires_grad)
        self.r, self.s = nn.Parameter(r), nn.Parameter(s)
        self.bias = None
        if bias is not None:
            self.bias = nn.Parameter(copied(bias.expand(self.num_members, -1)), requires_grad=bias.requires_grad)
        self.train(base_layer.training)

    def forward(self, x: Tensor) -> Tensor:
        axes = len(self.kernel_size)
        check_conv_rows("BatchEnsembleConv", x.shape, self.num_members, self.in_channels, axes, channels_first=True)
        return self._applied(x, shared=False)

    def shared_batch(self, x: Tensor) -> Tensor:
        """Gives every member the same batch: the same as self(tile_members(x, num_members)), without the copies.

        Shape:
            x: (B, in_channels, *spatial). Returns (E*B, out_channels, *spatial).
        """
        shape, axes = tiled(x.shape, self.num_members), len(self.kernel_size)
        check_conv_rows("BatchEnsembleConv", shape, self.num_members, self.in_channels, axes, channels_first=True)
        return self._applied(x, shared=True)

    def _applied(self, x: Tensor, shared: bool) -> Tensor:
        padding = self.padding
        if self.padding_mode != "zeros":  # it commutes with scaling
            x, padding = functional.pad(x, self._pads(), mode=self.padding_mode), (0,) * len(self.kernel_size)
        return batch_ensemble_conv(
            x,
            self.weight,
            self.r,
            self.s,
            self.bias,
            stride=self.stride,
            padding=padding,
            dilation=self.dilation,
            groups=self.groups,
            shared=shared,
        )

    def _pads(self) -> list[int]:
        """Lists the padding before and after each spatial axis, the last one first, as `functional.pad` wants it."""
        spans = [dilation * (size - 1) for dilation, size in zip(self.dilation, self.kernel_size, strict=True)]
        if isinstance(self.padding, str):
            pairs = [(span // 2, span - span // 2) if self.padding == "same" else (0, 0) for span in spans]
        else:
            pairs = [(size, size) for size in self.padding]
        return [size for pair in reversed(pairs) for size in pair]

    def member(self, i: int) -> nn.Conv1d | nn.Conv2d | nn.Conv3d:
        """Returns member i as an ordinary Conv layer, with the weight W * s_i r_i^T and the bias b_i.

        Example:
            >>> import torch
            >>> layer, x = BatchEnsembleConv(nn.Conv1d(3, 2, 2), num_members=4), torch.ones(5, 3, 6)
            >>> torch.allclose(layer.member(1)(x), layer(x.repeat(4, 1, 1))[5:10])
            True
        """
        i = member_index("BatchEnsembleConv", i, self.num_members)
        options = {name: getattr(self, name) for name in (*_OPTIONS, "padding_mode")}
        conv = _CONV[len(self.kernel_size)](
            **options, bias=self.bias is not None, device="meta", dtype=self.weight.dtype
        )
        weight = scaled_weights(self.weight, self.s[i : i + 1], self.r[i : i + 1], self.groups)[0]
        conv.weight = nn.Parameter(weight.detach(), requires_grad=self.weight.requires_grad)
        if self.bias is not None:
            conv.bias = nn.Parameter(copied(self.bias[i]), requires_grad=self.bias.requires_grad)
        return conv.train(self.training)

    def keep_members(self, indices: Sequence[int]) -> None:
        """Drops every other member, in place."""
        indices = member_indices("BatchEnsembleConv", indices, self.num_members)
        self.num_members = len(indices)
        keep_rows(self, ("r", "s", "bias"), indices)

    def extra_repr(self) -> str:
        return _described(self, "padding_mode")


class BatchEnsembleConvTranspose(nn.Module):
    r"""E transposed convolutions, of 1 to 3 spatial axes, that share one weight and differ by rank-one scalings.

    Member i computes  y_i = conv_transpose(x_i * r_i, W) * s_i + b_i        (Wen et al. 2020, eq. 5)

    Shape:
        x: (E*B, in_channels, *spatial), rows [k*B, (k+1)*B) belong to member k. Returns (E*B, out_channels, *spatial),
            of the sizes that the base layer gives.
    Weights:
        weight (in_channels, out_channels / groups, *kernel_size), r (E, in_channels), s (E, out_channels),
            bias (E, out_channels) or None.
    Args:
        base_layer: the ConvTranspose1d, ConvTranspose2d or ConvTranspose3d layer to start from. It is copied, never
            changed or shared.
        rngs: a seed or an Rngs; keys come from `rngs.params()` for the weight (if drawn), r and s, in this order.
        num_members: the number of members E.
        use_base_weights: share a copy of the base layer's weight; otherwise draw one, lecun_normal, of shape
            (*kernel_size, in_channels / groups, out_channels): a member's fan-in is that of a convolution.
        init: "normal" (r ~ N(r_mean, r_std), s ~ N(s_mean, s_std)), "random_sign" (+-1 with equal
            probability; Wen et al. 2020, appendix B) or "ones" (r = s = 1: members start equal).
        r_mean: mean of r under init="normal".
        r_std: standard deviation of r under init="normal".
        s_mean: mean of s under init="normal".
        s_std: standard deviation of s under init="normal".
    Raises:
        TypeError: if base_layer is not a ConvTranspose layer, or rngs neither a seed nor an Rngs.
        ValueError: if the rows do not divide by num_members, axis 1 is not in_channels, or there is no batch axis.
    Example:
        >>> import torch
        >>> layer = BatchEnsembleConvTranspose(nn.ConvTranspose2d(3, 2, 2, stride=2), num_members=4)
        >>> layer(torch.ones(8, 3, 6, 5)).shape
        torch.Size([8, 2, 12, 10])
        >>> [tuple(p.shape) for p in (layer.weight, layer.r, layer.s, layer.bias)]
        [(3, 2, 2, 2), (4, 3), (4, 2), (4, 2)]
    """

    @seed_is_not_num_members
    def __init__(
        self,
        base_layer: nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d,
        rngs: Rngs | int = 1,
        num_members: int = 1,
        use_base_weights: bool = False,
        init: str = "normal",
        r_mean: float = 1.0,
        r_std: float = 0.5,
        s_mean: float = 1.0,
        s_std: float = 0.5,
    ) -> None:
        super().__init__()
        what = "BatchEnsembleConvTranspose"
        check_conv_base_layer(what, "ConvTranspose", base_layer, tuple(_CONV_TRANSPOSE.values()), "forward")
        check_initialized(what, [name for name, p in base_layer.named_parameters() if is_lazy(p)])
        check_init(what, init, r_mean, r_std, s_mean, s_std)
        self.num_members = check_num_members(what, num_members)
        self.in_channels, self.out_channels = base_layer.in_channels, base_layer.out_channels
        self.kernel_size, self.stride, self.dilation = base_layer.kernel_size, base_layer.stride, base_layer.dilation
        self.groups, self.output_padding = base_layer.groups, base_layer.output_padding
        self.padding: tuple[int, ...] = base_layer.padding  # type: ignore[assignment]  # only Conv has strings
        rngs = random.as_rngs(what, rngs)

        base, bias = base_layer.weight, base_layer.bias
        weight = base if use_base_weights else _swapped(_drawn(rngs, _swapped(base, self.groups)), self.groups)
        r = draw_fast_weights(rngs, (self.num_members, self.in_channels), init, r_mean, r_std, base)
        s = draw_fast_weights(rngs, (self.num_members, self.out_channels), init, s_mean, s_std, base)
        self.weight = nn.Parameter(copied(weight), requires_grad=base.requires_grad)
        self.r, self.s = nn.Parameter(r), nn.Parameter(s)
        self.bias = None
        if bias is not None:
            self.bias = nn.Parameter(copied(bias.expand(self.num_members, -1)), requires_grad=bias.requires_grad)
        self.train(base_layer.training)

    def forward(self, x: Tensor, output_size: Sequence[int] | None = None) -> Tensor:
        """Applies each member to its own rows.

        Shape:
            x: (E*B, in_channels, *spatial). Returns (E*B, out_channels, *spatial), whose spatial axes have the sizes
                output_size if it is given; they may follow those of the other two axes in it.
        """
        what, axes = "BatchEnsembleConvTranspose", len(self.kernel_size)
        check_conv_rows(what, x.shape, self.num_members, self.in_channels, axes, channels_first=True)
        return batch_ensemble_conv_transpose(
            x,
            self.weight,
            self.r,
            self.s,
            self.bias,
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
            output_padding=self.output_padding if output_size is None else self._output_padding(x, output_size),
            groups=self.groups,
        )

    def _output_padding(self, x: Tensor, output_size: Sequence[int]) -> list[int]:
        sizes = list(output_size[2:]) if len(output_size) == x.ndim else list(output_size)
        spans = [dilation * (size - 1) + 1 for dilation, size in zip(self.dilation, self.kernel_size, strict=True)]
        options = zip(x.shape[2:], self.stride, self.padding, spans, strict=True)
        smallest = [(n - 1) * stride - 2 * pad + span for n, stride, pad, span in options]
        check_output_size("BatchEnsembleConvTranspose", sizes, smallest, self.stride)
        return [size - low for size, low in zip(sizes, smallest, strict=True)]

    def member(self, i: int) -> nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d:
        """Returns member i as an ordinary ConvTranspose layer, with the weight W * r_i s_i^T and the bias b_i.

        Example:
            >>> import torch
            >>> layer, x = BatchEnsembleConvTranspose(nn.ConvTranspose1d(3, 2, 2), num_members=4), torch.ones(5, 3, 6)
            >>> torch.allclose(layer.member(1)(x), layer(x.repeat(4, 1, 1))[5:10])
            True
        """
        i = member_index("BatchEnsembleConvTranspose", i, self.num_members)
        options = {name: getattr(self, name) for name in (*_OPTIONS, "output_padding")}
        conv = _CONV_TRANSPOSE[len(self.kernel_size)](
            **options, bias=self.bias is not None, device="meta", dtype=self.weight.dtype
        )
        weight = scaled_weights(self.weight, self.r[i : i + 1], self.s[i : i + 1], self.groups)[0]
        conv.weight = nn.Parameter(weight.detach(), requires_grad=self.weight.requires_grad)
        if self.bias is not None:
            conv.bias = nn.Parameter(copied(self.bias[i]), requires_grad=self.bias.requires_grad)
        return conv.train(self.training)

    def keep_members(self, indices: Sequence[int]) -> None:
        """Drops every other member, in place."""
        indices = member_indices("BatchEnsembleConvTranspose", indices, self.num_members)
        self.num_members = len(indices)
        keep_rows(self, ("r", "s", "bias"), indices)

    def extra_repr(self) -> str:
        return _described(self, "output_padding")


def _drawn(rngs: Rngs, like: Tensor) -> Tensor:
    """Draws a weight (out, in / groups, *kernel_size) as (*kernel_size, in / groups, out), which is Flax's layout."""
    axes = range(2, like.ndim)
    return draw_kernel(rngs, like.permute(*axes, 1, 0)).permute(-1, -2, *(axis - 2 for axis in axes))


def _swapped(weight: Tensor, groups: int) -> Tensor:
    """Swaps (in, out / groups, ...) and (out, in / groups, ...), group by group."""
    return weight.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)


def _described(layer: BatchEnsembleConv | BatchEnsembleConvTranspose, last: str) -> str:
    names = (*_OPTIONS, last, "num_members")
    return ", ".join(f"{name}={getattr(layer, name)!r}" for name in names) + f", bias={layer.bias is not None}"
