"""Uncertainty and losses at the edges: no finite logits give NaN, and the identities between them hold."""

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
from parity_tests import oracle
from parity_tests.standard import assert_close

FUNCTIONS = ("log_mean_probs", "mean_probs", "predictive_entropy", "expected_entropy", "mutual_information")
HUGE = float(np.finfo("float32").max)
EDGES = [
    np.zeros((3, 2, 4)),
    np.full((3, 2, 4), HUGE),
    np.full((3, 2, 4), -HUGE),
    np.stack([np.eye(4)[:2] * HUGE, -np.eye(4)[:2] * HUGE, np.eye(4)[:2] * HUGE]),
    np.array([[[HUGE, -HUGE]], [[-HUGE, HUGE]]]),
    np.tile([1e-45, -1e-45, 0.0, 0.0], (3, 2, 1)),
    np.array([[[200.0, 0.0]], [[200.0, 1e-3]]]),
    np.ones((1, 1, 1)),
    np.zeros((2, 0, 3)),
]


def both(name, logits, dtype="float32"):
    ours = getattr(pt.uncertainty, name)(torch.tensor(logits, dtype=getattr(torch, dtype)))
    theirs = getattr(pf.uncertainty, name)(jnp.asarray(logits, dtype))
    return ours, np.asarray(theirs)


@jax.jit  # op by op, JAX compiles each op for each shape
def _values_and_gradients(logits):
    results = {}
    for name in FUNCTIONS:
        z, backward = jax.vjp(getattr(pf.uncertainty, name), logits)
        results[name] = z, *backward(jnp.ones_like(z))
    return results


@pytest.mark.parametrize("logits", EDGES, ids=range(len(EDGES)))
@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_extreme_logits_give_finite_values_and_gradients(name, logits, dtype):
    logits = np.clip(logits, float(jnp.finfo(dtype).min), float(jnp.finfo(dtype).max))
    tensor = torch.tensor(logits, dtype=getattr(torch, dtype), requires_grad=True)
    y = getattr(pt.uncertainty, name)(tensor)
    y.sum().backward()
    z, grad = _values_and_gradients(jnp.asarray(logits, dtype))[name]
    for values in (y.detach().float(), tensor.grad.float(), z, grad):
        assert np.isfinite(np.asarray(values, "float32")).all()
    if "entropy" in name or "information" in name:
        assert (y >= 0).all()
        assert (z >= 0).all()


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


def test_losses_agree_with_the_frameworks_own():
    logits = np.random.default_rng(0).standard_normal((3, 6, 4))
    labels = np.random.default_rng(1).integers(0, 4, 6)
    own = torch.stack([torch.nn.functional.cross_entropy(z, torch.tensor(labels)) for z in torch.tensor(logits)]).mean()
    ours = pt.losses.member_cross_entropy(torch.tensor(logits), torch.tensor(labels))
    assert_close(ours, own, "float64")
    assert pt.losses.mixture_cross_entropy(torch.tensor(logits), torch.tensor(labels)) <= ours


@pytest.mark.parametrize("dtype", ["uint8", "int32", "int64"])
def test_labels_of_any_integer_dtype(dtype):
    logits, labels = np.zeros((2, 3, 4)), np.array([0, 3, 1], dtype)
    ours = pt.losses.member_cross_entropy(torch.tensor(logits), torch.tensor(labels))
    theirs = pf.losses.member_cross_entropy(jnp.asarray(logits), jnp.asarray(labels))
    assert_close(ours, np.log(4.0), "float64")
    assert_close(theirs, np.log(4.0), "float64")


def test_labels_out_of_range_are_not_read_as_others():
    with pytest.raises(RuntimeError, match="index"):
        pt.losses.member_cross_entropy(torch.zeros(2, 3, 4), torch.tensor([0, 1, 4]))
    for label in (-1, 4):
        loss = pf.losses.member_cross_entropy(jnp.zeros((2, 3, 4), "float32"), jnp.array([0, 1, label]))
        assert jnp.isnan(loss)
