"""fastseq.nn's recurrent modules beside torch.nn's: the same results, gradients, errors and life cycle."""

import copy
import io
import itertools
import pickle
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import device_of, name_of, require, require_kernel
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.utils import prune as prune_utils
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pack_sequence, pad_packed_sequence
from torch.utils.checkpoint import checkpoint

import fastseq
from fastseq.ops.lstm import LSTM
from fastseq.ops.recurrent import Arguments

OPTIONS = [
    dict(),
    dict(num_layers=3, bidirectional=True),
    dict(num_layers=2, batch_first=True, bias=False),
    dict(bidirectional=True, batch_first=True),
]
KINDS = ["LSTM", "GRU", "RNN"]
# What there is beyond options that all modules have.
OWN_OPTIONS = [
    ("RNN", dict(nonlinearity="relu", num_layers=2)),
    ("LSTM", dict(proj_size=4)),
    ("LSTM", dict(proj_size=4, num_layers=3, bidirectional=True, batch_first=True)),
]
EVERY = [*itertools.product(KINDS, OPTIONS), *OWN_OPTIONS]
States = Tensor | tuple[Tensor, Tensor] | None

# What serves on CPUs; all tables have the same.
KERNELS = [impl for impl in LSTM.table.impls if impl.name != "reference" and device_of(impl) == "cpu"]

each_kind = pytest.mark.parametrize("kind", KINDS)
each_module = pytest.mark.parametrize(("kind", "options"), EVERY, ids=str)


@pytest.fixture(params=KERNELS, ids=name_of)
def served(request: pytest.FixtureRequest) -> Iterator[None]:
    """Each kernel serves in turn."""
    require(LSTM.table, request.param, "cpu", torch.float32)
    with fastseq.use_backend(request.param.name):
        yield


def pair(*args, kind: str = "LSTM", **kwargs) -> tuple[nn.RNNBase, nn.RNNBase]:
    theirs = getattr(nn, kind)(*args, **kwargs)
    ours = getattr(fastseq.nn, kind)(*args, **kwargs)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def states(module: nn.RNNBase, batch: int | None, dtype: torch.dtype = torch.float32) -> States:
    rows = module.num_layers * (2 if module.bidirectional else 1)
    batch_of = () if batch is None else (batch,)
    h = torch.randn((rows, *batch_of, module.proj_size or module.hidden_size), dtype=dtype)
    return (h, torch.randn((rows, *batch_of, module.hidden_size), dtype=dtype)) if module.mode == "LSTM" else h


def flat(value: object) -> list[Tensor]:
    """All tensors in a module's output."""
    if isinstance(value, PackedSequence):
        return [value.data]
    return [value] if isinstance(value, Tensor) else [t for part in value for t in flat(part)]


def leaf(value: States) -> States:
    if value is None:
        return None
    return value.detach().requires_grad_() if isinstance(value, Tensor) else tuple(leaf(v) for v in value)


def run(module: nn.RNNBase, x: Tensor, hx: States, pack=lambda x: x, **options) -> list[Tensor]:
    """Outputs, and gradients of everything that can have one."""
    x, hx = leaf(x), leaf(hx)
    outputs = flat(module(pack(x), hx, **options))
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(t.shape, generator=generator, dtype=t.dtype) for t in outputs]
    loss = sum((t * w).sum() for t, w in zip(outputs, weights, strict=True))
    leaves = [x, *([] if hx is None else flat(hx)), *module.parameters()]
    return [*outputs, *torch.autograd.grad(loss, leaves)]


def assert_same(theirs: list[Tensor], ours: list[Tensor]) -> None:
    for want, got in zip(theirs, ours, strict=True):
        # Gradients are sums over all steps and rows, added in another order than torch's.
        torch.testing.assert_close(got, want, rtol=1e-4, atol=2e-5)


@each_module
@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize("batch", [None, 1, 5])
@pytest.mark.usefixtures("served")
def test_results_and_gradients(kind: str, options: dict, with_state: bool, batch: int | None) -> None:
    theirs, ours = pair(7, 11, kind=kind, **options)
    shape = (6, 7) if batch is None else (batch, 6, 7) if theirs.batch_first else (6, batch, 7)
    hx = states(theirs, batch) if with_state else None
    x = torch.randn(shape)
    assert_same(run(theirs, x, hx), run(ours, x, hx))


@each_module
@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize("lengths", [[6, 6, 4, 1], [2, 6, 1, 5], [3, 3, 3, 3]], ids=str)
@pytest.mark.usefixtures("served")
def test_packed_input(kind: str, options: dict, with_state: bool, lengths: list[int]) -> None:
    theirs, ours = pair(7, 11, kind=kind, **options)
    x, hx = torch.randn((4, 6, 7) if theirs.batch_first else (6, 4, 7)), states(theirs, 4) if with_state else None

    def pack(x: Tensor) -> PackedSequence:
        ordered = lengths == sorted(lengths, reverse=True)
        return pack_padded_sequence(x, lengths, batch_first=theirs.batch_first, enforce_sorted=ordered)

    packed = ours(pack(x), hx)[0]
    assert_same(run(theirs, x, hx, pack), run(ours, x, hx, pack))
    want = theirs(pack(x), hx)[0]
    for field in ("batch_sizes", "sorted_indices", "unsorted_indices"):
        assert (getattr(packed, field) is None) == (getattr(want, field) is None)
        if getattr(want, field) is not None:
            assert torch.equal(getattr(packed, field), getattr(want, field))


