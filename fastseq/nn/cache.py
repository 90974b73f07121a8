"""Keys and values that transformers keep from one step of decoding to the next."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastseq.ops.attention import TABLE, Arguments, attention
from fastseq.ops.contract import computes_in, new_seed
from fastseq.ops.linear import linear

_FIRST_CAPACITY = 64


class LayerCache:
    """What a `KVCache` holds of one layer.

    Attributes:
        own: [2, N, H, capacity, D], keys and values of its self-attention; of its places the first `length` are taken.
        memory: [2, N, H, S, D], those of its cross-attention.
        length: how many places the calls before have left.
        max_length: the capacity, if it is not to grow.
    """

    own: Tensor | None = None
    memory: Tensor | None = None

    def __init__(self, length: int, max_length: int | None) -> None:
        self.length = length
        self.max_length = max_length

    def attentions(
        self, layer: Any, padding: Tensor | None, of_memory: tuple[Tensor | None, Tensor | None] | None
    ) -> list[Callable[[Tensor], Tensor]]:
        """What the attentions of a layer do to new places, given padding, and memory and its padding of a decoder."""
        blocks: list[Callable[[Tensor], Tensor]] = [partial(self.self_attention, layer.self_attn, padding=padding)]
        if of_memory:
            memory, memory_padding = of_memory
            blocks.append(partial(self.cross_attention, layer.multihead_attn, memory=memory, padding=memory_padding))
        return blocks

    def self_attention(self, module: Any, x: Tensor, padding: Tensor | None) -> Tensor:
        """What module, a MultiheadAttention, gives for new places x, which see all up to their own.

        Args:
            module: of one in_proj_weight, without keys that it adds.
            x: [N, t, E], or [t, N, E] unless module.batch_first.
            padding: [N, length + t], true where a key is left out, or added to the scores.

        Returns:
            Like x. The places are taken with the next `length`.
        """
        heads = _heads(module, x, slice(None))
        places = heads.shape[3]
        end = self.length + places
        own = self._room_for(heads, end)
        own[:, :, :, self.length : end] = heads[1:]
        keys, values = own[:, :, :, :end].unbind()
        return _attend(module, x, heads[0], keys, values, padding, is_causal=places > 1)

    def cross_attention(self, module: Any, x: Tensor, memory: Tensor | None, padding: Tensor | None) -> Tensor:
        """What module gives for x and memory, [N, S, E] or [S, N, E], whose keys and values are kept from now on.

        padding is [N, S].
        """
        E = module.embed_dim
        if self.memory is None:
            assert memory is not None
            self.memory = _heads(module, memory, slice(E, None)).contiguous()
        keys, values = self.memory.unbind()
        return _attend(module, x, _heads(module, x, slice(E))[0], keys, values, padding)

    def _room_for(self, heads: Tensor, end: int) -> Tensor:
        """The keys and values of self-attention, with at least `end` places for [3, N, H, t, D]."""
        own, capacity = self.own, 0
        N, H, _, D = heads.shape[1:]
        if own is not None:
            capacity = own.shape[3]
            same = own.shape == (2, N, H, capacity, D) and own.dtype == heads.dtype and own.device == heads.device
            if same and end <= capacity:
                return own
            if not same and self.length:
                has, given = (f"{t.shape[2]} heads of {t.shape[4]} {t.dtype}" for t in (own, heads))
                raise ValueError(f"cache: it holds {has}, which is not of this stack: that has {given}")
            capacity = capacity if same else 0
        # Twice as many whenever they run out: each place is moved once on average. They may be written to in and out of
        # inference mode.
        with torch.inference_mode(False):
            larger = heads.new_empty(2, N, H, self.max_length or max(end, 2 * capacity, _FIRST_CAPACITY), D)
        if own is not None and self.length:
            larger[:, :, :, : self.length] = own[:, :, :, : self.length]
        self.own = larger
        return larger

    def reorder(self, indices: Tensor, memory: bool) -> None:
        """Makes row i what row indices[i] was."""
        if self.own is not None:
            kept = self.own[:, :, :, : self.length].index_select(1, indices)
            if self.own.shape[1] != len(indices):
                with torch.inference_mode(False):
                    self.own = self.own.new_empty(2, len(indices), *self.own.shape[2:])
            self.own[:, :, :, : self.length] = kept
        if memory and self.memory is not None:
            self.memory = self.memory.index_select(1, indices)


class KVCache:
    """Keys and values of all attentions of a decoder: each call computes its new places only.

        cache = fastseq.nn.KVCache()
        with torch.inference_mode():
            out = decoder(prefix, memory, cache=cache)
            while ...:
                out = decoder(next_places, memory, cache=cache)

    decoder is a `TransformerDecoder`, or a `TransformerEncoder`, which with a cache is a stack without memory. Its new
    places, one or more, see all places of the calls before, and one another up to their own: results are those of one
    call with a causal mask. Memory is projected in the first call; in later ones it may be None, and of one that is
    given only the shape is looked at. Padding masks are of all places: tgt_key_padding_mask is [N, len(cache) + t].
    Other masks cannot be given. Without a batch N is 1.

    It is for inference: where a gradient would be recorded, a call is refused. If a call fails, the cache is as before.

    Args:
        max_length: the number of places, which are set aside at once; by default there are ever more, without copies of
            what is there but when their number doubles.

    Raises:
        TypeError, ValueError: max_length is no positive integer.
    """

    def __init__(self, max_length: int | None = None) -> None:
        if max_length is not None:
            if not isinstance(max_length, int) or isinstance(max_length, bool):
                raise TypeError(f"max_length must be an integer or None, got {max_length!r}")
            if max_length < 1:
                raise ValueError(f"max_length must be at least 1, got {max_length}")
        self.max_length = max_length
        self.layers: list[LayerCache] = []
        # The number of sequences, their dtype and device.
        self._kind: tuple[int, torch.dtype, torch.device] | None = None
        self._length = 0

    def __len__(self) -> int:
        """How many places there are."""
        return self._length

    def __repr__(self) -> str:
        return f"{type(self).__name__}(max_length={self.max_length}, length={self._length}, layers={len(self.layers)})"

    def reset(self) -> None:
        """Forgets all sequences and their memory; the next call may be of other ones, of another kind too."""
        self._set_length(0)
        for layer in self.layers:
            layer.memory = None

    def reorder(self, indices: Tensor, memory: bool = True) -> None:
        """Makes sequence i what sequence indices[i] was, as beam search wants it.

        Args:
            indices: [new N] integers; sequences may be taken more than once, or not at all.
            memory: whether the keys and values of memory go along. If not, sequence i must have the memory that it had,
                as within the beams of one source: it spares a copy.

        Raises:
            TypeError, ValueError, IndexError: indices are not such integers, or others than the sequences there are.
        """
        if not isinstance(indices, Tensor) or indices.dtype not in (torch.int32, torch.int64):
            got = indices.dtype if isinstance(indices, Tensor) else type(indices).__name__
            raise TypeError(f"indices must be a tensor of int32 or int64, got {got}")
        if indices.dim() != 1 or not len(indices):
            raise ValueError(f"indices must be [new N], at least one, got {list(indices.shape)}")
        if self._kind is None or not self._length:
            raise ValueError("indices: the cache holds no sequences yet")
        N, dtype, device = self._kind
        if indices.device != device:
            raise ValueError(f"indices must be on {device}, where the cache is, got {indices.device}")
        if device.type == "cpu" and not 0 <= int(indices.min()) <= int(indices.max()) < N:
            raise IndexError(f"indices must be between 0 and {N - 1}, got {indices.tolist()}")
        if not memory and len(indices) != N:
            raise ValueError(f"indices must be {N} where memory stays as it is, got {len(indices)}")
        for layer in self.layers:
            layer.reorder(indices, memory)
        self._kind = len(indices), dtype, device

    def begin(
        self, layers: int, name: str, x: Tensor, padding: Any, batch_first: bool, memory: tuple[Any, Any] | None = None
    ) -> None:
        """What a stack of so many layers calls before a step: checks what comes next.

        Args:
            layers: how many.
            name: what x is called.
            x: new places, [N, t, E], or [t, N, E] unless batch_first.
            padding: of all places.
            batch_first: likewise of memory.
            memory: of a decoder, and its padding.
        """
        N, places = x.shape[:2] if batch_first else (x.shape[1], x.shape[0])
        kind = (N, x.dtype, x.device)
        if not places:
            raise ValueError(f"{name} must have at least one place, got {list(x.shape)}")
        if self._length and kind != self._kind:
            holds, got = (f"{n} sequences of {dtype} on {device}" for n, dtype, device in (self._kind or kind, kind))
            raise ValueError(f"{name} must be as the cache is, {holds}, got {got}")
        if self._length and layers != len(self.layers):
            raise ValueError(f"cache: it is of {len(self.layers)} layers, the stack has {layers}")
        if self.max_length is not None and self._length + places > self.max_length:
            taken = f"{self._length} of the {self.max_length} places of the cache are taken"
            raise ValueError(f"{name} has {places} places, but {taken}")
        if not self._length:
            self._kind = kind
            self.reset()  # memory too, should the first call have failed
            if layers != len(self.layers):
                self.layers = [LayerCache(0, self.max_length) for _ in range(layers)]
        self._check_padding(f"{name}_key_padding_mask", padding, self._length + places)
        if memory is not None:
            self._check_memory(*memory, batch_first)

    def _check_memory(self, memory: Tensor | None, padding: Any, batch_first: bool) -> None:
        N, dtype, device = self._kind or (0, None, None)
        held = self.layers[0].memory
        places = 0 if held is None else held.shape[3]
        if memory is None:
            if held is None:
                raise ValueError("memory must be given in the first call with a cache, got None")
        else:
            if memory.dim() != 3 or memory.dtype != dtype or memory.device != device:
                got = f"{list(memory.shape)} {memory.dtype} on {memory.device}"
                raise ValueError(f"memory must have tgt's dimensions, {dtype} on {device}, got {got}")
            n, given = memory.shape[:2] if batch_first else (memory.shape[1], memory.shape[0])
            if n != N or (held is not None and given != places):
                wanted = f"{N} sequences" + ("" if held is None else f" of {places} places, as it was")
                raise ValueError(f"memory must be {wanted}, got {n} of {given}")
            places = given
        self._check_padding("memory_key_padding_mask", padding, places)

    def _check_padding(self, name: str, padding: Any, places: int) -> None:
        if padding is None:
            return
        N, _, device = self._kind or (0, None, None)
        if not isinstance(padding, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(padding).__name__}")
        if padding.dtype != torch.bool and not padding.is_floating_point():
            raise TypeError(f"{name} must be boolean or floating, got {padding.dtype}")
        if padding.shape != (N, places) or padding.device != device:
            got = f"{list(padding.shape)} on {padding.device}"
            raise ValueError(f"{name} must be {[N, places]}, of all places, on {device}, got {got}")

    def end(self, places: int) -> None:
        """What a stack calls after a step: so many places more are taken."""
        self._set_length(self._length + places)

    def _set_length(self, length: int) -> None:
        self._length = length
        for layer in self.layers:
            layer.length = length


def _heads(module: Any, x: Tensor, rows: slice) -> Tensor:
    """x by these rows of in_proj_weight, [3 or fewer, N, H, places, D], in the dtype that attention is computed in."""
    weight, bias = module.in_proj_weight, module.in_proj_bias
    if rows.start is not None or rows.stop is not None:
        weight, bias = weight[rows], None if bias is None else bias[rows]
    y = linear(x, weight, bias)
    y = y.view(*x.shape[:2], -1, module.num_heads, module.head_dim)
    y = y.permute(2, 0, 3, 1, 4) if module.batch_first else y.permute(2, 1, 3, 0, 4)
    return y.to(computes_in(TABLE.name, y.device.type, y.dtype))


def _attend(
    module: Any, x: Tensor, q: Tensor, keys: Tensor, values: Tensor, padding: Tensor | None, is_causal: bool = False
) -> Tensor:
    """Attention and out_proj, like x."""
    mask = None
    if padding is not None and padding.dtype != torch.bool:
        mask, padding = padding[:, None, None].to(q.dtype), None
    dropout_p = module.dropout if module.training else 0.0
    arguments = Arguments(
        q,
        keys,
        values,
        mask,
        padding,
        seed=new_seed(dropout_p),
        scale=module.head_dim**-0.5,
        dropout_p=dropout_p,
        right=0 if is_causal else -1,
        bottom_right=True,
    )
    out = attention(arguments)[0]
    out = out.transpose(1, 2) if module.batch_first else out.permute(2, 0, 1, 3)
    out = out.reshape(x.shape)
    return linear(out if out.dtype == x.dtype else out.to(x.dtype), module.out_proj.weight, module.out_proj.bias)
