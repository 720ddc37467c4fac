"""Weights in the common form: torch's names and layouts, as NumPy arrays or one safetensors file."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import reduce
from hashlib import sha256
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from probly_common.checks.values import shown
from probly_common.checks.weights import (
    check_has_values,
    check_integers,
    check_loaded_dtype,
    check_model,
    check_numpy,
    check_together,
    read_json,
    warn_not_finite,
)
from probly_common.weights.files import Arrays, Spec, cast_array, keep_once, open_arrays, specs_of, write_arrays
from probly_common.weights.flatten import check_flatten, check_flattened, linear_sizes, warn_flattened
from probly_common.weights.kinds import check_same_options
from probly_common.weights.match import Choices, Targets, check_tied_names, match_names, renamed_paths
from probly_flax._inventory import Inventory
from probly_flax._layouts import Weight

__all__ = ["Inventory", "load_arrays", "load_weights", "save_weights", "to_arrays"]

Flatten = Mapping[str, Sequence[int]] | None


def to_arrays(model: nnx.Module, *, flatten: Flatten = None) -> dict[str, np.ndarray]:
    """Copies the weights of a model into arrays, by their names in torch's `state_dict`.

    The `state_dict` is that of the model's twin.

    Args:
        model: any module with layers that torch has too, and parameters of its own.
        flatten: `{"fc1": (64, 7, 7)}`, (channels, *spatial) of the output of a convolution that the Linear layer `fc1`
            reads flattened. torch flattens channels first, which is the common form, and Flax channels last: the rows
            of the kernel are put into torch's order; and so is a normalisation between the two, if it is named as well.
            Leave out a layer whose inputs the network transposes itself.

    Returns:
        A new array for every name, tied parameters under each of theirs.

    Raises:
        ValueError: if the model has no values, or flatten does not fit it; or naming every parameter that torch's layer
            has no name for.

    Example:
        >>> {name: array.shape for name, array in to_arrays(nnx.Linear(3, 2, rngs=nnx.Rngs(0))).items()}
        {'weight': (2, 3), 'bias': (2,)}
    """
    return {
        name: np.array(array)
        for name, array in _arrays("to_arrays", weights_of("to_arrays", Inventory(model), flatten)).items()
    }


def load_arrays(
    model: nnx.Module,
    arrays: Mapping[str, np.ndarray],
    *,
    strict: bool = True,
    rename: Mapping[str, str] | None = None,
    ignore: str | Iterable[str] = (),
    cast: bool = False,
    flatten: Flatten = None,
) -> None:
    """Copies arrays into a model, all of them or none.

    Args:
        model: whose variables are given new values; they stay the same objects. It may be abstract.
        arrays: by torch's names, in torch's layouts. Of a tied parameter one name is enough, and `num_batches_tracked`
            may be missing.
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
        >>> source, target = nnx.Linear(3, 2, rngs=nnx.Rngs(0)), nnx.Linear(3, 2, rngs=nnx.Rngs(1))
        >>> load_arrays(target, to_arrays(source))
        >>> bool((source.kernel[...] == target.kernel[...]).all())
        True
    """
    check_numpy("load_arrays", arrays)
    given = Arrays(specs_of(arrays), lambda name: np.asarray(arrays[name]))
    weights = weights_of("load_arrays", Inventory(model), flatten)
    _load("load_arrays", weights, given, Choices(strict, rename, ignore, cast))


def save_weights(model: nnx.Module, path: str | os.PathLike[str], *, flatten: Flatten = None) -> None:
    """Writes one safetensors file, which plain torch and probly_torch.load_weights load too.

    Without this library, `model.load_state_dict(safetensors.torch.load_file(path))` reads it into the twin; or, if that
    has tied weights, which are kept once, `safetensors.torch.load_model(model, path)`. Its metadata has a sha256 of the
    bytes of all arrays, the framework, the options of the layers, such as epsilon, and `flatten`.

    Args:
        model: as in `to_arrays`.
        path: of the file, which is replaced once the new one is complete.
        flatten: as in `to_arrays`. The file records it for load_weights; {} for a network whose rows are in torch's
            order, since None leaves that open, and probly_torch.load_weights asks for it.

    Raises:
        ValueError: if the model has no values or a dtype that safetensors has not, or flatten does not fit it; or
            naming every parameter that torch's layer has no name for.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_weights(nnx.Linear(3, 2, rngs=nnx.Rngs(0)), f"{folder}/linear.safetensors")
    """
    inventory = Inventory(model)
    weights = weights_of("save_weights", inventory, flatten)
    kept, tied = keep_once(_arrays("save_weights", weights), identities_of(weights))
    write_arrays(path, kept, metadata_of(inventory, flatten) | tied)


def load_weights(
    model: nnx.Module,
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

    The file is read twice, first to check all of it, and array by array: beside the model, memory is needed for a few
    copies of one of its arrays, unless the allocator keeps what the old arrays give back. An abstract model,
    `nnx.eval_shape(lambda: Network(rngs=nnx.Rngs(0)))`, has no old arrays. Values that are NaN or infinite are loaded
    with a warning.

    Args:
        model: whose variables are given new values; they stay the same objects. It may be abstract.
        path: of a file by `save_weights` of either package, or of any other safetensors file with torch's names.
        strict: as in `load_arrays`.
        rename: as in `load_arrays`.
        ignore: as in `load_arrays`.
        cast: as in `load_arrays`.
        flatten: as in `to_arrays`; None stands for what the file records, and {} for no layer.
        check_options: whether options that the file records, such as epsilon, are compared with the model's.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is damaged, or does not fit the model; it says how. Or if it comes from a network that
            flattens a convolution, and flatten does not say its shape.

    Example:
        >>> import tempfile
        >>> source, target = nnx.Linear(3, 2, rngs=nnx.Rngs(0)), nnx.Linear(3, 2, rngs=nnx.Rngs(1))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_weights(source, f"{folder}/linear.safetensors")
        ...     load_weights(target, f"{folder}/linear.safetensors")
        >>> bool((source.kernel[...] == target.kernel[...]).all())
        True
    """
    what = f"load_weights({os.fspath(path)!r})"
    inventory = Inventory(model)
    with open_arrays("load_weights", path) as arrays:
        options = renamed_paths(what, read_json(what, arrays.metadata, "options"), rename, ignore, arrays)
        if check_options:
            check_same_options(what, inventory, options)
        own = inventory.options
        if flatten is None and "flatten" in arrays.metadata:
            recorded = read_json(what, arrays.metadata, "flatten")
            known = renamed_paths(what, recorded, rename, ignore, arrays)
            flatten = {path: shape for path, shape in known.items() if path in own} or (None if recorded else {})
        weights = weights_of(what, inventory, flatten)
        if flatten != {}:
            shapes = shapes_of(weights)
            check_flattened(what, options, flatten or {}, linear_sizes(own, shapes))
            if flatten is None and arrays.metadata.get("framework") != "flax":
                warn_flattened(what, renamed_paths(what, own, None, ignore, weights), shapes, "")
        _load(what, weights, arrays, Choices(strict, rename, ignore, cast))


