"""python -m parity_tests compare: whether a network of torch and one of Flax are the same function."""

from __future__ import annotations

import argparse
import json
import sys
from argparse import ArgumentTypeError
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from flax import nnx
from torch import nn

import probly_flax
import probly_torch
from parity_tests import Integers, compare
from parity_tests.kit.render import SUFFIXES, check_path
from parity_tests.standard import UNIT_ROUNDOFF
from probly_common.commands import build, fail, find_model, name_of_model, parameters_of, plain_warnings, renamed

SPELLINGS = {
    "rename={'a': 'b'}": "--rename a=b",
    "flatten={'a': (3, 5, 7)}": "--flatten a=3,5,7, and flatten={} is --no-flatten",
    "known_gaps={'a': 'why'}": "--known-gap a=why",
    "weights='own'": "--own-weights",
    "weights='random'": "--random-weights",
    "channels_last=False": "--no-channels-last",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0 on parity, 1 on none, 2 for arguments that cannot be used."""
    parser, compare_parser = _parsers()
    args = parser.parse_args(argv)
    try:
        if args.weights is not None and not args.weights.is_file():
            raise ArgumentTypeError(
                f"--weights expects a safetensors file; got {args.weights}, which is none. save_weights(model, path) "
                f"writes it."
            )
        torch_module = _build("torch", args.torch, nn.Module, args.torch_args)
        flax_module = _build("flax", args.flax, nnx.Module, args.flax_args, rngs=(nnx.Rngs(0), "nnx.Rngs(0)"))
    except ArgumentTypeError as error:
        compare_parser.error(str(error))
    same = ("mode", "dtype", "gradients", "exact", "jit", "limit", "seeds", "channels_last")
    options = {name: getattr(args, name) for name in same} | {
        "weights": args.weights_of_flax,
        "rename": dict(args.rename),
        "flatten": args.flatten if args.flatten is None else dict(args.flatten),
        "known_gaps": dict(args.known_gap),
    }
    try:
        with plain_warnings(), _progress() as progress:
            if args.weights is not None:
                progress(f"Loading {args.weights}")
                probly_torch.load_weights(torch_module, args.weights)
                if args.weights_of_flax == "own":
                    names = {name: options[name] for name in ("rename", "flatten")}
                    probly_flax.load_weights(flax_module, args.weights, **names)
            report = compare(torch_module, flax_module, *args.input, layers=True, progress=progress, **options)
    except (OSError, TypeError, ValueError) as error:
        fail(error, SPELLINGS)
        return 2
    report.print()
    for path in args.report:
        report.save(path)
        print(f"Wrote {path}.")
    return 0 if report else 1


def _parsers() -> tuple[argparse.ArgumentParser, argparse.ArgumentParser]:
    parser = argparse.ArgumentParser(prog="python -m parity_tests", description="The parity kit.")
    compare_parser = parser.add_subparsers(required=True).add_parser(
        "compare",
        help="two models",
        description="Compares outputs, gradients and statistics of a torch and a Flax model, and names the first layer "
        "that differs, and why. The exit status is 0 on parity, 1 on none, 2 for arguments that cannot be used.",
    )
    add = compare_parser.add_argument
    for framework, kind, given in ("torch", "torch.nn.Module", ""), ("flax", "nnx.Module", ", or with rngs,"):
        named = f"the {kind}, or a function or class that makes it, without arguments{given} but those of"
        add(
            framework,
            type=name_of_model,
            metavar=f"{framework.upper()}_MODULE:NAME",
            help=f"{named} --{framework}-args",
        )
    add(
        "--input",
        type=_input,
        action="append",
        required=True,
        metavar="SIZES[:HIGH]",
        help="shape of an input in torch's layout, such as 8,3,32,32; 8,16:1000 for integers below 1000; repeatable",
    )
    add("--weights", type=Path, metavar="FILE", help="safetensors file, for both")
    of_flax = compare_parser.add_mutually_exclusive_group()
    for flag, value, what in (
        ("--own-weights", "own", "leave Flax its own weights, or those it loads itself; torch's are copied otherwise"),
        ("--random-weights", "random", "draw new weights for both"),
    ):
        of_flax.add_argument(flag, dest="weights_of_flax", action="store_const", const=value, default="copy", help=what)
    add(
        "--report",
        type=_report,
        action="append",
        default=[],
        metavar="FILE",
        help=f"file to write, which ends in {', '.join(SUFFIXES)}; repeatable",
    )
    add("--mode", choices=("eval", "train"), default="eval")
    add("--dtype", choices=tuple(UNIT_ROUNDOFF), default="float32", help="whose precision is judged, beside float64")
    add("--no-gradients", dest="gradients", action="store_false", help="compare outputs and statistics only")
    add("--exact", action="store_const", const=True, help="demand the exact tier, which is for linear operations")
    add("--no-jit", dest="jit", action="store_false", help="run Flax op by op")
    add(
        "--torch-args",
        type=_arguments,
        default={},
        metavar="JSON",
        help="""keyword arguments, such as '{"width": 8}'""",
    )
    add("--flax-args", type=_arguments, default={}, metavar="JSON", help="the same of the Flax model")
    add(
        "--rename",
        type=renamed,
        action="append",
        default=[],
        metavar="PATTERN=REPLACEMENT",
        help="regular expression, and what replaces it in torch's names; the last = divides them; repeatable",
    )
    add(
        "--flatten",
        type=_flattened,
        action="append",
        metavar="LAYER=CHANNELS,HEIGHT,WIDTH",
        help="shape of a convolution that a Linear layer reads flattened, such as fc1=64,7,7; repeatable",
    )
    add("--no-flatten", dest="flatten", action="store_const", const=[], help="no layer reads a flattened convolution")
    add("--channels-last", action=argparse.BooleanOptionalAction, help="whether Flax takes images as (N, ..., C)")
    add(
        "--known-gap",
        type=_gap,
        action="append",
        default=[],
        metavar="NAME=REASON",
        help="tensors that differ; repeatable",
    )
    add("--limit", type=float, default=1.0, metavar="FACTOR", help="tightens all limits, such as 0.5")
    add("--seeds", type=int, metavar="COUNT", help="how many times inputs are drawn")
    return parser, compare_parser


def _build(framework: str, target: tuple[str, str], kind: type, given: Mapping[str, Any], **options: Any) -> Any:
    if given:
        known = [parameter.name for parameter in parameters_of(find_model(framework, *target))]
        unknown = [name for name in given if name not in known]
        if unknown:
            raise ArgumentTypeError(
                f"--{framework}-args expects arguments of {':'.join(target)}; got {', '.join(unknown)}, where it has "
                f"{', '.join(known) or 'none'}. Write a function: def build(): return Network(...)."
            )
    options |= {name: (value, repr(value)) for name, value in given.items()}
    return build(framework, *target, kind, **options)[0]


def _input(text: str) -> tuple[int, ...] | Integers:
    sizes, colon, high = text.partition(":")
    numbers = [*sizes.split(","), *([high] if colon else [])]
    if not all(number.isdecimal() and int(number) for number in numbers):
        raise ArgumentTypeError(
            f"expects sizes above 0 with commas between; got {text!r}. Pass 8,3,32,32; for integers below 1000, "
            f"8,16:1000."
        )
    shape = tuple(map(int, sizes.split(",")))
    return Integers(shape, int(high)) if colon else shape


def _report(text: str) -> Path:
    try:
        return check_path("it", text)
    except ValueError as error:
        raise ArgumentTypeError(str(error).removeprefix("it ")) from None


def _arguments(text: str) -> dict[str, Any]:
    try:
        arguments = json.loads(text)
    except ValueError:
        arguments = None
    if not isinstance(arguments, dict):
        raise ArgumentTypeError(f"""expects an object of JSON; got {text!r}. Pass '{{"width": 8}}'.""")
    return arguments


def _flattened(text: str) -> tuple[str, tuple[int, ...]]:
    layer, _, sizes = text.rpartition("=")
    if not layer or not all(size.isdecimal() for size in sizes.split(",")):
        raise ArgumentTypeError(f"expects LAYER=CHANNELS,HEIGHT,WIDTH; got {text!r}. Pass fc1=64,7,7.")
    return layer, tuple(map(int, sizes.split(",")))


def _gap(text: str) -> tuple[str, str]:
    name, _, reason = text.partition("=")
    if not name or not reason:
        raise ArgumentTypeError(
            f"expects NAME=REASON; got {text!r}. Pass 'norm.running_var=Flax keeps the biased one'."
        )
    return name, reason


@contextmanager
def _progress() -> Iterator[Callable[[str], None]]:
    """Shows a line on stderr, where that is a terminal. A call says what goes on."""
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    columns = SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("Comparing", total=None)
        yield lambda step: progress.update(task, description=step)


if __name__ == "__main__":
    sys.exit(main())
