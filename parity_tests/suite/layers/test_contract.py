"""The contract of a BatchEnsemble layer: every promise, of every kind of layer, in both frameworks."""

import copy
import pickle
import re

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
from parity_tests.suite.layers.contract import KINDS, MEMBERS, VARIANTS

DRAWING = [kind for kind in KINDS if kind.fast]  # norms draw nothing
each_kind = pytest.mark.parametrize("kind", KINDS, ids=str)
each_variant = pytest.mark.parametrize("kind", VARIANTS, ids=str)
each_drawing_kind = pytest.mark.parametrize("kind", DRAWING, ids=str)


def arrays_of(layer):
    return (pt if isinstance(layer, nn.Module) else pf).to_arrays(layer)


def each_option(name, kinds=VARIANTS):
    """Lists the options of the base layers of these kinds, in one framework."""
    cases = [(kind, options) for kind in kinds for options in getattr(kind, name)]
    return pytest.mark.parametrize(("kind", "options"), cases, ids=lambda each: re.sub(r" at 0x\w+", "", str(each)))


def rows_of(kind, x, i):
    batch = len(x) // MEMBERS
    return x[i * batch : (i + 1) * batch]


def assert_equal_arrays(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype, name
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


# Draws.

DRAWS = [
    {},
    {"init": "random_sign"},
    {"init": "ones", "r_std": 0.0},
    {"use_base_weights": True, "r_mean": 0.5, "r_std": 0.1, "s_mean": -1.0, "s_std": 2.0},
    {"rngs": 7},
]


@pytest.mark.parametrize("options", DRAWS, ids=str)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@each_drawing_kind
def test_one_seed_gives_one_layer_bit_for_bit(kind, dtype, options):
    ours, theirs = kind.pair(dtype, **options)
    a, b = pt.to_arrays(ours), pf.to_arrays(theirs)
    assert_equal_arrays(a, b)
    assert a.keys() == pt.to_arrays(kind.torch_base()).keys() | {*kind.fast_names}
    assert {array.dtype for array in a.values()} == {jnp.dtype(dtype)}
    if "use_base_weights" not in options:  # members: their products too
        assert_equal_arrays(pt.to_arrays(ours.member(1)), pf.to_arrays(theirs.member(1)))


@pytest.mark.parametrize("options", [{}, {"init": "random_sign"}, {"use_base_weights": True}], ids=str)
@pytest.mark.parametrize("kind", [kind for kind in VARIANTS if kind.fast and kind not in KINDS], ids=str)
def test_one_seed_gives_one_layer_whatever_the_options_of_the_base(kind, options):
    ours, theirs = kind.pair(**options)
    assert_equal_arrays(pt.to_arrays(ours), pf.to_arrays(theirs))


@each_drawing_kind
def test_the_draws_follow_the_documented_order(kind):
    rngs = pt.Rngs(3)
    arrays = pt.to_arrays(kind.convert(kind.torch_base(), rngs=rngs, num_members=2))
    count = 3 * len(kind.fast)
    keys = [pt.random.fold_in(pt.random.key(3), i) for i in range(count)]
    for i, weight in enumerate(kind.drawn(arrays) if kind.drawn else ()):
        np.testing.assert_array_equal(weight, pt.random.lecun_normal(keys[3 * i], weight.shape, torch.float32))
    for i, pair in enumerate(kind.fast):
        for j, name in enumerate(pair):
            drawn = 1 + 0.5 * pt.random.normal(keys[3 * i + 1 + j], arrays[name].shape)
            np.testing.assert_array_equal(arrays[name], drawn, err_msg=name)
    for ours, theirs in ((rngs, pf.Rngs(3)), (pt.Rngs(3), pf.Rngs(3))):
        options = {"num_members": 2, "use_base_weights": ours is not rngs}
        kind.convert(kind.flax_base(), rngs=theirs, **options)
        if ours is not rngs:
            kind.convert(kind.torch_base(), rngs=ours, **options)
        drawn = count - len(kind.fast) * options["use_base_weights"]
        assert int(ours.default.count) == int(theirs.default.count[...]) == drawn


@each_drawing_kind
def test_signs_are_signs_and_ones_are_ones(kind):
    signs = pt.to_arrays(kind.pair(init="random_sign")[0])
    with jax.enable_x64(False):  # the bits of a sign do not depend on it
        assert_equal_arrays(pf.to_arrays(kind.pair(init="random_sign")[1]), signs)
    for name in kind.fast_names:
        assert {*signs[name].flat} == {-1.0, 1.0}
    for rngs, base in zip((pt.Rngs(0), pf.Rngs(0)), kind.bases(), strict=True):
        arrays = arrays_of(kind.convert(base, init="ones", rngs=rngs))
        assert all((arrays[name] == 1).all() for name in kind.fast_names)
        assert int(rngs.default.count[...]) == 3 * len(kind.fast)  # it takes the keys of draws


# Attention and recurrent layers are made of these, and norms draw nothing.
@pytest.mark.parametrize("kind", [kind for kind in DRAWING if kind.exact], ids=str)
def test_a_layer_made_under_jit_is_the_same_bit_for_bit(kind):
    options = {"r_mean": 0.3, "r_std": 0.7, "s_mean": -0.1, "s_std": 0.0}
    ours, theirs = kind.bases()
    layer = nnx.jit(lambda base: kind.convert(base, **options))(theirs)
    assert_equal_arrays(pf.to_arrays(layer), pt.to_arrays(kind.convert(ours, **options)))


# The base layer.


@each_kind
def test_parameters_of_a_new_layer_are_contiguous(kind):
    for options in ({}, {"use_base_weights": True} if kind.fast else {}):
        layer = kind.convert(kind.torch_base(), **options)
        assert all(parameter.is_contiguous() for parameter in layer.parameters())


@pytest.mark.parametrize("use_base_weights", [True, False])
@each_variant
def test_the_base_layer_of_torch_is_copied_and_left_alone(kind, use_base_weights):
    base = kind.torch_base().eval()
    frozen = [name for name, _ in base.named_parameters()][::2]
    for name in frozen:
        base.get_parameter(name).requires_grad_(False)
    before, state = copy.deepcopy(base.state_dict()), torch.get_rng_state()
    layer = kind.convert(base, **({"use_base_weights": use_base_weights} if kind.fast else {}))
    assert torch.equal(state, torch.get_rng_state())
    member = layer.member(1)
    for name, parameter in (*layer.named_parameters(), *member.named_parameters()):
        assert parameter.requires_grad == (name not in frozen), name
    for name, value in before.items():
        if use_base_weights or "bias" in name:  # each member starts with the base layer's
            own = layer.state_dict()[name]
            assert torch.equal(own, value.expand(own.shape)), name
    kind.torch_call(layer.train(), kind.torch_inputs())  # which moves running statistics
    with torch.no_grad():
        for value in layer.state_dict().values():
            value.zero_()
    for name, value in base.state_dict().items():
        assert torch.equal(before[name], value), name


@each_kind
def test_the_mode_of_the_base_layer_is_kept(kind):
    for training in (True, False):
        layer = kind.convert(kind.torch_base().train(training))
        assert layer.training == layer.member(1).training == training


@each_kind
def test_the_base_layer_of_flax_is_copied_and_left_alone(kind):
    base = kind.flax_base()
    states = (nnx.Param, nnx.BatchStat)
    before = [(path, np.array(variable)) for path, variable in nnx.to_flat_state(nnx.state(base, states))]
    layer = kind.convert(base, **({"use_base_weights": True} if kind.fast else {}))
    own = dict(nnx.to_flat_state(nnx.state(layer, states)))
    for path, value in before:  # each member starts with the base layer's
        np.testing.assert_array_equal(own[path], np.broadcast_to(value, own[path].shape), err_msg=str(path))
    variables = [{id(v) for _, v in nnx.iter_graph(each) if isinstance(v, nnx.Variable)} for each in (base, layer)]
    assert not variables[0] & variables[1]  # random states neither
    for variable in own.values():
        variable.set_value(jax_of(np.zeros(variable.shape), variable.dtype))
    for (path, value), (_, after) in zip(before, nnx.to_flat_state(nnx.state(base, states)), strict=True):
        np.testing.assert_array_equal(after, value, err_msg=str(path))


@each_kind
def test_a_layer_without_bias_has_none(kind):
    if kind.without_bias is None:
        return
    ours, theirs = kind.without_bias
    for base in (kind.torch_base(**ours), kind.flax_base(**theirs)):
        layer = kind.convert(base)
        for each in (layer, layer.member(0)):
            assert not [name for name in arrays_of(each) if "bias" in name]
            assert getattr(each, "bias", None) is None
        layer.keep_members([1])
        assert layer.num_members == 1


@pytest.mark.parametrize("kind", [kind for kind in VARIANTS if kind in KINDS or kind.channels_last], ids=str)
def test_a_base_on_another_device_gives_a_layer_there(kind):
    base = kind.make_torch(device="meta")
    x = kind.torch_inputs().to("meta")
    for init in ("normal", "random_sign", "ones") if kind.fast else ("none",):
        options = {"init": init, "use_base_weights": init != "normal"} if kind.fast else {}
        layer = kind.convert(base, **options)
        assert {value.device.type for value in layer.state_dict().values()} == {"meta"}
        assert kind.torch_call(layer, x).shape == kind.torch_call(base, x).shape


# Members.


@each_option("torch_options")
def test_each_member_of_torch_is_the_ordinary_layer(kind, options):
    base = kind.torch_base(**options).eval()
    base.get_parameter(next(iter(base.state_dict()))).requires_grad_(False) if [*base.parameters()] else None
    layer = kind.randomized(kind.convert(base))
    x = kind.inputs()
    y = kind.run(layer, x)
    assert y.shape == kind.run(base, x).shape
    for i in range(MEMBERS):
        member = layer.member(i)
        assert [type(m) for m in member.modules()] == [type(m) for m in base.modules()]
        assert repr(member) == repr(base)
        assert vars(member).keys() == vars(base).keys()
        plain = {name: v for name, v in vars(base).items() if isinstance(v, (bool, int, float, str, tuple))}
        del plain["training"]
        assert plain == {name: getattr(member, name) for name in plain}
        described = [
            {n: (p.shape, p.dtype, p.device, p.requires_grad) for n, p in m.named_parameters()} for m in (base, member)
        ]
        assert described[0] == described[1]
        kind.same(kind.run(member, rows_of(kind, x, i)), rows_of(kind, y, i))


@each_option("flax_options", [kind for kind in VARIANTS if not kind.run_apart])
def test_each_member_of_flax_is_the_ordinary_layer(kind, options):
    base = kind.flax_base(**options)
    layer = kind.randomized(kind.convert(base))
    base.eval()
    layer.eval()
    x = kind.inputs()
    with jax.numpy_dtype_promotion("standard"):  # of nnx's own arithmetic
        y = kind.run(layer, x)
        expected = nnx.eval_shape(kind.flax_call, base, kind.flax_inputs())
        assert y.dtype == expected.dtype
        assert kind.laid_out(y).shape == expected.shape
        for i in range(MEMBERS):
            member = layer.member(i)
            assert type(member) is type(base)
            assert vars(member).keys() == vars(base).keys()
            kind.same(kind.run(member, rows_of(kind, x, i)), rows_of(kind, y, i))


@each_option("flax_options")
def test_a_member_of_flax_has_the_state_of_its_base(kind, options):
    def base():
        layer = kind.make_flax(rngs=nnx.Rngs(0), **options)
        layer.eval()
        return layer

    one, other = nnx.eval_shape(base), nnx.eval_shape(lambda: kind.convert(base()).member(-1))
    a, b = (nnx.to_flat_state(nnx.state(layer)) for layer in (one, other))
    assert [(path, type(v), v.shape, v.dtype) for path, v in a] == [(path, type(v), v.shape, v.dtype) for path, v in b]
    assert str(nnx.graphdef(other)) == str(nnx.graphdef(one))


@each_kind
def test_both_compute_the_same(kind):
    ours, theirs = kind.pair()
    pf.load_arrays(theirs, pt.to_arrays(kind.randomized(ours)))
    x = kind.inputs()
    ours.eval()
    theirs.eval()
    kind.same(kind.run(theirs, x), kind.run(ours, x))


@each_kind
def test_keep_members(kind):
    x = kind.inputs()
    batch = len(x) // MEMBERS
    for layer in map(kind.randomized, kind.pair()):
        layer.eval()
        y, members = kind.run(layer, x), [arrays_of(layer.member(i)) for i in (2, 0)]
        for wrong in ([0, 9], [MEMBERS]):
            with pytest.raises(IndexError, match="from -3 to 2"):
                layer.keep_members(wrong)
        layer.keep_members([2, -3])
        assert layer.num_members == 2
        for i, arrays in enumerate(members):
            assert_equal_arrays(arrays_of(layer.member(i)), arrays)
        kept = np.concatenate([x[2 * batch :], x[:batch]])
        kind.same(kind.run(layer, kept), np.concatenate([y[2 * batch :], y[:batch]]))
        with pytest.raises(IndexError, match="from -2 to 1"):
            layer.keep_members([2])
        with pytest.raises(IndexError, match="from -2 to 1"):
            layer.member(2)
        assert layer.num_members == 2


@pytest.mark.parametrize(("kind", "shape"), [(kind, shape) for kind in KINDS for shape in kind.shapes], ids=str)
def test_other_shapes(kind, shape):
    ours, theirs = kind.pair()
    x = np.zeros(shape, int if kind.tokens else "float32")
    assert kind.run(ours, x).shape == kind.run(theirs, x).shape == kind.run(kind.torch_base(), x).shape


@each_variant
def test_no_rows(kind):
    base, theirs = kind.bases()
    ours, none = kind.convert(base), kind.torch_inputs(rows=0)
    shape = kind.torch_call(base, none).shape
    assert kind.torch_call(ours, none).shape == shape
    assert shape[0] == 0
    for name, value in base.state_dict().items():  # no statistics are moved
        if (name not in kind.fast_names and "weight" not in name) or not kind.fast:
            own = ours.state_dict()[name]
            assert torch.equal(own, value.expand(own.shape)), name
    assert kind.run(kind.convert(theirs), kind.inputs(rows=0)).shape == shape


# Dtypes.


@pytest.mark.parametrize("param_dtype", ["float32", "bfloat16", "float64"])
@each_variant
def test_torch_takes_and_gives_the_dtypes_of_the_base_layer(kind, param_dtype):
    base = kind.torch_base(param_dtype)
    layer = kind.convert(base)
    for dtype in ("float32", "bfloat16", "float16", "float64"):
        for amp in (None, torch.bfloat16, torch.float16):
            x = kind.torch_inputs(dtype)
            x.requires_grad_(not kind.tokens)
            with torch.autocast("cpu", amp, enabled=amp is not None):
                try:
                    expected = kind.torch_call(base, x).dtype
                except (RuntimeError, ValueError) as refused:
                    # Under autocast, torch's kernels of sequences refuse what they do by themselves.
                    own = kind.layer_name in ("BatchEnsembleLSTM", "BatchEnsembleGRU") and amp is not None
                    with pytest.raises(type(refused) if own else TypeError, match="." if own else "Convert"):
                        kind.torch_call(layer, x)
                    continue
                y = kind.torch_call(layer, x)
            assert y.dtype == expected
            if dtype == param_dtype:
                layer.zero_grad()
                y.float().sum().backward()
                assert kind.tokens or x.grad.dtype == x.dtype
                assert {p.grad.dtype for p in layer.parameters()} == {getattr(torch, param_dtype)}


@pytest.mark.parametrize("dtype", [None, "float32", "bfloat16"])
@pytest.mark.parametrize("param_dtype", ["float32", "bfloat16"])
@each_kind
def test_flax_takes_and_gives_the_dtypes_of_the_base_layer(kind, dtype, param_dtype):
    for preferred in [{}, {"preferred_element_type": "float32"}] if kind.preferred else [{}]:

        def layers(options={"dtype": dtype} | preferred):
            base = kind.make_flax(param_dtype=param_dtype, rngs=nnx.Rngs(0), **options)
            return kind.convert(base), base

        ours, theirs = nnx.eval_shape(layers)
        with jax.numpy_dtype_promotion("standard"):
            for x_dtype in ("int32",) if kind.tokens else ("float32", "bfloat16", "int32"):
                x = jax.ShapeDtypeStruct(kind.flax_inputs().shape, x_dtype)
                try:
                    expected = nnx.eval_shape(kind.flax_call, theirs, x)
                except TypeError:  # nnx.RNN's scan, whose carry changes its dtype
                    with pytest.raises(TypeError, match="scan"):
                        nnx.eval_shape(kind.flax_call, ours, x)
                else:
                    y = nnx.eval_shape(kind.flax_call, ours, x)
                    assert (y.shape, y.dtype) == (expected.shape, expected.dtype)


@each_kind
def test_flax_calls_functions_as_nnx_calls_them(kind):
    seen = []

    def recorded(name, function):
        if name.endswith("_cls"):
            return lambda: recorded(name.removesuffix("_cls"), function())

        def call(*args, **kwargs):
            leaves = jax.tree.leaves(args, is_leaf=lambda leaf: leaf is None)
            what = "shape" if "dot_general" in name else "dtype"  # of promote_dtype, where biases are the members'
            described = [getattr(leaf, what, leaf) for leaf in leaves]
            seen.append((name, described, sorted((key, str(value)) for key, value in kwargs.items())))
            return function(*args, **kwargs)

        return call

    options = {name: recorded(name, v) if callable(v) else v for name, v in kind.functions.items()}
    base = kind.flax_base(**options)
    layer = kind.convert(base)
    x = jax.ShapeDtypeStruct(kind.flax_inputs().shape, kind.flax_inputs().dtype)
    calls = []
    for each in (layer, base, layer.member(0)):
        seen.clear()
        nnx.eval_shape(kind.flax_call, each, x)
        calls.append([*seen])
    assert calls[0] == calls[1] == calls[2]
    recorded_names = {name.removesuffix("_cls") for name, value in options.items() if value is not kind.functions[name]}
    assert {name for name, *_ in calls[0]} == recorded_names


# Citizens.


@each_kind
def test_torch_layer_is_a_torch_citizen(kind, tmp_path):
    layer = kind.randomized(kind.convert(kind.torch_base())).eval()
    x, before = kind.torch_inputs(), copy.deepcopy(layer.state_dict())
    y = kind.torch_call(layer, x)
    assert before.keys() == kind.torch_base().state_dict().keys() | {*kind.fast_names}
    for name, value in layer.state_dict().items():
        assert torch.equal(before[name], value), name
    for variant in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(kind.torch_call(variant, x), y)
    torch.save(layer.state_dict(), tmp_path / "layer.pt")
    other = kind.convert(kind.torch_base()).eval()
    other.load_state_dict(torch.load(tmp_path / "layer.pt"))
    assert torch.equal(kind.torch_call(other, x), y)

    class Called(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, x):
            return kind.torch_call(self.layer, x)

    assert torch.equal(torch.export.export(Called(), (x,)).module()(x), y)
    called, x = Called().double(), kind.torch_inputs("float64")
    if not kind.tokens:
        assert torch.autograd.gradcheck(called, x.requires_grad_())
    if kind.vmaps:
        per_sample = torch.func.vmap(lambda x: torch.func.functional_call(called, dict(called.named_parameters()), x))
        assert_close(per_sample(x[None])[0].detach(), called(x).detach(), "float64")
    assert all(part in repr(layer) for part in ("num_members=3", *kind.torch_base().extra_repr().split(", ")))


@each_kind
def test_flax_layer_is_an_nnx_citizen(kind):
    base = kind.flax_base()
    layer = kind.randomized(kind.convert(base))
    layer.eval()
    assert isinstance(layer, type(base))
    call, x = kind.flax_call, kind.flax_inputs()
    assert len([*nnx.iter_modules(layer)]) == len([*nnx.iter_modules(base)])
    y = call(layer, x)
    variants = [nnx.merge(*nnx.split(layer)), nnx.clone(layer), copy.deepcopy(layer)]
    variants += [pickle.loads(pickle.dumps(layer))] if kind.picklable else []
    for variant in variants:
        np.testing.assert_array_equal(call(variant, x), y)
    assert_close(nnx.jit(call)(layer, x), y, "float32")
    for mode in ("train", "eval"):
        for each in (layer, base):
            getattr(each, mode)()
        for name in ("deterministic", "use_running_average"):
            assert getattr(layer, name, None) == getattr(base, name, None)
    layer.set_attributes(deterministic=True, raise_if_not_found=False)
    grads = nnx.eval_shape(nnx.grad(lambda layer, x: (call(layer, x) ** 2).sum()), layer, x)
    paths = {path for path, _ in nnx.to_flat_state(nnx.state(base, nnx.Param))}
    paths |= {(*path[:-1], name) for path in paths for name in "rs" if path[-1] in ("kernel", "embedding")}
    assert {path for path, _ in nnx.to_flat_state(grads)} == paths

    def make(rngs):
        base = kind.make_flax(rngs=rngs)
        return kind.convert(base, **({"rngs": rngs} if kind.fast else {}))

    one = nnx.eval_shape(make, nnx.Rngs(0))
    several = nnx.eval_shape(nnx.vmap(make), nnx.Rngs(0).split(4))
    for (path, a), (other, b) in zip(
        *(nnx.to_flat_state(nnx.state(each, (nnx.Param, nnx.BatchStat))) for each in (one, several)), strict=True
    ):
        assert path == other
        assert (4, *a.shape) == b.shape


@pytest.mark.usefixtures("four_devices")
@pytest.mark.parametrize(
    "kind", [k for k in VARIANTS if k in KINDS or k.name.endswith(("-transpose", "-apart"))], ids=str
)
def test_sharding_of_the_base_layer_is_kept_on_four_devices(kind):
    def metadata(layer):
        return {path: v.get_metadata().get("out_sharding") for path, v in nnx.to_flat_state(nnx.state(layer))}

    sharding = {option: {"out_sharding": axes} for option, axes in kind.sharding.items()}
    bases = [kind.make_flax(rngs=nnx.Rngs(0), **options, **kind.initializers) for options in (sharding, {})]
    layer, plain = map(kind.convert, bases)
    parameters = {".".join(path): v for path, v in nnx.to_flat_state(nnx.state(layer, nnx.Param))}
    assert kind.sharded
    for name, expected in kind.sharded.items():
        assert parameters[name].get_metadata("out_sharding") == expected
        assert tuple(parameters[name][...].sharding.spec) == expected
        assert len(parameters[name].sharding.device_set) == 4
    assert metadata(layer.member(1)) == metadata(bases[0])
    x = kind.inputs()
    assert_close(kind.run(layer, x), kind.run(plain, x), "float32")


def test_weights_pass_between_the_frameworks(tmp_path):
    for kind in KINDS:
        ours, theirs = kind.randomized(kind.pair()[0]), kind.pair()[1]
        pt.save_weights(ours, tmp_path / "layer")
        pf.load_weights(theirs, tmp_path / "layer")
        assert_equal_arrays(pf.to_arrays(theirs), pt.to_arrays(ours))
        other = kind.pair()[0]
        pf.save_weights(theirs, tmp_path / "layer")
        pt.load_weights(other, tmp_path / "layer")
        assert_equal_arrays(pt.to_arrays(other), pt.to_arrays(ours))


# Bad input: one sentence in both, which ends with the next step.


def sentences(kind, error, attempts, ends=("",)):
    """Returns what each framework says, in the words of Flax."""
    found = []
    for attempt, end in zip(attempts, (*ends, ends[-1])[:2], strict=True):
        with pytest.raises(error) as raised:
            attempt()
        assert type(raised.value) is error
        text = str(raised.value)
        assert text.startswith(kind.layer_name)
        assert " expects " in text
        assert "got " in text
        assert text.endswith(end), text
        found.append(text.removesuffix(end))
    ours, theirs = found
    for a, b in kind.wording:
        ours = ours.replace(a, b)
    return ours, theirs


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind in KINDS for name in kind.bad_inputs], ids=str)
def test_inputs_of_another_shape_are_refused_with_the_same_sentence(kind, name):
    torch_shape, flax_shape, *ends = kind.bad_inputs[name]
    ours, theirs = kind.pair()
    dtype = "int32" if kind.tokens else "float32"
    a, b = sentences(
        kind,
        ValueError,
        (
            lambda: kind.torch_call(ours, torch.zeros(torch_shape, dtype=getattr(torch, dtype))),
            lambda: kind.flax_call(theirs, jax_of(np.zeros(flax_shape), dtype)),
        ),
        ends,
    )
    assert f"got {torch_shape}" in a
    assert a.replace(str(torch_shape), str(flax_shape)) == b


