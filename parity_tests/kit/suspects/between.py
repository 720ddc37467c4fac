"""Recognition, on both sides, of the steps that a network computes between its layers."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import permutations, product
from typing import Any

import jax
import numpy as np
import torch
from flax import nnx
from torch import Tensor, nn
from torch.nn import functional

from parity_tests.kit.suspects.trial import LayerPair, explains, sentence
from parity_tests.kit.trees import image_layout, is_floating, leaves, numpy_of
from parity_tests.standard import error, meaning_limit

_LIMIT = meaning_limit()
_MOST_HEADS = 32
_ROWS, _LARGE = 2, 2**16
_COMMON = 5  # activations that are tried before and after a reduction
_SOME, _NEAR = 97, 1e-6  # entries, and a distance that no rounding of float64 reaches


@dataclass(frozen=True)
class Gap:
    """A difference although no layer differs: in what the module `path` computes between its layers.

    Attributes:
        path: torch's name of the module whose own forward it is.
        torch: the module in torch.
        flax: the module in Flax.
        after: the last layer before it; None for the module's inputs.
        before: what agrees and may be its input, the last first: names, torch's values and Flax's.
        torch_value: the first value that differs, in torch: the input of the next layer, or the module's output.
        flax_value: the same in Flax.
        until: the next layer; None for the module's output.
        channels_last: whether the Flax model takes images as (N, ..., C).
    """

    path: str
    torch: nn.Module
    flax: nnx.Module
    after: str | None
    before: list[tuple[str, Tensor, jax.Array]]
    torch_value: Tensor
    flax_value: jax.Array
    until: str | None
    channels_last: bool


def gap_of(pair: LayerPair, matched: list[tuple[Any, Any]]) -> Gap:
    """Makes a gap of the inputs of a layer and the first of its outputs.

    What it computes is a step between the two.
    """
    ours, theirs = (
        [leaf for _, leaf in leaves(tree) if is_floating(leaf)]
        for tree in ((pair.torch_args, pair.torch_kwargs), (pair.flax_args, pair.flax_kwargs))
    )
    names = [f"x{i}" if i else "x" for i in range(len(ours))]
    before = list(zip(names, ours, theirs, strict=False))
    return Gap(pair.path, pair.torch, pair.flax, None, before, *matched[0], None, pair.channels_last)


@dataclass(frozen=True)
class Step:
    """A function that networks have between layers, on a tensor in torch's layout.

    Attributes:
        torch: as code of torch.
        flax: as code of Flax.
        apply: computes it.
    """

    torch: str
    flax: str
    apply: Callable[[Tensor], Tensor]


_IDENTITY = Step("x", "x", lambda x: x)
_ACTIVATIONS = (
    Step("relu(x)", "nnx.relu(x)", functional.relu),
    Step("gelu(x)", "nnx.gelu(x, approximate=False)", functional.gelu),
    Step("gelu(x, approximate='tanh')", "nnx.gelu(x)", lambda x: functional.gelu(x, approximate="tanh")),
    Step("silu(x)", "nnx.silu(x)", functional.silu),
    Step("tanh(x)", "nnx.tanh(x)", torch.tanh),
    Step("sigmoid(x)", "nnx.sigmoid(x)", torch.sigmoid),
    *(
        Step(f"leaky_relu(x, {s})", f"nnx.leaky_relu(x, {s})", partial(functional.leaky_relu, negative_slope=s))
        for s in (0.01, 0.1, 0.2, 0.3, 0.25, 0.05)
    ),
    Step("elu(x)", "nnx.elu(x)", functional.elu),
    Step("relu6(x)", "nnx.relu6(x)", functional.relu6),
    Step("softplus(x)", "nnx.softplus(x) where x <= 20, x beyond", functional.softplus),
    Step("logaddexp(x, 0)", "nnx.softplus(x)", lambda x: torch.logaddexp(x, torch.zeros_like(x))),
    Step("hardswish(x)", "nnx.hard_swish(x)", functional.hardswish),
    Step("hardsigmoid(x)", "nnx.hard_sigmoid(x)", functional.hardsigmoid),
    Step("hardtanh(x)", "nnx.hard_tanh(x)", functional.hardtanh),
    Step("mish(x)", "jax.nn.mish(x)", functional.mish),
    Step("selu(x)", "nnx.selu(x)", functional.selu),
    Step("celu(x, 1)", "nnx.celu(x)", functional.celu),
    Step("softsign(x)", "nnx.soft_sign(x)", functional.softsign),
    Step("logsigmoid(x)", "nnx.log_sigmoid(x)", functional.logsigmoid),
    Step("sigmoid(1.702 * x) * x", "nnx.sigmoid(1.702 * x) * x", lambda x: torch.sigmoid(1.702 * x) * x),
    Step("relu(x) ** 2", "nnx.relu(x) ** 2", lambda x: functional.relu(x).square()),
    Step("x ** 2", "x ** 2", torch.square),
    Step("exp(x)", "jnp.exp(x)", torch.exp),
    Step("abs(x)", "jnp.abs(x)", torch.abs),
)


def cause(gap: Gap) -> str | None:
    """Explains what each side computes, if both are recognised, or how one's values come from the other's."""
    gap = _fewer_rows(gap)
    values = _Values(gap.torch_value, gap.flax_value, gap.channels_last)
    if values.original <= _LIMIT:
        return None
    before = [(name, value.double()) for name, value, _ in gap.before if value.is_floating_point()]
    masks = [(name, value) for name, value, _ in gap.before if value.dtype == torch.bool]
    found: dict[str, tuple[Step, float]] = {}
    for step, result in _candidates(before, masks, values, gap):
        for side, off in (("torch", values.off_torch(result)), ("flax", values.off_flax(result))):
            if side not in found and off <= _LIMIT:
                found[side] = step, off
        if len(found) == 2:
            (ours, off), (theirs, other) = found["torch"], found["flax"]
            left = max(off, other)
            if ours is theirs or not explains(left, values.original):
                return None
            return sentence(f"torch computes {ours.torch}, nnx {theirs.flax}", ours.flax, left, "they")
    for said, remedy, result in _relations(values, before):
        left = values.off_torch(result)
        if explains(left, values.original):
            return sentence(said, remedy, left, "they")
    return None


def _fewer_rows(gap: Gap) -> Gap:
    """Keeps two rows of a large batch, which no common step mixes, so that every step can be tried."""
    arrays: list[Any] = [each for _, *both in gap.before for each in both] + [gap.torch_value, gap.flax_value]
    batches = {array.shape[0] if array.ndim else 0 for array in arrays}
    if len(batches) > 1 or max(batches) <= _ROWS or max(math.prod(array.shape) for array in arrays) < _LARGE:
        return gap
    before = [(name, ours[:_ROWS], theirs[:_ROWS]) for name, ours, theirs in gap.before]
    return replace(gap, before=before, torch_value=gap.torch_value[:_ROWS], flax_value=gap.flax_value[:_ROWS])


class _Values:
    """The two values that differ, and distances from them in roundings."""

    def __init__(self, torch_value: Tensor, flax_value: Any, channels_last: bool) -> None:
        self.torch = torch_value.detach().double()
        self._flax, self._channels_last = flax_value, channels_last
        self._laid: dict[tuple[int, ...], Tensor | None] = {}
        theirs = self.flax(self.torch.shape)
        self.original = float("inf") if theirs is None else _off(theirs, self.torch)

    def flax(self, shape: Any) -> Tensor | None:
        """Returns Flax's value in torch's layout, if it has such a shape there."""
        if tuple(shape) not in self._laid:
            values = image_layout(self._channels_last).to_torch(numpy_of(self._flax), shape)
            self._laid[tuple(shape)] = None if values is None else torch.from_numpy(values.copy())
        return self._laid[tuple(shape)]

    def off_torch(self, result: Tensor) -> float:
        """Measures how far it is from torch's."""
        return float("inf") if _is_far(result, self.torch) else _off(result, self.torch)

    def off_flax(self, result: Tensor) -> float:
        """Measures how far it is from Flax's."""
        if result.shape != self.torch.shape and self.original < float("inf"):  # as they have one shape, so has this
            return float("inf")
        theirs = self.flax(result.shape)
        return float("inf") if theirs is None or _is_far(result, theirs) else _off(result, theirs)

    def is_near_last_token(self, result: Tensor) -> bool:
        """Tells whether it may be the last token of the first row, (1, 1, features), on either side."""
        both = (self.torch, self.flax(self.torch.shape))
        return any(value is not None and not _is_far(result, value[:1, -1:]) for value in both)


