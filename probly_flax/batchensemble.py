"""BatchEnsemble for whole networks (Wen et al. 2020): one network, E members, almost no more parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import reduce
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from probly_common.checks.ensembles import (
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
from probly_flax import random
from probly_flax._check import find_mismatch
from probly_flax._kinds import KINDS
from probly_flax._members import is_stateful
from probly_flax.ensemble import Ensemble
from probly_flax.functional import split_members, tile_members
from probly_flax.layers._base import BatchEnsembleLayer, takes_shared_batch
from probly_flax.random import Rngs

__all__ = ["BatchEnsemble", "batchensemble", "register_batchensemble"]

Converter = TypeVar("Converter", bound=Callable[..., nnx.Module])
_MEMBERS = [(each, row) for row in KINDS.rows if row.members for each in row.types]
_CONVERTERS: dict[type[nnx.Module], Callable[..., nnx.Module]]
_CONVERTERS = {each: row.members for each, row in _MEMBERS if not row.is_norm}
_OF_RNNS = {each: row.members_of_rnn for each, row in _MEMBERS if row.members_of_rnn}  # by the type of their cell
_NORMS = {each: row.members for each, row in _MEMBERS if row.is_norm}


class BatchEnsemble(nnx.Module):
    """A network of BatchEnsemble layers, called with one batch and returning each member's outputs.

    Shape:
        model(x): x (B, ...), the same batch for every member. Returns (E, B, ...).
        model(x, in_axes=0): x (E, B, ...), a batch for each member. Returns (E, B, ...).
        Inputs and outputs may be several, in tuples, lists and dicts. Every array with an axis has the batch on its
        first one, inside the network too; what is not an array with an axis is passed on.
    Args:
        network: a module that holds BatchEnsemble layers and maps (E*B, ...) rows to (E*B, ...) rows.
        report: what the conversion did, if one made the network.
    Raises:
        ValueError: if the network has no BatchEnsemble layer, or layers of different num_members.
    Example:
        >>> rngs = nnx.Rngs(0)
        >>> base = nnx.Sequential(nnx.Linear(2, 8, rngs=rngs), nnx.relu, nnx.Linear(8, 3, rngs=rngs))
        >>> model = batchensemble(base, 4)
        >>> model(jnp.ones((5, 2))).shape, len(model), type(model[0]).__name__
        ((4, 5, 3), 4, 'Sequential')
    """

    def __init__(self, network: nnx.Module, report: Report | None = None) -> None:
        check_module("BatchEnsemble", "network", network, nnx.Module)
        self.num_members = common_num_members(layer.num_members for layer in _layers(network))
        paths = [".".join(map(str, p)) for p, m in nnx.iter_modules(network) if getattr(m, "time_major", False)]
        check_batch_first("BatchEnsemble", paths, "time_major=False")
        self.network = network
        self.report = report

    def __call__(self, *args: Any, in_axes: int | None = None, **kwargs: Any) -> Any:
        check_in_axes("BatchEnsemble", in_axes)
        inputs: list[int] = []

        def rows(x: Any) -> Any:
            if not isinstance(x, (Array, np.ndarray)) or not x.ndim:
                return x
            x = jnp.asarray(x)
            if in_axes is None:
                x = tile_members(x, self.num_members)
            else:
                check_member_axis("BatchEnsemble", [x.shape], self.num_members, rank=2)
                x = x.reshape(x.shape[0] * x.shape[1], *x.shape[2:])
            inputs.append(x.shape[0])
            return x

        def members(y: Any) -> Any:
            if not isinstance(y, Array):
                check_output_leaf("BatchEnsemble", y)
                return y
            check_output_rows("BatchEnsemble", y.shape, inputs[0])
            return split_members(y, self.num_members)

        alone = args[0] if len(args) == 1 and not kwargs else None
        if in_axes is None and isinstance(alone, (Array, np.ndarray)) and alone.ndim:
            inputs.append(self.num_members * alone.shape[0])
            return jax.tree.map(members, _of_shared_batch(self.network, jnp.asarray(alone), self.num_members))
        args, kwargs = jax.tree.map(rows, (args, kwargs), is_leaf=is_stateful)
        check_rows_of_batch("BatchEnsemble", inputs)
        return jax.tree.map(members, self.network(*args, **kwargs))

    def check(self, *args: Any, **kwargs: Any) -> None:
        """Compares each member's outputs with those of the member alone, for this batch, in eval mode and in float64.

        Args:
            args, kwargs: as in a call.
        Raises:
            ValueError: if they differ; it names the member, and the first layer that is not applied to its rows.
        Example:
            >>> batchensemble(nnx.Sequential(nnx.Linear(2, 3, rngs=nnx.Rngs(0))), 4).check(jnp.ones((5, 2)))
        """
        found = find_mismatch(self, args, kwargs, _paths(self.network))
        check_members_alone("BatchEnsemble.check", found, self.num_members)

    def __len__(self) -> int:
        return self.num_members

    def __iter__(self) -> Iterator[nnx.Module]:
        return (self[i] for i in range(self.num_members))

    def __getitem__(self, item: int | slice | Sequence[int]) -> Any:
        """Returns member `item` as a plain network with folded weights; for a slice or a list, those members alone."""
        network = nnx.clone(self.network, arrays=True)
        if isinstance(item, (slice, list, tuple)):
            indices = member_indices("BatchEnsemble", item, self.num_members)
            for layer in _layers(network):
                layer.keep_members(indices)
            return BatchEnsemble(network, self.report)
        i = member_index("BatchEnsemble", item, self.num_members)
        for layer in _layers(network):
            _become(layer, layer.member(i))
        return network

    def fold(self) -> Ensemble:
        """Returns the same members as an Ensemble, each with weights of its own.

        Example:
            >>> base, x = nnx.Sequential(nnx.Linear(2, 3, rngs=nnx.Rngs(0))), jnp.ones((5, 2))
            >>> model = batchensemble(base, 4)
            >>> bool(jnp.allclose(model.fold()(x), model(x)))
            True
        """
        return Ensemble(list(self))


def batchensemble(
    base: nnx.Module,
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
    in the order of their paths. Subclasses of a layer are left shared, since their __call__ may be their own, unless
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
        >>> rngs = nnx.Rngs(0)
        >>> base = nnx.Sequential(nnx.Linear(2, 8, rngs=rngs), nnx.relu, nnx.Linear(8, 3, rngs=rngs))
        >>> model = batchensemble(base, 4, exclude="layers.2")
        >>> print(model.report)
        path      kind    action     before  after
        layers.0  Linear  converted      24     88
        layers.2  Linear  excluded       27     27
                          total          51    115
    """
    what = "batchensemble"
    check_module(what, "base", base, nnx.Module)
    num_members = check_num_members(what, num_members)
    check_init(what, init, r_mean, r_std, s_mean, s_std)
    rngs = random.as_rngs(what, rngs)
    check_not_converted(what, (layer.num_members for layer in _layers(base)))
    check_no_ensemble(what, (m.num_members for _, m in nnx.iter_modules(base) if isinstance(m, Ensemble)))

    options = {"init": init, "r_mean": r_mean, "r_std": r_std, "s_mean": s_mean, "s_std": s_std}
    norms = _NORMS if per_member_norms else {}
    excluded = Excluder(exclude, nnx.Module).entries
    shared: dict[str, str] = {}  # with the reason
    while True:
        draws = nnx.clone(rngs)
        excluder = Excluder(excluded, nnx.Module)
        model = _converted(base, num_members, draws, excluder, shared, norms, use_base_weights, **options)
        args, kwargs = as_arguments(example_input)
        found = None if example_input is None else find_mismatch(model, args, kwargs, _paths(model.network))
        if found is None or not found.suspects:
            break
        shared |= found.suspects
    check_members_alone(what, found, num_members)
    nnx.update(rngs, nnx.state(draws))  # now that nothing can fail
    return model


