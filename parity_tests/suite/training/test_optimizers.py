"""Training goes on in the other framework: the optimizer's state moves bit for bit, and the next steps agree."""

import inspect
import re
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import safetensors.numpy
import torch
from flax import nnx
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import nn

import probly_flax as pf
import probly_torch as pt
from parity_tests.standard import assert_same_trajectory
from parity_tests.suite.sentences.harness import sentence_of
from parity_tests.suite.subjects.subject import without_draws
from probly_flax import optimizers as flax_optimizers
from probly_torch import optimizers as torch_optimizers

BATCH, HEIGHT, WIDTH, CHANNELS = 5, 4, 3, 6


@pytest.fixture(autouse=True)
def _promotion():
    """Allows promotion. optax.adam and nnx.BatchNorm ask for it."""
    with jax.numpy_dtype_promotion("standard"):
        yield


class TorchNet(nn.Module):
    """Convolution, batch normalisation, attention, and a weight that two layers share."""

    def __init__(self, dtype=torch.float64):
        super().__init__()
        self.conv = nn.Conv2d(2, CHANNELS, 3, padding=1, bias=False, dtype=dtype)  # batch normalisation has one
        self.norm = nn.BatchNorm2d(CHANNELS, dtype=dtype)
        self.attention = nn.MultiheadAttention(CHANNELS, 2, batch_first=True, dtype=dtype)
        self.layers = nn.ModuleList(nn.Linear(CHANNELS, CHANNELS, dtype=dtype) for _ in range(2))
        self.layers[1].weight = self.layers[0].weight
        self.head = nn.Linear(CHANNELS, 3, dtype=dtype)
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(0.4 * torch.randn(p.shape))

    def forward(self, x):
        x = torch.tanh(self.norm(self.conv(x))).flatten(2).mT
        x = x + self.attention(x, x, x)[0]
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return self.head(x.mean(1))


class FlaxNet(nnx.Module):
    """The twin."""

    def __init__(self, dtype=jnp.float64):
        options = {"param_dtype": dtype, "rngs": nnx.Rngs(0)}
        self.conv = nnx.Conv(2, CHANNELS, (3, 3), padding=1, use_bias=False, **options)
        self.norm = nnx.BatchNorm(CHANNELS, momentum=0.9, epsilon=1e-5, use_fast_variance=False, **options)
        for statistic in (self.norm.mean, self.norm.var):  # float32, whatever param_dtype is
            statistic.set_value(statistic[...].astype(dtype))
        # with a rate for dropout, nnx takes the softmax in float64
        self.attention = nnx.MultiHeadAttention(
            2, CHANNELS, decode=False, dropout_rate=0.5, deterministic=True, **options
        )
        self.layers = nnx.List([nnx.Linear(CHANNELS, CHANNELS, **options) for _ in range(2)])
        self.layers[1].kernel = self.layers[0].kernel
        self.head = nnx.Linear(CHANNELS, 3, **options)

    def __call__(self, x):
        x = jnp.tanh(self.norm(self.conv(x))).reshape(len(x), -1, CHANNELS)
        x = x + self.attention(x)
        for layer in self.layers:
            x = jnp.tanh(layer(x))
        return self.head(x.mean(1))


def batches(first, count):
    for i in range(first, first + count):
        rng = np.random.default_rng(i)
        yield rng.normal(size=(BATCH, 2, HEIGHT, WIDTH)), rng.normal(size=(BATCH, 3))


def train_torch(model, optimizer, first, count):
    for x, y in batches(first, count):
        optimizer.zero_grad()
        (model(torch.from_numpy(x)) - torch.from_numpy(y)).square().mean().backward()
        optimizer.step()


@cache
def drawn_linear(*sizes):
    return nnx.Linear(*sizes, rngs=nnx.Rngs(0))


def flax_linear(*sizes):
    """Makes a layer of its own, with the draws of all, which JAX takes long to compile for each shape."""
    return nnx.clone(drawn_linear(*sizes))


