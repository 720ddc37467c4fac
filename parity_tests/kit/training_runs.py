"""Training in each framework, on equal numbers: losses, gradients, statistics and new weights by torch's names."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax  # type: ignore[import-untyped]
import torch
from flax import nnx
from torch import Tensor, nn

import probly_flax
from parity_tests.kit.masks import Masks
from parity_tests.kit.runs import _STATISTICS, FlaxModel, Layout, TorchModel
from parity_tests.kit.trees import is_array, is_floating, jax_of, leaves, mapped, numpy_of, rounded
from probly_common.checks.values import type_name

WHAT = "compare_training"
Key = tuple[str, str]  # loss, gradient, statistic or update; torch's name
Run = dict[Key, np.ndarray]
Arrays = dict[str, np.ndarray]
MakeOptimizer = torch.optim.Optimizer | Callable[[list[nn.Parameter]], torch.optim.Optimizer]


@dataclass(frozen=True)
class Batch:
    """Inputs as (args, kwargs), and targets: NumPy arrays in torch's layout."""

    inputs: Any
    targets: Any
    seed: int


def batches_of(batches: Iterable[Any], steps: int | None, dtype: str, seed: int) -> list[Batch]:
    """Makes as many batches as steps, with floating values rounded to what the lower dtype holds."""
    if isinstance(batches, str | Mapping) or not isinstance(batches, Iterable):
        raise TypeError(
            f"{WHAT} expects batches to be pairs of inputs and targets; got {type_name(batches)}. Pass [(x, y)]."
        )
    if steps is not None and (type(steps) is not int or steps < 1):
        raise ValueError(f"{WHAT} expects steps of at least 1; got {steps!r}. Leave it out for one step a batch.")
    pairs = list(batches if steps is None else islice(batches, steps))
    for pair in pairs:
        if not isinstance(pair, tuple | list) or len(pair) != 2 or not list(leaves(pair[0])):
            raise TypeError(
                f"{WHAT} expects batches to be pairs of inputs and targets; got {pair!r:.200}. Pass (x, y)."
            )
    if not pairs:
        raise ValueError(f"{WHAT} expects at least one batch; got none. Pass [(x, y)].")

    def batch(i: int, pair: Any) -> Batch:
        inputs, targets = mapped(pair, lambda array: rounded(numpy_of(array), dtype))
        args = inputs if isinstance(inputs, tuple | list) else () if isinstance(inputs, dict) else (inputs,)
        return Batch((tuple(args), inputs if isinstance(inputs, dict) else {}), targets, seed + i)

    return [batch(i, pair) for i, pair in enumerate(islice(cycle(pairs), steps or len(pairs)))]


def torch_loss(outputs: Any, targets: Any) -> Tensor:
    """Returns cross-entropy for integers, else the mean squared error. Members [E, B, ...] share the targets."""
    kind = _check_shapes(outputs, targets, targets.is_floating_point(), 1)
    if kind == "squares":
        return (outputs - targets).square().mean()
    if kind == "members":
        targets = targets.expand(len(outputs), *targets.shape).flatten(0, 1)
        outputs = outputs.flatten(0, 1)
    return nn.functional.cross_entropy(outputs, targets.long())


def flax_loss(outputs: Any, targets: Any) -> jax.Array:
    """Returns the same loss, with classes on the last axis."""
    if _check_shapes(outputs, targets, is_floating(targets), -1) == "squares":
        difference = outputs - (targets if outputs.shape == targets.shape else targets[None])
        return jnp.square(difference).mean()
    labels = jnp.broadcast_to(targets, outputs.shape[:-1])[..., None].astype(jnp.int32)
    return -jnp.take_along_axis(jax.nn.log_softmax(outputs), labels, -1).mean()


