"""What the layers share: the arguments, their checks and draws, and how members are kept."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Generic, NamedTuple, Protocol, TypeGuard, TypeVar, runtime_checkable

import jax.numpy as jnp
from flax import nnx
from jax import Array

from probly_common.checks.ensembles import member_index, member_indices
from probly_common.checks.layers import check_init, seed_is_not_num_members
from probly_common.checks.values import check_num_members
from probly_flax import random
from probly_flax.random import Rngs

BaseLayer = TypeVar("BaseLayer", bound=nnx.Module)


@runtime_checkable
class BatchEnsembleLayer(Protocol):
    """The interface of a layer of members. register_batchensemble takes any layer that offers it."""

    num_members: int

    def member(self, i: int) -> nnx.Module:
        """Returns member i as an ordinary layer."""

    def keep_members(self, indices: Sequence[int]) -> None:
        """Drops every other member, in place."""


class SharedBatchLayer(BatchEnsembleLayer, Protocol):
    """What a layer may offer besides. A BatchEnsemble whose network starts with such a layer does not tile its batch.

    A subclass with a __call__ of its own needs a shared_batch of its own: the one that it inherits is not called.
    """

    def shared_batch(self, inputs: Array) -> Array:
        """Returns what self(tile_members(inputs, self.num_members)) does, without the copies."""


def takes_shared_batch(layer: object) -> TypeGuard[SharedBatchLayer]:
    """Tells whether the layer has a shared_batch, and no class below that one has a __call__ of its own.

    It is asked in every call: isinstance takes a hundred times longer.
    """
    for each in type(layer).__mro__:
        if "shared_batch" in each.__dict__:
            return True
        if "__call__" in each.__dict__:
            return False
    return False


class MemberLayer(nnx.Module, Generic[BaseLayer]):
    """The base of every layer: E members, each with rows of its own in some of the variables."""

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
                setattr(self, name, value.copy(value[jnp.array(indices)]))

    def _of_members(self) -> Iterable[str]:
        """Lists what has a row for each member, and the layers of members in this one."""
        return "r", "s", "bias"

    def _index(self, i: int) -> int:
        return member_index(type(self).__name__, i, self.num_members)


class FastWeightLayer(MemberLayer[BaseLayer]):
    """The base of the layers whose members share a kernel, and scale it by r and s."""

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
        """Copies the base layer and its options, and draws r and s for each member.

        Args:
            base_layer: the layer to start from. It is copied, never changed or shared.
            rngs: a seed or an Rngs; keys come from `rngs.params()` for the kernel (if drawn), r and s, in this order.
            num_members: the number of members E.
            use_base_weights: share a copy of the base layer's kernel; otherwise draw one, lecun_normal.
            init: "normal" (r ~ N(r_mean, r_std), s ~ N(s_mean, s_std)), "random_sign" (+-1 with equal
                probability; Wen et al. 2020, appendix B) or "ones" (r = s = 1: members start equal).
            r_mean: mean of r under init="normal".
            r_std: standard deviation of r under init="normal".
            s_mean: mean of s under init="normal".
            s_std: standard deviation of s under init="normal".
        """
        what = type(self).__name__
        self._check_base(what, base_layer)
        check_init(what, init, r_mean, r_std, s_mean, s_std)
        self.num_members = check_num_members(what, num_members)
        rngs = random.as_rngs(what, rngs)
        self._convert(base_layer, Draws(rngs, self.num_members, use_base_weights, init, r_mean, r_std, s_mean, s_std))

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

    def weight(self, base: nnx.Param, draw: Callable[[Rngs, Array], Array] | None = None) -> nnx.Param:
        """Copies the base layer's kernel, or draws another one: by default of its shape, lecun_normal."""
        kernel = jnp.copy(base[...]) if self.use_base_weights else (draw or draw_kernel)(self.rngs, base[...])
        return param(kernel, base, *axes(base))

    def fast_weights(
        self, in_features: int, out_features: int, like: nnx.Param, in_axis: Any, out_axis: Any
    ) -> tuple[nnx.Param, nnx.Param]:
        """Draws r (E, in_features), then s (E, out_features), sharded along these mesh axes."""
        r = param(self._fast(in_features, self.r_mean, self.r_std, like.dtype), like, None, in_axis)
        return r, param(self._fast(out_features, self.s_mean, self.s_std, like.dtype), like, None, out_axis)

    def _fast(self, features: int, mean: float, std: float, dtype: Any) -> Array:
        shape, key = (self.num_members, features), self.rngs.params()
        if self.init == "ones":  # takes a key all the same, so that what is drawn after it does not depend on init
            return jnp.ones(shape, dtype)
        if self.init == "random_sign":
            half = jnp.float32(0.5)  # named, since the bits that are drawn depend on it
            return jnp.where(random.bernoulli(key, half, shape), 1, -1).astype(dtype)
        normal = random.rounded(random.normal(key, shape, random.draw_dtype(dtype)))
        return (mean + random.rounded(std * normal)).astype(dtype)

    def rows(self, base: nnx.Param | None) -> Any:
        """Gives each member a copy of a parameter of the base layer, if there is one."""
        return nnx.data(None) if base is None else repeated(base, self.num_members)


def axes(parameter: nnx.Param) -> tuple[Any, ...]:
    """Returns the mesh axis of each of a parameter's axes, None where it is not sharded."""
    return parameter.get_metadata("out_sharding", None) or (None,) * parameter.ndim


def param(value: Array, like: nnx.Param, *axes: Any) -> nnx.Param:
    """Makes a parameter of the same type and metadata, sharded along these mesh axes if there are any."""
    metadata = like.get_metadata() | {"out_sharding": axes}
    if not any(axes):
        del metadata["out_sharding"]
    return type(like)(value, **metadata)


def repeated(base: nnx.Param, num_members: int) -> nnx.Param:
    """Makes a parameter with a copy of this one for each member, along a first axis."""
    return param(jnp.tile(base[...], (num_members, *(1,) * base.ndim)), base, None, *axes(base))


def member_of(rows: nnx.Param | None, i: int) -> Any:
    """Makes a parameter of the row of member i, if there are any."""
    return nnx.data(None) if rows is None else param(rows[i], rows, *axes(rows)[1:])


def copy_options(target: nnx.Module, source: nnx.Module, names: Iterable[str]) -> None:
    for name in names:
        setattr(target, name, getattr(source, name))


def draw_kernel(rngs: Rngs, like: Array) -> Array:
    """Draws a fresh kernel (in_features, out_features), lecun_normal."""
    return nnx.initializers.lecun_normal()(rngs.params(), like.shape, random.draw_dtype(like.dtype)).astype(like.dtype)
