"""Every comparison of the suite in one list, whatever its kind: what calibration and coverage go through."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import parity_tests.test_layers_attention as attention
import parity_tests.test_layers_recurrent as recurrent
from parity_tests import standard, subjects, subjects_conv, subjects_norm
from parity_tests.subject import Arrays, Subject, run_flax, run_oracle, run_torch, with_cotangent

DTYPES = ("float32", "float64")


@dataclass(frozen=True)
class Twins:
    """A public function or layer in torch, Flax and the oracle.

    Attributes:
        name: the name in reports; up to the first dash or dot, the public name.
        draw: random arrays and cotangents by seed and dtype.
        torch: outputs and gradients of these arrays in a dtype.
        flax: the same under jax.jit.
        oracle: the same in float64.
    """

    name: str
    draw: Callable[[int, str], Arrays]
    torch: Callable[[Arrays, str], Arrays]
    flax: Callable[[Arrays, str], Arrays]
    oracle: Callable[[Arrays], Arrays]

    @property
    def public_name(self) -> str:
        """The function or layer that is compared."""
        return self.name.partition("-")[0].partition(".")[0]

    def bounded(self, seeds: Iterable[int]) -> list[standard.Verdict]:
        """Verdicts of the bounded tier over some seeds together."""
        drawn = [self.draw(seed, DTYPES[0]) for seed in seeds]
        return standard.bounded(
            {dtype: [self.torch(arrays, dtype) for arrays in drawn] for dtype in DTYPES},
            {dtype: [self.flax(arrays, dtype) for arrays in drawn] for dtype in DTYPES},
            [self.oracle(arrays) for arrays in drawn],
        )


def _of_subject(subject: Subject) -> Twins:
    def draw(seed: int, dtype: str) -> Arrays:
        return with_cotangent(subject, subject.draw(seed, dtype), seed, dtype)

    return Twins(
        subject.name,
        draw,
        partial(run_torch, subject),
        partial(run_flax, subject, compiled=True),
        partial(run_oracle, subject),
    )


def _of_attention(name: str, case: attention.Case) -> Twins:
    return Twins(
        f"BatchEnsembleMultiHeadAttention-{name}",
        case.draw,
        partial(attention.run_torch, case),
        partial(attention.run_flax, case),
        partial(attention.run_oracle, case),
    )


def _of_recurrent(case: recurrent.Case) -> Twins:
    return Twins(
        f"BatchEnsemble{case.kind}{'Cell' * case.is_cell}-{case}",
        case.draw,
        partial(recurrent.run_torch, case),
        partial(recurrent.run_flax, case),
        partial(recurrent.run_oracle, case),
    )


ALL = [
    *map(_of_subject, (*subjects.SUBJECTS, *subjects_conv.SUBJECTS, *subjects_norm.SUBJECTS)),
    *(_of_attention(name, case) for name, case in attention.CASES.items()),
    *map(_of_recurrent, recurrent.CASES),
]
