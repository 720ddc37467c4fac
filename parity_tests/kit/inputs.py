"""Inputs that two models are called with: the caller's arrays, or arrays drawn for the caller's shapes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from parity_tests.kit.trees import is_array, is_floating, leaves, mapped, numpy_of, rounded

SPECIAL = {  # a large value that float64 holds to the fifth power
    "zero": (0.0, -0.0),
    "infinity": (np.inf, -np.inf),
    "NaN": (np.nan,),
    "denormal": (1e-310, -1e-310),
    "large": (1e60, -1e60),
}


@dataclass(frozen=True)
class Integers:
    """Asks `compare` to draw integers, such as tokens.

    Args:
        shape: of the array.
        high: they are drawn from 0 to high - 1.

    Example:
        >>> Integers((8, 16), high=1000)
        Integers(shape=(8, 16), high=1000)
    """

    shape: tuple[int, ...]
    high: int

    def __post_init__(self) -> None:
        """Refuses what no integers could be drawn for."""
        if not _is_shape(self.shape) or not isinstance(self.high, int) or self.high < 1:
            raise ValueError(
                f"Integers expects a shape of positive integers and a bound of at least 1; got {self.shape!r} and "
                f"{self.high!r}. Pass Integers((8, 16), high=1000)."
            )


class Inputs:
    """The arguments of a call, which it can draw anew: floating ones representable in the lower dtype."""

    def __init__(self, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None, dtype: str) -> None:
        self.given = (args, dict(kwargs or {}))
        self.dtype = dtype
        if not args and not kwargs:
            raise ValueError(
                "compare expects inputs of the models: arrays, or shapes to draw them for; got none. Pass "
                "compare(torch_module, flax_module, (8, 3, 32, 32))."
            )
        self.is_drawn = any(_is_drawn(value) for value in (*args, *self.given[1].values()))

    def draw(self, seed: int) -> Any:
        """Draws (args, kwargs) as NumPy arrays.

        Floating ones are in float64, and standard normal where they are drawn.
        """
        rng = np.random.default_rng(seed)
        return self._replaced(lambda shape: self.rounded(np.asarray(rng.standard_normal(shape))), rng)

    def dyadic(self, seed: int, largest: int) -> Any:
        """Puts integers from -largest to largest in place of all floating values."""
        rng = np.random.default_rng(seed)

        def integers(shape: tuple[int, ...]) -> np.ndarray:
            return np.asarray(rng.integers(-largest, largest + 1, shape), np.float64)

        return mapped(self._replaced(integers, rng), lambda a: integers(a.shape) if is_floating(a) else a)

    def special(self) -> Iterator[tuple[str, Any]]:
        """Yields normal values with special ones strewn in, of one sort at a time, in float64."""
        for name, values in SPECIAL.items():
            rng = np.random.default_rng(0)

            def strewn(shape: tuple[int, ...], values: Any = values, rng: Any = rng) -> np.ndarray:
                array = rng.standard_normal(shape)
                places = rng.random(shape) < 1 / 16
                places.reshape(-1)[:: max(1, places.size // 3)] = True
                return np.where(places, rng.choice(values, shape), array)

            yield name, self._replaced(strewn, rng)

    def rounded(self, array: np.ndarray) -> np.ndarray:
        """Rounds to what the lower dtype holds."""
        return rounded(array, self.dtype)

    def _replaced(self, floating: Any, rng: np.random.Generator) -> Any:
        def value_of(value: Any) -> Any:
            if isinstance(value, Integers):
                return rng.integers(0, value.high, value.shape)
            return (
                floating(tuple(value))
                if _is_shape(value)
                else mapped(value, lambda array: self.rounded(numpy_of(array)))
            )

        args, kwargs = self.given
        return tuple(map(value_of, args)), {name: value_of(value) for name, value in kwargs.items()}


def _is_drawn(value: Any) -> bool:
    return isinstance(value, Integers) or _is_shape(value)


def _is_shape(value: Any) -> bool:
    """Tells whether it is a tuple or list of sizes. An empty one is an empty tree."""
    sizes = isinstance(value, tuple | list) and len(value) > 0
    return sizes and all(type(size) is int and size > 0 for size in value)


def check_inputs(what: str, inputs: Inputs) -> None:
    """Raises unless there is at least one array among them, and all of them are of numbers."""
    arrays = list(leaves(inputs.draw(0)))
    if not arrays:
        raise ValueError(
            f"{what} expects arrays among the inputs; got {inputs.given!s:.200}. Pass arrays or shapes: (8, 3, 32, 32)."
        )
    for name, array in arrays:
        if not is_array(array) or array.dtype.kind not in "fiub":
            raise TypeError(
                f"{what} expects inputs that are real numbers, integers or booleans; got {array.dtype} at inputs{name}."
                f" Convert it: array.astype(numpy.float32)."
            )
