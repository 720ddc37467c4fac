"""The computation of a layer beside its weights: the options that travel with them, and how they are compared.

The options of a model are `{path: {"kind": ..., option: value, ...}}`, by the layer's path in torch. Kinds, options and
values are torch's, so that both packages mean the same by them, and those of the table KINDS below; values are numbers,
strings, booleans, None and lists. Where torch has no word, or two for one thing:

- `padding` is a [low, high] pair for each axis, of the input for a convolution (what output_padding adds is taken from
  the high side of a transposed one), or "same" where the stride makes it depend on the size of the input;
- `momentum` is the weight of the new statistics;
- `weight` and `bias` of a normalisation say which of them it has; `axes` are those that it normalises, from the last,
  `feature_axes` those of its weights, and None of a GroupNorm all but the batch;
- `gate` and `nonlinearity` of a recurrent layer are the functions of its gates and of its state, "mixed" if one
  direction has another than the other;
- `flatten_channels` of a Linear, or of a normalisation before it, is the number of channels of the convolution whose
  flattened output it reads; 0 if something is flattened whose channels are not known;
- `num_members` is in the options of a BatchEnsemble layer, which has the kind of the layer that it was made of.

Rates of dropout, dtypes, initialisation and all else that leaves the function in eval mode as it is are no options.
"""

from __future__ import annotations

import inspect
import math
import operator
import reprlib
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import CodeType, FunctionType
from typing import Any, NamedTuple, Protocol

Options = Mapping[str, Any]

MAX_LINES = 20

# What names and shapes of weights say, or the function of a model does not depend on.
_SHOWN = {"kind", "bias", "weight", "kernel_size", "padding_idx", "num_members", "flatten_channels"}

Check = Callable[[Any], bool]


class Text(str):
    """A value that is shown as code, without quotes."""

    __repr__ = str.__str__


class Missing(Text):
    """A value that the package has no argument for."""


class Table:
    """The rows of a package, each about a kind of layer, with `types` that it is about."""

    def __init__(self, rows: Iterable[Any]) -> None:
        self.rows = tuple(rows)
        self._by_type = {each: row for row in self.rows for each in row.types}

    def get(self, layer_type: type, field: str) -> Any:
        """Returns what the row of this type says in a field, or that of its nearest base class that says something."""
        rows = (self._by_type[each] for each in layer_type.__mro__ if each in self._by_type)
        return next((value for row in rows if (value := getattr(row, field)) is not None), None)

    def options(self, layer: Any) -> dict[str, Any] | None:
        """Returns the options of a layer, as a file has them, if its kind is known."""
        read = self.get(type(layer), "options")
        try:
            options = read and read(layer)
        except (AttributeError, TypeError, ValueError):  # a class derived from the kind, made in another way
            options = None
        if options is None:
            return None
        kind = options.pop("kind", self.get(type(layer), "kind"))
        members = {"num_members": layer.num_members} if hasattr(layer, "num_members") else {}
        return known_options(kind, options | members) if kind in KINDS else None


class Words(NamedTuple):
    """How a package says the options of its layers."""

    arguments: Callable[[str, Options], dict[str, Any]]  # that make a layer of this kind, with these options
    advice: Callable[[str, Mapping[str, Any]], str]  # the code that passes these arguments
    defaults: Mapping[str, Options]  # of activations that are functions, by kind
    options: Mapping[str, str]  # by the names of their arguments


class Inventory(Protocol):
    """What a model holds, by the names and paths that it has in torch."""

    words: Words

    @property
    def options(self) -> Mapping[str, Options]: ...

    @property
    def parts(self) -> Iterable[tuple[str, Any]]: ...

    @property
    def lengths(self) -> Mapping[str, int]: ...

    def weights(self, what: str) -> Mapping[str, Any]: ...


def _flag(value: Any) -> bool:
    return isinstance(value, bool)


def _number(value: Any) -> bool:  # finite, and small enough to be shown
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e100


def _integer(value: Any) -> bool:
    return isinstance(value, int) and _number(value)


