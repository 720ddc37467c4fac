"""How members run: as batched products, under vmap, in a loop, in chunks; with masks and statistics of their own."""

import copy
import pickle
import warnings
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import linen, nnx
from torch import nn
from torch.nn import functional
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

import probly_flax as pf
import probly_torch as pt
from parity_tests.kit.trees import jax_of
from parity_tests.standard import assert_close, assert_same_trajectory
from parity_tests.suite.subjects.members import WithForward
from parity_tests.suite.subjects.subject import without_draws
from probly_torch._mlp import _ELEMENTWISE, mlp_layers


def gradients(model, y):
    return torch.autograd.grad(y.pow(3).sum(), list(model.parameters()))


def assert_equal_members(model, x):
    y = model(x)
    assert y.shape[0] == len(model)
    for i, member in enumerate(model):
        assert_close(y[i].detach(), member(x).detach(), "float64")
    return y


# Batched products.

MLP = nn.Sequential(
    nn.Linear(5, 7), nn.Tanh(), nn.Sequential(nn.Linear(7, 6, bias=False), nn.GELU(), nn.Identity()), nn.Linear(6, 3)
).double()


@pytest.mark.parametrize("activation", sorted(_ELEMENTWISE, key=lambda kind: kind.__name__))
def test_an_mlp_needs_no_vmap_for(activation):
    model = pt.ensemble(nn.Sequential(nn.Linear(5, 6), activation(), nn.Linear(6, 3)).double(), 4)
    x = torch.randn(8, 5, dtype=torch.float64)
    assert mlp_layers(model._network, x, None)
    y = assert_equal_members(model, x)
    assert_equal_members(model, 4 * x)
    own = pt.Ensemble([WithForward(*member) for member in model])
    assert not mlp_layers(own._network, x, None)
    for ours, theirs in zip(gradients(model, y), gradients(own, own(x)), strict=True):
        assert_close(ours, theirs, "float64")


@pytest.mark.parametrize("batch", [(), (8,), (2, 3), (2, 3, 2)])
def test_an_mlp_takes_any_rank(batch):
    model, x = pt.ensemble(MLP, 4), torch.randn(4, *batch, 5, dtype=torch.float64)
    assert mlp_layers(model._network, x, 0)
    assert_equal_members(model, x[0])
    y = model(x, in_axes=0)
    assert y.shape == (4, *batch, 3)
    for i, member in enumerate(model):
        assert_close(y[i].detach(), member(x[i]).detach(), "float64")


def test_an_mlp_with_hooks_runs_as_it_does_alone():
    base, x = copy.deepcopy(MLP), torch.randn(8, 5, dtype=torch.float64)
    base[0].register_forward_hook(lambda layer, args, y: y + 1)
    model = pt.ensemble(base, 4)
    assert not mlp_layers(model._network, x, None)
    assert_equal_members(model, x)
    replaced = copy.deepcopy(MLP)
    replaced[1].forward = lambda x: x * 2
    assert_equal_members(pt.ensemble(replaced, 4), x)
    normed = nn.Sequential(parametrizations.weight_norm(nn.Linear(5, 3).double()))
    assert_equal_members(pt.Ensemble([copy.deepcopy(normed) for _ in range(3)]), x)
    outputs = []
    with nn.modules.module.register_module_forward_hook(lambda layer, args, y: outputs.append(y)):
        pt.ensemble(MLP, 4)(x)
    assert len(outputs) == 4 * len([*MLP.modules()]) + 1


def test_an_input_of_another_dtype_or_width_gets_torchs_own_error():
    model = pt.ensemble(MLP, 4)
    with pytest.raises(RuntimeError, match="same dtype, but got Float and Double"):
        model(torch.ones(8, 5))
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        model(torch.ones(8, 4, dtype=torch.float64))
    assert model(torch.ones(0, 5, dtype=torch.float64)).shape == (4, 0, 3)


# A loop where vmap cannot run, or is slower.