@nnx.jit
def flax_grads(model, x, y):
    return nnx.grad(lambda model: jnp.square(model(x) - y).mean())(model)


@nnx.jit
def flax_update(model, optimizer, grads):
    optimizer.update(model, grads)


def train_flax(model, optimizer, first, count):
    for x, y in batches(first, count):
        flax_update(model, optimizer, flax_grads(model, x.transpose(0, 2, 3, 1), y))


# The twins of the table in the docstrings. Adam's epsilon is far above rounding, which it would otherwise scale up to
# whole steps for attention's bias of keys, whose gradient is zero.
SGD, ADAM = torch.optim.SGD, torch.optim.Adam
BETAS = {"betas": (0.8, 0.95), "eps": 1e-3}
adam = partial(optax.adam, b1=0.8, b2=0.95, eps=1e-3)
OPTIMIZERS = {
    "SGD": (partial(SGD, lr=0.1), optax.sgd(0.1)),
    "momentum": (partial(SGD, lr=0.1, momentum=0.8), optax.sgd(0.1, momentum=0.8)),
    "Nesterov": (
        partial(SGD, lr=0.1, momentum=0.8, nesterov=True, weight_decay=0.05),
        optax.chain(optax.add_decayed_weights(0.05), optax.sgd(0.1, momentum=0.8, nesterov=True)),
    ),
    "Adam": (partial(ADAM, lr=0.02, **BETAS), adam(0.02)),
    "Adam with decay": (
        partial(ADAM, lr=0.02, weight_decay=0.05, **BETAS),
        optax.chain(optax.add_decayed_weights(0.05), adam(0.02)),
    ),
    "AdamW": (
        partial(torch.optim.AdamW, lr=0.02, weight_decay=0.05, **BETAS),
        optax.adamw(0.02, 0.8, 0.95, 1e-3, weight_decay=0.05),
    ),
}


def in_torch(make, dtype=torch.float64):
    model = TorchNet(dtype)
    return model, make(model.parameters())


def in_flax(tx, dtype=jnp.float64):
    model = without_draws(lambda: FlaxNet(dtype))
    return model, nnx.Optimizer(model, tx, wrt=nnx.Param)


def parameters(arrays):
    return {name: array for name, array in arrays.items() if not name.startswith("norm.running")}


def assert_same(model, other):
    ours, theirs = (parameters(arrays) for arrays in (pt.to_arrays(model), pf.to_arrays(other)))
    for name in ours.keys() - {"norm.num_batches_tracked"}:
        assert_same_trajectory(theirs[name], ours[name])


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_goes_on_in_the_other_framework(name, tmp_path):
    make, tx = OPTIMIZERS[name]
    weights, state = tmp_path / "weights.safetensors", tmp_path / "optimizer.safetensors"
    ours, our_optimizer = in_torch(make)
    theirs, their_optimizer = in_flax(tx)
    train_torch(ours, our_optimizer, 0, 7)

    pt.save_weights(ours, weights)
    torch_optimizers.save_optimizer(ours, our_optimizer, state)
    pf.load_weights(theirs, weights)
    flax_optimizers.load_optimizer(theirs, their_optimizer, state)
    train_torch(ours, our_optimizer, 7, 20)
    train_flax(theirs, their_optimizer, 7, 20)
    assert_same(ours, theirs)

    pf.save_weights(theirs, weights)
    flax_optimizers.save_optimizer(theirs, their_optimizer, state)
    back, back_optimizer = in_torch(make)
    pt.load_weights(back, weights)
    torch_optimizers.load_optimizer(back, back_optimizer, state)
    train_flax(theirs, their_optimizer, 27, 20)
    train_torch(back, back_optimizer, 27, 20)
    assert_same(back, theirs)


