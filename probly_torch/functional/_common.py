"""What the functions share."""

from __future__ import annotations

import torch
from torch import Tensor


def rows(weights: Tensor, members: Tensor) -> Tensor:
    """(E, features) -> (E, 1, ..., features), against members (E, B, ..., features)."""
    return weights.reshape(weights.shape[0], *(1,) * (members.ndim - 2), weights.shape[-1])


def autocast(tensor: Tensor) -> Tensor:
    """Casts as torch.autocast casts the arguments of a linear layer, so that r, s and bias do not widen the result."""
    device = tensor.device.type
    enabled = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return tensor.to(torch.get_autocast_dtype(device)) if enabled and tensor.dtype != torch.float64 else tensor
