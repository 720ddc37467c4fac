"""The findings of a comparison: tensor by tensor, layer by layer, and where the two part."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from parity_tests.standard import Verdict

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType

KINDS = ("weight", "output", "special value", "exact", "statistic", "input gradient", "parameter gradient")


@dataclass(frozen=True)
class Comparison:
    """One tensor under every rule that applies to it, and the place where the two differ most.

    Attributes:
        kind: one of `KINDS`.
        name: torch's name of a weight, gradient or statistic; `output`, or where it is in a tree: `output[0]['loss']`.
        verdicts: what each rule measured, and what it allows.
        index: where the two differ most in the dtype that is judged, in torch's layout.
        torch: torch's value there.
        flax: Flax's value there.
        ulp: the number of values that the dtype can represent between them.
        gap: why this tensor is known to differ, if it is.
    """

    kind: str
    name: str
    verdicts: tuple[Verdict, ...]
    index: tuple[int, ...] = ()
    torch: float = math.nan
    flax: float = math.nan
    ulp: float = 0.0
    gap: str | None = None

    @property
    def worst(self) -> Verdict:
        """The rule that is nearest to its limit, or furthest beyond it."""
        return max(self.verdicts, key=lambda verdict: verdict.ratio)

    @property
    def holds(self) -> bool:
        """Tells whether every rule holds. For a known gap, it tells whether one still does not."""
        return all(verdict.holds for verdict in self.verdicts) is (self.gap is None)


@dataclass(frozen=True)
class LayerComparison:
    """The outputs of a layer that both models have, at the same place, in forward order of torch.

    Attributes:
        path: torch's name of the layer; "" is the whole model.
        call: which of the layer's calls, from 0.
        torch_type: the class in torch.
        flax_type: the class in Flax.
        inputs_agree: whether what the two were called with agrees, as far as it could be matched.
        verdicts: of its outputs, under the rules of bounded comparison.
    """

    path: str
    call: int
    torch_type: str
    flax_type: str
    inputs_agree: bool
    verdicts: tuple[Verdict, ...]

    @property
    def worst(self) -> Verdict:
        """The rule that is nearest to its limit, or furthest beyond it."""
        return max(self.verdicts, key=lambda verdict: verdict.ratio)

    @property
    def holds(self) -> bool:
        """Tells whether every rule holds."""
        return all(verdict.holds for verdict in self.verdicts)


@dataclass(frozen=True)
class Divergence:
    """The first layer, in forward order, whose outputs differ while its inputs agree.

    Attributes:
        path: torch's name of the layer; "" is the whole model.
        torch_type: its class in torch.
        flax_type: its class in Flax.
        what: which of its values differ: `outputs`, `gradients`, `statistics`.
        after: the layer after which they differ, where it is no layer that differs but what `path` does between layers.
        cause: the usual suspect that explains it, and what to change; None if no suspect does.
    """

    path: str
    torch_type: str
    flax_type: str
    what: str = "outputs"
    after: str | None = None
    cause: str | None = None

    def __str__(self) -> str:
        """Makes a sentence: the layer, then the cause."""
        name = self.path or "the whole model"
        where = name if self.after is None else f"{name}, after {self.after}"
        types = self.torch_type if self.torch_type == self.flax_type else f"{self.torch_type} and {self.flax_type}"
        cause = self.cause or f"{self.what} of {types} differ while its inputs agree, and no usual suspect explains it"
        return f"{where}: {cause}"


@dataclass(frozen=True)
class ParityReport:
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
    def passed(self) -> bool:
        """Tells whether every tensor holds."""
        return bool(self.comparisons) and all(comparison.holds for comparison in self.comparisons)

    def __bool__(self) -> bool:
        """Returns `passed`."""
        return self.passed

    def __str__(self) -> str:
        """Returns plain text of about 40 lines at most. Of many layers and tensors, those that differ come first."""
        from rich.console import Group

        from parity_tests.kit import render

        return render.text(Group(*render.lines(self, short=True)))

    __repr__ = __str__

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        """Yields all lines."""
        from parity_tests.kit import render

        return render.lines(self)

    def print(self) -> None:
        """Prints every layer and every tensor that differs, in colour where stdout is a terminal."""
        from parity_tests.kit import render

        render.show(self)

    def to_json(self) -> str:
        """Returns JSON of all that is in the report. What is infinite or NaN is a string: "inf", "nan".

        Example:
            >>> import json
            >>> report = ParityReport("Net", "Net", "eval", "float32", jit=True, comparisons=())
            >>> json.loads(report.to_json())["verdict"]
            'No parity: nothing was compared.'
        """
        from parity_tests.kit import render

        return render.to_json(self)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the report: `parity.json`, `parity.html` (one file with a plot) or `parity.png` (the plot alone).

        The plot shows the error of each layer, in forward order. It needs matplotlib.

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
        from parity_tests.kit import render

        render.save("ParityReport.save", path, render.writers(self))


def with_gaps(what: str, comparisons: Sequence[Comparison], known_gaps: Mapping[str, str]) -> list[Comparison]:
    """Puts each known gap's reason at the tensors that differ.

    If none does, it is at one that does not, so that this one fails.
    """
    marked = list(comparisons)
    for pattern, reason in known_gaps.items():
        matching = [i for i, each in enumerate(marked) if fnmatchcase(each.name, pattern)]
        if not matching:
            raise ValueError(
                f"{what} expects known_gaps to name tensors of the report; got {pattern!r}, which none has: "
                f"{', '.join(sorted({each.name for each in marked}))[:300]}. Leave it out."
            )
        differing = [i for i in matching if not all(verdict.holds for verdict in marked[i].verdicts)]
        for i in differing or matching[:1]:
            marked[i] = replace(marked[i], gap=reason)
    return marked
