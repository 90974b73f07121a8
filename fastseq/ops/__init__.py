"""The ops, one file each: the op's contract, its table of implementations and its test cases."""

from fastseq.ops import attention, gru, lstm, rnn

__all__ = ["attention", "gru", "lstm", "rnn"]
