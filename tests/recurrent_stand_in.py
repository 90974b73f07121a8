"""What csrc/cuda/recurrent.h asks of the recurrent kernels, in plain PyTorch: the two ops that the kernels are behind.

A step at a time, it reads and writes where the kernels do, and complains where they would wait for ever.
"""

import torch
from torch import Tensor

GATES = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}
SLOTS = {"lstm": 4, "gru": 4, "rnn_tanh": 1, "rnn_relu": 1}  # A
TAPE = {"lstm": 4, "gru": 4, "rnn_tanh": 0, "rnn_relu": 0}


def recurrent_steps(
    cell: str,
    pre: Tensor,
    weights: Tensor,
    inner_bias: Tensor | None,
    h0: Tensor,
    carry: Tensor | None,
    exchange: Tensor,
    y: Tensor | None,
    h_n: Tensor,
    cells: Tensor | None,
    reset: Tensor | None,
    reset_h: Tensor | None,
    reset_carry: Tensor | None,
    lengths: Tensor | None,
    starts: Tensor | None,
    status: Tensor,
    T: int,
    B: int,
    save: bool,
    exact: bool,
    stream: int,
) -> None:
    dtype, (D, N, pre_width), H, G = pre.dtype, pre.shape, h_n.shape[-1], GATES[cell]
    E = _width(H, dtype)
    _expect(pre, dtype, D, N, max(G, TAPE[cell]) * H if save else pre_width)
    _expect(weights, dtype, D, G * H, E, zeros_past=H)
    _expect(inner_bias, dtype, D, H)
    _expect(h0, dtype, D, B, E, zeros_past=H)
    _expect(carry, torch.float32, D, B, H)
    _expect(exchange, dtype, N, D, E)
    _expect(y, dtype, N, D, H)
    _expect(h_n, dtype, D, B, H)
    _expect(cells, dtype, D, N, H)
    _expect(reset_h, dtype, D, B, E, zeros_past=H)
    _expect(reset_carry, dtype, D, B, H)
    _expect_options(reset, lengths, starts, status, T, B)
    assert (carry is None) == (cell not in ("lstm", "gru")) and (cells is None or cell == "lstm")
    assert _is_missing(exchange).all()

    for d, s in ((d, s) for d in range(D) for s in range(T)):
        t = s if d == 0 else T - 1 - s
        rows, place = _rows_at(t, lengths, starts, T, B)
        state = _states_before(t, d, rows, h0, exchange, reset, reset_h, lengths, starts, T)
        own = None
        if carry is not None:
            own = carry[d, rows]
            anew = _anew(t, d, rows, reset, lengths, T)
            set_to = torch.zeros_like(own) if reset_carry is None else reset_carry[d, rows].float()
            own = torch.where(anew.unsqueeze(-1), set_to, own)
        from_x = list(pre[d, place, : G * H].float().split(H, -1))
        from_h = list((state[:, :H].float() @ weights[d, :, :H].float().t()).split(H, -1))
        if inner_bias is not None:
            from_h[-1] = from_h[-1] + inner_bias[d].float()
        h, own, tape = _step(cell, from_x, from_h, own)
        if y is not None:
            _store(y[:, d], place, h, t, starts, B)
        if cells is not None:
            _store(cells[d], place, own, t, starts, B)
        _store(exchange[:, d], place, _exchanged(h, E), t, starts, B)
        if carry is not None:
            carry[d, rows] = own
        if save:
            pre[d, place, : len(tape) * H] = torch.cat(tape, -1).to(dtype)
        h_n[d, rows] = h.to(dtype)


