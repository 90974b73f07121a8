"""The attention decoder's modules against loops over torch's cells, as papers have them."""

import copy
import io
import math
import pickle
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from conftest import device_of, require
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fastseq
from fastseq.nn import AdditiveAttention, AttentionDecoder, AttentionDecoderState, LuongAttention
from fastseq.ops.attention_decoder import TABLE
from fastseq.registry import Impl

T, B, S, I, H, K, F = 7, 4, 6, 5, 8, 9, 10
CELLS = ("gru", "lstm", "rnn")
ATTENTIONS = {
    "additive": lambda **options: AdditiveAttention(H, K, 11, bias=True, **options),
    "general": lambda **options: LuongAttention(H, K, **options),
    "concat": lambda **options: LuongAttention(H, K, "concat", 7, **options),
}


each_implementation = pytest.mark.parametrize(
    "impl", [impl for impl in TABLE.impls if device_of(impl) == "cpu"], ids=lambda impl: impl.name
)


def served_by(impl: Impl, dtype: torch.dtype = torch.float64) -> Any:
    """Within it, the op serves by this implementation, or nothing does."""
    require(TABLE, impl, "cpu", dtype)
    return fastseq.use_backend(impl.name)


def decoder(attention: str = "additive", cell: str = "gru", attend: str = "before", **options: Any) -> AttentionDecoder:
    options = {"dtype": torch.float64, **options}
    feed_size = F if attend == "after" else None
    return AttentionDecoder(
        I, H, ATTENTIONS[attention](dtype=options["dtype"]), cell, attend, feed_size, batch_first=True, **options
    )


