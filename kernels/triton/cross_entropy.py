"""Cross entropy on NVIDIA's GPUs: `fastseq::cross_entropy`, a row's logits block by block with an online softmax.

Formulas are in `fastseq.reference.cross_entropy`. Nothing is added up by atomics: each sum has one order, and results
are the same to the bit from run to run.
"""

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastseq.ops.cross_entropy import Arguments, Case, backward_arguments

INF = tl.constexpr(float("inf"))
NAN = tl.constexpr(float("nan"))
# What changes from call to call and must not be compiled in.
VARYING = ["rows", "ignore_index"]


@triton.jit
def _targets(p_target, p_weight, row, rows, V, ignore_index):
    """Of some rows: targets, which rows count, and the targets' weights, NaN where a target is no class."""
    target = tl.load(p_target + row, mask=row < rows, other=ignore_index)
    counts = (row < rows) & (target != ignore_index)
    known = counts & (target >= 0) & (target < V)
    weight = tl.where(known, 1.0, NAN) if p_weight is None else tl.load(p_weight + target, mask=known, other=NAN)
    return target, counts, known, weight


@triton.jit
def _block(p_row, first, V, counts, BLOCK: tl.constexpr):
    """The rows' logits from column `first` on, -inf where there are none, and the columns."""
    column = first + tl.arange(0, BLOCK)[None, :]
    x = tl.load(p_row[:, None] + column, mask=counts[:, None] & (column < V), other=-INF)
    return x.to(tl.float32), column


@triton.jit(do_not_specialize=VARYING)
def _forward(
    p_logits, p_target, p_weight, p_loss, p_lse, rows, V, stride, own, spread, ignore_index,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, SMOOTH: tl.constexpr,
):  # fmt: skip
    """loss and lse of ROWS rows."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    target, counts, known, weight = _targets(p_target, p_weight, row, rows, V, ignore_index)
    p_row = p_logits + row * stride
    base = tl.zeros((ROWS,), tl.float32)  # what sums are relative to: the largest logit, if it is finite
    top = tl.full((ROWS,), -INF, tl.float32)
    sums = tl.zeros((ROWS, BLOCK), tl.float32)
    gap = tl.zeros((ROWS,), tl.float32)
    weights = tl.zeros((ROWS,), tl.float32)
    for first in range(0, V, BLOCK):
        x, column = _block(p_row, first, V, counts, BLOCK)
        higher = tl.maximum(top, tl.max(x, 1))
        next_base = tl.where(higher == -INF, 0.0, higher)
        # Sums wait for each other in their own column only.
        sums = sums * tl.exp(top - next_base)[:, None] + tl.exp(x - next_base[:, None])
        if SMOOTH:
            there = column < V
            w = tl.where(there, 1.0, 0.0) if p_weight is None else tl.load(p_weight + column, mask=there, other=0.0)
            gap += weights * (next_base - base)
            gap += tl.sum(tl.where(there, w * (next_base[:, None] - x), 0.0), 1)
            weights += tl.sum(w, 1)
        top = higher
        base = next_base
    log = tl.log(tl.sum(sums, 1))
    logit = tl.load(p_row + target, mask=known, other=0.0).to(tl.float32)
    # Not lse - logit, of which less is left where logits are large.
    loss = weight * ((base - logit) + log)
    if SMOOTH:
        loss = own * loss + spread * (gap + weights * log)
    tl.store(p_loss + row, tl.where(counts, loss, 0.0), mask=row < rows)
    tl.store(p_lse + row, tl.where(counts, base + log, 0.0), mask=row < rows)


@triton.jit(do_not_specialize=VARYING)
def _backward(
    p_dloss, p_logits, p_target, p_weight, p_all_weights, p_lse, p_dlogits, rows, V, stride, own, spread, ignore_index,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, SMOOTH: tl.constexpr,
):  # fmt: skip
    """dlogits of ROWS rows."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    target, counts, _known, weight = _targets(p_target, p_weight, row, rows, V, ignore_index)
    p_row = p_logits + row * stride
    lse = tl.load(p_lse + row, mask=counts, other=0.0)
    # What of the sum's logarithm has been lost when lse was rounded, where that is worth another look at the rows.
    rest = tl.zeros((ROWS,), tl.float32)
    large: tl.constexpr = 32 if p_dlogits.dtype.element_ty == tl.float32 else 2048  # half precision shows less
    if tl.max(tl.abs(lse), 0) > large:
        sums = tl.zeros((ROWS, BLOCK), tl.float32)
        for first in range(0, V, BLOCK):
            x, _column = _block(p_row, first, V, counts, BLOCK)
            sums += tl.exp(x - lse[:, None])
        rest = tl.where(tl.abs(lse) > large, tl.log(tl.sum(sums, 1)), 0.0)
    dloss = tl.load(p_dloss + row, mask=counts, other=0.0)
    mine = own * weight
    scale = dloss * mine
    if SMOOTH:
        if p_weight is None:
            scale += dloss * (spread * V)
        else:
            scale += dloss * (spread * tl.load(p_all_weights))
    for first in range(0, V, BLOCK):
        x, column = _block(p_row, first, V, counts, BLOCK)
        dx = tl.exp((x - lse[:, None]) - rest[:, None]) * scale[:, None]
        if SMOOTH:
            share = dloss[:, None] * spread
            if p_weight is not None:
                share = share * tl.load(p_weight + column, mask=column < V, other=0.0)
            dx -= share
        dx = tl.where(column == target[:, None], dx - (dloss * mine)[:, None], dx)
        dx = tl.where(counts[:, None], dx, 0.0).to(p_dlogits.dtype.element_ty)
        there = (row < rows)[:, None] & (column < V)
        tl.store(p_dlogits + row[:, None] * V + column, dx, mask=there)