def recurrent_steps_backward(
    cell: str,
    weights: Tensor,
    dy: Tensor | None,
    dcells: Tensor | None,
    gates: Tensor | None,
    before: Tensor | None,
    after: Tensor | None,
    exchange: Tensor,
    da: Tensor | None,
    dh: Tensor,
    dc: Tensor | None,
    dreset_h: Tensor | None,
    dreset_c: Tensor | None,
    reset: Tensor | None,
    lengths: Tensor | None,
    starts: Tensor | None,
    status: Tensor,
    T: int,
    B: int,
    exact: bool,
    stream: int,
) -> None:
    dtype, (D, N, _), H = exchange.dtype, exchange.shape, dh.shape[-1]
    G, A, E = GATES[cell], SLOTS[cell], _width(H, dtype)
    _expect(weights.view(D, H, G, E), dtype, D, H, G, E, zeros_past=H)
    _expect(dy, dtype, N, D, H)
    _expect(dcells, dtype, D, N, H)
    _expect(gates, dtype, D, N, TAPE[cell] * H)
    _expect(before, dtype, D, N, H)
    _expect(after, dtype, *((D, N, H) if cell == "lstm" else (N, D, H)))
    _expect(exchange, dtype, D, N, A * H if da is None else G * E)
    _expect(da, dtype, D, N, A * H)
    for state in (dh, dc, dreset_h, dreset_c):
        _expect(state, torch.float32, D, B, H)
    _expect_options(reset, lengths, starts, status, T, B)
    assert da is not None or E == H
    assert (dc is not None) == (cell == "lstm") and (reset is None) == (dreset_h is None)
    assert _is_missing(exchange).all()

    for d, s in ((d, s) for d in range(D) for s in range(T - 1, -2, -1)):
        t = s if d == 0 else T - 1 - s
        later = t + 1 - 2 * d
        if 0 <= later < T:
            rows, place = _rows_at(later, lengths, starts, T, B)
            of_later = exchange[d, place, : G * E]
            assert not _is_missing(of_later).any()
            dh[d, rows] += of_later.float() @ weights[d].float().t()
            anew = rows[_anew(later, d, rows, reset, lengths, T, at_first=True)]
            for grad, dreset in ((dh, dreset_h), (dc, dreset_c)):
                if grad is not None and dreset is not None:
                    dreset[d, anew] += grad[d, anew]
                    grad[d, anew] = 0
        if s < 0:
            continue
        rows, place = _rows_at(t, lengths, starts, T, B)

        def at(of: Tensor | None, place: Tensor = place) -> Tensor:
            return torch.zeros(len(place), H) if of is None else of[place].float()

        tape = [] if gates is None else gates[d, place].float().split(H, -1)
        dh_t = dh[d, rows] + at(None if dy is None else dy[:, d])
        dc_t = None if dc is None else dc[d, rows] + at(None if dcells is None else dcells[d])
        own = at(None if before is None else before[d])
        result = at(None if after is None else after[d] if cell == "lstm" else after[:, d])
        grads, dh_before, dc_before = _step_back(cell, dh_t, dc_t, tape, own, result)
        dh[d, rows] = dh_before
        if dc is not None:
            dc[d, rows] = dc_before
        exchanged = [_exchanged(grad, E) for grad in grads[: A if da is None else G]]
        _store(exchange[d], place, torch.cat(exchanged, -1), t, starts, B)
        if da is not None:
            _store(da[d], place, torch.cat(grads, -1), t, starts, B)


def _step(cell: str, x: list[Tensor], h: list[Tensor], own: Tensor | None) -> tuple[Tensor, Tensor, list[Tensor]]:
    """What a step gives: h, what the unit carries on, and the tape."""
    if cell == "lstm":
        i, f, g, o = (x[0] + h[0]).sigmoid(), (x[1] + h[1]).sigmoid(), (x[2] + h[2]).tanh(), (x[3] + h[3]).sigmoid()
        c = f * own + i * g
        return o * c.tanh(), c, [i, f, g, o]
    if cell == "gru":
        r, z = (x[0] + h[0]).sigmoid(), (x[1] + h[1]).sigmoid()
        n = (x[2] + r * h[2]).tanh()
        new = (1 - z) * n + z * own
        return new, new, [r, z, n, h[2]]
    a = x[0] + h[0]
    new = a.tanh() if cell == "rnn_tanh" else a.relu()
    return new, new, []


