"""accelerate, explain and restore on models that users have."""

import subprocess
import sys
import time

import pytest
import torch
from conftest import require_kernel
from torch import nn

import fastseq
from fastseq import registry, selfcheck
from fastseq.ops.attention import TABLE as ATTENTION
from fastseq.ops.lstm import LSTM as LSTM_OP

LSTM = LSTM_OP.table


class Tagger(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 8)
        self.encoder = nn.LSTM(8, 12, num_layers=2, batch_first=True)
        self.decoder = nn.ModuleDict({"lstm": nn.LSTM(12, 12, batch_first=True)})
        self.head = nn.Linear(12, 5)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x, _ = self.encoder(self.embed(tokens))
        return self.head(self.decoder["lstm"](x)[0])


class MyLSTM(nn.LSTM):
    pass


class MyAttention(nn.MultiheadAttention):
    pass


def test_in_place_and_back() -> None:
    model = Tagger()
    parameters = list(model.parameters())
    seen = []
    handle = model.encoder.register_forward_hook(lambda *_: seen.append(1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    tokens = torch.randint(20, (3, 7))
    want = model(tokens)

    assert fastseq.accelerate(model) is model
    assert type(model.encoder) is fastseq.nn.LSTM
    assert type(model.decoder["lstm"]) is fastseq.nn.LSTM
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    torch.testing.assert_close(model(tokens), want)
    assert len(seen) == 2
    handle.remove()
    model(tokens).sum().backward()
    before = model.encoder.weight_hh_l0.detach().clone()
    optimizer.step()
    assert not torch.equal(model.encoder.weight_hh_l0, before)

    assert fastseq.accelerate(model) is model  # twice is once
    assert fastseq.restore(model) is model
    assert type(model.encoder) is nn.LSTM


def test_a_layer_itself_is_a_model() -> None:
    layer = nn.LSTM(3, 4)
    assert type(fastseq.accelerate(layer)) is fastseq.nn.LSTM
    assert type(fastseq.restore(layer)) is nn.LSTM


def test_attention_inside_of_transformers() -> None:
    model = nn.Transformer(8, 2, 1, 2, 12, dropout=0.0, batch_first=True)
    state = list(model.state_dict())
    source, target = torch.randn(3, 5, 8), torch.randn(3, 4, 8)
    want = model(source, target)
    layers = [m for m in fastseq.accelerate(model).modules() if isinstance(m, nn.MultiheadAttention)]
    assert [type(m) for m in layers] == [fastseq.nn.MultiheadAttention] * 5
    assert list(model.state_dict()) == state
    torch.testing.assert_close(model(source, target), want)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(source, target), want)
    assert all(type(m) is nn.MultiheadAttention for m in layers if fastseq.restore(model) is model)


def test_filter() -> None:
    model = fastseq.accelerate(Tagger(), lambda module, name: name == "encoder")
    assert type(model.encoder) is fastseq.nn.LSTM
    assert type(model.decoder["lstm"]) is nn.LSTM


def test_explain_tells_who_serves_and_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["fastseq.accelerate"], "prefers_onednn", lambda: False)
    model = nn.ModuleDict(
        {
            "plain": nn.LSTM(3, 4),
            "mine": MyLSTM(3, 4),
            "projected": nn.LSTM(3, 4, proj_size=2),
            "gru": nn.GRU(3, 4),
            "rnn": nn.RNN(3, 4, nonlinearity="relu"),
            "cell": nn.LSTMCell(3, 4),
            "attention": nn.MultiheadAttention(4, 2),
            "my attention": MyAttention(4, 2),
            "low": nn.LSTM(3, 4, dtype=torch.float16),
            "left": nn.LSTM(3, 4),
            "other": nn.Linear(3, 4),
        }
    )
    fastseq.accelerate(model, lambda module, name: name != "left")
    rows = {row.layer: row for row in fastseq.explain(model).rows}
    assert set(rows) == set(model) - {"other"}
    served = LSTM.candidates("cpu", torch.float32)[0].name
    for name in ("plain", "projected", "gru", "rnn", "cell", "low"):
        assert rows[name].served_by == ("torch" if served == "reference" else served)
    for name in ("mine", "my attention"):
        assert rows[name].served_by == "torch" and "subclass" in rows[name].note
    assert rows["low"].served_by == "torch" or "computed in float32" in rows["low"].note
    served = ATTENTION.candidates("cpu", torch.float32)[0].name
    assert rows["attention"].served_by == served or (rows["attention"].served_by, served) == ("torch", "reference")
    assert rows["left"].served_by == "torch" and "fastseq.accelerate" in rows["left"].note
    printed = str(fastseq.explain(model))
    assert all(name in printed for name in rows) and printed.isascii()
    assert "no sequence layers" in str(fastseq.explain(nn.Linear(2, 2)))


def test_explanation_is_what_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    require_kernel(LSTM, "cpu", torch.float32)
    served = LSTM.candidates("cpu", torch.float32)[0]
    layer = fastseq.accelerate(nn.LSTM(3, 4))
    assert fastseq.explain(layer).rows[0].served_by == served.name
    called = []
    forward = served.kernel.forward
    monkeypatch.setitem(
        served.__dict__,
        "kernel",
        type("Spy", (), {"forward": staticmethod(lambda *args: (called.append(1), forward(*args))[1])}),
    )
    with torch.no_grad():
        layer(torch.randn(2, 1, 3))
    assert called


