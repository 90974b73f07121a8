"""The causal convolution's Triton kernels on the CPU, in Triton's interpreter: every implementation's tests, on fewer
cases.

`make test` runs these in a process of their own, with TRITON_INTERPRET=1.
"""

from collections.abc import Callable, Iterator

import pytest
import test_causal_conv1d as shared
import torch
from conftest import name_of
from test_causal_conv1d import each_activation, each_half, each_layout
from torch import Tensor

import fastseq
from fastseq import jit
from fastseq.functional import causal_conv1d
from fastseq.ops.causal_conv1d import SELF_CHECK_CASES, TABLE, Case

if not jit.is_interpreted():
    pytest.skip("the interpreter is off: TRITON_INTERPRET=1 is not set", allow_module_level=True)

TRITON = next(impl for impl in TABLE.impls if impl.name == "triton")

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")  # of NumPy, where there is NaN


@pytest.fixture(autouse=True)
def _poisoned(one_thread: None) -> Iterator[None]:
    """Fills what torch.empty gives with NaN, so that an element that a kernel forgot cannot pass for a zero."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


# One of each feature: tiles and tails in both directions.
CASES = [
    *SELF_CHECK_CASES,
    Case(2, 9, 300, 4, True, "single", True),
    Case(2, 133, 19, 4, True, "single", True, by_time=True),
    Case(1, 3, 90, 8, True, "same", True),
    Case(1, 3, 5, 8, True, "same", True, by_time=True),
    Case(40, 1, 5, 3, True, "same", True),
    Case(2, 130, 1, 1),
    Case(0, 5, 7, 4, True, "same", True),
    Case(3, 0, 7, 4, True, "same", True),
    Case(3, 5, 0, 4, True, "same", True),
    Case(3, 5, 0, 4, True, "same"),
    Case(3, 5, 0, 1, True, "same", True),
]


@pytest.mark.parametrize("case", CASES, ids=name_of)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=name_of)
def test_outputs_and_gradients(dtype: torch.dtype, case: Case) -> None:
    shared.test_outputs_and_gradients(TRITON, dtype, case)


@pytest.mark.parametrize("wanted", [1, 3, 7])
@each_layout
def test_programs_share_tiles(wanted: int, by_time: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums of several parts of several tiles, the last one short."""
    monkeypatch.setattr(TRITON.kernel, "WANTED_PROGRAMS", wanted)
    case = Case(5, 133, 21, 4, True, "same", True, True) if by_time else Case(5, 5, 600, 4, True, "same", True)
    shared.test_outputs_and_gradients(TRITON, torch.float32, case)


@pytest.mark.parametrize(
    "case", [Case(2, 5, 70, 4, True, "same", True), Case(2, 7, 13, 5, False, "same", True, by_time=True)], ids=name_of
)
def test_only_needed_gradients(case: Case) -> None:
    shared.test_only_needed_gradients(TRITON, case)


@pytest.mark.parametrize("change", shared.CHANGES)
@pytest.mark.parametrize("shape", [(3, 33, 40), (1, 33, 1), (3, 1, 7), (2, 4, 2)])
def test_any_strides(change: Callable[[Tensor], Tensor], shape: tuple[int, int, int]) -> None:
    shared.test_any_strides(TRITON, change, shape)


@each_layout
@pytest.mark.parametrize("T", [1, 3, 45])
def test_nothing_beyond_the_tensors_is_read(T: int, by_time: bool) -> None:
    shared.test_nothing_beyond_the_tensors_is_read(TRITON, T, by_time)


@each_layout
@each_activation
@pytest.mark.parametrize("K", [1, 4])
def test_streaming_is_the_whole(K: int, activation: str | None, by_time: bool) -> None:
    shared.test_streaming_is_the_whole(TRITON, K, activation, by_time)


def test_causal_and_each_channel_by_itself() -> None:
    shared.test_causal_and_each_channel_by_itself(TRITON)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=name_of)
@each_layout
def test_what_is_not_finite(dtype: torch.dtype, by_time: bool) -> None:
    shared.test_what_is_not_finite(TRITON, dtype, by_time)


def test_results_share_no_memory_with_inputs() -> None:
    shared.test_results_share_no_memory_with_inputs(TRITON)


@each_half
def test_the_function(dtype: torch.dtype) -> None:
    leaves = [torch.randn(s, dtype=dtype).requires_grad_() for s in ((2, 3, 20), (3, 4), (3,), (2, 3, 3))]
    wide = [t.detach().float().requires_grad_() for t in leaves]
    with fastseq.use_backend("triton"):
        y, final = causal_conv1d(*leaves, activation="silu")
        want, other = shared.theirs(*wide, activation="silu")
        torch.testing.assert_close((y, final), (want.to(dtype), other.to(dtype)))
        found = torch.autograd.grad(y.float().sum(), leaves)
    exact = torch.autograd.grad(want.sum(), wide)
    for got, wanted in zip(found, exact, strict=True):
        torch.testing.assert_close(got.float(), wanted, rtol=2e-2, atol=2e-2)


def test_what_it_does_not_take() -> None:
    with (
        fastseq.use_backend("triton"),
        pytest.raises(fastseq.BackendError, match="it takes kernels of at most 8 elements, not 9"),
    ):
        causal_conv1d(torch.zeros(2, 3, 4), torch.zeros(3, 9))