def _step_back(
    cell: str, dh: Tensor, dc: Tensor | None, tape: list[Tensor], before: Tensor, after: Tensor
) -> tuple[list[Tensor], Tensor, Tensor | None]:
    """The gradients of the pre-activations, and what goes on to the step before other than through W_hh."""
    nothing = torch.zeros_like(dh)
    if cell == "lstm":
        i, f, g, o = tape
        s = after.tanh()
        dc = dc + dh * o * (1 - s * s)
        grads = [dc * g * i * (1 - i), dc * before * f * (1 - f), dc * i * (1 - g * g), dh * s * o * (1 - o)]
        return grads, nothing, dc * f
    if cell == "gru":
        r, z, n, u = tape
        dn = dh * (1 - z) * (1 - n * n)
        return [dn * u * r * (1 - r), dh * (before - n) * z * (1 - z), dn * r, dn], dh * z, None
    da = dh * (1 - after * after) if cell == "rnn_tanh" else torch.where(after <= 0, 0.0, dh)
    return [da], nothing, None


def _rows_at(t: int, lengths: Tensor | None, starts: Tensor | None, T: int, B: int) -> tuple[Tensor, Tensor]:
    """The rows that run at step t, and their places among the N rows of all steps."""
    rows = torch.arange(B) if lengths is None else (lengths > t).nonzero().squeeze(-1)
    return rows, rows + (t * B if starts is None else int(starts[t]))


def _states_before(
    t: int,
    d: int,
    rows: Tensor,
    h0: Tensor,
    exchange: Tensor,
    reset: Tensor | None,
    reset_h: Tensor | None,
    lengths: Tensor | None,
    starts: Tensor | None,
    T: int,
) -> Tensor:
    """[rows, E] what step t of these rows starts from: what is given, or what the step before it has left."""
    earlier = t - 1 + 2 * d
    state = h0[d, rows].clone()
    if not 0 <= earlier < T:
        return state
    anew = _anew(t, d, rows, reset, lengths, T)
    state[anew] = 0 if reset_h is None else reset_h[d, rows[anew]]
    ran = (torch.ones_like(anew) if lengths is None else earlier < lengths[rows]) & ~anew
    left = exchange[rows[ran] + (earlier * h0.shape[1] if starts is None else int(starts[earlier])), d]
    assert not _is_missing(left).any()
    state[ran] = left
    return state


def _anew(
    t: int, d: int, rows: Tensor, reset: Tensor | None, lengths: Tensor | None, T: int, at_first: bool = False
) -> Tensor:
    """[rows] whether the state starts anew between step t of direction d and the one before it.

    Before a row's first step forward what is given tells of it, and only backward counts it.
    """
    at, earlier = t + d, t - 1 + 2 * d  # a reset before step t' cuts between t'-1 and t', for both directions
    if reset is None or at >= T or (not at_first and not 0 <= earlier < T):
        return torch.zeros(len(rows), dtype=torch.bool)
    return reset[at, rows].bool() & (True if lengths is None else at < lengths[rows])


def _store(to: Tensor, place: Tensor, values: Tensor, t: int, starts: Tensor | None, B: int) -> None:
    """Zeros where rows do not run, if they have a place."""
    if starts is None:
        to[t * B : (t + 1) * B] = 0
    to[place] = values.to(to.dtype)


def _exchanged(values: Tensor, E: int) -> Tensor:
    """[rows, E] with zeros past H; a NaN among them is one that does not stand for what is missing."""
    return torch.nn.functional.pad(values.masked_fill(values.isnan(), float("nan")), (0, E - values.shape[-1]))


def _width(H: int, dtype: torch.dtype) -> int:
    return -(-H * dtype.itemsize // 16) * 16 // dtype.itemsize


def _is_missing(t: Tensor) -> Tensor:
    return t.contiguous().view(torch.int32) == -1


def _expect(t: Tensor | None, dtype: torch.dtype, *shape: int, zeros_past: int | None = None) -> None:
    if t is None:
        return
    assert t.dtype == dtype and t.shape == shape and t.is_contiguous(), (t.dtype, t.shape, dtype, shape)
    if zeros_past is not None:
        assert t.data_ptr() % 16 == 0 and not t[..., zeros_past:].any()


def _expect_options(
    reset: Tensor | None, lengths: Tensor | None, starts: Tensor | None, status: Tensor, T: int, B: int
) -> None:
    _expect(reset, torch.uint8, T, B)
    _expect(lengths, torch.int32, B)
    _expect(starts, torch.int64, T)
    _expect(status, torch.int32, 1)
    assert status.device.type == "cpu"
