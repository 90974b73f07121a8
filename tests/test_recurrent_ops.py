"""The recurrent ops: every implementation of their tables against the reference, on the ops' own cases."""

import threading
from functools import lru_cache

import pytest
import torch
from conftest import device_of, require, require_native
from torch import Tensor

import fastseq
from fastseq.ops.gru import GRU, gru
from fastseq.ops.lstm import LSTM, lstm
from fastseq.ops.recurrent import (
    CASES,
    PROJECTION_CASES,
    SELF_CHECK_CASES,
    Arguments,
    Case,
    Outputs,
    Recurrent,
    grads_like,
    running,
    widened,
)
from fastseq.ops.rnn import RNN_RELU, RNN_TANH, rnn
from fastseq.registry import Impl

OPS = [LSTM, GRU, RNN_TANH, RNN_RELU]
KERNELS = [(op, impl) for op in OPS for impl in op.table.impls if impl.name != "reference"]
EVERYTHING = [(op, impl) for op in OPS for impl in op.table.impls]
DTYPES = [torch.float32, torch.float64]


def name_of(value: object) -> str | None:
    if isinstance(value, tuple) and isinstance(value[0], Recurrent):
        return f"{value[0].name}-{value[1].name}"
    if isinstance(value, Recurrent):
        return value.name
    return str(value).removeprefix("torch.") if isinstance(value, (torch.dtype, Case)) else None


each_op = pytest.mark.parametrize("op", OPS, ids=name_of)
each_kernel = pytest.mark.parametrize("served", KERNELS, ids=name_of)
each_cpu_kernel = pytest.mark.parametrize(
    "served", [(op, impl) for op, impl in KERNELS if device_of(impl) == "cpu"], ids=name_of
)
each_implementation = pytest.mark.parametrize("served", EVERYTHING, ids=name_of)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=name_of)


def all_cases() -> list[tuple[tuple[Recurrent, Impl], torch.dtype, Case]]:
    """Every case in float32; in float64 all of the LSTM's, and those of the self-check for the others."""
    chosen = []
    for op, impl in KERNELS:
        cases = [*CASES, *(PROJECTION_CASES if op is LSTM else [])]
        chosen += [((op, impl), torch.float32, case) for case in cases]
        chosen += [((op, impl), torch.float64, case) for case in (cases if op is LSTM else SELF_CHECK_CASES)]
    return chosen


def needs_all(arguments: Arguments) -> list[bool]:
    return [True] * (5 + len(arguments.weights))


def flat(grads: tuple) -> list[Tensor]:
    return [*grads[:5], *grads[5]]


def assert_gradients(got: list[Tensor], want: list[Tensor]) -> None:
    """Gradients are sums over T*B terms in another order: they are as exact as the sum of the terms' sizes allows."""
    for ours, theirs in zip(got, want, strict=True):
        size = max(1.0, theirs.abs().max().item()) if theirs.numel() else 1.0
        tolerance = (
            dict(rtol=1e-4, atol=2e-5 * size) if ours.dtype == torch.float32 else dict(rtol=1e-7, atol=1e-9 * size)
        )
        torch.testing.assert_close(ours, theirs.to(ours.dtype), **tolerance)


@lru_cache(maxsize=8)
def expected(op: Recurrent, case: Case, device: str, dtype: torch.dtype) -> tuple[Outputs, list[Tensor]]:
    """The reference's outputs in this dtype, and its gradients in float64."""
    arguments = case.arguments(op, device, dtype)
    wide = widened(arguments)
    outputs = Outputs(*op.reference.forward(*wide.saving(True)))
    grads = op.reference.backward(*grads_like(outputs), *wide, outputs.y, outputs.gates, outputs.cells, needs_all(wide))
    return Outputs(*op.reference.forward(*arguments.saving(True))), flat(grads)


