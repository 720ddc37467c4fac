"""Convolutions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn import functional
from torch.nn.parameter import is_lazy

from probly_common.checks.ensembles import check_initialized
from probly_common.checks.layers import check_conv_base_layer, check_output_size
from probly_common.checks.rows import check_conv_rows, tiled
from probly_torch.functional._common import promoted
from probly_torch.functional.conv import members_conv, members_conv_transpose, scaled_weights
from probly_torch.layers._base import Draws, FastWeightLayer, draw_kernel, member_of, param
from probly_torch.random import Rngs

__all__ = ["BatchEnsembleConv", "BatchEnsembleConvTranspose"]

Conv = nn.Conv1d | nn.Conv2d | nn.Conv3d
ConvTranspose = nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d
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


class BatchEnsembleConv(FastWeightLayer[Conv]):
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
        use_base_weights: share a copy of the base layer's weight; otherwise draw one, lecun_normal, of shape
            (*kernel_size, in_channels / groups, out_channels).
        rngs, num_members, init, r_mean, r_std, s_mean, s_std: see `__init__`.
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

    def _check_base(self, what: str, base_layer: nn.Module) -> None:
        check_conv_base_layer(what, "Conv", base_layer, tuple(_CONV.values()), "forward")
        check_initialized(what, [name for name, p in base_layer.named_parameters() if is_lazy(p)])

    def _convert(self, base_layer: Conv, draws: Draws) -> None:
        self.in_channels, self.out_channels = base_layer.in_channels, base_layer.out_channels
        self.kernel_size, self.stride, self.dilation = base_layer.kernel_size, base_layer.stride, base_layer.dilation
        self.groups, self.padding, self.padding_mode = base_layer.groups, base_layer.padding, base_layer.padding_mode
        self.weight = draws.weight(base_layer.weight, _drawn)
        self.r, self.s = draws.fast_weights(self.in_channels, self.out_channels, base_layer.weight)
        self.bias = draws.rows(base_layer.bias)

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
        weights = promoted("BatchEnsembleConv", x, self.weight, self.r, self.s, self.bias)
        options: dict[str, Any] = {"stride": self.stride, "dilation": self.dilation, "groups": self.groups}
        return members_conv(*weights, shared, padding=padding, **options)

    def _pads(self) -> list[int]:
        """Lists the padding before and after each spatial axis, the last one first, as `functional.pad` wants it."""
        spans = [dilation * (size - 1) for dilation, size in zip(self.dilation, self.kernel_size, strict=True)]
        if isinstance(self.padding, str):
            pairs = [(span // 2, span - span // 2) if self.padding == "same" else (0, 0) for span in spans]
        else:
            pairs = [(size, size) for size in self.padding]
        return [size for pair in reversed(pairs) for size in pair]

    def member(self, i: int) -> Conv:
        """Returns member i as an ordinary Conv layer, with the weight W * s_i r_i^T and the bias b_i.

        Example:
            >>> import torch
            >>> layer, x = BatchEnsembleConv(nn.Conv1d(3, 2, 2), num_members=4), torch.ones(5, 3, 6)
            >>> torch.allclose(layer.member(1)(x), layer(x.repeat(4, 1, 1))[5:10])
            True
        """
        i = self._index(i)
        options = {name: getattr(self, name) for name in (*_OPTIONS, "padding_mode")}
        conv = _CONV[len(self.kernel_size)](
            **options, bias=self.bias is not None, device="meta", dtype=self.weight.dtype
        )
        weight = scaled_weights(self.weight, self.s[i : i + 1], self.r[i : i + 1], self.groups)[0]
        conv.weight = param(weight.detach(), self.weight)
        conv.bias = member_of(self.bias, i)
        return conv.train(self.training)

    def extra_repr(self) -> str:
        return _described(self, "padding_mode")


class BatchEnsembleConvTranspose(FastWeightLayer[ConvTranspose]):
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
        use_base_weights: share a copy of the base layer's weight; otherwise draw one, lecun_normal, of shape
            (*kernel_size, in_channels / groups, out_channels): a member's fan-in is that of a convolution.
        rngs, num_members, init, r_mean, r_std, s_mean, s_std: see `__init__`.
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

    def _check_base(self, what: str, base_layer: nn.Module) -> None:
        check_conv_base_layer(what, "ConvTranspose", base_layer, tuple(_CONV_TRANSPOSE.values()), "forward")
        check_initialized(what, [name for name, p in base_layer.named_parameters() if is_lazy(p)])

    def _convert(self, base_layer: ConvTranspose, draws: Draws) -> None:
        self.in_channels, self.out_channels = base_layer.in_channels, base_layer.out_channels
        self.kernel_size, self.stride, self.dilation = base_layer.kernel_size, base_layer.stride, base_layer.dilation
        self.groups, self.output_padding = base_layer.groups, base_layer.output_padding
        self.padding: tuple[int, ...] = base_layer.padding  # type: ignore[assignment]  # only Conv has strings
        self.weight = draws.weight(
            base_layer.weight, lambda rngs, like: _swapped(_drawn(rngs, _swapped(like, self.groups)), self.groups)
        )
        self.r, self.s = draws.fast_weights(self.in_channels, self.out_channels, base_layer.weight)
        self.bias = draws.rows(base_layer.bias)

    def forward(self, x: Tensor, output_size: Sequence[int] | None = None) -> Tensor:
        """Applies each member to its own rows.

        Shape:
            x: (E*B, in_channels, *spatial). Returns (E*B, out_channels, *spatial), whose spatial axes have the sizes
                output_size if it is given; they may follow those of the other two axes in it.
        """
        what, axes = "BatchEnsembleConvTranspose", len(self.kernel_size)
        check_conv_rows(what, x.shape, self.num_members, self.in_channels, axes, channels_first=True)
        output_padding = self.output_padding if output_size is None else self._output_padding(x, output_size)
        weights = promoted(what, x, self.weight, self.r, self.s, self.bias)
        options: dict[str, Any] = {"stride": self.stride, "dilation": self.dilation, "groups": self.groups}
        options |= {"padding": self.padding, "output_padding": output_padding}
        return members_conv_transpose(*weights, shared=False, **options)

    def _output_padding(self, x: Tensor, output_size: Sequence[int]) -> list[int]:
        sizes = list(output_size[2:]) if len(output_size) == x.ndim else list(output_size)
        spans = [dilation * (size - 1) + 1 for dilation, size in zip(self.dilation, self.kernel_size, strict=True)]
        options = zip(x.shape[2:], self.stride, self.padding, spans, strict=True)
        smallest = [(n - 1) * stride - 2 * pad + span for n, stride, pad, span in options]
        check_output_size("BatchEnsembleConvTranspose", sizes, smallest, self.stride)
        return [size - low for size, low in zip(sizes, smallest, strict=True)]

    def member(self, i: int) -> ConvTranspose:
        """Returns member i as an ordinary ConvTranspose layer, with the weight W * r_i s_i^T and the bias b_i.

        Example:
            >>> import torch
            >>> layer, x = BatchEnsembleConvTranspose(nn.ConvTranspose1d(3, 2, 2), num_members=4), torch.ones(5, 3, 6)
            >>> torch.allclose(layer.member(1)(x), layer(x.repeat(4, 1, 1))[5:10])
            True
        """
        i = self._index(i)
        options = {name: getattr(self, name) for name in (*_OPTIONS, "output_padding")}
        conv = _CONV_TRANSPOSE[len(self.kernel_size)](
            **options, bias=self.bias is not None, device="meta", dtype=self.weight.dtype
        )
        weight = scaled_weights(self.weight, self.r[i : i + 1], self.s[i : i + 1], self.groups)[0]
        conv.weight = param(weight.detach(), self.weight)
        conv.bias = member_of(self.bias, i)
        return conv.train(self.training)

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
