"""Transformers: layers and stacks by fused pieces (`fastseq.nn.block`), or by torch.nn's formula and their modules."""

from collections.abc import Callable
from functools import partial, wraps
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.transformer import _get_seq_len

from fastseq.nn import block
from fastseq.nn.attention import MultiheadAttention
from fastseq.nn.cache import KVCache, LayerCache
from fastseq.nn.serving import Served
from fastseq.ops.attention import TABLE
from fastseq.ops.contract import has_hooks, is_plain
from fastseq.registry import Op


class _Layer(Served):
    """What the layers of encoders and decoders share."""

    norm_first: bool
    # Self- and cross-attention, where there is one.
    attentions: tuple[str, ...] = ("self_attn",)

    @property
    def table(self) -> Op:
        return TABLE

    @property
    def note(self) -> str:  # type: ignore[override]
        reason = block.why_modules(self)
        return "with all that is in it" if reason is None else f"attention; the rest by its modules: {reason}"

    def why_torch(self) -> str | None:
        attentions = [(name, getattr(self, name)) for name in self.attentions]
        for name, attention in attentions:
            kind = type(attention)
            if not isinstance(attention, MultiheadAttention) or kind.forward is not MultiheadAttention.forward:
                return f"its {name} is a {kind.__module__}.{kind.__qualname__}, which is called as it is"
        return next((reason for _, attention in attentions if (reason := attention.why_torch())), None)

    def _residual(self, x: Tensor, *blocks: tuple[Any, Callable[[Tensor], Tensor]]) -> Tensor:
        """x through blocks, each with the norm before or after it."""
        for norm, sublayer in blocks:
            x = x + sublayer(norm(x)) if self.norm_first else norm(x + sublayer(x))
        return x


class TransformerEncoderLayer(_Layer, nn.TransformerEncoderLayer):
    """Drop-in for `torch.nn.TransformerEncoderLayer`: the same arguments, parameters and results.

    Fused pieces compute it, unless `_sa_block` or `_ff_block` is overridden, or a module in it has hooks or another
    class: then it goes through those. Where a boolean src_key_padding_mask leaves places out, the result is zeros.
    """

    @wraps(nn.TransformerEncoderLayer.__init__)  # type: ignore[misc]
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.self_attn.__class__ = MultiheadAttention

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
        *,
        cache: LayerCache | None = None,
    ) -> Tensor:
        """See `torch.nn.TransformerEncoderLayer`.

        Args:
            src: [L, N, E], [N, L, E] if batch_first, or [L, E].
            src_mask: [L, L] or [N*H, L, L]. A boolean one is true where a key is left out; a float one is added to the
                scores.
            src_key_padding_mask: [N, L] or [L], likewise.
            is_causal: says that src_mask lets a place see those up to its own.
            cache: what `TransformerEncoder` hands on of its own.

        Returns:
            Like src. Where all keys are left out, attention gives zeros.
        """
        if cache is None:
            fused = block.encoder([self], None, src, src_mask, src_key_padding_mask, is_causal)
            if fused is not None:
                return fused
            if block.is_torchs(self, src, src_mask, src_key_padding_mask, is_causal):
                return nn.TransformerEncoderLayer.forward(self, src)
        node = self._node(
            src, src_mask=src_mask, src_key_padding_mask=src_key_padding_mask, is_causal=is_causal, cache=cache
        )
        if node is not None:
            return node
        mask, padding = src_mask, src_key_padding_mask
        if cache is None:
            mask, padding = _float_masks(src, src_mask, "src_mask", src_key_padding_mask)

        def attend(x: Tensor) -> Tensor:
            if cache is not None:
                return self.dropout1(cache.self_attention(self.self_attn, x, padding))
            return self._sa_block(x, mask, padding, is_causal=is_causal)

        out = self._residual(src, (self.norm1, attend), (self.norm2, self._ff_block))
        return out if cache is not None else block.cleared(out, src_key_padding_mask, self.self_attn.batch_first)


