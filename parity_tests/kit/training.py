"""Comparison of a torch model with its optimizer and a Flax model with its transformation, step by step of training.

Every step is judged from equal state, so that a chaotic network raises no false alarm: the weights and statistics of
torch's run in float64, rounded to the lower dtype, are put into both, in both dtypes. Losses, gradients and statistics
are compared; then each optimizer, which keeps a state of its own, is fed torch's gradients, and the new weights are
compared. Beside it both train freely, and a twin of torch whose weights moved by one ULP shows what rounding explains.
"""

from __future__ import annotations

import base64
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from html import escape
from textwrap import fill
from typing import TYPE_CHECKING, Any, Literal

import jax
import numpy as np
import optax  # type: ignore[import-untyped]
import torch
from flax import nnx
from torch import Tensor, nn

from parity_tests.kit import render
from parity_tests.kit.masks import Masks
from parity_tests.kit.report import Comparison, with_gaps
from parity_tests.kit.runs import FlaxModel, highest_precision
from parity_tests.kit.training_causes import Fed, History, cause_of_loss, cause_of_statistic, cause_of_update
from parity_tests.kit.training_runs import (
    WHAT,
    Arrays,
    Batch,
    FlaxRun,
    Key,
    MakeOptimizer,
    Run,
    TorchRun,
    batches_of,
    flax_loss,
    layout_of,
    torch_loss,
)
from parity_tests.kit.trees import leaves, numpy_of, rounded
from parity_tests.standard import MEANING_LIMIT, NOISE_FLOOR, UNIT_ROUNDOFF, Errors, Verdict, error, farthest, ulps
from probly_common.checks.values import check_module, type_name
from probly_common.weights.match import rename_all

if TYPE_CHECKING:
    from matplotlib.figure import Figure

