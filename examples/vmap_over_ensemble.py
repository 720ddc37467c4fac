"""Many models, one input: a stack of N linear layers, built and called by one vmap.

    python -m examples.vmap_over_ensemble

`vmap_over_ensemble` is the recipe of nnx.split_rngs and nnx.vmap in one call of `probly_flax.ensemble`; the program
checks that both give the same bits, shows what else a model and its inputs can be mapped over, and goes wrong on
purpose in the three usual ways.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from rich import box
from rich.console import Console
from rich.table import Table

from probly_flax import ensemble

CASES = ((0, 3, 4, 2), (7, 1, 1, 1), (42, 16, 5, 3), (123, 8, 30, 10))  # seed, D, N, F
N, D, F, B = 4, 3, 2, 5  # members, inputs, outputs and samples of the rest of the program


def vmap_over_ensemble(seed: float, x: Array, num_models: float, features: float) -> Array:
    """The outputs of N linear layers for one sample. Shape: x (D,). Returns (N*F,)."""

    def make(rngs: nnx.Rngs) -> nnx.Linear:
        return nnx.Linear(x.shape[-1], int(features), rngs=rngs)

    return ensemble(make, int(num_models), rngs=nnx.Rngs(int(seed)))(x).reshape(-1)


def by_hand(seed: float, x: Array, num_models: float, features: float) -> Array:
    """The same without this library."""

    @nnx.split_rngs(splits=int(num_models))
    @nnx.vmap(in_axes=(0,), out_axes=0)
    def make(rngs: nnx.Rngs) -> nnx.Linear:
        return nnx.Linear(x.shape[-1], int(features), rngs=rngs)

    return nnx.vmap(call, in_axes=(0, None))(make(nnx.Rngs(int(seed))), x).reshape(-1)


def call(model: nnx.Module, x: Array) -> Array:
    return model(x)


def linear(rngs: nnx.Rngs) -> nnx.Linear:
    return nnx.Linear(D, F, rngs=rngs)


def sample(seed: int, *shape: int) -> Array:
    return jax.random.normal(jax.random.key(seed), shape, jnp.float32)


def compare_with_recipe() -> dict[tuple[int, int, int, int], bool]:
    """Bit for bit, for several seeds and sizes."""
    found = {}
    for seed, inputs, num_models, features in CASES:
        args = float(seed), sample(seed, inputs), float(num_models), float(features)
        ours, theirs = np.asarray(vmap_over_ensemble(*args)), np.asarray(by_hand(*args))
        equal = ours.shape == theirs.shape and ours.tobytes() == theirs.tobytes()
        print(f"  seed {seed:<4} D={inputs:<3} N={num_models:<3} F={features:<3} outputs {ours.shape!s:<7}", yes(equal))
        found[seed, inputs, num_models, features] = equal
    return found


def show_patterns(seed: int) -> dict[Any, tuple[Array, Array]]:
    """The outputs of nnx.vmap and of this library, by the in_axes of the former."""
    model = ensemble(linear, N, rngs=seed)
    one, x, batch, own = model[0], sample(seed, D), sample(seed, B, D), sample(seed, N, D)
    rows = (
        ((None, 0), "one model, many inputs", one, batch, "model[0](x)", one(batch)),
        ((0, None), "many models, one input", model.stacked, x, "model(x)", model(x)),
        ((0, 0), "an input for each", model.stacked, own, "model(x, in_axes=0)", model(own, in_axes=0)),
    )
    table, found = Table(box=box.SIMPLE_HEAD), {}
    for header in ("nnx.vmap in_axes", "meaning", "kernel", "x", "outputs", "in this library", "differs by"):
        table.add_column(header)
    for in_axes, meaning, mapped, inputs, spelling, ours in rows:
        by_vmap = nnx.vmap(call, in_axes=in_axes)(mapped, inputs)
        shapes = [str(array.shape) for array in (mapped.kernel, inputs, by_vmap)]
        table.add_row(str(in_axes), meaning, *shapes, spelling, f"{abs(by_vmap - ours).max():.1e}")
        found[in_axes] = by_vmap, ours
    Console(width=120).print(table)
    return found


def yes(equal: bool) -> str:
    return "equal" if equal else "NOT EQUAL"


def num_distinct(kernels: Array | np.ndarray) -> int:
    """How many members' kernels, of all (N, D, F), differ."""
    return len(np.unique(np.asarray(kernels).reshape(len(kernels), -1), axis=0))


def error_of(run: Callable[[], Any]) -> str:
    """What the error says that `run` ends with."""
    try:
        run()
    except (TypeError, ValueError) as error:
        return f"{type(error).__name__}: {error}".splitlines()[0]
    raise AssertionError("expected an error")


