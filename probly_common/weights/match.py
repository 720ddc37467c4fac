"""Finds which array of a file goes where, and says what does not fit."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

from probly_common.checks.values import shown, type_name
from probly_common.checks.weights import Specs, castable, listed, weight_name
from probly_common.weights.files import Arrays

MAX_AXES = 8

MAX_COMPARISONS = 20_000  # of names, when near ones are looked for


def check_tied(
    what: str, identities: Mapping[str, Any], arrays: Mapping[str, Any], next_step: str = "arrays[{b}] = arrays[{a}]"
) -> None:
    """Raises unless names of one tensor carry one value."""
    first: dict[Any, str] = {}
    for name, identity in identities.items():
        other = first.setdefault(identity, name)
        if other == name:
            continue
        a, b = arrays[other], arrays[name]
        if ((a != b) & ~((a != a) & (b != b))).any():  # NaN equals NaN here
            raise ValueError(
                f"{what} expects equal arrays for {other} and {name}, which are tied in this model; got arrays that "
                f"differ, and loaded nothing. Take one of them: {next_step.format(a=repr(other), b=repr(name))}."
            )


def check_tied_names(
    what: str, names: Mapping[str, str], identities: Mapping[str, Hashable], read: Callable[[str], Any]
) -> None:
    """Raises unless names here of one tensor are loaded from arrays of one value, if they are from two.

    `read` is by names here.
    """
    sources: dict[Hashable, dict[str, str]] = {}
    for here, there in names.items():
        sources.setdefault(identities[here], {}).setdefault(there, here)
    for identity, found in sources.items():
        if len(found) > 1:
            arrays = {here: read(here) for here in found.values()}
            check_tied(what, dict.fromkeys(found.values(), identity), arrays, "ignore=[{b}]")


class Choices(NamedTuple):
    """What the caller of load_weights chose."""

    strict: bool
    rename: Mapping[str, str] | None
    ignore: str | Iterable[str]
    cast: bool


class Targets(NamedTuple):
    """What a model takes, by the names that it has in torch."""

    specs: Specs
    identities: Mapping[str, Hashable]  # names of one identity are of one tensor
    dtypes: Mapping[str, Collection[str]] = {}  # that a tensor takes beside its own


class Plan(NamedTuple):
    """The array there for each name here that is to be loaded, and the dtype that it is to have."""

    names: dict[str, str]
    dtypes: dict[str, str]


def match_names(what: str, targets: Targets, arrays: Arrays, choices: Choices) -> Plan:
    """Finds the array for each target. Everything that does not fit is reported at once."""
    expected, identities, dtypes = targets
    given, tied = arrays.specs, arrays.tied
    strict, rename, ignore, cast = choices
    there = {new: old for old, new in rename_all(what, given, rename).items()}
    ignored = ignored_names(what, ignore, expected, there)
    wanted = [name for name in expected if name not in ignored]
    left_out = {identities[name]: name for name in expected if name in ignored}
    left_there = {name: tied.get(there[name], there[name]) for name in left_out.values() if name in there}
    there = {new: old for new, old in there.items() if new not in ignored}
    unexpected = [name for name in there if name not in expected]
    stands_for = {identities[name]: old for name, old in there.items() if name in identities}
    for name in wanted:
        if name not in there and identities[name] in stands_for:  # a tied tensor that is kept once
            there[name] = stands_for[identities[name]]
    loaded = {tied.get(there[name], there[name]) for name in wanted if name in there}
    unexpected = [name for name in unexpected if tied.get(there[name], there[name]) not in loaded]
    shared = {
        name: left_out[identities[name]]
        for name in wanted
        if name in there
        and identities[name] in left_out
        # an array of its own is the one of two that the caller chose to leave out
        and left_there.get(left_out[identities[name]], there[name]) in (there[name], tied.get(there[name]))
    }
    missing = [name for name in wanted if name not in there and name.rpartition(".")[2] != "num_batches_tracked"]

    misfits, all_castable = [], True
    for name in wanted:
        if name in there:
            (shape, dtype), (given_shape, given_dtype) = expected[name], given[there[name]]
            if shape != given_shape:
                misfits.append(f"  shape: {shown(name)} is {shape} here, {str(given_shape)[:100]} there")
            same = given_dtype in (dtype, *dtypes.get(name, ()))
            possible = same or castable(given_dtype, dtype)
            if not (same or (cast and possible)):
                misfits.append(f"  dtype: {shown(name)} is {dtype} here, {given_dtype} there")
            all_castable = all_castable and shape == given_shape and possible
    names = {name: there[name] for name in wanted if name in there}

    suggestion = _suggested_rename(missing, unexpected)
    near = {} if suggestion else nearest_names(missing, unexpected)
    unmatched = [
        f"  missing: {shown(name)}" + (f" (rename {shown(near[name])}?)" if name in near else "") for name in missing
    ] + [f"  unexpected: {shown(name)}" for name in unexpected]
    counts_only = all(name.rpartition(".")[2] == "num_batches_tracked" for name in names)
    problems = misfits + unmatched if strict or counts_only else misfits
    if problems:
        next_step = "Pass the arrays of to_arrays(model), or build the model that these arrays come from."
        if suggestion:
            next_step = f"Pass rename={suggestion!r}."
        elif all_castable and not unmatched:
            next_step = "To convert floating-point numbers, or integers, pass cast=True."
        raise ValueError(
            f"{what} expects the names, shapes and dtypes of the model it loads into; got {len(problems)} differences "
            f"and loaded nothing:\n{listed(problems)}\n{next_step}"
        )
    for name, other in shared.items():
        warnings.warn(
            f"{what} changes {shown(other)}, which ignore leaves out, with {shown(name)}, to which it is tied here. To "
            f"keep it as it is, ignore both: ignore=[{other[:100]!r}, {name[:100]!r}].",
            stacklevel=4,
        )
    if unmatched:
        warnings.warn(
            f"{what} loads {len(names)} arrays under strict=False, and leaves out what has no counterpart:\n"
            f"{listed(unmatched)}\nPass rename={suggestion or {'^old': 'new'}!r}, or name what is to be left out: "
            f"ignore=['head.*'].",
            stacklevel=4,
        )
    names = {here: tied.get(there, there) for here, there in names.items()}
    final = {here: given[there][1] for here, there in names.items()}
    return Plan(
        names,
        {here: dtype if dtype in dtypes.get(here, ()) else expected[here][1] for here, dtype in final.items()},
    )


def rename_all(what: str, names: Collection[str], rename: Mapping[str, str] | None) -> dict[str, str]:
    """Returns each name's new name, by the regular expressions of the caller."""
    if rename is not None and not (
        isinstance(rename, Mapping) and all(isinstance(text, str) for pair in rename.items() for text in pair)
    ):
        raise TypeError(
            f"{what} expects rename to map regular expressions to what replaces them; got {type_name(rename)}. Pass "
            f'rename={{r"^module\\.": ""}}.'
        )
    texts, unused = list(names), []
    for pattern, replacement in (rename or {}).items():
        after = [_renamed(what, text, {pattern: replacement}) for text in texts]
        if not any(re.search(pattern, text) for text in texts):
            unused.append(pattern)
        texts = after
    if unused:
        used = {pattern: replacement for pattern, replacement in (rename or {}).items() if pattern not in unused}
        raise ValueError(
            f"{what} expects every pattern of rename to match a name there; got {unused!r}, which match none. Leave "
            f"them out: rename={used!r}."
        )
    renamed: dict[str, str] = {}
    first: dict[str, str] = {}
    for name, new in zip(names, texts, strict=True):
        renamed[name] = new
        if first.setdefault(new, name) != name:
            raise ValueError(
                f"{what} expects rename to keep names apart; got {shown(first[new])} and {shown(name)}, which both "
                f"become {shown(new)}. Rename one of them otherwise: rename={{{re.escape(name)[:100]!r}: 'other'}}."
            )
    return renamed


