"""A comparison of the suite, whatever its kind: what the tiers, special values, calibration and coverage go through."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from parity_tests import standard
from parity_tests.suite.subjects.subject import Arrays, Subject, run_flax, run_oracle, run_torch, with_cotangent

DTYPES = "float32", "float64"
INPUTS = ("x", "y", "logits", "query", "key", "value", "h_0", "c_0")  # all other arrays are weights or cotangents
G = ("g", "g ")  # how the names of cotangents start
SMALL = (0.0, -0.0, 1e-40)  # the last is a denormal number of float32
EXTREME = (
    np.nan,
    np.inf,
    -np.inf,
    1e15,
)  # the last has a square that is finite: how sums overflow depends on their order

STEPS, RATE = 3, 0.01


@dataclass(frozen=True)
class Comparison:
    """A public function or layer in torch, Flax and the oracle.

    Attributes:
        name: the name in reports; up to the first dash or dot, the public name.
        draw: random arrays and cotangents by seed and dtype.
        torch: outputs and gradients of these arrays in a dtype.
        flax: the same under jax.jit.
        oracle: the same in float64.
        subject: what is compared, if it is a `Subject`. Those of linear operations have an exact tier.
        in_bfloat16: whether it is compared in bfloat16 too. One of those that differ in nothing but shapes is enough.
        in_special_values: whether it is compared at NaN, infinities, zeros and denormal numbers too.
    """

    name: str
    draw: Callable[[int, str], Arrays]
    torch: Callable[..., Arrays]
    flax: Callable[..., Arrays]
    oracle: Callable[[Arrays], Arrays]
    subject: Subject | None = None
    in_bfloat16: bool = True
    in_special_values: bool = True

    @property
    def public_name(self) -> str:
        """The function or layer that is compared."""
        return self.name.partition("-")[0].partition(".")[0]

    @property
    def is_exact(self) -> bool:
        """Whether it has an exact tier."""
        return self.subject is not None and self.subject.exact is not None

    def is_proof(self, arrays: Arrays, dtype: str) -> bool:
        """Tells whether no partial sum can leave the numbers that the dtype has exactly."""
        assert self.subject is not None
        return self.subject.certificate(arrays, dtype) <= 2.0 ** standard.SIGNIFICANT_BITS[dtype]

    def fresh(self) -> Comparison:
        """Returns the same comparison, for which nothing is compiled yet."""
        return self if self.subject is None else of_subject(replace(self.subject))

    def op_by_op(self) -> Comparison:
        """Returns the same comparison without jit in Flax."""
        return replace(self, flax=partial(self.flax, compiled=False))

    def compiled(self) -> Comparison:
        """Returns the same comparison under torch.compile."""
        return replace(self, torch=partial(self.torch, compiled=True))

    def exact(self, seed: int, dtype: str) -> list[standard.Verdict]:
        """Returns verdicts of the exact tier."""
        assert self.subject is not None
        arrays = self.subject.draw_exact(seed, dtype)
        assert self.is_proof(arrays, dtype), "the inputs prove nothing"
        return standard.exact(self.torch(arrays, dtype), self.flax(arrays, dtype), self.oracle(arrays))

    def bounded(self, drawn: Sequence[Arrays], dtypes: Sequence[str] = DTYPES) -> list[standard.Verdict]:
        """Returns verdicts of the bounded tier over some draws together. The first dtype's errors are judged."""
        return standard.bounded(
            {dtype: [self.torch(arrays, dtype) for arrays in drawn] for dtype in dtypes},
            {dtype: [self.flax(arrays, dtype) for arrays in drawn] for dtype in dtypes},
            [self.oracle(arrays) for arrays in drawn],
            dtypes[0],
        )

    def trajectories(self) -> tuple[Arrays, Arrays]:
        """Returns where gradient descent on everything that has a gradient ends in torch and in Flax.

        Each goes by its own gradients.
        """
        start = self.draw(0, "float64")
        ends = []
        for run in (self.torch, self.flax):
            arrays = dict(start)
            for _ in range(STEPS):
                results = run(arrays, "float64")
                leaves = [name for name in arrays if f"gradient by {name}" in results]
                arrays |= {name: arrays[name] - RATE * results[f"gradient by {name}"] for name in leaves}
            ends.append({name: arrays[name] for name in leaves})
        assert any(np.any(ends[0][name] != start[name]) for name in ends[0])
        return ends[0], ends[1]

    def small(self) -> list[standard.Verdict]:
        """Returns verdicts of the bounded tier where inputs hold zeros of either sign and a denormal number."""
        drawn = self.draw(0, DTYPES[0])
        return self.bounded([drawn | {name: _with(drawn[name], *SMALL) for name in _inputs(drawn)}])

    def extreme(self) -> dict[str, list[str]]:
        """Returns the outputs that differ, by what they differ at.

        These are NaN, infinities and a large number in inputs, NaN in r, s.

        Left out are infinities in weights, where the order of scaling and adding decides whether two of them meet, and
        NaN in a kernel, whose product with the zeros of padding one may compute and the other leave out.
        """
        drawn, found = self.draw(0, DTYPES[0]), {}
        inputs, floats = _inputs(drawn), [name for name, array in drawn.items() if array.dtype.kind == "f"]
        weights = [name for name in floats if name not in INPUTS and name[:2] not in G and "weight" not in name]
        cases = [(name, value) for name in inputs for value in EXTREME] + [(name, np.nan) for name in weights]
        for name, value in cases:
            arrays = drawn | {name: _with(drawn[name], value)}
            ours, theirs = self.torch(arrays, DTYPES[0]), self.flax(arrays, DTYPES[0])
            outputs = [result for result in ours if not result.startswith("gradient")]
            if differ := [result for result in outputs if not _agree(ours[result], theirs[result])]:
                found[f"{name}: {value}"] = differ
        return found


def of_subject(subject: Subject, **options: bool) -> Comparison:
    """Makes the comparison that a subject describes."""

    def draw(seed: int, dtype: str) -> Arrays:
        return with_cotangent(subject, subject.draw(seed, dtype), seed, dtype)

    return Comparison(
        subject.name,
        draw,
        partial(run_torch, subject),
        partial(run_flax, subject, compiled=True),
        partial(run_oracle, subject),
        subject,
        **options,
    )


def _inputs(arrays: Arrays) -> list[str]:
    return [name for name in INPUTS if name in arrays and arrays[name].dtype.kind == "f"]


def _with(array: np.ndarray, *values: float) -> np.ndarray:
    """Puts these values in the last entries of the array."""
    array = array.copy()
    array.flat[array.size - min(len(values), array.size) :] = values[: array.size]
    return array


def _agree(a: np.ndarray, b: np.ndarray) -> bool:
    """Tells whether NaN and either infinity are in the same places, and the rest agrees to rounding."""
    return standard.error(a, b, b, DTYPES[0]) <= standard.MEANING_LIMIT * standard.NOISE_FLOOR
