"""Checks of weights that are loaded: which array goes where, and what does not fit.

The same file, byte for byte, in probly_torch and probly_flax; it imports no framework. Names come from files, and are
shown as text that has no way to act: cut, and quoted where they hold anything but letters, digits, dots and dashes.
"""

from __future__ import annotations

import json
import math
import re
import warnings
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any

from ._checks import index, type_name

Specs = Mapping[str, tuple[tuple[int, ...], str]]  # shape and dtype by name

MAX_LINES = 2000
MAX_AXES = 8
MAX_COMPARISONS = 20_000  # of names, when near ones are looked for


def shown(text: str, width: int = 100) -> str:
    """Text of a file as part of a sentence."""
    if len(text) > width:
        text = f"{text[: width // 2]}...{text[-width // 2 :]}"
    return text if re.fullmatch(r"[\w.-]+", text, re.ASCII) else ascii(text)


def castable(dtype: str, to: str) -> bool:
    """Between floating-point numbers, and between integers."""
    return any(kind in dtype and kind in to for kind in ("float", "int"))


def weight_name(path: str) -> str:
    return f"{path}.weight" if path else "weight"


def check_numpy(what: str, arrays: Any) -> None:
    if not isinstance(arrays, Mapping):
        raise TypeError(f"{what} expects arrays by name; got {type_name(arrays)}. Pass to_arrays(model).")
    if isinstance(arrays.get("state_dict"), Mapping):
        raise TypeError(
            f"{what} expects arrays by name; got a checkpoint that holds them as its state_dict. Call "
            f'load_arrays(model, checkpoint["state_dict"], rename={{r"^model\\.": ""}}).'
        )
    for name, array in arrays.items():
        if not isinstance(name, str):
            raise TypeError(f"{what} expects arrays by name, a string; got {shown(repr(name))}. Pass to_arrays(model).")
        if not hasattr(getattr(array, "dtype", None), "name"):
            raise TypeError(
                f"{what} expects NumPy arrays by name; got {type_name(array)} for {shown(str(name))}. Pass "
                f"to_arrays(model)."
            )


def check_model(what: str, model: Any, kind: type, example: str) -> None:
    if not isinstance(model, kind):
        raise TypeError(
            f"{what} expects a Module of {kind.__module__.partition('.')[0]}; got {type_name(model)}. Pass {example}."
        )


def check_tensors(what: str, others: Sequence[str], sparse: Sequence[str]) -> None:
    """Weights that are packed, or sparse, have no form that another framework reads."""
    if others or sparse:
        raise ValueError(
            f"{what} expects a state_dict of dense tensors; got others, such as {shown((*others, *sparse)[0])}. "
            f"Take the model before it is quantised; make a sparse tensor dense: tensor.to_dense()."
        )


def check_writable(what: str, copies: Sequence[str], inference: Sequence[str], expanded: Sequence[str]) -> None:
    """What a state_dict gives is the memory of the model itself, and may be written to."""
    if copies:
        raise ValueError(
            f"{what} expects a state_dict of the parameters and buffers themselves; got copies, such as "
            f"{shown(copies[0])}, and loaded nothing. Let the module load itself: model.load_state_dict(tensors)."
        )
    if inference or expanded:
        reason = "made under torch.inference_mode()" if inference else "expanded, whose elements share memory"
        name = (*inference, *expanded)[0]
        raise ValueError(
            f"{what} expects tensors that can be written to; got {shown(name)}, which is {reason}, and loaded nothing. "
            f"Give the model a tensor of its own: tensor.clone()."
        )


def check_materialized(what: str, names: Sequence[str]) -> None:
    if names:
        raise ValueError(
            f"{what} expects a model with memory to load into; got meta tensors, such as {names[0]}. Call "
            f"model.to_empty(device='cpu') first."
        )


def check_has_values(what: str, names: Sequence[str]) -> None:
    if names:
        raise ValueError(
            f"{what} expects a model with values; got one without, such as {names[0]}. Load them first: "
            f"load_weights(model, path)."
        )


