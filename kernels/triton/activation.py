"""Bias, activation, gate and dropout on NVIDIA's GPUs: `fastseq::activation`, tile by tile, in one pass over memory.

Formulas are in `fastseq.reference.activation`. The bias's gradient is a sum over all rows: each program adds up those
of its own, and the programs' sums are added in their order. Nothing is added up by atomics, how much a program does
depends on the shape alone, and results are the same to the bit from run to run.
"""

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastseq.kernels.triton.dropout import keeps_of_rows, options_of
from fastseq.kernels.triton.rows import contiguous, load_columns, load_tile, rows_of
from fastseq.ops.activation import Case, grad_like, needs_all
from fastseq.reference import activation as reference

RELU, GELU = tl.constexpr(reference.RELU), tl.constexpr(reference.GELU)
GELU_TANH, SILU = tl.constexpr(reference.GELU_TANH), tl.constexpr(reference.SILU)
LOG2E = tl.constexpr(1.4426950408889634)
# What changes from call to call and must not be compiled in.
SIZES = ["rows", "share", "seed_low", "seed_high"]


@triton.jit
def _normal(x):
    """The standard normal distribution and its density; of large negative x, too, where 1 + erf would cancel.

    The tail over z >= 0 is exp(-z^2/2) P(z) / Q(z), whose rational function has a relative error of 6.4e-9: it
    interpolates at Chebyshev nodes of (z - 3) / (z + 3) up to 13.5, beyond which the tail vanishes.
    """
    z = tl.minimum(tl.abs(x), 13.5)
    p = 0.039849036551 + z * 0.00399661197046
    p = 0.500000001715 + z * (0.435255897502 + z * (0.180943538519 + z * p))
    q = 0.463410969793 + z * (0.0998940496278 + z * 0.0100178796009)
    q = 1.0 + z * (1.66839662983 + z * (1.19307157677 + z * q))
    e = tl.exp2(x * x * (-0.5 * LOG2E))
    tail = e * (p / q)
    return tl.where(x < 0, tail, 1.0 - tail), e * 0.3989422804014327


@triton.jit
def sigmoids(x):
    """sigmoid(x) and 1 - sigmoid(x), of which neither cancels."""
    e = tl.exp2(-tl.abs(x) * LOG2E)
    large = 1.0 / (1.0 + e)
    small = e * large
    return tl.where(x < 0, small, large), tl.where(x < 0, large, small)


@triton.jit
def _activate(x, given, KIND: tl.constexpr):
    """The activation of x, and `given`, which is the gradient of that, times its slope."""
    value = x
    if KIND == RELU:
        value = tl.where(x <= 0, 0.0, x)
        given = tl.where(x <= 0, 0.0, given)
    elif KIND == GELU:
        below, density = _normal(x)
        value = x * below
        given *= x * density + below
    elif KIND == GELU_TANH:
        # (1 + tanh(u)) / 2 = sigmoid(2u). Far out the slope is constant, but a square may overflow.
        near = tl.minimum(tl.maximum(x, -64.0), 64.0)
        square = near * near
        s, rest = sigmoids(1.5957691216057308 * near * (1.0 + 0.044715 * square))
        value = x * s
        given *= s + x * (s * rest) * (1.5957691216057308 * (1.0 + 3 * 0.044715 * square))
    elif KIND == SILU:
        s, rest = sigmoids(x)
        value = x * s
        given *= s * (1.0 + x * rest)
    return value, given


@triton.jit
def _store_tile(p, apart, row, column, there, values):
    p += row.to(tl.int64)[:, None] * apart + column[None, :]
    tl.store(p, values.to(p.dtype.element_ty), mask=there)


