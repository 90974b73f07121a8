"""The ops as functions, for code that has no module: arguments are checked, anything else is in `fastseq.ops`."""

from fastseq.nn.attention import multi_head_attention_forward
from fastseq.ops.attention import scaled_dot_product_attention
from fastseq.ops.gru import gru
from fastseq.ops.lstm import lstm
from fastseq.ops.rnn import rnn

__all__ = ["gru", "lstm", "multi_head_attention_forward", "rnn", "scaled_dot_product_attention"]
