"""Rows of a matrix, so many elements apart: how they are handed to kernels, and read there."""

import triton
import triton.language as tl
from torch import Tensor


def rows_of(t: Tensor | None) -> tuple[Tensor | None, int]:
    """Rows with columns one after the other, and how far apart they are."""
    if t is None:
        return None, 0
    t = t if t.stride(1) == 1 or t.shape[1] == 1 else t.contiguous()
    return t, t.stride(0)


def contiguous(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous()


@triton.jit
def load_tile(p, apart, row, column, there):
    # A tensor may have more than 2**31 elements.
    return tl.load(p + row.to(tl.int64)[:, None] * apart + column[None, :], mask=there, other=0.0).to(tl.float32)


@triton.jit
def load_columns(p, column, count):
    """What there is one of for each column, as a row."""
    return tl.load(p + column, mask=column < count, other=0.0).to(tl.float32)[None, :]
