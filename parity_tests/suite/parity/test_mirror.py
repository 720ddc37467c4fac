"""The packages mirror each other: files, names, signatures, docstring headings; and neither imports the other."""

import importlib
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import parity_tests
import probly_common
import probly_flax
import probly_torch.metrics

COMMON, TORCH, FLAX, TESTS = (
    Path(package.__file__).parent for package in (probly_common, probly_torch, probly_flax, parity_tests)
)
MODULES = sorted(path.stem for path in TORCH.iterdir() if not path.name.startswith(("_", "py.typed")))
# Every difference that has to be there, and why. One that is gone fails the suite too.
RENAMED = {
    (f"functional.batch_ensemble_{kind}", ours, theirs): "each framework's word, and its layout"
    for kind, names in {
        "linear": {"weight": "kernel"},
        "conv": {
            "weight": "kernel",
            "stride": "strides",
            "dilation": "kernel_dilation",
            "groups": "feature_group_count",
        },
        "conv_transpose": {"weight": "kernel", "stride": "strides", "dilation": "kernel_dilation"},
    }.items()
    for ours, theirs in names.items()
}
ONLY_TORCH = {
    ("functional.batch_ensemble_conv_transpose", "output_padding"): "nnx pads the input instead",
    ("functional.batch_ensemble_conv_transpose", "groups"): "nnx.ConvTranspose has none",
    **{
        (f"metrics.{name}", "kwargs"): "options of torchmetrics.Metric"
        for name in sorted(probly_torch.metrics.__all__)
        if name[0].isupper() and name != "ReliabilityBins"
    },
}
ONLY_FLAX = {
    ("functional.batch_ensemble_linear", "precision"): "an option of nnx.Linear, torch sets it globally",
    ("functional.batch_ensemble_linear", "dot_general"): "an option of nnx.Linear",
    ("functional.batch_ensemble_linear", "dot_general_kwargs"): "options of nnx.Linear",
    **{
        (f"functional.batch_ensemble_{kind}", name): "an option of nnx's convolutions"
        for kind, names in {
            "conv": ("input_dilation", "conv_general_dilated", "out_sharding"),
            "conv_transpose": ("transpose_kernel",),
        }.items()
        for name in (*names, "precision", "preferred_element_type")
    },
    ("ensemble.ensemble", "example_input"): "Linen modules have no weights before they see an input",
    ("random.key", "impl"): "jax.random has other generators",
    ("random.key", "dtype"): "jax.random has other generators",
    **{
        (f"random.{name}", "out_sharding"): "jax.random's own; torch shards tensors after they are made"
        for name in (
            "bernoulli",
            "bits",
            "categorical",
            "normal",
            "permutation",
            "randint",
            "truncated_normal",
            "uniform",
        )
    },
}
ONLY_FLAX_FILES = {
    "_layouts.py": "torch names its own tensors; each nnx layer needs a layout",
    "training/_clipping.py": "Lightning's modules clip by themselves",
    **dict.fromkeys((f"training/{name}.py" for name in ("_checks_fit", "_fit", "_steps")), "Lightning has its own"),
}
ONLY_TORCH_FILES = {
    **dict.fromkeys(
        (f"_{name}.py" for name in ("calls", "copies", "mlp", "state")),
        "torch's modules are run on copies; jax.vmap runs a network that nnx.merge makes anew",
    ),
    **dict.fromkeys(
        (f"port/_{name}.py" for name in ("functions", "helpers", "layers", "proof", "source", "trace", "translate")),
        "networks are translated from torch to Flax only",
    ),
    **dict.fromkeys(
        (f"random/_{name}.py" for name in ("draws", "instead", "rngs", "threefry", "xla")), "jax.random has its own"
    ),
    **dict.fromkeys(
        (f"training/_{name}.py" for name in ("_main__", "arguments", "callback", "mixin", "modules", "random_states")),
        "what Lightning is made of: modules, a callback, checkpoints and a command line",
    ),
}
ONLY_TORCH_NAMES = {
    "port": {
        "port": "networks are translated from torch to Flax only",
        "register_rule": "networks are translated from torch to Flax only",
        "to_flax_source": "networks are translated from torch to Flax only",
    },
    "training": dict.fromkeys(
        ("EnsembleClassifier", "EnsembleMetrics", "EnsembleMixin", "EnsembleRegressor"), "Lightning trains modules"
    ),
}
ONLY_FLAX_NAMES = {
    "training": {
        "clip_by_member_norm": "Lightning's modules clip by themselves",
        **dict.fromkeys(
            ("TrainState", "fit", "make_eval_step", "make_train_step"),
            "nnx has no trainer: steps and a loop around them",
        ),
    },
}
OTHER_DEFAULT = {
    ("random.bits", "dtype"): "jax names its default by None",
    ("functional.batch_ensemble_conv_transpose", "padding"): "the default of each framework",
}
HEADINGS = re.compile(r"^ *(Shape|Weights|Args|Returns|Raises|Example):$", re.MULTILINE)


def module(package, name):
    return importlib.import_module(f"{package.__name__}.{name}")


