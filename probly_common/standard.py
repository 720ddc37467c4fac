"""The meaning of "numerically identical": the one standard of equality, with no tolerance anywhere else.

Errors are measured per tensor, in units of the dtype's rounding against the tensor's own scale:
e(a, b) = max|a - b| / (u * S), with S = max|reference| and u the unit roundoff. Never element by element,
which explodes at cancellation.

- Exact: on dyadic inputs whose every partial sum is representable (the certificate), values are equal.
- Bounded, meaning: float64 results agree to 16 times the rounding noise that float32 shows, in float64 units.
  Rounding shrinks by 2**29 from float32 to float64; a wrong formula does not.
- Bounded, precision: neither framework is more than 8 times less accurate than the other.
  Over several draws the scale is the largest of theirs: a gradient that cancels in one of them has lost digits there.
- Trajectory: after the same training steps in float64, weights agree to 1e-12 of their scale.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import reduce
from typing import NamedTuple

import numpy as np

UNIT_ROUNDOFF = {"float32": 2.0**-24, "float64": 2.0**-53, "bfloat16": 2.0**-8, "float16": 2.0**-11}
SIGNIFICANT_BITS = {"float32": 24, "float64": 53, "bfloat16": 8, "float16": 11}
NOISE_FLOOR = 4.0
MEANING_LIMIT = 16.0
PRECISION_LIMIT = 8.0
TRAJECTORY_LIMIT = 1e-12

Arrays = Mapping[str, np.ndarray]


def meaning_limit(*noise: float) -> float:
    """Returns how far apart results in float64 may be, where those in float32 show this noise."""
    return MEANING_LIMIT * max((NOISE_FLOOR, *noise))


def precision_limit(noise: float) -> float:
    """Returns the error that results in a lower dtype may have, where the other framework's have this one."""
    return PRECISION_LIMIT * max(NOISE_FLOOR, noise)


@dataclass(frozen=True)
class Verdict:
    """One tensor under one rule: what was measured, and what the rule allows."""

    tensor: str
    rule: str
    measured: float
    limit: float

    @property
    def holds(self) -> bool:
        """Tells whether the rule holds.

        What is infinite or NaN never does, whatever the noise that the limit allows.
        """
        return bool(np.isfinite(self.measured)) and self.measured <= self.limit

    @property
    def ratio(self) -> float:
        """Measured over allowed: at most 1 where the rule holds; infinite where nothing is allowed."""
        if self.holds:
            return self.measured / self.limit if self.limit > 0 else 0.0
        return self.measured / self.limit if np.isfinite(self.measured) and self.limit > 0 else float("inf")

    def __str__(self) -> str:
        """Returns one line of a report."""
        return f"{self.tensor}: {self.rule} is {self.measured:.3g}, above its limit {self.limit:.3g}"


def error(a: np.ndarray, b: np.ndarray, reference: np.ndarray, dtype: str) -> float:
    """Returns max|a - b| in units of rounding at the reference's scale.

    It is infinite where only one is NaN or infinite.
    """
    a, b, reference = (np.asarray(v, np.float64) for v in (a, b, reference))
    if a.shape != b.shape:
        return float("inf")
    same = (a == b) | np.isnan(a) & np.isnan(b)
    if same.all():
        return 0.0
    with np.errstate(invalid="ignore"):
        difference = np.abs(np.where(same, 0, a - b)).max(initial=0.0)
    scale = UNIT_ROUNDOFF[dtype] * np.abs(reference).max(initial=0.0, where=np.isfinite(reference))
    return float(difference / scale) if np.isfinite(difference) and scale > 0 else float("inf")


def farthest(a: np.ndarray, b: np.ndarray) -> tuple[int, ...]:
    """Finds where two arrays of one shape differ most: first where only one of them has NaN, or infinity."""
    with np.errstate(invalid="ignore"):
        difference = np.where((a == b) | np.isnan(a) & np.isnan(b), 0, np.abs(a * 1.0 - b))
    return tuple(int(i) for i in np.unravel_index(np.nan_to_num(difference, nan=np.inf).argmax(), a.shape))


