"""Cross entropy: every implementation of the table on the op's own cases, the reference against torch, and the public
function and module.
"""

import itertools
import math
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import assert_no_worse, device_of, name_of, require, require_kernel, require_native
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses import FakeTensorMode
from torch.utils._pytree import tree_map_only

import fastseq
from fastseq.functional import cross_entropy
from fastseq.ops.contract import rounding
from fastseq.ops.cross_entropy import (
    CASES,
    TABLE,
    Arguments,
    Case,
    Outputs,
    backward_arguments,
    computed_in,
    grad_like,
    row_losses,
    widened,
)
from fastseq.reference import cross_entropy as reference
from fastseq.registry import HALF, Impl

KERNELS = [impl for impl in TABLE.impls if impl.name != "reference"]
# Each kernel with each dtype that it takes.
KINDS = [(impl, dtype) for impl in KERNELS for dtype in sorted(impl.dtypes, key=str)]
FLOATS = [torch.float32, torch.float64]
REDUCTIONS = ("none", "sum", "mean")


each_implementation = pytest.mark.parametrize("impl", TABLE.impls, ids=name_of)
each_kind = pytest.mark.parametrize(("impl", "dtype"), KINDS, ids=name_of)
each_case = pytest.mark.parametrize("case", CASES, ids=name_of)


def backward(kernel: Any, dloss: Tensor, arguments: Arguments, lse: Tensor) -> Tensor:
    return kernel.backward(*backward_arguments(dloss, arguments, lse))


@lru_cache(maxsize=4)
def expected(case: Case, device: str, dtype: torch.dtype) -> tuple[Outputs, Tensor, Tensor]:
    """From the reference in float64: outputs, the gradient sent, and that of the logits."""
    wide = widened(case.arguments(device, dtype))
    outputs = Outputs(*reference.forward(*wide))
    sent = grad_like(outputs.loss)
    return outputs, sent, backward(reference, sent, wide, outputs.lse)


def assert_gradient(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want.to(got.dtype), **rounding(want, got.dtype, 1))


def layout(t: Tensor) -> tuple:
    return t.dtype, t.shape, t.stride() if t.numel() else None


def assert_as_promised(op: Callable, args: tuple, results: Any) -> None:
    with FakeTensorMode() as mode:
        promised = op(*tree_map_only(Tensor, mode.from_tensor, args))
    assert [layout(t) for t in results] == [layout(t) for t in promised]


def assert_results(impl: Impl, dtype: torch.dtype, case: Case) -> tuple[Tensor, ...]:
    device = device_of(impl)
    arguments = case.arguments(device, dtype)
    want, sent, want_dlogits = expected(case, device, dtype)
    sent = sent.to(computed_in(dtype))
    outputs = Outputs(*impl.kernel.forward(*arguments))
    for ours, theirs in zip(outputs, want, strict=True):
        torch.testing.assert_close(ours, theirs.to(computed_in(dtype)))
    dlogits = backward(impl.kernel, sent, arguments, outputs.lse)
    assert_gradient(dlogits, want_dlogits)
    # What the reference's forward leaves serves as well.
    assert_gradient(backward(impl.kernel, sent, arguments, want.lse.to(sent.dtype)), want_dlogits)
    assert_as_promised(torch.ops.fastseq.cross_entropy, arguments, outputs)
    args = backward_arguments(sent, arguments, outputs.lse)
    assert_as_promised(lambda *args: [torch.ops.fastseq.cross_entropy_backward(*args)], args, [dlogits])
    return *outputs, dlogits


@each_kind
@each_case
def test_outputs_and_gradients(impl: Impl, dtype: torch.dtype, case: Case) -> None:
    require(TABLE, impl, device_of(impl), dtype)
    before = torch.get_num_threads()
    results = []
    for threads in (1, 2, 3) if impl.is_native else (1, 1):
        torch.set_num_threads(threads)
        results.append(assert_results(impl, dtype, case))
    torch.set_num_threads(before)
    for again in results[1:]:  # the same bits
        assert all(map(torch.equal, again, results[0]))


@each_implementation
@pytest.mark.parametrize("dtype", [*FLOATS, *sorted(HALF, key=str)], ids=name_of)
def test_self_check(impl: Impl, dtype: torch.dtype) -> None:
    require(TABLE, impl, device_of(impl), dtype)
    TABLE.self_check(impl.kernel, device_of(impl), dtype)


