"""Every comparison of the suite in one list."""

from __future__ import annotations

from functools import partial

from parity_tests.suite.subjects import attention, recurrent
from parity_tests.suite.subjects import conv as subjects_conv
from parity_tests.suite.subjects import members as subjects
from parity_tests.suite.subjects import norm as subjects_norm
from parity_tests.suite.subjects.comparison import Comparison, of_subject
from parity_tests.suite.subjects.subject import Subject

# What differs from another subject in how many members run at once, in a shape of logits, or in the axes of a kernel.
ONE_MORE = ("-chunks", "-vmap", "-loop", "-4x3x2", "member_losses-labels1d", "-transpose_kernel")


def _of_subject(subject: Subject) -> Comparison:
    return of_subject(subject, in_bfloat16=not subject.name.endswith(ONE_MORE))


def _of_attention(name: str, case: attention.Case) -> Comparison:
    return Comparison(
        f"BatchEnsembleMultiHeadAttention-{name}",
        case.draw,
        partial(attention.run_torch, case),
        partial(attention.run_flax, case),
        partial(attention.run_oracle, case),
        in_bfloat16=name in ("self-odd", "other features"),
        in_special_values=name == "self",
    )


def _of_recurrent(case: recurrent.Case) -> Comparison:
    return Comparison(
        f"BatchEnsemble{case.kind}{'Cell' * case.is_cell}-{case}",
        case.draw,
        partial(recurrent.run_torch, case),
        partial(recurrent.run_flax, case),
        partial(recurrent.run_oracle, case),
        in_bfloat16=case.sizes == recurrent.Case.sizes and case.is_cell == (case.biases == 2),  # compiling takes long
        in_special_values=case.biases == 2,
    )


ALL = [
    *map(_of_subject, (*subjects.SUBJECTS, *subjects_conv.SUBJECTS, *subjects_norm.SUBJECTS)),
    *(_of_attention(name, case) for name, case in attention.CASES.items()),
    *map(_of_recurrent, recurrent.CASES),
]
BY_NAME = {comparison.name: comparison for comparison in ALL}
