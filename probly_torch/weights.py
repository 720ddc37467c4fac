"""Weights in the common form: torch's names and layouts, as NumPy arrays or one safetensors file."""

from __future__ import annotations

import os
from collections.abc import Mapping

import ml_dtypes
import numpy as np
import torch
from torch import Tensor, nn

from probly_torch._checks import check_arrays, check_materialized, check_numpy, check_tied
from probly_torch._files import read_arrays, write_arrays

__all__ = ["load_arrays", "load_weights", "save_weights", "to_arrays"]


def to_arrays(model: nn.Module) -> dict[str, np.ndarray]:
    """The weights of a model by their `state_dict` names, copied.

    Example:
        >>> {name: array.shape for name, array in to_arrays(nn.Linear(3, 2)).items()}
        {'weight': (2, 3), 'bias': (2,)}
    """
    return {name: _to_numpy(tensor) for name, tensor in _tensors(model).items()}


def load_arrays(model: nn.Module, arrays: Mapping[str, np.ndarray]) -> None:
    """Copies arrays into a model, all of them or none.

    Raises:
        ValueError: listing every name that is missing or unexpected, and every other shape or dtype.

    Example:
        >>> source, target = nn.Linear(3, 2), nn.Linear(3, 2)
        >>> load_arrays(target, to_arrays(source))
        >>> torch.equal(source.weight, target.weight)
        True
    """
    _load("load_arrays", model, arrays)


def save_weights(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Writes one safetensors file that plain torch loads too, and probly_flax.load_weights.

    `model.load_state_dict(safetensors.torch.load_file(path))` reads it without this library.
    """
    write_arrays(path, to_arrays(model))


def load_weights(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Loads a safetensors file into a model, all of it or nothing.

    Raises:
        ValueError: if the file is damaged, or does not fit the model; it says how.
    """
    _load(f"load_weights({os.fspath(path)!r})", model, read_arrays("load_weights", path))


def _load(what: str, model: nn.Module, arrays: Mapping[str, np.ndarray]) -> None:
    tensors = _tensors(model)
    expected = {name: (tuple(t.shape), str(t.dtype).removeprefix("torch.")) for name, t in tensors.items()}
    check_materialized(what, [name for name, t in tensors.items() if t.is_meta])
    check_numpy(what, arrays)
    check_arrays(what, expected, {name: (a.shape, a.dtype.name) for name, a in arrays.items()})
    check_tied(what, {name: (t.data_ptr(), t.shape) for name, t in tensors.items()}, arrays)
    with torch.no_grad():
        for name, tensor in tensors.items():
            tensor.copy_(_to_tensor(arrays[name]))


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return {name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)}


def _to_numpy(tensor: Tensor) -> np.ndarray:
    tensor = tensor.detach().cpu().contiguous()
    if tensor.dtype == torch.bfloat16:  # which torch does not hand to NumPy
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16).copy()
    return tensor.numpy().copy()


def _to_tensor(array: np.ndarray) -> Tensor:
    array = np.asarray(array, order="C")
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16)
    return torch.from_numpy(array.copy())
