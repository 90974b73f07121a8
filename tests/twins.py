"""The models of fastseq.models as torch alone has them: the same arguments, parameters and results.

They know nothing of fastseq. Each is what who knows torch would write: sequences are packed, keys are projected once,
masks are built once; where torch has no layer, there is a loop over cells.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

RNNS = {"rnn": nn.RNN, "lstm": nn.LSTM, "gru": nn.GRU}


def recurrent(rnn: nn.RNNBase, x: Tensor, lengths: Tensor | None, state=None):
    """A recurrent layer over padded rows: [B, T, ...] and the states after each row's last step."""
    if lengths is None:
        return rnn(x, state)
    packed = pack_padded_sequence(x, lengths.cpu(), batch_first=True, enforce_sorted=False)
    y, state = rnn(packed, state)
    return pad_packed_sequence(y, batch_first=True, total_length=x.shape[1])[0], state


def padding_mask(lengths: Tensor | None, T: int) -> Tensor | None:
    return None if lengths is None else torch.arange(T, device=lengths.device) >= lengths.unsqueeze(1)


class RecurrentEncoder(nn.Module):
    def __init__(self, input_size, hidden, vocabulary=None, cell="lstm", layers=1, bidirectional=False, dropout=0.0):
        super().__init__()
        self.embedding = None if vocabulary is None else nn.Embedding(vocabulary, input_size)
        self.dropout = nn.Dropout(dropout)
        self.rnn = RNNS[cell](
            input_size,
            hidden,
            layers,
            batch_first=True,
            bidirectional=bidirectional,
            dropout=dropout if layers > 1 else 0.0,
        )

    def forward(self, input, lengths=None):
        x = input if self.embedding is None else self.dropout(self.embedding(input))
        return recurrent(self.rnn, x, lengths)


class SequenceClassifier(nn.Module):
    def __init__(
        self,
        input_size,
        hidden,
        classes,
        vocabulary=None,
        cell="lstm",
        layers=1,
        bidirectional=False,
        pooling="last",
        dropout=0.0,
    ):
        super().__init__()
        self.pooling, self.bidirectional = pooling, bidirectional
        self.encoder = RecurrentEncoder(input_size, hidden, vocabulary, cell, layers, bidirectional, dropout)
        size = 2 * hidden if bidirectional else hidden
        if pooling == "attention":
            self.key = nn.Linear(size, size)
            self.score = nn.Linear(size, 1, bias=False)
        self.dropout = nn.Dropout(dropout)
        self.output = nn.Linear(size, classes)

    def forward(self, input, lengths=None):
        y, state = self.encoder(input, lengths)
        if self.pooling == "last":
            h = state[0] if isinstance(state, tuple) else state
            pooled = torch.cat([h[-2], h[-1]], 1) if self.bidirectional else h[-1]
        elif self.pooling == "mean":
            pooled = y.mean(1) if lengths is None else y.sum(1) / lengths.unsqueeze(1)
        else:
            scores = self.score(torch.tanh(self.key(y)))
            if lengths is not None:
                scores = scores.masked_fill(padding_mask(lengths, y.shape[1]).unsqueeze(2), -torch.inf)
            pooled = (scores.softmax(1) * y).sum(1)
        return self.output(self.dropout(pooled))


class SequenceTagger(nn.Module):
    def __init__(
        self, input_size, hidden, classes, vocabulary=None, cell="lstm", layers=1, bidirectional=True, dropout=0.0
    ):
        super().__init__()
        self.encoder = RecurrentEncoder(input_size, hidden, vocabulary, cell, layers, bidirectional, dropout)
        self.dropout = nn.Dropout(dropout)
        self.output = nn.Linear(2 * hidden if bidirectional else hidden, classes)

    def forward(self, input, lengths=None):
        return self.output(self.dropout(self.encoder(input, lengths)[0]))


