"""Rows of different lengths: how they are told, what of a batch is padding, and batches without it."""

from typing import NamedTuple

import torch
from torch import Tensor

from fastseq.ops.contract import is_plain

# With less of a batch left out, taking the rows out and putting them back costs more than it spares.
LEAST_PADDING = 1 / 16
# So do some 30 us of Python for a batch of fewer elements.
_LEAST_ELEMENTS = 1 << 16


INTEGERS = {torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64}


def as_lengths(lengths: Tensor, batch: tuple[int, ...]) -> Tensor:
    """Lengths as the ops take them, [B] int64 on the CPU, of a batch () or (B,).

    Raises:
        ValueError: they are no integers, or not one for each row.
    """
    if lengths.dtype not in INTEGERS:
        raise ValueError(f"lengths must be integers, got {lengths.dtype}")
    if lengths.shape != batch:
        raise ValueError(f"lengths must be {list(batch)}, one for each row, got {list(lengths.shape)}")
    return lengths.to("cpu", torch.int64).reshape(-1)


def padding_mask(lengths: Tensor, T: int, device: torch.device) -> Tensor:
    """[B, T], true past each row's length [B]."""
    return torch.arange(T, device=device) >= lengths.to(device).unsqueeze(1)


class Places(NamedTuple):
    """Which places of a batch [N, L, ...], or [L, N, ...], are rows, sample by sample.

    Attributes:
        shape: N and L.
        batch_first: whether it is [N, L, ...].
        taken: [rows] of the batch's places as they lie in memory.
        ends: [N + 1] int64, where each sample's rows begin, and their end.
    """

    shape: tuple[int, int]
    batch_first: bool
    taken: Tensor
    ends: Tensor

    @classmethod
    def up_to(cls, lengths: Tensor | None, x: Tensor, batch_first: bool) -> "Places | None":
        """Those of x that lie before lengths [N], int64 on the CPU; None where it is not worth while to take them out,
        or something else than kernels wants to see x.
        """
        if lengths is None or x.device.type != "cpu" or x.numel() < _LEAST_ELEMENTS or not is_plain(x):
            return None
        N, L = x.shape[:2] if batch_first else (x.shape[1], x.shape[0])
        if N * L - int(lengths.sum()) < LEAST_PADDING * N * L:
            return None
        return cls.of(padding_mask(lengths, L, x.device), x, batch_first)

    @classmethod
    def of(cls, padding: Tensor | None, x: Tensor, batch_first: bool) -> "Places":
        """Those of x that are not true in padding [N, L]."""
        N, L = x.shape[:2] if batch_first else (x.shape[1], x.shape[0])
        present = torch.ones(N, L, dtype=torch.bool) if padding is None else ~padding
        sample, place = present.nonzero(as_tuple=True)
        taken = sample * L + place if batch_first else place * N + sample
        ends = torch.zeros(N + 1, dtype=torch.int64)
        torch.cumsum(present.sum(1), 0, out=ends[1:])
        return cls((N, L), batch_first, taken, ends)

    def transposed(self) -> "Places":
        """The same rows, sample by sample, of the batch laid out the other way."""
        width = self.shape[1] if self.batch_first else self.shape[0]
        taken = self.taken % width * (self.shape[0] * self.shape[1] // width) + self.taken // width
        return self._replace(batch_first=not self.batch_first, taken=taken)

    def rows_of(self, x: Tensor) -> Tensor:
        """[rows, E] of x [N, L, E]."""
        if not x.is_contiguous() and x.transpose(0, 1).is_contiguous():  # without a copy of all of it
            return self.transposed().rows_of(x.transpose(0, 1))
        return _Take.apply(x.flatten(0, 1), self.taken)

    def batch_of(self, rows: Tensor) -> Tensor:
        """The reverse, with zeros elsewhere."""
        N, L = self.shape
        lead = (N, L) if self.batch_first else (L, N)
        return _Put.apply(rows, self.taken, N * L).unflatten(0, lead)


class _Take(torch.autograd.Function):
    """Rows by their numbers, each of which occurs once: unlike torch's function, whose gradient must add up."""

    @staticmethod
    def forward(ctx, x, taken):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(taken)
        ctx.count = len(x)
        return x.index_select(0, taken)

    @staticmethod
    def backward(ctx, dy):  # type: ignore[no-untyped-def]
        return _Put.apply(dy, *ctx.saved_tensors, ctx.count), None


class _Put(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, taken, count):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(taken)
        return rows.new_zeros(count, rows.shape[1]).index_copy_(0, taken, rows)

    @staticmethod
    def backward(ctx, dy):  # type: ignore[no-untyped-def]
        return _Take.apply(dy, *ctx.saved_tensors), None, None
