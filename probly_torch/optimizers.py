"""The state of SGD, Adam and AdamW in the common form, so that training goes on in the other framework."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from probly_common.checks.optimizers import (
    check_optimizer,
    check_parameters,
    check_same_in_both,
    check_state,
    check_steps,
    warn_state_not_finite,
)
from probly_common.checks.weights import check_numpy
from probly_common.weights.files import Arrays, Spec, keep_once, open_arrays, specs_of, write_arrays
from probly_common.weights.match import check_tied
from probly_torch.weights import (
    Flatten,
    check_file_flattened,
    flatten_sizes,
    inventory_of,
    metadata_of,
    tensor_of,
    view_of,
)

__all__ = ["load_optimizer", "load_optimizer_arrays", "optimizer_to_arrays", "save_optimizer"]


def optimizer_to_arrays(
    model: nn.Module, optimizer: torch.optim.Optimizer, *, flatten: Flatten = None
) -> dict[str, np.ndarray]:
    """Copies the state of an optimizer into arrays, by the names of the model's parameters in torch.

    The optimizer is a `torch.optim.SGD`, `Adam` or `AdamW`. Its state is what training needs to go on, beside the
    weights. With the twin of the optimizer in the other framework, training takes the same steps. Learning rate, betas,
    decay and schedule are not part of the state: build the twin with them, by this table.

    | torch.optim | optax |
    |---|---|
    | `SGD(p, lr)` | `sgd(lr)` |
    | `SGD(p, lr, momentum=m, nesterov=n)` | `sgd(lr, momentum=m, nesterov=n)` |
    | `SGD(p, lr, momentum=m, weight_decay=w)` | `chain(add_decayed_weights(w), sgd(lr, momentum=m))`, in this order |
    | `Adam(p, lr, (b1, b2), eps)` | `adam(lr, b1, b2, eps)` |
    | `Adam(p, lr, weight_decay=w)` | `chain(add_decayed_weights(w), adam(lr))`, in this order |
    | `AdamW(p, lr, weight_decay=w)` | `adamw(lr, weight_decay=w)`; left out, it is 1e-2 in torch and 1e-4 in optax |

    optax takes Adam's bias correction in float32 unless `jax_enable_x64` is set: 1e-5 off at first, less later.

    Args:
        model: whose parameters the optimizer updates. Frozen ones have no state.
        optimizer: of the model's parameters, in one group or several. A new one has zeros.
        flatten: as in `to_arrays`, which the state follows. Here it is only checked.

    Returns:
        For each parameter `name.exp_avg`, `name.exp_avg_sq` and `name.step`, or `name.momentum_buffer`, in torch's
        layout. Both names of a tied parameter are there.

    Raises:
        TypeError: if the optimizer is none of these.
        ValueError: if it updates parameters that are not the model's, or has amsgrad or dampening, which optax computes
            otherwise.

    Example:
        >>> model = nn.Linear(3, 2)
        >>> arrays = optimizer_to_arrays(model, torch.optim.SGD(model.parameters(), 0.1, momentum=0.9))
        >>> {name: array.shape for name, array in arrays.items()}
        {'weight.momentum_buffer': (2, 3), 'bias.momentum_buffer': (2,)}
    """
    flatten_sizes("optimizer_to_arrays", inventory_of("optimizer_to_arrays", model), flatten)
    arrays = _arrays(optimizer, _slots(_parameters("optimizer_to_arrays", model, optimizer)))
    return {name: np.array(array) for name, array in arrays.items()}


def load_optimizer_arrays(
    model: nn.Module, optimizer: torch.optim.Optimizer, arrays: Mapping[str, np.ndarray], *, flatten: Flatten = None
) -> None:
    """Copies arrays into the state of an optimizer, all of them or none.

    A state that the optimizer has already is changed in place.

    Args:
        model: whose parameters the optimizer updates, with the weights that belong to the state.
        optimizer: of the kind that the arrays come from: see the table of `optimizer_to_arrays`.
        arrays: of `optimizer_to_arrays`, in either framework. SGD takes no note of steps, which in torch the schedule
            counts: build that with `last_epoch=steps`.
        flatten: as in `to_arrays`. Here it is only checked.

    Raises:
        TypeError: if the optimizer is none of SGD, Adam and AdamW.
        ValueError: listing every name that is missing or unexpected, and every other shape or dtype.

    Example:
        >>> model = nn.Linear(3, 2)
        >>> source, target = (torch.optim.Adam(model.parameters()) for _ in range(2))
        >>> model(torch.ones(1, 3)).sum().backward()
        >>> source.step()
        >>> load_optimizer_arrays(model, target, optimizer_to_arrays(model, source))
        >>> target.state[model.weight]["step"]
        tensor(1.)
    """
    check_numpy("load_optimizer_arrays", arrays)
    _load("load_optimizer_arrays", model, optimizer, arrays, flatten)


def save_optimizer(
    model: nn.Module, optimizer: torch.optim.Optimizer, path: str | os.PathLike[str], *, flatten: Flatten = None
) -> None:
    """Writes the state of an optimizer to a safetensors file. The weights go to a file of their own.

    Args:
        model: as in `optimizer_to_arrays`.
        optimizer: as in `optimizer_to_arrays`.
        path: of the file, which is replaced once the new one is complete.
        flatten: as in `to_arrays`. The file records it for probly_flax.load_optimizer, which needs it.

    Raises:
        TypeError: if the optimizer is none of SGD, Adam and AdamW.
        ValueError: as `optimizer_to_arrays`.

    Example:
        >>> import tempfile
        >>> model = nn.Linear(3, 2)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_optimizer(model, torch.optim.Adam(model.parameters()), f"{folder}/optimizer.safetensors")
    """
    slots = _slots(_parameters("save_optimizer", model, optimizer))
    inventory = inventory_of("save_optimizer", model)
    kept, tied = keep_once(_arrays(optimizer, slots), _identities(slots))
    write_arrays(path, kept, metadata_of("save_optimizer", inventory, flatten) | tied)


def load_optimizer(
    model: nn.Module, optimizer: torch.optim.Optimizer, path: str | os.PathLike[str], *, flatten: Flatten = None
) -> None:
    """Loads the file of `save_optimizer`, written in either framework, all of it or nothing. Nothing is unpickled.

    Args:
        model: as in `load_optimizer_arrays`.
        optimizer: as in `load_optimizer_arrays`.
        path: of a file by `save_optimizer` of either package.
        flatten: as in `to_arrays`; {} takes a file from Flax for one in torch's order.

    Raises:
        FileNotFoundError: if there is no such file.
        TypeError: if the optimizer is none of SGD, Adam and AdamW.
        ValueError: if the file is damaged, or does not fit the optimizer; it says how.

    Example:
        >>> import tempfile
        >>> model = nn.Linear(3, 2)
        >>> optimizer = torch.optim.Adam(model.parameters())
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_optimizer(model, optimizer, f"{folder}/optimizer.safetensors")
        ...     load_optimizer(model, optimizer, f"{folder}/optimizer.safetensors")
    """
    what = f"load_optimizer({os.fspath(path)!r})"
    with open_arrays("load_optimizer", path) as arrays:
        check_file_flattened(what, inventory_of(what, model), arrays, flatten, "save_optimizer")
        _load(what, model, optimizer, arrays, flatten)


class _Slot(NamedTuple):
    """One tensor of an optimizer's state, which is made in the first step."""

    parameter: nn.Parameter
    key: str
    device: torch.device | str

    def zeros(self) -> Tensor:
        if self.key == "step":
            return torch.zeros((), dtype=torch.float32, device=self.device)
        return torch.zeros_like(self.parameter, requires_grad=False)

    def spec(self) -> Spec:
        if self.key == "step":
            return Spec((), "float32")
        return Spec(tuple(self.parameter.shape), str(self.parameter.dtype).removeprefix("torch."))