@each_module
def test_lengths_do_what_packing_does(kind: str, options: dict) -> None:
    theirs, ours = pair(7, 11, kind=kind, **options)
    x, hx = torch.randn((4, 6, 7) if theirs.batch_first else (6, 4, 7)), states(theirs, 4)
    lengths = torch.tensor([2, 6, 1, 5])

    class Packing(nn.Module):
        def forward(self, x: Tensor, hx: States) -> tuple:
            packed = pack_padded_sequence(x, lengths, batch_first=theirs.batch_first, enforce_sorted=False)
            y, h = theirs(packed, hx)
            return pad_packed_sequence(y, batch_first=theirs.batch_first)[0], h

    packing = Packing()
    packing.parameters = theirs.parameters
    for dtype in (torch.int64, torch.int32):
        assert_same(run(packing, x, hx), run(ours, x, hx, lengths=lengths.to(dtype)))


@each_module
def test_resets_are_runs_of_the_pieces(kind: str, options: dict) -> None:
    if options.get("bidirectional") and options.get("num_layers", 1) > 1:
        pytest.skip("the state that a second layer starts from has no name in a run of the pieces")
    theirs, ours = pair(7, 11, kind=kind, **options)
    D = 2 if theirs.bidirectional else 1
    x = torch.randn(1, 6, 7) if theirs.batch_first else torch.randn(6, 1, 7)
    time = 1 if theirs.batch_first else 0
    reset = torch.zeros(x.shape[:2], dtype=torch.bool)
    reset.select(time, 4).fill_(True)
    first, second = x.split([4, 2], time)
    y1, h1 = theirs(first)
    y2, h2 = theirs(second)
    y, h = ours(x, reset=reset)
    torch.testing.assert_close(y, torch.cat([y1, y2], time))
    for got, one, two in zip(flat(h), flat(h1), flat(h2), strict=True):
        want = two if D == 1 else torch.stack([two[0], one[1]])
        torch.testing.assert_close(got, want)
    if D == 1:
        anew = states(theirs, 1)
        y2, h2 = theirs(second, anew)
        y, final = ours(x, reset=reset, reset_state=anew)
        torch.testing.assert_close(y, torch.cat([y1, y2], time))
        torch.testing.assert_close(flat(final), flat(h2))


@pytest.mark.parametrize("options", [*OPTIONS, dict(proj_size=3)], ids=str)
def test_cell_sequence(options: dict) -> None:
    _, ours = pair(7, 11, **options)
    x = torch.randn((4, 6, 7) if ours.batch_first else (6, 4, 7)).requires_grad_()
    y, (_, c), cells = ours(x, return_cell_sequence=True)
    D = 2 if ours.bidirectional else 1
    assert cells.shape == (*y.shape[:2], D * 11)
    with torch.no_grad():
        torch.testing.assert_close(ours(x, return_cell_sequence=True)[2], cells)
    time_first = cells.transpose(0, 1) if ours.batch_first else cells
    torch.testing.assert_close(time_first[-1, :, :11], c[-D])
    if D == 2:
        torch.testing.assert_close(time_first[0, :, 11:], c[-1])
    if ours.num_layers == 1 and D == 1:  # c_t is c_n of a run up to t
        for t in range(6):
            torch.testing.assert_close(ours(x[: t + 1])[1][1][0], cells[t])
    grad = torch.autograd.grad(cells.sum(), x)[0]
    eps = torch.randn_like(x) * 1e-3
    change = (ours(x + eps, return_cell_sequence=True)[2] - ours(x - eps, return_cell_sequence=True)[2]).sum()
    torch.testing.assert_close(2 * (grad * eps).sum(), change, rtol=1e-2, atol=1e-5)
    packed = pack_sequence([torch.randn(5, 7), torch.randn(3, 7)])
    output, _, cells = ours(packed, return_cell_sequence=True)
    assert isinstance(cells, PackedSequence) and cells.data.shape[0] == output.data.shape[0]


@each_kind
def test_outputs_have_torchs_strides(kind: str) -> None:
    theirs, ours = pair(7, 11, kind=kind, batch_first=True)
    x = torch.randn(3, 6, 7)
    assert ours(x)[0].stride() == theirs(x)[0].stride()


@each_kind
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("packed", [False, True])
def test_dropout_between_layers_takes_torchs_random_stream(kind: str, training: bool, packed: bool) -> None:
    theirs, ours = pair(7, 11, kind=kind, num_layers=3, dropout=0.5)
    x = torch.randn(6, 4, 7)
    theirs.train(training), ours.train(training)
    pack = (lambda x: pack_padded_sequence(x, [6, 5, 2, 1])) if packed else (lambda x: x)
    torch.manual_seed(3)
    want = run(theirs, x, None, pack)
    torch.manual_seed(3)
    assert_same(want, run(ours, x, None, pack))


CELLS = [("LSTMCell", {}), ("GRUCell", {}), ("RNNCell", {}), ("RNNCell", dict(nonlinearity="relu"))]


