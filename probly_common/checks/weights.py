"""Checks of weights that are loaded or saved.

Names come from files, and are shown as text that has no way to act: cut, and quoted where they hold anything but
letters, digits, dots and dashes.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from probly_common.checks.values import shown, type_name

Specs = Mapping[str, tuple[tuple[int, ...], str]]  # shape and dtype by name

MAX_LINES = 2000


def castable(dtype: str, to: str) -> bool:
    """Tells whether the cast is between floating-point numbers, or between integers."""
    return any(kind in dtype and kind in to for kind in ("float", "int"))


def weight_name(path: str) -> str:
    return f"{path}.weight" if path else "weight"


def check_numpy(what: str, arrays: Any) -> None:
    if not isinstance(arrays, Mapping):
        raise TypeError(f"{what} expects arrays by name; got {type_name(arrays)}. Pass to_arrays(model).")
    if isinstance(arrays.get("state_dict"), Mapping):
        raise TypeError(
            f"{what} expects arrays by name; got a checkpoint that holds them as its state_dict. Call "
            f'load_arrays(model, checkpoint["state_dict"], rename={{r"^model\\.": ""}}).'
        )
    for name, array in arrays.items():
        if not isinstance(name, str):
            raise TypeError(f"{what} expects arrays by name, a string; got {shown(repr(name))}. Pass to_arrays(model).")
        if not hasattr(getattr(array, "dtype", None), "name"):
            raise TypeError(
                f"{what} expects NumPy arrays by name; got {type_name(array)} for {shown(str(name))}. Pass "
                f"to_arrays(model)."
            )


def check_model(what: str, model: Any, kind: type, example: str) -> None:
    if not isinstance(model, kind):
        raise TypeError(
            f"{what} expects a Module of {kind.__module__.partition('.')[0]}; got {type_name(model)}. Pass {example}."
        )


def check_tensors(what: str, others: Sequence[str], sparse: Sequence[str]) -> None:
    """Refuses weights that are packed, or sparse, which have no form that another framework reads."""
    if others or sparse:
        raise ValueError(
            f"{what} expects a state_dict of dense tensors; got another kind in {shown((*others, *sparse)[0])}. "
            f"Take the model before it is quantised; make a sparse tensor dense: tensor.to_dense()."
        )


def check_writable(what: str, copies: Sequence[str], inference: Sequence[str], expanded: Sequence[str]) -> None:
    """Refuses copies, and tensors that cannot be written to.

    What a state_dict gives is the memory of the model itself, and may be written to.
    """
    if copies:
        raise ValueError(
            f"{what} expects a state_dict of the parameters and buffers themselves; got copies, such as "
            f"{shown(copies[0])}, and loaded nothing. Let the module load itself: model.load_state_dict(tensors)."
        )
    if inference or expanded:
        reason = "made under torch.inference_mode()" if inference else "expanded, whose elements share memory"
        name = (*inference, *expanded)[0]
        raise ValueError(
            f"{what} expects tensors that can be written to; got {shown(name)}, which is {reason}, and loaded nothing. "
            f"Give the model a tensor of its own: tensor.clone()."
        )


def check_materialized(what: str, names: Sequence[str]) -> None:
    if names:
        raise ValueError(
            f"{what} expects a model with memory to load into; got meta tensors, such as {names[0]}. Call "
            f"model.to_empty(device='cpu') first."
        )


def check_has_values(what: str, names: Sequence[str]) -> None:
    if names:
        raise ValueError(
            f"{what} expects a model with values; got one without values for {names[0]}. Load them first: "
            f"load_weights(model, path)."
        )


def check_together(what: str, name: str, others: Sequence[str]) -> None:
    if others:
        raise ValueError(
            f"{what} expects {name} and {', '.join(others)} together, which are one parameter in Flax; got only "
            f"the first. Leave both out: ignore={[name, *others]!r}."
        )


def check_loaded_dtype(what: str, name: str, dtype: str, loaded: str) -> None:
    if dtype != loaded:
        raise ValueError(
            f"{what} expects to keep the dtype of {name}, {dtype}; got {loaded}, which JAX makes of it unless 64-bit "
            f"types are on. Call it under jax.enable_x64(True)."
        )


def check_integers(
    what: str, names: Mapping[str, str], specs: Specs, dtypes: Mapping[str, str], arrays: Mapping[str, Any]
) -> None:
    """Raises unless integers that are converted fit."""
    for here, there in names.items():
        if dtypes[here] != specs[there][1] and "int" in dtypes[here]:
            array = arrays[there]
            if (array.astype(dtypes[here]) != array).any():
                raise ValueError(
                    f"{what} expects integers of {shown(here)} that fit into {dtypes[here]}; got {array.min()} to "
                    f"{array.max()}, and loaded nothing. Leave them out: ignore=[{here[:100]!r}]."
                )


def read_json(what: str, metadata: Mapping[str, str], key: str) -> dict[str, Any]:
    """Reads what a file records of its model. That is nothing, if it was written by others."""
    text = metadata.get(key, "{}")
    try:
        recorded = json.loads(text)
    except (ValueError, RecursionError):
        recorded = None
    if not isinstance(recorded, dict):
        raise ValueError(
            f"{what} expects JSON, {{path: ...}}, in the metadata called {key}; got {shown(text)}. Write the "
            f"file again with save_weights(model, path)."
        )
    return recorded


def warn_not_finite(what: str, names: Sequence[str]) -> None:
    if names:
        warnings.warn(
            f"{what} loads arrays with values that are NaN or infinite, in the dtype they have here:\n"
            f"{listed([f'  {shown(name)}' for name in names])}\nTo keep the model's own, name them: "
            f"ignore=[{names[0][:100]!r}].",
            stacklevel=4,
        )


def listed(lines: Sequence[str]) -> str:
    more = len(lines) - MAX_LINES
    return "\n".join(sorted(lines)[:MAX_LINES] + [f"  and {more} more"] * (more > 0))
