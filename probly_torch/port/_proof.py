"""That a twin computes what its network does."""

from __future__ import annotations

import copy
import types
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from probly_common.standard import TRAJECTORY_LIMIT
from probly_torch.port._source import Value
from probly_torch.weights import to_arrays

if TYPE_CHECKING:
    from flax import nnx

_ROUNDINGS = 64  # of a lower dtype that the forward itself casts to


@dataclass(frozen=True)
class Twin:
    """The source of a twin, and how its arrays lie: `Value`s in place of inputs and outputs."""

    what: str
    source: str
    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outputs: Any
    rename: dict[str, str]
    calls: list[Any]  # path of a module, its arguments by position and name, its outputs; inner modules first

    @property
    def passed(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments that the twin takes: those with arrays in them, the others are in its source."""
        return tuple(v for v in self.args if _values(v)), {k: v for k, v in self.kwargs.items() if _values(v)}


def load(network: nn.Module, twin: Twin, dtype: Any = None) -> nnx.Module:
    """Builds the twin in eval mode with the weights of the network.

    Floating weights are in another dtype if it is given.
    """
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from probly_flax.weights import load_arrays

    namespace = vars(types.ModuleType("ported"))
    exec(compile(twin.source, f"<{twin.name} in Flax NNX>", "exec"), namespace)
    abstract: Any = jax.ShapeDtypeStruct
    wide = jax.config.read("jax_enable_x64")
    floating = next((t.dtype for t in network.state_dict().values() if t.is_floating_point()), torch.float32)
    with jax.enable_x64(True):
        model = nnx.eval_shape(lambda: namespace[twin.name](rngs=nnx.Rngs(0)))
        for i, (_, variable) in enumerate(nnx.to_flat_state(nnx.state(model))):
            if isinstance(variable, nnx.RngKey):
                variable.set_value(jax.random.fold_in(jax.random.key(0), i))
            elif isinstance(variable, nnx.RngCount):
                variable.set_value(jnp.uint32(0))
            elif dtype is not None and jnp.issubdtype(variable.dtype, jnp.floating):
                variable.set_value(abstract(variable.shape, dtype))
        for _, module in nnx.iter_modules(model):
            if isinstance(module, nnx.BatchNorm) and module.scale is None:  # whose statistics are float32 otherwise
                for statistic in (module.mean, module.var):
                    statistic.set_value(abstract(statistic.shape, str(floating).removeprefix("torch.")))
            if dtype is not None:
                for name in ("dtype", "param_dtype"):
                    if getattr(module, name, None) is not None:  # some compute in the dtype of their first weights
                        setattr(module, name, dtype)
        load_arrays(model, to_arrays(network), rename=twin.rename)
    for _, variable in nnx.to_flat_state(nnx.state(model, nnx.Not(nnx.RngState))):
        if not wide and variable.dtype == jnp.int64:
            variable.set_value(variable.get_value().astype(jnp.int32))
    model.eval()
    return model


def prove(network: nn.Module, twin: Twin) -> None:
    """Raises unless both agree on the example, and the twin takes a row more."""
    import jax
    from flax import nnx

    double = copy.deepcopy(network).double().eval()
    args, kwargs = _map((twin.args, twin.kwargs), lambda v: _double(v.example))
    inputs: dict[str, Any] = {}
    hooks = [m.register_forward_hook(_keep(path, inputs), with_kwargs=True) for path, m in double.named_modules()]
    with torch.no_grad(), _Lowest() as lowest:
        expected = double(*_map(args, torch.clone), **_map(kwargs, torch.clone))
    for hook in hooks:
        hook.remove()
    limit = TRAJECTORY_LIMIT if lowest.dtype == torch.float64 else _ROUNDINGS * torch.finfo(lowest.dtype).eps
    with jax.enable_x64(True):
        model = load(double, twin, np.dtype("float64"))
        given = _map(twin.passed, _to_jax)
        got = nnx.jit(lambda model, args, kwargs: model(*args, **kwargs))(model, *given)
        distance = _distance(twin.outputs, expected, got)
        if not distance <= limit:
            first = _first_difference(double, model, twin, inputs, limit)
            raise ValueError(
                f"{twin.what} expects a twin that agrees with its network to {limit:.1g} of the outputs' scale; got "
                f"one that is {distance:.1g} off{first}. Look at what was written, and "
                f"register a rule for what is wrong: print(to_flax_source(network, x))."
            )
        _prove_batch(double, model, twin, args, kwargs)


def _prove_batch(double: nn.Module, model: nnx.Module, twin: Twin, args: Any, kwargs: Any) -> None:
    """Proves, without computing, that another number of rows gives torch's shapes.

    It does so only if torch takes that number.
    """
    import jax
    from flax import nnx

    rows = {t.shape[0] for t in _tensors((args, kwargs)) if t.ndim}
    if len(rows) != 1:
        return

    def more(t: Tensor) -> Tensor:
        return torch.cat([t, t[:1]]) if t.ndim else t

    try:
        with torch.no_grad():
            expected = double(*_map(args, more), **_map(kwargs, more))
    except Exception:
        return

    def abstract(v: Value) -> Any:
        array = _to_jax(Value("", more(v.example), v.last))
        return jax.ShapeDtypeStruct(array.shape, array.dtype)

    wanted = [tuple(t.shape) for t in _tensors(expected)]
    try:
        given = _map(twin.passed, abstract)
        got = nnx.eval_shape(lambda model, args, kwargs: model(*args, **kwargs), model, *given)
    except (TypeError, ValueError) as error:
        outcome = " ".join(str(error).split())[:200]
    else:
        pairs = zip(_leaves(twin.outputs), _leaves(got), strict=True)
        shapes = [
            tuple(a.shape[v.axis(i)] for i in range(a.ndim))
            for v, a in pairs
            if isinstance(v, Value) and isinstance(v.example, Tensor)
        ]
        if shapes == wanted:
            return
        outcome = f"outputs of shapes {shapes}"
    raise ValueError(
        f"{twin.what} expects a forward that leaves the number of rows open; got one that takes it from the example: "
        f"with a row more, the network gives outputs of shapes {wanted}, and its twin {outcome}. Take sizes from the "
        f"input: x.shape[0]."
    )


def _first_difference(double: nn.Module, model: nnx.Module, twin: Twin, inputs: dict[str, Any], limit: float) -> str:
    """Names the first module whose twin differs on the network's own inputs."""
    for path, args, kwargs, outputs in twin.calls:
        if not path or path not in inputs:
            continue
        given_args, given_kwargs, expected = inputs[path]
        layer: Any = model
        try:
            for name in path.split("."):
                listed = hasattr(layer, "layers") and name.isdigit()
                layer = layer.layers if listed else layer
                layer = layer[int(name)] if name.isdigit() else _child(layer, name)
            laid = _map2((args, kwargs), (given_args, given_kwargs), lambda v, t: _to_jax(Value("", t, v.last)))
            distance = _distance(outputs, expected, layer(*laid[0], **laid[1]))
        except Exception:
            continue
        if not distance <= limit:
            return f", first in {path} ({type(double.get_submodule(path)).__name__}), by {distance:.1g}"
    return ""


def _child(layer: Any, name: str) -> Any:
    from flax import nnx

    return layer[name] if isinstance(layer, nnx.Dict) else getattr(layer, name)


class _Lowest(TorchDispatchMode):
    """The lowest floating dtype that appears."""

    def __init__(self) -> None:
        super().__init__()
        self.dtype = torch.float64

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for t in _tensors(out):
            if t.is_floating_point() and t.dtype.itemsize < self.dtype.itemsize:
                self.dtype = t.dtype
        return out


def _keep(path: str, inputs: dict[str, Any]) -> Any:
    def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        inputs.setdefault(path, (*_map((args, kwargs), torch.clone), _map(output, torch.clone)))

    return hook


def _map(tree: Any, function: Any) -> Any:
    """Maps the tensors or values in lists, tuples and dicts."""
    if isinstance(tree, dict):
        return {name: _map(each, function) for name, each in tree.items()}
    if isinstance(tree, tuple | list):
        items = [_map(each, function) for each in tree]
        return tuple(items) if isinstance(tree, tuple) else items
    return function(tree) if isinstance(tree, Tensor | Value) else tree


def _map2(tree: Any, other: Any, function: Any) -> Any:
    leaves = iter(_tensors(other))
    return _map(tree, lambda v: function(v, next(leaves)))


def _leaves(tree: Any) -> list[Any]:
    if isinstance(tree, dict):
        tree = [tree[name] for name in sorted(tree, key=str)]  # as JAX orders them
    return [leaf for each in tree for leaf in _leaves(each)] if isinstance(tree, tuple | list) else [tree]


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in _leaves(tree) if isinstance(leaf, Tensor)]


