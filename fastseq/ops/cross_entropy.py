"""The op `fastseq::cross_entropy`: softmax cross entropy with class indices, without any copy of the logits.

Formulas are in `fastseq.reference.cross_entropy`.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Parameter
from torch.nn._reduction import legacy_get_string
from torch.overrides import has_torch_function

from fastseq.ops.contract import (
    LIBRARY,
    autocast_dtype,
    below_autograd,
    grads_through,
    implement,
    is_plain,
    is_small,
    is_transformed,
    needs_graph,
    requested,
    rounding,
    why_torch,
    widened,
)
from fastseq.reference import cross_entropy as reference
from fastseq.registry import FLOATS, HALF, BackendError, Impl, Kernel, Op, register


class Arguments(NamedTuple):
    """What the op takes.

    Attributes:
        logits: [rows, V], V > 0, any stride from row to row, contiguous in a row, any floating dtype.
        target: [rows] int64, the class of each row, within [0, V), or ignore_index. Out of it: IndexError on CPUs, NaN
            elsewhere.
        weight: [V] of the classes, float64 beside float64 logits, else float32. No gradient.
        label_smoothing: between 0 and 1, how much of a row's weight goes to all classes alike.
        ignore_index: the target of rows that do not count.
    """

    logits: Tensor
    target: Tensor
    weight: Tensor | None = None
    label_smoothing: float = 0.0
    ignore_index: int = -100


class Outputs(NamedTuple):
    """What the op gives: [rows] both, float64 of float64 logits, else float32.

    Attributes:
        loss: of each row, 0 where the target is ignored.
        lse: log of the sum of exp(logits), 0 where the target is ignored, NaN where a logit is +inf. No gradient.
    """

    loss: Tensor
    lse: Tensor


@dataclass(frozen=True)
class Case:
    """A shape and the options that every implementation is tested on."""

    rows: int
    V: int
    weight: bool = False
    smoothing: float = 0.0
    ignored: float = 0.0  # share of the rows
    ignore_index: int = -100
    gap: int = 0  # elements between rows
    offset: float = 0.0  # what is added to all logits

    def __str__(self) -> str:
        flags = [name for name in ("weight", "smoothing", "ignored", "gap", "offset") if getattr(self, name)]
        return "-".join([f"rows{self.rows}_V{self.V}", *flags])

    def arguments(self, device: str, dtype: torch.dtype, seed: int = 0) -> Arguments:
        """Random arguments."""
        generator = torch.Generator().manual_seed(seed)
        rows, V = self.rows, self.V
        logits = torch.randn(rows, V + self.gap, generator=generator, dtype=torch.float64)
        logits = logits * 3 + self.offset
        target = torch.randint(V, (rows,), generator=generator)
        target[torch.rand(rows, generator=generator) < self.ignored] = self.ignore_index
        weight = torch.rand(V, generator=generator, dtype=torch.float64) if self.weight else None
        return Arguments(
            logits.to(device, dtype)[:, :V],
            target.to(device),
            None if weight is None else weight.to(device, computed_in(dtype)),
            self.smoothing,
            self.ignore_index,
        )


# Small ones for the self-check of a new machine first; then what exercises blocks, tails, splits and layouts.
SELF_CHECK_CASES = [
    Case(1, 1),
    Case(7, 37, gap=3),
    Case(5, 130, weight=True, smoothing=0.1, ignored=0.4),
    Case(3, 5001, smoothing=0.2, ignored=0.3, ignore_index=7),
    Case(2, 9000, weight=True),
    Case(4, 300, offset=200.0),
]
CASES = [
    *SELF_CHECK_CASES,
    Case(300, 2),
    Case(129, 16, smoothing=0.3, ignored=0.5),
    Case(70, 1000, weight=True, ignored=0.1),
    Case(33, 1024),
    Case(5, 1025, weight=True, smoothing=1.0),
    Case(3, 4099, weight=True, smoothing=0.1, gap=5),
    Case(65, 8192, ignored=0.2),
    Case(1, 50257, smoothing=0.1),
    Case(2, 32000, weight=True, smoothing=0.1, ignored=0.5),
    Case(3, 70001, weight=True),
    Case(4, 20000, smoothing=0.1, weight=True, offset=1e4),
    Case(6, 20, ignored=1.0, smoothing=0.1, weight=True),
    Case(3, 10000, ignored=1.0),
    Case(0, 5),
]


def computed_in(dtype: torch.dtype) -> torch.dtype:
    """The dtype of what the op gives and computes in: half precision in float32."""
    return torch.float32 if dtype in HALF else dtype


def grad_like(loss: Tensor) -> Tensor:
    """Some gradient of loss."""
    return torch.linspace(-1, 1, loss.numel(), dtype=loss.dtype, device=loss.device)


def backward_arguments(dloss: Tensor, arguments: Arguments, lse: Tensor) -> tuple[Any, ...]:
    """What the op's backward takes."""
    logits, target, weight, *options = arguments
    return (dloss, logits, target, weight, lse, *options)


