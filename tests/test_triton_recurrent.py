"""The Triton kernels of the recurrent ops in Triton's interpreter, which runs them on the CPU, against the reference.

It is asked for by an environment variable that Triton reads when it is imported, so this file wants a process of its
own: TRITON_INTERPRET=1 python -m pytest tests/test_triton_recurrent.py
"""

import importlib
import itertools
import os
from contextlib import nullcontext

import pytest
import torch
from conftest import assert_no_worse, require_native
from torch import Tensor

from fastseq.ops.gru import GRU
from fastseq.ops.lstm import LSTM
from fastseq.ops.recurrent import (
    PROJECTION_CASES,
    Arguments,
    Case,
    Outputs,
    Recurrent,
    grads_like,
    running,
    widened,
)
from fastseq.ops.recurrent_steps import implementation
from fastseq.ops.rnn import RNN_RELU, RNN_TANH
from fastseq.registry import Kernel

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("runs in Triton's interpreter, with TRITON_INTERPRET=1 set before", allow_module_level=True)
pytest.importorskip("triton", reason="Triton is not installed")

from fastseq.kernels.triton import graphs
from fastseq.kernels.triton.graphs import Launch
from fastseq.kernels.triton.recurrent import CHIPS, Runtime
from fastseq.kernels.triton.recurrent_plan import Chip, Product, persistent, plan, stepwise

OPS = [LSTM, GRU, RNN_TANH, RNN_RELU]


def in_single_steps(launches: list[Launch], steps: int, device: torch.device) -> None:
    """Runs a persistent kernel of several programs, which would wait for each other, one step at a time."""
    (launch,) = launches
    arguments = {**launch.arguments, "steps": 1, "p_count": None}
    assert launch.arguments["RESIDENT"] and steps == 1
    graphs.run([launch._replace(arguments=arguments)], launch.arguments["steps"], device)


# What the interpreter takes for its chip decides the form: no shared memory, no persistent form; few multiprocessors,
# only groups of one program.
FORMS = {
    "stepwise": Runtime(chip=lambda _: Chip(1, 0, 0)),
    "persistent": Runtime(chip=lambda _: Chip(1, 1 << 20, 0)),
    "groups": Runtime(chip=lambda _: Chip(1 << 20, 1 << 20, 0), run=in_single_steps),
}


def name_of(value: object) -> str | None:
    if isinstance(value, Recurrent):
        return value.name
    return str(value).removeprefix("torch.") if isinstance(value, (torch.dtype, Case)) else None


each_op = pytest.mark.parametrize("op", OPS, ids=name_of)
each_form = pytest.mark.parametrize("form", ["stepwise", "persistent"])


def kernel(op: Recurrent, form: str = "persistent") -> Kernel:
    module = importlib.import_module(f"fastseq.kernels.triton.{op.name}")
    return implementation(module.STEPS._replace(runtime=FORMS[form]))


@pytest.fixture(autouse=True)
def _poisoned():
    """Fills what torch.empty gives with NaN, so that an element that a kernel forgot cannot pass for a zero."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def needs_all(arguments: Arguments) -> list[bool]:
    return [True] * (5 + len(arguments.weights))


def flat(grads: tuple) -> list[Tensor]:
    return [*grads[:5], *grads[5]]


def backward(of: Kernel, arguments: Arguments, tape: Outputs, grads: list[Tensor | None]) -> list[Tensor]:
    return flat(of.backward(*grads, *arguments, tape.y, tape.gates, tape.cells, needs_all(arguments)))


def assert_outputs(got: Outputs, want: Outputs, arguments: Arguments) -> None:
    places = running(arguments)
    for name, ours, theirs in zip(Outputs._fields, got, want, strict=True):
        if name == "gates" and places is not None and ours.numel():
            ours, theirs = ours[:, places], theirs[:, places]  # nobody reads the tape past a row's end
        torch.testing.assert_close(ours, theirs)


def assert_gradients(got: list[Tensor], want: list[Tensor]) -> None:
    """Gradients are sums over T*B terms in another order: they are as exact as the sum of the terms' sizes allows."""
    for ours, theirs in zip(got, want, strict=True):
        size = max(1.0, theirs.abs().max().item()) if theirs.numel() else 1.0
        torch.testing.assert_close(ours, theirs.to(ours.dtype), rtol=1e-4, atol=2e-5 * size)


