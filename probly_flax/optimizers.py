"""The state of SGD, Adam and AdamW in the common form, so that training goes on in the other framework."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
import optax  # type: ignore[import-untyped]
from flax import nnx
from jax.tree_util import GetAttrKey, keystr, tree_flatten_with_path

from probly_common.checks.optimizers import (
    check_one_step,
    check_optimizer,
    check_parameters,
    check_same_in_both,
    check_separate,
    check_state,
    check_step_known,
    check_steps,
    check_whole,
    warn_state_not_finite,
)
from probly_common.checks.weights import check_loaded_dtype, check_numpy, read_json
from probly_common.weights.files import Arrays, Spec, keep_once, open_arrays, specs_of, write_arrays
from probly_common.weights.flatten import check_flattened, linear_sizes
from probly_common.weights.match import check_tied
from probly_flax._inventory import Inventory
from probly_flax._layouts import Weight
from probly_flax.weights import (
    Flatten,
    identities_of,
    metadata_of,
    set_variable,
    shapes_of,
    spec_of,
    weights_of,
)

__all__ = ["load_optimizer", "load_optimizer_arrays", "optimizer_to_arrays", "save_optimizer"]

# The states of optax that hold moments, one for each parameter: their fields, and what torch calls them.
_MOMENTS = {
    optax.ScaleByAdamState: {"mu": "exp_avg", "nu": "exp_avg_sq"},
    optax.TraceState: {"trace": "momentum_buffer"},
}


def optimizer_to_arrays(
    model: nnx.Module, optimizer: nnx.Optimizer, *, flatten: Flatten = None
) -> dict[str, np.ndarray]:
    """Copies the state of an optimizer into arrays, by the names of the model's parameters in torch.

    The optimizer is an `nnx.Optimizer` of `optax.sgd`, `adam` or `adamw`. Its state is what training needs to go on,
    beside the weights. With the twin of the optimizer in the other framework, training takes the same steps. Learning
    rate, betas, decay and schedule are not part of the state: build the twin with them, by this table.

    | torch.optim | optax |
    |---|---|
    | `SGD(p, lr)` | `sgd(lr)` |
    | `SGD(p, lr, momentum=m, nesterov=n)` | `sgd(lr, momentum=m, nesterov=n)` |
    | `SGD(p, lr, momentum=m, weight_decay=w)` | `chain(add_decayed_weights(w), sgd(lr, momentum=m))`, in this order |
    | `Adam(p, lr, (b1, b2), eps)` | `adam(lr, b1, b2, eps)` |
    | `Adam(p, lr, weight_decay=w)` | `chain(add_decayed_weights(w), adam(lr))`, in this order |
    | `AdamW(p, lr, weight_decay=w)` | `adamw(lr, weight_decay=w)`; left out, it is 1e-2 in torch and 1e-4 in optax |

    optax takes Adam's bias correction in float32 unless `jax_enable_x64` is set: 1e-5 off at first, less later.
    The transformation may stand inside others that keep nothing for each parameter, such as `optax.chain`, `masked`,
    `multi_transform`, `inject_hyperparams` and `apply_if_finite`. `adamax`, `nadam`, `radam`, `yogi`, `adopt` and
    `lamb` have no twin here, but keep what `adam` keeps and cannot be told from it, nor `lars` from `sgd`. To go on
    with optax alone, take the state that it knows from `nnx.as_pure(optimizer.opt_state)`.

    Args:
        model: whose parameters the optimizer updates. Frozen ones have no state.
        optimizer: of the model's parameters. A new one has zeros.
        flatten: as in `to_arrays`, whose order of rows the state follows.

    Returns:
        For each parameter `name.exp_avg`, `name.exp_avg_sq` and `name.step`, or `name.momentum_buffer`, in torch's
        layout; `name.step` for SGD too where a schedule counts. Both names of a tied parameter are there.

    Raises:
        TypeError: if the optimizer is no nnx.Optimizer.
        ValueError: if it keeps something else for each parameter, or updates parameters that are not the model's or
            that torch trains as others.

    Example:
        >>> model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
        >>> arrays = optimizer_to_arrays(model, nnx.Optimizer(model, optax.sgd(0.1, momentum=0.9), wrt=nnx.Param))
        >>> {name: array.shape for name, array in arrays.items()}
        {'weight.momentum_buffer': (2, 3), 'bias.momentum_buffer': (2,)}
    """
    arrays = _arrays("optimizer_to_arrays", _state("optimizer_to_arrays", Inventory(model), optimizer, flatten))
    return {name: np.array(array) for name, array in arrays.items()}


def load_optimizer_arrays(
    model: nnx.Module, optimizer: nnx.Optimizer, arrays: Mapping[str, np.ndarray], *, flatten: Flatten = None
) -> None:
    """Copies arrays into the state of an optimizer, all of them or none.

    The steps are copied into all that counts them.

    Args:
        model: whose parameters the optimizer updates, with the weights that belong to the state.
        optimizer: of the kind that the arrays come from: see the table of `optimizer_to_arrays`.
        arrays: of `optimizer_to_arrays`, in either framework. torch's SGD does not count steps: for a schedule, add
            `arrays["name.step"] = np.float32(steps)` of any parameter.
        flatten: as in `to_arrays`.

    Raises:
        TypeError: if the optimizer is no nnx.Optimizer.
        ValueError: listing every name that is missing or unexpected, and every other shape or dtype; or if parameters
            have taken different numbers of steps, since optax counts them once.

    Example:
        >>> import jax.numpy as jnp
        >>> model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
        >>> source, target = (nnx.Optimizer(model, optax.adam(1e-3), wrt=nnx.Param) for _ in range(2))
        >>> _ = source.update(model, nnx.grad(lambda model: model(jnp.ones((1, 3))).sum())(model))
        >>> load_optimizer_arrays(model, target, optimizer_to_arrays(model, source))
        >>> target.opt_state[0].count[...]
        Array(1, dtype=int32)
    """
    check_numpy("load_optimizer_arrays", arrays)
    state = _state("load_optimizer_arrays", Inventory(model), optimizer, flatten)
    _load("load_optimizer_arrays", state, optimizer, arrays)


def save_optimizer(
    model: nnx.Module, optimizer: nnx.Optimizer, path: str | os.PathLike[str], *, flatten: Flatten = None
) -> None:
    """Writes the state of an optimizer to a safetensors file. The weights go to a file of their own.

    Args:
        model: as in `optimizer_to_arrays`.
        optimizer: as in `optimizer_to_arrays`.
        path: of the file, which is replaced once the new one is complete.
        flatten: as in `to_arrays`. The file records it for load_optimizer.

    Raises:
        TypeError: if the optimizer is no nnx.Optimizer.
        ValueError: as `optimizer_to_arrays`.

    Example:
        >>> import tempfile
        >>> model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     optimizer = nnx.Optimizer(model, optax.adam(1e-3), wrt=nnx.Param)
        ...     save_optimizer(model, optimizer, f"{folder}/optimizer.safetensors")
    """
    inventory = Inventory(model)
    state = _state("save_optimizer", inventory, optimizer, flatten)
    identities = {name: name for name in state.steps} | identities_of(state.moments)
    kept, tied = keep_once(_arrays("save_optimizer", state), identities)
    write_arrays(path, kept, metadata_of(inventory, flatten) | tied)


def load_optimizer(
    model: nnx.Module, optimizer: nnx.Optimizer, path: str | os.PathLike[str], *, flatten: Flatten = None
) -> None:
    """Loads the file of `save_optimizer`, written in either framework, all of it or nothing. Nothing is unpickled.

    Args:
        model: as in `load_optimizer_arrays`.
        optimizer: as in `load_optimizer_arrays`.
        path: of a file by `save_optimizer` of either package.
        flatten: as in `to_arrays`; None stands for what the file records, and {} for no layer.

    Raises:
        FileNotFoundError: if there is no such file.
        TypeError: if the optimizer is no nnx.Optimizer.
        ValueError: if the file is damaged, or does not fit the optimizer; it says how. Or if it comes from a network
            that flattens a convolution, and flatten does not say its shape.

    Example:
        >>> import tempfile
        >>> model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
        >>> optimizer = nnx.Optimizer(model, optax.adam(1e-3), wrt=nnx.Param)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_optimizer(model, optimizer, f"{folder}/optimizer.safetensors")
        ...     load_optimizer(model, optimizer, f"{folder}/optimizer.safetensors")
    """
    what = f"load_optimizer({os.fspath(path)!r})"
    inventory = Inventory(model)
    with open_arrays("load_optimizer", path) as arrays:
        known = read_json(what, arrays.metadata, "flatten") if flatten is None else flatten
        if flatten != {} and (known or "flatten" not in arrays.metadata):
            sizes = linear_sizes(inventory.options, shapes_of(weights_of(what, inventory)))
            check_flattened(what, read_json(what, arrays.metadata, "options"), known, sizes)
        _load(what, _state(what, inventory, optimizer, known), optimizer, arrays)


class _State(NamedTuple):
    """An optimizer's state, by names in torch: a weight over the moments of each weight, and the steps it has taken.

    `counts` are the variables that count steps, by their place in the state. `optional` are those of `steps` that torch
    does not have.
    """

    moments: dict[str, Weight]
    steps: list[str]
    optional: list[str]
    counts: dict[str, nnx.Variable]


def _load(what: str, state: _State, optimizer: nnx.Optimizer, arrays: Mapping[str, np.ndarray]) -> None:
    expected = {name: spec_of(weight) for name, weight in state.moments.items()}
    check_state(what, expected | dict.fromkeys(state.steps, Spec((), "float32")), specs_of(arrays), state.optional)
    check_tied(what, identities_of(state.moments), arrays)
    steps = {name: float(arrays[name]) for name in state.steps if name in arrays}
    check_steps(what, steps)
    check_one_step(what, steps)
    check_step_known(what, steps, state.counts, (state.steps or [""])[0])
    for name, spec in expected.items():
        check_loaded_dtype(what, name, spec.dtype, jax.dtypes.canonicalize_dtype(spec.dtype).name)
    for name, weight in state.moments.items():
        if weight.refuses:
            weight.from_torch(np.asarray(arrays[name]))
    if isinstance(arrays, Arrays):
        warn_state_not_finite(what, arrays.not_finite({name: spec.dtype for name, spec in expected.items()}))
    for name, weight in state.moments.items():
        for moment, array in zip(weight.variables, weight.from_torch(np.asarray(arrays[name])), strict=True):
            set_variable(moment, np.array(array))
    for step in {*steps.values()}:
        for count in (*state.counts.values(), optimizer.step):
            set_variable(count, np.asarray(step, count.dtype))


def _arrays(what: str, state: _State) -> Arrays:
    steps = {place: float(count[...]) for place, count in state.counts.items()}
    check_one_step(what, steps)
    counted = {name: np.array(step, np.float32) for step in {*steps.values()} for name in state.steps}

    def read(name: str) -> np.ndarray:
        if name in counted:
            return counted[name]
        weight = state.moments[name]
        return np.asarray(weight.to_torch(*(np.asarray(moment[...]) for moment in weight.variables)))

    return Arrays({**{name: spec_of(weight) for name, weight in state.moments.items()}, **specs_of(counted)}, read)


def _state(what: str, inventory: Inventory, optimizer: nnx.Optimizer, flatten: Flatten) -> _State:
    example = "nnx.Optimizer(model, optax.adamw(1e-3), wrt=nnx.Param)"
    check_optimizer(what, optimizer, (nnx.Optimizer,), "nnx.Optimizer, with optax.sgd, adam or adamw", example)
    parameters = dict(_leaves(nnx.state(inventory.model, optimizer.wrt)))
    moments, counts = _moments_and_counts(what, parameters, optimizer)
    trained = set().union(*moments.values()) or {*map(id, parameters.values())}
    weights = weights_of(what, inventory, flatten)
    weights = {name: weight for name, weight in weights.items() if any(id(v) in trained for v in weight.variables)}
    check_whole(what, [name for name, weight in weights.items() if any(id(v) not in trained for v in weight.variables)])
    check_separate(what, [name for name, weight in weights.items() if weight.also])
    found = {
        f"{name}.{key}": weight._replace(variables=tuple(own[id(v)] for v in weight.variables))
        for name, weight in weights.items()
        for key, own in moments.items()
        if all(id(v) in own for v in weight.variables)
    }
    uncounted = [f"{name}.step" for name in weights if f"{name}.exp_avg" not in found]
    return _State(found, [f"{name}.step" for name in weights], uncounted, counts)


def _moments_and_counts(
    what: str, parameters: Mapping[Any, nnx.Variable], optimizer: nnx.Optimizer
) -> tuple[dict[str, dict[int, nnx.Variable]], dict[str, nnx.Variable]]:
    """Returns each moment of each parameter by torch's name and the parameter's id, and the counts by their place."""
    moments: dict[str, dict[int, nnx.Variable]] = {}
    counts: dict[str, nnx.Variable] = {}
    owners: dict[int, str] = {}
    others, strangers = set(), set()
    for path, leaf in _leaves(optimizer.opt_state, *_MOMENTS):
        place = f"opt_state{keystr(path)}"
        for field, key in _MOMENTS.get(type(leaf), {}).items():
            for parameter_path, moment in _leaves(getattr(leaf, field)):
                if isinstance(moment, nnx.Variable) and isinstance(moment.get_value(), optax.MaskedNode):
                    continue
                parameter = parameters.get(parameter_path)
                if parameter is None or parameter.shape != moment.shape:
                    strangers.add(parameter_path)
                    continue
                moments.setdefault(key, {})[id(parameter)] = moment
                if owners.setdefault(id(parameter), place) != place:
                    others.add(f"{place} beside {owners[id(parameter)]}")
        if isinstance(leaf, optax.ScaleByAdamState):
            counts[f"{place}.count"] = leaf.count
        elif isinstance(leaf, nnx.OptVariable):  # nnx's type for what there is of each parameter
            fields = [i for i, key in enumerate(path, 1) if isinstance(key, GetAttrKey)]
            others.add(f"opt_state{keystr(path[: max(fields, default=0)])}")
        elif isinstance(leaf, nnx.Variable) and path[-1] == GetAttrKey("count"):
            counts[place] = leaf
    check_same_in_both(what, sorted(others))
    check_parameters(what, len(strangers))
    return moments, counts


def _leaves(tree: Any, *types: type) -> list[tuple[Any, Any]]:
    return tree_flatten_with_path(tree, is_leaf=lambda node: isinstance(node, (nnx.Variable, *types)))[0]
