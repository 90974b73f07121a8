"""Bias, activation, gate and dropout in one pass: every implementation of the table on the op's own cases, the
reference against torch, and the public function.
"""

import math
import operator
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import assert_no_worse, device_of, name_of, require, require_native, threads_set, widest
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses import FakeTensorMode
from torch.utils._pytree import tree_map_only

import fastseq
from fastseq.functional import bias_activation
from fastseq.ops.activation import (
    CASES,
    KINDS,
    SELF_CHECK_CASES,
    TABLE,
    Arguments,
    Case,
    activation,
    grad_like,
    kind_of,
    needs_all,
    widened,
)
from fastseq.ops.contract import rounding
from fastseq.reference import activation as reference
from fastseq.reference import dropout
from fastseq.registry import HALF, Impl

pytestmark = pytest.mark.usefixtures("one_thread")

KERNELS = [impl for impl in TABLE.impls if impl.name != "reference"]
# Each kernel with each dtype that it takes.
EACH_KIND = [(impl, dtype) for impl in KERNELS for dtype in sorted(impl.dtypes, key=str)]

TORCHS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda a: a * 1,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "silu": F.silu,
}


each_implementation = pytest.mark.parametrize("impl", TABLE.impls, ids=name_of)
each_impl_and_dtype = pytest.mark.parametrize(("impl", "dtype"), EACH_KIND, ids=name_of)
each_kind = pytest.mark.parametrize("kind", KINDS)
each_half = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=name_of)


def normal(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, dtype=dtype)


def leaves_of(arguments: Arguments) -> list[Tensor]:
    return [t.requires_grad_() for t in arguments[:3] if t is not None]


def assert_as_promised(op: Callable, args: tuple, results: Any) -> None:
    """What the fakes say of the results is so."""
    with FakeTensorMode() as mode:
        promised = op(*tree_map_only(Tensor, mode.from_tensor, args))
    both = zip(*((r,) if isinstance(r, Tensor) else r for r in (results, promised)), strict=True)
    for got, want in both:
        assert (got.dtype, got.shape, got.is_contiguous()) == (want.dtype, want.shape, want.is_contiguous())


def assert_gradients(got: Any, want: Any, rows: int) -> None:
    size = max(1.0, rows**0.5)  # that of the bias is a sum over rows in another order
    for ours, theirs in zip(got, want, strict=True):
        tolerance = dict(rtol=1e-5, atol=2e-6 * size) if ours.dtype == torch.float32 else {}
        torch.testing.assert_close(ours, theirs.to(ours.dtype), **(rounding(theirs, ours.dtype, 2) or tolerance))


@each_impl_and_dtype
@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_outputs_and_gradients(impl: Impl, dtype: torch.dtype, case: Case) -> None:
    device = device_of(impl)
    require(TABLE, impl, device, dtype)
    arguments = case.arguments(device, dtype)
    wide, needs = widened(arguments), needs_all(arguments)
    want = reference.forward(*wide)
    dy = grad_like(want.to(dtype))

    def run(threads: int) -> list[Tensor]:
        with threads_set(threads):
            return [impl.kernel.forward(*arguments), *impl.kernel.backward(dy, *arguments, needs)]

    y, *grads = run(1)
    torch.testing.assert_close(y, want.to(dtype), **rounding(want, dtype, 1))
    assert_gradients(grads, reference.backward(dy.double(), *wide, needs), case.rows)
    assert_as_promised(torch.ops.fastseq.activation, arguments, y)
    assert_as_promised(torch.ops.fastseq.activation_backward, (dy, *arguments, needs), tuple(grads))
    for threads in (2, 2, 1) if impl.is_native else (1,):
        assert all(map(torch.equal, run(threads), [y, *grads]))


@each_implementation
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=name_of)
def test_self_check(impl: Impl, dtype: torch.dtype) -> None:
    require(TABLE, impl, device_of(impl), dtype)
    TABLE.self_check(impl.kernel, device_of(impl), dtype)


