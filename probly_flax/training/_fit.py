"""The training loop: epochs, validation, early stopping, checkpoints, a progress bar."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from probly_flax.training._checks_fit import (
    check_again,
    check_finite,
    check_metrics,
    check_mode,
    check_mode_of,
    check_monitor,
    check_new_run,
    check_patience_has_val,
    check_positive,
    check_resumable,
    check_same_run,
    check_some_batches,
)
from probly_flax.training._metrics import Task, metrics_of
from probly_flax.training._steps import Batch, Loss, TrainState, make_eval_step, make_train_step

__all__ = ["fit"]

Batches = Iterable[Batch] | Callable[[int], Iterable[Batch]]
Row = dict[str, Any]
_SECONDS_BETWEEN = 0.25  # drawings of the bar


def fit(
    model: nnx.Module,
    optimizer: nnx.Optimizer,
    train: Batches,
    *,
    epochs: int,
    val: Batches | None = None,
    task: Task = "classification",
    loss: Loss | None = None,
    metrics: nnx.MultiMetric | None = None,
    patience: int | None = None,
    monitor: str = "val_nll",
    mode: Literal["min", "max"] = "min",
    checkpoint: str | os.PathLike[str] | None = None,
    resume: bool = False,
    progress: bool = True,
    in_axes: int | None = None,
) -> list[Row]:
    """Trains the model in place, for a number of epochs or until it no longer improves.

    Model and optimizer hold what was trained when this returns, and after Ctrl-C or an error too, unless the loss was
    not finite. With patience they go back to the best epoch, with its weights, statistics and moments.

    To take torch's steps with Adam, call it `with jax.enable_x64(True)`: weights and batches stay float32, but optax
    then takes the bias corrections, 1 - 0.999**t, in float64, as torch does. In float32 they are off by up to 1e-5, in
    the same direction for hundreds of steps.

    Args:
        model: any network, Ensemble or BatchEnsemble, in train mode, as a new one is.
        optimizer: of the model, nnx.Optimizer(model, transform, wrt=nnx.Param).
        train: batches (inputs, targets) as make_train_step takes them, anew for each epoch: a list or another iterable;
            or a function of the epoch's number, from 0, that returns one.
        epochs: how many in all; those of a run that is resumed count.
        val: batches to judge the model by after each epoch, in the same form; each is for all members.
        task: as in make_train_step.
        loss: as in make_train_step.
        metrics: of validation. By default nll, accuracy, brier, ece and mutual_information; for regression nll, rmse,
            crps and coverage.
        patience: stop after so many epochs in a row in which monitor was no better than before.
        monitor: a name of those that are logged.
        mode: "max" if larger is better.
        checkpoint: a folder, for Orbax: after each epoch it holds model, optimizer, best state and history.
        resume: go on from the folder's checkpoint, if it has one. The rest is, bit for bit, what the run would have
            been without the interruption, as long as train gives the same batches: a function of the epoch does.
        progress: show a bar on stderr.
        in_axes: 0 if each member trains on batches of its own.
    Returns:
        A dict for each epoch: epoch, from 0; train_loss and train_accuracy, means over the epoch's inputs, each taken
        before its step; val_loss and val_ with the name of each metric.
    Raises:
        TypeError: if an argument is of another type.
        ValueError: if there are no batches, the loss is not finite, or monitor is not logged; if the folder has
            checkpoints and resume is False, or those of another model.
    Example:
        >>> import optax
        >>> import probly_flax as probly
        >>> model = probly.ensemble(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), 5)
        >>> optimizer = nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param)
        >>> history = fit(model, optimizer, [(jnp.ones((4, 2)), jnp.zeros(4, int))], epochs=3, progress=False)
        >>> history[2]["train_loss"] < history[0]["train_loss"]
        True
    """
    what = "fit"
    epochs = check_positive(what, "epochs", epochs)
    check_mode(what, mode)
    check_resumable(what, checkpoint is not None, resume)
    check_again(what, "train", train, epochs)
    if patience is not None:
        patience = check_positive(what, "patience", patience)
        check_patience_has_val(what, val is not None)
    step, state = make_train_step(model, optimizer, loss, task=task, in_axes=in_axes)
    evaluate = None
    if val is not None:
        check_again(what, "val", val, epochs)
        metrics = metrics_of(task) if metrics is None else metrics
        check_metrics(what, metrics, nnx.MultiMetric)
        metrics = nnx.clone(metrics)
        evaluate = make_eval_step(model, metrics, loss, task=task)
    if patience is not None:
        names = [name for name, value in vars(metrics).items() if isinstance(value, nnx.Metric)]
        check_monitor(what, monitor, ["train_loss", "val_loss", *(f"val_{name}" for name in names)])
        check_mode_of(what, mode, monitor)
    run = _Run(state, monitor, mode, patience)
    with _Folder(checkpoint) as folder, _Bar(progress, epochs) as bar, _held_interrupts() as held:
        folder.restore(run, resume)
        try:
            while len(run.history) < epochs and not run.is_over:
                epoch = len(run.history)
                row = _train(run, step, _batches(train, epoch), epoch, in_axes, bar, held)
                if evaluate is not None and metrics is not None:
                    row |= _validate(run, evaluate, metrics, _batches(val, epoch), epoch)
                run.finish_epoch({"epoch": epoch} | row)
                bar.finish_epoch(run.history[-1])
                folder.save(run)
        finally:
            run.write(model, optimizer)
    return run.history


class _Run:
    """Contents of a checkpoint: the state, the best one so far if there is patience, and the rows of the epochs."""

    def __init__(self, state: TrainState, monitor: str, mode: str, patience: int | None) -> None:
        self.state, self.best = state, None if patience is None else jax.tree.map(jnp.copy, state)
        self.monitor, self.mode, self.patience = monitor, mode, patience
        self.history: list[Row] = []
        self.is_finite = True

    @property
    def tree(self) -> dict[str, TrainState]:
        return {"state": self.state} | ({} if self.best is None else {"best": self.best})

    @property
    def best_epoch(self) -> int:
        """The first of the best; NaN is no better than anything."""
        scores = np.array([row[self.monitor] for row in self.history]) * (1 if self.mode == "min" else -1)
        return int(np.argmin(np.where(np.isnan(scores), np.inf, scores)))

    @property
    def is_over(self) -> bool:
        return self.patience is not None and 0 < self.patience <= self.epochs_since_best

    @property
    def epochs_since_best(self) -> int:
        return len(self.history) - 1 - self.best_epoch if self.history else 0

    def finish_epoch(self, row: Row) -> None:
        self.history.append(row)
        if self.patience is not None:
            check_monitor("fit", self.monitor, [name for name, value in row.items() if isinstance(value, float)])
            if self.epochs_since_best == 0:
                self.best = jax.tree.map(jnp.copy, self.state)

    def write(self, model: nnx.Module, optimizer: nnx.Optimizer) -> None:
        """Writes back the best state, or else the last one.

        The last one is not written if it has diverged, or if an error came between two states.
        """
        state = self.best if self.best is not None and self.history else self.state
        if state is self.best or (self.is_finite and not any(x.is_deleted() for x in jax.tree.leaves(state))):
            nnx.update(model, state.model)
            nnx.update(optimizer, state.optimizer)


def _train(
    run: _Run,
    step: Callable[..., Any],
    batches: Iterable[Batch],
    epoch: int,
    in_axes: int | None,
    bar: _Bar,
    held: _Held,
) -> Row:
    logs, rows = [], []
    bar.begin_epoch(epoch, batches)
    for batch in batches:
        with held:
            run.state, each = step(run.state, batch)
        logs.append(each)
        rows.append(_rows(batch, in_axes))
        bar.advance(each["loss"])
    check_some_batches("fit", "train", len(rows), epoch)
    jax.block_until_ready(logs)  # since asking for what is still computed costs more
    columns = {name: [float(each[name]) for each in logs] for name in ("loss", "accuracy") if name in logs[0]}
    run.is_finite = bool(np.isfinite(columns["loss"]).all())
    check_finite("fit", columns["loss"], epoch)
    return {f"train_{name}": _mean(column, rows) for name, column in columns.items()}


def _validate(
    run: _Run,
    evaluate: Callable[..., Any],
    metrics: nnx.MultiMetric,
    batches: Iterable[Batch],
    epoch: int,
) -> Row:
    metrics.reset()
    losses, rows = [], []
    for batch in batches:
        losses.append(evaluate(batch, run.state.model))
        rows.append(_rows(batch, None))
    check_some_batches("fit", "val", len(rows), epoch)
    judged = {f"val_{name}": np.asarray(value).tolist() for name, value in metrics.compute().items()}
    return {"val_loss": _mean([float(each) for each in jax.block_until_ready(losses)], rows)} | judged


def _mean(numbers: Sequence[Any], rows: Sequence[int]) -> float:
    """Averages batches' means over all of their inputs."""
    return float(np.average(np.array(numbers, np.float64), weights=rows))


