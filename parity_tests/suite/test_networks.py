"""batchensemble() on networks of linear layers: what it converts, what it keeps, what it hands out."""

import copy

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
from parity_tests.suite.subject import jitted


class TorchNet(nn.Module):
    """Names that are not in order, a layer used twice, tied weights, a norm, and a nested container."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 6))
        self.block = nn.Linear(6, 6)
        self.again = self.block
        self.norm = nn.LayerNorm(6)
        self.embed = nn.Embedding(5, 6)
        self.a_head = nn.Linear(6, 5)
        self.a_head.weight = self.embed.weight

    def forward(self, x, scale=1.0):
        x = self.again(torch.relu(self.block(self.encoder(x)))) * scale
        return {"logits": self.a_head(self.norm(x)), "hidden": (x,)}


class FlaxNet(nnx.Module):
    """The twin."""

    def __init__(self, rngs):
        self.encoder = nnx.Sequential(nnx.Linear(4, 6, rngs=rngs), nnx.relu, nnx.Linear(6, 6, rngs=rngs))
        self.block = nnx.Linear(6, 6, rngs=rngs)
        self.again = self.block
        self.norm = nnx.LayerNorm(6, epsilon=1e-5, use_fast_variance=False, rngs=rngs)
        self.a_head = nnx.Linear(6, 5, rngs=rngs)

    def __call__(self, x, scale=1.0):
        x = self.again(jax.nn.relu(self.block(self.encoder(x)))) * scale
        return {"logits": self.a_head(self.norm(x)), "hidden": (x,)}


def torch_model(**options):
    return pt.batchensemble(TorchNet(), 3, **options)


def flax_model(**options):
    return pf.batchensemble(FlaxNet(nnx.Rngs(0)), 3, **options)


def test_outputs_are_trees_of_members():
    y = torch_model()(torch.ones(2, 4), scale=2.0)
    assert y["logits"].shape == (3, 2, 5)
    assert y["hidden"][0].shape == (3, 2, 6)
    y = flax_model()(jnp.ones((2, 4), "float32"), scale=2.0)
    assert y["logits"].shape == (3, 2, 5)
    assert y["hidden"][0].shape == (3, 2, 6)


def test_the_same_seed_draws_the_same_fast_weights_whatever_the_order_of_definition():
    ours, theirs = torch_model(rngs=5, exclude=nn.Embedding).network, flax_model(rngs=5).network
    for path in ("a_head", "block", "encoder.0", "encoder.2"):
        layer = ours.get_submodule(path)
        twin = theirs
        for part in path.split("."):
            twin = twin.layers[int(part)] if part.isdigit() else getattr(twin, part)
        for name in ("r", "s"):
            np.testing.assert_array_equal(getattr(layer, name).detach().numpy(), getattr(twin, name)[...])
    layers = [layer for layer in ours.modules() if isinstance(layer, pt.BatchEnsembleLinear)]
    draws = [layer.r for layer in layers if layer.in_features == 6]
    assert not any(torch.equal(a, b) for i, a in enumerate(draws) for b in draws[:i])


def test_reused_layers_stay_one_and_tied_weights_tied():
    network = torch_model().network
    assert network.again is network.block
    assert network.a_head.weight is network.embed.weight
    assert torch_model(use_base_weights=False).network.a_head.weight is not None
    network = torch_model(use_base_weights=False).network
    assert network.a_head.weight is network.embed.weight
    network = flax_model().network
    assert network.again is network.block


def test_the_network_itself_is_left_alone():
    base = TorchNet()
    before, text = copy.deepcopy(base.state_dict()), repr(base)
    model = pt.batchensemble(base, 3)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    assert repr(base) == text
    assert all(torch.equal(before[k], v) for k, v in base.state_dict().items())
    twin = FlaxNet(nnx.Rngs(0))
    state = nnx.to_pure_dict(nnx.state(twin))
    model = pf.batchensemble(twin, 3)
    model.network.block.kernel[...] = jnp.zeros((6, 6), "float32")
    jax.tree.map(np.testing.assert_array_equal, nnx.to_pure_dict(nnx.state(twin)), state)
    assert type(twin.block) is nnx.Linear


def test_the_report_names_every_layer_with_parameters():
    rows = {row.path: row for row in torch_model(exclude=["encoder.*", nn.Embedding]).report.rows}
    assert {path: (row.kind, row.action) for path, row in rows.items()} == {
        "a_head": ("Linear", "converted"),
        "again": ("Linear", "converted"),
        "embed": ("Embedding", "excluded"),
        "encoder.0": ("Linear", "excluded"),
        "encoder.2": ("Linear", "excluded"),
        "norm": ("LayerNorm", "shared"),
    }
    assert (rows["again"].before, rows["again"].after) == (42, 36 + 3 * (6 + 6 + 6))
    rows = {row.path: row.action for row in flax_model(exclude=lambda path, layer: path == "encoder").report.rows}
    assert rows["encoder.layers.0"] == rows["encoder.layers.2"] == "excluded"
    assert rows["a_head"] == "converted"


def test_subclasses_and_reparametrised_layers_are_left_shared_and_reported():
    class Custom(nn.Linear):
        def forward(self, x):
            return super().forward(x) * 2

    base = nn.Sequential(nn.Linear(4, 4), Custom(4, 4), nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)))
    report = pt.batchensemble(base, 2).report
    assert [row.action for row in report.rows][:2] == ["converted", "shared"]
    assert "converted" not in [row.action for row in report.rows][1:]

    class Twin(nnx.Linear):
        pass

    rngs = nnx.Rngs(0)
    report = pf.batchensemble(nnx.Sequential(nnx.Linear(4, 4, rngs=rngs), Twin(4, 4, rngs=rngs)), 2).report
    assert [row.action for row in report.rows] == ["converted", "shared"]


def test_a_single_layer_is_a_network():
    assert pt.batchensemble(nn.Linear(4, 2), 3)(torch.ones(5, 4)).shape == (3, 5, 2)
    assert type(pt.batchensemble(nn.Linear(4, 2), 3)[0]) is nn.Linear
    layer = nnx.Linear(4, 2, rngs=nnx.Rngs(0))
    assert pf.batchensemble(layer, 3)(jnp.ones((5, 4), "float32")).shape == (3, 5, 2)
    assert type(pf.batchensemble(layer, 3)[0]) is nnx.Linear


def test_members_are_plain_networks_with_the_same_outputs():
    x = torch.randn(2, 4, dtype=torch.float64)
    model = torch_model().double()
    y = model(x)["logits"].detach()
    for i, member in enumerate(model):
        assert type(member) is TorchNet
        assert not any(type(m).__module__.startswith("probly") for m in member.modules())
        assert member.again is member.block
        assert_close(member(x)["logits"].detach(), y[i], "float64")
    model, x = flax_model(), jax_of(x.numpy(), "float32")
    y = model(x)["logits"]
    for i, member in enumerate(model):
        assert type(member) is FlaxNet
        assert not any(type(m).__module__.startswith("probly") for _, m in nnx.iter_modules(member))
        assert_close(member(x)["logits"], y[i], "float32")
    assert len(model) == 3


@pytest.mark.parametrize("item", [[0, 2], slice(1, None), [-1]])
def test_pruning_keeps_the_chosen_members(item):
    chosen = np.arange(3)[item]
    x = torch.randn(2, 4)
    model = torch_model()
    pruned = model[item]
    assert len(pruned) == len(chosen)
    assert pruned.network.again is pruned.network.block
    assert_close(pruned(x)["logits"].detach(), model(x)["logits"].detach()[chosen], "float32")
    assert len(model) == 3
    model, x = flax_model(), jax_of(x.numpy())
    assert_close(model[item](x)["logits"], model(x)["logits"][chosen], "float32")


def test_a_batch_for_each_member_equals_the_members_alone():
    x = torch.randn(3, 2, 4)
    model = torch_model()
    y = model(x, in_axes=0)["logits"].detach()
    for i in range(3):
        assert_close(y[i], model(x[i])["logits"][i].detach(), "float32")


def test_training_state_hooks_and_frozen_parameters_survive():
    base = TorchNet().eval()
    base.block.weight.requires_grad_(False)
    calls = []
    base.a_head.register_forward_hook(lambda module, args, output: calls.append(type(module).__name__))
    model = pt.batchensemble(base, 3)
    assert not any(m.training for m in model.network.modules())
    assert not model.network.block.weight.requires_grad
    model(torch.ones(2, 4))
    assert calls == ["BatchEnsembleLinear"]


def test_the_fast_path_of_transformer_layers_does_not_pass_the_new_layers_by():
    base = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0).eval()
    model = pt.batchensemble(base, 3).eval()
    x = torch.randn(2, 5, 8)
    with torch.no_grad():
        y = model(x)
    assert_close(y, model(x.requires_grad_()).detach(), "float32")
    assert not torch.equal(y[0], y[1])


def test_numpy_inputs_are_tiled_as_arrays_are():
    x = np.ones((8, 4), "float32")
    model = flax_model()
    assert_close(model(x)["logits"], model(jax_of(x))["logits"], "float32")
    batches = np.ones((3, 2, 4), "float32")
    assert model(batches, in_axes=0)["logits"].shape == (3, 2, 5)


def test_every_reference_to_a_layer_follows_its_conversion():
    class TorchList(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
            self.order = [self.a, self.b]

        def forward(self, x):
            for layer in self.order:
                x = layer(x)
            return x

    class FlaxList(nnx.Module):
        def __init__(self, rngs):
            self.blocks = nnx.data([nnx.Linear(4, 4, rngs=rngs), {"inner": nnx.Linear(4, 4, rngs=rngs)}])

        def __call__(self, x):
            return self.blocks[1]["inner"](self.blocks[0](x))

    model, x = pt.batchensemble(TorchList(), 3), torch.ones(2, 4)
    assert not (model(x)[0] == model(x)[1]).any()
    assert_close(model[1](x).detach(), model(x)[1].detach(), "float32")
    assert type(model[1].order[0]) is nn.Linear
    twin, x = pf.batchensemble(FlaxList(nnx.Rngs(0)), 3), jnp.ones((2, 4), "float32")
    assert not (twin(x)[0] == twin(x)[1]).any()
    assert_close(twin[1](x), twin(x)[1], "float32")
    assert type(twin[1].blocks[0]) is nnx.Linear


def test_layers_with_the_batch_on_another_axis_are_refused_since_members_would_mix():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=False)
    with pytest.raises(ValueError, match=r"another order in layers.0.self_attn.*batch_first=True"):
        pt.batchensemble(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), 3)

    class TimeMajor(nnx.Module):
        def __init__(self, rngs):
            self.rnn = nnx.RNN(nnx.SimpleCell(4, 4, rngs=rngs), time_major=True, rngs=rngs)

        def __call__(self, x):
            return self.rnn(x)

    with pytest.raises(ValueError, match=r"another order in rnn.*time_major=False"):
        pf.batchensemble(TimeMajor(nnx.Rngs(0)), 3)


class Opaque:
    """A container that no tree knows."""

    def __init__(self, logits):
        self.logits = logits


def torch_lambda(function):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, *args):
            return function(self.layer, *args)

    return pt.batchensemble(Net(), 3)


def flax_lambda(function):
    class Net(nnx.Module):
        def __init__(self):
            self.layer = nnx.Linear(4, 4, rngs=nnx.Rngs(0))

        def __call__(self, *args):
            return function(self.layer, *args)

    return pf.batchensemble(Net(), 3)


@pytest.mark.parametrize("make", [torch_lambda, flax_lambda])
@pytest.mark.parametrize(
    ("function", "inputs", "error", "sentence"),
    [
        (lambda layer, x: layer(x.logits), lambda x: (Opaque(x),), TypeError, "Pass the arrays themselves"),
        (lambda layer, x: Opaque(layer(x)), lambda x: (x,), TypeError, "got Opaque"),
        (lambda layer, x: layer(x).sum(0), lambda x: (x,), ValueError, "the rows of its inputs on their first axis, 6"),
        (lambda layer, x, mask: layer(x), lambda x: (x, x[:1]), ValueError, "one number of rows"),
    ],
)
def test_what_cannot_be_told_apart_by_members_is_refused(make, function, inputs, error, sentence):
    x = torch.ones(2, 4) if make is torch_lambda else jnp.ones((2, 4), "float32")
    with pytest.raises(error) as raised:
        make(function)(*inputs(x))
    assert sentence in str(raised.value)


def test_outputs_that_are_no_arrays_are_passed_on():
    for make, x in ((torch_lambda, torch.ones(2, 4)), (flax_lambda, jnp.ones((2, 4), "float32"))):
        y, nothing, number = make(lambda layer, x: (layer(x), None, 3))(x)
        assert (y.shape, nothing, number) == ((3, 2, 4), None, 3)


def test_layers_with_a_meaning_of_their_own_are_not_converted():
    patched = nn.Linear(4, 4)
    patched.forward = lambda x: x
    assert [row.action for row in pt.batchensemble(nn.Sequential(nn.Linear(4, 4), patched), 2).report.rows] == [
        "converted",
        "shared",
    ]

    class Custom(nn.Linear):
        def forward(self, x):
            return super().forward(x) * 2

    class FlaxCustom(nnx.Linear):
        def __call__(self, x):
            return super().__call__(x) * 2

    with pytest.raises(TypeError, match="a forward of its own"):
        pt.BatchEnsembleLinear(Custom(4, 4), num_members=2)
    rngs = nnx.Rngs(0)
    with pytest.raises(TypeError, match="a __call__ of its own"):
        pf.BatchEnsembleLinear(FlaxCustom(4, 4, rngs=rngs), num_members=2)
    with pytest.raises(TypeError, match="a __call__ of its own"):
        pf.BatchEnsembleLinear(pf.BatchEnsembleLinear(nnx.Linear(4, 4, rngs=rngs), num_members=1), num_members=2)


def test_a_padding_mask_does_not_bring_the_fused_inference_back():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
    model = pt.batchensemble(nn.TransformerEncoder(layer, 2), 3).eval()
    deep = pt.ensemble(nn.TransformerEncoder(layer, 2).eval(), 3, reset_params=False)
    x, mask = torch.randn(2, 5, 8), torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    for ensemble in (model, deep):
        with torch.no_grad():
            y = ensemble(x, src_key_padding_mask=mask)
        assert_close(y, ensemble(x.clone().requires_grad_(), src_key_padding_mask=mask).detach(), "float32")


def test_flax_models_work_under_nnx_transforms():
    model, x = flax_model(), jnp.ones((2, 4), "float32")
    y = model(x)["logits"]
    assert_close(jitted(model, x)["logits"], y, "float32")
    grads = nnx.grad(lambda model: model(x)["logits"].sum())(model)
    assert grads["network"]["again"]["r"].shape == (3, 6)
    graph, state = nnx.split(model)
    assert_close(nnx.merge(graph, state)(x)["logits"], y, "float32")
    assert len(nnx.clone(model).report.rows) == len(model.report.rows)


def test_torch_models_are_copied_and_exported():
    model, x = torch_model().eval(), torch.ones(2, 4)
    y = model(x)["logits"]
    assert torch.equal(copy.deepcopy(model)(x)["logits"], y)
    any_batch = {"args": ({0: torch.export.Dim.DYNAMIC},)}
    exported = torch.export.export(model, (x,), dynamic_shapes=any_batch).module()
    assert torch.equal(exported(x)["logits"], y)
    assert exported(torch.ones(7, 4))["logits"].shape == (3, 7, 5)


def test_folded_into_an_ensemble_the_members_are_the_same():
    x = torch.randn(2, 4)
    model = torch_model()
    deep = model.fold()
    assert isinstance(deep, pt.Ensemble)
    assert_close(deep(x)["logits"].detach(), model(x)["logits"].detach(), "float32")
    twin = flax_model()
    with jax.numpy_rank_promotion("allow"):
        ours, theirs = twin.fold()(jax_of(x.numpy())), twin(jax_of(x.numpy()))
    assert isinstance(twin.fold(), pf.Ensemble)
    assert_close(ours["logits"], theirs["logits"], "float32")


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
    ours = pt.batchensemble(nn.Sequential(TorchScale(4), nn.Linear(4, 3)), 3, rngs=2)
    theirs = pf.batchensemble(nnx.Sequential(FlaxScale(4), nnx.Linear(4, 3, rngs=nnx.Rngs(0))), 3, rngs=2)
    for model, x in ((ours, torch.randn(2, 4)), (theirs, jnp.ones((2, 4), "float32"))):
        assert model.report.rows[0].action == "converted"
        y = model(x)
        for i, member in enumerate(model):
            assert_close(np.asarray(y[i].tolist()), np.asarray(member(x).tolist()), "float32")
        assert_close(np.asarray(model[[2, 0]](x)[1].tolist()), np.asarray(y[0].tolist()), "float32")
    np.testing.assert_array_equal(ours.network[0].scale.detach().numpy(), theirs.network.layers[0].scale[...])
    np.testing.assert_array_equal(ours.network[1].r.detach().numpy(), theirs.network.layers[1].r[...])
    assert type(ours[0][0]) is TorchScale
    assert type(theirs[0].layers[0]) is FlaxScale


def test_a_subclass_is_left_shared_unless_registered():
    class TorchOwn(nn.Linear):
        pass

    class FlaxOwn(nnx.Linear):
        pass

    rngs = nnx.Rngs(0)
    pairs = (
        (pt, TorchOwn, nn.Sequential(TorchOwn(4, 3), nn.Linear(3, 2))),
        (pf, FlaxOwn, nnx.Sequential(FlaxOwn(4, 3, rngs=rngs), nnx.Linear(3, 2, rngs=rngs))),
    )
    for package, own, network in pairs:
        assert [row.action for row in package.batchensemble(network, 3).report.rows] == ["shared", "converted"]
        package.register_batchensemble(own)(package.BatchEnsembleLinear)
        assert [row.action for row in package.batchensemble(network, 3).report.rows] == ["converted", "converted"]


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
