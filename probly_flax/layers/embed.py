"""Embedding layers."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from probly_common.checks.layers import check_base_type
from probly_common.checks.rows import check_floating, check_query, check_tokens
from probly_flax import random
from probly_flax.functional._common import rows
from probly_flax.functional.linear import members_linear
from probly_flax.layers._base import Draws, FastWeightLayer, axes, copy_options, param
from probly_flax.random import Rngs

__all__ = ["BatchEnsembleEmbed"]

_OPTIONS = ("num_embeddings", "features", "dtype", "param_dtype", "promote_dtype")


class BatchEnsembleEmbed(FastWeightLayer[nnx.Embed], nnx.Embed):
    r"""E embeddings that share one table and differ by rank-one scalings.

    Member i looks up  y_i = W[x_i] * r_i[x_i] * s_i, the rows of its table  W * r_i s_i^T     (Wen et al. 2020, eq. 3)

    Shape:
        x: (E*B, ...), integers, rows [k*B, (k+1)*B) belong to member k. Returns (E*B, ..., features).
    Weights:
        embedding (num_embeddings, features), r (E, num_embeddings), s (E, features).
    Args:
        base_layer: the Embed layer to start from. It is copied, never changed or shared.
        use_base_weights: share a copy of the base layer's embedding; otherwise draw one, normal with variance
            1 / features.
        rngs, num_members, init, r_mean, r_std, s_mean, s_std: see `__init__`.
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

    def _check_base(self, what: str, base_layer: nnx.Embed) -> None:
        check_base_type(what, "an embedding", base_layer, (nnx.Embed,), "__call__")
        check_floating(what, "a table", base_layer.embedding.dtype)

    def _convert(self, base_layer: nnx.Embed, draws: Draws) -> None:
        copy_options(self, base_layer, _OPTIONS)
        base = base_layer.embedding
        self.embedding = draws.weight(base, _draw_table)
        self.r, self.s = draws.fast_weights(self.num_embeddings, self.features, base, *axes(base))

    def __call__(self, inputs: Array, out_sharding: Any = None) -> Array:
        """Looks each member's tokens up in its own table.

        A token beyond the table gives NaN, a negative one counts from its end, and a table of one row gives it for
        every token, as in nnx.Embed.

        Shape:
            inputs: (E*B, ...), integers. Returns (E*B, ..., features), sharded as asked.
        """
        check_tokens("BatchEnsembleEmbed", inputs.shape, self.num_members, inputs.dtype)
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
        return members_linear(query, embedding.T, s, r, None, out_sharding=out_sharding)

    def member(self, i: int) -> nnx.Embed:
        """Returns member i as an ordinary Embed layer, with the table W * r_i s_i^T.

        Example:
            >>> layer, x = BatchEnsembleEmbed(nnx.Embed(10, 3, rngs=nnx.Rngs(0)), num_members=4), jnp.arange(5)
            >>> bool(jnp.allclose(layer.member(1)(x), layer(jnp.tile(x, 4))[5:10]))
            True
        """
        i = self._index(i)
        layer = nnx.eval_shape(lambda: nnx.Embed(1, 1, rngs=nnx.Rngs(0)))
        copy_options(layer, self, _OPTIONS)
        table = self.embedding[...] * (self.r[i][:, None] * self.s[i][None])
        layer.embedding = param(table, self.embedding, *axes(self.embedding))
        return layer


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
