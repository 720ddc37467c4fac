"""BatchEnsemble for whole networks (Wen et al. 2020): one network, E members, almost no more parameters."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.nn.functional import gelu, relu
from torch.utils._pytree import tree_map, tree_map_only

from probly_common.checks.ensembles import (
    check_initialized,
    check_members_alone,
    check_no_ensemble,
    check_not_converted,
    check_reset_type,
    common_num_members,
    member_index,
    member_indices,
)
from probly_common.checks.layers import check_init
from probly_common.checks.rows import (
    check_batch_first,
    check_in_axes,
    check_member_axis,
    check_output_leaf,
    check_output_rows,
    check_rows_of_batch,
)
from probly_common.checks.values import as_arguments, check_module, check_num_members
from probly_common.report import Exclude, Excluder, Report, ReportRow, make_report, natural_order
from probly_torch import random
from probly_torch._check import find_mismatch
from probly_torch._kinds import KINDS
from probly_torch._members import lazy_names
from probly_torch._state import has_hooks
from probly_torch.ensemble import Ensemble
from probly_torch.functional import split_members, tile_members
from probly_torch.layers._base import BatchEnsembleLayer, takes_shared_batch
from probly_torch.random import Rngs

__all__ = ["BatchEnsemble", "batchensemble", "register_batchensemble"]

Converter = TypeVar("Converter", bound=Callable[..., nn.Module])
_MEMBERS = [(each, row) for row in KINDS.rows if row.members for each in row.types if each is not row.members]
_CONVERTERS: dict[type[nn.Module], Callable[..., nn.Module]]
_CONVERTERS = {each: row.members for each, row in _MEMBERS if not row.is_norm}
_NORMS = {each: row.members for each, row in _MEMBERS if row.is_norm}


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

        alone = args[0] if len(args) == 1 and not kwargs else None
        if in_axes is None and isinstance(alone, Tensor) and alone.ndim:
            inputs.append(self.num_members * alone.shape[0])
            return tree_map(members, _of_shared_batch(self.network, alone, self.num_members))
        args, kwargs = tree_map_only(Tensor, rows, (args, kwargs))
        check_rows_of_batch("BatchEnsemble", inputs)
        return tree_map(members, self.network(*args, **kwargs))

    def check(self, *args: Any, **kwargs: Any) -> None:
        """Compares each member's outputs with those of the member alone, for this batch, in eval mode and in float64.

        Args:
            args, kwargs: as in a call.
        Raises:
            ValueError: if they differ; it names the member, and the first layer that is not applied to its rows.
        Example:
            >>> import torch
            >>> batchensemble(nn.Sequential(nn.Linear(2, 3)), 4).check(torch.ones(5, 2))
        """
        found = find_mismatch(self, args, kwargs, _paths(self.network))
        check_members_alone("BatchEnsemble.check", found, self.num_members)

    def __len__(self) -> int:
        return self.num_members

    def __iter__(self) -> Iterator[nn.Module]:
        return (self[i] for i in range(self.num_members))

    def __getitem__(self, item: int | slice | Sequence[int]) -> Any:
        """Returns member `item` as a plain network with folded weights; for a slice or a list, those members alone."""
        network = copy.deepcopy(self.network)
        if isinstance(item, (slice, list, tuple)):
            indices = member_indices("BatchEnsemble", item, self.num_members)
            for layer in _layers(network):
                layer.keep_members(indices)
            return BatchEnsemble(network, self.report)
        i = member_index("BatchEnsemble", item, self.num_members)
        for layer in _layers(network):
            _become(layer, layer.member(i))
        _set_fast_paths(network, True)
        return network

    def fold(self) -> Ensemble:
        """Returns the same members as an Ensemble, each with weights of its own.

        Example:
            >>> import torch
            >>> model, x = batchensemble(nn.Sequential(nn.Linear(2, 3)), 4), torch.ones(5, 2)
            >>> torch.allclose(model.fold()(x), model(x))
            True
        """
        return Ensemble(list(self))


def batchensemble(
    base: nn.Module,
    num_members: int,
    *,
    example_input: Any = None,
    rngs: Rngs | int = 0,
    use_base_weights: bool = True,
    init: str = "normal",
    r_mean: float = 1.0,
    r_std: float = 0.5,
    s_mean: float = 1.0,
    s_std: float = 0.5,
    per_member_norms: bool = False,
    exclude: Iterable[Exclude] | Exclude = (),
) -> BatchEnsemble:
    """Converts every layer that it knows in a copy of the network; the network itself stays as it is.

    Layers used twice stay one layer, tied weights stay tied, and each layer draws keys of its own from rngs,
    in the order of their paths. Subclasses of a layer are left shared, since their forward may be their own, unless
    they are registered: `register_batchensemble(MyLinear)(BatchEnsembleLinear)`.

    Args:
        base: the network.
        num_members: the number of members E.
        example_input: a batch, a tuple of arguments, or a dict of them by name, for which members are compared with
            themselves alone. Layers that are not applied to each member's rows, such as those of positions, and layers
            whose weights are read past them, are left shared; the report says why.
        rngs: a seed or an Rngs.
        use_base_weights: start from the network's weights; otherwise draw them anew, lecun_normal.
        init: "normal", "random_sign" or "ones", see BatchEnsembleLinear.
        r_mean: mean of r under init="normal".
        r_std: standard deviation of r under init="normal".
        s_mean: mean of s under init="normal".
        s_std: standard deviation of s under init="normal".
        per_member_norms: give each member normalisation layers of its own; otherwise they share them.
        exclude: layers to leave shared: name patterns ("head.*"), types, or functions of (path, layer).
    Returns:
        A BatchEnsemble; its `report` says what was done with each layer.
    Raises:
        ValueError: if nothing can be converted, an entry of exclude matches nothing, or the network is converted
            already; or if members differ from themselves alone for the example input, whatever is left shared. Then
            nothing is changed, nor drawn from rngs.
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
    rngs = random.as_rngs(what, rngs)
    check_not_converted(what, (layer.num_members for layer in _layers(base)))
    check_no_ensemble(what, (m.num_members for m in base.modules() if isinstance(m, Ensemble)))
    check_initialized(what, lazy_names(base))

    options = {"init": init, "r_mean": r_mean, "r_std": r_std, "s_mean": s_mean, "s_std": s_std}
    norms = _NORMS if per_member_norms else {}
    excluded = Excluder(exclude, nn.Module).entries
    shared: dict[str, str] = {}  # with the reason
    while True:
        draws = copy.deepcopy(rngs)
        excluder = Excluder(excluded, nn.Module)
        model = _converted(base, num_members, draws, excluder, shared, norms, use_base_weights, **options)
        args, kwargs = as_arguments(example_input)
        found = None if example_input is None else find_mismatch(model, args, kwargs, _paths(model.network))
        if found is None or not found.suspects:
            break
        shared |= found.suspects
    check_members_alone(what, found, num_members)
    for name, stream in draws.items():  # now that nothing can fail
        rngs[name].count.copy_(stream.count)
    return model


