"""Suspects for statistics that are updated in another way, though the outputs agree."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from typing import Any

import numpy as np
import torch
from flax import nnx

from parity_tests.kit.suspects.trial import LayerPair, explains, sentence
from parity_tests.kit.trees import is_floating, leaves, mapped
from parity_tests.standard import error
from probly_flax import to_arrays as flax_arrays
from probly_torch import to_arrays as torch_arrays

Arrays = dict[str, np.ndarray]
Edit = tuple[
    str, str, Callable[[Any], Any], Callable[[Arrays], Arrays]
]  # what differs, the remedy, of layer, of arrays


def cause(pair: LayerPair) -> str | None:
    """Finds the suspect that explains the updates, or two of them."""
    names = [name for name, value in pair.torch.named_buffers() if value.is_floating_point()]
    before = flax_arrays(pair.flax)
    module = copy.deepcopy(pair.torch)
    args, kwargs = mapped((pair.torch_args, pair.torch_kwargs), lambda v: v.clone())
    with torch.no_grad():
        module(*args, **kwargs)
    expected = {name: value for name, value in torch_arrays(module).items() if name in names}

    def left(*edits: Edit) -> float:
        layer = nnx.clone(pair.flax)
        try:
            for _, _, of_layer, _ in edits:
                of_layer(layer)
            layer(*pair.flax_args, **pair.flax_kwargs)
            got = flax_arrays(layer)
            for _, _, _, of_arrays in edits:
                got = of_arrays(_Updated(got, before, layer))
        except Exception:  # of the user's layer: it is not this suspect
            return float("inf")
        return max((error(got[n], v, v, "float64") for n, v in expected.items() if n in got), default=float("inf"))

    original = left()
    weights, variances = list(_weights(pair)), list(_variances(pair, module))
    for edits in [*((each,) for each in (*weights, *variances)), *product(weights, variances)]:
        remaining = left(*edits)
        if explains(remaining, original):
            said, remedies = " and ".join(each[0] for each in edits), " and ".join(each[1] for each in edits)
            return sentence(said, remedies, remaining, "the statistics")
    return None


class _Updated(dict[str, np.ndarray]):
    """Statistics after an update by a layer, and before it."""

    def __init__(self, after: Arrays, before: Arrays, layer: Any) -> None:
        super().__init__(after)
        self.before, self.layer = before, layer


def _weights(pair: LayerPair) -> Iterator[Edit]:
    """Yields edits of whether, and how much, new statistics count."""

    def keep(arrays: Arrays) -> Arrays:
        return arrays

    own, momentum = getattr(pair.flax, "momentum", None), getattr(pair.torch, "momentum", None)
    if getattr(pair.flax, "use_running_average", False):
        said = "nnx leaves its statistics as they are (use_running_average=True), torch updates them"
        yield said, "use_running_average=False", lambda layer: setattr(layer, "use_running_average", False), keep
    if own is None:
        return
    if momentum is None:  # torch averages over all batches
        momentum = 1 / (int(getattr(pair.torch, "num_batches_tracked", torch.tensor(0))) + 1)
        said = f"nnx momentum is {own!r}, torch momentum is None, the average over all batches"
    else:
        said = f"nnx momentum is {own!r}, the weight of the old, torch momentum is {momentum!r}, that of the new"
    wanted = float(f"{1 - momentum:.12g}")  # 0.1 is 1 - 0.9 in decimals only
    if own != wanted:
        yield said, f"momentum={wanted!r}", lambda layer: setattr(layer, "momentum", wanted), keep


def _variances(pair: LayerPair, module: Any) -> Iterator[Edit]:
    """Yields unbiased and biased variances, n/(n-1) apart."""
    x = next((leaf for _, leaf in leaves((pair.torch_args, pair.torch_kwargs)) if is_floating(leaf)), None)
    channels = getattr(module, "num_features", None)
    if x is None or not channels:
        return
    n = x.numel() // channels // getattr(module, "num_members", 1)
    if n < 2:
        return
    kinds = "unbiased", "biased"
    for ours, theirs, factor in ((*kinds, n / (n - 1)), (*kinds[::-1], (n - 1) / n)):
        said = f"torch's running variance is the {ours} one, nnx's the {theirs} one, of n = {n}"
        remedy = f"the batch's variance times {'n/(n-1)' if factor > 1 else '(n-1)/n'}"
        yield said, remedy, lambda layer: None, partial(_rescaled, factor=factor)


def _rescaled(arrays: Any, factor: float) -> Arrays:
    old = arrays.layer.momentum
    variances = {name for name in arrays if name.endswith("running_var")}
    return {
        name: old * arrays.before[name] + factor * (value - old * arrays.before[name]) if name in variances else value
        for name, value in arrays.items()
    }
