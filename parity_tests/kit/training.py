"""Comparison of a torch model with its optimizer and a Flax model with its transformation, step by step of training.

Every step is judged from equal state, so that a chaotic network raises no false alarm: the weights and statistics of
torch's run in float64, rounded to the lower dtype, are put into both, in both dtypes. Losses, gradients and statistics
are compared; then each optimizer, which keeps a state of its own, is fed torch's gradients, and the new weights are
compared. Beside it both train freely, and a twin of torch whose weights moved by one ULP shows what rounding explains.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import jax
import numpy as np
import optax  # type: ignore[import-untyped]
import torch
from flax import nnx
from torch import Tensor, nn

from parity_tests.kit.judge import KINDS_OF_TRAINING, Comparison, Departure, Judge, TrainingStep, gap_of, with_gaps
from parity_tests.kit.masks import Masks
from parity_tests.kit.report import TrainingReport
from parity_tests.kit.runs import highest_precision
from parity_tests.kit.training_causes import Fed, History, cause_of_loss, cause_of_statistic, cause_of_update
from parity_tests.kit.training_runs import (
    LOSS,
    WHAT,
    Batch,
    FlaxTraining,
    MakeOptimizer,
    TorchTraining,
    batches_of,
    flax_loss,
    layout_of,
    torch_loss,
)
from parity_tests.kit.trees import Arrays, Run, leaves, numpy_of, rounded
from parity_tests.standard import UNIT_ROUNDOFF, error, meaning_limit
from probly_common.checks.values import check_module, type_name
from probly_common.weights.match import rename_all


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
    judge = Judge(dtype, limit)
    data = batches_of(batches, steps, judge.low, seed)
    names = rename_all(WHAT, list(torch_module.state_dict()), rename)
    masks = Masks(WHAT)
    of_torch, of_flax = loss or (torch_loss, flax_loss)

    def ours(d: str) -> TorchTraining:
        return TorchTraining(torch_module, d, masks, torch_optimizer, torch_scheduler, of_torch)

    with highest_precision():
        torchs = {d: ours(d) for d in ("float64", judge.low)}
        flaxs = {d: FlaxTraining(flax_module, d, masks, optax_transform, of_flax, jit, flatten, names) for d in torchs}
        torch64, flax64 = torchs["float64"], flaxs["float64"]
        start, own = torch64.to_arrays(), flax64.to_arrays()
        flax64.set_arrays(start, strict=True)
        layout = layout_of(torch64, flax64, data[0].inputs, channels_last)
        masks.channels_last = bool(layout.ranks)
        for run in flaxs.values():
            run.layout = layout
        free = _Free(ours("float64"), ours("float64"), flax64.copy(), seed)
        judged = _Judged(judge, torchs, flaxs, known_gaps or {})
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
        type(torch64.optimizer).__name__,
        dtype,
        jit,
        tuple(done),
        comparisons,
        departure,
        (*judged.notes, *masks.differences, *(free.notes(done) if departure is None else ())),
    )


class _Judged:
    """Steps from equal state, and where the two part first."""

    def __init__(
        self,
        judge: Judge,
        torchs: Mapping[str, TorchTraining],
        flaxs: Mapping[str, FlaxTraining],
        gaps: Mapping[str, str],
    ) -> None:
        self.judge, self.torchs, self.flaxs, self.gaps = judge, torchs, flaxs, gaps
        self.departure: Departure | None = None
        self.history = History()
        self.notes: list[str] = []

    def compare_weights(self, ours: Arrays, theirs: Arrays) -> None:
        """Compares values, which have to be equal before the first step."""
        for name in (name for name in ours if name in theirs):
            verdict = self.judge.add_weight(name, numpy_of(ours[name]), numpy_of(theirs[name]))
            if not verdict.holds and self.departure is None and gap_of(name, self.gaps) is None:
                cause = 'the models have weights of their own; weights="copy" gives those of torch to Flax'
                self.departure = Departure(0, "weight", name, verdict, cause)

    def step(self, number: int, batch: Batch) -> TrainingStep | None:
        """Takes a step. Returns None where torch's loss is not finite, after which nothing can be compared."""
        torch64, flax64 = self.torchs["float64"], self.flaxs["float64"]
        state = {name: rounded(numpy_of(array), self.judge.low) for name, array in torch64.to_arrays().items()}
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
        fed = {key: rounded(array, self.judge.low) for key, array in ours["float64"].items() if key[0] == "gradient"}
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
        known = self._judge(number, batch, state, ours, theirs)
        judged = [[c for c in known if c.kind == kind] for kind in KINDS_OF_TRAINING]
        worst = tuple(max(of_kind, key=lambda c: c.worst.ratio) for of_kind in judged if of_kind)
        return TrainingStep(number, value, worst, 0.0, 0.0)

    def result(self) -> tuple[tuple[Comparison, ...], Departure | None]:
        """Returns every tensor, and the first departure: that of precision only where there is no other."""
        comparisons = self.judge.comparisons_of_steps()
        for c in comparisons:
            broken = [v for v in c.verdicts[1:] if not v.holds]
            if broken and self.departure is None and gap_of(c.name, self.gaps) is None:
                step = self.judge.least_precise_step((c.kind, c.name))
                self.departure = Departure(step, c.kind, c.name, broken[0])
        return tuple(with_gaps(WHAT, comparisons, self.gaps) if comparisons else ()), self.departure

    def _judge(
        self, number: int, batch: Batch, state: Arrays, ours: Mapping[str, Run], theirs: Mapping[str, Run]
    ) -> list[Comparison]:
        """Judges a step. Returns the tensors that are not known to differ."""
        both = [key for key in ours["float64"] if key in theirs["float64"]]
        found = [self.judge.add_step(key, ours, theirs) for key in both]
        found = [c for c in found if gap_of(c.name, self.gaps) is None]
        broken = [c for c in found if not c.holds]
        if broken and self.departure is None:
            self.departure = self._departure(number, batch, state, broken, ours["float64"], theirs["float64"])
        return found

    def _departure(
        self, number: int, batch: Batch, state: Arrays, broken: Sequence[Comparison], ours: Run, theirs: Run
    ) -> Departure:
        kind = next(kind for kind in KINDS_OF_TRAINING if any(c.kind == kind for c in broken))
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
            differences = torch64.masks.differences if torch64.masks else []
            cause = "; ".join(differences) or cause_of_loss(float(ours[key]), float(theirs[key]), sizes)
        elif kind == "statistic":
            cause = cause_of_statistic(first.name, state[first.name], ours[key], theirs[key], torch64.module)
        elif kind == "update":
            summed = any(first.name in names[:1] and names[1:] for names in self.flaxs["float64"].parameters())
            cause = cause_of_update(first.name, torch64.optimizer, self.history, ours[key], theirs[key], summed)
        return Departure(number, kind, first.name, first.worst, cause)


class _Free:
    """Both on their own in float64, and a twin of torch whose weights were moved by one ULP."""

    def __init__(self, ours: TorchTraining, twin: TorchTraining, theirs: FlaxTraining, seed: int) -> None:
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
            if step.distance > meaning_limit() * explained:
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
