"""Multi-head attention on fastseq's op."""

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Parameter
from torch.overrides import has_torch_function

from fastseq.nn.serving import Served, are_sound
from fastseq.ops.attention import TABLE, Arguments, attention, compute_dtype, wanted_weights
from fastseq.ops.contract import as_dtype, autocast_dtype, new_seed, why_torch
from fastseq.ops.linear import linear
from fastseq.registry import HALF, Op

# The module's own, as `_Weights` begins.
_NAMES = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight", "in_proj_bias", "bias_k", "bias_v")


class _Weights(NamedTuple):
    """What a call multiplies with, None for what there is not.

    Attributes:
        qkv: [3E, E] that query, key and value are projected with; without it there are the next three.
        q: [E, E]
        k: [E, features of key]
        v: [E, features of value]
        bias: [3E] of the projections.
        k_row: [1, 1, E], one more projected key.
        v_row: [1, 1, E], its value.
        out: [E, E]
        out_bias: [E]
    """

    qkv: Any
    q: Any
    k: Any
    v: Any
    bias: Any
    k_row: Any
    v_row: Any
    out: Any
    out_bias: Any

    def fit(self, E: int, Ek: int, Ev: int) -> bool:
        """Whether they are for queries, keys and values with so many features."""
        if self.out is None or (self.k_row is None) != (self.v_row is None):
            return False
        if not (E == Ek == Ev) if self.qkv is not None else None in self[1:4]:
            return False
        shapes = ((3 * E, E), (E, E), (E, Ek), (E, Ev), (3 * E,), (1, 1, E), (1, 1, E), (E, E), (E,))
        for w, shape in zip(self, shapes, strict=True):  # noqa: SIM110 (this is a good part of a small call)
            if w is not None and w.shape != shape:
                return False
        return True


