"""Texts of a report: as lines, JSON, a plot and a page, of few layers and of many."""

import io
import json
import math
from html.parser import HTMLParser

import pytest
from rich.console import Console

from parity_tests.kit import render
from parity_tests.kit.judge import Comparison, Divergence, LayerComparison
from parity_tests.kit.report import ParityReport
from parity_tests.standard import Verdict

PNG = b"\x89PNG\r\n\x1a\n"
TEXT = """\
Net in torch and Twin in Flax, eval mode, float32, under jax.jit

layer torch / Flax in error limit ratio
conv1 Conv2d / Conv float32 1.5 32 0.047 agrees
[bold]norm$_1$ & <b> Conv2d / Conv float64 6.4e+08 64 1e+07 DIFFERS
fc (call 1) Conv2d / Conv float64 inf 64 inf as do its inputs

tensors agree worst of them in error limit ratio
output 0 of 1 output['loss'] float64 nan 64 inf DIFFERS
statistic 0 of 1 running_var float64 1e+03 64 16 known to differ
parameter gradient 1 of 2 [bold]norm$_1$ & <b>.weight float64 6.4e+05 64 1e+04 DIFFERS
error and limit in roundings of the dtype at the tensor's scale; ratio is error / limit

output['loss'] differs: float64 distance of torch and flax is nan; at [3, 0] torch has 0.5 and Flax 0.25, 7 ULP
apart
parameter gradient [bold]norm$_1$ & <b>.weight differs: float64 distance of torch and flax is 6.4e+05, 1e+04
times its limit 64; at [3, 0] torch has 0.5 and Flax 0.25, 7 ULP apart

First divergence: [bold]norm$_1$ & <b>: nnx epsilon is 1e-06
Note: the exact tier does not apply
Note: known to differ: statistic running_var: nnx keeps the biased variance
No parity: 2 of 4 tensors differ.
"""


def verdicts(low=1.5, high=2.5):
    return (
        Verdict("", "float32 error of flax", low, 32.0),
        Verdict("", "float64 distance of torch and flax", high, 64.0),
    )


def layer(path, high=2.5, inputs_agree=True, call=0):
    return LayerComparison(path, call, "Conv2d", "Conv", inputs_agree, verdicts(high=high))


def tensor(name, high=2.5, kind="parameter gradient", gap=None):
    return Comparison(kind, name, verdicts(high=high), (3, 0), 0.5, 0.25, 7.0, gap)


def report(layers=(), comparisons=(), **options):
    return ParityReport("Net", "Twin", "eval", "float32", True, tuple(comparisons), tuple(layers), **options)


def plot(report):
    return render.errors_by_depth("title", report.layers, report.comparisons, report.first_divergence)


@pytest.fixture
def parted():
    """Makes a report where the second of three layers differs, and the last because of it."""
    layers = [layer("conv1", 0.0), layer("[bold]norm$_1$ & <b>", 6.4e8), layer("fc", math.inf, False, call=1)]
    comparisons = [
        tensor("output['loss']", math.nan, "output"),
        tensor("conv1.weight"),
        tensor("[bold]norm$_1$ & <b>.weight", 6.4e5),
        tensor("running_var", 1e3, "statistic", "nnx keeps the biased variance"),
    ]
    first = Divergence("[bold]norm$_1$ & <b>", "BatchNorm2d", "BatchNorm", cause="nnx epsilon is 1e-06")
    return report(layers, comparisons, first_divergence=first, notes=("the exact tier does not apply",))


def test_text_names_every_layer_what_differs_and_the_verdict(parted):
    assert str(parted).split() == TEXT.split()
    assert repr(parted) == str(parted)


def test_verdict_is_the_last_line():
    assert str(report(comparisons=[tensor("a"), tensor("b")])).splitlines()[-1] == "Parity: 2 of 2 tensors agree."
    assert str(report()).splitlines()[-1] == "No parity: nothing was compared."


