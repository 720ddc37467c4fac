"""The command lines of porting: what they write, what they print, and what they refuse."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import safetensors.torch
import torch
from flax import nnx

import probly_flax
import probly_torch
from parity_tests.standard import assert_close
from parity_tests.suite.port.networks import randomized
from probly_flax.port import __main__ as to_checkpoint
from probly_torch.port import __main__ as to_twin

TORCH = """\
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self, affine=True):
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 3, padding=1)
        self.norm = nn.BatchNorm2d(5, eps=0.1, affine=affine)
        self.fc = nn.Linear(5 * 4 * 2, 7)

    def forward(self, x):
        x = self.norm(self.conv(x))
        return self.fc(torch.relu(x).flatten(1))


class Tagger(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 5)
        self.rnn = nn.RNN(5, 3, num_layers=2, batch_first=True)
        self.register_buffer("places", torch.arange(6))

    def forward(self, tokens, mask):
        x = self.embed(tokens) + self.embed(self.places[: tokens.shape[1]])
        x = self.rnn(x)[0].masked_fill(~mask[..., None], 0.5)
        return {"scores": x, "tags": x.argmax(-1)}


class Unknown(nn.Module):
    def forward(self, x):
        return torch.linalg.svd(x)[1]


def with_width(width):
    return Net()


def broken():
    raise RuntimeError("my own error")


number = 3
small = nn.Sequential(nn.Linear(3, 2), nn.Dropout(0.5))
net = Net()
"""
FLAX = """\
from flax import nnx


class Net(nnx.Module):
    def __init__(self, width=5, epsilon=0.1, *, rngs: nnx.Rngs):
        self.conv = nnx.Conv(3, width, (3, 3), padding=1, rngs=rngs)
        self.norm = nnx.BatchNorm(width, epsilon=epsilon, momentum=0.9, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)
        self.fc = nnx.Linear(width * 4 * 2, 7, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.norm(self.conv(x)))
        return self.fc(self.drop(x.reshape(len(x), -1)))


def build():
    return Net(rngs=nnx.Rngs(5))


def abstract():
    return nnx.eval_shape(build)


def other_epsilon(rngs):
    return nnx.eval_shape(lambda: Net(epsilon=1e-5, rngs=nnx.Rngs(0)))


def other_width():
    return nnx.eval_shape(lambda: Net(6, rngs=nnx.Rngs(0)))
