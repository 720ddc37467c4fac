"""BatchEnsembleMultiHeadAttention: parity with the oracle, what it keeps of its base layer, and who it works with."""

import copy
from dataclasses import replace
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
from parity_tests import standard
from parity_tests.kit.trees import jax_of
from parity_tests.standard import assert_close
from parity_tests.suite.layers import test_contract
from parity_tests.suite.layers.contract import attention
from parity_tests.suite.layers.test_contract import sentences
from parity_tests.suite.subjects.attention import CASES, Case, run_flax, run_torch, sown, to_torch, verdicts
from parity_tests.suite.subjects.subject import randomized, without_draws
from probly_flax.layers.attention import BatchEnsembleMultiHeadAttention as FlaxAttention
from probly_torch.layers.attention import BatchEnsembleMultiHeadAttention as TorchAttention

ATTENTION = attention()


def test_bounded_op_by_op():
    run = partial(run_flax, compiled=False)
    # queries and keys of one shape, for which each operation is compiled once
    case = replace(CASES["self"], attn_mask=2, padding=True)
    standard.assert_holds(verdicts(case, ("float32", "float64"), run_flax=run))


@pytest.mark.parametrize("name", ["self", "other features"])
def test_bounded_on_the_fused_paths(name):
    """Without weights: torch's scaled_dot_product_attention, and that of JAX, whose softmax is float32."""
    case, without = CASES[name], ("weights",)
    fused = partial(run_torch, need_weights=False)
    standard.assert_holds(verdicts(case, ("float32", "float64"), fused, without=without))
    unfused = partial(run_flax, sow=False, dropout_rate=0.0)
    standard.assert_holds(verdicts(case, ("float32",), fused, unfused, without))


@pytest.mark.parametrize(("a", "b"), [("q_r", "k_r"), ("q_s", "k_s"), ("v_r", "v_s"), ("out_proj.r", "out_proj.s")])
def test_a_swap_of_fast_weights_is_noticed(a, b):
    def swapped(case, arrays, dtype):
        return run_torch(case, arrays | {a: arrays[b], b: arrays[a]}, dtype)

    broken = [v for v in verdicts(CASES["self"], ("float32", "float64"), swapped) if not v.holds]
    assert {v.tensor for v in broken} >= {"output", f"gradient by {a}", f"gradient by {b}"}


# Members.


def torch_call(layer, i, query, key, value, num_members, attn_mask=None, key_padding_mask=None, **options):
    """Returns the outputs of all rows for i=None, and else of those of member i, batch first."""

    def of_member(x):
        return x if i is None else x.reshape(num_members, -1, *x.shape[1:])[i]

    order = (lambda x: x) if layer.batch_first else (lambda x: x.transpose(0, 1))
    if attn_mask is not None and attn_mask.ndim == 3:
        attn_mask = of_member(attn_mask)
    if key_padding_mask is not None:
        key_padding_mask = of_member(key_padding_mask)
    y, weights = layer(
        *(order(of_member(x)) for x in (query, key, value)),
        attn_mask=attn_mask,
        key_padding_mask=key_padding_mask,
        **options,
    )
    return order(y), weights


TORCH_OPTIONS = {
    "plain": {},
    "batch second": {"batch_first": False},
    "no bias": {"bias": False},
    "other features": {"kdim": 5, "vdim": 7},
    "bias_kv": {"add_bias_kv": True},
    "zero attention": {"add_zero_attn": True},
    "everything": {"add_bias_kv": True, "add_zero_attn": True, "kdim": 5, "vdim": 7, "batch_first": False},
}


def torch_masks(kind):
    torch.manual_seed(1)
    attn_mask, padding = torch.rand(3 * 2 * 2, 4, 5) < 0.4, torch.rand(6, 5) < 0.4
    attn_mask[..., 0] = padding[:, 0] = False
    numbers = torch.randn(12, 4, 5, dtype=torch.float64), torch.randn(6, 5, dtype=torch.float64)
    return {
        "none": {},
        "2-D": {"attn_mask": attn_mask[0]},
        "3-D": {"attn_mask": attn_mask},
        "padding": {"key_padding_mask": padding},
        "both": {"attn_mask": attn_mask, "key_padding_mask": padding},
        "2-D and padding": {"attn_mask": attn_mask[0], "key_padding_mask": padding},
        "numbers": {"attn_mask": numbers[0], "key_padding_mask": numbers[1]},
        "2-D numbers": {"attn_mask": numbers[0][0]},
        "causal": {"attn_mask": torch.ones(4, 5, dtype=torch.bool).triu(1), "is_causal": True},
        "causal and padding": {
            "attn_mask": torch.ones(4, 5, dtype=torch.bool).triu(1),
            "is_causal": True,
            "key_padding_mask": padding,
        },
        "all hidden": {"key_padding_mask": torch.arange(6)[:, None].expand(6, 5) == 2},
    }[kind]


