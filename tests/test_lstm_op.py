"""The LSTM op: every implementation of its table against the reference, on the op's own cases."""

import threading

import pytest
import torch
from conftest import require, require_native
from torch import Tensor

import fastseq
from fastseq.ops.lstm import CASES, LSTM, Case, lstm
from fastseq.reference import lstm as reference
from fastseq.registry import Impl

KERNELS = [impl for impl in LSTM.impls if impl.target != "fastseq.reference.lstm"]
DTYPES = [torch.float32, torch.float64]
# The kernels sum in another order than the reference; sums over T*B terms in float32 differ by a few more ulps.
GRADIENT_TOLERANCE = {torch.float32: dict(rtol=1e-4, atol=2e-5), torch.float64: dict(rtol=1e-7, atol=1e-9)}

each_kernel = pytest.mark.parametrize("impl", KERNELS, ids=lambda impl: impl.name)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
each_case = pytest.mark.parametrize("case", CASES, ids=str)


def devices(impl: Impl) -> str:
    return "cuda" if impl.devices == {"cuda"} else "cpu"


def random_grads(case: Case, dtype: torch.dtype, device: str) -> list[Tensor]:
    D = 2 if case.bidirectional else 1
    shapes = [(case.T, case.B, D * case.H), (D, case.B, case.H), (D, case.B, case.H)]
    return [torch.randn(shape, dtype=dtype, device=device) for shape in shapes]