@pytest.mark.parametrize(("served", "dtype", "case"), all_cases(), ids=name_of)
def test_forward_tape_and_backward(
    served: tuple[Recurrent, Impl], dtype: torch.dtype, case: Case, threads: int
) -> None:
    op, impl = served
    device = device_of(impl)
    require(op.table, impl, device, dtype)
    arguments = case.arguments(op, device, dtype)
    op.check(arguments)
    outputs, want_grads = expected(op, case, device, dtype)
    ours = Outputs(*impl.kernel.forward(*arguments.saving(True)))
    places = running(arguments)
    for name, got, want in zip(Outputs._fields, ours, outputs, strict=True):
        if name == "gates" and places is not None and got.numel():
            got, want = got[:, places], want[:, places]  # nobody reads the tape past a row's end
        torch.testing.assert_close(got, want)
    without = Outputs(*impl.kernel.forward(*arguments.saving(False)))
    torch.testing.assert_close(without[:3], ours[:3])
    assert not without.gates.numel() and not without.cells.numel()
    # From either tape.
    for tape in (ours, outputs):
        grads = impl.kernel.backward(
            *grads_like(outputs), *arguments, tape.y, tape.gates, tape.cells, needs_all(arguments)
        )
        assert_gradients(flat(grads), want_grads)
    if case.T <= 12:  # and the reference from ours
        tape = Outputs(*(torch.nan_to_num(t) for t in ours))  # where nothing was written there is poison
        grads = op.reference.backward(
            *grads_like(outputs), *arguments, tape.y, tape.gates, tape.cells, needs_all(arguments)
        )
        assert_gradients(flat(grads), want_grads)


@each_op
@pytest.mark.parametrize("case", [Case(6, 3, 4, 5), Case(6, 3, 4, 5, bidirectional=True, state=False)], ids=name_of)
def test_reference_is_torchs(op: Recurrent, case: Case) -> None:
    arguments = case.arguments(op, "cpu", torch.float64)
    hx = arguments[1:3] if op.has_cell else arguments.h0
    if not case.state:
        zeros = torch.zeros(2, 3, 5, dtype=torch.float64)
        hx = (zeros, zeros) if op.has_cell else zeros
    torchs = getattr(torch, op.name)
    theirs = torchs(arguments.x, hx, arguments.weights, True, 1, 0.0, False, case.bidirectional, False)
    ours = op.reference.forward(*arguments.saving(False))
    for got, want in zip(ours[: len(theirs)], theirs, strict=True):
        torch.testing.assert_close(got, want)


@each_op
def test_a_reset_cuts_and_lengths_end(op: Recurrent) -> None:
    """What resets and lengths mean, from runs of the pieces."""
    torch.manual_seed(0)
    arguments = Case(9, 1, 4, 5, bidirectional=True).arguments(op, "cpu", torch.float64)
    reset = torch.zeros(9, 1, dtype=torch.bool)
    reset[4] = True
    reset_states = Case(9, 1, 4, 5, bidirectional=True).arguments(op, "cpu", torch.float64, seed=1)[1:3]
    whole = op(arguments._replace(reset=reset, reset_h=reset_states[0], reset_c=reset_states[1]))

    def mixed(first: Tensor | None, second: Tensor | None) -> Tensor | None:
        """Direction 0 from one, direction 1 from the other."""
        return None if first is None else torch.stack([first[0], second[1]])

    states, anew = arguments[1:3], reset_states
    first = op(arguments._replace(x=arguments.x[:4], h0=mixed(states[0], anew[0]), c0=mixed(states[1], anew[1])))
    second = op(arguments._replace(x=arguments.x[4:], h0=mixed(anew[0], states[0]), c0=mixed(anew[1], states[1])))
    torch.testing.assert_close(whole.y, torch.cat([first.y, second.y]))
    torch.testing.assert_close(whole.h_n, mixed(second.h_n, first.h_n))

    ended = op(arguments._replace(lengths=torch.tensor([6])))
    short = op(arguments._replace(x=arguments.x[:6]))
    torch.testing.assert_close(ended.y, torch.cat([short.y, torch.zeros_like(ended.y[6:])]))
    torch.testing.assert_close(ended.h_n, short.h_n)