def _converted(
    base: nnx.Module,
    num_members: int,
    draws: Rngs,
    excluder: Excluder,
    shared: Mapping[str, str],
    norms: Mapping[type[nnx.Module], Any],
    use_base_weights: bool,
    **options: Any,
) -> BatchEnsemble:
    """Converts a copy of the network, without the layers that are shared."""
    network = nnx.clone(base, arrays=True)
    layers = dict(nnx.iter_modules(network))
    per_member: dict[int, nnx.Variable] = {}
    inside: set[int] = set()  # of what is converted as a whole
    rows = []
    for parts, layer in sorted(layers.items(), key=lambda item: natural_order(_torch_path(item[0], layers))):
        path = ".".join(map(str, parts))
        excluded = id(layer) not in inside and excluder(path, layer)
        convert = _CONVERTERS.get(type(layer), norms.get(type(layer)))
        if type(layer) is nnx.RNN:
            convert = convert or _OF_RNNS.get(type(layer.cell))
        converts = convert is not None and not excluded and path not in shared and _is_single(layer)
        own = jax.tree.leaves(nnx.state(layer, nnx.Param)) if converts else _parameters(layer)
        before = after = sum(p.size for p in own)
        if not before or id(layer) in inside:
            continue
        kind, action = type(layer).__name__, "excluded" if excluded else "shared"
        if convert and converts:
            action = "converted"
            inside.update(id(module) for _, module in nnx.iter_modules(layer))
            converted = (
                convert(layer, num_members)
                if type(layer) in norms and type(layer) not in _CONVERTERS
                else convert(layer, draws, num_members, use_base_weights, **options)
            )
            _keep_ties(layer, converted, per_member)
            _become(layer, converted)
            after = sum(p.size for p in jax.tree.leaves(nnx.state(converted, nnx.Param)))
        rows.append(ReportRow(path, kind, action, before, after, shared.get(path, "")))
    excluder.check_all_matched(rows)
    report = make_report("batchensemble", rows)
    return BatchEnsemble(network, report)


