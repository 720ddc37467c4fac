"""How `ensemble` starts the members that it copies: every parameter by a rule."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from probly_common.checks.ensembles import check_reset_type, check_reset_value
from probly_common.starts import CONSTANT, DRAWN, KEPT, REGISTERED, apply_reset, starts_otherwise
from probly_flax import random
from probly_flax._kinds import KINDS
from probly_flax.random import Rngs

Rule = TypeVar("Rule", bound=Callable[..., Any])
# By type, each with what a report calls it.
_RULES: dict[type, tuple[str, Callable[..., Any]]] = {
    each: (f"as {each.__name__}", row.reset) for row in KINDS.rows if row.reset for each in row.types
}


def register_reset(reset_type: type[nnx.Module] | type[nnx.Param]) -> Callable[[Rule], Rule]:
    """Registers how `ensemble` re-initialises a layer, or a parameter that no layer's rule covers.

    A layer's rule changes the layer that it is given; a parameter's rule returns the new value, as `reset=` does. Both
    are given the member's rngs, and serve the type and its subclasses.

    Raises:
        TypeError: if the type is neither a layer's nor a parameter's.
    Example:
        >>> import jax, jax.numpy as jnp
        >>> from probly_flax import ensemble
        >>> class Scale(nnx.Module):
        ...     def __init__(self):
        ...         self.scale = nnx.Param(jnp.ones(3))
        ...     def __call__(self, x):
        ...         return x * self.scale
        >>> @register_reset(Scale)
        ... def reset_scale(layer, rngs):
        ...     layer.scale[...] = jax.random.normal(rngs.params(), layer.scale.shape)
        >>> ensemble(Scale(), 2).stacked.scale.shape
        (2, 3)
        >>> class ClassToken(nnx.Param):
        ...     pass
        >>> @register_reset(ClassToken)
        ... def reset_class_token(token, rngs):
        ...     return 0.02 * jax.random.normal(rngs.params(), token.shape)
    """
    check_reset_type("register_reset", reset_type, (nnx.Module, nnx.Param))

    def register(rule: Rule) -> Rule:
        _RULES[reset_type] = REGISTERED, rule
        return rule

    return register


def reset_by_rule(member: nnx.Module, reset: Callable[..., Array], rngs: Rngs) -> None:
    for path, parameter in named_parameters(member):
        _set(path, parameter, apply_reset(reset, path, parameter, rngs))


def reset_by_layer(member: nnx.Module, rngs: Rngs) -> dict[str, str]:
    """Resets every layer with parameters by its own rule, inner layers first.

    What these rules left is then reset by its own type's rule, or drawn of the mean and spread that it has. Returns the
    rule of each parameter.
    """
    before = {id(parameter): parameter.get_raw_value() for _, parameter in named_parameters(member)}
    rules: dict[int, str] = {}
    for _, layer in list(nnx.iter_modules(member)):
        name, rule = _rule(type(layer))
        if rule is not None:
            rule(layer, rngs)
            for _, parameter in named_parameters(layer):
                if parameter.get_raw_value() is not before.get(id(parameter)):
                    before[id(parameter)], rules[id(parameter)] = parameter.get_raw_value(), name
    for path, parameter in named_parameters(member):
        if id(parameter) not in rules:
            name, rule = _rule(type(parameter))
            if rule is not None:
                value = rule(parameter, rngs)
            else:
                name, value = _like(parameter[...], rngs)
            rules[id(parameter)] = name
            _set(path, parameter, value)
    return {path: rules[id(parameter)] for path, parameter in named_parameters(member)}


def other_starts(base: nnx.Module, stacked: nnx.Module, rules: dict[str, str]) -> list[str]:
    """Lists the parameters of the base that do not start as its first member's do."""
    drawn = dict(named_parameters(stacked))
    pairs = [(path, p[...], drawn[path][...]) for path, p in named_parameters(base)]
    return [
        path
        for path, value, new in pairs
        if _is_known(value, new) and starts_otherwise(rules[path], np.asarray(value), np.asarray(new)[0])
    ]


def _is_known(*values: Array) -> bool:
    return not any(isinstance(value, jax.core.Tracer) for value in values)


def _like(value: Array, rngs: Rngs) -> tuple[str, Array]:
    """Returns a draw of the same mean and spread, unless the values are all equal; and which it is."""
    if _is_known(value) and _is_constant(np.asarray(value)):
        return CONSTANT, value
    if not jnp.issubdtype(value.dtype, jnp.inexact):
        return KEPT, value
    if jnp.iscomplexobj(value):
        return DRAWN, jax.lax.complex(*(_drawn_like(rngs.params(), part) for part in (value.real, value.imag)))
    return DRAWN, _drawn_like(rngs.params(), value)


@jax.jit
def _drawn_like(key: Array, value: Array) -> Array:
    value = value.astype(random.draw_dtype(value.dtype))
    drawn = value.mean() + value.std() * random.normal(key, value.shape, value.dtype)
    return jnp.where(_is_constant(value), value, drawn)  # whose values are not known yet under a trace


def _is_constant(values: Any) -> Any:
    flat = values.ravel()
    return (flat == flat[:1]).all()


def named_parameters(module: nnx.Module) -> list[tuple[str, nnx.Param]]:
    state = nnx.to_flat_state(nnx.state(module, nnx.Param))
    return [(".".join(map(str, path)), parameter) for path, parameter in state]


def _set(path: str, parameter: nnx.Param, value: Array) -> None:
    check_reset_value("ensemble", path, parameter.shape, value)
    parameter.set_value(value.astype(parameter.dtype))


def _rule(own_type: type) -> tuple[str, Callable[..., Any] | None]:
    return next((_RULES[each] for each in own_type.__mro__ if each in _RULES), ("", None))
