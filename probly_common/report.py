"""Tells what a conversion did to each layer, and how each parameter of an ensemble started."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

Exclude = str | type | Callable[[str, Any], bool]


@dataclass(frozen=True)
class ReportRow:
    """One layer: its path, its class, what was done with it, and its parameters before and after.

    Of an ensemble: one parameter, the class of its layer, and the rule that it started by.
    """

    path: str
    kind: str
    action: str  # "converted", "shared" or "excluded"; or the rule
    before: int
    after: int
    reason: str = ""  # why it is shared, if an example input said so


@dataclass(frozen=True)
class Report:
    """A table of the layers that have parameters, or of parameters; print it, or read its rows."""

    rows: tuple[ReportRow, ...] = field(hash=False)  # nnx hashes it with the model at every call

    def __str__(self) -> str:
        header = ("path", "kind", "action", "before", "after")
        total = ("", "", "total", f"{sum(r.before for r in self.rows):,}", f"{sum(r.after for r in self.rows):,}")
        cells = [(r.path or "(root)", r.kind, r.action, f"{r.before:,}", f"{r.after:,}") for r in self.rows]
        table = [header, *cells, total]
        widths = [max(len(row[i]) for row in table) for i in range(5)]
        lines = [
            "  ".join(c.ljust(w) if i < 3 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
            for row in table
        ]
        reasons = [f"{r.path or '(root)'} is shared: {r.reason}" for r in self.rows if r.reason]
        return "\n".join(line.rstrip() for line in [*lines, *reasons])


class Excluder:
    """Decides which layers `exclude` names, by themselves or by a module that holds them."""

    def __init__(self, exclude: Exclude | Iterable[Exclude], layer_type: type) -> None:
        single = isinstance(exclude, (str, type)) or callable(exclude) or not isinstance(exclude, Iterable)
        self.entries: Sequence[Any] = (exclude,) if single else tuple(exclude)  # type: ignore[arg-type]
        for entry in self.entries:
            if isinstance(entry, layer_type):  # which can be called, too
                kind = type(entry).__name__
                raise TypeError(
                    f"batchensemble expects exclude to hold name patterns, types or functions of (path, layer); got a "
                    f"layer, {kind}. Pass its name, exclude='head'; or its type, exclude={kind}."
                )
            if not isinstance(entry, (str, type)) and not callable(entry):
                raise TypeError(
                    f"batchensemble expects exclude to hold name patterns, types or functions of (path, layer); got "
                    f"{entry!r}. Pass exclude='head.*'."
                )
        self.matched = [False] * len(self.entries)
        self.excluded: list[str] = []

    def __call__(self, path: str, layer: Any) -> bool:
        """Tells whether to leave out the layer, which comes after the modules that hold it."""
        hits = [self._matches(entry, path, layer) for entry in self.entries]
        self.matched = [old or new for old, new in zip(self.matched, hits, strict=True)]
        if any(hits):
            self.excluded.append(path)
        return any(hits) or any(path.startswith(f"{parent}.") or not parent for parent in self.excluded)

    @staticmethod
    def _matches(entry: Exclude, path: str, layer: Any) -> bool:
        if isinstance(entry, str):
            return fnmatchcase(path, entry)
        return isinstance(layer, entry) if isinstance(entry, type) else bool(entry(path, layer))

    def check_all_matched(self, rows: Sequence[ReportRow]) -> None:
        unused = [entry for entry, hit in zip(self.entries, self.matched, strict=True) if not hit]
        if unused:
            layers = ", ".join(row.path or "(root)" for row in rows[:20]) or "(no layer with parameters)"
            layers += f" and {len(rows) - 20} more" if len(rows) > 20 else ""
            named = rows and rows[0].path
            example = f"Pass exclude={named!r}, or leave it out." if named else "Leave it out: exclude=()."
            raise ValueError(
                f"batchensemble expects every entry of exclude to match a layer; got {unused!r}, which match none of: "
                f"{layers}. {example}"
            )


def make_report(what: str, rows: Sequence[ReportRow]) -> Report:
    if not any(row.action == "converted" for row in rows):
        kinds = ", ".join(sorted({f"{row.kind} ({row.action})" for row in rows})) or "none"
        raise ValueError(
            f"{what} expects a network with a layer it can convert (linear, convolution, embedding, attention, "
            f"recurrent, or registered); got layers: {kinds}. For members with weights of their own, call "
            f"ensemble(network, num_members)."
        )
    return Report(tuple(rows))


def report_of_starts(
    num_members: int, sizes: Mapping[str, int], layers: Mapping[str, Any], rules: Mapping[str, str], otherwise: str
) -> Report:
    """Returns how each parameter of an ensemble started, by its rule or by what all others started by."""
    rows = []
    for path, size in sizes.items():
        holder = path
        while holder not in layers:
            holder = holder.rpartition(".")[0]
        rule = rules.get(path, otherwise)
        rows.append(ReportRow(path, type(layers[holder]).__name__, rule, size // num_members, size))
    return Report(tuple(rows))


def natural_order(path: str) -> list[tuple[int, int, str]]:
    """Sorts paths by name, numbers by value: layers draw from rngs in this order, in both packages."""
    parts = path.split(".") if path else []
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in parts]
