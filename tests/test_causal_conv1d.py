"""The causal convolution: every implementation of the table on the op's own cases, the reference against torch, the
public function and the module.
"""

import math
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import assert_no_worse, device_of, name_of, require, require_kernel, require_native, threads_set, widest
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses import FakeTensorMode
from torch.utils._pytree import tree_map_only

import fastseq
from fastseq.functional import causal_conv1d
from fastseq.nn import CausalConv1d
from fastseq.ops.causal_conv1d import (
    CASES,
    TABLE,
    Arguments,
    Case,
    Outputs,
    causal_conv1d_op,
    grads_like,
    is_by_time,
    needs_all,
    widened,
)
from fastseq.ops.contract import rounding
from fastseq.reference import causal_conv1d as reference
from fastseq.registry import Impl

pytestmark = pytest.mark.usefixtures("one_thread")

KERNELS = [impl for impl in TABLE.impls if impl.name != "reference"]
# Each kernel with each dtype that it takes.
EACH_KIND = [(impl, dtype) for impl in KERNELS for dtype in sorted(impl.dtypes, key=str)]


each_implementation = pytest.mark.parametrize("impl", TABLE.impls, ids=name_of)
each_impl_and_dtype = pytest.mark.parametrize(("impl", "dtype"), EACH_KIND, ids=name_of)
each_half = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=name_of)
each_layout = pytest.mark.parametrize("by_time", [False, True], ids=["by_channel", "by_time"])
each_activation = pytest.mark.parametrize("activation", [None, "silu"])


def normal(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, dtype=dtype)


def leaves_of(arguments: Arguments) -> list[Tensor]:
    return [t.requires_grad_() for t in arguments[:4] if t is not None]


def theirs(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, state: Tensor | None = None, activation: str | None = None
) -> tuple[Tensor, Tensor]:
    """What torch makes of the same."""
    K = weight.shape[1]
    e = F.pad(x, (K - 1, 0)) if state is None else torch.cat([state, x], 2)
    y = F.conv1d(e, weight.unsqueeze(1), bias, groups=x.shape[1])
    return F.silu(y) if activation == "silu" else y, e[..., x.shape[2] :]


def assert_as_promised(op: Callable, args: tuple, results: tuple[Tensor, ...]) -> None:
    """What the fakes say of the results is so."""
    with FakeTensorMode() as mode:
        promised = op(*tree_map_only(Tensor, mode.from_tensor, args))
    for got, want in zip(results, promised, strict=True):
        assert (got.dtype, got.shape, got.stride()) == (want.dtype, want.shape, want.stride())


def assert_gradients(got: Any, want: Any, terms: int) -> None:
    size = max(1.0, terms**0.5)  # those of weight and bias are sums over rows and times in another order
    for ours, exact in zip(got, want, strict=True):
        tolerance = dict(rtol=1e-5, atol=4e-6 * size) if ours.dtype == torch.float32 else {}
        torch.testing.assert_close(ours, exact.to(ours.dtype), **(rounding(exact, ours.dtype, 2) or tolerance))


@each_impl_and_dtype
@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_outputs_and_gradients(impl: Impl, dtype: torch.dtype, case: Case) -> None:
    device = device_of(impl)
    require(TABLE, impl, device, dtype)
    arguments = case.arguments(device, dtype)
    if impl.needs is not None and (reason := impl.needs(*arguments)) is not None:
        pytest.skip(f"{impl.name}: {reason}")
    wide, needs = widened(arguments), needs_all(arguments)
    want = Outputs(*reference.forward(*wide))
    dy, dfinal = grads_like(Outputs(*(t.to(dtype) for t in want)))

    def run(threads: int) -> list[Tensor]:
        with threads_set(threads):
            outputs = impl.kernel.forward(*arguments)
            return [*outputs, *impl.kernel.backward(dy, dfinal, *arguments, needs)]

    y, final, *grads = run(1)
    # The terms of a long filter are added in another order.
    single = dict(rtol=1.3e-6, atol=1e-5 * max(1.0, (case.K / 8) ** 0.5)) if dtype == torch.float32 else {}
    torch.testing.assert_close(y, want.y.to(dtype), **(rounding(want.y, dtype, 1) or single))
    assert torch.equal(final, want.final.to(dtype))
    exact = reference.backward(dy.double(), dfinal.double(), *wide, needs)
    assert_gradients(grads, exact, max(case.B * case.T, 4 * case.K))
    assert_as_promised(torch.ops.fastseq.causal_conv1d, arguments, (y, final))
    assert_as_promised(torch.ops.fastseq.causal_conv1d_backward, (dy, dfinal, *arguments, needs), tuple(grads))
    for threads in (2, 2, 1) if impl.is_native else (1,):
        assert all(map(torch.equal, run(threads), [y, final, *grads]))