@pytest.mark.parametrize("name", ["momentum", "Adam"])
def test_an_optimizer_that_starts_anew_is_seen(name):
    make, tx = OPTIMIZERS[name]
    ours, our_optimizer = in_torch(make)
    train_torch(ours, our_optimizer, 0, 7)
    theirs, their_optimizer = in_flax(tx)
    pf.load_arrays(theirs, pt.to_arrays(ours))
    train_torch(ours, our_optimizer, 7, 1)
    train_flax(theirs, their_optimizer, 7, 1)
    with pytest.raises(AssertionError, match="distance"):
        assert_same(ours, theirs)


def filled(optimizer):
    """Fills a state with other numbers everywhere, as after 11 steps."""
    with torch.no_grad():
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.grad = torch.zeros_like(p)
        optimizer.step()
        for state in optimizer.state.values():
            for key, value in state.items():
                value.copy_(torch.tensor(11.0) if key == "step" else torch.rand(value.shape))
    return optimizer


def assert_equal(ours, theirs):
    assert ours.keys() == theirs.keys() != set()
    for name, array in ours.items():
        assert theirs[name].dtype == array.dtype, name
        np.testing.assert_array_equal(theirs[name], array, name)


@pytest.mark.parametrize(("name", "dtype"), [("momentum", "float32"), ("AdamW", "bfloat16")])
def test_a_state_moves_bit_for_bit(name, dtype, tmp_path):
    make, tx = OPTIMIZERS[name]
    ours, optimizer = in_torch(make, getattr(torch, dtype))
    arrays = torch_optimizers.optimizer_to_arrays(ours, filled(optimizer))
    theirs, their_optimizer = in_flax(tx, jnp.dtype(dtype))
    flax_optimizers.load_optimizer_arrays(theirs, their_optimizer, arrays)
    assert_equal(arrays, flax_optimizers.optimizer_to_arrays(theirs, their_optimizer))
    flax_optimizers.save_optimizer(theirs, their_optimizer, tmp_path / "state.safetensors")
    back, back_optimizer = in_torch(make, getattr(torch, dtype))
    torch_optimizers.load_optimizer(back, back_optimizer, tmp_path / "state.safetensors")
    for p, q in zip(ours.parameters(), back.parameters(), strict=True):
        state, back_state = optimizer.state[p], back_optimizer.state[q]
        assert state.keys() == back_state.keys()
        for key, value in state.items():
            assert torch.equal(value, back_state[key]), key
            assert value.dtype == back_state[key].dtype


@pytest.mark.parametrize("wrapper", ["ensemble", "batchensemble"])
def test_members_keep_their_moments(wrapper):
    ours = getattr(pt, wrapper)(nn.Sequential(nn.Linear(5, 3), nn.Tanh(), nn.Linear(3, 3)), 4, rngs=0)
    arrays = torch_optimizers.optimizer_to_arrays(ours, filled(ADAM(ours.parameters())))

    def twin():
        layers = (nnx.Linear(*sizes, rngs=nnx.Rngs(0)) for sizes in ((5, 3), (3, 3)))
        return getattr(pf, wrapper)(nnx.Sequential(next(layers), nnx.tanh, next(layers)), 4, rngs=0)

    theirs = without_draws(twin)
    optimizer = nnx.Optimizer(theirs, optax.adam(1e-3), wrt=nnx.Param)
    flax_optimizers.load_optimizer_arrays(theirs, optimizer, arrays)
    assert_equal(arrays, flax_optimizers.optimizer_to_arrays(theirs, optimizer))


def linear_pair(make, tx, out_features=2):
    ours, theirs = nn.Linear(3, out_features), flax_linear(3, out_features)
    return (ours, make(ours.parameters())), (theirs, nnx.Optimizer(theirs, tx, wrt=nnx.Param))


