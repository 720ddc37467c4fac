"""Networks in both frameworks, of one function once their weights are equal, and a batch that each is called with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from itertools import count
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from torch import nn

import probly_flax as pf
import probly_torch as pt
from parity_tests.kit.trees import jax_of, mapped
from parity_tests.suite.subjects.subject import randomized, without_draws


class TorchTied(nn.Module):
    """Names that are not in order, a layer used twice, tied weights, a norm, and a nested container."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 6))
        self.block = nn.Linear(6, 6)
        self.again = self.block
        self.norm = nn.LayerNorm(6)
        self.embed = nn.Embedding(5, 6)
        self.a_head = nn.Linear(6, 5)
        self.a_head.weight = self.embed.weight

    def forward(self, x: torch.Tensor, scale: float = 1.0) -> dict[str, Any]:
        x = self.again(torch.relu(self.block(self.encoder(x)))) * scale
        return {"logits": self.a_head(self.norm(x)), "hidden": (x,)}


class FlaxTied(nnx.Module):
    """The twin, defined in another order. A kernel cannot be tied to an embedding, which it is transposed to."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.a_head, self.embed = nnx.Linear(6, 5, rngs=rngs), nnx.Embed(5, 6, rngs=rngs)
        self.encoder = nnx.Sequential(nnx.Linear(4, 6, rngs=rngs), nnx.relu, nnx.Linear(6, 6, rngs=rngs))
        self.block = nnx.Linear(6, 6, rngs=rngs)
        self.again = self.block
        self.norm = nnx.LayerNorm(6, epsilon=1e-5, use_fast_variance=False, rngs=rngs)

    def __call__(self, x: jax.Array, scale: float = 1.0) -> dict[str, Any]:
        x = self.again(jax.nn.relu(self.block(self.encoder(x)))) * scale
        return {"logits": self.a_head(self.norm(x)), "hidden": (x,)}


class TorchHeads(nn.Module):
    """Nested linear layers under names of their own, one without bias."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 6, dtype=dtype), nn.ReLU(), nn.Linear(6, 6, bias=False, dtype=dtype))
        self.heads = nn.ModuleDict({"main": nn.Linear(6, 3, dtype=dtype), "aux": nn.Linear(6, 2, dtype=dtype)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([head(self.body(x)) for head in self.heads.values()], -1)


class FlaxHeads(nnx.Module):
    """The twin."""

    def __init__(self, rngs: nnx.Rngs, param_dtype: Any = jnp.float32) -> None:
        linear = partial(nnx.Linear, param_dtype=param_dtype, rngs=rngs)
        self.body = nnx.Sequential(linear(4, 6), nnx.relu, linear(6, 6, use_bias=False))
        self.heads = nnx.Dict({"main": linear(6, 3), "aux": linear(6, 2)})

    def __call__(self, x: jax.Array) -> jax.Array:
        return jnp.concatenate([self.heads[name](self.body(x)) for name in ("main", "aux")], -1)


class TorchBlock(nn.Module):
    """Two convolutions and a shortcut (He et al. 2016)."""

    def __init__(self, channels: int, features: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(channels, features, 3, stride, 1, bias=False), nn.BatchNorm2d(features)
        self.conv2, self.norm2 = nn.Conv2d(features, features, 3, 1, 1, bias=False), nn.BatchNorm2d(features)
        self.shortcut = nn.Conv2d(channels, features, 1, stride)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.norm2(self.conv2(self.norm1(self.conv1(x)).relu()))
        return (h + self.shortcut(x)).relu()


class TorchResNet(nn.Module):
    """A small one."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.block = nn.Conv2d(3, 4, 3, 1, 1), TorchBlock(4, 6, 2)
        self.head = nn.Linear(6, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.block(self.stem(x)).mean((2, 3)))


def batch_norm(features: int, rngs: nnx.Rngs) -> nnx.BatchNorm:
    return nnx.BatchNorm(features, momentum=0.9, use_fast_variance=False, rngs=rngs)


def conv(channels: int, features: int, size: int, stride: int, rngs: nnx.Rngs, use_bias: bool = True) -> nnx.Conv:
    padding = (size - 1) // 2
    return nnx.Conv(channels, features, (size, size), stride, padding=padding, use_bias=use_bias, rngs=rngs)


class FlaxBlock(nnx.Module):
    """The twin."""

    def __init__(self, channels: int, features: int, stride: int, rngs: nnx.Rngs) -> None:
        self.conv1, self.norm1 = conv(channels, features, 3, stride, rngs, use_bias=False), batch_norm(features, rngs)
        self.conv2, self.norm2 = conv(features, features, 3, 1, rngs, use_bias=False), batch_norm(features, rngs)
        self.shortcut = conv(channels, features, 1, stride, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        h = self.norm2(self.conv2(jax.nn.relu(self.norm1(self.conv1(x)))))
        return jax.nn.relu(h + self.shortcut(x))


class FlaxResNet(nnx.Module):
    """The twin."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.stem = conv(3, 4, 3, 1, rngs)
        self.block = FlaxBlock(4, 6, 2, rngs)
        self.head = nnx.Linear(6, 5, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.head(self.block(self.stem(x)).mean((1, 2)))


class TorchTransformer(nn.Module):
    """Embedding, attention and a feed-forward layer, with norms before them."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.norm1, self.norm2 = nn.LayerNorm(8), nn.LayerNorm(8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        h = self.norm1(x)
        x = x + self.attention(h, h, h, need_weights=False)[0]
        return (x + self.down(self.up(self.norm2(x)).relu())).mean(1)


class FlaxTransformer(nnx.Module):
    """The twin."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.embed = nnx.Embed(11, 8, rngs=rngs)
        self.norm1, self.norm2 = (nnx.LayerNorm(8, epsilon=1e-5, use_fast_variance=False, rngs=rngs) for _ in range(2))
        self.attention = nnx.MultiHeadAttention(2, 8, decode=False, rngs=rngs)
        self.up, self.down = nnx.Linear(8, 16, rngs=rngs), nnx.Linear(16, 8, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = self.embed(tokens)
        x = x + self.attention(self.norm1(x))
        return (x + self.down(jax.nn.relu(self.up(self.norm2(x))))).mean(1)


@dataclass(frozen=True)
class Network:
    """A network in both frameworks, and a batch in torch's layout."""

    torch: Callable[..., nn.Module]
    flax: Callable[..., nnx.Module]
    batch: np.ndarray

    @property
    def x(self) -> Any:
        """Torch's batch."""
        return torch.tensor(self.batch)

    @property
    def z(self) -> Any:
        """Flax's batch, channels last."""
        return jax_of(np.moveaxis(self.batch, 1, -1) if self.batch.ndim > 2 else self.batch)


DRAWS, SEEDS = np.random.default_rng(0), count()
NETWORKS = {
    "Tied": Network(TorchTied, FlaxTied, DRAWS.standard_normal((2, 4)).astype("float32")),
    "ResNet": Network(TorchResNet, FlaxResNet, DRAWS.standard_normal((6, 3, 8, 8)).astype("float32")),
    "Transformer": Network(TorchTransformer, FlaxTransformer, DRAWS.integers(0, 11, (6, 7), "int32")),
}


@dataclass(frozen=True)
class Framework:
    """A package, and how its framework takes and gives arrays: what a test needs that says the same of both."""

    package: Any
    array: Callable[..., Any]
    sequential: Callable[..., Any]
    linear: Callable[..., Any]  # of the sizes and a dtype
    tied: Callable[[], Any]

    def __str__(self) -> str:
        return self.package.__name__.removeprefix("probly_")

    def numpy(self, y: Any) -> Any:
        """Converts the arrays of a tree."""
        return mapped(y, lambda leaf: leaf.detach().numpy() if self is TORCH else np.asarray(leaf))


@cache
def _without_draws(make: Callable[..., Any], *sizes: int, **options: Any) -> Any:
    return without_draws(lambda: make(*sizes, **options, rngs=nnx.Rngs(0)))


def _drawn(make: Callable[..., Any], *sizes: int, **options: Any) -> Any:
    """Makes a Flax model with other weights each time."""
    return randomized(nnx.clone(_without_draws(make, *sizes, **options)), next(SEEDS))


def _torch_linear(in_features: int, out_features: int, dtype: str = "float32") -> nn.Linear:
    return nn.Linear(in_features, out_features, dtype=getattr(torch, dtype))


def _flax_linear(in_features: int, out_features: int, dtype: str = "float32") -> Any:
    return _drawn(nnx.Linear, in_features, out_features, param_dtype=jnp.dtype(dtype))


TORCH = Framework(pt, torch.tensor, nn.Sequential, _torch_linear, TorchTied)
FLAX = Framework(pf, jax_of, nnx.Sequential, _flax_linear, partial(_drawn, FlaxTied))
BOTH = pytest.mark.parametrize("f", [TORCH, FLAX], ids=str)
