"""The subjects of the suite: each public function and network, in torch, in Flax and in the oracle.

A subject says how to draw its arrays; everything else (dtypes, gradients, jit, compile, seeds) is the same for
all of them and lives in `run_torch`, `run_flax` and `run_oracle`. Weights are drawn in torch's layouts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache, cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx
from torch import nn

import probly_flax as pf
import probly_torch as pt
from parity_tests import oracle

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True, eq=False)
class Subject:
    """A function of arrays, or a model whose weights are those of its arrays that are no inputs.

    Args:
        name: the name in test reports.
        shapes: the shape of each floating array.
        torch: the function, or `torch(dtype)` building the model.
        flax: its twin.
        oracle: returns outputs and gradients, given the cotangent first.
        model: whether torch and flax build models; their input is the array `x`.
        options: keyword arguments of the call.
        integers: integer arrays, drawn below the given bound: name to (shape, bound).
        exact: (largest integer, scale, degree) of the exact tier's dyadic numbers, for linear operations.
        scale: the standard deviation of random arrays, by name; 1 unless said.
    """

    name: str
    shapes: Mapping[str, tuple[int, ...]]
    torch: Callable[..., Any]
    flax: Callable[..., Any]
    oracle: Callable[..., Any]
    model: bool = False
    options: dict[str, Any] = field(default_factory=dict)
    integers: dict[str, tuple[tuple[int, ...], int]] = field(default_factory=dict)
    exact: tuple[int, float, int] | None = None
    scale: dict[str, float] = field(default_factory=dict)

    def draw(self, seed: int, dtype: str) -> Arrays:
        """Random arrays, around 1 for r and s so that none is degenerate, and exact in the dtype."""
        rng = np.random.default_rng([seed, *self.name.encode()])
        arrays = {}
        for name, shape in self.shapes.items():
            center = 1.0 if name.rpartition(".")[2] in ("r", "s") else 0.0
            values = center + self.scale.get(name, 1.0) * rng.standard_normal(shape)
            arrays[name] = values.astype(jnp.dtype(dtype)).astype(np.float64)
        return arrays | self._draw_integers(rng)

    def draw_exact(self, seed: int, dtype: str) -> Arrays:
        """Small integers times a power of two: signs only in bfloat16, whose stored values have 8 bits."""
        largest, scale, _ = self._dyadic(dtype)
        rng = np.random.default_rng([seed, *self.name.encode()])
        arrays = {
            name: rng.integers(-largest, largest + 1, shape) * scale
            for name, shape in ({**self.shapes, "g": self.output_shape}).items()
        }
        return arrays | self._draw_integers(rng)

    def certificate(self, arrays: Arrays, dtype: str) -> float:
        """The largest value that any partial sum can reach, in units of the smallest one: all signs made plus."""
        _, scale, degree = self._dyadic(dtype)
        worst = {name: np.maximum(np.abs(v), scale) if v.dtype.kind == "f" else v for name, v in arrays.items()}
        return max(float(np.abs(v).max()) for v in run_oracle(self, worst).values()) / scale**degree

    @cached_property
    def output_shape(self) -> tuple[int, ...]:
        """The shape of the outputs."""
        arrays = {name: np.ones(shape) for name, shape in self.shapes.items()}
        arrays |= {name: np.zeros(shape, np.int64) for name, (shape, _) in self.integers.items()}
        inputs = {name: torch.tensor(array) for name, array in arrays.items()}
        if not self.model:
            return tuple(self.torch(**inputs, **self.options).shape)
        return tuple(self.torch(torch.float64)(inputs["x"], **self.options).shape)

    def _dyadic(self, dtype: str) -> tuple[int, float, int]:
        assert self.exact is not None, "the exact tier is for linear operations"
        return (1, 1.0, 0) if dtype == "bfloat16" else self.exact

    def _draw_integers(self, rng: np.random.Generator) -> Arrays:
        return {name: rng.integers(0, bound, shape) for name, (shape, bound) in self.integers.items()}


def with_cotangent(subject: Subject, arrays: Arrays, seed: int, dtype: str) -> Arrays:
    """Adds a random gradient of the outputs, which every entry of them takes part in."""
    g = np.random.default_rng([seed, 1]).standard_normal(subject.output_shape)
    return arrays | {"g": np.asarray(g).astype(jnp.dtype(dtype)).astype(np.float64)}


def run_oracle(subject: Subject, arrays: Arrays) -> Arrays:
    """Outputs and gradients in float64."""
    options = {name: value for name, value in subject.options.items() if name != "in_axes"}
    output, grads = subject.oracle(**arrays, **options)
    return {"output": output} | {f"gradient by {name}": grad for name, grad in grads.items()}


def run_torch(subject: Subject, arrays: Arrays, dtype: str, compiled: bool = False) -> Arrays:
    """Outputs and gradients by autograd, eager or under torch.compile."""
    function, call = _torch_call(subject, dtype, compiled)
    torch_dtype = getattr(torch, dtype)
    tensors = {name: torch.tensor(v, dtype=torch_dtype if v.dtype.kind == "f" else None) for name, v in arrays.items()}
    g = tensors.pop("g")
    if subject.model:
        x = tensors.pop("x").requires_grad_()
        function.load_state_dict(tensors)
        output, leaves = call(x, **subject.options), {"x": x, **dict(function.named_parameters())}
    else:
        leaves = {name: t.requires_grad_() for name, t in tensors.items() if t.is_floating_point()}
        output = call(**tensors, **subject.options)
    grads = torch.autograd.grad(output, list(leaves.values()), g)
    results = {"output": output} | {f"gradient by {n}": v for n, v in zip(leaves, grads, strict=True)}
    return {name: value.detach().double().numpy() for name, value in results.items()}


@cache
def _torch_call(subject: Subject, dtype: str, compiled: bool) -> tuple[Any, Callable[..., Any]]:
    function = subject.torch(getattr(torch, dtype)) if subject.model else subject.torch
    return function, torch.compile(function, fullgraph=True) if compiled else function


def run_flax(subject: Subject, arrays: Arrays, dtype: str, compiled: bool = False) -> Arrays:
    """Outputs and gradients by vjp, op by op or under jax.jit."""
    model, run = _flax_call(subject, dtype, compiled)
    values = {name: v.astype(jnp.dtype(dtype)) if v.dtype.kind == "f" else v for name, v in arrays.items()}
    g = jnp.asarray(values.pop("g"))
    if subject.model:
        x = jnp.asarray(values.pop("x"))
        pf.load_arrays(model, values)
        output, (x_grad, params_grad) = run(g, x, nnx.state(model, nnx.Param))
        nnx.update(model, params_grad)
        grads = {"x": x_grad, **pf.to_arrays(model)}
    else:
        leaves = {name: jnp.asarray(v) for name, v in values.items() if v.dtype.kind != "i"}
        integers = {name: jnp.asarray(v) for name, v in values.items() if v.dtype.kind == "i"}
        output, grads = run(g, leaves, **integers)
        grads = grads[0]
    results = {"output": output} | {f"gradient by {name}": grad for name, grad in grads.items()}
    return {name: np.asarray(value).astype(np.float64) for name, value in results.items()}


@cache
def _flax_call(subject: Subject, dtype: str, compiled: bool) -> tuple[Any, Callable[..., Any]]:
    model = subject.flax(jnp.dtype(dtype)) if subject.model else None

    def forward(*leaves: Any, **integers: jax.Array) -> jax.Array:
        if model is None:
            return subject.flax(**leaves[0], **integers, **subject.options)
        x, params = leaves
        graph, *states = nnx.split(model, nnx.Param, ...)
        return nnx.merge(graph, params, *states[1:], copy=True)(x, **subject.options)

    def forward_and_backward(g: jax.Array, *leaves: Any, **integers: jax.Array) -> tuple[jax.Array, tuple[Any, ...]]:
        output, backward = jax.vjp(lambda *leaves: forward(*leaves, **integers), *leaves)
        return output, backward(g)

    return model, jax.jit(forward_and_backward) if compiled else forward_and_backward


# The table.


def _linear(sizes: tuple[int, int, int, int], middle: tuple[int, ...] = (), bias: bool = True) -> Subject:
    num_members, batch, in_features, out_features = sizes
    shapes = {
        "x": (num_members * batch, *middle, in_features),
        "weight": (out_features, in_features),
        "r": (num_members, in_features),
        "s": (num_members, out_features),
    }
    if bias:
        shapes["bias"] = (num_members, out_features)
    name = f"batch_ensemble_linear-E{num_members}-B{batch}-{in_features}to{out_features}{'' if bias else '-no_bias'}"
    return Subject(
        name=name + "".join(f"-{size}" for size in middle),
        shapes=shapes,
        torch=pt.functional.batch_ensemble_linear,
        flax=flax_linear,
        oracle=oracle.batch_ensemble_linear,
        exact=(8, 0.125, 4),
    )


def flax_linear(x: jax.Array, weight: jax.Array, **rest: Any) -> jax.Array:
    """batch_ensemble_linear of torch's weight layout."""
    return pf.functional.batch_ensemble_linear(x, weight.T, **rest)