@each_implementation
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=name_of)
def test_self_check(impl: Impl, dtype: torch.dtype) -> None:
    require(TABLE, impl, device_of(impl), dtype)
    TABLE.self_check(impl.kernel, device_of(impl), dtype)


@pytest.mark.parametrize("wrong", range(6))
def test_self_check_sees_what_is_wrong(wrong: int) -> None:
    class Kernel:
        @staticmethod
        def forward(*args: Any) -> list[Tensor]:
            return [t * 1.001 if wrong == 4 + i else t for i, t in enumerate(reference.forward(*args))]

        @staticmethod
        def backward(*args: Any) -> list[Tensor]:
            return [g * 1.001 if wrong == i else g for i, g in enumerate(reference.backward(*args))]

    with pytest.raises(AssertionError):
        TABLE.self_check(Kernel, "cpu", torch.float64)


@each_implementation
@pytest.mark.parametrize(
    "case", [Case(3, 20, 70, 4, True, "same", True), Case(2, 7, 33, 5, False, "same", True, by_time=True)], ids=name_of
)
def test_only_needed_gradients(impl: Impl, case: Case) -> None:
    device, dtype = device_of(impl), widest(impl)
    require(TABLE, impl, device, dtype)
    arguments = case.arguments(device, dtype)
    dy, dfinal = torch.randn_like(arguments.x), torch.randn_like(arguments.state)
    for given in (dfinal, None):
        whole = impl.kernel.backward(dy, given, *arguments, [True] * 4)
        same = whole if given is not None else impl.kernel.backward(dy, dfinal * 0, *arguments, [True] * 4)
        assert all(map(torch.equal, whole, same))
        for wanted in range(16):
            needs = [bool(wanted >> i & 1) for i in range(4)]
            found = impl.kernel.backward(dy, given, *arguments, needs)
            for got, want, need in zip(found, whole, needs, strict=True):
                assert got.dtype == want.dtype
                assert torch.equal(got, want) if need else got.numel() == 0


def in_steps(t: Tensor) -> Tensor:
    """The same values with gaps between them in memory."""
    return torch.stack([t, t], -1)[..., 0]


def with_gaps(t: Tensor) -> Tensor:
    """The same values with gaps after the last dimension's."""
    return torch.cat([t, t], -1)[..., : t.shape[-1]]


def backwards(t: Tensor) -> Tensor:
    """The same values with the dimensions in reverse order in memory."""
    return t.permute(*reversed(range(t.dim()))).contiguous().permute(*reversed(range(t.dim())))


def by_time_with_gaps(t: Tensor) -> Tensor:
    """The same values, the last dimension but one next to each other, with gaps after each row of it."""
    return with_gaps(t.transpose(-1, -2)).transpose(-1, -2) if t.dim() > 1 else with_gaps(t)


def repeated(t: Tensor) -> Tensor:
    """One element in the place of all, which are the same memory."""
    return t[(slice(0, 1),) * t.dim()].expand(t.shape)


CHANGES = [in_steps, with_gaps, backwards, by_time_with_gaps, repeated]


@each_implementation
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("shape", [(3, 33, 40), (1, 33, 1), (3, 1, 7), (2, 4, 2)])
def test_any_strides(impl: Impl, change: Callable[[Tensor], Tensor], shape: tuple[int, int, int]) -> None:
    device = device_of(impl)
    require(TABLE, impl, device, torch.float32)
    arguments = Case(*shape, 4, True, "same", True).arguments(device, torch.float32)
    changed = Arguments(*(change(t) if isinstance(t, Tensor) else t for t in arguments))
    plain = Arguments(*(t.contiguous() if isinstance(t, Tensor) else t for t in changed))
    dy, dfinal = torch.randn(shape, device=device), torch.randn(*shape[:2], 3, device=device)
    results = []
    for given, grads in ((changed, (change(dy), change(dfinal))), (plain, [change(t) + 0 for t in (dy, dfinal)])):
        results.append([*impl.kernel.forward(*given), *impl.kernel.backward(*grads, *given, [True] * 4)])
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)
    mixed = impl.kernel.backward(dy, dfinal, *changed, [True] * 4)  # a gradient that lies otherwise than x
    want = impl.kernel.backward(dy, dfinal, *plain, [True] * 4)
    torch.testing.assert_close(mixed, want, rtol=1e-5, atol=1e-5)