class Branches(nn.Module):
    """Looks at a value, which vmap cannot."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(5, 3).double()

    def forward(self, x):
        return self.layer(x) if self.layer.bias.sum() > 0 else -self.layer(x)


def test_members_of_a_network_that_vmap_cannot_run_run_in_turn():
    model, x = pt.ensemble(Branches(), 6), torch.randn(8, 5, dtype=torch.float64)
    assert_equal_members(model, x)
    assert_equal_members(pt.Ensemble(list(model), chunk_size=1), x)
    assert "data-dependent control flow" in model.explain()


def test_a_large_batch_on_a_cpu_runs_in_a_loop():
    class Counts(WithForward):
        def forward(self, x):
            calls.append(x)
            return super().forward(x)

    calls = []
    model = pt.ensemble(Counts(*MLP), 4)
    model(torch.ones(8, 5, dtype=torch.float64))  # runs it once more, to see that vmap can
    for rows, expected in ((8, 1), (4096, 4)):
        calls.clear()
        model(torch.ones(rows, 5, dtype=torch.float64))
        assert len(calls) == expected
        calls.clear()
        model(torch.ones(4, rows, 5, dtype=torch.float64), in_axes=0)
        assert len(calls) == expected


# Chunks.


class Normed(nn.Module):
    """Running statistics, a buffer changed in place, one assigned anew, and outputs that depend on them."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(5, 6, bias=False), nn.BatchNorm1d(6), nn.Linear(6, 3)
        self.register_buffer("in_place", torch.ones(6, dtype=torch.float64))
        self.register_buffer("anew", torch.ones(6, dtype=torch.float64))
        self.double()

    def forward(self, x):
        h = self.norm(self.first(x)).tanh() * self.in_place.clone() * self.anew
        with torch.no_grad():
            self.in_place.mul_(1 + h.abs().mean(0))
            self.anew = self.anew + h.abs().mean(0)
        return self.last(h), h


@pytest.mark.parametrize("chunk_size", [1, 2, 3, 5, 7])
def test_chunks_compute_what_all_members_do_once_each(chunk_size):
    whole = pt.ensemble(Normed(), 5)
    chunked = pt.Ensemble(list(whole), chunk_size=chunk_size)
    for _ in range(2):
        x, z = (torch.ones(4, 5, dtype=torch.float64).cumsum(0).cumsum(1).sin().requires_grad_() for _ in range(2))
        (y, h), (y_chunked, h_chunked) = whole(x), chunked(z)
        assert_close(y_chunked.detach(), y.detach(), "float64")
        expected = torch.autograd.grad(y.pow(3).sum() + h.sum(), [x, *whole.parameters()])
        got = torch.autograd.grad(y_chunked.pow(3).sum() + h_chunked.sum(), [z, *chunked.parameters()])
        for ours, theirs in zip(got, expected, strict=True):
            assert_close(ours, theirs, "float64")
        for ours, theirs in zip(chunked.buffers(), whole.buffers(), strict=True):
            assert_close(ours, theirs, "float64")
    assert chunked.norm.num_batches_tracked.tolist() == [2] * 5
    assert isinstance(chunked.first.weight, nn.Parameter)


def test_chunks_hold_the_activations_of_one_chunk():
    """Counted, in bytes, by what autograd saves for the backward pass and by what it computes again."""
    x = torch.randn(64, 32)
    sizes = {}
    for chunk_size in (None, 2):
        model, alive = pt.ensemble(WithForward(*[nn.Linear(32, 32), nn.Tanh()] * 3), 8, chunk_size=chunk_size), {}
        own = {p.untyped_storage().data_ptr() for p in (*model.parameters(), x)}

        def pack(tensor, alive=alive, own=own):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                alive[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            y = model(x)
        sizes[chunk_size] = sum(alive.values())
        y.sum().backward()
    one_activation = 64 * 32 * 4
    assert sizes[None] >= 8 * 3 * one_activation
    assert sizes[2] <= 2 * one_activation


def flax_stack(layers, chunk_size, num_members=8, **options):
    def base():
        rngs = nnx.Rngs(0)
        stack = [layer for _ in range(layers) for layer in (nnx.Linear(32, 32, rngs=rngs), jnp.tanh)]
        return nnx.Sequential(*stack, nnx.BatchNorm(32, rngs=rngs))

    return pf.ensemble(without_draws(base), num_members, chunk_size=chunk_size, **options)


@pytest.mark.parametrize("jit", [lambda call: call, nnx.jit], ids=["eager", "jit"])
@pytest.mark.parametrize("chunk_size", [1, 2])
def test_flax_chunks_run_once_each(chunk_size, jit):
    whole, chunked = flax_stack(1, None, 5), flax_stack(1, chunk_size, 5)  # the last chunk of 2 has one member
    x = jax.device_put(np.random.default_rng(0).standard_normal((6, 32)).astype(np.float32))
    call = jit(lambda model, x: model(x))
    with jax.numpy_rank_promotion("allow"):
        for _ in range(2):
            assert_close(call(chunked, x), call(whole, x), "float32")
    for ours, theirs in zip(jax.tree.leaves(nnx.state(chunked)), jax.tree.leaves(nnx.state(whole)), strict=True):
        assert_close(np.asarray(ours), np.asarray(theirs), "float32")


def test_flax_chunks_hold_the_activations_of_one_chunk():
    """Counted, in bytes, by the compiler; it also holds the outputs, their gradient and a copy of the weights."""
    memory, x = {}, jnp.ones((256, 32), "float32")
    for chunk_size in (None, 1, 4):
        abstract = nnx.eval_shape(partial(flax_stack, 16, chunk_size, reset_params=False))
        graph, params, rest = nnx.split(abstract, nnx.Param, ...)

        def loss(params, rest, x, graph=graph):
            return (nnx.merge(graph, params, rest, copy=True)(x) ** 3).mean()

        with jax.numpy_rank_promotion("allow"):
            compiled = jax.jit(jax.grad(loss)).lower(params, rest, x).compile()
        memory[chunk_size] = compiled.memory_analysis().temp_size_in_bytes
    outputs, weights = 8 * x.nbytes, sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(params))
    for chunk_size in (1, 4):
        assert memory[chunk_size] <= chunk_size / 8 * memory[None] + 2 * outputs + weights, memory


