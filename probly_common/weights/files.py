"""Reads and writes arrays on disk: safetensors, written whole or not at all, and read one by one."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple
from uuid import uuid4

import ml_dtypes  # noqa: F401  gives NumPy the names of its dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from probly_common.checks.values import shown

BLOCK = 2**20

DTYPES = {  # what safetensors calls the dtypes of NumPy and ml_dtypes
    "bool": "BOOL",
    **{f"{sign}int{bits}": f"{sign or 'i'}{bits}".upper() for sign in ("", "u") for bits in (8, 16, 32, 64)},
    **{f"float{bits}": f"F{bits}" for bits in (16, 32, 64)},
    "bfloat16": "BF16",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "complex64": "C64",
}

METADATA = ("format", "framework", "sha256", "options", "flatten")  # of our files; other entries name tied arrays


class Spec(NamedTuple):
    """The shape and dtype of an array, without its values. The dtype is the name that NumPy or ml_dtypes has for it."""

    shape: tuple[int, ...]
    dtype: str


class Arrays(Mapping[str, np.ndarray]):
    """Arrays by name, each made when it is asked for. What they are is known before."""

    tied: Mapping[str, str] = {}  # other names of an array, by which it may be asked for as well
    fresh = False  # whether each is in memory of its own, which nothing else refers to

    def __init__(self, specs: Mapping[str, Spec], read: Callable[[str], np.ndarray]) -> None:
        self.specs, self._read = specs, read

    def __getitem__(self, name: str) -> np.ndarray:
        return self._read(name)

    def __contains__(self, name: object) -> bool:
        return name in self.specs

    def __iter__(self) -> Iterator[str]:
        return iter(self.specs)

    def __len__(self) -> int:
        return len(self.specs)

    def not_finite(self, dtypes: Mapping[str, str]) -> list[str]:
        """Returns the names of arrays that do not fit the range of the dtype that they are to have."""
        cast = {name: dtype for name, dtype in dtypes.items() if dtype != self.specs[name].dtype}
        return [name for name, dtype in cast.items() if not is_finite(cast_array(self[name], dtype))]


class FileArrays(Arrays):
    """The arrays of a safetensors file, and its metadata.

    A tied array is kept once, and has its other names in the metadata, `{other name: name}`, as in the files of
    `safetensors.torch.save_model`.
    """

    fresh = True

    def __init__(self, file: BinaryIO, header: dict[str, Any], start: int, refuse: Callable[[str], ValueError]) -> None:
        self.metadata: dict[str, str] = header.pop("__metadata__", None) or {}
        self.tied = {
            alias: name
            for alias, name in self.metadata.items()
            if name in header and alias not in header and alias not in METADATA
        }
        names = {code: name for name, code in DTYPES.items()}
        unknown = sorted({entry["dtype"] for entry in header.values()} - names.keys())
        if unknown:
            raise refuse(f"it has arrays of dtypes that NumPy does not know, {', '.join(unknown)}")
        specs = {name: Spec(tuple(entry["shape"]), names[entry["dtype"]]) for name, entry in header.items()}
        self._ranges = {name: [start + end for end in entry["data_offsets"]] for name, entry in header.items()}
        self._file, self._refuse = file, refuse
        super().__init__(specs | {alias: specs[name] for alias, name in self.tied.items()}, self._array)

    def not_finite(self, dtypes: Mapping[str, str]) -> list[str]:
        """Reads all of the file once, against the sha256 that it records if it does.

        Returns:
            The names, of those that are to have these dtypes, of arrays with values that are then NaN or infinite.
        """
        digest = hashlib.sha256()
        found = []
        with ThreadPoolExecutor(1) as thread:  # hashing takes longest, and goes on while the next block is read
            hashed = thread.submit(digest.update, b"")
            for name, (start, end) in sorted(self._ranges.items(), key=lambda item: item[1]):
                finite = True
                for position in range(start, end, BLOCK):
                    block = self._bytes(position, min(BLOCK, end - position))
                    hashed.result()
                    hashed = thread.submit(digest.update, block.data)
                    if name in dtypes and finite:
                        finite = is_finite(cast_array(block.view(self.specs[name].dtype), dtypes[name]))
                if not finite:
                    found.append(name)
        recorded = self.metadata.get("sha256", digest.hexdigest())
        if recorded != digest.hexdigest():
            raise self._refuse(f"the sha256 of its bytes is {digest.hexdigest()}, not {shown(recorded)}, as it says")
        return found

    def _array(self, name: str) -> np.ndarray:
        start, end = self._ranges[self.tied.get(name, name)]
        shape, dtype = self.specs[name]
        return self._bytes(start, end - start).view(dtype).reshape(shape)

    def _bytes(self, start: int, size: int) -> np.ndarray:
        data = _empty(size)
        self._file.seek(start)
        if self._file.readinto(data.data) != size:  # type: ignore[attr-defined]
            raise self._refuse("it became shorter while it was read")
        return data


@contextmanager
def open_arrays(what: str, path: str | os.PathLike[str]) -> Iterator[FileArrays]:
    """Reads the header only. safetensors checks it: the arrays it describes fill the file without gap or overlap."""

    def refuse(reason: str) -> ValueError:
        return ValueError(
            f"{what} expects a whole safetensors file; got {os.fspath(path)}, which cannot be read: {reason}. Write it "
            f"with save_weights(model, path)."
        )

    with open(path, "rb") as file:
        start = 8 + int.from_bytes(file.read(8), "little")
        try:
            with safe_open(path, framework="np"):
                pass
            header = json.loads(file.read(start - 8), object_pairs_hook=_distinct)
        except (SafetensorError, ValueError) as error:
            file.seek(0)
            pickled = file.read(2) in (b"PK", b"\x80\x02", b"\x80\x04", b"\x80\x05")
            pickle = (
                "it looks like a pickle, which is never read: pass torch.load(path, weights_only=True) to load_arrays"
            )
            raise refuse(pickle if pickled else shown(str(error), 300)) from error
        yield FileArrays(file, header, start, refuse)


def write_arrays(
    path: str | os.PathLike[str], arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None
) -> None:
    """Writes to a temporary file beside the path, array by array, and moves it into place once it is complete."""
    specs = specs_of(arrays)
    _check_writable(path, specs)
    names = sorted(specs, key=lambda name: (-np.dtype(specs[name].dtype).itemsize, name))  # so that each is aligned
    digest = hashlib.sha256()
    temporary = Path(path).with_name(f".{uuid4().hex}")
    try:
        with temporary.open("xb") as file:
            file.write(_header(names, specs, {**(metadata or {}), "format": "pt", "sha256": "0" * 64}))
            for name in names:
                data = _raw(arrays[name].astype(specs[name].dtype, copy=False)).data  # in this machine's byte order
                digest.update(data)
                file.write(data)
            file.seek(0)
            file.write(_header(names, specs, {**(metadata or {}), "format": "pt", "sha256": digest.hexdigest()}))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def specs_of(arrays: Mapping[str, Any]) -> Mapping[str, Spec]:
    """Returns what each array is, without making it where it need not be made."""
    if isinstance(arrays, Arrays):
        return arrays.specs
    return {name: Spec(tuple(array.shape), array.dtype.name) for name, array in arrays.items()}


def contiguous(array: np.ndarray) -> np.ndarray:
    """Copies as np.ascontiguousarray does, strip by strip.

    This is up to four times as fast for a transpose, whose rows stay in the cache.
    """
    if array.flags.c_contiguous or array.nbytes < BLOCK:
        return np.ascontiguousarray(array)
    copy = _empty(array.nbytes).view(array.dtype).reshape(array.shape)
    axis = int(np.argmax(np.abs(array.strides)))
    for start in range(0, array.shape[axis], 64):
        strip = (*[slice(None)] * axis, slice(start, start + 64))
        copy[strip] = array[strip]
    return copy


def _empty(size: int) -> np.ndarray:
    """Returns bytes at an address that is a multiple of 64.

    JAX takes an array there as it is, and need not copy it.
    """
    data = np.empty(size + 63, np.uint8)
    start = -data.ctypes.data % 64
    return data[start : start + size]


def cast_array(array: np.ndarray, dtype: str) -> np.ndarray:
    with np.errstate(over="ignore", invalid="ignore"):  # is_finite finds what is out of range
        return array.astype(dtype, copy=False)


def is_finite(array: np.ndarray) -> bool:
    if array.dtype.kind in "biu":
        return True
    if array.itemsize > 2:
        return bool(np.isfinite(array).all())
    # NumPy is slow with 16 bits. The bits of values that are finite are below those of infinity, but for the sign.
    bits, without_sign = f"u{array.itemsize}", 2 ** (8 * array.itemsize - 1) - 1
    infinity = np.array(np.inf, array.dtype).view(bits) & np.array(without_sign, bits)
    return bool((array.view(bits) & np.array(without_sign, bits)).max(initial=0) < infinity)


def keep_once(arrays: Arrays, identities: Mapping[str, Any]) -> tuple[Arrays, dict[str, str]]:
    """Returns arrays without those that are tied to one before them, and the names of these, as metadata has them."""
    first: dict[Any, str] = {}
    for name in sorted(arrays):
        first.setdefault(identities[name], name)
    others = {name: first[identities[name]] for name in arrays if first[identities[name]] != name}
    tied = {
        name: kept
        for name, kept in others.items()
        if name not in METADATA and np.array_equal(_raw(arrays[name]), _raw(arrays[kept]))
    }
    return Arrays({name: spec for name, spec in arrays.specs.items() if name not in tied}, arrays.__getitem__), tied


def _raw(array: np.ndarray) -> np.ndarray:
    """Returns the bytes of what an array shows, whatever its strides."""
    return contiguous(array).reshape(-1).view(np.uint8)


def _check_writable(path: str | os.PathLike[str], specs: Mapping[str, Spec]) -> None:
    problems = [
        f"{shown(name)} of {spec.dtype}"
        for name, spec in specs.items()
        if spec.dtype not in DTYPES or name == "__metadata__"
    ]
    if problems:
        raise ValueError(
            f"A safetensors file expects arrays of {', '.join(DTYPES)}, under names other than __metadata__; got "
            f"{', '.join(problems)} for {os.fspath(path)}. Convert them: model.to(torch.float32)."
        )


def _header(names: Collection[str], specs: Mapping[str, Spec], metadata: Mapping[str, str]) -> bytes:
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
    end = 0
    for name in names:
        shape, dtype = specs[name]
        start, end = end, end + int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
        header[name] = {"dtype": DTYPES[dtype], "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name is in its header twice")
    return found