def _load(what: str, weights: Mapping[str, Weight], arrays: Arrays, choices: Choices) -> None:
    specs = {name: spec_of(weight) for name, weight in weights.items()}
    identities = identities_of(weights)
    targets = Targets(specs, identities, {name: weight.dtypes for name, weight in weights.items()})
    names, dtypes = match_names(what, targets, arrays, choices)
    for here, dtype in dtypes.items():
        if weights[here].variables:
            check_loaded_dtype(what, here, dtype, jax.dtypes.canonicalize_dtype(dtype).name)
        check_together(what, here, [name for name in weights[here].also if name not in names])

    def parts(here: str) -> Sequence[np.ndarray]:
        of_torch = [cast_array(arrays[names[name]], dtypes[name]) for name in (here, *weights[here].also)]
        return weights[here].from_torch(*of_torch)

    def flat(here: str) -> np.ndarray:
        return np.concatenate([part.reshape(-1) for part in parts(here)])

    check_tied_names(what, names, {name: identity[:-1] for name, identity in identities.items()}, flat)
    check_integers(what, names, arrays.specs, dtypes, arrays)

    def put(here: str) -> None:
        for variable, array in zip(weights[here].variables, parts(here), strict=True):
            kept = None if weights[here].dtypes else variable.dtype
            set_variable(variable, np.asarray(array, kept) if arrays.fresh else np.array(array, kept))

    for here in names:
        if weights[here].refuses:
            try:
                parts(here)
            except ValueError as error:
                raise ValueError(f"{what} cannot load {shown(here)}: {error}") from error
    warn_not_finite(what, arrays.not_finite({there: dtypes[here] for here, there in names.items()}))
    hooked = [here for here in names if any(map(_is_hooked, weights[here].variables))]
    old = [(variable, variable.get_raw_value()) for here in hooked for variable in weights[here].variables]
    try:
        for here in hooked:
            put(here)
    except BaseException:
        for variable, value in old:
            variable.set_raw_value(value)
        raise
    for here in reversed([here for here in names if here not in hooked]):  # where the C library gives freed memory
        put(here)  # back: at the end of its heap