def _list_of(check: Check, length: int | None = None) -> Check:
    lengths = range(1, 9) if length is None else (length,)
    return lambda value: isinstance(value, list) and len(value) in lengths and all(map(check, value))


def _one_of(*words: str | None) -> Check:
    return lambda value: (value is None or isinstance(value, str)) and value in words


def _or_none(check: Check) -> Check:
    return lambda value: value is None or check(value)


def _conv(rank: int) -> dict[str, Check]:
    pairs, same = _list_of(_list_of(_integer, 2), rank), _one_of("same")
    return {
        **dict.fromkeys(("kernel_size", "stride", "dilation"), _list_of(_integer, rank)),
        "padding": lambda value: same(value) or pairs(value),
        "padding_mode": _one_of("zeros", "circular", "reflect", "replicate"),
        "groups": _integer,
        "bias": _flag,
    }


_NORM: dict[str, Check] = {"eps": _number, "weight": _flag, "bias": _flag}

_AXES = {"axes": _list_of(_integer), "feature_axes": _list_of(_integer), "flatten_channels": _integer}

_STATISTICS: dict[str, Check] = {**_NORM, "momentum": _or_none(_number), "track_running_stats": _flag}

_FUNCTIONS = ("tanh", "relu", "sigmoid", "mixed")

_CELL: dict[str, Check] = {
    "bias": _flag,
    "nonlinearity": _one_of(*_FUNCTIONS),
    "residual": _flag,
}

_GATED = {**_CELL, "gate": _one_of(*_FUNCTIONS)}

_SEQUENCE: dict[str, Check] = {
    **dict.fromkeys(("num_layers", "proj_size"), _integer),
    **dict.fromkeys(("bidirectional", "batch_first", "reverse"), _flag),
}

_ACTIVATIONS: dict[str, dict[str, Check]] = {
    "GELU": {"approximate": _one_of("none", "tanh")},
    "LeakyReLU": {"negative_slope": _number},
    "ELU": {"alpha": _number},
    "CELU": {"alpha": _number},
    "Softplus": {"beta": _number, "threshold": _number},
    "Hardtanh": {"min_val": _number, "max_val": _number},
    **{
        kind: {}
        for kind in (
            *("ReLU", "ReLU6", "SiLU", "Mish", "SELU", "Sigmoid", "LogSigmoid", "Tanh", "Softsign", "Hardswish"),
            *("Hardsigmoid", "Softmax", "LogSoftmax", "GLU", "Identity"),
            *("Threshold", "Softshrink", "Hardshrink", "Tanhshrink"),
        )
    },
}

KINDS: dict[str, dict[str, Check]] = {
    **_ACTIVATIONS,
    "Linear": {"bias": _flag, "flatten_channels": _integer},
    **{f"Conv{n}d": _conv(n) | {"input_dilation": _list_of(_integer, n)} for n in (1, 2, 3)},
    **{f"ConvTranspose{n}d": _conv(n) for n in (1, 2, 3)},
    "Embedding": {
        "padding_idx": _or_none(_integer),
        "max_norm": _or_none(_number),
        "norm_type": _number,
    },
    "EmbeddingBag": {},
    "BatchNorm": _STATISTICS | {"flatten_channels": _integer},
    "InstanceNorm": _STATISTICS,
    "LayerNorm": _NORM | _AXES,
    "RMSNorm": {"eps": _number, "weight": _flag, **_AXES},
    "GroupNorm": _NORM | {"num_groups": _integer, "axes": _or_none(_list_of(_integer))},
    "MultiheadAttention": {
        "num_heads": _integer,
        **dict.fromkeys(("batch_first", "bias", "add_bias_kv", "add_zero_attn"), _flag),
    },
    **dict.fromkeys(("LSTMCell", "GRUCell"), _GATED),
    **dict.fromkeys(("LSTM", "GRU"), _GATED | _SEQUENCE),
    "RNNCell": _CELL,
    "RNN": _CELL | _SEQUENCE,
    "PReLU": {},
}


