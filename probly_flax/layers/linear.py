"""Linear layers."""

from __future__ import annotations

from typing import Any

from flax import nnx
from jax import Array

from probly_common.checks.layers import check_base_layer, check_weight
from probly_common.checks.rows import check_member_rows, tiled
from probly_flax.functional.linear import members_linear
from probly_flax.layers._base import Draws, FastWeightLayer, axes, copy_options, member_of, param

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


class BatchEnsembleLinear(FastWeightLayer[nnx.Linear], nnx.Linear):
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
        rngs, num_members, use_base_weights, init, r_mean, r_std, s_mean, s_std: see `__init__`.
    Raises:
        TypeError: if base_layer is not a Linear layer, or rngs neither a seed nor an Rngs.
        ValueError: if the rows do not divide by num_members or the last axis is not in_features.
    Example:
        >>> import jax.numpy as jnp
        >>> layer = BatchEnsembleLinear(nnx.Linear(3, 2, rngs=nnx.Rngs(0)), num_members=4)
        >>> layer(jnp.ones((8, 3))).shape
        (8, 2)
        >>> [p.shape for p in (layer.kernel, layer.r, layer.s, layer.bias)]
        [(3, 2), (4, 3), (4, 2), (4, 2)]
    """

    def _check_base(self, what: str, base_layer: nnx.Linear) -> None:
        check_base_layer(what, base_layer, nnx.Linear, "__call__")
        check_weight(what, base_layer.kernel.shape)

    def _convert(self, base_layer: nnx.Linear, draws: Draws) -> None:
        copy_options(self, base_layer, _OPTIONS)
        base = base_layer.kernel
        self.kernel = draws.weight(base)
        self.r, self.s = draws.fast_weights(self.in_features, self.out_features, base, *axes(base))
        self.bias = draws.rows(base_layer.bias)

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
        options: dict[str, Any] = {"precision": self.precision, "out_sharding": out_sharding}
        if self.preferred_element_type:
            options["preferred_element_type"] = self.preferred_element_type
        return members_linear(x, kernel, r, s, bias, shared, self.dot_general, **options)

    def member(self, i: int) -> nnx.Linear:
        """Returns member i as an ordinary Linear layer, with the kernel W * r_i s_i^T and the bias b_i.

        Example:
            >>> import jax.numpy as jnp
        >>> base, x = nnx.Linear(3, 2, rngs=nnx.Rngs(0)), jnp.ones((5, 3))
            >>> layer = BatchEnsembleLinear(base, num_members=4)
            >>> bool(jnp.allclose(layer.member(1)(x), layer(jnp.tile(x, (4, 1)))[5:10]))
            True
        """
        i = self._index(i)
        linear = nnx.eval_shape(lambda: nnx.Linear(1, 1, rngs=nnx.Rngs(0)))
        copy_options(linear, self, _OPTIONS)
        kernel = self.kernel[...] * (self.r[i][:, None] * self.s[i][None])
        linear.kernel = param(kernel, self.kernel, *axes(self.kernel))
        linear.bias = member_of(self.bias, i)
        return linear
