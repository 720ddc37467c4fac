"""compare on whole networks, and on the pairs of the examples: it passes, and after a slip in one layer it names that
layer and the cause."""

from dataclasses import replace
from functools import cache

import jax
import numpy as np
import pytest
import torch
from flax import nnx

import probly_flax
import probly_torch
from examples import port_and_resume, port_resnet, two_moons
from parity_tests import compare
from parity_tests.kit.localize import flax_parts
from parity_tests.kit.trees import jax_of
from parity_tests.suite.port.networks import NETWORKS, randomized
from parity_tests.suite.subjects.subject import without_draws
from probly_torch import port as ports
from probly_torch.port._proof import load


@pytest.fixture(autouse=True)
def _as_users_run():
    """Lets layers of nnx promote dtypes, which the suite forbids elsewhere."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"), jax.enable_x64(False):
        yield


@cache
def ported(name):
    """Returns a network and its twin with equal weights.

    What both are called with comes with them, and the names of stacked layers.
    """
    make, x = NETWORKS[name]
    network = randomized(make()).eval()
    twin = ports._twin("port", network, (x,))
    return network, load(network, twin), (tuple(x.shape) if x.is_floating_point() else x), twin.rename


def report_of(name, model=None, **options):
    """Compares op by op, where nothing needs compiling as a whole."""
    network, twin, x, rename = ported(name)
    options = {"gradients": False, "exact": False, "seeds": 1, "jit": False} | options
    return compare(network, model or twin, x, rename=rename, **options)


@pytest.mark.parametrize(("name", "layers"), [("LeNet", 5), ("ViT", 40), ("stacked LSTM", 4), ("RNN", 4)])
def test_networks_agree_layer_by_layer(name, layers):
    report = report_of(name, layers=True)
    assert report.passed, str(report)
    assert len(report.layers) == layers
    assert all(layer.holds and layer.inputs_agree for layer in report.layers)


@pytest.mark.parametrize("name", ["MLP", "LeNet", "GRU"])
def test_gradients_of_networks_agree(name):
    report = report_of(name, gradients=True, jit=True)
    assert report.passed, str(report)
    assert {each.kind for each in report.comparisons} >= {"output", "parameter gradient"}


def option(**values):
    """Returns an edit that sets other options of a layer."""

    def edit(layer):
        for name, value in values.items():
            assert getattr(layer, name) != value
            setattr(layer, name, value)

    return edit


def function(path, wrong):
    """Returns an edit that puts another function in the place of a layer."""

    def edit(model):
        owner, _, name = path.rpartition(".")
        part = flax_parts(model)[owner]
        if isinstance(part, nnx.Sequential):
            part.layers[int(name)] = wrong
        else:
            setattr(part, name, wrong)

    return edit


def weight(name, edit):
    """Returns an edit that sets other values of a weight."""

    def edit_layer(layer):
        variable = layer
        for part in name.split("."):
            variable = getattr(variable, part)
        values = edit(np.asarray(variable.get_value()))
        variable.set_value(jax_of(values))

    return edit_layer


def no_bias(layer):
    layer.bias = None
    layer.use_bias = False


def gates(*order):
    """Returns an edit that puts blocks of the last axis in another order, in all weights of a recurrent layer."""

    def edit(layer):
        for _, variable in nnx.to_flat_state(nnx.state(layer, nnx.Param)):
            blocks = np.asarray(variable.get_value()).reshape(*variable.shape[:-1], len(order), -1)
            variable.set_value(jax_of(blocks[..., list(order), :].reshape(variable.shape), variable.dtype))

    return edit


SLIPS = {  # of one layer: in which network, where, what, and words of the cause
    "epsilon": ("BERT", "encoder.layers.1.norm1", option(epsilon=1e-6), "epsilon is 1e-06, torch eps is 1e-05"),
    "epsilon of statistics": (
        "MobileNet",
        "blocks.0.conv.1",
        option(epsilon=1e-3),
        "epsilon is 0.001, torch eps is 1e-05",
    ),
    "padding": ("MobileNet", "stem", option(padding="SAME"), "padding is 'SAME', torch padding is (1, 1)"),
    "dilation": ("MobileNet", "blocks.2.conv.3", option(kernel_dilation=(2, 2), padding=2), "dilation"),
    "missing bias": ("LeNet", "fc1", no_bias, "bias"),
}
WEIGHTS = {  # of one layer, which were not copied as they should have been
    "square kernel": ("MLP", "2", weight("kernel", lambda kernel: kernel.T), "transpose"),
    "axes of a convolution": ("LeNet", "conv2", weight("kernel", lambda kernel: kernel.swapaxes(0, 1)), "kernel"),
    "order of gates": ("GRU", "rnn", gates(1, 0, 2), "the gates of nnx lie as (z, r, n), torch's as (r, z, n)"),
}


@pytest.mark.parametrize("slip", [*SLIPS, *WEIGHTS])
def test_a_slip_in_one_layer_is_named_with_its_cause(slip):
    name, path, edit, words = (SLIPS | WEIGHTS)[slip]
    model = nnx.clone(ported(name)[1])
    edit(flax_parts(model)[path])
    report = report_of(name, model, weights="own" if slip in WEIGHTS else "copy")
    assert not report.passed
    assert report.first_divergence.path == path, str(report)
    assert words in str(report.first_divergence)


def test_a_wrong_function_in_the_place_of_a_layer_is_named():
    model = nnx.clone(ported("MobileNet")[1])
    function("blocks.1.conv.2", nnx.relu)(model)
    divergence = report_of("MobileNet", model).first_divergence
    assert divergence.path == "blocks.1.conv.2"
    assert "relu6" in str(divergence)


LINES = {  # of a twin's source: in which network, the right one, the wrong one, where it shows, words of the cause
    "gelu": ("ViT", "approximate=False", "approximate=True", "blocks.0.mlp.1", "nnx.gelu(x, approximate=False)"),
    "packing": (
        "ViT",
        "3, 2, C // 2).transpose(2, 0, 3",
        "2, 3, C // 2).transpose(3, 0, 2",
        "blocks.0.attn",
        "(heads, 3, features)",
    ),
    "scale": ("ViT", "0.5773502691896257", "1.0", "blocks.0.attn", "scale 1/sqrt(3)"),
    "residual": ("ViT", "return x + self.mlp(", "return self.mlp(", "blocks.0", "+ the input of blocks.0.norm2, nnx"),
    "flatten order": (
        "LeNet",
        "x.transpose(0, 3, 1, 2).reshape(",
        "x.reshape(",
        "",
        "torch flattens 5 channels first, nnx last",
    ),
    "mask polarity": ("BERT", "mask=~src", "mask=src", "encoder.layers.0.self_attn", "mask"),
}


@pytest.mark.parametrize("line", LINES)
def test_a_wrong_line_is_named_with_its_cause(line):
    name, right, wrong, path, words = LINES[line]
    network, x = ported(name)[0], NETWORKS[name][1]
    twin = ports._twin("port", network, (x,))
    assert right in twin.source
    model = load(network, replace(twin, source=twin.source.replace(right, wrong)))
    divergence = report_of(name, model).first_divergence
    assert divergence.path == path, str(divergence)
    assert words in str(divergence)


# The examples


def moons(package):
    of_torch = getattr(probly_torch, package)(two_moons.TorchMLP(), 3)
    of_flax = without_draws(lambda: getattr(probly_flax, package)(two_moons.FlaxMLP(nnx.Rngs(0)), 3))
    return of_torch, of_flax, (5, 2), {}


def resnet():
    network, x = port_resnet.ResNet18(width=4, num_classes=7).eval(), torch.zeros(2, 3, 32, 32)
    return network, ports.port(network, x), tuple(x.shape), {"jit": False, "gradients": False}


PAIRS = {  # both models, what they are called with, and options
    "two_moons, ensemble": lambda: moons("ensemble"),
    "two_moons, batchensemble": lambda: moons("batchensemble"),
    "port_and_resume": lambda: (
        port_and_resume.TorchNet(),
        without_draws(lambda: port_and_resume.FlaxNet("float32")),
        (3, 1, 8, 8),
        {"flatten": {"fc1": (16, 4, 4)}},
    ),
    "port_resnet": resnet,
}


@pytest.mark.parametrize("pair", PAIRS)
def test_pairs_of_the_examples_agree(pair):
    of_torch, of_flax, shape, options = PAIRS[pair]()
    report = compare(of_torch, of_flax, shape, weights="random", seeds=2, **options)
    assert report.passed, str(report)


def test_a_slip_in_one_member_of_an_ensemble_is_named():
    of_torch, of_flax, shape, _ = moons("ensemble")
    probly_flax.load_arrays(of_flax, probly_torch.to_arrays(of_torch))
    kernel = of_flax.stacked.net.layers[2].kernel
    values = np.array(kernel[...])
    values[1] = values[1].T
    kernel.set_value(jax_of(values))
    report = compare(of_torch, of_flax, shape, weights="own", seeds=1, gradients=False, exact=False)
    assert report.first_divergence.path == "[1].net.2"
    assert "transpose" in str(report.first_divergence)
