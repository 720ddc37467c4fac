"""Special values: 0, -0, infinities, NaN, denormals and large numbers, through both twins.

Of what comes out, the kinds (NaN, either infinity, finite) are the same, and finite values differ by rounding.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from parity_tests import standard

Arrays = dict[str, np.ndarray]
# Large, but with squares and products of a few that are finite: how a sum overflows depends on its order.
VALUES = {
    "float32": {"0": 0.0, "-0": -0.0, "inf": np.inf, "-inf": -np.inf, "nan": np.nan, "denormal": 1e-40, "large": 1e15},
    "float64": {"denormal": 1e-310, "large": 1e120},
}


def differences(
    arrays: Arrays, torch: Callable[[Arrays, str], Arrays], flax: Callable[[Arrays, str], Arrays]
) -> dict[tuple[str, str], list[str]]:
    """By array and value, the results that differ where one entry of the array has the value; cotangents keep theirs."""
    found = {}
    for name in arrays:
        if arrays[name].dtype.kind != "f" or name == "g" or name.startswith("g "):
            continue
        for dtype, values in VALUES.items():
            for label, value in values.items():
                special = arrays | {name: arrays[name].copy()}
                special[name].flat[special[name].size // 2] = value
                ours, theirs = torch(special, dtype), flax(special, dtype)
                broken = [result for result in ours if not _agree(ours[result], theirs[result], dtype)]
                if broken:
                    found[name, label] = broken
    return found


def _agree(a: np.ndarray, b: np.ndarray, dtype: str) -> bool:
    return standard.error(a, b, b, dtype) <= standard.MEANING_LIMIT * standard.NOISE_FLOOR
