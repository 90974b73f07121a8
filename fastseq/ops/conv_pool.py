"""The op `fastseq::conv_pool`: a 2-D convolution, its bias, ReLU and max-pooling in one pass. Formulas are in
`fastseq.reference.conv_pool`.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Parameter
from torch.overrides import has_torch_function

from fastseq.ops.contract import (
    LIBRARY,
    autocast_dtype,
    below_autograd,
    grads_through,
    implement,
    is_plain,
    is_transformed,
    needs_graph,
    requested,
    why_torch,
    widened,
)
from fastseq.reference import conv_pool as reference
from fastseq.registry import FLOATS, BackendError, Impl, Kernel, Op, register


class Arguments(NamedTuple):
    """What the op takes, beside whether it shall save the tape.

    Attributes:
        x: [B, C, H, W], any strides, any floating dtype; without a copy where it is contiguous, or channels_last.
        weight: [O, C, kH, kW], x's dtype.
        bias: [O], x's dtype, or None.
        stride: of the convolution, down and across, at most 64.
        padding: zeros above and below x, and on its left and its right, at most 64.
        pool: height and width of the windows, of 255 pixels at most; at least one window fits.
    """

    x: Tensor
    weight: Tensor
    bias: Tensor | None = None
    stride: list[int] = [1, 1]  # noqa: RUF012 (nobody changes it; a schema's list is one)
    padding: list[int] = [0, 0]  # noqa: RUF012
    pool: list[int] = [2, 2]  # noqa: RUF012


class Outputs(NamedTuple):
    """What the op gives.

    Attributes:
        y: [B, O, oH, oW] of x's dtype and in its memory format.
        positions: [B, oH, oW, O] uint8, the tape: which pixel of its window each y is, row by row, or SHUT. Without
            elements if it was not to be saved.
    """

    y: Tensor
    positions: Tensor


@dataclass(frozen=True)
class Case:
    """A shape and the options that every implementation is tested on."""

    B: int
    C: int
    O: int
    size: tuple[int, int]
    kernel: tuple[int, int] = (3, 3)
    padding: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    pool: tuple[int, int] = (2, 2)
    bias: bool = True
    channels_last: bool = False

    def __str__(self) -> str:
        pairs = dict(x=self.size, k=self.kernel, p=self.padding, s=self.stride, w=self.pool)
        options = [f"{name}{h}x{w}" for name, (h, w) in pairs.items()]
        options += ["bias"] * self.bias + ["channels_last"] * self.channels_last
        return "-".join([f"B{self.B}_C{self.C}_O{self.O}", *options])

    def arguments(self, device: str, dtype: torch.dtype, seed: int = 0) -> Arguments:
        """Random arguments, of which sums are about as large as 1; some windows are shut, and pixels of some equal."""
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        terms = self.C * self.kernel[0] * self.kernel[1]
        x = normal(self.B, self.C, *self.size).to(device, dtype)
        weight = normal(self.O, self.C, *self.kernel).div(terms**0.5).to(device, dtype)
        return Arguments(
            x.contiguous(memory_format=torch.channels_last) if self.channels_last else x,
            weight,
            normal(self.O).sub(0.5).to(device, dtype) if self.bias else None,
            list(self.stride),
            list(self.padding),
            list(self.pool),
        )


# Small ones for the self-check of a new machine first; then what exercises tiles, tails, bands and layouts.
SELF_CHECK_CASES = [
    Case(2, 1, 32, (14, 14)),
    Case(3, 19, 21, (9, 11), channels_last=True),
    Case(2, 32, 40, (7, 6), pool=(3, 2), bias=False),
    Case(1, 3, 5, (11, 13), (3, 5), (1, 2), (2, 1), (1, 3)),
]
CASES = [
    *SELF_CHECK_CASES,
    Case(5, 1, 32, (28, 28)),
    Case(3, 32, 64, (14, 14)),
    Case(3, 32, 64, (14, 14), channels_last=True),
    Case(40, 5, 33, (8, 8)),
    Case(2, 1, 6, (28, 28), (5, 5), (2, 2)),
    Case(2, 6, 16, (14, 14), (5, 5), (0, 0), channels_last=True),
    Case(2, 40, 24, (33, 70), (3, 5), (1, 2)),
    Case(2, 65, 7, (10, 9), (1, 1), (0, 0), channels_last=True),
    Case(2, 8, 9, (9, 8), pool=(1, 1)),
    Case(2, 70, 12, (9, 8), pool=(1, 1)),
    Case(2, 4, 9, (12, 17), (2, 3), (3, 0), (3, 2), (2, 2)),
    Case(2, 35, 9, (17, 12), (1, 2), (0, 3), (3, 2), (1, 2), channels_last=True),
    Case(1, 20, 3, (40, 140), (3, 3), (2, 2), (1, 1), (4, 4)),
    Case(1, 2, 3, (30, 31), (2, 2), (0, 0), (1, 1), (15, 17)),
    Case(1, 1, 1, (2, 2), bias=False),
    Case(0, 3, 4, (6, 6)),
]


def _self_check(kernel: Kernel, device: str, dtype: torch.dtype) -> None:
    """Outputs and gradients of the small cases against the reference in float64."""
    for case in SELF_CHECK_CASES:
        arguments = case.arguments(device, dtype)
        wide = widened(arguments)
        outputs, want = Outputs(*kernel.forward(*arguments, True)), Outputs(*reference.forward(*wide, True))
        tolerance = tolerance_of(arguments)
        torch.testing.assert_close(outputs.y, want.y.to(dtype), **tolerance)
        # In float32 the largest of two that are nearly equal may be another.
        tape, dy, needs = outputs.positions, grad_like(outputs.y), needs_all(arguments)
        if (tape != want.positions).sum() > tape.numel() // 100:
            raise AssertionError("positions in the windows differ")
        ours = kernel.backward(dy, tape, *backward_arguments(arguments), needs)
        theirs = reference.backward(dy.double(), tape, *backward_arguments(wide), needs)
        for got, exact in zip(ours, theirs, strict=True):
            torch.testing.assert_close(got, exact.to(dtype), **tolerance)


TABLE = register(
    Op(
        "conv_pool",
        [
            Impl(
                "cpp",
                "fastseq_native::conv_pool",
                devices=frozenset({"cpu"}),
                dtypes=FLOATS,
                verified=frozenset({"avx2", "avx512", "portable"}),
            ),
            Impl("reference", reference.__name__),
        ],
        _self_check,
    )
)

_OPTIONS = "int[] stride, int[] padding, int[] pool"
LIBRARY.define(
    f"conv_pool(Tensor x, Tensor weight, Tensor? bias, {_OPTIONS}, bool save_tape) -> (Tensor y, Tensor positions)"
)
LIBRARY.define(
    f"conv_pool_backward(Tensor dy, Tensor positions, Tensor x, Tensor weight, {_OPTIONS}, bool[] needs)"
    " -> (Tensor dx, Tensor dweight, Tensor dbias)"
)

# The bodies of the ops have no annotations: torch.library would read schemas from them.


def _forward(*args):  # type: ignore[no-untyped-def]
    return TABLE.select(args[0].device.type, args[0].dtype, *args).forward(*args)


def _backward(*args):  # type: ignore[no-untyped-def]
    return TABLE.select(args[2].device.type, args[2].dtype, *args[2:]).backward(*args)


def _forward_fake(x, weight, _bias, stride, padding, pool, save_tape):  # type: ignore[no-untyped-def]
    size = pooled_size(x, weight, stride, padding, pool)
    y = _empty_like(x, (x.shape[0], weight.shape[0], *size))
    return y, x.new_empty((x.shape[0], *size, weight.shape[0]) if save_tape else 0, dtype=torch.uint8)


def _backward_fake(_dy, _positions, x, weight, _stride, _padding, _pool, needs):  # type: ignore[no-untyped-def]
    dx = _empty_like(x, x.shape) if needs[0] else x.new_empty(0)
    return dx, x.new_empty(weight.shape if needs[1] else 0), x.new_empty(weight.shape[0] if needs[2] else 0)


def _empty_like(x: Tensor, shape: Any) -> Tensor:
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=reference.memory_format(x))


def _autograd(*args):  # type: ignore[no-untyped-def]
    if needs_graph(*args[:3]):
        return _Function.apply(False, *args)
    with below_autograd():
        return torch.ops.fastseq.conv_pool(*args)


implement("conv_pool", _forward, _backward, _autograd, _forward_fake, _backward_fake)


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx, plain, *args):  # type: ignore[no-untyped-def]
        with below_autograd():
            y, positions = (_forward if plain else torch.ops.fastseq.conv_pool)(*args[:-1], True)
        ctx.plain, ctx.options = plain, args[3:6]
        ctx.save_for_backward(*args[:3], positions)
        ctx.mark_non_differentiable(positions)
        ctx.set_materialize_grads(False)
        return y, positions

    @staticmethod
    def backward(ctx, dy, _):  # type: ignore[no-untyped-def]
        if dy is None:
            return (None,) * 8
        *tensors, positions = ctx.saved_tensors
        x, weight, _bias = tensors
        needs = list(ctx.needs_input_grad[1:4])
        # Only the reference has a graph to give, and takes batched gradients.
        if torch.is_grad_enabled() or is_transformed(dy):
            found = grads_through(reference.pooled, tensors, ctx.options, needs, [dy])
        else:
            plain = ctx.plain and is_plain(dy, x, weight)
            compute = _backward if plain else torch.ops.fastseq.conv_pool_backward
            ours = compute(dy, positions, x, weight, *ctx.options, needs)
            found = [g if need else None for g, need in zip(ours, needs, strict=True)]
        return None, *found, *[None] * 4


def conv_pool(arguments: Arguments, save_tape: bool = True) -> Outputs:
    """The op, for arguments that have been checked. The tape may be there although it was not to be saved."""
    tensors = arguments[:3]
    if is_plain(*tensors):
        if needs_graph(*tensors):
            return Outputs(*_Function.apply(True, *arguments, save_tape))
        return Outputs(*_forward(*arguments, save_tape))
    if is_transformed():
        return Outputs(reference.pooled(*arguments), arguments.x.new_empty(0, dtype=torch.uint8))
    return Outputs(*torch.ops.fastseq.conv_pool(*arguments, save_tape))


# What lies between the pixels that are read is kept, too.
_MOST_STEP = 64


def conv_relu_pool(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, stride: Any = 1, padding: Any = 0, pool: Any = 2
) -> Tensor:
    """max_pool2d(relu(conv2d(x, weight, bias, stride, padding)), pool) in one pass, forward and backward.

    What lies between is in no memory but the cache: backward needs no more of it than which pixel of its window each
    result is, a byte. Where no kernel of ours serves (see `fastseq info`), torch's functions do, one after the other;
    so they do in training without pooling, where they are faster.

    Args:
        x: [B, C, H, W], float32 or float64 for our kernels, contiguous or channels_last without a copy; or [C, H, W].
        weight: [O, C, kH, kW], x's dtype.
        bias: [O], x's dtype.
        stride: of the convolution, a number, or one down and one across.
        padding: zeros around x, a number, or one above and below and one on the left and the right; or what else
            `torch.nn.functional.conv2d` takes.
        pool: height and width of the windows of the pooling, which lie side by side, a number or two; 1 for none.

    Returns:
        [B, O, H', W'] of x's dtype in x's memory format, with the pixels that fill whole windows.

    Raises:
        RuntimeError, TypeError, ValueError: torch's own, for what torch's functions refuse.
    """
    arguments = _taken(x, weight, bias, stride, padding, pool)
    reason = "it does not take such arguments" if arguments is None else why_torch(TABLE, x.device.type, x.dtype)
    if arguments is None or reason is not None or _is_slower(arguments):
        # torch's own checks say what is wrong, if something is, in torch's own words.
        y = F.conv2d(x, weight, bias, stride, padding).relu()
        y = y if _pair(pool) == [1, 1] else F.max_pool2d(y, pool)
        if (name := requested(TABLE.name)) is not None:
            raise BackendError(f"fastseq.functional.conv_relu_pool: {name} was asked for but {reason}")
        return y
    return conv_pool(arguments, False).y


def _is_slower(arguments: Arguments) -> bool:
    """Whether torch's functions are faster, and nothing else is asked for: in training without pooling, where none of
    the gradient can be left out.
    """
    return arguments.pool == [1, 1] and needs_graph(*arguments[:3]) and requested(TABLE.name) is None


def _taken(x: Any, weight: Any, bias: Any, stride: Any, padding: Any, pool: Any) -> Arguments | None:
    """What the op is to be given, or None if it does not take the arguments."""
    for t in (x, weight) if bias is None else (x, weight, bias):
        if not _is_readable(t) or t.dtype != x.dtype or t.device != x.device:
            return None
    if x.dtype not in FLOATS or x.dim() != 4 or weight.dim() != 4 or x.shape[1] != weight.shape[1]:
        return None
    if (bias is not None and bias.shape != weight.shape[:1]) or autocast_dtype(x) is not None:
        return None
    stride, padding, pool = _pair(stride), _pair(padding), _pair(pool)
    if stride is None or padding is None or pool is None:
        return None
    if min(stride) < 1 or min(padding) < 0 or min(pool) < 1 or pool[0] * pool[1] > 255:
        return None
    if max(*stride, *padding) > _MOST_STEP:
        return None
    if min(weight.shape) < 1 or min(x.shape[1:]) < 1 or min(pooled_size(x, weight, stride, padding, pool)) < 1:
        return None
    return Arguments(x, weight, bias, stride, padding, pool)


def _is_readable(t: Any) -> bool:
    """Whether t is a tensor as the op reads it, and no class of its own wants to see what is done with it."""
    if type(t) is not Tensor and type(t) is not Parameter and (not isinstance(t, Tensor) or has_torch_function((t,))):
        return False
    return t.layout == torch.strided and not t.is_nested


def _pair(value: Any) -> list[int] | None:
    """A number, or two of them, as two; None for anything else."""
    pair = [value, value] if type(value) is int else list(value) if isinstance(value, (tuple, list)) else []
    return pair if len(pair) == 2 and all(type(v) is int for v in pair) else None


def pooled_size(x: Tensor, weight: Tensor, stride: list[int], padding: list[int], pool: list[int]) -> tuple[int, int]:
    """Height and width of what is left of x; not positive where nothing is."""

    def windows(d: int) -> int:
        seen = x.shape[2 + d] + 2 * padding[d] - weight.shape[2 + d]
        return (seen // stride[d] + 1) // pool[d]

    return windows(0), windows(1)


def backward_arguments(arguments: Arguments) -> tuple[Tensor, Tensor, list[int], list[int], list[int]]:
    """What backward takes of them."""
    return arguments.x, arguments.weight, arguments.stride, arguments.padding, arguments.pool


def needs_all(arguments: Arguments) -> list[bool]:
    """Every gradient that there can be."""
    return [True, True, arguments.bias is not None]


def grad_like(y: Tensor) -> Tensor:
    """Some gradient of y, in its memory format."""
    values = torch.arange(y.numel(), dtype=torch.float64).mul(0.7).sin().to(y.device, y.dtype).view(y.shape)
    return values.contiguous(memory_format=reference.memory_format(y))


def tolerance_of(arguments: Arguments) -> dict[str, Any]:
    """Sums of as many terms as there are, in another order."""
    if arguments.x.dtype == torch.float64:
        return {}
    pixels = arguments.x.shape[0] * arguments.x.shape[2] * arguments.x.shape[3]
    terms = max(arguments.weight[0].numel(), arguments.weight[:, 0].numel(), pixels)
    return dict(rtol=1e-5, atol=2e-6 * terms**0.5)
