"""python -m parity_tests compare: what it asks of `compare`, what it prints and writes, and what it refuses."""

import importlib
import json
import sys

import jax
import pytest
import torch

import probly_torch
from parity_tests import Integers
from parity_tests import __main__ as command
from parity_tests.suite.kit.test_report import report, tensor

TORCH = """\
from torch import nn


class Net(nn.Module):
    def __init__(self, width=5, kind="norm"):
        super().__init__()
        self.fc1 = nn.Linear(3, width)
        self.norm = nn.LayerNorm(width)
        self.fc2 = nn.Linear(width, 2)

    def forward(self, x):
        return self.fc2(self.norm(self.fc1(x)))


def with_options(**options):
    return Net(**options)


net = Net()
number = 3
"""
FLAX = """\
from flax import nnx


class Net(nnx.Module):
    def __init__(self, width=5, epsilon=1e-5, *, rngs):
        cheap = nnx.initializers.zeros_init()  # weights are torch's
        self.fc1 = nnx.Linear(3, width, kernel_init=cheap, rngs=rngs)
        self.norm = nnx.LayerNorm(width, epsilon=epsilon, use_fast_variance=False, rngs=rngs)
        self.fc2 = nnx.Linear(width, 2, kernel_init=cheap, rngs=rngs)

    def __call__(self, x):
        return self.fc2(self.norm(self.fc1(x)))


def wrong():
    return Net(epsilon=1e-3, rngs=nnx.Rngs(0))
"""
BOTH = ("torch_pair:Net", "flax_pair:Net")


@pytest.fixture(autouse=True)
def _pair(tmp_path, monkeypatch):
    """Writes modules of the caller, in the folder where the command runs, with JAX's own settings."""
    (tmp_path / "torch_pair.py").write_text(TORCH)
    (tmp_path / "flax_pair.py").write_text(FLAX)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    with jax.enable_x64(False), jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield
    for name in ("torch_pair", "flax_pair"):
        sys.modules.pop(name, None)


@pytest.fixture
def asked(monkeypatch):
    """Replaces `compare`, and returns what it is asked."""
    asked = {}

    def compare(torch_module, flax_module, *inputs, **options):
        asked.update(options, models=(torch_module, flax_module), inputs=inputs)
        return report(comparisons=[tensor("output")])

    monkeypatch.setattr(command, "compare", compare)
    return asked


def run(*argv):
    return command.main(["compare", *argv])


def test_parity_is_status_0_and_writes_every_report(tmp_path, capsys):
    options = [part for suffix in ("json", "html", "png") for part in ("--report", f"parity.{suffix}")]
    assert run(*BOTH, "--input", "7,3", "--seeds", "1", "--no-gradients", *options) == 0
    out, err = capsys.readouterr()
    assert err == ""
    lines = out.splitlines()
    assert lines[0].startswith("Net in torch and Net in Flax, eval mode, float32")
    assert [line.split()[0] for line in lines if line.split()[1:2] == ["Linear"]] == ["fc1", "fc2"]
    assert lines[-4].startswith("Parity: ")
    assert lines[-3:] == ["Wrote parity.json.", "Wrote parity.html.", "Wrote parity.png."]
    assert json.loads((tmp_path / "parity.json").read_text())["passed"] is True
    assert {path.name for path in tmp_path.glob("parity.*")} == {"parity.json", "parity.html", "parity.png"}


def test_no_parity_is_status_1_and_names_the_layer(capsys):
    assert run("torch_pair:net", "flax_pair:wrong", "--input", "7,3", "--seeds", "1", "--no-gradients") == 1
    out = capsys.readouterr().out
    assert "First divergence: norm: nnx epsilon is 0.001, torch eps is 1e-05" in out
    assert out.splitlines()[-1].startswith("No parity: ")


def test_weights_are_loaded_into_both(asked, capsys):
    saved = importlib.import_module("torch_pair").Net(width=7)
    probly_torch.save_weights(saved, "w.safetensors")
    sizes = ["--torch-args", '{"width": 7}', "--flax-args", '{"width": 7}', "--input", "1,3"]
    assert run(*BOTH, *sizes, "--weights", "w.safetensors", "--own-weights") == 0
    ours, theirs = asked["models"]
    assert asked["weights"] == "own"
    assert torch.equal(ours.fc1.weight, saved.fc1.weight)
    assert (theirs.fc1.kernel[...] == ours.fc1.weight.detach().numpy().T).all()
    assert run(*BOTH, *sizes, "--weights", "w.safetensors") == 0
    assert asked["weights"] == "copy"
    assert torch.equal(asked["models"][0].fc1.weight, ours.fc1.weight)


