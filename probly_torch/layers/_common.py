"""Helpers that the layers share: copies and draws of their weights."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from probly_torch import random
from probly_torch.random import Rngs


def copied(tensor: Tensor) -> Tensor:
    return tensor.detach().clone(memory_format=torch.contiguous_format)


def keep_rows(layer: nn.Module, names: Iterable[str], indices: Sequence[int]) -> None:
    """Drops the rows of every other member of these parameters, where the layer has them, in place."""
    for name in names:
        rows = getattr(layer, name)
        if rows is not None:
            setattr(layer, name, nn.Parameter(copied(rows[indices]), requires_grad=rows.requires_grad))


def draw_kernel(rngs: Rngs, like: Tensor) -> Tensor:
    """Draws a fresh kernel (in_features, out_features), lecun_normal."""
    key = rngs.params().to(like.device)
    return random.lecun_normal(key, like.shape, random.draw_dtype(like.dtype)).to(like.dtype)


def draw_fast_weights(rngs: Rngs, shape: tuple[int, int], init: str, mean: float, std: float, like: Tensor) -> Tensor:
    key, dtype = rngs.params().to(like.device), random.draw_dtype(like.dtype)
    if init == "ones":  # takes a key all the same, so that what is drawn after it does not depend on init
        return torch.ones(shape, dtype=like.dtype, device=like.device)
    if init == "random_sign":
        half = torch.tensor(0.5, dtype=torch.float32)  # named, since the bits that are drawn depend on it
        return torch.where(random.bernoulli(key, half, shape), 1.0, -1.0).to(like.dtype)
    return (mean + std * random.normal(key, shape, dtype)).to(like.dtype)
