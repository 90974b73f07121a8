"""What the Triton kernels of all recurrent cells share: a step forward and back, and the loop over the steps.

One kernel text serves two forms, which `plan` chooses between:

- *stepwise*: one launch a step; the weights come from L2 each time. Serves every size.
- *persistent*: one launch for all steps. A program keeps the weights of its units in shared memory, loaded before the
  first step, and computes them for one tile of the batch. The programs of one tile and direction are a group: they hand
  each step's state on through global memory and wait for each other by a counter. A group of one program waits for
  nobody; with more, all programs of the launch must be resident at once, which the cooperative launch guarantees.

A step is one product and the cell's gates. Tiles are [units, rows of the batch]: with the gates of BLOCK_U units
stacked to one tile, the weights are the large operand of the product even for a batch of one, and have the shape that
tensor cores want.

A cell's file gives `step` and `step_back`; the formulas are in `fastseq.reference`, and what surrounds the steps is in
`fastseq.ops.recurrent_steps`. Pre-activations, cell states and sums are float32 whatever the tensors' dtype.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastseq.kernels.triton.graphs import Launch, run
from fastseq.kernels.triton.recurrent_plan import Chip, Plan, Product, plan, stepwise
from fastseq.ops.recurrent_steps import Backward, Cell, Forward, Layer, allows_tf32, implementation, stacked

# The interpreter would multiply the bits of bfloat16.
_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def tanh(x):
    # Near 0 a polynomial that interpolates (tanh(x) / x - 1) / x^2 at Chebyshev nodes of [0, 1/4], within 1.4e-9; the
    # quotient would lose the digits there.
    z = x * x
    near = -0.33333331346511841 + z * (
        0.13333225250244141 + z * (-0.05393346771597862 + z * (0.021470682695508003 - z * 0.006942941807210445))
    )
    e = tl.exp(-2.0 * tl.abs(x))
    far = (1.0 - e) / (1.0 + e)
    return tl.where(z < 0.25, x + x * z * near, tl.where(x < 0.0, -far, far))


@triton.jit
def _chunk(p, ok, c, K: tl.constexpr, BLOCK_K: tl.constexpr, SPLIT: tl.constexpr, WEIGHTS: tl.constexpr):
    """Chunk c along K of the vectors of K that `p` points at, those with `ok`, zeros elsewhere.

    [vectors, BLOCK_K] for weights, its transpose for what they multiply; with SPLIT the leading axis splits the chunk.
    """
    # Every instruction counts here: no mask along K where the chunks fill it.
    FULL: tl.constexpr = K % (SPLIT * BLOCK_K) == 0
    if SPLIT == 1:
        k = c * BLOCK_K + tl.arange(0, BLOCK_K)
        if WEIGHTS:
            p, k, mask = p[:, None], k[None, :], ok[:, None]
        else:
            p, k, mask = p[None, :], k[:, None], ok[None, :]
    else:
        k = (c * SPLIT + tl.arange(0, SPLIT)[:, None]) * BLOCK_K + tl.arange(0, BLOCK_K)[None, :]
        if WEIGHTS:
            p, k, mask = p[None, :, None], k[:, None, :], ok[None, :, None]
        else:
            p, k, mask = p[None, None, :], k[:, :, None], ok[None, None, :]
    if not FULL:
        mask = mask & (k < K)
    # What the weights multiply may have been written by another program since this one last read there: not from L1.
    chunk = tl.load(p + k, mask=mask, other=0.0, cache_modifier="" if WEIGHTS else ".cg")
    return chunk.to(tl.float32) if _INTERPRETED else chunk


@triton.jit
def _chunks(p, ok, COUNT: tl.constexpr, K: tl.constexpr, BLOCK_K: tl.constexpr, SPLIT: tl.constexpr, W: tl.constexpr):
    """The first COUNT chunks along K, as a tuple."""
    chunks = ()
    for c in tl.static_range(COUNT):
        chunks = chunks + (_chunk(p, ok, c, K, BLOCK_K, SPLIT, W),)  # noqa: RUF005 (Triton has no unpacking)
    return chunks


@triton.jit
def product(
    weights,  # all chunks of them, or None: then they are loaded
    p_w,  # [M] where each weight vector starts
    w_ok,
    p_v,  # [N] where each vector that they multiply starts
    v_ok,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT: tl.constexpr,
    AHEAD: tl.constexpr,  # chunks of the vectors that are on their way while one is multiplied
    PRECISION: tl.constexpr,
):
    """[M, N] float32, the weights times the vectors."""
    acc = tl.zeros((M, N) if SPLIT == 1 else (SPLIT, M, N), tl.float32)
    COUNT: tl.constexpr = (K + BLOCK_K * SPLIT - 1) // (BLOCK_K * SPLIT)
    if weights is not None:
        vectors = _chunks(p_v, v_ok, AHEAD if AHEAD < COUNT else COUNT, K, BLOCK_K, SPLIT, False)
        for c in tl.static_range(COUNT):
            if c + AHEAD < COUNT:
                vectors = vectors + (_chunk(p_v, v_ok, c + AHEAD, K, BLOCK_K, SPLIT, False),)  # noqa: RUF005
            acc = tl.dot(weights[c], vectors[c], acc, input_precision=PRECISION)
    else:
        for c in range(COUNT):  # Triton's pipeline loads ahead, as `num_stages` says
            w = _chunk(p_w, w_ok, c, K, BLOCK_K, SPLIT, True)
            v = _chunk(p_v, v_ok, c, K, BLOCK_K, SPLIT, False)
            acc = tl.dot(w, v, acc, input_precision=PRECISION)
    return acc if SPLIT == 1 else tl.sum(acc, 0)


@triton.jit
def _by_gate(stacked, UNITS: tl.constexpr, ROWS: tl.constexpr):
    """The four [UNITS, ROWS] tiles that are stacked in one [4 * UNITS, ROWS]."""
    pairs = tl.permute(tl.reshape(stacked, (2, 2, UNITS, ROWS)), (2, 3, 1, 0))
    first, second = tl.split(pairs)  # gates 0 and 1, and gates 2 and 3
    a0, a1 = tl.split(first)
    a2, a3 = tl.split(second)
    return a0, a1, a2, a3


@triton.jit
def _signal(p_count):
    """Counts this program's step as done, and all that it has stored as visible to whoever reads the count."""
    tl.debug_barrier()
    tl.atomic_add(p_count, 1, sem="release", scope="gpu")


