"""Weights in the common form: torch's names and layouts, as NumPy arrays or one safetensors file."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from probly_flax._checks import check_arrays, check_loaded_dtype, check_numpy, check_tied
from probly_flax._files import read_arrays, write_arrays
from probly_flax.ensemble import Ensemble
from probly_flax.layers import attention, conv, embed, linear, norm
from probly_flax.layers._common import Rule, TorchNames

__all__ = ["load_arrays", "load_weights", "save_weights", "to_arrays"]

_NAMES: TorchNames = {
    **attention.TORCH_NAMES,
    **conv.TORCH_NAMES,
    **embed.TORCH_NAMES,
    **linear.TORCH_NAMES,
    **norm.TORCH_NAMES,
}
# Attributes of a container that its twin in torch has no name for.
_UNNAMED = {nnx.Sequential: "layers", Ensemble: "stacked"}


def to_arrays(model: nnx.Module) -> dict[str, np.ndarray]:
    """The weights of a model by the names of its twin's `state_dict`, copied.

    Raises:
        ValueError: naming every parameter that no rule covers yet. Linear and BatchEnsembleLinear have rules.

    Example:
        >>> {name: array.shape for name, array in to_arrays(nnx.Linear(3, 2, rngs=nnx.Rngs(0))).items()}
        {'weight': (2, 3), 'bias': (2,)}
    """
    rules = _rules("to_arrays", model)
    return {name: np.array(rule.to_torch(*(np.asarray(v[...]) for v in rule.variables))) for name, rule in rules}


def load_arrays(model: nnx.Module, arrays: Mapping[str, np.ndarray]) -> None:
    """Copies arrays into a model, all of them or none.

    Raises:
        ValueError: listing every name that is missing or unexpected, and every other shape or dtype.

    Example:
        >>> source, target = nnx.Linear(3, 2, rngs=nnx.Rngs(0)), nnx.Linear(3, 2, rngs=nnx.Rngs(1))
        >>> load_arrays(target, to_arrays(source))
        >>> bool((source.kernel[...] == target.kernel[...]).all())
        True
    """
    _load("load_arrays", model, arrays)


def save_weights(model: nnx.Module, path: str | os.PathLike[str]) -> None:
    """Writes one safetensors file that plain torch loads, and probly_torch.load_weights.

    `model.load_state_dict(safetensors.torch.load_file(path))` reads it into the twin without this library.
    """
    write_arrays(path, to_arrays(model))


def load_weights(model: nnx.Module, path: str | os.PathLike[str]) -> None:
    """Loads a safetensors file into a model, all of it or nothing.

    Raises:
        ValueError: if the file is damaged, or does not fit the model; it says how.
    """
    _load(f"load_weights({os.fspath(path)!r})", model, read_arrays("load_weights", path))


def _load(what: str, model: nnx.Module, arrays: Mapping[str, np.ndarray]) -> None:
    rules = dict(_rules(what, model))
    check_numpy(what, arrays)
    expected = {name: _in_torch(rule) for name, rule in rules.items()}
    check_arrays(what, expected, {name: (a.shape, a.dtype.name) for name, a in arrays.items()})
    check_tied(what, {name: tuple(map(id, rule.variables)) or name for name, rule in rules.items()}, arrays)
    values: list[tuple[nnx.Variable, Array]] = []
    for name, rule in rules.items():
        for variable, array in zip(rule.variables, rule.from_torch(np.asarray(arrays[name])), strict=True):
            values.append((variable, jnp.array(array)))
            check_loaded_dtype(what, name, variable.dtype.name, values[-1][1].dtype.name)
    for variable, value in values:
        old = variable.get_value()
        # Only then: a jitted step would compile again for arrays that are tied to a device.
        placed = isinstance(old, jax.Array) and not isinstance(old, jax.core.Tracer) and old.committed
        variable.set_value(jax.device_put(value, old.sharding) if placed else value)


def _rules(what: str, model: nnx.Module) -> Iterator[tuple[str, Rule]]:
    """Every weight under every name it has in torch; a layer used twice has two."""
    named = list(_walk(model, ""))
    covered = {id(variable) for _, rule in named for variable in rule.variables}
    missed = [
        ".".join(map(str, path))
        for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Not(nnx.RngState)))
        if id(variable) not in covered
    ]
    if missed:
        raise ValueError(
            f"{what} expects layers whose names and layouts in torch it knows ({', '.join(t.__name__ for t in _NAMES)})"
            f"; got parameters of others: {', '.join(missed)}. Convert the layers it knows: {what}(model.linear)."
        )
    yield from named


def _walk(module: nnx.Module, prefix: str) -> Iterator[tuple[str, Rule]]:
    names = _of_type(_NAMES, module) or {}
    if callable(names):
        yield from ((prefix + name, rule) for name, rule in names(module).items())
        names = {}
    for attribute, value in vars(module).items():
        if isinstance(value, nnx.Variable) and attribute in names:
            name, axes = names[attribute]
            yield prefix + name, _permuted(value, None if axes is None else axes(module))
        elif isinstance(value, nnx.Module):
            unnamed = _of_type(_UNNAMED, module) == attribute
            yield from _walk(value, prefix if unnamed else f"{prefix}{attribute}.")


def _in_torch(rule: Rule) -> tuple[tuple[int, ...], str]:
    """Shape and dtype, without the values."""
    array = rule.to_torch(*(np.broadcast_to(np.int8(0), variable.shape) for variable in rule.variables))
    return array.shape, rule.variables[0].dtype.name if rule.variables else array.dtype.name


def _permuted(variable: nnx.Variable, axes: tuple[int, ...] | None) -> Rule:
    """Axes in front of those that are named, such as that of the members, stay first."""
    if axes is None:
        return Rule((variable,), lambda array: array, lambda array: [array])
    rank = len(variable.shape)
    order = (*range(rank - len(axes)), *(rank - abs(axis) for axis in axes))
    flipped = tuple(rank - axis for axis in axes if axis > 0)
    return Rule(
        (variable,),
        lambda array: np.ascontiguousarray(np.flip(array, flipped).transpose(order)),
        lambda array: [np.ascontiguousarray(np.flip(array.transpose(np.argsort(order)), flipped))],
    )


def _of_type(table: Mapping[Any, Any], module: nnx.Module) -> Any:
    return next((table[layer_type] for layer_type in type(module).__mro__ if layer_type in table), None)
