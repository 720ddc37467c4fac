"""States that metrics keep between updates: sums over inputs, or every score."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import DTypeLike

from probly_common.checks.judging import check_any_inputs, check_outside_jit, check_same_members


class _Sums(nnx.Metric):
    """Sums over inputs, each with what rounding took from it, so that float32 does for any number of inputs.

    A sum by members or classes is empty until the first update tells how many there are.
    """

    def __init__(self, *, per_member: bool = False) -> None:
        self.per_member = per_member
        self._names: tuple[str, ...] = ()

    def _add_sum(self, name: str, *shape: int, dtype: DTypeLike = float) -> None:
        self._names += (name,)
        shape = (0, *shape) if self.per_member else shape
        setattr(self, name, nnx.metrics.MetricState(jnp.zeros(shape, dtype)))
        setattr(self, f"{name}_lost", nnx.metrics.MetricState(jnp.zeros(shape, dtype)))

    def _add(self, **values: Array) -> None:
        for name, value in values.items():
            total, lost = getattr(self, name), getattr(self, f"{name}_lost")
            value = value.astype(total.dtype)
            if total.size:
                check_same_members(type(self).__name__, total.shape, value.shape)
                value, rounded = _two_sum(total[...], value)
                lost.set_value(lost[...] + rounded)
            else:
                lost.set_value(jnp.zeros_like(value))
            total.set_value(value)

    def _sum(self, name: str) -> Array:
        return getattr(self, name)[...] + getattr(self, f"{name}_lost")[...]

    def reset(self) -> None:
        """Forgets all inputs."""
        for name in self._names:
            for state in (getattr(self, name), getattr(self, f"{name}_lost")):
                state.set_value(jnp.zeros_like(state[...]))


class _Mean(_Sums):
    """The mean of a value over inputs."""

    def __init__(self, *, per_member: bool = False) -> None:
        super().__init__(per_member=per_member)
        self._add_sum("total")
        self.count = nnx.metrics.MetricState(jnp.zeros((), int))

    def _add_values(self, values: Array) -> None:
        """Adds values [..., B], one for each input."""
        self._add(total=values.sum(-1))
        self.count.set_value(self.count[...] + values.shape[-1])

    def compute(self) -> Array:
        """Returns the mean over all inputs since the last reset; NaN before the first."""
        total = self._sum("total")
        return total / self.count[...].astype(total.dtype)

    def reset(self) -> None:
        """Forgets all inputs."""
        super().reset()
        self.count.set_value(jnp.zeros_like(self.count[...]))


class _Scores(nnx.Metric):
    """Every score that was seen: arrays that grow, and so outside jit."""

    def __init__(self, *names: str) -> None:
        self._names = names
        self.reset()

    def _append(self, **values: Array) -> None:
        """Appends values [..., B]."""
        for name, value in values.items():
            check_outside_jit(type(self).__name__, value, jax.core.Tracer)
            seen = getattr(self, name)
            if seen:
                check_same_members(type(self).__name__, seen[0].shape[:-1], value.shape[:-1])
            seen.append(value)

    def _all(self, name: str) -> Array:
        """Returns all values [..., N]."""
        seen = getattr(self, name)
        check_any_inputs(type(self).__name__, len(seen))
        return jnp.concatenate(list(seen), -1)

    def reset(self) -> None:
        """Forgets all inputs."""
        for name in self._names:
            setattr(self, name, nnx.List([]))


def _two_sum(a: Array, b: Array) -> tuple[Array, Array]:
    """Returns the rounded sum, and what rounding took from it (Knuth 1969, sec. 4.2.2).

    Rounding takes nothing from an infinite sum.
    """
    total = a + b
    rounded_b = total - a
    return total, jnp.where(jnp.isfinite(total), (a - (total - rounded_b)) + (b - rounded_b), 0)
