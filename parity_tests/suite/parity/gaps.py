"""Where the frameworks are known to differ, why, and a check that they still do.

A gap is never absorbed in a tolerance. One that closes fails the suite, so that nothing goes on being excused.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx
from torch import nn
from torch.nn import functional

import probly_flax as pf
import probly_torch as pt
from parity_tests.standard import MEANING_LIMIT, NOISE_FLOOR, error

NAN, INF = float("nan"), float("inf")


@dataclass(frozen=True)
class KnownGap:
    """A difference between correct twins.

    Attributes:
        name: what differs.
        reason: why, and what to do where it matters.
        check: whether it is still there.
    """

    name: str
    reason: str
    check: Callable[[], bool]

    def assert_there(self) -> None:
        """Fails where the gap has closed."""
        with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            assert self.check(), (
                f"{self.name}: expected to differ, as {self.reason}; got the same in both. Remove this gap from "
                "parity_tests/suite/parity/gaps.py, and what the suite leaves out because of it."
            )


def _denormals() -> bool:
    x, ones = np.full((1, 1), 1e-40), np.ones((1, 1))
    kept = pt.functional.batch_ensemble_linear(*(torch.tensor(a).float() for a in (x, ones, ones, ones)))
    flushed = pf.functional.batch_ensemble_linear(*(jnp.asarray(a, "float32") for a in (x, ones, ones, ones)))
    return bool(kept[0, 0] > 0) and float(flushed[0, 0]) == 0.0


def _torch_grad(function: Callable[[torch.Tensor], torch.Tensor], *values: float) -> list[float]:
    x = torch.tensor(values, requires_grad=True)
    function(x).sum().backward()
    assert x.grad is not None
    return x.grad.tolist()


def _flax_grad(function: Callable[[jax.Array], jax.Array], *values: float) -> list[float]:
    return jax.jit(jax.grad(lambda x: function(x).sum()))(np.array(values, "float32")).tolist()


def _grads_differ(ours: Callable[..., Any], theirs: Callable[..., Any], *values: float) -> bool:
    return not np.array_equal(_torch_grad(ours, *values), _flax_grad(theirs, *values), equal_nan=True)


def _sign_of_zero() -> bool:
    return bool(torch.signbit(torch.relu(torch.tensor(-0.0)))) != bool(jnp.signbit(jax.nn.relu(jnp.float32(-0.0))))


def _softplus() -> bool:
    ours = functional.softplus(torch.tensor([25.0], dtype=torch.float64)).numpy()
    return _beyond_rounding(np.asarray(jax.nn.softplus(jnp.array([25.0]))), ours)


def _beyond_rounding(a: np.ndarray, b: np.ndarray) -> bool:
    return error(a, b, b, "float64") > MEANING_LIMIT * NOISE_FLOOR


@nnx.jit
def _call(layer: Any, x: Any) -> Any:
    return layer(x)


def _overflow() -> bool:
    x = np.array([[3e38, 0.0, 0.0]], "float32")
    ours = functional.layer_norm(torch.tensor(x), (3,))
    theirs = _call(nnx.LayerNorm(3, use_fast_variance=False, rngs=nnx.Rngs(0)), x)
    return bool(ours.isnan().all()) and bool(jnp.isfinite(theirs).all())


def _infinite_weights() -> bool:
    x = torch.tensor([[1.0], [2.0]])
    weight, zero, one = torch.full((1,), INF), torch.zeros(1), torch.ones(1)
    ours = functional.batch_norm(x, one, one, weight, zero, eps=0.0)
    theirs = (jnp.array([1.0, 2.0]) - 1.0) * INF  # as nnx has it: the mean is subtracted first
    return bool(ours[1].isnan()) and float(theirs[1]) == INF


def _attention(keys: tuple[float, float], shown: tuple[bool, bool]) -> tuple[np.ndarray, np.ndarray]:
    """Attends to values 0 and 1. The result is (1,) in both."""
    query, key, value = (np.array(v, "float32").reshape(1, 1, -1, 1) for v in ([1.0], keys, [0.0, 1.0]))
    hidden = torch.zeros(2).masked_fill(~torch.tensor(shown), -INF)
    scores = torch.tensor(query) @ torch.tensor(key).mT + hidden  # as nn.MultiheadAttention adds its mask
    q, k, v = (jnp.moveaxis(jnp.asarray(a), 1, 2) for a in (query, key, value))
    theirs = jax.jit(nnx.dot_product_attention)(q, k, v, mask=jnp.asarray(shown))
    return (scores.softmax(-1) @ torch.tensor(value)).numpy().ravel(), np.asarray(theirs).ravel()


def _hidden_nan() -> bool:
    ours, theirs = _attention((1.0, NAN), (True, False))
    return bool(np.isnan(ours[0])) and float(theirs[0]) == 0.0


def _all_hidden() -> bool:
    ours, theirs = _attention((1.0, 1.0), (False, False))
    return bool(np.isnan(ours[0])) and float(theirs[0]) == 0.5


def _batch_norms() -> tuple[nn.BatchNorm1d, nnx.BatchNorm]:
    return nn.BatchNorm1d(1, momentum=1.0).double(), nnx.BatchNorm(1, momentum=0.0, rngs=nnx.Rngs(0))


def _unbiased_variance() -> bool:
    ours, theirs = _batch_norms()
    assert ours.running_var is not None
    ours(torch.tensor([[0.0], [2.0]], dtype=torch.float64))
    _call(theirs, np.array([[0.0], [2.0]]))
    return float(ours.running_var[0]) == 2.0 and float(theirs.var[...][0]) == 1.0


def _statistics_in_float32() -> bool:
    ours, theirs = _batch_norms()
    assert ours.running_mean is not None
    return ours.running_mean.dtype == torch.float64 and theirs.mean[...].dtype == jnp.float32


def _far_from_zero(mean: float) -> np.ndarray:
    return mean + np.random.default_rng(0).standard_normal((16, 64))


def _variance_in_float64() -> bool:
    x = _far_from_zero(1e4)
    exact = x.astype(np.longdouble).var(1).astype(np.float64)
    ours, theirs = torch.tensor(x).var(1, correction=0).numpy(), np.asarray(jnp.asarray(x).var(1))
    return _beyond_rounding(ours, exact) and not _beyond_rounding(theirs, exact)


def _fast_variance() -> bool:
    x = _far_from_zero(100.0)
    norm = [nnx.LayerNorm(64, use_fast_variance=f, dtype="float64", rngs=nnx.Rngs(0)) for f in (True, False)]
    exact = functional.layer_norm(torch.tensor(x), (64,), eps=norm[0].epsilon).numpy()
    fast, slow = (float(np.abs(np.asarray(_call(layer, x)) - exact).max()) for layer in norm)
    return fast > MEANING_LIMIT * slow


def _division_by_a_number() -> bool:
    x = np.arange(1.0, 100.0)
    return bool((torch.tensor(x) / 3.0).numpy().tolist() != (jnp.asarray(x) / 3.0).tolist())


def _hardsigmoid() -> bool:
    x = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    (ours,) = torch.autograd.grad(functional.hardsigmoid(x), x)
    theirs = jax.grad(jax.nn.hard_sigmoid)(jnp.float64(1.0))
    return _beyond_rounding(ours.numpy(), np.asarray(1 / 6)) and not _beyond_rounding(
        np.asarray(theirs), np.asarray(1 / 6)
    )


def _padding() -> bool:
    layer, tokens = nn.Embedding(3, 2, padding_idx=0), torch.tensor([0])
    layer(tokens).sum().backward()
    twin = nnx.Embed(3, 2, rngs=nnx.Rngs(0))
    grads = nnx.grad(lambda twin: twin(jnp.array([0])).sum())(twin)
    assert layer.weight.grad is not None
    return not np.array_equal(layer.weight.grad.numpy(), np.asarray(grads.embedding[...]))


KNOWN_GAPS = (
    KnownGap("denormal numbers", "XLA takes those of any dtype for 0 and torch computes with them", _denormals),
    KnownGap(
        "the sign of zero",
        "torch's relu keeps it and jax.nn.relu returns +0; the standard takes -0 for 0",
        _sign_of_zero,
    ),
    KnownGap(
        "the gradient of relu at NaN",
        "torch passes it on and jax.nn.relu, where x > 0 is false, stops it; outputs are NaN in both",
        lambda: _grads_differ(torch.relu, jax.nn.relu, NAN),
    ),
    KnownGap(
        "the gradient of jnp.maximum(x, 0) at 0",
        "JAX halves it between equal arguments and torch's clamp does not; jax.nn.relu and torch.relu agree",
        lambda: _grads_differ(lambda x: x.clamp(min=0), lambda x: jnp.maximum(x, 0), 0.0),
    ),
    KnownGap(
        "the gradient of max among equals",
        "JAX divides it between them and torch's max(dim) gives it to one; amax agrees",
        lambda: _grads_differ(lambda x: x.max(0).values, lambda x: x.max(0), 1.0, 1.0),
    ),
    KnownGap(
        "the gradient of abs at 0",
        "it is 1 in JAX and 0 in torch",
        lambda: _grads_differ(torch.abs, jnp.abs, 0.0),
    ),
    KnownGap(
        "the gradient of leaky_relu at 0",
        "it is 1 in JAX and the slope in torch",
        lambda: _grads_differ(functional.leaky_relu, jax.nn.leaky_relu, 0.0),
    ),
    KnownGap(
        "the gradient of hardsigmoid in float64",
        "torch multiplies by the float32 nearest to 1/6",
        _hardsigmoid,
    ),
    KnownGap(
        "rows of padding",
        "the gradient of torch's padding_idx is 0, and nnx.Embed has none; zero it before each step",
        _padding,
    ),
    KnownGap("softplus beyond 20", "torch returns x there; jax.nn.softplus has no threshold", _softplus),
    KnownGap(
        "values whose squares overflow",
        "torch's layer norm makes them NaN, where nnx's divides by infinity; scale the data",
        _overflow,
    ),
    KnownGap(
        "infinite weights",
        "torch's norms and recurrent layers fold them into others before they subtract and add, so that two may meet",
        _infinite_weights,
    ),
    KnownGap(
        "NaN in keys that a mask hides",
        "torch adds -inf to their scores, which stay NaN, and nnx replaces them; fill padding with numbers",
        _hidden_nan,
    ),
    KnownGap(
        "rows whose keys are all hidden",
        "torch's attention weights are NaN, nnx's are equal; leave one key",
        _all_hidden,
    ),
    KnownGap(
        "running variance",
        "torch's batch norm keeps the unbiased one, nnx's the biased one; by n / (n - 1) of the rows",
        _unbiased_variance,
    ),
    KnownGap(
        "running statistics in float64",
        "nnx.BatchNorm keeps them in float32, whatever its dtype",
        _statistics_in_float32,
    ),
    KnownGap(
        "variance in float64 far from 0",
        "torch adds up in one pass; its error grows with (mean / deviation) squared. Center the data",
        _variance_in_float64,
    ),
    KnownGap(
        "nnx's fast variance",
        "its default, mean(x**2) - mean(x)**2, cancels far from 0; build norms with use_fast_variance=False",
        _fast_variance,
    ),
    KnownGap(
        "division by a number",
        "XLA multiplies by its reciprocal, off by a rounding; means over sizes that are no power of 2 are not exact",
        _division_by_a_number,
    ),
)
