"""How `ensemble` re-initialises a copied network: every parameter by a rule, or an error that names it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from flax import nnx
from jax import Array

from probly_common.checks.ensembles import check_reset, check_reset_type, check_reset_value
from probly_flax._kinds import KINDS
from probly_flax.random import Rngs

Rule = TypeVar("Rule", bound=Callable[..., Any])
_RULES: dict[type, Callable[..., Any]] = {each: row.reset for row in KINDS.rows if row.reset for each in row.types}


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
        _RULES[reset_type] = rule
        return rule

    return register


def reset_by_rule(member: nnx.Module, reset: Callable[[nnx.Param, Rngs], Array], rngs: Rngs) -> None:
    for path, parameter in named_parameters(member):
        _set(path, parameter, reset(parameter, rngs))


def reset_by_layer(member: nnx.Module, rngs: Rngs) -> None:
    """Resets every layer with parameters by its own rule, inner layers first.

    What these rules left is then reset by its own type's rule.
    """
    before = {path: parameter.get_raw_value() for path, parameter in named_parameters(member)}
    for _, layer in list(nnx.iter_modules(member)):
        rule = _rule(type(layer))
        if rule is not None:
            rule(layer, rngs)
    left = [
        (path, parameter, _rule(type(parameter)))
        for path, parameter in named_parameters(member)
        if parameter.get_raw_value() is before[path]
    ]
    check_reset("ensemble", [path for path, _, rule in left if rule is None])
    for path, parameter, rule in left:
        if rule is not None:
            _set(path, parameter, rule(parameter, rngs))


def named_parameters(module: nnx.Module) -> list[tuple[str, nnx.Param]]:
    state = nnx.to_flat_state(nnx.state(module, nnx.Param))
    return [(".".join(map(str, path)), parameter) for path, parameter in state]


def _set(path: str, parameter: nnx.Param, value: Array) -> None:
    check_reset_value("ensemble", path, parameter.shape, value)
    parameter.set_value(value.astype(parameter.dtype))


def _rule(own_type: type) -> Callable[..., Any] | None:
    return next((_RULES[each] for each in own_type.__mro__ if each in _RULES), None)
