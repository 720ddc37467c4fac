"""Draws from a key, as in `jax.random`: the same functions of the same bits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from probly_common.checks.values import index, type_name
from probly_torch.random._threefry import WORD, as_shape, check_key, split, words
from probly_torch.random._xla import divided, erf, erf_inv, flushed, fma, log, log1p, scalar

_BITS = {torch.float16: 16, torch.bfloat16: 16, torch.float32: 32, torch.float64: 64}
_MANTISSA = {torch.float16: 10, torch.bfloat16: 7, torch.float32: 23, torch.float64: 52}
_INTEGERS = (torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.uint16, torch.uint32)


def uniform(
    key: Tensor,
    shape: int | Sequence[int] = (),
    dtype: torch.dtype | None = None,
    minval: float | Tensor = 0.0,
    maxval: float | Tensor = 1.0,
) -> Tensor:
    """Draws uniform numbers in [minval, maxval), by default of torch's default dtype.

    Shape:
        minval and maxval broadcast to shape. Returns shape.

    Example:
        >>> from probly_torch import random
        >>> random.uniform(random.key(0), (2,))
        tensor([0.9477, 0.9786])
    """
    check_key("uniform", key, single=True)
    dtype = _float_dtype("uniform", dtype)
    lo, hi = (torch.as_tensor(v, dtype=dtype, device=key.device) for v in (minval, maxval))
    shape = _broadcast("uniform", shape, lo, hi)
    return torch.maximum(lo, fma(_unit(key, shape, dtype), hi - lo, lo))


def normal(key: Tensor, shape: int | Sequence[int] = (), dtype: torch.dtype | None = None) -> Tensor:
    """Draws standard normal numbers, by inversion: sqrt(2) * erf_inv(u) of u uniform in (-1, 1).

    They are equal to JAX's on a CPU with fused multiply-adds: float32 bit for bit, float64 to 2 ULP. One float64 number
    in a million is 3 ULP off, where XLA's logarithm and ours round apart.

    Example:
        >>> from probly_torch import random
        >>> random.normal(random.key(0), (2,))
        tensor([1.6226, 2.0253])
    """
    dtype = _float_dtype("normal", dtype)
    after = torch.finfo(dtype).eps / 2 - 1  # the number after -1
    return _sqrt2(dtype) * erf_inv(uniform(key, shape, dtype, after, 1.0))


def truncated_normal(
    key: Tensor,
    lower: float | Tensor,
    upper: float | Tensor,
    shape: int | Sequence[int] | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Draws standard normal numbers conditioned on the open interval (lower, upper).

    A bound of 0 can itself be drawn, as in JAX, where the next number after 0 is rounded to 0.

    Shape:
        lower and upper broadcast to shape, by default the shape that they have together. Returns shape.

    Example:
        >>> from probly_torch import random
        >>> random.truncated_normal(random.key(0), -2.0, 2.0, (3,)).abs().max() < 2
        tensor(True)
    """
    check_key("truncated_normal", key, single=True)
    dtype = _float_dtype("truncated_normal", dtype)
    lo, hi = (
        torch.as_tensor(v, dtype=dtype, device=v.device if isinstance(v, Tensor) else "cpu") for v in (lower, upper)
    )
    if not bool((lo < hi).all()):
        raise ValueError(f"truncated_normal expects lower < upper; got {lower}, {upper}. Pass lower=-2.0, upper=2.0.")
    shape = (
        torch.broadcast_shapes(lo.shape, hi.shape) if shape is None else _broadcast("truncated_normal", shape, lo, hi)
    )
    a, b = (erf(divided(v, _sqrt2(dtype))) for v in (lo, hi))
    infinity = torch.tensor(math.inf, dtype=dtype, device=lo.device)
    first, last = (flushed(v).to(key.device) for v in (torch.nextafter(lo, infinity), torch.nextafter(hi, -infinity)))
    return torch.clamp(_sqrt2(dtype) * erf_inv(uniform(key, shape, dtype, a, b)), first, last)


