"""Calls leak nothing: members are what networks side by side are, in Python, in threads, in the backward pass."""

import copy
import pickle
import threading

import jax.numpy as jnp
import optax
import pytest
import torch
from flax import nnx
from torch import nn
from torch.nn.utils import parametrizations, parametrize
from torch.utils.checkpoint import checkpoint

import probly_flax as pf
import probly_torch as pt
from parity_tests.standard import assert_close, error, meaning_limit


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.scale = nn.Linear(3, 3), nn.Parameter(torch.randn(3))
        self.steps, self.cache, self.seen = 0, None, []


class Counts(Net):
    def forward(self, x):
        self.steps += 1
        return self.linear(x) * min(1, self.steps / 10)


class Caches(Net):
    def forward(self, x):
        if self.cache is None:
            self.cache = 2 * self.scale.detach()
        return self.linear(x) * self.cache


class Keeps(Net):
    def forward(self, x):
        self.seen.append(self.linear(x))
        return sum(self.seen)


class AsksForGradients(Net):
    def forward(self, x):
        y = self.linear(x)
        return 2 * y if y.requires_grad else y


class OwnGenerator(Net):
    def forward(self, x):
        return self.linear(x) * torch.rand(3, generator=torch.Generator().manual_seed(1))


class ChangesInputs(Net):
    def forward(self, x):
        return self.linear(x.mul_(2))


class LooksAtValues(Net):
    def forward(self, x):
        return self.linear(x) if self.scale.sum() > 0 else -self.linear(x)


class ClipsWeights(Net):
    def forward(self, x):
        with torch.no_grad():
            self.linear.weight.clamp_(-0.1, 0.1)
        return self.linear(x)


class Checkpoints(Net):
    reentrant = False

    def forward(self, x):
        return checkpoint(lambda z: torch.tanh(self.linear(z) * self.scale), x, use_reentrant=self.reentrant)


class ReentrantCheckpoints(Checkpoints):
    reentrant = True


class Plain(Net):
    def forward(self, x):
        return torch.tanh(self.linear(x)) * self.scale


AT_ONCE = "at once, by torch.vmap"
WAYS = {
    Plain: AT_ONCE,
    Counts: AT_ONCE,
    Caches: "in turn: the network keeps tensors of the call",
    Keeps: "in turn: the network keeps tensors of the call",
    AsksForGradients: "in turn: the network asks for requires_grad",
    OwnGenerator: "in turn: the network draws from a generator of its own",
    ChangesInputs: "in turn: the network changes its inputs in place",
    LooksAtValues: "in turn: vmap: It looks like you're attempting to use a Tensor in some data-dependent",
    ClipsWeights: AT_ONCE,
    Checkpoints: "in turn: a backward pass runs parts of the network again",
    ReentrantCheckpoints: "in turn: In order to use an autograd.Function with functorch transforms",
}


def members_and_model(net, **options):
    torch.manual_seed(0)
    members = [net() for _ in range(4)]
    return members, pt.Ensemble(members, **options)


def alone(members, x):
    return torch.stack([member(x.clone()) for member in members])


@pytest.mark.filterwarnings("ignore:None of the inputs")
@pytest.mark.parametrize("chunk_size", [None, 1, 3])
@pytest.mark.parametrize("net", WAYS, ids=lambda net: net.__name__)
def test_two_calls_and_their_gradients_are_those_of_networks_side_by_side(net, chunk_size):
    """With as many rows as members, so that nothing stacked passes for a row."""
    members, model = members_and_model(net, chunk_size=chunk_size)
    first, second = torch.randn(4, 3), torch.randn(4 if chunk_size or net is Keeps else 2**15, 3)
    for x in (first, second) if net is ReentrantCheckpoints else ():
        x.requires_grad_()
    given = first.clone()
    results = []
    for run in (lambda x: model(x), lambda x: alone(members, x)):
        y, z = run(first), run(second)
        with torch.no_grad():
            run(first)
        (y.pow(2).sum() + z.sum() / len(z)).backward()
        results.append((y, z))
    for ours, theirs in zip(*results, strict=True):
        assert_close(ours.detach(), theirs.detach(), "float32")
    for name, stacked in model.named_parameters():
        own = [member.get_parameter(name) for member in members]
        assert_close(stacked.detach(), torch.stack([p.detach() for p in own]), "float32")
        if own[0].grad is not None:
            assert_close(stacked.grad, torch.stack([p.grad for p in own]), "float32")
    assert torch.equal(first, given)
    if chunk_size is None:
        assert model.explain().startswith(WAYS[net])