MASKS = [
    "none",
    "2-D",
    "3-D",
    "padding",
    "both",
    "2-D and padding",
    "numbers",
    "2-D numbers",
    "causal",
    "causal and padding",
    "all hidden",
]


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("options", TORCH_OPTIONS.values(), ids=TORCH_OPTIONS)
def test_member_of_torch_is_an_ordinary_layer_that_computes_the_same(options, mask, need_weights):
    base = nn.MultiheadAttention(8, 2, **{"batch_first": True, "dtype": torch.float64, **options})
    layer = TorchAttention(base, num_members=3)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    inputs = [torch.randn(6, n, f, dtype=torch.float64) for n, f in ((4, 8), (5, base.kdim), (5, base.vdim))]
    kwargs = {"num_members": 3, "need_weights": need_weights, **torch_masks(mask)}
    for average in (True, False) if need_weights else (True,):
        y, weights = torch_call(layer, None, *inputs, average_attn_weights=average, **kwargs)
        for i in range(3):
            member = layer.member(i)
            assert type(member) is nn.MultiheadAttention
            own, own_weights = torch_call(member, i, *inputs, average_attn_weights=average, **kwargs)
            for a, b in ((own, y), (own_weights, weights)):
                assert (a is None) == (b is None)
                if b is not None:
                    b = b.reshape(3, -1, *b.shape[1:])[i]
                    assert torch.equal(a.isnan(), b.isnan())
                    assert_close(a.detach().nan_to_num(7).numpy(), b.detach().nan_to_num(7).numpy(), "float64")


def test_a_member_of_torch_has_the_state_of_its_base():
    for options in TORCH_OPTIONS.values():
        base = nn.MultiheadAttention(8, 2, dropout=0.25, **options).eval()
        base.in_proj_bias is None or base.in_proj_bias.requires_grad_(False)
        base.out_proj.weight.requires_grad_(False)
        member = TorchAttention(base, num_members=3, use_base_weights=True).member(-1)
        public = {name: value for name, value in vars(base).items() if isinstance(value, (bool, int, float))}
        assert public == {name: getattr(member, name) for name in public}
        described = [
            {n: (p.shape, p.dtype, p.device, p.requires_grad) for n, p in m.named_parameters()} for m in (base, member)
        ]
        assert described[0] == described[1]
        assert [type(m) for m in member.modules()] == [type(m) for m in base.modules()]


FLAX_OPTIONS = {
    "plain": {},
    "no bias": {"use_bias": False},
    "other features": {"in_kv_features": 5, "qkv_features": 12, "out_features": 7},
    "fewer heads of keys": {"num_heads": 4, "num_kv_heads": 2},
    "normalised": {"normalize_qk": True},
    "dropout": {"dropout_rate": 0.5},
    "dropout of each": {"dropout_rate": 0.5, "broadcast_dropout": False, "deterministic": True},
    "no rngs": {"dropout_rate": 0.5, "deterministic": True, "keep_rngs": False},
    "dtype": {"dtype": jnp.float64, "param_dtype": jnp.float32},
    "custom": {
        "attention_fn": lambda query, key, value, **kwargs: nnx.dot_product_attention(query * 2, key, value, **kwargs),
        "precision": "highest",
        "qkv_dot_general": jax.lax.dot_general,
        "out_dot_general_cls": lambda: jax.lax.dot_general,
    },
}


def flax_base(num_heads=2, **options):
    """Makes a layer with zeros for kernels. These tests draw others, or give them to the layer itself."""
    options = {"param_dtype": jnp.float64, "deterministic": False, "decode": False, "rngs": nnx.Rngs(0)} | options
    return nnx.MultiHeadAttention(num_heads, 8, kernel_init=nnx.initializers.zeros, **options)


