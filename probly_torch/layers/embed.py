"""Embedding layers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding

from probly_common.checks.ensembles import member_index, member_indices
from probly_common.checks.layers import check_base_type, check_init, check_option_unset, seed_is_not_num_members
from probly_common.checks.rows import check_floating, check_query, check_tokens
from probly_common.checks.values import check_num_members
from probly_torch import random
from probly_torch.functional import batch_ensemble_linear
from probly_torch.functional._common import rows
from probly_torch.layers._common import copied, draw_fast_weights, keep_rows
from probly_torch.random import Rngs

__all__ = ["BatchEnsembleEmbed"]


class BatchEnsembleEmbed(nn.Module):
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
        rngs: a seed or an Rngs; keys come from `rngs.params()` for the weight (if drawn), r and s, in this order.
        num_members: the number of members E.
        use_base_weights: share a copy of the base layer's weight; otherwise draw one, normal with variance
            1 / embedding_dim, the row padding_idx zero.
        init: "normal" (r ~ N(r_mean, r_std), s ~ N(s_mean, s_std)), "random_sign" (+-1 with equal
            probability; Wen et al. 2020, appendix B) or "ones" (r = s = 1: members start equal).
        r_mean: mean of r under init="normal".
        r_std: standard deviation of r under init="normal".
        s_mean: mean of s under init="normal".
        s_std: standard deviation of s under init="normal".
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

    @seed_is_not_num_members
    def __init__(
        self,
        base_layer: nn.Embedding,
        rngs: Rngs | int = 1,
        num_members: int = 1,
        use_base_weights: bool = False,
        init: str = "normal",
        r_mean: float = 1.0,
        r_std: float = 0.5,
        s_mean: float = 1.0,
        s_std: float = 0.5,
    ) -> None:
        super().__init__()
        what = "BatchEnsembleEmbed"
        check_base_type(what, "an embedding", base_layer, (nn.Embedding,), "forward")
        check_option_unset(what, "max_norm", base_layer.max_norm, "which changes the weights in every call")
        check_init(what, init, r_mean, r_std, s_mean, s_std)
        base = base_layer.weight
        check_floating(what, "a table", base.is_floating_point(), base.dtype)
        self.num_members = check_num_members(what, num_members)
        self.num_embeddings, self.embedding_dim = base_layer.num_embeddings, base_layer.embedding_dim
        self.padding_idx, self.norm_type = base_layer.padding_idx, base_layer.norm_type
        self.scale_grad_by_freq, self.sparse = base_layer.scale_grad_by_freq, base_layer.sparse
        rngs = random.as_rngs(what, rngs)

        weight = base if use_base_weights else _draw_table(rngs, base, self.padding_idx)
        r = draw_fast_weights(rngs, (self.num_members, self.num_embeddings), init, r_mean, r_std, base)
        s = draw_fast_weights(rngs, (self.num_members, self.embedding_dim), init, s_mean, s_std, base)
        self.weight = nn.Parameter(copied(weight), requires_grad=base.requires_grad)
        self.r, self.s = nn.Parameter(r), nn.Parameter(s)
        self.train(base_layer.training)

    def forward(self, x: Tensor) -> Tensor:
        integer = not (x.is_floating_point() or x.is_complex() or x.dtype == torch.bool)
        check_tokens("BatchEnsembleEmbed", x.shape, self.num_members, integer, x.dtype)
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
        check_query("BatchEnsembleEmbed.attend", query.shape, self.num_members, self.embedding_dim)
        return batch_ensemble_linear(query, self.weight, self.s, self.r)

    def member(self, i: int) -> nn.Embedding:
        """Returns member i as an ordinary Embedding layer, with the table W * r_i s_i^T.

        Example:
            >>> import torch
            >>> layer, x = BatchEnsembleEmbed(nn.Embedding(10, 3), num_members=4), torch.arange(5)
            >>> torch.allclose(layer.member(1)(x), layer(x.repeat(4))[5:10])
            True
        """
        i = member_index("BatchEnsembleEmbed", i, self.num_members)
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
        layer.weight = nn.Parameter(weight, requires_grad=self.weight.requires_grad)
        return layer.train(self.training)

    def keep_members(self, indices: Sequence[int]) -> None:
        """Drops every other member, in place."""
        indices = member_indices("BatchEnsembleEmbed", indices, self.num_members)
        self.num_members = len(indices)
        keep_rows(self, ("r", "s"), indices)

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
