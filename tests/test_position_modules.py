"""Positions and the feed-forward network against their formulas."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import require_native
from torch import Tensor, nn

import fastseq
from fastseq.nn import (
    FeedForward,
    KVCache,
    LearnedPositions,
    RotaryEmbedding,
    SinusoidalPositions,
    TransformerEncoder,
    TransformerEncoderLayer,
)

N, L, E = 2, 5, 8


def test_feed_forward_is_that_of_torchs_layer() -> None:
    layer = nn.TransformerEncoderLayer(E, 2, 12, dropout=0.0, activation="gelu")
    ours = FeedForward(E, 12, 0.0, "gelu")
    ours.load_state_dict({k: v for k, v in layer.state_dict().items() if k.startswith("linear")})
    x = torch.randn(N, L, E)
    torch.testing.assert_close(ours(x), layer._ff_block(x))


@pytest.mark.parametrize(("name", "gate"), [("swiglu", F.silu), ("geglu", F.gelu)])
@pytest.mark.parametrize("bias", [True, False])
def test_gated_feed_forward(name: str, gate, bias: bool) -> None:
    ours = FeedForward(E, 12, 0.0, name, bias=bias, dtype=torch.float64)
    x = torch.randn(N, L, E, dtype=torch.float64)
    assert ours.linear1.weight.shape == (24, E) and (ours.linear1.bias is not None) == bias
    both = ours.linear1(x)
    torch.testing.assert_close(ours(x), ours.linear2(gate(both[..., :12]) * both[..., 12:]))


def test_feed_forward_drops_in_training_only() -> None:
    ours = FeedForward(E, 12, 1.0, torch.tanh)
    x = torch.randn(N, L, E)
    torch.testing.assert_close(ours(x), ours.linear2.bias.expand_as(x))
    torch.testing.assert_close(ours.eval()(x), ours.linear2(torch.tanh(ours.linear1(x))))
    with pytest.raises(ValueError, match=r"activation must be one of relu, .*'elu'"):
        FeedForward(E, 12, activation="elu")


@pytest.mark.parametrize("width", [8, 7, 1])
def test_sinusoidal_positions(width: int) -> None:
    ours = SinusoidalPositions(width, max_length=4000, batch_first=True)
    assert not list(ours.parameters()) and not ours.state_dict()
    x = torch.randn(N, 10, width)
    added = ours(x, offset=3980) - x
    for place, i in ((0, 0), (3, width - 1), (9, width // 2)):
        angle = (3980 + place) / 10000 ** ((i - i % 2) / width)
        want = math.cos(angle) if i % 2 else math.sin(angle)
        torch.testing.assert_close(added[:, place, i], torch.full((N,), want), atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", [SinusoidalPositions, LearnedPositions])
def test_layouts_offsets_and_ends(kind: type) -> None:
    ours, apart = (kind(E, max_length=L, batch_first=batch_first) for batch_first in (True, False))
    apart.load_state_dict(ours.state_dict())
    x = torch.randn(N, L, E)
    want = x + ours.weight
    torch.testing.assert_close(ours(x), want)
    torch.testing.assert_close(ours(x[0]), want[0])
    torch.testing.assert_close(apart(x.transpose(0, 1)), want.transpose(0, 1))
    torch.testing.assert_close(torch.cat([ours(x[:, :2]), ours(x[:, 2:], offset=2)], 1), want)
    assert ours(x.half()).dtype == torch.float16
    for call, match in (
        (lambda: ours(x, offset=1), r"x has 5 places from offset 1 on, but there are positions for 5"),
        (lambda: ours(x, offset=-1), "offset must be at least 0, got -1"),
        (lambda: ours(x[..., :4]), r"last of 8 features, got \[2, 5, 4\]"),
        (lambda: ours(x[0, 0]), "two or three dimensions"),
    ):
        with pytest.raises(ValueError, match=match):
            call()


def test_learned_positions_learn() -> None:
    ours = LearnedPositions(E, 6)
    ours(torch.randn(4, N, E)).sum().backward()
    assert ours.weight.grad[:4].eq(N).all() and not ours.weight.grad[4:].any()
    assert 0 < ours.weight.std() < 0.05


def rotated(x: Tensor, interleaved: bool, base: float) -> Tensor:
    """Each pair as a complex number."""
    D = x.shape[-1]
    pairs = [(2 * i, 2 * i + 1) if interleaved else (i, i + D // 2) for i in range(D // 2)]
    out = torch.empty_like(x)
    for place in range(x.shape[-2]):
        for i, (a, b) in enumerate(pairs):
            turned = torch.complex(x[..., place, a], x[..., place, b]) * complex(
                math.cos(place / base ** (2 * i / D)), math.sin(place / base ** (2 * i / D))
            )
            out[..., place, a], out[..., place, b] = turned.real, turned.imag
    return out


@pytest.mark.parametrize("interleaved", [True, False])
def test_rotary_embedding(interleaved: bool) -> None:
    ours = RotaryEmbedding(E, 20, base=100.0, interleaved=interleaved, dtype=torch.float64)
    assert not list(ours.parameters()) and not ours.state_dict()
    query, key = torch.randn(N, 3, L, E, dtype=torch.float64), torch.randn(N, 1, 9, E, dtype=torch.float64)
    q, k = ours(query, key)
    torch.testing.assert_close(q, rotated(query, interleaved, 100.0))
    torch.testing.assert_close(k, rotated(key, interleaved, 100.0))
    parts = [ours(query[..., a:b, :], key[..., a:b, :], offset=a) for a, b in ((0, 2), (2, L))]
    torch.testing.assert_close(torch.cat([p[0] for p in parts], -2), q)
    # Products are of distances.
    later = ours(query, key, offset=7)
    torch.testing.assert_close(later[0] @ later[1].mT, q @ k.mT)
    for call, match in (
        (lambda: ours(query, key, offset=12), "key has 9 places from offset 12 on, but there are positions for 20"),
        (lambda: ours(query[..., :6], key), r"query must be \[..., places, 8\], got \[2, 3, 5, 6\]"),
        (lambda: RotaryEmbedding(7), "dim must be even, got 7"),
    ):
        with pytest.raises(ValueError, match=match):
            call()


@pytest.mark.parametrize("build", [lambda **o: SinusoidalPositions(E, 9, **o), lambda **o: RotaryEmbedding(E, 9, **o)])
def test_tables_are_filled_wherever_they_come_from(build) -> None:
    want = dict(build().named_buffers())
    with torch.device("meta"):
        ours = build()
    assert all(t.is_meta for t in ours.buffers())
    ours.to_empty(device="cpu")
    ours.reset_parameters()
    for module in (ours, copy.deepcopy(ours), build(device="cpu", dtype=torch.float32)):
        for name, table in module.named_buffers():
            torch.testing.assert_close(table, want[name])


def test_positions_go_with_a_cache() -> None:
    positions = SinusoidalPositions(E, 20, batch_first=True)
    stack = TransformerEncoder(TransformerEncoderLayer(E, 2, 12, batch_first=True), 2).eval()
    x, cache, outs = torch.randn(N, L, E), KVCache(), []
    with torch.no_grad():
        want = stack(positions(x), nn.Transformer.generate_square_subsequent_mask(L), is_causal=True)
        for new in x.split([3, 1, 1], 1):
            outs.append(stack(positions(new, offset=len(cache)), cache=cache))
    torch.testing.assert_close(torch.cat(outs, 1), want)


@pytest.mark.parametrize("activation", ["relu", "gelu", "silu", "geglu", "swiglu"])
def test_feed_forward_is_one_pass_unless_its_dropout_is_watched(
    activation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    require_native()
    calls = []
    fused = fastseq.functional.bias_activation
    monkeypatch.setattr(
        "fastseq.nn.feedforward.bias_activation", lambda *args, **kw: (calls.append(kw), fused(*args, **kw))[1]
    )
    ours, x = FeedForward(E, 12, 0.5, activation), torch.randn(3, 4, E)
    torch.manual_seed(1)
    first = ours(x)
    torch.manual_seed(1)
    assert torch.equal(ours(x), first) and not torch.equal(ours(x), first)
    assert [call["dropout_p"] for call in calls] == [0.5] * 3
    evaluated = ours.eval()(x)
    ours.dropout.register_forward_hook(lambda *_: None)
    torch.testing.assert_close(ours(x), evaluated)
    assert len(calls) == 4
