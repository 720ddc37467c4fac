"""Deep ensembles (Lakshminarayanan et al. 2017): E networks with weights of their own, run by one vmap."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.func import stack_module_state, vmap
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from probly_torch import random
from probly_torch._checks import (
    check_base_options,
    check_chunk_size,
    check_distinct,
    check_in_axes,
    check_independent,
    check_member_axis,
    check_member_count,
    check_members,
    check_module,
    check_num_members,
    check_output_leaf,
    check_reset,
    check_reset_value,
    check_rows_of_batch,
    member_index,
    member_indices,
    takes_rngs_by_name,
)
from probly_torch._report import natural_order
from probly_torch.random import Rngs

__all__ = ["Ensemble", "ensemble", "register_reset"]

Rule = TypeVar("Rule", bound=Callable[..., None])
_RESET: dict[type[nn.Module], Callable[..., None]] = {}


class Ensemble(nn.Module):
    """Networks of one structure with stacked weights, run at once.

    Its parameters and buffers have the names they have in one network, and a leading axis of E members.

    Shape:
        model(x): x (B, ...), the same batch for every member. Returns (E, B, ...).
        model(x, in_axes=0): x (E, B, ...), a batch for each member. Returns (E, B, ...).
        Inputs and outputs may be several, tuples or dicts; inputs that are no tensors are passed on.
    Weights:
        those of one network, each (E, ...).
    Args:
        members: networks of one structure, in the same mode; they are copied.
        chunk_size: how many members run at a time; None for all. Fewer need less memory.
    Raises:
        ValueError: if there is no member, one is given twice, or they differ in structure.
    Example:
        >>> model = Ensemble([nn.Linear(2, 3) for _ in range(4)])
        >>> model(torch.ones(5, 2)).shape, model.weight.shape
        (torch.Size([4, 5, 3]), torch.Size([4, 3, 2]))
        >>> torch.allclose(model[1](torch.ones(5, 2)), model(torch.ones(5, 2))[1])
        True
    """

    _network: nn.Module

    def __init__(self, members: Sequence[nn.Module], *, chunk_size: int | None = None) -> None:
        super().__init__()
        members = list(members)
        for member in members:
            check_module("Ensemble", "each member", member, nn.Module)
        check_distinct("Ensemble", members)
        check_members("Ensemble", [_structure(member) for member in members])
        self.num_members = len(members)
        self.chunk_size = check_chunk_size("Ensemble", chunk_size)
        params, buffers = stack_module_state(members)
        stacked = {name: nn.Parameter(p, requires_grad=p.requires_grad) for name, p in params.items()} | buffers
        memo = {id(tensor): stacked[name] for name, tensor in _named_tensors(members[0])}
        self._adopt(copy.deepcopy(members[0], memo))
        avoid_fast_paths(self._network)

    def _adopt(self, network: nn.Module) -> None:
        """Takes over a network's registries, so that names stay natural, and keeps it to call."""
        for registry in ("_parameters", "_buffers", "_non_persistent_buffers_set", "_modules"):
            self.__dict__[registry] = network.__dict__[registry]
        self.__dict__["_network"] = network  # not a submodule: it would appear a second time
        self.training = network.training

    def forward(self, *args: Any, in_axes: int | None = None, **kwargs: Any) -> Any:
        check_in_axes("Ensemble", in_axes)
        axes = tree_map(lambda x: in_axes if isinstance(x, Tensor) and x.ndim else None, (args, kwargs))
        if in_axes == 0:
            shapes = [x.shape for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor) and x.ndim]
            check_rows_of_batch("Ensemble", [self.num_members] * len(shapes))
            check_member_axis("Ensemble", shapes, self.num_members)
        outputs: dict[str, Any] = {}
        slots = _slots(self._network)
        state = {id(tensor): tensor for _, _, tensor in slots}  # tied weights once

        def call(state: dict[int, Tensor], args: Any, kwargs: Any) -> tuple[list[Tensor], dict[int, Tensor]]:
            for registry, name, tensor in slots:
                registry[name] = state[id(tensor)]
            leaves, outputs["structure"] = tree_flatten(self._network(*args, **kwargs))
            for leaf in leaves:
                if not isinstance(leaf, Tensor):
                    check_output_leaf("Ensemble", leaf)
            outputs["constants"] = [None if isinstance(leaf, Tensor) else (leaf,) for leaf in leaves]
            after = {id(tensor): registry[name] for registry, name, tensor in slots}
            assigned = {key: tensor for key, tensor in after.items() if tensor is not state[key]}
            return [leaf for leaf in leaves if isinstance(leaf, Tensor)], assigned

        run = _loop if _needs_loop(self._network, state.values()) else vmap
        batched = run(call, in_dims=(0, *axes), randomness="different", chunk_size=self.chunk_size)
        try:
            tensors, assigned = batched(state, args, kwargs)
        finally:
            for registry, name, tensor in slots:
                registry[name] = tensor
        for key, value in assigned.items():  # buffers that the network assigns anew, where others are changed in place
            state[key].copy_(value.detach())
        rows = iter(tensors)
        leaves = [next(rows) if constant is None else constant[0] for constant in outputs["constants"]]
        return tree_unflatten(leaves, outputs["structure"])

    def train(self, mode: bool = True) -> Ensemble:
        self._network.train(mode)  # the network's own, which may keep a part of it in one mode
        self.training = self._network.training
        return self

    def apply(self, fn: Callable[[nn.Module], None]) -> Ensemble:
        """Applies fn to each member, whose weights have the shapes that fn expects."""
        changed = Ensemble([member.apply(fn) for member in self])
        with torch.no_grad():
            for (_, own), (_, new) in zip(_named_tensors(self), _named_tensors(changed), strict=True):
                own.copy_(new)
        return self

    def __len__(self) -> int:
        return self.num_members

    def __iter__(self) -> Iterator[nn.Module]:
        return (self[i] for i in range(self.num_members))

    def __getitem__(self, item: int | slice | Sequence[int]) -> Any:
        """Member `item` as a network of its own; or, for a slice or a list, an ensemble of those members."""
        if isinstance(item, (slice, list, tuple)):
            indices = member_indices("Ensemble", item, self.num_members)
            return Ensemble([self[i] for i in indices], chunk_size=self.chunk_size)
        i = member_index("Ensemble", item, self.num_members)
        memo = {id(tensor): _row(tensor, i) for _, tensor in _named_tensors(self)}
        return copy.deepcopy(self._network, memo)

    def extra_repr(self) -> str:
        chunks = "" if self.chunk_size is None else f", chunk_size={self.chunk_size}"
        return f"{type(self._network).__name__}, num_members={self.num_members}{chunks}"


