"""ensemble(): independent members, one call, and the ways in and out."""

import copy
import itertools
import pickle
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import linen, nnx
from torch import nn

import probly_flax as pf
import probly_torch as pt
from parity_tests.kit.trees import jax_of
from parity_tests.standard import assert_close
from parity_tests.suite.subjects.subject import jitted, randomized, without_draws


class TorchNet(nn.Module):
    """Several inputs, a tuple as output, tied weights, a buffer, an embedding, attention and norms."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.norm = nn.GroupNorm(2, 8)
        self.conv = nn.Conv1d(8, 8, 3, padding=1)
        self.act = nn.PReLU()
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("offset", torch.arange(8.0))

    def forward(self, tokens, scale):
        x = self.embed(tokens) * scale + self.offset
        x, _ = self.attention(x, x, x, need_weights=False)
        x = self.act(self.conv(self.norm(x.mT)).mT)
        return self.head(x), {"pooled": x.mean(1)}


class FlaxNet(nnx.Module):
    """The like of it in Flax."""

    def __init__(self, rngs):
        self.embed = nnx.Embed(11, 8, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, 8, decode=False, rngs=rngs)
        self.norm = nnx.GroupNorm(8, num_groups=2, rngs=rngs)
        self.conv = nnx.Conv(8, 8, (3,), rngs=rngs)
        self.act = nnx.PReLU()

    def __call__(self, tokens, scale):
        x = self.embed(tokens) * scale
        x = self.act(self.conv(self.norm(self.attention(x))))
        return self.embed.attend(x), {"pooled": x.mean(1)}


TOKENS = np.arange(10).reshape(2, 5)


def filled(make, seed=0):
    return randomized(without_draws(lambda: make(nnx.Rngs(0))), seed)


def make_linear(rngs):
    """Makes the layer that most tests share.

    They also share a batch for it and a count of members, for which JAX compiles once.
    """
    return nnx.Linear(4, 8, rngs=rngs)


X = jax_of(np.random.default_rng(0).standard_normal((5, 4)), "float32")


def torch_outputs(model, **options):
    tokens, scale = torch.tensor(TOKENS), torch.tensor(2.0)
    return model(tokens, scale, **options)


def flax_outputs(model):
    return model(jax_of(TOKENS), jnp.float32(2.0))


@pytest.mark.parametrize("chunk_size", [None, 1, 2])
def test_a_call_equals_the_loop_over_members(chunk_size):
    model = pt.ensemble(TorchNet(), 3, chunk_size=chunk_size)
    y, extra = torch_outputs(model)
    assert y.shape == (3, 2, 5, 11)
    for i, member in enumerate(model):
        assert type(member) is TorchNet
        alone, alone_extra = torch_outputs(member)
        assert_close(y[i].detach(), alone.detach(), "float32")
        assert_close(extra["pooled"][i].detach(), alone_extra["pooled"].detach(), "float32")
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        model = pf.ensemble(without_draws(lambda: FlaxNet(nnx.Rngs(0))), 3, chunk_size=chunk_size)
        y, extra = jax.tree.map(np.asarray, flax_outputs(partial(jitted, model)))
        assert y.shape == (3, 2, 5, 11)
        for i, member in enumerate(model):
            assert type(member) is FlaxNet
            alone, alone_extra = flax_outputs(partial(jitted, member))
            assert_close(y[i], alone, "float32")
            assert_close(extra["pooled"][i], alone_extra["pooled"], "float32")


TORCH_ARCHITECTURES = {
    "MLP": lambda: nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)),
    "CNN": lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.LazyLinear(3)),
    "groups": lambda: nn.Sequential(nn.Conv1d(4, 8, 3, groups=2), nn.GroupNorm(2, 8), nn.ConvTranspose1d(8, 4, 3)),
    "LSTM": lambda: nn.LSTM(4, 5, num_layers=2, bidirectional=True),
    "GRU": lambda: nn.GRU(4, 5),
    "cells": lambda: nn.ModuleList([nn.LSTMCell(4, 5), nn.GRUCell(4, 5), nn.RNNCell(4, 5)]),
    "encoder": lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16), 2),
    "decoder": lambda: nn.TransformerDecoderLayer(8, 2, 16),
    "attention": lambda: nn.MultiheadAttention(8, 2, kdim=6, vdim=5),
    "embeddings": lambda: nn.ModuleList([nn.Embedding(7, 4), nn.EmbeddingBag(7, 4), nn.Bilinear(3, 4, 5)]),
}
FLAX_ARCHITECTURES = {  # many of one shape: JAX compiles the draws of each
    "MLP": lambda rngs: nnx.Sequential(nnx.Linear(4, 8, rngs=rngs), nnx.relu, nnx.Linear(8, 8, rngs=rngs)),
    "CNN": lambda rngs: nnx.Sequential(nnx.Conv(3, 8, (3, 3), rngs=rngs), nnx.BatchNorm(8, rngs=rngs)),
    "transposed": lambda rngs: nnx.ConvTranspose(3, 8, (3, 3), rngs=rngs),
    "LSTM": lambda rngs: nnx.RNN(nnx.LSTMCell(4, 8, rngs=rngs), rngs=rngs),
    "optimized LSTM": lambda rngs: nnx.RNN(nnx.OptimizedLSTMCell(4, 8, rngs=rngs), rngs=rngs),
    "GRU": lambda rngs: nnx.RNN(nnx.GRUCell(4, 8, rngs=rngs), rngs=rngs),
    "attention": lambda rngs: nnx.MultiHeadAttention(2, 8, decode=False, rngs=rngs),
    "embedding": lambda rngs: nnx.Embed(7, 4, rngs=rngs),
    "general": lambda rngs: nnx.LinearGeneral((2, 2), (4, 2), axis=(-2, -1), rngs=rngs),
    "LoRA": lambda rngs: nnx.LoRALinear(4, 8, lora_rank=2, rngs=rngs),
}


@pytest.mark.parametrize("name", TORCH_ARCHITECTURES)
def test_torch_members_never_share_a_draw(name):
    base = TORCH_ARCHITECTURES[name]()
    if name == "CNN":
        base(torch.zeros(2, 3, 5, 5))
    networks = [base, *pt.ensemble(base, 3), *pt.ensemble(base, 2, rngs=1)]
    assert_no_draw_is_shared([[p.detach().numpy() for p in network.parameters()] for network in networks])


@pytest.mark.parametrize("name", FLAX_ARCHITECTURES)
def test_flax_members_never_share_a_draw(name):
    constructed = list(pf.ensemble(FLAX_ARCHITECTURES[name], 3, rngs=1))
    networks = [*constructed, *pf.ensemble(constructed[0], 3)]
    leaves = [jax.tree.leaves(nnx.state(network, nnx.Param)) for network in networks]
    assert_no_draw_is_shared([[np.asarray(leaf) for leaf in network] for network in leaves])


def assert_no_draw_is_shared(networks):
    drawn = 0
    for tensors in zip(*networks, strict=True):
        if any(np.unique(tensor).size > 1 for tensor in tensors):  # the others start at a constant, such as 0
            drawn += 1
            assert not any((a == b).any() for a, b in itertools.combinations(tensors, 2))
    assert drawn


@pytest.mark.parametrize(
    ("make", "parameter"),
    [
        (make_linear, "kernel"),
        (lambda rngs: nnx.LinearGeneral((2, 2), (4, 2), axis=(-2, -1), rngs=rngs), "kernel"),
        (lambda rngs: nnx.Conv(6, 8, (3, 3), feature_group_count=2, rngs=rngs), "kernel"),
        (lambda rngs: nnx.ConvTranspose(3, 8, (3, 3), rngs=rngs), "kernel"),
        (lambda rngs: nnx.Embed(7, 4, rngs=rngs), "embedding"),
        (lambda rngs: nnx.Einsum("bi,io->bo", (4, 8), (8,), rngs=rngs), "kernel"),
        (lambda rngs: nnx.LayerNorm(4, rngs=rngs), "scale"),
        (lambda rngs: nnx.PReLU(), "negative_slope"),
    ],
)
def test_flax_reset_draws_what_a_new_layer_draws(make, parameter):
    copied = pf.ensemble(without_draws(lambda: make(nnx.Rngs(9))), 3, rngs=4)
    built = nnx.split_rngs(splits=3)(nnx.vmap(make))(nnx.Rngs(4))
    np.testing.assert_array_equal(getattr(copied.stacked, parameter)[...], getattr(built, parameter)[...])


def test_torch_draws_are_reproducible_and_leave_the_global_generator_alone():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    a, b = pt.ensemble(TorchNet(), 2, rngs=1), pt.ensemble(TorchNet(), 2, rngs=pt.Rngs(1))
    torch.manual_seed(0)
    pt.ensemble(a[0], 2)
    assert torch.equal(torch.rand(3), expected)
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    other = pt.ensemble(TorchNet(), 2, rngs=2)
    assert not torch.equal(a.embed.weight, other.embed.weight)


def test_names_are_natural_and_ties_are_kept():
    base = TorchNet()
    model = pt.ensemble(base, 3)
    assert list(model.state_dict()) == list(base.state_dict())
    assert {name: tuple(p.shape[1:]) for name, p in model.named_parameters()} == {
        name: tuple(p.shape) for name, p in base.named_parameters()
    }
    assert model.head.weight is model.embed.weight
    member = model[1]
    assert member.head.weight is member.embed.weight
    weight = copy.deepcopy(base.state_dict())
    assert all(torch.equal(v, weight[k]) for k, v in base.state_dict().items())
    root = pt.ensemble(nn.Linear(2, 3), 4)
    assert list(root.state_dict()) == ["weight", "bias"]


def test_a_constructor_gives_the_numbers_of_the_recipe_with_split_rngs_and_vmap():
    @nnx.split_rngs(splits=3)
    @nnx.vmap(in_axes=(0,), out_axes=0)
    def make_model(rngs):
        return make_linear(rngs)

    recipe = make_model(nnx.Rngs(7))
    model = pf.ensemble(make_linear, 3, rngs=nnx.Rngs(7))
    np.testing.assert_array_equal(model.stacked.kernel[...], recipe.kernel[...])
    forward = nnx.vmap(lambda model, x: model(x), in_axes=(0, None))
    np.testing.assert_array_equal(model(X), forward(recipe, X))


class LinenNet(linen.Module):
    """A nested Linen module with statistics."""

    @linen.compact
    def __call__(self, x):
        x = linen.relu(linen.Dense(8)(x))
        return linen.Dense(8)(linen.BatchNorm(use_running_average=True)(x))


@pytest.mark.parametrize("network", [linen.Dense(8), LinenNet()], ids=["Dense", "LinenNet"])
def test_a_linen_module_gives_the_numbers_of_the_recipe_with_split_and_vmap(network):
    x = jax_of(np.arange(4), "float32")
    keys = jax.random.split(jax.random.PRNGKey(7), 3)
    variables = jax.vmap(network.init, in_axes=(0, None))(keys, x)
    expected = jax.vmap(network.apply, in_axes=(0, None))(variables, x)
    model = pf.ensemble(network, 3, rngs=7, example_input=x)
    np.testing.assert_array_equal(model(x), expected)
    variables, apply = jax.tree.map(np.asarray, variables), jax.jit(network.apply)
    for i, member in enumerate(model):
        own = jax.tree.map(lambda v, i=i: jax_of(v[i]), variables)
        assert_close(jitted(member, x), apply(own, x), "float32")
    with pytest.raises(TypeError, match="example_input=x"):
        pf.ensemble(network, 3)


def test_constructors_may_name_rngs_as_keyword_only():
    class Net(nn.Module):
        def __init__(self, *, rngs):
            super().__init__()
            self.weight = nn.Parameter(pt.random.normal(rngs.params(), (3,)))

        def forward(self, x):
            return x * self.weight

    model = pt.ensemble(Net, 3, rngs=4)
    expected = pt.random.normal(pt.Rngs(pt.Rngs(4).split(3).default.key[1]).params(), (3,))
    assert torch.equal(model.weight[1], expected)


def test_a_list_of_trained_networks_is_stacked_as_it_is_and_comes_back():
    members = [TorchNet() for _ in range(3)]
    model = pt.ensemble(members, 3)
    for member, back in zip(members, model, strict=True):
        assert all(torch.equal(v, back.state_dict()[k]) for k, v in member.state_dict().items())
    again = pt.Ensemble(list(model))
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in model.state_dict().items())
    twins = [filled(FlaxNet, seed) for seed in range(3)]
    model = pf.ensemble(twins, 3)
    again = pf.Ensemble(list(model))
    jax.tree.map(np.testing.assert_array_equal, nnx.state(again), nnx.state(model))
    np.testing.assert_array_equal(model[2].embed.embedding[...], twins[2].embed.embedding[...])


def test_pruning():
    model = pt.ensemble(TorchNet(), 4)
    assert_close(torch_outputs(model[[0, 2]])[0].detach(), torch_outputs(model)[0].detach()[[0, 2]], "float32")
    assert len(model[1:]) == 3


def test_reset_params_false_starts_every_member_from_the_base():
    base = TorchNet()
    model = pt.ensemble(base, 3, reset_params=False)
    assert all((p == q).all() for p, q in zip(model.parameters(), base.parameters(), strict=True))
    base = filled(FlaxNet)
    model = pf.ensemble(base, 3, reset_params=False)
    assert (np.asarray(model.stacked.embed.embedding) == np.asarray(base.embed.embedding)).all()


def test_a_rule_for_one_call_gives_twins_the_same_numbers():
    def torch_rule(parameter, rngs):
        return pt.random.normal(rngs.params(), parameter.shape)

    def flax_rule(parameter, rngs):
        return jax.random.normal(rngs.params(), parameter.shape, "float32")

    ours = pt.ensemble(nn.Linear(3, 3), 4, rngs=3, reset=torch_rule)
    theirs = pf.ensemble(filled(lambda rngs: nnx.Linear(3, 3, rngs=rngs)), 4, rngs=3, reset=flax_rule)
    np.testing.assert_array_equal(ours.bias.detach().numpy(), theirs.stacked.bias[...])
    np.testing.assert_array_equal(ours.weight.detach().numpy(), theirs.stacked.kernel[...])


def test_modes_and_frozen_parameters_are_kept():
    base = TorchNet().eval()
    base.embed.weight.requires_grad_(False)
    model = pt.ensemble(base, 2)
    assert not model.training
    assert not model.embed.weight.requires_grad
    assert not model[0].embed.weight.requires_grad
    assert not model[0].training
    assert model.train().norm.training
    assert model[0].training


def test_dropout_differs_between_members():
    model = pt.ensemble(nn.Sequential(nn.Linear(4, 64), nn.Dropout(0.5)), 3, reset_params=False)
    y = model(torch.ones(1, 4))
    assert not torch.equal(y[0] == 0, y[1] == 0)
    assert torch.equal(*model.eval()(torch.ones(1, 4))[:2])
    base = filled(lambda rngs: nnx.Sequential(nnx.Linear(4, 64, rngs=rngs), nnx.Dropout(0.5, rngs=rngs)))
    model, x = pf.ensemble(base, 3, reset_params=False), jax_of(np.ones((1, 4)), "float32")
    first, second = (np.asarray(model(x)) for _ in range(2))
    assert not (first[0] == first[1]).all()
    assert not (first == second).all(), "the members' streams do not advance"
    model.eval()
    y = np.asarray(model(x))
    assert (y[0] == y[1]).all()


def test_a_batch_for_each_member():
    x = np.random.default_rng(0).standard_normal((3, 2, 4)).astype("float32")
    model = pt.ensemble(nn.Linear(4, 2), 3)
    y = model(torch.tensor(x), in_axes=0).detach()
    for i in range(3):
        assert_close(y[i], model[i](torch.tensor(x[i])).detach(), "float32")
    twin = pf.ensemble(filled(make_linear), 3)
    y = np.asarray(twin(jax_of(x), in_axes=0))
    for i in range(3):
        assert_close(y[i], jitted(twin[i], jax_of(x[i])), "float32")


def test_running_statistics_are_each_members_own():
    x = np.random.default_rng(0).standard_normal((7, 3, 5, 5)).astype("float32")
    layers = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(36, 2)]
    model = pt.ensemble(nn.Sequential(*layers), 3)
    alone = list(model)
    for _ in range(2):
        y = model(torch.tensor(x))
        for i, member in enumerate(alone):
            assert_close(y[i].detach(), member(torch.tensor(x)).detach(), "float32")
    for i, member in enumerate(alone):
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            assert_close(model.get_buffer(f"1.{name}")[i], member.get_buffer(f"1.{name}"), "float32")
    assert not torch.equal(*model.get_buffer("1.running_mean")[:2])
    with jax.numpy_rank_promotion("allow"):
        base = without_draws(lambda: FLAX_ARCHITECTURES["CNN"](nnx.Rngs(0)))
        twin, images = pf.ensemble(base, 3), jax_of(x.transpose(0, 2, 3, 1))
        alone = list(twin)
        for _ in range(2):
            y = np.asarray(jitted(twin, images))
            for i, member in enumerate(alone):
                assert_close(y[i], jitted(member, images), "float32")
        statistics = {name: np.asarray(getattr(twin.stacked.layers[1], name)) for name in ("mean", "var")}
        for i, member in enumerate(alone):
            for name, ours in statistics.items():
                assert_close(ours[i], getattr(member.layers[1], name)[...], "float32")
        assert not (statistics["mean"][0] == statistics["mean"][1]).all()


class Recurrent(nn.Module):
    """The last state of a recurrent layer, through a norm."""

    def __init__(self, kind):
        super().__init__()
        self.rnn = kind(3, 4, num_layers=2, batch_first=True, bidirectional=True)
        self.norm = nn.BatchNorm1d(8)

    def forward(self, x):
        return self.norm(self.rnn(x)[0][:, -1])


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_torch_recurrent_networks_run_in_a_loop_behind_the_same_call(kind):
    model, x = pt.ensemble(Recurrent(kind), 3), torch.randn(3, 5, 6, 3)
    alone = list(model)
    for y, rows in ((model(x[0]), [x[0]] * 3), (model(x, in_axes=0), x)):
        for i, member in enumerate(alone):
            assert torch.equal(y[i], member(rows[i]))
    for i, member in enumerate(alone):
        assert torch.equal(model.norm.running_mean[i], member.norm.running_mean)
    gradient = torch.autograd.grad(model(x[0])[1].pow(3).sum(), model.rnn.weight_hh_l0)[0]
    own = torch.autograd.grad(alone[1](x[0]).pow(3).sum(), alone[1].rnn.weight_hh_l0)[0]
    assert_close(gradient[1], own, "float32")
    assert (gradient[0] == 0).all()
    outputs, state = pt.ensemble(kind(3, 4), 2)(torch.randn(6, 5, 3))
    assert outputs.shape == (2, 6, 5, 4)
    assert (state[0] if kind is nn.LSTM else state).shape == (2, 1, 5, 4)


@pytest.mark.parametrize("cell", [nnx.LSTMCell, nnx.OptimizedLSTMCell, nnx.GRUCell, nnx.SimpleCell])
def test_flax_recurrent_networks(cell):
    x = jax_of(np.ones((5, 6, 4)), "float32")
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        model = pf.ensemble(without_draws(lambda: nnx.RNN(cell(4, 8, rngs=nnx.Rngs(0)), rngs=nnx.Rngs(0))), 3)
        y = np.asarray(jitted(model, x))
        for i, member in enumerate(model):
            assert_close(y[i], jitted(member, x), "float32")
    assert y.shape == (3, 5, 6, 8)
    assert not (y[0] == y[1]).any()


def test_torch_ensembles_are_copied_pickled_and_moved():
    model = pt.ensemble(TorchNet(), 3)
    y = torch_outputs(model)[0]
    for variant in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(torch_outputs(variant)[0], y)
        with torch.no_grad():
            variant.embed.weight.zero_()
        assert torch.equal(torch_outputs(model)[0], y), "the copy shares weights"
        assert not torch.equal(torch_outputs(variant)[0], y), "the copy does not use its own weights"
    model = pt.ensemble(nn.Linear(2, 3), 3).double()
    assert model(torch.ones(4, 2, dtype=torch.float64)).dtype == torch.float64
    model.load_state_dict({name: torch.zeros_like(v) for name, v in model.state_dict().items()})
    assert (model(torch.ones(4, 2, dtype=torch.float64)) == 0).all()
    assert "num_members=3" in repr(model)


def test_flax_ensembles_work_under_nnx_transforms():
    model = pf.ensemble(filled(make_linear), 3)
    y = model(X)
    assert_close(jitted(model, X), y, "float32")
    gradient = nnx.jit(nnx.grad(lambda model: model(X).sum()))(model)
    assert gradient["stacked"]["kernel"].shape == (3, 4, 8)
    assert_close(jax.jit(lambda x: model(x))(X), y, "float32")
    assert_close(nnx.clone(model)(X), y, "float32")
    assert_close(copy.deepcopy(model)(X), y, "float32")


def test_flax_members_spread_over_devices_without_communication_until_they_are_averaged():
    cpus = jax.devices("cpu")[:8]
    mesh = jax.make_mesh((8,), ("members",), axis_types=(jax.sharding.AxisType.Auto,), devices=cpus)
    mlp = without_draws(lambda: FLAX_ARCHITECTURES["MLP"](nnx.Rngs(0)))
    model = randomized(pf.ensemble(mlp, 16, reset_params=False))
    expected = np.asarray(jitted(model, X))
    nnx.update(model, jax.device_put(nnx.state(model), jax.NamedSharding(mesh, jax.P("members"))))
    graph, state = nnx.split(model)
    for reduce, communication in ((lambda y: y, set()), (lambda y: y.mean(0), {"all-reduce"})):
        compiled = jax.jit(lambda state, x, reduce=reduce: reduce(nnx.merge(graph, state)(x))).lower(state, X).compile()
        assert set(re.findall(r"(all-[a-z]+|collective-[a-z]+)\(", compiled.as_text())) == communication
        y = compiled(state, X)
        assert_close(y, reduce(expected), "float32")
        assert len(y.sharding.device_set) == 8
        assert tuple(y.sharding.spec) == (() if communication else ("members",))


def test_a_layer_used_twice_is_one_layer():
    layer = nn.Linear(4, 4)
    model, x = pt.ensemble(nn.Sequential(layer, nn.ReLU(), layer), 3), torch.randn(5, 4)
    for _ in range(2):
        y = model(x)
        for i, member in enumerate(model):
            assert member[0] is member[2]
            assert_close(y[i].detach(), member(x).detach(), "float32")
    with pytest.raises(RuntimeError):
        model(torch.randn(5, 3))
    assert all(isinstance(p, nn.Parameter) for p in model[0].parameters())
    assert_close(model(x).detach(), y.detach(), "float32")
    shared, x = filled(lambda rngs: nnx.Linear(8, 8, rngs=rngs)), jax_of(np.ones((5, 8)), "float32")
    twin = pf.ensemble(nnx.Sequential(shared, nnx.relu, shared), 3)
    y = np.asarray(jitted(twin, x))
    for i, member in enumerate(twin):
        assert member.layers[0] is member.layers[2]
        assert_close(y[i], jitted(member, x), "float32")


def test_numpy_batches_for_each_member():
    model = pf.ensemble(filled(make_linear), 3)
    x = np.random.default_rng(0).standard_normal((3, 5, 4)).astype("float32")
    assert_close(model(x, in_axes=0), model(jax_of(x), in_axes=0), "float32")
    assert model(x[0]).shape == (3, 5, 8)


def test_the_networks_own_train_is_called():
    class Frozen(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(4)

        def forward(self, x):
            return self.norm(x)

        def train(self, mode=True):
            super().train(mode)
            self.norm.eval()
            return self

    model = pt.ensemble(Frozen(), 2).train()
    assert model.training
    assert not model.norm.training


def test_members_with_other_options_or_plain_tensors_are_refused():
    class Scaled(nn.Module):
        def __init__(self, scale):
            super().__init__()
            self.layer, self.scale, self.offset = nn.Linear(2, 2), scale, torch.tensor([scale])

        def forward(self, x):
            return self.layer(x) * self.scale + self.offset

    with pytest.raises(ValueError, match=r"member 0, where scale is 1\.0, and member 1, where it is 2\.0"):
        pt.Ensemble([Scaled(1.0), Scaled(2.0)])
    alike = [Scaled(1.0), Scaled(1.0)]
    alike[1].offset = torch.tensor([9.0])
    with pytest.raises(ValueError, match="offset"):
        pt.Ensemble(alike)
    for network in alike:
        network.offset, network.act = alike[0].offset, lambda x: x
    pt.Ensemble(alike)


def test_buffers_that_the_network_assigns_anew_are_kept():
    class Counter(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("steps", torch.tensor(0))

        def forward(self, x):
            self.steps = self.steps + 1
            return x * self.steps

    model = pt.ensemble(Counter(), 3)
    for _ in range(2):
        y = model(torch.ones(2))
    assert model.steps.tolist() == [2, 2, 2]
    assert y.tolist() == [[2.0, 2.0]] * 3


def test_a_container_with_a_rule_is_reset_by_it_after_its_layers():
    class Sevens(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(2, 2)

        def reset_parameters(self):
            nn.init.constant_(self.layer.weight, 7.0)

    assert (pt.ensemble(Sevens(), 2).layer.weight == 7).all()


def test_an_rngs_given_to_a_call_is_split_between_members_and_advances():
    class Noisy(nnx.Module):
        def __init__(self):
            self.drop = nnx.Dropout(0.5)

        def __call__(self, x, rngs):
            return self.drop(x, rngs=rngs)

    rngs, x = nnx.Rngs(5), jax_of(np.ones((1, 64)), "float32")
    model = pf.ensemble(Noisy(), 3)
    first, second = (np.asarray(model(x, rngs)) for _ in range(2))
    assert not (first[0] == first[1]).all()
    assert not (first == second).all()
    assert int(rngs.default.count[...]) == 2


@pytest.mark.parametrize("layer", [nn.Linear(4, 4), nn.Conv1d(4, 4, 1), nn.Linear(4, 4, bias=False)])
def test_autocast_gives_the_dtype_of_a_member_alone(layer):
    model, x = pt.ensemble(layer, 3), torch.ones(2, 4, 4)
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x)
        assert y.dtype == model[0](x).dtype == torch.bfloat16
        assert torch.equal(y[1], model[1](x))


def test_apply_sees_one_member_at_a_time():
    model = pt.ensemble(nn.Linear(50, 40), 3)
    shapes = []

    def init(module):
        shapes.append(tuple(module.weight.shape))
        nn.init.kaiming_normal_(module.weight)

    nn.Sequential(model).apply(lambda module: init(module) if isinstance(module, nn.Linear) else None)
    assert shapes == [(40, 50)] * 3
    assert not torch.equal(model.weight[0], model.weight[1])


def test_a_cumulative_average_and_the_tools_that_use_it():
    model = pt.ensemble(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4, momentum=None)), 3)
    alone, x = list(model), torch.randn(8, 4)
    for _ in range(2):
        model(x)
        for member in alone:
            member(x)
    for i, member in enumerate(alone):
        assert torch.equal(model.get_buffer("1.running_mean")[i], member[1].running_mean)


def test_outputs_that_are_no_arrays_are_passed_on():
    class TorchPair(nn.Linear):
        def forward(self, x):
            return super().forward(x), None, 3

    y, nothing, number = pt.ensemble(TorchPair(4, 2), 3)(torch.ones(5, 4))
    assert (y.shape, nothing, number) == ((3, 5, 2), None, 3)


def test_scalars_are_shared_under_in_axes():
    class Scale(nn.Linear):
        def forward(self, x, scale):
            return super().forward(x) * scale

    model, x = pt.ensemble(Scale(4, 2), 3), torch.randn(3, 5, 4)
    assert_close(
        model(x, torch.tensor(2.0), in_axes=0).detach(), 2 * model(x, torch.tensor(1.0), in_axes=0).detach(), "float32"
    )


def test_flax_networks_that_sow_and_hold_their_own_functions():
    class Sows(nnx.Module):
        def __init__(self, rngs):
            self.layer, self.act = make_linear(rngs), lambda x: x

        def __call__(self, x):
            return self.act(self.layer(x))

    model = pf.Ensemble([filled(Sows, seed) for seed in range(3)])
    assert model(X).shape == (3, 5, 8)


def test_flax_classes_and_partials_are_constructors():
    class Net(nnx.Module):
        def __init__(self, width=4, *, rngs):
            self.layer = nnx.Linear(4, width, rngs=rngs)

        def __call__(self, x):
            return self.layer(x)

    for constructor, width in ((Net, 4), (partial(Net, width=2), 2), (partial(nnx.Linear, 4, 6), 6)):
        y = nnx.eval_shape(lambda make=constructor: pf.ensemble(make, 3)(X))
        assert y.shape == (3, 5, width)


def test_ensembles_without_memory():
    abstract = nnx.eval_shape(lambda: pf.ensemble(lambda rngs: nnx.Linear(4, 2, rngs=rngs), 3))
    assert abstract.stacked.kernel.shape == (3, 4, 2)
    assert pt.ensemble(lambda rngs: nn.Linear(4, 2, device="meta"), 3).weight.shape == (3, 2, 4)
    assert pt.ensemble(nn.Linear(4, 2, device="meta"), 3)(torch.ones(5, 4, device="meta")).shape == (3, 5, 2)


def test_a_registered_rule_goes_first_and_serves_subclasses():
    class Scale(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(3))

    class Wide(Scale):
        pass

    @pt.register_reset(Scale)
    def reset_scale(layer, rngs):
        layer.scale.data = pt.random.normal(rngs.params(), layer.scale.shape)

    model = pt.ensemble(nn.Sequential(Wide()), 2)
    assert not torch.equal(*model.get_parameter("0.scale"))


def test_torch_networks_keep_what_they_make_of_their_state():
    class Own(nn.Linear):
        extra, moved = "a", 0

        def get_extra_state(self):
            return self.extra

        def set_extra_state(self, state):
            self.extra = state

        def _apply(self, fn, recurse=True):
            self.moved += 1
            return super()._apply(fn, recurse)

    first, second = (pt.Ensemble([Own(2, 3) for _ in range(3)]) for _ in range(2))
    network = first._network
    network.extra = "b"
    network.register_state_dict_post_hook(lambda module, state, prefix, metadata: state.update({f"{prefix}more": "c"}))
    state = first.state_dict()
    assert (state["_extra_state"], state.pop("more")) == ("b", "c")
    second.load_state_dict(state)
    assert second[1].extra == "b"
    assert second.double()[2].moved == 1
    assert second(torch.ones(4, 2, dtype=torch.float64)).dtype == torch.float64
