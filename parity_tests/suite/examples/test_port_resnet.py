"""The example that ports a ResNet: the twin is the network, in both dtypes and everywhere."""

import ast

import safetensors.numpy

from examples import port_resnet
from examples.port_resnet import GRADIENT, LAYERS
from parity_tests.standard import TRAJECTORY_LIMIT
from parity_tests.suite.examples.example_runs import assert_figures, run_once

out, results = run_once(port_resnet.main)


def test_differences_are_rounding(results):
    assert list(results) == ["float32", "float64"]
    for result in results.values():
        assert list(result) == [*LAYERS, GRADIENT]
    assert 0 < max(results["float64"].values()) <= TRAJECTORY_LIMIT
    assert 2**-26 < max(results["float32"].values()) <= 2**29 * TRAJECTORY_LIMIT / 50


def test_files(results, out):
    assert {path.name for path in out.iterdir()} == {"model.py", "weights.safetensors", "differences.png"}
    classes = [node.name for node in ast.parse((out / "model.py").read_text()).body if isinstance(node, ast.ClassDef)]
    assert classes[-1] == "ResNet18"
    assert "conv1.weight" in safetensors.numpy.load_file(out / "weights.safetensors")
    assert_figures(out / "differences.png", size=10_000)
