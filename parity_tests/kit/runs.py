"""Runs of the two models on equal numbers: outputs, statistics and gradients by torch's names, in torch's layouts."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx
from torch import Tensor, nn

import probly_flax
import probly_torch
from parity_tests.kit.masks import Masks
from parity_tests.kit.trees import Arrays, Key, Layout, Run, is_floating, jax_of, leaves, mapped, numpy_of
from probly_flax.weights import Inventory

Cotangent = Callable[[str, Sequence[int]], np.ndarray]  # the gradient of an output, by its name and shape
STATISTICS = nnx.Not(nnx.Any(nnx.Param, nnx.RngState, nnx.Cache, nnx.Intermediate, nnx.Perturbation))


@contextmanager
def highest_precision() -> Iterator[None]:
    """Switches off TF32 and bfloat16 inside of float32 products, in both frameworks."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.backends.cudnn.flags(allow_tf32=False), jax.default_matmul_precision("highest"):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


class TorchModel:
    """A copy of a torch model in another dtype. It is left as it was by every run."""

    def __init__(self, module: nn.Module, dtype: str, train: bool, masks: Masks | None = None) -> None:
        self.dtype, self.masks = getattr(torch, dtype), masks
        self.module = copy.deepcopy(module).to(self.dtype).train(train)
        self.module.requires_grad_(True)
        self.device = next((t.device for t in self.module.state_dict().values()), torch.device("cpu"))

    def to_arrays(self) -> dict[str, np.ndarray]:
        """Returns its weights and statistics."""
        return probly_torch.to_arrays(self.module)

    def set_arrays(self, arrays: Arrays) -> None:
        """Sets other weights and statistics, converted to its dtype."""
        probly_torch.load_arrays(self.module, arrays, cast=True)

    def given(self, inputs: Any) -> Any:
        """Returns (args, kwargs) of NumPy as tensors of its own."""
        return mapped(inputs, self._tensor)

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Wraps a forward: statistics that it updates are what they were afterwards."""
        before = {name: buffer.detach().clone() for name, buffer in self.module.named_buffers()}
        try:
            yield
        finally:
            with torch.no_grad():
                for name, buffer in self.module.named_buffers():
                    if name in before:
                        buffer.copy_(before[name])

    def masked(self, seed: int | None) -> AbstractContextManager[Any]:
        """Wraps a forward: masks of dropout are those of Flax with this seed, which ran before."""
        return nullcontext() if self.masks is None or seed is None else self.masks.torch(seed, self.module)

    def run(self, inputs: Any, cotangent: Cotangent | None = None, seed: int | None = None) -> Run:
        """Returns outputs and statistics.

        With a gradient of the outputs, by their names and shapes, it returns the other gradients too.
        """
        args, kwargs = self.given(inputs)
        sources = {name: t for name, t in leaves((args, kwargs)) if t.is_floating_point()}
        for tensor in sources.values():
            tensor.requires_grad_(cotangent is not None)
        with self.restored(), self.masked(seed), torch.set_grad_enabled(cotangent is not None):
            outputs = dict(leaves(self.module(*args, **kwargs), "output"))
            run: Run = {("output", name): numpy_of(t) for name, t in outputs.items()}
            buffers = dict(self.module.named_buffers())
            run |= {("statistic", n): numpy_of(buffers[n]) for n in self.module.state_dict() if n in buffers}
            if cotangent is not None:
                run |= self._gradients(outputs, sources, cotangent)
        return run

    def _gradients(self, outputs: Mapping[str, Tensor], sources: Mapping[str, Tensor], cotangent: Cotangent) -> Run:
        of = {name: t for name, t in outputs.items() if t.is_floating_point() and t.requires_grad}
        into = {("input gradient", _input_name(name)): t for name, t in sources.items()}
        into |= {("parameter gradient", name): parameter for name, parameter in self.module.named_parameters()}
        return gradients_of(of.values(), into, [self._tensor(cotangent(name, t.shape)) for name, t in of.items()])

    def _tensor(self, array: np.ndarray) -> Tensor:
        floating = np.issubdtype(array.dtype, np.floating)
        return torch.tensor(array, dtype=self.dtype if floating else None, device=self.device)


def gradients_of(outputs: Iterable[Tensor], into: Mapping[Key, Tensor], g: list[Tensor] | None = None) -> Run:
    """Returns the gradients of the outputs by these tensors: 0 by those on which none depends."""
    grads: tuple[Tensor | None, ...] = (None,) * len(into)
    if outputs := list(outputs):
        grads = torch.autograd.grad(outputs, list(into.values()), g, allow_unused=True)
    pairs = zip(into.items(), grads, strict=True)
    return {key: numpy_of(torch.zeros_like(t) if grad is None else grad) for (key, t), grad in pairs}


class FlaxModel:
    """A copy of a Flax model in another dtype. It is left as it was by every run.

    Its arrays have torch's names: `names` are those that both have, with what the twin calls them.
    """

    def __init__(
        self,
        module: nnx.Module,
        dtype: str,
        train: bool,
        jit: bool = True,
        flatten: Mapping[str, Sequence[int]] | None = None,
        masks: Masks | None = None,
        names: Mapping[str, str] | None = None,
    ) -> None:
        self.dtype, self.jit, self.flatten, self.masks, self.names = dtype, jit, flatten, masks, names or {}
        self.module = _cast(module, dtype)
        self.module.train() if train else self.module.eval()
        self._graph = nnx.split(self.module, nnx.Param, ...)[0]
        self._compiled: dict[str, Any] = {}
        weights = Inventory(self.module).weights("compare")
        self._parameters = {n: weight.also for n, weight in weights.items() if _all(weight.variables, nnx.Param)}
        self._statistics = [
            n for n, each in weights.items() if n not in self._parameters and _all(each.variables, nnx.Variable)
        ]

    @contextmanager
    def x64(self) -> Iterator[None]:
        """Gives JAX float64, and makes nnx promote to it. Other dtypes run as the caller set up JAX."""
        if self.dtype == "float64":
            with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
                yield
        else:
            yield

    def copy(self) -> Self:
        """Copies the model, with weights of its own. What is compiled is shared."""
        new = copy.copy(self)
        new.module = nnx.clone(self.module)
        return new

    def parameters(self) -> list[tuple[str, ...]]:
        """Returns the names of the parameters. Those of a sum, which is one parameter here, are together."""
        back = self._torch_names()
        own = ((name, *others) for name, others in self._parameters.items())
        return [tuple(back.get(each, each) for each in names) for names in own]

    def statistics(self) -> list[str]:
        """Returns the names of the statistics."""
        back = self._torch_names()
        return [back.get(name, name) for name in self._statistics]

    def to_arrays(self) -> dict[str, np.ndarray]:
        """Returns its weights and statistics."""
        with self.x64():
            arrays = probly_flax.to_arrays(self.module, flatten=self.flatten)
        back = self._torch_names()
        own = {name: array for name, array in arrays.items() if name not in back}
        return own | {back[name]: array for name, array in arrays.items() if name in back}

    def set_arrays(self, arrays: Arrays, strict: bool = False) -> None:
        """Sets weights and statistics that both have. Under strict a name that only one side has is a ValueError."""
        own = {self.names[name]: array for name, array in arrays.items() if name in self.names}
        if not own and not strict:
            return
        with self.x64(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            probly_flax.load_arrays(self.module, own, strict=strict, cast=True, flatten=self.flatten)

    def arrays_of(self, state: Any) -> dict[str, np.ndarray]:
        """Returns the arrays of a state, such as gradients, under the names of the weights that they belong to."""
        holder = self.copy()
        nnx.update(holder.module, state)
        return holder.to_arrays()

    def named(self, gradients: Any, kind: str) -> Run:
        """Returns the gradients of the parameters: the summands of a sum each have its gradient."""
        arrays = self.arrays_of(gradients)
        return {(kind, each): numpy_of(arrays[names[0]]) for names in self.parameters() for each in names}

    def _torch_names(self) -> dict[str, str]:
        return {own: name for name, own in self.names.items()}

    def given(self, inputs: Any, layout: Layout) -> Any:
        """Returns (args, kwargs) of NumPy as JAX arrays in Flax's layout."""

        def array(values: np.ndarray) -> jax.Array:
            return jax_of(layout.to_flax(values), self.dtype if is_floating(values) else None)

        with self.x64():
            return mapped(inputs, array)

    def run(
        self,
        inputs: Any,
        layout: Layout,
        shapes: Mapping[str, Sequence[int]],
        cotangent: Cotangent | None = None,
        seed: int = 0,
        jit: bool = True,
    ) -> Run:
        """Runs as `TorchModel.run` does. `shapes` are those of torch's outputs, `seed` is that of the masks.

        Raises:
            LayoutError: if outputs have other shapes, or other places.
        """
        given = dict(leaves(self.given(inputs, layout)))
        with self.x64():
            arguments = *self.state, given, jax.random.key(seed)
            if cotangent is None:
                outputs, statistics = self._called("forward", self._forward, inputs, jit)(*arguments)
                grads = None
            else:
                g = {
                    name: jax_of(layout.to_flax_output(cotangent(name, shapes[name]), struct.shape), self.dtype)
                    for name, struct in self.outputs(inputs, layout, shapes).items()
                    if is_floating(struct)
                }
                called = self._called("backward", self._backward, inputs, jit)
                outputs, statistics, *grads = called(*arguments, g)
            run = {("output", n): _in_torch(layout, n, numpy_of(array), shapes) for n, array in outputs.items()}
            arrays = self.arrays_of(statistics)
            run |= {("statistic", name): numpy_of(arrays[name]) for name in self.statistics()}
            if grads is not None:
                of_parameters, of_inputs = grads
                for name, array in of_inputs.items():
                    run[("input gradient", _input_name(name))] = layout.to_torch_input(numpy_of(array))
                run |= self.named(of_parameters, "parameter gradient")
        return run

    def outputs(self, inputs: Any, layout: Layout, shapes: Mapping[str, Sequence[int]]) -> dict[str, Any]:
        """Returns shapes and dtypes of the outputs in Flax, without computing them.

        Raises:
            LayoutError: if they do not fit torch's shapes.
        """
        given = dict(leaves(self.given(inputs, layout)))
        with self.x64():
            outputs: dict[str, Any] = jax.eval_shape(self._forward(inputs), *self.state, given, jax.random.key(0))[0]
        if list(outputs) != list(shapes):
            raise LayoutError(f"outputs at {', '.join(shapes)} in torch and at {', '.join(outputs)} in Flax")
        for name, struct in outputs.items():
            _in_torch(layout, name, np.broadcast_to(np.int8(0), struct.shape), shapes)
        return outputs

    @property
    def state(self) -> tuple[Any, Any]:
        """Its parameters, and the rest of what it holds."""
        _, *states = nnx.split(self.module, nnx.Param, ...)
        return states[0], states[1]

    def called(
        self, state: tuple[Any, Any], inputs: Any, key: Any, around: Callable[[Any], Any] = nullcontext
    ) -> tuple[Any, nnx.Module]:
        """Calls a copy of this state, whose masks of dropout come from the key. Returns the outputs, and the copy."""
        args, kwargs = inputs
        model: Any = nnx.merge(self._graph, *state, copy=True)
        with around(model), nullcontext() if self.masks is None else self.masks.flax(key):
            return model(*args, **kwargs), model

    def _called(self, what: str, make: Callable[[Any], Any], inputs: Any, jit: bool) -> Any:
        """Returns the call, compiled once, for inputs of one structure."""
        if not (self.jit and jit):
            return make(inputs)
        if what not in self._compiled:
            self._compiled[what] = jax.jit(make(inputs))
        return self._compiled[what]

    def _forward(self, inputs: Any) -> Any:
        def forward(parameters: Any, rest: Any, given: dict[str, Any], key: Any) -> tuple[dict[str, Any], Any]:
            values = iter(given.values())
            outputs, model = self.called((parameters, rest), mapped(inputs, lambda _: next(values)), key)
            return dict(leaves(outputs, "output")), nnx.state(model, STATISTICS)

        return forward

    def _backward(self, inputs: Any) -> Any:
        forward = self._forward(inputs)

        def backward(parameters: Any, rest: Any, given: dict[str, Any], key: Any, g: dict[str, Any]) -> tuple[Any, ...]:
            floating = {name: array for name, array in given.items() if is_floating(array)}

            def differentiable(parameters: Any, floating: dict[str, Any]) -> Any:
                arrays = {name: floating.get(name, array) for name, array in given.items()}
                outputs, statistics = forward(parameters, rest, arrays, key)
                return {name: outputs[name].astype(g[name].dtype) for name in g}, (outputs, statistics)

            _, pull, (outputs, statistics) = jax.vjp(differentiable, parameters, floating, has_aux=True)
            return outputs, statistics, *pull(g)

        return backward


