"""python -m parity_tests.calibrate: how far correct twins stay from the limits of the bounded tier, over many seeds.

The limits are one standard for every subject, so they are right only if no correct pair ever breaks them. The standard
takes the noise of five seeds together; with fewer, `--together 1`, it is a stricter one.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import jax
import torch
from rich.progress import Progress, TaskID

from parity_tests.standard import Verdict
from parity_tests.suite.subjects.all import ALL
from parity_tests.suite.subjects.comparison import DTYPES, Comparison

FIRST = 1000  # the suite itself takes the first few


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0 if no seed broke a rule, 1 if one did."""
    parser = argparse.ArgumentParser(prog="python -m parity_tests.calibrate", description=__doc__)
    parser.add_argument("--seeds", type=int, default=1000, help="how many seeds each subject takes")
    parser.add_argument("--first", type=int, default=FIRST, help="the first seed")
    parser.add_argument("--together", type=int, default=5, help="how many seeds are judged together")
    parser.add_argument("--only", default="", help="subjects whose name contains this")
    args = parser.parse_args(argv)
    chosen = [comparison for comparison in ALL if args.only in comparison.name]
    if not chosen or not 1 <= args.together <= args.seeds:
        parser.error(
            f"calibrate expects a subject, and at least as many seeds as are judged together; got --only {args.only!r} "
            f"--seeds {args.seeds} --together {args.together}. To see all subjects, leave --only out."
        )
    first, last = args.first, args.first + args.seeds
    groups = [range(seed, min(seed + args.together, last)) for seed in range(first, last, args.together)]
    torch.set_num_threads(1)
    with (
        jax.enable_x64(True),
        Progress() as progress,
    ):
        task = progress.add_task("", total=len(chosen) * len(groups))
        rows = [_measure(comparison, groups, progress, task) for comparison in chosen]
    print("meaning and precision over their limits, false alarms of tests, subject and the tensor nearest to a limit:")
    for row in sorted(rows, key=lambda row: row.worst.ratio):
        print(row)
    alarms, tests = sum(row.alarms for row in rows), sum(row.tests for row in rows)
    print(
        f"{alarms} false alarms in {tests} tests of {len(rows)} subjects over {args.seeds} seeds, "
        f"{args.together} together"
    )
    return 1 if alarms else 0


@dataclass(frozen=True)
class Row:
    """A subject over all seeds: the verdict nearest to its limit, or furthest beyond it, of either kind of rule."""

    name: str
    tests: int
    alarms: int
    meaning: Verdict
    precision: Verdict

    @property
    def worst(self) -> Verdict:
        """Returns the worse verdict of the two kinds."""
        return max(self.meaning, self.precision, key=lambda verdict: verdict.ratio)

    def __str__(self) -> str:
        ratios = f"{self.meaning.ratio:7.3f} {self.precision.ratio:7.3f}"
        return f"{ratios} {self.alarms:4} of {self.tests:6}  {self.name}, {self.worst.tensor}"


def _measure(comparison: Comparison, groups: list[range], progress: Progress, task: TaskID) -> Row:
    meaning, precision, alarms, tests = [], [], 0, 0
    for seeds in groups:
        progress.update(task, description=f"{comparison.name}, seeds from {seeds[0]}", advance=1)
        verdicts = comparison.bounded([comparison.draw(seed, DTYPES[0]) for seed in seeds])
        broken = [verdict for verdict in verdicts if not verdict.holds]
        for verdict in broken:
            progress.console.print(f"{comparison.name}, seeds from {seeds[0]}: {verdict}", soft_wrap=True)
        tests, alarms = tests + len(verdicts), alarms + len(broken)
        meaning.append(_nearest(verdict for verdict in verdicts if "distance" in verdict.rule))
        precision.append(_nearest(verdict for verdict in verdicts if "error" in verdict.rule))
    return Row(comparison.name, tests, alarms, _nearest(meaning), _nearest(precision))


def _nearest(verdicts: Iterable[Verdict]) -> Verdict:
    return max(verdicts, key=lambda verdict: verdict.ratio)


if __name__ == "__main__":
    sys.exit(main())