@each_kernel
def test_rows_without_a_step_keep_their_state(served: tuple[Recurrent, Impl]) -> None:
    op, impl = served
    require(op.table, impl, device_of(impl), torch.float32)
    arguments = Case(5, 4, 6, 7, bidirectional=True).arguments(op, "cpu", torch.float32)
    arguments = arguments._replace(lengths=torch.tensor([3, 0, 5, 0]))
    ours, theirs = (
        Outputs(*forward(*arguments.saving(True))) for forward in (impl.kernel.forward, op.reference.forward)
    )
    torch.testing.assert_close(ours[:3], theirs[:3])
    assert torch.equal(ours.h_n[:, 1], arguments.h0[:, 1]) and not ours.y[:, 1].any()
    results = [
        flat(backward(*grads_like(theirs), *arguments, tape.y, tape.gates, tape.cells, needs_all(arguments)))
        for backward, tape in ((impl.kernel.backward, ours), (op.reference.backward, theirs))
    ]
    assert_gradients(*results)


@each_kernel
def test_what_lies_past_a_length_is_never_read(served: tuple[Recurrent, Impl]) -> None:
    op, impl = served
    require(op.table, impl, device_of(impl), torch.float32)
    arguments = Case(12, 5, 6, 7, lengths=True).arguments(op, "cpu", torch.float32)
    past = (torch.arange(12).unsqueeze(-1) >= arguments.lengths).unsqueeze(-1)
    outputs = Outputs(*impl.kernel.forward(*arguments.saving(True)))
    grads = grads_like(outputs)
    clean = flat(impl.kernel.backward(*grads, *arguments, *outputs[::3], outputs.cells, needs_all(arguments)))
    bad = arguments._replace(x=arguments.x.masked_fill(past, float("nan")))
    torch.testing.assert_close(Outputs(*impl.kernel.forward(*bad.saving(True)))[:3], outputs[:3])
    grads[0] = grads[0].masked_fill(past, float("nan"))
    dirty = flat(impl.kernel.backward(*grads, *bad, *outputs[::3], outputs.cells, needs_all(arguments)))
    torch.testing.assert_close(dirty, clean)
    assert not dirty[0].masked_select(past).any()


@each_kernel
@pytest.mark.parametrize("given", ["h0", "c0"])
def test_one_state_given(served: tuple[Recurrent, Impl], given: str) -> None:
    op, impl = served
    require(op.table, impl, device_of(impl), torch.float32)
    if given == "c0" and not op.has_cell:
        pytest.skip("there is no c")
    arguments = Case(6, 3, 20, 33, bidirectional=True).arguments(op, device_of(impl), torch.float32)
    arguments = arguments._replace(**{"h0" if given == "c0" else "c0": None})
    results = []
    for kernel in (impl.kernel, op.reference):
        outputs = Outputs(*kernel.forward(*arguments.saving(True)))
        grads = kernel.backward(
            *grads_like(outputs), *arguments, outputs.y, outputs.gates, outputs.cells, needs_all(arguments)
        )
        results.append([*outputs, *flat(grads)])
    assert_gradients(*results)


@each_kernel
def test_only_needed_gradients(served: tuple[Recurrent, Impl]) -> None:
    op, impl = served
    require(op.table, impl, device_of(impl), torch.float32)
    case = Case(6, 3, 20, 33, P=9 if op is LSTM else 0, bidirectional=True, reset=True, reset_state=True)
    arguments = case.arguments(op, device_of(impl), torch.float32)
    outputs = Outputs(*impl.kernel.forward(*arguments.saving(True)))

    def backward(needs: list[bool], grads: list[Tensor | None]) -> list[Tensor]:
        return flat(impl.kernel.backward(*grads, *arguments, outputs.y, outputs.gates, outputs.cells, needs))

    full = backward(needs_all(arguments), grads_like(outputs))
    for wanted in range(len(full)):
        some = backward([k == wanted for k in range(len(full))], grads_like(outputs))
        torch.testing.assert_close(some[wanted], full[wanted])
    # A gradient that nobody sends counts as zeros.
    for missing in range(4):
        grads = grads_like(outputs)
        zeros = [torch.zeros_like(g) if k == missing and g is not None else g for k, g in enumerate(grads)]
        grads[missing] = None
        torch.testing.assert_close(backward(needs_all(arguments), grads), backward(needs_all(arguments), zeros))


