"""Deep ensembles (Lakshminarayanan et al. 2017): E networks with weights of their own, run by one vmap."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen, nnx
from jax import Array

from probly_flax import random
from probly_flax._checks import (
    check_base_options,
    check_chunk_size,
    check_distinct,
    check_example_input,
    check_in_axes,
    check_independent,
    check_member_axis,
    check_member_count,
    check_members,
    check_module,
    check_num_members,
    check_reset,
    check_reset_value,
    check_rows_of_batch,
    check_seed,
    member_index,
    member_indices,
    takes_rngs_by_name,
)
from probly_flax.random import Rngs

__all__ = ["Ensemble", "ensemble", "register_reset"]

Rule = TypeVar("Rule", bound=Callable[..., None])
_RESET: dict[type[nnx.Module], Callable[..., None]] = {}


class Ensemble(nnx.Module):
    """Networks of one structure with stacked weights, run at once.

    `stacked` is one network whose variables have a leading axis of E members.

    Shape:
        model(x): x (B, ...), the same batch for every member. Returns (E, B, ...).
        model(x, in_axes=0): x (E, B, ...), a batch for each member. Returns (E, B, ...).
        Inputs and outputs may be several, tuples or dicts; inputs that are no arrays are passed on.
    Weights:
        those of one network, each (E, ...).
    Args:
        members: networks of one structure, in the same mode; they are copied.
        chunk_size: how many members run at a time; None for all. Fewer need less memory.
    Raises:
        ValueError: if there is no member, one is given twice, or they differ in structure.
    Example:
        >>> model = Ensemble([nnx.Linear(2, 3, rngs=nnx.Rngs(i)) for i in range(4)])
        >>> model(jnp.ones((5, 2))).shape, model.stacked.kernel.shape
        ((4, 5, 3), (4, 2, 3))
        >>> bool(jnp.allclose(model[1](jnp.ones((5, 2))), model(jnp.ones((5, 2)))[1]))
        True
    """

    def __init__(self, members: Sequence[nnx.Module], *, chunk_size: int | None = None) -> None:
        members = list(members)
        for member in members:
            check_module("Ensemble", "each member", member, nnx.Module)
        check_distinct("Ensemble", members)
        check_members("Ensemble", [_structure(member) for member in members])
        self.num_members = len(members)
        self.chunk_size = check_chunk_size("Ensemble", chunk_size)
        graph, state = nnx.split(members[0])
        states = [state, *(nnx.state(member) for member in members[1:])]
        self.stacked = nnx.merge(graph, jax.tree.map(lambda *values: jnp.stack(values), *states))

    def __call__(self, *args: Any, in_axes: int | None = None, **kwargs: Any) -> Any:
        check_in_axes("Ensemble", in_axes)
        leaves, structure = jax.tree.flatten((args, kwargs), is_leaf=is_stateful)
        arrays = [isinstance(leaf, (Array, np.ndarray)) and leaf.ndim > 0 for leaf in leaves]
        if in_axes == 0:
            shapes = [leaf.shape for leaf, is_array in zip(leaves, arrays, strict=True) if is_array]
            check_rows_of_batch("Ensemble", [self.num_members] * len(shapes))
            check_member_axis("Ensemble", shapes, self.num_members)
        leaves = [leaf.split(self.num_members) if isinstance(leaf, Rngs) else leaf for leaf in leaves]
        mapped = [
            isinstance(leaf, Rngs) or (is_array and in_axes == 0) for leaf, is_array in zip(leaves, arrays, strict=True)
        ]
        batches = [leaf for leaf, is_mapped in zip(leaves, mapped, strict=True) if is_mapped]
        graph, state = nnx.split(self.stacked)

        def call(state: nnx.State, batches: list[Any]) -> tuple[Any, nnx.State]:
            own = iter(batches)
            own_leaves = [next(own) if is_mapped else leaf for leaf, is_mapped in zip(leaves, mapped, strict=True)]
            args, kwargs = jax.tree.unflatten(structure, own_leaves)
            before = {path: variable.get_raw_value() for path, variable in nnx.to_flat_state(state)}
            member = nnx.merge(graph, state)
            y = member(*args, **kwargs)
            after = nnx.to_flat_state(nnx.state(member))
            return y, nnx.from_flat_state([(path, v) for path, v in after if v.get_raw_value() is not before.get(path)])

        if self.chunk_size is None:
            y, updates = jax.vmap(call)(state, batches)
        else:
            y, updates = jax.lax.map(lambda x: call(*x), (state, batches), batch_size=self.chunk_size)
        if updates:
            nnx.update(self.stacked, updates)
        return y

    def __len__(self) -> int:
        return self.num_members

    def __iter__(self) -> Iterator[nnx.Module]:
        return (self[i] for i in range(self.num_members))

    def __getitem__(self, item: int | slice | Sequence[int]) -> Any:
        """Member `item` as a network of its own; or, for a slice or a list, an ensemble of those members."""
        if isinstance(item, (slice, list, tuple)):
            indices = member_indices("Ensemble", item, self.num_members)
            return Ensemble([self[i] for i in indices], chunk_size=self.chunk_size)
        i = member_index("Ensemble", item, self.num_members)
        return _row(self.stacked, i)


def ensemble(
    base: nnx.Module | linen.Module | Sequence[nnx.Module] | Callable[..., nnx.Module],
    num_members: int,
    *,
    rngs: Rngs | int = 0,
    reset_params: bool = True,
    reset: Callable[[nnx.Param, Rngs], Array] | None = None,
    chunk_size: int | None = None,
    example_input: Any = None,
) -> Ensemble:
    """Makes a deep ensemble: members of one structure, each with weights of its own.

    Args:
        base: a network, copied for each member and re-initialised as its layers are by default; or a constructor,
            called with each member's rngs, for an initialisation of its own; or a list of networks, stacked as
            they are; or a Linen module, initialised with each of the keys that its seed splits into.
        num_members: the number of members E.
        rngs: a seed or an Rngs, split as `nnx.split_rngs` splits it: members are drawn from keys of their own.
        reset_params: False keeps the weights of the base network in every member.
        reset: a rule for this call: given a parameter and the member's rngs, it returns the new value.
        chunk_size: how many members run at a time; None for all.
        example_input: what a Linen module is initialised with.
    Raises:
        ValueError: if a parameter has no rule to re-initialise it, or a constructor ignores its rngs.
        TypeError: if base is none of the three.
    Example:
        >>> model = ensemble(lambda rngs: nnx.Sequential(nnx.Linear(2, 3, rngs=rngs), nnx.relu), 5)
        >>> model(jnp.ones((7, 2))).shape
        (5, 7, 3)
        >>> base = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
        >>> model = ensemble(base, 5, reset=lambda p, rngs: jax.random.normal(rngs.params(), p.shape))
    """
    what = "ensemble"
    num_members, chunk_size = check_num_members(what, num_members), check_chunk_size(what, chunk_size)
    given = {"reset": reset is not None, "reset_params": not reset_params}
    if not isinstance(base, linen.Module):
        check_base_options(what, "no Linen module", {"example_input": example_input is not None})
    if isinstance(base, (list, tuple)):
        check_base_options(what, "a list of networks", given)
        check_member_count(what, len(base), num_members)
        return Ensemble(base, chunk_size=chunk_size)
    if isinstance(base, linen.Module):
        check_base_options(what, "a Linen module", given)
        check_example_input(what, example_input)
        key = rngs.params() if isinstance(rngs, Rngs) else random.key(check_seed(what, rngs))
        keys = random.split(key, num_members)
        build = nnx.vmap(lambda key: nnx.bridge.ToNNX(base).lazy_init(example_input, rngs=key))
        return _from_stacked(build(keys), num_members, chunk_size)
    rngs = random.as_rngs(what, rngs)
    make: Callable[[Rngs], nnx.Module]
    if isinstance(base, nnx.Module):
        make = partial(_copy, base, reset_params, reset)
    elif callable(base):
        check_base_options(what, "a constructor", given)
        make = partial(_construct, base)
    else:
        check_module(what, "base", base, nnx.Module)

    model = _from_stacked(nnx.split_rngs(splits=num_members)(nnx.vmap(make))(rngs), num_members, chunk_size)
    if reset is not None or not isinstance(base, nnx.Module):
        check_independent(what, num_members, _members_differ(model))
    return model


def register_reset(layer_type: type[nnx.Module]) -> Callable[[Rule], Rule]:
    """Registers how `ensemble` re-initialises a layer, as a function of the layer and the member's rngs.

    It serves the type and its subclasses.

    Example:
        >>> class Scale(nnx.Module):
        ...     def __init__(self):
        ...         self.scale = nnx.Param(jnp.ones(3))
        ...     def __call__(self, x):
        ...         return x * self.scale
        >>> @register_reset(Scale)
        ... def reset_scale(layer, rngs):
        ...     layer.scale[...] = jax.random.normal(rngs.params(), layer.scale.shape)
        >>> ensemble(Scale(), 2).stacked.scale.shape
        (2, 3)
    """

    def register(rule: Rule) -> Rule:
        _RESET[layer_type] = rule
        return rule

    return register


def _from_stacked(stacked: nnx.Module, num_members: int, chunk_size: int | None) -> Ensemble:
    model = Ensemble([_row(stacked, 0)], chunk_size=chunk_size)
    model.stacked, model.num_members = stacked, num_members
    return model


def _row(stacked: nnx.Module, i: int) -> nnx.Module:
    graph, state = nnx.split(stacked)
    return nnx.merge(graph, jax.tree.map(lambda value: jnp.copy(value[i]), state))


def _structure(module: nnx.Module) -> list[str]:
    """What two members must share: layers, options, and the shapes and dtypes of their variables."""
    lines = []
    for path, layer in nnx.iter_modules(module):
        name = ".".join(map(str, path)) or "network"
        for attribute, value in vars(layer).items():
            if isinstance(value, (nnx.Variable, Array, np.ndarray)):
                lines.append(f"{name}.{attribute} {value.dtype} {tuple(value.shape)}")
            elif not isinstance(value, nnx.Pytree) and not attribute.startswith("_pytree__"):
                lines.append(f"{name}.{attribute}=" + re.sub(r" at 0x[0-9a-f]+", "", repr(value)))
        lines.append(f"{name}: {type(layer).__name__}")
    return lines


def _construct(constructor: Callable[..., nnx.Module], rngs: Rngs) -> nnx.Module:
    """Passes rngs by name where the constructor has that name, as keyword-only ones need."""
    member = constructor(rngs=rngs) if takes_rngs_by_name("ensemble", constructor) else constructor(rngs)
    check_module("ensemble", "what the constructor returns", member, nnx.Module)
    return member


def _copy(
    base: nnx.Module, reset_params: bool, reset: Callable[[nnx.Param, Rngs], Array] | None, rngs: Rngs
) -> nnx.Module:
    member = nnx.clone(base)
    if reset is not None:
        _reset_by_rule(member, reset, rngs)
    elif reset_params:
        _reset_by_layer(member, rngs)
    _rekey(member, rngs)
    return member


def _rekey(member: nnx.Module, rngs: Rngs) -> None:
    """Gives the streams inside a copied network, such as Dropout's, keys of their own."""
    for _, stream in nnx.iter_graph(member):
        if isinstance(stream, random.RngStream):
            stream.key.set_value(rngs[stream.tag]())
            stream.count.set_value(jnp.zeros_like(stream.count[...]))


