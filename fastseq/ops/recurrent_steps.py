"""A recurrent layer on a GPU but for the loop over its steps: the products over all steps before it and after it.

The loop is a runtime's: `Steps` is what it gives, `implementation` makes the op of it.
"""

from collections.abc import Callable
from contextlib import nullcontext
from functools import cached_property, partial, wraps
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor


class Cell(NamedTuple):
    """What sets one op apart."""

    name: str
    gates: int  # G
    tape: int  # vectors of H a step on the tape
    has_cell: bool
    carries: bool  # whether a unit carries a state of its own in float32: c, or an h that it needs beside W_hh h
    inner_bias: bool  # whether the last gate of b_hh stays with W_hh h, which another gate multiplies

    @property
    def slots(self) -> int:
        """A: the vectors of H a step that are gradients of pre-activations, those that W_hh h has a share in first."""
        return self.tape or self.gates


CELLS = {
    cell.name: cell
    for cell in (
        Cell("lstm", gates=4, tape=4, has_cell=True, carries=True, inner_bias=False),
        Cell("gru", gates=3, tape=4, has_cell=False, carries=True, inner_bias=True),
        Cell("rnn_tanh", gates=1, tape=0, has_cell=False, carries=False, inner_bias=False),
        Cell("rnn_relu", gates=1, tape=0, has_cell=False, carries=False, inner_bias=False),
    )
}


def allows_tf32() -> bool:
    """Whether torch's own layers may multiply float32 as TF32 on a GPU, which they do unless told otherwise."""
    return torch.backends.cudnn.rnn.fp32_precision == "tf32"  # type: ignore[attr-defined]


def stacked(tensors: list[Tensor]) -> Tensor:
    """[D, ...] contiguous; without a copy if there is one."""
    return tensors[0].unsqueeze(0).contiguous() if len(tensors) == 1 else torch.stack(tensors)


