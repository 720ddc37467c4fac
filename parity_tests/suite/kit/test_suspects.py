"""Each usual suspect is named, with both values and what is left; and nothing is named without being measured."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from torch import nn
from torch.nn import functional

import probly_flax as pf
import probly_torch as pt
from parity_tests.kit.suspects import (
    Gap,
    LayerPair,
    cause_between,
    cause_in_layer,
    cause_in_precision,
    cause_in_statistics,
)
from parity_tests.kit.suspects.trial import run_flax, run_torch
from parity_tests.kit.trees import image_layout, jax_of, mapped


@pytest.fixture(autouse=True)
def _promotes():  # as the norms of nnx do
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def draw(*shape, seed=0):
    return torch.from_numpy(np.random.default_rng([seed, *shape]).standard_normal(shape))


def randomised(module):
    """Puts a module in float64, with random parameters and statistics."""
    module = module.double().eval()
    for i, (name, value) in enumerate(module.state_dict().items()):
        if value.is_floating_point():
            value.copy_(draw(*value.shape, seed=i).abs() + 0.5 if name.endswith("var") else draw(*value.shape, seed=i))
    return module


def made(kind, *args, **options):
    """Makes a layer of Flax in float64, statistics too, in eval mode.

    It is of zeros, which take no compiling.
    """
    layer = nnx.eval_shape(lambda: kind(*args, rngs=nnx.Rngs(0), **{"param_dtype": jnp.float64, **options}))
    for _, variable in nnx.to_flat_state(nnx.state(layer)):
        key = isinstance(variable, nnx.RngKey)
        dtype = None if not isinstance(variable, nnx.RngState) else variable.dtype
        variable.set_value(jax.random.key(0) if key else jax_of(np.zeros(variable.shape, dtype)))
    layer.eval()
    return layer


def loaded(flax_layer, torch_layer):
    pf.load_arrays(flax_layer, pt.to_arrays(torch_layer))
    return flax_layer


def pair(torch_layer, flax_layer, *inputs, last=False, flax_inputs=None, flax_kwargs=None, **kwargs):
    """Makes a pair of the two layers and their calls on the same inputs."""
    given = flax_inputs or tuple(jax_of(image_layout(last).to_flax(x.numpy())) for x in inputs)
    given_kwargs = mapped(kwargs, lambda v: jax_of(v.numpy())) if flax_kwargs is None else flax_kwargs
    outputs = run_torch(torch_layer, inputs, kwargs)
    flax_outputs = run_flax(flax_layer, given, given_kwargs)
    return LayerPair(
        "",
        torch_layer,
        flax_layer,
        inputs,
        kwargs,
        outputs,
        given,
        given_kwargs,
        flax_outputs,
        last,
        torch_layer.training,
    )


def change(layer, **functions):
    """Edits the values of variables."""
    for name, function in functions.items():
        variable = layer
        for part in name.split("__"):
            variable = getattr(variable, part)
        variable.set_value(jax_of(function(np.asarray(variable.get_value()))))
    return layer


def agrees(cause, *words):
    """Asserts that the cause says all this, and that what is left is rounding."""
    assert cause is not None
    for word in words:
        assert word in cause, cause
    left = cause.rpartition(" ")[2]
    assert left == "exactly" or float(left) < 1e-13, cause


def test_epsilon():
    norm = randomised(nn.LayerNorm(7))
    cause = cause_in_layer(pair(norm, loaded(made(nnx.LayerNorm, 7, use_fast_variance=False), norm), 0.1 * draw(5, 7)))
    said = "nnx epsilon is 1e-06, torch eps is 1e-05; with epsilon=1e-05 the layers agree to "
    assert cause.startswith(said)
    agrees(cause)


def test_twotogether():
    norm = randomised(nn.LayerNorm(7))
    flax_norm = loaded(made(nnx.LayerNorm, 7, use_fast_variance=False), norm)
    flax_norm.bias = None
    agrees(cause_in_layer(pair(norm, flax_norm, 0.1 * draw(5, 7))), "epsilon is 1e-06", "and torch has a bias")


def test_fast_variance():
    norm = randomised(nn.LayerNorm(7))
    flax_norm = loaded(made(nnx.LayerNorm, 7, epsilon=1e-5), norm)
    cause = cause_in_layer(pair(norm, flax_norm, 1e4 + draw(5, 7)))
    assert cause.startswith("nnx use_fast_variance is True")
    assert "with use_fast_variance=False the layers agree to" in cause


def test_momentum_in_statistics():
    norm = randomised(nn.BatchNorm1d(3)).train()
    flax_norm = loaded(made(nnx.BatchNorm, 3), norm)
    flax_norm.train()
    cause = cause_in_statistics(pair(norm, flax_norm, draw(6, 3)))
    agrees(cause, "nnx momentum is 0.99, the weight of the old, torch momentum is 0.1", "momentum=0.9 and", "n = 6")


def test_variance_in_statistics():
    norm = randomised(nn.BatchNorm2d(3)).train()
    flax_norm = loaded(made(nnx.BatchNorm, 3, momentum=0.9), norm)
    flax_norm.train()
    images = pair(norm, flax_norm, draw(2, 3, 5, 4), last=True)
    agrees(cause_in_statistics(images), "unbiased", "n = 40", "times n/(n-1)")


class Biased(nnx.BatchNorm):
    """With torch's variance, n/(n-1) times nnx's, and another weight of the new."""

    def __call__(self, x):
        old, n = self.var.get_value(), x.size // x.shape[-1]
        y = super().__call__(x)
        self.var.set_value(old * self.momentum + (self.var.get_value() - old * self.momentum) * n / (n - 1))
        return y


def test_momentum_alone():
    norm = randomised(nn.BatchNorm1d(3, momentum=0.3)).train()
    flax_norm = loaded(made(Biased, 3, momentum=0.3), norm)
    flax_norm.train()
    cause = cause_in_statistics(pair(norm, flax_norm, draw(6, 3)))
    assert cause.startswith("nnx momentum is 0.3, the weight of the old, torch momentum is 0.3, that of the new; with")
    agrees(cause, "with momentum=0.7 the statistics agree")


def test_statistics_without_a_cause():
    norm = randomised(nn.BatchNorm1d(3)).train()
    flax_norm = loaded(made(nnx.BatchNorm, 3, momentum=0.9), norm)
    flax_norm.train()
    flax_norm = change(flax_norm, mean=lambda v: v + 0.1)
    assert cause_in_statistics(pair(norm, flax_norm, draw(6, 3))) is None


def test_padding():
    conv = randomised(nn.Conv2d(3, 5, 3, stride=2, padding=1))
    flax_conv = loaded(made(nnx.Conv, 3, 5, (3, 3), strides=2, padding="SAME"), conv)
    cause = cause_in_layer(pair(conv, flax_conv, draw(2, 3, 8, 8), last=True))
    agrees(cause, "nnx padding is 'SAME', torch padding is (1, 1); with padding=(1, 1)")


def test_stride_dilation_and_groups():
    x = draw(2, 4, 9, 8)
    conv = randomised(nn.Conv2d(4, 6, 3, padding=2, dilation=2))
    flax_conv = loaded(made(nnx.Conv, 4, 6, (3, 3), padding=2), conv)
    agrees(cause_in_layer(pair(conv, flax_conv, x, last=True)), "kernel_dilation is 1", "with kernel_dilation=(2, 2)")
    conv = randomised(nn.Conv2d(4, 6, 3, stride=2))
    flax_conv = loaded(made(nnx.Conv, 4, 6, (3, 3), padding=0), conv)
    agrees(cause_in_layer(pair(conv, flax_conv, x, last=True)), "strides is 1, torch stride is (2, 2)")
    conv = randomised(nn.Conv2d(4, 6, 3, groups=2))
    flax_conv = made(nnx.Conv, 4, 6, (3, 3), padding=0)
    agrees(cause_in_layer(pair(conv, flax_conv, x, last=True)), "feature_group_count is 1, torch groups is 2")


def test_circular_padding():
    conv = randomised(nn.Conv1d(3, 5, 3, padding=1, padding_mode="circular"))
    flax_conv = loaded(made(nnx.Conv, 3, 5, (3,), padding=1), conv)
    agrees(
        cause_in_layer(pair(conv, flax_conv, draw(2, 3, 8), flax_inputs=(jax_of(draw(2, 3, 8).mT.numpy()),))),
        "CIRCULAR",
    )


def test_transposed_convolution():
    conv = randomised(nn.ConvTranspose2d(3, 3, 3, stride=2, padding=1))
    flax_conv = loaded(made(nnx.ConvTranspose, 3, 3, (3, 3), strides=2, padding=1), conv)
    flax_conv = change(flax_conv, kernel=lambda kernel: np.flip(kernel, (0, 1)))
    agrees(cause_in_layer(pair(conv, flax_conv, draw(2, 3, 5, 4), last=True)), "flipped in space")


def test_weight_that_is_not_transposed():
    linear = randomised(nn.Linear(5, 5))
    flax_linear = change(loaded(made(nnx.Linear, 5, 5), linear), kernel=np.transpose)
    cause = cause_in_layer(pair(linear, flax_linear, draw(3, 5)))
    agrees(cause, "the square kernel (5, 5) is not transposed", "with kernel.T the layers agree")
    conv = randomised(nn.Conv2d(4, 4, 3))
    flax_conv = loaded(made(nnx.Conv, 4, 4, (3, 3), padding=0), conv)
    flax_conv = change(flax_conv, kernel=lambda kernel: kernel.swapaxes(2, 3))
    agrees(cause_in_layer(pair(conv, flax_conv, draw(2, 4, 5, 6), last=True)), "axes 2 and 3 of kernel (3, 3, 4, 4)")


def test_bias_that_one_side_lacks():
    linear = randomised(nn.Linear(5, 3))
    flax_linear = loaded(made(nnx.Linear, 5, 3), linear)
    flax_linear.bias, flax_linear.use_bias = None, False
    agrees(cause_in_layer(pair(linear, flax_linear, draw(4, 5))), "torch has a bias, and nnx adds none")
    flax_linear = loaded(made(nnx.Linear, 5, 3), linear)
    linear.bias = None
    agrees(cause_in_layer(pair(linear, flax_linear, draw(4, 5))), "nnx has a bias, and torch none; with use_bias=False")


def test_weights_that_differ():
    linear = randomised(nn.Linear(5, 3))
    flax_linear = change(
        loaded(made(nnx.Linear, 5, 3), linear), kernel=lambda v: v + 0.25 * (np.arange(15) == 7).reshape(5, 3)
    )
    agrees(cause_in_layer(pair(linear, flax_linear, draw(4, 5))), "weight differs by up to 0.25; with torch's values")


def test_mode():
    net = nn.Sequential(nn.Dropout(0.5)).eval()
    drop = nnx.Dropout(0.5, rngs=nnx.Rngs(0))
    agrees(cause_in_layer(pair(net[0], drop, draw(4, 5))), "nnx is in train mode (deterministic=False), torch in eval")
    norm = randomised(nn.BatchNorm1d(3))
    flax_norm = loaded(made(nnx.BatchNorm, 3), norm)
    flax_norm.train()
    agrees(cause_in_layer(pair(norm, flax_norm, draw(6, 3))), "use_running_average=False")


def attention_pair(mutate=lambda layer: layer, **kwargs):
    """Makes a pair of two heads of three features."""
    attention = randomised(nn.MultiheadAttention(6, 2, batch_first=True))
    flax_attention = loaded(made(nnx.MultiHeadAttention, 2, 6, decode=False), attention)
    x = draw(3, 5, 6)
    given = {"flax_inputs": (jax_of(x.numpy()),), "flax_kwargs": {}, "need_weights": False, **kwargs}
    return pair(attention, mutate(flax_attention), x, x, x, **given)


def test_softmax_in_float32():
    agrees(cause_in_layer(attention_pair()), "softmax in float32")


def test_masks():
    mask = draw(5, 5) > 1
    polar = attention_pair(attn_mask=mask, flax_kwargs={"mask": jax_of(mask.numpy()[None, None])})
    agrees(cause_in_layer(polar), "True where a key is hidden, nnx's where it is seen; with ~mask")
    causal = attention_pair(attn_mask=torch.ones(5, 5, dtype=torch.bool).triu(1))
    agrees(cause_in_layer(causal), "torch attends to the past only, nnx to all")
    padded = attention_pair(key_padding_mask=draw(3, 5) > 1)
    agrees(cause_in_layer(padded), "nnx does not take torch's key_padding_mask")
    added = draw(5, 5)
    bias = attention_pair(attn_mask=added, flax_kwargs={"mask": jax_of(added.numpy()[None, None])})
    agrees(cause_in_layer(bias), "takes it for a boolean one")


def test_query_key_and_value():
    def rotated(layer):
        layer.query, layer.key, layer.value = layer.key, layer.value, layer.query
        return layer

    agrees(cause_in_layer(attention_pair(rotated)), "nnx's query, key, value hold", "key, value, query")


def test_heads():
    names = [f"{projection}__{weight}" for projection in ("query", "key", "value") for weight in ("kernel", "bias")]

    def features_first(value):
        return value.reshape(*value.shape[:-2], 3, 2).swapaxes(-1, -2)

    swapped = attention_pair(lambda layer: change(layer, **dict.fromkeys(names, features_first)))
    agrees(cause_in_layer(swapped), "nnx splits query, key and value as (features, heads)")
    flat = dict.fromkeys(names[::2], lambda value: value.reshape(6, 6).T.reshape(6, 2, 3))
    agrees(cause_in_layer(attention_pair(lambda layer: change(layer, **flat))), "not from its transpose")


def test_packed_projections():
    linear = randomised(nn.Linear(4, 12))
    for order, said in (((1, 0, 2), "nnx packs k, q, v where torch packs q, k, v"), (None, "nnx packs query")):
        columns = np.arange(12).reshape(3, 2, 2)
        columns = columns.swapaxes(0, 1) if order is None else columns[list(order)]
        take = partial(np.take, indices=columns.reshape(-1), axis=-1)
        flax_linear = change(loaded(made(nnx.Linear, 4, 12), linear), kernel=take, bias=take)
        agrees(cause_in_layer(pair(linear, flax_linear, draw(3, 4))), said)


def test_gates():
    cell = randomised(nn.LSTMCell(3, 5))
    cell.bias_hh.data.zero_()
    flax_cell = loaded(made(nnx.OptimizedLSTMCell, 3, 5), cell)
    take = partial(np.take, indices=(np.arange(20).reshape(4, 5)[[0, 2, 1, 3]].reshape(-1)), axis=-1)
    flax_cell = change(flax_cell, dense_i__kernel=take, dense_h__kernel=take, dense_h__bias=take)
    x, h, c = draw(2, 3), draw(2, 5), draw(2, 5, seed=1)
    given = ((jax_of(c.numpy()), jax_of(h.numpy())), jax_of(x.numpy()))
    agrees(cause_in_layer(pair(cell, flax_cell, x, (h, c), flax_inputs=given)), "the gates of nnx lie as (i, g, f, o)")


class ResetBefore(nnx.GRUCell):
    """As many write it: the reset gate is applied to the state, before its product."""

    def __call__(self, carry, inputs):
        of_x, kernel = self.dense_i(inputs), self.dense_h.kernel.get_value()
        (x_r, x_z, x_n), (u_r, u_z, u_n) = jnp.split(of_x, 3, -1), jnp.split(kernel, 3, -1)
        r, z = nnx.sigmoid(x_r + carry @ u_r), nnx.sigmoid(x_z + carry @ u_z)
        h = (1 - z) * nnx.tanh(x_n + (r * carry) @ u_n) + z * carry
        return h, h


def test_reset_gate():
    cell = randomised(nn.GRUCell(3, 5))
    cell.bias_hh.data.zero_()
    x, h = draw(2, 3), draw(2, 5)
    given = jax_of(h.numpy()), jax_of(x.numpy())
    before = pair(cell, loaded(made(ResetBefore, 3, 5), cell), x, h, flax_inputs=given)
    agrees(
        cause_in_layer(before), "torch computes n = tanh(x W + b + r * (h U + c))", "nnx n = tanh(x W + b + (r * h) U"
    )
    cell.bias_hh.data[10:] = 0.5
    flax_cell = made(nnx.GRUCell, 3, 5)
    pf.load_arrays(flax_cell, {**pt.to_arrays(cell), "bias_hh": np.zeros(15)})
    flax_cell = change(flax_cell, dense_i__bias=lambda bias: bias + 0.5 * (np.arange(15) >= 10))
    merged = pair(cell, flax_cell, x, h, flax_inputs=given)
    agrees(cause_in_layer(merged), "nnx n = tanh(x W + b + r * (h U) + c)")


def sequence(cell, rngs, param_dtype):
    return nnx.RNN(cell(3, 4, rngs=rngs, param_dtype=param_dtype), rngs=rngs)


def gru_pair(batch_first, mutate=lambda layer: layer):
    gru = randomised(nn.GRU(3, 4, batch_first=batch_first))
    gru.bias_hh_l0.data.zero_()
    return pair(gru, mutate(loaded(made(partial(sequence, nnx.GRUCell)), gru)), draw(2, 5, 3))


def test_directions():
    lstm = randomised(nn.LSTM(3, 4, batch_first=True, bidirectional=True))
    for name, value in lstm.named_parameters():
        if name.startswith("bias_hh"):
            value.data.zero_()

    def both(rngs, param_dtype):
        return nnx.Bidirectional(*(sequence(nnx.OptimizedLSTMCell, rngs, param_dtype) for _ in range(2)), rngs=rngs)

    layer = loaded(made(both), lstm)
    layer.forward_rnn, layer.backward_rnn = layer.backward_rnn, layer.forward_rnn
    swapped = pair(lstm, layer, draw(2, 5, 3))
    agrees(cause_in_layer(swapped), "forward_rnn has torch's weights of the reverse direction")


def test_reversed_sequence():
    def reverse(layer):
        layer.reverse = layer.keep_order = True
        return layer

    cause = cause_in_layer(gru_pair(True, reverse))
    agrees(cause, "nnx reverse is True, torch reverse is False; with reverse=False")
    agrees(cause_in_layer(gru_pair(False)), "time_major is False")


def ensemble_pair(mutate=lambda layer: layer, kind=pf.BatchEnsembleLinear, width=5):
    layer = randomised(pt.BatchEnsembleLinear(nn.Linear(4, width), num_members=3))
    flax_layer = made(lambda **options: kind(nnx.Linear(4, width, **options), num_members=3))
    return pair(layer, mutate(loaded(flax_layer, layer)), draw(6, 4))


class BiasBeforeS(pf.BatchEnsembleLinear):
    def __call__(self, x):
        r, s, b = (jnp.repeat(v.get_value(), len(x) // 3, 0) for v in (self.r, self.s, self.bias))
        return ((x * r) @ self.kernel.get_value() + b) * s


class InTurns(pf.BatchEnsembleLinear):
    def __call__(self, x):
        order = np.arange(6).reshape(2, 3).T.reshape(-1)
        return super().__call__(x[order])[np.argsort(order)]


def test_batchensemble():
    def swapped(layer):
        layer.r, layer.s = layer.s, layer.r
        return layer

    agrees(cause_in_layer(ensemble_pair(swapped, width=4)), "r and s are swapped")
    agrees(cause_in_layer(ensemble_pair(kind=BiasBeforeS)), "nnx adds the bias before it multiplies by s")
    agrees(cause_in_layer(ensemble_pair(kind=InTurns)), "[E, B], nnx's in turns, [B, E]")
    names = dict.fromkeys(("r", "s", "bias"), lambda value: np.roll(value, 1, 0))
    agrees(
        cause_in_layer(ensemble_pair(lambda layer: change(layer, **names))),
        "members are torch's in the order (2, 0, 1)",
    )


def test_axes():
    norm = randomised(nn.BatchNorm2d(5))
    flax_norm = loaded(made(nnx.BatchNorm, 5), norm)
    agrees(
        cause_in_layer(pair(norm, flax_norm, draw(2, 5, 5, 5))),
        "torch takes axis 1 for the channels, nnx the last axis",
    )


def test_groups():
    norm = randomised(nn.GroupNorm(3, 6))
    flax_norm = loaded(made(nnx.GroupNorm, 6, num_groups=2, epsilon=1e-5, use_fast_variance=False), norm)
    agrees(cause_in_layer(pair(norm, flax_norm, draw(2, 6, 5, 4), last=True)), "num_groups is 2, torch num_groups is 3")

    class Interleaved(nnx.GroupNorm):
        def __call__(self, x):
            order = np.arange(6).reshape(3, 2).T.reshape(-1)
            scale, bias, self.scale, self.bias = self.scale, self.bias, None, None
            y = super().__call__(x[..., np.argsort(order)])[..., order]
            return y * scale + bias

    flax_norm = loaded(made(Interleaved, 6, num_groups=3, epsilon=1e-5, use_fast_variance=False), norm)
    agrees(cause_in_layer(pair(norm, flax_norm, draw(2, 6, 5, 4), last=True)), "channels into groups")


class Embed(nnx.Embed):
    def __call__(self, tokens):
        return super().__call__(tokens + 1)


def test_tokens():
    embedding = randomised(nn.Embedding(7, 4))
    tokens = torch.tensor([[0, 3, 5], [2, 1, 4]])
    agrees(cause_in_layer(pair(embedding, loaded(made(Embed, 7, 4), embedding), tokens)), "counts tokens from 1")


class Scaled(nnx.Linear):
    def __call__(self, x):
        return super().__call__(x) * 5**0.5


class OnePlus(nnx.RMSNorm):
    def __call__(self, x):
        return change(nnx.clone(self), scale=lambda value: value + 1)._normalised(x)

    def _normalised(self, x):
        return nnx.RMSNorm.__call__(self, x)


def test_scales():
    linear = randomised(nn.Linear(3, 5))
    cause = cause_in_layer(pair(linear, loaded(made(Scaled, 3, 5), linear), draw(4, 3)))
    agrees(cause, "torch's values are 1/sqrt(5) times nnx's")
    norm = randomised(nn.RMSNorm(5, eps=1e-6))
    cause = cause_in_layer(pair(norm, loaded(made(OnePlus, 5), norm), draw(4, 5)))
    agrees(cause, "torch multiplies by weight, nnx by 1 + weight")


class Norm(nn.Module):
    """As in some published models."""

    def __init__(self):
        super().__init__()
        self.weight, self.bias, self.eps = nn.Parameter(draw(5)), nn.Parameter(draw(5, seed=1)), 1e-5

    def forward(self, x):
        return self.weight * (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + self.eps) + self.bias


def test_variance_and_place_of_epsilon():
    flax_norm = loaded(made(nnx.LayerNorm, 5, epsilon=1e-5), norm := Norm())
    cause = cause_in_layer(pair(norm, flax_norm, draw(4, 5)))
    agrees(cause, "torch computes x - mean(x) over sqrt(unbiased var) + 1e-05, nnx x - mean(x) over sqrt(var + 1e-05)")


class InFloat32(nnx.Linear):
    def __call__(self, x):
        return super().__call__(jnp.tanh(x.astype(jnp.float32)).astype(x.dtype))


class Tanh(nn.Linear):
    def forward(self, x):
        return super().forward(torch.tanh(x))


def test_step_in_float32():
    linear = randomised(Tanh(3, 5))
    agrees(cause_in_layer(pair(linear, loaded(made(InFloat32, 3, 5), linear), draw(4, 3))), "nnx computes in float32")


def test_precision():
    linear = nn.Linear(3, 5).eval()
    flax_linear = nnx.Linear(3, 5, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    cause = cause_in_precision(pair(linear, loaded(flax_linear, linear), draw(4, 3).float()))
    assert cause.startswith("nnx computes with dtype=bfloat16; with dtype=float32 the layers agree to")

    class InBfloat16(nnx.Linear):
        def __call__(self, x):
            return super().__call__(x.astype(jnp.bfloat16).astype(x.dtype))

    flax_linear = loaded(InBfloat16(3, 5, rngs=nnx.Rngs(0)), linear)
    cause = cause_in_precision(pair(linear, flax_linear, draw(4, 3).float()))
    assert cause.startswith("nnx computes in bfloat16"), cause
    norm = nn.LayerNorm(7)
    flax_norm = loaded(nnx.LayerNorm(7, epsilon=1e-5, rngs=nnx.Rngs(0)), norm)
    cause = cause_in_precision(pair(norm, flax_norm, (100 + draw(4, 7)).float()))
    assert "with use_fast_variance=False" in cause
    assert (
        cause_in_precision(pair(linear, loaded(nnx.Linear(3, 5, rngs=nnx.Rngs(0)), linear), draw(4, 3).float())) is None
    )


class Disturbed(nnx.Linear):
    def __call__(self, x):
        y = super().__call__(x)
        return y + 1e-3 * jnp.sin(3 * y) * y


@pytest.mark.parametrize("shape", [(3, 5), (5, 5)], ids=str)
def test_no_false_cause(shape):
    linear = randomised(nn.Linear(*shape))
    assert cause_in_layer(pair(linear, loaded(made(Disturbed, *shape), linear), draw(4, shape[0]))) is None
    conv = randomised(nn.Conv2d(3, 3, 3, padding=1))
    flax_conv = loaded(made(nnx.Conv, 3, 3, (3, 3), padding=1), conv)
    given = pair(conv, flax_conv, draw(2, 3, 4, 5), last=True)
    outputs = given.torch_outputs + 1e-6 * draw(*given.torch_outputs.shape)
    assert cause_in_layer(LayerPair(**{**vars(given), "torch_outputs": outputs})) is None


def gap(values, torch_function, flax_function, last=False):
    """Makes a gap of values in torch's layout, by name, the last first."""
    theirs = [jax_of(image_layout(last).to_flax(value.numpy())) for value in values.values()]
    before = [(name, value, their) for (name, value), their in zip(values.items(), theirs, strict=True)]
    ours = torch_function(*values.values())
    return Gap("block", nn.Identity(), nnx.Module(), "fc1", before, ours, flax_function(*theirs), "fc2", last)


