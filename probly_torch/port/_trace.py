"""torch.fx with values: each recorded call knows its result in the example, and where it stands in the source."""

from __future__ import annotations

import ast
import functools
import linecache
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import CodeType, FrameType
from typing import Any

import torch
from torch import Tensor, fx, nn

from probly_torch.port._source import Value

_INSIDE = (os.path.dirname(torch.__file__), os.path.dirname(__file__))
_FACTORIES = ("arange", "empty", "eye", "full", "linspace", "ones", "rand", "randn", "zeros")


@dataclass(frozen=True)
class Origin:
    """The statement that made a call: its place, its execution (a loop has several), and the names it assigns."""

    place: str
    execution: int
    names: tuple[str | None, ...] = ()
    name: str | None = None  # of the result of this very call


class Switch(int):
    """`self.training` while it is traced: false, and yet not the literal False. It remembers if a branch asked it."""

    asked = False

    def __bool__(self) -> bool:
        self.asked = True
        return False


class _Proxy(fx.Proxy):
    """Sizes of the example are known: they may be counted, and rounded."""

    def __getattr__(self, name: str) -> _Attribute:
        return _Attribute(self, name)

    def __len__(self) -> int:
        return len(self.node.meta["value"])

    def __index__(self) -> int:
        return _number(self).__index__()

    def __int__(self) -> int:
        return int(_number(self))

    def __float__(self) -> float:
        return float(_number(self))


class _Attribute(_Proxy, fx.proxy.Attribute):
    """Or method; recorded when it is used."""


