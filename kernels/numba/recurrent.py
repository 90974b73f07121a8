"""A recurrent op, for any cell: torch's products over all steps, and the kernels of the recurrence between them."""

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastseq.kernels.numba import team
from fastseq.kernels.numba.recurrent_kernel import (
    MOST_ROWS,
    PACK,
    Backward,
    Forward,
    Pack,
    backward_kernel,
    forward_kernel,
    panels_at_once,
)
from fastseq.kernels.numba.tensors import ceil_div, cut, empty, expect, in_panels, panel_of
from fastseq.ops.linear import linear
from fastseq.ops.recurrent import Arguments
from fastseq.ops.recurrent import Recurrent as Contract

# Multiply-adds that pay for a member of the team, and for its barrier at every step; elements of a lone step.
_WORK_PER_MEMBER, _WORK_PER_BARRIER, _ELEMENTS_PER_MEMBER = 192 * 1024, 4 * 1024, 16 * 1024
_MOST_SHAPES = 4096  # of arguments that are known to be sound


class _Rows(NamedTuple):
    """Which rows run at which step, and the input's."""

    T: int
    B: int
    N: int  # rows of y
    x: Tensor  # [running rows, I], contiguous
    packed: bool
    before: Tensor | None
    order: Tensor | None
    running: Tensor | None  # the places of the running rows among all, or None where they are all

    def spread(self, running: Tensor, shape: Sequence[int]) -> Tensor:
        """Running rows at their places, zeros elsewhere."""
        if self.running is None:
            return running.view(shape)
        return running.new_zeros(self.N, running.shape[-1]).index_copy_(0, self.running, running).view(shape)


def _rows(x: Tensor, batch_sizes: Tensor | None, lengths: Tensor | None) -> _Rows:
    if batch_sizes is not None:
        T, B = len(batch_sizes), int(batch_sizes[0])
        if batch_sizes[-1] <= 0 or (batch_sizes.diff() > 0).any() or batch_sizes.sum() != len(x):
            raise ValueError(
                f"batch_sizes must be positive, not rise, and add up to x's {len(x)} rows, got {batch_sizes.tolist()}"
            )
        before = None
        if batch_sizes[-1] != B:
            before = torch.cat([batch_sizes.new_zeros(1), batch_sizes.cumsum(0)])
        return _Rows(T, B, len(x), x.contiguous(), True, before, None, None)
    T, B, I = x.shape
    if lengths is not None and B > 0 and not 0 <= lengths.min() <= lengths.max() <= T:
        raise ValueError(f"lengths must be between 0 and T={T}, got {lengths.tolist()}")
    if lengths is None or bool((lengths == T).all()):
        return _Rows(T, B, T * B, x.reshape(T * B, I), False, None, None, None)
    order = lengths.argsort(descending=True, stable=True)
    runs = lengths[order] > torch.arange(T).unsqueeze(-1)  # [T, B]
    before = torch.cat([lengths.new_zeros(1), runs.sum(-1).cumsum(0)])
    running = (torch.arange(T).unsqueeze(-1) * B + order)[runs]
    return _Rows(T, B, T * B, x.reshape(T * B, I).index_select(0, running), False, before, order, running)


class _Weights(NamedTuple):
    """A direction's, contiguous."""

    w_ih: Tensor
    w_hh: Tensor
    b_ih: Tensor | None
    b_hh: Tensor | None
    w_hr: Tensor | None


def _directions(weights: Sequence[Tensor], D: int, dtype: torch.dtype) -> list[_Weights]:
    count = len(weights) // D
    if weights[0].dtype != dtype:
        weights = [w.to(dtype) for w in weights]
    made = []
    for d in range(D):
        mine = [w.contiguous() for w in weights[d * count : (d + 1) * count]]
        w_hr = mine.pop() if count % 2 else None
        made.append(_Weights(*mine[:2], *(mine[2:] or (None, None)), w_hr))
    return made


def packed_transposed(w: Tensor, groups: int) -> Tensor:
    """The panels of W^T for w [groups * columns, K], a panel of each group in turn."""
    columns, K = w.shape[0] // groups, w.shape[1]
    made = w.new_empty(in_panels(columns, w.dtype) * groups * K)
    items = ceil_div(columns, panel_of(w.dtype)) * groups
    team.run(PACK, w.dtype, Pack(columns, groups, K, w, made, 1), items, _pack_grain(K, w.dtype))
    return made


def packed_rows(w: Tensor) -> Tensor:
    """The panels of w [K, columns]."""
    K, columns = w.shape
    made = w.new_empty(in_panels(columns, w.dtype) * K)
    items = ceil_div(columns, panel_of(w.dtype))
    team.run(PACK, w.dtype, Pack(columns, 1, K, w, made, 0), items, _pack_grain(K, w.dtype))
    return made


