"""Compares attention: nn.MultiheadAttention and nnx.MultiHeadAttention, by cases of sizes and masks."""

from dataclasses import dataclass
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx
from torch import nn

from parity_tests import standard
from parity_tests.kit.trees import jax_of
from parity_tests.suite.oracle.attention import batch_ensemble_attention
from parity_tests.suite.subjects.subject import without_draws
from probly_flax.layers.attention import BatchEnsembleMultiHeadAttention as FlaxAttention
from probly_torch.layers.attention import BatchEnsembleMultiHeadAttention as TorchAttention

# The weights of one layer under the names of the other.


def to_torch(layer):
    """Returns arrays by torch's names. It takes gradients as well, which come in a layer's place."""
    q, k, v, out = layer.query, layer.key, layer.value, layer.out
    kernels = [np.asarray(p.kernel[...]) for p in (q, k, v)]
    weights = [kernel.reshape(len(kernel), -1).T for kernel in kernels]
    if layer.in_kv_features == layer.in_features:
        arrays = {"in_proj_weight": np.concatenate(weights)}
    else:
        arrays = {f"{name}_proj_weight": weight for name, weight in zip("qkv", weights, strict=True)}
    out_kernel = np.asarray(out.kernel[...])
    arrays["out_proj.weight"] = out_kernel.reshape(-1, out_kernel.shape[-1]).T
    if isinstance(layer, FlaxAttention):
        for name, p in zip(("q_", "k_", "v_", "out_proj."), (q, k, v, out), strict=True):
            arrays |= {f"{name}r": np.asarray(p.r[...]), f"{name}s": np.asarray(p.s[...])}
    if layer.use_bias:
        lead = (layer.num_members,) if isinstance(layer, FlaxAttention) else ()
        biases = [np.asarray(p.bias[...]).reshape(*lead, -1) for p in (q, k, v)]
        arrays |= {"in_proj_bias": np.concatenate(biases, axis=-1), "out_proj.bias": np.asarray(out.bias[...])}
    return arrays


def from_torch(layer, arrays):
    """Copies arrays by torch's names into a layer."""
    packed = arrays.get("in_proj_weight")
    weights = [arrays[f"{n}_proj_weight"] for n in "qkv"] if packed is None else np.split(packed, 3)
    weights.append(arrays["out_proj.weight"])
    biases = [None] * 4
    if layer.use_bias:
        biases = [*np.split(arrays["in_proj_bias"], 3, axis=-1), arrays["out_proj.bias"]]
    projections = (layer.query, layer.key, layer.value, layer.out)
    for name, p, weight, bias in zip(("q_", "k_", "v_", "out_proj."), projections, weights, biases, strict=True):
        p.kernel[...] = jax_of(weight.T.reshape(p.kernel.shape))
        if bias is not None:
            p.bias[...] = jax_of(bias.reshape(p.bias.shape))
        if isinstance(layer, FlaxAttention):
            p.r[...], p.s[...] = jax_of(arrays[f"{name}r"]), jax_of(arrays[f"{name}s"])


@dataclass(frozen=True)
class Case:
    num_members: int = 3
    batch: int = 2
    steps: int = 4
    keys: int = 4
    features: int = 8
    kv_features: int = 8
    heads: int = 2
    bias: bool = True
    attn_mask: int | None = None  # its number of axes
    padding: bool = False

    def torch(self, dtype="float32", **options):
        """Makes torch's layer. A pair is made with options of nn.MultiheadAttention."""
        options = {"batch_first": True, "bias": self.bias} | options
        if self.kv_features != self.features:
            options |= {"kdim": self.kv_features, "vdim": self.kv_features}
        return nn.MultiheadAttention(self.features, self.heads, dtype=getattr(torch, dtype), **options)

    def flax(self, dtype="float32", **options):
        """Makes Flax's layer with its softmax in the dtype of the layer.

        This is what nnx does where there is dropout.
        """
        options = {"dropout_rate": 0.1, "deterministic": True} | options
        return nnx.MultiHeadAttention(
            self.heads,
            self.features,
            in_kv_features=self.kv_features,
            use_bias=self.bias,
            param_dtype=jnp.dtype(dtype),
            decode=False,
            rngs=nnx.Rngs(0),
            **options,
        )

    def draw(self, seed, dtype):
        """Draws inputs, a cotangent and weights by torch's names, all exact in the dtype."""
        rng = np.random.default_rng([seed, self.num_members, self.steps, self.keys])
        rows = self.num_members * self.batch
        shapes = {
            "query": (rows, self.steps, self.features),
            "key": (rows, self.keys, self.kv_features),
            "value": (rows, self.keys, self.kv_features),
            "g": (rows, self.steps, self.features),
        }
        shapes |= {name: tuple(parameter.shape) for name, parameter in torch_layer(self, "float32").named_parameters()}
        arrays = {}
        for name, shape in shapes.items():
            center = 1.0 if name[-2:] in ("_r", "_s", ".r", ".s") else 0.0
            # A softmax of scores that are too large is constant, of too small ones flat: its gradients cancel in both.
            scale = 0.4 if center or name.endswith("weight") else 1.0
            values = center + scale * rng.standard_normal(shape)
            arrays[name] = values.astype(jnp.dtype(dtype)).astype(np.float64)
        return arrays

    def masks(self):
        """Returns torch's masks, True where hidden. The first key is never hidden."""
        rng, rows = np.random.default_rng(0), self.num_members * self.batch
        attn_mask = padding = None
        if self.attn_mask:
            shape = (self.steps, self.keys)
            attn_mask = rng.random(shape if self.attn_mask == 2 else (rows * self.heads, *shape)) < 0.4
            attn_mask[..., 0] = False
        if self.padding:
            padding = rng.random((rows, self.keys)) < 0.4
            padding[:, 0] = False
        return attn_mask, padding

    def hidden(self):
        """Returns both masks as one, (rows, heads, steps, keys)."""
        attn_mask, padding = self.masks()
        hidden = np.zeros((self.num_members * self.batch, self.heads, self.steps, self.keys), bool)
        if attn_mask is not None:
            hidden |= attn_mask if attn_mask.ndim == 2 else attn_mask.reshape(hidden.shape)
        if padding is not None:
            hidden |= padding[:, None, None]
        return hidden