CASES = [
    Case(1, 1, 3, 5),
    Case(3, 1, 17, 19, bidirectional=True),
    Case(3, 3, 20, 33, state=False),
    Case(3, 9, 33, 16, bidirectional=True, bias=False),
    Case(2, 3, 20, 70),
    Case(4, 4, 7, 19, bidirectional=True, packed=True),
    Case(4, 4, 7, 19, bidirectional=True, lengths=True, reset=True, reset_state=True),
    Case(2, 2, 9, 65, batch_first=True),
    Case(4, 0, 5, 6),
    Case(3, 2, 4, 5, packed=True),
    Case(4, 5, 7, 12, reset=True),
    Case(4, 5, 7, 12, reset=True, reset_state=True, bidirectional=True, state=False),
    Case(4, 5, 7, 24, lengths=True, bidirectional=True, batch_first=True, state=False),
]
PROJECTIONS = [
    PROJECTION_CASES[0],
    Case(4, 3, 6, 20, P=9, bidirectional=True, bias=False, state=False),
    Case(4, 5, 6, 9, P=20, packed=True, bidirectional=True),
    Case(5, 4, 6, 20, P=9, lengths=True, reset=True, reset_state=True),
]
ALL = [
    *itertools.product(OPS, ["stepwise", "persistent"], CASES),
    *((LSTM, "stepwise", case) for case in PROJECTIONS),
    *itertools.product(
        OPS,
        ["groups"],
        [Case(3, 17, 9, 40, bidirectional=True), Case(3, 17, 5, 19, lengths=True, reset=True)],
    ),
]


@pytest.mark.parametrize(("op", "form", "case"), ALL, ids=name_of)
def test_forward_tape_and_backward(op: Recurrent, form: str, case: Case) -> None:
    arguments = case.arguments(op, "cpu", torch.float32)
    wide = widened(arguments)
    exact = Outputs(*op.reference.forward(*wide.saving(True)))
    want = Outputs(*(t.float() for t in exact))
    want_grads = backward(op.reference, wide, exact, grads_like(exact))
    ours = Outputs(*kernel(op, form).forward(*arguments.saving(True)))
    assert_outputs(ours, want, arguments)
    without = Outputs(*kernel(op, form).forward(*arguments.saving(False)))
    torch.testing.assert_close(without[:3], ours[:3])
    assert not without.gates.numel() and not without.cells.numel()
    for tape in (ours, want):
        assert_gradients(backward(kernel(op, form), arguments, tape, grads_like(want)), want_grads)
    tape = Outputs(*(torch.nan_to_num(t) for t in ours))  # where nothing was written there is poison
    assert_gradients(backward(op.reference, arguments, tape, grads_like(want)), want_grads)


MIXED = [
    Case(4, 3, 6, 20, bidirectional=True),
    Case(4, 3, 6, 20, bidirectional=True, packed=True),
    Case(4, 3, 6, 20, bidirectional=True, lengths=True, reset=True, reset_state=True),
]


@pytest.mark.parametrize(
    ("op", "case"), [*itertools.product(OPS, MIXED), (LSTM, Case(4, 3, 6, 20, P=9, lengths=True))], ids=name_of
)
def test_tapes_mix_with_the_extensions(op: Recurrent, case: Case) -> None:
    require_native()
    (cpp,) = (impl.kernel for impl in op.table.impls if impl.name == "cpp")
    arguments = case.arguments(op, "cpu", torch.float32)
    tapes = [Outputs(*of.forward(*arguments.saving(True))) for of in (kernel(op), cpp)]
    assert_outputs(*tapes, arguments)
    grads = grads_like(tapes[1])
    want = backward(cpp, arguments, tapes[1], grads)
    assert_gradients(backward(kernel(op), arguments, tapes[1], grads), want)
    assert_gradients(backward(cpp, arguments, tapes[0], grads), want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=name_of)