@pytest.mark.parametrize(("kind", "options"), CELLS, ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("batch", [None, 1, 5])
@pytest.mark.usefixtures("served")
def test_cells(kind: str, options: dict, bias: bool, batch: int | None) -> None:
    theirs, ours = pair(7, 11, kind=kind, bias=bias, **options)
    rows = () if batch is None else (batch,)
    x = torch.randn(*rows, 7)
    for given in (None, torch.randn(*rows, 11)):
        hx = (given, torch.randn(*rows, 11)) if kind == "LSTMCell" and given is not None else given
        assert_same(run(theirs, x, hx), run(ours, x, hx))


@pytest.mark.parametrize(("kind", "options"), CELLS, ids=str)
@pytest.mark.usefixtures("nothing_asked_for")
def test_large_cells_are_ours_and_small_ones_torchs(kind: str, options: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    require_kernel(LSTM.table, "cpu", torch.float32)
    for size, mine in ((16, False), (800, True)):
        theirs, ours = pair(size, size, kind=kind, **options)
        called = []
        monkeypatch.setattr(type(ours.op), "at_once", spying(called, type(ours.op).at_once))
        x = torch.randn(1, size)
        assert_same(run(theirs, x, None), run(ours, x, None))
        monkeypatch.undo()
        assert bool(called) == mine


@pytest.mark.parametrize(("kind", "options"), CELLS, ids=str)
@pytest.mark.parametrize("missing", ["weight_ih", "weight_hh"])
def test_a_cell_without_a_weight_says_what_torchs_says(kind: str, options: dict, missing: str) -> None:
    theirs, ours = pair(64, 64, kind=kind, **options)
    messages = []
    for cell in (theirs, ours):
        setattr(cell, missing, None)
        with torch.no_grad(), pytest.raises(TypeError) as raised:
            cell(torch.randn(64, 64))
        messages.append(str(raised.value))
    assert messages[0] == messages[1]


def spying(called: list, function):
    def spy(*args, **kwargs):
        called.append(args)
        return function(*args, **kwargs)

    return spy


@each_kind
@pytest.mark.parametrize("cell", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.usefixtures("served")
def test_half_precision_is_at_least_half_as_exact_again_as_torch(kind: str, cell: bool, dtype: torch.dtype) -> None:
    kind += "Cell" * cell
    theirs, ours = pair(24, 33, kind=kind, dtype=dtype)
    exact = getattr(nn, kind)(24, 33).double()
    exact.load_state_dict(theirs.state_dict())
    x = torch.randn(*(() if cell else (40,)), 5, 24).to(dtype)
    got = run(ours, x, None)
    want = run(exact, x.double(), None)
    # torch.randn differs between dtypes: the exact run weighs its outputs like ours.
    outputs = len(flat(ours(x)))
    for module in (theirs, ours):
        assert all(t.dtype == dtype for t in flat(module(x)))
    for mine, its, right in zip(got[:outputs], flat(theirs(x)), want[:outputs], strict=True):
        assert (mine - right).abs().max() <= 2 * (its - right).abs().max()


@pytest.mark.parametrize("kind", [*KINDS, "LSTMCell", "GRUCell", "RNNCell"])
def test_autocast_gives_torchs_dtypes(kind: str) -> None:
    theirs, ours = pair(7, 11, kind=kind)
    x = torch.randn(*((3,) if "Cell" in kind else (6, 3)), 7)
    want_values = flat(theirs(x))
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype=dtype):
            got = flat(ours(x))
            # oneDNN refuses nn.LSTM under autocast on machines without bf16 instructions: what it gives elsewhere.
            want_dtype = dtype if kind == "LSTM" else flat(theirs(x))[0].dtype
            low = flat(ours(x.to(dtype)))  # as from a layer before
        assert [t.dtype for t in got] == [want_dtype] * len(got) == [t.dtype for t in low]
        for mine, right in zip(got, want_values, strict=True):
            torch.testing.assert_close(mine.float(), right, rtol=2e-2, atol=2e-2)
        sum(t.float().sum() for t in got).backward()
        assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in ours.parameters())
    with torch.autocast("cpu"):  # leaves float64 alone
        assert flat(ours.double()(x.double()))[0].dtype == torch.float64


@pytest.mark.parametrize("kind", KINDS)
def test_autocast_takes_a_low_state_beside_lengths(kind: str) -> None:
    _, ours = pair(7, 11, kind=kind)
    x, lengths, h = torch.randn(6, 3, 7), torch.tensor([6, 2, 4]), torch.randn(1, 3, 11).to(torch.bfloat16)
    state = (h, h) if kind == "LSTM" else h
    wide = (h.float(), h.float()) if kind == "LSTM" else h.float()
    with torch.autocast("cpu", dtype=torch.bfloat16):  # as from a dense layer before
        got = flat(ours(x, state, lengths=lengths))
    for low, right in zip(got, flat(ours(x, wide, lengths=lengths)), strict=True):
        torch.testing.assert_close(low.float(), right, rtol=2e-2, atol=2e-2)


def hidden(*shape: int) -> Tensor:
    return torch.zeros(shape)


BAD_CALLS = {
    "1-D": lambda m: m(torch.randn(7)),
    "4-D": lambda m: m(torch.randn(2, 2, 2, 7)),
    "wrong input size": lambda m: m(torch.randn(5, 3, 8)),
    "no steps": lambda m: m(torch.randn(0, 3, 7)),
    "wrong dtype": lambda m: m(torch.randn(5, 3, 7, dtype=torch.float64)),
    "integers": lambda m: m(torch.ones(5, 3, 7, dtype=torch.int64)),
    "2-D state": lambda m: m(torch.randn(5, 3, 7), (hidden(1, 11), hidden(1, 11))),
    "3-D state for 2-D input": lambda m: m(torch.randn(5, 7), (hidden(1, 1, 11), hidden(1, 1, 11))),
    "wrong h": lambda m: m(torch.randn(5, 3, 7), (hidden(1, 4, 11), hidden(1, 3, 11))),
    "wrong c": lambda m: m(torch.randn(5, 3, 7), (hidden(1, 3, 11), hidden(1, 3, 12))),
    "too many layers in the state": lambda m: m(torch.randn(5, 3, 7), (hidden(2, 3, 11), hidden(2, 3, 11))),
    "state of another dtype": lambda m: m(torch.randn(5, 3, 7), (hidden(1, 3, 11).double(), hidden(1, 3, 11).double())),
    "packed, wrong input size": lambda m: m(pack_sequence([torch.randn(5, 8), torch.randn(3, 8)])),
    "packed, wrong dtype": lambda m: m(pack_sequence([torch.randn(5, 7).double()])),
    "a lone h": lambda m: m(torch.randn(5, 3, 7), hidden(1, 3, 11)),
    "a pair of a pair": lambda m: m(torch.randn(5, 3, 7), [hidden(1, 3, 11)]),
    "a list": lambda m: m([1.0, 2.0]),
    "nothing": lambda m: m(None),
    "sparse": lambda m: m(torch.randn(5, 3, 7).to_sparse()),
    "meta input": lambda m: m(torch.randn(5, 3, 7, device="meta")),
}


# The same for cells, whose input is [B, I].
BAD_CELL_CALLS = {
    "3-D": lambda m: m(torch.randn(2, 2, 7)),
    "0-D": lambda m: m(torch.tensor(1.0)),
    "wrong input size": lambda m: m(torch.randn(3, 8)),
    "wrong dtype": lambda m: m(torch.randn(3, 7, dtype=torch.float64)),
    "integers": lambda m: m(torch.ones(3, 7, dtype=torch.int64)),
    "a lone h": lambda m: m(torch.randn(3, 7), hidden(3, 11)),
    "wrong h": lambda m: m(torch.randn(3, 7), hidden(4, 11)),
    "wrong h size": lambda m: m(torch.randn(3, 7), hidden(3, 12)),
    "3-D h": lambda m: m(torch.randn(3, 7), hidden(1, 3, 11)),
    "wrong pair": lambda m: m(torch.randn(3, 7), (hidden(4, 11), hidden(3, 11))),
    "wrong c": lambda m: m(torch.randn(3, 7), (hidden(3, 11), hidden(3, 12))),
    "1-D pair": lambda m: m(torch.randn(7), (hidden(1, 11), hidden(1, 11))),
    "a list": lambda m: m([1.0, 2.0]),
    "nothing": lambda m: m(None),
    "meta input": lambda m: m(torch.randn(3, 7, device="meta")),
}
EVERY_BAD_CALL = [
    *((kind, name, call) for kind in KINDS for name, call in BAD_CALLS.items()),
    *((kind, name, call) for kind in ("LSTMCell", "GRUCell", "RNNCell") for name, call in BAD_CELL_CALLS.items()),
]


@pytest.mark.parametrize(
    ("kind", "call"), [(kind, call) for kind, _, call in EVERY_BAD_CALL], ids=[f"{k}-{n}" for k, n, _ in EVERY_BAD_CALL]
)
@pytest.mark.usefixtures("nothing_asked_for")
def test_errors_are_torchs(kind: str, call) -> None:
    theirs, ours = pair(7, 11, kind=kind)
    outcomes = []
    for module in (theirs, ours):
        try:
            outcomes.append([t.shape for t in flat(call(module))])
        except Exception as error:
            outcomes.append((type(error), str(error)))
    if kind == "LSTM":
        assert isinstance(outcomes[0], tuple)  # all of these are errors there
    assert outcomes[1] == outcomes[0]
    x = torch.randn(3, 7) if "Cell" in kind else torch.randn(5, 3, 7)
    torch.testing.assert_close(flat(ours(x)), flat(theirs(x)))  # and the next call works


BAD_OPTIONS = [
    (dict(lengths=[1, 2, 3]), TypeError, "lengths must be a torch.Tensor, got list"),
    (dict(lengths=torch.ones(3)), ValueError, "lengths must be integers, got torch.float32"),
    (dict(lengths=torch.tensor([1, 2, 3]) * 1j), ValueError, "lengths must be integers, got torch.complex64"),
    (dict(lengths=torch.tensor([1, 2])), ValueError, r"lengths must be \[3\], one for each row, got \[2\]"),
    (dict(lengths=torch.tensor([1, 2, 6])), ValueError, "lengths must be between 0 and T=5, got 1 to 6"),
    (dict(reset=torch.zeros(3, 5, dtype=torch.bool)), ValueError, r"reset must be torch.bool \[5, 3\]"),
    (dict(reset=torch.zeros(5, 3)), ValueError, "reset must be torch.bool"),
    (dict(reset_state=torch.zeros(1, 3, 11)), ValueError, "it needs reset"),
    (dict(reset=torch.zeros(5, dtype=torch.bool)), ValueError, r"reset must be torch.bool \[5, 3\]"),
    (dict(reset=torch.zeros(5, 3, dtype=torch.bool), reset_state=3), TypeError, "reset_state must"),
    (
        dict(reset=torch.zeros(5, 3, dtype=torch.bool), reset_state=[hidden(2, 3, 11)] * 2),
        (TypeError, ValueError),
        "reset_state",
    ),
]


@each_kind
@pytest.mark.parametrize(("options", "error", "message"), BAD_OPTIONS)
def test_bad_options_name_the_argument(kind: str, options: dict, error: type[Exception], message: str) -> None:
    theirs, ours = pair(7, 11, kind=kind)
    x = torch.randn(5, 3, 7)
    with pytest.raises(error, match=message):
        ours(x, **options)
    if "lengths" in options or "reset" in options:
        with pytest.raises((TypeError, ValueError), match=r"cannot be given with packed input|must|needs reset"):
            ours(pack_sequence([torch.randn(5, 7)]), **options)
    torch.testing.assert_close(flat(ours(x)), flat(theirs(x)))


@each_kind
def test_packed_input_with_a_wrong_state_is_an_error(kind: str) -> None:
    """Not so in torch, which reads past the state's end."""
    _, ours = pair(7, 11, kind=kind)
    for shape in ((1, 1, 12), (1, 2, 11)):
        hx = (hidden(*shape), hidden(*shape)) if kind == "LSTM" else hidden(*shape)
        with pytest.raises(RuntimeError, match=r"Expected hidden(\[0\])? size \(1, 1, 11\), got"):
            ours(pack_sequence([torch.randn(5, 7)]), hx)


def test_cells_past_a_length_are_zeros() -> None:
    _, ours = pair(7, 11, num_layers=2)
    lengths = torch.tensor([5, 2, 0])
    cells = ours(torch.randn(5, 3, 7), lengths=lengths, return_cell_sequence=True)[2]
    past = torch.arange(5).unsqueeze(-1) >= lengths
    assert not cells[past].any() and cells[~past].all()


@each_kind
def test_compiling_with_packed_input_and_with_lengths(kind: str) -> None:
    torch._dynamo.reset()
    layer = fastseq.accelerate(getattr(nn, kind)(4, 6))
    x, lengths = torch.randn(5, 3, 4), torch.tensor([5, 2, 3])
    packed = pack_padded_sequence(x, lengths, enforce_sorted=False)
    got, want = torch.compile(layer, backend="eager")(packed), layer(packed)
    torch.testing.assert_close(flat(got), flat(want))
    assert torch.equal(got[0].unsorted_indices, want[0].unsorted_indices)
    compiled = torch.compile(lambda x: layer(x, lengths=lengths), fullgraph=True, backend="eager")
    torch.testing.assert_close(flat(compiled(x)), flat(layer(x, lengths=lengths)))


def test_only_the_lstm_has_a_cell_sequence() -> None:
    with pytest.raises(TypeError, match="return_cell_sequence"):
        fastseq.nn.GRU(7, 11)(torch.randn(5, 3, 7), return_cell_sequence=True)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_empty_batch(options: dict) -> None:
    theirs, ours = pair(7, 11, **options)
    x = torch.randn(0, 6, 7) if theirs.batch_first else torch.randn(6, 0, 7)
    y, (h, c) = ours(x)
    want = theirs(x)
    assert (y.shape, h.shape, c.shape) == (want[0].shape, want[1][0].shape, want[1][1].shape)
    y.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in ours.parameters())


