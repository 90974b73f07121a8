"""A recurrent layer, for any cell. Formulas: fastseq/reference/.

The products that need no step before them, those of the input and those of the weights' gradients, are torch's, over
all steps at once. What is left is the recurrence, and it is here: a step's product with W_hh, in tiles whose sums stay
in registers, and the gates on what the tiles leave in the cache.

Every member of the team owns a rectangle of the batch and of the hidden units: rows of the batch where there are enough
of them (then nobody waits for anybody), else units (one barrier a step, since every unit needs all of h_{t-1}). Two
directions are two independent chains, each with half of the team. Where rows end at different steps, the rectangles are
cut anew at every step from the rows that still run.

A row's "rank" is its place in the order by falling length, which is where all scratch has it. What is made once a step
(pre-activations and their gradients) has the running rows of step 0 by rank, then those of step 1, and so on.
"""

from typing import Any, NamedTuple

from fastseq.kernels.numba import team
from fastseq.kernels.numba.compiler import Elements, Flags, Integers, Kernel, Size
from fastseq.kernels.numba.jit import jit
from fastseq.kernels.numba.simd import at, is_null, lanes, load, multiply, store, transpose, zeros
from fastseq.kernels.numba.team import barrier, join, share

# With fewer rows than this for each member the weights' way from the L3 cache limits a step: split the units instead.
_ROWS_PER_MEMBER = 8
# A cell of one gate takes so many panels of units at once: an FMA's latency wants eight sums in flight.
_PANELS_OF_ONE_GATE = 4
# So many rows are worked on at once that their h and their sums stay in the L2 cache while the panels pass.
MOST_ROWS = 128


class Forward(NamedTuple):
    """What forward's kernel gets; the one of each pair is of direction 0, the other of direction 1."""

    T: Size
    B: Size
    D: Size
    H: Size
    P: Size
    N: Size  # rows of y in all
    members: Size
    packed: Size
    before: Integers  # [T + 1] running rows before each step, or null where all run at every step
    order: Integers  # [B] each rank's row, or null where they are in order
    reset: Flags
    reset_h: Elements
    reset_c: Elements
    h0: Elements
    c0: Elements
    x: Elements  # [running rows, G*H] W_ih x_t + b_ih
    x_back: Elements
    u: Elements  # [B, G*H] W_hh h_0 where there is but one step, else null
    u_back: Elements
    w_hh: Elements  # panels of units, each with one of every gate: [ceil(H / panel), G, P, panel]
    w_hh_back: Elements
    b_hh: Elements  # [G*H]
    b_hh_back: Elements
    w_hr: Elements  # panels [ceil(P / panel), H, panel]
    w_hr_back: Elements
    y: Elements
    h_n: Elements
    c_n: Elements
    gates: Elements
    cells: Elements
    h: Elements  # [D, 2, B, P] read at even and at odd steps
    c: Elements  # [D, B, H]
    unprojected: Elements  # [D, B, H] h before w_hr
    sums: Elements  # [members, rows, G * panels at once]
    wide: Elements  # [members, rows, P in panels]
    team: Integers


class Backward(NamedTuple):
    """What backward's kernel gets."""

    T: Size
    B: Size
    D: Size
    H: Size
    P: Size
    N: Size
    members: Size
    packed: Size
    before: Integers
    order: Integers
    reset: Flags
    reset_h: Elements
    reset_c: Elements
    h0: Elements
    c0: Elements
    w_hh: Elements  # panels [ceil(P / panel), G*H, panel]
    w_hh_back: Elements
    w_hr: Elements  # panels [ceil(H / panel), P, panel]
    w_hr_back: Elements
    dy: Elements
    dy_t: Size  # its strides
    dy_b: Size
    dh_n: Elements
    dc_n: Elements
    dcells: Elements
    y: Elements
    gates: Elements
    cells: Elements
    dx: Elements  # [running rows, G*H] gradients of W_ih x_t + b_ih
    dx_back: Elements
    du: Elements  # and of W_hh h_{t-1} + b_hh, the same memory unless the cell tells them apart
    du_back: Elements
    h_before: Elements  # [D, running rows, P] h_{t-1}, or null if nobody asks
    dh: Elements  # [D, B, P in panels] what reaches h from later steps, in the end the gradient of h0
    dc: Elements  # [D, B, H]
    dp: Elements  # [D, running rows, P] gradients of h, if there is a projection
    unprojected: Elements  # [D, running rows, H] h before w_hr
    draw: Elements  # [D, B, H in panels] its gradients
    dreset_h: Elements  # added to
    dreset_c: Elements
    state_wanted: Size  # whether what reaches the first step's h_{t-1} is asked for
    team: Integers


