"""Groups of parameters by type: what decays and what learns at a rate of its own, in both packages."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from flax import nnx
from torch import nn

import probly_flax as pf
import probly_torch as pt
from parity_tests.kit.training import compare_training
from parity_tests.suite.subjects.subject import without_draws
from probly_flax.training import fast_weight_groups as flax_groups
from probly_torch.training import fast_weight_groups as torch_groups

DECAY, RATE = 0.1, 0.01


@pytest.fixture(autouse=True)
def _promotion():
    """Allows promotion. optax.adam and nnx.BatchNorm ask for it."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def torch_net():
    return nn.Sequential(nn.Linear(5, 7), nn.LayerNorm(7), nn.ReLU(), nn.Linear(7, 3))


def flax_net(rngs=None):
    rngs = rngs or nnx.Rngs(0)
    norm = nnx.LayerNorm(7, epsilon=1e-5, use_fast_variance=False, rngs=rngs)
    return nnx.Sequential(nnx.Linear(5, 7, rngs=rngs), norm, nnx.relu, nnx.Linear(7, 3, rngs=rngs))


def chained(groups):
    return optax.chain(optax.scale_by_adam(), groups, optax.scale_by_learning_rate(RATE))


def test_steps_are_those_of_torch():
    ours, theirs = pt.batchensemble(torch_net(), 4), without_draws(lambda: pf.batchensemble(flax_net(), 4))
    rng = np.random.default_rng(0)
    batches = [(rng.normal(size=(6, 5)), rng.integers(0, 3, 6)) for _ in range(2)]

    def compare(transform):
        optimizer = torch.optim.AdamW(torch_groups(ours, DECAY, 0.25), lr=RATE)
        return compare_training(ours, theirs, optimizer, transform, batches)

    report = compare(chained(flax_groups(theirs, DECAY, 0.25)))
    assert report.passed, report
    everywhere = compare(optax.adamw(RATE, weight_decay=DECAY))  # decays r, s, biases and norms too
    assert not everywhere.passed
    assert {c.kind for c in everywhere.comparisons if not c.holds} == {"update"}


def test_what_a_parameter_is_follows_from_its_type():
    """Names alike say nothing: r of a module that is no BatchEnsemble layer is a weight, or nothing that is known."""

    class Net(nnx.Module):
        def __init__(self, layer):
            rngs = nnx.Rngs(0)
            self.r, self.kernel = nnx.LayerNorm(4, rngs=rngs), layer
            self.blocks = nnx.List([nnx.Dict(bias=nnx.Linear(4, 4, rngs=rngs)), nnx.Embed(4, 4, rngs=rngs)])

    class Scale(nnx.Module):
        def __init__(self):
            self.r = nnx.Param(jnp.ones(4))

    def scaled(transform):
        """Returns what becomes of gradients and parameters of 1."""
        params = jax.tree.map(jnp.ones_like, nnx.state(model, nnx.Param))
        updates, _ = transform.update(params, transform.init(params), params)
        return {".".join(map(str, path)): float(x.mean()) for path, x in nnx.to_flat_state(nnx.as_pure(updates))}

    model = without_draws(lambda: pf.batchensemble(Net(Scale()), 2))
    with pytest.raises(
        ValueError, match=r"got 'network.kernel.r' of a Scale. Say it: fast_weight_groups.model, 0.25, dec"
    ):
        flax_groups(model, 0.25)
    slow = {"network.blocks.0.bias.kernel": 1.25, "network.blocks.1.embedding": 1.25}
    fast = {f"network.blocks.{path}.{name}": 0.5 for path in ("0.bias", "1") for name in "rs"}
    rest = dict.fromkeys(("network.r.scale", "network.r.bias", "network.blocks.0.bias.bias"), 1.0)
    groups = slow | fast | rest
    assert scaled(flax_groups(model, 0.25, decay=(Scale,))) == groups | {"network.kernel.r": 1.25}
    assert scaled(flax_groups(model, 0.25, no_decay=(Scale, nnx.Embed))) == groups | {
        "network.kernel.r": 1.0,
        "network.blocks.1.embedding": 1.0,
    }
    assert scaled(flax_groups(model, 0.0, 2.0, no_decay=(Scale,)))["network.blocks.1.s"] == 2.0