def _converted(
    base: nn.Module,
    num_members: int,
    draws: Rngs,
    excluder: Excluder,
    shared: Mapping[str, str],
    norms: Mapping[type[nn.Module], Any],
    use_base_weights: bool,
    **options: Any,
) -> BatchEnsemble:
    """Converts a copy of the network, without the layers that are shared."""
    network = copy.deepcopy(base)
    paths: dict[nn.Module, str] = {}
    for path, layer in network.named_modules(remove_duplicate=False):
        paths[layer] = min(paths.get(layer, path), path, key=natural_order)
    per_member: dict[nn.Parameter, nn.Parameter] = {}
    inside: set[nn.Module] = set()  # of what is converted as a whole
    rows = []
    for layer, path in sorted(paths.items(), key=lambda item: natural_order(item[1])):
        excluded = layer not in inside and excluder(path, layer)
        convert = _CONVERTERS.get(type(layer), norms.get(type(layer)))
        converts = convert is not None and not excluded and path not in shared and _is_plain(layer)
        before = after = sum(p.numel() for p in layer.parameters(recurse=converts))
        if not before or layer in inside:
            continue
        kind, action = type(layer).__name__, "excluded" if excluded else "shared"
        if convert and converts:
            action = "converted"
            inside.update(layer.modules())
            converted = (
                convert(layer, num_members)
                if type(layer) in norms and type(layer) not in _CONVERTERS
                else convert(layer, draws, num_members, use_base_weights, **options)
            )
            _keep_ties(layer, converted, per_member)
            _become(layer, converted)
            after = sum(p.numel() for p in converted.parameters())
        rows.append(ReportRow(path, kind, action, before, after, shared.get(path, "")))
    excluder.check_all_matched(rows)
    report = make_report("batchensemble", rows)
    _set_fast_paths(network, False)
    return BatchEnsemble(network, report)


