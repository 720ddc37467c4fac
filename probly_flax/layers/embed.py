"""Embedding layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from probly_common.checks.ensembles import member_index, member_indices
from probly_common.checks.layers import check_base_type, check_init, seed_is_not_num_members
from probly_common.checks.rows import check_floating, check_query, check_tokens
from probly_common.checks.values import check_num_members
from probly_flax import random
from probly_flax.functional import batch_ensemble_linear
from probly_flax.functional._common import rows
from probly_flax.layers._common import axes, draw_fast_weights, keep_rows, param
from probly_flax.random import Rngs

__all__ = ["BatchEnsembleEmbed"]

_OPTIONS = ("num_embeddings", "features", "dtype", "param_dtype", "promote_dtype")


class BatchEnsembleEmbed(nnx.Embed):
    r"""E embeddings that share one table and differ by rank-one scalings.

    Member i looks up  y_i = W[x_i] * r_i[x_i] * s_i, the rows of its table  W * r_i s_i^T     (Wen et al. 2020, eq. 3)

    Shape:
        x: (E*B, ...), integers, rows [k*B, (k+1)*B) belong to member k. Returns (E*B, ..., features).
    Weights:
        embedding (num_embeddings, features), r (E, num_embeddings), s (E, features).
    Args:
        base_layer: the Embed layer to start from. It is copied, never changed or shared.
        rngs: a seed or an Rngs; keys come from `rngs.params()` for the embedding (if drawn), r and s, in this order.
        num_members: the number of members E.
        use_base_weights: share a copy of the base layer's embedding; otherwise draw one, normal with variance
            1 / features.
        init: "normal" (r ~ N(r_mean, r_std), s ~ N(s_mean, s_std)), "random_sign" (+-1 with equal
            probability; Wen et al. 2020, appendix B) or "ones" (r = s = 1: members start equal).
        r_mean: mean of r under init="normal".
        r_std: standard deviation of r under init="normal".
        s_mean: mean of s under init="normal".
        s_std: standard deviation of s under init="normal".
    Raises:
        TypeError: if base_layer is not an Embed layer, rngs neither a seed nor an Rngs, or x are no integers.
        ValueError: if the rows do not divide by num_members.
    Example:
        >>> layer = BatchEnsembleEmbed(nnx.Embed(10, 3, rngs=nnx.Rngs(0)), num_members=4)
        >>> layer(jnp.zeros((8, 5), int)).shape
        (8, 5, 3)
        >>> [p.shape for p in (layer.embedding, layer.r, layer.s)]
        [(10, 3), (4, 10), (4, 3)]
    """

    @seed_is_not_num_members
    def __init__(
        self,
        base_layer: nnx.Embed,
        rngs: Rngs | int = 1,
        num_members: int = 1,
        use_base_weights: bool = False,
        init: str = "normal",
        r_mean: float = 1.0,
        r_std: float = 0.5,
        s_mean: float = 1.0,
        s_std: float = 0.5,
    ) -> None:
        what = "BatchEnsembleEmbed"
        check_base_type(what, "an embedding", base_layer, (nnx.Embed,), "__call__")
        check_init(what, init, r_mean, r_std, s_mean, s_std)
        base = base_layer.embedding
        check_floating(what, "a table", jnp.issubdtype(base.dtype, jnp.floating), base.dtype)
        self.num_members = check_num_members(what, num_members)
        rngs = random.as_rngs(what, rngs)
        for name in _OPTIONS:
            setattr(self, name, getattr(base_layer, name))

        embedding = jnp.copy(base[...]) if use_base_weights else _draw_table(rngs, base[...])
        r = draw_fast_weights(rngs, (self.num_members, self.num_embeddings), init, r_mean, r_std, base.dtype)
        s = draw_fast_weights(rngs, (self.num_members, self.features), init, s_mean, s_std, base.dtype)
        token_axis, feature_axis = axes(base)
        self.embedding = param(embedding, base, token_axis, feature_axis)
        self.r, self.s = param(r, base, None, token_axis), param(s, base, None, feature_axis)

    def __call__(self, inputs: Array, out_sharding: Any = None) -> Array:
        """Looks each member's tokens up in its own table.

        A token beyond the table gives NaN, a negative one counts from its end, and a table of one row gives it for
        every token, as in nnx.Embed.

        Shape:
            inputs: (E*B, ...), integers. Returns (E*B, ..., features), sharded as asked.
        """
        integer = jnp.issubdtype(inputs.dtype, jnp.integer)
        check_tokens("BatchEnsembleEmbed", inputs.shape, self.num_members, integer, inputs.dtype)
        (embedding,) = self.promote_dtype((self.embedding[...],), dtype=self.dtype, inexact=False)
        r, s = self.r[...].astype(embedding.dtype), self.s[...].astype(embedding.dtype)
        x = jnp.zeros_like(inputs) if self.num_embeddings == 1 else inputs
        if out_sharding is None:
            return _embed(x, embedding, r, s)
        return jax.sharding.auto_axes(_embed, out_sharding=out_sharding)(x, embedding, r, s)

    def attend(self, query: Array, out_sharding: Any = None) -> Array:
        """Returns the inner products of each member's queries with the rows of its table, as for tied logits.

        Shape:
            query: (E*B, ..., features). Returns (E*B, ..., num_embeddings), sharded as asked.
        Example:
            >>> layer = BatchEnsembleEmbed(nnx.Embed(10, 3, rngs=nnx.Rngs(0)), num_members=4)
            >>> layer.attend(jnp.ones((8, 5, 3))).shape
            (8, 5, 10)
        """
        check_query("BatchEnsembleEmbed.attend", query.shape, self.num_members, self.features)
        query, embedding = self.promote_dtype((query, self.embedding[...]), dtype=self.dtype)
        r, s = self.r[...].astype(query.dtype), self.s[...].astype(query.dtype)
        return batch_ensemble_linear(query, embedding.T, s, r, out_sharding=out_sharding)

    def member(self, i: int) -> nnx.Embed:
        """Returns member i as an ordinary Embed layer, with the table W * r_i s_i^T.

        Example:
            >>> layer, x = BatchEnsembleEmbed(nnx.Embed(10, 3, rngs=nnx.Rngs(0)), num_members=4), jnp.arange(5)
            >>> bool(jnp.allclose(layer.member(1)(x), layer(jnp.tile(x, 4))[5:10]))
            True
        """
        i = member_index("BatchEnsembleEmbed", i, self.num_members)
        layer = nnx.eval_shape(lambda: nnx.Embed(1, 1, rngs=nnx.Rngs(0)))
        for name in _OPTIONS:
            setattr(layer, name, getattr(self, name))
        table = self.embedding[...] * (self.r[i][:, None] * self.s[i][None])
        layer.embedding = param(table, self.embedding, *axes(self.embedding))
        return layer

    def keep_members(self, indices: Sequence[int]) -> None:
        """Drops every other member, in place."""
        indices = member_indices("BatchEnsembleEmbed", indices, self.num_members)
        self.num_members = len(indices)
        keep_rows(self, ("r", "s"), indices)


def _embed(x: Array, embedding: Array, r: Array, s: Array) -> Array:
    tokens = x.reshape(r.shape[0], x.shape[0] // r.shape[0], *x.shape[1:])
    w = jnp.take(embedding, tokens, axis=0)
    own_r = jnp.take_along_axis(r, tokens.reshape(r.shape[0], -1), axis=1).reshape(*tokens.shape, 1)
    return (w * own_r * rows(s, w)).reshape(*x.shape, s.shape[-1])


def _draw_table(rngs: Rngs, like: Array) -> Array:
    """Draws a fresh table as `nnx.Embed` does by default: variance_scaling(1.0, "fan_in", "normal", out_axis=0)."""
    dtype = random.draw_dtype(like.dtype)
    num_embeddings = like.shape[0]
    variance = jnp.array(1 / (num_embeddings * (like.size / num_embeddings / num_embeddings)), dtype)
    return (random.rounded(random.normal(rngs.params(), like.shape, dtype)) * jnp.sqrt(variance)).astype(like.dtype)
