"""Random numbers: `jax.random` and `flax.nnx.Rngs`, under the names that probly_torch.random has twins for.

The same key gives the same bits in both frameworks, so that layers drawn from the same seed start equal.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from flax.nnx import Rngs, RngStream
from jax import Array
from jax.random import (
    bernoulli,
    bits,
    categorical,
    choice,
    fold_in,
    key,
    normal,
    permutation,
    randint,
    split,
    truncated_normal,
    uniform,
)

from probly_common.checks.values import check_seed

__all__ = [
    "RngStream",
    "Rngs",
    "bernoulli",
    "bits",
    "categorical",
    "choice",
    "fold_in",
    "key",
    "normal",
    "permutation",
    "randint",
    "split",
    "truncated_normal",
    "uniform",
]


def as_rngs(what: str, rngs: Any) -> Rngs:
    """Returns `rngs` itself, or the Rngs of a seed."""
    return rngs if isinstance(rngs, Rngs) else Rngs(check_seed(what, rngs))


def draw_dtype(dtype: Any) -> Any:
    """Returns the dtype in which weights are drawn: half-precision ones are drawn in float32 and rounded.

    JAX's own draws of half-precision weights have 7 or 10 random bits.
    """
    return jnp.float32 if jnp.finfo(dtype).bits < 32 else dtype


def rounded(x: Array) -> Array:
    """Returns x as it is, so that XLA rounds it.

    Under jit only, XLA would multiply two constant factors first, and contract a product and a sum. An operation that
    is neither a product nor a sum, as a maximum, keeps it from both. A layer is then the same, to the bit, whether it
    was made under jit or not.
    """
    return jnp.maximum(x, jnp.finfo(x.dtype).min)