class Pack(NamedTuple):
    """Panels of a matrix: `target` [items, K, panel], for each of the `groups` gates in turn."""

    columns: Size  # of a gate
    groups: Size
    K: Size
    source: Elements  # [groups * columns, K] if transposed, else [K, columns]
    target: Elements
    transposed: Size


@jit
def _pack(begin, end, call):
    width = 2 * lanes(call.source)
    for item in range(begin, end):
        panel, group = item // call.groups, item % call.groups
        first = panel * width
        count = min(width, call.columns - first)
        target = at(call.target, item * call.K * width)
        if call.transposed != 0:
            source = at(call.source, (group * call.columns + first) * call.K)
            whole = call.K // lanes(call.source) * lanes(call.source) if count == width else 0
            for k in range(0, whole, lanes(call.source)):
                for half in range(2):
                    column = half * lanes(call.source)
                    transpose(at(source, column * call.K + k), call.K, at(target, k * width + column), width)
            for k in range(whole, call.K):
                for column in range(width):
                    target[k * width + column] = source[column * call.K + k] if column < count else 0.0
        else:
            for k in range(call.K):
                for column in range(0, width, lanes(call.source)):
                    value = (
                        load(call.source, k * call.columns + first + column, count - column)
                        if column < count
                        else zeros(call.source)
                    )
                    store(target, k * width + column, value)


PACK = Kernel("pack", _pack, Pack)

# How many of each thing a cell has are tuples of vectors, which numba has to see as such.


def _tuples(count: int) -> tuple[Any, Any, Any]:
    """Jitted functions that load so many vectors, `gap` elements apart, as a tuple, store them, and add two tuples."""
    if count <= 1:

        @jit
        def read(base, i, gap, n):
            return (load(base, i, n),)

        @jit
        def write(base, i, gap, values, n):
            store(base, i, values[0], n)

        @jit
        def plus(a, b):
            return (a[0] + b[0],)

    else:
        read_rest, write_rest, plus_rest = _tuples(count - 1)

        @jit
        def read(base, i, gap, n):
            return (load(base, i, n), *read_rest(base, i + gap, gap, n))

        @jit
        def write(base, i, gap, values, n):
            store(base, i, values[0], n)
            write_rest(base, i + gap, gap, values[1:], n)

        @jit
        def plus(a, b):
            return (a[0] + b[0], *plus_rest(a[1:], b[1:]))

    return read, write, plus


# Steps and rows.


@jit
def _before_step(call, t):
    return t * call.B if is_null(call.before) else call.before[t]


@jit
def _active(call, t):
    return call.B if is_null(call.before) else call.before[t + 1] - call.before[t]


@jit
def _row_of(call, rank):
    return rank if is_null(call.order) else call.order[rank]


@jit
def _place(call, t, rank):
    """The row of y, dy and the tape."""
    return _before_step(call, t) + rank if call.packed != 0 else t * call.B + _row_of(call, rank)


@jit
def _is_end(call, t, rank):
    return t + 1 == call.T or rank >= _active(call, t + 1)


@jit
def _is_first(call, d, t, rank):
    return t == 0 if d == 0 else _is_end(call, t, rank)


@jit
def _is_last(call, d, t, rank):
    return _is_end(call, t, rank) if d == 0 else t == 0


@jit
def _starts_anew(call, d, t, rank):
    """Whether the state that goes into step t starts anew. Backwards in time a sequence starts at its end forwards."""
    if is_null(call.reset):
        return False
    if d == 0:
        return call.reset[t * call.B + _row_of(call, rank)] != 0
    return not _is_end(call, t, rank) and call.reset[(t + 1) * call.B + _row_of(call, rank)] != 0


