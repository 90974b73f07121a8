"""Transformers: an encoder-decoder, a classifier and a language model."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import fastseq.nn
from fastseq.models.inputs import check_lengths, check_tokens
from fastseq.nn.places import padding_mask


class TransformerSeq2Seq(nn.Module):
    """The Transformer (Vaswani et al. 2017, arXiv:1706.03762): an encoder of the source, and a decoder that predicts
    what follows each token of the target, given all before it and the source.

        x_t = sqrt(d) E[token_t] + P_t           P_t,2i = sin(t / 10000^(2i/d)),  P_t,2i+1 = cos of the same
        attention(Q, K, V) = softmax(Q K^T / sqrt(d / heads)) V
        feed_forward(x) = W_2 relu(W_1 x + b_1) + b_2

        encoder layer:  x = sublayer(x) for attention to the source, feed_forward
        decoder layer:  x = sublayer(x) for attention to the target so far, to the source, feed_forward
        x + f(x) around each:    norm(x + f(x)) as in the paper;    x + f(norm(x)) with norm_first, and a last norm

        logits_t = W y_t + b

    It generates with `fastseq.decoding`, from `start(src, lengths)`, with keys and values of the steps before kept.

    Args:
        src_vocabulary: how many tokens of the source there are.
        tgt_vocabulary: V, how many of the target.
        d_model: d, the features of a place.
        heads: of each attention; it divides d.
        layers: of the encoder, and of the decoder.
        feedforward: the features between W_1 and W_2.
        dropout: of x_t and of each f(x).
        norm_first: whether norms come before the sublayers, which trains without much of a warmup (Xiong et al. 2020,
            arXiv:2002.04745).
        tied: whether W is the target's E (Press and Wolf 2017, arXiv:1608.05859).
        shared: whether the source's E is the target's, as in the paper: their vocabularies are one.
        max_length: how many places a sequence has at most.

    Raises:
        ValueError: shared vocabularies are of two sizes.
    """

    def __init__(
        self,
        src_vocabulary: int,
        tgt_vocabulary: int,
        d_model: int = 512,
        heads: int = 8,
        layers: int = 6,
        feedforward: int = 2048,
        dropout: float = 0.1,
        norm_first: bool = False,
        tied: bool = True,
        shared: bool = False,
        max_length: int = 5000,
    ) -> None:
        super().__init__()
        if shared and src_vocabulary != tgt_vocabulary:
            raise ValueError(
                f"tgt_vocabulary must be src_vocabulary, {src_vocabulary}, for shared=True, got {tgt_vocabulary}"
            )
        self.scale = d_model**0.5
        self.src_embedding = nn.Embedding(src_vocabulary, d_model)
        self.tgt_embedding = self.src_embedding if shared else nn.Embedding(tgt_vocabulary, d_model)
        self.positions = fastseq.nn.SinusoidalPositions(d_model, max_length, batch_first=True)
        self.dropout = nn.Dropout(dropout)
        options: dict[str, Any] = dict(dropout=dropout, batch_first=True, norm_first=norm_first)
        encoder_layer = fastseq.nn.TransformerEncoderLayer(d_model, heads, feedforward, **options)
        decoder_layer = fastseq.nn.TransformerDecoderLayer(d_model, heads, feedforward, **options)
        encoder_norm, decoder_norm = (nn.LayerNorm(d_model) if norm_first else None for _ in range(2))
        self.encoder = fastseq.nn.TransformerEncoder(encoder_layer, layers, encoder_norm, enable_nested_tensor=False)
        self.decoder = fastseq.nn.TransformerDecoder(decoder_layer, layers, decoder_norm)
        self.output = fastseq.nn.Linear(d_model, tgt_vocabulary)
        if tied:
            self.output.weight = self.tgt_embedding.weight
        initialize(self)

    def forward(
        self, src: Tensor, tgt_in: Tensor, src_lengths: Tensor | None = None, tgt_lengths: Tensor | None = None
    ) -> Tensor:
        """What follows each token of the target.

        Args:
            src: [B, S] int64 tokens.
            tgt_in: [B, T] int64, the target with what begins a sentence before it, without its last token.
            src_lengths: [B] integers, how many tokens each row has; by default all S.
            tgt_lengths: [B], likewise of tgt_in.

        Returns:
            Logits [B, T, V]; those past the lengths mean nothing.

        Raises:
            TypeError, ValueError, IndexError: tokens or lengths are none of these.
        """
        memory, memory_padding = self.encode(src, src_lengths)
        check_tokens("tgt_in", tgt_in, self.tgt_embedding.num_embeddings)
        B, T = tgt_in.shape
        if len(src) != B:
            raise ValueError(f"tgt_in must be of as many rows as src, {len(src)}, got {B}")
        tgt_lengths = check_lengths("tgt_lengths", tgt_lengths, B, T)
        y = self.decoder(
            self._embed(self.tgt_embedding, tgt_in),
            memory,
            tgt_mask=causal_mask(T, memory.device),
            tgt_key_padding_mask=None if tgt_lengths is None else padding_mask(tgt_lengths, T, memory.device),
            memory_key_padding_mask=memory_padding,
            tgt_is_causal=True,
        )  # [B, T, d]
        return self.output(y)

    def encode(self, src: Tensor, lengths: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """The encoded source [B, S, d], and where it is padding [B, S], if it has lengths."""
        check_tokens("src", src, self.src_embedding.num_embeddings)
        lengths = check_lengths("src_lengths", lengths, *src.shape)
        padding = None if lengths is None else padding_mask(lengths, src.shape[1], src.device)
        return self.encoder(self._embed(self.src_embedding, src), src_key_padding_mask=padding), padding

    def _embed(self, embedding: nn.Embedding, tokens: Tensor, offset: int = 0) -> Tensor:
        """[B, T, d] of tokens [B, T], the first of which is at place offset."""
        return self.dropout(self.positions(embedding(tokens) * self.scale, offset))

    @torch.no_grad()
    def start(self, src: Tensor, lengths: Tensor | None = None) -> "TransformerState":
        """The state that a target begins with.

        Args:
            src: [B, S] int64 tokens.
            lengths: [B] integers, how many each row has; by default all S.

        Raises:
            TypeError, ValueError, IndexError: src or lengths are none of these.
        """
        memory, padding = self.encode(src, lengths)
        return TransformerState(fastseq.nn.KVCache(), memory, padding, torch.arange(len(src), device=src.device))

    @torch.no_grad()
    def step(self, tokens: Tensor, state: "TransformerState") -> tuple[Tensor, "TransformerState"]:
        """Logits [N, V] of what follows tokens [N], and the state thereafter."""
        tokens = tokens.unsqueeze(1)
        check_tokens("tokens", tokens, self.tgt_embedding.num_embeddings)
        if len(state.cache) != state.length:
            raise ValueError("state must be new, or that of the last step: another search has used it up")
        x = self._embed(self.tgt_embedding, tokens, state.length)  # [N, 1, d]
        y = self.decoder(x, state.memory, memory_key_padding_mask=state.padding, cache=state.cache)
        return self.output(y.squeeze(1)), state._replace(memory=None, length=len(state.cache))

    def reorder(self, state: "TransformerState", rows: Tensor) -> "TransformerState":
        """The state of which row i is row rows[i] of this one."""
        return state.reorder(rows)


class TransformerState(NamedTuple):
    """Where a decoder stands, of N rows.

    Attributes:
        cache: keys and values of all places before.
        memory: [N, S, d] the encoded source, until the cache has the keys and values of it.
        padding: [N, S] bool, where the source is padding, or None.
        source: [N] which source each row is of.
        length: how many places the cache has; a cache that has more was gone on with from another state.
    """

    cache: fastseq.nn.KVCache
    memory: Tensor | None
    padding: Tensor | None
    source: Tensor
    length: int = 0

    def reorder(self, rows: Tensor) -> "TransformerState":
        """Of which row i is row rows[i] of this one; this one is used no more."""
        source = self.source[rows]
        moves = not torch.equal(source, self.source)  # the beams of a source have the same memory, which can stay
        if len(self.cache):
            self.cache.reorder(rows, memory=moves)
        if not moves:
            return self
        memory, padding = (t if t is None else t[rows] for t in (self.memory, self.padding))
        return self._replace(memory=memory, padding=padding, source=source)


class TransformerClassifier(nn.Module):
    """One label for a sequence: a Transformer's encoder (`TransformerSeq2Seq`), and the mean of what it gives for the n
    tokens.

        logits = W dropout((y_1 + ... + y_n) / n) + b

    Args:
        vocabulary: how many tokens there are.
        classes: C
        d_model: d, the features of a place.
        heads: of each attention; it divides d.
        layers: of the encoder.
        feedforward: the features between a layer's two matrices.
        dropout: of embeddings, sublayers and the mean.
        norm_first: whether norms come before the sublayers.
        max_length: how many places a sequence has at most.
    """

    def __init__(
        self,
        vocabulary: int,
        classes: int,
        d_model: int = 512,
        heads: int = 8,
        layers: int = 6,
        feedforward: int = 2048,
        dropout: float = 0.1,
        norm_first: bool = False,
        max_length: int = 5000,
    ) -> None:
        super().__init__()
        self.scale = d_model**0.5
        self.embedding = nn.Embedding(vocabulary, d_model)
        self.positions = fastseq.nn.SinusoidalPositions(d_model, max_length, batch_first=True)
        self.dropout = nn.Dropout(dropout)
        layer = fastseq.nn.TransformerEncoderLayer(
            d_model, heads, feedforward, dropout, batch_first=True, norm_first=norm_first
        )
        norm = nn.LayerNorm(d_model) if norm_first else None
        self.encoder = fastseq.nn.TransformerEncoder(layer, layers, norm, enable_nested_tensor=False)
        self.output = fastseq.nn.Linear(d_model, classes)
        initialize(self)

    def forward(self, tokens: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Logits [B, C] of tokens [B, T] int64; lengths [B], by default all T.

        Raises:
            TypeError, ValueError, IndexError: tokens or lengths are none of these.
        """
        check_tokens("tokens", tokens, self.embedding.num_embeddings)
        lengths = check_lengths("lengths", lengths, *tokens.shape)
        x = self.dropout(self.positions(self.embedding(tokens) * self.scale))  # [B, T, d]
        if lengths is None:
            return self.output(self.dropout(self.encoder(x).mean(1)))
        y = self.encoder(x, src_key_padding_mask=padding_mask(lengths, x.shape[1], x.device))  # zeros past the lengths
        return self.output(self.dropout(y.sum(1) / lengths.to(y.device).unsqueeze(1)))