class _Call(NamedTuple):
    """A call with torch's arguments; dropout_p is 0 in evaluation."""

    query: Any
    key: Any
    value: Any
    weights: _Weights
    num_heads: int
    batch_first: bool
    add_zero_attn: bool
    dropout_p: float
    key_padding_mask: Any
    need_weights: bool
    attn_mask: Any
    average_attn_weights: bool
    is_causal: bool

    def result(self) -> tuple[Tensor, Tensor | None] | None:
        """What torch would return, or None if torch's own path has to: it knows what is wrong, if something is."""
        query = self.query
        if not isinstance(query, Tensor):
            return None
        low = autocast_dtype(query)
        if not self._is_sound(low is not None) or why_torch(TABLE, query.device.type, query.dtype) is not None:
            return None
        given = low or query.dtype
        masks = self.attn_mask, self.key_padding_mask
        compute = compute_dtype(given, query, self.key, self.value, *self.weights, *masks)
        q, k, v = self._heads(compute)
        mask, key_padding, is_bounded = self._masks(k.shape[2], compute)
        arguments = Arguments(
            q,
            k,
            v,
            mask,
            key_padding,
            seed=new_seed(self.dropout_p),
            scale=1 / math.sqrt(q.shape[3]),
            dropout_p=self.dropout_p,
            right=0 if is_bounded else -1,
        )
        out, _, shares = attention(arguments, wanted_weights(self.need_weights, self.average_attn_weights))
        if given in HALF:  # the op's weights are wider, and out may be
            out, shares = out.to(given), shares.to(given)
        out = out.transpose(1, 2) if self.batch_first else out.permute(2, 0, 1, 3).contiguous()
        out = linear(out.reshape(query.shape), self.weights.out, self.weights.out_bias)
        if not self.need_weights:
            return out, None
        return out, shares if query.dim() == 3 else shares.squeeze(0)

    def _sizes(self, x: Tensor) -> tuple[int, int]:
        """N and the number of places."""
        shape = x.shape
        if len(shape) == 2:
            return 1, shape[0]
        return (shape[0], shape[1]) if self.batch_first else (shape[1], shape[0])

    def _is_sound(self, autocast: bool) -> bool:
        """Whether the arguments are as torch's checks and the op want them."""
        query, key, value, weights, H = self[:5]
        rank, dtype, device = query.dim(), query.dtype, query.device
        if rank not in (2, 3) or not dtype.is_floating_point:
            return False
        for x in (query,) if query is key is value else (query, key, value):
            if not _is_readable(x, device) or x.dim() != rank or 0 in x.shape:
                return False
            if x.dtype != dtype and not (autocast and x.dtype.is_floating_point):
                return False
        (N, L), (rows, S), E = self._sizes(query), self._sizes(key), query.shape[-1]
        if H < 1 or E % H or rows != N or key.shape[:-1] != value.shape[:-1]:
            return False
        if not are_sound([w for w in weights if w is not None], dtype, device, autocast):
            return False
        if not weights.fit(E, key.shape[-1], value.shape[-1]) or not 0 <= self.dropout_p <= 1:
            return False

        mask, padding = self.attn_mask, self.key_padding_mask
        if mask is None and (self.is_causal or padding is None):
            return not self.is_causal  # which says something about attn_mask
        dtypes = {torch.bool, dtype}
        if autocast:
            dtypes |= HALF | {torch.float32}
        elif not self.need_weights:  # torch's product that gives weights takes its own dtype only
            dtypes.add(torch.float32)

        def fits(mask: Any, *shapes: tuple[int, ...]) -> bool:
            return mask is None or (_is_readable(mask, device) and mask.dtype in dtypes and mask.shape in shapes)

        return fits(mask, (L, S), (N * H, L, S)) and fits(padding, (N, S) if rank == 3 else (S,))

    def _heads(self, dtype: torch.dtype) -> list[Tensor]:
        """Query, key and value, projected, as [N, H, places, E/H]: views of as few products as they allow."""
        query, key, value, weights, H = self[:5]
        counts: tuple[int, ...] = (1, 1, 1)
        if key is value and weights.qkv is not None:
            counts = (3,) if query is key else (1, 2)
        matrices = weights[1:4] if weights.qkv is None else _split(weights.qkv, counts)
        heads: list[Tensor] = []
        inputs = (query, key, value)[: len(counts)]
        for x, matrix, bias, count in zip(inputs, matrices, _split(weights.bias, counts), counts, strict=True):
            y = as_dtype(linear(x, matrix, bias), dtype)
            # Not slices, whose gradients would each be as large as y.
            heads += y.view(*x.shape[:-1], count, H, -1).unbind(-3) if count > 1 else [y.view(*x.shape[:-1], H, -1)]
        if weights.k_row is not None or self.add_zero_attn:
            heads[1:] = [self._longer(t, row) for t, row in zip(heads[1:], weights[5:7], strict=True)]
        if query.dim() == 2:
            return [t.transpose(0, 1).unsqueeze(0) for t in heads]
        return [t.transpose(1, 2) if self.batch_first else t.permute(1, 2, 0, 3) for t in heads]

    def _longer(self, x: Tensor, row: Tensor | None) -> Tensor:
        """Projected keys or values with those that the module adds, row and zeros."""
        place = 1 if self.batch_first and x.dim() == 4 else 0
        shape = [*x.shape[:place], 1, *x.shape[place + 1 :]]
        added = [] if row is None else [row.to(x.dtype).view(x.shape[-2:]).expand(shape)]
        if self.add_zero_attn:
            added.append(x.new_zeros(shape))
        return torch.cat([x, *added], place)

    def _masks(self, keys: int, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None, bool]:
        """The op's mask and key_padding, for keys with those that were added, and whether bounds replace attn_mask."""
        mask, padding = self.attn_mask, self.key_padding_mask
        if mask is padding is None:
            return None, None, False
        N, S = self._sizes(self.key)
        if self.is_causal and padding is None and not self.need_weights and keys == S:
            return None, None, True  # as torch, which takes the mask itself in the other cases
        if mask is not None:
            mask = mask[None, None] if mask.dim() == 2 else mask.unflatten(0, (N, self.num_heads))
        if padding is not None:
            padding = padding.view(N, S)
        if keys > S:  # nothing is said about those: they are seen
            mask, padding = (t if t is None else F.pad(t, (0, keys - S)) for t in (mask, padding))
        mask, padding = (t if t is None or t.dtype == torch.bool else t.to(dtype) for t in (mask, padding))
        if padding is None or padding.dtype == torch.bool:
            # The op's boolean mask is true for what takes part.
            return ~mask if mask is not None and mask.dtype == torch.bool else mask, padding, False
        bias = padding[:, None, None]
        if mask is not None:
            bias = bias.masked_fill(mask, -math.inf) if mask.dtype == torch.bool else bias + mask
        return bias, None, False


