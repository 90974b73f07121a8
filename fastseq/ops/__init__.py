"""The ops, one file each: the op's contract, its table of implementations and its test cases."""

from fastseq.ops import activation, attention, cross_entropy, gru, lstm, norm, rnn

__all__ = ["activation", "attention", "cross_entropy", "gru", "lstm", "norm", "rnn"]