@each_case
def test_reference_is_torchs(case: Case) -> None:
    logits, target, weight, smoothing, ignore_index = arguments = case.arguments("cpu", torch.float64)
    logits.requires_grad_()
    theirs = F.cross_entropy(
        logits, target, weight, ignore_index=ignore_index, reduction="none", label_smoothing=smoothing
    )
    loss, lse = reference.forward(*arguments)
    torch.testing.assert_close(loss, theirs)
    torch.testing.assert_close(lse, logits.logsumexp(-1).masked_fill(target == ignore_index, 0.0))
    sent = torch.randn_like(loss)
    (want,) = torch.autograd.grad(theirs, logits, sent)
    torch.testing.assert_close(torch.autograd.grad(loss, logits, sent)[0], want)
    torch.testing.assert_close(backward(reference, sent, arguments, lse), want)


def test_reference_is_what_loops_give() -> None:
    logits, target, weight, e, ignore_index = arguments = Case(6, 9, weight=True, smoothing=0.3, ignored=0.4).arguments(
        "cpu", torch.float64
    )
    assert 0 < (target == ignore_index).sum() < 6
    want = []
    for x, t in zip(logits.tolist(), target.tolist(), strict=True):
        lse = math.log(sum(map(math.exp, x)))
        losses = [w * (lse - value) for w, value in zip(weight.tolist(), x, strict=True)]
        want.append([0.0, 0.0] if t == ignore_index else [(1 - e) * losses[t] + e / 9 * sum(losses), lse])
    torch.testing.assert_close(torch.stack(reference.forward(*arguments), 1).tolist(), want)


BAD = [math.nan, math.inf, -math.inf]


@each_implementation
@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("case", [Case(8, 300), Case(4, 9001, smoothing=0.1)], ids=name_of)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
def test_what_is_not_finite_is_as_in_torch(impl: Impl, bad: float, case: Case, dtype: torch.dtype) -> None:
    device = device_of(impl)
    require(TABLE, impl, device, dtype)
    arguments = case.arguments(device, dtype)
    logits, target = arguments[:2]
    logits[0, target[0]] = bad
    logits[1, (target[1] + 1) % case.V] = bad
    logits[2] = bad
    target[3], logits[3] = arguments.ignore_index, bad  # which has no effect
    leaf = logits.float().index_fill(0, torch.tensor([3], device=device), 0.0).requires_grad_()
    want = F.cross_entropy(leaf, target, reduction="none", label_smoothing=case.smoothing)
    (want_dlogits,) = torch.autograd.grad(want.sum(), leaf)
    loss, lse = impl.kernel.forward(*arguments)
    torch.testing.assert_close(loss, want, equal_nan=True)
    dlogits = backward(impl.kernel, torch.ones_like(loss), arguments, lse)
    torch.testing.assert_close(dlogits, want_dlogits.to(dtype), equal_nan=True)
    assert not dlogits[3].any()


@each_implementation
@pytest.mark.parametrize("change", [lambda t: t[::2], lambda t: t[:1].expand(5, -1), lambda t: t.T.contiguous().T])
def test_any_strides(impl: Impl, change: Callable) -> None:
    device = device_of(impl)
    require(TABLE, impl, device, torch.float32)
    arguments = Case(10, 130).arguments(device, torch.float32)
    results = []
    for view in (change, lambda t: change(t).contiguous()):
        logits = view(arguments.logits)
        target = arguments.target.repeat_interleave(2)[::2][: len(logits)]
        inputs = arguments._replace(logits=logits, target=target)
        loss, lse = impl.kernel.forward(*inputs)
        results.append([loss, lse, backward(impl.kernel, loss.new_ones(()).expand_as(loss), inputs, lse)])
    torch.testing.assert_close(*results)


