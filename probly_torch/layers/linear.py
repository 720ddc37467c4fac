"""Linear layers."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from probly_common.checks.ensembles import member_index, member_indices
from probly_common.checks.layers import check_base_layer, check_init, check_weight, seed_is_not_num_members
from probly_common.checks.rows import check_member_rows, tiled
from probly_common.checks.values import check_num_members
from probly_torch import random
from probly_torch.functional.linear import members_linear
from probly_torch.layers._common import copied, draw_fast_weights, draw_kernel, keep_rows
from probly_torch.random import Rngs

__all__ = ["BatchEnsembleLinear"]


class BatchEnsembleLinear(nn.Module):
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
        rngs: a seed or an Rngs; keys come from `rngs.params()` for the weight (if drawn), r and s, in this order.
        num_members: the number of members E.
        use_base_weights: share a copy of the base layer's weight; otherwise draw one, lecun_normal.
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
        >>> import torch
        >>> layer = BatchEnsembleLinear(nn.Linear(3, 2), num_members=4)
        >>> layer(torch.ones(8, 3)).shape
        torch.Size([8, 2])
        >>> [tuple(p.shape) for p in (layer.weight, layer.r, layer.s, layer.bias)]
        [(2, 3), (4, 3), (4, 2), (4, 2)]
    """

    @seed_is_not_num_members
    def __init__(
        self,
        base_layer: nn.Linear,
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
        what = "BatchEnsembleLinear"
        check_base_layer(what, base_layer, nn.Linear, "forward")
        check_weight(what, base_layer.weight.shape)
        check_init(what, init, r_mean, r_std, s_mean, s_std)
        self.num_members = check_num_members(what, num_members)
        self.in_features, self.out_features = base_layer.in_features, base_layer.out_features
        rngs = random.as_rngs(what, rngs)

        base, bias = base_layer.weight, base_layer.bias
        weight = base if use_base_weights else draw_kernel(rngs, base.T).T
        r = draw_fast_weights(rngs, (self.num_members, self.in_features), init, r_mean, r_std, base)
        s = draw_fast_weights(rngs, (self.num_members, self.out_features), init, s_mean, s_std, base)
        self.weight = nn.Parameter(copied(weight), requires_grad=base.requires_grad)
        self.r, self.s = nn.Parameter(r), nn.Parameter(s)
        self.bias = None
        if bias is not None:
            self.bias = nn.Parameter(copied(bias.expand(self.num_members, -1)), requires_grad=bias.requires_grad)

    def forward(self, x: Tensor) -> Tensor:
        check_member_rows("BatchEnsembleLinear", x.shape, self.num_members, self.in_features)
        return members_linear("BatchEnsembleLinear", x, self.weight, self.r, self.s, self.bias)

    def shared_batch(self, x: Tensor) -> Tensor:
        """Gives every member the same batch: the same as self(tile_members(x, num_members)), without the copies.

        Shape:
            x: (B, ..., in_features). Returns (E*B, ..., out_features).
        """
        check_member_rows("BatchEnsembleLinear", tiled(x.shape, self.num_members), self.num_members, self.in_features)
        return members_linear("BatchEnsembleLinear", x, self.weight, self.r, self.s, self.bias, shared=True)

    def member(self, i: int) -> nn.Linear:
        """Returns member i as an ordinary Linear layer, with the weight W * s_i r_i^T and the bias b_i.

        Example:
            >>> import torch
            >>> layer, x = BatchEnsembleLinear(nn.Linear(3, 2), num_members=4), torch.ones(5, 3)
            >>> torch.allclose(layer.member(1)(x), layer(x.repeat(4, 1))[5:10])
            True
        """
        i = member_index("BatchEnsembleLinear", i, self.num_members)
        linear = nn.Linear(
            self.in_features, self.out_features, self.bias is not None, device="meta", dtype=self.weight.dtype
        )
        weight = self.weight * (self.s[i, :, None] * self.r[i])
        linear.weight = nn.Parameter(weight.detach(), requires_grad=self.weight.requires_grad)
        if self.bias is not None:
            linear.bias = nn.Parameter(copied(self.bias[i]), requires_grad=self.bias.requires_grad)
        return linear.train(self.training)

    def keep_members(self, indices: Sequence[int]) -> None:
        """Drops every other member, in place."""
        indices = member_indices("BatchEnsembleLinear", indices, self.num_members)
        self.num_members = len(indices)
        keep_rows(self, ("r", "s", "bias"), indices)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, num_members={self.num_members}, "
            f"bias={self.bias is not None}"
        )