@each_implementation
@each_layout
@pytest.mark.parametrize("T", [1, 3, 45])
def test_nothing_beyond_the_tensors_is_read(impl: Impl, T: int, by_time: bool) -> None:
    """Neither what lies between rows nor what follows the last one."""
    device = device_of(impl)
    require(TABLE, impl, device, torch.float32)
    arguments = Case(3, 21, T, 4, True, "same", True).arguments(device, torch.float32)

    def in_nan(t: Tensor) -> Tensor:
        return torch.full([2 * size for size in t.shape], math.nan, device=device)[tuple(map(slice, t.shape))].copy_(t)

    def placed(t: Tensor) -> Tensor:
        return in_nan(t.transpose(1, 2)).transpose(1, 2) if by_time and t.dim() == 3 else in_nan(t)

    def laid_out(t: Tensor) -> Tensor:
        return t.transpose(1, 2).contiguous().transpose(1, 2) if by_time else t

    hidden = Arguments(*(placed(t) if isinstance(t, Tensor) else t for t in arguments))
    plain = arguments._replace(x=laid_out(arguments.x))
    assert T == 1 or is_by_time(hidden.x) == is_by_time(plain.x) == by_time
    dy, dfinal = torch.randn(3, 21, T, device=device), torch.randn(3, 21, 3, device=device)
    assert all(map(torch.equal, impl.kernel.forward(*hidden), impl.kernel.forward(*plain)))
    found = impl.kernel.backward(placed(dy), placed(dfinal), *hidden, [True] * 4)
    assert all(map(torch.equal, found, impl.kernel.backward(laid_out(dy), dfinal, *plain, [True] * 4)))


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_reference_is_torchs(case: Case) -> None:
    if not case.B * case.C * case.T:
        pytest.skip("torch's conv1d takes no empty input")
    arguments = case.arguments("cpu", torch.float64)
    leaves = leaves_of(arguments)
    outputs = theirs(*arguments[:4], "silu" if case.silu else None)
    grads = grads_like(Outputs(*outputs))
    ours = reference.forward(*arguments)
    torch.testing.assert_close(ours, outputs)
    want = torch.autograd.grad(outputs, leaves, grads)
    needs = needs_all(arguments)
    found = [g for g, need in zip(reference.backward(*grads, *arguments, needs), needs, strict=True) if need]
    torch.testing.assert_close(found, list(want))
    torch.testing.assert_close(torch.autograd.grad(ours, leaves, grads), want)


@each_implementation
@each_layout
@each_activation
@pytest.mark.parametrize("K", [1, 3, 4, 9])
def test_streaming_is_the_whole(impl: Impl, K: int, activation: str | None, by_time: bool) -> None:
    """One time at a call, and pieces of any lengths, states and their gradients included."""
    device, dtype = device_of(impl), widest(impl)
    require(TABLE, impl, device, dtype)
    case = Case(2, 37, 23, K, activation == "silu", "same", True, by_time)
    arguments = case.arguments(device, dtype)
    leaves = leaves_of(arguments)
    x, weight, bias, state = leaves
    with fastseq.use_backend(impl.name):
        whole = causal_conv1d(*leaves, activation=activation)
        grads = grads_like(Outputs(*whole))
        want = torch.autograd.grad(whole, leaves, grads)
        for lengths in ([1] * 23, [2, 1, 7, 0, 13], [20, 3]):
            pieces, carried = [], state
            for piece in x.split(lengths, 2):
                y, carried = causal_conv1d(piece, weight, bias, carried, activation=activation)
                pieces.append(y)
            parts = (torch.cat(pieces, 2), carried)
            torch.testing.assert_close(parts, whole)
            torch.testing.assert_close(torch.autograd.grad(parts, leaves, grads), want, rtol=1e-5, atol=1e-5)


