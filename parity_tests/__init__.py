"""The parity kit: whether a torch model and a Flax model compute the same numbers."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from parity_tests.kit.compare import assert_parity as assert_parity
    from parity_tests.kit.compare import compare as compare
    from parity_tests.kit.inputs import Integers as Integers
    from parity_tests.kit.report import ParityReport as ParityReport
    from parity_tests.kit.report import TrainingReport as TrainingReport
    from parity_tests.kit.training import compare_training as compare_training

_HOMES = {
    "Integers": "kit.inputs",
    "ParityReport": "kit.report",
    "TrainingReport": "kit.report",
    "assert_parity": "kit.compare",
    "compare": "kit.compare",
    "compare_training": "kit.training",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    """Imports what is asked for: pytest imports this package at every start, by its plugin."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