GRADCHECK_CASES = [
    Case(3, 2, 3, 5),
    Case(4, 3, 2, 9, bidirectional=True, state=False),
    Case(4, 3, 2, 4, bidirectional=True, packed=True),
    Case(4, 3, 2, 4, lengths=True, reset=True, reset_state=True),
    Case(4, 2, 3, 5, P=2),
]


@each_implementation
@pytest.mark.parametrize("case", GRADCHECK_CASES, ids=name_of)
def test_gradcheck(served: tuple[Recurrent, Impl], case: Case) -> None:
    op, impl = served
    require(op.table, impl, device_of(impl), torch.float64)
    if case.P and op is not LSTM:
        pytest.skip("only the LSTM has a projection")
    arguments = case.arguments(op, device_of(impl), torch.float64)
    tensors = [t for t in (arguments.x, *arguments[1:3], *arguments[8:], *arguments.weights) if t is not None]

    def call(*tensors: Tensor) -> tuple[Tensor, ...]:
        rest = list(tensors)

        def next_like(t: Tensor | None) -> Tensor | None:
            return None if t is None else rest.pop(0)

        x, h0, c0, reset_h, reset_c = (next_like(t) for t in (arguments.x, *arguments[1:3], *arguments[8:]))
        changed = arguments._replace(x=x, h0=h0, c0=c0, reset_h=reset_h, reset_c=reset_c, weights=rest)
        outputs = op(changed, save_cells=True)
        return tuple(t for t in (*outputs[:3], outputs.cells) if t.numel())

    for t in tensors:
        t.requires_grad_()
    with fastseq.use_backend(impl.name):
        # One random direction instead of every element: the cases are many.
        assert torch.autograd.gradcheck(call, tensors, fast_mode=True)
        assert torch.autograd.gradgradcheck(call, tensors, fast_mode=True)


@each_op
def test_double_backward_where_one_input_depends_on_another(op: Recurrent) -> None:
    arguments = Case(3, 2, 5, 5).arguments(op, "cpu", torch.float64)
    h0 = arguments.h0.requires_grad_()

    def chained() -> Tensor:
        h, c = h0, h0 * 2 if op.has_cell else None
        for _ in range(3):  # every input is made from the state
            h, c = op(arguments._replace(x=torch.tanh(h).expand(3, 2, 5), h0=h, c0=c))[1:3]
            c = c if op.has_cell else None
        return h.square().sum()

    once = torch.autograd.grad(chained(), h0)[0]
    twice = torch.autograd.grad(chained(), h0, create_graph=True)[0]
    torch.testing.assert_close(twice, once)


@each_op
def test_double_backward_does_not_read_past_a_length(op: Recurrent) -> None:
    arguments = Case(5, 2, 3, 4).arguments(op, "cpu", torch.float64)._replace(lengths=torch.tensor([5, 2]))
    x = arguments.x.clone()
    x[3:, 1] = float("nan")
    leaves = [x.requires_grad_(), *(w.requires_grad_() for w in arguments.weights)]
    y = op(arguments._replace(x=x)).y
    for grad in torch.autograd.grad(y.sum(), leaves, create_graph=True):
        assert torch.isfinite(grad).all()


@each_implementation
@each_dtype
def test_split_run_equals_whole(served: tuple[Recurrent, Impl], dtype: torch.dtype) -> None:
    op, impl = served
    require(op.table, impl, device_of(impl), dtype)
    arguments = Case(21, 3, 17, 24).arguments(op, device_of(impl), dtype)
    leaves = [t.requires_grad_() for t in (arguments.x, arguments.h0)]
    with fastseq.use_backend(impl.name):
        whole = op(arguments)
        first = op(arguments._replace(x=arguments.x[:8]))
        second = op(arguments._replace(x=arguments.x[8:], h0=first.h_n, c0=first.c_n if op.has_cell else None))
    split = [torch.cat([first.y, second.y]), second.h_n, *([second.c_n] if op.has_cell else [])]
    torch.testing.assert_close(split, list(whole[: len(split)]))
    grads = [torch.ones_like(t) for t in split]
    torch.testing.assert_close(
        torch.autograd.grad(split, leaves, grads), torch.autograd.grad(whole[: len(split)], leaves, grads)
    )


