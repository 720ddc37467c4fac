"""Weights in the common form: torch's names and layouts, as NumPy arrays or one safetensors file."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
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
from probly_common.weights.match import check_tied_names, match_names, renamed_paths
from probly_flax import _options
from probly_flax._torch_names import torch_rules
from probly_flax.layers._common import Rule

__all__ = ["load_arrays", "load_weights", "save_weights", "to_arrays"]

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
    return {name: np.array(array) for name, array in _arrays("to_arrays", model, flatten).items()}


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
    rules = dict(_rules("load_arrays", model, flatten))
    _load("load_arrays", rules, given, strict=strict, rename=rename, ignore=ignore, cast=cast)


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
    rules = dict(_rules("save_weights", model, flatten))
    kept, tied = keep_once(_arrays("save_weights", model, flatten), _identities(rules))
    write_arrays(path, kept, _metadata(model, flatten) | tied)


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
    with open_arrays("load_weights", path) as arrays:
        options = renamed_paths(what, read_json(what, arrays.metadata, "options"), rename, ignore, arrays)
        if check_options:
            _options.check_options(what, model, options)
        own = _options.layer_options(model)
        if flatten is None and "flatten" in arrays.metadata:
            recorded = read_json(what, arrays.metadata, "flatten")
            known = renamed_paths(what, recorded, rename, ignore, arrays)
            flatten = {path: shape for path, shape in known.items() if path in own} or (None if recorded else {})
        rules = dict(_rules(what, model, flatten))
        if flatten != {}:
            shapes = _shapes(rules)
            check_flattened(what, options, flatten or {}, linear_sizes(own, shapes))
            if flatten is None and arrays.metadata.get("framework") != "flax":
                warn_flattened(what, renamed_paths(what, own, None, ignore, rules), shapes, "")
        _load(what, rules, arrays, strict=strict, rename=rename, ignore=ignore, cast=cast)


def _load(what: str, rules: Mapping[str, Rule], arrays: Arrays, **options: Any) -> None:
    expected = {name: _spec(rule) for name, rule in rules.items()}
    identities = _identities(rules)
    dtypes = {name: rule.dtypes for name, rule in rules.items()}
    names = match_names(what, expected, arrays.specs, identities, dtypes, arrays.tied, **options)
    names = {here: arrays.tied.get(there, there) for here, there in names.items()}
    given = {here: arrays.specs[there].dtype for here, there in names.items()}
    final = {here: dtype if dtype in dtypes[here] else expected[here].dtype for here, dtype in given.items()}
    for here, dtype in final.items():
        if rules[here].variables:
            check_loaded_dtype(what, here, dtype, jax.dtypes.canonicalize_dtype(dtype).name)
        check_together(what, here, [name for name in rules[here].also if name not in names])

    def parts(here: str) -> Sequence[np.ndarray]:
        of_torch = [cast_array(arrays[names[name]], final[name]) for name in (here, *rules[here].also)]
        return rules[here].from_torch(*of_torch)

    def flat(here: str) -> np.ndarray:
        return np.concatenate([part.reshape(-1) for part in parts(here)])

    check_tied_names(what, names, {name: identity[:-1] for name, identity in identities.items()}, flat)
    check_integers(what, names, arrays.specs, final, arrays)

    def put(here: str) -> None:
        for variable, array in zip(rules[here].variables, parts(here), strict=True):
            kept = None if rules[here].dtypes else variable.dtype
            _set(variable, np.asarray(array, kept) if arrays.fresh else np.array(array, kept))

    for here in names:
        if rules[here].refuses:
            try:
                parts(here)
            except ValueError as error:
                raise ValueError(f"{what} cannot load {shown(here)}: {error}") from error
    warn_not_finite(what, arrays.not_finite({there: final[here] for here, there in names.items()}))
    hooked = [here for here in names if any(map(_is_hooked, rules[here].variables))]
    old = [(variable, variable.get_raw_value()) for here in hooked for variable in rules[here].variables]
    try:
        for here in hooked:
            put(here)
    except BaseException:
        for variable, value in old:
            variable.set_raw_value(value)
        raise
    for here in reversed([here for here in names if here not in hooked]):  # where the C library gives freed memory
        put(here)  # back: at the end of its heap


def _set(variable: nnx.Variable, array: np.ndarray) -> None:
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


def _arrays(what: str, model: nnx.Module, flatten: Flatten) -> Arrays:
    rules = dict(_rules(what, model, flatten))
    values = {name: [variable.get_value() for variable in rule.variables] for name, rule in rules.items()}
    abstract = [name for name, own in values.items() if any(isinstance(v, jax.ShapeDtypeStruct) for v in own)]
    check_has_values(what, abstract)
    return Arrays(
        {name: _spec(rule) for name, rule in rules.items()},
        lambda name: np.asarray(rules[name].to_torch(*map(np.asarray, values[name]))),
    )


def _rules(what: str, model: nnx.Module, flatten: Flatten = None) -> Iterator[tuple[str, Rule]]:
    """Yields every weight under every name that it has in torch.

    The weights of a layer that is used twice have two names.
    """
    check_model(what, model, nnx.Module, "nnx.Linear(3, 2, rngs=nnx.Rngs(0))")
    rules = dict(torch_rules(what, model))
    if flatten:
        options = _options.layer_options(model)
        for path, shape in check_flatten(what, flatten, linear_sizes(options, _shapes(rules))).items():
            prefix = f"{path}." if path else ""
            names = [f"{prefix}{own}" for own in ("weight", "bias", "running_mean", "running_var")]
            if options[path]["kind"] == "Linear":
                names = [names[0], f"{prefix}r", f"{prefix.removesuffix('base_layer.')}lora_A.default.weight"]
            for name in names:
                if name in rules:
                    rules[name] = _flattened(rules[name], shape)
    yield from rules.items()


def _metadata(model: nnx.Module, flatten: Flatten) -> dict[str, str]:
    sizes = flatten if flatten is None else {path: [int(size) for size in shape] for path, shape in flatten.items()}
    recorded = {"flatten": sizes, "options": _options.layer_options(model) or None}
    written = {key: json.dumps(value) for key, value in recorded.items() if value is not None}
    return {"framework": "flax", **written}


def _shapes(rules: Mapping[str, Rule]) -> dict[str, tuple[int, ...]]:
    return {name: _spec(rule).shape for name, rule in rules.items()}


def _flattened(rule: Rule, shape: Sequence[int]) -> Rule:
    """Reorders the last axis, which runs over (channels, *spatial) in torch and (*spatial, channels) in Flax."""
    channels, *spatial = shape
    first = -1 - len(spatial)

    def to_torch(*arrays: np.ndarray) -> np.ndarray:
        array = rule.to_torch(*arrays)
        return np.moveaxis(array.reshape(*array.shape[:-1], *spatial, channels), -1, first).reshape(array.shape)

    def from_torch(array: np.ndarray, *also: np.ndarray) -> Sequence[np.ndarray]:
        shaped = array.reshape(*array.shape[:-1], channels, *spatial)
        return rule.from_torch(np.moveaxis(shaped, first, -1).reshape(array.shape), *also)

    return rule._replace(to_torch=to_torch, from_torch=from_torch)


def _identities(rules: Mapping[str, Rule]) -> dict[str, Any]:
    """Returns what is equal for the names of one parameter in one layout, and for them only.

    Without its last element, it is equal for the names of one parameter in any layout.
    """
    found = {name: tuple(map(id, rule.variables)) or (name,) for name, rule in rules.items()}
    shared = {own for own, count in Counter(found.values()).items() if count > 1}
    return {name: (*own, _layout(rules[name]) if own in shared else "") for name, own in found.items()}


def _layout(rule: Rule) -> str:
    """Returns a digest of what torch's layout makes of numbers that tell the axes apart."""
    numbers = (np.resize(np.arange(251, dtype=np.uint8), variable.shape) for variable in rule.variables)
    array = rule.to_torch(*numbers)
    return sha256(repr(array.shape).encode() + array.astype(np.uint8).tobytes()).hexdigest()


def _spec(rule: Rule) -> Spec:
    """Returns shape and dtype, without the values."""
    array = rule.to_torch(*(np.broadcast_to(np.int8(0), variable.shape) for variable in rule.variables))
    dtypes = rule.dtypes[:1] or [variable.dtype.name for variable in rule.variables] or [array.dtype.name]
    return Spec(array.shape, np.dtype(reduce(np.promote_types, dtypes)).name)
