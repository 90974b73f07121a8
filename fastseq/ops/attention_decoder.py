"""The op `fastseq::attention_decoder`: a recurrent cell that looks at a memory at every step. Formulas are in
`fastseq.reference.attention_decoder`.

It does what depends on the step before. What does not, its caller has done for all steps at once: `gates` and `keys`
are products of the input and of the memory. Nor are the weights' gradients the kernels' work: they are products over
all steps, of the gradients that `backward` gives of each.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch
from torch import Tensor

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
from fastseq.ops.linear import linear
from fastseq.reference import attention_decoder as reference
from fastseq.reference.attention_decoder import GRU, LSTM, RNN_TANH
from fastseq.registry import FLOATS, HALF, Impl, Kernel, Op, register

# What the op's `cell` is called.
CELLS = {"lstm": LSTM, "gru": GRU, "rnn": RNN_TANH}


class Arguments(NamedTuple):
    """What the op takes, beside whether it shall save a tape. Implementations get everything contiguous, but for gates
    and w_feed.

    Attributes:
        gates: [T, B, G*H], what the cell's gates get from its input and the biases; T and B any strides apart. Any
            floating dtype, which all others have but for `absent` and `lengths`. Gates are in torch's order: LSTM (G=4)
            i, f, g, o; GRU (G=3) r, z, n.
        h0: [B, H]
        c0: [B, H] of an LSTM, else None.
        feed0: [B, F] what is fed at the first step; there with w_out, else None.
        keys: [B, S, A]; A is H without w_query.
        values: [B, S, M], the memory. At least one place.
        absent: [B, S] bool, true where the memory is padding, or None.
        lengths: [B] int64 on the CPU, how many steps each row has, 0 to T; or None for all.
        w_feed: [G*H, F], rows any stride apart; F is M without w_out.
        w_hh: [G*H, H]
        b_hh: [G*H], added to W_hh h; or None. Only the GRU tells it from what is in gates.
        w_query: [A, H] of additive attention, or None.
        v: [A] of additive attention, or None.
        w_out: [F, M + H] where the state looks after its step, or None where it does before.
        cell: one of `CELLS`.
    """

    gates: Tensor
    h0: Tensor
    c0: Tensor | None
    feed0: Tensor | None
    keys: Tensor
    values: Tensor
    absent: Tensor | None
    lengths: Tensor | None
    w_feed: Tensor
    w_hh: Tensor
    b_hh: Tensor | None
    w_query: Tensor | None
    v: Tensor | None
    w_out: Tensor | None
    cell: int

    @property
    def tensors(self) -> tuple[Any, ...]:
        """All but the cell."""
        return self[:-1]


class Outputs(NamedTuple):
    """What the op gives; what there is not has no elements. Past a row's length, the sequences are 0, the tape's
    contexts, too; its gates and cells are not read there.

    Attributes:
        h: [T, B, H] all states.
        feeds: [T, B, F] the context that each step was fed, or, with w_out, what it saw.
        weights: [T, B, S] of the places of the memory, 0 at those that are absent.
        h_n: [B, H] the state after each row's last step.
        c_n: [B, H] likewise, of an LSTM.
        gates: [T, B, tape*H] the first part of the tape, as the cell has it.
        cells: [T, B, H] all c_t, the second part of an LSTM's.
        contexts: [T, B, M] the third part, where there is w_out.
    """

    h: Tensor
    feeds: Tensor
    weights: Tensor
    h_n: Tensor
    c_n: Tensor
    gates: Tensor
    cells: Tensor
    contexts: Tensor

    def saved(self) -> tuple[Tensor, ...]:
        """What backward takes."""
        return *self[:3], *self[5:]


class Gradients(NamedTuple):
    """What an implementation's backward gives; what there is not, or is not needed, has no elements. Those of steps are
    0 past a row's length.

    Attributes:
        gates: [T, B, G*H]
        gates_h: [T, B, G*H] of W_hh h + b_hh, where it differs from that of gates: the GRU's.
        queries: [T, B, A] of W_q q, with w_query.
        outs: [T, B, F] of what tanh is taken of, with w_out.
        h0, c0, feed0, keys, values, v: of the arguments; the last three by `needs`.
    """

    gates: Tensor
    gates_h: Tensor
    queries: Tensor
    outs: Tensor
    h0: Tensor
    c0: Tensor
    feed0: Tensor
    keys: Tensor
    values: Tensor
    v: Tensor


@dataclass(frozen=True)
class Case:
    """A shape and the options that every implementation is tested on."""

    T: int
    B: int
    S: int
    H: int
    M: int
    A: int = 0  # of additive attention; 0 for that by product
    F: int = 0  # of the feed where the state looks after its step; 0 where it looks before
    cell: str = "gru"
    bias: bool = True
    absent: bool = False  # the last row of several altogether
    lengths: bool = False  # the first row of several has no step
    batch_first: bool = False

    def __str__(self) -> str:
        sizes = [f"{name}{size}" for name in "TBSHMAF" if (size := getattr(self, name)) or name == "B"]
        flags = [
            f.name if getattr(self, f.name) else f"no_{f.name}"
            for f in fields(self)
            if f.type is bool and getattr(self, f.name) != f.default
        ]
        return "-".join([self.cell, "_".join(sizes), *flags])

    def arguments(self, device: str, dtype: torch.dtype, seed: int = 0) -> Arguments:
        """Random arguments, weights in torch's own scale (uniform in +-1/sqrt(H))."""
        generator = torch.Generator().manual_seed(seed)
        T, B, S, H, M = self.T, self.B, self.S, self.H, self.M
        cell = CELLS[self.cell]
        G = reference.CELLS[cell].gates * H

        def uniform(*shape: int, scale: float = 1.0) -> Tensor:
            values = torch.rand(shape, generator=generator, dtype=torch.float64) * 2 - 1
            return (values * scale).to(device, dtype)

        gates = uniform(B, T, G).transpose(0, 1) if self.batch_first else uniform(T, B, G)
        absent = lengths = None
        if self.absent:
            absent = torch.rand(B, S, generator=generator) < 0.4
            absent[:1, :1] = False
            absent[1:][-1:] = True
        if self.lengths:
            lengths = torch.randint(0, T + 1, (B,), generator=generator)
            lengths[: B - 1][:1] = 0
        weight = uniform(G, 3 + (self.F or M), scale=H**-0.5)
        return Arguments(
            gates,
            uniform(B, H),
            uniform(B, H) if cell == LSTM else None,
            uniform(B, self.F) if self.F else None,
            uniform(B, S, self.A or H),
            uniform(B, S, M),
            absent if absent is None else absent.to(device),
            lengths,
            weight[:, 3:],
            uniform(G, H, scale=H**-0.5),
            uniform(G, scale=H**-0.5) if self.bias else None,
            uniform(self.A, H, scale=2 * H**-0.5) if self.A else None,
            uniform(self.A) if self.A else None,
            uniform(self.F, M + H, scale=(M + H) ** -0.5) if self.F else None,
            cell,
        )


