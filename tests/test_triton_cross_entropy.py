"""Cross entropy's Triton kernels on the CPU, in Triton's interpreter: the tests of every implementation.

`make test` runs these in a process of their own, with TRITON_INTERPRET=1.
"""

from collections.abc import Callable, Iterator

import pytest
import test_cross_entropy as shared
import torch
from conftest import name_of

import fastseq
from fastseq import jit
from fastseq.functional import cross_entropy
from fastseq.ops.cross_entropy import CASES, TABLE, Case

if not jit.is_interpreted():
    pytest.skip("the interpreter is off: TRITON_INTERPRET=1 is not set", allow_module_level=True)

TRITON = next(impl for impl in TABLE.impls if impl.name == "triton")

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")  # of NumPy, where a logarithm is -inf


@pytest.fixture(autouse=True)
def _poisoned() -> Iterator[None]:
    """Fills what torch.empty gives with NaN, so that an element that a kernel forgot cannot pass for a zero."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=name_of)
@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_outputs_and_gradients(case: Case, dtype: torch.dtype) -> None:
    shared.test_outputs_and_gradients(TRITON, dtype, case)


@pytest.mark.parametrize("bad", shared.BAD)
@pytest.mark.parametrize("case", [Case(8, 300), Case(4, 9001, smoothing=0.1)], ids=name_of)
def test_what_is_not_finite_is_as_in_torch(case: Case, bad: float) -> None:
    shared.test_what_is_not_finite_is_as_in_torch(TRITON, bad, case, torch.float32)


@pytest.mark.parametrize("change", [lambda t: t[::2], lambda t: t[:1].expand(5, -1), lambda t: t.T.contiguous().T])
def test_any_strides(change: Callable) -> None:
    shared.test_any_strides(TRITON, change)


@pytest.mark.parametrize("wrong", [-1, 300, 2**40, -(2**40)])
@pytest.mark.parametrize("weighted", [False, True])
def test_targets_that_are_no_class_give_nan(wrong: int, weighted: bool) -> None:
    """On a GPU nobody checks them first: nothing may be read there, and nothing may look right."""
    arguments = Case(4, 300, weight=weighted, smoothing=0.1).arguments("cpu", torch.float32)
    arguments.target[1] = wrong
    loss, lse = TRITON.kernel.forward(*arguments)
    dlogits = shared.backward(TRITON.kernel, torch.ones_like(loss), arguments, lse)
    expected = torch.tensor([False, True, False, False])
    assert torch.equal(loss.isnan(), expected) and torch.equal(dlogits.isnan(), expected[:, None].expand(4, 300))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
def test_the_function(dtype: torch.dtype) -> None:
    leaf, target = torch.randn(2, 5, 40).to(dtype).requires_grad_(), torch.randint(40, (2, 5))
    results = []
    for backend in ("triton", "reference"):
        with fastseq.use_backend(backend):
            loss = cross_entropy(leaf.transpose(1, 2), target, label_smoothing=0.1)
            results.append([loss, *torch.autograd.grad(loss, leaf)])
    torch.testing.assert_close(*results)
