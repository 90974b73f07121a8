"""Which elements dropout keeps: what `fastseq.reference.dropout` draws, on the GPU."""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from fastseq.reference.dropout import PHILOX_ROUNDS, dropped_of, kept_factor

ROUNDS = tl.constexpr(PHILOX_ROUNDS)
# A column's place among the bits: 16 bits of one of 4 words of 32, 128 columns a block of counters.
LANES = tl.constexpr(16)


@triton.jit
def _words(c0, c1, matrix, seed_low, seed_high):
    zeros = c0 * 0
    low, high = tl.cast(seed_low, tl.uint32, bitcast=True), tl.cast(seed_high, tl.uint32, bitcast=True)
    return tl.philox_impl(c0, c1, zeros + tl.cast(matrix, tl.uint32), zeros, zeros + low, zeros + high, ROUNDS)


@triton.jit
def _all_bits(w0, w1, w2, w3):
    """[..., 2, 2, 2] all eight halves of each counter's words, in the order of columns."""
    even = tl.join(tl.join(w0 & 0xFFFF, w2 & 0xFFFF), tl.join(w1 & 0xFFFF, w3 & 0xFFFF))
    odd = tl.join(tl.join(w0 >> 16, w2 >> 16), tl.join(w1 >> 16, w3 >> 16))
    return tl.join(even, odd)


@triton.jit
def keeps_of(row, s, matrix, seed_low, seed_high, dropped, KEYS: tl.constexpr, ROWS: tl.constexpr, DOWN: tl.constexpr):
    """Which elements are kept of KEYS columns from s, a multiple of KEYS: [ROWS, KEYS], or turned if DOWN.

    A counter gives the bits of eight columns, 16 apart, which are put in their places instead of being drawn eight
    times.
    """
    s = tl.cast(s, tl.int32)
    lane = (s // 128 * LANES + tl.arange(0, LANES)).to(tl.uint32)
    if DOWN:
        c0 = tl.broadcast_to(lane[:, None], (LANES, ROWS))
        c1 = tl.broadcast_to(row.to(tl.uint32)[None, :], (LANES, ROWS))
    else:
        c0 = tl.broadcast_to(lane[None, :], (ROWS, LANES))
        c1 = tl.broadcast_to(row.to(tl.uint32)[:, None], (ROWS, LANES))
    w0, w1, w2, w3 = _words(c0, c1, matrix, seed_low, seed_high)
    half = s // LANES % 8
    if KEYS == 128:
        bits = tl.permute(_all_bits(w0, w1, w2, w3), (2, 3, 4, 0, 1) if DOWN else (0, 2, 3, 4, 1))
    elif KEYS == 64:
        first, second = tl.where(half >= 4, w2, w0), tl.where(half >= 4, w3, w1)
        bits = tl.join(tl.join(first & 0xFFFF, second & 0xFFFF), tl.join(first >> 16, second >> 16))
        bits = tl.permute(bits, (2, 3, 0, 1) if DOWN else (0, 2, 3, 1))
    else:
        word = tl.where(half >= 4, tl.where(half >= 6, w3, w2), tl.where(half >= 2, w1, w0))
        if KEYS == 32:
            bits = tl.join(word & 0xFFFF, word >> 16)
            bits = tl.permute(bits, (2, 0, 1) if DOWN else (0, 2, 1))
        else:
            tl.static_assert(KEYS == 16)
            bits = tl.where(half % 2 == 1, word >> 16, word & 0xFFFF)
    bits = tl.reshape(bits, (KEYS, ROWS) if DOWN else (ROWS, KEYS))
    return bits.to(tl.float32) >= dropped


@triton.jit
def keeps_of_rows(row, first, seed_low, seed_high, dropped, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Which elements are kept of one matrix: [ROWS, COLUMNS] from column `first`; both are multiples of 128."""
    BLOCKS: tl.constexpr = COLUMNS // 128
    block = tl.cast(first, tl.int32) // 128 + tl.arange(0, BLOCKS)
    counter = (block[:, None] * LANES + tl.arange(0, LANES)[None, :]).to(tl.uint32)
    c0 = tl.broadcast_to(counter[None, :, :], (ROWS, BLOCKS, LANES))
    c1 = tl.broadcast_to(row.to(tl.uint32)[:, None, None], (ROWS, BLOCKS, LANES))
    w0, w1, w2, w3 = _words(c0, c1, 0, seed_low, seed_high)
    bits = tl.permute(_all_bits(w0, w1, w2, w3), (0, 1, 3, 4, 5, 2))
    return tl.reshape(bits, (ROWS, COLUMNS)).to(tl.float32) >= dropped


def halves_of(seed: Tensor | None) -> tuple[int, int]:
    """The seed's low and high 32 bits as numbers of int32."""
    drawn = 0 if seed is None else int(seed)
    low, high = (half - (half >> 31 << 32) for half in (drawn & 0xFFFFFFFF, drawn >> 32 & 0xFFFFFFFF))
    return low, high


def options_of(seed: Tensor | None, p: float) -> dict[str, Any]:
    """What kernels are told about dropout: the seed's halves, what drops, and what is kept is multiplied by."""
    low, high = halves_of(seed)
    return dict(
        seed_low=low, seed_high=high, dropped=float(dropped_of(p)), kept=kept_factor(p), DROPOUT=seed is not None
    )
