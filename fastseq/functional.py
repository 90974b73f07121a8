"""The ops as functions, for code that has no module: arguments are checked, anything else is in `fastseq.ops`."""

from fastseq.ops.lstm import lstm

__all__ = ["lstm"]