def check_together(what: str, name: str, others: Sequence[str]) -> None:
    if others:
        raise ValueError(
            f"{what} expects {name} and {', '.join(others)} together, which are one parameter in Flax; got the first "
            f"alone. Leave both out: ignore={[name, *others]!r}."
        )


def check_loaded_dtype(what: str, name: str, dtype: str, loaded: str) -> None:
    if dtype != loaded:
        raise ValueError(
            f"{what} expects to keep the dtype of {name}, {dtype}; got {loaded}, which JAX makes of it unless 64-bit "
            f"types are on. Call it under jax.enable_x64(True)."
        )


def check_integers(
    what: str, names: Mapping[str, str], specs: Specs, dtypes: Mapping[str, str], arrays: Mapping[str, Any]
) -> None:
    """Integers that are converted fit."""
    for here, there in names.items():
        if dtypes[here] != specs[there][1] and "int" in dtypes[here]:
            array = arrays[there]
            if (array.astype(dtypes[here]) != array).any():
                raise ValueError(
                    f"{what} expects integers of {shown(here)} that {dtypes[here]} has; got others, such as "
                    f"{array.max()}, and loaded nothing. Leave them out: ignore=[{here[:100]!r}]."
                )


def check_tied(
    what: str, identities: Mapping[str, Any], arrays: Mapping[str, Any], next_step: str = "arrays[{b}] = arrays[{a}]"
) -> None:
    """Names of one tensor carry one value."""
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
    """Names here of one tensor are loaded from arrays of one value, if they are from two; `read` is by names here."""
    sources: dict[Hashable, dict[str, str]] = {}
    for here, there in names.items():
        sources.setdefault(identities[here], {}).setdefault(there, here)
    for identity, found in sources.items():
        if len(found) > 1:
            arrays = {here: read(here) for here in found.values()}
            check_tied(what, dict.fromkeys(found.values(), identity), arrays, "ignore=[{b}]")


def match_names(
    what: str,
    expected: Specs,
    given: Specs,
    identities: Mapping[str, Hashable],
    dtypes: Mapping[str, Collection[str]],
    tied: Mapping[str, str],
    *,
    strict: bool,
    rename: Mapping[str, str] | None,
    ignore: str | Iterable[str],
    cast: bool,
) -> dict[str, str]:
    """The name there for each name here that is to be loaded.

    Names of one identity are of one tensor; `dtypes` are those that a tensor takes beside its own; `tied` has other
    names of arrays there. Everything that does not fit is reported at once.
    """
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
    near = {} if suggestion else _near(missing, unexpected)
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
            f"and loaded nothing:\n{_lines(problems)}\n{next_step}"
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
            f"{_lines(unmatched)}\nPass rename={suggestion or {'^old': 'new'}!r}, or name what is to be left out: "
            f"ignore=['head.*'].",
            stacklevel=4,
        )
    return names


