"""Convolutions: the same numbers in both packages, every option of the base layer, and clear sentences."""

import copy
import pickle
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from torch import nn

import probly_flax as pf
import probly_torch as pt
from parity_tests import standard
from parity_tests.kit.trees import jax_of
from parity_tests.standard import assert_close
from parity_tests.suite import oracle_conv
from parity_tests.suite.subject import Subject, jitted, run_flax, run_oracle, run_torch, with_cotangent, without_draws
from parity_tests.suite.subjects_conv import SUBJECTS, TORCH_CONV, TORCH_CONV_TRANSPOSE, flax_padding, shapes
from parity_tests.suite.twins import assert_same_steps, assert_special_values, of_subject
from probly_flax.functional import conv as flax_functional
from probly_flax.layers import conv as flax_conv
from probly_torch.functional import conv as torch_functional
from probly_torch.layers import conv as torch_conv

KINDS = ("Conv", "ConvTranspose")
SEEDS = range(3)


# With transpose_kernel the kernel has other axes, and the rest is the same, whatever the dtype.
IN_BFLOAT16 = [subject for subject in SUBJECTS if not subject.name.endswith("transpose_kernel")]


def in_each(*all_subjects):
    """Parametrizes with all subjects in these dtypes, and some in bfloat16.

    JAX takes half a second for each program.
    """
    runs = [(s, all_subjects) for s in SUBJECTS] + [(s, ("bfloat16",)) for s in IN_BFLOAT16]
    ids = [f"{subject.name}-{'+'.join(dtypes)}" for subject, dtypes in runs]
    return pytest.mark.parametrize(("subject", "dtypes"), runs, ids=ids)


@in_each("float32")
def test_exact(subject, dtypes):
    (dtype,) = dtypes
    arrays = subject.draw_exact(SEEDS[0], dtype)
    assert subject.certificate(arrays, dtype) <= 2.0 ** standard.SIGNIFICANT_BITS[dtype], "the inputs prove nothing"
    runs = run_torch(subject, arrays, dtype), run_flax(subject, arrays, dtype, compiled=True)
    standard.assert_holds(standard.exact(*runs, run_oracle(subject, arrays)))


@in_each("float32", "float64")
def test_bounded(subject, dtypes):
    arrays = [with_cotangent(subject, subject.draw(seed, dtypes[0]), seed, dtypes[0]) for seed in SEEDS]
    verdicts = standard.bounded(
        {dtype: [run_torch(subject, a, dtype) for a in arrays] for dtype in dtypes},
        {dtype: [run_flax(subject, a, dtype, compiled=True) for a in arrays] for dtype in dtypes},
        [run_oracle(subject, a) for a in arrays],
        dtypes[0],
    )
    standard.assert_holds(verdicts)


@pytest.mark.parametrize("subject", SUBJECTS, ids=lambda subject: subject.name)
def test_special_values(subject):
    assert_special_values(of_subject(subject))


@pytest.mark.parametrize("subject", SUBJECTS, ids=lambda subject: subject.name)
def test_steps_of_training(subject):
    assert_same_steps(of_subject(subject))


# Options of torch that Flax does not have: torch against the oracle, in the exact tier.
TORCH_ONLY = {
    "replicate": ("Conv", {"padding": (2, 1), "padding_mode": "replicate"}),
    "circular, wider than the kernel": ("Conv", {"padding": (3, 0), "padding_mode": "circular"}),
    "reflect, same": ("Conv", {"padding": "same", "padding_mode": "reflect", "dilation": (1, 2)}),
    "circular, strided": ("Conv", {"padding": (1, 2), "padding_mode": "circular", "stride": 2}),
    "valid": ("Conv", {"padding": "valid", "padding_mode": "circular"}),
    "transposed groups": ("ConvTranspose", {"groups": 2, "stride": 2, "padding": 1, "output_padding": (1, 0)}),
}


