"""Drop-in modules: subclasses of torch.nn's with the same parameters, results and errors."""

from fastseq.nn.rnn import LSTM

__all__ = ["LSTM"]
