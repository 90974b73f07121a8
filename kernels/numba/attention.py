"""Scaled dot product attention: the op `fastseq::attention`. Formulas: fastseq/reference/attention.py.

Scores exist a block at a time, [_KEYS][stride] of keys and queries, in the cache. Queries are the vectors' lanes, so
that a maximum or a sum over keys needs nothing but vectors, and keys are read where they are.

Forward is an online softmax (Milakov and Gimelshein 2018; Dao et al. 2022): of each query there are the largest score
so far, the sum of exp(score - largest) and the sum of values so weighted. Few queries, as in decoding, have keys as the
lanes. Backward makes scores anew, and weights from them and lse.

Threads take one task after the other. What a row of a result is summed up from, and in which order, depends on nothing
but shapes: results are the same bits whatever the number of threads.
"""

import math
from array import array
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastseq.kernels.numba import team
from fastseq.kernels.numba.compiler import Elements, Flags, Integers, Kernel, Number, Size
from fastseq.kernels.numba.jit import jit, part
from fastseq.kernels.numba.simd import (
    COUNTERS,
    DRAWN,
    at,
    dots,
    draw,
    exp,
    is_null,
    lanes,
    larger,
    largest,
    load,
    magnitude,
    multiply,
    null,
    ramp,
    splat,
    store,
    tanh,
    tile,
    tile_rows,
    total,
    transpose,
    turn,
    vector_bytes,
    where_equal,
    where_less,
    where_set,
    zeros,
)
from fastseq.kernels.numba.team import fetch_add, take
from fastseq.kernels.numba.tensors import ceil_div, cut, expect, in_panels, panel_of, poisoned
from fastseq.ops.attention import AVERAGE, EACH_HEAD, NO_WEIGHTS, Arguments, empty_like_heads
from fastseq.reference.dropout import dropped_of, kept_factor

_KEYS = DRAWN  # of a block: as many as dropout draws for at once
_TILE_ROWS = tile_rows()
_NEVER = -math.inf
_WORK_PER_MEMBER = 192 * 1024  # multiply-adds that are worth a thread
# Packed values that one block of queries after the other reads stay in the L2 cache; of blocks of queries so many share
# a packing that it hardly counts.
_PACKED_BYTES, _MOST_PACKED, _SHARING_BLOCKS = 256 * 1024, 64, 8
_CHUNK_BLOCKS = 4  # blocks of queries whose gradients are one task, where tasks are split by queries
# Few queries: the most that share a head of keys, the keys of a block, and tasks that are enough for all threads.
_FEW_ROWS, _FEW_KEYS, _FEW_TASKS = 8, 4 * _KEYS, 32


class Call(NamedTuple):
    """What the kernels get; names as in `fastseq.ops.attention`. Strides of heads are those of [N, heads, places]."""

    H: Size
    Hk: Size
    L: Size
    S: Size
    E: Size
    Ev: Size
    width: Size  # E and Ev in whole panels
    value_width: Size
    q: Elements
    q_n: Size
    q_h: Size
    q_l: Size
    k: Elements
    k_n: Size
    k_h: Size
    k_l: Size
    v: Elements
    v_n: Size
    v_h: Size
    v_l: Size
    out: Elements
    out_n: Size
    out_h: Size
    out_l: Size
    lse: Elements  # [N, H, L]
    weights: Elements  # [N, H, L, S], or [N, L, S] if they are averaged, or null
    average: Size
    allowed: Flags  # the boolean mask, or
    bias: Elements  # the one that is added
    m_n: Size
    m_h: Size
    m_l: Size
    m_s: Size  # 0 or 1
    padding: Flags  # [N, S]
    slopes: Elements  # [H]
    sequences: Size
    ends_q: Integers  # [sequences + 1]
    ends_k: Integers
    seed: Size
    dropped: Size  # how many of 65536 draws drop an element; 0 for no dropout
    kept: Number
    scale: Number
    softcap: Number
    left: Size
    right: Size
    bottom_right: Size
    dout: Elements  # null for zeros
    dout_n: Size
    dout_h: Size
    dout_l: Size
    dlse: Elements
    dq: Elements  # each gradient null if it is not wanted
    dq_n: Size
    dq_h: Size
    dq_l: Size
    dk: Elements
    dk_n: Size
    dk_h: Size
    dk_l: Size
    dv: Elements
    dv_n: Size
    dv_h: Size
    dv_l: Size
    dbias: Elements  # zeros at first; its strides are 0 for what it does not tell apart
    d_n: Size
    d_h: Size
    d_l: Size
    d_s: Size
    counters: Integers  # the next task, then what each direction counts besides
    stride: Size  # of a block's keys: the queries that it has room for
    chunk: Size  # queries of a task, and tasks of a sequence and head
    chunks: Size
    packed_keys: Size  # of a packing
    splits: Size  # tasks of a head's keys, and how many keys each has
    split_keys: Size
    parts: Elements  # what each of them sums up, if there are several: [sequences, Hk, splits, part]
    rows: Size  # queries that share a head of keys: of each of its heads, padded to whole blocks in backward
    groups_n: Size  # the sequences and heads whose gradients are one task are so many groups
    groups_h: Size
    tiles: Size  # tasks of each group, by keys, 1 for all keys and queries in one
    desk: Size  # elements of a member's scratch: what follows is the first one's, another's is `my` elements further
    at_q: Elements  # [panels of queries, E, panel] scaled
    at_dout: Elements
    at_out: Elements
    q_rows: Elements  # [panels of E, queries, panel]
    dout_rows: Elements
    k_rows: Elements  # [panels of E, _KEYS, panel]
    v_rows: Elements  # [panels of Ev, packed keys, panel]
    finite: Elements  # whether the packed values of each block are: 1, 0, or not known yet, -1
    sums: Elements  # [rows, value_width]
    largest: Elements  # [rows]
    weight: Elements
    shrink: Elements
    large: Number  # what lse must exceed for them to be taken relative to something else
    base: Elements  # weights are exp(score - base) * share, and delta is dout . out - dlse
    share: Elements
    delta: Elements
    sum_q: Elements
    sum_k: Elements
    sum_v: Elements
    scores: Elements  # [_KEYS, stride]
    dscores: Elements
    bends: Elements  # derivatives of the softcap
    factors: Elements  # dropout's
    raw: Elements  # [chunk, keys in whole blocks] scores of a chunk, for the average
    square: Elements  # [lanes, lanes]


class Sequence(NamedTuple):
    """One of the batch, or of those that stand one after the other."""

    index: int
    sample: int
    q0: int
    k0: int
    L: int
    S: int
    offset: int
    left: int
    right: int


class Block(NamedTuple):
    """Queries [l, l + queries) of a head and keys [s, s + keys)."""

    h: int
    l: int
    queries: int
    s: int
    keys: int


# Which keys a query sees.


@jit
def _sequence(call, i):
    sample, q0, k0, L, S = i, 0, 0, call.L, call.S
    if not is_null(call.ends_q):
        sample, q0, k0 = 0, call.ends_q[i], call.ends_k[i]
        L, S = call.ends_q[i + 1] - q0, call.ends_k[i + 1] - k0
    return Sequence(i, sample, q0, k0, L, S, S - L if call.bottom_right != 0 else 0, call.left, call.right)


@jit
def _first_key(seq, l):
    return 0 if seq.left < 0 else min(seq.S, max(0, l + seq.offset - seq.left))


@jit
def _end_key(seq, l):
    return seq.S if seq.right < 0 else min(seq.S, max(0, l + seq.offset + seq.right + 1))


@jit
def _first_query(seq, first):
    """The first query to which the bounds leave some of the keys from `first` on."""
    return 0 if seq.right < 0 else min(seq.L, max(0, first - seq.offset - seq.right))