# Small ones for the self-check of a new machine first; then what exercises tiles, tails, splits and layouts.
SELF_CHECK_CASES = [
    Case(1, 1, 1, 5, 3, A=4),
    Case(5, 3, 7, 19, 9, A=11, absent=True, lengths=True),
    Case(6, 9, 20, 17, 33, F=13, cell="lstm", absent=True, lengths=True, batch_first=True),
    Case(4, 2, 37, 24, 24, cell="lstm", bias=False),
    Case(7, 4, 6, 16, 20, A=33, F=18, cell="rnn", absent=True),
    Case(5, 21, 18, 40, 16, F=40, lengths=True),
]
CASES = [
    *SELF_CHECK_CASES,
    *(Case(6, 5, 9, 13, 11, A, F, cell) for A in (0, 10) for F in (0, 12) for cell in CELLS),
    Case(63, 3, 29, 65, 37, A=31, absent=True, lengths=True),
    Case(63, 3, 29, 65, 37, F=33, cell="lstm", batch_first=True),
    Case(1, 1, 50, 128, 64, A=64, cell="lstm"),
    Case(1, 3, 50, 128, 64, F=128),
    Case(9, 37, 23, 24, 20, A=20, absent=True, lengths=True, batch_first=True),
    Case(9, 37, 23, 24, 20, F=36, cell="rnn", bias=False),
    Case(5, 2, 11, 300, 260, A=270, cell="lstm"),
    Case(3, 5, 300, 136, 130, F=140, absent=True),
    Case(12, 2, 1, 33, 17, A=9, lengths=True),
    Case(7, 6, 1, 33, 17, F=9, absent=True),
    Case(4, 0, 5, 6, 7, A=8),
    Case(4, 0, 5, 6, 7, F=8, cell="lstm", absent=True, lengths=True),
    Case(2, 5, 3, 1, 1, A=1, cell="rnn"),
    Case(2, 5, 3, 1, 1, F=1),
]


