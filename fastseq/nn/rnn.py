"""Recurrent modules on fastseq's ops."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from fastseq.nn.places import as_lengths
from fastseq.nn.serving import ServedRecurrent, are_sound, cast
from fastseq.ops.contract import autocast_dtype, needs_graph, why_torch
from fastseq.ops.gru import GRU as GRU_OP
from fastseq.ops.lstm import LSTM as LSTM_OP
from fastseq.ops.recurrent import Arguments, Recurrent
from fastseq.ops.rnn import RNN_RELU, RNN_TANH


class _Layers(ServedRecurrent, torch.nn.RNNBase):
    """What the three modules share: torch's contract around calls of an op, layer by layer."""

    def _run(
        self,
        torchs_forward: Callable[..., Any],
        input: Any,
        hx: Any,
        lengths: Tensor | None = None,
        reset: Tensor | None = None,
        reset_state: Any = None,
        return_cell_sequence: bool = False,
    ) -> Any:
        op = self.op
        options = not (lengths is None and reset is None and reset_state is None) or return_cell_sequence
        if self.num_layers == 1 and not torch.compiler.is_compiling():
            forward = None if options else torchs_forward
            result = self._at_once(op, forward, input, hx, lengths, reset, reset_state, return_cell_sequence)
            if result is not None:
                return result
        packed = isinstance(input, PackedSequence)
        x = input.data if packed else input
        if not isinstance(x, Tensor):
            more = dict(lengths=lengths, reset=reset, reset_state=reset_state)
            node = self._node(input, hx, **more, return_cell_sequence=return_cell_sequence or None)
            return self._as_torch(torchs_forward, None, input, hx) if node is None else node
        low = autocast_dtype(x)
        weights = self._weights(self._flat_weights_names)
        # Whatever is wrong with the arguments, torch's own checks say so in torch's own words.
        sizes = input.batch_sizes if packed else None
        sound = self._is_sound(x, sizes, hx, weights, low is not None)
        reason = None if options and sound else why_torch(op.table, x.device.type, x.dtype)
        if reason is not None or not sound:
            if packed and hx is not None:  # which torch forgets to check, and reads past the states' end
                self.check_forward_args(x, hx, sizes)
            result = self._as_torch(torchs_forward, reason, input, hx)
            if options:  # and torch has accepted what the op does not take
                raise ValueError("lengths, reset and the like need an input and weights that fastseq's op takes")
            return result

        states = self._states(hx)
        batched = packed or x.dim() == 3
        if packed:
            states = reordered(states, input.sorted_indices)
        elif not batched:
            x, states = x.unsqueeze(1), [None if s is None else s.unsqueeze(1) for s in states]
        elif self.batch_first:
            x = x.transpose(0, 1)
        reset_states: list[Tensor | None] = [None, None]
        first = weights[: len(weights) // self.num_layers]
        if options:
            given_input = x if packed else input
            lengths, reset, reset_states = self._options(given_input, packed, lengths, reset, reset_state)
            like_x = cast(states, x.dtype)  # under autocast they may be of another dtype
            op.check(self._arguments(0, x, like_x, first, sizes, lengths, reset, reset_states))
        elif self._yields(self._arguments(0, x, states, first, sizes, None, None, reset_states)):
            return torchs_forward(input, hx)

        given = x.dtype
        compute, wanted = self._dtypes(x, low)
        if compute != given or low is not None:
            x, states, reset_states = (cast(t, compute) for t in (x, states, reset_states))
            if needs_graph(x, *states, *reset_states, *weights):  # without one, the op reads them as they are
                weights = cast(weights, compute)
        y, finals, cells = self._layers(x, states, weights, sizes, lengths, reset, reset_states, return_cell_sequence)
        if compute != wanted:
            y, finals, cells = cast(y, wanted), cast(finals, wanted), cast(cells, wanted)

        sequences: list[Any] = [y] if cells is None else [y, cells]
        if packed:
            finals = reordered(finals, input.unsorted_indices)
            sequences = [
                PackedSequence(t, input.batch_sizes, input.sorted_indices, input.unsorted_indices) for t in sequences
            ]
        elif not batched:
            sequences, finals = [t.squeeze(1) for t in sequences], [s.squeeze(1) for s in finals]
        elif self.batch_first:
            sequences = [t.transpose(0, 1) for t in sequences]
        return sequences[0], tuple(finals) if op.has_cell else finals[0], *sequences[1:]

    def _at_once(
        self,
        op: Recurrent,
        torchs_forward: Callable[..., Any] | None,
        input: Any,
        hx: Any,
        lengths: Any,
        reset: Any,
        reset_state: Any,
        want_cells: bool,
    ) -> Any:
        """The result of a plain call of one layer, straight from the kernel, or from torch's own forward where that is
        ahead; None for any other call.
        """
        x = input
        if type(x) is not Tensor or x.dim() != 3 or x.shape[2] != self.input_size:
            return None
        state, anew = self._split(hx), self._split(reset_state)
        if state is None or anew is None or (reset is None and reset_state is not None):
            return None
        if self.batch_first:
            x = x.transpose(0, 1)
            reset = reset if reset is None else reset.transpose(0, 1)
        weights = self._weights(self._flat_weights_names)
        arguments = Arguments(x, *state, weights, self.bidirectional, None, lengths, reset, *anew)
        if op.table.rule_for_torch(x.device.type, x.dtype) and torchs_forward and self._yields(arguments):
            return torchs_forward(input, hx)
        outputs = op.at_once(arguments, want_cells)
        if outputs is None:
            return None
        y, h_n, c_n, _, cells = outputs
        sequences = [y, cells_like(y, cells)] if want_cells else [y]
        if self.batch_first:
            sequences = [t.transpose(0, 1) for t in sequences]
        return sequences[0], (h_n, c_n) if op.has_cell else h_n, *sequences[1:]

    def _layers(
        self,
        x: Tensor,
        states: list[Tensor | None],
        weights: list[Tensor],
        sizes: Tensor | None,
        lengths: Tensor | None,
        reset: Tensor | None,
        reset_states: list[Tensor | None],
        want_cells: bool,
    ) -> tuple[Tensor, list[Tensor], Tensor | None]:
        """y, h_n and c_n of all layers, and c of the last layer's steps if it is wanted."""
        op, L = self.op, self.num_layers
        count = len(weights) // L
        finals: list[tuple[Tensor, Tensor]] = []
        for layer in range(L):
            last = layer == L - 1
            mine = weights if L == 1 else weights[layer * count : (layer + 1) * count]
            arguments = self._arguments(layer, x, states, mine, sizes, lengths, reset, reset_states)
            x, h_n, c_n, _, cells = op(arguments, save_cells=want_cells and last)
            finals.append((h_n, c_n))
            if self.dropout > 0 and self.training and not last:
                x = torch.dropout(x, self.dropout, True)
        kept = finals[0] if L == 1 else [torch.cat([final[k] for final in finals]) for k in range(1 + op.has_cell)]
        return x, list(kept[: 1 + op.has_cell]), cells_like(x, cells) if want_cells else None

    def _arguments(
        self,
        layer: int,
        x: Tensor,
        states: list[Tensor | None],
        weights: list[Tensor],
        sizes: Tensor | None,
        lengths: Tensor | None,
        reset: Tensor | None,
        reset_states: list[Tensor | None],
    ) -> Arguments:
        D, L = 2 if self.bidirectional else 1, self.num_layers

        def mine(state: Tensor | None) -> Tensor | None:
            return state if state is None or L == 1 else state[layer * D : (layer + 1) * D]

        h0, c0 = states
        reset_h, reset_c = reset_states
        return Arguments(
            x, mine(h0), mine(c0), weights, self.bidirectional, sizes, lengths, reset, mine(reset_h), mine(reset_c)
        )

    def _states(self, hx: Any) -> list[Tensor | None]:
        """[h, c], None for what there is not."""
        if hx is None:
            return [None, None]
        return list(hx) if self.op.has_cell else [hx, None]

    def _options(
        self, input: Tensor, packed: bool, lengths: Any, reset: Any, reset_state: Any
    ) -> tuple[Tensor | None, Tensor | None, list[Tensor | None]]:
        """The options as the op wants them, checked against the input as the caller sees it."""
        for option, value in (("lengths", lengths), ("reset", reset)):
            if value is None:
                continue
            if not isinstance(value, Tensor):
                raise TypeError(f"{option} must be a torch.Tensor, got {type(value).__name__}")
            if packed:
                raise ValueError(f"{option} cannot be given with packed input")
        if reset is None and reset_state is not None:
            raise ValueError("reset_state is what a state is reset to: it needs reset")
        batched = input.dim() == 3
        batch = (input.shape[0 if self.batch_first else 1],) if batched and not packed else ()
        if lengths is not None:
            lengths = as_lengths(lengths, batch)
        if reset is not None:
            expected = input.shape[:-1]
            if reset.shape != expected or reset.dtype != torch.bool or reset.device != input.device:
                got = f"{reset.dtype} {list(reset.shape)} on {reset.device}"
                raise ValueError(f"reset must be torch.bool {list(expected)} on {input.device} like input, got {got}")
            reset = reset.unsqueeze(-1) if not batched else reset.transpose(0, 1) if self.batch_first else reset
        is_pair = isinstance(reset_state, (tuple, list)) and len(reset_state) == 2
        if self.op.has_cell and reset_state is not None and not is_pair:
            raise TypeError(f"reset_state must be a pair (h, c), got {type(reset_state).__name__}")
        anew = self._states(reset_state)
        rows = self.num_layers * (2 if self.bidirectional else 1)
        for state, width in zip(anew, (self.proj_size or self.hidden_size, self.hidden_size), strict=True):
            if state is None:
                continue
            if not isinstance(state, Tensor):
                raise TypeError(f"reset_state must hold torch.Tensors, got {type(state).__name__}")
            if state.shape != (rows, *batch, width) or state.dtype != input.dtype or state.device != input.device:
                want = f"{input.dtype} {[rows, *batch, width]} on {input.device}"
                got = f"{state.dtype} {list(state.shape)} on {state.device}"
                raise ValueError(f"reset_state must be {want} like hx, got {got}")
        if not batched:
            anew = [None if s is None else s.unsqueeze(1) for s in anew]
        return lengths, reset, anew

    def _is_sound(self, x: Tensor, sizes: Tensor | None, hx: Any, weights: list[Any], autocast: bool) -> bool:
        """Whether the arguments are as torch's checks and the op want them."""
        rank, shape = x.dim(), x.shape
        if rank not in ((2, 3) if sizes is None else (2,)) or shape[-1] != self.input_size:
            return False
        batch_first = self.batch_first and rank == 3
        if shape[1 if batch_first else 0] == 0:
            return False
        dtype, device = x.dtype, x.device
        if not are_sound(weights, dtype, device, autocast) or not dtype.is_floating_point or x.layout != torch.strided:
            return False
        if hx is None:
            return True
        if self.op.has_cell and not (isinstance(hx, (tuple, list)) and len(hx) == 2):
            return False
        states = self.num_layers * (2 if self.bidirectional else 1)
        if sizes is not None:
            batch: tuple[int, ...] = (int(sizes[0]),)
        else:
            batch = () if rank == 2 else (shape[0 if batch_first else 1],)
        widths = (self.proj_size or self.hidden_size, self.hidden_size)
        return all(
            isinstance(s, Tensor)
            and s.shape == (states, *batch, width)
            and (s.dtype == dtype or autocast)
            and s.device == device
            for s, width in zip(self._states(hx), widths, strict=True)
            if s is not None or self.op.has_cell
        )


def cells_like(y: Tensor, cells: Tensor) -> Tensor:
    """The op's cells [D, N, H] as [T, B, D*H] or [N, D*H], like y."""
    return cells.transpose(0, 1).reshape(*y.shape[:-1], -1)


def reordered(states: Any, order: Tensor | None) -> Any:
    """States with their rows of the batch in another order."""
    return states if order is None else [None if s is None else s.index_select(1, order) for s in states]


class LSTM(_Layers, torch.nn.LSTM):
    """Drop-in for `torch.nn.LSTM`: the same arguments, parameters, results and errors on fused kernels.

    What the kernels do not cover (see `why_torch`) takes torch's own path.
    """

    @property
    def op(self) -> Recurrent:
        return LSTM_OP

    def forward(
        self,
        input: Any,
        hx: Any = None,
        *,
        lengths: Tensor | None = None,
        reset: Tensor | None = None,
        reset_state: tuple[Tensor, Tensor] | None = None,
        return_cell_sequence: bool = False,
    ) -> Any:
        """See `torch.nn.LSTM`; the arguments by keyword go beyond it.

        Args:
            input: [T, B, I], [B, T, I] if batch_first, [T, I], or a PackedSequence.
            hx: a pair (h_0, c_0).
            lengths: [B] integers, how many steps each row of a padded input has. Outputs past them are 0, and h_n and
                c_n are the states after each row's last step, as if the input had been packed.
            reset: bool, like input without its last dimension: the state is replaced before the steps where it is
                true, and no direction carries anything across (episodes in reinforcement learning).
            reset_state: a pair like hx, what the state is replaced by; zeros by default.
            return_cell_sequence: whether to return all c_t too.

        Returns:
            output and (h_n, c_n); with `return_cell_sequence` also the last layer's cell states, like output with
            D*hidden_size features.

        Raises:
            ValueError, TypeError: for these arguments, with the argument's name; for the others what torch raises.
        """
        return self._run(super().forward, input, hx, lengths, reset, reset_state, return_cell_sequence)


class GRU(_Layers, torch.nn.GRU):
    """Drop-in for `torch.nn.GRU`: the same arguments, parameters, results and errors on fused kernels.

    What the kernels do not cover (see `why_torch`) takes torch's own path.
    """

    _autocast_lowers = False

    @property
    def op(self) -> Recurrent:
        return GRU_OP

    def forward(
        self,
        input: Any,
        hx: Any = None,
        *,
        lengths: Tensor | None = None,
        reset: Tensor | None = None,
        reset_state: Tensor | None = None,
    ) -> Any:
        """See `torch.nn.GRU`, and `fastseq.nn.LSTM` for the arguments by keyword; `reset_state` is like hx."""
        return self._run(super().forward, input, hx, lengths, reset, reset_state)


class RNN(_Layers, torch.nn.RNN):
    """Drop-in for `torch.nn.RNN`: the same arguments, parameters, results and errors on fused kernels.

    What the kernels do not cover (see `why_torch`) takes torch's own path.
    """

    @property
    def op(self) -> Recurrent:
        return RNN_TANH if self.nonlinearity == "tanh" else RNN_RELU

    def forward(
        self,
        input: Any,
        hx: Any = None,
        *,
        lengths: Tensor | None = None,
        reset: Tensor | None = None,
        reset_state: Tensor | None = None,
    ) -> Any:
        """See `torch.nn.RNN`, and `fastseq.nn.LSTM` for the arguments by keyword; `reset_state` is like hx."""
        return self._run(super().forward, input, hx, lengths, reset, reset_state)
