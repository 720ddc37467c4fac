"""Comparison of a torch and a Flax model as functions: outputs, gradients and statistics on equal weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from flax import nnx
from torch import nn

from parity_tests.kit.exact import Certificate, NotExactError
from parity_tests.kit.inputs import Inputs, check_inputs
from parity_tests.kit.localize import Calls, Pair
from parity_tests.kit.masks import Masks
from parity_tests.kit.report import KINDS, Comparison, ParityReport, with_gaps
from parity_tests.kit.runs import FlaxModel, Key, Layout, LayoutError, Run, TorchModel, highest_precision
from parity_tests.kit.trees import leaves, mapped
from parity_tests.kit.weights import fresh_weights, match_weights, random_weights, torch_paths
from parity_tests.standard import MEANING_LIMIT, NOISE_FLOOR, UNIT_ROUNDOFF, Errors, Verdict, error, farthest, ulps

SEEDS = 5
INTEGERS = (8, 3, 1)  # the largest ones that the exact tier tries
Oracle = Callable[..., Any]


def compare(
    torch_module: nn.Module,
    flax_module: nnx.Module,
    *inputs: Any,
    kwargs: Mapping[str, Any] | None = None,
    mode: Literal["eval", "train"] = "eval",
    gradients: bool = True,
    dtype: str = "float32",
    exact: bool | None = None,
    jit: bool = True,
    weights: Literal["copy", "own", "random"] = "copy",
    rename: Mapping[str, str] | None = None,
    flatten: Mapping[str, Sequence[int]] | None = None,
    known_gaps: Mapping[str, str] | None = None,
    limit: float = 1.0,
    seeds: int | None = None,
    oracle: Callable[..., Any] | None = None,
    channels_last: bool | None = None,
    layers: bool | None = None,
    progress: Callable[[str], None] | None = None,
) -> ParityReport:
    """Runs both models on equal weights and inputs, and reports every tensor that is not numerically identical.

    Both run in float64, which tells whether they mean the same, and in a lower dtype, which tells whether they are
    equally precise. How far they may be apart follows from their own rounding noise in this comparison, and from
    nothing else (`parity_tests.standard`). Neither model is changed.

    Args:
        torch_module: any module.
        flax_module: its twin; layers whose names differ are given by `rename`.
        *inputs: what both are called with, in torch's layout: arrays of NumPy, torch or JAX, trees of them, or a shape
            to draw normal values for, `(8, 3, 32, 32)`, or `Integers((8, 16), high=1000)`.
        kwargs: keyword arguments of both, in the same forms.
        mode: `eval` or `train`, where statistics are updated, and dropout has equal masks in both.
        gradients: whether gradients by the inputs and the parameters are compared, of a random gradient of the outputs.
        dtype: the lower dtype, float32, bfloat16 or float16; float64 compares the meaning alone.
        exact: whether to compare on integers whose sums are exact in any order, too; None where inputs are drawn and
            the network can be compared so, which a note says.
        jit: whether Flax runs under jax.jit, or op by op.
        weights: `copy` gives Flax those of torch, `random` draws new ones for both, as fresh ones hide faults, and
            `own` compares those that each has.
        rename: regular expressions in torch's names of the weights, and what they are in Flax, as in `load_arrays`.
        flatten: as in `probly_flax.load_arrays`, where a Linear layer reads an image that Flax flattens channels last.
        known_gaps: patterns of names of tensors, such as `"*.running_var"`, that are known to differ, and the reasons.
            One that does not differ any more fails.
        limit: the part of the bounds that is allowed, at most 1.
        seeds: how many inputs are drawn, 5 unless said. Inputs that are given are run once.
        oracle: a function of (weights by torch's names, *args, **kwargs), NumPy arrays in float64, that returns the
            outputs; torch's float64 run if there is none.
        channels_last: whether Flax has images as (N, ..., C); found out from the shapes unless said.
        layers: whether to compare layer by layer as well; None where something differs.
        progress: called with the name of each step before it starts.

    Returns:
        What was measured. It is true if everything agrees, printing it explains it, and `save` writes it.

    Raises:
        TypeError: if these are no modules, or no arrays.
        ValueError: if an option has no such value, a model does not take the inputs, weights have no names in torch, or
            exact=True is asked of a network that rounds.

    Example:
        >>> from torch import nn
        >>> from flax import nnx
        >>> report = compare(nn.Linear(3, 2), nnx.Linear(3, 2, rngs=nnx.Rngs(0)), (5, 3))
        >>> report.passed
        True
    """
    _check_options(torch_module, flax_module, mode, dtype, weights, limit, seeds)
    step = progress or (lambda name: None)
    low = "float32" if dtype == "float64" else dtype
    given = Inputs(inputs, kwargs, low)
    check_inputs("compare", given)
    step("weights")
    masks = Masks("compare") if mode == "train" else None
    train = mode == "train"
    torch_low = TorchModel(torch_module, low, train, masks)
    if weights == "random":
        torch_low.set_arrays(random_weights(torch_low.to_arrays()))
    arrays = torch_low.to_arrays()
    torch_models = {low: torch_low, "float64": TorchModel(torch_low.module, "float64", train, masks)}
    flax_low = FlaxModel(flax_module, low, train, jit, flatten, masks)
    names, comparisons = match_weights(arrays, flax_low.to_arrays(), rename, own=weights == "own")
    if weights != "own":
        flax_low.set_arrays({there: arrays[here] for here, there in names.items()})
    flax_models = {low: flax_low, "float64": FlaxModel(flax_low.module, "float64", train, jit, flatten, masks)}
    if weights != "own":  # again, since a weight of Flax's can be a sum of torch's
        arrays = torch_models["float64"].to_arrays()
        flax_models["float64"].set_arrays({there: arrays[here] for here, there in names.items()})
    notes = [] if weights == "random" else fresh_weights(arrays)

    with highest_precision():
        step("shapes")
        pair = Pair(torch_models, flax_models, Layout(), low, torch_paths(names), train)
        comparison = _Comparison(pair, given, names, _Rules(dtype, low, limit, oracle), gradients)
        misfit = comparison.find_layout(channels_last)
        if misfit is None:
            for seed in range((SEEDS if given.is_drawn else 1) if seeds is None else seeds):
                step(f"inputs {seed + 1}")
                comparison.run(seed)
            comparisons += comparison.tensors()
            if given.is_drawn and not train:
                step("special values")
                comparisons += comparison.special()
            if exact or (exact is None and given.is_drawn):
                step("integers")
                comparisons += comparison.on_integers(arrays, notes, required=exact is True)
        else:
            comparisons.append(Comparison("output", "output", (Verdict("output", misfit, float("inf"), 0.0),)))
        if comparison.pair.layout.ranks:
            notes.append(f"Flax took its inputs {comparison.pair.layout}")
        comparisons = with_gaps("compare", comparisons, known_gaps or {})
        failed = [each for each in comparisons if not each.holds and each.gap is None]
        found: tuple[Any, ...] = ()
        divergence = None
        if layers or (failed and layers is None):
            step("layers")
            calls = Calls(comparison.pair, _showing(given, failed))
            found, divergence = calls.layers(), calls.first_divergence(failed)
    types = type(torch_module).__name__, type(flax_module).__name__
    order = sorted(comparisons, key=lambda each: KINDS.index(each.kind))
    return ParityReport(*types, mode, dtype, jit, tuple(order), found, divergence, tuple(notes))


def assert_parity(torch_module: nn.Module, flax_module: nnx.Module, *inputs: Any, **options: Any) -> ParityReport:
    """Runs `compare`, as an assertion.

    Args:
        torch_module: as in `compare`.
        flax_module: as in `compare`.
        *inputs: as in `compare`.
        **options: as in `compare`.

    Returns:
        The report, if everything agrees.

    Raises:
        AssertionError: otherwise, with the report as its message.

    Example:
        >>> from torch import nn
        >>> from flax import nnx
        >>> report = assert_parity(nn.Linear(3, 2), nnx.Linear(3, 2, rngs=nnx.Rngs(0)), (5, 3))
    """
    __tracebackhide__ = True  # pytest shows the caller's line
    report = compare(torch_module, flax_module, *inputs, **options)
    if not report:
        raise AssertionError(str(report))
    return report


def _check_options(
    torch_module: Any, flax_module: Any, mode: str, dtype: str, weights: str, limit: float, seeds: int | None
) -> None:
    for module, kind, name in ((torch_module, nn.Module, "torch.nn.Module"), (flax_module, nnx.Module, "nnx.Module")):
        if not isinstance(module, kind):
            raise TypeError(
                f"compare expects a torch.nn.Module and then an nnx.Module; got {type(module).__name__} for the "
                f"{name}. Call compare(torch_module, flax_module, (8, 3))."
            )
    for name, value, choices in (
        ("mode", mode, ("eval", "train")),
        ("dtype", dtype, tuple(UNIT_ROUNDOFF)),
        ("weights", weights, ("copy", "own", "random")),
    ):
        if value not in choices:
            raise ValueError(
                f"compare expects {name} to be one of {', '.join(choices)}; got {value!r}. Pass {name}={choices[0]!r}."
            )
    if seeds is not None and (not isinstance(seeds, int) or seeds < 1):
        raise ValueError(f"compare expects seeds to be a number of inputs of at least 1; got {seeds!r}. Pass seeds=5.")
    if not 0 < limit <= 1:
        raise ValueError(
            f"compare expects limit to be the part of the bounds that is allowed, above 0 and at most 1; got "
            f"{limit!r}. Pass limit=0.5 for half of them, and name what is known to differ: "
            f"known_gaps={{'*.running_var': 'reason'}}."
        )


@dataclass(frozen=True)
class _Rules:
    """Which of the rules are judged."""

    dtype: str
    low: str
    limit: float
    oracle: Oracle | None

    def verdicts(self, tensor: str, errors: Errors) -> tuple[Verdict, ...]:
        """Returns the verdicts of a tensor.

        Without an oracle torch's float64 run is the reference, and gets no verdict of its own.
        """
        precision, meaning = (each := errors.verdicts(tensor, self.low))[:2], each[2:]
        kept = ([] if self.dtype == "float64" else precision) + (meaning if self.oracle else meaning[:1])
        return tuple(replace(verdict, limit=verdict.limit * self.limit) for verdict in kept)


@dataclass
class _Tensor:
    """The findings of the runs so far about one tensor."""

    errors: Errors | None  # None for integers, of which `worst` counts those that differ
    place: tuple[tuple[int, ...], float, float, float] = ((), 0.0, 0.0, 0.0)
    worst: float = -1.0


class _Comparison:
    """Two models, what they are called with, and what was found so far."""

    def __init__(self, pair: Pair, inputs: Inputs, names: Mapping[str, str], rules: _Rules, gradients: bool) -> None:
        self.pair, self.inputs, self.names, self.rules, self.gradients = pair, inputs, names, rules, gradients
        self.found: dict[Key, _Tensor] = {}
        self.lacking: dict[Key, Verdict] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}

    def find_layout(self, channels_last: bool | None) -> str | None:
        """Chooses the layout that fits the shapes; of several, the one with the nearest outputs. Or how none fits."""
        inputs = self.inputs.draw(0)
        torch64, flax64 = self.pair.torch["float64"], self.pair.flax["float64"]
        try:
            run = torch64.run(inputs)
        except (RuntimeError, TypeError, ValueError, IndexError) as error:
            raise ValueError(
                f"compare expects inputs that the torch model takes; it raised: {' '.join(str(error).split())[:300]} "
                f"Pass arrays as its forward takes them, or their shapes: (8, 3, 32, 32)."
            ) from error
        outputs = {name: array for (kind, name), array in run.items() if kind == "output"}
        self.shapes = {name: array.shape for name, array in outputs.items()}
        ranks = sorted({array.ndim for _, array in leaves(inputs) if array.ndim > 2})
        # Images are channels last more often than not, and sequences (B, T, C) in both.
        choices = {rank: [True, False] if rank > 3 else [False, True] for rank in ranks}
        if channels_last is not None:
            choices = {rank: [channels_last] for rank in ranks}
        fitting: list[Layout] = []
        misfits: list[tuple[Layout, str]] = []
        raised = None
        for chosen in product(*choices.values()):
            layout = Layout(frozenset(rank for rank, last in zip(ranks, chosen, strict=True) if last))
            try:
                flax64.outputs(inputs, layout, self.shapes)
                fitting.append(layout)
            except LayoutError as error:
                misfits.append((layout, str(error)))
            except Exception as error:  # whatever a model raises for inputs that it cannot take
                raised = raised or error
        if not fitting and not misfits:
            raise ValueError(
                f"compare expects inputs that the Flax model takes as the torch model does; it raised: "
                f"{' '.join(str(raised).split())[:300]} Pass inputs in torch's layout, and channels_last=False if Flax "
                f"has them in that layout too."
            ) from raised
        if len(fitting) > 1:
            fitting.sort(key=lambda layout: self._distance(flax64.run(inputs, layout, self.shapes), outputs))
        layout, misfit = (fitting[0], None) if fitting else misfits[0]
        self.pair = replace(self.pair, layout=layout)
        if flax64.masks is not None:
            flax64.masks.channels_last = bool(layout.ranks)
        return misfit

    def _distance(self, run: Run, outputs: Mapping[str, np.ndarray]) -> float:
        return max(error(run["output", name], array, array, "float64") for name, array in outputs.items())

    def run(self, seed: int) -> None:
        """Runs both models in both dtypes, on one draw of the inputs."""
        inputs = self.inputs.draw(seed)
        g = (lambda name, shape: self._cotangent(seed, name, shape)) if self.gradients else None
        flax_runs, torch_runs = self._runs(inputs, g, seed)
        reference = dict(torch_runs["float64"])
        if self.rules.oracle is not None:
            args, kwargs = inputs
            outputs = dict(leaves(self.rules.oracle(self.pair.torch["float64"].to_arrays(), *args, **kwargs), "output"))
            if list(outputs) != list(self.shapes):
                raise ValueError(
                    f"compare expects an oracle that returns arrays at {', '.join(self.shapes)}, as torch does; got "
                    f"{', '.join(outputs) or 'none'}. Return NumPy arrays: oracle=lambda weights, x: np.tanh(x)."
                )
            reference |= {("output", name): np.asarray(array) for name, array in outputs.items()}
        for key, expected in reference.items():
            if all(key in run for run in flax_runs.values()):
                a, b = ({dtype: run[key] for dtype, run in runs.items()} for runs in (torch_runs, flax_runs))
                self._add(key, a, b, expected)
            elif key[1] in self.names and not key[1].endswith("num_batches_tracked"):
                # As the gradient of a parameter that is no nnx.Param; and nnx counts no batches.
                self.lacking[key] = Verdict(key[1], f"no {key[0]} in Flax", float("inf"), 0.0)

    def _runs(self, inputs: Any, g: Any, seed: int) -> tuple[dict[str, Run], dict[str, Run]]:
        """Runs Flax first, since torch's masks of dropout are matched with its masks."""
        back = {there: here for here, there in self.names.items()}
        flax_runs = {}
        for dtype, model in self.pair.flax.items():
            run = model.run(inputs, self.pair.layout, self.shapes, g, seed)
            flax_runs[dtype] = {
                (kind, back.get(name, name) if kind in ("statistic", "parameter gradient") else name): array
                for (kind, name), array in run.items()
            }
        return flax_runs, {dtype: model.run(inputs, g, seed) for dtype, model in self.pair.torch.items()}

    def _cotangent(self, seed: int, name: str, shape: Sequence[int]) -> np.ndarray:
        return self.inputs.rounded(np.random.default_rng([seed, 1, *name.encode()]).standard_normal(shape))

    def _add(
        self, key: Key, of_torch: Mapping[str, np.ndarray], of_flax: Mapping[str, np.ndarray], expected: np.ndarray
    ) -> None:
        known, dtype = self.found.get(key), self.rules.dtype
        a, b = of_torch[dtype], of_flax[dtype]
        if expected.dtype.kind in "iub":
            unequal = float((of_torch["float64"] != of_flax["float64"]).sum())
            self.found[key] = _Tensor(None, _place(a, b, dtype), unequal + (known.worst if known else 0.0))
            return
        if expected.size and not np.isfinite(expected).any():
            self.lacking[key] = Verdict(key[1], "no finite number to compare", float("inf"), 0.0)
        errors = Errors.of(of_torch, of_flax, expected, self.rules.low)
        worse = errors if known is None or known.errors is None else errors.worse(known.errors)
        tensor = self.found[key] = _Tensor(worse)
        worst = error(a, b, expected, dtype)
        if known is not None and known.worst >= worst:
            tensor.place, tensor.worst = known.place, known.worst
        else:
            tensor.place, tensor.worst = _place(a, b, dtype), worst

    def tensors(self) -> list[Comparison]:
        """Returns the comparisons of all runs."""
        found = []
        for (kind, name), tensor in self.found.items():
            if tensor.errors is None:
                verdicts: tuple[Verdict, ...] = (Verdict(name, "number of elements that differ", tensor.worst, 0.0),)
            else:
                verdicts = self.rules.verdicts(name, tensor.errors)
            lacking = self.lacking.get((kind, name))
            found.append(Comparison(kind, name, verdicts if lacking is None else (*verdicts, lacking), *tensor.place))
        missing = {key: verdict for key, verdict in self.lacking.items() if key not in self.found}
        return found + [Comparison(kind, name, (verdict,)) for (kind, name), verdict in missing.items()]

    def special(self) -> Iterator[Comparison]:
        """Compares outputs in float64 where inputs are zero, infinite, NaN, denormal or large."""
        noise = max(
            (
                max(tensor.errors.noise_torch, tensor.errors.noise_flax)
                for (kind, _), tensor in self.found.items()
                if kind == "output" and tensor.errors is not None
            ),
            default=0.0,
        )
        limit = self.rules.limit * MEANING_LIMIT * max(NOISE_FLOOR, noise)
        for name, inputs in self.inputs.special():
            with np.errstate(all="ignore"):
                torch_run = self.pair.torch["float64"].run(inputs)
                # Op by op: under jit, XLA loses NaN where it fuses relu with a sum.
                flax_run = self.pair.flax["float64"].run(inputs, self.pair.layout, self.shapes, jit=False)
            for key, expected in torch_run.items():
                if key[0] == "output" and expected.dtype.kind == "f":
                    tensor = f"{key[1]} where inputs are {name}"
                    distance = error(flax_run[key], expected, expected, "float64")
                    verdict = Verdict(tensor, "float64 distance of torch and flax", distance, limit)
                    yield Comparison("special value", tensor, (verdict,), *_place(expected, flax_run[key], "float64"))

    def on_integers(self, arrays: Mapping[str, np.ndarray], notes: list[str], required: bool) -> Iterator[Comparison]:
        """Compares on integers in place of all weights and inputs, if sums are exact then.

        Any difference is one of meaning.
        """
        low, reason = self.rules.low, ""
        for largest in INTEGERS:
            rng = np.random.default_rng(largest)
            weights = {
                name: a if a.dtype.kind in "iub" else rng.integers(-largest, largest + 1, a.shape).astype(np.float64)
                for name, a in arrays.items()
            }
            inputs = self.inputs.dyadic(0, largest)

            def g(name: str, shape: Sequence[int], largest: int = largest) -> np.ndarray:
                return np.random.default_rng([largest, *name.encode()]).integers(-largest, largest + 1, shape) * 1.0

            try:
                self._certify(weights, inputs, g)
            except NotExactError as error:
                reason = str(error)
                if reason.endswith("rounds"):
                    break
                continue
            except ValueError as error:  # masks, or a forward that the absolute values do not fit
                reason = str(error)
                break
            own = {dtype: model.to_arrays() for dtype, model in self.pair.flax.items()}
            for torch_model in self.pair.torch.values():
                torch_model.set_arrays(weights)
            for flax_model in self.pair.flax.values():
                flax_model.set_arrays({there: weights[here] for here, there in self.names.items()})
            flax_runs, torch_runs = self._runs(inputs, g if self.gradients else None, 0)
            for torch_model in self.pair.torch.values():
                torch_model.set_arrays(arrays)
            for dtype, flax_model in self.pair.flax.items():
                flax_model.set_arrays(own[dtype])
            notes.append(f"exact on integers up to {largest}")
            for key, expected in torch_runs["float64"].items():
                runs = {"torch": torch_runs[low], "flax": flax_runs[low], "flax in float64": flax_runs["float64"]}
                if key in flax_runs[low]:
                    verdicts = tuple(
                        Verdict(
                            key[1], f"number of unequal elements of {who}", float((run[key] != expected).sum()), 0.0
                        )
                        for who, run in runs.items()
                    )
                    kind = "" if key[0] == "output" else f"{key[0]} "
                    place = _place(torch_runs[low][key], flax_runs[low][key], low)
                    yield Comparison("exact", f"{kind}{key[1]}", verdicts, *place)
            return
        if required:
            raise ValueError(
                f"compare expects a network whose sums can be exact with exact=True; got one where {reason}. Leave it "
                f"out: exact=None compares exactly where that is possible."
            )
        notes.append(f"no exact comparison: {reason}")

    def _certify(self, weights: Mapping[str, np.ndarray], inputs: Any, g: Any) -> None:
        model = self.pair.torch["float64"]
        before = model.to_arrays()
        model.set_arrays({name: np.abs(array) for name, array in weights.items()})
        args, kwargs = mapped(inputs, np.abs)
        try:
            with Certificate(self.rules.low):
                model.run((args, kwargs), (lambda name, shape: np.abs(g(name, shape))) if self.gradients else None)
        finally:
            model.set_arrays(before)


def _showing(inputs: Inputs, failed: Sequence[Comparison]) -> Any:
    """Returns inputs on which the two differ: the usual ones, unless only special values show it."""
    kinds = {each.kind for each in failed}
    if kinds != {"special value"}:
        return inputs.draw(0)
    return next(special for name, special in inputs.special() if failed[0].name.endswith(name))


def _place(a: np.ndarray, b: np.ndarray, dtype: str) -> tuple[tuple[int, ...], float, float, float]:
    """Finds where two arrays differ most, both values, and how many values of the dtype lie between."""
    if a.shape != b.shape or not a.size:
        return (), float("nan"), float("nan"), float("nan")
    index = farthest(a, b)
    pair = [np.asarray([array[index]]).astype(jnp.dtype(dtype)) for array in (a, b)]
    return index, float(a[index]), float(b[index]), float(ulps(*pair)[0])