def _self_check(kernel: Kernel, device: str, dtype: torch.dtype) -> None:
    """Outputs, tape and gradients of the small cases against the reference in float64."""
    tf32 = device == "cuda" and torch.backends.cuda.matmul.fp32_precision == "tf32"
    for case in SELF_CHECK_CASES:
        arguments = case.arguments(device, dtype)
        wide = widened(arguments)
        outputs = Outputs(*kernel.forward(*arguments, True))
        expected = Outputs(*reference.forward(*wide, True))
        for name, got, want in zip(Outputs._fields, outputs, expected, strict=True):
            got, want = written(name, got, arguments), written(name, want, arguments)
            torch.testing.assert_close(got, want.to(dtype), **rounding(want, dtype, 8, tf32))
        wide_grads = grads_like(expected)
        grads = [None if g is None else g.to(dtype) for g in wide_grads]
        needs = needs_all(arguments)
        ours = kernel.backward(*grads, *arguments, *outputs.saved(), needs)
        # From the same tape.
        given: Any = (*wide_grads, *wide, *(t.double() for t in outputs.saved()), needs)
        theirs = reference.backward(*given)
        for got, want in zip(ours, theirs, strict=True):
            # A gradient sums up to T*B*S terms, which the kernels add in another order than the reference.
            tolerance = dict(rtol=1e-4, atol=1e-4 if dtype == torch.float32 else 1e-7)
            torch.testing.assert_close(got.to(want.dtype), want, **(rounding(want, dtype, 8, tf32) or tolerance))


TABLE = register(
    Op(
        "attention_decoder",
        [
            Impl(
                "cpp",
                "fastseq_native::attention_decoder",
                devices=frozenset({"cpu"}),
                dtypes=FLOATS,
                verified=frozenset({"avx2", "avx512", "portable"}),
            ),
            Impl(
                "triton",
                "fastseq.kernels.triton.attention_decoder",
                devices=frozenset({"cuda"}),
                dtypes=HALF | {torch.float32},
            ),
            Impl("reference", reference.__name__),
        ],
        _self_check,
    )
)

_ARGUMENTS = (
    "Tensor gates, Tensor h0, Tensor? c0, Tensor? feed0, Tensor keys, Tensor values, Tensor? absent, Tensor? lengths,"
    " Tensor w_feed, Tensor w_hh, Tensor? b_hh, Tensor? w_query, Tensor? v, Tensor? w_out, int cell"
)
LIBRARY.define(
    f"attention_decoder({_ARGUMENTS}, bool save_tape) -> (Tensor h, Tensor feeds, Tensor weights, Tensor h_n,"
    " Tensor c_n, Tensor saved_gates, Tensor cells, Tensor contexts)"
)
LIBRARY.define(
    "attention_decoder_backward(Tensor? dh, Tensor? dfeeds, Tensor? dweights, Tensor? dh_n, Tensor? dc_n,"
    f" {_ARGUMENTS}, Tensor h, Tensor feeds, Tensor weights, Tensor saved_gates, Tensor cells, Tensor contexts,"
    " bool[] needs) -> (Tensor dgates, Tensor dgates_h, Tensor dqueries, Tensor douts, Tensor dh0, Tensor dc0,"
    " Tensor dfeed0, Tensor dkeys, Tensor dvalues, Tensor dv)"
)
_TENSORS = len(Arguments._fields) - 1  # all but the cell


