"""BatchEnsembleLinear: the parts of its base layer that it keeps, and how it behaves as a citizen of its framework."""

import copy
import pickle

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
from parity_tests.standard import assert_close
from parity_tests.suite.subject import jitted, without_draws

OPTIONS = [
    {},
    {"init": "random_sign"},
    {"init": "ones", "r_std": 0.0},
    {"use_base_weights": True, "r_mean": 0.5, "r_std": 0.1, "s_mean": -1.0, "s_std": 2.0},
    {"rngs": 7},
]


def pair(dtype="float32", bias=True, **options):
    ours = nn.Linear(5, 7, bias=bias, dtype=getattr(torch, dtype))
    options_of_flax = {"use_bias": bias, "param_dtype": jnp.dtype(dtype)}
    theirs = without_draws(lambda: nnx.Linear(5, 7, **options_of_flax, rngs=nnx.Rngs(0)))
    pf.load_arrays(theirs, pt.to_arrays(ours))
    options = {"num_members": 3} | options
    return pt.BatchEnsembleLinear(ours, **options), pf.BatchEnsembleLinear(theirs, **options)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_one_seed_gives_one_layer_bit_for_bit(dtype, options):
    ours, theirs = pair(dtype, **options)
    a, b = pt.to_arrays(ours), pf.to_arrays(theirs)
    assert a.keys() == b.keys() == {"weight", "r", "s", "bias"}
    for name in a:
        assert a[name].dtype == b[name].dtype == jnp.dtype(dtype)
        np.testing.assert_array_equal(a[name], b[name])


def test_parameters_of_a_new_layer_are_contiguous():
    assert all(parameter.is_contiguous() for parameter in pair()[0].parameters())


def test_random_sign_is_a_sign_and_independent_of_x64():
    expected = pair(init="random_sign")[0].r
    assert set(expected.detach().flatten().tolist()) == {-1.0, 1.0}
    with jax.enable_x64(False):
        np.testing.assert_array_equal(pair(init="random_sign")[1].r[...], expected.detach().numpy())


def test_ones_are_ones_and_take_the_keys_of_draws():
    for layer, rngs in zip(pair(init="ones", use_base_weights=True), (pt.Rngs(0), pf.Rngs(0)), strict=True):
        new = type(layer)(layer.member(0), num_members=2, init="ones", rngs=rngs)
        assert all((np.asarray(each.tolist()) == 1).all() for each in (new.r, new.s, layer.r, layer.s))
        assert int(rngs.default.count) == 3


def test_a_layer_made_under_jit_is_the_same_bit_for_bit():
    options = {"r_mean": 0.3, "r_std": 0.7, "s_mean": -0.1, "s_std": 0.0}
    base = nnx.Linear(5, 7, rngs=nnx.Rngs(0))
    layer = nnx.jit(lambda base: pf.BatchEnsembleLinear(base, num_members=3, **options))(base)
    expected = pt.BatchEnsembleLinear(nn.Linear(5, 7), num_members=3, **options)
    for ours, theirs in ((expected.weight.T, layer.kernel), (expected.r, layer.r), (expected.s, layer.s)):
        np.testing.assert_array_equal(ours.detach().numpy(), theirs[...])


def test_the_draws_follow_the_documented_order():
    rngs = pt.Rngs(3)
    layer = pt.BatchEnsembleLinear(nn.Linear(5, 7), rngs=rngs, num_members=2)
    assert int(rngs.default.count) == 3
    keys = [pt.random.fold_in(pt.random.key(3), i) for i in range(3)]
    assert torch.equal(layer.weight, pt.random.lecun_normal(keys[0], (5, 7), torch.float32).T)
    assert torch.equal(layer.r, 1 + 0.5 * pt.random.normal(keys[1], (2, 5)))
    assert torch.equal(layer.s, 1 + 0.5 * pt.random.normal(keys[2], (2, 7)))


