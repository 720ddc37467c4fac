"""Bad input: the same kind of error with the same sentence from both packages, ending with the next step as code."""

from dataclasses import dataclass
from functools import cache
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from torch import nn

import probly_flax.metrics
import probly_torch.metrics
from parity_tests.kit.trees import jax_of


@dataclass(frozen=True)
class Framework:
    """One package, and its framework's way to make a layer, a network and an array."""

    package: Any
    linear: Any
    sequential: Any
    array: Any
    other_layer: Any


TORCH = Framework(
    probly_torch,
    nn.Linear,
    nn.Sequential,
    lambda *shape: torch.zeros(shape),
    lambda: nn.LayerNorm(4),
)
flax_linear = cache(lambda i, o: nnx.Linear(i, o, rngs=nnx.Rngs(0)))  # JAX compiles the draws of each shape
FLAX = Framework(
    probly_flax,
    lambda i, o: nnx.clone(flax_linear(i, o)),
    nnx.Sequential,
    lambda *shape: jax_of(np.zeros(shape)),
    lambda: nnx.LayerNorm(4, rngs=nnx.Rngs(0)),
)


def layer(f, **options):
    return f.package.BatchEnsembleLinear(f.linear(16, 8), **({"num_members": 4} | options))


@cache
def plain(f):
    return layer(f)


def network(f):
    return f.sequential(f.linear(4, 3), f.linear(3, 2))


@cache
def deep(f):
    return f.package.ensemble(network(f), 3)


def labels(f, *shape, dtype="int64"):
    array = np.zeros(shape, dtype)
    return torch.tensor(array) if f is TORCH else jax_of(array)


def loss(f, logits, target):
    return f.package.losses.member_cross_entropy(f.array(*logits), target)


def updated(stream, *outputs):
    stream.update(*outputs)
    return stream