class TransformerDecoderLayer(_Layer, nn.TransformerDecoderLayer):
    """Drop-in for `torch.nn.TransformerDecoderLayer`: the same arguments, parameters and results.

    Fused pieces compute it, unless `_sa_block`, `_mha_block` or `_ff_block` is overridden, or a module in it has hooks
    or another class: then it goes through those. Where a boolean tgt_key_padding_mask leaves places out, the result is
    zeros.
    """

    attentions = ("self_attn", "multihead_attn")

    @wraps(nn.TransformerDecoderLayer.__init__)  # type: ignore[misc]
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.self_attn.__class__ = self.multihead_attn.__class__ = MultiheadAttention

    def forward(
        self,
        tgt: Tensor,
        memory: Any,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool = False,
        memory_is_causal: bool = False,
        *,
        cache: LayerCache | None = None,
    ) -> Tensor:
        """See `torch.nn.TransformerDecoderLayer`.

        Args:
            tgt: [L, N, E], [N, L, E] if batch_first, or [L, E].
            memory: [S, N, E], [N, S, E] or [S, E].
            tgt_mask: [L, L] or [N*H, L, L]. A boolean one is true where a key is left out; a float one is added to the
                scores.
            memory_mask: [L, S] or [N*H, L, S], likewise.
            tgt_key_padding_mask: [N, L] or [L], likewise.
            memory_key_padding_mask: [N, S] or [S], likewise.
            tgt_is_causal: says that tgt_mask lets a place see those up to its own.
            memory_is_causal: says so of memory_mask.
            cache: what `TransformerDecoder` hands on of its own.

        Returns:
            Like tgt. Where all keys are left out, attention gives zeros.
        """
        if cache is None:
            masks = (tgt_mask, memory_mask, tgt_key_padding_mask, memory_key_padding_mask)
            fused = block.decoder([self], None, tgt, memory, *masks, tgt_is_causal, memory_is_causal)
            if fused is not None:
                return fused
        node = self._node(
            tgt,
            memory,
            tgt_mask=tgt_mask,
            memory_mask=memory_mask,
            tgt_key_padding_mask=tgt_key_padding_mask,
            memory_key_padding_mask=memory_key_padding_mask,
            tgt_is_causal=tgt_is_causal,
            memory_is_causal=memory_is_causal,
            cache=cache,
        )
        if node is not None:
            return node

        def attend(x: Tensor) -> Tensor:
            if cache is not None:
                return self.dropout1(cache.self_attention(self.self_attn, x, tgt_key_padding_mask))
            return self._sa_block(x, tgt_mask, tgt_key_padding_mask, tgt_is_causal)

        def attend_memory(x: Tensor) -> Tensor:
            if cache is not None:
                return self.dropout2(cache.cross_attention(self.multihead_attn, x, memory, memory_key_padding_mask))
            return self._mha_block(x, memory, memory_mask, memory_key_padding_mask, memory_is_causal)

        out = self._residual(tgt, (self.norm1, attend), (self.norm2, attend_memory), (self.norm3, self._ff_block))
        return out if cache is not None else block.cleared(out, tgt_key_padding_mask, self.self_attn.batch_first)