# Masks of Dropout.


def dropout_net():
    return nn.Sequential(nn.Linear(5, 64), nn.Dropout(0.5), nn.Linear(64, 64), nn.Dropout(0.5))


@pytest.mark.parametrize("options", [{}, {"chunk_size": 2}, {"chunk_size": 1}])
def test_masks_come_from_rngs_another_for_each_call_and_member(options):
    x = torch.ones(3, 5)
    bases = [dropout_net(), dropout_net()]
    before = torch.random.get_rng_state()
    first, again = (pt.ensemble(base, 4, rngs=1, **options) for base in bases)
    calls = [first(x), first(x)]
    later = copy.deepcopy(first)
    pickled = pickle.loads(pickle.dumps(first))
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(1)
    assert all(torch.equal(again(x), y) for y in calls)
    assert not torch.equal(calls[0], calls[1])
    third = first(x)
    assert torch.equal(later(x), third)
    assert torch.equal(pickled(x), third)
    for i in range(3):
        assert not torch.equal(third[i] == 0, third[i + 1] == 0)
    other = pt.ensemble(dropout_net(), 4, rngs=2, **options)
    other.load_state_dict(first.state_dict())
    assert not torch.equal(other(x) == 0, calls[0] == 0)
    assert torch.equal(first.eval()(x), first(x))


def test_masks_of_trained_networks_come_from_torchs_generator():
    model, x = pt.Ensemble([dropout_net() for _ in range(3)]), torch.ones(3, 5)
    torch.manual_seed(0)
    y = model(x)
    torch.manual_seed(0)
    assert torch.equal(model(x), y)
    assert not torch.equal(model(x), y)


def test_a_chunk_is_computed_again_with_the_masks_it_had():
    model = pt.ensemble(nn.Sequential(nn.Linear(5, 64, bias=False), nn.Dropout(0.5)).double(), 4, chunk_size=2)
    x = torch.randn(1, 5, dtype=torch.float64)
    y = model(x)
    gradient = torch.autograd.grad(y.sum(), model.get_parameter("0.weight"))[0]
    kept = (y[:, 0] != 0).double()
    assert_close(gradient, 2 * kept[:, :, None] * x, "float64")


def test_a_checkpoint_around_an_ensemble_cannot_draw_the_same_masks_and_says_so():
    model, x = pt.ensemble(dropout_net(), 3), torch.ones(3, 5)
    y = checkpoint(model, x, use_reentrant=False)
    with pytest.raises(RuntimeError, match=r"Ensemble\(list\(model\)\)"):
        y.sum().backward()
    checkpoint(pt.Ensemble(list(model)), x, use_reentrant=False).sum().backward()


def test_flax_dropout_without_rngs_is_named():
    base = without_draws(lambda: nnx.Sequential(nnx.Linear(4, 8, rngs=nnx.Rngs(0)), nnx.Dropout(0.5)))
    model = pf.ensemble(base, 3, reset_params=False)
    with pytest.raises(ValueError, match=r"got none for layers\.1\. Build the layer"):
        model(jnp.ones((5, 4), "float32"))
    model.eval()
    assert model(jnp.ones((5, 4), "float32")).shape == (3, 5, 8)


class LinenNet(linen.Module):
    """Statistics and masks."""

    @linen.compact
    def __call__(self, x, train=False):
        x = linen.BatchNorm(use_running_average=not train)(linen.Dense(8)(x))
        return linen.Dropout(0.5, deterministic=not train)(x)


