"""Steps of training and of judging: what is compiled once, and then runs for each batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from probly_common.checks.rows import check_in_axes
from probly_common.checks.training import check_batch, check_loss, check_task
from probly_common.checks.values import check_module
from probly_flax import losses
from probly_flax.metrics._states import _Scores
from probly_flax.training._checks_fit import check_callable, check_metrics, check_optimizer_type
from probly_flax.training._metrics import Task

__all__ = ["TrainState", "make_eval_step", "make_train_step"]

Loss = Callable[..., Array]
Batch = tuple[Any, Any]
Logs = dict[str, Array]


class TrainState(NamedTuple):
    """State that a training step changes: the values of all variables, as nested dicts, for `nnx.update` to write back.

    Example:
        >>> model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
        >>> state = TrainState(nnx.to_pure_dict(nnx.state(model)), {})
        >>> nnx.update(model, state.model)
    """

    model: Any
    optimizer: Any


def make_train_step(
    model: nnx.Module,
    optimizer: nnx.Optimizer,
    loss: Loss | None = None,
    *,
    task: Task = "classification",
    in_axes: int | None = None,
) -> tuple[Callable[[TrainState, Batch], tuple[TrainState, Logs]], TrainState]:
    """Makes a jitted training step, and the state that it starts from.

    Model and optimizer are split once, which makes a step as fast as one by hand; it is compiled once for each shape of
    batch. The state is a copy, so that model and optimizer stay as they are: `nnx.update` writes a state back, as the
    example does. A step gives the buffers of the state it is given to the one that it returns: keep the new one, and
    write back the last one only, or a copy. Layers run in the modes that they are in, which is train mode for a new
    model.

    Shape:
        batch: (inputs, targets), arrays of NumPy or JAX for all members: inputs as model takes them, labels (B,) of
        class indices or targets (B, ...); with in_axes=0 each with a leading axis of members. A network without
        num_members counts as one member.
    Args:
        model: any network, Ensemble or BatchEnsemble.
        optimizer: of the model; the parameters that it was made for are trained.
        loss: a function of logits (E, B, C) and labels, or of mean and variance (E, B, ...) and targets, that returns
            a scalar. By default the mean over members of their own losses, member_cross_entropy or member_gaussian_nll:
            each is trained as if it were alone, which keeps them diverse (Lakshminarayanan et al. 2017). A loss of the
            mean, mixture_cross_entropy, trains them jointly: members then lean on each other, and are worse alone and
            together (Webb et al. 2021; Jeffares et al. 2023). As a mean over E members the loss gives weights of one
            member 1/E of the gradient that they would have alone: Adam and its kin do not care, for SGD multiply the
            learning rate by E. What members share, as the slow weights of a BatchEnsemble, gets the mean of their
            gradients: its learning rate is that of a single network.
        task: "classification", where the model returns logits; or "regression", where it returns a tuple of mean and
            variance, or one array (..., 2K) that losses.to_gaussian splits.
        in_axes: 0 if each member trains on batches of its own.
    Returns:
        step(state, batch) -> (state, logs), and the first state. Logs are scalars by name, on the device: loss; and for
        classification accuracy, of the mean prediction, or of the members if each has a batch of its own.
    Raises:
        TypeError: if model, optimizer or loss are something else.
        ValueError: if task or in_axes are unknown; or, in a step, a batch is not a pair or the loss no scalar.
    Example:
        >>> import optax
        >>> import probly_flax as probly
        >>> model = probly.ensemble(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), 5)
        >>> optimizer = nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param)
        >>> step, state = make_train_step(model, optimizer)
        >>> for _ in range(3):
        ...     state, logs = step(state, (jnp.ones((4, 2)), jnp.zeros(4, int)))
        >>> nnx.update(model, state.model)
        >>> nnx.update(optimizer, state.optimizer)
        >>> {name: value.shape for name, value in logs.items()}
        {'accuracy': (), 'loss': ()}
    """
    what = "make_train_step"
    judge = _judge(what, model, loss, task, in_axes)
    check_optimizer_type(what, optimizer, nnx.Optimizer, nnx.ModelAndOptimizer)
    model_graph, optimizer_graph = nnx.graphdef(model), nnx.graphdef(optimizer)

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Logs]:
        model, optimizer = nnx.merge(model_graph, state.model), nnx.merge(optimizer_graph, state.optimizer)
        differentiate = nnx.value_and_grad(judge, argnums=nnx.DiffState(0, optimizer.wrt), has_aux=True)
        (value, outputs), grads = differentiate(model, batch)
        optimizer.update(model, grads)
        nnx.pop(model, nnx.Intermediate)  # what layers sow would be new in every state
        logs = {"loss": value}
        if task == "classification":
            probs = jax.nn.softmax(outputs[0])
            predicted = (probs if in_axes == 0 else probs.mean(0)).argmax(-1)
            hits = predicted.astype(batch[1].dtype) == batch[1]
            logs["accuracy"] = hits.mean(dtype=value.dtype)
        return TrainState(values(model), values(optimizer)), logs

    return jax.jit(step, donate_argnums=0), jax.tree.map(jnp.copy, TrainState(values(model), values(optimizer)))


def make_eval_step(
    model: nnx.Module,
    metrics: nnx.Metric,
    loss: Loss | None = None,
    *,
    task: Task = "classification",
) -> Callable[..., Array]:
    """Makes a jitted step that judges the model, in eval mode, by metrics.

    The model itself stays in the mode that it is in.

    Shape:
        batch: (inputs, targets), for all members: inputs as model takes them, labels (B,) or targets (B, ...).
    Args:
        model: as in make_train_step.
        metrics: updated with logits and labels, or with mean, variance and targets, in place. nnx.MultiMetric holds
            several. They run under jit, unless one keeps every score, as AURC does.
        loss: as in make_train_step.
        task: as in make_train_step.
    Returns:
        step(batch, state=None), which updates the metrics and returns the loss of the batch. The weights are those that
        the model has at the time; or, within a training loop, those of `TrainState.model`.
    Raises:
        TypeError: if model, metrics or loss are something else.
        ValueError: if task is unknown; or, in a step, a batch is not a pair or the loss no scalar.
    Example:
        >>> import probly_flax as probly
        >>> model = probly.ensemble(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), 5)
        >>> metrics = nnx.MultiMetric(nll=probly.metrics.NLL(), ece=probly.metrics.ECE())
        >>> step = make_eval_step(model, metrics)
        >>> loss = step((jnp.ones((4, 2)), jnp.zeros(4, int)))
        >>> bool(metrics.compute()["nll"] <= loss)  # of the mean prediction, and the mean of the members' own
        True
    """
    what = "make_eval_step"
    judge = _judge(what, model, loss, task, None)
    check_metrics(what, metrics, nnx.Metric)
    graph, metrics_graph = nnx.graphdef(model), nnx.graphdef(metrics)
    names = ("logits", "labels") if task == "classification" else ("mean", "variance", "targets")
    grows = any(isinstance(node, _Scores) for _, node in nnx.iter_graph(metrics))

    @jax.jit
    def forward(state: Any, batch: Batch) -> tuple[Array, tuple[Array, ...]]:
        model = nnx.merge(graph, state)
        model.eval()
        return judge(model, batch)

    @jax.jit
    def updated(state: Any, outputs: dict[str, Any]) -> Any:
        metrics = nnx.merge(metrics_graph, state)
        metrics.update(**outputs)
        return values(metrics)

    def step(batch: Batch, state: Any = None) -> Array:
        value, outputs = forward(values(model) if state is None else state, batch)
        named = dict(zip(names, (*outputs, batch[1]), strict=True))
        if grows:
            metrics.update(**named)
        else:
            nnx.update(metrics, updated(values(metrics), named))
        return value

    return step


def values(node: Any) -> Any:
    """Returns the values of all variables in nested dicts, which jax.jit takes apart faster than nnx.State."""
    return nnx.to_pure_dict(nnx.state(node))


def _judge(
    what: str, model: Any, loss: Loss | None, task: Task, in_axes: int | None
) -> Callable[[nnx.Module, Batch], tuple[Array, tuple[Array, ...]]]:
    """Makes a function that returns the loss of a model on a batch, beside its outputs with an axis of members.

    The outputs are logits, or mean and variance.
    """
    check_module(what, "model", model, nnx.Module)
    check_task(what, task)
    check_in_axes(what, in_axes)
    default: Loss = losses.member_cross_entropy if task == "classification" else losses.member_gaussian_nll
    loss = default if loss is None else loss
    check_callable(what, "loss", loss)
    is_ensemble = hasattr(model, "num_members")

    def judge(model: Any, batch: Batch) -> tuple[Array, tuple[Array, ...]]:
        x, targets = check_batch(what, batch)
        outputs = model(x) if in_axes is None else model(x, in_axes=in_axes)
        if task == "regression" and not isinstance(outputs, tuple):
            outputs = losses.to_gaussian(outputs)
        members = outputs if isinstance(outputs, tuple) else (outputs,)
        if not is_ensemble:
            members = tuple(y[None] for y in members)
        value = loss(*members, targets)
        check_loss(what, jnp.shape(value))
        return value, members

    return judge
