"""Checks of numbers, seeds and types, and the words of sentences.

Every sentence is "what expects requirement, with names and numbers; got value. Next step, as code."
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable[..., Any])

MAX_SEED = 2**32


def index(value: Any) -> int | None:
    """Returns the integer that `value` stands for, or None when it is not one (a bool is not)."""
    try:
        return None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        return None


def type_name(value: Any) -> str:
    return type(value).__name__


def dtype_name(dtype: Any) -> str:
    """Returns the name that NumPy has for a dtype of torch or JAX."""
    return str(dtype).removeprefix("torch.")


def is_integer(dtype: Any) -> bool:
    return dtype_name(dtype).startswith(("int", "uint"))


def is_floating(dtype: Any) -> bool:
    return dtype_name(dtype).startswith(("float", "bfloat"))


def check_num_members(what: str, num_members: Any) -> int:
    count = index(num_members)
    requirement = f"{what} expects num_members to be an integer of at least 1"
    if count is None:
        raise TypeError(f"{requirement}; got {num_members!r} ({type_name(num_members)}). Pass num_members=4.")
    if count < 1:
        raise ValueError(f"{requirement}; got {count}. Pass num_members=4.")
    return count


def check_seed(what: str, rngs: Any) -> int:
    """Raises unless the seed is an int of the 32 bits that every JAX configuration keeps, and returns it."""
    seed = index(rngs)
    if seed is None:
        raise TypeError(
            f"{what} expects rngs to be an int seed or an Rngs; got {type_name(rngs)}. Pass a seed, rngs=0, or Rngs(0)."
        )
    if not 0 <= seed < MAX_SEED:
        raise ValueError(
            f"{what} expects a seed from 0 to 2**32 - 1 (JAX drops the other bits unless jax_enable_x64 is set); "
            f"got {seed}. Pass {seed % MAX_SEED}, its low 32 bits."
        )
    return seed


def check_module(what: str, name: str, value: Any, expected: type) -> None:
    if not isinstance(value, expected):
        raise TypeError(
            f"{what} expects {name} to be a {expected.__name__}; got {type_name(value)}. Pass a network, as in "
            f"{what}(network, ...)."
        )


def shown(text: str, width: int = 100) -> str:
    """Returns text of a file as part of a sentence."""
    if len(text) > width:
        text = f"{text[: width // 2]}...{text[-width // 2 :]}"
    return text if re.fullmatch(r"[\w.-]+", text, re.ASCII) else ascii(text)


def as_arguments(example_input: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Returns an example input as the arguments of a call: a batch, a tuple of arguments, or a dict of them by name."""
    if isinstance(example_input, dict):
        return (), example_input
    return (example_input if isinstance(example_input, tuple) else (example_input,)), {}
