"""The pytest plugin: which tests the marker makes of one, what the fixture is called with, and what start-up costs."""

from pathlib import Path

import jax
import pytest

import parity_tests

pytest_plugins = ["pytester"]


@pytest.fixture
def run(pytester, monkeypatch):
    """Runs a file of tests that print what `assert_parity` is called with."""
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[3]))

    def of(source, *options, subprocess=False):
        pytester.makepyfile(source)
        runner = pytester.runpytest_subprocess if subprocess else pytester.runpytest_inprocess
        return runner("-p", "parity_tests.plugin", "--strict-markers", *options)

    return of


@pytest.fixture
def calls(monkeypatch):
    """Replaces `assert_parity`, and returns what it is called with."""
    calls = []
    monkeypatch.setattr(parity_tests, "assert_parity", lambda *args, **options: calls.append((args, options)))
    return calls


def test_marker_runs_each_dtype_under_jit_and_op_by_op(run, calls):
    source = """
        import pytest

        @pytest.mark.parity
        def test_net(assert_parity):
            assert_parity("torch", "flax", (8, 3), mode="train")
    """
    run(source, "-v").assert_outcomes(passed=4)
    assert calls == [
        (("torch", "flax", (8, 3)), {"dtype": dtype, "jit": jit, "mode": "train"})
        for dtype in ("float32", "float64")
        for jit in (True, False)
    ]


def test_marker_takes_dtypes_and_jit_and_arguments_of_the_call_win(run, calls):
    source = """
        import pytest

        @pytest.mark.parity(dtypes=("bfloat16",), jit=(False,))
        def test_bfloat16(assert_parity):
            assert_parity()

        @pytest.mark.parity(jit=[True])
        def test_own_dtype(assert_parity):
            assert_parity(dtype="float16")
    """
    result = run(source, "-v")
    result.stdout.fnmatch_lines(["*::test_bfloat16?bfloat16-eager? PASSED*", "*::test_own_dtype?float64-jit? PASSED*"])
    assert [options for _, options in calls] == [
        {"dtype": "bfloat16", "jit": False},
        {"dtype": "float16", "jit": True},
        {"dtype": "float16", "jit": True},
    ]


def test_fixture_without_the_marker_adds_no_argument(run, calls):
    run("def test_net(assert_parity): assert_parity(1, 2, seeds=3)").assert_outcomes(passed=1)
    assert calls == [((1, 2), {"seeds": 3})]


def test_mark_of_a_module_leaves_tests_without_the_fixture(run, calls):
    source = """
        import pytest

        pytestmark = pytest.mark.parity(jit=(True,))

        def test_net(assert_parity):
            assert_parity()

        def test_other():
            pass
    """
    run(source).assert_outcomes(passed=3)
    assert len(calls) == 2


@pytest.mark.parametrize(
    ("mark", "arguments", "sentence"),
    [
        ("parity", "", "*parity expects a test that calls its fixture; got test_net*def test_net(assert_parity): ..."),
        (
            "parity(dtypes='float32')",
            "assert_parity",
            "*dtypes is to be a tuple*got 'float32'. Pass dtypes=('float64',)*",
        ),
        ("parity(jit=True)", "assert_parity", "*jit is to be a tuple*got True. Pass jit=(True,)."),
        ("parity(dtype='float32')", "assert_parity", "*unexpected keyword argument 'dtype'*"),
    ],
)
def test_wrong_marks_are_refused(run, mark, arguments, sentence):
    result = run(f"import pytest\n\n@pytest.mark.{mark}\ndef test_net({arguments}):\n    pass")
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines([sentence])


def test_start_up_imports_no_framework(run):
    source = """
        import sys

        def test_nothing_is_imported():
            assert not {"torch", "jax", "flax", "numpy", "rich", "matplotlib"} & set(sys.modules)

        def test_with_fixture(assert_parity):
            pass
    """
    run(source, "-k", "nothing", subprocess=True).assert_outcomes(passed=1, deselected=1)


def test_failure_shows_the_report_and_not_the_kit(run):
    source = """
        import numpy as np
        import pytest
        from flax import nnx
        from torch import nn

        @pytest.mark.parity(dtypes=("float32",), jit=(True,))
        @pytest.mark.parametrize("epsilon", [1e-5, 1e-3])
        def test_norm(assert_parity, epsilon):
            twin = nnx.LayerNorm(5, epsilon=epsilon, use_fast_variance=False, rngs=nnx.Rngs(0))
            assert_parity(nn.LayerNorm(5), twin, (3, 5), gradients=False, seeds=1)
    """
    with jax.enable_x64(False), jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        result = run(source)
    result.assert_outcomes(passed=1, failed=1)
    result.stdout.fnmatch_lines(
        ["*First divergence:*epsilon is 0.001, torch eps is 1e-05*", "*No parity: *tensors differ."]
    )
    result.stdout.fnmatch_lines([">*assert_parity(nn.LayerNorm(5), twin,*"])
    result.stdout.no_fnmatch_line("*compare.py*")
