"""Deep ensembles in Flax: three networks, and three ways to give each member weights of its own.

    python -m examples.flax_ensemble

A small stack of linear layers, an MLP and a CNN become ensembles: by re-initialising copies of a network, by calling a
constructor for each member, and by a rule that draws every parameter from a normal distribution. Two tables show their
sizes and that no two members share a draw; then the members of one ensemble are averaged, taken out and pruned.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import NamedTuple

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

NOTES = """\
Draws: every parameter that does not start as zeros, of every member. All are distinct unless two share a key.
The normal rule ignores how wide a layer is: its members lie far apart, where the usual initialisation keeps scale.
Constructor and re-initialised copies split one seed into the same keys, so that they may come out equal."""


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
    """The first two numbers of every parameter of every member: equal ones come from one key.

    Two, because a small bias has no more. A parameter that starts as zeros, as biases do by default, is not drawn.
    """
    starts = [parameter.ravel()[:2] for stacked in weights(model) for parameter in stacked]
    return [start.tobytes() for start in starts if start.any()]


def run(case: Case, way: str, seed: int) -> Result:
    base = case.make(nnx.Rngs(seed))
    before = weights(base)
    model = make_ensemble(case, way, base, seed)
    x = jax.random.normal(jax.random.key(seed), case.x_shape, jnp.float32)
    untouched = None if way == CONSTRUCTED else equal(weights(base), before)
    return Result(case, way, model, x, model(x), find_draws(model), untouched)


def print_tables(results: Sequence[Result]) -> None:
    sizes, checks = Table(box=box.SIMPLE_HEAD), Table(box=box.SIMPLE_HEAD)
    for header in ("architecture", "members", "parameters of one", "of the ensemble", "output shape"):
        sizes.add_column(header)
    for header in ("architecture", "members are", "base untouched", "draws", "distinct", "variance over members"):
        checks.add_column(header)
    for column in (*sizes.columns[1:], *checks.columns[3:]):
        column.justify = "right"
    for case, way, model, _, y, draws, untouched in results:
        if way == REINITIALISED:  # the other ways give the same sizes
            counts = [sum(w.size for w in weights(network)) for network in (model[0], model)]
            sizes.add_row(case.name, f"{len(model)}", f"{counts[0]:,}", f"{counts[1]:,}", str(y.shape))
        found = {True: "yes", False: "NO", None: "-"}[untouched], f"{len(draws)}", f"{len(set(draws))}"
        checks.add_row(case.name, way, *found, f"{y.var(axis=0).mean():,.4f}", end_section=way == UNCHANGED)
    Console(width=120).print(sizes, checks)
    print(NOTES)


def inspect_members(result: Result) -> dict[str, float | bool]:
    """Averages, takes out and prunes members; returns how far their outputs move and whether pruning kept weights."""
    model, x, y = result.model, result.x, result.y
    print(f"\nThe first ensemble of {result.case.name}, for the first of {len(x)} inputs:")
    rows = {f"member {i}": y[i, 0] for i in range(len(model))} | {"mean": y.mean(0)[0], "variance": y.var(0)[0]}
    for name, values in rows.items():
        print(f"  {name:<9}" + "".join(f"{value:9.4f}" for value in values))

    one, alone, pruned = model[1], jnp.stack([member(x) for member in model]), model[[0, 2]]
    by_index, by_iteration = float(abs(one(x) - y[1]).max()), float(abs(alone - y).max())
    kept = equal(weights(pruned), [w[[0, 2]] for w in weights(model)])
    print(f"""
Members are plain networks, whose outputs differ from those they give in the ensemble by at most
  {by_index:.1e}  for model[1], a {type(one).__name__}
  {by_iteration:.1e}  for member in model, {len(alone)} of them
Pruned, model[[0, 2]] has the weights of members 0 and 2: {"yes" if kept else "NO"}. Its outputs: {pruned(x).shape}.""")
    return {"by index": by_index, "by iteration": by_iteration, "pruning keeps weights": kept}


def main(argv: Sequence[str] | None = None) -> tuple[list[Result], dict[str, float | bool]]:
    """Returns a result for each architecture and way, and what the members of the first one showed."""
    parser = argparse.ArgumentParser(description="Deep ensembles of three networks in Flax.")
    parser.add_argument("--seed", type=int, default=0, help="of the networks, the members and the inputs")
    seed = parser.parse_args(argv).seed
    ways = REINITIALISED, CONSTRUCTED, RULE, UNCHANGED
    results = [run(case, way, seed) for case in CASES for way in ways]
    print_tables(results)
    return results, inspect_members(results[0])


if __name__ == "__main__":
    main()
