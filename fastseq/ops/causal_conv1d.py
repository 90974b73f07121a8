"""The op `fastseq::causal_conv1d`: depthwise causal convolution in time, its bias and SiLU in one pass, and the state
that streams it. Formulas are in `fastseq.reference.causal_conv1d`.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastseq.ops.contract import (
    LIBRARY,
    autocast_dtype,
    below_autograd,
    check_tensor,
    grads_through,
    implement,
    is_plain,
    is_transformed,
    needs_graph,
    rounding,
    widened,
)
from fastseq.reference import causal_conv1d as reference
from fastseq.registry import FLOATS, HALF, Impl, Kernel, Op, register

# What the function's `activation` may be, and the op's `silu` then.
ACTIVATIONS = {None: False, "silu": True}


class Arguments(NamedTuple):
    """What the op takes.

    Attributes:
        x: [B, C, T], any strides, any floating dtype.
        weight: [C, K] of x's dtype or, beside half precision, float32; K >= 1.
        bias: [C], likewise; or None.
        state: [B, C, K - 1] of x's dtype, the inputs before x; zeros if None.
        silu: whether SiLU follows.
    """

    x: Tensor
    weight: Tensor
    bias: Tensor | None = None
    state: Tensor | None = None
    silu: bool = False


class Outputs(NamedTuple):
    """What the op gives.

    Attributes:
        y: [B, C, T] of x's dtype; times by channels in memory if x is such, else contiguous.
        final: [B, C, K - 1] of x's dtype, contiguous: the last inputs.
    """

    y: Tensor
    final: Tensor


@dataclass(frozen=True)
class Case:
    """A shape and the options that every implementation is tested on."""

    B: int
    C: int
    T: int
    K: int
    silu: bool = False
    bias: str = "same"  # dtype as x, "single" precision beside half, or none: ""
    state: bool = False
    by_time: bool = False  # x is [B, T, C] in memory

    def __str__(self) -> str:
        options = ["silu" * self.silu, self.bias and f"{self.bias}_bias", "state" * self.state]
        return "-".join(
            [f"B{self.B}_C{self.C}_T{self.T}_K{self.K}", *filter(None, options), *["by_time"] * self.by_time]
        )

    def arguments(self, device: str, dtype: torch.dtype, seed: int = 0) -> Arguments:
        """Random arguments."""
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)

        wide = torch.float32 if dtype in HALF and self.bias == "single" else dtype
        B, C, T, K = self.B, self.C, self.T, self.K
        return Arguments(
            normal(B, T, C).transpose(1, 2) if self.by_time else normal(B, C, T),
            normal(C, K, dtype=wide),
            normal(C, dtype=wide) if self.bias else None,
            normal(B, C, K - 1) if self.state else None,
            self.silu,
        )


# Small ones for the self-check of a new machine first; then what exercises tiles, tails, blocks and layouts.
SELF_CHECK_CASES = [
    *(
        Case(2, 19, 37, K, silu, "same", True, by_time)
        for K in (2, 4)
        for silu in (False, True)
        for by_time in (False, True)
    ),
    Case(3, 5, 70, 3, True, "single"),
    Case(2, 33, 1, 4, True, state=True),
    Case(2, 3, 2, 7, True, "", True),
]
CASES = [
    *SELF_CHECK_CASES,
    *(Case(3, 7, 129, K, True, "same", True, by_time) for K in (1, 3, 5, 12) for by_time in (False, True)),
    *(Case(2, 70, T, 4, True, "same", True, by_time) for T in (2, 3, 4, 5) for by_time in (False, True)),
    Case(2, 9, 1500, 4, True, "single", True),
    Case(2, 9, 1500, 4, True, "single", True, by_time=True),
    Case(1, 3, 2500, 40, False, "", True),
    Case(1, 3, 700, 1100, True, "same", True, by_time=True),
    Case(1, 2, 700, 1100, True, "same", True),
    Case(2, 600, 67, 4, True, "same", by_time=True),
    Case(2, 300, 33, 2, False, "", by_time=True),
    Case(40, 1, 5, 3, True, "same", True),
    Case(5, 130, 1, 3, True, "single", True),
    Case(5, 130, 1, 1),
    Case(1, 1, 1, 2),
    Case(0, 5, 7, 4, True, "same", True),
    Case(3, 0, 7, 4, True, "same", True),
    Case(3, 5, 0, 4, True, "same", True),
    Case(3, 5, 0, 4, True, "same", by_time=True),
]


def _self_check(kernel: Kernel, device: str, dtype: torch.dtype) -> None:
    """Outputs and gradients of the small cases against the reference in float64."""
    for case in SELF_CHECK_CASES:
        arguments = case.arguments(device, dtype)
        wide, needs = widened(arguments), needs_all(arguments)
        outputs, expected = Outputs(*kernel.forward(*arguments)), Outputs(*reference.forward(*wide))
        dy, dfinal = grads_like(outputs)
        ours = kernel.backward(dy, dfinal, *arguments, needs)
        theirs = reference.backward(dy.double(), dfinal.double(), *wide, needs)
        for got, want in zip((*outputs, *ours), (*expected, *theirs), strict=True):
            # Sums over rows and times are made in another order.
            tolerance = dict(rtol=1e-5, atol=5e-5) if got.dtype == torch.float32 else {}
            torch.testing.assert_close(got, want.to(got.dtype), **(rounding(want, got.dtype, 2) or tolerance))


def _needs_a_short_filter(_x: Tensor, weight: Tensor, *_: Any) -> str | None:
    K = weight.shape[1]
    return None if K <= 8 else f"it takes kernels of at most 8 elements, not {K}"


TABLE = register(
    Op(
        "causal_conv1d",
        [
            Impl(
                "cpp",
                "fastseq_native::causal_conv1d",
                devices=frozenset({"cpu"}),
                dtypes=FLOATS | HALF,
                verified=frozenset({"avx2", "avx512", "portable"}),
            ),
            Impl(
                "triton",
                "fastseq.kernels.triton.causal_conv1d",
                devices=frozenset({"cuda"}),
                dtypes=HALF | {torch.float32},
                needs=_needs_a_short_filter,
            ),
            Impl("reference", reference.__name__),
        ],
        _self_check,
    )
)

_ARGUMENTS = "Tensor x, Tensor weight, Tensor? bias, Tensor? state, bool silu"
LIBRARY.define(f"causal_conv1d({_ARGUMENTS}) -> (Tensor y, Tensor final)")
LIBRARY.define(
    f"causal_conv1d_backward(Tensor dy, Tensor? dfinal, {_ARGUMENTS}, bool[] needs)"
    " -> (Tensor dx, Tensor dweight, Tensor dbias, Tensor dstate)"
)

# The bodies of the ops have no annotations: torch.library would read schemas from them.


def _forward(*args):  # type: ignore[no-untyped-def]
    return TABLE.select(args[0].device.type, args[0].dtype, *args).forward(*args)


def _backward(*args):  # type: ignore[no-untyped-def]
    return TABLE.select(args[2].device.type, args[2].dtype, *args[2:]).backward(*args)


def is_by_time(x: Tensor) -> bool:
    """Whether [B, C, T] lies in memory as [B, T, C] does; results like x do so, too."""
    return x.stride(1) == 1 and x.stride(2) != 1


def _empty_like(x: Tensor) -> Tensor:
    B, C, T = x.shape
    return x.new_empty((B, T, C)).transpose(1, 2) if is_by_time(x) else x.new_empty((B, C, T))


def empty_outputs(x: Tensor, weight: Tensor) -> Outputs:
    """New tensors for what a call gives."""
    return Outputs(_empty_like(x), x.new_empty((*x.shape[:2], weight.shape[1] - 1)))


def empty_gradients(x: Tensor, weight: Tensor, bias: Tensor | None, needs: list[bool]) -> list[Tensor]:
    """New tensors for the gradients that are needed."""
    return [
        _empty_like(x) if needs[0] else x.new_empty(0),
        weight.new_empty(weight.shape if needs[1] else 0),
        x.new_empty(0) if bias is None else bias.new_empty(bias.shape if needs[2] else 0),
        x.new_empty((*x.shape[:2], weight.shape[1] - 1) if needs[3] else 0),
    ]


def _forward_fake(x, weight, *_):  # type: ignore[no-untyped-def]
    return tuple(empty_outputs(x, weight))


def _backward_fake(_dy, _dfinal, x, weight, bias, *rest):  # type: ignore[no-untyped-def]
    return tuple(empty_gradients(x, weight, bias, rest[-1]))


def _autograd(*args):  # type: ignore[no-untyped-def]
    if needs_graph(*args[:4]):
        return _Function.apply(False, *args)
    with below_autograd():
        return torch.ops.fastseq.causal_conv1d(*args)


implement("causal_conv1d", _forward, _backward, _autograd, _forward_fake, _backward_fake)


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx, plain, *args):  # type: ignore[no-untyped-def]
        with below_autograd():
            y, final = (_forward if plain else torch.ops.fastseq.causal_conv1d)(*args)
        ctx.plain, ctx.silu = plain, args[4]
        ctx.save_for_backward(*args[:4])
        ctx.set_materialize_grads(False)
        return y, final

    @staticmethod
    def backward(ctx, dy, dfinal):  # type: ignore[no-untyped-def]
        tensors = ctx.saved_tensors
        needs = list(ctx.needs_input_grad[1:5])
        if dy is None:
            if dfinal is None:
                return (None,) * 6
            dy = torch.zeros_like(tensors[0])
        given = (dy,) if dfinal is None else (dy, dfinal)
        # Only the reference has a graph to give, and takes batched gradients.
        if torch.is_grad_enabled() or is_transformed(*given):
            found = grads_through(reference.forward, tensors, (ctx.silu,), needs, given)
        else:
            plain = ctx.plain and is_plain(*given, *tensors)
            compute = _backward if plain else torch.ops.fastseq.causal_conv1d_backward
            ours = compute(dy, dfinal, *tensors, ctx.silu, needs)
            found = [g if need else None for g, need in zip(ours, needs, strict=True)]
        return None, *found, None


def causal_conv1d_op(arguments: Arguments) -> Outputs:
    """The op, for arguments that have been checked."""
    tensors = arguments[:4]
    if is_plain(*tensors):
        if needs_graph(*tensors):
            return Outputs(*_Function.apply(True, *arguments))
        return Outputs(*_forward(*arguments))
    if is_transformed():
        given: Any = arguments
        return Outputs(*reference.forward(*given))
    return Outputs(*torch.ops.fastseq.causal_conv1d(*arguments))


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    state: Tensor | None = None,
    *,
    activation: str | None = None,
) -> tuple[Tensor, Tensor]:
    """A convolution in time of each channel by itself that sees nothing of later times, bias and SiLU in one pass.

    y[b, c, t] = act(bias[c] + sum_k weight[c, k] x[b, c, t - (K - 1) + k]), as `torch.nn.functional.conv1d` with
    groups=C gives it for x padded with K - 1 zeros on the left; in Mamba and Hyena it stands before the mixing of
    times. Calls that hand the state on, one after the other, give what one call gives for their inputs in a row.

    Args:
        x: [B, C, T], float32, float64, bfloat16 or float16, any strides; without copies where either times or
            channels follow each other in memory, as in a contiguous tensor and in [B, T, C].transpose(1, 2).
        weight: [C, K] of x's dtype or, beside half precision, float32.
        bias: [C], likewise.
        state: [B, C, K - 1] of x's dtype, the inputs before x[..., 0]; zeros if None.
        activation: None or "silu".

    Returns:
        y [B, C, T], in memory as x is, and the new state [B, C, K - 1], the last K - 1 inputs; T may be smaller.
        Gradients flow through both. Half precision is computed in float32 and rounded once, at the end. Under autocast
        x and state are cast, as `conv1d` casts them; weights of float32 are read as they are.

    Raises:
        TypeError, ValueError: with the argument's name.
    """
    check_tensor("x", x)
    for name, t in (("weight", weight), ("bias", bias), ("state", state)):
        if t is not None or name == "weight":
            check_tensor(name, t, x)
    if x.dim() != 3:
        raise ValueError(f"x must be [B, C, T], got {list(x.shape)}")
    B, C, _ = x.shape
    if weight.dim() != 2 or weight.shape[0] != C or weight.shape[1] == 0:
        raise ValueError(
            f"weight must be [{C}, K], a filter of at least one element a channel, got {list(weight.shape)}"
        )
    K = weight.shape[1]
    if bias is not None and bias.shape != (C,):
        raise ValueError(f"bias must be [{C}], one number a channel, got {list(bias.shape)}")
    if state is not None and state.shape != (B, C, K - 1):
        raise ValueError(f"state must be [{B}, {C}, {K - 1}], the K - 1 inputs before x, got {list(state.shape)}")
    if not (activation is None or isinstance(activation, str)):
        raise TypeError(f"activation must be a str or None, got {type(activation).__name__}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be None or 'silu', got {activation!r}")
    lowered = autocast_dtype(x)
    if lowered is not None:
        x, state = x.to(lowered), None if state is None else state.to(lowered)
        weight = weight.to(lowered) if weight.dtype in HALF else weight
        bias = bias.to(lowered) if bias is not None and bias.dtype in HALF else bias
    if state is not None and state.dtype != x.dtype:
        raise ValueError(f"state must be of x's dtype, {x.dtype}, got {state.dtype}")
    for name, t in (("weight", weight), ("bias", bias)):
        if t is not None and t.dtype != x.dtype and not (x.dtype in HALF and t.dtype == torch.float32):
            also = " or float32" if x.dtype in HALF else ""
            raise ValueError(f"{name} must be of x's dtype, {x.dtype}{also}, got {t.dtype}")
    y, final = causal_conv1d_op(Arguments(x, weight, bias, state, ACTIVATIONS[activation]))
    return y, final


def needs_all(arguments: Arguments) -> list[bool]:
    """Every gradient that there can be."""
    return [True, True, arguments.bias is not None, arguments.state is not None]


def grads_like(outputs: Outputs) -> list[Tensor]:
    """Some gradients of the outputs."""
    return [
        torch.arange(t.numel(), dtype=torch.float64).mul(0.7).sin().to(t.device, t.dtype).view(t.shape) for t in outputs
    ]