class Tracer(fx.Tracer):
    """Traces one module's forward; the modules in it are single calls.

    Each node has `meta["value"]`, its result in the example, `meta["origin"]`, and `meta["changed"]`: the nodes whose
    values the call changed in place.
    """

    proxy_buffer_attributes = True

    def __init__(self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        super().__init__()
        self.forward, self.arguments = forward, (args, kwargs)
        self.code: CodeType | None = getattr(forward, "__code__", None)
        self.running = False
        self.origin = Origin("its first line", -1)
        self.executions = 0
        self.last: tuple[FrameType | None, int, int] = (None, -1, -1)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> tuple[Any, list[Any]]:
        args, kwargs = self.arguments
        placed = fx.node.map_aggregate((args, kwargs), self._placeholder)
        return lambda: self.forward(self.root, *placed[0], **placed[1]), []

    def _placeholder(self, value: Any) -> Any:
        if not isinstance(value, Value):
            return value
        self.placed = value
        return self.create_proxy("placeholder", f"argument{len(self.graph.nodes)}", (), {})

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        return forward(*args, **kwargs) if self.running else super().call_module(m, forward, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        return attr_val if self.running else super().getattr(attr, attr_val, parameter_proxy_cache)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def to_bool(self, obj: fx.Proxy) -> bool:
        return bool(_number(obj))

    def iter(self, obj: fx.Proxy) -> Iterator[Any]:
        return iter([obj[i] for i in range(len(obj.node.meta["value"]))])  # type: ignore[index]

    def create_node(self, kind: str, target: Any, *rest: Any, **options: Any) -> fx.Node:
        node = super().create_node(kind, target, *rest, **options)
        if kind == "get_attr":  # which may come without a proxy
            node.meta |= {"value": attribute(self.root, target), "origin": self._origin(kind, target)}
        return node

    def create_proxy(self, kind: str, target: Any, args: Any, kwargs: Any, *rest: Any, **options: Any) -> fx.Proxy:
        if self.running:
            raise RuntimeError("a call was recorded while the example ran")
        proxy = super().create_proxy(kind, target, args, kwargs, *rest, **options)
        node = proxy.node
        node.meta["origin"] = self.origin = self._origin(kind, target)
        self.running = True
        try:
            node.meta["value"] = self._value(node)
        finally:
            self.running = False
        return proxy

    def _value(self, node: fx.Node) -> Any:
        node.meta["changed"] = []
        if node.op == "placeholder":
            node.meta["bound"] = self.placed
            return self.placed.example
        if node.op == "get_attr":
            return node.meta["value"]
        plain = fx.node.map_aggregate((node.args, node.kwargs), lambda a: False if isinstance(a, Switch) else a)
        args, kwargs = fx.node.map_arg(plain, lambda n: n.meta["value"])
        before = {n: n.meta["value"]._version for n in node.all_input_nodes if isinstance(n.meta["value"], Tensor)}
        with torch.no_grad():
            if node.op == "call_module":
                value = self.root.get_submodule(str(node.target))(*args, **kwargs)
            elif node.op == "call_method":
                value = getattr(args[0], str(node.target))(*args[1:], **kwargs)
            else:
                function: Any = node.target
                value = function(*args, **kwargs)
        node.meta["changed"] = [n for n, version in before.items() if n.meta["value"]._version != version]
        return value

    def _origin(self, kind: str, target: Any) -> Origin:
        frame: FrameType | None = sys._getframe(2)
        while frame and frame.f_code is not self.code and frame.f_code.co_filename.startswith(_INSIDE):
            frame = frame.f_back
        if frame is None:
            return Origin("unknown place", -1)
        name, line = frame.f_code.co_filename, frame.f_lineno
        statement = _statement(name, line)
        start = statement.lineno if statement else line
        if (frame, start) != self.last[:2] or frame.f_lasti <= self.last[2]:
            self.executions += 1
        # An attribute is recorded late, by the instruction that uses it.
        late = kind == "get_attr" or target is getattr
        self.last = (frame, start, frame.f_lasti - late)
        execution = self.executions if statement else -self.executions
        return Origin(f"{name}:{line}", execution, *_names(statement, frame))


@functools.lru_cache(maxsize=16)
def _statements(source: str) -> list[tuple[int, int, ast.stmt]]:
    """Lists first line, last line and tree of each simple statement."""
    try:
        tree = ast.parse(source)
    except SyntaxError:
        return []
    simple = ast.Assign | ast.AugAssign | ast.AnnAssign | ast.Return | ast.Expr
    return [(n.lineno, n.end_lineno or n.lineno, n) for n in ast.walk(tree) if isinstance(n, simple)]


def _statement(name: str, line: int) -> ast.stmt | None:
    """Finds the innermost simple statement at a line of a file."""
    found = _statements("".join(linecache.getlines(name)))
    inside = [(start - end, node) for start, end, node in found if start <= line <= end]
    return max(inside, key=lambda item: item[0])[1] if inside else None


def attribute(root: nn.Module, path: str) -> Any:
    """Gets an attribute past what fx puts in the way of getattr."""
    value: Any = root
    for name in path.split("."):
        own = vars(value)
        found = [table[name] for table in (own["_parameters"], own["_buffers"], own["_modules"], own) if name in table]
        value = found[0] if found else getattr(value, name)
    return value


@contextmanager
def recorded_factories(tracer: Tracer) -> Iterator[None]:
    """Records torch.zeros(n, 3) and the like too, if a size is recorded.

    fx sees only calls on what it records.
    """
    originals = {name: getattr(torch, name) for name in _FACTORIES}

    def recorded(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            found: list[Any] = []
            fx.node.map_aggregate((args, kwargs), lambda a: found.append(a) if isinstance(a, fx.Proxy) else None)
            if found and not tracer.running:
                return tracer.create_proxy("call_function", original, args, kwargs)
            return original(*args, **kwargs)

        return call

    try:
        for name, original in originals.items():
            setattr(torch, name, recorded(original))
        yield
    finally:
        for name, original in originals.items():
            setattr(torch, name, original)


def _names(statement: ast.stmt | None, frame: FrameType) -> tuple[tuple[str | None, ...], str | None]:
    """Returns what the statement assigns to, and which of these the instruction that is running computes."""
    if isinstance(statement, ast.AugAssign | ast.AnnAssign):
        target: ast.expr = statement.target
    elif isinstance(statement, ast.Assign) and len(statement.targets) == 1:
        target = statement.targets[0]
    else:
        return (), None
    several = isinstance(target, ast.Tuple | ast.List)
    items = _items(target) if several else [target]
    names = tuple(item.id if isinstance(item, ast.Name) else None for item in items)
    value = statement.value
    whole: list[Any] = [statement] if isinstance(statement, ast.AugAssign) else [value]
    if several and isinstance(value, ast.Tuple) and len(value.elts) == len(items):
        whole = list(value.elts)
    elif several:
        whole = []
    line, end_line, column, end_column = list(frame.f_code.co_positions())[frame.f_lasti // 2]
    here = (line, column, end_line, end_column)
    spans = [(e.lineno, e.col_offset, e.end_lineno, e.end_col_offset) for e in whole]
    return names, names[spans.index(here)] if here in spans else None


def _items(target: ast.expr) -> list[ast.expr]:
    """Returns the items of nested tuples in one list."""
    nested = isinstance(target, ast.Tuple | ast.List)
    return [item for each in target.elts for item in _items(each)] if nested else [target]  # type: ignore[attr-defined]


def _number(proxy: fx.Proxy) -> Any:
    value = proxy.node.meta["value"]
    if isinstance(value, Tensor):
        raise TypeError("the forward asks for the value of a tensor, which is another in each call")
    return value
