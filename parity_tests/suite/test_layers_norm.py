"""Embeddings and normalisations: both packages and the oracle agree, and each member is the ordinary layer."""

import copy
import pickle
import re

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
from parity_tests.suite import oracle_norm
from parity_tests.suite.subject import each_run, jitted, run_flax, run_oracle, run_torch, with_cotangent, without_draws
from parity_tests.suite.subjects_norm import SUBJECTS, with_arrays, with_tensors
from parity_tests.suite.twins import assert_same_steps, assert_special_values, of_subject
from probly_flax.layers.embed import BatchEnsembleEmbed as FlaxEmbed
from probly_flax.layers.norm import BatchEnsembleBatchNorm as FlaxBatchNorm
from probly_flax.layers.norm import BatchEnsembleGroupNorm as FlaxGroupNorm
from probly_flax.layers.norm import BatchEnsembleLayerNorm as FlaxLayerNorm
from probly_torch.layers.embed import BatchEnsembleEmbed as TorchEmbed
from probly_torch.layers.norm import BatchEnsembleBatchNorm as TorchBatchNorm
from probly_torch.layers.norm import BatchEnsembleGroupNorm as TorchGroupNorm
from probly_torch.layers.norm import BatchEnsembleLayerNorm as TorchLayerNorm

SEEDS = range(5)
# Op by op, embeddings are exact; of the norms, which share their arithmetic, the one that keeps statistics.
EAGER_EXACT = ("BatchEnsembleEmbed-E3", "BatchEnsembleEmbed.attend-E3")
EAGER_BOUNDED = ("BatchEnsembleBatchNorm-15x4-train",)
EXACT_DTYPES = [("float32",), ("float64",), ("bfloat16",)]
EXACT = each_run([s for s in SUBJECTS if s.exact], EXACT_DTYPES, EAGER_EXACT, [("float32",)])
BOUNDED = each_run(SUBJECTS, [("float32", "float64"), ("bfloat16",)], EAGER_BOUNDED, [("float32", "float64")])


def plain(value):
    """Returns the value as text without addresses, which differ between processes."""
    return re.sub(r" at 0x[0-9a-f]+", "", str(value))


@pytest.mark.parametrize(("subject", "dtypes", "flax_compiled"), EXACT.values(), ids=EXACT)
def test_exact(subject, dtypes, flax_compiled):
    (dtype,) = dtypes
    for seed in SEEDS:
        arrays = subject.draw_exact(seed, dtype)
        assert subject.certificate(arrays, dtype) <= 2.0 ** standard.SIGNIFICANT_BITS[dtype], "the inputs prove nothing"
        runs = run_torch(subject, arrays, dtype), run_flax(subject, arrays, dtype, flax_compiled)
        standard.assert_holds(standard.exact(*runs, run_oracle(subject, arrays)))


@pytest.mark.parametrize(("subject", "dtypes", "flax_compiled"), BOUNDED.values(), ids=BOUNDED)
def test_bounded(subject, dtypes, flax_compiled):
    arrays = [with_cotangent(subject, subject.draw(seed, dtypes[0]), seed, dtypes[0]) for seed in SEEDS]
    verdicts = standard.bounded(
        {dtype: [run_torch(subject, a, dtype) for a in arrays] for dtype in dtypes},
        {dtype: [run_flax(subject, a, dtype, flax_compiled) for a in arrays] for dtype in dtypes},
        [run_oracle(subject, a) for a in arrays],
        dtypes[0],
    )
    standard.assert_holds(verdicts)


@pytest.mark.parametrize("subject", SUBJECTS, ids=lambda subject: subject.name)
def test_special_values(subject):
    assert_special_values(of_subject(subject))


@pytest.mark.parametrize("subject", SUBJECTS, ids=lambda subject: subject.name)
def test_steps_of_training(subject):
    assert_same_steps(of_subject(subject))


# Embeddings


def embed_pair(dtype="float32", num_members=3, size=(7, 5), **options):
    ours = nn.Embedding(*size, dtype=getattr(torch, dtype))
    theirs = without_draws(lambda: nnx.Embed(*size, param_dtype=jnp.dtype(dtype), rngs=nnx.Rngs(0)))
    pf.load_arrays(theirs, pt.to_arrays(ours))
    options = {"num_members": num_members} | options
    return TorchEmbed(ours, **options), FlaxEmbed(theirs, **options)


def dyadic(*shape):
    return np.random.default_rng(0).integers(-8, 9, shape) / 8


EMBED_OPTIONS = [
    {},
    {"init": "random_sign"},
    {"use_base_weights": True, "r_mean": 0.5, "r_std": 0.1, "s_mean": -1.0, "s_std": 2.0},
    {"rngs": 7, "size": (49, 1)},
    {"size": (1, 3)},
]


# Of bfloat16 and float16, which are drawn alike, one size each: JAX takes long to compile the draws of a shape.
EMBED_CASES = [
    *(("float32", options) for options in EMBED_OPTIONS),
    *(("bfloat16", options) for options in EMBED_OPTIONS if "size" not in options),
    *(("float16", options) for options in EMBED_OPTIONS if "size" not in options),
]


@pytest.mark.parametrize(("dtype", "options"), EMBED_CASES, ids=plain)
def test_one_seed_gives_one_embedding_bit_for_bit(dtype, options):
    ours, theirs = embed_pair(dtype, **options)
    a, b = pt.to_arrays(ours), pf.to_arrays(theirs)
    assert a.keys() == b.keys() == {"weight", "r", "s"}
    for name in a:
        assert a[name].dtype == b[name].dtype == jnp.dtype(dtype)
        np.testing.assert_array_equal(a[name], b[name])


def test_a_fresh_table_is_what_nnx_draws_by_default_and_follows_the_documented_order():
    rngs = pt.Rngs(3)
    layer = TorchEmbed(nn.Embedding(41, 7), rngs, num_members=2)
    assert int(rngs.default.count) == 3
    np.testing.assert_array_equal(layer.weight.detach(), nnx.Embed(41, 7, rngs=nnx.Rngs(3)).embedding[...])
    keys = [pt.random.fold_in(pt.random.key(3), i) for i in range(3)]
    assert torch.equal(layer.r, 1 + 0.5 * pt.random.normal(keys[1], (2, 41)))
    assert torch.equal(layer.s, 1 + 0.5 * pt.random.normal(keys[2], (2, 7)))


