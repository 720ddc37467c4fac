"""Convolutions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax import Array

from probly_common.checks.layers import check_conv_base_layer, check_conv_kernel, check_padding
from probly_common.checks.rows import check_conv_rows, tiled
from probly_flax.functional.conv import members_conv, members_conv_transpose, scaled_kernels
from probly_flax.layers._base import Draws, FastWeightLayer, axes, draw_kernel, member_of, param
from probly_flax.random import Rngs

__all__ = ["BatchEnsembleConv", "BatchEnsembleConvTranspose"]

_OPTIONS = (
    "in_features",
    "out_features",
    "kernel_size",
    "kernel_shape",
    "strides",
    "padding",
    "kernel_dilation",
    "use_bias",
    "mask",
    "dtype",
    "param_dtype",
    "precision",
    "promote_dtype",
    "preferred_element_type",
)
_CONV_OPTIONS = (*_OPTIONS, "input_dilation", "feature_group_count", "conv_general_dilated")
_TRANSPOSE_OPTIONS = (*_OPTIONS, "transpose_kernel")


class BatchEnsembleConv(FastWeightLayer[nnx.Conv], nnx.Conv):
    r"""E convolutions, of 1, 2, 3 or more spatial axes, that share one kernel and differ by rank-one scalings.

    Member i computes  y_i = conv(x_i * r_i, W) * s_i + b_i        (Wen et al. 2020, eq. 5)

    Shape:
        x: (E*B, ..., *spatial, in_features), rows [k*B, (k+1)*B) belong to member k. Returns
            (E*B, ..., *spatial, out_features), of the sizes that the base layer gives.
    Weights:
        kernel (*kernel_size, in_features / feature_group_count, out_features), r (E, in_features),
            s (E, out_features), bias (E, out_features) or None.
    Args:
        base_layer: the Conv layer to start from. It is copied, never changed or shared.
        use_base_weights: share a copy of the base layer's kernel; otherwise draw one, lecun_normal, of the kernel's
            shape.
        rngs, num_members, init, r_mean, r_std, s_mean, s_std: see `__init__`.
    Raises:
        TypeError: if base_layer is not a Conv layer, or rngs neither a seed nor an Rngs.
        ValueError: if the rows do not divide by num_members, the last axis is not in_features, or there is no batch
            axis.
    Example:
        >>> layer = BatchEnsembleConv(nnx.Conv(3, 2, (3, 3), rngs=nnx.Rngs(0)), num_members=4)
        >>> layer(jnp.ones((8, 6, 5, 3))).shape
        (8, 6, 5, 2)
        >>> [p.shape for p in (layer.kernel, layer.r, layer.s, layer.bias)]
        [(3, 3, 3, 2), (4, 3), (4, 2), (4, 2)]
    """

    def _check_base(self, what: str, base_layer: nnx.Conv) -> None:
        check_conv_base_layer(what, "Conv", base_layer, (nnx.Conv,), "__call__")
        check_padding(what, base_layer.padding, ("SAME", "SAME_LOWER", "VALID", "CIRCULAR", "REFLECT", "CAUSAL"))
        check_conv_kernel(what, base_layer.kernel.shape)

    def _convert(self, base_layer: nnx.Conv, draws: Draws) -> None:
        _copy_options(self, base_layer, _CONV_OPTIONS)
        base = base_layer.kernel
        self.kernel = draws.weight(base)
        self.r, self.s = draws.fast_weights(self.in_features, self.out_features, base, *axes(base)[-2:])
        self.bias = draws.rows(base_layer.bias)

    def __call__(self, inputs: Array, out_sharding: Any = None) -> Array:
        """Applies each member to its own rows.

        Shape:
            inputs: (E*B, ..., *spatial, in_features). Returns (E*B, ..., *spatial, out_features), sharded as asked.
        """
        what, spatial = "BatchEnsembleConv", len(self.kernel_size)
        check_conv_rows(what, inputs.shape, self.num_members, self.in_features, spatial, channels_first=False)
        return self._applied(inputs, out_sharding, shared=False)

    def shared_batch(self, inputs: Array) -> Array:
        """Gives every member the same batch: the same as self(tile_members(inputs, num_members)), without the copies.

        Shape:
            inputs: (B, ..., *spatial, in_features). Returns (E*B, ..., *spatial, out_features).
        """
        shape, spatial = tiled(inputs.shape, self.num_members), len(self.kernel_size)
        what = "BatchEnsembleConv"
        check_conv_rows(what, shape, self.num_members, self.in_features, spatial, channels_first=False)
        return self._applied(inputs, None, shared=True)

    def _applied(self, inputs: Array, out_sharding: Any, shared: bool) -> Array:
        return members_conv(
            *_promoted(self, inputs),
            shared,
            strides=self.strides,
            padding=self.padding,
            kernel_dilation=self.kernel_dilation,
            feature_group_count=self.feature_group_count,
            input_dilation=self.input_dilation,
            precision=self.precision,
            preferred_element_type=self.preferred_element_type,
            conv_general_dilated=self.conv_general_dilated,
            out_sharding=out_sharding,
        )

    def member(self, i: int) -> nnx.Conv:
        """Returns member i as an ordinary Conv layer, with the kernel W * r_i s_i^T and the bias b_i.

        Example:
            >>> base, x = nnx.Conv(3, 2, (2,), rngs=nnx.Rngs(0)), jnp.ones((5, 6, 3))
            >>> layer = BatchEnsembleConv(base, num_members=4)
            >>> bool(jnp.allclose(layer.member(1)(x), layer(jnp.tile(x, (4, 1, 1)))[5:10]))
            True
        """
        i = self._index(i)
        conv = nnx.eval_shape(lambda: nnx.Conv(1, 1, 1, rngs=nnx.Rngs(0)))
        _copy_options(conv, self, _CONV_OPTIONS)
        kernel = scaled_kernels(self.kernel[...], self.r[i : i + 1], self.s[i : i + 1], self.feature_group_count)[0]
        conv.kernel = param(kernel, self.kernel, *axes(self.kernel))
        conv.bias = member_of(self.bias, i)
        return conv


class BatchEnsembleConvTranspose(FastWeightLayer[nnx.ConvTranspose], nnx.ConvTranspose):
    r"""E transposed convolutions, of 1 to 3 spatial axes, that share one kernel and differ by rank-one scalings.

    Member i computes  y_i = conv_transpose(x_i * r_i, W) * s_i + b_i        (Wen et al. 2020, eq. 5)

    Shape:
        x: (E*B, ..., *spatial, in_features), rows [k*B, (k+1)*B) belong to member k. Returns
            (E*B, ..., *spatial, out_features), of the sizes that the base layer gives.
    Weights:
        kernel (*kernel_size, in_features, out_features), or (*kernel_size, out_features, in_features) if the base
            layer has transpose_kernel; r (E, in_features), s (E, out_features), bias (E, out_features) or None.
    Args:
        base_layer: the ConvTranspose layer to start from. It is copied, never changed or shared.
        use_base_weights: share a copy of the base layer's kernel; otherwise draw one, lecun_normal, of shape
            (*kernel_size, in_features, out_features). It is laid out so that one seed gives one function with either
            transpose_kernel, which is that of the layer in torch: without it, the draw's mirror image.
        rngs, num_members, init, r_mean, r_std, s_mean, s_std: see `__init__`.
    Raises:
        TypeError: if base_layer is not a ConvTranspose layer, or rngs neither a seed nor an Rngs.
        ValueError: if the rows do not divide by num_members, the last axis is not in_features, or there is no batch
            axis.
    Example:
        >>> base = nnx.ConvTranspose(3, 2, (2, 2), strides=2, rngs=nnx.Rngs(0))
        >>> layer = BatchEnsembleConvTranspose(base, num_members=4)
        >>> layer(jnp.ones((8, 6, 5, 3))).shape
        (8, 12, 10, 2)
        >>> [p.shape for p in (layer.kernel, layer.r, layer.s, layer.bias)]
        [(2, 2, 3, 2), (4, 3), (4, 2), (4, 2)]
    """

    def _check_base(self, what: str, base_layer: nnx.ConvTranspose) -> None:
        check_conv_base_layer(what, "ConvTranspose", base_layer, (nnx.ConvTranspose,), "__call__")
        check_padding(what, base_layer.padding, ("SAME", "VALID", "CIRCULAR"))
        check_conv_kernel(what, base_layer.kernel.shape)

    def _convert(self, base_layer: nnx.ConvTranspose, draws: Draws) -> None:
        _copy_options(self, base_layer, _TRANSPOSE_OPTIONS)
        base = base_layer.kernel
        self.kernel = draws.weight(base, self._drawn)
        in_axis, out_axis = axes(base)[:-3:-1] if self.transpose_kernel else axes(base)[-2:]
        self.r, self.s = draws.fast_weights(self.in_features, self.out_features, base, in_axis, out_axis)
        self.bias = draws.rows(base_layer.bias)

    def _drawn(self, rngs: Rngs, like: Array) -> Array:
        if self.transpose_kernel:
            return draw_kernel(rngs, like.swapaxes(-1, -2)).swapaxes(-1, -2)
        return jnp.flip(draw_kernel(rngs, like), range(like.ndim - 2))

    def __call__(self, inputs: Array) -> Array:
        """Applies each member to its own rows.

        Shape:
            inputs: (E*B, ..., *spatial, in_features). Returns (E*B, ..., *spatial, out_features).
        """
        what, spatial = "BatchEnsembleConvTranspose", len(self.kernel_size)
        check_conv_rows(what, inputs.shape, self.num_members, self.in_features, spatial, channels_first=False)
        return members_conv_transpose(
            *_promoted(self, inputs),
            shared=False,
            strides=self.strides,
            padding=self.padding,
            kernel_dilation=self.kernel_dilation,
            transpose_kernel=self.transpose_kernel,
            precision=self.precision,
            preferred_element_type=self.preferred_element_type,
        )

    def member(self, i: int) -> nnx.ConvTranspose:
        """Returns member i as an ordinary ConvTranspose layer, with the kernel W * r_i s_i^T and the bias b_i.

        Example:
            >>> base, x = nnx.ConvTranspose(3, 2, (2,), rngs=nnx.Rngs(0)), jnp.ones((5, 6, 3))
            >>> layer = BatchEnsembleConvTranspose(base, num_members=4)
            >>> bool(jnp.allclose(layer.member(1)(x), layer(jnp.tile(x, (4, 1, 1)))[5:10]))
            True
        """
        i = self._index(i)
        conv = nnx.eval_shape(lambda: nnx.ConvTranspose(1, 1, 1, rngs=nnx.Rngs(0)))
        _copy_options(conv, self, _TRANSPOSE_OPTIONS)
        kernel = scaled_kernels(
            self.kernel[...], self.r[i : i + 1], self.s[i : i + 1], transpose_kernel=self.transpose_kernel
        )[0]
        conv.kernel = param(kernel, self.kernel, *axes(self.kernel))
        conv.bias = member_of(self.bias, i)
        return conv


def _copy_options(target: nnx.Module, source: nnx.Module, names: Sequence[str]) -> None:
    for name in names:
        value = getattr(source, name)
        setattr(target, name, nnx.data(value.copy()) if name == "mask" and value is not None else value)


def _promoted(layer: Any, inputs: Array) -> tuple[Array, Array, Array, Array, Array | None]:
    """Returns the inputs and weights in the dtype that the base layer computes in."""
    kernel = layer.kernel[...] if layer.mask is None else layer.kernel[...] * layer.mask
    bias = None if layer.bias is None else layer.bias[...]
    x, kernel, bias = layer.promote_dtype((inputs, kernel, bias), dtype=layer.dtype)
    return x, kernel, layer.r[...].astype(x.dtype), layer.s[...].astype(x.dtype), bias
