"""The norm's Triton kernels on the CPU, in Triton's interpreter: the tests of every implementation, on fewer cases.

`make test` runs these in a process of their own, with TRITON_INTERPRET=1.
"""

import math
from collections.abc import Callable, Iterator

import pytest
import test_norm as shared
import torch
from conftest import name_of

import fastseq
from fastseq import jit
from fastseq.functional import add_norm
from fastseq.ops.norm import SELF_CHECK_CASES, TABLE, Case

if not jit.is_interpreted():
    pytest.skip("the interpreter is off: TRITON_INTERPRET=1 is not set", allow_module_level=True)

TRITON = next(impl for impl in TABLE.impls if impl.name == "triton")

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")  # of NumPy, where there is NaN


@pytest.fixture(autouse=True)
def _poisoned() -> Iterator[None]:
    """Fills what torch.empty gives with NaN, so that an element that a kernel forgot cannot pass for a zero."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


# One of each feature; more rows than programs take at once, so that sums have several parts of several tiles.
CASES = [
    *SELF_CHECK_CASES,
    Case(1, 1),
    Case(4, 1, "rms", residual=True, dropout=0.5),
    Case(7, 2, residual=True),
    Case(33, 65, "rms", weight=False, bias=False),
    Case(33, 65, weight=False, residual=True),
    Case(21, 129, residual=True, bias=False),
    Case(300, 100, wide=True),
    Case(3, 768, residual=True),
    Case(37, 200, "none", residual=True, apart=True),
    Case(37, 200, "none"),
    Case(6, 50, residual=True, dropout=1.0),
    Case(0, 8, residual=True, dropout=0.5),
]


@pytest.mark.parametrize("case", CASES, ids=name_of)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=name_of)
def test_outputs_and_gradients(dtype: torch.dtype, case: Case) -> None:
    shared.test_outputs_and_gradients(TRITON, dtype, case)


@pytest.mark.parametrize("case", [Case(3, 4100, "rms", residual=True, apart=True), Case(2, 16384)], ids=name_of)
def test_wide_rows(case: Case) -> None:
    shared.test_outputs_and_gradients(TRITON, torch.float32, case)


@pytest.fixture(params=[True, False], ids=["with rows", "apart"])
def summed(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether sums over rows are made with the gradients of rows, or by a kernel of their own, as for wide rows."""
    if not request.param:
        monkeypatch.setattr(TRITON.kernel, "WIDEST_SUMMED", 0)


@pytest.mark.parametrize("case", [Case(70, 300, residual=True), Case(150, 33, "rms", wide=True)], ids=name_of)
def test_sums_over_rows(summed: None, case: Case) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        shared.test_outputs_and_gradients(TRITON, dtype, case)


def test_only_needed_gradients(summed: None) -> None:
    shared.test_only_needed_gradients(TRITON, Case(19, 100, residual=True))


@pytest.mark.parametrize("change", shared.CHANGES)
def test_any_strides(change: Callable) -> None:
    shared.test_any_strides(TRITON, change, Case(9, 67, residual=True, dropout=0.2))


@pytest.mark.parametrize("kind", ["layer", "rms", "none"])
def test_rows_are_alone(kind: str) -> None:
    shared.test_rows_are_alone(TRITON, kind)


@pytest.mark.parametrize("residual", [False, True])
def test_dropout_drops_what_keep_says(residual: bool) -> None:
    shared.test_dropout_drops_what_keep_says(TRITON, 0.3, residual)


@pytest.mark.parametrize("kind", ["layer", "rms"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nan_and_inf_are_as_in_torch(kind: str, bad: float) -> None:
    shared.test_nan_and_inf_are_as_in_torch(TRITON, kind, bad, 150)


def test_a_mean_far_from_zero() -> None:
    shared.test_a_mean_far_from_zero(TRITON, 1e4, 768)


def test_the_function_takes_half_precision_as_it_is() -> None:
    x, residual, weight = (torch.randn(*s).bfloat16().requires_grad_() for s in ((3, 5, 40), (3, 5, 40), (40,)))
    want = shared.torchs(*(t.float() for t in (x, residual, weight)))
    with fastseq.use_backend("triton"):
        y, total = add_norm(x, residual, weight, return_total=True)
        assert y.dtype == total.dtype == torch.bfloat16
        torch.testing.assert_close(y.float(), want, rtol=2e-2, atol=3e-2)
        y.sum().backward()
    assert weight.grad.dtype == torch.bfloat16


def test_what_it_does_not_take() -> None:
    assert TABLE.reason_against(TRITON, "cpu", torch.float64) == "takes bfloat16 and float16 and float32, not float64"
    with (
        fastseq.use_backend("triton"),
        pytest.raises(fastseq.BackendError, match="it takes rows of 1 to 16384 columns, not 16385"),
    ):
        add_norm(torch.zeros(2, 16385))