def test_float64_tables_agree_to_the_accuracy_of_normal():
    ours, theirs = embed_pair("float64", size=(47, 3))
    assert standard.ulps(ours.weight.detach().numpy(), np.asarray(theirs.embedding[...])).max() <= 3


@pytest.mark.parametrize("shape", [(6,), (6, 2), (6, 2, 3), (0,), (3, 0)])
def test_tokens_of_any_rank_and_none(shape):
    ours, theirs = embed_pair()
    assert ours(torch.ones(shape, dtype=int)).shape == (*shape, 5)
    assert jitted(theirs, np.ones(shape, int)).shape == (*shape, 5)


@pytest.mark.parametrize("dtype", ["uint8", "int8", "int32", "int64"])
def test_tokens_of_any_integer_dtype_that_the_base_layer_takes(dtype):
    ours, theirs = embed_pair(use_base_weights=True)
    x = np.arange(6).astype(dtype)
    expected = theirs(jax_of(np.arange(6)))
    np.testing.assert_array_equal(theirs(jax_of(x)), expected)
    if dtype.startswith("int") and dtype != "int8":
        np.testing.assert_array_equal(ours(torch.tensor(x)).detach(), expected)


def test_each_member_is_an_ordinary_embedding_exactly():
    ours, theirs = embed_pair()
    weights = {"r": dyadic(3, 7), "s": dyadic(3, 5), "weight": dyadic(7, 5)}
    ours.load_state_dict({name: torch.tensor(v) for name, v in weights.items()})
    pf.load_arrays(theirs, {name: v.astype("float32") for name, v in weights.items()})
    tokens = np.random.default_rng(0).integers(0, 7, (3, 2, 4))
    x, query = tokens.reshape(6, 4), dyadic(6, 4, 5)
    for i in range(3):
        a, b = ours.member(i), theirs.member(i)
        assert type(a) is nn.Embedding
        assert type(b) is nnx.Embed
        table = weights["weight"] * np.outer(weights["r"][i], weights["s"][i])
        np.testing.assert_array_equal(a.weight.detach(), table)
        np.testing.assert_array_equal(b.embedding[...], table)
        rows = slice(2 * i, 2 * i + 2)
        np.testing.assert_array_equal(ours(torch.tensor(x))[rows].detach(), a(torch.tensor(tokens[i])).detach())
        np.testing.assert_array_equal(np.asarray(theirs(jax_of(x)))[rows], b(jax_of(tokens[i])))
        answers = np.asarray(theirs.attend(jax_of(query, "float32")))[rows]
        np.testing.assert_array_equal(answers, b.attend(jax_of(query[rows], "float32")))
        np.testing.assert_array_equal(
            ours.attend(torch.tensor(query).float())[rows].detach(), query[rows] @ a.weight.detach().numpy().T
        )
    for layer in (ours, theirs):
        before = layer.member(2)
        layer.keep_members([2, 0])
        assert layer.num_members == 2
        assert layer.r.shape == (2, 7)
        name = "weight" if layer is ours else "embedding"
        np.testing.assert_array_equal(
            np.asarray(getattr(layer.member(0), name).detach() if layer is ours else layer.member(0).embedding[...]),
            np.asarray(getattr(before, name).detach() if layer is ours else before.embedding[...]),
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
    ids=plain,
)
def test_torch_options_give_the_gradients_of_e_tables(options):
    base = nn.Embedding(6, 4, dtype=torch.float64, **options)
    layer = TorchEmbed(base, num_members=3, use_base_weights=True)
    member = layer.member(1)
    for name in ("padding_idx", "scale_grad_by_freq", "sparse", "norm_type", "max_norm"):
        assert getattr(member, name) == getattr(base, name)
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
        fresh = TorchEmbed(base, num_members=3)
        assert not fresh.weight[base.padding_idx].any()
        assert not fresh(torch.full((3,), base.padding_idx)).any()


def test_torch_scaled_gradients_under_vmap_and_twice():
    layer = TorchEmbed(nn.Embedding(6, 4, scale_grad_by_freq=True, dtype=torch.float64), num_members=2)
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


def test_the_base_embedding_is_copied_and_left_alone():
    base = nn.Embedding(7, 5, padding_idx=1)
    base.weight.requires_grad_(False)
    base.eval()
    before = base.weight.clone()
    for use_base_weights in (True, False):
        layer = TorchEmbed(base, num_members=3, use_base_weights=use_base_weights)
        assert not layer.weight.requires_grad
        assert not layer.member(0).weight.requires_grad
        assert layer.r.requires_grad
        assert not layer.training
        assert not layer.member(0).training
        layer.weight.zero_()
        assert torch.equal(base.weight, before)
    theirs = nnx.Embed(7, 5, rngs=nnx.Rngs(0))
    before = np.array(theirs.embedding[...])
    layer = FlaxEmbed(theirs, num_members=3, use_base_weights=True)
    layer.embedding[...] = jax_of(np.zeros_like(before))
    np.testing.assert_array_equal(theirs.embedding[...], before)
    layer = TorchEmbed(nn.Embedding(7, 5, device="meta"), num_members=3)
    assert {p.device.type for p in layer.parameters()} == {"meta"}


def test_tokens_out_of_range_as_the_base_layers():
    ours, theirs = embed_pair()
    for token in (7, -1):
        with pytest.raises(IndexError):
            ours(torch.full((3,), token))
    assert np.isnan(theirs(jax_of(np.full(3, 7)))).all()
    np.testing.assert_array_equal(theirs(jax_of(np.full(3, -1))), theirs(jax_of(np.full(3, 6))))
    one = embed_pair(size=(1, 5))[1]
    for token in (3, -4):  # nnx.Embed gives the only row for every token
        outside, first = jax_of(np.full(3, token)), jax_of(np.zeros(3, int))
        np.testing.assert_array_equal(one(outside), one(first))
        np.testing.assert_array_equal(one.member(1)(outside), one.member(1)(first))