CASES = {
    "rows that do not divide": (lambda f: plain(f)(f.array(30, 16)), ValueError, "call tile_members(x, 4)."),
    "one row": (lambda f: plain(f)(f.array(1, 16)), ValueError, "call tile_members(x, 4)."),
    "wrong last axis": (lambda f: plain(f)(f.array(8, 15)), ValueError, "in_features=15."),
    "rank 1": (lambda f: plain(f)(f.array(16)), ValueError, "call tile_members(x[None], 4)."),
    "no members": (lambda f: layer(f, num_members=0), ValueError, "Pass num_members=4."),
    "negative members": (lambda f: layer(f, num_members=-3), ValueError, "Pass num_members=4."),
    "2.5 members": (lambda f: layer(f, num_members=2.5), TypeError, "Pass num_members=4."),
    "True members": (lambda f: layer(f, num_members=True), TypeError, "Pass num_members=4."),
    "unknown init": (lambda f: layer(f, init="gaussian"), ValueError, "or 'ones'; got 'gaussian'. Pass init='normal'."),
    "r_std below 0": (lambda f: layer(f, r_std=-0.5), ValueError, "Pass r_std=0.5."),
    "s_std negative": (lambda f: layer(f, s_std=-1.0), ValueError, "Pass s_std=0.5."),
    "r_std NaN": (lambda f: layer(f, r_std=float("nan")), ValueError, "Pass r_std=0.5."),
    "s_mean infinite": (lambda f: layer(f, s_mean=float("inf")), ValueError, "Pass s_mean=1.0."),
    "r_mean a string": (lambda f: layer(f, r_mean="1"), TypeError, "Pass r_mean=1.0."),
    "base no Linear": (
        lambda f: f.package.BatchEnsembleLinear(f.other_layer(), num_members=4),
        TypeError,
        "call batchensemble(network, num_members=4).",
    ),
    "rngs a string": (lambda f: layer(f, rngs="0"), TypeError, "rngs=0, or Rngs(0)."),
    "rngs a float": (lambda f: layer(f, rngs=1.0), TypeError, "rngs=0, or Rngs(0)."),
    "rngs negative": (lambda f: layer(f, rngs=-1), ValueError, "its low 32 bits."),
    "seed meant as members": (
        lambda f: f.package.BatchEnsembleLinear(f.linear(16, 8), 4),
        TypeError,
        "call BatchEnsembleLinear(base_layer, rngs=4, num_members=1).",
    ),
    "one row of r": (
        lambda f: f.package.functional.batch_ensemble_linear(
            f.array(4, 3), f.array(3, 3), f.array(2, 3), f.array(1, 3)
        ),
        ValueError,
        "tile_members(s, 2).",
    ),
    "r by columns": (
        lambda f: f.package.functional.batch_ensemble_linear(
            f.array(4, 3), f.array(3, 3), f.array(3, 2), f.array(2, 3)
        ),
        ValueError,
        "tile_members(r, 3).",
    ),
    "a scalar as rows": (
        lambda f: f.package.functional.batch_ensemble_linear(f.array(), f.array(3, 3), f.array(2, 3), f.array(2, 3)),
        ValueError,
        "call tile_members(x[None], 2).",
    ),
    "a stack of weights": (
        lambda f: (
            f.package.functional.batch_ensemble_linear(
                f.array(4, 3), f.array(2, 3, 3), f.array(2, 3), f.array(2, 3)
            ).shape
        ),
        ValueError,
        "call ensemble(network, num_members).",
    ),
    "tile a scalar": (lambda f: f.package.tile_members(f.array(), 2), ValueError, "Add the axis: x[None]."),
    "tile to none": (lambda f: f.package.tile_members(f.array(3), 0), ValueError, "Pass num_members=4."),
    "split unevenly": (lambda f: f.package.split_members(f.array(7, 2), 3), ValueError, "given tile_members(x, 3)."),
    "nothing to convert": (
        lambda f: f.package.batchensemble(f.sequential(f.other_layer()), 3),
        ValueError,
        "call ensemble(network, num_members).",
    ),
    "converted already": (
        lambda f: f.package.batchensemble(f.package.batchensemble(network(f), 3), 3),
        ValueError,
        "wrap this one: BatchEnsemble(network).",
    ),
    "no network": (lambda f: f.package.batchensemble("mlp", 3), TypeError, "batchensemble(network, ...)."),
    "num_members of a network": (lambda f: f.package.batchensemble(network(f), 0), ValueError, "num_members=4."),
    "exclude of another kind": (
        lambda f: f.package.batchensemble(network(f), 3, exclude=[3]),
        TypeError,
        "Pass exclude='head.*'.",
    ),
    "no BatchEnsemble layer": (
        lambda f: f.package.BatchEnsemble(network(f)),
        ValueError,
        "call batchensemble(network, num_members=4).",
    ),
    "layers of different members": (
        lambda f: f.package.BatchEnsemble(
            f.sequential(
                f.package.BatchEnsembleLinear(f.linear(4, 3), num_members=2),
                f.package.BatchEnsembleLinear(f.linear(3, 2), num_members=3),
            )
        ),
        ValueError,
        "call batchensemble(network, num_members=4).",
    ),
    "in_axes 1": (lambda f: deep(f)(f.array(3, 5, 4), in_axes=1), ValueError, "model(x, in_axes=0)."),
    "batch each of the wrong count": (
        lambda f: deep(f)(f.array(5, 2, 4), in_axes=0),
        ValueError,
        "leave in_axes out: model(x).",
    ),
    "batch each for BatchEnsemble": (
        lambda f: f.package.batchensemble(network(f), 3)(f.array(5, 2, 4), in_axes=0),
        ValueError,
        "leave in_axes out: model(x).",
    ),
    "index too large": (lambda f: deep(f)[3], IndexError, "Call model[2]."),
    "index a string": (lambda f: deep(f)["0"], TypeError, "Call model[0]."),
    "no member selected": (lambda f: deep(f)[[]], ValueError, "Call model[[0]]."),
    "no members given": (lambda f: f.package.Ensemble([]), ValueError, "Ensemble([network])."),
    "a network as members": (
        lambda f: f.package.Ensemble(f.linear(4, 3)),
        TypeError,
        "call ensemble(network, num_members=4).",
    ),
    "a Sequential as members": (
        lambda f: f.package.Ensemble(network(f)),
        TypeError,
        "call ensemble(network, num_members=4).",
    ),
    "a loss for each input": (
        lambda f: f.package.losses.member_losses(lambda y, t: y[:, 0] + t, f.array(3, 5, 2), f.array(5)),
        ValueError,
        "loss(outputs, targets).mean(), outputs, targets).",
    ),
    "targets of another count": (
        lambda f: f.package.losses.member_losses(lambda y, t: y.mean(), f.array(3, 5, 2), f.array(2, 5), in_axes=0),
        ValueError,
        "leave in_axes out: model(x).",
    ),
    "a member twice": (
        lambda f: f.package.Ensemble([network(f)] * 2),
        ValueError,
        "call ensemble(network, 2, reset_params=False).",
    ),
    "a list of another length": (
        lambda f: f.package.ensemble([network(f), network(f)], 3),
        ValueError,
        "Call ensemble(modules, 2).",
    ),
    "a base of another kind": (lambda f: f.package.ensemble(3, 3), TypeError, "ensemble(network, ...)."),
    "chunk_size 0": (lambda f: f.package.ensemble(network(f), 3, chunk_size=0), ValueError, "Pass chunk_size=1."),
    "reset of another shape": (
        lambda f: f.package.ensemble(f.linear(4, 3), 3, reset=lambda p, rngs: f.array(1)),
        ValueError,
        "normal(rngs.params(), parameter.shape).",
    ),
    "logits of one network": (
        lambda f: f.package.uncertainty.mean_probs(f.array(5, 4)),
        ValueError,
        "add the member axis: logits[None].",
    ),
    "labels of another batch": (lambda f: loss(f, (3, 5, 4), labels(f, 6)), ValueError, "labels.argmax(-1)."),
    "one-hot labels": (lambda f: loss(f, (3, 5, 4), labels(f, 5, 4)), ValueError, "labels.argmax(-1)."),
    "labels of floats": (
        lambda f: loss(f, (3, 5, 4), labels(f, 5, dtype="float32")),
        TypeError,
        "labels.argmax(-1).",
    ),
    "labels of members for the mixture": (
        lambda f: f.package.losses.mixture_cross_entropy(f.array(3, 5, 4), labels(f, 3, 5)),
        ValueError,
        "labels.argmax(-1).",
    ),
    "weights of other classes": (
        lambda f: f.package.losses.member_cross_entropy(f.array(3, 5, 4), labels(f, 5), weight=f.array(3)),
        ValueError,
        "weight=None.",
    ),
    "weights in a list": (
        lambda f: f.package.losses.mixture_cross_entropy(f.array(3, 5, 2), labels(f, 5), weight=[1.0, 2.0]),
        ValueError,
        "weight=None.",
    ),
    "smoothing above 1": (
        lambda f: f.package.losses.member_cross_entropy(f.array(3, 5, 4), labels(f, 5), label_smoothing=1.5),
        ValueError,
        "Pass label_smoothing=0.1.",
    ),
    "smoothing a string": (
        lambda f: f.package.losses.mixture_cross_entropy(f.array(3, 5, 4), labels(f, 5), label_smoothing="0.1"),
        TypeError,
        "Pass label_smoothing=0.1.",
    ),
    "ignore_index a float": (
        lambda f: f.package.losses.mixture_cross_entropy(f.array(3, 5, 4), labels(f, 5), ignore_index=1.0),
        TypeError,
        "Pass ignore_index=-100.",
    ),
    "variances of one column": (
        lambda f: f.package.losses.member_gaussian_nll(f.array(3, 5, 2), f.array(3, 5, 1), f.array(5, 2)),
        ValueError,
        "mean[None], variance[None].",
    ),
    "targets without the last axis": (
        lambda f: f.package.losses.member_gaussian_nll(f.array(3, 5, 1), f.array(3, 5, 1), f.array(5)),
        ValueError,
        "Pass targets.reshape((5, 1)).",
    ),
    "targets of members for the mixture": (
        lambda f: f.package.losses.mixture_gaussian_nll(f.array(3, 5), f.array(3, 5), f.array(3, 5)),
        ValueError,
        "Pass targets.reshape((5,)).",
    ),
    "beta above 1": (
        lambda f: f.package.losses.member_beta_nll(f.array(3, 5), f.array(3, 5), f.array(5), beta=2),
        ValueError,
        "Pass beta=0.5.",
    ),
    "three outputs for a Gaussian": (
        lambda f: f.package.losses.to_gaussian(f.array(5, 3)),
        ValueError,
        "Linear(features, 2 * K).",
    ),
    "no smallest variance": (
        lambda f: f.package.losses.to_gaussian(f.array(5, 2), min_variance=0.0),
        ValueError,
        "Pass min_variance=1e-06.",
    ),
    "another unit": (
        lambda f: f.package.uncertainty.pairwise_kl(f.array(3, 5, 4), unit="bit"),
        ValueError,
        "Pass unit='nats'.",
    ),
    "variances of another batch": (
        lambda f: f.package.uncertainty.regression_uncertainty(f.array(3, 5), f.array(3, 4)),
        ValueError,
        "mean[None], variance[None].",
    ),
    "a stream without members": (
        lambda f: f.package.uncertainty.ClassificationStream().compute(),
        RuntimeError,
        "Call stream.update(logits) first.",
    ),
    "a stream without means": (
        lambda f: f.package.uncertainty.RegressionStream().compute(),
        RuntimeError,
        "Call stream.update(mean, variance) first.",
    ),
    "another batch in a stream": (
        lambda f: updated(f.package.uncertainty.ClassificationStream(), f.array(3, 5, 4)).update(f.array(2, 4, 4)),
        ValueError,
        "make another stream: ClassificationStream().",
    ),
    "other targets in a stream": (
        lambda f: updated(f.package.uncertainty.RegressionStream(), f.array(3, 5), f.array(3, 5)).update(
            f.array(3, 4), f.array(3, 4)
        ),
        ValueError,
        "make another stream: RegressionStream().",
    ),
    "no bins": (
        lambda f: f.package.metrics.ece(f.array(3, 5, 4), labels(f, 5), num_bins=0),
        ValueError,
        "Pass num_bins=15.",
    ),
    "half a bin": (lambda f: f.package.metrics.AdaptiveECE(num_bins=7.5), TypeError, "Pass num_bins=15."),
    "a level in percent": (
        lambda f: f.package.metrics.sharpness(f.array(3, 5), f.array(3, 5), level=95),
        ValueError,
        "Pass level=0.95.",
    ),
    "a level as a string": (lambda f: f.package.metrics.IntervalCoverage(level="0.95"), TypeError, "Pass level=0.95."),
    "labels of members for a metric": (
        lambda f: f.package.metrics.accuracy(f.array(3, 5, 4), labels(f, 3, 5)),
        ValueError,
        "labels.argmax(-1).",
    ),
    "targets of members for a metric": (
        lambda f: f.package.metrics.CRPS().update(mean=f.array(3, 5), variance=f.array(3, 5), targets=f.array(3, 5)),
        ValueError,
        "Pass targets.reshape((5,)).",
    ),
    "uncertainty of another batch": (
        lambda f: f.package.metrics.aurc(f.array(3, 5, 4), labels(f, 5), uncertainty=f.array(4)),
        ValueError,
        "uncertainty=None.",
    ),
    "uncertainty of the batch for members": (
        lambda f: f.package.metrics.AURC(per_member=True).update(
            logits=f.array(3, 5, 4), labels=labels(f, 5), uncertainty=f.array(5)
        ),
        ValueError,
        "uncertainty=None.",
    ),
    "scores of members": (
        lambda f: f.package.metrics.ood_auroc(f.array(3, 5), f.array(5)),
        ValueError,
        "mutual_information(logits).",
    ),
    "nothing from outside": (
        lambda f: f.package.metrics.ood_fpr95(f.array(5), f.array(0)),
        ValueError,
        "or metric.update(scores, is_ood).",
    ),
    "is_ood of another batch": (
        lambda f: f.package.metrics.OODAUROC().update(scores=f.array(5), is_ood=labels(f, 4, dtype="bool")),
        ValueError,
        "pass full_like(scores, True, dtype=bool).",
    ),
    "is_ood as numbers": (
        lambda f: f.package.metrics.OODFPR95().update(scores=f.array(5), is_ood=labels(f, 5)),
        TypeError,
        "Pass is_ood == 1.",
    ),
    "a constructor without rngs": (
        lambda f: f.package.ensemble(lambda: network(f), 3),
        TypeError,
        "ensemble(lambda rngs: Network(...), num_members).",
    ),
    "a constructor with other arguments": (
        lambda f: f.package.ensemble(lambda width, depth: network(f), 3),
        TypeError,
        "ensemble(lambda rngs: Network(...), num_members).",
    ),
    "lists as weights": (
        lambda f: f.package.load_arrays(network(f), {"0.weight": [1.0]}),
        TypeError,
        "Pass to_arrays(model).",
    ),
    "arrays of another model": (
        lambda f: f.package.load_arrays(
            network(f), {"0.wieght": np.zeros((3, 4), "float32"), "0.bias": np.zeros(2, "float64")}
        ),
        ValueError,
        "build the model that these arrays come from.",
    ),
    "a checkpoint": (
        lambda f: f.package.load_arrays(network(f), {"epoch": 1, "state_dict": {}}),
        TypeError,
        r'load_arrays(model, checkpoint["state_dict"], rename={r"^model\.": ""}).',
    ),
    "arrays with a prefix": (
        lambda f: f.package.load_arrays(
            network(f), {f"module.{name}": array for name, array in f.package.to_arrays(network(f)).items()}
        ),
        ValueError,
        r"Pass rename={'^module\\.': ''}.",
    ),
    "names that become one": (
        lambda f: f.package.load_arrays(network(f), f.package.to_arrays(network(f)), rename={r"^\d": "0"}),
        ValueError,
        "'other'}.",
    ),
    "ignore that matches nothing": (
        lambda f: f.package.load_arrays(network(f), f.package.to_arrays(network(f)), ignore="head.*"),
        ValueError,
        "Leave them out: ignore=[].",
    ),
    "flatten of no Linear layer": (
        lambda f: f.package.to_arrays(network(f), flatten={"fc1": (64, 7, 7)}),
        ValueError,
        'Pass flatten={"0": (channels, height, width)}.',
    ),
    "float64 into float32": (
        lambda f: f.package.load_arrays(
            network(f), {n: a.astype("float64") for n, a in f.package.to_arrays(network(f)).items()}
        ),
        ValueError,
        "pass cast=True.",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_the_same_sentence_in_both(name):
    call, error, next_step = CASES[name]
    sentences = []
    for framework in (TORCH, FLAX):
        with pytest.raises(error) as raised:
            call(framework)
        assert type(raised.value) is error
        sentences.append(str(raised.value))
    ours, theirs = sentences
    assert ours == theirs
    assert ours.endswith(next_step)
    assert " expects " in ours
    assert "got " in ours


def test_the_sentence_of_the_design():
    with pytest.raises(ValueError, match="rows") as raised:
        layer(TORCH)(torch.zeros(30, 16))
    assert str(raised.value) == (
        "BatchEnsembleLinear expects inputs of shape [num_members*B, ..., in_features] with num_members=4, "
        "in_features=16; got (30, 16), whose 30 rows do not divide by 4. To give every member the same batch, call "
        "tile_members(x, 4)."
    )


def test_every_problem_of_a_file_at_once_and_nothing_loaded():
    for f in (TORCH, FLAX):
        model = network(f)
        before = f.package.to_arrays(model)
        arrays = {name: array + 1 for name, array in before.items()} | {"extra": np.zeros(1, "float32")}
        arrays["0.wieght"] = arrays.pop("0.weight")
        arrays["1.bias"] = arrays["1.bias"].astype("float64")
        arrays["0.bias"] = arrays["0.bias"][:2]
        with pytest.raises(ValueError, match="5 differences") as raised:
            f.package.load_arrays(model, arrays)
        for line in (
            "missing: 0.weight (rename 0.wieght?)",
            "unexpected: 0.wieght",
            "unexpected: extra",
            "shape: 0.bias is (3,) here, (2,) there",
            "dtype: 1.bias is float32 here, float64 there",
        ):
            assert line in str(raised.value)
        for name, array in f.package.to_arrays(model).items():
            np.testing.assert_array_equal(array, before[name])


def test_torch_refuses_the_dtypes_that_its_linear_layer_refuses():
    with pytest.raises(TypeError, match=r"Convert them: x.to\(torch.float32\)"):
        layer(TORCH)(torch.zeros(8, 16, dtype=torch.float64))


def test_an_exclude_that_matches_nothing_names_the_layers():
    for f, first in ((TORCH, "0"), (FLAX, "layers.0")):
        with pytest.raises(ValueError, match="match none of") as raised:
            f.package.batchensemble(network(f), 3, exclude=["haed.*"])
        assert f"exclude='{first}'" in str(raised.value)


def test_a_parameter_without_a_rule_is_named_with_the_ways_out():
    class TorchToken(nn.Module):
        def __init__(self):
            super().__init__()
            self.token = nn.Parameter(torch.zeros(3))

    class FlaxToken(nnx.Module):
        def __init__(self):
            self.token = nnx.Param(jnp.zeros(3))

    sentences = []
    for package, token, holder in ((probly_torch, TorchToken, nn.Sequential), (probly_flax, FlaxToken, nnx.Sequential)):
        with pytest.raises(ValueError, match="token") as raised:
            package.ensemble(holder(token()), 2)
        sentences.append(str(raised.value).replace("layers.0.", "0."))
    assert sentences[0] == sentences[1]
    assert sentences[0].endswith("or register one, @register_reset(type).")


def test_a_constructor_that_ignores_its_rngs_is_no_ensemble():
    with pytest.raises(ValueError, match="got 3 equal ones"):
        probly_flax.ensemble(lambda rngs: nnx.Linear(2, 2, rngs=nnx.Rngs(0)), 3)

    def seeded(rngs):
        torch.manual_seed(0)
        return nn.Linear(2, 2)

    with pytest.raises(ValueError, match="got 3 equal ones"):
        probly_torch.ensemble(seeded, 3)


def test_members_of_another_structure_are_told_apart():
    for f in (TORCH, FLAX):
        other = f.sequential(f.linear(4, 3), f.linear(3, 5))
        with pytest.raises(ValueError, match=r"members of one structure; got member 0 .* where member 2"):
            f.package.Ensemble([network(f), network(f), other])
        evaluated = network(f)
        evaluated.eval()
        if f is TORCH:
            with pytest.raises(ValueError, match="training=True"):
                f.package.Ensemble([network(f), evaluated])
