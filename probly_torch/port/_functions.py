"""How functions and methods are written in jax.numpy and flax.nnx. A rule takes the scope, then torch's arguments."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from probly_torch.port._source import Value, sized
from probly_torch.port._trace import Switch
from probly_torch.port._translate import Missing, Scope, UnknownError

OPERATIONS: dict[str, Callable[..., Any]] = {}


def operation(*names: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Registers a rule by the names of a function in torch, torch.nn.functional, operator or math, and of a method."""

    def register(rule: Callable[..., Any]) -> Callable[..., Any]:
        OPERATIONS.update(dict.fromkeys(names, rule))
        return rule

    return register


def functions() -> dict[Any, Callable[..., Any]]:
    """Returns the rules by the functions themselves.

    relu_ is relu: what it changes is seen to elsewhere.
    """
    table: dict[Any, Callable[..., Any]] = {}
    for module in (math, operator, functional, torch):
        for name, rule in OPERATIONS.items():
            table |= {getattr(module, each): rule for each in (name, f"{name}_") if hasattr(module, each)}
    return table | {getattr: _getattr, operator.and_: _binary("&"), operator.or_: _binary("|"), operator.not_: _not}


def methods() -> dict[str, Callable[..., Any]]:
    """Returns the rules by the names of methods.

    x.relu_() is x.relu(): what it changes is seen to elsewhere.
    """
    own = {name: rule for name, rule in OPERATIONS.items() if hasattr(Tensor, name)}
    return own | {f"{name}_": rule for name, rule in own.items() if hasattr(Tensor, f"{name}_")}


# -- elementwise


def _unary(function: str) -> Callable[..., Any]:
    def rule(s: Scope, x: Any, inplace: bool = False) -> Value:
        if not isinstance(x.example, Tensor):
            return s.value(f"math.{function.split('.')[-1]}({x})")
        return s.value(f"{function}({x})", x.last)

    return rule


_UNARY = {
    "relu": "nnx.relu",
    "relu6": "nnx.relu6",
    "sigmoid": "nnx.sigmoid",
    "tanh": "nnx.tanh",
    "silu": "nnx.silu",
    "hardswish": "nnx.hard_swish",
    "hardsigmoid": "nnx.hard_sigmoid",
    "softsign": "nnx.soft_sign",
    "logsigmoid": "nnx.log_sigmoid",
    "selu": "nnx.selu",
    "mish": "jax.nn.mish",
    "rsqrt": "jax.lax.rsqrt",
    "erf": "jax.scipy.special.erf",
    "detach": "jax.lax.stop_gradient",
}
_SAME_NAME = """abs ceil cos cosh exp exp2 expm1 floor isfinite isinf isnan log log10 log1p log2 logical_not reciprocal
    round sign sin sinh sqrt square tan trunc"""
_UNARY |= {name: f"jnp.{name}" for name in _SAME_NAME.split()}
for _name, _function in _UNARY.items():
    operation(_name)(_unary(_function))


def _binary(sign: str, flipped: bool = False) -> Callable[..., Any]:
    def rule(s: Scope, a: Any, b: Any, *, alpha: Any = 1) -> Any:
        if isinstance(a, tuple | list):
            return {"+": operator.add, "*": operator.mul}[sign](a, b)
        (a, b), last = s.align(*((b, a) if flipped else (a, b)))
        right = _operand(s, b) if alpha == 1 else f"{s.src(alpha)} * {_operand(s, b)}"
        return s.value(f"{_operand(s, a)} {sign} {right}", last, primary=False)

    return rule


def _operand(s: Scope, x: Any) -> str:
    return x.atom if isinstance(x, Value) else s.src(x)


for _sign, _names in {
    "+": ("add", "iadd"),
    "-": ("sub", "subtract", "isub"),
    "*": ("mul", "multiply", "imul"),
    "/": ("truediv", "true_divide", "itruediv"),
    "//": ("floordiv", "floor_divide"),
    "%": ("mod", "remainder"),
    "**": ("pow",),
    "==": ("eq",),
    "!=": ("ne",),
    "<": ("lt", "less"),
    "<=": ("le", "less_equal"),
    ">": ("gt", "greater"),
    ">=": ("ge", "greater_equal"),
    "&": ("logical_and", "bitwise_and"),
    "|": ("logical_or", "bitwise_or"),
    "^": ("logical_xor", "xor"),
}.items():
    operation(*_names)(_binary(_sign))
operation("rsub")(_binary("-", flipped=True))


@operation("div", "divide")
def _div(s: Scope, a: Any, b: Any, *, rounding_mode: str | None = None) -> Any:
    signs = {None: "/", "floor": "//"}
    if rounding_mode not in signs:
        raise UnknownError(f"rounding_mode={rounding_mode!r}")
    return _binary(signs[rounding_mode])(s, a, b)


@operation("neg", "negative")
def _neg(s: Scope, x: Value) -> Value:
    return s.value(f"-{x.atom}", x.last, primary=False)


