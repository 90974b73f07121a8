"""The op of the attention decoder: every implementation of its table against the reference, on the op's own cases."""

from functools import lru_cache
from typing import Any

import pytest
import torch
from conftest import device_of, name_of, require, widest
from torch import Tensor

import fastseq
from fastseq.functional import attention_decoder
from fastseq.ops.attention_decoder import (
    CASES,
    CELLS,
    GRU,
    LSTM,
    TABLE,
    Arguments,
    Case,
    Outputs,
    check,
    decode,
    grads_like,
    needs_all,
    written,
)
from fastseq.ops.contract import widened
from fastseq.reference import attention_decoder as reference
from fastseq.registry import Impl

KERNELS = [impl for impl in TABLE.impls if impl.name != "reference"]
DTYPES = [torch.float32, torch.float64]


each_kernel = pytest.mark.parametrize("impl", KERNELS, ids=name_of)
each_implementation = pytest.mark.parametrize("impl", TABLE.impls, ids=name_of)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=name_of)


def assert_gradients(got: Any, want: Any) -> None:
    """Gradients are sums over T*B*S terms in another order: as exact as the sum of the terms' sizes allows."""
    for ours, theirs in zip(got, want, strict=True):
        size = max(1.0, theirs.abs().max().item()) if theirs.numel() else 1.0
        tolerance = (
            dict(rtol=1e-4, atol=2e-5 * size) if ours.dtype == torch.float32 else dict(rtol=1e-7, atol=1e-9 * size)
        )
        torch.testing.assert_close(ours, theirs.to(ours.dtype), **tolerance)


def backward(kernel: Any, grads: list[Tensor | None], arguments: Arguments, tape: Outputs) -> tuple[Tensor, ...]:
    return kernel.backward(*grads, *arguments, *tape.saved(), needs_all(arguments))


@lru_cache(maxsize=8)
def expected(case: Case, device: str, dtype: torch.dtype) -> tuple[Outputs, tuple[Tensor, ...]]:
    """The reference's outputs in this dtype, and its gradients in float64."""
    arguments = case.arguments(device, dtype)
    wide = widened(arguments)
    outputs = Outputs(*reference.forward(*wide, True))
    grads = backward(reference, grads_like(outputs), wide, outputs)
    return Outputs(*reference.forward(*arguments, True)), grads


def leaves_of(arguments: Arguments) -> tuple[Arguments, list[Tensor]]:
    """The arguments anew, and those among them that now ask for a gradient."""
    made = [
        t.detach().clone().requires_grad_() if isinstance(t, Tensor) and t.is_floating_point() else t for t in arguments
    ]
    return Arguments(*made), [t for t in made if isinstance(t, Tensor) and t.requires_grad]


def steps_of(arguments: Arguments, start: int, stop: int, before: Outputs | None = None) -> Arguments:
    """Those of some of the steps, which follow on others."""
    gates = arguments.gates[start:stop]
    if before is None:
        return arguments._replace(gates=gates)
    c0, feed0 = before.c_n if arguments.cell == LSTM else None, None if arguments.w_out is None else before.feeds[-1]
    return arguments._replace(gates=gates, h0=before.h_n, c0=c0, feed0=feed0)