@each_kernel
def test_non_contiguous_everything(served: tuple[Recurrent, Impl]) -> None:
    op, impl = served
    require(op.table, impl, device_of(impl), torch.float32)
    arguments = Case(7, 5, 12, 10, reset=True, reset_state=True).arguments(op, device_of(impl), torch.float32)
    dy = torch.randn(7, 5, 10)

    def strided(t: Tensor | None) -> Tensor | None:
        if t is None:
            return None
        t = t.detach()
        return torch.stack([t, t], -1)[..., 0] if t.dim() == 1 else t.transpose(0, -1).contiguous().transpose(0, -1)

    def run(arguments: Arguments, dy: Tensor) -> list[Tensor]:
        leaves = [t for t in (*arguments[:3], *arguments[8:], *arguments.weights) if t is not None]
        leaves = [leaf.requires_grad_() for leaf in leaves]
        with fastseq.use_backend(impl.name):
            outputs = op(arguments)
        return [*outputs[:3], *torch.autograd.grad(outputs.y, leaves, dy)]

    x, h0, c0, weights, bidirectional, *_, reset, reset_h, reset_c = arguments
    changed = Arguments(
        strided(x), strided(h0), strided(c0), [strided(w) for w in weights], bidirectional, None, None, strided(reset),
        strided(reset_h), strided(reset_c),
    )  # fmt: skip
    assert not changed.x.is_contiguous()
    torch.testing.assert_close(run(changed, strided(dy)), run(arguments, dy))
    broadcast = torch.ones(()).expand(7, 5, 10)  # what y.sum().backward() sends
    torch.testing.assert_close(run(arguments, broadcast), run(arguments, broadcast.contiguous()))


@each_kernel
def test_long_sequences_are_as_exact_as_torch(served: tuple[Recurrent, Impl]) -> None:
    op, impl = served
    require(op.table, impl, device_of(impl), torch.float32)
    arguments = Case(1000, 2, 64, 64).arguments(op, "cpu", torch.float32)
    exact = op.reference.forward(*widened(arguments).saving(False))[0]
    hx = arguments[1:3] if op.has_cell else arguments.h0
    theirs = getattr(torch, op.name)(arguments.x, hx, arguments.weights, True, 1, 0.0, False, False, False)[0]
    ours = impl.kernel.forward(*arguments.saving(False))[0]
    assert (ours - exact).abs().max() <= 2 * (theirs - exact).abs().max()


@each_kernel
def test_nan_and_inf_stay_where_they_are(served: tuple[Recurrent, Impl]) -> None:
    op, impl = served
    require(op.table, impl, device_of(impl), torch.float32)
    arguments = Case(6, 9, 20, 24).arguments(op, "cpu", torch.float32)
    x = arguments.x
    x[2, 1, 3] = float("nan")
    x[3, 4, 5] = float("inf")
    x[1, 6, 7] = -float("inf")
    hx = arguments[1:3] if op.has_cell else arguments.h0
    theirs = getattr(torch, op.name)(x, hx, arguments.weights, True, 1, 0.0, False, False, False)
    ours = impl.kernel.forward(*arguments.saving(False))
    for got, want in zip(ours, theirs, strict=False):
        torch.testing.assert_close(got, want.view_as(got), equal_nan=True)


