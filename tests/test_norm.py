"""Dropout, residual and normalisation in one pass: every implementation of the table on the op's own cases, the
reference against torch, and the public function.
"""

import itertools
import math
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import assert_no_worse, device_of, name_of, require, threads_set, widest
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses import FakeTensorMode
from torch.utils._pytree import tree_map_only

import fastseq
from fastseq.functional import add_norm
from fastseq.ops.norm import (
    CASES,
    KINDS,
    NONE,
    TABLE,
    Arguments,
    Case,
    Outputs,
    grads_like,
    narrowed,
    needs_all,
    norm,
    rounding,
    tape_of,
    widened,
)
from fastseq.reference import dropout
from fastseq.reference import norm as reference
from fastseq.registry import HALF, Impl

KERNELS = [impl for impl in TABLE.impls if impl.name != "reference"]
DTYPES = [torch.float32, torch.float64]
# Each kernel with each dtype that it takes.
KINDS_OF_KERNELS = [(impl, dtype) for impl in KERNELS for dtype in sorted(impl.dtypes, key=str)]


each_implementation = pytest.mark.parametrize("impl", TABLE.impls, ids=name_of)
each_kernel_and_dtype = pytest.mark.parametrize(("impl", "dtype"), KINDS_OF_KERNELS, ids=name_of)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
each_kind = pytest.mark.parametrize("kind", KINDS)
each_normalisation = pytest.mark.parametrize("kind", ["layer", "rms"])


def normal(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, dtype=dtype)


def torchs(
    x: Tensor,
    residual: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    kind: str = "layer",
    eps: float = 1e-5,
) -> Tensor:
    """What add_norm computes, of torch's functions."""
    total = x if residual is None else x + residual
    if kind == "layer":
        return F.layer_norm(total, total.shape[-1:], weight, bias, eps)
    if kind == "rms":
        y = F.rms_norm(total, total.shape[-1:], weight, eps)
        return y if bias is None else y + bias
    return total


def leaves_of(arguments: Arguments) -> list[Tensor]:
    return [t.detach().requires_grad_() for t in arguments[:4] if t is not None]


def layout(t: Tensor) -> tuple:
    """What torch.compile holds a result to."""
    return t.dtype, t.shape, t.stride() if t.numel() else None


def assert_as_promised(op: Callable, args: tuple, results: Any) -> None:
    with FakeTensorMode() as mode:
        promised = op(*tree_map_only(Tensor, mode.from_tensor, args))
    assert [layout(t) for t in results] == [layout(t) for t in promised]


def assert_outputs(got: Any, want: Any, dtype: torch.dtype) -> None:
    for ours, theirs in zip(got, want, strict=True):
        # Half precision may round the sum to the next number, and y again.
        torch.testing.assert_close(ours, theirs.to(ours.dtype), **rounding(theirs, dtype, 2))


def assert_gradients(got: Any, want: Any, dtype: torch.dtype) -> None:
    """Sums over rows and columns in another order: as exact as the size of the terms allows."""
    for ours, theirs in zip(got, want, strict=True):
        size = max(1.0, theirs.abs().max().item()) if theirs.numel() else 1.0
        single = dtype == torch.float32
        tolerance = dict(rtol=1e-4, atol=2e-5 * size) if single else dict(rtol=1e-7, atol=1e-10 * size)
        torch.testing.assert_close(ours, theirs.to(ours.dtype), **(rounding(theirs, dtype, 4) or tolerance))


@lru_cache(maxsize=4)
def expected(case: Case, device: str, dtype: torch.dtype) -> tuple[Outputs, list[Any], list[Tensor]]:
    """From the reference in float64, but for the sum, rounded as the dtype has it: outputs, gradients sent, found."""
    wide = widened(case.arguments(device, dtype))
    total = reference.forward(*wide._replace(kind=NONE), True)[1]
    total = total.to(dtype).double() if total.numel() else wide.x
    alone = wide._replace(x=total, residual=None, seed=None)
    y, _, mean, rstd = reference.forward(*alone, True)
    empty = wide.residual is None and wide.seed is None
    outputs = Outputs(y, total.new_empty(0) if empty else total, mean, rstd)
    sent = [None if g is None else g.to(dtype).double() for g in grads_like(outputs)]
    return outputs, sent, list(reference.backward(*sent, *tape_of(wide, outputs), needs_all(wide)))