def test_linen_modules_train_as_linen_modules_do():
    x = jax_of(np.random.default_rng(0).standard_normal((5, 4)), "float32")
    model = pf.ensemble(LinenNet(), 3, rngs=7, example_input=x)
    with jax.numpy_rank_promotion("allow"):
        members = list(model)
        y = model(x, train=True, rngs=nnx.Rngs(dropout=1), mutable=["batch_stats"])
        keys = nnx.Rngs(dropout=1).split(3)
        for i, member in enumerate(members):
            own = nnx.Rngs(dropout=keys.dropout.key[...][i])
            alone = member(x, train=True, rngs=own, mutable=["batch_stats"])
            assert_close(y[i], alone, "float32")
            statistics = nnx.to_flat_state(nnx.state(model[i], nnx.BatchStat))
            for (path, ours), (_, theirs) in zip(
                statistics, nnx.to_flat_state(nnx.state(member, nnx.BatchStat)), strict=True
            ):
                assert_close(ours[...], theirs[...], "float32"), path
    assert not np.array_equal(y[0], y[1])


# Attention.


@pytest.mark.parametrize("layer", [nn.TransformerEncoderLayer, nn.MultiheadAttention])
def test_attention_in_eval_mode_with_and_without_gradients(layer):
    options = {"dropout": 0.0, "batch_first": True, "dtype": torch.float64}
    base = layer(8, 2, **options) if layer is nn.MultiheadAttention else layer(8, 2, 16, **options)
    base = nn.TransformerEncoder(base, 2) if layer is nn.TransformerEncoderLayer else base
    model, x = pt.ensemble(base, 4).eval(), torch.randn(3, 5, 8, dtype=torch.float64)

    def call(network):
        return network(x, x, x)[0] if layer is nn.MultiheadAttention else network(x)

    members = list(model)
    with torch.no_grad():
        y = call(model)
        for i, member in enumerate(members):
            assert_close(y[i], call(member), "float64")
    expected = [gradients(member, call(member)) for member in members]
    for ours, theirs in zip(gradients(model, call(model)), zip(*expected, strict=True), strict=True):
        assert_close(ours, torch.stack(theirs), "float64")
    assert torch.backends.mha.get_fastpath_enabled()


# Losses of members.


def gaussian_nll(outputs, y):
    return functional.gaussian_nll_loss(outputs["mean"], y, outputs["variance"])


