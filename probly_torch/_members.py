"""Members as rows of stacked tensors: stacking them, and what they have to share."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from probly_common.checks.ensembles import check_initialized, check_same_structure, check_stackable
from probly_common.structure import Structure
from probly_torch._state import OF_A_RUN


def named_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters()
    yield from module.named_buffers()


def lazy_names(module: nn.Module) -> list[str]:
    return [name for name, tensor in named_tensors(module) if is_lazy(tensor)]


def stack(members: Iterator[nn.Module], num_members: int) -> nn.Module:
    """Stacks members into one network, whose tensors have a leading axis of members.

    The members come one by one.
    """
    first = next(members)
    check_initialized("Ensemble", lazy_names(first))
    check_stackable("Ensemble", [name or "the network" for name, m in first.named_modules() if _is_packed(m)])
    stacked = {name: tensor.detach().new_empty(num_members, *tensor.shape) for name, tensor in named_tensors(first)}
    memo: dict[int, Any] = {id(tensor): like(tensor, stacked[name]) for name, tensor in named_tensors(first)}
    network = copy.deepcopy(first, memo)
    for i, member in enumerate(chain([first], members)):
        check_same_structure("Ensemble", structure(first, member).difference(first, member), i, num_members)
        for name, tensor in named_tensors(member):
            stacked[name][i] = tensor.detach()
    return network


def like(tensor: Tensor, value: Tensor) -> Tensor:
    """Returns the value as what the tensor is: a parameter of its type, or a buffer."""
    if isinstance(tensor, nn.Parameter):
        return type(tensor)(value, requires_grad=tensor.requires_grad)
    return value


def structure(*networks: nn.Module) -> Structure:
    """Compares members as objects; of parameters and buffers, which are stacked, it takes all but the values."""
    tensors = {id(tensor) for network in networks for _, tensor in named_tensors(network)}
    modules = {id(module) for network in networks for module in network.modules()}
    return Structure(
        lambda value: _described(value) if id(value) in tensors else None,
        lambda value: _held(value) if id(value) in modules else None,
        _content,
    )


def _is_packed(module: nn.Module) -> bool:
    """Tells whether a module has weights beside its parameters and buffers, as quantised and scripted ones have."""
    scripted = isinstance(module, torch.jit.ScriptModule)
    return scripted or any(isinstance(value, torch.ScriptObject) for value in vars(module).values())


def _described(tensor: Tensor) -> str:
    grad = ", which requires a gradient" if tensor.requires_grad else ""
    return f"{tensor.dtype} {tuple(tensor.shape)}{grad}".removeprefix("torch.")


def _held(module: nn.Module) -> dict[str, Any]:
    """Returns all that a module has, with hooks in their order, whatever their numbers."""
    attributes = {name: value for name, value in vars(module).items() if name not in OF_A_RUN}
    hooks = {n: list(v.values()) for n, v in attributes.items() if "_hooks" in n and isinstance(v, dict)}
    registries = [attributes.pop(name) for name in ("_parameters", "_buffers", "_modules")]
    names = [list(registry) for registry in registries]
    return {**attributes, **hooks, **{k: v for registry in registries for k, v in registry.items()}, "names": names}


def _content(value: Any) -> tuple[str, tuple[int, ...], bytes] | None:
    if not isinstance(value, Tensor):
        return None
    data = value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes() if value.numel() else b""
    return str(value.dtype), tuple(value.shape), data