def test_nan_and_inf_in_the_input() -> None:
    theirs, ours = pair(7, 11, num_layers=2)
    x = torch.randn(6, 3, 7)
    x[2, 0, 1], x[1, 1, 2], x[4, 2, 3] = float("nan"), float("inf"), -float("inf")
    torch.testing.assert_close(ours(x), theirs(x), equal_nan=True)


def test_copy_pickle_and_state_dict() -> None:
    theirs, ours = pair(7, 11, num_layers=2, bidirectional=True)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert repr(ours) == repr(theirs)
    x = torch.randn(6, 3, 7)
    want = ours(x)
    saved = io.BytesIO()
    torch.save(ours, saved)
    saved.seek(0)
    for other in (
        copy.deepcopy(ours),
        copy.copy(ours),
        pickle.loads(pickle.dumps(ours)),
        torch.load(saved, weights_only=False),
    ):
        assert type(other) is fastseq.nn.LSTM
        torch.testing.assert_close(other(x), want)
    back = nn.LSTM(7, 11, num_layers=2, bidirectional=True)
    back.load_state_dict(ours.state_dict())
    torch.testing.assert_close(back(x), want)


def test_weights_changed_between_calls_are_never_stale() -> None:
    theirs, ours = pair(7, 11)
    x = torch.randn(6, 3, 7)
    ours(x)
    changes = [
        lambda m: m.weight_hh_l0.data.mul_(0.5),
        lambda m: setattr(m, "weight_ih_l0", nn.Parameter(m.weight_ih_l0.detach() * 2)),
        lambda m: m.weight_hh_l0.data.copy_(torch.linspace(-1, 1, 44 * 11).view(44, 11)),
        lambda m: setattr(m.bias_ih_l0, "data", torch.linspace(-1, 1, 44)),
    ]
    for change in changes:
        change(theirs), change(ours)
        torch.testing.assert_close(ours(x), theirs(x))
    other = {name: torch.randn_like(p) for name, p in ours.named_parameters()}
    torch.testing.assert_close(
        torch.func.functional_call(ours, other, (x,)), torch.func.functional_call(theirs, other, (x,))
    )