def test_long_rows_are_as_exact_as_torch() -> None:
    """Sums of 300,000 terms, some of them large."""
    require_native()
    logits = torch.randn(3, 300_000) * 5
    target = torch.tensor([0, 5, 299_999])
    leaves = [logits.clone().requires_grad_(), logits.clone().requires_grad_(), logits.double().requires_grad_()]
    results = []
    for function, leaf in zip((cross_entropy, F.cross_entropy, F.cross_entropy), leaves, strict=True):
        loss = function(leaf, target, reduction="none", label_smoothing=0.1)
        results.append([loss, *torch.autograd.grad(loss.sum(), leaf)])
    torch.testing.assert_close(results[0], [t.float() for t in results[2]])
    assert_no_worse(*results)


GRADCHECK_CASES = [
    Case(3, 5),
    Case(4, 5, weight=True, smoothing=0.3, ignored=0.3),
    Case(2, 6, ignored=0.5, gap=2),
]


def differentiable(case: Case, device: str) -> tuple[Callable[[Tensor], Tensor], tuple[Tensor]]:
    logits, *rest = case.arguments(device, torch.float64)
    return lambda x: row_losses(Arguments(x, *rest)).loss, (logits.requires_grad_(),)


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


def test_transforms_of_torch_func() -> None:
    logits, target = torch.randn(3, 4, 7, dtype=torch.float64), torch.randint(7, (3, 4))
    weight = torch.rand(7, dtype=torch.float64)
    target[0, 1] = -100
    for options in ({}, dict(label_smoothing=0.1), dict(weight=weight), dict(weight=weight, reduction="sum")):
        ours, theirs = (partial(function, **options) for function in (cross_entropy, F.cross_entropy))
        want = torch.stack([theirs(x, t) for x, t in zip(logits, target, strict=True)])
        torch.testing.assert_close(torch.func.vmap(ours)(logits, target), want)
        leaf = logits.clone().requires_grad_()
        want = torch.autograd.grad(sum(theirs(x, t) for x, t in zip(leaf, target, strict=True)), leaf)[0]
        torch.testing.assert_close(torch.func.vmap(torch.func.grad(ours))(logits, target), want)
        for transform in (torch.func.jacrev, torch.func.jacfwd):
            torch.testing.assert_close(transform(ours)(logits[0], target[0]), want[0])


def test_double_backward_where_the_gradient_depends_on_the_logits() -> None:
    results = []
    for function in (cross_entropy, F.cross_entropy):
        x = torch.linspace(-2, 3, 20, dtype=torch.float64).view(4, 5).requires_grad_()
        loss = function(x, torch.tensor([0, 3, 4, 1]), reduction="none", label_smoothing=0.2)
        (once,) = torch.autograd.grad((loss * x.sum(1)).square().sum(), x, create_graph=True)
        results.append([once, *torch.autograd.grad(once.square().sum(), x)])
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("case", GRADCHECK_CASES, ids=name_of)
def test_opcheck(case: Case) -> None:
    arguments = case.arguments("cpu", torch.float64)
    loss, lse = reference.forward(*arguments)
    args = backward_arguments(grad_like(loss), arguments, lse)
    torch.library.opcheck(torch.ops.fastseq.cross_entropy_backward.default, args)
    torch.library.opcheck(torch.ops.fastseq.cross_entropy.default, arguments)
    arguments.logits.requires_grad_()
    torch.library.opcheck(torch.ops.fastseq.cross_entropy.default, arguments)


def assert_torchs(input: Tensor, target: Tensor, weight: Tensor | None = None, **options: Any) -> None:
    """Result and gradient are those of torch's function."""
    results = []
    for function in (cross_entropy, F.cross_entropy):
        leaf = input.detach().requires_grad_()
        loss = function(leaf, target, weight, **options)
        results.append([loss, *torch.autograd.grad(loss, leaf, torch.linspace(1, 2, loss.numel()).view(loss.shape))])
    torch.testing.assert_close(*results, equal_nan=True)