def _is_far(result: Tensor, value: Tensor) -> bool:
    """Tells whether it is far by some entries, which saves looking at all of them."""
    if result.shape != value.shape or result.numel() == 0:
        return True
    some = torch.linspace(0, result.numel() - 1, _SOME).long()
    sample, reference = result.reshape(-1)[some], value.reshape(-1)[some]
    return not bool((sample - reference).abs().max() <= _NEAR * reference.abs().max())


def _off(result: Tensor, value: Tensor) -> float:
    return error(result.numpy(), value.numpy(), value.numpy(), "float64")


def _candidates(
    before: list[tuple[str, Tensor]], masks: list[tuple[str, Tensor]], values: _Values, gap: Gap
) -> Iterator[tuple[Step, Tensor]]:
    """Yields steps and what they give, from the simplest."""
    shapes = {tuple(gap.torch_value.shape), tuple(gap.flax_value.shape)}
    shapes |= {(shape[0], shape[-1], *shape[1:-1]) for shape in shapes if len(shape) >= 3}  # in torch's layout
    same = [(name, x) for name, x in before if tuple(x.shape) in shapes]
    for name, x in same:
        for step in (_IDENTITY, *_ACTIVATIONS, *_along_axes(x, gap.channels_last)):
            yield from _applied(step, name, x)
    for (name, x), (other, y) in permutations(same, 2):
        if x.shape == y.shape:
            for step in (_IDENTITY, *_ACTIVATIONS[:8]):
                for each in _sums(step, other, y):
                    yield from _applied(each, name, x)
    for name, x in before:
        moves, reductions = list(_reshapes(x, shapes, gap.channels_last)), list(_reductions(x, shapes))
        for step in (*moves, *reductions):
            yield from _applied(step, name, x)
        for activation in _ACTIVATIONS:
            y = activation.apply(x)
            for step in moves:  # which commute with it
                code = _composed(activation, step)
                yield Step(_named(code.torch, name), _named(code.flax, name), code.apply), step.apply(y)
            for step in reductions if activation in _ACTIVATIONS[:_COMMON] else ():
                yield from _applied(_composed(activation, step), name, x)
                yield from _applied(_composed(step, activation), name, x)
    for words, parts in _attentions(before, shapes):
        yield from _attended(words, parts, masks, values)
    yield from _attention_weights(before, shapes)