@pytest.mark.parametrize("wrong", range(4))
def test_self_check_sees_what_is_wrong(wrong: int) -> None:
    class Kernel:
        @staticmethod
        def forward(*args: Any) -> Tensor:
            return reference.forward(*args) * (1.001 if wrong == 3 else 1)

        @staticmethod
        def backward(*args: Any) -> list[Tensor]:
            return [g * 1.001 if wrong == i else g for i, g in enumerate(reference.backward(*args))]

    with pytest.raises(AssertionError):
        TABLE.self_check(Kernel, "cpu", torch.float64)


@each_implementation
@pytest.mark.parametrize(
    "case", [Case(40, 300, "silu", True, "same", 0.2), Case(7, 33, "relu", True, "same")], ids=name_of
)
def test_only_needed_gradients(impl: Impl, case: Case) -> None:
    device, dtype = device_of(impl), widest(impl)
    require(TABLE, impl, device, dtype)
    arguments = case.arguments(device, dtype)
    dy = torch.randn_like(arguments.x)
    whole = impl.kernel.backward(dy, *arguments, [True] * 3)
    for wanted in range(8):
        needs = [bool(wanted >> i & 1) for i in range(3)]
        found = impl.kernel.backward(dy, *arguments, needs)
        for got, want, need in zip(found, whole, needs, strict=True):
            assert torch.equal(got, want) if need else got.numel() == 0


def in_steps(t: Tensor) -> Tensor:
    """The same values with gaps between them in memory."""
    return torch.stack([t, t], -1)[..., 0]


def with_gaps(t: Tensor) -> Tensor:
    """The same values with gaps between rows, if there are rows."""
    return torch.cat([t, t], -1)[..., : t.shape[-1]]


def backwards(t: Tensor) -> Tensor:
    """The same values with the dimensions in reverse order in memory."""
    return t.t().contiguous().t()


def repeated(t: Tensor) -> Tensor:
    """One element in the place of all, which are the same memory."""
    return t[(slice(0, 1),) * t.dim()].expand(t.shape)


@each_implementation
@pytest.mark.parametrize("change", [in_steps, with_gaps, backwards, repeated])
@pytest.mark.parametrize("shape", [(20, 33), (1, 33), (20, 1)])
def test_any_strides(impl: Impl, change: Callable[[Tensor], Tensor], shape: tuple[int, int]) -> None:
    device = device_of(impl)
    require(TABLE, impl, device, torch.float32)
    arguments = Case(*shape, "gelu", True, "same", 0.2).arguments(device, torch.float32)
    changed = arguments._replace(**{name: change(getattr(arguments, name)) for name in ("x", "up", "bias")})
    plain = Arguments(*(t.contiguous() if isinstance(t, Tensor) else t for t in changed))
    dy = torch.randn(shape, device=device)
    results = [
        [impl.kernel.forward(*given), *impl.kernel.backward(grad, *given, [True] * 3)]
        for given, grad in ((changed, change(dy)), (plain, change(dy).contiguous()))
    ]
    torch.testing.assert_close(*results, rtol=0 if impl.name != "reference" else 1e-5, atol=1e-6)


@each_implementation
def test_nothing_beyond_the_rows_is_read(impl: Impl) -> None:
    """Neither what lies between rows nor what follows the last one."""
    device = device_of(impl)
    require(TABLE, impl, device, torch.float32)
    arguments = Case(20, 33, "gelu", True, "same", 0.2).arguments(device, torch.float32)

    def in_nan(t: Tensor) -> Tensor:
        return torch.full([2 * size for size in t.shape], math.nan, device=device)[tuple(map(slice, t.shape))].copy_(t)

    hidden = arguments._replace(**{name: in_nan(getattr(arguments, name)) for name in ("x", "up", "bias")})
    dy = torch.randn(20, 33, device=device)
    assert torch.equal(impl.kernel.forward(*hidden), impl.kernel.forward(*arguments))
    found = impl.kernel.backward(in_nan(dy), *hidden, [True] * 3)
    assert all(map(torch.equal, found, impl.kernel.backward(dy, *arguments, [True] * 3)))


