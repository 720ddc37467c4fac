"""batchensemble() on the networks that people have: what it converts, what it keeps, what it hands out."""

import copy
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from torch import nn

import probly_flax as pf
import probly_torch as pt
from parity_tests.kit.trees import jax_of, leaves
from parity_tests.standard import MEANING_LIMIT, NOISE_FLOOR, assert_close, error
from parity_tests.suite.networks.twins import BOTH, FLAX, NETWORKS, TORCH, TorchTied
from parity_tests.suite.subjects.subject import jitted, randomized, without_draws

ONES = np.ones((2, 4), "float32")


def tied_model(f, **options):
    return f.package.batchensemble(f.tied(), 3, **options)


def pair(name, **options):
    """Converts a network in both frameworks, with equal weights."""
    network = NETWORKS[name]
    ours = pt.batchensemble(network.torch(), 3, **options)
    theirs = without_draws(lambda: pf.batchensemble(network.flax(nnx.Rngs(0)), 3, **options))
    pf.load_arrays(theirs, pt.to_arrays(ours))
    return ours, theirs


def actions(model):
    return [row.action for row in model.report.rows]


def assert_equal(ours, theirs, dtype="float32"):
    """Asserts that all arrays of both trees are close."""
    for (_, a), (_, b) in zip(leaves(ours), leaves(theirs), strict=True):
        assert_close(np.asarray(a), np.asarray(b), dtype)


def member_of(y, i):
    return [np.asarray(leaf)[i] for _, leaf in leaves(y)]


# Networks and their members


@pytest.mark.parametrize("per_member_norms", [False, True])
@pytest.mark.parametrize("name", NETWORKS)
def test_twins_have_equal_draws_outputs_and_members(name, per_member_norms):
    network = NETWORKS[name]
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        ours, theirs = pair(name, per_member_norms=per_member_norms, rngs=4)
        base = without_draws(lambda: network.flax(nnx.Rngs(1)))
        again = pf.batchensemble(base, 3, per_member_norms=per_member_norms, rngs=4)
        drawn = {k: v for k, v in pf.to_arrays(again).items() if k.rpartition(".")[2].split("_")[-1] in ("r", "s")}
        assert len(drawn) >= 8
        for path, array in drawn.items():  # whatever the framework, the same seed
            np.testing.assert_array_equal(pt.to_arrays(ours)[path], array, err_msg=path)
        if name == "ResNet":
            ours(network.x), jitted(theirs, network.z)  # statistics move
            pf.load_arrays(theirs, pt.to_arrays(ours))  # torch's running variance is the unbiased one
        ours.eval(), theirs.eval()
        y, other = TORCH.numpy(ours(network.x)), FLAX.numpy(jitted(theirs, network.z))
        for (_, a), (_, b) in zip(leaves(y), leaves(other), strict=True):
            assert a.shape[:2] == (3, len(network.batch))
            assert error(a, b, a, "float32") <= MEANING_LIMIT * NOISE_FLOOR
        for i, twin in enumerate(theirs):
            assert type(twin) is network.flax
            assert not any("probly" in type(layer).__module__ for _, layer in nnx.iter_modules(twin))
            assert_equal(jitted(twin, network.z), member_of(other, i))
        folded = theirs.fold()
        assert isinstance(folded, pf.Ensemble)
        assert_equal(jitted(folded, network.z), other)
        assert_equal(jitted(theirs[[2, 0]], network.z), member_of(other, np.array([2, 0])))
    ours, x = ours.double(), network.x.double() if network.x.is_floating_point() else network.x
    y = TORCH.numpy(ours(x))
    for i, member in enumerate(ours):
        assert type(member) is network.torch
        assert not any("probly" in type(layer).__module__ for layer in member.modules())
        assert_equal(TORCH.numpy(member(x)), member_of(y, i), "float64")
    folded = ours.fold()
    assert isinstance(folded, pt.Ensemble)
    assert_equal(TORCH.numpy(folded(x)), y, "float64")
    assert_equal(TORCH.numpy(ours[[2, 0]](x)), member_of(y, [2, 0]), "float64")


def test_the_same_seed_draws_the_same_fast_weights_whatever_the_order_of_definition():
    ours, theirs = (f.package.to_arrays(tied_model(f, rngs=5)) for f in (TORCH, FLAX))
    drawn = [name for name in ours if name.endswith((".r", ".s"))]
    assert len(drawn) == 12  # five layers, and one of them under two names
    for name in drawn:
        np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)
    draws = [ours[f"network.{path}.r"] for path in ("block", "encoder.2", "a_head")]
    assert not any(np.array_equal(a, b) for i, a in enumerate(draws) for b in draws[:i])