@each_kernel_and_dtype
@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_outputs_and_gradients(impl: Impl, dtype: torch.dtype, case: Case) -> None:
    device = device_of(impl)
    require(TABLE, impl, device, dtype)
    arguments = case.arguments(device, dtype)
    outputs, sent, grads = expected(case, device, dtype)
    sent, needs = [narrowed(g, dtype) for g in sent], needs_all(arguments)

    def run(threads: int) -> tuple[Outputs, list[Tensor]]:
        with threads_set(threads):
            ours = Outputs(*impl.kernel.forward(*arguments, True))
            return ours, impl.kernel.backward(*sent, *tape_of(arguments, ours), needs)

    ours, found = run(1)
    assert_outputs(ours, outputs, dtype)
    assert_gradients(found, grads, dtype)
    assert_as_promised(torch.ops.fastseq.norm, (*arguments, True), ours)
    assert_as_promised(torch.ops.fastseq.norm_backward, (*sent, *tape_of(arguments, ours), needs), found)
    # What the reference's forward leaves serves as well.
    tape = Outputs(*(t.to(o.dtype) for t, o in zip(outputs, ours, strict=True)))
    assert_gradients(impl.kernel.backward(*sent, *tape_of(arguments, tape), needs), grads, dtype)
    if arguments.kind != NONE:
        y, total, *rest = impl.kernel.forward(*arguments, False)
        assert not total.numel()
        assert all(map(torch.equal, (y, *rest), (ours.y, ours.mean, ours.rstd)))
    for threads in (2, 2, 1) if impl.is_native else (1,):
        again, found_again = run(threads)
        assert all(map(torch.equal, (*again, *found_again), (*ours, *found)))


@each_implementation
@each_dtype
def test_self_check(impl: Impl, dtype: torch.dtype) -> None:
    require(TABLE, impl, device_of(impl), dtype)
    TABLE.self_check(impl.kernel, device_of(impl), dtype)


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("wrong", range(4))
def test_self_check_sees_what_is_wrong(direction: str, wrong: int) -> None:
    class Kernel:
        forward = staticmethod(reference.forward)
        backward = staticmethod(reference.backward)

    def spoilt(*args: Any) -> Any:
        results = list(getattr(reference, direction)(*args))
        results[wrong] = results[wrong] * 1.01
        return results

    setattr(Kernel, direction, staticmethod(spoilt))
    with pytest.raises(AssertionError):
        TABLE.self_check(Kernel, "cpu", torch.float64)


@each_implementation
@pytest.mark.parametrize(
    "case",
    [
        Case(70, 300, residual=True, dropout=0.3),
        Case(70, 300, "rms", residual=True),
        Case(9, 33),
        Case(9, 33, "none", residual=True, dropout=0.3),
    ],
    ids=name_of,
)
def test_only_needed_gradients(impl: Impl, case: Case) -> None:
    device, dtype = device_of(impl), widest(impl)
    require(TABLE, impl, device, dtype)
    arguments = case.arguments(device, dtype)
    outputs, sent, grads = expected(case, device, dtype)
    tape = tape_of(arguments, Outputs(*(t.to(dtype) for t in outputs)))
    sent = [narrowed(g, dtype) for g in sent]
    for needs in itertools.product((False, True), repeat=4):
        needs = [a and b for a, b in zip(needs, needs_all(arguments), strict=True)]
        found = impl.kernel.backward(*sent, *tape, needs)
        for got, want, need in zip(found, grads, needs, strict=True):
            assert_gradients([got], [want if need else want.new_empty(0)], dtype)
    for some in ((sent[0], None), (None, sent[1]), (None, None)):  # what is missing counts as zeros
        zeros = [g if s is None or g is not None else torch.zeros_like(s) for g, s in zip(some, sent, strict=True)]
        ours, theirs = (impl.kernel.backward(*g, *tape, needs_all(arguments)) for g in (some, zeros))
        assert_gradients(ours, theirs, dtype)


def in_steps(t: Tensor) -> Tensor:
    """The same values with gaps between them in memory."""
    return torch.stack([t, t], -1)[..., 0]


def turned(t: Tensor) -> Tensor:
    """The same values with columns one after the other in memory."""
    return t.mT.contiguous().mT if t.dim() > 1 else in_steps(t)


def in_reserve(t: Tensor) -> Tensor:
    """The same values in memory that goes on with NaN after each row."""
    return F.pad(t, (0, 5), value=math.nan)[..., : t.shape[-1]]


def repeated(t: Tensor) -> Tensor:
    """One row in the place of all, which are the same memory."""
    return t[:1].expand(t.shape) if t.dim() > 1 else t


def one_number(t: Tensor) -> Tensor:
    """One number everywhere, as the gradient of a sum."""
    return t.flatten()[0].expand(t.shape)


CHANGES = [in_steps, turned, in_reserve, repeated, one_number]


@each_implementation
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize(
    "case",
    [Case(33, 67, residual=True, dropout=0.2), Case(33, 67, "rms"), Case(33, 1, residual=True)],
    ids=name_of,
)
def test_any_strides(impl: Impl, change: Callable, case: Case) -> None:
    device = device_of(impl)
    require(TABLE, impl, device, torch.float32)
    arguments = case.arguments(device, torch.float32)
    changed = Arguments(*(change(t) if isinstance(t, Tensor) and t.dim() else t for t in arguments))
    plain = Arguments(*(t.contiguous() if isinstance(t, Tensor) else t for t in changed))
    sent = grads_like(Outputs(*impl.kernel.forward(*arguments, True)))
    results = []
    for inputs, view in ((changed, change), (plain, lambda t: change(t).contiguous())):
        outputs = Outputs(*impl.kernel.forward(*inputs, True))
        given = [None if g is None else view(g) for g in sent]
        results.append([*outputs, *impl.kernel.backward(*given, *tape_of(inputs, outputs), needs_all(inputs))])
    torch.testing.assert_close(*results)