_ROWS_APART = {Arguments._fields.index("gates"), Arguments._fields.index("w_feed")}


def _laid_out(arguments: Sequence[Any]) -> list[Any]:
    """The arguments as kernels read them: contiguous, gates and w_feed at least in their last dimension."""
    return [
        t if not isinstance(t, Tensor) or (i in _ROWS_APART and t.stride(-1) == 1) else t.contiguous()
        for i, t in enumerate(arguments)
    ]


# The bodies of the ops have no annotations: torch.library would read schemas from them.


def _forward(*args):  # type: ignore[no-untyped-def]
    arguments = _laid_out(args)
    return TABLE.select(arguments[0].device.type, arguments[0].dtype, *arguments).forward(*arguments)


def _backward(*args):  # type: ignore[no-untyped-def]
    grads = [None if g is None else g.contiguous() for g in args[:5]]
    arguments = _laid_out(args[5:])
    kernel = TABLE.select(arguments[0].device.type, arguments[0].dtype, *arguments)
    return kernel.backward(*grads, *arguments)


def _forward_fake(gates, h0, c0, feed0, keys, values, _absent, _lengths, w_feed, *rest):  # type: ignore[no-untyped-def]
    w_out, cell, save_tape = rest[-3:]
    T, B = gates.shape[:2]
    (H, M), tape, nothing = (h0.shape[1], values.shape[2]), reference.CELLS[cell].tape, (0,)
    shapes = (
        (T, B, H),
        (T, B, w_feed.shape[1]),
        (T, B, values.shape[1]),
        (B, H),
        nothing if c0 is None else (B, H),
        (T, B, tape * H) if save_tape and tape else nothing,
        (T, B, H) if save_tape and c0 is not None else nothing,
        (T, B, M) if save_tape and w_out is not None else nothing,
    )
    return tuple(gates.new_empty(shape) for shape in shapes)


def _backward_fake(*args):  # type: ignore[no-untyped-def]
    arguments, needs = Arguments(*args[5 : 6 + _TENSORS]), args[-1]
    gates, cell = arguments.gates, arguments.cell
    T, B = gates.shape[:2]
    nothing = (0,)
    shapes = (
        gates.shape,
        gates.shape if cell == GRU else nothing,
        nothing if arguments.w_query is None else (T, B, arguments.keys.shape[2]),
        nothing if arguments.w_out is None else (T, B, arguments.w_feed.shape[1]),
        *(nothing if t is None else t.shape for t in arguments[1:4]),
        *(
            t.shape if need and t is not None else nothing
            for need, t in zip(needs, (arguments.keys, arguments.values, arguments.v), strict=True)
        ),
    )
    return tuple(gates.new_empty(shape) for shape in shapes)


def _autograd(*args):  # type: ignore[no-untyped-def]
    *arguments, _ = args
    if needs_graph(*arguments[:_TENSORS]):
        return _Function.apply(False, *arguments)
    with below_autograd():
        return torch.ops.fastseq.attention_decoder(*args)


