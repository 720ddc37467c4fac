"""Finds where a member among others computes something else than alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

ROUNDING = 2**-12  # of the largest value: far more than float64 leaves, and what layers of lower dtypes may
OTHER_ROWS = "its rows do not follow the batch"
NOT_CALLED = "it is not called, and its weights may be read past it"


class Calls:
    """The calls of the layers that have members, in their order, with their outputs."""

    def __init__(self) -> None:
        self.outputs: list[tuple[str, np.ndarray]] = []
        self.entered: str | None = None  # the layer that is running, or was when an error was raised

    def enter(self, path: str) -> None:
        self.entered = path

    def leave(self, path: str, output: np.ndarray) -> None:
        self.outputs.append((path, output))
        self.entered = None


class Mismatch(NamedTuple):
    """A member whose outputs differ, how far relative to their largest value, and the layers that may be why."""

    member: int
    distance: float
    suspects: dict[str, str]


def refused(calls: Calls) -> Mismatch:
    """Blames the layer that did not take what it was given, which a member alone takes."""
    return Mismatch(0, float("inf"), {calls.entered or "": OTHER_ROWS})


def mismatch(
    i: int,
    rows: Sequence[np.ndarray],
    alone: Sequence[np.ndarray],
    calls_alone: Calls,
    layers: Sequence[str],
    calls: Calls,
) -> Mismatch | None:
    """Compares the outputs that member i has among others, `rows`, with those that it has alone; None if they agree."""
    distance = max((_distance(*both) for both in zip(rows, alone, strict=True)), default=0.0)
    if distance <= ROUNDING:
        return None
    called = {path for path, _ in calls.outputs}
    suspects = {path: NOT_CALLED for path in layers if path not in called}
    if not suspects:
        for (path, of_all), (other, own) in zip(calls.outputs, calls_alone.outputs, strict=False):
            size = len(own) if own.ndim else 0
            if path != other or _distance(of_all[i * size : (i + 1) * size], own) > ROUNDING:
                return Mismatch(i, distance, {path: OTHER_ROWS})
    return Mismatch(i, distance, suspects)


def _distance(rows: np.ndarray, alone: np.ndarray) -> float:
    """Returns the largest difference, relative to the largest value; infinity for other shapes."""
    if rows.shape != alone.shape:
        return float("inf")
    difference, scale = np.abs(rows - alone).max(initial=0), np.abs(alone).max(initial=0)
    return float(difference / scale) if scale else float(difference)
