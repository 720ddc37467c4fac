"""What the layers share: the arguments, their checks and draws, and how members are kept."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Generic, NamedTuple, Protocol, TypeGuard, TypeVar, runtime_checkable

import torch
from torch import Tensor, nn

from probly_common.checks.ensembles import member_index, member_indices
from probly_common.checks.layers import check_init, seed_is_not_num_members
from probly_common.checks.values import check_num_members
from probly_torch import random
from probly_torch.random import Rngs

BaseLayer = TypeVar("BaseLayer", bound=nn.Module)


@runtime_checkable
class BatchEnsembleLayer(Protocol):
    """The interface of a layer of members. register_batchensemble takes any layer that offers it."""

    num_members: int

    def member(self, i: int) -> nn.Module:
        """Returns member i as an ordinary layer."""

    def keep_members(self, indices: Sequence[int]) -> None:
        """Drops every other member, in place."""


class SharedBatchLayer(BatchEnsembleLayer, Protocol):
    """What a layer may offer besides. A BatchEnsemble whose network starts with such a layer does not tile its batch.

    A subclass with a forward of its own needs a shared_batch of its own: the one that it inherits is not called.
    """

    def shared_batch(self, x: Tensor) -> Tensor:
        """Returns what self(tile_members(x, self.num_members)) does, without the copies."""


def takes_shared_batch(layer: object) -> TypeGuard[SharedBatchLayer]:
    """Tells whether the layer has a shared_batch, and no class below that one has a forward of its own.

    It is asked in every call: isinstance takes a hundred times longer.
    """
    for each in type(layer).__mro__:
        if "shared_batch" in each.__dict__:
            return True
        if "forward" in each.__dict__:
            return False
    return False


class MemberLayer(nn.Module, Generic[BaseLayer]):
    """The base of every layer: E members, each with rows of its own in some of the tensors."""

    num_members: int

    def keep_members(self, indices: Sequence[int]) -> None:
        """Drops every other member, in place."""
        indices = member_indices(type(self).__name__, indices, self.num_members)
        self.num_members = len(indices)
        for name in self._of_members():
            value = getattr(self, name, None)
            if isinstance(value, MemberLayer):
                value.keep_members(indices)
            elif value is not None:
                rows = copied(value[indices])
                setattr(self, name, param(rows, value) if isinstance(value, nn.Parameter) else rows)

    def _of_members(self) -> Iterable[str]:
        """Lists what has a row for each member, and the layers of members in this one."""
        return "r", "s", "bias"

    def _index(self, i: int) -> int:
        return member_index(type(self).__name__, i, self.num_members)


class FastWeightLayer(MemberLayer[BaseLayer]):
    """The base of the layers whose members share a weight, and scale it by r and s."""

    @seed_is_not_num_members
    def __init__(
        self,
        base_layer: BaseLayer,
        rngs: Rngs | int = 1,
        num_members: int = 1,
        use_base_weights: bool = False,
        init: str = "normal",
        r_mean: float = 1.0,
        r_std: float = 0.5,
        s_mean: float = 1.0,
        s_std: float = 0.5,
    ) -> None:
        """Copies the base layer, its mode and its options, and draws r and s for each member.

        Args:
            base_layer: the layer to start from. It is copied, never changed or shared.
            rngs: a seed or an Rngs; keys come from `rngs.params()` for the weight (if drawn), r and s, in this order.
            num_members: the number of members E.
            use_base_weights: share a copy of the base layer's weight; otherwise draw one, lecun_normal.
            init: "normal" (r ~ N(r_mean, r_std), s ~ N(s_mean, s_std)), "random_sign" (+-1 with equal
                probability; Wen et al. 2020, appendix B) or "ones" (r = s = 1: members start equal).
            r_mean: mean of r under init="normal".
            r_std: standard deviation of r under init="normal".
            s_mean: mean of s under init="normal".
            s_std: standard deviation of s under init="normal".
        """
        super().__init__()
        what = type(self).__name__
        self._check_base(what, base_layer)
        check_init(what, init, r_mean, r_std, s_mean, s_std)
        self.num_members = check_num_members(what, num_members)
        rngs = random.as_rngs(what, rngs)
        self._convert(base_layer, Draws(rngs, self.num_members, use_base_weights, init, r_mean, r_std, s_mean, s_std))
        self.train(base_layer.training)

    def _check_base(self, what: str, base_layer: BaseLayer) -> None:
        """Raises unless the layer can be made of this one."""
        raise NotImplementedError

    def _convert(self, base_layer: BaseLayer, draws: Draws) -> None:
        """Takes over the options of the base layer, and makes the weights."""
        raise NotImplementedError


class Draws(NamedTuple):
    """The arguments of a layer after base_layer, checked, in their order; and the weights that they ask for."""

    rngs: Rngs
    num_members: int
    use_base_weights: bool
    init: str
    r_mean: float
    r_std: float
    s_mean: float
    s_std: float

    def weight(self, base: Tensor, draw: Callable[[Rngs, Tensor], Tensor] | None = None) -> nn.Parameter:
        """Copies the base layer's weight, or draws another one: by default a matrix (out, in), lecun_normal."""
        if self.use_base_weights:
            return param(copied(base), base)
        return param(copied(draw(self.rngs, base) if draw else draw_kernel(self.rngs, base.T).T), base)

    def fast_weights(self, in_features: int, out_features: int, like: Tensor) -> tuple[nn.Parameter, nn.Parameter]:
        """Draws r (E, in_features), then s (E, out_features)."""
        r = self._fast(in_features, self.r_mean, self.r_std, like)
        return r, self._fast(out_features, self.s_mean, self.s_std, like)

    def _fast(self, features: int, mean: float, std: float, like: Tensor) -> nn.Parameter:
        shape, key, dtype = (self.num_members, features), self.rngs.params().to(like.device), like.dtype
        if self.init == "ones":  # takes a key all the same, so that what is drawn after it does not depend on init
            values = torch.ones(shape, device=like.device)
        elif self.init == "random_sign":
            half = torch.tensor(0.5, dtype=torch.float32)  # named, since the bits that are drawn depend on it
            values = torch.where(random.bernoulli(key, half, shape), 1.0, -1.0)
        else:
            values = mean + std * random.normal(key, shape, random.draw_dtype(dtype))
        return nn.Parameter(values.to(dtype))

    def rows(self, base: Tensor | None) -> nn.Parameter | None:
        """Gives each member a copy of a parameter of the base layer, if there is one."""
        return None if base is None else param(repeated(base, self.num_members), base)


def copied(tensor: Tensor) -> Tensor:
    return tensor.detach().clone(memory_format=torch.contiguous_format)


def repeated(tensor: Tensor, num_members: int) -> Tensor:
    """Returns a copy of the tensor for each member, along a first axis."""
    return copied(tensor.expand(num_members, *tensor.shape))


def param(value: Tensor, like: Tensor) -> nn.Parameter:
    """Makes a parameter that is trained where `like` is."""
    return nn.Parameter(value, requires_grad=like.requires_grad)


def member_of(rows: Tensor | None, i: int) -> nn.Parameter | None:
    """Makes a parameter of the row of member i, if there are any."""
    return None if rows is None else param(copied(rows[i]), rows)


def draw_kernel(rngs: Rngs, like: Tensor) -> Tensor:
    """Draws a fresh kernel (in_features, out_features), lecun_normal."""
    key = rngs.params().to(like.device)
    return random.lecun_normal(key, like.shape, random.draw_dtype(like.dtype)).to(like.dtype)
