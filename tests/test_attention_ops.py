"""Attention: every implementation of the table on the op's own cases, the reference against torch and against plain
loops, and the public function.
"""

import itertools
import math
import sys
import threading
from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import assert_no_worse, device_of, name_of, require, require_native, threads_set, widest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses import FakeTensorMode
from torch.utils._pytree import tree_map_only

import fastseq
from fastseq import jit
from fastseq.functional import scaled_dot_product_attention as sdpa
from fastseq.ops.attention import (
    AVERAGE,
    CASES,
    EACH_HEAD,
    NO_WEIGHTS,
    TABLE,
    Arguments,
    Case,
    Outputs,
    attention,
    grads_like,
    rounding,
    widened,
)
from fastseq.reference import attention as reference
from fastseq.reference import dropout
from fastseq.registry import HALF, Impl

pytestmark = pytest.mark.usefixtures("one_thread")

KERNELS = [impl for impl in TABLE.impls if impl.name != "reference"]
DTYPES = [torch.float32, torch.float64]
# Each kernel with each dtype that it takes.
KINDS = [(impl, dtype) for impl in KERNELS for dtype in sorted(impl.dtypes, key=str)]


each_kernel = pytest.mark.parametrize("impl", KERNELS, ids=name_of)
each_implementation = pytest.mark.parametrize("impl", TABLE.impls, ids=name_of)
each_kind = pytest.mark.parametrize(("impl", "dtype"), KINDS, ids=name_of)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=name_of)


def modes_of(arguments: Arguments) -> list[int]:
    return [NO_WEIGHTS] if arguments.cu_seqlens_q is not None else [NO_WEIGHTS, EACH_HEAD, AVERAGE]


def needs_all(arguments: Arguments) -> list[bool]:
    return [True] * 3 + [arguments.mask is not None and arguments.mask.is_floating_point()]


def leaves_of(arguments: Arguments) -> list[Tensor]:
    """What gradients are asked for."""
    return [t.requires_grad_() for t, need in zip(arguments[:4], needs_all(arguments), strict=True) if need]


def normal(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, dtype=dtype)


def assert_outputs(got: Any, want: Any) -> None:
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours, theirs.to(ours.dtype), **rounding(theirs, ours.dtype, 2))


def assert_gradients(got: Any, want: Any) -> None:
    """Gradients are sums of up to N*H*L terms in another order: as exact as the size of the terms allows."""
    for ours, theirs in zip(got, want, strict=True):
        size = max(1.0, theirs.abs().max().item()) if theirs.numel() else 1.0
        single = ours.dtype == torch.float32
        tolerance = dict(rtol=1e-4, atol=2e-5 * size) if single else dict(rtol=1e-7, atol=1e-9 * size)
        torch.testing.assert_close(ours, theirs.to(ours.dtype), **(rounding(theirs, ours.dtype, 4) or tolerance))


def layout(t: Tensor) -> tuple:
    """What torch.compile holds a result to; strides of dimensions without extent mean nothing."""
    strides = [stride for stride, size in zip(t.stride(), t.shape, strict=True) if size > 1 and t.numel()]
    return t.dtype, t.shape, strides


def assert_as_promised(op: Callable, args: tuple, results: Any) -> None:
    with FakeTensorMode() as mode:
        promised = op(*tree_map_only(Tensor, mode.from_tensor, args))
    assert [layout(t) for t in results] == [layout(t) for t in promised]


@lru_cache(maxsize=4)
def expected(case: Case, device: str, dtype: torch.dtype) -> tuple[list[Outputs], list[Any], list[Tensor]]:
    """From the reference in float64: outputs in all modes, gradients sent to them, and gradients found."""
    wide = widened(case.arguments(device, dtype))
    outputs = [Outputs(*reference.forward(*wide, mode)) for mode in modes_of(wide)]
    sent = grads_like(outputs[0])
    return outputs, sent, list(reference.backward(*sent, *wide, *outputs[0][:2], needs_all(wide)))


@each_kind
@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_outputs_and_gradients(impl: Impl, dtype: torch.dtype, case: Case) -> None:
    device = device_of(impl)
    require(TABLE, impl, device, dtype)
    arguments = case.arguments(device, dtype)
    modes, needs = modes_of(arguments), needs_all(arguments)
    outputs, sent, grads = expected(case, device, dtype)
    single = torch.float32 if dtype in HALF else dtype
    sent = [g.to(kind) for g, kind in zip(sent, (dtype, single), strict=True)]

    def run(threads: int) -> tuple[list[Outputs], list[Tensor]]:
        with threads_set(threads):
            ours = [Outputs(*impl.kernel.forward(*arguments, mode)) for mode in modes]
            return ours, impl.kernel.backward(*sent, *arguments, *ours[0][:2], needs)

    ours, found = run(1)
    for got, want in zip(ours, outputs, strict=True):
        assert_outputs(got, want)
    assert_gradients(found, grads)
    for got, mode in zip(ours, modes, strict=True):
        assert_as_promised(torch.ops.fastseq.attention, (*arguments, mode), got)
    args = (*sent, *arguments, *ours[0][:2], needs)
    assert_as_promised(torch.ops.fastseq.attention_backward, args, found)
    # What the reference's forward leaves serves as well.
    tape = [t.to(kind) for t, kind in zip(outputs[0][:2], (dtype, single), strict=True)]
    assert_gradients(impl.kernel.backward(*sent, *arguments, *tape, needs), grads)
    for threads in (2, 2, 1) if impl.is_native else (1,):
        again, found_again = run(threads)
        assert all(map(torch.equal, itertools.chain(*again, found_again), itertools.chain(*ours, found)))


@each_implementation
@each_dtype
def test_self_check(impl: Impl, dtype: torch.dtype) -> None:
    require(TABLE, impl, device_of(impl), dtype)
    TABLE.self_check(impl.kernel, device_of(impl), dtype)


@pytest.mark.parametrize("wrong", [0, 1, 2])
def test_self_check_sees_what_is_wrong(wrong: int) -> None:
    class Kernel:
        def forward(*args: Any) -> Any:
            outputs = list(reference.forward(*args))
            outputs[wrong] = outputs[wrong] * 1.01
            return outputs

        backward = staticmethod(reference.backward)

    Kernel.forward = staticmethod(Kernel.forward)
    with pytest.raises(AssertionError):
        TABLE.self_check(Kernel, "cpu", torch.float64)


@each_implementation
@pytest.mark.parametrize(
    "case",
    [
        Case(2, 4, 33, 70, 24, Hk=2, mask="float hls", padding=True, right=0, bottom_right=True, dropout=0.2),
        Case(2, 3, 45, 131, 16, Ev=9, mask="float nhls", softcap=2.0),
        Case(1, 3, 60, 80, 12, varlen=True),
        Case(1, 1, 7, 200, 12, transposed=True),
    ],
    ids=name_of,
)
def test_only_needed_gradients(impl: Impl, case: Case) -> None:
    device = device_of(impl)
    dtype = widest(impl)
    require(TABLE, impl, device, dtype)
    arguments = case.arguments(device, dtype)
    outputs, sent, grads = expected(case, device, dtype)
    outputs, sent = [Outputs(*(t.to(dtype) for t in outputs[0]))], [g.to(dtype) for g in sent]
    backward = partial(_backward, impl, arguments, outputs[0])
    for wanted in range(4):
        needs = [k == wanted and need for k, need in enumerate(needs_all(arguments))]
        found = backward(sent, needs)
        assert_gradients([g for g, need in zip(found, needs, strict=True) if need], [grads[wanted]][: sum(needs)])
        assert not any(g.numel() for g, need in zip(found, needs, strict=True) if not need)
    for missing in range(2):  # counts as zeros
        some = [None if k == missing else g for k, g in enumerate(sent)]
        zeros = [torch.zeros_like(g) if k == missing else g for k, g in enumerate(sent)]
        assert_gradients(backward(some, needs_all(arguments)), backward(zeros, needs_all(arguments)))
        for wanted in range(3):  # lse depends on no value
            backward(some, [k == wanted for k in range(4)])


def _backward(impl: Impl, arguments: Arguments, outputs: Outputs, sent: list[Any], needs: list[bool]) -> Any:
    return impl.kernel.backward(*sent, *arguments, *outputs[:2], needs)


def in_steps(t: Tensor) -> Tensor:
    """The same values with gaps between them in memory."""
    return torch.stack([t, t], -1)[..., 0]


def backwards(t: Tensor) -> Tensor:
    """The same values with the dimensions in reverse order in memory."""
    order = tuple(reversed(range(t.dim())))
    return t.permute(order).contiguous().permute(order)


def repeated(t: Tensor) -> Tensor:
    """One row in the place of all, which are the same memory."""
    return t[:1, :1, :1].expand(t.shape) if t.dim() == 4 else t


@each_implementation
@pytest.mark.parametrize("change", [in_steps, backwards, repeated])
@pytest.mark.parametrize(
    "case",
    [
        Case(2, 4, 33, 70, 24, Hk=2, mask="float nhls", padding=True, slopes=True),
        Case(2, 2, 20, 140, 8, Ev=5, mask="bool nls"),
        Case(1, 3, 60, 80, 12, varlen=True),
    ],
    ids=name_of,
)
def test_any_strides(impl: Impl, change: Callable, case: Case) -> None:
    device = device_of(impl)
    require(TABLE, impl, device, torch.float32)
    arguments = case.arguments(device, torch.float32)
    changed = Arguments(
        *(changed if isinstance(t, Tensor) and (changed := change(t)) is not None else t for t in arguments)
    )
    plain = Arguments(*(t.contiguous() if isinstance(t, Tensor) else t for t in changed))
    sent = [g.float() for g in expected(case, device, torch.float32)[1]]
    results = []
    for inputs, grads in ((changed, map(backwards, sent)), (plain, sent)):
        out, lse, _ = impl.kernel.forward(*inputs, NO_WEIGHTS)
        results.append([out, lse, *impl.kernel.backward(*grads, *inputs, out, lse, needs_all(inputs))])
    torch.testing.assert_close(*results)


TORCH_CASES = [
    Case(2, 3, 5, 7, 4, Ev=6),
    Case(2, 3, 6, 6, 4, right=0),
    Case(2, 3, 5, 7, 4, right=0),
    Case(2, 4, 5, 7, 4, Hk=2, mask="bool nhls"),
    Case(2, 4, 5, 7, 4, Hk=1, mask="float hs"),
    Case(2, 4, 5, 7, 4, mask="bool ls", transposed=True),
    Case(2, 3, 5, 7, 4, mask="float nhls"),
]


@pytest.mark.parametrize("case", TORCH_CASES, ids=name_of)
def test_reference_is_torchs(case: Case) -> None:
    arguments = case.arguments("cpu", torch.float64)
    query, key, value, mask, *_ = arguments
    leaves = leaves_of(arguments)
    options = dict(is_causal=case.right == 0, scale=arguments.scale, enable_gqa=case.Hk > 0)
    theirs = F.scaled_dot_product_attention(query, key, value, mask, **options)
    out, lse, _ = reference.forward(*arguments, NO_WEIGHTS)
    dout = torch.randn_like(out)
    torch.testing.assert_close(out, theirs)
    want = torch.autograd.grad(theirs, leaves, dout)
    torch.testing.assert_close(torch.autograd.grad(out, leaves, dout), want)
    found = reference.backward(dout, None, *arguments, out, lse, needs_all(arguments))
    torch.testing.assert_close([g for g, need in zip(found, needs_all(arguments), strict=True) if need], list(want))