def test_activations():
    x = {"fc1": 3 * draw(4, 7)}
    cause = cause_between(gap(x, functional.gelu, nnx.gelu))
    said = "torch computes gelu(fc1), nnx nnx.gelu(fc1); with nnx.gelu(fc1, approximate=False) they agree to"
    assert cause.startswith(said)
    agrees(cause)
    agrees(cause_between(gap(x, functional.relu, nnx.silu)), "relu(fc1), nnx nnx.silu(fc1); with nnx.relu(fc1)")
    agrees(cause_between(gap(x, lambda x: functional.leaky_relu(x, 0.2), nnx.leaky_relu)), "leaky_relu(fc1, 0.2)")
    x = {"fc1": 30 * draw(4, 7)}
    agrees(
        cause_between(gap(x, functional.softplus, nnx.softplus)),
        "softplus(fc1), nnx nnx.softplus(fc1)",
    )
    scores = {"scores": draw(3, 4, 5)}
    agrees(
        cause_between(gap(scores, lambda x: x.softmax(1), nnx.softmax)),
        "softmax(scores, 1), nnx nnx.softmax(scores, axis=2)",
    )
    agrees(cause_between(gap(x, lambda x: x / 7**0.5, lambda x: x)), "fc1 / sqrt(7)")
    agrees(
        cause_between(gap({"fc1": draw(5, 20000)}, torch.tanh, nnx.elu)), "tanh(fc1)"
    )  # of which two rows are enough
    assert cause_between(gap(x, lambda x: x.sin(), nnx.gelu)) is None
    assert cause_between(gap(x, functional.relu, lambda x: nnx.relu(x) + 1e-9 * x**2)) is None


