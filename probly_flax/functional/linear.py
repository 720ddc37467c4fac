"""Linear layers."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from probly_common.checks.layers import check_fast_weights, check_weight
from probly_common.checks.rows import check_member_rows, tiled
from probly_flax.functional._common import rows

__all__ = ["batch_ensemble_linear"]


def batch_ensemble_linear(
    x: Array,
    kernel: Array,
    r: Array,
    s: Array,
    bias: Array | None = None,
    *,
    shared: bool = False,
    precision: Any = None,
    dot_general: Callable[..., Array] = lax.dot_general,
    **dot_general_kwargs: Any,
) -> Array:
    r"""Applies to each member's rows the linear map whose kernel is W * r_i s_i^T.

    Member i computes  y_i = ((x_i * r_i) W) * s_i + b_i        (Wen et al. 2020, eq. 5)

    For few rows r and s scale the activations, as written; for many, with B*(in + out) >= 4*in*out, they scale the
    kernel, x_i (W * r_i s_i^T) + b_i, which is faster and keeps nothing but x for the backward pass.

    Shape:
        x: (E*B, ..., in_features), rows [k*B, (k+1)*B) belong to member k; if shared, (B, ..., in_features), the
            same for every member. Returns (E*B, ..., out_features).
    Weights:
        kernel (in_features, out_features), r (E, in_features), s (E, out_features), bias (E, out_features) or None.
    Raises:
        ValueError: if the rows do not divide by E, the last axis is not in_features, or r, s and bias do not
            have E rows each.
    Example:
        >>> import jax.numpy as jnp
        >>> x, kernel = jnp.ones((4, 3)), jnp.ones((3, 2))
        >>> r, s = jnp.array([[1.0, 1, 1], [2, 2, 2]]), jnp.array([[1.0, 1], [1, 10]])
        >>> batch_ensemble_linear(x, kernel, r, s)
        Array([[ 3.,  3.],
               [ 3.,  3.],
               [ 6., 60.],
               [ 6., 60.]], dtype=float32)
    """
    what = "batch_ensemble_linear"
    check_weight(what, kernel.shape)
    in_features, out_features = kernel.shape
    check_fast_weights(what, in_features, out_features, r.shape, s.shape, None if bias is None else bias.shape)
    check_member_rows(what, tiled(x.shape, r.shape[0]) if shared else x.shape, r.shape[0], in_features)
    return members_linear(
        x, kernel, r, s, bias, shared, dot_general=dot_general, precision=precision, **dot_general_kwargs
    )


def members_linear(
    x: Array,
    kernel: Array,
    r: Array,
    s: Array,
    bias: Array | None,
    shared: bool = False,
    dot_general: Callable[..., Array] = lax.dot_general,
    **options: Any,
) -> Array:
    """Computes batch_ensemble_linear for arguments that are checked and promoted, as a layer does at its door.

    If shared, x (B, ..., in_features) is the batch of every member.
    """
    num_members, batches = r.shape[0], 1 if shared else r.shape[0]
    in_features, out_features = kernel.shape
    dot_general = partial(dot_general, **options)
    members = x.reshape(batches, x.shape[0] // batches, *x.shape[1:])
    many = math.prod(members.shape[1:-1]) * (in_features + out_features) >= 4 * in_features * out_features
    if not many or options.get("out_sharding") is not None:  # a sharding of rows, which are one axis
        y = _scale_activations(members, kernel, r, s, bias, dot_general)
    else:  # keeps nothing but x for the backward pass, and scales the weights once more in it
        y = jax.checkpoint(partial(_scale_weights, dot_general=dot_general))(members, kernel, r, s, bias)
    return y.reshape(num_members // batches * x.shape[0], *x.shape[1:-1], out_features)


def _scale_activations(
    x: Array, kernel: Array, r: Array, s: Array, bias: Array | None, dot_general: Callable[..., Array]
) -> Array:
    """Costs about E*B*(in + out) more than a linear layer, as the paper has it: for few rows, x (E or 1, B, ..., in).

    The rows of all members are one axis again in the product, as a sharding of its outputs has them.
    """
    scaled = x * rows(r, x)
    y = dot_general(scaled.reshape(len(r) * x.shape[1], *x.shape[2:]), kernel, (((x.ndim - 2,), (0,)), ((), ())))
    y = y.reshape(*scaled.shape[:-1], s.shape[1]) * rows(s, x).astype(y.dtype)
    return y if bias is None else y + rows(bias, x)


def _scale_weights(
    x: Array, kernel: Array, r: Array, s: Array, bias: Array | None, dot_general: Callable[..., Array]
) -> Array:
    """Costs about E*in*out more than a linear layer: for many rows, x (E or 1, B, ..., in)."""
    members = lax.collapse(x, 1, x.ndim - 1)
    members = jnp.broadcast_to(members, (len(r), *members.shape[1:]))
    kernels = kernel[None] * r[:, :, None] * s[:, None]
    y = dot_general(members, kernels, (((2,), (1,)), ((0,), (0,))))
    return (y if bias is None else y + bias[:, None]).reshape(len(r), *x.shape[1:-1], s.shape[1])
