"""How a decoder's state looks at a memory: the attentions of recurrent sequence-to-sequence models."""

from typing import Any

import torch
from torch import Tensor, nn

from fastseq.ops.attention import TABLE as PRODUCTS
from fastseq.ops.attention import scaled_dot_product_attention
from fastseq.ops.contract import why_torch
from fastseq.ops.linear import linear


class _Attention(nn.Module):
    """What the attentions share: the weights are softmax(scores) over the places that are there."""

    query_size: int
    key_size: int
    # Of scores with a layer between; None for those by product.
    weight_query: Tensor | None
    weight_key: Tensor | None
    bias: Tensor | None
    v: Tensor | None

    def _make_parameters(self, device: Any, dtype: Any, **shapes: tuple[int, ...] | None) -> None:
        for name, shape in shapes.items():
            made = None if shape is None else nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
            self.register_parameter(name, made)

    def reset_parameters(self) -> None:
        """Uniform in +-1/sqrt(number of inputs), as in `torch.nn.Linear`."""
        for name, weight in self.named_parameters(recurse=False):
            inputs = self.key_size if name == "bias" else weight.shape[-1]
            nn.init.uniform_(weight, -(inputs**-0.5), inputs**-0.5)

    def project(self, memory: Tensor) -> Tensor:
        """The keys of a memory [..., K], what queries are compared with: [..., A]. They are the same at every step."""
        return memory if self.weight_key is None else linear(memory, self.weight_key, self.bias)

    def _scores(self, query: Tensor, keys: Tensor) -> Tensor:
        """[B, L, S] of query [B, L, Q] and keys [B, S, A]."""
        if self.weight_query is None or self.v is None:
            return query @ keys.transpose(1, 2)
        return (linear(query, self.weight_query).unsqueeze(2) + keys.unsqueeze(1)).tanh() @ self.v

    def _look(
        self, query: Tensor, memory: Tensor, absent: Tensor | None, keys: Tensor, positions: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The contexts [B, L, K] and weights [B, L, S] of queries [B, L, Q]; absent is [B, 1, S]."""
        weights = _softmax(self._scores(query, keys), absent)
        return weights @ memory, weights

    def _forward(
        self,
        query: Tensor,
        memory: Tensor,
        key_padding_mask: Tensor | None,
        keys: Tensor | None,
        positions: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        Q, K = self.query_size, self.key_size
        for name, t in (("query", query), ("memory", memory), ("keys", keys), ("positions", positions)):
            if not isinstance(t, Tensor) and (t is not None or name in ("query", "memory")):
                raise TypeError(f"{name} must be a torch.Tensor, got {type(t).__name__}")
        if query.dim() not in (2, 3) or query.shape[-1] != Q:
            raise ValueError(f"query must be [B, {Q}] or [B, L, {Q}], got {list(query.shape)}")
        B = query.shape[0]
        if memory.dim() != 3 or memory.shape[0] != B or memory.shape[1] == 0 or memory.shape[2] != K:
            raise ValueError(f"memory must be [{B}, S, {K}] with at least one place, got {list(memory.shape)}")
        S = memory.shape[1]
        A = K if self.weight_key is None else self.weight_key.shape[0]
        if keys is not None and keys.shape != (B, S, A):
            raise ValueError(f"keys must be {[B, S, A]}, as project(memory) gives them, got {list(keys.shape)}")
        if key_padding_mask is not None:
            check_padding("key_padding_mask", key_padding_mask, (B, S))
            # What stands there must not reach any sum, not even times zero.
            memory = memory.masked_fill(key_padding_mask.unsqueeze(-1), 0)
            keys = keys if keys is None else keys.masked_fill(key_padding_mask.unsqueeze(-1), 0)
        absent = None if key_padding_mask is None else key_padding_mask.unsqueeze(1)
        keys = self.project(memory) if keys is None else keys
        if query.dim() == 3:
            return self._look(query, memory, absent, keys, positions)
        positions = positions if positions is None else positions.unsqueeze(1)
        context, weights = self._look(query.unsqueeze(1), memory, absent, keys, positions)
        return context.squeeze(1), weights.squeeze(1)


class AdditiveAttention(_Attention):
    """Attention by a layer of its own (Bahdanau et al. 2015, arXiv:1409.0473): place s of a memory m has the score

        v . tanh(weight_query q + weight_key m_s + bias)

    Args:
        query_size: Q, the features of a query: a decoder's hidden size.
        key_size: K, those of the memory.
        attention_size: A, those of the layer; by default Q.
        bias: whether it has one.
        device: of the parameters, weight_query [A, Q], weight_key [A, K], bias [A] and v [A].
        dtype: of the parameters.

    Raises:
        ValueError: a size is not positive.
    """

    def __init__(
        self,
        query_size: int,
        key_size: int,
        attention_size: int | None = None,
        bias: bool = False,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        self.query_size, self.key_size = query_size, key_size
        self.attention_size = query_size if attention_size is None else attention_size
        check_sizes(query_size=query_size, key_size=key_size, attention_size=self.attention_size)
        A = self.attention_size
        shapes = dict(weight_query=(A, query_size), weight_key=(A, key_size), bias=(A,) if bias else None, v=(A,))
        self._make_parameters(device, dtype, **shapes)
        self.reset_parameters()

    def forward(
        self, query: Tensor, memory: Tensor, key_padding_mask: Tensor | None = None, keys: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The context sum_s a_s m_s, and the weights a.

        Args:
            query: [B, Q], or [B, L, Q] for many at once, which takes memory for L*S*A numbers a row.
            memory: [B, S, K]
            key_padding_mask: [B, S] bool, true where a place is left out, whatever stands there. Where all are, context
                and weights are zeros.
            keys: project(memory), if it is there already.

        Returns:
            [B, K] and [B, S], or [B, L, K] and [B, L, S].

        Raises:
            ValueError, TypeError: with the argument's name.
        """
        return self._forward(query, memory, key_padding_mask, keys)

    def extra_repr(self) -> str:
        bias = "" if self.bias is None else ", bias=True"
        return f"{self.query_size}, {self.key_size}, attention_size={self.attention_size}{bias}"


SCORES = ("dot", "general", "concat")
LOCALITIES = ("predictive", "monotonic")


class LuongAttention(_Attention):
    """Attention by a product (Luong et al. 2015, arXiv:1508.04025): place s of a memory m has the score

        q . m_s                                        "dot"
        q . weight_key m_s                             "general"
        v . tanh(weight_query q + weight_key m_s)      "concat", which is additive attention

    With a window of D it is local: only places up to D from a position p take part. "predictive" attention (local-p)
    finds p = S sigmoid(v_position . tanh(weight_position q)), for a memory of S places without the padding at its end,
    and multiplies the weights by exp(-2 ((s - p) / D)^2), a Gaussian of standard deviation D/2. For "monotonic"
    attention (local-m) p is the number of the step.

    Args:
        query_size: Q, the features of a query: a decoder's hidden size.
        key_size: K, those of the memory; Q for "dot".
        score: "general", "dot" or "concat".
        attention_size: A, those of the layer of "concat"; by default Q.
        window: D, or None for attention to all places.
        local: "predictive" or "monotonic".
        device: of the parameters, weight_key [Q, K] of "general"; weight_query [A, Q], weight_key [A, K] and v [A] of
            "concat"; weight_position [Q, Q] and v_position [Q] of predictive attention.
        dtype: of the parameters.

    Raises:
        ValueError: an option is unknown, or a size does not fit.
    """

    weight_position: Tensor | None
    v_position: Tensor | None

    def __init__(
        self,
        query_size: int,
        key_size: int,
        score: str = "general",
        attention_size: int | None = None,
        window: int | None = None,
        local: str = "predictive",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        if score not in SCORES:
            raise ValueError(f"score must be one of {', '.join(SCORES)}, got {score!r}")
        if local not in LOCALITIES:
            raise ValueError(f"local must be one of {', '.join(LOCALITIES)}, got {local!r}")
        check_sizes(query_size=query_size, key_size=key_size)
        if score == "dot" and query_size != key_size:
            raise ValueError(f"key_size must be query_size, {query_size}, for score='dot', got {key_size}")
        if attention_size is not None and score != "concat":
            raise ValueError(f"attention_size is for score='concat', got {attention_size} for {score!r}")
        self.query_size, self.key_size, self.score, self.window, self.local = query_size, key_size, score, window, local
        self.attention_size = query_size if attention_size is None else attention_size
        check_sizes(attention_size=self.attention_size, **({} if window is None else dict(window=window)))
        A, concat, predictive = self.attention_size, score == "concat", window is not None and local == "predictive"
        shapes = dict(
            weight_query=(A, query_size) if concat else None,
            weight_key=None if score == "dot" else (A, key_size),
            bias=None,
            v=(A,) if concat else None,
            weight_position=(query_size, query_size) if predictive else None,
            v_position=(query_size,) if predictive else None,
        )
        self._make_parameters(device, dtype, **shapes)
        self.reset_parameters()

    @property
    def is_monotonic(self) -> bool:
        """Whether it has to be told the positions of its queries."""
        return self.window is not None and self.local == "monotonic"

    def forward(
        self,
        query: Tensor,
        memory: Tensor,
        key_padding_mask: Tensor | None = None,
        keys: Tensor | None = None,
        positions: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The context sum_s a_s m_s, and the weights a.

        Args:
            query: [B, Q], or [B, L, Q] for many at once.
            memory: [B, S, K]
            key_padding_mask: [B, S] bool, true where a place is left out, whatever stands there. Where all are, or none
                is in the window, context and weights are zeros.
            keys: project(memory), if it is there already.
            positions: [B] or [B, L] numbers, for monotonic attention: where each query's window has its middle. By
                default 0, 1, ... for many queries; one query needs it.

        Returns:
            [B, K] and [B, S], or [B, L, K] and [B, L, S].

        Raises:
            ValueError, TypeError: with the argument's name.
        """
        if positions is None and self.is_monotonic and query.dim() == 2:
            raise ValueError("positions must be given for one query of monotonic attention")
        if positions is not None:
            if not self.is_monotonic:
                raise ValueError("positions are for monotonic attention only")
            if positions.shape != query.shape[:-1]:
                raise ValueError(f"positions must be {list(query.shape[:-1])}, got {list(positions.shape)}")
        return self._forward(query, memory, key_padding_mask, keys, positions)

    def _look(
        self, query: Tensor, memory: Tensor, absent: Tensor | None, keys: Tensor, positions: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        if self.window is None:
            if self.v is None and query.shape[1] > 1 and why_torch(PRODUCTS, query.device.type, query.dtype) is None:
                q, k, v = (t.unsqueeze(1) for t in (query, keys, memory))  # of one head
                padding = None if absent is None else absent.squeeze(1)
                context, weights = scaled_dot_product_attention(
                    q, k, v, key_padding_mask=padding, scale=1.0, return_weights=True
                )
                return context.squeeze(1), weights.squeeze(1)
            return super()._look(query, memory, absent, keys, positions)
        places = torch.arange(memory.shape[1], device=memory.device)
        if self.weight_position is not None and self.v_position is not None:
            # In float32 at least: half precision does not know large places apart.
            share = (linear(query, self.weight_position).tanh() @ self.v_position).sigmoid()
            share = share.to(torch.promote_types(share.dtype, torch.float32))
            ends = len(places) if absent is None else ((places + 1) * ~absent).amax(-1)
            middle = ends * share
        else:
            middle = torch.arange(query.shape[1], device=memory.device) if positions is None else positions
        distance = places - middle.unsqueeze(-1)
        outside = distance.abs() > self.window
        weights = _softmax(self._scores(query, keys), outside if absent is None else outside | absent)
        if self.local == "predictive":
            weights = weights * (-2 * (distance / self.window).square()).exp().to(weights.dtype)
        return weights @ memory, weights

    def extra_repr(self) -> str:
        size = f", attention_size={self.attention_size}" if self.score == "concat" else ""
        local = "" if self.window is None else f", window={self.window}, local={self.local!r}"
        return f"{self.query_size}, {self.key_size}, score={self.score!r}{size}{local}"


def _softmax(scores: Tensor, absent: Tensor | None) -> Tensor:
    """Over the last dimension without what is absent, which gets zeros, be it all."""
    if absent is None:
        return scores.softmax(-1)
    seen = scores.masked_fill(absent & ~absent.all(-1, keepdim=True), -torch.inf)
    return seen.softmax(-1).masked_fill(absent, 0)


def check_sizes(**sizes: int) -> None:
    """Raises ValueError for one that is not positive."""
    for name, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, int) or size <= 0:
            raise ValueError(f"{name} must be a positive int, got {size!r}")


def check_padding(name: str, mask: Tensor, shape: tuple[int, int]) -> None:
    """Raises TypeError or ValueError unless it is bool, of this shape."""
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"{name} must be a torch.bool tensor, true where a place is left out, got {got}")
    if mask.shape != shape:
        raise ValueError(f"{name} must be {list(shape)}, got {list(mask.shape)}")
