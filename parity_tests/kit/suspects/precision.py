"""Suspects for a step in a lower precision than that of the inputs."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
from flax import nnx

from parity_tests.kit.suspects.options import fast_variance
from parity_tests.kit.suspects.trial import Court, LayerPair, Suspect, Trial, forward, run_torch, sentence, split_call
from parity_tests.kit.trees import is_floating, mapped
from parity_tests.standard import UNIT_ROUNDOFF, precision_limit

_UNITS = UNIT_ROUNDOFF["float64"] / UNIT_ROUNDOFF["float32"]
_WIDTHS = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}


def suspects(pair: LayerPair, wide: str) -> Iterator[Suspect]:
    """Yields what the program of Flax's layer casts down to, below the wide dtype."""
    narrow = _narrow(pair, wide)
    options = {name: jnp.dtype(dtype).name for _, name, dtype in _options(pair.flax, wide)}
    if options:
        shown = ", ".join(f"{name}={value}" for name, value in options.items())
        remedy = ", ".join(f"{name}={wide}" for name in options)
        yield Suspect(f"nnx computes with {shown}", remedy, lambda trial: _widen_options(trial.layer, wide))
    if narrow:
        said = f"nnx computes in {' and '.join(narrow)}: its program casts to it, or starts from it, for a {wide} layer"
        yield Suspect(said, f"every step in {wide}", lambda trial: _widen(trial, wide))


def cause(pair: LayerPair) -> str | None:
    """Explains a layer in float32, by the distance of both from torch in float64."""
    inputs = mapped((pair.torch_args, pair.torch_kwargs), lambda v: v.double() if is_floating(v) else v)
    court = Court(replace(pair, torch_outputs=run_torch(copy.deepcopy(pair.torch).double(), *inputs)))
    noise, original = (
        court.distance(court.pair.torch_outputs, outputs) * _UNITS
        for outputs in (pair.torch_outputs, pair.flax_outputs)
    )
    limit = precision_limit(noise)
    for suspect in (*fast_variance(pair), *suspects(pair, "float32")):
        left = court.left(suspect) * _UNITS
        if left <= limit < original:
            return sentence(suspect.said, suspect.remedy, left, unit="float32")
    return None


def _is_below(dtype: Any, wide: str) -> bool:
    return _WIDTHS.get(_name(dtype), 9) < _WIDTHS[wide]


def _name(dtype: Any) -> str:
    return str(getattr(dtype, "name", getattr(dtype, "__name__", dtype)))


def _options(layer: nnx.Module, wide: str) -> list[tuple[Any, str, Any]]:
    """Returns the options that ask for less: the module, the name and the dtype."""
    names = ("dtype", "preferred_element_type")
    given = [(module, name, getattr(module, name, None)) for _, module in nnx.iter_modules(layer) for name in names]
    return [each for each in given if each[2] is not None and _is_below(each[2], wide)]


def _widen_options(layer: nnx.Module, wide: str) -> None:
    for module, name, _ in _options(layer, wide):
        setattr(module, name, jnp.dtype(wide))


def _program(layer: nnx.Module, args: Any, kwargs: Any) -> tuple[Any, list[Any], Any]:
    """Returns the jaxpr of a call, the arrays that it takes, and the tree that it gives."""
    fixed, arrays = split_call(layer, args, kwargs)
    jaxpr, shape = jax.make_jaxpr(partial(forward, fixed), return_shape=True)(*arrays)
    return jaxpr, jax.tree.leaves(arrays), jax.tree.structure(shape)


def _narrow(pair: LayerPair, wide: str) -> list[str]:
    try:
        jaxpr, _, _ = _program(nnx.clone(pair.flax), pair.flax_args, pair.flax_kwargs)
    except Exception:  # of the user's layer, under a trace
        return []
    found = {str(v.aval.dtype) for each in _jaxprs(jaxpr.jaxpr) for eqn in each.eqns for v in eqn.outvars}
    return sorted(name for name in found if _is_below(name, wide))


def _jaxprs(jaxpr: Any) -> Iterator[Any]:
    yield jaxpr
    for eqn in jaxpr.eqns:
        for inner in _inner(eqn):
            yield from _jaxprs(inner.jaxpr if hasattr(inner, "consts") else inner)


def _inner(eqn: Any) -> list[Any]:
    return [value for value in eqn.params.values() if hasattr(value, "eqns")]


def _widen(trial: Trial, wide: str) -> None:
    """Replaces the layer by its program with every floating number in the wide dtype."""
    jaxpr, arrays, tree = _program(trial.layer, trial.args, trial.kwargs)
    outputs = jax.tree.unflatten(tree, _evaluate(jaxpr.jaxpr, jaxpr.consts, arrays, wide))
    trial.layer, trial.args, trial.kwargs = _Constant(outputs), (), {}


class _Constant(nnx.Module):
    """A layer that has been computed."""

    def __init__(self, outputs: Any) -> None:
        self.outputs = nnx.data(outputs)

    def __call__(self) -> Any:
        """Returns the outputs."""
        return self.outputs


def _wider(value: Any, wide: str) -> Any:
    array = jnp.asarray(value) if not hasattr(value, "dtype") else value
    return jnp.asarray(array).astype(wide) if jnp.issubdtype(array.dtype, jnp.floating) else array


def _evaluate(jaxpr: Any, consts: list[Any], arrays: list[Any], wide: str) -> list[Any]:
    values: dict[Any, Any] = {}

    def read(var: Any) -> Any:
        return _wider(var.val, wide) if isinstance(var, jax.extend.core.Literal) else values[var]

    def write(variables: list[Any], results: list[Any]) -> None:
        values.update(zip(variables, (_wider(result, wide) for result in results), strict=True))

    write(jaxpr.constvars, consts)
    write(jaxpr.invars, arrays)
    for eqn in jaxpr.eqns:
        taken = [read(var) for var in eqn.invars]
        inner = _inner(eqn)
        if len(inner) == 1 and eqn.primitive.name not in ("scan", "while", "cond"):
            closed = hasattr(inner[0], "consts")
            body, own = (inner[0].jaxpr, inner[0].consts) if closed else (inner[0], [])
            results = _evaluate(body, own, taken[-len(body.invars) :] if body.invars else [], wide)
        else:
            given = {n: jnp.dtype(wide) if _is_dtype(v) and _is_below(v, wide) else v for n, v in eqn.params.items()}
            result = eqn.primitive.bind(*taken, **given)
            results = result if eqn.primitive.multiple_results else [result]
        write(eqn.outvars, results)
    return [read(var) for var in jaxpr.outvars]


def _is_dtype(value: Any) -> bool:
    return isinstance(value, np.dtype)
