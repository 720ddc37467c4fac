"""Normalisations: each member is the ordinary layer over several steps, with statistics of its own."""

import copy
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from torch import nn

from parity_tests.kit.trees import jax_of
from parity_tests.standard import assert_close
from parity_tests.suite.oracle import norm as oracle_norm
from parity_tests.suite.subjects.norm import with_arrays, with_tensors
from parity_tests.suite.subjects.subject import jitted
from probly_flax.layers.norm import BatchEnsembleBatchNorm as FlaxBatchNorm
from probly_flax.layers.norm import BatchEnsembleGroupNorm as FlaxGroupNorm
from probly_flax.layers.norm import BatchEnsembleLayerNorm as FlaxLayerNorm
from probly_torch.layers.norm import BatchEnsembleBatchNorm as TorchBatchNorm
from probly_torch.layers.norm import BatchEnsembleGroupNorm as TorchGroupNorm
from probly_torch.layers.norm import BatchEnsembleLayerNorm as TorchLayerNorm


def plain(value):
    """Returns the value as text without addresses, which differ between processes."""
    return re.sub(r" at 0x[0-9a-f]+", "", str(value))


def dyadic(*shape):
    return np.random.default_rng(0).integers(-8, 9, shape) / 8


def torch_values(layer):
    return {name: value.detach().double().numpy() for name, value in layer.state_dict().items()}


def randomize(layer, seed=0):
    """Draws weights and statistics that differ between members, the variances positive."""
    rng = np.random.default_rng(seed)
    if isinstance(layer, nn.Module):
        with torch.no_grad():
            for value in layer.state_dict().values():
                if value.is_floating_point():
                    value.copy_(torch.tensor(rng.uniform(0.5, 2.0, value.shape)))
    else:
        for name in ("scale", "bias", "mean", "var"):
            variable = getattr(layer, name, None)
            if variable is not None:
                variable[...] = jax_of(rng.uniform(0.5, 2.0, variable.shape), variable.dtype)
    return layer


NORMS = {
    "BatchNorm1d": (lambda **o: nn.BatchNorm1d(4, **o), TorchBatchNorm, (15, 4)),
    "BatchNorm1d-3d": (lambda **o: nn.BatchNorm1d(4, **o), TorchBatchNorm, (6, 4, 5)),
    "BatchNorm2d": (lambda **o: nn.BatchNorm2d(4, **o), TorchBatchNorm, (6, 4, 5, 3)),
    "BatchNorm3d": (lambda **o: nn.BatchNorm3d(4, **o), TorchBatchNorm, (6, 4, 2, 3, 2)),
    "LayerNorm": (lambda **o: nn.LayerNorm(4, **o), TorchLayerNorm, (6, 3, 4)),
    "LayerNorm-2d": (lambda **o: nn.LayerNorm((3, 4), **o), TorchLayerNorm, (6, 2, 3, 4)),
    "GroupNorm": (lambda **o: nn.GroupNorm(2, 4, **o), TorchGroupNorm, (6, 4, 5, 3)),
}
AFFINE = [{}, {"eps": 0.1}, {"bias": False}, {"affine": False}, {"dtype": torch.bfloat16}]
STATISTICS = [{"momentum": 0.3}, {"momentum": None}, {"track_running_stats": False}, {"momentum": 0.0}]
TORCH_CASES = [
    (name, options) for name in NORMS for options in AFFINE + (STATISTICS if name.startswith("Batch") else [])
]


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize(("name", "options"), TORCH_CASES, ids=plain)
def test_each_torch_member_is_the_ordinary_layer_over_several_steps(name, options, last):
    make, layer_type, shape = NORMS[name]
    options = dict(options)
    if "LayerNorm" in name and "affine" in options:
        options["elementwise_affine"] = options.pop("affine")
    without_bias = options.pop("bias", None) is False  # an argument of torch's newest norms only
    base = make(**options)
    if without_bias:
        base.bias = None
    layer = randomize(layer_type(base, 3))
    dtype = next((v.dtype for v in base.state_dict().values()), torch.float32)
    ordinary = [layer.member(i) for i in range(3)]
    assert {type(each) for each in ordinary} == {type(base)}
    assert {repr(each) for each in ordinary} == {repr(base)}
    for step in range(3):
        for training in (True, False):
            torch.manual_seed(step)
            x = (torch.randn(shape, dtype=torch.float64) + 3).to(dtype)
            if last and x.ndim in (4, 5):
                x = x.to(memory_format={4: torch.channels_last, 5: torch.channels_last_3d}[x.ndim])
            inputs = [x.clone().requires_grad_() for _ in range(2)]
            y = layer.train(training)(inputs[0])
            own = [each.train(training)(rows) for each, rows in zip(ordinary, inputs[1].chunk(3), strict=True)]
            expected = torch.cat(own)
            assert y.stride() == expected.stride()
            assert y.dtype == expected.dtype
            low = str(dtype).removeprefix("torch.")
            assert_close(y.detach().double().numpy(), expected.detach().double().numpy(), low)
            g = torch.randn(shape, dtype=torch.float64).to(dtype)
            y.backward(g)
            expected.backward(g)
            assert_close(inputs[0].grad.double().numpy(), inputs[1].grad.double().numpy(), low)
    for i, each in enumerate(ordinary):
        values, member = torch_values(each), torch_values(layer.member(i))
        assert values.keys() == member.keys() == base.state_dict().keys()
        for key in values:
            assert_close(member[key], values[key], low)
        for key, parameter in each.named_parameters():
            assert_close(getattr(layer, key).grad[i].double().numpy(), parameter.grad.double().numpy(), low)
    if layer_type is TorchBatchNorm and options.get("track_running_stats", True):
        assert int(layer.num_batches_tracked) == 3
        moved = options.get("momentum", 0.1) != 0.0
        assert moved == bool((layer.running_mean != randomize(layer_type(base, 3)).running_mean).all())


