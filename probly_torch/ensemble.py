"""Deep ensembles (Lakshminarayanan et al. 2017): E networks with weights of their own, run by one vmap."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from random import Random
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from probly_common.checks.ensembles import (
    check_base_options,
    check_distinct,
    check_independent,
    check_initialized,
    check_list_of_members,
    check_member_count,
    check_members_alone,
    check_run_once,
    check_same_structure,
    construct,
    member_index,
    member_indices,
    warn_of_other_starts,
)
from probly_common.checks.rows import check_chunk_size, check_in_axes, check_member_axis, check_rows_of_batch
from probly_common.checks.values import check_module, check_num_members
from probly_common.report import Report, report_of_starts
from probly_common.starts import CONSTRUCTOR, KEPT, RESET
from probly_torch import random
from probly_torch._calls import run
from probly_torch._check import find_mismatch
from probly_torch._copies import Pool
from probly_torch._members import lazy_names, named_tensors, stack, structure
from probly_torch._mlp import mlp_layers, run_mlp
from probly_torch._reset import other_starts, register_reset, reset_by_layer, reset_by_rule, seeded
from probly_torch.random import Rngs

__all__ = ["Ensemble", "ensemble", "register_reset"]

_INITIAL_COUNT, _CALLS_COUNT = 2**32 - 1, 2**32 - 2  # of a member's stream, far from those that rules draw


_SHARED = (
    *("_parameters", "_buffers", "_non_persistent_buffers_set", "_modules"),
    *("_state_dict_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks"),
)


class Ensemble(nn.Module):
    """Networks of one structure with stacked weights, run at once.

    Its parameters and buffers have the names they have in one network, and a leading axis of E members.

    Shape:
        model(x): x (B, ...), the same batch for every member. Returns (E, B, ...).
        model(x, in_axes=0): x (E, B, ...), a batch for each member. Returns (E, B, ...).
        Inputs and outputs may be several, tuples or dicts; inputs that are no tensors are passed on.
    Weights:
        those of one network, each (E, ...).
    Args:
        members: networks of one structure, in the same mode; they are copied.
        chunk_size: how many members run at a time; None for all. Activations are kept for that many only: where
            gradients are needed, a chunk is computed again in the backward pass.
    Raises:
        ValueError: if there is no member, one is given twice, or they differ in structure.
    Example:
        >>> model = Ensemble([nn.Linear(2, 3) for _ in range(4)])
        >>> model(torch.ones(5, 2)).shape, model.weight.shape
        (torch.Size([4, 5, 3]), torch.Size([4, 3, 2]))
        >>> torch.allclose(model[1](torch.ones(5, 2)), model(torch.ones(5, 2))[1])
        True
    """

    report: Report | None = None  # how each parameter started, if `ensemble` made the members
    _network: nn.Module
    _pool: Pool
    _seeds: Random | None = None  # of calls that draw, as Dropout does; None leaves them to torch's global generator

    def __init__(self, members: Sequence[nn.Module], *, chunk_size: int | None = None) -> None:
        super().__init__()
        check_list_of_members("Ensemble", members, (list, tuple, nn.ModuleList))
        for each in members:
            check_module("Ensemble", "each member", each, nn.Module)
        check_distinct("Ensemble", members)
        self._adopt(stack(iter(members), len(members)), len(members), check_chunk_size("Ensemble", chunk_size))

    def _adopt(self, network: nn.Module, num_members: int, chunk_size: int | None) -> None:
        """Takes over a stacked network."""
        self.num_members, self.chunk_size = num_members, chunk_size
        for registry in _SHARED:
            self.__dict__[registry] = network.__dict__[registry]  # the network's own, so that names stay natural
        self.__dict__["_network"] = network  # not a submodule: it would appear a second time
        self._pool = Pool(network, num_members)
        self.training = network.training

    def forward(self, *args: Any, in_axes: int | None = None, **kwargs: Any) -> Any:
        check_in_axes("Ensemble", in_axes)
        if in_axes == 0:
            inputs = tree_leaves((args, kwargs))
            shapes = [x.shape for x in inputs if isinstance(x, Tensor) and x.ndim]
            check_rows_of_batch("Ensemble", [self.num_members] * len(shapes))
            check_member_axis("Ensemble", shapes, self.num_members)
        if self.chunk_size is None and len(args) == 1 and not kwargs:
            layers = mlp_layers(self._network, args[0], in_axes)
            if layers:
                if not torch.compiler.is_compiling():
                    self._pool.ways["at once, by batched products"] = None
                return run_mlp(layers, self.num_members, args[0], in_axes)
        with self._seeded():
            return run(self._pool, args, kwargs, in_axes, self.chunk_size)

    def _seeded(self) -> AbstractContextManager[None]:
        """Seeds the masks of Dropout from the ensemble's rngs, anew for each call."""
        if self._seeds is None or not self.training or torch.compiler.is_compiling():
            return nullcontext()
        check_run_once("Ensemble", torch._C._current_graph_task_id())
        return seeded(self._seeds.getrandbits(64))

    def train(self, mode: bool = True) -> Ensemble:
        self._network.train(mode)  # the network's own, which may keep a part of it in one mode
        self.training = self._network.training
        return self

    # What the network's class makes of its state, such as an extra state, is kept.

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        self._network._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, *args: Any) -> None:
        self._network._load_from_state_dict(*args)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Ensemble:
        self._network._apply(fn, recurse)
        return self

    def apply(self, fn: Callable[[nn.Module], None]) -> Ensemble:
        """Applies fn to each member, whose weights have the shapes that fn expects."""
        changed = Ensemble([each.apply(fn) for each in self])
        with torch.no_grad():
            for (_, own), (_, new) in zip(named_tensors(self), named_tensors(changed), strict=True):
                own.copy_(new)
        return self

    def check(self, *args: Any, **kwargs: Any) -> None:
        """Compares each member's outputs with those of the member alone, for this batch, in eval mode and in float64.

        Args:
            args, kwargs: as in a call.
        Raises:
            ValueError: if they differ; it names the member.
        Example:
            >>> Ensemble([nn.Linear(2, 3) for _ in range(4)]).check(torch.ones(5, 2))
        """
        found = find_mismatch(self, args, kwargs)
        check_members_alone("Ensemble.check", found, self.num_members)

    def explain(self) -> str:
        """Says how members ran in the calls so far, a line for each way: at once, or in turn and why.

        Members run in turn where torch.vmap fails, is slower, or would do otherwise than members do alone. To know it,
        the first call in each mode runs a copy of the network once more.

        Example:
            >>> model = Ensemble([nn.LSTM(2, 3) for _ in range(4)])
            >>> _ = model(torch.ones(5, 2))
            >>> print(model.explain())
            in turn: torch.vmap has no rules for recurrent kernels
        """
        return "\n".join(self._pool.ways) or "no call yet"

    def __len__(self) -> int:
        return self.num_members

    def __iter__(self) -> Iterator[nn.Module]:
        return (self[i] for i in range(self.num_members))

    def __getitem__(self, item: int | slice | Sequence[int]) -> Any:
        """Returns member `item` as a network of its own; for a slice or a list, an ensemble of those members."""
        if isinstance(item, (slice, list, tuple)):
            indices = member_indices("Ensemble", item, self.num_members)
            pruned = Ensemble([self[i] for i in indices], chunk_size=self.chunk_size)
            pruned._seeds = copy.deepcopy(self._seeds)
            return pruned
        return self._pool.member(member_index("Ensemble", item, self.num_members))

    def extra_repr(self) -> str:
        chunks = "" if self.chunk_size is None else f", chunk_size={self.chunk_size}"
        return f"{type(self._network).__name__}, num_members={self.num_members}{chunks}"