def _layer() -> Subject:
    num_members, batch, in_features, out_features = 3, 4, 5, 7
    base = _linear((num_members, batch, in_features, out_features))

    def torch_layer(dtype: torch.dtype) -> nn.Module:
        return pt.BatchEnsembleLinear(nn.Linear(in_features, out_features, dtype=dtype), num_members=num_members)

    def flax_layer(dtype: Any) -> nnx.Module:
        linear = nnx.Linear(in_features, out_features, param_dtype=dtype, rngs=nnx.Rngs(0))
        return pf.BatchEnsembleLinear(linear, num_members=num_members)

    return Subject(
        "BatchEnsembleLinear", base.shapes, torch_layer, flax_layer, base.oracle, model=True, exact=base.exact
    )


WIDTHS = (5, 6, 3)


def torch_mlp(dtype: torch.dtype) -> nn.Module:
    """Linear, relu, linear."""
    return nn.Sequential(nn.Linear(*WIDTHS[:2], dtype=dtype), nn.ReLU(), nn.Linear(*WIDTHS[1:], dtype=dtype))


class WithForward(nn.Sequential):
    """A Sequential whose forward is its own, as most networks' is: Ensemble knows nothing of it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x)


def flax_mlp(dtype: Any) -> nnx.Module:
    """Linear, relu, linear."""
    rngs = nnx.Rngs(0)
    linear = partial(nnx.Linear, param_dtype=dtype, rngs=rngs)
    return nnx.Sequential(linear(*WIDTHS[:2]), jax.nn.relu, linear(*WIDTHS[1:]))


def _networks() -> list[Subject]:
    num_members, batch = 4, 3
    subjects = []
    for shared in (True, False):
        x = {"x": (batch, WIDTHS[0]) if shared else (num_members, batch, WIDTHS[0])}
        options: dict[str, Any] = {} if shared else {"in_axes": 0}
        suffix = "shared_batch" if shared else "batch_each"
        layers = ((0, WIDTHS[0], WIDTHS[1]), (2, WIDTHS[1], WIDTHS[2]))
        stacked, fast = dict(x), dict(x)
        for layer, fan_in, fan_out in layers:
            stacked |= {
                f"{layer}.weight": (num_members, fan_out, fan_in),
                f"{layer}.bias": (num_members, fan_out),
            }
            fast |= {
                f"network.{layer}.weight": (fan_out, fan_in),
                f"network.{layer}.r": (num_members, fan_in),
                f"network.{layer}.s": (num_members, fan_out),
                f"network.{layer}.bias": (num_members, fan_out),
            }
        ways = [("", nn.Sequential, None), ("-vmap", WithForward, None), ("-chunks", WithForward, 3)]
        subjects += [
            *(
                Subject(
                    f"Ensemble-{suffix}{way}",
                    stacked,
                    lambda dtype, kind=kind, size=size: pt.ensemble(
                        kind(*torch_mlp(dtype)), num_members, chunk_size=size
                    ),
                    lambda dtype, size=size: pf.ensemble(flax_mlp(dtype), num_members, chunk_size=size),
                    oracle.ensemble_mlp,
                    model=True,
                    options=options,
                    exact=(4, 1.0, 1),
                )
                for way, kind, size in [*ways, ("-loop", WithForward, 1)]
            ),
            Subject(
                f"BatchEnsemble-{suffix}",
                fast,
                lambda dtype: pt.batchensemble(torch_mlp(dtype), num_members),
                lambda dtype: pf.batchensemble(flax_mlp(dtype), num_members),
                oracle.batch_ensemble_mlp,
                model=True,
                options=options,
                exact=(2, 1.0, 1),
            ),
        ]
    return subjects


def _members(name: str, array: str, shape: tuple[int, ...], num_members: int) -> Subject:
    return Subject(
        name,
        {array: shape},
        getattr(pt, name),
        getattr(pf, name),
        getattr(oracle, name),
        options={"num_members": num_members},
        exact=(8, 0.125, 1),
    )


def _of_logits(name: str, module: str, labels: tuple[int, ...] | None = None, logits=(3, 5, 4)) -> Subject:
    return Subject(
        f"{name}-{'x'.join(map(str, logits))}" + (f"-labels{len(labels)}d" if labels else ""),
        {"logits": logits},
        getattr(getattr(pt, module), name),
        getattr(getattr(pf, module), name),
        getattr(oracle, name),
        integers={"labels": (labels, logits[2])} if labels else {},
        scale={"logits": 3.0},
    )


def torch_member_losses(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Of the cross-entropy of one network."""
    return pt.losses.member_losses(nn.functional.cross_entropy, logits, labels, in_axes=0 if labels.ndim == 2 else None)


