"""Source code in the making: expressions that name values by number, statements, constructors, classes."""

from __future__ import annotations

import builtins
import keyword
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

LINE_LENGTH = 120
_TOKEN = re.compile("«([0-9]+)»")
_RESERVED = {"jax", "jnp", "nnx", "math", "partial", "self", "rngs", *keyword.kwlist, *dir(builtins)}


@dataclass(frozen=True)
class Value:
    """A piece of source, its value in the example, and whether its channels are last, where torch's are second."""

    text: str
    example: Any
    last: bool = False
    primary: bool = True  # whether it needs no parentheses before a dot

    def __str__(self) -> str:
        return self.text

    @property
    def atom(self) -> str:
        return self.text if self.primary else f"({self.text})"

    @property
    def order(self) -> tuple[int, ...]:
        """For each of our axes, the one it is in torch."""
        rank = self.example.ndim
        return (0, *range(2, rank), 1) if self.last else tuple(range(rank))

    def axis(self, axis: int) -> int:
        """Returns our axis for torch's."""
        return self.order.index(axis % self.example.ndim)

    def to(self, last: bool) -> Value:
        """Returns the same array in the other layout, transposed in the source if it has to be."""
        if last == self.last:
            return self
        rank = self.example.ndim
        if rank < 3:
            return replace(self, last=False)
        order = (0, *range(2, rank), 1) if last else (0, rank - 1, *range(1, rank - 1))
        axes = ", ".join(map(str, order))
        return replace(self, text=f"{self.atom}.transpose({axes})", last=last, primary=True)


@dataclass(frozen=True)
class Option:
    """A literal in a constructor: where two instances of a class differ, it becomes an argument of the class."""

    name: str
    text: str
    positional: bool = False

    def render(self, text: str) -> str:
        """Writes the option with the literal, or with the argument that replaces it."""
        return text if self.positional else f"{self.name}={text}"


@dataclass(frozen=True)
class Make:
    """A call in a constructor: head, arguments as text or to be rendered, tail."""

    head: str
    items: tuple[str | Option | Make | Instance, ...] = ()
    tail: str = ")"

    @property
    def skeleton(self) -> Any:
        """All of it but the literals."""
        return (self.head, *(_skeleton(item) for item in self.items), self.tail)


def make(function: str, *positional: Option | Make | Instance | str, rngs: bool = True, **named: Any) -> Make:
    """Makes the call `function(positional, name=value, ..., rngs=rngs)`."""
    named_items = (Option(name, str(value)) for name, value in named.items())
    return Make(f"{function}(", (*positional, *named_items, *(("rngs=rngs",) if rngs else ())))


def sized(function: str, /, *sizes: tuple[str, Any], **named: Any) -> Make:
    """Calls make() with literals that go without a name."""
    return make(function, *(Option(name, str(value), positional=True) for name, value in sizes), **named)


def _skeleton(item: Any) -> Any:
    if isinstance(item, Option):
        return item.name
    if isinstance(item, Instance):
        return id(item.group)
    return item.skeleton if isinstance(item, Make) else item


@dataclass
class Statement:
    targets: tuple[int, ...]
    pattern: str  # of the targets, as "«1», «2»"; empty for a return
    text: str
    primary: bool
    execution: Any  # of which statement of the original
    names: tuple[str | None, ...]