def _self_check(kernel: Kernel, device: str, dtype: torch.dtype) -> None:
    """Outputs and gradients of the small cases against the reference in float64."""
    for case in SELF_CHECK_CASES:
        arguments = case.arguments(device, dtype)
        wide = widened(arguments)
        outputs, expected = Outputs(*kernel.forward(*arguments)), Outputs(*reference.forward(*wide))
        for got, want in zip(outputs, expected, strict=True):
            torch.testing.assert_close(got, want.to(got.dtype))
        sent = grad_like(expected.loss)
        dlogits = kernel.backward(*backward_arguments(sent.to(outputs.loss.dtype), arguments, outputs.lse))
        want = reference.backward(*backward_arguments(sent, wide, expected.lse))
        torch.testing.assert_close(dlogits, want.to(dtype), **rounding(want, dtype, 1))


TABLE = register(
    Op(
        "cross_entropy",
        [
            Impl(
                "cpp",
                "fastseq_native::cross_entropy",
                devices=frozenset({"cpu"}),
                dtypes=FLOATS | HALF,
                verified=frozenset({"avx2", "avx512", "portable"}),
            ),
            Impl(
                "triton",
                "fastseq.kernels.triton.cross_entropy",
                devices=frozenset({"cuda"}),
                dtypes=HALF | {torch.float32},
            ),
            Impl("reference", reference.__name__),
        ],
        _self_check,
    )
)

_OPTIONS = "float label_smoothing, int ignore_index"
LIBRARY.define(f"cross_entropy(Tensor logits, Tensor target, Tensor? weight, {_OPTIONS}) -> (Tensor loss, Tensor lse)")
LIBRARY.define(
    f"cross_entropy_backward(Tensor dloss, Tensor logits, Tensor target, Tensor? weight, Tensor lse, {_OPTIONS})"
    " -> Tensor"
)

# The bodies of the ops have no annotations: torch.library would read schemas from them.


def _forward(*args):  # type: ignore[no-untyped-def]
    logits, target, _, _, ignore_index = args
    _check_targets(target, logits.shape[1], ignore_index)
    return TABLE.select(logits.device.type, logits.dtype, *args).forward(*args)


def _backward(dloss, logits, target, weight, lse, *options):  # type: ignore[no-untyped-def]
    kernel = TABLE.select(logits.device.type, logits.dtype, logits, target, weight, *options)
    return kernel.backward(dloss, logits, target, weight, lse, *options)


def _forward_fake(logits, *_):  # type: ignore[no-untyped-def]
    loss = logits.new_empty(logits.shape[0], dtype=computed_in(logits.dtype))
    return loss, torch.empty_like(loss)


def _backward_fake(_dloss, logits, *_):  # type: ignore[no-untyped-def]
    return logits.new_empty(logits.shape)


def _autograd(*args):  # type: ignore[no-untyped-def]
    if needs_graph(args[0]):
        return _Function.apply(False, *args)
    with below_autograd():
        return torch.ops.fastseq.cross_entropy(*args)


implement("cross_entropy", _forward, _backward, _autograd, _forward_fake, _backward_fake)


def _check_targets(target: Tensor, V: int, ignore_index: int) -> None:
    """Raises what torch raises; on other devices that would be waited for."""
    if target.device.type != "cpu" or not target.numel():
        return
    least, most = torch.aminmax(target)
    if least < 0 or most >= V:
        wrong = target[((target < 0) | (target >= V)) & (target != ignore_index)]
        if wrong.numel():
            raise IndexError(f"Target {int(wrong[0])} is out of bounds.")


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx, plain, logits, target, weight, *options):  # type: ignore[no-untyped-def]
        with below_autograd():
            loss, lse = (_forward if plain else torch.ops.fastseq.cross_entropy)(logits, target, weight, *options)
        ctx.plain, ctx.options = plain, options
        ctx.save_for_backward(logits, target, weight, lse)
        ctx.mark_non_differentiable(lse)
        return loss, lse

    @staticmethod
    def backward(ctx, dloss, _):  # type: ignore[no-untyped-def]
        logits, target, weight, lse = ctx.saved_tensors
        # Only the reference has a graph to give, and takes batched gradients.
        if torch.is_grad_enabled() or is_transformed(dloss):
            rest = (target, weight, *ctx.options)
            (dlogits,) = grads_through(reference.forward, [logits], rest, [True], [dloss])
        else:
            plain = ctx.plain and is_plain(logits, dloss)
            compute = _backward if plain else torch.ops.fastseq.cross_entropy_backward
            dlogits = compute(dloss, logits, target, weight, lse, *ctx.options)
        return None, dlogits, None, None, None, None


