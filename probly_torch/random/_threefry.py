"""Keys and their random bits: Threefry-2x32 with 20 rounds.

Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3".
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from probly_common.checks.values import MAX_SEED, check_seed, index, type_name

WORD = 0xFFFFFFFF  # the low 32 bits: words are kept in int64, where sums and shifts do not overflow
_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_UINTS = {8: torch.uint8, 16: torch.uint16, 32: torch.uint32, 64: torch.uint64}


def key(seed: int) -> Tensor:
    """Makes a key from a seed of 32 bits: `[2]`, equal to `jax.random.key_data(jax.random.key(seed))`.

    Raises:
        ValueError: for a seed that JAX would keep only in part, depending on `jax_enable_x64`.

    Example:
        >>> from probly_torch import random
        >>> random.key(7)
        tensor([0, 7])
    """
    return torch.tensor([0, check_seed("key", seed)], device="cpu")


def fold_in(key: Tensor, data: int | Tensor) -> Tensor:
    """Makes a new key from a key and 32 bits of data, such as a step or a member's number.

    Shape:
        key `[..., 2]`, data an int or `[...]`. Returns `[..., 2]`.

    Example:
        >>> from probly_torch import random
        >>> random.fold_in(random.key(0), 3).tolist() == random.fold_in(random.key(0), torch.tensor(3)).tolist()
        True
    """
    check_key("fold_in", key)
    if not isinstance(data, Tensor):
        number = index(data)
        if number is None or not 0 <= number < MAX_SEED:
            raise ValueError(f"fold_in expects data from 0 to 2**32 - 1; got {data!r}. Pass data % 2**32.")
        data = torch.tensor(number, device=key.device)
    words = data.to(torch.int64) & WORD
    return torch.stack(_threefry(key[..., 0], key[..., 1], torch.zeros_like(words), words), -1)


def split(key: Tensor, num: int | Sequence[int] = 2) -> Tensor:
    """Makes new keys from one key: `[num, 2]`, or `[*num, 2]`.

    Example:
        >>> from probly_torch import random
        >>> random.split(random.key(0), 3).shape
        torch.Size([3, 2])
    """
    check_key("split", key, single=True)
    return torch.stack(_counted(key, as_shape("split", num)), -1)


def bits(key: Tensor, shape: int | Sequence[int] = (), dtype: torch.dtype = torch.uint32) -> Tensor:
    """Draws uniform random bits as unsigned integers of 8, 16, 32 or 64 bits.

    Example:
        >>> from probly_torch import random
        >>> random.bits(random.key(0), (2,))
        tensor([4070199207, 4202968722], dtype=torch.uint32)
    """
    check_key("bits", key, single=True)
    if dtype not in _UINTS.values():
        raise TypeError(f"bits expects an unsigned integer dtype; got {dtype}. Pass dtype=torch.uint32.")
    width = torch.iinfo(dtype).bits
    drawn = words(key, as_shape("bits", shape), width)
    return drawn.view(dtype) if width == 64 else (drawn & ((1 << width) - 1)).to(dtype)


def as_shape(what: str, shape: Any) -> tuple[int, ...]:
    """Makes a shape from an int or a sequence of ints."""
    sizes = (shape,) if index(shape) is not None else tuple(shape) if isinstance(shape, Sequence) else (None,)
    if any(index(size) is None or size < 0 for size in sizes):
        raise TypeError(f"{what} expects shape to be an int or a sequence of ints; got {shape!r}. Pass shape=(2, 3).")
    return sizes


def check_key(what: str, key: Any, single: bool = False) -> None:
    if not isinstance(key, Tensor) or key.dtype != torch.int64 or key.shape[-1:] != (2,) or (single and key.ndim != 1):
        got = f"{key.dtype} of shape {tuple(key.shape)}" if isinstance(key, Tensor) else type_name(key)
        raise TypeError(f"{what} expects a key, int64 words of shape [2]; got {got}. Make one: key(0), or Rngs(0)().")


def _threefry(k0: Tensor, k1: Tensor, x0: Tensor, x1: Tensor) -> tuple[Tensor, Tensor]:
    """Runs Threefry-2x32 for 20 rounds: five groups of four rotations, a key injected after each."""
    keys = (k0, k1, k0 ^ k1 ^ 0x1BD11BDA)
    x0, x1 = (x0 + keys[0]) & WORD, (x1 + keys[1]) & WORD
    for group in range(5):
        for rotation in _ROTATIONS[group % 2]:
            x0 = (x0 + x1) & WORD
            x1 = (((x1 << rotation) | (x1 >> (32 - rotation))) & WORD) ^ x0
        x0 = (x0 + keys[(group + 1) % 3]) & WORD
        x1 = (x1 + keys[(group + 2) % 3] + group + 1) & WORD
    return x0, x1


def _counted(key: Tensor, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Returns the two words of each counter 0, 1, 2, ... laid out in `shape`."""
    counts = torch.arange(math.prod(shape), device=key.device).reshape(shape)
    return _threefry(key[0], key[1], counts >> 32, counts & WORD)


def words(key: Tensor, shape: tuple[int, ...], width: int) -> Tensor:
    """Draws 64 random bits for each number, or 32 for smaller widths, in int64."""
    high, low = _counted(key, shape)
    return (high << 32) | low if width == 64 else high ^ low
