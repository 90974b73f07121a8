"""The quick set: what users have of torch's sequence layers, each in a minute's share."""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from fastseq.bench import MODES, SECONDS, Progress, Report, compare


class _Streamed(nn.Module):
    """A recurrent layer that goes on from a state."""

    def __init__(self, layer: nn.RNNBase) -> None:
        super().__init__()
        self.layer = layer
        self.register_buffer("state", torch.zeros(layer.num_layers, 1, layer.hidden_size))

    def forward(self, x: Tensor) -> Any:
        return self.layer(x, (self.state, self.state) if isinstance(self.layer, nn.LSTM) else self.state)


class _Packed(nn.Module):
    """A recurrent layer on padded rows, which are packed for it; lengths fall from that of the rows to a quarter."""

    def __init__(self, layer: nn.RNNBase) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        packed = pack_padded_sequence(x, _lengths(x), batch_first=True)
        return pad_packed_sequence(self.layer(packed)[0], batch_first=True)[0]


class _SelfAttention(nn.Module):
    def __init__(self, attention: nn.MultiheadAttention, causal: int = 0) -> None:
        super().__init__()
        self.attention = attention
        mask = nn.Transformer.generate_square_subsequent_mask(causal) if causal else None
        self.register_buffer("mask", mask)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False, attn_mask=self.mask, is_causal=self.mask is not None)[0]


class _Padded(nn.Module):
    """A Transformer's encoder on padded rows; what it computes for padding is nobody's business."""

    def __init__(self, encoder: nn.TransformerEncoder) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, x: Tensor) -> Tensor:
        padding = torch.arange(x.shape[1], device=x.device) >= _lengths(x).to(x.device).unsqueeze(1)
        return self.encoder(x, src_key_padding_mask=padding).masked_fill(padding.unsqueeze(2), 0)


def _lengths(x: Tensor) -> Tensor:
    return torch.linspace(x.shape[1], x.shape[1] / 4, len(x)).round().long()


@dataclass(frozen=True)
class Case:
    """A model of the quick set, the shape [B, T, features] of its float32 input, and the modes that it is used in."""

    name: str
    make: Callable[[], nn.Module]
    shape: tuple[int, int, int]
    modes: tuple[str, ...] = MODES

    def __str__(self) -> str:
        return f"{self.name} {'x'.join(map(str, self.shape))}"


def _recurrent(kind: type[nn.RNNBase], size: int, **options: Any) -> nn.RNNBase:
    return kind(size, size, batch_first=True, **options)  # type: ignore[arg-type]


def _encoder(size: int, heads: int, layers: int, dropout: float = 0.1) -> nn.TransformerEncoder:
    layer = nn.TransformerEncoderLayer(size, heads, 4 * size, dropout, batch_first=True)
    return nn.TransformerEncoder(layer, layers)


def _attention(size: int, heads: int, dropout: float = 0.0) -> nn.MultiheadAttention:
    return nn.MultiheadAttention(size, heads, dropout, batch_first=True)


CASES = [
    Case("LSTM streaming", lambda: _Streamed(_recurrent(nn.LSTM, 256)), (1, 1, 256), ("inference",)),
    Case("LSTM", lambda: _recurrent(nn.LSTM, 512), (1, 100, 512)),
    Case("LSTM 2 layers", lambda: _recurrent(nn.LSTM, 256, num_layers=2), (32, 100, 256)),
    Case("LSTM both ways", lambda: _recurrent(nn.LSTM, 256, bidirectional=True), (8, 100, 256)),
    Case("LSTM packed", lambda: _Packed(_recurrent(nn.LSTM, 256)), (32, 100, 256)),
    Case("GRU streaming", lambda: _Streamed(_recurrent(nn.GRU, 256)), (1, 1, 256), ("inference",)),
    Case("GRU", lambda: _recurrent(nn.GRU, 256), (8, 100, 256)),
    Case("RNN", lambda: _recurrent(nn.RNN, 256), (16, 100, 256)),
    Case("MHA causal", lambda: _SelfAttention(_attention(256, 8), causal=256), (8, 256, 256)),
    Case("MHA dropout", lambda: _SelfAttention(_attention(256, 8, 0.1)), (16, 128, 256), ("training",)),
    Case("Encoder", lambda: _encoder(256, 4, 2), (1, 128, 256)),
    Case("Encoder padded", lambda: _Padded(_encoder(256, 4, 2)), (16, 128, 256)),
]


def run(
    *,
    modes: Sequence[str] = MODES,
    device: str = "cpu",
    seconds: float = SECONDS,
    threads: int | None = None,
    seed: int = 0,
    progress: Progress = lambda what, share: None,
) -> Report:
    """torch's own layers against fastseq's, on the cases of the quick set; arguments and errors as of `compare`."""
    chosen = [(case, mode) for case in CASES for mode in case.modes if mode in modes]
    results = []
    for k, (case, mode) in enumerate(chosen):
        told = lambda what, share, k=k, case=case: progress(f"{case}: {what}", (k + share) / len(chosen))  # noqa: E731
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = case.make().to(device)
            x = torch.randn(case.shape).to(device).requires_grad_()  # from a layer before it
        options: Any = dict(seconds=seconds, threads=threads, seed=seed, progress=told)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The PyTorch API of nested tensors")  # in which torch packs padded rows
            results += compare(model, x, name=str(case), modes=[mode], **options).results
    return Report(results, threads or torch.get_num_threads(), device)