class RecurrentLM(nn.Module):
    def __init__(self, vocabulary, embedding, hidden, cell="lstm", layers=1, dropout=0.0, tied=False):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, embedding)
        self.rnn = RNNS[cell](embedding, hidden, layers, batch_first=True, dropout=dropout if layers > 1 else 0.0)
        self.dropout = nn.Dropout(dropout)
        is_projected = tied and hidden != embedding
        self.projection = nn.Linear(hidden, embedding, bias=False) if is_projected else nn.Identity()
        self.output = nn.Linear(embedding if tied else hidden, vocabulary)
        if tied:
            nn.init.normal_(self.embedding.weight, std=embedding**-0.5)
            self.output.weight = self.embedding.weight

    def forward(self, tokens, state=None):
        y, state = self.rnn(self.dropout(self.embedding(tokens)), state)
        return self.output(self.projection(self.dropout(y))), state

    @staticmethod
    def detach(state):
        return tuple(s.detach() for s in state) if isinstance(state, tuple) else state.detach()

    def start(self, batch_size):
        h = self.embedding.weight.new_zeros(self.rnn.num_layers, batch_size, self.rnn.hidden_size)
        return (h, h) if isinstance(self.rnn, nn.LSTM) else h

    def step(self, tokens, state):
        logits, state = self(tokens.unsqueeze(1), state)
        return logits.squeeze(1), state

    def reorder(self, state, rows):
        return tuple(s[:, rows] for s in state) if isinstance(state, tuple) else state[:, rows]


def weight(*shape: int, bound: float) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape).uniform_(-bound, bound))


class AdditiveAttention(nn.Module):
    def __init__(self, query_size, key_size):
        super().__init__()
        self.weight_query = weight(query_size, query_size, bound=query_size**-0.5)
        self.weight_key = weight(query_size, key_size, bound=key_size**-0.5)
        self.v = weight(query_size, bound=query_size**-0.5)

    def project(self, memory):
        return F.linear(memory, self.weight_key)

    def forward(self, query, memory, keys, padding):
        scores = torch.tanh(F.linear(query, self.weight_query).unsqueeze(1) + keys) @ self.v
        if padding is not None:
            scores = scores.masked_fill(padding, -torch.inf)
        weights = scores.softmax(1)
        return torch.bmm(weights.unsqueeze(1), memory).squeeze(1), weights


class LuongAttention(nn.Module):
    def __init__(self, query_size, key_size):
        super().__init__()
        self.weight_key = weight(query_size, key_size, bound=key_size**-0.5)

    def project(self, memory):
        return F.linear(memory, self.weight_key)

    def forward(self, query, memory, keys, padding):
        scores = torch.bmm(keys, query.unsqueeze(2)).squeeze(2)
        if padding is not None:
            scores = scores.masked_fill(padding, -torch.inf)
        weights = scores.softmax(1)
        return torch.bmm(weights.unsqueeze(1), memory).squeeze(1), weights


def attention_layer(cell: str, kind: str, embedding: int, hidden: int, M: int) -> nn.Module:
    """A torch cell, the parameters of which are the layer's own, that attends before or after its step."""
    base = {"rnn": nn.RNNCell, "lstm": nn.LSTMCell, "gru": nn.GRUCell}[cell]

    class Bahdanau(base):
        def __init__(self):
            super().__init__(embedding + M, hidden)
            self.attention = AdditiveAttention(hidden, M)

        def forward(self, x, memory, state, feed, keys, padding):
            """Of x [B, T, E]: all h_t, all contexts, the state and what is fed next, and the last weights."""
            hiddens, contexts = [], []
            for x_t in x.unbind(1):
                h = state[0] if cell == "lstm" else state
                context, weights = self.attention(h, memory, keys, padding)
                state = super().forward(torch.cat([x_t, context], 1), state)
                hiddens.append(state[0] if cell == "lstm" else state)
                contexts.append(context)
            return torch.stack(hiddens, 1), torch.stack(contexts, 1), state, feed, weights

    class Luong(base):
        def __init__(self):
            super().__init__(embedding + hidden, hidden)
            self.attention = LuongAttention(hidden, M)
            self.weight_out = weight(hidden, M + hidden, bound=hidden**-0.5)

        def forward(self, x, memory, state, feed, keys, padding):
            hiddens, feeds = [], []
            for x_t in x.unbind(1):
                state = super().forward(torch.cat([x_t, feed], 1), state)
                h = state[0] if cell == "lstm" else state
                context, weights = self.attention(h, memory, keys, padding)
                feed = torch.tanh(F.linear(torch.cat([context, h], 1), self.weight_out))
                hiddens.append(h)
                feeds.append(feed)
            return torch.stack(hiddens, 1), torch.stack(feeds, 1), state, feed, weights

    return Bahdanau() if kind == "bahdanau" else Luong()