def _reset_by_rule(member: nnx.Module, reset: Callable[[nnx.Param, Rngs], Array], rngs: Rngs) -> None:
    for path, parameter in _named_parameters(member):
        value = reset(parameter, rngs)
        check_reset_value("ensemble", ".".join(map(str, path)), parameter.shape, value)
        parameter.set_value(value.astype(parameter.dtype))


def _reset_by_layer(member: nnx.Module, rngs: Rngs) -> None:
    """Every layer with parameters by its own rule, inner layers first."""
    before = {path: parameter.get_raw_value() for path, parameter in _named_parameters(member)}
    for _, layer in list(nnx.iter_modules(member)):
        rule = _rule(layer)
        if rule is not None:
            rule(layer, rngs)
    left = [path for path, parameter in _named_parameters(member) if parameter.get_raw_value() is before[path]]
    check_reset("ensemble", [".".join(map(str, path)) for path in left])


def is_stateful(value: Any) -> bool:
    """What is handed to a network whole: it keeps state, which a copy would not advance."""
    return isinstance(value, (nnx.Pytree, nnx.Variable))


def _named_parameters(module: nnx.Module) -> list[tuple[tuple[Any, ...], nnx.Param]]:
    return list(nnx.to_flat_state(nnx.state(module, nnx.Param)))


