"""The two frameworks, and the networks that bad input is given to."""

from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from flax import nnx
from torch import nn

import probly_flax.metrics
import probly_torch.metrics
from parity_tests.kit.trees import jax_of
from parity_tests.suite.subjects.subject import randomized, without_draws


def drawn(make, *args, **options):
    return randomized(without_draws(lambda: make(*args, **options, rngs=nnx.Rngs(0))))


def torch_mlp():
    return nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 3))


def flax_mlp(rngs):
    return nnx.Sequential(nnx.Linear(5, 6, rngs=rngs), nnx.relu, nnx.Linear(6, 3, rngs=rngs))


class TorchCNN(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 5, 3, padding=1, **options))
        self.head = nn.Linear(5, 2)

    def forward(self, x):
        return self.head(self.features(x).mean((2, 3)))


class FlaxCNN(nnx.Module):
    def __init__(self, padding=1, *, rngs):
        conv = nnx.Conv(4, 5, (3, 3), padding=padding, rngs=rngs)
        self.features = nnx.Sequential(nnx.Conv(3, 4, (3, 3), padding=0, rngs=rngs), nnx.relu, conv)
        self.head = nnx.Linear(5, 2, rngs=rngs)

    def __call__(self, x):
        return self.head(self.features(x).mean((1, 2)))


class TorchLSTM(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.embed, self.head = nn.Embedding(7, 4, **options), nn.Linear(3, 2)
        self.rnn = nn.LSTM(4, 3, batch_first=True)

    def forward(self, x):
        return self.head(self.rnn(self.embed(x))[0][:, -1])


class FlaxLSTM(nnx.Module):
    def __init__(self, rngs):
        self.embed, self.head = nnx.Embed(7, 4, rngs=rngs), nnx.Linear(3, 2, rngs=rngs)
        self.rnn = nnx.RNN(nnx.OptimizedLSTMCell(4, 3, rngs=rngs), rngs=rngs)

    def __call__(self, x):
        return self.head(self.rnn(self.embed(x))[:, -1])


def torch_encoder():
    layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


class FlaxEncoder(nnx.Module):
    """The part of torch's encoder that matters here."""

    def __init__(self, rngs):
        self.self_attn = nnx.MultiHeadAttention(2, 8, decode=False, rngs=rngs)
        self.linear1, self.linear2 = nnx.Linear(8, 12, rngs=rngs), nnx.Linear(12, 8, rngs=rngs)

    def __call__(self, x, mask=None):
        return self.linear2(nnx.relu(self.linear1(x + self.self_attn(x, mask=mask))))


@dataclass(frozen=True)
class Framework:
    """One package, and its framework's way to make a network, a layer and an array."""

    package: Any
    mlp: Any
    cnn: Any
    lstm: Any
    encoder: Any
    sequential: Any
    linear: Any
    norm: Any
    array: Any

    def zeros(self, *shape, dtype="float32"):
        return self.array(np.zeros(shape, dtype))


TORCH = Framework(
    probly_torch,
    torch_mlp,
    TorchCNN,
    TorchLSTM,
    torch_encoder,
    nn.Sequential,
    nn.Linear,
    lambda: nn.LayerNorm(4),
    torch.tensor,
)
flax_linear = cache(partial(drawn, nnx.Linear))
FLAX = Framework(
    probly_flax,
    partial(drawn, flax_mlp),
    partial(drawn, FlaxCNN),
    partial(drawn, FlaxLSTM),
    partial(drawn, FlaxEncoder),
    nnx.Sequential,
    lambda *sizes: nnx.clone(flax_linear(*sizes)),
    partial(drawn, nnx.LayerNorm, 4),
    jax_of,
)


def converted(f, kind, **options):
    return f.package.batchensemble(getattr(f, kind)(), 3, **options)


@cache
def model(f, kind):
    """Converts a network. What its numbers are does not matter: in Flax they are zeros."""
    return converted(f, kind) if f is TORCH else without_draws(lambda: converted(f, kind))


@cache
def deep(f):
    return f.package.ensemble(f.mlp(), 3)


def network(f):
    return f.sequential(f.linear(4, 3), f.linear(3, 2))