def test_the_whole_model_has_a_name():
    assert "\nthe whole model  Conv2d / Conv  float32" in str(report([layer("")], [tensor("output")]))


def test_known_gaps_are_told_apart_from_what_agrees():
    gaps = [tensor(f"norm{i}.running_var", 1e3, "statistic", "biased") for i in range(9)]
    lines = str(report(comparisons=[tensor("output", kind="output"), *gaps])).splitlines()
    assert lines[-1] == "Parity: 1 of 10 tensors agree; 9 are known to differ."
    assert "statistic norm3.running_var and 5 more: biased" in " ".join(lines[-3:-1])
    assert [line.split()[1:4] for line in lines if line.startswith("statistic ")] == [["0", "of", "9"]]


def test_known_gap_that_closes_is_said_to():
    said = str(report(comparisons=[tensor("running_var", kind="statistic", gap="biased")]))
    assert "statistic running_var agrees, though it is known to differ: biased. Remove it from known_gaps: 'run" in said
    assert said.endswith("No parity: 1 of 1 tensors differ.")


@pytest.mark.parametrize("differ", [0, 3, 150])
def test_text_of_a_large_network_is_short(differ):
    highs = [2.5] * (200 - differ) + [6.4e8] * differ
    names = [f"encoder.layers.{i}.self_attention.output_projection" for i in range(200)]
    large = report(
        [layer(name, high, i == 200 - differ) for i, (name, high) in enumerate(zip(names, highs, strict=True))],
        [tensor(f"{name}.weight", high) for name, high in zip(names, highs, strict=True)],
        first_divergence=Divergence(names[-differ], "Linear", "Linear") if differ else None,
    )
    lines = str(large).splitlines()
    assert len(lines) <= 40
    assert max(map(len, lines)) <= 120
    shown = min(differ, 10)
    assert sum(line.endswith("DIFFERS") for line in lines) == (2 if differ else 0)  # the layer and its kind of tensor
    assert ("... 140 more layers differ" in lines) is (differ == 150)
    assert f"... {200 - differ - 10 + shown} more layers agree" in lines
    assert f"... {differ - 4} more tensors differ" in lines or differ < 5
    assert differ == 0 or lines[3].startswith(names[200 - differ] if differ > 10 else names[0])
    all_lines = _lines_of_terminal(large)
    assert all(any(line.startswith(name) for line in all_lines) for name in names)


def test_colour_only_on_a_terminal(parted, capsys):
    parted.print()
    printed = capsys.readouterr().out
    assert "\x1b" not in printed
    assert printed.splitlines() == str(parted).splitlines()
    assert "\x1b[1;31mDIFFERS" in "".join(_lines_of_terminal(parted))


def test_json_is_valid_where_values_are_not_finite(parted):
    def refuse(constant):
        raise ValueError(constant)

    content = json.loads(parted.to_json(), parse_constant=refuse)
    assert content["passed"] is False
    assert content["first_divergence"]["sentence"] == "[bold]norm$_1$ & <b>: nnx epsilon is 1e-06"
    assert content["layers"][1]["verdicts"][1] == {
        "tensor": "",
        "rule": "float64 distance of torch and flax",
        "measured": 6.4e8,
        "limit": 64.0,
        "holds": False,
        "ratio": 1e7,
    }
    assert math.isnan(float(content["comparisons"][0]["verdicts"][1]["measured"]))
    assert content["comparisons"][0]["index"] == [3, 0]
    assert json.loads(report().to_json())["first_divergence"] is None


def test_page_needs_no_other_file_and_escapes_names(parted, tmp_path):
    parted.save(tmp_path / "parity.html")
    page = (tmp_path / "parity.html").read_text()
    tags = []
    parser = HTMLParser()
    parser.handle_starttag = lambda tag, attributes: tags.append((tag, dict(attributes)))
    parser.feed(page)
    assert not {"script", "link", "b"} & {tag for tag, _ in tags}
    sources = [attributes["src"] for tag, attributes in tags if tag == "img"]
    assert len(sources) == 1
    assert sources[0].startswith("data:image/png;base64,")
    assert page.count("[bold]norm$_1$ &amp; &lt;b&gt;") >= 3
    assert sum(tag == "tr" for tag, _ in tags) == 3 + 3 + 3 + 4  # headers, kinds, layers, tensors


