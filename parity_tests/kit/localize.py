"""Where two models part: the first layer, in forward order, whose outputs differ while its inputs agree."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np
from flax import nnx
from torch import nn

import probly_flax
import probly_torch
from parity_tests.kit.calls import Call, flax_calls, torch_calls
from parity_tests.kit.judge import Comparison, Divergence, LayerComparison
from parity_tests.kit.pair import Pair
from parity_tests.kit.runs import Cotangent, FlaxModel, TorchModel
from parity_tests.kit.suspects import (
    Gap,
    LayerPair,
    cause_between,
    cause_in_layer,
    cause_in_precision,
    cause_in_statistics,
)
from parity_tests.kit.trees import is_floating, leaves, mapped, numpy_of
from parity_tests.standard import UNIT_ROUNDOFF, Errors, Verdict, error, meaning_limit
from probly_flax.weights import Inventory


@dataclass(frozen=True)
class Match:
    """A call in both models and dtypes."""

    torch: Mapping[str, Call]
    flax: Mapping[str, Call]
    inputs: list[list[Verdict]]
    outputs: list[list[Verdict]] | None  # None if they could not be put side by side

    @property
    def path(self) -> str:
        return self.torch["float64"].path

    @property
    def given(self) -> list[tuple[Any, Any]]:
        """The inputs in float64, torch's and Flax's."""
        return list(zip(self.torch["float64"].inputs, self.flax["float64"].inputs, strict=False))

    @property
    def results(self) -> list[tuple[Any, Any]]:
        """The outputs in float64, torch's and Flax's."""
        return list(zip(self.torch["float64"].results, self.flax["float64"].results, strict=False))


class Calls:
    """All calls of both models on the same inputs, matched by layer."""

    def __init__(self, pair: Pair, inputs: Any) -> None:
        self.pair = pair
        paths = {dtype: flax_parts(model.module) for dtype, model in pair.flax.items()}
        self.parts: dict[str, dict[str, tuple[str, Any]]] = {dtype: {} for dtype in paths}  # by torch's names
        for dtype, parts in paths.items():
            for path, part in parts.items():
                self.parts[dtype].setdefault(pair.torch_path(path), (path, part))
        of_flax = {d: flax_calls(m, inputs, pair.layout, pair.torch_path) for d, m in pair.flax.items()}
        of_torch = {d: torch_calls(m, inputs, seed=0) for d, m in pair.torch.items()}
        both = [
            {d: {(call.path, call.index): call for call in calls} for d, calls in each.items()}
            for each in (of_torch, of_flax)
        ]
        shared = [key for key in both[0]["float64"] if all(key in calls for each in both for calls in each.values())]
        self.matches = [self._match(*(_each(each, key) for each in both)) for key in shared]

    def _match(self, of_torch: Mapping[str, Call], of_flax: Mapping[str, Call]) -> Match:
        t, f = ({dtype: call.inputs for dtype, call in calls.items()} for calls in (of_torch, of_flax))
        inputs, free = [], list(range(len(f["float64"])))
        for i, tensor in enumerate(t["float64"]):
            j = next((j for j in free if self._fits(tensor, f["float64"][j])), None)
            if j is not None:
                free.remove(j)
                inputs.append(self._verdicts(_each(t, i), _each(f, j)))
        t, f = ({dtype: call.results for dtype, call in calls.items()} for calls in (of_torch, of_flax))
        pairs = list(zip(t["float64"], f["float64"], strict=False))
        outputs = None
        if pairs and all(self._fits(a, b) for a, b in pairs):
            outputs = [self._verdicts(_each(t, i), _each(f, i)) for i in range(len(pairs))]
        return Match(of_torch, of_flax, inputs, outputs)

    def _fits(self, tensor: Any, array: Any) -> bool:
        if is_floating(tensor) != is_floating(array):
            return False
        return self.pair.layout.to_torch(np.broadcast_to(np.int8(0), array.shape), tensor.shape) is not None

    def _verdicts(self, tensors: Mapping[str, Any], arrays: Mapping[str, Any]) -> list[Verdict]:
        t = {dtype: numpy_of(tensor) for dtype, tensor in tensors.items()}
        f = {dtype: self._nearest(numpy_of(array), t["float64"]) for dtype, array in arrays.items()}
        if not is_floating(tensors["float64"]):
            unequal = float((t["float64"] != f["float64"]).sum())
            return [Verdict("values", "number of elements that differ between torch and Flax", unequal, 0.0)]
        return Errors.of(t, f, t["float64"], self.pair.low).verdicts("values", self.pair.low)[:3]

    def _nearest(self, array: np.ndarray, reference: np.ndarray) -> np.ndarray:
        """Returns the array in torch's layout.

        It is the usual one, unless the other one fits better, as after a transpose.
        """
        found = self.pair.layout.to_torch(array, reference.shape)
        assert found is not None
        if array.shape == reference.shape and not np.allclose(found, reference, equal_nan=True):
            return array if np.allclose(array, reference, equal_nan=True) else found
        return found

    def layers(self) -> tuple[LayerComparison, ...]:
        """Compares layers in the order in which they end: the whole model is the last."""
        modules = dict(self.pair.torch["float64"].module.named_modules())
        found = [match for match in self.matches if match.outputs]
        return tuple(
            LayerComparison(
                match.path,
                match.torch["float64"].index,
                type(modules[match.path]).__name__,
                _name(self.parts["float64"][match.path][1]),
                _agree(match.inputs),
                tuple(verdict for verdicts in match.outputs or () for verdict in verdicts),
            )
            for match in found
        )

    def first_divergence(self, failed: Sequence[Comparison]) -> Divergence | None:
        """Finds where the tensors first differ: in what they mean, in precision, in statistics, in gradients."""
        kinds = {each.kind for each in failed}
        found = self.first() if kinds else None
        if found is None and kinds & {"output", "input gradient", "parameter gradient"}:
            found = self.first(precision=True)
        if found is None and "statistic" in kinds:
            found = self.first_of_statistics([each.name for each in failed if each.kind == "statistic"])
        if found is None and kinds & {"input gradient", "parameter gradient"}:
            found = self.first_of_gradients()
        return found

    def first(self, precision: bool = False) -> Divergence | None:
        """Finds the first by the results in float64, or by the precision of the lower dtype."""
        rules = slice(0, 2) if precision else slice(2, 3)

        def holds(verdicts: Sequence[Verdict]) -> bool:
            return all(verdict.holds for verdict in (verdicts[rules] if len(verdicts) > 1 else verdicts))

        def inputs_agree(match: Match) -> bool:
            return bool(match.inputs) and all(map(holds, match.inputs))

        def differs(match: Match) -> bool:
            return match.outputs is None or not all(map(holds, match.outputs))

        culprit = next((m for m in self.matches if inputs_agree(m) and differs(m)), None)
        if culprit is None:
            return None
        inner = [m for m in self.matches if _inside(m, culprit)]
        if inner:
            return self._between(culprit, inner, inputs_agree)
        return self._of_layer(culprit, precision)

    def _of_layer(self, match: Match, precision: bool) -> Divergence:
        dtype = self.pair.low if precision else "float64"
        module, flax = self._layer(match, dtype)
        if isinstance(module, probly_torch.Ensemble) and isinstance(flax, probly_flax.Ensemble):
            inner = self._in_member(match, precision)
            if inner is not None:
                return inner
        divergence = Divergence(match.path, type(module).__name__, _name(flax), "precision" if precision else "outputs")
        if isinstance(flax, nnx.Module):
            pair = self.layer_pair(match, dtype, module, flax)
            cause = _cause(cause_in_precision if precision else cause_in_layer, pair)
        else:
            cause = self._of_function(match, module)
        return replace(divergence, cause=cause)

    def _in_member(self, match: Match, precision: bool) -> Divergence | None:
        """Finds the first difference in the first member that has one, as in `model[2].fc1`. Members have one batch."""
        call = match.torch["float64"]
        if call.kwargs.get("in_axes") is not None:
            return None
        inputs = mapped((call.args, call.kwargs), numpy_of)
        flax_path = self.parts["float64"][match.path][0]
        before, here = (f"{path}." if path else "" for path in (flax_path, match.path))
        pairs: dict[str, tuple[Any, Any]] = {dtype: self._layer(match, dtype) for dtype in match.torch}
        for i in range(len(pairs["float64"][0])):
            torch_models = {d: TorchModel(pair[0][i], d, self.pair.train) for d, pair in pairs.items()}
            with jax.enable_x64(True):
                flax_models = {d: FlaxModel(pair[1][i], d, self.pair.train) for d, pair in pairs.items()}
            of_member = replace(
                self.pair,
                torch=torch_models,
                flax=flax_models,
                torch_path=lambda path: self.pair.torch_path(before + path).removeprefix(here),
            )
            found = Calls(of_member, inputs).first(precision)
            if found is not None:
                return replace(found, path=f"{match.path}[{i}]" + (f".{found.path}" if found.path else ""))
        return None

    def layer_pair(self, match: Match, dtype: str, module: nn.Module, flax: nnx.Module) -> LayerPair:
        """Makes the pair that the suspects are tested on."""
        t, f = match.torch[dtype], match.flax[dtype]
        both = (t.args, t.kwargs, t.outputs, f.args, f.kwargs, f.outputs)
        copies = copy.deepcopy(module), nnx.clone(flax)
        return LayerPair(match.path, *copies, *both, bool(self.pair.layout.ranks), self.pair.train)

    def _of_function(self, match: Match, module: nn.Module) -> str | None:
        before = [("its input", *pair) for pair in match.given[:1]]
        model, last = self.pair.flax["float64"].module, bool(self.pair.layout.ranks)
        return _cause(cause_between, Gap(match.path, module, model, None, before, *match.results[0], None, last))

    def _between(self, outer: Match, inner: list[Match], inputs_agree: Callable[[Match], bool]) -> Divergence:
        inner = sorted(inner, key=lambda match: match.torch["float64"].start)
        until = next((match for match in inner if match.inputs and not inputs_agree(match)), None)
        if until is None:
            ended, pairs = inner, outer.results
        else:
            start = until.torch["float64"].start
            ended = [m for m in inner if m.torch["float64"].start < start and not _inside(until, m)]
            pairs = until.given
        ended = sorted(ended, key=lambda match: -match.torch["float64"].end)
        before = [(match.path, *pair) for match in ended for pair in match.results]
        agreeing = [match for match in ended if inputs_agree(match)]  # such as what a residual connection adds
        before += [(f"the input of {match.path}", *pair) for match in agreeing for pair in match.given]
        before += [("its input", *pair) for pair in outer.given]
        differing = next((pair for pair in pairs if not self._equal(*pair)), pairs[0] if pairs else None)
        module, flax = self._layer(outer, "float64")
        after, next_path = ended[0].path if ended else None, until.path if until else None
        divergence = Divergence(outer.path, type(module).__name__, _name(flax), after=after or "its input")
        if differing is None:
            return divergence
        gap = Gap(outer.path, module, flax, after, before, *differing, next_path, bool(self.pair.layout.ranks))
        return replace(divergence, cause=_cause(cause_between, gap))

    def _equal(self, tensor: Any, array: Any) -> bool:
        if not self._fits(tensor, array):
            return False
        verdicts = self._verdicts({"float64": tensor, self.pair.low: tensor}, {"float64": array, self.pair.low: array})
        return verdicts[-1].holds

    def first_of_statistics(self, names: Sequence[str]) -> Divergence | None:
        """Finds the layer that owns the first of these statistics, in forward order."""
        owners = {name.rpartition(".")[0] for name in names}
        match = next((match for match in self.matches if match.path in owners), None)
        if match is None:
            return None
        module, flax = self._layer(match, "float64")
        divergence = Divergence(match.path, type(module).__name__, _name(flax), "statistics")
        if not isinstance(flax, nnx.Module):
            return divergence
        return replace(divergence, cause=_cause(cause_in_statistics, self.layer_pair(match, "float64", module, flax)))

    def first_of_gradients(self) -> Divergence | None:
        """Finds the first layer, inner ones first, whose gradients differ.

        They differ on equal inputs and gradients of its outputs.
        """
        for match in self.matches:
            gradients = {dtype: self._gradients(match, dtype) for dtype in match.torch}
            for name, (expected, flax_value) in gradients["float64"].items():
                t, f = ({dtype: pairs[name][side] for dtype, pairs in gradients.items()} for side in (0, 1))
                if not Errors.of(t, f, expected, self.pair.low).verdicts(name, self.pair.low)[2].holds:
                    module, flax = self._layer(match, "float64")
                    cause = _cause_in_gradients(module, expected, flax_value)
                    return Divergence(match.path, type(module).__name__, _name(flax), "gradients", cause=cause)
        return None

    def _gradients(self, match: Match, dtype: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Computes the gradients of the layer's first output alone, by floating inputs and parameters.

        There are none where they cannot be told apart.
        """
        t, f, layout, train = match.torch[dtype], match.flax[dtype], self.pair.layout, self.pair.train
        if not (t.results and f.results and is_floating(t.results[0]) and self._fits(t.results[0], f.results[0])):
            return {}
        first = np.random.default_rng(0).standard_normal(tuple(t.results[0].shape)).astype(np.float32)
        module, layer = self._layer(match, dtype)
        layer = layer if isinstance(layer, nnx.Module) else nnx.Sequential(layer)
        given = mapped((f.args, f.kwargs), lambda array: layout.to_torch_input(numpy_of(array)))
        shapes = {name: array.shape for name, array in leaves(f.outputs, "output")}
        shapes |= dict.fromkeys(list(shapes)[:1], first.shape)
        ours = TorchModel(module, dtype, train).run(mapped((t.args, t.kwargs), numpy_of), _of_first(t, first))
        theirs = FlaxModel(layer, dtype, train, jit=False).run(given, layout, shapes, _of_first(f, first))
        a, b = ([array for (kind, _), array in run.items() if kind == "input gradient"] for run in (ours, theirs))
        if len(a) != len(b):
            return {}
        laid = [(x, layout.to_torch(layout.to_flax(y), x.shape)) for x, y in zip(a, b, strict=True)]
        inputs = {str(i): (x, y) for i, (x, y) in enumerate(laid) if y is not None}
        parameters = [key for key in ours if key[0] == "parameter gradient"]
        untrained = {key: 0 * ours[key] for key in parameters if ("statistic", key[1]) in theirs}  # no nnx.Param
        theirs = untrained | theirs
        return inputs | {key[1]: (ours[key], theirs[key]) for key in parameters if key in theirs}

    def _layer(self, match: Match, dtype: str) -> tuple[nn.Module, Any]:
        """Returns the layer of both models."""
        return self.pair.torch[dtype].module.get_submodule(match.path), self.parts[dtype][match.path][1]