@pytest.mark.parametrize("amp", [torch.bfloat16, torch.float16])
def test_embeddings_under_autocast_have_the_dtype_of_the_base_layer(amp):
    base = nn.Embedding(7, 5)
    layer = TorchEmbed(base, num_members=3)
    x = torch.ones(6, dtype=int)
    with torch.autocast("cpu", amp):
        assert layer(x).dtype == base(x).dtype
        assert layer.attend(torch.ones(6, 5)).dtype == nn.functional.linear(torch.ones(6, 5), base.weight).dtype


@pytest.mark.parametrize("dtype", [None, "float32", "bfloat16"])
@pytest.mark.parametrize("param_dtype", ["float32", "bfloat16"])
def test_flax_embeddings_have_the_dtype_of_the_base_layer(dtype, param_dtype):
    seen = []

    def promote_dtype(arrays, **options):
        seen.append((len(arrays), options))
        return nnx.nn.dtypes.promote_dtype(arrays, **options)

    options = {"dtype": dtype, "param_dtype": param_dtype, "promote_dtype": promote_dtype}
    base = without_draws(lambda: nnx.Embed(7, 5, **options, rngs=nnx.Rngs(0)))
    layer = FlaxEmbed(base, num_members=3)
    x, query = np.ones(6, int), np.ones((6, 5), "float32")
    with jax.numpy_dtype_promotion("standard"):
        for ours, theirs, inputs in (
            (layer, base, x),
            (layer.attend, base.attend, query),
            (layer.member(0), base, x),
        ):
            assert jax.eval_shape(ours, inputs).dtype == jax.eval_shape(theirs, inputs).dtype
    assert seen[:4] == [seen[0], seen[0], seen[2], seen[2]]
    assert seen[0] == (1, {"dtype": base.dtype, "inexact": False})


def test_embeddings_are_citizens_of_their_frameworks(tmp_path):
    ours, theirs = embed_pair()
    x = np.random.default_rng(0).integers(0, 7, (6, 4))
    y = ours(torch.tensor(x))
    for variant in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert torch.equal(variant(torch.tensor(x)), y)
    other = embed_pair(rngs=9)[0]
    other.load_state_dict(ours.state_dict())
    assert torch.equal(other(torch.tensor(x)), y)
    assert torch.equal(torch.export.export(ours, (torch.tensor(x),)).module()(torch.tensor(x)), y)
    assert "num_members=3" in repr(ours)
    tokens = jax_of(x)
    y = theirs(tokens)
    assert isinstance(theirs, nnx.Embed)
    for variant in (nnx.merge(*nnx.split(theirs)), nnx.clone(theirs), pickle.loads(pickle.dumps(theirs))):
        np.testing.assert_array_equal(variant(tokens), y)
    assert_close(jitted(theirs, tokens), y, "float32")
    grads = nnx.eval_shape(nnx.grad(lambda layer: layer(tokens).sum()), theirs)
    assert {path[-1] for path, _ in nnx.to_flat_state(grads)} == {"embedding", "r", "s"}
    stacked = nnx.vmap(lambda rngs: FlaxEmbed(nnx.Embed(7, 5, rngs=rngs), rngs=rngs, num_members=3))
    assert nnx.eval_shape(stacked, nnx.Rngs(0).split(4)).r.shape == (4, 3, 7)
    pf.save_weights(theirs, tmp_path / "embed.safetensors")
    pt.load_weights(other, tmp_path / "embed.safetensors")
    assert torch.equal(other.r, ours.r)


def test_the_sharding_of_an_embedding_is_kept():
    mesh = jax.make_mesh((1, 1), ("data", "model"), axis_types=(jax.sharding.AxisType.Explicit,) * 2)
    with jax.set_mesh(mesh):
        metadata = {"out_sharding": ("data", "model")}
        base = nnx.Embed(7, 5, rngs=nnx.Rngs(0), embedding_metadata=metadata)
        layer = FlaxEmbed(base, num_members=2)
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


# Normalisations


def torch_values(layer):
    return {name: value.detach().double().numpy() for name, value in layer.state_dict().items()}


def randomize(layer, seed=0):
    """Draws weights and statistics that differ between members, the variances positive."""
    rng = np.random.default_rng(seed)
    if isinstance(layer, nn.Module):
        with torch.no_grad():
            for value in layer.state_dict().values():
                if value.is_floating_point():
                    value.copy_(torch.tensor(rng.uniform(0.5, 2.0, value.shape)))
    else:
        for name in ("scale", "bias", "mean", "var"):
            variable = getattr(layer, name, None)
            if variable is not None:
                variable[...] = jax_of(rng.uniform(0.5, 2.0, variable.shape), variable.dtype)
    return layer