def row_losses(arguments: Arguments) -> Outputs:
    """The op, for arguments that have been checked."""
    tensors = arguments[:3]
    if is_plain(*tensors):
        if needs_graph(arguments.logits):
            return Outputs(*_Function.apply(True, *arguments))
        return Outputs(*_forward(*arguments))
    if is_transformed():
        return Outputs(*reference.forward(*arguments))
    return Outputs(*torch.ops.fastseq.cross_entropy(*arguments))


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    """`torch.nn.functional.cross_entropy` without a copy of the logits, of which torch makes and keeps one.

    Where no kernel of ours serves (see `fastseq info`), torch's own function does. So it does for few logits on a CPU,
    where it is as fast, for probabilities of classes as targets, and for input whose classes lie apart in memory or
    whose rows do at no regular distance.

    Args:
        input: logits, [N, C], [C], or [N, C, d1, ...] that is `movedim` of a tensor [N, d1, ..., C].
        target: int64, the class of each row, [N], [], or [N, d1, ...].
        weight: [C] of the classes, of input's dtype.
        size_average, reduce: deprecated in torch, what `reduction` says.
        ignore_index: the target of rows that do not count: their loss and gradient are 0, whatever input is there.
        reduction: "none", "sum", or "mean", which divides by the weights of the targets that are not ignored.
        label_smoothing: between 0 and 1, how much of the target is spread over all classes (arXiv:1512.00567).

    Returns:
        The loss, a number or, with "none", of target's shape. It has input's dtype, or under autocast float32, as
        torch's; half precision is computed in float32 and rounded once, at the end.

    Raises:
        IndexError: a target on a CPU is out of range.
        RuntimeError, ValueError, TypeError: with torch's own message, for what torch's function refuses.
    """
    options: dict[str, Any] = dict(ignore_index=ignore_index, label_smoothing=label_smoothing)
    if isinstance(input, Tensor) and is_small(TABLE.name, input.numel(), LEAST_LOGITS, input):
        return F.cross_entropy(input, target, weight, size_average, reduce=reduce, reduction=reduction, **options)
    if size_average is not None or reduce is not None:
        reduction = legacy_get_string(size_average, reduce)
    low = autocast_dtype(input) if isinstance(input, Tensor) else None
    rows = _rows(input, target, weight, low is not None, ignore_index, reduction, label_smoothing)
    reason = why_torch(TABLE, input.device.type, input.dtype) if rows is not None else "it does not take such arguments"
    if rows is None or reason is not None:
        # torch's own checks say what is wrong, if something is, in torch's own words.
        result = F.cross_entropy(input, target, weight, reduction=reduction, **options)
        if (name := requested(TABLE.name)) is not None:
            raise BackendError(f"fastseq.functional.cross_entropy: {name} was asked for but {reason}")
        return result

    single = computed_in(input.dtype)
    targets = target.reshape(-1)
    weights = None if weight is None else weight.detach().to(single)
    arguments = Arguments(rows, targets, weights, max(0.0, float(label_smoothing)), ignore_index)
    loss = row_losses(arguments).loss
    if reduction == "none":
        loss = loss.reshape(target.shape)
    else:
        loss = loss.sum()
        if reduction == "mean":
            loss = loss / _count(arguments)
    return loss.to(input.dtype) if low is None else loss


def _count(arguments: Arguments) -> Tensor:
    """The weights of the targets that are not ignored, summed up."""
    counted = arguments.target != arguments.ignore_index
    if arguments.weight is None:
        return counted.sum()
    return (arguments.weight[arguments.target * counted] * counted).sum()


def _rows(
    input: Any, target: Any, weight: Any, autocast: bool, ignore_index: Any, reduction: Any, label_smoothing: Any
) -> Tensor | None:
    """A view of the input as [rows, V], or None if there is none or the op does not take the arguments."""
    for t in (input, target) if weight is None else (input, target, weight):
        if not _is_readable(t) or t.device != input.device:
            return None
    rank, dtype = input.dim(), input.dtype
    if rank == 0 or not dtype.is_floating_point or target.dtype != torch.int64 or reduction not in _REDUCTIONS:
        return None
    C = input.shape[1 if rank > 1 else 0]
    if C == 0 or target.shape != (input.shape[:1] + input.shape[2:] if rank > 1 else ()):
        return None
    if type(ignore_index) is not int or not -(2**63) <= ignore_index < 2**63:
        return None
    if not isinstance(label_smoothing, (int, float)) or not label_smoothing <= 1:
        return None
    if weight is not None:
        same = weight.dtype == dtype or (autocast and {weight.dtype, dtype} <= HALF | {torch.float32})
        if weight.shape != (C,) or not same or weight.requires_grad:
            return None
    if rank < 3:
        rows = input.unsqueeze(0) if rank == 1 else input
        return rows if C == 1 or rows.stride(1) == 1 else None
    moved = input.movedim(1, -1)
    if C > 1 and moved.stride(-1) != 1:
        return None
    distance = None
    for size, stride in zip(reversed(moved.shape[:-1]), reversed(moved.stride()[:-1]), strict=True):
        if size != 1:
            if distance is not None and stride != distance:
                return None
            distance = stride * size
    return moved.flatten(0, -2)


# Fewer, in float32 or float64 on a CPU, are torch's: our function takes 20 us to get to work, torch's 5.
LEAST_LOGITS = 192 * 1024
_REDUCTIONS = ("none", "mean", "sum")


def _is_readable(x: Any) -> bool:
    """Whether x is a tensor as the op reads it, and no class of its own wants to see what is done with it."""
    if type(x) is not Tensor and type(x) is not Parameter and (not isinstance(x, Tensor) or has_torch_function((x,))):
        return False
    return x.layout == torch.strided and not x.is_nested
