"""Serves the command lines: models by name, the folder that is written, and what is said when it fails."""

from __future__ import annotations

import importlib
import inspect
import os
import shutil
import sys
import warnings
from argparse import ArgumentTypeError
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import reduce
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from uuid import uuid4

from probly_common.checks.values import type_name


def name_of_model(text: str) -> tuple[str, str]:
    """Splits an argument MODULE:NAME into its two parts."""
    module, _, name = text.partition(":")
    if not all(part.isidentifier() for path in (module, name) for part in path.split(".")):
        raise ArgumentTypeError(f"expects MODULE:NAME; got {text!r}. Pass mypkg.model:build.")
    return module, name


def build(what: str, module: str, name: str, kind: type, /, **options: tuple[Any, str]) -> tuple[Any, str]:
    """Returns the model that a function or class makes, or that has this name, and the expression for it.

    A function is given those of the options, values and their source, that it has arguments for. Errors of the module
    and of the function are left as they are: their traceback names the line.
    """
    found = find_model(what, module, name)
    if isinstance(found, kind):
        return found, name
    if not callable(found):
        raise ArgumentTypeError(
            f"{what} expects a function or class that makes a {kind.__module__.partition('.')[0]} module; got "
            f"{module}:{name}, which is {type_name(found)}. Write one: def build(): return Network(...)."
        )
    parameters = parameters_of(found)
    asked = [p.name for p in parameters if p.name in options]
    needed = [p.name for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    other = [argument for argument in needed if argument not in options]
    if other:
        call = f"{name}({', '.join(f'{argument}=...' for argument in needed)})"
        takes = f"no arguments except {', '.join(options)}" if options else "no arguments"
        raise ArgumentTypeError(
            f"{what} expects a function or class that takes {takes}; got {module}:{name}, which needs "
            f"{', '.join(other)}. Write one: def build(): return {call}."
        )
    model = found(**{argument: options[argument][0] for argument in asked})
    if not isinstance(model, kind):
        raise ArgumentTypeError(
            f"{what} expects a function that returns a {kind.__module__.partition('.')[0]} module; got "
            f"{module}:{name}, which returns {type_name(model)}. Let it return the model."
        )
    return model, f"{name}({', '.join(f'{argument}={options[argument][1]}' for argument in asked)})"


def check_new(path: Path) -> None:
    """Refuses to write to a folder that has something in it."""
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise ArgumentTypeError(
            f"--out expects a folder that is not there yet, since nothing is overwritten; got {path}. Remove it, or "
            f"pass another: --out {path}_2."
        )


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yields a path to make a folder at.

    It is moved into place once all of it is there; or nothing is left.
    """
    path = path.absolute()
    parent = next(folder for folder in path.parents if folder.is_dir())
    temporary = parent / f".{uuid4().hex}"
    temporary.mkdir()
    try:
        yield temporary / path.name
        path.parent.mkdir(parents=True, exist_ok=True)
        os.replace(temporary / path.name, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def check_installed(package: str) -> None:
    if find_spec(package) is None:
        raise ArgumentTypeError(
            f"port expects {package}, to run what it writes; got none. Install it: pip install {package}."
        )


@contextmanager
def steps(*names: str) -> Iterator[Callable[[], None]]:
    """Shows a bar on stderr, where that is a terminal. It is at the first step, and each call goes on to the next."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    console, rest = Console(stderr=True), iter(names)
    columns = SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(next(rest), total=len(names))
        yield lambda: progress.update(task, advance=1, description=next(rest))


@contextmanager
def plain_warnings() -> Iterator[None]:
    """Prints warnings of the library as lines on stderr."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        yield
    for warning in caught:
        print(f"warning: {warning.message}", file=sys.stderr)


def fail(error: Exception, spellings: Mapping[str, str]) -> int:
    """Says on stderr what went wrong, and how the options that this names are spelled here; returns the exit status."""
    spelled = [f"{option} is {here}" for option, here in spellings.items() if option.split("=")[0] in str(error)]
    note = f"As options of this command: {'; '.join(spelled)}."
    print("\n".join([f"error: {error}", *([note] if spelled else [])]), file=sys.stderr)
    return 1


def find_model(what: str, module: str, name: str) -> Any:
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if not f"{module}.".startswith(f"{error.name}."):  # one that the module itself imports
            raise
        raise ArgumentTypeError(
            f"{what} expects a module that can be imported; got {module}: {error}. Run the command in the folder that "
            f"holds {module.partition('.')[0]}, or install it."
        ) from None
    try:
        return reduce(getattr, name.split("."), found)
    except AttributeError as error:
        raise ArgumentTypeError(
            f"{what} expects the name of a function, class or model in {module}; got {name!r}: {error}. Pass one "
            f"that it has: {', '.join(_functions(found)) or 'none'}."
        ) from None


def parameters_of(function: Any) -> list[inspect.Parameter]:
    is_class = inspect.isclass(function)  # whose own signature may be that of its metaclass
    try:
        return list(inspect.signature(function.__init__ if is_class else function).parameters.values())[is_class:]
    except ValueError:  # of some that are not written in Python
        return []


def _functions(module: Any) -> list[str]:
    """Lists what a module defines itself, at most 20."""
    own = (n for n, item in vars(module).items() if getattr(item, "__module__", None) == module.__name__)
    return [name for name in own if not name.startswith("_")][:20]


def renamed(text: str) -> tuple[str, str]:
    """Splits a rule into a regular expression, and what replaces it."""
    pattern, divides, replacement = text.rpartition("=")
    if not divides:
        raise ArgumentTypeError(f"expects PATTERN=REPLACEMENT; got {text!r}. Pass '^module\\.='.")
    return pattern, replacement
