"""Attention layers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout, pad, scaled_dot_product_attention, softmax

from probly_common.checks.layers import check_base_layer
from probly_common.checks.rows import check_attention_inputs, check_mask_rows
from probly_torch.functional._common import promoted
from probly_torch.functional.linear import members_linear
from probly_torch.layers._base import Draws, FastWeightLayer, member_of
from probly_torch.layers.linear import BatchEnsembleLinear

__all__ = ["BatchEnsembleMultiHeadAttention"]

_OPTIONS = ("embed_dim", "kdim", "vdim", "num_heads", "head_dim", "dropout", "batch_first", "add_zero_attn")
_BIASES = ("in_proj_bias", "bias_k", "bias_v")


class BatchEnsembleMultiHeadAttention(FastWeightLayer[nn.MultiheadAttention]):
    r"""E attention layers whose four projections share their weights and differ by rank-one scalings.

    Member i projects queries, keys, values and outputs each by  ((x_i * r_i) W^T) * s_i + b_i
    (Wen et al. 2020, eq. 5), and attends as MultiheadAttention does.

    Shape:
        query: (E*B, L, embed_dim), rows [k*B, (k+1)*B) belong to member k; key: (E*B, S, kdim); value: (E*B, S, vdim).
        Returns (E*B, L, embed_dim) and, with need_weights, (E*B, L, S), or (E*B, num_heads, L, S) if not averaged.
        Of a layer with batch_first=False, the rows are axis 1: (L, E*B, embed_dim).
        key_padding_mask: (E*B, S). attn_mask: (L, S), the same for all rows, or (E*B*num_heads, L, S).
    Weights:
        in_proj_weight (3*embed_dim, embed_dim), or q_proj_weight, k_proj_weight, v_proj_weight where the base layer
        has these; q_r (E, embed_dim), k_r (E, kdim), v_r (E, vdim), q_s, k_s, v_s (E, embed_dim); in_proj_bias
        (E, 3*embed_dim) or None; bias_k, bias_v (E, 1, 1, embed_dim) or None; out_proj, a BatchEnsembleLinear.
    Args:
        base_layer: the MultiheadAttention layer to start from. It is copied, never changed or shared.
        rngs: a seed or an Rngs; keys come from `rngs.params()` for the weight (if drawn), r and s of the query's
            projection, then the key's, the value's and the output's.
        use_base_weights: share copies of the base layer's weights; otherwise draw them, lecun_normal.
        num_members, init, r_mean, r_std, s_mean, s_std: see `__init__`.
    Raises:
        TypeError: if base_layer is not a MultiheadAttention layer, or rngs neither a seed nor an Rngs.
        ValueError: if the rows do not divide by num_members, or inputs or masks have other shapes.
    Example:
        >>> import torch
        >>> base = nn.MultiheadAttention(6, num_heads=2, batch_first=True)
        >>> layer, x = BatchEnsembleMultiHeadAttention(base, num_members=4), torch.ones(8, 5, 6)
        >>> y, weights = layer(x, x, x)
        >>> y.shape, weights.shape
        (torch.Size([8, 5, 6]), torch.Size([8, 5, 5]))
        >>> [tuple(p.shape) for p in (layer.in_proj_weight, layer.q_r, layer.q_s, layer.in_proj_bias)]
        [(18, 6), (4, 6), (4, 6), (4, 18)]
    """

    # What nn.TransformerEncoderLayer asks before it runs a fused kernel on in_proj_weight, past this layer's forward.
    _qkv_same_embed_dim = False

    embed_dim: int
    kdim: int
    vdim: int
    num_heads: int
    head_dim: int
    dropout: float
    batch_first: bool
    add_zero_attn: bool
    in_proj_bias: nn.Parameter | None
    bias_k: nn.Parameter | None
    bias_v: nn.Parameter | None

    def _check_base(self, what: str, base_layer: nn.MultiheadAttention) -> None:
        check_base_layer(what, base_layer, nn.MultiheadAttention, "forward")

    def _convert(self, base_layer: nn.MultiheadAttention, draws: Draws) -> None:
        for name in _OPTIONS:
            setattr(self, name, getattr(base_layer, name))
        weights = []
        for name, base in zip("qkv", _projections(base_layer), strict=True):
            weights.append(draws.weight(base).detach())
            r, s = draws.fast_weights(base.shape[1], base.shape[0], base)
            setattr(self, f"{name}_r", r)
            setattr(self, f"{name}_s", s)
        _set_projections(self, weights, base_layer)
        for name in _BIASES:
            self.register_parameter(name, draws.rows(getattr(base_layer, name)))
        self.out_proj = BatchEnsembleLinear(base_layer.out_proj, *draws)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        what, inputs = "BatchEnsembleMultiHeadAttention", {"query": query, "key": key, "value": value}
        self._check(what, inputs, key_padding_mask, attn_mask, is_causal)
        if not self.batch_first:
            query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        # As in MultiheadAttention, the hint stands for the mask only where nothing else needs the mask.
        is_causal = is_causal and key_padding_mask is None and not need_weights
        mask = None if is_causal else self._merged(attn_mask, key_padding_mask, query.dtype)

        biases = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3, dim=1)
        q, k, v = (
            members_linear(*promoted(what, x, weight, getattr(self, f"{name}_r"), getattr(self, f"{name}_s"), bias))
            for name, x, weight, bias in zip("qkv", (query, key, value), _projections(self), biases, strict=True)
        )
        if self.bias_k is not None and self.bias_v is not None:
            k, v = (torch.cat([x, self._one_step(b, x)], dim=1) for x, b in ((k, self.bias_k), (v, self.bias_v)))
        if self.add_zero_attn:
            k, v = (pad(x, (0, 0, 0, 1)) for x in (k, v))
        if mask is not None:  # which hides none of the steps that were added
            mask = pad(mask, (0, k.shape[1] - key.shape[1])).to(q.dtype)

        q, k, v = (x.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2) for x in (q, k, v))
        p = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            scores = (q * math.sqrt(1 / self.head_dim)) @ k.mT
            weights = dropout(softmax(scores if mask is None else scores + mask, dim=-1), p)
            y = weights @ v
            weights = weights.mean(dim=1) if average_attn_weights else weights
        else:
            y = scaled_dot_product_attention(q, k, v, mask, p, is_causal)
        y = self.out_proj(y.transpose(1, 2).flatten(2))
        return y if self.batch_first else y.transpose(0, 1), weights

    def member(self, i: int) -> nn.MultiheadAttention:
        """Returns member i as an ordinary MultiheadAttention layer, with the weights W * s_i r_i^T and its own biases.

        Example:
            >>> import torch
            >>> base, x = nn.MultiheadAttention(6, num_heads=2, batch_first=True), torch.ones(3, 5, 6)
            >>> layer = BatchEnsembleMultiHeadAttention(base, num_members=4)
            >>> tiled = x.repeat(4, 1, 1)
            >>> torch.allclose(layer.member(1)(x, x, x)[0], layer(tiled, tiled, tiled)[0][3:6], atol=1e-6)
            True
        """
        i = self._index(i)
        attention = nn.MultiheadAttention(
            self.embed_dim,
            self.num_heads,
            self.dropout,
            bias=self.in_proj_bias is not None,
            add_bias_kv=self.bias_k is not None,
            add_zero_attn=self.add_zero_attn,
            kdim=self.kdim,
            vdim=self.vdim,
            batch_first=self.batch_first,
            device="meta",
        )
        weights = [
            (weight * (getattr(self, f"{name}_s")[i, :, None] * getattr(self, f"{name}_r")[i])).detach()
            for name, weight in zip("qkv", _projections(self), strict=True)
        ]
        _set_projections(attention, weights, self)
        for name in _BIASES:
            setattr(attention, name, member_of(getattr(self, name), i))
        linear = self.out_proj.member(i)
        attention.out_proj.weight, attention.out_proj.bias = linear.weight, linear.bias
        return attention.train(self.training)

    def _of_members(self) -> Iterable[str]:
        return *(f"{name}_{factor}" for name in "qkv" for factor in "rs"), *_BIASES, "out_proj"

    def extra_repr(self) -> str:
        return (
            f"embed_dim={self.embed_dim}, num_heads={self.num_heads}, num_members={self.num_members}, "
            f"bias={self.in_proj_bias is not None}"
        )

    def _check(
        self,
        what: str,
        inputs: dict[str, Tensor],
        key_padding_mask: Tensor | None,
        attn_mask: Tensor | None,
        is_causal: bool,
    ) -> None:
        if any(x.is_nested for x in inputs.values()):
            raise ValueError(
                f"{what} expects padded tensors; got a nested one, as nn.TransformerEncoder makes in eval mode. Set "
                f"encoder.use_nested_tensor = False."
            )
        shapes = {name: x.shape for name, x in inputs.items()}
        features = (self.embed_dim, self.kdim, self.vdim)
        check_attention_inputs(what, shapes, features, self.num_members, self.batch_first)
        rows_axis, steps_axis = (0, 1) if self.batch_first else (1, 0)
        rows, steps, keys = shapes["query"][rows_axis], shapes["query"][steps_axis], shapes["key"][steps_axis]
        of_rows, of_heads = "[num_members*B, S]", "[num_members*B*num_heads, L, S]"
        for name, mask, expected in (
            ("key_padding_mask", key_padding_mask, {of_rows: (rows, keys)}),
            ("attn_mask", attn_mask, {"[L, S]": (steps, keys), of_heads: (rows * self.num_heads, steps, keys)}),
        ):
            if mask is None:
                continue
            check_mask_rows(what, name, mask.shape, expected, self.num_members)
            if mask.dtype != torch.bool and not mask.is_floating_point():
                raise TypeError(
                    f"{what} expects {name} of bools, True where hidden, or of numbers to add to the scores; got "
                    f"{mask.dtype}. Convert it: {name}.bool()."
                )
        if is_causal and attn_mask is None:
            raise ValueError(
                f"{what} expects attn_mask with is_causal=True, which only says that it is causal; got none. Pass "
                f"attn_mask=nn.Transformer.generate_square_subsequent_mask({steps})."
            )

    def _merged(self, attn_mask: Tensor | None, key_padding_mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        """Merges both masks into numbers to add to scores (E*B, num_heads, L, S), -inf where hidden."""
        masks = []
        if attn_mask is not None:
            heads = (
                attn_mask[None, None]
                if attn_mask.ndim == 2
                else attn_mask.unflatten(0, (attn_mask.shape[0] // self.num_heads, self.num_heads))
            )
            masks.append(heads)
        if key_padding_mask is not None:
            masks.append(key_padding_mask[:, None, None])
        numbers = [
            torch.zeros_like(m, dtype=dtype).masked_fill(m, -torch.inf) if m.dtype == torch.bool else m for m in masks
        ]
        return sum(numbers[1:], start=numbers[0]) if numbers else None

    def _one_step(self, bias: Tensor, rows: Tensor) -> Tensor:
        """Expands (E, 1, 1, embed_dim) to (E*B, 1, embed_dim), each member's own for each of its rows."""
        return bias.expand(-1, rows.shape[0] // self.num_members, -1, -1).flatten(0, 1)


def _projections(layer: Any) -> tuple[Tensor, ...]:
    """Returns the weights of query, key and value, (out_features, in_features) each."""
    if layer.in_proj_weight is not None:
        return layer.in_proj_weight.chunk(3)
    return layer.q_proj_weight, layer.k_proj_weight, layer.v_proj_weight


def _set_projections(layer: nn.Module, weights: Sequence[Tensor], like: nn.Module) -> None:
    """Sets the weights packed, or each under its own name, as the other layer has them."""
    names = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
    packed = getattr(like, names[0]) is not None
    values = [torch.cat(tuple(weights)), None, None, None] if packed else [None, *weights]
    for name, value in zip(names, values, strict=True):
        parameter = None if value is None else nn.Parameter(value, requires_grad=getattr(like, name).requires_grad)
        layer.register_parameter(name, parameter)