@each_kernel
@each_dtype
@each_case
def test_forward_and_tape(impl: Impl, dtype: torch.dtype, case: Case, threads: int) -> None:
    device = devices(impl)
    require(LSTM, impl, device, dtype)
    args = (*case.inputs(device, dtype), case.bidirectional)
    expected = reference.forward(*args, True)
    for ours, theirs in zip(impl.kernel.forward(*args, True), expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    for ours, theirs in zip(impl.kernel.forward(*args, False)[:3], expected[:3], strict=True):
        torch.testing.assert_close(ours, theirs)


@each_kernel
@each_dtype
@each_case
def test_backward_from_either_tape(impl: Impl, dtype: torch.dtype, case: Case, threads: int) -> None:
    device = devices(impl)
    require(LSTM, impl, device, dtype)
    args = (*case.inputs(device, dtype), case.bidirectional)
    grads = random_grads(case, dtype, device)
    needs = [True] * (3 + len(args[3]))
    y, _, _, *tape = reference.forward(*args, True)
    dx, dh0, dc0, dweights = reference.backward(*grads, *args, y, *tape, needs)
    for forward in (reference.forward, impl.kernel.forward):
        y, _, _, *tape = forward(*args, True)
        ours = impl.kernel.backward(*grads, *args, y, *tape, needs)
        for got, want in zip([*ours[:3], *ours[3]], [dx, dh0, dc0, *dweights], strict=True):
            torch.testing.assert_close(got, want, **GRADIENT_TOLERANCE[dtype])
    # And the reference from our tape.
    theirs = reference.backward(*grads, *args, y, *tape, needs)
    for got, want in zip([*theirs[:3], *theirs[3]], [dx, dh0, dc0, *dweights], strict=True):
        torch.testing.assert_close(got, want, **GRADIENT_TOLERANCE[dtype])


@each_kernel
@pytest.mark.parametrize("given", ["h0", "c0"])
def test_one_state_given(impl: Impl, given: str) -> None:
    require(LSTM, impl, devices(impl), torch.float32)
    case = Case(6, 3, 20, 33, bidirectional=True)
    x, h0, c0, weights = case.inputs(devices(impl), torch.float32)
    args = (x, h0 if given == "h0" else None, c0 if given == "c0" else None, weights, True)
    grads, needs = random_grads(case, torch.float32, devices(impl)), [True] * (3 + len(weights))
    outputs, expected = impl.kernel.forward(*args, True), reference.forward(*args, True)
    torch.testing.assert_close(outputs, expected)
    *ours, our_weights = impl.kernel.backward(*grads, *args, outputs[0], *outputs[3:], needs)
    *theirs, their_weights = reference.backward(*grads, *args, expected[0], *expected[3:], needs)
    torch.testing.assert_close([*ours, *our_weights], [*theirs, *their_weights], rtol=1e-4, atol=2e-5)


@each_kernel
def test_only_needed_gradients(impl: Impl) -> None:
    require(LSTM, impl, devices(impl), torch.float32)
    case = Case(6, 3, 20, 33, bidirectional=True)
    args = (*case.inputs(devices(impl), torch.float32), case.bidirectional)
    grads = random_grads(case, torch.float32, devices(impl))
    y, _, _, *tape = impl.kernel.forward(*args, True)
    count = 3 + len(args[3])
    full = impl.kernel.backward(*grads, *args, y, *tape, [True] * count)
    full = [*full[:3], *full[3]]
    for wanted in range(count):
        needs = [k == wanted for k in range(count)]
        some = impl.kernel.backward(*grads, *args, y, *tape, needs)
        torch.testing.assert_close([*some[:3], *some[3]][wanted], full[wanted])


@pytest.mark.parametrize("impl", LSTM.impls, ids=lambda impl: impl.name)
@pytest.mark.parametrize("case", [Case(3, 2, 3, 5), Case(4, 3, 2, 9, bidirectional=True, state=False)], ids=str)
def test_gradcheck(impl: Impl, case: Case) -> None:
    require(LSTM, impl, devices(impl), torch.float64)
    x, h0, c0, weights = case.inputs(devices(impl), torch.float64)
    tensors = [t.requires_grad_() for t in (x, h0, c0, *weights) if t is not None]

    def call(*tensors: Tensor) -> tuple[Tensor, ...]:
        x, *rest = tensors
        h0, c0 = (rest.pop(0), rest.pop(0)) if case.state else (None, None)
        return lstm(x, h0, c0, rest, case.bidirectional)

    with fastseq.use_backend(impl.name):
        assert torch.autograd.gradcheck(call, tensors)
        assert torch.autograd.gradgradcheck(call, tensors)


@pytest.mark.parametrize("impl", LSTM.impls, ids=lambda impl: impl.name)
@each_dtype
def test_split_run_equals_whole(impl: Impl, dtype: torch.dtype) -> None:
    require(LSTM, impl, devices(impl), dtype)
    x, h0, c0, weights = Case(21, 3, 17, 24).inputs(devices(impl), dtype)
    x.requires_grad_()
    h0.requires_grad_()
    dy = torch.randn(21, 3, 24, dtype=dtype)
    with fastseq.use_backend(impl.name):
        y, h, c = lstm(x, h0, c0, weights)
        whole = torch.autograd.grad((y, h, c), (x, h0), (dy, torch.ones_like(h), torch.ones_like(c)))
        y1, h1, c1 = lstm(x[:8], h0, c0, weights)
        y2, h2, c2 = lstm(x[8:], h1, c1, weights)
        split_y = torch.cat([y1, y2])
        split = torch.autograd.grad((split_y, h2, c2), (x, h0), (dy, torch.ones_like(h), torch.ones_like(c)))
    for got, want in zip((split_y, h2, c2, *split), (y, h, c, *whole), strict=True):
        torch.testing.assert_close(got, want)


@each_kernel
def test_non_contiguous_everything(impl: Impl) -> None:
    require(LSTM, impl, devices(impl), torch.float32)
    case = Case(7, 5, 12, 10)
    x, h0, c0, weights = case.inputs(devices(impl), torch.float32)
    dy = torch.randn(7, 5, 10)

    def strided(t: Tensor) -> Tensor:
        return torch.stack([t, t], -1)[..., 0] if t.dim() == 1 else t.transpose(0, -1).contiguous().transpose(0, -1)

    def run(x: Tensor, h0: Tensor, c0: Tensor, weights: list[Tensor], dy: Tensor) -> tuple[Tensor, ...]:
        leaves = [x.requires_grad_(), h0.requires_grad_(), *(w.requires_grad_() for w in weights)]
        with fastseq.use_backend(impl.name):
            y, h, c = lstm(x, h0, c0, weights)
        return y, h, c, *torch.autograd.grad(y, leaves, dy)

    expected = run(x, h0, c0, weights, dy)
    strided_inputs = [strided(t.detach()) for t in (x, h0, c0)]
    assert not strided_inputs[0].is_contiguous()
    got = run(*strided_inputs, [strided(w.detach()) for w in weights], strided(dy))
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    broadcast = torch.ones(()).expand(7, 5, 10)  # what y.sum().backward() sends
    for ours, theirs in zip(
        run(x.detach(), h0.detach(), c0.detach(), [w.detach() for w in weights], broadcast),
        run(x.detach(), h0.detach(), c0.detach(), [w.detach() for w in weights], broadcast.contiguous()),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)


@each_kernel
def test_long_sequences_are_as_exact_as_torch(impl: Impl) -> None:
    require(LSTM, impl, devices(impl), torch.float32)
    x, h0, c0, weights = Case(1000, 2, 64, 64).inputs("cpu", torch.float32)
    exact = reference.forward(*[t.double() for t in (x, h0, c0)], [w.double() for w in weights], False, False)[0]
    theirs = torch.lstm(x, (h0, c0), weights, True, 1, 0.0, False, False, False)[0]
    ours = impl.kernel.forward(x, h0, c0, weights, False, False)[0]
    assert (ours - exact).abs().max() <= 2 * (theirs - exact).abs().max()


@each_kernel
def test_nan_and_inf_stay_where_they_are(impl: Impl) -> None:
    require(LSTM, impl, devices(impl), torch.float32)
    x, h0, c0, weights = Case(6, 9, 20, 24).inputs("cpu", torch.float32)
    x[2, 1, 3] = float("nan")
    x[3, 4, 5] = float("inf")
    x[1, 6, 7] = -float("inf")
    theirs = torch.lstm(x, (h0, c0), weights, True, 1, 0.0, False, False, False)
    ours = impl.kernel.forward(x, h0, c0, weights, False, False)
    for got, want in zip(ours[:3], theirs, strict=True):
        torch.testing.assert_close(got, want.view_as(got), equal_nan=True)


@pytest.mark.parametrize("case", [Case(4, 3, 5, 6), Case(3, 2, 4, 5, bidirectional=True, state=False)], ids=str)
def test_opcheck(case: Case) -> None:
    x, h0, c0, weights = case.inputs("cpu", torch.float32)
    for t in (x, h0, c0, *weights):
        if t is not None:
            t.requires_grad_()
    torch.library.opcheck(torch.ops.fastseq.lstm.default, (x, h0, c0, weights, case.bidirectional, False))
    detached = [None if t is None else t.detach() for t in (x, h0, c0)]
    plain = [w.detach() for w in weights]
    y, _, _, *tape = torch.ops.fastseq.lstm(*detached, plain, case.bidirectional, True)
    needs = [True] * (3 + len(weights))
    torch.library.opcheck(
        torch.ops.fastseq.lstm_backward.default,
        (*random_grads(case, torch.float32, "cpu"), *detached, plain, case.bidirectional, y, *tape, needs),
    )


def test_two_python_threads_at_once(threads: int) -> None:
    case = Case(50, 1, 64, 128)
    x, h0, c0, weights = case.inputs("cpu", torch.float32)
    for w in weights:
        w.requires_grad_()
    dy = torch.randn(50, 1, 128)

    def run() -> list[Tensor]:
        y, _, _ = lstm(x, h0, c0, weights)
        return [y, *torch.autograd.grad(y, weights, dy)]

    expected, failures = run(), []

    def work() -> None:
        try:
            for _ in range(30):
                for got, want in zip(run(), expected, strict=True):
                    torch.testing.assert_close(got, want)
        except BaseException as error:
            failures.append(error)

    workers = [threading.Thread(target=work) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not failures


@pytest.mark.parametrize("count", [3, 4, 5, 8])
def test_more_threads_than_shares_come_out_even(count: int) -> None:
    """Odd and even teams, for one direction and for two, split by units and by rows."""
    require(LSTM, LSTM.impls[0], "cpu", torch.float32)
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        for case in (Case(20, 1, 48, 100), Case(20, 2, 48, 100, bidirectional=True), Case(9, 48, 33, 60)):
            x, h0, c0, weights = case.inputs("cpu", torch.float32)
            leaves = [x, h0, c0, *weights]
            for leaf in leaves:
                leaf.requires_grad_()
            dy = torch.randn(case.T, case.B, case.H * (2 if case.bidirectional else 1))
            results = []
            for backend in ("reference", "cpp"):
                with fastseq.use_backend(backend):
                    y, h_n, c_n = lstm(x, h0, c0, weights, case.bidirectional)
                    results.append([y, h_n, c_n, *torch.autograd.grad(y, leaves, dy)])
            for got, want in zip(*reversed(results), strict=True):
                torch.testing.assert_close(got, want, **GRADIENT_TOLERANCE[torch.float32])
    finally:
        torch.set_num_threads(before)


def test_repeated_runs_are_bit_equal(threads: int) -> None:
    x, h0, c0, weights = Case(30, 5, 40, 72, bidirectional=True).inputs("cpu", torch.float32)
    first = lstm(x, h0, c0, weights, True)
    for _ in range(5):
        for got, want in zip(lstm(x, h0, c0, weights, True), first, strict=True):
            assert torch.equal(got, want)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a.update(x=a["x"][0]), r"x must be \[T, B, I\], got 2 dimensions"),
        (lambda a: a.update(x=a["x"][:0]), "at least one step, got T=0"),
        (lambda a: a.update(h0=a["h0"][:, :1]), r"h0 must be \[1, 3, 6\], got \[1, 1, 6\]"),
        (
            lambda a: a.update(c0=a["c0"].double()),
            "c0 must be torch.float32 on cpu like x, got torch.float64",
        ),
        (lambda a: a.update(weights=a["weights"][:3]), "weights must hold 2 tensors or 4 with biases, got 3"),
        (lambda a: a["weights"].__setitem__(0, a["weights"][0][:, :2]), r"weights\[0\] must be \[24, 5\]"),
        (
            lambda a: a["weights"].__setitem__(3, a["weights"][3].double()),
            r"weights\[3\] must be torch.float32",
        ),
        (lambda a: a.update(bidirectional=True), r"weights\[2\] must be|weights must hold"),
    ],
)
def test_bad_arguments_name_the_argument(change, message: str) -> None:
    x, h0, c0, weights = Case(4, 3, 5, 6).inputs("cpu", torch.float32)
    arguments = {"x": x, "h0": h0, "c0": c0, "weights": weights, "bidirectional": False}
    change(arguments)
    with pytest.raises(ValueError, match=message):
        lstm(**arguments)