@each_kernel
@each_dtype
@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_forward_tape_and_backward(impl: Impl, dtype: torch.dtype, case: Case, threads: int) -> None:
    device = device_of(impl)
    require(TABLE, impl, device, dtype)
    arguments = case.arguments(device, dtype)
    check(arguments)
    outputs, want_grads = expected(case, device, dtype)
    ours = Outputs(*impl.kernel.forward(*arguments, True))
    for name, got, want in zip(Outputs._fields, ours, outputs, strict=True):
        torch.testing.assert_close(written(name, got, arguments), written(name, want, arguments))
    without = Outputs(*impl.kernel.forward(*arguments, False))
    torch.testing.assert_close(without[:5], ours[:5])
    assert not any(t.numel() for t in without[5:])
    # From either tape, and the reference from ours.
    for kernel, tape in ((impl.kernel, ours), (impl.kernel, outputs), (reference, ours)):
        assert_gradients(backward(kernel, grads_like(outputs), arguments, tape), want_grads)


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_the_references_backward_is_autograds(case: Case) -> None:
    """Weights, too, whose gradients are made outside of the kernels."""
    if not case.B:
        pytest.skip("there is nothing to differentiate")
    arguments, leaves = leaves_of(case.arguments("cpu", torch.float64))
    results = []
    for run in (lambda: reference.forward(*arguments, True), lambda: decode(arguments)):
        outputs = Outputs(*run())
        pairs = [(t, g) for t, g in zip(outputs[:5], grads_like(outputs), strict=False) if g is not None]
        results.append(
            torch.autograd.grad([t for t, _ in pairs], leaves, [g for _, g in pairs], materialize_grads=True)
        )
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("cell", CELLS)
def test_without_a_memory_to_speak_of_it_is_torchs_layer(cell: str) -> None:
    """Of one place, a context is that place, and the cell a torch layer whose input it is part of."""
    arguments = Case(6, 3, 1, 5, 4, A=2, cell=cell).arguments("cpu", torch.float64)
    context = arguments.values[:, 0].expand(6, 3, 4)
    x = torch.cat([torch.zeros(6, 3, 1, dtype=torch.float64), context], -1)
    layer = {"lstm": torch.nn.LSTM, "gru": torch.nn.GRU, "rnn": torch.nn.RNN}[cell](5, 5, dtype=torch.float64)
    bias = torch.zeros_like(arguments.gates) + torch.linspace(-1, 1, arguments.gates.shape[-1], dtype=torch.float64)
    with torch.no_grad():
        layer.weight_ih_l0.copy_(torch.cat([torch.zeros_like(arguments.w_feed[:, :1]), arguments.w_feed], 1))
        layer.weight_hh_l0.copy_(arguments.w_hh)
        layer.bias_ih_l0.copy_(bias[0, 0])
        layer.bias_hh_l0.copy_(arguments.b_hh)
    h0, c0 = arguments.h0.unsqueeze(0), None if arguments.c0 is None else arguments.c0.unsqueeze(0)
    want, state = layer(x, h0 if c0 is None else (h0, c0))
    outputs = decode(arguments._replace(gates=bias))
    torch.testing.assert_close(outputs.h, want)
    torch.testing.assert_close(outputs.feeds, context)
    got = outputs.h_n if c0 is None else (outputs.h_n, outputs.c_n)
    torch.testing.assert_close(got, state[0] if c0 is None else (state[0][0], state[1][0]))


GRADCHECK_CASES = [
    Case(3, 2, 4, 3, 2, A=3, absent=True, lengths=True),
    Case(3, 3, 4, 3, 2, F=2, cell="lstm", absent=True, lengths=True),
    Case(2, 2, 3, 4, 3, cell="rnn"),
    Case(2, 2, 3, 4, 3, A=2, F=3, bias=False),
]


@each_implementation
@pytest.mark.parametrize("case", GRADCHECK_CASES, ids=name_of)
def test_gradcheck(impl: Impl, case: Case) -> None:
    require(TABLE, impl, device_of(impl), torch.float64)
    arguments, leaves = leaves_of(case.arguments(device_of(impl), torch.float64))

    def call(*tensors: Tensor) -> tuple[Tensor, ...]:
        rest = iter(tensors)
        given = [next(rest) if isinstance(t, Tensor) and t.requires_grad else t for t in arguments]
        return tuple(t for t in decode(Arguments(*given))[:5] if t.numel())

    with fastseq.use_backend(impl.name):
        # One random direction instead of every element: the tensors are many.
        assert torch.autograd.gradcheck(call, leaves, fast_mode=True)
        assert torch.autograd.gradgradcheck(call, leaves, fast_mode=True)


def test_double_backward_where_one_input_depends_on_another() -> None:
    arguments = Case(2, 2, 3, 4, 4, F=4).arguments("cpu", torch.float64)
    h0 = arguments.h0.requires_grad_()

    def chained() -> Tensor:
        h = h0
        for _ in range(2):  # what is fed and looked at is made from the state
            h = decode(arguments._replace(h0=h, feed0=h.tanh(), keys=arguments.keys * h.unsqueeze(1))).h_n
        return h.square().sum()

    once = torch.autograd.grad(chained(), h0)[0]
    torch.testing.assert_close(torch.autograd.grad(chained(), h0, create_graph=True)[0], once)


