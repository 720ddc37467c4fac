"""The table of the layers' contract: one row for each kind of layer, which test_contract.py holds to every promise."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx
from torch import Tensor, nn, no_grad

import probly_flax as pf
import probly_torch as pt
from parity_tests.kit.trees import jax_of
from parity_tests.standard import assert_close
from parity_tests.suite.subjects.subject import Arrays, without_draws

MEMBERS = 3
TILE, ONE = "call tile_members(x, 3).", "call tile_members(x[None], 3)."
WITHOUT_BIAS = ({"bias": False}, {"use_bias": False})


def _call(layer: Any, x: Any) -> Any:
    return layer(x)


def _kernels(*names: str) -> Callable[[Arrays], list[np.ndarray]]:
    return lambda arrays: [arrays[name].T for name in names]


@dataclass(frozen=True, eq=False)
class Kind:
    """A kind of layer in both frameworks.

    Attributes:
        name: up to the first dash, what follows BatchEnsemble in the name of its layer.
        make_torch: makes a base layer of torch, given dtype, device and options.
        make_flax: makes one of Flax, given param_dtype, rngs and options.
        shape: that of inputs in torch's layout, whose rows divide among 3 members.
        fast: the names of r and s in torch, for each weight in the order of the draws. Norms draw nothing.
        drawn: the weights as they are drawn, in that order, and lecun_normal. None draws by another rule.
        torch_call: outputs of torch's layer.
        flax_call: outputs of Flax's layer.
        tokens: the bound of integer inputs.
        channels_last: whether Flax has the channels last, and torch has them first.
        exact: whether a member has the very bits of its layer where sums have no rounding.
        torch_options: options of torch that a member keeps.
        flax_options: options of Flax that a member keeps.
        run_apart: whether tests of its own run the members of Flax, over masks, states or steps.
        shapes: other shapes of inputs in both frameworks.
        without_bias: the options of both for a layer without biases, where there are any.
        functions: options of Flax that are functions, called as nnx calls them, and options that they are called with.
        picklable: whether nnx's own layer can be pickled.
        vmaps: whether torch has a rule to vmap the layer.
        preferred: whether Flax has preferred_element_type.
        sharding: options of Flax that shard the base layer.
        sharded: how these shard the layer's parameters.
        initializers: options of Flax for a base layer that JAX need not draw.
        bad_inputs: shapes in both frameworks that are refused, and how the sentence ends in each.
        wording: what torch's sentences say in other words than Flax's.
    """

    name: str
    make_torch: Callable[..., Any]
    make_flax: Callable[..., Any]
    shape: tuple[int, ...]
    fast: Sequence[tuple[str, str]] = (("r", "s"),)
    drawn: Callable[[Arrays], list[np.ndarray]] | None = field(default_factory=lambda: _kernels("weight"))
    torch_call: Callable[[Any, Any], Any] = _call
    flax_call: Callable[[Any, Any], Any] = _call
    tokens: int = 0
    channels_last: bool = False
    exact: bool = False
    torch_options: Sequence[dict[str, Any]] = ({},)
    flax_options: Sequence[dict[str, Any]] = ({},)
    run_apart: bool = False
    shapes: Sequence[tuple[int, ...]] = ()
    without_bias: tuple[dict[str, Any], dict[str, Any]] | None = WITHOUT_BIAS
    functions: Mapping[str, Any] = field(default_factory=lambda: {"promote_dtype": nnx.nn.dtypes.promote_dtype})
    picklable: bool = True
    vmaps: bool = True
    preferred: bool = False
    sharding: Mapping[str, tuple[str | None, ...]] = field(default_factory=dict)
    sharded: Mapping[str, tuple[str | None, ...]] = field(default_factory=dict)
    initializers: Mapping[str, Any] = field(default_factory=lambda: {"kernel_init": nnx.initializers.zeros})
    bad_inputs: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    wording: Sequence[tuple[str, str]] = ()

    def __str__(self) -> str:
        return self.name

    @property
    def layer_name(self) -> str:
        """The public name of the layer."""
        return f"BatchEnsemble{self.name.partition('-')[0]}"

    @property
    def fast_names(self) -> list[str]:
        """The names of every r and s."""
        return [name for pair in self.fast for name in pair]

    def convert(self, base: Any, **options: Any) -> Any:
        """Makes the layer of a base layer of either framework."""
        return getattr(pt if isinstance(base, nn.Module) else pf, self.layer_name)(
            base, **({"num_members": MEMBERS} | options)
        )

    def torch_base(self, dtype: str = "float32", **options: Any) -> Any:
        """Makes torch's base layer, with weights that NumPy draws."""
        return self.randomized(self.make_torch(**({"dtype": getattr(torch, dtype)} | options)))

    def flax_base(self, dtype: str = "float32", **options: Any) -> Any:
        """Makes Flax's base layer, with weights that NumPy draws."""
        options = {"param_dtype": jnp.dtype(dtype)} | options
        return self.randomized(without_draws(lambda: self.make_flax(rngs=nnx.Rngs(0), **options)))

    def bases(self, dtype: str = "float32") -> tuple[Any, Any]:
        """Makes base layers of equal weights."""
        ours, theirs = self.torch_base(dtype), self.flax_base(dtype)
        pf.load_arrays(theirs, pt.to_arrays(ours))
        return ours, theirs

    def pair(self, dtype: str = "float32", **options: Any) -> list[Any]:
        """Makes both layers of equal base layers."""
        return [self.convert(base, **options) for base in self.bases(dtype)]

    @no_grad()
    def randomized(self, layer: Any, seed: int = 0) -> Any:
        """Gives a layer of either framework other weights, and statistics that differ between members."""
        rng = np.random.default_rng(seed)
        if isinstance(layer, nn.Module):
            for name, value in layer.state_dict().items():
                if value.is_floating_point():
                    value.copy_(torch.from_numpy(self._values(rng, name, tuple(value.shape))))
        else:
            for path, variable in nnx.to_flat_state(nnx.state(layer, (nnx.Param, nnx.BatchStat))):
                variable.set_value(jax_of(self._values(rng, str(path[-1]), variable.shape), variable.dtype))
        return layer

    def _values(self, rng: np.random.Generator, name: str, shape: tuple[int, ...]) -> np.ndarray:
        if name.startswith("bias_hh"):  # nnx's cells have one bias
            return np.zeros(shape)
        if self.exact:
            return rng.integers(-4, 5, shape) / 8
        if "var" in name:
            return rng.uniform(0.5, 2.0, shape)
        is_fast = name in self.fast_names or name in ("r", "s")
        return is_fast + 0.4 * rng.standard_normal(shape)

    def inputs(self, rows: int | None = None, seed: int = 1) -> np.ndarray:
        """Draws inputs in torch's layout."""
        rng, shape = np.random.default_rng(seed), (self.shape[0] if rows is None else rows, *self.shape[1:])
        if self.tokens:
            return rng.integers(0, self.tokens, shape)
        return rng.integers(-4, 5, shape) / 8 if self.exact else rng.standard_normal(shape)

    def laid_out(self, x: np.ndarray) -> np.ndarray:
        """Moves the channels of inputs to where Flax has them."""
        return np.moveaxis(x, 1, -1) if self.channels_last else x

    def flax_inputs(self, dtype: str = "float32", rows: int | None = None) -> jax.Array:
        """Draws inputs for Flax."""
        return jax_of(self.laid_out(self.inputs(rows)), None if self.tokens else dtype)

    def torch_inputs(self, dtype: str = "float32", rows: int | None = None) -> Tensor:
        """Draws inputs for torch."""
        return torch.tensor(self.inputs(rows), dtype=None if self.tokens else getattr(torch, dtype))

    def same(self, ours: Any, theirs: Any, dtype: str = "float32") -> None:
        """Asserts that outputs have the same bits, or agree to rounding where they are rounded."""
        ours, theirs = np.asarray(ours), np.asarray(theirs)
        assert ours.dtype == theirs.dtype
        np.testing.assert_array_equal(ours, theirs) if self.exact else assert_close(ours, theirs, dtype)

    def run(self, layer: Any, x: np.ndarray, dtype: str = "float32") -> np.ndarray:
        """Calls a layer of either framework with an array of torch's layout, and returns another."""
        if isinstance(layer, nn.Module):
            tensor = torch.tensor(x, dtype=None if self.tokens else getattr(torch, dtype))
            return np.asarray(self.torch_call(layer, tensor).detach())
        array = jax_of(self.laid_out(x), None if self.tokens else dtype)
        y = np.asarray(_jitted(self.flax_call)(layer, array))
        return np.moveaxis(y, -1, 1) if self.channels_last else y


