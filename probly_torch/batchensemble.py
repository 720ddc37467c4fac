"""BatchEnsemble for whole networks (Wen et al. 2020): one network, E members, almost no more parameters."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeGuard

from torch import Tensor, nn
from torch.utils._pytree import tree_map, tree_map_only

from probly_torch import random
from probly_torch._checks import (
    check_batch_first,
    check_in_axes,
    check_init,
    check_member_axis,
    check_module,
    check_not_converted,
    check_num_members,
    check_output_leaf,
    check_output_rows,
    check_rows_of_batch,
    common_num_members,
    member_index,
    member_indices,
)
from probly_torch._report import Exclude, Excluder, Report, ReportRow, make_report, natural_order
from probly_torch.functional import split_members, tile_members
from probly_torch.layers import BatchEnsembleLinear
from probly_torch.random import Rngs

__all__ = ["BatchEnsemble", "batchensemble"]


class BatchEnsemble(nn.Module):
    """A network of BatchEnsemble layers, called with one batch and returning each member's outputs.

    Shape:
        model(x): x (B, ...), the same batch for every member. Returns (E, B, ...).
        model(x, in_axes=0): x (E, B, ...), a batch for each member. Returns (E, B, ...).
        Inputs and outputs may be several, in tuples, lists and dicts. Every tensor with an axis has the batch on its
        first one, inside the network too; what is not a tensor with an axis is passed on.
    Args:
        network: a module that holds BatchEnsemble layers and maps (E*B, ...) rows to (E*B, ...) rows.
        report: what the conversion did, if one made the network.
    Raises:
        ValueError: if the network has no BatchEnsemble layer, or layers of different num_members.
    Example:
        >>> import torch
        >>> model = batchensemble(nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 3)), 4)
        >>> model(torch.ones(5, 2)).shape, len(model), type(model[0]).__name__
        (torch.Size([4, 5, 3]), 4, 'Sequential')
    """

    def __init__(self, network: nn.Module, report: Report | None = None) -> None:
        super().__init__()
        check_module("BatchEnsemble", "network", network, nn.Module)
        self.num_members = common_num_members(layer.num_members for layer in _layers(network))
        paths = [path for path, m in network.named_modules() if getattr(m, "batch_first", True) is False]
        check_batch_first("BatchEnsemble", paths, "batch_first=True")
        self.network = network
        self.report = report

    def forward(self, *args: Any, in_axes: int | None = None, **kwargs: Any) -> Any:
        check_in_axes("BatchEnsemble", in_axes)
        inputs: list[int] = []

        def rows(x: Tensor) -> Tensor:
            if not x.ndim:
                return x
            if in_axes is None:
                x = tile_members(x, self.num_members)
            else:
                check_member_axis("BatchEnsemble", [x.shape], self.num_members, rank=2)
                x = x.flatten(0, 1)
            inputs.append(x.shape[0])
            return x

        def members(y: Any) -> Any:
            if not isinstance(y, Tensor):
                check_output_leaf("BatchEnsemble", y)
                return y
            check_output_rows("BatchEnsemble", y.shape, inputs[0])
            return split_members(y, self.num_members)

        args, kwargs = tree_map_only(Tensor, rows, (args, kwargs))
        check_rows_of_batch("BatchEnsemble", inputs)
        return tree_map(members, self.network(*args, **kwargs))

    def __len__(self) -> int:
        return self.num_members

    def __iter__(self) -> Iterator[nn.Module]:
        return (self[i] for i in range(self.num_members))

    def __getitem__(self, item: int | slice | Sequence[int]) -> Any:
        """Member `item` as a plain network with folded weights; or, for a slice or a list, those members alone."""
        network = copy.deepcopy(self.network)
        if isinstance(item, (slice, list, tuple)):
            indices = member_indices("BatchEnsemble", item, self.num_members)
            for layer in _layers(network):
                layer.keep_members(indices)
            return BatchEnsemble(network, self.report)
        i = member_index("BatchEnsemble", item, self.num_members)
        for layer in _layers(network):
            _become(layer, layer.member(i))
        return network


def batchensemble(
    base: nn.Module,
    num_members: int,
    *,
    rngs: Rngs | int = 0,
    use_base_weights: bool = True,
    init: str = "normal",
    r_mean: float = 1.0,
    r_std: float = 0.5,
    s_mean: float = 1.0,
    s_std: float = 0.5,
    exclude: Exclude | Iterable[Exclude] = (),
) -> BatchEnsemble:
    """Converts every Linear layer of a copy of the network; the network itself stays as it is.

    Layers used twice stay one layer, tied weights stay tied, and each layer draws keys of its own from rngs,
    in the order of their paths. Subclasses of Linear are left shared, since their forward may be their own.

    Args:
        base: the network.
        num_members: the number of members E.
        rngs: a seed or an Rngs.
        use_base_weights: start from the network's weights; otherwise draw them anew, lecun_normal.
        init: "normal" or "random_sign", see BatchEnsembleLinear.
        r_mean: mean of r under init="normal".
        r_std: standard deviation of r under init="normal".
        s_mean: mean of s under init="normal".
        s_std: standard deviation of s under init="normal".
        exclude: layers to leave shared: name patterns ("head.*"), types, or functions of (path, layer).
    Returns:
        A BatchEnsemble; its `report` says what was done with each layer.
    Raises:
        ValueError: if nothing can be converted, or the network is converted already.
        TypeError: if base is not a module.
    Example:
        >>> model = batchensemble(nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 3)), 4, exclude="2")
        >>> print(model.report)
        path  kind    action     before  after
        0     Linear  converted      24     88
        2     Linear  excluded       27     27
                      total          51    115
    """
    what = "batchensemble"
    check_module(what, "base", base, nn.Module)
    num_members = check_num_members(what, num_members)
    check_init(what, init, r_mean, r_std, s_mean, s_std)
    rngs, excluder = random.as_rngs(what, rngs), Excluder(exclude)
    check_not_converted(what, (layer.num_members for layer in _layers(base)))

    network = copy.deepcopy(base)
    paths: dict[nn.Module, str] = {}
    for path, layer in network.named_modules(remove_duplicate=False):
        paths[layer] = min(paths.get(layer, path), path, key=natural_order)
    biases: dict[Tensor | None, Any] = {}
    rows = []
    for layer, path in sorted(paths.items(), key=lambda item: natural_order(item[1])):
        excluded = excluder(path, layer)
        before = after = sum(p.numel() for p in layer.parameters(recurse=False))
        if not before:
            continue
        kind, action = type(layer).__name__, "excluded" if excluded else "shared"
        if not excluded and _is_convertible(layer):
            action = "converted"
            converted = BatchEnsembleLinear(
                layer, rngs, num_members, use_base_weights, init, r_mean, r_std, s_mean, s_std
            )
            layer.weight.data.copy_(converted.weight.data)
            # The same Parameter, so that what was tied to it still is.
            converted.weight = layer.weight  # type: ignore[assignment]
            converted.bias = biases.setdefault(layer.bias, converted.bias)
            _become(layer, converted)
            after = sum(p.numel() for p in converted.parameters())
        rows.append(ReportRow(path, kind, action, before, after))
    excluder.check_all_matched(rows)
    report = make_report(what, rows, ["Linear"])
    _avoid_fast_paths(network)
    return BatchEnsemble(network, report)


def _layers(network: nn.Module) -> list[BatchEnsembleLinear]:
    return [layer for layer in network.modules() if isinstance(layer, BatchEnsembleLinear)]


def _is_convertible(layer: nn.Module) -> TypeGuard[nn.Linear]:
    """A Linear layer itself, whose weight is a parameter (weight_norm, for one, makes it something else)."""
    plain = type(layer) is nn.Linear and "forward" not in vars(layer) and not layer._buffers
    return plain and set(layer._parameters) == {"weight", "bias"}


def _become(layer: nn.Module, new: nn.Module) -> None:
    """Turns a layer of our own copy into another one in place: whatever refers to it, in a list or twice, follows."""
    kept = {name: value for name, value in vars(layer).items() if "_hooks" in name or name == "training"}
    layer.__class__ = type(new)
    vars(layer).clear()
    vars(layer).update(vars(new) | kept)


def _avoid_fast_paths(network: nn.Module) -> None:
    """Turns off the fused inference of torch's Transformer, which reads weights past the layers that hold them."""
    for module in network.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            module.activation_relu_or_gelu = 0
        if isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False
