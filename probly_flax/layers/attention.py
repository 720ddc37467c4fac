"""Attention layers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax import Array, lax

from probly_common.checks.ensembles import member_indices
from probly_common.checks.layers import check_base_layer
from probly_common.checks.rows import check_attention_inputs, check_mask_rows
from probly_flax.layers._base import (
    Draws,
    FastWeightLayer,
    MemberLayer,
    axes,
    copy_options,
    draw_kernel,
    member_of,
    param,
)
from probly_flax.random import Rngs

__all__ = ["BatchEnsembleMultiHeadAttention"]

_OPTIONS = (
    "num_heads",
    "num_kv_heads",
    "head_dim",
    "in_features",
    "in_kv_features",
    "qkv_features",
    "out_features",
    "dtype",
    "param_dtype",
    "broadcast_dropout",
    "dropout_rate",
    "deterministic",
    "precision",
    "use_bias",
    "attention_fn",
    "decode",
    "normalize_qk",
    "qkv_promote_dtype",
    "out_promote_dtype",
    "ln_promote_dtype",
    "qkv_dot_general",
    "out_dot_general",
    "qkv_dot_general_cls",
    "out_dot_general_cls",
)
_PROJECTION_OPTIONS = (
    "in_features",
    "out_features",
    "axis",
    "batch_axis",
    "use_bias",
    "dtype",
    "param_dtype",
    "precision",
    "dot_general",
    "dot_general_cls",
    "promote_dtype",
    "preferred_element_type",
)
_PROJECTIONS = ("query", "key", "value", "out")
_NORMS = ("query_ln", "key_ln")
_CACHES = ("cached_key", "cached_value", "cache_index")


class BatchEnsembleMultiHeadAttention(FastWeightLayer[nnx.MultiHeadAttention], nnx.MultiHeadAttention):
    r"""E attention layers whose four projections share their kernels and differ by rank-one scalings.

    Member i projects queries, keys, values and outputs each by  ((x_i * r_i) W) * s_i + b_i
    (Wen et al. 2020, eq. 5), and attends as MultiHeadAttention does.

    Shape:
        inputs_q: (E*B, ..., L, in_features), rows [k*B, (k+1)*B) belong to member k; inputs_k and inputs_v:
        (E*B, ..., S, in_kv_features). Returns (E*B, ..., L, out_features).
        mask: (E*B, ..., num_heads, L, S) or 1 in the place of any of these, which is then the same for all.
    Weights:
        query, key, value and out, each with a kernel of the base layer's shape, r (E, inputs of the projection),
        s (E, outputs of the projection), both with heads flattened, and bias (E, of the base layer's shape) or None.
        With normalize_qk, members share query_ln and key_ln.
    Args:
        base_layer: the MultiHeadAttention layer to start from. It is copied, never changed or shared; a cache is not.
        rngs: a seed or an Rngs; keys come from `rngs.params()` for the kernel (if drawn), r and s of the query's
            projection, then the key's, the value's and the output's.
        use_base_weights: share copies of the base layer's kernels; otherwise draw them, lecun_normal.
        num_members, init, r_mean, r_std, s_mean, s_std: see `__init__`.
    Raises:
        TypeError: if base_layer is not a MultiHeadAttention layer, or rngs neither a seed nor an Rngs.
        ValueError: if the rows do not divide by num_members, or inputs or masks have other shapes.
    Example:
        >>> base = nnx.MultiHeadAttention(2, 6, decode=False, rngs=nnx.Rngs(0))
        >>> layer = BatchEnsembleMultiHeadAttention(base, num_members=4)
        >>> layer(jnp.ones((8, 5, 6))).shape
        (8, 5, 6)
        >>> [p.shape for p in (layer.query.kernel, layer.query.r, layer.query.s, layer.query.bias)]
        [(6, 2, 3), (4, 6), (4, 6), (4, 2, 3)]
    """

    def _check_base(self, what: str, base_layer: nnx.MultiHeadAttention) -> None:
        check_base_layer(what, base_layer, nnx.MultiHeadAttention, "__call__")
        for name in _PROJECTIONS:
            check_base_layer(what, getattr(base_layer, name), nnx.LinearGeneral, "__call__")

    def _convert(self, base_layer: nnx.MultiHeadAttention, draws: Draws) -> None:
        copy_options(self, base_layer, _OPTIONS)
        for name in _PROJECTIONS:
            setattr(self, name, _Projection(getattr(base_layer, name), draws))
        _copy_norms_and_rngs(self, base_layer)
        for name in _CACHES:
            setattr(self, name, nnx.data(None))

    def __call__(
        self,
        inputs_q: Array,
        inputs_k: Array | None = None,
        inputs_v: Array | None = None,
        *,
        mask: Array | None = None,
        deterministic: bool | None = None,
        rngs: nnx.Rngs | nnx.RngStream | None = None,
        sow_weights: bool = False,
        decode: bool | None = None,
        is_causal: bool = False,
        out_sharding: Any = None,
        qkv_sharding: Any = None,
    ) -> Array:
        """Applies each member to its own rows, as MultiHeadAttention applies itself to all of them.

        Shape:
            inputs_q: (E*B, ..., L, in_features). Returns (E*B, ..., L, out_features), sharded as asked.
        """
        what = "BatchEnsembleMultiHeadAttention"
        key = inputs_q if inputs_k is None else inputs_k
        value = key if inputs_v is None else inputs_v
        shapes = {"query": inputs_q.shape, "key": key.shape, "value": value.shape}
        features = (self.in_features, self.in_kv_features, self.in_kv_features)
        check_attention_inputs(what, shapes, features, self.num_members, middle_axes=True)
        if mask is not None and mask.ndim == inputs_q.ndim + 1 and mask.shape[0] != 1:
            expected = {"[num_members*B, ...]": (inputs_q.shape[0], *mask.shape[1:])}
            check_mask_rows(what, "mask", mask.shape, expected, self.num_members)
        return super().__call__(
            inputs_q,
            inputs_k,
            inputs_v,
            mask=mask,
            deterministic=deterministic,
            rngs=rngs,
            sow_weights=sow_weights,
            decode=decode,
            is_causal=is_causal,
            out_sharding=out_sharding,
            qkv_sharding=qkv_sharding,
        )

    def member(self, i: int) -> nnx.MultiHeadAttention:
        """Returns member i as an ordinary MultiHeadAttention layer, with the kernels W * r_i s_i^T and its own biases.

        Example:
            >>> base, x = nnx.MultiHeadAttention(2, 6, decode=False, rngs=nnx.Rngs(0)), jnp.ones((3, 5, 6))
            >>> layer = BatchEnsembleMultiHeadAttention(base, num_members=4)
            >>> bool(jnp.allclose(layer.member(1)(x), layer(jnp.tile(x, (4, 1, 1)))[3:6], atol=1e-6))
            True
        """
        i = self._index(i)
        attention = nnx.eval_shape(lambda: nnx.MultiHeadAttention(1, 1, decode=False, rngs=nnx.Rngs(0)))
        copy_options(attention, self, _OPTIONS)
        for name in _PROJECTIONS:
            setattr(attention, name, getattr(self, name).member(i))
        _copy_norms_and_rngs(attention, self)
        for name in _CACHES:
            setattr(attention, name, self._cache_of(name, [i]))
        return attention

    def keep_members(self, indices: Sequence[int]) -> None:
        """Drops every other member, in place."""
        indices = member_indices("BatchEnsembleMultiHeadAttention", indices, self.num_members)
        for name in _CACHES:
            setattr(self, name, self._cache_of(name, indices))
        super().keep_members(indices)

    def _of_members(self) -> Iterable[str]:
        return _PROJECTIONS

    def _cache_of(self, name: str, indices: Sequence[int]) -> Any:
        """Returns the cached rows of some members.

        What counts steps is the same for all.
        """
        cache = getattr(self, name)
        if cache is None:
            return nnx.data(None)
        if not cache.ndim:
            return cache.copy(jnp.copy(cache[...]))
        rows = cache[...].reshape(self.num_members, -1, *cache.shape[1:])[jnp.array(indices)]
        return cache.copy(rows.reshape(-1, *cache.shape[1:]))


class _Projection(MemberLayer[nnx.LinearGeneral], nnx.LinearGeneral):
    """E LinearGeneral layers on the last axes, with one kernel and rank-one scalings."""

    def __init__(self, base_layer: nnx.LinearGeneral, draws: Draws) -> None:
        self.num_members = draws.num_members
        copy_options(self, base_layer, _PROJECTION_OPTIONS)
        base, in_features, out_features = base_layer.kernel, math.prod(self.in_features), math.prod(self.out_features)

        def drawn(rngs: Rngs, like: Array) -> Array:
            return draw_kernel(rngs, like.reshape(in_features, out_features)).reshape(like.shape)

        self.kernel = draws.weight(base, drawn)
        # Heads are the slower of the flattened axes, and the one that is sharded.
        in_axis, out_axis = axes(base)[0], axes(base)[len(self.in_features)]
        self.r, self.s = draws.fast_weights(in_features, out_features, base, in_axis, out_axis)
        self.bias = draws.rows(base_layer.bias)

    def __call__(self, inputs: Array, out_sharding: Any = None) -> Array:
        bias = None if self.bias is None else self.bias[...]
        x, kernel, bias = self.promote_dtype((inputs, self.kernel[...], bias), dtype=self.dtype)
        contracted = len(self.in_features)
        options = {"preferred_element_type": self.preferred_element_type} if self.preferred_element_type else {}
        dot_general = self.dot_general_cls() if self.dot_general_cls else self.dot_general or lax.dot_general

        def members(rows: Array) -> Array:
            return rows.reshape(self.num_members, rows.shape[0] // self.num_members, *rows.shape[1:])

        def rows(weights: Array, features: Sequence[int]) -> Array:
            """Reshapes (E, ...) to (E, 1, ..., features), against members."""
            return weights.reshape(self.num_members, *(1,) * (x.ndim - contracted), *features)

        r, s = self.r[...].astype(x.dtype), self.s[...]
        scaled = (members(x) * rows(r, self.in_features)).reshape(x.shape)
        contraction = tuple(range(x.ndim - contracted, x.ndim)), tuple(range(contracted))
        y = dot_general(
            scaled, kernel, (contraction, ((), ())), precision=self.precision, out_sharding=out_sharding, **options
        )
        scaled = members(y) * rows(s.astype(y.dtype), self.out_features)
        return (scaled if bias is None else scaled + rows(bias, self.out_features)).reshape(y.shape)

    def member(self, i: int) -> nnx.LinearGeneral:
        linear = nnx.eval_shape(lambda: nnx.LinearGeneral(1, 1, rngs=nnx.Rngs(0)))
        copy_options(linear, self, _PROJECTION_OPTIONS)
        scaling = (self.r[i][:, None] * self.s[i][None]).reshape(self.kernel.shape)
        linear.kernel = param(self.kernel[...] * scaling, self.kernel, *axes(self.kernel))
        linear.bias = member_of(self.bias, i)
        return linear


def _copy_norms_and_rngs(layer: nnx.MultiHeadAttention, source: nnx.MultiHeadAttention) -> None:
    for name in _NORMS:
        norm = getattr(source, name)
        setattr(layer, name, nnx.data(None) if norm is None else nnx.clone(norm))
    layer.rngs = None if source.rngs is None else nnx.data(nnx.clone(source.rngs))
