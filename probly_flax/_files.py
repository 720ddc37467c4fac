"""Weights on disk: safetensors, written whole or not at all. The same file, byte for byte, in both packages."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from uuid import uuid4

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save


def write_arrays(path: str | os.PathLike[str], arrays: Mapping[str, np.ndarray]) -> None:
    """Writes to a temporary file beside the path, and moves it into place once it is complete."""
    path = Path(path)
    # safetensors writes the memory of an array as it lies, whatever its strides
    data = save({name: np.asarray(array, order="C") for name, array in arrays.items()})
    temporary = path.with_name(f".{path.name}.{uuid4().hex}")
    try:
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read_arrays(what: str, path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(
            f"{what} expects a whole safetensors file; got {os.fspath(path)}, which cannot be read: {error}. Write it "
            f"with save_weights(model, path)."
        ) from error