@jit
def _end_query(seq, end):
    """Behind the last one to which they leave some of the keys before `end`."""
    return seq.L if seq.left < 0 else min(seq.L, max(0, end - seq.offset + seq.left))


@jit
def _narrowed(seq, block):
    """The keys of a block that some of its queries see, as far as the bounds say; perhaps none."""
    first = max(block.s, _first_key(seq, block.l))
    end = min(block.s + block.keys, _end_key(seq, block.l + block.queries - 1))
    return Block(block.h, block.l, block.queries, first, max(0, end - first))


@jit
def _is_inside(seq, block):
    """Whether the bounds leave all of a block."""
    return (
        _first_query(seq, block.s + block.keys - 1) <= block.l
        and _end_query(seq, block.s + 1) >= block.l + block.queries
    )


@jit
def _padded_keys(call, seq, s, count):
    padded = 0
    if not is_null(call.padding):
        for j in range(seq.sample * call.S + s, seq.sample * call.S + s + count):
            padded += call.padding[j] != 0
    return padded


@jit
def _mask_at(call, seq, h, l, s):
    return seq.sample * call.m_n + h * call.m_h + l * call.m_l + s * call.m_s


@jit
def _left_out(call, seq, block):
    """Whether the padding or a boolean mask leaves nothing of a block."""
    if _padded_keys(call, seq, block.s, block.keys) == block.keys:
        return True
    if is_null(call.allowed):
        return False
    columns = block.keys if call.m_s != 0 else 1
    for l in range(block.l, block.l + (block.queries if call.m_l != 0 else 1)):
        first = _mask_at(call, seq, block.h, l, block.s)
        for j in range(first, first + columns):
            if call.allowed[j] != 0:
                return False
    return True


@jit
def _is_bare(call):
    """Whether there are only bounds and padding."""
    return call.softcap == 0 and is_null(call.slopes) and is_null(call.bias) and is_null(call.allowed)


@jit
def _is_whole(call, seq, block):
    """Whether softmax can take a block's products as they are."""
    return _is_bare(call) and _is_inside(seq, block) and _padded_keys(call, seq, block.s, block.keys) == 0


# Rows and panels.


@jit
def _fill(base, count, value):
    """Whole vectors of a value."""
    for i in range(0, count, lanes(base)):
        store(base, i, splat(base, value))


@jit
def _panels(base, columns):
    return (columns + 2 * lanes(base) - 1) // (2 * lanes(base))


