"""Members of ensemble(net, E) start as the network does; a warning and a report say what is otherwise."""

import copy
import pickle
import warnings
from functools import partial

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
from parity_tests.suite.subjects.subject import without_draws
from probly_common.starts import starts_otherwise


@pytest.fixture(autouse=True)
def _every_warning_fails():
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        yield


def rules(model):
    return {row.path: row.action for row in model.report.rows}


class ConvNet(nn.Module):
    """Draws its weights in its constructor, as the networks of torchvision do."""

    def __init__(self, width=64):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, width, 7, bias=False), nn.BatchNorm2d(width)
        nn.init.kaiming_normal_(self.conv.weight, mode="fan_out")

    def forward(self, x):
        return self.norm(self.conv(x))


@pytest.mark.parametrize("constructor", [ConvNet, lambda: ConvNet(), partial(ConvNet, width=64)])
def test_a_constructor_without_rngs_starts_members_from_seeds_of_their_own(constructor):
    expected = torch.rand(3)
    torch.manual_seed(0)
    model = pt.ensemble(constructor, 3)
    assert torch.equal(torch.rand(3), expected), "torch's generator is not where it was"
    spread = (2 / (64 * 7 * 7)) ** 0.5
    assert all(abs(member.conv.weight.std().item() / spread - 1) < 0.05 for member in model)
    assert len({member.conv.weight.sum().item() for member in model}) == 3
    assert torch.equal(pt.ensemble(constructor, 3).conv.weight, model.conv.weight)
    assert set(rules(model).values()) == {"constructor"}


def test_a_constructor_with_one_required_argument_is_given_rngs_whatever_its_name():
    def make(source, width=3):
        layer = nn.Linear(2, width)
        layer.weight.data = pt.random.normal(source.params(), (width, 2))
        return layer

    assert pt.ensemble(make, 3).weight.shape == (3, 3, 2)
    assert pt.ensemble(partial(make, width=5), 3).weight.shape == (3, 5, 2)
    assert pt.ensemble(partial(nn.Linear, 2, out_features=3), 2).weight.shape == (2, 3, 2)


class Transformer(nn.Module):
    """Draws its weights as those of transformers do: module by module, but not twice."""

    def __init__(self):
        super().__init__()
        self.embed, self.norm, self.head = nn.Embedding(50, 32, padding_idx=0), nn.LayerNorm(32), nn.Linear(32, 20)
        self.token = nn.Parameter(torch.zeros(1, 1, 32))
        self.scale = nn.Parameter(torch.full((32,), 1e-6))
        self.apply(self._initialize_weights)

    def init_weights(self):
        self.apply(self._initialize_weights)

    def _initialize_weights(self, module):
        if not getattr(module, "_is_hf_initialized", False):
            self._init_weights(module)
            module._is_hf_initialized = True

    def _init_weights(self, module):
        if isinstance(module, (nn.Linear, nn.Embedding)):
            module.weight.data.normal_(0, 0.02)
            if isinstance(module, nn.Linear):
                module.bias.data.zero_()
        elif module is self:
            nn.init.normal_(self.token, std=0.02)


