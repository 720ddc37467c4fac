"""Suspects among the options of a layer: its attributes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from flax import nnx

from parity_tests.kit.suspects.trial import LayerPair, Suspect, Trial, run_torch
from parity_tests.kit.trees import jax_of
from probly_common.weights.kinds import Missing, Text
from probly_flax.weights import Inventory as FlaxInventory
from probly_torch.weights import Inventory as TorchInventory

# What layers call the same thing, most common first.
_NAMES = (
    ("eps", "epsilon", "variance_epsilon"),
    ("negative_slope", "slope", "alpha"),
    ("scale", "scaling", "softmax_scale"),
    ("p", "rate", "dropout_rate"),
    ("num_heads", "heads", "n_heads", "nhead"),
    ("num_groups", "groups"),
)


def suspects(pair: LayerPair) -> Iterator[Suspect]:
    """Yields numbers under the usual names, then what both packages call options, then modes."""
    tried = set()
    for names in _NAMES:
        ours, theirs = _number(pair.flax, names), _number(pair.torch, names)
        if ours and theirs and getattr(pair.flax, ours) != getattr(pair.torch, theirs):
            tried.add(ours)
            yield _option(pair, ours, getattr(pair.torch, theirs), theirs)
    yield from fast_variance(pair)
    yield from (_option(pair, *each) for each in _differing(pair) if each[0] not in tried)
    yield from _modes(pair)
    yield from _directions(pair)


def fast_variance(pair: LayerPair) -> Iterator[Suspect]:
    """Yields the suspect of use_fast_variance, which cancels where the mean is far from 0."""
    if any(getattr(module, "use_fast_variance", False) for _, module in nnx.iter_modules(pair.flax)):
        yield Suspect(
            "nnx use_fast_variance is True, which takes the variance for E[x^2] - E[x]^2, and torch does not",
            "use_fast_variance=False",
            lambda trial: _set_everywhere(trial, use_fast_variance=False),
            joins=True,
        )


def _number(layer: Any, names: tuple[str, ...]) -> str | None:
    def is_number(value: Any) -> bool:
        return isinstance(value, int | float) and not isinstance(value, bool)

    return next((name for name in names if is_number(getattr(layer, name, None))), None)


def _option(pair: LayerPair, name: str, value: Any, torch_name: str) -> Suspect:
    """Makes a suspect of another value for one of Flax's attributes, beside torch's as torch has it."""
    own, theirs = getattr(_owner(pair.flax, name), name, None), getattr(pair.torch, torch_name, None)
    said = f"nnx {name} is {_shown(own)}, torch {torch_name} is {_shown(value if theirs is None else theirs)}"
    edit = partial(_set, name=name, value=value, torch_layer=pair.torch)
    return Suspect(said, f"{name}={_shown(value)}", lambda trial: edit(trial.layer), joins=True)


def _shown(value: Any) -> str:
    return f"nnx.{value.__name__}" if callable(value) and hasattr(value, "__name__") else repr(value)


def _differing(pair: LayerPair) -> Iterator[tuple[str, Any, str]]:
    """Yields the arguments of Flax's layer that would give it torch's options: name, value, torch's name."""
    ours, theirs = FlaxInventory(pair.flax).options.get(""), TorchInventory(pair.torch).options.get("")
    if ours is None or theirs is None or ours["kind"] != theirs["kind"]:
        return
    wanted = {**ours, **{option: theirs[option] for option in theirs if option not in ("bias", "weight")}}
    words = FlaxInventory.words
    here, there = (words.arguments(ours["kind"], each) for each in (ours, wanted))
    called = {argument: option for argument, option in words.options.items() if option in theirs}
    for name, value in there.items():
        if isinstance(value, Missing) or here.get(name) == value:
            continue
        function = isinstance(value, Text)
        if not function or hasattr(nnx, value.removeprefix("nnx.")):
            yield name, getattr(nnx, value.removeprefix("nnx.")) if function else value, called.get(name, name)


def _owner(layer: Any, name: str) -> Any:
    return layer if hasattr(layer, name) else getattr(layer, "cell", layer)


def _set(layer: Any, name: str, value: Any, torch_layer: Any) -> None:
    """Gives a layer an option, and all that goes with it in nnx."""
    if name == "num_groups" and hasattr(layer, "group_size"):
        layer.group_size = layer.group_size * layer.num_groups // value
    setattr(_owner(layer, name), name, value)
    if name == "feature_group_count":  # which is in the shape of the kernel, so that no weights were loaded
        weight = torch_layer.weight.detach().numpy()
        layer.kernel.set_value(jax_of(weight.transpose(*range(2, weight.ndim), 1, 0)))
        if layer.bias is not None and torch_layer.bias is not None:
            layer.bias.set_value(jax_of(torch_layer.bias.detach().numpy()))
    elif name == "num_heads" and isinstance(layer, nnx.MultiHeadAttention):
        heads = (value, layer.qkv_features // value)
        layer.head_dim = heads[1]
        for projection in (layer.query, layer.key, layer.value):
            projection.out_features = heads
            _reshape(projection.kernel, lambda shape: (shape[0], *heads))
            _reshape(projection.bias, lambda _: heads)
        layer.out.in_features = heads
        _reshape(layer.out.kernel, lambda shape: (*heads, shape[-1]))


def _reshape(variable: Any, shape: Callable[[tuple[int, ...]], tuple[int, ...]]) -> None:
    if variable is not None:
        variable.set_value(variable.get_value().reshape(shape(variable.shape)))


def _set_everywhere(trial: Trial, **values: Any) -> None:
    for _, module in nnx.iter_modules(trial.layer):
        for name, value in values.items():
            if hasattr(module, name):
                setattr(module, name, value)


def _modes(pair: LayerPair) -> Iterator[Suspect]:
    names = ("deterministic", "use_running_average")
    modules = [module for _, module in nnx.iter_modules(pair.flax)]
    modes = {name: getattr(module, name) for module in modules for name in names if hasattr(module, name)}
    training = pair.torch.training
    wrong = {name: value for name, value in modes.items() if bool(value) is training}
    if not wrong:
        return
    shown = ", ".join(f"{name}={value}" for name, value in wrong.items())
    words = ("eval", "train") if training else ("train", "eval")
    said = f"nnx is in {words[0]} mode ({shown}), torch in {words[1]} mode"
    wanted = dict.fromkeys(wrong, not training)
    yield Suspect(said, f"flax_module.{words[1]}()", lambda trial: _set_everywhere(trial, **wanted), joins=True)

    def in_eval_mode(trial: Trial) -> None:  # of which nothing is random
        trial.expected = run_torch(copy.deepcopy(pair.torch).eval(), pair.torch_args, pair.torch_kwargs)

    if training:
        yield Suspect(said, "torch_module.eval()", in_eval_mode)


def _directions(pair: LayerPair) -> Iterator[Suspect]:
    """Yields suspects of how an nnx.RNN goes through time."""
    for name in ("reverse", "keep_order", "time_major"):
        own = getattr(pair.flax, name, None)
        if isinstance(own, bool):
            edit = partial(_negate, name=name)
            yield Suspect(f"nnx {name} is {own}, which torch does not do", f"{name}={not own}", edit, joins=True)


def _negate(trial: Trial, name: str) -> None:
    setattr(trial.layer, name, not getattr(trial.layer, name))
