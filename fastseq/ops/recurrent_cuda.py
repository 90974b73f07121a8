"""The recurrent ops on the extension's CUDA kernels, which make all steps of a layer in one launch.

What the kernels are told is in csrc/cuda/recurrent.h; this lays tensors out for them. They know no projection: with
one, the steps exchange m_t = o * tanh(c_t) in place of h_t = W_hr m_t, and W_hh W_hr multiplies it. All h_t are one
product after the loop, and so are their gradients, before it and after it.
"""

from collections.abc import Callable, Sequence
from functools import cache, lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastseq import native
from fastseq.ops.recurrent_steps import CELLS, Backward, Cell, Forward, Layer, allows_tf32, implementation, stacked

_H100 = 132, 227 << 10  # what the emulator stands for


def why_not(
    cell: Cell,
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Tensor],
    bidirectional: bool,
    *options: Any,
) -> str | None:
    """Why the kernels cannot serve a call with the op's arguments, forward's or backward's, or None."""
    batch_sizes = next(option for option in options if not isinstance(option, bool))  # flags come first
    B = x.shape[1] if batch_sizes is None else int(batch_sizes[0])
    H, D = weights[0].shape[0] // cell.gates, 2 if bidirectional else 1
    K = _width(H, x.dtype) * x.dtype.itemsize
    chip = _chip(x.device)
    if B == 0 or (_fits(cell.gates, H, K, B, D, *chip) and _fits(1, H, cell.gates * K, B, D, *chip)):
        return None
    rows = f"{B} rows" + (" in two directions" if bidirectional else "")
    return f"the weights of {H} units do not fit on the chip beside {rows}"


@lru_cache(maxsize=4096)
def _fits(*product_and_chip: int) -> bool:
    return bool(native.cuda_ops().recurrent_plan(*product_and_chip))


@cache
def _chip(device: torch.device) -> tuple[int, int]:
    """Multiprocessors, and bytes of shared memory that a block can have."""
    if device.type != "cuda":
        return _H100
    properties = torch.cuda.get_device_properties(device)
    return properties.multi_processor_count, properties.shared_memory_per_block_optin  # type: ignore[attr-defined]


