"""A torch and a Flax model as a pair: how their weights and the axes of their inputs go together."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import compress, product
from typing import Any, Literal

import numpy as np
from flax import nnx
from torch import nn

from parity_tests.kit.judge import Comparison, place
from parity_tests.kit.masks import Masks
from parity_tests.kit.runs import Cotangent, FlaxModel, LayoutError, TorchModel
from parity_tests.kit.trees import Arrays, Layout, Run, leaves
from parity_tests.standard import Verdict, error
from probly_common.weights.match import rename_all


@dataclass(frozen=True)
class Pair:
    """The two models in the lower dtype and in float64, and how they go together.

    Attributes:
        torch: by dtype.
        flax: by dtype.
        low: the lower dtype.
        train: whether they are in train mode.
        names: of the weights that both have: torch's, and Flax's twin's.
        torch_path: maps the name of a layer in Flax's twin to torch's.
        layout: of the inputs in Flax.
        shapes: of the outputs in torch.
    """

    torch: Mapping[str, TorchModel]
    flax: Mapping[str, FlaxModel]
    low: str
    train: bool
    names: Mapping[str, str]
    torch_path: Callable[[str], str]
    layout: Layout = field(default_factory=Layout)
    shapes: Mapping[str, Sequence[int]] = field(default_factory=dict)

    def run(self, inputs: Any, cotangent: Cotangent | None, seed: int) -> tuple[dict[str, Run], dict[str, Run]]:
        """Runs both in both dtypes: Flax first, since torch's masks of dropout are matched with its masks."""
        theirs = {d: model.run(inputs, self.layout, self.shapes, cotangent, seed) for d, model in self.flax.items()}
        return {d: model.run(inputs, cotangent, seed) for d, model in self.torch.items()}, theirs


def pair_models(
    torch_module: nn.Module,
    flax_module: nnx.Module,
    low: str,
    train: bool,
    jit: bool,
    weights: Literal["copy", "own", "random"],
    rename: Mapping[str, str] | None,
    flatten: Mapping[str, Sequence[int]] | None,
) -> tuple[Pair, list[Comparison]]:
    """Copies both models in both dtypes, with equal weights. Returns the weights that differ, too."""
    masks = Masks("compare") if train else None
    ours = TorchModel(torch_module, low, train, masks)
    if weights == "random":
        ours.set_arrays(random_weights(ours.to_arrays()))
    theirs = FlaxModel(flax_module, low, train, jit, flatten, masks)
    names, differences = match_weights(ours.to_arrays(), theirs.to_arrays(), rename, own=weights == "own")
    theirs.names = names
    if weights != "own":
        theirs.set_arrays(ours.to_arrays())
    of_torch = {low: ours, "float64": TorchModel(ours.module, "float64", train, masks)}
    of_flax = {low: theirs, "float64": FlaxModel(theirs.module, "float64", train, jit, flatten, masks, names)}
    if weights != "own":  # again, since a weight of Flax's can be a sum of torch's
        of_flax["float64"].set_arrays(of_torch["float64"].to_arrays())
    return Pair(of_torch, of_flax, low, train, names, torch_paths(names)), differences


def layouts(ranks: Iterable[int], channels_last: bool | None) -> list[Layout]:
    """Returns the layouts in which Flax may take arrays with these numbers of axes, the likeliest first."""
    ranks = sorted({rank for rank in ranks if rank > 2})
    # Images are channels last more often than not, and sequences (B, T, C) in both.
    both = ([True, False] if rank > 3 else [False, True] for rank in ranks)
    choices = both if channels_last is None else ([channels_last] for _ in ranks)
    return [Layout(frozenset(compress(ranks, last))) for last in product(*choices)]


def fitting_layouts(
    model: FlaxModel, inputs: Any, choices: Iterable[Layout], shapes: Mapping[str, Sequence[int]]
) -> tuple[list[Layout], list[tuple[Layout, Exception]]]:
    """Returns the layouts in which Flax's outputs have torch's shapes, and the others with what they raise."""
    fitting: list[Layout] = []
    failures: list[tuple[Layout, Exception]] = []
    for layout in choices:
        try:
            model.outputs(inputs, layout, shapes)
            fitting.append(layout)
        except Exception as error:  # whatever a model raises for inputs that it cannot take
            failures.append((layout, error))
    return fitting, failures