@jit
def _vector_or_zeros(base, i, n):
    return zeros(base) if is_null(base) else load(base, i, n)


@jit
def _start(call, initial, anew, d, t, rank, width, u, n):
    """A vector of the state that a row starts from in front of step t, at its first step or where it starts anew."""
    row = (d * call.B + _row_of(call, rank)) * width + u
    if _starts_anew(call, d, t, rank):
        return _vector_or_zeros(anew, row, n)
    return _vector_or_zeros(initial, row, n)


# Who does what.


@jit
def _side(call, rank, members):
    """The directions [d, d_end) of a member, and with whom it shares them: members [first, first + count)."""
    if call.D == 2 and members % 2 == 0:
        count = members // 2
        d = rank // count
        return d, d + 1, d * count, count
    return 0, call.D, 0, members


@jit
def _rectangle(rows, member, count):
    """A member's rows [row, row_end) of a step, and its part of the units, as the part-th of so many."""
    if rows < _ROWS_PER_MEMBER * count:
        return 0, rows, member, count
    return share(rows, member, count), share(rows, member + 1, count), 0, 1


@jit
def _turn(call, d, s, member, count):
    """The step t that is a direction's s-th, and a member's rectangle of it."""
    t = s if d == 0 else call.T - 1 - s
    row, row_end, part, parts = _rectangle(_active(call, t), member, count)
    return t, row, row_end, part, parts


@jit
def _in_step(call, count):
    """Whether members wait for each other at every step: unless each has rows of its own for the whole sequence."""
    return count > 1 and (not is_null(call.before) or _ROWS_PER_MEMBER * count > call.B)


@jit
def _panels(columns, base):
    width = 2 * lanes(base)
    return (columns + width - 1) // width


def panels_at_once(gates: int) -> int:
    return _PANELS_OF_ONE_GATE if gates == 1 else 1