@part
def _pack_queries(source, row, count, K, by, target):
    """Rows as the right-hand side of a block's products, times a number: [panels of rows, K, panel]."""
    n = lanes(source)
    for i in range(0, _panels(source, count) * 2 * n, n):
        to = at(target, (i // (2 * n) * K) * 2 * n + i % (2 * n))
        rows = min(n, max(0, count - i))
        for e in range(0, K, n):
            columns = min(n, K - e)
            turn(at(source, i * row + e), row, rows, columns, at(to, e * 2 * n), 2 * n)
        for e in range(K):
            store(to, e * 2 * n, load(to, e * 2 * n) * by)


@part
def _pack_rows(source, row, count, K, skipped, target):
    """Rows as the right-hand side of products over them: [panels of K, count, panel]; skipped ones become zeros."""
    n = lanes(source)
    for c in range(0, _panels(source, K) * 2 * n, n):
        to = at(target, c // (2 * n) * 2 * n * count + c % (2 * n))
        columns = min(n, max(0, K - c))
        for j in range(count):
            if is_null(skipped) or skipped[j] == 0:
                store(to, j * 2 * n, load(source, j * row + c, columns))
            else:
                store(to, j * 2 * n, zeros(source))


@jit
def _all_finite(base, count):
    """Of whole vectors."""
    product = zeros(base)
    for i in range(0, count, lanes(base)):
        product = product + load(base, i) * 0.0
    return total(product) == 0


@jit
def _scale_row(row, width, by):
    for u in range(0, width, lanes(row)):
        store(row, u, load(row, u) * by)


@jit
def _write(source, by, target, count):
    for e in range(0, count, lanes(source)):
        store(target, e, load(source, e) * by, count - e)


# Products of a block, where the bounds leave something.


@part
def _multiply(seq, block, rows, row, K, packed, products, stride):
    """products[keys][stride] = rows of keys times packed queries."""
    panel = 2 * lanes(rows)
    tiles = (block.keys + _TILE_ROWS - 1) // _TILE_ROWS
    for i in range(tiles):
        j, j_end = block.keys * i // tiles, block.keys * (i + 1) // tiles
        first = max(0, _first_query(seq, block.s + j) - block.l) // panel * panel
        end = min(block.queries, _end_query(seq, block.s + j_end) - block.l)
        for u in range(first, end, panel):
            tile(
                j_end - j, K, at(rows, j * row), row, 1, at(packed, u * K), panel, at(products, j * stride + u),
                stride, False,
            )  # fmt: skip


@part
def _add_keys(seq, block, left, stride, packed, gap, sums, width, finite):
    """sums[queries][width] += a block, transposed, times packed rows of keys, whose panels are `gap` apart. Where they
    may hold infinities or NaN, a 0 on the left leaves these out."""
    panel = 2 * lanes(left)
    tiles = (block.queries + _TILE_ROWS - 1) // _TILE_ROWS
    for p in range(width // panel):
        for i in range(tiles):
            r, r_end = block.queries * i // tiles, block.queries * (i + 1) // tiles
            first = max(0, _first_key(seq, block.l + r) - block.s)
            end = min(block.keys, _end_key(seq, block.l + r_end - 1) - block.s)
            if first >= end:
                continue
            some, rows = at(left, first * stride + r), at(packed, p * gap + first * panel)
            out = at(sums, r * width + p * panel)
            if finite:
                tile(r_end - r, end - first, some, 1, stride, rows, panel, out, width, True)
            else:
                _add_but_zeros(r_end - r, end - first, some, stride, rows, out, width)


@jit
def _add_but_zeros(rows, count, left, stride, right, sums, width):
    for j in range(count):
        for r in range(rows):
            by = left[j * stride + r]
            if by != 0:
                for u in range(0, 2 * lanes(left), lanes(left)):
                    store(sums, r * width + u, load(sums, r * width + u) + load(right, j * 2 * lanes(left) + u) * by)


@part
def _add_queries(seq, block, left, stride, packed, gap, sums, width):
    """sums[keys][width] += a block times packed rows of the head's queries, whose panels are `gap` apart."""
    panel = 2 * lanes(left)
    tiles = (block.keys + _TILE_ROWS - 1) // _TILE_ROWS
    for p in range(width // panel):
        for i in range(tiles):
            j, j_end = block.keys * i // tiles, block.keys * (i + 1) // tiles
            first = max(block.l, _first_query(seq, block.s + j))
            end = min(block.l + block.queries, _end_query(seq, block.s + j_end))
            if first < end:
                tile(
                    j_end - j, end - first, at(left, j * stride + first - block.l), stride, 1,
                    at(packed, p * gap + first * panel), panel, at(sums, j * width + p * panel), width, True,
                )  # fmt: skip


# Scores.


@jit
def _mask_row(call, where, count):
    """Some keys of a row of the mask as numbers to be added, -inf where a key is left out."""
    never, zero = splat(call.scores, _NEVER), zeros(call.scores)
    if not is_null(call.bias):
        return load(call.bias, where, count) if call.m_s != 0 else splat(call.bias, call.bias[where])
    if call.m_s != 0:
        return where_set(call.scores, call.allowed, where, count, zero, never)
    return zero if call.allowed[where] != 0 else never


@jit
def _masked(base, score, more):
    """Their sum, but not with -inf, which a NaN in a key that is left out would survive."""
    return where_equal(more, splat(base, _NEVER), more, score + more)


@jit
def _add_mask(call, seq, block, scores, square):
    n = lanes(scores)
    for i in range(0, block.queries, n):
        for j in range(0, block.keys, n):
            rows, keys = min(n, block.queries - i), min(n, block.keys - j)
            where = _mask_at(call, seq, block.h, block.l + i, block.s + j)
            to = at(scores, j * call.stride + i)
            if call.m_l == 0:
                store(square, 0, _mask_row(call, where, keys))
                for k in range(keys):
                    more = splat(square, square[k])
                    store(to, k * call.stride, _masked(to, load(to, k * call.stride), more))
                continue
            for r in range(n):
                store(square, r * n, _mask_row(call, where + r * call.m_l, keys) if r < rows else zeros(square))
            transpose(square, n, square, n)
            for k in range(keys):
                store(to, k * call.stride, _masked(to, load(to, k * call.stride), load(square, k * n)))


@part
def _finish_scores(call, seq, block, scores, bends, square):
    """Turns scaled products into scores: softcap, biases, then -inf for what is left out. `bends`, unless null, gets
    the softcap's derivative."""
    n, stride = lanes(scores), call.stride
    width = (block.queries + n - 1) // n * n
    never = splat(scores, _NEVER)
    if call.softcap != 0:
        for j in range(block.keys):
            for i in range(j * stride, j * stride + width, n):
                bent = tanh(load(scores, i) / call.softcap)
                store(scores, i, bent * call.softcap)
                if not is_null(bends):
                    store(bends, i, 1.0 - bent * bent)
    if not is_null(call.slopes):
        by = call.slopes[block.h]
        for j in range(block.keys):
            behind = block.l + seq.offset - block.s - j
            for i in range(0, width, n):
                score, distance = load(scores, j * stride + i), magnitude(ramp(scores, float(behind + i)))
                store(scores, j * stride + i, score - distance * by)
    if not is_null(call.bias) or not is_null(call.allowed):
        _add_mask(call, seq, block, scores, square)
    if not is_null(call.padding):
        for j in range(block.keys):
            if call.padding[seq.sample * call.S + block.s + j] != 0:
                _fill(at(scores, j * stride), width, _NEVER)
    if not _is_inside(seq, block):
        for j in range(block.keys):
            first = splat(scores, float(_first_query(seq, block.s + j) - block.l))
            end = splat(scores, float(_end_query(seq, block.s + j + 1) - block.l))
            for i in range(0, width, n):
                place, score = ramp(scores, float(i)), load(scores, j * stride + i)
                score = where_less(place, first, never, where_less(place, end, score, never))
                store(scores, j * stride + i, score)


@jit
def _raised(base, highest):
    """What scores are taken relative to: the highest, or anything where that is -inf."""
    return where_equal(highest, splat(base, _NEVER), zeros(base), highest)


@part
def _softmax(block, scores, stride, highest, weight, shrink):
    """A step of the online softmax: scores become exp(score - highest), with highest[queries] and the sums
    weight[queries] brought up to date. Returns whether earlier sums have to be multiplied by shrink[queries]."""
    n = lanes(scores)
    zero, one = zeros(scores), splat(scores, 1.0)
    changed = zero
    for i in range(0, block.queries, n):
        column = at(scores, i)
        before = load(highest, i)
        # Four chains, since a maximum takes a while.
        a, b, c, d = before, before, before, before
        whole = block.keys // 4 * 4
        for j in range(0, whole, 4):
            a = larger(a, load(column, j * stride))
            b = larger(b, load(column, (j + 1) * stride))
            c = larger(c, load(column, (j + 2) * stride))
            d = larger(d, load(column, (j + 3) * stride))
        for j in range(whole, block.keys):
            a = larger(a, load(column, j * stride))
        top = larger(larger(a, b), larger(c, d))
        base = _raised(scores, top)
        shrunk = exp(before - base)
        sum_ = zero
        for j in range(block.keys):
            p = exp(load(column, j * stride) - base)
            store(column, j * stride, p)
            sum_ = sum_ + p
        old = load(weight, i)
        changed = changed + where_less(zero, old, where_less(shrunk, one, one, zero), zero)
        store(shrink, i, shrunk)
        store(highest, i, top)
        store(weight, i, old * shrunk + sum_)
    return total(changed) > 0


# Dropout. The head's weights are one of the matrices that it is drawn for.


@part
def _draw_block(call, matrix, block, factors):
    """Factors of a block's queries and all of the _KEYS keys around its own, [_KEYS][stride]."""
    for counter in range(COUNTERS):
        column = block.s // _KEYS * COUNTERS + counter
        for i in range(0, block.queries, COUNTERS):
            draw(
                call.seed, call.dropped, call.kept, matrix, block.l + i, 1, column, 0,
                at(factors, counter * call.stride + i), COUNTERS * call.stride,
            )  # fmt: skip


@jit
def _draw_row(call, matrix, row, first, factors):
    """Factors of the _KEYS keys of a query from `first` on, a multiple of it."""
    draw(call.seed, call.dropped, call.kept, matrix, row, 0, first // _KEYS * COUNTERS, 1, factors, COUNTERS)


# Forward.


class Rows(NamedTuple):
    """Queries on their way through the keys."""

    sums: Any
    largest: Any
    weight: Any


@jit
def _rows(call, my):
    """Those of a member."""
    return Rows(at(call.sums, my), at(call.largest, my), at(call.weight, my))


@jit
def _start(rows, count, width):
    _fill(rows.sums, count * width, 0.0)
    _fill(rows.largest, count, _NEVER)
    _fill(rows.weight, count, 0.0)


@jit
def _finish(call, rows, row, seq, h, l, count):
    """Writes out and lse of queries whose keys have all been added: those from l on are in rows from `row` on."""
    for r in range(count):
        weight = rows.weight[row + r]
        there = (seq.sample * call.H + h) * call.L + seq.q0 + l + r
        if weight == 0:
            call.lse[there] = _NEVER
        else:
            call.lse[there] = rows.largest[row + r] + math.log(weight)
        out = at(call.out, seq.sample * call.out_n + h * call.out_h + (seq.q0 + l + r) * call.out_l)
        by = splat(call.out, 0.0 if weight == 0 else 1.0) / splat(call.out, 1.0 if weight == 0 else weight)
        _write(at(rows.sums, (row + r) * call.value_width), by, out, call.Ev)


@jit
def _is_finite(call, my, i, count):
    """Whether the values of the i-th block of packed keys are; looked up when somebody first leaves one of them out."""
    if call.finite[my + i] < 0:
        panel = 2 * lanes(call.v_rows)
        first = i * _KEYS
        some = min(_KEYS, count - first)
        finite = True
        for p in range(call.value_width // panel):
            finite = finite and _all_finite(at(call.v_rows, my + (p * count + first) * panel), some * panel)
        call.finite[my + i] = 1.0 if finite else 0.0
    return call.finite[my + i] > 0


@jit
def _forward(begin, end, call):
    my = begin * call.desk
    heads = 1 if call.average != 0 else call.H
    per_chunk = call.sequences * heads
    task = take(call.counters)
    while task < call.chunks * per_chunk:
        seq = _sequence(call, task % per_chunk // heads)
        # Those at the end first: causal ones are the longest.
        l = (call.chunks - 1 - task // per_chunk) * call.chunk
        l_end = min(seq.L, l + call.chunk)
        if l < l_end:
            first, last = (0, call.H) if call.average != 0 else (task % heads, task % heads + 1)
            for h in range(first, last):
                _attend(call, my, seq, h, l, l_end)
        task = take(call.counters)


@jit
def _attend(call, my, seq, h, l, l_end):
    """Queries [l, l_end) of a head."""
    _start(_rows(call, my), call.chunk, call.value_width)
    q = at(call.q, seq.sample * call.q_n + h * call.q_h + (seq.q0 + l) * call.q_l)
    _pack_queries(q, call.q_l, l_end - l, call.E, call.scale, at(call.at_q, my))
    every = not is_null(call.weights)  # every score is wanted, if only to see that it is none
    first = 0 if every else _first_key(seq, l) // _KEYS * _KEYS
    # Whole blocks: what a block holds, and so how it is added, must not depend on where a chunk of queries ends.
    blocks = (_end_key(seq, l_end - 1) + _KEYS - 1) // _KEYS
    last = seq.S if every else min(seq.S, blocks * _KEYS)
    head = h // (call.H // call.Hk)
    for s in range(first, last, call.packed_keys):
        count = min(call.packed_keys, last - s)
        v = at(call.v, seq.sample * call.v_n + head * call.v_h + (seq.k0 + s) * call.v_l)
        padding = call.padding if is_null(call.padding) else at(call.padding, seq.sample * call.S + s)
        _pack_rows(v, call.v_l, count, call.Ev, padding, at(call.v_rows, my))
        for i in range((count + _KEYS - 1) // _KEYS):
            call.finite[my + i] = -1.0
        for i in range(l, l_end, call.stride):
            for t in range(0, count, _KEYS):
                block = Block(h, i, min(call.stride, l_end - i), s + t, min(_KEYS, count - t))
                if not every:
                    block = _narrowed(seq, block)
                    if block.keys == 0 or _left_out(call, seq, block):
                        continue
                _add_block(call, my, seq, head, block, i - l, s, count)
    _finish(call, _rows(call, my), 0, seq, h, l, l_end - l)
    if every:
        for i in range(l, l_end):
            _finish_weights(call, my, seq, h, i - l, i)


@jit
def _add_block(call, my, seq, head, block, row, packed, count):
    """Adds a block of keys to its queries, the chunk's from `row` on, of a packing of `count` keys from `packed` on."""
    n, stride, width = lanes(call.scores), call.stride, call.value_width
    k = at(call.k, seq.sample * call.k_n + head * call.k_h + (seq.k0 + block.s) * call.k_l)
    _multiply(seq, block, k, call.k_l, call.E, at(call.at_q, my + row * call.E), at(call.scores, my), stride)
    whole = _is_whole(call, seq, block)
    if not whole:
        _finish_scores(call, seq, block, at(call.scores, my), null(call.scores), at(call.square, my))
    if not is_null(call.weights):
        _keep_scores(call, my, seq, block, row)
    sums = at(call.sums, my + row * width)
    highest, weight = at(call.largest, my + row), at(call.weight, my + row)
    if _softmax(block, at(call.scores, my), stride, highest, weight, at(call.shrink, my)):
        for r in range(block.queries):
            if call.shrink[my + r] != 1:
                _scale_row(at(sums, r * width), width, call.shrink[my + r])
    if call.dropped != 0:
        _draw_block(call, seq.index * call.H + block.h, block, at(call.factors, my))
        skipped = block.s % _KEYS * stride
        for j in range(block.keys):
            for i in range(j * stride, j * stride + block.queries, n):
                store(call.scores, my + i, load(call.scores, my + i) * load(call.factors, my + skipped + i))
    finite = whole or _is_finite(call, my, (block.s - packed) // _KEYS, count)
    panel = 2 * n
    values = at(call.v_rows, my + (block.s - packed) * panel)
    _add_keys(seq, block, at(call.scores, my), stride, values, count * panel, sums, width, finite)


@jit
def _weights_row(call, my, seq, h, row, l):
    """Where raw scores of query l go, which is the chunk's in `row`."""
    if call.average != 0:
        return at(call.raw, my + row * ((call.S + _KEYS - 1) // _KEYS * _KEYS))
    return at(call.weights, ((seq.sample * call.H + h) * call.L + l) * call.S)


@part
def _keep_scores(call, my, seq, block, row):
    n = lanes(call.scores)
    for i in range(0, block.queries, n):
        for j in range(0, block.keys, n):
            rows, keys = min(n, block.queries - i), min(n, block.keys - j)
            turn(at(call.scores, my + j * call.stride + i), call.stride, keys, rows, at(call.square, my), n)
            for r in range(rows):
                to = _weights_row(call, my, seq, block.h, row + i + r, block.l + i + r)
                store(to, block.s + j, load(call.square, my + r * n), keys)


@part
def _finish_weights(call, my, seq, h, row, l):
    """Raw scores of query l become weights."""
    n = lanes(call.scores)
    to = _weights_row(call, my, seq, h, row, l)
    weight = splat(to, call.weight[my + row])
    zero, one = zeros(to), splat(to, 1.0)
    inverse = where_equal(weight, zero, zero, one / weight)
    base = where_equal(weight, zero, zero, splat(to, call.largest[my + row]))
    mean = at(call.weights, (seq.sample * call.L + l) * call.S)
    for s in range(0, call.S, _KEYS):
        if call.dropped != 0:
            _draw_row(call, seq.index * call.H + h, l, s, at(call.factors, my))
        for j in range(0, min(_KEYS, call.S - s), n):
            some = call.S - s - j
            p = exp(load(to, s + j, some) - base) * inverse
            if call.dropped != 0:
                p = p * load(call.factors, my + j)
            if call.average == 0:
                store(to, s + j, p, some)
            else:
                p = p / float(call.H)
                store(mean, s + j, p if h == 0 else load(mean, s + j, some) + p, some)


FORWARD = Kernel("attention_forward", _forward, Call)


# Forward of few queries: keys and values are read once, where they are, and keys are the lanes. Where there are few
# heads, splits of their keys are tasks; who finishes a head's last one merges them, in order.


@jit
def _decode(begin, end, call):
    my = begin * call.desk
    heads = call.sequences * call.Hk
    task = take(call.counters)
    while task < heads * call.splits:
        head, split = task // call.splits, task % call.splits
        seq = _sequence(call, head // call.Hk)
        if seq.L > 0:
            rows = _rows(call, my) if call.splits == 1 else _part(call, head, split)
            _decode_keys(call, my, rows, seq, head % call.Hk, split * call.split_keys)
            if call.splits == 1:
                _finish_rows(call, rows, seq, head % call.Hk)
            elif fetch_add(call.counters, 1 + head, 1) == call.splits - 1:
                _merge(call, seq, head)
        task = take(call.counters)


@jit
def _part(call, head, split):
    part = at(call.parts, (head * call.splits + split) * call.rows * (call.value_width + 2 * lanes(call.parts)))
    behind = call.rows * call.value_width
    return Rows(part, at(part, behind), at(part, behind + call.rows * lanes(part)))


@part
def _decode_keys(call, my, rows, seq, head, s):
    n, group, width = lanes(call.scores), call.H // call.Hk, call.value_width
    queries = group * seq.L
    _fill(rows.sums, call.rows * width, 0.0)
    _fill(rows.largest, call.rows, _NEVER)
    _fill(rows.weight, call.rows, 0.0)
    for row in range(queries):
        h, l = head * group + row // seq.L, row % seq.L
        q = at(call.q, seq.sample * call.q_n + h * call.q_h + (seq.q0 + l) * call.q_l)
        for e in range(0, call.E, n):
            store(call.at_q, my + row * call.width + e, load(q, e, call.E - e) * call.scale)
    last = min(s + call.split_keys, _end_key(seq, seq.L - 1))
    for t in range(max(s, _first_key(seq, 0) // _KEYS * _KEYS), last, _FEW_KEYS):
        count = min(_FEW_KEYS, last - t)
        if _padded_keys(call, seq, t, count) == count:
            continue
        k = at(call.k, seq.sample * call.k_n + head * call.k_h + (seq.k0 + t) * call.k_l)
        v = at(call.v, seq.sample * call.v_n + head * call.v_h + (seq.k0 + t) * call.v_l)
        whole = _is_whole(call, seq, Block(head, 0, seq.L, t, count))
        finite = whole or _rows_finite(v, call.v_l, count, call.Ev)
        for row in range(queries):
            h, l = head * group + row // seq.L, row % seq.L
            score = at(call.scores, my + row * _FEW_KEYS)
            for j in range(0, count, n):
                dots(
                    min(n, count - j), call.E, at(k, j * call.k_l), call.k_l, at(call.at_q, my + row * call.width),
                    at(score, j),
                )  # fmt: skip
            if not whole:
                _finish_row(call, seq, h, l, t, count, score)
            _softmax_row(rows, row, width, score, count)
            if call.dropped != 0:
                for j in range(0, count, _KEYS):
                    _draw_row(call, seq.index * call.H + h, l, t + j, at(call.factors, my))
                    for i in range(j, min(count, j + _KEYS), n):
                        store(score, i, load(score, i) * load(call.factors, my + i - j))
        if finite:
            _add_values(call, queries, count, at(call.scores, my), v, rows.sums)
        else:
            for row in range(queries):
                for j in range(count):
                    by = call.scores[my + row * _FEW_KEYS + j]
                    if by != 0:  # which leaves out a value that may be infinite or NaN
                        for e in range(0, call.Ev, n):
                            value = load(v, j * call.v_l + e, call.Ev - e)
                            store(rows.sums, row * width + e, load(rows.sums, row * width + e) + value * by)


@jit
def _rows_finite(rows, row, count, width):
    product = zeros(rows)
    for j in range(count):
        for e in range(0, width, lanes(rows)):
            product = product + load(rows, j * row + e, width - e) * 0.0
    return total(product) == 0


@jit
def _finish_row(call, seq, h, l, s, count, score):
    """What _finish_scores does, for one query, whose keys are the lanes."""
    n = lanes(score)
    never = splat(score, _NEVER)
    first, end = splat(score, float(_first_key(seq, l) - s)), splat(score, float(_end_key(seq, l) - s))
    for j in range(0, count, n):
        some = count - j
        x = load(score, j)
        if call.softcap != 0:
            x = tanh(x / call.softcap) * call.softcap
        if not is_null(call.slopes):
            x = x - magnitude(ramp(score, float(s + j - l - seq.offset))) * call.slopes[h]
        if not is_null(call.bias) or not is_null(call.allowed):
            x = _masked(score, x, _mask_row(call, _mask_at(call, seq, h, l, s + j), some))
        if not is_null(call.padding):
            x = where_set(score, call.padding, seq.sample * call.S + s + j, some, never, x)
        place = ramp(score, float(j))
        store(score, j, where_less(place, first, never, where_less(place, end, x, never)))


@jit
def _softmax_row(rows, row, width, score, count):
    """A step of the online softmax of one query: its scores, followed by room for a vector, become exp(score -
    largest)."""
    n = lanes(score)
    filled = (count + n - 1) // n * n
    for j in range(count, filled):
        score[j] = _NEVER
    high = splat(score, rows.largest[row])
    for j in range(0, filled, n):
        high = larger(high, load(score, j))
    base = _raise(rows, row, width, largest(high))
    sum_ = zeros(score)
    for j in range(0, filled, n):
        p = exp(load(score, j) - base)
        store(score, j, p)
        sum_ = sum_ + p
    rows.weight[row] += total(sum_)


@jit
def _raise(rows, row, width, top):
    """Sets the largest score of a query; returns what scores are to be taken relative to."""
    before, base = rows.largest[row], _raised(rows.sums, splat(rows.sums, top))
    rows.largest[row] = top
    if top != before and before != _NEVER:  # else nothing has been summed up
        by = largest(exp(before - base))
        rows.weight[row] *= by
        _scale_row(at(rows.sums, row * width), width, by)
    return base


@jit
def _add_values(call, queries, count, scores, v, sums):
    """sums[queries][value_width] += weights [queries, _FEW_KEYS] times rows of values."""
    n = lanes(scores)
    panels = call.Ev // (2 * n)
    multiply(queries, panels, 2 * n, count, scores, _FEW_KEYS, v, call.v_l, sums, call.value_width, True)
    for row in range(queries):
        by = at(scores, row * _FEW_KEYS)
        for e in range(panels * 2 * n, call.Ev, n):
            some = call.Ev - e
            a, b = load(sums, row * call.value_width + e), zeros(sums)
            for j in range(0, count // 2 * 2, 2):
                a = a + load(v, j * call.v_l + e, some) * by[j]
                b = b + load(v, (j + 1) * call.v_l + e, some) * by[j + 1]
            if count % 2 == 1:
                a = a + load(v, (count - 1) * call.v_l + e, some) * by[count - 1]
            store(sums, row * call.value_width + e, a + b)


@part
def _finish_rows(call, rows, seq, head):
    group = call.H // call.Hk
    for row in range(group * seq.L):
        _finish(call, rows, row, seq, head * group + row // seq.L, row % seq.L, 1)


@part
def _merge(call, seq, head):
    all_ = _part(call, head, 0)
    width = call.value_width
    for row in range(call.H // call.Hk * seq.L):
        for split in range(1, call.splits):
            more = _part(call, head, split)
            top = max(all_.largest[row], more.largest[row])
            _raise(all_, row, width, top)
            _raise(more, row, width, top)
            all_.weight[row] += more.weight[row]
            for u in range(row * width, (row + 1) * width, lanes(all_.sums)):
                store(all_.sums, u, load(all_.sums, u) + load(more.sums, u))
    _finish_rows(call, all_, seq, head % call.Hk)


DECODE = Kernel("attention_decode", _decode, Call)


# Backward. A task is the sequences and heads that add to the same bias, in order. Where these are fewer than threads,
# each of their blocks of keys is a task, and then, since those add to the same queries, so is each chunk of queries,
# with scores made a second time.


@jit
def _backward(begin, end, call):
    my = begin * call.desk
    held = -1  # the sequence and head whose queries are packed
    first_part = call.groups_n * call.groups_h * call.tiles
    task = take(call.counters)
    while task < first_part + call.sequences * call.Hk * call.chunks:
        samples, heads = 1, 1
        if task < first_part:
            group = task // call.tiles
            samples, heads = call.sequences // call.groups_n, call.Hk // call.groups_h
            sequence, head = group // call.groups_h * samples, group % call.groups_h * heads
        else:
            sequence, head = (task - first_part) // call.chunks // call.Hk, (task - first_part) // call.chunks % call.Hk
        for i in range(samples * heads):
            seq, h = _sequence(call, sequence + i // heads), head + i % heads
            if held != seq.index * call.Hk + h:
                held = seq.index * call.Hk + h
                _pack_heads(call, my, seq, h)
            if task < first_part:
                _keys_backward(call, my, seq, h, task % call.tiles)
            else:
                _queries_backward(call, my, seq, h, (task - first_part) % call.chunks * call.chunk)
        task = take(call.counters)


@jit
def _keys_backward(call, my, seq, head, part):
    """Gradients of a head's keys, of all of them and of the queries, or of one block of keys."""
    width, value_width, group = call.width, call.value_width, call.H // call.Hk
    first, last = 0, seq.S
    if call.splits != 0:
        first, last = part * _KEYS, min(seq.S, (part + 1) * _KEYS)
    with_queries = call.splits == 0 and not is_null(call.dq)
    if with_queries:
        _fill(at(call.sum_q, my), group * call.rows * width, 0.0)
    for s in range(first, last, _KEYS):
        count = min(_KEYS, last - s)
        _fill(at(call.sum_k, my), count * width, 0.0)
        _fill(at(call.sum_v, my), count * value_width, 0.0)
        l, l_end = _first_query(seq, s), _end_query(seq, s + count)
        if l < l_end and _padded_keys(call, seq, s, count) < count:
            finite = _pack_keys(call, my, seq, head, s, count)
            for g in range(group):
                for i in range(l // call.stride * call.stride, l_end, call.stride):
                    block = Block(head * group + g, i, min(call.stride, seq.L - i), s, count)
                    _block_backward(call, my, seq, head, g, block, finite, True, with_queries)
        for j in range(count):
            place = seq.k0 + s + j
            if not is_null(call.dk):
                to = at(call.dk, seq.sample * call.dk_n + head * call.dk_h + place * call.dk_l)
                _write(at(call.sum_k, my + j * width), call.scale, to, call.E)
            if not is_null(call.dv):
                to = at(call.dv, seq.sample * call.dv_n + head * call.dv_h + place * call.dv_l)
                _write(at(call.sum_v, my + j * value_width), 1.0, to, call.Ev)
    if with_queries:
        _write_queries(call, my, seq, head, 0, seq.L)


@jit
def _queries_backward(call, my, seq, head, l):
    """Gradients of a chunk of the queries that share a head of keys."""
    group, l_end = call.H // call.Hk, min(seq.L, l + call.chunk)
    if l >= l_end:
        return
    for g in range(group):
        _fill(at(call.sum_q, my + (g * call.rows + l) * call.width), (l_end - l) * call.width, 0.0)
    for s in range(_first_key(seq, l) // _KEYS * _KEYS, _end_key(seq, l_end - 1), _KEYS):
        count = min(_KEYS, seq.S - s)
        if _padded_keys(call, seq, s, count) == count:
            continue
        finite = _pack_keys(call, my, seq, head, s, count)
        for g in range(group):
            for i in range(l, l_end, call.stride):
                block = Block(head * group + g, i, min(call.stride, l_end - i), s, count)
                _block_backward(call, my, seq, head, g, block, finite, False, True)
    _write_queries(call, my, seq, head, l, l_end)


@part
def _write_queries(call, my, seq, head, l, l_end):
    group = call.H // call.Hk
    for g in range(group):
        for i in range(l, l_end):
            h = head * group + g
            to = at(call.dq, seq.sample * call.dq_n + h * call.dq_h + (seq.q0 + i) * call.dq_l)
            _write(at(call.sum_q, my + (g * call.rows + i) * call.width), call.scale, to, call.E)


@part
def _pack_heads(call, my, seq, head):
    """All queries of the heads that share a head of keys, and what belongs to them."""
    group, n = call.H // call.Hk, lanes(call.base)
    for g in range(group):
        h, skip = head * group + g, g * call.rows
        q = at(call.q, seq.sample * call.q_n + h * call.q_h + seq.q0 * call.q_l)
        dout = at(call.dout, seq.sample * call.dout_n + h * call.dout_h + seq.q0 * call.dout_l)
        out = at(call.out, seq.sample * call.out_n + h * call.out_h + seq.q0 * call.out_l)
        at_dout, delta = at(call.at_dout, my + skip * call.Ev), at(call.delta, my + skip)
        q_rows, dout_rows = at(call.q_rows, my + skip * call.width), at(call.dout_rows, my + skip * call.value_width)
        _pack_rows(q, call.q_l, seq.L, call.E, null(call.padding), q_rows)
        _pack_rows(dout, call.dout_l, seq.L, call.Ev, null(call.padding), dout_rows)
        _pack_queries(q, call.q_l, seq.L, call.E, call.scale, at(call.at_q, my + skip * call.E))
        _pack_queries(dout, call.dout_l, seq.L, call.Ev, 1.0, at_dout)
        for l in range(0, seq.L, call.stride):
            queries = min(call.stride, seq.L - l)
            _pack_queries(at(out, l * call.out_l), call.out_l, queries, call.Ev, 1.0, at(call.at_out, my))
            for i in range(0, queries, n):
                panel = i // (2 * n) * 2 * n * call.Ev + i % (2 * n)
                sum_ = zeros(call.base)  # in the order of products with values, which it cancels where one weight is 1
                for e in range(call.Ev):
                    ahead = panel + e * 2 * n
                    sum_ = sum_ + load(at_dout, l * call.Ev + ahead) * load(call.at_out, my + ahead)
                store(delta, l + i, sum_)
        if not is_null(call.dlse):
            for l in range(seq.L):
                delta[l] -= call.dlse[(seq.sample * call.H + h) * call.L + seq.q0 + l]
        _relate(call, my, seq, head, h, skip)


@jit
def _relate(call, my, seq, head, h, skip):
    """What weights are taken relative to: lse, but where that is large, as with masks of large numbers, nothing is left
    in it of the sum's logarithm. There the largest score and the sum are made anew."""
    for l in range(0, seq.L, call.stride):
        queries = min(call.stride, seq.L - l)
        lse = at(call.lse, (seq.sample * call.H + h) * call.L + seq.q0 + l)
        base, share = at(call.base, my + skip + l), at(call.share, my + skip + l)
        _fill(base, call.stride, 0.0)
        _fill(share, call.stride, 0.0)
        again = False
        for r in range(queries):
            if lse[r] != _NEVER:
                base[r] = lse[r]
                share[r] = 1.0
                again = again or abs(lse[r]) > call.large
        if not again:
            continue
        _fill(at(call.largest, my), call.stride, _NEVER)
        _fill(at(call.weight, my), call.stride, 0.0)
        for s in range(0, seq.S, _KEYS):
            block = _narrowed(seq, Block(h, l, queries, s, min(_KEYS, seq.S - s)))
            if block.keys == 0 or _left_out(call, seq, block):
                continue
            k = at(call.k, seq.sample * call.k_n + head * call.k_h + (seq.k0 + block.s) * call.k_l)
            at_q = at(call.at_q, my + (skip + l) * call.E)
            _multiply(seq, block, k, call.k_l, call.E, at_q, at(call.scores, my), call.stride)
            _finish_scores(call, seq, block, at(call.scores, my), null(call.scores), at(call.square, my))
            highest, weight = at(call.largest, my), at(call.weight, my)
            _softmax(block, at(call.scores, my), call.stride, highest, weight, at(call.shrink, my))
        for r in range(queries):
            if lse[r] != _NEVER and abs(lse[r]) > call.large:
                base[r] = call.largest[my + r]
                share[r] = 1.0 / call.weight[my + r]


@jit
def _pack_keys(call, my, seq, head, s, count):
    """Packs a block of keys; returns whether all are finite."""
    k = at(call.k, seq.sample * call.k_n + head * call.k_h + (seq.k0 + s) * call.k_l)
    padding = call.padding if is_null(call.padding) else at(call.padding, seq.sample * call.S + s)
    _pack_rows(k, call.k_l, count, call.E, padding, at(call.k_rows, my))
    return _all_finite(at(call.k_rows, my), count * call.width)


@part
def _block_backward(call, my, seq, head, g, packed, finite, with_keys, with_queries):
    """What the queries and the keys of a block, whole as it was packed, give each other."""
    block = _narrowed(seq, packed)
    if block.keys == 0 or _left_out(call, seq, block):
        return
    n, stride, skip, j = lanes(call.scores), call.stride, g * call.rows, block.s - packed.s
    panel, l = 2 * lanes(call.scores), block.l
    k = at(call.k, seq.sample * call.k_n + head * call.k_h + (seq.k0 + block.s) * call.k_l)
    v = at(call.v, seq.sample * call.v_n + head * call.v_h + (seq.k0 + block.s) * call.v_l)
    at_q, at_dout = at(call.at_q, my + (skip + l) * call.E), at(call.at_dout, my + (skip + l) * call.Ev)
    scores, dscores = at(call.scores, my), at(call.dscores, my)
    # As in forward, to the bit: scores that differ in rounding would make weights that do not sum to one.
    _multiply(seq, block, k, call.k_l, call.E, at_q, scores, stride)
    _multiply(seq, block, v, call.v_l, call.Ev, at_dout, dscores, stride)
    if not _is_whole(call, seq, block):
        bends = at(call.bends, my) if call.softcap != 0 else null(call.bends)
        _finish_scores(call, seq, block, scores, bends, at(call.square, my))
    factors = at(call.factors, my)
    if call.dropped != 0:
        _draw_block(call, seq.index * call.H + block.h, block, factors)
        factors = at(factors, block.s % _KEYS * stride)
    for i in range(0, block.queries, n):
        _weigh(call, my, block, i, skip + l + i, factors)
    if not is_null(call.dbias) and with_keys:
        _add_to_bias(call, my, seq, block)
    if call.softcap != 0:
        for r in range(block.keys):
            for u in range(r * stride, r * stride + block.queries, n):
                # Where a product was not made, the slope is that of anything.
                ds, zero = load(dscores, u), zeros(dscores)
                store(dscores, u, where_equal(ds, zero, zero, ds * load(call.bends, my + u)))
    if with_keys and not is_null(call.dv):
        dout_rows, sums = at(call.dout_rows, my + skip * call.value_width), at(call.sum_v, my + j * call.value_width)
        _add_queries(seq, block, scores, stride, dout_rows, seq.L * panel, sums, call.value_width)
    if with_keys and not is_null(call.dk):
        q_rows, sums = at(call.q_rows, my + skip * call.width), at(call.sum_k, my + j * call.width)
        _add_queries(seq, block, dscores, stride, q_rows, seq.L * panel, sums, call.width)
    if with_queries:
        k_rows, sums = at(call.k_rows, my + j * panel), at(call.sum_q, my + (skip + l) * call.width)
        _add_keys(seq, block, dscores, stride, k_rows, packed.keys * panel, sums, call.width, finite)


@jit
def _weigh(call, my, block, i, query, factors):
    """Of a vector of queries: scores become weights, and products of values and out's gradients become the scores'."""
    base, share, delta = load(call.base, my + query), load(call.share, my + query), load(call.delta, my + query)
    zero = zeros(call.scores)
    for j in range(block.keys):
        where = j * call.stride + i
        p, dp = exp(load(call.scores, my + where) - base) * share, load(call.dscores, my + where)
        kept = p
        if call.dropped != 0:
            factor = load(factors, where)
            kept, dp = kept * factor, dp * factor
        store(call.scores, my + where, kept)
        # What is left out may stand opposite anything, NaN too.
        store(call.dscores, my + where, where_equal(p, zero, zero, p * (dp - delta)))


@part
def _add_to_bias(call, my, seq, block):
    """The bias's gradient is that of the scores, summed over what it does not tell apart. Lanes beyond the last query
    hold zeros."""
    n, ds = lanes(call.dscores), at(call.dscores, my)
    to = at(call.dbias, seq.sample * call.d_n + block.h * call.d_h + block.l * call.d_l + block.s * call.d_s)
    if call.d_l != 0 and call.d_s != 0:
        for i in range(0, block.queries, n):
            for j in range(0, block.keys, n):
                rows, keys = min(n, block.queries - i), min(n, block.keys - j)
                turn(at(ds, j * call.stride + i), call.stride, keys, rows, at(call.square, my), n)
                for r in range(rows):
                    row = (i + r) * call.d_l + j
                    store(to, row, load(to, row, keys) + load(call.square, my + r * n), keys)
    elif call.d_s != 0:
        for j in range(block.keys):
            sum_ = zeros(ds)
            for i in range(0, block.queries, n):
                sum_ = sum_ + load(ds, j * call.stride + i)
            to[j * call.d_s] += total(sum_)
    else:
        for i in range(0, block.queries, n):
            sum_ = zeros(ds)
            for j in range(block.keys):
                sum_ = sum_ + load(ds, j * call.stride + i)
            store(call.square, my, sum_)
            for r in range(min(n, block.queries - i)):
                to[(i + r) * call.d_l] += call.square[my + r]


BACKWARD = Kernel("attention_backward", _backward, Call)


# From tensors.


def _laid_out(t: Tensor) -> Tensor:
    """With neighbours in memory in the last dimension."""
    return t if t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous()


def _strides(name: str, t: Tensor | None) -> dict[str, Any]:
    """A tensor [N, heads, places, width] and its strides as fields of a call."""
    if t is None or not t.numel():
        return {name: None}
    return dict(zip((name, f"{name}_n", f"{name}_h", f"{name}_l"), (t, *t.stride()[:3]), strict=True))


def _told_apart(t: Tensor) -> list[int]:
    """The strides of a mask, 0 for what it does not tell apart."""
    return [stride if size > 1 else 0 for stride, size in zip(t.stride(), t.shape, strict=True)]


def _ends(name: str, ends: Tensor, count: int) -> Tensor:
    """What a compiled graph has not checked."""
    values = ends.tolist()
    if not values or values != sorted(values) or values[0] != 0 or values[-1] != count:
        raise ValueError(f"{name} must rise from 0 to {count}, the number of rows, got {values}")
    return ends.contiguous()


_NOTHING = Call(*(0 if kind is Size else 0.0 if kind is Number else None for kind in Call.__annotations__.values()))


def _check(arguments: Arguments) -> None:
    """Raises ValueError unless the tensors fit together, as the kernels rely on."""
    query, key, value, mask, padding, slopes, *_ = arguments
    (N, H, L, E), dtype = query.shape, query.dtype
    Hk, S = key.shape[1:3]
    expect("attention", "key", key, (N, Hk, S, E), dtype)
    expect("attention", "value", value, (N, Hk, S, value.shape[3]), dtype)
    if H and (not Hk or H % Hk):
        raise ValueError(f"attention: key's {Hk} heads must divide query's {H}")
    if mask is not None:
        shape = [own if own == 1 else whole for own, whole in zip(mask.shape, (N, H, L, S), strict=True)]
        expect("attention", "mask", mask, tuple(shape), torch.bool if mask.dtype == torch.bool else dtype)
    expect("attention", "key_padding", padding, (N, S), torch.bool)
    expect("attention", "slopes", slopes, (H,), dtype)


class _Problem:
    """A call's tensors in the layout that the kernels read, alive for as long as they run."""

    def __init__(self, arguments: Arguments) -> None:
        query, key, value, mask, padding, slopes, ends_q, ends_k, seed, *_ = arguments
        _check(arguments)
        self.dtype = query.dtype
        N, H, L, E = query.shape
        Hk, S, Ev = key.shape[1], key.shape[2], value.shape[3]
        self.panel = panel_of(query.dtype)
        fields: dict[str, Any] = dict(
            H=H, Hk=Hk, L=L, S=S, E=E, Ev=Ev, width=in_panels(E, query.dtype),
            value_width=in_panels(Ev, query.dtype),
            sequences=N, scale=arguments.scale, softcap=arguments.softcap, left=arguments.left, right=arguments.right,
            bottom_right=int(arguments.bottom_right),
        )  # fmt: skip
        for name, t in (("q", query), ("k", key), ("v", value)):
            fields.update(_strides(name, _laid_out(t)))
        if mask is not None:
            if mask.shape[3] > 1 and mask.stride(3) > 1:
                mask = mask.contiguous()
            fields.update(zip(("m_n", "m_h", "m_l", "m_s"), _told_apart(mask), strict=True))
            fields["allowed" if mask.dtype == torch.bool else "bias"] = mask
        if padding is not None:
            fields["padding"] = padding.contiguous()
        if slopes is not None:
            fields["slopes"] = slopes.contiguous()
        self.longest_q, self.longest_k = L, S
        if ends_q is not None and ends_k is not None:
            ends_q, ends_k = _ends("cu_seqlens_q", ends_q, L), _ends("cu_seqlens_k", ends_k, S)
            fields.update(sequences=len(ends_q) - 1, ends_q=ends_q, ends_k=ends_k)
            self.longest_q, self.longest_k = (
                int(ends.diff().max()) if len(ends) > 1 else 0 for ends in (ends_q, ends_k)
            )
        if seed is not None and (dropped := dropped_of(arguments.dropout_p)):
            fields.update(seed=int(seed), dropped=dropped, kept=kept_factor(arguments.dropout_p))
        self.fields = fields

    def members(self) -> int:
        """How many threads there is work for."""
        pairs = self.fields["sequences"] * self.fields["H"] * self.longest_q * self.longest_k
        return min(team.threads(), pairs * (self.fields["E"] + self.fields["Ev"]) // _WORK_PER_MEMBER + 1)

    def run(self, kernel: Kernel[Call], members: int, counters: int = 0, **sizes: int) -> None:
        """Runs a kernel on so many threads, each with scratch of these sizes."""
        starts, end = cut(*sizes.values())
        scratch = torch.empty(members * end, dtype=self.dtype)
        poisoned(scratch)
        begin, bytes_ = scratch.data_ptr(), self.dtype.itemsize
        where = {name: begin + start * bytes_ for name, start in zip(sizes, starts, strict=True)}
        counter = array("q", bytes(8 * (1 + counters)))
        call = _NOTHING._replace(**self.fields, **where, desk=end, counters=counter.buffer_info()[0])
        team.run(kernel, self.dtype, call, members)


def forward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """See `fastseq.ops.attention.Arguments` and `Outputs`."""
    *given, wanted = args
    arguments = Arguments(*given)
    query, key, value = arguments[:3]
    (N, H, L, _), S, Ev = query.shape, key.shape[2], value.shape[3]
    out, lse = empty_like_heads(query, N, H, L, Ev), query.new_empty(N, H, L)
    weights = query.new_empty({NO_WEIGHTS: (0,), EACH_HEAD: (N, H, L, S), AVERAGE: (N, L, S)}[wanted])
    poisoned(out, lse, weights)
    if not lse.numel():
        return out, lse, weights
    problem = _Problem(arguments)
    fields = problem.fields
    average = wanted == AVERAGE and weights.numel() > 0
    fields.update(_strides("out", out), lse=lse, weights=weights if weights.numel() else None, average=int(average))
    members, sequences, Hk = problem.members(), fields["sequences"], fields["Hk"]
    width, value_width, panel = fields["width"], fields["value_width"], problem.panel
    rows = H // Hk * problem.longest_q
    if rows <= _FEW_ROWS and not weights.numel():
        heads, keys = max(1, sequences * Hk), max(1, problem.longest_k)
        splits = max(1, min(ceil_div(_FEW_TASKS, heads), keys // _FEW_KEYS))
        split_keys = ceil_div(ceil_div(keys, splits), _KEYS) * _KEYS
        splits = ceil_div(keys, split_keys)
        parts = query.new_empty(heads * splits * rows * (value_width + panel) if splits > 1 else 0)
        fields.update(rows=rows, splits=splits, split_keys=split_keys, parts=parts)
        problem.run(
            DECODE, members, heads, at_q=rows * width, scores=rows * _FEW_KEYS, factors=_KEYS,
            sums=rows * value_width, largest=rows * panel, weight=rows * panel,
        )  # fmt: skip
        return out, lse, weights
    stride = panel if vector_bytes() == 64 else 48
    packed = min(_MOST_PACKED, max(1, _PACKED_BYTES // ((width + value_width) * query.itemsize * _KEYS)))
    packed_keys = max(1, min(packed, ceil_div(problem.longest_k, _KEYS))) * _KEYS
    # As many tasks as make threads end at about the same time.
    blocks, heads = max(1, ceil_div(problem.longest_q, stride)), max(1, sequences * (1 if average else H))
    tasks = min(blocks, ceil_div(4 * members, heads))
    chunk = stride if average else min(_SHARING_BLOCKS, ceil_div(blocks, tasks)) * stride
    fields.update(stride=stride, chunk=chunk, chunks=ceil_div(problem.longest_q, chunk), packed_keys=packed_keys)
    problem.run(
        FORWARD, members, at_q=chunk * fields["E"], v_rows=packed_keys * value_width, finite=_MOST_PACKED,
        sums=chunk * value_width, largest=chunk, weight=chunk, shrink=stride, scores=_KEYS * stride,
        factors=max(_KEYS, _KEYS * stride if fields.get("dropped") else 0), square=panel * panel // 4,
        raw=chunk * ceil_div(S, _KEYS) * _KEYS if average else 0,
    )  # fmt: skip
    return out, lse, weights


def backward(dout: Tensor | None, dlse: Tensor | None, *args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value and mask, without elements where `needs` says no."""
    *given, out, lse, needs = args
    arguments = Arguments(*given)
    query, key, value, mask = arguments[:4]
    grads = [
        empty_like_heads(t, *t.shape) if need else query.new_empty(0)
        for t, need in zip((query, key, value), needs[:3], strict=True)
    ]
    poisoned(*grads)
    dmask = mask.new_zeros(mask.shape) if mask is not None and needs[3] else query.new_empty(0)
    N, H = query.shape[:2]
    if not N * H:
        return *grads, dmask
    problem = _Problem(arguments)
    fields = problem.fields
    shape = (N, H, query.shape[2])
    for name, t, rest in (
        ("out", out, (value.shape[3],)),
        ("dout", dout, (value.shape[3],)),
        ("lse", lse, ()),
        ("dlse", dlse, ()),
    ):
        expect("attention", name, t, (*shape, *rest), query.dtype)
    if dout is None:
        dout = query.new_zeros(()).expand_as(out).contiguous()
    fields.update(_strides("out", _laid_out(out)), **_strides("dout", _laid_out(dout)), lse=lse.contiguous())
    for name, grad in zip(("dq", "dk", "dv"), grads, strict=True):
        fields.update(_strides(name, grad))
    if dlse is not None:
        fields["dlse"] = dlse.contiguous()
    if dmask.numel():
        fields.update(zip(("d_n", "d_h", "d_l", "d_s"), _told_apart(dmask), strict=True), dbias=dmask)
    members, sequences, Hk, E, Ev = problem.members(), *(fields[name] for name in ("sequences", "Hk", "E", "Ev"))
    width, value_width, panel = fields["width"], fields["value_width"], problem.panel
    stride = 2 * panel if vector_bytes() == 64 else 48
    learns = dmask.numel() > 0
    groups_n = min(1, sequences) if learns and not fields["d_n"] else sequences
    groups_h = 1 if learns and not fields["d_h"] else Hk
    split = groups_n * groups_h < members and not (learns and not fields["d_s"])
    rows = max(1, ceil_div(problem.longest_q, stride)) * stride
    chunk = _CHUNK_BLOCKS * stride
    fields.update(
        stride=stride, rows=rows, groups_n=groups_n, groups_h=groups_h, splits=int(split), chunk=chunk,
        large=64.0 if query.dtype == torch.float32 else 1024.0,
        tiles=ceil_div(problem.longest_k, _KEYS) if split else 1,
        chunks=ceil_div(problem.longest_q, chunk) if split and grads[0].numel() else 0,
    )  # fmt: skip
    queries, scores = H // Hk * rows, _KEYS * stride
    problem.run(
        BACKWARD, members, at_q=queries * E, at_dout=queries * Ev, at_out=stride * Ev, q_rows=queries * width,
        dout_rows=queries * value_width, k_rows=_KEYS * width, base=queries, share=queries, delta=queries,
        sum_q=queries * width if grads[0].numel() else 0, sum_k=_KEYS * width, sum_v=_KEYS * value_width,
        scores=scores, dscores=scores, bends=scores if fields["softcap"] else 0,
        factors=scores if fields.get("dropped") else 0, largest=stride, weight=stride, shrink=stride,
        square=panel * panel // 4,
    )  # fmt: skip
    return *grads, dmask


def warmup(dtype: torch.dtype) -> None:
    """Compiles, or loads, all that calls of this dtype need."""
    for kernel in (FORWARD, DECODE, BACKWARD):
        kernel.function(dtype)
