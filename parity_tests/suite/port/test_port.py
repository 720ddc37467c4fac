"""Twin networks by machine: torch networks as people write them, against the source that is written for them."""

import copy
import functools
import math
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from torch import nn
from torch.nn import functional

import probly_flax as pf
from parity_tests.kit.trees import jax_of
from parity_tests.standard import TRAJECTORY_LIMIT
from parity_tests.suite.port.networks import NETWORKS, BasicBlock, ResNet, images, randomized
from parity_tests.suite.subjects.subject import jitted
from probly_torch import port as ports
from probly_torch.port import port, register_rule, to_flax_source
from probly_torch.port._proof import load


@pytest.fixture(autouse=True)
def _as_torch_does():
    """Lets the source broadcast and promote as torch does, which the suite forbids elsewhere."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def leaves(tree):
    if isinstance(tree, dict):
        tree = [tree[name] for name in sorted(tree)]
    return [leaf for each in tree for leaf in leaves(each)] if isinstance(tree, tuple | list) else [tree]


def last(tensor):
    """Converts a tensor as the twin takes it: images channels last."""
    array = tensor.detach().numpy()
    array = np.moveaxis(array, 1, -1) if array.ndim in (4, 5) and array.dtype.kind == "f" else array
    return jax_of(array)


def assert_equal(ours, theirs, layouts):
    """Asserts equality to 1e-12 of the scale of each output, in the layout that it has."""
    theirs = leaves(theirs)
    assert len(theirs) > 0
    for tensor, array, order in zip(leaves(ours), theirs, layouts, strict=True):
        a, b = tensor.detach().numpy().transpose(order), np.asarray(array)
        assert a.shape == b.shape
        assert np.abs(a - b).max(initial=0) <= TRAJECTORY_LIMIT * np.abs(a).max(initial=0)


def twin_of(network, *inputs):
    """Returns the network in float64, what its source builds, with the weights, and the layouts of the outputs."""
    network = randomized(network).double().eval()
    return loaded(network, ports._twin("port", network, inputs))


def loaded(network, written):
    return network, load(network, written), [v.order for v in leaves(written.outputs)]


@functools.cache
def written(name):
    """Returns one of the networks, and its twin."""
    make, x = NETWORKS[name]
    network = randomized(make()).double().eval()
    return network, ports._twin("port", network, (x.double() if x.is_floating_point() else x,))


def compiled(model, *inputs):
    return jitted(model, *inputs)


def check(network, *inputs):
    """Compares the outputs of both."""
    inputs = [x.double() if x.is_floating_point() else x for x in inputs]
    network, model, layouts = twin_of(network, *inputs)
    ours = network(*(x.clone() for x in inputs))
    assert_equal(ours, compiled(model, *map(last, inputs)), layouts)


class Forward(nn.Module):
    """A function of its inputs and of the layers that it uses."""

    def __init__(self, function, **layers):
        super().__init__()
        self.function = function
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, *inputs):
        return self.function(self, *inputs)


# Not through 50 layers, which amplify rounding beyond the limit; nor through hardswish, whose gradient in torch has the
# 1/6 of float32.
GRADIENTS = "LeNet", "DenseNet", "ViT"


@pytest.mark.parametrize("name", NETWORKS)
def test_networks(name):
    x = NETWORKS[name][1]
    network, model, layouts = loaded(*written(name))
    if name not in GRADIENTS:
        x = x.double() if x.is_floating_point() else x
        assert_equal(network(x), compiled(model, last(x)), layouts)
        return
    x = x.double().requires_grad_()
    y = network(x)
    torch.cos(y).sum().backward()
    value, theirs = nnx.jit(
        nnx.value_and_grad(lambda x, model: ((y := model(x)), jnp.cos(y).sum())[::-1], has_aux=True)
    )(last(x), model)
    assert_equal(y, value[1], layouts)
    assert_equal(x.grad, theirs, [ports.Value("", x.grad, x.ndim in (4, 5)).order])


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    folder = tmp_path_factory.mktemp("written")
    for name in NETWORKS:
        (folder / f"{name.replace(' ', '_')}.py").write_text(written(name)[1].source)
    return folder


def test_source_is_formatted_and_clean(sources):
    for command in (["format", "--check", "--line-length", "120"], ["check"]):
        run = subprocess.run(
            [sys.executable, "-m", "ruff", command[0], "--isolated", "--no-cache", *command[1:], sources],
            capture_output=True,
            text=True,
        )
        assert run.returncode == 0, run.stdout + run.stderr
    assert not any("probly" in path.read_text() for path in sources.iterdir())


def test_source_runs_without_torch_and_without_this_library(sources):
    code = """