def ignored_names(
    what: str, ignore: str | Iterable[str], expected: Iterable[str], there: Mapping[str, str]
) -> set[str]:
    """Returns the names, in this model's words, that patterns leave out.

    Arrays may be called by their old names too.
    """
    patterns = _patterns(what, ignore)
    spellings = [(name, name) for name in expected] + [
        pair for new, old in there.items() for pair in ((new, new), (new, old))
    ]
    ignored = {pattern: {name for name, text in spellings if fnmatchcase(text, pattern)} for pattern in patterns}
    unused = [pattern for pattern, names in ignored.items() if not names]
    if unused:
        raise ValueError(
            f"{what} expects every pattern of ignore to match a name, here or there; got {unused!r}, which match none. "
            f"Leave them out: ignore={[pattern for pattern in patterns if pattern not in unused]!r}."
        )
    return set().union(*ignored.values())


def renamed_paths(
    what: str,
    recorded: Mapping[str, Any],
    rename: Mapping[str, str] | None,
    ignore: str | Iterable[str],
    names: Iterable[str] = (),
) -> dict[str, Any]:
    """Returns what a file records of layers, by the paths that they have here.

    Layers whose weights are ignored are left out.

    A layer goes where its weight goes, by the names of its weights there. One of several layers in a row that become
    several here, like an LSTM of num_layers=2, is that many.
    """
    patterns = _patterns(what, ignore)
    weights: dict[str, list[str]] = {}
    for name in names:
        parts = name.rsplit(".", 3)  # the longest are parametrizations.weight.original0
        for path in {".".join(parts[:-count]) for count in (1, 2, 3)} & recorded.keys():
            weights.setdefault(path, []).append(name)
    kept: dict[str, Any] = {}
    for path in sorted(recorded, key=lambda path: path in weights):  # those that have weights last, which count
        value = recorded[path]
        paths: dict[str, bool] = {}
        for name in sorted(weights.get(path, [weight_name(path)]), key=lambda name: "weight" not in name[len(path) :]):
            inner = name[len(path) :].removeprefix(".").count(".") + 1
            new = _renamed(what, name, rename)
            here = ".".join(new.split(".")[:-inner])
            spellings = (name, new) if path in weights else (name, new, path, here)
            is_ignored = any(fnmatchcase(text, pattern) for pattern in patterns for text in spellings)
            paths[here] = paths.get(here, False) or not is_ignored
        loaded = [here for here, is_loaded in paths.items() if is_loaded]
        layers = value.get("num_layers") if isinstance(value, Mapping) else None
        if isinstance(layers, int) and len(paths) > 1:
            kept |= {here: {**value, "num_layers": layers // len(paths)} for here in loaded}
        else:
            kept |= dict.fromkeys(loaded[:1], value)
    return kept


def _renamed(what: str, name: str, rename: Mapping[str, str] | None) -> str:
    for pattern, replacement in (rename or {}).items():
        try:
            name = re.sub(pattern, replacement, name)
        except re.error as error:
            raise ValueError(
                f"{what} expects regular expressions and replacements in rename; got {pattern!r}: {replacement!r}, "
                f"which Python refuses: {error}. To match text as it is, pass re.escape({pattern!r})."
            ) from error
    return name


def _patterns(what: str, ignore: Any) -> list[str]:
    patterns = [ignore] if isinstance(ignore, str) or not isinstance(ignore, Iterable) else list(ignore)
    if not all(isinstance(pattern, str) for pattern in patterns):
        raise TypeError(f"{what} expects ignore to hold name patterns; got {patterns!r}. Pass ignore=['head.*'].")
    return patterns


def nearest_names(missing: Sequence[str], unexpected: Sequence[str]) -> dict[str, str]:
    if len(missing) * len(unexpected) > MAX_COMPARISONS or any(len(name) > 200 for name in (*missing, *unexpected)):
        return {}
    near = {name: get_close_matches(name, unexpected, n=1, cutoff=0.5) for name in missing}
    return {name: found[0] for name, found in near.items() if found}


def _suggested_rename(missing: Sequence[str], unexpected: Sequence[str]) -> dict[str, str] | None:
    """Suggests the part of a name that tells most names there from those here.

    It is a prefix, like `module.`, or a part, like `_orig_mod.`.
    """
    parametrized = "parametrizations.weight.original"
    if any(m.endswith(f"{parametrized}0") for m in missing) and any(u.endswith("weight_g") for u in unexpected):
        return {r"weight_g$": f"{parametrized}0", r"weight_v$": f"{parametrized}1"}  # by torch's older weight_norm
    candidates = []
    for name in missing[:1]:
        candidates += [(f"^{re.escape(u.removesuffix(name))}", "") for u in unexpected if u.endswith(f".{name}")][:4]
    for name in unexpected[:1]:
        prefixes = [m.removesuffix(name) for m in missing if m.endswith(f".{name}")][:4]
        candidates += [("^", prefix.replace("\\", r"\\")) for prefix in prefixes]
    candidates += [(r"\b_orig_mod\.", ""), (r"\bmodule\.", "")]
    here = set(missing)
    solved = {pair: len(here & {re.sub(*pair, name) for name in unexpected}) for pair in candidates}
    best = max(solved, key=lambda pair: solved[pair])
    return dict([best]) if 2 * solved[best] > len(missing) and len(repr(best)) < 200 else None