@each_implementation
def test_causal_and_each_channel_by_itself(impl: Impl) -> None:
    """A NaN reaches K times of its own row and channel, and no other."""
    device = device_of(impl)
    require(TABLE, impl, device, torch.float32)
    for by_time in (False, True):
        arguments = Case(2, 35, 60, 4, True, "same", True, by_time).arguments(device, torch.float32)
        before, _ = impl.kernel.forward(*arguments)
        arguments.x[1, 5, 20] = math.nan
        after, _ = impl.kernel.forward(*arguments)
        bad = after.isnan()
        assert bad[1, 5, 20:24].all() and bad.sum() == 4
        assert torch.equal(after[~bad], before[~bad])
        dx, dweight, dbias, dstate = impl.kernel.backward(torch.ones_like(before), None, *arguments, [True] * 4)
        assert dx[1, 5, 17:24].isnan().all() and dx.isnan().sum() == 7 and not dstate.isnan().any()
        assert dweight[5].isnan().all() and dweight.isnan().sum() == 4 and dbias.isnan().sum() == 1


@each_impl_and_dtype
@each_layout
def test_what_is_not_finite(impl: Impl, dtype: torch.dtype, by_time: bool) -> None:
    """As torch has it in float64."""
    device = device_of(impl)
    require(TABLE, impl, device, dtype)
    x = torch.tensor([math.inf, -math.inf, math.nan, -0.0, 1.0, 60000.0, -200.0]).repeat(2, 5, 3).to(device, dtype)
    x = x.transpose(1, 2).contiguous().transpose(1, 2) if by_time else x
    weight = torch.ones(5, 1, device=device, dtype=dtype)
    y, _ = impl.kernel.forward(x, weight, None, None, True)
    torch.testing.assert_close(y.double(), F.silu(x.double()), rtol=1e-2, atol=1e-2, equal_nan=True)


GRADCHECK_CASES = [
    *(Case(2, 3, 5, 3, silu, "same", True, by_time) for silu in (False, True) for by_time in (False, True)),
    Case(2, 3, 2, 4, True, "", True),
    Case(1, 2, 1, 3, True, "same", True),
    Case(2, 2, 4, 1, True),
]


def differentiable(case: Case, device: str) -> tuple[Callable[..., tuple[Tensor, ...]], list[Tensor]]:
    arguments = case.arguments(device, torch.float64)

    def call(*leaves: Tensor) -> tuple[Tensor, ...]:
        given = iter(leaves)
        tensors = [None if t is None else next(given) for t in arguments[:4]]
        outputs = causal_conv1d_op(Arguments(*tensors, arguments.silu))
        return tuple(t for t in outputs if t.numel())

    return call, [t.detach().clone().requires_grad_() for t in arguments[:4] if t is not None]


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
    x = normal(2, 4, 6).requires_grad_()

    def chained() -> Tensor:
        y = x
        for _ in range(3):  # all of them are made from the same
            y, _ = causal_conv1d(y, y[0, :, :3], y[0, :, 0], torch.tanh(y[..., :2]), activation="silu")
        return y.square().sum()

    once = torch.autograd.grad(chained(), x)[0]
    torch.testing.assert_close(torch.autograd.grad(chained(), x, create_graph=True)[0], once)


def test_gradient_of_the_state_alone() -> None:
    x, weight, state = normal(2, 3, 2).requires_grad_(), normal(3, 4).requires_grad_(), normal(2, 3, 3).requires_grad_()
    for create_graph in (False, True):
        _, final = causal_conv1d(x, weight, None, state)
        inputs = (x, weight, state)
        dx, dweight, dstate = torch.autograd.grad(
            final.sum(), inputs, create_graph=create_graph, allow_unused=True, materialize_grads=True
        )
        assert torch.equal(dx, torch.ones_like(x)) and not dweight.any()
        assert torch.equal(dstate, torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64).expand_as(state))


