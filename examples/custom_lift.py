"""K copies of a Linen layer applied to one input and averaged: by hand in a loop, by hand with vmap, and by `ensemble`.

    python -m examples.custom_lift

A lift such as `flax.linen.vmap` adds bookkeeping to a JAX transform. Here the bookkeeping is written out twice, to see
what `probly_flax.ensemble` takes over: the keys, the stacked parameters, and slicing one copy out of the stack.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array

import probly_flax


def by_loop(seed: int, x: Array, n_copies: int, features: int) -> Array:
    """Initialises all copies at once and applies them one at a time: (features,)."""
    model = nn.Dense(features)
    keys = jax.random.split(jax.random.PRNGKey(seed), n_copies)
    stacked = jax.vmap(model.init, in_axes=(0, None))(keys, x)
    total = jnp.zeros(features, x.dtype)
    for i in range(n_copies):
        copy = jax.tree.map(lambda p, i=i: p[i], stacked)  # i by default value: a closure would see the last i later
        total += model.apply(copy, x)
    return total / n_copies


def by_vmap(seed: int, x: Array, n_copies: int, features: int) -> Array:
    """The same, applied in one call: (features,)."""
    model = nn.Dense(features)
    keys = jax.random.split(jax.random.PRNGKey(seed), n_copies)
    stacked = jax.vmap(model.init, in_axes=(0, None))(keys, x)
    return jax.vmap(model.apply, in_axes=(0, None))(stacked, x).mean(0)


def custom_lift_forward(seed: int, x: Array, n_copies: int, features: int) -> Array:
    """The same by `ensemble`: (features,)."""
    model = probly_flax.ensemble(nn.Dense(features), n_copies, rngs=int(seed), example_input=x)
    return model(x).mean(0)


def main(argv: Sequence[str] | None = None) -> dict[str, Array]:
    """Prints what each way gives; returns them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0, help="of the copies")
    seed = parser.parse_args(argv).seed

    x, n_copies, features = jnp.array([1.0, -2.0, 0.5]), 4, 2
    ways = {"loop": by_loop, "vmap": by_vmap, "ensemble": custom_lift_forward}
    means = {name: way(seed, x, n_copies, features) for name, way in ways.items()}
    print(f"Mean output of {n_copies} copies of Dense({features}) on x = {x.tolist()}, by")
    for name, mean in means.items():
        distance = abs(mean - means["loop"]).max()
        print(f"  {name:<9} {[round(v, 6) for v in mean.tolist()]}  at most {distance:.0e} from the loop")

    stacked = probly_flax.ensemble(nn.Dense(features), n_copies, rngs=seed, example_input=x)
    print("\nThe stack behind it has the copies on its first axis:", stacked.stacked.kernel.shape, "(K, in, features).")
    same_key = jnp.tile(jax.random.PRNGKey(seed), (n_copies, 1))
    copies = jax.vmap(nn.Dense(features).init, in_axes=(0, None))(same_key, x)["params"]["kernel"]
    print("With one key for all instead of split keys, all copies are the same one:", bool((copies == copies[0]).all()))
    print("Each member is a network of its own:", [m(x).shape for m in stacked])
    return means


if __name__ == "__main__":
    main()