@each_kernel
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16], ids=name_of)
def test_weights_in_half_precision(served: tuple[Recurrent, Impl], stored: torch.dtype) -> None:
    """Read as they are and packed, they are what the same values in float32 are, to the bit."""
    op, impl = served
    require(op.table, impl, device_of(impl), torch.float32)
    H = 500
    bits = torch.randint(-(2**15), 2**15, (op.gates * H,))
    # Zeros, denormals, the largest numbers, infinities and NaN of either format, and of either sign.
    special = torch.tensor([0, 1, 0x3FF, 0x7F, 0x7BFF, 0x7C00, 0x7E00, 0x7F7F, 0x7F80, 0x7FC0])
    bits[:20] = torch.cat([special, special - 2**15])
    w_ih = bits.to(torch.int16).view(stored).unsqueeze(-1)
    for T in (1, 9):
        arguments = Arguments(torch.ones(T, 1, 1), None, None, [w_ih, torch.zeros(op.gates * H, H, dtype=stored)])
        op.check(arguments)
        wide = arguments._replace(weights=[w.float() for w in arguments.weights])
        got, want = impl.kernel.forward(*arguments.saving(False)), impl.kernel.forward(*wide.saving(False))
        torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)
    for case in (Case(1, 1, 9, 21), Case(7, 3, 9, 21, bidirectional=True), Case(30, 5, 17, 33, packed=True)):
        arguments = case.arguments(op, "cpu", torch.float32)
        half = arguments._replace(weights=[w.to(stored) for w in arguments.weights])
        wide = arguments._replace(weights=[w.to(stored).float() for w in arguments.weights])
        got, want = impl.kernel.forward(*half.saving(False)), impl.kernel.forward(*wide.saving(False))
        torch.testing.assert_close(got, want, rtol=0, atol=0)
        with pytest.raises(ValueError, match=r"weights\[0\] must be torch.float32"):
            op.check(half._replace(x=half.x.requires_grad_()))
        if impl.is_native:
            with pytest.raises(RuntimeError, match="must be on the CPU and have the right dtype"):
                impl.kernel.forward(*half.saving(True))


@each_op
@pytest.mark.parametrize(
    "case",
    [
        Case(4, 3, 5, 6),
        Case(3, 2, 4, 5, bidirectional=True, state=False),
        Case(4, 3, 5, 6, bidirectional=True, reset=True, reset_state=True),
        Case(4, 3, 5, 6, packed=True),
    ],
    ids=name_of,
)
def test_opcheck(op: Recurrent, case: Case) -> None:
    arguments = case.arguments(op, "cpu", torch.float32)
    plain = tuple(arguments)
    for t in (*arguments[:3], *arguments[8:], *arguments.weights):
        if t is not None:
            t.requires_grad_()
    torch.library.opcheck(getattr(torch.ops.fastseq, op.name).default, arguments.saving(False))
    detached = Arguments(
        *(t.detach() if isinstance(t, Tensor) else [w.detach() for w in t] if isinstance(t, list) else t for t in plain)
    )
    outputs = Outputs(*op.reference.forward(*detached.saving(True)))
    torch.library.opcheck(
        getattr(torch.ops.fastseq, f"{op.name}_backward").default,
        (*grads_like(outputs), *detached, outputs.y, outputs.gates, outputs.cells, needs_all(detached)),
    )