def bernoulli(
    key: Tensor,
    p: float | Tensor = 0.5,
    shape: int | Sequence[int] | None = None,
    mode: str = "low",
) -> Tensor:
    """Draws True with probability p.

    mode="high" draws twice the bits, for p below 1e-7.

    Shape:
        p broadcasts to shape, by default its own. Returns shape.

    Example:
        >>> from probly_torch import random
        >>> random.bernoulli(random.key(0), 0.25, (4,))
        tensor([False, False, False, False])
    """
    check_key("bernoulli", key, single=True)
    mode = _mode("bernoulli", mode)
    p = torch.as_tensor(p, device=key.device)
    if not p.is_floating_point():
        raise TypeError(f"bernoulli expects a floating p; got {p.dtype}. Pass a float, p=0.5.")
    shape = p.shape if shape is None else _broadcast("bernoulli", shape, p)
    if mode == "low":
        return _unit(key, shape, p.dtype) < p
    coarse, fine = _unit(key, (2, *shape), p.dtype)
    return fine * 2.0 ** -_MANTISSA[p.dtype] < p - coarse


def randint(
    key: Tensor,
    shape: int | Sequence[int],
    minval: int | Tensor,
    maxval: int | Tensor,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Draws integers in [minval, maxval), by default int32, as JAX does unless `jax_enable_x64` is set.

    As in JAX, a span that is no power of 2 favours some integers, by at most 1 in 2**64 / span**2 in 32 bits.

    Shape:
        minval and maxval broadcast to shape. Returns shape.

    Example:
        >>> from probly_torch import random
        >>> random.randint(random.key(0), (4,), 0, 10).dtype
        torch.int32
    """
    check_key("randint", key, single=True)
    dtype = torch.int32 if dtype is None else dtype
    if dtype not in _INTEGERS:
        raise TypeError(f"randint expects an integer dtype of at most 63 bits; got {dtype}. Pass dtype=torch.int32.")
    lo, hi = (_integers("randint", name, v).to(key.device) for name, v in (("minval", minval), ("maxval", maxval)))
    shape, info = _broadcast("randint", shape, lo, hi), torch.iinfo(dtype)
    span = hi - lo  # above 0 unless the difference does not fit
    if not bool(((info.min <= lo) & (lo < hi) & (hi - 1 <= info.max) & (span > 0)).all()):
        raise ValueError(
            f"randint expects minval < maxval, and integers between them that {dtype} holds; got {minval}, {maxval}. "
            f"Pass minval=0, maxval=10."
        )
    width = 64 if dtype == torch.int64 else 32
    mask = -1 if width == 64 else WORD
    higher, lower = (words(each, shape, width) for each in split(key))
    multiplier = _modulo(torch.full_like(span, 2 ** (width // 2)), span)  # 2**width modulo span, as far as it fits
    multiplier = _modulo((multiplier * multiplier) & mask, span)
    offset = (_modulo(higher, span) * multiplier & mask) + _modulo(lower, span)
    return (lo + _modulo(offset & mask, span)).to(dtype)


def choice(
    key: Tensor,
    a: int | Tensor,
    shape: int | Sequence[int] = (),
    replace: bool = True,
    p: Tensor | None = None,
    axis: int = 0,
    mode: str | None = None,
) -> Tensor:
    """Draws numbers of `range(a)`, or slices of a along an axis, with probabilities p if they are not equal.

    Without p they are the same as JAX's unless `jax_enable_x64` is set, where JAX draws 64 bits for each number. With p
    they are the same, except for numbers that fall within rounding of the sum of some probabilities, which XLA adds in
    an order of its own.

    Shape:
        p `(n,)`, with n a or a.shape[axis]. Returns shape, in place of the axis.

    Example:
        >>> from probly_torch import random
        >>> random.choice(random.key(0), 5, (5,), replace=False).sort().values
        tensor([0, 1, 2, 3, 4])
    """
    check_key("choice", key, single=True)
    mode = _mode("choice", mode)
    count = a.shape[axis] if isinstance(a, Tensor) and a.ndim else int(_integers("choice", "a", a))
    shape = as_shape("choice", shape)
    draws = math.prod(shape)
    if draws and (count < 1 or (not replace and draws > count)):
        raise ValueError(
            f"choice expects at least {1 if replace else draws} to choose from; got {count}. Pass shape=({count},)"
            f"{'' if replace else ', or replace=True'}."
        )
    if p is None:
        chosen = randint(key, shape, 0, max(count, 1)).long() if replace else permutation(key, count)[:draws]
    else:
        chosen = _weighted(key, _probabilities(p, count), shape, replace, mode)
    if not (isinstance(a, Tensor) and a.ndim):
        return chosen.reshape(shape)
    axis %= a.ndim
    picked = a.index_select(axis, chosen.flatten().to(a.device))
    return picked.reshape(*a.shape[:axis], *shape, *a.shape[axis + 1 :])


def categorical(
    key: Tensor,
    logits: Tensor,
    axis: int = -1,
    shape: int | Sequence[int] | None = None,
    replace: bool = True,
    mode: str | None = None,
) -> Tensor:
    """Draws classes with the probabilities softmax(logits, axis), by the largest of logits plus Gumbel noise.

    Without replacement the largest are taken (Kool et al. 2019, "Stochastic beams and where to find them").

    Shape:
        logits `[..., C, ...]`, C at the axis. Returns shape, by default `[..., ...]`, which shape has to end with.

    Example:
        >>> from probly_torch import random
        >>> random.categorical(random.key(0), torch.tensor([[0.0, -50.0], [-50.0, 0.0]]), shape=(3, 2))
        tensor([[0, 1],
                [0, 1],
                [0, 1]])
    """
    check_key("categorical", key, single=True)
    mode = _mode("categorical", mode)
    if not logits.is_floating_point() or not logits.ndim:
        raise TypeError(
            f"categorical expects logits of a floating dtype with an axis of classes; got {logits.dtype} of shape "
            f"{tuple(logits.shape)}. Pass logits=torch.zeros(3)."
        )
    axis = axis % logits.ndim - logits.ndim
    batch = list(logits.shape)
    classes = batch.pop(axis)
    shape = tuple(batch) if shape is None else _broadcast("categorical", shape, torch.empty(batch, device="meta"))
    prefix, rest = shape[: len(shape) - len(batch)], list(shape[len(shape) - len(batch) :])
    if replace:
        rest.insert(axis + logits.ndim, classes)
        return (_gumbel(key, (*prefix, *rest), logits.dtype, mode) + logits).argmax(axis)
    number = math.prod(prefix)
    if number > classes:
        raise ValueError(
            f"categorical expects at most {classes} draws without replacement, one for each class; got {number}. Pass "
            f"replace=True."
        )
    noisy = logits + _gumbel(key, tuple(logits.shape), logits.dtype, mode)
    return noisy.topk(number, axis).indices.movedim(axis, 0).reshape(shape)


def permutation(key: Tensor, x: int | Tensor, axis: int = 0, independent: bool = False) -> Tensor:
    """Draws a permutation of `range(x)`, or of the slices of x along an axis.

    independent=True shuffles each vector along the axis on its own.

    Example:
        >>> from probly_torch import random
        >>> random.permutation(random.key(0), 5)
        tensor([0, 1, 4, 3, 2])
    """
    check_key("permutation", key, single=True)
    number = None if isinstance(x, Tensor) and x.ndim else index(x.item() if isinstance(x, Tensor) else x)
    if number is not None:
        return _shuffle(key, torch.arange(number, device=key.device), 0)
    if not isinstance(x, Tensor) or not x.ndim:
        raise TypeError(f"permutation expects an int or a tensor with an axis; got {type_name(x)}. Pass x=10.")
    if independent or x.ndim == 1:
        return _shuffle(key, x, axis)
    return x.index_select(axis, _shuffle(key, torch.arange(x.shape[axis], device=key.device), 0).to(x.device))


def lecun_normal(key: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Draws a kernel `(..., in, out)`, truncated normal of variance 1 / (... in), in float32 or float64.

    LeCun et al. 1998, "Efficient BackProp"; `jax.nn.initializers.lecun_normal`.
    """
    real = np.float64 if dtype == torch.float64 else np.float32
    std = np.sqrt(real(1 / math.prod(shape[:-1]))) / real(0.87962566103423978)  # of a normal truncated at 2
    return truncated_normal(key, -2.0, 2.0, shape, dtype) * float(std)


def draw_dtype(dtype: torch.dtype) -> torch.dtype:
    """Returns the dtype in which weights are drawn: half-precision ones are drawn in float32 and rounded.

    JAX's own draws of half-precision weights have 7 or 10 random bits.
    """
    return torch.promote_types(dtype, torch.float32)


def _float_dtype(what: str, dtype: torch.dtype | None) -> torch.dtype:
    dtype = torch.get_default_dtype() if dtype is None else dtype
    if dtype not in _BITS:
        raise TypeError(f"{what} expects a floating dtype of 16, 32 or 64 bits; got {dtype}. Pass dtype=torch.float32.")
    return dtype


def _broadcast(what: str, shape: int | Sequence[int], *parameters: Tensor) -> tuple[int, ...]:
    """Returns the shape, to which all parameters broadcast."""
    shape, shapes = as_shape(what, shape), [tuple(p.shape) for p in parameters if p.ndim]
    for each in shapes:
        if len(each) > len(shape) or any(n not in (1, m) for n, m in zip(each[::-1], shape[::-1], strict=False)):
            raise ValueError(
                f"{what} expects parameters that broadcast to shape={shape}; got {each}. Pass shape={each}, or one "
                f"that ends with it."
            )
    return shape


def _mode(what: str, mode: str | None) -> str:
    if mode not in (None, "low", "high"):
        raise ValueError(f"{what} expects mode to be 'low' or 'high'; got {mode!r}. Pass mode='low'.")
    return mode or "low"


def _integers(what: str, name: str, value: Any) -> Tensor:
    """Converts an integer, or a tensor of integers, to 64 bits."""
    if isinstance(value, Tensor) and not value.is_floating_point() and value.dtype != torch.bool:
        return value.long()
    if (number := index(value)) is None:
        got = str(value.dtype) if isinstance(value, Tensor) else repr(value)
        raise TypeError(f"{what} expects {name} to be an integer; got {got}. Pass {name}=10.")
    return torch.tensor(number, device="cpu")


def _probabilities(p: Tensor, count: int) -> Tensor:
    p = torch.as_tensor(p)
    p = p if p.is_floating_point() else p.to(torch.get_default_dtype())
    if p.shape != (count,) or not bool((p >= 0).all() & (p.sum() > 0)):
        raise ValueError(
            f"choice expects p of shape ({count},), not negative, with a sum above 0; got {tuple(p.shape)}: {p}. Pass "
            f"p=torch.ones({count}), or p=None."
        )
    return p


def _weighted(key: Tensor, p: Tensor, shape: tuple[int, ...], replace: bool, mode: str) -> Tensor:
    """Inverts the cumulative sum of p; without replacement takes the largest of log(p) plus Gumbel noise."""
    p = p.to(key.device)
    if replace:
        cumulative = p.cumsum(0)
        return torch.searchsorted(cumulative, cumulative[-1] * (1 - uniform(key, shape, p.dtype)))
    return (_gumbel(key, tuple(p.shape), p.dtype, mode) + log(p)).topk(math.prod(shape)).indices


def _gumbel(key: Tensor, shape: tuple[int, ...], dtype: torch.dtype, mode: str) -> Tensor:
    dtype = _float_dtype("categorical", dtype)
    tiny = torch.finfo(dtype).tiny
    if mode == "low":
        return -log(-log(uniform(key, shape, dtype, tiny)))
    high, low = uniform(key, (2, *shape), dtype)
    return -log(-log1p(-torch.where(high >= 0.5, high, high + low * 2.0 ** -_MANTISSA[dtype] + tiny)))


def _modulo(x: Tensor, span: Tensor) -> Tensor:
    """Returns x modulo span, with x an unsigned integer of 64 bits kept in int64."""
    half = ((x >> 1) & torch.iinfo(torch.int64).max) % span
    double = torch.where(half >= span - half, half - (span - half), 2 * half)
    return (double + (x & 1)) % span


def _shuffle(key: Tensor, x: Tensor, axis: int) -> Tensor:
    """Sorts by random words until ties are unlikely, as jax.random.permutation does."""
    rounds = math.ceil(3 * math.log(max(1, x.numel())) / math.log(WORD))
    for _ in range(rounds):
        key, subkey = split(key)
        order = torch.sort(words(subkey, tuple(x.shape), 32), dim=axis, stable=True).indices
        x = x.gather(axis, order.to(x.device))
    return x


def _unit(key: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Draws uniform multiples of 2**-mantissa in [0, 1): random mantissas under a fixed exponent."""
    mantissa = _MANTISSA[dtype]
    width = 8 if mantissa < 8 else _BITS[dtype]
    random_bits = (words(key, tuple(shape), width) >> (width - mantissa)) & ((1 << mantissa) - 1)
    return random_bits.to(dtype) * 2.0**-mantissa


def _sqrt2(dtype: torch.dtype) -> float:
    return scalar(math.sqrt(2.0), dtype)
