"""Clipping of gradients where members train together."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax  # type: ignore[import-untyped]
from flax import nnx
from jax import Array

from probly_flax.ensemble import Ensemble

__all__ = ["clip_by_member_norm"]


def clip_by_member_norm(model: nnx.Module, max_norm: float) -> optax.GradientTransformation:
    """Clips each member of an Ensemble by the norm of its own gradients; all other parameters, by their joint norm.

    Members trained together would else be scaled by the one with the largest gradients, as optax.clip_by_global_norm
    does. The loss is as it is: one that is a mean over members has gradients 1/E as large as those of a member alone.

    Args:
        model: an Ensemble, or a module that holds some.
        max_norm: the largest norm of a member's gradients.
    Example:
        >>> model = Ensemble([nnx.Linear(2, 3, rngs=nnx.Rngs(i)) for i in range(4)])
        >>> adam = optax.chain(clip_by_member_norm(model, 1.0), optax.adam(1e-3))
        >>> optimizer = nnx.Optimizer(model, adam, wrt=nnx.Param)
    """
    ensembles = {path: each.num_members for path, each in nnx.iter_modules(model) if isinstance(each, Ensemble)}

    def clip(updates: Any, params: Any = None) -> Any:
        leaves, structure = jax.tree_util.tree_flatten_with_path(updates)
        groups: dict[int, list[int]] = {}
        for i, (path, _) in enumerate(leaves):
            names = tuple(getattr(key, "key", getattr(key, "name", None)) for key in path)
            own = (size for prefix, size in ensembles.items() if names[: len(prefix)] == prefix)
            groups.setdefault(next(own, 0), []).append(i)
        clipped = [leaf for _, leaf in leaves]
        for num_members, places in groups.items():
            rows = num_members or 1
            norms = jnp.sqrt(sum(jnp.square(jnp.abs(clipped[i])).reshape(rows, -1).sum(1) for i in places))
            for i in places:
                clipped[i] = _scaled(clipped[i], jnp.minimum(1, max_norm / (norms + 1e-6)))
        return jax.tree.unflatten(structure, clipped)

    return optax.stateless(clip)


def _scaled(gradient: Array, factors: Array) -> Array:
    """Multiplies each member's rows by its factor, or all by the only one."""
    rows = gradient.reshape(factors.shape[0], -1) * factors[:, None].astype(gradient.dtype)
    return rows.reshape(gradient.shape)
