"""Helpers that the layers share: copies and draws of their weights."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax import Array

from probly_flax import random
from probly_flax.random import Rngs


def axes(parameter: nnx.Param) -> tuple[Any, ...]:
    """Returns the mesh axis of each of a parameter's axes, None where it is not sharded."""
    return parameter.get_metadata("out_sharding", None) or (None,) * parameter.ndim


def param(value: Array, like: nnx.Param, *axes: Any) -> nnx.Param:
    """Makes a parameter of the same type and metadata, sharded along these mesh axes if there are any."""
    metadata = like.get_metadata() | {"out_sharding": axes}
    if not any(axes):
        del metadata["out_sharding"]
    return type(like)(value, **metadata)


def keep_rows(layer: nnx.Module, names: Iterable[str], indices: Sequence[int]) -> None:
    """Drops the rows of every other member of these parameters, where the layer has them, in place."""
    for name in names:
        rows = getattr(layer, name)
        if rows is not None:
            setattr(layer, name, rows.copy(rows[jnp.array(indices)]))


def draw_kernel(rngs: Rngs, like: Array) -> Array:
    """Draws a fresh kernel (in_features, out_features), lecun_normal."""
    return nnx.initializers.lecun_normal()(rngs.params(), like.shape, random.draw_dtype(like.dtype)).astype(like.dtype)


def draw_fast_weights(rngs: Rngs, shape: tuple[int, int], init: str, mean: float, std: float, dtype: Any) -> Array:
    key = rngs.params()
    if init == "ones":  # takes a key all the same, so that what is drawn after it does not depend on init
        return jnp.ones(shape, dtype)
    if init == "random_sign":
        half = jnp.float32(0.5)  # named, since the bits that are drawn depend on it
        return jnp.where(random.bernoulli(key, half, shape), 1, -1).astype(dtype)
    normal = random.rounded(random.normal(key, shape, random.draw_dtype(dtype)))
    return (mean + random.rounded(std * normal)).astype(dtype)
