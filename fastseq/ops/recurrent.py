"""What the ops of all recurrent cells share: the contract (schema, shapes, autograd) and the cases each is tested on.

`fastseq::lstm`, `gru`, `rnn_tanh` and `rnn_relu` have one signature: one layer in one or both directions, from its raw
input. Formulas are in `fastseq.reference`.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, fields
from functools import partial
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastseq.jit import CompileError
from fastseq.ops import recurrent_cuda
from fastseq.ops.contract import (
    LIBRARY,
    below_autograd,
    grads_through,
    implement,
    is_plain,
    is_transformed,
    needs_graph,
    rounding,
    widened,
)
from fastseq.ops.recurrent_steps import CELLS, allows_tf32
from fastseq.registry import FLOATS, HALF, Impl, Kernel, Op, register, requested_backend, use_backend


class Arguments(NamedTuple):
    """What a recurrent op takes, beside what it shall save.

    Attributes:
        x: [T, B, I], any strides; or packed [N, I] with `batch_sizes`.
        h0: [D, B, P] initial hidden state, or None for zeros. P is H unless there is a projection.
        c0: [D, B, H] initial cell state, or None for zeros; None for cells without one.
        weights: for each direction w_ih [G*H, I], w_hh [G*H, P], if there are biases b_ih [G*H] and b_hh [G*H], and
            w_hr [P, H]
            if there is a projection (LSTM only). Gates are in torch's order: LSTM (G=4) i, f, g, o; GRU (G=3) r, z, n.
            They have x's dtype, any floating one; where no graph is recorded they may all be bfloat16 or float16 beside
            a float32 x.
        bidirectional: whether there are two directions, D.
        batch_sizes: [T] int64 on the CPU, as in `torch.nn.utils.rnn.PackedSequence`: how many rows run at each step.
        lengths: [B] int64 on the CPU, how many steps each row has; what is past them is not read, and y and cells are
            0 there.
        reset: [T, B] bool, where the state starts anew before that step.
        reset_h: [D, B, P] what it starts from, or None for zeros.
        reset_c: [D, B, H], likewise.
    """

    x: Tensor
    h0: Tensor | None
    c0: Tensor | None
    weights: Sequence[Tensor]
    bidirectional: bool = False
    batch_sizes: Tensor | None = None
    lengths: Tensor | None = None
    reset: Tensor | None = None
    reset_h: Tensor | None = None
    reset_c: Tensor | None = None

    def saving(self, tape: bool, cells: bool = False) -> tuple[Any, ...]:
        """The arguments of `forward`, whose flags say what is saved."""
        return *self[:5], tape, cells, *self[5:]


class Outputs(NamedTuple):
    """What a recurrent op gives; what there is not has no elements.

    Attributes:
        y: [T, B, D*P] or packed [N, D*P]; 0 past a row's length.
        h_n: [D, B, P] the state after each row's last step.
        c_n: [D, B, H]
        gates: [D, N, tape*H] the first part of the tape, with N = T*B unless packed.
        cells: [D, N, H] all c_t, the second part of the tape.
    """

    y: Tensor
    h_n: Tensor
    c_n: Tensor
    gates: Tensor
    cells: Tensor


@dataclass(frozen=True)
class Case:
    """A shape and the options that every implementation is tested on."""

    T: int
    B: int
    I: int
    H: int
    P: int = 0  # of a projection
    bidirectional: bool = False
    bias: bool = True
    state: bool = True
    batch_first: bool = False
    packed: bool = False
    lengths: bool = False
    reset: bool = False
    reset_state: bool = False

    def __str__(self) -> str:
        sizes = [f"{name}{size}" for name in "TBIHP" if (size := getattr(self, name)) or name == "B"]
        flags = [
            f.name if getattr(self, f.name) else f"no_{f.name}"
            for f in fields(self)
            if f.type is bool and getattr(self, f.name) != f.default
        ]
        return "-".join(["_".join(sizes), *flags])

    def arguments(self, op: "Recurrent", device: str, dtype: torch.dtype, seed: int = 0) -> Arguments:
        """Random arguments, in torch's own scale (uniform in +-1/sqrt(H))."""
        generator = torch.Generator().manual_seed(seed)
        T, B, I, H = self.T, self.B, self.I, self.H
        D, P, G = 2 if self.bidirectional else 1, self.P or self.H, op.gates * self.H

        def uniform(*shape: int, scale: float = 1.0) -> Tensor:
            values = torch.rand(shape, generator=generator, dtype=torch.float64) * 2 - 1
            return (values * scale).to(device, dtype)

        def states(wanted: bool) -> tuple[Tensor | None, Tensor | None]:
            return (uniform(D, B, P), uniform(D, B, H) if op.has_cell else None) if wanted else (None, None)

        weights = []
        for _ in range(D):
            shapes = [(G, I), (G, P)] + [(G,), (G,)] * self.bias + [(P, H)] * bool(self.P)
            weights += [uniform(*shape, scale=H**-0.5) for shape in shapes]
        lengths = torch.randint(1, T + 1, (B,), generator=generator)
        batch_sizes = (lengths > torch.arange(int(lengths.max())).unsqueeze(-1)).sum(-1) if B else None
        if self.packed:
            assert batch_sizes is not None
            x = uniform(int(batch_sizes.sum()), I)
        else:
            x = uniform(B, T, I).transpose(0, 1) if self.batch_first else uniform(T, B, I)
        return Arguments(
            x,
            *states(self.state),
            weights,
            self.bidirectional,
            batch_sizes if self.packed else None,
            lengths if self.lengths else None,
            (torch.rand(T, B, generator=generator) < 0.2).to(device) if self.reset else None,
            *states(self.reset_state),
        )


