"""Files and checkpoints of the real world: whatever they hold, the model is right afterwards, or there is an error."""

import ast
import hashlib
import json
import os
import pickle
import re
import tracemalloc
import warnings
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch
from flax import nnx
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import probly_flax as pf
import probly_torch as pt
from parity_tests.kit.trees import jax_of
from parity_tests.standard import assert_close
from parity_tests.suite.networks.twins import BOTH, FLAX, TORCH
from parity_tests.suite.subjects.subject import without_draws

RNGS, NUMBERS = nnx.Rngs(0), np.random.default_rng(0)


def drawn(_, shape, dtype=jnp.float32, out_sharding=None):
    """Draws by numpy: JAX compiles its draws for each shape."""
    return jax_of(NUMBERS.normal(size=shape, scale=shape[0] ** -0.5), dtype)


KERNEL = {"kernel_init": drawn, "rngs": RNGS}


def net(f, dtype="float32"):
    return f.sequential(f.linear(3, 5, dtype=dtype), f.linear(5, 2, dtype=dtype))


def weights(dtype="float32", seed=0):
    """Draws weights of `net`, in torch's layout."""
    draw = np.random.default_rng(seed).standard_normal
    shapes = {"0.weight": (5, 3), "0.bias": (5,), "1.weight": (2, 5), "1.bias": (2,)}
    return {name: draw(shape).astype(dtype) for name, shape in shapes.items()}


def write(path, arrays, metadata=None):
    """Writes a file from elsewhere."""
    safetensors.numpy.save_file(arrays, path, metadata)
    return path


def assert_same(arrays, others):
    assert arrays.keys() == others.keys()
    for name, array in arrays.items():
        assert array.dtype == others[name].dtype
        assert array.tobytes() == others[name].tobytes(), name


def refused(f, model, call, error=ValueError, match=None):
    """Returns the sentence of an error that leaves the model as it was."""
    before = f.package.to_arrays(model)
    with pytest.raises(error, match=match) as raised:
        call()
    assert_same(f.package.to_arrays(model), before)
    return str(raised.value)


# What is in a file


def test_metadata_and_bytes(tmp_path):
    model = nn.Sequential(nn.Linear(3, 5), nn.LayerNorm(5, eps=1e-3), nn.GELU("tanh"))
    path = tmp_path / "w.safetensors"
    pt.save_weights(model, path)
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    with safetensors.safe_open(path, "pt") as file:
        metadata = file.metadata()
        assert file.keys() == sorted(model.state_dict())
    assert metadata.keys() == {"format", "framework", "sha256", "options"}
    assert metadata["framework"] == "torch"  # whose rows a flattened convolution has
    assert metadata["format"] == "pt"  # without which transformers refuses a file
    assert metadata["sha256"] == hashlib.sha256(content[start:]).hexdigest()
    assert json.loads(metadata["options"])["1"]["eps"] == 1e-3
    assert start % 8 == 0
    again = nn.Sequential(nn.Linear(3, 5), nn.LayerNorm(5, eps=1e-3), nn.GELU("tanh"))
    again.load_state_dict(safetensors.torch.load_file(path))
    assert_same(pt.to_arrays(again), pt.to_arrays(model))


@BOTH
def test_one_model_is_one_file(f, tmp_path):
    model = net(f)
    f.package.load_arrays(model, weights())
    f.package.save_weights(model, tmp_path / "w.safetensors")
    other = net(TORCH)
    pt.load_arrays(other, weights())
    pt.save_weights(other, tmp_path / "torch.safetensors")
    contents = []
    for name in ("w", "torch"):
        content = (tmp_path / f"{name}.safetensors").read_bytes()
        start = 8 + int.from_bytes(content[:8], "little")
        header = json.loads(content[8:start])
        assert header["__metadata__"].pop("framework") == ("torch" if f is TORCH or name == "torch" else "flax")
        contents.append((header, content[start:]))
    assert contents[0] == contents[1]


def test_every_dtype_that_torch_and_safetensors_have(tmp_path):
    dtypes = "bool uint8 int8 int16 int32 int64 uint16 uint32 uint64 float16 bfloat16 float32 float64 complex64"
    model, other = nn.Module(), nn.Module()
    for name in [*dtypes.split(), "float8_e4m3fn", "float8_e5m2"]:
        dtype = getattr(torch, name)
        for shape, suffix in (((3, 5), "matrix"), ((), "scalar"), ((0, 2), "empty")):
            value = torch.randint(0, 2, shape).to(dtype)
            model.register_buffer(f"{name}_{suffix}", value)
            other.register_buffer(f"{name}_{suffix}", torch.zeros(shape).to(dtype))
    pt.save_weights(model, tmp_path / "w.safetensors")
    pt.load_weights(other, tmp_path / "w.safetensors")
    plain = safetensors.torch.load_file(tmp_path / "w.safetensors")
    for name, value in model.state_dict().items():
        for loaded in (plain[name], other.state_dict()[name]):
            assert loaded.dtype == value.dtype
            assert loaded.tolist() == value.tolist(), name
    assert_same(pt.to_arrays(other), pt.to_arrays(model))


def test_dtypes_and_names_that_a_file_cannot_have(tmp_path):
    model = nn.Module()
    model.register_buffer("z", torch.zeros(2, dtype=torch.complex128))
    model.register_buffer("__metadata__", torch.zeros(2))
    with pytest.raises(ValueError, match=r"got z of complex128, __metadata__ of float32 for .*w.safetensors"):
        pt.save_weights(model, tmp_path / "w.safetensors")
    assert not list(tmp_path.iterdir())


def test_foreign_layouts_and_byte_orders_are_read_for_what_they_show():
    for f in (TORCH, FLAX):
        model = net(f)
        odd = {name: np.asfortranarray(a).astype(a.dtype.newbyteorder(">")) for name, a in weights().items()}
        f.package.load_arrays(model, odd)
        assert_same(f.package.to_arrays(model), weights())


