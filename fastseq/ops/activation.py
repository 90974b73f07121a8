"""The op `fastseq::activation`: bias, activation, gate and dropout in one pass. Formulas are in
`fastseq.reference.activation`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastseq.ops.contract import (
    LIBRARY,
    below_autograd,
    check_dropout,
    check_tensor,
    grads_through,
    has_hooks,
    implement,
    is_plain,
    is_small,
    is_transformed,
    needs_graph,
    new_seed,
    rounding,
    widened,
)
from fastseq.reference import activation as reference
from fastseq.reference.activation import GELU, GELU_TANH, IDENTITY, RELU, SILU
from fastseq.registry import FLOATS, HALF, Impl, Kernel, Op, register

# What the op's `kind` is called.
KINDS = {"identity": IDENTITY, "relu": RELU, "gelu": GELU, "gelu_tanh": GELU_TANH, "silu": SILU}

# Fewer elements, without dropout, are torch's functions': their calls start sooner, and what one leaves for the next to
# read is still in the cache. Measured on Zen 5 with two threads.
LEAST_ELEMENTS = 2**20


class Arguments(NamedTuple):
    """What the op takes.

    Attributes:
        x: [rows, F], any strides, any floating dtype.
        up: [rows, F] of x's dtype, what the activation is multiplied by, or None.
        bias: [F] of x's dtype or, beside half precision, float32; or None.
        seed: int64 of one element on the CPU, what dropout draws from; there if dropout_p > 0.
        kind: which activation, one of `KINDS`.
        dropout_p: the probability of an element to be dropped.
    """

    x: Tensor
    up: Tensor | None = None
    bias: Tensor | None = None
    seed: Tensor | None = None
    kind: int = IDENTITY
    dropout_p: float = 0.0


@dataclass(frozen=True)
class Case:
    """A shape and the options that every implementation is tested on."""

    rows: int
    F: int
    kind: str = "gelu"
    gated: bool = False
    bias: str = ""  # "same" dtype as x, or "single" precision beside half
    dropout: float = 0.0
    halves: bool = False  # x and up are columns of one tensor

    def __str__(self) -> str:
        options = [self.kind, "gated" * self.gated, self.bias and f"{self.bias}_bias", "halves" * self.halves]
        return "-".join([f"rows{self.rows}_F{self.F}", *filter(None, options), f"dropout_{self.dropout}"])

    def arguments(self, device: str, dtype: torch.dtype, seed: int = 0) -> Arguments:
        """Random arguments."""
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64).mul(2).to(device, dtype)

        both = normal(self.rows, 2 * self.F)
        x, up = both.chunk(2, -1) if self.halves else (normal(self.rows, self.F), normal(self.rows, self.F))
        wide = torch.float32 if dtype in HALF and self.bias == "single" else dtype
        return Arguments(
            x,
            up if self.gated else None,
            normal(self.F, dtype=wide) if self.bias else None,
            torch.tensor(0x123456789ABCDEF) if self.dropout else None,
            KINDS[self.kind],
            self.dropout,
        )


# Small ones for the self-check of a new machine first; then what exercises tiles, tails, blocks and layouts.
SELF_CHECK_CASES = [
    *(Case(5, 37, kind, gated, "same") for kind in KINDS for gated in (False, True)),
    Case(40, 300, "silu", True, "single", 0.2, halves=True),
    Case(1, 1, "relu"),
]
CASES = [
    *SELF_CHECK_CASES,
    Case(3, 4100, "gelu"),
    Case(150, 4100, "gelu_tanh", True, "same", 0.1),
    Case(1, 40000, "silu", dropout=0.5),
    Case(2500, 17, "gelu", False, "single"),
    Case(700, 130, "relu", True, "same", 0.3),
    Case(64, 2048, "gelu", True, "single", halves=True),
    Case(33, 127, "identity", False, "same", 0.4),
    Case(5, 130, "gelu", True, "same", 1.0),
    Case(70, 1, "gelu", True, "same"),
    Case(0, 5, "gelu", True, "same", 0.5),
    Case(5, 0, "gelu", True, "same", 0.5),
]


def _self_check(kernel: Kernel, device: str, dtype: torch.dtype) -> None:
    """Outputs and gradients of the small cases against the reference in float64."""
    for case in SELF_CHECK_CASES:
        arguments = case.arguments(device, dtype)
        wide = widened(arguments)
        y, want = kernel.forward(*arguments), reference.forward(*wide)
        if not isinstance(y, Tensor):
            raise AssertionError(f"one tensor was expected, got {type(y).__name__}")
        torch.testing.assert_close(y, want.to(dtype), **rounding(want, dtype, 2))
        dy, needs = grad_like(y), needs_all(arguments)
        ours = kernel.backward(dy, *arguments, needs)
        theirs = reference.backward(dy.double(), *wide, needs)
        for got, want in zip(ours, theirs, strict=True):
            # The bias's gradient is a sum in another order.
            tolerance = dict(rtol=1e-5, atol=2e-5) if got.dtype == torch.float32 else {}
            torch.testing.assert_close(got, want.to(got.dtype), **(rounding(want, got.dtype, 2) or tolerance))


TABLE = register(
    Op(
        "activation",
        [
            Impl(
                "cpp",
                "fastseq_native::activation",
                devices=frozenset({"cpu"}),
                dtypes=FLOATS | HALF,
                verified=frozenset({"avx2", "avx512", "portable"}),
            ),
            Impl(
                "triton",
                "fastseq.kernels.triton.activation",
                devices=frozenset({"cuda"}),
                dtypes=HALF | {torch.float32},
            ),
            Impl("reference", reference.__name__),
        ],
        _self_check,
    )
)

_ARGUMENTS = "Tensor x, Tensor? up, Tensor? bias, Tensor? seed, int kind, float dropout_p"
LIBRARY.define(f"activation({_ARGUMENTS}) -> Tensor")
LIBRARY.define(f"activation_backward(Tensor dy, {_ARGUMENTS}, bool[] needs) -> (Tensor dx, Tensor dup, Tensor dbias)")

# The bodies of the ops have no annotations: torch.library would read schemas from them.


def _forward(*args):  # type: ignore[no-untyped-def]
    return TABLE.select(args[0].device.type, args[0].dtype, *args).forward(*args)


def _backward(*args):  # type: ignore[no-untyped-def]
    return TABLE.select(args[1].device.type, args[1].dtype, *args[1:]).backward(*args)


def _forward_fake(x, *_):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape)


def _backward_fake(_dy, x, _up, bias, *rest):  # type: ignore[no-untyped-def]
    needs = rest[-1]
    dx, dup = (x.new_empty(x.shape if need else 0) for need in needs[:2])
    return dx, dup, bias.new_empty(bias.shape) if needs[2] else x.new_empty(0)


def _autograd(*args):  # type: ignore[no-untyped-def]
    if needs_graph(*args[:3]):
        return _Function.apply(False, *args)
    with below_autograd():
        return torch.ops.fastseq.activation(*args)


implement("activation", _forward, _backward, _autograd, _forward_fake, _backward_fake)


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx, plain, *args):  # type: ignore[no-untyped-def]
        with below_autograd():
            y = (_forward if plain else torch.ops.fastseq.activation)(*args)
        ctx.plain, ctx.options = plain, args[4:]
        ctx.save_for_backward(*args[:4])
        return y

    @staticmethod
    def backward(ctx, dy):  # type: ignore[no-untyped-def]
        *tensors, seed = ctx.saved_tensors
        needs = list(ctx.needs_input_grad[1:4])
        # Only the reference has a graph to give, and takes batched gradients.
        if torch.is_grad_enabled() or is_transformed(dy):
            found = grads_through(reference.forward, tensors, (seed, *ctx.options), needs, [dy])
        else:
            plain = ctx.plain and is_plain(dy, *tensors)
            compute = _backward if plain else torch.ops.fastseq.activation_backward
            ours = compute(dy, *tensors, seed, *ctx.options, needs)
            found = [g if need else None for g, need in zip(ours, needs, strict=True)]
        return None, *found, None, None, None


def activation(arguments: Arguments) -> Tensor:
    """The op, for arguments that have been checked."""
    tensors = arguments[:3]
    if is_plain(*tensors):
        return _Function.apply(True, *arguments) if needs_graph(*tensors) else _forward(*arguments)
    if is_transformed():
        given: Any = arguments
        return reference.forward(*given)
    return torch.ops.fastseq.activation(*arguments)


_apply = activation  # whose name bias_activation has for an argument

_FUNCTIONS: list[tuple[Callable, str]] = [
    (F.relu, "relu"),
    (torch.relu, "relu"),
    (F.gelu, "gelu"),
    (F.silu, "silu"),
]
_TORCHS = {kind: function for function, kind in _FUNCTIONS} | {"gelu_tanh": partial(F.gelu, approximate="tanh")}
_MODULES = {nn.Identity: "identity", nn.ReLU: "relu", nn.SiLU: "silu"}


def kind_of(activation: Callable) -> str | None:
    """What `bias_activation` calls a function or module of torch's: one of `KINDS`, or None for any other.

    A module must be of the very type, since a subclass may do anything, and have no hooks, nor a forward of its own,
    which would not run.
    """
    for function, kind in _FUNCTIONS:
        if activation is function:
            return kind
    if isinstance(activation, nn.Module) and has_hooks(activation):
        return None
    if type(activation) is nn.GELU:
        return {"none": "gelu", "tanh": "gelu_tanh"}.get(activation.approximate)
    return _MODULES.get(type(activation))


def bias_activation(
    x: Tensor,
    bias: Tensor | None = None,
    *,
    up: Tensor | None = None,
    activation: str = "gelu",
    dropout_p: float = 0.0,
    training: bool = True,
) -> Tensor:
    """dropout(act(x + bias) * up) in one pass over memory, forward and backward.

    With `up` it is a gated unit: SwiGLU with "silu", GEGLU with "gelu", ReGLU with "relu" (Shazeer 2020,
    arXiv:2002.05202). `x, up = both.chunk(2, -1)` are read where they are. Under autocast the result has x's dtype.
    Few elements without dropout are torch's functions', which are ahead there.

    Args:
        x: [..., F], float32, float64, bfloat16 or float16, any strides; without copies where each row of F elements is
            contiguous and rows are equally far apart.
        bias: [F] of x's dtype or, beside half precision, float32.
        up: of x's shape and dtype.
        activation: "relu", "gelu" (that of `torch.nn.functional.gelu`), "gelu_tanh" (with approximate="tanh"), "silu"
            or "identity".
        dropout_p: the probability of an element to be dropped, to the next 1/65536. What is dropped follows torch's
            default generator of the CPU, with other draws than torch's.
        training: whether to drop elements at all.

    Returns:
        [..., F], contiguous, of x's dtype. Half precision is rounded once, at the end.

    Raises:
        ValueError, TypeError: with the argument's name.
    """
    check_tensor("x", x)
    if x.dim() == 0:
        raise ValueError("x must be [..., F], got a tensor of no dimension")
    width = x.shape[-1]
    if bias is not None:
        check_tensor("bias", bias, x)
        single = x.dtype in HALF and bias.dtype == torch.float32
        if bias.dim() != 1 or bias.shape[0] != width or not (bias.dtype == x.dtype or single):
            expected = f"{x.dtype} [{width}]" + (" or float32" if x.dtype in HALF else "")
            raise ValueError(f"bias must be {expected}, as x is, got {bias.dtype} {list(bias.shape)}")
    if up is not None:
        check_tensor("up", up, x)
        if up.shape != x.shape or up.dtype != x.dtype:
            expected, got = (f"{t.dtype} {list(t.shape)}" for t in (x, up))
            raise ValueError(f"up must be {expected}, as x is, got {got}")
    if not isinstance(activation, str):
        raise TypeError(f"activation must be a str, got {type(activation).__name__}")
    if activation not in KINDS:
        raise ValueError(f"activation must be one of {', '.join(KINDS)}, got {activation!r}")
    check_dropout(dropout_p, training)
    p = float(dropout_p) if training else 0.0
    if p == 0 and activation in _TORCHS and is_small(TABLE.name, x.numel(), LEAST_ELEMENTS, x):
        y = _TORCHS[activation](x if bias is None else x + bias)
        return (y if up is None else y * up).contiguous()
    arguments = Arguments(_rows(x), None if up is None else _rows(up), bias, new_seed(p), KINDS[activation], p)
    return _apply(arguments).reshape(x.shape)


def _rows(t: Tensor) -> Tensor:
    """[..., F] as [rows, F]; of no elements, too, of which reshape cannot tell how many rows there are."""
    return t if t.dim() == 2 else t.flatten(0, -2) if t.dim() > 1 else t.unsqueeze(0)


def needs_all(arguments: Arguments) -> list[bool]:
    """Every gradient that there can be."""
    return [True, arguments.up is not None, arguments.bias is not None]


def grad_like(y: Tensor) -> Tensor:
    """Some gradient of y."""
    return torch.arange(y.numel(), dtype=torch.float64).mul(0.7).sin().to(y.device, y.dtype).view(y.shape)