def test_activation_as_a_layer():
    class Gelu(nnx.Module):
        def __call__(self, x):
            return nnx.gelu(x)

    agrees(cause_in_layer(pair(nn.GELU(), Gelu(), draw(3, 5))), "torch computes gelu(x), nnx nnx.gelu(x)")


def test_flatten():
    images = {"conv": draw(2, 3, 4, 5)}
    last = gap(images, lambda x: x.relu().flatten(1), lambda x: nnx.relu(x).reshape(2, -1), last=True)
    agrees(cause_between(last), "jnp.transpose(conv, (0, 3, 1, 2)).reshape(len(conv), 60)")
    unknown = gap(images, lambda x: x.sin().flatten(1), lambda x: jnp.sin(x).reshape(2, -1), last=True)
    agrees(cause_between(unknown), "torch flattens 3 channels first, nnx last")
    tokens = gap(images, lambda x: x.flatten(2).mT, lambda x: x.reshape(2, 20, 3), last=True)
    assert cause_between(tokens) is None  # they are the same
    mixed = gap(images, lambda x: x.flatten(2).mT, lambda x: jnp.moveaxis(x, -1, 1).reshape(2, 20, 3), last=True)
    agrees(cause_between(mixed), ".reshape(len(conv), 20, 3); with conv.reshape(len(conv), 20, 3)")