def register_batchensemble(layer_type: type[nn.Module]) -> Callable[[Converter], Converter]:
    """Registers how `batchensemble` converts the layers of exactly that type.

    The function, or class, is called as BatchEnsembleLinear is: (layer, rngs, num_members, use_base_weights, init=...,
    r_mean=..., r_std=..., s_mean=..., s_std=...). It returns a new layer that maps (E*B, ...) rows to (E*B, ...) rows,
    with `num_members`, `member(i)` and `keep_members(indices)`, and leaves the one that it is given as it is.

    Raises:
        TypeError: if the type is not a layer's.
    Example:
        >>> from probly_torch import layers
        >>> class MyLinear(nn.Linear):
        ...     pass
        >>> model = batchensemble(nn.Sequential(MyLinear(2, 3), nn.Linear(3, 2)), 4)
        >>> [row.action for row in model.report.rows]
        ['shared', 'converted']
        >>> _ = register_batchensemble(MyLinear)(layers.BatchEnsembleLinear)
        >>> model = batchensemble(nn.Sequential(MyLinear(2, 3), nn.Linear(3, 2)), 4)
        >>> [row.action for row in model.report.rows]
        ['converted', 'converted']
    """
    check_reset_type("register_batchensemble", layer_type, (nn.Module,))

    def register(convert: Converter) -> Converter:
        _CONVERTERS[layer_type] = convert
        return convert

    return register


def _layers(network: nn.Module) -> list[Any]:
    """Lists the BatchEnsemble layers, without those that they hold themselves."""
    if isinstance(network, BatchEnsembleLayer):
        return [network]
    found = (layer for child in network.children() for layer in _layers(child))
    return list(dict.fromkeys(found))


def _of_shared_batch(network: nn.Module, x: Tensor, num_members: int) -> Any:
    """Tiles the batch for the network, unless the first layer of its Sequentials takes one batch for all members."""
    if _is_plain(network) and not has_hooks(network):
        if type(network) is nn.Sequential and len(network):
            first, *others = network
            y = _of_shared_batch(first, x, num_members)
            for layer in others:
                y = layer(y)
            return y
        if x.shape[0] and takes_shared_batch(network):
            return network.shared_batch(x)
    return network(tile_members(x, num_members))


def _is_plain(layer: nn.Module) -> bool:
    """Tells whether the layer has neither a forward of its own, nor a weight that a hook computes.

    Old weight_norm and pruning have such hooks.
    """
    return "forward" not in vars(layer) and not any(isinstance(value, Tensor) for value in vars(layer).values())


def _paths(network: nn.Module) -> list[str]:
    own = {id(layer) for layer in _layers(network)}
    return [path for path, layer in network.named_modules() if id(layer) in own]


def _keep_ties(layer: nn.Module, converted: nn.Module, per_member: dict[nn.Parameter, nn.Parameter]) -> None:
    """Keeps what members share as the very Parameter that it was.

    What two layers shared stays shared.
    """
    new = dict(converted.named_parameters())
    for path, own in layer.named_parameters():
        if path in new:
            holder, _, name = path.rpartition(".")
            if new[path].shape == own.shape:
                own.data.copy_(new[path].data)
            else:
                own = per_member.setdefault(own, new[path])
            converted.get_submodule(holder)._parameters[name] = own


def _become(layer: nn.Module, new: nn.Module) -> None:
    """Turns a layer of our own copy into another one in place: whatever refers to it, in a list or twice, follows."""
    kept = {name: value for name, value in vars(layer).items() if "_hooks" in name or name == "training"}
    layer.__class__ = type(new)
    vars(layer).clear()
    vars(layer).update(vars(new) | kept)


def _set_fast_paths(network: nn.Module, enabled: bool) -> None:
    """Switches the fused inference of torch's Transformer on or off.

    It reads weights past their layers.
    """
    for module in network.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            kinds = ((relu, nn.ReLU), (gelu, nn.GELU))  # which torch numbers so
            numbers = (
                i
                for i, (f, layer) in enumerate(kinds, 1)
                if module.activation is f or isinstance(module.activation, layer)
            )
            module.activation_relu_or_gelu = next(numbers, 0) if enabled else 0
        if isinstance(module, nn.TransformerEncoder) and not enabled:
            module.use_nested_tensor = False
