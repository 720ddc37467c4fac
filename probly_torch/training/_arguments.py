"""Networks and functions in a checkpoint, from where they are built again without running what else it may say.

They are pickled without the weights, to bytes that other readers of the checkpoint leave alone, and read by torch's
restricted unpickler: it builds layers of torch and of this library, their losses, optimizers and schedules, and nothing
else, unless the caller says that the file is trusted.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import io
import pickle
import random
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from probly_common.report import Report, ReportRow
from probly_torch import layers, losses
from probly_torch._copies import Pool
from probly_torch.batchensemble import BatchEnsemble
from probly_torch.ensemble import Ensemble
from probly_torch.random import Rngs, RngStream
from probly_torch.training._groups import plain_adamw


def pack(arguments: Mapping[str, Any]) -> dict[str, bytes | None]:
    """Packs each argument as bytes, without the weights that state_dict holds.

    An argument that does not pickle becomes None, as a lambda does.
    """
    return {name: _pack(value) for name, value in arguments.items()}


def unpack(what: str, packed: Mapping[str, bytes | None], *, trusted: bool) -> dict[str, Any]:
    """Unpacks what `pack` packed.

    A network's weights are not filled in yet. Without a network there is nothing to load. Without one of the functions
    there is: whoever calls that function is told.
    """
    arguments: dict[str, Any] = {}
    for name, data in packed.items():
        value = _unpack(what, name, data, trusted)
        if isinstance(value, _Missing) and name == "model":
            raise value.error
        arguments[name] = value
    return arguments


@dataclasses.dataclass
class _Missing:
    """A stand-in for a function that the file does not give: it is needed to train, and not to predict."""

    error: ValueError

    def __reduce__(self) -> Any:
        raise TypeError("it is missing in the next file, too")

    def __call__(self, *args: Any) -> Any:
        raise self.error


def _pack(value: Any) -> bytes | None:
    buffer = io.BytesIO()
    try:
        torch.save(_without_weights(value) if isinstance(value, nn.Module) else value, buffer)
    except Exception:  # of whatever class: a training does not end because a network or a function does not pickle
        return None
    return buffer.getvalue()


def _unpack(what: str, name: str, data: bytes | None, trusted: bool) -> Any:
    if data is None:
        return _Missing(
            ValueError(
                f"{what} expects a file with its {name} for this; got one without, since functions such as a lambda "
                f"cannot be written into it. Pass it: {what}(path, {name}=...)."
            )
        )
    try:
        with torch.serialization.safe_globals(_known()):
            value = torch.load(io.BytesIO(data), map_location="cpu", weights_only=not trusted)
    except pickle.UnpicklingError as error:
        names = set(torch.serialization.get_unsafe_globals_in_checkpoint(io.BytesIO(data)))
        names -= {f"{each.__module__}.{each.__qualname__}" for each in _known()}
        unknown = ", ".join(sorted(names)[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        return _Missing(
            ValueError(
                f"{what} expects a file whose {name} is made of what torch and this library have; got "
                f"{unknown or error}. Pass it: {what}(path, {name}=...); or, if you trust the file, "
                f"let it run code: {what}(path, weights_only=False)."
            )
        )
    return _with_empty_weights(value) if isinstance(value, nn.Module) else value


def _known() -> list[Any]:
    """Lists what does no harm when it is built from arguments of someone else's choice."""
    kinds = (
        (vars(nn), nn.Module),
        (vars(torch.optim), torch.optim.Optimizer),
        (vars(torch.optim.lr_scheduler), torch.optim.lr_scheduler.LRScheduler),
        (vars(layers), nn.Module),
    )
    classes = [x for names, kind in kinds for x in names.values() if isinstance(x, type) and issubclass(x, kind)]
    activations = [F.elu, F.gelu, F.leaky_relu, F.mish, F.relu, F.relu6, F.selu, F.silu, F.softplus, F.tanh]
    ours = [
        plain_adamw,
        Ensemble,
        BatchEnsemble,
        Pool,
        Report,
        ReportRow,
        Rngs,
        RngStream,
        *(getattr(losses, x) for x in losses.__all__),
    ]
    return [*classes, NonDynamicallyQuantizableLinear, *activations, *ours, functools.partial, random.Random]


def _without_weights(network: nn.Module) -> nn.Module:
    """Copies a network. Parameters and buffers are shapes alone, where state_dict holds them."""
    memo: dict[int, Any] = {}
    for tensor in network.state_dict(keep_vars=True).values():
        if isinstance(tensor, Tensor):
            shape = torch.empty_like(tensor, device="meta", requires_grad=False)
            kept = isinstance(tensor, nn.Parameter)
            memo[id(tensor)] = nn.Parameter(shape, tensor.requires_grad) if kept else shape
    return copy.deepcopy(network, memo)


def _with_empty_weights(network: nn.Module) -> nn.Module:
    full: dict[int, Tensor] = {}  # tied weights once
    for module in network.modules():
        registries: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for registry in registries:
            for name, tensor in registry.items():
                if tensor is not None and tensor.is_meta:
                    empty = torch.empty_like(tensor, device="cpu")
                    is_parameter = isinstance(tensor, nn.Parameter)
                    full.setdefault(id(tensor), nn.Parameter(empty, tensor.requires_grad) if is_parameter else empty)
                    registry[name] = full[id(tensor)]
    return network