@each_kind
def test_reference_is_torchs(kind: str) -> None:
    arguments = Case(9, 21, kind, True, "same").arguments("cpu", torch.float64)
    leaves = leaves_of(arguments)
    x, up, bias = leaves
    theirs = TORCHS[kind](x + bias) * up
    dy = torch.randn_like(theirs)
    torch.testing.assert_close(reference.forward(*arguments), theirs)
    want = torch.autograd.grad(theirs, leaves, dy)
    torch.testing.assert_close(reference.backward(dy, *arguments, [True] * 3), want)
    torch.testing.assert_close(torch.autograd.grad(reference.forward(*arguments), leaves, dy), want)


# From the smallest subnormal to the largest number, and densely where activations bend.
def places(dtype: torch.dtype) -> Tensor:
    limits = torch.finfo(torch.float32)
    sizes = torch.logspace(math.log10(limits.smallest_normal) - 7, math.log10(limits.max), 2000, dtype=torch.float64)
    near = torch.linspace(-40, 40, 20001, dtype=torch.float64)
    return torch.cat([sizes, -sizes, near, torch.zeros(1, dtype=torch.float64)]).to(dtype)


@each_impl_and_dtype
@each_kind
def test_everywhere_as_exact_as_torch(impl: Impl, dtype: torch.dtype, kind: str) -> None:
    """Each element, in the size of the result where that is not small, whatever x: nothing cancels or overflows."""
    device = device_of(impl)
    require(TABLE, impl, device, dtype)
    x = places(dtype)
    # Triton's interpreter reads subnormal bfloat16 as zeros.
    least = torch.finfo(dtype).tiny if impl.is_interpreted(device) and dtype == torch.bfloat16 else 0
    x = x[x.isfinite() & ((x.abs() >= least) | (x == 0))][None].to(device)
    given: tuple = (None, None, None, KINDS[kind], 0.0)

    def value_and_slope(kernel: Any, x: Tensor) -> list[Tensor]:
        slope, *_ = kernel.backward(torch.ones_like(x), x, *given, [True, False, False])
        return [kernel.forward(x, *given), slope]

    ours, want = value_and_slope(impl.kernel, x), value_and_slope(reference, x.double())
    eps = torch.finfo(dtype).eps
    # An exponent's last places are relative errors of exp as large as the exponent, at most some hundreds of steps: in
    # the reference, too. C++ kernels take some exponents exactly.
    size = x.double().abs()
    exponents = dict(gelu=size**2, gelu_tanh=3.2 * (size + 0.044715 * size**3), silu=2 * size).get(kind, size * 0)
    if impl.is_native and (kind == "silu" or (kind == "gelu" and dtype != torch.float64)):
        exponents = size * 0
    steps = 4 + exponents.clamp(max=800) if dtype not in HALF else 1
    slack = 64 * torch.finfo(torch.float32).tiny if dtype != torch.float16 else 2**-24
    for got, exact in zip(ours, want, strict=True):
        assert got.isfinite().all()
        # Slopes pass through zero as sums, whose terms are rounded.
        rounded = max(slack, 2 * eps) if got is ours[1] else slack
        assert ((got.double() - exact).abs() <= steps * eps * exact.abs() + rounded).all()


@each_impl_and_dtype
@each_kind
def test_nan_and_infinities_are_torchs(impl: Impl, dtype: torch.dtype, kind: str) -> None:
    """What torch makes of them in float64: in float32 it has NaN for gelu(inf) on some machines."""
    device = device_of(impl)
    require(TABLE, impl, device, dtype)
    x = torch.tensor([math.inf, -math.inf, math.nan, -0.0, 1.0]).repeat(1, 9)
    leaf = x.double().requires_grad_()
    theirs = TORCHS[kind](leaf)
    (want,) = torch.autograd.grad(theirs, leaf, torch.ones_like(theirs))
    given = x.to(device, dtype)
    y = impl.kernel.forward(given, None, None, None, KINDS[kind], 0.0)
    dx, *_ = impl.kernel.backward(given**0, given, None, None, None, KINDS[kind], 0.0, [True, False, False])
    for got, other in ((y, theirs), (dx, want)):
        torch.testing.assert_close(got.cpu().double(), other.detach(), rtol=1e-2, atol=1e-2, equal_nan=True)


