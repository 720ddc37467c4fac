"""Recurrent layers: both packages against the oracle, each member against an ordinary layer, and every option."""

import copy
import pickle
import warnings
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

import probly_torch as pt
from parity_tests import standard
from parity_tests.kit.trees import jax_of
from parity_tests.standard import assert_close, assert_holds, error
from parity_tests.suite import oracle_recurrent
from parity_tests.suite.subject import jitted, without_draws
from parity_tests.suite.subjects_recurrent import (
    CASES,
    CELLS,
    KINDS,
    SEEDS,
    Case,
    flax_cell,
    named,
    numpys,
    ours,
    run_flax,
    run_oracle,
    run_torch,
    torch_base,
)
from parity_tests.suite.twins import Twins, assert_same_steps, assert_special_values
from probly_flax.layers import recurrent as flax_layers
from probly_torch.layers import recurrent as torch_layers


def each_case_and_dtypes():
    for case in CASES:
        yield pytest.param(case, ("float32", "float64"), id=f"{case}-float32+float64")
        if case.sizes == Case.sizes and case.is_cell == (case.biases == 2):  # compiling takes seconds
            yield pytest.param(case, ("bfloat16",), id=f"{case}-bfloat16")


@pytest.mark.parametrize(("case", "dtypes"), list(each_case_and_dtypes()))
def test_values_and_gradients_of_both_and_the_oracle(case, dtypes):
    low = dtypes[0]
    arrays = [case.draw(seed, low) for seed in SEEDS]
    assert_holds(
        standard.bounded(
            {dtype: [run_torch(case, a, dtype) for a in arrays] for dtype in dtypes},
            {dtype: [run_flax(case, a, dtype) for a in arrays] for dtype in dtypes},
            [run_oracle(case, a) for a in arrays],
            low,
        )
    )


def twins(case):
    return Twins(str(case), case.draw, *(partial(run, case) for run in (run_torch, run_flax, run_oracle)))


@pytest.mark.parametrize("case", [case for case in CASES if case.biases == 2], ids=str)
def test_special_values(case):
    assert_special_values(twins(case))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_steps_of_training(case):
    assert_same_steps(twins(case))


def random_(layer, seed=0):
    """Gives the layer other values in every parameter."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator) + (name[:2] in ("r_", "s_")))
    return layer


def rows_of(value, i, num_members, axis):
    batch = value.shape[axis] // num_members
    return value[(slice(None),) * axis + (slice(i * batch, (i + 1) * batch),)]


def tensors(results):
    """Lists the tensors of nested tuples."""
    return [results] if isinstance(results, torch.Tensor) else [t for part in results for t in tensors(part)]


TORCH_OPTIONS = [
    {},
    {"bias": False},
    {"num_layers": 3, "bidirectional": True},
    {"num_layers": 2, "dropout": 0.5},
    {"batch_first": False},
    {"batch_first": False, "num_layers": 2, "bidirectional": True, "bias": False},
    {"proj_size": 2},
    {"proj_size": 2, "num_layers": 2, "bidirectional": True, "bias": False},
    {"proj_size": 2, "num_layers": 2, "bidirectional": True, "dropout": 0.3},
]
# torch's GRU has no projection
TORCH_CASES = [(kind, o) for kind in KINDS for o in TORCH_OPTIONS if kind == "LSTM" or "proj_size" not in o]


@pytest.mark.parametrize("states", [False, True], ids=["zeros", "states"])
@pytest.mark.parametrize(("kind", "options"), TORCH_CASES, ids=str)
def test_torch_members_are_ordinary_layers_bit_for_bit(kind, options, states):
    case = Case(kind)
    base = torch_base(case, **options)
    layer = random_(ours(torch_layers, case)(base, num_members=3))
    x = torch.randn((6, 4, 5) if base.batch_first else (4, 6, 5))
    axis = 0 if base.batch_first else 1
    count = base.num_layers * (2 if base.bidirectional else 1)
    hx = None
    if states:
        hx = torch.randn(count, 6, base.proj_size or 3)
        hx = (hx, torch.randn(count, 6, 3)) if kind == "LSTM" else hx
    torch.manual_seed(3)
    output, last = layer(x, hx)
    torch.manual_seed(3)  # each member draws its own masks of dropout, one after the other
    for i in range(3):
        member = layer.member(i)
        assert type(member) is getattr(nn, kind)
        assert {name: getattr(member, name) for name in torch_layers._SEQUENCE_OPTIONS} == {
            name: getattr(base, name) for name in torch_layers._SEQUENCE_OPTIONS
        }
        own = hx if hx is None or kind == "GRU" else tuple(rows_of(state, i, 3, 1) for state in hx)
        own = rows_of(hx, i, 3, 1) if isinstance(hx, torch.Tensor) else own
        own_output, own_last = member(rows_of(x, i, 3, axis), own)
        assert torch.equal(own_output, rows_of(output, i, 3, axis))
        for a, b in zip(tensors(own_last), tensors(last), strict=True):
            assert torch.equal(a, rows_of(b, i, 3, 1))
        for variant in (copy.deepcopy(member.eval()), pickle.loads(pickle.dumps(member))):
            assert torch.equal(variant(x)[0], member(x)[0])


@pytest.mark.parametrize(
    ("kind", "options"),
    [(kind, o) for kind, o in TORCH_CASES if "dropout" not in o and o.get("batch_first", True)],
    ids=str,
)
def test_torch_options_against_the_oracle(kind, options):
    """Projections, which nnx has not, among them: torch's run stands for both."""
    case = Case(kind)
    runs, oracles = {"float32": [], "float64": []}, []
    for seed in SEEDS:
        layer = random_(ours(torch_layers, case)(torch_base(case, **options), num_members=3), seed)
        x = torch.randn(6, 4, 5, generator=torch.Generator().manual_seed(seed))
        weights = {name: p.detach().double().numpy() for name, p in layer.named_parameters()}
        for dtype, results in runs.items():
            own = copy.deepcopy(layer).to(getattr(torch, dtype))
            own_x = x.to(getattr(torch, dtype), copy=True).requires_grad_()
            outputs = own(own_x)
            leaves = {"x": own_x, **dict(own.named_parameters())}
            grads = torch.autograd.grad([t.sum() for t in tensors(outputs)], list(leaves.values()))
            results.append(
                {"output": outputs[0].detach().double().numpy()}
                | {name: g.detach().double().numpy() for name, g in zip(leaves, grads, strict=True)}
            )
        directions, count = (2, 2 * layer.num_layers) if layer.bidirectional else (1, layer.num_layers)
        h_0, c_0 = np.zeros((count, 6, layer.proj_size or 3)), np.zeros((count, 6, 3))
        g = {"output": np.ones((6, 4, directions * h_0.shape[2])), "h_n": np.ones(h_0.shape), "c_n": np.ones(c_0.shape)}
        outputs, grads = oracle_recurrent.recurrent(
            kind, g, x.double().numpy(), weights, 3, layer.num_layers, layer.bidirectional, h_0, c_0
        )
        oracles.append({"output": outputs["output"]} | {name: grads[name] for name in leaves})
    assert_holds(standard.bounded(runs, runs, oracles))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bias", [True, False])
