"""Finds where two networks differ in what is not stacked: options, code, hooks, and which layers are one."""

from __future__ import annotations

import functools
import reprlib
import types
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

HELD_BY_FUNCTION = "held by a function, which is not copied with the network"


class Difference(NamedTuple):
    """A place where two networks differ, and what each has there."""

    path: str
    first: str
    other: str


class Structure:
    """Compares networks as objects. Their text hides private attributes, closures, hooks and classes of one name.

    Args:
        stacked: says what a tensor of the networks has to share with another to be stacked with it, as text.
        held: says what a module of the networks holds, by name.
        content: returns dtype, shape and bytes of any other tensor.
            All three return None for what is none of these.
    """

    def __init__(
        self,
        stacked: Callable[[Any], str | None],
        held: Callable[[Any], Mapping[str, Any] | None],
        content: Callable[[Any], tuple[str, tuple[int, ...], bytes] | None],
    ) -> None:
        self.stacked, self.held, self.content = stacked, held, content

    def difference(self, first: Any, other: Any) -> Difference | None:
        """Returns the first place where they differ, None if every call of other computes what first would."""
        self._seen: dict[tuple[int, int], Any] = {}  # with the objects, so that no other one is given their place
        self._others: dict[int, Any] = {}
        self._firsts: dict[int, Any] = {}
        return next(self._differences("", first, other), None)

    def _differences(self, path: str, a: Any, b: Any, where: str = "") -> Iterator[Difference]:
        if type(a) is not type(b) and next(self._differences("", type(a), type(b), "class"), None):
            yield Difference(path, *_types(type(a), type(b)))
            return
        stacked, held = self.stacked(a), self.held(a)
        if stacked is not None or held is not None:
            if where == "function":
                yield Difference(path, HELD_BY_FUNCTION, HELD_BY_FUNCTION)
            elif self._others.setdefault(id(a), b) is not b:
                yield Difference(path, "what it has elsewhere too", "another one")
            elif self._firsts.setdefault(id(b), a) is not a:
                yield Difference(path, "one of its own", "what it has elsewhere too")
        if stacked is not None:
            if stacked != self.stacked(b):
                yield Difference(path, stacked, str(self.stacked(b)))
            return
        is_function = isinstance(a, types.FunctionType)
        holds = held is not None or (is_function and a.__closure__)  # parts of the network, perhaps
        if (a is b and not holds) or (id(a), id(b)) in self._seen:
            return
        self._seen[id(a), id(b)] = a, b
        ours, theirs = (self.held(each) or (None if self.content(each) else _parts(each)) for each in (a, b))
        if ours is None or theirs is None:
            if not self._equal(a, b):
                yield Difference(path, _shown(a), _shown(b))
        elif ours.keys() != theirs.keys():
            here, there = ([str(name) for name in a.keys() - b.keys()] for a, b in ((ours, theirs), (theirs, ours)))
            yield Difference(path, *_with(here, there))
        else:
            for name, value in ours.items():
                inner = f"{path}{name}" if str(name).startswith("[") else f"{path}.{name}".removeprefix(".")
                yield from self._differences(inner, value, theirs[name], where or ("function" if is_function else ""))

    def _equal(self, a: Any, b: Any) -> bool:
        if isinstance(a, np.ndarray):
            return (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes())
        if self.content(a) is not None:
            return self.content(a) == self.content(b)
        if type(a).__eq__ is object.__eq__:  # such as locks, which nothing tells apart
            return a is b or not isinstance(a, (types.ModuleType, types.BuiltinFunctionType))
        return bool(a == b) or (a != a and b != b)


def _parts(value: Any) -> Mapping[Any, Any] | None:
    """Returns what an object is made of, None if it is compared as a whole."""
    if isinstance(value, types.FunctionType):
        code, scope = value.__code__, value.__globals__
        closure = [each.cell_contents for each in value.__closure__ or () if each != types.CellType()]  # empty as yet
        read = {name: scope[name] for name in _names(code) & scope.keys()}
        defaults = value.__defaults__, value.__kwdefaults__
        return {"code": code, "defaults": defaults, "closure": closure, "globals": read, "attributes": vars(value)}
    if isinstance(value, types.MethodType):
        return {"function": value.__func__, "self": value.__self__}
    if isinstance(value, functools.partial):
        return {"function": value.func, "args": value.args, "keywords": value.keywords}
    if isinstance(value, weakref.ref):
        return {"referent": value()}
    if isinstance(value, property):
        return {"get": value.fget, "set": value.fset}
    if isinstance(value, (staticmethod, classmethod)):
        return {"function": value.__func__}
    if isinstance(value, type):  # two that were defined alike are one, as those of torch's parametrizations are
        of_class: dict[str, Any] = {
            name: each for name, each in vars(value).items() if name not in ("__doc__", "__slotnames__")
        }
        return {"name": value.__qualname__, "bases": value.__bases__, **of_class}
    if isinstance(value, types.ModuleType):
        return None
    parts: dict[Any, Any] = dict(getattr(value, "__dict__", {}))
    for base in type(value).__mro__:
        slots = vars(base).get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if not name.startswith("__") and hasattr(value, name):
                parts[name] = getattr(value, name)
    if isinstance(value, Mapping):
        parts |= {f"[{key!r}]": each for key, each in value.items()}
        parts["keys"] = [key for key in value if isinstance(key, (str, int))]  # in their order
    elif isinstance(value, (list, tuple, deque)):
        parts |= {f"[{i}]": each for i, each in enumerate(value)}
    elif not parts:
        return None
    return parts


def _names(code: types.CodeType) -> set[str]:
    """Returns the names that a function reads, and the functions in it."""
    inner = (_names(each) for each in code.co_consts if isinstance(each, types.CodeType))
    return set(code.co_names).union(*inner)


def _types(first: type, other: type) -> tuple[str, str]:
    names = first.__qualname__, other.__qualname__
    return (f"a {names[0]}", f"a {names[1]}" + (", another class of that name" if names[0] == names[1] else ""))


def _with(first: list[str], other: list[str]) -> tuple[str, str]:
    """Says what each has that the other has not."""
    ours, theirs = (", ".join(sorted(names)) for names in (first, other))
    return f"with {ours}" if ours else f"without {theirs}", f"with {theirs}" if theirs else f"without {ours}"


def _shown(value: Any) -> str:
    if isinstance(value, types.CodeType):
        return f"the code of line {value.co_firstlineno}"
    return reprlib.repr(value)
