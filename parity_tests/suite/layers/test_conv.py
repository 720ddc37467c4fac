"""Convolutions: the same numbers in both packages, every option of the base layer, and clear sentences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from torch import nn

import probly_flax as pf
import probly_torch as pt
from parity_tests.kit.trees import jax_of
from parity_tests.suite.layers import test_contract
from parity_tests.suite.layers.contract import conv
from parity_tests.suite.oracle import conv as oracle_conv
from parity_tests.suite.subjects.conv import flax_padding, shapes
from parity_tests.suite.subjects.subject import Subject, jitted, run_oracle, run_torch, without_draws
from probly_flax.functional import conv as flax_functional
from probly_torch.functional import conv as torch_functional

KINDS = ("Conv", "ConvTranspose")
ROWS = {kind: conv(kind) for kind in KINDS}


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
    layer = ROWS[kind].convert(getattr(nn, f"{kind}2d")(2, 4, taps, **options).double(), num_members=2)
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


def numbers(*shape):
    return (np.random.default_rng(0).integers(-4, 5, shape) / 8.0).astype(np.float32)


def flax_layer(kind, axes=2, taps=3, **options):
    """Makes a layer of other weights, exact in sums, and its base layer."""
    options = {"padding": "VALID", "kernel_init": nnx.initializers.zeros, "rngs": nnx.Rngs(0)} | options
    base = getattr(nnx, kind)(4, 6, (taps,) * axes, **options)
    return ROWS[kind].randomized(ROWS[kind].convert(base, use_base_weights=True)), base


def assert_each_member_is_the_ordinary_layer(layer, x):
    y = np.asarray(jitted(layer, x))
    for i in range(3):
        rows = slice(2 * i, 2 * i + 2)
        np.testing.assert_array_equal(jitted(layer.member(i), x[rows]), y[rows])
    return y


def test_four_spatial_axes_of_flax():
    layer, _ = flax_layer("Conv", 4, taps=2)
    x = numbers(6, 3, 2, 3, 2, 4)
    assert_each_member_is_the_ordinary_layer(layer, x)
    with pytest.raises(ValueError, match="4 spatial axes, in_channels"):
        layer(x[..., :1])


def test_causal_and_more_batch_axes():
    layer, _ = flax_layer("Conv", 1, padding="CAUSAL")
    assert assert_each_member_is_the_ordinary_layer(layer, numbers(6, 3, 5, 4)).shape == (6, 3, 5, 6)


@pytest.mark.parametrize("kind", KINDS)
def test_masks_are_copied(kind):
    mask = jax_of(np.tri(3)[:, :, None, None] * np.ones((4, 6)), "float32")
    layer, base = flax_layer(kind, mask=mask, preferred_element_type=jnp.float64)
    assert layer.mask is not base.mask
    with jax.numpy_dtype_promotion("standard"):  # the base layer too adds a bias of another dtype
        assert_each_member_is_the_ordinary_layer(layer, numbers(6, 6, 5, 4))


@pytest.mark.parametrize("kind", KINDS)
def test_the_fan_in_of_groups(kind):
    layer = ROWS[kind].convert(ROWS[kind].torch_base(groups=2), rngs=3)
    drawn = pt.random.lecun_normal(pt.random.fold_in(pt.random.key(3), 0), (3, 3, 2, 6), torch.float32)
    for o in range(6):
        for j in range(2):
            weight = layer.weight[o, j] if kind == "Conv" else layer.weight[o // 3 * 2 + j, o % 3]
            assert torch.equal(weight, drawn[:, :, j, o])


def test_the_flax_draw_is_that_of_nnx():
    layer = ROWS["Conv"].convert(ROWS["Conv"].flax_base(), rngs=nnx.Rngs(3))
    key = nnx.Rngs(3).params()
    np.testing.assert_array_equal(layer.kernel[...], nnx.initializers.lecun_normal()(key, (3, 3, 4, 6), jnp.float32))


@pytest.mark.parametrize("kind", KINDS)
def test_channels_last_memory_stays_so(kind):
    base = ROWS[kind].torch_base().to(memory_format=torch.channels_last)
    layer = ROWS[kind].convert(base).to(memory_format=torch.channels_last)
    x = torch.randn(6, 4, 6, 5).to(memory_format=torch.channels_last)
    assert base(x).is_contiguous(memory_format=torch.channels_last)
    assert layer(x).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_output_size_is_that_of_the_base_layer(axes):
    row = conv("ConvTranspose", axes)
    base = row.torch_base(stride=3, padding=1, dilation=2)
    layer = row.randomized(row.convert(base, num_members=2))
    x = torch.from_numpy(numbers(4, 4, *(3,) * axes))
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
def test_autocast_gives_the_dtype_of_the_base_layer_where_inputs_are_padded_by_hand(dtype):
    row = conv("Conv", ours={"padding": 1, "padding_mode": "circular"})
    test_contract.test_torch_takes_and_gives_the_dtypes_of_the_base_layer(row, dtype)


def arguments(kind, f, x=(4, 5), channels=(3, 2), **changes):
    """Makes the arguments of the function for 1-d convolutions: x, weight, r, s."""
    in_channels, out_channels = channels
    torch_weight = {"Conv": (out_channels, in_channels, 2), "ConvTranspose": (in_channels, out_channels, 2)}[kind]
    weight = torch_weight if f is torch else (2, *channels)
    given = {"x": (x[0], 3, *x[1:]) if f is torch else (*x, 3), "weight": weight, "r": (2, 3), "s": (2, 2)} | changes
    function = "batch_ensemble_conv" if kind == "Conv" else "batch_ensemble_conv_transpose"
    module = torch_functional if f is torch else flax_functional
    arrays = [torch.zeros(shape) if f is torch else jax_of(np.zeros(shape)) for shape in given.values()]
    return getattr(module, function)(*arrays)


CASES = {
    "rows of a function": ({"x": (5, 4)}, "call tile_members(x, 2)."),
    "a matrix": ({"weight": (3, 2)}, "batch_ensemble_linear(x, weight, r, s)."),
    "one row of s": ({"s": (1, 2)}, "tile_members(s, 2)."),
    "r of the outputs": ({"r": (2, 2)}, "tile_members(r, 2)."),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", CASES)
def test_functions_refuse_with_the_same_sentence(name, kind):
    changes, end = CASES[name]
    sentences = []
    for f in (torch, jax):
        with pytest.raises(ValueError, match=r" expects .* got ") as raised:
            arguments(kind, f, **changes)
        sentences.append(str(raised.value).replace(str((5, 3, 4)), str((5, 4, 3))))
        assert sentences[-1].endswith(end)
    ours, theirs = sentences
    for a, b in ROWS[kind].wording:
        ours = ours.replace(a, b)
    assert ours == theirs


def test_a_sentence_in_full():
    with pytest.raises(ValueError, match="channels") as raised:
        ROWS["Conv"].convert(ROWS["Conv"].torch_base())(torch.zeros(6, 7, 8, 4))
    assert str(raised.value) == (
        "BatchEnsembleConv expects inputs of shape [num_members*B, in_channels, H, W] (channels first) with "
        "num_members=3, in_channels=4; got (6, 7, 8, 4), whose axis 1 is 7 instead of 4. If axis -1 holds the "
        "channels, move it: x.movedim(-1, 1)."
    )


def test_refusals_of_one_framework():
    with pytest.raises(ValueError, match="know their shapes"):
        pt.BatchEnsembleConv(nn.LazyConv2d(2, 3), num_members=2)
    with pytest.raises(TypeError, match=r"Convert them: x.to\(torch.float32\)"):
        ROWS["Conv"].convert(ROWS["Conv"].torch_base())(torch.zeros(6, 4, 5, 5, dtype=torch.float64))
    with pytest.raises(ValueError, match="which has 4 spatial axes instead of at most 3"):
        arguments("Conv", torch, weight=(2, 3, 1, 1, 1, 1))
    assert flax_padding((3,), (0,), (2,), (1,)) == [(4, 5)]
    with pytest.raises(ValueError, match="no spatial axis"):
        pf.BatchEnsembleConv(without_draws(lambda: nnx.Conv(2, 3, (), rngs=nnx.Rngs(0))), num_members=2)
    with pytest.raises(ValueError, match=r"x.reshape\(-1, 4, H, W\)"):
        ROWS["Conv"].convert(ROWS["Conv"].torch_base())(torch.zeros(2, 3, 4, 5, 5))
