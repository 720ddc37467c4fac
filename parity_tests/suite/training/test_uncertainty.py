"""Uncertainty at the edges: no finite logits give NaN, nothing cancels, and the identities hold."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import probly_flax as pf
import probly_torch as pt
from parity_tests.kit.trees import jax_of
from parity_tests.standard import assert_close
from parity_tests.suite.oracle import members as oracle

FUNCTIONS = (
    "log_mean_probs",
    "mean_probs",
    "predictive_entropy",
    "expected_entropy",
    "mutual_information",
    "pairwise_kl",
)
# Against float64 on the same inputs: what is left of the differences between members that nearly agree.
EPISTEMIC_LIMIT = 1e-3
HUGE = float(np.finfo("float32").max)
EDGES = [
    np.zeros((3, 2, 4)),
    np.full((3, 2, 4), HUGE),
    np.full((3, 2, 4), -HUGE),
    np.stack([np.eye(4)[:2] * HUGE, -np.eye(4)[:2] * HUGE, np.eye(4)[:2] * HUGE]),
    np.tile([[[HUGE, -HUGE, -HUGE, -HUGE]], [[-HUGE, HUGE, -HUGE, -HUGE]], [[HUGE, -HUGE, -HUGE, -HUGE]]], (1, 2, 1)),
    np.tile([1e-45, -1e-45, 0.0, 0.0], (3, 2, 1)),
    np.tile([[[200.0, 0.0, 0.0, 0.0]], [[200.0, 1e-3, 0.0, 0.0]], [[200.0, 0.0, 0.0, 0.0]]], (1, 2, 1)),
    np.ones((1, 1, 1)),
    np.zeros((2, 0, 3)),
]


@partial(jax.jit, static_argnames=("name", "unit"))  # op by op, JAX compiles each op for each shape
def flax(name, *arrays, **options):
    return getattr(pf.uncertainty, name)(*arrays, **options)


def both(name, logits, dtype="float32"):
    ours = getattr(pt.uncertainty, name)(torch.tensor(logits, dtype=getattr(torch, dtype)))
    return ours, np.asarray(flax(name, jax_of(logits, dtype)))


@jax.jit  # one program for each shape
def _values_and_gradients(logits):
    results = {}
    for name in FUNCTIONS:
        z, backward = jax.vjp(getattr(pf.uncertainty, name), logits)
        results[name] = z, *backward(jnp.ones_like(z))
    return results


EXTREMES = [  # one member of one class, and no inputs, in one dtype: JAX compiles each shape
    pytest.param(dtype, logits, id=f"{dtype}-{number}")
    for dtype in ("float32", "float64", "bfloat16")
    for number, logits in enumerate(EDGES)
    if logits.shape == (3, 2, 4) or dtype == "float32"
]


@pytest.mark.parametrize(("dtype", "logits"), EXTREMES)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_extreme_logits_give_finite_values_and_gradients(name, logits, dtype):
    logits = np.clip(logits, float(jnp.finfo(dtype).min), float(jnp.finfo(dtype).max))
    tensor = torch.tensor(logits, dtype=getattr(torch, dtype), requires_grad=True)
    y = getattr(pt.uncertainty, name)(tensor)
    y.sum().backward()
    z, grad = _values_and_gradients(jax_of(logits, dtype))[name]
    for values in (y.detach().double(), tensor.grad.double(), z, grad):
        assert np.isfinite(np.asarray(values, "float64")).all()
    if name not in ("log_mean_probs", "mean_probs"):
        assert (y >= 0).all()
        assert (np.asarray(z) >= 0).all()


@settings(max_examples=40, deadline=None)
@given(hnp.arrays("float32", (3, 5, 4), elements=st.floats(-HUGE, HUGE, width=32)))
def test_any_finite_logits_give_finite_non_negative_uncertainty(logits):
    for name in FUNCTIONS[1:]:
        for values in both(name, logits):
            assert np.isfinite(np.asarray(values)).all()
            assert (np.asarray(values) >= 0).all()


@pytest.mark.parametrize("num_members", [1, 3, 7, 47, 49])
def test_no_probability_is_above_one(num_members):
    for values in both("mean_probs", np.tile([50.0, -50.0], (num_members, 5, 1))):
        assert (np.asarray(values) <= 1).all()


@pytest.mark.parametrize("scale", [1e-6, 1e-3, 1.0, 30.0])
def test_total_is_aleatoric_plus_epistemic(scale):
    logits = scale * np.random.default_rng(0).standard_normal((5, 7, 4))
    for index in (0, 1):
        total, aleatoric, epistemic = (
            np.asarray(both(name, logits, "float64")[index])
            for name in ("predictive_entropy", "expected_entropy", "mutual_information")
        )
        assert_close(aleatoric + epistemic, total, "float64")


def test_equal_members_have_no_epistemic_uncertainty():
    logits = np.repeat(np.random.default_rng(0).standard_normal((1, 6, 3)), 4, 0)
    for values in (*both("mutual_information", logits), *both("disagreement", logits)):
        assert_close(1 + np.asarray(values), np.ones(6), "float32")


def test_disagreement_counts_pairs():
    logits = np.random.default_rng(0).standard_normal((5, 40, 3))
    for dtype in ("float32", "float64"):
        for values in both("disagreement", logits, dtype):
            assert_close(np.asarray(values), oracle.disagreement(logits), dtype)
    for values in both("disagreement", logits[:1]):
        assert (np.asarray(values) == 0).all()


def test_units():
    logits = np.random.default_rng(0).standard_normal((3, 5, 4))
    for name in ("predictive_entropy", "expected_entropy", "mutual_information", "pairwise_kl"):
        for function in (
            lambda unit, name=name: getattr(pt.uncertainty, name)(torch.tensor(logits), unit=unit),
            lambda unit, name=name: flax(name, logits, unit=unit),
        ):
            assert_close(np.asarray(function("bits")) * np.log(2), np.asarray(function("nats")), "float64")


@pytest.mark.parametrize("unit", ["nats", "bits"])
@pytest.mark.parametrize("scale", [1e-3, 3.0])
def test_classification_uncertainty_adds_up_exactly(scale, unit):
    logits = (scale * np.random.default_rng(0).standard_normal((5, 1000, 4))).astype("float32")
    for of in (lambda name, *z, **o: getattr(pt.uncertainty, name)(*map(torch.tensor, z), **o), flax):
        mean, total, aleatoric, epistemic = map(np.asarray, of("classification_uncertainty", logits, unit=unit))
        assert np.array_equal(total, aleatoric + epistemic)
        assert (epistemic >= 0).all()
        parts = of("mean_probs", logits), of("predictive_entropy", logits, unit=unit)
        for ours, part in zip((mean, total), parts, strict=True):
            assert_close(ours, np.asarray(part), "float32")


def test_mutual_information_of_members_that_nearly_agree():
    rng = np.random.default_rng(0)
    logits = (rng.standard_normal((1, 100, 4)) + 1e-3 * rng.standard_normal((5, 100, 4))).astype("float32")
    log_probs = logits.astype("float64") - np.log(np.exp(logits.astype("float64")).sum(-1, keepdims=True))
    apart = log_probs - np.log(np.exp(log_probs).mean(0))
    exact = (np.exp(log_probs) * apart).sum(-1).mean(0)
    streams = pt.uncertainty.ClassificationStream(), pf.uncertainty.ClassificationStream()
    for member in logits:
        streams[0].update(torch.tensor(member[None]))
        streams[1].update(jax_of(member[None]))
    for values in (*both("mutual_information", logits), *(stream.compute().epistemic for stream in streams)):
        assert np.abs(np.asarray(values) / exact - 1).max() < EPISTEMIC_LIMIT


def test_pairwise_kl_is_zero_on_the_diagonal_and_nowhere_negative():
    rng = np.random.default_rng(0)
    for scale in (1e-6, 1.0, 1e4, HUGE / 10):
        logits = np.clip(rng.standard_normal((1, 50, 4)) + scale * rng.standard_normal((4, 50, 4)), -HUGE, HUGE)
        for values in both("pairwise_kl", logits):
            values = np.asarray(values)
            assert np.isfinite(values).all()
            assert (values >= 0).all()
            assert (np.diagonal(values) == 0).all()
            assert (values[0, 1] > 0).any()


@pytest.mark.parametrize(("center", "spread"), [(1e6, 1e-2), (1e6, 1.0), (-3.0, 1e-2)])
def test_regression_uncertainty_far_from_zero(center, spread):
    mean = (center + spread * np.random.default_rng(0).standard_normal((7, 500))).astype("float32")
    mean[:, 0] = center  # members that agree
    exact = mean.astype("float64").var(0)
    variance = np.full_like(mean, 0.25)
    pieces = [(mean[i : i + 3], variance[i : i + 3]) for i in range(0, 7, 3)]
    ours, theirs = pt.uncertainty.RegressionStream(), pf.uncertainty.RegressionStream()
    for piece in pieces:
        ours.update(*map(torch.tensor, piece))
        theirs.update(*map(jax_of, piece))
    for u in (
        pt.uncertainty.regression_uncertainty(torch.tensor(mean), torch.tensor(variance)),
        flax("regression_uncertainty", mean, variance),
        ours.compute(),
        theirs.compute(),
    ):
        _, total, aleatoric, epistemic = map(np.asarray, u)
        assert np.abs(epistemic - exact).max(initial=0.0, where=exact == 0) == 0
        assert np.abs(epistemic / np.where(exact, exact, 1) - 1).max(where=exact > 0, initial=0.0) < EPISTEMIC_LIMIT
        assert np.array_equal(total, aleatoric + epistemic)
        assert (aleatoric == 0.25).all()


@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_streams_give_what_the_functions_of_all_members_give(scale):
    rng = np.random.default_rng(0)
    logits, mean, variance = scale * rng.standard_normal((7, 5, 4)), rng.standard_normal((7, 5)), rng.random((7, 5))
    for package, array in ((pt, torch.tensor), (pf, jax_of)):
        classification = package.uncertainty.ClassificationStream(unit="bits")
        regression = package.uncertainty.RegressionStream()
        for i in range(0, 7, 3):
            classification.update(array(logits[i : i + 3]))
            regression.update(array(mean[i : i + 3]), array(variance[i : i + 3]))
        assert classification.num_members == regression.num_members == 7
        of = flax if package is pf else lambda name, *arrays, **o: getattr(pt.uncertainty, name)(*arrays, **o)
        whole = of("classification_uncertainty", array(logits), unit="bits")
        assert isinstance(whole, package.uncertainty.Uncertainty)
        for ours, theirs in zip(classification.compute(), whole, strict=True):
            assert_close(np.asarray(ours), np.asarray(theirs), "float64")
        whole = of("regression_uncertainty", array(mean), array(variance))
        for ours, theirs in zip(regression.compute(), whole, strict=True):
            assert_close(np.asarray(ours), np.asarray(theirs), "float64")


def test_streams_of_many_members_one_by_one():
    logits = np.random.default_rng(0).standard_normal((100, 100, 4)).astype(jnp.bfloat16)
    exact = logits.astype("float64")
    streams = pt.uncertainty.ClassificationStream(), pf.uncertainty.ClassificationStream()
    for member in logits:
        streams[0].update(torch.tensor(member[None].astype("float32")).bfloat16())
        streams[1].update(jax_of(member[None]))
    expected = (
        pt.uncertainty.classification_uncertainty(torch.tensor(exact)),
        flax("classification_uncertainty", exact),
    )
    for stream, whole in zip(streams, expected, strict=True):
        for ours, theirs in zip(stream.compute(), whole, strict=True):
            assert_close(np.asarray(ours), np.asarray(theirs), "float32")


def test_streams_keep_no_graph_and_no_members():
    logits = torch.zeros(2, 3, 4, requires_grad=True)
    stream = pt.uncertainty.ClassificationStream()
    stream.update(logits)
    assert not any(each.requires_grad for each in stream.compute())
    means = torch.zeros(2, 3)
    stream = pt.uncertainty.RegressionStream()
    stream.update(means, torch.ones(2, 3))
    means.fill_(5.0)  # the caller's buffer, reused
    assert (stream.compute().mean == 0).all()


def test_negative_variances_are_refused_or_nan():
    mean, variance = np.zeros((2, 3)), np.array([[1.0, 1.0, 0.0], [1.0, -1.0, 0.0]])
    with pytest.raises(ValueError, match="at least 0"):
        pt.uncertainty.regression_uncertainty(torch.tensor(mean), torch.tensor(variance))
    with pytest.raises(ValueError, match="at least 0"):
        pt.uncertainty.RegressionStream().update(torch.tensor(mean), torch.tensor(variance))
    arrays = jax_of(mean), jax_of(variance)
    stream = pf.uncertainty.RegressionStream()
    stream.update(*arrays)
    for u in (flax("regression_uncertainty", *arrays), stream.compute()):
        np.testing.assert_array_equal(u.total, [1.0, np.nan, 0.0])