@BOTH
def test_reused_layers_stay_one_and_tied_weights_tied(f):
    for options in ({}, {"use_base_weights": False}):
        network = tied_model(f, **options).network
        assert network.again is network.block
        assert f is FLAX or network.a_head.weight is network.embed.weight
    member = tied_model(f)[0]
    assert member.again is member.block


@BOTH
@pytest.mark.parametrize("item", [[0, 2], slice(1, None), [-1]])
def test_pruning_keeps_the_chosen_members(f, item):
    model, x, chosen = tied_model(f), f.array(NETWORKS["Tied"].batch), np.arange(3)[item]
    pruned = model[item]
    assert len(pruned) == len(chosen)
    assert pruned.network.again is pruned.network.block
    assert_equal(f.numpy(pruned(x)), member_of(f.numpy(model(x)), chosen))
    assert len(model) == 3


@BOTH
def test_inputs_and_outputs_are_trees_of_members(f):
    model, x = tied_model(f), NETWORKS["Tied"].batch
    y = f.numpy(model(f.array(x), scale=2.0))
    assert {name: leaf.shape for name, leaf in leaves(y)} == {"['hidden'][0]": (3, 2, 6), "['logits']": (3, 2, 5)}
    each = np.stack([x, 2 * x, -x])
    y = f.numpy(model(f.array(each), in_axes=0))
    for i in range(3):
        assert_equal(member_of(y, i), member_of(f.numpy(model(f.array(each[i]))), i))
    if f is FLAX:  # which takes arrays of NumPy too
        assert_equal(model(x), model(f.array(x)))
        assert_equal(model(each, in_axes=0), y)


@BOTH
def test_the_network_itself_is_left_alone(f):
    base = f.tied()
    before, text = f.package.to_arrays(base), repr(base)
    model = f.package.batchensemble(base, 3)
    f.package.load_arrays(model, {name: 0 * array for name, array in f.package.to_arrays(model).items()})
    assert repr(base) == text
    assert type(base.block) is type(f.linear(6, 6))
    for name, array in f.package.to_arrays(base).items():
        np.testing.assert_array_equal(array, before[name], err_msg=name)


@BOTH
def test_a_single_layer_is_a_network(f):
    model = f.package.batchensemble(f.linear(4, 2), 3)
    assert model(f.array(ONES)).shape == (3, 2, 2)
    assert type(model[0]) is type(f.linear(4, 2))


