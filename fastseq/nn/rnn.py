"""Recurrent modules on fastseq's ops."""

from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from fastseq.dynamo import assume_constant_result
from fastseq.ops import lstm as lstm_op
from fastseq.registry import OPS, BackendError, requested_backend


# Dynamo cannot look into the choice of an implementation, and need not: it does not change between a trace and its use.
@assume_constant_result
def _requested() -> str | None:
    return requested_backend()


@assume_constant_result
def _is_served(op: str, device: str, dtype: torch.dtype) -> bool:
    """Whether something better than the reference serves the op, or an implementation is asked for by name."""
    return requested_backend() is not None or OPS[op].candidates(device, dtype)[0] is not OPS[op].impls[-1]


class LSTM(torch.nn.LSTM):
    """Drop-in for `torch.nn.LSTM`: the same arguments, parameters, results and errors on fused kernels.

    What the kernels do not cover (see `why_torch`) takes torch's own path.
    """

    always_torch = "but torch for packed input and under autocast"

    def why_torch(self) -> str | None:
        """Why this layer takes torch's path whatever its input, or None."""
        weight = getattr(self, self._flat_weights_names[0])
        return self._why_torch_on(weight.device.type, weight.dtype)

    def _why_torch_on(self, device: str, dtype: torch.dtype) -> str | None:
        if self.proj_size > 0:
            return "proj_size has no kernel yet"
        if not _is_served("lstm", device, dtype):
            return f"no kernel for {str(dtype).removeprefix('torch.')} on {device} here"
        return None

    def forward(self, input: Any, hx: Any = None) -> Any:
        """See `torch.nn.LSTM`: `input` [T, B, I], [B, T, I] if batch_first, or [T, I]; `hx` a pair (h_0, c_0)."""
        if isinstance(input, PackedSequence):
            return self._torch_forward("packed input has no kernel yet", input, hx)
        if not isinstance(input, Tensor):
            return self._torch_forward(None, input, hx)
        device = input.device.type
        reason = self._why_torch_on(device, input.dtype)
        if reason is None and torch.is_autocast_enabled(device):
            reason = "autocast has no kernel yet"
        parameters = self._parameters
        weights: Any = [parameters[n] if n in parameters else getattr(self, n) for n in self._flat_weights_names]
        # Whatever is wrong with the arguments, torch's own checks say so in torch's own words.
        if reason is not None or not self._is_sound(input, hx, weights):
            return self._torch_forward(reason, input, hx)

        h0, c0 = (None, None) if hx is None else hx
        batched = input.dim() == 3
        if not batched:
            x = input.unsqueeze(1)
            if hx is not None:
                h0, c0 = hx[0].unsqueeze(1), hx[1].unsqueeze(1)
        else:
            x = input.transpose(0, 1) if self.batch_first else input

        if self.num_layers == 1:
            x, h_n, c_n = lstm_op.call(x, h0, c0, weights, self.bidirectional)
        else:
            x, h_n, c_n = self._layers(x, h0, c0, weights)

        if not batched:
            return x.squeeze(1), (h_n.squeeze(1), c_n.squeeze(1))
        return x.transpose(0, 1) if self.batch_first else x, (h_n, c_n)

    def _layers(
        self, x: Tensor, h0: Tensor | None, c0: Tensor | None, weights: list[Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        L, D = self.num_layers, 2 if self.bidirectional else 1
        count = len(weights) // L
        h_n, c_n = [], []
        for layer in range(L):
            mine = slice(layer * D, (layer + 1) * D)
            x, h, c = lstm_op.call(
                x,
                None if h0 is None else h0[mine],
                None if c0 is None else c0[mine],
                weights[layer * count : (layer + 1) * count],
                self.bidirectional,
            )
            h_n.append(h)
            c_n.append(c)
            if self.dropout > 0 and self.training and layer < L - 1:
                x = torch.dropout(x, self.dropout, True)
        return x, torch.cat(h_n), torch.cat(c_n)

    def _torch_forward(self, reason: str | None, input: Any, hx: Any) -> Any:
        if reason is not None and (requested := _requested()) is not None:
            raise BackendError(f"fastseq.nn.LSTM: {requested} was asked for but {reason}")
        return super().forward(input, hx)

    def _is_sound(self, input: Tensor, hx: Any, weights: list[Any]) -> bool:
        """Whether the arguments are as torch's checks and the op want them."""
        rank, shape = input.dim(), input.shape
        if rank not in (2, 3) or shape[-1] != self.input_size:
            return False
        if shape[1 if self.batch_first and rank == 3 else 0] == 0:
            return False
        dtype, device = input.dtype, input.device
        if any(w is None or w.dtype != dtype for w in weights) or weights[0].device != device:
            return False
        if hx is None:
            return True
        if not isinstance(hx, (tuple, list)) or len(hx) != 2:
            return False
        states = self.num_layers * (2 if self.bidirectional else 1)
        batch = () if rank == 2 else (shape[0 if self.batch_first else 1],)
        expected = (states, *batch, self.hidden_size)
        return all(
            isinstance(s, Tensor) and s.shape == expected and s.dtype == dtype and s.device == device for s in hx
        )
