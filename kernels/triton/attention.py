"""Attention on NVIDIA's GPUs: `fastseq::attention`, tile by tile with an online softmax (Dao 2023, arXiv:2307.08691).

Formulas are in `fastseq.reference.attention`. Scores are in units of log 2 here, for the hardware's exp2. Nothing is
added up by atomics: each sum has one order, and results are the same to the bit from run to run.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastseq import jit
from fastseq.kernels.triton.dropout import halves_of, keeps_of
from fastseq.ops.attention import AVERAGE, EACH_HEAD, NO_WEIGHTS, Arguments, Case, empty_like_heads
from fastseq.reference.dropout import dropped_of, kept_factor

INTERPRETED = tl.constexpr(jit.is_interpreted())
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
INF = tl.constexpr(float("inf"))
# What changes from call to call and must not be compiled in.
SIZES = ["L", "S", "left", "right", "seed_low", "seed_high"]


class Problem(NamedTuple):
    """What every kernel is told about a call. What is in capitals is compiled in.

    Attributes:
        query: [N, H, L, E]; pointers, None for what there is not.
        key: [N, Hk, S, E]
        value: [N, Hk, S, EV]
        mask: [N, H, L, S]
        padding: [N, S]
        slopes: [H]
        ends_q: [N + 1] on the device.
        ends_k: [N + 1]
        at_query: strides of query, and so on.
        dropped: how many of 65536 draws drop a weight.
        kept: what the other weights are multiplied by.
        GROUP: H / Hk
        BOOL: whether the mask is boolean.
        MASKED: whether there is a mask or padding.
        LEFT, RIGHT: whether there is a bound on this side.
    """

    query: Any
    key: Any
    value: Any
    mask: Any
    padding: Any
    slopes: Any
    ends_q: Any
    ends_k: Any
    at_query: Any
    at_key: Any
    at_value: Any
    at_mask: Any
    at_padding: Any
    H: Any
    scale: Any
    softcap: Any
    dropped: Any
    kept: Any
    E: Any
    EV: Any
    GROUP: Any
    BOOL: Any
    MASKED: Any
    LEFT: Any
    RIGHT: Any
    BOTTOM_RIGHT: Any
    SOFTCAP: Any
    DROPOUT: Any
    PRECISION: Any


@triton.jit
def _dot(a, b, problem):
    # The interpreter would multiply the bits of bfloat16.
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    return tl.dot(a, b, input_precision=problem.PRECISION)


@triton.jit
def _sequence(ends, n, length):
    """Where sequence n begins, how long it is, and its place in the batch."""
    if ends is None:
        return tl.cast(0, tl.int64), length, n.to(tl.int64)
    else:
        first = tl.load(ends + n)
        return first, (tl.load(ends + n + 1) - first).to(tl.int32), tl.cast(0, tl.int64)


@triton.jit
def _rows(p, at, first, count, ROWS: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr):
    """Pointers to a tile of rows from `first`, of which `count` there are, and which of its elements exist."""
    row, column = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    # A tensor may have more than 2**31 elements, a tile not.
    p += tl.cast(first, tl.int64) * at[2]
    there = (row < count - first)[:, None]
    if WIDTH != COLUMNS:
        there = there & (column < WIDTH)[None, :]
    return p + row[:, None] * at[2] + column[None, :] * at[3], there


@triton.jit
def _head(p, at, n, h):
    return p + n * at[0] + tl.cast(h, tl.int64) * at[1]


@triton.jit
def _load_rows(p, at, first, count, ROWS: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr):
    p, there = _rows(p, at, first, count, ROWS, WIDTH, COLUMNS)
    return tl.load(p, mask=there, other=0.0)


@triton.jit
def _keys_there(problem, n, S):
    """How many keys there are up to the last that is no padding."""
    if problem.padding is None:
        return S
    else:
        end = tl.cast(0, tl.int32)
        for first in range(0, S, 1024):
            s = first + tl.arange(0, 1024)
            padded = tl.load(problem.padding + n * problem.at_padding[0] + s * problem.at_padding[1], s < S, other=1)
            end = tl.maximum(end, tl.max(tl.where(padded == 0, s + 1, 0), 0))
        return end


@triton.jit
def _slope(problem, h):
    if problem.slopes is None:
        return 0.0
    else:
        return tl.load(problem.slopes + h).to(tl.float32)


@triton.jit
def _span(first, last, ahead, length, before, after, BEFORE: tl.constexpr, AFTER: tl.constexpr, BLOCK: tl.constexpr):
    """The keys that rows `first` to `last` see, if row i sees from i + ahead - before to i + ahead + after.

    Returns:
        four multiples of BLOCK, rising: some rows may see keys between the first two and the last two, and all rows see
        all keys between the second and the third.
    """
    begin, begin_all, end, end_all = tl.cast(0, tl.int32), tl.cast(0, tl.int32), length, length
    if BEFORE:
        begin = tl.maximum(begin, first + ahead - before) // BLOCK * BLOCK
        begin_all = tl.cdiv(tl.maximum(begin_all, last + ahead - before), BLOCK) * BLOCK
    if AFTER:
        end = tl.minimum(end, last + ahead + after + 1)
        end_all = tl.minimum(end_all, first + ahead + after + 1)
    end = tl.maximum(tl.cdiv(end, BLOCK) * BLOCK, begin)
    begin_all = tl.minimum(begin_all, end)
    end_all = tl.maximum(tl.maximum(end_all, 0) // BLOCK * BLOCK, begin_all)
    return begin, begin_all, tl.minimum(end_all, end), end


@triton.jit
def _scores(raw, l, s, L, S, left, right, ahead, n, h, slope, problem, BOUNDED: tl.constexpr):
    """Scores in units of log 2 from the products of queries l and keys s, -inf for what is left out.

    Either of l and s runs along either dimension.

    Returns:
        the scores; which keys are seen, if BOUNDED or MASKED; the derivative of softcap's tanh, if there is one.
    """
    x = raw * problem.scale
    steepness = x
    if problem.SOFTCAP:
        bend = 2 * tl.sigmoid(2 * x / problem.softcap) - 1  # tanh
        x = problem.softcap * bend
        steepness = 1 - bend * bend
    if problem.slopes is not None:
        x -= slope * tl.abs(l + ahead - s).to(tl.float32)
    seen = (s < S) & (l < L)
    if BOUNDED:
        if problem.LEFT:
            seen = seen & (s >= l + ahead - left)
        if problem.RIGHT:
            seen = seen & (s <= l + ahead + right)
    if problem.padding is not None:
        padded = tl.load(problem.padding + n * problem.at_padding[0] + s * problem.at_padding[1], mask=s < S, other=1)
        seen = seen & (padded == 0)
    if problem.mask is not None:
        p = _head(problem.mask, problem.at_mask, n, h)
        p += l.to(tl.int64) * problem.at_mask[2] + s * problem.at_mask[3]
        there = (l < L) & (s < S)
        if problem.BOOL:
            seen = seen & (tl.load(p, mask=there, other=0) != 0)
        else:
            added = tl.load(p, mask=there, other=-INF).to(tl.float32)
            x += added
            seen = seen & (added != -INF)
    x *= LOG2E
    if BOUNDED or problem.MASKED:
        # Not a sum with -inf, which a NaN in a key that is left out would survive.
        x = tl.where(seen, x, -INF)
    return x, seen, steepness


@triton.jit
def _add_tiles(
    m, total, acc, q, p_key, p_value, begin, end, l, L, S, left, right, ahead, n, b, h, slope, seed_low, seed_high,
    problem, BOUNDED: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Forward's loop over tiles of keys: the running maximum, sum and weighted values of a tile of queries."""
    for first in range(begin, end, BLOCK_S):
        s = first + tl.arange(0, BLOCK_S)
        k = _load_rows(p_key, problem.at_key, first, S, BLOCK_S, problem.E, BLOCK_E)
        raw = _dot(q, tl.trans(k), problem)
        x, _, _ = _scores(raw, l[:, None], s[None, :], L, S, left, right, ahead, b, h, slope, problem, BOUNDED)
        highest = tl.maximum(m, tl.max(x, 1))
        base = tl.where(highest == -INF, 0.0, highest)
        weight = tl.exp2(x - base[:, None])
        faded = tl.exp2(m - base)
        total = total * faded + tl.sum(weight, 1)
        if problem.DROPOUT:
            keeps = keeps_of(l, first, n * problem.H + h, seed_low, seed_high, problem.dropped, BLOCK_S, BLOCK_L, False)
            weight = tl.where(keeps, weight, 0.0)
        p, there = _rows(p_value, problem.at_value, first, S, BLOCK_S, problem.EV, BLOCK_V)
        if problem.padding is not None:
            padded = tl.load(problem.padding + b * problem.at_padding[0] + s * problem.at_padding[1], s < S, other=1)
            there = there & (padded == 0)[:, None]
        v = tl.load(p, mask=there, other=0.0)
        acc = acc * faded[:, None] + _dot(weight.to(v.dtype), v, problem)
        m = highest
    return m, total, acc