def test_recurrent_networks():
    class Last(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn, self.head = nn.LSTM(4, 5, num_layers=2, batch_first=True, bidirectional=True), nn.Linear(10, 3)

        def forward(self, x):
            return self.head(self.rnn(x)[0][:, -1])

    model, x = pt.batchensemble(Last(), 3), torch.randn(6, 7, 4)
    y = model(x)
    for i, member in enumerate(model):
        assert type(member.rnn) is nn.LSTM
        assert_close(y[i].detach(), member(x).detach(), "float32")
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        z = jax_of(x.numpy())
        for cell in (nnx.LSTMCell, nnx.OptimizedLSTMCell, nnx.GRUCell):

            def convert(cell=cell):
                return pf.batchensemble(nnx.RNN(cell(4, 5, rngs=nnx.Rngs(0)), rngs=nnx.Rngs(0)), 3)

            twin = randomized(without_draws(convert))
            y = np.asarray(jitted(twin, z))
            for i, member in enumerate(twin):
                assert type(member) is nnx.RNN
                assert type(member.cell) is cell
                assert_close(y[i], np.asarray(jitted(member, z)), "float32")


def test_statistics_of_per_member_norms_are_each_members_own():
    model, x = pair("ResNet", per_member_norms=True)[0], NETWORKS["ResNet"].x
    alone = list(model)
    for _ in range(2):
        y = model(x)
        for i, member in enumerate(alone):
            assert_close(y[i].detach(), member.train()(x).detach(), "float32")
    for i, member in enumerate(model):
        for (name, ours), (_, theirs) in zip(member.named_buffers(), alone[i].named_buffers(), strict=True):
            assert_close(ours.double(), theirs.double(), "float32"), name


# What is converted


@pytest.mark.parametrize("per_member_norms", [False, True])
def test_every_layer_is_in_the_report(per_member_norms):
    expected = {"stem", "head", "block.conv1", "block.conv2", "block.shortcut"}
    norms = {"block.norm1", "block.norm2"}
    for model in pair("ResNet", per_member_norms=per_member_norms):
        rows = {row.path: row.action for row in model.report.rows}
        assert {path for path, action in rows.items() if action == "converted"} == expected | (
            norms if per_member_norms else set()
        )
        assert rows.keys() == expected | norms


def test_parts_of_a_converted_layer_are_not_converted_again():
    ours, theirs = pair("Transformer")
    for model in (ours, theirs):
        assert [row.path for row in model.report.rows] == ["attention", "down", "embed", "norm1", "norm2", "up"]
    assert type(ours.network.attention.out_proj) is pt.BatchEnsembleLinear
    assert isinstance(theirs.network.attention, nnx.MultiHeadAttention)


def test_the_report_names_kinds_counts_and_what_is_excluded():
    rows = {row.path: row for row in tied_model(TORCH, exclude=["encoder.*", nn.Embedding]).report.rows}
    assert {path: (row.kind, row.action) for path, row in rows.items()} == {
        "a_head": ("Linear", "converted"),
        "again": ("Linear", "converted"),
        "embed": ("Embedding", "excluded"),
        "encoder.0": ("Linear", "excluded"),
        "encoder.2": ("Linear", "excluded"),
        "norm": ("LayerNorm", "shared"),
    }
    assert (rows["again"].before, rows["again"].after) == (42, 36 + 3 * (6 + 6 + 6))
    model = tied_model(FLAX, exclude=lambda path, layer: path == "encoder")
    rows = {row.path: row.action for row in model.report.rows}
    assert rows["encoder.layers.0"] == rows["encoder.layers.2"] == "excluded"
    assert rows["a_head"] == "converted"


class TorchOwn(nn.Linear):
    """A layer with a meaning of its own."""

    def forward(self, x):
        return super().forward(x) * 2


class FlaxOwn(nnx.Linear):
    """A layer with a meaning of its own."""

    def __call__(self, x):
        return super().__call__(x) * 2


def test_layers_with_a_meaning_of_their_own_are_left_shared():
    patched = nn.Linear(4, 4)
    patched.forward = lambda x: x
    model = pt.batchensemble(nn.Sequential(nn.Linear(4, 4), TorchOwn(4, 4), patched), 2)
    assert actions(model) == ["converted", "shared", "shared"]
    normed = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
    assert "converted" not in actions(pt.batchensemble(nn.Sequential(nn.Linear(4, 4), normed), 2))[1:]
    own = FlaxOwn(4, 4, rngs=nnx.Rngs(0))
    assert actions(pf.batchensemble(nnx.Sequential(FLAX.linear(4, 4), own), 2)) == ["converted", "shared"]
    with pytest.raises(TypeError, match="a forward of its own"):
        pt.BatchEnsembleLinear(TorchOwn(4, 4), num_members=2)
    for layer in (own, pf.BatchEnsembleLinear(FLAX.linear(4, 4), num_members=1)):
        with pytest.raises(TypeError, match="a __call__ of its own"):
            pf.BatchEnsembleLinear(layer, num_members=2)


def test_a_subclass_is_left_shared_unless_registered():
    class TorchSubclass(nn.Linear):
        pass

    class FlaxSubclass(nnx.Linear):
        pass

    for f, own, options in ((TORCH, TorchSubclass, {}), (FLAX, FlaxSubclass, {"rngs": nnx.Rngs(0)})):
        network = f.sequential(own(4, 3, **options), f.linear(3, 2))
        assert actions(f.package.batchensemble(network, 3)) == ["shared", "converted"]
        f.package.register_batchensemble(own)(f.package.BatchEnsembleLinear)
        assert actions(f.package.batchensemble(network, 3)) == ["converted", "converted"]


class TorchScale(nn.Module):
    """A layer of the user's own."""

    def __init__(self, features):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(features))

    def forward(self, x):
        return x * self.scale


class TorchScales(nn.Module):
    """Its members."""

    def __init__(self, layer, rngs, num_members, use_base_weights, **options):
        super().__init__()
        self.num_members = num_members
        self.scale = nn.Parameter(pt.random.normal(rngs.params(), (num_members, *layer.scale.shape)))

    def forward(self, x):
        return (x.unflatten(0, (self.num_members, -1)) * self.scale[:, None]).flatten(0, 1)

    def member(self, i):
        layer = TorchScale(self.scale.shape[1])
        layer.scale.data = self.scale[i].detach()
        return layer

    def keep_members(self, indices):
        self.num_members = len(indices)
        self.scale = nn.Parameter(self.scale.detach()[list(indices)])