class TransformerLM(nn.Module):
    """A language model: what follows each token, given all before. It is a Transformer's decoder without memory
    (`TransformerSeq2Seq`; Radford et al. 2018), which is a stack of encoder layers with a causal mask.

        logits_t = W y_t + b

    It generates with `fastseq.decoding`, from `start(batch_size)`, with keys and values of the steps before kept.

    Args:
        vocabulary: V, how many tokens there are.
        d_model: d, the features of a place.
        heads: of each attention; it divides d.
        layers: how many.
        feedforward: the features between a layer's two matrices.
        dropout: of embeddings and sublayers.
        norm_first: whether norms come before the sublayers.
        tied: whether W is the embeddings.
        max_length: how many places a sequence has at most.
    """

    def __init__(
        self,
        vocabulary: int,
        d_model: int = 512,
        heads: int = 8,
        layers: int = 6,
        feedforward: int = 2048,
        dropout: float = 0.1,
        norm_first: bool = True,
        tied: bool = True,
        max_length: int = 5000,
    ) -> None:
        super().__init__()
        self.scale = d_model**0.5
        self.embedding = nn.Embedding(vocabulary, d_model)
        self.positions = fastseq.nn.SinusoidalPositions(d_model, max_length, batch_first=True)
        self.dropout = nn.Dropout(dropout)
        layer = fastseq.nn.TransformerEncoderLayer(
            d_model, heads, feedforward, dropout, batch_first=True, norm_first=norm_first
        )
        norm = nn.LayerNorm(d_model) if norm_first else None
        self.decoder = fastseq.nn.TransformerEncoder(layer, layers, norm, enable_nested_tensor=False)
        self.output = fastseq.nn.Linear(d_model, vocabulary)
        if tied:
            self.output.weight = self.embedding.weight
        initialize(self)

    def forward(self, tokens: Tensor, lengths: Tensor | None = None) -> Tensor:
        """What follows each token.

        Args:
            tokens: [B, T] int64
            lengths: [B] integers, how many tokens each row has; by default all T.

        Returns:
            Logits [B, T, V]; those past the lengths mean nothing.

        Raises:
            TypeError, ValueError, IndexError: tokens or lengths are none of these.
        """
        check_tokens("tokens", tokens, self.embedding.num_embeddings)
        lengths = check_lengths("lengths", lengths, *tokens.shape)
        x = self._embed(tokens)  # [B, T, d]
        T = x.shape[1]
        padding = None if lengths is None else padding_mask(lengths, T, x.device)
        return self.output(self.decoder(x, causal_mask(T, x.device), padding, is_causal=True))

    def _embed(self, tokens: Tensor, offset: int = 0) -> Tensor:
        return self.dropout(self.positions(self.embedding(tokens) * self.scale, offset))

    def start(self, batch_size: int) -> fastseq.nn.KVCache:
        """The state that any number of rows begin with: a cache that holds nothing."""
        return fastseq.nn.KVCache()

    @torch.no_grad()
    def step(self, tokens: Tensor, state: fastseq.nn.KVCache) -> tuple[Tensor, fastseq.nn.KVCache]:
        """Logits [N, V] of what follows tokens [N], and the state thereafter, which is the same one."""
        tokens = tokens.unsqueeze(1)
        check_tokens("tokens", tokens, self.embedding.num_embeddings)
        y = self.decoder(self._embed(tokens, len(state)), cache=state)  # [N, 1, d]
        return self.output(y.squeeze(1)), state

    def reorder(self, state: fastseq.nn.KVCache, rows: Tensor) -> fastseq.nn.KVCache:
        """The state of which row i is row rows[i] of this one; it is the same one."""
        if len(state):
            state.reorder(rows)
        return state


def causal_mask(T: int, device: torch.device) -> Tensor:
    """[T, T] bool, true where a place would see a later one."""
    return torch.ones(T, T, dtype=torch.bool, device=device).triu(1)


def initialize(model: nn.Module) -> None:
    """Matrices of the layers by Glorot and Bengio's rule, as in torch.nn.Transformer; embeddings with a standard
    deviation of 1 / sqrt(d), so that sqrt(d) E has one of 1, and so have logits by W = E.
    """
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.xavier_uniform_(parameter)
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=module.embedding_dim**-0.5)
