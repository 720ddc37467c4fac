"""python -m probly_flax.port: loads a safetensors file into a network of Flax, and writes an Orbax checkpoint."""

from __future__ import annotations

import argparse
import logging
import sys
from argparse import ArgumentTypeError
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp  # type: ignore[import-untyped]
from flax import nnx
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from probly_common.checks.weights import check_has_values
from probly_common.commands import build, check_new, fail, name_of_model, new_folder, plain_warnings, renamed, steps
from probly_flax.weights import Inventory, load_weights

MAX_ROWS = 40
SPELLINGS = {
    "rename={'a': 'b'}": "--rename a=b",
    "ignore=['a']": "--ignore a",
    "cast=True": "--cast",
    "flatten={'a': (3, 5, 7)}": "--flatten a=3,5,7, and flatten={} is --no-flatten",
    "check_options=False": "--no-check-options",
    "strict=False": "--not-strict",
    "jax.enable_x64(True)": "JAX_ENABLE_X64=1 python -m probly_flax.port ...",
}
RESTORE = """\
import orbax.checkpoint as ocp
from flax import nnx
from {module} import {first}

model = {call}
state = nnx.state(model, nnx.Not(nnx.RngState))
nnx.update(model, ocp.StandardCheckpointer().restore({path!r}, state))"""


class Row(NamedTuple):
    """One weight: its name in torch, its path in Flax, and its value; or none where the file had none for it."""

    name: str
    path: str
    value: jax.Array
    loaded: bool


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0 if everything matched, 1 if not, 2 for arguments that cannot be used."""
    parser = _parser()
    args = parser.parse_args(argv)
    module, name = args.into
    try:
        check_new(args.out)
        if not args.weights.is_file():
            raise ArgumentTypeError(
                f"weights expects a safetensors file; got {args.weights}, which is none. In torch, "
                f"save_weights(model, path) writes it."
            )
        model, call = build("--into", module, name, nnx.Module, rngs=(nnx.Rngs(0), "nnx.Rngs(0)"))
    except ArgumentTypeError as error:
        parser.error(str(error))
    logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax describes how it works
    try:
        with new_folder(args.out) as folder, steps("Reading the weights", "Writing", "Restoring") as go_on:
            rows = _load(model, args)
            state = nnx.state(model, nnx.Not(nnx.RngState))
            values = {".".join(map(str, path)): value.get_value() for path, value in nnx.to_flat_state(state)}
            check_has_values("port", [path for path, v in values.items() if isinstance(v, jax.ShapeDtypeStruct)])
            go_on()
            with ocp.StandardCheckpointer() as checkpointer:
                checkpointer.save(folder, state)
                checkpointer.wait_until_finished()
                go_on()
                _check_equal(state, checkpointer.restore(folder, state))
    except (OSError, TypeError, ValueError) as error:
        return fail(error, SPELLINGS)
    _print_table(rows)
    code = RESTORE.format(module=module, first=name.partition(".")[0], call=call, path=str(args.out.absolute()))
    print(f"Wrote {args.out}, and restored it: every bit is the same. To restore it:\n\n{code}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m probly_flax.port",
        description="Loads weights of torch into a network of Flax, and writes them as an Orbax checkpoint.",
    )
    add = parser.add_argument
    add("weights", type=Path, help="safetensors file, by save_weights(model, path) or any other with torch's names")
    add(
        "--into",
        type=name_of_model,
        required=True,
        metavar="MODULE:NAME",
        help="function or class that makes the nnx.Module; without arguments, or with rngs",
    )
    add("--out", type=Path, required=True, help="folder of the checkpoint, which is not there yet")
    add(
        "--rename",
        type=renamed,
        action="append",
        default=[],
        metavar="PATTERN=REPLACEMENT",
        help="regular expression, and what replaces it in the names of the file; the last = divides them; repeatable",
    )
    add("--ignore", action="append", default=[], metavar="PATTERN", help="of names to leave as they are; repeatable")
    add("--cast", action="store_true", help="convert floating-point numbers to the dtypes of the network")
    add(
        "--flatten",
        type=_flattened,
        action="append",
        metavar="LAYER=CHANNELS,HEIGHT,WIDTH",
        help="shape of a convolution that a Linear layer reads flattened, such as fc1=64,7,7; repeatable",
    )
    add("--no-flatten", dest="flatten", action="store_const", const=[], help="no layer reads a flattened convolution")
    add("--no-check-options", action="store_true", help="do not compare the options of layers that the file records")
    add("--not-strict", action="store_true", help="names that only one side has stay as they are, with a warning")
    return parser


def _flattened(text: str) -> tuple[str, tuple[int, ...]]:
    layer, _, sizes = text.rpartition("=")
    if not all(size.isdecimal() for size in sizes.split(",")):
        raise ArgumentTypeError(f"expects LAYER=CHANNELS,HEIGHT,WIDTH; got {text!r}. Pass fc1=64,7,7.")
    return layer, tuple(map(int, sizes.split(",")))


def _load(model: nnx.Module, args: argparse.Namespace) -> list[Row]:
    partial = bool(args.ignore or args.not_strict)
    before = [variable.get_value() for _, variable in _variables(model)] if partial else []
    with plain_warnings():
        load_weights(
            model,
            args.weights,
            strict=not args.not_strict,
            rename=dict(args.rename),
            ignore=args.ignore,
            cast=args.cast,
            flatten=None if args.flatten is None else dict(args.flatten),
            check_options=not args.no_check_options,
        )
    kept = set(map(id, before))
    paths = {id(variable): ".".join(map(str, path)) for path, variable in _variables(model)}
    return [
        Row(name, paths[id(variable)], variable.get_value(), id(variable.get_value()) not in kept)
        for name, weight in Inventory(model).weights("port").items()
        for variable in weight.variables
    ]


def _variables(model: nnx.Module) -> list[tuple[Any, nnx.Variable]]:
    return list(nnx.to_flat_state(nnx.state(model)))


def _check_equal(written: nnx.State, restored: nnx.State) -> None:
    differ = [
        ".".join(map(str, path))
        for (path, ours), (_, theirs) in zip(nnx.to_flat_state(written), nnx.to_flat_state(restored), strict=True)
        if ours.dtype != theirs.dtype
        or ours.shape != theirs.shape
        or np.asarray(ours.get_value()).tobytes() != np.asarray(theirs.get_value()).tobytes()
    ]
    if differ:
        raise ValueError(
            f"--out expects Orbax to restore what it wrote; got other bits for {', '.join(differ[:20])}, and kept "
            f"nothing. Write the state with another library: nnx.to_pure_dict(nnx.state(model))."
        )


def _print_table(rows: Sequence[Row]) -> None:
    table = Table(box=box.SIMPLE_HEAD)
    for header in ("name in torch", "path in Flax", "shape in Flax", "dtype"):
        table.add_column(header)
    table.add_column("bytes", justify="right")
    for row in rows[:MAX_ROWS]:
        path = row.path if row.loaded else f"{row.path} (left as it was)"
        cells = row.name, path, str(row.value.shape), str(row.value.dtype), f"{row.value.nbytes:,}"
        table.add_row(*map(escape, cells))
    if len(rows) > MAX_ROWS:
        table.add_row(f"and {len(rows) - MAX_ROWS} more")
    values = {id(row.value): row.value for row in rows if row.loaded}.values()  # tied ones once
    table.add_section()
    table.add_row("loaded", f"{len(values):,} arrays", "", "", f"{sum(value.nbytes for value in values):,}")
    Console(width=120).print(table)  # whole in a file too, for which rich takes a width of 80


if __name__ == "__main__":
    sys.exit(main())
