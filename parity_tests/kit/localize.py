"""Where two models part: the first layer, in forward order, whose outputs differ while its inputs agree."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np
import torch
from flax import nnx
from torch import nn

import probly_flax
import probly_torch
from parity_tests.kit.calls import Call, flax_calls, torch_calls
from parity_tests.kit.report import Comparison, Divergence, LayerComparison
from parity_tests.kit.runs import FlaxModel, Layout, TorchModel
from parity_tests.kit.suspects import (
    Gap,
    LayerPair,
    cause_between,
    cause_in_layer,
    cause_in_precision,
    cause_in_statistics,
)
from parity_tests.kit.trees import is_floating, jax_of, leaves, mapped, numpy_of
from parity_tests.standard import MEANING_LIMIT, NOISE_FLOOR, UNIT_ROUNDOFF, Errors, Verdict, error
from probly_flax.weights import Inventory


@dataclass(frozen=True)
class Pair:
    """The two models in the lower dtype and in float64, and how the names of their layers go together."""

    torch: Mapping[str, TorchModel]
    flax: Mapping[str, FlaxModel]
    layout: Layout
    low: str
    torch_path: Callable[[str], str]
    train: bool


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


class Calls:
    """All calls of both models on the same inputs, matched by layer."""

    def __init__(self, pair: Pair, inputs: Any) -> None:
        self.pair = pair
        paths = {dtype: flax_parts(model.module) for dtype, model in pair.flax.items()}
        self.parts: dict[str, dict[str, tuple[str, Any]]] = {dtype: {} for dtype in paths}  # by torch's names
        for dtype, parts in paths.items():
            for path, part in parts.items():
                self.parts[dtype].setdefault(pair.torch_path(path), (path, part))
        of_flax = {
            dtype: {(call.path, call.index): call for call in flax_calls(model, inputs, pair.layout, pair.torch_path)}
            for dtype, model in pair.flax.items()
        }
        of_torch = {dtype: torch_calls(model, inputs, seed=0) for dtype, model in pair.torch.items()}
        of_low = {(call.path, call.index): call for call in of_torch[pair.low]}
        self.matches = []
        for call in of_torch["float64"]:
            key = call.path, call.index
            if key in of_low and all(key in calls for calls in of_flax.values()):
                both = {"float64": call, pair.low: of_low[key]}
                self.matches.append(self._match(both, {dtype: calls[key] for dtype, calls in of_flax.items()}))

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
        t, f = match.torch["float64"], match.flax["float64"]
        before = list(zip(["its input"], t.inputs, f.inputs, strict=False))
        model = self.pair.flax["float64"].module
        last = bool(self.pair.layout.ranks)
        gap = Gap(match.path, module, model, None, before, t.results[0], f.results[0], None, last)
        return _cause(cause_between, gap)

    def _between(self, outer: Match, inner: list[Match], inputs_agree: Callable[[Match], bool]) -> Divergence:
        t, f = outer.torch["float64"], outer.flax["float64"]
        inner = sorted(inner, key=lambda match: match.torch["float64"].start)
        until = next((match for match in inner if match.inputs and not inputs_agree(match)), None)
        if until is None:
            ended = inner
            pairs = [(a, b) for a, b in zip(t.results, f.results, strict=False)]
        else:
            start = until.torch["float64"].start
            ended = [m for m in inner if m.torch["float64"].start < start and not _inside(until, m)]
            u = until.torch["float64"], until.flax["float64"]
            pairs = [(a, b) for a, b in zip(u[0].inputs, u[1].inputs, strict=False)]
        ended = sorted(ended, key=lambda match: -match.torch["float64"].end)
        before = [
            (match.path, a, b)
            for match in ended
            for a, b in zip(match.torch["float64"].results, match.flax["float64"].results, strict=False)
        ]
        before += [  # such as what a residual connection adds
            (f"the input of {match.path}", a, b)
            for match in ended
            for a, b in zip(match.torch["float64"].inputs, match.flax["float64"].inputs, strict=False)
            if inputs_agree(match)
        ]
        before += [("its input", a, b) for a, b in zip(t.inputs, f.inputs, strict=False)]
        differing = next((pair for pair in pairs if not self._equal(*pair)), pairs[0] if pairs else None)
        module, flax = self._layer(outer, "float64")
        after = ended[0].path if ended else None
        divergence = Divergence(outer.path, type(module).__name__, _name(flax), after=after or "its input")
        if differing is None:
            return divergence
        torch_value, flax_value = differing
        gap = Gap(
            outer.path, module, flax, after, before, torch_value, flax_value,
            until.path if until else None, bool(self.pair.layout.ranks),
        )  # fmt: skip
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
            of_torch, of_flax = {}, {}
            for dtype in match.torch:
                of_torch[dtype], of_flax[dtype] = self._gradients(match, dtype)
            for name, expected in of_torch["float64"].items():
                t, f = ({dtype: run[name] for dtype, run in runs.items()} for runs in (of_torch, of_flax))
                if not Errors.of(t, f, expected, self.pair.low).verdicts(name, self.pair.low)[2].holds:
                    module, flax = self._layer(match, "float64")
                    cause = _cause_in_gradients(module, expected, f["float64"])
                    return Divergence(match.path, type(module).__name__, _name(flax), "gradients", cause=cause)
        return None

    def _gradients(self, match: Match, dtype: str) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        """Computes the gradients of the layer alone, by floating inputs and parameters.

        They are empty where they cannot be told apart.
        """
        t, f = match.torch[dtype], match.flax[dtype]
        if not (t.results and f.results and is_floating(t.results[0]) and self._fits(t.results[0], f.results[0])):
            return {}, {}
        g = np.random.default_rng(0).standard_normal(tuple(t.results[0].shape)).astype(np.float32).astype(np.float64)
        args, kwargs = mapped((t.args, t.kwargs), lambda tensor: tensor.clone())
        sources = {str(i): v for i, (_, v) in enumerate(leaves((args, kwargs))) if v.is_floating_point()}
        floating = {str(i): v for i, v in enumerate(f.inputs) if is_floating(v)}
        module, flax = self._layer(match, dtype)
        module = copy.deepcopy(module)
        into = {**{name: v.requires_grad_() for name, v in sources.items()}, **dict(module.named_parameters())}
        if not into or len(sources) != len(floating):
            return {}, {}
        with torch.enable_grad():
            output = next(leaves(module(*mapped(args, torch.clone), **mapped(kwargs, torch.clone))))[1]
            grads = torch.autograd.grad(
                output, list(into.values()), torch.tensor(g, dtype=output.dtype), allow_unused=True
            )
        of_torch = {
            name: numpy_of(torch.zeros_like(v) if grad is None else grad)
            for (name, v), grad in zip(into.items(), grads, strict=True)
        }
        given = dict(zip(sources, floating.values(), strict=True))
        of_flax = self._flax_gradients(f, flax, list(floating), given, g)
        shared = [name for name in of_torch if name in of_flax]
        laid = {
            name: self.pair.layout.to_torch(of_flax[name], of_torch[name].shape) if name in sources else of_flax[name]
            for name in shared
        }
        fitting = {name: array for name, array in laid.items() if array is not None}
        return {name: of_torch[name] for name in fitting}, fitting

    def _layer(self, match: Match, dtype: str) -> tuple[nn.Module, Any]:
        """Returns the layer of both models."""
        return self.pair.torch[dtype].module.get_submodule(match.path), self.parts[dtype][match.path][1]

    def _flax_gradients(
        self, call: Call, flax: Any, places: list[str], given: Mapping[str, Any], g: np.ndarray
    ) -> dict[str, np.ndarray]:
        layer = nnx.clone(flax) if isinstance(flax, nnx.Module) else nnx.Sequential(flax)
        graph, *states = nnx.split(layer, nnx.Param, ...)
        parameters, rest = states

        def run(parameters: Any, given: Mapping[str, Any]) -> Any:
            values = dict(zip(places, given.values(), strict=True))
            arrays = iter([values.get(str(i), array) for i, array in enumerate(call.inputs)])
            args, kwargs = mapped((call.args, call.kwargs), lambda _: next(arrays))
            return next(leaves(nnx.merge(graph, parameters, rest, copy=True)(*args, **kwargs)))[1]

        with jax.enable_x64(True):
            output, pull = jax.vjp(run, parameters, given)
            of_parameters, of_inputs = pull(jax_of(self.pair.layout.to_flax_output(g, output.shape), output.dtype))
            nnx.update(layer, of_parameters)
            weights = Inventory(layer).weights("compare")
            summands = {n: weight.also for n, weight in weights.items() if weight.variables}
            arrays = probly_flax.to_arrays(layer)
            named = {each: arrays[name] for name, also in summands.items() for each in (name, *also)}
            return {name: numpy_of(array) for name, array in (named | of_inputs).items()}


def _cause_in_gradients(module: nn.Module, of_torch: np.ndarray, of_flax: np.ndarray) -> str | None:
    """Explains a difference by rows of padding, which learn nothing in torch."""
    padding = getattr(module, "padding_idx", None)
    if not isinstance(padding, int):
        return None
    without = np.array(of_flax)
    without[..., padding, :] = 0
    off = error(without, of_torch, of_torch, "float64")
    if off > MEANING_LIMIT * NOISE_FLOOR:
        return None
    return (
        f"torch padding_idx is {padding}, and the gradient of that row is 0; nnx has no such row; with its gradient "
        f"set to 0 the gradients agree to {off * UNIT_ROUNDOFF['float64']:.0e}"
    )


def _each(arrays: Mapping[str, Sequence[Any]], i: int) -> dict[str, Any]:
    return {dtype: own[i] for dtype, own in arrays.items()}


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
