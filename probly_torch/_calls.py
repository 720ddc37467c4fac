"""Calls of all members: at once by torch.vmap where that computes what each computes alone, else in turn."""

from __future__ import annotations

import math
import random
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from itertools import repeat
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import vmap
from torch.nn.modules.module import _has_any_global_hook
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.checkpoint import checkpoint

from probly_common.checks.rows import CONSTANTS, check_output_leaf, check_outputs_alike
from probly_torch._copies import Copies, Pool
from probly_torch._members import like
from probly_torch._reset import seeded
from probly_torch._state import Slots

_LARGE = 2**14  # elements of one member's activations, from which a CPU is faster member by member: up to 2 x
# What torch.vmap answers, or does, otherwise than torch does for a member alone.
_TELLING = {"requires_grad", "grad_fn", "is_leaf", "grad", "_version", "register_hook", "retain_grad"}
_DIFFER = "what calls have left in members differs"
_KEEPS = "the network keeps tensors of the call"
Outputs = tuple[list[Any], dict[int, Tensor]]  # and the buffers that were assigned anew, by their slots


def run(pool: Pool, args: Any, kwargs: Any, in_axes: int | None, chunk_size: int | None) -> Any:
    """Returns what every member returns, stacked.

    Under in_axes=0 each member has inputs of its own, else they share them.
    """
    call = _Call(pool, args, kwargs, in_axes, chunk_size)
    size = pool.num_members if chunk_size is None else min(chunk_size, pool.num_members)
    if not call.reason and not torch.compiler.is_compiling():
        call.reason = call.why_in_turn(size)
    if size == pool.num_members:
        return call.results(call.chunk(0, size, call.tensors, call.batches))
    rows, batches = (
        zip(*(x.split(size) for x in tensors), strict=True) if tensors else repeat(())
        for tensors in (call.tensors, call.batches)
    )
    starts = range(0, pool.num_members, size)
    chunk = call.chunk_again if call.needs_grad() else call.chunk
    parts = [
        chunk(start, min(size, pool.num_members - start), *own)
        for start, *own in zip(starts, rows, batches, strict=False)
    ]
    leaves = [_joined(column, torch.cat) for column in zip(*(leaves for leaves, _ in parts), strict=True)]
    return call.results((leaves, {slot: torch.cat([own[slot] for _, own in parts]) for slot in parts[0][1]}))


