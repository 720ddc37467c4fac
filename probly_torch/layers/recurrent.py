"""Recurrent layers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from probly_common.checks.layers import check_base_layer, check_not_packed, check_recurrent_dtype, check_weight
from probly_common.checks.rows import (
    BATCH_MAJOR,
    CELL,
    TIME_MAJOR,
    check_recurrent_rows,
    check_state_shape,
    check_states,
)
from probly_torch.functional._common import autocast, promoted
from probly_torch.functional.linear import members_linear
from probly_torch.layers._base import BaseLayer, Draws, FastWeightLayer, member_of, param

__all__ = ["BatchEnsembleGRU", "BatchEnsembleGRUCell", "BatchEnsembleLSTM", "BatchEnsembleLSTMCell"]

_OPTIONS = ("input_size", "hidden_size", "bias")
_SEQUENCE_OPTIONS = (*_OPTIONS, "num_layers", "batch_first", "dropout", "bidirectional", "proj_size")


class _Recurrent(FastWeightLayer[BaseLayer]):
    """The base of the layers: weights `weight_ih`, `r_ih`, `s_ih`, `bias_ih`, ..., and those of one member."""

    _base_type: Any  # the ordinary layer
    _options: Sequence[str] = _OPTIONS
    input_size: int
    hidden_size: int
    bias: bool

    def _check_base(self, what: str, base_layer: BaseLayer) -> None:
        check_base_layer(what, base_layer, self._base_type, "forward")

    def _convert(self, base_layer: BaseLayer, draws: Draws) -> None:
        for option in self._options:
            setattr(self, option, getattr(base_layer, option))
        for name in self._names():
            base: Any = getattr(base_layer, f"weight_{name}")
            check_weight(type(self).__name__, base.shape)
            setattr(self, f"weight_{name}", draws.weight(base))
            r, s = draws.fast_weights(base.shape[1], base.shape[0], base)
            setattr(self, f"r_{name}", r)
            setattr(self, f"s_{name}", s)
            self.register_parameter(f"bias_{name}", draws.rows(getattr(base_layer, f"bias_{name}", None)))

    def _of_members(self) -> Iterable[str]:
        return (f"{kind}_{name}" for name in self._names() for kind in ("r", "s", "bias"))

    def _names(self) -> list[str]:
        """Lists the names of the weights, in the order of their draws."""
        return ["ih", "hh"]

    def _member_weight(self, name: str, i: int) -> Tensor:
        r, s = getattr(self, f"r_{name}"), getattr(self, f"s_{name}")
        return getattr(self, f"weight_{name}") * (s[i, :, None] * r[i])  # type: ignore[no-any-return]

    def _fill(self, layer: nn.Module, i: int) -> None:
        """Gives an ordinary layer, of meta tensors, the weights of member i."""
        for name in self._names():
            weight, bias = getattr(self, f"weight_{name}"), getattr(self, f"bias_{name}")
            setattr(layer, f"weight_{name}", param(self._member_weight(name, i).detach(), weight))
            if bias is not None:
                setattr(layer, f"bias_{name}", member_of(bias, i))
        layer.train(self.training)

    def extra_repr(self) -> str:
        return f"{self.input_size}, {self.hidden_size}, num_members={self.num_members}, bias={self.bias}"


class _Cell(_Recurrent[BaseLayer]):
    weight_ih: nn.Parameter
    weight_hh: nn.Parameter
    r_ih: nn.Parameter
    r_hh: nn.Parameter
    s_ih: nn.Parameter
    s_hh: nn.Parameter
    bias_ih: nn.Parameter | None
    bias_hh: nn.Parameter | None

    def _gates(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        """Computes what the inputs and the state send to the gates, side by side."""
        what = type(self).__name__
        return (
            members_linear(*promoted(what, x, self.weight_ih, self.r_ih, self.s_ih, self.bias_ih)),
            members_linear(*promoted(what, h, self.weight_hh, self.r_hh, self.s_hh, self.bias_hh)),
        )

    def _states(self, what: str, x: Tensor, states: dict[str, Tensor] | None, count: int) -> tuple[Tensor, ...]:
        """Returns the given states, checked, or zeros."""
        check_recurrent_rows(what, x.shape, self.num_members, self.input_size, CELL)
        expected = (x.shape[0], self.hidden_size)
        for name, state in (states or {}).items():
            check_state_shape(what, name, state.shape, expected, "For zeros, leave it out: layer(x).")
        _check_dtypes(what, self.weight_ih.dtype, {"x": x, **(states or {})})
        given = (x.new_zeros(expected),) * count if states is None else tuple(states.values())
        # On the CPU, autocast casts the matrix products of a cell, and elsewhere the whole cell.
        return given if x.device.type == "cpu" else autocast(*given)

    def _member(self, i: int) -> BaseLayer:
        dtype = self.weight_ih.dtype
        cell = self._base_type(self.input_size, self.hidden_size, self.bias, device="meta", dtype=dtype)
        self._fill(cell, self._index(i))
        return cell  # type: ignore[no-any-return]


class _Sequence(_Recurrent[BaseLayer]):
    _options = _SEQUENCE_OPTIONS
    num_layers: int
    batch_first: bool
    dropout: float
    bidirectional: bool
    proj_size: int

    def _names(self) -> list[str]:
        kinds = ("ih", "hh", "hr") if self.proj_size else ("ih", "hh")
        return [f"{kind}_{place}" for place in self._places() for kind in kinds]

    def _places(self) -> list[str]:
        directions = ("", "_reverse") if self.bidirectional else ("",)
        return [f"l{layer}{direction}" for layer in range(self.num_layers) for direction in directions]

    def _flat_weights(self, i: int) -> list[Tensor]:
        """Lists member i's weights, in the order of torch.lstm and torch.gru."""
        flat = []
        for place in self._places():
            flat += [self._member_weight(f"{kind}_{place}", i) for kind in ("ih", "hh")]
            if self.bias:
                flat += [getattr(self, f"bias_{kind}_{place}")[i] for kind in ("ih", "hh")]
            if self.proj_size:
                flat.append(self._member_weight(f"hr_{place}", i))
        return flat

    def _run(
        self, what: str, kernel: Any, x: Tensor, states: dict[str, Tensor] | None, sizes: Sequence[int]
    ) -> list[Tensor]:
        """Runs torch's kernel on each member's rows, from its states, with its weights; joins outputs and states."""
        check_not_packed(what, x, PackedSequence)
        axes = BATCH_MAJOR if self.batch_first else TIME_MAJOR
        check_recurrent_rows(what, x.shape, self.num_members, self.input_size, axes)
        axis = axes.index(CELL[0])
        weight: Tensor = self.weight_ih_l0  # type: ignore[assignment]
        shapes = [(len(self._places()), x.shape[axis], size) for size in sizes]
        if states is None:
            given = [x.new_zeros(shape) for shape in shapes]
        else:
            for (name, state), shape in zip(states.items(), shapes, strict=True):
                check_state_shape(what, name, state.shape, shape, "For zeros, leave it out: layer(x).")
            given = list(states.values())
        _check_dtypes(what, weight.dtype, {"x": x, **(states or {})})
        options = (self.bias, self.num_layers, self.dropout, self.training, self.bidirectional, self.batch_first)
        own_states = zip(*(self._members(state, 1) for state in given), strict=True)
        results = [
            kernel(own_x, own if len(own) > 1 else own[0], self._flat_weights(i), *options)
            for i, (own_x, own) in enumerate(zip(self._members(x, axis), own_states, strict=True))
        ]
        output, *last = zip(*results, strict=True)
        return [torch.cat(output, axis), *(torch.cat(state, 1) for state in last)]

    def _members(self, rows: Tensor, axis: int) -> tuple[Tensor, ...]:
        batch = rows.shape[axis] // self.num_members
        return rows.split([batch] * self.num_members, axis)

    def _member(self, i: int) -> BaseLayer:
        options = {option: getattr(self, option) for option in self._options if option != "dropout"}
        if not self.proj_size:
            del options["proj_size"]  # GRU has none
        weight: Tensor = self.weight_ih_l0  # type: ignore[assignment]
        layer = self._base_type(**options, device="meta", dtype=weight.dtype)
        layer.dropout = self.dropout  # set later: torch warns of it where there is one layer
        self._fill(layer, self._index(i))
        return layer.to(weight.device)  # type: ignore[no-any-return]  # also lays the weights out for cuDNN

    def extra_repr(self) -> str:
        options = {"num_layers": 1, "batch_first": False, "dropout": 0.0, "bidirectional": False, "proj_size": 0}
        given = {name: getattr(self, name) for name, default in options.items() if getattr(self, name) != default}
        return ", ".join([super().extra_repr(), *(f"{name}={value}" for name, value in given.items())])


