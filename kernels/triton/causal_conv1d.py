"""Depthwise causal convolution on NVIDIA's GPUs: `fastseq::causal_conv1d`, tile by tile, of channels and times.

Formulas are in `fastseq.reference.causal_conv1d`. Tiles are long in whichever of the two follow each other in memory.
Filters are unrolled, since they are short, and elements that they share come out of the first-level cache. Gradients of
weight and bias are sums over rows and times: each program adds up those of its own, and the programs' sums are added in
their order. Nothing is added up by atomics, how much a program does depends on the shape alone, and results are the
same to the bit from run to run.
"""

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastseq.kernels.triton.activation import sigmoids
from fastseq.ops.causal_conv1d import Case, Outputs, empty_gradients, empty_outputs, grads_like, is_by_time, needs_all

# What changes from call to call and must not be compiled in.
SIZES = ["share", "units"]


@triton.jit
def _places(row, channel, time, at_b, at_c, at_t):
    """Where a tile's elements are in [B, C, T] with these strides: a tensor may have more than 2**31 elements."""
    return row.to(tl.int64) * at_b + (channel.to(tl.int64) * at_c)[:, None] + (time.to(tl.int64) * at_t)[None, :]


@triton.jit
def _load(p, at_b, at_c, at_t, row, channel, time, C, T):
    """A tile, zero where there is no such channel or time."""
    there = (channel < C)[:, None] & ((time >= 0) & (time < T))[None, :]
    return tl.load(p + _places(row, channel, time, at_b, at_c, at_t), mask=there, other=0.0).to(tl.float32)


@triton.jit
def _inputs(p_x, x_b, x_c, x_t, p_state, row, channel, time, C, T, K: tl.constexpr):
    """A tile of x, or of the inputs before it."""
    values = _load(p_x, x_b, x_c, x_t, row, channel, time, C, T)
    if p_state is not None:
        values += _load(p_state, C * (K - 1), K - 1, 1, row, channel, time + K - 1, C, K - 1)
    return values


@triton.jit
def _filter(p_weight, channel, k, C, K: tl.constexpr):
    """One element of each channel's filter, as a column."""
    return tl.load(p_weight + channel * K + k, mask=channel < C, other=0.0).to(tl.float32)[:, None]


@triton.jit
def _convolved(p_x, x_b, x_c, x_t, p_weight, p_bias, p_state, row, channel, time, C, T, K: tl.constexpr):
    """A tile of what the activation is taken of."""
    a = _filter(p_weight, channel, K - 1, C, K) * _inputs(p_x, x_b, x_c, x_t, p_state, row, channel, time, C, T, K)
    for k in tl.static_range(K - 1):
        e = _inputs(p_x, x_b, x_c, x_t, p_state, row, channel, time + (k - (K - 1)), C, T, K)
        a += _filter(p_weight, channel, k, C, K) * e
    if p_bias is not None:
        a += tl.load(p_bias + channel, mask=channel < C, other=0.0).to(tl.float32)[:, None]
    return a


@triton.jit
def _store(p, at_b, at_c, at_t, row, channel, time, C, T, values):
    there = (channel < C)[:, None] & ((time >= 0) & (time < T))[None, :]
    tl.store(p + _places(row, channel, time, at_b, at_c, at_t), values.to(p.dtype.element_ty), mask=there)


@triton.jit(do_not_specialize=SIZES)
def _forward(
    p_x, x_b, x_c, x_t, p_weight, p_bias, p_state, p_y, y_b, y_c, y_t, p_final, C, T,
    K: tl.constexpr, SILU: tl.constexpr, CHANNELS: tl.constexpr, TIMES: tl.constexpr, BEFORE: tl.constexpr,
):  # fmt: skip
    """A tile of y, and behind the last one the new state."""
    blocks = tl.maximum(1, tl.cdiv(T, TIMES))
    stripes = tl.cdiv(C, CHANNELS)
    block, row = tl.program_id(0) % blocks, tl.program_id(0) // blocks // stripes
    channel = tl.program_id(0) // blocks % stripes * CHANNELS + tl.arange(0, CHANNELS)
    time = block * TIMES + tl.arange(0, TIMES)
    y = _convolved(p_x, x_b, x_c, x_t, p_weight, p_bias, p_state, row, channel, time, C, T, K)
    if SILU:
        s, _ = sigmoids(y)
        y *= s
    _store(p_y, y_b, y_c, y_t, row, channel, time, C, T, y)
    if K > 1:  # noqa: SIM102  (known when it is compiled)
        if block == blocks - 1:
            place = tl.arange(0, BEFORE)
            e = _inputs(p_x, x_b, x_c, x_t, p_state, row, channel, place + (T - (K - 1)), C, T, K)
            _store(p_final, C * (K - 1), K - 1, 1, row, channel, place, C, K - 1, e)