class ImageModel(nn.Module):
    """Has an init_weights that does nothing, beside the method that its constructor applies."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(8, 64), nn.GELU(), nn.Linear(64, 64))
        self.apply(self._init_weights)

    def init_weights(self, pretrained=None):
        pass

    @staticmethod
    def _init_weights(module):
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
            nn.init.ones_(module.bias)


class Decoder(nn.Module):
    """Holds a Transformer, and starts it by its own methods, as wrappers of transformers do."""

    def __init__(self):
        super().__init__()
        self.model = nn.ModuleList([Transformer()])

    def init_weights(self):
        self.model[0].init_weights()

    def _init_weights(self, module):
        raise AssertionError("given modules of another network")


@pytest.mark.parametrize("holder", [lambda network: network, nn.Sequential], ids=["alone", "inside"])
def test_a_networks_own_initialiser_starts_its_members(holder):
    model = pt.ensemble(holder(Transformer()), 3)
    by_rule = {}
    for name, rule in rules(model).items():
        by_rule.setdefault(rule, set()).add(name.rpartition("0.")[2])
    assert by_rule == {
        "init_weights": {"embed.weight", "head.weight", "head.bias", "token"},
        "reset_parameters": {"norm.weight", "norm.bias"},
        "constant kept": {"scale"},
    }
    for name, parameter in model.named_parameters():
        if rules(model)[name] == "init_weights" and "bias" not in name:
            assert all(abs(row.std().item() / 0.02 - 1) < 0.6 for row in parameter)
            assert not torch.equal(parameter[0], parameter[1])
    assert rules(pt.ensemble(Decoder(), 3))["model.0.token"] == "init_weights"
    model = pt.ensemble(ImageModel(), 3)
    assert set(rules(model).values()) == {"_init_weights"}
    assert (model.get_parameter("body.2.bias") == 1).all()
    assert all(abs(member.body[2].weight.std().item() / 0.02 - 1) < 0.1 for member in model)


def test_registered_rules_go_before_a_networks_own_initialiser():
    class Token(nn.Parameter):
        pass

    class Head(nn.Linear):
        pass

    @pt.register_reset(Token)
    def reset_token(token, rngs):
        return 5 + pt.random.normal(rngs.params(), token.shape)

    @pt.register_reset(Head)
    def reset_head(head, rngs):
        head.weight.data = 7 + pt.random.normal(rngs.params(), head.weight.shape)

    base = Transformer()
    base.token, base.head = Token(base.token.data), Head(32, 20)
    nn.init.zeros_(base.head.bias)
    model = pt.ensemble(base, 2)
    assert abs(model.token.mean().item() - 5) < 1
    assert abs(model.get_parameter("head.weight").mean().item() - 7) < 1
    named = rules(model)
    assert [named[name] for name in ("token", "head.weight", "head.bias")] == [
        "register_reset",
        "register_reset",
        "init_weights",
    ]


class TorchRaw(nn.Module):
    def __init__(self, values):
        super().__init__()
        for name, value in values.items():
            self.register_parameter(name, nn.Parameter(torch.tensor(value), requires_grad=value.dtype.kind in "fc"))


class FlaxRaw(nnx.Module):
    def __init__(self, values):
        for name, value in values.items():
            setattr(self, name, nnx.Param(jnp.asarray(value)))


def raw_values():
    draw = np.random.default_rng(0).standard_normal
    return {
        "token": (0.02 * draw((1, 1, 2000)) + 3).astype("float32"),
        "table": 0.5 * draw((40, 30)),
        "wave": draw((40, 30)) + 1 + 2j * draw((40, 30)),
        "scale": np.full(4, 1e-6, "float32"),
        "norm": np.ones(4, "float32"),
        "temperature": np.float32(2.659) * np.ones((), "float32"),
        "index": np.arange(4),
        "empty": np.zeros((0, 3), "float32"),
    }


def test_raw_parameters_are_drawn_of_their_mean_and_spread_and_constants_are_kept():
    values = raw_values()
    ours = pt.ensemble(TorchRaw(values), 3, rngs=4)
    theirs = pf.ensemble(FlaxRaw(values), 3, rngs=4)
    for name, value in values.items():
        a, b = getattr(ours, name).detach().numpy(), np.asarray(getattr(theirs.stacked, name))
        assert a.dtype == b.dtype == value.dtype
        if name in ("token", "table", "wave"):
            assert rules(ours)[name] == rules(theirs)[name] == "mean and spread"
            for part in (np.real, np.imag) if value.dtype.kind == "c" else (np.real,):
                assert_close(part(a), part(b), "float32")
                for row in part(a):
                    noise = part(value).std() / value.size**0.5
                    assert abs(row.mean() - part(value).mean()) < 5 * noise
                    assert abs(row.std() - part(value).std()) < 5 * noise
            assert not (a[0] == a[1]).any()
        else:
            assert (a == value).all()
            assert (b == value).all()


def test_frozen_raw_parameters_are_kept():
    table = torch.arange(12.0).sin()
    base = nn.ParameterDict({"table": nn.Parameter(table, requires_grad=False), "token": nn.Parameter(table)})
    model = pt.ensemble(base, 2)
    assert rules(model) == {"table": "frozen, kept", "token": "mean and spread"}
    assert (model.get_parameter("table") == table).all()


def test_raw_parameters_of_half_precision_and_under_a_trace():
    values = torch.linspace(-1, 1, 1000).bfloat16()
    model = pt.ensemble(nn.ParameterList([nn.Parameter(values)]), 2)
    assert model.get_parameter("0").dtype == torch.bfloat16
    assert len(model.get_parameter("0")[0].unique()) > 300, "drawn with the few random bits of half precision"
    raw = {name: value for name, value in raw_values().items() if name in ("token", "scale")}
    stacked = nnx.jit(lambda token, scale: pf.ensemble(FlaxRaw({"token": token, "scale": scale}), 2))(**raw).stacked
    assert (np.asarray(stacked.scale) == raw["scale"]).all()
    assert abs(np.asarray(stacked.token).std() / 0.02 - 1) < 0.1
    assert nnx.eval_shape(lambda: pf.ensemble(FlaxRaw(raw), 3)).stacked.token.shape == (3, 1, 1, 2000)


def zero_heads():
    def flax_network(rngs):
        head = nnx.Linear(16, 3, kernel_init=nnx.initializers.zeros, rngs=rngs)
        return nnx.Sequential(nnx.Linear(4, 16, rngs=rngs), nnx.relu, head)

    ours = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 3))
    nn.init.zeros_(ours[2].weight)
    return (pt, ours, "2.weight"), (pf, flax_network(nnx.Rngs(0)), "layers.2.kernel")


def test_weights_that_start_otherwise_are_told_once_with_both_next_steps():
    for package, network, name in zero_heads():
        with pytest.warns(UserWarning, match="ensemble expects") as caught:
            package.ensemble(network, 3)
        assert len(caught) == 1
        assert caught[0].filename == __file__
        text = str(caught[0].message)
        assert f"got other spreads in 1 of 4 parameters: {name}. To keep" in text
        assert "ensemble(network, 3, reset_params=False)" in text
        assert "ensemble(Network, 3), or ensemble(lambda rngs: Network(...), 3)." in text
        model = package.ensemble(network, 3, reset_params=False)
        assert set(rules(model).values()) == {"kept"}
        kept = model.get_parameter(name) if package is pt else model.stacked.layers[2].kernel
        assert not np.asarray(kept.detach() if package is pt else kept).any()


def test_many_weights_that_start_otherwise_are_counted():
    network = ConvNet()
    with torch.no_grad():
        network.norm.weight.zero_()
        network.norm.bias.fill_(0.1)
    with pytest.warns(UserWarning, match=r"in 3 of 3 parameters: conv\.weight, norm\.weight, norm\.bias\. To keep"):
        pt.ensemble(network, 3)
    with pytest.warns(UserWarning, match=r"in 6 of 6 parameters: 0\.conv.* 0\.norm\.bias and 3 more\. To keep"):
        pt.ensemble(nn.Sequential(network, copy.deepcopy(network)), 3)


SIZES = [(1, 1), (1, 3), (2, 1), (3, 2), (5, 4), (17, 9), (64, 33)]
TORCH_LAYERS = {
    "linear": nn.Linear,
    "half": partial(nn.Linear, dtype=torch.bfloat16),
    "bilinear": lambda a, b: nn.Bilinear(a, 2, b),
    "convolutions": lambda a, b: nn.ModuleList([nn.Conv1d(a, b, 3), nn.Conv2d(a, b, 3), nn.ConvTranspose2d(a, b, 2)]),
    "embeddings": lambda a, b: nn.ModuleList([nn.Embedding(a, b, padding_idx=0), nn.EmbeddingBag(a, b)]),
    "recurrent": lambda a, b: nn.ModuleList([nn.LSTM(a, 2 * b, proj_size=b), nn.GRU(a, b, 2, bidirectional=True)]),
    "cells": lambda a, b: nn.ModuleList([nn.LSTMCell(a, b), nn.GRUCell(a, b), nn.RNNCell(a, b)]),
    "attention": lambda a, b: nn.MultiheadAttention(b, 1, kdim=a, vdim=a, add_bias_kv=True),
    "transformer": lambda a, b: nn.TransformerDecoderLayer(2 * a, 2, b),
    "norms": lambda a, b: nn.ModuleList([nn.BatchNorm1d(a), nn.LayerNorm(b), nn.GroupNorm(1, a), nn.RMSNorm(b)]),
    "others": lambda a, b: nn.ModuleList([nn.PReLU(a), nn.InstanceNorm2d(b, affine=True)]),
    "weight norm": lambda a, b: nn.utils.parametrizations.weight_norm(nn.Linear(a, b)),
    "spectral norm": lambda a, b: nn.utils.parametrizations.spectral_norm(nn.Linear(a, b)),
}


@pytest.mark.parametrize("name", TORCH_LAYERS)
def test_new_layers_of_torch_never_warn(name):
    for seed in range(20):
        torch.manual_seed(seed)
        for sizes in SIZES:
            pt.ensemble(TORCH_LAYERS[name](*sizes), 1, rngs=seed)


FLAX_LAYERS = {
    "linear": lambda rngs: nnx.Linear(4, 8, rngs=rngs),
    "half": lambda rngs: nnx.Linear(4, 8, param_dtype=jnp.bfloat16, rngs=rngs),
    "general": lambda rngs: nnx.LinearGeneral((2, 2), (4, 2), axis=(-2, -1), rngs=rngs),
    "convolution": lambda rngs: nnx.Conv(3, 8, (3, 3), rngs=rngs),
    "embedding": lambda rngs: nnx.Embed(7, 4, rngs=rngs),
    "norm": lambda rngs: nnx.BatchNorm(4, rngs=rngs),
    "LSTM": lambda rngs: nnx.LSTMCell(4, 8, rngs=rngs),
    "attention": lambda rngs: nnx.MultiHeadAttention(2, 8, decode=False, rngs=rngs),
    "LoRA": lambda rngs: nnx.LoRALinear(4, 8, lora_rank=2, rngs=rngs),
}


@pytest.mark.parametrize("name", FLAX_LAYERS)
def test_new_layers_of_flax_never_warn(name):
    for seed in range(3):
        pf.ensemble(FLAX_LAYERS[name](nnx.Rngs(seed)), 3, rngs=seed)


DRAWS = {
    "normal": lambda rng, n: rng.standard_normal(n),
    "uniform": lambda rng, n: rng.uniform(-1, 1, n),
    "mostly zero": lambda rng, n: rng.standard_normal(n) * (rng.random(n) < 0.1),
    "Laplace": lambda rng, n: rng.laplace(size=n),
}


@pytest.mark.parametrize("name", DRAWS)
def test_draws_of_one_spread_are_never_told_apart(name):
    rng, draw = np.random.default_rng(0), DRAWS[name]
    smallest = 256 if name == "mostly zero" else 1  # fewer may all be zero
    sizes = [n for n in (1, 2, 3, 4, 5, 8, 13, 32, 100, 256, 1000, 10**5) if n >= smallest]
    for n in sizes:
        for _ in range(2000 if n < 10**5 else 20):
            assert not starts_otherwise("reset_parameters", draw(rng, n), draw(rng, n))


@pytest.mark.parametrize(("n", "ratio"), [(9408, 1.1), (1000, 1.5), (100, 4), (20, 100), (10**6, 1.05)])
def test_draws_of_other_spreads_are_told_apart(n, ratio):
    rng = np.random.default_rng(0)
    for _ in range(100 if n < 10**6 else 5):
        a, b = rng.standard_normal(n), rng.uniform(-(3**0.5), 3**0.5, n)
        assert starts_otherwise("reset_parameters", a * ratio, b)
        assert starts_otherwise("reset_parameters", a, b * ratio)
        assert not starts_otherwise("mean and spread", a, b * ratio)


@pytest.mark.parametrize(
    ("base", "new", "otherwise"), [(0, 1, True), (1e-6, 0, True), (1, 1, False), (0.1, 0.1001, False)]
)
def test_constants_are_compared_by_their_values(base, new, otherwise):
    assert starts_otherwise("as Linear", np.full((4, 2), base), np.full((4, 2), new)) is otherwise
    draw = np.random.default_rng(0).standard_normal((4, 2))
    assert starts_otherwise("as Linear", np.full((4, 2), base), draw)
    assert starts_otherwise("as Linear", draw, np.full((4, 2), new))


def test_reset_is_given_the_name_where_it_takes_one():
    def torch_head(name, p, rngs):
        return pt.random.normal(rngs.params(), p.shape) if name.startswith("2.") else p

    def flax_head(name, p, rngs):
        drawn = name.startswith("layers.2.")
        return jax.random.normal(rngs.params(), p.shape, "float32") if drawn else p[...]

    for package, network, rule in zip(
        (pt, pf), (each[1] for each in zero_heads()), (torch_head, flax_head), strict=True
    ):
        model = package.ensemble(network, 3, reset=rule)
        own = list(network) if package is pt else network.layers
        assert set(rules(model).values()) == {"reset"}
        for member in model:
            layers = list(member) if package is pt else member.layers
            weights = [
                np.asarray(w.detach() if package is pt else w) for w in map(weight_of, (own[0], layers[0], layers[2]))
            ]
            np.testing.assert_array_equal(*weights[:2])
            assert weights[2].std() > 0.5


def weight_of(layer):
    return layer.weight if isinstance(layer, nn.Module) else layer.kernel[...]


def test_a_rule_of_two_arguments_may_have_options():
    model = pt.ensemble(
        nn.Linear(40, 50), 2, reset=lambda p, rngs, std=0.5: std * pt.random.normal(rngs.params(), p.shape)
    )
    assert abs(model.weight.std().item() / 0.5 - 1) < 0.1


def test_reports_print_and_survive_copies():
    model = pt.ensemble(nn.Sequential(nn.Linear(2, 3), nn.PReLU()), 4)
    assert str(model.report).splitlines() == [
        "path      kind    action            before  after",
        "0.weight  Linear  reset_parameters       6     24",
        "0.bias    Linear  reset_parameters       3     12",
        "1.weight  PReLU   reset_parameters       1      4",
        "                  total                 10     40",
    ]
    for variant in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert variant.report == model.report
    base = without_draws(lambda: nnx.Linear(2, 3, rngs=nnx.Rngs(0)))
    twin = pf.ensemble(base, 4, reset_params=False)
    assert rules(twin) == {"bias": "kept", "kernel": "kept"}
    assert copy.deepcopy(twin).report == nnx.clone(twin).report == twin.report
    assert rules(pf.ensemble(lambda rngs: nnx.Linear(2, 3, rngs=rngs), 4))["kernel"] == "constructor"
    assert rules(pt.ensemble([nn.Linear(2, 3), nn.Linear(2, 3)], 2)) == {"weight": "kept", "bias": "kept"}
    assert pt.Ensemble([nn.Linear(2, 3)]).report is None
    assert nnx.jit(lambda model, x: model(x))(twin, jax_of(np.ones((5, 2)), "float32")).shape == (4, 5, 3)