# Logits of a program's step, and of a thread's: two loads of 16 bytes of half precision, four of float32. From
# registers and stack as `make gpu-aot` shows them; not tuned on any GPU.
TILE, OF_THREAD = 4096, 16
# Of a program, where they are short.
MOST_ROWS = 16


def _prepared(arguments: Arguments) -> tuple[list[Any], tuple[int], tuple, dict[str, Any]]:
    """logits, target and weight as kernels read them, the grid, sizes and options, and what is compiled in."""
    logits, target, weight, smoothing, ignore_index = arguments
    rows, V = logits.shape
    if V > 1 and logits.stride(1) != 1:
        logits = logits.contiguous()
    tensors = [logits, target.contiguous(), None if weight is None else weight.contiguous()]
    block = min(triton.next_power_of_2(V), TILE)
    together = min(TILE // block, triton.next_power_of_2(rows), MOST_ROWS)
    told = (rows, V, logits.stride(0), 1 - smoothing, smoothing / V, ignore_index)
    warps = max(4, together * block // (32 * OF_THREAD))
    options = dict(ROWS=together, BLOCK=block, SMOOTH=smoothing > 0, num_warps=warps)
    return tensors, (triton.cdiv(rows, together),), told, options


def forward(*args: Any) -> tuple[Tensor, Tensor]:
    """See `fastseq.ops.cross_entropy.Arguments` and `Outputs`."""
    logits = args[0]
    loss, lse = (logits.new_empty(len(logits), dtype=torch.float32) for _ in range(2))
    if len(logits):
        tensors, grid, told, options = _prepared(Arguments(*args))
        _forward[grid](*tensors, loss, lse, *told, **options)
    return loss, lse


def backward(
    dloss: Tensor,
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    lse: Tensor,
    label_smoothing: float,
    ignore_index: int,
) -> Tensor:
    """The gradient of logits, in their dtype."""
    dlogits = logits.new_empty(logits.shape)
    if len(logits):
        given = Arguments(logits, target, weight, label_smoothing, ignore_index)
        tensors, grid, told, options = _prepared(given)
        all_weights = None if weight is None or label_smoothing == 0 else weight.sum()
        _backward[grid](dloss.contiguous(), *tensors, all_weights, lse.contiguous(), dlogits, *told, **options)
    return dlogits


def _training(case: Case) -> Callable[[torch.dtype, int], None]:
    """Launches the kernels of a case, forward and backward; of a dtype and a compute capability."""

    def run(dtype: torch.dtype, _capability: int) -> None:
        arguments = case.arguments("cpu", dtype)
        loss, lse = forward(*arguments)
        backward(*backward_arguments(loss, arguments, lse))

    return run


# What is compiled ahead of time and looked at without a GPU (tests/aot.py). Of sizes only their divisibility by 16
# counts, and what is rounded up to a power of two.
AOT = {
    "32000 classes": _training(Case(64, 32000)),
    "32000 classes, weights, smoothing": _training(Case(64, 32000, weight=True, smoothing=0.1)),
    "50257 classes, smoothing": _training(Case(64, 50257, smoothing=0.1)),
    "128 classes": _training(Case(64, 128)),
    "37 classes, weights, smoothing": _training(Case(64, 37, weight=True, smoothing=0.1)),
}