def _applied(step: Step, name: str, x: Tensor) -> Iterator[tuple[Step, Tensor]]:
    try:
        result = step.apply(x)
    except (RuntimeError, IndexError, ValueError):  # it does not take such a shape
        return
    yield Step(_named(step.torch, name), _named(step.flax, name), step.apply), result


def _named(code: str, name: str) -> str:
    return code if " " in name else re.sub(r"\bx\b", lambda _: name, code)  # which "its input" is


def _composed(outer: Step, inner: Step) -> Step:
    return Step(
        re.sub(r"\bx\b", lambda _: inner.torch, outer.torch),
        re.sub(r"\bx\b", lambda _: inner.flax, outer.flax),
        lambda x: outer.apply(inner.apply(x)),
    )


def _sums(step: Step, other: str, y: Tensor) -> Iterator[Step]:
    """Adds a residual connection, before and after an activation."""
    plus = Step(f"x + {other}", f"x + {other}", lambda x: x + y)
    yield plus if step is _IDENTITY else _composed(step, plus)
    if step is not _IDENTITY:
        yield _composed(plus, step)


def _along_axes(x: Tensor, channels_last: bool) -> Iterator[Step]:
    for axis in reversed(range(x.ndim)):
        theirs = (x.ndim - 1 if axis == 1 else max(axis - 1, 0)) if channels_last and x.ndim >= 4 else axis
        yield Step(f"softmax(x, {axis})", f"nnx.softmax(x, axis={theirs})", partial(torch.softmax, dim=axis))
        logarithm = partial(torch.log_softmax, dim=axis)
        yield Step(f"log_softmax(x, {axis})", f"nnx.log_softmax(x, axis={theirs})", logarithm)
    for size in sorted({*x.shape[1:]}):
        for power, sign in ((0.5, "*"), (-0.5, "/")):
            code = f"x {sign} sqrt({size})"
            yield Step(code, code, partial(torch.mul, other=float(size) ** power))