def ensemble(
    base: nn.Module | Sequence[nn.Module] | Callable[..., nn.Module],
    num_members: int,
    *,
    rngs: Rngs | int = 0,
    reset_params: bool = True,
    reset: Callable[..., Tensor] | None = None,
    chunk_size: int | None = None,
) -> Ensemble:
    """Makes a deep ensemble: members of one structure, each with weights of its own.

    Members start as the network does: by its constructor, where that is given; else each layer by its
    `reset_parameters`, and then by the network's own `init_weights()` or `_init_weights(module)`, as those of
    transformers and timm. Parameters without a rule, as class tokens, are drawn with the mean and standard deviation
    that they have in the network; constants and frozen ones are kept. The model's `report` says which rule each had. A
    warning names weights of another spread than their rule's; trained weights of the same spread cannot be told.

    Args:
        base: a network, copied for each member and drawn anew; or a constructor, called for each member with its rngs,
            or without where it takes none; or a list of networks, stacked as they are.
        num_members: the number of members E.
        rngs: a seed or an Rngs. Members are drawn from keys of their own, which also seed torch's global generators for
            layers that draw from them; these are left as they were.
        reset_params: False keeps the weights of the base network in every member.
        reset: a rule for this call, of (parameter, rngs) or of (name, parameter, rngs): given the member's rngs, it
            returns the new value.
        chunk_size: how many members run at a time; None for all.
    Raises:
        ValueError: if a constructor or a rule makes equal members.
        TypeError: if base is none of the three.
    Example:
        >>> net = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> model = ensemble(net, 5)
        >>> model(torch.ones(7, 2)).shape
        torch.Size([5, 7, 3])
        >>> def reset_head(name, parameter, rngs):
        ...     return random.normal(rngs.params(), parameter.shape) if name.startswith("2.") else parameter
        >>> model = ensemble(net, 5, reset=reset_head)
        >>> print(ensemble(lambda: nn.Linear(2, 3), 5).report)
        path    kind    action       before  after
        weight  Linear  constructor       6     30
        bias    Linear  constructor       3     15
                        total             9     45
    """
    what = "ensemble"
    num_members, chunk_size = check_num_members(what, num_members), check_chunk_size(what, chunk_size)
    rngs = random.as_rngs(what, rngs)
    given = {"reset": reset is not None, "reset_params": not reset_params}
    if isinstance(base, (list, tuple)):
        check_base_options(what, "a list of networks", given)
        check_member_count(what, len(base), num_members)
        return _with_report(Ensemble(base, chunk_size=chunk_size), {}, KEPT)
    make: Callable[[Rngs], nn.Module]
    rules: dict[str, str] = {}
    if isinstance(base, nn.Module):
        check_initialized(what, lazy_names(base))
        check_same_structure(what, structure(base).difference(base, base), 0, num_members)
        make = partial(_copy, base, reset_params, reset, rules)
    elif callable(base):
        check_base_options(what, "a constructor", given)
        make = partial(_construct, base)
    else:
        check_module(what, "base", base, nn.Module)
    split = rngs.split(num_members)  # as nnx.split_rngs does, so that rules that draw from rngs agree
    seeds = random.fold_in(split["params"].key, _INITIAL_COUNT)
    own = (Rngs({name: stream.key[i] for name, stream in split.items()}) for i in range(num_members))
    model = Ensemble.__new__(Ensemble)
    nn.Module.__init__(model)
    model._adopt(stack(map(partial(_member, make), own, seeds), num_members), num_members, chunk_size)
    model._seeds = Random(
        _word(random.fold_in(split["dropout" if "dropout" in split else "params"].key[0], _CALLS_COUNT))
    )
    if reset is not None or not isinstance(base, nn.Module):
        check_independent(what, num_members, _members_differ(model))
    elif reset_params:
        warn_of_other_starts(what, other_starts(base, model, rules), len(rules), num_members)
    copied = KEPT if reset is None else RESET
    return _with_report(model, rules, copied if isinstance(base, nn.Module) else CONSTRUCTOR)