# Small ones for the self-check of a new machine first; then what exercises tiles, tails, splits and layouts.
SELF_CHECK_CASES = [
    Case(1, 1, 3, 5),
    Case(7, 1, 17, 19, bidirectional=True),
    Case(5, 3, 20, 33, state=False),
    Case(6, 9, 33, 16, bidirectional=True, bias=False),
    Case(3, 21, 40, 70),
    Case(9, 6, 7, 19, bidirectional=True, packed=True),
    Case(9, 6, 7, 19, bidirectional=True, lengths=True, reset=True, reset_state=True),
    Case(1, 18, 9, 35),
]
CASES = [
    *SELF_CHECK_CASES,
    Case(1, 1, 128, 128),
    Case(1, 70, 64, 40, state=False, bidirectional=True, batch_first=True),
    Case(1, 33, 20, 65, packed=True),
    Case(1, 34, 65, 33, reset=True, reset_state=True, bidirectional=True),
    Case(1, 130, 5, 33, lengths=True),
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
    Case(50, 40, 33, 40, packed=True),
    Case(40, 33, 20, 65, packed=True, bidirectional=True, state=False),
    Case(3, 2, 4, 5, packed=True),
    Case(45, 35, 33, 40, lengths=True, batch_first=True),
    Case(30, 19, 20, 65, lengths=True, bidirectional=True, state=False),
    Case(40, 1, 20, 65, reset=True),
    Case(40, 35, 33, 40, reset=True, reset_state=True, state=False),
    Case(33, 5, 20, 33, reset=True, reset_state=True, bidirectional=True),
]
PROJECTION_CASES = [
    Case(1, 1, 5, 7, P=3),
    Case(63, 1, 65, 65, P=17),
    Case(12, 4, 24, 48, P=16, bidirectional=True, bias=False, state=False),
    Case(9, 37, 33, 40, P=24),
    Case(20, 21, 33, 40, P=24, packed=True, bidirectional=True),
    Case(20, 5, 33, 40, P=33, lengths=True, reset=True, reset_state=True),
]

# Multiply-adds below which a few steps are torch's where there are numba's kernels only.
_LEAST_WORK = 1_200_000


