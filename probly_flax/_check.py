"""Whether each member's rows are what the member computes alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from probly_common.mismatch import Calls, Mismatch, mismatch, refused


def find_mismatch(model: Any, args: Any, kwargs: Any, layers: Sequence[str] = ()) -> Mismatch | None:
    """Compares the model's outputs with each member's, in eval mode and, where weights are floating, in float64.

    `layers` are those that have members, by their paths in one member.
    """
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):  # layers may keep a dtype of their own
        wide = nnx.clone(model, arrays=True)
        wide.eval()
        nnx.update(wide, jax.tree.map(_wide, nnx.state(wide)))
        members = [_run(member, args, kwargs, layers, Calls()) for member in wide]
        calls = Calls()
        try:
            y, _ = _run(wide, args, kwargs, layers, calls, "network")
        except (TypeError, ValueError, IndexError):
            if calls.entered is None:
                raise
            return refused(calls)
        rows = [[each[i] for each in y] for i in range(len(members))]
        found = (mismatch(i, rows[i], *alone, layers, calls) for i, alone in enumerate(members))
        return next((each for each in found if each), None)


def _run(
    network: Any, args: Any, kwargs: Any, layers: Sequence[str], calls: Calls, prefix: str = ""
) -> tuple[list[np.ndarray], Calls]:
    """Returns the outputs, and adds the calls of the layers."""
    args, kwargs = jax.tree.map(_wide, (args, kwargs))
    with _recording(network, layers, calls, prefix):
        outputs = network(*args, **kwargs)
    return [_array(y) for y in jax.tree.leaves(outputs) if isinstance(y, Array)], calls


@contextmanager
def _recording(network: nnx.Module, layers: Sequence[str], calls: Calls, prefix: str) -> Iterator[None]:
    """Makes the layers of our own copy record themselves, through a class of their own."""
    modules = {".".join(map(str, path)): module for path, module in nnx.iter_modules(network)}
    recorded = {path: modules[f"{prefix}.{path}".strip(".")] for path in layers}
    before = {path: type(module) for path, module in recorded.items()}

    def recording(path: str, own: type) -> type:
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            calls.enter(path)
            output = own.__call__(self, *args, **kwargs)
            calls.leave(path, _array(jax.tree.leaves(output)[0]))
            return output

        return type(own.__name__, (own,), {"__call__": call})

    for path, module in recorded.items():
        object.__setattr__(module, "__class__", recording(path, before[path]))
    yield
    for path, module in recorded.items():
        object.__setattr__(module, "__class__", before[path])


def _wide(value: Any) -> Any:
    floating = isinstance(value, (Array, np.ndarray)) and jnp.issubdtype(value.dtype, jnp.floating)
    return jnp.asarray(np.asarray(value), jnp.float64) if floating else value


def _array(value: Array) -> np.ndarray:
    return np.asarray(value, np.float64)