def test_memory_for_one_tensor_at_a_time(tmp_path):
    sizes = [(257, 256)] * 24
    ours = nn.Sequential(*(nn.Linear(i, o, bias=False) for o, i in sizes))
    theirs = nnx.Sequential(*(nnx.Linear(i, o, use_bias=False, **KERNEL) for o, i in sizes))
    total = sum(array.nbytes for array in pt.to_arrays(ours).values())
    for package, model in ((pt, ours), (pf, theirs)):
        for call in (package.save_weights, package.load_weights):
            call(model, tmp_path / "w.safetensors")
            tracemalloc.start()
            call(model, tmp_path / "w.safetensors")
            kept, peak = tracemalloc.get_traced_memory()  # JAX goes on with the arrays that were read
            tracemalloc.stop()
            assert peak - kept < 0.3 * total, call


# Tied weights


class Tied(nn.Module):
    """As language models are: what embeds words also scores them."""

    def __init__(self, tied=True):
        super().__init__()
        self.tok, self.head = nn.Embedding(7, 5), nn.Linear(5, 7, bias=False)
        if tied:
            self.head.weight = self.tok.weight


def same(f):
    layer = f.linear(4, 4)
    return f.sequential(layer, layer)


@BOTH
def test_tied_weights_are_kept_once_and_come_back(f, tmp_path):
    path = tmp_path / "w.safetensors"
    model, other = same(f), same(f)
    f.package.save_weights(model, path)
    with safetensors.safe_open(path, "np") as file:
        assert file.keys() == ["0.bias", "0.weight"]
        assert file.metadata().items() >= {"1.bias": "0.bias", "1.weight": "0.weight"}.items()
    f.package.load_weights(other, path)
    assert_same(f.package.to_arrays(other), f.package.to_arrays(model))
    apart = f.sequential(f.linear(4, 4), f.linear(4, 4))
    f.package.load_weights(apart, path)
    assert_same(f.package.to_arrays(apart), f.package.to_arrays(model))
    plain = nn.Sequential(*[nn.Linear(4, 4)] * 2)
    safetensors.torch.load_model(plain, path)
    assert_same(pt.to_arrays(plain), f.package.to_arrays(model))
    plain.load_state_dict(safetensors.torch.load_file(path), strict=False)


def test_tied_weights_from_elsewhere(tmp_path):
    model, path = Tied(), tmp_path / "w.safetensors"
    for recorded in (True, False):  # as save_model writes them, and as transformers does
        safetensors.torch.save_model(model, path)
        if not recorded:
            write(path, safetensors.numpy.load_file(path), {"format": "pt"})
        other = Tied()
        pt.load_weights(other, path)
        assert other.head.weight is other.tok.weight
        assert torch.equal(other.head.weight, model.head.weight)
    sentence = refused(TORCH, apart := Tied(tied=False), lambda: pt.load_weights(apart, path))
    assert "missing: tok.weight" in sentence
    arrays = {"tok.weight": np.ones((7, 5), "float32"), "head.weight": np.zeros((7, 5), "float32")}
    refused(TORCH, model, lambda: pt.load_weights(model, write(path, arrays)), match="tied in this model")
    arrays = {"0.bias": np.ones(4, "float32"), "0.weight": np.ones((4, 4), "float32")}
    for f in (TORCH, FLAX):
        f.package.load_weights(tied := same(f), write(path, arrays))
        assert f.package.to_arrays(tied)["1.weight"].all()
        clash = arrays | {"1.weight": np.zeros((4, 4), "float32")}
        refused(f, tied, lambda f=f, m=tied, c=clash: f.package.load_weights(m, write(path, c)), match="tied in this")


# Names


@BOTH
@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "_orig_mod.module.", "model.", "a+b."])
def test_prefixes_are_named_and_then_renamed(f, prefix, tmp_path):
    arrays = {prefix + name: array for name, array in weights().items()}
    model, path = net(f), write(tmp_path / "w.safetensors", arrays)
    sentence = refused(f, model, lambda: f.package.load_weights(model, path))
    suggested = re.search(r"\nPass rename=(.*)\.$", sentence).group(1)
    f.package.load_weights(model, path, rename=ast.literal_eval(suggested))
    assert_same(f.package.to_arrays(model), weights())
    wrapped = f.sequential(net(f))
    suggested = refused(f, wrapped, lambda: f.package.load_arrays(wrapped, weights())).rpartition("rename=")[2]
    f.package.load_arrays(wrapped, weights(), rename=ast.literal_eval(suggested.rstrip(".")))


def test_compiled_parts_and_checkpoints():
    compiled = {name.replace("0.", "0._orig_mod."): torch.tensor(array) for name, array in weights().items()}
    model = net(TORCH)
    sentence = refused(TORCH, model, lambda: pt.load_arrays(model, compiled))
    pt.load_arrays(model, compiled, rename=ast.literal_eval(sentence.rpartition("rename=")[2].rstrip(".")))
    assert_same(pt.to_arrays(model), weights())
    checkpoint = {"epoch": 3, "state_dict": {f"model.{name}": value for name, value in compiled.items()}}
    for f in (TORCH, FLAX):
        target = net(f)
        sentence = refused(f, target, lambda f=f, m=target: f.package.load_arrays(m, checkpoint), TypeError)
        assert sentence.endswith(r'load_arrays(model, checkpoint["state_dict"], rename={r"^model\.": ""}).')


@BOTH
def test_strict_false_loads_what_fits_and_says_the_rest(f):
    model = net(f)
    before = f.package.to_arrays(model)
    arrays = weights()
    arrays["bias"] = arrays.pop("1.bias")
    with pytest.warns(UserWarning, match=r"loads 3 arrays.*\n  missing: 1.bias.*\n  unexpected: bias\n") as caught:
        f.package.load_arrays(model, arrays, strict=False)
    assert caught[0].filename == __file__
    expected = {name: array for name, array in arrays.items() if name != "bias"} | {"1.bias": before["1.bias"]}
    assert_same({name: expected[name] for name in before}, f.package.to_arrays(model))
    arrays["0.bias"] = np.zeros(4, "float32")
    refused(f, model, lambda: f.package.load_arrays(model, arrays, strict=False), match=r"shape: 0.bias is \(5,\) here")
    refused(f, model, lambda: f.package.load_arrays(model, {}, strict=False), match="missing: 0.bias")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        refused(f, model, lambda: f.package.load_arrays(model, {"1.bias": arrays["bias"]}, strict=False), UserWarning)