@each_form
@each_op
def test_half_precision_is_no_worse_than_the_reference_in_it(op: Recurrent, form: str, dtype: torch.dtype) -> None:
    """All tensors in half precision; sums and states are float32 in the kernels, and half in the reference."""
    arguments = Case(4, 5, 16, 40, bidirectional=True, lengths=True, reset=True).arguments(op, "cpu", dtype)
    wide = widened(arguments)
    exact = Outputs(*op.reference.forward(*wide.saving(True)))
    ours, theirs = (Outputs(*of.forward(*arguments.saving(True))) for of in (kernel(op, form), op.reference))
    places = running(arguments)

    def compared(outputs: Outputs) -> list[Tensor]:
        y, h_n, c_n, gates, cells = outputs
        return [t for t in (y, h_n, c_n, gates[:, places] if gates.numel() else gates, cells) if t.numel()]

    assert_no_worse(compared(ours), compared(theirs), compared(exact))
    grads = [None if g is None else g.to(dtype) for g in grads_like(exact)]
    wide_grads = [None if g is None else g.double() for g in grads]
    assert_no_worse(
        [g for g in backward(kernel(op, form), arguments, ours, grads) if g.numel()],
        [g for g in backward(op.reference, arguments, theirs, grads) if g.numel()],
        [g for g in backward(op.reference, wide, exact, wide_grads) if g.numel()],
    )


@each_op
def test_half_precision_weights_beside_float32(op: Recurrent) -> None:
    arguments = Case(5, 3, 6, 20, bidirectional=True).arguments(op, "cpu", torch.float32)
    arguments = arguments._replace(weights=[w.bfloat16() for w in arguments.weights])
    ours, theirs = (of.forward(*arguments.saving(False, True)) for of in (kernel(op), op.reference))
    torch.testing.assert_close(ours, theirs)


@each_form
@each_op
def test_what_lies_past_a_length_is_never_read(op: Recurrent, form: str) -> None:
    """Not even by rows without a step, whose state stays."""
    arguments = Case(5, 5, 6, 20, bidirectional=True).arguments(op, "cpu", torch.float32)
    arguments = arguments._replace(lengths=torch.tensor([3, 0, 5, 1, 0]))
    past = (torch.arange(5).unsqueeze(-1) >= arguments.lengths).unsqueeze(-1)
    of = kernel(op, form)
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


@pytest.mark.parametrize(("op", "given"), [*((op, "h0") for op in OPS), (LSTM, "c0")], ids=name_of)
def test_one_state_given_and_gradients_nobody_sends(op: Recurrent, given: str) -> None:
    arguments = Case(4, 3, 6, 20, bidirectional=True).arguments(op, "cpu", torch.float32)
    arguments = arguments._replace(**{"h0" if given == "c0" else "c0": None})
    ours, theirs = (Outputs(*of.forward(*arguments.saving(True))) for of in (kernel(op), op.reference))
    assert_outputs(ours, theirs, arguments)
    for kept in range(4):
        grads = [g if k == kept else None for k, g in enumerate(grads_like(theirs))]
        if grads[kept] is not None:
            assert_gradients(*(backward(of, arguments, theirs, grads) for of in (kernel(op), op.reference)))


@each_op
def test_only_needed_gradients(op: Recurrent) -> None:
    case = Case(2, 3, 6, 12, P=9 if op is LSTM else 0, reset=True, reset_state=True)
    arguments = case.arguments(op, "cpu", torch.float32)
    outputs = Outputs(*kernel(op).forward(*arguments.saving(True)))
    grads = grads_like(outputs)
    full = backward(kernel(op), arguments, outputs, grads)
    for wanted in range(len(full)):
        needs = [k == wanted for k in range(len(full))]
        some = flat(kernel(op).backward(*grads, *arguments, outputs.y, outputs.gates, outputs.cells, needs))
        torch.testing.assert_close(some[wanted], full[wanted])
        state = wanted in (1, 2, 3, 4)  # both parts of a state come together
        assert all(not g.numel() for k, g in enumerate(some) if k != wanted and not (state and k in (1, 2, 3, 4)))


@each_form
@each_op
def test_nan_stays_in_its_row(op: Recurrent, form: str) -> None:
    arguments = Case(4, 3, 6, 20).arguments(op, "cpu", torch.float32)
    arguments.x[1, 1, 0] = float("nan")
    ours, theirs = (Outputs(*of.forward(*arguments.saving(True))) for of in (kernel(op, form), op.reference))
    torch.testing.assert_close(tuple(ours), tuple(theirs), equal_nan=True)