def by_loops(arguments: Arguments) -> tuple[Tensor, Tensor, Tensor]:
    """The formulas in the reference's docstring, one query and one key after the other."""
    query, key, value, mask, padding, slopes, *_, seed, scale, softcap, p, left, right, bottom_right = arguments
    N, H, L, S = *query.shape[:3], key.shape[2]
    group = H // key.shape[1]
    offset = S - L if bottom_right else 0
    keep = None if seed is None else dropout.keep(seed, (N, H, L, S), p, query.device)
    out = query.new_zeros(N, H, L, value.shape[3])
    lse, weights = query.new_full((N, H, L), -math.inf), query.new_zeros(N, H, L, S)
    for n, h, l in itertools.product(range(N), range(H), range(L)):
        scores = {}
        for s in range(S):
            here = l + offset
            added = True if mask is None else mask.expand(N, H, L, S)[n, h, l, s].item()
            if added is False or added == -math.inf or (padding is not None and padding[n, s]):
                continue
            if (left >= 0 and s < here - left) or (right >= 0 and s > here + right):
                continue
            pairs = zip(query[n, h, l].tolist(), key[n, h // group, s].tolist(), strict=True)
            score = scale * sum(a * b for a, b in pairs)
            if softcap:
                score = softcap * math.tanh(score / softcap)
            if slopes is not None:
                score -= slopes[h].item() * abs(here - s)
            scores[s] = score if added is True else score + added
        if not scores:
            continue
        lse[n, h, l] = math.log(sum(math.exp(score) for score in scores.values()))
        for s, score in scores.items():
            weights[n, h, l, s] = math.exp(score - lse[n, h, l]) * (1 if keep is None else keep[n, h, l, s])
            out[n, h, l] += weights[n, h, l, s] * value[n, h // group, s]
    return out, lse, weights


@pytest.mark.parametrize(
    "case",
    [
        Case(1, 2, 4, 6, 3, slopes=True),
        Case(1, 2, 4, 6, 3, slopes=True, bottom_right=True),
        Case(1, 2, 6, 4, 3, slopes=True, bottom_right=True, right=0),
        Case(1, 1, 6, 6, 3, left=2, right=1),
        Case(1, 1, 5, 7, 3, left=0),
        Case(1, 1, 5, 7, 3, left=1, right=0, bottom_right=True),
        Case(1, 1, 7, 4, 3, left=1, right=2, bottom_right=True),
        Case(1, 2, 4, 5, 3, softcap=0.7),
        Case(2, 4, 3, 5, 2, Ev=3, Hk=2, padding=True, softcap=1.1, slopes=True, mask="float nhls", left=2),
        Case(2, 2, 4, 5, 2, padding=True, mask="bool nl", right=1, dropout=0.4),
        Case(2, 2, 4, 5, 2, mask="bool hs", dropout=0.4, slopes=True),
    ],
    ids=name_of,
)
def test_reference_is_what_loops_give(case: Case) -> None:
    arguments = case.arguments("cpu", torch.float64)
    if case.mask.startswith("float"):
        arguments.mask[arguments.mask < -1] = -math.inf
    torch.testing.assert_close(reference.forward(*arguments, EACH_HEAD), by_loops(arguments))


def philox(counter: tuple[int, ...], key: tuple[int, int]) -> tuple[int, ...]:
    """Philox4x32-7 as its authors write it down (Salmon et al. 2011), in plain integers."""
    for _ in range(7):
        (high0, low0), (high1, low1) = (
            divmod(m * c, 2**32) for m, c in ((0xD2511F53, counter[0]), (0xCD9E8D57, counter[2]))
        )
        counter = (high1 ^ counter[1] ^ key[0], low1, high0 ^ counter[3] ^ key[1], low0)
        key = ((key[0] + 0x9E3779B9) % 2**32, (key[1] + 0xBB67AE85) % 2**32)
    return counter


def test_dropout_draws_from_philox() -> None:
    # The authors' known answers, from Random123's kat_vectors.
    ones, pi = 2**32 - 1, (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)
    assert philox((0,) * 4, (0, 0)) == (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48)
    assert philox((ones,) * 4, (ones, ones)) == (0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662)
    assert philox(pi, (0xA4093822, 0x299F31D0)) == (0x4DFCCABA, 0x190A87F0, 0xC47362BA, 0xB6B5242A)
    N, H, L, S, p = 2, 3, 4, 300, 0.37
    seed, device = 0x7EDCBA9876543210, torch.device("cpu")
    key = (seed % 2**32, seed >> 32)
    kept = dropout.keep(torch.tensor(seed), (N, H, L, S), p, device).tolist()
    dropped = round(p * 65536)
    for n, h, l, s in itertools.product(range(N), range(H), range(L), range(S)):
        words = philox((16 * (s // 128) + s % 16, l, n * H + h, 0), key)
        half = s // 16 % 8
        drawn = words[half // 2] >> 16 * (half % 2) & 0xFFFF
        assert kept[n][h][l][s] == (65536 / (65536 - dropped) if drawn >= dropped else 0)
    # At the very number, which is seldom drawn.
    drawn = philox((0,) * 4, key)[0] & 0xFFFF
    for dropped, remains in ((drawn, True), (drawn + 1, False)):
        assert dropout.keep(torch.tensor(seed), (1, 1, 1, 1), dropped / 65536, device).bool().item() == remains


@each_implementation
@each_dtype
@pytest.mark.parametrize("p", [0.1, 0.5, 1.0])
def test_dropout_drops_what_keep_says(impl: Impl, dtype: torch.dtype, p: float) -> None:
    device = device_of(impl)
    require(TABLE, impl, device, dtype)
    S = 150
    arguments = Case(2, 4, 21, S, 8, Hk=2, dropout=p).arguments(device, dtype)
    arguments = arguments._replace(value=torch.eye(S, dtype=dtype, device=device).expand(2, 2, S, S))
    weights = impl.kernel.forward(*arguments._replace(dropout_p=0.0), EACH_HEAD)[2]
    out, _, dropped = impl.kernel.forward(*arguments, EACH_HEAD)
    keep = dropout.keep(arguments.seed, (2, 4, 21, S), p, device).to(dtype)
    torch.testing.assert_close(out / weights, keep)
    torch.testing.assert_close(dropped / weights, keep)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_dropout_is_random(p: float) -> None:
    query = torch.zeros(4, 5, 100, 3)
    draw = partial(sdpa, query, query, torch.eye(100).expand(4, 5, 100, 100), dropout_p=p)
    torch.manual_seed(1)
    first, second = draw(), draw()
    torch.manual_seed(1)
    with torch.device("meta"):  # whose generator is not asked
        assert torch.equal(draw(), first) and not torch.equal(first, second)
    dropped = (first == 0).double()
    deviation = math.sqrt(p * (1 - p))
    assert abs(dropped.mean() - p) < 5 * deviation / math.sqrt(dropped.numel())
    # Nothing repeats: in no direction do neighbours have anything to do with each other.
    for dim in range(4):
        one, other = (dropped.narrow(dim, start, dropped.shape[dim] - 1) - p for start in (0, 1))
        assert (one * other).mean().abs() < 5 * deviation**2 / math.sqrt(one.numel())
    assert ((dropped - p) * ((second == 0).double() - p)).mean().abs() < 5 * deviation**2 / math.sqrt(dropped.numel())


BAD = 100  # the key that is left out, of 150


def left_out(way: str, L: int, device: str, Ev: int = 9) -> Arguments:
    """Arguments in which no query, or with L = 150 some queries, see the bad key."""
    arguments = Case(2, 4, L, 150, 16, Ev=Ev, Hk=2).arguments(device, torch.float32)
    places = (torch.arange(150, device=device) == BAD).view(1, -1)
    if L == 150:
        places = places & (torch.arange(L, device=device) % 3 > 0).unsqueeze(-1)
    added = torch.zeros(places.shape, device=device).masked_fill(places, -math.inf)
    ends = [0, 8, L] if L == 150 else [0, L, L]
    if way == "varlen":
        query, key, value = (t[:1] for t in arguments[:3])
        arguments = arguments._replace(query=query, key=key, value=value)
    changes: dict[str, dict] = {
        "padding": dict(key_padding=places.expand(2, -1)) if L < 150 else {},
        "causal": dict(right=0),
        "window": dict(left=30, right=5),
        "decoding": dict(left=20, right=0, bottom_right=True),
        "varlen": dict(cu_seqlens_q=torch.tensor(ends), cu_seqlens_k=torch.tensor([0, 90, 150])),
        "bool": dict(mask=~places.expand(1, 1, -1, -1)),
        "bool of each": dict(mask=~places.expand(2, 4, L, -1)),
        "added": dict(mask=added.expand(1, 1, -1, -1)),
        "added to each": dict(mask=added.expand(2, 4, L, -1).contiguous(), softcap=2.0),
    }
    return arguments._replace(**changes[way])


WAYS = ["padding", "causal", "window", "decoding", "varlen", "bool", "bool of each", "added", "added to each"]


@each_implementation
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("Ev", [9, 64])  # values that are packed, and that can be read where they are
def test_what_no_query_sees_has_no_effect(impl: Impl, way: str, bad: float, Ev: int) -> None:
    device = device_of(impl)
    require(TABLE, impl, device, torch.float32)
    results = []
    for content in (0.0, bad):
        arguments = left_out(way, 20, device, Ev)
        arguments.key[:, :, BAD] = content
        arguments.value[:, :, BAD] = content
        outputs = Outputs(*impl.kernel.forward(*arguments, NO_WEIGHTS))
        found = impl.kernel.backward(*grads_like(outputs), *arguments, *outputs[:2], needs_all(arguments))
        results.append([*outputs, *found])
    # Triton's kernel computes rows anew that meet such a value, and rounds otherwise then.
    torch.testing.assert_close(*results, **({} if impl.runtime is jit.TRITON else dict(rtol=0, atol=0)))
    dkey, dvalue = results[0][4:6]
    assert not dkey[:, :, BAD].any() and not dvalue[:, :, BAD].any()


@each_implementation
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_later_values_have_no_effect_on_earlier_queries(impl: Impl, bad: float) -> None:
    device = device_of(impl)
    require(TABLE, impl, device, torch.float32)
    arguments = Case(2, 2, 90, 90, 32, Ev=64, right=0).arguments(device, torch.float32)
    clean = impl.kernel.forward(*arguments, NO_WEIGHTS)[0]
    arguments.value[:, :, 50:, ::3] = bad
    out = impl.kernel.forward(*arguments, NO_WEIGHTS)[0]
    torch.testing.assert_close(out[:, :, :50], clean[:, :, :50])
    torch.testing.assert_close(out[:, :, 50:, 1::3], clean[:, :, 50:, 1::3])
    assert not out[:, :, 50:, ::3].isfinite().any()


@each_implementation
@pytest.mark.parametrize("way", WAYS[1:])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_some_queries_see_has_no_effect_on_others(impl: Impl, way: str, bad: float) -> None:
    device = device_of(impl)
    require(TABLE, impl, device, torch.float32)
    arguments = left_out(way, 150, device)
    clean, clean_lse, _ = impl.kernel.forward(*arguments, NO_WEIGHTS)
    only = torch.zeros_like(arguments.value)
    only[:, :, BAD] = 1
    seen = reference.forward(*arguments._replace(value=only), NO_WEIGHTS)[0][..., :1] > 0
    assert seen.any() and not seen.all()

    value = arguments.value.clone()
    value[:, :, BAD, 3] = bad
    out, lse, _ = impl.kernel.forward(*arguments._replace(value=value), NO_WEIGHTS)
    spoilt = seen & (torch.arange(9, device=device) == 3)
    assert torch.equal(~out.isfinite(), spoilt)
    torch.testing.assert_close([out[~spoilt], lse], [clean[~spoilt], clean_lse])

    # An infinite key has a score of either infinity. It is NaN that always takes what sees it along.
    key = arguments.key.clone()
    key[:, :, BAD, 3] = bad
    out, lse, _ = impl.kernel.forward(*arguments._replace(key=key), NO_WEIGHTS)
    if math.isnan(bad):
        assert torch.equal(out.isnan(), seen.expand_as(out)) and torch.equal(lse.isnan(), seen.squeeze(-1))
    others = ~seen.expand_as(out)
    torch.testing.assert_close([out[others], lse[others[..., 0]]], [clean[others], clean_lse[others[..., 0]]])

    query = arguments.query.clone()
    query[:, :, 5] = bad
    out, lse, _ = impl.kernel.forward(*arguments._replace(query=query), NO_WEIGHTS)
    assert out[:, :, 5].isnan().all() and lse[:, :, 5].isnan().all()
    others = torch.arange(150, device=device) != 5
    torch.testing.assert_close([out[:, :, others], lse[:, :, others]], [clean[:, :, others], clean_lse[:, :, others]])


def blind(way: str, device: str, dtype: torch.dtype) -> tuple[Arguments, Tensor]:
    """Arguments, and which rows [N, L] see no key."""
    arguments = Case(2, 2, 40, 30, 8, Ev=5).arguments(device, dtype)
    first = (torch.arange(40, device=device) < 11).view(-1, 1)
    row = torch.ones(2, 1, dtype=torch.bool, device=device) & first.view(1, -1)
    if way == "bool":
        return arguments._replace(mask=~first.expand(1, 1, -1, 30)), row
    if way == "bool of rows":
        return arguments._replace(mask=~first.view(1, 1, -1, 1)), row
    if way == "added":
        mask = torch.randn(2, 2, 40, 30, device=device, dtype=dtype).masked_fill(first, -math.inf)
        return arguments._replace(mask=mask), row
    if way == "added to rows":
        mask = torch.zeros(1, 1, 40, 1, device=device, dtype=dtype).masked_fill(first, -math.inf)
        return arguments._replace(mask=mask), row
    if way == "bounds":  # the first query's own place is 10 before the first key
        return arguments._replace(right=-1 + 1, left=7, bottom_right=True), row & (torch.arange(40, device=device) < 10)
    if way == "padding":
        row = torch.tensor([[False], [True]], device=device)
        return arguments._replace(key_padding=row.expand(2, 30)), row.expand(2, 40)
    query, key, value = (t[:1] for t in arguments[:3])
    ends = dict(cu_seqlens_q=torch.tensor([0, 11, 40]), cu_seqlens_k=torch.tensor([0, 0, 30]))
    return arguments._replace(query=query, key=key, value=value, **ends), row[:1]


@each_implementation
@pytest.mark.parametrize("way", ["bool", "bool of rows", "added", "added to rows", "bounds", "padding", "varlen"])
def test_who_sees_nothing_gets_nothing(impl: Impl, way: str) -> None:
    device = device_of(impl)
    require(TABLE, impl, device, widest(impl))
    arguments, rows = blind(way, device, widest(impl))
    rows = rows.unsqueeze(1).expand(arguments.query.shape[:3])
    leaves = leaves_of(arguments)
    with fastseq.use_backend(impl.name):
        for mode in modes_of(arguments):
            outputs = attention(arguments, mode)
            assert torch.equal(outputs.lse == -math.inf, rows)
            assert not outputs.out[rows].any() and outputs.out[~rows].all()
            if mode == EACH_HEAD:
                assert not outputs.weights[rows].any()
            want = reference.forward(*arguments, mode)
            assert_outputs(outputs, want)
            # Also of a loss that looks at the rows that see nothing, and when a graph of the gradients is asked for.
            sent = grads_like(outputs)
            for create_graph in (False, True):
                grads = torch.autograd.grad(outputs[:2], leaves, sent, create_graph=create_graph, retain_graph=True)
                assert all(g.isfinite().all() for g in grads)
                assert not grads[0][rows].any() and grads[0][~rows].all()
                assert_gradients(grads, torch.autograd.grad(want[:2], leaves, sent, retain_graph=True))
            if len(leaves) == 4:
                assert not grads[3].expand(2, 2, 40, 30)[rows].any()


GRADCHECK_CASES = [
    Case(1, 2, 3, 4, 3, Ev=2),
    Case(1, 2, 4, 3, 3, right=0, bottom_right=True),
    Case(2, 4, 3, 3, 2, Hk=2, mask="float nhls", dropout=0.3, transposed=True),
    Case(1, 2, 3, 4, 3, mask="float h", padding=True, softcap=0.8, slopes=True),
    Case(1, 2, 3, 4, 3, mask="bool ls", left=2, right=1, softcap=0.8, dropout=0.3),
    Case(1, 2, 9, 8, 3, varlen=True, dropout=0.3),
]


def differentiable(case: Case, device: str, mode: int) -> tuple[Callable[..., tuple[Tensor, ...]], list[Tensor]]:
    arguments = case.arguments(device, torch.float64)

    def call(*leaves: Tensor) -> tuple[Tensor, ...]:
        mask = leaves[3] if len(leaves) == 4 else arguments.mask
        out, lse, weights = attention(Arguments(*leaves[:3], mask, *arguments[4:]), mode)
        return (out, lse.masked_fill(lse == -math.inf, 0.0), *([weights] if mode else []))

    return call, leaves_of(arguments)


@each_implementation
@pytest.mark.parametrize("case", GRADCHECK_CASES, ids=name_of)
def test_gradcheck(impl: Impl, case: Case) -> None:
    require(TABLE, impl, device_of(impl), torch.float64)
    for mode in [NO_WEIGHTS] if case.varlen else [NO_WEIGHTS, AVERAGE]:
        with fastseq.use_backend(impl.name):
            # One random direction instead of every element: the cases are many.
            assert torch.autograd.gradcheck(*differentiable(case, device_of(impl), mode), fast_mode=True)
            assert torch.autograd.gradgradcheck(*differentiable(case, device_of(impl), mode), fast_mode=True)


@pytest.mark.parametrize("case", [GRADCHECK_CASES[1], GRADCHECK_CASES[3], GRADCHECK_CASES[5]], ids=name_of)
def test_forward_mode_and_batched_gradients(case: Case) -> None:
    checks = dict(check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradcheck(*differentiable(case, "cpu", NO_WEIGHTS), **checks)


def test_double_backward_where_one_input_depends_on_another() -> None:
    x = normal(1, 2, 5, 4).requires_grad_()

    def chained() -> Tensor:
        y = x
        for _ in range(3):  # all three are made from the same
            y = sdpa(y, torch.tanh(y), y, is_causal=True)
        return y.square().sum()

    once = torch.autograd.grad(chained(), x)[0]
    torch.testing.assert_close(torch.autograd.grad(chained(), x, create_graph=True)[0], once)


def test_transforms_of_torch_func() -> None:
    query, key, value = normal(3, 2, 4, 5), normal(3, 2, 6, 5), normal(3, 2, 6, 5)
    vmap, F_sdpa = torch.func.vmap, F.scaled_dot_product_attention
    causal = partial(sdpa, is_causal=True, window_size=(3, 3))
    torch.testing.assert_close(vmap(causal)(query, key, value), causal(query, key, value))
    torch.testing.assert_close(vmap(sdpa, (0, None, None))(query, key[0], value[0]), sdpa(query, key[:1], value[:1]))
    for transform in (torch.func.jacrev, torch.func.jacfwd):
        got = transform(sdpa, (0, 1, 2))(query[0], key[0], value[0])
        want = torch.autograd.functional.jacobian(F_sdpa, (query[0], key[0], value[0]))
        torch.testing.assert_close(got, want)
    per_sample = vmap(torch.func.grad(lambda *args: sdpa(*args).square().sum(), (0, 1, 2)))(query, key, value)
    leaves = [t.requires_grad_() for t in (query, key, value)]
    want = torch.autograd.grad(F_sdpa(*leaves).square().sum(), leaves)
    torch.testing.assert_close(per_sample, want)


def test_dropout_under_vmap() -> None:
    query = torch.zeros(3, 2, 40, 5)
    draw = partial(sdpa, dropout_p=0.5)
    with pytest.raises(RuntimeError, match="randomness"):
        torch.func.vmap(draw)(query, query, query + 1)
    one, other, _ = torch.func.vmap(draw, randomness="same")(query, query, query + 1)
    assert torch.equal(one, other)
    one, other, _ = torch.func.vmap(draw, randomness="different")(query, query, query + 1)
    assert not torch.equal(one, other)


OPCHECK_CASES = [
    Case(2, 3, 5, 7, 4, Ev=6, transposed=True),
    Case(2, 4, 5, 7, 4, Hk=2, mask="float hls", padding=True, slopes=True, dropout=0.4, right=1, softcap=2.0),
    Case(1, 2, 20, 17, 4, varlen=True, transposed=True),
]


@pytest.mark.parametrize("case", OPCHECK_CASES, ids=name_of)
def test_opcheck(case: Case) -> None:
    arguments = case.arguments("cpu", torch.float64)
    op, backward = torch.ops.fastseq.attention.default, torch.ops.fastseq.attention_backward.default
    for mode in modes_of(arguments)[1:]:  # gradients of weights come from the reference, whose many ops are torch's
        torch.library.opcheck(op, (*arguments, mode))
    outputs = Outputs(*reference.forward(*arguments, NO_WEIGHTS))
    args = (*grads_like(outputs), *arguments, *outputs[:2], needs_all(arguments))
    torch.library.opcheck(backward, args)
    leaves_of(arguments)
    torch.library.opcheck(op, (*arguments, NO_WEIGHTS))


# Options of a call, and which mask it has.
OPTIONS: dict[str, tuple[dict, str]] = {
    "plain": ({}, ""),
    "causal": (dict(is_causal=True), "float"),
    "window": (dict(window_size=(3, 1), bottom_right=True, softcap=2.0, alibi_slopes=torch.tensor([0.5, 0.1])), ""),
    "dropout": (dict(dropout_p=0.4, return_lse=True), "bool"),
    "weights": (dict(return_weights=True, average_weights=True, scale=0.3), "float"),
}
each_option = pytest.mark.parametrize("name", OPTIONS)


def dynamic_inputs(name: str, N: int, L: int, S: int) -> list[Tensor]:
    """Query, key, value, and a mask, with gradients, but for those of weights: the reference gives them."""
    kind = OPTIONS[name][1]
    inputs = [normal(N, 2, length, 8) for length in (L, S, S)]
    inputs += [normal(N, 1, L, S)] if kind == "float" else [torch.rand(N, 1, L, S) > 0.3] if kind else []
    return [t.requires_grad_(name != "weights" and t.is_floating_point()) for t in inputs]


def listed(results: Any) -> list[Tensor]:
    return [results] if isinstance(results, Tensor) else list(results)


@each_option
def test_dynamic_sizes_compile_once(name: str) -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    call = partial(sdpa, **OPTIONS[name][0])
    compiled = torch.compile(lambda *args: call(*args), fullgraph=True, dynamic=True, backend=counter)
    counts = []
    for N, L, S in ((3, 6, 9), (3, 11, 12), (2, 17, 17), (5, 4, 30)):
        inputs = dynamic_inputs(name, N, L, S)
        leaves = [t for t in inputs if t.requires_grad]
        results = []
        for function in (compiled, call):
            torch.manual_seed(0)
            outputs = listed(function(*inputs))
            sent = [torch.ones_like(o) for o in outputs]
            results.append([*outputs, *(torch.autograd.grad(outputs, leaves, sent) if leaves else ())])
        torch.testing.assert_close(*results)
        counts.append(counter.frame_count)
    assert counts == counts[:1] * 4


def test_cu_seqlens_compile() -> None:
    torch._dynamo.reset()
    call = partial(sdpa, is_causal=True)
    compiled = torch.compile(
        lambda *args, **kwargs: call(*args, **kwargs), fullgraph=True, dynamic=True, backend="aot_eager"
    )
    for ends in ([0, 4, 9], [0, 0, 13]):
        query = normal(2, ends[-1], 8)
        cu_seqlens = torch.tensor(ends, dtype=torch.int32)
        torch.testing.assert_close(
            compiled(query, query, query, cu_seqlens_q=cu_seqlens), call(query, query, query, cu_seqlens_q=cu_seqlens)
        )


def test_compiles_with_inductor() -> None:
    torch._dynamo.reset()
    leaves = [torch.randn(2, 3, 7, 2, 8).unbind(1)[i].transpose(1, 2).requires_grad_() for i in range(3)]
    call = partial(sdpa, is_causal=True)
    want, got = call(*leaves), torch.compile(lambda *args: call(*args), fullgraph=True)(*leaves)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(torch.autograd.grad(got.sum(), leaves), torch.autograd.grad(want.sum(), leaves))


@pytest.mark.parametrize(("name", "strict"), [("dropout", False), ("causal", True), ("window", False)])
def test_export_with_dynamic_length(name: str, strict: bool) -> None:
    class Model(torch.nn.Module):
        def forward(self, *inputs: Tensor) -> list[Tensor]:
            return listed(sdpa(*inputs, **OPTIONS[name][0]))

    L, S = torch.export.Dim("L", min=2, max=500), torch.export.Dim("S", min=2, max=500)
    inputs = dynamic_inputs(name, 3, 7, 9)
    shapes = ({2: L}, {2: S}, {2: S}, {2: L, 3: S})[: len(inputs)]
    exported = torch.export.export(Model(), tuple(inputs), dynamic_shapes=(shapes,), strict=strict)
    for sizes in ((7, 9), (2, 40), (30, 3)):
        inputs = dynamic_inputs(name, 3, *sizes)
        torch.manual_seed(0)
        got = exported.module()(*inputs)
        torch.manual_seed(0)
        torch.testing.assert_close(got, Model()(*inputs))


@each_implementation
def test_changed_inputs_raise_in_backward(impl: Impl) -> None:
    require(TABLE, impl, "cpu", torch.float64)
    query, key, value = (normal(2, 5, 4).requires_grad_() for _ in range(3))
    mask = normal(5, 5).requires_grad_()
    with fastseq.use_backend(impl.name):
        for changed in range(4):
            inner = [t * 1 for t in (query, key, value, mask)]
            out = sdpa(*inner)
            with torch.no_grad():
                inner[changed].add_(1)
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                out.sum().backward()
        out = sdpa(query, key, value, mask)
        with torch.no_grad():
            out.add_(1)  # which backward reads as well
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            out.sum().backward()


SHAPES = [
    ((5, 4), (7, 4), (7, 6)),
    ((3, 5, 4), (3, 7, 4), (3, 7, 6)),
    ((2, 3, 5, 4), (2, 3, 7, 4), (2, 3, 7, 6)),
    ((2, 2, 3, 5, 4), (2, 2, 3, 7, 4), (2, 2, 3, 7, 6)),
    ((1, 3, 5, 4), (2, 3, 7, 4), (2, 1, 7, 6)),
    ((3, 5, 4), (2, 3, 7, 4), (2, 3, 7, 6)),
    ((2, 2, 3, 5, 4), (2, 3, 7, 4), (3, 7, 6)),
    ((2, 3, 1, 5, 4), (1, 3, 2, 7, 4), (2, 1, 1, 7, 6)),
    ((5, 4), (3, 7, 4), (3, 7, 6)),
    ((3, 5, 4), (7, 4), (7, 4)),
    ((2, 4, 5, 4), (2, 2, 7, 4), (2, 2, 7, 6)),
    ((2, 2, 6, 5, 4), (2, 2, 3, 7, 4), (2, 2, 3, 7, 6)),
    ((4, 5, 4), (2, 2, 7, 4), (2, 1, 7, 6)),
    ((0, 3, 5, 4), (0, 3, 7, 4), (0, 3, 7, 6)),
    ((2, 0, 5, 4), (2, 0, 7, 4), (2, 0, 7, 6)),
    ((2, 3, 0, 4), (2, 3, 7, 4), (2, 3, 7, 6)),
    ((2, 3, 5, 4), (2, 3, 0, 4), (2, 3, 0, 6)),
    ((2, 3, 5, 0), (2, 3, 7, 0), (2, 3, 7, 6)),
    ((2, 3, 5, 4), (2, 3, 7, 4), (2, 3, 7, 0)),
]


def some_masks(shape: tuple[int, ...]) -> Iterator[Tensor]:
    """Boolean ones and added ones of every rank, with every choice of the last three dimensions that are 1."""
    for rank in range(2, len(shape) + 1):
        for alike in itertools.product((False, True), repeat=min(rank, 3)):
            sizes = [*shape[-rank:-3], *(1 if a else n for a, n in zip(alike, shape[-min(rank, 3) :], strict=True))]
            yield normal(*sizes).requires_grad_()
            allowed = torch.rand(sizes) > 0.3
            allowed[..., 0] = True  # in a row without any key torch may give NaN
            yield allowed


def assert_torchs(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, **options: Any) -> None:
    """Results and gradients are those of torch's function."""
    leaves = [t for t in (query, key, value, mask) if t is not None and t.requires_grad]
    results = []
    for function in (sdpa, F.scaled_dot_product_attention):
        out = function(query, key, value, mask, **options)
        sent = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
        results.append([out, *torch.autograd.grad(out, leaves, sent)])
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("shapes", SHAPES, ids=str)
@pytest.mark.usefixtures("nothing_asked_for")
def test_all_shapes_that_torch_takes(shapes: tuple[tuple[int, ...], ...]) -> None:
    tensors = [normal(*shape).requires_grad_() for shape in shapes]
    gqa = dict(enable_gqa=True) if shapes[0][:-2] and shapes[1][:-2] and shapes[0][-3] > shapes[1][-3] > 1 else {}
    for options in ({}, dict(is_causal=True), dict(scale=0.3), dict(dropout_p=1.0)):
        assert_torchs(*tensors, **options, **gqa)
    if 0 in itertools.chain(*shapes):
        out, lse, weights = sdpa(*tensors, dropout_p=0.5, return_lse=True, return_weights=True)
        assert out.shape == (*shapes[0][:-1], shapes[2][-1]) and lse.shape == shapes[0][:-1]
        assert weights.shape == (*shapes[0][:-1], shapes[1][-2])
        return
    lead = list(torch.broadcast_shapes(*(shape[:-3] for shape in shapes)))
    heads = [max(shape[-3] for shape in shapes if len(shape) > 2)] if max(map(len, shapes)) > 2 else []
    for mask in some_masks((*lead, *heads, shapes[0][-2], shapes[1][-2])):
        assert_torchs(*tensors, mask, **gqa)


@pytest.mark.parametrize("change", [in_steps, backwards, repeated])
def test_views_of_anything(change: Callable) -> None:
    tensors = [normal(2, 3, length, 4) for length in (5, 7, 7)]
    mask, padding = normal(2, 1, 5, 7), torch.rand(2, 7) > 0.7
    results = []
    for view in (change, lambda t: change(t).contiguous()):
        leaves = [t.detach().requires_grad_() for t in (*tensors, mask)]
        out = sdpa(*map(view, leaves), key_padding_mask=view(padding))
        results.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
    torch.testing.assert_close(*results)


def test_heads_after_places_stay_there() -> None:
    """As projections leave them: out needs no copy to become [N, L, H * E]."""
    query = normal(2, 5, 3, 4).transpose(1, 2)
    assert sdpa(query, query, query).transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("lead", [(), (3,), (2, 3), (2, 2, 3)], ids=str)
def test_what_is_returned(lead: tuple[int, ...]) -> None:
    query, key, value = normal(*lead, 5, 4), normal(*lead, 7, 4), normal(*lead, 7, 6)
    scores = query @ key.transpose(-1, -2) / 2
    lse, weights = scores.logsumexp(-1), scores.softmax(-1)
    for return_lse, return_weights, average in itertools.product((False, True), repeat=3):
        if average and not return_weights:
            continue
        options = dict(return_lse=return_lse, return_weights=return_weights, average_weights=average)
        results = sdpa(query, key, value, **options)
        wanted = weights.mean(-3) if average and lead else weights
        want = [weights @ value, *([lse] if return_lse else []), *([wanted] if return_weights else [])]
        assert isinstance(results, Tensor if len(want) == 1 else tuple)
        torch.testing.assert_close(listed(results), want)


def test_gradients_of_lse_and_weights() -> None:
    leaves = [normal(2, 3, length, 4).requires_grad_() for length in (5, 7, 7)]
    query, key, value = leaves
    options = dict(return_lse=True, return_weights=True)
    scores = query @ key.transpose(-1, -2) / 2
    want = [scores.softmax(-1) @ value, scores.logsumexp(-1), scores.softmax(-1)]
    sent = [torch.randn_like(t) for t in want]
    for some in ([0], [1], [2], [0, 1], [1, 2], [0, 1, 2]):
        given = (leaves, [sent[k] for k in some], True)
        ours, theirs = ([outputs[k] for k in some] for outputs in (sdpa(*leaves, **options), want))
        grads = [torch.autograd.grad(o, *given, materialize_grads=True) for o in (ours, theirs)]
        torch.testing.assert_close(*grads)


def bounds(L: int, S: int, left: int, right: int, bottom_right: bool) -> Tensor:
    """[L, S] which keys each query sees."""
    ahead = torch.arange(S) - torch.arange(L).unsqueeze(-1) - (S - L if bottom_right else 0)
    return (ahead >= (-left if left >= 0 else -S - L)) & (ahead <= (right if right >= 0 else S + L))


@pytest.mark.parametrize(("L", "S"), [(6, 6), (5, 9), (9, 5), (1, 7), (7, 1)])
def test_bounds_are_masks(L: int, S: int) -> None:
    leaves = [normal(2, length, 4).requires_grad_() for length in (L, S, S)]
    for left, right, bottom_right, causal in itertools.product(
        (-1, 0, 2, sys.maxsize), (-1, 0, 3, sys.maxsize), (False, True), (False, True)
    ):
        out = sdpa(*leaves, is_causal=causal, window_size=(left, right), bottom_right=bottom_right)
        mask = bounds(L, S, min(left, 99), 0 if causal else min(right, 99), bottom_right)
        want = sdpa(*leaves, mask)
        torch.testing.assert_close(out, want)
        # torch may give NaN to a query that sees nothing.
        torchs = F.scaled_dot_product_attention(*leaves, mask).masked_fill(~mask.any(-1, keepdim=True), 0.0)
        torch.testing.assert_close(out, torchs)
        torch.testing.assert_close(*(torch.autograd.grad(o.square().sum(), leaves) for o in (out, want)))


@pytest.mark.parametrize("bottom_right", [False, True])
def test_slopes_are_a_mask(bottom_right: bool) -> None:
    tensors = [normal(2, 4, length, 4) for length in (5, 7, 7)]
    slopes = torch.tensor([0.5, 0.25, 0.125, 0.0625], requires_grad=True)
    distance = (torch.arange(7) - torch.arange(5).unsqueeze(-1) - 2 * bottom_right).abs()
    out = sdpa(*tensors, alibi_slopes=slopes, bottom_right=bottom_right)
    assert not out.requires_grad  # slopes get no gradient
    mask = (-slopes.view(4, 1, 1) * distance).double()
    torch.testing.assert_close(out, F.scaled_dot_product_attention(*tensors, mask))


def test_key_padding_is_a_mask() -> None:
    padding = torch.rand(2, 7) > 0.6
    tensors = [normal(2, 4, length, 4).requires_grad_() for length in (5, 7, 7)]
    results = []
    for options in (dict(key_padding_mask=padding), dict(attn_mask=~padding[:, None, None])):
        out = sdpa(*tensors, **options)
        results.append([out, *torch.autograd.grad(out.square().sum(), tensors)])
    torch.testing.assert_close(*results)
    five = [t.unsqueeze(1).expand(2, 3, *t.shape[1:]) for t in tensors]
    got = sdpa(*five, key_padding_mask=padding.unsqueeze(1).expand(2, 3, 7))
    torch.testing.assert_close(got, results[0][0].unsqueeze(1).expand(2, 3, 4, 5, 4))
    three = [t[0] for t in tensors]
    torch.testing.assert_close(sdpa(*three, key_padding_mask=padding[0]), results[0][0][0])


@pytest.mark.parametrize(
    "options",
    [
        {},
        dict(is_causal=True),
        dict(window_size=(4, 1), bottom_right=True, softcap=1.0),
        dict(alibi_slopes=torch.tensor([0.5, 0.1]), return_lse=True),
    ],
    ids=str,
)
@pytest.mark.parametrize("ends_k", [None, [0, 5, 5, 9, 40], [0, 0, 0, 0, 0]], ids=str)
def test_sequences_one_after_the_other(options: dict, ends_k: list[int] | None) -> None:
    ends = [0, 3, 11, 11, 30]
    keys = ends_k or ends
    leaves = [t.requires_grad_() for t in (normal(2, 30, 4), normal(1, keys[-1], 4), normal(1, keys[-1], 6))]
    query, key, value = leaves
    lengths = dict(cu_seqlens_q=torch.tensor(ends, dtype=torch.int32))
    if ends_k:
        lengths["cu_seqlens_k"] = torch.tensor(ends_k)
    call = partial(sdpa, enable_gqa=True, **options)
    got = listed(call(*leaves, **lengths))
    queries, places = (itertools.starmap(slice, itertools.pairwise(at)) for at in (ends, keys))
    parts = [listed(call(query[:, q], key[:, k], value[:, k])) for q, k in zip(queries, places, strict=True)]
    want = [torch.cat(outputs, 1) for outputs in zip(*parts, strict=True)]
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(*(torch.autograd.grad(o[0].square().sum(), leaves) for o in (got, want)))


@pytest.mark.parametrize("cut", [0, 1, 4, 9])
def test_a_run_split_among_keys_equals_the_whole(cut: int) -> None:
    """Partial results merge by their lse, forward and backward: what sequence parallelism lives on."""
    leaves = [t.requires_grad_() for t in (normal(2, 4, 5, 4), normal(2, 2, 9, 4), normal(2, 2, 9, 6), normal(5, 9))]
    query, key, value, mask = leaves
    call = partial(sdpa, query, enable_gqa=True, softcap=2.0, return_lse=True)
    whole = call(key, value, mask)
    parts = [call(key[:, :, s], value[:, :, s], mask[:, s]) for s in (slice(0, cut), slice(cut, 9))]
    lse = torch.logaddexp(*(part[1] for part in parts))
    out = sum(part[0] * (part[1] - lse).exp().unsqueeze(-1) for part in parts)
    torch.testing.assert_close((out, lse), whole)
    sent = [torch.randn_like(out), torch.randn_like(lse)]
    torch.testing.assert_close(torch.autograd.grad((out, lse), leaves, sent), torch.autograd.grad(whole, leaves, sent))


def assert_torchs_precision(leaves: list[Tensor], call: Callable[..., Tensor]) -> None:
    """`call(function, *tensors)` is no worse for our function than for torch's, forward and backward."""
    wide = [t.detach().double().requires_grad_() for t in leaves]
    theirs, results = F.scaled_dot_product_attention, []
    for function, tensors in ((sdpa, leaves), (theirs, leaves), (theirs, wide)):
        out = call(function, *tensors)
        sent = torch.linspace(-1, 1, out.numel()).view(out.shape).to(out.dtype)
        results.append([out, *torch.autograd.grad(out, tensors, sent)])
    assert_no_worse(*results)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=name_of)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision(dtype: torch.dtype, masked: bool, autocast: bool) -> None:
    stored = torch.float32 if autocast else dtype
    leaves = [torch.randn(2, 4, length, 32).to(stored).requires_grad_() for length in (100, 120, 120)]
    mask = torch.randn(100, 120).to(stored)

    def call(function: Callable, *tensors: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=dtype, enabled=autocast):
            return function(*tensors, mask.to(tensors[0].dtype) if masked else None, is_causal=not masked)

    assert_torchs_precision(leaves, call)
    with torch.autocast("cpu", dtype=dtype, enabled=autocast):
        out, lse, weights = sdpa(*leaves, mask, return_lse=True, return_weights=True)
        assert (out.dtype, lse.dtype, weights.dtype) == (dtype, torch.float32, dtype)
        assert sdpa(*(t.double() for t in leaves)).dtype == torch.float64


@each_implementation
def test_autocast_leaves_the_computation_alone(impl: Impl) -> None:
    """It lowers results, not what they are made from: also in the reference, and in its gradients."""
    require(TABLE, impl, "cpu", torch.float32)
    leaves = [torch.randn(2, 3, length, 16).requires_grad_() for length in (9, 11, 11)]
    results = []
    with fastseq.use_backend(impl.name):
        for enabled in (False, True):
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
                out, lse = sdpa(*leaves, return_lse=True)
                results.append([out.bfloat16(), lse, *torch.autograd.grad(lse.sum(), leaves[:2])])
    torch.testing.assert_close(*results, rtol=0, atol=0)


def test_long_sequences_are_as_exact_as_torch() -> None:
    leaves = [torch.randn(1, 2, 1000, 64).requires_grad_() for _ in range(3)]
    assert_torchs_precision(leaves, lambda function, *tensors: function(*tensors, is_causal=True))


@each_dtype
@pytest.mark.parametrize("size", [1e3, -1e9, 1e30, -1e30, "lowest"])
@pytest.mark.parametrize("everywhere", [False, True])
def test_large_masks(dtype: torch.dtype, size: float | str, everywhere: bool) -> None:
    """The largest score is subtracted before anything is exponentiated: nothing overflows, and nothing is lost.

    Many masks leave out by the lowest number. Where that is everywhere, all weights are alike, as in torch.
    """
    leaves = [normal(2, length, 4, dtype=dtype).requires_grad_() for length in (5, 300, 300)]
    mask = torch.zeros(5, 300, dtype=dtype)
    mask[:2, slice(None) if everywhere else 200] = torch.finfo(dtype).min if size == "lowest" else size
    query, key, value = leaves
    outs = [sdpa(*leaves, mask), (query @ key.mT / 2 + mask).softmax(-1) @ value]
    # What is left of scores under a thousand has lost that many digits.
    tolerance = dict(rtol=1e-4, atol=1e-3 if dtype == torch.float32 else 1e-7) if size == 1e3 else {}
    torch.testing.assert_close(*outs, **tolerance)
    ours, theirs = (torch.autograd.grad(out.square().sum(), leaves) for out in outs)
    assert all(g.isfinite().all() for g in ours)
    if not everywhere:  # there nothing but the number is left in lse, from which backward makes the weights anew
        assert_gradients(ours, theirs)


@pytest.mark.parametrize("scale", [10.0, 1e3])
def test_large_scores(scale: float) -> None:
    """Weights are as exact as scores, of which one that is larger by far takes it all; gradients do not overflow."""
    leaves = [torch.randn(2, length, 4).requires_grad_() for length in (5, 300, 300)]
    wide = [t.detach().double().requires_grad_() for t in leaves]
    out, exact = sdpa(*leaves, scale=scale), F.scaled_dot_product_attention(*wide, scale=scale)
    grads, exact_grads = (torch.autograd.grad(o.sum(), inputs) for o, inputs in ((out, leaves), (exact, wide)))
    assert all(g.isfinite().all() for g in grads)
    largest = scale * (wide[0] @ wide[1].mT).abs().max().item()
    tolerance = largest * torch.finfo(torch.float32).eps
    torch.testing.assert_close(out, exact.float(), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(grads[2], exact_grads[2].float(), rtol=tolerance, atol=tolerance)


QUERY, KEY, VALUE = torch.randn(2, 4, 5, 8), torch.randn(2, 4, 7, 8), torch.randn(2, 4, 7, 6)
LEAD = (QUERY, KEY, VALUE)
# What torch's function refuses, whose errors ours raises.
REFUSED: dict[str, tuple[tuple, dict]] = {
    "one dimension": ((QUERY[0, 0, 0], KEY, VALUE), {}),
    "a list": (([1.0], KEY, VALUE), {}),
    "None": ((QUERY, None, VALUE), {}),
    "nothing": ((), {}),
    "two dtypes": ((QUERY, KEY.double(), VALUE), {}),
    "integers": ((QUERY.int(), KEY.int(), VALUE.int()), {}),
    "booleans": ((QUERY.bool(), KEY.bool(), VALUE.bool()), {}),
    "two devices": ((QUERY, KEY.to("meta"), VALUE), {}),
    "sparse": ((QUERY.to_sparse(), KEY, VALUE), {}),
    "widths": ((QUERY, KEY[..., :5], VALUE), {}),
    "lengths": ((QUERY, KEY, VALUE[:, :, :5]), {}),
    "batches": ((QUERY, KEY[:1].expand(3, -1, -1, -1), VALUE), {}),
    "heads": ((QUERY, KEY[:, :3], VALUE[:, :3]), {}),
    "heads in groups": ((QUERY, KEY[:, :3], VALUE[:, :3]), dict(enable_gqa=True)),
    "groups of nothing": ((QUERY[0, 0], KEY[0, 0], VALUE[0, 0]), dict(enable_gqa=True)),
    "a mask's shape": ((*LEAD, torch.ones(5, 6, dtype=torch.bool)), {}),
    "a mask's rank": ((*LEAD, torch.ones(1, 2, 4, 5, 7, dtype=torch.bool)), {}),
    "a mask of integers": ((*LEAD, torch.ones(5, 7, dtype=torch.int64)), {}),
    "a mask of doubles": ((*LEAD, torch.ones(5, 7, dtype=torch.float64)), {}),
    "a mask in half precision": ((*LEAD, torch.ones(5, 7, dtype=torch.float16)), {}),
    "a mask's device": ((*LEAD, torch.ones(5, 7, device="meta")), {}),
    "a mask in a list": ((*LEAD, [[True]]), {}),
    "dropout_p": (LEAD, dict(dropout_p=1.5)),
    "dropout_p's type": (LEAD, dict(dropout_p="a")),
    "scale's type": (LEAD, dict(scale="a")),
    "is_causal's type": (LEAD, dict(is_causal="yes")),
    "enable_gqa's type": (LEAD, dict(enable_gqa=1)),
    "an unknown argument": (LEAD, dict(other=1)),
}


def errors_of(*args: Any, **options: Any) -> tuple[Exception, Exception]:
    """Ours and torch's."""
    errors = []
    for function in (sdpa, F.scaled_dot_product_attention):
        with pytest.raises((IndexError, RuntimeError, TypeError, ValueError)) as raised:
            function(*args, **options)
        errors.append(raised.value)
    return errors[0], errors[1]


def assert_still_works() -> None:
    torch.testing.assert_close(sdpa(*LEAD), F.scaled_dot_product_attention(*LEAD))


@pytest.mark.parametrize("what", REFUSED)
def test_what_torch_refuses(what: str) -> None:
    args, options = REFUSED[what]
    ours, theirs = errors_of(*args, **options)
    assert type(ours) is type(theirs)
    if what not in ("nothing", "an unknown argument"):  # of which Python speaks
        assert str(ours) == str(theirs)
    assert_still_works()


@pytest.mark.parametrize(
    ("args", "mask"),
    [
        ((QUERY, KEY.double(), VALUE), None),
        ((QUERY, KEY.int(), VALUE), None),
        ((QUERY.double(), KEY, VALUE), None),
        (LEAD, torch.ones(5, 7, dtype=torch.int64)),
        (LEAD, torch.ones(5, 7, dtype=torch.float64)),
    ],
)
def test_what_torch_refuses_under_autocast(args: tuple, mask: Tensor | None) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours, theirs = errors_of(*args, mask)
        assert (type(ours), str(ours)) == (type(theirs), str(theirs))
        assert sdpa(QUERY, KEY.bfloat16(), VALUE.half(), torch.randn(5, 7).half()).dtype == torch.bfloat16


ENDS = torch.tensor([0, 2, 5])
BAD_OPTIONS: list[tuple[dict, type[Exception], str]] = [
    (dict(dropout_p=-0.1), ValueError, "dropout_p must be between 0 and 1, got -0.1"),
    (dict(dropout_p=math.nan), ValueError, "dropout_p must be between 0 and 1, got nan"),
    (dict(key_padding_mask=torch.ones(2, 7)), ValueError, r"key_padding_mask must be torch.bool \[2, 7\], got"),
    (dict(key_padding_mask=torch.ones(2, 5) > 0), ValueError, r"key_padding_mask must be .* got torch.bool \[2, 5\]"),
    (dict(key_padding_mask=[True]), TypeError, "key_padding_mask must be a dense tensor, got list"),
    (dict(window_size=3), TypeError, "window_size must be .left, right., two integers, got 3"),
    (dict(window_size=(1, 2, 3)), TypeError, "window_size must be"),
    (dict(window_size=(1.5, 2)), TypeError, "window_size must be"),
    (dict(window_size=(-2, 0)), ValueError, r"window_size must be \(left, right\), each at least -1, got \(-2, 0\)"),
    (dict(alibi_slopes=torch.ones(3)), ValueError, r"alibi_slopes must be floating, \[4\].* got torch.float32 \[3\]"),
    (dict(alibi_slopes=0.5), TypeError, "alibi_slopes must be a dense tensor, got float"),
    (dict(window_size=(True, False)), TypeError, "window_size must be"),
    (dict(window_size=torch.ones(2)), TypeError, "window_size must be"),
    (dict(alibi_slopes=torch.ones(4, dtype=torch.int64)), ValueError, "alibi_slopes must be floating"),
    (dict(alibi_slopes=torch.ones(4, device="meta")), ValueError, "alibi_slopes must be on query's device, cpu, got"),
    (dict(key_padding_mask=torch.ones(2, 7, device="meta") > 0), ValueError, "key_padding_mask must be on query's"),
    (dict(key_padding_mask=torch.ones(2, 7).to_sparse()), TypeError, "key_padding_mask must be a dense tensor, got"),
    (dict(cu_seqlens_q=ENDS.to("meta")), ValueError, "cu_seqlens_q must hold numbers"),
    (dict(softcap=-1.0), ValueError, r"softcap must be 0 or within \[1.2e-38, 3.4e\+38\], got -1.0"),
    *((dict(softcap=s), ValueError, "softcap must be 0 or within") for s in (math.nan, math.inf, 1e39, 1e-50, 10**400)),
    *((dict(softcap=s), TypeError, "softcap must be a number, got") for s in ("2", torch.ones(2))),
    *((dict(bottom_right=b), TypeError, "bottom_right must be a bool, got") for b in ("x", None, torch.ones(2) > 0)),
    (dict(return_lse="no"), TypeError, "return_lse must be a bool, got 'no'"),
    (dict(return_weights=1), TypeError, "return_weights must be a bool, got 1"),
    (dict(average_weights=True), ValueError, "average_weights .* needs return_weights"),
    (dict(cu_seqlens_q=ENDS), ValueError, r"with cu_seqlens_q, query must be \[H, all queries, E\]"),
    (dict(cu_seqlens_k=ENDS), ValueError, "cu_seqlens_k needs cu_seqlens_q"),
    (dict(cu_seqlens_q=[0, 5]), TypeError, "cu_seqlens_q must be a dense tensor, got list"),
]  # fmt: skip
BAD_ENDS: list[tuple[dict, str]] = [
    (dict(cu_seqlens_q=torch.tensor(5)), r"cu_seqlens_q must be .* \[sequences \+ 1\], got torch.int64 \[\]"),
    (dict(cu_seqlens_q=torch.tensor([0.0, 5.0])), "cu_seqlens_q must be int32 or int64"),
    (dict(cu_seqlens_q=torch.tensor([], dtype=torch.int64)), "cu_seqlens_q must be int32 or int64"),
    (dict(cu_seqlens_q=torch.tensor([0, 4])), r"cu_seqlens_q must rise from 0 to 5, the number of rows, got \[0, 4\]"),
    (dict(cu_seqlens_q=torch.tensor([1, 5])), "cu_seqlens_q must rise from 0 to 5"),
    (dict(cu_seqlens_q=torch.tensor([0, 3, 2, 5])), "cu_seqlens_q must rise from 0 to 5"),
    (dict(cu_seqlens_q=torch.tensor([-1, 5])), "cu_seqlens_q must rise from 0 to 5"),
    (dict(cu_seqlens_k=torch.tensor([0, 8])), "cu_seqlens_k must rise from 0 to 7"),
    (dict(cu_seqlens_k=torch.tensor([[0, 7]])), "cu_seqlens_k must be int32 or int64"),
    (dict(cu_seqlens_k=torch.tensor([0, 7])), "cu_seqlens_q and cu_seqlens_k must have as many .* got 3 and 2"),
    (dict(attn_mask=torch.ones(5, 7, dtype=torch.bool)), "attn_mask cannot be given with cu_seqlens_q"),
    (dict(key_padding_mask=torch.ones(7, dtype=torch.bool)), "key_padding_mask cannot be given with cu_seqlens_q"),
    (dict(return_weights=True), "return_weights cannot be given with cu_seqlens_q"),
]  # fmt: skip


def test_integers_of_numpy_make_a_window() -> None:
    window = (np.int64(1), np.int64(2))
    torch.testing.assert_close(sdpa(*LEAD, window_size=window), sdpa(*LEAD, window_size=(1, 2)), rtol=0, atol=0)


@pytest.mark.parametrize(("options", "error", "message"), BAD_OPTIONS)
def test_bad_options_name_the_argument(options: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        sdpa(*LEAD, **options)
    assert_still_works()


@pytest.mark.parametrize(("options", "message"), BAD_ENDS)
def test_bad_sequences_name_the_argument(options: dict, message: str) -> None:
    lengths = dict(cu_seqlens_q=ENDS, cu_seqlens_k=torch.tensor([0, 2, 7]))
    with pytest.raises(ValueError, match=message):
        sdpa(*(t[0] for t in LEAD), **(lengths | options))
    assert sdpa(*(t[0] for t in LEAD), **lengths).isfinite().all()


def test_the_extension_checks_for_itself() -> None:
    require_native()
    dense = Case(2, 4, 5, 7, 3, Hk=2, mask="float hls", padding=True, slopes=True, dropout=0.5)
    dense, varlen = (c.arguments("cpu", torch.float32) for c in (dense, Case(1, 2, 5, 7, 3, varlen=True)))
    forward, backward = torch.ops.fastseq_native.attention, torch.ops.fastseq_native.attention_backward
    out, lse, _ = forward(*dense, NO_WEIGHTS)
    for change in (
        dict(query=dense.query[0]),
        dict(query=dense.query.int()),
        dict(query=dense.query[..., :2]),
        dict(query=dense.query[:, :3]),
        dict(query=dense.query[..., :0], key=dense.key[..., :0]),
        dict(key=dense.key.double()),
        dict(key=dense.key[:1]),
        dict(key=dense.key[:, :0], value=dense.value[:, :0]),
        dict(value=dense.value[:, :, :6]),
        dict(value=dense.value[:, :1]),
        dict(mask=dense.mask[0]),
        dict(mask=dense.mask[..., :6]),
        dict(mask=dense.mask.double()),
        dict(mask=dense.mask.expand(3, -1, -1, -1)),
        dict(key_padding=dense.key_padding[:, :6]),
        dict(key_padding=dense.key_padding.int()),
        dict(slopes=dense.slopes[:3]),
        dict(slopes=dense.slopes.double()),
        dict(seed=None),
        dict(seed=torch.tensor([1, 2])),
        dict(seed=torch.tensor(1, dtype=torch.int32)),
        dict(dropout_p=-0.5),
        dict(dropout_p=1.5),
        dict(cu_seqlens_q=torch.tensor([0, 5]), cu_seqlens_k=torch.tensor([0, 7])),
    ):
        with pytest.raises(RuntimeError, match="attention: "):
            forward(*dense._replace(**change), NO_WEIGHTS)
    for change in (
        dict(cu_seqlens_k=None),
        dict(cu_seqlens_q=torch.tensor([0, 1, 2, 3, 6])),
        dict(cu_seqlens_q=torch.tensor([0, 4, 3, 4, 5])),
        dict(cu_seqlens_q=torch.tensor([-1, 1, 2, 3, 5])),
        dict(cu_seqlens_k=torch.tensor([0, 7])),
        dict(cu_seqlens_k=varlen.cu_seqlens_k.int()),
        dict(mask=torch.ones(1, 1, 5, 7)),
    ):
        with pytest.raises(RuntimeError, match="attention: "):
            forward(*varlen._replace(**change), NO_WEIGHTS)
    for arguments, mode in ((dense, 3), (dense, -1), (varlen, EACH_HEAD)):
        with pytest.raises(RuntimeError, match="attention: return_weights"):
            forward(*arguments, mode)
    good = dict(dout=out, dlse=lse, arguments=dense, out=out, lse=lse, needs=[True] * 4)
    for change in (
        dict(dout=out[:, :, :4]),
        dict(dout=out.double()),
        dict(dlse=lse[:1]),
        dict(out=out[..., :2]),
        dict(lse=lse.double()),
        dict(needs=[True] * 3),
        dict(arguments=dense._replace(mask=None)),
        dict(arguments=dense._replace(mask=dense.mask > 0)),
    ):
        dout, dlse, arguments, *rest = (good | change).values()
        with pytest.raises(RuntimeError, match="attention: "):
            backward(dout, dlse, *arguments, *rest)
    torch.testing.assert_close(out, reference.forward(*dense, NO_WEIGHTS)[0])


def test_several_python_threads_at_once(threads: int) -> None:
    leaves = [torch.randn(2, 4, 70, 32).requires_grad_() for _ in range(3)]
    dout = torch.randn(2, 4, 70, 32)

    def run() -> list[Tensor]:
        out = sdpa(*leaves, is_causal=True)
        return [out, *torch.autograd.grad(out, leaves, dout)]

    want, failures = run(), []

    def work() -> None:
        try:
            for _ in range(20):
                torch.testing.assert_close(run(), want)
        except BaseException as error:
            failures.append(error)

    workers = [threading.Thread(target=work) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not failures


@st.composite
def any_case(draw: st.DrawFn) -> Case:
    varlen, Hk = draw(st.booleans()), draw(st.sampled_from([1, 2, 3]))
    kinds = ["bool", "float"] if not varlen else []
    dimensions = "".join(d for d in "nhls" if draw(st.booleans()))
    length = st.one_of(st.integers(1, 9), st.integers(60, 70), st.integers(120, 140))  # around a tile's ends
    bound = st.sampled_from([-1, 0, 1, 5, 64, 200])
    return Case(
        1 if varlen else draw(st.integers(1, 3)),
        Hk * draw(st.sampled_from([1, 2])),
        draw(length),
        draw(length),
        draw(st.integers(1, 20)),
        Ev=draw(st.integers(1, 20)),
        Hk=Hk,
        mask=f"{draw(st.sampled_from(kinds))} {dimensions}" if kinds and draw(st.booleans()) else "",
        padding=not varlen and draw(st.booleans()),
        left=draw(bound),
        right=draw(bound),
        bottom_right=draw(st.booleans()),
        slopes=draw(st.booleans()),
        softcap=draw(st.sampled_from([0.0, 1.5])),
        dropout=draw(st.sampled_from([0.0, 0.3])),
        varlen=varlen,
        transposed=draw(st.booleans()),
    )


@each_kernel
@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(case=any_case(), mode=st.sampled_from([NO_WEIGHTS, EACH_HEAD, AVERAGE]), threads=st.sampled_from([1, 2]))
def test_any_combination(impl: Impl, case: Case, mode: int, threads: int) -> None:
    device = device_of(impl)
    require(TABLE, impl, device, torch.float64)
    arguments = case.arguments(device, torch.float64)
    mode = NO_WEIGHTS if case.varlen else mode
    with threads_set(threads):
        outputs = Outputs(*impl.kernel.forward(*arguments, mode))
        rest = (*grads_like(outputs), *arguments, *outputs[:2], needs_all(arguments))
        found = impl.kernel.backward(*rest)
    assert_outputs(outputs, reference.forward(*arguments, mode))
    assert_gradients(found, reference.backward(*rest))


@pytest.mark.parametrize("content", [math.inf, math.nan])
def test_threads_see_the_same_tiles_of_values(content: float) -> None:
    """Where chunks of queries end depends on threads; whether a tile holds what must be left out does not."""
    query, key, value = (torch.randn(1, 1, 384, 16) for _ in range(3))
    value[:, :, 300] = content
    seen = torch.ones(384, dtype=torch.bool)
    seen[300] = False
    results = []
    for count in (1, 2, 4):
        with threads_set(count):
            results.append(sdpa(query, key, value, seen, is_causal=True))
    for result in results:
        assert result.isfinite().all()
        torch.testing.assert_close(result, results[0], rtol=0, atol=0)


@each_implementation
@pytest.mark.parametrize("L", [1, 20])
def test_scores_that_all_overflow_give_zeros(impl: Impl, L: int) -> None:
    require(TABLE, impl, "cpu", torch.float32)
    query = torch.full((1, 1, L, 4), 1e20)
    with fastseq.use_backend(impl.name):
        out, lse = sdpa(query, -query, query, return_lse=True)
    assert not out.any() and torch.equal(lse, torch.full_like(lse, -math.inf))


def test_half_precision_reads_denormals_where_float32_has_none() -> None:
    value = torch.tensor([2**-24, -(2**-20), 2**-14, 1.0]).half().view(1, 4)
    torch.set_flush_denormal(True)
    try:
        assert torch.equal(sdpa(value, value, value), value)
    finally:
        torch.set_flush_denormal(False)


@pytest.mark.parametrize("change", [lambda x: x[..., ::2], lambda x: x[..., :1].expand(-1, -1, -1, 8)])
def test_compiled_where_features_are_apart(change: Callable) -> None:
    """The kernel reads a copy then, but results lie in memory as what was given does."""
    torch._dynamo.reset()
    leaf = torch.randn(2, 6, 4, 16, requires_grad=True)

    def call(leaf: Tensor) -> Tensor:
        x = change(leaf).transpose(1, 2)
        return sdpa(x, x, x, softcap=3.0)

    results = []
    for function in (call, torch.compile(call, fullgraph=True, backend="aot_eager")):
        out = function(leaf)
        results.append([out, *torch.autograd.grad(out.square().sum(), leaf)])
    torch.testing.assert_close(*results, check_stride=True)


# torch's own function where no kernel serves


@pytest.fixture
def no_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where the extension is not there."""
    for dtype in DTYPES:
        monkeypatch.setitem(TABLE._choices, (None, "cpu", dtype), [TABLE.impls[-1]])


def extras(dtype: torch.dtype) -> list[dict]:
    """Options that torch's function does not have, or not together."""
    return [
        dict(key_padding_mask=torch.zeros(2, 7, dtype=torch.bool)),
        dict(window_size=(3, -1)),
        dict(bottom_right=True, is_causal=True),
        dict(alibi_slopes=torch.ones(4)),
        dict(softcap=2.0),
        dict(return_lse=True),
        dict(return_weights=True),
        dict(attn_mask=torch.randn(5, 7, dtype=dtype), is_causal=True),
    ]


@each_dtype
@pytest.mark.usefixtures("nothing_asked_for")
def test_without_a_kernel_torchs_function_serves(
    no_kernel: None, computed: list[Arguments], dtype: torch.dtype
) -> None:
    leaves = [t.to(dtype).requires_grad_() for t in LEAD]
    mask = torch.randn(5, 7, dtype=dtype).requires_grad_()
    for options in ({}, dict(is_causal=True), dict(scale=0.3), dict(enable_gqa=True), dict(attn_mask=mask)):
        results = []
        for function in (sdpa, F.scaled_dot_product_attention):
            out = function(*leaves, **options)
            results.append([out, *torch.autograd.grad(out.sum(), leaves)])
        torch.testing.assert_close(*results, rtol=0, atol=0)
    torch.manual_seed(3)
    dropped = sdpa(*leaves, dropout_p=0.5)
    torch.manual_seed(3)
    assert torch.equal(dropped, F.scaled_dot_product_attention(*leaves, dropout_p=0.5))
    with pytest.raises(ValueError, match="dropout_p must be between 0 and 1"):
        sdpa(*leaves, dropout_p=-0.1)
    assert not computed
    for count, options in enumerate(extras(dtype), 1):  # which the reference serves
        assert all(t.isfinite().all() for t in listed(sdpa(*leaves, **options)))
        assert len(computed) == count


def test_without_a_kernel_an_implementation_can_be_asked_for(no_kernel: None, computed: list[Arguments]) -> None:
    with fastseq.use_backend("reference"):
        torch.testing.assert_close(sdpa(*LEAD), F.scaled_dot_product_attention(*LEAD))
    assert len(computed) == 1


@pytest.mark.usefixtures("nothing_asked_for")
def test_other_devices_get_torchs_function(computed: list[Arguments]) -> None:
    meta = [t.to("meta") for t in LEAD]
    assert sdpa(*meta).shape == (2, 4, 5, 6) and not computed
    assert sdpa(*meta, softcap=1.0).shape == (2, 4, 5, 6) and len(computed) == 1


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.usefixtures("nothing_asked_for")
def test_what_torch_takes_beyond_ours_is_torchs(computed: list[Arguments]) -> None:
    padded = torch.nested.nested_tensor([torch.randn(2, 3, 4), torch.randn(2, 5, 4)])
    got, want = (function(padded, padded, padded) for function in (sdpa, F.scaled_dot_product_attention))
    torch.testing.assert_close(got.to_padded_tensor(0.0), want.to_padded_tensor(0.0))
    assert not computed
    with pytest.raises(ValueError, match="must be plain floating tensors"):
        sdpa(padded, padded, padded, softcap=1.0)
    with fastseq.use_backend("reference"), pytest.raises(ValueError, match="query nested, key nested"):
        sdpa(padded, padded, padded)


# torch.nn.attention.bias


@pytest.mark.filterwarnings("ignore:Lower right causal bias")
@pytest.mark.parametrize(("L", "S"), [(6, 6), (5, 9), (9, 5), (1, 7)])
@pytest.mark.parametrize("lower_right", [False, True])
@each_implementation
def test_causal_biases_are_bounds(computed: list[Arguments], impl: Impl, L: int, S: int, lower_right: bool) -> None:
    from torch.nn.attention.bias import causal_lower_right, causal_upper_left

    require(TABLE, impl, "cpu", torch.float64)
    bias = (causal_lower_right if lower_right else causal_upper_left)(L, S)
    leaves = [normal(2, 3, length, 4).requires_grad_() for length in (L, S, S)]
    sees = bounds(L, S, -1, 0, lower_right).any(-1)
    with fastseq.use_backend(impl.name):
        outs = sdpa(*leaves, bias), F.scaled_dot_product_attention(*leaves, bias)
        results = []
        for out in outs:
            results.append([out[:, :, sees], *torch.autograd.grad(out[:, :, sees].square().sum(), leaves[1:])])
        torch.testing.assert_close(*results)  # who sees nothing gets zeros, from torch NaN
        (arguments,) = computed
        assert arguments.mask is None and arguments.right == 0
        same = dict(is_causal=True, bottom_right=lower_right)
        for options in (dict(softcap=1.0), dict(key_padding_mask=torch.rand(2, S) > 0.5), dict(dropout_p=1.0)):
            torch.testing.assert_close(sdpa(*leaves, bias, **options), sdpa(*leaves, **options, **same))
        windowed = dict(window_size=(2, 3), bottom_right=lower_right)
        torch.testing.assert_close(sdpa(*leaves, bias, **windowed), sdpa(*leaves, is_causal=True, **windowed))
        if L != S:
            windowed["bottom_right"] = not lower_right
            with pytest.raises(ValueError, match=f"bottom_right must be {lower_right} with an attn_mask of variant"):
                sdpa(*leaves, bias, **windowed)


@pytest.mark.usefixtures("nothing_asked_for")
def test_what_torch_refuses_of_causal_biases() -> None:
    from torch.nn.attention.bias import causal_lower_right, causal_upper_left

    for bias, options in (
        (causal_upper_left(5, 7), dict(is_causal=True)),
        (causal_lower_right(4, 7), {}),
        (causal_lower_right(5, 7), dict(dropout_p=2.0)),
    ):
        ours, theirs = errors_of(*LEAD, bias, **options)
        assert (type(ours), str(ours)) == (type(theirs), str(theirs))
    # torch does not look at the sizes of this one.
    wrong = causal_upper_left(3, 3)
    torch.testing.assert_close(sdpa(*LEAD, wrong), F.scaled_dot_product_attention(*LEAD, wrong))
    with pytest.raises(ValueError, match="attn_mask must be plain floating tensors that fit together"):
        sdpa(*LEAD, wrong, softcap=1.0)


def test_causal_biases_compile() -> None:
    from torch.nn.attention.bias import causal_lower_right

    torch._dynamo.reset()
    compiled = torch.compile(lambda *args: sdpa(*args), fullgraph=True, backend="aot_eager")
    bias = causal_lower_right(5, 7)
    torch.testing.assert_close(compiled(*LEAD, bias), sdpa(*LEAD, bias))


# Nested tensors


def nested(lengths: list[int], H: int, E: int, like: Tensor | None = None, **options: Any) -> tuple[Tensor, Tensor]:
    """What holds the values of a nested tensor, and the nested tensor [N, places, H * E]."""
    values = torch.randn(sum(lengths), H * E, requires_grad=True, **options)
    offsets = torch.tensor([0, *itertools.accumulate(lengths)]) if like is None else like.offsets()
    return values, torch.nested.nested_tensor_from_jagged(values, offsets)


def heads_of(t: Tensor, H: int) -> Tensor:
    return t.unflatten(-1, (H, -1)).transpose(1, 2)


@pytest.mark.parametrize("lengths", [[3, 7, 1], [4], [2, 2, 2], [0, 5, 0, 1]], ids=str)
@pytest.mark.parametrize("other", [False, True])
@pytest.mark.parametrize("options", [{}, dict(is_causal=True, scale=0.3), dict(window_size=(2, 1))], ids=str)
def test_nested_tensors(computed: list[Arguments], lengths: list[int], other: bool, options: dict) -> None:
    first, query = nested(lengths, 4, 3, dtype=torch.float64)
    keys = [n + 2 for n in lengths] if other else lengths
    second, key = nested(keys, 2, 3, None if other else query, dtype=torch.float64)
    third, value = nested(keys, 2, 5, key, dtype=torch.float64)
    leaves = [first, second, third]
    q, k, v = heads_of(query, 4), heads_of(key, 2), heads_of(value, 2)
    out = sdpa(q, k, v, enable_gqa=True, **options)
    assert len(computed) == 1 and computed[0].cu_seqlens_q is not None
    assert out.is_nested and out.shape == (len(lengths), 4, q.shape[2], 5)
    parts = [
        sdpa(*(t.unsqueeze(0) for t in tensors), enable_gqa=True, **options)[0]
        for tensors in zip(q.unbind(), k.unbind(), v.unbind(), strict=True)
    ]
    torch.testing.assert_close(list(out.unbind()), parts)
    # It belongs to query's ragged structure: they can be added.
    fourth, rest = nested(lengths, 4, 5, query, dtype=torch.float64)
    residual = out.transpose(1, 2).flatten(-2) + rest
    want = [part.transpose(0, 1).flatten(-2) + x for part, x in zip(parts, rest.unbind(), strict=True)]
    torch.testing.assert_close(list(residual.unbind()), want)
    sent = torch.randn_like(residual.values())
    losses = ((residual.values() * sent).sum(), (torch.cat(want) * sent).sum())
    torch.testing.assert_close(*(torch.autograd.grad(loss, [*leaves, fourth], retain_graph=True) for loss in losses))
    # Nothing was copied on the way there.
    assert computed[0].query.data_ptr() == first.data_ptr()


@pytest.mark.parametrize("other", [False, True])
def test_nested_tensors_are_torchs(other: bool) -> None:
    """Which has no causal ones on CPUs."""
    first, query = nested([3, 7, 1], 2, 8)
    second, key = nested([4, 2, 6], 2, 8) if other else nested([3, 7, 1], 2, 8, query)
    third, value = nested([4, 2, 6] if other else [3, 7, 1], 2, 8, key)
    inputs = [heads_of(t, 2) for t in (query, key, value)]
    results = []
    for function in (sdpa, F.scaled_dot_product_attention):
        out = function(*inputs)
        grads = torch.autograd.grad(out.values().square().sum(), [first, second, third], retain_graph=True)
        results.append([out.values(), *grads])
    torch.testing.assert_close(*results)
    assert sdpa(*inputs).transpose(1, 2).is_contiguous()


def test_nested_tensors_with_lse_and_in_half_precision() -> None:
    _, x = nested([3, 7, 1], 2, 8)
    q = heads_of(x, 2)
    out, lse = sdpa(q, q, q, return_lse=True)
    assert lse.shape == q.shape[:3]
    for part, whole in zip(lse.unbind(), q.unbind(), strict=True):
        torch.testing.assert_close(part, sdpa(whole, whole, whole, return_lse=True)[1])
    half = sdpa(*[q.bfloat16()] * 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = sdpa(q, q, q)
    for lowered in (half, cast):
        assert lowered.dtype == torch.bfloat16
        torch.testing.assert_close(lowered.values().float(), out.values(), rtol=2e-2, atol=2e-2)


def test_nested_tensors_compile() -> None:
    def attend(q: Tensor) -> Tensor:
        return sdpa(q, q, q, is_causal=True) + q

    torch._dynamo.reset()
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    for lengths in ([3, 7, 1], [2, 9]):
        results = []
        for function in (compiled, attend):
            torch.manual_seed(0)
            values, x = nested(lengths, 2, 4)
            out = function(heads_of(x, 2))
            results.append([out.values(), *torch.autograd.grad(out.values().sum(), values)])
        torch.testing.assert_close(*results)


@pytest.mark.usefixtures("nothing_asked_for")
def test_nested_tensors_that_go_to_torch(computed: list[Arguments]) -> None:
    values = torch.randn(12, 8)
    holes = torch.nested.nested_tensor_from_jagged(values, torch.tensor([0, 4, 12]), torch.tensor([3, 8]))
    _, three = nested([3, 4], 1, 4)
    _, places = nested([3, 4], 2, 4)
    ragged_first = places.unflatten(-1, (2, 4))  # [N, places, H, E], where torch has another meaning
    dense = torch.randn(2, 2, 3, 4)
    ragged = heads_of(places, 2)
    for args in (
        [heads_of(holes, 2)] * 3,
        [three] * 3,
        [ragged_first] * 3,
        [ragged, dense, dense],
        [ragged, ragged, heads_of(nested([4, 3], 2, 4)[1], 2)],
        [ragged, *[heads_of(nested([3, 4, 1], 2, 4)[1], 2)] * 2],
        [ragged, ragged.double(), ragged],
        [ragged, ragged, ragged, torch.ones(1, 1, dtype=torch.bool)],
        [ragged, ragged, ragged, ragged],
    ):
        outcomes = []
        for function in (sdpa, F.scaled_dot_product_attention):
            try:
                outcomes.append(function(*args).values())
            except Exception as error:
                outcomes.append((type(error), str(error)))
        if isinstance(outcomes[0], Tensor):
            assert torch.equal(*outcomes)
        else:
            assert outcomes[0] == outcomes[1]
    assert not computed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(key_padding_mask=torch.ones(2, 4) > 0), "key_padding_mask cannot be given with nested tensors"),
        (dict(return_weights=True), "return_weights cannot be given with nested tensors"),
        (dict(cu_seqlens_q=ENDS), "cu_seqlens_q cannot be given with nested tensors"),
        (dict(cu_seqlens_k=ENDS), "cu_seqlens_k cannot be given with nested tensors"),
        (dict(softcap=-1.0), "softcap must be 0 or within"),
    ],
)
def test_bad_options_with_nested_tensors(options: dict, message: str) -> None:
    q = heads_of(nested([3, 4], 2, 4)[1], 2)
    with pytest.raises(ValueError, match=message):
        sdpa(q, q, q, **options)
    short = torch.nested.nested_tensor_from_jagged(torch.randn(9, 8), torch.tensor([0, 3, 7]))
    with pytest.raises(ValueError, match=r"query's offsets must rise from 0 to 9, the number of rows, got \[0, 3, 7\]"):
        sdpa(*[heads_of(short, 2)] * 3)


def test_without_a_kernel_the_reference_takes_nested_tensors(no_kernel: None, computed: list[Arguments]) -> None:
    """On CPUs, where torch has no causal ones."""
    q = heads_of(nested([3, 4], 2, 8)[1], 2)
    torch.testing.assert_close(sdpa(q, q, q).values(), F.scaled_dot_product_attention(q, q, q).values())
    sdpa(q, q, q, is_causal=True)
    assert len(computed) == 2


@pytest.mark.parametrize("graph", [False, True])
@pytest.mark.parametrize("one_query", [False, True])
def test_small_calls_are_torchs_functions(
    graph: bool, one_query: bool, computed: list[Arguments], monkeypatch: pytest.MonkeyPatch
) -> None:
    require_native()
    S, L = (6 if graph else 5), (1 if one_query else 3)
    monkeypatch.setattr("fastseq.ops.attention.LEAST_WORK", 2 * 3 * 4 * S if not one_query else 0)
    monkeypatch.setattr("fastseq.ops.attention.LEAST_OF_ONE_QUERY", (2 * 4 * 5, 2 * 4 * 6))
    query, value = torch.randn(1, 2, L, 4, requires_grad=graph), torch.randn(1, 2, S, 5)
    for keys, ours, options in (
        (S - 1, False, {}),
        (S - 1, False, dict(is_causal=True, scale=0.3)),
        (S, True, {}),
        (2, True, dict(dropout_p=0.1)),
        (2, True, dict(attn_mask=torch.tensor([[True, False]]))),
        (2, True, dict(key_padding_mask=torch.tensor([[False, True]]))),
        (2, True, dict(return_lse=True)),
    ):
        key, some = torch.randn(1, 2, keys, 4), value[:, :, :keys]
        out = sdpa(query, key, some, **options)
        assert bool(computed) == ours
        if not ours:
            assert torch.equal(out, F.scaled_dot_product_attention(query, key, some, **options))
        computed.clear()
    with fastseq.use_backend("reference"):
        sdpa(query, key, some)
    assert computed
    with pytest.raises(RuntimeError):  # torch's own
        sdpa(query, torch.randn(1, 2, 2, 3), some)
