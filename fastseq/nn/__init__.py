"""Drop-in modules: subclasses of torch.nn's with the same parameters, results and errors."""

from fastseq.nn.attention import MultiheadAttention
from fastseq.nn.cells import GRUCell, LSTMCell, RNNCell
from fastseq.nn.rnn import GRU, LSTM, RNN

__all__ = ["GRU", "LSTM", "RNN", "GRUCell", "LSTMCell", "MultiheadAttention", "RNNCell"]
