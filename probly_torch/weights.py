"""Weights in the common form: torch's names and layouts, as NumPy arrays or one safetensors file."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np
import torch
from torch import Tensor, nn

from probly_common.checks.weights import (
    check_integers,
    check_model,
    check_numpy,
    check_writable,
    read_json,
    warn_not_finite,
)
from probly_common.weights.files import (
    Arrays,
    FileArrays,
    Spec,
    cast_array,
    keep_once,
    open_arrays,
    specs_of,
    write_arrays,
)
from probly_common.weights.flatten import check_flatten, check_flattened, linear_sizes, warn_flattened
from probly_common.weights.kinds import check_same_options
from probly_common.weights.match import Choices, Targets, check_tied_names, match_names, renamed_paths
from probly_torch._inventory import Inventory

__all__ = ["Inventory", "load_arrays", "load_weights", "save_weights", "to_arrays"]

Flatten = Mapping[str, Sequence[int]] | None


def to_arrays(model: nn.Module, *, flatten: Flatten = None) -> dict[str, np.ndarray]:
    """Copies the weights of a model into arrays, by their names in torch's `state_dict`.

    Extra states in the state_dict are not weights.

    Args:
        model: any module that has memory, on any device.
        flatten: `{"fc1": (64, 7, 7)}`, (channels, *spatial) of the output of a convolution that the Linear layer `fc1`
            reads flattened. Here it is only checked: what torch flattens, channels first, is the common form.

    Returns:
        A new array for every name, tied tensors under each of theirs.

    Raises:
        ValueError: if the model has no memory, or flatten does not fit it.

    Example:
        >>> {name: array.shape for name, array in to_arrays(nn.Linear(3, 2)).items()}
        {'weight': (2, 3), 'bias': (2,)}
    """
    inventory = inventory_of("to_arrays", model)
    flatten_sizes("to_arrays", inventory, flatten)
    return {name: view_of(tensor).copy() for name, tensor in inventory.weights("to_arrays").items()}


def load_arrays(
    model: nn.Module,
    arrays: Mapping[str, np.ndarray | Tensor],
    *,
    strict: bool = True,
    rename: Mapping[str, str] | None = None,
    ignore: str | Iterable[str] = (),
    cast: bool = False,
    flatten: Flatten = None,
) -> None:
    """Copies arrays into a model, all of them or none.

    Args:
        model: whose parameters and buffers are overwritten; they stay the same objects.
        arrays: by torch's names, in torch's layouts, as NumPy arrays or tensors. Of a tied tensor one name is enough,
            and `num_batches_tracked` may be missing.
        strict: whether names that only one side has are an error, which lists them. With False they stay as they were,
            and a warning lists them. Another shape is an error in any case.
        rename: regular expressions, and what replaces them in the names of the arrays, `{r"^module\\.": ""}`.
        ignore: name patterns, `"head.*"`, of weights to leave as they were; of the model, or of the arrays.
        cast: whether floating-point numbers, and integers that fit, may be converted to the model's dtype.
        flatten: as in `to_arrays`.

    Raises:
        TypeError: if these are no arrays by name.
        ValueError: listing every name that is missing or unexpected, and every other shape or dtype.

    Example:
        >>> source, target = nn.Linear(3, 2), nn.Linear(3, 2)
        >>> load_arrays(target, to_arrays(source))
        >>> torch.equal(source.weight, target.weight)
        True
    """
    found: Any = arrays
    if isinstance(arrays, Mapping):
        found = {name: view_of(array) if isinstance(array, Tensor) else array for name, array in arrays.items()}
    check_numpy("load_arrays", found)
    given = Arrays(specs_of(found), lambda name: np.asarray(found[name]))
    inventory = inventory_of("load_arrays", model)
    _load("load_arrays", inventory, given, flatten, Choices(strict, rename, ignore, cast))


def save_weights(model: nn.Module, path: str | os.PathLike[str], *, flatten: Flatten = None) -> None:
    """Writes one safetensors file, which plain torch and probly_flax.load_weights load too.

    Without this library, `model.load_state_dict(safetensors.torch.load_file(path))` reads it; or, if the model has tied
    weights, which are kept once, `safetensors.torch.load_model(model, path)`. Its metadata has a sha256 of the bytes of
    all tensors, the framework, the options of the layers, such as epsilon, and `flatten`.

    Args:
        model: any module that has memory, on any device.
        path: of the file, which is replaced once the new one is complete.
        flatten: as in `to_arrays`. The file records it for probly_flax.load_weights, which needs it.

    Raises:
        ValueError: if the model has no memory or a dtype that safetensors has not, or flatten does not fit it.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_weights(nn.Linear(3, 2), f"{folder}/linear.safetensors")
    """
    inventory = inventory_of("save_weights", model)
    tensors = inventory.weights("save_weights")
    arrays = Arrays({name: _spec(tensor) for name, tensor in tensors.items()}, lambda name: view_of(tensors[name]))
    kept, tied = keep_once(arrays, _identities(tensors))
    write_arrays(path, kept, metadata_of("save_weights", inventory, flatten) | tied)


def load_weights(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    strict: bool = True,
    rename: Mapping[str, str] | None = None,
    ignore: str | Iterable[str] = (),
    cast: bool = False,
    flatten: Flatten = None,
    check_options: bool = True,
) -> None:
    """Loads a safetensors file into a model, all of it or nothing. Nothing is unpickled.

    The file is read twice, first to check all of it, and array by array: beside the model, memory is needed for one of
    its tensors. Values that are NaN or infinite are loaded with a warning.

    Args:
        model: whose parameters and buffers are overwritten; they stay the same objects.
        path: of a file by `save_weights` of either package, or of any other safetensors file with torch's names.
        strict: as in `load_arrays`.
        rename: as in `load_arrays`.
        ignore: as in `load_arrays`.
        cast: as in `load_arrays`.
        flatten: as in `to_arrays`; {} takes a file from Flax for one in torch's order.
        check_options: whether options that the file records, such as epsilon, are compared with the model's.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is damaged, or does not fit the model; it says how. Or if Flax wrote it from a network
            that flattens a convolution, and was not told its shape.

    Example:
        >>> import tempfile
        >>> source, target = nn.Linear(3, 2), nn.Linear(3, 2)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_weights(source, f"{folder}/linear.safetensors")
        ...     load_weights(target, f"{folder}/linear.safetensors")
        >>> torch.equal(source.weight, target.weight)
        True
    """
    what = f"load_weights({os.fspath(path)!r})"
    inventory = inventory_of(what, model)
    with open_arrays("load_weights", path) as arrays:
        if check_options:
            recorded = renamed_paths(what, read_json(what, arrays.metadata, "options"), rename, ignore, arrays)
            check_same_options(what, inventory, recorded)
        check_file_flattened(what, inventory, arrays, flatten, "save_weights", rename, ignore)
        _load(what, inventory, arrays, flatten, Choices(strict, rename, ignore, cast))


def _load(what: str, inventory: Inventory, arrays: Arrays, flatten: Flatten, choices: Choices) -> None:
    flatten_sizes(what, inventory, flatten)
    tensors = inventory.weights(what)
    targets = Targets({name: _spec(tensor) for name, tensor in tensors.items()}, _identities(tensors))
    names, dtypes = match_names(what, targets, arrays, choices)
    check_tied_names(what, names, targets.identities, lambda here: arrays[names[here]])
    own = {t.untyped_storage().data_ptr() for t in (*inventory.model.parameters(), *inventory.model.buffers())}
    written = {here: tensors[here] for here in names if tensors[here].numel()}
    check_writable(
        what,
        [name for name, t in written.items() if t.untyped_storage().data_ptr() not in own],
        [name for name, t in written.items() if t.is_inference()],
        [name for name, t in written.items() if any(n > 1 and not s for n, s in zip(t.shape, t.stride(), strict=True))],
    )
    check_integers(what, names, arrays.specs, dtypes, arrays)
    warn_not_finite(what, arrays.not_finite({there: dtypes[here] for here, there in names.items()}))
    with torch.no_grad():
        for here, there in names.items():
            tensors[here].copy_(tensor_of(cast_array(arrays[there], dtypes[here])))


def inventory_of(what: str, model: nn.Module) -> Inventory:
    check_model(what, model, nn.Module, "nn.Linear(3, 2)")
    return Inventory(model)


def _identities(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Returns what is equal for the names of one tensor, and for them only."""
    return {
        name: (t.data_ptr(), t.device, t.dtype, t.shape, t.stride()) if t.numel() else name
        for name, t in tensors.items()
    }


