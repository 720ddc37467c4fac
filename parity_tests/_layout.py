"""Images have their channels at axis 1 in torch, and last in Flax."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np


def to_torch_layout(array: Any, shape: Sequence[int], channels_last: bool) -> np.ndarray | None:
    """Flax's array as torch's of this shape; None if it is of another shape in either layout.

    Sequences (B, T, C) are the same in both, so that three axes are moved only if the shape asks for it.
    """
    values = np.asarray(array)
    layouts = [values, np.moveaxis(values, -1, 1)] if values.ndim >= 3 else [values]
    if channels_last and values.ndim >= 4:
        layouts.reverse()
    return next((each for each in layouts if each.shape == tuple(shape)), None)


def to_flax_layout(array: Any, channels_last: bool, image_rank: int = 4) -> np.ndarray:
    """torch's array as Flax takes it: images, which have at least so many axes, with their channels last."""
    values = np.asarray(array)
    return np.moveaxis(values, 1, -1) if channels_last and values.ndim >= image_rank else values