def test_transforms_of_torch_func() -> None:
    x, weight, bias, state = normal(3, 2, 4, 5), normal(4, 3), normal(4), normal(3, 2, 4, 2)
    ours = partial(causal_conv1d, activation="silu")
    other = partial(theirs, activation="silu")
    mapped = [torch.func.vmap(f, (0, None, None, 0))(x, weight, bias, state) for f in (ours, other)]
    torch.testing.assert_close(*mapped)
    for transform in (torch.func.jacrev, torch.func.jacfwd):
        torch.testing.assert_close(*(transform(f, (0, 1, 2, 3))(x[0], weight, bias, state[0]) for f in (ours, other)))
    grads = [torch.func.grad(lambda *args, f=f: f(*args)[0].square().sum(), (0, 1, 2, 3)) for f in (ours, other)]
    torch.testing.assert_close(*(torch.func.vmap(g, (0, None, None, 0))(x, weight, bias, state) for g in grads))


@pytest.mark.parametrize(
    "case", [Case(2, 5, 9, 4, True, "same", True), Case(2, 5, 9, 3, False, "", by_time=True)], ids=name_of
)
def test_opcheck(case: Case) -> None:
    arguments = case.arguments("cpu", torch.float64)
    grads = grads_like(Outputs(*reference.forward(*arguments)))
    backward = torch.ops.fastseq.causal_conv1d_backward.default
    torch.library.opcheck(backward, (*grads, *arguments, needs_all(arguments)))
    leaves_of(arguments)
    torch.library.opcheck(torch.ops.fastseq.causal_conv1d.default, tuple(arguments))


@each_layout
def test_dynamic_sizes_compile_once(by_time: bool) -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def call(x: Tensor, weight: Tensor, bias: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        return causal_conv1d(x.transpose(1, 2) if by_time else x, weight, bias, state, activation="silu")

    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend=counter)
    counts = []
    for B, C, T in ((5, 6, 10), (5, 11, 12), (2, 17, 24)):  # no size is that of the state, which they would share
        leaves = [normal(B, T, C) if by_time else normal(B, C, T), normal(C, 4), normal(C), normal(B, C, 3)]
        leaves = [t.requires_grad_() for t in leaves]
        results = []
        for function in (compiled, call):
            outputs = function(*leaves)
            results.append([*outputs, *torch.autograd.grad([t.square().sum() for t in outputs], leaves)])
        torch.testing.assert_close(*results)
        counts.append(counter.frame_count)
    assert counts == counts[:1] * 3


@each_layout
def test_compiles_with_inductor(by_time: bool) -> None:
    torch._dynamo.reset()
    module = CausalConv1d(7, 4, activation="silu").double()

    def call(x: Tensor) -> Tensor:
        return module(x.transpose(1, 2)).transpose(1, 2) * 2 if by_time else module(x) * 2

    x = normal(2, 9, 7) if by_time else normal(2, 7, 9)
    leaves = [x.requires_grad_(), *module.parameters()]
    want, got = call(x), torch.compile(call, fullgraph=True)(x)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(*(torch.autograd.grad(y.square().sum(), leaves) for y in (got, want)))


def test_export_with_dynamic_length() -> None:
    T = torch.export.Dim("T", min=2, max=500)
    module = CausalConv1d(5, 4, activation="silu")
    exported = torch.export.export(module, (torch.randn(2, 5, 7),), dynamic_shapes=({2: T}, None, None)[:1])
    for size in (7, 2, 40):
        x = torch.randn(2, 5, size)
        torch.testing.assert_close(exported.module()(x), module(x))


@each_implementation
def test_changed_inputs_raise_in_backward(impl: Impl) -> None:
    require(TABLE, impl, "cpu", torch.float64)
    leaves = [t.requires_grad_() for t in (normal(2, 4, 5), normal(4, 3), normal(4), normal(2, 4, 2))]
    with fastseq.use_backend(impl.name):
        for changed in range(4):
            inner = [t * 1 for t in leaves]
            y, _ = causal_conv1d(*inner, activation="silu")
            with torch.no_grad():
                inner[changed].add_(1)
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                y.sum().backward()