def _load(
    what: str,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    arrays: Mapping[str, np.ndarray],
    flatten: Flatten,
) -> None:
    parameters = _parameters(what, model, optimizer)
    slots = _slots(parameters)
    flatten_sizes(what, inventory_of(what, model), flatten)
    expected = {name: slot.spec() for name, slot in slots.items()}
    optional = {f"{name}.step": Spec((), "float32") for name in parameters if f"{name}.step" not in slots}
    check_state(what, expected | optional, specs_of(arrays), optional)
    check_tied(what, _identities(slots), arrays)
    check_steps(what, {name: float(arrays[name]) for name in arrays if name.endswith(".step")})
    if isinstance(arrays, Arrays):
        warn_state_not_finite(what, arrays.not_finite({name: spec.dtype for name, spec in expected.items()}))
    with torch.no_grad():
        for name, slot in slots.items():
            state = optimizer.state[slot.parameter]
            if state.get(slot.key) is None:
                state[slot.key] = slot.zeros()
            state[slot.key].copy_(tensor_of(np.asarray(arrays[name])))


def _arrays(optimizer: torch.optim.Optimizer, slots: Mapping[str, _Slot]) -> Arrays:
    def read(name: str) -> np.ndarray:
        slot = slots[name]
        value = optimizer.state.get(slot.parameter, {}).get(slot.key)
        value = slot.zeros() if value is None else torch.as_tensor(value)
        return view_of(value.float() if slot.key == "step" else value)

    return Arrays({name: slot.spec() for name, slot in slots.items()}, read)


