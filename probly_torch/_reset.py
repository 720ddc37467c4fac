"""How `ensemble` starts the members that it copies: every parameter by a rule."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from inspect import isroutine
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from probly_common.checks.ensembles import check_reset_type, check_reset_value
from probly_common.report import natural_order
from probly_common.starts import (
    CONSTANT,
    DRAWN,
    FROZEN,
    KEPT,
    REGISTERED,
    apply_reset,
    required_arguments,
    starts_otherwise,
)
from probly_torch import random
from probly_torch.random import Rngs

Rule = TypeVar("Rule", bound=Callable[..., Any])
_RULES: dict[type, Callable[..., Any]] = {}

# Methods that start weights: those of layers, and those that networks run after their layers'. Either takes nothing, or
# each module in turn.
_OF_LAYERS = ("reset_parameters", "_reset_parameters")
_OF_NETWORKS = ("init_weights", "_init_weights", "_initialize_weights")
_DONE = "_is_hf_initialized"  # by which transformers marks modules that it has started, to leave them as they are


def register_reset(reset_type: type[nn.Module] | type[nn.Parameter]) -> Callable[[Rule], Rule]:
    """Registers how `ensemble` re-initialises a layer, or a parameter that no layer's rule covers.

    A layer's rule changes the layer that it is given, and goes before the methods of layers and networks. A parameter's
    rule returns the new value, as `reset=` does. Both are given the member's rngs, and serve the type and its
    subclasses.

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


def reset_by_rule(member: nn.Module, reset: Callable[..., Tensor], rngs: Rngs) -> None:
    with torch.no_grad():
        for name, parameter in sorted(member.named_parameters(), key=lambda item: natural_order(item[0])):
            _set(name, parameter, apply_reset(reset, name, parameter, rngs))


@torch.no_grad()
def reset_by_layer(member: nn.Module, rngs: Rngs, base: nn.Module) -> dict[str, str]:
    """Resets every layer by its own methods, inner layers first, and then by registered rules.

    What these left is then reset by its own type's rule, or drawn of the mean and spread that it has in the base.
    Returns the rule of each parameter.
    """
    for parameter in member.parameters():
        if _is_number(parameter):
            parameter.fill_(torch.nan)
    layers = list(reversed(list(member.modules())))
    rules: dict[Tensor, str] = {}
    for layer in layers:
        if _rule(type(layer)) is None:
            for names in (_OF_LAYERS, _OF_NETWORKS):
                any(_run(call, layer, name, rules) for name in names if (call := _method(layer, name)))
    for layer in layers:
        rule = _rule(type(layer))
        if rule is not None:
            _run(partial(rule, layer, rngs), layer, REGISTERED, rules)
    values = dict(base.named_parameters())
    for name, parameter in sorted(member.named_parameters(), key=lambda item: natural_order(item[0])):
        rule, is_left = _rule(type(parameter)), _is_number(parameter) and bool(parameter.isnan().any())
        if rule is not None and (is_left or rules.get(parameter) in _OF_NETWORKS):
            rules[parameter] = REGISTERED
            _set(name, parameter, rule(parameter, rngs))
        elif is_left:
            rules[parameter], value = _like(values[name], rngs)
            _set(name, parameter, value)
    return {name: rules.get(parameter, KEPT) for name, parameter in member.named_parameters()}


def other_starts(base: nn.Module, model: nn.Module, rules: dict[str, str]) -> list[str]:
    """Lists the parameters of the base that do not start as its first member's do."""
    drawn = dict(model.named_parameters())
    return [
        name
        for name, p in base.named_parameters()
        if not p.is_meta and starts_otherwise(rules.get(name, KEPT), _array(p), _array(drawn[name][0]))
    ]


def _array(tensor: Tensor) -> Any:
    return tensor.detach().to("cpu", random.draw_dtype(tensor.dtype)).numpy()


def _is_number(parameter: Tensor) -> bool:
    """Tells whether a parameter has values that can be drawn, and memory for them."""
    return not parameter.is_meta and (parameter.is_floating_point() or parameter.is_complex())


def _method(layer: nn.Module, name: str) -> Callable[[], Any] | None:
    """Returns a method of the layer's class as a function of nothing, if it has one that can be called so."""
    if not isroutine(getattr(type(layer), name, None)):
        return None
    method = getattr(layer, name)
    required = required_arguments(method)
    if len(required) > 1:
        return None
    return partial(layer.apply, method) if required else method


def _run(call: Callable[[], Any], layer: nn.Module, name: str, rules: dict[Tensor, str]) -> bool:
    """Runs a rule, notes which parameters it set, and tells whether it set any."""
    for module in layer.modules():
        vars(module).pop(_DONE, None)
    before = {p: p.clone() for p in layer.parameters()}
    call()
    changed = [p for p in layer.parameters() if p not in before or not _is_same(p, before[p])]
    rules |= dict.fromkeys(changed, name)
    return bool(changed)


def _is_same(a: Tensor, b: Tensor) -> bool:
    return not a.is_meta and bool(((a == b) | (a.isnan() & b.isnan())).all())


def _like(parameter: Tensor, rngs: Rngs) -> tuple[str, Tensor]:
    """Returns a draw of the same mean and spread, unless the values are all equal or not learned; and which it is."""
    flat = parameter.flatten()
    if bool((flat == flat[:1]).all()):
        return CONSTANT, parameter
    if not parameter.requires_grad:  # as tables of sines are
        return FROZEN, parameter
    return DRAWN, _drawn_like(parameter, rngs)


def _drawn_like(parameter: Tensor, rngs: Rngs) -> Tensor:
    if parameter.is_complex():
        return torch.complex(*(_drawn_like(part, rngs) for part in (parameter.real, parameter.imag)))
    values = parameter.to(random.draw_dtype(parameter.dtype))
    mean, std = values.mean().item(), values.std(correction=0).item()
    return mean + std * random.normal(rngs.params(), values.shape, values.dtype)


def _set(name: str, parameter: Tensor, value: Tensor) -> None:
    check_reset_value("ensemble", name, parameter.shape, value)
    parameter.copy_(value)


def _rule(own_type: type) -> Callable[..., Any] | None:
    return next((_RULES[each] for each in own_type.__mro__ if each in _RULES), None)
