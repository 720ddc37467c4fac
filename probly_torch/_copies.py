"""Copies of a stacked network for members to run on, so that no call changes the network itself."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from probly_torch._members import like
from probly_torch._state import OF_A_RUN, State, called_by_hooks


class Copies:
    """Copies of a network: one for all members, or one each.

    They keep what calls leave in them, as networks side by side would: counters, caches. Their slots hold the network's
    own tensors, or the rows of the last call, which a backward pass may read once more.
    """

    def __init__(self, state: State) -> None:
        self.state = state
        self.reset()

    def reset(self) -> None:
        self.take([_copied(self.state.network)])
        self.are_changed = self.differ = False  # by calls, and in what calls left

    def fork(self) -> Copies:
        """Returns a copy of what all members run on, for a call that may come to nothing."""
        other = Copies(self.state)
        if self.are_changed:
            other.take([_copied(self.networks[0])])
        return other

    def take(self, networks: Sequence[nn.Module]) -> None:
        self.networks, self.states = list(networks), [State(each) for each in networks]

    def follow(self, state: State) -> bool:
        """Passes on the mode of each module; returns False if something else of the network was changed."""
        if state is self.state:
            return True
        as_many = all(len(own.modules) == len(state.modules) for own in self.states)
        if not (as_many and state.differs_only_in_modes(self.state)):
            return False
        for own in self.states:
            for module, like_it in zip(own.modules, state.modules, strict=True):
                module.training = like_it.training
        self.take(self.networks)
        self.state = state
        return True

    def of_all(self) -> tuple[nn.Module, State]:
        """Returns one copy for all members."""
        return self.networks[0], self.states[0]

    def of_member(self, i: int) -> tuple[nn.Module, State]:
        i = i if len(self.networks) > 1 else 0
        return self.networks[i], self.states[i]

    def of_each(self, num_members: int) -> list[tuple[nn.Module, State]]:
        if len(self.networks) < num_members:
            self.take([*self.networks, *(_copied(self.networks[0]) for _ in range(num_members - 1))])
        return list(zip(self.networks, self.states, strict=True))

    def note_changes(self, at_once: bool = False) -> bool:
        """Notes what a call of the copies has left, and tells whether there are tensors among it."""
        if all(state.unchanged() for state in (self.states[:1] if at_once else self.states)):
            return False
        if at_once:
            del self.networks[1:], self.states[1:]
        before = self.states
        self.take(self.networks)
        new = any(now.new_tensors(then) for now, then in zip(self.states, before, strict=True))
        equal = all(state.equals(self.states[0]) for state in self.states)
        self.are_changed, self.differ = True, self.differ or new or not equal
        return new


class Pool:
    """The copies of one network, each lent to one call at a time."""

    def __init__(self, network: nn.Module, num_members: int) -> None:
        self.network, self.num_members = network, num_members
        self.ways: dict[str, None] = {}  # in which calls ran their members
        self.reasons: dict[Any, str] = {}  # why members do not run at once, or "", by gradients and modes
        self.change_weights: dict[Any, bool] = {}  # whether calls do, in place
        self._state = State(network)
        self._idle: list[Copies] = []

    def state(self) -> State:
        """Returns the network's state, as users have it now."""
        if not self._state.unchanged():
            before, self._state = self._state, State(self.network)
            if not self._state.differs_only_in_modes(before):
                self.reasons.clear()
                self.change_weights.clear()
        return self._state

    @contextmanager
    def lent(self) -> Iterator[Copies]:
        state = self.state()
        copies = self._idle.pop() if self._idle else Copies(state)
        copies = copies if copies.follow(state) else Copies(state)
        try:
            yield copies
        finally:
            self._idle.append(copies)

    def member(self, i: int) -> nn.Module:
        """Returns member i with tensors of its own, and with what calls have left in it."""
        tensors = self.state().tensors()
        rows = {id(t): like(t, t.detach()[i].clone()) for t in tensors if t is not None}  # tied ones once
        with self.lent() as copies:
            return _with_tensors(*copies.of_member(i), [None if t is None else rows[id(t)] for t in tensors])

    def __getstate__(self) -> dict[str, Any]:
        """Keeps copies only for what calls have left in them, and without graphs."""
        with self.lent() as copies:
            tensors = self.state().tensors()
            pairs = zip(copies.networks, copies.states, strict=True)
            kept = [_with_tensors(*each, tensors) for each in pairs] if copies.are_changed else []
        return {**vars(self), "_state": None, "_idle": [], "kept": kept, "differ": copies.differ}

    def __setstate__(self, state: dict[str, Any]) -> None:
        kept, differ = state.pop("kept"), state.pop("differ")
        vars(self).update(state)
        self._state = State(self.network)
        if kept:
            copies = Copies(self._state)
            copies.take(kept)
            copies.are_changed, copies.differ = True, differ
            self._idle.append(copies)


def _copied(network: nn.Module) -> nn.Module:
    """Copies all of a network but its parameters, its buffers, and what users let hooks call."""
    shared: list[Any] = [t for m in network.modules() for r in (m._parameters, m._buffers) for t in r.values()]
    shared += [vars(m)[name] for m in network.modules() for name in OF_A_RUN & vars(m).keys()]
    shared += called_by_hooks(network)
    return copy.deepcopy(network, {id(each): each for each in shared if each is not None})


def _with_tensors(network: nn.Module, state: State, tensors: Sequence[Tensor | None]) -> nn.Module:
    """Copies a network with other tensors in its slots, and what calls have left in it without graphs."""
    memo: dict[int, Any] = {id(t): t.detach().clone() for t in state.noted_tensors() if not t.is_leaf}
    memo |= {id(r[name]): t for (r, name), t in zip(state.slots, tensors, strict=True) if t is not None}
    return copy.deepcopy(network, memo)