def test_transforms_and_forward_mode() -> None:
    arguments = Case(3, 2, 4, 5, 6, A=3).arguments("cpu", torch.float64)

    def of_h0(h0: Tensor) -> Tensor:
        return decode(arguments._replace(h0=h0)).h.sum(0)

    leaf = arguments.h0.clone().requires_grad_()
    want = torch.autograd.grad(of_h0(leaf).square().sum(), leaf)[0]
    torch.testing.assert_close(torch.func.grad(lambda h0: of_h0(h0).square().sum())(arguments.h0), want)
    tangent = torch.ones_like(arguments.h0)
    _, pushed = torch.func.jvp(of_h0, (arguments.h0,), (tangent,))
    jacobian = torch.autograd.functional.jacobian(of_h0, arguments.h0)
    torch.testing.assert_close(pushed, torch.einsum("abcd,cd->ab", jacobian, tangent))
    vectorized = torch.autograd.functional.jacobian(of_h0, arguments.h0, vectorize=True)
    torch.testing.assert_close(vectorized, jacobian)


@each_implementation
@pytest.mark.parametrize("case", [Case(13, 3, 7, 17, 9, A=5), Case(13, 3, 7, 17, 9, F=8, cell="lstm")], ids=name_of)
def test_split_run_equals_whole(impl: Impl, case: Case) -> None:
    dtype = widest(impl)
    require(TABLE, impl, device_of(impl), dtype)
    arguments, leaves = leaves_of(case.arguments(device_of(impl), dtype))
    with fastseq.use_backend(impl.name):
        whole = decode(arguments)
        first = decode(steps_of(arguments, 0, 5))
        second = decode(steps_of(arguments, 5, 13, first))
        split = [torch.cat(parts) for parts in zip(first[:3], second[:3], strict=True)]
        torch.testing.assert_close(split, list(whole[:3]))
        torch.testing.assert_close(second[3:5], whole[3:5])
        grads = grads_like(whole)[:3]
        results = [torch.autograd.grad(outputs, leaves, grads) for outputs in (split, whole[:3])]
    assert_gradients(*results)


@each_kernel
def test_an_infinite_state_is_as_in_the_reference(impl: Impl) -> None:
    """What stands behind the A elements of a query must not count: A is no multiple of a vector."""
    require(TABLE, impl, device_of(impl), torch.float64)
    arguments = Case(5, 9, 17, 40, 20, A=5, cell="rnn").arguments(device_of(impl), torch.float64)
    arguments.h0[0, 0] = float("inf")
    got, want = (Outputs(*forward(*arguments, True)) for forward in (impl.kernel.forward, reference.forward))
    torch.testing.assert_close(got.weights, want.weights, equal_nan=True)


@each_kernel
def test_large_v_of_small_keys(impl: Impl) -> None:
    """tanh is right relative to itself where scores are sums of much of it."""
    require(TABLE, impl, device_of(impl), torch.float32)
    arguments = Case(6, 9, 17, 40, 20, A=33).arguments(device_of(impl), torch.float32)
    keys, w_query, v = arguments.keys * 1e-4, arguments.w_query * 1e-4, arguments.v * 1e5
    arguments = arguments._replace(keys=keys, w_query=w_query, v=v)
    exact = Outputs(*reference.forward(*widened(arguments), False)).weights
    got = Outputs(*impl.kernel.forward(*arguments, False)).weights
    torch.testing.assert_close(got, exact.float(), rtol=2e-5, atol=2e-6)