def _all(variables: Sequence[Any], kind: type) -> bool:
    return bool(variables) and all(isinstance(variable, kind) for variable in variables)


class LayoutError(ValueError):
    """Outputs that do not fit those of torch."""


def _in_torch(layout: Layout, name: str, array: np.ndarray, shapes: Mapping[str, Sequence[int]]) -> np.ndarray:
    found = layout.to_torch(array, shapes[name]) if name in shapes else None
    if found is None:
        raise LayoutError(f"{name} of shape {shapes.get(name)} in torch and {array.shape} in Flax")
    return found


def _input_name(place: str) -> str:
    """Names an input: `[0][1]` is the second positional argument, `[1]['mask']` the keyword argument."""
    return f"inputs{place[3:]}" if place.startswith("[0]") else place[5:].replace("']", "", 1)


def _cast(module: nnx.Module, dtype: str) -> nnx.Module:
    """Copies a model whose weights and computations get another dtype.

    A lower dtype that it computes in by choice is kept.
    """
    own = {v.dtype.name for _, v in nnx.to_flat_state(nnx.state(module, nnx.Param)) if is_floating(v.get_value())}
    with jax.enable_x64(True):
        model = nnx.clone(module)
        for _, variable in nnx.to_flat_state(nnx.state(model, nnx.Not(nnx.RngState))):
            if isinstance(variable, nnx.Variable) and is_floating(variable.get_value()):
                variable.set_value(jax_of(np.asarray(variable.get_value()), dtype))
        for _, layer in nnx.iter_modules(model):
            for name in ("dtype", "param_dtype"):
                current = getattr(layer, name, None)
                if current is not None and (dtype == "float64" or jnp.dtype(current).name in own):
                    setattr(layer, name, jnp.dtype(dtype))
    return model
