"""The ops as functions, for code that has no module: arguments are checked, anything else is in `fastseq.ops`."""

from fastseq.nn.attention import multi_head_attention_forward
from fastseq.ops.activation import bias_activation
from fastseq.ops.attention import scaled_dot_product_attention
from fastseq.ops.attention_decoder import attention_decoder
from fastseq.ops.causal_conv1d import causal_conv1d
from fastseq.ops.conv_pool import conv_relu_pool
from fastseq.ops.cross_entropy import cross_entropy
from fastseq.ops.gru import gru
from fastseq.ops.lstm import lstm
from fastseq.ops.norm import add_norm
from fastseq.ops.rnn import rnn

__all__ = [
    "add_norm",
    "attention_decoder",
    "bias_activation",
    "causal_conv1d",
    "conv_relu_pool",
    "cross_entropy",
    "gru",
    "lstm",
    "multi_head_attention_forward",
    "rnn",
    "scaled_dot_product_attention",
]