def same_padding(kernel_size: Sequence[int], stride: Sequence[int], dilation: Sequence[int]) -> list[list[int]] | str:
    """Returns the pairs that keep the size, which strides make depend on it."""
    extents = [d * (k - 1) for k, d in zip(kernel_size, dilation, strict=True)]
    if any(extent and s > 1 for extent, s in zip(extents, stride, strict=True)):
        return "same"
    return [[extent // 2, extent - extent // 2] for extent in extents]


def known_options(kind: str, options: Options) -> dict[str, Any]:
    """Returns the options of one layer of this package, as a file can hold them, without those that it cannot."""
    plain = {name: _plain(value) for name, value in options.items() if name in _checks(kind)}
    return {"kind": kind, **{name: value for name, value in plain.items() if _checks(kind)[name](value)}}


def check_same_options(what: str, inventory: Inventory, recorded: Any) -> None:
    """Compares the options of the layers that a model and a file both have, in the words of the package.

    What the file says is untrusted: it is shown, cut short, and compared, and nothing else. A warning lists layers that
    only the file has, if they are likely to make a difference.

    Raises:
        ValueError: with a line for every difference, which ends with the argument to change.
    """
    if not isinstance(recorded, Mapping):
        raise ValueError(
            f"{what} expects recorded options to be {{path: {{option: value}}}}; got {_cut(recorded)}. "
            f"To load the weights without them, pass check_options=False."
        )
    lines = []
    for path, here in inventory.options.items():
        there = recorded.get(path)
        if isinstance(there, Mapping):
            lines += [f"{path or '(root)'}: {line}" for line in _differences(here, there, inventory.words)]
        elif there is not None:
            lines.append(f"{path or '(root)'}: {_cut(there)} in the file, which is no table of options")
    if lines:
        listed = "\n  ".join(lines)
        raise ValueError(
            f"{what} expects layers with the options of those in the file; got {len(lines)} that differ:\n  {listed}\n"
            f"Pass these arguments, or load the weights all the same: check_options=False."
        )
    unknown = _not_compared(what, inventory, recorded)
    if unknown:
        listed = "\n  ".join(unknown[:MAX_LINES] + ["..."] * (len(unknown) > MAX_LINES))
        warnings.warn(
            f"{what} expects the layers of the file to be here by the same names, to compare their options; got "
            f"{len(unknown)} that are not, and may compute something else here:\n  {listed}\n"
            f"Give the layers these names; or, if they compute the same, pass check_options=False.",
            stacklevel=3,
        )


def _not_compared(what: str, inventory: Inventory, recorded: Mapping[Any, Any]) -> list[str]:
    """Returns a line for each layer that is not compared, if it has no other name here.

    It is a layer that has weights here, or a normalisation that has none. Or it is an activation that is beyond the end
    of a Sequential, or that the code of this place calls without its options.
    """
    own, words, parts = inventory.options, inventory.words, dict(inventory.parts)
    here: set[str] = set()
    elsewhere = [options for path, options in own.items() if path not in recorded]
    lines = []
    for path, there in recorded.items():
        kind = there.get("kind") if isinstance(there, Mapping) else None
        if path in own or not isinstance(kind, str) or kind not in KINDS:
            continue
        here = here or _prefixes(inventory.weights(what))
        checks = _checks(kind)
        given = {name: there[name] for name in checks if name in there and checks[name](there[name])}
        told = {name: value for name, value in given.items() if name not in _SHOWN and value is not None}
        code = ""
        if kind in _ACTIVATIONS:
            parent, _, last = path.rpartition(".")
            beyond = last.isdecimal() and len(last) < 9 and int(last) >= inventory.lengths.get(parent, 10**9)
            defaults = words.defaults.get(kind, told)
            changed = {name: told[name] for name in told if not _equal(told[name], defaults.get(name))}
            values = words.arguments(kind, changed)
            inline = bool(changed) and any(_calls(parts.get(each), kind, values) for each in (path, parent))
            likely = kind != "Identity" and (beyond or inline)
            code = f"; {words.advice(kind, values)}"
        else:
            likely = bool(told) if path in here else kind.endswith("Norm") and given.get("weight") is False
        if likely and not any(kind == each["kind"] and _same(kind, each, given) for each in elsewhere):
            options = ", ".join(f"{name} {value!r}" for name, value in told.items())
            lines.append(f"{_cut(path)}: {kind}{' of ' if options else ''}{options}{code}")
    return lines


def _prefixes(names: Iterable[str]) -> set[str]:
    """Returns the paths of all that these names are in."""
    return {name[:end] for name in names for end, letter in enumerate(name) if letter == "."} | {""}


def _calls(value: Any, kind: str, arguments: Mapping[str, Any]) -> bool:
    """Tells whether code calls a function of this kind without its arguments.

    The code is that of a function, or of a module's methods.
    """
    functions = [value, *(each for base in type(value).__mro__ for each in vars(base).values())]
    unwrapped = (inspect.unwrap(each) for each in functions if callable(each))
    codes = [each.__code__ for each in unwrapped if isinstance(each, FunctionType)]
    for code in codes:  # with those of the functions in it
        codes += [constant for constant in code.co_consts if isinstance(constant, CodeType)]
    calling = [code for code in codes if any(name.replace("_", "") == kind.lower() for name in code.co_names)]
    wanted = {repr(each) for argument in arguments.items() for each in argument}
    constants = ([each if isinstance(each, tuple) else (each,) for each in code.co_consts] for code in calling)
    return any(wanted.isdisjoint(repr(each) for group in groups for each in group) for groups in constants)


def _differences(here: Options, there: Options, words: Words) -> list[str]:
    kind = there.get("kind", here["kind"])
    if not isinstance(kind, str) or kind not in KINDS:
        return []
    checks = _checks(kind)
    named = {name: value for name, value in there.items() if isinstance(name, str) and name in checks}
    given = {name: value for name, value in named.items() if checks[name](value)}
    lines = [
        f"{name} {_cut(value)} in the file, which no {kind} can have"
        for name, value in named.items()
        if name not in given
    ]
    if kind != here["kind"]:
        rank = {name: tuple(given[name]) for name in ("kernel_size",) if name in given}
        return [*lines, f"{here['kind']} here, {kind} in the file; {words.advice(kind, rank)}"]
    both = {name: here[name] if _equal(here[name], value) else value for name, value in given.items() if name in here}
    ours, theirs = words.arguments(kind, here), words.arguments(kind, {**here, **both})
    if "num_members" in both and both["num_members"] != here["num_members"]:
        members = both["num_members"]
        lines.append(
            f"num_members {here['num_members']} here, {members} in the file; batchensemble(..., num_members={members})"
        )
    return lines + [
        f"{name} {ours[name]!r} here, {theirs[name]!r} in the file; {words.advice(kind, {name: theirs[name]})}"
        for name in ours
        if name in theirs and not _equal(ours[name], theirs[name])
    ]


def _same(kind: str, a: Options, b: Options) -> bool:
    return all(_equal(a[name], b[name]) for name in _checks(kind) if name in a and name in b)


def _equal(a: Any, b: Any) -> bool:
    numbers = _number(a) and _number(b)
    return math.isclose(a, b, rel_tol=1e-9) if numbers else bool(a == b)  # decimals that went through a subtraction


def _plain(value: Any) -> Any:
    """Returns numbers and sequences of any framework as Python's own."""
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    if value is None or isinstance(value, (bool, str)):
        return value
    for number in (operator.index, float):
        try:
            return number(value)
        except (TypeError, ValueError):
            continue
    return value


def _cut(value: Any) -> str:
    try:
        return reprlib.repr(value)
    except ValueError:  # an integer of more digits than Python prints
        return type(value).__name__


def _checks(kind: str) -> dict[str, Check]:
    return KINDS[kind] | {"num_members": _integer}