class BatchEnsembleLSTMCell(_Cell[nn.LSTMCell]):
    r"""E LSTM cells that share their two weights and differ by rank-one scalings.

    Member i computes  a_i = ((x_i * r_ih,i) W_ih^T) * s_ih,i + b_ih,i + ((h_i * r_hh,i) W_hh^T) * s_hh,i + b_hh,i
    (Wen et al. 2020, eq. 5, for both weights), and from its four parts, the gates i, f, g and o, as LSTMCell does,
    c_i' = sigmoid(f) * c_i + sigmoid(i) * tanh(g)  and  h_i' = sigmoid(o) * tanh(c_i').

    Shape:
        x: (E*B, input_size), rows [k*B, (k+1)*B) belong to member k. hx: (h, c), both (E*B, hidden_size), or None for
        zeros. Returns (h', c').
    Weights:
        weight_ih (4*hidden_size, input_size), r_ih (E, input_size), s_ih and bias_ih (E, 4*hidden_size); weight_hh
        (4*hidden_size, hidden_size), r_hh (E, hidden_size), s_hh and bias_hh (E, 4*hidden_size). Biases may be None.
    Args:
        base_layer: the LSTMCell to start from. It is copied, never changed or shared.
        rngs: a seed or an Rngs; keys come from `rngs.params()` for the weight (if drawn), r and s, in this order, of
            the inputs and then of the state.
        use_base_weights: share copies of the base layer's weights; otherwise draw them, lecun_normal.
        num_members, init, r_mean, r_std, s_mean, s_std: see `__init__`.
    Raises:
        TypeError: if base_layer is not an LSTMCell, or rngs neither a seed nor an Rngs.
        ValueError: if the rows do not divide by num_members, the last axis is not input_size, or the state has not a
            row for each of the inputs.
    Example:
        >>> import torch
        >>> cell = BatchEnsembleLSTMCell(nn.LSTMCell(3, 2), num_members=4)
        >>> h, c = cell(torch.ones(8, 3))
        >>> h.shape, c.shape
        (torch.Size([8, 2]), torch.Size([8, 2]))
        >>> [tuple(p.shape) for p in (cell.weight_hh, cell.r_hh, cell.s_hh, cell.bias_hh)]
        [(8, 2), (4, 2), (4, 8), (4, 8)]
    """

    _base_type = nn.LSTMCell

    def forward(self, x: Tensor, hx: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        h, c = self._states("BatchEnsembleLSTMCell", x, _pair("BatchEnsembleLSTMCell", hx, "h", "c"), 2)
        from_x, from_h = self._gates(x, h)
        i, f, g, o = (from_x + from_h).chunk(4, -1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        return o.sigmoid() * c.tanh(), c

    def member(self, i: int) -> nn.LSTMCell:
        """Returns member i as an ordinary LSTM cell, with the weights W * s_i r_i^T and the biases b_i.

        Example:
            >>> import torch
            >>> cell, x = BatchEnsembleLSTMCell(nn.LSTMCell(3, 2), num_members=4), torch.ones(5, 3)
            >>> torch.allclose(cell.member(1)(x)[0], cell(x.repeat(4, 1))[0][5:10])
            True
        """
        return self._member(i)


class BatchEnsembleGRUCell(_Cell[nn.GRUCell]):
    r"""E GRU cells that share their two weights and differ by rank-one scalings.

    Member i computes  a_i = ((x_i * r_ih,i) W_ih^T) * s_ih,i + b_ih,i  and
    d_i = ((h_i * r_hh,i) W_hh^T) * s_hh,i + b_hh,i  (Wen et al. 2020, eq. 5, for both weights), and from their three
    parts, as GRUCell does,  r = sigmoid(a_r + d_r),  z = sigmoid(a_z + d_z),  n = tanh(a_n + r * d_n)  and
    h_i' = (1 - z) * n + z * h_i.

    Shape:
        x: (E*B, input_size), rows [k*B, (k+1)*B) belong to member k. hx: h (E*B, hidden_size), or None for zeros.
        Returns h'.
    Weights:
        weight_ih (3*hidden_size, input_size), r_ih (E, input_size), s_ih and bias_ih (E, 3*hidden_size); weight_hh
        (3*hidden_size, hidden_size), r_hh (E, hidden_size), s_hh and bias_hh (E, 3*hidden_size). Biases may be None.
    Args:
        base_layer: the GRUCell to start from. It is copied, never changed or shared.
        rngs: a seed or an Rngs; keys come from `rngs.params()` for the weight (if drawn), r and s, in this order, of
            the inputs and then of the state.
        use_base_weights: share copies of the base layer's weights; otherwise draw them, lecun_normal.
        num_members, init, r_mean, r_std, s_mean, s_std: see `__init__`.
    Raises:
        TypeError: if base_layer is not a GRUCell, or rngs neither a seed nor an Rngs.
        ValueError: if the rows do not divide by num_members, the last axis is not input_size, or the state has not a
            row for each of the inputs.
    Example:
        >>> import torch
        >>> cell = BatchEnsembleGRUCell(nn.GRUCell(3, 2), num_members=4)
        >>> cell(torch.ones(8, 3)).shape
        torch.Size([8, 2])
        >>> [tuple(p.shape) for p in (cell.weight_hh, cell.r_hh, cell.s_hh, cell.bias_hh)]
        [(6, 2), (4, 2), (4, 6), (4, 6)]
    """

    _base_type = nn.GRUCell

    def forward(self, x: Tensor, hx: Tensor | None = None) -> Tensor:
        (h,) = self._states("BatchEnsembleGRUCell", x, None if hx is None else {"hx": hx}, 1)
        from_x, from_h = self._gates(x, h)
        (x_r, x_z, x_n), (h_r, h_z, h_n) = from_x.chunk(3, -1), from_h.chunk(3, -1)
        r, z = (x_r + h_r).sigmoid(), (x_z + h_z).sigmoid()
        return (1 - z) * (x_n + r * h_n).tanh() + z * h

    def member(self, i: int) -> nn.GRUCell:
        """Returns member i as an ordinary GRU cell, with the weights W * s_i r_i^T and the biases b_i.

        Example:
            >>> import torch
            >>> cell, x = BatchEnsembleGRUCell(nn.GRUCell(3, 2), num_members=4), torch.ones(5, 3)
            >>> torch.allclose(cell.member(1)(x), cell(x.repeat(4, 1))[5:10])
            True
        """
        return self._member(i)


class BatchEnsembleLSTM(_Sequence[nn.LSTM]):
    r"""E LSTMs, of any number of layers and directions, that share their weights and differ by rank-one scalings.

    Member i is an LSTM with the weights  W_ih * s_ih,i r_ih,i^T  and  W_hh * s_hh,i r_hh,i^T  in each layer and
    direction (Wen et al. 2020, eq. 5), and with the projection  W_hr * s_hr,i r_hr,i^T  if there is one; it is run
    by torch's own kernel.

    Shape:
        x: (E*B, T, input_size) if batch_first, else (T, E*B, input_size); of the E*B rows, [k*B, (k+1)*B) belong to
        member k. hx: (h_0, c_0), each (D*num_layers, E*B, its size), D directions, or None for zeros. Returns
        output, (h_n, c_n), as LSTM does.
    Weights:
        weight_ih_l0 (4*hidden_size, input_size), r_ih_l0 (E, input_size), s_ih_l0 and bias_ih_l0 (E, 4*hidden_size);
        the same with hh, for the state; with hr, without bias, for the projection; and so for l1, ... and _reverse.
    Args:
        base_layer: the LSTM to start from. It is copied, never changed or shared.
        rngs: a seed or an Rngs; keys come from `rngs.params()` for the weight (if drawn), r and s, in this order, of
            ih, hh and hr of layer 0, of its reverse direction, of layer 1, and so on.
        use_base_weights: share copies of the base layer's weights; otherwise draw them, lecun_normal.
        num_members, init, r_mean, r_std, s_mean, s_std: see `__init__`.
    Raises:
        TypeError: if base_layer is not an LSTM, rngs neither a seed nor an Rngs, or x a PackedSequence.
        ValueError: if the rows do not divide by num_members, the last axis is not input_size, or a state has not a
            row for each of the inputs.
    Example:
        >>> import torch
        >>> layer = BatchEnsembleLSTM(nn.LSTM(3, 2, batch_first=True), num_members=4)
        >>> output, (h, c) = layer(torch.ones(8, 5, 3))
        >>> output.shape, h.shape, c.shape
        (torch.Size([8, 5, 2]), torch.Size([1, 8, 2]), torch.Size([1, 8, 2]))
        >>> [tuple(p.shape) for p in (layer.weight_hh_l0, layer.r_hh_l0, layer.s_hh_l0, layer.bias_hh_l0)]
        [(8, 2), (4, 2), (4, 8), (4, 8)]
    """

    _base_type = nn.LSTM

    def forward(self, x: Tensor, hx: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        states = _pair("BatchEnsembleLSTM", hx, "h_0", "c_0")
        sizes = (self.proj_size or self.hidden_size, self.hidden_size)
        output, h, c = self._run("BatchEnsembleLSTM", torch.lstm, x, states, sizes)
        return output, (h, c)

    def member(self, i: int) -> nn.LSTM:
        """Returns member i as an ordinary LSTM, with the weights W * s_i r_i^T and the biases b_i.

        Example:
            >>> import torch
            >>> layer = BatchEnsembleLSTM(nn.LSTM(3, 2, batch_first=True), num_members=4)
            >>> x = torch.ones(5, 6, 3)
            >>> torch.allclose(layer.member(1)(x)[0], layer(x.repeat(4, 1, 1))[0][5:10])
            True
        """
        return self._member(i)


class BatchEnsembleGRU(_Sequence[nn.GRU]):
    r"""E GRUs, of any number of layers and directions, that share their weights and differ by rank-one scalings.

    Member i is a GRU with the weights  W_ih * s_ih,i r_ih,i^T  and  W_hh * s_hh,i r_hh,i^T  in each layer and
    direction (Wen et al. 2020, eq. 5); it is run by torch's own kernel.

    Shape:
        x: (E*B, T, input_size) if batch_first, else (T, E*B, input_size); of the E*B rows, [k*B, (k+1)*B) belong to
        member k. hx: h_0 (D*num_layers, E*B, hidden_size), D directions, or None for zeros. Returns output, h_n, as
        GRU does.
    Weights:
        weight_ih_l0 (3*hidden_size, input_size), r_ih_l0 (E, input_size), s_ih_l0 and bias_ih_l0 (E, 3*hidden_size);
        the same with hh, for the state; and so for l1, ... and _reverse.
    Args:
        base_layer: the GRU to start from. It is copied, never changed or shared.
        rngs: a seed or an Rngs; keys come from `rngs.params()` for the weight (if drawn), r and s, in this order, of
            ih and hh of layer 0, of its reverse direction, of layer 1, and so on.
        use_base_weights: share copies of the base layer's weights; otherwise draw them, lecun_normal.
        num_members, init, r_mean, r_std, s_mean, s_std: see `__init__`.
    Raises:
        TypeError: if base_layer is not a GRU, rngs neither a seed nor an Rngs, or x a PackedSequence.
        ValueError: if the rows do not divide by num_members, the last axis is not input_size, or a state has not a
            row for each of the inputs.
    Example:
        >>> import torch
        >>> layer = BatchEnsembleGRU(nn.GRU(3, 2, batch_first=True), num_members=4)
        >>> output, h = layer(torch.ones(8, 5, 3))
        >>> output.shape, h.shape
        (torch.Size([8, 5, 2]), torch.Size([1, 8, 2]))
        >>> [tuple(p.shape) for p in (layer.weight_hh_l0, layer.r_hh_l0, layer.s_hh_l0, layer.bias_hh_l0)]
        [(6, 2), (4, 2), (4, 6), (4, 6)]
    """

    _base_type = nn.GRU

    def forward(self, x: Tensor, hx: Tensor | None = None) -> tuple[Tensor, Tensor]:
        states = None if hx is None else {"h_0": hx}
        output, h = self._run("BatchEnsembleGRU", torch.gru, x, states, (self.hidden_size,))
        return output, h

    def member(self, i: int) -> nn.GRU:
        """Returns member i as an ordinary GRU, with the weights W * s_i r_i^T and the biases b_i.

        Example:
            >>> import torch
            >>> layer = BatchEnsembleGRU(nn.GRU(3, 2, batch_first=True), num_members=4)
            >>> x = torch.ones(5, 6, 3)
            >>> torch.allclose(layer.member(1)(x)[0], layer(x.repeat(4, 1, 1))[0][5:10])
            True
        """
        return self._member(i)


def _check_dtypes(what: str, expected: torch.dtype, tensors: dict[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        device = tensor.device.type
        if not (torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)):
            check_recurrent_dtype(what, name, tensor.dtype, expected)


def _pair(what: str, hx: Any, *names: str) -> dict[str, Tensor] | None:
    if hx is None:
        return None
    check_states(what, "hx", hx, names)
    return dict(zip(names, hx, strict=True))
