"""Deep ensembles (Lakshminarayanan et al. 2017): E networks with weights of their own, run by one vmap."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen, nnx
from jax import Array

from probly_common.checks.ensembles import (
    check_base_options,
    check_distinct,
    check_example_input,
    check_independent,
    check_list_of_members,
    check_member_count,
    check_members_alone,
    check_same_structure,
    construct,
    member_index,
    member_indices,
    warn_of_other_starts,
)
from probly_common.checks.rows import check_chunk_size, check_in_axes, check_member_axis, check_rows_of_batch
from probly_common.checks.values import check_module, check_num_members, check_seed
from probly_common.report import Report, report_of_starts
from probly_common.starts import CONSTRUCTOR, KEPT, RESET
from probly_flax import random
from probly_flax._check import find_mismatch
from probly_flax._members import PARTITION, is_batch, is_stateful, member, run, stack, structure
from probly_flax._reset import named_parameters, other_starts, register_reset, reset_by_layer, reset_by_rule
from probly_flax.random import Rngs

__all__ = ["Ensemble", "ensemble", "register_reset"]


class Ensemble(nnx.Module):
    """Networks of one structure with stacked weights, run at once.

    `stacked` is one network whose variables have a leading axis of E members.

    Shape:
        model(x): x (B, ...), the same batch for every member. Returns (E, B, ...).
        model(x, in_axes=0): x (E, B, ...), a batch for each member. Returns (E, B, ...).
        Inputs and outputs may be several, tuples or dicts; inputs that are no arrays are passed on. A random key, a
        stream or Rngs among them are split, so that each member draws its own.
    Weights:
        those of one network, each (E, ...).
    Args:
        members: networks of one structure, in the same mode; they are copied.
        chunk_size: how many members run at a time; None for all. Activations are kept for that many only: where
            gradients are needed, a chunk is computed again in the backward pass.
    Raises:
        ValueError: if there is no member, one is given twice, or they differ in structure.
    Example:
        >>> model = Ensemble([nnx.Linear(2, 3, rngs=nnx.Rngs(i)) for i in range(4)])
        >>> model(jnp.ones((5, 2))).shape, model.stacked.kernel.shape
        ((4, 5, 3), (4, 2, 3))
        >>> bool(jnp.allclose(model[1](jnp.ones((5, 2))), model(jnp.ones((5, 2)))[1]))
        True
    """

    report: Report | None = None  # how each parameter started, if `ensemble` made the members

    def __init__(self, members: Sequence[nnx.Module], *, chunk_size: int | None = None) -> None:
        check_list_of_members("Ensemble", members, (list, tuple, nnx.List))
        for each in members:
            check_module("Ensemble", "each member", each, nnx.Module)
        check_distinct("Ensemble", members)
        self.num_members, self.chunk_size = len(members), check_chunk_size("Ensemble", chunk_size)
        self.stacked = stack(list(members))

    def __call__(self, *args: Any, in_axes: int | None = None, **kwargs: Any) -> Any:
        check_in_axes("Ensemble", in_axes)
        if in_axes == 0:
            shapes = [x.shape for x in jax.tree.leaves((args, kwargs), is_leaf=is_stateful) if is_batch(x)]
            check_rows_of_batch("Ensemble", [self.num_members] * len(shapes))
            check_member_axis("Ensemble", shapes, self.num_members)
        return run(self.stacked, self.num_members, args, kwargs, in_axes, self.chunk_size)

    def check(self, *args: Any, **kwargs: Any) -> None:
        """Compares each member's outputs with those of the member alone, for this batch, in eval mode and in float64.

        Args:
            args, kwargs: as in a call.
        Raises:
            ValueError: if they differ; it names the member.
        Example:
            >>> Ensemble([nnx.Linear(2, 3, rngs=nnx.Rngs(i)) for i in range(4)]).check(jnp.ones((5, 2)))
        """
        found = find_mismatch(self, args, kwargs)
        check_members_alone("Ensemble.check", found, self.num_members)

    def explain(self) -> str:
        """Says how members run.

        Example:
            >>> print(Ensemble([nnx.Linear(2, 3, rngs=nnx.Rngs(i)) for i in range(4)], chunk_size=2).explain())
            2 at a time, by jax.vmap
        """
        size = self.chunk_size
        return "at once, by jax.vmap" if size is None else f"{min(size, self.num_members)} at a time, by jax.vmap"

    def __len__(self) -> int:
        return self.num_members

    def __iter__(self) -> Iterator[nnx.Module]:
        return (self[i] for i in range(self.num_members))

    def __getitem__(self, item: int | slice | Sequence[int]) -> Any:
        """Returns member `item` as a network of its own; for a slice or a list, an ensemble of those members."""
        if isinstance(item, (slice, list, tuple)):
            indices = member_indices("Ensemble", item, self.num_members)
            return Ensemble([self[i] for i in indices], chunk_size=self.chunk_size)
        return member(self.stacked, member_index("Ensemble", item, self.num_members))


def ensemble(
    base: nnx.Module | linen.Module | Sequence[nnx.Module] | Callable[..., nnx.Module],
    num_members: int,
    *,
    rngs: Rngs | int = 0,
    reset_params: bool = True,
    reset: Callable[..., Array] | None = None,
    chunk_size: int | None = None,
    example_input: Any = None,
) -> Ensemble:
    """Makes a deep ensemble: members of one structure, each with weights of its own.

    Members start as the network does: by its constructor, where that is given; else each layer by its default
    initialisers. Parameters without a rule, as class tokens, are drawn with the mean and standard deviation that they
    have in the network; constants are kept. The model's `report` says which rule each had. A warning names weights of
    another spread than their rule's; trained weights of the same spread cannot be told.

    Args:
        base: a network, copied for each member and drawn anew; or a constructor, called with each member's rngs; or a
            list of networks, stacked as they are; or a Linen module, initialised with each of the keys that its seed
            splits into, and called as Linen modules are:
            `model(x, train=True, rngs=nnx.Rngs(0), mutable=["batch_stats"])`.
        num_members: the number of members E.
        rngs: a seed or an Rngs, split as `nnx.split_rngs` splits it: members are drawn from keys of their own.
        reset_params: False keeps the weights of the base network in every member.
        reset: a rule for this call, of (parameter, rngs) or of (name, parameter, rngs): given the member's rngs, it
            returns the new value.
        chunk_size: how many members run at a time; None for all.
        example_input: what a Linen module is initialised with.
    Raises:
        ValueError: if a constructor or a rule makes equal members.
        TypeError: if base is none of the three.
    Example:
        >>> rngs = nnx.Rngs(0)
        >>> net = nnx.Sequential(nnx.Linear(2, 8, rngs=rngs), nnx.relu, nnx.Linear(8, 3, rngs=rngs))
        >>> model = ensemble(net, 5)
        >>> model(jnp.ones((7, 2))).shape
        (5, 7, 3)
        >>> def reset_head(name, parameter, rngs):
        ...     is_head = name.startswith("layers.2.")
        ...     return jax.random.normal(rngs.params(), parameter.shape) if is_head else parameter[...]
        >>> model = ensemble(net, 5, reset=reset_head)
        >>> print(ensemble(lambda rngs: nnx.Linear(2, 3, rngs=rngs), 5).report)
        path    kind    action       before  after
        bias    Linear  constructor       3     15
        kernel  Linear  constructor       6     30
                        total             9     45
    """
    what = "ensemble"
    num_members, chunk_size = check_num_members(what, num_members), check_chunk_size(what, chunk_size)
    given = {"reset": reset is not None, "reset_params": not reset_params}
    if not isinstance(base, linen.Module):
        check_base_options(what, "no Linen module", {"example_input": example_input is not None})
    if isinstance(base, (list, tuple)):
        check_base_options(what, "a list of networks", given)
        check_member_count(what, len(base), num_members)
        return _with_report(Ensemble(base, chunk_size=chunk_size), {}, KEPT)
    if isinstance(base, linen.Module):
        check_base_options(what, "a Linen module", given)
        check_example_input(what, example_input)
        key = rngs.params() if isinstance(rngs, Rngs) else random.key(check_seed(what, rngs))
        keys = random.split(key, num_members)
        build = nnx.vmap(
            lambda key: nnx.bridge.ToNNX(base).lazy_init(example_input, rngs=key), transform_metadata=PARTITION
        )
        return _with_report(_from_stacked(build(keys), num_members, chunk_size), {}, CONSTRUCTOR)
    rngs = random.as_rngs(what, rngs)
    make: Callable[[Rngs], nnx.Module]
    rules: dict[str, str] = {}
    if isinstance(base, nnx.Module):
        check_same_structure(what, structure(base).difference(base, base), 0, num_members)
        make = partial(_copy, base, reset_params, reset, rules)
    elif callable(base):
        check_base_options(what, "a constructor", given)
        make = partial(_construct, base)
    else:
        check_module(what, "base", base, nnx.Module)

    make_all = nnx.split_rngs(splits=num_members)(nnx.vmap(make, transform_metadata=PARTITION))
    model = _from_stacked(make_all(rngs), num_members, chunk_size)
    if reset is not None or not isinstance(base, nnx.Module):
        check_independent(what, num_members, _members_differ(model))
    elif reset_params:
        warn_of_other_starts(what, other_starts(base, model.stacked, rules), len(rules), num_members)
    copied = KEPT if reset is None else RESET
    return _with_report(model, rules, copied if isinstance(base, nnx.Module) else CONSTRUCTOR)


def _with_report(model: Ensemble, rules: dict[str, str], otherwise: str) -> Ensemble:
    sizes = {path: parameter[...].size for path, parameter in named_parameters(model.stacked)}
    layers = {".".join(map(str, path)): layer for path, layer in nnx.iter_modules(model.stacked)}
    model.report = report_of_starts(model.num_members, sizes, layers, rules, otherwise)
    return model


def _from_stacked(stacked: nnx.Module, num_members: int, chunk_size: int | None) -> Ensemble:
    # Its checks need no values, whose rows would have to be compiled.
    model = nnx.eval_shape(lambda: Ensemble([member(stacked, 0)], chunk_size=chunk_size))
    model.stacked, model.num_members = stacked, num_members
    return model


def _construct(constructor: Callable[..., nnx.Module], rngs: Rngs) -> nnx.Module:
    member = construct("ensemble", constructor, rngs)
    check_module("ensemble", "what the constructor returns", member, nnx.Module)
    return member


def _copy(
    base: nnx.Module,
    reset_params: bool,
    reset: Callable[..., Array] | None,
    rules: dict[str, str],
    rngs: Rngs,
) -> nnx.Module:
    member = nnx.clone(base)
    if reset is not None:
        reset_by_rule(member, reset, rngs)
    elif reset_params:
        rules |= reset_by_layer(member, rngs)
    _rekey(member, rngs)
    return member


def _rekey(member: nnx.Module, rngs: Rngs) -> None:
    """Gives the streams inside a copied network, such as Dropout's, keys of their own."""
    for _, stream in nnx.iter_graph(member):
        if isinstance(stream, random.RngStream):
            stream.key.set_value(rngs[stream.tag]())
            stream.count.set_value(jnp.zeros_like(stream.count[...]))


def _members_differ(model: Ensemble) -> bool:
    values = [p[...] for _, p in named_parameters(model)]
    return any(isinstance(v, jax.core.Tracer) or bool(_rows_differ(v)) for v in values)


@jax.jit
def _rows_differ(values: Array) -> Array:
    return (values != values[:1]).any()
