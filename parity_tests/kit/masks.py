"""Equal masks: the i-th Bernoulli draw of a forward has the key `fold_in(key(seed), i)` in both frameworks.

All that either framework has for dropout (of elements, of channels, of attention weights, between recurrent layers, of
paths) draws its mask from one function, `bernoulli`, which is what is replaced, while a forward runs and not beyond:

    masks = Masks("compare")
    def forward(model, key, x):             # traced once: the key is an argument
        with masks.flax(key):
            return model(x)
    jax.jit(forward)(model, jax.random.key(seed), x)  # first: Flax's draws are the ones that torch's are matched with
    with masks.torch(seed, torch_model):
        outputs = torch_model(torch_x)
    masks.differences                       # sentences, such as of unequal rates

Every member of an ensemble gets the same masks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import jax
import jax.numpy as jnp
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from probly_torch import Ensemble, random

ADVICE = 'Compare them with mode="eval", or without it: dropout=0.0'


@dataclass(frozen=True)
class Draw:
    """A mask of Flax: its shape there, and the probability to be kept."""

    shape: tuple[int, ...]
    keep: float


@dataclass
class Masks:
    """The masks of one forward, in Flax first and then in torch.

    Attributes:
        what: the public function that is called, for error sentences.
        channels_last: whether an image of equal sizes is (N, ..., C) in Flax; other sizes tell by themselves.
        draws: those of the last forward in Flax, which are found when it is traced.
        differences: a sentence for each mask that has another rate in torch.
    """

    what: str
    channels_last: bool = False
    draws: list[Draw] = field(default_factory=list)
    differences: list[str] = field(default_factory=list)

    @contextmanager
    def flax(self, key: jax.Array) -> Iterator[None]:
        """Wraps a forward in Flax, eager or traced.

        Masks are drawn from the key alone, whatever rngs the model has.

        Raises:
            ValueError: for a probability that is computed, not given.
        """
        self.draws.clear()
        bernoulli = jax.random.bernoulli

        def draw(own: jax.Array, p: Any = 0.5, shape: Any = None, *args: Any, **kwargs: Any) -> jax.Array:
            if isinstance(p, jax.core.Tracer):
                raise ValueError(
                    f"{self.what} expects dropout of a fixed rate; got one that the Flax model computes. {ADVICE}."
                )
            shape = jnp.shape(p) if shape is None else tuple(shape)
            self.draws.append(Draw(shape, float(p)))
            mask: jax.Array = bernoulli(
                jax.random.fold_in(key, len(self.draws) - 1), jnp.float32(p), shape, *args, **kwargs
            )
            return mask

        with patch.object(jax.random, "bernoulli", draw):
            yield

    @contextmanager
    def torch(self, seed: int, module: nn.Module) -> Iterator[None]:
        """Wraps the same forward in torch, and its backward pass where that runs parts of it again.

        Raises:
            ValueError: for masks that Flax does not draw, or draws of other shapes, and for other random numbers.
        """
        ensembles = [m for m in module.modules() if isinstance(m, Ensemble)]
        chunks = [m.chunk_size for m in ensembles if m.chunk_size is not None]
        if self.draws and chunks:  # the backward pass would run them again, in another order
            raise ValueError(
                f"{self.what} expects ensembles with dropout to run all members at once; got chunk_size="
                f"{chunks[0]}. Set it in both models: model.chunk_size = None."
            )
        drawn = _Drawn(self, seed, max((m.num_members for m in ensembles), default=1))
        with drawn:
            yield
        if drawn.count not in (len(self.draws), drawn.members * len(self.draws)):
            raise ValueError(
                f"{self.what} expects as many masks of dropout in torch as in Flax; got {drawn.count} in torch and "
                f"{len(self.draws)} in Flax, of shapes {[d.shape for d in self.draws]}. Dropout at the same places in "
                f"both models makes them equal; none at all too: dropout=0.0."
            )


class _Drawn(TorchDispatchMode):
    """Answers torch's draws of masks: the i-th is Flax's i-th, in torch's layout."""

    def __init__(self, masks: Masks, seed: int, members: int) -> None:
        super().__init__()
        self.masks, self.members, self.count = masks, members, 0
        self.key = random.key(seed)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten.bernoulli_.float:  # the noise of dropout
            return args[0].copy_(self.mask(args[0].shape, *args[1:]))
        if func is torch.ops.aten.bernoulli.p:  # the same inside of torch.vmap
            return self.mask(args[0].shape, *args[1:]).to(args[0])
        name = func.overloadpacket.__name__
        attention = name.startswith("_scaled_dot_product")  # tagged as random whatever its rate, which is 0 where fused
        if torch.Tag.nondeterministic_seeded in func.tags and not attention:
            raise ValueError(
                f"{self.masks.what} expects a forward whose only random numbers are masks of dropout; got "
                f"torch.{name}, which Flax cannot draw. {ADVICE}."
            )
        return func(*args, **kwargs)

    def mask(self, shape: torch.Size, keep: float = 0.5) -> Tensor:
        """Draws the next mask. Members of a loop draw one after the other."""
        draws, what = self.masks.draws, self.masks.what
        i, self.count = self.count, self.count + 1
        if not draws or i >= self.members * len(draws):
            raise ValueError(
                f"{what} expects as many masks of dropout in torch as in Flax; got {len(draws)} in Flax, and another "
                f"one in torch, of shape {tuple(shape)}. Dropout at the same places in both models makes them equal; "
                f"a checkpoint, which runs again in the backward pass, draws again."
            )
        i %= len(draws)
        draw = draws[i]
        if not math.isclose(keep, draw.keep, rel_tol=1e-6):
            difference = f"mask {i + 1}: Dropout p is {1 - keep:.6g}, nnx rate is {1 - draw.keep:.6g}"
            if difference not in self.masks.differences:
                self.masks.differences.append(difference)
        mask = random.bernoulli(random.fold_in(self.key, i), torch.tensor(keep, dtype=torch.float32), draw.shape)
        for each in self._layouts(mask):
            if each.shape == shape:
                return each
            if self.members > 1 and (self.members, *each.shape) == tuple(shape):  # the members of a vmap
                return each.expand(shape)
        raise ValueError(
            f"{what} expects masks of dropout of one shape in both frameworks; got {tuple(shape)} in torch and "
            f"{draw.shape} in Flax for mask {i + 1}, where a size of 1 drops all along an axis together. Dropout2d is "
            f"nnx.Dropout(rate, broadcast_dims=(1, 2)), and dropout of attention nnx.MultiHeadAttention(..., "
            f"broadcast_dropout=False)."
        )

    def _layouts(self, mask: Tensor) -> Iterator[Tensor]:
        """Yields the mask as torch may have it: channels or the sequence first, heads as rows."""
        first = [mask.movedim(-1, 1)] if mask.ndim > 2 else []
        yield from [*first, mask] if self.masks.channels_last and mask.ndim > 3 else [mask, *first]
        if mask.ndim == 3:
            yield mask.transpose(0, 1)
        if mask.ndim > 3:
            yield mask.flatten(0, -3)
