"""Comparison of a torch and a Flax model as functions: outputs, gradients and statistics on equal weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np
from flax import nnx
from torch import nn

from parity_tests.kit.exact import on_integers
from parity_tests.kit.inputs import Inputs, check_inputs
from parity_tests.kit.judge import KINDS, Comparison, Judge, place, with_gaps
from parity_tests.kit.localize import Calls
from parity_tests.kit.pair import Pair, fresh_weights, laid_out, pair_models
from parity_tests.kit.report import ParityReport
from parity_tests.kit.runs import highest_precision
from parity_tests.kit.trees import Run, leaves
from parity_tests.standard import UNIT_ROUNDOFF, Verdict, error, meaning_limit

SEEDS = 5
Oracle = Callable[..., Any]


def compare(
    torch_module: nn.Module,
    flax_module: nnx.Module,
    *inputs: Any,
    kwargs: Mapping[str, Any] | None = None,
    mode: Literal["eval", "train"] = "eval",
    gradients: bool = True,
    dtype: str = "float32",
    exact: bool | None = None,
    jit: bool = True,
    weights: Literal["copy", "own", "random"] = "copy",
    rename: Mapping[str, str] | None = None,
    flatten: Mapping[str, Sequence[int]] | None = None,
    known_gaps: Mapping[str, str] | None = None,
    limit: float = 1.0,
    seeds: int | None = None,
    oracle: Callable[..., Any] | None = None,
    channels_last: bool | None = None,
    layers: bool | None = None,
    progress: Callable[[str], None] | None = None,
) -> ParityReport:
    """Runs both models on equal weights and inputs, and reports every tensor that is not numerically identical.

    Both run in float64, which tells whether they mean the same, and in a lower dtype, which tells whether they are
    equally precise. How far they may be apart follows from their own rounding noise in this comparison, and from
    nothing else (`parity_tests.standard`). Neither model is changed.

    Args:
        torch_module: any module.
        flax_module: its twin; layers whose names differ are given by `rename`.
        *inputs: what both are called with, in torch's layout: arrays of NumPy, torch or JAX, trees of them, or a shape
            to draw normal values for, `(8, 3, 32, 32)`, or `Integers((8, 16), high=1000)`.
        kwargs: keyword arguments of both, in the same forms.
        mode: `eval` or `train`, where statistics are updated, and dropout has equal masks in both.
        gradients: whether gradients by the inputs and the parameters are compared, of a random gradient of the outputs.
        dtype: the lower dtype, float32, bfloat16 or float16; float64 compares the meaning alone.
        exact: whether to compare on integers whose sums are exact in any order, too; None where inputs are drawn and
            the network can be compared so, which a note says.
        jit: whether Flax runs under jax.jit, or op by op.
        weights: `copy` gives Flax those of torch, `random` draws new ones for both, as fresh ones hide faults, and
            `own` compares those that each has.
        rename: regular expressions in torch's names of the weights, and what they are in Flax, as in `load_arrays`.
        flatten: as in `probly_flax.load_arrays`, where a Linear layer reads an image that Flax flattens channels last.
        known_gaps: patterns of names of tensors, such as `"*.running_var"`, that are known to differ, and the reasons.
            One that does not differ any more fails.
        limit: the part of the bounds that is allowed, at most 1.
        seeds: how many inputs are drawn, 5 unless said. Inputs that are given are run once.
        oracle: a function of (weights by torch's names, *args, **kwargs), NumPy arrays in float64, that returns the
            outputs; torch's float64 run if there is none.
        channels_last: whether Flax has images as (N, ..., C); found out from the shapes unless said.
        layers: whether to compare layer by layer as well; None where something differs.
        progress: called with the name of each step before it starts.

    Returns:
        What was measured. It is true if everything agrees, printing it explains it, and `save` writes it.

    Raises:
        TypeError: if these are no modules, or no arrays.
        ValueError: if an option has no such value, a model does not take the inputs, weights have no names in torch, or
            exact=True is asked of a network that rounds.

    Example:
        >>> from torch import nn
        >>> from flax import nnx
        >>> report = compare(nn.Linear(3, 2), nnx.Linear(3, 2, rngs=nnx.Rngs(0)), (5, 3))
        >>> report.passed
        True
    """
    _check_options(torch_module, flax_module, mode, dtype, weights, limit, seeds)
    step = progress or (lambda name: None)
    judge = Judge(dtype, limit, oracle is not None)
    given = Inputs(inputs, kwargs, judge.low)
    check_inputs("compare", given)
    step("weights")
    train = mode == "train"
    pair, comparisons = pair_models(torch_module, flax_module, judge.low, train, jit, weights, rename, flatten)
    notes = [] if weights == "random" else fresh_weights(pair.torch[judge.low].to_arrays())

    with highest_precision():
        step("shapes")
        pair, misfit = laid_out(pair, given.draw(0), channels_last)
        if misfit is None:
            for seed in range((SEEDS if given.is_drawn else 1) if seeds is None else seeds):
                step(f"inputs {seed + 1}")
                _judge_run(judge, pair, given, gradients, oracle, seed)
            comparisons += judge.comparisons()
            if given.is_drawn and not train:
                step("special values")
                comparisons += _special_values(judge, pair, given)
            if exact or (exact is None and given.is_drawn):
                step("integers")
                comparisons += on_integers(pair, given, gradients, notes, required=exact is True)
        else:
            comparisons.append(Comparison("output", "output", (Verdict("output", misfit, float("inf"), 0.0),)))
        if pair.layout.ranks:
            notes.append(f"Flax took its inputs {pair.layout}")
        comparisons = with_gaps("compare", comparisons, known_gaps or {})
        failed = [each for each in comparisons if not each.holds and each.gap is None]
        found: tuple[Any, ...] = ()
        divergence = None
        if layers or (failed and layers is None):
            step("layers")
            calls = Calls(pair, _showing(given, failed))
            found, divergence = calls.layers(), calls.first_divergence(failed)
    types = type(torch_module).__name__, type(flax_module).__name__
    order = sorted(comparisons, key=lambda each: KINDS.index(each.kind))
    return ParityReport(*types, mode, dtype, jit, tuple(order), found, divergence, tuple(notes))


def assert_parity(torch_module: nn.Module, flax_module: nnx.Module, *inputs: Any, **options: Any) -> ParityReport:
    """Runs `compare`, as an assertion.

    Args:
        torch_module: as in `compare`.
        flax_module: as in `compare`.
        *inputs: as in `compare`.
        **options: as in `compare`.

    Returns:
        The report, if everything agrees.

    Raises:
        AssertionError: otherwise, with the report as its message.

    Example:
        >>> from torch import nn
        >>> from flax import nnx
        >>> report = assert_parity(nn.Linear(3, 2), nnx.Linear(3, 2, rngs=nnx.Rngs(0)), (5, 3))
    """
    __tracebackhide__ = True  # pytest shows the caller's line
    report = compare(torch_module, flax_module, *inputs, **options)
    if not report:
        raise AssertionError(str(report))
    return report


def _check_options(
    torch_module: Any, flax_module: Any, mode: str, dtype: str, weights: str, limit: float, seeds: int | None
) -> None:
    for module, kind, name in ((torch_module, nn.Module, "torch.nn.Module"), (flax_module, nnx.Module, "nnx.Module")):
        if not isinstance(module, kind):
            raise TypeError(
                f"compare expects a torch.nn.Module and then an nnx.Module; got {type(module).__name__} for the "
                f"{name}. Call compare(torch_module, flax_module, (8, 3))."
            )
    for name, value, choices in (
        ("mode", mode, ("eval", "train")),
        ("dtype", dtype, tuple(UNIT_ROUNDOFF)),
        ("weights", weights, ("copy", "own", "random")),
    ):
        if value not in choices:
            raise ValueError(
                f"compare expects {name} to be one of {', '.join(choices)}; got {value!r}. Pass {name}={choices[0]!r}."
            )
    if seeds is not None and (not isinstance(seeds, int) or seeds < 1):
        raise ValueError(f"compare expects seeds to be a number of inputs of at least 1; got {seeds!r}. Pass seeds=5.")
    if not 0 < limit <= 1:
        raise ValueError(
            f"compare expects limit to be the part of the bounds that is allowed, above 0 and at most 1; got "
            f"{limit!r}. Pass limit=0.5 for half of them, and name what is known to differ: "
            f"known_gaps={{'*.running_var': 'reason'}}."
        )


def _judge_run(judge: Judge, pair: Pair, given: Inputs, gradients: bool, oracle: Oracle | None, seed: int) -> None:
    """Runs both models in both dtypes, on one draw of the inputs."""

    def g(name: str, shape: Sequence[int]) -> np.ndarray:
        return given.rounded(np.random.default_rng([seed, 1, *name.encode()]).standard_normal(shape))

    inputs = given.draw(seed)
    ours, theirs = pair.run(inputs, g if gradients else None, seed)
    reference = dict(ours["float64"])
    if oracle is not None:
        reference |= _of_oracle(oracle, pair, inputs)
    for key, expected in reference.items():
        if all(key in run for run in theirs.values()):
            judge.add(key, ours, theirs, expected)
        elif key[1] in pair.names and not key[1].endswith("num_batches_tracked"):
            # As the gradient of a parameter that is no nnx.Param; and nnx counts no batches.
            judge.lacks(key, f"no {key[0]} in Flax")


def _of_oracle(oracle: Oracle, pair: Pair, inputs: Any) -> Run:
    args, kwargs = inputs
    outputs = dict(leaves(oracle(pair.torch["float64"].to_arrays(), *args, **kwargs), "output"))
    if list(outputs) != list(pair.shapes):
        raise ValueError(
            f"compare expects an oracle that returns arrays at {', '.join(pair.shapes)}, as torch does; got "
            f"{', '.join(outputs) or 'none'}. Return NumPy arrays: oracle=lambda weights, x: np.tanh(x)."
        )
    return {("output", name): np.asarray(array) for name, array in outputs.items()}


def _special_values(judge: Judge, pair: Pair, given: Inputs) -> Iterator[Comparison]:
    """Compares outputs in float64 where inputs are zero, infinite, NaN, denormal or large."""
    limit = judge.limit * meaning_limit(judge.noise("output"))
    for name, inputs in given.special():
        with np.errstate(all="ignore"):
            ours = pair.torch["float64"].run(inputs)
            # Op by op: under jit, XLA loses NaN where it fuses relu with a sum.
            theirs = pair.flax["float64"].run(inputs, pair.layout, pair.shapes, jit=False)
        for key, expected in ours.items():
            if key[0] == "output" and expected.dtype.kind == "f":
                tensor = f"{key[1]} where inputs are {name}"
                distance = error(theirs[key], expected, expected, "float64")
                verdict = Verdict(tensor, "float64 distance of torch and flax", distance, limit)
                yield Comparison("special value", tensor, (verdict,), *place(expected, theirs[key], "float64"))


def _showing(inputs: Inputs, failed: Sequence[Comparison]) -> Any:
    """Returns inputs on which the two differ: the usual ones, unless only special values show it."""
    kinds = {each.kind for each in failed}
    if kinds != {"special value"}:
        return inputs.draw(0)
    return next(special for name, special in inputs.special() if failed[0].name.endswith(name))
