"""What host code does with tensors before and after a kernel runs: checks, fresh memory, and how scratch is cut."""

import os
from functools import cache

import torch
from torch import Tensor

from fastseq.kernels.numba.simd import vector_bytes

_LINE = 16  # elements, or more, that a line of the cache has
_POISON = "FASTSEQ_POISON" in os.environ  # tests set this: an element that a kernel forgot shows as NaN


def expect(op: str, name: str, t: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Raises ValueError unless t is what a kernel relies on; None is."""
    if t is not None and (t.shape != shape or t.dtype != dtype or not t.is_cpu):
        got = f"{t.dtype} {list(t.shape)} on {t.device}"
        raise ValueError(f"{op}: {name} must be {dtype} {list(shape)} on the CPU, got {got}")


def poisoned(*tensors: Tensor) -> None:
    """What a kernel shall fill."""
    for t in tensors if _POISON else ():
        t.fill_(torch.nan)


def empty(like: Tensor, *shape: int) -> Tensor:
    made = like.new_empty(shape)
    poisoned(made)
    return made


def ceil_div(count: int, size: int) -> int:
    """How many blocks of a size hold so many."""
    return -(-count // size)


@cache
def panel_of(dtype: torch.dtype) -> int:
    """The columns of a panel."""
    return 2 * vector_bytes() // dtype.itemsize


def in_panels(count: int, dtype: torch.dtype) -> int:
    """So many columns, and those that fill the last panel."""
    return ceil_div(count, panel_of(dtype)) * panel_of(dtype)


def cut(*sizes: int) -> tuple[list[int], int]:
    """Where pieces of memory of so many elements begin, each in a line of its own, and where the last one ends."""
    starts, end = [], 0
    for size in sizes:
        starts.append(end)
        end += ceil_div(size, _LINE) * _LINE
    return starts, end