def _of_first(call: Call, gradient: np.ndarray) -> Cotangent:
    """Gives the gradient to the first output, and none to the others."""
    first = next(leaves(call.outputs, "output"))[0]
    return lambda name, shape: gradient if name == first else np.zeros(shape)


def _cause_in_gradients(module: nn.Module, of_torch: np.ndarray, of_flax: np.ndarray) -> str | None:
    """Explains a difference by rows of padding, which learn nothing in torch."""
    padding = getattr(module, "padding_idx", None)
    if not isinstance(padding, int):
        return None
    without = np.array(of_flax)
    without[..., padding, :] = 0
    off = error(without, of_torch, of_torch, "float64")
    if off > meaning_limit():
        return None
    return (
        f"torch padding_idx is {padding}, and the gradient of that row is 0; nnx has no such row; with its gradient "
        f"set to 0 the gradients agree to {off * UNIT_ROUNDOFF['float64']:.0e}"
    )


def _each(of_dtypes: Mapping[str, Any], key: Any) -> dict[str, Any]:
    return {dtype: own[key] for dtype, own in of_dtypes.items()}


def flax_parts(model: nnx.Module) -> dict[str, Any]:
    """Returns what is at each path by the twin's names. Of several, it is the outermost."""
    parts: dict[str, Any] = {}
    for path, part in Inventory(model).parts:
        parts.setdefault(path, part)
    return parts


def _inside(match: Match, outer: Match) -> bool:
    a, b = match.torch["float64"], outer.torch["float64"]
    return a is not b and a.start > b.start and a.end < b.end


def _agree(inputs: Sequence[list[Verdict]]) -> bool:
    return bool(inputs) and all(verdict.holds for verdicts in inputs for verdict in verdicts[-1:])


def _name(part: Any) -> str:
    if isinstance(part, nnx.Module):
        return type(part).__name__
    return str(getattr(part, "__name__", type(part).__name__))


def _cause(find: Callable[[Any], str | None], where: LayerPair | Gap) -> str | None:
    """Finds the cause, or says that looking for it raised.

    What was measured is worth more than its explanation, so an error there must not lose it.
    """
    try:
        return find(where)
    except Exception as error:
        return f"outputs differ while inputs agree; looking for the cause raised {type(error).__name__}: {error}"
