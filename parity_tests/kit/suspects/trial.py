"""A suspect, and its trial: whether the two sides of a call agree once it is out of the way."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from typing import Any

import jax
import numpy as np
import torch
from flax import nnx
from torch import Tensor, nn

from parity_tests.kit.trees import image_layout, is_array, is_floating, leaves, mapped, numpy_of
from parity_tests.standard import MEANING_LIMIT, NOISE_FLOOR, UNIT_ROUNDOFF, error, meaning_limit

_MOST_JOINING = 8
_ROUNDING = UNIT_ROUNDOFF["float64"] / UNIT_ROUNDOFF["float32"]


@dataclass(frozen=True)
class LayerPair:
    """One layer that differs, and what it was called with in both models, in float64.

    Attributes:
        path: torch's name of the layer, "" for the whole model.
        torch: the layer in torch.
        flax: the layer in Flax.
        torch_args: the arguments by position of torch's call.
        torch_kwargs: its arguments by name.
        torch_outputs: what it returned.
        flax_args: the arguments by position of Flax's call.
        flax_kwargs: its arguments by name.
        flax_outputs: what it returned.
        channels_last: whether the Flax model takes images as (N, ..., C).
        train: whether both were called in training mode.
    """

    path: str
    torch: nn.Module
    flax: nnx.Module
    torch_args: tuple[Any, ...]
    torch_kwargs: dict[str, Any]
    torch_outputs: Any
    flax_args: tuple[Any, ...]
    flax_kwargs: dict[str, Any]
    flax_outputs: Any
    channels_last: bool
    train: bool


@dataclass
class Trial:
    """Flax's side of a call, copied, and torch's outputs: for a suspect to edit."""

    layer: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    expected: Any
    finish: Callable[[Any], Any] = lambda outputs: outputs


@dataclass(frozen=True)
class Suspect:
    """A possible difference.

    Attributes:
        said: what differs, with both values.
        remedy: what makes the two agree, if this is the cause.
        edit: does so.
        joins: whether it may be one of two causes.
    """

    said: str
    remedy: str
    edit: Callable[[Trial], Any]
    joins: bool = False


class Court:
    """Tries suspects for the difference between two layers."""

    def __init__(self, pair: LayerPair) -> None:
        self.pair = pair

    @cached_property
    def noise(self) -> float:
        """torch's own error in float32, in roundings of it."""
        pair = self.pair
        inputs = mapped((pair.torch_args, pair.torch_kwargs), lambda v: v.float() if is_floating(v) else v)
        try:
            outputs = run_torch(copy.deepcopy(pair.torch).float(), *inputs)
        except Exception:  # of a layer that insists on its dtype
            return NOISE_FLOOR
        return self.distance(pair.torch_outputs, outputs) * _ROUNDING

    def trial(self) -> Trial:
        """Copies Flax's side, whose attention does not leave float64."""
        layer = nnx.clone(self.pair.flax)
        for attention in attentions(layer):
            attention.attention_fn = exact_attention
        pair = self.pair
        return Trial(layer, pair.flax_args, dict(pair.flax_kwargs), pair.torch_outputs)

    def left(self, *suspects: Suspect) -> float:
        """Measures the distance that is left between the two, in roundings.

        It is infinite where the edit does not apply.
        """
        trial = self.trial()
        try:
            for suspect in suspects:
                suspect.edit(trial)
            return self.distance(trial.expected, trial.finish(run_flax(trial.layer, trial.args, trial.kwargs)))
        except Exception:  # of the user's layer, or of the edit: it is not this suspect
            return float("inf")

    def cause(self, suspects: Iterable[Suspect]) -> str | None:
        """Finds the first that explains the difference, or the first two that do so together."""
        original = self.distance(self.pair.torch_outputs, self.pair.flax_outputs)
        joining = []
        for suspect in suspects:
            left = self.left(suspect)
            if explains(left, original, self.noise):
                return sentence(suspect.said, suspect.remedy, left)
            if suspect.joins:
                joining.append(suspect)
        for a, b in combinations(joining[:_MOST_JOINING], 2):
            left = self.left(a, b)
            if explains(left, original, self.noise):
                return sentence(f"{a.said}, and {b.said}", f"{a.remedy} and {b.remedy}", left)
        return None

    def distance(self, expected: Any, got: Any) -> float:
        """Returns the largest distance of all outputs, in roundings at the scale of torch's."""
        worst = []
        for ours, theirs in self.matched(expected, got):
            last = self.pair.channels_last and not isinstance(theirs, Tensor)
            values = image_layout(last).to_torch(numpy_of(theirs), ours.shape)
            reference = numpy_of(ours)
            worst.append(float("inf") if values is None else error(values, reference, reference, "float64"))
        return max(worst, default=float("inf"))

    def matched(self, expected: Any, got: Any) -> list[tuple[Any, Any]]:
        """Pairs torch's outputs with Flax's. The first ones correspond."""
        ours, theirs = ([leaf for _, leaf in leaves(tree) if is_floating(leaf)] for tree in (expected, got))
        if not ours or not theirs:
            return []
        if isinstance(self.pair.torch, nn.RNNBase | nn.RNNCellBase):  # Flax puts the state first, and c before h
            both = isinstance(self.pair.torch, nn.LSTMCell) and len(ours) == 2 and len(theirs) == 3
            return [(ours[0], theirs[-1]), *([(ours[1], theirs[0])] if both else [])]
        return list(zip(ours, theirs, strict=True)) if len(ours) == len(theirs) else [(ours[0], theirs[0])]