BAD_ARGUMENTS = [
    ({"num_members": 0}, ValueError, "Pass num_members=4."),
    ({"num_members": 2.5}, TypeError, "Pass num_members=4."),
]
BAD_DRAWS = [
    ({"init": "gaussian"}, ValueError, "Pass init='normal'."),
    ({"r_std": -0.5}, ValueError, "Pass r_std=0.5."),
    ({"rngs": "0"}, TypeError, "rngs=0, or Rngs(0)."),
]


@each_kind
def test_bad_arguments_are_refused_with_the_same_sentence(kind):
    bases = kind.bases()
    for options, error, end in BAD_ARGUMENTS + (BAD_DRAWS if kind.fast else []):
        a, b = sentences(kind, error, [lambda base=base: kind.convert(base, **options) for base in bases], [end])  # noqa: B023
        assert a == b
    if kind.fast:
        layers = [getattr(package, kind.layer_name) for package in (pt, pf)]
        end = f"call {kind.layer_name}(base_layer, rngs=4, num_members=1)."
        a, b = sentences(kind, TypeError, [lambda i=i: layers[i](bases[i], 4) for i in range(2)], [end])
        assert a == b


@each_kind
def test_layers_of_another_kind_are_refused_with_the_same_sentence(kind):
    others = nn.Dropout(0.5), nnx.Dropout(0.5)
    a, b = sentences(kind, TypeError, [lambda base=base: kind.convert(base) for base in others], ["num_members=4)."])
    assert a == b


@each_kind
def test_converted_layers_and_those_of_a_users_own_are_refused(kind):
    for base in kind.bases():
        with pytest.raises(TypeError, match=" expects "):
            kind.convert(kind.convert(base))
    ours, theirs = kind.bases()
    ours.__class__ = type("Own", (type(ours),), {"forward": lambda self, *args: args[0]})
    theirs.__class__ = type("Own", (type(theirs),), {"__call__": lambda self, *args: args[0]})
    a, b = sentences(kind, TypeError, [lambda base=base: kind.convert(base) for base in (ours, theirs)])
    assert a == b.replace("__call__", "forward")
    assert "a forward of its own" in a


@each_kind
def test_members_that_are_not_there_are_refused_with_the_same_sentence(kind):
    layers = kind.pair()
    for method, given, error, end in (
        ("member", MEMBERS, IndexError, "Call model[2]."),
        ("member", 7, IndexError, "Call model[2]."),
        ("keep_members", [], ValueError, "Call model[[0]]."),
    ):
        attempts = [lambda layer=layer: getattr(layer, method)(given) for layer in layers]  # noqa: B023
        a, b = sentences(kind, error, attempts, [end])
        assert a == b