class _Call:
    """One call of all members: each runs a copy of the network with its rows of the tensors and of the inputs."""

    def __init__(self, pool: Pool, args: Any, kwargs: Any, in_axes: int | None, chunk_size: int | None) -> None:
        self.pool = pool
        self.inputs, self.structure = tree_flatten((args, kwargs))
        self.mapped = [in_axes == 0 and isinstance(x, Tensor) and x.ndim > 0 for x in self.inputs]
        self.batches = [x for x, is_mapped in zip(self.inputs, self.mapped, strict=True) if is_mapped]
        self.state = Slots(pool.network) if torch.compiler.is_compiling() else pool.state()
        of_slots = self.state.tensors()
        self.tensors = list({id(t): t for t in of_slots if t is not None}.values())  # tied weights once
        places = {id(tensor): i for i, tensor in enumerate(self.tensors)}
        self.places = [None if t is None else places[id(t)] for t in of_slots]
        of_all = zip(self.places, self.state.are_buffers, strict=True)
        self.buffers = list(dict.fromkeys(place for place, is_buffer in of_all if is_buffer and place is not None))
        self.of_slots = of_slots
        self.reason = self._reason(chunk_size)
        self.mode = torch.is_grad_enabled(), chunk_size is None, self.state.modes
        self.changed: list[tuple[int, int, Tensor]] = []  # rows, by their places and members
        self.output_structure: Any = None

    def _reason(self, chunk_size: int | None) -> str:
        """Says why members run in turn, as far as it is known before they run; nothing if they may run at once."""
        if chunk_size == 1:
            return "chunk_size=1"
        if torch.compiler.is_exporting() or torch.jit.is_tracing():
            return "with torch.vmap, an exported program would have one batch size"
        if self.state.not_at_once:
            return self.state.not_at_once
        if self.state.have_hooks or _has_any_global_hook():
            return "hooks are given the tensors of one member"
        devices = {tensor.device.type for tensor in self.tensors}
        available = (device for device in devices if torch.amp.is_autocast_available(device))
        if any(torch.is_autocast_enabled(device) for device in available):
            return "batched products would skip the cast of autocast"
        if devices == {"cpu"} and not torch.compiler.is_compiling():
            of_all = zip(self.inputs, self.mapped, strict=True)
            shapes = (x.shape[1:] if is_mapped else x.shape for x, is_mapped in of_all if isinstance(x, Tensor))
            if any(max(math.prod(shape), shape[0] * self.state.width) >= _LARGE for shape in shapes if shape):
                return "large activations are faster so on a CPU"
        return ""

    def chunk(self, start: int, count: int, rows: Sequence[Tensor], batches: Sequence[Tensor]) -> Outputs:
        if torch.compiler.is_compiling():
            return self._traced(rows, batches)
        with self.pool.lent() as copies:
            reason = self.reason or _DIFFER * copies.differ
            if not reason:
                before = self._buffer_versions(rows)
                try:
                    outputs = self._by_vmap(*copies.of_all(), self.inputs, rows, batches)
                    if copies.note_changes(at_once=True):
                        copies.reset()  # such tensors belong to no member
                        self.pool.reasons[self.mode] = _KEEPS
                    self.pool.ways["at once, by torch.vmap"] = None
                    return outputs
                except Exception as error:
                    if _in_backward_pass():  # which stops when it has all that it needs
                        raise
                    copies.reset()
                    reason = self.reason = self.pool.reasons[self.mode] = _first_line(error)
                    if self._buffer_versions(rows) != before:  # a second run would change them twice
                        raise
            try:
                outputs = self._in_turn(copies, start, count, rows, batches)
            except Exception:
                if not _in_backward_pass():
                    self.pool.reasons.pop(self.mode, None)  # it is no fault of vmap
                raise
        self.pool.ways[f"in turn: {reason}"] = None
        return outputs

    def why_in_turn(self, size: int) -> str:
        """Says why vmap fails or differs; to know it, runs members once on copies of all that a call may change."""
        if self.mode in self.pool.reasons:
            return self.pool.reasons[self.mode]
        with self.pool.lent() as copies:
            if copies.differ:
                return _DIFFER
            trial = copies.fork()
        before = [x[:size] for x in (*self.tensors, *self.batches)]
        copied = [x.clone() for x in before]
        rows, batches = copied[: len(self.tensors)], copied[len(self.tensors) :]
        given = [x.clone() if isinstance(x, Tensor) else x for x in self.inputs]
        draws = random.getstate(), np.random.get_state(legacy=True)
        try:
            unseen = torch.autograd.graph.saved_tensors_hooks(lambda x: None, lambda x: x)  # by those of a checkpoint
            with seeded(0), _disable_current_modes(), unseen:
                watch = _Watch()
                self._by_vmap(*trial.of_all(), given, rows, batches, watch)
            reason = watch.found
            if trial.note_changes(at_once=True):
                reason = _KEEPS
            if repr(draws) != repr((random.getstate(), np.random.get_state(legacy=True))):
                reason = "the network draws from Python's or NumPy's generator"
            if any(map(_is_changed, [*self.inputs, *before[len(rows) :]], [*given, *batches])):
                reason = "the network changes its inputs in place"
            weights_change = any(_is_changed(x, y) for x, y in zip(before, rows, strict=False) if x.requires_grad)
            if size < self.pool.num_members and (trial.are_changed or weights_change):
                reason = "chunks have no part in what others change in the network"
        except Exception as error:
            reason = _first_line(error)
        finally:
            random.setstate(draws[0])
            np.random.set_state(draws[1])
        self.pool.reasons[self.mode] = reason
        return reason

    def _buffer_versions(self, rows: Sequence[Tensor]) -> list[int]:
        return [rows[i]._version for i in self.buffers if not rows[i].is_inference()]

    def _by_vmap(
        self,
        network: nn.Module,
        slots: Slots,
        given: Sequence[Any],
        rows: Sequence[Tensor],
        batches: Sequence[Tensor],
        watch: _Watch | None = None,
    ) -> Outputs:
        leaves: list[Any] = []

        def of_all(rows: Sequence[Tensor], batches: Sequence[Tensor]) -> Outputs:
            with watch or nullcontext():
                outputs, assigned = self._row(network, slots, given, rows, batches)
            leaves[:] = [Tensor if isinstance(y, Tensor) else y for y in outputs]
            return [y for y in outputs if isinstance(y, Tensor)], assigned

        before = slots.tensors()
        try:
            with _unfused_attention() if slots.have_attention else nullcontext():
                tensors, assigned = vmap(of_all, randomness="different")(rows, batches)
        finally:
            slots.fill(before)
        objects = [y for y in leaves if y is not Tensor and not isinstance(y, CONSTANTS)]
        if objects:
            raise TypeError(f"the network returns a {type(objects[0]).__name__}")
        own = iter(tensors)
        return [next(own) if y is Tensor else y for y in leaves], assigned

    def _row(
        self, network: nn.Module, slots: Slots, given: Sequence[Any], rows: Sequence[Tensor], batches: Sequence[Tensor]
    ) -> Outputs:
        """Returns one member's outputs, and the buffers that it assigned anew; others are changed in place.

        torch.func.functional_call would leave a module that is used twice with the wrong tensors, and costs more.
        """
        own_rows = [None if place is None else rows[place] for place in self.places]
        slots.fill(own_rows)
        own = iter(batches)
        leaves = [next(own) if is_mapped else x for x, is_mapped in zip(given, self.mapped, strict=True)]
        args, kwargs = tree_unflatten(leaves, self.structure)
        with _no_cache() if parametrize._cache_enabled else nullcontext():
            outputs, self.output_structure = tree_flatten(network(*args, **kwargs))
        after = zip(slots.tensors(), own_rows, strict=True)
        return outputs, {i: new for i, (new, row) in enumerate(after) if new is not row and new is not None}

    def _in_turn(
        self, copies: Copies, start: int, count: int, rows: Sequence[Tensor], batches: Sequence[Tensor]
    ) -> Outputs:
        """Runs each member on a copy of its own, whose slots then keep its rows: a backward pass may run it again."""
        members = copies.of_each(self.pool.num_members)[start : start + count]
        outputs = self._each(members, start, rows, batches, self.may_change_weights())
        copies.note_changes()
        self.pool.change_weights[self.mode] = self.pool.change_weights.get(self.mode, False) or bool(self.changed)
        return outputs

    def _each(
        self,
        members: Sequence[tuple[nn.Module, Slots]],
        start: int,
        rows: Sequence[Tensor],
        batches: Sequence[Tensor],
        change_weights: bool = False,
    ) -> Outputs:
        with torch.inference_mode(False), torch.enable_grad():  # a backward pass of another call may read them
            own_rows = [(row if row.requires_grad else row.detach()).unbind() for row in rows]
            if change_weights:  # or may do so: torch lets no views of a parameter be changed in place
                own_rows = [tuple(r.clone() for r in own) if own[0].requires_grad else own for own in own_rows]
        own_batches = [x.unbind() for x in batches]
        outputs: list[list[Any]] = []
        assigned: dict[int, Tensor] = {}
        after: list[list[Any]] = []
        structures: list[Any] = []
        for i, (member, given) in enumerate(zip(members, self._given(), strict=False)):
            own = [column[i] for column in own_rows]
            y, new = self._row(*member, given, own, [column[i] for column in own_batches])
            if change_weights:
                self.changed += [
                    (place, start + i, row)
                    for place, row in enumerate(own)
                    if row.requires_grad and _may_be_changed(row)
                ]
            outputs.append(y)
            assigned |= new
            after.append(member[1].tensors())
            structures.append(self.output_structure)
        check_outputs_alike("Ensemble", "structure", structures)
        if not any(isinstance(y, Tensor) for y in outputs[0]):
            for y in outputs[0]:
                check_output_leaf("Ensemble", y)
        leaves = [_joined(column, torch.stack) for column in zip(*outputs, strict=True)]
        return leaves, {slot: torch.stack([own[slot].detach() for own in after]) for slot in assigned}

    def _traced(self, rows: Sequence[Tensor], batches: Sequence[Tensor]) -> Outputs:
        """Runs members on the network itself, whose slots a compiler sees filled and filled again."""
        network = (self.pool.network, self.state)
        if not self.reason:
            return self._by_vmap(*network, self.inputs, rows, batches)
        try:
            return self._each([network] * len(rows[0]), 0, rows, batches)
        finally:
            self.state.fill(self.of_slots)

    def _given(self) -> Iterator[list[Any]]:
        """Yields the inputs as they were: members that run one after another may change them in place."""
        of_all = zip(self.inputs, self.mapped, strict=True)
        first = [x.clone() if isinstance(x, Tensor) and not is_mapped else None for x, is_mapped in of_all]
        yield [x if y is None else y for x, y in zip(self.inputs, first, strict=True)]
        while True:
            yield [x.clone() if _may_be_changed(y) else x for x, y in zip(self.inputs, first, strict=True)]

    def chunk_again(self, start: int, count: int, rows: Sequence[Tensor], batches: Sequence[Tensor]) -> Outputs:
        """Keeps no activations, and runs once more in the backward pass, with the buffers as they were."""

        own_weights = self.reason and self.may_change_weights()

        def copied(rows: Sequence[Tensor]) -> list[Tensor]:
            return [row.clone() if own_weights or i in self.buffers else row for i, row in enumerate(rows)]

        def run(*rows: Tensor) -> tuple[Outputs, list[Tensor]]:
            own = copied(rows)
            return self.chunk(start, count, own, batches), own

        outputs, after = checkpoint(run, *copied(rows), use_reentrant=False)
        for i in self.buffers:
            rows[i].copy_(after[i])
        return outputs

    def may_change_weights(self) -> bool:
        """Tells whether members that run in turn change weights in place; the first call shows it."""
        return self.pool.change_weights.get(self.mode, True)

    def needs_grad(self) -> bool:
        tensors = (x for x in (*self.tensors, *self.inputs) if isinstance(x, Tensor))
        return torch.is_grad_enabled() and not torch.compiler.is_compiling() and any(x.requires_grad for x in tensors)

    def results(self, outputs: Outputs) -> Any:
        leaves, assigned = outputs
        if self.changed:
            with torch.no_grad():
                for place, member, row in self.changed:
                    self.tensors[place][member].copy_(row)
        for slot, tensor in assigned.items():
            registry, name = self.state.slots[slot]
            before = self.of_slots[slot]
            registry[name] = tensor.detach() if before is None else like(before, tensor.detach())
        return tree_unflatten(leaves, self.output_structure)


