"""Embeddings: what is special to them, as attend, options of torch, and tokens out of range."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from torch import nn

import probly_flax as pf
import probly_torch as pt
from parity_tests import standard
from parity_tests.kit.trees import jax_of
from parity_tests.standard import assert_close
from parity_tests.suite.layers.contract import KINDS, ONE, TILE
from parity_tests.suite.layers.test_contract import sentences
from parity_tests.suite.subjects.subject import without_draws

EMBED = next(kind for kind in KINDS if kind.name == "Embed")  # of 8 tokens and 6 features


def dyadic(*shape):
    return np.random.default_rng(0).integers(-8, 9, shape) / 8


def test_a_fresh_table_is_what_nnx_draws_by_default():
    layer = pt.BatchEnsembleEmbed(nn.Embedding(41, 7), pt.Rngs(3), num_members=2)
    np.testing.assert_array_equal(layer.weight.detach(), nnx.Embed(41, 7, rngs=nnx.Rngs(3)).embedding[...])


def test_float64_tables_agree_to_the_accuracy_of_normal():
    base = without_draws(lambda: nnx.Embed(47, 3, param_dtype="float64", rngs=nnx.Rngs(0)))
    ours, theirs = map(EMBED.convert, (nn.Embedding(47, 3, dtype=torch.float64), base))
    assert standard.ulps(ours.weight.detach().numpy(), np.asarray(theirs.embedding[...])).max() <= 3


@pytest.mark.parametrize("dtype", ["uint8", "int8", "int32", "int64"])
def test_tokens_of_any_integer_dtype_that_the_base_layer_takes(dtype):
    ours, theirs = EMBED.pair(use_base_weights=True)
    x = np.arange(6).astype(dtype)
    expected = theirs(jax_of(np.arange(6)))
    np.testing.assert_array_equal(theirs(jax_of(x)), expected)
    if dtype.startswith("int") and dtype != "int8":
        np.testing.assert_array_equal(ours(torch.tensor(x)).detach(), expected)


def test_each_member_has_a_table_of_its_own_and_attends_by_it():
    ours, theirs = map(EMBED.randomized, EMBED.pair())
    pf.load_arrays(theirs, pt.to_arrays(ours))
    query = dyadic(6, 4, 6)
    for i in range(3):
        a, b = ours.member(i), theirs.member(i)
        table = (ours.weight * torch.outer(ours.r[i], ours.s[i])).detach()
        np.testing.assert_array_equal(a.weight.detach(), table)
        np.testing.assert_array_equal(b.embedding[...], table)
        rows = slice(2 * i, 2 * i + 2)
        answers = np.asarray(theirs.attend(jax_of(query, "float32")))[rows]
        np.testing.assert_array_equal(answers, b.attend(jax_of(query[rows], "float32")))
        np.testing.assert_array_equal(
            ours.attend(torch.tensor(query).float())[rows].detach(), query[rows] @ table.numpy().T
        )


@pytest.mark.parametrize(
    "options",
    [
        {"padding_idx": 2},
        {"padding_idx": -1},
        {"padding_idx": 0, "scale_grad_by_freq": True},
        {"scale_grad_by_freq": True},
        {"sparse": True},
        {"sparse": True, "padding_idx": 1, "norm_type": 1.0},
    ],
    ids=str,
)
def test_torch_options_give_the_gradients_of_e_tables(options):
    base = nn.Embedding(6, 4, dtype=torch.float64, **options)
    layer = pt.BatchEnsembleEmbed(base, num_members=3, use_base_weights=True)
    assert (layer.weight != 0).any(1).sum() == 6 - ("padding_idx" in options)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.tensor(dyadic(*parameter.shape)))
    x = torch.tensor([[0, 0, 2, 2], [2, 5, 5, 1]] * 3)
    g = torch.tensor(dyadic(6, 4, 4))
    layer(x).backward(g)
    expected = {name: torch.zeros_like(p) for name, p in layer.named_parameters()}
    for i in range(3):
        ordinary = layer.member(i)
        rows = slice(2 * i, 2 * i + 2)
        ordinary(x[rows]).backward(g[rows])
        grad = ordinary.weight.grad.to_dense()
        assert (grad != 0).any()
        expected["weight"] += grad * layer.r[i, :, None] * layer.s[i]
        expected["r"][i] += (grad * layer.weight * layer.s[i]).sum(1)
        expected["s"][i] += (grad * layer.weight * layer.r[i, :, None]).sum(0)
    assert layer.weight.grad.is_sparse == base.sparse
    for name, parameter in layer.named_parameters():
        assert_close(parameter.grad.to_dense().numpy(), expected[name].detach().numpy(), "float64")
    if "padding_idx" in options:
        assert not layer.weight.grad.to_dense()[base.padding_idx].any()
        assert not layer.r.grad[:, base.padding_idx].any()
        fresh = pt.BatchEnsembleEmbed(base, num_members=3)
        assert not fresh.weight[base.padding_idx].any()
        assert not fresh(torch.full((3,), base.padding_idx)).any()


def test_torch_scaled_gradients_under_vmap_and_twice():
    layer = pt.BatchEnsembleEmbed(nn.Embedding(6, 4, scale_grad_by_freq=True, dtype=torch.float64), num_members=2)
    x = torch.tensor([0, 0, 1, 2])
    weights = dict(layer.named_parameters())

    def loss(weights, x):
        return torch.func.functional_call(layer, weights, x).square().sum()

    grads = torch.func.grad(loss)(weights, x)
    layer(x).square().sum().backward()
    stacked = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(weights, x[None])
    for name, parameter in layer.named_parameters():
        assert_close(grads[name].detach().numpy(), parameter.grad.numpy(), "float64")
        assert_close(stacked[name][0].detach().numpy(), parameter.grad.numpy(), "float64")


def test_tokens_out_of_range_as_the_base_layers():
    ours, theirs = EMBED.pair()
    for token in (8, -1):
        with pytest.raises(IndexError):
            ours(torch.full((3,), token))
    assert np.isnan(theirs(jax_of(np.full(3, 8)))).all()
    np.testing.assert_array_equal(theirs(jax_of(np.full(3, -1))), theirs(jax_of(np.full(3, 7))))
    base = without_draws(lambda: nnx.Embed(1, 5, rngs=nnx.Rngs(0)))
    one = pf.BatchEnsembleEmbed(base, num_members=3)
    for token in (3, -4):  # nnx.Embed gives the only row for every token
        outside, first = jax_of(np.full(3, token)), jax_of(np.zeros(3, int))
        np.testing.assert_array_equal(one(outside), one(first))
        np.testing.assert_array_equal(one.member(1)(outside), one.member(1)(first))


@pytest.mark.parametrize("amp", [torch.bfloat16, torch.float16])
def test_attend_under_autocast_has_the_dtype_of_a_linear_layer(amp):
    base, x = EMBED.torch_base(), torch.ones(6, 6)
    with torch.autocast("cpu", amp):
        assert EMBED.convert(base).attend(x).dtype == nn.functional.linear(x, base.weight).dtype


@pytest.mark.parametrize("dtype", [None, "float32", "bfloat16"])
@pytest.mark.parametrize("param_dtype", ["float32", "bfloat16"])
def test_attend_of_flax_promotes_as_nnx_does(dtype, param_dtype):
    seen = []

    def promote_dtype(arrays, **options):
        seen.append((len(arrays), options))
        return nnx.nn.dtypes.promote_dtype(arrays, **options)

    base = EMBED.flax_base(dtype=dtype, param_dtype=jnp.dtype(param_dtype), promote_dtype=promote_dtype)
    layer, query = EMBED.convert(base), np.ones((6, 6), "float32")
    with jax.numpy_dtype_promotion("standard"):
        ours, theirs = (jax.eval_shape(each.attend, query) for each in (layer, base))
    assert ours.dtype == theirs.dtype
    assert seen[0] == seen[1]


def test_the_sharding_of_an_embedding_is_kept():
    mesh = jax.make_mesh((1, 1), ("data", "model"), axis_types=(jax.sharding.AxisType.Explicit,) * 2)
    with jax.set_mesh(mesh):
        metadata = {"out_sharding": ("data", "model")}
        base = nnx.Embed(7, 5, rngs=nnx.Rngs(0), embedding_metadata=metadata)
        layer = pf.BatchEnsembleEmbed(base, num_members=2)
        assert [getattr(layer, n).get_metadata("out_sharding") for n in ("embedding", "r", "s")] == [
            ("data", "model"),
            (None, "data"),
            (None, "model"),
        ]
        spec = jax.sharding.PartitionSpec("data", "model")
        assert layer(jax_of(np.zeros(4, int)), out_sharding=spec).sharding.spec == spec
        spec = jax.sharding.PartitionSpec(None, "data")  # that of r, whose axis the tokens are
        assert layer.attend(jax_of(np.zeros((4, 5))), out_sharding=spec).sharding.spec == spec
        assert layer.member(0).embedding.get_metadata("out_sharding") == ("data", "model")


ONE_HOT = "for one-hot vectors, x.argmax(-1)."


@pytest.mark.parametrize(
    ("call", "error", "end"),
    [
        (lambda layer, zeros: layer(zeros(6)), TypeError, ONE_HOT),
        (lambda layer, zeros: layer(zeros(6, dtype="bool")), TypeError, ONE_HOT),
        (lambda layer, zeros: layer.attend(zeros(5, 6)), ValueError, TILE),
        (lambda layer, zeros: layer.attend(zeros(6)), ValueError, ONE),
        (lambda layer, zeros: layer.attend(zeros(6, 8)), ValueError, "x[..., :6]."),
    ],
)
def test_bad_calls_have_one_sentence_in_both(call, error, end):
    def torch_zeros(*shape, dtype="float32"):
        return torch.zeros(shape, dtype=getattr(torch, dtype))

    def flax_zeros(*shape, dtype="float32"):
        return jax_of(np.zeros(shape, dtype))

    ours, theirs = EMBED.pair()
    a, b = sentences(EMBED, error, (lambda: call(ours, torch_zeros), lambda: call(theirs, flax_zeros)), [end])
    assert a == b


def test_what_torch_alone_refuses():
    with pytest.raises(ValueError, match=r"without max_norm.*got max_norm=1.0. Unset it: base_layer.max_norm = None."):
        pt.BatchEnsembleEmbed(nn.Embedding(7, 5, max_norm=1.0), num_members=2)
    with pytest.raises(TypeError, match="floating dtype"):
        pt.BatchEnsembleEmbed(nn.Embedding.from_pretrained(torch.ones(7, 5, dtype=int)), num_members=2)