def public():
    for name in MODULES:
        for item in sorted({*module(probly_torch, name).__all__} - ONLY_TORCH_NAMES.get(name, {}).keys()):
            yield f"{name}.{item}", getattr(module(probly_torch, name), item), getattr(module(probly_flax, name), item)


def parameters(subject):
    signature = inspect.signature(subject.__init__ if inspect.isclass(subject) else subject)
    return {name: p for name, p in signature.parameters.items() if name != "self"}


def test_files_have_the_same_names():
    ours, theirs = (
        {str(p.relative_to(root)) for p in root.rglob("*.*") if "pyc" not in p.suffix} for root in (TORCH, FLAX)
    )
    assert ours - theirs == ONLY_TORCH_FILES.keys()
    assert theirs - ours == ONLY_FLAX_FILES.keys()


def test_nothing_stands_twice():
    """No two files of more than 20 lines are the same: what both packages share lies in probly_common."""
    texts = {}
    for path in (path for root in (COMMON, TORCH, FLAX, TESTS) for path in root.rglob("*.py")):
        texts.setdefault(path.read_bytes(), []).append(path)
    assert not [paths for text, paths in texts.items() if len(paths) > 1 and text.count(b"\n") > 20]


@pytest.mark.parametrize("name", ["", *MODULES])
def test_all_is_the_same_sorted_and_complete(name):
    ours, theirs = (module(p, name) if name else p for p in (probly_torch, probly_flax))
    only_flax = ONLY_FLAX_NAMES.get(name, {}).keys()
    assert only_flax <= {*theirs.__all__}
    assert ours.__all__ == sorted([*({*theirs.__all__} - only_flax), *ONLY_TORCH_NAMES.get(name, {})])
    assert theirs.__all__ == sorted(theirs.__all__)
    assert all(hasattr(package, item) for package in (ours, theirs) for item in package.__all__)


def test_signatures_agree_but_for_the_table():
    renamed, only_torch, only_flax, other_default = set(), set(), set(), set()
    for path, ours, theirs in public():
        a, b = parameters(ours), parameters(theirs)
        extra = [name for name in b if (path, name) in ONLY_FLAX]
        only_flax |= {(path, name) for name in extra}
        only_torch |= {(path, name) for name in a if (path, name) in ONLY_TORCH}
        a = {name: p for name, p in a.items() if (path, name) not in ONLY_TORCH}
        b = {name: p for name, p in b.items() if name not in extra}
        for (name, p), (other, q) in zip(a.items(), b.items(), strict=True):
            if name != other:
                renamed.add((path, name, other))
            if p.default != q.default:
                other_default.add((path, name))
            assert p.kind == q.kind, f"{path}({name})"
    assert renamed == RENAMED.keys()
    assert only_torch == ONLY_TORCH.keys()
    assert only_flax == ONLY_FLAX.keys()
    assert other_default == OTHER_DEFAULT.keys()


def methods(subject):
    """Returns the names of the methods of a class, with those of its bases in the same package."""
    package = subject.__module__.partition(".")[0]
    classes = [each for each in subject.__mro__ if each.__module__.partition(".")[0] == package]
    return {name for each in classes for name, v in vars(each).items() if inspect.isfunction(v)}


def test_methods_agree():
    call = {"forward": "__call__"}
    only_torch = {"extra_repr", "train", "apply", "reset_running_stats"}  # what nn.Module and its norms have
    only_flax = {"reset"}  # what torchmetrics.Metric has
    for path, ours, theirs in public():
        if not inspect.isclass(ours) or path.startswith("random."):
            continue
        a = {call.get(name, name) for name in methods(ours)} - only_torch
        b = methods(theirs) - only_flax
        assert {n for n in a if not n.startswith("_") or n.startswith("__")} == {
            n for n in b if (not n.startswith("_") or n.startswith("__")) and not n.startswith("_pytree")
        }, path


def test_docstring_headings_agree():
    for path, ours, theirs in public():
        if path.startswith("random."):  # jax and nnx document their own
            assert ours.__doc__, path
            continue
        headings = HEADINGS.findall(ours.__doc__)
        assert headings[-1:] == ["Example"], path
        assert headings == HEADINGS.findall(theirs.__doc__), path


@pytest.mark.parametrize(
    ("package", "forbidden"),
    [
        (
            "probly_common.checks.judging, probly_common.commands, probly_common.report, probly_common.standard, "
            "probly_common.weights.match, probly_common.weights.files, probly_common.weights.kinds",
            ("torch", "jax", "flax", "optax", "matplotlib"),
        ),
        ("probly_torch", ("jax", "flax", "optax", "lightning", "pytorch_lightning", "torchmetrics", "matplotlib")),
        ("probly_flax", ("torch", "lightning", "pytorch_lightning", "torchmetrics", "matplotlib")),
    ],
)
def test_importing_brings_neither_the_other_framework_nor_training_tools(package, forbidden):
    code = f"import sys, {package}; print([m for m in {forbidden!r} if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]", run.stdout
    assert run.stderr == ""
