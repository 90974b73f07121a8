"""The attention decoder's Triton kernels on the CPU, in Triton's interpreter: the tests of every implementation, on
fewer cases.

`make test` runs these in a process of their own, with TRITON_INTERPRET=1.
"""

from collections.abc import Iterator

import pytest
import test_attention_decoder_ops as shared
import torch
from conftest import assert_no_worse, name_of, require_native
from torch import Tensor

from fastseq import jit
from fastseq.ops.attention_decoder import SELF_CHECK_CASES, TABLE, Case, Outputs, grads_like, written
from fastseq.ops.contract import widened
from fastseq.reference import attention_decoder as reference

if not jit.is_interpreted():
    pytest.skip("the interpreter is off: TRITON_INTERPRET=1 is not set", allow_module_level=True)

TRITON = next(impl for impl in TABLE.impls if impl.name == "triton")


@pytest.fixture(autouse=True)
def _poisoned() -> Iterator[None]:
    """Fills what torch.empty gives with NaN, so that an element that a kernel forgot cannot pass for a zero."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


# One of each feature; several blocks of places, of columns and of the softmax's chunks, with tails.
EVERYTHING = [
    Case(3, 3, 21, 20, 17, A=70, cell="gru", absent=True, lengths=True),
    Case(3, 3, 21, 20, 17, F=9, cell="lstm", absent=True, lengths=True),
    Case(3, 3, 21, 10, 17, A=70, F=9, cell="rnn", absent=True, lengths=True),
]
CASES = [
    *SELF_CHECK_CASES[:2],
    *EVERYTHING,
    *(Case(2, 2, 9, 13, 11, A, F, cell) for A in (0, 10) for F in (0, 12) for cell in ("lstm", "gru", "rnn")),
    Case(2, 2, 300, 18, 70, F=20, absent=True),
    Case(1, 17, 5, 8, 10, A=140, bias=False),
    Case(3, 2, 1, 17, 9, A=9, lengths=True),
    Case(3, 1, 5, 1, 1, F=1, batch_first=True),
    Case(4, 0, 5, 6, 7, A=8),
    Case(4, 0, 5, 6, 7, F=8, cell="lstm", absent=True, lengths=True),
]


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_forward_tape_and_backward(case: Case) -> None:
    shared.test_forward_tape_and_backward(TRITON, torch.float32, case, 1)


@pytest.mark.parametrize("case", EVERYTHING, ids=name_of)
def test_half_precision_is_no_worse_than_the_reference_in_it(case: Case) -> None:
    """Sums and states are float32 in the kernels, and half in the reference.

    Only in float16: the interpreter cuts digits off instead of rounding to bfloat16, which makes errors twice as large.
    """
    arguments = case.arguments("cpu", torch.float16)
    wide = widened(arguments)
    exact = Outputs(*reference.forward(*wide, True))
    tapes = [Outputs(*of.forward(*arguments, True)) for of in (TRITON.kernel, reference)]

    def there(outputs: Outputs) -> list[Tensor]:
        parts = (written(name, t, arguments) for name, t in zip(Outputs._fields, outputs, strict=True))
        return [t for t in parts if t.numel()]

    assert_no_worse(*map(there, (*tapes, exact)))
    grads = [None if g is None else g.half() for g in grads_like(exact)]
    wide_grads = [None if g is None else g.double() for g in grads]
    calls = ((TRITON.kernel, grads, arguments, tapes[0]), (reference, grads, arguments, tapes[1]))
    found = [shared.backward(*call) for call in (*calls, (reference, wide_grads, wide, exact))]
    assert_no_worse(*([g for g in of_one if g.numel()] for of_one in found))


def test_bfloat16_is_no_worse_than_rounding() -> None:
    shared.test_half_precision_is_no_worse_than_rounding(TRITON)


@pytest.mark.parametrize("case", EVERYTHING, ids=name_of)
def test_tapes_mix_with_the_extensions(case: Case) -> None:
    require_native()
    cpp = next(impl for impl in TABLE.impls if impl.name == "cpp").kernel
    arguments = case.arguments("cpu", torch.float32)
    tapes = [Outputs(*of.forward(*arguments, True)) for of in (TRITON.kernel, cpp)]
    grads = grads_like(tapes[1])
    want = shared.backward(cpp, grads, arguments, tapes[1])
    shared.assert_gradients(shared.backward(TRITON.kernel, grads, arguments, tapes[1]), want)
    shared.assert_gradients(shared.backward(cpp, grads, arguments, tapes[0]), want)


@pytest.mark.parametrize("case", [Case(13, 2, 7, 6, 5, A=4), Case(13, 2, 7, 6, 5, F=8, cell="lstm")], ids=name_of)
def test_split_run_equals_whole(case: Case) -> None:
    shared.test_split_run_equals_whole(TRITON, case)


@pytest.mark.parametrize("looks", [dict(A=5), dict(F=8), dict(A=5, F=8), dict()])
def test_padding_is_never_read(looks: dict[str, int]) -> None:
    shared.test_padding_is_never_read(TRITON, looks)


def test_nothing_to_look_at_and_no_step() -> None:
    shared.test_nothing_to_look_at_and_no_step(TRITON)


def test_only_needed_gradients() -> None:
    shared.test_only_needed_gradients(TRITON)


def test_non_contiguous_everything() -> None:
    shared.test_non_contiguous_everything(TRITON)


@pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")  # of NumPy, where there is NaN
def test_nan_stays_in_its_row() -> None:
    arguments = Case(4, 3, 6, 20, 9, A=7).arguments("cpu", torch.float32)
    arguments.keys[1, 1, 0] = float("nan")
    ours, theirs = (of.forward(*arguments, True) for of in (TRITON.kernel, reference))
    torch.testing.assert_close(ours, theirs, equal_nan=True)