def ensemble(
    base: nn.Module | Sequence[nn.Module] | Callable[..., nn.Module],
    num_members: int,
    *,
    rngs: Rngs | int = 0,
    reset_params: bool = True,
    reset: Callable[[Tensor, Rngs], Tensor] | None = None,
    chunk_size: int | None = None,
) -> Ensemble:
    """Makes a deep ensemble: members of one structure, each with weights of its own.

    Args:
        base: a network, copied for each member and re-initialised as its layers are by default; or a constructor,
            called with each member's rngs, for an initialisation of its own; or a list of networks, stacked as
            they are.
        num_members: the number of members E.
        rngs: a seed or an Rngs. Members are drawn from keys of their own; torch's global generator is left alone.
        reset_params: False keeps the weights of the base network in every member.
        reset: a rule for this call: given a parameter and the member's rngs, it returns the new value.
        chunk_size: how many members run at a time; None for all.
    Raises:
        ValueError: if a parameter has no rule to re-initialise it, or a constructor ignores its rngs.
        TypeError: if base is none of the three.
    Example:
        >>> model = ensemble(nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 3)), 5)
        >>> model(torch.ones(7, 2)).shape
        torch.Size([5, 7, 3])
        >>> model = ensemble(nn.Linear(2, 3), 5, reset=lambda p, rngs: random.normal(rngs.params(), p.shape))
    """
    what = "ensemble"
    num_members, chunk_size = check_num_members(what, num_members), check_chunk_size(what, chunk_size)
    rngs = random.as_rngs(what, rngs)
    given = {"reset": reset is not None, "reset_params": not reset_params}
    if isinstance(base, (list, tuple)):
        check_base_options(what, "a list of networks", given)
        check_member_count(what, len(base), num_members)
        return Ensemble(base, chunk_size=chunk_size)
    make: Callable[[Rngs], nn.Module]
    if isinstance(base, nn.Module):
        make = partial(_copy, base, reset_params, reset)
    elif callable(base):
        check_base_options(what, "a constructor", given)
        make = partial(_construct, base)
    else:
        check_module(what, "base", base, nn.Module)
    split = rngs.split(num_members)  # as nnx.split_rngs does, so that rules that draw from rngs agree
    seeds = random.split(rngs.params(), num_members)
    members = []
    for i in range(num_members):
        own = Rngs({name: stream.key[i] for name, stream in split.items()})
        with _seeded(seeds[i]):
            members.append(make(own))
    model = Ensemble(members, chunk_size=chunk_size)
    if reset is not None or not isinstance(base, nn.Module):
        check_independent(what, num_members, _members_differ(model))
    return model