implement("attention_decoder", _forward, _backward, _autograd, _forward_fake, _backward_fake)


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx, plain, *args):  # type: ignore[no-untyped-def]
        with below_autograd():
            outputs = Outputs(*(_forward if plain else torch.ops.fastseq.attention_decoder)(*args, True))
        ctx.plain, ctx.cell = plain, args[-1]
        ctx.save_for_backward(*args[:_TENSORS], *outputs.saved())
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*outputs[5:], *(() if ctx.cell == LSTM else (outputs.c_n,)))
        return tuple(outputs)

    @staticmethod
    def backward(ctx, dh, dfeeds, dweights, dh_n, dc_n, *_):  # type: ignore[no-untyped-def]
        kept = ctx.saved_tensors  # once: checkpointing unpacks a tensor no second time
        tensors, saved = kept[:_TENSORS], kept[_TENSORS:]
        needs = ctx.needs_input_grad[1 : 1 + _TENSORS]
        grads = (dh, dfeeds, dweights, dh_n, dc_n)
        # Only the reference has a graph to give, or takes batched gradients.
        if torch.is_grad_enabled() or is_transformed(*(g for g in grads if g is not None)):
            found = grads_through(reference.forward, tensors, (ctx.cell, False), needs, grads)
        else:
            arguments = Arguments._make((*tensors, ctx.cell))
            plain = ctx.plain and is_plain(*tensors, *grads)
            compute = _backward if plain else torch.ops.fastseq.attention_decoder_backward
            asked = [need for name, need in zip(Arguments._fields, needs, strict=False) if name in _BY_NEED]
            ours = Gradients(*compute(*grads, *arguments, *saved, asked))
            # A graph that is traced cannot depend on how long rows are.
            lengths = arguments.lengths if plain else None
            found = _of_arguments(ours, arguments._replace(lengths=lengths), saved, needs)
        return None, *found, None


_BY_NEED = ("keys", "values", "v")


def _of_arguments(
    grads: Gradients, arguments: Arguments, saved: Sequence[Tensor], needs: Sequence[bool]
) -> list[Tensor | None]:
    """The gradients of the op's arguments that are needed, those of the weights from the steps'."""
    h, feeds, *_, contexts = saved
    h0, feed0 = arguments.h0, arguments.feed0  # None where what is fed is this step's
    through_h = grads.gates_h if arguments.cell == GRU else grads.gates
    over_steps = _OverSteps(arguments.lengths, len(h), len(h0), h.device)
    of_weights = {
        "w_feed": lambda: over_steps(grads.gates, feeds, feed0),
        "w_hh": lambda: over_steps(through_h, h, h0),
        "b_hh": lambda: through_h.sum((0, 1)),
        "w_query": lambda: over_steps(grads.queries, h, h0 if arguments.w_out is None else None),
        "w_out": lambda: torch.cat([over_steps(grads.outs, x) for x in (contexts, h)], 1),
    }
    return [
        None if not need else of_weights[name]() if name in of_weights else getattr(grads, name)
        for name, need in zip(Arguments._fields, needs, strict=False)
    ]


class _OverSteps:
    """sum_t grads_t^T x_t [N, K], of grads [T, B, N] and x [T, B, K]; with `first` [B, K], x_{t-1} after that.

    On CPUs rows past their lengths, which add nothing, are left out.
    """

    def __init__(self, lengths: Tensor | None, T: int, B: int, device: torch.device) -> None:
        self.rows: Tensor | None = None  # those that run, step by step
        self.begun = B  # how many of them run at the first step
        if lengths is not None and device.type == "cpu":
            self.rows = (lengths > torch.arange(T).unsqueeze(1)).flatten().nonzero().squeeze(1)
            self.begun = int((lengths > 0).sum())

    def __call__(self, grads: Tensor, x: Tensor, first: Tensor | None = None) -> Tensor:
        B, n, rows = grads.shape[1], self.begun, self.rows
        grads, x = grads.flatten(0, 1), x.flatten(0, 1)
        if rows is not None:
            grads = grads.index_select(0, rows)
            x = x.index_select(0, rows if first is None else rows[n:] - B)
            first = first if first is None else first.index_select(0, rows[:n])
        elif first is not None:
            x = x[:-B]
        if first is None:
            return linear(grads.t(), x.t())
        return linear(grads[n:].t(), x.t()) + grads[:n].t() @ first


