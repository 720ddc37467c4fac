"""Dropout with equal masks: what torch and Flax drop is the same, and what cannot be made equal is said."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from torch import nn

import probly_flax as pf
import probly_torch as pt
from parity_tests.kit.masks import Masks
from parity_tests.standard import assert_close


@pytest.fixture(autouse=True)
def _promotion():
    """Allows promotion, which nnx.MultiHeadAttention asks for."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def run_flax(masks, model, x, seed=3, jit=True):
    """Runs Flax, and returns the outputs as torch has them."""

    def forward(state, key, x):
        with masks.flax(key):
            return nnx.merge(graph, state, copy=True)(x)

    model.train()
    graph, state = nnx.split(model)
    y = (jax.jit(forward) if jit else forward)(state, jax.random.key(seed), np.moveaxis(x, 1, -1) if x.ndim > 3 else x)
    return np.moveaxis(y, -1, 1) if x.ndim > 3 else np.asarray(y)


def run_torch(masks, model, x, seed=3):
    with masks.torch(seed, model):
        return model(torch.from_numpy(x)).detach().numpy()


def assert_equal_masks(ours, theirs, x):
    """Asserts that the same values are zero, and others at another seed, eager and jitted."""
    for jit in (True, False):
        masks = Masks("compare")
        y = run_flax(masks, theirs, x, jit=jit)
        assert_close(y, run_torch(masks, ours, x), "float64")
        assert masks.differences == []
    other = run_torch(masks, ours, x, seed=4)
    assert not np.array_equal(other, y)


def draw(*shape):
    return np.random.default_rng(0).normal(size=shape)


@pytest.mark.parametrize(
    ("layer", "twin", "shape"),
    [
        (nn.Dropout(0.3), nnx.Dropout(0.3, rngs=nnx.Rngs(0)), (7, 5)),
        (nn.Dropout(0.3, inplace=True), nnx.Dropout(0.3, rngs=nnx.Rngs(0)), (3, 2, 5, 6)),
        (nn.Dropout2d(0.4), nnx.Dropout(0.4, broadcast_dims=(1, 2), rngs=nnx.Rngs(0)), (5, 3, 4, 7)),
    ],
)
def test_elements_and_channels(layer, twin, shape):
    assert_equal_masks(layer, twin, draw(*shape))


class TorchAttention(nn.Module):
    def __init__(self, need_weights):
        super().__init__()
        self.attention = nn.MultiheadAttention(6, 2, dropout=0.4, batch_first=True, dtype=torch.float64)
        self.need_weights = need_weights

    def forward(self, x):
        return self.attention(x, x, x, need_weights=self.need_weights)[0]


class FlaxAttention(nnx.Module):
    def __init__(self, broadcast_dropout=False):
        self.attention = nnx.MultiHeadAttention(
            2, 6, decode=False, dropout_rate=0.4, broadcast_dropout=broadcast_dropout, param_dtype=jnp.float64,
            rngs=nnx.Rngs(0),
        )  # fmt: skip

    def __call__(self, x):
        return self.attention(x)


@pytest.mark.parametrize("need_weights", [True, False])
def test_attention_weights(need_weights):
    ours, theirs = TorchAttention(need_weights), FlaxAttention()
    nn.init.normal_(ours.attention.in_proj_bias)
    pf.load_arrays(theirs, pt.to_arrays(ours))
    assert_equal_masks(ours, theirs, draw(3, 5, 6))


def test_a_mask_that_all_heads_share_is_another():
    masks = Masks("compare")
    run_flax(masks, FlaxAttention(broadcast_dropout=True), draw(3, 5, 6))
    with pytest.raises(ValueError, match=r"\(3, 2, 5, 5\) in torch and \(1, 1, 5, 5\).*broadcast_dropout=False"):
        run_torch(masks, TorchAttention(False), draw(3, 5, 6))


class Sequence(nn.Module):
    """torch.vmap has no rule for it, so that members run one by one."""

    def __init__(self):
        super().__init__()
        self.lstm, self.drop = nn.LSTM(5, 3, dtype=torch.float64), nn.Dropout(0.4)

    def forward(self, x):
        return self.drop(self.lstm(x)[0])


def test_recurrent_layers_with_sequences_first():
    """Dropout between the layers of an LSTM is inside of it."""
    lstm = nn.LSTM(5, 3, 2, dropout=0.4, dtype=torch.float64)
    masks = Masks("compare")
    kept = run_flax(masks, nnx.Dropout(0.4, rngs=nnx.Rngs(0)), np.ones((4, 7, 3))) > 0
    x = torch.from_numpy(draw(7, 4, 5))
    with masks.torch(3, lstm):
        y, _ = lstm(x)
    layers = [nn.LSTM(5, 3, dtype=torch.float64), nn.LSTM(3, 3, dtype=torch.float64)]
    for i, layer in enumerate(layers):
        layer.load_state_dict({f"{n[:-1]}0": v for n, v in lstm.state_dict().items() if n.endswith(str(i))})
    between = layers[0](x)[0] * torch.from_numpy(kept).transpose(0, 1) / 0.6
    assert_close(layers[1](between)[0].detach().numpy(), y.detach().numpy(), "float64")