def _split(weight: Tensor | None, counts: tuple[int, ...]) -> Any:
    """The parts of a weight for as many of query, key and value."""
    if weight is None:
        return (None,) * len(counts)
    return (weight,) if len(counts) == 1 else weight.split([len(weight) // 3 * count for count in counts])


def _is_readable(x: Any, device: torch.device) -> bool:
    """Whether x is a tensor as the op reads it, and no class of its own wants to see what is done with it."""
    if type(x) is not Tensor and type(x) is not Parameter and (not isinstance(x, Tensor) or has_torch_function((x,))):
        return False
    return x.layout == torch.strided and not x.is_nested and x.device == device


class MultiheadAttention(Served, torch.nn.MultiheadAttention):
    """Drop-in for `torch.nn.MultiheadAttention`: the same arguments, parameters, results and errors on a fused kernel.

    What the kernel does not cover (see `why_torch`) takes torch's own path. Half precision is projected as it is, and
    attends in float32 unless a kernel takes it as it is. Batched output is contiguous, as [N, L, E] if batch_first,
    else as [L, N, E]; torch's strides depend on its path. Dropout follows torch's default generator of the CPU, with
    other draws than torch's.

    Where torch contradicts itself:

    | | torch | here |
    |---|---|---|
    | a query whose keys are all left out | NaN with need_weights or on the fast path of evaluation, else 0 | 0 |
    | NaN or inf in a key or value that is left out | spreads | has no effect |
    | is_causal without attn_mask | an error, but ignored on the fast path | the error |
    | is_causal, beside add_bias_kv or add_zero_attn | their keys are hidden, but not with need_weights | seen |
    """

    @property
    def table(self) -> Op:
        return TABLE

    def forward(
        self,
        query: Any,
        key: Any,
        value: Any,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """See `torch.nn.MultiheadAttention`.

        Args:
            query: [L, N, E], [N, L, E] if batch_first, or [L, E].
            key: [S, N, kdim], [N, S, kdim] or [S, kdim].
            value: [S, N, vdim], [N, S, vdim] or [S, vdim].
            key_padding_mask: [N, S] or [S]. A boolean one is true where a key is left out; a float one is added to the
                scores.
            need_weights: whether to return the attention weights too; without, it is faster.
            attn_mask: [L, S] or [N*H, L, S], like key_padding_mask.
            average_attn_weights: whether to return their mean over the heads.
            is_causal: says that attn_mask lets a query see the keys up to its own place. The mask is then not read,
                unless there is a key_padding_mask or need_weights.

        Returns:
            The output, like query, and the attention weights [N, L, S] or [L, S], [N, H, L, S] or [H, L, S] without
            average_attn_weights, or None.
        """
        out = self.out_proj
        call = _Call(
            query,
            key,
            value,
            _Weights._make((*self._weights(_NAMES), out.weight, out.bias)),
            self.num_heads,
            self.batch_first,
            self.add_zero_attn,
            self.dropout if self.training else 0.0,
            key_padding_mask,
            need_weights,
            attn_mask,
            average_attn_weights,
            is_causal,
        )
        result = call.result()
        if result is not None:
            return result
        node = self._node(
            query,
            key,
            value,
            key_padding_mask=key_padding_mask,
            need_weights=need_weights,
            attn_mask=attn_mask,
            average_attn_weights=average_attn_weights,
            is_causal=is_causal,
        )
        if node is not None:
            return node
        if is_causal and attn_mask is None and isinstance(value, Tensor) and not value.is_nested:
            # torch's fast path, which takes but one tensor, would ignore the hint; the other says what is missing.
            value = value.view_as(value)
        return super().forward(
            query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
        )


def multi_head_attention_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim_to_check: int,
    num_heads: int,
    in_proj_weight: Tensor | None,
    in_proj_bias: Tensor | None,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    add_zero_attn: bool,
    dropout_p: float,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    training: bool = True,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    use_separate_proj_weight: bool = False,
    q_proj_weight: Tensor | None = None,
    k_proj_weight: Tensor | None = None,
    v_proj_weight: Tensor | None = None,
    static_k: Tensor | None = None,
    static_v: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """`torch.nn.functional.multi_head_attention_forward`, on the kernel of `fastseq.nn.MultiheadAttention`.

    Args:
        query: [L, N, E] or [L, E].
        key: [S, N, E] or [S, E]; of any number of features with use_separate_proj_weight.
        value: likewise.
        embed_dim_to_check: E
        num_heads: H, which divides E.
        in_proj_weight: [3E, E], read unless use_separate_proj_weight.
        in_proj_bias: [3E] or None.
        bias_k: [1, 1, E], a projected key more, or None.
        bias_v: [1, 1, E], its value, or None.
        add_zero_attn: whether a key of zeros and a value of zeros are added.
        dropout_p: the probability of a weight to be dropped if training.
        out_proj_weight: [E, E]
        out_proj_bias: [E] or None.
        training: whether to drop.
        key_padding_mask: as for the module, like need_weights, attn_mask, average_attn_weights and is_causal.
        use_separate_proj_weight: whether the next three project, instead of in_proj_weight.
        q_proj_weight: [E, E]
        k_proj_weight: [E, features of key]
        v_proj_weight: [E, features of value]
        static_k: takes the place of the projected key; torch's path serves it.
        static_v: likewise.

    Returns:
        What the module returns.

    Raises:
        AssertionError, RuntimeError: what torch's function raises.
    """
    result = None
    if (
        static_k is None
        and static_v is None
        and isinstance(query, Tensor)
        and query.shape[-1:] == (embed_dim_to_check,)
    ):
        separate = (q_proj_weight, k_proj_weight, v_proj_weight)
        projections = (None, *separate) if use_separate_proj_weight else (in_proj_weight, None, None, None)
        result = _Call(
            query,
            key,
            value,
            _Weights._make((*projections, in_proj_bias, bias_k, bias_v, out_proj_weight, out_proj_bias)),
            num_heads,
            False,
            add_zero_attn,
            dropout_p if training else 0.0,
            key_padding_mask,
            need_weights,
            attn_mask,
            average_attn_weights,
            is_causal,
        ).result()
    if result is not None:
        return result
    return F.multi_head_attention_forward(
        query,
        key,
        value,
        embed_dim_to_check,
        num_heads,
        in_proj_weight,
        in_proj_bias,
        bias_k,
        bias_v,
        add_zero_attn,
        dropout_p,
        out_proj_weight,
        out_proj_bias,
        training,
        key_padding_mask,
        need_weights,
        attn_mask,
        use_separate_proj_weight,
        q_proj_weight,
        k_proj_weight,
        v_proj_weight,
        static_k,
        static_v,
        average_attn_weights,
        is_causal,
    )