def flax_bases(**options):
    options = {"rngs": nnx.Rngs(0)} | options
    return {
        "BatchNorm": (lambda **o: nnx.BatchNorm(4, **options, **o), FlaxBatchNorm),
        "LayerNorm": (lambda **o: nnx.LayerNorm(4, **options, **o), FlaxLayerNorm),
        "GroupNorm": (lambda **o: nnx.GroupNorm(4, num_groups=2, **options, **o), FlaxGroupNorm),
    }


FLAX_OPTIONS = [
    {},
    {"epsilon": 0.1},
    {"use_bias": False},
    {"use_scale": False},
    {"use_scale": False, "use_bias": False},
    {"use_fast_variance": False},
    {"dtype": jnp.bfloat16},
    {"param_dtype": jnp.bfloat16},
    {"promote_dtype": lambda arrays, dtype: arrays},
]
FLAX_CASES = [
    *((name, options) for name in flax_bases() for options in FLAX_OPTIONS),
    ("BatchNorm", {"momentum": 0.5}),
    ("BatchNorm", {"axis": 1}),
    ("BatchNorm", {"use_running_average": None}),
    ("LayerNorm", {"reduction_axes": (1, 2)}),
    ("LayerNorm", {"reduction_axes": (-2, -1), "feature_axes": (1,)}),
    ("GroupNorm", {"reduction_axes": (1, 2, -1)}),
]


# Masks of fewer axes, which our layers spread over the members: with the options that change the axes.
FLAX_MASKED = [
    (name, options, masked)
    for name, options in FLAX_CASES
    for masked in (None, "rows", "shared", "row")
    if masked in (None, "rows") or not options or any("ax" in option for option in options)
]


@pytest.mark.parametrize(("name", "options", "masked"), FLAX_MASKED, ids=plain)
def test_each_flax_member_is_the_ordinary_layer_over_several_steps(name, options, masked):
    make, layer_type = flax_bases()[name]
    base = make(**options)
    layer = randomize(layer_type(base, 3))
    ordinary = [layer.member(i) for i in range(3)]
    assert {type(each) for each in ordinary} == {getattr(nnx, name)}
    for key, value in vars(base).items():
        if not (key.startswith("_") or isinstance(value, nnx.Variable)):
            assert getattr(layer, key) == getattr(ordinary[1], key) == value
    rng = np.random.default_rng(0)
    signs = (-1.0) ** np.indices((6, 4, 5, 4)).sum(0)  # no variance is near 0, where the fast one cancels
    call = {"use_running_average": False} if "use_running_average" in options else {}
    with jax.numpy_dtype_promotion("standard"):  # of nnx's own arithmetic
        for _ in range(3):
            for training in (True, False):
                x = (signs * rng.uniform(0.5, 1.5, signs.shape)).astype("float32")
                mask, own_masks = None, [None] * 3
                if masked:
                    shape = {"rows": x.shape, "shared": (4, 5, 4), "row": (1, 4, 5, 4)}[masked]
                    mask = rng.random(shape) < 0.7
                    mask[..., :3] = True  # a variance of some values
                    own_masks = [jax_of(m) for m in (mask.reshape(3, 2, 4, 5, 4) if masked == "rows" else [mask] * 3)]
                    mask = jax_of(mask)
                    if name == "GroupNorm" and masked == "shared":
                        continue  # nnx.GroupNorm itself takes masks of the inputs' rank only
                if call:
                    call = {"use_running_average": not training}
                for each in (layer, *ordinary):
                    if not call:
                        each.train() if training else each.eval()
                y = np.asarray(layer(jax_of(x), mask=mask, **call))
                own_rows = map(jax_of, np.split(x, 3))
                own = [each(x, mask=m, **call) for each, x, m in zip(ordinary, own_rows, own_masks, strict=True)]
                expected = np.concatenate(own)
                assert y.dtype == expected.dtype
                assert_close(y, expected, y.dtype.name)
    for i, each in enumerate(ordinary):
        for path, value in nnx.to_flat_state(nnx.state(each)):
            assert_close(np.asarray(getattr(layer, path[0]))[i], np.asarray(value), value.dtype.name)
        assert nnx.state(layer.member(i)).keys() == nnx.state(each).keys()
    if name == "BatchNorm":
        assert (np.asarray(layer.mean) != np.asarray(randomize(layer_type(make(**options), 3)).mean)).all()