def test_torch_cells_are_ordinary_cells(kind, bias):
    case = Case(kind, is_cell=True)
    layer = random_(ours(torch_layers, case)(torch_base(case, "float64", bias=bias), num_members=3))
    x, h, c = torch.randn(6, 5, dtype=torch.float64), *torch.randn(2, 6, 3, dtype=torch.float64)
    for hx in (None, (h, c) if kind == "LSTM" else h):
        results = tensors(layer(x, hx))
        for i in range(3):
            member = layer.member(i)
            assert type(member) is getattr(nn, kind + "Cell")
            assert (member.bias_ih is None) == (not bias)
            own = hx if not isinstance(hx, torch.Tensor) else rows_of(hx, i, 3, 0)
            own = tuple(rows_of(state, i, 3, 0) for state in hx) if isinstance(hx, tuple) else own
            for a, b in zip(tensors(member(rows_of(x, i, 3, 0), own)), results, strict=True):
                assert_close(a.detach().numpy(), rows_of(b, i, 3, 0).detach().numpy(), "float64")


def flax_base(case, dtype="float32", rnn=None, **options):
    cell = flax_cell(case, case.sizes[3], dtype, **options)
    return cell if case.is_cell else nnx.RNN(cell, **(rnn or {}))


@pytest.mark.parametrize("options", [{}, {"init": "random_sign"}, {"use_base_weights": True, "s_std": 2.0, "rngs": 7}])
@pytest.mark.parametrize(("kind", "apart"), [("LSTM", False), ("LSTM", True), ("GRU", False)])
@pytest.mark.parametrize("is_cell", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_one_seed_gives_one_layer_bit_for_bit(kind, dtype, is_cell, apart, options):
    case = Case(kind, is_cell=is_cell, biases=1, apart=apart)
    base, theirs = torch_base(case, dtype), flax_base(case, dtype)
    with torch.no_grad():
        plain = ours(flax_layers, case)(theirs, num_members=3, use_base_weights=True)
        for name, variable, transposed in named(case, Holder(plain)):
            if name[:2] == "we":
                value = torch.tensor(np.asarray(variable[...], np.float32))
                getattr(base, name).copy_(value.T if transposed else value)
    a = ours(torch_layers, case)(base, **({"num_members": 3} | options))
    b = ours(flax_layers, case)(theirs, **({"num_members": 3} | options))
    checked = set()
    for name, variable, transposed in named(case, Holder(b)):
        if name.startswith("bias"):
            continue
        value = np.asarray(variable[...])
        assert value.dtype.name == dtype
        value = (value.T if transposed else value).astype(np.float32)
        np.testing.assert_array_equal(value, getattr(a, name).detach().float().numpy())
        checked.add(name)
    assert checked == {name for name, _ in a.named_parameters() if not name.startswith("bias")}


class Holder:
    """One layer, where `named` expects a stack."""

    def __init__(self, layer):
        self.layers = [layer]


@pytest.mark.parametrize("kind", KINDS)
def test_the_draws_follow_the_documented_order(kind):
    case = Case(kind, num_layers=2, bidirectional=True)
    rngs = pt.Rngs(3)
    layer = ours(torch_layers, case)(torch_base(case), rngs=rngs, num_members=2)
    keys = iter(pt.random.fold_in(pt.random.key(3), i) for i in range(24))
    for place in case.places:
        for name in ("ih", "hh"):
            weight, r, s = (getattr(layer, f"{part}_{name}{place}") for part in ("weight", "r", "s"))
            assert torch.equal(weight, pt.random.lecun_normal(next(keys), weight.T.shape, torch.float32).T)
            assert torch.equal(r, 1 + 0.5 * pt.random.normal(next(keys), r.shape))
            assert torch.equal(s, 1 + 0.5 * pt.random.normal(next(keys), s.shape))
    assert int(rngs.default.count) == 24
    assert next(keys, None) is None


@pytest.mark.parametrize("is_cell", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_the_base_layer_is_copied_and_left_alone(kind, is_cell):
    case = Case(kind, is_cell=is_cell)
    base = torch_base(case)
    base.eval()
    frozen = next(iter(dict(base.named_parameters())))
    getattr(base, frozen).requires_grad_(False)
    before, state = copy.deepcopy(base.state_dict()), torch.get_rng_state()
    layer = ours(torch_layers, case)(base, num_members=3, use_base_weights=True)
    assert torch.equal(state, torch.get_rng_state())
    for name, value in before.items():
        own = getattr(layer, name)
        assert torch.equal(own if name.startswith("weight") else own[2], value)
        assert own.requires_grad == (name != frozen)
        assert getattr(layer.member(1), name).requires_grad == (name != frozen)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.zero_()
    assert all(torch.equal(before[name], value) for name, value in base.state_dict().items())

    theirs = flax_base(case)
    params = nnx.state(theirs, nnx.Param)
    before = jax.tree.map(np.array, params)
    layer = ours(flax_layers, case)(theirs, num_members=3, use_base_weights=True)
    for _, variable, _ in named(case, Holder(layer)):
        variable.set_value(on_device(np.zeros(variable.shape), variable.dtype))
    jax.tree.map(np.testing.assert_array_equal, before, jax.tree.map(np.array, nnx.state(theirs, nnx.Param)))
    assert not is_cell or not {id(v) for v in jax.tree.leaves(theirs)} & {id(v) for v in jax.tree.leaves(layer)}


def on_device(values, dtype="float32"):
    return jax_of(values, dtype)


def carry_of(kind, shape, dtype="float32", seed=0):
    rng = np.random.default_rng(seed)
    states = [on_device(rng.standard_normal(shape), dtype) for _ in range(2)]
    return tuple(states) if kind == "LSTM" else states[0]


FLAX_CELL_OPTIONS = [
    {"gate_fn": jnp.tanh, "activation_fn": nnx.relu},
    {"dtype": jnp.dtype("float64")},
    {"param_dtype": jnp.dtype("float64"), "dtype": jnp.dtype("float64")},
]
FLAX_RNN_OPTIONS = [
    ({}, {}),
    ({"time_major": True, "return_carry": True}, {}),
    ({"reverse": True}, {"keep_order": True}),
    ({"reverse": True, "keep_order": True, "unroll": 2}, {"return_carry": True, "lengths": True}),
    ({"rngs": False}, {"initial_carry": True, "return_carry": True, "lengths": True}),
    ({"rngs": nnx.Rngs(3)}, {"time_major": True, "reverse": True}),
]


@pytest.mark.parametrize(
    ("options", "middle"),
    [({}, (2,)), *((options, ()) for options in FLAX_CELL_OPTIONS)],
    ids=lambda value: ",".join(map(str, value)),
)
@pytest.mark.parametrize(
    "case",
    [
        Case("LSTM", True, biases=1),
        Case("LSTM", True, biases=1, apart=True),
        Case("GRU", True, biases=1),
        Case("GRU", True),
    ],
    ids=str,
)
def test_flax_cells_are_ordinary_cells(case, options, middle):
    base = flax_base(case, **options)
    layer = ours(flax_layers, case)(base, num_members=3, use_base_weights=True)
    assert isinstance(layer, CELLS[case.kind])
    rng = np.random.default_rng(0)
    for dense in (layer.dense_i, layer.dense_h):
        if dense.bias is not None:
            dense.bias.set_value(on_device(rng.standard_normal(dense.bias.shape), dense.bias.dtype))
    members = [layer.member(i) for i in range(3)]
    for member in members:
        assert type(member) is type(base)
        assert vars(member).keys() == vars(base).keys()
        for name in flax_layers._CELL_OPTIONS:
            assert getattr(member, name) == getattr(base, name)

    @nnx.jit  # compiled at once, the layer and its members
    def run(layer, members, carry, x):
        own = [jax.tree.map(lambda v, i=i: rows_of(v, i, 3, 0), (carry, x)) for i in range(3)]
        return layer(carry, x), [member(*each) for member, each in zip(members, own, strict=True)]

    x, carry = on_device(np.ones((6, *middle, 5))), carry_of(case.kind, (6, *middle, 3))
    with jax.numpy_dtype_promotion("standard"):
        together, alone = run(layer, nnx.List(members), carry, x)
        expected = jax.eval_shape(lambda carry, x: base(carry, x)[1], carry, x)
    together, alone = jax.tree.map(np.asarray, (together, alone))
    assert together[1].dtype == expected.dtype
    low = "float64" if expected.dtype == "float64" else "float32"
    for i in range(3):
        jax.tree.map(lambda a, b, i=i: assert_close(a, rows_of(b, i, 3, 0), low), alone[i], together)


@pytest.mark.parametrize(("options", "call"), FLAX_RNN_OPTIONS, ids=[str(n) for n in range(len(FLAX_RNN_OPTIONS))])
@pytest.mark.parametrize("kind", KINDS)
def test_flax_members_are_ordinary_rnns(kind, options, call):
    case, call = Case(kind, biases=1, sizes=(3, 2, 4, 5, 3)), dict(call)
    base = flax_base(case, "float64", rnn=options)
    layer = ours(flax_layers, case)(base, num_members=3, use_base_weights=True)
    assert isinstance(layer, nnx.RNN)
    time_major = call.get("time_major", options.get("time_major", False))
    axis = 1 if time_major else 0
    x = np.random.default_rng(0).standard_normal((4, 6, 5) if time_major else (6, 4, 5))
    rows = {}
    if call.pop("lengths", False):
        rows["seq_lengths"] = np.array([4, 1, 2, 3, 4, 2])
    if call.pop("initial_carry", False):
        rows["initial_carry"] = jax.tree.map(np.asarray, carry_of(kind, (6, 3), "float64"))

    @nnx.jit
    def run(rnn, x, rows):
        return rnn(x, **rows, **call)

    results = jax.tree.map(np.asarray, run(layer, x, rows))
    for i in range(3):
        member = layer.member(i)
        assert type(member) is nnx.RNN
        assert type(member.cell) is CELLS[kind]
        assert vars(member).keys() == vars(base).keys()
        for name in flax_layers._RNN_OPTIONS:
            assert getattr(member, name) == getattr(base, name)
        own = jax.tree.map(lambda v, i=i: rows_of(v, i, 3, 0), rows)
        own_results = run(member, rows_of(x, i, 3, axis), own)
        if isinstance(results, tuple):
            jax.tree.map(lambda a, b, i=i: assert_close(a, rows_of(b, i, 3, 0), "float64"), own_results[0], results[0])
            assert_close(own_results[1], rows_of(results[1], i, 3, axis), "float64")
        else:
            assert_close(own_results, rows_of(results, i, 3, axis), "float64")


def test_flax_takes_batches_of_several_axes_as_nnx_does():
    layer = flax_layers.BatchEnsembleGRU(flax_base(Case("GRU", biases=1)), num_members=3)
    x = np.random.default_rng(0).standard_normal((6, 2, 4, 5)).astype(np.float32)
    y, expected = nnx.jit(lambda layer, x: (layer(x), layer(x[:, 1])))(layer, x)
    assert y.shape == (6, 2, 4, 3)
    assert_close(np.asarray(y)[:, 1], expected, "float32")


def test_flax_rngs_and_carry_init_are_copied():
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        options = {"kernel_init": numpys(), "carry_init": nnx.initializers.normal()}
        cell = flax_cell(Case("GRU", biases=1), 5, keep_rngs=True, **options)
    assert len(warned) == 2  # nnx deprecates both
    base = nnx.RNN(cell, rngs=nnx.Rngs(4))
    layer = flax_layers.BatchEnsembleGRU(base, num_members=3, use_base_weights=True)
    copies = [layer, layer.member(0)]
    for copied in copies:
        assert copied.cell.carry_init is cell.carry_init
        assert copied.cell.rngs is not cell.rngs
        assert copied.rngs is not base.rngs
    np.testing.assert_array_equal(layer.cell.initialize_carry((6, 5)), cell.initialize_carry((6, 5)))
    x = jnp.ones((6, 4, 5), "float32")
    layer(x)
    assert int(layer.rngs.count[...]) == 1
    assert int(base.rngs.count[...]) == int(copies[1].rngs.count[...]) == 0


@pytest.mark.parametrize("biases", [1, 2])
def test_a_gru_of_one_bias_is_torchs_gru_exactly_where_its_hidden_bias_of_n_is_zero(biases):
    """nnx.GRUCell adds its one bias outside the reset gate: torch's b_ih + b_hh for r and z, and b_ih for n."""
    case, two = Case("GRU", biases=biases), Case("GRU")
    arrays = two.draw(0, "float64")
    ones = dict(arrays)
    for_n = np.arange(9) >= 6
    if biases == 1:
        ones["bias_ih_l0"] = arrays["bias_ih_l0"] + np.where(for_n, 0, arrays["bias_hh_l0"])
        ones["bias_hh_l0"] = np.zeros((3, 9))
    flax = run_flax(case, ones, "float64")["output"]
    zero_for_n = arrays | {"bias_hh_l0": np.where(for_n, 0, arrays["bias_hh_l0"])}
    with_n, without_n = (run_torch(two, a, "float64")["output"] for a in (arrays, zero_for_n))
    assert_close(flax, without_n if biases == 1 else with_n, "float64")
    other = with_n if biases == 1 else without_n
    assert error(flax, other, other, "float64") > 2.0**40  # no folding of biases stands for b_hn


def test_an_lstm_of_one_bias_takes_the_sum_of_torchs_two():
    case, arrays = Case("LSTM", biases=1), Case("LSTM").draw(0, "float64")
    summed = arrays | {"bias_ih_l0": arrays["bias_ih_l0"] + arrays["bias_hh_l0"], "bias_hh_l0": np.zeros((3, 12))}
    ours_, theirs = run_torch(Case("LSTM"), arrays, "float64"), run_flax(case, summed, "float64")
    for name in ("output", "h_n", "c_n", "gradient by bias_ih_l0"):
        assert_close(theirs[name], ours_[name], "float64")
    assert_close(ours_["gradient by bias_hh_l0"], ours_["gradient by bias_ih_l0"], "float64")


@pytest.mark.parametrize("is_cell", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_keep_members_prunes_in_place(kind, is_cell):
    case = Case(kind, is_cell=is_cell, biases=1)
    x = np.random.default_rng(0).standard_normal((2, 5) if is_cell else (2, 4, 5))
    layer = random_(ours(torch_layers, case)(torch_base(case, "float64"), num_members=3))
    full = tensors(layer(torch.tensor(np.tile(x, (3, *[1] * (x.ndim - 1))))))[0]
    layer.keep_members([2, 0])
    assert layer.num_members == 2
    kept = tensors(layer(torch.tensor(np.tile(x, (2, *[1] * (x.ndim - 1))))))[0]
    assert_close(kept.detach().numpy(), torch.cat([full[4:], full[:2]]).detach().numpy(), "float64")
    with pytest.raises(IndexError, match="from -2 to 1"):
        layer.keep_members([2])
    with pytest.raises(IndexError, match="from -2 to 1"):
        layer.member(2)

    layer = ours(flax_layers, case)(flax_base(case, "float64"), num_members=3, use_base_weights=True)

    @nnx.jit
    def run(layer):
        inputs = np.tile(x, (layer.num_members, *[1] * (x.ndim - 1)))
        if not is_cell:
            return layer(inputs)
        return layer(layer.initialize_carry(inputs.shape, nnx.Rngs(0)), inputs)[1]

    full = np.asarray(run(layer))
    layer.keep_members([2, 0])
    assert layer.num_members == 2
    assert_close(run(layer), np.concatenate([full[4:], full[:2]]), "float64")
    with pytest.raises(IndexError, match="from -2 to 1"):
        layer.keep_members([2])
    with pytest.raises(IndexError, match="from -2 to 1"):
        layer.member(2)


@pytest.mark.parametrize("given", [False, True], ids=["zeros", "states"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("is_cell", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_autocast_gives_the_dtypes_of_the_base_layer(kind, is_cell, dtype, given):
    case, dtype = Case(kind, is_cell=is_cell), getattr(torch, dtype)
    base = torch_base(case, str(dtype).partition(".")[2])
    layer = ours(torch_layers, case)(base, num_members=3)
    x = torch.ones((6, 5) if is_cell else (6, 4, 5), dtype=dtype)
    hx = torch.zeros((6, 3) if is_cell else (1, 6, 3), dtype=dtype) if given else None
    hx = (hx, hx) if given and kind == "LSTM" else hx
    with torch.autocast("cpu", torch.bfloat16):
        results, expected = tensors(layer(x, hx)), tensors(base(x, hx))
    assert [t.dtype for t in results] == [t.dtype for t in expected]
    sum(t.float().sum() for t in results).backward()
    assert {p.grad.dtype for p in layer.parameters()} == {dtype}


@pytest.mark.parametrize("is_cell", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_torch_layers_are_torch_citizens(kind, is_cell, tmp_path):
    case = Case(kind, is_cell=is_cell)
    layer = ours(torch_layers, case)(torch_base(case), num_members=3)
    x = torch.randn((6, 5) if is_cell else (6, 4, 5))
    before = copy.deepcopy(layer.state_dict())
    y = tensors(layer(x))[0]
    assert all(torch.equal(before[name], value) for name, value in layer.state_dict().items())
    for variant in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(tensors(variant(x))[0], y)
    torch.save(layer.state_dict(), tmp_path / "layer.pt")
    other = ours(torch_layers, case)(torch_base(case), num_members=3, rngs=9)
    other.load_state_dict(torch.load(tmp_path / "layer.pt"))
    assert torch.equal(tensors(other(x))[0], y)
    exported = torch.export.export(layer, (x,))
    assert_close(tensors(exported.module()(x))[0].detach().numpy(), y.detach().numpy(), "float32")
    layer.double()
    assert torch.autograd.gradcheck(lambda x: tensors(layer(x))[0], x.double().requires_grad_())
    assert "num_members=3" in repr(layer)
    assert tensors(layer(x[:0].double()))[0].shape[0] == 0
    assert layer.eval().member(0).training is False
    meta = ours(torch_layers, case)(torch_base(case, device="meta"), num_members=3)
    assert {p.device.type for p in meta.parameters()} == {"meta"}


@pytest.mark.parametrize("is_cell", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_flax_layers_are_nnx_citizens(kind, is_cell):
    case = Case(kind, is_cell=is_cell, biases=1)
    layer = ours(flax_layers, case)(flax_base(case), num_members=3)
    x = on_device(np.random.default_rng(0).standard_normal((6, 5) if is_cell else (6, 4, 5)))
    carry = carry_of(kind, (6, 3))

    def run(layer, x):
        return layer(carry, x)[1] if is_cell else layer(x, initial_carry=carry)

    y = run(layer, x)
    graph, state = nnx.split(layer)
    # no pickle: nnx's own cells hold jax.numpy.tanh, which cannot be pickled
    for variant in (nnx.merge(graph, state), nnx.clone(layer), copy.deepcopy(layer)):
        np.testing.assert_array_equal(run(variant, x), y)
    assert_close(nnx.jit(run)(layer, x), y, "float32")
    grads = nnx.eval_shape(nnx.grad(lambda layer: run(layer, x).sum()), layer)
    found = [path[-2:] for path, _ in nnx.to_flat_state(grads)]
    biased = "dense_h" if kind == "LSTM" else "dense_i"
    assert set(found) == {("dense_i", n) for n in ("kernel", "r", "s")} | {
        ("dense_h", n) for n in ("kernel", "r", "s")
    } | {(biased, "bias")}
    layer.train()
    layer.eval()
    abstract = nnx.eval_shape(lambda: ours(flax_layers, case)(flax_base(case), num_members=3))
    assert (abstract if is_cell else abstract.cell).dense_h.r.shape == (3, 3)

    def build(rngs):
        cell = CELLS[kind](5, 3, rngs=rngs)
        return ours(flax_layers, case)(cell if is_cell else nnx.RNN(cell, rngs=False), rngs=rngs, num_members=3)

    stacked = nnx.eval_shape(nnx.vmap(build), nnx.Rngs(0).split(4))
    assert (stacked if is_cell else stacked.cell).dense_h.r.shape == (4, 3, 3)


@pytest.mark.usefixtures("four_devices")
@pytest.mark.parametrize("apart", [False, True])
def test_sharding_of_the_base_layer_is_kept_on_four_devices(apart):
    case = Case("LSTM", biases=1, apart=apart, sizes=(2, 3, 3, 4, 6))
    metadata = {"kernel_metadata": {"out_sharding": ("data", "model")}, "bias_metadata": {"out_sharding": ("model",)}}
    base = flax_base(case, kernel_init=nnx.initializers.zeros, **metadata)
    layer = flax_layers.BatchEnsembleLSTM(base, num_members=2, use_base_weights=True)
    i, h = layer.cell.dense_i, layer.cell.dense_h
    expected = [("data", "model"), (None, "data"), (None, "model"), (None, "model")]
    assert [v.get_metadata("out_sharding") for v in (i.kernel, i.r, i.s, h.bias)] == expected
    assert len(i.kernel.sharding.device_set) == 4
    member = layer.member(1).cell
    assert (member.if_ if apart else member.dense_i).kernel.get_metadata("out_sharding") == ("data", "model")
    assert jitted(layer, on_device(np.ones((6, 3, 4)))).shape == (6, 3, 6)


@dataclass(frozen=True)
class Framework:
    """A layer of 4 members, 5 inputs and 3 hidden features, and its inputs."""

    is_torch: bool

    def layer(self, kind, is_cell=False, **options):
        case = Case(kind, is_cell=is_cell, biases=1)
        options = {"num_members": 4} | options
        if self.is_torch:
            return ours(torch_layers, case)(torch_base(case), **options)
        return without_draws(lambda: ours(flax_layers, case)(flax_base(case), **options))

    def zeros(self, *shape):
        return torch.zeros(shape) if self.is_torch else on_device(np.zeros(shape))

    def call(self, kind, *shape, is_cell=False):
        layer, x = self.layer(kind, is_cell), self.zeros(*shape)
        if self.is_torch or not is_cell:
            return layer(x)
        carry = self.zeros(*shape[:-1], 3)
        return layer((carry, carry) if kind == "LSTM" else carry, x)


BAD_INPUT = {
    "rows that do not divide": ((30, 6, 5), (30, 5), "call tile_members(x, 4)."),
    "wrong last axis": ((8, 6, 4), (8, 4), "in_features=4."),
    "one axis too few": ((6, 5), (5,), "call tile_members(x[None], 4)."),
    "no axis": ((), (), "None], 4)."),
}


@pytest.mark.parametrize("is_cell", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input_is_refused_with_the_same_sentence(name, kind, is_cell):
    sequences, steps, next_step = BAD_INPUT[name]
    sentences = []
    for f in (Framework(True), Framework(False)):
        with pytest.raises(ValueError, match="expects inputs of shape") as raised:
            f.call(kind, *(steps if is_cell else sequences), is_cell=is_cell)
        assert type(raised.value) is ValueError
        sentences.append(str(raised.value))
    assert sentences[0] == sentences[1]
    assert sentences[0].startswith(f"BatchEnsemble{kind}{'Cell' * is_cell} expects")
    assert sentences[0].endswith(next_step)


def test_the_sentence():
    with pytest.raises(ValueError, match="rows") as raised:
        Framework(True).call("LSTM", 30, 6, 5)
    assert str(raised.value) == (
        "BatchEnsembleLSTM expects inputs of shape [num_members*B, T, in_features] with num_members=4, in_features=5; "
        "got (30, 6, 5), whose 30 rows do not divide by 4. To give every member the same batch, call "
        "tile_members(x, 4)."
    )


@pytest.mark.parametrize("is_cell", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_bad_arguments_are_refused_with_the_same_sentence(kind, is_cell):
    for options, kind_of_error in (
        ({"num_members": 0}, ValueError),
        ({"num_members": 2.5}, TypeError),
        ({"init": "gaussian"}, ValueError),
        ({"r_std": -0.5}, ValueError),
        ({"rngs": "0"}, TypeError),
    ):
        sentences = []
        for f in (Framework(True), Framework(False)):
            with pytest.raises(kind_of_error) as raised:
                f.layer(kind, is_cell, **options)
            sentences.append(str(raised.value))
        assert sentences[0] == sentences[1]
        assert sentences[0].startswith(f"BatchEnsemble{kind}{'Cell' * is_cell} expects")
    case, sentences = Case(kind, is_cell=is_cell, biases=1), []
    for layers, base in ((torch_layers, torch_base(case)), (flax_layers, flax_base(case))):
        with pytest.raises(TypeError, match="4 members") as raised:
            ours(layers, case)(base, 4)
        sentences.append(str(raised.value))
    assert sentences[0].endswith(f"BatchEnsemble{kind}{'Cell' * is_cell}(base_layer, rngs=4, num_members=1).")
    assert sentences[0] == sentences[1]


def test_layers_of_another_kind_are_refused():
    for layers, lstm, gru, linear in (
        (torch_layers, nn.LSTM(5, 3), nn.GRU(5, 3), nn.Linear(5, 3)),
        (
            flax_layers,
            without_draws(lambda: nnx.RNN(nnx.LSTMCell(5, 3, rngs=nnx.Rngs(0)))),
            without_draws(lambda: nnx.RNN(nnx.GRUCell(5, 3, rngs=nnx.Rngs(0)))),
            without_draws(lambda: nnx.Linear(5, 3, rngs=nnx.Rngs(0))),
        ),
    ):
        for layer, bases in (
            (layers.BatchEnsembleLSTM, (gru, linear)),
            (layers.BatchEnsembleGRU, (lstm, linear)),
            (layers.BatchEnsembleLSTMCell, (gru, linear)),
            (layers.BatchEnsembleGRUCell, (lstm, linear)),
        ):
            for base in bases:
                with pytest.raises(TypeError, match=f"{layer.__name__} expects base_layer to .*batchensemble"):
                    layer(base, num_members=4)


def test_layers_with_a_forward_of_their_own_are_refused():
    class TorchOwn(nn.LSTM):
        def forward(self, x, hx=None):
            return super().forward(x * 2, hx)

    class FlaxOwn(nnx.GRUCell):
        def __call__(self, carry, inputs):
            return super().__call__(carry, inputs * 2)

    with pytest.raises(TypeError, match="forward of its own"):
        torch_layers.BatchEnsembleLSTM(TorchOwn(5, 3), num_members=4)
    own = without_draws(lambda: FlaxOwn(5, 3, rngs=nnx.Rngs(0)))
    for layer, base in (
        (flax_layers.BatchEnsembleGRUCell, own),
        (flax_layers.BatchEnsembleGRU, nnx.RNN(own)),
    ):
        with pytest.raises(TypeError, match="__call__ of its own"):
            layer(base, num_members=4)


def test_states_are_not_broadcast():
    f, x = Framework(True), torch.zeros(8, 6, 5)
    for shape in ((1, 1, 3), (1, 2, 3), (2, 8, 3), (8, 3)):
        with pytest.raises(ValueError, match=r"h_0 of shape \(1, 8, 3\).*layer\(x\)"):
            f.layer("GRU")(x, torch.zeros(shape))
        with pytest.raises(ValueError, match=r"c_0 of shape \(1, 8, 3\)"):
            f.layer("LSTM")(x, (torch.zeros(1, 8, 3), torch.zeros(shape)))
    with pytest.raises(TypeError, match=r"hx to be the pair \(h_0, c_0\); got Tensor"):
        f.layer("LSTM")(x, torch.zeros(1, 8, 3))
    with pytest.raises(ValueError, match=r"c of shape \(8, 3\)"):
        f.layer("LSTM", True)(x[:, 0], (torch.zeros(8, 3), torch.zeros(1, 3)))
    with pytest.raises(ValueError, match=r"hx of shape \(8, 3\)"):
        f.layer("GRU", True)(x[:, 0], torch.zeros(2, 3))
    f = Framework(False)
    x, step = f.zeros(8, 6, 5), f.zeros(8, 5)
    for shape in ((1, 3), (2, 3), (1, 8, 3)):
        state = f.zeros(*shape)
        with pytest.raises(ValueError, match=r"initial_carry of shape \(8, 3\)"):
            f.layer("GRU")(x, initial_carry=state)
        with pytest.raises(ValueError, match=r"c of initial_carry of shape \(8, 3\)"):
            f.layer("LSTM")(x, initial_carry=(state, f.zeros(8, 3)))
        with pytest.raises(ValueError, match=r"carry of shape \(8, 3\).*initialize_carry\(x.shape, rngs\)"):
            f.layer("GRU", True)(state, step)
        with pytest.raises(ValueError, match=r"h of carry of shape \(8, 3\)"):
            f.layer("LSTM", True)((f.zeros(8, 3), state), step)
    with pytest.raises(TypeError, match=r"carry to be the pair \(c, h\)"):
        f.layer("LSTM", True)(f.zeros(8, 3), step)
    for lengths in ((1,), (2,), (8, 1)):
        with pytest.raises(ValueError, match=r"seq_lengths of shape \(8,\).*tile_members\(seq_lengths, 4\)"):
            f.layer("GRU")(x, seq_lengths=on_device(np.ones(lengths), "int32"))


def test_what_torch_refuses():
    lstm, cell = Framework(True).layer("LSTM"), Framework(True).layer("LSTM", True)
    x = torch.zeros(8, 6, 5)
    with pytest.raises(TypeError, match=r"padded batch.*pad_packed_sequence"):
        lstm(pack_padded_sequence(x, torch.full((8,), 6), batch_first=True))
    with pytest.raises(TypeError, match=r"x of the weights' dtype, torch.float32; got torch.float64"):
        lstm(x.double())
    with pytest.raises(TypeError, match=r"c_0 of the weights' dtype"):
        lstm(x, (torch.zeros(1, 8, 3), torch.zeros(1, 8, 3, dtype=torch.float64)))
    with pytest.raises(TypeError, match=r"x of the weights' dtype, torch.float32; got torch.float64"):
        cell(x[:, 0].double())
    with pytest.raises(TypeError, match=r"c of the weights' dtype"):
        cell(x[:, 0], (torch.zeros(8, 3), torch.zeros(8, 3, dtype=torch.float64)))
    with pytest.raises(ValueError, match=r"4 axes instead of 3. Join the axes of time, x.flatten\(1, -2\)."):
        lstm(x[:, None])
    with pytest.raises(ValueError, match=r"3 axes instead of 2. Pass one step of them, x\[:, 0\]."):
        cell(x)


def test_time_major_rows_are_those_of_the_second_axis():
    sentences = []
    case = Case("GRU", biases=1)
    for layer, x in (
        (torch_layers.BatchEnsembleGRU(torch_base(case, batch_first=False), num_members=4), torch.zeros(8, 6, 5)),
        (
            without_draws(
                lambda: flax_layers.BatchEnsembleGRU(flax_base(case, rnn={"time_major": True}), num_members=4)
            ),
            on_device(np.zeros((8, 6, 5))),
        ),
    ):
        with pytest.raises(ValueError, match="6 rows do not divide by 4") as raised:
            layer(x)
        sentences.append(str(raised.value))
    assert sentences[0] == sentences[1]
    assert "[T, num_members*B, in_features]" in sentences[0]
    assert sentences[0].endswith("call tile_members(x.swapaxes(0, 1), 4).swapaxes(0, 1).")