class _Watch(TorchFunctionMode):
    """Notes what a forward does that torch.vmap does otherwise, though it raises no error."""

    def __init__(self) -> None:
        super().__init__()
        self.found = ""
        self.hooks = _saved_tensors_hooks()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__ if func.__name__ != "__get__" else func.__self__.__name__
        if name in _TELLING:
            self.found = f"the network asks for {name}"
        elif kwargs and kwargs.get("generator") is not None:
            self.found = "the network draws from a generator of its own"
        elif _saved_tensors_hooks() is not self.hooks:
            self.found = "a backward pass runs parts of the network again"
        return func(*args, **(kwargs or {}))


def _saved_tensors_hooks() -> Any:
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return hooks and hooks[0]


def _joined(column: Sequence[Any], join: Callable[[list[Tensor]], Tensor]) -> Any:
    """Returns what members return in one place: tensors stacked, a constant that is one, or a list of objects."""
    if all(isinstance(y, Tensor) for y in column):
        check_outputs_alike("Ensemble", "shape", [tuple(y.shape[join is torch.cat :]) for y in column])
        return join(list(column))
    if all(isinstance(y, CONSTANTS) for y in column):
        check_outputs_alike("Ensemble", "value", column)
        return column[0]
    return [each for y in column for each in (y if join is torch.cat else [y])]