@each_kernel
@pytest.mark.parametrize("looks", [dict(A=5), dict(F=8), dict(A=5, F=8), dict()])
def test_padding_is_never_read(impl: Impl, looks: dict[str, int]) -> None:
    require(TABLE, impl, device_of(impl), torch.float32)
    case = Case(9, 5, 7, 12, 6, cell="lstm", absent=True, lengths=True, **looks)
    arguments = case.arguments(device_of(impl), torch.float32)
    nan = float("nan")
    past = (torch.arange(9).unsqueeze(-1) >= arguments.lengths).unsqueeze(-1).to(arguments.gates.device)
    bad = arguments._replace(
        gates=arguments.gates.masked_fill(past, nan),
        keys=arguments.keys.masked_fill(arguments.absent.unsqueeze(-1), nan),
        values=arguments.values.masked_fill(arguments.absent.unsqueeze(-1), nan),
    )
    outputs = Outputs(*impl.kernel.forward(*arguments, True))
    got = Outputs(*impl.kernel.forward(*bad, True))
    for name, ours, want in zip(Outputs._fields, got, outputs, strict=True):
        torch.testing.assert_close(written(name, ours, arguments), written(name, want, arguments))
    grads = grads_like(outputs)
    clean = backward(impl.kernel, grads, arguments, outputs)
    grads[:3] = [g.masked_fill(past, nan) for g in grads[:3] if g is not None]
    dirty = backward(impl.kernel, grads, bad, got)
    torch.testing.assert_close(dirty, clean)
    for of_steps in dirty[:4]:
        assert not of_steps.numel() or not of_steps.masked_select(past).any()


@each_implementation
def test_nothing_to_look_at_and_no_step(impl: Impl) -> None:
    require(TABLE, impl, device_of(impl), torch.float32)
    arguments = Case(4, 3, 5, 6, 7, A=4, cell="lstm").arguments(device_of(impl), torch.float32)
    absent = torch.zeros(3, 5, dtype=torch.bool, device=arguments.gates.device)
    absent[1] = True
    with fastseq.use_backend(impl.name):
        outputs = decode(arguments._replace(absent=absent, lengths=torch.tensor([4, 4, 0])))
    assert not outputs.feeds[:, 1].any() and not outputs.weights[:, 1].any()
    torch.testing.assert_close(outputs.weights[:, 0].sum(-1), torch.ones_like(outputs.weights[:, 0, 0]))
    assert not any(sequence[:, 2].any() for sequence in outputs[:3])
    assert torch.equal(outputs.h_n[2], arguments.h0[2]) and torch.equal(outputs.c_n[2], arguments.c0[2])


@each_kernel
def test_only_needed_gradients(impl: Impl) -> None:
    require(TABLE, impl, device_of(impl), torch.float32)
    arguments = Case(5, 3, 7, 9, 8, A=6, F=4, cell="lstm").arguments(device_of(impl), torch.float32)
    outputs = Outputs(*impl.kernel.forward(*arguments, True))

    def run(needs: list[bool], grads: list[Tensor | None]) -> tuple[Tensor, ...]:
        return impl.kernel.backward(*grads, *arguments, *outputs.saved(), needs)

    full = run([True] * 3, grads_like(outputs))
    for wanted in range(3):
        some = run([k == wanted for k in range(3)], grads_like(outputs))
        torch.testing.assert_close(some[:7], full[:7])
        assert [bool(t.numel()) for t in some[7:]] == [k == wanted for k in range(3)]
        torch.testing.assert_close(some[7 + wanted], full[7 + wanted])
    # A gradient that nobody sends counts as zeros.
    for missing in range(5):
        grads = grads_like(outputs)
        zeros = [torch.zeros_like(g) if k == missing and g is not None else g for k, g in enumerate(grads)]
        grads[missing] = None
        torch.testing.assert_close(run([True] * 3, grads), run([True] * 3, zeros))


@each_implementation
def test_non_contiguous_everything(impl: Impl) -> None:
    require(TABLE, impl, device_of(impl), torch.float32)
    arguments = Case(5, 3, 7, 8, 6, A=4, F=9, absent=True).arguments(device_of(impl), torch.float32)

    def strided(t: Any) -> Any:
        if not isinstance(t, Tensor):
            return t
        return torch.stack([t, t], -1)[..., 0] if t.dim() == 1 else t.transpose(0, -1).contiguous().transpose(0, -1)

    def run(arguments: Arguments, broadcast: bool) -> list[Tensor]:
        leaves = [t.requires_grad_() for t in arguments if isinstance(t, Tensor) and t.is_floating_point()]
        with fastseq.use_backend(impl.name):
            outputs = decode(arguments)
            sent = [torch.ones_like(t[:1, :1, :1]).expand_as(t) if broadcast else strided(t) for t in outputs[:3]]
            return [*outputs[:4], *torch.autograd.grad(outputs[:3], leaves, [t.detach() for t in sent])]

    changed = Arguments(*(strided(t) for t in arguments))
    assert not changed.keys.is_contiguous() and not changed.v.is_contiguous()
    for broadcast in (True, False):
        torch.testing.assert_close(run(changed, broadcast), run(arguments, broadcast))


