"""Whether a torch model with its optimizer and a Flax model with its transformation take the same steps of training.

Every step is judged from equal state, so that a chaotic network raises no false alarm: the weights and statistics of
torch's run in float64, rounded to the lower dtype, are put into both, in both dtypes. Losses, gradients and statistics
are compared; then each optimizer, which keeps a state of its own, is fed torch's gradients, and the new weights are
compared. Beside it both train freely, and a twin of torch whose weights moved by one ULP shows what rounding explains.
"""

from __future__ import annotations

import copy
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from itertools import cycle, islice
from typing import TYPE_CHECKING, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
from flax import nnx
from torch import Tensor, nn

from parity_tests import _render
from parity_tests._masks import Masks
from parity_tests._runs import STATISTICS, FlaxModel, Layout, TorchModel, highest_precision
from parity_tests._training_causes import History, cause_of
from parity_tests._trees import is_array, is_floating, leaves, mapped, numpy_of
from parity_tests.report import Comparison
from parity_tests.standard import MEANING_LIMIT, NOISE_FLOOR, UNIT_ROUNDOFF, Errors, Verdict
from probly_torch._checks import check_module, type_name
from probly_torch._checks_weights import rename_all

if TYPE_CHECKING:
    from matplotlib.figure import Figure

KINDS = ("loss", "gradient", "statistic", "update")
WHAT = "compare_training"
Key = tuple[str, str]  # one of KINDS, torch's name
Run = dict[Key, np.ndarray]
Arrays = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Departure:
    """The first step at which the two leave the bound, and the tensor.

    Attributes:
        step: from 1; 0 for weights that differ before.
        kind: `loss`, `gradient`, `statistic` or `update`, of the new weights for equal gradients; or `weight`.
        tensor: torch's name.
        verdict: the rule that is broken.
        cause: what explains it, and what to change; None if no usual suspect does.
    """

    step: int
    kind: str
    tensor: str
    verdict: Verdict
    cause: str | None = None

    def __str__(self) -> str:
        """A sentence: what differs where, by how much, and why."""
        name = self.kind if self.kind == self.tensor else f"{self.kind} of {self.tensor}"
        why = "" if self.cause is None else f": {self.cause}"
        return (
            f"{name} at step {self.step}: {self.verdict.rule} is {self.verdict.measured:.3g}, above its limit "
            f"{self.verdict.limit:.3g}{why}"
        )


@dataclass(frozen=True)
class TrainingStep:
    """One step.

    Attributes:
        number: from 1.
        loss: torch's, in float64.
        worst: of each kind the tensor that is nearest to its limit, or furthest beyond it; not of known gaps.
        distance: of the weights of the two free runs, of the tensor's scale: the largest.
        twin_distance: of torch's free run and its twin whose weights moved by one ULP.
    """

    number: int
    loss: float
    worst: tuple[Comparison, ...]
    distance: float
    twin_distance: float