def test_what_calls_leave_is_each_members_and_is_copied_and_pickled():
    for net in (Counts, Caches):
        members, model = members_and_model(net)
        for x in (torch.randn(2, 3), torch.randn(2**14, 3), torch.randn(5, 3)):
            with torch.no_grad():
                assert_close(model(x), alone(members, x), "float32")
        x = torch.randn(2, 3)
        for other in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert [member.steps for member in other] == [member.steps for member in members]
            with torch.no_grad():
                assert_close(alone(other, x), alone(copy.deepcopy(members), x), "float32")
        model.eval()
        assert [member.training for member in model] == [False] * 4
        assert [member.steps for member in model] == [member.steps for member in members]


def test_what_users_change_is_seen_by_the_next_call():
    _, model = members_and_model(Plain)
    x = torch.randn(2, 3)
    model(x)
    with torch.no_grad():
        model.scale.zero_()
    assert not model(x).any()
    with torch.no_grad():
        model.scale.fill_(1)
    model.linear.register_forward_hook(lambda layer, args, y: y + torch.inf)
    assert (model(x) == 1).all()
    model.linear = nn.Identity()
    assert_close(model(x).detach(), torch.tanh(x).expand(4, 2, 3), "float32")


def test_threads_may_call_one_model_while_others_save_it():
    members, model = members_and_model(Plain)
    errors = []

    def work(rows):
        for _ in range(20):
            x = torch.randn(rows, 3)
            with torch.no_grad():
                errors.append(error(model(x), expected := alone(members, x), expected, "float32"))
            assert all(value.shape[0] == 4 for value in model.state_dict().values())

    threads = [threading.Thread(target=work, args=(rows,)) for rows in (20, 20, 2**13, 2**13)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(errors) == 80
    assert max(errors) <= meaning_limit()
    assert isinstance(model.scale, nn.Parameter)


def test_hooks_see_one_member_at_a_time():
    _, model = members_and_model(Plain)
    seen = []

    class Recorder:
        def note(self, layer, args, y):
            self.last = y
            seen.append(y.shape)

    recorder, gradients = Recorder(), []
    model.linear.register_forward_hook(recorder.note)
    model.linear.register_full_backward_hook(lambda layer, given, got: gradients.append(got[0].shape))
    model(torch.randn(2, 3)).sum().backward()
    assert seen == gradients == [(2, 3)] * 4
    assert recorder.last.shape == (2, 3)
    assert model.explain() == "in turn: hooks are given the tensors of one member"


def test_a_later_call_that_vmap_cannot_run_changes_no_statistics_twice():
    class Drops(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(3)

        def forward(self, x):
            y = self.norm(x)
            return y if len(x) < 4 else y[y[:, 0] > torch.inf]

    model = pt.Ensemble([Drops() for _ in range(2)])
    model(torch.randn(3, 3))
    with pytest.raises(RuntimeError, match="vmap"):
        model(torch.randn(4, 3))
    assert model.norm.num_batches_tracked.tolist() == [2, 2]
    assert model(torch.randn(5, 3)).shape == (2, 0, 3)
    assert model.norm.num_batches_tracked.tolist() == [3, 3]


@pytest.mark.parametrize("norm", [parametrizations.weight_norm, parametrizations.spectral_norm])
def test_weights_that_are_computed_are_computed_for_each_member(norm):
    members = [norm(nn.Linear(3, 2)) for _ in range(3)]
    model = pt.Ensemble(members)
    for x in (torch.randn(2, 3), torch.randn(2**14, 3)):
        with parametrize.cached():
            y = model(x)
        assert_close(y.detach(), alone(members, x).detach(), "float32")


def test_weights_changed_in_place_by_an_embedding_are_changed_in_every_member():
    members = [nn.Sequential(nn.Embedding(5, 3, max_norm=0.1), nn.Linear(3, 2)) for _ in range(3)]
    model, x = pt.Ensemble(members, chunk_size=1), torch.arange(5)
    assert_close(model(x).detach(), alone(members, x).detach(), "float32")
    weights = torch.stack([member[0].weight.detach() for member in members])
    assert_close(model.get_parameter("0.weight").detach(), weights, "float32")


def test_outputs_that_are_no_tensors():
    class Kept:
        pass

    class Returns(Net):
        def forward(self, x):
            kept = Kept()
            kept.y = self.linear(x)
            return {"logits": kept.y, "cache": kept, "width": 3}

    _, model = members_and_model(Returns)
    y = model(torch.randn(2, 3))
    assert [each.y.tolist() for each in y["cache"]] == y["logits"].tolist()
    assert y["width"] == 3
    assert model.explain() == "in turn: the network returns a Kept"


class FlaxTable(nnx.Module):
    """Plain arrays, alone and in a list, one of which a call changes; a number that a call changes."""

    def __init__(self, rngs):
        self.linear = nnx.Linear(3, 2, rngs=rngs)
        self.table, self.tables, self.calls = (
            jnp.arange(3, dtype="float32")[None],
            nnx.List([jnp.ones((1, 2), "float32")]),
            0,
        )

    def __call__(self, x):
        self.calls += 1
        y = self.linear(x + self.table) * self.tables[0] * self.calls
        self.table = self.table + y.mean()
        return y


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("chunk_size", [None, 2])
def test_flax_members_keep_plain_arrays_and_numbers_that_calls_change(chunk_size, jit):
    members = [FlaxTable(nnx.Rngs(i)) for i in range(3)]
    model, x = pf.Ensemble(members, chunk_size=chunk_size), jnp.ones((4, 3), "float32")
    call = nnx.jit(lambda model, x: model(x)) if jit else lambda model, x: model(x)
    for _ in range(3):
        y = call(model, x)
        for own, member in zip(y, members, strict=True):
            assert_close(own, member(x), "float32")
    assert [member.calls for member in model] == [3, 3, 3]
    assert_close(model[1].table, members[1].table, "float32")
    assert model.explain() == ("at once, by jax.vmap" if chunk_size is None else "2 at a time, by jax.vmap")


@pytest.mark.usefixtures("four_devices")
@pytest.mark.parametrize("way", ["list", "network", "constructor"])
def test_the_members_of_sharded_flax_networks_are_on_no_axis_of_devices(way):
    def network(rngs):
        init = nnx.with_partitioning(nnx.initializers.lecun_normal(), (None, "model"))
        return nnx.Linear(3, 8, kernel_init=init, param_dtype=jnp.float32, rngs=rngs)

    def spec(layer):
        return tuple(layer.kernel.get_metadata("out_sharding"))

    model = {
        "list": lambda: pf.Ensemble([network(nnx.Rngs(i)) for i in range(3)]),
        "network": lambda: pf.ensemble(network(nnx.Rngs(0)), 3),
        "constructor": lambda: pf.ensemble(network, 3),
    }[way]()
    assert spec(model.stacked) == spec(model[[0, 2]].stacked) == (None, None, "model")
    assert spec(model[1]) == (None, "model")
    nnx.Optimizer(model, optax.adam(1e-3), wrt=nnx.Param)
    x = jnp.ones((4, 3), "float32")
    assert_close(model(x)[1], model[1](x), "float32")


def test_exported_programs_take_other_batch_sizes():
    model = pt.ensemble(nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2)), 3).eval()
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(model, (torch.randn(4, 3),), dynamic_shapes=(({0: batch},),))
    x = torch.randn(7, 3)
    assert_close(program.module()(x).detach(), model(x).detach(), "float32")