@pytest.mark.parametrize("loop", [False, True])
def test_members_share_masks(loop):
    layers = [Sequence()] if loop else [nn.Linear(5, 3, dtype=torch.float64), nn.Dropout(0.4)]
    ours = pt.ensemble(nn.Sequential(*layers, nn.Linear(3, 2, dtype=torch.float64)), 3, rngs=0)
    drop = pf.ensemble(nnx.Sequential(nnx.Dropout(0.4, rngs=nnx.Rngs(0)), lambda x: 1 * x), 3)
    masks = Masks("compare")
    x = draw(7, 4, 5) if loop else draw(4, 5)
    kept = run_flax(masks, drop, np.ones((*x.shape[:-1], 3))) > 0
    assert (kept == kept[:1]).all()
    with masks.torch(3, ours):
        y = ours(torch.from_numpy(x))
    for member, row in zip(ours, y, strict=True):
        with torch.no_grad():
            hidden = member[0].lstm(torch.from_numpy(x))[0] if loop else member[0](torch.from_numpy(x))
            expected = member[-1](hidden * torch.from_numpy(kept[0]) / 0.6)
        assert_close(expected.numpy(), row.detach().numpy(), "float64")


def test_an_ensemble_agrees():
    ours = pt.ensemble(nn.Sequential(nn.Linear(5, 3), nn.Dropout(0.4), nn.Linear(3, 2)).double(), 3, rngs=0)
    options = {"param_dtype": jnp.float64, "rngs": nnx.Rngs(0)}
    layers = nnx.Linear(5, 3, **options), nnx.Dropout(0.4, rngs=nnx.Rngs(0)), nnx.Linear(3, 2, **options)
    theirs = pf.ensemble(nnx.Sequential(*layers), 3, rngs=0)
    pf.load_arrays(theirs, pt.to_arrays(ours))
    assert_equal_masks(ours, theirs, draw(4, 5))


def dropped(masks, *rates, shape=(7, 5)):
    run_flax(masks, nnx.Sequential(*(nnx.Dropout(rate, rngs=nnx.Rngs(0)) for rate in rates)), draw(*shape))
    return draw(*shape)


def test_no_mask_for_rates_of_zero_and_one():
    masks = Masks("compare")
    x = dropped(masks, 0.0, 0.3, 1.0)
    assert not run_torch(masks, nn.Sequential(nn.Dropout(0.0), nn.Dropout(0.3), nn.Dropout(1.0)), x).any()
    assert len(masks.draws) == 1


def test_other_rates_are_reported():
    masks = Masks("compare")
    x = dropped(masks, 0.1, 0.3)
    run_torch(masks, nn.Sequential(nn.Dropout(0.1), nn.Dropout(0.5)), x)
    assert masks.differences == ["mask 2: Dropout p is 0.5, nnx rate is 0.3"]


@pytest.mark.parametrize(
    ("layer", "said"),
    [
        (nn.Sequential(nn.Dropout(0.3), nn.Dropout(0.3)), "got 1 in Flax, and another one in torch"),
        (nn.Identity(), "got 0 in torch and 1 in Flax"),
        (nn.Dropout1d(0.3), r"\(7, 5, 1\) in torch and \(7, 5, 4\) in Flax"),
        (nn.RReLU(), "got torch.rrelu_with_noise, which Flax cannot draw"),
    ],
)
def test_what_cannot_be_equal_is_an_error(layer, said):
    masks = Masks("compare")
    x = dropped(masks, 0.3, shape=(7, 5, 4))
    with pytest.raises(ValueError, match=said):
        run_torch(masks, layer, x)


def test_members_in_chunks_are_an_error():
    masks = Masks("compare")
    dropped(masks, 0.3, shape=(4, 3))
    ours = pt.ensemble(nn.Sequential(nn.Linear(5, 3), nn.Dropout(0.3)).double(), 2, chunk_size=1)
    with pytest.raises(ValueError, match="got chunk_size=1"), masks.torch(3, ours):
        ours(torch.from_numpy(draw(4, 5))).sum().backward()


def test_nothing_is_left_behind():
    """Beyond a forward both frameworks draw as they did."""
    before = jax.random.bernoulli
    masks = Masks("compare")
    with pytest.raises(ValueError, match="a fixed rate"):
        jax.jit(lambda p, key: drawn_with(masks, p, key))(0.5, jax.random.key(0))
    assert jax.random.bernoulli is before
    torch.manual_seed(0)
    expected = nn.functional.dropout(torch.ones(9))
    x = dropped(masks, 0.3)
    torch.manual_seed(0)
    run_torch(masks, nn.Dropout(0.3), x)
    assert torch.equal(nn.functional.dropout(torch.ones(9)), expected)


def drawn_with(masks, p, key):
    with masks.flax(key):
        return jax.random.bernoulli(key, p, (3,))