NORMS = {
    "BatchNorm1d": (lambda **o: nn.BatchNorm1d(4, **o), TorchBatchNorm, (15, 4)),
    "BatchNorm1d-3d": (lambda **o: nn.BatchNorm1d(4, **o), TorchBatchNorm, (6, 4, 5)),
    "BatchNorm2d": (lambda **o: nn.BatchNorm2d(4, **o), TorchBatchNorm, (6, 4, 5, 3)),
    "BatchNorm3d": (lambda **o: nn.BatchNorm3d(4, **o), TorchBatchNorm, (6, 4, 2, 3, 2)),
    "LayerNorm": (lambda **o: nn.LayerNorm(4, **o), TorchLayerNorm, (6, 3, 4)),
    "LayerNorm-2d": (lambda **o: nn.LayerNorm((3, 4), **o), TorchLayerNorm, (6, 2, 3, 4)),
    "GroupNorm": (lambda **o: nn.GroupNorm(2, 4, **o), TorchGroupNorm, (6, 4, 5, 3)),
}
AFFINE = [{}, {"eps": 0.1}, {"bias": False}, {"affine": False}, {"dtype": torch.bfloat16}]
STATISTICS = [{"momentum": 0.3}, {"momentum": None}, {"track_running_stats": False}, {"momentum": 0.0}]
TORCH_CASES = [
    (name, options) for name in NORMS for options in AFFINE + (STATISTICS if name.startswith("Batch") else [])
]


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize(("name", "options"), TORCH_CASES, ids=plain)
def test_each_torch_member_is_the_ordinary_layer_over_several_steps(name, options, last):
    make, layer_type, shape = NORMS[name]
    options = dict(options)
    if "LayerNorm" in name and "affine" in options:
        options["elementwise_affine"] = options.pop("affine")
    without_bias = options.pop("bias", None) is False  # an argument of torch's newest norms only
    base = make(**options)
    if without_bias:
        base.bias = None
    layer = randomize(layer_type(base, 3))
    dtype = next((v.dtype for v in base.state_dict().values()), torch.float32)
    ordinary = [layer.member(i) for i in range(3)]
    assert {type(each) for each in ordinary} == {type(base)}
    assert {repr(each) for each in ordinary} == {repr(base)}
    for step in range(3):
        for training in (True, False):
            torch.manual_seed(step)
            x = (torch.randn(shape, dtype=torch.float64) + 3).to(dtype)
            if last and x.ndim in (4, 5):
                x = x.to(memory_format={4: torch.channels_last, 5: torch.channels_last_3d}[x.ndim])
            inputs = [x.clone().requires_grad_() for _ in range(2)]
            y = layer.train(training)(inputs[0])
            own = [each.train(training)(rows) for each, rows in zip(ordinary, inputs[1].chunk(3), strict=True)]
            expected = torch.cat(own)
            assert y.stride() == expected.stride()
            assert y.dtype == expected.dtype
            low = str(dtype).removeprefix("torch.")
            assert_close(y.detach().double().numpy(), expected.detach().double().numpy(), low)
            g = torch.randn(shape, dtype=torch.float64).to(dtype)
            y.backward(g)
            expected.backward(g)
            assert_close(inputs[0].grad.double().numpy(), inputs[1].grad.double().numpy(), low)
    for i, each in enumerate(ordinary):
        values, member = torch_values(each), torch_values(layer.member(i))
        assert values.keys() == member.keys() == base.state_dict().keys()
        for key in values:
            assert_close(member[key], values[key], low)
        for key, parameter in each.named_parameters():
            assert_close(getattr(layer, key).grad[i].double().numpy(), parameter.grad.double().numpy(), low)
    if layer_type is TorchBatchNorm and options.get("track_running_stats", True):
        assert int(layer.num_batches_tracked) == 3
        moved = options.get("momentum", 0.1) != 0.0
        assert moved == bool((layer.running_mean != randomize(layer_type(base, 3)).running_mean).all())


def flax_bases(**options):
    options = {"rngs": nnx.Rngs(0)} | options
    return {
        "BatchNorm": (lambda **o: nnx.BatchNorm(4, **options, **o), FlaxBatchNorm),
        "LayerNorm": (lambda **o: nnx.LayerNorm(4, **options, **o), FlaxLayerNorm),
        "GroupNorm": (lambda **o: nnx.GroupNorm(4, num_groups=2, **options, **o), FlaxGroupNorm),
    }


FLAX_OPTIONS = [
    {},
    {"epsilon": 0.1},
    {"use_bias": False},
    {"use_scale": False},
    {"use_scale": False, "use_bias": False},
    {"use_fast_variance": False},
    {"dtype": jnp.bfloat16},
    {"param_dtype": jnp.bfloat16},
    {"promote_dtype": lambda arrays, dtype: arrays},
]
FLAX_CASES = [
    *((name, options) for name in flax_bases() for options in FLAX_OPTIONS),
    ("BatchNorm", {"momentum": 0.5}),
    ("BatchNorm", {"axis": 1}),
    ("BatchNorm", {"use_running_average": None}),
    ("LayerNorm", {"reduction_axes": (1, 2)}),
    ("LayerNorm", {"reduction_axes": (-2, -1), "feature_axes": (1,)}),
    ("GroupNorm", {"reduction_axes": (1, 2, -1)}),
]


# Masks of fewer axes, which our layers spread over the members: with the options that change the axes.
FLAX_MASKED = [
    (name, options, masked)
    for name, options in FLAX_CASES
    for masked in (None, "rows", "shared", "row")
    if masked in (None, "rows") or not options or any("ax" in option for option in options)
]


@pytest.mark.parametrize(("name", "options", "masked"), FLAX_MASKED, ids=plain)
def test_each_flax_member_is_the_ordinary_layer_over_several_steps(name, options, masked):
    make, layer_type = flax_bases()[name]
    base = make(**options)
    layer = randomize(layer_type(base, 3))
    ordinary = [layer.member(i) for i in range(3)]
    assert {type(each) for each in ordinary} == {getattr(nnx, name)}
    for key, value in vars(base).items():
        if not (key.startswith("_") or isinstance(value, nnx.Variable)):
            assert getattr(layer, key) == getattr(ordinary[1], key) == value
    rng = np.random.default_rng(0)
    signs = (-1.0) ** np.indices((6, 4, 5, 4)).sum(0)  # no variance is near 0, where the fast one cancels
    call = {"use_running_average": False} if "use_running_average" in options else {}
    with jax.numpy_dtype_promotion("standard"):  # of nnx's own arithmetic
        for _ in range(3):
            for training in (True, False):
                x = (signs * rng.uniform(0.5, 1.5, signs.shape)).astype("float32")
                mask, own_masks = None, [None] * 3
                if masked:
                    shape = {"rows": x.shape, "shared": (4, 5, 4), "row": (1, 4, 5, 4)}[masked]
                    mask = rng.random(shape) < 0.7
                    mask[..., :3] = True  # a variance of some values
                    own_masks = [jax_of(m) for m in (mask.reshape(3, 2, 4, 5, 4) if masked == "rows" else [mask] * 3)]
                    mask = jax_of(mask)
                    if name == "GroupNorm" and masked == "shared":
                        continue  # nnx.GroupNorm itself takes masks of the inputs' rank only
                if call:
                    call = {"use_running_average": not training}
                for each in (layer, *ordinary):
                    if not call:
                        each.train() if training else each.eval()
                y = np.asarray(layer(jax_of(x), mask=mask, **call))
                own_rows = map(jax_of, np.split(x, 3))
                own = [each(x, mask=m, **call) for each, x, m in zip(ordinary, own_rows, own_masks, strict=True)]
                expected = np.concatenate(own)
                assert y.dtype == expected.dtype
                assert_close(y, expected, y.dtype.name)
    for i, each in enumerate(ordinary):
        for path, value in nnx.to_flat_state(nnx.state(each)):
            assert_close(np.asarray(getattr(layer, path[0]))[i], np.asarray(value), value.dtype.name)
        assert nnx.state(layer.member(i)).keys() == nnx.state(each).keys()
    if name == "BatchNorm":
        assert (np.asarray(layer.mean) != np.asarray(randomize(layer_type(make(**options), 3)).mean)).all()