def ulps(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Counts the representable values between two arrays: to describe a difference, and for random draws."""
    integer = np.dtype({2: np.int16, 4: np.int32, 8: np.int64}[a.dtype.itemsize])
    lowest = -(2 ** (8 * integer.itemsize - 1))
    steps = [np.where((i := v.view(integer).astype(np.int64)) < 0, lowest - i, i) for v in (a, b)]
    return np.abs(steps[0] - steps[1])


def exact(torch_run: Arrays, flax_run: Arrays, oracle_run: Arrays) -> list[Verdict]:
    """Judges that values are equal, in both frameworks and the oracle. -0 equals 0."""
    return [
        Verdict(name, rule, float(not np.array_equal(a, b)), 0.0)
        for name, reference in oracle_run.items()
        for rule, a, b in (
            ("inequality of torch and the oracle", torch_run[name], reference),
            ("inequality of flax and the oracle", flax_run[name], reference),
        )
    ]


class Errors(NamedTuple):
    """The distances of one tensor that the bounded rules are about, each in rounding of its own dtype."""

    low_torch: float  # in the lower dtype, from the oracle
    low_flax: float
    noise_torch: float = 0.0  # in the lower dtype, from the framework's own float64
    noise_flax: float = 0.0
    distance: float | None = None  # in float64, of torch and Flax
    torch: float = 0.0  # in float64, from the oracle
    flax: float = 0.0
    scale: float = 0.0  # max|reference|, which these are measured by

    @classmethod
    def of(cls, torch_runs: Arrays, flax_runs: Arrays, reference: np.ndarray, low: str) -> Errors:
        """Makes the errors from a tensor's values by dtype."""
        a, b = torch_runs[low], flax_runs[low]
        lows = error(a, reference, reference, low), error(b, reference, reference, low)
        scale = float(np.abs(reference).max(initial=0.0, where=np.isfinite(reference)))
        if "float64" not in torch_runs:
            return cls(*lows, scale=scale)
        a64, b64 = torch_runs["float64"], flax_runs["float64"]
        return cls(
            *lows,
            error(a, a64, reference, low),
            error(b, b64, reference, low),
            error(a64, b64, reference, "float64"),
            error(a64, reference, reference, "float64"),
            error(b64, reference, reference, "float64"),
            scale,
        )

    def at_scale(self, scale: float) -> Errors:
        """Returns the same distances, measured by a larger scale."""
        share = self.scale / scale if self.scale > 0 else 1.0
        scaled = (None if each is None else each * share for each in self[:-1])
        return Errors._make((*scaled, scale))

    def worse(self, other: Errors) -> Errors:
        """Returns the larger of each, at the larger scale: a draw whose values cancel says little by itself."""
        scale = max(self.scale, other.scale)
        pairs = zip(self.at_scale(scale), other.at_scale(scale), strict=True)
        return Errors(*(a if a is None or b is None else max(a, b) for a, b in pairs))  # type: ignore[arg-type]

    def verdicts(self, tensor: str, low: str) -> list[Verdict]:
        """Judges precision in the lower dtype, then meaning in float64."""
        verdicts = [
            Verdict(tensor, f"{low} error of torch", self.low_torch, precision_limit(self.low_flax)),
            Verdict(tensor, f"{low} error of flax", self.low_flax, precision_limit(self.low_torch)),
        ]
        if self.distance is not None:
            limit = meaning_limit(self.noise_torch, self.noise_flax)
            verdicts += [
                Verdict(tensor, "float64 distance of torch and flax", self.distance, limit),
                Verdict(tensor, "float64 distance of torch and the oracle", self.torch, limit),
                Verdict(tensor, "float64 distance of flax and the oracle", self.flax, limit),
            ]
        return verdicts


def bounded(
    torch_runs: Mapping[str, list[Arrays]],
    flax_runs: Mapping[str, list[Arrays]],
    oracle_runs: list[Arrays],
    low: str = "float32",
) -> list[Verdict]:
    """Judges meaning in float64 and precision in a lower dtype, over several seeds.

    Runs are lists by seed, by dtype.
    """

    def errors(name: str, seed: int) -> Errors:
        a, b = ({dtype: each[seed][name] for dtype, each in runs.items()} for runs in (torch_runs, flax_runs))
        return Errors.of(a, b, oracle_runs[seed][name], low)

    seeds = range(len(oracle_runs))
    worst = {name: reduce(Errors.worse, (errors(name, seed) for seed in seeds)) for name in oracle_runs[0]}
    return [verdict for name, each in worst.items() for verdict in each.verdicts(name, low)]


def assert_close(a: np.ndarray, b: np.ndarray, dtype: str) -> None:
    """Asserts that two ways to compute one thing in one framework agree up to rounding.

    The limit is that of meaning, without noise.
    """
    assert_holds([Verdict("values", "distance", error(a, b, b, dtype), meaning_limit())])


def assert_same_trajectory(a: np.ndarray, b: np.ndarray) -> None:
    """Asserts that weights agree after the same training steps in float64."""
    assert_holds([Verdict("weights", "distance", float(np.abs(a - b).max() / np.abs(b).max()), TRAJECTORY_LIMIT)])


def assert_holds(verdicts: list[Verdict]) -> None:
    """Fails with a line for each rule that is broken."""
    assert verdicts, "nothing was compared"
    broken = [str(verdict) for verdict in verdicts if not verdict.holds]
    assert not broken, "\n".join(broken)