class _Stack(Served):
    """What encoders and decoders share."""

    layers: Any
    norm: Any

    @property
    def table(self) -> Op:
        return TABLE

    def _is_causal(self, mask: Any, is_causal: bool | None, x: Tensor) -> bool:
        """What torch finds out about a mask of which nothing is said.

        A compiler cannot ask what is in a mask: there, and where nothing is in it, it is taken as it is.
        """
        places = _get_seq_len(x, self._batch_first)
        if is_causal is not None or mask is None:
            return is_causal is True
        size = mask.size(-2) if places is None else places
        if mask.shape != (size, size) or torch.compiler.is_compiling() or mask.is_meta:
            return False
        left_out = mask.new_full((), True if mask.dtype == torch.bool else -torch.inf).expand(size, size)
        # Of most that are not causal the first row tells it.
        return all(torch.equal(mask[:rows], left_out[:rows].triu(1)) for rows in (1, size))

    @property
    def _batch_first(self) -> bool:
        return self.layers[0].self_attn.batch_first

    def _are(self, kind: Any) -> bool:
        """Whether all layers are of this kind of ours, with its forward and without hooks."""
        return all(
            isinstance(layer, kind) and type(layer).forward is kind.forward and not has_hooks(layer)
            for layer in self.layers
        )

    def _normed(self, x: Tensor) -> Tensor:
        return x if self.norm is None else self.norm(x)

    def _cached(
        self, cache: KVCache, name: str, x: Tensor, padding: Tensor | None, refused: dict[str, Any], **memory: Any
    ) -> Tensor:
        """New places x through the layers, with what the cache holds.

        Args:
            cache: of the calls before.
            name: what x is called.
            x: as of forward.
            padding: of all places.
            refused: arguments that there must not be.
            memory: and memory_key_padding_mask, of a decoder.
        """
        if not isinstance(cache, KVCache):
            raise TypeError(f"cache must be a fastseq.nn.KVCache, got {type(cache).__name__}")
        for argument, given in refused.items():
            if given is not None and given is not False:
                raise ValueError(f"{argument} cannot be given with cache, where each place sees those up to its own")
        for i, layer in enumerate(self.layers):
            if (reason := _why_uncached(layer, "memory" in memory)) is not None:
                raise RuntimeError(f"cache: layers[{i}] {reason}")
        inputs = [t for t in (x, memory.get("memory")) if t is not None]
        if torch.is_grad_enabled() and any(t.requires_grad for t in (*inputs, *self.parameters())):
            raise RuntimeError("cache: no gradient can be had with it; call under torch.no_grad() or inference_mode()")

        batch_first = self._batch_first
        unbatched = x.dim() == 2
        if unbatched:
            batch = 0 if batch_first else 1
            x = x.unsqueeze(batch)
            padding = None if padding is None else padding.unsqueeze(0)
            given = {"memory": batch, "memory_key_padding_mask": 0}
            memory = {key: t if t is None else t.unsqueeze(given[key]) for key, t in memory.items()}
        if x.dim() != 3:
            raise ValueError(f"{name} must have two or three dimensions, got {list(x.shape)}")
        places = x.shape[1 if batch_first else 0]
        of_memory = (memory["memory"], memory["memory_key_padding_mask"]) if memory else None
        cache.begin(len(self.layers), name, x, padding, batch_first, of_memory)
        kind = TransformerDecoderLayer if memory else TransformerEncoderLayer
        if self._are(kind) and block.is_fused(self.layers, self.norm, x, *memory.values()):
            kept = [k.attentions(layer, padding, of_memory) for k, layer in zip(cache.layers, self.layers, strict=True)]
            x = block.stack(self.layers, kept, x, self.norm)
        else:
            options = {f"{name}_key_padding_mask": padding, **memory}
            for layer, of_layer in zip(self.layers, cache.layers, strict=True):
                x = layer(x, **options, cache=of_layer)
            x = self._normed(x)
        cache.end(places)
        x = block.cleared(x, None if padding is None else padding[:, -places:], batch_first)
        return x.squeeze(batch) if unbatched else x


class TransformerEncoder(_Stack, nn.TransformerEncoder):
    """Drop-in for `torch.nn.TransformerEncoder`: the same arguments, parameters and results.

    Padding costs nothing: where a boolean src_key_padding_mask leaves places out, the result is zeros, in training as
    in evaluation, and they get no gradient; torch's does so in evaluation, where it also cuts the result at the longest
    sequence. A float mask, added to the scores, leaves them places like others, as torch has them in training.
    """

    def forward(
        self,
        src: Tensor,
        mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool | None = None,
        *,
        cache: KVCache | None = None,
    ) -> Tensor:
        """See `torch.nn.TransformerEncoder`.

        Args:
            src: [L, N, E], [N, L, E] if batch_first, or [L, E]; with cache new places only.
            mask: as src_mask of a layer.
            src_key_padding_mask: as of a layer; with cache of all places, [N, cached + L].
            is_causal: says whether mask lets a place see those up to its own; by default the mask is looked at.
            cache: makes a decoder of the stack: each place sees those up to its own, among them those of the calls
                before. See `KVCache`.

        Returns:
            Like src.

        Raises:
            RuntimeError, TypeError, ValueError: with cache, what `KVCache` says.
        """
        node = self._node(src, mask=mask, src_key_padding_mask=src_key_padding_mask, is_causal=is_causal, cache=cache)
        if node is not None:
            return node
        if cache is not None:
            refused = {"mask": mask, "is_causal=False": is_causal is False}
            return self._cached(cache, "src", src, src_key_padding_mask, refused)
        # Anything else is an error, of which the masks tell.
        is_mask = isinstance(mask, Tensor) and (mask.dtype == torch.bool or mask.is_floating_point())
        is_causal = isinstance(src, Tensor) and (mask is None or is_mask) and self._is_causal(mask, is_causal, src)
        if self._are(TransformerEncoderLayer):
            fused = block.encoder(self.layers, self.norm, src, mask, src_key_padding_mask, is_causal)
            if fused is not None:
                return fused
        mask, padding = _float_masks(src, mask, "mask", src_key_padding_mask)
        for layer in self.layers:
            src = layer(src, src_mask=mask, is_causal=is_causal, src_key_padding_mask=padding)
        return block.cleared(self._normed(src), src_key_padding_mask, self._batch_first)