def test_running_statistics_of_both_frameworks_over_several_steps():
    ours = TorchBatchNorm(nn.BatchNorm2d(4, dtype=torch.float64), 3)
    base = nnx.BatchNorm(4, momentum=0.9, use_fast_variance=False, param_dtype="float64", rngs=nnx.Rngs(0))
    # nnx's own are float32 always
    base.mean, base.var = nnx.BatchStat(jax_of(np.zeros(4))), nnx.BatchStat(jax_of(np.ones(4)))
    theirs = FlaxBatchNorm(base, 3)
    mean, var_torch, var_flax = np.zeros((3, 4)), np.ones((3, 4)), np.ones((3, 4))
    for seed in range(4):
        x = np.random.default_rng(seed).standard_normal((6, 4, 3, 2)) * 2 + 1
        ours(torch.tensor(x))
        with jax.numpy_dtype_promotion("standard"):  # of nnx's own arithmetic
            jitted(theirs, np.moveaxis(x, 1, -1))
        _, var_torch = oracle_norm.running_statistics(x, mean, var_torch, 0.1, unbiased=True)
        mean, var_flax = oracle_norm.running_statistics(x, mean, var_flax, 0.1, unbiased=False)
    for value, expected in (
        (ours.running_mean, mean),
        (ours.running_var, var_torch),
        (theirs.mean[...], mean),
        (theirs.var[...], var_flax),
    ):
        assert_close(np.asarray(value), expected, "float64")


@jax.numpy_dtype_promotion("standard")  # of nnx's own arithmetic
def test_designed_rows_are_exact_in_both_frameworks():
    """Rows of +-1/2 have mean 0 and variance 1/4; with epsilon 3/4 nothing is rounded."""
    rng = np.random.default_rng(0)
    signs = np.stack([rng.permuted([0.5, -0.5] * 4) for _ in range(48)])
    weight, bias = dyadic(3, 8), -dyadic(3, 8)
    for dtype in ("float32", "float64"):
        x = signs.reshape(6, 8, 8)
        ours = TorchLayerNorm(nn.LayerNorm(8, eps=0.75, dtype=getattr(torch, dtype)), 3)
        ours.load_state_dict({"weight": torch.tensor(weight), "bias": torch.tensor(bias)})
        base = nnx.LayerNorm(8, epsilon=0.75, param_dtype=dtype, rngs=nnx.Rngs(0))
        theirs = with_arrays(FlaxLayerNorm(base, 3), scale=jax_of(weight, dtype), bias=jax_of(bias, dtype))
        expected = (x.reshape(3, 2, 8, 8) * weight[:, None, None] + bias[:, None, None]).reshape(x.shape)
        tensor, array = torch.tensor(x, dtype=getattr(torch, dtype)), x.astype(dtype)
        np.testing.assert_array_equal(ours(tensor).detach(), expected)
        np.testing.assert_array_equal(jitted(theirs, array), expected)
        for i in range(3):
            rows = slice(2 * i, 2 * i + 2)
            np.testing.assert_array_equal(ours.member(i)(tensor[rows]).detach(), expected[rows])
            np.testing.assert_array_equal(jitted(theirs.member(i), array[rows]), expected[rows])
        # The rows as columns: BatchNorm over 8 rows of each of 6 members, 8 channels.
        x = signs.reshape(6, 8, 8).transpose(0, 2, 1).reshape(48, 8)
        ours = TorchBatchNorm(nn.BatchNorm1d(8, eps=0.75, momentum=0.5, dtype=getattr(torch, dtype)), 6)
        theirs = FlaxBatchNorm(nnx.BatchNorm(8, epsilon=0.75, momentum=0.5, rngs=nnx.Rngs(0)), 6)
        theirs.mean, theirs.var = (nnx.BatchStat(jax_of(np.asarray(v), dtype)) for v in (theirs.mean, theirs.var))
        weight6, bias6 = dyadic(6, 8), -dyadic(6, 8)
        with_tensors(
            ours, **{n: torch.tensor(v, dtype=getattr(torch, dtype)) for n, v in (("weight", weight6), ("bias", bias6))}
        )
        with_arrays(theirs, scale=jax_of(weight6, dtype), bias=jax_of(bias6, dtype))
        expected = (x.reshape(6, 8, 8) * weight6[:, None] + bias6[:, None]).reshape(x.shape)
        np.testing.assert_array_equal(ours(torch.tensor(x, dtype=getattr(torch, dtype))).detach(), expected)
        np.testing.assert_array_equal(jitted(theirs, x.astype(dtype)), expected)
        np.testing.assert_array_equal(ours.running_mean, theirs.mean[...])
        np.testing.assert_array_equal(theirs.var[...], np.full((6, 8), 0.5 * 1 + 0.5 * 0.25))


def test_norms_are_copies_that_leave_the_base_layer_alone():
    for make, layer_type, shape in NORMS.values():
        base = randomize(make())
        base.weight.requires_grad_(False)
        base.eval()
        before = copy.deepcopy(base.state_dict())
        layer = layer_type(base, 3)
        assert not layer.training
        assert not layer.weight.requires_grad
        assert layer.bias.requires_grad
        assert not layer.member(1).weight.requires_grad
        for name, value in before.items():
            assert all(torch.equal(each, value) for each in (getattr(layer, name) if value.ndim else [value] * 3))
        layer.train()(torch.randn(shape))
        with torch.no_grad():
            for value in layer.state_dict().values():
                value.zero_()
        assert all(torch.equal(value, before[name]) for name, value in base.state_dict().items())
        assert {v.device.type for v in layer_type(make(device="meta"), 3).state_dict().values()} == {"meta"}
    for make, layer_type in flax_bases().values():
        base = randomize(make())
        before = jax.tree.map(np.array, nnx.to_pure_dict(nnx.state(base)))
        layer = layer_type(base, 3)
        for name, value in before.items():
            np.testing.assert_array_equal(getattr(layer, name)[...], np.stack([value] * 3))
            getattr(layer, name)[...] = jax_of(np.zeros((3, 4), value.dtype))
            np.testing.assert_array_equal(getattr(base, name)[...], value)