def register_batchensemble(layer_type: type[nnx.Module]) -> Callable[[Converter], Converter]:
    """Registers how `batchensemble` converts the layers of exactly that type.

    The function, or class, is called as BatchEnsembleLinear is: (layer, rngs, num_members, use_base_weights, init=...,
    r_mean=..., r_std=..., s_mean=..., s_std=...). It returns a new layer that maps (E*B, ...) rows to (E*B, ...) rows,
    with `num_members`, `member(i)` and `keep_members(indices)`, and leaves the one that it is given as it is.

    Raises:
        TypeError: if the type is not a layer's.
    Example:
        >>> from probly_flax import layers
        >>> class MyLinear(nnx.Linear):
        ...     pass
        >>> rngs = nnx.Rngs(0)
        >>> base = nnx.Sequential(MyLinear(2, 3, rngs=rngs), nnx.Linear(3, 2, rngs=rngs))
        >>> [row.action for row in batchensemble(base, 4).report.rows]
        ['shared', 'converted']
        >>> _ = register_batchensemble(MyLinear)(layers.BatchEnsembleLinear)
        >>> [row.action for row in batchensemble(base, 4).report.rows]
        ['converted', 'converted']
    """
    check_reset_type("register_batchensemble", layer_type, (nnx.Module,))

    def register(convert: Converter) -> Converter:
        _CONVERTERS[layer_type] = convert
        return convert

    return register


def _of_shared_batch(network: Any, x: Array, num_members: int) -> Any:
    """Tiles the batch for the network, unless the first layer of its Sequentials takes one batch for all members."""
    if type(network) is nnx.Sequential and len(network.layers):
        first, *others = network.layers
        return nnx.Sequential(lambda x: _of_shared_batch(first, x, num_members), *others)(x)
    if x.shape[0] and takes_shared_batch(network):
        return network.shared_batch(x)
    return network(tile_members(x, num_members))


def _layers(network: nnx.Module) -> list[Any]:
    """Lists the BatchEnsemble layers, without those that they hold themselves."""
    found = {id(layer): layer for _, layer in nnx.iter_modules(network) if isinstance(layer, BatchEnsembleLayer)}
    for layer in list(found.values()):
        for _, held in nnx.iter_modules(layer):
            if held is not layer:
                found.pop(id(held), None)
    return list(found.values())


def _parameters(layer: nnx.Module) -> list[nnx.Param]:
    """Lists the parameters of the layer itself."""
    return [value for value in vars(layer).values() if isinstance(value, nnx.Param)]


def _is_single(layer: nnx.Module) -> bool:
    """Tells whether the layer is not a stack of layers, as nnx.vmap makes it."""
    weight = getattr(layer, "kernel", getattr(layer, "embedding", None))
    return weight is None or weight.ndim == 2 + len(getattr(layer, "kernel_size", ()))


def _paths(network: nnx.Module) -> list[str]:
    own = {id(layer) for layer in _layers(network)}
    return [".".join(map(str, path)) for path, layer in nnx.iter_modules(network) if id(layer) in own]


def _keep_ties(layer: nnx.Module, converted: nnx.Module, per_member: dict[int, nnx.Variable]) -> None:
    """Keeps what members share as the very Variable that it was.

    What two layers shared stays shared.
    """
    new = dict(nnx.to_flat_state(nnx.state(converted, nnx.Param)))
    for path, own in nnx.to_flat_state(nnx.state(layer, nnx.Param)):
        if path in new:
            if new[path].shape == own.shape:
                own.set_value(new[path][...])
            else:
                own = per_member.setdefault(id(own), new[path])
            holder = reduce(getattr, map(str, path[:-1]), converted)
            setattr(holder, str(path[-1]), own)


def _become(layer: nnx.Module, new: nnx.Module) -> None:
    """Turns a layer of our own copy into another one in place: whatever refers to it, in a list or twice, follows."""
    layer.__class__ = type(new)
    vars(layer).clear()
    vars(layer).update(vars(new))


def _torch_path(path: tuple[Any, ...], modules: Mapping[tuple[Any, ...], nnx.Module]) -> str:
    """Returns the path in torch, where a Sequential has no `layers`.

    By it, both packages draw in one order.
    """
    named = (
        str(part)
        for i, part in enumerate(path)
        if not (part == "layers" and isinstance(modules.get(path[:i]), nnx.Sequential))
    )
    return ".".join(named)
