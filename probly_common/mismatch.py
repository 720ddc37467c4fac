"""Finds where a member among others computes something else than alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

ROUNDING = 2**-12  # of the largest value: far more than float64 leaves, and what layers of lower dtypes may
OTHER_ROWS = "its rows do not follow the batch"
NOT_CALLED = "it is not called, and its weights may be read past it"


class Calls:
    """The calls of the layers that have members, in their order; with their outputs if these are kept."""

    def __init__(self, keep: bool = False) -> None:
        self.keep = keep
        self.paths: list[str] = []
        self.outputs: list[np.ndarray] = []
        self.entered: str | None = None  # the layer that is running, or was when an error was raised

    def enter(self, path: str) -> None:
        self.entered = path

    def leave(self, path: str, output: Callable[[], np.ndarray]) -> None:
        self.entered = None
        self.paths.append(path)
        if self.keep:
            self.outputs.append(output())


class Mismatch(NamedTuple):
    """A member whose outputs differ, how far relative to their largest value, and the layers that may be why."""

    member: int
    distance: float
    suspects: dict[str, str]


Run = Callable[[int | None, Calls], list[np.ndarray]]  # the outputs of a member alone, or of all for None


def first_mismatch(
    run: Run, num_members: int, layers: Sequence[str], refusals: tuple[type[Exception], ...]
) -> Mismatch | None:
    """Compares the outputs that each member has among others with those that it has alone; None if all agree.

    Outputs of layers are kept only once there is something to find. A layer that raises one of these errors among
    others, and not alone, is the one that is to blame; outside of all layers, those that a member does not call are.
    """
    calls_alone, calls = Calls(), Calls()
    alone = [run(i, calls_alone) for i in range(num_members)]
    not_called = {path: NOT_CALLED for path in layers if path not in calls_alone.paths}
    try:
        together = run(None, calls)
    except refusals:
        suspects = not_called if calls.entered is None else {calls.entered: OTHER_ROWS}
        if not suspects:
            raise
        return Mismatch(0, float("inf"), suspects)
    for i, own in enumerate(alone):
        distance = max((_distance(rows[i], y) for rows, y in zip(together, own, strict=True)), default=0.0)
        if distance > ROUNDING:
            return Mismatch(i, distance, not_called or _first_layer(run, i))
    return None


def _first_layer(run: Run, i: int) -> dict[str, str]:
    """Returns the first layer whose rows are not those of member i alone, if there is one."""
    of_all, of_one = Calls(keep=True), Calls(keep=True)
    run(None, of_all)
    run(i, of_one)
    for path, rows, other, own in zip(of_all.paths, of_all.outputs, of_one.paths, of_one.outputs, strict=False):
        size = len(own) if own.ndim else 0
        if path != other or _distance(rows[i * size : (i + 1) * size], own) > ROUNDING:
            return {path: OTHER_ROWS}
    return {}


def _distance(rows: np.ndarray, alone: np.ndarray) -> float:
    """Returns the largest difference, relative to the largest value; infinity for other shapes."""
    if rows.shape != alone.shape:
        return float("inf")
    difference, scale = np.abs(rows - alone).max(initial=0), np.abs(alone).max(initial=0)
    return float(difference / scale) if scale else float(difference)