class FlaxScale(nnx.Module):
    """A layer of the user's own."""

    def __init__(self, features):
        self.scale = nnx.Param(jnp.ones(features, "float32"))

    def __call__(self, x):
        return x * self.scale[...][None]


class FlaxScales(nnx.Module):
    """Its members."""

    def __init__(self, layer, rngs, num_members, use_base_weights, **options):
        self.num_members = num_members
        self.scale = nnx.Param(jax.random.normal(rngs.params(), (num_members, *layer.scale.shape), "float32"))

    def __call__(self, x):
        return (x.reshape(self.num_members, -1, x.shape[-1]) * self.scale[:, None]).reshape(x.shape)

    def member(self, i):
        layer = FlaxScale(self.scale.shape[1])
        layer.scale.set_value(self.scale[i])
        return layer

    def keep_members(self, indices):
        self.num_members = len(indices)
        self.scale = nnx.Param(self.scale[jnp.array(indices)])


def test_a_users_layer_is_converted_when_registered_and_draws_alike():
    pt.register_batchensemble(TorchScale)(TorchScales)
    pf.register_batchensemble(FlaxScale)(FlaxScales)
    drawn = []
    for f, own in ((TORCH, TorchScale), (FLAX, FlaxScale)):
        model, x = f.package.batchensemble(f.sequential(own(4), f.linear(4, 3)), 3, rngs=2), f.array(ONES)
        assert model.report.rows[0].action == "converted"
        y = f.numpy(model(x))
        for i, member in enumerate(model):
            assert_close(y[i], f.numpy(member(x)), "float32")
        assert_close(f.numpy(model[[2, 0]](x))[1], y[0], "float32")
        layers = list(model.network if f is TORCH else model.network.layers)
        drawn.append([f.numpy(layers[0].scale[...]), f.numpy(layers[1].r[...])])
        assert type((model[0] if f is TORCH else model[0].layers)[0]) is own
    for ours, theirs in zip(*drawn, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_every_reference_to_a_layer_follows_its_conversion():
    class TorchList(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
            self.order = [self.a, self.b]

        def forward(self, x):
            return self.order[1](self.order[0](x))

    class FlaxList(nnx.Module):
        def __init__(self):
            self.order = nnx.data([FLAX.linear(4, 4), {"inner": FLAX.linear(4, 4)}])

        def __call__(self, x):
            return self.order[1]["inner"](self.order[0](x))

    for f, network in ((TORCH, TorchList()), (FLAX, FlaxList())):
        model, x = f.package.batchensemble(network, 3), f.array(ONES)
        y = f.numpy(model(x))
        assert not (y[0] == y[1]).any()
        assert_close(f.numpy(model[1](x)), y[1], "float32")
        assert type(model[1].order[0]) is type(f.linear(4, 4))


# What is refused


def test_layers_with_the_batch_on_another_axis_are_refused_since_members_would_mix():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=False)
    with pytest.raises(ValueError, match=r"another order in layers.0.self_attn.*batch_first=True"):
        pt.batchensemble(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), 3)

    def time_major():
        return nnx.Dict(rnn=nnx.RNN(nnx.SimpleCell(4, 4, rngs=nnx.Rngs(0)), time_major=True, rngs=nnx.Rngs(0)))

    with pytest.raises(ValueError, match=r"another order in rnn.*time_major=False"):
        pf.batchensemble(without_draws(time_major), 3)


def with_forward(f, function):
    """Converts a network of one linear layer, whose call is a function of it."""

    class TorchNet(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, *args):
            return function(self.layer, *args)

    class FlaxNet(nnx.Module):
        def __init__(self):
            self.layer = FLAX.linear(4, 4)

        def __call__(self, *args):
            return function(self.layer, *args)

    return f.package.batchensemble(TorchNet() if f is TORCH else FlaxNet(), 3)


def opaque(x):
    """Puts an array into a container that no tree knows."""
    return SimpleNamespace(logits=x)


@BOTH
@pytest.mark.parametrize(
    ("function", "inputs", "error", "sentence"),
    [
        (lambda layer, x: layer(x.logits), lambda x: (opaque(x),), TypeError, "Pass the arrays themselves"),
        (lambda layer, x: opaque(layer(x)), lambda x: (x,), TypeError, "got SimpleNamespace"),
        (lambda layer, x: layer(x).sum(0), lambda x: (x,), ValueError, "the rows of its inputs on their first axis, 6"),
        (lambda layer, x, mask: layer(x), lambda x: (x, x[:1]), ValueError, "one number of rows"),
    ],
)
def test_what_cannot_be_told_apart_by_members_is_refused(f, function, inputs, error, sentence):
    with pytest.raises(error) as raised:
        with_forward(f, function)(*inputs(f.array(ONES)))
    assert sentence in str(raised.value)


