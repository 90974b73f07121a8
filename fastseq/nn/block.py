"""Transformer layers by fused pieces: rows of a batch go through dense layers, attention and what lies between them.

A layer is computed so where its blocks and what they are made of are as torch has them; anything else that a user can
see, such as a hook or a module of another class, takes the modules' path. Padding that a mask leaves out is no row: it
costs nothing, and comes out as zeros.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules import module as modules
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from fastseq.nn.attention import MultiheadAttention
from fastseq.nn.linear import Linear
from fastseq.nn.places import LEAST_PADDING, Places
from fastseq.ops import activation as activation_op
from fastseq.ops import attention as attention_op
from fastseq.ops import norm as norm_op
from fastseq.ops.activation import activation, kind_of
from fastseq.ops.attention import attention, compute_dtype
from fastseq.ops.contract import autocast_dtype, has_hooks, is_plain, needs_graph, new_seed, why_torch
from fastseq.ops.linear import linear
from fastseq.ops.norm import KINDS, Arguments, norm

_TABLES = (attention_op.TABLE, norm_op.TABLE, activation_op.TABLE)
# Multiply-adds of a layer's dense parts from which fused pieces pay for some 150 us of Python that they take more; and
# elements that would be dropped, for which torch takes 5 ns each.
LEAST_WORK, LEAST_DROPPED = 24 << 20, 1 << 15


Block = Callable[[Tensor], Tensor]


class Part(NamedTuple):
    """A sublayer: dropout(block(x)) is added to x, and its norm goes before or after."""

    norm: nn.LayerNorm
    dropout: nn.Dropout
    block: Block


def through(x: Tensor, parts: Sequence[Part], norm_first: bool, last: nn.LayerNorm | None = None) -> Tensor:
    """x [..., E] through sublayers and a last norm."""
    if not norm_first:
        for part in parts:
            x, _ = _add_norm(part.block(x), x, part.norm, part.dropout)
        return x if last is None else _add_norm(x, None, last)[0]
    total, (y, _) = x, _add_norm(x, None, parts[0].norm)
    for part, following in zip(parts, [*(part.norm for part in parts[1:]), last], strict=True):
        y, total = _add_norm(part.block(y), total, following, part.dropout, wants_total=True)
    return total if last is None else y


def _add_norm(
    x: Tensor,
    residual: Tensor | None,
    module: nn.LayerNorm | None,
    dropout: nn.Dropout | None = None,
    wants_total: bool = False,
) -> tuple[Tensor, Tensor]:
    """The norm of residual + dropout(x), and that sum if it is wanted or there is no norm."""
    p = dropout.p if dropout is not None and dropout.training else 0.0
    rows = x.reshape(-1, x.shape[-1])
    added = None if residual is None else residual.reshape(rows.shape)
    if module is None:
        total = norm(Arguments(rows, added, seed=new_seed(p), kind=KINDS["none"], dropout_p=p)).total.view(x.shape)
        return total, total
    given = Arguments(rows, added, module.weight, module.bias, new_seed(p), KINDS["layer"], module.eps, p)
    y, total, *_ = norm(given, wants_total)
    return y.view(x.shape), total.view(x.shape) if wants_total else y


def stack(layers: Sequence[Any], attentions: Iterable[Sequence[Block]], x: Tensor, last: nn.LayerNorm | None) -> Tensor:
    """x through layers, with what the attentions of each do, and a last norm."""
    parts: list[Part] = []
    for layer, blocks in zip(layers, attentions, strict=True):
        feed: Block = partial(_feed, layer)
        for i, block in enumerate([*blocks, feed], 1):
            parts.append(Part(getattr(layer, f"norm{i}"), getattr(layer, f"dropout{i}"), block))
    return through(x, parts, layers[0].norm_first, last)


def encoder(
    layers: Sequence[Any],
    last: Any,
    x: Any,
    mask: Tensor | None,
    padding: Tensor | None,
    is_causal: bool,
) -> Tensor | None:
    """x through encoder layers and a last norm, or None where modules have to do it.

    Args:
        layers: one or more.
        last: the stack's norm.
        x: [N, L, E] or [L, N, E].
        mask: as src_mask, like padding and is_causal.
        padding: as src_key_padding_mask.
        is_causal: whether mask is a causal one.
    """
    if not _are_worth_fusing(layers, x) or not is_fused(layers, last, x, mask, padding):
        return None
    batch_first = layers[0].self_attn.batch_first
    if _is_bound(mask, is_causal, x, batch_first) and _are_worth_packing(batch_first, (x, padding)):
        places = Places.of(padding, x, batch_first)
        attentions = [[partial(_attend_rows, layer.self_attn, places, places, is_causal)] for layer in layers]
        return places.batch_of(stack(layers, attentions, places.rows_of(x), last))

    attentions = [[partial(_attend, layer.self_attn, padding, mask, is_causal)] for layer in layers]
    return cleared(stack(layers, attentions, x, last), padding, batch_first)


def decoder(
    layers: Sequence[Any],
    last: Any,
    x: Any,
    memory: Any,
    mask: Tensor | None,
    memory_mask: Tensor | None,
    padding: Tensor | None,
    memory_padding: Tensor | None,
    is_causal: bool,
    memory_is_causal: bool,
) -> Tensor | None:
    """x through decoder layers and a last norm, or None where modules have to do it; arguments as of a layer."""
    others = (memory, mask, memory_mask, padding, memory_padding)
    if not _are_worth_fusing(layers, x) or not is_fused(layers, last, x, *others):
        return None
    batch_first = layers[0].self_attn.batch_first
    batch = 0 if batch_first else 1
    if memory is None or memory.dim() != 3 or memory.shape[batch] != x.shape[batch] or 0 in memory.shape:
        return None
    is_bound = _is_bound(mask, is_causal, x, batch_first) and memory_mask is None and not memory_is_causal
    if is_bound and _are_worth_packing(batch_first, (x, padding), (memory, memory_padding)):
        places, of_memory = Places.of(padding, x, batch_first), Places.of(memory_padding, memory, batch_first)
        memory_rows = of_memory.rows_of(memory)
        attentions = [
            [
                partial(_attend_rows, layer.self_attn, places, places, is_causal),
                partial(_attend_rows, layer.multihead_attn, places, of_memory, False, memory=memory_rows),
            ]
            for layer in layers
        ]
        return places.batch_of(stack(layers, attentions, places.rows_of(x), last))

    attentions = [
        [
            partial(_attend, layer.self_attn, padding, mask, is_causal),
            partial(_attend, layer.multihead_attn, memory_padding, memory_mask, memory_is_causal, memory=memory),
        ]
        for layer in layers
    ]
    return cleared(stack(layers, attentions, x, last), padding, batch_first)


def cleared(x: Tensor, padding: Tensor | None, batch_first: bool) -> Tensor:
    """x [N, L, E], [L, N, E] or [L, E] with zeros where a boolean padding [N, L] or [L] leaves places out."""
    if padding is None or padding.dtype != torch.bool:
        return x
    left_out = padding.t() if x.dim() == 3 and not batch_first else padding
    return x.masked_fill(left_out.unsqueeze(-1), 0)


def _are_worth_fusing(layers: Sequence[Any], x: Any) -> bool:
    """Whether each layer has that much to do with x."""
    linear1, dropout = (layers[0]._modules.get(name) for name in ("linear1", "dropout"))
    if not isinstance(x, Tensor) or x.is_nested or x.dim() != 3 or not isinstance(linear1, nn.Linear):
        return False
    E, FF, rows = x.shape[2], linear1.out_features, x.shape[0] * x.shape[1]
    dropped = rows * (2 * E + FF) if isinstance(dropout, nn.Dropout) and dropout.training and dropout.p else 0
    return x.device.type != "cpu" or rows * (4 * E * E + 2 * E * FF) >= LEAST_WORK or dropped >= LEAST_DROPPED


def is_torchs(layer: Any, x: Any, mask: Any, padding: Any, is_causal: bool) -> bool:
    """Whether torch's forward of an encoder layer, with its own path for evaluation, serves: small ones without masks,
    of which nothing but the result is to be seen.
    """
    return (
        not (layer.training or is_causal)
        and mask is padding is None
        and isinstance(x, Tensor)
        and is_plain(x)
        and not needs_graph(x, *_weights(layer))
        and not modules._has_any_global_hook()
        and why_modules(layer) is None
    )


def is_fused(layers: Sequence[Any], last: nn.Module | None, x: Any, *others: Any) -> bool:
    """Whether fused pieces may compute layers and a last norm for x [., ., E], which others go with."""
    if not isinstance(x, Tensor) or x.is_nested or x.dim() != 3 or 0 in x.shape or not x.dtype.is_floating_point:
        return False
    if modules._has_any_global_hook() or autocast_dtype(x) is not None:
        return False
    if any(why_modules(layer) is not None or layer.norm_first != layers[0].norm_first for layer in layers):
        return False
    if len({layer._modules[name].batch_first for layer in layers for name in layer.attentions}) > 1:
        return False
    E = layers[0].self_attn.embed_dim
    if last is not None and (type(last) is not nn.LayerNorm or has_hooks(last) or last.normalized_shape != (E,)):
        return False
    weights = [w for layer in layers for w in _weights(layer)]
    weights += [] if last is None else last._parameters.values()
    if not is_plain(x, *others, *weights):
        return False
    if any(w is not None and (w.dtype != x.dtype or w.device != x.device) for w in weights):
        return False
    masks = [t.dtype for t in others if t is not None]
    if any(dtype not in (torch.bool, x.dtype) for dtype in masks):
        return False
    if x.shape[2] != E or compute_dtype(x.dtype, x, *others, *weights) != x.dtype:
        return False
    return all(why_torch(table, x.device.type, x.dtype) is None for table in _TABLES)


def why_modules(layer: Any) -> str | None:
    """Why this layer takes its modules' path whatever its input, or None."""
    theirs = next(kind for kind in _BLOCKS if isinstance(layer, kind))
    for name in _BLOCKS[theirs]:
        if getattr(type(layer), name) is not getattr(theirs, name) or name in layer.__dict__:
            return f"its {name} is overridden"
    dense, norm, dropout = (nn.Linear, Linear), (nn.LayerNorm,), (nn.Dropout,)
    parts: list[tuple[str, tuple[type[nn.Module], ...]]] = [(name, (MultiheadAttention,)) for name in layer.attentions]
    parts += [("linear1", dense), ("linear2", dense), ("dropout", dropout)]
    for i in range(1, len(layer.attentions) + 2):
        parts += [(f"norm{i}", norm), (f"dropout{i}", dropout)]
    for name, kinds in parts:
        part = layer._modules.get(name)
        if type(part) not in kinds:
            return f"its {name} is a {type(part).__module__}.{type(part).__qualname__}"
        if has_hooks(part):
            return f"its {name} has a hook or a forward of its own"
        if norm is kinds and part.normalized_shape != (layer.self_attn.embed_dim,):
            return f"its {name} is over {list(part.normalized_shape)}"
    for name in layer.attentions:
        part = layer._modules[name]
        if not part._qkv_same_embed_dim or part.bias_k is not None or part.add_zero_attn:
            return f"its {name} has kdim, vdim, add_bias_kv or add_zero_attn"
        if type(part.out_proj) is not NonDynamicallyQuantizableLinear or has_hooks(part.out_proj):
            return f"its {name}.out_proj has a hook, a forward of its own or another class"
    if kind_of(layer.activation) is None:
        return "its activation has no kernel"
    return None


