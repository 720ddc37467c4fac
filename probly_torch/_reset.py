"""How `ensemble` re-initialises a copied network: every parameter by a rule, or an error that names it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from probly_common.checks.ensembles import check_reset, check_reset_type, check_reset_value
from probly_common.report import natural_order
from probly_torch.random import Rngs

Rule = TypeVar("Rule", bound=Callable[..., Any])
_RULES: dict[type, Callable[..., Any]] = {}


def register_reset(reset_type: type[nn.Module] | type[nn.Parameter]) -> Callable[[Rule], Rule]:
    """Registers how `ensemble` re-initialises a layer, or a parameter that no layer's rule covers.

    A layer's rule changes the layer that it is given, and goes before a `reset_parameters` method; a parameter's rule
    returns the new value, as `reset=` does. Both are given the member's rngs, and serve the type and its subclasses.

    Raises:
        TypeError: if the type is neither a layer's nor a parameter's.
    Example:
        >>> from probly_torch import ensemble, random
        >>> class Scale(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.scale = nn.Parameter(torch.ones(3))
        >>> @register_reset(Scale)
        ... def reset_scale(layer, rngs):
        ...     layer.scale.data = random.normal(rngs.params(), layer.scale.shape)
        >>> ensemble(Scale(), 2).scale.shape
        torch.Size([2, 3])
        >>> class ClassToken(nn.Parameter):
        ...     pass
        >>> @register_reset(ClassToken)
        ... def reset_class_token(token, rngs):
        ...     return 0.02 * random.normal(rngs.params(), token.shape)
    """
    check_reset_type("register_reset", reset_type, (nn.Module, nn.Parameter))

    def register(rule: Rule) -> Rule:
        _RULES[reset_type] = rule
        return rule

    return register


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seeds torch's global generators, which layers draw from, and then restores them."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with torch.random.fork_rng(devices=devices):
        for generator in (torch.default_generator, *(torch.cuda.default_generators if devices else ())):
            generator.manual_seed(seed)
        yield


def reset_by_rule(member: nn.Module, reset: Callable[[Tensor, Rngs], Tensor], rngs: Rngs) -> None:
    with torch.no_grad():
        for name, parameter in sorted(member.named_parameters(), key=lambda item: natural_order(item[0])):
            _set(name, parameter, reset(parameter, rngs))


def reset_by_layer(member: nn.Module, rngs: Rngs) -> None:
    """Resets every layer with parameters by its own rule, inner layers first.

    What these rules left is then reset by its own type's rule.
    """
    with torch.no_grad():
        for parameter in member.parameters():
            parameter.fill_(torch.nan)
    for layer in reversed(list(member.modules())):
        rule = _layer_rule(layer)
        if rule is not None:
            rule(layer, rngs)
    with torch.no_grad():
        left = [(name, p, _rule(type(p))) for name, p in member.named_parameters() if not p.is_meta and p.isnan().any()]
        check_reset("ensemble", [name for name, _, rule in left if rule is None])
        for name, parameter, rule in sorted(left, key=lambda item: natural_order(item[0])):
            if rule is not None:
                _set(name, parameter, rule(parameter, rngs))


def _set(name: str, parameter: Tensor, value: Tensor) -> None:
    check_reset_value("ensemble", name, parameter.shape, value)
    parameter.copy_(value)


def _layer_rule(layer: nn.Module) -> Callable[..., Any] | None:
    rule = _rule(type(layer))
    if rule is not None:
        return rule
    for method in ("reset_parameters", "_reset_parameters"):  # the latter is MultiheadAttention's
        if hasattr(layer, method):
            return lambda layer, rngs: getattr(layer, method)()
    return None


def _rule(own_type: type) -> Callable[..., Any] | None:
    return next((_RULES[each] for each in own_type.__mro__ if each in _RULES), None)