@pytest.fixture
def promotion_of_nnx():
    """Allows promotion. The norms, caches and fused attention of nnx promote dtypes silently."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.mark.usefixtures("promotion_of_nnx")
@pytest.mark.parametrize(
    ("name", "masked", "middle"),
    # without those that compute what "plain" does
    [
        ("plain", False, ()),
        *((name, True, (3,)) for name in FLAX_OPTIONS if name not in ("dropout of each", "no rngs")),
    ],
)
def test_member_of_flax_is_an_ordinary_layer_that_computes_the_same(name, masked, middle):
    layer = randomized(without_draws(lambda: FlaxAttention(flax_base(**FLAX_OPTIONS[name]), num_members=3)))
    rng = np.random.default_rng(1)
    dtype = layer.dtype or jnp.float64
    inputs = [rng.standard_normal((6, *middle, n, f)) for n, f in ((4, 8), *[(5, layer.in_kv_features)] * 2)]
    mask = rng.random((6, *middle, 1, 4, 5)) < 0.6 if masked else None
    if masked:
        mask[..., 0] = True

    def run(layer, rows):
        q, k, v = (jax_of(x[rows], dtype) for x in inputs)
        return call_and_sow(layer, q, k, v, None if mask is None else jax_of(mask[rows]))

    call_and_sow = nnx.jit(lambda layer, q, k, v, mask: sown(layer, q, k, v, mask=mask))
    members = [layer.member(i) for i in range(3)]
    y, weights = (np.asarray(result) for result in run(layer, slice(None)))
    folded = jnp.dtype(layer.param_dtype).name  # the dtype that a member's weights are rounded to
    assert y.shape == (6, *middle, 4, layer.out_features)
    for i, member in enumerate(members):
        rows = slice(2 * i, 2 * i + 2)
        assert type(member) is nnx.MultiHeadAttention
        assert {type(child) for child in (member.query, member.key, member.value, member.out)} == {nnx.LinearGeneral}
        own = run(member, rows)
        assert_close(own[0], y[rows], folded)
        assert_close(own[1], weights[rows], folded)


# Dropout.


@pytest.mark.parametrize("need_weights", [False, True])
def test_dropout_of_torch_is_that_of_the_base_layer(need_weights):
    layer = TorchAttention(nn.MultiheadAttention(8, 2, dropout=0.5, batch_first=True), num_members=1)
    x = torch.randn(4, 6, 8)
    member, runs = layer.member(0), []
    for each in (layer, member):
        torch.manual_seed(3)
        runs.append(each(x, x, x, need_weights=need_weights))
    assert_close(runs[0][0].detach().numpy(), runs[1][0].detach().numpy(), "float32")
    if need_weights:
        assert_close(runs[0][1].detach().numpy(), runs[1][1].detach().numpy(), "float32")
    again = layer(x, x, x, need_weights=need_weights)[0]
    assert not torch.allclose(again, runs[0][0])
    layer.eval()
    member.eval()
    assert_close(layer(x, x, x)[0].detach().numpy(), member(x, x, x)[0].detach().numpy(), "float32")


def test_dropout_of_flax_is_that_of_the_base_layer():
    base = partial(flax_base, dropout_rate=0.5)
    layer = randomized(without_draws(lambda: FlaxAttention(base(broadcast_dropout=False), num_members=1)))
    x = jax_of(np.random.default_rng(0).standard_normal((6, 4, 8)))
    member = layer.member(0)
    y = layer(x)
    assert_close(y, member(x), "float64")
    assert not np.allclose(layer(x), y)
    np.testing.assert_array_equal(layer(x, rngs=nnx.Rngs(dropout=5)), layer(x, rngs=nnx.Rngs(dropout=5)))
    layer.eval()
    np.testing.assert_array_equal(layer(x), layer(x))
    without = without_draws(lambda: FlaxAttention(base(keep_rngs=False), num_members=2))
    with pytest.raises(ValueError, match="keep_rngs=False"):
        without(x)


# Torch's Transformer.


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
def test_in_an_encoder_layer(batch_first, norm_first):
    """Whose fused kernel in eval mode would leave r and s out."""
    base = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=batch_first, norm_first=norm_first).double()
    layer = copy.deepcopy(base)
    layer.self_attn = TorchAttention(layer.self_attn, num_members=3)
    x = torch.randn(6, 6, 8, dtype=torch.float64)
    mask, padding = nn.Transformer.generate_square_subsequent_mask(6, dtype=torch.float64), torch.zeros(6, 6)
    padding = padding.double().masked_fill_(torch.arange(6) > torch.arange(6)[:, None], -torch.inf)
    for kwargs in ({}, {"src_mask": mask}, {"src_mask": mask, "is_causal": True}, {"src_key_padding_mask": padding}):
        runs = []
        for training in (True, False):
            layer.train(training)
            runs.append(layer(x, **kwargs))
            with torch.no_grad():
                runs.append(layer(x, **kwargs))
        for run in runs[1:]:
            assert_close(run.detach().numpy(), runs[0].detach().numpy(), "float64")
        layer.zero_grad()
        runs[2].sum().backward()
        assert layer.self_attn.q_r.grad.abs().max() > 0
        for i in range(3):
            member = copy.deepcopy(base).eval()
            member.self_attn = layer.self_attn.member(i)
            rows = slice(2 * i, 2 * i + 2)
            own = {n: v[rows] if n == "src_key_padding_mask" else v for n, v in kwargs.items()}
            at = rows if batch_first else (slice(None), rows)
            assert_close(member(x[at], **own).detach().numpy(), runs[0][at].detach().numpy(), "float64")


def test_in_a_decoder_layer():
    layer = nn.TransformerDecoderLayer(8, 2, 16, dropout=0.0, batch_first=True).double()
    base = copy.deepcopy(layer)
    layer.self_attn = TorchAttention(layer.self_attn, num_members=3)
    layer.multihead_attn = TorchAttention(layer.multihead_attn, rngs=2, num_members=3)
    x, memory = torch.randn(6, 4, 8, dtype=torch.float64), torch.randn(6, 5, 8, dtype=torch.float64)
    mask = nn.Transformer.generate_square_subsequent_mask(4, dtype=torch.float64)
    for training in (True, False):
        layer.train(training)
        y = layer(x, memory, tgt_mask=mask, tgt_is_causal=True)
        with torch.no_grad():
            assert torch.equal(layer(x, memory, tgt_mask=mask, tgt_is_causal=True), y)
    for i in range(3):
        base.self_attn, base.multihead_attn = layer.self_attn.member(i), layer.multihead_attn.member(i)
        rows = slice(2 * i, 2 * i + 2)
        own = base(x[rows], memory[rows], tgt_mask=mask, tgt_is_causal=True)
        assert_close(own.detach().numpy(), y[rows].detach().numpy(), "float64")


def test_in_an_encoder_with_padding():
    """Built of converted layers an encoder makes no nested tensors; where it does, the error says how to stop it."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    encoder = nn.TransformerEncoder(copy.deepcopy(layer), 2).eval()
    for each in encoder.layers:
        each.self_attn = TorchAttention(each.self_attn, num_members=3)
    x, padding = torch.randn(6, 5, 8), (torch.arange(5) > 2).expand(6, 5)
    y = encoder(x, src_key_padding_mask=padding)
    with torch.no_grad():
        with pytest.raises(ValueError, match=r"encoder.use_nested_tensor = False\.$"):
            encoder(x, src_key_padding_mask=padding)
        encoder.use_nested_tensor = False
        assert torch.equal(encoder(x, src_key_padding_mask=padding), y)
    layer.self_attn = TorchAttention(layer.self_attn, num_members=3)
    with pytest.warns(UserWarning, match="_qkv_same_embed_dim was not True"):
        encoder = nn.TransformerEncoder(layer, 2)
    assert not encoder.use_nested_tensor