def forward_kernel(name: str, step: Any, gates: int, tape: int, has_cell: bool, keeps_h: bool) -> Kernel[Forward]:
    units = panels_at_once(gates)
    read, _, plus = _tuples(gates)
    _, write_tape, _ = _tuples(tape)

    @jit
    def begin_rows(call, d, member, count):
        """Sets the states of a member's part of the rows to where they start."""
        for rank in range(share(call.B, member, count), share(call.B, member + 1, count)):
            row = d * call.B + _row_of(call, rank)
            t = 0
            if d == 1:
                t = call.T - 1
                while t > 0 and _active(call, t) <= rank:
                    t -= 1
            runs = rank < _active(call, 0)
            for u in range(0, call.P, lanes(call.y)):
                n = call.P - u
                if runs:
                    value = _start(call, call.h0, call.reset_h, d, t, rank, call.P, u, n)
                    for parity in range(2):  # its first step may be an odd one
                        store(call.h, ((d * 2 + parity) * call.B + rank) * call.P + u, value, n)
                else:
                    store(call.h_n, row * call.P + u, _vector_or_zeros(call.h0, row * call.P + u, n), n)
            if has_cell:
                for u in range(0, call.H, lanes(call.y)):
                    n = call.H - u
                    if runs:
                        value = _start(call, call.c0, call.reset_c, d, t, rank, call.H, u, n)
                        store(call.c, (d * call.B + rank) * call.H + u, value, n)
                    else:
                        store(call.c_n, row * call.H + u, _vector_or_zeros(call.c0, row * call.H + u, n), n)

    @jit
    def put(call, d, s, t, rank, last, anew, u, value, n):
        """A vector of h_t to where it goes."""
        row = (d * call.B + _row_of(call, rank)) * call.P + u
        store(call.y, _place(call, t, rank) * call.D * call.P + d * call.P + u, value, n)
        if last:
            store(call.h_n, row, value, n)
        elif anew:
            value = _vector_or_zeros(call.reset_h, row, n)
        store(call.h, ((d * 2 + (s + 1) % 2) * call.B + rank) * call.P + u, value, n)

    @jit
    def ends(call, d, t, rank):
        """Whether step t is a row's last, and whether the next one's state starts anew."""
        last = _is_last(call, d, t, rank)
        anew = not is_null(call.reset) and not last and _starts_anew(call, d, t + 1 if d == 0 else t - 1, rank)
        return last, anew

    @jit
    def activate(call, d, s, t, rank, rank_end, first, end, sums, sums_row, sums_gap):
        """The cell on units [first, end), for rows by rank, from what W_hh gave."""
        x = call.x if d == 0 else call.x_back
        bias = call.b_hh if d == 0 else call.b_hh_back
        for b in range(rank, rank_end):
            last, anew = ends(call, d, t, b)
            from_x = at(x, (_before_step(call, t) + b) * gates * call.H)
            tape_row = d * call.N + _place(call, t, b)
            row = (d * call.B + _row_of(call, b)) * call.H
            h_now = ((d * 2 + s % 2) * call.B + b) * call.P
            for u in range(first, end, lanes(call.y)):
                n = end - u
                h = load(call.h, h_now + u, n) if keeps_h else zeros(call.y)
                c = load(call.c, (d * call.B + b) * call.H + u, n) if has_cell else zeros(call.y)
                added = read(at(sums, (b - rank) * sums_row + u - first), 0, sums_gap, n)
                h, c, kept = step(read(from_x, u, call.H, n), plus(added, read(bias, u, call.H, n)), h, c)
                if tape > 0 and not is_null(call.gates):
                    write_tape(call.gates, tape_row * tape * call.H + u, call.H, kept, n)
                if has_cell:
                    if not is_null(call.cells):
                        store(call.cells, tape_row * call.H + u, c, n)
                    if last:
                        store(call.c_n, row + u, c, n)
                    elif anew:
                        c = _vector_or_zeros(call.reset_c, row + u, n)
                    store(call.c, (d * call.B + b) * call.H + u, c, n)
                if call.P != call.H:
                    store(call.unprojected, (d * call.B + b) * call.H + u, h, n)
                else:
                    put(call, d, s, t, b, last, anew, u, h, n)

    @jit
    def advance(call, d, s, t, row, row_end, part, parts, sums):
        """One step of a direction, for a member's rectangle."""
        width = 2 * lanes(call.y)
        panels = _panels(call.H, call.y)
        w = call.w_hh if d == 0 else call.w_hh_back
        u = call.u if d == 0 else call.u_back
        first, end = share(panels, part, parts), share(panels, part + 1, parts)
        from_zeros = s == 0 and is_null(call.h0) and is_null(call.reset) and is_null(call.before)
        for rank in range(row, row_end, MOST_ROWS):
            count = min(MOST_ROWS, row_end - rank)
            if from_zeros:
                for i in range(0, count * gates * units * width, lanes(call.y)):
                    store(sums, i, zeros(call.y))
            h = at(call.h, ((d * 2 + s % 2) * call.B + rank) * call.P)
            blocks = (end - first + units - 1) // units
            for i in range(blocks):
                # In an order that turns round at every step: what was read last is still in the cache.
                panel = first + (i if s % 2 == 0 else blocks - 1 - i) * units
                some = min(units, end - panel)
                unit, unit_end = panel * width, min(call.H, (panel + some) * width)
                if not is_null(u):
                    here = at(u, rank * gates * call.H + unit)
                    activate(call, d, s, t, rank, rank + count, unit, unit_end, here, gates * call.H, call.H)
                    continue
                if not from_zeros:
                    multiply(
                        count, gates * some, call.P * width, call.P, h, call.P,
                        at(w, panel * gates * call.P * width), width, sums, gates * units * width, False,
                    )  # fmt: skip
                activate(call, d, s, t, rank, rank + count, unit, unit_end, sums, gates * units * width, width)

    @jit
    def shrink(call, d, s, t, row, row_end, part, parts, wide):
        """h_t = W_hr of what activate left, for a member's rectangle."""
        width = 2 * lanes(call.y)
        panels = _panels(call.P, call.y)
        first, end = share(panels, part, parts), share(panels, part + 1, parts)
        w = at(call.w_hr if d == 0 else call.w_hr_back, first * call.H * width)
        for rank in range(row, row_end, MOST_ROWS):
            count = min(MOST_ROWS, row_end - rank)
            left = at(call.unprojected, (d * call.B + rank) * call.H)
            row_width = (end - first) * width
            multiply(count, end - first, call.H * width, call.H, left, call.H, w, width, wide, row_width, False)
            for b in range(count):
                last, anew = ends(call, d, t, rank + b)
                for u in range(first * width, min(call.P, end * width), lanes(call.y)):
                    value = load(wide, b * row_width + u - first * width)
                    put(call, d, s, t, rank + b, last, anew, u, value, call.P - u)

    @jit
    def clear(base, i, count):
        for u in range(0, count, lanes(base)):
            store(base, i + u, zeros(base), count - u)

    @jit
    def clear_padding(call, d, member, count):
        """Outputs and cells past a row's end are zeros."""
        for t in range(share(call.T, member, count), share(call.T, member + 1, count)):
            for rank in range(_active(call, t), call.B):
                place = _place(call, t, rank)
                clear(call.y, place * call.D * call.P + d * call.P, call.P)
                if has_cell and not is_null(call.cells):
                    clear(call.cells, (d * call.N + place) * call.H, call.H)

    @jit
    def body(begin, end, call):
        rank = join(call.team, begin, end, call.members)
        if rank < 0:
            return
        d_begin, d_end, first, count = _side(call, rank, team.size(call.team))
        member = rank - first
        in_step = _in_step(call, count)
        for d in range(d_begin, d_end):
            begin_rows(call, d, member, count)
        barrier(call.team, rank, first, count)
        sums = at(call.sums, rank * min(call.B, MOST_ROWS) * gates * units * 2 * lanes(call.y))
        wide = at(call.wide, rank * min(call.B, MOST_ROWS) * _panels(call.P, call.y) * 2 * lanes(call.y))
        for s in range(call.T):
            for d in range(d_begin, d_end):
                t, row, row_end, part, parts = _turn(call, d, s, member, count)
                advance(call, d, s, t, row, row_end, part, parts, sums)
                if call.P != call.H:
                    if in_step:
                        barrier(call.team, rank, first, count)
                    shrink(call, d, s, t, row, row_end, part, parts, wide)
            if in_step and s + 1 < call.T:
                barrier(call.team, rank, first, count)
        if not is_null(call.before) and call.packed == 0:
            for d in range(d_begin, d_end):
                clear_padding(call, d, member, count)

    return Kernel(f"{name} forward", body, Forward)