@pytest.mark.parametrize("name", NORMS)
def test_torch_norms_keep_members_and_are_citizens(name):
    make, layer_type, shape = NORMS[name]
    layer = randomize(layer_type(make(), 3)).eval()
    x = torch.randn(shape)
    y = layer(x)
    for variant in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(variant(x), y)
    other = layer_type(make(), 3).eval()
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), y)
    assert torch.equal(torch.export.export(layer, (x,)).module()(x), y)
    assert "num_members=3" in repr(layer)
    members = {i: torch_values(layer.member(i)) for i in range(3)}
    layer.keep_members([2, 0])
    assert layer.num_members == 2
    assert layer(x[: len(x) // 3 * 2]).shape[0] == len(x) // 3 * 2
    for new, old in enumerate((2, 0)):
        for key, value in torch_values(layer.member(new)).items():
            np.testing.assert_array_equal(value, members[old][key])
    bare = layer_type(make(**({"elementwise_affine": False} if "Layer" in name else {"affine": False})), 3)
    bare.keep_members([1])
    assert bare.weight is None
    assert bare.num_members == 1


@pytest.mark.parametrize("name", flax_bases())
def test_flax_norms_keep_members_and_are_citizens(name):
    make, layer_type = flax_bases()[name]
    layer = randomize(layer_type(make(), 3))
    assert isinstance(layer, getattr(nnx, name))
    x = jax_of(np.random.default_rng(0).standard_normal((6, 5, 4)), "float32")
    layer.eval()
    y = jitted(layer, x)
    for variant in (nnx.merge(*nnx.split(layer)), nnx.clone(layer), pickle.loads(pickle.dumps(layer))):
        np.testing.assert_array_equal(jitted(variant, x), y)
    layer.train()
    expected = nnx.clone(layer)
    y = expected(x)
    assert_close(jitted(layer, x), y, "float32")
    for path, value in nnx.to_flat_state(nnx.state(expected)):  # the jitted step updates the statistics
        assert_close(np.asarray(getattr(layer, path[0])), np.asarray(value), "float32")
    grads = nnx.eval_shape(nnx.grad(lambda layer: (layer(x) ** 2).sum()), layer)
    assert {path[-1] for path, _ in nnx.to_flat_state(grads)} == {"scale", "bias"}
    if name == "BatchNorm":
        np.testing.assert_array_equal(nnx.view(layer, use_running_average=True)(x), nnx.clone(layer)(x, True))
        layer.eval()
        before = np.array(layer.mean)
        jax.jit(lambda x: layer(x))(x)  # in eval mode nothing is written, so that jax.jit may close over the layer
        np.testing.assert_array_equal(layer.mean[...], before)
    members = {i: jax.tree.map(np.array, nnx.to_pure_dict(nnx.state(layer.member(i)))) for i in range(3)}
    layer.keep_members([2, 0])
    assert jitted(layer, np.asarray(x)[:4]).shape == (4, 5, 4)
    for new, old in enumerate((2, 0)):
        for key, value in nnx.to_pure_dict(nnx.state(layer.member(new))).items():
            np.testing.assert_array_equal(value, members[old][key])


def test_flax_batch_norm_takes_its_statistics_over_devices_too():
    layer = FlaxBatchNorm(nnx.BatchNorm(4, axis_name="devices", rngs=nnx.Rngs(0)), 3)
    x = np.random.default_rng(0).standard_normal((2, 6, 4)).astype("float32")
    y = np.asarray(jax.jit(jax.vmap(lambda x: nnx.clone(layer)(x), axis_name="devices"))(x))
    alone = FlaxBatchNorm(nnx.BatchNorm(4, rngs=nnx.Rngs(0)), 3)
    rows = x.reshape(2, 3, 2, 4).transpose(1, 0, 2, 3).reshape(12, 4)  # each member's rows of both devices
    expected = np.asarray(jitted(alone, rows)).reshape(3, 2, 2, 4).transpose(1, 0, 2, 3).reshape(2, 6, 4)
    assert_close(y, expected, "float32")


def test_flax_batch_norm_takes_its_statistics_over_groups_of_devices():
    groups = {"axis_name": "devices", "axis_index_groups": [[0, 2], [1, 3]]}
    layer = FlaxBatchNorm(nnx.BatchNorm(4, **groups, rngs=nnx.Rngs(0)), 3)
    x = np.random.default_rng(0).standard_normal((4, 6, 4)).astype("float32")

    def each_device(norm, x):
        return jax.pmap(lambda x: nnx.clone(norm)(x), axis_name="devices", devices=jax.devices("cpu")[:4])(x)

    members = [each_device(layer.member(i), x[:, 2 * i : 2 * i + 2]) for i in range(3)]
    assert_close(np.asarray(each_device(layer, x)), np.concatenate(members, 1), "float32")
    assert layer.member(0).axis_index_groups == groups["axis_index_groups"]


def test_the_sharding_of_a_norm_is_kept():
    mesh = jax.make_mesh((1,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
    with jax.set_mesh(mesh):
        metadata = {"scale_metadata": {"out_sharding": ("model",)}, "bias_metadata": {"out_sharding": ("model",)}}
        for make, layer_type in flax_bases(**metadata).values():
            layer = layer_type(make(), 2)
            assert (
                layer.scale.get_metadata("out_sharding") == layer.bias.get_metadata("out_sharding") == (None, "model")
            )
            assert layer.member(0).scale.get_metadata("out_sharding") == ("model",)
            assert jitted(layer, np.ones((4, 3, 4), "float32")).shape == (4, 3, 4)


@pytest.mark.parametrize("param_dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", NORMS)
def test_torch_norms_take_and_give_the_dtypes_of_the_base_layer(name, param_dtype):
    make, layer_type, shape = NORMS[name]
    base = make(dtype=param_dtype)
    layer = layer_type(base, 3)
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        x = torch.randn(shape).to(dtype)
        for amp in (False, True):
            with torch.autocast("cpu", torch.bfloat16, enabled=amp):
                try:
                    expected = base(x).dtype
                except RuntimeError:
                    with pytest.raises(TypeError, match="Convert them"):
                        layer(x)
                else:
                    assert layer(x).dtype == expected


def test_one_value_for_each_member_as_the_base_layers():
    batch_norm = TorchBatchNorm(nn.BatchNorm1d(4), 3)
    count = int(batch_norm.num_batches_tracked)
    for shape in ((3, 4), (3, 4, 1)):
        with pytest.raises(ValueError, match="more than 1 value in each channel"):
            batch_norm(torch.ones(shape))
    assert int(batch_norm.num_batches_tracked) == count
    batch_norm.eval()(torch.ones(3, 4))
    batch_norm.train()(torch.ones(3, 4, 2))
    group_norm = TorchGroupNorm(nn.GroupNorm(4, 4), 3)
    with pytest.raises(ValueError, match="more than 1 value in each group"):
        group_norm(torch.ones(3, 4))
    group_norm(torch.ones(6, 4))
    TorchGroupNorm(nn.GroupNorm(2, 4), 3)(torch.ones(3, 4))
    assert TorchLayerNorm(nn.LayerNorm(4), 3)(torch.ones(3, 4)).shape == (3, 4)
    with pytest.raises(ValueError, match="more than 1 value"):
        TorchBatchNorm(nn.BatchNorm1d(4, track_running_stats=False).eval(), 3)(torch.ones(3, 4))
    for make, layer_type in flax_bases().values():  # which take a variance of 0
        layer = randomize(layer_type(make(), 3))
        own = [layer.member(i) for i in range(3)]
        x = np.ones((3, 4), "float32")
        expected = np.concatenate([jitted(member, x[:1]) for member in own])
        assert_close(jitted(layer, x), expected, "float32")


def test_no_rows():
    for make, layer_type, shape in NORMS.values():
        base, layer = make(), layer_type(make(), 3)
        x = torch.ones(0, *shape[1:])
        assert layer(x).shape == base(x).shape == x.shape
        for name, value in base.state_dict().items():
            expected = value.expand(3, *value.shape) if value.ndim else value
            assert torch.equal(layer.state_dict()[name], expected)


def test_statistics_that_the_base_layer_no_longer_tracks_stay():
    base = randomize(nn.BatchNorm1d(4))
    base.track_running_stats = False  # a way to freeze them
    layer = TorchBatchNorm(base, 3)
    own, x = layer.member(1), torch.randn(6, 4)
    for training in (True, False):
        expected = own.train(training)(x[2:4])
        assert_close(layer.train(training)(x)[2:4].detach().numpy(), expected.detach().numpy(), "float32")
    for name, value in base.state_dict().items():
        assert torch.equal(layer.state_dict()[name], value.expand(3, *value.shape) if value.ndim else value)
        assert torch.equal(own.state_dict()[name], value)
    layer.reset_running_stats()
    assert torch.equal(layer.running_mean[2], base.running_mean)


def test_weights_without_a_count_load_as_into_the_base_layer():
    layer = TorchBatchNorm(nn.BatchNorm1d(4), 3)
    layer(torch.randn(6, 4))
    arrays = {name: value + 1 for name, value in layer.state_dict().items() if name != "num_batches_tracked"}
    for model, prefix in ((layer, ""), (nn.Sequential(copy.deepcopy(layer)), "0.")):
        model.load_state_dict({prefix + name: value for name, value in arrays.items()})
        assert torch.equal(model.state_dict()[f"{prefix}running_mean"], arrays["running_mean"])
        assert int(model.state_dict()[f"{prefix}num_batches_tracked"]) == 1
    layer.reset_running_stats()
    assert int(layer.num_batches_tracked) == 0
    assert (layer.running_var == 1).all()


def test_weights_pass_between_the_frameworks():
    pairs = (
        (TorchBatchNorm(nn.BatchNorm1d(4), 3), FlaxBatchNorm(nnx.BatchNorm(4, rngs=nnx.Rngs(0)), 3)),
        (TorchLayerNorm(nn.LayerNorm(4), 3), FlaxLayerNorm(nnx.LayerNorm(4, rngs=nnx.Rngs(0)), 3)),
        (TorchGroupNorm(nn.GroupNorm(2, 4), 3), FlaxGroupNorm(nnx.GroupNorm(4, num_groups=2, rngs=nnx.Rngs(0)), 3)),
        (nn.BatchNorm1d(4), nnx.BatchNorm(4, rngs=nnx.Rngs(0))),
    )
    for ours, theirs in pairs:
        arrays = pt.to_arrays(randomize(ours))
        if "num_batches_tracked" in arrays:  # which nnx has not
            arrays["num_batches_tracked"] = np.zeros((), "int64")
        pf.load_arrays(theirs, arrays)
        back = pf.to_arrays(theirs)
        assert back.keys() == arrays.keys()
        for name, value in arrays.items():
            np.testing.assert_array_equal(back[name], value)
        ours.load_state_dict({name: torch.tensor(value) for name, value in back.items()})


# Bad input


def torch_zeros(*shape, dtype="float32"):
    return torch.zeros(shape, dtype=getattr(torch, dtype))


def flax_zeros(*shape, dtype="float32"):
    return jax_of(np.zeros(shape, dtype))


def layers(kind):
    rngs = nnx.Rngs(0)
    return {
        "embed": (TorchEmbed, nn.Embedding(7, 5), FlaxEmbed, without_draws(lambda: nnx.Embed(7, 5, rngs=nnx.Rngs(0)))),
        "batch": (TorchBatchNorm, nn.BatchNorm1d(5), FlaxBatchNorm, nnx.BatchNorm(5, rngs=rngs)),
        "layer": (TorchLayerNorm, nn.LayerNorm(5), FlaxLayerNorm, nnx.LayerNorm(5, rngs=rngs)),
        "group": (TorchGroupNorm, nn.GroupNorm(1, 5), FlaxGroupNorm, nnx.GroupNorm(5, num_groups=1, rngs=rngs)),
    }[kind]


TILE, ONE = "call tile_members(x, 4).", "call tile_members(x[None], 4)."
BAD_CALLS = [
    ("embed", lambda layer, zeros: layer(zeros(6, dtype="int32")), ValueError, TILE),
    ("embed", lambda layer, zeros: layer(zeros(dtype="int32")), ValueError, ONE),
    ("embed", lambda layer, zeros: layer(zeros(8)), TypeError, "of one-hot vectors, x.argmax(-1)."),
    ("embed", lambda layer, zeros: layer(zeros(8, dtype="bool")), TypeError, "of one-hot vectors, x.argmax(-1)."),
    ("embed", lambda layer, zeros: layer.attend(zeros(6, 5)), ValueError, TILE),
    ("embed", lambda layer, zeros: layer.attend(zeros(5)), ValueError, ONE),
    ("embed", lambda layer, zeros: layer.attend(zeros(8, 7)), ValueError, "x[..., :5]."),
    *(
        (kind, call, ValueError, end)
        for kind in ("batch", "layer", "group")
        for call, end in (
            (lambda layer, zeros: layer(zeros(6, 5)), TILE),
            (lambda layer, zeros: layer(zeros(8, 6)), "with num_features=6."),
            (lambda layer, zeros: layer(zeros(8, 1)), "with num_features=1."),
        )
    ),
    *((kind, lambda layer, zeros: layer(zeros(5)), ValueError, ONE) for kind in ("layer", "group")),
    *(
        (kind, lambda layer, zeros: layer.member(4), IndexError, "Call model[3].")
        for kind in ("embed", "batch", "layer", "group")
    ),
    *(
        (kind, lambda layer, zeros: layer.keep_members([]), ValueError, "Call model[[0]].")
        for kind in ("embed", "batch", "layer", "group")
    ),
]


@pytest.mark.parametrize(("kind", "call", "error", "end"), BAD_CALLS)
def test_bad_calls_have_one_sentence_in_both(kind, call, error, end):
    torch_type, torch_base, flax_type, flax_base = layers(kind)
    sentences = []
    for layer, zeros in (
        (torch_type(torch_base, num_members=4), torch_zeros),
        (flax_type(flax_base, num_members=4), flax_zeros),
    ):
        with pytest.raises(error) as raised:
            call(layer, zeros)
        assert type(raised.value) is error
        sentences.append(str(raised.value))
    assert sentences[0] == sentences[1]
    assert sentences[0].endswith(end)
    assert " expects " in sentences[0]
    assert "got " in sentences[0]


@pytest.mark.parametrize("kind", ["embed", "batch", "layer", "group"])
def test_bad_constructions_have_one_sentence_in_both(kind):
    torch_type, torch_base, flax_type, flax_base = layers(kind)
    calls = [
        (lambda make, base, linear: make(linear, num_members=4), TypeError),
        (lambda make, base, linear: make(base, num_members=0), ValueError),
        (lambda make, base, linear: make(base, num_members=2.5), TypeError),
        (lambda make, base, linear: make(make(base, num_members=2), num_members=2), TypeError),
    ]
    if kind == "embed":
        calls += [
            (lambda make, base, linear: make(base, 4), TypeError),
            (lambda make, base, linear: make(base, "0", num_members=4), TypeError),
            (lambda make, base, linear: make(base, num_members=4, init="gaussian"), ValueError),
            (lambda make, base, linear: make(base, num_members=4, r_std=-0.5), ValueError),
        ]
    for number, (call, error) in enumerate(calls):
        sentences = []
        for make, base, linear in (
            (torch_type, torch_base, nn.Linear(2, 2)),
            (flax_type, flax_base, without_draws(lambda: nnx.Linear(2, 2, rngs=nnx.Rngs(0)))),
        ):
            with pytest.raises(error) as raised:
                call(make, base, linear)
            sentences.append(str(raised.value))
        if number != 3:  # a layer of ours is an nnx.Embed too, with a __call__ of its own, and no nn.Embedding
            assert sentences[0] == sentences[1]
        assert " expects " in sentences[0]


def test_what_only_one_framework_refuses():
    with pytest.raises(ValueError, match=r"without max_norm.*got max_norm=1.0. Unset it: base_layer.max_norm = None."):
        TorchEmbed(nn.Embedding(7, 5, max_norm=1.0), num_members=2)
    with pytest.raises(TypeError, match="floating dtype"):
        TorchEmbed(nn.Embedding.from_pretrained(torch.ones(7, 5, dtype=int)), num_members=2)
    for base in (nn.SyncBatchNorm(4), nn.LazyBatchNorm1d(), nn.InstanceNorm1d(4)):
        with pytest.raises(TypeError, match="to be a BatchNorm layer; got "):
            TorchBatchNorm(base, 2)

    class Shifted(nn.LayerNorm):
        def forward(self, x):
            return super().forward(x) + 1

    with pytest.raises(TypeError, match="a forward of its own"):
        TorchLayerNorm(Shifted(4), 2)
    for layer, shape in (
        (nn.BatchNorm1d(4), (4, 4, 2, 2)),
        (nn.BatchNorm1d(4), (4,)),
        (nn.BatchNorm2d(4), (4, 4, 2)),
        (nn.BatchNorm3d(4), (4, 4, 2, 2)),
    ):
        with pytest.raises(ValueError, match=f"has {len(shape)} axes instead of"):
            TorchBatchNorm(layer, 2)(torch.zeros(shape))
    with pytest.raises(ValueError, match=r"has \(4, 3\) features instead of \(3, 4\)"):
        TorchLayerNorm(nn.LayerNorm((3, 4)), 2)(torch.zeros(4, 4, 3))
    layer = FlaxLayerNorm(nnx.LayerNorm(12, reduction_axes=(2, 3), feature_axes=(2, 3), rngs=nnx.Rngs(0)), 2)
    with pytest.raises(ValueError, match="has 3 axes instead of at least 4"):
        layer(flax_zeros(4, 3, 4))
    with pytest.raises(ValueError, match="has 8 features instead of 12"):
        layer(flax_zeros(4, 3, 4, 2))
    for shape in ((3, 4), (2, 4, 4)):
        with pytest.raises(ValueError, match="Give it the rows"):
            FlaxBatchNorm(nnx.BatchNorm(4, rngs=nnx.Rngs(0)), 2)(flax_zeros(4, 4), mask=jax_of(np.ones(shape)))
