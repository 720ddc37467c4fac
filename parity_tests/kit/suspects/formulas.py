"""Suspects in the equation of a layer, and in that by which it updates its statistics.

Each side of the former is recognised among its variants, computed with torch's weights.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from math import prod
from typing import Any

import torch
from flax import nnx
from torch import Tensor, nn

from parity_tests.kit.suspects.trial import LayerPair, explains, sentence
from parity_tests.kit.trees import Arrays, image_layout, is_floating, leaves, mapped, numpy_of
from parity_tests.standard import error, meaning_limit
from probly_flax import to_arrays as flax_arrays
from probly_torch import to_arrays as torch_arrays

Variant = tuple[str, Tensor]
# What differs, the remedy, and the edits: of a layer, and of its statistics after, given those before and the layer.
Edit = tuple[str, str, Callable[[Any], Any], Callable[[Arrays, Arrays, Any], Arrays]]


def cause(pair: LayerPair, ours: Tensor, theirs: Any) -> str | None:
    """Tells which variant torch computes, and which Flax."""
    values = image_layout(pair.channels_last).to_torch(numpy_of(theirs), ours.shape)
    if values is None:
        return None
    found: dict[str, tuple[str, float]] = {}
    with torch.no_grad():
        for words, result in _variants(pair):
            for side, value in (("torch", ours), ("flax", values)):
                reference = numpy_of(value)
                off = error(numpy_of(result), reference, reference, "float64")
                if side not in found and off <= meaning_limit():
                    found[side] = words, off
    if len(found) < 2 or found["torch"][0] == found["flax"][0]:
        return None
    (words, off), (other, also) = found["torch"], found["flax"]
    return sentence(f"torch computes {words}, nnx {other}", words, max(off, also))


def _variants(pair: LayerPair) -> Iterator[Variant]:
    inputs = [leaf for _, leaf in leaves((pair.torch_args, pair.torch_kwargs)) if is_floating(leaf)]
    if inputs and isinstance(pair.torch, nn.GRUCell | nn.GRU):
        yield from _recurrent(pair.torch, inputs, _gru, product((False, True), repeat=3))
    elif inputs and isinstance(pair.torch, nn.LSTMCell | nn.LSTM):
        yield from _recurrent(pair.torch, inputs, _lstm, product((False, True), repeat=3))
    elif inputs and (eps := _epsilons(pair)):
        yield from _norms(pair.torch, inputs[0], eps)


def _epsilons(pair: LayerPair) -> list[float]:
    names = ("eps", "epsilon", "variance_epsilon")
    found = (getattr(layer, name, None) for layer in (pair.torch, pair.flax) for name in names)
    return list(dict.fromkeys(value for value in found if isinstance(value, float)))


def _norms(layer: nn.Module, x: Tensor, epsilons: list[float]) -> Iterator[Variant]:
    """Yields norms over the last axes, or all axes except the channels. RMSNorm has no mean."""
    channels = (0, *range(2, x.ndim))
    own = len(getattr(layer, "normalized_shape", (1,)))
    weight, bias = getattr(layer, "weight", None), getattr(layer, "bias", None)
    for axes in (tuple(range(-own, 0)), channels):
        size = x.shape[1] if axes is channels else x.shape[-own:].numel()
        shape = [1, -1] + [1] * (x.ndim - 2) if axes is channels else x.shape[-own:]
        if prod(x.shape[axis] for axis in axes) < 2 or any(w is not None and w.numel() != size for w in (weight, bias)):
            continue
        for eps, centred, ddof in product(epsilons, (True, False), (0, 1)):
            middle = x - x.mean(axes, keepdim=True) if centred else x
            count = prod(x.shape[axis] for axis in axes)
            variance = middle.square().sum(axes, keepdim=True) / (count - ddof)
            kind = f"{'unbiased ' if ddof else ''}{'var' if centred else 'mean(x^2)'}"
            for words, scale in (
                (f"sqrt({kind} + {eps!r})", torch.sqrt(variance + eps)),
                (f"sqrt({kind}) + {eps!r}", torch.sqrt(variance) + eps),
            ):
                y = middle / scale
                if weight is not None:
                    y = y * weight.reshape(shape)
                if bias is not None:
                    y = y + bias.reshape(shape)
                yield f"{'x - mean(x)' if centred else 'x'} over {words}", y


def _recurrent(layer: Any, inputs: list[Tensor], step: Any, choices: Any) -> Iterator[Variant]:
    """Yields variants of one layer in one direction."""
    cell = isinstance(layer, nn.RNNCellBase)
    if not cell and (layer.num_layers > 1 or layer.bidirectional or layer.proj_size or inputs[0].ndim != 3):
        return
    weights = [*layer.parameters(), *(torch.zeros(()),) * 2][:4]
    x, *states = inputs
    rows = x[None] if cell else x.swapaxes(0, 1) if layer.batch_first else x
    zeros = rows.new_zeros(rows.shape[1], layer.hidden_size)
    first = [state if cell else state[0] for state in states] or [zeros, zeros]
    for choice in choices:
        outputs, state, words = [], list(first), ""
        for row in rows:
            state, words = step(row, state, weights, *choice)
            outputs.append(state[0])
        sequence = torch.stack(outputs)
        yield words, sequence[0] if cell else sequence.swapaxes(0, 1) if layer.batch_first else sequence


def _gru(
    x: Tensor, state: list[Tensor], weights: list[Tensor], before: bool, outside: bool, flipped: bool
) -> tuple[list[Tensor], str]:
    w, u, b, c = weights
    h = state[0]
    of_x, of_h = (x @ w.T + b).chunk(3, -1), (h @ u.T + c).chunk(3, -1)
    r, z = torch.sigmoid(of_x[0] + of_h[0]), torch.sigmoid(of_x[1] + of_h[1])
    u_n, c_n = u.chunk(3)[2], c.chunk(3)[2] if c.ndim else c
    inner = (r * h) @ u_n.T if before else r * (h @ u_n.T)
    n = torch.tanh(of_x[2] + inner + (c_n if outside or before else r * c_n))
    words = "tanh(x W + b + (r * h) U + c)" if before else "tanh(x W + b + r * (h U + c))"
    if outside and not before:
        words = "tanh(x W + b + r * (h U) + c)"
    words += " and (1 - z) * h + z * n" if flipped else " and (1 - z) * n + z * h"
    return [(1 - z) * h + z * n if flipped else (1 - z) * n + z * h], f"n = {words}"


def _lstm(
    x: Tensor, state: list[Tensor], weights: list[Tensor], more: bool, plain: bool, swapped: bool
) -> tuple[list[Tensor], str]:
    w, u, b, d = weights
    h, c = reversed(state) if swapped else state
    i, f, g, o = (x @ w.T + b + h @ u.T + d).chunk(4, -1)
    c = torch.sigmoid(f + 1 if more else f) * c + torch.sigmoid(i) * torch.tanh(g)
    h = torch.sigmoid(o) * (c if plain else torch.tanh(c))
    words = f"sigmoid({'f + 1' if more else 'f'}) * c and o * {'c' if plain else 'tanh(c)'}"
    return ([c, h] if swapped else [h, c]), words + (", the state taken as (c, h)" if swapped else "")


def cause_in_statistics(pair: LayerPair) -> str | None:
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
            got: Arrays = flax_arrays(layer)
            for _, _, _, of_arrays in edits:
                got = of_arrays(got, before, layer)
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


def _weights(pair: LayerPair) -> Iterator[Edit]:
    """Yields edits of whether, and how much, new statistics count."""

    def keep(after: Arrays, before: Arrays, layer: Any) -> Arrays:
        return after

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


def _rescaled(after: Arrays, before: Arrays, layer: Any, factor: float) -> Arrays:
    kept = {name: layer.momentum * before[name] for name in after if name.endswith("running_var")}
    return {**after, **{name: old + factor * (after[name] - old) for name, old in kept.items()}}
