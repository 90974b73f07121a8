"""Recurrent cells on fastseq's ops: one step of one layer, one fused call."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastseq.nn.serving import ServedRecurrent, are_sound, cast
from fastseq.ops.contract import autocast_dtype, needs_graph, requested, why_torch
from fastseq.ops.gru import GRU
from fastseq.ops.lstm import LSTM
from fastseq.ops.recurrent import Arguments, Recurrent
from fastseq.ops.rnn import RNN_RELU, RNN_TANH
from fastseq.registry import FLOATS

_WEIGHTS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
_NO_STATES = (None, None)


class _Cell(ServedRecurrent, torch.nn.RNNCellBase):
    """What the three cells share."""

    _autocast_lowers = False
    # Multiply-adds from which on a step is ours, without and with a graph to record: a step of one row, and of more.
    _least_of_a_row, _least_of_rows, _least_rows = (2**16, 2**18), (2**19, 2**19), 2
    note = "small steps go to torch, which is ahead there"

    def _run(self, torchs_forward: Callable[..., Any], x: Any, hx: Any) -> Any:
        """The next state: h or (h, c), [B, H] or [H]."""
        op = self.op
        if not isinstance(x, Tensor):
            node = self._node(x, hx)
            return self._as_torch(torchs_forward, None, x, hx) if node is None else node
        low = autocast_dtype(x)
        is_small = low is None and x.dtype in FLOATS and self._is_small(x)
        if (is_small or x.device.type != "cpu") and requested(self.op.name) is None:
            return torchs_forward(x, hx)
        weights = self._weights(_WEIGHTS if self.bias else _WEIGHTS[:2])
        if (
            not torch.compiler.is_compiling()
            and (result := self._at_once(op, torchs_forward, x, hx, weights)) is not None
        ):
            return result
        states = _NO_STATES if hx is None else hx if op.has_cell else (hx, None)
        given = x.dtype
        reason = why_torch(op.table, x.device.type, given)
        # Whatever is wrong with the arguments, torch's own checks say so in torch's own words.
        if reason is not None or not self._is_sound(x, states, weights, low is not None):
            return self._as_torch(torchs_forward, reason, x, hx)

        compute, wanted = self._dtypes(x, low)
        if compute != given or low is not None:
            x, states = cast(x, compute), cast(states, compute)
            if needs_graph(x, *states, *weights):  # without one, the op reads them as they are
                weights = cast(weights, compute)
        given_x, rows = x, 1 if x.dim() == 2 else 2  # T, or T and B
        h, c = states
        for _ in range(rows):
            x, h, c = x.unsqueeze(0), h if h is None else h.unsqueeze(0), c if c is None else c.unsqueeze(0)
        arguments = Arguments(x, h, c, weights)
        if compute == given and self._yields(arguments):
            return torchs_forward(given_x, hx)
        finals: Any = op(arguments)[1 : 2 + op.has_cell]
        for _ in range(rows):
            finals = tuple([s.squeeze(0) for s in finals])
        if compute != wanted:
            finals = cast(finals, wanted)
        return finals if op.has_cell else finals[0]

    def _at_once(
        self, op: Recurrent, torchs_forward: Callable[..., Any], x: Tensor, hx: Any, weights: list[Any]
    ) -> Any:
        """The result of a plain call, straight from the kernel, or from torch's own forward where that is ahead; None
        for any other call.
        """
        state = self._split(hx)
        if state is None or x.dim() != 2 or x.shape[1] != self.input_size:
            return None
        h, c = state
        if (h is not None and type(h) is not Tensor) or (c is not None and type(c) is not Tensor):
            return None
        arguments = Arguments(x[None], h if h is None else h[None], c if c is None else c[None], weights)
        if op.table.rule_for_torch(x.device.type, x.dtype) and self._yields(arguments):
            return torchs_forward(x, hx)
        outputs = op.at_once(arguments)
        if outputs is None:
            return None
        return (outputs[1][0], outputs[2][0]) if op.has_cell else outputs[1][0]

    def why_torch(self) -> str | None:
        if next(self.parameters()).device.type != "cpu" and requested(self.op.name) is None:
            return "torch's own cells are fused there"
        return super().why_torch()

    def _is_small(self, x: Tensor) -> bool:
        """Whether torch is ahead: its cells are C++ from the first line; ours starts to pay where weights are large, or
        rows are many. Measured with two threads on Zen 3 and Zen 5.
        """
        of_a_row = self.op.gates * self.hidden_size * (self.input_size + self.hidden_size)
        rows = x.shape[0] if x.dim() == 2 else 1
        records = torch.is_grad_enabled()
        if rows == 1:
            return of_a_row < self._least_of_a_row[records]
        return rows < self._least_rows or rows * of_a_row < self._least_of_rows[records]

    def _is_sound(self, x: Tensor, states: Any, weights: list[Any], autocast: bool) -> bool:
        """Whether the arguments are as torch's checks and the op want them."""
        shape, dtype, device = x.shape, x.dtype, x.device
        if len(shape) not in (1, 2) or shape[-1] != self.input_size:
            return False
        if not are_sound(weights, dtype, device, autocast) or not dtype.is_floating_point or x.layout != torch.strided:
            return False
        if states is _NO_STATES:
            return True
        if not isinstance(states, (tuple, list)) or len(states) != 2:
            return False
        expected = (*shape[:-1], self.hidden_size)
        for state in states if self.op.has_cell else states[:1]:
            if not isinstance(state, Tensor) or state.shape != expected or state.device != device:
                return False
            if state.dtype != dtype and not autocast:
                return False
        return True


class LSTMCell(_Cell, torch.nn.LSTMCell):
    """Drop-in for `torch.nn.LSTMCell`: the same arguments, parameters, results and errors, one fused call."""

    @property
    def op(self) -> Recurrent:
        return LSTM

    def forward(self, input: Any, hx: Any = None) -> Any:
        """See `torch.nn.LSTMCell`: `input` [B, I] or [I], `hx` a pair (h, c); returns the next (h, c)."""
        return self._run(super().forward, input, hx)


class GRUCell(_Cell, torch.nn.GRUCell):
    """Drop-in for `torch.nn.GRUCell`: the same arguments, parameters, results and errors, one fused call."""

    @property
    def op(self) -> Recurrent:
        return GRU

    def forward(self, input: Any, hx: Any = None) -> Any:
        """See `torch.nn.GRUCell`: `input` [B, I] or [I], `hx` h; returns the next h."""
        return self._run(super().forward, input, hx)


class RNNCell(_Cell, torch.nn.RNNCell):
    """Drop-in for `torch.nn.RNNCell`: the same arguments, parameters, results and errors, one fused call."""

    _autocast_lowers = True
    _least_of_a_row, _least_of_rows, _least_rows = (2**19, 2**20), (2**20, 2**23), 16

    @property
    def op(self) -> Recurrent:
        return RNN_TANH if self.nonlinearity == "tanh" else RNN_RELU

    def forward(self, input: Any, hx: Any = None) -> Any:
        """See `torch.nn.RNNCell`: `input` [B, I] or [I], `hx` h; returns the next h."""
        return self._run(super().forward, input, hx)