def flatten_sizes(what: str, inventory: Inventory, flatten: Flatten) -> dict[str, Any] | None:
    """Checks that weights are there, and `flatten`, whose layers are known by the options recorded for them."""
    shapes = _shapes(what, inventory)
    return None if flatten is None else check_flatten(what, flatten, linear_sizes(inventory.options, shapes))


def metadata_of(what: str, inventory: Inventory, flatten: Flatten) -> dict[str, str]:
    """Returns what a file records beside the arrays."""
    recorded = {"flatten": flatten_sizes(what, inventory, flatten), "options": inventory.options or None}
    written = {key: json.dumps(value) for key, value in recorded.items() if value is not None}
    return {"framework": "torch", **written}


def check_file_flattened(
    what: str,
    inventory: Inventory,
    arrays: FileArrays,
    flatten: Flatten,
    save: str,
    rename: Mapping[str, str] | None = None,
    ignore: str | Iterable[str] = (),
) -> None:
    """Checks that the rows of a file from Flax are in torch's order.

    They are, if Flax was told about them when the file was written.
    """
    recorded = read_json(what, arrays.metadata, "flatten")
    if arrays.metadata.get("framework") != "flax" or flatten == {} or ("flatten" in arrays.metadata and not recorded):
        return
    recorded = renamed_paths(what, recorded, rename, ignore, arrays)
    shapes = _shapes(what, inventory)
    options = renamed_paths(what, inventory.options, None, ignore, shapes)
    check_flattened(what, options, recorded, linear_sizes(options, shapes), save)
    if "flatten" not in arrays.metadata:
        warn_flattened(what, options, shapes, f" to {save} in Flax")


def _shapes(what: str, inventory: Inventory) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in inventory.weights(what).items()}


def _spec(tensor: Tensor) -> Spec:
    return Spec(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))


def view_of(tensor: Tensor) -> np.ndarray:
    """Returns the tensor's own memory where NumPy can have it."""
    tensor = tensor.detach().cpu().contiguous().resolve_conj().resolve_neg()
    name = str(tensor.dtype).removeprefix("torch.")
    if hasattr(ml_dtypes, name):  # which torch does not hand to NumPy
        integers = {1: torch.uint8, 2: torch.int16}[tensor.element_size()]
        return tensor.view(integers).numpy().view(name)
    return tensor.numpy()


def tensor_of(array: np.ndarray) -> Tensor:
    """Returns the array's own memory, if torch can have it."""
    array = np.require(array, requirements=["C", "W"])
    if hasattr(ml_dtypes, array.dtype.name):
        integers = {1: np.uint8, 2: np.int16}[array.itemsize]
        return torch.from_numpy(array.view(integers)).view(getattr(torch, array.dtype.name))
    return torch.from_numpy(array)
