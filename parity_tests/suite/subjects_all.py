"""Every comparison of the suite in one list."""

from __future__ import annotations

from functools import partial

from parity_tests.suite import subjects, subjects_conv, subjects_norm
from parity_tests.suite import subjects_attention as attention
from parity_tests.suite import subjects_recurrent as recurrent
from parity_tests.suite.twins import Twins, of_subject


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
    *map(of_subject, (*subjects.SUBJECTS, *subjects_conv.SUBJECTS, *subjects_norm.SUBJECTS)),
    *(_of_attention(name, case) for name, case in attention.CASES.items()),
    *map(_of_recurrent, recurrent.CASES),
]