def inputs_of(shape: tuple[int, ...], last: bool) -> tuple[Tensor, Tensor]:
    """Logits [N, C, ...], in memory [N, ..., C] if `last`, and targets of which one is ignored."""
    C = shape[1] if len(shape) > 1 else shape[0]
    inner = shape[:1] + shape[2:] if len(shape) > 1 else ()
    logits = torch.randn(*inner, C).movedim(-1, min(len(inner), 1)) if last else torch.randn(shape)
    target = torch.randint(C, inner)
    if target.numel() > 1:
        target.view(-1)[1] = -100
    return logits, target


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[Arguments]:
    """What has reached the op from the function."""
    require_native()
    calls: list[Arguments] = []
    monkeypatch.setattr(
        "fastseq.ops.cross_entropy.row_losses", lambda arguments: (calls.append(arguments), row_losses(arguments))[1]
    )
    return calls


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize(
    "shape", [(5,), (4, 5), (0, 5), (3, 1), (2, 5, 3), (2, 5, 1), (2, 5, 3, 4), (0, 5, 3)], ids=str
)
def test_all_shapes_that_torch_takes(shape: tuple[int, ...], last: bool, served: list[Arguments]) -> None:
    logits, target = inputs_of(shape, last)
    weights = (None, torch.rand(shape[1] if len(shape) > 1 else shape[0]))
    for reduction, smoothing, weight in itertools.product(REDUCTIONS, (0.0, 0.2), weights):
        assert_torchs(logits, target, weight, reduction=reduction, label_smoothing=smoothing)
    copies = len(shape) > 2 and not last and math.prod(shape[2:]) > 1
    assert bool(served) != copies
    pointer = logits.data_ptr()
    assert all(arguments.logits.data_ptr() == pointer for arguments in served)


def test_views_are_not_copied(served: list[Arguments]) -> None:
    states = torch.randn(2, 6, 9, 11)
    for logits in (states[:, 1, 1], states[:, :, 0].transpose(1, 2), states[0, :, :, 2:].movedim(2, 1)):
        assert_torchs(logits, torch.randint(logits.shape[1], logits.shape[:1] + logits.shape[2:]), reduction="none")
        assert served.pop().logits.data_ptr() == logits.data_ptr()
        served.clear()
    # Rows at two distances from each other.
    logits = states[:, :3].permute(0, 3, 1, 2)[:, :, :, :5]
    assert_torchs(logits, torch.randint(11, (2, 3, 5)), reduction="none")
    assert not served


def test_ignored_targets() -> None:
    logits = torch.randn(4, 6)
    for ignore_index, target in (
        (-100, torch.full((4,), -100)),  # all of them: 0/0, as in torch
        (3, torch.tensor([3, 2, 3, 1])),
        (-1, torch.tensor([-1, 2, 0, 1])),
        (6, torch.tensor([6, 2, 0, 1])),
        (-(2**62), torch.tensor([-(2**62), 2, 0, 1])),
    ):
        for reduction, smoothing, weight in itertools.product(REDUCTIONS, (0.0, 0.2), (None, torch.rand(6))):
            options = dict(reduction=reduction, label_smoothing=smoothing, ignore_index=ignore_index)
            assert_torchs(logits, target, weight, **options)
    assert cross_entropy(logits, torch.full((4,), -100)).isnan()
    assert cross_entropy(logits, torch.tensor([0, 1, 2, 3]), torch.zeros(6)).isnan()
    assert cross_entropy(logits[:0], torch.zeros(0, dtype=torch.int64)).isnan()


@pytest.mark.filterwarnings("ignore:size_average and reduce")
def test_deprecated_options() -> None:
    logits, target = torch.randn(4, 6), torch.tensor([0, 5, 2, 3])
    for size_average, reduce in itertools.product((None, False, True), repeat=2):
        assert_torchs(logits, target, size_average=size_average, reduce=reduce)


@pytest.mark.parametrize("dtype", sorted(HALF, key=str), ids=name_of)
def test_half_precision(dtype: torch.dtype) -> None:
    logits, target, weight = (
        (torch.randn(20, 3000) * 4).to(dtype),
        torch.randint(3000, (20,)),
        torch.rand(3000).to(dtype),
    )
    target[3] = -100
    for reduction, options in itertools.product(REDUCTIONS, ({}, dict(weight=weight), dict(label_smoothing=0.1))):
        results = []
        for function, wide in ((cross_entropy, False), (F.cross_entropy, False), (F.cross_entropy, True)):
            leaf = (logits.double() if wide else logits).requires_grad_()
            given = {name: o.double() if wide and isinstance(o, Tensor) else o for name, o in options.items()}
            loss = function(leaf, target, reduction=reduction, **given)
            results.append([loss, *torch.autograd.grad(loss.sum(), leaf)])
            logits = logits.detach()
        assert_no_worse(*results)


