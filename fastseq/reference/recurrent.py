r"""What the references of all recurrent cells share: directions, lengths, packing and resets around a cell's step.

A cell gives `step`, from pre-activations and the state before to the state after and the tape, and `step_back`, its
gradient. A layer runs each direction over the steps of its input; direction 1 runs t from T-1 down to 0.

- Lengths: row b runs its first lengths[b] steps, backwards from its last. Past its end y is 0 and the state stays as
it is.
- Packed input [N, I] holds the rows that run at step 0, then those of step 1, ..., with batch_sizes[t] of them at
step t.
- Resets: where reset[t, b], the state is replaced by that of `reset_h` and `reset_c`, or zeros, before step t of
  direction 0. It cuts the sequence in two: direction 1 starts anew in front of step t-1 there.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

State = tuple[Tensor, ...]  # (h,) or (h, c)


class Cell(Protocol):
    """The formulas of one cell."""

    gates: int  # in w_ih and w_hh
    tape: int  # gates on the tape
    has_cell: bool

    def step(self, from_x: Tensor, from_h: Tensor, state: State) -> tuple[State, list[Tensor]]:
        """(h_t, c_t) before any projection, and the gates for the tape, from W_ih x_t + b_ih and W_hh h_{t-1} +
        b_hh."""

    def step_back(self, grads: State, tape: list[Tensor], before: State, after: State) -> tuple[Tensor, Tensor, State]:
        """Gradients of `from_x`, of `from_h` and of the state before, as far as it does not come through `from_h`.

        `grads` are those of `after`, the state that `step` gave.
        """


@dataclass
class Layer:
    """A call's arguments, padded, and how to get back to what the caller passed."""

    x: Tensor  # [T, B, I]
    lengths: Tensor | None  # [B]
    packed: Tensor | None  # [N] where each packed row is in [T*B]

    @property
    def shape(self) -> tuple[int, int]:
        return self.x.shape[0], self.x.shape[1]

    def runs(self, t: int) -> Tensor | None:
        """[B, 1] whether a row runs at step t, or None if all do."""
        return None if self.lengths is None else (self.lengths > t).unsqueeze(-1)

    def unpad(self, padded: Tensor) -> Tensor:
        """[T, B, F] as the caller has it."""
        return padded if self.packed is None else padded.flatten(0, 1)[self.packed]

    def pad(self, given: Tensor) -> Tensor:
        if self.packed is None:
            return given
        T, B = self.shape
        return given.new_zeros(T * B, given.shape[-1]).index_copy(0, self.packed, given).unflatten(0, (T, B))


def _padded(x: Tensor, batch_sizes: Tensor | None, lengths: Tensor | None) -> Layer:
    if batch_sizes is None:
        if lengths is None:
            return Layer(x, None, None)
        lengths = lengths.to(x.device)
        runs = (lengths > torch.arange(len(x), device=x.device).unsqueeze(-1)).unsqueeze(-1)
        return Layer(torch.where(runs, x, torch.zeros_like(x)), lengths, None)
    sizes = batch_sizes.tolist()
    places = torch.cat([torch.arange(n) + t * sizes[0] for t, n in enumerate(sizes)]).to(x.device)
    lengths = (batch_sizes.unsqueeze(-1) > torch.arange(sizes[0])).sum(0).to(x.device)
    layer = Layer(x.new_empty(len(sizes), sizes[0], 0), lengths, places)
    layer.x = layer.pad(x)
    return layer


def _sizes(cell: Cell, weights: list[Tensor], bidirectional: bool) -> tuple[int, int, int]:
    """D, H and P."""
    return 2 if bidirectional else 1, weights[0].shape[0] // cell.gates, weights[1].shape[1]


def _split_weights(weights: list[Tensor], directions: int) -> list[tuple[list[Tensor], Tensor | None]]:
    """For each direction [w_ih, w_hh, *biases] and w_hr."""
    count = len(weights) // directions
    parts = [list(weights[d * count : (d + 1) * count]) for d in range(directions)]
    return [(part[:-1], part[-1]) if count % 2 else (part, None) for part in parts]


def _starts_anew(reset: Tensor, d: int, t: int) -> Tensor | None:
    """[B, 1] where the state that goes into step t of a direction starts anew, or None for nowhere."""
    at = t + d
    return reset[at].unsqueeze(-1) if at < len(reset) else None


