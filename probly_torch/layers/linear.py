"""Linear layers."""

from __future__ import annotations

from torch import Tensor, nn

from probly_common.checks.layers import check_base_layer, check_weight
from probly_common.checks.rows import check_member_rows, tiled
from probly_torch.functional._common import promoted
from probly_torch.functional.linear import members_linear
from probly_torch.layers._base import Draws, FastWeightLayer, member_of, param

__all__ = ["BatchEnsembleLinear"]


class BatchEnsembleLinear(FastWeightLayer[nn.Linear]):
    r"""E linear layers that share one weight and differ by rank-one scalings.

    Member i computes  y_i = ((x_i * r_i) W^T) * s_i + b_i        (Wen et al. 2020, eq. 5)

    In half precision weight, r and s are drawn in float32 and rounded, and signs are drawn from float32 bits under
    `jax_enable_x64` too, so that neither has coarser draws than the other: by choice, other numbers than those of
    probly's layer, which draws in the layer's dtype and in float64. Draws in float32 are the same as there.

    Shape:
        x: (E*B, ..., in_features), rows [k*B, (k+1)*B) belong to member k. Returns (E*B, ..., out_features).
    Weights:
        weight (out_features, in_features), r (E, in_features), s (E, out_features), bias (E, out_features) or None.
    Args:
        base_layer: the Linear layer to start from. It is copied, never changed or shared.
        rngs, num_members, use_base_weights, init, r_mean, r_std, s_mean, s_std: see `__init__`.
    Raises:
        TypeError: if base_layer is not a Linear layer, or rngs neither a seed nor an Rngs.
        ValueError: if the rows do not divide by num_members or the last axis is not in_features.
    Example:
        >>> import torch
        >>> layer = BatchEnsembleLinear(nn.Linear(3, 2), num_members=4)
        >>> layer(torch.ones(8, 3)).shape
        torch.Size([8, 2])
        >>> [tuple(p.shape) for p in (layer.weight, layer.r, layer.s, layer.bias)]
        [(2, 3), (4, 3), (4, 2), (4, 2)]
    """

    def _check_base(self, what: str, base_layer: nn.Linear) -> None:
        check_base_layer(what, base_layer, nn.Linear, "forward")
        check_weight(what, base_layer.weight.shape)

    def _convert(self, base_layer: nn.Linear, draws: Draws) -> None:
        self.in_features, self.out_features = base_layer.in_features, base_layer.out_features
        self.weight = draws.weight(base_layer.weight)
        self.r, self.s = draws.fast_weights(self.in_features, self.out_features, base_layer.weight)
        self.bias = draws.rows(base_layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        check_member_rows("BatchEnsembleLinear", x.shape, self.num_members, self.in_features)
        return members_linear(*promoted("BatchEnsembleLinear", x, self.weight, self.r, self.s, self.bias))

    def shared_batch(self, x: Tensor) -> Tensor:
        """Gives every member the same batch: the same as self(tile_members(x, num_members)), without the copies.

        Shape:
            x: (B, ..., in_features). Returns (E*B, ..., out_features).
        """
        check_member_rows("BatchEnsembleLinear", tiled(x.shape, self.num_members), self.num_members, self.in_features)
        return members_linear(*promoted("BatchEnsembleLinear", x, self.weight, self.r, self.s, self.bias), True)

    def member(self, i: int) -> nn.Linear:
        """Returns member i as an ordinary Linear layer, with the weight W * s_i r_i^T and the bias b_i.

        Example:
            >>> import torch
            >>> layer, x = BatchEnsembleLinear(nn.Linear(3, 2), num_members=4), torch.ones(5, 3)
            >>> torch.allclose(layer.member(1)(x), layer(x.repeat(4, 1))[5:10])
            True
        """
        i = self._index(i)
        linear = nn.Linear(
            self.in_features, self.out_features, self.bias is not None, device="meta", dtype=self.weight.dtype
        )
        linear.weight = param((self.weight * (self.s[i, :, None] * self.r[i])).detach(), self.weight)
        linear.bias = member_of(self.bias, i)  # type: ignore[assignment]
        return linear.train(self.training)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, num_members={self.num_members}, "
            f"bias={self.bias is not None}"
        )
