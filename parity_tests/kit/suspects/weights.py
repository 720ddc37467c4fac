"""Suspects among the weights of a layer: their layout, order, presence and values."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import permutations
from typing import Any

import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx
from torch import nn

from parity_tests.kit.suspects.trial import Court, LayerPair, Suspect, Trial, run_torch
from parity_tests.kit.trees import jax_of
from parity_tests.standard import meaning_limit
from probly_flax import load_arrays
from probly_flax import to_arrays as flax_arrays
from probly_torch import to_arrays as torch_arrays

Function = Callable[[np.ndarray], np.ndarray]
_MOST_MEMBERS = 4  # of which every order is tried


def suspects(pair: LayerPair) -> Iterator[Suspect]:
    """Yields other layouts of the same numbers first, then other numbers, then weights that one side lacks."""
    yield from _transposed(pair)
    yield from _heads(pair)
    yield from _thirds(pair)
    yield from _gates(pair)
    yield from _two_directions(pair)
    yield from _fast_weights(pair)
    yield from _groups(pair)
    yield from _padding_row(pair)
    yield from _values(pair)
    yield from _lacking(pair)
    yield from _offsets(pair)


def _weights(layer: nnx.Module) -> dict[str, Any]:
    state = nnx.to_flat_state(nnx.state(layer, nnx.Not(nnx.RngState)))
    floating = ((path, v) for path, v in state if hasattr(v, "set_value") and jnp.issubdtype(v.dtype, jnp.floating))
    return {".".join(map(str, path)): variable for path, variable in floating}


def _change(trial: Trial, names: Sequence[str], function: Function) -> None:
    variables = _weights(trial.layer)
    for name in names:
        variables[name].set_value(jax_of(function(np.asarray(variables[name].get_value()))))


def _changed(said: str, remedy: str, names: Sequence[str], function: Function, joins: bool = False) -> Suspect:
    """Makes the suspect that these weights are a function of what they should be."""
    return Suspect(said, remedy, partial(_change, names=names, function=function), joins)


def _exchange(trial: Trial, names: Sequence[str], others: Sequence[str]) -> None:
    """Gives each of the names the value of another."""
    variables = _weights(trial.layer)
    values = [variables[other].get_value() for other in others]
    for name, value in zip(names, values, strict=True):
        variables[name].set_value(value)


def _transposed(pair: LayerPair) -> Iterator[Suspect]:
    """Yields axes of equal sizes, which no check of shapes can tell apart, and kernels upside down."""
    for name, variable in _weights(pair.flax).items():
        shape = variable.shape
        if "kernel" not in name and len(shape) < 2:
            continue
        for a in range(len(shape)):
            for b in range(a + 1, len(shape)):
                if shape[a] == shape[b] > 1:
                    said = f"axes {a} and {b} of {name} {shape} lie the other way round in torch"
                    code = f"jnp.swapaxes({name}, {a}, {b})"
                    if len(shape) == 2:
                        said, code = f"the square {name} {shape} is not transposed as torch's is", f"{name}.T"
                    yield _changed(said, code, [name], partial(np.swapaxes, axis1=a, axis2=b), joins=True)
        if isinstance(pair.flax, nnx.Conv | nnx.ConvTranspose) and name == "kernel":
            spatial = tuple(range(len(shape) - 2))
            flip = partial(np.flip, axis=spatial)
            said = f"the kernel {shape} is flipped in space, against torch's"
            yield _changed(said, f"jnp.flip(kernel, {spatial})", [name], flip, joins=True)
            if shape[-1] == shape[-2]:
                both = partial(_flipped_and_swapped, axes=spatial)
                said = f"the kernel {shape} is flipped in space and has its channels swapped, against torch's"
                code = f"jnp.flip(kernel, {spatial}).swapaxes(-1, -2)"
                yield _changed(said, code, [name], both)


def _flipped_and_swapped(kernel: np.ndarray, axes: tuple[int, ...]) -> np.ndarray:
    return np.flip(kernel, axes).swapaxes(-1, -2)


_PROJECTIONS = ("query", "key", "value")


def _heads(pair: LayerPair) -> Iterator[Suspect]:
    """Yields suspects of nnx.MultiHeadAttention: (in, heads, features of a head)."""
    if not isinstance(pair.flax, nnx.MultiHeadAttention):
        return
    weights = _weights(pair.flax)
    for order in permutations(_PROJECTIONS):
        if order != _PROJECTIONS:
            names = [n for n in weights if n.split(".")[0] in _PROJECTIONS]
            others = [f"{order[_PROJECTIONS.index(n.split('.')[0])]}.{n.split('.', 1)[1]}" for n in names]
            said = f"nnx's query, key, value hold what is in torch's order of {_inverse(order)}"
            remedy = f"the weights of {', '.join(order)} for query, key, value"
            yield Suspect(said, remedy, partial(_exchange, names=names, others=others))
    groups = [list(_PROJECTIONS), ["out"], [*_PROJECTIONS, "out"], *([each] for each in _PROJECTIONS)]
    for group in groups:
        said = f"the kernels of {', '.join(group)} are reshaped from torch's weight, not from its transpose"
        yield _changed(said, "weight.T.reshape(kernel.shape)", [f"{each}.kernel" for each in group], _transposed_flat)
    inner = [n for n in weights if n.split(".")[0] in _PROJECTIONS]
    for split, said, code in (
        (_features_first, "(features, heads)", "reshape(..., heads, features)"),
        (_heads_first, "(heads, features), then swapped,", "no swap of heads and features"),
    ):
        said = f"nnx splits query, key and value as {said}, torch as (heads, features)"
        yield _changed(said, code, inner, split)


def _inverse(order: Sequence[str]) -> str:
    return ", ".join(_PROJECTIONS[order.index(each)] for each in _PROJECTIONS)


def _transposed_flat(kernel: np.ndarray) -> np.ndarray:
    """Transposes a kernel as a matrix, which is square, whichever two of its three axes are one in torch."""
    side = round(kernel.size**0.5)
    return kernel.reshape(side, side).T.reshape(kernel.shape)


def _features_first(array: np.ndarray) -> np.ndarray:
    return array.swapaxes(-1, -2).reshape(array.shape)


def _heads_first(array: np.ndarray) -> np.ndarray:
    return array.reshape(*array.shape[:-2], array.shape[-1], array.shape[-2]).swapaxes(-1, -2)


def _thirds(pair: LayerPair) -> Iterator[Suspect]:
    """Yields other orders of the columns of a Linear that makes query, key and value at once."""
    weights = _weights(pair.flax)
    if not isinstance(pair.flax, nnx.Linear) or weights["kernel"].shape[-1] % 3:
        return
    width = weights["kernel"].shape[-1] // 3
    for order in permutations(range(3)):
        if order != (0, 1, 2):
            columns = np.concatenate([np.arange(width) + width * i for i in order])
            names = ", ".join(("q", "k", "v")[i] for i in np.argsort(order))
            said = f"nnx packs {names} where torch packs q, k, v"
            yield _columns(weights, columns, said, "the thirds in torch's order")
    for heads in (h for h in range(2, width + 1) if width % h == 0):
        lie = np.arange(3 * width)
        for columns, ours, theirs in (
            (lie.reshape(heads, 3, -1).swapaxes(0, 1).reshape(-1), (3, heads), (heads, 3)),
            (lie.reshape(3, heads, -1).swapaxes(0, 1).reshape(-1), (heads, 3), (3, heads)),
        ):
            said = f"nnx packs query, key and value as {(*theirs, width // heads)}, torch as {(*ours, width // heads)}"
            yield _columns(weights, columns, said, f"columns as {(*ours, width // heads)}")


def _columns(weights: dict[str, Any], columns: np.ndarray, said: str, remedy: str) -> Suspect:
    names = [name for name, variable in weights.items() if variable.shape[-1] == len(columns)]
    return _changed(said, remedy, names, partial(np.take, indices=columns, axis=-1))


_APART = (("ii", "if_", "ig", "io"), ("hi", "hf", "hg", "ho"))  # of an nnx.LSTMCell


def _gates(pair: LayerPair) -> Iterator[Suspect]:
    """Yields blocks of torch's recurrent layers, in another order."""
    mode = getattr(pair.torch, "mode", type(pair.torch).__name__)
    letters = "ifgo" if "LSTM" in mode else "rzn" if "GRU" in mode else ""
    hidden = getattr(pair.torch, "hidden_size", None)
    if not letters or not isinstance(hidden, int):
        return
    weights = _weights(pair.flax)
    blocks = [n for n, v in weights.items() if v.shape[-1] == len(letters) * hidden]
    single = [n for n in weights for each in _APART if set(each) & set(n.split("."))]
    for order in permutations(range(len(letters))):
        if order == tuple(range(len(letters))):
            continue
        ours, own = ", ".join(letters), ", ".join(letters[i] for i in np.argsort(order))
        said, remedy = f"the gates of nnx lie as ({own}), torch's as ({ours})", f"the gates as ({ours})"
        if blocks:
            columns = np.concatenate([np.arange(hidden) + hidden * i for i in order])
            yield _changed(said, remedy, blocks, partial(np.take, indices=columns, axis=-1))
        elif single:
            others = [_other(n, order) for n in single]
            yield Suspect(said, remedy, partial(_exchange, names=single, others=others))