def laid_out(pair: Pair, inputs: Any, channels_last: bool | None) -> tuple[Pair, str | None]:
    """Chooses the layout that fits the shapes; of several, the one with the nearest outputs. Or says how none fits."""
    theirs = pair.flax["float64"]
    try:
        run = pair.torch["float64"].run(inputs)
    except (RuntimeError, TypeError, ValueError, IndexError) as raised:
        raise ValueError(
            f"compare expects inputs that the torch model takes; it raised: {' '.join(str(raised).split())[:300]} "
            f"Pass arrays as its forward takes them, or their shapes: (8, 3, 32, 32)."
        ) from raised
    outputs = {name: array for (kind, name), array in run.items() if kind == "output"}
    shapes = {name: array.shape for name, array in outputs.items()}
    choices = layouts((array.ndim for _, array in leaves(inputs)), channels_last)
    fitting, failures = fitting_layouts(theirs, inputs, choices, shapes)
    misfits = [(layout, str(error)) for layout, error in failures if isinstance(error, LayoutError)]
    if not fitting and not misfits:
        raise ValueError(
            f"compare expects inputs that the Flax model takes as the torch model does; it raised: "
            f"{' '.join(str(failures[0][1]).split())[:300]} Pass inputs in torch's layout, and channels_last=False if "
            f"Flax has them in that layout too."
        ) from failures[0][1]

    def distance(layout: Layout) -> float:
        run = theirs.run(inputs, layout, shapes)
        return max(error(run["output", name], array, array, "float64") for name, array in outputs.items())

    layout, misfit = (min(fitting, key=distance) if len(fitting) > 1 else fitting[0], None) if fitting else misfits[0]
    if theirs.masks is not None:
        theirs.masks.channels_last = bool(layout.ranks)
    return replace(pair, layout=layout, shapes=shapes), misfit


def match_weights(
    of_torch: Arrays, of_flax: Arrays, rename: Mapping[str, str] | None, own: bool
) -> tuple[dict[str, str], list[Comparison]]:
    """Matches torch's names of the weights that both have with those in Flax's twin.

    What differs is returned as comparisons.

    Args:
        of_torch: by torch's names.
        of_flax: by the names of Flax's twin.
        rename: from the former to the latter.
        own: whether their values are compared too.
    """
    names, differences = {}, []
    renamed = rename_all("compare", list(of_torch), rename)
    for here, array in of_torch.items():
        there = renamed[here]
        if there not in of_flax:
            if not here.endswith("num_batches_tracked"):
                differences.append(_differs(here, f"shape {array.shape} in torch, missing in Flax"))
        elif of_flax[there].shape != array.shape:
            differences.append(_differs(here, f"shape {array.shape} in torch, {of_flax[there].shape} in Flax"))
        else:
            names[here] = there
            if own:
                differences.append(_compared(here, array, of_flax[there]))
    taken = set(renamed.values())
    for there, array in of_flax.items():
        if there not in taken:
            differences.append(_differs(there, f"missing in torch, shape {array.shape} in Flax"))
    return names, differences


def _differs(name: str, how: str) -> Comparison:
    return Comparison("weight", name, (Verdict(name, how, math.inf, 0.0),))


def _compared(name: str, a: np.ndarray, b: np.ndarray) -> Comparison:
    a, b = a.astype(np.float64), b.astype(np.float64)
    unequal = (a != b) & ~(np.isnan(a) & np.isnan(b))
    verdict = Verdict(name, "number of elements that differ between torch and Flax", float(unequal.sum()), 0.0)
    where = (*place(a, b, "float64")[:3], math.nan) if unequal.any() else ()
    return Comparison("weight", name, (verdict,), *where)


def torch_paths(names: Mapping[str, str]) -> Callable[[str], str]:
    """Maps the name of a layer in Flax's twin to torch's name, by the names of their weights."""
    found: dict[str, set[str]] = {}
    for here, there in names.items():
        a, b = here.rpartition(".")[0], there.rpartition(".")[0]
        while a and b and a != b:
            found.setdefault(a, set()).add(b)
            (a, _, last), (b, _, other) = a.rpartition("."), b.rpartition(".")
            if last != other:
                break
    back = {other: here for here, others in found.items() if len(others) == 1 for other in others}
    return lambda path: back.get(path, path)


def random_weights(arrays: Arrays) -> dict[str, np.ndarray]:
    """Draws weights with none of them special.

    There is no bias of zeros, no scale of ones, no variance of 1. Activations keep their size.
    """
    rng = np.random.default_rng(0)
    drawn = {}
    for name, array in arrays.items():
        last = name.rpartition(".")[2]
        if array.dtype.kind in "iub":
            drawn[name] = array
            continue
        values = rng.standard_normal(array.shape)
        if "var" in last:
            values = 0.5 + np.abs(values)
        elif last in ("r", "s") or last.startswith(("r_", "s_")):
            values = 1 + values / 2
        elif "bias" in last or "mean" in last:
            values = values / 4
        elif array.ndim < 2:
            values = 1 + values / 4
        else:
            values = values * (1.5 / math.sqrt(math.prod(array.shape[1:])))
        drawn[name] = values.astype(array.dtype)
    return drawn


def fresh_weights(arrays: Arrays) -> list[str]:
    """Returns a note if weights have the values that layers start with, which hide faults."""
    constant = [
        name
        for name, array in arrays.items()
        if array.dtype.kind not in "iub"
        and array.size > 1
        and (array == array.flat[0]).all()
        and array.flat[0] in (0, 1)
    ]
    if not constant:
        return []
    return [
        f"{len(constant)} weights are all 0 or all 1, such as {constant[0]}, which hides faults: "
        f'compare(..., weights="random") draws others'
    ]
