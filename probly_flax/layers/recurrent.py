"""Recurrent layers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax import Array

from probly_common.checks.layers import check_base_layer, check_cell, check_weight
from probly_common.checks.rows import (
    BATCH_MAJOR,
    CELL,
    TIME_MAJOR,
    check_recurrent_rows,
    check_state_shape,
    check_states,
)
from probly_flax.layers._base import BaseLayer, Draws, FastWeightLayer, axes, copy_options, param
from probly_flax.layers.linear import BatchEnsembleLinear

__all__ = ["BatchEnsembleGRU", "BatchEnsembleGRUCell", "BatchEnsembleLSTM", "BatchEnsembleLSTMCell"]

_CELL_OPTIONS = (
    "in_features",
    "hidden_features",
    "gate_fn",
    "activation_fn",
    "dtype",
    "param_dtype",
    "promote_dtype",
    "carry_init",
)
_RNN_OPTIONS = ("time_major", "return_carry", "reverse", "keep_order", "unroll", "state_axes", "broadcast_rngs")
_LINEAR_OPTIONS = (
    "in_features",
    "use_bias",
    "dtype",
    "param_dtype",
    "precision",
    "dot_general",
    "promote_dtype",
    "preferred_element_type",
)
INPUT_GATES, STATE_GATES = ("ii", "if_", "ig", "io"), ("hi", "hf", "hg", "ho")


class _Cell(FastWeightLayer[BaseLayer]):
    """The base of the cells: `dense_i` and `dense_h`, and those of one member."""

    dense_i: Any
    dense_h: Any

    def _convert(self, base_layer: Any, draws: Draws) -> None:
        what = type(self).__name__
        copy_options(self, base_layer, _CELL_OPTIONS)
        self.rngs = _copied(base_layer.rngs)
        if isinstance(base_layer, nnx.LSTMCell):
            dense_i, dense_h = _packed(what, base_layer, INPUT_GATES), _packed(what, base_layer, STATE_GATES)
        else:
            dense_i, dense_h = base_layer.dense_i, base_layer.dense_h
        for name, dense in (("dense_i", dense_i), ("dense_h", dense_h)):
            check_weight(what, dense.kernel.shape)
            setattr(self, name, BatchEnsembleLinear(dense, *draws))

    def _of_members(self) -> Iterable[str]:
        return "dense_i", "dense_h"

    def _fill(self, plain: Any, i: int) -> Any:
        """Gives an ordinary cell the options and the weights of member i."""
        copy_options(plain, self, _CELL_OPTIONS)
        plain.rngs = _copied(self.rngs)
        plain.dense_i, plain.dense_h = self.dense_i.member(i), self.dense_h.member(i)
        return plain


class _Sequence(FastWeightLayer[nnx.RNN], nnx.RNN):
    """The base of the layers that run a cell over a sequence, as nnx.RNN does."""

    cell: Any
    _cell_type: Any
    _base_cells: tuple[type, ...]
    _states: tuple[str, ...]

    def _check_base(self, what: str, base_layer: nnx.RNN) -> None:
        check_base_layer(what, base_layer, nnx.RNN, "__call__")
        check_cell(what, base_layer.cell, *self._base_cells)

    def _convert(self, base_layer: nnx.RNN, draws: Draws) -> None:
        _copy_rnn(self, base_layer)
        self.cell = self._cell_type(base_layer.cell, *draws)

    def __call__(
        self,
        inputs: Array,
        *,
        initial_carry: Any = None,
        seq_lengths: Array | None = None,
        return_carry: bool | None = None,
        time_major: bool | None = None,
        reverse: bool | None = None,
        keep_order: bool | None = None,
        rngs: nnx.Rngs | nnx.RngStream | None = None,
    ) -> Any:
        """Runs each member over its own sequences; arguments are those of nnx.RNN, None for the layer's own.

        Shape:
            inputs: (E*B, ..., T, in_features), or (T, E*B, ..., in_features) if time_major. seq_lengths: (E*B, ...).
            Returns outputs, or carry, outputs.
        """
        is_time_major = self.time_major if time_major is None else time_major
        _check_sequence(type(self).__name__, self, inputs, initial_carry, self._states, seq_lengths, is_time_major)
        return super().__call__(
            inputs,
            initial_carry=initial_carry,
            seq_lengths=seq_lengths,
            return_carry=return_carry,
            time_major=time_major,
            reverse=reverse,
            keep_order=keep_order,
            rngs=rngs,
        )

    def _of_members(self) -> Iterable[str]:
        return ("cell",)

    def _member(self, i: int) -> nnx.RNN:
        rnn = nnx.RNN(self.cell.member(self._index(i)), rngs=False)
        _copy_rnn(rnn, self)
        return rnn


class BatchEnsembleLSTMCell(_Cell[nnx.OptimizedLSTMCell | nnx.LSTMCell], nnx.OptimizedLSTMCell):
    r"""E LSTM cells that share their two kernels and differ by rank-one scalings.

    Member i computes  a_i = ((x_i * r_ih,i) W_ih) * s_ih,i + ((h_i * r_hh,i) W_hh) * s_hh,i + b_i
    (Wen et al. 2020, eq. 5, for both kernels), and from its four parts, the gates i, f, g and o, as LSTMCell does,
    c_i' = gate_fn(f) * c_i + gate_fn(i) * activation_fn(g)  and  h_i' = gate_fn(o) * activation_fn(c_i').

    Shape:
        inputs: (E*B, ..., in_features), rows [k*B, (k+1)*B) belong to member k. carry: (c, h), both
        (E*B, ..., hidden_features). Returns (c', h'), h'.
    Weights:
        dense_i: kernel (in_features, 4*hidden_features), r (E, in_features), s (E, 4*hidden_features), bias None;
        dense_h: kernel (hidden_features, 4*hidden_features), r (E, hidden_features), s and bias
        (E, 4*hidden_features). The gates of an LSTMCell, which has them apart, are laid side by side.
    Args:
        base_layer: the OptimizedLSTMCell or LSTMCell to start from. It is copied, never changed or shared.
        rngs: a seed or an Rngs; keys come from `rngs.params()` for the kernel (if drawn), r and s, in this order, of
            the inputs and then of the state.
        use_base_weights: share copies of the base layer's kernels; otherwise draw them, lecun_normal.
        num_members, init, r_mean, r_std, s_mean, s_std: see `__init__`.
    Raises:
        TypeError: if base_layer is not an LSTM cell, or rngs neither a seed nor an Rngs.
        ValueError: if the rows do not divide by num_members, the last axis is not in_features, or a state has not a
            row for each of the inputs.
    Example:
        >>> cell = BatchEnsembleLSTMCell(nnx.OptimizedLSTMCell(3, 2, rngs=nnx.Rngs(0)), num_members=4)
        >>> carry = cell.initialize_carry((8, 3), nnx.Rngs(0))
        >>> (c, h), y = cell(carry, jnp.ones((8, 3)))
        >>> c.shape, h.shape, y.shape
        ((8, 2), (8, 2), (8, 2))
        >>> [p.shape for p in (cell.dense_h.kernel, cell.dense_h.r, cell.dense_h.s, cell.dense_h.bias)]
        [(2, 8), (4, 2), (4, 8), (4, 8)]
    """

    def _check_base(self, what: str, base_layer: nnx.OptimizedLSTMCell | nnx.LSTMCell) -> None:
        self.gates_apart = not isinstance(base_layer, nnx.OptimizedLSTMCell)
        check_base_layer(what, base_layer, nnx.LSTMCell if self.gates_apart else nnx.OptimizedLSTMCell, "__call__")

    def __call__(self, carry: tuple[Array, Array], inputs: Array) -> tuple[tuple[Array, Array], Array]:
        """Takes one step of each member on its own rows.

        Shape:
            carry: (c, h), both (E*B, ..., hidden_features). inputs: (E*B, ..., in_features). Returns (c', h'), h'.
        """
        what = "BatchEnsembleLSTMCell"
        check_recurrent_rows(what, inputs.shape, self.num_members, self.in_features, CELL, more_axes=True)
        _check_carry(what, "carry", carry, ("c", "h"), (*inputs.shape[:-1], self.hidden_features))
        return super().__call__(carry, inputs)

    def member(self, i: int) -> nnx.OptimizedLSTMCell | nnx.LSTMCell:
        """Returns member i as an ordinary LSTM cell, with the kernels W * r_i s_i^T and the bias b_i.

        It is of the base layer's type.

        Example:
            >>> cell = BatchEnsembleLSTMCell(nnx.OptimizedLSTMCell(3, 2, rngs=nnx.Rngs(0)), num_members=4)
            >>> x, zeros = jnp.ones((20, 3)), jnp.zeros((20, 2))
            >>> _, own = cell.member(1)((zeros[:5], zeros[:5]), x[:5])
            >>> bool(jnp.allclose(own, cell((zeros, zeros), x)[1][5:10]))
            True
        """
        i = self._index(i)
        if not self.gates_apart:
            packed = nnx.eval_shape(lambda: nnx.OptimizedLSTMCell(1, 1, rngs=nnx.Rngs(0)))
            return self._fill(packed, i)  # type: ignore[no-any-return]
        apart = nnx.eval_shape(lambda: nnx.LSTMCell(1, 1, rngs=nnx.Rngs(0)))
        cell = self._fill(apart, i)
        for names, dense in ((INPUT_GATES, cell.dense_i), (STATE_GATES, cell.dense_h)):
            for name, gate in zip(names, _unpacked(dense), strict=True):
                setattr(cell, name, gate)
        del cell.dense_i, cell.dense_h
        return cell  # type: ignore[no-any-return]


class BatchEnsembleGRUCell(_Cell[nnx.GRUCell], nnx.GRUCell):
    r"""E GRU cells that share their two kernels and differ by rank-one scalings.

    Member i computes  a_i = ((x_i * r_ih,i) W_ih) * s_ih,i + b_i  and  d_i = ((h_i * r_hh,i) W_hh) * s_hh,i
    (Wen et al. 2020, eq. 5, for both kernels), and from their three parts, as GRUCell does,
    r = gate_fn(a_r + d_r),  z = gate_fn(a_z + d_z),  n = activation_fn(a_n + r * d_n)  and
    h_i' = (1 - z) * n + z * h_i.

    Shape:
        inputs: (E*B, ..., in_features), rows [k*B, (k+1)*B) belong to member k. carry: h (E*B, ..., hidden_features).
        Returns h', h'.
    Weights:
        dense_i: kernel (in_features, 3*hidden_features), r (E, in_features), s and bias (E, 3*hidden_features);
        dense_h: kernel (hidden_features, 3*hidden_features), r (E, hidden_features), s (E, 3*hidden_features), bias
        None, unless the base layer's dense_h has one, as torch's GRU does.
    Args:
        base_layer: the GRUCell to start from. It is copied, never changed or shared.
        rngs: a seed or an Rngs; keys come from `rngs.params()` for the kernel (if drawn), r and s, in this order, of
            the inputs and then of the state.
        use_base_weights: share copies of the base layer's kernels; otherwise draw them, lecun_normal.
        num_members, init, r_mean, r_std, s_mean, s_std: see `__init__`.
    Raises:
        TypeError: if base_layer is not a GRUCell, or rngs neither a seed nor an Rngs.
        ValueError: if the rows do not divide by num_members, the last axis is not in_features, or a state has not a
            row for each of the inputs.
    Example:
        >>> cell = BatchEnsembleGRUCell(nnx.GRUCell(3, 2, rngs=nnx.Rngs(0)), num_members=4)
        >>> h, y = cell(cell.initialize_carry((8, 3), nnx.Rngs(0)), jnp.ones((8, 3)))
        >>> h.shape, y.shape
        ((8, 2), (8, 2))
        >>> [p.shape for p in (cell.dense_i.kernel, cell.dense_i.r, cell.dense_i.s, cell.dense_i.bias)]
        [(3, 6), (4, 3), (4, 6), (4, 6)]
    """

    def _check_base(self, what: str, base_layer: nnx.GRUCell) -> None:
        check_base_layer(what, base_layer, nnx.GRUCell, "__call__")

    def __call__(self, carry: Array, inputs: Array) -> tuple[Array, Array]:
        """Takes one step of each member on its own rows.

        Shape:
            carry: h (E*B, ..., hidden_features). inputs: (E*B, ..., in_features). Returns h', h'.
        """
        what = "BatchEnsembleGRUCell"
        check_recurrent_rows(what, inputs.shape, self.num_members, self.in_features, CELL, more_axes=True)
        _check_carry(what, "carry", carry, ("h",), (*inputs.shape[:-1], self.hidden_features))
        return super().__call__(carry, inputs)

    def member(self, i: int) -> nnx.GRUCell:
        """Returns member i as an ordinary GRU cell, with the kernels W * r_i s_i^T and the bias b_i.

        Example:
            >>> cell = BatchEnsembleGRUCell(nnx.GRUCell(3, 2, rngs=nnx.Rngs(0)), num_members=4)
            >>> x, zeros = jnp.ones((20, 3)), jnp.zeros((20, 2))
            >>> _, own = cell.member(1)(zeros[:5], x[:5])
            >>> bool(jnp.allclose(own, cell(zeros, x)[1][5:10]))
            True
        """
        cell = nnx.eval_shape(lambda: nnx.GRUCell(1, 1, rngs=nnx.Rngs(0)))
        return self._fill(cell, self._index(i))  # type: ignore[no-any-return]


class BatchEnsembleLSTM(_Sequence):
    r"""E LSTMs that share their kernels and differ by rank-one scalings.

    Member i is an LSTM with the kernels  W_ih * r_ih,i s_ih,i^T  and  W_hh * r_hh,i s_hh,i^T  (Wen et al. 2020,
    eq. 5); nnx.RNN runs a BatchEnsembleLSTMCell over the sequence.

    Shape:
        inputs: (E*B, ..., T, in_features), or (T, E*B, ..., in_features) if time_major; of the E*B rows,
        [k*B, (k+1)*B) belong to member k. Carries are those of the cell, (c, h), both
        (E*B, ..., hidden_features).
        Returns (E*B, ..., T, hidden_features), or (T, E*B, ..., hidden_features); with return_carry, carry, outputs.
    Weights:
        those of cell, a BatchEnsembleLSTMCell.
    Args:
        base_layer: the nnx.RNN of an OptimizedLSTMCell or LSTMCell to start from. It is copied, never changed or
            shared.
        rngs: a seed or an Rngs; keys come from `rngs.params()` for the kernel (if drawn), r and s, in this order, of
            the inputs and then of the state.
        use_base_weights: share copies of the base layer's kernels; otherwise draw them, lecun_normal.
        num_members, init, r_mean, r_std, s_mean, s_std: see `__init__`.
    Raises:
        TypeError: if base_layer is not an RNN of an LSTM cell, or rngs neither a seed nor an Rngs.
        ValueError: if the rows do not divide by num_members, the last axis is not in_features, or a state has not a
            row for each of the inputs.
    Example:
        >>> rnn = nnx.RNN(nnx.OptimizedLSTMCell(3, 2, rngs=nnx.Rngs(0)))
        >>> layer = BatchEnsembleLSTM(rnn, num_members=4)
        >>> layer(jnp.ones((8, 5, 3))).shape
        (8, 5, 2)
        >>> [p.shape for p in (layer.cell.dense_h.kernel, layer.cell.dense_h.r, layer.cell.dense_h.s)]
        [(2, 8), (4, 2), (4, 8)]
    """

    cell: BatchEnsembleLSTMCell
    _cell_type = BatchEnsembleLSTMCell
    _base_cells = (nnx.OptimizedLSTMCell, nnx.LSTMCell)
    _states = ("c", "h")

    def member(self, i: int) -> nnx.RNN:
        """Returns member i as an ordinary nnx.RNN of an ordinary cell, with the kernels W * r_i s_i^T and the bias b_i.

        Example:
            >>> layer = BatchEnsembleLSTM(nnx.RNN(nnx.OptimizedLSTMCell(3, 2, rngs=nnx.Rngs(0))), num_members=4)
            >>> x = jnp.ones((5, 6, 3))
            >>> bool(jnp.allclose(layer.member(1)(x), layer(jnp.tile(x, (4, 1, 1)))[5:10]))
            True
        """
        return self._member(i)


class BatchEnsembleGRU(_Sequence):
    r"""E GRUs that share their kernels and differ by rank-one scalings.

    Member i is a GRU with the kernels  W_ih * r_ih,i s_ih,i^T  and  W_hh * r_hh,i s_hh,i^T  (Wen et al. 2020,
    eq. 5); nnx.RNN runs a BatchEnsembleGRUCell over the sequence.

    Shape:
        inputs: (E*B, ..., T, in_features), or (T, E*B, ..., in_features) if time_major; of the E*B rows,
        [k*B, (k+1)*B) belong to member k. Carries are those of the cell, h
        (E*B, ..., hidden_features).
        Returns (E*B, ..., T, hidden_features), or (T, E*B, ..., hidden_features); with return_carry, carry, outputs.
    Weights:
        those of cell, a BatchEnsembleGRUCell.
    Args:
        base_layer: the nnx.RNN of a GRUCell to start from. It is copied, never changed or shared.
        rngs: a seed or an Rngs; keys come from `rngs.params()` for the kernel (if drawn), r and s, in this order, of
            the inputs and then of the state.
        use_base_weights: share copies of the base layer's kernels; otherwise draw them, lecun_normal.
        num_members, init, r_mean, r_std, s_mean, s_std: see `__init__`.
    Raises:
        TypeError: if base_layer is not an RNN of a GRUCell, or rngs neither a seed nor an Rngs.
        ValueError: if the rows do not divide by num_members, the last axis is not in_features, or a state has not a
            row for each of the inputs.
    Example:
        >>> rnn = nnx.RNN(nnx.GRUCell(3, 2, rngs=nnx.Rngs(0)))
        >>> layer = BatchEnsembleGRU(rnn, num_members=4)
        >>> layer(jnp.ones((8, 5, 3))).shape
        (8, 5, 2)
        >>> [p.shape for p in (layer.cell.dense_h.kernel, layer.cell.dense_h.r, layer.cell.dense_h.s)]
        [(2, 6), (4, 2), (4, 6)]
    """

    cell: BatchEnsembleGRUCell
    _cell_type = BatchEnsembleGRUCell
    _base_cells = (nnx.GRUCell,)
    _states = ("h",)

    def member(self, i: int) -> nnx.RNN:
        """Returns member i as an ordinary nnx.RNN of an ordinary cell, with the kernels W * r_i s_i^T and the bias b_i.

        Example:
            >>> layer = BatchEnsembleGRU(nnx.RNN(nnx.GRUCell(3, 2, rngs=nnx.Rngs(0))), num_members=4)
            >>> x = jnp.ones((5, 6, 3))
            >>> bool(jnp.allclose(layer.member(1)(x), layer(jnp.tile(x, (4, 1, 1)))[5:10]))
            True
        """
        return self._member(i)


def _copy_rnn(rnn: nnx.RNN, base: nnx.RNN) -> None:
    copy_options(rnn, base, _RNN_OPTIONS)
    rnn.rngs = _copied(base.rngs)


def _copied(rngs: nnx.RngStream | None) -> Any:
    return nnx.data(None) if rngs is None else nnx.clone(rngs, arrays=True)


def _packed(what: str, cell: nnx.LSTMCell, names: Sequence[str]) -> nnx.Linear:
    """Packs the Linear layers of the gates into one, side by side."""
    gates = [getattr(cell, name) for name in names]
    for gate in gates:
        check_base_layer(what, gate, nnx.Linear, "__call__")
        check_weight(what, gate.kernel.shape)
    packed = nnx.eval_shape(lambda: nnx.Linear(1, 1, rngs=nnx.Rngs(0)))
    _copy_linear(packed, gates[0], sum(gate.out_features for gate in gates))
    kernel, bias = gates[0].kernel, gates[0].bias
    packed.kernel = param(jnp.concatenate([gate.kernel[...] for gate in gates], 1), kernel, *axes(kernel))
    packed.bias = nnx.data(None)
    if bias is not None:
        packed.bias = param(jnp.concatenate([gate.bias[...] for gate in gates]), bias, *axes(bias))
    return packed


def _unpacked(packed: nnx.Linear) -> list[nnx.Linear]:
    gates = [nnx.eval_shape(lambda: nnx.Linear(1, 1, rngs=nnx.Rngs(0))) for _ in range(4)]
    own: Any = packed.bias
    biases = [None] * 4 if own is None else jnp.split(own[...], 4)
    for gate, kernel, bias in zip(gates, jnp.split(packed.kernel[...], 4, 1), biases, strict=True):
        _copy_linear(gate, packed, packed.out_features // 4)
        gate.kernel = param(kernel, packed.kernel, *axes(packed.kernel))
        gate.bias = nnx.data(None) if bias is None else param(bias, own, *axes(own))
    return gates


def _copy_linear(linear: nnx.Linear, base: nnx.Linear, out_features: int) -> None:
    copy_options(linear, base, _LINEAR_OPTIONS)
    linear.out_features = out_features


def _check_carry(what: str, name: str, carry: Any, states: tuple[str, ...], expected: tuple[int, ...]) -> None:
    if len(states) == 2:
        check_states(what, name, carry, states)
    for state, value in zip(states, carry if len(states) == 2 else (carry,), strict=True):
        check_state_shape(
            what,
            f"{state} of {name}" if len(states) == 2 else name,
            jnp.shape(value),
            expected,
            "For zeros, call initialize_carry(x.shape, rngs)." if name == "carry" else "For zeros, leave it out.",
        )


def _check_sequence(
    what: str,
    layer: Any,
    inputs: Array,
    initial_carry: Any,
    states: tuple[str, ...],
    seq_lengths: Array | None,
    time_major: bool,
) -> None:
    layout = TIME_MAJOR if time_major else BATCH_MAJOR
    check_recurrent_rows(what, inputs.shape, layer.num_members, layer.cell.in_features, layout, more_axes=True)
    batch = inputs.shape[1:-1] if time_major else inputs.shape[:-2]
    if initial_carry is not None:
        _check_carry(what, "initial_carry", initial_carry, states, (*batch, layer.cell.hidden_features))
    if seq_lengths is not None:
        next_step = "To give every member the same lengths, call tile_members(seq_lengths, {E})."
        lengths = jnp.shape(seq_lengths)
        check_state_shape(what, "seq_lengths", lengths, batch, next_step.format(E=layer.num_members))