class TransformerDecoder(_Stack, nn.TransformerDecoder):
    """Drop-in for `torch.nn.TransformerDecoder`: the same arguments, parameters and results."""

    def forward(
        self,
        tgt: Tensor,
        memory: Any,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool | None = None,
        memory_is_causal: bool = False,
        *,
        cache: KVCache | None = None,
    ) -> Tensor:
        """See `torch.nn.TransformerDecoder`.

        Args:
            tgt: [L, N, E], [N, L, E] if batch_first, or [L, E]; with cache new places only.
            memory: [S, N, E], [N, S, E] or [S, E]; with cache it may be None after the first call.
            tgt_mask: as of a layer, like memory_mask and memory_key_padding_mask.
            memory_mask: as of a layer.
            tgt_key_padding_mask: as of a layer; with cache of all places, [N, cached + L].
            memory_key_padding_mask: as of a layer.
            tgt_is_causal: says whether tgt_mask lets a place see those up to its own; by default it is looked at.
            memory_is_causal: says so of memory_mask.
            cache: each place sees those up to its own, among them those of the calls before. See `KVCache`.

        Returns:
            Like tgt.

        Raises:
            RuntimeError, TypeError, ValueError: with cache, what `KVCache` says.
        """
        options: dict[str, Any] = dict(
            tgt_mask=tgt_mask,
            memory_mask=memory_mask,
            tgt_key_padding_mask=tgt_key_padding_mask,
            memory_key_padding_mask=memory_key_padding_mask,
            tgt_is_causal=tgt_is_causal,
            memory_is_causal=memory_is_causal,
        )
        node = self._node(tgt, memory, **options, cache=cache)
        if node is not None:
            return node
        if cache is not None:
            refused = {
                "tgt_mask": tgt_mask,
                "tgt_is_causal=False": tgt_is_causal is False,
                "memory_mask": memory_mask,
                "memory_is_causal": memory_is_causal,
            }
            given = dict(memory=memory, memory_key_padding_mask=memory_key_padding_mask)
            return self._cached(cache, "tgt", tgt, tgt_key_padding_mask, refused, **given)
        tgt_is_causal = self._is_causal(tgt_mask, tgt_is_causal, tgt)
        masks = (tgt_mask, memory_mask, tgt_key_padding_mask, memory_key_padding_mask)
        if self._are(TransformerDecoderLayer):
            fused = block.decoder(self.layers, self.norm, tgt, memory, *masks, tgt_is_causal, memory_is_causal)
            if fused is not None:
                return fused
        options["tgt_is_causal"] = tgt_is_causal
        for layer in self.layers:
            tgt = layer(tgt, memory, **options)
        return block.cleared(self._normed(tgt), tgt_key_padding_mask, self._batch_first)