def _reductions(x: Tensor, shapes: set[tuple[int, ...]]) -> Iterator[Step]:
    """Yields means, pooling and the like that may give one of the shapes."""
    if x.ndim >= 3:
        spatial = tuple(range(2, x.ndim))
        for name, axes in (("spatial", spatial), ("token", (1,))):
            where = f"{name} axes" if len(axes) > 1 else f"{name} axis"
            for word, reduce in (("mean", torch.mean), ("max", torch.amax), ("sum", torch.sum)):
                code = f"{word} over the {where} of x"
                yield Step(code, code, partial(reduce, dim=axes))
        for code, index in (("x[:, 0]", 0), ("x[:, -1]", -1)):
            yield Step(code, code, partial(torch.select, dim=1, index=index))
    if x.ndim in (3, 4):
        yield from _resized(x, shapes)


def _reshapes(x: Tensor, shapes: set[tuple[int, ...]], channels_last: bool) -> Iterator[Step]:
    """Yields every order of axes, in every shape."""
    moved = channels_last and x.ndim >= 4
    place = {0: 0, 1: x.ndim - 1, **{i: i - 1 for i in range(2, x.ndim)}} if moved else {i: i for i in range(x.ndim)}
    plain = tuple(range(x.ndim))
    own = [shape for shape in shapes if int(np.prod(shape)) == x.numel()]
    for order, shape in product(permutations(plain) if x.ndim <= 5 else [plain], sorted(own)):
        theirs = tuple(place[axis] for axis in order)
        if order == plain and shape == tuple(x.shape):
            continue
        ours = "x" if order == plain else f"x.permute{order}"
        flax = "x" if theirs == plain else f"jnp.transpose(x, {theirs})"
        first = "len(x)" if order[0] == 0 and shape[0] == len(x) else str(shape[0])
        sizes = f"({', '.join([first, *map(str, shape[1:])])})"
        ending = "" if shape == tuple(x.shape[axis] for axis in order) else f".reshape{sizes}"
        yield Step(ours + ending, flax + ending, partial(_rearranged, order=order, shape=shape))


def _rearranged(x: Tensor, order: tuple[int, ...], shape: tuple[int, ...]) -> Tensor:
    return x.permute(order).reshape(shape)