def decode(arguments: Arguments) -> Outputs:
    """The op, for arguments that have been checked."""
    tensors = arguments.tensors
    if is_plain(*tensors):
        if needs_graph(*tensors):
            return Outputs(*_Function.apply(True, *arguments))
        return Outputs(*_forward(*arguments, False))
    if is_transformed():
        given: Any = (*arguments, False)
        return Outputs(*reference.forward(*given))
    return Outputs(*torch.ops.fastseq.attention_decoder(*arguments, False))


def attention_decoder(
    gates: Tensor,
    h0: Tensor,
    keys: Tensor,
    values: Tensor,
    w_feed: Tensor,
    w_hh: Tensor,
    b_hh: Tensor | None = None,
    *,
    cell: str = "gru",
    c0: Tensor | None = None,
    w_query: Tensor | None = None,
    v: Tensor | None = None,
    w_out: Tensor | None = None,
    feed0: Tensor | None = None,
    absent: Tensor | None = None,
    lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """A recurrent cell that looks at a memory at every step, teacher-forced: `fastseq.nn.AttentionDecoder` without the
    products that do not depend on the step before. All tensors share the dtype and the device of gates.

    Args:
        gates: [T, B, G*H], W_x x + b_ih for all steps, any strides. Gates are in torch's order: LSTM (G=4) i, f, g, o;
            GRU (G=3) r, z, n; RNN with tanh (G=1).
        h0: [B, H] initial state.
        keys: [B, S, A] what the state is compared with; A is H where it is by product.
        values: [B, S, M] what is looked at.
        w_feed: [G*H, F] of what is fed to the cell beside its input; F is M where the state looks before its step.
        w_hh: [G*H, H]
        b_hh: [G*H]
        cell: "lstm", "gru" or "rnn".
        c0: [B, H] initial cell state of an LSTM.
        w_query: [A, H], and
        v: [A] of additive attention (Bahdanau et al., arXiv:1409.0473); without them attention is by product.
        w_out: [F, M + H], with which the state looks after its step, and tanh(w_out [context; h]) is fed at the next
            one (Luong et al., arXiv:1508.04025).
        feed0: [B, F] what is fed at the first one then.
        absent: [B, S] bool, true where the memory is padding: it gets no weight; a row of nothing else sees zeros.
        lengths: [B] int64 on the CPU, how many steps each row has; past them h, feeds and weights are 0.

    Returns:
        h [T, B, H], feeds [T, B, F] (the contexts without w_out), weights [T, B, S], h_n [B, H] and c_n [B, H] (without
        elements unless an LSTM's).

    Raises:
        ValueError, TypeError: an argument is not as above; the message names it.
    """
    if not isinstance(cell, str) or cell not in CELLS:
        raise ValueError(f"cell must be one of {', '.join(CELLS)}, got {cell!r}")
    arguments = Arguments(
        gates, h0, c0, feed0, keys, values, absent, lengths, w_feed, w_hh, b_hh, w_query, v, w_out, CELLS[cell]
    )
    check(arguments)
    return decode(arguments)[:5]


def check(arguments: Arguments) -> None:
    """Raises ValueError or TypeError with the argument's name where one is not as in `Arguments`."""
    for name, t in zip(Arguments._fields, arguments.tensors, strict=False):
        if t is None and name in _OPTIONAL:
            continue
        if not isinstance(t, Tensor) or t.layout != torch.strided or t.is_nested:
            got = t.layout if isinstance(t, Tensor) else type(t).__name__
            raise TypeError(f"{name} must be a dense tensor, got {got}")
    gates, h0, c0, feed0, keys, values, absent, lengths, *_, w_query, v, w_out, cell = arguments
    for name, t, form in (
        ("gates", gates, "[T, B, G*H]"),
        ("h0", h0, "[B, H]"),
        ("keys", keys, "[B, S, A]"),
        ("values", values, "[B, S, M]"),
        ("w_out", w_out, "[F, M + H]"),
    ):
        if t is not None and t.dim() != form.count(",") + 1:
            raise ValueError(f"{name} must be {form}, got {list(t.shape)}")
    (T, B), H = gates.shape[:2], h0.shape[1]
    G = reference.CELLS[cell].gates * H
    (S, A), M = keys.shape[1:], values.shape[2]
    F = M if w_out is None else w_out.shape[0]
    if T == 0:
        raise ValueError("gates must have at least one step, got T=0")
    if 0 in (H, A, M, F):
        raise ValueError(f"H, A, M and F must be at least 1, got {H}, {A}, {M} and {F}")
    if S == 0:
        raise ValueError("keys must have at least one place, got S=0")
    if not gates.is_floating_point():
        raise ValueError(f"gates must be floating, got {gates.dtype}")
    for name, t, there, when in (
        ("c0", c0, cell == LSTM, "an LSTM has it"),
        ("feed0", feed0, w_out is not None, "w_out is"),
        ("v", v, w_query is not None, "w_query is"),
    ):
        if (t is not None) != there:
            raise ValueError(f"{name} must be given if and only if {when}")
    expected = dict(
        gates=(T, B, G),
        h0=(B, H),
        c0=(B, H),
        feed0=(B, F),
        keys=(B, S, H if w_query is None else A),
        values=(B, S, M),
        w_feed=(G, F),
        w_hh=(G, H),
        b_hh=(G,),
        w_query=(A, H),
        v=(A,),
        w_out=(F, M + H),
    )
    for name, shape in expected.items():
        t = getattr(arguments, name)
        if t is not None and t.shape != shape:
            raise ValueError(f"{name} must be {list(shape)}, got {list(t.shape)}")
        if t is not None and (t.dtype != gates.dtype or t.device != gates.device):
            raise ValueError(f"{name} must be {gates.dtype} on {gates.device} like gates, got {t.dtype} on {t.device}")
    if absent is not None and (absent.shape != (B, S) or absent.dtype != torch.bool or absent.device != gates.device):
        got = f"{absent.dtype} {list(absent.shape)} on {absent.device}"
        raise ValueError(f"absent must be torch.bool {[B, S]} on {gates.device} like gates, got {got}")
    if lengths is not None:
        if lengths.shape != (B,) or lengths.dtype != torch.int64 or lengths.device.type != "cpu":
            got = f"{lengths.dtype} {list(lengths.shape)} on {lengths.device}"
            raise ValueError(f"lengths must be int64 [{B}] on the CPU, got {got}")
        check_lengths(lengths, T)


def check_lengths(lengths: Tensor, steps: int) -> None:
    """Raises ValueError where one is no number of steps; of a compiled graph, the kernel has to see."""
    if lengths.numel() and not torch.compiler.is_compiling():
        least, most = (int(bound) for bound in lengths.aminmax())
        if least < 0 or most > steps:
            raise ValueError(f"lengths must be between 0 and T={steps}, got {least} to {most}")


_OPTIONAL = ("c0", "feed0", "absent", "lengths", "b_hh", "w_query", "v", "w_out")


def written(name: str, t: Tensor, arguments: Arguments) -> Tensor:
    """One of `Outputs`, by its name, without those places past a row's length that nobody reads."""
    if name not in ("gates", "cells") or arguments.lengths is None or not t.numel():
        return t
    return t[torch.arange(len(t)).unsqueeze(-1).lt(arguments.lengths).to(t.device)]


def needs_all(arguments: Arguments) -> list[bool]:
    """Every gradient that there can be."""
    return [True, True, arguments.v is not None]


def grads_like(outputs: Outputs) -> list[Tensor | None]:
    """Some gradient for each of h, feeds, weights, h_n and c_n, None for what there is not."""

    def wave(t: Tensor) -> Tensor | None:
        if not t.numel():
            return None
        return torch.arange(t.numel(), dtype=torch.float64).mul(0.7).sin().to(t.device, t.dtype).view(t.shape)

    return [wave(t) for t in outputs[:5]]