@dataclass
class Body:
    """The statements of one method."""

    arguments: dict[str, int] = field(default_factory=dict)  # by name
    statements: list[Statement] = field(default_factory=list)
    lists: dict[str, int] = field(default_factory=dict)
    count: int = 0

    def token(self) -> int:
        self.count += 1
        return self.count

    def argument(self, name: str, length: int = 0) -> str:
        """Makes a name for an argument.

        `length` is that of a list or tuple.
        """
        self.arguments[name] = self.token()
        self.lists[f"«{self.count}»"] = length
        return f"«{self.count}»"

    def assign(self, value: Value, execution: Any, name: str | None) -> Value:
        if _TOKEN.fullmatch(value.text.removesuffix("[None]")) or value.text.isdigit():
            return value
        number = self.token()
        if name is None and isinstance(value.example, int):
            name = "n"
        self.statements.append(Statement((number,), f"«{number}»", value.text, value.primary, execution, (name,)))
        return replace(value, text=f"«{number}»", primary=True)

    def lines(self, result: str, execution: Any, taken: Iterable[str]) -> list[str]:
        """Writes the source of all statements, named.

        What is used once is written where it is used.
        """
        statements = [*self.statements, Statement((), "", result, True, execution, ())]
        statements = _inlined(_used(statements))
        names = {number: name for name, number in self.arguments.items()}
        reserved = {*_RESERVED, *taken}
        lines = []
        for i, statement in enumerate(statements):
            later = {int(n) for s in statements[i + 1 :] for n in _TOKEN.findall(s.text)}
            live = {names[number] for number in later if number in names}
            own = [int(n) for n in _TOKEN.findall(statement.text)]
            for token, length in self.lists.items():  # all items of a list are the list
                items = ", ".join(f"{token}[{j}]" for j in range(length))
                statement.text = statement.text.replace(f"[{items}]", token) if length else statement.text
            text = _TOKEN.sub(lambda match: names[int(match[1])], statement.text)
            pattern = statement.pattern
            for number, wish in zip(statement.targets, statement.names, strict=True):
                if number not in later:
                    pattern = pattern.replace(f"«{number}»", "_")
                    continue
                dying = [names[n] for n in own if n not in later]
                names[number] = _fresh(wish or (dying[0] if dying else "x"), live | reserved)
                live.add(names[number])
                pattern = pattern.replace(f"«{number}»", names[number])
            if pattern != text:
                lines.append(f"{pattern} = {text}" if pattern else f"return {text}")
        return lines


def _used(statements: list[Statement]) -> list[Statement]:
    kept: list[Statement] = []
    needed: set[int] = set()
    for statement in reversed(statements):
        if not statement.pattern or needed & set(statement.targets):
            kept.append(statement)
            needed |= {int(n) for n in _TOKEN.findall(statement.text)}
    return kept[::-1]


def _inlined(statements: list[Statement]) -> list[Statement]:
    """Rejoins what the original wrote into one expression, if it fits on a line."""
    uses = Counter(n for s in statements for n in _TOKEN.findall(s.text))
    result: list[Statement] = []
    for statement in statements:
        for earlier in reversed(result.copy()):
            token, text = earlier.pattern, statement.text
            same = statement.execution is not None and earlier.execution == statement.execution
            if not same or len(earlier.targets) != 1 or uses[token[1:-1]] != 1 or token not in text:
                continue
            if f":{token}" in text or f"{token}:" in text:  # a bound of a slice
                continue
            inner = earlier.text if earlier.primary or _stands_alone(text, token) else f"({earlier.text})"
            longer = text.replace(token, inner)
            if len(_TOKEN.sub("xxxx", longer)) <= LINE_LENGTH - 30:
                primary = earlier.primary if text == token else statement.primary
                statement = replace(statement, text=longer, primary=primary)
                result.remove(earlier)
        result.append(statement)
    return result


def _stands_alone(text: str, token: str) -> bool:
    """Tells whether the token is a whole argument, item or expression."""
    before, after = text.split(token)
    return (not before or before.endswith(("(", "[", ", ", "="))) and (not after or after[0] in "),]")


def _fresh(wish: str, taken: set[str]) -> str:
    name, number = wish, 1
    while name in taken:
        number += 1
        name = f"{wish}{number}"
    return name


def fold(text: str, indent: int) -> list[str]:
    """Folds one line of source into the lines that a formatter makes of it: the last brackets are opened first."""
    pad = " " * indent
    if indent + len(text) <= LINE_LENGTH:
        return [pad + text]
    split = _last_brackets(text)
    if split is None:
        return [pad + text]
    head, body, tail = split
    parts = _arguments(body)
    if indent + 4 + len(body) <= LINE_LENGTH:
        return [pad + head, f"{pad}    {body}", pad + tail]
    comma = "," if len(parts) > 1 or head[-1] != "(" or not parts[0].endswith(("]", "}")) else ""
    inner = [line for part in parts for line in fold(part + (comma or ""), indent + 4)]
    return [pad + head, *inner, pad + tail]


