"""Recurrent modules on fastseq's ops."""

from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

import fastseq.ops.lstm  # noqa: F401  (defines the op)
from fastseq.dynamo import assume_constant_result
from fastseq.registry import OPS, BackendError, requested_backend


@assume_constant_result
def _is_served(op: str, device: str, dtype: torch.dtype) -> bool:
    """Whether something better than the reference serves the op, or an implementation is asked for by name."""
    return requested_backend() is not None or OPS[op].candidates(device, dtype)[0] is not OPS[op].impls[-1]


class LSTM(torch.nn.LSTM):
    """Drop-in for `torch.nn.LSTM`: the same arguments, parameters, results and errors on fused kernels.

    What the kernels do not cover (see `why_torch`) takes torch's own path.
    """

    def why_torch(self) -> str | None:
        """Why this layer takes torch's path whatever its input, or None."""
        if self.proj_size > 0:
            return "proj_size has no kernel yet"
        weight = getattr(self, self._flat_weights_names[0])
        if not _is_served("lstm", weight.device.type, weight.dtype):
            return f"no kernel for {str(weight.dtype).removeprefix('torch.')} on {weight.device.type} here"
        return None

    def _why_torch_for(self, input: Any) -> str | None:
        if isinstance(input, PackedSequence):
            return "packed input has no kernel yet"
        if torch.is_autocast_enabled(input.device.type):
            return "autocast has no kernel yet"
        return self.why_torch()

    def forward(self, input: Any, hx: Any = None) -> Any:  # type: ignore[override]
        """See `torch.nn.LSTM`: `input` [T, B, I], [B, T, I] if batch_first, or [T, I]; `hx` a pair (h_0, c_0)."""
        reason = self._why_torch_for(input)
        if reason is not None and requested_backend() is not None:
            raise BackendError(f"fastseq.nn.LSTM: {requested_backend()} was asked for but {reason}")
        weights = [getattr(self, name) for name in self._flat_weights_names]
        # Whatever is wrong with the arguments, torch's own checks say so in torch's own words.
        if reason is not None or not self._is_sound(input, hx, weights):
            return super().forward(input, hx)

        batched = input.dim() == 3
        if not batched:
            x = input.unsqueeze(1)
            h0, c0 = (None, None) if hx is None else (hx[0].unsqueeze(1), hx[1].unsqueeze(1))
        else:
            x = input.transpose(0, 1) if self.batch_first else input
            h0, c0 = (None, None) if hx is None else hx

        D, L = 2 if self.bidirectional else 1, self.num_layers
        if L == 1:
            x, h_n, c_n, _, _ = torch.ops.fastseq.lstm(x, h0, c0, weights, self.bidirectional, False)
        else:
            count = len(weights) // L
            h_layers, c_layers = [], []
            for layer in range(L):
                state = slice(layer * D, (layer + 1) * D)
                x, h, c, _, _ = torch.ops.fastseq.lstm(
                    x,
                    None if h0 is None else h0[state],
                    None if c0 is None else c0[state],
                    weights[layer * count : (layer + 1) * count],
                    self.bidirectional,
                    False,
                )
                h_layers.append(h)
                c_layers.append(c)
                if self.dropout > 0 and self.training and layer < L - 1:
                    x = torch.dropout(x, self.dropout, True)
            h_n, c_n = torch.cat(h_layers), torch.cat(c_layers)

        if not batched:
            return x.squeeze(1), (h_n.squeeze(1), c_n.squeeze(1))
        return x.transpose(0, 1) if self.batch_first else x, (h_n, c_n)

    def _is_sound(self, input: Tensor, hx: tuple[Tensor, Tensor] | None, weights: list[Tensor]) -> bool:
        """Whether every argument is as torch's checks and the op want it."""
        rank, shape = input.dim(), input.shape
        if rank not in (2, 3) or shape[-1] != self.input_size:
            return False
        if shape[1 if self.batch_first and rank == 3 else 0] == 0:
            return False
        dtype, device = input.dtype, input.device
        if any(w is None or w.dtype != dtype or w.device != device for w in weights):
            return False
        if hx is None:
            return True
        if not isinstance(hx, (tuple, list)) or len(hx) != 2:
            return False
        states = self.num_layers * (2 if self.bidirectional else 1)
        batch = shape[:0] if rank == 2 else (shape[0 if self.batch_first else 1],)
        expected = (states, *batch, self.hidden_size)
        return all(
            isinstance(s, Tensor) and s.shape == expected and s.dtype == dtype and s.device == device for s in hx
        )
