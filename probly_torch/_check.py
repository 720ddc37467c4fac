"""Whether each member's rows are what the member computes alone."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from probly_common.mismatch import Calls, Mismatch, mismatch, refused


def find_mismatch(model: Any, args: Any, kwargs: Any, layers: Sequence[str] = ()) -> Mismatch | None:
    """Compares the model's outputs with each member's, in eval mode and, where weights are floating, in float64.

    `layers` are those that have members, by their paths in one member.
    """
    wide = copy.deepcopy(model).eval().double()
    members = [_run(member, args, kwargs, layers, Calls()) for member in wide]
    calls = Calls()
    try:
        y, _ = _run(wide, args, kwargs, layers, calls, "network")
    except (RuntimeError, ValueError, IndexError):
        if calls.entered is None:
            raise
        return refused(calls)
    rows = [[each[i] for each in y] for i in range(len(members))]
    found = (mismatch(i, rows[i], *alone, layers, calls) for i, alone in enumerate(members))
    return next((each for each in found if each), None)


def _run(
    network: nn.Module, args: Any, kwargs: Any, layers: Sequence[str], calls: Calls, prefix: str = ""
) -> tuple[list[np.ndarray], Calls]:
    """Returns the outputs, and adds the calls of the layers."""
    given = tree_map_only(Tensor, _wide, (args, kwargs))
    with torch.no_grad(), torch.random.fork_rng(devices=()), _recording(network, layers, calls, prefix):
        torch.manual_seed(0)
        outputs = network(*given[0], **given[1])
    return [_array(y) for y in tree_leaves(outputs) if isinstance(y, Tensor)], calls


@contextmanager
def _recording(network: nn.Module, layers: Sequence[str], calls: Calls, prefix: str) -> Iterator[None]:
    def enter(path: str) -> Any:
        return lambda layer, args: calls.enter(path)

    def leave(path: str) -> Any:
        return lambda layer, args, output: calls.leave(path, _array(tree_leaves(output)[0]))

    hooks = []
    for path in layers:
        layer = network.get_submodule(f"{prefix}.{path}".strip("."))
        hooks += [layer.register_forward_pre_hook(enter(path)), layer.register_forward_hook(leave(path))]
    yield
    for hook in hooks:
        hook.remove()


def _wide(x: Tensor) -> Tensor:
    return (x.double() if x.is_floating_point() else x).detach().clone()


def _array(tensor: Tensor) -> np.ndarray:
    return tensor.detach().cpu().double().numpy()