def register_reset(layer_type: type[nn.Module]) -> Callable[[Rule], Rule]:
    """Registers how `ensemble` re-initialises a layer, as a function of the layer and the member's rngs.

    It serves the type and its subclasses, and goes before a `reset_parameters` method.

    Example:
        >>> class Scale(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.scale = nn.Parameter(torch.ones(3))
        >>> @register_reset(Scale)
        ... def reset_scale(layer, rngs):
        ...     layer.scale.data = random.normal(rngs.params(), layer.scale.shape)
        >>> ensemble(Scale(), 2).scale.shape
        torch.Size([2, 3])
    """

    def register(rule: Rule) -> Rule:
        _RESET[layer_type] = rule
        return rule

    return register


def _loop(call: Callable[..., Any], in_dims: Any, randomness: str, chunk_size: int | None) -> Callable[..., Any]:
    """torch.vmap's result, one member at a time."""

    def run(state: dict[int, Tensor], args: Any, kwargs: Any) -> Any:
        outputs = []
        for i in range(len(next(iter(state.values())))):
            row = {key: tensor[i] for key, tensor in state.items()}
            own = tree_map(lambda x, axis: x if axis is None else x[i], (args, kwargs), in_dims[1:])  # noqa: B023
            outputs.append(call(row, *own))
        return tree_map(lambda *ys: torch.stack(ys), *outputs)

    return run


def _slots(network: nn.Module) -> list[tuple[dict[str, Any], str, Tensor]]:
    """Where each tensor of the network stands: calls put a member's there, as torch.func.functional_call does.

    That function leaves a module that is used twice with the wrong tensors, and costs more.
    """
    return [
        (registry, name, tensor)
        for module in network.modules()
        for registry in (module._parameters, module._buffers)
        for name, tensor in registry.items()
        if tensor is not None
    ]


def _needs_loop(network: nn.Module, tensors: Iterable[Tensor]) -> bool:
    """What torch.vmap cannot run, or runs otherwise than a member alone."""
    for module in network.modules():
        if isinstance(module, (nn.RNNBase, nn.RNNCellBase)):
            return True  # there are no batching rules for their kernels
        if isinstance(module, _BatchNorm) and module.momentum is None and module.training:
            return True  # a cumulative average reads its count as a number
    devices = {tensor.device.type for tensor in tensors}
    available = (device for device in devices if torch.amp.is_autocast_available(device))
    return any(torch.is_autocast_enabled(device) for device in available)  # batched products would skip the cast