def _width(H: int, dtype: torch.dtype) -> int:
    """E: how many elements a vector of H has in the kernels, which read 16 bytes at once."""
    at_once = 16 // dtype.itemsize
    return -(-H // at_once) * at_once


def _wide(t: Tensor, E: int) -> Tensor:
    """[..., E] contiguous from [..., H], with zeros past H, in memory that starts where 16 bytes can be read."""
    *sizes, H = t.shape
    if H != E:
        wide = t.new_zeros(*sizes, E)
        wide[..., :H] = t
        return wide
    t = t.contiguous()
    return t if t.data_ptr() % 16 == 0 else t.clone()


def _missing(t: Tensor) -> Tensor:
    """The same tensor, filled with what stands where a step has not been made: NaNs that no value is stored as."""
    t.view(torch.int32).fill_(-1)
    return t


@cache
def _status(device: torch.device) -> Tensor:
    """The word in which a kernel says that it has waited for too long."""
    with torch.inference_mode(False):
        return torch.zeros(1, dtype=torch.int32, device="cpu", pin_memory=device.type == "cuda")


class Steps(NamedTuple):
    """The loops over one op's steps, as `fastseq.ops.recurrent_steps.Steps` says.

    Attributes:
        cell: the op's.
        ops: gives what holds `recurrent_steps` and `recurrent_steps_backward`.
    """

    cell: Cell
    ops: Callable[[], Any] = native.cuda_ops

    def forward(self, layer: Layer, call: Forward) -> Tensor:
        if layer.w_hr is not None:
            return self._forward_projected(layer, call, layer.w_hr)
        h_n = call.h0.clone()
        y = call.y.view(layer.N, layer.D, layer.H)
        self._make_steps(layer, call, stacked(layer.w_hh), call.h0, call.reset_h, y, h_n)
        return h_n

    def _forward_projected(self, layer: Layer, call: Forward, w_hr: Tensor) -> Tensor:
        N, B, H, P = layer.N, layer.B, layer.H, layer.P
        # The share of h where no step is before: its state is m = 0, and the rest is among the pre-activations.
        for d, w_hh in enumerate(layer.w_hh):
            pre = call.pre[d, :, : w_hh.shape[0]]
            pre.index_add_(0, _end(layer, d == 1), call.h0[d] @ w_hh.t())
            if call.reset_h is not None:
                anew = (layer.origins[d] >= N + B).view(-1, B, 1)
                if d == 0:
                    anew[0] = False  # h0 tells of resets before the first step
                share = call.reset_h[d] @ w_hh.t()
                pre.unflatten(0, (-1, B)).add_(torch.where(anew, share, share.new_zeros(())))
        m, start = call.y.new_empty(N, layer.D, H), call.y.new_zeros(layer.D, B, H)
        self._make_steps(layer, call, _product(layer, w_hr), start, None, m, torch.empty_like(start))
        h_n = call.h0.clone()
        for d in range(layer.D):
            y = torch.mm(m[:, d], w_hr[d].t(), out=call.y[:, d * P : (d + 1) * P])
            last = y.index_select(0, _end(layer, d == 0))
            h_n[d] = last if layer.lengths is None else torch.where((layer.lengths > 0).unsqueeze(-1), last, h_n[d])
        return h_n

    def _make_steps(
        self, layer: Layer, call: Forward, weights: Tensor, h0: Tensor, reset_h: Tensor | None, y: Tensor, h_n: Tensor
    ) -> None:
        """Forward for states of H; y is [N, D, H]."""
        E = _width(layer.H, layer.dtype)
        is_y = E == layer.H
        self.ops().recurrent_steps(
            self.cell.name,
            call.pre,
            _wide(weights, E),
            call.inner_bias,
            _wide(h0, E),
            call.carry,
            _missing(y if is_y else y.new_empty(layer.N, layer.D, E)),
            None if is_y else y,
            h_n,
            call.cells,
            layer.reset,
            None if reset_h is None else _wide(reset_h, E),
            call.reset_carry,
            layer.lengths,
            layer.starts,
            self._sound_status(layer),
            layer.T,
            layer.B,
            call.save,
            *_surroundings(layer),
        )

    def backward(self, layer: Layer, call: Backward) -> None:
        if layer.w_hr is not None and call.dh_all is not None:
            self._backward_projected(layer, call, layer.w_hr, call.dh_all)
        else:
            self._make_steps_back(layer, call, stacked(layer.w_hh), call.dy, call.dh, call.dreset_h)

    def _backward_projected(self, layer: Layer, call: Backward, w_hr: Tensor, dh_all: Tensor) -> None:
        N, D, B, P = layer.N, layer.D, layer.B, layer.P
        dys = [None if call.dy is None else call.dy[:, d * P : (d + 1) * P] for d in range(D)]
        dm = None if call.dy is None else torch.stack([dy @ w for dy, w in zip(dys, w_hr, strict=True)], 1)
        dm_n = torch.bmm(call.dh, w_hr.float())
        dreset_m = None if call.dreset_h is None else torch.zeros_like(dm_n)
        self._make_steps_back(layer, call, _product(layer, w_hr), dm, dm_n, dreset_m)
        # What has reached each h_t, the initial states and what resets set them to, as `origins` counts them.
        rows = torch.arange(B, device=layer.device)
        for d, (w_hh, dy) in enumerate(zip(layer.w_hh, dys, strict=True)):
            through = (call.da[d] @ w_hh).float()
            reached = through.new_zeros(N + 2 * B, P)
            if dy is not None:
                reached[:N] = layer.running(dy)
            last = _end(layer, d == 0)
            if layer.lengths is not None:
                last = torch.where(layer.lengths > 0, last, N + rows)
            reached.index_add_(0, last, call.dh[d])
            reached.index_add_(0, layer.origins[d], through)
            dh_all[d], call.dh[d] = reached[:N], reached[N : N + B]
            if call.dreset_h is not None:
                anew = (layer.origins[d] >= N + B).unsqueeze(-1)
                call.dreset_h[d] = torch.where(anew, through, through.new_zeros(())).view(-1, B, P).sum(0)

    def _make_steps_back(
        self, layer: Layer, call: Backward, weights: Tensor, dy: Tensor | None, dh: Tensor, dreset_h: Tensor | None
    ) -> None:
        """Backward for states of H; dy is [N, D*H], dh and dreset_h are [D, B, H]."""
        N, D, H, G, E = layer.N, layer.D, layer.H, self.cell.gates, _width(layer.H, layer.dtype)
        by_unit = weights.view(D, G, H, H).permute(0, 3, 1, 2)
        is_da = E == H
        self.ops().recurrent_steps_backward(
            self.cell.name,
            _wide(by_unit, E).view(D, H, G * E),
            None if dy is None else dy.view(N, D, H),
            call.dcells,
            call.gates,
            call.before,
            call.after if self.cell.has_cell or call.after is None else call.after.view(N, D, H),
            _missing(call.da if is_da else call.da.new_empty(D, N, G * E)),
            None if is_da else call.da,
            dh,
            call.dc,
            dreset_h,
            call.dreset_c,
            layer.reset,
            layer.lengths,
            layer.starts,
            self._sound_status(layer),
            layer.T,
            layer.B,
            *_surroundings(layer),
        )

    def _sound_status(self, layer: Layer) -> Tensor:
        """The status word, if all is well.

        Raises:
            RuntimeError: an earlier launch has given up.
        """
        status = _status(layer.device)
        if status.item():
            status.zero_()
            raise RuntimeError(
                f"{self.cell.name}: a CUDA kernel that an earlier call has launched waited in vain for its other blocks"
                " and gave up; what it computed is NaN"
            )
        return status


def _surroundings(layer: Layer) -> tuple[bool, int]:
    """Whether float32 is multiplied as such, and the stream."""
    exact = layer.dtype == torch.float32 and not allows_tf32()
    return exact, torch.cuda.current_stream(layer.device).cuda_stream if layer.device.type == "cuda" else 0


def _product(layer: Layer, w_hr: Tensor) -> Tensor:
    """[D, G*H, H] W_hh W_hr, rounded once."""
    return torch.bmm(stacked(layer.w_hh).float(), w_hr.float()).to(layer.dtype)


def _end(layer: Layer, last: bool) -> Tensor:
    """[B] the place of each row at its last step in time, or at its first; at t=0 for a row without a step."""
    rows = torch.arange(layer.B, device=layer.device)
    if not last:
        return rows
    if layer.lengths is None:
        return (layer.T - 1) * layer.B + rows
    t = (layer.lengths - 1).clamp(min=0).long()
    return rows + (t * layer.B if layer.starts is None else layer.starts[t])


lstm, gru, rnn_tanh, rnn_relu = (implementation(Steps(CELLS[name])) for name in ("lstm", "gru", "rnn_tanh", "rnn_relu"))
