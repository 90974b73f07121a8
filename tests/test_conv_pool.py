"""Convolution, ReLU and max-pooling in one pass: every implementation of the table on the op's own cases, the reference
against torch, the public function and the module.
"""

import math
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import device_of, name_of, require, require_kernel, require_native, threads_set, widest
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses import FakeTensorMode
from torch.utils._pytree import tree_map_only

import fastseq
from fastseq.functional import conv_relu_pool
from fastseq.ops.contract import widened
from fastseq.ops.conv_pool import (
    CASES,
    SELF_CHECK_CASES,
    TABLE,
    Arguments,
    Case,
    Outputs,
    backward_arguments,
    conv_pool,
    grad_like,
    needs_all,
    tolerance_of,
)
from fastseq.reference import conv_pool as reference
from fastseq.reference.conv_pool import SHUT
from fastseq.registry import BackendError, Impl

pytestmark = pytest.mark.usefixtures("one_thread")

KERNELS = [impl for impl in TABLE.impls if impl.name != "reference"]
EACH_KIND = [(impl, dtype) for impl in KERNELS for dtype in sorted(impl.dtypes, key=str)]


each_implementation = pytest.mark.parametrize("impl", TABLE.impls, ids=name_of)
each_impl_and_dtype = pytest.mark.parametrize(("impl", "dtype"), EACH_KIND, ids=name_of)
each_case = pytest.mark.parametrize("case", CASES, ids=name_of)


def torchs(x: Tensor, weight: Tensor, bias: Tensor | None, stride: Any, padding: Any, pool: Any) -> Tensor:
    """torch's functions, one after the other."""
    return F.max_pool2d(F.relu(F.conv2d(x, weight, bias, stride, padding)), pool)


def leaves_of(arguments: Arguments) -> list[Tensor]:
    return [t.requires_grad_() for t in arguments[:3] if t is not None]


def assert_as_promised(op: Callable, args: tuple, results: Any) -> None:
    """What the fakes say of the results is so."""
    with FakeTensorMode() as mode:
        promised = op(*tree_map_only(Tensor, mode.from_tensor, args))
    for got, want in zip(results, promised, strict=True):
        assert (got.dtype, got.shape) == (want.dtype, want.shape)
        assert reference.memory_format(got) == reference.memory_format(want) if got.dim() == 4 else True


@each_impl_and_dtype
@each_case
def test_outputs_and_gradients(impl: Impl, dtype: torch.dtype, case: Case) -> None:
    device = device_of(impl)
    require(TABLE, impl, device, dtype)
    arguments = case.arguments(device, dtype)
    wide, needs, tolerance = widened(arguments), needs_all(arguments), tolerance_of(arguments)
    want = Outputs(*reference.forward(*wide, True))
    dy = grad_like(want.y.to(dtype))

    def run(threads: int) -> list[Tensor]:
        with threads_set(threads):
            outputs = impl.kernel.forward(*arguments, True)
            return [*outputs, *impl.kernel.backward(dy, outputs[1], *backward_arguments(arguments), needs)]

    y, positions, *grads = run(1)
    torch.testing.assert_close(y, want.y.to(dtype), **tolerance)
    assert torch.equal(positions == SHUT, y.permute(0, 2, 3, 1) <= 0)
    # In float32 the largest of two that are nearly equal may be another.
    assert (positions != want.positions).sum() <= (positions.numel() // 100 if dtype == torch.float32 else 0)
    exact = reference.backward(dy.double(), positions, *backward_arguments(wide), needs)
    for got, other in zip(grads, exact, strict=True):
        torch.testing.assert_close(got, other.to(dtype), **tolerance)
    assert_as_promised(torch.ops.fastseq.conv_pool, (*arguments, True), (y, positions))
    given = (dy, positions, *backward_arguments(arguments), needs)
    assert_as_promised(torch.ops.fastseq.conv_pool_backward, given, tuple(grads))
    without_tape = impl.kernel.forward(*arguments, False)
    assert torch.equal(without_tape[0], y) and without_tape[1].numel() == 0
    for threads in (2, 2, 1) if impl.is_native else (1,):
        assert all(map(torch.equal, run(threads), [y, positions, *grads]))


@each_implementation
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=name_of)
def test_self_check(impl: Impl, dtype: torch.dtype) -> None:
    require(TABLE, impl, device_of(impl), dtype)
    TABLE.self_check(impl.kernel, device_of(impl), dtype)