def _resized(x: Tensor, shapes: set[tuple[int, ...]]) -> Iterator[Step]:
    """Yields pooling and upsampling to the spatial sizes of one of the shapes."""
    rank = x.ndim - 2
    sizes = {shape[2:] for shape in shapes if len(shape) == x.ndim and shape[:2] == tuple(x.shape[:2])}
    for kernel, stride, pads in product((2, 3, 4, 5), (1, 2, 3, 4), ((0, 0), (1, 1), (0, 1), (1, 0), (2, 2), (1, 2))):
        size = tuple((n + sum(pads) - kernel) // stride + 1 for n in x.shape[2:])
        if size in sizes and max(pads) < kernel:
            yield from _pools(kernel, stride, pads, rank)
    for size in sizes:
        for mode, aligned in (("nearest", None), *product(("linear", "bicubic"), (False, True))):
            if (mode == "bicubic" and rank != 2) or size == tuple(x.shape[2:]):
                continue
            mode = "bilinear" if mode == "linear" and rank == 2 else mode
            code = f"interpolate(x, {size}, mode={mode!r}{'' if aligned is None else f', align_corners={aligned}'})"
            yield Step(
                code,
                f"jax.image.resize(x, ..., {mode!r})" if not aligned else f"a resize as torch's {code}",
                partial(functional.interpolate, size=size, mode=mode, align_corners=aligned),
            )


def _pools(kernel: int, stride: int, pads: tuple[int, int], rank: int) -> Iterator[Step]:
    window = ", ".join(map(str, (kernel, stride, pads[0] if pads[0] == pads[1] else pads)))
    given = f"{(kernel,) * rank}, {(stride,) * rank}, {[pads] * rank}"

    def padded(x: Tensor, value: float) -> Tensor:
        return functional.pad(x, pads * rank, value=value)

    pool = {1: functional.avg_pool1d, 2: functional.avg_pool2d}[rank]
    most = {1: functional.max_pool1d, 2: functional.max_pool2d}[rank]
    yield Step(
        f"max_pool{rank}d(x, {window})",
        f"nnx.max_pool(x, {given})",
        lambda x: most(padded(x, -torch.inf), kernel, stride),
    )
    yield Step(
        f"avg_pool{rank}d(x, {window})", f"nnx.avg_pool(x, {given})", lambda x: pool(padded(x, 0.0), kernel, stride)
    )
    if any(pads):
        yield Step(
            f"avg_pool{rank}d(x, {window}, count_include_pad=False)",
            f"nnx.avg_pool(x, {given}, count_include_pad=False)",
            lambda x: pool(padded(x, 0.0), kernel, stride) / pool(padded(torch.ones_like(x), 0.0), kernel, stride),
        )


def _attentions(before: list[tuple[str, Tensor]], shapes: set[tuple[int, ...]]) -> Iterator[tuple[str, list[Tensor]]]:
    """Yields queries, keys and values (B, heads, T, features).

    They are of a layer that packs them, or of three in any order.
    """
    for name, x in before:
        if x.ndim == 3 and x.shape[-1] % 3 == 0 and (*x.shape[:2], x.shape[-1] // 3) in shapes:
            for heads in _heads(x.shape[-1] // 3):
                for said, parts in _unpacked(x, heads):
                    yield f"{name} as {said}", parts
    same = [(name, x) for name, x in before if x.ndim == 3 and tuple(x.shape) in shapes][:3]
    if len(same) == 3:
        for order in permutations(reversed(same)):
            for heads, split in product(_heads(order[0][1].shape[-1]), (True, False)):
                parts = [_split(x, heads, split) for _, x in order]
                names, axes = ", ".join(name for name, _ in order), "heads, features" if split else "features, heads"
                yield f"({names}) as ({axes}) of {heads} heads", parts


def _attention_weights(before: list[tuple[str, Tensor]], shapes: set[tuple[int, ...]]) -> Iterator[tuple[Step, Tensor]]:
    """Yields softmax of the scores (B, heads, T, T) of a layer that packs queries, keys and values."""
    for name, x in before:
        if x.ndim != 3 or x.shape[-1] % 3:
            continue
        rows, tokens, width = x.shape
        for heads in _heads(width // 3):
            if (rows, heads, tokens, tokens) in shapes:
                for said, (q, k, _) in _unpacked(x, heads):
                    for scale, shown in _scales(q.shape[-1]).items():
                        code = f"attention weights of {name} as {said}, scale {shown}"
                        yield Step(code, code, torch.clone), torch.softmax(scale * q @ k.mT, -1)


def _scales(width: int) -> dict[float, str]:
    return {1 / math.sqrt(width): f"1/sqrt({width})", 1.0: "1"}


def _heads(width: int) -> list[int]:
    return [heads for heads in range(1, min(width, _MOST_HEADS) + 1) if width % heads == 0]


def _split(x: Tensor, heads: int, heads_first: bool) -> Tensor:
    """Splits (B, T, E) to (B, heads, T, features)."""
    shape = (*x.shape[:2], heads, -1) if heads_first else (*x.shape[:2], -1, heads)
    split = x.reshape(shape)
    return (split if heads_first else split.transpose(-1, -2)).transpose(1, 2)


def _unpacked(x: Tensor, heads: int) -> Iterator[tuple[str, list[Tensor]]]:
    width = x.shape[-1] // 3 // heads
    for axes, order in (
        ((3, heads, width), (2, 3, 4)),
        ((heads, 3, width), (3, 2, 4)),
        ((heads, width, 3), (4, 2, 3)),
        ((3, width, heads), (2, 4, 3)),
    ):
        split = x.reshape(*x.shape[:2], *axes).permute(*order[:1], 0, order[1], 1, order[2])
        for letters in permutations((0, 1, 2)) if axes[-1] == width else [(0, 1, 2)]:
            packed = ", ".join("qkv"[letters.index(i)] for i in range(3))
            names = ["3" if i == order[0] - 2 else "heads" if i == order[1] - 2 else "features" for i in range(3)]
            yield f"({', '.join(names)}) = {axes} of {packed}", [split[i] for i in letters]


def _attended(
    what: str, parts: list[Tensor], masks: list[tuple[str, Tensor]], values: _Values
) -> Iterator[tuple[Step, Tensor]]:
    q, _, _ = parts
    width, tokens = q.shape[-1], q.shape[-2]
    past = torch.ones(tokens, tokens, dtype=torch.bool).tril()
    seen: list[tuple[str, Tensor | None]] = [("", None), (", causal", past)]
    for name, own in masks:
        fits = [m for m in (own, own[:, None, None, :] if own.ndim == 2 else own) if _fits(m, q)]
        seen += [each for m in fits for each in ((f", {name} True = seen", m), (f", {name} True = hidden", ~m))]
    orders = {(0, 2, 1, 3): "heads, features", (0, 2, 3, 1): "features, heads"}
    last = [part[:1] for part in parts]
    last[0] = last[0][:, :, -1:]
    for scale, shown in _scales(width).items():
        bare = _attend(last, scale, None)
        for masked, mask in seen:
            whole = None if mask is None else mask.expand(*q.shape[:2], tokens, tokens)
            sees_all = mask is past or whole is None
            row = bare if sees_all or whole is None else _attend(last, scale, whole[:1, :, -1:])
            for order, merged in orders.items():
                if values.is_near_last_token(row.permute(order).flatten(2)):
                    code = f"attention of {what}, scale {shown}{masked}, merged as ({merged})"
                    yield Step(code, code, torch.clone), _attend(parts, scale, whole).permute(order).flatten(2)


def _attend(parts: list[Tensor], scale: float, mask: Tensor | None) -> Tensor:
    q, k, v = parts
    weights = scale * q @ k.mT
    return torch.softmax(weights if mask is None else weights.masked_fill(~mask, -torch.inf), -1) @ v


def _fits(mask: Tensor, q: Tensor) -> bool:
    try:
        return torch.broadcast_shapes(mask.shape, (*q.shape[:2], q.shape[2], q.shape[2])) == (*q.shape[:3], q.shape[2])
    except RuntimeError:
        return False


def _relations(values: _Values, before: list[tuple[str, Tensor]]) -> Iterator[tuple[str, str, Tensor]]:
    """Yields what differs, what would make Flax's value torch's, and that value."""
    ours = values.torch
    theirs = values.flax(ours.shape)
    if theirs is None:
        return
    for name, x in before:
        if x.shape == ours.shape:
            yield f"torch adds {name} (a residual connection), nnx does not", f"+ {name}", theirs + x
            yield f"nnx adds {name} (a residual connection), torch does not", f"- {name}", theirs - x
    if ours.ndim == 2:
        features = ours.shape[-1]
        for channels in {x.shape[axis] for _, x in before if x.ndim >= 3 for axis in (1, -1)}:
            if 1 < channels < features and features % channels == 0:
                shape = (len(ours), features // channels, channels)
                yield (
                    f"torch flattens {channels} channels first, nnx last",
                    "jnp.moveaxis(x, -1, 1) before the reshape",
                    theirs.reshape(shape).transpose(1, 2).flatten(1),
                )
                yield (
                    f"torch flattens {channels} channels last, nnx first",
                    "jnp.moveaxis(x, 1, -1) before the reshape",
                    theirs.reshape(len(ours), channels, -1).transpose(1, 2).flatten(1),
                )
    for order in permutations(range(ours.ndim)) if 2 <= ours.ndim <= 5 else ():
        if order != tuple(range(ours.ndim)):
            moved = theirs.permute(order)
            if moved.shape == ours.shape:
                yield f"torch's axes are nnx's in the order {order}", f"jnp.transpose(y, {order})", moved
    if ours.numel() > 3:
        factor = float((ours * theirs).sum() / theirs.square().sum())
        if abs(factor) > 0:
            shown = _factor(factor, ours.shape)
            yield f"torch's values are {shown} times nnx's", f"y * {shown}", factor * theirs
            shift = float((ours - theirs).mean())
            yield f"torch's values are nnx's {shift:+.6g}", f"y {shift:+.6g}", theirs + shift


def _factor(factor: float, shape: Any) -> str:
    """Writes a factor as a root of a size, if it is one."""
    close = [n for n in {*shape} if n > 1 and abs(factor / math.sqrt(n) - 1) < 1e-9]
    inverse = [n for n in {*shape} if n > 1 and abs(factor * math.sqrt(n) - 1) < 1e-9]
    return f"sqrt({close[0]})" if close else f"1/sqrt({inverse[0]})" if inverse else f"{factor:.6g}"