@triton.jit
def _wait(p_count, count):
    while tl.atomic_add(p_count, 0, sem="acquire", scope="gpu") < count:
        pass
    tl.debug_barrier()


@triton.jit
def _starts_anew(p_reset, p_lengths, s, t, d, rows, row_ok, T, B):
    """[rows] whether a row's state starts anew between step s at t and the next step of direction d."""
    at = t + 1 - d  # a reset before step t' cuts between t'-1 and t', for both directions
    valid = row_ok & (s + 1 < T) & (at < T)
    if p_lengths is not None:
        valid = valid & (at < tl.load(p_lengths + rows, mask=row_ok, other=0))
    return tl.load(p_reset + at * B + rows, mask=valid, other=0) != 0


@triton.jit
def _hand_on(p_h, offset, new_offset, state, h, run, ok, anew, p_lengths, p_reset, p_reset_h):
    """Stores what the next step starts from: h, or what a row that does not run had, or what a reset sets it to."""
    if p_lengths is not None:
        h = tl.where(run, h, tl.load(p_h + offset, mask=ok & ~run, other=0.0, cache_modifier=".cg").to(tl.float32))
    if p_reset is not None:
        if p_reset_h is None:
            h = tl.where(anew, 0.0, h)
        else:
            h = tl.where(anew, tl.load(p_reset_h + state, mask=ok & anew, other=0.0).to(tl.float32), h)
    tl.store(p_h + new_offset, h, mask=ok)


