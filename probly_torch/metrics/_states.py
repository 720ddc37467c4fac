"""States that metrics keep between updates: sums over inputs, or every score."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities.data import dim_zero_cat
from torchmetrics.utilities.distributed import gather_all_tensors

from probly_common.checks.judging import check_any_inputs, check_same_members


class _EnsembleMetric(Metric):
    """A metric whose states are float64 or int64, whatever dtype the module around it is converted to."""

    full_state_update = False
    is_differentiable = False

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.to(self.device)  # which decides on the dtype

    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Any = "") -> Any:
        device = fn(torch.zeros(1, device=self.device)).device
        float_dtype = torch.float32 if device.type == "mps" else torch.float64  # mps has no float64

        def move(x: Tensor) -> Tensor:
            return x.to(device, float_dtype if x.is_floating_point() else x.dtype)

        return super()._apply(move, exclude_state)


class _Sums(_EnsembleMetric):
    """Sums over inputs, which processes add up.

    With per_member a sum starts as (1, ...) zeros, and is (E, ...) after the first update: zeros broadcast, so that a
    process that has seen no batch takes part.
    """

    def __init__(self, *, per_member: bool = False, **kwargs: Any) -> None:
        kwargs.setdefault("dist_sync_fn", _gather_sums)
        super().__init__(**kwargs)
        self.per_member = per_member
        self._shapes: dict[str, torch.Size] = {}

    def _add_sum(self, name: str, *shape: int, dtype: torch.dtype | None = None) -> None:
        shape = (1, *shape) if self.per_member else shape
        self.add_state(name, torch.zeros(shape, dtype=dtype or self.dtype), dist_reduce_fx="sum")

    def _add(self, **values: Tensor) -> None:
        for name, value in values.items():
            check_same_members(type(self).__name__, self._shapes.setdefault(name, value.shape), value.shape)
            state = getattr(self, name)
            setattr(self, name, state + value.detach().to(state.dtype))


class _Mean(_Sums):
    """The mean of a value over inputs.

    Its sum has a name of its own: a MetricCollection updates metrics once whose states have the same names and values.
    """

    count: Tensor

    def __init__(self, name: str, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._name = name
        self._add_sum(name)
        self.add_state("count", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def _add_values(self, values: Tensor) -> None:
        """Adds values [..., B], one for each input."""
        self._add(**{self._name: values.sum(-1, dtype=self.dtype)})
        self.count = self.count + values.shape[-1]

    def compute(self) -> Tensor:
        """Returns the mean over all inputs since the last reset; NaN before the first."""
        return getattr(self, self._name) / self.count


class _Scores(_EnsembleMetric):
    """Every score that was seen, flattened: processes put theirs one after another."""

    width: Tensor

    def __init__(self, *names: str, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        for name in names:
            self.add_state(name, [], dist_reduce_fx="cat")
        self._shapes: dict[str, torch.Size] = {}
        self.add_state("width", torch.zeros((), dtype=torch.int64), dist_reduce_fx="max")

    def _append(self, **values: Tensor) -> None:
        """Appends values [..., B].

        A process without a batch learns from the others how many there are for each input.
        """
        for name, value in values.items():
            width = math.prod(value.shape[:-1])
            check_same_members(type(self).__name__, self._shapes.setdefault(name, value.shape[:-1]), value.shape[:-1])
            getattr(self, name).append(value.detach().to(self.dtype).reshape(width, -1).mT.flatten())
            self.width = self.width.clamp(min=width)

    def _all(self, name: str) -> Tensor:
        """Returns all values [width, N]."""
        state = getattr(self, name)
        check_any_inputs(type(self).__name__, len(state))
        return dim_zero_cat(state).reshape(-1, int(self.width)).mT


def _gather_sums(x: Tensor, group: Any = None) -> list[Tensor]:
    return list(torch.broadcast_tensors(*gather_all_tensors(x, group)))
