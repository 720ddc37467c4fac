"""Members as rows of stacked arrays: stacking them, taking one out, and running them all."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from probly_common.checks.ensembles import check_dropout_rngs, check_same_structure
from probly_common.structure import Structure
from probly_flax.random import Rngs


def stack(members: Sequence[nnx.Module]) -> nnx.Module:
    """Stacks members into one network, whose variables have a leading axis of members."""
    for i, member in enumerate(members):
        difference = structure(members[0], member).difference(members[0], member)
        check_same_structure("Ensemble", difference, i, len(members))
    state = _with_member_axis(_stacked([nnx.state(member) for member in members]))
    return nnx.merge(nnx.graphdef(members[0]), state)


def member(stacked: nnx.Module, i: int) -> nnx.Module:
    """Returns member i of a stacked network, with variables of its own."""
    graph, state = nnx.split(stacked)
    return nnx.merge(graph, _without_member_axis(_row(state, i)))


# Members are on no axis of devices, which the partition specs of stacked variables say.
PARTITION = {nnx.PARTITION_NAME: None}


def _with_member_axis(state: nnx.State) -> nnx.State:
    return nnx.spmd.add_axis(state, 0, PARTITION) if _is_partitioned(state) else state


def _without_member_axis(state: nnx.State) -> nnx.State:
    return nnx.spmd.remove_axis(state, 0, PARTITION) if _is_partitioned(state) else state


def _is_partitioned(state: nnx.State) -> bool:
    values = (value for _, value in nnx.to_flat_state(state) if isinstance(value, nnx.Variable))
    return any(value.get_metadata().get("out_sharding") for value in values)


# One program for all arrays: op by op JAX would compile several for each shape.


@jax.jit
def _stacked(states: Sequence[nnx.State]) -> nnx.State:
    return jax.tree.map(lambda *values: jnp.stack(values), *states)


@jax.jit
def _row(state: nnx.State, i: int) -> nnx.State:
    return jax.tree.map(lambda value: value[i], state)


def is_stateful(value: Any) -> bool:
    """Tells whether a value is handed to a network whole: it keeps state, which a copy would not advance."""
    return isinstance(value, (nnx.Pytree, nnx.Variable))


def is_batch(value: Any) -> bool:
    return isinstance(value, (Array, np.ndarray)) and value.ndim > 0


def _is_key(value: Any) -> bool:
    return isinstance(value, Array) and jnp.issubdtype(value.dtype, jax.dtypes.prng_key) and not value.ndim


def _split(value: Any, num_members: int) -> Any:
    """Returns what each member draws from, so that no two have one mask of Dropout."""
    return jax.random.split(value, num_members) if isinstance(value, Array) else value.split(num_members)


def run(
    stacked: nnx.Module, num_members: int, args: Any, kwargs: Any, in_axes: int | None, chunk_size: int | None
) -> Any:
    """Returns what every member returns, stacked.

    Under in_axes=0 each member has inputs of its own, else they share them.
    """
    inputs, structure = jax.tree.flatten((args, kwargs), is_leaf=is_stateful)
    draws = [isinstance(x, (Rngs, nnx.RngStream)) or _is_key(x) for x in inputs]
    inputs = [_split(x, num_members) if own else x for x, own in zip(inputs, draws, strict=True)]
    mapped = [own or (in_axes == 0 and is_batch(x)) for x, own in zip(inputs, draws, strict=True)]
    batches = [x for x, is_mapped in zip(inputs, mapped, strict=True) if is_mapped]
    graph, state = nnx.split(stacked)
    constants: dict[tuple[Any, str], Any] = {}

    def row(state: nnx.State, batches: list[Any]) -> tuple[Any, nnx.State]:
        """Returns one member's outputs, and the variables that it changed."""
        own = iter(batches)
        leaves = [next(own) if is_mapped else x for x, is_mapped in zip(inputs, mapped, strict=True)]
        args, kwargs = jax.tree.unflatten(structure, leaves)
        before = {path: _raw(value) for path, value in nnx.to_flat_state(state)}
        member = nnx.merge(graph, _without_member_axis(state))
        y = member(*args, **kwargs)
        after = nnx.to_flat_state(nnx.state(member))
        constants.update(_constants(member))
        return y, nnx.from_flat_state([(path, v) for path, v in after if _raw(v) is not before.get(path)])

    try:
        if chunk_size is None or chunk_size >= num_members:
            y, updates = jax.vmap(row)(state, batches)
        elif any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves((state, inputs))):
            again = jax.checkpoint(row)  # keeps no activations for the backward pass, and runs once more in it
            y, updates = jax.lax.map(lambda rows: again(*rows), (state, batches), batch_size=chunk_size)
        else:  # without a trace, for which lax.map would compile at every call
            parts = [slice(start, start + chunk_size) for start in range(0, num_members, chunk_size)]
            chunks = [jax.vmap(row)(*jax.tree.map(lambda x, part=part: x[part], (state, batches))) for part in parts]
            y, updates = jax.tree.map(lambda *values: jnp.concatenate(values), *chunks)
    except ValueError as error:
        missing = [path for path, layer in nnx.iter_modules(stacked) if _misses_rngs(layer)]
        check_dropout_rngs("Ensemble", [".".join(map(str, path)) for path in missing], error)
        raise
    if updates:
        nnx.update(stacked, _with_member_axis(updates))
    if changed := constants.items() - _constants(stacked).items():  # in all members alike, since no array decides it
        modules = dict(nnx.iter_modules(stacked))
        for (path, name), value in changed:
            setattr(modules[path], name, value)
    return y


def _raw(value: Any) -> Any:
    """Returns what a variable holds; a plain array, as a table of positions may be, is that itself."""
    return value.get_raw_value() if isinstance(value, nnx.Variable) else value


def _constants(network: nnx.Module) -> dict[tuple[Any, str], Any]:
    """Returns the numbers and strings that modules have as attributes, which a call may change."""
    kinds = (bool, int, float, complex, str, type(None))
    return {
        (path, name): value
        for path, module in nnx.iter_modules(network)
        for name, value in vars(module).items()
        if isinstance(value, kinds)
    }


def _misses_rngs(layer: nnx.Module) -> bool:
    return isinstance(layer, nnx.Dropout) and layer.rngs is None and not layer.deterministic and layer.rate > 0


def structure(*networks: nnx.Module) -> Structure:
    """Compares members as objects; of variables and arrays, which are stacked, it takes all but the values."""
    arrays = {id(value) for network in networks for _, value in nnx.to_flat_state(nnx.state(network))}
    modules = {id(module) for network in networks for _, module in nnx.iter_modules(network)}
    return Structure(
        lambda value: _described(value) if id(value) in arrays else None,
        lambda value: _held(value) if id(value) in modules else None,
        _content,
    )


def _described(value: Any) -> str:
    kind = f"{type(value).__name__} of " if isinstance(value, nnx.Variable) else ""
    return f"{kind}{value.dtype} {tuple(value.shape)}"


def _held(module: nnx.Module) -> dict[str, Any]:
    return {name: value for name, value in vars(module).items() if not name.startswith("_pytree__")}


def _content(value: Any) -> tuple[str, tuple[int, ...], bytes] | None:
    if not isinstance(value, Array):
        return None
    known = not isinstance(value, jax.core.Tracer) and not jnp.issubdtype(value.dtype, jax.dtypes.prng_key)
    return str(value.dtype), value.shape, np.asarray(value).tobytes() if known else b""