def of_biases(of_bias, of_others):
    """Returns a function that makes a tree of labels or masks for a state of parameters."""
    is_leaf = lambda node: isinstance(node, nnx.Variable)  # noqa: E731
    return lambda tree: jax.tree.map(lambda v: of_bias if v.ndim == 1 else of_others, tree, is_leaf=is_leaf)


SCHEDULE = optax.cosine_decay_schedule(0.1, 50)
WRAPPED = {
    "chain": optax.chain(optax.clip_by_global_norm(1.0), optax.adam(SCHEDULE), optax.scale(0.5)),
    "inject_hyperparams": optax.inject_hyperparams(optax.adamw)(learning_rate=SCHEDULE),
    "apply_if_finite": optax.apply_if_finite(optax.adam(1e-3), 3),
    "masked": optax.masked(optax.adam(1e-3), of_biases(True, True)),
    "multi_transform": optax.multi_transform({"a": optax.adam(1e-3), "b": optax.adam(1e-2)}, of_biases("a", "b")),
}


@pytest.mark.parametrize("wrapper", WRAPPED)
def test_moments_and_counts_are_found_inside_other_transformations(wrapper):
    ours, theirs = linear_pair(ADAM, WRAPPED[wrapper])
    filled(ours[1])
    arrays = torch_optimizers.optimizer_to_arrays(*ours)
    flax_optimizers.load_optimizer_arrays(*theirs, arrays)
    assert_equal(arrays, flax_optimizers.optimizer_to_arrays(*theirs))
    counts = optax.tree_utils.tree_get_all_with_path(nnx.as_pure(theirs[1].opt_state), "count")
    assert {int(count) for _, count in counts} == {11} == {int(theirs[1].step[...])}
    if wrapper == "inject_hyperparams":  # takes its schedule's value at the next step
        theirs[1].update(theirs[0], nnx.grad(lambda model: model(jnp.ones((1, 3), "float32")).sum())(theirs[0]))
        assert theirs[1].opt_state.hyperparams["learning_rate"][...] == SCHEDULE(11)


