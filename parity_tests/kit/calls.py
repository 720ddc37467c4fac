"""Every call of every layer of both models: what it was called with and what it returned, by torch's names."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import jax
import jax.extend.core
import torch
from flax import nnx
from torch import Tensor, nn

from parity_tests.kit.runs import FlaxModel, TorchModel
from parity_tests.kit.trees import Layout, leaves, mapped
from probly_flax.weights import Inventory


@dataclass(frozen=True)
class Call:
    """One call of a layer.

    Attributes:
        path: torch's name of the layer.
        index: which of its calls.
        args: trees of tensors, or of JAX arrays.
        kwargs: the same.
        outputs: the same.
        start: how many calls of any layer had started before.
        end: how many had ended before.
    """

    path: str
    index: int
    args: Any
    kwargs: Any
    outputs: Any
    start: int
    end: int

    @property
    def inputs(self) -> list[Any]:
        """The arrays that it was called with."""
        return [array for _, array in leaves((self.args, self.kwargs))]

    @property
    def results(self) -> list[Any]:
        """The arrays that it returned."""
        return [array for _, array in leaves(self.outputs)]


def torch_calls(model: TorchModel, inputs: Any, seed: int | None = None) -> list[Call]:
    """Records the calls in the order in which they end: inner layers before outer ones.

    Calls under vmap have no values, so they are left out.
    """
    calls: list[Call] = []
    open_calls: list[tuple[int, Any, Any]] = []
    counts: Counter[str] = Counter()
    started = 0

    def before(module: nn.Module, args: Any, kwargs: Any) -> None:
        nonlocal started
        open_calls.append((started, mapped(args, _kept), mapped(kwargs, _kept)))
        started += 1

    def after(path: str, module: nn.Module, args: Any, kwargs: Any, outputs: Any) -> None:
        start, args, kwargs = open_calls.pop()
        if not any(map(_is_wrapped, (t for _, t in leaves((args, kwargs, outputs))))):
            calls.append(Call(path, counts[path], args, kwargs, mapped(outputs, _kept), start, len(calls)))
        counts[path] += 1

    handles = []
    for path, module in model.module.named_modules():
        handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
        handles.append(module.register_forward_hook(partial(after, path), with_kwargs=True))
    try:
        args, kwargs = model.given(inputs)
        with model.restored(), model.masked(seed), torch.no_grad():
            model.module(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return calls


def _kept(tensor: Tensor) -> Tensor:
    return tensor if _is_wrapped(tensor) else tensor.detach().clone()


def _is_wrapped(tensor: Tensor) -> bool:
    return bool(torch._C._functorch.is_functorch_wrapped_tensor(tensor))


def flax_calls(
    model: FlaxModel, inputs: Any, layout: Layout, torch_path: Callable[[str], str], seed: int = 0
) -> list[Call]:
    """Records the calls as `torch_calls` does.

    Calls inside of jax.vmap, scans and other transformations of their own are left out.
    """
    recorder = _Recorder()
    given = dict(leaves(model.given(inputs, layout)))

    def forward(state: Any, given: dict[str, Any], key: Any) -> list[Any]:
        recorder.clear()
        values = iter(given.values())
        model.called(state, mapped(inputs, lambda _: next(values)), key, recorder.recording)
        return recorder.arrays

    with model.x64():
        arrays = iter((jax.jit(forward) if model.jit else forward)(model.state, given, jax.random.key(seed)))
        calls: list[Call] = []
        for path, index, trees, start in recorder.calls:
            args, kwargs, outputs = mapped(trees, lambda _: next(arrays))
            calls.append(Call(torch_path(path), index, args, kwargs, outputs, start, len(calls)))
    return calls


class _Recorder:
    """The calls of one run; their arrays apart, since a jitted function returns those."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        self.calls: list[tuple[str, int, Any, int]] = []
        self.arrays: list[Any] = []
        self.paths: dict[int, str] = {}
        self.counts: Counter[str] = Counter()
        self.started = 0
        self.level: Any = None

    @contextmanager
    def recording(self, model: nnx.Module) -> Iterator[None]:
        """Makes layers record themselves through a class of their own.

        Plain functions that are layers record through a wrapper.
        """
        self.level = _trace_state()
        self.modules = [model]  # so that none of these ids is taken by another object
        for path, part in Inventory(model).parts:
            if isinstance(part, nnx.Module):
                self.paths.setdefault(id(part), path)
        for path, owner, name, function in list(_functions(model)):
            _put(owner, name, partial(self.record, path, function))
        for _, module in nnx.iter_modules(model):
            object.__setattr__(module, "__class__", _recording_class(type(module)))
        token = _RECORDER.set(self)
        try:
            yield
        finally:
            _RECORDER.reset(token)

    def record(self, path: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        start, self.started = self.started, self.started + 1
        outputs = function(*args, **kwargs)
        if _trace_state() == self.level:
            trees = (args, kwargs, outputs)
            self.calls.append((path, self.counts[path], trees, start))
            self.arrays += [array for _, array in leaves(trees)]
        self.counts[path] += 1
        return outputs


_RECORDER: ContextVar[_Recorder | None] = ContextVar("recorder", default=None)


def _trace_state() -> Any:
    return jax.extend.core.get_opaque_trace_state(convention="nnx")


@cache
def _recording_class(cls: Any) -> Any:
    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N807
        recorder, call = _RECORDER.get(), partial(cls.__call__, self)
        path = None if recorder is None else recorder.paths.get(id(self))
        return (
            call(*args, **kwargs) if path is None or recorder is None else recorder.record(path, call, *args, **kwargs)
        )

    if not callable(getattr(cls, "__call__", None)):  # noqa: B004
        return cls
    names = {"__call__": __call__, "__module__": cls.__module__, "__qualname__": cls.__qualname__}
    return type(cls)(cls.__name__, (cls,), names)


def _functions(model: nnx.Module) -> Iterator[tuple[str, Any, Any, Callable[..., Any]]]:
    """Yields plain functions in the places of layers.

    They are in a Sequential, or an attribute of a module of the user's own.
    """
    others = (nnx.Module, nnx.Variable, type)  # which may be called too, as dtypes may
    held = Inventory(model).parts
    parts = {path: part for path, part in held if not isinstance(part, others)}
    for path, module in [(path, part) for path, part in held if isinstance(part, nnx.Module)]:
        prefix = f"{path}." if path else ""
        own: list[tuple[Any, Any, Any]]
        if isinstance(module, nnx.Sequential):
            own = [(i, module.layers, i) for i in range(len(module.layers))]
        elif type(module).__module__.partition(".")[0] in ("flax", "probly_flax"):
            continue
        else:
            own = [(name, module, name) for name in vars(module)]
        for key, owner, name in own:
            function = parts.get(f"{prefix}{key}")
            if function is not None:
                yield f"{prefix}{key}", owner, name, function


def _put(owner: Any, name: Any, value: Any) -> None:
    if isinstance(name, str):
        setattr(owner, name, value)
    else:
        owner[name] = value