def test_the_base_layer_is_copied_and_left_alone():
    ours = nn.Linear(5, 7)
    ours.weight.requires_grad_(False)
    before = copy.deepcopy(ours.state_dict())
    layer = pt.BatchEnsembleLinear(ours, num_members=3, use_base_weights=True)
    assert not layer.weight.requires_grad
    assert layer.r.requires_grad
    assert layer.bias.requires_grad
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.zero_()
    assert all(torch.equal(before[name], value) for name, value in ours.state_dict().items())
    theirs = nnx.Linear(5, 7, rngs=nnx.Rngs(0))
    kernel = theirs.kernel[...]
    layer = pf.BatchEnsembleLinear(theirs, num_members=3, use_base_weights=True)
    assert layer.kernel is not theirs.kernel
    layer.kernel[...] = jnp.zeros_like(kernel)
    assert (theirs.kernel[...] == kernel).all()


def test_a_layer_without_bias_has_none_and_each_member_starts_with_the_base_bias():
    for layer in pair(bias=False):
        assert layer.bias is None
    ours, theirs = pair()
    assert torch.equal(ours.bias[0], ours.bias[2])
    np.testing.assert_array_equal(theirs.bias[...], ours.bias.detach().numpy())


def test_a_base_on_another_device_gives_a_layer_there():
    for init in ("normal", "random_sign", "ones"):
        layer = pt.BatchEnsembleLinear(nn.Linear(5, 7, device="meta"), num_members=3, init=init)
        assert {p.device.type for p in layer.parameters()} == {"meta"}
        assert layer(torch.zeros(6, 5, device="meta")).shape == (6, 7)


@pytest.mark.parametrize("shape", [(6, 5), (6, 2, 5), (6, 2, 3, 5), (0, 5), (3, 0, 5)])
def test_any_rank_and_no_rows(shape):
    ours, theirs = pair()
    assert ours(torch.ones(shape)).shape == jitted(theirs, np.ones(shape, "float32")).shape == (*shape[:-1], 7)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
@pytest.mark.parametrize("amp", [torch.bfloat16, torch.float16])
def test_autocast_gives_the_dtype_of_the_base_layer(dtype, amp):
    base = nn.Linear(5, 7, dtype=getattr(torch, dtype))
    layer = pt.BatchEnsembleLinear(base, num_members=3)
    x = torch.ones(6, 5, dtype=getattr(torch, dtype), requires_grad=True)
    with torch.autocast("cpu", amp):
        y = layer(x)
        assert y.dtype == base(x).dtype
    y.sum().backward()
    assert x.grad.dtype == x.dtype
    assert {p.grad.dtype for p in layer.parameters()} == {base.weight.dtype}


@pytest.mark.parametrize("dtype", [None, "float32", "bfloat16"])
@pytest.mark.parametrize("param_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("preferred", [None, "float32"])
def test_flax_dtype_options_give_the_dtype_of_the_base_layer(dtype, param_dtype, preferred):
    def outputs(x):
        options = {"dtype": dtype, "param_dtype": param_dtype, "preferred_element_type": preferred}
        base = nnx.Linear(5, 7, **options, rngs=nnx.Rngs(0))
        return pf.BatchEnsembleLinear(base, num_members=3)(x), base(x)

    with jax.numpy_dtype_promotion("standard"):
        for x_dtype in ("float32", "bfloat16", "int32"):
            ours, theirs = nnx.eval_shape(outputs, jax.ShapeDtypeStruct((6, 5), jnp.dtype(x_dtype)))
            assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)


def test_flax_custom_functions_are_called_as_nnx_calls_them():
    seen = []

    def dot_general(*args, **kwargs):
        seen.append(sorted(kwargs))
        return jax.lax.dot_general(*args, **kwargs)

    def promote_dtype(arrays, *, dtype):
        inputs, kernel, bias = arrays
        seen.append(dtype)
        return inputs, kernel, bias

    base = nnx.Linear(
        5,
        7,
        dot_general=dot_general,
        promote_dtype=promote_dtype,
        precision="highest",
        dtype="float32",
        rngs=nnx.Rngs(0),
    )
    x = jax_of(np.ones((6, 5), "float32"))
    pf.BatchEnsembleLinear(base, num_members=3)(x)
    ours, seen[:] = list(seen), []
    base(x)
    assert ours == seen