@triton.jit(do_not_specialize=["T", "B", "N", "first", "steps"])
def forward_kernel(
    p_pre,  # [D, N, PRE] W_ih x_t + b in the first G*H; where the tape is saved, the gates come in its place
    p_w,  # [D, G*H, K] W_hh
    p_b,  # [D, H] the bias that a reset gate multiplies, or None
    p_h,  # [2, D, B, K] the states before even and odd steps; K is H or, with a projection, P
    p_carry,  # [D, B, H] float32, what each unit carries for itself: c, or h where it is needed beside W_hh h; or None
    p_m,  # [D, B, H] what the projection takes, or None
    p_y,  # [N, D*H], unless there is a projection
    p_cells,  # [D, N, H] or None
    p_reset,  # [T, B] bool or None
    p_reset_h,  # [D, B, H] or None
    p_reset_carry,  # [D, B, H] or None
    p_lengths,  # [B] int32 or None
    p_starts,  # [T] int64, where each step's rows start in N, or None for t*B
    p_count,  # [D, tiles of the batch] int32 zeros, or None if a group is one program
    T, B, N, first, steps,
    STEP: tl.constexpr,
    G: tl.constexpr, H: tl.constexpr, K: tl.constexpr, PRE: tl.constexpr, SAVE: tl.constexpr,
    RESIDENT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_U: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr, SPLIT: tl.constexpr,
    AHEAD: tl.constexpr,
):  # fmt: skip
    """Steps of both directions from `first` on. Grid: tiles of units, tiles of the batch, directions."""
    d, D = tl.program_id(2), tl.num_programs(2)
    units, rows = tl.program_id(0) * BLOCK_U + tl.arange(0, BLOCK_U), tl.program_id(1) * BLOCK_B + tl.arange(0, BLOCK_B)
    unit_ok, row_ok = units < H, rows < B
    ok = unit_ok[:, None] & row_ok[None, :]
    vectors = (d * B + rows).to(tl.int64)
    state = vectors[None, :] * H + units[:, None]

    SLOTS: tl.constexpr = 1 if G == 1 else 4  # a stack of three cannot be a tile
    COUNT: tl.constexpr = (K + BLOCK_K * SPLIT - 1) // (BLOCK_K * SPLIT)
    stacked = tl.arange(0, SLOTS * BLOCK_U)
    gate, unit = stacked // BLOCK_U, tl.program_id(0) * BLOCK_U + stacked % BLOCK_U
    p_vectors, w_ok = p_w + ((d * G + gate) * H + unit).to(tl.int64) * K, (gate < G) & (unit < H)
    weights = _chunks(p_vectors, w_ok, COUNT, K, BLOCK_K, SPLIT, True) if RESIDENT else None

    if p_b is not None:
        bias = tl.load(p_b + d * H + units, mask=unit_ok, other=0.0).to(tl.float32)
    if p_lengths is not None:
        length = tl.load(p_lengths + rows, mask=row_ok, other=0)
    carry = tl.zeros((BLOCK_U, BLOCK_B), tl.float32)
    if p_carry is not None:
        carry = tl.load(p_carry + state, mask=ok, other=0.0)
    if p_count is not None:
        p_count += d * tl.num_programs(1) + tl.program_id(1)

    for s in range(first, first + steps):
        t = s + d * (T - 1 - 2 * s)
        runs = row_ok if p_lengths is None else t < length
        run = unit_ok[:, None] & runs[None, :]
        start = t.to(tl.int64) * B if p_starts is None else tl.load(p_starts + t)
        place = start + rows
        p_gates = p_pre + (d.to(tl.int64) * N + place)[None, :] * PRE + units[:, None]
        x0 = tl.load(p_gates, mask=run, other=0.0).to(tl.float32)
        x1, x2, x3 = x0, x0, x0
        if G > 1:
            x1 = tl.load(p_gates + H, mask=run, other=0.0).to(tl.float32)
            x2 = tl.load(p_gates + 2 * H, mask=run, other=0.0).to(tl.float32)
        if G > 3:
            x3 = tl.load(p_gates + 3 * H, mask=run, other=0.0).to(tl.float32)
        anew = run
        if p_reset is not None:
            anew = _starts_anew(p_reset, p_lengths, s, t, d, rows, row_ok, T, B)[None, :]

        if p_count is not None:
            if s > first:
                _wait(p_count, (s - first) * tl.num_programs(0))
        elif RESIDENT:
            tl.debug_barrier()  # its own stores of the step before
        before, after = (s % 2) * D * B, ((s + 1) % 2) * D * B
        a0 = product(
            weights, p_vectors, w_ok, p_h + (before + vectors) * K, row_ok,
            SLOTS * BLOCK_U, BLOCK_B, K, BLOCK_K, SPLIT, AHEAD, PRECISION,
        )  # fmt: skip
        a1, a2, a3 = a0, a0, a0
        if G > 1:
            a0, a1, a2, a3 = _by_gate(a0, BLOCK_U, BLOCK_B)
        if p_b is not None:
            a2 += bias[:, None]
        h, own, g0, g1, g2, g3 = STEP(x0, x1, x2, x3, a0, a1, a2, a3, carry)

        # First what others wait for.
        if p_m is None:
            offset = vectors[None, :] * K + units[:, None]
            _hand_on(
                p_h, before * K + offset, after * K + offset, state, h, run, ok, anew, p_lengths, p_reset, p_reset_h
            )
            if p_count is not None:
                _signal(p_count)
            p_out = p_y + (place * D + d)[None, :] * H + units[:, None]
            tl.store(p_out, tl.where(run, h, 0.0), mask=ok if p_starts is None else run)
        else:
            tl.store(p_m + state, h, mask=ok)
        if p_cells is not None:
            p_cell = p_cells + (d.to(tl.int64) * N + place)[None, :] * H + units[:, None]
            tl.store(p_cell, tl.where(run, own, 0.0), mask=ok if p_starts is None else run)
        if SAVE:
            tl.store(p_gates, g0, mask=run)
            tl.store(p_gates + H, g1, mask=run)
            tl.store(p_gates + 2 * H, g2, mask=run)
            tl.store(p_gates + 3 * H, g3, mask=run)
        if p_lengths is not None:
            own = tl.where(run, own, carry)
        if p_reset is not None:
            if p_reset_carry is None:
                own = tl.where(anew, 0.0, own)
            else:
                given = tl.load(p_reset_carry + state, mask=ok & anew, other=0.0).to(tl.float32)
                own = tl.where(anew, given, own)
        carry = own
    if p_carry is not None:
        tl.store(p_carry + state, carry, mask=ok)