def _last_brackets(text: str) -> tuple[str, str, str] | None:
    end = len(text) - (1 if text.endswith(",") else 0)
    if not end or text[end - 1] not in ")]}":
        return None
    depth = 0
    for i in range(end - 1, -1, -1):
        depth += (text[i] in ")]}") - (text[i] in "([{")
        if depth == 0:
            return (text[: i + 1], text[i + 1 : end - 1], text[end - 1 :]) if end - 1 > i + 1 else None
    return None


def _arguments(body: str) -> list[str]:
    parts, depth, start, quoted = [], 0, 0, False
    for i, c in enumerate(body):
        quoted ^= c == '"'
        depth += 0 if quoted else (c in "([{") - (c in ")]}")
        if c == "," and depth == 0 and not quoted:
            parts.append(body[start:i].strip())
            start = i + 1
    return [*parts, body[start:].strip()]


@dataclass(eq=False)
class Group:
    """One generated class: the modules of one torch class whose translations differ in literals only."""

    name: str
    base: str
    call: tuple[str, ...]  # signature and lines of __call__
    note: str
    instances: list[Instance] = field(default_factory=list)
    arguments: dict[tuple[str, ...], str] = field(default_factory=dict)  # the literals of all instances -> its name

    def settle(self) -> None:
        """Names the literals in which instances differ."""
        columns = list(zip(*(instance.literals() for instance in self.instances), strict=True))
        for column in columns:
            texts = tuple(text for _, _, text in column)
            if len(set(texts)) > 1 and texts not in self.arguments:
                attribute, name, _ = column[0]
                taken = _RESERVED | set(self.arguments.values())
                self.arguments[texts] = name if name not in taken else _fresh(f"{attribute}_{name}", taken)

    def source(self) -> list[str]:
        """Writes the lines of the class."""
        lines = [f"class {self.name}({self.base}):", f'    """{self.note}"""']
        first = self.instances[0]
        if first.attributes or not self.call or self.base == "nnx.Module":
            columns = iter(zip(*(instance.literals() for instance in self.instances), strict=True))
            arguments = "".join(f", {name}" for name in self.arguments.values())
            lines += ["", f"    def __init__(self{arguments}, *, rngs: nnx.Rngs):"]
            for target, item in first.attributes:
                lines += fold(f"self.{target} = " * bool(target) + self._render(item, columns), 8)
            if not first.attributes:
                lines.append("        pass")
        if self.call:
            lines += ["", f"    {self.call[0]}", *(line for each in self.call[1:] for line in fold(each, 8))]
        return lines

    def _render(self, item: Any, columns: Any) -> str:
        if isinstance(item, str):
            return item
        if isinstance(item, Option):
            return item.render(self._literal(columns))
        if isinstance(item, Instance):
            values = [self._literal(columns) for _ in item.group.arguments]
            return f"{item.group.name}({', '.join([*values, 'rngs=rngs'])})"
        return item.head + ", ".join(self._render(each, columns) for each in item.items) + item.tail

    def _literal(self, columns: Any) -> str:
        column = next(columns)
        return self.arguments.get(tuple(text for _, _, text in column), column[0][2])


@dataclass(eq=False)
class Instance:
    """One module of a generated class."""

    group: Group
    attributes: tuple[tuple[str, Make | Instance | str], ...]

    def literals(self) -> list[tuple[str, str, str]]:
        """Lists attribute, name and text of each literal of the constructor, in order."""
        found: list[tuple[str, str, str]] = []

        def walk(attribute: str, item: Any) -> None:
            if isinstance(item, Option):
                found.append((attribute, item.name, item.text))
            elif isinstance(item, Instance):
                i = item.group.instances.index(item)
                found.extend((attribute, name, texts[i]) for texts, name in item.group.arguments.items())
            elif isinstance(item, Make):
                for each in item.items:
                    walk(attribute, each)

        for attribute, item in self.attributes:
            walk(re.sub(r"\W", "_", attribute), item)
        return found