def test_running_statistics_of_both_frameworks_over_several_steps():
    ours = TorchBatchNorm(nn.BatchNorm2d(4, dtype=torch.float64), 3)
    base = nnx.BatchNorm(4, momentum=0.9, use_fast_variance=False, param_dtype="float64", rngs=nnx.Rngs(0))
    # nnx's own are float32 always
    base.mean, base.var = nnx.BatchStat(jax_of(np.zeros(4))), nnx.BatchStat(jax_of(np.ones(4)))
    theirs = FlaxBatchNorm(base, 3)
    mean, var_torch, var_flax = np.zeros((3, 4)), np.ones((3, 4)), np.ones((3, 4))
    for seed in range(4):
        x = np.random.default_rng(seed).standard_normal((6, 4, 3, 2)) * 2 + 1
        ours(torch.tensor(x))
        with jax.numpy_dtype_promotion("standard"):  # of nnx's own arithmetic
            jitted(theirs, np.moveaxis(x, 1, -1))
        _, var_torch = oracle_norm.running_statistics(x, mean, var_torch, 0.1, unbiased=True)
        mean, var_flax = oracle_norm.running_statistics(x, mean, var_flax, 0.1, unbiased=False)
    for value, expected in (
        (ours.running_mean, mean),
        (ours.running_var, var_torch),
        (theirs.mean[...], mean),
        (theirs.var[...], var_flax),
    ):
        assert_close(np.asarray(value), expected, "float64")


@jax.numpy_dtype_promotion("standard")  # of nnx's own arithmetic
def test_designed_rows_are_exact_in_both_frameworks():
    """Rows of +-1/2 have mean 0 and variance 1/4; with epsilon 3/4 nothing is rounded."""
    rng = np.random.default_rng(0)
    signs = np.stack([rng.permuted([0.5, -0.5] * 4) for _ in range(48)])
    weight, bias = dyadic(3, 8), -dyadic(3, 8)
    for dtype in ("float32", "float64"):
        x = signs.reshape(6, 8, 8)
        ours = TorchLayerNorm(nn.LayerNorm(8, eps=0.75, dtype=getattr(torch, dtype)), 3)
        ours.load_state_dict({"weight": torch.tensor(weight), "bias": torch.tensor(bias)})
        base = nnx.LayerNorm(8, epsilon=0.75, param_dtype=dtype, rngs=nnx.Rngs(0))
        theirs = with_arrays(FlaxLayerNorm(base, 3), scale=jax_of(weight, dtype), bias=jax_of(bias, dtype))
        expected = (x.reshape(3, 2, 8, 8) * weight[:, None, None] + bias[:, None, None]).reshape(x.shape)
        tensor, array = torch.tensor(x, dtype=getattr(torch, dtype)), x.astype(dtype)
        np.testing.assert_array_equal(ours(tensor).detach(), expected)
        np.testing.assert_array_equal(jitted(theirs, array), expected)
        for i in range(3):
            rows = slice(2 * i, 2 * i + 2)
            np.testing.assert_array_equal(ours.member(i)(tensor[rows]).detach(), expected[rows])
            np.testing.assert_array_equal(jitted(theirs.member(i), array[rows]), expected[rows])
        # The rows as columns: BatchNorm over 8 rows of each of 6 members, 8 channels.
        x = signs.reshape(6, 8, 8).transpose(0, 2, 1).reshape(48, 8)
        ours = TorchBatchNorm(nn.BatchNorm1d(8, eps=0.75, momentum=0.5, dtype=getattr(torch, dtype)), 6)
        theirs = FlaxBatchNorm(nnx.BatchNorm(8, epsilon=0.75, momentum=0.5, rngs=nnx.Rngs(0)), 6)
        theirs.mean, theirs.var = (nnx.BatchStat(jax_of(np.asarray(v), dtype)) for v in (theirs.mean, theirs.var))
        weight6, bias6 = dyadic(6, 8), -dyadic(6, 8)
        with_tensors(
            ours, **{n: torch.tensor(v, dtype=getattr(torch, dtype)) for n, v in (("weight", weight6), ("bias", bias6))}
        )
        with_arrays(theirs, scale=jax_of(weight6, dtype), bias=jax_of(bias6, dtype))
        expected = (x.reshape(6, 8, 8) * weight6[:, None] + bias6[:, None]).reshape(x.shape)
        np.testing.assert_array_equal(ours(torch.tensor(x, dtype=getattr(torch, dtype))).detach(), expected)
        np.testing.assert_array_equal(jitted(theirs, x.astype(dtype)), expected)
        np.testing.assert_array_equal(ours.running_mean, theirs.mean[...])
        np.testing.assert_array_equal(theirs.var[...], np.full((6, 8), 0.5 * 1 + 0.5 * 0.25))