import sys
for name in ("torch", "probly_torch", "probly_flax", "parity_tests"):
    sys.modules[name] = None
sys.path.insert(0, sys.argv[1])
from flax import nnx
import jax
import jax.numpy as jnp
import MLP
jax.config.update("jax_enable_x64", True)
print(MLP.Network(rngs=nnx.Rngs(0))(jnp.ones((2, 5))).shape)
"""
    run = subprocess.run([sys.executable, "-c", code, sources], capture_output=True, text=True)
    assert run.stdout.strip() == "(2, 3)", run.stderr


def test_instances_that_differ_in_numbers_share_a_class():
    source = to_flax_source(ResNet(BasicBlock, (1, 2, 1, 1)), images(2, 3, 9, 9))
    classes = [line.split()[1] for line in source.splitlines() if line.startswith("class ")]
    assert classes == ["BasicBlock(nnx.Module):", "BasicBlock2(nnx.Module):", "ResNet(nnx.Module):"]
    assert "self.layer2 = nnx.Sequential(BasicBlock2(2, 4, rngs=rngs), BasicBlock(4, rngs=rngs))" in source
    assert "out = nnx.relu(self.bn1(self.conv1(x)))" not in source  # statements stay those of the original
    assert "        out = self.conv1(x)\n        out = self.bn1(out)\n        out = nnx.relu(out)\n" in source


# -- operations and layers

SEQUENCE, IMAGE = images(2, 5, 6).double(), images(2, 4, 7, 6).double()

ACTIVATIONS = """relu relu6 gelu silu elu selu celu mish hardswish hardsigmoid hardtanh softplus softsign logsigmoid
    tanhshrink softshrink hardshrink leaky_relu sigmoid tanh"""
# Of a sequence (2, 5, 6) and an image (2, 4, 7, 6).
OPERATIONS = {
    "activations": lambda _, x, z: sum(getattr(functional, name)(x) for name in ACTIVATIONS.split()),
    "activations with options": lambda _, x, z: (
        functional.gelu(x, approximate="tanh")
        + functional.elu(x, alpha=0.3)
        + functional.leaky_relu(x, 0.3)
        + functional.softplus(x * 30, beta=2)
        + functional.hardtanh(x, -0.2, 0.3)
        + functional.threshold(x, 0.1, 7)
        + torch.clamp(x, min=-0.5)
        + x.clamp(-1, 0.5)
    ),
    "softmax": lambda _, x, z: (
        functional.softmax(z, dim=1),
        z.softmax(-1),
        torch.log_softmax(z, 2),
        functional.glu(z, dim=1),
        functional.normalize(z),
    ),
    "arithmetic": lambda _, x, z: (
        -(2 - x) / (x * x + 1) + (x - 1) ** 2 - x // 0.7 % 2 + 1 / x.abs() + torch.rsqrt(x**2 + 1)
    ),
    "in place": lambda _, x, z: x.mul_(2).add_(1) + x,
    "comparison": lambda _, x, z: torch.where(x > 0, x, 3.0).masked_fill((x < -1) | ~(x != 0.5) & (x <= 2), 5.0),
    "maximum": lambda _, x, z: torch.maximum(x, x.flip(1)) + torch.min(x, x.roll(1, 2)),
    "means": lambda _, x, z: (
        z.mean((2, 3)),
        z.mean(1),
        z.mean((-1,), keepdim=True),
        z.sum(0),
        z.mean(),
        z.mean([0, 2, 3]),
    ),
    "extremes": lambda _, x, z: (z.amax(1), z.max(dim=2).values, z.max(dim=3)[0], z.argmax(1), z.amin((1, 2)), z.max()),
    "spread": lambda _, x, z: (
        z.var(1),
        z.std((2, 3), unbiased=False),
        z.norm(dim=1),
        z.logsumexp(2),
        z.var(2, correction=0),
    ),
    "rows": lambda _, x, z: (
        z[:, 0],
        z[:, :, 1],
        z[..., 2],
        z[:, 1:3],
        z[0],
        z[:, :, ::2, 1:],
        z[:, -1:, None],
        z[..., 0, 0],
    ),
    "cuts": lambda _, x, z: torch.cat([*z.chunk(2, 1)[::-1], *z.split([1, 3], dim=1), *z.split(3, 1)], dim=1),
    "stack": lambda _, x, z: torch.stack([x, x * 2], dim=1) + torch.stack(x.unbind(1)[:1] * 5, 1)[:, None],
    "flatten": lambda _, x, z: (
        z.flatten(1),
        z.flatten(2),
        z.flatten(0, 1),
        z.reshape(2, 2, -1),
        z.view(2, 4, -1),
        z.flatten(),
    ),
    "view": lambda _, x, z: (x.view(x.size(0), -1), x.reshape(x.shape[0], 5, 2, 3), x.unflatten(-1, (3, 2))),
    "permute": lambda _, x, z: (
        z.permute(0, 2, 3, 1),
        z.permute(0, 3, 1, 2),
        z.transpose(1, 2),
        x.mT,
        z.movedim(1, -1),
        x.permute(2, 0, 1),
    ),
    "back and forth": lambda _, x, z: z.permute(0, 2, 3, 1).softmax(-1).permute(0, 3, 1, 2).relu(),
    "broadcast": lambda _, x, z: (
        z * z.mean((2, 3))[:, :, None, None] + z[0, 0] + z[0] + z.mean(1, keepdim=True) + z[0, 0, 0] + z[:1, :, :1, :1]
    ),
    "expand": lambda _, x, z: (
        x[:1].expand(x.shape[0], -1, -1)
        + x.mean(0).expand_as(x)
        + x[:, :1].repeat(1, 5, 1)
        + z.repeat(1, 1, 1, 1)[0, 0, :5]
    ),
    "squeeze": lambda _, x, z: (
        z[:, :1].squeeze(1),
        z.mean((2, 3), keepdim=True).squeeze(-1).squeeze(-1),
        x.unsqueeze(1),
        x.unsqueeze(-1),
        x[:, :1].squeeze(),
    ),
    "repeat": lambda _, x, z: (
        z.repeat(1, 2, 1, 3),
        z.repeat_interleave(2, 1),
        torch.roll(z, (1, 2), (1, 3)),
        torch.flip(z, [1, 2]),
    ),
    "products": lambda _, x, z: (
        x @ x.mT,
        torch.bmm(x.transpose(1, 2), x),
        torch.matmul(z, z.mT),
        x.mT.contiguous() @ x,
    ),
    "einsum": lambda _, x, z: (
        torch.einsum("nchw,ndhw->ncd", z, z),
        torch.einsum("bij,bkj->bik", x, x),
        torch.einsum("bij,bij", x, x),
    ),
    "new": lambda _, x, z: (
        x
        + torch.zeros(x.shape[0], 1, 6)
        + torch.ones_like(x)
        + torch.arange(x.shape[2])
        + x.new_zeros(6)
        + torch.full((6,), 0.5)
    ),
    "dtypes": lambda _, x, z: (
        x.double() + (x > 0).double() + (x > 0).to(x.dtype) + x.long().type_as(x) + x.round().to(torch.float64)
    ),
    "triangles": lambda _, x, z: x[:, :5, :5].tril() + torch.triu(x[:, :5, :5], 1),
    "sizes": lambda _, x, z: (
        x * math.sqrt(x.shape[-1]) + x.dim() + len(x.shape) + z.size(1) + x.size()[1] + x.shape[1] // 2
    ),
    "unpacking": lambda _, x, z: unpacked(z),
    "max pooling": lambda _, x, z: (
        functional.max_pool2d(z, 3, 2, 1),
        functional.max_pool2d(z, (2, 3), ceil_mode=True),
        functional.max_pool1d(x, 2),
    ),
    "mean pooling": lambda _, x, z: (
        functional.avg_pool2d(z, 3, 2, 1),
        functional.avg_pool2d(z, 3, 2, 1, count_include_pad=False),
        functional.avg_pool2d(z, 2, ceil_mode=True),
        functional.avg_pool2d(z, 2, divisor_override=3),
        functional.avg_pool1d(x, 3, 1),
    ),
    "adaptive pooling": lambda _, x, z: (
        functional.adaptive_avg_pool2d(z, (3, 4)),
        functional.adaptive_max_pool2d(z, (2, 5)),
        functional.adaptive_avg_pool2d(z, (1, None)),
        functional.adaptive_max_pool1d(x, 1),
    ),
    "resizing": lambda _, x, z: (
        functional.interpolate(z, scale_factor=2),
        functional.interpolate(z, size=(5, 9)),
        functional.interpolate(z, scale_factor=2, mode="bilinear"),
        functional.interpolate(z, size=(4, 11), mode="bilinear", align_corners=True),
        functional.interpolate(x, scale_factor=3, mode="linear"),
        functional.pixel_shuffle(z, 2),
    ),
    "padding": lambda _, x, z: (
        functional.pad(z, (1, 2)),
        functional.pad(z, (1, 0, 2, 1), value=3.0),
        functional.pad(z, (1, 2, 2, 1), mode="reflect"),
        functional.pad(x, (1, 2), mode="replicate"),
        functional.pad(x, (1, 2), mode="circular"),
    ),
    "attention": lambda _, x, z: (
        functional.scaled_dot_product_attention(z, z, z),
        functional.scaled_dot_product_attention(z, z, z, is_causal=True),
        functional.scaled_dot_product_attention(x, x, x, attn_mask=torch.ones(5, 5).tril().bool(), scale=0.3),
    ),
    "statements": lambda _, x, z: statements(x),
}


def unpacked(z):
    n, c, h, w = z.shape
    z = z.reshape(n, c // 2, 2, h, w).transpose(1, 2)
    return z.reshape(n, -1, h, w)


def statements(x):
    y = x
    for i in range(x.shape[1] - 3):
        y = torch.sin(y) + i
    y += x
    if x.shape[0] > 1:
        y = y * 2
    (a, b), c = torch.chunk(y, 2, dim=2), y.sum(2)
    a, b = b, a
    return {"a": a - b, "c": [c]}


@pytest.mark.parametrize("name", OPERATIONS)
def test_operations(name):
    check(Forward(OPERATIONS[name]), SEQUENCE, IMAGE)


def attend(net, x):
    mask = torch.ones(5, 5, dtype=x.dtype).triu(1)
    a, _ = net.first(x, x, x, attn_mask=mask.bool(), need_weights=False)
    b = net.second(a, x, x, attn_mask=mask)[0]
    return net.encoder(a + b, mask=mask.bool())


def recur(net, x):
    y, (h, c) = net.lstm(x)
    z, state = net.gru(y, h)
    w, last_state = net.rnn(z.transpose(0, 1), state[-1:].contiguous())
    u, (h2, c2) = net.stack(x, (h.repeat(4, 1, 1), c.repeat(4, 1, 1)))
    return w, last_state, u, h2, c2, c


LAYERS = {
    "1d": lambda: (
        nn.Sequential(
            nn.Conv1d(5, 4, 3, stride=2, padding=1),
            nn.BatchNorm1d(4, affine=False),
            nn.PReLU(4),
            nn.MaxPool1d(2),
            nn.ConvTranspose1d(4, 3, 4, 2, 1, 1, dilation=2, bias=False),
            nn.GroupNorm(3, 3, eps=0.1),
            nn.Upsample(scale_factor=2),
            nn.Conv1d(3, 6, 3, padding="same", dilation=2, groups=3),
            nn.InstanceNorm1d(6),
        ),
        images(2, 5, 13),
    ),
    "2d": lambda: (
        nn.Sequential(
            nn.Conv2d(3, 4, (3, 2), stride=(2, 1), padding=(0, 1), dilation=(1, 2)),
            nn.PReLU(),
            nn.ZeroPad2d((1, 0, 2, 1)),
            nn.Conv2d(4, 6, 3, padding=1, groups=2, padding_mode="circular"),
            nn.Conv2d(6, 8, 3, padding=1, padding_mode="reflect"),
            nn.PixelShuffle(2),
            nn.Dropout2d(0.2),
            nn.ConvTranspose2d(2, 5, (2, 3), stride=(3, 2), padding=1, output_padding=(1, 0)),
            nn.AdaptiveMaxPool2d((3, 2)),
            nn.Unflatten(1, (5, 1)),
            nn.Flatten(1, 2),
            nn.LayerNorm((3, 2)),
            nn.Softmax(dim=1),
        ),
        images(2, 3, 8, 9),
    ),
    "3d": lambda: (
        nn.Sequential(
            nn.Conv3d(2, 3, (1, 2, 3)), nn.BatchNorm3d(3), nn.AvgPool3d(2, 1), nn.ConvTranspose3d(3, 2, 2), nn.Flatten()
        ),
        images(2, 2, 3, 4, 5),
    ),
    "dense": lambda: (
        nn.Sequential(
            nn.Linear(6, 4, bias=False), nn.BatchNorm1d(5), nn.RMSNorm(4), nn.LayerNorm((5, 4)), nn.Dropout(0.1)
        ),
        images(2, 5, 6),
    ),
    "attention": lambda: (
        Forward(
            attend,
            first=nn.MultiheadAttention(6, 2, dropout=0.1, batch_first=True),
            second=nn.MultiheadAttention(6, 3, bias=False, batch_first=True),
            encoder=nn.TransformerEncoder(
                nn.TransformerEncoderLayer(6, 2, 7, norm_first=True, batch_first=True),
                2,
                nn.LayerNorm(6),
                enable_nested_tensor=False,
            ),
        ),
        images(2, 5, 6),
    ),
    "attention, length first": lambda: (
        Forward(lambda net, x: net.attention(x, x, x)[0], attention=nn.MultiheadAttention(6, 2)),
        images(2, 5, 6),
    ),
    "recurrent": lambda: (
        Forward(
            recur,
            lstm=nn.LSTM(6, 4, batch_first=True),
            gru=nn.GRU(4, 4, batch_first=True),
            rnn=nn.RNN(4, 4),
            stack=nn.LSTM(6, 4, num_layers=2, bidirectional=True, batch_first=True),
        ),
        images(2, 5, 6),
    ),
    "weights by themselves": lambda: (
        Forward(
            lambda net, x: functional.linear(x, net.linear.weight, net.linear.bias) @ net.table.weight.T * net.scale[0],
            linear=nn.Linear(6, 4),
            table=nn.Embedding(3, 4),
            scale=nn.ParameterList([nn.Parameter(torch.zeros(3))]),
        ),
        images(2, 5, 6),
    ),
    "containers": lambda: (
        Forward(
            lambda net, x: (
                net.heads["main"](net.body[0](x)) + net.heads["an aux"](net.body[1](x)) + net.body[0](x)[..., :3]
            ),
            body=nn.ModuleList([nn.Linear(6, 4), nn.Sequential(nn.Linear(6, 4), nn.Identity(), nn.ReLU())]),
            heads=nn.ModuleDict({"main": nn.Linear(4, 3), "an aux": nn.Linear(4, 3)}),
            unused=nn.Linear(2, 2),
        ),
        images(2, 5, 6),
    ),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layers(name):
    check(*LAYERS[name]())


# -- what goes in, what comes out, what stays


def test_training_mode():
    """Outputs and running statistics of a step, but for the variance that torch does not bias."""
    x = images(4, 3, 5, 4).double()
    layers = nn.BatchNorm2d(3), nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5, momentum=0.3), nn.Flatten(), nn.Linear(30, 2)
    network, model, layouts = twin_of(nn.Sequential(*layers), x)
    old = [m.running_var.clone() for m in network.modules() if isinstance(m, nn.BatchNorm2d)]
    counts = []
    for m in network.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.register_forward_hook(lambda _, inputs, __: counts.append(inputs[0][:, 0].numel()))
    network.train()
    model.train()
    assert_equal(network(x), compiled(model, last(x)), layouts)
    arrays = pf.to_arrays(model)
    norms = [(name, m) for name, m in network.named_modules() if isinstance(m, nn.BatchNorm2d)]
    for (name, m), n, before in zip(norms, counts, old, strict=True):
        assert_equal(m.running_mean, arrays[f"{name}.running_mean"], [(0,)])
        biased, old_part = torch.tensor(arrays[f"{name}.running_var"]), (1 - m.momentum) * before
        unbiased = old_part + (biased - old_part) * n / (n - 1)
        assert_equal(m.running_var, unbiased.numpy(), [(0,)])


def test_dropout_is_off_in_eval_mode_and_on_in_train_mode():
    model = port(Forward(lambda net, x: functional.dropout(x, 0.5, net.training)), images(3, 5))
    x = last(images(3, 5))
    np.testing.assert_array_equal(model(x), model(x))
    model.train()
    assert (np.asarray(model(x)) != np.asarray(model(x))).any()
    never = port(Forward(lambda net, x: functional.dropout(x, 0.5, False) + 1), images(2, 3))
    assert not jax.tree.leaves(nnx.state(never))


def test_inputs_by_name_and_outputs_in_containers():
    def forward(self, x, y, scale=1.0):
        return {"sum": x + y * scale, "all": [x, (y,)]}

    network = type("Named", (nn.Module,), {"forward": forward})()
    x, y = images(2, 3), images(2, 3) + 1
    model = port(network, {"x": x, "y": y, "scale": 3.0})
    out = model(x=last(x), y=last(y))
    np.testing.assert_array_equal(out["sum"], network(x, y, 3.0)["sum"])
    np.testing.assert_array_equal(out["all"][1][0], y)
    np.testing.assert_array_equal(port(network, (x, y))(last(x), last(y))["sum"], x + y)


def test_the_dtype_and_the_network_stay():
    for dtype, name in ((torch.float32, "float32"), (torch.bfloat16, "bfloat16"), (torch.float64, "float64")):
        network = randomized(nn.Sequential(nn.Linear(5, 3), nn.BatchNorm1d(3), nn.ReLU())).to(dtype).train()
        before = copy.deepcopy(network)
        model = port(network, images(4, 5).to(dtype))
        assert {v.dtype.name for v in jax.tree.leaves(nnx.state(model, nnx.Param))} == {name}
        assert all(
            torch.equal(a, b) for a, b in zip(network.state_dict().values(), before.state_dict().values(), strict=True)
        )
        assert network.training
        assert all(type(m.training) is bool for m in network.modules())


def test_buffers_and_parameters_of_ones_own():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.gain = nn.Parameter(torch.ones(3))
            self.register_buffer("offset", torch.zeros(3))
            self.register_buffer("mask", torch.ones(3, 3).tril().bool())
            self.register_buffer("index", torch.tensor([2, 0, 1]), persistent=False)

        def forward(self, x):
            return (x * self.gain + self.offset)[:, self.index].masked_fill(~self.mask[0], -1.0)

    check(Scaled(), images(2, 3))
    assert "nnx.Param(jnp.ones((3,), dtype=jnp.float32))" in to_flax_source(Scaled(), images(2, 3))


def test_a_layer_under_two_names_is_one_layer():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = self.b = nn.Linear(3, 3)

        def forward(self, x):
            return self.b(self.a(x))

    model = port(randomized(Tied()), images(2, 3))
    assert model.a is model.b


def test_names_that_are_taken():
    class Network(nn.Sequential):
        pass

    class Stack(nn.Module):
        def forward(self, nnx, jnp=None, *rest):
            return (nnx + jnp, None, nnx.shape[1])

    source = to_flax_source(nn.Sequential(Network(nn.Linear(3, 3)), nn.Linear(3, 3)), images(2, 3))
    assert "class Network(nnx.Sequential):" in source
    y, none, n = port(Stack(), (images(2, 3), images(2, 3) + 1))(last(images(2, 3)), last(images(2, 3)))
    np.testing.assert_array_equal(y, 2 * images(2, 3))
    assert none is None
    assert n == 3
    with pytest.raises(ValueError, match="an attribute named 'sow', which a module in nnx cannot have"):
        to_flax_source(Forward(lambda net, x: net.sow(x), sow=nn.Linear(3, 3)), images(2, 3))


def test_tied_weights():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList([nn.Linear(3, 3), nn.Sequential(nn.Linear(3, 3))])
            self.blocks[1][0].weight = self.blocks[0].weight

        def forward(self, x):
            return self.blocks[1](self.blocks[0](x))

    model = port(randomized(Tied()), images(2, 3))
    assert model.blocks[0].kernel is model.blocks[1].layers[0].kernel
    network = Forward(lambda net, x: net.head(net.table(x)), table=nn.Embedding(5, 3), head=nn.Linear(3, 5))
    network.head.weight = network.table.weight
    with pytest.warns(UserWarning, match=r"head.weight and table.weight are one weight in the network, and two"):
        port(randomized(network), torch.tensor([[1, 2]]))


@pytest.mark.parametrize(
    "make", [lambda: nn.Linear(3, 2), lambda: nn.Sequential(nn.Tanh()), lambda: nn.ReLU(), lambda: nn.Sequential()]
)
def test_single_layers(make):
    check(make(), images(4, 3))


def test_what_is_changed_in_place_is_seen_by_later_uses():
    relu = nn.ReLU(inplace=True)
    check(Forward(lambda net, x: net.relu(x) + x, relu=relu), images(2, 3))
    check(Forward(lambda net, x: functional.relu_(x.sin_()) + x, relu=relu), images(2, 3))
    for forward in (
        lambda net, x: (x.view(6), net.relu(x))[0] + 1,
        lambda net, x: (net.block(x), x)[1] + 1,
    ):
        with pytest.raises(ValueError, match="has changed in place"):
            to_flax_source(Forward(forward, relu=relu, block=nn.Sequential(relu, nn.Linear(3, 3))), images(2, 3))


# -- proofs and errors


@pytest.fixture
def _rules():
    before = [dict(table) for table in vars(ports._REGISTERED).values()]
    yield
    for table, entries in zip(vars(ports._REGISTERED).values(), before, strict=True):
        table.clear()
        table.update(entries)


@pytest.mark.usefixtures("_rules")
def test_a_wrong_rule_is_found_and_its_layer_named():
    network = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)), nn.Linear(4, 4))
    port(network, images(2, 4))
    register_rule(nn.LayerNorm)(lambda layer: f"nnx.LayerNorm({layer.normalized_shape[0]}, rngs=rngs)")
    with pytest.raises(ValueError, match=r"that is .* off, first in 1.1 \(LayerNorm\), by"):
        port(network, images(2, 4))


@pytest.mark.usefixtures("_rules")
def test_registered_rules():
    class Wave(nn.Linear):
        def forward(self, x):
            return torch.sinc(super().forward(x)) % 1

    network = Forward(lambda net, x: net.wave(torch.special.erfinv(x.tanh())), wave=Wave(4, 3))
    with pytest.raises(ValueError, match=r"function torch\.special\.\w*erfinv.*register_rule\("):
        port(network, images(2, 4))
    definition = "class Wave(nnx.Linear):\n    def __call__(self, x):\n        return jnp.sinc(super().__call__(x)) % 1"
    register_rule(Wave, preamble=definition)(
        lambda layer: f"Wave({layer.in_features}, {layer.out_features}, rngs=rngs)"
    )
    register_rule(torch.special.erfinv, preamble="from jax.lax import erf_inv")(lambda x: f"erf_inv({x})")
    model = port(randomized(network), images(2, 4))
    assert type(model.wave).__name__ == "Wave"
    register_rule(torch.special.erfinv)(lambda x: "not an expression (")
    with pytest.raises(ValueError, match="returned no expression"):
        port(network, images(2, 4))
    with pytest.raises(TypeError, match="expects a module class, a function, or the name of a method"):
        register_rule(3)


class Unknown(nn.Module):
    """A layer whose forward leaves torch."""

    def forward(self, x):
        return torch.from_numpy(x.numpy() + 1)


BAD = {
    "function": (
        lambda net, x: torch.fft.fft(x),
        r"function torch\.\w*\.?\w*fft.*Forward.*test_port\.py:\d+\. Register a rule for it: register_rule\(",
    ),
    "method": (
        lambda net, x: x.cummax(1),
        r"method Tensor.cummax.*test_port\.py:\d+\. Register .* register_rule\('cummax'\)\(",
    ),
    "layer": (lambda net, x: net.layer(x, x), r"layer Bilinear.*register_rule\(torch.nn.Bilinear\)\("),
    "option": (lambda net, x: functional.interpolate(x[:, None], size=5, mode="nearest-exact"), "mode='nearest-exact'"),
    "values": (
        lambda net, x: x if x.sum() > 0 else -x,
        r"asks for the value of a tensor.*the network \(Forward\), after .*test_port\.py:\d+",
    ),
    "numpy": (lambda net, x: net.unknown(x), r"unknown \(Unknown\)"),
    "parametrization": (lambda net, x: net.parametrized(x), r"layer ParametrizedLinear \(parametrized; .*remove_param"),
    "hook": (lambda net, x: net.hooked(x), r"layer Linear \(with hooks"),
    "attention weights": (lambda net, x: net.attention(x[None], x[None], x[None])[1] + 1, "attention weights"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_written_is_named_with_its_place(name):
    forward, message = BAD[name]
    layers = {"layer": nn.Bilinear(4, 4, 2), "unknown": Unknown(), "attention": nn.MultiheadAttention(4, 2)}
    layers |= {"parametrized": nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), "hooked": nn.Linear(4, 4)}
    layers["hooked"].register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match=message):
        to_flax_source(Forward(forward, **layers), images(2, 4))


def test_a_branch_on_training_is_warned_of():
    with pytest.warns(
        UserWarning, match=r"the network \(Forward\) asks for self.training; its twin does what it does in eval"
    ):
        to_flax_source(Forward(lambda net, x: x * 2 if net.training else x + 1), images(2, 4))


def test_the_number_of_rows_stays_open():
    port(Forward(lambda net, x: x.view(x.shape[0], -1)), images(2, 3, 4))
    with pytest.raises(ValueError, match=r"leaves the number of rows open; .*x\.shape\[0\]"):
        port(Forward(lambda net, x: x + sum(float(n) for n in x.shape) - torch.ones(int(x.shape[0]), 3)), images(2, 3))


def test_other_things_than_networks_are_refused():
    for function in (port, to_flax_source):
        with pytest.raises(
            TypeError, match=f"{function.__name__} expects network to be a torch.nn.Module; got builtin"
        ):
            function(len, images(2, 3))
    with pytest.raises(ValueError, match=r"got the layer Bilinear, by itself\. Register a rule"):
        to_flax_source(nn.Bilinear(3, 4, 2), (images(2, 3), images(2, 4)))
    with pytest.raises(ValueError, match="expects example_input that the network takes"):
        to_flax_source(nn.Linear(3, 2), images(2, 4))
