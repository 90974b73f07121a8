"""The recurrent encoder-decoder, without attention and with either of the two that the field began with."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import fastseq.nn
from fastseq.models.inputs import check_lengths, check_option, check_tokens, where_present
from fastseq.models.recurrent import CELLS, RecurrentEncoder, RecurrentState, recurrent_layers, reorder_layers
from fastseq.nn import AdditiveAttention, AttentionDecoder, AttentionDecoderState, LuongAttention
from fastseq.nn.places import padding_mask

ATTENTIONS = (None, "bahdanau", "luong")


class Seq2Seq(nn.Module):
    """An encoder reads the source, a decoder predicts what follows each token of the target, given all before it:

        m_1 ... m_S = encoder(src)                           its states, of both directions: the memory
        h_0 = tanh(W_b [last forward; last backward])        the bridge, of each layer; an LSTM's c_0 without tanh.
                                                             With one direction h_0 is the last state itself

    and then, with y_t the embedded token that the decoder is fed at step t:

    None (Sutskever et al. 2014, arXiv:1409.3215): all that the decoder knows of the source is h_0.

        h_t = cell(y_t, h_{t-1})                             logits_t = W_o h_t + b_o

    "bahdanau" (Bahdanau et al. 2015, arXiv:1409.0473): the decoder's state attends to the memory before each step.
    The paper's maxout layer is one with tanh here.

        z_t = sum_s a_s m_s,  a = softmax_s(v . tanh(W_q h_{t-1} + W_k m_s))
        h_t = cell([y_t; z_t], h_{t-1})                      logits_t = W_o tanh(W_r [h_t; z_t; y_t] + b_r) + b_o

    "luong" (Luong et al. 2015, arXiv:1508.04025, "general", with input feeding): it attends after the step.

        h_t = cell([y_t; f_{t-1}], h_{t-1})                  z_t = sum_s a_s m_s,  a = softmax_s(h_t . W_k m_s)
        f_t = tanh(W_c [z_t; h_t])                           logits_t = W_o f_t + b_o

    With more layers the first one attends, as in Wu et al. 2016 (arXiv:1609.08144). The others run over what it gives,
    h_t or f_t, and the last one's states take the place of that in the logits.

    It generates with `fastseq.decoding`, from `start(src, lengths)`; `weights(state)` are the attention's.

    Args:
        src_vocabulary: how many tokens of the source there are.
        tgt_vocabulary: V, how many of the target.
        embedding: E, the features of an embedding.
        hidden: H, the features of a state.
        cell: "rnn", "lstm" or "gru".
        layers: L, of the encoder, and of the decoder.
        bidirectional: whether the encoder has D = 2 directions, or 1; memory has M = D*H features.
        attention: None, "bahdanau" or "luong".
        dropout: of embeddings, between layers and before W_o.

    Raises:
        ValueError: cell or attention is unknown, or there is no layer.
    """

    def __init__(
        self,
        src_vocabulary: int,
        tgt_vocabulary: int,
        embedding: int = 256,
        hidden: int = 256,
        cell: str = "gru",
        layers: int = 1,
        bidirectional: bool = True,
        attention: str | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        check_option("cell", cell, CELLS)
        check_option("attention", attention, ATTENTIONS)
        if layers < 1:
            raise ValueError(f"layers must be at least 1, got {layers}")
        self.src_vocabulary, self.cell, self.attention = src_vocabulary, cell, attention
        self.encoder = RecurrentEncoder(embedding, hidden, src_vocabulary, cell, layers, bidirectional, dropout)
        M = self.encoder.output_size
        if bidirectional:
            self.bridge = _Bridge(M, hidden, layers)
            if cell == "lstm":
                self.cell_bridge = _Bridge(M, hidden, layers)

        self.embedding = nn.Embedding(tgt_vocabulary, embedding)
        self.dropout = nn.Dropout(dropout)
        layer: Any = None
        if attention == "bahdanau":
            layer = AttentionDecoder(embedding, hidden, AdditiveAttention(hidden, M), cell, "before", batch_first=True)
        elif attention == "luong":
            layer = AttentionDecoder(embedding, hidden, LuongAttention(hidden, M), cell, "after", batch_first=True)
        self.attention_layer = layer
        others = layers if layer is None else layers - 1
        size = embedding if layer is None else hidden
        self.layers = recurrent_layers(cell, size, hidden, others, dropout) if others else None
        self.readout = fastseq.nn.Linear(hidden + M + embedding, hidden) if attention == "bahdanau" else None
        self.output = fastseq.nn.Linear(hidden, tgt_vocabulary)

    def forward(
        self,
        src: Tensor,
        tgt_in: Tensor,
        src_lengths: Tensor | None = None,
        tgt_lengths: Tensor | None = None,
        teacher_forcing: float = 1.0,
    ) -> Tensor:
        """What follows each token of the target.

        Args:
            src: [B, S] int64 tokens.
            tgt_in: [B, T] int64, the target with what begins a sentence before it, without its last token.
            src_lengths: [B] integers, how many tokens each row has; by default all S.
            tgt_lengths: [B], likewise of tgt_in.
            teacher_forcing: with what probability the decoder is fed tgt_in, at each step and in each row; if not, it
                is fed what it finds most probable itself (scheduled sampling, Bengio et al. 2015, arXiv:1506.03099).
                With 1 all steps are one call of each layer. The first token is always that of tgt_in.

        Returns:
            Logits [B, T, V], zeros past the lengths.

        Raises:
            TypeError, ValueError, IndexError: an argument is none of these.
        """
        if not 0 <= teacher_forcing <= 1:
            raise ValueError(f"teacher_forcing must be between 0 and 1, got {teacher_forcing}")
        check_tokens("tgt_in", tgt_in, self.embedding.num_embeddings)
        state = self.start(src, src_lengths)
        B, T = tgt_in.shape
        if len(src) != B:
            raise ValueError(f"tgt_in must be of as many rows as src, {len(src)}, got {B}")
        tgt_lengths = check_lengths("tgt_lengths", tgt_lengths, B, T)
        if teacher_forcing == 1:
            return self._decode(tgt_in, state, tgt_lengths)[0]

        tokens, steps = tgt_in[:, :1], []
        for t in range(T):
            logits, state = self._decode(tokens, state)  # [B, 1, V]
            steps.append(logits)
            if t + 1 < T:
                is_forced = torch.rand(B, 1, device=tgt_in.device) < teacher_forcing
                tokens = torch.where(is_forced, tgt_in[:, t + 1 : t + 2], logits.argmax(2))
        return torch.cat(steps, 1)

    def _decode(
        self, tokens: Tensor, state: "Seq2SeqState", lengths: Tensor | None = None
    ) -> tuple[Tensor, "Seq2SeqState"]:
        """Logits [B, T, V] of what follows tokens [B, T], and the state after the last."""
        x = embedded = self.dropout(self.embedding(tokens))  # [B, T, E]
        attending, layers, weights = state.attending, state.layers, None
        if self.attention_layer is not None:
            seen = self.attention_layer(
                x,
                state.memory,
                attending,
                lengths=lengths,
                memory_key_padding_mask=state.padding,
                keys=state.keys,
            )
            x = seen.hidden if self.readout is not None else seen.feed  # [B, T, H]
            attending, weights = seen.state, seen.weights[:, -1]
        if self.layers is not None:
            x = x if self.attention_layer is None else self.dropout(x)
            x, layers = self.layers(x, layers, lengths=lengths)
        state = state._replace(attending=attending, layers=layers, weights=weights)
        read = (x,) if self.readout is None else (x, seen.feed, embedded)
        return where_present(self._logits, lengths, *read), state

    def _logits(self, *read: Tensor) -> Tensor:
        """[..., V] of the last layer's states [..., H]; with "bahdanau" of these, contexts and embedded tokens."""
        h = read[0] if self.readout is None else self.readout(torch.cat(read, -1)).tanh()
        return self.output(self.dropout(h))

    def start(self, src: Tensor, lengths: Tensor | None = None) -> "Seq2SeqState":
        """The state that a target begins with. Keys are projected here, once for all steps.

        Args:
            src: [B, S] int64 tokens.
            lengths: [B] integers, how many each row has; by default all S.

        Raises:
            TypeError, ValueError, IndexError: src or lengths are none of these.
        """
        check_tokens("src", src, self.src_vocabulary)
        lengths = check_lengths("src_lengths", lengths, *src.shape)
        memory, state = self.encoder(src, lengths)  # [B, S, M]
        h, c = state if self.cell == "lstm" else (state, None)  # [L*D, B, H]
        if self.encoder.rnn.bidirectional:
            h = self.bridge(h).tanh()  # [L, B, H]
            c = c if c is None else self.cell_bridge(c)
        source = torch.arange(len(src), device=src.device)
        if self.attention_layer is None:
            return Seq2SeqState(source, h if c is None else (h, c))
        attending = AttentionDecoderState(h[0], c if c is None else c[0])
        layers = h[1:] if c is None else (h[1:], c[1:])
        padding = None if lengths is None else padding_mask(lengths, src.shape[1], src.device)
        keys = where_present(self.attention_layer.attention.project, lengths, memory)
        return Seq2SeqState(source, layers, attending, memory, keys, padding)

    def step(self, tokens: Tensor, state: "Seq2SeqState") -> tuple[Tensor, "Seq2SeqState"]:
        """Logits [N, V] of what follows tokens [N], and the state thereafter."""
        tokens = tokens.unsqueeze(1)
        check_tokens("tokens", tokens, self.embedding.num_embeddings)
        logits, state = self._decode(tokens, state)
        return logits.squeeze(1), state

    def reorder(self, state: "Seq2SeqState", rows: Tensor) -> "Seq2SeqState":
        """The state of which row i is row rows[i] of this one."""
        return state.reorder(rows)

    def weights(self, state: "Seq2SeqState") -> Tensor:
        """What the step that gave this state has attended to, [N, S]; zeros where the source is padding.

        Raises:
            ValueError: there is no attention, or has been no step.
        """
        if state.weights is None:
            reason = "a model without attention has none" if self.attention is None else "there has been no step"
            raise ValueError(f"weights: {reason}")
        return state.weights


