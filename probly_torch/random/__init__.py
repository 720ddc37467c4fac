"""Random numbers: the twin of `jax.random` with its default threefry keys, and of `flax.nnx.Rngs`.

The same key gives the same bits in both frameworks, so that layers drawn from the same seed start equal: keys, bits,
integers, permutations and Booleans always, float32 and bfloat16 numbers on every CPU with fused multiply-adds, float64
numbers to 2 ULP except for a few in a million. float16 numbers are those of JAX on CPUs without AVX512-FP16: with it,
XLA rounds a product and a sum once, and here as elsewhere each is rounded.

A key is a tensor of two words, `[..., 2]`, equal to `jax.random.key_data(key)`: int64 because uint32 has
neither arithmetic nor pickling in torch. Draws are made on the key's device.

JAX's default dtypes are 64 bits under `jax_enable_x64`, and torch's follow `torch.set_default_dtype`: name the dtype
where the bits matter. Twin of jax 0.10 with `jax_threefry_partitionable=True` (its default).
"""

from __future__ import annotations

from probly_torch.random._draws import (
    bernoulli,
    categorical,
    choice,
    normal,
    permutation,
    randint,
    truncated_normal,
    uniform,
)
from probly_torch.random._draws import (
    draw_dtype as draw_dtype,
)
from probly_torch.random._draws import (
    lecun_normal as lecun_normal,
)
from probly_torch.random._rngs import Rngs, RngStream
from probly_torch.random._rngs import as_rngs as as_rngs
from probly_torch.random._threefry import bits, fold_in, key, split

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