@each_layout
@each_activation
@pytest.mark.parametrize("K", [1, 2, 3, 4, 7])
def test_the_function_is_torchs(K: int, activation: str | None, by_time: bool) -> None:
    x = torch.randn(3, 50, 21).transpose(1, 2) if by_time else torch.randn(3, 21, 50)
    leaves = [t.requires_grad_() for t in (x, torch.randn(21, K), torch.randn(21), torch.randn(3, 21, K - 1))]
    dy = torch.randn(3, 21, 50)
    for biased, stateful in ((False, False), (True, False), (False, True), (True, True)):
        given = [*leaves[:2], leaves[2] if biased else None, leaves[3] if stateful else None]
        y, final = causal_conv1d(*given, activation=activation)
        want, other = theirs(*given, activation)
        torch.testing.assert_close((y, final), (want, other))
        assert is_by_time(y) == by_time and final.is_contiguous()
        # Those of weight and bias are sums in another order.
        used = [t for t in given if t is not None]
        grads = [torch.autograd.grad(t, used, dy, allow_unused=True, materialize_grads=True) for t in (y, want)]
        torch.testing.assert_close(*grads, rtol=1e-5, atol=3e-5)
        with torch.no_grad():
            assert torch.equal(causal_conv1d(*given, activation=activation)[0], y)


