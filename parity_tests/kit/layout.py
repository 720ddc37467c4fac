"""Images have their channels at axis 1 in torch, and last in Flax."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Layout:
    """Which arrays torch has as (N, C, ...) and Flax as (N, ..., C): those with one of these numbers of axes."""

    ranks: frozenset[int] = frozenset()

    def to_flax(self, array: np.ndarray) -> np.ndarray:
        """Converts an input."""
        return np.moveaxis(array, 1, -1) if array.ndim in self.ranks else array

    def to_torch(self, array: np.ndarray, shape: Sequence[int]) -> np.ndarray | None:
        """Converts an output that has this shape in torch, or returns None."""
        forms = (np.moveaxis(array, -1, axis) if axis else array for axis in self._channels(array.ndim))
        return next((each for each in forms if each.shape == tuple(shape)), None)

    def to_flax_output(self, array: np.ndarray, shape: Sequence[int]) -> np.ndarray:
        """Converts the gradient of an output that has this shape in Flax."""
        forms = (np.moveaxis(array, axis, -1) if axis else array for axis in self._channels(array.ndim))
        return next(each for each in forms if each.shape == tuple(shape))

    def _channels(self, rank: int) -> list[int]:
        """Lists where torch may have the channels that are last in Flax, the likely place first; 0 is the same layout.

        Member outputs of images, (E, N, C, ...), have them one axis later.
        """
        likely = 1 if rank in self.ranks else 2 if rank - 1 in self.ranks else 0
        return [likely, *(axis for axis in (0, 1, 2) if axis != likely and (axis == 0 or rank > axis + 1))]

    def to_torch_input(self, array: np.ndarray) -> np.ndarray:
        """Converts the gradient of an input."""
        return np.moveaxis(array, -1, 1) if array.ndim in self.ranks else array

    def __str__(self) -> str:
        """Returns what a report says."""
        return "channels last, (N, ..., C)" if self.ranks else "in torch's layout"


def to_torch_layout(array: Any, shape: Sequence[int], channels_last: bool) -> np.ndarray | None:
    """Returns Flax's array as torch's of this shape, or None if it is of another shape in either layout."""
    return _images(channels_last).to_torch(np.asarray(array), shape)


def to_flax_layout(array: Any, channels_last: bool) -> np.ndarray:
    """Returns torch's array as Flax takes it."""
    return _images(channels_last).to_flax(np.asarray(array))


def _images(channels_last: bool) -> Layout:
    """Makes the layout of images. Sequences (B, T, C) are the same in both."""
    return Layout(frozenset((4, 5) if channels_last else ()))
