"""The subjects of embeddings and normalisations."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx
from torch import nn

from parity_tests.suite.oracle import norm as oracle_norm
from parity_tests.suite.subjects.subject import Subject
from probly_flax.layers import embed as flax_embed
from probly_flax.layers import norm as flax_norm
from probly_torch.layers import embed as torch_embed
from probly_torch.layers import norm as torch_norm

EPS = 2.0**-10  # one that matters


def with_tensors(layer: nn.Module, **tensors: torch.Tensor) -> nn.Module:
    """Puts these tensors, leaves of the caller's graph, in place of the layer's parameters."""
    for name, tensor in tensors.items():
        delattr(layer, name)
        setattr(layer, name, tensor)
    return layer


def with_arrays(layer: nnx.Module, **arrays: jax.Array) -> Any:
    """Gives the layer these arrays as its parameters."""
    for name, array in arrays.items():
        setattr(layer, name, nnx.Param(array))
    return layer


def _embed(name: str, num_members: int, tokens: tuple[int, ...], num_embeddings: int, features: int) -> list[Subject]:
    weights = {
        "weight": (num_embeddings, features),
        "r": (num_members, num_embeddings),
        "s": (num_members, features),
    }

    @cache
    def drawn() -> Any:
        return torch_embed.BatchEnsembleEmbed(nn.Embedding(num_embeddings, features), num_members=num_members)

    def torch_layer(weight: torch.Tensor, r: torch.Tensor, s: torch.Tensor) -> Any:
        return with_tensors(drawn(), weight=weight, r=r, s=s)

    def flax_layer(weight: jax.Array, r: jax.Array, s: jax.Array) -> Any:
        base = nnx.Embed(num_embeddings, features, dtype=weight.dtype, rngs=nnx.Rngs(0))
        layer = flax_embed.BatchEnsembleEmbed(base, num_members=num_members)
        return with_arrays(layer, embedding=weight, r=r, s=s)

    return [
        Subject(
            f"BatchEnsembleEmbed-{name}",
            weights,
            lambda x, **weights: torch_layer(**weights)(x),
            lambda x, **weights: flax_layer(**weights)(x),
            oracle_norm.embed,
            integers={"x": (tokens, num_embeddings)},
            exact=(8, 0.125, 3),
        ),
        Subject(
            f"BatchEnsembleEmbed.attend-{name}",
            {"x": (*tokens, features), **weights},
            lambda x, **weights: torch_layer(**weights).attend(x),
            lambda x, **weights: flax_layer(**weights).attend(x),
            oracle_norm.attend,
            exact=(8, 0.125, 4),
        ),
    ]


def statistics(num_members: int, channels: int) -> tuple[np.ndarray, np.ndarray]:
    """Makes running means and variances, exact in every dtype."""
    steps = np.arange(num_members * channels, dtype=np.float64).reshape(num_members, channels)
    return (steps - 3) / 4, (steps + 1) / 8


def _batch_norm(shape: tuple[int, ...], num_members: int, train: bool) -> Subject:
    channels = shape[1]
    mean, var = statistics(num_members, channels)

    def run_torch(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        base_type = (nn.BatchNorm1d, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[x.ndim - 2]
        layer = torch_norm.BatchEnsembleBatchNorm(base_type(channels, eps=EPS, dtype=x.dtype), num_members)
        layer.running_mean, layer.running_var = torch.tensor(mean, dtype=x.dtype), torch.tensor(var, dtype=x.dtype)
        return with_tensors(layer, weight=weight, bias=bias).train(train)(x)

    def run_flax(x: jax.Array, weight: jax.Array, bias: jax.Array) -> jax.Array:
        base = nnx.BatchNorm(
            channels,
            epsilon=EPS,
            use_fast_variance=False,
            use_running_average=not train,
            dtype=x.dtype,
            rngs=nnx.Rngs(0),
        )
        layer = with_arrays(flax_norm.BatchEnsembleBatchNorm(base, num_members), scale=weight, bias=bias)
        dtype = jnp.float64 if x.dtype == jnp.float64 else jnp.float32  # as nnx.BatchNorm computes them
        layer.mean, layer.var = nnx.BatchStat(jnp.asarray(mean, dtype)), nnx.BatchStat(jnp.asarray(var, dtype))
        with jax.numpy_dtype_promotion("standard"):  # nnx.BatchNorm's own arithmetic promotes bfloat16
            return jnp.moveaxis(layer(jnp.moveaxis(x, 1, -1)), -1, 1)

    options = {} if train else {"mean": mean, "var": var}
    return Subject(
        f"BatchEnsembleBatchNorm-{'x'.join(map(str, shape))}-{'train' if train else 'eval'}",
        {"x": shape, "weight": (num_members, channels), "bias": (num_members, channels)},
        run_torch,
        run_flax,
        partial(oracle_norm.batch_norm, eps=EPS, **options),
    )


def _per_row(
    name: str,
    shape: tuple[int, ...],
    weights: tuple[int, ...],
    oracle: Callable[..., Any],
    torch_layer: Callable[[torch.dtype], nn.Module],
    flax_base: Callable[[], nnx.Module],
    flax_layer: type[Any],
    channels_first: bool,
) -> Subject:
    def run_torch(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return with_tensors(torch_layer(x.dtype), weight=weight, bias=bias)(x)

    def run_flax(x: jax.Array, weight: jax.Array, bias: jax.Array) -> jax.Array:
        scale, offset = weight.reshape(weights[0], -1), bias.reshape(weights[0], -1)
        layer = with_arrays(flax_layer(flax_base(), weights[0]), scale=scale, bias=offset)
        with jax.numpy_dtype_promotion("standard"):  # nnx's own arithmetic promotes bfloat16
            return jnp.moveaxis(layer(jnp.moveaxis(x, 1, -1)), -1, 1) if channels_first else layer(x)

    return Subject(
        f"{name}-{'x'.join(map(str, shape))}",
        {"x": shape, "weight": weights, "bias": weights},
        run_torch,
        run_flax,
        oracle,
    )


def _layer_norm(shape: tuple[int, ...], num_members: int, axes: int = 1) -> Subject:
    normalized, last = shape[-axes:], tuple(range(-axes, 0))
    return _per_row(
        "BatchEnsembleLayerNorm",
        shape,
        (num_members, *normalized),
        partial(oracle_norm.layer_norm, eps=EPS),
        lambda dtype: torch_norm.BatchEnsembleLayerNorm(nn.LayerNorm(normalized, eps=EPS, dtype=dtype), num_members),
        lambda: nnx.LayerNorm(
            int(np.prod(normalized)),
            epsilon=EPS,
            reduction_axes=last,
            feature_axes=last,
            use_fast_variance=False,
            rngs=nnx.Rngs(0),
        ),
        flax_norm.BatchEnsembleLayerNorm,
        channels_first=False,
    )


def _group_norm(shape: tuple[int, ...], num_members: int, groups: int) -> Subject:
    return _per_row(
        f"BatchEnsembleGroupNorm-{groups}",
        shape,
        (num_members, shape[1]),
        partial(oracle_norm.group_norm, eps=EPS, groups=groups),
        lambda dtype: torch_norm.BatchEnsembleGroupNorm(
            nn.GroupNorm(groups, shape[1], eps=EPS, dtype=dtype), num_members
        ),
        lambda: nnx.GroupNorm(shape[1], num_groups=groups, epsilon=EPS, use_fast_variance=False, rngs=nnx.Rngs(0)),
        flax_norm.BatchEnsembleGroupNorm,
        channels_first=True,
    )


SUBJECTS = [
    *_embed("E3", 3, (6, 4), 7, 5),
    *_embed("E2-ids", 2, (10,), 4, 4),
    *_embed("E1", 1, (2, 3, 2), 3, 2),
    *(
        _batch_norm(shape, num_members, train)
        for shape, num_members in (((15, 4), 3), ((8, 3, 5), 2), ((6, 5, 3, 2), 3), ((4, 7, 3, 2, 3), 1))
        for train in (True, False)
    ),
    _layer_norm((6, 7), 3),
    _layer_norm((6, 3, 11), 2),
    _layer_norm((4, 2, 3, 5), 2, axes=2),
    _group_norm((6, 14), 3, 2),
    _group_norm((4, 6, 3, 5), 2, 3),
    _group_norm((4, 4, 11), 1, 4),
]
