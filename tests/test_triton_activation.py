"""The activation's Triton kernels on the CPU, in Triton's interpreter: every implementation's tests, on fewer cases.

`make test` runs these in a process of their own, with TRITON_INTERPRET=1.
"""

from collections.abc import Callable, Iterator

import pytest
import test_activation as shared
import torch
import torch.nn.functional as F
from conftest import name_of
from test_activation import each_half, each_kind
from torch import Tensor

import fastseq
from fastseq import jit
from fastseq.functional import bias_activation
from fastseq.ops.activation import SELF_CHECK_CASES, TABLE, Case

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
    Case(2, 4100, "gelu"),
    Case(130, 130, "gelu", True, "single"),
    Case(33, 127, "identity", False, "same", 0.4),
    Case(5, 130, "gelu", True, "same", 1.0),
    Case(70, 1, "gelu", True, "same"),
    Case(0, 5, "gelu", True, "same", 0.5),
    Case(5, 0, "gelu", True, "same", 0.5),
]


@pytest.mark.parametrize("case", CASES, ids=name_of)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=name_of)
def test_outputs_and_gradients(dtype: torch.dtype, case: Case) -> None:
    shared.test_outputs_and_gradients(TRITON, dtype, case)


@pytest.mark.parametrize("wanted", [1, 3, 7])
def test_programs_share_rows(wanted: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums of several parts of several tiles, the last one short."""
    monkeypatch.setattr(TRITON.kernel, "WANTED_PROGRAMS", wanted)
    monkeypatch.setattr(TRITON.kernel, "MOST_SHARED", 3)
    shared.test_outputs_and_gradients(TRITON, torch.float32, Case(165, 140, "silu", True, "same"))


@pytest.mark.parametrize(
    "case", [Case(20, 200, "silu", True, "same", 0.2), Case(7, 33, "relu", True, "same")], ids=name_of
)
def test_only_needed_gradients(case: Case) -> None:
    shared.test_only_needed_gradients(TRITON, case)


@pytest.mark.parametrize("change", [shared.in_steps, shared.with_gaps, shared.backwards, shared.repeated])
@pytest.mark.parametrize("shape", [(20, 33), (1, 33), (20, 1)])
def test_any_strides(change: Callable[[Tensor], Tensor], shape: tuple[int, int]) -> None:
    shared.test_any_strides(TRITON, change, shape)


def test_nothing_beyond_the_rows_is_read() -> None:
    shared.test_nothing_beyond_the_rows_is_read(TRITON)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=name_of)
@each_kind
def test_everywhere_as_exact_as_torch(dtype: torch.dtype, kind: str) -> None:
    shared.test_everywhere_as_exact_as_torch(TRITON, dtype, kind)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=name_of)
@each_kind
def test_nan_and_infinities_are_torchs(dtype: torch.dtype, kind: str) -> None:
    shared.test_nan_and_infinities_are_torchs(TRITON, dtype, kind)


@each_kind
def test_one_bad_element_stays_one(kind: str) -> None:
    shared.test_one_bad_element_stays_one(TRITON, kind)


@pytest.mark.parametrize("p", [0.1, 1.0])
def test_dropout_drops_what_keep_says(p: float) -> None:
    shared.test_dropout_drops_what_keep_says(TRITON, p)


def test_results_share_no_memory_with_inputs() -> None:
    shared.test_results_share_no_memory_with_inputs(TRITON)


@each_half
def test_the_function(dtype: torch.dtype) -> None:
    x = torch.randn(2, 3, 20, dtype=dtype).requires_grad_()
    with fastseq.use_backend("triton"):
        y = bias_activation(x, torch.zeros(20, dtype=torch.float32))
        torch.testing.assert_close(y, F.gelu(x))
        torch.testing.assert_close(
            *(torch.autograd.grad(t.float().sum(), x) for t in (y, F.gelu(x))), rtol=1e-2, atol=1e-2
        )
