"""Whether each member's rows are what the member computes alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from probly_common.mismatch import Calls, Mismatch, first_mismatch


def find_mismatch(model: Any, args: Any, kwargs: Any, layers: Sequence[str] = ()) -> Mismatch | None:
    """Compares the model's outputs with each member's, in eval mode and, where weights are floating, in float64.

    `layers` are those that have members, by their paths in one member.
    """
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):  # layers may keep a dtype of their own
        wide = nnx.clone(model, arrays=True)
        wide.eval()
        nnx.update(wide, jax.tree.map(_wide, nnx.state(wide)))
        given, named = jax.tree.map(_wide, (args, kwargs))

        def run(i: int | None, calls: Calls) -> list[np.ndarray]:
            network, prefix = (wide, "network.") if i is None else (wide[i], "")
            modules = {".".join(map(str, path)): module for path, module in nnx.iter_modules(network)}
            with _recording({path: modules[f"{prefix}{path}".strip(".")] for path in layers}, calls):
                outputs = network(*given, **named)
            return [_array(y) for y in jax.tree.leaves(outputs) if isinstance(y, Array)]

        return first_mismatch(run, model.num_members, layers, (TypeError, ValueError, IndexError))


@contextmanager
def _recording(layers: Mapping[str, nnx.Module], calls: Calls) -> Iterator[None]:
    """Makes layers of our own copy record themselves, through a class of their own."""
    before = {path: type(layer) for path, layer in layers.items()}

    def recording(path: str, own: type) -> type:
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            calls.enter(path)
            output = own.__call__(self, *args, **kwargs)
            calls.leave(path, lambda: _array(jax.tree.leaves(output)[0]))
            return output

        return type(own.__name__, (own,), {"__call__": call})

    for path, layer in layers.items():
        object.__setattr__(layer, "__class__", recording(path, before[path]))
    yield
    for path, layer in layers.items():
        object.__setattr__(layer, "__class__", before[path])


def _wide(value: Any) -> Any:
    floating = isinstance(value, (Array, np.ndarray)) and jnp.issubdtype(value.dtype, jnp.floating)
    return jnp.asarray(np.asarray(value), jnp.float64) if floating else value


def _array(value: Array) -> np.ndarray:
    return np.asarray(value, np.float64)