@each_implementation
@each_kind
def test_one_bad_element_stays_one(impl: Impl, kind: str) -> None:
    device = device_of(impl)
    require(TABLE, impl, device, torch.float32)
    arguments = Case(20, 70, kind, True, "same").arguments(device, torch.float32)
    before = impl.kernel.forward(*arguments)
    arguments.x[3, 5] = math.nan
    bad = impl.kernel.forward(*arguments).isnan()
    assert bad[3, 5] and bad.sum() == 1
    after = impl.kernel.forward(*arguments)
    assert torch.equal(after[~bad], before[~bad])
    dx, dup, dbias = impl.kernel.backward(torch.ones_like(before), *arguments, [True] * 3)
    assert dx.isnan().sum() <= 1 and dup.isnan().sum() == 1 and dbias.isnan().sum() <= 1


@each_implementation
@pytest.mark.parametrize("p", [0.1, 0.5, 1.0])
def test_dropout_drops_what_keep_says(impl: Impl, p: float) -> None:
    device = device_of(impl)
    require(TABLE, impl, device, torch.float32)
    seed, shape = torch.tensor(0x7EDCBA9876543210), (40, 300)
    ones = torch.ones(shape, device=device)
    keep = dropout.keep(seed, shape, p, ones.device).float()
    torch.testing.assert_close(impl.kernel.forward(ones, None, None, seed, KINDS["relu"], p), keep)
    grads = impl.kernel.backward(ones, ones, ones, None, seed, KINDS["relu"], p, [True, True, False])
    torch.testing.assert_close(list(grads[:2]), [keep, keep])


def test_dropout_follows_torchs_generator() -> None:
    draw = partial(bias_activation, torch.ones(50, 60), activation="identity", dropout_p=0.3)
    torch.manual_seed(1)
    first, second = draw(), draw()
    torch.manual_seed(1)
    assert torch.equal(draw(), first) and not torch.equal(first, second)
    assert abs((first == 0).float().mean() - 0.3) < 0.05
    assert torch.equal(draw(training=False), torch.ones(50, 60))
    x = torch.ones(50, 60, requires_grad=True)
    y = bias_activation(x, activation="identity", dropout_p=0.3)
    torch.testing.assert_close(torch.autograd.grad(y.sum(), x)[0], y.detach())


GRADCHECK_CASES = [
    *(Case(3, 5, kind, gated, "same") for kind in KINDS for gated in (False, True)),
    Case(3, 20, "gelu", True, "same", 0.4, halves=True),
    Case(4, 7, "silu"),
]


def differentiable(case: Case, device: str) -> tuple[Callable[..., Tensor], list[Tensor]]:
    arguments = case.arguments(device, torch.float64)

    def call(*leaves: Tensor) -> Tensor:
        given = iter(leaves)
        return activation(Arguments(*(None if t is None else next(given) for t in arguments[:3]), *arguments[3:]))

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
    x = normal(4, 6).requires_grad_()

    def chained() -> Tensor:
        y = x
        for _ in range(3):  # all three are made from the same
            y = bias_activation(y, y[0], up=torch.tanh(y), activation="silu")
        return y.square().sum()

    once = torch.autograd.grad(chained(), x)[0]
    torch.testing.assert_close(torch.autograd.grad(chained(), x, create_graph=True)[0], once)


def test_transforms_of_torch_func() -> None:
    x, up, bias = normal(3, 4, 5), normal(3, 4, 5), normal(5)

    def ours(x: Tensor, up: Tensor, bias: Tensor) -> Tensor:
        return bias_activation(x, bias, up=up, activation="gelu")

    def theirs(x: Tensor, up: Tensor, bias: Tensor) -> Tensor:
        return F.gelu(x + bias) * up

    torch.testing.assert_close(torch.func.vmap(ours, (0, 0, None))(x, up, bias), theirs(x, up, bias))
    for transform in (torch.func.jacrev, torch.func.jacfwd):
        torch.testing.assert_close(*(transform(f, (0, 1, 2))(x[0], up[0], bias) for f in (ours, theirs)))
    grads = [torch.func.grad(lambda *args, f=f: f(*args).square().sum(), (0, 1, 2)) for f in (ours, theirs)]
    torch.testing.assert_close(*(torch.func.vmap(g, (0, 0, None))(x, up, bias) for g in grads))


