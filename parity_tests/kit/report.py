"""The reports of both comparisons: what they hold, and what they say of it."""

from __future__ import annotations

import json
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from html import escape
from textwrap import fill
from typing import TYPE_CHECKING

from rich.console import Console, ConsoleOptions, Group, RenderableType
from rich.text import Text

from parity_tests.kit import render
from parity_tests.kit.judge import Comparison, Departure, Divergence, LayerComparison, TrainingStep

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class _Report(ABC):
    """What both reports do with what they hold."""

    comparisons: tuple[Comparison, ...]

    @property
    def passed(self) -> bool:
        """Tells whether every tensor holds."""
        return bool(self.comparisons) and all(comparison.holds for comparison in self.comparisons)

    @property
    @abstractmethod
    def verdict(self) -> str:
        """The last line."""

    def __bool__(self) -> bool:
        """Returns `passed`."""
        return self.passed

    def to_json(self) -> str:
        """Returns JSON of all that is in the report. What is infinite or NaN is a string: "inf", "nan".

        Example:
            >>> report = ParityReport("Net", "Net", "eval", "float32", jit=True, comparisons=())
            >>> json.loads(report.to_json())["verdict"]
            'No parity: nothing was compared.'
        """
        return json.dumps(render.data(self), indent=1, allow_nan=False)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the report: `parity.json`, `parity.html` (one file with a plot) or `parity.png` (the plot alone).

        The plot of `compare` shows the error of each layer, in forward order; that of `compare_training` the distances
        by step. It needs matplotlib.

        Args:
            path: its suffix decides. The file appears at once, whole.

        Raises:
            ValueError: if the suffix is another, or the folder is not there.

        Example:
            >>> import tempfile
            >>> report = ParityReport("Net", "Net", "eval", "float32", jit=True, comparisons=())
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     report.save(f"{folder}/parity.json")
            ...     os.listdir(folder)
            ['parity.json']
        """
        content = {
            ".json": lambda: self.to_json().encode(),
            ".html": lambda: render.html_page(self._title(), self._parts()).encode(),
            ".png": lambda: render.to_png(self._figure()),
        }
        render.save(f"{type(self).__name__}.save", path, content)

    @abstractmethod
    def _title(self) -> str: ...

    @abstractmethod
    def _parts(self) -> list[str]:
        """Returns what a page has below its title, as HTML."""

    @abstractmethod
    def _figure(self) -> Figure: ...


@dataclass(frozen=True)
class ParityReport(_Report):
    """The outcome of `compare`.

    Attributes:
        torch_name: the class of the torch model.
        flax_name: the class of the Flax model.
        mode: `eval` or `train`.
        dtype: the dtype whose precision was judged, beside the meaning in float64.
        jit: whether Flax ran under jax.jit.
        comparisons: every tensor.
        layers: every layer that both have, in torch's forward order.
        first_divergence: where the two part first; None if they do not, or if it could not be told.
        notes: what was left out and why: in which layout Flax took its inputs, why the exact tier does not apply.
    """

    torch_name: str
    flax_name: str
    mode: str
    dtype: str
    jit: bool
    comparisons: tuple[Comparison, ...]
    layers: tuple[LayerComparison, ...] = ()
    first_divergence: Divergence | None = None
    notes: tuple[str, ...] = field(default=())

    @property
    def verdict(self) -> str:
        """The last line."""
        count, known = len(self.comparisons), sum(map(render.is_known, self.comparisons))
        if self.passed:
            but = f"; {known} {'is' if known == 1 else 'are'} known to differ" if known else ""
            return f"Parity: {count - known} of {count} tensors agree{but}."
        if not count:
            return "No parity: nothing was compared."
        return f"No parity: {sum(not each.holds for each in self.comparisons)} of {count} tensors differ."

    def __str__(self) -> str:
        """Returns plain text of about 40 lines at most. Of many layers and tensors, those that differ come first."""
        return render.text(Group(*self._lines(short=True)))

    __repr__ = __str__

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        """Yields all lines."""
        return self._lines()

    def print(self) -> None:
        """Prints every layer and every tensor that differs, in colour where stdout is a terminal."""
        render.show(self)

    def _title(self) -> str:
        how = "under jax.jit" if self.jit else "op by op"
        return f"{self.torch_name} in torch and {self.flax_name} in Flax, {self.mode} mode, {self.dtype}, {how}"

    def _notes(self) -> list[str]:
        return [*self.notes, *render.known_gaps(self.comparisons)]

    def _lines(self, short: bool = False) -> Iterator[RenderableType]:
        yield Text(self._title(), "bold")
        yield from render.layers_and_tensors(self.layers, self.comparisons, short)
        yield Text()
        if self.first_divergence is not None:
            yield Text(f"First divergence: {self.first_divergence}", "bold")
        yield from (Text(f"Note: {note}") for note in self._notes())
        yield Text(self.verdict, "bold green" if self.passed else "bold red")

    def _parts(self) -> list[str]:
        first = self.first_divergence
        return [
            f'<p class="verdict">{escape(self.verdict)}</p>',
            f"<p>First divergence: <strong>{escape(str(first))}</strong></p>" if first else "",
            *(f"<p>Note: {escape(note)}</p>" for note in self._notes()),
            render.html_image(self._figure(), "error by depth"),
            *render.html_tables(self.layers, self.comparisons),
        ]

    def _figure(self) -> Figure:
        title = f"{self._title()}\n{self.verdict}"
        return render.errors_by_depth(title, self.layers, self.comparisons, self.first_divergence)


@dataclass(frozen=True)
class TrainingReport(_Report):
    """The outcome of `compare_training`.

    Attributes:
        torch_name: the class of the torch model.
        flax_name: the class of the Flax model.
        optimizer: the class of torch's optimizer.
        dtype: the dtype whose precision was judged, beside the meaning in float64.
        jit: whether Flax ran under jax.jit.
        steps: every step.
        comparisons: every tensor, at its worst step; its precision at the step in the middle.
        first_departure: where the two part first; None if they do not.
        notes: what was left out, and what else is to be known.
    """

    torch_name: str
    flax_name: str
    optimizer: str
    dtype: str
    jit: bool
    steps: tuple[TrainingStep, ...]
    comparisons: tuple[Comparison, ...]
    first_departure: Departure | None = None
    notes: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """Tells whether every tensor holds at every step."""
        return bool(self.steps) and super().passed

    @property
    def verdict(self) -> str:
        """The last line."""
        count, differ = len(self.comparisons), sum(not c.holds for c in self.comparisons)
        if self.passed:
            return f"Parity: all {count} tensors agree at all {len(self.steps)} steps."
        return f"No parity: {differ} of {count} tensors differ." if differ else "No parity: nothing was compared."

    def __str__(self) -> str:
        """Returns a line for each kind of tensor, the first departure, notes, and the verdict as the last line."""
        sentences = (fill(sentence, render.WIDTH) for sentence in self._sentences())
        return "\n".join([self._title(), "", *self._table(), "", *sentences, self.verdict])

    def _title(self) -> str:
        how = "under jax.jit" if self.jit else "op by op"
        return (
            f"{self.torch_name} in torch and {self.flax_name} in Flax, {len(self.steps)} steps of {self.optimizer}, "
            f"{self.dtype}, {how}"
        )

    def _table(self) -> Iterator[str]:
        yield f"{'kind':<10} {'agree':>9}   error, limit and their ratio, of the worst: in roundings at its scale"
        for kind in dict.fromkeys(comparison.kind for comparison in self.comparisons):
            known = [c for c in self.comparisons if c.kind == kind and c.gap is None]
            agree = f"{sum(c.holds for c in known)} of {len(known)}"
            if known:
                worst = max(known, key=lambda c: c.worst.ratio)
                v = worst.worst
                yield f"{kind:<10} {agree:>9}   {v.measured:.3g} / {v.limit:.3g} = {v.ratio:.2g}  {worst.name}"

    def _sentences(self) -> Iterator[str]:
        if self.steps:
            last = self.steps[-1]
            yield (
                f"On their own, torch and Flax are {last.distance:.1g} of the weights' scale apart after the last "
                f"step; torch and a twin that started one ULP away, {last.twin_distance:.1g}."
            )
        if self.first_departure is not None:
            yield f"First departure: {self.first_departure}"
        for c in self.comparisons:
            if c.gap is not None and c.holds:
                yield f"Note: {c.kind} of {c.name} is known to differ: {c.gap}"
            elif c.gap is not None:
                yield f"{c.name} agrees at every step. Remove it from known_gaps."
        yield from (f"Note: {note}" for note in self.notes)

    def _parts(self) -> list[str]:
        return [f"<pre>{escape(str(self))}</pre>", render.html_image(self._figure(), "error by step")]

    def _figure(self) -> Figure:
        return render.errors_by_step(f"{self._title()}\n{self.verdict}", self.steps, self.first_departure)