@triton.jit(do_not_specialize=[*SIZES, "parts"])
def _forward(
    problem, p_out, at_out, p_lse, p_spoilt, L, S, left, right, seed_low, seed_high, parts, blocks, lse_of_part,
    out_of_part,
    BLOCK_L: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_V: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """out and lse of BLOCK_L queries of one head; with SPLIT, of the keys' share of one of `parts` programs.

    p_spoilt, like p_lse, gets which rows of out have elements that are not finite.
    """
    total_L = L
    block = tl.program_id(0) % blocks
    rest = tl.program_id(0) // blocks
    part = rest % parts
    n = rest // parts // problem.H
    h = rest // parts % problem.H
    if problem.RIGHT:
        block = blocks - 1 - block  # those that see most keys first
    q_begin, L, b = _sequence(problem.ends_q, n, L)
    k_begin, S, b = _sequence(problem.ends_k, n, S)
    first_l = block * BLOCK_L
    if first_l >= L:
        return
    l = first_l + tl.arange(0, BLOCK_L)
    ahead = S - L if problem.BOTTOM_RIGHT else 0
    slope = _slope(problem, h)
    p_query = _head(problem.query, problem.at_query, b, h) + q_begin * problem.at_query[2]
    p_key = _head(problem.key, problem.at_key, b, h // problem.GROUP) + k_begin * problem.at_key[2]
    p_value = _head(problem.value, problem.at_value, b, h // problem.GROUP) + k_begin * problem.at_value[2]
    q = _load_rows(p_query, problem.at_query, first_l, L, BLOCK_L, problem.E, BLOCK_E)
    last = tl.minimum(first_l + BLOCK_L, L) - 1
    c0, c1, c2, c3 = _span(
        first_l, last, ahead, _keys_there(problem, b, S), left, right, problem.LEFT, problem.RIGHT, BLOCK_S
    )
    if SPLIT:
        share = tl.cdiv((c3 - c0) // BLOCK_S, parts) * BLOCK_S
        low = tl.minimum(c0 + part * share, c3)
        high = tl.minimum(low + share, c3)
        c0, c3 = low, high
        c1 = tl.minimum(tl.maximum(c1, low), high)
        c2 = tl.minimum(tl.maximum(c2, low), high)
    m = tl.full((BLOCK_L,), -INF, tl.float32)
    total = tl.zeros((BLOCK_L,), tl.float32)
    acc = tl.zeros((BLOCK_L, BLOCK_V), tl.float32)
    if problem.LEFT:
        m, total, acc = _add_tiles(
            m, total, acc, q, p_key, p_value, c0, c1, l, L, S, left, right, ahead, n, b, h, slope, seed_low,
            seed_high, problem, True, BLOCK_L, BLOCK_S, BLOCK_E, BLOCK_V,
        )  # fmt: skip
    m, total, acc = _add_tiles(
        m, total, acc, q, p_key, p_value, c1, c2, l, L, S, left, right, ahead, n, b, h, slope, seed_low, seed_high,
        problem, False, BLOCK_L, BLOCK_S, BLOCK_E, BLOCK_V,
    )  # fmt: skip
    m, total, acc = _add_tiles(
        m, total, acc, q, p_key, p_value, c2, c3, l, L, S, left, right, ahead, n, b, h, slope, seed_low, seed_high,
        problem, True, BLOCK_L, BLOCK_S, BLOCK_E, BLOCK_V,
    )  # fmt: skip
    anything = total != 0
    if problem.DROPOUT:
        acc *= problem.kept
    acc /= tl.where(anything, total, 1.0)[:, None]
    lse = tl.where(anything, (m + tl.log2(total)) * LN2, -INF)
    row = part * lse_of_part + (b * problem.H + h) * total_L + q_begin + l
    tl.store(p_lse + row, lse, mask=l < L)
    p = _head(p_out, at_out, b, h) + part * out_of_part + q_begin * at_out[2]
    p, there = _rows(p, at_out, first_l, L, BLOCK_L, problem.EV, BLOCK_V)
    tl.store(p, acc.to(p_out.dtype.element_ty), mask=there)
    if p_spoilt is not None:
        spoilt = tl.max(tl.where(tl.abs(acc) < INF, 0, 1), 1)
        tl.store(p_spoilt + row, spoilt.to(tl.int8), mask=l < L)


@triton.jit(do_not_specialize=[*SIZES, "parts"])
def _repair(
    problem, p_out, at_out, p_lse, p_spoilt, L, S, left, right, seed_low, seed_high, parts, blocks, lse_of_part,
    BLOCK_L: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Takes out of rows what values that they do not see have done to them: 0 * inf is NaN.

    Nearly always there is nothing to do. In _forward, this would cost registers whether it is done or not.
    """
    total_L = L
    block = tl.program_id(0) % blocks
    h = tl.program_id(0) // blocks % problem.H
    n = tl.program_id(0) // blocks // problem.H
    if problem.RIGHT:
        block = blocks - 1 - block
    q_begin, L, b = _sequence(problem.ends_q, n, L)
    k_begin, S, b = _sequence(problem.ends_k, n, S)
    first_l = block * BLOCK_L
    if first_l >= L:
        return
    l = first_l + tl.arange(0, BLOCK_L)
    row = (b * problem.H + h) * total_L + q_begin + l
    spoilt = tl.zeros((BLOCK_L,), tl.int32)
    for part in range(parts):
        spoilt += tl.load(p_spoilt + part * lse_of_part + row, mask=l < L, other=0).to(tl.int32)
    if tl.max(spoilt, 0) == 0:
        return
    ahead = S - L if problem.BOTTOM_RIGHT else 0
    slope = _slope(problem, h)
    p_query = _head(problem.query, problem.at_query, b, h) + q_begin * problem.at_query[2]
    p_key = _head(problem.key, problem.at_key, b, h // problem.GROUP) + k_begin * problem.at_key[2]
    p_value = _head(problem.value, problem.at_value, b, h // problem.GROUP) + k_begin * problem.at_value[2]
    q = _load_rows(p_query, problem.at_query, first_l, L, BLOCK_L, problem.E, BLOCK_E)
    lse = tl.load(p_lse + row, mask=l < L, other=0.0)
    lse = tl.where(lse == -INF, 0.0, lse) * LOG2E
    clean = tl.zeros((BLOCK_L, BLOCK_V), tl.float32)
    reached = tl.zeros((BLOCK_L, BLOCK_V), tl.float32)
    for first in tl.range(0, S, BLOCK_S, num_stages=1):
        s = first + tl.arange(0, BLOCK_S)
        k = _load_rows(p_key, problem.at_key, first, S, BLOCK_S, problem.E, BLOCK_E)
        raw = _dot(q, tl.trans(k), problem)
        x, seen, _ = _scores(raw, l[:, None], s[None, :], L, S, left, right, ahead, b, h, slope, problem, True)
        weight = tl.exp2(x - lse[:, None])
        if problem.DROPOUT:
            keeps = keeps_of(l, first, n * problem.H + h, seed_low, seed_high, problem.dropped, BLOCK_S, BLOCK_L, False)
            weight = tl.where(keeps, weight * problem.kept, 0.0)
        v = _load_rows(p_value, problem.at_value, first, S, BLOCK_S, problem.EV, BLOCK_V)
        finite = tl.abs(v.to(tl.float32)) < INF
        clean += _dot(weight.to(v.dtype), tl.where(finite, v, 0.0), problem)
        # Counts, of which any dtype holds enough to tell one from none.
        reached += _dot(seen.to(tl.float32).to(v.dtype), tl.where(finite, 0.0, 1.0).to(v.dtype), problem)
    p = _head(p_out, at_out, b, h) + q_begin * at_out[2]
    p, there = _rows(p, at_out, first_l, L, BLOCK_L, problem.EV, BLOCK_V)
    tl.store(p, clean.to(p_out.dtype.element_ty), mask=there & (reached == 0))


@triton.jit
def _merge(
    p_parts, p_lses, p_out, at_out, p_lse, H, L, parts, lse_of_part, out_of_part,
    PARTS: tl.constexpr, EV: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """One row of out and lse from those that _forward has made of each share of the keys."""
    row = tl.program_id(0).to(tl.int64)
    l, h, n = row % L, row // L % H, row // L // H
    part, column = tl.arange(0, PARTS), tl.arange(0, BLOCK_V)
    lse = tl.load(p_lses + part * lse_of_part + row, mask=part < parts, other=-INF)
    highest = tl.max(lse, 0)
    share = tl.exp2((lse - tl.where(highest == -INF, 0.0, highest)) * LOG2E)
    total = tl.sum(share, 0)
    anything = total != 0
    there = (part < parts)[:, None] & (column < EV)[None, :]
    rows = tl.load(
        p_parts + part[:, None].to(tl.int64) * out_of_part + row * EV + column[None, :], mask=there, other=0.0
    )
    out = tl.sum(tl.where(share[:, None] > 0, rows * share[:, None], 0.0), 0) / tl.where(anything, total, 1.0)
    # A share that is NaN or spoilt is not hidden by the comparison above.
    out = tl.where(total == total, out, total)
    p = _head(p_out, at_out, n, h) + l * at_out[2] + column * at_out[3]
    tl.store(p, out.to(p_out.dtype.element_ty), mask=column < EV)
    tl.store(p_lse + row, tl.where(anything, highest + tl.log2(total) * LN2, -INF))


@triton.jit(do_not_specialize=SIZES)
def _weights(
    problem, p_weights, p_lse, L, S, left, right, seed_low, seed_high, blocks_l, blocks_s,
    AVERAGED: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """A tile of [N, H, L, S], what values are summed with; or of [N, L, S], their mean over the heads."""
    first_l = tl.program_id(0) // blocks_s % blocks_l * BLOCK_L
    first_s = tl.program_id(0) % blocks_s * BLOCK_S
    at = tl.program_id(0) // blocks_s // blocks_l
    n = at if AVERAGED else at // problem.H
    own_h = 0 if AVERAGED else at % problem.H
    b = n.to(tl.int64)
    l, s = first_l + tl.arange(0, BLOCK_L), first_s + tl.arange(0, BLOCK_S)
    ahead = S - L if problem.BOTTOM_RIGHT else 0
    sums = tl.zeros((BLOCK_L, BLOCK_S), tl.float32)
    for i in range(problem.H if AVERAGED else 1):
        h = own_h + i
        p_query, p_key = (
            _head(problem.query, problem.at_query, b, h),
            _head(problem.key, problem.at_key, b, h // problem.GROUP),
        )
        q = _load_rows(p_query, problem.at_query, first_l, L, BLOCK_L, problem.E, BLOCK_E)
        k = _load_rows(p_key, problem.at_key, first_s, S, BLOCK_S, problem.E, BLOCK_E)
        x, _, _ = _scores(
            _dot(q, tl.trans(k), problem), l[:, None], s[None, :], L, S, left, right, ahead, b, h, _slope(problem, h),
            problem, True,
        )  # fmt: skip
        lse = tl.load(p_lse + (b * problem.H + h) * L + l, mask=l < L, other=0.0)
        weight = tl.exp2(x - tl.where(lse == -INF, 0.0, lse)[:, None] * LOG2E)
        if problem.DROPOUT:
            keeps = keeps_of(
                l, first_s, n * problem.H + h, seed_low, seed_high, problem.dropped, BLOCK_S, BLOCK_L, False
            )
            weight = tl.where(keeps, weight * problem.kept, 0.0)
        sums += weight
    if AVERAGED:
        sums /= problem.H
    p = p_weights + at.to(tl.int64) * L * S + l[:, None].to(tl.int64) * S + s[None, :]
    tl.store(p, sums.to(p_weights.dtype.element_ty), mask=(l < L)[:, None] & (s < S)[None, :])


@triton.jit
def _deltas(
    p_dout, at_dout, p_out, at_out, p_dlse, at_dlse, p_delta, H, L, blocks,
    EV: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """[N, H, L] what is taken from each gradient of a weight: the sum of dout * out, less dlse."""
    first_l = tl.program_id(0) % blocks * BLOCK_L
    h, n = tl.program_id(0) // blocks % H, (tl.program_id(0) // blocks // H).to(tl.int64)
    l = first_l + tl.arange(0, BLOCK_L)
    delta = tl.zeros((BLOCK_L,), tl.float32)
    if p_dout is not None:
        dout = _load_rows(_head(p_dout, at_dout, n, h), at_dout, first_l, L, BLOCK_L, EV, BLOCK_V).to(tl.float32)
        out = _load_rows(_head(p_out, at_out, n, h), at_out, first_l, L, BLOCK_L, EV, BLOCK_V).to(tl.float32)
        delta += tl.sum(dout * out, 1)
    if p_dlse is not None:
        p = _head(p_dlse, at_dlse, n, h) + l.to(tl.int64) * at_dlse[2]
        delta -= tl.load(p, mask=l < L, other=0.0).to(tl.float32)
    tl.store(p_delta + (n * H + h) * L + l, delta, mask=l < L)


@triton.jit
def _score_gradients(dweight, weight, delta, keeps, seen, steepness, problem, BOUNDED: tl.constexpr):
    """Gradients of scores, before softcap if its steepness is given, and the weights that values were summed with."""
    used = weight
    if problem.DROPOUT:
        used = tl.where(keeps, weight * problem.kept, 0.0)
        dweight = tl.where(keeps, dweight * problem.kept, 0.0)
    dscore = weight * (dweight - delta)
    if problem.SOFTCAP and steepness is not None:
        dscore *= steepness
    if BOUNDED or problem.MASKED:
        used = tl.where(seen, used, 0.0)
        dscore = tl.where(seen, dscore, 0.0)
    return dscore, used


@triton.jit
def _add_query_gradients(
    dq, q, dout, lse, delta, p_key, p_value, begin, end, l, L, S, left, right, ahead, n, b, h, slope, seed_low,
    seed_high, problem, BOUNDED: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_V: tl.constexpr,
):  # fmt: skip
    for first in range(begin, end, BLOCK_S):
        s = first + tl.arange(0, BLOCK_S)
        k = _load_rows(p_key, problem.at_key, first, S, BLOCK_S, problem.E, BLOCK_E)
        v = _load_rows(p_value, problem.at_value, first, S, BLOCK_S, problem.EV, BLOCK_V)
        x, seen, steepness = _scores(
            _dot(q, tl.trans(k), problem),
            l[:, None],
            s[None, :],
            L,
            S,
            left,
            right,
            ahead,
            b,
            h,
            slope,
            problem,
            BOUNDED,
        )
        keeps = None
        if problem.DROPOUT:
            keeps = keeps_of(l, first, n * problem.H + h, seed_low, seed_high, problem.dropped, BLOCK_S, BLOCK_L, False)
        weight = tl.exp2(x - lse[:, None])
        dscore, _ = _score_gradients(
            _dot(dout, tl.trans(v), problem), weight, delta[:, None], keeps, seen, steepness, problem, BOUNDED
        )
        if BOUNDED or problem.MASKED:
            # Whatever stands in a key that none of these queries sees: 0 * inf would be NaN.
            anyone = tl.max(seen.to(tl.int32), 0) > 0
            k = tl.where(anyone[:, None], k, 0.0)
        dq += _dot(dscore.to(k.dtype), k, problem)
    return dq


@triton.jit(do_not_specialize=SIZES)
def _query_gradients(
    problem, p_dout, at_dout, p_lse, p_delta, p_dquery, at_dquery, L, S, left, right, seed_low, seed_high, blocks,
    BLOCK_L: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """dquery of BLOCK_L queries of one head."""
    total_L = L
    block = tl.program_id(0) % blocks
    h = tl.program_id(0) // blocks % problem.H
    n = tl.program_id(0) // blocks // problem.H
    if problem.RIGHT:
        block = blocks - 1 - block
    q_begin, L, b = _sequence(problem.ends_q, n, L)
    k_begin, S, b = _sequence(problem.ends_k, n, S)
    first_l = block * BLOCK_L
    if first_l >= L:
        return
    l = first_l + tl.arange(0, BLOCK_L)
    ahead = S - L if problem.BOTTOM_RIGHT else 0
    slope = _slope(problem, h)
    p_query = _head(problem.query, problem.at_query, b, h) + q_begin * problem.at_query[2]
    p_key = _head(problem.key, problem.at_key, b, h // problem.GROUP) + k_begin * problem.at_key[2]
    p_value = _head(problem.value, problem.at_value, b, h // problem.GROUP) + k_begin * problem.at_value[2]
    q = _load_rows(p_query, problem.at_query, first_l, L, BLOCK_L, problem.E, BLOCK_E)
    p = _head(p_dout, at_dout, b, h) + q_begin * at_dout[2]
    dout = _load_rows(p, at_dout, first_l, L, BLOCK_L, problem.EV, BLOCK_V)
    row = (b * problem.H + h) * total_L + q_begin + l
    lse = tl.load(p_lse + row, mask=l < L, other=0.0) * LOG2E
    delta = tl.load(p_delta + row, mask=l < L, other=0.0)
    c0, c1, c2, c3 = _span(
        first_l, tl.minimum(first_l + BLOCK_L, L) - 1, ahead, _keys_there(problem, b, S), left, right, problem.LEFT,
        problem.RIGHT, BLOCK_S,
    )  # fmt: skip
    dq = tl.zeros((BLOCK_L, BLOCK_E), tl.float32)
    if problem.LEFT:
        dq = _add_query_gradients(
            dq, q, dout, lse, delta, p_key, p_value, c0, c1, l, L, S, left, right, ahead, n, b, h, slope, seed_low,
            seed_high, problem, True, BLOCK_L, BLOCK_S, BLOCK_E, BLOCK_V,
        )  # fmt: skip
    dq = _add_query_gradients(
        dq, q, dout, lse, delta, p_key, p_value, c1, c2, l, L, S, left, right, ahead, n, b, h, slope, seed_low,
        seed_high, problem, False, BLOCK_L, BLOCK_S, BLOCK_E, BLOCK_V,
    )  # fmt: skip
    dq = _add_query_gradients(
        dq, q, dout, lse, delta, p_key, p_value, c2, c3, l, L, S, left, right, ahead, n, b, h, slope, seed_low,
        seed_high, problem, True, BLOCK_L, BLOCK_S, BLOCK_E, BLOCK_V,
    )  # fmt: skip
    p = _head(p_dquery, at_dquery, b, h) + q_begin * at_dquery[2]
    p, there = _rows(p, at_dquery, first_l, L, BLOCK_L, problem.E, BLOCK_E)
    tl.store(p, (dq * problem.scale).to(p_dquery.dtype.element_ty), mask=there)


@triton.jit
def _add_key_gradients(
    dk, dv, k, v, p_query, p_dout, at_dout, p_lse, p_delta, begin, end, s, first_s, L, S, left, right, ahead, n, b, h,
    slope, seed_low, seed_high, problem, BOUNDED: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_S: tl.constexpr,
    BLOCK_E: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    # Keys run down and queries across: what is summed over queries needs no turning.
    for first in range(begin, end, BLOCK_L):
        l = first + tl.arange(0, BLOCK_L)
        q = _load_rows(p_query, problem.at_query, first, L, BLOCK_L, problem.E, BLOCK_E)
        dout = _load_rows(p_dout, at_dout, first, L, BLOCK_L, problem.EV, BLOCK_V)
        lse = tl.load(p_lse + l, mask=l < L, other=0.0) * LOG2E
        delta = tl.load(p_delta + l, mask=l < L, other=0.0)
        x, seen, steepness = _scores(
            _dot(k, tl.trans(q), problem),
            l[None, :],
            s[:, None],
            L,
            S,
            left,
            right,
            ahead,
            b,
            h,
            slope,
            problem,
            BOUNDED,
        )
        keeps = None
        if problem.DROPOUT:
            keeps = keeps_of(
                l, first_s, n * problem.H + h, seed_low, seed_high, problem.dropped, BLOCK_S, BLOCK_L, True
            )
        weight = tl.exp2(x - lse[None, :])
        dweight = _dot(v, tl.trans(dout), problem)
        dscore, used = _score_gradients(dweight, weight, delta[None, :], keeps, seen, steepness, problem, BOUNDED)
        dv += _dot(used.to(dout.dtype), dout, problem)
        dk += _dot(dscore.to(q.dtype), q, problem)
    return dk, dv


@triton.jit(do_not_specialize=SIZES)
def _key_gradients(
    problem, p_dout, at_dout, p_lse, p_delta, p_dkey, at_dkey, p_dvalue, at_dvalue, L, S, left, right, seed_low,
    seed_high, blocks, BLOCK_L: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """dkey and dvalue of BLOCK_S keys of one head of key, over all heads of query that share it."""
    total_L = L
    first_s = tl.program_id(0) % blocks * BLOCK_S
    heads = problem.H // problem.GROUP
    own_h = tl.program_id(0) // blocks % heads
    n = tl.program_id(0) // blocks // heads
    q_begin, L, b = _sequence(problem.ends_q, n, L)
    k_begin, S, b = _sequence(problem.ends_k, n, S)
    if first_s >= S:
        return
    s = first_s + tl.arange(0, BLOCK_S)
    ahead = S - L if problem.BOTTOM_RIGHT else 0
    p_key = _head(problem.key, problem.at_key, b, own_h) + k_begin * problem.at_key[2]
    p_value = _head(problem.value, problem.at_value, b, own_h) + k_begin * problem.at_value[2]
    k = _load_rows(p_key, problem.at_key, first_s, S, BLOCK_S, problem.E, BLOCK_E)
    v = _load_rows(p_value, problem.at_value, first_s, S, BLOCK_S, problem.EV, BLOCK_V)
    # The queries that see a key: the bounds the other way round.
    queries = tl.where(first_s < _keys_there(problem, b, S), L, 0)
    c0, c1, c2, c3 = _span(
        first_s,
        tl.minimum(first_s + BLOCK_S, S) - 1,
        -ahead,
        queries,
        right,
        left,
        problem.RIGHT,
        problem.LEFT,
        BLOCK_L,
    )
    dk = tl.zeros((BLOCK_S, BLOCK_E), tl.float32)
    dv = tl.zeros((BLOCK_S, BLOCK_V), tl.float32)
    for i in range(problem.GROUP):
        h = own_h * problem.GROUP + i
        slope = _slope(problem, h)
        p_query = _head(problem.query, problem.at_query, b, h) + q_begin * problem.at_query[2]
        p_douts = _head(p_dout, at_dout, b, h) + q_begin * at_dout[2]
        row = (b * problem.H + h) * total_L + q_begin
        if problem.RIGHT:
            dk, dv = _add_key_gradients(
                dk, dv, k, v, p_query, p_douts, at_dout, p_lse + row, p_delta + row, c0, c1, s, first_s, L, S, left,
                right, ahead, n, b, h, slope, seed_low, seed_high, problem, True, BLOCK_L, BLOCK_S, BLOCK_E, BLOCK_V,
            )  # fmt: skip
        # Past the last query there are zeros, which add nothing: that is no bound.
        dk, dv = _add_key_gradients(
            dk, dv, k, v, p_query, p_douts, at_dout, p_lse + row, p_delta + row, c1, c2 if problem.LEFT else c3, s,
            first_s, L, S, left, right, ahead, n, b, h, slope, seed_low, seed_high, problem, False, BLOCK_L, BLOCK_S,
            BLOCK_E, BLOCK_V,
        )  # fmt: skip
        if problem.LEFT:
            dk, dv = _add_key_gradients(
                dk, dv, k, v, p_query, p_douts, at_dout, p_lse + row, p_delta + row, c2, c3, s, first_s, L, S, left,
                right, ahead, n, b, h, slope, seed_low, seed_high, problem, True, BLOCK_L, BLOCK_S, BLOCK_E, BLOCK_V,
            )  # fmt: skip
    p, there = _rows(
        _head(p_dkey, at_dkey, b, own_h) + k_begin * at_dkey[2], at_dkey, first_s, S, BLOCK_S, problem.E, BLOCK_E
    )
    tl.store(p, (dk * problem.scale).to(p_dkey.dtype.element_ty), mask=there)
    p, there = _rows(
        _head(p_dvalue, at_dvalue, b, own_h) + k_begin * at_dvalue[2],
        at_dvalue,
        first_s,
        S,
        BLOCK_S,
        problem.EV,
        BLOCK_V,
    )
    tl.store(p, dv.to(p_dvalue.dtype.element_ty), mask=there)


@triton.jit(do_not_specialize=[*SIZES, "N", "share"])
def _mask_gradients(
    problem, p_dout, at_dout, p_lse, p_delta, p_dmask, N, L, S, left, right, seed_low, seed_high, share,
    OF_N: tl.constexpr, OF_H: tl.constexpr, OF_L: tl.constexpr, OF_S: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """A tile of the gradient of an additive mask, [parts, N or 1, H or 1, L or 1, S or 1].

    Scores that the mask adds one number to are walked through in order, or this program's share of them.
    """
    blocks_l, blocks_s = tl.cdiv(L, BLOCK_L), tl.cdiv(S, BLOCK_S)
    own, rest = tl.program_id(0), tl.cast(0, tl.int32)
    own_s = own % blocks_s if OF_S else rest
    own = own // blocks_s if OF_S else own
    own_l = own % blocks_l if OF_L else rest
    own = own // blocks_l if OF_L else own
    own_h = own % problem.H if OF_H else rest
    own = own // problem.H if OF_H else own
    own_n = own % N if OF_N else rest
    part = own // N if OF_N else own
    count = (1 if OF_N else N) * (1 if OF_H else problem.H) * (1 if OF_L else blocks_l) * (1 if OF_S else blocks_s)
    ahead = S - L if problem.BOTTOM_RIGHT else 0
    sums = tl.zeros((BLOCK_L, BLOCK_S), tl.float32)
    for i in range(part * share, tl.minimum(part * share + share, count)):
        at = i
        block_s = own_s if OF_S else at % blocks_s
        at = at if OF_S else at // blocks_s
        block_l = own_l if OF_L else at % blocks_l
        at = at if OF_L else at // blocks_l
        h = own_h if OF_H else at % problem.H
        n = own_n if OF_N else (at if OF_H else at // problem.H)
        b = n.to(tl.int64)
        first_l, first_s = block_l * BLOCK_L, block_s * BLOCK_S
        l, s = first_l + tl.arange(0, BLOCK_L), first_s + tl.arange(0, BLOCK_S)
        visible = True
        if problem.LEFT:
            visible = visible & (first_s + BLOCK_S > first_l + ahead - left)
        if problem.RIGHT:
            visible = visible & (first_s <= first_l + BLOCK_L - 1 + ahead + right)
        if visible:
            p_query, p_key = (
                _head(problem.query, problem.at_query, b, h),
                _head(problem.key, problem.at_key, b, h // problem.GROUP),
            )
            p_value = _head(problem.value, problem.at_value, b, h // problem.GROUP)
            q = _load_rows(p_query, problem.at_query, first_l, L, BLOCK_L, problem.E, BLOCK_E)
            k = _load_rows(p_key, problem.at_key, first_s, S, BLOCK_S, problem.E, BLOCK_E)
            x, seen, _ = _scores(
                _dot(q, tl.trans(k), problem), l[:, None], s[None, :], L, S, left, right, ahead, b, h,
                _slope(problem, h), problem, True,
            )  # fmt: skip
            row = (b * problem.H + h) * L + l
            lse = tl.load(p_lse + row, mask=l < L, other=0.0) * LOG2E
            delta = tl.load(p_delta + row, mask=l < L, other=0.0)
            keeps = None
            if problem.DROPOUT:
                keeps = keeps_of(
                    l, first_s, n * problem.H + h, seed_low, seed_high, problem.dropped, BLOCK_S, BLOCK_L, False
                )
            v = _load_rows(p_value, problem.at_value, first_s, S, BLOCK_S, problem.EV, BLOCK_V)
            dout = _load_rows(_head(p_dout, at_dout, b, h), at_dout, first_l, L, BLOCK_L, problem.EV, BLOCK_V)
            weight = tl.exp2(x - lse[:, None])
            dscore, _ = _score_gradients(
                _dot(dout, tl.trans(v), problem), weight, delta[:, None], keeps, seen, None, problem, True
            )
            sums += dscore
    first_l, first_s = own_l * BLOCK_L, own_s * BLOCK_S
    l, s = first_l + tl.arange(0, BLOCK_L), first_s + tl.arange(0, BLOCK_S)
    rows, columns = L if OF_L else 1, S if OF_S else 1
    at = ((part * (N if OF_N else 1) + own_n) * (problem.H if OF_H else 1) + own_h).to(tl.int64) * rows * columns
    p_dmask += at
    dtype = p_dmask.dtype.element_ty
    if OF_L and OF_S:
        p = p_dmask + l[:, None].to(tl.int64) * columns + s[None, :]
        tl.store(p, sums.to(dtype), mask=(l < L)[:, None] & (s < S)[None, :])
    elif OF_L:
        tl.store(p_dmask + l, tl.sum(sums, 1).to(dtype), mask=l < L)
    elif OF_S:
        tl.store(p_dmask + s, tl.sum(sums, 0).to(dtype), mask=s < S)
    else:
        tl.store(p_dmask, tl.sum(tl.sum(sums, 1), 0).to(dtype))


# How many queries and keys a tile has, and the warps and pipeline stages, for heads of up to so many features: for half
# precision and by the precision of products of float32. One choice for all, so that results do not change from run to
# run. From registers, stack and shared memory as `make gpu-aot` shows them; not tuned on any GPU.
FORWARD_TILES = {
    "half": {64: (128, 64, 8, 3), 128: (128, 64, 8, 3), 256: (64, 64, 8, 2)},
    "tf32": {64: (128, 64, 8, 2), 128: (64, 32, 8, 2), 256: (16, 16, 8, 1)},
    "ieee": {64: (32, 32, 4, 2), 128: (32, 32, 8, 1), 256: (16, 16, 8, 1)},
}
QUERY_TILES = {
    "half": {64: (64, 32, 4, 2), 128: (64, 64, 8, 2), 256: (32, 64, 8, 1)},
    "tf32": {64: (64, 32, 4, 2), 128: (64, 32, 8, 2), 256: (16, 16, 8, 1)},
    "ieee": {64: (32, 32, 8, 1), 128: (32, 32, 8, 1), 256: (16, 16, 8, 1)},
}
KEY_TILES = {
    "half": {64: (32, 64, 4, 2), 128: (32, 64, 8, 2), 256: (32, 32, 8, 1)},
    "tf32": {64: (32, 64, 4, 2), 128: (32, 32, 4, 2), 256: (16, 16, 8, 1)},
    "ieee": {64: (32, 32, 8, 1), 128: (32, 32, 8, 1), 256: (16, 16, 8, 1)},
}
REPAIR_TILES = {
    "half": {64: (32, 32, 4, 1), 128: (32, 32, 8, 1), 256: (32, 32, 8, 1)},
    "tf32": {64: (16, 32, 4, 1), 128: (16, 32, 8, 1), 256: (16, 16, 8, 1)},
    "ieee": {64: (16, 32, 4, 1), 128: (16, 32, 8, 1), 256: (16, 16, 8, 1)},
}
INTERPRETED_TILES = (32, 64, 4, 1)
DELTA_ROWS = 64
# How many programs the interpreter shall seem to run at once, so that splits are tested.
INTERPRETED_PROCESSORS = 8
# Below this many keys for each part, a split costs more than it gains.
LEAST_SPLIT = 256
MOST_PARTS = 32


class Launch(NamedTuple):
    """How a kernel is started: its blocks of queries and keys, and what is compiled in."""

    L: int
    S: int
    options: dict[str, int]

    def with_features(self, problem: Problem, of_values: bool = True) -> dict[str, int]:
        wide = {"BLOCK_E": _power(problem.E.value)}
        if of_values:
            wide["BLOCK_V"] = _power(problem.EV.value)
        return {**self.options, **wide}


def _power(features: int) -> int:
    return max(16, triton.next_power_of_2(features))


def _launch(table: dict, arguments: Arguments) -> Launch:
    query, _, value, *_ = arguments
    tiles = INTERPRETED_TILES
    if not jit.is_interpreted():
        widest = max(_power(query.shape[3]), _power(value.shape[3]))
        kind = precision_of_float32() if query.dtype == torch.float32 else "half"
        tiles = next(tiles for width, tiles in table[kind].items() if widest <= width)
    L, S, warps, stages = tiles
    return Launch(L, S, dict(BLOCK_L=L, BLOCK_S=S, num_warps=warps, num_stages=stages))


def precision_of_float32() -> str:
    """Of products of float32, as torch's flags say."""
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return INTERPRETED_PROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count


def _problem(arguments: Arguments) -> tuple[Problem, tuple[int, ...]]:
    """What kernels are told, and SIZES."""
    query, key, value, mask, padding, slopes, ends_q, ends_k, seed, scale, softcap, p, left, right, bottom = arguments
    H, L, E, S = *query.shape[1:], key.shape[2]
    bound = tl.constexpr
    expanded = None if mask is None else mask.expand(query.shape[0], H, L, S)
    dropped = dropped_of(p) if seed is not None else 0
    problem = Problem(
        query,
        key,
        value,
        expanded if expanded is None or expanded.dtype != torch.bool else expanded.view(torch.uint8),
        None if padding is None else padding.view(torch.uint8),
        None if slopes is None else slopes.contiguous(),
        None if ends_q is None else ends_q.to(query.device),
        None if ends_k is None else ends_k.to(query.device),
        query.stride(),
        key.stride(),
        value.stride(),
        None if expanded is None else expanded.stride(),
        None if padding is None else padding.stride(),
        H,
        scale,
        softcap,
        float(dropped),
        kept_factor(p),
        bound(E),
        bound(value.shape[3]),
        bound(H // key.shape[1] if key.shape[1] else 1),
        bound(mask is not None and mask.dtype == torch.bool),
        bound(mask is not None or padding is not None),
        bound(left >= 0),
        bound(right >= 0),
        bound(bottom),
        bound(softcap > 0),
        bound(seed is not None and p > 0),
        bound(precision_of_float32()),
    )
    # Nothing is farther away, and kernels count in 32 bits.
    return problem, (L, S, *(min(bound, L + S) for bound in (left, right)), *halves_of(seed))


def _sequences(arguments: Arguments) -> tuple[int, int, int]:
    """How many sequences there are, and the most queries and keys that one has."""
    if arguments.cu_seqlens_q is None or arguments.cu_seqlens_k is None:
        return arguments.query.shape[0], arguments.query.shape[2], arguments.key.shape[2]
    lengths = [
        int(ends.diff().max()) if len(ends) > 1 else 0 for ends in (arguments.cu_seqlens_q, arguments.cu_seqlens_k)
    ]
    return len(arguments.cu_seqlens_q) - 1, lengths[0], lengths[1]


def forward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """See `fastseq.ops.attention.Arguments` and `Outputs`."""
    *given, wanted = args
    arguments = Arguments(*given)
    query, key, value = arguments[:3]
    (N, H, L, _), S, EV = query.shape, key.shape[2], value.shape[3]
    out = empty_like_heads(query, N, H, L, EV)
    lse = query.new_empty((N, H, L), dtype=torch.float32)
    shape = {NO_WEIGHTS: (0,), EACH_HEAD: (N, H, L, S), AVERAGE: (N, L, S)}[wanted]
    weights = lse.new_empty(shape)
    problem, sizes = _problem(arguments)
    count, longest, keys = _sequences(arguments)
    launch = _launch(FORWARD_TILES, arguments)
    blocks = triton.cdiv(longest, launch.L)
    programs = blocks * count * H
    if programs:
        parts = 1
        if arguments.cu_seqlens_q is None and programs < _processors(query.device):
            parts = max(1, min(MOST_PARTS, _processors(query.device) // programs, keys // LEAST_SPLIT))
        if parts == 1:
            out_parts, lse_parts = out, lse
        else:
            out_parts, lse_parts = (query.new_empty((parts, *t.shape), dtype=torch.float32) for t in (out, lse))
        hides = arguments.left >= 0 or arguments.right >= 0 or arguments.mask is not None
        spoilt = torch.empty_like(lse_parts, dtype=torch.int8) if hides else None
        _forward[(programs * parts,)](
            problem, out_parts, out_parts.stride()[-4:], lse_parts, spoilt, *sizes, parts, blocks, lse.numel(),
            out.numel(), SPLIT=parts > 1, **launch.with_features(problem),
        )  # fmt: skip
        if parts > 1:
            _merge[(N * H * L,)](
                out_parts, lse_parts, out, out.stride(), lse, H, L, parts, lse.numel(), out.numel(),
                PARTS=triton.next_power_of_2(parts), EV=EV, BLOCK_V=_power(EV),
            )  # fmt: skip
        if spoilt is not None:
            launch = _launch(REPAIR_TILES, arguments)
            blocks = triton.cdiv(longest, launch.L)
            _repair[(blocks * count * H,)](
                problem, out, out.stride(), lse, spoilt, *sizes, parts, blocks, lse.numel(),
                **launch.with_features(problem),
            )  # fmt: skip
    if weights.numel():
        launch = _launch(QUERY_TILES, arguments)
        blocks_l, blocks_s = triton.cdiv(L, launch.L), triton.cdiv(S, launch.S)
        each = N if wanted == AVERAGE else N * H
        _weights[(each * blocks_l * blocks_s,)](
            problem, weights, lse, *sizes, blocks_l, blocks_s,
            AVERAGED=wanted == AVERAGE, **launch.with_features(problem, of_values=False),
        )  # fmt: skip
    return out, lse, weights


def backward(dout: Tensor | None, dlse: Tensor | None, *args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value and mask, without elements where `needs` says no."""
    *given, out, lse, needs = args
    arguments = Arguments(*given)
    query, key, value, mask = arguments[:4]
    (N, H, L, _), EV = query.shape, value.shape[3]
    nothing = query.new_empty(0)
    grads = [
        empty_like_heads(t, *t.shape) if need else nothing
        for t, need in zip((query, key, value), needs[:3], strict=True)
    ]
    dmask = torch.empty_like(mask, memory_format=torch.contiguous_format) if needs[3] else nothing
    problem, sizes = _problem(arguments)
    count, longest, keys = _sequences(arguments)
    delta = query.new_empty((N, H, L), dtype=torch.float32)
    if delta.numel():
        blocks = triton.cdiv(L, DELTA_ROWS)
        _deltas[(N * H * blocks,)](
            dout, None if dout is None else dout.stride(), out, out.stride(), dlse,
            None if dlse is None else dlse.stride(), delta, H, L, blocks,
            EV=EV, BLOCK_L=DELTA_ROWS, BLOCK_V=_power(EV),
        )  # fmt: skip
    if dout is None:
        dout = query.new_zeros(()).expand_as(out)
    shared = (dout, dout.stride(), lse, delta)
    if grads[0].numel():
        launch = _launch(QUERY_TILES, arguments)
        blocks = triton.cdiv(longest, launch.L)
        _query_gradients[(count * H * blocks,)](
            problem, *shared, grads[0], grads[0].stride(), *sizes, blocks, **launch.with_features(problem)
        )
    if grads[1].numel() or grads[2].numel():
        # Both are made, whoever asks for one: it saves a kernel of its own, and costs little.
        dkey, dvalue = (
            g if need else empty_like_heads(t, *t.shape)
            for g, t, need in zip(grads[1:], (key, value), needs[1:3], strict=True)
        )
        launch = _launch(KEY_TILES, arguments)
        blocks = triton.cdiv(keys, launch.S)
        _key_gradients[(count * key.shape[1] * blocks,)](
            problem,
            *shared,
            dkey,
            dkey.stride(),
            dvalue,
            dvalue.stride(),
            *sizes,
            blocks,
            **launch.with_features(problem),
        )
    if dmask.numel():
        dmask = _mask_gradient(dmask, arguments, problem, shared, sizes, _launch(QUERY_TILES, arguments))
    return grads[0], grads[1], grads[2], dmask


def _mask_gradient(
    dmask: Tensor, arguments: Arguments, problem: Problem, shared: tuple, sizes: tuple[int, ...], launch: Launch
) -> Tensor:
    query, S = arguments.query, arguments.key.shape[2]
    N, H, L = query.shape[:3]
    counts = (N, H, triton.cdiv(L, launch.L), triton.cdiv(S, launch.S))
    own = [size > 1 for size in dmask.shape]
    tiles, walked = 1, 1
    for count, is_own in zip(counts, own, strict=True):
        tiles, walked = (tiles * count, walked) if is_own else (tiles, walked * count)
    if 0 in counts:
        return dmask.zero_()
    # Enough programs for the GPU, if need be by splitting what each of them would walk through.
    parts = max(1, min(walked, 2 * _processors(query.device) // tiles))
    share = triton.cdiv(walked, parts)
    parts = triton.cdiv(walked, share)
    sums = dmask if parts == 1 else query.new_empty((parts, *dmask.shape), dtype=torch.float32)
    _mask_gradients[(tiles * parts,)](
        problem, *shared, sums, N, *sizes, share,
        **dict(zip(("OF_N", "OF_H", "OF_L", "OF_S"), own, strict=True)), **launch.with_features(problem),
    )  # fmt: skip
    return dmask if parts == 1 else sums.sum(0).to(dmask.dtype)


Configuration = Callable[[torch.dtype, int], None]  # of a dtype and a compute capability, which tiles do not depend on


def _training(case: Case, wanted: int = NO_WEIGHTS) -> Configuration:
    """Launches all kernels of a case, forward and backward."""

    def run(dtype: torch.dtype, _capability: int) -> None:
        arguments = case.arguments("cpu", dtype)
        out, lse, _ = forward(*arguments, wanted)
        learned = arguments.mask is not None and arguments.mask.is_floating_point()
        backward(out, None, *arguments, out, lse, [True, True, True, learned])

    return run


def _with_tf32(run: Configuration) -> Configuration:
    def run_with_tf32(dtype: torch.dtype, capability: int) -> None:
        before = torch.backends.cuda.matmul.fp32_precision
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        try:
            run(dtype, capability)
        finally:
            torch.backends.cuda.matmul.fp32_precision = before

    return run_with_tf32


# What is compiled ahead of time and looked at without a GPU (tests/aot.py): the main configurations first, then one of
# each feature. Of sizes only their divisibility by 16 counts.
AOT = {
    "causal 64": _training(Case(1, 8, 512, 512, 64, right=0, transposed=True)),
    "128": _training(Case(1, 8, 512, 512, 128, transposed=True)),
    "padding, dropout 64": _training(Case(1, 8, 512, 512, 64, padding=True, dropout=0.1, transposed=True)),
    "learned bias 64": _training(Case(1, 8, 512, 512, 64, mask="float hls")),
    "causal 128, groups": _training(Case(1, 8, 512, 512, 128, Hk=2, right=0)),
    "causal 256": _training(Case(1, 8, 512, 512, 256, right=0)),
    "window, softcap, slopes, varlen 96": _training(
        Case(1, 8, 512, 512, 96, left=64, right=0, softcap=9.0, slopes=True, varlen=True)
    ),
    "boolean mask, weights 80": _training(Case(1, 8, 512, 512, 80, mask="bool ns"), AVERAGE),
    "decoding 128": _training(Case(1, 1, 1, 4096, 128, right=0, bottom_right=True)),
    "causal 64, TF32": _with_tf32(_training(Case(1, 8, 512, 512, 64, right=0))),
    "128, TF32": _with_tf32(_training(Case(1, 8, 512, 512, 128))),
    "33, 17": _training(Case(1, 8, 100, 100, 33, Ev=17)),
}
