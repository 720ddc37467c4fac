"""batchensemble() on the networks that people have, in both packages and with the same weights."""

import jax
import numpy as np
import pytest
import torch
from flax import nnx
from torch import nn

import probly_flax as pf
import probly_torch as pt
from parity_tests.kit.trees import jax_of
from parity_tests.standard import MEANING_LIMIT, NOISE_FLOOR, assert_close, error
from parity_tests.suite.subject import jitted, randomized, without_draws


class TorchBlock(nn.Module):
    """Two convolutions and a shortcut (He et al. 2016)."""

    def __init__(self, channels, features, stride):
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(channels, features, 3, stride, 1, bias=False), nn.BatchNorm2d(features)
        self.conv2, self.norm2 = nn.Conv2d(features, features, 3, 1, 1, bias=False), nn.BatchNorm2d(features)
        self.shortcut = nn.Conv2d(channels, features, 1, stride)

    def forward(self, x):
        h = self.norm2(self.conv2(self.norm1(self.conv1(x)).relu()))
        return (h + self.shortcut(x)).relu()


class TorchResNet(nn.Module):
    """A small one."""

    def __init__(self):
        super().__init__()
        self.stem, self.block = nn.Conv2d(3, 4, 3, 1, 1), TorchBlock(4, 6, 2)
        self.head = nn.Linear(6, 5)

    def forward(self, x):
        return self.head(self.block(self.stem(x)).mean((2, 3)))


def batch_norm(features, rngs):
    return nnx.BatchNorm(features, momentum=0.9, use_fast_variance=False, rngs=rngs)


def conv(channels, features, size, stride, rngs, use_bias=True):
    padding = (size - 1) // 2
    return nnx.Conv(channels, features, (size, size), stride, padding=padding, use_bias=use_bias, rngs=rngs)


class FlaxBlock(nnx.Module):
    """The twin."""

    def __init__(self, channels, features, stride, rngs):
        self.conv1, self.norm1 = conv(channels, features, 3, stride, rngs, use_bias=False), batch_norm(features, rngs)
        self.conv2, self.norm2 = conv(features, features, 3, 1, rngs, use_bias=False), batch_norm(features, rngs)
        self.shortcut = conv(channels, features, 1, stride, rngs)

    def __call__(self, x):
        h = self.norm2(self.conv2(jax.nn.relu(self.norm1(self.conv1(x)))))
        return jax.nn.relu(h + self.shortcut(x))


class FlaxResNet(nnx.Module):
    """The twin."""

    def __init__(self, rngs):
        self.stem = conv(3, 4, 3, 1, rngs)
        self.block = FlaxBlock(4, 6, 2, rngs)
        self.head = nnx.Linear(6, 5, rngs=rngs)

    def __call__(self, x):
        return self.head(self.block(self.stem(x)).mean((1, 2)))


