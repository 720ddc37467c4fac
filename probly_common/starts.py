"""How members start: what a rule is called with, and whether a network started by it, too."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import numpy as np

# What a report says of parameters that no layer's own rule starts.
CONSTRUCTOR, REGISTERED, RESET = "constructor", "register_reset", "reset"
DRAWN, CONSTANT, FROZEN, KEPT = "mean and spread", "constant kept", "frozen, kept", "kept"
_AS_MEANT = (REGISTERED, DRAWN, CONSTANT, FROZEN, KEPT)

_SAMPLE = 2**16  # values of a parameter, which tell its spread to 2 %


def required_arguments(function: Callable[..., Any]) -> list[str]:
    """Lists the arguments without which a function cannot be called."""
    parameters = inspect.signature(function).parameters.values()
    return [p.name for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]


def apply_reset(reset: Callable[..., Any], name: str, parameter: Any, rngs: Any) -> Any:
    """Calls a rule of (parameter, rngs), or of (name, parameter, rngs)."""
    takes_name = len(required_arguments(reset)) == 3
    return reset(name, parameter, rngs) if takes_name else reset(parameter, rngs)


def starts_otherwise(rule: str, base: np.ndarray[Any, Any], new: np.ndarray[Any, Any]) -> bool:
    """Tells whether a parameter has another spread than a new one that its layer's rule drew.

    The logarithm of the ratio of two samples' spreads has a standard error, which follows from the spread of their
    squares. Six of these are chance, and more for few values, whose spread may be next to nothing: 21 / n lets one in
    10^9 draws of n values pass.
    """
    samples = [_sample(values) for values in (base, new)]
    n = samples[0].size
    if rule in _AS_MEANT or n < 4:
        return False
    spreads = [float(x.std()) if (x != x[0]).any() else 0.0 for x in samples]
    if not all(spreads):
        return any(spreads) or not np.isclose(samples[0][0], samples[1][0], rtol=1e-2)
    squares = [np.square((x - x.mean()) / spread) for x, spread in zip(samples, spreads, strict=True)]
    error = math.sqrt(max(2, *(x.var() for x in squares)) / (2 * n))  # 2 is a normal distribution's
    return abs(math.log(spreads[0] / spreads[1])) > 6 * error + 21 / n


def _sample(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    flat = values.ravel()
    if np.iscomplexobj(flat):
        flat = flat.view(flat.real.dtype)
    return flat[:: math.ceil(flat.size / _SAMPLE) or 1].astype(np.float64)