# Citizens.


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("amp", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", [{}, {"kdim": 5}, {"add_bias_kv": True, "add_zero_attn": True}], ids=str)
def test_autocast_gives_the_dtype_of_the_base_layer(options, amp, need_weights):
    base = nn.MultiheadAttention(8, 2, batch_first=True, **options)
    layer = TorchAttention(base, num_members=3)
    x, key = torch.randn(6, 4, 8, requires_grad=True), torch.randn(6, 5, base.kdim)
    value, padding = torch.randn(6, 5, 8), (torch.arange(5) > 3).expand(6, 5)
    with torch.autocast("cpu", amp):
        y, weights = layer(x, key, value, key_padding_mask=padding, need_weights=need_weights)
        expected, expected_weights = base(x, key, value, key_padding_mask=padding, need_weights=need_weights)
    assert y.dtype == expected.dtype
    assert not need_weights or weights.dtype == expected_weights.dtype
    y.float().sum().backward()
    assert x.grad.dtype == x.dtype
    assert {p.grad.dtype for p in layer.parameters()} == {torch.float32}


@pytest.mark.usefixtures("promotion_of_nnx")
def test_decoding_step_by_step_is_what_causal_attention_does_at_once():
    base = flax_base(decode=True)
    base.init_cache((2, 5, 8), jnp.float64)
    layer = randomized(without_draws(lambda: FlaxAttention(base, num_members=3)))
    x = np.random.default_rng(0).standard_normal((6, 5, 8))
    with pytest.raises(ValueError, match="init_cache"):
        layer(jax_of(x[:, :1]))
    at_once = nnx.jit(lambda layer, x: sown(layer, x, decode=False, is_causal=True)[0])(layer, jax_of(x))
    at_once = np.asarray(at_once)
    layer.init_cache(x.shape, jnp.float64)
    run = nnx.jit(lambda layer, x: sown(layer, x)[0])
    for step in range(3):
        assert_close(run(layer, jax_of(x[:, step : step + 1])), at_once[:, step : step + 1], "float64")
    member, kept = layer.member(1), [4, 5, 0, 1]
    layer.keep_members([2, 0])
    assert_close(run(layer, jax_of(x[kept, 3:4])), at_once[kept, 3:4], "float64")
    assert_close(run(member, jax_of(x[2:4, 3:4])), at_once[2:4, 3:4], "float64")
    assert int(member.cache_index[...]) == int(layer.cache_index[...]) == 4


# Bad input.


def with_four_members(f):
    case = CASES["self"]
    if f is torch:
        return TorchAttention(case.torch(), num_members=4)
    return without_draws(lambda: FlaxAttention(case.flax(), num_members=4))


def call(f, query=(12, 4, 8), key=None, value=None):
    zeros = torch.zeros if f is torch else (lambda shape: jax_of(np.zeros(shape)))
    key = query if key is None else key
    return with_four_members(f)(zeros(query), zeros(key), zeros(key if value is None else value))


ERRORS = {
    "rows of the key that do not divide": (lambda f: call(f, key=(3, 5, 8)), "tile_members(key, 4)."),
    "rows of the value": (lambda f: call(f, value=(4, 4, 8)), "call tile_members(value, 4)."),
    "wrong last axis of the key": (lambda f: call(f, key=(12, 5, 9)), "whose key has 9 features."),
    "keys without values": (lambda f: call(f, key=(12, 5, 8), value=(12, 6, 8)), "as both: key, key."),
}


@pytest.mark.parametrize("name", ERRORS)
def test_keys_and_values_are_refused_with_the_same_sentence(name):
    attempt, end = ERRORS[name]
    ours, theirs = sentences(ATTENTION, ValueError, [lambda f=f: attempt(f) for f in (torch, jnp)], [end])
    assert ours == theirs


def test_the_sentence_in_full():
    with pytest.raises(ValueError, match="rows") as raised:
        call(torch, key=(8, 4, 8))
    assert str(raised.value) == (
        "BatchEnsembleMultiHeadAttention expects key of shape [num_members*B, length, features] with num_members=4, "
        "features=8; got (8, 4, 8), whose 8 rows are not the 12 of the query. To give every member the same batch, "
        "call tile_members(key, 4)."
    )


@pytest.mark.parametrize(
    ("kwargs", "error", "next_step"),
    [
        ({"key_padding_mask": torch.zeros(3, 4, dtype=torch.bool)}, ValueError, "tile_members(key_padding_mask, 4)."),
        ({"key_padding_mask": torch.zeros(12, 5, dtype=torch.bool)}, ValueError, "tile_members(key_padding_mask, 4)."),
        ({"attn_mask": torch.zeros(12, 4, 4)}, ValueError, "tile_members(attn_mask, 4)."),
        ({"attn_mask": torch.zeros(6, 4, 4)}, ValueError, "tile_members(attn_mask, 4)."),
        ({"attn_mask": torch.zeros(4, 5)}, ValueError, "tile_members(attn_mask, 4)."),
        ({"attn_mask": torch.zeros(4, 4, dtype=torch.int64)}, TypeError, "attn_mask.bool()."),
        ({"is_causal": True}, ValueError, "generate_square_subsequent_mask(4)."),
    ],
)
def test_masks_that_torch_refuses(kwargs, error, next_step):
    layer, x = with_four_members(torch), torch.zeros(12, 4, 8)
    with pytest.raises(error) as raised:
        layer(x, x, x, **kwargs)
    assert str(raised.value).endswith(next_step)


def test_inputs_that_only_one_refuses():
    ours, theirs = with_four_members(torch), with_four_members(jnp)
    with pytest.raises(ValueError, match=r"instead of 3.*tile_members\(query\[None\], 4\)\.$"):
        ours(*[torch.zeros(4, 8)] * 3)
    with pytest.raises(ValueError, match=r"instead of 3.*query.flatten\(1, -2\)\.$"):
        ours(*[torch.zeros(4, 2, 3, 8)] * 3)
    with pytest.raises(ValueError, match=r"instead of at least 3.*tile_members\(query\[None\], 4\)\.$"):
        theirs(jax_of(np.zeros((4, 8))))
    with pytest.raises(ValueError, match=r"tile_members\(mask, 4\)\.$"):
        theirs(jax_of(np.zeros((12, 4, 8))), mask=jax_of(np.ones((3, 1, 4, 4), bool)))
    second = TorchAttention(nn.MultiheadAttention(8, 2), num_members=4)
    with pytest.raises(ValueError, match=r"\[length, num_members\*B, features\].*query.repeat\(1, 4, 1\)\.$"):
        second(*[torch.zeros(12, 3, 8)] * 3)
    with pytest.raises(ValueError, match=r"query\[:, None\]\.repeat\(1, 4, 1\)\.$"):
        second(*[torch.zeros(12, 8)] * 3)


def test_one_mask_for_all_rows_and_keys_and_values_that_are_the_queries():
    layer = ATTENTION.convert(ATTENTION.flax_base())
    x, mask = ATTENTION.flax_inputs(), np.tril(np.ones((1, 1, 4, 4), bool))
    assert_close(layer(x, mask=jax_of(mask)), layer(x, mask=jax_of(np.tile(mask, (6, 1, 1, 1)))), "float32")
    np.testing.assert_array_equal(layer(x, x), layer(x))
    np.testing.assert_array_equal(layer(x, x, x), layer(x))


def test_no_rows_with_a_mask_and_extra_keys_on_another_device_and_of_kept_members():
    layer, x = ATTENTION.convert(ATTENTION.torch_base()), torch.zeros(0, 4, 8)
    assert layer(x, x, x, key_padding_mask=torch.zeros(0, 4, dtype=torch.bool))[0].shape == (0, 4, 8)
    meta = TorchAttention(nn.MultiheadAttention(8, 2, device="meta", add_bias_kv=True), num_members=3)
    assert {p.device.type for p in meta.parameters()} == {"meta"}
    layer = TorchAttention(nn.MultiheadAttention(8, 2, add_bias_kv=True, bias=False), num_members=3)
    layer.keep_members([1])
    assert layer.bias_k.shape == (1, 1, 1, 8)


def test_the_base_of_flax_with_norms_is_left_alone():
    test_contract.test_the_base_layer_of_flax_is_copied_and_left_alone(attention(theirs={"normalize_qk": True}))


def test_a_layer_with_projections_of_another_kind_is_refused():
    base = flax_base()
    base.query = without_draws(lambda: nnx.LoRA(8, 2, 8, rngs=nnx.Rngs(0)))
    with pytest.raises(TypeError, match="LinearGeneral layer; got LoRA"):
        FlaxAttention(base, num_members=3)


def test_cases_hide_something_and_never_everything():
    for case in CASES.values():
        assert case.hidden().any() == bool(case.attn_mask or case.padding)
        assert not case.hidden().all(-1).any()
    assert replace(CASES["self"], padding=True).hidden().any()


@pytest.mark.parametrize("case", [Case(), Case(kv_features=6), Case(bias=False)], ids=str)
def test_weights_have_torchs_names_and_layouts(case):
    for layer in (
        randomized(without_draws(case.flax)),
        randomized(without_draws(lambda: FlaxAttention(case.flax(), num_members=3))),
    ):
        expected = to_torch(layer)
        arrays = pf.to_arrays(layer)
        assert arrays.keys() == expected.keys()
        for name, array in arrays.items():
            np.testing.assert_array_equal(array, expected[name], err_msg=name)
        other = nnx.clone(layer)
        pf.load_arrays(other, {name: array + 1 for name, array in arrays.items()})
        for name, array in to_torch(other).items():
            np.testing.assert_array_equal(array, expected[name] + 1, err_msg=name)
    ours = TorchAttention(case.torch(), num_members=3)
    assert pt.to_arrays(ours).keys() == arrays.keys()
    pt.load_arrays(ours, arrays)
    plain = case.torch()
    pt.load_arrays(plain, pf.to_arrays(without_draws(case.flax)))


def test_stacked_weights_have_torchs_names():
    stacked = pf.ensemble(without_draws(Case().flax), 3, reset_params=False)
    assert pf.to_arrays(stacked)["out_proj.weight"].shape == (3, 8, 8)
    pf.load_arrays(stacked, pf.to_arrays(stacked))