@BOTH
def test_rename_and_ignore(f):
    load, model = f.package.load_arrays, net(f)
    before = f.package.to_arrays(model)
    arrays = {name.replace("1.", "head.3."): array for name, array in weights().items()}
    load(model, arrays, rename={r"^head\.(\d)\.": r"1."}, ignore="0.*")
    after = f.package.to_arrays(model)
    assert_same(after, {name: (before if name[0] == "0" else weights())[name] for name in after})
    load(model, {**weights(seed=1), "optimizer.step": np.zeros(1)}, ignore=["optimizer.*", "1.bias"])
    assert_same(f.package.to_arrays(model), {**weights(seed=1), "1.bias": weights()["1.bias"]})
    for options, error, match in (
        (
            {"ignore": ["0.*", "haed.*"]},
            ValueError,
            r"got \['haed.\*'\], which match none.*Leave them out: ignore=\['0.\*'\]",
        ),
        ({"ignore": [3]}, TypeError, "name patterns"),
        ({"ignore": 3}, TypeError, "name patterns"),
        ({"rename": {"(": ""}}, ValueError, r"Python refuses: .*pass re.escape\('\('\)"),
        ({"rename": {"0": r"\2"}}, ValueError, "invalid group reference"),
        ({"rename": "module"}, TypeError, "map regular expressions"),
        ({"rename": {r"\d\.": "x."}}, ValueError, "0.weight and 1.weight, which both become x.weight"),
    ):
        refused(f, model, lambda options=options: load(model, weights(), **options), error, match)


@BOTH
def test_near_names_are_suggested(f):
    arrays = weights()
    arrays["0.wieght"] = arrays.pop("0.weight")
    sentence = refused(f, model := net(f), lambda: f.package.load_arrays(model, arrays))
    assert "missing: 0.weight (rename 0.wieght?)" in sentence


def test_batch_counts_may_be_missing(tmp_path):
    ours, theirs = nn.BatchNorm1d(5), nnx.BatchNorm(5, momentum=0.9, rngs=RNGS)
    ours.num_batches_tracked += 3
    arrays = {name: a for name, a in pt.to_arrays(ours).items() if name != "num_batches_tracked"}
    for package, model in ((pt, ours), (pf, theirs)):
        package.load_weights(model, write(tmp_path / "w.safetensors", arrays))
    assert ours.num_batches_tracked == 3


# Values


@BOTH
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16", "float16"])
def test_floats_are_converted_only_when_asked(f, dtype, tmp_path):
    for other in ("float32", "float64", "bfloat16", "float16"):
        model, path = net(f, dtype), write(tmp_path / "w.safetensors", weights(other))
        if other != dtype:
            sentence = refused(f, model, lambda m=model, p=path: f.package.load_weights(m, p))
            assert f"dtype: 0.bias is {dtype} here, {other} there" in sentence
            assert sentence.endswith("pass cast=True.")
        f.package.load_weights(model, path, cast=True)
        assert_same(f.package.to_arrays(model), {n: a.astype(dtype) for n, a in weights(other).items()})
    integers = {name: np.ones(a.shape, "int32") for name, a in weights().items()}
    for arrays in (integers, {name: a.astype("complex64") for name, a in weights().items()}):
        refused(f, model, lambda a=arrays: f.package.load_arrays(model, a, cast=True), match="dtype: 0.bias")


def test_jax_without_64_bits_truncates_nothing():
    with jax.enable_x64(False):
        model = net(FLAX)
        refused(FLAX, model, lambda: pf.load_arrays(model, weights("float64")), match="pass cast=True")
        pf.load_arrays(model, weights("float64"), cast=True)
        assert_same(pf.to_arrays(model), {n: a.astype("float32") for n, a in weights("float64").items()})


@BOTH
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_named(f, bad, tmp_path):
    for dtype in ("float32", "float64", "bfloat16", "float16"):
        arrays, model = weights(dtype), net(f, dtype)
        arrays["0.weight"][3, 2] = bad
        path = write(tmp_path / "w.safetensors", arrays)
        with pytest.warns(UserWarning, match=r"NaN or infinite.*\n  0.weight\n") as caught:
            f.package.load_weights(model, path)
        assert len(caught) == 1
        assert caught[0].filename == __file__
        assert_same(f.package.to_arrays(model), arrays)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        f.package.load_weights(model, path, ignore="0.weight")
        refused(f, model, lambda: f.package.load_weights(model, path), UserWarning)


@BOTH
def test_values_out_of_the_range_of_a_dtype_are_named(f, tmp_path):
    arrays, model = weights("float64"), net(f, "float16")
    arrays["0.weight"][0, 0] = 1e6
    path = write(tmp_path / "w.safetensors", arrays)
    for call in (
        lambda: f.package.load_weights(model, path, cast=True),
        lambda: f.package.load_arrays(model, arrays, cast=True),
    ):
        with pytest.warns(UserWarning, match=r"in the dtype they have here:\n  0.weight\n"):
            call()


def test_a_value_that_a_layer_has_no_place_for_is_found_before_anything_is_loaded():
    model = nnx.Sequential(
        nnx.Linear(3, 3, **KERNEL), nnx.RNN(nnx.GRUCell(3, 2, recurrent_kernel_init=drawn, **KERNEL))
    )
    arrays = pf.to_arrays(model) | {"0.bias": np.ones(3, "float32"), "1.bias_hh_l0": np.ones(6, "float32")}
    refused(FLAX, model, lambda: pf.load_arrays(model, arrays), match="expects bias_hh to be 0 for n")
    sentence = refused(FLAX, model, lambda: pf.load_arrays(model, arrays, ignore="1.bias_hh_l0"))
    assert sentence.endswith("ignore=['1.bias_ih_l0', '1.bias_hh_l0'].")
    pf.load_arrays(model, arrays, ignore=["1.bias_*"])
    assert pf.to_arrays(model)["0.bias"].all()


