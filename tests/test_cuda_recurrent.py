"""The CUDA kernels of the recurrent ops against the reference, on the CPU, and what lays tensors out for them.

The kernels themselves run in an emulator of a GPU's threads (tests/emulator), on few small cases. What surrounds them
is tested on all cases, above a stand-in that says in PyTorch what the kernels have to do.
"""

import functools
import importlib
import itertools
import os
from collections.abc import Sequence
from types import SimpleNamespace

import pytest
import recurrent_stand_in
import torch
from conftest import assert_no_worse, require, require_native
from test_recurrent_ops import OPS, assert_gradients, each_op, expected, flat, name_of, needs_all
from torch import Tensor

import fastseq
from fastseq import jit, native
from fastseq.ops import recurrent_cuda
from fastseq.ops.contract import rounding
from fastseq.ops.lstm import LSTM
from fastseq.ops.recurrent import CASES, PROJECTION_CASES, Arguments, Case, Outputs, Recurrent, grads_like, running
from fastseq.ops.recurrent_cuda import Steps
from fastseq.ops.recurrent_steps import CELLS, implementation
from fastseq.registry import BackendError, Impl, Kernel, kernels_called


@functools.cache
def emulator() -> str:
    """The library with the kernels for tensors of the CPU."""
    return os.environ.get("FASTSEQ_EMULATOR") or str(importlib.import_module("emulator.build").library())


@functools.cache
def emulated() -> SimpleNamespace:
    torch.ops.load_library(emulator())
    return torch.ops.fastseq_emulated


MADE_BY = {"stand-in": lambda: recurrent_stand_in, "kernels": emulated}
each_maker = pytest.mark.parametrize("maker", MADE_BY)


def kernel(op: Recurrent, maker: str) -> Kernel:
    return implementation(Steps(CELLS[op.name], MADE_BY[maker]))


def backward(of: Kernel, arguments: Arguments, tape: Outputs, grads: list[Tensor | None]) -> list[Tensor]:
    return flat(of.backward(*grads, *arguments, tape.y, tape.gates, tape.cells, needs_all(arguments)))


def assert_outputs(got: Outputs, want: Outputs, arguments: Arguments) -> None:
    places = running(arguments)
    for name, ours, theirs in zip(Outputs._fields, got, want, strict=True):
        if name == "gates" and places is not None and ours.numel():
            ours, theirs = ours[:, places], theirs[:, places]  # nobody reads the tape past a row's end
        torch.testing.assert_close(ours, theirs)


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch):
    """Fills what torch.empty gives with NaN, so that an element that a kernel forgot cannot pass for a zero."""
    torch.use_deterministic_algorithms(True)
    monkeypatch.setattr(torch.backends.cudnn.rnn, "fp32_precision", "ieee")  # the kernels, too, may multiply as TF32
    yield
    torch.use_deterministic_algorithms(False)


# H below, at and above what a block has, B within a tile and over several, in words that two units share.
FEW = [
    Case(1, 1, 3, 5),
    Case(3, 3, 4, 8, bidirectional=True),
    Case(2, 17, 4, 19, bidirectional=True, bias=False),
    Case(4, 4, 5, 11, bidirectional=True, packed=True),
    Case(4, 4, 5, 12, bidirectional=True, lengths=True, reset=True, reset_state=True),
]
FEW_PROJECTIONS = [Case(4, 3, 5, 12, P=5, bidirectional=True, lengths=True, reset=True, reset_state=True)]
RUNS = [
    *(("stand-in", op, case) for op in OPS for case in CASES),
    *(("stand-in", LSTM, case) for case in PROJECTION_CASES),
    *(("stand-in", LSTM, Case(9, 5, 7, 16, P=7, bidirectional=True, lengths=True, reset=True)),),
    *(("kernels", op, case) for op in OPS for case in FEW),
    *(("kernels", LSTM, case) for case in FEW_PROJECTIONS),
]


