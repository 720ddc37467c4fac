"""Deep ensembles in Flax: three networks, and three ways to give each member weights of its own.

    python -m examples.flax_ensemble

A small stack of linear layers, an MLP and a CNN become ensembles: by re-initialising copies of a network, by calling a
constructor for each member, and by a rule that draws every parameter from a normal distribution. Two tables show their
sizes and that no two members share a draw; then the members of one ensemble are averaged, taken out and pruned.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from rich import box
from rich.console import Console
from rich.table import Table

from probly_flax import Ensemble, ensemble

REINITIALISED, CONSTRUCTED, RULE = "copies, re-initialised", "constructor", "copies, normal rule"
UNCHANGED = "copies as they are"  # not much of an ensemble: it shows that the checks see members that share


def small_linear(rngs: nnx.Rngs) -> nnx.Sequential:
    return nnx.Sequential(*(nnx.Linear(2, 2, rngs=rngs) for _ in range(3)))


class MLP(nnx.Module):
    """Shape: x (B, in_features). Returns (B, out_features)."""

    def __init__(self, in_features: int, out_features: int = 10, hidden: int = 64, *, rngs: nnx.Rngs) -> None:
        self.hidden = nnx.Linear(in_features, hidden, rngs=rngs)
        self.head = nnx.Linear(hidden, out_features, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        return self.head(nnx.relu(self.hidden(x)))


class SmallCNN(nnx.Module):
    """Shape: x (B, H, W, channels). Returns (B, num_classes)."""

    def __init__(self, channels: int = 1, num_classes: int = 10, *, rngs: nnx.Rngs) -> None:
        self.conv1 = nnx.Conv(channels, 32, kernel_size=(3, 3), rngs=rngs)
        self.conv2 = nnx.Conv(32, 64, kernel_size=(3, 3), rngs=rngs)
        self.head = nnx.Linear(64, num_classes, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        x = nnx.avg_pool(nnx.relu(self.conv1(x)), window_shape=(2, 2), strides=(2, 2))
        x = nnx.relu(self.conv2(x)).mean(axis=(1, 2))  # global average pooling
        return self.head(x)


class Case(NamedTuple):
    name: str
    make: Callable[[nnx.Rngs], nnx.Module]
    num_members: int
    x_shape: tuple[int, ...]


CASES = (
    Case("three Linear layers", small_linear, 3, (5, 2)),
    Case("MLP, 10 outputs", lambda rngs: MLP(4, rngs=rngs), 5, (5, 4)),
    Case("MLP, 3 outputs", lambda rngs: MLP(4, 3, rngs=rngs), 5, (5, 4)),
    Case("CNN", lambda rngs: SmallCNN(rngs=rngs), 3, (5, 16, 16, 1)),
)


class Result(NamedTuple):
    """An ensemble made in one of the ways, its outputs (E, B, C), and what the checks found."""

    case: Case
    way: str
    model: Ensemble
    x: Array
    y: Array
    parameters_of_one: int
    draws: list[bytes]
    base_untouched: bool | None  # None where there is no base


def make_ensemble(case: Case, way: str, base: nnx.Module, seed: int) -> Ensemble:
    if way == CONSTRUCTED:
        return ensemble(case.make, case.num_members, rngs=seed)
    if way == RULE:  # for this call only: every parameter, biases too, from a key of its own
        return ensemble(
            base, case.num_members, rngs=seed, reset=lambda param, rngs: jax.random.normal(rngs.params(), param.shape)
        )
    return ensemble(base, case.num_members, rngs=seed, reset_params=way == REINITIALISED)


def weights(model: nnx.Module) -> list[np.ndarray]:
    """The values of the parameters, copied: those of an ensemble have a leading axis E."""
    return [np.array(value) for value in jax.tree.leaves(nnx.state(model, nnx.Param))]


def equal(some: Sequence[np.ndarray], others: Sequence[np.ndarray]) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(some, others, strict=True))


def find_draws(model: Ensemble) -> list[bytes]:
    """The first two numbers of every parameter of every member: equal ones were drawn from one key.

    Two, because a small bias has no more. A parameter that starts as zeros, as biases do by default, was not drawn.
    """
    starts = [parameter.ravel()[:2] for stacked in weights(model) for parameter in stacked]
    return [start.tobytes() for start in starts if start.any()]


def run(case: Case, way: str, seed: int) -> Result:
    base = case.make(nnx.Rngs(seed))
    before = weights(base)
    model = make_ensemble(case, way, base, seed)
    x = jax.random.normal(jax.random.key(seed), case.x_shape, jnp.float32)
    untouched = None if way == CONSTRUCTED else equal(weights(base), before)
    return Result(case, way, model, x, model(x), sum(w.size for w in before), find_draws(model), untouched)


def new_table(*headers: str, left: int) -> Table:
    table = Table(box=box.SIMPLE_HEAD)
    for i, header in enumerate(headers):
        table.add_column(header, justify="left" if i < left else "right")
    return table


def print_tables(results: Sequence[Result]) -> None:
    sizes = new_table("architecture", "members", "parameters\nof one", "of the\nensemble", "output shape", left=1)
    checks = new_table("", "members are", "base\nuntouched", "draws", "distinct", "variance\nover members", left=3)
    for case, way, model, _, y, parameters, draws, untouched in results:
        if way == REINITIALISED:  # the other ways give the same sizes
            total = sum(w.size for w in weights(model))
            sizes.add_row(case.name, f"{len(model)}", f"{parameters:,}", f"{total:,}", str(y.shape))
        found = {True: "yes", False: "NO", None: "-"}[untouched], f"{len(draws)}", f"{len(set(draws))}"
        checks.add_row(case.name, way, *found, f"{y.var(axis=0).mean():.4f}", end_section=way == UNCHANGED)
    Console(width=120).print(sizes, checks)
    print(
        "Draws are the parameters that do not start as zeros, times members; no two may come from one key. The normal"
    )
    print(
        "rule ignores how wide a layer is, so that its members lie far apart; the other two ways take that into account."
    )


def inspect_members(result: Result) -> dict[str, float | bool]:
    """Averages, takes out and prunes the members; how far single ones are from their row of the ensemble, at most."""
    _, _, model, x, y, *_ = result
    print(f"\n{result.case.name}, {result.way}, for the first of {len(x)} inputs:")
    rows = {f"member {i}": y[i, 0] for i in range(len(model))} | {"mean": y.mean(0)[0], "variance": y.var(0)[0]}
    for name, values in rows.items():
        print(f"  {name:<9}" + "".join(f"{value:9.4f}" for value in values))

    alone = jnp.stack([member(x) for member in model])
    pruned = model[[0, 2]]
    found = {
        "index": float(abs(model[1](x) - y[1]).max()),
        "iteration": float(abs(alone - y).max()),
        "pruned": equal(weights(pruned), [w[[0, 2]] for w in weights(model)]),
    }
    print(f"\nmodel[1] is a plain {type(model[1]).__name__}; its outputs differ by {found['index']:.1e} at most.")
    print(f"The {len(alone)} members, one after the other, differ by {found['iteration']:.1e} at most.")
    kept = "has the weights" if found["pruned"] else "DOES NOT have the weights"
    print(f"model[[0, 2]] {kept} of members 0 and 2, and outputs of shape {pruned(x).shape}.")
    return found


def main(argv: Sequence[str] | None = None) -> tuple[list[Result], dict[str, float | bool]]:
    """Returns a result for each architecture and way, and what the members of the first one showed."""
    parser = argparse.ArgumentParser(description="Deep ensembles of three networks in Flax.")
    parser.add_argument("--seed", type=int, default=0, help="of the networks, the members and the inputs")
    args = parser.parse_args(argv)
    ways = REINITIALISED, CONSTRUCTED, RULE, UNCHANGED
    results = [run(case, way, args.seed) for case in CASES for way in ways]
    print_tables(results)
    return results, inspect_members(results[0])


if __name__ == "__main__":
    main()