@pytest.mark.parametrize("name", TORCH_ONLY)
def test_options_of_torch_alone(name):
    kind, options = TORCH_ONLY[name]
    channels, sizes, taps = (2, 2, 2, 4), (3, 4), (2, 3)
    layer = batch_ensemble(torch_conv, kind)(getattr(nn, f"{kind}2d")(2, 4, taps, **options).double(), num_members=2)
    given = {"stride": layer.stride, "dilation": layer.dilation, "groups": layer.groups}
    if kind == "Conv":
        pads = layer._pads()
        given |= {"padding": list(zip(pads[::2], pads[1::2], strict=True))[::-1], "padding_mode": layer.padding_mode}
        oracle = oracle_conv.batch_ensemble_conv
    else:
        given |= {"padding": layer.padding, "output_padding": layer.output_padding}
        oracle = oracle_conv.batch_ensemble_conv_transpose
    subject = Subject(
        name,
        shapes(channels, sizes, taps, layer.groups, transpose=kind == "ConvTranspose"),
        lambda dtype: layer,
        None,
        lambda **arrays: oracle(**arrays, **given),
        model=True,
        exact=(4, 0.125, 4),
    )
    arrays = subject.draw_exact(0, "float64")
    ours, reference = run_torch(subject, arrays, "float64"), run_oracle(subject, arrays)
    assert ours.keys() == reference.keys()
    for tensor, expected in reference.items():
        np.testing.assert_array_equal(ours[tensor], expected, err_msg=tensor)


def batch_ensemble(module, kind):
    return getattr(module, f"BatchEnsemble{kind}")


def torch_base(kind, axes=2, channels=(4, 6), taps=3, **options):
    return {"Conv": TORCH_CONV, "ConvTranspose": TORCH_CONV_TRANSPOSE}[kind][axes](*channels, taps, **options)


def flax_base(kind, axes=2, channels=(4, 6), taps=3, **options):
    return getattr(nnx, kind)(*channels, (taps,) * axes, **({"padding": "VALID", "rngs": nnx.Rngs(0)} | options))


def on_device(*shape, dtype="float32", seed=None):
    """Makes an array of ones, or numbers, for which JAX compiles nothing."""
    values = np.ones(shape) if seed is None else numbers(*shape, seed=seed)
    return jax_of(values, dtype)


def pair(kind, axes=2, dtype="float32", bias=True, flax_options=None, base_options=None, **options):
    ours = torch_base(kind, axes, bias=bias, dtype=getattr(torch, dtype), **(base_options or {}))
    make = partial(flax_base, kind, axes, use_bias=bias, param_dtype=jnp.dtype(dtype), **(flax_options or {}))
    theirs = make(kernel_init=nnx.initializers.zeros)
    options = {"num_members": 3} | options
    pf.load_arrays(theirs, pt.to_arrays(ours))
    return batch_ensemble(torch_conv, kind)(ours, **options), batch_ensemble(flax_conv, kind)(theirs, **options)


def numbers(*shape, seed=0):
    return np.random.default_rng(seed).integers(-4, 5, shape) / 8.0


@torch.no_grad()
def make_exact(layer, seed=0):
    """Gives the layer small multiples of a power of two as weights, in which sums have no rounding."""
    if isinstance(layer, nn.Module):
        for i, parameter in enumerate(layer.parameters()):
            parameter.copy_(torch.from_numpy(numbers(*parameter.shape, seed=seed + i)))
    else:
        for i, (_, variable) in enumerate(nnx.to_flat_state(nnx.state(layer, nnx.Param))):
            variable[...] = on_device(*variable.shape, dtype=variable.dtype, seed=seed + i)
    return layer


TORCH_OPTIONS = {
    "Conv": [
        {},
        {"stride": 2, "padding": 1},
        {"padding": "same"},
        {"padding": "same", "dilation": 2, "padding_mode": "circular"},
        {"padding": "valid"},
        {"padding": 1, "padding_mode": "reflect", "stride": 2},
        {"padding": 2, "padding_mode": "replicate"},
        {"dilation": 2, "groups": 2},
        {"bias": False, "groups": 2},
    ],
    "ConvTranspose": [
        {},
        {"stride": 2, "padding": 1, "output_padding": 1},
        {"dilation": 2, "groups": 2},
        {"bias": False, "groups": 2, "stride": 3},
    ],
}


