"""Recurrent models of one sequence: a classifier, a tagger and a language model."""

from typing import Any

import torch
from torch import Tensor, nn

import fastseq.nn
from fastseq.models.inputs import check_lengths, check_option, check_tokens
from fastseq.nn.places import padding_mask

CELLS: dict[str, Any] = {"rnn": fastseq.nn.RNN, "lstm": fastseq.nn.LSTM, "gru": fastseq.nn.GRU}
POOLINGS = ("last", "mean", "attention")

# What a recurrent layer carries from step to step: h [L*D, B, H], or of an LSTM (h, c).
RecurrentState = Tensor | tuple[Tensor, Tensor]


def recurrent_layers(
    cell: str, input_size: int, hidden: int, layers: int, dropout: float = 0.0, bidirectional: bool = False
) -> Any:
    """Recurrent layers [B, T, input_size] -> [B, T, D*hidden], with dropout between them.

    Raises:
        ValueError: the cell is unknown.
    """
    check_option("cell", cell, CELLS)
    between = dropout if layers > 1 else 0.0
    return CELLS[cell](
        input_size, hidden, num_layers=layers, batch_first=True, dropout=between, bidirectional=bidirectional
    )


class RecurrentEncoder(nn.Module):
    """Recurrent layers over a sequence of tokens, which are embedded first, or of features.

        x_t = E[token_t]        h_t = cell(x_t, h_{t-1})

    The cell is an LSTM (Hochreiter and Schmidhuber 1997), a GRU (Cho et al. 2014, arXiv:1406.1078) or a plain one with
    tanh. In a bidirectional encoder (Schuster and Paliwal 1997) others run from each row's last step to its first, and
    each step gives both states.

    Args:
        input_size: I, the features of a step: those of the embeddings, or of the input.
        hidden: H, the features of a state.
        vocabulary: how many tokens there are; None for input that is features.
        cell: "rnn", "lstm" or "gru".
        layers: L
        bidirectional: whether there are D = 2 directions, or 1.
        dropout: of embeddings, and between layers.

    Raises:
        ValueError: the cell is unknown.
    """

    def __init__(
        self,
        input_size: int,
        hidden: int,
        vocabulary: int | None = None,
        cell: str = "lstm",
        layers: int = 1,
        bidirectional: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.output_size = 2 * hidden if bidirectional else hidden
        self.embedding = None if vocabulary is None else nn.Embedding(vocabulary, input_size)
        self.dropout = nn.Dropout(dropout)
        self.rnn = recurrent_layers(cell, input_size, hidden, layers, dropout, bidirectional)

    def forward(self, input: Tensor, lengths: Tensor | None = None) -> tuple[Tensor, RecurrentState]:
        """What torch's recurrent layers return.

        Args:
            input: [B, T] int64 tokens, or [B, T, I] features.
            lengths: [B] integers, how many steps each row has; by default all T.

        Returns:
            [B, T, D*H], the last layer's states, zeros past the lengths; and h [L*D, B, H] after each row's last step,
            of an LSTM (h, c).
        """
        x = input if self.embedding is None else self.dropout(self.embedding(input))  # [B, T, I]
        return self.rnn(x, lengths=lengths)

    def check(self, input: Any, lengths: Any) -> Tensor | None:
        """Raises TypeError, ValueError or IndexError for what forward cannot take, and returns the lengths."""
        I = self.rnn.input_size
        if self.embedding is not None:
            check_tokens("input", input, self.embedding.num_embeddings)
        elif not isinstance(input, Tensor) or input.dim() != 3 or not input.numel() or input.shape[2] != I:
            got = list(input.shape) if isinstance(input, Tensor) else type(input).__name__
            raise ValueError(f"input must be [B, T, {I}] with at least one step, got {got}")
        return check_lengths("lengths", lengths, *input.shape[:2])


class SequenceClassifier(nn.Module):
    """One label for a sequence, from its recurrent states y_1 ... y_n (`RecurrentEncoder`), pooled:

        last        p = the state after the last step, of both directions: [y_n forward; y_1 backward]
        mean        p = (y_1 + ... + y_n) / n
        attention   p = sum_t a_t y_t,  a = softmax_t(v . tanh(W y_t + b))    (Yang et al. 2016, aclanthology N16-1174)

        logits = W_o dropout(p) + b_o

    Args:
        input_size: I, the features of a step: those of the embeddings, or of the input.
        hidden: H, the features of a state.
        classes: C
        vocabulary: how many tokens there are; None for input that is features.
        cell: "rnn", "lstm" or "gru".
        layers: how many.
        bidirectional: whether there are D = 2 directions, or 1.
        pooling: "last", "mean" or "attention".
        dropout: of embeddings, between layers and of what is pooled.

    Raises:
        ValueError: cell or pooling is unknown.
    """

    def __init__(
        self,
        input_size: int,
        hidden: int,
        classes: int,
        vocabulary: int | None = None,
        cell: str = "lstm",
        layers: int = 1,
        bidirectional: bool = False,
        pooling: str = "last",
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        check_option("pooling", pooling, POOLINGS)
        self.pooling = pooling
        self.encoder = RecurrentEncoder(input_size, hidden, vocabulary, cell, layers, bidirectional, dropout)
        size = self.encoder.output_size
        if pooling == "attention":
            self.key = fastseq.nn.Linear(size, size)
            self.score = nn.Linear(size, 1, bias=False)
        self.dropout = nn.Dropout(dropout)
        self.output = fastseq.nn.Linear(size, classes)

    def forward(self, input: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Logits [B, C] of input [B, T] int64 tokens or [B, T, I] features; lengths [B], by default all T.

        Raises:
            TypeError, ValueError, IndexError: input or lengths are none of these.
        """
        lengths = self.encoder.check(input, lengths)
        y, state = self.encoder(input, lengths)  # [B, T, D*H], zeros past the lengths
        return self.output(self.dropout(self._pool(y, state, lengths)))

    def _pool(self, y: Tensor, state: RecurrentState, lengths: Tensor | None) -> Tensor:
        """[B, D*H]"""
        B, T, _ = y.shape
        if self.pooling == "last":
            h = state if isinstance(state, Tensor) else state[0]  # [L*D, B, H]
            directions = 2 if self.encoder.rnn.bidirectional else 1
            return h[-directions:].transpose(0, 1).reshape(B, -1)
        if self.pooling == "mean":
            return y.mean(1) if lengths is None else y.sum(1) / lengths.to(y.device).unsqueeze(1)
        scores = self.score(self.key(y).tanh()).squeeze(2)  # [B, T]
        if lengths is not None:
            scores = scores.masked_fill(padding_mask(lengths, T, y.device), -torch.inf)
        return (scores.softmax(1).unsqueeze(1) @ y).squeeze(1)


class SequenceTagger(nn.Module):
    """A label for each step of a sequence, from its recurrent states y_t (`RecurrentEncoder`):

        logits_t = W_o dropout(y_t) + b_o

    Args:
        input_size: I, the features of a step: those of the embeddings, or of the input.
        hidden: H, the features of a state.
        classes: C
        vocabulary: how many tokens there are; None for input that is features.
        cell: "rnn", "lstm" or "gru".
        layers: how many.
        bidirectional: whether there are D = 2 directions, or 1.
        dropout: of embeddings, between layers and of the last one's states.

    Raises:
        ValueError: the cell is unknown.
    """

    def __init__(
        self,
        input_size: int,
        hidden: int,
        classes: int,
        vocabulary: int | None = None,
        cell: str = "lstm",
        layers: int = 1,
        bidirectional: bool = True,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.encoder = RecurrentEncoder(input_size, hidden, vocabulary, cell, layers, bidirectional, dropout)
        self.dropout = nn.Dropout(dropout)
        self.output = fastseq.nn.Linear(self.encoder.output_size, classes)

    def forward(self, input: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Logits [B, T, C] of input [B, T] int64 tokens or [B, T, I] features; those past lengths [B] mean nothing.

        Raises:
            TypeError, ValueError, IndexError: input or lengths are none of these.
        """
        y, _ = self.encoder(input, self.encoder.check(input, lengths))  # [B, T, D*H]
        return self.output(self.dropout(y))


class RecurrentLM(nn.Module):
    """A language model: what follows each token, given all before (Mikolov et al. 2010; with an LSTM and dropout
    between layers Zaremba et al. 2014, arXiv:1409.2329).

        x_t = E[token_t]        h_t = cell(x_t, h_{t-1})        logits_t = W h_t + b

    Tied (Press and Wolf 2017, arXiv:1608.05859), W is E: what a token means is learned once. Where states are not of
    the size of embeddings, h_t is projected to it first.

    Long texts are learned window by window, without a gradient from one into the one before (truncated backpropagation
    through time), but with the state that it has left:

        state = None
        for tokens, targets in windows:
            logits, state = model(tokens, state)
            loss(logits.flatten(0, 1), targets.flatten()).backward()
            state = model.detach(state)

    It generates with `fastseq.decoding`, from `start(batch_size)`.

    Args:
        vocabulary: V, how many tokens there are.
        embedding: E, the features of an embedding.
        hidden: H, the features of a state.
        cell: "rnn", "lstm" or "gru".
        layers: L
        dropout: of embeddings, between layers and of the last one's states.
        tied: whether W is the embeddings.

    Raises:
        ValueError: the cell is unknown.
    """

    def __init__(
        self,
        vocabulary: int,
        embedding: int,
        hidden: int,
        cell: str = "lstm",
        layers: int = 1,
        dropout: float = 0.0,
        tied: bool = False,
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, embedding)
        self.rnn = recurrent_layers(cell, embedding, hidden, layers, dropout)
        self.dropout = nn.Dropout(dropout)
        is_projected = tied and hidden != embedding
        self.projection = fastseq.nn.Linear(hidden, embedding, bias=False) if is_projected else nn.Identity()
        self.output = fastseq.nn.Linear(embedding if tied else hidden, vocabulary)
        if tied:
            nn.init.normal_(self.embedding.weight, std=embedding**-0.5)  # of the size of logits' weights
            self.output.weight = self.embedding.weight

    def forward(self, tokens: Tensor, state: RecurrentState | None = None) -> tuple[Tensor, RecurrentState]:
        """What follows each token.

        Args:
            tokens: [B, T] int64
            state: that of the call before, by default zeros.

        Returns:
            Logits [B, T, V], and the state to go on from.

        Raises:
            TypeError, ValueError, IndexError: tokens are none of these.
        """
        check_tokens("tokens", tokens, self.embedding.num_embeddings)
        x = self.dropout(self.embedding(tokens))  # [B, T, E]
        y, state = self.rnn(x, state)  # [B, T, H]
        return self.output(self.projection(self.dropout(y))), state

    @staticmethod
    def detach(state: RecurrentState) -> RecurrentState:
        """The state, through which no gradient flows."""
        return state.detach() if isinstance(state, Tensor) else (state[0].detach(), state[1].detach())

    def start(self, batch_size: int) -> RecurrentState:
        """The state that so many rows begin with: zeros."""
        h = self.embedding.weight.new_zeros(self.rnn.num_layers, batch_size, self.rnn.hidden_size)
        return (h, h) if isinstance(self.rnn, nn.LSTM) else h

    def step(self, tokens: Tensor, state: RecurrentState) -> tuple[Tensor, RecurrentState]:
        """Logits [N, V] of what follows tokens [N], and the state thereafter."""
        logits, state = self(tokens.unsqueeze(1), state)
        return logits.squeeze(1), state

    def reorder(self, state: RecurrentState, rows: Tensor) -> RecurrentState:
        """The state of which row i is row rows[i] of this one."""
        return reorder_layers(state, rows)


def reorder_layers(state: RecurrentState, rows: Tensor) -> RecurrentState:
    """The state of recurrent layers with its rows of the batch in another order."""
    if isinstance(state, Tensor):
        return state.index_select(1, rows)
    return state[0].index_select(1, rows), state[1].index_select(1, rows)