KINDS = ("loss", "gradient", "statistic", "update")
LOSS = ("loss", "loss")


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
        """Makes a sentence: what differs where, by how much, and why."""
        name = self.kind if self.kind == self.tensor else f"{self.kind} of {self.tensor}"
        found = 'compare(torch_module, flax_module, inputs, mode="train") names the layer'
        why = self.cause or (
            found if self.kind in ("loss", "gradient", "statistic") else "no usual suspect explains it"
        )
        return (
            f"{name} at step {self.step}: {self.verdict.rule} is {self.verdict.measured:.3g}, above its limit "
            f"{self.verdict.limit:.3g}: {why}"
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
        """Tells whether every tensor holds at every step."""
        return bool(self.steps) and all(comparison.holds for comparison in self.comparisons)

    def __bool__(self) -> bool:
        """Returns `passed`."""
        return self.passed

    def __str__(self) -> str:
        """Returns a line for each kind of tensor, the first departure, notes, and the verdict as the last line."""
        sentences = (fill(sentence, render.WIDTH) for sentence in self._sentences())
        return "\n".join([self._title(), "", *self._table(), "", *sentences, self._verdict()])

    def to_json(self) -> str:
        """Returns valid JSON. What is infinite or NaN is a string that Python's float() reads."""
        first = self.first_departure
        content = render.data(self) | {"passed": self.passed, "verdict": self._verdict()}
        if first is not None:
            content["first_departure"]["sentence"] = str(first)
        return json.dumps(content, indent=1, allow_nan=False)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the report, all of it or nothing: `.json`, `.html`, or `.png` with the distances by step.

        Raises:
            ValueError: for another suffix, or a folder that is not there.
        """
        content = {
            ".json": lambda: self.to_json().encode(),
            ".png": lambda: render.to_png(self._figure()),
            ".html": lambda: self._page().encode(),
        }
        render.save("TrainingReport.save", path, content)

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
        if self.steps:
            last = self.steps[-1]
            yield (
                f"On their own, torch and Flax are {last.distance:.1g} of the weights' scale apart after the last "
                f"step; torch and a twin that started one ULP away, {last.twin_distance:.1g}."
            )
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
        if all(c.holds for c in self.comparisons):
            return "No parity: nothing was compared."
        return f"No parity: {sum(not c.holds for c in self.comparisons)} of {count} tensors differ."

    def _page(self) -> str:
        image = base64.b64encode(render.to_png(self._figure())).decode()
        parts = [f"<pre>{escape(str(self))}</pre>", f'<img src="data:image/png;base64,{image}" alt="error by step">']
        return render.html_page(self._title(), parts)

    def _figure(self) -> Figure:
        drawing = render.new_figure()
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
            axes.set_xticks(sorted({*numbers[:: 1 + len(numbers) // 10], *numbers[-1:]}))
            axes.grid(axis="y", lw=0.4, c="#cccccc")
            axes.legend()
        drawing.suptitle(f"{self._title()}\n{self._verdict()}", fontsize=10, parse_math=False)
        return drawing


def compare_training(
    torch_module: nn.Module,
    flax_module: nnx.Module,
    torch_optimizer: MakeOptimizer,
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

    Neither model, nor the optimizer, is changed. Masks of dropout are equal in both. optax runs under jax_enable_x64
    in float32 too: without it, Adam's bias correction is up to 1e-5 off.

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
        dtype: whose precision is judged, beside the meaning in float64; `float64` judges that alone.
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
    _check(torch_module, flax_module, optax_transform, loss, dtype, weights, limit)
    low = "float32" if dtype == "float64" else dtype  # whose rounding says what that of float64 may be
    data = batches_of(batches, steps, low, seed)
    names = rename_all(WHAT, list(torch_module.state_dict()), rename)
    masks = Masks(WHAT)
    of_torch, of_flax = loss or (torch_loss, flax_loss)
    with highest_precision():
        dtypes = ("float64", low)
        torchs = {d: TorchRun(torch_module, torch_optimizer, torch_scheduler, d, of_torch, masks) for d in dtypes}
        models = {d: FlaxModel(flax_module, d, train=True, jit=jit, flatten=flatten) for d in dtypes}
        flaxs = {d: FlaxRun(model, optax_transform, of_flax, masks, names) for d, model in models.items()}
        start, own = torchs["float64"].to_arrays(), flaxs["float64"].to_arrays()
        flaxs["float64"].set_arrays(start, strict=True)
        layout = layout_of(torchs["float64"], flaxs["float64"], data[0].inputs, channels_last)
        masks.channels_last = bool(layout.ranks)
        for run in flaxs.values():
            run.layout = layout
        free_torch, twin = (
            TorchRun(torch_module, torch_optimizer, torch_scheduler, "float64", of_torch, masks) for _ in range(2)
        )
        free = _Free(free_torch, twin, flaxs["float64"].copy(), seed)
        judged = _Judged(torchs, flaxs, low, limit, known_gaps or {}, precision=dtype != "float64")
        if weights == "own":
            judged.compare_weights(start, own)
        done = []
        for number, batch in enumerate(data, 1):
            step = judged.step(number, batch)
            if step is None:
                break
            distance, twin_distance = free.step(batch)
            done.append(replace(step, distance=distance, twin_distance=twin_distance))
            if progress is not None:
                progress(f"step {number} of {len(data)}: loss {step.loss:.6g}")
        comparisons, departure = judged.result()
    return TrainingReport(
        type(torch_module).__name__,
        type(flax_module).__name__,
        type(free_torch.optimizer).__name__,
        dtype,
        jit,
        tuple(done),
        comparisons,
        departure,
        (*judged.notes, *masks.differences, *(free.notes(done) if departure is None else ())),
    )


class _Judged:
    """Steps from equal state, and the worst of every tensor."""

    def __init__(
        self,
        torchs: Mapping[str, TorchRun],
        flaxs: Mapping[str, FlaxRun],
        low: str,
        limit: float,
        gaps: Mapping[str, str],
        precision: bool,
    ) -> None:
        self.torchs, self.flaxs, self.low, self.precision = torchs, flaxs, low, precision
        self.limit, self.gaps = limit, gaps
        self.errors: dict[Key, list[Errors]] = {}
        self.worst: dict[Key, Comparison] = {}  # in float64
        self.scales: dict[Key, float] = {}
        self.departure: Departure | None = None
        self.history = History()
        self.notes: list[str] = []

    def compare_weights(self, ours: Arrays, theirs: Arrays) -> None:
        """Compares values, which have to be equal before the first step."""
        for name in ours.keys() & theirs.keys():
            a, b = numpy_of(ours[name]), numpy_of(theirs[name])
            verdict = Verdict(name, "inequality of torch and flax", float(not np.array_equal(a, b)), 0.0)
            self._add(("weight", name), self._comparison(("weight", name), verdict, a, b))
            if not verdict.holds and self.departure is None and self._gap(name) is None:
                cause = 'the models have weights of their own; weights="copy" gives those of torch to Flax'
                self.departure = Departure(0, "weight", name, verdict, cause)

    def step(self, number: int, batch: Batch) -> TrainingStep | None:
        """Takes a step. Returns None where torch's loss is not finite, after which nothing can be compared."""
        torch64, flax64 = self.torchs["float64"], self.flaxs["float64"]
        state = {name: rounded(numpy_of(array), self.low) for name, array in torch64.to_arrays().items()}
        for d in self.torchs:
            self.torchs[d].set_arrays(state)
            self.flaxs[d].set_arrays(state)
        theirs = {d: run.gradients(batch) for d, run in self.flaxs.items()}  # first: torch has its masks
        ours = {d: run.gradients(batch) for d, run in self.torchs.items()}
        value = float(ours["float64"][LOSS])
        if not math.isfinite(value):
            ours, theirs = ({d: {LOSS: run[LOSS]} for d, run in runs.items()} for runs in (ours, theirs))
            self._judge(number, batch, state, ours, theirs)
            self.notes.append(f"torch's loss is {value} at step {number}, after which nothing was compared")
            return None
        fed = {key: rounded(array, self.low) for key, array in ours["float64"].items() if key[0] == "gradient"}
        rate = torch64.rate
        scales = [run.step(fed) for run in self.torchs.values()]
        for flax in self.flaxs.values():
            flax.step(fed)
        for d, run in self.torchs.items():
            weights = run.weights()
            ours[d] |= _updates(flax64.summed(weights))
            theirs[d] |= _updates(flax64.summed(self.flaxs[d].weights(weights)))
        parameters = flax64.summed({name: state[name] for name in torch64.parameters})
        if self.departure is None:
            self.history.add(Fed(parameters, {name: array for (_, name), array in fed.items()}, rate, scales[0]))
        own = self._judge(number, batch, state, ours, theirs)
        judged = [[c for c in own.values() if c.kind == kind and c.gap is None] for kind in KINDS]
        worst = tuple(max(of_kind, key=lambda c: c.worst.ratio) for of_kind in judged if of_kind)
        return TrainingStep(number, value, worst, 0.0, 0.0)

    def result(self) -> tuple[tuple[Comparison, ...], Departure | None]:
        """Returns every tensor: in float64 at its worst step, in the lower dtype at the one in the middle.

        There, since a relu whose input is next to 0 may take another side in one of the two, at one step.
        """
        comparisons = []
        for key, comparison in self.worst.items():
            errors = self.errors.get(key, [])
            precision: list[Verdict] = []
            if errors and self.precision:
                middle = Errors(*(float(np.median([e[i] for e in errors])) for i in range(2)))
                precision = [replace(v, limit=self.limit * v.limit) for v in middle.verdicts(key[1], self.low)]
            broken = [v for v in precision if not v.holds]
            if broken and self.departure is None and comparison.gap is None:
                ratios = [max(v.ratio for v in e.verdicts(key[1], self.low)[:2]) for e in errors]
                self.departure = Departure(int(np.argmax(ratios)) + 1, *key, broken[0])
            comparisons.append(replace(comparison, verdicts=(*comparison.verdicts, *precision), gap=None))
        return tuple(with_gaps(WHAT, comparisons, self.gaps) if comparisons else ()), self.departure

    def _judge(
        self, number: int, batch: Batch, state: Arrays, ours: Mapping[str, Run], theirs: Mapping[str, Run]
    ) -> dict[Key, Comparison]:
        found = {}
        for key, reference in ours["float64"].items():
            if key not in theirs["float64"]:
                continue
            a, b = ({d: run[key] for d, run in runs.items()} for runs in (ours, theirs))
            errors = self._at_scale(key, Errors.of(a, b, reference, self.low))
            noise = max(NOISE_FLOOR, errors.noise_torch, errors.noise_flax)
            verdict = Verdict(
                key[1],
                "float64 distance of torch and flax",
                errors.distance if errors.distance is not None else math.nan,
                self.limit * MEANING_LIMIT * noise,
            )
            found[key] = self._comparison(key, verdict, a["float64"], b["float64"])
            self.errors.setdefault(key, []).append(errors)
            self._add(key, found[key])
        broken = [c for c in found.values() if not c.worst.holds and c.gap is None]
        if broken and self.departure is None:
            self.departure = self._departure(number, batch, state, broken, ours["float64"], theirs["float64"])
        return found

    def _at_scale(self, key: Key, errors: Errors) -> Errors:
        """Measures errors at the largest scale that the tensor had so far.

        Losses and gradients go to zero as training succeeds. They are then differences of larger numbers, and float32
        keeps no digit by which float64 could be judged.
        """
        self.scales[key] = max(errors.scale, self.scales.get(key, 0.0))
        return errors.at_scale(self.scales[key])

    def _departure(
        self, number: int, batch: Batch, state: Arrays, broken: Sequence[Comparison], ours: Run, theirs: Run
    ) -> Departure:
        kind = next(kind for kind in KINDS if any(c.kind == kind for c in broken))
        of_kind = [c for c in broken if c.kind == kind]
        first = of_kind[-1 if kind == "gradient" else 0]  # gradients run from the last layer to the first
        torch64 = self.torchs["float64"]
        key = (kind, first.name)
        cause = None
        if kind == "loss":
            sizes = {"rows": 1, "members": 1, "targets": 1}
            targets = [array.shape for _, array in leaves(batch.targets)]
            if targets:
                sizes = {"rows": targets[0][0] if targets[0] else 1, "targets": math.prod(targets[0])}
            differences = torch64.masks.differences
            cause = "; ".join(differences) or cause_of_loss(float(ours[key]), float(theirs[key]), sizes)
        elif kind == "statistic":
            cause = cause_of_statistic(first.name, state[first.name], ours[key], theirs[key], torch64.model.module)
        elif kind == "update":
            summed = any(first.name in names[:1] and names[1:] for names in self.flaxs["float64"].parameters())
            cause = cause_of_update(first.name, torch64.optimizer, self.history, ours[key], theirs[key], summed)
        return Departure(number, kind, first.name, first.worst, cause)

    def _comparison(self, key: Key, verdict: Verdict, ours: np.ndarray, theirs: np.ndarray) -> Comparison:
        kind, name = key
        if ours.shape != theirs.shape or not ours.size:
            return Comparison(kind, name, (verdict,), gap=self._gap(name))
        index = farthest(ours, theirs)
        a, b = (np.asarray(array[index], np.float64) for array in (ours, theirs))
        return Comparison(kind, name, (verdict,), index, float(a), float(b), float(ulps(a, b)), self._gap(name))

    def _add(self, key: Key, comparison: Comparison) -> None:
        before = self.worst.get(key)
        if before is None or comparison.worst.ratio > before.worst.ratio:
            self.worst[key] = comparison

    def _gap(self, name: str) -> str | None:
        return next((reason for pattern, reason in self.gaps.items() if fnmatchcase(name, pattern)), None)


class _Free:
    """Both on their own in float64, and a twin of torch whose weights were moved by one ULP."""

    def __init__(self, ours: TorchRun, twin: TorchRun, theirs: FlaxRun, seed: int) -> None:
        self.ours, self.twin, self.theirs = ours, twin, theirs
        rng = np.random.default_rng(seed)
        moved = {name: np.nextafter(w, rng.choice((-np.inf, np.inf), w.shape)) for name, w in twin.weights().items()}
        with torch.no_grad():
            for name, parameter in twin.parameters.items():
                parameter.copy_(torch.from_numpy(moved[name]))

    def step(self, batch: Batch) -> tuple[float, float]:
        """Returns the distances after the step, of Flax and of the twin."""
        for run in (self.theirs, self.ours, self.twin):
            run.step(run.gradients(batch))
        ours = self.ours.weights()
        return self._distance(self.theirs.weights(ours), ours), self._distance(self.twin.weights(), ours)

    def notes(self, steps: Sequence[TrainingStep]) -> list[str]:
        """Warns where they part by far more than rounding explains."""
        floor = UNIT_ROUNDOFF["float64"]
        for i, step in enumerate(steps):
            explained = max(floor, *(s.twin_distance for s in steps[: i + 1]))
            if step.distance > MEANING_LIMIT * NOISE_FLOOR * explained:
                return [
                    f"each step agrees, but on their own the two are {step.distance:.2g} of the weights' scale apart "
                    f"after step {step.number}, where weights that start one ULP apart are {explained:.2g} apart"
                ]
        return []

    def _distance(self, weights: Arrays, reference: Arrays) -> float:
        """Returns the largest distance of all tensors, each at its scale."""
        weights, reference = self.theirs.summed(weights), self.theirs.summed(reference)
        roundings = (error(weights[name], array, array, "float64") for name, array in reference.items())
        return UNIT_ROUNDOFF["float64"] * max(roundings, default=0.0)


def _updates(weights: Mapping[str, np.ndarray]) -> Run:
    return {("update", name): array for name, array in weights.items()}


def _check(
    torch_module: Any, flax_module: Any, transform: Any, loss: Any, dtype: Any, weights: Any, limit: Any
) -> None:
    check_module(WHAT, "torch_module", torch_module, nn.Module)
    check_module(WHAT, "flax_module", flax_module, nnx.Module)
    if not isinstance(transform, optax.GradientTransformation):
        raise TypeError(
            f"{WHAT} expects optax_transform to be what nnx.Optimizer is given; got {type_name(transform)}. Pass "
            f"optax.sgd(0.1)."
        )
    if loss is not None and not (isinstance(loss, tuple | list) and len(loss) == 2 and all(map(callable, loss))):
        raise TypeError(
            f"{WHAT} expects loss to be one function for each framework, of outputs and targets; got "
            f"{type_name(loss)}. Pass loss=(torch_loss, flax_loss)."
        )
    if dtype not in UNIT_ROUNDOFF:
        raise ValueError(f"{WHAT} expects dtype to be one of {', '.join(UNIT_ROUNDOFF)}; got {dtype!r}. Leave it out.")
    if weights not in ("copy", "own"):
        raise ValueError(f"{WHAT} expects weights to be 'copy' or 'own'; got {weights!r}. Leave it out: 'copy'.")
    if not isinstance(limit, int | float) or not 0 < limit <= 1:
        raise ValueError(f"{WHAT} expects limit to be a fraction of the bound, above 0 and at most 1; got {limit!r}.")