@pytest.mark.parametrize("axes", [1, 2, 3])
@pytest.mark.parametrize(("kind", "options"), [(kind, o) for kind in KINDS for o in TORCH_OPTIONS[kind]], ids=str)
def test_each_member_of_torch_is_the_ordinary_layer(kind, options, axes):
    base = torch_base(kind, axes, **options).eval()
    layer = make_exact(batch_ensemble(torch_conv, kind)(base, num_members=3))
    x = torch.from_numpy(numbers(6, 4, *(6, 5, 5)[:axes])).float()
    y = layer(x)
    assert y.shape == (6, *base(x).shape[1:])
    for i in range(3):
        member = layer.member(i)
        assert type(member) is type(base)
        assert repr(member) == repr(base)
        assert not member.training
        assert vars(member).keys() == vars(base).keys()
        assert torch.equal(member(x[2 * i : 2 * i + 2]), y[2 * i : 2 * i + 2])


FLAX_OPTIONS = {
    "Conv": [
        {},
        {"padding": "SAME", "strides": 2},
        {"padding": "CIRCULAR", "kernel_dilation": 2},
        {"padding": "REFLECT", "strides": None},
        {"padding": 1, "feature_group_count": 2},
        {"padding": ((0, 2), 1), "strides": [1, 2]},
        {"padding": 2, "input_dilation": (2, 1)},
        {"use_bias": False, "precision": "highest"},
        {"mask": (4, 6)},
        {"preferred_element_type": jnp.float64},
    ],
    "ConvTranspose": [
        {},
        {"padding": "SAME", "strides": (2, 1)},
        {"padding": "CIRCULAR", "strides": 2},
        {"padding": "CIRCULAR", "strides": 2, "transpose_kernel": True},
        {"padding": ((0, 2), 1), "kernel_dilation": (2, 1)},
        {"use_bias": False, "transpose_kernel": True},
        {"mask": (4, 6), "preferred_element_type": jnp.float64},
    ],
}


@pytest.mark.parametrize(("kind", "options"), [(kind, o) for kind in KINDS for o in FLAX_OPTIONS[kind]], ids=str)
def test_each_member_of_flax_is_the_ordinary_layer(kind, options):
    if "mask" in options:  # its channels
        mask = np.tri(3)[:, :, None, None] * np.ones(options["mask"])
        options = options | {"mask": jax.device_put(mask.astype(np.float32))}
    base = flax_base(kind, kernel_init=nnx.initializers.zeros, **options)
    layer = make_exact(batch_ensemble(flax_conv, kind)(base, num_members=3, use_base_weights=True))
    x = numbers(6, 6, 5, 4).astype(np.float32)
    with jax.numpy_dtype_promotion("standard"):  # the base layer too adds a bias of another dtype
        y = jitted(layer, x)
        expected = jax.eval_shape(lambda x: base(x), x)
        assert (y.shape, y.dtype) == (expected.shape, expected.dtype)
        graph, state = nnx.split(layer)
        np.testing.assert_array_equal(jitted(nnx.merge(graph, state), x), y)
        for i in range(3):
            member = layer.member(i)
            assert type(member) is type(base)
            assert vars(member).keys() == vars(base).keys()
            rows = slice(2 * i, 2 * i + 2)
            np.testing.assert_array_equal(jitted(member, x[rows]), np.asarray(y)[rows])


def test_four_spatial_axes_of_flax():
    base = flax_base("Conv", 4, taps=2, kernel_init=nnx.initializers.zeros)
    layer = make_exact(flax_conv.BatchEnsembleConv(base, num_members=3, use_base_weights=True))
    x = numbers(6, 3, 2, 3, 2, 4).astype(np.float32)
    y = np.asarray(jitted(layer, x))
    for i in range(3):
        rows = slice(2 * i, 2 * i + 2)
        np.testing.assert_array_equal(jitted(layer.member(i), x[rows]), y[rows])
    with pytest.raises(ValueError, match="4 spatial axes, in_channels"):
        layer(x[..., :1])


def test_causal_and_more_batch_axes_and_a_mask_of_its_own():
    options = {"padding": "CAUSAL", "kernel_init": nnx.initializers.zeros}
    base = flax_base("Conv", 1, mask=on_device(3, 4, 6), **options)
    layer = make_exact(flax_conv.BatchEnsembleConv(base, num_members=3, use_base_weights=True))
    assert layer.mask is not base.mask
    x = numbers(6, 3, 5, 4).astype(np.float32)
    y = np.asarray(jitted(layer, x))
    assert y.shape == (6, 3, 5, 6)
    for i in range(3):
        rows = slice(2 * i, 2 * i + 2)
        np.testing.assert_array_equal(jitted(layer.member(i), x[rows]), y[rows])