def test_the_extension_checks_for_itself() -> None:
    require_native()
    x, h0, c0, weights = Case(4, 3, 5, 6).inputs("cpu", torch.float32)
    native = torch.ops.fastseq_native.lstm
    for bad in (
        (x[..., :4], h0, c0, weights),
        (x, h0[:, :2], c0, weights),
        (x, h0, c0.double(), weights),
        (x, h0, c0, [weights[0], weights[1][:20], *weights[2:]]),
        (x.int(), h0, c0, weights),
        (x[:0], h0, c0, weights),
    ):
        with pytest.raises(RuntimeError, match="lstm: "):
            native(*bad, False, False)
    torch.testing.assert_close(
        native(x, h0, c0, weights, False, False)[0], reference.forward(x, h0, c0, weights, False, False)[0]
    )


def ulps(got: Tensor, exact: Tensor) -> Tensor:
    """Distance from the exact float64 values in units of float32's last place."""
    rounded = exact.float()
    ulp = torch.nextafter(rounded.abs(), torch.tensor(float("inf"))) - rounded.abs()
    return ((got.double() - exact).abs() / ulp.double()).max()


def test_gate_functions_are_within_their_stated_error() -> None:
    """One step of an LSTM with one gate in play is that gate's function: c_n = f * c0 + i * g."""
    require_native()
    a = torch.cat([torch.linspace(-80, 80, 20001), torch.linspace(-1, 1, 20001), torch.logspace(-30, 0, 999)])
    ones = torch.ones(1, len(a), 1)
    shut, open_ = -200.0, 200.0  # sigmoid is 1e-38 and exactly 1

    def cell(gates: list[float], c0: Tensor) -> Tensor:
        # The unit's pre-activation is its own input, so one row of the batch is one argument.
        w_ih = torch.tensor([[float(g == "x")] for g in gates])
        bias = torch.tensor([0.0 if g == "x" else g for g in gates])
        weights = [w_ih, torch.zeros(4, 1), bias, torch.zeros(4)]
        with fastseq.use_backend("cpp"):
            return lstm(a.view(1, -1, 1), torch.zeros_like(ones), c0, weights)[2].flatten()

    sigmoid = cell([shut, "x", 0.0, open_], ones)
    tanh = cell([open_, shut, "x", open_], torch.zeros_like(ones))
    assert ulps(sigmoid, a.double().sigmoid()) <= 3
    assert ulps(tanh, a.double().tanh()) <= 4
