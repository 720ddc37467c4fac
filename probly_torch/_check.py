"""Whether each member's rows are what the member computes alone."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from probly_common.mismatch import Calls, Mismatch, first_mismatch
from probly_torch._reset import seeded


def find_mismatch(model: Any, args: Any, kwargs: Any, layers: Sequence[str] = ()) -> Mismatch | None:
    """Compares the model's outputs with each member's, in eval mode and, where weights are floating, in float64.

    A network that cannot run in float64, as grouped products of experts cannot, is compared in its own dtype. `layers`
    are those that have members, by their paths in one member.
    """
    inputs = args, kwargs
    try:
        return _mismatch(copy.deepcopy(model).eval().double(), tree_map_only(Tensor, _wide, inputs), layers)
    except RuntimeError:
        return _mismatch(copy.deepcopy(model).eval(), inputs, layers)


def _mismatch(model: Any, inputs: Any, layers: Sequence[str]) -> Mismatch | None:
    def run(i: int | None, calls: Calls) -> list[np.ndarray]:
        network, prefix = (model, "network.") if i is None else (model[i], "")
        given = tree_map_only(Tensor, lambda x: x.detach().clone(), inputs)
        recording = _recording({path: network.get_submodule(f"{prefix}{path}".strip(".")) for path in layers}, calls)
        with torch.no_grad(), seeded(0), recording:
            outputs = network(*given[0], **given[1])
        return [_array(y) for y in tree_leaves(outputs) if isinstance(y, Tensor)]

    return first_mismatch(run, model.num_members, layers, (RuntimeError, ValueError, IndexError))


@contextmanager
def _recording(layers: Mapping[str, nn.Module], calls: Calls) -> Iterator[None]:
    def enter(path: str) -> Any:
        return lambda layer, args: calls.enter(path)

    def leave(path: str) -> Any:
        return lambda layer, args, output: calls.leave(path, lambda: _array(tree_leaves(output)[0]))

    hooks = [layer.register_forward_pre_hook(enter(path)) for path, layer in layers.items()]
    hooks += [layer.register_forward_hook(leave(path)) for path, layer in layers.items()]
    yield
    for hook in hooks:
        hook.remove()


def _wide(x: Tensor) -> Tensor:
    return x.double() if x.is_floating_point() else x


def _array(tensor: Tensor) -> np.ndarray:
    return tensor.detach().cpu().double().numpy()