def _in_backward_pass() -> bool:
    return torch._C._current_graph_task_id() != -1


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0] or type(error).__name__


def _is_changed(before: Any, copied: Any) -> bool:
    """Tells whether a copy of an input was changed in place. Tensors of inference mode do not count their versions."""
    if not isinstance(copied, Tensor):
        return False
    return not torch.equal(before, copied) if copied.is_inference() else copied._version > 0


def _may_be_changed(copied: Any) -> bool:
    return isinstance(copied, Tensor) and (
        torch.compiler.is_compiling() or copied.is_inference() or copied._version > 0
    )


@contextmanager
def _no_cache() -> Iterator[None]:
    """Keeps parametrize.cached() from giving a member the weights of another, whose copy of a layer has its place."""
    parametrize._cache.clear()
    yield
    parametrize._cache.clear()


_attention = threading.Lock()
_unfused: list[bool] = []  # what the switch was before each of the calls that need it off


@contextmanager
def _unfused_attention() -> Iterator[None]:
    """Turns off torch's fused attention for inference: it has no batching rules and reads weights past their layers."""
    with _attention:
        _unfused.append(torch.backends.mha.get_fastpath_enabled())
        torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        with _attention:
            before = _unfused[0]
            if not _unfused[1:]:
                torch.backends.mha.set_fastpath_enabled(before)
            _unfused.pop()