def _check_shapes(outputs: Any, targets: Any, floating: bool, class_axis: int) -> str:
    if not is_array(outputs) or not is_array(targets):
        raise TypeError(
            f"{WHAT} expects one array of outputs and one of targets where no loss is given; got "
            f"{type_name(outputs)} and {type_name(targets)}. Pass loss=(torch_loss, flax_loss)."
        )
    shape, wanted = tuple(outputs.shape), tuple(targets.shape)
    if floating and wanted in (shape, shape[1:]):
        return "squares"
    for members in (0, 1):
        axis = class_axis + members if class_axis > 0 else len(shape) - 1
        if not floating and 0 < axis < len(shape) and (*shape[members:axis], *shape[axis + 1 :]) == wanted:
            return "members" if members else "classes"
    kind = "floating" if floating else "integer"
    raise ValueError(
        f"{WHAT} expects targets that fit the outputs: class indices without the axis of classes, or numbers of the "
        f"same shape; got {kind} targets of shape {wanted} for outputs of shape {shape}. Pass loss=(torch_loss, "
        f"flax_loss)."
    )


class TorchRun:
    """A copy of a torch model with its optimizer, in another dtype."""

    def __init__(
        self,
        module: nn.Module,
        optimizer: MakeOptimizer,
        scheduler: Callable[[torch.optim.Optimizer], Any] | None,
        dtype: str,
        loss: Callable[[Any, Any], Tensor],
        masks: Masks,
    ) -> None:
        self.model, self.loss, self.masks = TorchModel(module, dtype, train=True), loss, masks
        self.parameters = dict(self.model.module.named_parameters())
        self.trained = {name for name, p in module.named_parameters() if p.requires_grad}
        for name, parameter in self.parameters.items():
            parameter.requires_grad_(name in self.trained)
        own = list(self.parameters.values())
        if isinstance(optimizer, torch.optim.Optimizer):
            memo: dict[int, Any] = {id(p): mine for p, mine in zip(module.parameters(), own, strict=True)}
            _check_hooks(optimizer)
            self.optimizer = copy.deepcopy(optimizer, memo)
        else:
            self.optimizer = optimizer(own) if callable(optimizer) else optimizer
        _check_optimizer(self.optimizer, own)
        self.scheduler = None if scheduler is None else scheduler(self.optimizer)

    def to_arrays(self) -> Arrays:
        return self.model.to_arrays()

    def set_arrays(self, arrays: Mapping[str, np.ndarray]) -> None:
        self.model.set_arrays(arrays)

    def gradients(self, batch: Batch) -> Run:
        """Returns the gradients of every parameter, also of those that are not trained.

        The loss and the statistics of the forward come with them.
        """
        args, kwargs = self.model.given(batch.inputs)
        targets = self.model.given(batch.targets)
        for parameter in self.parameters.values():
            parameter.requires_grad_(True)
        with self.masks.torch(batch.seed, self.model.module):
            value = self.loss(self.model.module(*args, **kwargs), targets)
            grads = torch.autograd.grad(value, list(self.parameters.values()), allow_unused=True)
        for name, parameter in self.parameters.items():
            parameter.requires_grad_(name in self.trained)
        run: Run = {("loss", "loss"): numpy_of(value)}
        for (name, parameter), grad in zip(self.parameters.items(), grads, strict=True):
            run["gradient", name] = numpy_of(torch.zeros_like(parameter) if grad is None else grad)
        arrays = self.to_arrays()
        floating = (name for name in arrays.keys() - self._all_names() if is_floating(arrays[name]))
        return run | {("statistic", name): numpy_of(arrays[name]) for name in floating}

    def step(self, run: Run) -> float:
        """Steps the optimizer, fed the gradients of a run. Returns what its hooks scaled them by."""
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                grad = torch.tensor(run["gradient", name], dtype=parameter.dtype, device=parameter.device)
                parameter.grad = grad if name in self.trained else None
        self.optimizer.step()
        if self.scheduler is not None:
            self.scheduler.step()
        fed = {name: np.abs(run["gradient", name]).max(initial=0.0) for name in self.trained}
        name = max(fed, key=lambda name: fed[name], default="")
        used = self.parameters[name].grad if name else None
        return float(used.abs().max()) / fed[name] if used is not None and fed[name] > 0 else 1.0

    @property
    def rate(self) -> float:
        """The learning rate of the next step."""
        return float(self.optimizer.param_groups[0].get("lr", 0.0))

    def weights(self) -> Arrays:
        """Returns the values of the parameters, tied ones once."""
        arrays = self.to_arrays()
        return {name: numpy_of(arrays[name]) for name in self.parameters}

    def _all_names(self) -> set[str]:
        """Returns the names of parameters, tied ones under each name."""
        return {name for name, _ in self.model.module.named_parameters(remove_duplicate=False)}