CASES = {
    "self": Case(),
    "self-odd": Case(num_members=2, batch=3, steps=5, keys=5, features=9, kv_features=9, heads=3, attn_mask=2),
    "no bias": Case(bias=False, padding=True, steps=3, keys=5, attn_mask=3),
    "other features": Case(steps=3, keys=5, kv_features=5, attn_mask=2, padding=True),
}


def sown(layer, *inputs, **kwargs):
    """Returns outputs and attention weights of each head."""
    y, intermediates = nnx.capture(layer, nnx.Intermediate)(*inputs, sow_weights=True, **kwargs)
    return y, intermediates["attention_weights"][0]


def run_oracle(case, arrays):
    added = np.where(case.hidden(), -np.inf, 0.0)
    output, attention, grads = batch_ensemble_attention(num_heads=case.heads, added=added, **arrays)
    named = {f"gradient by {name}": grad for name, grad in grads.items()}
    return {"output": output, "weights": attention.mean(1), **named}


@cache
def torch_layer(case, dtype):
    return TorchAttention(case.torch(dtype), num_members=case.num_members)


def run_torch(case, arrays, dtype, need_weights=True):
    layer = torch_layer(case, dtype)
    tensors = {name: torch.tensor(value, dtype=getattr(torch, dtype)) for name, value in arrays.items()}
    g = tensors.pop("g")
    inputs = {name: tensors.pop(name).requires_grad_() for name in ("query", "key", "value")}
    layer.load_state_dict(tensors)
    attn_mask, padding = (None if mask is None else torch.tensor(mask) for mask in case.masks())
    y, weights = layer(**inputs, attn_mask=attn_mask, key_padding_mask=padding, need_weights=need_weights)
    leaves = inputs | dict(layer.named_parameters())
    grads = torch.autograd.grad(y, list(leaves.values()), g)
    results = {"output": y} | {f"gradient by {name}": grad for name, grad in zip(leaves, grads, strict=True)}
    if need_weights:
        results["weights"] = weights
    return {name: value.detach().double().numpy() for name, value in results.items()}


def run_flax(case, arrays, dtype, **options):
    layer, run = _flax_call(case, dtype, **options)
    values = {name: value.astype(jnp.dtype(dtype)) for name, value in arrays.items()}
    g, *inputs = (jax_of(values[name]) for name in ("g", "query", "key", "value"))
    from_torch(layer, values)
    y, weights, (params_grad, *inputs_grad) = run(nnx.state(layer, nnx.Param), g, *inputs)
    nnx.update(layer, params_grad)
    grads = dict(zip(("query", "key", "value"), inputs_grad, strict=True)) | to_torch(layer)
    results = {"output": y, "weights": weights} | {f"gradient by {name}": grad for name, grad in grads.items()}
    return {name: np.asarray(value).astype(np.float64) for name, value in results.items() if value is not None}


@cache
def _flax_call(case, dtype, sow=True, compiled=True, dropout_rate=0.1):
    base = partial(case.flax, dtype, dropout_rate=dropout_rate)
    layer = without_draws(lambda: FlaxAttention(base(), num_members=case.num_members))
    hidden = case.hidden()
    mask = jax_of(~hidden) if hidden.any() else None
    graph, _, rest = nnx.split(layer, nnx.Param, ...)

    def forward(params, *inputs):
        layer = nnx.merge(graph, params, rest, copy=True)
        if not sow:
            return layer(*inputs, mask=mask), None
        y, weights = sown(layer, *inputs, mask=mask)
        return y, weights.mean(1)

    def forward_and_backward(params, g, *inputs):
        y, backward, weights = jax.vjp(forward, params, *inputs, has_aux=True)
        return y, weights, backward(g)

    return layer, jax.jit(forward_and_backward) if compiled else forward_and_backward


def verdicts(case, dtypes, run_torch=run_torch, run_flax=run_flax, without=()):
    arrays = [case.draw(seed, dtypes[0]) for seed in range(3)]
    reference = [{name: v for name, v in run_oracle(case, a).items() if name not in without} for a in arrays]
    return standard.bounded(
        {dtype: [run_torch(case, a, dtype) for a in arrays] for dtype in dtypes},
        {dtype: [run_flax(case, a, dtype) for a in arrays] for dtype in dtypes},
        reference,
        dtypes[0],
    )