def flax_member_losses(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Of the cross-entropy of one network."""

    def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
        return -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], axis=1).mean()

    return pf.losses.member_losses(cross_entropy, logits, labels, in_axes=0 if labels.ndim == 2 else None)


def _member_losses(labels: tuple[int, ...]) -> Subject:
    return Subject(
        f"member_losses-labels{len(labels)}d",
        {"logits": (3, 5, 4)},
        torch_member_losses,
        flax_member_losses,
        oracle.member_losses,
        integers={"labels": (labels, 4)},
        scale={"logits": 3.0},
    )


SUBJECTS = [
    _linear((3, 4, 5, 7)),
    _linear((3, 4, 6, 6)),
    _linear((2, 5, 3, 4), bias=False),
    _linear((1, 3, 4, 2)),
    _linear((4, 1, 1, 1)),
    _linear((2, 3, 5, 4), middle=(2, 3)),
    _linear((3, 5, 37, 19)),
    _layer(),
    *_networks(),
    _members("tile_members", "x", (4, 3, 2), 3),
    _members("split_members", "y", (12, 5), 3),
    *(
        _of_logits(name, "uncertainty", logits=shape)
        for name in ("log_mean_probs", "mean_probs", "predictive_entropy", "expected_entropy", "mutual_information")
        for shape in ((3, 5, 4), (4, 3, 2))
    ),
    _of_logits("member_cross_entropy", "losses", (5,)),
    _of_logits("member_cross_entropy", "losses", (3, 5)),
    _member_losses((5,)),
    _member_losses((3, 5)),
    _of_logits("mixture_cross_entropy", "losses", (5,)),
]
EXACT_SUBJECTS = [subject for subject in SUBJECTS if subject.exact]