def _other(name: str, order: Sequence[int]) -> str:
    parts = name.split(".")
    renamed = {each: group[order[i]] for group in _APART for i, each in enumerate(group)}
    return ".".join(renamed.get(part, part) for part in parts)


def _two_directions(pair: LayerPair) -> Iterator[Suspect]:
    if not isinstance(pair.flax, nnx.Bidirectional):
        return
    names = [name for name in _weights(pair.flax) if name.split(".")[0] in ("forward_rnn", "backward_rnn")]
    swap = {"forward_rnn": "backward_rnn", "backward_rnn": "forward_rnn"}
    others = [".".join([swap[name.split(".")[0]], *name.split(".")[1:]]) for name in names]
    edit = partial(_exchange, names=names, others=others)
    said = "nnx's forward_rnn has torch's weights of the reverse direction, and backward_rnn the others"
    yield Suspect(said, "the two exchanged", edit)


def _fast_weights(pair: LayerPair) -> Iterator[Suspect]:
    """Yields suspects of BatchEnsemble layers: r, s, and a bias for each member."""
    weights = _weights(pair.flax)
    for r in (name for name in weights if name.split(".")[-1] == "r"):
        prefix = r[:-1]
        s, bias = prefix + "s", prefix + "bias"
        if s not in weights:
            continue
        if weights[r].shape == weights[s].shape:
            edit = partial(_exchange, names=[r, s], others=[s, r])
            yield Suspect("r and s are swapped, against torch's", f"{r} for {s} and {s} for {r}", edit)
        if bias in weights and weights[bias].shape == weights[s].shape:
            for said, power in (
                ("nnx adds the bias before it multiplies by s, torch after", -1.0),
                ("torch adds the bias before it multiplies by s, nnx after", 1.0),
            ):
                remedy = f"the bias {'after' if power < 0 else 'before'} s"
                yield Suspect(said, remedy, partial(_scale_bias, bias=bias, s=s, power=power))
        count = weights[r].shape[0]
        named = [name for name in (r, s, bias) if name in weights and weights[name].shape[0] == count]
        orders = (
            permutations(range(count))
            if count <= _MOST_MEMBERS
            else (tuple(np.roll(range(count)[::step], shift)) for step in (1, -1) for shift in range(count))
        )
        for order in orders:
            if tuple(order) != tuple(range(count)):
                said = f"nnx's members are torch's in the order {tuple(int(i) for i in np.argsort(order))}"
                yield _changed(said, "members in torch's order", named, partial(np.take, indices=order, axis=0))


