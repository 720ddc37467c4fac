"""Streams of keys: the twin of `flax.nnx.Rngs`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar

import torch
from torch import Tensor

from probly_common.checks.values import check_seed
from probly_torch.random import _draws, _threefry
from probly_torch.random._instead import INSTEAD
from probly_torch.random._threefry import check_key, fold_in

P = ParamSpec("P")
T = TypeVar("T")


class _Keys(Protocol):
    def __call__(self) -> Tensor: ...


def _method(draw: Callable[Concatenate[Tensor, P], T]) -> Callable[Concatenate[_Keys, P], T]:
    def method(self: _Keys, *args: P.args, **kwargs: P.kwargs) -> T:
        return draw(self(), *args, **kwargs)

    method.__name__ = draw.__name__
    method.__doc__ = f"Draws as `random.{draw.__name__}` does, with the next key."
    return method


class _Draws:
    """The draws that keys are asked for."""

    bits = _method(_threefry.bits)
    uniform = _method(_draws.uniform)
    normal = _method(_draws.normal)
    truncated_normal = _method(_draws.truncated_normal)
    bernoulli = _method(_draws.bernoulli)
    categorical = _method(_draws.categorical)
    randint = _method(_draws.randint)
    choice = _method(_draws.choice)
    permutation = _method(_draws.permutation)

    def __getattr__(self, name: str) -> Any:
        if name in INSTEAD:
            raise AttributeError(
                f"{type(self).__name__} expects a draw that is the same in both frameworks; got {name!r}, which only "
                f"nnx.{type(self).__name__} has. {INSTEAD[name]}. The keys of a stream of this name: rngs[{name!r}]()."
            )
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")


class RngStream(_Draws):
    """A key and a count: each call folds the count into the key and adds one.

    Both are tensors, so a stream is copied, pickled, compiled and moved like any other state. A stream made
    by `split(n)` holds n keys and gives n at each call, what each of n lanes of `nnx.vmap` gets.

    Example:
        >>> from probly_torch import random
        >>> stream = random.RngStream(0, tag="params")
        >>> stream().tolist() == random.fold_in(random.key(0), 0).tolist(), int(stream.count)
        (True, 1)
    """

    def __init__(self, key: int | Tensor, *, tag: str) -> None:
        self.tag = tag
        self.key = key.clone() if isinstance(key, Tensor) else _threefry.key(key)
        check_key("RngStream", self.key)
        self.count = torch.zeros(self.key.shape[:-1], dtype=torch.int64, device=self.key.device)

    def __call__(self) -> Tensor:
        """Returns the next key."""
        key = fold_in(self.key, self.count)
        self.count.add_(1)
        return key

    def split(self, k: int | Sequence[int]) -> RngStream:
        """Returns a stream of `[*k, 2]` keys, split from this stream's next key."""
        return RngStream(_threefry.split(self(), k), tag=self.tag)

    def fork(self, *, split: int | Sequence[int] | None = None) -> RngStream:
        """Returns a stream with a key of its own, this stream's next one, split if asked."""
        return RngStream(self(), tag=self.tag) if split is None else self.split(split)

    def to(self, device: torch.device | str) -> RngStream:
        """Moves key and count, in place."""
        self.key, self.count = self.key.to(device), self.count.to(device)
        return self


class Rngs(_Draws):
    """Named streams of keys: the twin of `flax.nnx.Rngs`.

    `Rngs(0, params=1)` has the streams `default` and `params`; `rngs.params()` gives the next key of that
    stream, `rngs()` and every other name the next of `default`. `rngs.normal(shape)` and the other draws of
    `random` are made with the next key of `default`, `rngs.params.normal(shape)` with that of `params`. What only
    nnx.Rngs draws is an AttributeError that says what to write; `rngs["gamma"]()` gives a key all the same.

    Args:
        default: seed, key or stream of `default`; or a mapping of names to them.
        rngs: seed, key or stream of each other name.

    Example:
        >>> from probly_torch import random
        >>> rngs = random.Rngs(0, params=1)
        >>> rngs.params().tolist() == random.fold_in(random.key(1), 0).tolist()
        True
        >>> rngs.dropout().tolist() == random.fold_in(random.key(0), 0).tolist()
        True
        >>> rngs.normal((2,)).tolist() == random.normal(random.fold_in(random.key(0), 1), (2,)).tolist()
        True
    """

    def __init__(
        self,
        default: int | Tensor | RngStream | Mapping[str, int | Tensor | RngStream] | None = None,
        **rngs: int | Tensor | RngStream,
    ) -> None:
        if isinstance(default, Mapping):
            rngs = {**default, **rngs}
        elif default is not None:
            rngs["default"] = default
        for tag, value in rngs.items():
            setattr(self, tag, RngStream(value.key if isinstance(value, RngStream) else value, tag=tag))

    def _stream(self, name: str, error: type[Exception]) -> RngStream:
        streams = vars(self)
        if name not in streams and "default" not in streams:
            raise error(
                f"Rngs expects a stream named {name!r} or 'default'; got {sorted(streams)}. Build it with Rngs(0), "
                f"or Rngs({name}=0)."
            )
        return streams.get(name) or streams["default"]

    def __getattr__(self, name: str) -> RngStream:
        if name in INSTEAD or name.startswith("__"):  # copy and pickle ask for the latter
            return super().__getattr__(name)
        return self._stream(name, AttributeError)

    def __getitem__(self, name: str) -> RngStream:
        return self._stream(name, KeyError)

    def __call__(self) -> Tensor:
        """Returns the next key of `default`."""
        return self.default()

    def __iter__(self) -> Iterator[str]:
        return iter(vars(self))

    def __len__(self) -> int:
        return len(vars(self))

    def __contains__(self, name: object) -> bool:
        return name in vars(self)

    def items(self) -> Iterator[tuple[str, RngStream]]:
        """Iterates over pairs of name and stream."""
        return iter(vars(self).items())

    def _map(self, make: Callable[[RngStream], RngStream]) -> Rngs:
        new = Rngs()
        for name, stream in self.items():
            setattr(new, name, make(stream))
        return new

    def split(self, k: int | Sequence[int] | Mapping[Any, int | Sequence[int] | None]) -> Rngs:
        """Returns streams of k keys each, one for each of k members.

        A mapping gives k by name, with `...` for all other streams and None for one that keeps its key:
        `rngs.split({"params": 5, "dropout": None, ...: (2, 5)})`.
        """
        if not isinstance(k, Mapping):
            return self._map(lambda stream: stream.split(k))
        sizes = {name: next((k[each] for each in k if each in (name, ...)), None) for name in self}

        def each(stream: RngStream) -> RngStream:
            size = sizes[stream.tag]
            return RngStream(stream.key, tag=stream.tag) if size is None else stream.split(size)

        return self._map(each)

    def fork(self, *, split: int | Sequence[int] | None = None) -> Rngs:
        """Returns streams with keys of their own, each split into `split` keys if asked."""
        return self._map(lambda stream: stream.fork(split=split))

    def to(self, device: torch.device | str) -> Rngs:
        """Moves every stream, in place."""
        for _, stream in self.items():
            stream.to(device)
        return self


def as_rngs(what: str, rngs: Any) -> Rngs:
    """Returns `rngs` itself, or the Rngs of a seed."""
    return rngs if isinstance(rngs, Rngs) else Rngs(check_seed(what, rngs))
