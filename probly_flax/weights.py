"""Weights in the common form: torch's names and layouts, as NumPy arrays or one safetensors file."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from probly_flax._checks import check_arrays, check_loaded_dtype, check_numpy, check_tied
from probly_flax._files import read_arrays, write_arrays
from probly_flax.ensemble import Ensemble
from probly_flax.layers import linear
from probly_flax.layers._common import TorchNames

__all__ = ["load_arrays", "load_weights", "save_weights", "to_arrays"]

# For each layer, its variables: their names in torch, and the order of their axes there, counted from the last.
_NAMES: TorchNames = {**linear.TORCH_NAMES}
# Attributes of a container that its twin in torch has no name for.
_UNNAMED = {nnx.Sequential: "layers", Ensemble: "stacked"}


_Named = tuple[nnx.Variable, tuple[int, ...] | None]


def to_arrays(model: nnx.Module) -> dict[str, np.ndarray]:
    """The weights of a model by the names of its twin's `state_dict`, copied.

    Raises:
        ValueError: naming every parameter that no rule covers yet. Linear and BatchEnsembleLinear have rules.

    Example:
        >>> {name: array.shape for name, array in to_arrays(nnx.Linear(3, 2, rngs=nnx.Rngs(0))).items()}
        {'weight': (2, 3), 'bias': (2,)}
    """
    return {name: _to_torch(np.array(v[...]), axes) for name, (v, axes) in _variables("to_arrays", model)}


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
    variables = dict(_variables(what, model))
    expected = {name: (_shape_in_torch(v.shape, axes), v.dtype.name) for name, (v, axes) in variables.items()}
    check_numpy(what, arrays)
    check_arrays(what, expected, {name: (a.shape, a.dtype.name) for name, a in arrays.items()})
    check_tied(what, {name: id(v) for name, (v, _) in variables.items()}, arrays)
    values = {name: jnp.array(_from_torch(np.asarray(arrays[name]), axes)) for name, (_, axes) in variables.items()}
    for name, (_, dtype) in expected.items():
        check_loaded_dtype(what, name, dtype, values[name].dtype.name)
    for name, (variable, _) in variables.items():
        old, value = variable.get_value(), values[name]
        # Only then: a jitted step would compile again for arrays that are tied to a device.
        placed = isinstance(old, jax.Array) and not isinstance(old, jax.core.Tracer) and old.committed
        variable.set_value(jax.device_put(value, old.sharding) if placed else value)


def _variables(what: str, model: nnx.Module) -> Iterator[tuple[str, _Named]]:
    """Every weight under every name it has in torch; a layer used twice has two."""
    named = list(_walk(model, ""))
    covered = {id(variable) for _, (variable, _) in named}
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


def _walk(module: nnx.Module, prefix: str) -> Iterator[tuple[str, _Named]]:
    names = _of_type(_NAMES, module) or {}
    for attribute, value in vars(module).items():
        if isinstance(value, nnx.Variable) and attribute in names:
            name, axes = names[attribute]
            yield prefix + name, (value, None if axes is None else axes(module))
        elif isinstance(value, nnx.Module):
            unnamed = _of_type(_UNNAMED, module) == attribute
            yield from _walk(value, prefix if unnamed else f"{prefix}{attribute}.")


def _of_type(table: Mapping[Any, Any], module: nnx.Module) -> Any:
    return next((table[layer_type] for layer_type in type(module).__mro__ if layer_type in table), None)


def _to_torch(array: np.ndarray, axes: tuple[int, ...] | None) -> np.ndarray:
    """Axes in front of those that are named, such as that of the members, stay first."""
    return array if axes is None else np.ascontiguousarray(array.transpose(_order(array.ndim, axes)))


def _from_torch(array: np.ndarray, axes: tuple[int, ...] | None) -> np.ndarray:
    return array if axes is None else np.ascontiguousarray(array.transpose(np.argsort(_order(array.ndim, axes))))


def _shape_in_torch(shape: tuple[int, ...], axes: tuple[int, ...] | None) -> tuple[int, ...]:
    return shape if axes is None else tuple(shape[axis] for axis in _order(len(shape), axes))


def _order(rank: int, axes: tuple[int, ...]) -> tuple[int, ...]:
    return (*range(rank - len(axes)), *(rank + axis for axis in axes))