@cache
def _jitted(call: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    return nnx.jit(call)


# Convolutions.

TORCH_CONVS: dict[str, tuple[type[nn.Module], ...]] = {
    "Conv": (nn.Conv1d, nn.Conv2d, nn.Conv3d),
    "ConvTranspose": (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
}
CONV_TORCH_OPTIONS = {
    "Conv": [
        {},
        {"stride": 2, "padding": 1},
        {"padding": "same"},
        {"padding": "same", "dilation": 2, "padding_mode": "circular"},
        {"padding": "valid"},
        {"padding": 1, "padding_mode": "reflect", "stride": 2},
        {"padding": 2, "padding_mode": "replicate"},
        {"dilation": 2, "groups": 2},
        {"bias": False, "groups": 2},
    ],
    "ConvTranspose": [
        {},
        {"stride": 2, "padding": 1, "output_padding": 1},
        {"dilation": 2, "groups": 2},
        {"bias": False, "groups": 2, "stride": 3},
    ],
}
CONV_FLAX_OPTIONS = {
    "Conv": [
        {},
        {"padding": "SAME", "strides": 2},
        {"padding": "CIRCULAR", "kernel_dilation": 2},
        {"padding": "REFLECT", "strides": None},
        {"padding": 1, "feature_group_count": 2},
        {"padding": ((0, 2), 1), "strides": [1, 2]},
        {"padding": 2, "input_dilation": (2, 1)},
        {"use_bias": False, "precision": "highest"},
        {"preferred_element_type": jnp.float64},
    ],
    "ConvTranspose": [
        {},
        {"padding": "SAME", "strides": (2, 1)},
        {"padding": "CIRCULAR", "strides": 2},
        {"padding": "CIRCULAR", "strides": 2, "transpose_kernel": True},
        {"padding": ((0, 2), 1), "kernel_dilation": (2, 1)},
        {"use_bias": False, "transpose_kernel": True},
    ],
}


def conv(kind: str, axes: int = 2, name: str = "", ours: Any = None, theirs: Any = None, **changes: Any) -> Kind:
    """Makes the row of a convolution, of the options `ours` in torch and `theirs` in Flax."""
    transposed = kind == "ConvTranspose"
    kernel_axes = (*range(2, axes + 2), 0, 1) if transposed else (*range(2, axes + 2), 1, 0)

    def flax(taps: int = 3, **options: Any) -> Any:
        return getattr(nnx, kind)(4, 6, (taps,) * axes, **({"padding": "VALID"} | (theirs or {}) | options))

    kernel = (*(None,) * axes, "data", "model")
    fields: dict[str, Any] = {
        "drawn": lambda arrays: [arrays["weight"].transpose(kernel_axes)],
        "channels_last": True,
        "exact": True,
        "torch_options": CONV_TORCH_OPTIONS[kind],
        "flax_options": CONV_FLAX_OPTIONS[kind] if axes == 2 else (),
        "functions": {
            "promote_dtype": nnx.nn.dtypes.promote_dtype,
            "precision": "highest",
            "dtype": "float32",
            "padding": ((1, 0), 2),
            "kernel_dilation": 2,
            **(
                {}
                if transposed
                else {"conv_general_dilated": jax.lax.conv_general_dilated, "feature_group_count": 2}
            ),
        },
        "preferred": True,
        "sharding": {"kernel_metadata": kernel, "bias_metadata": ("model",)},
        "sharded": {
            "kernel": kernel, "r": (None, "data"), "s": (None, "model"), "bias": (None, "model")
        },
        "bad_inputs": {
            "rows that do not divide": ((5, 4, 6, 6), (5, 6, 6, 4), TILE),
            "one image": ((4, 6, 6), (6, 6, 4), ONE),
            "a scalar": ((), (), "(-1, 4, H, W).", "(-1, H, W, 4)."),
            "channels": ((6, 5, 7, 7), (6, 7, 7, 5), "(5, ...)."),
            "the other layout": ((6, 7, 7, 4), (6, 4, 7, 7), "x.movedim(-1, 1).", "jnp.moveaxis(x, 1, -1)."),
        },
        "wording": (
            *((f"in_channels, {a}] (channels first)", f"{a}, in_channels] (channels last)") for a in ("L", "H, W")),
            ("axis 1 is", "last axis is"),
            ("axis -1 holds", "axis 1 holds"),
        ),
    }  # fmt: skip
    return Kind(
        kind + name,
        lambda **options: TORCH_CONVS[kind][axes - 1](4, 6, 3, **((ours or {}) | options)),
        flax,
        (6, 4, *(6, 5, 5)[:axes]),
        **(fields | changes),
    )


# Attention.


def attention(name: str = "", ours: Any = None, theirs: Any = None, **changes: Any) -> Kind:
    """Makes the row of an attention layer, of the options `ours` in torch and `theirs` in Flax."""

    def drawn(arrays: Arrays) -> list[np.ndarray]:
        packed = arrays.get("in_proj_weight")
        weights = [arrays[f"{n}_proj_weight"] for n in "qkv"] if packed is None else np.split(packed, 3)
        return [weight.T for weight in (*weights, arrays["out_proj.weight"])]

    def flax(num_heads: int = 2, **options: Any) -> Any:
        options = {"decode": False, "deterministic": True, "dropout_rate": 0.1} | (theirs or {}) | options
        return nnx.MultiHeadAttention(num_heads, 8, **options)

    defaults = {"batch_first": True, "dropout": 0.1} | (ours or {})
    fields: dict[str, Any] = {
        "fast": [*((f"{n}_r", f"{n}_s") for n in "qkv"), ("out_proj.r", "out_proj.s")],
        "drawn": drawn,
        "torch_call": lambda layer, x: layer(x, x, x)[0],
        "torch_options": [
            {},
            {"bias": False},
            {"add_bias_kv": True},
            {"add_zero_attn": True},
            {"add_bias_kv": True, "add_zero_attn": True, "dropout": 0.25},
        ],
        "flax_options": [
            {},
            {"use_bias": False},
            {"num_heads": 4, "num_kv_heads": 2},
            {"qkv_features": 12, "out_features": 7},
            {"normalize_qk": True},
            {"dropout_rate": 0.5},
            {"dropout_rate": 0.5, "broadcast_dropout": False},
            {"dropout_rate": 0.5, "keep_rngs": False},
            {"dtype": jnp.float64, "param_dtype": jnp.float32},
            {"attention_fn": nnx.dot_product_attention, "precision": "highest", "qkv_dot_general": jax.lax.dot_general},
        ],
        "run_apart": True,
        "functions": {
            "qkv_promote_dtype": nnx.nn.dtypes.promote_dtype,
            "out_promote_dtype": nnx.nn.dtypes.promote_dtype,
            "qkv_dot_general": jax.lax.dot_general,
            "out_dot_general_cls": lambda: jax.lax.dot_general,
            "attention_fn": nnx.dot_product_attention,
            "dtype": "float32",
        },
        "sharding": {
            "kernel_metadata": ("data", "model", None),
            "out_kernel_metadata": ("model", None, "data"),
            "bias_metadata": ("model", None),
            "out_bias_metadata": ("data",),
        },
        "sharded": {
            "query.kernel": ("data", "model", None),
            "query.r": (None, "data"),
            "query.s": (None, "model"),
            "query.bias": (None, "model", None),
            "out.kernel": ("model", None, "data"),
            "out.r": (None, "model"),
            "out.s": (None, "data"),
            "out.bias": (None, "data"),
        },
        "bad_inputs": {
            "rows that do not divide": ((5, 4, 8), (5, 4, 8), "call tile_members(query, 3)."),
            "wrong last axis": ((6, 4, 7), (6, 4, 7), "whose query has 7 features."),
        },
        "wording": [("MultiheadAttention", "MultiHeadAttention")],
    }
    return Kind(
        f"MultiHeadAttention{name}",
        lambda **options: nn.MultiheadAttention(8, 2, **(defaults | options)),
        flax,
        (6, 4, 8),
        **(fields | changes),
    )


# Norms, which draw nothing.

BAD_FEATURES = {
    "rows that do not divide": ((5, 4), (5, 4), TILE),
    "more features": ((6, 5), (6, 5), "with num_features=5."),
    "one feature": ((6, 1), (6, 1), "with num_features=1."),
}
ONE_AXIS = {"one axis": ((4,), (4,), ONE)}


def _norm(name: str, torch: Any, flax: Any, shape: tuple[int, ...], affine: str = "affine", **fields: Any) -> Kind:
    sharding = {f"{weight}_metadata": ("model",) for weight in ("scale", "bias")}
    return Kind(
        name,
        torch,
        flax,
        shape,
        fast=(),
        run_apart=True,
        torch_options=[{}, {"eps": 0.1}, {affine: False}],
        flax_options=[
            {},
            {"epsilon": 0.1},
            {"use_bias": False},
            {"use_scale": False},
            {"use_scale": False, "use_bias": False},
            {"use_fast_variance": False},
            {"dtype": jnp.bfloat16},
            {"param_dtype": jnp.bfloat16},
        ],
        without_bias=({affine: False}, {"use_bias": False, "use_scale": False}),
        sharding=sharding,
        sharded={"scale": (None, "model"), "bias": (None, "model")},
        initializers={},
        **fields,
    )


# Recurrent layers and their cells.


def recurrent(name: str, cell: Any, torch: Any, **changes: Any) -> Kind:
    """Makes the row of a recurrent layer or of its cell."""
    is_cell, is_lstm = "Cell" in name, "LSTM" in name
    place, path = ("", "") if is_cell else ("_l0", "cell.")

    def flax_call(layer: Any, x: jax.Array) -> jax.Array:
        if not is_cell:
            return layer(x)
        zeros = jnp.zeros((*x.shape[:-1], 6), x.dtype)
        return layer((zeros, zeros) if is_lstm else zeros, x)[1]

    kernel = ("data", "model")
    bias = f"{path}dense_{'h' if is_lstm else 'i'}.bias"
    fields: dict[str, Any] = {
        "fast": [(f"r_{n}{place}", f"s_{n}{place}") for n in ("ih", "hh")],
        "drawn": _kernels(f"weight_ih{place}", f"weight_hh{place}"),
        "torch_call": (lambda layer, x: layer(x)) if name == "GRUCell" else (lambda layer, x: layer(x)[0]),
        "flax_call": flax_call,
        "torch_options": [{}, {"bias": False}],
        "flax_options": [
            {},
            {"gate_fn": jnp.tanh, "activation_fn": nnx.relu},
            {"dtype": jnp.dtype("float64")},
            {"param_dtype": jnp.dtype("float64"), "dtype": jnp.dtype("float64")},
        ],
        "run_apart": True,
        "without_bias": None,  # of nnx's cells
        "functions": {
            "promote_dtype": nnx.nn.dtypes.promote_dtype, "gate_fn": nnx.sigmoid, "activation_fn": nnx.tanh
        },
        "picklable": False,  # they hold jax.numpy.tanh
        "sharding": {"kernel_metadata": kernel, "bias_metadata": ("model",)},
        "sharded": {
            f"{path}dense_i.kernel": kernel,
            f"{path}dense_i.r": (None, "data"),
            f"{path}dense_i.s": (None, "model"),
            bias: (None, "model"),
        },
        "bad_inputs": {
            "rows that do not divide": (*((5, 4) if is_cell else (5, 4, 4),) * 2, TILE),
            "wrong last axis": (*((6, 5) if is_cell else (6, 4, 5),) * 2, "in_features=5."),
            "one axis too few": (*((4,) if is_cell else (6, 4),) * 2, ONE),
            "no axis": ((), (), "None], 3)."),
        },
        "initializers": dict.fromkeys(("kernel_init", "recurrent_kernel_init"), nnx.initializers.zeros),
        "wording": [
            (words.format(name), words.format(cell.__name__ if is_cell else "RNN"))
            for words in ("what {} computes", "a {} layer with", "a {} layer;", "every {} layer")[: 2 if is_cell else 4]
        ],
        "vmaps": is_cell,
    }  # fmt: skip
    return Kind(
        name,
        (lambda **options: torch(4, 6, **options))
        if is_cell
        else (lambda **options: torch(4, 6, **({"batch_first": True} | options))),
        (lambda **options: cell(4, 6, **options)) if is_cell else (lambda **options: nnx.RNN(cell(4, 6, **options))),
        (6, 4) if is_cell else (6, 5, 4),
        **(fields | changes),
    )


KINDS = [
    Kind(
        "Linear",
        lambda **options: nn.Linear(4, 6, **options),
        lambda **options: nnx.Linear(4, 6, **options),
        (6, 4),
        exact=True,
        shapes=[(6, 2, 4), (6, 2, 3, 4), (0, 4), (3, 0, 4)],
        torch_options=[{}, {"bias": False}],
        flax_options=[
            {},
            {"use_bias": False},
            {"precision": "highest", "dtype": jnp.float64, "preferred_element_type": jnp.float64},
        ],
        functions={
            "promote_dtype": nnx.nn.dtypes.promote_dtype,
            "dot_general": jax.lax.dot_general,
            "precision": "highest",
            "dtype": "float32",
        },
        preferred=True,
        sharding={"kernel_metadata": ("data", "model"), "bias_metadata": ("model",)},
        sharded={"kernel": ("data", "model"), "r": (None, "data"), "s": (None, "model"), "bias": (None, "model")},
        bad_inputs={
            "rows that do not divide": ((5, 4), (5, 4), TILE),
            "wrong last axis": ((6, 5), (6, 5), "in_features=5."),
            "one axis": ((4,), (4,), ONE),
        },
    ),
    conv("Conv"),
    conv("ConvTranspose"),
    Kind(
        "Embed",
        lambda **options: nn.Embedding(8, 6, **options),
        lambda **options: nnx.Embed(8, 6, **options),
        (6, 4),
        drawn=None,
        tokens=8,
        exact=True,
        shapes=[(6,), (6, 2, 3), (0,), (3, 0)],
        torch_options=[
            {},
            {"padding_idx": 2},
            {"padding_idx": -1},
            {"padding_idx": 0, "scale_grad_by_freq": True},
            {"scale_grad_by_freq": True},
            {"sparse": True},
            {"sparse": True, "padding_idx": 1, "norm_type": 1.0},
        ],
        flax_options=[{}, {"dtype": jnp.float64}],
        without_bias=None,
        sharding={"embedding_metadata": ("data", "model")},
        sharded={"embedding": ("data", "model"), "r": (None, "data"), "s": (None, "model")},
        bad_inputs={"rows that do not divide": ((5, 4), (5, 4), TILE), "a scalar": ((), (), ONE)},
        initializers={"embedding_init": nnx.initializers.zeros},
        wording=[("Embedding", "Embed")],
    ),
    attention(),
    _norm(
        "BatchNorm",
        lambda **options: nn.BatchNorm1d(4, **options),
        lambda **options: nnx.BatchNorm(4, **({"momentum": 0.9, "epsilon": 1e-5} | options)),
        (12, 4),
        bad_inputs=BAD_FEATURES,
        wording=[("BatchNorm1d", "BatchNorm")],
    ),
    _norm(
        "LayerNorm",
        lambda **options: nn.LayerNorm(4, **options),
        lambda **options: nnx.LayerNorm(4, **({"epsilon": 1e-5} | options)),
        (6, 5, 4),
        affine="elementwise_affine",
        bad_inputs=BAD_FEATURES | ONE_AXIS,
    ),
    _norm(
        "GroupNorm",
        lambda **options: nn.GroupNorm(2, 4, **options),
        lambda **options: nnx.GroupNorm(4, num_groups=2, **({"epsilon": 1e-5} | options)),
        (6, 4, 5),
        channels_last=True,
        bad_inputs=BAD_FEATURES | ONE_AXIS,
    ),
    recurrent("LSTM", nnx.OptimizedLSTMCell, nn.LSTM),
    recurrent("GRU", nnx.GRUCell, nn.GRU),
    recurrent("LSTMCell", nnx.OptimizedLSTMCell, nn.LSTMCell),
    recurrent("GRUCell", nnx.GRUCell, nn.GRUCell),
]

# With other options and sizes, whose draws or whose axes differ.
NO_OPTIONS: dict[str, Any] = {"torch_options": (), "flax_options": ()}
VARIANTS = [
    *KINDS,
    *(conv(kind, axes, f"-{axes}d") for kind in TORCH_CONVS for axes in (1, 3)),
    conv("Conv", 2, "-groups", {"groups": 2}, {"feature_group_count": 2}, **NO_OPTIONS),
    conv(
        "ConvTranspose",
        2,
        "-transpose",
        {},
        {"transpose_kernel": True},
        sharding={"kernel_metadata": (None, None, "model", "data"), "bias_metadata": ("model",)},
        sharded={
            "kernel": (None, None, "model", "data"),
            "r": (None, "data"),
            "s": (None, "model"),
            "bias": (None, "model"),
        },
        **NO_OPTIONS,
    ),
    Kind(
        "Embed-one_feature",
        lambda **options: nn.Embedding(49, 1, **options),
        lambda **options: nnx.Embed(49, 1, **options),
        (6, 4),
        drawn=None,
        tokens=49,
    ),
    Kind(
        "Embed-one_token",
        lambda **options: nn.Embedding(1, 3, **options),
        lambda **options: nnx.Embed(1, 3, **options),
        (6, 4),
        drawn=None,
        tokens=1,
    ),
    attention("-no_bias", {"bias": False}, {"use_bias": False}, **NO_OPTIONS),
    attention(
        "-other_features",
        {"kdim": 5, "vdim": 5},
        {"in_kv_features": 5},
        torch_call=lambda layer, x: layer(x, x[..., :5], x[..., :5])[0],
        flax_call=lambda layer, x: layer(x, x[..., :5]),
        torch_options=({},),
        flax_options=({},),
    ),
    *(
        _norm(
            f"BatchNorm-{axes}d",
            partial((nn.BatchNorm2d, nn.BatchNorm3d)[axes - 2], 4),
            lambda **options: nnx.BatchNorm(4, **({"momentum": 0.9, "epsilon": 1e-5} | options)),
            (6, 4, *(2, 3, 2)[:axes]),
            channels_last=True,
        )
        for axes in (2, 3)
    ),
    recurrent("LSTM-apart", nnx.LSTMCell, nn.LSTM, torch_options=(), flax_options=({},)),
    recurrent("LSTMCell-apart", nnx.LSTMCell, nn.LSTMCell, torch_options=(), flax_options=({},)),
]