_BLOCKS: dict[type[nn.Module], tuple[str, ...]] = {
    nn.TransformerEncoderLayer: ("_sa_block", "_ff_block"),
    nn.TransformerDecoderLayer: ("_sa_block", "_mha_block", "_ff_block"),
}


def _weights(layer: Any) -> Iterator[Tensor | None]:
    for name in layer.attentions:
        module = layer._modules[name]
        yield from module._parameters.values()
        yield from module.out_proj._parameters.values()
    for i in range(1, len(layer.attentions) + 2):
        yield from layer._modules[f"norm{i}"]._parameters.values()
    yield from layer.linear1._parameters.values()
    yield from layer.linear2._parameters.values()


def _is_bound(mask: Tensor | None, is_causal: bool, x: Tensor, batch_first: bool) -> bool:
    """Whether bounds can take the place of a mask; what is no mask for x is torch's to refuse."""
    L = x.shape[1] if batch_first else x.shape[0]
    return not is_causal if mask is None else is_causal and mask.shape == (L, L)


def _are_worth_packing(batch_first: bool, *batches: tuple[Tensor, Tensor | None]) -> bool:
    """Whether so much of batches is left out, each by its padding [N, L], that their rows should be taken out."""
    spares = False
    for x, padding in batches:
        if padding is not None:
            if padding.dtype != torch.bool or padding.device.type != "cpu":
                return False
            if padding.shape != (x.shape[:2] if batch_first else x.shape[1::-1]):
                return False
            spares = spares or int(padding.sum()) >= LEAST_PADDING * padding.numel()
    return spares


