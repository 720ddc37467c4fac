"""What "numerically identical" means: the one standard of equality, with no tolerance anywhere else.

Errors are measured per tensor, in units of the dtype's rounding against the tensor's own scale:
e(a, b) = max|a - b| / (u * S), with S = max|reference| and u the unit roundoff. Never element by element,
which explodes at cancellation.

- Exact: on dyadic inputs whose every partial sum is representable (the certificate), values are equal.
- Bounded, meaning: float64 results agree to 16 times the rounding noise that float32 shows, in float64 units.
  Rounding shrinks by 2**29 from float32 to float64; a wrong formula does not.
- Bounded, precision: neither framework is more than 8 times less accurate than the other.
- Trajectory: after the same training steps in float64, weights agree to 1e-12 of their scale.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

UNIT_ROUNDOFF = {"float32": 2.0**-24, "float64": 2.0**-53, "bfloat16": 2.0**-8}
SIGNIFICANT_BITS = {"float32": 24, "float64": 53, "bfloat16": 8}
NOISE_FLOOR = 4.0
MEANING_LIMIT = 16.0
PRECISION_LIMIT = 8.0
TRAJECTORY_LIMIT = 1e-12

Arrays = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Verdict:
    """One tensor under one rule: what was measured, and what the rule allows."""

    tensor: str
    rule: str
    measured: float
    limit: float

    @property
    def holds(self) -> bool:
        """Whether the rule holds; what is infinite or NaN never does, whatever the noise that the limit allows."""
        return bool(np.isfinite(self.measured)) and self.measured <= self.limit

    def __str__(self) -> str:
        """One line of a report."""
        return f"{self.tensor}: {self.rule} is {self.measured:.3g}, above its limit {self.limit:.3g}"


def error(a: np.ndarray, b: np.ndarray, reference: np.ndarray, dtype: str) -> float:
    """max|a - b| in units of rounding at the reference's scale; infinite where one of them is not finite."""
    a, b, reference = (np.asarray(v, np.float64) for v in (a, b, reference))
    if a.shape != b.shape:
        return float("inf")
    if np.array_equal(a, b, equal_nan=True):
        return 0.0
    scale = UNIT_ROUNDOFF[dtype] * np.abs(reference).max(initial=0.0)
    difference = np.abs(a - b).max(initial=0.0)
    return float(difference / scale) if np.isfinite(difference) and scale > 0 else float("inf")


def ulps(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The number of representable values between two arrays, for random draws and nothing else."""
    integer = np.dtype({4: np.int32, 8: np.int64}[a.dtype.itemsize])
    lowest = -(2 ** (8 * integer.itemsize - 1))
    steps = [np.where((i := v.view(integer).astype(np.int64)) < 0, lowest - i, i) for v in (a, b)]
    return np.abs(steps[0] - steps[1])


def exact(torch_run: Arrays, flax_run: Arrays, oracle_run: Arrays) -> list[Verdict]:
    """Values are equal, in both frameworks and the oracle; -0 equals 0."""
    return [
        Verdict(name, rule, float(not np.array_equal(a, b)), 0.0)
        for name, reference in oracle_run.items()
        for rule, a, b in (
            ("inequality of torch and the oracle", torch_run[name], reference),
            ("inequality of flax and the oracle", flax_run[name], reference),
        )
    ]


def bounded(
    torch_runs: Mapping[str, list[Arrays]],
    flax_runs: Mapping[str, list[Arrays]],
    oracle_runs: list[Arrays],
    low: str = "float32",
) -> list[Verdict]:
    """Meaning in float64 and precision in a lower dtype, over several seeds; runs are lists by seed, by dtype."""

    def worst(runs: list[Arrays], others: list[Arrays], name: str, dtype: str) -> float:
        pairs = zip(runs, others, oracle_runs, strict=True)
        return max(error(run[name], other[name], reference[name], dtype) for run, other, reference in pairs)

    verdicts = []
    for name in oracle_runs[0]:
        noise_torch = worst(torch_runs[low], oracle_runs, name, low)
        noise_flax = worst(flax_runs[low], oracle_runs, name, low)
        verdicts += [
            Verdict(name, f"{low} error of torch", noise_torch, PRECISION_LIMIT * max(NOISE_FLOOR, noise_flax)),
            Verdict(name, f"{low} error of flax", noise_flax, PRECISION_LIMIT * max(NOISE_FLOOR, noise_torch)),
        ]
        if "float64" in torch_runs:
            noise = max(NOISE_FLOOR, worst(torch_runs[low], torch_runs["float64"], name, low))
            noise = max(noise, worst(flax_runs[low], flax_runs["float64"], name, low))
            for rule, a, b in (
                ("float64 distance of torch and flax", torch_runs["float64"], flax_runs["float64"]),
                ("float64 distance of torch and the oracle", torch_runs["float64"], oracle_runs),
                ("float64 distance of flax and the oracle", flax_runs["float64"], oracle_runs),
            ):
                verdicts.append(Verdict(name, rule, worst(a, b, name, "float64"), MEANING_LIMIT * noise))
    return verdicts


def assert_close(a: np.ndarray, b: np.ndarray, dtype: str) -> None:
    """Two ways to compute one thing in one framework agree up to rounding: the limit of meaning, without noise."""
    assert_holds([Verdict("values", "distance", error(a, b, b, dtype), MEANING_LIMIT * NOISE_FLOOR)])


def assert_same_trajectory(a: np.ndarray, b: np.ndarray) -> None:
    """Weights after the same training steps in float64."""
    assert_holds([Verdict("weights", "distance", float(np.abs(a - b).max() / np.abs(b).max()), TRAJECTORY_LIMIT)])


def assert_holds(verdicts: list[Verdict]) -> None:
    """Fails with a line for each rule that is broken."""
    assert verdicts, "nothing was compared"
    broken = [str(verdict) for verdict in verdicts if not verdict.holds]
    assert not broken, "\n".join(broken)