def test_models_without_values():
    with pytest.raises(ValueError, match=r"got meta tensors, such as 0.weight"):
        pt.to_arrays(nn.Sequential(nn.Linear(3, 5, device="meta")))
    with pytest.raises(ValueError, match=r"to_empty\(device='cpu'\)"):
        pt.load_arrays(nn.Linear(2, 2, device="meta"), pt.to_arrays(nn.Linear(2, 2)))
    with pytest.raises(ValueError, match=r"Call the network once first"):
        pt.load_arrays(nn.LazyLinear(5), {})
    abstract = nnx.eval_shape(lambda: nnx.Linear(3, 5, rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match=r"got one without values for weight. .*load_weights\(model, path\)"):
        pf.to_arrays(abstract)


# Flattened convolutions


def conv_net(f, height, width, channels=6):
    if f is TORCH:
        return nn.Sequential(
            nn.Conv2d(3, channels, 3), nn.ReLU(), nn.Flatten(), nn.Linear(channels * height * width, 5)
        ).double()
    flatten = lambda x: x.reshape(x.shape[0], -1)  # noqa: E731
    options = {"param_dtype": jnp.float64, **KERNEL}
    conv = nnx.Conv(3, channels, (3, 3), padding="VALID", **options)
    return nnx.Sequential(conv, nnx.relu, flatten, nnx.Linear(channels * height * width, 5, **options))


@pytest.mark.parametrize(("height", "width"), [(4, 7), (5, 5)])
def test_what_a_convolution_flattens_goes_where_it_belongs(height, width, tmp_path):
    ours, theirs, path = conv_net(TORCH, height, width), conv_net(FLAX, height, width), tmp_path / "w.safetensors"
    x = torch.randn(2, 3, height + 2, width + 2, dtype=torch.float64)
    channels_last = jax_of(x.permute(0, 2, 3, 1).numpy())
    flatten = {"3": (6, height, width)}
    pt.save_weights(ours, path, flatten=flatten)
    pf.load_weights(theirs, path)
    assert_close(np.asarray(theirs(channels_last)), ours(x).detach().numpy(), "float64")
    assert_same(pf.to_arrays(theirs, flatten=flatten), pt.to_arrays(ours))
    pf.load_arrays(fresh := conv_net(FLAX, height, width), pt.to_arrays(ours, flatten=flatten), flatten=flatten)
    assert_same(pf.to_arrays(fresh), pf.to_arrays(theirs))
    pf.save_weights(theirs, path, flatten=flatten)
    pt.load_weights(back := conv_net(TORCH, height, width), path, flatten=flatten)
    assert_same(pt.to_arrays(back), pt.to_arrays(ours))
    pf.load_weights(fresh, path, flatten={})
    assert not np.array_equal(fresh.layers[3].kernel[...], theirs.layers[3].kernel[...])


def test_a_flattened_convolution_without_a_shape_is_refused_when_it_is_known(tmp_path):
    theirs, path = conv_net(FLAX, 4, 7), tmp_path / "w.safetensors"
    pt.save_weights(conv_net(TORCH, 4, 7), path)
    sentence = refused(FLAX, theirs, lambda: pf.load_weights(theirs, path))
    assert 'Pass flatten={"3": (6, height, width)}' in sentence
    assert "3 reads 168 = 6 x 28" in sentence
    pf.load_weights(theirs, path, flatten={"3": (6, 4, 7)})
    pf.load_weights(theirs, path, flatten={})
    one = conv_net(FLAX, 1, 1)
    pt.save_weights(conv_net(TORCH, 1, 1), path)
    pf.load_weights(one, path)
    renamed = {f"model.{name}": a for name, a in pt.to_arrays(conv_net(TORCH, 4, 7)).items()}
    options = {"model.3": {"kind": "Linear", "bias": True, "flatten_channels": 6}}
    write(path, renamed, {"options": json.dumps(options), "flatten": json.dumps({"model.3": [6, 4, 7]})})
    pf.load_weights(theirs, path, rename={r"^model\.": ""})
    expected = conv_net(FLAX, 4, 7)
    pf.load_arrays(expected, renamed, rename={r"^model\.": ""}, flatten={"3": (6, 4, 7)})
    assert_same(pf.to_arrays(theirs), pf.to_arrays(expected))


def test_a_file_from_flax_says_whether_its_rows_are_in_torchs_order(tmp_path):
    theirs, ours, path = conv_net(FLAX, 4, 7), conv_net(TORCH, 4, 7), tmp_path / "w.safetensors"
    pf.save_weights(theirs, path)
    pf.load_weights(conv_net(FLAX, 4, 7), path)
    for flatten in (None, {"3": (6, 4, 7)}):
        sentence = refused(TORCH, ours, lambda flatten=flatten: pt.load_weights(ours, path, flatten=flatten))
        assert "3 reads 168 = 6 x 28" in sentence
        assert 'Pass flatten={"3": (6, height, width)} to save_weights in Flax, which wrote this file' in sentence
    before = pt.to_arrays(ours)["3.weight"]
    pt.load_weights(ours, path, ignore="3.*")
    np.testing.assert_array_equal(pt.to_arrays(ours)["3.weight"], before)
    pt.load_weights(ours, path, flatten={})
    assert_same(pt.to_arrays(ours), pf.to_arrays(theirs))
    pf.save_weights(theirs, path, flatten={})  # it transposes by itself
    pt.load_weights(ours, path)
    assert_same(pt.to_arrays(ours), pf.to_arrays(theirs))
    pt.save_weights(ours, path, flatten={})
    pf.load_weights(fresh := conv_net(FLAX, 4, 7), path)
    assert_same(pf.to_arrays(fresh), pt.to_arrays(ours))
    one = conv_net(FLAX, 1, 1)
    pf.save_weights(one, path)
    pt.load_weights(conv_net(TORCH, 1, 1), path)


class Vgg(nn.Module):
    """Whose call, where it flattens, cannot be seen."""

    def __init__(self, size, channels=5, norm=None, **_):
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, channels, 3), nn.BatchNorm2d(norm or channels))
        self.classifier = nn.Sequential(nn.Linear(size, 2), nn.Linear(2, 8), nn.Linear(8, 2))


class FlaxVgg(nnx.Module):
    def __init__(self, size, channels=5, norm=None):
        conv = nnx.Conv(3, channels, (3, 3), padding="VALID", **KERNEL)
        self.features = nnx.Sequential(conv, nnx.BatchNorm(norm or channels, momentum=0.9, rngs=RNGS))
        self.classifier = nnx.Sequential(*[nnx.Linear(i, o, **KERNEL) for i, o in ((size, 2), (2, 8), (8, 2))])