@each_op
def test_two_python_threads_at_once(op: Recurrent, threads: int) -> None:
    arguments = Case(50, 1, 64, 128).arguments(op, "cpu", torch.float32)
    for w in arguments.weights:
        w.requires_grad_()
    dy = torch.randn(50, 1, 128)

    def run() -> list[Tensor]:
        y = op(arguments).y
        return [y, *torch.autograd.grad(y, arguments.weights, dy)]

    want, failures = run(), []

    def work() -> None:
        try:
            for _ in range(20):
                torch.testing.assert_close(run(), want)
        except BaseException as error:
            failures.append(error)

    workers = [threading.Thread(target=work) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not failures


@pytest.mark.parametrize("count", [3, 4, 5, 8])
@each_cpu_kernel
def test_more_threads_than_shares_come_out_even(served: tuple[Recurrent, Impl], count: int) -> None:
    """Odd and even teams, for one direction and for two, split by units and by rows, with rows of all lengths."""
    op, impl = served
    require(op.table, impl, "cpu", torch.float32)
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    cases = [
        Case(20, 1, 48, 100),
        Case(20, 2, 48, 100, bidirectional=True),
        Case(9, 48, 33, 60),
        Case(30, 48, 33, 60, packed=True, bidirectional=True),
        Case(20, 48, 33, 60, lengths=True, reset=True),
    ]
    if op is LSTM:
        cases += [Case(20, 2, 48, 100, P=40, bidirectional=True), Case(9, 48, 33, 60, P=33)]
    try:
        for case in cases:
            arguments = case.arguments(op, "cpu", torch.float32)
            outputs, want_grads = expected(op, case, "cpu", torch.float32)
            ours = Outputs(*impl.kernel.forward(*arguments.saving(True)))
            torch.testing.assert_close(ours[:3], outputs[:3])
            grads = impl.kernel.backward(
                *grads_like(outputs), *arguments, outputs.y, outputs.gates, outputs.cells, needs_all(arguments)
            )
            assert_gradients(flat(grads), want_grads)
    finally:
        torch.set_num_threads(before)


@each_op
@pytest.mark.parametrize(
    "case", [Case(30, 5, 40, 72, bidirectional=True), Case(30, 20, 40, 72, packed=True)], ids=name_of
)
def test_repeated_runs_are_bit_equal(op: Recurrent, case: Case, threads: int) -> None:
    arguments = case.arguments(op, "cpu", torch.float32)
    first = op(arguments)
    for _ in range(5):
        for got, want in zip(op(arguments), first, strict=True):
            assert torch.equal(got, want)


BAD_ARGUMENTS = [
    (lambda a: dict(x=a.x[0]), r"x must be \[T, B, I\], got 2 dimensions"),
    (lambda a: dict(x=a.x[:0]), "at least one step, got T=0"),
    (lambda a: dict(h0=a.h0[:, :1]), r"h0 must be \[1, 3, 6\], got \[1, 1, 6\]"),
    (lambda a: dict(h0=a.h0.double()), "h0 must be torch.float32 on cpu like x, got torch.float64"),
    (lambda a: dict(weights=a.weights[:3][:-2]), "weights must hold 2 tensors or 4 with biases.*got 1"),
    (lambda a: dict(weights=[a.weights[0][:, :2], *a.weights[1:]]), r"weights\[0\] must be"),
    (lambda a: dict(weights=[*a.weights[:3], a.weights[3].double()]), r"weights\[3\] must be torch.float32"),
    (lambda a: dict(bidirectional=True), r"weights\[1\] must be|weights\[2\] must be|weights must hold"),
    (lambda a: dict(lengths=torch.tensor([1, 2])), r"lengths must be int64 \[3\] on the CPU, got torch.int64 \[2\]"),
    (lambda a: dict(lengths=torch.tensor([1, 2, 5])), "lengths must be between 0 and T=4, got 1 to 5"),
    (lambda a: dict(lengths=torch.tensor([1, -2, 3])), "lengths must be between 0 and T=4, got -2 to 3"),
    (lambda a: dict(reset=torch.zeros(3, 4, dtype=torch.bool)), r"reset must be torch.bool \[4, 3\]"),
    (lambda a: dict(reset=torch.zeros(4, 3)), r"reset must be torch.bool \[4, 3\] on cpu like x, got torch.float32"),
    (lambda a: dict(reset_h=a.h0[:, :1]), r"reset_h must be \[1, 3, 6\]"),
    (
        lambda a: dict(x=a.x.flatten(0, 1), batch_sizes=torch.tensor([4, 5, 3])),
        "batch_sizes must be positive, not rise",
    ),
    (lambda a: dict(x=a.x.flatten(0, 1), batch_sizes=torch.tensor([12, 0])), "batch_sizes must be positive, not rise"),
    (lambda a: dict(x=a.x[..., :0]), "at least one feature, got I=0"),
    (lambda a: dict(batch_sizes=torch.tensor([3, 1])), r"x must be packed, \[N, I\], got 3 dimensions"),
]


@pytest.mark.parametrize("function", [lstm, gru, rnn])
@pytest.mark.parametrize(("change", "message"), BAD_ARGUMENTS)
def test_bad_arguments_name_the_argument(function, change, message: str) -> None:
    op = {lstm: LSTM, gru: GRU, rnn: RNN_TANH}[function]
    arguments = Case(4, 3, 5, 6).arguments(op, "cpu", torch.float32)
    given = arguments._replace(**change(arguments))._asdict()
    if not op.has_cell:
        del given["c0"], given["reset_c"]
    with pytest.raises(ValueError, match=message):
        function(**given)
    torch.testing.assert_close(op(arguments)[:2], op.reference.forward(*arguments.saving(False))[:2])


def test_a_square_projection_is_refused() -> None:
    arguments = Case(4, 3, 5, 6, P=6).arguments(LSTM, "cpu", torch.float32)
    with pytest.raises(ValueError, match="a projection must change the size"):
        lstm(*arguments[:4])
    require_native()
    with pytest.raises(RuntimeError, match="lstm: w_hr must be"):
        torch.ops.fastseq_native.lstm(*arguments.saving(False))


def test_unknown_nonlinearity() -> None:
    arguments = Case(4, 3, 5, 6).arguments(RNN_TANH, "cpu", torch.float32)
    with pytest.raises(ValueError, match="nonlinearity must be 'tanh' or 'relu', got 'gelu'"):
        rnn(arguments.x, None, arguments.weights, nonlinearity="gelu")


@each_op
def test_the_extension_checks_for_itself(op: Recurrent) -> None:
    require_native()
    arguments = Case(4, 3, 5, 6).arguments(op, "cpu", torch.float32)
    forward = getattr(torch.ops.fastseq_native, op.name)
    packed = dict(x=torch.randn(6, 5), h0=None, c0=None)
    for change in (
        dict(x=arguments.x[..., :4]),
        dict(h0=arguments.h0[:, :2]),
        dict(h0=arguments.h0.double()),
        dict(weights=[arguments.weights[0], arguments.weights[1][:, :4], *arguments.weights[2:]]),
        dict(x=arguments.x.int()),
        dict(x=arguments.x[:0]),
        dict(lengths=torch.tensor([1, 2, 9])),
        dict(lengths=torch.tensor([1, -1, 2])),
        dict(lengths=torch.tensor([1, 2])),
        dict(reset=torch.zeros(3, 3, dtype=torch.bool)),
        dict(**packed, batch_sizes=torch.tensor([3, 1])),
        dict(**packed, batch_sizes=torch.tensor([2, 4])),
        dict(**packed, batch_sizes=torch.tensor([4, 3, -1])),
        dict(**packed, batch_sizes=torch.tensor([3.0, 3.0])),
    ):
        with pytest.raises(RuntimeError, match=f"{op.name}: "):
            forward(*arguments._replace(**change).saving(False))
    torch.testing.assert_close(forward(*arguments.saving(False))[0], op.reference.forward(*arguments.saving(False))[0])


def ulps(got: Tensor, exact: Tensor) -> Tensor:
    """Distance from the exact float64 values in units of float32's last place."""
    rounded = exact.float()
    ulp = torch.nextafter(rounded.abs(), torch.tensor(float("inf"))) - rounded.abs()
    return ((got.double() - exact).abs() / ulp.double()).max()


@pytest.mark.parametrize("impl", [i for i in LSTM.table.impls[:-1] if device_of(i) == "cpu"], ids=lambda i: i.name)
def test_gate_functions_are_within_their_stated_error(impl: Impl) -> None:
    """One step of an LSTM with one gate in play is that gate's function: c_n = f * c0 + i * g."""
    require(LSTM.table, impl, "cpu", torch.float32)
    a = torch.cat([torch.linspace(-80, 80, 20001), torch.linspace(-1, 1, 20001), torch.logspace(-30, 0, 999)])
    ones = torch.ones(1, len(a), 1)
    shut, open_ = -200.0, 200.0  # sigmoid is 1e-38 and exactly 1

    def cell(gates: list[float], c0: Tensor) -> Tensor:
        # The unit's pre-activation is its own input, so one row of the batch is one argument.
        w_ih = torch.tensor([[float(g == "x")] for g in gates])
        bias = torch.tensor([0.0 if g == "x" else g for g in gates])
        weights = [w_ih, torch.zeros(4, 1), bias, torch.zeros(4)]
        with fastseq.use_backend(impl.name):
            return lstm(a.view(1, -1, 1), torch.zeros_like(ones), c0, weights)[2].flatten()

    sigmoid = cell([shut, "x", 0.0, open_], ones)
    tanh = cell([open_, shut, "x", open_], torch.zeros_like(ones))
    assert ulps(sigmoid, a.double().sigmoid()) <= 3
    assert ulps(tanh, a.double().tanh()) <= 4
