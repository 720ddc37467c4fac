"""Both packages and the oracle compute the same numbers: every subject, dtype, gradient, eager and compiled."""

import shutil

import pytest

from parity_tests import standard
from parity_tests.suite.subject import each_run, run_flax, run_oracle, run_torch, with_cotangent
from parity_tests.suite.subjects import EXACT_SUBJECTS, SUBJECTS
from parity_tests.suite.twins import assert_same_steps, assert_special_values, of_subject

SEEDS = range(5)
# One of each kind, and few dtypes: torch.compile takes some seconds for each.
COMPILED = (
    "batch_ensemble_linear-E3-B4-5to7",
    "batch_ensemble_linear-E3-B16-5to7",
    "BatchEnsembleLinear",
    "BatchEnsemble-shared_batch",
    "Ensemble-shared_batch",
    "Ensemble-shared_batch-vmap",
    "mixture_cross_entropy-3x5x4-labels1d",
)
# Op by op, JAX compiles every operation for each shape and dtype: one tier for each subject, exact where it can be.
EAGER = (
    "batch_ensemble_linear-E3-B4-5to7",
    "BatchEnsembleLinear",
    "BatchEnsemble-shared_batch",
    "Ensemble-shared_batch",
    "split_members",
)
EAGER_LOSS = ("member_brier-3x5x4-labels2d",)
# What differs from another subject in how many members run at once, or in a shape of logits, is no other in bfloat16.
ONE_MORE = ("-chunks", "-vmap", "-loop", "-4x3x2", "member_losses-labels1d")
IN_BFLOAT16 = [subject for subject in SUBJECTS if not subject.name.endswith(ONE_MORE)]
EXACT = each_run(EXACT_SUBJECTS, [("float32",), ("float64",)], EAGER, [("float32",)])
EXACT |= each_run([s for s in IN_BFLOAT16 if s.exact], [("bfloat16",)], (), ())
BOUNDED = each_run(SUBJECTS, [("float32", "float64")], EAGER_LOSS, [("float32", "float64")])
BOUNDED |= each_run(IN_BFLOAT16, [("bfloat16",)], (), ())


def exact_verdicts(subject, dtype, seed, torch_compiled=False, flax_compiled=False):
    arrays = subject.draw_exact(seed, dtype)
    assert subject.certificate(arrays, dtype) <= 2.0 ** standard.SIGNIFICANT_BITS[dtype], "the inputs prove nothing"
    return standard.exact(
        run_torch(subject, arrays, dtype, torch_compiled),
        run_flax(subject, arrays, dtype, flax_compiled),
        run_oracle(subject, arrays),
    )


def bounded_verdicts(subject, dtypes, torch_compiled=False, flax_compiled=False, seeds=SEEDS):
    low = dtypes[0]
    arrays = [with_cotangent(subject, subject.draw(seed, low), seed, low) for seed in seeds]
    return standard.bounded(
        {dtype: [run_torch(subject, a, dtype, torch_compiled) for a in arrays] for dtype in dtypes},
        {dtype: [run_flax(subject, a, dtype, flax_compiled) for a in arrays] for dtype in dtypes},
        [run_oracle(subject, a) for a in arrays],
        low,
    )


@pytest.mark.parametrize(("subject", "dtypes", "flax_compiled"), EXACT.values(), ids=EXACT)
def test_exact(subject, dtypes, flax_compiled):
    for seed in SEEDS:
        standard.assert_holds(exact_verdicts(subject, *dtypes, seed, flax_compiled=flax_compiled))


@pytest.mark.parametrize(("subject", "dtypes", "flax_compiled"), BOUNDED.values(), ids=BOUNDED)
def test_bounded(subject, dtypes, flax_compiled):
    standard.assert_holds(bounded_verdicts(subject, dtypes, flax_compiled=flax_compiled))


@pytest.mark.parametrize("subject", SUBJECTS, ids=lambda subject: subject.name)
def test_special_values(subject):
    assert_special_values(of_subject(subject))


@pytest.mark.parametrize("subject", SUBJECTS, ids=lambda subject: subject.name)
def test_steps_of_training(subject):
    assert_same_steps(of_subject(subject))


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler, and there is none")
@pytest.mark.parametrize("subject", [s for s in SUBJECTS if s.name in COMPILED], ids=lambda subject: subject.name)
def test_compiled(subject):
    if subject.exact:
        for dtype in ("float32", "bfloat16") if subject.name == COMPILED[0] else ("float32",):
            standard.assert_holds(exact_verdicts(subject, dtype, 0, torch_compiled=True, flax_compiled=True))
    else:
        dtypes = ("float32", "float64")
        standard.assert_holds(bounded_verdicts(subject, dtypes, torch_compiled=True, flax_compiled=True, seeds=(0,)))