@each_layout
def test_both_layouts_are_read_where_they_are(by_time: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """No copy of x is made."""
    require_native()
    seen: list[tuple] = []
    native = TABLE.impls[0].kernel
    spy = type("Spy", (), dict(forward=lambda *args: (seen.append(args), native.forward(*args))[1]))
    monkeypatch.setattr(TABLE, "select", lambda *_: spy)
    x = torch.randn(4, 9, 33).transpose(1, 2) if by_time else torch.randn(4, 33, 9)
    y, _ = causal_conv1d(x, torch.randn(33, 4))
    assert seen[0][0].data_ptr() == x.data_ptr() and y.stride() == x.stride()


@each_half
@each_layout
def test_half_precision(dtype: torch.dtype, by_time: bool) -> None:
    """No worse than torch, which rounds after each step."""
    x = normal(3, 40, 30).transpose(1, 2) if by_time else normal(3, 30, 40)
    leaves = [t.to(dtype).requires_grad_() for t in (x, normal(30, 4), normal(30), normal(3, 30, 3))]
    dy = normal(3, 30, 40).to(dtype)
    results = []
    for function, given in (
        (causal_conv1d, leaves),
        (theirs, leaves),
        (theirs, [t.detach().double().requires_grad_() for t in leaves]),
    ):
        y, _ = function(*given, activation="silu")
        results.append([y, *torch.autograd.grad(y, given, dy.to(y.dtype))])
    assert_no_worse(*results)


@each_half
def test_float32_weights_beside_half_precision(dtype: torch.dtype) -> None:
    x, weight, bias = normal(2, 30, 40).to(dtype), normal(30, 4).float(), normal(30).float()
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    y, final = causal_conv1d(*leaves)
    assert y.dtype == final.dtype == dtype
    want, _ = theirs(*(t.double() for t in leaves))
    torch.testing.assert_close(y, want.to(dtype))
    grads = torch.autograd.grad(y.float().sum(), leaves)
    assert [g.dtype for g in grads] == [dtype, torch.float32, torch.float32]
    exact = torch.autograd.grad(want.sum(), leaves)
    torch.testing.assert_close(grads[1:], exact[1:], rtol=1e-5, atol=1e-4)


def test_autocast_is_conv1ds() -> None:
    x, weight, state = torch.randn(2, 3, 5).requires_grad_(), torch.randn(3, 4).requires_grad_(), torch.randn(2, 3, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, final = causal_conv1d(x, weight, None, state)
        want, _ = theirs(x, weight, None, state)
        assert y.dtype == final.dtype == want.dtype == torch.bfloat16
        torch.testing.assert_close(y, want, rtol=2e-2, atol=5e-2)
        again, _ = causal_conv1d(x.bfloat16(), weight, None, state.bfloat16())
        assert torch.equal(again, y)
        assert causal_conv1d(x.double(), weight.double())[0].dtype == torch.float64
    dx, dweight = torch.autograd.grad(y.float().sum(), (x, weight))
    assert dx.dtype == dweight.dtype == torch.float32


def test_other_devices_and_no_kernel() -> None:
    x = torch.empty(2, 3, 5, device="meta")
    y, final = causal_conv1d(x, torch.empty(3, 4, device="meta"))
    assert y.shape == (2, 3, 5) and final.shape == (2, 3, 3)
    with fastseq.use_backend("reference"):
        x, weight = torch.randn(2, 3, 5).requires_grad_(), torch.randn(3, 4)
        y, _ = causal_conv1d(x, weight)
        torch.testing.assert_close(y, theirs(x, weight)[0])
        assert torch.autograd.grad(y.sum(), x)[0].shape == x.shape


@each_implementation
def test_results_share_no_memory_with_inputs(impl: Impl) -> None:
    require(TABLE, impl, device_of(impl), torch.float32)
    for T, K in ((5, 1), (1, 3), (0, 3)):
        x, weight, state = (torch.ones(s, device=device_of(impl)) for s in ((2, 3, T), (3, K), (2, 3, K - 1)))
        y, final = impl.kernel.forward(x, weight, None, state, False)
        dx, _, _, dstate = impl.kernel.backward(y, final, x, weight, None, state, False, [True, False, False, True])
        there = [t.data_ptr() for t in (x, state, y, final, dx, dstate) if t.numel()]
        assert len(set(there)) == len(there)


def test_several_python_threads_at_once() -> None:
    require_kernel(TABLE, "cpu", torch.float32)
    leaves = [t.requires_grad_() for t in (torch.randn(4, 130, 300), torch.randn(130, 4), torch.randn(130))]
    dy = torch.randn(4, 130, 300)

    def run() -> list[Tensor]:
        y, final = causal_conv1d(*leaves, activation="silu")
        return [y, final, *torch.autograd.grad(y, leaves, dy)]

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


X, W = torch.zeros(2, 3, 5), torch.zeros(3, 4)
ERRORS: dict[str, tuple[tuple, dict, type[Exception], str]] = {
    "x list": (([1.0], W), {}, TypeError, "x must be a dense tensor, got list"),
    "x sparse": ((X.to_sparse(), W), {}, TypeError, "x must be a dense tensor, got torch.sparse_coo"),
    "x integer": ((X.int(), W), {}, TypeError, "x must be float32, float64, bfloat16 or float16, got torch.int32"),
    "x dim": ((X[0], W), {}, ValueError, r"x must be \[B, C, T\], got \[3, 5\]"),
    "weight none": ((X, None), {}, TypeError, "weight must be a dense tensor, got NoneType"),
    "weight dim": ((X, W[:, None]), {}, ValueError, r"weight must be \[3, K\], .*, got \[3, 1, 4\]"),
    "weight size": ((X, W[:2]), {}, ValueError, r"weight must be \[3, K\], .*, got \[2, 4\]"),
    "weight empty": ((X, W[:, :0]), {}, ValueError, r"weight must be .* at least one element .*, got \[3, 0\]"),
    "weight dtype": ((X, W.double()), {}, ValueError, "weight must be of x's dtype, torch.float32, got torch.float64"),
    "weight half": ((X, W.half()), {}, ValueError, "weight must be of x's dtype, torch.float32, got torch.float16"),
    "weight wide": ((X.half(), W.double()), {}, ValueError, "weight .* torch.float16 or float32, got torch.float64"),
    "weight device": ((X, W.to("meta")), {}, ValueError, "weight must be on x's device, cpu, got meta"),
    "bias list": ((X, W, [0.0]), {}, TypeError, "bias must be a dense tensor, got list"),
    "bias size": ((X, W, W[0]), {}, ValueError, r"bias must be \[3\], one number a channel, got \[4\]"),
    "bias dim": ((X, W, W), {}, ValueError, r"bias must be \[3\], one number a channel, got \[3, 4\]"),
    "bias dtype": ((X, W, W[:, 0].double()), {}, ValueError, "bias must be of x's dtype, torch.float32, got .*float64"),
    "state list": ((X, W, None, [0.0]), {}, TypeError, "state must be a dense tensor, got list"),
    "state size": ((X, W, None, X), {}, ValueError, r"state must be \[2, 3, 3\], .*, got \[2, 3, 5\]"),
    "state dtype": ((X, W, None, X[..., :3].half()), {}, ValueError, "state must be of x's dtype, .*32, got .*float16"),
    "function": ((X, W), dict(activation=F.silu), TypeError, "activation must be a str or None, got function"),
    "name": ((X, W), dict(activation="relu"), ValueError, "activation must be None or 'silu', got 'relu'"),
}


@pytest.mark.parametrize("what", ERRORS)
def test_bad_arguments_are_named(what: str) -> None:
    args, options, error, message = ERRORS[what]
    with pytest.raises(error, match=message):
        causal_conv1d(*args, **options)


def test_the_extension_checks_for_itself() -> None:
    require_native()
    good = Case(2, 5, 6, 4, True, "same", True).arguments("cpu", torch.float32)
    forward, backward = torch.ops.fastseq_native.causal_conv1d, torch.ops.fastseq_native.causal_conv1d_backward
    y, final = forward(*good)
    for change in (
        dict(x=good.x[0]),
        dict(x=good.x.int()),
        dict(x=good.x[:, :4]),
        dict(x=good.x[:1]),
        dict(x=good.x.double()),
        dict(weight=good.weight[:4]),
        dict(weight=good.weight[0]),
        dict(weight=good.weight[:, :0]),
        dict(weight=good.weight[:, :3]),
        dict(weight=good.weight.double()),
        dict(weight=good.weight.half()),
        dict(bias=good.bias[:4]),
        dict(bias=good.bias[None]),
        dict(bias=good.bias.double()),
        dict(state=good.state[..., :2]),
        dict(state=good.state[:1]),
        dict(state=good.state.double()),
    ):
        with pytest.raises(RuntimeError, match="causal_conv1d: "):
            forward(*good._replace(**change))
    for dy, dfinal, arguments, needs in (
        (y[:1], final, good, [True] * 4),
        (y.double(), final, good, [True] * 4),
        (y, final[..., :2], good, [True] * 4),
        (y, final.double(), good, [True] * 4),
        (y, final, good, [True] * 3),
        (y, final, good._replace(bias=None), [True] * 4),
        (y, final, good._replace(state=None), [True] * 4),
    ):
        with pytest.raises(RuntimeError, match="causal_conv1d: "):
            backward(dy, dfinal, *arguments, needs)
    torch.testing.assert_close((y, final), reference.forward(*good))


@each_activation
@pytest.mark.parametrize("bias", [True, False])
def test_the_module_is_a_padded_conv1d(bias: bool, activation: str | None) -> None:
    twin = nn.Conv1d(6, 6, 4, groups=6, bias=bias)
    module = CausalConv1d(6, 4, bias, activation)
    module.load_state_dict(twin.state_dict())
    twin.load_state_dict(module.state_dict())
    x = torch.randn(3, 6, 11, requires_grad=True)
    act = F.silu if activation else nn.Identity()
    want = act(twin(F.pad(x, (3, 0))))
    y = module(x)
    torch.testing.assert_close(y, want)
    dy = torch.randn_like(y)
    grads = [torch.autograd.grad(t, [x, *m.parameters()], dy) for t, m in ((y, module), (want, twin))]
    torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(module(x[0]), want[0])
    torch.testing.assert_close(module(x.transpose(1, 2).contiguous().transpose(1, 2)), want)
    first, state = module(x[..., :2], return_state=True)
    rest, state = module(x[..., 2:], state, return_state=True)
    torch.testing.assert_close(torch.cat([first, rest], 2), want)
    assert torch.equal(state, x[..., -3:])
    alone, state = module(x[0], torch.zeros(6, 3), return_state=True)
    assert alone.shape == (6, 11) and torch.equal(state, x[0, :, -3:])


def test_the_modules_parameters() -> None:
    torch.manual_seed(1)
    module = CausalConv1d(6, 4)
    torch.manual_seed(1)
    twin = nn.Conv1d(6, 6, 4, groups=6)
    torch.testing.assert_close(dict(module.named_parameters()), dict(twin.named_parameters()))
    assert repr(module) == "CausalConv1d(6, kernel_size=4, bias=True, activation=None)"
    assert CausalConv1d(6, 4, bias=False, dtype=torch.float64, device="meta").weight.dtype == torch.float64


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: CausalConv1d(0, 4), "channels must be at least 1, got 0"),
        (lambda: CausalConv1d(4, 0), "kernel_size must be at least 1, got 0"),
        (lambda: CausalConv1d(4, 2, activation="gelu"), "activation must be None or 'silu', got 'gelu'"),
        (lambda: CausalConv1d(4, 2)(torch.zeros(2, 3, 5)), r"x must have 4 channels, .*, got \[2, 3, 5\]"),
        (lambda: CausalConv1d(4, 2)(torch.zeros(4)), r"x must be \[B, 4, T\] or \[4, T\], got \[4\]"),
    ],
)
def test_the_modules_errors(call: Callable, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