@operation("invert", "bitwise_not")
def _invert(s: Scope, x: Value) -> Value:
    return s.value(f"~{x.atom}", x.last, primary=False)


def _not(s: Scope, x: Value) -> Value:
    return s.value(f"not {x.atom}", primary=False)


def _extreme(name: str) -> Callable[..., Any]:
    def rule(s: Scope, a: Any, b: Any) -> Value:
        (a, b), last = s.align(a, b)
        return s.value(f"jnp.{name}({_plain(s, a)}, {_plain(s, b)})", last)

    return rule


for _name in ("maximum", "minimum"):
    operation(_name)(_extreme(_name))


def _plain(s: Scope, x: Any) -> str:
    """Returns the source of an operand that has been aligned."""
    return x.text if isinstance(x, Value) else s.src(x)


@operation("gelu")
def _gelu(s: Scope, x: Value, *, approximate: str = "none") -> Value:
    return s.value(f"nnx.gelu({x}, approximate={approximate == 'tanh'})", x.last)


@operation("leaky_relu")
def _leaky_relu(s: Scope, x: Value, negative_slope: float = 0.01, inplace: bool = False) -> Value:
    return s.value(f"nnx.leaky_relu({x}, negative_slope={s.src(negative_slope)})", x.last)


@operation("elu")
def _elu(s: Scope, x: Value, alpha: float = 1.0, inplace: bool = False) -> Value:
    return s.value(f"nnx.elu({x}, alpha={s.src(alpha)})", x.last)


@operation("celu")
def _celu(s: Scope, x: Value, alpha: float = 1.0, inplace: bool = False) -> Value:
    return s.value(f"nnx.celu({x}, alpha={s.src(alpha)})", x.last)


@operation("softplus")
def _softplus(s: Scope, x: Value, beta: float = 1.0, threshold: float = 20.0) -> Value:
    if beta != 1:
        x = s.named(x)
        text = f"jnp.where({beta} * {x} > {threshold}, {x}, nnx.softplus({beta} * {x}) / {beta})"
    else:
        x = s.named(x)
        text = f"jnp.where({x} > {threshold}, {x}, nnx.softplus({x}))"
    return s.value(text, x.last)


@operation("hardtanh")
def _hardtanh(s: Scope, x: Value, min_val: float = -1.0, max_val: float = 1.0, inplace: bool = False) -> Value:
    return _clamp(s, x, min_val, max_val)


@operation("clamp", "clip")
def _clamp(s: Scope, x: Value, min: Any = None, max: Any = None) -> Value:  # noqa: A002
    (x, low, high), last = s.align(x, min, max)
    return s.value(f"jnp.clip({x}, {_plain(s, low)}, {_plain(s, high)})", last)


@operation("clamp_min")
def _clamp_min(s: Scope, x: Value, min: Any) -> Value:  # noqa: A002
    return _clamp(s, x, min)


@operation("threshold")
def _threshold(s: Scope, x: Value, threshold: float, value: float, inplace: bool = False) -> Value:
    x = s.named(x)
    return s.value(f"jnp.where({x} > {threshold}, {x}, {value})", x.last)


@operation("hardshrink")
def _hardshrink(s: Scope, x: Value, lambd: float = 0.5) -> Value:
    x = s.named(x)
    return s.value(f"jnp.where(jnp.abs({x}) > {lambd}, {x}, 0)", x.last)


@operation("softshrink")
def _softshrink(s: Scope, x: Value, lambd: float = 0.5) -> Value:
    x = s.named(x)
    return s.value(f"jnp.sign({x}) * jnp.maximum(jnp.abs({x}) - {lambd}, 0)", x.last, primary=False)


@operation("tanhshrink")
def _tanhshrink(s: Scope, x: Value) -> Value:
    x = s.named(x)
    return s.value(f"{x} - nnx.tanh({x})", x.last, primary=False)


@operation("where")
def _where(s: Scope, condition: Value, a: Any, b: Any) -> Value:
    (condition, a, b), last = s.align(condition, a, b)
    return s.value(f"jnp.where({condition}, {_plain(s, a)}, {_plain(s, b)})", last)


@operation("masked_fill")
def _masked_fill(s: Scope, x: Value, mask: Value, value: Any) -> Value:
    return _where(s, mask, value, x)


@operation("glu")
def _glu(s: Scope, x: Value, dim: int = -1) -> Value:
    return s.value(f"nnx.glu({x}, axis={x.axis(dim)})", x.last)


def _normalised(name: str) -> Callable[..., Any]:
    def rule(s: Scope, x: Value, dim: int | None = None, _stacklevel: int = 3, dtype: Any = None) -> Value:
        dim = (0 if x.example.ndim in (0, 1, 3) else 1) if dim is None else dim
        text = x.text if dtype is None else f"{x.atom}.astype({s.src(dtype)})"
        return s.value(f"nnx.{name}({text}, axis={_axis(x, dim)})", x.last)

    return rule