def _identities(slots: Mapping[str, _Slot]) -> dict[str, Any]:
    """Returns what is equal for the names of one tied parameter, and for them only."""
    return {name: (id(slot.parameter), slot.key) for name, slot in slots.items()}


def _parameters(
    what: str, model: nn.Module, optimizer: torch.optim.Optimizer
) -> dict[str, tuple[nn.Parameter, dict[str, Any]]]:
    """Returns what the optimizer updates, with its group, under every name that it has in the model."""
    kinds = torch.optim.SGD, torch.optim.Adam  # AdamW is one
    check_optimizer(what, optimizer, kinds, "SGD, Adam or AdamW", "torch.optim.AdamW(model.parameters())")
    groups = optimizer.param_groups
    options = {f"{option}=True" for option in ("amsgrad", "maximize") for group in groups if group.get(option)}
    options |= {f"dampening={group['dampening']}" for group in groups if group.get("dampening")}
    check_same_in_both(what, sorted(options))
    group_of = {id(parameter): group for group in groups for parameter in group["params"]}
    named = [(name, p) for name, p in model.named_parameters(remove_duplicate=False) if id(p) in group_of]
    check_parameters(what, len(group_of) - len({id(p) for _, p in named}))
    return {name: (p, group_of[id(p)]) for name, p in named if p.requires_grad or optimizer.state.get(p)}


def _slots(parameters: Mapping[str, tuple[nn.Parameter, dict[str, Any]]]) -> dict[str, _Slot]:
    """Returns what the state of an optimizer of these parameters holds, or will hold from its first step."""
    slots = {}
    for name, (parameter, group) in parameters.items():
        if "betas" in group:  # Adam
            counts_there = group["capturable"] or group["fused"]
            slots[f"{name}.exp_avg"] = _Slot(parameter, "exp_avg", parameter.device)
            slots[f"{name}.exp_avg_sq"] = _Slot(parameter, "exp_avg_sq", parameter.device)
            slots[f"{name}.step"] = _Slot(parameter, "step", parameter.device if counts_there else "cpu")
        elif group["momentum"]:
            slots[f"{name}.momentum_buffer"] = _Slot(parameter, "momentum_buffer", parameter.device)
    return slots
