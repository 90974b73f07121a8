"""The ops as functions, for code that has no module: arguments are checked, anything else is in `fastseq.ops`."""

from fastseq.nn.attention import multi_head_attention_forward
from fastseq.ops.activation import bias_activation
from fastseq.ops.attention import scaled_dot_product_attention
from fastseq.ops.cross_entropy import cross_entropy
from fastseq.ops.gru import gru
from fastseq.ops.lstm import lstm
from fastseq.ops.norm import add_norm
from fastseq.ops.rnn import rnn

__all__ = [
    "add_norm",
    "bias_activation",
    "cross_entropy",
    "gru",
    "lstm",
    "multi_head_attention_forward",
    "rnn",
    "scaled_dot_product_attention",
]