def _contiguous(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous()


class Layer:
    """A call's arguments as the loops take them.

    Attributes:
        x: [N, I], the rows of all steps: T*B of them, or as packed.
        w_ih, w_hh, biases: of each direction; biases are [b_ih, b_hh] or [].
        w_hr: [D, P, H] or None.
        starts: [T] int64, where each step's rows start if packed.
        lengths: [B] int32, how many steps each row runs if not all do.
        reset: [T, B] uint8.
    """

    def __init__(
        self,
        cell: Cell,
        x: Tensor,
        weights: list[Tensor],
        bidirectional: bool,
        batch_sizes: Tensor | None,
        lengths: Tensor | None,
        reset: Tensor | None,
    ) -> None:
        self.device, self.dtype = x.device, x.dtype
        self.D = 2 if bidirectional else 1
        count = len(weights) // self.D
        parts = [[w.to(x.dtype) for w in weights[d * count : (d + 1) * count]] for d in range(self.D)]
        self.w_ih, self.w_hh = ([part[k] for part in parts] for k in range(2))
        self.biases = [part[2:4] if count >= 4 else [] for part in parts]
        self.w_hr = stacked([part[-1] for part in parts]) if count % 2 else None
        self.H, self.P = self.w_ih[0].shape[0] // cell.gates, self.w_hh[0].shape[1]
        self.starts = self.lengths = None
        if batch_sizes is None:
            self.T, self.B = x.shape[:2]
            if lengths is not None:
                # Unchecked where the call is compiled; a loop that trusts one too long would leave its tensors.
                if lengths.device.type == "cpu" and self.B and not 0 <= lengths.min() <= lengths.max() <= self.T:
                    raise ValueError(
                        f"{cell.name}: lengths must be between 0 and T={self.T}, got {lengths.min()} to {lengths.max()}"
                    )
                self.lengths = lengths.to(self.device, torch.int32)
        else:
            self.T, self.B = len(batch_sizes), int(batch_sizes[0])
            self.starts = (batch_sizes.cumsum(0) - batch_sizes).to(self.device)
            steps = (batch_sizes.unsqueeze(-1) > torch.arange(self.B)).sum(0)
            self.lengths = steps.to(self.device, torch.int32)
        self.x = x.reshape(-1, x.shape[-1])
        self.N = self.x.shape[0]
        self.reset = None if reset is None else reset.contiguous().view(torch.uint8)

    def states(self, given: Tensor | None, width: int, dtype: torch.dtype) -> Tensor:
        """A [D, B, width] of what is given or zeros, for loops to change."""
        if given is None:
            return self.x.new_zeros(self.D, self.B, width, dtype=dtype)
        return torch.empty(given.shape, dtype=dtype, device=self.device).copy_(given)

    def initial(self, given: Tensor | None, anew: Tensor | None, width: int, dtype: torch.dtype) -> Tensor:
        """The states that the first steps start from, which for direction 0 a reset before step 0 sets."""
        state = self.states(given, width, dtype)
        if self.reset is not None:
            mask = self.reset[0].bool()
            if self.lengths is not None:
                mask = mask & (self.lengths > 0)
            set_to = state.new_zeros(()) if anew is None else anew[0].to(dtype)
            state[0] = torch.where(mask.unsqueeze(-1), set_to, state[0])
        return state

    def before(self, d: int, after: Tensor, initial: Tensor | None, anew: Tensor | None) -> Tensor:
        """[N, F] the states before the steps of direction d, from [N, F] those after them."""
        first, set_to = (after.new_zeros(self.B, after.shape[-1]) if s is None else s[d] for s in (initial, anew))
        if self.lengths is None and self.reset is None:
            return torch.cat([first, after[: -self.B]] if d == 0 else [after[self.B :], first])
        return torch.cat([after, first, set_to]).index_select(0, self.origins[d])

    @cached_property
    def origins(self) -> list[Tensor]:
        """For each direction [N], where each step's state before is among those after steps, initial, and reset."""
        T, B, N = self.T, self.B, self.N
        if self.starts is None:
            step = torch.arange(T, device=self.device).repeat_interleave(B)
            starts = torch.arange(T, device=self.device) * B
        else:
            sizes = torch.diff(self.starts, append=self.starts.new_tensor([N]))
            step = torch.arange(T, device=self.device).repeat_interleave(sizes, output_size=N)
            starts = self.starts
        row = torch.arange(N, device=self.device) - starts[step]
        runs = T if self.lengths is None else self.lengths[row]
        found = []
        for d in range(self.D):
            earlier = step - 1 + 2 * d
            ran = (earlier >= 0) & (earlier < runs) & (earlier < T)
            place = torch.where(ran, starts[earlier.clamp(0, T - 1)] + row, N + row)
            if self.reset is not None:
                at = step + d
                anew = (at < runs) & (at < T) & self.reset[at.clamp(max=T - 1), row].bool()
                place = torch.where(anew, N + B + row, place)
            found.append(place)
        return found

    def running(self, values: Tensor) -> Tensor:
        """[N, F] with zeros in the rows that do not run: whatever stands there takes no part."""
        if self.lengths is None or self.starts is not None:
            return values
        runs = self.lengths > torch.arange(self.T, device=self.device).unsqueeze(-1)
        return torch.where(runs.view(-1, 1), values, values.new_zeros(()))


class Forward(NamedTuple):
    """What the loop forward works on; tensors are contiguous, in x's dtype unless it says otherwise.

    Rows that do not run have zeros in y and cells, where there is a place for them. Nobody reads `pre` there.
    """

    pre: Tensor  # [D, N, F] W_ih x_t + b in the first G*H, whose place the tape takes if it is saved
    save: bool  # whether it is
    inner_bias: Tensor | None  # [D, H] the bias that stays with the last gate's W_hh h
    h0: Tensor  # [D, B, P] what the first steps start from, resets before them included; the loop may change it
    carry: Tensor | None  # [D, B, H] float32, likewise of what units carry: replaced by that after each row's last step
    y: Tensor  # [N, D*P]
    cells: Tensor | None  # [D, N, H]
    reset_h: Tensor | None  # [D, B, P] what resets later on set the state to, or None for zeros
    reset_carry: Tensor | None  # [D, B, H]


class Backward(NamedTuple):
    """What the loop backward works on; tensors are contiguous, in x's dtype unless it says otherwise.

    Rows that do not run have zeros in da and dh_all, where there is a place for them.
    """

    dy: Tensor | None  # [N, D*P] or None for zeros
    dcells: Tensor | None  # [D, N, H]
    gates: Tensor | None  # [D, N, tape*H]
    before: Tensor | None  # [D, N, H] what units carried before each step
    after: Tensor | None  # [D, N, H] c after each step; [N, D*H] y in a cell that carries nothing
    da: Tensor  # [D, N, A*H] the gradients of the pre-activations
    dh_all: Tensor | None  # [D, N, P] all that reaches each h_t, if there is a projection
    dh: Tensor  # [D, B, P] float32, of h_n: replaced by that of h0
    dc: Tensor | None  # [D, B, H] float32, likewise
    dreset_h: Tensor | None  # [D, B, P] float32 zeros to add to, if there are resets
    dreset_c: Tensor | None  # [D, B, H]


class Steps(Protocol):
    """The loops over a layer's steps, for at least one row."""

    @property
    def cell(self) -> Cell: ...

    def forward(self, layer: Layer, call: Forward) -> Tensor:
        """Makes all steps. Returns h_n [D, B, P], in memory that is nobody else's."""

    def backward(self, layer: Layer, call: Backward) -> None:
        """Takes the gradients through all steps."""


class Implementation(NamedTuple):
    """Both directions of an op; `fastseq.ops.recurrent` has their signatures."""

    forward: Callable[..., Any]
    backward: Callable[..., Any]


def implementation(steps: Steps) -> Implementation:
    """The op that has these loops."""
    return Implementation(partial(_forward, steps), partial(_backward, steps))


def _as_written(direction: Callable[..., Any]) -> Callable[..., Any]:
    """One that records no graph, and whose products no autocast around it lowers: what they meet has x's dtype."""

    @wraps(direction)
    def compute(steps: Steps, *args: Any) -> Any:
        device = next(arg.device for arg in args if isinstance(arg, Tensor))
        lowers = torch._C._is_any_autocast_enabled()
        with torch.no_grad(), torch.autocast(device.type, enabled=False) if lowers else nullcontext():
            return direction(steps, *args)

    return compute


@_as_written
def _forward(
    steps: Steps,
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: list[Tensor],
    bidirectional: bool,
    save_tape: bool,
    save_cells: bool = False,
    batch_sizes: Tensor | None = None,
    lengths: Tensor | None = None,
    reset: Tensor | None = None,
    reset_h: Tensor | None = None,
    reset_c: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    cell = steps.cell
    layer = Layer(cell, x, weights, bidirectional, batch_sizes, lengths, reset)
    N, H, P, D, G = layer.N, layer.H, layer.P, layer.D, cell.gates
    save = save_tape and cell.tape > 0
    pre = x.new_empty(D, N, (cell.tape if save else G) * H)
    for d, w_ih in enumerate(layer.w_ih):
        out = pre[d, :, : G * H]
        if not layer.biases[d]:
            torch.mm(layer.x, w_ih.t(), out=out)
            continue
        b_ih, b_hh = layer.biases[d]
        bias = b_ih + b_hh
        if cell.inner_bias:
            bias[-H:] = b_ih[-H:]
        torch.addmm(bias, layer.x, w_ih.t(), out=out)
    inner = stacked([b_hh[-H:] for _, b_hh in layer.biases]) if cell.inner_bias and layer.biases[0] else None

    own, own_anew = (c0, reset_c) if cell.has_cell else (h0, reset_h)
    y = x.new_empty(*x.shape[:-1], D * P)
    call = Forward(
        pre=pre,
        save=save,
        inner_bias=inner,
        h0=layer.initial(h0, reset_h, P, x.dtype),
        carry=layer.initial(own, own_anew, H, torch.float32) if cell.carries else None,
        y=y.view(N, D * P),
        cells=x.new_empty(D, N, H) if (save_tape or save_cells) and cell.has_cell else None,
        reset_h=_contiguous(reset_h),
        reset_carry=_contiguous(own_anew) if cell.carries else None,
    )
    h_n = steps.forward(layer, call) if layer.B > 0 else call.h0
    nothing = x.new_empty(0)
    return (
        y,
        h_n,
        call.carry.to(x.dtype) if cell.has_cell and call.carry is not None else nothing,
        pre if save else nothing,
        nothing if call.cells is None else call.cells,
    )


@_as_written
def _backward(
    steps: Steps,
    dy: Tensor | None,
    dh_n: Tensor | None,
    dc_n: Tensor | None,
    dcells: Tensor | None,
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: list[Tensor],
    bidirectional: bool,
    batch_sizes: Tensor | None,
    lengths: Tensor | None,
    reset: Tensor | None,
    reset_h: Tensor | None,
    reset_c: Tensor | None,
    y: Tensor,
    gates: Tensor,
    cells: Tensor,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, list[Tensor]]:
    cell = steps.cell
    layer = Layer(cell, x, weights, bidirectional, batch_sizes, lengths, reset)
    N, H, P, D, G, A = layer.N, layer.H, layer.P, layer.D, cell.gates, cell.slots
    y = y.reshape(N, D * P)
    h_before = [layer.before(d, y[:, d * P : (d + 1) * P], h0, reset_h) for d in range(D)]
    before: Tensor | None
    after: Tensor | None
    if cell.has_cell:
        before = torch.stack([layer.before(d, cells[d], c0, reset_c) for d in range(D)])
        after = cells.contiguous()
    else:
        before = stacked(h_before) if cell.carries else None
        after = None if cell.carries else y.contiguous()
    dh = layer.states(dh_n, P, torch.float32)
    dc = layer.states(dc_n, H, torch.float32) if cell.has_cell else None
    anew = reset is not None
    call = Backward(
        dy=None if dy is None else dy.contiguous().view(N, D * P),
        dcells=_contiguous(dcells) if cell.has_cell else None,
        gates=gates.contiguous() if cell.tape else None,
        before=before,
        after=after,
        da=x.new_empty(D, N, A * H),
        dh_all=None if layer.w_hr is None else x.new_empty(D, N, P),
        dh=dh,
        dc=dc,
        dreset_h=torch.zeros_like(dh) if anew else None,
        dreset_c=torch.zeros_like(dc) if anew and dc is not None else None,
    )
    if layer.B > 0:
        steps.backward(layer, call)

    # Where the last gate's share of W_hh h is multiplied, its gradient stands before the pre-activation's own.
    spans = [(slice(0, G * H), slice(0, G * H))]
    if cell.inner_bias:
        spans = [(slice(0, (G - 1) * H), slice(0, (G - 1) * H)), (slice((G - 1) * H, G * H), slice(G * H, A * H))]
    nothing = x.new_empty(0)
    dx = nothing
    if needs[0]:
        dx = x.new_zeros(N, x.shape[-1])
        for d, w_ih in enumerate(layer.w_ih):
            for of_w, of_da in spans:
                dx.addmm_(call.da[d, :, of_da], w_ih[of_w])
        dx = dx.view(x.shape)
    dweights: list[Tensor] = []
    wanted = iter(needs[5:])
    rows = layer.running(layer.x) if any(needs[5:]) else layer.x
    for d in range(D):
        da = call.da[d]
        da_h = da[:, : G * H]
        if next(wanted):
            dw_ih = torch.empty_like(layer.w_ih[d], memory_format=torch.contiguous_format)
            for of_w, of_da in spans:
                torch.mm(da[:, of_da].t(), rows, out=dw_ih[of_w])
        else:
            dw_ih = nothing
        dweights += [dw_ih, da_h.t() @ layer.running(h_before[d]) if next(wanted) else nothing]
        if layer.biases[d]:
            ours = torch.cat([da[:, of_da].sum(0) for _, of_da in spans]) if next(wanted) else nothing
            dweights += [ours, da_h.sum(0) if next(wanted) else nothing]
        if call.dh_all is not None:
            m = gates[d, :, -H:] * cells[d].tanh()  # only the LSTM has a projection
            dweights += [call.dh_all[d].t() @ layer.running(m) if next(wanted) else nothing]

    state, reset_state = needs[1] or needs[2], (needs[3] or needs[4]) and anew

    def given(grad: Tensor | None, needed: bool) -> Tensor:
        return grad.to(x.dtype) if grad is not None and needed else nothing

    return (
        dx,
        given(call.dh, state),
        given(call.dc, state),
        given(call.dreset_h, reset_state),
        given(call.dreset_c, reset_state),
        dweights,
    )
