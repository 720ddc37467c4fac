"""Helpers that the functions share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def rows(weights: Tensor, members: Tensor) -> Tensor:
    """Reshapes (E, features) to (E, 1, ..., features), against members (E, B, ..., features)."""
    return weights.reshape(weights.shape[0], *(1,) * (members.ndim - 2), weights.shape[-1])


def autocast(*tensors: Any) -> tuple[Any, ...]:
    """Casts as torch.autocast casts the arguments of a linear layer, so that r, s and bias do not widen the result."""
    device = tensors[0].device.type
    if not (torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in tensors)


def promoted(
    what: str, x: Tensor, weight: Tensor, r: Tensor, s: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """Returns the inputs and weights in the dtype that a linear layer computes in: autocast's, or their own."""
    x, weight, r, s, bias = autocast(x, weight, r, s, bias)
    if x.dtype != weight.dtype:
        raise TypeError(
            f"{what} expects inputs of the weight's dtype, {weight.dtype}; got {x.dtype}. "
            f"Convert them: x.to({weight.dtype})."
        )
    return x, weight, r, s, bias