def _scale_bias(trial: Trial, bias: str, s: str, power: float) -> None:
    variables = _weights(trial.layer)
    factor = np.asarray(variables[s].get_value()) ** power
    _change(trial, [bias], lambda value: value * factor)


def _groups(pair: LayerPair) -> Iterator[Suspect]:
    """Yields channels that go to groups in turns."""
    count = getattr(pair.torch, "num_groups", None)
    channels = getattr(pair.torch, "num_channels", 0)
    if not isinstance(count, int) or not 1 < count < channels:
        return
    order = np.arange(channels).reshape(-1, count).T.reshape(-1)
    back = np.argsort(order)
    for said, into, out in (("in turns", order, back), ("as torch would in turns", back, order)):
        edit = partial(_regroup, into=into, out=out)
        yield Suspect(f"nnx puts channels into groups {said}, torch block by block", "groups of neighbours", edit)


def _regroup(trial: Trial, into: np.ndarray, out: np.ndarray) -> None:
    def take(array: Any, order: np.ndarray) -> Any:
        return np.take(np.asarray(array), order, axis=-1) if array.shape[-1:] == order.shape else array

    trial.args = tuple(jax_of(take(each, into)) if hasattr(each, "shape") else each for each in trial.args)
    _change(trial, list(_weights(trial.layer)), lambda value: take(value, into))
    trial.finish = lambda outputs: take(outputs, out)