class Seq2SeqState(NamedTuple):
    """Where a decoder stands, of N rows.

    Attributes:
        source: [N] which source each row is of.
        layers: h [L, N, H], or (h, c), of the other layers.
        attending: of the layer that attends, if there is one; then there are memory and keys, too.
        memory: [N, S, M] what the encoder has given.
        keys: [N, S, H] what queries are compared with.
        padding: [N, S] bool, where the source is padding, or None.
        weights: [N, S] of the last step.
    """

    source: Tensor
    layers: RecurrentState
    attending: AttentionDecoderState | None = None
    memory: Tensor | None = None
    keys: Tensor | None = None
    padding: Tensor | None = None
    weights: Tensor | None = None

    def reorder(self, rows: Tensor) -> "Seq2SeqState":
        """Of which row i is row rows[i] of this one."""

        def moved(t: Tensor | None) -> Tensor | None:
            return None if t is None else t.index_select(0, rows)

        source = self.source[rows]
        attending = None if self.attending is None else AttentionDecoderState._make(map(moved, self.attending))
        new = self._replace(
            source=source, layers=reorder_layers(self.layers, rows), attending=attending, weights=moved(self.weights)
        )
        if torch.equal(source, self.source):  # the beams of a source have the same memory, which can stay
            return new
        return new._replace(memory=moved(self.memory), keys=moved(self.keys), padding=moved(self.padding))


class _Bridge(nn.Module):
    """A layer's last states in both directions [L*2, B, H] -> the decoder's first one [L, B, H], each layer by its own
    weights.
    """

    def __init__(self, size: int, hidden: int, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(fastseq.nn.Linear(size, hidden) for _ in range(layers))

    def forward(self, state: Tensor) -> Tensor:
        pairs = state.unflatten(0, (-1, 2)).transpose(1, 2).flatten(2)  # [L, B, 2*H]
        return torch.stack([layer(pair) for layer, pair in zip(self.layers, pairs, strict=True)])