def test_frozen_weights_get_no_gradient() -> None:
    theirs, ours = pair(7, 11, num_layers=2)
    for module in (theirs, ours):
        module.weight_hh_l0.requires_grad_(False)
        module.bias_ih_l1.requires_grad_(False)
        module(torch.linspace(-1, 1, 6 * 3 * 7).view(6, 3, 7))[0].sum().backward()
    for want, got in zip(theirs.parameters(), ours.parameters(), strict=True):
        assert (got.grad is None) == (want.grad is None)
        if want.grad is not None:
            torch.testing.assert_close(got.grad, want.grad, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("change", [torch.relu_, lambda y: y.mul_(2), lambda y: y[3:].zero_()])
@each_kind
def test_outputs_may_be_changed_in_place(kind: str, change) -> None:
    theirs, ours = pair(7, 11, kind=kind, bidirectional=True, num_layers=2)
    x, results = torch.randn(6, 3, 7), []
    for module in (theirs, ours):
        y, _ = module(x)
        change(y)
        results.append(torch.autograd.grad(y.square().sum(), module.parameters()))
    assert_same(*results)


@each_kind
def test_gradients_per_sample(kind: str) -> None:
    from torch.nn.utils._per_sample_grad import call_for_per_sample_grads

    theirs, ours = pair(7, 11, kind=kind, batch_first=True, dtype=torch.float64)
    x = torch.randn(3, 6, 7, dtype=torch.float64)
    for module in (theirs, ours):
        call_for_per_sample_grads(module, batch_first=True)(x)[0].sum().backward()
    assert_same([p.grad_sample for p in theirs.parameters()], [p.grad_sample for p in ours.parameters()])


@pytest.mark.parametrize("kind", [*KINDS, "LSTMCell", "GRUCell", "RNNCell"])
def test_scripting_takes_torchs_module(kind: str) -> None:
    theirs, ours = pair(7, 11, kind=kind)
    model = nn.Sequential(nn.Linear(7, 7), ours)
    x = torch.randn(*((3,) if "Cell" in kind else (6, 3)), 7)
    scripted = torch.jit.script(model)
    torch.testing.assert_close(flat(scripted(x)), flat(theirs(model[0](x))))
    # torch puts what it scripts in the layer's place: the same parameters, but torch's class until the next accelerate.
    assert type(model[1]) is getattr(nn, kind)
    assert type(fastseq.accelerate(model)[1]) is getattr(fastseq.nn, kind)
    (ours.weight_hh if "Cell" in kind else ours.weight_hh_l0).data.zero_()
    torch.testing.assert_close(flat(scripted(x)), flat(model(x)))


@each_kind
def test_reparametrized_weights(kind: str) -> None:
    x = torch.randn(6, 3, 7)

    def weight_norm(m: nn.Module) -> None:
        torch.nn.utils.parametrizations.weight_norm(m, "weight_hh_l0")

    def old_weight_norm(m: nn.Module) -> None:
        torch.nn.utils.weight_norm(m, "weight_hh_l0")

    def prune(m: nn.Module) -> None:
        prune_utils.l1_unstructured(m, "weight_ih_l0", amount=0.5)

    def tie(m: nn.Module) -> None:
        m.weight_hh_l1 = m.weight_hh_l0

    def freeze(m: nn.Module) -> None:
        m.requires_grad_(False)

    for change in (weight_norm, old_weight_norm, prune, tie):
        theirs, ours = pair(7, 11, kind=kind, num_layers=2)
        for module in (theirs, ours):
            change(module)
        assert_same(run(theirs, x, None), run(ours, x, None))
        optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (theirs, ours)]
        for module, optimizer in zip((theirs, ours), optimizers, strict=True):
            module(x)[0].square().sum().backward()
            optimizer.step()
        torch.testing.assert_close(flat(ours(x)), flat(theirs(x)))  # with the weights of after the step
    theirs, ours = pair(7, 11, kind=kind)
    freeze(ours)
    leaf_x = x.clone().requires_grad_()
    ours(leaf_x)[0].sum().backward()
    assert leaf_x.grad is not None and all(p.grad is None for p in ours.parameters())