def run_flax(layer: nnx.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Returns the outputs of a copy, compiled once for all values of its weights and inputs."""
    fixed, arrays = split_call(layer, args, kwargs)
    try:
        return _compiled(fixed, *arrays)
    except TypeError:  # it looks at values, or keeps what has no hash
        return nnx.clone(layer)(*args, **kwargs)


def split_call(layer: nnx.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, tuple[Any, list[Any]]]:
    """Splits a call into what is fixed and what is arrays, both of which `forward` takes."""
    flat, tree = jax.tree.flatten((args, kwargs))
    graph, state = nnx.split(layer)
    others = tuple(None if is_array(leaf) else leaf for leaf in flat)
    return (graph, tree, others), (state, [leaf if is_array(leaf) else None for leaf in flat])


def forward(fixed: Any, state: Any, arrays: list[Any]) -> Any:
    """Calls a copy of the layer."""
    graph, tree, others = fixed
    flat = [other if array is None else array for array, other in zip(arrays, others, strict=True)]
    args, kwargs = jax.tree.unflatten(tree, flat)
    return nnx.merge(graph, state, copy=True)(*args, **kwargs)


_compiled = jax.jit(forward, static_argnums=0)


def explains(left: float, original: float, noise: float = NOISE_FLOOR) -> bool:
    """Tells whether what is left of a difference is rounding.

    It is then within the limit of meaning, and well below the difference; or it is as small beside the difference as
    the rounding of float64 is beside that of float32.
    """
    limit = meaning_limit(noise)
    return left <= (max(min(limit, original / MEANING_LIMIT), original * _ROUNDING) if np.isfinite(original) else limit)


def sentence(said: str, remedy: str, left: float, what: str = "the layers", unit: str = "float64") -> str:
    """Makes the sentence that follows the name of a layer in a report."""
    return f"{said}; with {remedy} {what} agree {f'to {left * UNIT_ROUNDOFF[unit]:.0e}' if left else 'exactly'}"


def run_torch(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Returns the outputs of a copy, whose arguments it may change."""
    with torch.no_grad():
        args, kwargs = mapped((args, kwargs), lambda value: value.clone() if isinstance(value, Tensor) else value)
        return copy.deepcopy(module)(*args, **kwargs)


def attentions(layer: nnx.Module) -> list[Any]:
    """Finds those whose softmax is in float32.

    It is that of jax.nn.dot_product_attention, which Flax calls if there is no dropout.
    """
    modules = (module for _, module in nnx.iter_modules(layer))
    return [m for m in modules if getattr(m, "attention_fn", None) is nnx.dot_product_attention]


class _Listener:
    """Makes nnx.dot_product_attention compute step by step."""

    def sow(self, *args: Any) -> None:
        """Keeps nothing."""


def exact_attention(*args: Any, module: Any = None, **kwargs: Any) -> jax.Array:
    """Computes nnx.dot_product_attention in the dtype of its inputs throughout."""
    listener: Any = _Listener()
    return nnx.dot_product_attention(*args, **{**kwargs, "module": listener})