@pytest.mark.parametrize(("write_it", "read_it", "own", "other"), [(pt, pf, Vgg, FlaxVgg), (pf, pt, FlaxVgg, Vgg)])
def test_a_flatten_that_cannot_be_seen_is_asked_for(write_it, read_it, own, other, tmp_path):
    path = tmp_path / "w.safetensors"
    write_it.save_weights(own(45), path)
    with pytest.warns(UserWarning, match=r"classifier\.0 after a convolution of 5 channels.*\(5, 3, 3\)"):
        read_it.load_weights(other(45), path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        write_it.load_weights(own(45), path)
        read_it.load_weights(other(45), path, flatten={})
        read_it.load_weights(other(45), path, ignore="classifier.0.*")
        for options in ({"size": 5}, {"size": 10}, {"size": 9, "channels": 1}, {"size": 20, "norm": 20}):
            write_it.save_weights(own(**options), path)
            read_it.load_weights(other(**options), path)
        told = {"classifier.0": (5, 3, 3)}
        write_it.save_weights(own(45), path, flatten=told)
        read_it.load_weights(other(45), path)


def test_normalisations_of_a_flattened_convolution_are_put_in_order_too(tmp_path):
    def twin():
        flat = lambda x: x.reshape(x.shape[0], -1)  # noqa: E731
        norms = (
            nnx.BatchNorm(60, use_running_average=True, momentum=0.9, epsilon=1e-5, rngs=RNGS),
            nnx.LayerNorm(60, epsilon=1e-5, rngs=RNGS),
        )
        conv = nnx.Conv(3, 5, (2, 2), padding="VALID", **KERNEL)
        return nnx.Sequential(conv, flat, *norms, nnx.Linear(60, 2, **KERNEL))

    layers = nn.Conv2d(3, 5, 2), nn.Flatten(), nn.BatchNorm1d(60), nn.LayerNorm(60), nn.Linear(60, 2)
    ours, path = nn.Sequential(*layers).eval(), tmp_path / "w.safetensors"
    for value in (*ours.parameters(), *ours.buffers()):
        if value.is_floating_point():
            value.data.uniform_(0.5, 2)
    flatten, x = dict.fromkeys("234", (5, 3, 4)), torch.randn(2, 3, 4, 5)
    pt.save_weights(ours, path)
    sentence = refused(FLAX, theirs := twin(), lambda: pf.load_weights(theirs, path, flatten={"4": (5, 3, 4)}))
    assert 'Pass flatten={..., "2": (5, height, width), "3": (5, height, width)}' in sentence
    pt.save_weights(ours, path, flatten=flatten)
    pf.load_weights(theirs, path)
    y = theirs(jax_of(x.permute(0, 2, 3, 1).numpy()))
    assert_close(np.asarray(y), ours(x).detach().numpy(), "float32")
    assert_same(pf.to_arrays(theirs, flatten=flatten), pt.to_arrays(ours))


def test_rows_of_members_are_put_in_order_too():
    ours, theirs = nn.Linear(12, 5), nnx.Linear(12, 5, **KERNEL)
    flatten, order = {"": (2, 2, 3)}, np.arange(12).reshape(2, 2, 3).transpose(1, 2, 0).reshape(-1)
    a = pt.BatchEnsembleLinear(ours, num_members=3)
    b = without_draws(lambda: pf.BatchEnsembleLinear(theirs, num_members=3))
    pf.load_arrays(b, pt.to_arrays(a), flatten=flatten)
    np.testing.assert_array_equal(b.r[...], a.r.detach().numpy()[:, order])
    np.testing.assert_array_equal(b.kernel[...], a.weight.detach().numpy().T[order])
    np.testing.assert_array_equal(b.s[...], a.s.detach().numpy())
    assert_same(pf.to_arrays(b, flatten=flatten), pt.to_arrays(a))


@BOTH
def test_shapes_that_do_not_fit_are_named(f):
    model = net(f)
    for flatten, error, match in (
        ({"0": (2, 2)}, ValueError, r"0: \(2, 2\) has 4 elements, not 3"),
        ({"2": (3,)}, ValueError, r"2: no Linear layer(.|\n)*in_features: 0 \(3\), 1 \(5\)"),
        ({"0": (3, 0)}, ValueError, r"0: '\(3, 0\)' is not"),
        ({"0": (3.0,)}, ValueError, r"0: '\(3.0,\)' is not"),
        ({"0": "3"}, ValueError, "0: .* is not"),
        ({"0": 3}, ValueError, "0: 3 is not"),
        ([3], TypeError, "got list"),
    ):
        for call in (
            lambda flatten=flatten: f.package.to_arrays(model, flatten=flatten),
            lambda flatten=flatten: f.package.load_arrays(model, weights(), flatten=flatten),
        ):
            refused(f, model, call, error, match)


# Options


@BOTH
def test_options_are_compared_unless_told(f, tmp_path):
    path = tmp_path / "w.safetensors"
    pt.save_weights(nn.LayerNorm(5, eps=1e-3), path)
    model = nn.LayerNorm(5) if f is TORCH else nnx.LayerNorm(5, epsilon=1e-5, rngs=RNGS)
    assert "0.001 in the file" in refused(f, model, lambda: f.package.load_weights(model, path))
    f.package.load_weights(model, path, check_options=False)


# Damaged files


def header(content, body=b""):
    text = content if isinstance(content, bytes) else json.dumps(content).encode()
    return len(text).to_bytes(8, "little") + text + body


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


class Boom:
    def __reduce__(self):
        return os.mkdir, ("unpickled",)


DAMAGED = {
    "empty": b"",
    "short": b"\x00" * 7,
    "text": b"not safetensors at all",
    "a header of 2**60 bytes": (2**60).to_bytes(8, "little") + b"{}",
    "a header beyond the end": (2**40).to_bytes(8, "little"),
    "no JSON": header(b"{'a': 1}"),
    "no text": header(b'{"\xff": {}}'),
    "a list": header(b"[]"),
    "nested deeply": header(b'{"a":' + b"[" * 5000),
    "a body too short": header({"a": entry()}, b"\x00" * 7),
    "a body too long": header({"a": entry()}, b"\x00" * 9),
    "an unknown dtype": header({"a": entry("Q\n8")}, b"\x00" * 8),
    "a dtype that NumPy has not": header({"a": entry("F4", (16,))}, b"\x00" * 8),
    "a shape of other bytes": header({"a": entry(shape=(3,))}, b"\x00" * 8),
    "a negative size": header({"a": entry(shape=(-2,))}, b"\x00" * 8),
    "a huge size": header({"a": entry(shape=(2**62, 2**62))}, b"\x00" * 8),
    "an overlap": header({"a": entry(), "b": entry(offsets=(4, 12))}, b"\x00" * 12),
    "a gap": header({"a": entry(), "b": entry(offsets=(12, 20))}, b"\x00" * 20),
    "a name twice": header(b'{"a": %b, "a": %b}' % ((json.dumps(entry()).encode(),) * 2), b"\x00" * 8),
    "metadata of numbers": header({"__metadata__": {"a": 1}, "a": entry()}, b"\x00" * 8),
    "a pickle": pickle.dumps(Boom()),
    "a zip": b"PK\x03\x04" + bytes(100),
    "another sha256": header({"__metadata__": {"sha256": "0" * 64}, "0.bias": entry()}, b"\x00" * 8),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_file_is_named(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "w.safetensors"
    path.write_bytes(DAMAGED[name])
    sentences = []
    for f in (TORCH, FLAX):
        sentences.append(
            refused(f, model := net(f), lambda f=f, m=model: f.package.load_weights(m, path, strict=False))
        )
    assert sentences[0] == sentences[1]
    assert str(path) in sentences[0]
    assert "\n" not in sentences[0] or "sha256" in name
    assert [p.name for p in tmp_path.iterdir()] == ["w.safetensors"]
    if name in ("a pickle", "a zip"):
        assert "torch.load(path, weights_only=True)" in sentences[0]


@BOTH
def test_no_file(f, tmp_path):
    model = net(f)
    path = tmp_path / "nowhere.safetensors"
    assert str(path) in refused(f, model, lambda: f.package.load_weights(model, path), FileNotFoundError)
    assert str(tmp_path) in refused(f, model, lambda: f.package.load_weights(model, tmp_path), IsADirectoryError)
    with pytest.raises(IsADirectoryError):
        f.package.save_weights(model, tmp_path)
    with pytest.raises(FileNotFoundError, match="missing"):
        f.package.save_weights(model, tmp_path / "missing" / "w.safetensors")


@BOTH
def test_a_flipped_bit_is_found(f, tmp_path):
    path = tmp_path / "w.safetensors"
    f.package.save_weights(net(f), path)
    content = bytearray(path.read_bytes())
    content[-3] ^= 16
    path.write_bytes(content)
    model = net(f)
    assert "the sha256 of its bytes is" in refused(f, model, lambda: f.package.load_weights(model, path))


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), f=st.sampled_from([TORCH, FLAX]), ours=st.booleans(), of_header=st.booleans())
def test_whatever_happens_to_its_bytes(data, f, ours, of_header, tmp_path, damaged):
    """Without a sha256 other values cannot be told from the right ones: the body of such a file changes its size."""
    content, target = damaged.files[ours], damaged.models[f.package.__name__]
    start = 8 + int.from_bytes(content[:8], "little")
    parts = [bytearray(content[:start]), bytearray(content[start:])]
    part, number = parts[not of_header], st.integers(1, 9)
    if of_header or ours:
        for _ in range(data.draw(st.integers(1, 3))):
            place = data.draw(st.integers(0, len(part) - 1))
            kind = data.draw(st.sampled_from(["flip", "set", "cut", "insert"]))
            if kind == "flip":
                part[place] ^= 1 << data.draw(st.integers(0, 7))
            elif kind == "set":
                part[place] = data.draw(st.sampled_from(b'09",:{}[]-e \\\x00\xff'))
            elif kind == "cut" and len(part) > 30:
                del part[place : place + data.draw(number)]
            else:
                part[place:place] = data.draw(st.binary(min_size=1, max_size=9))
    elif data.draw(st.booleans()):
        del part[-data.draw(number) :]
    else:
        part += bytes(data.draw(number))
    path = tmp_path / "w.safetensors"
    path.write_bytes(parts[0] + parts[1])
    before = f.package.to_arrays(target)
    try:
        f.package.load_weights(target, path)
    except ValueError:
        assert_same(f.package.to_arrays(target), before)
    else:
        assert_same(f.package.to_arrays(target), weights())
        f.package.load_arrays(target, before)


@pytest.fixture(scope="module")
def damaged(tmp_path_factory):
    """Makes a file of ours and one without sha256, and models with other values."""
    folder = tmp_path_factory.mktemp("files")
    model = net(TORCH)
    pt.load_arrays(model, weights())
    pt.save_weights(model, folder / "ours")
    write(folder / "theirs", weights())
    models = {f.package.__name__: net(f) for f in (TORCH, FLAX)}
    return SimpleNamespace(
        files={True: (folder / "ours").read_bytes(), False: (folder / "theirs").read_bytes()}, models=models
    )


# Hostile text


HOSTILE = [
    "__class__",
    "../../x",
    "a\nb: loaded",
    "\x1b[2J",
    "x" * 5000,
    "{0.__class__}",
    "0.weight.__class__",
    "é" * 300,
    "",
]


def test_names_are_shown_and_never_used(tmp_path):
    arrays = {name: np.zeros(1, "float32") for name in HOSTILE}
    path = write(tmp_path / "w.safetensors", {**weights(), **arrays})
    for f in (TORCH, FLAX):
        sentence = refused(f, model := net(f), lambda f=f, m=model: f.package.load_weights(m, path))
        assert f"got {len(HOSTILE)} differences" in sentence
        assert len(sentence.splitlines()) == len(HOSTILE) + 2
        assert len(sentence) < 2000
        assert sentence.isascii()
        assert "\x1b" not in sentence
        with pytest.warns(UserWarning, match="__class__"):
            f.package.load_weights(model, path, strict=False)
        assert_same(f.package.to_arrays(model), weights())
        f.package.load_weights(model, path, ignore=["[!01]*", "*__class__", ""])
    assert [p.name for p in tmp_path.iterdir()] == ["w.safetensors"]


def test_very_many_names(tmp_path):
    entries = {f"{i}.layer.weight": entry("U8", (1,), (i, i + 1)) for i in range(30_000)}
    path = tmp_path / "w.safetensors"
    path.write_bytes(header(entries, bytes(30_000)))
    sentence = refused(TORCH, model := net(TORCH), lambda: pt.load_weights(model, path))
    assert "got 30004 differences" in sentence
    assert "and 28004 more" in sentence


@pytest.mark.parametrize(
    ("key", "text"),
    [
        (key, text)
        for key in ("options", "flatten")
        for text in ("{", "[1]", "[" * 9000, '{"0": 1' + "0" * 5000 + "}", "\x00")
    ]
    + [("flatten", text) for text in ('{"0": "x"}', '{"0": [9]}', '{"0": [3, null]}', '{"0": {"a": 1}}')]
    + [("options", text) for text in ('{"0": {"flatten_channels": "1"}}', '{"0": 3}', '{"x\\n": {"kind": "Linear"}}')],
)
def test_metadata_is_read_as_text(key, text, tmp_path):
    """Either it has no meaning, or it is an error."""
    path = write(tmp_path / "w.safetensors", weights(), {key: text})
    for f in (TORCH, FLAX):
        model = net(f)
        before = f.package.to_arrays(model)
        try:
            f.package.load_weights(model, path)
        except ValueError:
            assert_same(f.package.to_arrays(model), before)
        else:
            assert_same(f.package.to_arrays(model), weights())
            assert f is TORCH or key == "options"


def test_a_tie_to_nothing_is_no_tie(tmp_path):
    metadata = {"1.bias": "nothing", "x": "1.weight", "0.bias": "1.bias", "format": "0.bias"}
    path = write(tmp_path / "w.safetensors", weights(), metadata)
    for f in (TORCH, FLAX):
        f.package.load_weights(model := net(f), path)  # x is in the file as 1.weight
        assert_same(f.package.to_arrays(model), weights())
        refused(
            f, model, lambda f=f, m=model: f.package.load_weights(m, path, ignore="1.weight"), match="unexpected: x"
        )


def test_a_pickle_in_numpys_clothes():
    arrays = {**weights(), "0.bias": np.array([Boom()] * 5, object)}
    for f in (TORCH, FLAX):
        refused(
            f, model := net(f), lambda f=f, m=model: f.package.load_arrays(m, arrays, cast=True), match="object there"
        )


def test_eight_bits_go_through_numpy():
    tensor = torch.tensor([1.5, -2.0]).to(torch.float8_e4m3fn)
    (array,) = pt.to_arrays(nn.ParameterList([nn.Parameter(tensor, requires_grad=False)])).values()
    assert array.dtype == ml_dtypes.float8_e4m3fn
    assert array.astype("float32").tolist() == [1.5, -2.0]


# Models that cannot be written to, or read


class Pair(nn.Module):
    def __init__(self, buffer):
        super().__init__()
        self.first = nn.Linear(3, 2)
        self.last = nn.Module()
        self.last.register_buffer("scale", buffer)


def in_inference_mode():
    with torch.inference_mode():
        return torch.zeros(3)


@pytest.mark.parametrize(
    ("buffer", "reason"),
    [(lambda: torch.zeros(1).expand(3), "expanded"), (in_inference_mode, r"made under torch\.inference_mode\(\)")],
)
def test_a_tensor_that_cannot_be_written_to_is_found_before_anything_is_loaded(buffer, reason):
    model, arrays = Pair(buffer()), pt.to_arrays(Pair(torch.ones(3)))
    refused(TORCH, model, lambda: pt.load_arrays(model, arrays), match=rf"got last\.scale, which is {reason}")
    pt.load_arrays(model, arrays, ignore="last.*")
    np.testing.assert_array_equal(pt.to_arrays(model)["first.weight"], arrays["first.weight"])


class Copies(nn.Linear):
    def _save_to_state_dict(self, destination, prefix, keep_vars):
        destination[prefix + "weight"] = self.weight.detach().clone()


class Packed(nn.Linear):
    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "packed"] = (self.weight, torch.float32)