class Bridge(nn.Module):
    def __init__(self, size, hidden, layers):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(size, hidden) for _ in range(layers))

    def forward(self, state):
        return torch.stack(
            [layer(torch.cat([state[2 * i], state[2 * i + 1]], 1)) for i, layer in enumerate(self.layers)]
        )


class Seq2Seq(nn.Module):
    def __init__(
        self,
        src_vocabulary,
        tgt_vocabulary,
        embedding=256,
        hidden=256,
        cell="gru",
        layers=1,
        bidirectional=True,
        attention=None,
        dropout=0.0,
    ):
        super().__init__()
        self.cell, self.attention, self.bidirectional, self.hidden = cell, attention, bidirectional, hidden
        self.encoder = RecurrentEncoder(embedding, hidden, src_vocabulary, cell, layers, bidirectional, dropout)
        M = 2 * hidden if bidirectional else hidden
        if bidirectional:
            self.bridge = Bridge(M, hidden, layers)
            if cell == "lstm":
                self.cell_bridge = Bridge(M, hidden, layers)
        self.embedding = nn.Embedding(tgt_vocabulary, embedding)
        self.dropout = nn.Dropout(dropout)
        others, size = layers, embedding
        if attention is not None:
            self.attention_layer = attention_layer(cell, attention, embedding, hidden, M)
            others, size = layers - 1, hidden
        self.layers = None
        if others:
            between = dropout if others > 1 else 0.0
            self.layers = RNNS[cell](size, hidden, others, batch_first=True, dropout=between)
        if attention == "bahdanau":
            self.readout = nn.Linear(hidden + M + embedding, hidden)
        self.output = nn.Linear(hidden, tgt_vocabulary)

    def start(self, src, lengths=None):
        memory, state = self.encoder(src, lengths)
        h, c = state if self.cell == "lstm" else (state, None)
        if self.bidirectional:
            h = torch.tanh(self.bridge(h))
            c = c if c is None else self.cell_bridge(c)
        pair = h if c is None else (h, c)
        if self.attention is None:
            return {"layers": pair}
        return {
            "layers": h[1:] if c is None else (h[1:].contiguous(), c[1:].contiguous()),
            "attending": h[0] if c is None else (h[0], c[0]),
            "feed": h.new_zeros(len(src), self.hidden),
            "memory": memory,
            "keys": self.attention_layer.attention.project(memory),
            "padding": padding_mask(lengths, src.shape[1]),
        }

    def decode(self, tokens, state, lengths=None):
        x = embedded = self.dropout(self.embedding(tokens))
        state = dict(state)
        if self.attention is not None:
            hidden, fed, state["attending"], state["feed"], state["weights"] = self.attention_layer(
                x, state["memory"], state["attending"], state["feed"], state["keys"], state["padding"]
            )
            x = hidden if self.attention == "bahdanau" else fed
        if self.layers is not None:
            x = x if self.attention is None else self.dropout(x)
            x, state["layers"] = recurrent(self.layers, x, lengths, state["layers"])
        if self.attention == "bahdanau":
            x = torch.tanh(self.readout(torch.cat([x, fed, embedded], 2)))
        return self.output(self.dropout(x)), state

    def forward(self, src, tgt_in, src_lengths=None, tgt_lengths=None, teacher_forcing=1.0):
        state = self.start(src, src_lengths)
        if teacher_forcing == 1:
            return self.decode(tgt_in, state, tgt_lengths)[0]
        tokens, steps = tgt_in[:, :1], []
        for t in range(tgt_in.shape[1]):
            logits, state = self.decode(tokens, state)
            steps.append(logits)
            if t + 1 < tgt_in.shape[1]:
                is_forced = torch.rand(len(tokens), 1, device=tokens.device) < teacher_forcing
                tokens = torch.where(is_forced, tgt_in[:, t + 1, None], logits.argmax(2))
        return torch.cat(steps, 1)

    def step(self, tokens, state):
        logits, state = self.decode(tokens.unsqueeze(1), state)
        return logits.squeeze(1), state

    def reorder(self, state, rows):
        def of_layers(s):
            return tuple(t[:, rows] for t in s) if isinstance(s, tuple) else s[:, rows]

        def of_rows(s):
            return tuple(t[rows] for t in s) if isinstance(s, tuple) else None if s is None else s[rows]

        return {name: (of_layers if name == "layers" else of_rows)(s) for name, s in state.items()}