@pytest.mark.usefixtures("nothing_asked_for")
def test_explain_says_why_each_implementation_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = fastseq.accelerate(nn.LSTM(3, 4))
    reasons = {"cpp": "no compiler", "numba": "no numba", "triton": "no GPU"}
    monkeypatch.setattr(registry.Impl, "unavailable", lambda self: reasons.get(self.name))
    for serving, told in (("numba", ["cpp: no compiler"]), ("torch", ["cpp: no compiler", "numba: no numba"])):
        reasons["numba"] = None if serving == "numba" else "no numba"
        monkeypatch.setattr(LSTM, "_choices", {})
        monkeypatch.setattr(LSTM, "_preferred", {})
        monkeypatch.setattr(selfcheck, "failure", lambda *_: None)
        row = fastseq.explain(layer).rows[0]
        assert row.served_by == serving and all(text in row.note for text in told)


def test_explain_finds_weights_that_are_no_parameters() -> None:
    model = fastseq.accelerate(nn.TransformerEncoderLayer(8, 2, 8, dtype=torch.float64))
    want = fastseq.explain(model).rows
    for module in model.modules():
        for name, weight in list(module._parameters.items()):
            delattr(module, name)
            setattr(module, name, None if weight is None else weight.detach())
    assert fastseq.explain(model).rows == want and model.example.dtype == torch.float64


def test_profiles_leave_the_generator_as_it_is() -> None:
    model, before = fastseq.nn.TransformerEncoderLayer(8, 2, 8, 0.5), torch.get_rng_state()
    fastseq.explain(model, profile=torch.zeros(2, 2, 8))
    assert torch.equal(before, torch.get_rng_state())


def test_a_packed_sequence_is_one_example() -> None:
    layer = fastseq.nn.LSTM(3, 4)
    packed = nn.utils.rnn.pack_sequence([torch.randn(3, 3), torch.randn(2, 3)])
    for example in (packed, (packed, None)):
        assert fastseq.explain(layer, profile=example).rows[0].milliseconds is not None


@pytest.mark.parametrize("function", [fastseq.accelerate, fastseq.restore, fastseq.explain])
def test_not_a_module(function) -> None:
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got dict"):
        function({})


def test_import_changes_nothing_and_accelerate_allows_compiling() -> None:
    script = """
import sys, torch
lstm, forward = torch.nn.LSTM, torch.nn.LSTM.forward
import fastseq
assert torch.nn.LSTM is lstm and lstm.forward is forward
for heavy in ("torch._dynamo", "triton", "numba", "rich", "typer", "matplotlib"):
    assert heavy not in sys.modules, heavy
model = fastseq.accelerate(torch.nn.LSTM(3, 4))
assert "torch._dynamo" not in sys.modules
import torch._dynamo
assert torch._dynamo.config.allow_rnn
torch._dynamo.config.allow_rnn = False
fastseq.accelerate(torch.nn.LSTM(3, 4))
assert torch._dynamo.config.allow_rnn
"""
    subprocess.run([sys.executable, "-c", script], check=True)


def test_a_hundred_layers_are_no_work() -> None:
    """Not a benchmark: a second would mean that something is done per layer that should not be."""
    model = nn.ModuleList(nn.LSTM(2, 2) for _ in range(100))
    start = time.perf_counter()
    fastseq.accelerate(model)
    assert time.perf_counter() - start < 1


class Everything(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({"gru": nn.GRU(8, 8), "rnn": nn.RNN(8, 8, nonlinearity="relu")})
        self.lstm = nn.LSTM(8, 8, 2)
        self.cells = nn.ModuleList([nn.LSTMCell(8, 8), nn.GRUCell(8, 8), nn.RNNCell(8, 8)])
        self.attention = nn.MultiheadAttention(8, 2)

    def forward(self, x: torch.Tensor, h: torch.Tensor, pads: torch.Tensor) -> tuple:
        x, last = self.layers["gru"](x, h)
        x, _ = self.layers["rnn"](input=x)
        x, (h, c) = self.lstm(x, (torch.cat([h, last]), torch.cat([last, h])))
        h, c = self.cells[0](h[0], (c[0], c[1]))
        h = self.cells[2](self.cells[1](h), c)
        x, weights = self.attention(x, x, x, key_padding_mask=pads, average_attn_weights=False)
        return x, h, weights


def test_fx_traces_each_layer_into_one_node() -> None:
    model = Everything()
    inputs = torch.randn(5, 3, 8), torch.randn(1, 3, 8), torch.arange(5) >= torch.tensor([[5], [2], [3]])
    want = model(*inputs)
    names = [node.target for node in torch.fx.symbolic_trace(model).graph.nodes if node.op == "call_module"]
    traced = torch.fx.symbolic_trace(fastseq.accelerate(model))
    assert [node.target for node in traced.graph.nodes if node.op == "call_module"] == names
    assert type(traced.get_submodule("attention")) is fastseq.nn.MultiheadAttention
    torch.testing.assert_close(traced(*inputs), want)
    torch.testing.assert_close(fastseq.restore(traced)(*inputs), want)


def test_fx_traces_what_goes_beyond_torch() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = fastseq.nn.LSTM(8, 8)

        def forward(self, x: torch.Tensor, lengths: torch.Tensor) -> tuple:
            return self.lstm(x, lengths=lengths, return_cell_sequence=True)

    require_kernel(LSTM, "cpu", torch.float32)
    model, inputs = Model(), (torch.randn(5, 3, 8), torch.tensor([5, 2, 3]))
    torch.testing.assert_close(torch.fx.symbolic_trace(model)(*inputs), model(*inputs))


@pytest.mark.usefixtures("nothing_asked_for")
def test_cells_are_left_to_torch_off_the_cpu() -> None:
    """Where torch's are fused, and one step is too short to gain."""
    for kind in (nn.LSTMCell, nn.GRUCell, nn.RNNCell):
        row = fastseq.explain(fastseq.accelerate(kind(4, 5, device="meta"))).rows[0]
        assert row.served_by == "torch" and "fused" in row.note