def avoid_fast_paths(network: nn.Module) -> None:
    """Turns off the fused inference of torch's Transformer, which reads weights past the layers that hold them."""
    for module in network.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            module.activation_relu_or_gelu = 0
        if isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False


def _named_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters()
    yield from module.named_buffers()


def _row(tensor: Tensor, i: int) -> Tensor:
    row = tensor.detach()[i].clone()
    return nn.Parameter(row, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else row


def _structure(module: nn.Module) -> list[str]:
    """What two members must share: layers, options, and the shapes and dtypes of their tensors."""
    tensors = (f"{name} {t.dtype} {tuple(t.shape)}" for name, t in _named_tensors(module))
    options = (
        f"{name or 'network'}.{attribute}={_describe(value)}"
        for name, m in module.named_modules()
        for attribute, value in vars(m).items()
        if not attribute.startswith("_")
    )
    return [*(line.strip() for line in repr(module).splitlines()), *tensors, *options]


def _describe(value: Any) -> str:
    """A value as text that is equal for equal values: no addresses, and all of a tensor."""
    if isinstance(value, Tensor):
        return f"{value.dtype} {value.tolist()}"
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value))


def _construct(constructor: Callable[..., nn.Module], rngs: Rngs) -> nn.Module:
    """Passes rngs by name where the constructor has that name, as keyword-only ones need."""
    member = constructor(rngs=rngs) if takes_rngs_by_name("ensemble", constructor) else constructor(rngs)
    check_module("ensemble", "what the constructor returns", member, nn.Module)
    return member


def _copy(base: nn.Module, reset_params: bool, reset: Callable[[Tensor, Rngs], Tensor] | None, rngs: Rngs) -> nn.Module:
    member = copy.deepcopy(base)
    if reset is not None:
        _reset_by_rule(member, reset, rngs)
    elif reset_params:
        _reset_by_layer(member, rngs)
    return member


@contextmanager
def _seeded(key: Tensor) -> Iterator[None]:
    """Seeds torch's global generators, which layers draw their weights from, and then restores them."""
    high, low = key.tolist()
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with torch.random.fork_rng(devices=devices):
        for generator in (torch.default_generator, *(torch.cuda.default_generators if devices else ())):
            generator.manual_seed((high << 32) | low)
        yield


def _reset_by_rule(member: nn.Module, reset: Callable[[Tensor, Rngs], Tensor], rngs: Rngs) -> None:
    with torch.no_grad():
        for name, parameter in sorted(member.named_parameters(), key=lambda item: natural_order(item[0])):
            value = reset(parameter, rngs)
            check_reset_value("ensemble", name, parameter.shape, value)
            parameter.copy_(value)


def _reset_by_layer(member: nn.Module, rngs: Rngs) -> None:
    """Every layer with parameters by its own rule, inner layers first."""
    with torch.no_grad():
        for parameter in member.parameters():
            parameter.fill_(torch.nan)
    for layer in reversed(list(member.modules())):
        rule = _rule(layer)
        if rule is not None:
            rule(layer, rngs)
    left = [name for name, p in member.named_parameters() if not p.is_meta and p.isnan().any()]
    check_reset("ensemble", left)


def _rule(layer: nn.Module) -> Callable[..., None] | None:
    for layer_type in type(layer).__mro__:
        if layer_type in _RESET:
            return _RESET[layer_type]
    for method in ("reset_parameters", "_reset_parameters"):  # the latter is MultiheadAttention's
        if hasattr(layer, method):
            return lambda layer, rngs: getattr(layer, method)()
    return None


def _members_differ(model: Ensemble) -> bool:
    return any(p.is_meta or bool((p != p[:1]).any()) for p in model.parameters())
