"""Normalisation layers in which each member has its own scale, offset and running statistics."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from probly_common.checks.layers import check_base_type
from probly_common.checks.rows import check_mask, check_norm_rows
from probly_common.checks.values import check_num_members
from probly_flax.layers._base import BaseLayer, MemberLayer, copy_options, member_of, repeated

__all__ = ["BatchEnsembleBatchNorm", "BatchEnsembleGroupNorm", "BatchEnsembleLayerNorm"]

_COMMON = (
    "epsilon",
    "dtype",
    "param_dtype",
    "use_bias",
    "use_scale",
    "axis_name",
    "axis_index_groups",
    "use_fast_variance",
    "promote_dtype",
)
_OPTIONS: dict[Any, tuple[str, ...]] = {
    nnx.BatchNorm: (*_COMMON, "num_features", "use_running_average", "axis", "momentum"),
    nnx.LayerNorm: (*_COMMON, "num_features", "reduction_axes", "feature_axes"),
    nnx.GroupNorm: (*_COMMON, "num_groups", "group_size", "reduction_axes", "feature_axis"),
}
_VARIABLES = ("scale", "bias", "mean", "var")


class _Norm(MemberLayer[BaseLayer]):
    """The base of the layers: a scale and an offset for each member."""

    def _of_members(self) -> Iterable[str]:
        return _VARIABLES


class BatchEnsembleBatchNorm(_Norm[nnx.BatchNorm], nnx.BatchNorm):
    r"""E batch normalisations, each with its own scale, offset and running statistics.

    Member i computes  y_i = (x_i - mean_i) / sqrt(var_i + epsilon) * scale_i + bias_i, with the mean and variance of
    its own rows in train mode and its running statistics in eval mode. Everything else is the base layer's: each
    member is nnx.BatchNorm, under vmap.

    Shape:
        x: (E*B, ..., num_features), or with the features on the base layer's axis; rows [k*B, (k+1)*B) belong to
        member k. Returns the same.
    Weights:
        scale and bias (E, num_features) or None; mean and var (E, num_features). All members start as copies of the
        base layer's.
    Args:
        base_layer: the BatchNorm layer to start from, copied.
        num_members: the number of members E.
    Raises:
        TypeError: if base_layer is not a BatchNorm layer.
        ValueError: if the rows do not divide by num_members, or the rank or the features are others.
    Example:
        >>> layer = BatchEnsembleBatchNorm(nnx.BatchNorm(3, rngs=nnx.Rngs(0)), num_members=4)
        >>> layer(jnp.ones((8, 5, 5, 3))).shape, layer.mean.shape
        ((8, 5, 5, 3), (4, 3))
    """

    def __init__(self, base_layer: nnx.BatchNorm, num_members: int = 1) -> None:
        what = "BatchEnsembleBatchNorm"
        check_base_type(what, "a BatchNorm", base_layer, (nnx.BatchNorm,), "__call__")
        self.num_members = check_num_members(what, num_members)
        _for_each_member(self, nnx.BatchNorm, base_layer)

    def __call__(self, x: Array, use_running_average: bool | None = None, *, mask: Array | None = None) -> Array:
        """Normalises each member's rows, and updates its running statistics unless they are used.

        Shape:
            x: (E*B, ..., num_features); mask: broadcastable to it. Returns (E*B, ..., num_features).
        """
        _check(self, "BatchEnsembleBatchNorm", x, mask, self.num_features, self.axis)
        y, statistics = _normalized(
            self, nnx.BatchNorm, x, mask, ("mean", "var"), use_running_average=use_running_average
        )
        if not (self.use_running_average if use_running_average is None else use_running_average):
            self.mean[...], self.var[...] = statistics["mean"], statistics["var"]
        return y

    def member(self, i: int) -> nnx.BatchNorm:
        """Returns member i as an ordinary BatchNorm layer, with its own weights and statistics.

        Example:
            >>> layer = BatchEnsembleBatchNorm(nnx.BatchNorm(3, rngs=nnx.Rngs(0)), num_members=4)
            >>> x = jnp.arange(15.0).reshape(5, 3)
            >>> bool(jnp.allclose(layer.member(1)(x), layer(jnp.tile(x, (4, 1)))[5:10]))
            True
        """
        return _member(self, nnx.BatchNorm, self._index(i))


class BatchEnsembleLayerNorm(_Norm[nnx.LayerNorm], nnx.LayerNorm):
    r"""E layer normalisations, each with its own scale and offset.

    Member i computes  y_i = (x_i - mean) / sqrt(var + epsilon) * scale_i + bias_i, with the mean and variance of the
    base layer's reduction_axes of its rows. Everything else is the base layer's too: each member is nnx.LayerNorm,
    under vmap.

    Shape:
        x: (E*B, ..., num_features), rows [k*B, (k+1)*B) belong to member k. Returns the same.
    Weights:
        scale and bias (E, num_features) or None. All members start as copies of the base layer's.
    Args:
        base_layer: the LayerNorm layer to start from, copied.
        num_members: the number of members E.
    Raises:
        TypeError: if base_layer is not a LayerNorm layer.
        ValueError: if the rows do not divide by num_members, or the rank or the features are others.
    Example:
        >>> layer = BatchEnsembleLayerNorm(nnx.LayerNorm(3, rngs=nnx.Rngs(0)), num_members=4)
        >>> layer(jnp.ones((8, 5, 3))).shape, layer.scale.shape
        ((8, 5, 3), (4, 3))
    """

    def __init__(self, base_layer: nnx.LayerNorm, num_members: int = 1) -> None:
        what = "BatchEnsembleLayerNorm"
        check_base_type(what, "a LayerNorm", base_layer, (nnx.LayerNorm,), "__call__")
        self.num_members = check_num_members(what, num_members)
        _for_each_member(self, nnx.LayerNorm, base_layer)

    def __call__(self, x: Array, *, mask: Array | None = None) -> Array:
        """Normalises each member's rows.

        Shape:
            x: (E*B, ..., num_features); mask: broadcastable to it. Returns (E*B, ..., num_features).
        """
        _check(self, "BatchEnsembleLayerNorm", x, mask, self.num_features, self.feature_axes, self.reduction_axes)
        return _normalized(self, nnx.LayerNorm, x, mask)[0]

    def member(self, i: int) -> nnx.LayerNorm:
        """Returns member i as an ordinary LayerNorm layer.

        Example:
            >>> layer = BatchEnsembleLayerNorm(nnx.LayerNorm(3, rngs=nnx.Rngs(0)), num_members=4)
            >>> x = jnp.arange(15.0).reshape(5, 3)
            >>> bool(jnp.allclose(layer.member(1)(x), layer(jnp.tile(x, (4, 1)))[5:10]))
            True
        """
        return _member(self, nnx.LayerNorm, self._index(i))


class BatchEnsembleGroupNorm(_Norm[nnx.GroupNorm], nnx.GroupNorm):
    r"""E group normalisations, each with its own scale and offset.

    Member i computes  y_i = (x_i - mean) / sqrt(var + epsilon) * scale_i + bias_i, with the mean and variance of each
    group of channels in each row. Everything else is the base layer's: each member is nnx.GroupNorm, under vmap.

    Shape:
        x: (E*B, ..., num_features), rows [k*B, (k+1)*B) belong to member k. Returns the same.
    Weights:
        scale and bias (E, num_features) or None. All members start as copies of the base layer's.
    Args:
        base_layer: the GroupNorm layer to start from, copied.
        num_members: the number of members E.
    Raises:
        TypeError: if base_layer is not a GroupNorm layer.
        ValueError: if the rows do not divide by num_members, or there are other than num_features features.
    Example:
        >>> layer = BatchEnsembleGroupNorm(nnx.GroupNorm(6, num_groups=3, rngs=nnx.Rngs(0)), num_members=4)
        >>> layer(jnp.ones((8, 5, 5, 6))).shape, layer.scale.shape
        ((8, 5, 5, 6), (4, 6))
    """

    def __init__(self, base_layer: nnx.GroupNorm, num_members: int = 1) -> None:
        what = "BatchEnsembleGroupNorm"
        check_base_type(what, "a GroupNorm", base_layer, (nnx.GroupNorm,), "__call__")
        self.num_members = check_num_members(what, num_members)
        _for_each_member(self, nnx.GroupNorm, base_layer)

    def __call__(self, x: Array, *, mask: Array | None = None) -> Array:
        """Normalises each member's rows.

        Shape:
            x: (E*B, ..., num_features); mask: broadcastable to it. Returns (E*B, ..., num_features).
        """
        features = self.num_groups * self.group_size
        _check(self, "BatchEnsembleGroupNorm", x, mask, features, self.feature_axis, self.reduction_axes or ())
        return _normalized(self, nnx.GroupNorm, x, mask)[0]

    def member(self, i: int) -> nnx.GroupNorm:
        """Returns member i as an ordinary GroupNorm layer.

        Example:
            >>> layer = BatchEnsembleGroupNorm(nnx.GroupNorm(4, num_groups=2, rngs=nnx.Rngs(0)), num_members=4)
            >>> x = jnp.arange(20.0).reshape(5, 4)
            >>> bool(jnp.allclose(layer.member(1)(x), layer(jnp.tile(x, (4, 1)))[5:10]))
            True
        """
        return _member(self, nnx.GroupNorm, self._index(i))


def _for_each_member(layer: Any, base_type: Any, base_layer: Any) -> None:
    """Gives the layer the base layer's options, and a copy of its variables for each member."""
    copy_options(layer, base_layer, _OPTIONS[base_type])
    for name in _VARIABLES:
        if hasattr(base_layer, name):
            base = getattr(base_layer, name)
            setattr(layer, name, nnx.data(None))
            if base is not None:
                setattr(layer, name, repeated(base, layer.num_members))