def _rule(layer: nnx.Module) -> Callable[..., None] | None:
    return next((_RESET[layer_type] for layer_type in type(layer).__mro__ if layer_type in _RESET), None)


def _members_differ(model: Ensemble) -> bool:
    values = [p[...] for _, p in _named_parameters(model)]
    return any(isinstance(v, jax.core.Tracer) or bool((v != v[:1]).any()) for v in values)


# nnx layers do not keep their initialisers: these are the ones that they have by default.


def _draw(parameter: nnx.Variable | None, init: Callable[..., Array], rngs: Rngs) -> None:
    if parameter is not None:
        value = init(rngs.params(), parameter.shape, random.draw_dtype(parameter.dtype))
        parameter.set_value(value.astype(parameter.dtype))


@register_reset(nnx.Linear)
@register_reset(nnx.Einsum)
@register_reset(nnx.Conv)
@register_reset(nnx.ConvTranspose)
def _reset_kernel(layer: Any, rngs: Rngs) -> None:
    _draw(layer.kernel, nnx.initializers.lecun_normal(), rngs)
    _draw(layer.bias, nnx.initializers.zeros, rngs)


@register_reset(nnx.LinearGeneral)
def _reset_linear_general(layer: nnx.LinearGeneral, rngs: Rngs) -> None:
    def lecun_normal(key: Array, shape: Sequence[int], dtype: Any) -> Array:
        flat = (math.prod(shape) // math.prod(layer.out_features), math.prod(layer.out_features))
        return nnx.initializers.lecun_normal()(key, flat, dtype).reshape(shape)

    _draw(layer.kernel, lecun_normal, rngs)
    _draw(layer.bias, nnx.initializers.zeros, rngs)


@register_reset(nnx.Embed)
def _reset_embed(layer: nnx.Embed, rngs: Rngs) -> None:
    _draw(layer.embedding, nnx.initializers.variance_scaling(1.0, "fan_in", "normal", out_axis=0), rngs)


@register_reset(nnx.LayerNorm)
@register_reset(nnx.RMSNorm)
@register_reset(nnx.GroupNorm)
@register_reset(nnx.InstanceNorm)
def _reset_norm(layer: Any, rngs: Rngs) -> None:
    _draw(layer.scale, nnx.initializers.ones, rngs)
    _draw(getattr(layer, "bias", None), nnx.initializers.zeros, rngs)


@register_reset(nnx.BatchNorm)
def _reset_batch_norm(layer: nnx.BatchNorm, rngs: Rngs) -> None:
    _reset_norm(layer, rngs)
    layer.mean.set_value(jnp.zeros_like(layer.mean[...]))
    layer.var.set_value(jnp.ones_like(layer.var[...]))


@register_reset(nnx.OptimizedLSTMCell)
@register_reset(nnx.GRUCell)
@register_reset(nnx.SimpleCell)
def _reset_cell(layer: Any, rngs: Rngs) -> None:
    _draw(layer.dense_h.kernel, nnx.initializers.orthogonal(), rngs)  # after its Linear layers, which come first


@register_reset(nnx.LSTMCell)
def _reset_lstm_cell(layer: nnx.LSTMCell, rngs: Rngs) -> None:
    for linear in (layer.hi, layer.hf, layer.hg, layer.ho):
        _draw(linear.kernel, nnx.initializers.orthogonal(), rngs)


@register_reset(nnx.LoRA)
def _reset_lora(layer: nnx.LoRA, rngs: Rngs) -> None:
    _draw(layer.lora_a, nnx.initializers.he_uniform(), rngs)
    _draw(layer.lora_b, nnx.initializers.zeros, rngs)


@register_reset(nnx.PReLU)
def _reset_prelu(layer: nnx.PReLU, rngs: Rngs) -> None:
    _draw(layer.negative_slope, nnx.initializers.constant(0.01), rngs)
