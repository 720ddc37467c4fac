"""A subject of the suite: a public function or network, in torch, in Flax and in the oracle.

A subject says how to draw its arrays; everything else (dtypes, gradients, jit, compile, seeds) is the same for
all of them and lives in `run_torch`, `run_flax` and `run_oracle`. Weights are drawn in torch's layouts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx

import probly_flax as pf
from parity_tests.kit.trees import jax_of

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
        """Draws random arrays, around 1 for r and s so that none is degenerate, and exact in the dtype."""
        rng = np.random.default_rng([seed, *self.name.encode()])
        arrays = {}
        for name, shape in self.shapes.items():
            center = 1.0 if name.rpartition(".")[2] in ("r", "s") else 0.0
            values = center + self.scale.get(name, 1.0) * rng.standard_normal(shape)
            arrays[name] = values.astype(jnp.dtype(dtype)).astype(np.float64)
        return arrays | self._draw_integers(rng)

    def draw_exact(self, seed: int, dtype: str) -> Arrays:
        """Draws small integers times a power of two.

        They are signs only in bfloat16, whose stored values have 8 bits.
        """
        largest, scale, _ = self._dyadic(dtype)
        rng = np.random.default_rng([seed, *self.name.encode()])
        arrays = {
            name: rng.integers(-largest, largest + 1, shape) * scale
            for name, shape in ({**self.shapes, "g": self.output_shape}).items()
        }
        return arrays | self._draw_integers(rng)

    def certificate(self, arrays: Arrays, dtype: str) -> float:
        """Returns the largest value that any partial sum can reach, in units of the smallest one.

        All signs are made plus.
        """
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
    """Returns outputs and gradients in float64."""
    options = {name: value for name, value in subject.options.items() if name != "in_axes"}
    output, grads = subject.oracle(**arrays, **options)
    return {"output": output} | {f"gradient by {name}": grad for name, grad in grads.items()}


def run_torch(subject: Subject, arrays: Arrays, dtype: str, compiled: bool = False) -> Arrays:
    """Returns outputs and gradients by autograd, eager or under torch.compile."""
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
    """Returns outputs and gradients by vjp, op by op or under jax.jit."""
    model, run = _flax_call(subject, dtype, compiled)
    values = {name: v.astype(jnp.dtype(dtype)) if v.dtype.kind == "f" else v for name, v in arrays.items()}
    g = jax_of(values.pop("g"))
    if subject.model:
        x = jax_of(values.pop("x"))
        pf.load_arrays(model, values)
        output, (x_grad, params_grad) = run(g, x, nnx.state(model, nnx.Param))
        nnx.update(model, params_grad)
        grads = {"x": x_grad, **pf.to_arrays(model)}
    else:
        leaves = {name: jax_of(v) for name, v in values.items() if v.dtype.kind != "i"}
        integers = {name: jax_of(v) for name, v in values.items() if v.dtype.kind == "i"}
        output, grads = run(g, leaves, **integers)
        grads = grads[0]
    results = {"output": output} | {f"gradient by {name}": grad for name, grad in grads.items()}
    return {name: np.asarray(value).astype(np.float64) for name, value in results.items()}


@cache
def _flax_call(subject: Subject, dtype: str, compiled: bool) -> tuple[Any, Callable[..., Any]]:
    model = without_draws(lambda: subject.flax(jnp.dtype(dtype))) if subject.model else None

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


def without_draws(make: Callable[[], Any]) -> Any:
    """Makes a Flax model with zeros for weights, where others are loaded.

    JAX takes half a second to compile each draw.
    """

    def zeros(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        return jax.random.key(0) if is_key else jax_of(np.zeros(leaf.shape, leaf.dtype))

    graph, state = nnx.split(nnx.eval_shape(make))
    return nnx.merge(graph, jax.tree.map(zeros, state))


def randomized(model: Any, seed: int = 0) -> Any:
    """Gives the Flax model weights that NumPy draws, those that scale around 1."""
    rng = np.random.default_rng(seed)
    for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        center = 1.0 if path[-1] in ("r", "s", "scale") else 0.0
        variable.set_value(jax_of(center + 0.4 * rng.standard_normal(variable.shape), variable.dtype))
    return model


@nnx.jit  # one program: op by op, JAX compiles each operation for each shape
def jitted(model: Any, *inputs: Any, **options: Any) -> Any:
    """Calls a Flax model under jit."""
    return model(*inputs, **options)
