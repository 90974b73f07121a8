"""Dropout, a residual and LayerNorm or RMSNorm on NVIDIA's GPUs: `fastseq::norm`, a block of whole rows at a time.

Formulas are in `fastseq.reference.norm`. Gradients of weight and bias are sums over all rows: each program adds up
those of its own, and a second kernel adds the programs' in their order. Nothing is added up by atomics, and results are
the same to the bit from run to run.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastseq.kernels.triton.dropout import keeps_of_rows, options_of
from fastseq.kernels.triton.rows import contiguous, load_columns, load_tile, rows_of
from fastseq.ops.norm import Arguments, Case, empty_gradients, empty_outputs, grads_like, needs_all, tape_of
from fastseq.reference.norm import LAYER, NONE

IS_NONE, IS_LAYER = tl.constexpr(NONE), tl.constexpr(LAYER)
# What changes from call to call and must not be compiled in.
SIZES = ["rows", "share", "seed_low", "seed_high"]


@triton.jit
def _tile(row, rows, E: tl.constexpr, BLOCK: tl.constexpr):
    """The columns of a block of rows, and which of its elements exist."""
    column = tl.arange(0, BLOCK)
    there = (row < rows)[:, None]
    if E != BLOCK:
        there = there & (column < E)[None, :]
    return column, there


@triton.jit(do_not_specialize=SIZES)
def _forward(
    p_x, at_x, p_residual, at_residual, p_weight, p_bias, p_y, p_total, p_mean, p_rstd, eps, rows, seed_low, seed_high,
    dropped, kept,
    KIND: tl.constexpr, DROPOUT: tl.constexpr, E: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """ROWS rows of y and total, their mean and rstd."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column, there = _tile(row, rows, E, BLOCK)
    dtype = p_x.dtype.element_ty
    total = load_tile(p_x, at_x, row, column, there)
    if DROPOUT:
        total *= tl.where(keeps_of_rows(row, 0, seed_low, seed_high, dropped, ROWS, BLOCK), kept, 0.0)
    if p_residual is not None:
        total += load_tile(p_residual, at_residual, row, column, there)
    stored = total.to(dtype)
    if p_total is not None:
        tl.store(p_total + row[:, None] * E + column[None, :], stored, mask=there)
    if KIND != IS_NONE:
        total = stored.to(tl.float32)
        if KIND == IS_LAYER:
            mean = tl.sum(total, 1) / E
            total = tl.where(there, total - mean[:, None], 0.0)
            tl.store(p_mean + row, mean, mask=row < rows)
        rstd = 1.0 / tl.sqrt_rn(tl.sum(total * total, 1) / E + eps)
        tl.store(p_rstd + row, rstd, mask=row < rows)
        y = total * rstd[:, None]
        if p_weight is not None:
            y *= load_columns(p_weight, column, E)
        if p_bias is not None:
            y += load_columns(p_bias, column, E)
        tl.store(p_y + row[:, None] * E + column[None, :], y.to(dtype), mask=there)


@triton.jit
def _normal(p_total, at_total, p_mean, p_rstd, row, rows, column, there):
    """A block of normalised rows, and their rstd."""
    normal = load_tile(p_total, at_total, row, column, there)
    rstd = tl.load(p_rstd + row, mask=row < rows, other=0.0)[:, None]
    if p_mean is not None:
        normal -= tl.load(p_mean + row, mask=row < rows, other=0.0)[:, None]
    return tl.where(there, normal * rstd, 0.0), rstd


