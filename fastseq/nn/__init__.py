"""Drop-in modules: subclasses of torch.nn's with the same parameters, results and errors."""

from fastseq.nn.attention import MultiheadAttention
from fastseq.nn.cache import KVCache
from fastseq.nn.cells import GRUCell, LSTMCell, RNNCell
from fastseq.nn.feedforward import FeedForward
from fastseq.nn.linear import Linear
from fastseq.nn.loss import CrossEntropyLoss
from fastseq.nn.positions import LearnedPositions, RotaryEmbedding, SinusoidalPositions
from fastseq.nn.rnn import GRU, LSTM, RNN
from fastseq.nn.transformer import (
    Transformer,
    TransformerDecoder,
    TransformerDecoderLayer,
    TransformerEncoder,
    TransformerEncoderLayer,
)

__all__ = [
    "GRU",
    "LSTM",
    "RNN",
    "CrossEntropyLoss",
    "FeedForward",
    "GRUCell",
    "KVCache",
    "LSTMCell",
    "LearnedPositions",
    "Linear",
    "MultiheadAttention",
    "RNNCell",
    "RotaryEmbedding",
    "SinusoidalPositions",
    "Transformer",
    "TransformerDecoder",
    "TransformerDecoderLayer",
    "TransformerEncoder",
    "TransformerEncoderLayer",
]