class Extra(nn.Linear):
    def get_extra_state(self):
        return torch.ones(3)


def test_a_state_dict_of_other_things_than_tensors_of_the_model_is_refused():
    model = nn.Sequential(Copies(3, 2))
    weight = model[0].weight.detach().clone()
    with pytest.raises(ValueError, match=r"got copies, such as 0\.weight, and loaded nothing"):
        pt.load_arrays(model, {"0.weight": np.ones((2, 3), "float32")})
    assert torch.equal(model[0].weight, weight)
    with pytest.raises(ValueError, match=r"expects a state_dict of dense tensors; got another kind in 0\.packed"):
        pt.to_arrays(nn.Sequential(Packed(3, 2)))
    with pytest.raises(ValueError, match=r"another kind in last\.scale\..*to_dense"):
        pt.to_arrays(Pair(torch.eye(3).to_sparse()))
    state = Extra(3, 2)
    pt.load_arrays(state, arrays := pt.to_arrays(state))
    assert arrays.keys() == {"weight", "bias"}
    conjugate = pt.to_arrays(Pair(torch.tensor([1 + 2j]).conj()))["last.scale"]
    assert conjugate.tolist() == [1 - 2j]


def test_a_variable_that_raises_leaves_a_flax_model_as_it_was():
    class Small(nnx.Param):
        def set_value(self, value, **options):
            if (value > 1).any():
                raise OverflowError("large")
            super().set_value(value, **options)

    class Net(nnx.Module):
        def __init__(self):
            self.linear = nnx.Linear(3, 2, **KERNEL)
            self.a = Small(jnp.zeros(2, jnp.float32))
            self.b = Small(jnp.zeros(2, jnp.float32))

    model = Net()
    arrays = {name: np.full_like(array, 0.5) for name, array in pf.to_arrays(model).items()}
    for name in "ab":
        refused(
            FLAX, model, lambda name=name: pf.load_arrays(model, arrays | {name: np.full(2, 3, "f")}), OverflowError
        )
    pf.load_arrays(model, arrays)
    assert_same(pf.to_arrays(model), arrays)