DRAWS = [
    (2, "float32", {}),
    (1, "float32", {"use_base_weights": True}),
    (2, "float32", {"init": "random_sign"}),
    (1, "float32", {}),
    (3, "float32", {}),
    (2, "bfloat16", {}),
    (2, "float16", {"rngs": 7}),
]


@pytest.mark.parametrize(
    ("kind", "ours", "theirs", "axes", "dtype", "options"),
    [
        (*kind, *draw)
        for kind, draws in (
            (("Conv", {}, {}), DRAWS),
            (("ConvTranspose", {}, {}), DRAWS),
            # of kernels of another shape, whose draws JAX takes a second to compile
            (("Conv", {"groups": 2}, {"feature_group_count": 2}), DRAWS[:3]),
            (("ConvTranspose", {}, {"transpose_kernel": True}), DRAWS[:3]),
        )
        for draw in draws
    ],
)
def test_one_seed_gives_one_layer_bit_for_bit(kind, ours, theirs, axes, dtype, options):
    layers = pair(kind, axes, dtype, flax_options=theirs, base_options=ours, **options)
    a, b = pt.to_arrays(layers[0]), pf.to_arrays(layers[1])
    assert a.keys() == b.keys() == {"weight", "r", "s", "bias"}
    for name in a:
        assert a[name].dtype == b[name].dtype == jnp.dtype(dtype)
        np.testing.assert_array_equal(a[name], b[name])
    members = pt.to_arrays(layers[0].member(1)), pf.to_arrays(layers[1].member(1))
    np.testing.assert_array_equal(members[0]["weight"], members[1]["weight"])


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_the_draws_follow_the_documented_order_and_fan_in(kind, groups):
    rngs = pt.Rngs(3)
    layer = batch_ensemble(torch_conv, kind)(torch_base(kind, groups=groups), rngs=rngs, num_members=2)
    assert int(rngs.default.count) == 3
    keys = [pt.random.fold_in(pt.random.key(3), i) for i in range(3)]
    drawn = pt.random.lecun_normal(keys[0], (3, 3, 4 // groups, 6), torch.float32)
    each, out = 4 // groups, 6 // groups
    for o in range(6):
        for j in range(each):
            group = o // out
            weight = layer.weight[o, j] if kind == "Conv" else layer.weight[group * each + j, o - group * out]
            assert torch.equal(weight, drawn[:, :, j, o])
    assert torch.equal(layer.r, 1 + 0.5 * pt.random.normal(keys[1], (2, 4)))
    assert torch.equal(layer.s, 1 + 0.5 * pt.random.normal(keys[2], (2, 6)))


def test_the_flax_draw_is_that_of_nnx():
    layer = flax_conv.BatchEnsembleConv(flax_base("Conv"), rngs=nnx.Rngs(3), num_members=2)
    key = nnx.Rngs(3).params()
    np.testing.assert_array_equal(layer.kernel[...], nnx.initializers.lecun_normal()(key, (3, 3, 4, 6), jnp.float32))


@pytest.mark.parametrize("kind", KINDS)
def test_the_base_layer_is_copied_and_left_alone(kind):
    ours = torch_base(kind)
    ours.weight.requires_grad_(False)
    before = copy.deepcopy(ours.state_dict())
    layer = batch_ensemble(torch_conv, kind)(ours, num_members=3, use_base_weights=True)
    assert not layer.weight.requires_grad
    assert not layer.member(0).weight.requires_grad
    assert layer.r.requires_grad
    assert layer.member(0).bias.requires_grad
    assert torch.equal(layer.weight, ours.weight)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.zero_()
    assert all(torch.equal(before[name], value) for name, value in ours.state_dict().items())
    theirs = flax_base(kind)
    kernel = theirs.kernel[...]
    layer = batch_ensemble(flax_conv, kind)(theirs, num_members=3, use_base_weights=True)
    np.testing.assert_array_equal(layer.kernel[...], kernel)
    layer.kernel[...] = jnp.zeros_like(kernel)
    np.testing.assert_array_equal(theirs.kernel[...], kernel)


@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_without_bias_has_none(kind):
    for layer in pair(kind, bias=False):
        assert layer.bias is None
        assert layer.member(0).bias is None
    for layer in pair(kind):
        bias = layer.bias.detach() if isinstance(layer, nn.Module) else layer.bias[...]
        np.testing.assert_array_equal(bias, np.tile(bias[:1], (3, 1)))


@pytest.mark.parametrize("axes", [1, 2, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_no_rows_and_other_devices(kind, axes):
    sizes = (5,) * axes
    ours, theirs = pair(kind, axes)
    assert ours(torch.ones(0, 4, *sizes)).shape[:2] == (0, 6)
    y = jitted(theirs, on_device(0, *sizes, 4))
    assert (y.shape[0], y.shape[-1]) == (0, 6)
    for init in ("normal", "random_sign"):
        base = torch_base(kind, axes, device="meta")
        layer = batch_ensemble(torch_conv, kind)(base, num_members=3, init=init)
        assert {p.device.type for p in layer.parameters()} == {"meta"}
        assert layer(torch.zeros(6, 4, *sizes, device="meta")).shape[:2] == (6, 6)


@pytest.mark.parametrize("kind", KINDS)
def test_channels_last_memory_stays_so(kind):
    base = torch_base(kind).to(memory_format=torch.channels_last)
    layer = batch_ensemble(torch_conv, kind)(base, num_members=2).to(memory_format=torch.channels_last)
    x = torch.randn(4, 4, 6, 5).to(memory_format=torch.channels_last)
    assert base(x).is_contiguous(memory_format=torch.channels_last)
    assert layer(x).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_output_size_is_that_of_the_base_layer(axes):
    base = torch_base("ConvTranspose", axes, stride=3, padding=1, dilation=2)
    layer = make_exact(torch_conv.BatchEnsembleConvTranspose(base, num_members=2))
    x = torch.from_numpy(numbers(4, 4, *(3,) * axes)).float()
    smallest = base(x).shape[2:]
    for extra in range(3):
        size = [n + extra for n in smallest]
        for given in (size, torch.Size((4, 6, *size))):
            y = layer(x, output_size=given)
            assert y.shape == base(x, output_size=given).shape == (4, 6, *size)
            assert torch.equal(y[2:], layer.member(1)(x[2:], output_size=given))
    for wrong in ([n + 3 for n in smallest], [n - 1 for n in smallest], [*smallest, 1]):
        with pytest.raises(ValueError, match=rf"expects an output_size from .* Pass output_size=\[{smallest[0]}"):
            layer(x, output_size=wrong)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
@pytest.mark.parametrize("amp", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("kind", "mode"), [("Conv", "zeros"), ("Conv", "circular"), ("ConvTranspose", "zeros")])
def test_autocast_gives_the_dtype_of_the_base_layer(kind, mode, dtype, amp):
    base = torch_base(kind, padding=1, padding_mode=mode, dtype=getattr(torch, dtype))
    layer = batch_ensemble(torch_conv, kind)(base, num_members=3)
    x = torch.ones(6, 4, 5, 5, dtype=getattr(torch, dtype), requires_grad=True)
    with torch.autocast("cpu", amp):
        y = layer(x)
        assert y.dtype == base(x).dtype
    y.sum().backward()
    assert x.grad.dtype == x.dtype
    assert {p.grad.dtype for p in layer.parameters()} == {base.weight.dtype}


@pytest.mark.parametrize("dtype", [None, "float32", "bfloat16"])
@pytest.mark.parametrize("param_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("preferred", [None, "float32"])
@pytest.mark.parametrize("kind", KINDS)
def test_flax_dtype_options_give_the_dtype_of_the_base_layer(kind, dtype, param_dtype, preferred):
    def outputs(x):
        base = flax_base(kind, 1, dtype=dtype, param_dtype=param_dtype, preferred_element_type=preferred)
        return batch_ensemble(flax_conv, kind)(base, num_members=3)(x), base(x)

    with jax.numpy_dtype_promotion("standard"):
        for x_dtype in ("float32", "bfloat16", "int32"):
            ours, theirs = nnx.eval_shape(outputs, jax.ShapeDtypeStruct((6, 5, 4), jnp.dtype(x_dtype)))
            assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)


def test_flax_custom_functions_are_called_as_nnx_calls_them():
    seen = []

    def conv_general_dilated(*args, **kwargs):
        seen.append((args[2:], sorted((name, str(v)) for name, v in kwargs.items())))
        return jax.lax.conv_general_dilated(*args, **kwargs)

    def promote_dtype(arrays, *, dtype):
        seen.append((len(arrays), dtype))
        return arrays

    base = flax_base(
        "Conv",
        conv_general_dilated=conv_general_dilated,
        promote_dtype=promote_dtype,
        precision="highest",
        dtype="float32",
        padding=((1, 0), 2),
        kernel_dilation=2,
        feature_group_count=2,
        kernel_init=nnx.initializers.zeros,
    )
    x = jax.ShapeDtypeStruct((6, 7, 6, 4), jnp.float32)  # so few activations that one convolution serves all members
    layer = flax_conv.BatchEnsembleConv(base, num_members=3)
    jax.eval_shape(lambda x: layer(x, out_sharding=None), x)
    ours, seen[:] = list(seen), []
    jax.eval_shape(lambda x: base(x), x)
    assert ours == seen


@pytest.mark.parametrize("kind", KINDS)
def test_flax_layer_is_an_nnx_citizen(kind):
    layer = pair(kind)[1]
    x = jax.device_put(np.random.default_rng(0).standard_normal((6, 5, 5, 4)).astype(np.float32))
    y = layer(x)
    assert isinstance(layer, getattr(nnx, kind))
    graph, state = nnx.split(layer)
    variants = [nnx.merge(graph, state), nnx.clone(layer), copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))]
    for variant in variants:
        np.testing.assert_array_equal(variant(x), y)
    assert_close(jitted(layer, x), y, "float32")
    grads = nnx.eval_shape(nnx.grad(lambda layer: layer(x).sum()), layer)
    assert {path[-1] for path, _ in nnx.to_flat_state(grads)} == {"kernel", "r", "s", "bias"}
    layer.train()
    layer.eval()
    assert [type(m).__name__ for _, m in nnx.iter_modules(layer)] == [f"BatchEnsemble{kind}"]
    layer_of = batch_ensemble(flax_conv, kind)
    stacked = nnx.vmap(lambda rngs: layer_of(flax_base(kind, rngs=rngs), rngs=rngs, num_members=3))
    assert nnx.eval_shape(stacked, nnx.Rngs(0).split(2)).r.shape == (2, 3, 4)
    abstract = nnx.eval_shape(lambda: layer_of(flax_base(kind), num_members=3))
    assert abstract.kernel.shape == (3, 3, 4, 6)


@pytest.mark.parametrize("kind", KINDS)
def test_torch_layer_is_a_torch_citizen(tmp_path, kind):
    layer = pair(kind)[0]
    x = torch.randn(6, 4, 4, 3)
    y = layer(x)
    for variant in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(variant(x), y)
    torch.save(layer.state_dict(), tmp_path / "layer.pt")
    other = pair(kind, rngs=9)[0]
    other.load_state_dict(torch.load(tmp_path / "layer.pt"))
    assert torch.equal(other(x), y)
    exported = torch.export.export(layer, (x,))
    assert torch.equal(exported.module()(x), y)
    torch.autograd.gradcheck(layer.double(), x.double().requires_grad_())
    per_sample = torch.func.vmap(lambda x: torch.func.functional_call(layer, dict(layer.named_parameters()), x))
    assert_close(per_sample(x.double()[None])[0].detach(), layer(x.double()).detach(), "float64")
    assert "num_members=3" in repr(layer)
    assert "kernel_size=(3, 3)" in repr(layer)


@pytest.mark.parametrize("kind", KINDS)
def test_keep_members(kind):
    for layer, x in zip(pair(kind), (torch.randn(6, 4, 5, 5), on_device(6, 5, 5, 4)), strict=True):
        with pytest.raises(IndexError, match="from -3 to 2"):
            layer.member(7)
        with pytest.raises(IndexError, match="from -3 to 2"):
            layer.keep_members([0, 9])
        members = [layer.member(i) for i in (2, 0)]
        layer.keep_members([-1, 0])
        assert layer.num_members == 2
        for i, member in enumerate(members):
            own = layer.member(i)
            package = pt if isinstance(layer, nn.Module) else pf
            for name, array in package.to_arrays(member).items():
                np.testing.assert_array_equal(package.to_arrays(own)[name], array)
        assert layer(x).shape[0] == 6


def arguments(kind, f, x=(4, 5), channels=(3, 2), **changes):
    """Makes the arguments of the function for 1-d convolutions: x, weight, r, s."""
    in_channels, out_channels = channels
    torch_weight = {"Conv": (out_channels, in_channels, 2), "ConvTranspose": (in_channels, out_channels, 2)}[kind]
    weight = torch_weight if f is torch else (2, *channels)
    given = {"x": (x[0], 3, *x[1:]) if f is torch else (*x, 3), "weight": weight, "r": (2, 3), "s": (2, 2)} | changes
    function = "batch_ensemble_conv" if kind == "Conv" else "batch_ensemble_conv_transpose"
    module = torch_functional if f is torch else flax_functional
    arrays = [torch.zeros(shape) if f is torch else on_device(*shape) for shape in given.values()]
    return getattr(module, function)(*arrays)


def called(kind, f, torch_shape, flax_shape):
    layer = pair(kind)[0 if f is torch else 1]
    return layer(torch.zeros(torch_shape) if f is torch else on_device(*flax_shape))


def of_base(kind, f, base):
    return batch_ensemble(torch_conv if f is torch else flax_conv, kind)(base(f), num_members=2)


class OwnForward(nn.Conv2d):
    def forward(self, x):
        return x


class OwnCall(nnx.Conv):
    def __call__(self, inputs, out_sharding=None):
        return inputs


OwnForward.__name__ = OwnCall.__name__ = "Own"

CASES = {
    "rows": (lambda k, f: called(k, f, (5, 4, 6, 6), (5, 6, 6, 4)), ValueError, "call tile_members(x, 3)."),
    "one image": (lambda k, f: called(k, f, (4, 6, 6), (6, 6, 4)), ValueError, "call tile_members(x[None], 3)."),
    "a scalar": (lambda k, f: called(k, f, (), ()), ValueError, ("(-1, 4, H, W).", "(-1, H, W, 4).")),
    "channels": (lambda k, f: called(k, f, (6, 5, 7, 7), (6, 7, 7, 5)), ValueError, "(5, ...)."),
    "the other layout": (
        lambda k, f: called(k, f, (6, 7, 7, 4), (6, 4, 7, 7)),
        ValueError,
        ("x.movedim(-1, 1).", "jnp.moveaxis(x, 1, -1)."),
    ),
    "rows of a function": (lambda k, f: arguments(k, f, x=(5, 4)), ValueError, "call tile_members(x, 2)."),
    "a matrix": (lambda k, f: arguments(k, f, weight=(3, 2)), ValueError, "batch_ensemble_linear(x, weight, r, s)."),
    "one row of s": (lambda k, f: arguments(k, f, s=(1, 2)), ValueError, "tile_members(s, 2)."),
    "r of the outputs": (lambda k, f: arguments(k, f, r=(2, 2)), ValueError, "tile_members(r, 2)."),
    "a LayerNorm": (
        lambda k, f: of_base(k, f, lambda f: nn.LayerNorm(3) if f is torch else nnx.LayerNorm(3, rngs=nnx.Rngs(0))),
        TypeError,
        "call batchensemble(network, num_members=4).",
    ),
    "seed meant as members": (
        lambda k, f: batch_ensemble(torch_conv if f is torch else flax_conv, k)(None, 4),
        TypeError,
        "rngs=4, num_members=1).",
    ),
    "no members": (lambda k, f: pair(k, num_members=0)[f is not torch], ValueError, "Pass num_members=4."),
    "init": (lambda k, f: pair(k, init="gaussian")[f is not torch], ValueError, "Pass init='normal'."),
}


def sentences(call, error):
    for f in (torch, jax):
        with pytest.raises(error) as raised:
            call(f)
        assert type(raised.value) is error
        yield str(raised.value)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", CASES)
def test_the_same_sentence_in_both(name, kind):
    call, error, next_steps = CASES[name]
    ours, theirs = sentences(lambda f: call(kind, f), error)
    first, last = (next_steps, next_steps) if isinstance(next_steps, str) else next_steps
    assert ours.endswith(first)
    assert theirs.endswith(last)
    assert " expects " in ours
    assert "got " in ours
    for a, b in (
        ("in_channels, H, W] (channels first)", "H, W, in_channels] (channels last)"),
        ("in_channels, L] (channels first)", "L, in_channels] (channels last)"),
        ("axis 1 is", "last axis is"),
        ("axis -1 holds", "axis 1 holds"),
        (first, last),
    ):
        ours = ours.replace(a, b)
    shapes_differ = {"channels", "the other layout", "rows", "one image", "rows of a function"}
    if name in shapes_differ:
        ours, theirs = (s[: s.index("got (")] + s[s.index("), ", s.index("got (")) :] for s in (ours, theirs))
    assert ours == theirs


def test_a_sentence_in_full():
    with pytest.raises(ValueError, match="channels") as raised:
        pair("Conv")[0](torch.zeros(6, 7, 8, 4))
    assert str(raised.value) == (
        "BatchEnsembleConv expects inputs of shape [num_members*B, in_channels, H, W] (channels first) with "
        "num_members=3, in_channels=4; got (6, 7, 8, 4), whose axis 1 is 7 instead of 4. If axis -1 holds the "
        "channels, move it: x.movedim(-1, 1)."
    )


def test_refusals_of_one_framework():
    own_call = without_draws(lambda: OwnCall(2, 2, (3, 3), rngs=nnx.Rngs(0)))
    own = {torch: OwnForward(2, 2, 3), jax: own_call}
    ours, theirs = sentences(lambda f: of_base("Conv", f, own.get), TypeError)
    assert ours == theirs.replace("__call__", "forward")
    assert ours.endswith("Pass a Conv layer with its weights.")
    with pytest.raises(ValueError, match="know their shapes"):
        torch_conv.BatchEnsembleConv(nn.LazyConv2d(2, 3), num_members=2)
    with pytest.raises(TypeError, match=r"Convert them: x.to\(torch.float32\)"):
        pair("Conv")[0](torch.zeros(6, 4, 5, 5, dtype=torch.float64))
    with pytest.raises(ValueError, match="which has 4 spatial axes instead of at most 3"):
        arguments("Conv", torch, weight=(2, 3, 1, 1, 1, 1))
    with pytest.raises(ValueError, match="no spatial axis"):
        flax_conv.BatchEnsembleConv(without_draws(lambda: nnx.Conv(2, 3, (), rngs=nnx.Rngs(0))), num_members=2)
    with pytest.raises(ValueError, match=r"x.reshape\(-1, 4, H, W\)"):
        pair("Conv")[0](torch.zeros(2, 3, 4, 5, 5))


@pytest.mark.usefixtures("four_devices")
@pytest.mark.parametrize(
    ("kind", "options", "axes"),
    [
        ("Conv", {}, (None, "data", "model")),
        ("ConvTranspose", {}, (None, "data", "model")),
        ("ConvTranspose", {"transpose_kernel": True}, (None, "model", "data")),
    ],
)
def test_sharding_of_the_base_layer_is_kept_on_four_devices(kind, options, axes):
    metadata = {"kernel_metadata": {"out_sharding": axes}, "bias_metadata": {"out_sharding": ("model",)}}
    options = options | {"padding": "SAME", "kernel_init": nnx.initializers.zeros}
    layer, plain = (
        batch_ensemble(flax_conv, kind)(flax_base(kind, 1, **options, **more), num_members=2) for more in (metadata, {})
    )
    expected = [axes, (None, "data"), (None, "model"), (None, "model")]
    assert [getattr(layer, n).get_metadata("out_sharding") for n in ("kernel", "r", "s", "bias")] == expected
    assert len(layer.kernel.sharding.device_set) == 4
    assert layer.member(1).kernel.get_metadata("out_sharding") == axes
    x = np.ones((6, 5, 4), np.float32)
    assert_close(jitted(layer, x), jitted(plain, x), "float32")


def test_twins_with_torch_default_padding():
    for kind in KINDS:
        ours, theirs = pair(kind, dtype="float64", use_base_weights=True)
        x = np.random.default_rng(0).standard_normal((6, 4, 5, 6))
        y = ours(torch.tensor(x)).detach().numpy()
        assert_close(np.moveaxis(np.asarray(jitted(theirs, np.moveaxis(x, 1, -1))), -1, 1), y, "float64")
    assert flax_padding((3,), (0,), (2,), (1,)) == [(4, 5)]
