"""Any shapes and options: both packages and the oracle compute the same numbers, bit for bit, in the exact tier."""

from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import Phase, assume, given, settings
from hypothesis import strategies as st

import probly_flax as pf
import probly_torch as pt
from parity_tests import standard
from parity_tests.suite.networks.twins import FLAX, TORCH
from parity_tests.suite.oracle import members as oracle
from parity_tests.suite.subjects import conv as subjects_conv
from parity_tests.suite.subjects.comparison import of_subject
from parity_tests.suite.subjects.members import flax_linear
from parity_tests.suite.subjects.subject import Subject

# The same examples in every run, and no search for a smaller one: each is a program that JAX has to compile.
few = partial(settings, deadline=None, derandomize=True, phases=[Phase.generate])
SIZES = st.sampled_from([1, 2, 3, 5, 7])
DTYPES = st.sampled_from(["float32", "float64", "bfloat16"])


def assert_exact(subject: Subject, dtype: str) -> None:
    comparison = of_subject(subject)
    assume(comparison.is_proof(subject.draw_exact(0, dtype), dtype))
    standard.assert_holds(comparison.exact(0, dtype))


def shared_linear(g, x, r, **weights):
    """Computes with the batch once for each member, whose gradients add up."""
    y, grads = oracle.batch_ensemble_linear(g, np.concatenate([x] * len(r)), r=r, **weights)
    return y, grads | {"x": sum(np.split(grads["x"], len(r)))}


@few(max_examples=10)
@given(
    sizes=st.tuples(*[SIZES] * 4),
    middle=st.lists(SIZES, max_size=2),
    flags=st.tuples(*[st.booleans()] * 2),
    dtype=DTYPES,
)
def test_linear(sizes, middle, flags, dtype):
    (num_members, batch, in_features, out_features), (bias, shared) = sizes, flags
    shapes = {
        "x": (batch if shared else num_members * batch, *middle, in_features),
        "weight": (out_features, in_features),
        "r": (num_members, in_features),
        "s": (num_members, out_features),
    } | ({"bias": (num_members, out_features)} if bias else {})
    functions = (partial(f, shared=shared) for f in (pt.functional.batch_ensemble_linear, flax_linear))
    by_loop = shared_linear if shared else oracle.batch_ensemble_linear
    assert_exact(Subject("linear", shapes, *functions, by_loop, exact=(4, 0.125, 4)), dtype)


@st.composite
def convolutions(draw, transposed):
    """Draws arguments of `subjects_conv`.

    They are channels, sizes, taps, stride, padding, dilation, then groups or output padding.
    """
    few_sizes, axes = st.integers(1, 3), draw(st.integers(1, 2))

    def each(strategy):
        return tuple(draw(strategy) for _ in range(axes))

    taps, stride, dilation = each(few_sizes), each(st.integers(1, 2)), each(st.integers(1, 2))
    spans = [d * (k - 1) for d, k in zip(dilation, taps, strict=True)]
    padding = tuple(draw(st.integers(0, span // 2 if transposed else min(span, 2))) for span in spans)
    least = [1 if transposed else 1 + max(0, span - 2 * pad) for span, pad in zip(spans, padding, strict=True)]
    sizes = tuple(draw(st.integers(size, 5)) for size in least)
    groups = 1 if transposed else draw(st.integers(1, 2))
    channels = draw(few_sizes), draw(few_sizes), groups * draw(few_sizes), groups * draw(few_sizes)
    last = tuple(draw(st.integers(0, s - 1)) for s in stride) if transposed else groups
    return channels, sizes, taps, stride, padding, dilation, last


@few(max_examples=8)
@given(options=convolutions(transposed=False), bias=st.booleans(), dtype=DTYPES)
def test_conv(options, bias, dtype):
    assert_exact(subjects_conv._conv("any", *options, bias), dtype)


@few(max_examples=6)
@given(options=convolutions(transposed=True), transpose_kernel=st.booleans(), dtype=DTYPES)
def test_conv_transpose(options, transpose_kernel, dtype):
    assert_exact(subjects_conv._conv_transpose(transpose_kernel, "any", *options), dtype)


@few(max_examples=8)
@given(num_members=SIZES, batch=SIZES, rest=st.lists(st.integers(0, 3), max_size=3), dtype=DTYPES)
def test_tiling_and_splitting_undo_each_other(num_members, batch, rest, dtype):
    x = np.random.default_rng(0).integers(-8, 9, (batch, *rest)).astype("float32")
    ours = pt.split_members(pt.tile_members(torch.tensor(x), num_members), num_members)
    theirs = pf.split_members(pf.tile_members(x, num_members), num_members)
    for y in (ours.numpy(), np.asarray(theirs)):
        np.testing.assert_array_equal(y, np.broadcast_to(x, (num_members, *x.shape)))


@few(max_examples=3)
@given(
    num_members=st.integers(1, 5),
    seed=st.integers(0, 2**32 - 1),
    init=st.sampled_from(["normal", "random_sign"]),
    use_base_weights=st.booleans(),
    means=st.tuples(*[st.sampled_from([0.5, 1.0, -1.0])] * 2),
    dtype=st.sampled_from(["float32", "bfloat16"]),
)
def test_one_seed_gives_one_layer(num_members, seed, init, use_base_weights, means, dtype):
    options = {"init": init, "use_base_weights": use_base_weights, "r_mean": means[0], "s_mean": means[1]}
    ours, theirs = (f.linear(5, 7, dtype=dtype) for f in (TORCH, FLAX))
    pf.load_arrays(theirs, pt.to_arrays(ours))
    a = pt.to_arrays(pt.BatchEnsembleLinear(ours, rngs=seed, num_members=num_members, **options))
    b = pf.to_arrays(pf.BatchEnsembleLinear(theirs, rngs=seed, num_members=num_members, **options))
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name])


@pytest.mark.parametrize("wrong", ["x", "weight"])
def test_the_exact_tier_would_notice(wrong):
    """A last bit in one gradient is enough."""
    shapes = {"x": (6, 5), "weight": (7, 5), "r": (3, 5), "s": (3, 7)}

    def off(g, **arrays):
        y, grads = oracle.batch_ensemble_linear(g, **arrays)
        grads[wrong].flat[0] = np.nextafter(np.float32(grads[wrong].flat[0]), np.float32(np.inf))
        return y, grads

    subject = Subject("linear", shapes, pt.functional.batch_ensemble_linear, flax_linear, off, exact=(4, 0.125, 4))
    with pytest.raises(AssertionError, match=f"gradient by {wrong}"):
        assert_exact(subject, "float32")