def rename_all(what: str, names: Collection[str], rename: Mapping[str, str] | None) -> dict[str, str]:
    """Each name's new name, by the regular expressions of the caller."""
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
    """The names, in this model's words, that patterns leave out; arrays may be called by their old names too."""
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
    """What a file records of layers, by the paths that they have here, but for those whose weights are ignored.

    Of the names of its weights there, a layer goes where its weight goes; one of several layers in a row that become
    several here, such as an LSTM of num_layers=2, is that many.
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


def linear_sizes(options: Mapping[str, Mapping[str, Any]], shapes: Mapping[str, Sequence[int]]) -> dict[str, int]:
    """in_features of each Linear layer, and of each normalisation that may stand before one, by path."""
    sizes: dict[str, int] = {}
    for path, option in options.items():
        names = {"Linear": ("weight",), "BatchNorm": ("weight", "running_mean")}.get(option["kind"], ())
        if option["kind"] in ("LayerNorm", "RMSNorm") and option.get("axes") == [-1]:
            names = ("weight", "bias")
        found = [shapes[name] for own in names if (name := f"{path}.{own}" if path else own) in shapes]
        if found:
            sizes[path] = found[0][-1]
    return sizes


def check_flatten(what: str, flatten: Any, linear: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
    """(channels, *spatial) of the convolution outputs that Linear layers read, by the layers' paths."""
    if not isinstance(flatten, Mapping):
        raise TypeError(
            f"{what} expects flatten to map paths of Linear layers to (channels, *spatial); got {type_name(flatten)}. "
            f'Pass flatten={{"fc1": (64, 7, 7)}}.'
        )
    sizes, problems = {}, []
    for path, given in flatten.items():
        shape = tuple(index(size) for size in given) if isinstance(given, Sequence) else ()
        if not isinstance(path, str) or path not in linear:
            problems.append(f"  {shown(str(path))}: no Linear layer of this model, nor a normalisation")
        elif not 1 <= len(shape) <= MAX_AXES or any(size is None or not 1 <= size <= linear[path] for size in shape):
            problems.append(f"  {shown(path)}: {shown(repr(given))} is not (channels, *spatial) of {linear[path]}")
        elif math.prod(size or 0 for size in shape) != linear[path]:
            count = math.prod(size or 0 for size in shape)
            problems.append(f"  {shown(path)}: {given} has {count} elements, not {linear[path]}")
        sizes[path] = tuple(size or 0 for size in shape)
    if problems:
        layers = [f"{shown(path)} ({features})" for path, features in linear.items()]
        example = next(iter(linear), "fc1")
        raise ValueError(
            f"{what} expects flatten to give (channels, *spatial) of the outputs that Linear layers read flattened, of "
            f"in_features elements; got others:\n{_lines(problems)}\nLinear layers here, with in_features: "
            f'{", ".join(layers[:50]) or "none"}. Pass flatten={{"{example}": (channels, height, width)}}.'
        )
    return sizes


def check_flattened(
    what: str, options: Mapping[str, Any], flatten: Mapping[str, Any], linear: Mapping[str, int], save: str = ""
) -> None:
    """Layers that are known to read a flattened convolution, with more than one position, have a flatten.

    Of 0 channels, it is not known how many they are. `save` is the function in Flax that should have been told.
    """
    channels = {
        path: index(options[path].get("flatten_channels"))
        for path in linear
        if path not in flatten and isinstance(options.get(path), Mapping)
    }
    needed = {
        path: c
        for path, c in channels.items()
        if c is not None and (c == 0 < linear[path] - 1 or (1 < c < linear[path] and linear[path] % c == 0))
    }
    if needed:
        example = ", ".join(f'"{path}": ({c or "channels"}, height, width)' for path, c in needed.items())
        counts = ", ".join(
            f"{shown(path)} reads {linear[path]}" + (f" = {c} x {linear[path] // c}" if c else "")
            for path, c in needed.items()
        )
        there = f"to {save} in Flax, which wrote this file" if save else ""
        place = "the network in Flax" if save else "this network"
        raise ValueError(
            f"{what} expects the shape of a convolution's output where a Linear layer reads it flattened, since torch "
            f"has channels first there, and Flax last; got none: {counts}. Pass "
            f"flatten={{{'..., ' if flatten else ''}{example}}}"
            f"{f' {there}' if there else ''}; or flatten={{}}{', there or here,' if save else ''} if {place} "
            f"transposes to channels first before it flattens, or flattens nothing."
        )