def _attend(
    layer: MultiheadAttention,
    padding: Tensor | None,
    mask: Tensor | None,
    is_causal: bool,
    x: Tensor,
    memory: Tensor | None = None,
) -> Tensor:
    """Attention of x to memory or to itself, both [N, L, E] or [L, N, E]."""
    memory = x if memory is None else memory
    return layer(x, memory, memory, padding, need_weights=False, attn_mask=mask, is_causal=is_causal)[0]


def _attend_rows(
    layer: MultiheadAttention,
    places: Places,
    of_memory: Places,
    is_causal: bool,
    x: Tensor,
    memory: Tensor | None = None,
) -> Tensor:
    """Attention of rows x [rows, E] to rows of memory or their own, sequences one after the other."""
    memory = x if memory is None else memory
    H, E = layer.num_heads, x.shape[1]
    weight, bias = layer.in_proj_weight, layer.in_proj_bias
    counts = (3,) if x is memory else (1, 2)
    heads: list[Tensor] = []
    inputs = (x, memory)[: len(counts)]
    sizes = [E * count for count in counts]
    biases = (None, None) if bias is None else bias.split(sizes)
    for rows, part, of_part, count in zip(inputs, weight.split(sizes), biases, counts, strict=False):
        heads += linear(rows, part, of_part).view(len(rows), count, H, E // H).unbind(1)
    query, key, value = (t.transpose(0, 1).unsqueeze(0) for t in heads)
    p = layer.dropout if layer.training else 0.0
    arguments = attention_op.Arguments(
        query,
        key,
        value,
        cu_seqlens_q=places.ends,
        cu_seqlens_k=of_memory.ends,
        seed=new_seed(p),
        scale=(E // H) ** -0.5,
        dropout_p=p,
        right=0 if is_causal else -1,
    )
    out = attention(arguments).out.squeeze(0).transpose(0, 1).reshape(len(x), E)
    return linear(out, layer.out_proj.weight, layer.out_proj.bias)


def _feed(layer: Any, x: Tensor) -> Tensor:
    kind, p = kind_of(layer.activation), layer.dropout.p if layer.dropout.training else 0.0
    assert kind is not None
    weight, bias = layer.linear1.weight, layer.linear1.bias
    if p == 0 and not needs_graph(x, weight, bias):
        hidden = linear(x, weight, bias, kind)
    else:
        hidden = linear(x, weight)
        given = activation_op.Arguments(
            hidden.view(-1, len(weight)), None, bias, new_seed(p), activation_op.KINDS[kind], p
        )
        hidden = activation(given).view(hidden.shape)
    return linear(hidden, layer.linear2.weight, layer.linear2.bias)
