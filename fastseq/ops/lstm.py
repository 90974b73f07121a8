"""The op `fastseq::lstm`: one LSTM layer in one or both directions, from its raw input.

The contract (schema, shapes, autograd), the table of implementations and the cases that each of them is tested on.
Formulas are in `fastseq.reference.lstm`.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from fastseq.ops.contract import LIBRARY, below_autograd, grads_or_none, is_plain, is_transformed, needs_graph
from fastseq.reference import lstm as reference
from fastseq.registry import FLOATS, Impl, Kernel, Op, register


@dataclass(frozen=True)
class Case:
    """A shape that every implementation is tested on."""

    T: int
    B: int
    I: int
    H: int
    bidirectional: bool = False
    bias: bool = True
    state: bool = True
    batch_first: bool = False

    def __str__(self) -> str:
        flags = [name for name in ("bidirectional", "batch_first") if getattr(self, name)]
        flags += [f"no_{name}" for name in ("bias", "state") if not getattr(self, name)]
        return "-".join([f"T{self.T}_B{self.B}_I{self.I}_H{self.H}", *flags])

    def inputs(
        self, device: str, dtype: torch.dtype, seed: int = 0
    ) -> tuple[Tensor, Tensor | None, Tensor | None, list[Tensor]]:
        """Random x, h0, c0 and weights, in torch's own scale (uniform in +-1/sqrt(H))."""
        generator = torch.Generator().manual_seed(seed)
        D = 2 if self.bidirectional else 1

        def uniform(*shape: int, scale: float = 1.0) -> Tensor:
            values = torch.rand(shape, generator=generator, dtype=torch.float64) * 2 - 1
            return (values * scale).to(device, dtype)

        x = uniform(self.B, self.T, self.I).transpose(0, 1) if self.batch_first else uniform(self.T, self.B, self.I)
        h0, c0 = (uniform(D, self.B, self.H), uniform(D, self.B, self.H)) if self.state else (None, None)
        scale = self.H**-0.5
        weights = []
        for _ in range(D):
            weights += [uniform(4 * self.H, self.I, scale=scale), uniform(4 * self.H, self.H, scale=scale)]
            if self.bias:
                weights += [uniform(4 * self.H, scale=scale), uniform(4 * self.H, scale=scale)]
        return x, h0, c0, weights


# Small ones for the self-check of a new machine first; then what exercises tiles, tails, splits and layouts.
SELF_CHECK_CASES = [
    Case(1, 1, 3, 5),
    Case(7, 1, 17, 19, bidirectional=True),
    Case(5, 3, 20, 33, state=False),
    Case(6, 9, 33, 16, bidirectional=True, bias=False),
    Case(3, 21, 40, 70),
]
CASES = [
    *SELF_CHECK_CASES,
    Case(1, 1, 128, 128),
    Case(2, 1, 64, 200, state=False),
    Case(63, 1, 65, 65),
    Case(63, 3, 65, 65, bidirectional=True),
    Case(17, 2, 1, 1),
    Case(40, 1, 300, 136),
    Case(12, 4, 24, 48, batch_first=True),
    Case(5, 64, 65, 65, batch_first=True, bidirectional=True),
    Case(33, 8, 130, 96),
    Case(9, 37, 520, 24),
    Case(4, 0, 5, 6),
]