for _name in ("softmax", "log_softmax"):
    operation(_name)(_normalised(_name))


def _axis(x: Value, dim: int) -> int:
    """Returns our axis for torch's, -1 for the last of ours."""
    axis = x.axis(dim)
    return -1 if axis == x.example.ndim - 1 else axis


@operation("dropout")
def _dropout(s: Scope, x: Value, p: float = 0.5, training: Any = True, inplace: bool = False) -> Value:
    if not isinstance(training, Switch) and not training:
        return x
    layer = s.layer("dropout", sized("nnx.Dropout", ("rate", p)))
    always = "" if isinstance(training, Switch) else ", deterministic=False"
    return s.value(f"{layer}({x}{always})", x.last)


@operation("contiguous", "clone", "cpu", "cuda", "requires_grad_")
def _same(s: Scope, x: Value, *_: Any, **__: Any) -> Value:
    return x


def _cast(name: str) -> Callable[..., Any]:
    def rule(s: Scope, x: Value) -> Value:
        return _to(s, x, s.example.dtype)

    return rule


for _name in ("float", "double", "half", "bfloat16", "long", "int", "bool"):
    operation(_name)(_cast(_name))


@operation("to", "type")
def _to(s: Scope, x: Value, *args: Any, **_: Any) -> Value:
    if s.example.dtype == x.example.dtype:
        return x
    return s.value(f"{x.atom}.astype({s.src(s.example.dtype)})", x.last)


@operation("type_as")
def _type_as(s: Scope, x: Value, other: Value) -> Value:
    return s.value(f"{x.atom}.astype({other.atom}.dtype)", x.last)


# -- reductions


def _dims(x: Value, dim: Any) -> set[int]:
    rank = x.example.ndim
    if dim is None:
        return set(range(rank))
    return {d % rank for d in (dim if isinstance(dim, tuple | list) else (dim,))}


