"""Suspects in what a layer takes and gives: masks, axes, order of members, tokens."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from torch import nn

from parity_tests.kit.suspects.trial import LayerPair, Suspect, Trial, exact_attention
from parity_tests.kit.trees import is_array, is_floating, jax_of, leaves, mapped, numpy_of

Function = Callable[[Any], Any]


def suspects(pair: LayerPair) -> Iterator[Suspect]:
    """Yields suspects, masks first."""
    yield from _masks(pair)
    yield from _axes(pair)
    yield from _members(pair)
    yield from _tokens(pair)


def _arrays(pair: LayerPair) -> list[Any]:
    return [leaf for _, leaf in leaves((pair.flax_args, pair.flax_kwargs))]


def _edit_inputs(trial: Trial, applies: Callable[[Any], Any], function: Function) -> None:
    trial.args, trial.kwargs = mapped(
        (trial.args, trial.kwargs), lambda leaf: jax_of(function(np.asarray(leaf))) if applies(leaf) else leaf
    )


def _is_mask(value: Any) -> bool:
    return is_array(value) and numpy_of(value).dtype == bool


def _masks(pair: LayerPair) -> Iterator[Suspect]:
    masks = [leaf for leaf in _arrays(pair) if _is_mask(leaf)]
    polarity = "the two take the boolean mask in opposite ways"
    if isinstance(pair.torch, nn.MultiheadAttention):
        polarity = "torch's boolean mask is True where a key is hidden, nnx's where it is seen"
    for mask in masks:
        edit = partial(_edit_inputs, applies=partial(operator.is_, mask), function=np.logical_not)
        yield Suspect(polarity, "~mask in Flax", edit)
    if len(masks) > 1:
        yield Suspect(polarity, "~mask in Flax", partial(_edit_inputs, applies=_is_mask, function=np.logical_not))
    if not isinstance(pair.flax, nnx.MultiHeadAttention):
        return
    shape: tuple[int, ...] = pair.flax_args[0].shape if pair.flax_args else ()
    if len(shape) >= 2:
        edit = partial(_set_mask, mask=jax_of(np.tri(shape[-2])[None, None] > 0))
        yield Suspect("torch attends to the past only, nnx to all", "mask=nnx.make_causal_mask(x[..., 0])", edit)
    own = pair.flax_kwargs.get("mask")
    if own is not None:
        yield Suspect("nnx takes a mask and torch none", "mask=None", partial(_set_mask, mask=None))
    if pair.flax_kwargs.get("is_causal"):
        yield Suspect("nnx attends to the past only, torch to all", "is_causal=False", partial(_set_mask, mask=own))
    if is_array(own) and is_floating(own):
        said = "the mask is of numbers to add in torch, and nnx takes it for a boolean one"
        code = "attention_fn=partial(nnx.dot_product_attention, bias=mask)"
        yield Suspect(said, code, partial(_set_bias, bias=own))
    yield from _masks_of_torch(pair)


def _masks_of_torch(pair: LayerPair) -> Iterator[Suspect]:
    """Yields torch's own masks, as nnx takes them."""
    for name, axes, code in (
        ("key_padding_mask", (slice(None), None, None), "mask=~key_padding_mask[:, None, None, :]"),
        ("attn_mask", (None, None), "mask=~attn_mask[None, None]"),
    ):
        mask = pair.torch_kwargs.get(name)
        if _is_mask(mask):
            said = f"nnx does not take torch's {name} (True where a key is hidden)"
            yield Suspect(said, code, partial(_set_mask, mask=jax_of(~numpy_of(mask)[axes])))


def _set_mask(trial: Trial, mask: Any) -> None:
    trial.kwargs = {name: value for name, value in trial.kwargs.items() if name != "is_causal"} | {"mask": mask}


def _set_bias(trial: Trial, bias: Any) -> None:
    _set_mask(trial, None)
    trial.layer.attention_fn = partial(exact_attention, bias=bias)


def _axes(pair: LayerPair) -> Iterator[Suspect]:
    """Yields inputs with another axis meant, and outputs for which another order of axes would agree."""
    ranks = {leaf.ndim for leaf in _arrays(pair) if is_floating(leaf)}
    if not ranks or max(ranks) < 3:
        return
    for source, target in ((1, -1), (-1, 1)):
        into, out = partial(_moved, source=source, target=target), partial(_moved, source=target, target=source)
        ours, theirs = ("axis 1", "the last axis") if source == 1 else ("the last axis", "axis 1")
        said, code = f"torch takes {ours} for the channels, nnx {theirs}", f"jnp.moveaxis(x, {source}, {target})"
        yield Suspect(said, code, partial(_around, into=into, out=out), joins=True)
    said = "torch's axis of time and of batch are nnx's of batch and of time (batch_first)"
    yield Suspect(said, "jnp.swapaxes(x, 0, 1)", partial(_around, into=_swapped, out=_swapped), joins=True)


def _moved(array: Any, source: int, target: int) -> Any:
    return np.moveaxis(array, source, target) if array.ndim >= 3 else array


def _swapped(array: Any) -> Any:
    return np.swapaxes(array, 0, 1) if array.ndim >= 3 else array


def _around(trial: Trial, into: Function, out: Function, applies: Callable[[Any], Any] = is_floating) -> None:
    """Edits the inputs, and puts the outputs back."""
    _edit_inputs(trial, applies, into)
    finish = trial.finish
    trial.finish = lambda outputs: mapped(finish(outputs), lambda leaf: out(np.asarray(leaf)))


def _members(pair: LayerPair) -> Iterator[Suspect]:
    members = getattr(pair.torch, "num_members", None)
    rows = {leaf.shape[0] for leaf in _arrays(pair) if leaf.ndim}
    if not isinstance(members, int) or members < 2 or len(rows) != 1:
        return
    (count,) = rows
    if count % members:
        return
    order = np.arange(count).reshape(members, -1).T.reshape(-1)
    back = np.argsort(order)
    for said, into, out in (
        ("torch's rows belong to members one block after another, [E, B], nnx's in turns, [B, E]", order, back),
        ("torch's rows belong to members in turns, [B, E], nnx's one block after another, [E, B]", back, order),
    ):
        edit = partial(_around, into=partial(_rows, order=into), out=partial(_rows, order=out), applies=np.ndim)
        yield Suspect(said, "rows in one order (jnp.tile, not jnp.repeat)", edit)


def _rows(array: Any, order: np.ndarray) -> Any:
    return array[order] if array.shape[:1] == order.shape else array


def _tokens(pair: LayerPair) -> Iterator[Suspect]:
    if not isinstance(pair.torch, nn.Embedding):
        return
    for step, first in ((1, -1), (-1, 1)):
        yield Suspect(f"nnx counts tokens from {first}, torch from 0", f"tokens {step:+d}", partial(_shift, step=step))


def _is_integer(array: Any) -> bool:
    return bool(jnp.issubdtype(array.dtype, jnp.integer))


def _shift(trial: Trial, step: int) -> None:
    _edit_inputs(trial, _is_integer, lambda tokens: tokens + tokens.dtype.type(step))