@triton.jit(do_not_specialize=SIZES)
def _sums_gradient(
    p_dy, dy_b, dy_c, dy_t, p_x, x_b, x_c, x_t, p_weight, p_bias, p_state, p_da, da_b, da_c, da_t, p_sums, C, T,
    units, share,
    K: tl.constexpr, SILU: tl.constexpr, CHANNELS: tl.constexpr, TIMES: tl.constexpr, SUMS: tl.constexpr,
):  # fmt: skip
    """The gradients of what the activation is taken of, in `share` tiles of the same channels, and what these add to
    the gradients of weight and, last, bias: [parts, C, SUMS].
    """
    blocks = tl.cdiv(T, TIMES)
    stripes = tl.cdiv(C, CHANNELS)
    part = tl.program_id(0) // stripes
    channel = tl.program_id(0) % stripes * CHANNELS + tl.arange(0, CHANNELS)
    place = tl.arange(0, SUMS)[None, :]
    sums = tl.zeros((CHANNELS, SUMS), tl.float32)
    for unit in range(part * share, tl.minimum((part + 1) * share, units)):
        row, time = unit // blocks, unit % blocks * TIMES + tl.arange(0, TIMES)
        da = _load(p_dy, dy_b, dy_c, dy_t, row, channel, time, C, T)
        if SILU:
            a = _convolved(p_x, x_b, x_c, x_t, p_weight, p_bias, p_state, row, channel, time, C, T, K)
            s, rest = sigmoids(a)
            # Where there is no such time, the filter may still see what is not finite.
            da = tl.where((time < T)[None, :], da * (s * (1.0 + a * rest)), 0.0)
        if p_da is not None:
            _store(p_da, da_b, da_c, da_t, row, channel, time, C, T, da)
        if p_sums is not None:
            sums += tl.where(place == K, tl.sum(da, 1)[:, None], 0.0)
            for k in tl.static_range(K):
                e = _inputs(p_x, x_b, x_c, x_t, p_state, row, channel, time + (k - (K - 1)), C, T, K)
                product = tl.where((time < T)[None, :], da * e, 0.0)
                sums += tl.where(place == k, tl.sum(product, 1)[:, None], 0.0)
    if p_sums is not None:
        at = (part.to(tl.int64) * C + channel)[:, None] * SUMS + place
        tl.store(p_sums + at, sums, mask=(channel < C)[:, None] & (place < SUMS))


@triton.jit
def _input_gradient(p_da, da_b, da_c, da_t, p_weight, p_dfinal, row, channel, time, C, T, K: tl.constexpr):
    """A tile of the gradient of the inputs, those before x included."""
    de = _filter(p_weight, channel, K - 1, C, K) * _load(p_da, da_b, da_c, da_t, row, channel, time, C, T)
    for j in tl.static_range(1, K):
        da = _load(p_da, da_b, da_c, da_t, row, channel, time + j, C, T)
        de += _filter(p_weight, channel, K - 1 - j, C, K) * da
    if p_dfinal is not None:
        de += _load(p_dfinal, C * (K - 1), K - 1, 1, row, channel, time - (T - (K - 1)), C, K - 1)
    return de


@triton.jit(do_not_specialize=SIZES)
def _input_gradients(
    p_da, da_b, da_c, da_t, p_weight, p_dfinal, p_dx, dx_b, dx_c, dx_t, p_dstate, C, T,
    K: tl.constexpr, CHANNELS: tl.constexpr, TIMES: tl.constexpr, BEFORE: tl.constexpr,
):  # fmt: skip
    """A tile of dx, and before the first one dstate."""
    blocks = tl.maximum(1, tl.cdiv(T, TIMES))
    stripes = tl.cdiv(C, CHANNELS)
    block, row = tl.program_id(0) % blocks, tl.program_id(0) // blocks // stripes
    channel = tl.program_id(0) // blocks % stripes * CHANNELS + tl.arange(0, CHANNELS)
    if p_dx is not None:
        time = block * TIMES + tl.arange(0, TIMES)
        dx = _input_gradient(p_da, da_b, da_c, da_t, p_weight, p_dfinal, row, channel, time, C, T, K)
        _store(p_dx, dx_b, dx_c, dx_t, row, channel, time, C, T, dx)
    if p_dstate is not None:  # noqa: SIM102
        if block == 0:
            place = tl.arange(0, BEFORE)
            de = _input_gradient(p_da, da_b, da_c, da_t, p_weight, p_dfinal, row, channel, place - (K - 1), C, T, K)
            _store(p_dstate, C * (K - 1), K - 1, 1, row, channel, place, C, K - 1, de)


# Elements of a tile, 8 for each of 128 threads: 16 bytes of half precision. Not tuned on any GPU.
TILE, WARPS = 1024, 4
MOST_TIMES = {True: 8, False: 256}  # by time: a tile is long in channels; otherwise in times
# As many programs as keep any GPU busy; more tiles are shared among as many, so that partial sums are few.
WANTED_PROGRAMS = 2048