def _scratch(like: Tensor, *sizes: int) -> tuple[Tensor, list[int | None]]:
    """Memory for so many elements each, and where each begins, None where there are none."""
    starts, total = cut(*sizes)
    memory = empty(like, total)
    begin, step = memory.data_ptr(), memory.itemsize
    return memory, [begin + start * step if size else None for start, size in zip(starts, sizes, strict=True)]


def _pack_grain(K: int, dtype: torch.dtype) -> int:
    return max(1, 16 * 1024 // (K * panel_of(dtype)))


def _as_given(method: Callable[..., Any]) -> Callable[..., Any]:
    """The same without autocast: the dtypes are what to compute in."""

    @wraps(method)
    def call(*args: Any) -> Any:
        if not torch._C._is_any_autocast_enabled():
            return method(*args)
        with torch.autocast("cpu", enabled=False):
            return method(*args)

    return call


class Recurrent:
    """The implementation of one op: its kernels, and torch's products around them.

    Args:
        op: the op, whose gates, tape and cell it has.
        step: jitted, from tuples of a vector for each gate W_ih x + b_ih and W_hh h + b_hh, h_{t-1} (zeros unless
            keeps_h) and c_{t-1}, to h_t, c_t and the tape's vectors.
        step_back: jitted, from the tape's vectors, the gradients of h_t (before its projection) and c_t, and h_t,
            h_{t-1}, c_t and c_{t-1} as far as the cell has them, to the gradients of the two tuples, those of h_{t-1}
            and c_{t-1} that do not come through W_hh, and h_t before its projection.
        keeps_h: whether h_{t-1} goes into h_t past W_hh.
        splits_u: whether the gradients of the two tuples differ.
    """

    def __init__(
        self,
        op: Contract,
        step: Any,
        step_back: Any,
        *,
        keeps_h: bool,
        splits_u: bool,
    ) -> None:
        self.op, self.keeps_h, self.splits_u = op, keeps_h, splits_u
        self.gates, self.tape, self.has_cell = op.gates, op.tape, op.has_cell
        self._forward = forward_kernel(op.name, step, op.gates, op.tape, op.has_cell, keeps_h)
        self._backward = backward_kernel(op.name, step_back, op.gates, op.tape, op.has_cell, keeps_h, splits_u)
        self._sound: set[Any] = set()

    def warmup(self, dtype: torch.dtype) -> None:
        """Compiles all that calls of this dtype need, or finds it on disk."""
        for kernel in (PACK, self._forward, self._backward):
            kernel.function(dtype)

    def _check(self, arguments: Arguments) -> None:
        """Raises ValueError unless the arguments are what the kernels rely on. What has been seen to be is known by
        its shapes, since the whole check would take as long as a step.
        """
        tensors = (*arguments[:3], *arguments[5:], *arguments.weights)
        shape = (arguments.bidirectional, *[t if t is None else (t.shape, t.dtype, t.device.type) for t in tensors])
        if shape not in self._sound:
            self.op.check(arguments)
            if len(self._sound) >= _MOST_SHAPES:
                self._sound.clear()
            self._sound.add(shape)

    def _members(self, rows: _Rows, D: int, H: int, P: int) -> int:
        """How many threads the recurrence deserves."""
        if rows.T == 1:
            useful = rows.B * D * H // _ELEMENTS_PER_MEMBER
        else:
            count = len(rows.x)
            step = count * D * self.gates * H * P // rows.T
            useful = min(step * rows.T // _WORK_PER_MEMBER, max(D, step // _WORK_PER_BARRIER))
        return max(1, min(team.threads(), team.MOST_MEMBERS, useful))

    @_as_given
    def forward(
        self,
        x: Tensor,
        h0: Tensor | None,
        c0: Tensor | None,
        weights: Sequence[Tensor],
        bidirectional: bool,
        save_tape: bool,
        save_cells: bool,
        batch_sizes: Tensor | None,
        lengths: Tensor | None,
        reset: Tensor | None,
        reset_h: Tensor | None,
        reset_c: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """See `fastseq.ops.recurrent`."""
        self._check(Arguments(x, h0, c0, weights, bidirectional, batch_sizes, lengths, reset, reset_h, reset_c))
        dtype, D = x.dtype, 2 if bidirectional else 1
        ways = _directions(weights, D, dtype)
        G, H, P = self.gates, len(ways[0].w_ih) // self.gates, ways[0].w_hh.shape[1]
        rows = _rows(x, batch_sizes, lengths)
        T, B, N = rows.T, rows.B, rows.N
        y = empty(x, N, D * P) if rows.packed else empty(x, T, B, D * P)
        h_n = empty(x, D, B, P)
        c_n = empty(x, D, B, H) if self.has_cell else x.new_empty(0)
        gates = empty(x, D, N, self.tape * H) if save_tape and self.tape else x.new_empty(0)
        cells = empty(x, D, N, H) if (save_tape or save_cells) and self.has_cell else x.new_empty(0)
        outputs = (y, h_n, c_n, gates, cells)
        if B == 0:
            return outputs
        h0, c0, reset_h, reset_c = (s if s is None else s.contiguous() for s in (h0, c0, reset_h, reset_c))
        # A single step's product is torch's, too: W_hh is not worth packing.
        alone = T == 1 and rows.before is None and reset is None
        from_x = [linear(rows.x, w.w_ih, w.b_ih) for w in ways]
        from_h: list[Any] = [None] * D
        if alone and h0 is not None:
            from_h = [linear(h0[d], w.w_hh) for d, w in enumerate(ways)]
        w_hh = [None if alone else packed_transposed(w.w_hh, G) for w in ways]
        w_hr = [None if w.w_hr is None else packed_transposed(w.w_hr, 1) for w in ways]
        no_bias = x.new_zeros(G * H) if ways[0].b_hh is None else None
        b_hh = [no_bias if w.b_hh is None else w.b_hh for w in ways]
        members = self._members(rows, D, H, P)
        projected = P != H
        rows_at_once = min(B, MOST_ROWS)
        _memory, places = _scratch(
            x,
            D * 2 * B * P,
            D * B * H * self.has_cell,
            D * B * H * projected,
            members * rows_at_once * G * panels_at_once(G) * panel_of(dtype),
            members * rows_at_once * in_panels(P, dtype) * projected,
        )
        call = Forward(
            T, B, D, H, P, N, members, int(rows.packed), rows.before, rows.order, _laid_out(reset), reset_h,
            reset_c, h0, c0, *_pair(from_x), *_pair(from_h), *_pair(w_hh), *_pair(b_hh), *_pair(w_hr),
            y, h_n, c_n, gates, cells, *places, 0,
        )  # fmt: skip
        team.run_team(self._forward, dtype, call, members)
        return outputs

    @_as_given
    def backward(
        self,
        dy: Tensor | None,
        dh_n: Tensor | None,
        dc_n: Tensor | None,
        dcells: Tensor | None,
        x: Tensor,
        h0: Tensor | None,
        c0: Tensor | None,
        weights: Sequence[Tensor],
        bidirectional: bool,
        batch_sizes: Tensor | None,
        lengths: Tensor | None,
        reset: Tensor | None,
        reset_h: Tensor | None,
        reset_c: Tensor | None,
        y: Tensor,
        gates: Tensor,
        cells: Tensor,
        needs: Sequence[bool],
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, list[Tensor]]:
        """See `fastseq.ops.recurrent`."""
        self._check(Arguments(x, h0, c0, weights, bidirectional, batch_sizes, lengths, reset, reset_h, reset_c))
        dtype, D = x.dtype, 2 if bidirectional else 1
        ways = _directions(weights, D, dtype)
        G, H, P = self.gates, len(ways[0].w_ih) // self.gates, ways[0].w_hh.shape[1]
        rows = _rows(x, batch_sizes, lengths)
        T, B = rows.T, rows.B
        places = (rows.N,) if rows.packed else (T, B)
        for name, t, shape in (
            ("dy", dy, (*places, D * P)),
            ("dh_n", dh_n, (D, B, P)),
            ("dc_n", dc_n if self.has_cell else None, (D, B, H)),
            ("dcells", dcells if self.has_cell else None, (D, rows.N, H)),
            ("y", y, (*places, D * P)),
            ("gates", gates if self.tape else None, (D, rows.N, self.tape * H)),
            ("cells", cells if self.has_cell else None, (D, rows.N, H)),
        ):
            expect(self.op.name, name, t, shape, dtype)
        running = len(rows.x)
        projected = P != H
        state_wanted, reset_wanted = needs[1] or needs[2], (needs[3] or needs[4]) and reset is not None
        per_way = len(weights) // D
        needs_of = [needs[5 + d * per_way : 5 + (d + 1) * per_way] for d in range(D)]

        states = (h0, c0, reset_h, reset_c, dh_n, dc_n)
        h0, c0, reset_h, reset_c, dh_n, dc_n = (s if s is None else s.contiguous() for s in states)
        y, gates, cells = y.contiguous(), gates.contiguous(), cells.contiguous()
        dcells = None if dcells is None or not self.has_cell else dcells.contiguous()
        if dy is None:
            dy = x.new_zeros(1).expand(y.shape)
        if dy.stride(-1) != 1 and dy.shape[-1] > 1:
            dy = dy.contiguous()

        dx = [empty(x, running, G * H) for _ in ways]
        du = [empty(x, running, G * H) for _ in ways] if self.splits_u else dx
        plain = rows.before is None and reset is None and not rows.packed
        h_before = None if plain or not any(n[1] for n in needs_of) else empty(x, D, running, P)
        dh = empty(x, D, B, in_panels(P, dtype))
        dc = empty(x, D, B, H * self.has_cell)
        dp, unprojected = (empty(x, D, running, width * projected) for width in (P, H))
        draw = empty(x, D, B, in_panels(H, dtype) * projected)
        dreset_h = x.new_zeros((D, B, P) if reset_wanted else 0)
        dreset_c = x.new_zeros((D, B, H) if reset_wanted and self.has_cell else 0)
        # What reaches h0 in a single step is torch's product: W_hh is not worth packing.
        alone = T == 1 and rows.before is None and reset is None
        w_hh = [None if alone else packed_rows(w.w_hh) for w in ways]
        w_hr = [None if w.w_hr is None else packed_rows(w.w_hr) for w in ways]
        if B > 0:
            members = self._members(rows, D, H, P)
            call = Backward(
                T, B, D, H, P, rows.N, members, int(rows.packed), rows.before, rows.order, _laid_out(reset), reset_h,
                reset_c, h0, c0, *_pair(w_hh), *_pair(w_hr), dy, dy.stride(0), 0 if rows.packed else dy.stride(1),
                dh_n, dc_n if self.has_cell else None, dcells, y, gates, cells, *_pair(dx), *_pair(du), h_before, dh,
                dc, dp, unprojected, draw, dreset_h if reset_wanted else None,
                dreset_c if reset_wanted and self.has_cell else None,
                int((state_wanted or reset_wanted) and not alone), 0,
            )  # fmt: skip
            team.run_team(self._backward, dtype, call, members)

        dx_rows = None
        if needs[0]:
            for d, w in enumerate(ways):
                mine = linear(dx[d], w.w_ih.t())
                dx_rows = mine if dx_rows is None else dx_rows.add_(mine)
        dweights: list[Tensor] = []
        for d, (w, need) in enumerate(zip(ways, needs_of, strict=True)):
            found: list[Tensor] = [x.new_empty(0) for _ in range(per_way)]
            if need[0]:
                found[0] = _outer(dx[d], rows.x)
            if need[1]:
                found[1] = self._dw_hh(du[d], d, h0, y, h_before, T, B, P)
            if w.b_ih is not None and need[2]:
                found[2] = dx[d].sum(0)
            if w.b_hh is not None and need[3]:
                found[3] = du[d].sum(0)
            if projected and need[-1]:
                found[-1] = _outer(dp[d], unprojected[d])
            dweights += found
        if state_wanted:
            dh = dh[..., :P]
            if alone and B > 0:
                through = torch.stack([du[d] @ w.w_hh for d, w in enumerate(ways)])
                dh = through + dh if self.keeps_h else through
        return (
            rows.spread(dx_rows, x.shape) if dx_rows is not None else x.new_empty(0),
            _by_row(dh, rows.order) if state_wanted else x.new_empty(0),
            _by_row(dc, rows.order) if state_wanted and self.has_cell else x.new_empty(0),
            dreset_h,
            dreset_c,
            dweights,
        )

    def _dw_hh(
        self, du: Tensor, d: int, h0: Tensor | None, y: Tensor, h_before: Tensor | None, T: int, B: int, P: int
    ) -> Tensor:
        """The gradient of W_hh of a direction: the sum over all steps of du_t h_{t-1}^T."""
        if h_before is not None:
            return _outer(du, h_before[d])
        h = y[..., d * P : (d + 1) * P]
        first, rest, before = (du[:B], du[B:], h[:-1]) if d == 0 else (du[(T - 1) * B :], du[: (T - 1) * B], h[1:])
        if T == 1:
            return du.new_zeros(du.shape[1], P) if h0 is None else _outer(first, h0[d])
        total = _outer(rest, before.reshape((T - 1) * B, P))
        return total if h0 is None else total.addmm_(first.t(), h0[d])


def _outer(left: Tensor, right: Tensor) -> Tensor:
    """left^T right, a sum over their rows."""
    return left.t() * right if len(left) == 1 else linear(left.t(), right.t())


def _laid_out(reset: Tensor | None) -> Tensor | None:
    return None if reset is None else reset.contiguous().view(torch.uint8)


def _pair(of_ways: list[Any]) -> tuple[Any, Any]:
    return (of_ways[0], of_ways[1]) if len(of_ways) == 2 else (of_ways[0], None)


def _by_row(by_rank: Tensor, order: Tensor | None) -> Tensor:
    """States [D, B, width] of each rank as those of each row."""
    by_rank = by_rank.contiguous()
    return by_rank if order is None else torch.empty_like(by_rank).index_copy_(1, order, by_rank)