def test_frozen_parameters_have_no_state():
    (ours, optimizer), _ = linear_pair(ADAM, optax.adam(1e-3))
    ours.bias.requires_grad_(False)
    ours(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    arrays = torch_optimizers.optimizer_to_arrays(ours, optimizer)
    assert sorted(arrays) == ["weight.exp_avg", "weight.exp_avg_sq", "weight.step"]
    frozen = optax.multi_transform(
        {"train": optax.adam(1e-3), "freeze": optax.set_to_zero()}, of_biases("freeze", "train")
    )
    for tx in (frozen, optax.masked(optax.adam(1e-3), of_biases(False, True))):
        theirs = linear_pair(ADAM, tx)[1]
        flax_optimizers.load_optimizer_arrays(*theirs, arrays)
        assert_equal(arrays, flax_optimizers.optimizer_to_arrays(*theirs))


def test_groups_have_their_own_options():
    ours = nn.Linear(3, 2)
    optimizer = SGD([{"params": [ours.weight], "momentum": 0.9}, {"params": [ours.bias]}], lr=0.1)
    assert list(torch_optimizers.optimizer_to_arrays(ours, filled(optimizer))) == ["weight.momentum_buffer"]
    # a module that holds the model has other names for the same parameters
    inside = torch_optimizers.optimizer_to_arrays(nn.ModuleDict({"model": ours}), optimizer)
    assert list(inside) == ["model.weight.momentum_buffer"]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_new_optimizer_has_zeros(name):
    ours, theirs = linear_pair(*OPTIMIZERS[name])
    arrays = torch_optimizers.optimizer_to_arrays(*ours)
    assert all((array == 0).all() for array in arrays.values())
    assert not ours[1].state
    assert arrays.keys() == flax_optimizers.optimizer_to_arrays(*theirs).keys()
    flax_optimizers.load_optimizer_arrays(*theirs, arrays)
    torch_optimizers.load_optimizer_arrays(*ours, flax_optimizers.optimizer_to_arrays(*theirs))
    ours[0](torch.ones(1, 3)).sum().backward()
    ours[1].step()


def test_the_step_of_a_schedule_of_sgd_is_asked_for(tmp_path):
    ours, theirs = linear_pair(SGD, optax.sgd(SCHEDULE))
    arrays = torch_optimizers.optimizer_to_arrays(*ours)
    assert arrays == {}
    with pytest.raises(ValueError, match=r"Add it: arrays\['weight.step'\] = np.float32\(steps\)"):
        flax_optimizers.load_optimizer_arrays(*theirs, arrays)
    flax_optimizers.load_optimizer_arrays(*theirs, {"weight.step": np.float32(12)})
    assert theirs[1].opt_state[1].count[...] == 12 == theirs[1].step[...]
    flax_optimizers.save_optimizer(*theirs, tmp_path / "state.safetensors")
    torch_optimizers.load_optimizer(*ours, tmp_path / "state.safetensors")  # where the scheduler counts
    other = linear_pair(SGD, optax.sgd(SCHEDULE))[1]
    flax_optimizers.load_optimizer(*other, tmp_path / "state.safetensors")
    assert other[1].opt_state[1].count[...] == 12


def test_loading_writes_into_the_tensors_that_are_there():
    (ours, optimizer), _ = linear_pair(ADAM, optax.adam(1e-3))
    before = dict(filled(optimizer).state[ours.weight])
    torch_optimizers.load_optimizer_arrays(ours, optimizer, torch_optimizers.optimizer_to_arrays(ours, optimizer))
    assert all(optimizer.state[ours.weight][key] is value for key, value in before.items())


def test_optax_alone_goes_on_from_the_state():
    tx = optax.adam(1e-3)
    ours, (model, optimizer) = linear_pair(ADAM, tx)
    filled(ours[1])
    flax_optimizers.load_optimizer_arrays(model, optimizer, torch_optimizers.optimizer_to_arrays(*ours))
    params, opt_state = nnx.as_pure(nnx.state(model, nnx.Param)), nnx.as_pure(optimizer.opt_state)
    grads = nnx.grad(lambda model: model(jnp.ones((1, 3), "float32")).sum())(model)
    updates, opt_state = tx.update(nnx.as_pure(grads), opt_state, params)
    optimizer.update(model, grads)
    assert opt_state[0].count == 12
    np.testing.assert_array_equal(optax.apply_updates(params, updates)["kernel"], model.kernel[...])


def change(arrays, name, array):
    return {**arrays, name: array} if array is not None else {key: a for key, a in arrays.items() if key != name}


BAD = {
    "missing": ("bias.exp_avg", None, "missing: bias.exp_avg"),
    "unexpected": ("scale.exp_avg", np.zeros(2, "float32"), "unexpected: scale.exp_avg"),
    "other shape": (
        "weight.exp_avg",
        np.zeros((3, 2), "float32"),
        r"weight.exp_avg is \(2, 3\) here, \(3, 2\) there",
    ),
    "other dtype": ("bias.exp_avg_sq", np.zeros(2), "bias.exp_avg_sq is float32 here, float64 there"),
    "half a step": ("bias.step", np.float32(1.5), "got 1.5 in bias.step"),
    "negative step": ("bias.step", np.float32(-1), "got -1.0 in bias.step"),
    "step NaN": ("bias.step", np.float32("nan"), "got nan in bias.step"),
    "long name": ("a\n" * 10_000, np.zeros(2, "float32"), r"unexpected: 'a\\na\\n"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_state_that_does_not_fit_changes_nothing(case):
    name, array, sentence = BAD[case]
    ours, theirs = linear_pair(ADAM, optax.adam(1e-3))
    filled(ours[1])
    arrays = torch_optimizers.optimizer_to_arrays(*ours)
    flax_optimizers.load_optimizer_arrays(*theirs, arrays)
    sentences = []
    for module, pair in ((torch_optimizers, ours), (flax_optimizers, theirs)):
        changed = change({name: a + 1 for name, a in arrays.items()}, name, array)
        call = partial(module.load_optimizer_arrays, *pair, changed)
        sentences.append(sentence_of(call, ValueError))
        assert_equal(arrays, module.optimizer_to_arrays(*pair))
    assert sentences[0] == sentences[1]
    assert re.search(sentence, sentences[0])
    assert len(sentences[0]) < 1000


def test_numbers_of_steps_that_differ_are_refused_where_there_is_one_count():
    ours, theirs = linear_pair(ADAM, optax.adam(1e-3))
    filled(ours[1]).state[ours[0].bias]["step"].fill_(3)
    arrays = torch_optimizers.optimizer_to_arrays(*ours)
    torch_optimizers.load_optimizer_arrays(*ours, arrays)
    with pytest.raises(ValueError, match=r"got 3 in bias.step and 11 in weight.step"):
        flax_optimizers.load_optimizer_arrays(*theirs, arrays)
    assert theirs[1].opt_state[0].count[...] == 0


def test_tied_parameters_have_one_state():
    ours, optimizer = in_torch(ADAM)
    theirs, their_optimizer = in_flax(optax.adam(1e-3))
    arrays = torch_optimizers.optimizer_to_arrays(ours, filled(optimizer))
    np.testing.assert_array_equal(arrays["layers.0.weight.exp_avg"], arrays["layers.1.weight.exp_avg"])
    arrays["layers.1.weight.exp_avg"] = arrays["layers.1.weight.exp_avg"] + 1
    for module, pair in ((torch_optimizers, (ours, optimizer)), (flax_optimizers, (theirs, their_optimizer))):
        with pytest.raises(ValueError, match="tied in this model"):
            module.load_optimizer_arrays(*pair, arrays)


def test_a_part_of_packed_weights_is_refused():
    model = without_draws(FlaxNet)
    only_query = optax.masked(optax.adam(1e-3), lambda tree: nnx.map_state(lambda path, _: "query" in path, tree))
    with pytest.raises(ValueError, match=r"some parts of attention\.in_proj_weight, attention\.in_proj_bias"):
        flax_optimizers.optimizer_to_arrays(model, nnx.Optimizer(model, only_query, wrt=nnx.Param))


def flax_conv():
    return nnx.Conv(1, 2, (3, 3), kernel_init=nnx.initializers.ones_init(), rngs=nnx.Rngs(0))


def test_moments_follow_the_rows_of_a_layer_that_reads_a_flattened_convolution(tmp_path):
    flatten, path = {"fc": (2, 3, 5)}, tmp_path / "state.safetensors"
    ours = nn.ModuleDict({"fc": nn.Linear(30, 3)})
    theirs = nnx.Dict({"fc": flax_linear(30, 3)})
    pair = ours, filled(ADAM(ours.parameters()))
    other = theirs, nnx.Optimizer(theirs, optax.adam(1e-3), wrt=nnx.Param)
    torch_optimizers.save_optimizer(*pair, path, flatten=flatten)
    flax_optimizers.load_optimizer(*other, path)
    arrays = torch_optimizers.optimizer_to_arrays(*pair)
    rows = arrays["fc.weight.exp_avg"].reshape(3, 2, 3, 5).transpose(2, 3, 1, 0).reshape(30, 3)
    np.testing.assert_array_equal(other[1].opt_state[0].mu["fc"]["kernel"][...], rows)
    assert_equal(arrays, flax_optimizers.optimizer_to_arrays(*other, flatten=flatten))
    flax_optimizers.load_optimizer(*other, path, flatten={})
    np.testing.assert_array_equal(other[1].opt_state[0].mu["fc"]["kernel"][...], arrays["fc.weight.exp_avg"].T)
    for module, both in ((torch_optimizers, pair), (flax_optimizers, other)):
        with pytest.raises(ValueError, match="no Linear layer of this model"):
            module.load_optimizer(*both, path, flatten={"fc2": (2, 3, 5)})


def test_a_flattened_convolution_of_unknown_shape_is_refused(tmp_path):
    ours = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(30, 3))
    theirs = nnx.Sequential(flax_conv(), lambda x: x, flax_linear(30, 3))
    path = tmp_path / "state.safetensors"
    torch_optimizers.save_optimizer(ours, ADAM(ours.parameters()), path)
    optimizer = nnx.Optimizer(theirs, optax.adam(1e-3), wrt=nnx.Param)
    with pytest.raises(ValueError, match=r'Pass flatten=\{"2": \(2, height, width\)\}'):
        flax_optimizers.load_optimizer(theirs, optimizer, path)
    flax_optimizers.load_optimizer(theirs, optimizer, path, flatten={"2": (2, 3, 5)})


def test_a_state_from_flax_says_whether_its_rows_are_in_torchs_order(tmp_path):
    ours = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(30, 3))
    theirs = nnx.Sequential(flax_conv(), lambda x: x, flax_linear(30, 3))
    pair = theirs, nnx.Optimizer(theirs, optax.adam(1e-3), wrt=nnx.Param)
    path, optimizer = tmp_path / "state.safetensors", ADAM(ours.parameters())
    flax_optimizers.save_optimizer(*pair, path)
    with pytest.raises(ValueError, match=r'"2": \(2, height, width\)\} to save_optimizer in Flax'):
        torch_optimizers.load_optimizer(ours, optimizer, path)
    assert not optimizer.state
    torch_optimizers.load_optimizer(ours, optimizer, path, flatten={})
    for flatten in ({"2": (np.int64(2), 3, 5)}, {}):
        flax_optimizers.save_optimizer(*pair, path, flatten=flatten)
        torch_optimizers.load_optimizer(ours, optimizer, path)
        flax_optimizers.load_optimizer(*pair, path)


def test_groups_of_parameters_are_told_by_their_paths():
    """Labels by path mask what is in a Variable, where labels by Variable mask it itself."""
    model = nnx.Dict({"a": flax_linear(3, 2), "b": flax_linear(2, 5)})
    label = partial(jax.tree.map_with_path, lambda path, _: path[0].key)
    tx = optax.multi_transform({"a": optax.adam(1e-2), "b": optax.adam(1e-3)}, label)
    source, target = (nnx.Optimizer(model, tx, wrt=nnx.Param) for _ in range(2))
    grads = nnx.grad(lambda model: model["b"](model["a"](jnp.ones((1, 3), "float32"))).sum())(model)
    flax_update(model, source, grads)
    arrays = flax_optimizers.optimizer_to_arrays(model, source)
    assert sum(name.endswith(".exp_avg") for name in arrays) == 4
    flax_optimizers.load_optimizer_arrays(model, target, arrays)
    assert_equal(flax_optimizers.optimizer_to_arrays(model, target), arrays)
    assert all(array.any() for array in arrays.values())


def test_moments_of_a_masked_kernel(tmp_path):
    mask = jnp.asarray([[[1.0, 0.0]], [[0.0, 1.0]]], "float32")
    model = nnx.Conv(1, 2, (2,), mask=mask, kernel_init=nnx.initializers.ones_init(), rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adam(1e-3), wrt=nnx.Param)
    arrays = flax_optimizers.optimizer_to_arrays(model, optimizer)
    ones = {name: np.ones_like(array) for name, array in arrays.items()}
    with pytest.raises(ValueError, match="got 2 others"):
        flax_optimizers.load_optimizer_arrays(model, optimizer, ones)
    assert_equal(flax_optimizers.optimizer_to_arrays(model, optimizer), arrays)
    flax_optimizers.load_optimizer_arrays(model, optimizer, arrays)


def test_a_state_with_nan_is_warned_of(tmp_path):
    ours, theirs = linear_pair(ADAM, optax.adam(1e-3))
    filled(ours[1]).state[ours[0].weight]["exp_avg"][0, 0] = float("nan")
    path = tmp_path / "state.safetensors"
    torch_optimizers.save_optimizer(*ours, path)
    for module, pair in ((torch_optimizers, ours), (flax_optimizers, theirs)):
        with pytest.warns(UserWarning, match=r"NaN or infinite:\n  weight\.exp_avg\n"):
            module.load_optimizer(*pair, path)


def test_both_packages_have_the_same_functions():
    for name in torch_optimizers.__all__:
        ours, theirs = (getattr(module, name) for module in (torch_optimizers, flax_optimizers))
        a, b = (inspect.signature(function).parameters.values() for function in (ours, theirs))
        assert [(p.name, p.kind, p.default) for p in a] == [(p.name, p.kind, p.default) for p in b]
        headings = [re.findall(r"^    (\w+):$", function.__doc__, re.MULTILINE) for function in (ours, theirs)]
        assert headings[0] == headings[1] != []
    table = [
        re.findall(r"^    \|.*$", m.optimizer_to_arrays.__doc__, re.M) for m in (torch_optimizers, flax_optimizers)
    ]
    assert table[0] == table[1] != []


def test_lightning_hands_over_its_wrapped_optimizer():
    ours, _ = linear_pair(ADAM, optax.adam(1e-3))
    arrays = torch_optimizers.optimizer_to_arrays(ours[0], filled(ADAM(ours[0].parameters())))
    torch_optimizers.load_optimizer_arrays(ours[0], LightningOptimizer(ours[1]), arrays)
    assert_equal(arrays, torch_optimizers.optimizer_to_arrays(*ours))


def test_loading_does_not_compile_a_step_again():
    _, (model, optimizer) = linear_pair(ADAM, optax.adam(1e-3))
    grads = nnx.grad(lambda model: model(jnp.ones((1, 3), "float32")).sum())(model)
    traces = []

    @nnx.jit
    def step(model, optimizer, grads):
        traces.append(1)
        optimizer.update(model, grads)

    step(model, optimizer, grads)
    step(model, optimizer, grads)
    flax_optimizers.load_optimizer_arrays(model, optimizer, flax_optimizers.optimizer_to_arrays(model, optimizer))
    before = len(traces)
    step(model, optimizer, grads)
    assert len(traces) == before
    assert optimizer.opt_state[0].count[...] == 3


def test_files_are_plain_and_damage_is_named(tmp_path):
    ours, theirs = linear_pair(ADAM, optax.adam(1e-3))
    path = tmp_path / "state.safetensors"
    for module, pair in ((torch_optimizers, ours), (flax_optimizers, theirs)):
        module.save_optimizer(*pair, path)
        assert_equal(safetensors.numpy.load_file(path), module.optimizer_to_arrays(*pair))
    path.write_bytes(path.read_bytes()[:-1])
    for module, pair in ((torch_optimizers, ours), (flax_optimizers, theirs)):
        with pytest.raises(ValueError, match=r"state\.safetensors"):
            module.load_optimizer(*pair, path)


def test_the_state_of_a_model_without_memory_is_refused(tmp_path):
    model = nn.Linear(3, 2, device="meta")
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    path = tmp_path / "optimizer.safetensors"
    pt.optimizers.save_optimizer(twin := nn.Linear(3, 2), torch.optim.SGD(twin.parameters(), 0.1, momentum=0.9), path)
    for call in (
        lambda: pt.optimizers.optimizer_to_arrays(model, optimizer),
        lambda: pt.optimizers.save_optimizer(model, optimizer, tmp_path / "other.safetensors"),
        lambda: pt.optimizers.load_optimizer(model, optimizer, path),
    ):
        with pytest.raises(ValueError, match="meta"):
            call()
