"""What a network is at a call: its slots for tensors, and all that it keeps in Python beside them."""

from __future__ import annotations

import functools
import types
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Set
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.module import _has_any_global_hook

HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
# What frameworks note of a run, and no forward reads.
OF_A_RUN = {"_trainer", "_fabric", "_fabric_optimizers", "_current_fx_name", "_compiled_call_impl"}
_CONSTANTS = (bool, int, float, complex, str, bytes, type(None), torch.Size, torch.dtype, torch.device)
_FLAT_WEIGHTS = "_flat_weight"  # recurrent layers' lists of their own parameters, which they make anew
_MOST_ENTRIES = 4096  # of which each is compared; of more, as a vocabulary has, only the number


class Slots:
    """The places of a network where its parameters and buffers are, and what these are run with."""

    def __init__(self, network: nn.Module) -> None:
        self.network = network
        self.modules = list(network.modules())
        self.registries: list[dict[str, Any]] = [each for m in self.modules for each in (m._parameters, m._buffers)]
        self.slots = [(registry, name) for registry in self.registries for name in registry]
        self.are_buffers = [i % 2 == 1 for i, registry in enumerate(self.registries) for _ in registry]
        self.modes = tuple(m.training for m in self.modules)
        self.width, self.have_attention, self.have_hooks, self.not_at_once = 0, False, False, ""
        for module in self.modules:
            if isinstance(module, nn.Linear):
                self.width = max(self.width, module.in_features, module.out_features)
            self.have_attention |= isinstance(module, (nn.MultiheadAttention, nn.TransformerEncoderLayer))
            self.have_hooks |= _has_own_hooks(module)
            self.not_at_once = self.not_at_once or _why_not_at_once(module)

    def fill(self, tensors: Iterable[Tensor | None]) -> None:
        for (registry, name), tensor in zip(self.slots, tensors, strict=True):
            registry[name] = tensor

    def tensors(self) -> list[Tensor | None]:
        return [registry[name] for registry, name in self.slots]


def _why_not_at_once(module: nn.Module) -> str:
    if isinstance(module, (nn.RNNBase, nn.RNNCellBase)):
        return "torch.vmap has no rules for recurrent kernels"
    if isinstance(module, _BatchNorm) and module.momentum is None and module.training:
        return "a cumulative average reads its count as a number"
    return ""


class State(Slots):
    """Notes the attributes of a network's modules, and what is in them, as objects.

    `unchanged` takes about a microsecond for each module, which every call can afford.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__(network)
        self._names = [tuple(registry) for registry in self.registries]
        of_registries = set(map(id, self.registries))
        parts = [part for part in _walk(network) if id(part) not in of_registries]
        self._empty = [part for part in parts if not part]
        self._parts = [(part, len(part), reader := _reader(part), list(reader())) for part in parts if part]

    def unchanged(self) -> bool:
        if any(map(len, self._empty)) or list(map(tuple, self.registries)) != self._names:
            return False
        return all(len(part) == size and all(map(is_, read(), noted)) for part, size, read, noted in self._parts)

    def _noted(self) -> Iterator[tuple[Any, Any]]:
        """Yields what was noted by its name."""
        for part, _, _, noted in self._parts:
            yield from zip(part if isinstance(part, dict) else noted, noted, strict=False)

    def differs_only_in_modes(self, other: State) -> bool:
        """Tells whether nothing but train and eval mode differs."""
        ours, theirs = ([(n, v) for n, v in each._noted() if n != "training"] for each in (self, other))
        same = len(ours) == len(theirs) and all(a is b for (_, a), (_, b) in zip(ours, theirs, strict=True))
        return same and self._names == other._names

    def new_tensors(self, before: State) -> bool:
        known = set(map(id, before.noted_tensors()))
        return any(id(tensor) not in known for tensor in self.noted_tensors())

    def noted_tensors(self) -> list[Tensor]:
        return [value for _, value in self._noted() if isinstance(value, Tensor)]

    def equals(self, other: State) -> bool:
        """Tells whether two copies of one network have the same constants in the same places."""
        ours, theirs = (
            [(str(n), v if isinstance(v, _CONSTANTS) else type(v)) for n, v in each._noted()] for each in (self, other)
        )
        return ours == theirs


def _reader(part: Any) -> Callable[[], Iterable[Any]]:
    """Returns what reads the values of an object's attributes, or of a container."""
    if len(part) > _MOST_ENTRIES:
        return tuple
    if isinstance(part, dict) and f"{_FLAT_WEIGHTS}s" in part:
        return lambda: [None if name.startswith(_FLAT_WEIGHTS) else value for name, value in part.items()]
    return part.values if isinstance(part, dict) else part.__iter__


def _walk(value: Any, left_out: Set[str] = OF_A_RUN) -> Iterator[Any]:
    """Yields the attributes of modules and objects, and the containers that they hold."""
    seen: dict[int, Any] = {}  # with the objects, so that no other one is given their place
    todo = [value]
    while todo:
        each = todo.pop()
        if isinstance(each, (*_CONSTANTS, Tensor, type, types.FunctionType, types.ModuleType)) or id(each) in seen:
            continue
        seen[id(each)] = each
        if isinstance(each, nn.Module):
            yield vars(each)
            todo += [v for name, v in vars(each).items() if name not in left_out and not name.startswith(_FLAT_WEIGHTS)]
        elif isinstance(each, dict):
            yield each
            todo += each.values()
        elif isinstance(each, (list, set, deque)):
            yield each
            todo += each
        elif isinstance(each, tuple):
            todo += each
        elif isinstance(each, types.MethodType):
            todo.append(each.__self__)
        elif isinstance(each, functools.partial):
            todo += [each.func, *each.args, *each.keywords.values()]
        elif _is_copied(each):
            yield vars(each)
            todo += vars(each).values()


def _is_copied(value: Any) -> bool:
    """Tells whether copies of an object have attributes of their own; a logger, for one, is the same everywhere."""
    kind = type(value)
    plain = kind.__reduce__ is object.__reduce__ and kind.__reduce_ex__ is object.__reduce_ex__
    return plain and not hasattr(kind, "__deepcopy__") and hasattr(value, "__dict__")


def has_hooks(module: nn.Module) -> bool:
    return _has_any_global_hook() or _has_own_hooks(module)


def _has_own_hooks(module: nn.Module) -> bool:
    return any(vars(module)[hooks] for hooks in HOOKS)


def called_by_hooks(network: nn.Module) -> list[Any]:
    """Lists the objects that hooks call and the network does not hold: users', who want to see every copy."""
    held = {id(part) for part in _walk(network, left_out=OF_A_RUN.union(HOOKS))}
    hooks = [hook for m in network.modules() for name in HOOKS for hook in vars(m)[name].values()]
    called = [each for hook in hooks if not isinstance(each := getattr(hook, "__self__", hook), nn.Module)]
    return [each for each in called if id(getattr(each, "__dict__", each)) not in held]
