"""Deep ensembles in Flax: three networks, and three ways to give each member weights of its own.

    python -m examples.flax_ensemble

A small stack of linear layers, an MLP and a CNN become ensembles: by re-initialising copies of a network, by calling a
constructor for each member, and by a rule that draws every parameter from a normal distribution. Tables count what
the members share; then the members of one ensemble are averaged, taken out and pruned.
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
UNCHANGED = "copies as they are"  # no ensemble at all: it shows that the checks see members that share
Constructor = Callable[[nnx.Rngs], nnx.Module]


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
    make: Constructor
    num_members: int
    x_shape: tuple[int, ...]


CASES = (
    Case("three Linear layers", small_linear, 3, (5, 2)),
    Case("MLP, 10 outputs", lambda rngs: MLP(4, rngs=rngs), 5, (5, 4)),
    Case("MLP, 3 outputs", lambda rngs: MLP(4, 3, rngs=rngs), 5, (5, 4)),
    Case("CNN", lambda rngs: SmallCNN(rngs=rngs), 3, (5, 16, 16, 1)),
)


class Result(NamedTuple):
    """An ensemble, its outputs (E, B, C), and what the checks found. A constructor has no base to touch."""

    case: Case
    way: str
    model: Ensemble
    y: Array
    parameters_of_one: int
    draws: int
    distinct_draws: int
    base_untouched: bool | None


def make_ensemble(case: Case, way: str, base: nnx.Module, seed: int) -> Ensemble:
    if way == CONSTRUCTED:
        return ensemble(case.make, case.num_members, rngs=seed)
    if way == RULE:  # for this one call: every parameter, biases too, by a key of its own
        normal = lambda parameter, rngs: jax.random.normal(rngs.params(), parameter.shape)  # noqa: E731
        return ensemble(base, case.num_members, rngs=seed, reset=normal)
    return ensemble(base, case.num_members, rngs=seed, reset_params=way == REINITIALISED)


def weights(model: nnx.Module) -> list[np.ndarray]:
    """The values of the parameters, copied: those of an ensemble have a leading axis E."""
    return [np.array(value) for value in jax.tree.leaves(nnx.state(model, nnx.Param))]


def equal(some: Sequence[np.ndarray], others: Sequence[np.ndarray]) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(some, others, strict=True))


def all_draws(model: Ensemble) -> list[bytes]:
    """The first two numbers of every parameter of every member.

    Keys used twice show there, even for parameters of different shapes. A bias that starts at zero was not drawn.
    """
    starts = [row.ravel()[:2] for stacked in weights(model) for row in stacked]
    return [start.tobytes() for start in starts if start.any()]


def run(case: Case, way: str, seed: int) -> Result:
    base = case.make(nnx.Rngs(seed))
    before = weights(base)
    model = make_ensemble(case, way, base, seed)
    draws = all_draws(model)
    y = model(jax.random.normal(jax.random.key(seed), case.x_shape, jnp.float32))
    untouched = None if way == CONSTRUCTED else equal(weights(base), before)
    return Result(case, way, model, y, sum(w.size for w in before), len(draws), len(set(draws)), untouched)


def print_tables(results: Sequence[Result]) -> None:
    sizes, checks = Table(box=box.SIMPLE_HEAD), Table(box=box.SIMPLE_HEAD)
    for header in ("architecture", "members", "parameters\nof one", "parameters\nof the ensemble", "output shape"):
        sizes.add_column(header, justify="left" if header == "architecture" else "right")
    for header in ("architecture", "members are", "draws", "distinct", "base untouched", "variance over members"):
        checks.add_column(header, justify="right" if header in ("draws", "distinct") else "left")
    for r in results:
        if r.way == REINITIALISED:
            total = sum(w.size for w in weights(r.model))
            cells = f"{len(r.model)}", f"{r.parameters_of_one:,}", f"{total:,}", str(r.y.shape)
            sizes.add_row(r.case.name, *cells)
    for r in results:
        untouched = {True: "yes", False: "NO", None: "-"}[r.base_untouched]
        spread = f"{r.y.var(axis=0).mean():.4f}"
        checks.add_row(
            r.case.name, r.way, f"{r.draws}", f"{r.distinct_draws}", untouched, spread, end_section=r.way == UNCHANGED
        )
    console = Console(width=120)
    console.print(sizes, checks)


def main(argv: Sequence[str] | None = None) -> Any:
    parser = argparse.ArgumentParser(description="Deep ensembles of three networks in Flax.")
    parser.add_argument("--seed", type=int, default=0, help="of the networks, the members and the inputs")
    args = parser.parse_args(argv)
    ways = (REINITIALISED, CONSTRUCTED, RULE, UNCHANGED)
    results = [run(case, way, args.seed) for case in CASES for way in ways]
    print_tables(results)
    return results


if __name__ == "__main__":
    main()