# Without lengths: past them a tape holds what was in its memory before, in two runs two things.
@pytest.mark.parametrize(
    "case",
    [
        Case(3, 2, 4, 5, 6, A=3, absent=True),
        Case(3, 2, 4, 5, 6, F=7, cell="lstm"),
        Case(2, 2, 4, 5, 6, A=3, F=2, cell="rnn", bias=False),
    ],
    ids=name_of,
)
def test_opcheck(case: Case) -> None:
    plain = case.arguments("cpu", torch.float32)
    arguments, _ = leaves_of(plain)
    torch.library.opcheck(torch.ops.fastseq.attention_decoder.default, (*arguments, True))
    outputs = Outputs(*reference.forward(*plain, True))
    torch.library.opcheck(
        torch.ops.fastseq.attention_decoder_backward.default,
        (*grads_like(outputs), *plain, *outputs.saved(), needs_all(plain)),
    )


@each_implementation
def test_half_precision_is_no_worse_than_rounding(impl: Impl) -> None:
    dtype = torch.bfloat16
    require(TABLE, impl, device_of(impl), dtype)
    arguments = Case(5, 3, 7, 16, 8, A=6).arguments(device_of(impl), dtype)
    exact = Outputs(*reference.forward(*widened(arguments), False))
    with fastseq.use_backend(impl.name):
        outputs = decode(arguments)
    for got, want in zip(outputs[:4], exact[:4], strict=True):
        assert got.dtype == dtype
        torch.testing.assert_close(got.double(), want, rtol=0, atol=8 * torch.finfo(dtype).eps)


@each_kernel
def test_repeated_runs_are_bit_equal(impl: Impl, threads: int) -> None:
    require(TABLE, impl, device_of(impl), torch.float32)
    arguments = Case(20, 9, 33, 40, 24, A=30, F=16, absent=True, lengths=True).arguments(device_of(impl), torch.float32)
    first = impl.kernel.forward(*arguments, False)
    for _ in range(5):
        for got, want in zip(impl.kernel.forward(*arguments, False), first, strict=True):
            assert torch.equal(got, want)