def _values(tree: Any) -> list[Value]:
    return [leaf for leaf in _leaves(tree) if isinstance(leaf, Value) and isinstance(leaf.example, Tensor)]


def _double(t: Tensor) -> Tensor:
    return t.double() if t.is_floating_point() else t


def _to_jax(value: Value) -> Any:
    import jax.numpy as jnp

    array = _double(value.example).detach().numpy().transpose(value.order)
    return jnp.asarray(array, array.dtype)  # named, since JAX compiles a program for every shape otherwise


def _distance(values: Any, expected: Any, got: Any) -> float:
    """Measures the largest distance, in units of each output's scale.

    It is infinite for other shapes, and where only one is finite.
    """
    worst = 0.0
    for value, a, b in zip(_leaves(values), _leaves(expected), _leaves(got), strict=True):
        if not isinstance(a, Tensor):
            continue
        ours = np.asarray(_double(a).detach().numpy().transpose(Value("", a, value.last).order), np.float64)
        theirs = np.asarray(b, np.float64)
        if ours.shape != theirs.shape:
            return float("inf")
        same = (ours == theirs) | np.isnan(ours) & np.isnan(theirs)
        difference = np.abs(np.where(same, 0, ours - theirs)).max(initial=0.0)
        if difference > 0 or np.isnan(difference):
            scale = np.abs(ours[np.isfinite(ours)]).max(initial=0.0)
            worst = max(worst, float(difference / scale)) if scale > 0 and np.isfinite(difference) else float("inf")
    return worst