@each_kind
@pytest.mark.usefixtures("nothing_asked_for")
def test_other_ways_to_hold_weights(kind: str) -> None:
    theirs, ours = pair(7, 11, kind=kind, num_layers=2)
    x = torch.randn(6, 3, 7)
    want = flat(theirs(x))
    ours.flatten_parameters()
    torch.testing.assert_close(flat(ours(x)), want)
    replica = ours._replicate_for_data_parallel()  # as DataParallel does it
    for name, p in ours.named_parameters():
        setattr(replica, name, p.detach())
    torch.testing.assert_close(flat(replica(x)), want)
    empty = getattr(fastseq.nn, kind)(7, 11, num_layers=2, device="meta")
    assert empty(torch.empty(6, 3, 7, device="meta"))[0].shape == (6, 3, 11)
    empty = empty.to_empty(device="cpu")
    empty.load_state_dict(theirs.state_dict())
    torch.testing.assert_close(flat(empty(x)), want)
    torch.testing.assert_close(flat(ours.eval()(x)), want)  # and backward in eval mode
    ours(x)[0].sum().backward()


@each_kind
def test_dynamic_sizes_compile_once(kind: str) -> None:
    torch._dynamo.reset()
    model = fastseq.accelerate(nn.Sequential(getattr(nn, kind)(5, 6, batch_first=True)))
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=counter)
    counts = []
    for T, B in ((6, 3), (9, 3), (13, 5), (21, 2)):
        x = torch.randn(B, T, 5)
        torch.testing.assert_close(flat(compiled(x)), flat(model(x)))
        counts.append(counter.frame_count)
    assert counts == counts[:1] * 4  # nothing was compiled after the first call