@pytest.mark.parametrize(("maker", "op", "case"), RUNS, ids=name_of)
def test_forward_tape_and_backward(maker: str, op: Recurrent, case: Case) -> None:
    arguments = case.arguments(op, "cpu", torch.float32)
    want, want_grads = expected(op, case, "cpu", torch.float32)
    of = kernel(op, maker)
    ours = Outputs(*of.forward(*arguments.saving(True)))
    assert_outputs(ours, want, arguments)
    without = Outputs(*of.forward(*arguments.saving(False)))
    torch.testing.assert_close(without[:3], ours[:3])
    assert not without.gates.numel() and not without.cells.numel()
    for tape in (ours, want):
        assert_gradients(backward(of, arguments, tape, grads_like(want)), want_grads)


# What a large layer makes of a block on a GPU, a small one does where multiprocessors are few.
FEW_MULTIPROCESSORS = [
    ("9,232448", Case(2, 17, 4, 140)),  # 16 units a block
    ("5,232448", Case(2, 33, 4, 140)),  # 32, with weights in shared memory and several tiles of rows
    ("20,232448", Case(2, 33, 4, 140, bidirectional=True)),
]


@pytest.mark.parametrize(("chip", "case"), FEW_MULTIPROCESSORS, ids=name_of)
@each_op
def test_blocks_of_many_units(op: Recurrent, chip: str, case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTSEQ_EMULATOR_CHIP", chip)
    arguments = case.arguments(op, "cpu", torch.float32)
    want, want_grads = expected(op, case, "cpu", torch.float32)
    of = kernel(op, "kernels")
    assert_outputs(Outputs(*of.forward(*arguments.saving(True))), want, arguments)
    assert_gradients(backward(of, arguments, want, grads_like(want)), want_grads)


@each_op
def test_tf32(op: Recurrent, monkeypatch: pytest.MonkeyPatch) -> None:
    """Products of numbers with 11 digits: not exact, and close to it."""
    case = Case(3, 17, 4, 19, bidirectional=True)
    arguments = case.arguments(op, "cpu", torch.float32)
    want, want_grads = expected(op, case, "cpu", torch.float32)
    of = kernel(op, "kernels")
    exact = of.forward(*arguments.saving(True))[0]
    monkeypatch.setattr(torch.backends.cudnn.rnn, "fp32_precision", "tf32")
    y = of.forward(*arguments.saving(True))[0]
    assert not torch.equal(y, exact)
    got = [y, *backward(of, arguments, want, grads_like(want))]
    for ours, theirs in zip(got, [want.y, *want_grads], strict=True):
        torch.testing.assert_close(ours, theirs.float(), **rounding(theirs, torch.float32, 2, tf32=True))


HALF_CASES = [
    ("stand-in", Case(9, 5, 16, 40, bidirectional=True, lengths=True, reset=True, reset_state=True)),
    ("stand-in", Case(20, 5, 16, 65, packed=True)),
    ("kernels", Case(3, 3, 8, 11, bidirectional=True, lengths=True, reset=True)),
]
HALF_PROJECTIONS = [
    Case(30, 5, 16, 40, P=17, bidirectional=True),
    Case(20, 9, 16, 33, P=50, bidirectional=True, lengths=True, reset=True, reset_state=True),
    Case(50, 4, 64, 128, P=32, packed=True),
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=name_of)
@pytest.mark.parametrize(
    ("op", "maker", "case"),
    [
        *((op, maker, case) for op, (maker, case) in itertools.product(OPS, HALF_CASES)),
        *((LSTM, "stand-in", case) for case in HALF_PROJECTIONS),
    ],
    ids=name_of,
)
def test_half_precision_is_no_worse_than_the_reference_in_it(
    op: Recurrent, maker: str, case: Case, dtype: torch.dtype
) -> None:
    """All tensors in half precision; sums and states are float32 in the kernels, and half in the reference."""
    arguments = case.arguments(op, "cpu", dtype)
    wide = Arguments(*(doubled(value, dtype) for value in arguments))
    exact = Outputs(*op.reference.forward(*wide.saving(True)))
    of, places = kernel(op, maker), running(arguments)

    def compared(outputs: tuple[Tensor, ...]) -> list[Tensor]:
        y, h_n, c_n, gates, cells = outputs
        return [
            t for t in (y, h_n, c_n, gates if places is None or not len(gates) else gates[:, places], cells) if len(t)
        ]

    ours, theirs = (k.forward(*arguments.saving(True)) for k in (of, op.reference))
    assert_no_worse(compared(ours), compared(theirs), compared(exact))
    # From the same tape, so that a ReLU that rounding has shut or opened is so for all.
    tape = Outputs(*(t.to(dtype) for t in exact))
    grads = [None if g is None else g.to(dtype) for g in grads_like(exact)]
    ours, theirs = (backward(k, arguments, tape, grads) for k in (of, op.reference))
    wanted = backward(op.reference, wide, Outputs(*(t.double() for t in tape)), [doubled(g, dtype) for g in grads])
    assert_no_worse(*([g for g in found if g.numel()] for found in (ours, theirs, wanted)))


def doubled(value: object, dtype: torch.dtype) -> object:
    """Tensors of this dtype in float64, also in lists."""
    if isinstance(value, list):
        return [doubled(item, dtype) for item in value]
    return value.double() if isinstance(value, Tensor) and value.dtype == dtype else value


MIXED = [
    *(("stand-in", op, Case(4, 3, 6, 20, bidirectional=True, packed=True)) for op in OPS),
    *(("kernels", op, Case(3, 3, 6, 12, lengths=True, reset=True, reset_state=True)) for op in OPS),
    ("stand-in", LSTM, Case(4, 3, 6, 20, P=9, lengths=True)),
]


@pytest.mark.parametrize(("maker", "op", "case"), MIXED, ids=name_of)
def test_tapes_mix_with_the_extensions(maker: str, op: Recurrent, case: Case) -> None:
    require_native()
    (cpp,) = (impl.kernel for impl in op.table.impls if impl.name == "cpp")
    arguments = case.arguments(op, "cpu", torch.float32)
    tapes = [Outputs(*of.forward(*arguments.saving(True))) for of in (kernel(op, maker), cpp)]
    assert_outputs(*tapes, arguments)
    grads = grads_like(tapes[1])
    want = backward(cpp, arguments, tapes[1], grads)
    assert_gradients(backward(kernel(op, maker), arguments, tapes[1], grads), want)
    assert_gradients(backward(cpp, arguments, tapes[0], grads), want)


@each_op
def test_half_precision_weights_beside_float32(op: Recurrent) -> None:
    arguments = Case(5, 3, 6, 20, bidirectional=True).arguments(op, "cpu", torch.float32)
    arguments = arguments._replace(weights=[w.bfloat16() for w in arguments.weights])
    ours, theirs = (of.forward(*arguments.saving(False, True)) for of in (kernel(op, "stand-in"), op.reference))
    torch.testing.assert_close(ours, theirs)


@each_maker
@pytest.mark.parametrize(("op", "P"), [*((op, 0) for op in OPS), (LSTM, 5)], ids=name_of)
def test_what_lies_past_a_length_is_never_read(op: Recurrent, P: int, maker: str) -> None:
    """Not even by rows without a step, whose state stays."""
    arguments = Case(4, 5, 6, 12, P=P, bidirectional=True).arguments(op, "cpu", torch.float32)
    arguments = arguments._replace(lengths=torch.tensor([3, 0, 4, 1, 0]))
    past = (torch.arange(4).unsqueeze(-1) >= arguments.lengths).unsqueeze(-1)
    of = kernel(op, maker)
    outputs = Outputs(*of.forward(*arguments.saving(True)))
    grads = grads_like(outputs)
    clean = backward(of, arguments, outputs, grads)
    bad = arguments._replace(x=arguments.x.masked_fill(past, float("nan")))
    grads[0] = grads[0].masked_fill(past, float("nan"))
    torch.testing.assert_close(of.forward(*bad.saving(True))[:3], tuple(outputs[:3]))
    dirty = backward(of, bad, outputs, grads)
    torch.testing.assert_close(dirty, clean)
    assert not dirty[0].masked_select(past).any()
    assert torch.equal(outputs.h_n[:, 1], arguments.h0[:, 1]) and not outputs.y[:, 1].any()
    assert torch.equal(clean[1][:, 1], grads[1][:, 1])  # of h_n, nothing else reaches this row's h0


def test_lengths_are_checked_where_nobody_else_has() -> None:
    arguments = Case(4, 3, 6, 12).arguments(LSTM, "cpu", torch.float32)
    arguments = arguments._replace(lengths=torch.tensor([1, 5, 2]))
    with pytest.raises(ValueError, match="lstm: lengths must be between 0 and T=4, got 1 to 5"):
        kernel(LSTM, "stand-in").forward(*arguments.saving(False))


@each_maker
@pytest.mark.parametrize(("op", "given"), [*((op, "h0") for op in OPS), (LSTM, "c0")], ids=name_of)
def test_one_state_given_and_gradients_nobody_sends(op: Recurrent, given: str, maker: str) -> None:
    arguments = Case(3, 3, 6, 12, bidirectional=True).arguments(op, "cpu", torch.float32)
    arguments = arguments._replace(**{"h0" if given == "c0" else "c0": None})
    ours, theirs = (Outputs(*of.forward(*arguments.saving(True))) for of in (kernel(op, maker), op.reference))
    assert_outputs(ours, theirs, arguments)
    for kept in range(4):
        grads = [g if k == kept else None for k, g in enumerate(grads_like(theirs))]
        if grads[kept] is not None:
            assert_gradients(*(backward(of, arguments, theirs, grads) for of in (kernel(op, maker), op.reference)))


@each_op
def test_only_needed_gradients(op: Recurrent) -> None:
    case = Case(2, 3, 6, 12, P=9 if op is LSTM else 0, reset=True, reset_state=True)
    arguments = case.arguments(op, "cpu", torch.float32)
    of = kernel(op, "stand-in")
    outputs = Outputs(*of.forward(*arguments.saving(True)))
    grads = grads_like(outputs)
    full = backward(of, arguments, outputs, grads)
    for wanted in range(len(full)):
        needs = [k == wanted for k in range(len(full))]
        some = flat(of.backward(*grads, *arguments, outputs.y, outputs.gates, outputs.cells, needs))
        torch.testing.assert_close(some[wanted], full[wanted])
        state = wanted in (1, 2, 3, 4)  # both parts of a state come together
        assert all(not g.numel() for k, g in enumerate(some) if k != wanted and not (state and k in (1, 2, 3, 4)))


@pytest.mark.parametrize(("op", "P"), [*((op, 0) for op in OPS), (LSTM, 5)], ids=name_of)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
def test_autocast_around_it_changes_nothing(op: Recurrent, P: int, dtype: torch.dtype) -> None:
    case = Case(3, 3, 6, 12, P=P, bidirectional=True, lengths=True, reset=True, reset_state=True)
    arguments = case.arguments(op, "cpu", dtype)
    of = kernel(op, "stand-in")
    outputs = Outputs(*of.forward(*arguments.saving(True)))
    grads = grads_like(outputs)
    want = backward(of, arguments, outputs, grads)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_equal(of.forward(*arguments.saving(True)), outputs)
        assert_equal(backward(of, arguments, outputs, grads), want)


def assert_equal(got: Sequence[Tensor], want: Sequence[Tensor]) -> None:
    torch.testing.assert_close(tuple(got), tuple(want), rtol=0, atol=0, equal_nan=True)


@each_maker
@pytest.mark.parametrize("H", [11, 12])
@each_op
def test_nan_stays_in_its_row(op: Recurrent, H: int, maker: str) -> None:
    """Not only for its own sake: a NaN with all bits set would stand for a step that has not been made."""
    arguments = Case(3, 3, 6, H).arguments(op, "cpu", torch.float32)
    arguments.x[1, 1, 0] = torch.tensor(-1, dtype=torch.int32).view(torch.float32)
    ours, theirs = (Outputs(*of.forward(*arguments.saving(True))) for of in (kernel(op, maker), op.reference))
    torch.testing.assert_close(tuple(ours), tuple(theirs), equal_nan=True)
    grads = grads_like(theirs)
    ours, theirs = (backward(of, arguments, theirs, grads) for of in (kernel(op, maker), op.reference))
    for got, want in zip(ours, theirs, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=2e-5, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=name_of)
@each_op
def test_two_nans_of_half_precision_are_not_what_is_missing(op: Recurrent, dtype: torch.dtype) -> None:
    arguments = Case(3, 3, 6, 12).arguments(op, "cpu", dtype)
    arguments.x[1, 1] = torch.tensor(-1, dtype=torch.int16).view(dtype)
    of = kernel(op, "kernels")
    outputs = Outputs(*of.forward(*arguments.saving(True)))
    assert outputs.y.isnan().any(-1).nonzero().tolist() == [[1, 1], [2, 1]]
    backward(of, arguments, outputs, grads_like(outputs))
    assert recurrent_cuda._status(arguments.x.device).item() == 0  # nobody has waited in vain


@each_maker
def test_weights_that_start_anywhere(maker: str) -> None:
    """A kernel reads 16 bytes at once, and a parameter may be a part of something larger."""
    arguments = Case(3, 2, 6, 12, reset=True, reset_state=True).arguments(LSTM, "cpu", torch.float32)
    want = kernel(LSTM, maker).forward(*arguments.saving(False))

    def moved(t: Tensor) -> Tensor:
        return torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape)

    x, h0, c0, weights, *options, reset_h, reset_c = arguments
    moved_weights = [moved(w) for w in weights]
    moved_arguments = Arguments(x, moved(h0), moved(c0), moved_weights, *options, moved(reset_h), moved(reset_c))
    torch.testing.assert_close(kernel(LSTM, maker).forward(*moved_arguments.saving(False)), want, rtol=0, atol=0)


