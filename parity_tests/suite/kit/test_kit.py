"""The kit's modules import in one direction, so that compare can be read from pairing to the report."""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import parity_tests

ROOT = Path(parity_tests.__file__).parent
SUITE = ROOT / "suite"


def imported(source):
    """Yields what a module imports, in functions and for type checkers too."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def in_order(sources):
    """Returns the modules, each behind those that it imports; a circle of them is a CycleError that names it."""
    imports = {name: {other for other in imported(source) if other != name} for name, source in sources.items()}
    return list(TopologicalSorter({name: others & sources.keys() for name, others in imports.items()}).static_order())


def test_modules_import_in_one_direction():
    paths = [path for path in ROOT.rglob("*.py") if SUITE not in path.parents]
    names = [".".join(path.relative_to(ROOT.parent).with_suffix("").parts) for path in paths]
    sources = {name.removesuffix(".__init__"): path.read_text() for name, path in zip(names, paths, strict=True)}
    order = in_order(sources)
    assert sorted(order) == sorted(sources)
    steps = ["kit.pair", "kit.localize", "kit.compare"], ["kit.judge", "kit.render", "kit.report", "kit.compare"]
    for each in steps:
        places = [order.index(f"parity_tests.{name}") for name in each]
        assert places == sorted(places)


@pytest.mark.parametrize("where", ["", "def f():\n    ", "if TYPE_CHECKING:\n    "])
def test_a_circle_is_seen(where):
    with pytest.raises(CycleError, match=r"'a'.*'b'"):
        in_order({"a": "import b", "b": f"{where}from a import x"})