@each_kind
@pytest.mark.parametrize("strict", [False, True])
def test_export_with_dynamic_length(kind: str, strict: bool) -> None:
    model = fastseq.accelerate(nn.Sequential(getattr(nn, kind)(5, 6, num_layers=2, bidirectional=True)))
    dynamic = {0: torch.export.Dim("T", min=2, max=500)}
    exported = torch.export.export(model, (torch.randn(7, 3, 5),), dynamic_shapes=(dynamic,), strict=strict)
    for T in (2, 7, 30):
        x = torch.randn(T, 3, 5)
        torch.testing.assert_close(flat(exported.module()(x)), flat(model(x)))


@each_kind
def test_options_compile(kind: str) -> None:
    torch._dynamo.reset()
    layer = fastseq.accelerate(getattr(nn, kind)(5, 6))
    x, lengths = torch.randn(6, 3, 5, requires_grad=True), torch.tensor([6, 2, 4])
    reset = torch.zeros(6, 3, dtype=torch.bool)
    reset[3, 1] = True
    compiled = torch.compile(lambda x: layer(x, lengths=lengths, reset=reset)[0], backend="aot_eager")
    want = layer(x, lengths=lengths, reset=reset)[0]
    torch.testing.assert_close(compiled(x), want)
    torch.testing.assert_close(torch.autograd.grad(compiled(x).sum(), x), torch.autograd.grad(want.sum(), x))


def test_double_backward() -> None:
    _, ours = pair(3, 4, dtype=torch.float64)
    x = torch.randn(5, 2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: ours(x)[0], (x,))


def test_transforms_of_torch_func() -> None:
    """They run on the reference, in forward mode too, where torch's own layer has nothing."""
    theirs, ours = pair(3, 4, dtype=torch.float64)
    x, tangent = torch.randn(5, 2, 3, dtype=torch.float64), torch.randn(5, 2, 3, dtype=torch.float64)

    def loss(module: nn.LSTM, parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(module, parameters, (x,))[0].square().sum()

    want = torch.func.grad(lambda p: loss(theirs, p, x))(dict(theirs.named_parameters()))
    got = torch.func.grad(lambda p: loss(ours, p, x))(dict(ours.named_parameters()))
    for name in want:
        torch.testing.assert_close(got[name], want[name])

    _, derivative = torch.func.jvp(lambda x: ours(x)[0], (x,), (tangent,))
    step = 1e-6
    difference = (theirs(x + step * tangent)[0] - theirs(x - step * tangent)[0]) / (2 * step)
    torch.testing.assert_close(derivative, difference, rtol=1e-6, atol=1e-8)

    rows = torch.randn(6, 5, 3, dtype=torch.float64)  # [batch, T, I]: one gradient per sample
    per_sample = torch.func.vmap(torch.func.grad(lambda row: ours(row)[0].square().sum()))(rows)
    for row, gradient in zip(rows, per_sample, strict=True):
        row = row.clone().requires_grad_()
        torch.testing.assert_close(torch.autograd.grad(theirs(row)[0].square().sum(), row)[0], gradient)

    jacobian = torch.autograd.functional.jacobian(lambda x: ours(x)[0], x, vectorize=True)
    torch.testing.assert_close(jacobian, torch.autograd.functional.jacobian(lambda x: theirs(x)[0], x))


@pytest.mark.parametrize("options", [*OPTIONS[:2], dict(proj_size=4)], ids=str)
def test_compiles_into_one_graph(options: dict) -> None:
    torch._dynamo.reset()

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = nn.LSTM(7, 11, **options)
            self.head = nn.Linear((self.lstm.proj_size or 11) * (2 if self.lstm.bidirectional else 1), 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.lstm(x)[0])

    model = Model()
    x = torch.randn(6, 3, 7, requires_grad=True)
    want = model(x)
    want_grads = torch.autograd.grad(want.sum(), [x, *model.parameters()])
    compiled = torch.compile(fastseq.accelerate(model), fullgraph=True, backend="aot_eager")
    got = compiled(x)
    torch.testing.assert_close(got, want)
    grads = torch.autograd.grad(got.sum(), [x, *model.parameters()])
    for ours, theirs in zip(grads, want_grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=2e-5)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), want)


def test_compiles_with_inductor() -> None:
    require_kernel(LSTM.table, "cpu", torch.float32)  # torch's own path does not: mkldnn_rnn_layer fails in inductor
    torch._dynamo.reset()
    model = fastseq.accelerate(nn.Sequential(nn.LSTM(5, 6)))
    x = torch.randn(4, 2, 5)
    want = model(x)[0]
    torch.testing.assert_close(torch.compile(model, fullgraph=True)(x)[0], want)


def test_every_combination_of_sizes() -> None:
    """Around the widths of tiles and vectors: batch, input and hidden sizes that leave every kind of rest."""
    for B, I, H in itertools.product((1, 2, 4, 6, 7), (1, 8, 15), (1, 7, 8, 16, 31, 33)):
        theirs, ours = pair(I, H)
        x = torch.randn(3, B, I)
        with torch.no_grad():
            torch.testing.assert_close(ours(x), theirs(x))


def more_than_three_rows(*args: Any) -> str | None:
    x, sizes = args[0], Arguments(*args).batch_sizes
    return "torch is ahead" if (x.shape[1] if sizes is None else sizes[0]) > 3 else None


