"""How the weights of two models go together, and weights that show more than fresh ones do."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np

from parity_tests.kit.report import Comparison
from parity_tests.standard import Verdict, farthest
from probly_common.weights.match import rename_all

Arrays = Mapping[str, np.ndarray]


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
    if not unequal.any():
        return Comparison("weight", name, (verdict,))
    index = farthest(a, b)
    return Comparison("weight", name, (verdict,), index, float(a[index]), float(b[index]), math.nan)


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
