"""Drop-in modules: subclasses of torch.nn's with the same parameters, results and errors; and modules beside them."""

from fastseq.nn.attention import MultiheadAttention
from fastseq.nn.attention_decoder import AttentionDecoder, AttentionDecoderOutput, AttentionDecoderState
from fastseq.nn.attention_mechanism import AdditiveAttention, LuongAttention
from fastseq.nn.cache import KVCache
from fastseq.nn.causal_conv import CausalConv1d
from fastseq.nn.cells import GRUCell, LSTMCell, RNNCell
from fastseq.nn.conv import ConvReLUPool2d
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
    "AdditiveAttention",
    "AttentionDecoder",
    "AttentionDecoderOutput",
    "AttentionDecoderState",
    "CausalConv1d",
    "ConvReLUPool2d",
    "CrossEntropyLoss",
    "FeedForward",
    "GRUCell",
    "KVCache",
    "LSTMCell",
    "LearnedPositions",
    "Linear",
    "LuongAttention",
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
