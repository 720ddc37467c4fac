"""Both packages and the oracle compute the same numbers: every subject, dtype, gradient, eager and compiled."""

import shutil

import pytest

from parity_tests import standard
from parity_tests.suite.subjects.all import ALL, BY_NAME
from parity_tests.suite.subjects.comparison import DTYPES

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
# Op by op, JAX compiles every operation for each shape and dtype: one tier for each subject, exact where it can be. Of
# the norms, which share their arithmetic, the one that keeps statistics.
EXACT_OP_BY_OP = (
    "batch_ensemble_linear-E3-B4-5to7",
    "BatchEnsembleLinear",
    "BatchEnsemble-shared_batch",
    "Ensemble-shared_batch",
    "split_members",
    "BatchEnsembleEmbed-E3",
    "BatchEnsembleEmbed.attend-E3",
)
BOUNDED_OP_BY_OP = ("member_brier-3x5x4-labels2d", "BatchEnsembleBatchNorm-15x4-train")


def each_run(comparisons, dtypes, op_by_op, op_by_op_dtypes):
    """Parametrizes with all comparisons under jit, in these dtypes and in bfloat16, and with some op by op as well."""
    runs = [(c, each) for c in comparisons for each in (*dtypes, *[("bfloat16",)] * c.in_bfloat16)]
    runs = {f"{c.name}-{'+'.join(each)}-jit": (c, each) for c, each in runs}
    for name in op_by_op:
        runs[f"{name}-{'+'.join(op_by_op_dtypes)}-eager"] = BY_NAME[name].op_by_op(), op_by_op_dtypes
    return pytest.mark.parametrize(("comparison", "dtypes"), runs.values(), ids=runs)


@each_run([c for c in ALL if c.is_exact], [("float32",), ("float64",)], EXACT_OP_BY_OP, ("float32",))
def test_exact(comparison, dtypes):
    for seed in SEEDS:
        standard.assert_holds(comparison.exact(seed, *dtypes))


@each_run(ALL, [DTYPES], BOUNDED_OP_BY_OP, DTYPES)
def test_bounded(comparison, dtypes):
    standard.assert_holds(comparison.bounded([comparison.draw(seed, dtypes[0]) for seed in SEEDS], dtypes))


@pytest.mark.parametrize("comparison", [c for c in ALL if c.in_special_values], ids=lambda c: c.name)
def test_special_values(comparison):
    """Zeros of either sign, denormal numbers, infinities and NaN give the same in both."""
    standard.assert_holds(comparison.small())
    assert not comparison.extreme()


@pytest.mark.parametrize("comparison", ALL, ids=lambda c: c.name)
def test_steps_of_training(comparison):
    """Gradient descent goes the same way in both."""
    ours, theirs = comparison.trajectories()
    for name in ours:
        standard.assert_same_trajectory(theirs[name], ours[name])


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler, and there is none")
@pytest.mark.parametrize("name", COMPILED)
def test_compiled(name):
    comparison = BY_NAME[name].compiled()
    if comparison.is_exact:
        for dtype in ("float32", "bfloat16") if name == COMPILED[0] else ("float32",):
            standard.assert_holds(comparison.exact(0, dtype))
    else:
        standard.assert_holds(comparison.bounded([comparison.draw(0, "float32")]))
