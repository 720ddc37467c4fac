"""Parameter groups by type of module: what decays, and what learns at a rate of its own."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from torch import nn
from torch.optim import AdamW

from probly_common.checks.training import check_group_options, check_groups, check_types
from probly_torch._kinds import KINDS
from probly_torch.batchensemble import BatchEnsembleLayer
from probly_torch.ensemble import Ensemble

Types = tuple[type[nn.Module], ...]

# What layers that are known call their own parameters.
_WEIGHT = re.compile(r"weight|weight_[ih][hr].*|(in|[qkv])_proj_weight")
_BIAS = re.compile(r"bias|bias_.*|in_proj_bias")
_FACTOR = re.compile(r"[rs]|[rs]_[ih]h.*|[qkv]_[rs]")


def fast_weight_groups(
    model: nn.Module,
    weight_decay: float,
    fast_lr_multiplier: float = 0.5,
    *,
    decay: Types = (),
    no_decay: Types = (),
) -> list[dict[str, Any]]:
    """Decays slow weights only, and gives fast ones a learning rate of their own.

    It returns parameter groups of a BatchEnsemble, by type of module and not by name, for any optimizer.

    "slow" holds the weights that members share, which decay. "fast" holds r and s, which learn at fast_lr_multiplier
    times the optimizer's learning rate, 0.5 as in the authors' CIFAR experiments (Wen et al. 2020), and do not decay,
    which would pull them to 0 instead of 1. "undecayed" holds biases and normalisation.

    The optimizer's learning rate is the slow weights', and a schedule keeps the ratio, as long as it multiplies. One
    that sets rates, as OneCycleLR does, is given a rate for each group:
    `OneCycleLR(optimizer, max_lr=[group["lr"] for group in optimizer.param_groups], ...)`. The fast group is a dict
    that keeps its multiplier until the optimizer gives it a rate; torch.compile(optimizer.step) takes plain ones only:
    `optimizer.param_groups = [dict(group) for group in optimizer.param_groups]`.

    Args:
        model: a BatchEnsemble, or a module that holds one.
        weight_decay: of the slow weights.
        fast_lr_multiplier: the learning rate of r and s, relative to the optimizer's.
        decay: further types of modules, whose parameters decay, but for those that are named bias.
        no_decay: types of modules whose parameters do not decay, such as nn.Embedding.
    Raises:
        ValueError: if the model has no slow or no fast weights, or a parameter of a type that is not known.
        TypeError: if an argument is of another type.
    Example:
        >>> import torch
        >>> from probly_torch import batchensemble
        >>> model = batchensemble(nn.Sequential(nn.Linear(2, 8), nn.LayerNorm(8), nn.Linear(8, 3)), 4)
        >>> optimizer = torch.optim.AdamW(fast_weight_groups(model, 1e-2), lr=0.01)
        >>> [(g["name"], g["lr"], g["weight_decay"], len(g["params"])) for g in optimizer.param_groups]
        [('slow', 0.01, 0.01, 2), ('fast', 0.005, 0.0, 4), ('undecayed', 0.01, 0.0, 4)]
    """
    what = "fast_weight_groups"
    names = _named_groups(what, model, weight_decay, fast_lr_multiplier, decay, no_decay)
    check_groups(what, weight_decay, list(names["slow"]), list(names["fast"]), names["unknown"])
    return _groups(model, names, weight_decay, fast_lr_multiplier)


def plain_adamw(parameters: Iterable[Any]) -> AdamW:
    """Makes an AdamW, lr 1e-3, that decays what a group says and nothing else.

    AdamW's own default would decay r, s and biases, too.
    """
    return AdamW(parameters, lr=1e-3, weight_decay=0.0)


def decay_groups(
    module: nn.Module, weight_decay: float, fast_lr_multiplier: float, decay: Types, no_decay: Types
) -> list[dict[str, Any]]:
    """Returns fast_weight_groups where there are fast weights, and the same without them where there are none."""
    what = "self.optimizer_groups"
    names = _named_groups(what, module, weight_decay, fast_lr_multiplier, decay, no_decay)
    slow, fast = list(names["slow"]), list(names["fast"] or names["slow"])
    check_groups(what, weight_decay, slow, fast, names["unknown"], model="")
    return _groups(module, names, weight_decay, fast_lr_multiplier)


class _FastGroup(dict[str, Any]):
    """A group whose learning rate follows the optimizer's, which fills in what a group leaves open by setdefault."""

    def __init__(self, group: dict[str, Any], lr_multiplier: float) -> None:
        super().__init__(group)
        self.lr_multiplier = lr_multiplier

    def setdefault(self, key: str, default: Any = None) -> Any:
        return super().setdefault(key, default * self.lr_multiplier if key == "lr" and key not in self else default)

    def copy(self) -> _FastGroup:
        return _FastGroup(self, self.lr_multiplier)


def _groups(
    model: nn.Module, names: dict[str, dict[str, str]], weight_decay: float, fast_lr_multiplier: float
) -> list[dict[str, Any]]:
    groups: list[dict[str, Any]] = []
    for name in ("slow", "fast", "undecayed"):
        if names[name]:
            params = [model.get_parameter(path) for path in names[name]]
            groups.append({"name": name, "params": params, "weight_decay": weight_decay if name == "slow" else 0.0})
            if name == "fast":
                groups[-1] = _FastGroup(groups[-1], fast_lr_multiplier)
    return groups


def _named_groups(
    what: str, model: nn.Module, weight_decay: float, fast_lr_multiplier: float, decay: Types, no_decay: Types
) -> dict[str, dict[str, str]]:
    """Returns by group the names of its parameters, each with the type of the module that holds it."""
    check_group_options(what, weight_decay, fast_lr_multiplier)
    check_types(what, "decay", decay, nn.Module, "MyLayer")
    check_types(what, "no_decay", no_decay, nn.Module, "MyLayer")
    names: dict[str, dict[str, str]] = {"slow": {}, "fast": {}, "undecayed": {}, "unknown": {}}
    seen: set[nn.Parameter] = set()  # a tied weight goes where it is met first
    for path, module in model.named_modules():
        layer = module._network if isinstance(module, Ensemble) else module  # whose parameters the Ensemble has taken
        for name, parameter in layer.named_parameters(recurse=False):
            if parameter not in seen:
                seen.add(parameter)
                group = _group(layer, name, decay, no_decay)
                names[group][f"{path}.{name}" if path else name] = type(layer).__name__
    return names


def _group(layer: nn.Module, name: str, decay: Types, no_decay: Types) -> str:
    decays = KINDS.get(type(layer), "decays")
    if isinstance(layer, BatchEnsembleLayer) and _FACTOR.fullmatch(name):
        return "fast"
    if isinstance(layer, decay):
        return "undecayed" if _BIAS.fullmatch(name) else "slow"
    if isinstance(layer, no_decay) or decays is False:
        return "undecayed"
    if decays:
        return "slow" if _WEIGHT.fullmatch(name) else "undecayed" if _BIAS.fullmatch(name) else "unknown"
    return "unknown"