def _launch(x: Tensor, K: int) -> dict[str, int]:
    C, T = x.shape[1:]
    times = min(MOST_TIMES[is_by_time(x)], triton.next_power_of_2(max(1, T)))
    channels = min(TILE // MOST_TIMES[True], TILE // times, triton.next_power_of_2(max(1, C)))
    return dict(CHANNELS=channels, TIMES=times, K=K, num_warps=WARPS)


def _tiles(x: Tensor, launch: dict[str, int]) -> tuple[int, int]:
    """How many stripes of channels there are, and how many blocks of times."""
    return triton.cdiv(x.shape[1], launch["CHANNELS"]), triton.cdiv(x.shape[2], launch["TIMES"])


def _contiguous(t: Tensor | None) -> Tensor | None:
    """The same, None if nothing is in it."""
    return t.contiguous() if t is not None and t.numel() else None


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor | None, silu: bool) -> tuple[Tensor, Tensor]:
    """See `fastseq.ops.causal_conv1d.Arguments` and `Outputs`."""
    K = weight.shape[1]
    y, final = empty_outputs(x, weight)
    if y.numel() or final.numel():
        launch = _launch(x, K)
        stripes, blocks = _tiles(x, launch)
        _forward[(x.shape[0] * stripes * max(1, blocks),)](
            x, *x.stride(), weight.contiguous(), _contiguous(bias), _contiguous(state), y, *y.stride(),
            final, *x.shape[1:], SILU=silu, BEFORE=triton.next_power_of_2(max(1, K - 1)), **launch,
        )  # fmt: skip
    return y, final


def backward(
    dy: Tensor,
    dfinal: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor | None,
    silu: bool,
    needs: list[bool],
) -> tuple[Tensor, ...]:
    """Gradients of x, weight, bias and state, without elements where `needs` says no."""
    B, C, T = x.shape
    K = weight.shape[1]
    grads = empty_gradients(x, weight, bias, needs)
    dx, dweight, dbias, dstate = (g if g.numel() else None for g in grads)
    of_inputs, of_sums = dx is not None or dstate is not None, dweight is not None or dbias is not None
    launch = _launch(x, K)
    stripes, blocks = _tiles(x, launch)
    weight, da = weight.contiguous(), dy
    if x.numel() and (of_sums or (of_inputs and silu)):
        # In float32: rounding it first would cost more than half precision does.
        kept = torch.empty_like(empty_outputs(x, weight).y, dtype=torch.float32) if of_inputs and silu else None
        da = dy if kept is None else kept
        units = B * blocks
        share = triton.cdiv(units * stripes, WANTED_PROGRAMS)
        parts = triton.cdiv(units, share)
        wide = triton.next_power_of_2(K + 1)
        sums = x.new_empty((parts, C, wide), dtype=torch.float32) if of_sums else None
        _sums_gradient[(parts * stripes,)](
            dy, *dy.stride(), x, *x.stride(), weight, _contiguous(bias), _contiguous(state), kept, *da.stride(), sums,
            C, T, units, share, SILU=silu, SUMS=wide, **launch,
        )  # fmt: skip
        if sums is not None:
            total = sums.sum(0)
            if dweight is not None:
                dweight.copy_(total[:, :K])
            if dbias is not None:
                dbias.copy_(total[:, K])
    else:
        for columns in (dweight, dbias):
            if columns is not None:
                columns.zero_()
    if of_inputs:
        like = dx if dx is not None else x
        _input_gradients[(B * stripes * max(1, blocks),)](
            da, *da.stride(), weight, _contiguous(dfinal), dx, *like.stride(), dstate, C, T,
            BEFORE=triton.next_power_of_2(max(1, K - 1)), **launch,
        )  # fmt: skip
    return tuple(grads)


def _training(case: Case) -> Callable[[torch.dtype, int], None]:
    """Launches all kernels of a case, forward and backward."""

    def run(dtype: torch.dtype, _capability: int) -> None:
        arguments = case.arguments("cpu", dtype)
        outputs = Outputs(*forward(*arguments))
        backward(*grads_like(outputs), *arguments, needs_all(arguments))

    return run


# What is compiled ahead of time and looked at without a GPU (tests/aot.py): the main configurations first, then one of
# each feature.
AOT = {
    "silu 4, by time": _training(Case(4, 1024, 64, 4, True, by_time=True)),
    "silu 4, by channel": _training(Case(4, 64, 1024, 4, True)),
    "silu 4, state, one time": _training(Case(4, 1024, 1, 4, True, state=True)),
    "3, by time": _training(Case(4, 1024, 64, 3, by_time=True)),
    "silu 8, state": _training(Case(4, 64, 1024, 8, True, "single", True)),
    "silu 7, state 33": _training(Case(4, 33, 33, 7, True, "", True)),
    "1": _training(Case(4, 64, 1024, 1)),
}