def test_plot_shows_errors_limits_and_the_first_divergence(parted):
    axes = plot(parted).axes[0]
    series = {line.get_label(): line for line in axes.get_lines()}
    assert list(series["float64 error"].get_ydata()) == [render.FLOOR, 6.4e8]
    assert list(series["float32 error"].get_ydata()) == [1.5, 1.5, 1.5]
    assert set(series["float64 limit"].get_ydata()) == {64.0}
    assert list(series["infinite or NaN"].get_xdata()) == [2]
    assert [text.get_text().strip() for text in axes.texts] == ["first divergence: [bold]norm$_1$ & <b>"]
    low, high = axes.get_ylim()
    assert low < render.FLOOR < 6.4e8 < high


def test_plot_is_of_the_innermost_layers_and_marks_what_is_between_them():
    layers = [layer(name) for name in ("", "block", "block.conv", "block.norm", "fc")]
    first = Divergence("block", "Block", "Block", after="block.conv", cause="relu in torch, gelu in Flax")
    axes = plot(report(layers, [tensor("output")], first_divergence=first)).axes[0]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["block.conv", "block.norm", "fc"]
    assert [(text.get_text().strip(), text.get_position()[0]) for text in axes.texts] == [
        ("first divergence: block, after block.conv", 0.5)
    ]


def test_plot_of_many_layers_thins_its_labels(tmp_path):
    drawing = plot(report([layer(f"layers.{i}.{'x' * 50}") for i in range(211)], [tensor("a")]))
    labels = [label.get_text() for label in drawing.axes[0].get_xticklabels()]
    assert 20 <= len(labels) <= 40
    assert max(map(len, labels)) <= 30


def test_plot_without_layers_shows_tensors():
    drawing = plot(report(comparisons=[tensor("output", kind="output"), tensor("x", kind="input gradient")]))
    labels = [label.get_text() for label in drawing.axes[0].get_xticklabels()]
    assert labels == ["output", "input gradient x"]


def test_save_writes_by_suffix_and_leaves_nothing_else(parted, tmp_path):
    for name in ("parity.json", "parity.html", "parity.png"):
        parted.save(tmp_path / name)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["parity.html", "parity.json", "parity.png"]
    assert (tmp_path / "parity.json").read_text() == parted.to_json()
    assert (tmp_path / "parity.png").read_bytes().startswith(PNG)
    assert (tmp_path / "parity.html").read_text().startswith("<!DOCTYPE html>")
    report().save(tmp_path / "parity.png")  # overwrites
    with pytest.raises(AttributeError):
        render.save("it", tmp_path / "other.json", {".json": lambda: "no bytes".nothing})
    assert len(list(tmp_path.iterdir())) == 3


def test_save_says_which_paths_it_takes(parted, tmp_path):
    with pytest.raises(ValueError, match=r"ends in \.json, \.html or \.png; got 'parity\.pdf'. Pass 'parity\.html'"):
        parted.save("parity.pdf")
    with pytest.raises(ValueError, match=r"expects a folder that is there; got .*Path\(.*\)\.mkdir\(parents=True\)"):
        parted.save(tmp_path / "reports" / "parity.json")
    (tmp_path / "folder.json").mkdir()
    with pytest.raises(ValueError, match=r"expects a file; got .*a folder"):
        parted.save(tmp_path / "folder.json")
    with pytest.raises(TypeError, match="expects a path; got int"):
        parted.save(3)


def _lines_of_terminal(printed):
    console = Console(file=io.StringIO(), force_terminal=True, width=150, color_system="standard", highlight=False)
    console.print(printed)
    return console.file.getvalue().splitlines()