class SinusoidalPositions(nn.Module):
    def __init__(self, d_model, max_length):
        super().__init__()
        places = torch.arange(max_length, dtype=torch.float64).unsqueeze(1)
        angles = places * 10000 ** -(torch.arange(0, d_model, 2, dtype=torch.float64) / d_model)
        table = torch.zeros(max_length, d_model)
        table[:, 0::2], table[:, 1::2] = angles.sin(), angles.cos()[:, : d_model // 2]
        self.register_buffer("table", table, persistent=False)

    def forward(self, x):
        return x + self.table[: x.shape[1]]


def causal_mask(x: Tensor) -> Tensor:
    return nn.Transformer.generate_square_subsequent_mask(x.shape[1], device=x.device, dtype=torch.bool)


def initialize(model: nn.Module) -> None:
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.xavier_uniform_(parameter)
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=module.embedding_dim**-0.5)


class TransformerSeq2Seq(nn.Module):
    def __init__(
        self,
        src_vocabulary,
        tgt_vocabulary,
        d_model=512,
        heads=8,
        layers=6,
        feedforward=2048,
        dropout=0.1,
        norm_first=False,
        tied=True,
        shared=False,
        max_length=5000,
    ):
        super().__init__()
        self.scale = d_model**0.5
        self.src_embedding = nn.Embedding(src_vocabulary, d_model)
        self.tgt_embedding = self.src_embedding if shared else nn.Embedding(tgt_vocabulary, d_model)
        self.positions = SinusoidalPositions(d_model, max_length)
        self.dropout = nn.Dropout(dropout)
        options = dict(dropout=dropout, batch_first=True, norm_first=norm_first)
        self.encoder = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(d_model, heads, feedforward, **options),
            layers,
            nn.LayerNorm(d_model) if norm_first else None,
            enable_nested_tensor=False,
        )
        self.decoder = nn.TransformerDecoder(
            nn.TransformerDecoderLayer(d_model, heads, feedforward, **options),
            layers,
            nn.LayerNorm(d_model) if norm_first else None,
        )
        self.output = nn.Linear(d_model, tgt_vocabulary)
        if tied:
            self.output.weight = self.tgt_embedding.weight
        initialize(self)

    def embed(self, embedding, tokens):
        return self.dropout(self.positions(embedding(tokens) * self.scale))

    def encode(self, src, lengths=None):
        padding = padding_mask(lengths, src.shape[1])
        return self.encoder(self.embed(self.src_embedding, src), src_key_padding_mask=padding), padding

    def decode(self, tgt, memory, memory_padding, tgt_lengths=None):
        x = self.embed(self.tgt_embedding, tgt)
        return self.decoder(
            x,
            memory,
            tgt_mask=causal_mask(x),
            tgt_is_causal=True,
            tgt_key_padding_mask=padding_mask(tgt_lengths, tgt.shape[1]),
            memory_key_padding_mask=memory_padding,
        )

    def forward(self, src, tgt_in, src_lengths=None, tgt_lengths=None):
        return self.output(self.decode(tgt_in, *self.encode(src, src_lengths), tgt_lengths))

    def start(self, src, lengths=None):
        """torch has no cache: all tokens so far are kept, and computed again at each step."""
        memory, padding = self.encode(src, lengths)
        return src.new_empty(len(src), 0), memory, padding

    def step(self, tokens, state):
        prefix, memory, padding = state
        prefix = torch.cat([prefix, tokens.unsqueeze(1)], 1)
        return self.output(self.decode(prefix, memory, padding)[:, -1]), (prefix, memory, padding)

    def reorder(self, state, rows):
        return tuple(None if s is None else s[rows] for s in state)