def _batches(batches: Any, epoch: int) -> Iterable[Batch]:
    return batches(epoch) if callable(batches) else batches


def _rows(batch: Batch, in_axes: int | None) -> int:
    shape = jax.tree.leaves(batch[1])[0].shape
    return shape[0] if in_axes is None else shape[1]


class _Folder:
    """Checkpoints of a run: the last one is kept, and nothing without a folder."""

    def __init__(self, path: str | os.PathLike[str] | None) -> None:
        self.path, self.manager = path, None

    def __enter__(self) -> _Folder:
        if self.path is not None:
            import orbax.checkpoint as ocp  # type: ignore[import-untyped]

            self.orbax = ocp
            # A copy in the background would read buffers that the next step has been given.
            options = ocp.CheckpointManagerOptions(max_to_keep=1, enable_async_checkpointing=False)
            self.manager = ocp.CheckpointManager(Path(self.path).absolute(), options=options)
        return self

    def __exit__(self, *_: object) -> None:
        if self.manager is not None:
            self.manager.close()

    def save(self, run: _Run) -> None:
        if self.manager is not None:
            args = self.orbax.args
            notes = {"history": run.history, "made of": _made_of(run)}
            items = args.Composite(state=args.StandardSave(run.tree), run=args.JsonSave(notes))
            self.manager.save(len(run.history) - 1, args=items)

    def restore(self, run: _Run, resume: bool) -> None:
        if self.manager is None or (last := self.manager.latest_step()) is None:
            return
        check_new_run("fit", self.path, None if resume else last)
        args = self.orbax.args
        notes = self.manager.restore(last, args=args.Composite(run=args.JsonRestore()))["run"]
        ours, theirs = _made_of(run), notes["made of"]
        names = [name for name in {**theirs, **ours} if ours.get(name) != theirs.get(name)]
        lines = [f"{name}: {ours.get(name)} here, {theirs.get(name)} there" for name in names]
        check_same_run("fit", self.path, lines)
        restored = self.manager.restore(last, args=args.Composite(state=args.StandardRestore(run.tree)))["state"]
        states = jax.tree.unflatten(jax.tree.structure(run.tree), jax.tree.leaves(restored))
        run.state, run.best, run.history = states["state"], states.get("best"), notes["history"]