@pytest.mark.parametrize("wrong", range(5))
def test_self_check_sees_what_is_wrong(wrong: int) -> None:
    class Kernel:
        @staticmethod
        def forward(*args: Any) -> tuple[Tensor, Tensor]:
            y, positions = reference.forward(*args)
            return y * (1.001 if wrong == 3 else 1), positions.roll(1, 0) if wrong == 4 else positions

        @staticmethod
        def backward(*args: Any) -> list[Tensor]:
            return [g * 1.001 if wrong == i else g for i, g in enumerate(reference.backward(*args))]

    with pytest.raises(AssertionError):
        TABLE.self_check(Kernel, "cpu", torch.float64)


@each_implementation
@pytest.mark.parametrize("case", [Case(3, 3, 20, (9, 8)), Case(3, 40, 20, (9, 8))], ids=name_of)
def test_only_needed_gradients(impl: Impl, case: Case) -> None:
    device, dtype = device_of(impl), widest(impl)
    require(TABLE, impl, device, dtype)
    arguments = case.arguments(device, dtype)
    y, positions = impl.kernel.forward(*arguments, True)
    given = (grad_like(y), positions, *backward_arguments(arguments))
    whole = impl.kernel.backward(*given, [True] * 3)
    for wanted in range(8):
        needs = [bool(wanted >> i & 1) for i in range(3)]
        for got, want, need in zip(impl.kernel.backward(*given, needs), whole, needs, strict=True):
            assert torch.equal(got, want) if need else got.numel() == 0


@each_implementation
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=name_of)
def test_of_equal_pixels_the_first_one_counts(impl: Impl, dtype: torch.dtype) -> None:
    """As in torch, whose gradients show which one it takes."""
    device = device_of(impl)
    require(TABLE, impl, device, dtype)
    x = torch.randint(-1, 3, (3, 2, 12, 13), dtype=dtype, device=device).requires_grad_()
    weight = torch.randint(-1, 2, (35, 2, 2, 3), dtype=dtype, device=device).requires_grad_()
    bias = torch.randint(-1, 2, (35,), dtype=dtype, device=device).requires_grad_()
    for pool in ([2, 2], [3, 2], [1, 1]):
        options: tuple = ([1, 1], [1, 1], pool)
        theirs = torchs(x, weight, bias, *options)
        dy = torch.randint(-3, 4, theirs.shape, dtype=dtype, device=device)
        want = torch.autograd.grad(theirs, (x, weight, bias), dy)
        with torch.no_grad():
            y, positions = impl.kernel.forward(x, weight, bias, *options, True)
            got = impl.kernel.backward(dy, positions, x, weight, *options, [True] * 3)
        assert torch.equal(y, theirs)
        assert all(map(torch.equal, got, want))