def test_what_is_no_model_and_what_is_no_name():
    for f, others in ((TORCH, (net(FLAX), None)), (FLAX, (net(TORCH), None, nnx.state(net(FLAX))))):
        for other in others:
            with pytest.raises(
                TypeError, match=r"to_arrays expects a Module of (torch|flax); got \w+\. Pass nnx?\.Lin"
            ):
                f.package.to_arrays(other)
        for name in (0, ("kernel",)):
            model = net(f)
            refused(f, model, lambda f=f, m=model, n=name: f.package.load_arrays(m, {n: np.ones(3)}), TypeError, "name")


def test_modules_that_hold_themselves_and_numbers_that_are_no_arrays():
    class Loop(nnx.Module):
        def __init__(self):
            self.linear = nnx.Linear(3, 2, **KERNEL)
            self.me = nnx.data(self)

    class Number(nnx.Module):
        def __init__(self):
            self.scale = nnx.Param(1.0)

    with pytest.raises(ValueError, match="Loop with one that holds itself"):
        pf.to_arrays(Loop())
    with pytest.raises(ValueError, match=r"scale of Number, which is no array; nnx\.Param\(jnp\.asarray\(value\)\)"):
        pf.to_arrays(Number())


# Ties, integers, names


@BOTH
def test_of_a_tie_one_name_is_left_out(f, tmp_path):
    """A tied file loads into a model that has one of the names only; a tensor that is ignored under one is named."""
    path, tied = tmp_path / "w.safetensors", weights()
    write(path, {name: tied[name] for name in ("0.weight", "0.bias")}, {"2.weight": "0.weight"})
    model = f.sequential(f.linear(3, 5))
    f.package.load_weights(model, path)
    assert_same(f.package.to_arrays(model), {name: tied[name] for name in ("0.weight", "0.bias")})
    both = f.sequential(first := f.linear(3, 5), first)
    arrays = {f"{i}.{name}": tied[f"0.{name}"] for i in (0, 1) for name in ("weight", "bias")}
    shared = {name: array for name, array in arrays.items() if name[0] == "0"}
    with pytest.warns(UserWarning, match=r"changes 1\.\w+, which ignore leaves out, with 0\.\w+, to which it is tied"):
        f.package.load_arrays(both, shared, ignore="1.*")
    other = arrays | {"1.bias": np.ones(5, "float32")}
    sentence = refused(f, both, lambda: f.package.load_arrays(both, other), match="which are tied in this model")
    choice = ast.literal_eval(re.search(r"Take one of them: ignore=(\[.*\])", sentence)[1])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        f.package.load_arrays(both, other, ignore=choice)


