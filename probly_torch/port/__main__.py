"""python -m probly_torch.port: writes the twin of a torch network, as source and weights, and proves what it wrote."""

from __future__ import annotations

import argparse
import copy
import runpy
import sys
from argparse import ArgumentTypeError
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from probly_common.commands import (
    build,
    check_installed,
    check_new,
    fail,
    name_of_model,
    new_folder,
    plain_warnings,
    steps,
)
from probly_common.standard import TRAJECTORY_LIMIT, precision_limit
from probly_torch.port import _twin
from probly_torch.port._proof import Twin, _leaves, _tensors, _values, prove
from probly_torch.weights import load_weights, save_weights, view_of

SEEDS = 3  # how many inputs are compared; the network was traced on the first
SOURCE, WEIGHTS = "model.py", "weights.safetensors"
USE = """\
{wide}import jax.numpy as jnp
from flax import nnx
from model import {name}  # {source}
from probly_flax import load_weights

model = {make}
# Where the twin flattens an image, it does so in torch's order.
load_weights(model, {weights!r}, flatten={{}}{rename})
model.eval()
outputs = model({inputs})"""
WIDE = """\
import jax

jax.config.update("jax_enable_x64", True)

"""


class Row(NamedTuple):
    """An output: how far torch and the twin are from torch in float64, in roundings at its scale; and the limit."""

    shape: tuple[int, ...]
    dtype: str
    torch: float
    twin: float
    limit: float


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0 if everything matched, 1 if not, 2 for arguments that cannot be used."""
    parser = _parser()
    args = parser.parse_args(argv)
    module, name = args.network
    try:
        check_installed("flax")
        check_new(args.out)
        if args.weights is not None and not args.weights.is_file():
            raise ArgumentTypeError(
                f"--weights expects a safetensors file; got {args.weights}, which is none. save_weights(model, path) "
                f"writes it."
            )
        network: nn.Module = build("network", module, name, nn.Module)[0].cpu().eval()
        draws = [_draw(network, args.input, seed) for seed in range(SEEDS)]
        _try(network, draws[0], args.input)
    except ArgumentTypeError as error:
        parser.error(str(error))
    try:
        with new_folder(args.out) as folder:
            twin, rows, is_random = _write(network, args.weights, draws, folder)
            exceeded = [
                f"output {i}, {row.twin:.3g} roundings off, where {row.limit:.3g} are rounding"
                for i, row in enumerate(rows)
                if not row.twin <= row.limit
            ]
            if exceeded:
                raise ValueError(
                    f"port expects the files to compute what the network does; got {'; '.join(exceeded)}. Look at the "
                    f"twin before it is written: port(network, x)."
                )
    except (OSError, TypeError, ValueError) as error:
        return fail(error, {})
    _print_table(rows)
    print(f"Wrote {args.out / SOURCE} and {args.out / WEIGHTS}. To use them:\n")
    print(_use(network, twin, is_random, args.out))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m probly_torch.port",
        description="Writes the twin of a torch network in Flax NNX, source and weights, and proves that it is one.",
    )
    add = parser.add_argument
    network_help = "function or class without arguments that makes the torch.nn.Module"
    add("network", type=name_of_model, metavar="MODULE:NAME", help=network_help)
    add(
        "--input",
        type=_input,
        action="append",
        required=True,
        metavar="[int:|bool:]SIZES",
        help="shape of an input, such as 1,3,224,224; int:1,16 for integers; once for each argument of the forward",
    )
    add("--weights", type=Path, help="safetensors file to load before, all of it")
    add("--out", type=Path, required=True, help=f"folder of {SOURCE} and {WEIGHTS}, which is not there yet")
    return parser


def _input(text: str) -> tuple[str, tuple[int, ...]]:
    kind, _, sizes = text.rpartition(":")
    if kind not in ("", "int", "bool") or not all(size.isdecimal() and int(size) for size in sizes.split(",")):
        raise ArgumentTypeError(
            f"expects sizes above 0 with commas between; got {text!r}. Pass 1,3,224,224; or int:1,16 for integers."
        )
    return kind, tuple(map(int, sizes.split(",")))


def _draw(network: nn.Module, inputs: Sequence[tuple[str, tuple[int, ...]]], seed: int) -> tuple[Tensor, ...]:
    """Draws random inputs, and integers that every embedding takes."""
    generator = torch.Generator().manual_seed(seed)
    high = min((m.num_embeddings for m in network.modules() if isinstance(m, nn.Embedding)), default=2)
    floating = (value.dtype for value in network.parameters() if value.is_floating_point())
    dtype = next(floating, torch.get_default_dtype())
    draw: dict[str, Callable[[tuple[int, ...]], Tensor]] = {
        "": lambda sizes: torch.randn(sizes, generator=generator, dtype=torch.float64).to(dtype),
        "int": lambda sizes: torch.randint(high, sizes, generator=generator),
        "bool": lambda sizes: torch.randint(2, sizes, generator=generator).bool(),
    }
    return tuple(draw[kind](sizes) for kind, sizes in inputs)


def _try(network: nn.Module, inputs: tuple[Tensor, ...], given: Sequence[tuple[str, tuple[int, ...]]]) -> None:
    try:
        _run(network, inputs)
    except Exception as error:
        shapes = ", ".join(f"{kind or 'float'} {sizes}" for kind, sizes in given)
        raise ArgumentTypeError(
            f"--input expects the shapes that the forward takes, one for each argument; got {shapes}, for which torch "
            f"raises {type(error).__name__}: {str(error)[:500]}. Integers are --input int:1,16."
        ) from None


def _run(network: nn.Module, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    with torch.no_grad():
        return _tensors(network(*(x.clone() for x in inputs)))


def _write(
    network: nn.Module, weights: Path | None, draws: Sequence[tuple[Tensor, ...]], folder: Path
) -> tuple[Twin, list[Row], bool]:
    """Writes source and weights, and compares what was written.

    The last value tells whether the twin draws random numbers.
    """
    with steps("Loading", "Writing the source", "Comparing in float64", "Writing", "Comparing the files") as go_on:
        if weights is not None:
            with plain_warnings():
                load_weights(network, weights)
        go_on()
        twin = _twin("port", network, draws[0])
        go_on()
        prove(network, twin)
        go_on()
        folder.mkdir()
        (folder / SOURCE).write_text(twin.source, encoding="utf-8")
        save_weights(network, folder / WEIGHTS)
        go_on()
        return twin, *_compare(network, twin, draws, folder)


def _compare(
    network: nn.Module, twin: Twin, draws: Sequence[tuple[Tensor, ...]], folder: Path
) -> tuple[list[Row], bool]:
    """Builds the model anew from the files, and runs it on every draw of inputs."""
    import jax
    from flax import nnx

    from probly_flax.weights import load_weights

    with jax.enable_x64(jax.config.read("jax_enable_x64") or _is_wide(network)):
        twin_class = runpy.run_path(str(folder / SOURCE))[twin.name]
        model = nnx.eval_shape(lambda: twin_class(rngs=nnx.Rngs(0)))  # every value has to come from the file
        streams = nnx.jit(lambda: nnx.state(twin_class(rngs=nnx.Rngs(0)), nnx.RngState))()
        nnx.update(model, streams)  # but for these
        load_weights(model, folder / WEIGHTS, flatten={}, rename=twin.rename)
        model.eval()
        forward = nnx.jit(lambda model, *inputs: model(*inputs))
        order = [value.order for value in twin.args]
        got = [
            _leaves(forward(model, *(view_of(x).transpose(axes) for x, axes in zip(inputs, order, strict=True))))
            for inputs in draws
        ]
    double = copy.deepcopy(network).double()
    exact = [_run(double, tuple(x.double() if x.is_floating_point() else x for x in inputs)) for inputs in draws]
    ours = [_run(network, inputs) for inputs in draws]
    rows = []
    for i, value in enumerate(_values(twin.outputs)):
        reference, torchs, flaxs = ([_array(run[i]) for run in runs] for runs in (exact, ours, got))
        reference, torchs = ([array.transpose(value.order) for array in runs] for runs in (reference, torchs))
        dtype = ours[0][i].dtype
        unit = torch.finfo(dtype).eps / 2 if dtype.is_floating_point else 0.0
        noise, off = (max(map(_distance, runs, reference)) / (unit or 1) for runs in (torchs, flaxs))
        limit = TRAJECTORY_LIMIT / unit if dtype == torch.float64 else precision_limit(noise) if unit else 0.0
        rows.append(Row(flaxs[0].shape, str(dtype).removeprefix("torch."), noise, off, limit))
    return rows, bool(streams)


def _is_wide(network: nn.Module) -> bool:
    """Tells whether the network has 64-bit weights, which JAX keeps only if it is told to."""
    return any(
        value.dtype in (torch.float64, torch.int64)
        for name, value in network.state_dict().items()
        if isinstance(value, Tensor) and name.rpartition(".")[2] != "num_batches_tracked"
    )


def _array(values: Any) -> np.ndarray:
    return np.asarray(view_of(values) if isinstance(values, Tensor) else values).astype(np.float64)


def _distance(array: np.ndarray, reference: np.ndarray) -> float:
    """Measures the distance in units of the largest finite value.

    It is infinite for other shapes, and where only one is finite.
    """
    if array.shape != reference.shape:
        return float("inf")
    same = (array == reference) | np.isnan(array) & np.isnan(reference)
    with np.errstate(invalid="ignore"):
        largest = float(np.abs(np.where(same, 0, array - reference)).max(initial=0))
    scale = float(np.abs(reference[np.isfinite(reference)]).max(initial=0))
    return 0.0 if same.all() else largest / scale if scale > 0 and np.isfinite(largest) else float("inf")


def _print_table(rows: Sequence[Row]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD)
    for header in ("output", "shape in Flax", "dtype"):
        table.add_column(header)
    for header in ("torch\nis off by", "the twin\nis off by", "at most"):
        table.add_column(header, justify="right")
    for i, row in enumerate(rows):
        numbers = (f"{number:.3g}" for number in (row.torch, row.twin, row.limit))
        table.add_row(str(i), str(row.shape), row.dtype, *numbers)
    Console(width=120).print(table)  # whole in a file too, for which rich takes a width of 80
    print(f"Off from torch in float64, in roundings of the dtype at the output's scale, at most over {SEEDS} inputs.")
    print("Before, both agreed in float64 on the first input, as port(network, x) demands.\n")


def _use(network: nn.Module, twin: Twin, is_random: bool, out: Path) -> str:
    make = f"{twin.name}(rngs=nnx.Rngs(0))"
    if not is_random:
        make = f"nnx.eval_shape(lambda: {make})  # saves the time to draw weights"
    inputs = (value.example.permute(value.order) for value in twin.args)
    return USE.format(
        name=twin.name,
        source=out / SOURCE,
        weights=str(out / WEIGHTS),
        rename=f", rename={twin.rename}" if twin.rename else "",
        make=make,
        wide=WIDE if _is_wide(network) else "",
        inputs=", ".join(f'jnp.ones({tuple(x.shape)}, "{view_of(x).dtype}")' for x in inputs),
    )


if __name__ == "__main__":
    sys.exit(main())