def backward_kernel(
    name: str, step_back: Any, gates: int, tape: int, has_cell: bool, keeps_h: bool, splits_u: bool
) -> Kernel[Backward]:
    read_tape, _, _ = _tuples(tape)
    _, write, _ = _tuples(gates)

    @jit
    def begin_rows(call, d, member, count):
        width = _panels(call.P, call.y) * 2 * lanes(call.y)
        for rank in range(share(call.B, member, count), share(call.B, member + 1, count)):
            row = d * call.B + _row_of(call, rank)
            for u in range(0, call.P, lanes(call.y)):
                value = _vector_or_zeros(call.dh_n, row * call.P + u, call.P - u)
                store(call.dh, (d * call.B + rank) * width + u, value)
            if has_cell:
                for u in range(0, call.H, lanes(call.y)):
                    value = _vector_or_zeros(call.dc_n, row * call.H + u, call.H - u)
                    store(call.dc, (d * call.B + rank) * call.H + u, value, call.H - u)

    @jit
    def dy_row(call, d, t, rank):
        if call.packed != 0:
            return at(call.dy, (_before_step(call, t) + rank) * call.dy_t + d * call.P)
        return at(call.dy, t * call.dy_t + _row_of(call, rank) * call.dy_b + d * call.P)

    @jit
    def h_before(call, d, t, rank, starts, u, n):
        """A vector of h_{t-1} of a row."""
        if starts:
            return _start(call, call.h0, call.reset_h, d, t, rank, call.P, u, n)
        place = _place(call, t - 1 if d == 0 else t + 1, rank)
        return load(call.y, place * call.D * call.P + d * call.P + u, n)

    @jit
    def columns(count, part, parts, base):
        """A member's part [first, end) of so many columns, in whole panels."""
        panels, width = _panels(count, base), 2 * lanes(base)
        return share(panels, part, parts) * width, min(count, share(panels, part + 1, parts) * width)

    @jit
    def gather_dh(call, d, t, row, row_end, part, parts):
        """With a projection: all that reaches h_t, kept for the gradient of w_hr."""
        width = _panels(call.P, call.y) * 2 * lanes(call.y)
        first, end = columns(call.P, part, parts, call.y)
        running = _before_step(call, call.T)
        for rank in range(row, row_end):
            dy = dy_row(call, d, t, rank)
            to = at(call.dp, (d * running + _before_step(call, t) + rank) * call.P)
            for u in range(first, end, lanes(call.y)):
                value = load(call.dh, (d * call.B + rank) * width + u) + load(dy, u, end - u)
                store(to, u, value, end - u)

    @jit
    def unproject(call, d, t, row, row_end, part, parts):
        """What of it reaches h_t before its projection."""
        width = 2 * lanes(call.y)
        panels = _panels(call.H, call.y)
        first, end = share(panels, part, parts), share(panels, part + 1, parts)
        running = _before_step(call, call.T)
        w = at(call.w_hr if d == 0 else call.w_hr_back, first * call.P * width)
        left = at(call.dp, (d * running + _before_step(call, t) + row) * call.P)
        out = at(call.draw, (d * call.B + row) * panels * width + first * width)
        multiply(row_end - row, end - first, call.P * width, call.P, left, call.P, w, width, out, panels * width, False)

    @jit
    def gates_back(call, d, t, row, row_end, part, parts):
        """Gradients of the pre-activations from those of h_t and c_t, which become what of those of h_{t-1} and
        c_{t-1} does not come through W_hh."""
        h_width = _panels(call.P, call.y) * 2 * lanes(call.y)
        raw_width = _panels(call.H, call.y) * 2 * lanes(call.y)
        first, end = columns(call.H, part, parts, call.y)
        running = _before_step(call, call.T)
        dx = call.dx if d == 0 else call.dx_back
        du = call.du if d == 0 else call.du_back
        for rank in range(row, row_end):
            starts = _is_first(call, d, t, rank) or _starts_anew(call, d, t, rank)
            here = _before_step(call, t) + rank
            place = _place(call, t, rank)
            tape_row = d * call.N + place
            dy = dy_row(call, d, t, rank)
            for u in range(first, end, lanes(call.y)):
                n = end - u
                if call.P == call.H:
                    dh = load(call.dh, (d * call.B + rank) * h_width + u) + load(dy, u, n)
                else:
                    dh = load(call.draw, (d * call.B + rank) * raw_width + u)
                dc, c, c_before = zeros(call.y), zeros(call.y), zeros(call.y)
                h, before = zeros(call.y), zeros(call.y)
                if has_cell:
                    c = load(call.cells, tape_row * call.H + u, n)
                    dc = load(call.dc, (d * call.B + rank) * call.H + u, n)
                    if not is_null(call.dcells):
                        dc = dc + load(call.dcells, tape_row * call.H + u, n)
                    if starts:
                        c_before = _start(call, call.c0, call.reset_c, d, t, rank, call.H, u, n)
                    else:
                        earlier = _place(call, t - 1 if d == 0 else t + 1, rank)
                        c_before = load(call.cells, (d * call.N + earlier) * call.H + u, n)
                else:
                    h = load(call.y, place * call.D * call.P + d * call.P + u, n)
                    if keeps_h:
                        before = h_before(call, d, t, rank, starts, u, n)
                kept = read_tape(call.gates, tape_row * tape * call.H + u, call.H, n) if tape > 0 else (h,)
                da_x, da_u, dh, dc, h = step_back(kept, dh, dc, h, before, c, c_before)
                write(dx, here * gates * call.H + u, call.H, da_x, n)
                if splits_u:
                    write(du, here * gates * call.H + u, call.H, da_u, n)
                if has_cell:
                    store(call.dc, (d * call.B + rank) * call.H + u, dc, n)
                if keeps_h:
                    store(call.dh, (d * call.B + rank) * h_width + u, dh)
                if call.P != call.H:
                    store(call.unprojected, (d * running + here) * call.H + u, h, n)
            if not is_null(call.h_before):
                p, p_end = columns(call.P, part, parts, call.y)
                for u in range(p, p_end, lanes(call.y)):
                    value = h_before(call, d, t, rank, starts, u, p_end - u)
                    store(call.h_before, (d * running + here) * call.P + u, value, p_end - u)

    @jit
    def cut(call, d, t, row, row_end, part, parts, source, source_width, target, count):
        """Where a state started anew before step t, what reaches it goes to what it started from."""
        first, end = columns(count, part, parts, call.y)
        for rank in range(row, row_end):
            if _starts_anew(call, d, t, rank):
                for u in range(first, end, lanes(call.y)):
                    here = (d * call.B + rank) * source_width + u
                    if not is_null(target):
                        there = (d * call.B + _row_of(call, rank)) * count + u
                        store(target, there, load(target, there, end - u) + load(source, here, end - u), end - u)
                    store(source, here, zeros(call.y), end - u)

    @jit
    def state_back(call, d, t, row, row_end, part, parts):
        """What reaches h_{t-1}, for a member's rectangle."""
        width = 2 * lanes(call.y)
        panels = _panels(call.P, call.y)
        first, end = share(panels, part, parts), share(panels, part + 1, parts)
        G = gates * call.H
        w = at(call.w_hh if d == 0 else call.w_hh_back, first * G * width)
        du = call.du if d == 0 else call.du_back
        for rank in range(row, row_end, MOST_ROWS):
            count = min(MOST_ROWS, row_end - rank)
            left = at(du, (_before_step(call, t) + rank) * G)
            out = at(call.dh, (d * call.B + rank) * panels * width + first * width)
            multiply(count, end - first, G * width, G, left, G, w, width, out, panels * width, keeps_h)
        if not is_null(call.reset):
            cut(call, d, t, row, row_end, part, parts, call.dh, panels * width, call.dreset_h, call.P)
            if has_cell:
                cut(call, d, t, row, row_end, part, parts, call.dc, call.H, call.dreset_c, call.H)

    @jit
    def body(begin, end, call):
        rank = join(call.team, begin, end, call.members)
        if rank < 0:
            return
        d_begin, d_end, first, count = _side(call, rank, team.size(call.team))
        member = rank - first
        in_step = _in_step(call, count)
        for d in range(d_begin, d_end):
            begin_rows(call, d, member, count)
        barrier(call.team, rank, first, count)
        for back in range(call.T):
            s = call.T - 1 - back
            if call.P != call.H:
                for d in range(d_begin, d_end):
                    t, row, row_end, part, parts = _turn(call, d, s, member, count)
                    gather_dh(call, d, t, row, row_end, part, parts)
                if in_step:
                    barrier(call.team, rank, first, count)
                for d in range(d_begin, d_end):
                    t, row, row_end, part, parts = _turn(call, d, s, member, count)
                    unproject(call, d, t, row, row_end, part, parts)
            for d in range(d_begin, d_end):
                t, row, row_end, part, parts = _turn(call, d, s, member, count)
                gates_back(call, d, t, row, row_end, part, parts)
            if in_step:
                barrier(call.team, rank, first, count)
            if s == 0 and call.state_wanted == 0:
                break
            for d in range(d_begin, d_end):
                t, row, row_end, part, parts = _turn(call, d, s, member, count)
                state_back(call, d, t, row, row_end, part, parts)
            if in_step and not is_null(call.before):
                barrier(call.team, rank, first, count)  # the next step's rows are somebody else's

    return Kernel(f"{name} backward", body, Backward)