def _made_of(run: _Run) -> dict[str, str]:
    """Returns what a resumed run must share with its checkpoint: how it tells the best epoch, and its variables."""
    judged = {"patience": "None"}
    if run.patience is not None:
        judged = {"patience": "a number", "monitor": run.monitor, "mode": run.mode}
    leaves = jax.tree_util.tree_leaves_with_path(run.state)
    names = [jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in leaves]
    return judged | {name: f"{x.dtype} {x.shape}" for name, (_, x) in zip(names, leaves, strict=True)}


class _Bar:
    """Progress of an epoch, on stderr. It is drawn now and then, since drawing takes as long as some steps do."""

    def __init__(self, show: bool, epochs: int) -> None:
        columns = TextColumn("{task.description}"), BarColumn(20), MofNCompleteColumn(), TimeRemainingColumn()
        numbers = TextColumn("{task.fields[numbers]}")
        self.progress = Progress(*columns, numbers, console=Console(stderr=True), auto_refresh=False, disable=not show)
        self.epochs, self.judged, self.steps = epochs, "", 0
        self.task = self.progress.add_task("", total=None, numbers="")

    def __enter__(self) -> _Bar:
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def begin_epoch(self, epoch: int, batches: Any) -> None:
        total = len(batches) if hasattr(batches, "__len__") else self.steps or None
        self.steps, self.drawn = 0, time.perf_counter()
        self.progress.reset(self.task, total=total, description=f"epoch {epoch + 1}/{self.epochs}")

    def advance(self, loss: Any) -> None:
        self.steps += 1
        now = time.perf_counter()
        if not self.progress.disable and now - self.drawn > _SECONDS_BETWEEN:
            self._draw(f"loss {float(loss):.4f}{self.judged}")
            self.drawn = now

    def finish_epoch(self, row: Row) -> None:
        names = [name for name in ("val_nll", "val_accuracy", "val_rmse") if isinstance(row.get(name), float)]
        self.judged = "".join(f" {name} {row[name]:.4f}" for name in names)
        self._draw(f"loss {row['train_loss']:.4f}{self.judged}")

    def _draw(self, numbers: str) -> None:
        self.progress.update(self.task, completed=self.steps, numbers=numbers, refresh=True)


class _Held:
    """A block that Ctrl-C does not end: a step has given away the old state, and not yet returned the new one."""

    def __init__(self) -> None:
        self.active = False
        self.pending: Callable[[], Any] | None = None

    def __enter__(self) -> None:
        self.active = True

    def __exit__(self, *_: object) -> None:
        self.active = False
        pending, self.pending = self.pending, None
        if pending is not None:
            pending()


@contextmanager
def _held_interrupts() -> Iterator[_Held]:
    """Makes Ctrl-C wait for the end of a step; a second one does not wait."""
    held, previous = _Held(), signal.getsignal(signal.SIGINT)

    def handle(number: int, frame: FrameType | None) -> None:
        assert callable(previous)
        if held.active and held.pending is None:
            held.pending = lambda: previous(number, frame)
        else:
            previous(number, frame)

    is_main = threading.current_thread() is threading.main_thread()  # no other thread gets signals
    if not (is_main and callable(previous)):
        yield held
        return
    signal.signal(signal.SIGINT, handle)
    try:
        yield held
    finally:
        signal.signal(signal.SIGINT, previous)
