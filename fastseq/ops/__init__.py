"""The ops, one file each: the op's contract, its table of implementations and its test cases."""

from fastseq.ops import (
    activation,
    attention,
    attention_decoder,
    causal_conv1d,
    conv_pool,
    cross_entropy,
    gru,
    lstm,
    norm,
    rnn,
)

__all__ = [
    "activation",
    "attention",
    "attention_decoder",
    "causal_conv1d",
    "conv_pool",
    "cross_entropy",
    "gru",
    "lstm",
    "norm",
    "rnn",
]