def test_residual_connection():
    values = {"conv2": draw(2, 3, 4, 5), "conv1": draw(2, 3, 4, 5, seed=1)}
    cause = cause_between(gap(values, lambda x, y: functional.relu(x + y), lambda x, y: nnx.relu(x), last=True))
    agrees(cause, "torch computes relu(conv2 + conv1), nnx nnx.relu(conv2); with nnx.relu(conv2 + conv1)")
    cause = cause_between(gap(values, lambda x, y: x.sin() + y, lambda x, y: jnp.sin(x), last=True))
    agrees(cause, "torch adds conv1 (a residual connection), nnx does not")


def test_pooling_and_resizing():
    images = {"conv": draw(2, 3, 8, 8)}

    def pool(x, **options):
        return nnx.avg_pool(x, (3, 3), (2, 2), "SAME", **options)

    same = gap(images, lambda x: functional.avg_pool2d(x, 3, 2, 1), pool, last=True)
    agrees(cause_between(same), "avg_pool2d(conv, 3, 2, 1), nnx nnx.avg_pool(conv, (3, 3), (2, 2), [(0, 1), (0, 1)])")
    counted = gap(
        images,
        lambda x: functional.avg_pool2d(x, 3, 1, 1),
        lambda x: nnx.avg_pool(x, (3, 3), (1, 1), "SAME", count_include_pad=False),
        last=True,
    )
    agrees(cause_between(counted), "count_include_pad=False")
    kinds = gap(images, lambda x: functional.max_pool2d(x, 2), lambda x: nnx.avg_pool(x, (2, 2), (2, 2)), last=True)
    agrees(cause_between(kinds), "torch computes max_pool2d(conv, 2, 2, 0), nnx nnx.avg_pool")
    resize = partial(functional.interpolate, size=(16, 16), mode="bilinear")
    corners = gap(
        images,
        lambda x: resize(x, align_corners=True),
        lambda x: jax.image.resize(x, (2, 16, 16, 3), "bilinear"),
        last=True,
    )
    agrees(cause_between(corners), "align_corners=True")


