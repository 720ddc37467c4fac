"""Findings as people and programs read them: lines and tables for a terminal or a log, JSON, plots, a page."""

from __future__ import annotations

import base64
import io
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar
from uuid import uuid4

from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from parity_tests.kit.judge import (
    KINDS,
    KINDS_OF_TRAINING,
    Comparison,
    Departure,
    Divergence,
    LayerComparison,
    TrainingStep,
)
from parity_tests.standard import UNIT_ROUNDOFF, Verdict

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WIDTH = 120  # of text that goes to no terminal
FEW_LAYERS, FEW_TENSORS = 10, 4  # of a short report
FLOOR = 0.1  # roundings: where a plot shows no error at all, which a logarithmic axis has no place for
MAX_LABELS, LONGEST_LABEL = 40, 30
SERIES = (("#0b3d91", "o"), ("#e08a00", "s"), ("#5a5a5a", "D"))  # told apart in greyscale too
COMPUTED = ("passed", "holds", "ratio", "verdict")  # what JSON has beside the fields
CSS = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff; max-width: 80em; margin: 2em auto;
  padding: 0 1em; }
table { border-collapse: collapse; margin: 1em 0; }
th, td { padding: 0.2em 0.8em; text-align: left; vertical-align: top; border-bottom: 1px solid #ddd; }
td { overflow-wrap: anywhere; }
td:last-child { overflow-wrap: normal; }
.number { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }
.differs td { background: #fde8df; }
.verdict { font-size: 1.2em; font-weight: bold; }
img { max-width: 100%; }
"""

Compared = TypeVar("Compared", Comparison, LayerComparison)


class Row(NamedTuple):
    """A line of a table."""

    cells: tuple[str, ...]
    holds: bool


class Columns(NamedTuple):
    """The headers of a table; numbers are to the right."""

    words: tuple[str, ...]
    numbers: tuple[str, ...]
    last: tuple[str, ...] = ("",)


VERDICT_NUMBERS = ("error", "limit", "ratio")
LAYERS = Columns(("layer", "torch / Flax", "in"), VERDICT_NUMBERS)
KINDS_OF_TENSORS = Columns(("tensors", "agree", "worst of them", "in"), VERDICT_NUMBERS)
TENSORS = Columns(("tensor", "rule"), (*VERDICT_NUMBERS, "torch", "Flax", "ULP"), ("at", ""))


def text(report: RenderableType) -> str:
    """Renders without colour, and no wider than a log."""
    console = Console(file=io.StringIO(), width=WIDTH, color_system=None, force_jupyter=False, legacy_windows=False)
    with console.capture() as capture:
        console.print(report)
    return "\n".join(line.rstrip() for line in capture.get().splitlines())


def show(report: RenderableType) -> None:
    """Prints on stdout, in colour where that is a terminal."""
    console = Console()
    if console.is_terminal:
        console.print(report)
    else:
        print(text(report))


def layers_and_tensors(
    layers: Sequence[LayerComparison], comparisons: Sequence[Comparison], short: bool
) -> Iterator[RenderableType]:
    """Yields layers, kinds of tensors and every tensor that differs; few of them where it is to be short."""
    if layers:
        shown = _few(layers, FEW_LAYERS) if short else layers
        yield Text()
        yield _table(LAYERS, [_layer(layer) for layer in shown])
        yield from _left_out("layer", layers, shown)
    if comparisons:
        yield Text()
        yield _table(KINDS_OF_TENSORS, _kinds(comparisons))
        yield Text("error and limit in roundings of the dtype at the tensor's scale; ratio is error / limit", "dim")
    broken = [comparison for comparison in comparisons if not comparison.holds]
    if broken:
        shown_tensors = _few(broken, FEW_TENSORS) if short else broken
        yield Text()
        yield from (Text(sentence(comparison), "red") for comparison in shown_tensors)
        yield from _left_out("tensor", broken, shown_tensors)


def known_gaps(comparisons: Sequence[Comparison]) -> Iterator[str]:
    """Yields the tensors that are known to differ, by their reasons."""
    known = [each for each in comparisons if is_known(each)]
    for reason in dict.fromkeys(each.gap for each in known):
        names = [_name(each) for each in known if each.gap == reason]
        more = f" and {len(names) - FEW_TENSORS} more" if len(names) > FEW_TENSORS else ""
        yield f"known to differ: {', '.join(names[:FEW_TENSORS])}{more}: {reason}"


def sentence(comparison: Comparison) -> str:
    """Describes a tensor that does not hold: which rule it breaks, and where."""
    if comparison.gap is not None:
        return (
            f"{_name(comparison)} agrees, though it is known to differ: {comparison.gap}. "
            f"Remove it from known_gaps: {comparison.name!r}."
        )
    worst = comparison.worst
    if worst.measured == math.inf and worst.limit == 0:  # no number: shapes that do not fit
        return f"{_name(comparison)} differs: {worst.rule}"
    times = f", {worst.ratio:.2g} times its limit {worst.limit:.3g}" if math.isfinite(worst.ratio) else ""
    said = f"{_name(comparison)} differs: {worst.rule} is {worst.measured:.3g}{times}"
    values = comparison.torch, comparison.flax
    if all(map(math.isnan, values)):
        return said
    at = f" at {list(comparison.index)}" if comparison.index else ""
    apart = f", {comparison.ulp:.3g} ULP apart" if all(map(math.isfinite, values)) else ""
    return f"{said};{at} torch has {values[0]:.9g} and Flax {values[1]:.9g}{apart}"


def data(value: Any) -> Any:
    """Returns a report as JSON holds it. What is infinite or NaN is a string that Python's float() reads."""
    if is_dataclass(value):
        items = {field.name: getattr(value, field.name) for field in fields(value)}
        items |= {name: getattr(value, name) for name in COMPUTED if hasattr(value, name)}
        return data(items | ({"sentence": str(value)} if isinstance(value, Divergence | Departure) else {}))
    if isinstance(value, Mapping):
        return {str(name): data(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [data(each) for each in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else str(float(value))
    return value.item() if hasattr(value, "item") else value


def html_tables(layers: Sequence[LayerComparison], comparisons: Sequence[Comparison]) -> list[str]:
    """Makes the tables of a page: of kinds, layers and tensors."""
    return [
        "<p>Errors and limits are in roundings of the dtype at the tensor's scale; the ratio is error over limit.</p>",
        _html_table("Kinds of tensors", KINDS_OF_TENSORS, _kinds(comparisons)),
        _html_table("Layers, in forward order", LAYERS, [_layer(layer) for layer in layers]),
        _html_table("Tensors", TENSORS, [_tensor(comparison) for comparison in comparisons]),
    ]


def html_image(drawing: Figure, words: str) -> str:
    """Makes an image that is in the page itself."""
    return f'<img src="data:image/png;base64,{base64.b64encode(to_png(drawing)).decode()}" alt="{words}">'


def html_page(heading: str, parts: Sequence[str]) -> str:
    """Makes a page of parts that are HTML already. It needs no other file."""
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head><meta charset="utf-8"><title>{escape(heading)}</title>'
        f"<style>{CSS}</style></head>\n<body>\n<h1>{escape(heading)}</h1>\n" + "\n".join(parts) + "\n</body>\n</html>\n"
    )


def errors_by_depth(
    title: str, layers: Sequence[LayerComparison], comparisons: Sequence[Comparison], first: Divergence | None
) -> Figure:
    """Plots the error by depth: the innermost layers in forward order, or the tensors where there are no layers."""
    points: Sequence[Any] = _innermost(layers) or comparisons
    labels = [_layer_name(p) if isinstance(p, LayerComparison) else _name(p) for p in points]
    drawing = new_figure()
    axes = drawing.add_subplot()
    dtypes = dict.fromkeys(_dtype(v) for p in points for v in p.verdicts if _dtype(v) in UNIT_ROUNDOFF)
    size = 5 if len(points) <= MAX_LABELS else 2.5
    drawn: list[float] = []
    for dtype, (colour, marker) in zip(dtypes, SERIES, strict=False):
        worst = {i: v for i, p in enumerate(points) if (v := _worst_in(dtype, p.verdicts)) is not None}
        finite = {i: max(v.measured, FLOOR) for i, v in worst.items() if math.isfinite(v.measured)}
        axes.plot(
            list(finite), list(finite.values()), marker, ls="-", lw=0.8, ms=size, c=colour, label=f"{dtype} error"
        )
        steps = [(i + half, v.limit) for i, v in worst.items() for half in (-0.5, 0.5)]
        axes.plot(*zip(*steps, strict=True), ls="--", lw=1.2, c=colour, label=f"{dtype} limit")
        drawn += [*finite.values(), *(v.limit for v in worst.values())]
    axes.set_yscale("log")
    low, high = min(drawn, default=1.0), max(drawn, default=1.0)
    axes.set_ylim(low / 2, 2 * high * (high / low) ** 0.2)  # room for what is said above
    across = axes.get_xaxis_transform()
    beyond = [i for i, p in enumerate(points) if any(not math.isfinite(v.measured) for v in p.verdicts)]
    if beyond:
        axes.plot(beyond, [0.88] * len(beyond), "^", ms=8, c="#a33000", label="infinite or NaN", transform=across)
    place = None if first is None else _place(first, points)
    if first is not None and place is not None:
        where = first.path or "the whole model"
        name = f" first divergence: {where if first.after is None else f'{where}, after {first.after}'}"
        right = place > (len(points) - 1) / 2
        axes.axvline(place, c="#1a1a1a", lw=1, ls=":")
        side = "right" if right else "left"
        axes.text(place, 0.95, f"{name} ", ha=side, va="center", parse_math=False, transform=across)
    step = max(1, math.ceil(len(points) / MAX_LABELS))
    ticks = range(0, len(points), step)
    axes.set_xticks(ticks, [_shortened(labels[i]) for i in ticks], rotation=90, fontsize=7, parse_math=False)
    axes.set_xlim(-0.5, max(len(points), 1) - 0.5)
    axes.set_ylabel(f"error in roundings (0 is drawn at {FLOOR})")
    axes.set_title(title, fontsize=10, parse_math=False)
    axes.grid(axis="y", lw=0.4, c="#cccccc")
    if points:
        axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)
    return drawing


def errors_by_step(title: str, steps: Sequence[TrainingStep], first: Departure | None) -> Figure:
    """Plots, step by step, how far free runs are apart, and the worst errors from equal state."""
    drawing = new_figure()
    distances = drawing.add_subplot(1, 2, 1)
    errors = drawing.add_subplot(1, 2, 2)
    numbers = [step.number for step in steps]
    floor = UNIT_ROUNDOFF["float64"] / 10
    for name, style, colour, values in (
        ("torch and Flax", "o-", "#0b3d91", [step.distance for step in steps]),
        ("torch, moved by one ULP", "s--", "#e08a00", [step.twin_distance for step in steps]),
    ):
        distances.plot(numbers, [max(value, floor) for value in values], style, ms=4, c=colour, label=name)
    distances.set_title("free runs in float64: distance of weights", fontsize=10)
    distances.set_ylabel(f"largest distance over the tensor's scale (0 is drawn at {floor:.0e})")
    for kind, style in zip(KINDS_OF_TRAINING, ("o-", "s--", "^:", "d-."), strict=True):
        of_kind = [(step.number, c.worst) for step in steps for c in step.worst if c.kind == kind]
        finite = [(number, max(v.ratio, 1e-3)) for number, v in of_kind if math.isfinite(v.ratio)]
        if finite:
            errors.plot(*zip(*finite, strict=True), style, ms=4, label=kind)
    errors.axhline(1.0, c="#1a1a1a", lw=1.2, label="limit")
    errors.set_title("from equal state: the worst error over its limit (0.001 or less at the foot)", fontsize=10)
    if first is not None:
        errors.axvline(first.step, c="#1a1a1a", lw=1, ls=":")
    for axes in (distances, errors):
        axes.set_yscale("log")
        axes.set_xlabel("step")
        axes.set_xticks(sorted({*numbers[:: 1 + len(numbers) // 10], *numbers[-1:]}))
        axes.grid(axis="y", lw=0.4, c="#cccccc")
        axes.legend()
    drawing.suptitle(title, fontsize=10, parse_math=False)
    return drawing


def new_figure() -> Figure:
    """Makes a figure of matplotlib, without pyplot, which would keep it."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "A report expects matplotlib, to draw its plot; got none. pip install matplotlib, or "
            "report.save('parity.json').",
            name=error.name,
        ) from None
    return Figure(figsize=(11, 5.5), layout="constrained")


def to_png(drawing: Figure) -> bytes:
    content = io.BytesIO()
    drawing.savefig(content, format="png", dpi=110)
    return content.getvalue()


SUFFIXES = (".json", ".html", ".png")


def check_path(what: str, path: str | os.PathLike[str]) -> Path:
    """Refuses a path that no report can be written to."""
    if not isinstance(path, str | os.PathLike):
        raise TypeError(f"{what} expects a path; got {type(path).__name__}. Pass 'parity.html'.")
    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise ValueError(
            f"{what} expects a name that ends in {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}; got {str(path)!r}. "
            f"Pass {str(path.with_suffix('.html')) if path.name else 'parity.html'!r}."
        )
    if not path.parent.is_dir():
        raise ValueError(
            f"{what} expects a folder that is there; got {str(path)!r}, whose folder is not. "
            f"Path({str(path.parent)!r}).mkdir(parents=True)."
        )
    if path.is_dir():
        raise ValueError(f"{what} expects a file; got {str(path)!r}, a folder. Remove it, or pass another name.")
    return path


def save(what: str, path: str | os.PathLike[str], content: Mapping[str, Callable[[], bytes]]) -> None:
    """Writes what belongs to the path's suffix: all of it, or nothing."""
    path = check_path(what, path)
    temporary = path.with_name(f".{uuid4().hex}")
    try:
        temporary.write_bytes(content[path.suffix]())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _few(items: Sequence[Compared], count: int) -> list[Compared]:
    """Picks those that differ first, then those that are nearest to their limit. They stay in their order."""
    order = sorted(range(len(items)), key=lambda i: (items[i].holds, -items[i].worst.ratio if items[i].holds else i))
    return [items[i] for i in sorted(order[:count])]


def _left_out(noun: str, items: Sequence[Compared], shown: Sequence[Compared]) -> Iterator[Text]:
    for holds, verb in (False, "differ"), (True, "agree"):
        count = sum(item.holds is holds for item in items) - sum(item.holds is holds for item in shown)
        if count:
            more = f"{noun} {verb}s" if count == 1 else f"{noun}s {verb}"
            yield Text(f"... {count} more {more}", "green" if holds else "red")


def _layer_name(layer: LayerComparison) -> str:
    return (layer.path or "the whole model") + (f" (call {layer.call})" if layer.call else "")


def _name(comparison: Comparison) -> str:
    return comparison.name if comparison.name.startswith(comparison.kind) else f"{comparison.kind} {comparison.name}"


def is_known(comparison: Comparison) -> bool:
    """Tells whether it differs, as it is known to."""
    return comparison.gap is not None and comparison.holds


def _mark(comparison: Comparison) -> str:
    if comparison.gap is not None:
        return "known to differ" if comparison.holds else "AGREES, unlike known"
    return "agrees" if comparison.holds else "DIFFERS"


def _dtype(verdict: Verdict) -> str:
    """Returns the dtype in which a rule measures roundings, its first word. The exact tier has none."""
    return dtype if (dtype := verdict.rule.split()[0]) in UNIT_ROUNDOFF else "-"


def _numbers(verdict: Verdict) -> tuple[str, ...]:
    return f"{verdict.measured:.3g}", f"{verdict.limit:.3g}", f"{verdict.ratio:.2g}"


def _layer(layer: LayerComparison) -> Row:
    types = layer.torch_type if layer.torch_type == layer.flax_type else f"{layer.torch_type} / {layer.flax_type}"
    mark = "agrees" if layer.holds else "DIFFERS" if layer.inputs_agree else "as do its inputs"
    return Row((_layer_name(layer), types, _dtype(layer.worst), *_numbers(layer.worst), mark), layer.holds)


def _kinds(comparisons: Sequence[Comparison]) -> list[Row]:
    rows = []
    for kind in dict.fromkeys((*KINDS, *(c.kind for c in comparisons))):
        group = [c for c in comparisons if c.kind == kind]
        if group:
            agree = sum(c.holds and c.gap is None for c in group)
            worst = max(group, key=lambda c: (not c.holds, c.gap is None, c.worst.ratio))
            cells = kind, f"{agree} of {len(group)}", worst.name, _dtype(worst.worst), *_numbers(worst.worst)
            rows.append(Row((*cells, _mark(worst)), worst.holds))
    return rows


def _tensor(comparison: Comparison) -> Row:
    worst = comparison.worst
    values = f"{comparison.torch:.9g}", f"{comparison.flax:.9g}", f"{comparison.ulp:.3g}"
    mark = _mark(comparison) if comparison.gap is None else f"{_mark(comparison)}: {comparison.gap}"
    where = ", ".join(map(str, comparison.index))
    return Row((_name(comparison), worst.rule, *_numbers(worst), *values, where, mark), comparison.holds)


def _table(columns: Columns, rows: Sequence[Row]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for header in columns.words:
        table.add_column(header, overflow="fold")
    for header in columns.numbers:
        table.add_column(header, justify="right", no_wrap=True)
    for header in columns.last:
        table.add_column(header, no_wrap=True)
    for row in rows:
        *cells, mark = map(Text, row.cells)
        mark.stylize("green" if row.holds else "bold red")
        table.add_row(*cells, mark)
    return table


def _html_table(heading: str, columns: Columns, rows: Sequence[Row]) -> str:
    if not rows:
        return ""
    headers = (*columns.words, *columns.numbers, *columns.last)
    classes = ['class="number"' if header in columns.numbers else "" for header in headers]
    head = "".join(f"<th {kind}>{escape(header)}</th>" for kind, header in zip(classes, headers, strict=True))
    body = "\n".join(
        f'<tr class="{"agrees" if row.holds else "differs"}">'
        + "".join(f"<td {kind}>{escape(cell)}</td>" for kind, cell in zip(classes, row.cells, strict=True))
        + "</tr>"
        for row in rows
    )
    return f"<h2>{escape(heading)}</h2>\n<table>\n<tr>{head}</tr>\n{body}\n</table>"


def _innermost(layers: Sequence[LayerComparison]) -> list[LayerComparison]:
    """Returns the layers that hold no other."""
    parts = [layer.path.split(".") for layer in layers if layer.path]
    outer = {""} if parts else set()
    outer |= {".".join(names[:depth]) for names in parts for depth in range(1, len(names))}
    return [layer for layer in layers if layer.path not in outer]


def _place(first: Divergence, points: Sequence[Any]) -> float | None:
    """Finds where a plot marks the first divergence: at its layer, or behind the one after which it is."""
    places = [i for i, p in enumerate(points) if getattr(p, "path", None) == (first.after or first.path)]
    return places[0] + (0 if first.after is None else 0.5) if places else None


def _worst_in(dtype: str, verdicts: Sequence[Verdict]) -> Verdict | None:
    """Returns the rule of this dtype that is nearest to its limit, or furthest beyond it."""
    return max((v for v in verdicts if _dtype(v) == dtype), key=lambda v: v.ratio, default=None)


def _shortened(label: str) -> str:
    return label if len(label) <= LONGEST_LABEL else f"...{label[3 - LONGEST_LABEL :]}"
