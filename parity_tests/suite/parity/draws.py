"""The draws that have to be the same everywhere: in both frameworks, on every CPU, with any number of threads.

`python -m parity_tests.suite.parity.draws torch draws.npz` writes those of one framework, and imports no other. Bounds,
fan-ins, shapes and seeds are many and random, since a few chosen ones can agree by chance.
"""

import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

FLOATS = ("float32", "float64", "float16", "bfloat16")
FAN_INS = {"float32": range(1, 513), "float64": range(1, 513, 7)}
PAIRS = 60
SIZE = (200,)
LAYERS: dict[str, dict[str, Any]] = {
    "normal": {"r_mean": 0.3, "r_std": 0.7, "s_mean": -0.1, "s_std": 0.0},
    "random_sign": {"init": "random_sign"},
    "ones": {"init": "ones"},
}


def bounds(low: float, high: float, powers: int = 0) -> Iterator[tuple[float, float]]:
    """Yields random pairs, in every dtype apart. The first begin at 0."""
    numbers = np.random.default_rng(0)
    for i in range(PAIRS):
        first, last = np.sort(numbers.uniform(low, high, 2)) * 10.0 ** numbers.integers(-powers, powers + 1)
        yield (0.0, last - first + 0.1) if i < 3 else (first, last + 0.1)


def shapes() -> Iterator[tuple[int, tuple[int, ...]]]:
    """Yields seeds and shapes."""
    numbers = np.random.default_rng(1)
    for axes in range(5):
        yield int(numbers.integers(2**32)), tuple(numbers.integers(1, 9, axes).tolist())


def draws(random: Any, dtype_of: Callable[[str], Any], array: Callable[[Any, str], Any]) -> Iterator[tuple[str, Any]]:
    """Yields names and arrays of everything that a twin's `random` draws."""
    key = random.key(3)
    for name in FLOATS:
        dtype = dtype_of(name)
        for i, (low, high) in enumerate(bounds(-3, 3, powers=3)):
            yield f"uniform {name} {i}", random.uniform(key, SIZE, dtype, low, high)
        for i, (low, high) in enumerate(bounds(-3, 3)):
            yield f"truncated_normal {name} {i}", random.truncated_normal(key, low, high, SIZE, dtype)
        yield f"normal {name}", random.normal(key, SIZE, dtype)
    for name in FLOATS[:2]:
        dtype = dtype_of(name)
        weights = array(np.random.default_rng(2).random(10), name)
        yield f"choice {name}", random.choice(key, 10, (99,), p=weights)
        yield f"choice without replacement {name}", random.choice(key, 10, (9,), False, p=weights)
        for mode in ("low", "high"):
            drawn = random.categorical(key, array(np.arange(24).reshape(3, 8), name), shape=(50, 3), mode=mode)
            yield f"categorical {mode} {name}", drawn
            yield f"bernoulli {mode} {name}", random.bernoulli(key, array([[0.3, 1e-9, 0.9]], name), (99, 3), mode)
    for name in ("uint8", "int16", "int32", "int64"):
        for low, high in ((0, 10), (3, 100), (0, 127)):
            yield f"randint {name} {low} {high}", random.randint(key, SIZE, low, high, dtype_of(name))
    for seed, shape in shapes():
        yield f"normal {shape}", random.normal(random.key(seed), shape, dtype_of("float32"))
    yield "bits", random.bits(key, (3, 7), dtype_of("uint32"))
    yield "permutation", random.permutation(key, 70)


def many(random: Any, dtype_of: Callable[[str], Any]) -> Iterator[tuple[str, Any]]:
    """Yields draws as `draws` does, enough for several threads."""
    for name in FLOATS[:2]:
        yield f"many normal {name}", random.normal(random.key(5), (1 << 17,), dtype_of(name))
        yield (
            f"many truncated_normal {name}",
            random.truncated_normal(random.key(5), -2.0, 2.0, (1 << 17,), dtype_of(name)),
        )


def torch_draws() -> dict[str, np.ndarray]:
    """Returns the draws of torch, by name."""
    import torch
    from torch import nn

    import probly_torch
    from probly_torch import random

    def dtype_of(name: str) -> torch.dtype:
        return getattr(torch, name)

    arrays = dict(draws(random, dtype_of, lambda values, name: torch.tensor(values).to(dtype_of(name))))
    for threads in (2, 1):
        torch.set_num_threads(threads)
        arrays |= {f"{name}, {threads} threads": array for name, array in many(random, dtype_of)}
    for name in FLOATS[:2]:
        for fan_in in FAN_INS[name]:
            kernel = random.lecun_normal(random.key(3), (fan_in, -(-SIZE[0] // fan_in)), dtype_of(name))
            arrays[f"lecun_normal {name} {fan_in}"] = kernel.flatten()[: SIZE[0]]
        linear, table = nn.Linear(5, 7, dtype=dtype_of(name)), nn.Embedding(11, 3, dtype=dtype_of(name))
        for kind, options in LAYERS.items():
            layer = probly_torch.BatchEnsembleLinear(linear, num_members=4, **options)
            embed = probly_torch.BatchEnsembleEmbed(table, num_members=4, **options)
            weights = {"kernel": layer.weight.T, "r": layer.r, "s": layer.s, "embedding": embed.weight}
            arrays |= {f"{weight} {kind} {name}": array for weight, array in weights.items()}
    return {name: (a.float() if a.dtype == torch.bfloat16 else a).detach().numpy() for name, a in arrays.items()}


def flax_draws() -> dict[str, np.ndarray]:
    """Returns the draws of Flax, by name. The layers are made under jit, where XLA could merge operations."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    import probly_flax
    from probly_flax import random

    @nnx.jit(static_argnums=(0, 1))
    def weights(dtype: str, kind: str) -> dict[str, jax.Array]:
        options: dict[str, Any] = {"rngs": nnx.Rngs(0), "param_dtype": jnp.dtype(dtype)}
        linear, table = nnx.Linear(5, 7, **options), nnx.Embed(11, 3, **options)
        layer = probly_flax.BatchEnsembleLinear(linear, num_members=4, **LAYERS[kind])
        embed = probly_flax.BatchEnsembleEmbed(table, num_members=4, **LAYERS[kind])
        found = {"kernel": layer.kernel, "r": layer.r, "s": layer.s, "embedding": embed.embedding}
        return {f"{weight} {kind} {dtype}": array[...] for weight, array in found.items()}

    with jax.enable_x64(True):
        arrays = dict(draws(random, jnp.dtype, lambda values, name: jnp.asarray(values, name)))
        for name, array in many(random, jnp.dtype):
            arrays |= {f"{name}, {threads} threads": array for threads in (2, 1)}
        for name in FLOATS[:2]:
            for fan_in in FAN_INS[name]:  # of one shape, since JAX compiles each
                init = nnx.initializers.variance_scaling(1 / fan_in, "fan_in", "truncated_normal")
                arrays[f"lecun_normal {name} {fan_in}"] = init(random.key(3), (1, *SIZE), jnp.dtype(name))[0]
            for kind in LAYERS:
                arrays |= weights(name, kind)
    return {name: np.asarray(a, jnp.float32 if a.dtype == jnp.bfloat16 else None) for name, a in arrays.items()}


if __name__ == "__main__":
    framework, path = sys.argv[1:]
    arrays: dict[str, Any] = {"torch": torch_draws, "flax": flax_draws}[framework]()
    np.savez(path, **arrays)