def _both(mask: Tensor, *others: Tensor | None) -> Tensor:
    for other in others:
        mask = mask if other is None else mask & other
    return mask


def _where(mask: Tensor | None, yes: State, no: State) -> State:
    return yes if mask is None else tuple(torch.where(mask, a, b) for a, b in zip(yes, no, strict=True))


def forward(
    cell: Cell,
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
    """See `fastseq.ops.recurrent`. Differentiable by autograd, any floating dtype, any device.

    Returns:
        y, h_n, c_n, gates and cells; what there is not is empty, as is the tape unless `save_tape`, except for cells if
        `save_cells`.
    """
    weights = [w.to(x.dtype) for w in weights]
    layer = _padded(x, batch_sizes, lengths)
    T, B = layer.shape
    D, H, P = _sizes(cell, weights, bidirectional)
    initial = _states(cell, x, (h0, c0), (D, B), (P, H))
    anew = _states(cell, x, (reset_h, reset_c), (D, B), (P, H))

    outputs, finals, gates, cells = [], [], [], []
    for d, ((w_ih, w_hh, *biases), w_hr) in enumerate(_split_weights(weights, D)):
        b_ih, b_hh = biases or (None, None)
        state = tuple(s[d] for s in initial)
        from_x = torch.nn.functional.linear(layer.x, w_ih, b_ih)
        zeros = x.new_zeros(B, P)
        y_d, gates_d, cells_d = [zeros] * T, [zeros] * T, [zeros] * T  # filled in the direction's order
        for t in range(T) if d == 0 else reversed(range(T)):
            runs = layer.runs(t)
            if reset is not None and (mask := _starts_anew(reset, d, t)) is not None:
                # Backwards in time, a row whose end is here is still at its initial state.
                state = _where(_both(mask, runs, layer.runs(t + d)), tuple(s[d] for s in anew), state)
            after, tape = cell.step(from_x[t], torch.nn.functional.linear(state[0], w_hh, b_hh), state)
            if w_hr is not None:
                after = (torch.nn.functional.linear(after[0], w_hr), *after[1:])
            y_d[t] = after[0] if runs is None else torch.where(runs, after[0], zeros)
            gates_d[t] = torch.cat(tape, -1) if save_tape and tape else zeros
            cells_d[t] = after[-1] if runs is None else torch.where(runs, after[-1], torch.zeros_like(after[-1]))
            state = _where(runs, after, state)
        outputs.append(torch.stack(y_d))
        finals.append(state)
        gates.append(layer.unpad(torch.stack(gates_d)).reshape(-1, gates_d[0].shape[-1]))
        cells.append(layer.unpad(torch.stack(cells_d)).reshape(-1, cells_d[0].shape[-1]))

    nothing = x.new_empty(0)
    h_n, c_n = (torch.stack([state[k] for state in finals]) if k < len(initial) else nothing for k in range(2))
    y = layer.unpad(torch.cat(outputs, -1))
    saved_gates = torch.stack(gates) if save_tape and cell.tape else nothing
    saved_cells = torch.stack(cells) if (save_tape or save_cells) and cell.has_cell else nothing
    return y, h_n, c_n, saved_gates, saved_cells


def backward(
    cell: Cell,
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
    """See `fastseq.ops.recurrent`.

    Returns:
        dx, dh0, dc0, dreset_h, dreset_c and the weights' gradients in their order; empty tensors for what is not
        needed.
    """
    layer = _padded(x, batch_sizes, lengths)
    T, B = layer.shape
    D, H, P = _sizes(cell, weights, bidirectional)
    initial = _states(cell, x, (h0, c0), (D, B), (P, H))
    anew = _states(cell, x, (reset_h, reset_c), (D, B), (P, H))
    final_grads = _states(cell, x, (dh_n, dc_n), (D, B), (P, H))
    y = layer.pad(y)
    dy = torch.zeros_like(y) if dy is None else layer.pad(dy)

    def steps(tape: Tensor, d: int) -> Tensor:
        return layer.pad(tape[d]) if layer.packed is not None else tape[d].unflatten(0, (T, B))

    dx = torch.zeros_like(layer.x, memory_format=torch.contiguous_format)
    dinitial: list[State] = []
    danew: list[State] = []
    dweights: list[Tensor] = []
    for d, ((w_ih, w_hh, *biases), w_hr) in enumerate(_split_weights(weights, D)):
        y_d, dy_d = y[..., d * P : (d + 1) * P], dy[..., d * P : (d + 1) * P]
        gates_d = steps(gates, d) if cell.tape else None
        cells_d = steps(cells, d) if cell.has_cell else None
        dcells_d = steps(dcells, d) if dcells is not None and cell.has_cell else None
        dstate = tuple(s[d] for s in final_grads)
        reset_grads = tuple(torch.zeros_like(s[d]) for s in anew)
        dw = [torch.zeros_like(w) for w in (w_ih, w_hh, *biases)]
        dw_hr = torch.zeros_like(w_hh if w_hr is None else w_hr)
        order = list(range(T)) if d == 0 else list(reversed(range(T)))
        for s in reversed(range(T)):
            t = order[s]
            runs = layer.runs(t)
            running = x.new_ones(B, 1) if runs is None else runs.to(x.dtype)
            # The state before: of the step before if the row ran there, else where it starts.
            before = tuple(i[d] for i in initial)
            if s > 0:
                earlier = order[s - 1]
                last = (y_d[earlier], *([cells_d[earlier]] if cells_d is not None else []))
                before = _where(layer.runs(earlier), last, before)
            mask = None if reset is None else _starts_anew(reset, d, t)
            if mask is not None:
                mask = _both(mask, runs, layer.runs(t + d))
                before = _where(mask, tuple(a[d] for a in anew), before)

            grads = (dstate[0] + dy_d[t], *dstate[1:])
            if dcells_d is not None:
                grads = (grads[0], grads[1] + dcells_d[t])
            tape = [] if gates_d is None else list(gates_d[t].chunk(cell.tape, -1))
            tape, grads, before = list(_only(runs, tuple(tape))), _only(runs, grads), _only(runs, before)
            after = _only(runs, (y_d[t], *([cells_d[t]] if cells_d is not None else [])))
            if w_hr is not None:
                dw_hr += grads[0].t() @ (tape[-1] * after[1].tanh())  # only the LSTM has a projection
                grads = (grads[0] @ w_hr, *grads[1:])
            da_x, da_h, passed_on = cell.step_back(grads, tape, before, after)
            da_x, da_h = da_x * running, da_h * running
            dx[t] += da_x @ w_ih
            updates = [da_x.t() @ layer.x[t], da_h.t() @ before[0], da_x.sum(0), da_h.sum(0)]
            dw = [total + update for total, update in zip(dw, updates, strict=False)]
            through = (da_h @ w_hh, *[torch.zeros_like(p) for p in passed_on[1:]])
            if w_hr is not None:
                passed_on = (torch.zeros_like(through[0]), *passed_on[1:])
            going = tuple(a + b for a, b in zip(through, passed_on, strict=True))
            if mask is not None:
                reset_grads = tuple(
                    total + torch.where(mask, g, torch.zeros_like(g))
                    for total, g in zip(reset_grads, going, strict=True)
                )
                going = tuple(torch.where(mask, torch.zeros_like(g), g) for g in going)
            dstate = _where(runs, going, dstate)
        dinitial.append(dstate)
        danew.append(reset_grads)
        dweights += dw if w_hr is None else [*dw, dw_hr]

    nothing = x.new_empty(0)

    def stacked(states: list[State], k: int, wanted: bool) -> Tensor:
        return torch.stack([s[k] for s in states]) if wanted and k < len(initial) else nothing

    state, reset_state = needs[1] or needs[2], (needs[3] or needs[4]) and reset is not None
    return (
        layer.unpad(dx) if needs[0] else nothing,
        stacked(dinitial, 0, state),
        stacked(dinitial, 1, state),
        stacked(danew, 0, reset_state),
        stacked(danew, 1, reset_state),
        [g if need else nothing for g, need in zip(dweights, needs[5:], strict=True)],
    )


def _states(
    cell: Cell, x: Tensor, given: tuple[Tensor | None, Tensor | None], rows: tuple[int, int], widths: tuple[int, int]
) -> State:
    """(h, c), or (h,) where there is no c, with zeros for what is None."""
    both = [x.new_zeros(*rows, width) if s is None else s for s, width in zip(given, widths, strict=True)]
    return tuple(both if cell.has_cell else both[:1])


def _only(runs: Tensor | None, tensors: State) -> State:
    """The tensors with zeros in the rows that do not run: whatever stands there takes no part."""
    return tensors if runs is None else tuple(torch.where(runs, t, torch.zeros_like(t)) for t in tensors)