def _values(pair: LayerPair) -> Iterator[Suspect]:
    try:
        ours, theirs = flax_arrays(pair.flax), torch_arrays(pair.torch)
    except (TypeError, ValueError):  # a layer whose weights have no names in torch
        return
    differ = [n for n in ours if n in theirs and (ours[n].shape != theirs[n].shape or (ours[n] != theirs[n]).any())]
    if differ and ours.keys() <= theirs.keys():
        off = max(float(np.abs(ours[n] - theirs[n]).max()) for n in differ if ours[n].shape == theirs[n].shape)
        shown = " and ".join(filter(None, (", ".join(differ[:-1]), differ[-1])))
        said = f"{shown} {'differs' if len(differ) == 1 else 'differ'} by up to {off:.2g}"
        yield Suspect(said, "torch's values", lambda trial: load_arrays(trial.layer, theirs, cast=True))


def _lacking(pair: LayerPair) -> Iterator[Suspect]:
    """Yields weights that do nothing on the other side. Without them the two agree."""
    parameters = {n: p for n, p in pair.torch.named_parameters() if "bias" in n or p.ndim == 1}
    names = [[name] for name, value in parameters.items() if not _is_neutral(name, value)]
    biases = [name for (name,) in names if "bias" in name]
    own = [name.split(".")[-1] for name in _weights(pair.flax)]
    for each in [*names, *([biases] if len(biases) > 1 else [])]:
        shown = " and ".join(each)
        bias = "bias" in each[0]
        said = f"torch {'has a' if bias else 'multiplies by'} {shown}, and nnx {'adds none' if bias else 'does not'}"
        edit = partial(_without, pair=pair, names=each)
        yield Suspect(said, f"{shown} left out in torch, too,", edit, joins=bias and "bias" not in own)
    for last, exists in (("bias", biases), ("scale", [name for (name,) in names if name not in biases])):
        chosen = [name for name in _weights(pair.flax) if name.split(".")[-1] == last]
        if chosen and not exists:
            said, neutral = f"nnx has a {' and '.join(chosen)}, and torch none", (np.zeros_like, np.ones_like)
            yield _changed(said, f"use_{last}=False", chosen, neutral[last != "bias"], joins=True)


def _is_neutral(name: str, value: torch.Tensor) -> bool:
    return bool((value == (0 if "bias" in name else 1)).all())


def _without(trial: Trial, pair: LayerPair, names: Sequence[str]) -> None:
    module = copy.deepcopy(pair.torch)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name in names:
                parameter.fill_(0 if "bias" in name else 1)
    again, trial.expected = (run_torch(each, pair.torch_args, pair.torch_kwargs) for each in (pair.torch, module))
    if Court(pair).distance(pair.torch_outputs, again) > meaning_limit():
        raise ValueError("the layer gives something else each time, so that the weights are not what differs")


def _offsets(pair: LayerPair) -> Iterator[Suspect]:
    """Yields weights that are kept less one, as some networks do."""
    for name, variable in _weights(pair.flax).items():
        if len(variable.shape) == 1 and "bias" not in name:
            for step in (1.0, -1.0):
                here, there = ("weight", "1 + weight") if step > 0 else ("1 + weight", "weight")
                said = f"torch multiplies by {there}, nnx by {here}"
                yield _changed(said, f"{name} {step:+g}", [name], partial(np.add, step), joins=True)


def _padding_row(pair: LayerPair) -> Iterator[Suspect]:
    if isinstance(pair.torch, nn.Embedding) and pair.torch.padding_idx is not None:
        row = pair.torch.padding_idx
        said = f"torch's padding_idx is {row}, whose row is zero, and nnx has none"
        yield _changed(said, f"embedding[{row}] = 0", list(_weights(pair.flax)), partial(_without_row, row=row))


def _without_row(table: np.ndarray, row: int) -> np.ndarray:
    return np.where(np.arange(len(table))[:, None] == row, 0, table)
