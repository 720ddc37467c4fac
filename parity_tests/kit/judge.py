"""The judgement of what two models compute: what is found, and the accumulator that finds it, run by run."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase

import jax.numpy as jnp
import numpy as np

from parity_tests.kit.trees import Key, Run
from parity_tests.standard import Errors, Verdict, error, farthest, ulps

KINDS = ("weight", "output", "special value", "exact", "statistic", "input gradient", "parameter gradient")
KINDS_OF_TRAINING = ("loss", "gradient", "statistic", "update")


class _Judged:
    """Something with verdicts."""

    verdicts: tuple[Verdict, ...]

    @property
    def worst(self) -> Verdict:
        """The rule that is nearest to its limit, or furthest beyond it."""
        return max(self.verdicts, key=lambda verdict: verdict.ratio)

    @property
    def holds(self) -> bool:
        """Tells whether every rule holds."""
        return all(verdict.holds for verdict in self.verdicts)


@dataclass(frozen=True)
class Comparison(_Judged):
    """One tensor under every rule that applies to it, and the place where the two differ most.

    Attributes:
        kind: one of `KINDS`, or `KINDS_OF_TRAINING`.
        name: torch's name of a weight, gradient or statistic; `output`, or where it is in a tree: `output[0]['loss']`.
        verdicts: what each rule measured, and what it allows.
        index: where the two differ most in the dtype that is judged, in torch's layout.
        torch: torch's value there.
        flax: Flax's value there.
        ulp: the number of values that the dtype can represent between them.
        gap: why this tensor is known to differ, if it is.
    """

    kind: str
    name: str
    verdicts: tuple[Verdict, ...]
    index: tuple[int, ...] = ()
    torch: float = math.nan
    flax: float = math.nan
    ulp: float = 0.0
    gap: str | None = None

    @property
    def holds(self) -> bool:
        """Tells whether every rule holds. For a known gap, it tells whether one still does not."""
        return super().holds is (self.gap is None)


@dataclass(frozen=True)
class LayerComparison(_Judged):
    """The outputs of a layer that both models have, at the same place, in forward order of torch.

    Attributes:
        path: torch's name of the layer; "" is the whole model.
        call: which of the layer's calls, from 0.
        torch_type: the class in torch.
        flax_type: the class in Flax.
        inputs_agree: whether what the two were called with agrees, as far as it could be matched.
        verdicts: of its outputs, under the rules of bounded comparison.
    """

    path: str
    call: int
    torch_type: str
    flax_type: str
    inputs_agree: bool
    verdicts: tuple[Verdict, ...]


@dataclass(frozen=True)
class Divergence:
    """The first layer, in forward order, whose outputs differ while its inputs agree.

    Attributes:
        path: torch's name of the layer; "" is the whole model.
        torch_type: its class in torch.
        flax_type: its class in Flax.
        what: which of its values differ: `outputs`, `gradients`, `statistics`.
        after: the layer after which they differ, where it is no layer that differs but what `path` does between layers.
        cause: the usual suspect that explains it, and what to change; None if no suspect does.
    """

    path: str
    torch_type: str
    flax_type: str
    what: str = "outputs"
    after: str | None = None
    cause: str | None = None

    def __str__(self) -> str:
        """Makes a sentence: the layer, then the cause."""
        name = self.path or "the whole model"
        where = name if self.after is None else f"{name}, after {self.after}"
        types = self.torch_type if self.torch_type == self.flax_type else f"{self.torch_type} and {self.flax_type}"
        cause = self.cause or f"{self.what} of {types} differ while its inputs agree, and no usual suspect explains it"
        return f"{where}: {cause}"


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


Runs = Mapping[str, Run]  # by dtype
Place = tuple[tuple[int, ...], float, float, float]


def place(a: np.ndarray, b: np.ndarray, dtype: str) -> Place:
    """Finds where two arrays differ most, both values, and how many values of the dtype lie between."""
    if a.shape != b.shape or not a.size:
        return (), math.nan, math.nan, math.nan
    index = farthest(a, b)
    pair = [np.asarray([array[index]]).astype(jnp.dtype(dtype)) for array in (a, b)]
    return index, float(a[index]), float(b[index]), float(ulps(*pair)[0])


@dataclass
class Tensor:
    """The findings of the runs so far about one tensor."""

    errors: list[Errors] = field(default_factory=list)  # of each run, at the largest scale so far
    largest: Errors | None = None
    verdicts: tuple[Verdict, ...] = ()  # of its worst step, of integers, or of what it lacks
    worst: float = -1.0
    place: Place = ((), math.nan, math.nan, 0.0)


class Judge:
    """The accumulator of both comparisons: what every tensor showed in each run, and what is said of all of them."""

    def __init__(self, dtype: str, limit: float, oracle: bool = False) -> None:
        self.dtype, self.limit, self.oracle = dtype, limit, oracle
        self.low = "float32" if dtype == "float64" else dtype  # whose rounding says what that of float64 may be
        self.tensors: dict[Key, Tensor] = {}

    def add(self, key: Key, ours: Runs, theirs: Runs, expected: np.ndarray) -> None:
        """Adds the values of a run; `expected` is the reference, in float64."""
        tensor = self.tensors.setdefault(key, Tensor())
        a, b = ours[self.dtype][key], theirs[self.dtype][key]
        if expected.dtype.kind in "iub":
            unequal = float((ours["float64"][key] != theirs["float64"][key]).sum())
            unequal += sum(verdict.measured for verdict in tensor.verdicts)
            tensor.verdicts = (Verdict(key[1], "number of elements that differ", unequal, 0.0),)
            tensor.place = place(a, b, self.dtype)
            return
        if expected.size and not np.isfinite(expected).any():
            self.lacks(key, "no finite number to compare")
        self._measure(key, ours, theirs, expected)
        worst = error(a, b, expected, self.dtype)
        if worst > tensor.worst:
            tensor.worst, tensor.place = worst, place(a, b, self.dtype)

    def add_step(self, key: Key, ours: Runs, theirs: Runs) -> Comparison:
        """Adds the values of a step of training, which is judged by itself, in float64.

        Errors are measured at the largest scale that the tensor had so far. Losses and gradients go to zero as training
        succeeds. They are then differences of larger numbers, and float32 keeps no digit by which float64 could be
        judged.
        """
        tensor = self.tensors.setdefault(key, Tensor())
        a, b = ours["float64"][key], theirs["float64"][key]
        self._measure(key, ours, theirs, a)
        (meaning,) = self._meaning(key[1], tensor.errors[-1])
        where = place(a, b, "float64")
        if meaning.ratio > tensor.worst:
            tensor.worst, tensor.verdicts, tensor.place = meaning.ratio, (meaning,), where
        return Comparison(key[0], key[1], (meaning,), *where)

    def add_weight(self, name: str, ours: np.ndarray, theirs: np.ndarray) -> Verdict:
        """Adds a weight, whose values have to be equal."""
        verdict = Verdict(name, "inequality of torch and flax", float(not np.array_equal(ours, theirs)), 0.0)
        self.tensors["weight", name] = Tensor(verdicts=(verdict,), place=place(ours, theirs, "float64"))
        return verdict

    def lacks(self, key: Key, how: str) -> None:
        """Says that a tensor cannot be compared, so that it does not pass."""
        self.tensors.setdefault(key, Tensor()).verdicts = (Verdict(key[1], how, math.inf, 0.0),)

    def comparisons(self) -> list[Comparison]:
        """Judges every tensor by the largest errors of all runs."""
        found = []
        for key, tensor in self.tensors.items():
            worst = tensor.largest
            verdicts = () if worst is None else (*self._precision(key[1], worst), *self._meaning(key[1], worst))
            found.append(Comparison(key[0], key[1], (*verdicts, *tensor.verdicts), *tensor.place))
        return found

    def comparisons_of_steps(self) -> list[Comparison]:
        """Judges every tensor in float64 at its worst step, and in the lower dtype at the one in the middle.

        There, since a relu whose input is next to 0 may take another side in one of the two, at one step.
        """
        found = []
        for key, tensor in self.tensors.items():
            lows = [errors[:2] for errors in tensor.errors]
            precision = self._precision(key[1], Errors(*map(float, np.median(lows, 0)))) if lows else []
            found.append(Comparison(key[0], key[1], (*tensor.verdicts, *precision), *tensor.place))
        return found

    def least_precise_step(self, key: Key) -> int:
        """Returns the step, from 1, at which a tensor was least precise in the lower dtype."""
        ratios = [max(v.ratio for v in e.verdicts(key[1], self.low)[:2]) for e in self.tensors[key].errors]
        return int(np.argmax(ratios)) + 1

    def noise(self, kind: str) -> float:
        """Returns the largest noise of float32 among tensors of one kind."""
        errors = [tensor.largest for (own, _), tensor in self.tensors.items() if own == kind]
        return max((max(e.noise_torch, e.noise_flax) for e in errors if e is not None), default=0.0)

    def _measure(self, key: Key, ours: Runs, theirs: Runs, expected: np.ndarray) -> None:
        a, b = ({dtype: run[key] for dtype, run in runs.items()} for runs in (ours, theirs))
        errors, tensor = Errors.of(a, b, expected, self.low), self.tensors[key]
        known = tensor.largest
        tensor.largest = errors if known is None else errors.worse(known)
        tensor.errors.append(errors.at_scale(tensor.largest.scale))

    def _precision(self, name: str, errors: Errors) -> list[Verdict]:
        """Judges the lower dtype; float64 is judged by its meaning alone."""
        return [] if self.dtype == "float64" else self._limited(errors.verdicts(name, self.low)[:2])

    def _meaning(self, name: str, errors: Errors) -> list[Verdict]:
        """Judges float64. Without an oracle torch is the reference, and gets no verdict of its own."""
        return self._limited(errors.verdicts(name, self.low)[2 : None if self.oracle else 3])

    def _limited(self, verdicts: Sequence[Verdict]) -> list[Verdict]:
        return [replace(verdict, limit=verdict.limit * self.limit) for verdict in verdicts]


def gap_of(name: str, known_gaps: Mapping[str, str]) -> str | None:
    """Returns why a tensor is known to differ, if it is."""
    return next((reason for pattern, reason in known_gaps.items() if fnmatchcase(name, pattern)), None)


def with_gaps(what: str, comparisons: Sequence[Comparison], known_gaps: Mapping[str, str]) -> list[Comparison]:
    """Puts each known gap's reason at the tensors that differ.

    If none does, it is at one that does not, so that this one fails.
    """
    marked = list(comparisons)
    for pattern, reason in known_gaps.items():
        matching = [i for i, each in enumerate(marked) if fnmatchcase(each.name, pattern)]
        if not matching:
            raise ValueError(
                f"{what} expects known_gaps to name tensors of the report; got {pattern!r}, which none has: "
                f"{', '.join(sorted({each.name for each in marked}))[:300]}. Leave it out."
            )
        differing = [i for i in matching if not all(verdict.holds for verdict in marked[i].verdicts)]
        for i in differing or matching[:1]:
            marked[i] = replace(marked[i], gap=reason)
    return marked