@each_op
def test_both_public_functions_choose_for_themselves(op: Recurrent) -> None:
    module = importlib.import_module(f"fastseq.kernels.triton.{op.name}")
    arguments = Case(4, 3, 6, 20).arguments(op, "cpu", torch.float32)
    outputs = Outputs(*module.forward(*arguments.saving(True)))
    assert_outputs(outputs, Outputs(*op.reference.forward(*arguments.saving(True))), arguments)
    grads = grads_like(outputs)
    assert_gradients(*(backward(of, arguments, outputs, grads) for of in (module, op.reference)))


SIZES = [
    Product(stack, H, K, B, D, size, exact)
    for H, B, D, (size, exact) in itertools.product(
        (1, 16, 17, 64, 200, 256, 512, 768, 1024, 1500, 4096),
        (1, 3, 16, 64, 500),
        (1, 2),
        ((2, False), (4, False), (4, True)),
    )
    for stack, K in ((4, H), (1, 4 * H), (1, 3 * H), (1, H))
]


@pytest.mark.parametrize("chip", CHIPS.values(), ids=str)
def test_persistent_programs_fit_the_chip(chip: Chip) -> None:
    """Programs that wait for each other are all resident, and what a program holds is within its shared memory."""
    seen = 0
    for of in SIZES:
        for units, rows in itertools.product((8, 16, 32, 64), (16, 32, 64)):
            chosen = persistent(of, units, rows, chip)
            if chosen is None:
                continue
            seen += 1
            group, tiles, D = chosen.grid(of.outputs, of.B, of.D)
            assert group * chosen.units >= of.outputs and tiles * chosen.rows >= of.B
            assert group == 1 or group * tiles * D <= chip.multiprocessors
            chunk = chosen.k * chosen.split
            weights = -(-of.K // chunk) * chunk * of.stack * units * of.size
            assert weights + (chosen.ahead + 1) * chunk * rows * of.size <= chip.shared
            assert chosen.k >= 16 and chosen.k & (chosen.k - 1) == 0
    assert seen > 100


@pytest.mark.parametrize("chip", CHIPS.values(), ids=str)
def test_the_model_knows_when_nothing_can_be_kept(chip: Chip) -> None:
    for of in SIZES:
        assert not plan(of, 1, chip).persistent  # one step reads the weights once either way
        if of.outputs == 4096:
            assert plan(of, 100, chip) == stepwise(of, chip)
    small = Product(4, 256, 256, 16, 1, 2, False)
    assert plan(small, 100, chip).persistent


class FakeGraph:
    """Stands for CUDA's graphs, which need a GPU: counts what happens to it."""

    def __init__(self) -> None:
        self.replays = self.captures = 0

    def capture_begin(self, capture_error_mode: str) -> None:
        assert capture_error_mode == "thread_local"

    def capture_end(self) -> None:
        self.captures += 1

    def replay(self) -> None:
        self.replays += 1


def test_a_series_is_captured_the_second_time_and_replayed_from_then_on(monkeypatch: pytest.MonkeyPatch) -> None:
    launched: list[int] = []

    class FakeKernel:
        def __getitem__(self, grid: tuple[int, int, int]):
            return lambda first, **_: launched.append(first)

    made: list[FakeGraph] = []
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: made.append(FakeGraph()) or made[-1])
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: None)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(graphs, "_graphs", type(graphs._graphs)())
    kernel, device = FakeKernel(), torch.device("cuda", 0)
    ours, others = torch.zeros(3), torch.zeros(3)

    def run(t: Tensor) -> int:
        launched.clear()
        graphs.run([Launch(kernel, (1, 1, 1), dict(p=t, T=20))], 20, device)
        return len(launched)

    assert run(ours) == 20 and not made  # at once
    assert run(ours) == 20 and made[0].captures == made[0].replays == 1
    assert run(ours) == 0 and made[0].replays == 2
    assert run(others) == 20 and len(made) == 1  # another address, another series
    assert run(ours.view(torch.int32)) == 20 and len(made) == 1  # and so is another dtype at the same one
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert run(ours) == 20 and made[0].replays == 2  # goes into the caller's graph