@pytest.mark.parametrize("name", flax_bases())
def test_a_jitted_step_of_flax_is_a_step(name):
    make, layer_type = flax_bases()[name]
    layer = randomize(layer_type(make(), 3))
    x = jax_of(np.random.default_rng(0).standard_normal((6, 5, 4)), "float32")
    expected = nnx.clone(layer)
    y = expected(x)
    assert_close(jitted(layer, x), y, "float32")
    for path, value in nnx.to_flat_state(nnx.state(expected)):  # the jitted step updates the statistics
        assert_close(np.asarray(getattr(layer, path[0])), np.asarray(value), "float32")
    if name == "BatchNorm":
        np.testing.assert_array_equal(nnx.view(layer, use_running_average=True)(x), nnx.clone(layer)(x, True))
        layer.eval()
        before = np.array(layer.mean)
        jax.jit(lambda x: layer(x))(x)  # in eval mode nothing is written, so that jax.jit may close over the layer
        np.testing.assert_array_equal(layer.mean[...], before)


def test_flax_batch_norm_takes_its_statistics_over_devices_too():
    layer = FlaxBatchNorm(nnx.BatchNorm(4, axis_name="devices", rngs=nnx.Rngs(0)), 3)
    x = np.random.default_rng(0).standard_normal((2, 6, 4)).astype("float32")
    y = np.asarray(jax.jit(jax.vmap(lambda x: nnx.clone(layer)(x), axis_name="devices"))(x))
    alone = FlaxBatchNorm(nnx.BatchNorm(4, rngs=nnx.Rngs(0)), 3)
    rows = x.reshape(2, 3, 2, 4).transpose(1, 0, 2, 3).reshape(12, 4)  # each member's rows of both devices
    expected = np.asarray(jitted(alone, rows)).reshape(3, 2, 2, 4).transpose(1, 0, 2, 3).reshape(2, 6, 4)
    assert_close(y, expected, "float32")


def test_flax_batch_norm_takes_its_statistics_over_groups_of_devices():
    groups = {"axis_name": "devices", "axis_index_groups": [[0, 2], [1, 3]]}
    layer = FlaxBatchNorm(nnx.BatchNorm(4, **groups, rngs=nnx.Rngs(0)), 3)
    x = np.random.default_rng(0).standard_normal((4, 6, 4)).astype("float32")

    def each_device(norm, x):
        return jax.pmap(lambda x: nnx.clone(norm)(x), axis_name="devices", devices=jax.devices("cpu")[:4])(x)

    members = [each_device(layer.member(i), x[:, 2 * i : 2 * i + 2]) for i in range(3)]
    assert_close(np.asarray(each_device(layer, x)), np.concatenate(members, 1), "float32")
    assert layer.member(0).axis_index_groups == groups["axis_index_groups"]