def _with_report(model: Ensemble, rules: dict[str, str], otherwise: str) -> Ensemble:
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    layers = dict(model._network.named_modules())
    model.report = report_of_starts(model.num_members, sizes, layers, rules, otherwise)
    return model


def _member(make: Callable[[Rngs], nn.Module], rngs: Rngs, key: Tensor) -> nn.Module:
    with seeded(_word(key)):
        return make(rngs)


def _word(key: Tensor) -> int:
    """Returns the 64 bits of a key."""
    high, low = key.tolist()
    return (high << 32) | low


def _construct(constructor: Callable[..., nn.Module], rngs: Rngs) -> nn.Module:
    member = construct("ensemble", constructor, rngs)
    check_module("ensemble", "what the constructor returns", member, nn.Module)
    return member


def _copy(
    base: nn.Module,
    reset_params: bool,
    reset: Callable[..., Tensor] | None,
    rules: dict[str, str],
    rngs: Rngs,
) -> nn.Module:
    member = copy.deepcopy(base)
    if reset is not None:
        reset_by_rule(member, reset, rngs)
    elif reset_params:
        rules |= reset_by_layer(member, rngs, base)
    return member


def _members_differ(model: Ensemble) -> bool:
    return any(p.is_meta or bool((p != p[:1]).any()) for p in model.parameters())