@each_implementation
@each_kind
def test_rows_are_alone(impl: Impl, kind: str) -> None:
    """A call split in two equals the whole, bit by bit, and so do the gradients of its rows."""
    device = device_of(impl)
    require(TABLE, impl, device, torch.float32)
    arguments = Case(75, 250, kind, residual=True).arguments(device, torch.float32)
    needs = [True, True, False, False]

    def run(rows: slice) -> list[Tensor]:
        part = arguments._replace(x=arguments.x[rows], residual=arguments.residual[rows])
        outputs = Outputs(*impl.kernel.forward(*part, True))
        found = impl.kernel.backward(*grads_of_rows(outputs), *tape_of(part, outputs), needs)
        return [t for t in (*outputs, *found) if t.numel()]

    def grads_of_rows(outputs: Outputs) -> list[Any]:
        return [t * 0.5 if t.numel() else None for t in outputs[:2]]

    parts = zip(run(slice(0, 38)), run(slice(38, 75)), strict=True)
    assert all(map(torch.equal, map(torch.cat, parts), run(slice(0, 75))))


TORCH_CASES = [
    Case(5, 7, residual=True),
    Case(5, 7, weight=False, bias=False),
    Case(5, 7, bias=False, eps=0.3),
    Case(5, 7, weight=False, residual=True),
    Case(5, 1, residual=True),
    Case(5, 7, "rms", residual=True),
    Case(5, 7, "rms", weight=False, bias=False, eps=0.3),
    Case(5, 7, "rms", bias=False),
    Case(5, 7, "none", residual=True),
]


@pytest.mark.parametrize("case", TORCH_CASES, ids=name_of)
def test_reference_is_torchs(case: Case) -> None:
    arguments = case.arguments("cpu", torch.float64)
    leaves = leaves_of(arguments)
    there = iter(leaves)
    x, residual, weight, bias = (None if t is None else next(there) for t in arguments[:4])
    want = torchs(x, residual, weight, bias, kind=case.kind, eps=case.eps)
    outputs = Outputs(*reference.forward(*arguments, True))
    got = outputs.total if case.kind == "none" else outputs.y
    torch.testing.assert_close(got, want)
    sent = torch.randn_like(want)
    dy, dtotal = (None, sent) if case.kind == "none" else (sent, None)
    found = reference.backward(dy, dtotal, *tape_of(arguments, outputs), needs_all(arguments))
    torch.testing.assert_close([g for g in found if g.numel()], list(torch.autograd.grad(want, leaves, sent)))