class TransformerClassifier(nn.Module):
    def __init__(
        self,
        vocabulary,
        classes,
        d_model=512,
        heads=8,
        layers=6,
        feedforward=2048,
        dropout=0.1,
        norm_first=False,
        max_length=5000,
    ):
        super().__init__()
        self.scale = d_model**0.5
        self.embedding = nn.Embedding(vocabulary, d_model)
        self.positions = SinusoidalPositions(d_model, max_length)
        self.dropout = nn.Dropout(dropout)
        self.encoder = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(d_model, heads, feedforward, dropout, batch_first=True, norm_first=norm_first),
            layers,
            nn.LayerNorm(d_model) if norm_first else None,
            enable_nested_tensor=False,
        )
        self.output = nn.Linear(d_model, classes)
        initialize(self)

    def forward(self, tokens, lengths=None):
        x = self.dropout(self.positions(self.embedding(tokens) * self.scale))
        padding = padding_mask(lengths, tokens.shape[1])
        y = self.encoder(x, src_key_padding_mask=padding)
        if padding is None:
            return self.output(self.dropout(y.mean(1)))
        mean = y.masked_fill(padding.unsqueeze(2), 0).sum(1) / lengths.unsqueeze(1)
        return self.output(self.dropout(mean))


class TransformerLM(nn.Module):
    def __init__(
        self,
        vocabulary,
        d_model=512,
        heads=8,
        layers=6,
        feedforward=2048,
        dropout=0.1,
        norm_first=True,
        tied=True,
        max_length=5000,
    ):
        super().__init__()
        self.scale = d_model**0.5
        self.embedding = nn.Embedding(vocabulary, d_model)
        self.positions = SinusoidalPositions(d_model, max_length)
        self.dropout = nn.Dropout(dropout)
        self.decoder = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(d_model, heads, feedforward, dropout, batch_first=True, norm_first=norm_first),
            layers,
            nn.LayerNorm(d_model) if norm_first else None,
            enable_nested_tensor=False,
        )
        self.output = nn.Linear(d_model, vocabulary)
        if tied:
            self.output.weight = self.embedding.weight
        initialize(self)

    def forward(self, tokens, lengths=None):
        x = self.dropout(self.positions(self.embedding(tokens) * self.scale))
        padding = padding_mask(lengths, tokens.shape[1])
        return self.output(self.decoder(x, causal_mask(x), padding, is_causal=True))

    def start(self, batch_size):
        return self.embedding.weight.new_empty(batch_size, 0, dtype=torch.int64)

    def step(self, tokens, state):
        state = torch.cat([state, tokens.unsqueeze(1)], 1)
        return self(state)[:, -1], state

    def reorder(self, state, rows):
        return state[rows]


class ImageClassifier(nn.Module):
    def __init__(self, classes, image=(1, 28, 28), channels=(32, 64), hidden=128, dropout=0.25):
        super().__init__()
        C, H, W = image
        sizes = (C, *channels)
        self.convolutions = nn.ModuleList(
            nn.Conv2d(before, after, 3, padding=1) for before, after in zip(sizes, channels, strict=False)
        )
        for _ in channels:
            H, W = H // 2, W // 2
        self.hidden = nn.Linear(sizes[-1] * H * W, hidden)
        self.dropout = nn.Dropout(dropout)
        self.output = nn.Linear(hidden, classes)

    def forward(self, images):
        x = images
        for convolution in self.convolutions:
            x = F.max_pool2d(F.relu(convolution(x)), 2)
        return self.output(self.dropout(F.relu(self.hidden(x.flatten(1)))))


class TextCNN(nn.Module):
    def __init__(self, vocabulary, classes, embedding=128, filters=100, widths=(3, 4, 5), dropout=0.5):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, embedding)
        self.convolutions = nn.ModuleList(nn.Conv1d(embedding, filters, width) for width in widths)
        self.widths = widths
        self.dropout = nn.Dropout(dropout)
        self.output = nn.Linear(filters * len(widths), classes)

    def forward(self, tokens, lengths=None):
        lengths = torch.full((len(tokens),), tokens.shape[1]) if lengths is None else lengths
        x = F.pad(self.embedding(tokens), (0, 0, 0, max(0, max(self.widths) - tokens.shape[1])))
        x = x.masked_fill(padding_mask(lengths, x.shape[1]).unsqueeze(2), 0).transpose(1, 2)
        pooled = []
        for width, convolution in zip(self.widths, self.convolutions, strict=True):
            y = convolution(x)
            windows = (lengths - width + 1).clamp(min=1)
            pooled.append(F.relu(y.masked_fill(padding_mask(windows, y.shape[2]).unsqueeze(1), -torch.inf).amax(2)))
        return self.output(self.dropout(torch.cat(pooled, 1)))