@pytest.mark.parametrize("stored", [torch.float32, torch.float64, *sorted(HALF, key=str)], ids=name_of)
@pytest.mark.parametrize("low", sorted(HALF, key=str), ids=name_of)
def test_under_autocast_results_are_wide(stored: torch.dtype, low: torch.dtype, served: list[Arguments]) -> None:
    logits, target, weight = torch.randn(5, 70).to(stored), torch.randint(70, (5,)), torch.rand(70).to(stored)
    with torch.autocast("cpu", dtype=low):
        for some, reduction in itertools.product((None, weight), REDUCTIONS):
            assert_torchs(logits, target, some, reduction=reduction, label_smoothing=0.1)
            assert served[-1].logits.dtype == stored  # not copied
        if stored in HALF:
            assert cross_entropy(logits, target, weight.float()).dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
@pytest.mark.parametrize("autocast", [False, True])
def test_no_copy_of_the_logits(dtype: torch.dtype, autocast: bool) -> None:
    """Neither made by forward nor kept for backward, which makes the gradient and nothing else of that size."""
    require_native()
    logits, target = torch.randn(64, 4096).to(dtype).requires_grad_(), torch.randint(4096, (64,))
    kept: list[Tensor] = []
    small, size = logits.nbytes // 16, logits.nbytes
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        forward = allocated(lambda: cross_entropy(logits, target, label_smoothing=0.1), autocast)
    loss, peak = forward
    assert peak < small
    assert sum(t.nbytes for t in kept if t.data_ptr() != logits.data_ptr()) < small
    _, peak = allocated(lambda: torch.autograd.grad(loss, logits), False)
    assert size <= peak < size + small
    _, peak = allocated(lambda: F.cross_entropy(logits, target), autocast)
    assert peak >= size  # such a copy would be seen


def allocated(call: Callable, autocast: bool) -> tuple[Any, int]:
    """The result, and the bytes that torch's allocator has been asked for."""
    with (
        torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile,
        torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast),
    ):
        result = call()
    return result, sum(max(0, event.self_cpu_memory_usage) for event in profile.events())


def test_inputs_stay_what_they_are() -> None:
    require_kernel(TABLE, "cpu", torch.float32)
    logits, target = torch.randn(3, 50, requires_grad=True), torch.tensor([1, -100, 49])
    inner = logits * 1
    loss = cross_entropy(inner, target)
    with torch.no_grad():
        inner.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