@each_implementation
@pytest.mark.parametrize("p", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("residual", [False, True])
def test_dropout_drops_what_keep_says(impl: Impl, p: float, residual: bool) -> None:
    device = device_of(impl)
    require(TABLE, impl, device, torch.float32)
    for case in (Case(21, 300, "none", residual=residual, dropout=p), Case(21, 300, residual=residual, dropout=p)):
        arguments = case.arguments(device, torch.float32)
        keep = dropout.keep(arguments.seed, (21, 300), p, torch.device(device)).float()
        assert (keep == 0).sum() > 0
        total = impl.kernel.forward(*arguments, True)[1]
        want = arguments.x * keep
        torch.testing.assert_close(total, want + arguments.residual if residual else want)
        outputs = Outputs(*(total.new_empty(0),) * 4)._replace(total=total)
        tape = tape_of(arguments._replace(kind=NONE), outputs)
        dx, dresidual, *_ = impl.kernel.backward(None, total, *tape, [True, True, False, False])
        assert torch.equal(dresidual, total)
        torch.testing.assert_close(dx, total * keep)


@each_kernel_and_dtype
@each_kind
def test_dropout_whose_probability_rounds_to_none(impl: Impl, dtype: torch.dtype, kind: str) -> None:
    require(TABLE, impl, device_of(impl), dtype)
    arguments = Case(21, 300, kind, dropout=1e-6).arguments(device_of(impl), dtype)
    y, total, _, _ = impl.kernel.forward(*arguments, True)
    assert torch.equal(total, arguments.x)
    plain = arguments._replace(seed=None, dropout_p=0.0)
    assert torch.equal(y, impl.kernel.forward(*plain, True)[0])


def test_dropout_is_random() -> None:
    x, p = torch.ones(40, 20, 30), 0.3
    draw = partial(add_norm, x, kind="none", dropout_p=p)
    torch.manual_seed(1)
    first, second = draw(), draw()
    torch.manual_seed(1)
    with torch.device("meta"):  # whose generator is not asked
        assert torch.equal(draw(), first) and not torch.equal(first, second)
    dropped = (first == 0).double() - p
    assert dropped.mean().abs() < 5 * math.sqrt(p * (1 - p) / dropped.numel())
    for dim in range(3):
        one, other = (dropped.narrow(dim, start, dropped.shape[dim] - 1) for start in (0, 1))
        assert (one * other).mean().abs() < 5 * p * (1 - p) / math.sqrt(one.numel())
    assert torch.equal(add_norm(x, kind="none", dropout_p=p, training=False), x)
    assert not add_norm(x, kind="none", dropout_p=1.0).any()


GRADCHECK_CASES = [
    Case(3, 4, residual=True),
    Case(3, 5, residual=True, dropout=0.4),
    Case(3, 4, weight=False, dropout=0.4),
    Case(3, 4, bias=False),
    Case(3, 4, "rms", residual=True, dropout=0.4),
    Case(3, 4, "rms", bias=False),
    Case(3, 4, "none", residual=True, dropout=0.4),
]


def differentiable(case: Case, device: str) -> tuple[Callable[..., tuple[Tensor, ...]], list[Tensor]]:
    arguments = case.arguments(device, torch.float64)

    def call(*leaves: Tensor) -> tuple[Tensor, ...]:
        there = iter(leaves)
        outputs = norm(Arguments(*(None if t is None else next(there) for t in arguments[:4]), *arguments[4:]))
        return tuple(t for t in outputs[:2] if t.numel())

    return call, leaves_of(arguments)


@each_implementation
@pytest.mark.parametrize("case", GRADCHECK_CASES, ids=name_of)
def test_gradcheck(impl: Impl, case: Case) -> None:
    require(TABLE, impl, device_of(impl), torch.float64)
    with fastseq.use_backend(impl.name):
        assert torch.autograd.gradcheck(*differentiable(case, device_of(impl)))
        assert torch.autograd.gradgradcheck(*differentiable(case, device_of(impl)))


@pytest.mark.parametrize("case", GRADCHECK_CASES, ids=name_of)
def test_forward_mode_and_batched_gradients(case: Case) -> None:
    checks = dict(check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradcheck(*differentiable(case, "cpu"), **checks)


@each_kind
def test_double_backward_where_one_input_depends_on_another(kind: str) -> None:
    x = normal(3, 5).requires_grad_()
    weights = [] if kind == "none" else [normal(5).requires_grad_()]
    leaves = [x, *weights]

    def chained(function: Callable) -> Tensor:
        y = x
        for _ in range(3):
            y = function(torch.tanh(y), y, *weights, kind=kind)
        return y.square().sum()

    once = torch.autograd.grad(chained(add_norm), leaves)
    results = []
    for function in (add_norm, torchs):
        twice = torch.autograd.grad(chained(function), leaves, create_graph=True)
        torch.testing.assert_close(twice, once)
        results.append(torch.autograd.grad(sum(g.square().sum() for g in twice), leaves))
    torch.testing.assert_close(*results)


@each_normalisation
def test_transforms_of_torch_func(kind: str) -> None:
    x, residual, weight, bias = normal(3, 4, 5), normal(3, 4, 5), normal(5), normal(5)
    vmap = torch.func.vmap
    call, theirs = partial(add_norm, kind=kind), partial(torchs, kind=kind)
    torch.testing.assert_close(
        vmap(call, (0, 0, None, None))(x, residual, weight, bias), theirs(x, residual, weight, bias)
    )
    for transform in (torch.func.jacrev, torch.func.jacfwd):
        got = transform(call, (0, 1, 2, 3))(x[0], residual[0], weight, bias)
        torch.testing.assert_close(got, torch.autograd.functional.jacobian(theirs, (x[0], residual[0], weight, bias)))
    grad = torch.func.grad(lambda *args: call(*args).square().sum(), (0, 2))
    got = vmap(grad, (0, 0, None, None))(x, residual, weight, bias)
    for n in range(3):
        leaves = [t.clone().requires_grad_() for t in (x[n], weight)]
        want = torch.autograd.grad(theirs(leaves[0], residual[n], leaves[1], bias).square().sum(), leaves)
        torch.testing.assert_close(tuple(g[n] for g in got), want)


def test_dropout_under_vmap() -> None:
    x = torch.ones(3, 4, 50)
    draw = partial(add_norm, kind="none", dropout_p=0.5)
    with pytest.raises(RuntimeError, match="randomness"):
        torch.func.vmap(draw)(x)
    one, other, _ = torch.func.vmap(draw, randomness="same")(x)
    assert torch.equal(one, other)
    one, other, _ = torch.func.vmap(draw, randomness="different")(x)
    assert not torch.equal(one, other)


@pytest.mark.parametrize("case", [GRADCHECK_CASES[i] for i in (0, 1, 3, 5, 6)], ids=name_of)
def test_opcheck(case: Case) -> None:
    arguments = case.arguments("cpu", torch.float64)
    op, backward = torch.ops.fastseq.norm.default, torch.ops.fastseq.norm_backward.default
    outputs = Outputs(*reference.forward(*arguments, True))
    torch.library.opcheck(backward, (*grads_like(outputs), *tape_of(arguments, outputs), needs_all(arguments)))
    torch.library.opcheck(op, (*arguments, False))
    there = iter(leaves_of(arguments))
    arguments = arguments._replace(
        **{
            name: None if t is None else next(there)
            for name, t in zip(Arguments._fields[:4], arguments[:4], strict=True)
        }
    )
    torch.library.opcheck(op, (*arguments, True))


# The public function


SHAPES = [(7,), (5, 7), (3, 5, 7), (2, 3, 5, 7), (0, 5, 7), (3, 0, 7), (4, 1), (3, 4, 100), (3, 0), (0,)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@each_kind
@each_dtype
def test_the_function_is_torchs(shape: tuple[int, ...], kind: str, dtype: torch.dtype) -> None:
    x, residual, weight, bias = (normal(*s, dtype=dtype) for s in (shape, shape, shape[-1:], shape[-1:]))
    choices = (
        itertools.product((None, residual), (None, weight), (None, bias))
        if kind != "none"
        else [(residual, None, None)]
    )
    for some in choices:
        results = []
        for function in (add_norm, torchs):
            leaves = [None if t is None else t.clone().requires_grad_() for t in (x, *some)]
            y = function(*leaves, kind=kind, eps=1e-3)
            grads = torch.autograd.grad((y * (x + 1)).sum(), [t for t in leaves if t is not None])
            results.append([y, *grads])
        torch.testing.assert_close(*results, equal_nan=True)


@each_normalisation
@pytest.mark.parametrize("residual", [False, True])
def test_gradients_of_the_sum_and_of_what_is_made_of_it(kind: str, residual: bool) -> None:
    """As in blocks that normalise first, and go on with the sum."""
    x, other, weight, bias = (normal(*s).requires_grad_() for s in ((3, 4, 70), (3, 4, 70), (70,), (70,)))
    leaves = [x, weight, bias, *([other] if residual else [])]
    y, total = add_norm(x, other if residual else None, weight, bias, kind=kind, return_total=True)
    want_total = x + other if residual else x
    want = torchs(want_total, None, weight, bias, kind=kind)
    torch.testing.assert_close((y, total), (want, want_total))
    for mix in (lambda y, t: (y * t).sum(), lambda y, t: y.square().sum() + t.sin().sum(), lambda y, t: t.sin().sum()):
        got, expected_grads = (
            torch.autograd.grad(mix(*o), leaves, retain_graph=True, materialize_grads=True)
            for o in ((y, total), (want, want_total))
        )
        torch.testing.assert_close(got, expected_grads)


def test_without_anything_to_do_x_is_returned() -> None:
    x = normal(3, 4)
    assert add_norm(x, kind="none") is x
    assert add_norm(x, kind="none", dropout_p=0.5, training=False) is x
    assert add_norm(x, return_total=True)[1] is x


@pytest.mark.parametrize("change", CHANGES)
def test_views_of_anything(change: Callable) -> None:
    tensors = [normal(2, 5, 33), normal(2, 5, 33), normal(33), normal(33)]
    results = []
    for view in (change, lambda t: change(t).contiguous()):
        leaves = [t.clone().requires_grad_() for t in tensors]
        out = add_norm(*map(view, leaves))
        results.append([out, *torch.autograd.grad(out.sum(), leaves)])
    torch.testing.assert_close(*results)


def test_batch_second_is_normalised_as_it_lies() -> None:
    x = normal(5, 2, 33).transpose(0, 1)
    torch.testing.assert_close(add_norm(x, x, kind="rms"), torchs(x, x, kind="rms"))


def test_gradients_of_x_and_residual_are_made_once() -> None:
    x, residual = normal(3, 5).requires_grad_(), normal(3, 5).requires_grad_()
    one, other = torch.autograd.grad(add_norm(x, residual).square().sum(), (x, residual))
    assert one.data_ptr() == other.data_ptr()
    # Whoever adds to one of them does not change the other.
    add_norm(x, residual).square().sum().backward()
    x.grad.add_(1)
    torch.testing.assert_close((x.grad - 1, residual.grad), (one, other))


def test_x_is_not_kept_where_there_is_a_sum() -> None:
    saved: list[Tensor] = []
    x, residual, weight = normal(3, 5).requires_grad_(), normal(3, 5), normal(5)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
        _, total = add_norm(x, residual, weight, return_total=True)
    kept = {t.data_ptr() for t in saved}
    assert total.data_ptr() in kept and not kept & {x.data_ptr(), residual.data_ptr()}


@each_implementation
def test_changed_inputs_raise_in_backward(impl: Impl) -> None:
    device = device_of(impl)
    require(TABLE, impl, device, widest(impl))
    x, residual, weight = (normal(*s).to(device, widest(impl)).requires_grad_() for s in ((3, 5), (3, 5), (5,)))
    with fastseq.use_backend(impl.name):
        y, total = add_norm(x, residual, weight, return_total=True)
        with torch.no_grad():
            total.add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()
        inner = x * 1
        y = add_norm(inner, None, weight)
        with torch.no_grad():
            inner.add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


@each_implementation
@each_normalisation
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("E", [5, 150])
def test_nan_and_inf_are_as_in_torch(impl: Impl, kind: str, bad: float, E: int) -> None:
    device = device_of(impl)
    require(TABLE, impl, device, torch.float32)
    tensors = [normal(*s, dtype=torch.float32).to(device) for s in ((4, E), (4, E), (E,), (E,))]
    tensors[0][1, 3] = bad
    results = []
    with fastseq.use_backend(impl.name):
        for function in (add_norm, torchs):
            leaves = [t.clone().requires_grad_() for t in tensors]
            y = function(*leaves, kind=kind)
            results.append([y, *torch.autograd.grad(y.sum(), leaves)])
        torch.testing.assert_close(*results, equal_nan=True)
        # What is dropped is multiplied by zero, as in torch.
        everything = torch.full((1, E), bad, device=device)
        assert add_norm(everything, kind="none", dropout_p=1.0).isnan().all()


@pytest.mark.parametrize("impl", KERNELS, ids=name_of)
@pytest.mark.parametrize(("mean", "E"), [(1e3, 768), (1e4, 4100), (-1e5, 33), (1e6, 200)])
def test_a_mean_far_from_zero(impl: Impl, mean: float, E: int) -> None:
    device = device_of(impl)
    require(TABLE, impl, device, torch.float32)
    x, sent = ((normal(9, E) + shift).float().to(device) for shift in (mean, 0.0))
    results = []
    with fastseq.use_backend(impl.name):
        for function, leaf in ((add_norm, x), (torchs, x), (torchs, x.double())):
            leaf = leaf.clone().requires_grad_()
            y = function(leaf)
            results.append([y, *torch.autograd.grad(y, leaf, sent.to(y.dtype))])
    assert_no_worse(*results)


@each_normalisation
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=name_of)
@pytest.mark.parametrize("wide", [False, True])
def test_half_precision_is_as_exact_as_torchs(kind: str, dtype: torch.dtype, wide: bool) -> None:
    columns = torch.float32 if wide and kind == "layer" else dtype  # torch's rms_norm has no such mixture
    tensors = [torch.randn(60, 300).to(dtype) for _ in range(2)] + [
        (torch.randn(300) + 1).to(columns) for _ in range(2)
    ]
    sent = torch.randn(60, 300).to(dtype)
    results = []
    for function, exact in ((add_norm, False), (torchs, False), (torchs, True)):
        leaves = [(t.double() if exact else t.clone()).requires_grad_() for t in tensors]
        y = function(*leaves, kind=kind)
        results.append([y, *torch.autograd.grad(y, leaves, sent.to(y.dtype))])
    assert_no_worse(*results)


def test_half_precision_beside_float32() -> None:
    """Weights may be wider, and x and residual are promoted, as in torch."""
    x, weight, bias = torch.randn(3, 9).bfloat16(), torch.randn(9), torch.randn(9)
    want = torchs(x.float(), None, weight, bias)
    for weights in ((weight, bias), (weight, bias.bfloat16()), (weight.bfloat16(), bias), (None, bias)):
        leaves = [None if t is None else t.clone().requires_grad_() for t in weights]
        y = add_norm(x, None, *leaves)
        assert y.dtype == torch.bfloat16
        if weights[0] is not None:
            torch.testing.assert_close(y.float(), want, rtol=2e-2, atol=5e-2)
        y.sum().backward()
        assert all(leaf.grad.dtype == leaf.dtype for leaf in leaves if leaf is not None)
    for one, other in ((x, x.float()), (x.float(), x), (x, x.half()), (x.float(), x.double())):
        leaves = [one.clone().requires_grad_(), other.clone().requires_grad_()]
        kind = torch.promote_types(one.dtype, other.dtype)
        y, total = add_norm(*leaves, return_total=True)
        assert y.dtype == total.dtype == kind
        torch.testing.assert_close(y, torchs(one.to(kind) + other.to(kind)))
        y.sum().backward()
        assert [leaf.grad.dtype for leaf in leaves] == [one.dtype, other.dtype]


@each_kind
def test_autocast_is_torchs(kind: str) -> None:
    """On CPUs it changes nothing: neither norm is on torch's list there."""
    for given, other in itertools.product((torch.float32, torch.bfloat16), repeat=2):
        x, residual = torch.randn(4, 9).to(given), torch.randn(4, 9).to(other)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            ours, theirs = (function(x, residual, kind=kind) for function in (add_norm, torchs))
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs)
        assert torch.equal(ours, add_norm(x, residual, kind=kind))


def test_autocast_elsewhere_is_torchs_list(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where torch has both norms on the list of what is computed in float32, here a device that only promises."""
    monkeypatch.setattr("fastseq.ops.norm.autocast_dtype", lambda x: torch.bfloat16)
    x, weight = torch.randn(3, 9, device="meta", dtype=torch.bfloat16), torch.randn(9, device="meta")
    for columns in (weight, weight.bfloat16()):
        y, total = add_norm(x, x, columns, return_total=True)
        assert (y.dtype, total.dtype) == (torch.float32, torch.bfloat16)
    assert add_norm(x, x, kind="none").dtype == torch.bfloat16
    assert add_norm(x, x.double()).dtype == torch.float64


OPTIONS: dict[str, dict] = {
    "layer": dict(),
    "rms": dict(kind="rms", eps=0.01, return_total=True),
    "none": dict(kind="none", dropout_p=0.3),
    "dropout": dict(dropout_p=0.3, return_total=True),
}
each_option = pytest.mark.parametrize("name", OPTIONS)


def inputs_of(name: str, *shape: int) -> list[Tensor]:
    columns = [] if name == "none" else [normal(shape[-1]), normal(shape[-1])]
    return [t.requires_grad_() for t in (normal(*shape), normal(*shape), *columns)]


def listed(results: Any) -> list[Tensor]:
    return [results] if isinstance(results, Tensor) else list(results)


@each_option
def test_dynamic_sizes_compile_once(name: str) -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    call = partial(add_norm, **OPTIONS[name])
    compiled = torch.compile(lambda *args: call(*args), fullgraph=True, dynamic=True, backend=counter)
    counts = []
    for shape in ((3, 6, 9), (2, 11, 12), (5, 4, 130)):
        leaves = inputs_of(name, *shape)
        results = []
        for function in (compiled, call):
            torch.manual_seed(0)
            outputs = listed(function(*leaves))
            results.append([*outputs, *torch.autograd.grad(sum(o.sin().sum() for o in outputs), leaves)])
        torch.testing.assert_close(*results)
        with torch.no_grad():
            torch.manual_seed(0)
            torch.testing.assert_close(listed(call(*leaves)), results[0][: len(outputs)])
        counts.append(counter.frame_count)
    assert counts == counts[:1] * 3


def test_compiles_with_inductor() -> None:
    torch._dynamo.reset()
    leaves = [t.requires_grad_() for t in (torch.randn(3, 7, 65), torch.randn(3, 7, 65), torch.randn(65))]

    def block(x: Tensor, residual: Tensor, weight: Tensor) -> Tensor:
        y, total = add_norm(x, residual, weight, return_total=True)
        return torch.relu(y) + total

    want, got = block(*leaves), torch.compile(block, fullgraph=True)(*leaves)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(torch.autograd.grad(got.sum(), leaves), torch.autograd.grad(want.sum(), leaves))


def test_export_with_dynamic_length() -> None:
    class Model(torch.nn.Module):
        def forward(self, x: Tensor, residual: Tensor, weight: Tensor) -> Tensor:
            return add_norm(x, residual, weight, dropout_p=0.4)

    length = torch.export.Dim("length", min=2, max=500)
    inputs = (normal(3, 7, 9), normal(3, 7, 9), normal(9))
    exported = torch.export.export(Model(), inputs, dynamic_shapes=({1: length}, {1: length}, None))
    for size in (7, 2, 40):
        inputs = (normal(3, size, 9), normal(3, size, 9), normal(9))
        results = []
        for model in (exported.module(), Model()):
            torch.manual_seed(0)
            results.append(model(*inputs))
        torch.testing.assert_close(*results)


X = torch.randn(2, 5, 8)
WEIGHT = torch.ones(8)
NESTED = torch.nested.nested_tensor([X[0], X[1, :2]])
BAD: dict[str, tuple[tuple, dict, type, str]] = {
    "a list": (([1.0],), {}, TypeError, "x must be a dense tensor, got list"),
    "nothing": ((None,), {}, TypeError, "x must be a dense tensor, got NoneType"),
    "integers": ((X.int(),), {}, TypeError, "x must be float32, .*, got torch.int32"),
    "eight bits": ((X.to(torch.float8_e4m3fn),), {}, TypeError, "x must be float32, .*, got torch.float8_e4m3fn"),
    "a residual of eight bits": (
        (X, X.to(torch.float8_e4m3fn)),
        {},
        TypeError,
        "residual must be float32, .*, got torch.float8_e4m3fn",
    ),
    "sparse": ((X.to_sparse(),), {}, TypeError, "x must be a dense tensor, got torch.sparse_coo"),
    "nested": ((NESTED,), {}, TypeError, "x must be a dense tensor, got a nested one"),
    "no dimension": ((X.sum(),), {}, ValueError, "x must have at least one dimension"),
    "two devices": ((X, X.to("meta")), {}, ValueError, "residual must be on x's device, cpu, got meta"),
    "residual's shape": ((X, X[:, :4]), {}, ValueError, r"residual must have x's shape, \[2, 5, 8\], got \[2, 4, 8\]"),
    "residual that broadcasts": ((X, X[0]), {}, ValueError, r"residual must have x's shape"),
    "residual": ((X, 1.0), {}, TypeError, "residual must be a dense tensor, got float"),
    "weight's shape": ((X, X, WEIGHT[:5]), {}, ValueError, r"weight must be \[8\], as wide as x, got \[5\]"),
    "bias's shape": ((X, X, None, X), {}, ValueError, r"bias must be \[8\], as wide as x, got \[2, 5, 8\]"),
    "weight's dtype": (
        (X, X, WEIGHT.half()),
        {},
        ValueError,
        "weight must be of x's dtype, torch.float32, got torch.float16",
    ),
    "half weight's dtype": (
        (X.half(), None, WEIGHT.bfloat16()),
        {},
        ValueError,
        "weight must be of x's dtype, torch.float16 or torch.float32, got torch.bfloat16",
    ),
    "a weight of none": ((X, X, WEIGHT), dict(kind="none"), ValueError, 'weight cannot be given with the kind "none"'),
    "a bias of none": ((X, X, None, WEIGHT), dict(kind="none"), ValueError, "bias cannot be given with the kind"),
    "kind": ((X,), dict(kind="batch"), ValueError, "kind must be .*, got 'batch'"),
    "a list of kinds": ((X,), dict(kind=["layer"]), ValueError, r"kind must be .*, got \['layer'\]"),
    "eps": ((X,), dict(eps=-1.0), ValueError, "eps must be 0 or positive, and finite, got -1.0"),
    "eps of nothing": ((X,), dict(eps=None), TypeError, "eps must be a number, got None"),
    "dropout_p": ((X,), dict(dropout_p=1.5), ValueError, "dropout_p must be between 0 and 1, got 1.5"),
    "dropout_p that is NaN": ((X,), dict(dropout_p=math.nan), ValueError, "dropout_p must be between 0 and 1, got nan"),
    "training": ((X,), dict(training=1), TypeError, "training must be a bool, got 1"),
    "return_total": ((X,), dict(return_total="yes"), TypeError, "return_total must be a bool, got 'yes'"),
    "the sum twice": ((X, X), dict(kind="none", return_total=True), ValueError, "return_total says"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments(name: str) -> None:
    args, options, error, message = BAD[name]
    with pytest.raises(error, match=message):
        add_norm(*args, **options)


# Changes of good arguments of the extension's op, and what it says.
WRONG: dict[str, tuple[dict, str]] = {
    "integers": (dict(x=X[0].int()), "norm: x must be float32"),
    "three dimensions": (dict(x=X), r"norm: x must be \[rows, E\]"),
    "no columns": (dict(x=torch.zeros(3, 0)), r"norm: x must be \[rows, E\] with at least one column"),
    "residual": (dict(residual=X[0, :3]), r"norm: residual must be \[5, 8\]"),
    "residual's dtype": (dict(residual=X[0].double()), "norm: residual must be on the CPU and have the right dtype"),
    "weight": (dict(weight=WEIGHT[:4]), r"norm: weight must be \[8\]"),
    "weight's dtype": (dict(weight=WEIGHT.half()), "norm: weight must be of x's dtype"),
    "bias": (dict(bias=WEIGHT[:4]), r"norm: bias must be \[8\]"),
    "kind": (dict(kind=3), "norm: kind must be 0, 1 or 2"),
    "no seed": (dict(dropout_p=0.5), "norm: seed must be one int64 on the CPU"),
    "dropout_p": (dict(dropout_p=1.5), "norm: dropout_p must be between 0 and 1"),
}


@pytest.mark.parametrize("name", WRONG)
def test_the_extension_checks_what_it_is_given(name: str) -> None:
    impl = TABLE.impls[0]
    require(TABLE, impl, "cpu", torch.float32)
    changes, message = WRONG[name]
    with pytest.raises(RuntimeError, match=message):
        impl.kernel.forward(*Arguments(X[0], X[1], WEIGHT, WEIGHT)._replace(**changes), True)


@pytest.mark.parametrize("wrong", ["dy", "dtotal", "mean", "rstd", "needs"])
def test_the_extension_checks_what_backward_is_given(wrong: str) -> None:
    impl = TABLE.impls[0]
    require(TABLE, impl, "cpu", torch.float32)
    arguments = Arguments(X[0], X[1], WEIGHT, WEIGHT)
    outputs = Outputs(*impl.kernel.forward(*arguments, True))
    given: dict[str, Any] = dict(dy=X[0], dtotal=X[0], mean=outputs.mean, rstd=outputs.rstd, needs=[True] * 4)
    given[wrong] = given[wrong][:3]
    tape = (outputs.total, WEIGHT, None, given["mean"], given["rstd"], arguments.kind, 0.0)
    with pytest.raises(RuntimeError, match=f"norm: {wrong} must be"):
        impl.kernel.backward(given["dy"], given["dtotal"], *tape, given["needs"])


def test_what_a_kernel_does_not_take_the_reference_does() -> None:
    assert TABLE.select("cpu", torch.float32, torch.zeros(3, 0)) is TABLE.reference.kernel
    assert add_norm(torch.zeros(3, 0), torch.zeros(3, 0)).shape == (3, 0)


def test_half_takes_no_detour() -> None:
    """A kernel takes it as it is."""
    require(TABLE, TABLE.impls[0], "cpu", torch.bfloat16)
    assert all(TABLE.computes_in("cpu", dtype) == dtype for dtype in HALF)


@pytest.mark.parametrize("graph", [False, True])
def test_few_elements_are_torchs_layer_norm(graph: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[Any] = []
    monkeypatch.setattr("fastseq.ops.norm.norm", lambda *args: called.append(args) or norm(*args))
    monkeypatch.setattr("fastseq.ops.norm.LEAST_ELEMENTS", 60)
    monkeypatch.setattr("fastseq.ops.norm.LEAST_WITH_A_GRAPH", 80)
    weight, bias = torch.rand(5, requires_grad=graph), torch.randn(5)
    most = 80 if graph else 60
    for rows, ours, options in ((most // 5 - 1, False, {}), (most // 5, True, {}), (2, True, dict(kind="rms"))):
        x, residual = torch.randn(rows, 5), torch.randn(rows, 5)
        y, total = add_norm(x, residual, weight, bias, return_total=True, **options)
        assert bool(called) == ours
        torch.testing.assert_close(total, x + residual)
        if not options:
            torch.testing.assert_close(y, F.layer_norm(x + residual, (5,), weight, bias))
        called.clear()
    add_norm(torch.randn(2, 5), weight=weight, dropout_p=0.5)
    with fastseq.use_backend("reference"):
        add_norm(torch.randn(2, 5), weight=weight)
    assert len(called) == 2