def lstm(
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: list[Tensor],
    bidirectional: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """One layer of `torch.nn.LSTM`, in one direction (D=1) or both (D=2).

    Args:
        x: [T, B, I], any strides.
        h0: [D, B, H] initial hidden state, or None for zeros.
        c0: [D, B, H] initial cell state, or None for zeros.
        weights: for each direction w_ih [4H, I], w_hh [4H, H] and, if there are biases, b_ih [4H] and b_hh [4H], with
            gates in torch's order i, f, g, o. All tensors share x's dtype and device.
        bidirectional: whether there are two directions.

    Returns:
        y [T, B, D*H], h_n [D, B, H] and c_n [D, B, H].

    Raises:
        ValueError: a shape or a dtype is not as above; the message names the argument.
    """
    _check(x, h0, c0, weights, bidirectional)
    return call(x, h0, c0, weights, bidirectional)


def call(
    x: Tensor, h0: Tensor | None, c0: Tensor | None, weights: list[Tensor], bidirectional: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """`lstm` for arguments that have been checked."""
    if is_transformed():
        return reference.forward(x, h0, c0, weights, bidirectional, False)[:3]
    if is_plain(x):
        if needs_graph(x, h0, c0, *weights):
            return _Lstm.apply(x, h0, c0, bidirectional, *weights)[:3]  # type: ignore[no-any-return]
        return _forward(x, h0, c0, weights, bidirectional, False)[:3]
    return torch.ops.fastseq.lstm(x, h0, c0, weights, bidirectional, False)[:3]


def _check(x: Tensor, h0: Tensor | None, c0: Tensor | None, weights: list[Tensor], bidirectional: bool) -> None:
    D = 2 if bidirectional else 1
    if x.dim() != 3:
        raise ValueError(f"lstm: x must be [T, B, I], got {x.dim()} dimensions")
    T, B, I = x.shape
    if T == 0:
        raise ValueError("lstm: x must have at least one step, got T=0")
    if len(weights) not in (2 * D, 4 * D):
        raise ValueError(f"lstm: weights must hold {2 * D} tensors or {4 * D} with biases, got {len(weights)}")
    H = weights[1].shape[-1]
    gates = 4 * H
    count = len(weights) // D
    expected = ((gates, I), (gates, H), (gates,), (gates,))
    for k, weight in enumerate(weights):
        if weight.shape != expected[k % count]:
            raise ValueError(f"lstm: weights[{k}] must be {list(expected[k % count])}, got {list(weight.shape)}")
        if weight.dtype != x.dtype or weight.device != x.device:
            raise ValueError(
                f"lstm: weights[{k}] must be {x.dtype} on {x.device} like x, got {weight.dtype} on {weight.device}"
            )
    for name, state in (("h0", h0), ("c0", c0)):
        if state is None:
            continue
        if state.shape != (D, B, H):
            raise ValueError(f"lstm: {name} must be {[D, B, H]}, got {list(state.shape)}")
        if state.dtype != x.dtype or state.device != x.device:
            raise ValueError(
                f"lstm: {name} must be {x.dtype} on {x.device} like x, got {state.dtype} on {state.device}"
            )


def _self_check(kernel: Kernel, device: str, dtype: torch.dtype) -> None:
    """Outputs, tape and gradients of the small cases against the reference in float64."""
    wide = torch.float64
    for case in SELF_CHECK_CASES:
        x, h0, c0, weights = case.inputs(device, dtype)
        args = (x, h0, c0, weights, case.bidirectional)
        wide_x, wide_h0, wide_c0 = (None if t is None else t.to(wide) for t in (x, h0, c0))
        wide_args = (wide_x, wide_h0, wide_c0, [w.to(wide) for w in weights], case.bidirectional)

        outputs, expected = kernel.forward(*args, True), reference.forward(*wide_args, True)  # type: ignore[arg-type]
        for got, want in zip(outputs, expected, strict=True):
            torch.testing.assert_close(got, want.to(dtype))

        wide_grads = [torch.linspace(-1, 1, t.numel(), dtype=wide, device=device).view(t.shape) for t in expected[:3]]
        grads = [g.to(dtype) for g in wide_grads]
        needs = [True] * (3 + len(weights))
        *ours, our_weights = kernel.backward(*grads, *args, outputs[0], *outputs[3:], needs)
        *theirs, their_weights = reference.backward(*wide_grads, *wide_args, expected[0], *expected[3:], needs)  # type: ignore[arg-type, call-arg]
        for got, want in zip([*ours, *our_weights], [*theirs, *their_weights], strict=True):
            # A gradient sums T*B terms, which the kernels add in another order than the reference.
            torch.testing.assert_close(got.to(wide), want, rtol=1e-4, atol=1e-4 if dtype == torch.float32 else 1e-7)


LSTM = register(
    Op(
        "lstm",
        [
            Impl(
                "cpp",
                "fastseq_native::lstm",
                devices=frozenset({"cpu"}),
                dtypes=FLOATS,
                verified=frozenset({"avx2", "portable"}),
            ),
            Impl("reference", "fastseq.reference.lstm"),
        ],
        _self_check,
    )
)

LIBRARY.define(
    "lstm(Tensor x, Tensor? h0, Tensor? c0, Tensor[] weights, bool bidirectional, bool save_tape)"
    " -> (Tensor y, Tensor h_n, Tensor c_n, Tensor gates, Tensor cells)"
)
LIBRARY.define(
    "lstm_backward(Tensor dy, Tensor dh_n, Tensor dc_n, Tensor x, Tensor? h0, Tensor? c0, Tensor[] weights,"
    " bool bidirectional, Tensor y, Tensor gates, Tensor cells, bool[] needs)"
    " -> (Tensor dx, Tensor dh0, Tensor dc0, Tensor[] dweights)"
)


def _forward(x, h0, c0, weights, bidirectional, save_tape):  # type: ignore[no-untyped-def]
    args = (x, h0, c0, weights, bidirectional, save_tape)
    return LSTM.select(x.device.type, x.dtype, *args).forward(*args)


def _backward(dy, dh_n, dc_n, x, h0, c0, weights, bidirectional, y, gates, cells, needs):  # type: ignore[no-untyped-def]
    kernel = LSTM.select(x.device.type, x.dtype, x, h0, c0, weights, bidirectional, True)
    dx, dh0, dc0, dweights = kernel.backward(dy, dh_n, dc_n, x, h0, c0, weights, bidirectional, y, gates, cells, needs)
    return dx, dh0, dc0, dweights


def _forward_fake(x, h0, c0, weights, bidirectional, save_tape):  # type: ignore[no-untyped-def]
    T, B, _ = x.shape
    D, H = 2 if bidirectional else 1, weights[1].shape[1]
    tape = ((D, T, B, 4 * H), (D, T, B, H)) if save_tape else ((0,), (0,))
    shapes = ((T, B, D * H), (D, B, H), (D, B, H), *tape)
    return tuple(x.new_empty(shape) for shape in shapes)


def _backward_fake(dy, dh_n, dc_n, x, h0, c0, weights, bidirectional, y, gates, cells, needs):  # type: ignore[no-untyped-def]
    shapes = [x.shape, dh_n.shape, dc_n.shape, *(w.shape for w in weights)]
    needed = [needs[0], needs[1] or needs[2], needs[1] or needs[2], *needs[3:]]
    grads = [x.new_empty(shape if need else (0,)) for shape, need in zip(shapes, needed, strict=True)]
    return (*grads[:3], grads[3:])


class _Lstm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, h0, c0, bidirectional, *weights):  # type: ignore[no-untyped-def]
        compute = _forward if is_plain(x) else torch.ops.fastseq.lstm
        with below_autograd():
            y, h_n, c_n, gates, cells = compute(x, h0, c0, weights, bidirectional, True)
        ctx.bidirectional = bidirectional
        ctx.save_for_backward(x, h0, c0, y, gates, cells, *weights)
        ctx.mark_non_differentiable(gates, cells)
        return y, h_n, c_n, gates, cells

    @staticmethod
    def backward(ctx, dy, dh_n, dc_n, *_):  # type: ignore[no-untyped-def]
        x, h0, c0, y, gates, cells, *weights = ctx.saved_tensors
        needs = [*ctx.needs_input_grad[:3], *ctx.needs_input_grad[4:]]
        # Only the reference has a graph to give, or takes batched gradients.
        if torch.is_grad_enabled() or is_transformed(dy, dh_n, dc_n):
            with torch.enable_grad():
                outputs = reference.forward(x, h0, c0, weights, ctx.bidirectional, False)[:3]
                grads = grads_or_none(outputs, [x, h0, c0, *weights], needs, (dy, dh_n, dc_n))
        else:
            compute = _backward if is_plain(dy) else torch.ops.fastseq.lstm_backward
            dx, dh0, dc0, dweights = compute(
                dy, dh_n, dc_n, x, h0, c0, weights, ctx.bidirectional, y, gates, cells, needs
            )
            grads = [g if need else None for g, need in zip([dx, dh0, dc0, *dweights], needs, strict=True)]
        return *grads[:3], None, *grads[3:]


def _autograd(x, h0, c0, weights, bidirectional, save_tape):  # type: ignore[no-untyped-def]
    if needs_graph(x, h0, c0, *weights):
        return _Lstm.apply(x, h0, c0, bidirectional, *weights)
    with below_autograd():
        return torch.ops.fastseq.lstm(x, h0, c0, weights, bidirectional, save_tape)


LIBRARY.impl("lstm", _forward, "CompositeExplicitAutograd")
LIBRARY.impl("lstm_backward", _backward, "CompositeExplicitAutograd")
LIBRARY.impl("lstm", _autograd, "Autograd")
torch.library.register_fake("fastseq::lstm", _forward_fake, lib=LIBRARY)
torch.library.register_fake("fastseq::lstm_backward", _backward_fake, lib=LIBRARY)
