"""Members as rows of stacked tensors: stacking them, taking one out, and running them all."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from itertools import chain, repeat
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import vmap
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.module import _has_any_global_hook
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.checkpoint import checkpoint

from probly_common.checks.ensembles import check_initialized, check_same_structure, check_stackable
from probly_common.checks.rows import check_output_leaf
from probly_common.structure import Structure

_ELEMENTWISE = {nn.CELU, nn.ELU, nn.GELU, nn.Hardswish, nn.Hardtanh, nn.Identity, nn.LeakyReLU, nn.LogSigmoid, nn.Mish}
_ELEMENTWISE |= {nn.ReLU, nn.ReLU6, nn.SELU, nn.Sigmoid, nn.SiLU, nn.Softplus, nn.Softsign, nn.Tanh}

_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
_LARGE = 2**14  # elements of one member's activations, from which a CPU is faster member by member: up to 2 x
Outputs = tuple[list[Tensor], list[Tensor]]


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
    memo: dict[int, Any] = {id(tensor): _like(tensor, stacked[name]) for name, tensor in named_tensors(first)}
    network = copy.deepcopy(first, memo)
    for i, member in enumerate(chain([first], members)):
        check_same_structure("Ensemble", structure(first, member).difference(first, member), i, num_members)
        for name, tensor in named_tensors(member):
            stacked[name][i] = tensor.detach()
    return network


def member(network: nn.Module, i: int) -> nn.Module:
    """Returns member i of a stacked network, with tensors of its own."""
    memo = {id(tensor): _like(tensor, tensor.detach()[i].clone()) for _, tensor in named_tensors(network)}
    return copy.deepcopy(network, memo)


def _like(tensor: Tensor, value: Tensor) -> Tensor:
    """Returns the value as what the tensor is: a parameter of its type, or a buffer."""
    if isinstance(tensor, nn.Parameter):
        return type(tensor)(value, requires_grad=tensor.requires_grad)
    return value


def run(
    network: nn.Module, num_members: int, args: Any, kwargs: Any, in_axes: int | None, chunk_size: int | None
) -> Any:
    """Returns what every member returns, stacked.

    Under in_axes=0 each member has inputs of its own, else they share them.
    """
    call = _Call(network, num_members, args, kwargs, in_axes, chunk_size)
    if chunk_size is None or chunk_size >= num_members:
        return call.results(*call.chunk(call.tensors, call.batches))
    rows = zip(*(tensor.split(chunk_size) for tensor in call.tensors), strict=True)
    batches = zip(*(x.split(chunk_size) for x in call.batches), strict=True) if call.batches else repeat(())
    chunk = call.chunk_again if call.needs_grad() else call.chunk
    chunks = [chunk(*own) for own in zip(rows, batches, strict=False)]
    outputs, assigned = (
        [torch.cat(column) for column in zip(*part, strict=True)] for part in zip(*chunks, strict=True)
    )
    return call.results(outputs, assigned)


class _Call:
    """One call of all members: each runs the network with its rows of the tensors and of the inputs."""

    def __init__(
        self, network: nn.Module, num_members: int, args: Any, kwargs: Any, in_axes: int | None, chunk_size: int | None
    ) -> None:
        self.network = network
        self.inputs, self.structure = tree_flatten((args, kwargs))
        self.mapped = [in_axes == 0 and isinstance(x, Tensor) and x.ndim > 0 for x in self.inputs]
        self.batches = [x for x, is_mapped in zip(self.inputs, self.mapped, strict=True) if is_mapped]
        self.slots: list[tuple[dict[str, Any], str, Tensor]] = [
            (registry, name, tensor)
            for module in network.modules()
            for registry in (module._parameters, module._buffers)
            for name, tensor in registry.items()
            if tensor is not None
        ]
        self.tensors = list({id(tensor): tensor for _, _, tensor in self.slots}.values())  # tied weights once
        shapes = [
            x.shape[1:] if is_mapped else x.shape
            for x, is_mapped in zip(self.inputs, self.mapped, strict=True)
            if isinstance(x, Tensor)
        ]
        in_loop = chunk_size == 1 or _needs_loop(network, self.tensors, shapes)
        self.rows = (_loop if in_loop else vmap)(self.row, randomness="different")
        self.runs_once = not in_loop and (chunk_size is None or chunk_size >= num_members)
        self.first_inputs: list[Any] = []
        self.output_structure: Any = None
        self.constants: list[Any] = []
        self.assigned: list[Tensor] = []

    def row(self, rows: Sequence[Tensor], batches: Sequence[Tensor]) -> Outputs:
        """Returns one member's outputs, and the buffers that it assigned anew.

        Other buffers are changed in place. torch.func.functional_call would leave a module that is used twice with the
        wrong tensors, and costs more.
        """
        given = dict(zip(map(id, self.tensors), rows, strict=True))
        for registry, name, tensor in self.slots:
            registry[name] = given[id(tensor)]
        own = iter(batches)
        leaves = [next(own) if is_mapped else x for x, is_mapped in zip(self._given(), self.mapped, strict=True)]
        args, kwargs = tree_unflatten(leaves, self.structure)
        outputs, self.output_structure = tree_flatten(self.network(*args, **kwargs))
        for y in outputs:
            if not isinstance(y, Tensor):
                check_output_leaf("Ensemble", y)
        self.constants = [None if isinstance(y, Tensor) else (y,) for y in outputs]
        assigned = {
            id(t): (t, registry[name]) for registry, name, t in self.slots if registry[name] is not given[id(t)]
        }
        self.assigned = [tensor for tensor, _ in assigned.values()]
        return [y for y in outputs if isinstance(y, Tensor)], [new for _, new in assigned.values()]

    def _given(self) -> list[Any]:
        """Returns the inputs as they were: members that run one after another may change them in place."""
        if self.runs_once:
            return self.inputs
        if not self.first_inputs:
            of_all = zip(self.inputs, self.mapped, strict=True)
            self.first_inputs = [x.clone() if isinstance(x, Tensor) and not own else x for x, own in of_all]
            return self.first_inputs
        both = zip(self.inputs, self.first_inputs, strict=True)
        return [x.clone() if _may_be_changed(first) else x for x, first in both]

    def chunk(self, rows: Sequence[Tensor], batches: Sequence[Tensor]) -> Outputs:
        before = [registry[name] for registry, name, _ in self.slots]  # other tensors than now in a backward pass
        try:
            with nullcontext() if torch.compiler.is_compiling() else _unfused_attention():
                return self.rows(rows, batches)
        except RuntimeError as error:
            if "vmap" in str(error):
                error.add_note("Ensemble runs its members by torch.vmap. To run one at a time, pass chunk_size=1.")
            raise
        finally:
            for (registry, name, _), tensor in zip(self.slots, before, strict=True):
                registry[name] = tensor

    def chunk_again(self, rows: Sequence[Tensor], batches: Sequence[Tensor]) -> Outputs:
        """Keeps no activations, and runs once more in the backward pass, with the buffers as they were."""
        buffers = {id(buffer) for buffer in self.network.buffers()}
        changes = [id(tensor) in buffers for tensor in self.tensors]

        def copied(rows: Sequence[Tensor]) -> list[Tensor]:
            return [row.clone() if may_change else row for row, may_change in zip(rows, changes, strict=True)]

        def run(*rows: Tensor) -> tuple[Outputs, list[Tensor]]:
            own = copied(rows)
            return self.chunk(own, batches), own

        outputs, after = checkpoint(run, *copied(rows), use_reentrant=False)
        for row, new, may_change in zip(rows, after, changes, strict=True):
            if may_change:
                row.copy_(new)
        return outputs

    def needs_grad(self) -> bool:
        tensors = (x for x in (*self.tensors, *self.inputs) if isinstance(x, Tensor))
        return torch.is_grad_enabled() and not torch.compiler.is_compiling() and any(x.requires_grad for x in tensors)

    def results(self, outputs: Sequence[Tensor], assigned: Sequence[Tensor]) -> Any:
        anew = {id(tensor): new.detach() for tensor, new in zip(self.assigned, assigned, strict=True)}
        for registry, name, tensor in self.slots if anew else ():
            registry[name] = anew.get(id(tensor), tensor)
        own = iter(outputs)
        leaves = [next(own) if constant is None else constant[0] for constant in self.constants]
        return tree_unflatten(leaves, self.output_structure)


def _loop(row: Callable[..., Outputs], randomness: str) -> Callable[..., Outputs]:
    """Computes what torch.vmap computes, one member at a time."""

    def run(rows: Sequence[Tensor], batches: Sequence[Tensor]) -> Outputs:
        own_rows = zip(*(row.unbind() for row in rows), strict=True)  # one gradient for all rows
        own_batches = zip(*(x.unbind() for x in batches), strict=True) if batches else repeat(())
        members = [row(*own) for own in zip(own_rows, own_batches, strict=False)]
        outputs, assigned = (
            [torch.stack(column) for column in zip(*part, strict=True)] for part in zip(*members, strict=True)
        )
        return outputs, assigned

    return run


def _may_be_changed(x: Any) -> bool:
    """Tells whether something was written into a new tensor, or nothing counted it."""
    return isinstance(x, Tensor) and (torch.compiler.is_compiling() or x.is_inference() or x._version > 0)


def _needs_loop(network: nn.Module, tensors: Sequence[Tensor], shapes: Sequence[Sequence[int]]) -> bool:
    """Tells whether torch.vmap cannot run the network, runs it otherwise than a member alone, or runs it slower.

    `shapes` are those of the inputs.
    """
    width = 0
    for module in network.modules():
        if isinstance(module, (nn.RNNBase, nn.RNNCellBase)):
            return True  # there are no batching rules for their kernels
        if isinstance(module, _BatchNorm) and module.momentum is None and module.training:
            return True  # a cumulative average reads its count as a number
        if isinstance(module, nn.Linear):
            width = max(width, module.in_features, module.out_features)
    devices = {tensor.device.type for tensor in tensors}
    available = (device for device in devices if torch.amp.is_autocast_available(device))
    if any(torch.is_autocast_enabled(device) for device in available):
        return True  # batched products would skip the cast
    large = any(max(math.prod(shape), shape[0] * width) >= _LARGE for shape in shapes if shape)
    return large and devices == {"cpu"} and not torch.compiler.is_compiling()


@contextmanager
def _unfused_attention() -> Iterator[None]:
    """Turns off torch's fused attention for inference: it has no batching rules and reads weights past their layers."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


