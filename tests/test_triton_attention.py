"""Attention's Triton kernels on the CPU, in Triton's interpreter: the tests of every implementation, on fewer cases.

`make test` runs these in a process of their own, with TRITON_INTERPRET=1.
"""

from collections.abc import Callable, Iterator

import pytest
import test_attention_ops as shared
import torch
from conftest import name_of
from torch import Tensor

import fastseq
from fastseq import jit
from fastseq.functional import scaled_dot_product_attention as sdpa
from fastseq.ops.attention import EACH_HEAD, SELF_CHECK_CASES, TABLE, Case

if not jit.is_interpreted():
    pytest.skip("the interpreter is off: TRITON_INTERPRET=1 is not set", allow_module_level=True)

TRITON = next(impl for impl in TABLE.impls if impl.name == "triton")

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")  # of NumPy, where a logarithm is -inf


@pytest.fixture(autouse=True)
def _poisoned(one_thread: None) -> Iterator[None]:
    """Fills what torch.empty gives with NaN, so that an element that a kernel forgot cannot pass for a zero."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


# One of each feature: tiles and tails, splits of the keys, bounds on both sides, masks of each shape.
# Random bits are slow in the interpreter: cases with dropout are small.
EVERYTHING = Case(1, 2, 17, 40, 24, Hk=1, mask="float hls", padding=True, right=0, bottom_right=True, dropout=0.2)
CASES = [
    *(case for case in SELF_CHECK_CASES if not case.dropout),
    EVERYTHING,
    Case(1, 1, 100, 130, 64, Hk=1),
    Case(1, 1, 33, 65, 80, Ev=40, right=0),
    Case(1, 2, 70, 40, 17, right=0, bottom_right=True),
    Case(1, 1, 100, 300, 16, left=64, right=0, bottom_right=True),
    Case(1, 1, 1, 700, 64, slopes=True, bottom_right=True),  # split among programs
    Case(1, 1, 2, 600, 33, right=0, dropout=0.3, bottom_right=True),
    Case(2, 2, 37, 70, 16, mask="bool ns"),
    Case(2, 2, 37, 70, 16, mask="float nhls"),
    Case(2, 2, 37, 70, 16, mask="float ns", left=20),
    Case(2, 2, 37, 70, 16, mask="float h", slopes=True),
    Case(1, 2, 70, 90, 24, varlen=True, left=20, right=3, bottom_right=True, dropout=0.1),
    Case(1, 1, 20, 30, 250),
    Case(0, 2, 3, 4, 8),
    Case(2, 2, 0, 4, 8),
    Case(2, 2, 3, 0, 8),
]
HALF_CASES = [SELF_CHECK_CASES[1], SELF_CHECK_CASES[4], SELF_CHECK_CASES[5], EVERYTHING]


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_outputs_and_gradients(case: Case) -> None:
    shared.test_outputs_and_gradients(TRITON, torch.float32, case)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=name_of)
@pytest.mark.parametrize("case", HALF_CASES, ids=name_of)
def test_half_precision(dtype: torch.dtype, case: Case) -> None:
    shared.test_outputs_and_gradients(TRITON, dtype, case)


@pytest.mark.parametrize("kind", ["float32", "half"])
def test_additive_masks_and_slopes_beside_half_precision(kind: str) -> None:
    """They may be wider than the query, and a mask's gradient has the mask's dtype."""
    arguments = Case(1, 2, 20, 30, 8, mask="float hs", slopes=True).arguments("cpu", torch.float16)
    if kind == "float32":
        arguments = arguments._replace(mask=arguments.mask.float(), slopes=arguments.slopes.float())
    out, lse, _ = TRITON.kernel.forward(*arguments, 0)
    want = TABLE.reference.kernel.forward(*arguments, 0)
    shared.assert_outputs((out, lse), want[:2])
    grads = [k.backward(out, lse, *arguments, out, lse, [True] * 4) for k in (TRITON.kernel, TABLE.reference.kernel)]
    assert grads[0][3].dtype == arguments.mask.dtype
    for ours, theirs in zip(*grads, strict=True):
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=1e-2)


def test_only_needed_gradients() -> None:
    shared.test_only_needed_gradients(
        TRITON, Case(1, 2, 20, 40, 12, Hk=1, Ev=9, mask="float hls", right=0, dropout=0.2)
    )


@pytest.mark.parametrize("change", [shared.in_steps, shared.backwards, shared.repeated])
def test_any_strides(change: Callable) -> None:
    shared.test_any_strides(
        TRITON, change, Case(1, 4, 20, 70, 8, Hk=2, Ev=5, mask="float nhls", padding=True, slopes=True)
    )


def test_dropout_drops_what_keep_says() -> None:
    shared.test_dropout_drops_what_keep_says(TRITON, torch.float32, 0.4)


@pytest.mark.parametrize("keys", [16, 32, 64, 128])
@pytest.mark.parametrize("down", [False, True])
def test_dropout_in_tiles_of_every_width(keys: int, down: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward draws with queries down, backward with keys down."""
    monkeypatch.setattr(TRITON.kernel, "INTERPRETED_TILES", (32, keys, 4, 1))
    case = Case(1, 1, 9, 200, 8, dropout=0.5)
    arguments = case.arguments("cpu", torch.float32)
    outputs, sent, grads = shared.expected(case, "cpu", torch.float32)
    if down:
        sent, tape = ([t.float() for t in ts] for ts in (sent, outputs[0][:2]))
        shared.assert_gradients(TRITON.kernel.backward(*sent, *arguments, *tape, [True] * 3 + [False]), grads)
    else:
        shared.assert_outputs(TRITON.kernel.forward(*arguments, EACH_HEAD), outputs[EACH_HEAD])


