"""Training in each framework, on equal numbers: losses, gradients, statistics and new weights by torch's names."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
import optax  # type: ignore[import-untyped]
import torch
from flax import nnx
from torch import Tensor, nn

from parity_tests.kit.masks import Masks
from parity_tests.kit.pair import fitting_layouts, layouts
from parity_tests.kit.runs import STATISTICS, FlaxModel, TorchModel, gradients_of
from parity_tests.kit.trees import Arrays, Layout, Run, is_array, is_floating, jax_of, leaves, mapped, numpy_of, rounded
from probly_common.checks.values import type_name

WHAT = "compare_training"
LOSS = ("loss", "loss")
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


class TorchTraining(TorchModel):
    """A copy of a torch model with its optimizer, in another dtype."""

    def __init__(
        self,
        module: nn.Module,
        dtype: str,
        masks: Masks,
        optimizer: MakeOptimizer,
        scheduler: Callable[[torch.optim.Optimizer], Any] | None,
        loss: Callable[[Any, Any], Tensor],
    ) -> None:
        super().__init__(module, dtype, train=True, masks=masks)
        self.loss = loss
        self.parameters = dict(self.module.named_parameters())
        self.trained = {name for name, p in module.named_parameters() if p.requires_grad}
        for name, parameter in self.parameters.items():  # as the optimizer may ask
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

    def gradients(self, batch: Batch) -> Run:
        """Returns the gradients of every parameter, also of those that are not trained.

        The loss and the statistics of the forward come with them.
        """
        args, kwargs = self.given(batch.inputs)
        targets = self.given(batch.targets)
        for parameter in self.parameters.values():
            parameter.requires_grad_(True)
        with self.masked(batch.seed):
            value = self.loss(self.module(*args, **kwargs), targets)
            run = gradients_of([value], {("gradient", name): p for name, p in self.parameters.items()})
        for name, parameter in self.parameters.items():
            parameter.requires_grad_(name in self.trained)
        arrays = self.to_arrays()
        names = {name for name, _ in self.module.named_parameters(remove_duplicate=False)}  # tied ones under each name
        floating = (name for name in arrays if name not in names and is_floating(arrays[name]))
        return {LOSS: numpy_of(value)} | run | {("statistic", name): numpy_of(arrays[name]) for name in floating}

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

    def weights(self) -> dict[str, np.ndarray]:
        """Returns the values of the parameters, tied ones once."""
        arrays = self.to_arrays()
        return {name: numpy_of(arrays[name]) for name in self.parameters}


class FlaxTraining(FlaxModel):
    """A copy of a Flax model with its optimizer, in another dtype.

    A copy of it shares what it has compiled.
    """

    layout = Layout()

    def __init__(
        self,
        module: nnx.Module,
        dtype: str,
        masks: Masks,
        transform: optax.GradientTransformation,
        loss: Callable[[Any, Any], jax.Array],
        jit: bool,
        flatten: Mapping[str, Sequence[int]] | None,
        names: Mapping[str, str],
    ) -> None:
        super().__init__(module, dtype, True, jit, flatten, masks, names)
        self.transform, self.loss = transform, loss
        with jax.enable_x64(True):
            self.optimizer = nnx.Optimizer(self.module, transform, wrt=nnx.Param)
        value_and_grad = jax.value_and_grad(self._loss, has_aux=True)
        self.value_and_grad = jax.jit(value_and_grad) if jit else value_and_grad
        self.update = nnx.jit(_update) if jit else _update

    def copy(self) -> Self:
        """Copies the run, with weights and an optimizer of its own."""
        new = super().copy()
        with jax.enable_x64(True):
            new.optimizer = nnx.Optimizer(new.module, self.transform, wrt=nnx.Param)
        return new

    def gradients(self, batch: Batch) -> Run:
        """Returns the gradients as torch's run does."""
        args, kwargs = self.given(batch.inputs, self.layout)
        with self.x64():
            targets = mapped(batch.targets, self._target)
            (value, statistics), grads = self.value_and_grad(
                *self.state, jax.random.key(batch.seed), args, kwargs, targets
            )
            nnx.update(self.module, statistics)
        arrays = self.to_arrays()
        run = {LOSS: numpy_of(value)} | self.named(grads, "gradient")
        floating = (name for name in self.statistics() if is_floating(arrays[name]))
        return run | {("statistic", name): numpy_of(arrays[name]) for name in floating}

    def step(self, run: Run) -> None:
        """Steps as torch's run does."""
        arrays = {name: array for (kind, name), array in run.items() if kind == "gradient"}
        for _, *others in self.parameters():
            arrays |= {each: 0 * arrays[each] for each in others}  # whose sum is the gradient of the first
        holder = FlaxModel.copy(self)
        holder.set_arrays(arrays)
        with jax.enable_x64(True):  # without it optax takes Adam's bias correction in float32, which is 1e-5 off
            self.update(self.module, self.optimizer, nnx.state(holder.module, nnx.Param))

    def weights(self, like: Iterable[str]) -> dict[str, np.ndarray]:
        """Returns the values of the parameters that torch has under these names."""
        arrays = self.to_arrays()
        return {name: numpy_of(arrays[name]) for name in like}

    def summed(self, weights: Arrays) -> dict[str, np.ndarray]:
        """Sums parameters of torch whose sum is one of Flax. The sum has the name of the first."""
        summed = dict(weights)
        for name, *others in self.parameters():
            for each in others:
                summed[name] = summed[name] + summed.pop(each)
        return summed

    def _loss(
        self, parameters: Any, rest: Any, key: Any, args: Any, kwargs: Any, targets: Any
    ) -> tuple[jax.Array, Any]:
        outputs, model = self.called((parameters, rest), (args, kwargs), key)
        return self.loss(outputs, targets), nnx.state(model, STATISTICS)

    def _target(self, array: np.ndarray) -> jax.Array:
        return jax_of(self.layout.to_flax(array), self.dtype) if is_floating(array) else jax_of(array)


def _update(model: nnx.Module, optimizer: nnx.Optimizer[Any], grads: Any) -> None:
    optimizer.update(model, grads)


def layout_of(ours: TorchTraining, theirs: FlaxTraining, inputs: Any, channels_last: bool | None) -> Layout:
    """Finds the layout in which Flax takes the inputs: the first one in which its outputs have torch's shapes."""
    choices = layouts((array.ndim for _, array in leaves(inputs) if is_floating(array)), channels_last)
    if len(choices) == 1:
        return choices[0]
    args, kwargs = ours.given(inputs)
    module = copy.deepcopy(ours.module).eval()
    with torch.no_grad():
        shapes = {name: tuple(t.shape) for name, t in leaves(module(*args, **kwargs), "output")}
    fitting, failures = fitting_layouts(theirs, inputs, choices, shapes)
    if fitting:
        return fitting[0]
    failure = failures[0][1]
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
