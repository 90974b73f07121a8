"""The ops, one file each: the op's contract, its table of implementations and its test cases."""

from fastseq.ops import gru, lstm, rnn

__all__ = ["gru", "lstm", "rnn"]
