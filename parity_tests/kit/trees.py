"""Inputs and outputs of models: arrays in lists, tuples, dicts and dataclasses, by name, in one order and layout."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

Key = tuple[str, str]  # the kind of a tensor, and its name in torch
Run = dict[Key, np.ndarray]
Arrays = Mapping[str, np.ndarray]


def is_array(value: Any) -> bool:
    """Tells whether it is an array of NumPy, torch or JAX. A scalar of Python is none."""
    return isinstance(value, np.ndarray | np.generic | torch.Tensor | jax.Array | jax.ShapeDtypeStruct)


def leaves(tree: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Yields the arrays of a tree with their places in it. Dicts go in the order of their keys."""
    if is_array(tree):
        yield name, tree
    for place, child in _children(tree):
        yield from leaves(child, name + place)


def mapped(tree: Any, function: Callable[[Any], Any]) -> Any:
    """Returns the tree with another value for each array. Everything else is kept."""
    if is_array(tree):
        return function(tree)
    if isinstance(tree, dict):
        changed = {key: mapped(value, function) for key, value in tree.items()}
        return changed if type(tree) is dict else _like(tree, changed)
    if isinstance(tree, tuple | list):
        items = [mapped(value, function) for value in tree]
        return type(tree)(*items) if hasattr(tree, "_fields") else type(tree)(items)
    if dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        return dataclasses.replace(tree, **{place[1:]: mapped(child, function) for place, child in _children(tree)})
    return tree


def _like(tree: dict[Any, Any], changed: dict[Any, Any]) -> Any:
    try:
        return type(tree)(changed)
    except TypeError:
        return changed


def _children(tree: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(tree, dict):
        for key in sorted(tree, key=str):
            yield f"[{key!r}]", tree[key]
    elif isinstance(tree, tuple | list):
        for i, value in enumerate(tree):
            yield f"[{i}]", value
    elif dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        for field in dataclasses.fields(tree):
            yield f".{field.name}", getattr(tree, field.name)


def is_floating(array: Any) -> bool:
    """Tells whether an array of any framework has a floating dtype, bfloat16 too."""
    if isinstance(array, torch.Tensor):
        return array.is_floating_point()
    return bool(jnp.issubdtype(array.dtype, jnp.floating))


def rounded(array: np.ndarray, dtype: str) -> np.ndarray:
    """Rounds floating values to what this dtype holds, in float64, so that every run sees the same numbers."""
    if not is_floating(array):
        return array
    with np.errstate(over="ignore"):
        return array.astype(jnp.dtype(dtype)).astype(np.float64)


def numpy_of(array: Any) -> np.ndarray:
    """Returns the values, floating ones in float64, which holds every value of the lower dtypes."""
    if isinstance(array, torch.Tensor):
        array = array.detach().cpu()
        return np.array((array.double() if array.is_floating_point() else array).numpy())
    values = np.asarray(array)
    return values.astype(np.float64) if is_floating(array) else np.array(values)


def jax_of(array: np.ndarray, dtype: Any = None) -> jax.Array:
    """Puts an array on JAX's device.

    NumPy converts, and the dtype is named: JAX compiles a program for each shape otherwise.
    """
    dtype = jax.dtypes.canonicalize_dtype(array.dtype if dtype is None else dtype)
    return jnp.asarray(np.asarray(array, dtype), dtype)


@dataclass(frozen=True)
class Layout:
    """Which arrays torch has as (N, C, ...) and Flax as (N, ..., C): those with one of these numbers of axes."""

    ranks: frozenset[int] = frozenset()

    def to_flax(self, array: np.ndarray) -> np.ndarray:
        """Converts an input."""
        return np.moveaxis(array, 1, -1) if array.ndim in self.ranks else array

    def to_torch(self, array: np.ndarray, shape: Sequence[int]) -> np.ndarray | None:
        """Converts an output that has this shape in torch, or returns None."""
        forms = (np.moveaxis(array, -1, axis) if axis else array for axis in self._channels(array.ndim))
        return next((each for each in forms if each.shape == tuple(shape)), None)

    def to_flax_output(self, array: np.ndarray, shape: Sequence[int]) -> np.ndarray:
        """Converts the gradient of an output that has this shape in Flax."""
        forms = (np.moveaxis(array, axis, -1) if axis else array for axis in self._channels(array.ndim))
        return next(each for each in forms if each.shape == tuple(shape))

    def _channels(self, rank: int) -> list[int]:
        """Lists where torch may have the channels that are last in Flax, the likely place first; 0 is the same layout.

        Member outputs of images, (E, N, C, ...), have them one axis later.
        """
        likely = 1 if rank in self.ranks else 2 if rank - 1 in self.ranks else 0
        return [likely, *(axis for axis in (0, 1, 2) if axis != likely and (axis == 0 or rank > axis + 1))]

    def to_torch_input(self, array: np.ndarray) -> np.ndarray:
        """Converts the gradient of an input."""
        return np.moveaxis(array, -1, 1) if array.ndim in self.ranks else array

    def __str__(self) -> str:
        """Returns what a report says."""
        return "channels last, (N, ..., C)" if self.ranks else "in torch's layout"


def image_layout(channels_last: bool) -> Layout:
    """Makes the layout of images. Sequences (B, T, C) are the same in both."""
    return Layout(frozenset((4, 5) if channels_last else ()))