def test_dropout_under_vmap() -> None:
    draw = partial(bias_activation, activation="relu", dropout_p=0.5)
    x = torch.ones(3, 40, 50)
    with pytest.raises(RuntimeError, match="randomness"):
        torch.func.vmap(draw)(x)
    one, other, _ = torch.func.vmap(draw, randomness="same")(x)
    assert torch.equal(one, other)
    one, other, _ = torch.func.vmap(draw, randomness="different")(x)
    assert not torch.equal(one, other)


@pytest.mark.parametrize("case", [Case(3, 20, "gelu", True, "same", 0.4), Case(4, 7, "silu", halves=True)], ids=name_of)
def test_opcheck(case: Case) -> None:
    arguments = case.arguments("cpu", torch.float64)
    backward = torch.ops.fastseq.activation_backward.default
    torch.library.opcheck(backward, (torch.ones_like(arguments.x), *arguments, needs_all(arguments)))
    leaves_of(arguments)
    torch.library.opcheck(torch.ops.fastseq.activation.default, tuple(arguments))


OPTIONS: dict[str, dict] = {
    "plain": dict(activation="gelu"),
    "gated": dict(activation="silu", gate=True),
    "dropout": dict(activation="relu", gate=True, dropout_p=0.4),
}


def halved(both: Tensor, bias: Tensor, gate: bool = False, **options: Any) -> Tensor:
    x, up = both.chunk(2, -1)
    return bias_activation(x, bias, up=up if gate else None, **options)