@pytest.mark.parametrize("way", [way for way in shared.WAYS if way not in ("bool", "added")])
def test_what_no_query_sees_has_no_effect(way: str) -> None:
    shared.test_what_no_query_sees_has_no_effect(TRITON, way, float("nan"), 9)


@pytest.mark.parametrize(("way", "bad"), [("decoding", float("inf")), ("added to each", float("nan"))])
def test_what_some_queries_see_has_no_effect_on_others(way: str, bad: float) -> None:
    shared.test_what_some_queries_see_has_no_effect_on_others(TRITON, way, bad)


@pytest.mark.parametrize("way", ["bool", "added to rows", "bounds", "padding", "varlen"])
def test_who_sees_nothing_gets_nothing(way: str) -> None:
    shared.test_who_sees_nothing_gets_nothing(TRITON, way)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=name_of)
def test_the_function_takes_half_precision_as_it_is(dtype: torch.dtype) -> None:
    """Where a kernel takes it natively, nothing is widened, and results are as exact as torch's."""
    leaves = [torch.randn(1, 2, length, 16).to(dtype).requires_grad_() for length in (20, 40, 40)]
    with fastseq.use_backend("triton"):
        shared.assert_torchs_precision(leaves, lambda function, *tensors: function(*tensors, is_causal=True))
        out, lse, weights = sdpa(*leaves, return_lse=True, return_weights=True)
        assert (out.dtype, lse.dtype, weights.dtype) == (dtype, torch.float32, dtype)


def test_the_module_takes_half_precision_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.dtype] = []
    forward = TRITON.kernel.forward

    def spy(query: Tensor, *rest: object) -> object:
        seen.append(query.dtype)
        return forward(query, *rest)

    monkeypatch.setattr(TRITON.kernel, "forward", spy)
    torch.manual_seed(0)
    theirs = torch.nn.MultiheadAttention(16, 2, batch_first=True)
    x = torch.randn(2, 9, 16)
    want, want_weights = theirs(x, x, x)
    ours = fastseq.accelerate(theirs).half()
    with fastseq.use_backend("triton"), torch.no_grad():  # on a CPU, a graph would have it widened
        out, weights = ours(x.half(), x.half(), x.half())
    assert seen == [torch.float16]
    torch.testing.assert_close(out.float(), want, rtol=1e-2, atol=2e-3)
    torch.testing.assert_close(weights.float(), want_weights, rtol=1e-2, atol=2e-3)


def test_what_it_does_not_take() -> None:
    assert TABLE.reason_against(TRITON, "cpu", torch.float64) == "takes bfloat16 and float16 and float32, not float64"
    wide = torch.zeros(1, 1, 2, 257)
    with (
        fastseq.use_backend("triton"),
        pytest.raises(
            fastseq.BackendError, match=r"triton cannot serve this call: it takes heads of 1 to 256 features"
        ),
    ):
        sdpa(wide, wide, wide)