@triton.jit(do_not_specialize=SIZES)
def _forward(
    p_x, x_apart, p_up, up_apart, p_bias, p_y, rows, F, seed_low, seed_high, dropped, kept,
    KIND: tl.constexpr, DROPOUT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """A tile of y."""
    blocks = tl.cdiv(F, COLUMNS)
    first = tl.program_id(0) % blocks * COLUMNS
    row, column = tl.program_id(0) // blocks * ROWS + tl.arange(0, ROWS), first + tl.arange(0, COLUMNS)
    there = (row < rows)[:, None] & (column < F)[None, :]
    x = load_tile(p_x, x_apart, row, column, there)
    if p_bias is not None:
        x += load_columns(p_bias, column, F)
    y, _ = _activate(x, x, KIND)
    if p_up is not None:
        y *= load_tile(p_up, up_apart, row, column, there)
    if DROPOUT:
        y *= tl.where(keeps_of_rows(row, first, seed_low, seed_high, dropped, ROWS, COLUMNS), kept, 0.0)
    _store_tile(p_y, F, row, column, there, y)


@triton.jit(do_not_specialize=SIZES)
def _backward(
    p_dy, dy_apart, p_x, x_apart, p_up, up_apart, p_bias, p_dx, p_dup, p_sums, rows, share, F, seed_low, seed_high,
    dropped, kept,
    KIND: tl.constexpr, DROPOUT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Gradients of `share` tiles, one below the other, and [parts, F] the sums of the activation's over their rows."""
    blocks = tl.cdiv(F, COLUMNS)
    part = tl.program_id(0) // blocks
    first = tl.program_id(0) % blocks * COLUMNS
    column = first + tl.arange(0, COLUMNS)
    sums = tl.zeros((ROWS, COLUMNS), tl.float32)
    for tile in range(part * share, min((part + 1) * share, tl.cdiv(rows, ROWS))):
        row = tile * ROWS + tl.arange(0, ROWS)
        there = (row < rows)[:, None] & (column < F)[None, :]
        x = load_tile(p_x, x_apart, row, column, there)
        given = load_tile(p_dy, dy_apart, row, column, there)
        if p_bias is not None:
            x += load_columns(p_bias, column, F)
        if DROPOUT:
            given *= tl.where(keeps_of_rows(row, first, seed_low, seed_high, dropped, ROWS, COLUMNS), kept, 0.0)
        gradient = given
        if p_up is not None:
            gradient *= load_tile(p_up, up_apart, row, column, there)
        value, gradient = _activate(x, gradient, KIND)
        if p_dup is not None:
            _store_tile(p_dup, F, row, column, there, given * value)
        if p_dx is not None:
            _store_tile(p_dx, F, row, column, there, gradient)
        if p_sums is not None:
            sums += gradient
    if p_sums is not None:
        tl.store(p_sums + part.to(tl.int64) * F + column, tl.sum(sums, 0), mask=column < F)


# 16 bytes of half precision for each of 16 threads a row, twice for each of 4 warps. Not tuned on any GPU.
TILE = dict(ROWS=16, COLUMNS=128, num_warps=4)
# As many tiles as keep any GPU busy; more of them are shared among as many programs, up to so many tiles each, so that
# partial sums are few.
WANTED_PROGRAMS = 2048
MOST_SHARED = 32


def forward(
    x: Tensor, up: Tensor | None, bias: Tensor | None, seed: Tensor | None, kind: int, dropout_p: float
) -> Tensor:
    """See `fastseq.ops.activation.Arguments`."""
    rows, F = x.shape
    y = x.new_empty(x.shape)
    if y.numel():
        tiles = triton.cdiv(rows, TILE["ROWS"]) * triton.cdiv(F, TILE["COLUMNS"])
        _forward[(tiles,)](
            *rows_of(x), *rows_of(up), contiguous(bias), y, rows, F, KIND=kind, **options_of(seed, dropout_p), **TILE
        )  # fmt: skip
    return y


def backward(
    dy: Tensor,
    x: Tensor,
    up: Tensor | None,
    bias: Tensor | None,
    seed: Tensor | None,
    kind: int,
    dropout_p: float,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, up and bias, without elements where `needs` says no."""
    rows, F = x.shape
    dx, dup = (x.new_empty(x.shape if need else 0) for need in needs[:2])
    if not x.numel():
        return dx, dup, bias.new_zeros(F) if needs[2] and bias is not None else x.new_empty(0)
    of_rows, blocks = triton.cdiv(rows, TILE["ROWS"]), triton.cdiv(F, TILE["COLUMNS"])
    share = min(MOST_SHARED, triton.cdiv(of_rows * blocks, WANTED_PROGRAMS)) if needs[2] else 1
    parts = triton.cdiv(of_rows, share)
    sums = x.new_empty((parts, F), dtype=torch.float32) if needs[2] else None
    _backward[(parts * blocks,)](
        *rows_of(dy), *rows_of(x), *rows_of(up), contiguous(bias), dx if needs[0] else None, dup if needs[1] else None,
        sums, rows, share, F, KIND=kind, **options_of(seed, dropout_p), **TILE,
    )  # fmt: skip
    return dx, dup, sums.sum(0).to(bias.dtype) if sums is not None and bias is not None else x.new_empty(0)


def _training(case: Case) -> Callable[[torch.dtype, int], None]:
    """Launches all kernels of a case, forward and backward."""

    def run(dtype: torch.dtype, _capability: int) -> None:
        arguments = case.arguments("cpu", dtype)
        backward(grad_like(forward(*arguments)), *arguments, needs_all(arguments))

    return run


# What is compiled ahead of time and looked at without a GPU (tests/aot.py): the main configurations first, then one of
# each feature.
AOT = {
    "gelu, bias, dropout": _training(Case(64, 1024, "gelu", False, "same", 0.1)),
    "silu, gated halves": _training(Case(64, 1024, "silu", True, halves=True)),
    "gelu, gated, bias, dropout": _training(Case(64, 1024, "gelu", True, "single", 0.1, halves=True)),
    "gelu_tanh, gated, bias, dropout": _training(Case(64, 1024, "gelu_tanh", True, "same", 0.1)),
    "relu, bias": _training(Case(64, 1024, "relu", False, "same")),
    "identity, bias, dropout": _training(Case(64, 1024, "identity", False, "same", 0.1)),
    "silu, gated, bias, dropout 33": _training(Case(64, 33, "silu", True, "same", 0.1)),
}