def test_options_become_arguments_of_compare(asked):
    assert run(*BOTH, "--input", "8,3", "--input", "8,16:1000") == 0
    assert asked["inputs"] == ((8, 3), Integers((8, 16), 1000))
    defaults = {name: value for name, value in asked.items() if name not in ("models", "inputs", "progress", "layers")}
    assert defaults == {
        "mode": "eval",
        "dtype": "float32",
        "gradients": True,
        "exact": None,
        "jit": True,
        "weights": "copy",
        "rename": {},
        "flatten": None,
        "known_gaps": {},
        "limit": 1.0,
        "seeds": None,
        "channels_last": None,
    }
    options = "--mode train --dtype bfloat16 --no-gradients --exact --no-jit --random-weights --rename ^a=b"
    options += " --flatten fc1=2,3,5 --no-channels-last --limit 0.5 --seeds 3"
    gaps = ["--known-gap", "norm.*=biased = by design"]
    assert run(*BOTH, "--input", "8,3", *options.split(), *gaps) == 0
    given = {name: value for name, value in asked.items() if name not in ("models", "inputs", "progress", "layers")}
    assert given == {
        "mode": "train",
        "dtype": "bfloat16",
        "gradients": False,
        "exact": True,
        "jit": False,
        "weights": "random",
        "rename": {"^a": "b"},
        "flatten": {"fc1": (2, 3, 5)},
        "known_gaps": {"norm.*": "biased = by design"},
        "limit": 0.5,
        "seeds": 3,
        "channels_last": False,
    }


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["torch_pair", BOTH[1]], "expects MODULE:NAME; got 'torch_pair'. Pass mypkg.model:build."),
        (["no_module:Net", BOTH[1]], "torch expects a module that can be imported; got no_module"),
        (
            ["torch_pair:Nut", BOTH[1]],
            "got 'Nut': module 'torch_pair' has no attribute 'Nut'. Pass one that it has: Net, with_options, net.",
        ),
        (["torch_pair:number", BOTH[1]], "torch expects a function or class that makes a torch module"),
        ([BOTH[0], "torch_pair:Net"], "flax expects a function that returns a flax module"),
        ([*BOTH, "--torch-args", "width=5"], """expects an object of JSON; got 'width=5'. Pass '{"width": 8}'."""),
        (
            [*BOTH, "--torch-args", '{"depth": 2}'],
            "--torch-args expects arguments of torch_pair:Net; got depth, where it",
        ),
        (
            [*BOTH, "--flax-args", '{"kind": 2}'],
            "--flax-args expects arguments of flax_pair:Net; got kind, where it has",
        ),
        ([*BOTH, "--input", "8,x"], "expects sizes above 0 with commas between; got '8,x'. Pass 8,3,32,32;"),
        ([*BOTH, "--input", "8:0"], "expects sizes above 0 with commas between; got '8:0'."),
        ([*BOTH, "--report", "parity.pdf"], "expects a name that ends in .json, .html or .png; got 'parity.pdf'. Pass"),
        ([*BOTH, "--report", "no/parity.png"], "Path('no').mkdir(parents=True)."),
        ([*BOTH, "--weights", "no.safetensors"], "--weights expects a safetensors file; got no.safetensors, which is"),
        ([*BOTH, "--rename", "a"], "expects PATTERN=REPLACEMENT; got 'a'."),
        ([*BOTH, "--flatten", "fc1"], "expects LAYER=CHANNELS,HEIGHT,WIDTH; got 'fc1'. Pass fc1=64,7,7."),
        ([*BOTH, "--known-gap", "norm"], "expects NAME=REASON; got 'norm'."),
        ([*BOTH, "--own-weights", "--random-weights"], "not allowed with argument"),
    ],
)
def test_arguments_that_cannot_be_used_are_status_2(argv, sentence, capsys):
    with pytest.raises(SystemExit) as error:
        run(*argv, *([] if "--input" in argv else ["--input", "7,3"]))
    assert error.value.code == 2
    assert sentence in capsys.readouterr().err


def test_arguments_may_have_any_name(asked):
    assert run(*BOTH, "--input", "7,3", "--torch-args", '{"kind": "other", "width": 7}') == 0
    assert asked["models"][0].fc1.out_features == 7


def test_what_compare_refuses_is_status_2_and_says_the_options_of_the_command(monkeypatch, capsys):
    def refuse(*args, **options):
        raise ValueError("compare expects shapes; got none. Pass channels_last=False.")

    monkeypatch.setattr(command, "compare", refuse)
    assert run(*BOTH, "--input", "7,3") == 2
    err = capsys.readouterr().err
    assert err.startswith("error: compare expects shapes")
    assert "channels_last=False is --no-channels-last." in err


@pytest.mark.parametrize("inputs", ["--input 7,4", "--input 7,3 --input 2,3:5"])
def test_inputs_that_do_not_fit_are_status_2(inputs, capsys):
    assert run(*BOTH, *inputs.split()) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: compare expects inputs that the torch model takes; it raised: ")


def test_progress_is_for_terminals(asked, capsys):
    run(*BOTH, "--input", "7,3")
    asked["progress"]("layer [1]")
    assert capsys.readouterr().err == ""
