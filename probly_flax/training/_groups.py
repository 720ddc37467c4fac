"""Groups of parameters by the type of the module that holds them: slow weights, fast weights, biases and norms."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import optax  # type: ignore[import-untyped]
from flax import nnx
from jax.tree_util import DictKey

from probly_common.checks.training import check_group_options, check_groups, check_same_parameters, check_types
from probly_flax._kinds import KINDS
from probly_flax.batchensemble import BatchEnsembleLayer

_SLOW, _FAST, _REST = "slow", "fast", "rest"

Types = tuple[type[nnx.Module], ...]


def fast_weight_groups(
    model: nnx.Module,
    weight_decay: float,
    fast_lr_multiplier: float = 0.5,
    *,
    decay: Types = (),
    no_decay: Types = (),
) -> optax.GradientTransformation:
    """Decays slow weights only, and gives fast ones a learning rate of their own.

    Slow weights, those of linear layers, convolutions and embeddings, decay. Fast weights, r and s of BatchEnsemble
    layers, do not, and their steps are fast_lr_multiplier times as large (Wen et al. 2020, app. B). Biases and the
    parameters of normalisation layers do not decay either. What a parameter is follows from the type of the module that
    holds it, and of a subclass alike.

    The transform comes between what an optimizer makes of the gradients and the learning rate. With Adam that is AdamW:

        optax.chain(optax.scale_by_adam(), fast_weight_groups(model, 1e-2), optax.scale_by_learning_rate(1e-3))

    Args:
        model: the model, or any of the same structure.
        weight_decay: of slow weights, as AdamW takes it: a step takes off learning rate * weight_decay of each.
        fast_lr_multiplier: the learning rate of fast weights over that of all others.
        decay: types of modules, yours for example, whose own parameters decay; r and s stay fast.
        no_decay: types of modules whose own parameters do not, such as nnx.Embed.

    Raises:
        TypeError: if an argument is of another type.
        ValueError: if the model has no fast or no slow weights, or a parameter in a module of a type that is in none of
            the groups; or, when the optimizer is made, if that is of another model.

    Example:
        >>> import probly_flax as probly
        >>> rngs = nnx.Rngs(0)
        >>> model = probly.batchensemble(nnx.Sequential(nnx.Linear(2, 8, rngs=rngs), nnx.LayerNorm(8, rngs=rngs)), 4)
        >>> groups = fast_weight_groups(model, 1e-2)
        >>> transform = optax.chain(optax.scale_by_adam(), groups, optax.scale_by_learning_rate(1e-3))
        >>> optimizer = nnx.Optimizer(model, transform, wrt=nnx.Param)
    """
    what = "fast_weight_groups"
    check_group_options(what, weight_decay, fast_lr_multiplier)
    check_types(what, "decay", decay, nnx.Module, "MyLayer")
    check_types(what, "no_decay", no_decay, nnx.Module, "MyLayer")
    groups: dict[tuple[Any, ...], str] = {}
    unknown: dict[str, str] = {}
    for path, _ in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        holder = _holder(model, path)
        group = _group(holder, path[-1], decay, no_decay)
        if group is None:
            unknown[_name(path)] = type(holder).__name__
        else:
            groups[path] = group
    slow, fast = ([_name(path) for path, each in groups.items() if each == group] for group in (_SLOW, _FAST))
    check_groups(what, weight_decay, slow, fast, unknown)

    def are(group: str) -> Callable[[Any], Any]:
        def mask(params: Any) -> Any:
            paths = [_own(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
            check_same_parameters(what, [_name(path) for path in paths if path not in groups])
            return jax.tree.map_with_path(lambda path, _: groups[_own(path)] == group, params)

        return mask

    return optax.chain(
        optax.add_decayed_weights(weight_decay, mask=are(_SLOW)),
        optax.masked(optax.scale(fast_lr_multiplier), are(_FAST)),
    )


def _own(path: tuple[Any, ...]) -> tuple[Any, ...]:
    """Returns a path in the model, from one in a tree of its variables or of their values."""
    return tuple(key.key for key in path if isinstance(key, DictKey))


def _group(holder: Any, name: Any, decay: Types, no_decay: Types) -> str | None:
    if isinstance(holder, BatchEnsembleLayer) and name in ("r", "s"):
        return _FAST
    if isinstance(holder, decay):
        return _SLOW
    decays = KINDS.get(type(holder), "decays")
    if isinstance(holder, no_decay) or decays is False:
        return _REST
    if decays:
        return _REST if name == "bias" else _SLOW
    return None


def _holder(model: nnx.Module, path: tuple[Any, ...]) -> Any:
    """Returns the innermost module on the way to a parameter, which may lie in a list or a dict of it."""
    nodes: list[Any] = [model]
    for part in path[:-1]:
        node = nodes[-1]
        nodes.append(getattr(node, part) if isinstance(node, nnx.Module) and isinstance(part, str) else node[part])
    layers = [node for node in nodes if isinstance(node, nnx.Module) and not isinstance(node, (nnx.List, nnx.Dict))]
    return layers[-1]


def _name(path: tuple[Any, ...]) -> str:
    return ".".join(map(str, path))