class Recurrent:
    """One of the ops: its schemas, its autograd and its table of implementations.

    Args:
        name: as in `fastseq::name`.
        gates: G, the gates in w_ih and w_hh.
        tape: how many vectors of H `gates` holds of each step.
        has_cell: whether there is a cell state c beside h.
        reference: the module with the formulas.
    """

    def __init__(self, name: str, gates: int, tape: int, has_cell: bool, reference: ModuleType) -> None:
        self.name, self.gates, self.tape, self.has_cell, self.reference = name, gates, tape, has_cell, reference
        self.table = register(
            Op(
                name,
                [
                    Impl(
                        "cpp",
                        f"fastseq_native::{name}",
                        devices=frozenset({"cpu"}),
                        dtypes=FLOATS,
                        verified=frozenset({"avx2", "avx512", "portable"}),
                    ),
                    Impl(
                        "numba",
                        f"fastseq.kernels.numba.{name}",
                        devices=frozenset({"cpu"}),
                        dtypes=FLOATS,
                        yields=self._why_torch_before_numba,
                        verified=frozenset({"avx2", "avx512", "portable"}),
                    ),
                    Impl(
                        "cuda",
                        f"fastseq.ops.recurrent_cuda:{name}",
                        devices=frozenset({"cuda"}),
                        dtypes=HALF | {torch.float32},
                        needs=partial(recurrent_cuda.why_not, CELLS[name]),
                        calls="fastseq_native::recurrent_steps",
                        only_by_name='not yet measured against Triton on a GPU; use_backend("cuda") asks for it',
                    ),
                    Impl(
                        "triton",
                        f"fastseq.kernels.triton.{name}",
                        devices=frozenset({"cuda"}),
                        dtypes=HALF | {torch.float32},
                    ),
                    Impl("reference", reference.__name__),
                ],
                self._self_check,
            )
        )
        LIBRARY.define(
            f"{name}(Tensor x, Tensor? h0, Tensor? c0, Tensor[] weights, bool bidirectional, bool save_tape,"
            " bool save_cells, Tensor? batch_sizes, Tensor? lengths, Tensor? reset, Tensor? reset_h, Tensor? reset_c)"
            " -> (Tensor y, Tensor h_n, Tensor c_n, Tensor gates, Tensor cells)"
        )
        LIBRARY.define(
            f"{name}_backward(Tensor? dy, Tensor? dh_n, Tensor? dc_n, Tensor? dcells, Tensor x, Tensor? h0, Tensor? c0,"
            " Tensor[] weights, bool bidirectional, Tensor? batch_sizes, Tensor? lengths, Tensor? reset,"
            " Tensor? reset_h, Tensor? reset_c, Tensor y, Tensor gates, Tensor cells, bool[] needs)"
            " -> (Tensor dx, Tensor dh0, Tensor dc0, Tensor dreset_h, Tensor dreset_c, Tensor[] dweights)"
        )
        implement(name, self._forward, self._backward, self._autograd, self._forward_fake, self._backward_fake)
        self._op = getattr(torch.ops.fastseq, name)
        self._backward_op = getattr(torch.ops.fastseq, f"{name}_backward")

    def __call__(self, arguments: Arguments, save_cells: bool = False) -> Outputs:
        """The layer, for arguments that have been checked; `cells` among the outputs if they are asked for."""
        x, h0, c0, weights, _, _, _, _, reset_h, reset_c = arguments
        if is_plain(x, h0, c0, reset_h, reset_c, *weights):
            if needs_graph(x, h0, c0, reset_h, reset_c, *weights):
                return Outputs(*_Function.apply(self, True, *arguments[:3], *arguments[4:], *weights))
            return Outputs(*self._forward(*arguments.saving(False, save_cells)))
        if is_transformed():
            return Outputs(*self.reference.forward(*arguments.saving(False, save_cells)))
        return Outputs(*self._op(*arguments.saving(False, save_cells)))

    def at_once(self, arguments: Arguments, save_cells: bool = False) -> tuple[Tensor, ...] | None:
        """The `Outputs` of unchecked arguments, if the call is as plain as most.

        None for any other call (autocast, a mode, ...) and for one that is refused: the way round knows what to do or
        to say. At one step a call, that way would take longer than the kernel.
        """
        x, h0, c0, weights, _, _, lengths, reset, reset_h, reset_c = arguments
        if (
            not is_plain(x, h0, c0, lengths, reset, reset_h, reset_c, *weights)
            or torch._C._is_any_autocast_enabled()
            or x.dtype not in FLOATS
            or any(w is None for w in weights)
            or weights[0].dtype != x.dtype
        ):
            return None
        impl = self.table.preferred(x.device.type, x.dtype)
        if impl is self.table.reference or x.device.type != "cpu" or (impl.needs and impl.needs(*arguments)):
            return None
        outputs: tuple[Tensor, ...]
        try:
            if needs_graph(x, h0, c0, reset_h, reset_c, *weights):
                outputs = _Function.apply(self, True, *arguments[:3], *arguments[4:], *weights)
            else:
                outputs = impl.kernel.forward(*arguments.saving(False, save_cells))
        except (RuntimeError, ValueError, CompileError):  # others are not a refusal: hooks of the caller's raise, too
            return None
        return outputs

    def _why_torch_before_numba(
        self, x: Tensor, h0: Tensor | None, c0: Tensor | None, weights: Sequence[Tensor], *options: Any
    ) -> str | None:
        """Why torch's own layer is ahead of numba's kernel, as measured on Zen 5 with two threads, or None."""
        packed = options[1] is not None
        T, B = (len(options[1]), int(options[1][0])) if packed else x.shape[:2]
        H = weights[0].shape[0] // self.gates
        if not self.has_cell:
            # Around a kernel there is Python, 30 to 40 us of it; a step of torch's takes 10 to 25.
            work = T * B * weights[0].shape[0] * (x.shape[-1] + H)
            return "a few small steps take torch no longer" if T < 4 and work < _LEAST_WORK else None
        if packed or x.dtype != torch.float32 or weights[1].shape[1] != H or not _has_onednn():
            return None  # torch goes step by step, then
        ahead = T > 1 and (B >= 8 or T < 32) if needs_graph(x, h0, c0, *weights) else B >= 12
        return "torch's LSTM is oneDNN's, and ahead from some rows on" if ahead else None

    def check(self, arguments: Arguments) -> None:
        """Raises ValueError with the argument's name where a shape or a dtype is not as in `Arguments`."""
        x, h0, c0, weights, bidirectional, batch_sizes, lengths, reset, reset_h, reset_c = arguments
        D = 2 if bidirectional else 1
        rank, kind = (3, "[T, B, I]") if batch_sizes is None else (2, "packed, [N, I]")
        if x.dim() != rank:
            self._fail(f"x must be {kind}, got {x.dim()} dimensions")
        I = x.shape[-1]
        count = len(weights) // D
        counts = (2, 4, 3, 5) if self.has_cell else (2, 4)
        if len(weights) not in [D * n for n in counts]:
            more = " (one more with a projection)" if self.has_cell else ""
            self._fail(f"weights must hold {2 * D} tensors or {4 * D} with biases{more}, got {len(weights)}")
        projected = count % 2 == 1
        P = weights[1].shape[-1]
        H = weights[count - 1].shape[-1] if projected else P
        if projected and P == H:
            self._fail(f"a projection must change the size: w_hr is square, [{P}, {H}]")
        if I == 0:
            self._fail("x must have at least one feature, got I=0")
        G = self.gates * H
        expected: list[tuple[int, ...]] = [(G, I), (G, P), (G,), (G,)][: count - projected]
        expected += [(P, H)] * projected
        stored = weights[0].dtype
        if stored not in HALF or x.dtype != torch.float32 or needs_graph(x, h0, c0, reset_h, reset_c, *weights):
            stored = x.dtype
        for k, weight in enumerate(weights):
            self._check_tensor(f"weights[{k}]", weight, expected[k % count], x, stored)
        if batch_sizes is not None:
            if batch_sizes.dim() != 1 or batch_sizes.dtype != torch.int64 or batch_sizes.device.type != "cpu":
                self._fail("batch_sizes must be int64 [T] on the CPU")
            sizes = batch_sizes.tolist()
            T, B = len(sizes), sizes[0] if sizes else 0
            if sizes != sorted(sizes, reverse=True) or (sizes and sizes[-1] <= 0) or sum(sizes) != len(x):
                self._fail(f"batch_sizes must be positive, not rise, and add up to x's {len(x)} rows, got {sizes}")
        else:
            T, B = x.shape[:2]
        if T == 0:
            self._fail("x must have at least one step, got T=0")
        for name, state, width in (("h0", h0, P), ("c0", c0, H), ("reset_h", reset_h, P), ("reset_c", reset_c, H)):
            if state is not None:
                self._check_tensor(name, state, (D, B, width), x)
        for name, option in (("lengths", lengths), ("reset", reset)):
            if option is not None and batch_sizes is not None:
                self._fail(f"{name} cannot be given with packed input")
        if lengths is not None:
            if lengths.shape != (B,) or lengths.dtype != torch.int64 or lengths.device.type != "cpu":
                got = f"{lengths.dtype} {list(lengths.shape)} on {lengths.device}"
                self._fail(f"lengths must be int64 [{B}] on the CPU, got {got}")
            if not torch.compiler.is_compiling() and B:  # when compiled, the kernel checks it
                given = lengths.tolist()
                if min(given) < 0 or max(given) > T:
                    self._fail(f"lengths must be between 0 and T={T}, got {min(given)} to {max(given)}")
        if reset is not None and (reset.shape != (T, B) or reset.dtype != torch.bool or reset.device != x.device):
            got = f"{reset.dtype} {list(reset.shape)} on {reset.device}"
            self._fail(f"reset must be torch.bool {[T, B]} on {x.device} like x, got {got}")

    def _check_tensor(
        self, name: str, t: Tensor, shape: tuple[int, ...], x: Tensor, dtype: torch.dtype | None = None
    ) -> None:
        dtype = dtype or x.dtype
        if t.shape != shape:
            self._fail(f"{name} must be {list(shape)}, got {list(t.shape)}")
        if t.dtype != dtype or t.device != x.device:
            self._fail(f"{name} must be {dtype} on {x.device} like x, got {t.dtype} on {t.device}")

    def _fail(self, message: str) -> None:
        raise ValueError(f"{self.name}: {message}")

    def _self_check(self, kernel: Kernel, device: str, dtype: torch.dtype) -> None:
        """Outputs, tape and gradients of the small cases against the reference in float64."""
        tf32 = device == "cuda" and allows_tf32()
        if dtype == torch.float32:
            for stored in (torch.bfloat16, torch.float16):
                for case in SELF_CHECK_CASES[:4:3]:  # with weights as they are, and packed
                    arguments = case.arguments(self, device, dtype)
                    arguments = arguments._replace(weights=[w.to(stored) for w in arguments.weights])
                    outputs, expected = (k.forward(*arguments.saving(False)) for k in (kernel, self.reference))
                    for got, want in zip(outputs, expected, strict=True):
                        torch.testing.assert_close(got, want, **rounding(want, dtype, 8, tf32))
        for case in SELF_CHECK_CASES:
            arguments = case.arguments(self, device, dtype)
            wide = widened(arguments)
            outputs = Outputs(*kernel.forward(*arguments.saving(True)))
            expected = Outputs(*self.reference.forward(*wide.saving(True)))
            places = running(arguments)
            for name, got, want in zip(Outputs._fields, outputs, expected, strict=True):
                if name == "gates" and places is not None and got.numel():
                    got, want = got[:, places], want[:, places]  # nobody reads the tape past a row's end
                torch.testing.assert_close(got, want.to(dtype), **rounding(want, dtype, 8, tf32))
            wide_grads = grads_like(expected)
            grads = [None if g is None else g.to(dtype) for g in wide_grads]
            needs = [True] * (5 + len(arguments.weights))
            ours = kernel.backward(*grads, *arguments, outputs.y, outputs.gates, outputs.cells, needs)
            # From the same tape, so that a ReLU that rounding has shut or opened is so for both.
            tape = (t.double() for t in (outputs.y, outputs.gates, outputs.cells))
            theirs = self.reference.backward(*wide_grads, *wide, *tape, needs)
            for got, want in zip([*ours[:5], *ours[5]], [*theirs[:5], *theirs[5]], strict=True):
                # A gradient sums T*B terms, which the kernels add in another order than the reference.
                tolerance = dict(rtol=1e-4, atol=1e-4 if dtype == torch.float32 else 1e-7)
                torch.testing.assert_close(got.to(want.dtype), want, **(rounding(want, dtype, 8, tf32) or tolerance))

    # The bodies of the ops have no annotations: torch.library would read schemas from them.

    def _forward(self, *args):  # type: ignore[no-untyped-def]
        x = args[0]
        return self.table.select(x.device.type, x.dtype, *args).forward(*args)

    def _backward(self, *args):  # type: ignore[no-untyped-def]
        x = args[4]
        *grads, dweights = self.table.select(x.device.type, x.dtype, *args[4:]).backward(*args)
        return *grads, dweights

    def _forward_fake(self, x, h0, c0, weights, bidirectional, save_tape, save_cells, batch_sizes, *_):  # type: ignore[no-untyped-def]
        D, P, H = 2 if bidirectional else 1, weights[1].shape[1], weights[0].shape[0] // self.gates
        N = x.shape[0]
        if batch_sizes is None:
            B = x.shape[1]
            N = N * B  # not Size.numel(), which would fix the sizes of a graph
        else:
            B = h0.shape[1] if h0 is not None else torch.library.get_ctx().new_dynamic_size()
        nothing = (0,)
        shapes = (
            (*x.shape[:-1], D * P),
            (D, B, P),
            (D, B, H) if self.has_cell else nothing,
            (D, N, self.tape * H) if save_tape and self.tape else nothing,
            (D, N, H) if (save_tape or save_cells) and self.has_cell else nothing,
        )
        return tuple(x.new_empty(shape) for shape in shapes)

    def _backward_fake(self, _dy, dh_n, dc_n, _dcells, *rest):  # type: ignore[no-untyped-def]
        *given_arguments, _, _, _, needs = rest
        x, h0, c0, weights, bidirectional, batch_sizes, _, reset, reset_h, reset_c = given_arguments
        D, P, H = 2 if bidirectional else 1, weights[1].shape[1], weights[0].shape[0] // self.gates
        given = [t for t in (h0, c0, reset_h, reset_c, dh_n, dc_n) if t is not None]
        B = x.shape[1] if batch_sizes is None else given[0].shape[1] if given else 0
        state, reset_state = needs[1] or needs[2], (needs[3] or needs[4]) and reset is not None
        wanted = [
            (needs[0], x.shape),
            (state, (D, B, P)),
            (state and self.has_cell, (D, B, H)),
            (reset_state, (D, B, P)),
            (reset_state and self.has_cell, (D, B, H)),
            *zip(needs[5:], (w.shape for w in weights), strict=True),
        ]
        grads = [x.new_empty(shape if need else (0,)) for need, shape in wanted]
        return *grads[:5], grads[5:]

    def _autograd(self, *args):  # type: ignore[no-untyped-def]
        x, h0, c0, weights, bidirectional, _, _, *rest = args
        if needs_graph(x, h0, c0, *rest[-2:], *weights):
            return _Function.apply(self, False, x, h0, c0, bidirectional, *rest, *weights)
        with below_autograd():
            return self._op(*args)


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx, op, plain, x, h0, c0, bidirectional, batch_sizes, lengths, reset, reset_h, reset_c, *weights):  # type: ignore[no-untyped-def]
        arguments = Arguments(x, h0, c0, weights, bidirectional, batch_sizes, lengths, reset, reset_h, reset_c)
        compute = op._forward if plain else op._op
        with below_autograd():
            outputs = Outputs(*compute(*arguments.saving(True)))
        ctx.op, ctx.plain, ctx.bidirectional = op, plain, bidirectional
        ctx.backend = requested_backend()
        y = outputs.y
        if plain:
            # Backward needs y, which the caller may change in place, as after torch's modules. So it is saved without
            # its version, and this remembers that version without holding y.
            ctx.version_of_y = y.detach()
            ctx.version_of_y.data = outputs.gates.new_empty(0)
            ctx.version, y = y._version, y.data
        ctx.save_for_backward(*arguments[:3], *arguments[5:], y, outputs.gates, outputs.cells, *weights)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(outputs.gates, *(() if op.has_cell else (outputs.c_n, outputs.cells)))
        return tuple(outputs)

    @staticmethod
    def backward(ctx, dy, dh_n, dc_n, _, dcells):  # type: ignore[no-untyped-def]
        x, h0, c0, *rest = ctx.saved_tensors
        options, (y, gates, cells), weights = rest[:5], rest[5:8], rest[8:]
        arguments = Arguments(x, h0, c0, weights, ctx.bidirectional, *options)
        needs = [*ctx.needs_input_grad[2:5], *ctx.needs_input_grad[9:]]  # x, h0, c0, reset_h, reset_c, *weights
        grads = (dy, dh_n, dc_n, dcells)
        # Only the reference has a graph to give, or takes batched gradients.
        if torch.is_grad_enabled() or is_transformed(*(g for g in grads if g is not None)):

            def forward(x, h0, c0, reset_h, reset_c, *weights):  # type: ignore[no-untyped-def]
                own = arguments._replace(x=x, h0=h0, c0=c0, weights=weights, reset_h=reset_h, reset_c=reset_c)
                y, h_n, c_n, _, cells = ctx.op.reference.forward(*own.saving(False, True))
                return y, h_n, c_n, cells

            found = grads_through(forward, (x, h0, c0, *options[3:], *weights), (), needs, grads)
        else:
            # On a GPU, autograd calls this in a thread of its own, which knows no use_backend.
            asked = ctx.backend if x.device.type == "cuda" else None
            with use_backend(asked) if asked else nullcontext():
                if ctx.plain and ctx.version_of_y._version != ctx.version:
                    y = ctx.op._forward(*arguments.saving(False))[0]
                compute = ctx.op._backward if ctx.plain and is_plain(x, *weights, *grads) else ctx.op._backward_op
                *ours, dweights = compute(*grads, *arguments, y, gates, cells, needs)
            found = [g if need else None for g, need in zip([*ours, *dweights], needs, strict=True)]
        return None, None, *found[:3], None, None, None, None, *found[3:]


def _has_onednn() -> bool:
    return torch.backends.mkldnn.is_available() and bool(torch.backends.mkldnn.enabled)


def running(arguments: Arguments) -> Tensor | None:
    """[rows] the places on a padded tape that steps have written, or None for all."""
    if arguments.lengths is None:
        return None
    T = arguments.x.shape[0]
    return (arguments.lengths > torch.arange(T).unsqueeze(-1)).flatten().nonzero().squeeze(-1).to(arguments.x.device)


def grads_like(outputs: Outputs) -> list[Tensor | None]:
    """Some gradient for each of y, h_n, c_n and cells, None for what there is not."""

    def ramp(t: Tensor) -> Tensor | None:
        return torch.linspace(-1, 1, t.numel(), dtype=t.dtype, device=t.device).view(t.shape) if t.numel() else None

    return [ramp(t) for t in (outputs.y, outputs.h_n, outputs.c_n, outputs.cells)]