def test_flax_layer_is_an_nnx_citizen():
    layer = pair()[1]
    x = jax_of(np.ones((6, 5), "float32"))
    y = layer(x)
    assert isinstance(layer, nnx.Linear)
    graph, state = nnx.split(layer)
    variants = [nnx.merge(graph, state), nnx.clone(layer), copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))]
    for variant in variants:
        np.testing.assert_array_equal(variant(x), y)
    assert_close(jitted(layer, x), y, "float32")
    grads = nnx.grad(lambda layer: layer(x).sum())(layer)
    assert {path[-1] for path, _ in nnx.to_flat_state(grads)} == {"kernel", "r", "s", "bias"}
    layer.train()
    layer.eval()
    layer.set_attributes(deterministic=True, raise_if_not_found=False)
    assert [type(m).__name__ for _, m in nnx.iter_modules(layer)] == ["BatchEnsembleLinear"]
    abstract = nnx.eval_shape(lambda: pair()[1])
    assert abstract.r.shape == (3, 5)
    stacked = nnx.vmap(lambda rngs: pf.BatchEnsembleLinear(nnx.Linear(5, 7, rngs=rngs), rngs=rngs, num_members=3))
    assert stacked(nnx.Rngs(0).split(4)).r.shape == (4, 3, 5)


def test_torch_layer_is_a_torch_citizen(tmp_path):
    layer = pair()[0]
    x = torch.randn(6, 5)
    y = layer(x)
    for variant in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(variant(x), y)
    torch.save(layer.state_dict(), tmp_path / "layer.pt")
    other = pair(rngs=9)[0]
    other.load_state_dict(torch.load(tmp_path / "layer.pt"))
    assert torch.equal(other(x), y)
    exported = torch.export.export(layer, (x,))
    assert torch.equal(exported.module()(x), y)
    torch.autograd.gradcheck(layer.double(), x.double().requires_grad_())
    per_sample = torch.func.vmap(lambda x: torch.func.functional_call(layer, dict(layer.named_parameters()), x))
    assert_close(per_sample(x.double()[None])[0].detach(), layer(x.double()).detach(), "float64")
    assert "num_members=3" in repr(layer)


def test_member_is_an_ordinary_layer_that_computes_the_same():
    ours, theirs = pair(dtype="float64")
    x = np.random.default_rng(0).standard_normal((2, 5))
    for i in range(3):
        a, b = ours.member(i), theirs.member(i)
        assert type(a) is nn.Linear
        assert type(b) is nnx.Linear
        np.testing.assert_array_equal(pt.to_arrays(a)["weight"], pf.to_arrays(b)["weight"])
        full = ours(torch.tensor(np.tile(x, (3, 1))))[2 * i : 2 * i + 2].detach()
        assert_close(a(torch.tensor(x)).detach().numpy(), full.numpy(), "float64")
        assert_close(b(jax_of(x)), full.numpy(), "float64")


@pytest.mark.usefixtures("four_devices")
def test_sharding_of_the_base_layer_is_kept_on_four_devices():
    metadata = {"kernel_metadata": {"out_sharding": ("data", "model")}, "bias_metadata": {"out_sharding": ("model",)}}
    layer, plain = (
        pf.BatchEnsembleLinear(nnx.Linear(4, 6, rngs=nnx.Rngs(0), **more), num_members=2) for more in (metadata, {})
    )
    expected = [("data", "model"), (None, "data"), (None, "model"), (None, "model")]
    parameters = [getattr(layer, name) for name in ("kernel", "r", "s", "bias")]
    assert [parameter.get_metadata("out_sharding") for parameter in parameters] == expected
    assert [tuple(parameter[...].sharding.spec) for parameter in parameters] == expected
    x = jax_of(np.ones((6, 4)), "float32")
    assert_close(jitted(layer, x), jitted(plain, x), "float32")
    assert layer.member(1).kernel.get_metadata("out_sharding") == ("data", "model")


def test_indices_out_of_range_are_refused():
    for layer in pair():
        with pytest.raises(IndexError, match="from -3 to 2"):
            layer.member(7)
        with pytest.raises(IndexError, match="from -3 to 2"):
            layer.keep_members([0, 9])
        layer.keep_members([-1, 0])
        assert layer.num_members == 2