@pytest.mark.parametrize("name", OPTIONS)
def test_dynamic_sizes_compile_once(name: str) -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    call = partial(halved, **OPTIONS[name])
    compiled = torch.compile(lambda *args: call(*args), fullgraph=True, dynamic=True, backend=counter)
    counts = []
    for shape in ((3, 6, 10), (3, 11, 12), (2, 17, 24)):
        leaves = [normal(*shape).requires_grad_(), normal(shape[-1] // 2).requires_grad_()]
        results = []
        for function in (compiled, call):
            torch.manual_seed(0)
            y = function(*leaves)
            results.append([y, *torch.autograd.grad(y.square().sum(), leaves)])
        torch.testing.assert_close(*results)
        counts.append(counter.frame_count)
    assert counts == counts[:1] * 3


def test_compiles_with_inductor() -> None:
    torch._dynamo.reset()
    leaves = [normal(2, 7, 20).requires_grad_(), normal(10).requires_grad_()]
    call = partial(halved, activation="silu", gate=True)
    want, got = call(*leaves), torch.compile(lambda *args: call(*args), fullgraph=True)(*leaves)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(*(torch.autograd.grad(y.square().sum(), leaves) for y in (got, want)))


def test_export_with_dynamic_length() -> None:
    class Model(nn.Module):
        def forward(self, both: Tensor, bias: Tensor) -> Tensor:
            return halved(both, bias, gate=True)

    T = torch.export.Dim("T", min=2, max=500)
    bias = normal(5)
    exported = torch.export.export(Model(), (normal(2, 7, 10), bias), dynamic_shapes=({1: T}, None))
    for size in (7, 2, 40):
        both = normal(2, size, 10)
        torch.testing.assert_close(exported.module()(both, bias), Model()(both, bias))


@each_implementation
def test_changed_inputs_raise_in_backward(impl: Impl) -> None:
    require(TABLE, impl, "cpu", torch.float64)
    leaves = [normal(4, 5).requires_grad_(), normal(5).requires_grad_(), normal(4, 5).requires_grad_()]
    with fastseq.use_backend(impl.name):
        for changed in range(3):
            x, bias, up = inner = [t * 1 for t in leaves]
            y = bias_activation(x, bias, up=up)
            with torch.no_grad():
                inner[changed].add_(1)
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                y.sum().backward()


@pytest.mark.parametrize("lead", [(), (4,), (2, 3), (2, 0, 3), (2, 1, 3, 2)])
@each_kind
def test_the_function_is_torchs(kind: str, lead: tuple[int, ...]) -> None:
    leaves = [normal(*lead, 21, dtype=torch.float32).requires_grad_() for _ in range(2)]
    leaves.append(normal(21, dtype=torch.float32).requires_grad_())
    x, up, bias = leaves
    dy = torch.randn_like(x)
    for gated, biased in ((False, False), (True, False), (False, True), (True, True)):
        used = [x, *([up] * gated), *([bias] * biased)]
        call = partial(bias_activation, x, bias if biased else None, up=up if gated else None, activation=kind)
        y, want = call(), TORCHS[kind](x + bias if biased else x)
        want = want * up if gated else want
        torch.testing.assert_close(y, want)
        assert y.is_contiguous()
        # That of the bias is a sum in another order.
        grads = [torch.autograd.grad(result, used, dy) for result in (y, want)]
        torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-5)
        with torch.no_grad():
            assert torch.equal(call(), y)


@pytest.mark.parametrize(
    "change", [in_steps, lambda t: t.transpose(0, 1).contiguous().transpose(0, 1), lambda t: t[:, :1].expand(t.shape)]
)
def test_views_of_anything(change: Callable[[Tensor], Tensor]) -> None:
    x, up = normal(2, 3, 5), normal(2, 3, 5)
    torch.testing.assert_close(bias_activation(change(x), up=change(up)), F.gelu(change(x)) * change(up))


def test_halves_of_one_tensor_are_read_where_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """No copy of them is made."""
    require_native()
    seen: list[tuple] = []
    native = TABLE.impls[0].kernel
    spy = type("Spy", (), dict(forward=lambda *args: (seen.append(args), native.forward(*args))[1]))
    monkeypatch.setattr(TABLE, "select", lambda *_: spy)
    both = torch.randn(4, 5, 2 * 33)
    x, up = both.chunk(2, -1)
    torch.testing.assert_close(bias_activation(x, up=up, activation="silu"), F.silu(x) * up)
    assert [t.data_ptr() for t in seen[0][:2]] == [x.data_ptr(), up.data_ptr()]


@each_half
@each_kind
def test_half_precision(dtype: torch.dtype, kind: str) -> None:
    """No worse than torch, which rounds after each of three steps."""
    leaves = [normal(30, 40).mul(2).to(dtype).requires_grad_() for _ in range(2)]
    leaves.append(normal(40).to(dtype).requires_grad_())
    dy = normal(30, 40).to(dtype)

    def theirs(x: Tensor, up: Tensor, bias: Tensor) -> Tensor:
        return TORCHS[kind](x + bias) * up

    def ours(x: Tensor, up: Tensor, bias: Tensor) -> Tensor:
        return bias_activation(x, bias, up=up, activation=kind)

    results = []
    for function, given in ((ours, leaves), (theirs, leaves), (theirs, [t.detach().double() for t in leaves])):
        y = function(*(t.requires_grad_() for t in given))
        results.append([y, *torch.autograd.grad(y, given, dy.to(y.dtype))])
    assert_no_worse(*results)


@each_half
def test_float32_bias_beside_half_precision(dtype: torch.dtype) -> None:
    x, bias = normal(30, 40).to(dtype).requires_grad_(), normal(40).float().requires_grad_()
    y = bias_activation(x, bias)
    assert y.dtype == dtype
    want = F.gelu(x.double() + bias.double())
    torch.testing.assert_close(y, want.to(dtype))
    dx, dbias = torch.autograd.grad(y.float().sum(), (x, bias))
    assert (dx.dtype, dbias.dtype) == (dtype, torch.float32)
    torch.testing.assert_close(dbias, torch.autograd.grad(want.sum(), bias)[0])


def test_autocast_leaves_dtypes_alone() -> None:
    """As of torch's own elementwise functions."""
    x = torch.randn(3, 5).requires_grad_()
    want = bias_activation(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = bias_activation(x)
        assert torch.equal(got, want) and F.gelu(x).dtype == got.dtype == torch.float32
        assert bias_activation(x.bfloat16(), torch.zeros(5)).dtype == torch.bfloat16


def test_other_devices_and_no_kernel() -> None:
    x = torch.empty(3, 5, device="meta")
    assert bias_activation(x, up=x, dropout_p=0.5).shape == (3, 5)
    with fastseq.use_backend("reference"):
        x = torch.randn(3, 5).requires_grad_()
        y = bias_activation(x)
        torch.testing.assert_close(y, F.gelu(x))
        assert torch.autograd.grad(y.sum(), x)[0].shape == x.shape


@each_implementation
def test_results_share_no_memory_with_inputs(impl: Impl) -> None:
    require(TABLE, impl, device_of(impl), torch.float32)
    x = torch.randn(3, 5, device=device_of(impl))
    y = impl.kernel.forward(x, None, None, None, KINDS["identity"], 0.0)
    dx, *_ = impl.kernel.backward(y, x, None, None, None, KINDS["identity"], 0.0, [True, False, False])
    assert len({t.data_ptr() for t in (x, y, dx)}) == 3


def test_several_python_threads_at_once() -> None:
    leaves = [torch.randn(300, 130).requires_grad_(), torch.randn(130).requires_grad_()]
    dy = torch.randn(300, 130)

    def run() -> list[Tensor]:
        y = bias_activation(*leaves, up=leaves[0])
        return [y, *torch.autograd.grad(y, leaves, dy)]

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


X = torch.zeros(3, 5)
ERRORS: dict[str, tuple[tuple, dict, type[Exception], str]] = {
    "x list": (([1.0],), {}, TypeError, "x must be a dense tensor, got list"),
    "x sparse": ((X.to_sparse(),), {}, TypeError, r"x must be a dense tensor, got torch.sparse_coo"),
    "x integer": ((X.int(),), {}, TypeError, r"x must be float32, float64, bfloat16 or float16, got torch.int32"),
    "x scalar": ((torch.tensor(1.0),), {}, ValueError, r"x must be \[..., F\], got a tensor of no dimension"),
    "bias list": ((X, [0.0]), {}, TypeError, "bias must be a dense tensor, got list"),
    "bias size": ((X, torch.zeros(3)), {}, ValueError, r"bias must be torch.float32 \[5\], as x is, got .*32 \[3\]"),
    "bias dim": ((X, X), {}, ValueError, r"bias must be torch.float32 \[5\], as x is, got torch.float32 \[3, 5\]"),
    "bias dtype": ((X, X[0].double()), {}, ValueError, r"bias must be torch.float32 \[5\], as x is, got .*64 \[5\]"),
    "bias half": ((X, X[0].half()), {}, ValueError, r"bias must be torch.float32 \[5\], as x is, got .*16 \[5\]"),
    "bias wide": ((X.half(), X[0].double()), {}, ValueError, r"bias must be torch.float16 \[5\] or float32, as x is"),
    "bias device": ((X, X[0].to("meta")), {}, ValueError, "bias must be on x's device, cpu, got meta"),
    "up list": ((X,), dict(up=1), TypeError, "up must be a dense tensor, got int"),
    "up shape": ((X,), dict(up=X[:1]), ValueError, r"up must be torch.float32 \[3, 5\], as x is, got .*32 \[1, 5\]"),
    "up dtype": ((X,), dict(up=X.half()), ValueError, r"up must be torch.float32 \[3, 5\], as x is, got .*float16"),
    "up device": ((X,), dict(up=X.to("meta")), ValueError, "up must be on x's device, cpu, got meta"),
    "function": ((X,), dict(activation=F.gelu), TypeError, "activation must be a str, got builtin_function_or_method"),
    "name": ((X,), dict(activation="tanh"), ValueError, "activation must be one of identity, relu, .*, got 'tanh'"),
    "p text": ((X,), dict(dropout_p="a"), TypeError, "dropout_p must be a number, got 'a'"),
    "p bool": ((X,), dict(dropout_p=True), TypeError, "dropout_p must be a number, got True"),
    "p low": ((X,), dict(dropout_p=-0.1), ValueError, "dropout_p must be between 0 and 1, got -0.1"),
    "p nan": ((X,), dict(dropout_p=math.nan), ValueError, "dropout_p must be between 0 and 1, got nan"),
    "training": ((X,), dict(training=1), TypeError, "training must be a bool, got 1"),
}


@pytest.mark.parametrize("what", ERRORS)
def test_bad_arguments_are_named(what: str) -> None:
    args, options, error, message = ERRORS[what]
    with pytest.raises(error, match=message):
        bias_activation(*args, **options)


def test_the_extension_checks_for_itself() -> None:
    require_native()
    good = Case(4, 5, "gelu", True, "same", 0.5).arguments("cpu", torch.float32)
    forward, backward = torch.ops.fastseq_native.activation, torch.ops.fastseq_native.activation_backward
    y = forward(*good)
    for change in (
        dict(x=good.x[0]),
        dict(x=good.x.int()),
        dict(x=good.x[:, :4]),
        dict(x=good.x[:3]),
        dict(x=good.x.double()),
        dict(up=good.up[:1]),
        dict(up=good.up.double()),
        dict(bias=good.bias[:4]),
        dict(bias=good.bias[None]),
        dict(bias=good.bias.double()),
        dict(bias=good.bias.half()),
        dict(seed=None),
        dict(seed=torch.tensor([1, 2])),
        dict(seed=torch.tensor(1, dtype=torch.int32)),
        dict(kind=-1),
        dict(kind=5),
        dict(dropout_p=-0.5),
        dict(dropout_p=1.5),
    ):
        with pytest.raises(RuntimeError, match="activation: "):
            forward(*good._replace(**change))
    for dy, arguments, needs in (
        (y[:3], good, [True] * 3),
        (y.double(), good, [True] * 3),
        (y, good, [True] * 2),
        (y, good._replace(up=None), [True] * 3),
        (y, good._replace(bias=None), [True] * 3),
    ):
        with pytest.raises(RuntimeError, match="activation: "):
            backward(dy, *arguments, needs)
    torch.testing.assert_close(y, reference.forward(*good))


class Own(nn.ReLU):
    pass


def hooked() -> nn.Module:
    module = nn.ReLU()
    module.register_forward_hook(lambda *_: None)
    return module


@pytest.mark.parametrize(
    ("given", "kind"),
    [
        (F.relu, "relu"),
        (torch.relu, "relu"),
        (F.gelu, "gelu"),
        (torch.nn.functional.silu, "silu"),
        (nn.ReLU(), "relu"),
        (nn.ReLU(inplace=True), "relu"),
        (nn.GELU(), "gelu"),
        (nn.GELU("tanh"), "gelu_tanh"),
        (nn.SiLU(), "silu"),
        (nn.Identity(), "identity"),
        (Own(), None),
        (hooked(), None),
        (nn.Tanh(), None),
        (torch.tanh, None),
        (partial(F.gelu, approximate="tanh"), None),
        (lambda x: x, None),
        (operator.itemgetter([0]), None),
        (nn.ReLU, None),
        ("relu", None),
    ],
)
def test_kind_of(given: Any, kind: str | None) -> None:
    assert kind_of(given) == kind
    if kind is not None:
        x = normal(3, 5)
        torch.testing.assert_close(bias_activation(x, activation=kind), given(x.clone()))


def test_cases_are_named_apart() -> None:
    assert len({str(case) for case in CASES}) == len(CASES) and CASES[: len(SELF_CHECK_CASES)] == SELF_CHECK_CASES


@pytest.mark.parametrize("graph", [False, True])
def test_few_elements_are_torchs_functions(graph: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[Any] = []
    monkeypatch.setattr("fastseq.ops.activation._apply", lambda *args: called.append(args) or activation(*args))
    monkeypatch.setattr("fastseq.ops.activation.LEAST_ELEMENTS", 60)
    bias = torch.randn(5, requires_grad=graph)
    for rows, ours, options in (
        (11, False, dict(activation="silu")),
        (11, False, dict(activation="gelu_tanh")),
        (12, True, dict(activation="silu")),
        (2, True, dict(activation="identity")),
        (2, True, dict(activation="silu", dropout_p=0.5)),
    ):
        x, up = torch.randn(5, rows).t(), torch.randn(rows, 5)
        y = bias_activation(x, bias, up=up, **options)
        assert bool(called) == ours and y.is_contiguous()
        if "dropout_p" not in options:
            exact = reference.forward(x.double(), up.double(), bias.double(), None, KINDS[options["activation"]], 0.0)
            torch.testing.assert_close(y, exact.float())
        called.clear()
    with fastseq.use_backend("reference"):
        bias_activation(torch.randn(2, 5), bias)
    assert called