BAD_ARGUMENTS = [
    (lambda a: dict(gates=a.gates[0]), r"gates must be \[T, B, G\*H\], got \[3, 24\]"),
    (lambda a: dict(gates=a.gates[:0]), "gates must have at least one step, got T=0"),
    (lambda a: dict(gates=a.gates[..., :-1]), r"gates must be \[4, 3, 24\], got \[4, 3, 23\]"),
    (lambda a: dict(gates=a.gates.int()), "gates must be floating, got torch.int32"),
    (lambda a: dict(h0=a.h0[:1]), r"h0 must be \[3, 6\], got \[1, 6\]"),
    (lambda a: dict(h0=a.h0[0]), r"h0 must be \[B, H\], got \[6\]"),
    (lambda a: dict(h0=a.h0.double()), "h0 must be torch.float32 on cpu like gates, got torch.float64"),
    (lambda a: dict(c0=None), "c0 must be given if and only if an LSTM has it"),
    (lambda a: dict(c0=a.c0[:, :2]), r"c0 must be \[3, 6\], got \[3, 2\]"),
    (lambda a: dict(feed0=None), "feed0 must be given if and only if w_out is"),
    (lambda a: dict(feed0=a.feed0[:2]), r"feed0 must be \[3, 9\], got \[2, 9\]"),
    (lambda a: dict(keys=a.keys[:, :0]), "keys must have at least one place, got S=0"),
    (lambda a: dict(keys=a.keys[..., 0]), r"keys must be \[B, S, A\], got \[3, 5\]"),
    (lambda a: dict(keys=a.keys.tolist()), "keys must be a dense tensor, got list"),
    (lambda a: dict(keys=a.keys.to_sparse()), "keys must be a dense tensor, got torch.sparse_coo"),
    (lambda a: dict(values=a.values[:, :-1]), r"values must be \[3, 5, 7\], got \[3, 4, 7\]"),
    (lambda a: dict(values=a.values[..., :0]), "H, A, M and F must be at least 1, got 6, 4, 0 and 9"),
    (lambda a: dict(absent=a.absent[:, :3]), r"absent must be torch.bool \[3, 5\] on cpu like gates"),
    (lambda a: dict(absent=a.absent.float()), r"absent must be torch.bool .* got torch.float32 \[3, 5\]"),
    (lambda a: dict(lengths=torch.tensor([1, 2])), r"lengths must be int64 \[3\] on the CPU, got torch.int64 \[2\]"),
    (lambda a: dict(lengths=torch.tensor([1.0, 2, 3])), "lengths must be int64"),
    (lambda a: dict(lengths=torch.tensor([1, 2, 5])), "lengths must be between 0 and T=4, got 1 to 5"),
    (lambda a: dict(lengths=torch.tensor([1, -2, 3])), "lengths must be between 0 and T=4, got -2 to 3"),
    (lambda a: dict(w_feed=a.w_feed[:, :-1]), r"w_feed must be \[24, 9\], got \[24, 8\]"),
    (lambda a: dict(w_hh=a.w_hh.t()), r"w_hh must be \[24, 6\], got \[6, 24\]"),
    (lambda a: dict(b_hh=a.b_hh[:1]), r"b_hh must be \[24\], got \[1\]"),
    (lambda a: dict(w_query=a.w_query[:2]), r"w_query must be \[4, 6\], got \[2, 6\]"),
    (lambda a: dict(w_query=None), "v must be given if and only if w_query is"),
    (lambda a: dict(v=None), "v must be given if and only if w_query is"),
    (lambda a: dict(w_query=None, v=None), r"keys must be \[3, 5, 6\], got \[3, 5, 4\]"),
    (lambda a: dict(v=a.v[:3]), r"v must be \[4\], got \[3\]"),
    (lambda a: dict(w_out=a.w_out[:, 1:]), r"w_out must be \[9, 13\], got \[9, 12\]"),
    (lambda a: dict(cell="tree"), "cell must be one of lstm, gru, rnn, got 'tree'"),
]


@pytest.mark.parametrize(("change", "message"), BAD_ARGUMENTS)
def test_bad_arguments_name_the_argument(change: Any, message: str) -> None:
    arguments = Case(4, 3, 5, 6, 7, A=4, F=9, cell="lstm", absent=True).arguments("cpu", torch.float32)
    given = {**arguments._asdict(), "cell": "lstm"}
    torch.testing.assert_close(attention_decoder(**given), decode(arguments)[:5])
    with pytest.raises((ValueError, TypeError), match=message):
        attention_decoder(**{**given, **change(arguments)})


@pytest.mark.parametrize("impl", [impl for impl in KERNELS if impl.is_native], ids=name_of)
def test_the_extension_checks_for_itself(impl: Impl) -> None:
    require(TABLE, impl, "cpu", torch.float32)
    arguments = Case(4, 3, 5, 6, 7, A=4, F=9, cell="lstm", absent=True).arguments("cpu", torch.float32)
    for change, _ in BAD_ARGUMENTS:
        changed = arguments._replace(**change(arguments))
        if isinstance(changed.cell, str) or not isinstance(changed.keys, Tensor) or changed.keys.is_sparse:
            continue  # which no schema takes
        with pytest.raises(RuntimeError, match="attention_decoder: "):
            impl.kernel.forward(*changed, False)
    with pytest.raises(RuntimeError, match="attention_decoder: "):
        impl.kernel.forward(*arguments._replace(cell=3), False)
    with pytest.raises(RuntimeError, match="attention_decoder: "):
        impl.kernel.forward(*arguments._replace(cell=GRU), False)