def batch(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Input, memory, lengths and the memory's padding, all of one row."""
    padding = torch.arange(S) >= torch.tensor([S, 3, 0, 1]).unsqueeze(-1)
    return torch.randn(B, T, I, dtype=dtype), torch.randn(B, S, K, dtype=dtype), torch.tensor([T, 3, 5, 0]), padding


class Loop(nn.Module):
    """The same model of torch's modules only, row by row and step by step, as slow as it is plain."""

    def __init__(self, ours: AttentionDecoder) -> None:
        super().__init__()
        self.ours, dtype = ours, ours.weight_ih.dtype
        cells = {"gru": nn.GRUCell, "lstm": nn.LSTMCell, "rnn": nn.RNNCell}
        self.cell = cells[ours.cell](I + ours.feed_size, H, bias=ours.bias, dtype=dtype)
        for name in self.cell._parameters:
            setattr(self.cell, name, getattr(ours, name))

    def look(self, h: Tensor, memory: Tensor, places: int) -> tuple[Tensor, Tensor]:
        attention: Any = self.ours.attention
        weights = memory.new_zeros(S)
        if places == 0:
            return memory.new_zeros(K), weights
        seen = memory[:places]
        if isinstance(attention, AdditiveAttention):
            scores = (h @ attention.weight_query.t() + seen @ attention.weight_key.t() + attention.bias).tanh()
            scores = scores @ attention.v
        elif attention.score == "general":
            scores = seen @ attention.weight_key.t() @ h
        else:
            both = torch.cat([h.expand(places, H), seen], -1)
            joint = torch.cat([attention.weight_query, attention.weight_key], -1)  # W_a of the paper
            scores = (both @ joint.t()).tanh() @ attention.v
        a = scores.softmax(-1)
        return a @ seen, torch.cat([a, weights[places:]])

    def forward(self, input: Tensor, memory: Tensor, lengths: Tensor, padding: Tensor, h: Tensor | None = None) -> Any:
        ours = self.ours
        sequences = [torch.zeros(B, T, n, dtype=input.dtype) for n in (H, ours.feed_size, S)]
        last = []
        for row in range(B):
            state: Any = (torch.zeros(1, H, dtype=input.dtype) if h is None else h[row : row + 1],) * 2
            feed = torch.zeros(ours.feed_size, dtype=input.dtype)
            places = int((~padding[row]).sum())
            for t in range(int(lengths[row])):
                if ours.attend == "before":
                    feed, weights = self.look(state[0][0], memory[row], places)
                x = torch.cat([input[row, t], feed]).unsqueeze(0)
                state = self.cell(x, state) if ours.cell == "lstm" else (self.cell(x, state[0]),)
                if ours.attend == "after":
                    context, weights = self.look(state[0][0], memory[row], places)
                    feed = torch.tanh(ours.weight_out @ torch.cat([context, state[0][0]]))
                for sequence, value in zip(sequences, (state[0][0], feed, weights), strict=True):
                    sequence[row, t] = value
            last.append(state[0])
        return *sequences, torch.cat(last)


def state_of(cell: str, h: Tensor) -> Any:
    """The state that `Loop` starts from."""
    return (h, h) if cell == "lstm" else h


@each_implementation
@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("attend", ["before", "after"])
@pytest.mark.parametrize("cell", CELLS)
def test_it_is_the_loop_of_the_papers(impl: Impl, attention: str, attend: str, cell: str) -> None:
    """Lengths, padding, a row of nothing but padding, and all gradients."""
    ours = decoder(attention, cell, attend, bias=attention != "concat")
    input, memory, lengths, padding = batch()
    leaves = [input.requires_grad_(), memory.requires_grad_(), torch.randn(B, H, dtype=torch.float64).requires_grad_()]
    want = Loop(ours)(input, memory, lengths, padding, leaves[2])
    wrt, sent = [*leaves, *ours.parameters()], [torch.randn_like(t) for t in want]
    with served_by(impl):
        output = ours(input, memory, state_of(cell, leaves[2]), lengths=lengths, memory_key_padding_mask=padding)
        got = [*output[:3], output.state.h]
        grads = torch.autograd.grad(got, wrt, sent)
    torch.testing.assert_close(got, list(want))
    torch.testing.assert_close(grads, torch.autograd.grad(want, wrt, sent))


@each_implementation
@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("attend", ["before", "after"])
@pytest.mark.parametrize("cell", CELLS)
def test_the_loop_over_the_steps_is_the_op(impl: Impl, attention: str, attend: str, cell: str) -> None:
    ours = decoder(attention, cell, attend)
    looped = copy.deepcopy(ours)
    calls = []
    looped.attention.register_forward_hook(lambda *_: calls.append(1))  # which the op would pass by
    input, memory, lengths, padding = batch()
    options = dict(lengths=lengths, memory_key_padding_mask=padding)
    with served_by(impl):
        by_op = ours(input, memory, **options)
        with pytest.raises(fastseq.BackendError, match=f"{impl.name} was asked for but .*Attention has hooks"):
            looped(input, memory)
    by_loop = looped(input, memory, **options)
    assert len(calls) == T
    torch.testing.assert_close(by_op, by_loop)
    grads = []
    for model, output in ((ours, by_op), (looped, by_loop)):
        sent = [torch.ones_like(t) for t in output[:3]]
        grads.append(torch.autograd.grad(output[:3], list(model.parameters()), sent))
    torch.testing.assert_close(*grads)


@each_implementation
@pytest.mark.parametrize("attend", ["before", "after"])
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("window", [None, 2])
def test_a_state_carries_on(impl: Impl, attend: str, cell: str, window: int | None) -> None:
    if window is not None and impl.name != "reference":
        pytest.skip("local attention takes no op")
    attention = LuongAttention(H, K, window=window, local="monotonic", dtype=torch.float64)
    ours = AttentionDecoder(I, H, attention, cell, attend, dtype=torch.float64)
    input, memory, lengths, _ = batch()
    input, memory = input.transpose(0, 1), memory.transpose(0, 1)
    with served_by(impl) if window is None else nullcontext():
        whole, short, ended = ours(input, memory), ours(input[:3], memory), ours(input, memory, lengths=lengths)
        keys, state, steps = ours.attention.project(memory), None, []
        for t in range(T):
            *sequences, state = ours(input[t : t + 1], memory, state, keys=keys)
            steps.append(sequences)
    torch.testing.assert_close([torch.cat(of_steps) for of_steps in zip(*steps, strict=True)], list(whole[:3]))
    torch.testing.assert_close(state, whole.state)
    # Rows that end early leave their state as a shorter call does: lengths are T, 3, 5 and 0.
    for got, early, late in zip(ended.state, short.state, whole.state, strict=True):
        if got is not None:
            torch.testing.assert_close([got[0], got[1]], [late[0], early[1]])
            assert not got[3].any()


@each_implementation
def test_batch_first_or_not(impl: Impl) -> None:
    first = decoder(attend="after")
    second = copy.deepcopy(first)
    second.batch_first = False
    input, memory, lengths, padding = batch()
    options = dict(lengths=lengths, memory_key_padding_mask=padding)
    with served_by(impl):
        got = second(input.transpose(0, 1), memory.transpose(0, 1), **options)
        want = first(input, memory, **options)
    torch.testing.assert_close([t.transpose(0, 1) for t in got[:3]], list(want[:3]))
    torch.testing.assert_close(got.state, want.state)


@each_implementation
@pytest.mark.parametrize("hooked", [False, True])
def test_padding_spreads_nowhere(impl: Impl, hooked: bool) -> None:
    ours = decoder("concat", "lstm", "after")
    if hooked:
        ours.attention.register_forward_hook(lambda *_: None)
    input, memory, lengths, padding = batch()
    past, results = torch.arange(T) >= lengths.unsqueeze(-1), []
    for fill in (0.0, math.nan):
        input = input.masked_fill(past.unsqueeze(-1), fill)
        memory = memory.masked_fill(padding.unsqueeze(-1), fill)
        with served_by(impl) if not hooked else nullcontext():
            output = ours(input, memory, lengths=lengths, memory_key_padding_mask=padding)
            sent = [torch.ones_like(t) for t in output[:3]]
            results.append([output[:3], torch.autograd.grad(output[:3], list(ours.parameters()), sent)])
    torch.testing.assert_close(*results, equal_nan=False)


@pytest.mark.parametrize("score", ["dot", "general", "concat"])
def test_many_queries_are_one_after_the_other(score: str) -> None:
    attention = LuongAttention(K, K, score, dtype=torch.float64)
    query, (_, memory, _, padding) = torch.randn(B, 3, K, dtype=torch.float64), batch()
    memory.requires_grad_()
    context, weights = attention(query, memory, padding)
    each = [attention(query[:, l], memory, padding, attention.project(memory)) for l in range(3)]
    want = [torch.stack(parts, 1) for parts in zip(*each, strict=True)]
    torch.testing.assert_close([context, weights], want)
    assert not context[2].any() and not weights[2].any() and not weights[padding.unsqueeze(1).expand(B, 3, S)].any()
    loss = [(c.sin().sum() + w.square().sum()) for c, w in ((context, weights), want)]
    torch.testing.assert_close(*[torch.autograd.grad(part, [memory, *attention.parameters()]) for part in loss])


def test_local_attention_is_luongs() -> None:
    """Formulas 9 and 10 of the paper, one row and one query after the other."""
    query, (_, memory, _, padding) = torch.randn(B, 5, H, dtype=torch.float64), batch()
    for local in ("monotonic", "predictive"):
        attention = LuongAttention(H, K, window=2, local=local, dtype=torch.float64)
        context, weights = attention(query, memory, padding)
        for b in range(B):
            places = int((~padding[b]).sum())
            for l in range(5):
                p = float(l)
                if local == "predictive":
                    inner = torch.tanh(attention.weight_position @ query[b, l])
                    p = places * torch.sigmoid(attention.v_position @ inner).item()
                window = [s for s in range(places) if abs(s - p) <= 2]
                want = torch.zeros(S, dtype=torch.float64)
                if window:
                    want[window] = (memory[b, window] @ attention.weight_key.t() @ query[b, l]).softmax(-1)
                if local == "predictive":
                    want *= torch.tensor([math.exp(-((s - p) ** 2) / (2 * (2 / 2) ** 2)) for s in range(S)])
                torch.testing.assert_close(weights[b, l], want)
                torch.testing.assert_close(context[b, l], want @ memory[b].masked_fill(padding[b].unsqueeze(-1), 0))


class Mean(nn.Module):
    """An attention of a user's own."""

    def project(self, memory: Tensor) -> Tensor:
        return memory

    def forward(self, query: Tensor, memory: Tensor, key_padding_mask: Tensor | None, keys: Tensor) -> Any:
        assert query.shape == (B, H) and keys is memory
        return memory.mean(1), memory.new_full((B, S), 1 / S)


def test_an_attention_of_ones_own() -> None:
    ours = AttentionDecoder(I, H, Mean(), memory_size=K, batch_first=True)
    input, memory, *_ = batch(torch.float32)
    memory = memory[..., :K]
    layer = nn.GRU(I + K, H, batch_first=True)
    layer.load_state_dict({f"{name}_l0": weight for name, weight in ours.state_dict().items()})
    output = ours(input, memory)
    want, last = layer(torch.cat([input, memory.mean(1, keepdim=True).expand(B, T, K)], -1))
    torch.testing.assert_close((output.hidden, output.state.h), (want, last[0]))
    (row,) = fastseq.explain(ours).rows
    assert row.served_by == "torch" and "Mean" in row.note


def test_explain_says_what_serves() -> None:
    model = nn.ModuleDict(dict(one=decoder(), two=decoder("general")))
    model["two"].attention.window = 3
    with fastseq.use_backend("reference"):
        one, two = fastseq.explain(model).rows
    assert (one.layer, one.type, one.served_by) == ("one", "fastseq.nn.AttentionDecoder", "reference")
    assert two.served_by == "torch" and "its attention is local" in two.note


def test_it_compiles_into_one_node() -> None:
    ours = decoder("general", "lstm", "after", dtype=torch.float32)
    graphs = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(ours, backend=backend, fullgraph=True)
    input, memory, lengths, padding = batch(torch.float32)
    for options in (dict(), dict(lengths=lengths, memory_key_padding_mask=padding)):
        graphs.clear()
        with fastseq.use_backend("reference"):
            torch.testing.assert_close(compiled(input, memory, **options), ours(input, memory, **options))
        (graph,) = graphs
        assert sum("attention_decoder" in str(node.target) for node in graph.graph.nodes) == 1


def test_a_loop_compiles() -> None:
    attention = LuongAttention(H, K, window=2)
    ours = AttentionDecoder(I, H, attention, batch_first=True)
    input, memory, lengths, padding = batch(torch.float32)
    options = dict(lengths=lengths, memory_key_padding_mask=padding)
    compiled = torch.compile(ours, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(input, memory, **options), ours(input, memory, **options))


def test_it_compiles_with_gradients() -> None:
    ours = decoder(dtype=torch.float32)
    input, memory, lengths, padding = batch(torch.float32)
    options = dict(lengths=lengths, memory_key_padding_mask=padding)
    with fastseq.use_backend("reference"):
        results = [
            torch.autograd.grad(model(input, memory, **options).feed.sum(), list(ours.parameters()))
            for model in (ours, torch.compile(ours, backend="aot_eager", fullgraph=True))
        ]
    torch.testing.assert_close(*results)


@each_implementation
@pytest.mark.parametrize("hooked", [False, True])
@pytest.mark.parametrize("cell", CELLS)
def test_autocast_and_half(impl: Impl, cell: str, hooked: bool) -> None:
    ours = decoder("general", cell, "after", dtype=torch.float32)
    if hooked:
        ours.attention.register_forward_hook(lambda *_: None)
    input, memory, lengths, padding = batch(torch.float32)
    options = dict(lengths=lengths, memory_key_padding_mask=padding)
    with served_by(impl, torch.float32) if not hooked else nullcontext():
        want = ours(input, memory, **options)
        with torch.autocast("cpu", torch.bfloat16):
            got = ours(input, memory, **options)
            again = ours(input.bfloat16(), memory, got.state, **options)
        half = copy.deepcopy(ours).bfloat16()(input.bfloat16(), memory.bfloat16(), **options)
    for ours_, theirs in zip([*got[:3], *got.state[:3]], [*want[:3], *want.state[:3]], strict=True):
        if theirs is not None:
            assert ours_.dtype == torch.float32
            torch.testing.assert_close(ours_, theirs, rtol=0, atol=0.05)
    assert again.hidden.dtype == again.state.h.dtype == torch.float32
    for low, theirs in zip([*half[:3], half.state.h], [*want[:3], want.state.h], strict=True):
        assert low.dtype == torch.bfloat16
        torch.testing.assert_close(low.float(), theirs, rtol=0, atol=0.05)


def test_it_is_a_plain_module() -> None:
    ours = decoder(attend="after", dtype=torch.float32)
    G = 3 * H
    assert {name: tuple(weight.shape) for name, weight in ours.state_dict().items()} == {
        "weight_ih": (G, I + F), "weight_hh": (G, H), "bias_ih": (G,), "bias_hh": (G,), "weight_out": (F, K + H),
        "attention.weight_query": (11, H), "attention.weight_key": (11, K), "attention.bias": (11,),
        "attention.v": (11,),
    }  # fmt: skip
    input, memory, *_ = batch(torch.float32)
    want = ours(input, memory)
    file = io.BytesIO()
    torch.save(ours.state_dict(), file)
    file.seek(0)
    other = decoder(attend="after", dtype=torch.float32)
    assert not torch.equal(other(input, memory).hidden, want.hidden)
    other.load_state_dict(torch.load(file))
    for same in (other, copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        torch.testing.assert_close(same(input, memory), want)
    torch.testing.assert_close(pickle.loads(pickle.dumps(want)), want)
    functional = torch.func.functional_call(ours, dict(ours.named_parameters()), (input, memory))
    torch.testing.assert_close(functional, want)
    before = ours.weight_ih.clone()
    ours.reset_parameters()
    assert not torch.equal(ours.weight_ih, before) and ours.weight_ih.abs().max() <= H**-0.5
    on_meta = AttentionDecoder(I, H, AdditiveAttention(H, K, device="meta"), device="meta", batch_first=True)
    assert on_meta(input.to("meta"), memory.to("meta")).hidden.shape == (B, T, H)
    assert "5, 8, cell='gru', attend='after', feed_size=10, batch_first=True" in repr(ours)
    assert "(attention): AdditiveAttention(8, 9, attention_size=11, bias=True)" in repr(ours)
    local = LuongAttention(8, 9, "concat", window=2)
    assert repr(local) == "LuongAttention(8, 9, score='concat', attention_size=8, window=2, local='predictive')"


BAD_OPTIONS = [
    (dict(cell="tree"), ValueError, "cell must be one of lstm, gru, rnn, got 'tree'"),
    (dict(attend="now"), ValueError, "attend must be one of before, after, got 'now'"),
    (dict(hidden_size=0), ValueError, "attention must have query_size=0"),
    (dict(input_size=0), ValueError, "input_size must be a positive int, got 0"),
    (dict(feed_size=3), ValueError, "feed_size must be the memory's, 9, for attend='before', got 3"),
    (dict(attention="dot"), TypeError, "attention must be a torch.nn.Module, got str"),
    (dict(attention=AdditiveAttention(7, K)), ValueError, "query_size=8, the hidden_size, got 7"),
    (dict(attention=Mean()), ValueError, "memory_size must be given: Mean has no key_size"),
]


@pytest.mark.parametrize(("options", "error", "message"), BAD_OPTIONS)
def test_bad_options_are_named(options: dict[str, Any], error: type[Exception], message: str) -> None:
    given = {"input_size": I, "hidden_size": H, "attention": AdditiveAttention(H, K), **options}
    with pytest.raises(error, match=message):
        AttentionDecoder(**given)


BAD_ATTENTIONS = [
    (dict(score="cosine"), "score must be one of dot, general, concat, got 'cosine'"),
    (dict(score="dot"), "key_size must be query_size, 8, for score='dot', got 9"),
    (dict(attention_size=3), "attention_size is for score='concat', got 3 for 'general'"),
    (dict(window=0), "window must be a positive int, got 0"),
    (dict(window=2, local="far"), "local must be one of predictive, monotonic, got 'far'"),
]


@pytest.mark.parametrize(("options", "message"), BAD_ATTENTIONS)
def test_bad_attentions_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LuongAttention(H, K, **options)


BAD_CALLS = [
    (lambda c: dict(input=c["input"][0]), ValueError, r"input must be \[B, T, 5\], got \[7, 5\]"),
    (lambda c: dict(input=c["input"][..., 1:]), ValueError, r"input must be \[B, T, 5\], got \[4, 7, 4\]"),
    (lambda c: dict(input=c["input"][:, :0]), RuntimeError, "Expected sequence length to be larger than 0"),
    (lambda c: dict(input=[1]), TypeError, "input must be a torch.Tensor, got list"),
    (lambda c: dict(memory=c["memory"][:3]), ValueError, r"memory must be \[4, S, 9\], got \[3, 6, 9\]"),
    (lambda c: dict(memory=c["memory"][:, :0]), ValueError, "memory must have at least one place, got S=0"),
    (lambda c: dict(memory=c["memory"].float()), ValueError, "memory must be torch.float64, as input is, got torch.fl"),
    (lambda c: dict(memory=c["memory"].to("meta")), ValueError, "memory must be on input's device, cpu, got meta"),
    (lambda c: dict(keys=c["memory"]), ValueError, r"keys must be \[4, 6, 11\], got \[4, 6, 9\]"),
    (lambda c: dict(state=torch.zeros(1, 4, 8)), ValueError, r"state.h must be \[4, 8\], got \[1, 4, 8\]"),
    (lambda c: dict(state=torch.zeros(4, 8)), ValueError, "state.h must be torch.float64, as input is, got torch.fl"),
    (lambda c: dict(state=(1, 2)), TypeError, "state must be h or an AttentionDecoderState, got 2 in a tuple"),
    (lambda c: dict(state="h"), TypeError, "state.h must be a torch.Tensor, got str"),
    (
        lambda c: dict(
            state=AttentionDecoderState(c["input"][:, :1, :1].expand(4, 1, 8)[:, 0], feed=c["memory"][:, 0])
        ),
        ValueError,
        "state.feed must be None for cell='gru', attend='before'",
    ),
    (lambda c: dict(lengths=torch.tensor([1, 2])), ValueError, r"lengths must be \[4\], one for each row, got \[2\]"),
    (lambda c: dict(lengths=torch.tensor([1, 2, 3, 8])), ValueError, "lengths must be between 0 and T=7, got 1 to 8"),
    (lambda c: dict(lengths=torch.tensor([1.0, 2, 3, 4])), ValueError, "lengths must be integers, got torch.float32"),
    (lambda c: dict(lengths=[1, 2, 3, 4]), TypeError, "lengths must be a torch.Tensor, got list"),
    (lambda c: dict(memory_key_padding_mask=torch.zeros(4, 6)), TypeError, "memory_key_padding_mask must be a torch.b"),
    (
        lambda c: dict(memory_key_padding_mask=torch.zeros(6, 4, dtype=torch.bool)),
        ValueError,
        r"memory_key_padding_mask must be \[4, 6\], got \[6, 4\]",
    ),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD_CALLS)
def test_bad_calls_name_the_argument(change: Any, error: type[Exception], message: str) -> None:
    input, memory, *_ = batch()
    given = dict(input=input, memory=memory)
    with pytest.raises(error, match=message):
        decoder()(**{**given, **change(given)})


def test_bad_calls_of_an_attention() -> None:
    _, memory, _, padding = batch(torch.float32)
    attention, query = AdditiveAttention(H, K), torch.randn(B, H)
    monotonic = LuongAttention(H, K, window=1, local="monotonic")
    for call, message in (
        (lambda: attention(query[:, 1:], memory), r"query must be \[B, 8\] or \[B, L, 8\], got \[4, 7\]"),
        (lambda: attention(query, memory[:2]), r"memory must be \[4, S, 9\] with at least one place, got \[2, 6, 9\]"),
        (lambda: attention(query, memory, keys=memory), r"keys must be \[4, 6, 8\], as project\(memory\) gives them"),
        (lambda: attention(query, memory, padding[:, 1:]), r"key_padding_mask must be \[4, 6\], got \[4, 5\]"),
        (lambda: monotonic(query, memory), "positions must be given for one query of monotonic attention"),
        (lambda: monotonic(query, memory, positions=torch.zeros(3)), r"positions must be \[4\], got \[3\]"),
        (lambda: LuongAttention(H, K)(query, memory, positions=torch.zeros(4)), "positions are for monotonic"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(TypeError, match=r"key_padding_mask must be a torch.bool tensor.* got torch.float32"):
        attention(query, memory, padding.float())


def test_gradient_checkpointing() -> None:
    decoder = fastseq.nn.AttentionDecoder(5, 8, fastseq.nn.AdditiveAttention(8, 6))
    x, memory = torch.randn(4, 2, 5, requires_grad=True), torch.randn(3, 2, 6)
    want = torch.autograd.grad(decoder(x, memory).hidden.sum(), x)
    y = checkpoint(decoder, x, memory, use_reentrant=False)
    torch.testing.assert_close(torch.autograd.grad(y.hidden.sum(), x), want)
