"""fastseq.nn.LSTM beside torch.nn.LSTM: the same results, gradients, errors and life cycle."""

import copy
import io
import itertools
import pickle

import pytest
import torch
from conftest import require
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

import fastseq
from fastseq.ops.lstm import LSTM

OPTIONS = [
    dict(),
    dict(num_layers=3, bidirectional=True),
    dict(num_layers=2, batch_first=True, bias=False),
    dict(bidirectional=True, batch_first=True),
]


def pair(*args, **kwargs) -> tuple[nn.LSTM, nn.LSTM]:
    theirs = nn.LSTM(*args, **kwargs)
    ours = fastseq.nn.LSTM(*args, **kwargs)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def states(module: nn.LSTM, batch: int | None, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    rows = module.num_layers * (2 if module.bidirectional else 1)
    shape = (rows, module.hidden_size) if batch is None else (rows, batch, module.hidden_size)
    return torch.randn(shape, dtype=dtype), torch.randn(shape, dtype=dtype)


def run(module: nn.LSTM, x: Tensor, hx: tuple[Tensor, Tensor] | None) -> list[Tensor]:
    """Outputs, and gradients of everything that can have one."""
    leaves = [x.detach().requires_grad_(), *([] if hx is None else [s.detach().requires_grad_() for s in hx])]
    y, (h, c) = module(leaves[0], None if hx is None else tuple(leaves[1:]))
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(t.shape, generator=generator, dtype=t.dtype) for t in (y, h, c)]
    loss = sum((t * w).sum() for t, w in zip((y, h, c), weights, strict=True))
    return [y, h, c, *torch.autograd.grad(loss, [*leaves, *module.parameters()])]


def assert_same(theirs: list[Tensor], ours: list[Tensor]) -> None:
    for want, got in zip(theirs, ours, strict=True):
        # Gradients are sums over all steps and rows, added in another order than torch's.
        torch.testing.assert_close(got, want, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize("batch", [None, 1, 5])
def test_results_and_gradients(options: dict, with_state: bool, batch: int | None) -> None:
    theirs, ours = pair(7, 11, **options)
    shape = (6, 7) if batch is None else (batch, 6, 7) if theirs.batch_first else (6, batch, 7)
    hx = states(theirs, batch) if with_state else None
    x = torch.randn(shape)
    assert_same(run(theirs, x, hx), run(ours, x, hx))


def test_outputs_have_torchs_strides() -> None:
    theirs, ours = pair(7, 11, batch_first=True)
    x = torch.randn(3, 6, 7)
    assert ours(x)[0].stride() == theirs(x)[0].stride()


@pytest.mark.parametrize("training", [True, False])
def test_dropout_between_layers_takes_torchs_random_stream(training: bool) -> None:
    theirs, ours = pair(7, 11, num_layers=3, dropout=0.5)
    x = torch.randn(6, 4, 7)
    theirs.train(training), ours.train(training)
    torch.manual_seed(3)
    want = run(theirs, x, None)
    torch.manual_seed(3)
    assert_same(want, run(ours, x, None))


@pytest.mark.parametrize("what", ["packed", "proj_size", "bfloat16"])
def test_what_has_no_kernel_takes_torchs_path(what: str) -> None:
    dtype = torch.bfloat16 if what == "bfloat16" else torch.float32
    theirs, ours = pair(7, 11, proj_size=3 if what == "proj_size" else 0, dtype=dtype)
    x = torch.randn(6, 3, 7, dtype=dtype)
    given = pack_padded_sequence(x, [6, 4, 1]) if what == "packed" else x
    want, got = theirs(given), ours(given)
    torch.testing.assert_close(got[0].data, want[0].data)
    torch.testing.assert_close(got[1], want[1])
    with fastseq.use_backend("cpp"), pytest.raises(fastseq.BackendError, match="was asked for but"):
        ours(given)


def test_autocast_takes_torchs_path() -> None:
    """Whatever that gives: on machines without bf16 instructions oneDNN refuses the training pass."""

    def outcome(module: nn.LSTM) -> tuple[str, list[Tensor]]:
        try:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                y, (h, c) = module(x)
                return "", [y, h, c]
        except RuntimeError as error:
            return str(error), []

    theirs, ours = pair(7, 11)
    x = torch.randn(6, 3, 7)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            (want_error, want), (error, got) = outcome(theirs), outcome(ours)
            assert error == want_error
            torch.testing.assert_close(got, want)


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
    "a list": lambda m: m([1.0, 2.0]),
    "nothing": lambda m: m(None),
    "meta input": lambda m: m(torch.randn(5, 3, 7, device="meta")),
}


@pytest.mark.parametrize("call", BAD_CALLS.values(), ids=BAD_CALLS)
def test_errors_are_torchs(call) -> None:
    theirs, ours = pair(7, 11)
    with pytest.raises(Exception) as want:
        call(theirs)
    with pytest.raises(type(want.value)) as got:
        call(ours)
    assert type(got.value) is type(want.value)
    assert str(got.value) == str(want.value)
    x = torch.randn(5, 3, 7)
    torch.testing.assert_close(ours(x), theirs(x))  # and the next call works


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
    require(LSTM, LSTM.impls[0], "cpu", torch.float32)  # torch's own path does not: mkldnn_rnn_layer fails in inductor
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