def test_one_square_parameter_in_two_layouts(tmp_path):
    class Net(nnx.Module):
        def __init__(self, size=4):
            self.token = nnx.Embed(size, 4, embedding_init=drawn, rngs=RNGS)
            self.head = nnx.Linear(size, 4, use_bias=False, **KERNEL)
            self.head.kernel = self.token.embedding

    for size in (4, 5):
        model = Net(size)
        pf.save_weights(model, tmp_path / "w.safetensors")
        arrays = pf.to_arrays(model)
        pf.load_weights(fresh := Net(size), tmp_path / "w.safetensors")
        assert_same(pf.to_arrays(fresh), arrays)
        np.testing.assert_array_equal(arrays["head.weight"], arrays["token.weight"].T)
        clash = arrays | {"head.weight": arrays["head.weight"] + 1}
        refused(FLAX, fresh, lambda m=fresh, clash=clash: pf.load_arrays(m, clash), match="tied in this model")


def test_integers_are_converted_when_asked_and_where_they_fit():
    class Positions(nnx.Variable):
        pass

    class Net(nnx.Module):
        def __init__(self):
            self.ids = Positions(jnp.arange(3, dtype=jnp.int32))

    ours, theirs = nn.Module(), Net()
    ours.register_buffer("ids", torch.arange(3, 6))
    refused(FLAX, theirs, lambda: pf.load_arrays(theirs, pt.to_arrays(ours)), match="pass cast=True")
    pf.load_arrays(theirs, pt.to_arrays(ours), cast=True)
    assert theirs.ids[...].tolist() == [3, 4, 5]
    assert theirs.ids.dtype == jnp.int32
    large = {"ids": np.array([1, 2, 2**40])}
    refused(FLAX, theirs, lambda: pf.load_arrays(theirs, large, cast=True), match=f"ids that fit into int32; .*{2**40}")
    ours.ids.zero_()
    pt.load_arrays(ours, pf.to_arrays(theirs), cast=True)
    assert ours.ids.tolist() == [3, 4, 5]
    refused(
        TORCH, ours, lambda: pt.load_arrays(ours, {"ids": np.ones(3)}, cast=True), match="ids is int64 here, float64"
    )


@BOTH
def test_patterns_of_rename_match(f):
    model = net(f)
    sentence = refused(
        f, model, lambda: f.package.load_arrays(model, weights(), rename={"^foo": "", r"^(\d)": r"\1"}), match="none"
    )
    kept = ast.literal_eval(re.search(r"Leave them out: rename=(\{.*\})", sentence)[1])
    f.package.load_arrays(model, weights(), rename=kept)
    assert_same(f.package.to_arrays(model), weights())


def test_names_of_the_older_weight_norm_are_known():
    new = nn.utils.parametrizations.weight_norm(nn.Linear(3, 2))
    arrays = {"bias": "bias", "weight_g": "parametrizations.weight.original0"}
    arrays = {old: pt.to_arrays(new)[name] + 1 for old, name in arrays.items()} | {"weight_v": np.ones((2, 3), "f")}
    sentence = refused(TORCH, new, lambda: pt.load_arrays(new, arrays))
    rename = ast.literal_eval(re.search(r"rename=(\{.*\})", sentence)[1])
    pt.load_arrays(new, arrays, rename=rename)
    np.testing.assert_array_equal(pt.to_arrays(new)["parametrizations.weight.original1"], arrays["weight_v"])


def test_a_count_alone_is_nothing_that_fits():
    model = nn.BatchNorm1d(3)
    with pytest.raises(ValueError, match="missing: running_mean"):
        pt.load_arrays(model, {"num_batches_tracked": np.array(3)}, strict=False)
    assert model.num_batches_tracked == 0
