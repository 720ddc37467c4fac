"""Convolutions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array, lax

from probly_common.checks.layers import check_conv_kernel, check_fast_weights
from probly_common.checks.rows import check_conv_rows, tiled
from probly_flax.functional._common import rows

__all__ = ["batch_ensemble_conv", "batch_ensemble_conv_transpose"]


def batch_ensemble_conv(
    x: Array,
    kernel: Array,
    r: Array,
    s: Array,
    bias: Array | None = None,
    *,
    strides: int | Sequence[int] | None = 1,
    padding: Any = 0,
    kernel_dilation: int | Sequence[int] | None = 1,
    feature_group_count: int = 1,
    shared: bool = False,
    input_dilation: int | Sequence[int] | None = 1,
    precision: Any = None,
    preferred_element_type: Any = None,
    conv_general_dilated: Callable[..., Array] = lax.conv_general_dilated,
    out_sharding: Any = None,
) -> Array:
    r"""Applies to each member's rows the convolution whose kernel is W, scaled by s_i and r_i along its channels.

    Member i computes  y_i = conv(x_i * r_i, W) * s_i + b_i        (Wen et al. 2020, eq. 5)

    Shape:
        x: (E*B, ..., *spatial, in_features) with the spatial axes of the kernel, rows [k*B, (k+1)*B) belong to member
            k; if shared, (B, ..., *spatial, in_features), the same for every member. Returns
            (E*B, ..., *spatial, out_features), of the sizes that nnx.Conv gives with these options. The default is no
            padding, as in torch; that of nnx.Conv is 'SAME'.
    Weights:
        kernel (*kernel_size, in_features / feature_group_count, out_features), r (E, in_features),
            s (E, out_features), bias (E, out_features) or None.
    Raises:
        ValueError: if the rows do not divide by E, the last axis is not in_features, or r, s and bias do not have
            E rows each.
    Example:
        >>> import jax.numpy as jnp
        >>> x, kernel = jnp.ones((2, 4, 3)), jnp.ones((2, 3, 1))
        >>> r, s = jnp.array([[1.0, 1, 1], [2, 2, 2]]), jnp.array([[1.0], [10]])
        >>> batch_ensemble_conv(x, kernel, r, s)[..., 0]
        Array([[  6.,   6.,   6.],
               [120., 120., 120.]], dtype=float32)
    """
    what = "batch_ensemble_conv"
    check_conv_kernel(what, kernel.shape)
    _check(what, (kernel.shape[-2] * feature_group_count, kernel.shape[-1]), x, kernel, r, s, bias, shared)
    return members_conv(
        x,
        kernel,
        r,
        s,
        bias,
        shared,
        strides=strides,
        padding=padding,
        kernel_dilation=kernel_dilation,
        feature_group_count=feature_group_count,
        input_dilation=input_dilation,
        precision=precision,
        preferred_element_type=preferred_element_type,
        conv_general_dilated=conv_general_dilated,
        out_sharding=out_sharding,
    )


def batch_ensemble_conv_transpose(
    x: Array,
    kernel: Array,
    r: Array,
    s: Array,
    bias: Array | None = None,
    *,
    strides: int | Sequence[int] | None = 1,
    padding: Any = "VALID",
    kernel_dilation: int | Sequence[int] | None = 1,
    shared: bool = False,
    transpose_kernel: bool = False,
    precision: Any = None,
    preferred_element_type: Any = None,
) -> Array:
    r"""Applies to each member's rows the transposed convolution of W, scaled by s_i and r_i along its channels.

    Member i computes  y_i = conv_transpose(x_i * r_i, W) * s_i + b_i        (Wen et al. 2020, eq. 5)

    Shape:
        x: (E*B, ..., *spatial, in_features) with the spatial axes of the kernel, rows [k*B, (k+1)*B) belong to member
            k; if shared, (B, ..., *spatial, in_features), the same for every member. Returns
            (E*B, ..., *spatial, out_features), of the sizes that nnx.ConvTranspose gives with these options; its
            padding is that of the dilated inputs. The default cuts nothing off, as in torch; that of
            nnx.ConvTranspose is 'SAME'.
    Weights:
        kernel (*kernel_size, in_features, out_features), or under transpose_kernel its mirror image
            (*kernel_size, out_features, in_features), as torch has it; r (E, in_features), s (E, out_features),
            bias (E, out_features) or None.
    Raises:
        ValueError: if the rows do not divide by E, the last axis is not in_features, or r, s and bias do not have
            E rows each.
    Example:
        >>> import jax.numpy as jnp
        >>> x, kernel = jnp.ones((2, 2, 3)), jnp.ones((2, 3, 1))
        >>> r, s = jnp.array([[1.0, 1, 1], [2, 2, 2]]), jnp.array([[1.0], [10]])
        >>> batch_ensemble_conv_transpose(x, kernel, r, s)[..., 0]
        Array([[  3.,   6.,   3.],
               [ 60., 120.,  60.]], dtype=float32)
    """
    what = "batch_ensemble_conv_transpose"
    check_conv_kernel(what, kernel.shape)
    in_axis, out_axis = (-1, -2) if transpose_kernel else (-2, -1)
    _check(what, (kernel.shape[in_axis], kernel.shape[out_axis]), x, kernel, r, s, bias, shared)
    return members_conv_transpose(
        x,
        kernel,
        r,
        s,
        bias,
        shared,
        strides=strides,
        padding=padding,
        kernel_dilation=kernel_dilation,
        transpose_kernel=transpose_kernel,
        precision=precision,
        preferred_element_type=preferred_element_type,
    )


def members_conv(
    x: Array,
    kernel: Array,
    r: Array,
    s: Array,
    bias: Array | None,
    shared: bool,
    feature_group_count: int,
    out_sharding: Any,
    **options: Any,
) -> Array:
    """Computes batch_ensemble_conv for arguments that are checked and promoted, as a layer does at its door."""

    def conv(x: Array, kernel: Array) -> Array:
        groups = {"in_features": r.shape[1], "feature_group_count": feature_group_count}
        return nnx.Conv.__call__(_layer(kernel, **groups, **options), x, out_sharding)

    kernels = partial(scaled_kernels, kernel, r, s, groups=feature_group_count)
    return _members_conv(conv, kernels, x, kernel, r, s, bias, shared, out_sharding)


def members_conv_transpose(
    x: Array,
    kernel: Array,
    r: Array,
    s: Array,
    bias: Array | None,
    shared: bool,
    transpose_kernel: bool,
    **options: Any,
) -> Array:
    """Computes batch_ensemble_conv_transpose for arguments that are checked and promoted."""

    def conv_transpose(x: Array, kernel: Array) -> Array:
        return nnx.ConvTranspose.__call__(_layer(kernel, transpose_kernel=transpose_kernel, **options), x)

    kernels = partial(scaled_kernels, kernel, r, s, transpose_kernel=transpose_kernel)
    return _members_conv(conv_transpose, kernels, x, kernel, r, s, bias, shared)


def scaled_kernels(kernel: Array, r: Array, s: Array, groups: int = 1, transpose_kernel: bool = False) -> Array:
    """Returns the kernel of each member, (E, *kernel.shape), scaled along its channels.

    Inputs are those of one group.
    """
    num_members, out_features = s.shape
    inputs = jnp.repeat(r.reshape(num_members, groups, -1).swapaxes(1, 2), out_features // groups, axis=2)
    scales = inputs * s[:, None]
    if transpose_kernel:
        scales = scales.swapaxes(1, 2)
    return kernel[None] * scales.reshape(num_members, *(1,) * (kernel.ndim - 2), *scales.shape[1:])


def _layer(kernel: Array, **options: Any) -> Any:
    """Returns what nnx computes a convolution from.

    So its padding, in all of its kinds, is written once, in nnx.
    """
    return SimpleNamespace(
        kernel=kernel,
        kernel_size=kernel.shape[:-2],
        kernel_shape=kernel.shape,
        mask=None,
        bias=None,
        use_bias=False,
        dtype=None,
        promote_dtype=lambda arrays, *, dtype: arrays,  # they are promoted, with r, s and bias, before
        **options,
    )


def _check(
    what: str,
    features: tuple[int, int],
    x: Array,
    kernel: Array,
    r: Array,
    s: Array,
    bias: Array | None,
    shared: bool,
) -> None:
    check_fast_weights(what, *features, r.shape, s.shape, None if bias is None else bias.shape)
    shape = tiled(x.shape, r.shape[0]) if shared else x.shape
    check_conv_rows(what, shape, r.shape[0], features[0], kernel.ndim - 2, channels_first=False)


def _members_conv(
    conv: Callable[[Array, Array], Array],
    member_kernels: Callable[[], Array],
    x: Array,
    kernel: Array,
    r: Array,
    s: Array,
    bias: Array | None,
    shared: bool,
    out_sharding: Any = None,
) -> Array:
    num_members, batches = r.shape[0], 1 if shared else r.shape[0]
    members = x.reshape(batches, x.shape[0] // batches, *x.shape[1:])
    # On a CPU, members with many activations are faster one by one, each with a kernel of its own: no pass over the
    # activations but one that joins them. Elsewhere, and for few, E convolutions would cost more than they save.
    many = num_members <= 16 and jax.default_backend() == "cpu" and x.size >= 4 * batches * kernel.size
    if many and out_sharding is None:  # which is one of rows, which are one axis
        inputs = [x] * num_members if shared else members
        y = jnp.concatenate([conv(*each) for each in zip(inputs, member_kernels(), strict=True)])
        y = y.reshape(num_members, members.shape[1], *y.shape[1:])
    else:
        y = conv(lax.collapse(members * rows(r, members), 0, 2), kernel)
        y = y.reshape(num_members, members.shape[1], *y.shape[1:])
        y = y * rows(s, y).astype(y.dtype)
    return lax.collapse(y if bias is None else y + rows(bias, y), 0, 2)