def test_a_kernel_that_gave_up_is_reported_once() -> None:
    arguments = Case(3, 2, 6, 12).arguments(LSTM, "cpu", torch.float32)
    of = kernel(LSTM, "stand-in")
    of.forward(*arguments.saving(False))
    recurrent_cuda._status(arguments.x.device).fill_(1)
    with pytest.raises(RuntimeError, match="lstm: a CUDA kernel that an earlier call has launched waited in vain"):
        of.forward(*arguments.saving(False))
    of.forward(*arguments.saving(False))


@pytest.fixture
def plans(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """What has been planned; nothing fits where more than 100 units are asked about."""
    asked: list[tuple[int, ...]] = []
    ops = SimpleNamespace(recurrent_plan=lambda *of: (asked.append(of), [] if of[1] > 100 else [0, 1, 1, 1, 0])[1])
    monkeypatch.setattr(native, "cuda_ops", lambda: ops)
    recurrent_cuda._fits.cache_clear()
    yield asked
    recurrent_cuda._fits.cache_clear()


def cuda_row(op: Recurrent) -> Impl:
    return next(impl for impl in op.table.impls if impl.name == "cuda")


def test_layers_that_do_not_fit_are_refused(plans: list[tuple[int, ...]]) -> None:
    needs = cuda_row(LSTM).needs
    fits = Case(4, 3, 6, 99, bidirectional=True).arguments(LSTM, "cpu", torch.bfloat16)
    assert needs(*fits) is needs(*fits.saving(True)) is None
    assert plans == [(4, 99, 208, 3, 2, 132, 227 << 10), (1, 99, 832, 3, 2, 132, 227 << 10)]
    packed = Case(4, 3, 6, 101, packed=True).arguments(LSTM, "cpu", torch.float32)
    reason = "the weights of 101 units do not fit on the chip beside 3 rows"
    nothing = torch.empty(0)
    for options in (packed, packed.saving(True), (*packed, nothing, nothing, nothing, [True] * 9)):
        assert needs(*options) == reason
    assert needs(*Case(4, 0, 6, 101).arguments(LSTM, "cpu", torch.float32)) is None


@each_op
def test_it_serves_only_where_it_is_asked_for_by_name(
    op: Recurrent, nothing_asked_for: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    impl, table = cuda_row(op), op.table
    monkeypatch.delenv("FASTSEQ_EMULATOR", raising=False)
    monkeypatch.setattr(Impl, "unavailable", lambda self: None)
    monkeypatch.setattr("fastseq.selfcheck.failure", lambda *_: None)
    for name in ("_choices", "_preferred", "_rules"):
        monkeypatch.setattr(table, name, {})
    reason = 'not yet measured against Triton on a GPU; use_backend("cuda") asks for it'
    for dtype in (torch.float32, torch.bfloat16):
        assert table.reason_to_pass_over(impl, "cuda", dtype) == reason
        assert table.reason_against(impl, "cuda", dtype) is None
        assert [i.name for i in table.candidates("cuda", dtype)] == ["triton", "reference"]
        assert table.preferred("cuda", dtype).name == "triton"
        with fastseq.use_backend("cuda"):
            assert table.candidates("cuda", dtype) == [impl] and table.computes_in("cuda", dtype) == dtype
    with fastseq.use_backend("cuda"), pytest.raises(BackendError, match="runs on cuda, not on cpu"):
        table.candidates("cpu", torch.float32)
    with fastseq.use_backend("cuda"), pytest.raises(BackendError, match="takes bfloat16 and float16 and float32"):
        table.candidates("cuda", torch.float64)


def test_why_the_kernels_are_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    impl = cuda_row(LSTM)
    monkeypatch.delenv("FASTSEQ_EMULATOR", raising=False)
    monkeypatch.setattr(native, "without_cuda", native.without_cuda.__wrapped__)
    monkeypatch.setattr(native, "unavailable", lambda: None)
    monkeypatch.setattr(jit, "why_no_gpu", lambda: "no GPU")
    find = "_dispatch_has_kernel_for_dispatch_key"
    monkeypatch.setattr(torch._C, find, lambda op, key: (op, key) == ("fastseq_native::recurrent_steps", "CUDA"))
    assert impl.unavailable() == "no GPU"
    monkeypatch.setattr(torch._C, find, lambda op, key: False)
    assert impl.unavailable().startswith("the extension was built without CUDA (no nvcc, ")
    monkeypatch.undo()
    with pytest.raises(RuntimeError, match="does not exist"):
        torch._C._dispatch_has_kernel_for_dispatch_key("fastseq_native::no_such_op", "CUDA")
    monkeypatch.setattr(native, "unavailable", lambda: "no extension")
    monkeypatch.setattr(native, "without_cuda", native.without_cuda.__wrapped__)
    monkeypatch.delenv("FASTSEQ_EMULATOR", raising=False)
    assert impl.unavailable() == "no extension"


@each_op
def test_the_emulator_serves_the_cpu_by_name(op: Recurrent, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTSEQ_EMULATOR", emulator())
    for name in ("_choices", "_preferred", "_rules"):
        monkeypatch.setattr(op.table, name, {})
    recurrent_cuda._fits.cache_clear()
    arguments = Case(3, 3, 6, 12).arguments(op, "cpu", torch.float32)
    for w in arguments.weights:
        w.requires_grad_()
    found = []
    for name in ("cuda", "reference"):
        with fastseq.use_backend(name):
            outputs = op(arguments)
            found.append([*outputs[:2], *torch.autograd.grad(outputs.y.sum(), arguments.weights)])
    torch.testing.assert_close(*found, rtol=1e-4, atol=2e-5)


@pytest.mark.gpu
def test_backward_in_autograds_thread_is_served_by_what_was_asked_for() -> None:
    if not torch.cuda.is_available():
        pytest.skip("there is no GPU")
    require(LSTM.table, next(impl for impl in LSTM.table.impls if impl.name == "cuda"), "cuda", torch.float32)
    layer = fastseq.nn.LSTM(8, 16).cuda()
    with kernels_called() as called:
        with fastseq.use_backend("cuda"):
            y, _ = layer(torch.randn(4, 3, 8, device="cuda"))
        y.sum().backward()
    assert called == {"cuda"}


@each_op
def test_weights_that_are_not_finite_meet_only_steps_that_are_made(op: Recurrent) -> None:
    arguments = Case(3, 3, 6, 12).arguments(op, "cpu", torch.float32)
    arguments = arguments._replace(lengths=torch.tensor([3, 0, 2]))
    arguments.weights[1][0, 0] = torch.nan
    grads = grads_like(Outputs(*op.reference.forward(*arguments.saving(True))))
    of = kernel(op, "kernels")
    outputs = Outputs(*of.forward(*arguments.saving(True)))
    ours = backward(of, arguments, outputs, grads)
    theirs = backward(op.reference, arguments, outputs, grads)
    assert torch.equal(ours[1][0, 1], grads[1][0, 1])  # of a row without a step, what reaches h_n reaches h0
    for got, want in zip(ours, theirs, strict=True):
        assert torch.equal(got.isnan(), want.isnan())