@pytest.fixture
def yields(nothing_asked_for: None, monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """What has reached the LSTM's kernel, which leaves calls of more than three rows to torch."""
    table = LSTM.table
    require_kernel(table, "cpu", torch.float32)
    served = table.candidates("cpu", torch.float32)[0]
    mine = replace(served, yields=more_than_three_rows)
    calls: list[tuple] = []
    spy = SimpleNamespace(forward=spying(calls, served.kernel.forward), backward=served.kernel.backward)
    monkeypatch.setitem(mine.__dict__, "kernel", spy)
    monkeypatch.setattr(table, "impls", [mine, table.reference])
    monkeypatch.setattr(table, "_choices", {})
    monkeypatch.setattr(table, "_preferred", {})
    monkeypatch.setattr(table, "_rules", {})
    return calls


@pytest.mark.parametrize(
    "options", [dict(), dict(batch_first=True), dict(num_layers=2, bidirectional=True), dict(proj_size=4)], ids=str
)
@pytest.mark.parametrize("with_state", [False, True])
def test_a_kernel_leaves_calls_to_torch(yields: list[tuple], options: dict, with_state: bool) -> None:
    theirs, ours = pair(7, 11, **options)
    for rows, mine in ((3, True), (4, False)):
        x = torch.randn((rows, 5, 7) if theirs.batch_first else (5, rows, 7))
        hx = states(theirs, rows) if with_state else None
        assert_same(run(theirs, x, hx), run(ours, x, hx))
        with torch.no_grad():
            torch.testing.assert_close(flat(ours(x, hx)), flat(theirs(x, hx)))
        assert bool(yields) == mine
        yields.clear()


def test_packed_calls_are_left_to_torch(yields: list[tuple]) -> None:
    theirs, ours = pair(7, 11)
    for rows, mine in ((3, True), (4, False)):
        x = pack_sequence([torch.randn(length, 7) for length in range(1, rows + 1)], enforce_sorted=False)
        torch.testing.assert_close(ours(x)[0].data, theirs(x)[0].data)
        assert bool(yields) == mine
        yields.clear()


def test_cells_leave_calls_to_torch(yields: list[tuple]) -> None:
    cell = fastseq.nn.LSTMCell(400, 400)
    with torch.no_grad():
        for rows, mine in ((3, True), (4, False)):
            cell(torch.randn(rows, 400))
            assert bool(yields) == mine
            yields.clear()


def test_what_torch_cannot_do_is_never_left_to_it(yields: list[tuple]) -> None:
    ours, x = fastseq.nn.LSTM(7, 11), torch.randn(5, 4, 7)
    for options in (
        dict(lengths=torch.tensor([1, 2, 3, 5])),
        dict(reset=torch.rand(5, 4) < 0.5),
        dict(return_cell_sequence=True),
    ):
        ours(x, **options)
        assert yields
        yields.clear()


def test_a_kernel_asked_for_by_name_leaves_nothing_to_torch(yields: list[tuple]) -> None:
    ours, x = fastseq.nn.LSTM(7, 11), torch.randn(5, 4, 7)
    with fastseq.use_backend(LSTM.table.impls[0].name):
        ours(x)
    assert yields


@pytest.mark.parametrize("rows", [3, 4])
def test_compiled_calls_are_never_left_to_torch(yields: list[tuple], rows: int) -> None:
    torch._dynamo.reset()
    model = fastseq.accelerate(nn.Sequential(nn.LSTM(5, 6)))
    torch.compile(model, fullgraph=True, backend="aot_eager")(torch.randn(4, rows, 5))[0].sum().backward()
    assert yields


def test_a_kernel_that_refuses_a_call_leaves_it_to_torch(yields: list[tuple]) -> None:
    """Rather than to the reference, which has a loop over steps."""
    table = LSTM.table
    table.impls[0] = replace(table.impls[0], yields=None, needs=lambda x, *_: "too many" if x.shape[1] > 3 else None)
    theirs, ours = pair(7, 11)
    x = torch.randn(5, 4, 7)
    with torch.no_grad():
        torch.testing.assert_close(flat(ours(x)), flat(theirs(x)), rtol=0, atol=0)
        torch.testing.assert_close(flat(ours(x[:, :3])), flat(theirs(x[:, :3])))


def test_explain_says_that_calls_are_left_to_torch(yields: list[tuple]) -> None:
    row = fastseq.explain(fastseq.nn.LSTM(7, 11)).rows[0]
    assert row.served_by == LSTM.table.impls[0].name and "calls in which torch is ahead go to torch" in row.note


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.usefixtures("served")
def test_checkpoints_that_stop_early(kind: str) -> None:
    """What is computed anew ends, by an exception of torch's, when all that backward needs is there."""
    theirs, ours = pair(4, 4, kind=kind)
    results = []
    for module in (theirs, ours):
        x = torch.linspace(-1, 1, 48).view(6, 2, 4).requires_grad_()
        y = checkpoint(lambda t, module=module: module(t)[0], x, use_reentrant=False)
        y.sum().backward()
        results.append([y.detach(), x.grad, *[p.grad for p in module.parameters()]])
    assert_same(*results)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.usefixtures("served")
def test_gradients_that_stand_for_negatives(kind: str) -> None:
    """As of a conjugate's imaginary part: what lies in memory has the other sign."""
    theirs, ours = pair(4, 4, kind=kind)
    results = []
    for module in (theirs, ours):
        x = torch.linspace(-1, 1, 48).view(6, 2, 4).requires_grad_()
        y = module(x)[0]
        y.backward(torch._neg_view(torch.linspace(-2, 1, 48).view(6, 2, 4)))
        results.append([y.detach(), x.grad, *[p.grad for p in module.parameters()]])
    assert_same(*results)