class TorchTransformer(nn.Module):
    """Embedding, attention and a feed-forward layer, with norms before them."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.norm1, self.norm2 = nn.LayerNorm(8), nn.LayerNorm(8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, tokens):
        x = self.embed(tokens)
        h = self.norm1(x)
        x = x + self.attention(h, h, h, need_weights=False)[0]
        return (x + self.down(self.up(self.norm2(x)).relu())).mean(1)


class FlaxTransformer(nnx.Module):
    """The twin."""

    def __init__(self, rngs):
        self.embed = nnx.Embed(11, 8, rngs=rngs)
        self.norm1, self.norm2 = (nnx.LayerNorm(8, epsilon=1e-5, use_fast_variance=False, rngs=rngs) for _ in range(2))
        self.attention = nnx.MultiHeadAttention(2, 8, decode=False, rngs=rngs)
        self.up, self.down = nnx.Linear(8, 16, rngs=rngs), nnx.Linear(16, 8, rngs=rngs)

    def __call__(self, tokens):
        x = self.embed(tokens)
        x = x + self.attention(self.norm1(x))
        return (x + self.down(jax.nn.relu(self.up(self.norm2(x))))).mean(1)


IMAGES = np.random.default_rng(0).standard_normal((6, 3, 8, 8)).astype("float32")
TOKENS = np.random.default_rng(0).integers(0, 11, (6, 7), "int32")
NETWORKS = {
    "ResNet": (TorchResNet, FlaxResNet, torch.tensor(IMAGES), jax_of(IMAGES.transpose(0, 2, 3, 1), "float32")),
    "Transformer": (TorchTransformer, FlaxTransformer, torch.tensor(TOKENS), jax_of(TOKENS, "int32")),
}


def pair(name, **options):
    torch_network, flax_network, x, z = NETWORKS[name]
    ours, theirs = (
        pt.batchensemble(torch_network(), 3, **options),
        without_draws(lambda: pf.batchensemble(flax_network(nnx.Rngs(0)), 3, **options)),
    )
    pf.load_arrays(theirs, pt.to_arrays(ours))
    return ours, theirs, x, z


@pytest.mark.parametrize("per_member_norms", [False, True])
@pytest.mark.parametrize("name", NETWORKS)
def test_twins_have_equal_outputs_and_members(name, per_member_norms):
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        ours, theirs, x, z = pair(name, per_member_norms=per_member_norms, rngs=4)
        base = without_draws(lambda: NETWORKS[name][1](nnx.Rngs(1)))
        again = pf.batchensemble(base, 3, per_member_norms=per_member_norms, rngs=4)
        drawn = {k: v for k, v in pf.to_arrays(again).items() if k.rpartition(".")[2].split("_")[-1] in ("r", "s")}
        assert len(drawn) > 8
        for path, array in drawn.items():  # whatever the framework, the same seed
            np.testing.assert_array_equal(pt.to_arrays(ours)[path], array, err_msg=path)
        if name == "ResNet":
            ours(x), jitted(theirs, z)  # statistics move
            pf.load_arrays(theirs, pt.to_arrays(ours))  # torch's running variance is the unbiased one
        ours.eval(), theirs.eval()
        y, other = ours(x).detach().numpy(), np.asarray(jitted(theirs, z))
        assert y.shape == (3, 6, 5 if name == "ResNet" else 8)
        assert error(y, other, y, "float32") <= MEANING_LIMIT * NOISE_FLOOR
        for i, (member, twin) in enumerate(zip(ours, theirs, strict=True)):
            assert type(member) is NETWORKS[name][0]
            assert not any("probly" in type(layer).__module__ for layer in member.modules())
            assert not any("probly" in type(layer).__module__ for _, layer in nnx.iter_modules(twin))
            assert_close(member(x).detach().numpy(), y[i], "float32")
            assert_close(np.asarray(jitted(twin, z)), other[i], "float32")
        assert_close(ours.fold()(x).detach().numpy(), y, "float32")
        assert_close(np.asarray(jitted(theirs.fold(), z)), other, "float32")
        assert_close(ours[[2, 0]](x).detach().numpy(), y[[2, 0]], "float32")
        assert_close(np.asarray(jitted(theirs[[2, 0]], z)), other[np.array([2, 0])], "float32")


@pytest.mark.parametrize("per_member_norms", [False, True])
def test_every_layer_is_in_the_report(per_member_norms):
    ours, theirs, *_ = pair("ResNet", per_member_norms=per_member_norms)
    expected = {"stem", "head", "block.conv1", "block.conv2", "block.shortcut"}
    norms = {"block.norm1", "block.norm2"}
    for model in (ours, theirs):
        actions = {row.path: row.action for row in model.report.rows}
        assert {path for path, action in actions.items() if action == "converted"} == expected | (
            norms if per_member_norms else set()
        )
        assert actions.keys() == expected | norms


def test_statistics_of_per_member_norms_are_each_members_own():
    model, _, x, _ = pair("ResNet", per_member_norms=True)
    alone = list(model)
    for _ in range(2):
        y = model(x)
        for i, member in enumerate(alone):
            assert_close(y[i].detach(), member.train()(x).detach(), "float32")
    for i, member in enumerate(model):
        for (name, ours), (_, theirs) in zip(member.named_buffers(), alone[i].named_buffers(), strict=True):
            assert_close(ours.double(), theirs.double(), "float32"), name


def test_parts_of_a_converted_layer_are_not_converted_again():
    ours, theirs, *_ = pair("Transformer")
    for model in (ours, theirs):
        assert [row.path for row in model.report.rows] == ["attention", "down", "embed", "norm1", "norm2", "up"]
    assert type(ours.network.attention.out_proj) is pt.BatchEnsembleLinear
    assert isinstance(theirs.network.attention, nnx.MultiHeadAttention)


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


@pytest.mark.parametrize("activation", ["relu", "gelu", nn.functional.silu])
def test_members_of_an_encoder_may_use_torchs_fused_inference_again(activation):
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, activation=activation, batch_first=True)
    base = nn.TransformerEncoder(layer, 2).eval()
    model, x = pt.batchensemble(base, 3), torch.randn(4, 5, 8)
    with torch.no_grad():
        y = model(x)
        for i, member in enumerate(model):
            assert member.layers[0].activation_relu_or_gelu == base.layers[0].activation_relu_or_gelu
            assert_close(y[i], member(x), "float32")
    assert model.network.layers[0].activation_relu_or_gelu == 0