@BOTH
def test_outputs_that_are_no_arrays_are_passed_on(f):
    y, nothing, number = with_forward(f, lambda layer, x: (layer(x), None, 3))(f.array(ONES))
    assert (y.shape, nothing, number) == ((3, 2, 4), None, 3)


# One framework alone


def test_training_state_hooks_and_frozen_parameters_survive():
    base = TorchTied().eval()
    base.block.weight.requires_grad_(False)
    calls = []
    base.a_head.register_forward_hook(lambda module, args, output: calls.append(type(module).__name__))
    model = pt.batchensemble(base, 3)
    assert not any(m.training for m in model.network.modules())
    assert not model.network.block.weight.requires_grad
    model(torch.ones(2, 4))
    assert calls == ["BatchEnsembleLinear"]


@pytest.mark.parametrize("activation", ["relu", "gelu", nn.functional.silu])
def test_the_fused_inference_of_transformer_layers_does_not_pass_the_new_layers_by(activation):
    """Nor does a padding mask bring it back. Members may use it again."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, activation=activation, batch_first=True)
    base, x = nn.TransformerEncoder(layer, 2).eval(), torch.randn(2, 5, 8)
    model, deep = pt.batchensemble(base, 3), pt.ensemble(base, 3, reset_params=False)
    for mask in (None, torch.tensor([[False] * 5, [False] * 3 + [True] * 2])):
        for ensemble in (model, deep):
            with torch.no_grad():
                y = ensemble(x, src_key_padding_mask=mask)
            with_gradients = ensemble(x.clone().requires_grad_(), src_key_padding_mask=mask)
            assert_close(y, with_gradients.detach(), "float32")
    with torch.no_grad():
        y = model(x)
        assert not torch.equal(y[0], y[1])
        for i, member in enumerate(model):
            assert member.layers[0].activation_relu_or_gelu == base.layers[0].activation_relu_or_gelu
            assert_close(y[i], member(x), "float32")
    assert model.network.layers[0].activation_relu_or_gelu == 0


def test_flax_models_work_under_nnx_transforms():
    model, x = tied_model(FLAX), jax_of(ONES)
    y = model(x)["logits"]
    assert_close(jitted(model, x)["logits"], y, "float32")
    grads = nnx.grad(lambda model: model(x)["logits"].sum())(model)
    assert grads["network"]["again"]["r"].shape == (3, 6)
    graph, state = nnx.split(model)
    assert_close(nnx.merge(graph, state)(x)["logits"], y, "float32")
    assert len(nnx.clone(model).report.rows) == len(model.report.rows)


def test_torch_models_are_copied_and_exported():
    model, x = tied_model(TORCH).eval(), torch.ones(2, 4)
    y = model(x)["logits"]
    assert torch.equal(copy.deepcopy(model)(x)["logits"], y)
    any_batch = {"args": ({0: torch.export.Dim.DYNAMIC},)}
    exported = torch.export.export(model, (x,), dynamic_shapes=any_batch).module()
    assert torch.equal(exported(x)["logits"], y)
    assert exported(torch.ones(7, 4))["logits"].shape == (3, 7, 5)


def test_a_registered_norm_is_called_as_every_registered_layer_is(monkeypatch):
    def scales_of(members):
        return lambda layer, *args, **options: members(layer, args[1])

    rngs = nnx.Rngs(0)
    pairs = (
        (pt, nn.LayerNorm, nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 3))),
        (pf, nnx.LayerNorm, nnx.Sequential(nnx.LayerNorm(4, rngs=rngs), nnx.Linear(4, 3, rngs=rngs))),
    )
    for package, norm, network in pairs:
        converters = package.batchensemble.__globals__["_CONVERTERS"]
        monkeypatch.setitem(converters, norm, None)  # so that what is registered here is taken back
        package.register_batchensemble(norm)(scales_of(package.layers.BatchEnsembleLayerNorm))
        for per_member_norms in (False, True):
            report = package.batchensemble(network, 3, per_member_norms=per_member_norms).report
            assert [row.action for row in report.rows] == ["converted", "converted"]
