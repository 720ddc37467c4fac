"""Recurrent layers: both packages against the oracle, each member against an ordinary layer, and every option."""

import copy
import pickle
import re
import warnings
from dataclasses import dataclass

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
from parity_tests.suite.oracle import recurrent as oracle_recurrent
from parity_tests.suite.subjects.recurrent import (
    CELLS,
    KINDS,
    SEEDS,
    Case,
    flax_cell,
    numpys,
    ours,
    run_flax,
    run_torch,
    torch_base,
)
from parity_tests.suite.subjects.subject import without_draws
from probly_flax.layers import recurrent as flax_layers
from probly_torch.layers import recurrent as torch_layers


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


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("is_cell", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_autocast_gives_the_dtypes_of_the_base_layer_for_states(kind, is_cell, dtype):
    case, dtype = Case(kind, is_cell=is_cell), getattr(torch, dtype)
    base = torch_base(case, str(dtype).partition(".")[2])
    layer = ours(torch_layers, case)(base, num_members=3)
    x = torch.ones((6, 5) if is_cell else (6, 4, 5), dtype=dtype)
    hx = torch.zeros((6, 3) if is_cell else (1, 6, 3), dtype=dtype)
    hx = (hx, hx) if kind == "LSTM" else hx
    with torch.autocast("cpu", torch.bfloat16):
        try:
            expected = tensors(base(x, hx))
        except RuntimeError as refused:  # on a CPU without bfloat16
            with pytest.raises(RuntimeError, match=re.escape(str(refused))):
                layer(x, hx)
            return
        results = tensors(layer(x, hx))
    assert [t.dtype for t in results] == [t.dtype for t in expected]
    sum(t.float().sum() for t in results).backward()
    assert {p.grad.dtype for p in layer.parameters()} == {dtype}


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


def test_the_sentence():
    with pytest.raises(ValueError, match="rows") as raised:
        Framework(True).call("LSTM", 30, 6, 5)
    assert str(raised.value) == (
        "BatchEnsembleLSTM expects inputs of shape [num_members*B, T, in_features] with num_members=4, in_features=5; "
        "got (30, 6, 5), whose 30 rows do not divide by 4. To give every member the same batch, call "
        "tile_members(x, 4)."
    )


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


def test_a_cell_with_a_call_of_its_own_is_refused():
    class Own(nnx.GRUCell):
        def __call__(self, carry, inputs):
            return super().__call__(carry, inputs * 2)

    base = nnx.RNN(without_draws(lambda: Own(5, 3, rngs=nnx.Rngs(0))))
    with pytest.raises(TypeError, match="__call__ of its own"):
        flax_layers.BatchEnsembleGRU(base, num_members=4)


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