@triton.jit(do_not_specialize=["T", "B", "first"])
def project_kernel(
    p_w,  # [D, P, H] W_hr
    p_m,  # [D, B, H]
    p_h,  # [2, D, B, P]
    p_y,  # [N, D*P]
    p_reset, p_reset_h, p_lengths, p_starts,  # as in forward_kernel
    T, B, first,
    H: tl.constexpr, P: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_U: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """The second half of step `first` where there is a projection. Grid: tiles of P, tiles of the batch, directions."""
    d, D = tl.program_id(2), tl.num_programs(2)
    units, rows = tl.program_id(0) * BLOCK_U + tl.arange(0, BLOCK_U), tl.program_id(1) * BLOCK_B + tl.arange(0, BLOCK_B)
    unit_ok, row_ok = units < P, rows < B
    ok = unit_ok[:, None] & row_ok[None, :]
    vectors = (d * B + rows).to(tl.int64)
    state = vectors[None, :] * P + units[:, None]
    s = first
    t = s + d * (T - 1 - 2 * s)
    runs = row_ok
    if p_lengths is not None:
        runs = t < tl.load(p_lengths + rows, mask=row_ok, other=0)
    run = unit_ok[:, None] & runs[None, :]
    anew = run
    if p_reset is not None:
        anew = _starts_anew(p_reset, p_lengths, s, t, d, rows, row_ok, T, B)[None, :]
    h = product(
        None, p_w + (d * P + units).to(tl.int64) * H, unit_ok, p_m + vectors * H, row_ok,
        BLOCK_U, BLOCK_B, H, BLOCK_K, SPLIT, 1, PRECISION,
    )  # fmt: skip
    before, after = (s % 2) * D * B * P, ((s + 1) % 2) * D * B * P
    _hand_on(p_h, before + state, after + state, state, h, run, ok, anew, p_lengths, p_reset, p_reset_h)
    start = t.to(tl.int64) * B if p_starts is None else tl.load(p_starts + t)
    p_out = p_y + ((start + rows) * D + d)[None, :] * P + units[:, None]
    tl.store(p_out, tl.where(run, h, 0.0), mask=ok if p_starts is None else run)


@triton.jit
def _cut(grad, p_reset_grad, state, ok, anew):
    """What of a state's gradient goes on to the step before: where a reset has set the state, the reset takes it."""
    total = tl.load(p_reset_grad + state, mask=ok & anew, other=0.0)
    tl.store(p_reset_grad + state, total + grad, mask=ok & anew)
    return tl.where(anew, 0.0, grad)


@triton.jit(do_not_specialize=["T", "B", "N", "first", "steps"])
def backward_kernel(
    p_w,  # [D, H, K] W_hh^T; with a projection W_hr^T
    p_v,  # [D, N, V] what it multiplies: da, of which this kernel has written the step after; or all of dh_t
    p_dy,  # [N, D*H], unless there is a projection, or None for zeros
    p_dcells,  # [D, N, H] or None
    p_gates,  # [D, N, 4*H] or None
    p_before,  # [D, N, H] c, or h, before each step, or None
    p_after,  # c after it, likewise, or y, or None
    p_da,  # [D, N, A*H] the gradients of the pre-activations
    p_dh,  # [D, B, H] float32, dh_n and at the end dh0; None with a projection
    p_dc,  # [D, B, H] float32, dc_n and at the end dc0; or None
    p_dreset_h,  # [D, B, H] float32 zeros or None
    p_dreset_c,  # [D, B, H] float32 zeros or None
    p_reset, p_lengths, p_starts, p_count,  # as in forward_kernel
    T, B, N, first, steps,
    STEP_BACK: tl.constexpr, AFTER_IS_Y: tl.constexpr,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, A: tl.constexpr, PROJECTED: tl.constexpr,
    RESIDENT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_U: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr, SPLIT: tl.constexpr,
    AHEAD: tl.constexpr,
):  # fmt: skip
    """Steps of both directions from T-1-first down; step -1 takes the gradients to the initial state.

    Grid: tiles of units, tiles of the batch, directions.
    """
    d, D = tl.program_id(2), tl.num_programs(2)
    units, rows = tl.program_id(0) * BLOCK_U + tl.arange(0, BLOCK_U), tl.program_id(1) * BLOCK_B + tl.arange(0, BLOCK_B)
    unit_ok, row_ok = units < H, rows < B
    ok = unit_ok[:, None] & row_ok[None, :]
    state = (d * B + rows).to(tl.int64)[None, :] * H + units[:, None]
    p_vectors = p_w + (d * H + units).to(tl.int64) * K
    COUNT: tl.constexpr = (K + BLOCK_K * SPLIT - 1) // (BLOCK_K * SPLIT)
    weights = _chunks(p_vectors, unit_ok, COUNT, K, BLOCK_K, SPLIT, True) if RESIDENT else None
    if p_lengths is not None:
        length = tl.load(p_lengths + rows, mask=row_ok, other=0)
    dh = tl.zeros((BLOCK_U, BLOCK_B), tl.float32)
    dc = tl.zeros((BLOCK_U, BLOCK_B), tl.float32)
    if not PROJECTED:
        dh = tl.load(p_dh + state, mask=ok, other=0.0)
    if p_dc is not None:
        dc = tl.load(p_dc + state, mask=ok, other=0.0)
    if p_count is not None:
        p_count += d * tl.num_programs(1) + tl.program_id(1)

    for k in range(first, first + steps):
        s = T - 1 - k
        t = s + d * (T - 1 - 2 * s)
        later = t + 1 - 2 * d
        if p_lengths is None:
            runs = row_ok & (s >= 0)
            ran = row_ok & (k > 0)
        else:
            runs = (t < length) & (s >= 0)
            ran = (later < length) & (k > 0)
        run = unit_ok[:, None] & runs[None, :]
        if p_starts is None:
            start, start_later = t.to(tl.int64) * B, later.to(tl.int64) * B
        else:
            start = tl.load(p_starts + t, mask=s >= 0, other=0)
            start_later = tl.load(p_starts + later, mask=k > 0, other=0)
        place = d.to(tl.int64) * N + start + rows
        tile = place[None, :] * H + units[:, None]
        dy = tl.zeros((BLOCK_U, BLOCK_B), tl.float32)
        if p_dy is not None:
            dy = tl.load(p_dy + ((start + rows) * D + d)[None, :] * H + units[:, None], mask=run, other=0.0)
            dy = dy.to(tl.float32)
        g0, g1, g2, g3, before, after = dy, dy, dy, dy, dy, dy
        if p_gates is not None:
            p_gate = p_gates + place[None, :] * (4 * H) + units[:, None]
            g0 = tl.load(p_gate, mask=run, other=0.0).to(tl.float32)
            g1 = tl.load(p_gate + H, mask=run, other=0.0).to(tl.float32)
            g2 = tl.load(p_gate + 2 * H, mask=run, other=0.0).to(tl.float32)
            g3 = tl.load(p_gate + 3 * H, mask=run, other=0.0).to(tl.float32)
        if p_before is not None:
            before = tl.load(p_before + tile, mask=run, other=0.0).to(tl.float32)
        if p_after is not None:
            index = (start + rows) * D + d if AFTER_IS_Y else place
            after = tl.load(p_after + index[None, :] * H + units[:, None], mask=run, other=0.0).to(tl.float32)

        if p_count is not None:
            if k > first:
                _wait(p_count, (k - first) * tl.num_programs(0))
        elif RESIDENT:
            tl.debug_barrier()  # its own stores of the step before
        acc = product(
            weights, p_vectors, unit_ok,
            p_v + (place if PROJECTED else d.to(tl.int64) * N + start_later + rows) * V, runs if PROJECTED else ran,
            BLOCK_U, BLOCK_B, K, BLOCK_K, SPLIT, AHEAD, PRECISION,
        )  # fmt: skip
        dh += acc
        if p_reset is not None:
            anew = _starts_anew(p_reset, p_lengths, s, t, d, rows, row_ok, T, B)[None, :]
            if not PROJECTED:
                dh = _cut(dh, p_dreset_h, state, ok, anew)
            if p_dc is not None:
                dc = _cut(dc, p_dreset_c, state, ok, anew)
        dh_t, dc_t = dh + dy, dc
        if p_dcells is not None:
            dc_t += tl.load(p_dcells + tile, mask=run, other=0.0).to(tl.float32)
        a0, a1, a2, a3, dh_before, dc_before = STEP_BACK(dh_t, dc_t, g0, g1, g2, g3, before, after)

        # Where there are no places for rows that do not run, nobody reads any; elsewhere the sums over all places do.
        stored = run if p_starts is not None else ok & (s >= 0)
        p_grad = p_da + place[None, :] * (A * H) + units[:, None]
        tl.store(p_grad, tl.where(run, a0, 0.0), mask=stored)
        if A > 1:
            tl.store(p_grad + H, tl.where(run, a1, 0.0), mask=stored)
            tl.store(p_grad + 2 * H, tl.where(run, a2, 0.0), mask=stored)
            tl.store(p_grad + 3 * H, tl.where(run, a3, 0.0), mask=stored)
        if p_count is not None:
            _signal(p_count)
        dh, dc = tl.where(run, dh_before, dh), tl.where(run, dc_before, dc)
        if PROJECTED:
            dh = tl.zeros((BLOCK_U, BLOCK_B), tl.float32)
    if not PROJECTED:
        tl.store(p_dh + state, dh, mask=ok)
    if p_dc is not None:
        tl.store(p_dc + state, dc, mask=ok)


@triton.jit(do_not_specialize=["T", "B", "N", "first"])
def project_back_kernel(
    p_w,  # [D, P, K] W_hh^T
    p_v,  # [D, N, K] da
    p_dy,  # [N, D*P] or None
    p_dh_all,  # [D, N, P] all that reaches each h_t
    p_dh,  # [D, B, P] float32, dh_n and at the end dh0
    p_dreset_h,  # [D, B, P] float32 or None
    p_reset, p_lengths, p_starts,  # as in forward_kernel
    T, B, N, first,
    P: tl.constexpr, K: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_U: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """The first half of step T-1-first of backward where there is a projection: the gradient of what it gave.

    Grid: tiles of P, tiles of the batch, directions.
    """
    d, D = tl.program_id(2), tl.num_programs(2)
    units, rows = tl.program_id(0) * BLOCK_U + tl.arange(0, BLOCK_U), tl.program_id(1) * BLOCK_B + tl.arange(0, BLOCK_B)
    unit_ok, row_ok = units < P, rows < B
    ok = unit_ok[:, None] & row_ok[None, :]
    state = (d * B + rows).to(tl.int64)[None, :] * P + units[:, None]
    s = T - 1 - first
    t = s + d * (T - 1 - 2 * s)
    later = t + 1 - 2 * d
    runs, ran = row_ok & (s >= 0), row_ok & (first > 0)
    if p_lengths is not None:
        length = tl.load(p_lengths + rows, mask=row_ok, other=0)
        runs, ran = runs & (t < length), ran & (later < length)
    run = unit_ok[:, None] & runs[None, :]
    if p_starts is None:
        start, start_later = t.to(tl.int64) * B, later.to(tl.int64) * B
    else:
        start = tl.load(p_starts + t, mask=s >= 0, other=0)
        start_later = tl.load(p_starts + later, mask=first > 0, other=0)
    dh = tl.load(p_dh + state, mask=ok, other=0.0)
    dh += product(
        None, p_w + (d * P + units).to(tl.int64) * K, unit_ok, p_v + (d.to(tl.int64) * N + start_later + rows) * K, ran,
        BLOCK_U, BLOCK_B, K, BLOCK_K, SPLIT, 1, PRECISION,
    )  # fmt: skip
    if p_reset is not None:
        anew = _starts_anew(p_reset, p_lengths, s, t, d, rows, row_ok, T, B)[None, :]
        dh = _cut(dh, p_dreset_h, state, ok, anew)
    tl.store(p_dh + state, tl.where(run, 0.0, dh), mask=ok)
    if p_dy is not None:
        p_tile = p_dy + ((start + rows) * D + d)[None, :] * P + units[:, None]
        dh += tl.load(p_tile, mask=run, other=0.0).to(tl.float32)
    p_out = p_dh_all + (d.to(tl.int64) * N + start + rows)[None, :] * P + units[:, None]
    tl.store(p_out, tl.where(run, dh, 0.0), mask=run if p_starts is not None else ok & (s >= 0))


@functools.cache
def _chip(device: torch.device) -> Chip:
    if device.type != "cuda":  # the interpreter, which runs one program after the other
        return Chip(1, 1 << 20, 0)
    properties = torch.cuda.get_device_properties(device)
    capability = 10 * properties.major + properties.minor
    return Chip(properties.multi_processor_count, properties.shared_memory_per_block_optin, capability)


def _precision(dtype: torch.dtype) -> str:
    """How float32 is multiplied, as in torch's own layers: by tensor cores as TF32 if allowed, or without them."""
    return "ieee" if dtype == torch.float32 and not allows_tf32() else "tf32"


class Runtime(NamedTuple):
    """What a call asks about its surroundings."""

    chip: Callable[[torch.device], Chip] = _chip
    precision: Callable[[torch.dtype], str] = _precision
    run: Callable[[list[Launch], int, torch.device], None] = run


class Launcher:
    """Makes the launches of one call."""

    def __init__(self, layer: Layer, runtime: Runtime) -> None:
        self.layer, self.chip, self.precision = layer, runtime.chip(layer.device), runtime.precision(layer.dtype)

    def product(self, outputs: int, K: int, stack: int = 1) -> Product:
        layer = self.layer
        return Product(stack, outputs, K, layer.B, layer.D, layer.dtype.itemsize, self.precision == "ieee")

    def launch(self, kernel: Any, chosen: Plan, outputs: int, **arguments: Any) -> Launch:
        """A launch of the kernel for as many outputs, with what all kernels take."""
        layer = self.layer
        return Launch(
            kernel,
            chosen.grid(outputs, layer.B, layer.D),
            dict(
                **arguments,
                p_reset=layer.reset,
                p_lengths=layer.lengths,
                p_starts=layer.starts,
                T=layer.T,
                B=layer.B,
                PRECISION=self.precision,
                **chosen.options,
            ),
        )

    def launch_gates(self, kernel: Any, chosen: Plan, steps: int, **arguments: Any) -> Launch:
        """The same for forward_kernel and backward_kernel, which have both forms."""
        layer = self.layer
        group, *groups = chosen.grid(layer.H, layer.B, layer.D)
        waits = chosen.persistent and group > 1
        return self.launch(
            kernel,
            chosen,
            layer.H,
            **arguments,
            p_count=torch.zeros(groups, dtype=torch.int32, device=layer.device) if waits else None,
            N=layer.N,
            H=layer.H,
            steps=steps if chosen.persistent else 1,
            RESIDENT=chosen.persistent,
            AHEAD=chosen.ahead,
            launch_cooperative_grid=waits,
        )


class Steps(NamedTuple):
    """The loops over one op's steps."""

    cell: Cell
    step: Callable[..., Any]
    step_back: Callable[..., Any]
    runtime: Runtime = Runtime()

    @property
    def stack(self) -> int:
        """The tiles in the stack of one forward product."""
        return 1 if self.cell.gates == 1 else 4

    def forward(self, layer: Layer, call: Forward) -> Tensor:
        """As `fastseq.ops.recurrent_steps.Steps` says; each step swaps the states before and after it."""
        to, new = Launcher(layer, self.runtime), call.y.new_empty
        H, P, G, projected = layer.H, layer.P, self.cell.gates, layer.w_hr is not None
        h = new(2, *call.h0.shape)
        h[0] = call.h0
        m = new(layer.D, layer.B, H) if projected else None
        product = to.product(H, P, self.stack)
        chosen = stepwise(product, to.chip) if projected else plan(product, layer.T, to.chip)
        launches = [
            to.launch_gates(
                forward_kernel, chosen, layer.T,
                p_pre=call.pre, p_w=stacked(layer.w_hh), p_b=call.inner_bias, p_h=h, p_carry=call.carry, p_m=m,
                p_y=call.y, p_cells=call.cells, p_reset_h=call.reset_h, p_reset_carry=call.reset_carry,
                STEP=self.step, G=G, K=P, PRE=call.pre.shape[-1], SAVE=call.save,
            )
        ]  # fmt: skip
        if projected:
            half = stepwise(to.product(P, H), to.chip)
            launches += [
                to.launch(
                    project_kernel, half, P,
                    p_w=layer.w_hr, p_m=m, p_h=h, p_y=call.y, p_reset_h=call.reset_h, H=H, P=P,
                )
            ]  # fmt: skip
        self.runtime.run(launches, 1 if chosen.persistent else layer.T, layer.device)
        return h[layer.T % 2]

    def backward(self, layer: Layer, call: Backward) -> None:
        to = Launcher(layer, self.runtime)
        H, P, K, A = layer.H, layer.P, self.cell.gates * layer.H, self.cell.slots
        projected = layer.w_hr is not None
        w_hh_t = stacked([w.t() for w in layer.w_hh])
        product = to.product(H, P if projected else K)
        chosen = stepwise(product, to.chip) if projected else plan(product, layer.T, to.chip)
        launches = [
            to.launch_gates(
                backward_kernel, chosen, layer.T + 1,
                p_w=layer.w_hr.transpose(1, 2).contiguous() if projected else w_hh_t,
                p_v=call.dh_all if projected else call.da, p_dy=None if projected else call.dy,
                p_dcells=call.dcells, p_gates=call.gates, p_before=call.before, p_after=call.after, p_da=call.da,
                p_dh=None if projected else call.dh, p_dc=call.dc,
                p_dreset_h=None if projected else call.dreset_h, p_dreset_c=call.dreset_c,
                STEP_BACK=self.step_back, AFTER_IS_Y=not self.cell.has_cell, PROJECTED=projected,
                K=P if projected else K, V=P if projected else A * H, A=A,
            )
        ]  # fmt: skip
        if projected:
            through = to.launch(
                project_back_kernel, stepwise(to.product(P, K), to.chip), P,
                p_w=w_hh_t, p_v=call.da, p_dy=call.dy, p_dh_all=call.dh_all, p_dh=call.dh, p_dreset_h=call.dreset_h,
                N=layer.N, P=P, K=K,
            )  # fmt: skip
            launches = [through, *launches]
        self.runtime.run(launches, 1 if chosen.persistent else layer.T + 1, layer.device)


# The A100, H100 and B200, by compute capability.
CHIPS = {80: Chip(108, 163 << 10, 80), 90: Chip(132, 227 << 10, 90), 100: Chip(148, 227 << 10, 100)}


def once(launches: list[Launch], steps: int, device: torch.device) -> None:
    """Stands for `run` where launches are caught: each comes once."""
    for launch in launches:
        launch(0)


def ahead_of_time(steps: Steps) -> dict[str, Callable[..., None]]:
    """What is compiled and looked at without a GPU: by the name of a configuration a function of a dtype, and of the
    compute capability to plan for, that calls the op's host code on tensors without memory and launches each kernel
    once, for whoever catches the launches.

    The sizes that are to be fast come first; then one of each feature.
    """

    def configuration(H: int, B: int, P: int = 0, precision: str = "tf32", full: bool = False):  # type: ignore[no-untyped-def]
        def training(dtype: torch.dtype, capability: int = 80) -> None:
            def empty(*shape: int, of: torch.dtype = dtype) -> Tensor:
                return torch.empty(shape, dtype=of, device="meta")

            T, D, cell = 512, 2 if full else 1, steps.cell
            runtime = Runtime(lambda _: CHIPS[capability], lambda _: precision, once)
            forward, backward = implementation(steps._replace(runtime=runtime))
            shapes = [(cell.gates * H, H), (cell.gates * H, P or H), (cell.gates * H,), (cell.gates * H,)]
            weights = [empty(*shape) for shape in [*shapes, *([(P, H)] if P else [])]] * D
            h, c = empty(D, B, P or H), empty(D, B, H) if cell.has_cell else None
            inputs = (empty(T, B, H), h, c, weights, full)
            options = (empty(B, of=torch.int64), empty(T, B, of=torch.bool), h, c) if full else (None,) * 4
            y, _, _, gates, cells = forward(*inputs, True, False, None, *options)
            needs = [True] * (5 + len(weights))
            backward(y, h, c, None, *inputs, None, *options, y, gates, cells, needs)

        return training

    main = {f"H={H}, B={B}": configuration(H, B) for B in (16, 64) for H in (512, 1024, 256, 768)}
    return {
        **main,
        "H=512, B=1, both directions, lengths, resets": configuration(512, 1, full=True),
        "H=200, B=3, both directions, lengths, resets": configuration(200, 3, full=True),
        "H=4096, B=64": configuration(4096, 64),
        "H=512, B=16, float32 without TF32": configuration(512, 16, precision="ieee"),
        **({"H=512, B=16, P=128": configuration(512, 16, P=128)} if steps.cell.has_cell else {}),
    }