@dataclass(frozen=True)
class TrainingReport:
    """The outcome of `compare_training`.

    Attributes:
        torch_name: the class of the torch model.
        flax_name: the class of the Flax model.
        optimizer: the class of torch's optimizer.
        dtype: the dtype whose precision was judged, beside the meaning in float64.
        jit: whether Flax ran under jax.jit.
        steps: every step.
        comparisons: every tensor, at its worst step; its precision at the step in the middle.
        first_departure: where the two part first; None if they do not.
        notes: what was left out, and what else is to be known.
    """

    torch_name: str
    flax_name: str
    optimizer: str
    dtype: str
    jit: bool
    steps: tuple[TrainingStep, ...]
    comparisons: tuple[Comparison, ...]
    first_departure: Departure | None = None
    notes: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether every tensor holds at every step."""
        return bool(self.comparisons) and all(comparison.holds for comparison in self.comparisons)

    def __bool__(self) -> bool:
        """`passed`."""
        return self.passed

    def __str__(self) -> str:
        """A line for each kind of tensor, the first departure, notes, and the verdict as the last line."""
        return "\n".join([self._title(), "", *self._table(), "", *self._sentences(), self._verdict()])

    def to_json(self) -> str:
        """Valid JSON: what is infinite or NaN is a string that Python's float() reads."""
        first = self.first_departure
        content = _render.data(self) | {"passed": self.passed, "verdict": self._verdict()}
        if first is not None:
            content["first_departure"]["sentence"] = str(first)
        return json.dumps(content, indent=1, allow_nan=False)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the report, all of it or nothing: `.json`, `.html`, or `.png` with the distances by step.

        Raises:
            ValueError: for another suffix, or a folder that is not there.
        """
        title = self._title()
        content = {
            ".json": lambda: self.to_json().encode(),
            ".png": lambda: _render.to_png(self._figure()),
            ".html": lambda: _render.text_page(title, str(self), self._figure()).encode(),
        }
        _render.save("TrainingReport.save", path, content)

    def _title(self) -> str:
        how = "under jax.jit" if self.jit else "op by op"
        return (
            f"{self.torch_name} in torch and {self.flax_name} in Flax, {len(self.steps)} steps of {self.optimizer}, "
            f"{self.dtype}, {how}"
        )

    def _table(self) -> Iterator[str]:
        yield f"{'kind':<10} {'agree':>9}   error, limit and their ratio, of the worst: in roundings at its scale"
        for kind in dict.fromkeys(comparison.kind for comparison in self.comparisons):
            known = [c for c in self.comparisons if c.kind == kind and c.gap is None]
            agree = f"{sum(c.holds for c in known)} of {len(known)}"
            if known:
                worst = max(known, key=lambda c: c.worst.ratio)
                v = worst.worst
                yield f"{kind:<10} {agree:>9}   {v.measured:.3g} / {v.limit:.3g} = {v.ratio:.2g}  {worst.name}"

    def _sentences(self) -> Iterator[str]:
        if self.first_departure is not None:
            yield f"First departure: {self.first_departure}"
        for c in self.comparisons:
            if c.gap is not None and c.holds:
                yield f"Note: {c.kind} of {c.name} is known to differ: {c.gap}"
            elif c.gap is not None:
                yield f"{c.name} agrees at every step. Remove it from known_gaps."
        yield from (f"Note: {note}" for note in self.notes)

    def _verdict(self) -> str:
        count = len(self.comparisons)
        if self.passed:
            return f"Parity: all {count} tensors agree at all {len(self.steps)} steps."
        if not count:
            return "No parity: nothing was compared."
        return f"No parity: {sum(not c.holds for c in self.comparisons)} of {count} tensors differ."

    def _figure(self) -> Figure:
        drawing = _render.new_figure()
        distances = drawing.add_subplot(1, 2, 1)
        errors = drawing.add_subplot(1, 2, 2)
        numbers = [step.number for step in self.steps]
        floor = UNIT_ROUNDOFF["float64"] / 10
        for name, style, colour, values in (
            ("torch and Flax", "o-", "#0b3d91", [step.distance for step in self.steps]),
            ("torch, moved by one ULP", "s--", "#e08a00", [step.twin_distance for step in self.steps]),
        ):
            distances.plot(numbers, [max(value, floor) for value in values], style, ms=4, c=colour, label=name)
        distances.set_title("free runs in float64: distance of weights", fontsize=10)
        distances.set_ylabel(f"largest distance over the tensor's scale (0 is drawn at {floor:.0e})")
        styles = ("o-", "s--", "^:", "d-.")
        for kind, style in zip(KINDS, styles, strict=True):
            of_kind = [(step.number, c.worst) for step in self.steps for c in step.worst if c.kind == kind]
            finite = [(number, max(v.ratio, 1e-3)) for number, v in of_kind if math.isfinite(v.ratio)]
            if finite:
                errors.plot(*zip(*finite, strict=True), style, ms=4, label=kind)
        errors.axhline(1.0, c="#1a1a1a", lw=1.2, label="limit")
        errors.set_title("from equal state: the worst error over its limit (0.001 or less at the foot)", fontsize=10)
        if self.first_departure is not None:
            errors.axvline(self.first_departure.step, c="#1a1a1a", lw=1, ls=":")
        for axes in (distances, errors):
            axes.set_yscale("log")
            axes.set_xlabel("step")
            axes.grid(axis="y", lw=0.4, c="#cccccc")
            axes.legend(frameon=False)
        drawing.suptitle(f"{self._title()}\n{self._verdict()}", fontsize=10, parse_math=False)
        return drawing


def compare_training(
    torch_module: nn.Module,
    flax_module: nnx.Module,
    torch_optimizer: torch.optim.Optimizer | Callable[[list[nn.Parameter]], torch.optim.Optimizer],
    optax_transform: optax.GradientTransformation,
    batches: Iterable[tuple[Any, Any]],
    steps: int | None = None,
    *,
    loss: tuple[Callable[[Any, Any], Tensor], Callable[[Any, Any], jax.Array]] | None = None,
    torch_scheduler: Callable[[torch.optim.Optimizer], Any] | None = None,
    dtype: str = "float32",
    jit: bool = True,
    weights: Literal["copy", "own"] = "copy",
    rename: Mapping[str, str] | None = None,
    flatten: Mapping[str, Sequence[int]] | None = None,
    known_gaps: Mapping[str, str] | None = None,
    channels_last: bool | None = None,
    seed: int = 0,
    limit: float = 1.0,
    progress: Callable[[str], None] | None = None,
) -> TrainingReport:
    """Trains two models side by side, in train mode, and says at which step and tensor they leave the bound.

    Neither model, nor the optimizer, is changed. Masks of dropout are equal in both.

    Args:
        torch_module: the model in torch.
        flax_module: its twin.
        torch_optimizer: of the torch module's parameters, which has not run yet; or what makes it of a list of them,
            as it has to be for an optimizer with hooks, such as one that clips gradients.
        optax_transform: what `nnx.Optimizer` is given.
        batches: pairs (inputs, targets) of arrays in torch's layout; inputs may be a tuple of arguments or a dict.
        steps: how many, for which batches begin anew; by default one for each batch.
        loss: (torch's, Flax's), each a function of outputs and targets. By default cross-entropy for integer targets
            and the mean squared error for others; for member outputs [E, B, ...] the mean of the members' losses.
        torch_scheduler: makes a learning-rate schedule of the optimizer; it takes a step after each step.
        dtype: whose precision is judged, beside float64.
        jit: whether Flax runs under jax.jit.
        weights: `copy` gives torch's weights to Flax; `own` reports those that differ before.
        rename: regular expressions, and what replaces them in torch's names to have Flax's.
        flatten: as in `probly_flax.to_arrays`, for a Linear layer that reads a flattened convolution.
        known_gaps: names or patterns of tensors that are known to differ, and why. One that agrees fails the report.
        channels_last: whether Flax takes images as (N, ..., C); by default tried.
        seed: of the masks of dropout.
        limit: a fraction of the bound, to tighten it.
        progress: called with a line of text at every step.

    Raises:
        TypeError: if these are no models, no optimizer, no transformation or no batches.
        ValueError: if the weights do not fit, or masks of dropout cannot be made equal.

    Example:
        >>> net, twin = nn.Linear(3, 2), nnx.Linear(3, 2, rngs=nnx.Rngs(0))
        >>> batches = [(np.random.rand(5, 3), np.random.rand(5, 2)) for _ in range(2)]
        >>> report = compare_training(net, twin, torch.optim.SGD(net.parameters(), lr=0.1), optax.sgd(0.2), batches)
        >>> report.passed, report.first_departure.step, report.first_departure.kind
        (False, 1, 'update')
    """
    _check(torch_module, flax_module, torch_optimizer, optax_transform, loss, limit)
    data = _batches(batches, steps, dtype)
    with highest_precision(), ExitStack() as stack:
        stack.enter_context(jax.enable_x64(True)) if dtype == "float64" else None
        masks = Masks(WHAT, channels_last is not False)
        names = rename_all(WHAT, list(torch_module.state_dict()), rename)
        torch_loss, flax_loss = loss or (_torch_loss, _flax_loss)
        torchs = {
            d: _TorchRun(torch_module, torch_optimizer, torch_scheduler, d, torch_loss, masks)
            for d in dict.fromkeys(("float64", dtype))
        }
        flaxs = {
            d: _FlaxRun(FlaxModel(flax_module, d, True, jit, flatten), optax_transform, flax_loss, masks, names)
            for d in torchs
        }
        start = torchs["float64"].to_arrays()
        own = flaxs["float64"].to_arrays()
        flaxs["float64"].load(start)
        layout = _layout(torchs["float64"], flaxs["float64"], data[0][0], channels_last)
        for flax in flaxs.values():
            flax.layout = layout
        gaps = {p: reason for p, reason in (known_gaps or {}).items()}
        comparing = _Comparing(torchs, flaxs, dtype, limit, gaps)
        if weights == "own":
            comparing.weights(start, own)
        free = _Free(torchs["float64"], flaxs["float64"], start, seed)
        done: list[TrainingStep] = []
        for number, batch in enumerate(data, 1):
            step = comparing.step(number, batch, seed + number)
            if step is None:
                break
            distances = free.step(batch, seed + number)
            done.append(replace(step, distance=distances[0], twin_distance=distances[1]))
            if progress is not None:
                progress(f"step {number} of {len(data)}: loss {step.loss:.6g}, distance {distances[0]:.2g}")
        departure, comparisons = comparing.result()
        notes = [*comparing.notes, *masks.differences]
        if departure is None and comparisons:
            notes += free.notes()
        return TrainingReport(
            type(torch_module).__name__,
            type(flax_module).__name__,
            type(torchs["float64"].optimizer).__name__,
            dtype,
            jit,
            tuple(done),
            comparisons,
            departure,
            tuple(notes),
        )
