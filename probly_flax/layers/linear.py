"""Linear layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax import Array

from probly_common.checks.ensembles import member_index, member_indices
from probly_common.checks.layers import check_base_layer, check_init, check_weight, seed_is_not_num_members
from probly_common.checks.rows import check_member_rows, tiled
from probly_common.checks.values import check_num_members
from probly_flax import random
from probly_flax.functional import batch_ensemble_linear
from probly_flax.layers._common import axes, draw_fast_weights, draw_kernel, keep_rows, param
from probly_flax.random import Rngs

__all__ = ["BatchEnsembleLinear"]

_OPTIONS = (
    "in_features",
    "out_features",
    "use_bias",
    "dtype",
    "param_dtype",
    "precision",
    "dot_general",
    "promote_dtype",
    "preferred_element_type",
)


class BatchEnsembleLinear(nnx.Linear):
    r"""E linear layers that share one kernel and differ by rank-one scalings.

    Member i computes  y_i = ((x_i * r_i) W) * s_i + b_i        (Wen et al. 2020, eq. 5)

    In half precision kernel, r and s are drawn in float32 and rounded, and signs are drawn from float32 bits under
    `jax_enable_x64` too, so that neither has coarser draws than the other: by choice, other numbers than those of
    probly's layer, which draws in the layer's dtype and in float64. Draws in float32 are the same as there.

    Shape:
        x: (E*B, ..., in_features), rows [k*B, (k+1)*B) belong to member k. Returns (E*B, ..., out_features).
    Weights:
        kernel (in_features, out_features), r (E, in_features), s (E, out_features), bias (E, out_features) or None.
    Args:
        base_layer: the Linear layer to start from. It is copied, never changed or shared.
        rngs: a seed or an Rngs; keys come from `rngs.params()` for the kernel (if drawn), r and s, in this order.
        num_members: the number of members E.
        use_base_weights: share a copy of the base layer's kernel; otherwise draw one, lecun_normal.
        init: "normal" (r ~ N(r_mean, r_std), s ~ N(s_mean, s_std)), "random_sign" (+-1 with equal
            probability; Wen et al. 2020, appendix B) or "ones" (r = s = 1: members start equal).
        r_mean: mean of r under init="normal".
        r_std: standard deviation of r under init="normal".
        s_mean: mean of s under init="normal".
        s_std: standard deviation of s under init="normal".
    Raises:
        TypeError: if base_layer is not a Linear layer, or rngs neither a seed nor an Rngs.
        ValueError: if the rows do not divide by num_members or the last axis is not in_features.
    Example:
        >>> layer = BatchEnsembleLinear(nnx.Linear(3, 2, rngs=nnx.Rngs(0)), num_members=4)
        >>> layer(jnp.ones((8, 3))).shape
        (8, 2)
        >>> [p.shape for p in (layer.kernel, layer.r, layer.s, layer.bias)]
        [(3, 2), (4, 3), (4, 2), (4, 2)]
    """

    @seed_is_not_num_members
    def __init__(
        self,
        base_layer: nnx.Linear,
        rngs: Rngs | int = 1,
        num_members: int = 1,
        use_base_weights: bool = False,
        init: str = "normal",
        r_mean: float = 1.0,
        r_std: float = 0.5,
        s_mean: float = 1.0,
        s_std: float = 0.5,
    ) -> None:
        what = "BatchEnsembleLinear"
        check_base_layer(what, base_layer, nnx.Linear, "__call__")
        check_weight(what, base_layer.kernel.shape)
        check_init(what, init, r_mean, r_std, s_mean, s_std)
        self.num_members = check_num_members(what, num_members)
        rngs = random.as_rngs(what, rngs)
        for name in _OPTIONS:
            setattr(self, name, getattr(base_layer, name))

        base, bias = base_layer.kernel, base_layer.bias
        kernel = jnp.copy(base[...]) if use_base_weights else draw_kernel(rngs, base[...])
        r = draw_fast_weights(rngs, (self.num_members, self.in_features), init, r_mean, r_std, base.dtype)
        s = draw_fast_weights(rngs, (self.num_members, self.out_features), init, s_mean, s_std, base.dtype)
        in_axis, out_axis = axes(base)
        self.kernel = param(kernel, base, in_axis, out_axis)
        self.r, self.s = param(r, base, None, in_axis), param(s, base, None, out_axis)
        self.bias = nnx.data(None)
        if bias is not None:
            self.bias = param(jnp.tile(bias[...], (self.num_members, 1)), bias, None, *axes(bias))

    def __call__(self, inputs: Array, out_sharding: Any = None) -> Array:
        """Applies each member to its own rows.

        Shape:
            inputs: (E*B, ..., in_features). Returns (E*B, ..., out_features), sharded as asked.
        """
        check_member_rows("BatchEnsembleLinear", inputs.shape, self.num_members, self.in_features)
        return self._applied(inputs, out_sharding, shared=False)

    def shared_batch(self, inputs: Array) -> Array:
        """Gives every member the same batch: the same as self(tile_members(inputs, num_members)), without the copies.

        Shape:
            inputs: (B, ..., in_features). Returns (E*B, ..., out_features).
        """
        shape = tiled(inputs.shape, self.num_members)
        check_member_rows("BatchEnsembleLinear", shape, self.num_members, self.in_features)
        return self._applied(inputs, None, shared=True)

    def _applied(self, inputs: Array, out_sharding: Any, shared: bool) -> Array:
        bias = None if self.bias is None else self.bias[...]
        x, kernel, bias = self.promote_dtype((inputs, self.kernel[...], bias), dtype=self.dtype)
        r, s = self.r[...].astype(x.dtype), self.s[...].astype(x.dtype)
        options = {"preferred_element_type": self.preferred_element_type} if self.preferred_element_type else {}
        return batch_ensemble_linear(
            x,
            kernel,
            r,
            s,
            bias,
            shared=shared,
            precision=self.precision,
            dot_general=self.dot_general,
            out_sharding=out_sharding,
            **options,
        )

    def member(self, i: int) -> nnx.Linear:
        """Returns member i as an ordinary Linear layer, with the kernel W * r_i s_i^T and the bias b_i.

        Example:
            >>> base, x = nnx.Linear(3, 2, rngs=nnx.Rngs(0)), jnp.ones((5, 3))
            >>> layer = BatchEnsembleLinear(base, num_members=4)
            >>> bool(jnp.allclose(layer.member(1)(x), layer(jnp.tile(x, (4, 1)))[5:10]))
            True
        """
        i = member_index("BatchEnsembleLinear", i, self.num_members)
        linear = nnx.eval_shape(lambda: nnx.Linear(1, 1, rngs=nnx.Rngs(0)))
        for name in _OPTIONS:
            setattr(linear, name, getattr(self, name))
        kernel = self.kernel[...] * (self.r[i][:, None] * self.s[i][None])
        linear.kernel = param(kernel, self.kernel, *axes(self.kernel))
        linear.bias = nnx.data(None) if self.bias is None else param(self.bias[i], self.bias, axes(self.bias)[1])
        return linear

    def keep_members(self, indices: Sequence[int]) -> None:
        """Drops every other member, in place."""
        indices = member_indices("BatchEnsembleLinear", indices, self.num_members)
        self.num_members = len(indices)
        keep_rows(self, ("r", "s", "bias"), indices)
