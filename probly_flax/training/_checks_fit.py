"""Checks of the training loop, and the sentences they raise; in torch the loop is Lightning's."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import Any

from probly_common.checks.values import index


def check_callable(what: str, name: str, value: Any) -> None:
    if not callable(value):
        raise TypeError(
            f"{what} expects {name} as a function of outputs and targets; got {type(value).__name__}. Pass "
            f"{name}=losses.member_cross_entropy."
        )


def check_optimizer_type(what: str, optimizer: Any, expected: type, refused: type) -> None:
    if not isinstance(optimizer, expected) or isinstance(optimizer, refused):
        raise TypeError(
            f"{what} expects an nnx.Optimizer; got {type(optimizer).__name__}. Pass "
            f"nnx.Optimizer(model, optax.adam(1e-3), wrt=nnx.Param)."
        )


def check_metrics(what: str, metrics: Any, expected: type) -> None:
    if not isinstance(metrics, expected):
        raise TypeError(
            f"{what} expects metrics to be a {expected.__name__}; got {type(metrics).__name__}. Pass "
            f"nnx.MultiMetric(nll=metrics.NLL())."
        )


def check_positive(what: str, name: str, value: Any) -> int:
    number = index(value)
    if number is None:
        raise TypeError(f"{what} expects {name} as an integer; got {type(value).__name__}. Pass {name}=10.")
    if number < 1:
        raise ValueError(f"{what} expects {name} of 1 or more; got {value}. Pass {name}=10.")
    return number


def check_mode(what: str, mode: Any) -> None:
    if mode not in ("min", "max"):
        raise ValueError(f"{what} expects mode 'min' or 'max'; got {mode!r}. Pass mode='max' if larger is better.")


def check_mode_of(what: str, mode: str, monitor: str) -> None:
    if monitor.endswith("accuracy") and mode == "min":
        raise ValueError(f"{what} expects mode='max' for {monitor}, the larger the better; got 'min'. Pass mode='max'.")


def check_patience_has_val(what: str, has_val: bool) -> None:
    if not has_val:
        raise ValueError(f"{what} expects validation batches for patience to judge; got val=None. Pass val=batches.")


def check_again(what: str, name: str, value: Any, epochs: int) -> None:
    """Checks that every epoch gets batches: an iterator yields its batches once."""
    if epochs > 1 and not callable(value) and iter(value) is value:
        raise ValueError(
            f"{what} expects {name} to yield its batches in each of {epochs} epochs; got a {type(value).__name__}, "
            f"which the first epoch uses up. Pass a list of batches, or a function: lambda epoch: batches(epoch)."
        )


def check_some_batches(what: str, name: str, count: int, epoch: int) -> None:
    if not count:
        raise ValueError(
            f"{what} expects batches (inputs, targets) in {name}; got none in epoch {epoch}. Pass an iterable that "
            f"begins anew when asked, such as a list, or a function: lambda epoch: batches(epoch)."
        )


def check_finite(what: str, losses: Sequence[float], epoch: int) -> None:
    step = next((i for i, loss in enumerate(losses) if not math.isfinite(loss)), None)
    if step is not None:
        raise ValueError(
            f"{what} expects finite losses; got {losses[step]} at step {step} of epoch {epoch}. Look at that batch, "
            f"for labels out of range or inputs that are not finite; or clip: "
            f"optax.chain(optax.clip_by_global_norm(1.0), transform)."
        )


def check_monitor(what: str, monitor: Any, logged: Collection[str]) -> None:
    if monitor not in logged:
        raise ValueError(
            f"{what} expects monitor to be a number that is logged, one of {', '.join(sorted(logged))}; got "
            f"{monitor!r}. Pass monitor='val_loss'."
        )


def check_resumable(what: str, has_folder: bool, resume: bool) -> None:
    if resume and not has_folder:
        raise ValueError(f"{what} expects a folder to resume from; got checkpoint=None. Pass checkpoint='run'.")


def check_new_run(what: str, folder: Any, epoch: int | None) -> None:
    if epoch is not None:
        raise ValueError(
            f"{what} expects a folder without checkpoints to start in; got {str(folder)!r}, of a run of {epoch + 1} "
            f"epochs. Go on with it, resume=True, or pass another folder."
        )


def check_same_run(what: str, folder: Any, differences: Sequence[str]) -> None:
    if differences:
        lines = "\n".join(f"  {line}" for line in differences[:10])
        raise ValueError(
            f"{what} expects to resume with the model, optimizer and monitor of the run in {str(folder)!r}; got "
            f"{len(differences)} differences:\n{lines}\nMake them as they were, or pass another folder."
        )