@triton.jit(do_not_specialize=SIZES)
def _row_gradients(
    p_dy, at_dy, p_dtotal, at_dtotal, p_total, at_total, p_weight, p_mean, p_rstd, p_dx, p_dresidual, p_dweights,
    p_dbiases, rows, share, seed_low, seed_high, dropped, kept,
    DROPOUT: tl.constexpr, E: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dx and dresidual of `share` rows, a multiple of ROWS, and what these add to dweight and dbias: [programs, E]."""
    first = tl.program_id(0).to(tl.int64) * share
    if p_dweights is not None:
        dweight = tl.zeros((ROWS, BLOCK), tl.float32)
    if p_dbiases is not None:
        dbias = tl.zeros((ROWS, BLOCK), tl.float32)
    for begin in range(first, tl.minimum(first + share, rows), ROWS):
        row = begin + tl.arange(0, ROWS)
        column, there = _tile(row, rows, E, BLOCK)
        grad = tl.zeros((ROWS, BLOCK), tl.float32)
        if p_dy is not None:
            dy = load_tile(p_dy, at_dy, row, column, there)
            normal, rstd = _normal(p_total, at_total, p_mean, p_rstd, row, rows, column, there)
            if p_dweights is not None:
                dweight += dy * normal
            if p_dbiases is not None:
                dbias += dy
            if p_weight is not None:
                dy *= load_columns(p_weight, column, E)
            grad = dy - normal * (tl.sum(dy * normal, 1) / E)[:, None]
            if p_mean is not None:
                grad -= (tl.sum(dy, 1) / E)[:, None]
            grad *= rstd
        if p_dtotal is not None:
            grad += load_tile(p_dtotal, at_dtotal, row, column, there)
        at = row[:, None] * E + column[None, :]
        if p_dresidual is not None:
            tl.store(p_dresidual + at, grad.to(p_dresidual.dtype.element_ty), mask=there)
        if p_dx is not None:
            if DROPOUT:
                grad *= tl.where(keeps_of_rows(row, 0, seed_low, seed_high, dropped, ROWS, BLOCK), kept, 0.0)
            tl.store(p_dx + at, grad.to(p_dx.dtype.element_ty), mask=there)
    column = tl.arange(0, BLOCK)
    at = tl.program_id(0).to(tl.int64) * E + column
    if p_dweights is not None:
        tl.store(p_dweights + at, tl.sum(dweight, 0), mask=column < E)
    if p_dbiases is not None:
        tl.store(p_dbiases + at, tl.sum(dbias, 0), mask=column < E)


@triton.jit(do_not_specialize=SIZES)
def _column_gradients(
    p_dy, at_dy, p_total, at_total, p_mean, p_rstd, p_dweights, p_dbiases, rows, share,
    E: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """What `share` rows, a multiple of ROWS, add to dweight and dbias, for BLOCK columns: [programs, E]."""
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    first = tl.program_id(1).to(tl.int64) * share
    dweight = tl.zeros((ROWS, BLOCK), tl.float32)
    dbias = tl.zeros((ROWS, BLOCK), tl.float32)
    for begin in range(first, tl.minimum(first + share, rows), ROWS):
        row = begin + tl.arange(0, ROWS)
        there = (row < rows)[:, None] & (column < E)[None, :]
        dy = load_tile(p_dy, at_dy, row, column, there)
        dbias += dy
        if p_dweights is not None:
            normal, _ = _normal(p_total, at_total, p_mean, p_rstd, row, rows, column, there)
            dweight += dy * normal
    at = tl.program_id(1).to(tl.int64) * E + column
    if p_dweights is not None:
        tl.store(p_dweights + at, tl.sum(dweight, 0), mask=column < E)
    if p_dbiases is not None:
        tl.store(p_dbiases + at, tl.sum(dbias, 0), mask=column < E)


@triton.jit
def _sum_of_parts(p_parts, column, parts, E: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    total = tl.zeros((PARTS, BLOCK), tl.float32)
    for first in range(0, parts, PARTS):
        part = first + tl.arange(0, PARTS)
        there = (part < parts)[:, None] & (column < E)[None, :]
        total += tl.load(p_parts + part[:, None].to(tl.int64) * E + column[None, :], mask=there, other=0.0)
    return tl.sum(total, 0)


@triton.jit(do_not_specialize=["parts"])
def _add_parts(
    p_dweights, p_dbiases, p_dweight, p_dbias, parts, E: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr
):
    """BLOCK columns of dweight and dbias from what each program has added up: [parts, E]."""
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    if p_dweights is not None:
        total = _sum_of_parts(p_dweights, column, parts, E, PARTS, BLOCK)
        tl.store(p_dweight + column, total.to(p_dweight.dtype.element_ty), mask=column < E)
    if p_dbiases is not None:
        total = _sum_of_parts(p_dbiases, column, parts, E, PARTS, BLOCK)
        tl.store(p_dbias + column, total.to(p_dbias.dtype.element_ty), mask=column < E)


# Elements of a block at least, and of a thread unless that takes too many: a load of 16 bytes in half precision. Each
# thread of 16 warps may have 128 registers. From what `make gpu-aot` shows; not tuned on any GPU.
LEAST_TILE, ELEMENTS, MOST_WARPS = 1024, 8, 16
# Wider rows leave no registers for those sums: gradients of weight and bias are then a kernel of their own.
WIDEST_SUMMED = 8192
COLUMN_TILE = dict(ROWS=16, BLOCK=128, num_warps=4)
PART_TILE = dict(PARTS=32, BLOCK=64, num_warps=4)
# How many programs the interpreter shall seem to run at once.
INTERPRETED_PROCESSORS = 3
WARPS_OF_PROCESSOR = 16


class Launch(NamedTuple):
    """How a kernel of whole rows is started: its rows, its warps, and what is compiled in."""

    rows: int
    warps: int
    options: dict[str, int]


def _launch(E: int) -> Launch:
    block = max(128, triton.next_power_of_2(E))  # dropout draws for so many columns at once
    rows = max(1, LEAST_TILE // block)
    warps = min(MOST_WARPS, rows * block // (32 * ELEMENTS))
    return Launch(rows, warps, dict(E=E, ROWS=rows, BLOCK=block, num_warps=warps))


def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return INTERPRETED_PROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count


def _there(t: Tensor) -> Tensor | None:
    return t if t.numel() else None


def forward(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `fastseq.ops.norm.Arguments` and `Outputs`."""
    *given, save_total = args
    x, residual, weight, bias, seed, kind, eps, p = Arguments(*given)
    rows, E = x.shape
    outputs = empty_outputs(x, residual, seed, kind, save_total)
    y, total, mean, rstd = map(_there, outputs)
    if y is not None or total is not None:
        launch = _launch(E)
        _forward[(triton.cdiv(rows, launch.rows),)](
            *rows_of(x), *rows_of(residual), contiguous(weight), contiguous(bias), y, total, mean, rstd, eps, rows,
            KIND=kind, **options_of(seed, p), **launch.options,
        )  # fmt: skip
    return tuple(outputs)


def backward(dy: Tensor | None, dtotal: Tensor | None, *args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, residual, weight and bias, without elements where `needs` says no."""
    total, weight, seed, mean, rstd, kind, p, needs = args
    rows, E = total.shape
    grads = empty_gradients(total, weight, needs)
    dx, dresidual, dweight, dbias = map(_there, grads)
    if dy is None or rows == 0:
        for columns in (dweight, dbias):
            if columns is not None:
                columns.zero_()
        dweight = dbias = None
    if rows == 0:
        return tuple(grads)
    tape = (*rows_of(dy), *rows_of(total), mean if kind == LAYER else None, rstd)
    of_columns = dweight is not None or dbias is not None
    fused = of_columns and E <= WIDEST_SUMMED
    launch = _launch(E)
    share = _share(rows, launch.rows, launch.warps, total.device) if fused else launch.rows
    programs = triton.cdiv(rows, share)
    blocks = triton.cdiv(E, COLUMN_TILE["BLOCK"])
    share_of_columns = _share(rows, COLUMN_TILE["ROWS"], COLUMN_TILE["num_warps"] * blocks, total.device)
    parts = programs if fused else triton.cdiv(rows, share_of_columns)
    sums = [None if t is None else total.new_empty((parts, E), dtype=torch.float32) for t in (dweight, dbias)]
    if fused or dx is not None or dresidual is not None:
        _row_gradients[(programs,)](
            *tape[:2], *rows_of(dtotal), *tape[2:4], contiguous(weight), *tape[4:], dx, dresidual,
            *(sums if fused else (None, None)), rows, share, **options_of(seed, p), **launch.options,
        )  # fmt: skip
    if of_columns:
        if not fused:
            _column_gradients[(blocks, parts)](*tape, *sums, rows, share_of_columns, E=E, **COLUMN_TILE)
        _add_parts[(triton.cdiv(E, PART_TILE["BLOCK"]),)](*sums, dweight, dbias, parts, E=E, **PART_TILE)
    return tuple(grads)


def _share(rows: int, tile: int, warps: int, device: torch.device) -> int:
    """How many rows, in tiles, a program takes, if there are to be as many as run at once."""
    programs = max(1, _processors(device) * WARPS_OF_PROCESSOR // warps)
    return tile * triton.cdiv(triton.cdiv(rows, tile), programs)


def _training(case: Case) -> Callable[[torch.dtype, int], None]:
    """Launches all kernels of a case, forward and backward."""

    def run(dtype: torch.dtype, _capability: int) -> None:
        arguments = case.arguments("cpu", dtype)
        outputs = empty_outputs(arguments.x, arguments.residual, arguments.seed, arguments.kind, True)
        forward(*arguments, True)
        backward(*grads_like(outputs), *tape_of(arguments, outputs), needs_all(arguments))

    return run


# What is compiled ahead of time and looked at without a GPU (tests/aot.py): the main configurations first, then one of
# each feature.
AOT = {
    "residual, dropout 1024": _training(Case(64, 1024, residual=True, dropout=0.1)),
    "rms, residual 4096": _training(Case(64, 4096, "rms", residual=True, bias=False)),
    "layer 768": _training(Case(64, 768)),
    "residual 512": _training(Case(64, 512, residual=True)),
    "residual, dropout 8192": _training(Case(64, 8192, residual=True, dropout=0.1)),
    "residual, dropout 16384": _training(Case(64, 16384, residual=True, dropout=0.1)),
    "rms, dropout 100": _training(Case(64, 100, "rms", residual=True, dropout=0.1, wide=True)),
    "none, dropout 1024": _training(Case(64, 1024, "none", residual=True, dropout=0.1)),
    "33": _training(Case(64, 33, residual=True)),
}