class Transformer(Served, nn.Transformer):
    """Drop-in for `torch.nn.Transformer`, of `TransformerEncoder` and `TransformerDecoder`.

    To decode with a `KVCache`, call `encoder` once and `decoder` for each step.
    """

    def __init__(
        self,
        d_model: int = 512,
        nhead: int = 8,
        num_encoder_layers: int = 6,
        num_decoder_layers: int = 6,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: str | Callable[[Tensor], Tensor] = F.relu,
        custom_encoder: Any | None = None,
        custom_decoder: Any | None = None,
        layer_norm_eps: float = 1e-5,
        batch_first: bool = False,
        norm_first: bool = False,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        sizes = (d_model, nhead, dim_feedforward, dropout, activation, layer_norm_eps, batch_first, norm_first)
        factory: dict[str, Any] = dict(bias=bias, device=device, dtype=dtype)
        norm = partial(nn.LayerNorm, d_model, layer_norm_eps, **factory)
        if custom_encoder is None:
            encoder_layer = TransformerEncoderLayer(*sizes, **factory)
            custom_encoder = TransformerEncoder(encoder_layer, num_encoder_layers, norm())
        if custom_decoder is None:
            decoder_layer = TransformerDecoderLayer(*sizes, **factory)
            custom_decoder = TransformerDecoder(decoder_layer, num_decoder_layers, norm())
        super().__init__(
            d_model, nhead, custom_encoder=custom_encoder, custom_decoder=custom_decoder, batch_first=batch_first
        )

    @property
    def table(self) -> Op:
        return TABLE

    def forward(
        self,
        src: Tensor,
        tgt: Tensor,
        src_mask: Tensor | None = None,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        src_is_causal: bool | None = None,
        tgt_is_causal: bool | None = None,
        memory_is_causal: bool = False,
    ) -> Tensor:
        """See `torch.nn.Transformer`.

        Source places that src_key_padding_mask leaves out are computed unless memory_key_padding_mask leaves them out,
        too: the decoder sees them.

        Args:
            src: [S, N, E], [N, S, E] if batch_first, or [S, E].
            tgt: [L, N, E], [N, L, E] or [L, E].
            src_mask: the encoder's mask; the next five as of encoder and decoder too.
            tgt_mask: the decoder's.
            memory_mask: the decoder's.
            src_key_padding_mask: the encoder's.
            tgt_key_padding_mask: the decoder's.
            memory_key_padding_mask: the decoder's.
            src_is_causal: the encoder's is_causal.
            tgt_is_causal: the decoder's.
            memory_is_causal: the decoder's.

        Returns:
            Like tgt.
        """
        if _is_seen(src_key_padding_mask, memory_key_padding_mask):
            src_mask, src_key_padding_mask = _float_masks(src, src_mask, "src_mask", src_key_padding_mask)
        options: dict[str, Any] = dict(
            src_mask=src_mask,
            tgt_mask=tgt_mask,
            memory_mask=memory_mask,
            src_key_padding_mask=src_key_padding_mask,
            tgt_key_padding_mask=tgt_key_padding_mask,
            memory_key_padding_mask=memory_key_padding_mask,
            src_is_causal=src_is_causal,
            tgt_is_causal=tgt_is_causal,
            memory_is_causal=memory_is_causal,
        )
        node = self._node(src, tgt, **options)
        return super().forward(src, tgt, **options) if node is None else node


def _is_seen(padding: Any, memory_padding: Any) -> bool:
    """Whether a decoder sees of memory what a boolean padding leaves out of its source."""
    if not isinstance(padding, Tensor) or padding.dtype != torch.bool or memory_padding is padding:
        return False
    is_like = isinstance(memory_padding, Tensor) and memory_padding.dtype == torch.bool
    if not is_like or memory_padding.shape != padding.shape:
        return True
    # What is in them can be asked of plain tensors only.
    return not is_plain(padding, memory_padding) or padding.is_meta or bool((padding & ~memory_padding).any())


def _float_masks(x: Tensor, mask: Any, name: str, padding: Any) -> tuple[Tensor | None, Tensor | None]:
    """A mask and key padding as torch's encoders hand them on: what is boolean becomes 0 and -inf."""
    # Of masks of two kinds it warns, which no graph can.
    other = None if torch.compiler.is_compiling() else F._none_or_dtype(mask)
    padding = F._canonical_mask(padding, "src_key_padding_mask", other, name, x.dtype)
    return F._canonical_mask(mask, name, None, "", x.dtype, check_other=False), padding


_BLOCKS = ("_sa_block", "_mha_block")
_ATTENTIONS = (MultiheadAttention.forward, nn.MultiheadAttention.forward)


def _why_uncached(layer: Any, has_memory: bool) -> str | None:
    """Why a layer cannot go with a cache, or None."""
    ours: Any = TransformerDecoderLayer if has_memory else TransformerEncoderLayer
    theirs: Any = nn.TransformerDecoderLayer if has_memory else nn.TransformerEncoderLayer
    kind = type(layer)
    if kind is not ours:
        if not isinstance(layer, ours):
            return f"is a {kind.__module__}.{kind.__qualname__}, not a fastseq.nn.{ours.__name__}"
        if kind.forward is not ours.forward:
            return f"is a {kind.__qualname__} with a forward of its own, which knows no cache"
    for name in _BLOCKS[: len(ours.attentions)]:
        if getattr(getattr(layer, name), "__func__", None) is not getattr(theirs, name):
            return f"overrides {name}, through which the cache does not go"
    for name in ours.attentions:
        attention = getattr(layer, name)
        if getattr(type(attention), "forward", None) not in _ATTENTIONS:
            return f"has a {name} that is a {type(attention).__qualname__}, through which the cache does not go"
        if attention._forward_hooks or attention._forward_pre_hooks or "forward" in attention.__dict__:
            return f"has hooks on its {name}, or a forward of its own, which the cache would not call"
        if attention.in_proj_weight is None or attention.bias_k is not None or attention.add_zero_attn:
            return f"has a {name} with kdim, vdim, add_bias_kv or add_zero_attn, which the cache does not serve"
    return None