"""
IMAGE = ["--input", "2,3,4,2"]


@pytest.fixture(autouse=True)
def _as_outside_of_the_suite():
    with jax.enable_x64(False), jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.fixture(scope="module")
def modules(tmp_path_factory):
    folder = tmp_path_factory.mktemp("modules")
    (folder / "my_torch.py").write_text(TORCH)
    (folder / "my_flax.py").write_text(FLAX)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        yield folder
        for name in ("my_torch", "my_flax"):
            sys.modules.pop(name, None)


@pytest.fixture
def my_torch(modules):
    import my_torch

    return my_torch


@pytest.fixture
def weights(my_torch, tmp_path):
    """Saves the network with random parameters and statistics, and returns it with its file."""
    network = randomized(my_torch.Net()).eval()
    path = tmp_path / "weights.safetensors"
    probly_torch.save_weights(network, path, flatten={"fc": (5, 4, 2)})
    return network, path


def images():
    return np.random.default_rng(0).normal(size=(2, 3, 4, 2)).astype(np.float32)


def assert_same_function(network, model):
    x = images()
    expected = network(torch.from_numpy(x)).detach().numpy()
    assert_close(np.asarray(model(np.moveaxis(x, 1, -1))), expected, "float32")


def refused(capsys, main, *arguments):
    with pytest.raises(SystemExit) as error:
        main([str(argument) for argument in arguments])
    assert error.value.code == 2
    return capsys.readouterr().err


def run(folder, *arguments):
    """Runs the command line as people have it, in the folder of their modules."""
    environment = os.environ | {"PYTHONPATH": str(Path(probly_torch.__file__).parents[1])}
    command = [sys.executable, "-m", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def executed(printed):
    """Executes the code that a command prints, and returns what it makes."""
    namespace = {}
    exec(printed[printed.index("\n\n", printed.index("Wrote")) :], namespace)
    return namespace


# -- torch to source and weights


def test_twin_from_the_command_line(weights, modules, tmp_path, monkeypatch):
    network, path = weights
    out = tmp_path / "deep" / "ported"
    printed = run(modules, "probly_torch.port", "my_torch:Net", *IMAGE, "--weights", path, "--out", out)
    assert {item.name for item in (tmp_path / "deep").iterdir()} == {"ported"}
    assert {item.name for item in out.iterdir()} == {"model.py", "weights.safetensors"}
    assert "(2, 7)" in printed
    monkeypatch.syspath_prepend(str(out))
    namespace = executed(printed)
    assert_same_function(network, namespace["model"])
    assert namespace["outputs"].shape == (2, 7)
    sys.modules.pop("model")


def test_twin_with_integers_masks_and_stacked_layers(my_torch, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(my_torch, "net", randomized(my_torch.Tagger()))
    out = tmp_path / "ported"
    status = to_twin.main(["my_torch:net", "--input", "int:2,4", "--input", "bool:2,4", "--out", str(out)])
    printed = capsys.readouterr().out
    assert status == 0
    assert "(2, 4, 3)" in printed
    assert "int64" in printed
    monkeypatch.syspath_prepend(str(out))
    with jax.enable_x64(True):  # which the code sets for good: it is put back
        namespace = executed(printed)
    jax.config.update("jax_enable_x64", False)
    assert {name: value.shape for name, value in namespace["outputs"].items()} == {"scores": (2, 4, 3), "tags": (2, 4)}
    sys.modules.pop("model")


def test_twin_that_draws_random_numbers(my_torch, tmp_path, capsys, monkeypatch):
    out = tmp_path / "ported"
    assert to_twin.main(["my_torch:small", "--input", "5,3", "--out", str(out)]) == 0
    monkeypatch.syspath_prepend(str(out))
    model = executed(capsys.readouterr().out)["model"]
    sys.modules.pop("model")
    x = np.ones((5, 3), np.float32)
    model.train()
    assert (np.asarray(model(x)) == 0).any()
    model.eval()
    expected = my_torch.small.eval()(torch.from_numpy(x)).detach().numpy()
    assert_close(np.asarray(model(x)), expected, "float32")


def test_a_twin_that_differs_is_not_kept(my_torch, tmp_path, capsys, monkeypatch):
    """A fault in the weights that are written, which the proof in float64 before cannot see."""

    def save_other(network, path):
        with torch.no_grad():
            network.fc.bias[2] *= 1.001
        probly_torch.save_weights(network, path)
        with torch.no_grad():
            network.fc.bias[2] /= 1.001

    monkeypatch.setattr(my_torch, "net", randomized(my_torch.Net()))
    monkeypatch.setattr(to_twin, "save_weights", save_other)
    assert to_twin.main(["my_torch:net", *IMAGE, "--out", str(tmp_path / "ported")]) == 1
    assert "got output 0, " in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_twin_errors_of_the_library(my_torch, tmp_path, capsys):
    out = tmp_path / "ported"
    assert to_twin.main(["my_torch:Unknown", "--input", "2,3", "--out", str(out)]) == 1
    error = capsys.readouterr().err
    assert "torch.linalg.svd" in error
    assert "register_rule" in error
    other = tmp_path / "other.safetensors"
    probly_torch.save_weights(torch.nn.Linear(3, 2), other)
    assert to_twin.main(["my_torch:Net", *IMAGE, "--weights", str(other), "--out", str(out)]) == 1
    assert "missing: conv.weight" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [other]


def test_twin_bad_arguments(my_torch, tmp_path, capsys):
    def says(text, network="my_torch:Net", inputs=IMAGE, *more, out="ported"):
        assert text in refused(capsys, to_twin.main, network, *inputs, "--out", tmp_path / out, *more)

    says("argument MODULE:NAME: expects MODULE:NAME; got 'my_torch'. Pass mypkg.model:build.", "my_torch")
    says("expects MODULE:NAME; got 'my_torch:Net()'", "my_torch:Net()")
    says("network expects a module that can be imported; got my_torchh: No module named 'my_torchh'", "my_torchh:Net")
    says("module 'my_torch' has no attribute 'Nett'. Pass one that it has: Net, Tagger, Unknown", "my_torch:Nett")
    says("got my_torch:number, which is int", "my_torch:number")
    says("which needs width. Write one: def build(): return with_width(width=...).", "my_torch:with_width")
    says(
        "returns a torch module; got my_torch:torch.is_grad_enabled, which returns bool",
        "my_torch:torch.is_grad_enabled",
    )
    says("got '1,x'. Pass 1,3,224,224", inputs=["--input", "1,x"])
    says("got 'half:1,2'", inputs=["--input", "half:1,2"])
    says("got float (2, 3, 5, 2), for which torch raises RuntimeError", inputs=["--input", "2,3,5,2"])
    says("--weights expects a safetensors file; got nowhere", "my_torch:Net", IMAGE, "--weights", "nowhere")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "flax", None)
        says("port expects flax, to run what it writes; got none. Install it: pip install flax.")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes").write_text("mine")
    says("nothing is overwritten", out="mine")
    assert [item.name for item in tmp_path.iterdir()] == ["mine"]
    with pytest.raises(RuntimeError, match="my own error"):  # with its traceback
        to_twin.main(["my_torch:broken", *IMAGE, "--out", str(tmp_path / "ported")])


# -- weights to a checkpoint


def test_checkpoint_from_the_command_line(weights, modules, tmp_path):
    network, path = weights
    printed = run(modules, "probly_flax.port", path, "--into", "my_flax:Net", "--out", tmp_path / "ported")
    assert {item.name for item in tmp_path.iterdir()} == {"ported", "weights.safetensors"}
    rows = [line.split() for line in printed.splitlines()]
    assert ["fc.weight", "fc.kernel", "(40,", "7)", "float32", "1,120"] in rows
    assert ["loaded", "8", "arrays", "1,788"] in rows
    model = executed(printed)["model"]
    model.eval()
    assert_same_function(network, model)


def port_weights(path, *arguments):
    return to_checkpoint.main([str(argument) for argument in (path, *arguments)])


def test_checkpoint_of_some_weights(weights, my_torch, tmp_path, capsys):
    """Other names, another dtype, and a layer that the file has not: each as an option asks for it."""
    network, path = weights
    arrays = {f"module.{name}": value.double() for name, value in network.state_dict().items() if "fc" not in name}
    del arrays["module.norm.num_batches_tracked"]
    safetensors.torch.save_file(arrays, path)
    out = tmp_path / "ported"
    into = ["--into", "my_flax:build", "--out", out]
    assert port_weights(path, *into) == 1
    error = capsys.readouterr().err
    assert "Pass rename={'^module\\\\.': ''}" in error
    assert "As options of this command: rename={'a': 'b'} is --rename a=b." in error
    into += ["--rename", r"^module\.="]
    assert port_weights(path, *into, "--ignore", "fc.*") == 1
    assert "cast=True is --cast" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [path]
    assert port_weights(path, *into, "--cast", "--not-strict") == 0
    captured = capsys.readouterr()
    assert "warning: load_weights" in captured.err
    assert "missing: fc.weight" in captured.err
    assert "fc.kernel (left as it was)" in captured.out
    assert "6 arrays" in captured.out
    model = executed(captured.out)["model"]
    ours = probly_flax.to_arrays(model)
    untouched = probly_flax.to_arrays(sys.modules["my_flax"].build())
    for name, tensor in network.state_dict().items():
        if "num_batches" not in name:
            expected = untouched[name] if "fc" in name else tensor.numpy()
            np.testing.assert_array_equal(ours[name], expected, strict=True)


def test_checkpoint_of_an_abstract_model_with_an_explicit_flatten(weights, tmp_path, capsys):
    network, path = weights
    probly_torch.save_weights(network, path)
    into = ["--into", "my_flax:abstract", "--out", tmp_path / "ported"]
    assert port_weights(path, *into, "--flatten", "fc=5,4,3") == 1
    assert "fc: (5, 4, 3) has 60 elements, not 40" in capsys.readouterr().err
    assert port_weights(path, *into, "--flatten", "fc=5,4,2") == 0
    model = executed(capsys.readouterr().out)["model"]
    model.eval()
    assert_same_function(network, model)


def test_checkpoint_errors_of_the_library(weights, tmp_path, capsys):
    _, path = weights
    out = ["--out", tmp_path / "ported"]
    assert port_weights(path, "--into", "my_flax:other_epsilon", *out) == 1
    error = capsys.readouterr().err
    assert "norm: epsilon 1e-05 here, 0.1 in the file" in error
    assert "check_options=False is --no-check-options" in error
    assert port_weights(path, "--into", "my_flax:other_width", "--no-flatten", *out) == 1
    assert "shape: conv.weight is (6, 3, 3, 3) here, (5, 3, 3, 3) there" in capsys.readouterr().err
    assert port_weights(path, "--into", "my_flax:abstract", "--ignore", "fc.*", *out) == 1
    assert "expects a model with values" in capsys.readouterr().err
    path.write_bytes(path.read_bytes()[:-1])
    assert port_weights(path, "--into", "my_flax:abstract", *out) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"error: load_weights expects a whole safetensors file; got {path}")
    assert "Traceback" not in error
    assert list(tmp_path.iterdir()) == [path]


def test_a_checkpoint_that_is_restored_otherwise_is_not_kept(weights, tmp_path, capsys, monkeypatch):
    def other(checkpointer, path, state):
        restored = nnx.clone(state)
        restored["fc"]["bias"] = restored["fc"]["bias"].replace(restored["fc"]["bias"][...] * -0.0)
        return restored

    monkeypatch.setattr(to_checkpoint.ocp.StandardCheckpointer, "restore", other)
    assert port_weights(weights[1], "--into", "my_flax:Net", "--out", tmp_path / "ported") == 1
    assert "got other bits for fc.bias" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [weights[1]]


def test_checkpoint_bad_arguments(weights, tmp_path, capsys):
    path = weights[1]

    def says(text, *more, into="my_flax:Net", file=path):
        arguments = [file, "--into", into, "--out", tmp_path / "ported", *more]
        assert text in refused(capsys, to_checkpoint.main, *arguments)

    says(
        "--into expects a function that returns a flax module; got my_torch:Net, which returns Net", into="my_torch:Net"
    )
    says("takes no arguments except rngs; got my_torch:with_width, which needs width", into="my_torch:with_width")
    says("weights expects a safetensors file; got nowhere", file="nowhere")
    says("argument --rename: expects PATTERN=REPLACEMENT; got 'a'", "--rename", "a")
    says("argument --flatten: expects LAYER=CHANNELS,HEIGHT,WIDTH; got 'fc=5,-1'", "--flatten", "fc=5,-1")
    assert list(tmp_path.iterdir()) == [path]


def test_a_long_table_is_cut(capsys):
    value = jax.numpy.zeros((2, 3))
    to_checkpoint._print_table([to_checkpoint.Row(f"{i}.weight", f"layers.{i}.kernel", value, True) for i in range(50)])
    printed = capsys.readouterr().out
    assert "39.weight" in printed
    assert "40.weight" not in printed
    assert "and 10 more" in printed
    assert "1 arrays" in printed  # they are one
    assert "24" in printed