def has_hooks(module: nn.Module) -> bool:
    return _has_any_global_hook() or any(vars(module)[hooks] for hooks in _HOOKS)


def mlp_layers(network: nn.Module, x: Any, in_axes: int | None) -> list[nn.Module]:
    """Lists the layers of a Sequential of Linear and elementwise layers, and none of another network.

    Such a Sequential needs no vmap.
    """
    if type(x) is not Tensor or x.ndim < (1 if in_axes is None else 2) or not x.numel():
        return []
    layers: list[nn.Module] = []
    todo = [network]
    while todo:
        layer = todo.pop()
        if "forward" in vars(layer) or has_hooks(layer):
            return []
        if type(layer) is nn.Sequential:
            todo += reversed(layer._modules.values())
        elif type(layer) is nn.Linear or (type(layer) in _ELEMENTWISE and layers):  # Linear first, it widens the input
            layers.append(layer)
        else:
            return []
    fits = layers and x.shape[-1] == layers[0].in_features and x.dtype == layers[0].weight.dtype
    return layers if fits else []


def run_mlp(layers: Sequence[nn.Module], num_members: int, x: Tensor, in_axes: int | None) -> Tensor:
    """Computes what vmap computes, in fewer and larger operations."""
    batch = x.shape[:-1] if in_axes is None else x.shape[1:-1]
    y = x.reshape(1 if in_axes is None else num_members, -1, x.shape[-1]).expand(num_members, -1, -1)
    for layer in layers:  # weight first: their gradients come in the weights' own layout, which is up to 2 x faster
        if not isinstance(layer, nn.Linear):
            y = layer(y)
        elif layer.bias is None:
            y = torch.bmm(layer.weight, y.mT).mT
        else:
            y = torch.baddbmm(layer.bias[:, :, None], layer.weight, y.mT).mT
    return y.reshape(num_members, *batch, -1)


# What frameworks note of a run, and no forward reads.
_OF_A_RUN = {"_trainer", "_fabric", "_fabric_optimizers", "_current_fx_name", "_compiled_call_impl"}


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
    attributes = {name: value for name, value in vars(module).items() if name not in _OF_A_RUN}
    hooks = {n: list(v.values()) for n, v in attributes.items() if "_hooks" in n and isinstance(v, dict)}
    registries = [attributes.pop(name) for name in ("_parameters", "_buffers", "_modules")]
    names = [list(registry) for registry in registries]
    return {**attributes, **hooks, **{k: v for registry in registries for k, v in registry.items()}, "names": names}


def _content(value: Any) -> tuple[str, tuple[int, ...], bytes] | None:
    if not isinstance(value, Tensor):
        return None
    data = value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes() if value.numel() else b""
    return str(value.dtype), tuple(value.shape), data