LOGITS, TARGET = torch.randn(3, 5), torch.tensor([0, 4, 1])
REFUSED: dict[str, tuple] = {
    "targets too large": (LOGITS, torch.tensor([0, 7, -1])),
    "targets too small": (LOGITS, torch.tensor([0, -3, 9])),
    "targets of two dimensions": (LOGITS, TARGET.view(1, 3)),
    "too many targets": (LOGITS, torch.tensor([0, 1, 2, 3])),
    "targets of int32": (LOGITS, TARGET.int()),
    "no tensor": ([1.0], TARGET),
    "no target": (LOGITS, None),
    "weights of another length": (LOGITS, TARGET, torch.ones(4)),
    "weights of another dtype": (LOGITS, TARGET, torch.ones(5).double()),
    "weights that learn": (LOGITS, TARGET, torch.ones(5, requires_grad=True)),
    "smoothing": (LOGITS, TARGET, None, None, -100, None, "mean", 1.5),
    "reduction": (LOGITS, TARGET, None, None, -100, None, "median"),
    "integers": (torch.ones(3, 5, dtype=torch.int64), TARGET),
    "no classes": (torch.ones(3, 0), TARGET),
    "ignore_index": (LOGITS, TARGET, None, None, 2**70),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_torch_refuses(what: str) -> None:
    errors = []
    for function in (F.cross_entropy, cross_entropy):
        with pytest.raises(Exception) as raised:
            function(*REFUSED[what])
        errors.append((type(raised.value), str(raised.value).splitlines()[0]))
    assert errors[0] == errors[1]


def test_targets_are_checked_in_compiled_calls() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(lambda *args: cross_entropy(*args), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(LOGITS, TARGET), F.cross_entropy(LOGITS, TARGET))
    with pytest.raises(IndexError, match=r"Target 7 is out of bounds\."):
        compiled(LOGITS, torch.tensor([0, 7, 1]))


def test_the_extension_checks_for_itself() -> None:
    require_native()
    forward, backward = TABLE.impls[0].kernel.forward, TABLE.impls[0].kernel.backward
    weight, rows = torch.ones(5), torch.ones(3)
    for args, message in (
        ((LOGITS, torch.tensor([0, 5, 1]), None, 0.0, -100), r"target must be within \[0, V\)"),
        ((LOGITS, torch.tensor([0, -1, 1]), None, 0.0, -100), r"target must be within \[0, V\)"),
        ((LOGITS, TARGET[:2], None, 0.0, -100), r"target must be \[3\]"),
        ((LOGITS, TARGET.int(), None, 0.0, -100), "target must be on the CPU and have the right dtype"),
        ((LOGITS, TARGET, weight[:4], 0.0, -100), r"weight must be \[5\]"),
        ((LOGITS, TARGET, weight.double(), 0.0, -100), "weight must be on the CPU and have the right dtype"),
        ((LOGITS, TARGET, None, 1.5, -100), "label_smoothing must be between 0 and 1"),
        ((LOGITS[0], TARGET, None, 0.0, -100), r"logits must be \[rows, V\]"),
        ((LOGITS[:, :0], TARGET, None, 0.0, -100), r"logits must be \[rows, V\]"),
        ((LOGITS.long(), TARGET, None, 0.0, -100), "logits must be float32, float64, bfloat16 or float16"),
    ):
        with pytest.raises(RuntimeError, match=message):
            forward(*args)
        logits, target, given, *options = args
        with pytest.raises(RuntimeError, match=message):
            backward(rows, logits, target, given, rows, *options)
    for dloss, lse, message in (
        (rows[:2], rows, r"dloss must be \[3\]"),
        (rows, rows.double(), "lse must be on the CPU"),
    ):
        with pytest.raises(RuntimeError, match=message):
            backward(dloss, LOGITS, TARGET, None, lse, 0.0, -100)


class Subclass(Tensor):
    pass


def test_what_torch_takes_beyond_ours_is_torchs(served: list[Arguments]) -> None:
    logits, target = torch.randn(4, 5), torch.tensor([0, 3, 4, 1])
    for args in (
        (logits, torch.rand(4, 5).softmax(1)),
        (logits, target.byte()),
        (logits[:, ::2], target // 2),
        (torch.randn(3, 0), torch.full((3,), -100)),
        (logits.to("meta"), target.to("meta")),
    ):
        got, want = cross_entropy(*args), F.cross_entropy(*args)
        assert (got.device, got.dtype, got.shape) == (want.device, want.dtype, want.shape)
        if not got.is_meta:
            torch.testing.assert_close(got, want, equal_nan=True)
    assert type(cross_entropy(logits.as_subclass(Subclass), target)) is Subclass
    assert not served
    with (
        fastseq.use_backend("cpp"),
        pytest.raises(fastseq.BackendError, match="cpp was asked for but it does not take such arguments"),
    ):
        cross_entropy(logits, torch.rand(4, 5).softmax(1))


def test_without_a_kernel_torchs_function_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    called = []
    monkeypatch.setattr("fastseq.ops.cross_entropy.why_torch", lambda *_: "no kernel here")
    monkeypatch.setattr(F, "cross_entropy", lambda *args, **kwargs: called.append((args, kwargs)))
    cross_entropy(LOGITS, TARGET, reduction="sum")
    assert called[0][1]["reduction"] == "sum"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
def test_an_implementation_can_be_asked_for(dtype: torch.dtype) -> None:
    logits = LOGITS.to(dtype).requires_grad_()
    want = F.cross_entropy(logits.float(), TARGET)
    with fastseq.use_backend("reference"):
        loss = cross_entropy(logits, TARGET)
        torch.testing.assert_close(loss, want.to(dtype))
        (dlogits,) = torch.autograd.grad(loss, logits)
    torch.testing.assert_close(dlogits, torch.autograd.grad(want, logits)[0])


def test_dynamic_sizes_compile_once() -> None:
    require_kernel(TABLE, "cpu", torch.float32)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    call = partial(cross_entropy, label_smoothing=0.1)
    compiled = torch.compile(lambda *args: call(*args), fullgraph=True, dynamic=True, backend=counter)
    counts = []
    for rows, V in ((3, 7), (5, 9), (2, 5000)):
        leaf, target, weight = torch.randn(rows, V, requires_grad=True), torch.randint(V, (rows,)), torch.rand(V)
        target[0] = -100
        results = []
        for function in (compiled, call):
            loss = function(leaf, target, weight)
            results.append([loss, *torch.autograd.grad(loss, leaf)])
        torch.testing.assert_close(*results)
        counts.append(counter.frame_count)
    assert counts == counts[:1] * 3


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
def test_compiles_with_inductor(reduction: str, dtype: torch.dtype) -> None:
    torch._dynamo.reset()
    leaf, target = torch.randn(2, 6, 33).to(dtype).requires_grad_(), torch.randint(33, (2, 6))

    def call(leaf: Tensor, target: Tensor) -> Tensor:
        return cross_entropy(leaf.transpose(1, 2), target, reduction=reduction)

    results = []
    for function in (torch.compile(call, fullgraph=True), call):
        loss = function(leaf, target)
        results.append([loss, *torch.autograd.grad(loss.sum(), leaf)])
    torch.testing.assert_close(*results)


def test_export_with_dynamic_rows() -> None:
    rows = torch.export.Dim("rows", min=2, max=500)
    model = fastseq.nn.CrossEntropyLoss(label_smoothing=0.1)
    exported = torch.export.export(model, (LOGITS, TARGET), dynamic_shapes=({0: rows}, {0: rows}))
    other = torch.randn(40, 5), torch.randint(5, (40,))
    torch.testing.assert_close(exported.module()(*other), model(*other))


class Model(nn.Module):
    """A model with its loss inside."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.head = nn.Linear(8, 50)
        self.loss = nn.CrossEntropyLoss(**options)

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        return self.loss(self.head(x).transpose(1, 2), target)


@pytest.mark.parametrize("options", [{}, dict(weight=torch.rand(50), label_smoothing=0.1, ignore_index=3)], ids=str)
def test_the_module_is_a_drop_in(options: dict, served: list[Arguments]) -> None:
    model = Model(**options)
    x, target = torch.randn(2, 7, 8), torch.randint(50, (2, 7))
    state = list(model.state_dict())
    want = model(x, target)
    want_grads = torch.autograd.grad(want, list(model.parameters()))
    fastseq.accelerate(model)
    assert type(model.loss) is fastseq.nn.CrossEntropyLoss and list(model.state_dict()) == state
    got = model(x, target)
    torch.testing.assert_close([got, *torch.autograd.grad(got, list(model.parameters()))], [want, *want_grads])
    assert len(served) == 1
    row = fastseq.explain(model).rows[0]
    assert (row.layer, row.type, row.served_by) == ("loss", "fastseq.nn.CrossEntropyLoss", "cpp")
    assert ("as for float32 on cpu" in row.note) == (not options)
    traced = torch.fx.symbolic_trace(model)
    assert [node.target for node in traced.graph.nodes if node.op == "call_module"] == ["head", "loss"]
    torch.testing.assert_close(traced(x, target), want)
    scripted = torch.jit.script(model)
    torch.testing.assert_close(scripted(x, target), want)
    assert type(fastseq.restore(model).loss) is nn.CrossEntropyLoss


def test_a_loss_is_explained_where_nothing_serves_it() -> None:
    loss = fastseq.nn.CrossEntropyLoss(weight=torch.ones(5, device="meta"))
    assert fastseq.explain(loss).rows[0].served_by == "torch"
    assert fastseq.explain(nn.CrossEntropyLoss()).rows[0].note.startswith("not accelerated")


def test_few_logits_are_torchs(served: list[Arguments], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastseq.ops.cross_entropy.LEAST_LOGITS", 60)
    target = torch.randint(5, (11,))
    for logits in (torch.randn(11, 5), torch.randn(11, 6), torch.randn(11, 5, dtype=torch.bfloat16)):
        fastseq.functional.cross_entropy(logits, target, reduction="sum")
    assert [arguments.logits.shape[1] for arguments in served] == [6, 5]