def _variables(layer: Any) -> dict[str, Any]:
    return {name: each for name in _VARIABLES if (each := getattr(layer, name, None)) is not None}


def _ordinary(layer: Any, base_type: Any, variables: Mapping[str, nnx.Variable]) -> Any:
    """Makes a layer of the base layer's class with the options of ours, and these variables."""
    sizes = {"num_groups": 1} if base_type is nnx.GroupNorm else {}
    ordinary = base_type(1, **sizes, use_scale=False, use_bias=False, rngs=nnx.Rngs())
    copy_options(ordinary, layer, _OPTIONS[base_type])
    for name, variable in variables.items():
        setattr(ordinary, name, variable)
    return ordinary


def _normalized(
    layer: Any, base_type: Any, x: Array, mask: Array | None, updates: Sequence[str] = (), **options: Any
) -> tuple[Array, dict[str, Array]]:
    """Runs each member's rows through an ordinary layer.

    Returns the outputs, and the variables that the layer updates, by name.
    """

    def member(values: dict[str, Array], x: Array, mask: Array | None) -> tuple[Array, dict[str, Array]]:
        variables = {name: type(getattr(layer, name))(value) for name, value in values.items()}
        ordinary = _ordinary(layer, base_type, variables)
        y = ordinary(x, **options, mask=mask)
        return y, {name: getattr(ordinary, name)[...] for name in updates}

    def rows(x: Array) -> Array:
        return x.reshape(layer.num_members, x.shape[0] // layer.num_members, *x.shape[1:])

    own_mask = mask is not None and mask.ndim == x.ndim  # otherwise it has no rows, and is every member's
    if mask is not None and own_mask:
        mask = rows(jnp.broadcast_to(mask, (x.shape[0], *mask.shape[1:])))
    values = {name: variable[...] for name, variable in _variables(layer).items()}
    y, updated = jax.vmap(member, in_axes=(0, 0, 0 if own_mask else None))(values, rows(x), mask)
    return y.reshape(x.shape), updated


def _check(layer: Any, what: str, x: Array, mask: Array | None, num_features: int, *axes: Any) -> None:
    """Checks the inputs and the mask.

    The first of the axes are those of the features.
    """
    features, *others = (tuple(each) if isinstance(each, Sequence) else (each,) for each in axes)
    used = [axis + 1 if axis >= 0 else -axis for each in (features, *others) for axis in each]
    rank = max(2, len(features) + 1, *used)
    shape = (max(1, x.shape[0] // layer.num_members), *x.shape[1:]) if x.ndim else ()
    found = math.prod(shape[axis] for axis in features) if x.ndim >= rank else 0
    check_norm_rows(what, x.shape, layer.num_members, (num_features,), (found,), (rank,))
    if mask is not None:
        check_mask(what, mask.shape, x.shape)


def _member(layer: Any, base_type: Any, i: int) -> Any:
    return _ordinary(layer, base_type, {name: member_of(each, i) for name, each in _variables(layer).items()})