def set_variable(variable: nnx.Variable, array: np.ndarray) -> None:
    """Takes the array, whose memory may become the variable's."""
    # Its dtype is named, since JAX compiles a program for every shape otherwise.
    value = jnp.asarray(array, jax.dtypes.canonicalize_dtype(array.dtype))
    old = variable.get_value()
    # Only then: a jitted step would compile again for arrays that are tied to a device.
    placed = isinstance(old, jax.Array) and not isinstance(old, jax.core.Tracer) and old.committed
    variable.set_value(jax.device_put(value, old.sharding) if placed else value)


def _is_hooked(variable: Any) -> bool:
    """Tells whether setting the variable's value runs code of the user, which may raise."""
    if not isinstance(variable, nnx.Variable):
        return False
    return type(variable).set_value is not nnx.Variable.set_value or "on_set_value" in variable.get_metadata()


def _arrays(what: str, weights: Mapping[str, Weight]) -> Arrays:
    values = {name: [variable.get_value() for variable in weight.variables] for name, weight in weights.items()}
    abstract = [name for name, own in values.items() if any(isinstance(v, jax.ShapeDtypeStruct) for v in own)]
    check_has_values(what, abstract)
    return Arrays(
        {name: spec_of(weight) for name, weight in weights.items()},
        lambda name: np.asarray(weights[name].to_torch(*map(np.asarray, values[name]))),
    )


def weights_of(what: str, inventory: Inventory, flatten: Flatten = None) -> dict[str, Weight]:
    """Returns every weight by torch's names, with the rows that torch has for flattened channels."""
    check_model(what, inventory.model, nnx.Module, "nnx.Linear(3, 2, rngs=nnx.Rngs(0))")
    weights = inventory.weights(what)
    if flatten:
        for path, shape in check_flatten(what, flatten, linear_sizes(inventory.options, shapes_of(weights))).items():
            prefix = f"{path}." if path else ""
            names = [f"{prefix}{own}" for own in ("weight", "bias", "running_mean", "running_var")]
            if inventory.options[path]["kind"] == "Linear":
                names = [names[0], f"{prefix}r", f"{prefix.removesuffix('base_layer.')}lora_A.default.weight"]
            weights |= {name: _flattened(weights[name], shape) for name in names if name in weights}
    return weights


def metadata_of(inventory: Inventory, flatten: Flatten) -> dict[str, str]:
    """Returns what a file records beside the arrays."""
    sizes = flatten if flatten is None else {path: [int(size) for size in shape] for path, shape in flatten.items()}
    recorded = {"flatten": sizes, "options": inventory.options or None}
    written = {key: json.dumps(value) for key, value in recorded.items() if value is not None}
    return {"framework": "flax", **written}


def shapes_of(weights: Mapping[str, Weight]) -> dict[str, tuple[int, ...]]:
    return {name: spec_of(weight).shape for name, weight in weights.items()}


def _flattened(weight: Weight, shape: Sequence[int]) -> Weight:
    """Reorders the last axis, which runs over (channels, *spatial) in torch and (*spatial, channels) in Flax."""
    channels, *spatial = shape
    first = -1 - len(spatial)

    def to_torch(*arrays: np.ndarray) -> np.ndarray:
        array = weight.to_torch(*arrays)
        return np.moveaxis(array.reshape(*array.shape[:-1], *spatial, channels), -1, first).reshape(array.shape)

    def from_torch(array: np.ndarray, *also: np.ndarray) -> Sequence[np.ndarray]:
        shaped = array.reshape(*array.shape[:-1], channels, *spatial)
        return weight.from_torch(np.moveaxis(shaped, first, -1).reshape(array.shape), *also)

    return weight._replace(to_torch=to_torch, from_torch=from_torch)


def identities_of(weights: Mapping[str, Weight]) -> dict[str, Any]:
    """Returns what is equal for the names of one parameter in one layout, and for them only.

    Without its last element, it is equal for the names of one parameter in any layout.
    """
    found = {name: tuple(map(id, weight.variables)) or (name,) for name, weight in weights.items()}
    shared = {own for own, count in Counter(found.values()).items() if count > 1}
    return {name: (*own, _layout(weights[name]) if own in shared else "") for name, own in found.items()}


def _layout(weight: Weight) -> str:
    """Returns a digest of what torch's layout makes of numbers that tell the axes apart."""
    numbers = (np.resize(np.arange(251, dtype=np.uint8), variable.shape) for variable in weight.variables)
    array = weight.to_torch(*numbers)
    return sha256(repr(array.shape).encode() + array.astype(np.uint8).tobytes()).hexdigest()


def spec_of(weight: Weight) -> Spec:
    """Returns shape and dtype, without the values."""
    array = weight.to_torch(*(np.broadcast_to(np.int8(0), variable.shape) for variable in weight.variables))
    dtypes = weight.dtypes[:1] or [variable.dtype.name for variable in weight.variables] or [array.dtype.name]
    return Spec(array.shape, np.dtype(reduce(np.promote_types, dtypes)).name)