def test_one_value_for_each_member_as_the_base_layers():
    batch_norm = TorchBatchNorm(nn.BatchNorm1d(4), 3)
    count = int(batch_norm.num_batches_tracked)
    for shape in ((3, 4), (3, 4, 1)):
        with pytest.raises(ValueError, match="more than 1 value in each channel"):
            batch_norm(torch.ones(shape))
    assert int(batch_norm.num_batches_tracked) == count
    batch_norm.eval()(torch.ones(3, 4))
    batch_norm.train()(torch.ones(3, 4, 2))
    group_norm = TorchGroupNorm(nn.GroupNorm(4, 4), 3)
    with pytest.raises(ValueError, match="more than 1 value in each group"):
        group_norm(torch.ones(3, 4))
    group_norm(torch.ones(6, 4))
    TorchGroupNorm(nn.GroupNorm(2, 4), 3)(torch.ones(3, 4))
    assert TorchLayerNorm(nn.LayerNorm(4), 3)(torch.ones(3, 4)).shape == (3, 4)
    with pytest.raises(ValueError, match="more than 1 value"):
        TorchBatchNorm(nn.BatchNorm1d(4, track_running_stats=False).eval(), 3)(torch.ones(3, 4))
    for make, layer_type in flax_bases().values():  # which take a variance of 0
        layer = randomize(layer_type(make(), 3))
        own = [layer.member(i) for i in range(3)]
        x = np.ones((3, 4), "float32")
        expected = np.concatenate([jitted(member, x[:1]) for member in own])
        assert_close(jitted(layer, x), expected, "float32")


def test_statistics_that_the_base_layer_no_longer_tracks_stay():
    base = randomize(nn.BatchNorm1d(4))
    base.track_running_stats = False  # a way to freeze them
    layer = TorchBatchNorm(base, 3)
    own, x = layer.member(1), torch.randn(6, 4)
    for training in (True, False):
        expected = own.train(training)(x[2:4])
        assert_close(layer.train(training)(x)[2:4].detach().numpy(), expected.detach().numpy(), "float32")
    for name, value in base.state_dict().items():
        assert torch.equal(layer.state_dict()[name], value.expand(3, *value.shape) if value.ndim else value)
        assert torch.equal(own.state_dict()[name], value)
    layer.reset_running_stats()
    assert torch.equal(layer.running_mean[2], base.running_mean)


def test_weights_without_a_count_load_as_into_the_base_layer():
    layer = TorchBatchNorm(nn.BatchNorm1d(4), 3)
    layer(torch.randn(6, 4))
    arrays = {name: value + 1 for name, value in layer.state_dict().items() if name != "num_batches_tracked"}
    for model, prefix in ((layer, ""), (nn.Sequential(copy.deepcopy(layer)), "0.")):
        model.load_state_dict({prefix + name: value for name, value in arrays.items()})
        assert torch.equal(model.state_dict()[f"{prefix}running_mean"], arrays["running_mean"])
        assert int(model.state_dict()[f"{prefix}num_batches_tracked"]) == 1
    layer.reset_running_stats()
    assert int(layer.num_batches_tracked) == 0
    assert (layer.running_var == 1).all()


def test_what_only_one_framework_refuses():
    for base in (nn.SyncBatchNorm(4), nn.LazyBatchNorm1d(), nn.InstanceNorm1d(4)):
        with pytest.raises(TypeError, match="to be a BatchNorm layer; got "):
            TorchBatchNorm(base, 2)

    for layer, shape in (
        (nn.BatchNorm1d(4), (4, 4, 2, 2)),
        (nn.BatchNorm1d(4), (4,)),
        (nn.BatchNorm2d(4), (4, 4, 2)),
        (nn.BatchNorm3d(4), (4, 4, 2, 2)),
    ):
        with pytest.raises(ValueError, match=f"has {len(shape)} axes instead of"):
            TorchBatchNorm(layer, 2)(torch.zeros(shape))
    with pytest.raises(ValueError, match=r"has \(4, 3\) features instead of \(3, 4\)"):
        TorchLayerNorm(nn.LayerNorm((3, 4)), 2)(torch.zeros(4, 4, 3))
    layer = FlaxLayerNorm(nnx.LayerNorm(12, reduction_axes=(2, 3), feature_axes=(2, 3), rngs=nnx.Rngs(0)), 2)
    with pytest.raises(ValueError, match="has 3 axes instead of at least 4"):
        layer(jax_of(np.zeros((4, 3, 4), "float32")))
    with pytest.raises(ValueError, match="has 8 features instead of 12"):
        layer(jax_of(np.zeros((4, 3, 4, 2), "float32")))
    for shape in ((3, 4), (2, 4, 4)):
        with pytest.raises(ValueError, match="Give it the rows"):
            FlaxBatchNorm(nnx.BatchNorm(4, rngs=nnx.Rngs(0)), 2)(
                jax_of(np.zeros((4, 4), "float32")), mask=jax_of(np.ones(shape))
            )