class FlaxRun:
    """A copy of a Flax model with its optimizer, in another dtype. Its arrays have torch's names.

    A run that is made of another one shares what that has compiled.
    """

    layout = Layout()

    def __init__(
        self,
        model: FlaxModel,
        transform: optax.GradientTransformation,
        loss: Callable[[Any, Any], jax.Array],
        masks: Masks,
        names: Mapping[str, str],
    ) -> None:
        self.model, self.transform, self.loss, self.masks = model, transform, loss, masks
        self.flax_names, self.torch_names = names, {flax: name for name, flax in names.items()}
        with jax.enable_x64(True):
            self.optimizer = nnx.Optimizer(model.module, transform, wrt=nnx.Param)
        self.graph = nnx.split(model.module, nnx.Param, ...)[0]
        value_and_grad = jax.value_and_grad(self._loss, has_aux=True)
        self.value_and_grad = jax.jit(value_and_grad) if model.jit else value_and_grad
        self.update = nnx.jit(_update) if model.jit else _update

    def copy(self) -> FlaxRun:
        """Copies the run, with weights and an optimizer of its own."""
        new = copy.copy(self)
        new.model = copy.copy(self.model)
        new.model.module = nnx.clone(self.model.module)
        with jax.enable_x64(True):
            new.optimizer = nnx.Optimizer(new.model.module, self.transform, wrt=nnx.Param)
        return new

    def to_arrays(self) -> Arrays:
        return self._arrays(self.model.module)

    def set_arrays(self, arrays: Mapping[str, np.ndarray], strict: bool = False) -> None:
        """Sets weights and statistics. Under strict a name that only one side has is a ValueError."""
        self._load(self.model.module, arrays, strict)

    def gradients(self, batch: Batch) -> Run:
        """Returns the gradients as torch's run does."""
        args, kwargs = self.model.given(batch.inputs, self.layout)
        with self.model.x64():
            targets = mapped(batch.targets, self._target)
            key = jax.random.key(batch.seed)
            state: Any = nnx.split(self.model.module, nnx.Param, ...)[1:]
            (value, statistics), grads = self.value_and_grad(*state, key, args, kwargs, targets)
            nnx.update(self.model.module, statistics)
            holder = nnx.clone(self.model.module)
            nnx.update(holder, grads)
        arrays, named = self.to_arrays(), self._arrays(holder)
        run: Run = {("loss", "loss"): numpy_of(value)}
        for name, *others in self.parameters():
            run |= {("gradient", each): numpy_of(named[name]) for each in (name, *others)}  # of each summand of a sum
        floating = (name for name in self.statistics() if is_floating(arrays[name]))
        return run | {("statistic", name): numpy_of(arrays[name]) for name in floating}

    def step(self, run: Run) -> None:
        """Steps as torch's run does."""
        arrays = {name: array for (kind, name), array in run.items() if kind == "gradient"}
        for _, *others in self.parameters():
            arrays |= {each: 0 * arrays[each] for each in others}  # whose sum is the gradient of the first
        holder = nnx.clone(self.model.module)
        self._load(holder, arrays)
        with jax.enable_x64(True):  # without it optax takes Adam's bias correction in float32, which is 1e-5 off
            self.update(self.model.module, self.optimizer, nnx.state(holder, nnx.Param))

    def parameters(self) -> list[tuple[str, ...]]:
        """Returns the names of the parameters. Those of a sum, which is one parameter here, are together."""
        own = ((name, *others) for name, others in self.model.parameters.items())
        return [tuple(self.torch_names.get(each, each) for each in names) for names in own]

    def statistics(self) -> list[str]:
        return [self.torch_names.get(name, name) for name in self.model.statistics]

    def weights(self, like: Iterable[str]) -> Arrays:
        """Returns the values of the parameters that torch has under these names."""
        arrays = self.to_arrays()
        return {name: numpy_of(arrays[name]) for name in like}

    def summed(self, weights: Mapping[str, np.ndarray]) -> Arrays:
        """Sums parameters of torch whose sum is one of Flax. The sum has the name of the first."""
        summed = dict(weights)
        for name, *others in self.parameters():
            for each in others:
                summed[name] = summed[name] + summed.pop(each)
        return summed

    def _loss(
        self, parameters: Any, rest: Any, key: Any, args: Any, kwargs: Any, targets: Any
    ) -> tuple[jax.Array, Any]:
        model = nnx.merge(self.graph, parameters, rest, copy=True)
        with self.masks.flax(key):
            outputs = model(*args, **kwargs)
        return self.loss(outputs, targets), nnx.state(model, _STATISTICS)

    def _target(self, array: np.ndarray) -> jax.Array:
        return jax_of(self.layout.to_flax(array), self.model.dtype) if is_floating(array) else jax_of(array)

    def _arrays(self, module: nnx.Module) -> Arrays:
        with self.model.x64():
            arrays = probly_flax.to_arrays(module, flatten=self.model.flatten)
        return {self.torch_names.get(name, name): array for name, array in arrays.items()}

    def _load(self, module: nnx.Module, arrays: Mapping[str, np.ndarray], strict: bool = False) -> None:
        own = {self.flax_names.get(name, name): array for name, array in arrays.items()}
        with self.model.x64(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            probly_flax.load_arrays(module, own, strict=strict, cast=True, flatten=self.model.flatten)


def _update(model: nnx.Module, optimizer: nnx.Optimizer[Any], grads: Any) -> None:
    optimizer.update(model, grads)


def layout_of(torch_run: TorchRun, flax_run: FlaxRun, inputs: Any, channels_last: bool | None) -> Layout:
    """Finds the layout in which Flax takes the inputs: the first one in which its outputs have torch's shapes."""
    ranks = {array.ndim for _, array in leaves(inputs) if is_floating(array)}
    last = [frozenset(each) for each in ({4, 5}, {3, 4, 5})]
    if channels_last is not None:
        return Layout(last[1] & ranks if channels_last else frozenset())
    choices = [frozenset[int](), last[1]] if max(ranks, default=0) < 4 else [last[0], last[1], frozenset[int]()]
    if max(ranks, default=0) < 3:
        return Layout()
    args, kwargs = torch_run.model.given(inputs)
    module = copy.deepcopy(torch_run.model.module).eval()
    with torch.no_grad():
        shapes = {name: tuple(t.shape) for name, t in leaves(module(*args, **kwargs), "output")}
    failure: Exception | None = None
    for choice in choices:
        try:
            flax_run.model.outputs(inputs, Layout(choice), shapes)
            return Layout(choice)
        except Exception as error:  # whatever a model raises for inputs in another layout
            failure = failure or error
    raise ValueError(
        f"{WHAT} expects a Flax model that takes torch's inputs, images as (N, ..., C) or as torch has them, and "
        f"returns outputs of torch's shapes {list(shapes.values())}; got {type(failure).__name__}: {failure}. Pass "
        f"channels_last=True or False to see its own error."
    )


def _check_optimizer(optimizer: Any, own: Sequence[nn.Parameter]) -> None:
    example = "lambda parameters: torch.optim.SGD(parameters, lr=0.1)"
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(
            f"{WHAT} expects torch_optimizer to be an optimizer, or to return one for a list of parameters; got "
            f"{type_name(optimizer)}. Pass {example}."
        )
    if isinstance(optimizer, torch.optim.LBFGS):
        raise TypeError(
            f"{WHAT} expects an optimizer that takes a step for the gradients that it is given; got LBFGS, which "
            f"computes them. Pass {example}."
        )
    known = set(map(id, own))
    if any(id(p) not in known for group in optimizer.param_groups for p in group["params"]):
        raise ValueError(
            f"{WHAT} expects torch_optimizer to be of the parameters of torch_module; got others in its groups. Pass "
            f"{example}."
        )
    if optimizer.state:
        raise ValueError(
            f"{WHAT} expects an optimizer that has not run yet, as the one in Flax; got one with a state. Pass "
            f"{example}."
        )


def _check_hooks(optimizer: torch.optim.Optimizer) -> None:
    """Refuses hooks, which a copy would leave out."""
    if optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks:
        raise ValueError(
            f"{WHAT} expects an optimizer without hooks, which belong to its own parameters; got one with hooks. Pass "
            f"a function that makes it of a list of parameters, and registers them."
        )