def attention_of(x, order, heads, scale=None, mask=None, xp=torch):
    """Attends from (B, T, 3E), packed as (3, heads, features) or (heads, 3, features)."""
    width = x.shape[-1] // 3 // heads
    if order == "3hd":
        q, k, v = (x.reshape(*x.shape[:2], 3, heads, width)[:, :, i].swapaxes(1, 2) for i in range(3))
    else:
        q, k, v = (x.reshape(*x.shape[:2], heads, 3, width)[:, :, :, i].swapaxes(1, 2) for i in range(3))
    weights = q @ k.swapaxes(-1, -2) * (width**-0.5 if scale is None else scale)
    if mask is not None:
        weights = xp.where(mask, weights, -math.inf)
    softmax = torch.softmax if xp is torch else jax.nn.softmax
    mixed = (softmax(weights, -1) @ v).swapaxes(1, 2)
    return mixed.reshape(*mixed.shape[:2], -1)


def test_attention_between_layers():
    x = {"qkv": draw(2, 5, 12)}

    def cause(torch_options, flax_options):
        sides = partial(attention_of, heads=2, **torch_options), partial(attention_of, heads=2, xp=jnp, **flax_options)
        return cause_between(gap(x, *sides))

    three, heads = {"order": "3hd"}, {"order": "h3d"}
    agrees(
        cause(three, heads),
        "(3, heads, features) = (3, 2, 2) of q, k, v",
        "(heads, 3, features) = (2, 3, 2) of q, k, v",
    )
    agrees(cause(three, {**three, "scale": 1.0}), "scale 1/sqrt(2)", "scale 1,")
    past = torch.ones(5, 5, dtype=torch.bool).tril()
    agrees(cause({**three, "mask": past}, three), "causal")


def test_layouts():
    images, sequence = np.arange(2 * 3 * 4 * 5).reshape(2, 3, 4, 5), np.arange(30).reshape(2, 3, 5)
    np.testing.assert_array_equal(image_layout(True).to_torch(image_layout(True).to_flax(images), images.shape), images)
    np.testing.assert_array_equal(image_layout(True).to_torch(images, images.shape), images)  # of no channels: as it is
    np.testing.assert_array_equal(image_layout(True).to_torch(sequence, sequence.shape), sequence)
    np.testing.assert_array_equal(image_layout(True).to_torch(np.moveaxis(sequence, 1, -1), sequence.shape), sequence)
    cube = np.arange(2 * 27).reshape(2, 3, 3, 3)
    np.testing.assert_array_equal(image_layout(True).to_torch(cube, cube.shape), np.moveaxis(cube, -1, 1))
    np.testing.assert_array_equal(image_layout(False).to_torch(cube, cube.shape), cube)
    assert image_layout(False).to_torch(images, (2, 5, 4, 3)) is None
    assert image_layout(True).to_flax(sequence).shape == (2, 3, 5)