class Regressor(nn.Module):
    """Mean and variance, in a dict."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(4, 8), nn.Linear(8, 2)

    def forward(self, x):
        mean, spread = self.head(self.body(x).tanh()).unbind(-1)
        return {"mean": mean, "variance": functional.softplus(spread) + 0.1}


@pytest.mark.parametrize("in_axes", [None, 0])
@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam])
@pytest.mark.parametrize("task", ["classification", "regression"])
def test_the_sum_of_member_losses_trains_each_member_as_alone(task, optimizer, in_axes):
    x, labels = torch.randn(3, 16, 4, dtype=torch.float64), torch.randint(0, 3, (3, 16))
    y = torch.randn(3, 16, dtype=torch.float64)
    mlp = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    base, loss, targets = (
        (mlp, functional.cross_entropy, labels) if task == "classification" else (Regressor(), gaussian_nll, y)
    )
    model = pt.ensemble(base.double(), 3)
    alone = list(model)
    together, single = optimizer(model.parameters(), lr=0.1), [optimizer(m.parameters(), lr=0.1) for m in alone]
    shared = x[0], targets[0]
    for _ in range(20):
        together.zero_grad()
        outputs = model(shared[0]) if in_axes is None else model(x, in_axes=0)
        own_targets = shared[1] if in_axes is None else targets
        pt.losses.member_losses(loss, outputs, own_targets, in_axes=in_axes).sum().backward()
        together.step()
        for i, (member, step) in enumerate(zip(alone, single, strict=True)):
            step.zero_grad()
            own_x, own_y = shared if in_axes is None else (x[i], targets[i])
            loss(member(own_x), own_y).backward()
            step.step()
    for i, member in enumerate(alone):
        for name, p in member.named_parameters():
            assert_same_trajectory(model.get_parameter(name)[i].detach().numpy(), p.detach().numpy())


def test_the_sum_of_member_losses_is_num_members_times_their_mean():
    logits, labels = torch.randn(3, 16, 4, dtype=torch.float64), torch.randint(0, 4, (16,))
    total = pt.losses.member_losses(functional.cross_entropy, logits, labels).sum()
    assert_close(total, 3 * pt.losses.member_cross_entropy(logits, labels), "float64")


def test_flax_member_losses_train_each_member_as_alone():
    optax = pytest.importorskip("optax")
    x = jax_of(np.random.default_rng(0).standard_normal((16, 4)))
    labels = jax_of(np.random.default_rng(1).integers(0, 3, 16))
    linear = lambda i, o: nnx.Linear(i, o, param_dtype="float64", rngs=nnx.Rngs(0))  # noqa: E731
    model = pf.ensemble(without_draws(lambda: nnx.Sequential(linear(4, 8), jnp.tanh, linear(8, 3))), 3)
    alone = list(model)

    def loss(logits, labels):
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    @nnx.jit
    def train(model, together, alone, single):
        together.update(model, nnx.grad(lambda m: pf.losses.member_losses(loss, m(x), labels).sum())(model))
        for member, optimizer in zip(alone, single, strict=True):
            optimizer.update(member, nnx.grad(lambda m: loss(m(x), labels))(member))

    together = nnx.Optimizer(model, optax.adam(0.1), wrt=nnx.Param)
    single = nnx.List([nnx.Optimizer(member, optax.adam(0.1), wrt=nnx.Param) for member in alone])
    members = nnx.List(alone)
    with jax.numpy_dtype_promotion("standard"):
        for _ in range(20):
            train(model, together, members, single)
    for i, member in enumerate(members):
        for (_, ours), (_, theirs) in zip(
            nnx.to_flat_state(nnx.state(model[i])), nnx.to_flat_state(nnx.state(member)), strict=True
        ):
            assert_same_trajectory(np.asarray(ours[...]), np.asarray(theirs[...]))


# Rules for parameters.


class TorchToken(nn.Parameter):
    """A type to register a rule for."""


class FlaxToken(nnx.Param):
    """A type to register a rule for."""


class TorchNet(nn.Module):
    """A class token before a layer."""

    def __init__(self, token):
        super().__init__()
        self.token, self.layer = token, nn.Linear(3, 2)

    def forward(self, x):
        return self.layer(x + self.token)


class FlaxNet(nnx.Module):
    """A class token before a layer."""

    def __init__(self, token):
        self.token, self.layer = token, nnx.Linear(3, 2, rngs=nnx.Rngs(0))

    def __call__(self, x):
        return self.layer(x + self.token)


def test_a_rule_for_a_parameter_type_gives_twins_the_same_numbers():
    @pt.register_reset(TorchToken)
    def torch_rule(token, rngs):
        return pt.random.normal(rngs.tokens(), token.shape, token.dtype)

    @pf.register_reset(FlaxToken)
    def flax_rule(token, rngs):
        return jax.random.normal(rngs.tokens(), token.shape, token.dtype)

    class Subtype(TorchToken):
        pass

    ours = pt.ensemble(TorchNet(Subtype(torch.ones(3))), 4, rngs=pt.Rngs(0, tokens=5))
    base = without_draws(lambda: FlaxNet(FlaxToken(jnp.ones(3, "float32"))))
    theirs = pf.ensemble(base, 4, rngs=nnx.Rngs(0, tokens=5))
    np.testing.assert_array_equal(ours.token.detach().numpy(), theirs.stacked.token[...])
    assert type(ours[0].token) is type(ours.token) is Subtype
    assert type(theirs[0].token) is FlaxToken
    assert len({tuple(row.tolist()) for row in ours.token}) == 4


def test_a_rule_is_for_a_type_of_layer_or_parameter():
    sentences = []
    flax_base = without_draws(lambda: nnx.Linear(2, 2, rngs=nnx.Rngs(0)))
    for package, base in ((pt, nn.Linear(2, 2)), (pf, flax_base)):
        for wrong in (base, int):
            with pytest.raises(TypeError, match="Decorate the rule with @register_reset") as raised:
                package.register_reset(wrong)
        sentences.append(str(raised.value))
    assert sentences[0].replace("Parameter;", "Param;") == sentences[1]


def test_lazy_layers_are_refused_until_they_know_their_shapes():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lazy = nn.Sequential(nn.LazyLinear(3))
    with pytest.raises(ValueError, match=r"lazy ones, without 0\.weight\. Call the network once first"):
        pt.ensemble(lazy, 3)
    lazy(torch.ones(2, 4))
    assert pt.ensemble(lazy, 3)(torch.ones(2, 4)).shape == (3, 2, 3)