def _reduction(name: str, extra: str = "") -> Callable[..., Any]:
    def rule(s: Scope, x: Value, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Value:
        if dim is None:
            return s.value(f"{x.atom}.{name}({extra})")
        dims = _dims(x, dim)
        x, last = (x, x.last) if keepdim else s.without(x, dims)
        axes = sorted(x.order.index(d) for d in dims)
        rank = x.example.ndim
        axis = axes[0] if len(axes) == 1 else tuple(axes)
        options = [f"axis={-1 if axis == rank - 1 and not x.last else axis}", *(["keepdims=True"] if keepdim else [])]
        return s.value(f"{x.atom}.{name}({', '.join([*options, *([extra] if extra else [])])})", last)

    return rule


for _name, _function in {
    "mean": "mean",
    "sum": "sum",
    "amax": "max",
    "amin": "min",
    "prod": "prod",
    "any": "any",
    "all": "all",
    "argmax": "argmax",
    "argmin": "argmin",
}.items():
    operation(_name)(_reduction(_function))


@operation("logsumexp")
def _logsumexp(s: Scope, x: Value, dim: Any, keepdim: bool = False) -> Value:
    value = _reduction("logsumexp")(s, x, dim, keepdim)
    return replace(value, text=_as_function(value.text, "nnx.logsumexp"))


def _as_function(text: str, function: str) -> str:
    receiver, _, arguments = text.rpartition(f".{function.rpartition('.')[2]}(")
    return f"{function}({receiver}, {arguments}"


def _max_or_min(name: str) -> Callable[..., Any]:
    def rule(s: Scope, x: Any, dim: Any = None, keepdim: bool = False, other: Any = None) -> Any:
        other = dim if isinstance(dim, Value) else other
        if other is not None:
            return OPERATIONS[f"{name}imum"](s, x, other)
        if dim is None:
            return s.value(f"{x.atom}.{name}()")
        values, indices = s.example
        s.example = values
        first = _reduction(name)(s, x, dim, keepdim)
        s.example = indices
        second = _reduction(f"arg{name}")(s, x, dim, keepdim)
        return s.body.assign(first, None, None), s.body.assign(second, None, None)

    return rule


for _name in ("max", "min"):
    operation(_name)(_max_or_min(_name))


def _deviation(name: str) -> Callable[..., Any]:
    def rule(
        s: Scope, x: Value, dim: Any = None, unbiased: bool = True, keepdim: bool = False, *, correction: Any = None
    ) -> Value:
        if isinstance(dim, bool):
            dim, unbiased = None, dim
        ddof = int(unbiased) if correction is None else correction
        return _reduction(name, f"ddof={ddof}")(s, x, dim, keepdim)

    return rule


for _name in ("var", "std"):
    operation(_name)(_deviation(_name))


@operation("norm")
def _norm(s: Scope, x: Value, p: Any = 2, dim: Any = None, keepdim: bool = False) -> Value:
    if p not in (2, "fro", 2.0) or dim is None:
        raise UnknownError(f"p={p!r}, dim={dim!r}")
    x = s.named(x)
    squares = _reduction("sum")(s, replace(x, text=f"({x} * {x})"), dim, keepdim)
    return replace(squares, text=f"jnp.sqrt({squares})")


@operation("normalize")
def _normalize(s: Scope, x: Value, p: float = 2.0, dim: int = 1, eps: float = 1e-12) -> Value:
    x = s.named(x)
    with_norm = replace(x, example=x.example.sum(dim, keepdim=True))
    norm = _norm(s, x, p, dim, keepdim=True)
    return s.value(f"{x} / jnp.maximum({norm}, {eps!r})", with_norm.last, primary=False)


@operation("cumsum")
def _cumsum(s: Scope, x: Value, dim: int) -> Value:
    return s.value(f"jnp.cumsum({x}, axis={x.axis(dim)})", x.last)


# -- shapes


def _getattr(s: Scope, x: Any, name: str) -> Any:
    if isinstance(x, tuple) and name in ("values", "indices"):
        return x[name == "indices"]
    if name == "shape":
        return _size(s, x)
    if name in ("device", "requires_grad", "layout"):
        return s.example
    if name == "dtype":
        return s.value(f"{x.atom}.dtype")
    if name == "ndim":
        return x.example.ndim
    if name in ("T", "mT"):
        x = x.to(False)
        return s.value(f"{x.atom}.{name}")
    if name == "data":
        return _unary("jax.lax.stop_gradient")(s, x)
    raise UnknownError(f"the attribute {name!r} of an array")


@operation("size")
def _size(s: Scope, x: Value, dim: int | None = None) -> Any:
    sizes = tuple(s.value(f"{x.atom}.shape[{x.axis(i)}]", example=int(n)) for i, n in enumerate(x.example.shape))
    return sizes if dim is None else sizes[dim]


@operation("dim")
def _dim(s: Scope, x: Value) -> int:
    return x.example.ndim


@operation("numel")
def _numel(s: Scope, x: Value) -> Value:
    return s.value(f"{x.atom}.size")


def _shape(sizes: tuple[Any, ...]) -> list[Any]:
    return list(sizes[0]) if len(sizes) == 1 and isinstance(sizes[0], tuple | list) else list(sizes)


def _texts(s: Scope, sizes: Sequence[Any]) -> str:
    return ", ".join(s.src(each) for each in sizes)


@operation("view", "reshape")
def _reshape(s: Scope, x: Value, *shape: Any, **named: Any) -> Value:
    if isinstance(s.example, Tensor) and s.example.dtype != x.example.dtype:
        raise UnknownError("a view of another dtype")
    sizes = _shape(shape or tuple(named.values()))
    old, new = tuple(x.example.shape), tuple(s.example.shape)
    if old == new:
        return x
    if x.last and len(new) > 2 and old[:2] == new[:2]:  # only the spatial axes change
        return s.value(f"{x.atom}.reshape({_texts(s, [sizes[0], *sizes[2:], sizes[1]])})", True)
    if not (x.last and all(n == 1 for n in old[2:])):  # else both layouts hold the numbers in one order
        x = x.to(False)
    return s.value(f"{x.atom}.reshape({_texts(s, sizes)})")


@operation("flatten")
def _flatten(s: Scope, x: Value, start_dim: int = 0, end_dim: int = -1) -> Value:
    rank = x.example.ndim
    start, end = start_dim % rank, end_dim % rank
    sizes = _size(s, x)
    return _reshape(s, x, [*sizes[:start], -1, *sizes[end + 1 :]])


@operation("unflatten")
def _unflatten(s: Scope, x: Value, dim: int, sizes: Any) -> Value:
    own = _size(s, x)
    dim %= x.example.ndim
    return _reshape(s, x, [*own[:dim], *sizes, *own[dim + 1 :]])


@operation("permute")
def _permute(s: Scope, x: Value, *dims: Any) -> Value:
    rank = x.example.ndim
    wanted = [d % rank for d in _shape(dims)]
    order = [wanted.index(axis) for axis in x.order]  # of our axes in the new array
    if order == sorted(order):
        return replace(x, example=s.example, last=False)
    if rank > 2 and order == [0, *range(2, rank), 1]:
        return replace(x, example=s.example, last=True)
    axes = [x.order.index(d) for d in wanted]
    moved = [i for i, axis in enumerate(axes) if i != axis]
    if rank == 2:
        return s.value(f"{x.atom}.T")
    if len(moved) == 2:
        a, b = moved
        if (a, b) == (rank - 2, rank - 1):
            return s.value(f"{x.atom}.mT")
        return s.value(f"{x.atom}.swapaxes({a}, {b})")
    return s.value(f"{x.atom}.transpose({', '.join(map(str, axes))})")


@operation("transpose", "swapaxes", "swapdims")
def _transpose(s: Scope, x: Value, dim0: int, dim1: int) -> Value:
    dims = list(range(x.example.ndim))
    dims[dim0], dims[dim1] = dims[dim1], dims[dim0]
    return _permute(s, x, dims)


@operation("t")
def _t(s: Scope, x: Value) -> Value:
    return _transpose(s, x, 0, 1) if x.example.ndim == 2 else x


@operation("movedim", "moveaxis")
def _movedim(s: Scope, x: Value, source: int, destination: int) -> Value:
    rank = x.example.ndim
    dims = [d for d in range(rank) if d != source % rank]
    dims.insert(destination % rank, source % rank)
    return _permute(s, x, dims)


@operation("squeeze")
def _squeeze(s: Scope, x: Value, dim: Any = None) -> Value:
    shape = x.example.shape
    dims = {i for i, n in enumerate(shape) if n == 1} if dim is None else _dims(x, dim)
    dims = {d for d in dims if shape[d] == 1}
    if not dims:
        return x
    x, last = s.without(x, dims)
    axes = sorted(x.order.index(d) for d in dims)
    return s.value(f"{x.atom}.squeeze({axes[0] if len(axes) == 1 else tuple(axes)})", last)


@operation("unsqueeze")
def _unsqueeze(s: Scope, x: Value, dim: int) -> Value:
    x = x.to(False)
    dim %= x.example.ndim + 1
    return s.value(f"jnp.expand_dims({x}, {-1 if dim == x.example.ndim else dim})")


@operation("expand", "broadcast_to")
def _expand(s: Scope, x: Value, *sizes: Any) -> Value:
    wanted = _shape(sizes)
    if tuple(x.example.shape) == tuple(s.example.shape):
        return x
    new = len(wanted) - x.example.ndim
    x = x.to(False) if new else x
    own = _size(s, x)
    full = [own[i - new] if isinstance(n, int) and n == -1 else n for i, n in enumerate(wanted)]
    full = [full[axis] for axis in x.order] if not new else full
    return s.value(f"jnp.broadcast_to({x}, {s.src(tuple(full))})", x.last)


@operation("expand_as")
def _expand_as(s: Scope, x: Value, other: Value) -> Value:
    return _expand(s, x, list(_size(s, other)))


@operation("repeat", "tile")
def _repeat(s: Scope, x: Value, *sizes: Any) -> Value:
    times = _shape(sizes)
    if len(times) != x.example.ndim:
        x = x.to(False)
    times = [times[axis] for axis in x.order] if len(times) == x.example.ndim else times
    return s.value(f"jnp.tile({x}, {s.src(tuple(times))})", x.last)


@operation("repeat_interleave")
def _repeat_interleave(s: Scope, x: Value, repeats: int, dim: int | None = None) -> Value:
    if dim is None or not isinstance(repeats, int):
        raise UnknownError("no dim, or several numbers of repeats")
    return s.value(f"jnp.repeat({x}, {repeats}, axis={x.axis(dim)})", x.last)


@operation("cat", "concat", "concatenate")
def _cat(s: Scope, tensors: Sequence[Value], dim: int = 0) -> Value:
    parts, last = s.align(*tensors)
    return s.value(f"jnp.concatenate([{', '.join(p.text for p in parts)}], axis={_axis(parts[0], dim)})", last)


@operation("stack")
def _stack(s: Scope, tensors: Sequence[Value], dim: int = 0) -> Value:
    return s.value(f"jnp.stack([{', '.join(s.src(t) for t in tensors)}], axis={dim})")


@operation("chunk", "tensor_split")
def _chunk(s: Scope, x: Value, chunks: int, dim: int = 0) -> Any:
    return _pieces(s, x, dim, isinstance(chunks, int))


@operation("split", "split_with_sizes")
def _split(s: Scope, x: Value, split_size_or_sections: Any, dim: int = 0) -> Any:
    return _pieces(s, x, dim, isinstance(split_size_or_sections, int))


def _pieces(s: Scope, x: Value, dim: int, even: bool) -> Any:
    sizes = [piece.shape[dim] for piece in s.example]
    if even and len(set(sizes)) == 1:
        where = str(len(sizes))
    else:
        where = repr([sum(sizes[: i + 1]) for i in range(len(sizes) - 1)])
    return s.several(f"jnp.split({x}, {where}, axis={_axis(x, dim)})", (x.last,) * len(sizes))


@operation("unbind")
def _unbind(s: Scope, x: Value, dim: int = 0) -> Any:
    return tuple(
        _getitem(s, x, (slice(None),) * (dim % x.example.ndim) + (i,), example=each) for i, each in enumerate(s.example)
    )


@operation("getitem", "select")
def _getitem(s: Scope, x: Any, index: Any, *rest: Any, example: Any = None) -> Any:
    if rest:  # select(x, dim, index)
        index = (slice(None),) * (index % x.example.ndim) + (rest[0],)
    if isinstance(x, Missing):
        raise UnknownError(x.reason)
    if not isinstance(x, Value):
        return x[index]
    if not isinstance(x.example, Tensor):
        return s.value(f"{x.atom}[{s.src(index)}]")
    if x.text.endswith("[None]") and index in (0, -1) and not isinstance(index, Value | tuple):
        return s.value(x.text.removesuffix("[None]"), example=example)
    items = list(index) if isinstance(index, tuple) else [index]
    plain = all(i is Ellipsis or isinstance(i, slice | int) or _is_size(i) for i in items)
    if plain and not any(isinstance(i, bool) for i in items):
        if Ellipsis in items:
            at = items.index(Ellipsis)
            items[at : at + 1] = [slice(None)] * (x.example.ndim - len(items) + 1)
        if x.last:
            items += [slice(None)] * (x.example.ndim - len(items))
            gone = {i for i, item in enumerate(items) if not isinstance(item, slice)}
            x, last = s.without(x, gone)
            items = [items[axis] for axis in x.order]
            while len(items) > 1 and items[-1] == slice(None):
                items.pop()
            return s.value(f"{x.atom}[{_index(s, items)}]", last, example=example)
        return s.value(f"{x.atom}[{_index(s, items)}]", example=example)
    x = x.to(False)
    return s.value(f"{x.atom}[{_index(s, items)}]", example=example)


def _is_size(item: Any) -> bool:
    return isinstance(item, Value) and isinstance(item.example, int)


def _index(s: Scope, items: Sequence[Any]) -> str:
    def one(item: Any) -> str:
        if item is Ellipsis:
            return "..."
        if not isinstance(item, slice):
            return s.src(item)
        ends = [
            None if i is None else s.named(i) if isinstance(i, Value) else i for i in (item.start, item.stop, item.step)
        ]
        start, stop, step = ("" if i is None else s.src(i) for i in ends)
        return f"{start}:{stop}" + (f":{step}" if step else "")

    return ", ".join(map(one, items))


@operation("pad")
def _pad(s: Scope, x: Value, pad: Sequence[int], mode: str = "constant", value: Any = None) -> Value:
    modes = {"constant": "", "reflect": ', mode="reflect"', "replicate": ', mode="edge"', "circular": ', mode="wrap"'}
    if any((p.example if isinstance(p, Value) else p) < 0 for p in pad):
        raise UnknownError("negative padding")
    rank = x.example.ndim
    pairs: list[Any] = [(0, 0)] * rank
    for i in range(len(pad) // 2):
        pairs[rank - 1 - i] = (pad[2 * i], pad[2 * i + 1])
    widths = tuple(pairs[axis] for axis in x.order)
    fill = f", constant_values={s.src(value)}" if value else ""
    return s.value(f"jnp.pad({x}, {s.src(widths)}{modes[mode]}{fill})", x.last)


@operation("roll")
def _roll(s: Scope, x: Value, shifts: Any, dims: Any) -> Value:
    axes = tuple(x.axis(d) for d in dims) if isinstance(dims, tuple | list) else x.axis(dims)
    return s.value(f"jnp.roll({x}, {s.src(shifts)}, axis={axes})", x.last)


@operation("flip")
def _flip(s: Scope, x: Value, *dims: Any) -> Value:
    axes = tuple(x.axis(d) for d in _shape(dims))
    return s.value(f"jnp.flip({x}, axis={axes})", x.last)


def _triangular(name: str) -> Callable[..., Any]:
    def rule(s: Scope, x: Value, diagonal: int = 0) -> Value:
        return s.value(f"jnp.{name}({x.to(False)}{f', {diagonal}' if diagonal else ''})")

    return rule


for _name in ("tril", "triu"):
    operation(_name)(_triangular(_name))


@operation("gather")
def _gather(s: Scope, x: Value, dim: int, index: Value) -> Value:
    return s.value(f"jnp.take_along_axis({s.src(x)}, {s.src(index)}, axis={dim})")


@operation("index_select")
def _index_select(s: Scope, x: Value, dim: int, index: Value) -> Value:
    return s.value(f"jnp.take({x}, {index}, axis={x.axis(dim)})", x.last)


@operation("one_hot")
def _one_hot(s: Scope, x: Value, num_classes: int = -1) -> Value:
    if num_classes < 0:
        raise UnknownError("one_hot without num_classes")
    return s.value(f"nnx.one_hot({x}, {num_classes}, dtype=int)")


# -- new arrays


def _creation(name: str) -> Callable[..., Any]:
    def rule(s: Scope, *sizes: Any, dtype: Any = None, device: Any = None, **_: Any) -> Value:
        kind = f", dtype={s.src(s.example.dtype)}" if s.example.dtype != torch.float32 else ""
        return s.value(f"jnp.{name}({s.src(tuple(_shape(sizes)))}{kind})")

    return rule


for _name in ("zeros", "ones", "empty"):
    operation(_name)(_creation(_name))


@operation("full")
def _full(s: Scope, size: Any, fill_value: Any, *, dtype: Any = None, device: Any = None, **_: Any) -> Value:
    return s.value(f"jnp.full({s.src(tuple(size))}, {s.src(fill_value)}, dtype={s.src(s.example.dtype)})")


@operation("arange")
def _arange(s: Scope, *ends: Any, dtype: Any = None, device: Any = None, **_: Any) -> Value:
    kind = "" if s.example.dtype == torch.int64 else f", dtype={s.src(s.example.dtype)}"
    return s.value(f"jnp.arange({_texts(s, ends)}{kind})")


def _filled_like(name: str) -> Callable[..., Any]:
    def rule(s: Scope, x: Value, dtype: Any = None, device: Any = None) -> Value:
        kind = f", dtype={s.src(dtype)}" if isinstance(dtype, torch.dtype) else ""
        return s.value(f"jnp.{name}({x}{kind})", x.last)

    return rule


for _name in ("zeros_like", "ones_like"):
    operation(_name)(_filled_like(_name))


def _new(name: str) -> Callable[..., Any]:
    def rule(s: Scope, x: Value, *sizes: Any, dtype: Any = None, device: Any = None) -> Value:
        kind = s.src(dtype) if isinstance(dtype, torch.dtype) else f"{x.atom}.dtype"
        return s.value(f"jnp.{name[4:]}({s.src(tuple(_shape(sizes)))}, dtype={kind})")

    return rule


for _name in ("new_zeros", "new_ones"):
    operation(_name)(_new(_name))


# -- products


@operation("matmul", "bmm", "mm", "imatmul")
def _matmul(s: Scope, a: Value, b: Value) -> Value:
    return s.value(f"{a.to(False).atom} @ {b.to(False).atom}", primary=False)


@operation("baddbmm", "addmm")
def _addmm(s: Scope, x: Value, a: Value, b: Value) -> Value:
    return s.value(f"{x.to(False).atom} + {a.to(False).atom} @ {b.to(False).atom}", primary=False)


@operation("dot")
def _dot(s: Scope, a: Value, b: Value) -> Value:
    return s.value(f"{a.atom} @ {b.atom}", primary=False)


@operation("einsum")
def _einsum(s: Scope, equation: str, *operands: Any) -> Value:
    arrays = list(operands[0]) if len(operands) == 1 and isinstance(operands[0], tuple | list) else list(operands)
    inputs, arrow, output = equation.replace(" ", "").partition("->")
    terms = inputs.split(",")
    for i, (term, x) in enumerate(zip(terms, arrays, strict=True)):
        if x.last and "." not in term:
            terms[i] = "".join(term[axis] for axis in x.order)
        else:
            arrays[i] = x.to(False)
    if not arrow:
        output = "".join(sorted(c for c in set(inputs) if c.isalpha() and inputs.count(c) == 1))
    return s.value(f'jnp.einsum("{",".join(terms)}->{output}", {", ".join(x.text for x in arrays)})')


@operation("linear")
def _linear(s: Scope, x: Value, weight: Value, bias: Value | None = None) -> Value:
    plus = "" if bias is None else f" + {bias.atom}"
    kernel = weight.text.removesuffix(".T") if weight.text.endswith(".T") else f"{weight.atom}.T"
    return s.value(f"{x.to(False).atom} @ {kernel}{plus}", primary=False)


@operation("embedding")
def _embedding(s: Scope, x: Value, weight: Value, padding_idx: Any = None, **_: Any) -> Value:
    return s.value(f"{weight.to(False).atom}[{x}]")


@operation("scaled_dot_product_attention")
def _attention(
    s: Scope,
    query: Value,
    key: Value,
    value: Value,
    attn_mask: Any = None,
    dropout_p: Any = 0.0,
    is_causal: bool = False,
    *,
    scale: Any = None,
    enable_gqa: bool = False,
) -> Value:
    if dropout_p or enable_gqa:
        raise UnknownError("dropout_p or enable_gqa")
    options = [f"mask={s.src(attn_mask)}"] if attn_mask is not None else []
    options += ["is_causal=True"] if is_causal else []
    options += [f"scale={s.src(scale)}"] if scale is not None else []
    arguments = ", ".join([s.src(query), s.src(key), s.src(value), *options])
    return s.value(f"{s.helper('scaled_dot_product_attention')}({arguments})")


# -- pooling and resizing


def _each(value: Any, rank: int) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, tuple | list) else (value,) * rank


def _spatial(x: Value) -> int:
    if x.example.ndim < 3:
        raise UnknownError(f"an array of {x.example.ndim} axes")
    return x.example.ndim - 2


def _pooling(name: str, rank: int) -> Callable[..., Any]:
    def rule(
        s: Scope,
        x: Value,
        kernel_size: Any,
        stride: Any = None,
        padding: Any = 0,
        dilation: Any = 1,
        ceil_mode: bool = False,
        return_indices: bool = False,
    ) -> Value:
        if return_indices or set(_each(dilation, rank)) != {1} or x.example.ndim != rank + 2:
            raise UnknownError("return_indices, dilation, or an array without batch")
        return _pool(s, "max_pool", x, kernel_size, stride, padding, ceil_mode, "")

    def average(
        s: Scope,
        x: Value,
        kernel_size: Any,
        stride: Any = None,
        padding: Any = 0,
        ceil_mode: bool = False,
        count_include_pad: bool = True,
        divisor_override: Any = None,
    ) -> Value:
        pads = set(_each(padding, rank)) != {0}
        if x.example.ndim != rank + 2:
            raise UnknownError("an array without batch")
        counted = count_include_pad or divisor_override is not None
        if ceil_mode and ((pads and counted) or divisor_override is not None):
            raise UnknownError("ceil_mode with padding that counts, or with divisor_override")
        option = "" if counted and not ceil_mode else ", count_include_pad=False"
        value = _pool(s, "avg_pool", x, kernel_size, stride, padding, ceil_mode, option if pads or ceil_mode else "")
        if divisor_override is not None:
            factor = math.prod(_each(kernel_size, rank)) / divisor_override
            return replace(value, text=f"{value} * {factor!r}", primary=False)
        return value

    return rule if name == "max" else average


def _pool(
    s: Scope, name: str, x: Value, kernel_size: Any, stride: Any, padding: Any, ceil_mode: bool, option: str
) -> Value:
    rank = _spatial(x)
    x = x.to(True)
    window, pads = _each(kernel_size, rank), _each(padding, rank)
    strides = window if stride is None or stride in ([], ()) else _each(stride, rank)
    if ceil_mode:
        x = s.named(x)
        where = f"{s.helper('pool_padding')}({x}, {window}, {strides}, {pads})"
    else:
        where = '"VALID"' if set(pads) == {0} else repr(tuple((p, p) for p in pads))
    return s.value(f"nnx.{name}({x}, window_shape={window}, strides={strides}, padding={where}{option})", True)


def _adaptive(reduce: str, rank: int) -> Callable[..., Any]:
    def rule(s: Scope, x: Value, output_size: Any, return_indices: bool = False) -> Value:
        if return_indices or x.example.ndim != rank + 2:
            raise UnknownError("return_indices, or an array without batch")
        x = x.to(True)
        sizes = _each(output_size, rank)
        if set(sizes) == {1}:
            axes = tuple(range(1, rank + 1)) if rank > 1 else 1
            return s.value(f"{x.atom}.{reduce}(axis={axes}, keepdims=True)", True)
        if None in sizes:
            own = _size(s, x)[2:]
            sizes = tuple(own[i] if n is None else n for i, n in enumerate(sizes))
        return s.value(f"{s.helper('adaptive_pool')}({x}, {s.src(sizes)}, jnp.{reduce})", True)

    return rule


for _rank in (1, 2, 3):
    for _name in ("max", "avg"):
        operation(f"{_name}_pool{_rank}d")(_pooling(_name, _rank))
        operation(f"adaptive_{_name}_pool{_rank}d")(_adaptive({"max": "max", "avg": "mean"}[_name], _rank))


@operation("interpolate", "upsample")
def _interpolate(
    s: Scope,
    x: Value,
    size: Any = None,
    scale_factor: Any = None,
    mode: str = "nearest",
    align_corners: bool | None = None,
    recompute_scale_factor: Any = None,
    antialias: bool = False,
) -> Value:
    x = x.to(True)
    rank = _spatial(x)
    old, new = x.example.shape[2:], s.example.shape[2:]
    linear = {"linear": 1, "bilinear": 2, "trilinear": 3}.get(mode) == rank
    if antialias or not (linear or mode == "nearest"):
        raise UnknownError(f"mode={mode!r}, antialias={antialias}")
    factors = _each(scale_factor, rank) if scale_factor is not None else ()
    if factors and any(n * f != m for n, m, f in zip(old, new, factors, strict=True)):
        raise UnknownError(f"scale_factor={scale_factor!r}, which makes no whole number of {tuple(old)}")
    if factors and mode == "nearest" and all(float(f).is_integer() for f in factors):
        text = x.text
        for axis, factor in enumerate(factors, start=1):
            text = f"jnp.repeat({text}, {int(factor)}, axis={axis})"
        return s.value(text, True)
    x = s.named(x)
    if scale_factor is not None:
        sizes = [
            f"{x}.shape[{i + 1}] * {int(f)}" if float(f).is_integer() else f"int({x}.shape[{i + 1}] * {f})"
            for i, f in enumerate(factors)
        ]
    else:
        sizes = [s.src(n) for n in _each(size, rank)]
    shape = f"({', '.join(sizes)}{',' if rank == 1 else ''})"
    if mode == "nearest":
        return s.value(f"{s.helper('resize_nearest')}({x}, {shape})", True)
    return s.value(f"{s.helper('resize_linear')}({x}, {shape}, align_corners={bool(align_corners)})", True)


@operation("pixel_shuffle")
def _pixel_shuffle(s: Scope, x: Value, upscale_factor: int) -> Value:
    return s.value(f"{s.helper('pixel_shuffle')}({x.to(True)}, {upscale_factor})", True)
