"""Dense layers by oneDNN: the same results as by MKL, whichever is the faster one here."""

import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastseq
from fastseq.ops import linear as ours


@pytest.fixture(autouse=True)
def taken(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Products that oneDNN has been given, on a machine that prefers it from the first row on."""
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        pytest.skip("torch was built without oneDNN")
    calls: list[tuple[int, ...]] = []
    product = torch.ops.mkldnn._linear_pointwise.default
    packet = type(
        "Packet", (), {"default": staticmethod(lambda x, *rest: (calls.append(x.shape), product(x, *rest))[1])}
    )
    monkeypatch.setattr(ours, "prefers_onednn", lambda: True)
    monkeypatch.setattr(ours, "_WORTHWHILE", 1)
    monkeypatch.setattr(ours, "WORTHWHILE_FOR_A_ROW", 1)
    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", packet)
    return calls


def tensors(*lead: int, K: int = 37, M: int = 50) -> tuple[Tensor, Tensor, Tensor]:
    made = [torch.randn(size, requires_grad=True) for size in ((*lead, K), (M, K), (M,))]
    return made[0], made[1], made[2]


def test_slices_of_columns_are_copied(monkeypatch: pytest.MonkeyPatch, taken: list[tuple[int, ...]]) -> None:
    """oneDNN multiplies matrices with gaps between their rows by a plain loop."""
    product = ours.torch.ops.mkldnn._linear_pointwise.default

    def dense_only(x: Tensor, weight: Tensor, *rest: object) -> Tensor:
        assert all(t.is_contiguous() or t.t().is_contiguous() for t in (x, weight))
        return product(x, weight, *rest)

    monkeypatch.setattr(torch.ops.mkldnn._linear_pointwise, "default", staticmethod(dense_only))
    x, weight, bias = tensors(5, K=40)
    y = ours.linear(x[:, 3:], weight[:, 3:], bias)
    y.sum().backward()
    assert taken
    torch.testing.assert_close(y, F.linear(x[:, 3:], weight[:, 3:], bias))


@pytest.mark.parametrize("lead", [(1,), (5,), (3, 7), (2, 3, 4)])
@pytest.mark.parametrize("with_bias", [True, False])
def test_results_and_gradients_are_torchs(taken: list[tuple[int, ...]], lead: tuple[int, ...], with_bias: bool) -> None:
    x, weight, bias = tensors(*lead)
    given = (x, weight, bias) if with_bias else (x, weight)
    y, expected = ours.linear(*given), F.linear(*given)
    torch.testing.assert_close(y, expected)
    dy = torch.randn_like(y)
    grads = zip(torch.autograd.grad(y, given, dy), torch.autograd.grad(expected, given, dy), strict=True)
    for got, want in grads:
        torch.testing.assert_close(got, want)
    assert len(taken) == 3


def test_gradients_of_sums_and_transposes(taken: list[tuple[int, ...]]) -> None:
    x, weight, bias = tensors(6, 5)
    turned = x.transpose(0, 1)
    for function in (ours.linear, F.linear):
        function(turned, weight, bias).sum().backward()
    for t in (x, weight, bias):  # which have been added up
        assert t.grad is not None
        torch.testing.assert_close(t.grad, 2 * torch.autograd.grad(F.linear(turned, weight, bias).sum(), t)[0])
    assert len(taken) == 3


@pytest.mark.parametrize("activation", ["identity", "relu", "gelu", "gelu_tanh", "silu"])
@pytest.mark.parametrize("grad", [True, False])
def test_activations(taken: list[tuple[int, ...]], activation: str, grad: bool) -> None:
    expected = {
        "identity": torch.nn.Identity(),
        "relu": torch.nn.ReLU(),
        "gelu": torch.nn.GELU(),
        "gelu_tanh": torch.nn.GELU("tanh"),
        "silu": torch.nn.SiLU(),
    }
    x, weight, bias = tensors(4, 6)
    with torch.set_grad_enabled(grad):
        y = ours.linear(x, weight, bias, activation)
    torch.testing.assert_close(y, expected[activation](F.linear(x, weight, bias)))
    assert y.requires_grad == grad and taken


def test_second_derivatives() -> None:
    x, weight, bias = tensors(4)
    grads = torch.autograd.grad(ours.linear(x, weight, bias).square().sum(), (x, weight), create_graph=True)
    found = torch.autograd.grad(sum(g.square().sum() for g in grads), (x, weight, bias))
    theirs = torch.autograd.grad(F.linear(x, weight, bias).square().sum(), (x, weight), create_graph=True)
    for got, want in zip(
        found, torch.autograd.grad(sum(g.square().sum() for g in theirs), (x, weight, bias)), strict=True
    ):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:Sparse CSR")
def test_others_are_torchs(taken: list[tuple[int, ...]]) -> None:
    x, weight, bias = tensors(4)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        ours.linear(x, weight[:, :5], bias)
    ours.linear(x.double(), weight.double(), bias.double())
    ours.linear(x[0], weight, bias)
    ours.linear(x[:0], weight, bias)
    with torch.autocast("cpu"):
        assert ours.linear(x, weight, bias).dtype == torch.bfloat16
    with torch.backends.mkldnn.flags(enabled=False):
        ours.linear(x, weight, bias)
    precision = torch.backends.mkldnn.matmul.fp32_precision
    for asked_for in ("bf16", "tf32"):
        torch.backends.mkldnn.matmul.fp32_precision = asked_for
        try:
            assert torch.equal(ours.linear(x, weight, bias), F.linear(x, weight, bias))
        finally:
            torch.backends.mkldnn.matmul.fp32_precision = precision
    with torch.no_grad():
        sparse = weight.to_sparse_csr()
        torch.testing.assert_close(ours.linear(x, sparse, bias), F.linear(x, weight, bias))
    torch.func.vmap(ours.linear, (0, None, None))(x.unsqueeze(0), weight, bias)
    compiled = torch.compile(ours.linear, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, weight, bias), F.linear(x, weight, bias))
    assert not taken


def test_little_work_is_torchs(taken: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(ours, "prefers_onednn", lambda: True)
    x, weight, bias = tensors(4)
    y, expected = ours.linear(x, weight, bias), F.linear(x, weight, bias)
    assert torch.equal(y, expected) and type(y.grad_fn) is type(expected.grad_fn)
    assert not taken


def test_accelerate_swaps_dense_layers_where_it_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    for pays in (True, False):
        monkeypatch.setattr(sys.modules["fastseq.accelerate"], "prefers_onednn", lambda pays=pays: pays)
        model = nn.Sequential(nn.Linear(37, 50), nn.LSTM(50, 3))
        x, keys = torch.randn(4, 37), list(model.state_dict())
        want = model[0](x)
        fastseq.accelerate(model)
        assert (type(model[0]) is fastseq.nn.Linear) == pays and list(model.state_dict()) == keys
        torch.testing.assert_close(model[0](x), want)
        rows = {row.layer: row.served_by for row in fastseq.explain(model).rows}
        assert rows.get("(1 dense layers)") == ("torch's oneDNN" if pays else None)
        assert torch.jit.script(fastseq.accelerate(nn.Sequential(nn.Linear(3, 2))))(x[:, :3]).shape == (4, 2)
        assert type(fastseq.restore(model)[0]) is nn.Linear
