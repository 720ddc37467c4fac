"""Embedding layers."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding

from probly_common.checks.layers import check_base_type, check_option_unset
from probly_common.checks.rows import check_floating, check_query, check_tokens
from probly_torch import random
from probly_torch.functional._common import promoted, rows
from probly_torch.functional.linear import members_linear
from probly_torch.layers._base import Draws, FastWeightLayer, param
from probly_torch.random import Rngs

__all__ = ["BatchEnsembleEmbed"]


class BatchEnsembleEmbed(FastWeightLayer[nn.Embedding]):
    r"""E embeddings that share one table and differ by rank-one scalings.

    Member i looks up  y_i = W[x_i] * r_i[x_i] * s_i, the rows of its table  W * r_i s_i^T     (Wen et al. 2020, eq. 3)

    The gradient is that of E tables: the row padding_idx gets none, neither through W, r nor s; scale_grad_by_freq
    divides by how often a token is among its member's own; sparse makes the gradient of W a sparse one.

    Shape:
        x: (E*B, ...), integers, rows [k*B, (k+1)*B) belong to member k. Returns (E*B, ..., embedding_dim).
    Weights:
        weight (num_embeddings, embedding_dim), r (E, num_embeddings), s (E, embedding_dim).
    Args:
        base_layer: the Embedding layer to start from. It is copied, never changed or shared.
        use_base_weights: share a copy of the base layer's weight; otherwise draw one, normal with variance
            1 / embedding_dim, the row padding_idx zero.
        rngs, num_members, init, r_mean, r_std, s_mean, s_std: see `__init__`.
    Raises:
        TypeError: if base_layer is not an Embedding layer, rngs neither a seed nor an Rngs, or x are no integers.
        ValueError: if the rows do not divide by num_members, or the base layer has a max_norm.
        IndexError: if a token is not one of num_embeddings.
    Example:
        >>> import torch
        >>> layer = BatchEnsembleEmbed(nn.Embedding(10, 3), num_members=4)
        >>> layer(torch.zeros(8, 5, dtype=torch.long)).shape
        torch.Size([8, 5, 3])
        >>> [tuple(p.shape) for p in (layer.weight, layer.r, layer.s)]
        [(10, 3), (4, 10), (4, 3)]
    """

    def _check_base(self, what: str, base_layer: nn.Embedding) -> None:
        check_base_type(what, "an embedding", base_layer, (nn.Embedding,), "forward")
        check_option_unset(what, "max_norm", base_layer.max_norm, "which changes the weights in every call")
        check_floating(what, "a table", base_layer.weight.dtype)

    def _convert(self, base_layer: nn.Embedding, draws: Draws) -> None:
        self.num_embeddings, self.embedding_dim = base_layer.num_embeddings, base_layer.embedding_dim
        self.padding_idx, self.norm_type = base_layer.padding_idx, base_layer.norm_type
        self.scale_grad_by_freq, self.sparse = base_layer.scale_grad_by_freq, base_layer.sparse
        self.weight = draws.weight(base_layer.weight, partial(_draw_table, padding_idx=self.padding_idx))
        self.r, self.s = draws.fast_weights(self.num_embeddings, self.embedding_dim, base_layer.weight)

    def forward(self, x: Tensor) -> Tensor:
        check_tokens("BatchEnsembleEmbed", x.shape, self.num_members, x.dtype)
        tokens = x.reshape(self.num_members, x.shape[0] // self.num_members, *x.shape[1:])
        w = embedding(tokens, self.weight, self.padding_idx, sparse=self.sparse)
        index = tokens.flatten(1).long()
        y = w * self.r.gather(1, index).reshape(*tokens.shape, 1) * rows(self.s, w)
        if self.scale_grad_by_freq:
            ones = torch.ones_like(index)
            counts = ones.new_zeros(self.num_members, self.num_embeddings).scatter_add(1, index, ones)
            y = _ScaledGradient.apply(y, 1 / counts.gather(1, index).reshape(*tokens.shape, 1).to(y.dtype))
        if self.padding_idx is not None:
            y = torch.where((tokens == self.padding_idx)[..., None], y.detach(), y)
        return y.reshape(*x.shape, self.embedding_dim)

    def attend(self, query: Tensor) -> Tensor:
        """Returns the inner products of each member's queries with the rows of its table, as for tied logits.

        Shape:
            query: (E*B, ..., embedding_dim). Returns (E*B, ..., num_embeddings).
        Example:
            >>> import torch
            >>> layer = BatchEnsembleEmbed(nn.Embedding(10, 3), num_members=4)
            >>> layer.attend(torch.ones(8, 5, 3)).shape
            torch.Size([8, 5, 10])
        """
        what = "BatchEnsembleEmbed.attend"
        check_query(what, query.shape, self.num_members, self.embedding_dim)
        return members_linear(*promoted(what, query, self.weight, self.s, self.r, None))

    def member(self, i: int) -> nn.Embedding:
        """Returns member i as an ordinary Embedding layer, with the table W * r_i s_i^T.

        Example:
            >>> import torch
            >>> layer, x = BatchEnsembleEmbed(nn.Embedding(10, 3), num_members=4), torch.arange(5)
            >>> torch.allclose(layer.member(1)(x), layer(x.repeat(4))[5:10])
            True
        """
        i = self._index(i)
        weight = (self.weight * (self.r[i, :, None] * self.s[i])).detach()
        layer = nn.Embedding(
            self.num_embeddings,
            self.embedding_dim,
            self.padding_idx,
            norm_type=self.norm_type,
            scale_grad_by_freq=self.scale_grad_by_freq,
            sparse=self.sparse,
            device="meta",
        )
        layer.weight = param(weight, self.weight)
        return layer.train(self.training)

    def extra_repr(self) -> str:
        return (
            f"{self.num_embeddings}, {self.embedding_dim}, num_members={self.num_members}, "
            f"padding_idx={self.padding_idx}, scale_grad_by_freq={self.scale_grad_by_freq}, sparse={self.sparse}"
        )


class _ScaledGradient(torch.autograd.Function):
    """y as it is, its gradient times a factor."""

    generate_vmap_rule = True

    @staticmethod
    def forward(y: Tensor, factor: Tensor) -> Tensor:
        return y.view_as(y)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] * ctx.saved_tensors[0], None


def _draw_table(rngs: Rngs, like: Tensor, padding_idx: int | None) -> Tensor:
    """Draws a fresh table as `nnx.Embed` does by default: variance_scaling(1.0, "fan_in", "normal", out_axis=0)."""
    num_embeddings = like.shape[0]
    dtype = random.draw_dtype(like.dtype)
    fan_in = num_embeddings * (like.numel() / num_embeddings / num_embeddings)  # JAX's arithmetic, to the last bit
    variance = torch.tensor(1 / fan_in, dtype=dtype, device="cpu").item()
    std = torch.tensor(math.sqrt(variance), dtype=dtype, device="cpu").item()
    table = (random.normal(rngs.params().to(like.device), like.shape, dtype) * std).to(like.dtype)
    if padding_idx is not None:
        table[padding_idx] = 0
    return table