def forget_to_split(seed: int) -> dict[str, Any]:
    shared = nnx.vmap(linear, in_axes=(None,), axis_size=N)(nnx.Rngs(seed)).kernel[...]
    split = ensemble(linear, N, rngs=seed).stacked.kernel[...]
    not_split = error_of(lambda: nnx.vmap(linear, in_axes=(0,))(nnx.Rngs(seed)))
    ignored = error_of(lambda: ensemble(lambda rngs: linear(nnx.Rngs(seed)), N, rngs=seed))
    print(f"""\
Pitfall 1: forgetting nnx.split_rngs.
  wrong: nnx.vmap with in_axes=(None,) gives all lanes one key. Distinct members: {num_distinct(shared)} of {N}.
  wrong: nnx.vmap with in_axes=(0,) finds no axis in a key that was not split.
    {not_split}
  wrong: a constructor that does not use its rngs. ensemble refuses it.
    {ignored}
  right: ensemble(linear, {N}), which splits. Distinct members: {num_distinct(split)} of {N}.
""")
    return {"shared": num_distinct(shared), "split": num_distinct(split), "errors": (not_split, ignored)}


def loop_over_constructors(seed: int) -> dict[str, Any]:
    calls = []

    def make(rngs: nnx.Rngs) -> nnx.Linear:
        calls.append(rngs)
        return linear(rngs)

    model = ensemble(make, N, rngs=seed)
    calls_of_vmap = len(calls)
    over_seeds = [make(nnx.Rngs(seed + i)) for i in range(N)]
    calls_of_loop = len(calls) - calls_of_vmap
    over_keys = [linear(nnx.Rngs(key)) for key in jax.random.split(nnx.Rngs(seed)(), N)]
    vmapped, seeds, keys = (np.stack([m.kernel[...] for m in members]) for members in (model, over_seeds, over_keys))
    common = num_distinct(vmapped) + num_distinct(seeds) - num_distinct(np.concatenate([vmapped, seeds]))
    equal = np.array_equal(keys, vmapped)
    apart = float(abs(ensemble(over_keys, N)(sample(seed, D)) - model(sample(seed, D))).max())
    print(f"""\
Pitfall 2: a Python loop of constructors. It works, but each layer is traced and allocated by itself.
  one vmap, ensemble(linear, {N}): {calls_of_vmap} call of the constructor, {num_distinct(vmapped)} distinct members
  a loop over seeds {seed} to {seed + N - 1}: {calls_of_loop} calls, {num_distinct(seeds)} distinct members
  Members in common: {common}. The loop draws from other keys: one seed split in {N} is not {N} seeds.
  a loop over the keys that the seed splits into: weights {yes(equal)} bit for bit
  Stacked again by ensemble(members, {N}), these give outputs that differ by {apart:.1e} at most.
""")
    return {"calls": (calls_of_vmap, calls_of_loop), "common": common, "equal": equal, "apart": apart}


def confuse_axes(seed: int) -> dict[str, Any]:
    model, x, batch = ensemble(linear, N, rngs=seed), sample(seed, D), sample(seed, B, D)
    square = nnx.Linear(D, D, rngs=nnx.Rngs(seed))  # its kernel has as many rows as its bias: vmap finds lanes in both
    silent = nnx.vmap(call, in_axes=(0, None))(square, x)
    errors = (
        error_of(lambda: nnx.vmap(call, in_axes=(None, 0))(model.stacked, x)),
        error_of(lambda: nnx.vmap(call, in_axes=(None, 0))(model.stacked, batch)),
        error_of(lambda: model(batch, in_axes=0)),
    )
    print(f"""\
Pitfall 3: confusing in_axes=(0, None) with (None, 0). The model comes first.
  wrong: (None, 0) for {N} models and one input, whose {D} features are taken for inputs.
    {errors[0]}
  wrong: (None, 0) for {N} models and {B} inputs.
    {errors[1]}
  wrong: (0, None) for one model of {D} outputs. No error, but outputs of shape {silent.shape} instead of {(D,)}.
  wrong: model(x, in_axes=0) for {N} models and {B} inputs. ensemble says what to do.
    {errors[2]}
  right: model(x) for {N} models and one input. Outputs {model(x).shape}; for {B} inputs {model(batch).shape}.""")
    return {"errors": errors, "silent": silent.shape, "right": (model(x).shape, model(batch).shape)}


def main(argv: Sequence[str] | None = None) -> dict[str, dict[Any, Any]]:
    """Returns what each part found, by its name."""
    parser = argparse.ArgumentParser(description="N models, built and called by one vmap.")
    parser.add_argument("--seed", type=int, default=0, help="of models and inputs; the comparison has seeds of its own")
    seed = parser.parse_args(argv).seed
    print("vmap_over_ensemble(seed, x, num_models, features) and the recipe by hand, bit for bit:")
    found: dict[str, dict[Any, Any]] = {"recipe": compare_with_recipe(), "patterns": show_patterns(seed)}
    return found | {"split": forget_to_split(seed), "loop": loop_over_constructors(seed), "axes": confuse_axes(seed)}


if __name__ == "__main__":
    main()