def warn_flattened(
    what: str, options: Mapping[str, Mapping[str, Any]], shapes: Mapping[str, Sequence[int]], where: str
) -> None:
    """A Linear layer that follows a convolution, of so many inputs as if it read a square image of its channels."""
    last, found = (0, 0), {}
    for name, shape in shapes.items():
        path, _, own = name.rpartition(".")
        kind = options.get(path, {}).get("kind", "")
        if own == "weight" and kind.startswith("Conv"):
            rank = int(kind[-2])
            of_group = shape[-rank - 1] * options[path].get("groups", 1)
            last = of_group if kind.startswith("ConvTranspose") else shape[-rank - 2], rank
        elif own == "weight" and kind.endswith("Norm"):
            last = shape[-1], last[1]
        elif own == "weight" and kind == "Linear":
            channels, rank = last
            count = shape[-1] // channels if channels > 1 and shape[-1] % channels == 0 else 1
            if count > 1 and rank > 1 and round(count ** (1 / rank)) ** rank == count:
                found[path] = (channels, *[round(count ** (1 / rank))] * rank)
            last = 0, 0
        elif kind != "PReLU" and (
            own == "weight" or not (kind.startswith(("Conv", "Linear")) or kind.endswith("Norm"))
        ):
            last = 0, 0
    if found:
        warnings.warn(
            f"{what} expects to be told where a Linear layer reads the output of a convolution flattened, since torch "
            f"has channels first there, and Flax last; got no flatten, and "
            f"{', '.join(f'{shown(path)} after a convolution of {shape[0]} channels' for path, shape in found.items())}"
            f". If it reads that, pass flatten={found!r}{where}; if not, flatten={{}}.",
            stacklevel=3,
        )


def read_json(what: str, metadata: Mapping[str, str], key: str) -> dict[str, Any]:
    """What a file records of its model; nothing, if it was written by others."""
    text = metadata.get(key, "{}")
    try:
        recorded = json.loads(text)
    except (ValueError, RecursionError):
        recorded = None
    if not isinstance(recorded, dict):
        raise ValueError(
            f"{what} expects JSON, {{path: ...}}, in the metadata that is called {key}; got {shown(text)}. Write the "
            f"file again with save_weights(model, path)."
        )
    return recorded


def warn_not_finite(what: str, names: Sequence[str]) -> None:
    if names:
        warnings.warn(
            f"{what} loads arrays with values that are NaN or infinite, in the dtype they have here:\n"
            f"{_lines([f'  {shown(name)}' for name in names])}\nTo keep the model's own, name them: "
            f"ignore=[{names[0][:100]!r}].",
            stacklevel=4,
        )


def _renamed(what: str, name: str, rename: Mapping[str, str] | None) -> str:
    for pattern, replacement in (rename or {}).items():
        try:
            name = re.sub(pattern, replacement, name)
        except re.error as error:
            raise ValueError(
                f"{what} expects regular expressions and replacements in rename; got {pattern!r}: {replacement!r}, "
                f"where Python finds: {error}. To match text as it is, pass re.escape({pattern!r})."
            ) from error
    return name


def _patterns(what: str, ignore: Any) -> list[str]:
    patterns = [ignore] if isinstance(ignore, str) or not isinstance(ignore, Iterable) else list(ignore)
    if not all(isinstance(pattern, str) for pattern in patterns):
        raise TypeError(f"{what} expects ignore to hold name patterns; got {patterns!r}. Pass ignore=['head.*'].")
    return patterns


def _lines(lines: Sequence[str]) -> str:
    more = len(lines) - MAX_LINES
    return "\n".join(sorted(lines)[:MAX_LINES] + [f"  and {more} more"] * (more > 0))


def _near(missing: Sequence[str], unexpected: Sequence[str]) -> dict[str, str]:
    if len(missing) * len(unexpected) > MAX_COMPARISONS or any(len(name) > 200 for name in (*missing, *unexpected)):
        return {}
    near = {name: get_close_matches(name, unexpected, n=1, cutoff=0.5) for name in missing}
    return {name: found[0] for name, found in near.items() if found}


def _suggested_rename(missing: Sequence[str], unexpected: Sequence[str]) -> dict[str, str] | None:
    """The prefix, such as `module.`, or the part, such as `_orig_mod.`, that tells most names there from those here."""
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