@each_implementation
@pytest.mark.parametrize("value", [math.nan, -math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("channels_last", [False, True])
def test_what_is_not_finite(impl: Impl, value: float, channels_last: bool) -> None:
    """It goes where it goes in torch, forward and backward, and nowhere else."""
    device = device_of(impl)
    require(TABLE, impl, device, torch.float32)
    for C in (1, 20):
        arguments = Case(2, C, 19, (10, 12), channels_last=channels_last).arguments(device, torch.float32)
        arguments.x[1, 0, 4, 5] = value
        leaves = leaves_of(arguments)
        theirs = torchs(*arguments)
        dy = grad_like(theirs.detach())
        want = torch.autograd.grad(theirs, leaves, dy)
        with torch.no_grad():
            y, positions = impl.kernel.forward(*arguments, True)
            got = impl.kernel.backward(dy, positions, *backward_arguments(arguments), [True] * 3)
        torch.testing.assert_close(y, theirs, equal_nan=True, rtol=1e-5, atol=1e-5)
        # Which of several NaN in a window is taken decides where dx is not zero: torch's is the last.
        torch.testing.assert_close(got[0], want[0], equal_nan=True, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(got[2], want[2], equal_nan=True, rtol=1e-5, atol=1e-5)
        finite = got[1].isfinite() & want[1].isfinite()
        torch.testing.assert_close(got[1][finite], want[1][finite], rtol=1e-5, atol=1e-5)


def in_steps(t: Tensor) -> Tensor:
    """The same values with gaps between them in memory."""
    return torch.stack([t, t], -1)[..., 0]


def backwards(t: Tensor) -> Tensor:
    """The same values with the dimensions in reverse order in memory."""
    order = list(range(t.dim()))[::-1]
    return t.permute(order).contiguous().permute(order)


def repeated(t: Tensor) -> Tensor:
    """One element in the place of all, which are the same memory."""
    return t[(slice(0, 1),) * t.dim()].expand(t.shape)


def pixels_first(t: Tensor) -> Tensor:
    """The same values in channels_last, if that is anything."""
    return t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t


@each_implementation
@pytest.mark.parametrize("change", [in_steps, backwards, repeated, pixels_first])
@pytest.mark.parametrize("C", [1, 20])
def test_any_strides(impl: Impl, change: Callable[[Tensor], Tensor], C: int) -> None:
    device = device_of(impl)
    require(TABLE, impl, device, torch.float64)
    arguments = Case(2, C, 19, (8, 10)).arguments(device, torch.float64)
    changed = arguments._replace(**{name: change(getattr(arguments, name)) for name in ("x", "weight", "bias")})
    plain = Arguments(*(t.contiguous() if isinstance(t, Tensor) else t for t in changed))
    dy = torch.randn(2, 19, 4, 5, device=device, dtype=torch.float64)
    results = []
    for given, grad in ((changed, change(dy)), (plain, change(dy).contiguous())):
        y, positions = impl.kernel.forward(*given, True)
        results.append([y, positions, *impl.kernel.backward(grad, positions, *backward_arguments(given), [True] * 3)])
    torch.testing.assert_close(*results)


@each_implementation
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("C", [1, 3, 20])
def test_nothing_beyond_the_tensors_is_read(impl: Impl, channels_last: bool, C: int) -> None:
    """Neither before them nor behind them, where there is NaN."""
    device = device_of(impl)
    require(TABLE, impl, device, torch.float32)
    arguments = Case(2, C, 19, (9, 10), channels_last=channels_last).arguments(device, torch.float32)

    def in_nan(t: Tensor) -> Tensor:
        whole = torch.full((t.numel() + 256,), math.nan, device=device)
        return whole[128:-128].as_strided(t.shape, t.stride(), 128).copy_(t)

    hidden = arguments._replace(**{name: in_nan(getattr(arguments, name)) for name in ("x", "weight", "bias")})
    results = []
    for given, place in ((arguments, lambda t: t), (hidden, in_nan)):
        y, positions = impl.kernel.forward(*given, True)
        grads = impl.kernel.backward(place(grad_like(y)), positions, *backward_arguments(given), [True] * 3)
        results.append([y, positions, *grads])
    assert all(map(torch.equal, *results))


@each_case
def test_reference_is_torchs(case: Case) -> None:
    arguments = case.arguments("cpu", torch.float64)
    y, positions = reference.forward(*arguments, True)
    leaves = leaves_of(arguments)
    if case.B == 0:
        return
    theirs = torchs(*arguments)
    dy = torch.randn_like(theirs)
    torch.testing.assert_close(y, theirs)
    want = torch.autograd.grad(theirs, leaves, dy)
    got = reference.backward(dy, positions, *backward_arguments(arguments), needs_all(arguments))
    torch.testing.assert_close(list(got[: len(want)]), list(want))


def test_reference_is_its_formulas() -> None:
    """By hand, pixel by pixel."""
    arguments = Case(1, 2, 2, (7, 6), (2, 3), (1, 0), (2, 1), (1, 2)).arguments("cpu", torch.float64)
    x, weight, bias, (sh, sw), (ph, pw), pool = arguments
    y, positions = reference.forward(*arguments, True)
    padded = F.pad(x, (pw, pw, ph, ph))
    for o in range(2):
        for r in range(y.shape[2]):
            for s in range(y.shape[3]):
                window = []
                for j in range(pool[0] * pool[1]):
                    top, left = sh * (r * pool[0] + j // pool[1]), sw * (s * pool[1] + j % pool[1])
                    window.append((bias[o] + (weight[o] * padded[0, :, top : top + 2, left : left + 3]).sum()).item())
                largest = max(0.0, *window)
                assert y[0, o, r, s].item() == pytest.approx(largest)
                assert positions[0, r, s, o] == (window.index(largest) if largest > 0 else SHUT)


GRADCHECK_CASES = [
    Case(2, 1, 3, (5, 6)),
    Case(2, 9, 2, (4, 5), (3, 2), (0, 1), (1, 2), (1, 2), channels_last=True),
    Case(1, 2, 3, (6, 5), pool=(3, 2), bias=False),
]


def differentiable(case: Case, device: str) -> tuple[Callable[..., Tensor], list[Tensor]]:
    arguments = case.arguments(device, torch.float64)

    def call(*leaves: Tensor) -> Tensor:
        given = iter(leaves)
        return conv_pool(Arguments(*(None if t is None else next(given) for t in arguments[:3]), *arguments[3:])).y

    return call, [t.detach().clone().requires_grad_() for t in arguments[:3] if t is not None]


@each_implementation
@pytest.mark.parametrize("case", GRADCHECK_CASES, ids=name_of)
def test_gradcheck(impl: Impl, case: Case) -> None:
    require(TABLE, impl, device_of(impl), torch.float64)
    with fastseq.use_backend(impl.name):
        assert torch.autograd.gradcheck(*differentiable(case, device_of(impl)))
        assert torch.autograd.gradgradcheck(*differentiable(case, device_of(impl)))


@pytest.mark.parametrize("case", GRADCHECK_CASES, ids=name_of)
def test_forward_mode_and_batched_gradients(case: Case) -> None:
    assert torch.autograd.gradcheck(*differentiable(case, "cpu"), check_forward_ad=True, check_batched_grad=True)


def test_double_backward_where_one_input_depends_on_another() -> None:
    weight = torch.randn(3, 3, 3, 3, dtype=torch.float64).requires_grad_()

    def chained() -> Tensor:
        x = weight  # all three are made from the same
        for _ in range(2):
            x = conv_relu_pool(x, torch.sin(weight), weight[:, 0, 0, 0], padding=2, pool=1)
        return x.square().sum()

    once = torch.autograd.grad(chained(), weight)[0]
    torch.testing.assert_close(torch.autograd.grad(chained(), weight, create_graph=True)[0], once)


def test_transforms_of_torch_func() -> None:
    arguments = Case(3, 2, 4, (6, 7)).arguments("cpu", torch.float64)
    x, weight, bias = arguments[:3]

    def ours(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return conv_relu_pool(x, weight, bias, padding=1)

    def theirs(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return torchs(x, weight, bias, 1, 1, 2)

    each = torch.func.vmap(ours, (0, None, None))(x[:, None], weight, bias)
    torch.testing.assert_close(each[:, 0], theirs(x, weight, bias))
    for transform in (torch.func.jacrev, torch.func.jacfwd):
        torch.testing.assert_close(*(transform(f, (0, 1, 2))(x, weight, bias) for f in (ours, theirs)))


@pytest.mark.parametrize("case", GRADCHECK_CASES, ids=name_of)
def test_opcheck(case: Case) -> None:
    arguments = case.arguments("cpu", torch.float64)
    y, positions = reference.forward(*arguments, True)
    backward = torch.ops.fastseq.conv_pool_backward.default
    torch.library.opcheck(backward, (grad_like(y), positions, *backward_arguments(arguments), needs_all(arguments)))
    torch.library.opcheck(torch.ops.fastseq.conv_pool.default, (*arguments, False))
    leaves_of(arguments)
    torch.library.opcheck(torch.ops.fastseq.conv_pool.default, (*arguments, True))


def test_dynamic_sizes_compile_once() -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    weight, bias = (t.requires_grad_() for t in Case(2, 3, 4, (6, 6)).arguments("cpu", torch.float64)[1:3])

    def call(x: Tensor) -> Tensor:
        return conv_relu_pool(x, weight, bias, padding=1)

    compiled = torch.compile(lambda x: call(x), fullgraph=True, dynamic=True, backend=counter)
    counts = []
    for B, H, W in ((6, 9, 11), (5, 12, 8), (2, 7, 13)):
        x = torch.randn(B, 3, H, W, dtype=torch.float64).requires_grad_()
        results = []
        for function in (compiled, call):
            y = function(x)
            results.append([y, *torch.autograd.grad(y.square().sum(), (x, weight, bias))])
        torch.testing.assert_close(*results)
        counts.append(counter.frame_count)
    assert counts == counts[:1] * 3


def test_compiles_with_inductor() -> None:
    torch._dynamo.reset()
    module = fastseq.nn.ConvReLUPool2d(3, 5, 3, padding=1)
    x = torch.randn(2, 3, 8, 8).requires_grad_()
    want, got = module(x), torch.compile(module, fullgraph=True)(x)
    torch.testing.assert_close(got, want)
    leaves = [x, *module.parameters()]
    torch.testing.assert_close(*(torch.autograd.grad(y.square().sum(), leaves) for y in (got, want)))


def test_export_with_dynamic_batch() -> None:
    module = fastseq.nn.ConvReLUPool2d(3, 5, 3, padding=1)
    B = torch.export.Dim("B", min=1, max=500)
    exported = torch.export.export(module, (torch.randn(4, 3, 8, 8),), dynamic_shapes=({0: B},))
    for size in (4, 2, 40):
        x = torch.randn(size, 3, 8, 8)
        torch.testing.assert_close(exported.module()(x), module(x))


@each_implementation
def test_changed_inputs_raise_in_backward(impl: Impl) -> None:
    require(TABLE, impl, "cpu", torch.float64)
    leaves = leaves_of(Case(2, 3, 4, (6, 6)).arguments("cpu", torch.float64))
    with fastseq.use_backend(impl.name):
        for changed in range(2):
            inner = [t * 1 for t in leaves]
            y = conv_relu_pool(*inner)
            with torch.no_grad():
                inner[changed].add_(1)
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                y.sum().backward()


# What the kernel takes, and what goes to torch's functions.
FUNCTION_CASES: dict[str, tuple[Case, dict]] = {
    "plain": (Case(3, 3, 5, (9, 10)), dict(padding=1)),
    "pairs": (Case(3, 3, 5, (9, 10)), dict(padding=(1, 0), stride=(2, 1), pool=(1, 3))),
    "channels_last": (Case(3, 20, 5, (9, 10), channels_last=True), dict(padding=1)),
    "no pool": (Case(3, 3, 5, (9, 10)), dict(pool=1)),
    "same": (Case(3, 3, 5, (9, 10)), dict(padding="same")),
    "valid": (Case(3, 3, 5, (9, 10)), dict(padding="valid", stride=(2,))),
    "large pool": (Case(1, 2, 3, (22, 23)), dict(pool=(16, 16))),
    "no member": (Case(0, 3, 5, (9, 10)), dict(padding=1)),
}


@pytest.mark.parametrize("what", FUNCTION_CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=name_of)
def test_the_function_is_torchs(what: str, dtype: torch.dtype) -> None:
    case, options = FUNCTION_CASES[what]
    arguments = case.arguments("cpu", dtype)
    leaves = leaves_of(arguments)
    for given in (leaves, leaves[:2]):
        y = conv_relu_pool(*given, **options)
        complete = dict(stride=1, padding=0, pool=2) | options
        want = torchs(*given, *([None] if len(given) == 2 else []), *complete.values())
        torch.testing.assert_close(y, want, rtol=1e-5, atol=1e-5)
        assert y.is_contiguous(memory_format=reference.memory_format(arguments.x)) and y.dtype == dtype
        grads = [torch.autograd.grad(result, given, grad_like(y.detach())) for result in (y, want)]
        torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-5)
        with torch.no_grad():
            without = conv_relu_pool(*given, **options)
        assert torch.equal(without, y) or what == "no pool"  # where torch trains
        torch.testing.assert_close(without, y, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("pool", "training", "is_ours"), [(2, True, True), (1, False, True), (1, True, False)])
def test_what_torch_does_faster(monkeypatch: pytest.MonkeyPatch, pool: int, training: bool, is_ours: bool) -> None:
    require_native()
    calls: list[Arguments] = []
    op = fastseq.ops.conv_pool.conv_pool
    monkeypatch.setattr("fastseq.ops.conv_pool.conv_pool", lambda a, *rest: (calls.append(a), op(a, *rest))[1])
    leaves = leaves_of(Case(2, 3, 5, (9, 10)).arguments("cpu", torch.float32))
    with torch.set_grad_enabled(training):
        torch.testing.assert_close(conv_relu_pool(*leaves, pool=pool), torchs(*leaves, 1, 0, pool))
        assert len(calls) == is_ours
        with fastseq.use_backend("cpp"):
            conv_relu_pool(*leaves, pool=pool)
        assert len(calls) == is_ours + 1


def test_one_image() -> None:
    x, weight, bias, *_ = Case(1, 3, 5, (9, 10)).arguments("cpu", torch.float32)
    torch.testing.assert_close(conv_relu_pool(x[0], weight, bias), conv_relu_pool(x, weight, bias)[0])


def test_half_precision_and_autocast_are_torchs() -> None:
    x, weight, bias, *_ = Case(2, 3, 5, (9, 10)).arguments("cpu", torch.bfloat16)
    assert torch.equal(conv_relu_pool(x, weight, bias), torchs(x, weight, bias, 1, 0, 2))
    wide = [t.float() for t in (x, weight, bias)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = conv_relu_pool(*wide)
        assert y.dtype == torch.bfloat16 and torch.equal(y, torchs(*wide, 1, 0, 2))


def test_other_devices_and_no_kernel() -> None:
    x, weight, bias, *_ = Case(2, 3, 5, (9, 10)).arguments("meta", torch.float32)
    assert conv_relu_pool(x, weight, bias).shape == (2, 5, 3, 4)
    x, weight, bias, *_ = Case(2, 3, 5, (9, 10)).arguments("cpu", torch.float32)
    with fastseq.use_backend("reference"):
        torch.testing.assert_close(conv_relu_pool(x, weight, bias), torchs(x, weight, bias, 1, 0, 2))
        with pytest.raises(BackendError, match="reference was asked for but it does not take such arguments"):
            conv_relu_pool(x.half(), weight.half(), bias.half())


def test_the_tape_is_all_that_is_kept() -> None:
    """Beside inputs, a byte for each result."""
    require_native()
    arguments = Case(2, 3, 5, (8, 8)).arguments("cpu", torch.float32)
    leaves, kept = leaves_of(arguments), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        y = conv_relu_pool(*leaves, padding=1)
    own = [t for t in kept if t.data_ptr() not in {leaf.data_ptr() for leaf in leaves}]
    assert [(t.dtype, t.numel()) for t in own] == [(torch.uint8, y.numel())]


def test_several_python_threads_at_once() -> None:
    require_kernel(TABLE, "cpu", torch.float32)
    arguments = Case(9, 20, 30, (14, 14)).arguments("cpu", torch.float32)
    leaves = leaves_of(arguments)

    def run() -> list[Tensor]:
        y = conv_relu_pool(*leaves, padding=1)
        return [y, *torch.autograd.grad(y, leaves, grad_like(y.detach()))]

    want, failures = run(), []

    def work() -> None:
        try:
            for _ in range(20):
                torch.testing.assert_close(run(), want, rtol=0, atol=0)
        except BaseException as error:
            failures.append(error)

    with threads_set(2):
        workers = [threading.Thread(target=work) for _ in range(3)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    assert not failures


X, W, B = torch.zeros(2, 3, 8, 8), torch.zeros(5, 3, 3, 3), torch.zeros(5)
ERRORS: dict[str, tuple[tuple, dict]] = {
    "x list": (([1.0], W, B), {}),
    "x dim": ((X[0, 0], W, B), {}),
    "x integer": ((X.int(), W, B), {}),
    "channels": ((X[:, :2], W, B), {}),
    "weight dim": ((X, W[0], B), {}),
    "weight dtype": ((X, W.double(), B), {}),
    "bias size": ((X, W, B[:4]), {}),
    "bias dtype": ((X, W, B.double()), {}),
    "small": ((X[:, :, :2], W, B), {}),
    "small for the pool": ((X[:, :, :3], W, B), {}),
    "stride zero": ((X, W, B), dict(stride=0)),
    "stride count": ((X, W, B), dict(stride=(1, 2, 3))),
    "stride text": ((X, W, B), dict(stride="a")),
    "padding negative": ((X, W, B), dict(padding=-1)),
    "padding text": ((X, W, B), dict(padding="a")),
    "pool zero": ((X, W, B), dict(pool=0)),
    "pool float": ((X, W, B), dict(pool=1.5)),
    "pool count": ((X, W, B), dict(pool=(1, 2, 3))),
}


@pytest.mark.parametrize("what", ERRORS)
def test_errors_are_torchs(what: str) -> None:
    args, options = ERRORS[what]
    complete = dict(stride=1, padding=0, pool=2) | options
    with pytest.raises(Exception) as theirs:
        torchs(*args, *complete.values())
    with pytest.raises(type(theirs.value)) as ours:
        conv_relu_pool(*args, **options)
    assert str(ours.value) == str(theirs.value)


def test_the_extension_checks_for_itself() -> None:
    require_native()
    good = Case(2, 3, 5, (8, 8)).arguments("cpu", torch.float32)
    forward, backward = torch.ops.fastseq_native.conv_pool, torch.ops.fastseq_native.conv_pool_backward
    y, positions = forward(*good, True)
    bad: list[dict] = [
        dict(x=good.x[0]),
        dict(x=good.x.half()),
        dict(x=good.x.double()),
        dict(x=good.x[:, :2]),
        dict(x=good.x[:, :, :1, :]),
        dict(weight=good.weight[0]),
        dict(weight=good.weight.double()),
        dict(weight=good.weight[:0]),
        dict(weight=good.weight[:, :, :0]),
        dict(stride=[0, 1]),
        dict(stride=[1]),
        dict(padding=[-1, 1]),
        dict(padding=[1, 1, 1]),
        dict(pool=[0, 2]),
        dict(pool=[16, 16]),
        dict(pool=[9, 1]),
        dict(stride=[2**60, 1]),
        dict(padding=[1, 2**60]),
        dict(pool=[2**32, 2**32]),
    ]
    for change in bad:
        with pytest.raises(RuntimeError, match="conv_pool: "):
            forward(*good._replace(**change), True)
        with pytest.raises(RuntimeError, match="conv_pool: "):
            backward(y, positions, *backward_arguments(good._replace(**change)), [True] * 3)
    for bias in (good.bias[:4], good.bias.double(), good.bias[None]):
        with pytest.raises(RuntimeError, match="conv_pool: "):
            forward(*good._replace(bias=bias), True)
    for dy, tape, needs in (
        (y[:1], positions, [True] * 3),
        (y.double(), positions, [True] * 3),
        (y, positions[:, :3], [True] * 3),
        (y, positions.int(), [True] * 3),
        (y, positions, [True] * 2),
    ):
        with pytest.raises(RuntimeError, match="conv_pool: "):
            backward(dy, tape, *backward_arguments(good), needs)
    torch.testing.assert_close(y, reference.forward(*good, True)[0])


def test_steps_too_large_for_the_kernel_are_torchs() -> None:
    x, weight = torch.randn(1, 2, 4, 4), torch.randn(3, 2, 3, 3)
    for options in (dict(stride=2**60, padding=2**60), dict(stride=100), dict(padding=200)):
        torch.testing.assert_close(conv_relu_pool(x, weight, pool=1, **options), F.conv2d(x, weight, **options).relu())


@each_implementation
def test_positions_outside_of_a_window_reach_nothing(impl: Impl) -> None:
    """No forward gives such a tape; addresses must not be made of it."""
    require(TABLE, impl, "cpu", torch.float32)
    arguments = Case(2, 16, 8, (8, 8)).arguments("cpu", torch.float32)
    y, positions = impl.kernel.forward(*arguments, True)
    dx, dweight, _ = impl.kernel.backward(y, torch.full_like(positions, 30), *backward_arguments(arguments), [True] * 3)
    assert not dx.any() and not dweight.any()


def test_the_module_is_a_convolution_and_what_follows() -> None:
    torch.manual_seed(0)
    module = fastseq.nn.ConvReLUPool2d(3, 5, (3, 5), padding=(1, 2), pool_size=(2, 3))
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 5, (3, 5), padding=(1, 2))
    assert all(map(torch.equal, module.state_dict().values(), conv.state_dict().values()))
    assert list(module.state_dict()) == list(conv.state_dict())
    x = torch.randn(2, 3, 8, 9)
    twin = nn.Sequential(conv, nn.ReLU(), nn.MaxPool2d((2, 3)))
    torch.testing.assert_close(module(x), twin(x))
    torch.testing.assert_close(module(x[0]), twin(x[0]))
    assert "pool_size=(2, 3)" in repr(module)
    without = fastseq.nn.ConvReLUPool2d(3, 5, 3, bias=False)
    assert without.bias is None and without(x).shape == (2, 5, 3, 3)
    same = fastseq.nn.ConvReLUPool2d(3, 5, 3, padding="same", dtype=torch.float64)
    assert same(x.double()).shape == (2, 5, 4, 4)


def test_cases_are_named_apart() -> None:
    assert len({str(case) for case in CASES}) == len(CASES) and CASES[: len(SELF_CHECK_CASES)] == SELF_CHECK_CASES
