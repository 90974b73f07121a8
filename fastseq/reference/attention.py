"""Scaled dot product attention, with all that the op adds to it, as it is written down.

For a query l and a key s of a sequence with L queries and S keys, with offset = S - L if bottom_right, else 0:

    score = scale * q_l . k_s                       (Vaswani et al. 2017, arXiv:1706.03762)
    score = softcap * tanh(score / softcap)         if softcap > 0 (Gemma 2, arXiv:2408.00118)
    score = score - slope_h * |l + offset - s|      with slopes (ALiBi, arXiv:2108.12409)
    score = score + mask                            if mask is a float; a boolean one says which keys take part
    left out if s < l + offset - left, s > l + offset + right (a negative left or right is no bound), or key_padding

    lse = log sum_s exp(score);   weight = exp(score - lse), 0 in a row whose every key is left out
    weight = weight * keep / (1 - p) with dropout p;   out_l = sum_s weight v_s

Heads of query share heads of key and value in groups of neighbours (Ainslie et al. 2023, arXiv:2305.13245).
"""

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from fastseq.reference.dropout import keep


def visible(L: int, S: int, left: int, right: int, bottom_right: bool, device: torch.device) -> Tensor | None:
    """[L, S] which keys the bounds leave, None for all."""
    if left < 0 and right < 0:
        return None
    ahead = _ahead(L, S, bottom_right, device)
    seen = torch.ones(L, S, dtype=torch.bool, device=device)
    if left >= 0:
        seen = seen & (ahead >= -left)
    if right >= 0:
        seen = seen & (ahead <= right)
    return seen


def _ahead(L: int, S: int, bottom_right: bool, device: torch.device) -> Tensor:
    """[L, S] how many places each key is ahead of each query."""
    offset = S - L if bottom_right else 0
    return torch.arange(S, device=device) - torch.arange(L, device=device).unsqueeze(-1) - offset


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    key_padding: Tensor | None,
    slopes: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    seed: Tensor | None,
    scale: float,
    softcap: float,
    dropout_p: float,
    left: int,
    right: int,
    bottom_right: bool,
    return_weights: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `fastseq.ops.attention.Arguments` and `Outputs`."""
    given = query.dtype
    query, key, value, mask, slopes = (_computed(t) for t in (query, key, value, mask, slopes))
    shared: Any = (slopes, scale, softcap, left, right, bottom_right)
    with _as_given(query.device):
        if cu_seqlens_q is not None and cu_seqlens_k is not None:
            # Of no sequence at all, in case there is none.
            parts = [_dense(query[:, :, :0], key[:, :, :0], value[:, :, :0], None, None, None, *shared)]
            for n, (q, k) in enumerate(_sequences(cu_seqlens_q, cu_seqlens_k)):
                sizes = (n + 1, query.shape[1], q.stop - q.start, k.stop - k.start)
                keeps = None if seed is None else keep(seed, sizes, dropout_p, query.device)[n:]
                parts.append(_dense(query[:, :, q], key[:, :, k], value[:, :, k], None, None, keeps, *shared))
            out, lse = (torch.cat([part[i] for part in parts], 2) for i in range(2))
            weights = query.new_zeros(0)
        else:
            sizes = (*query.shape[:3], key.shape[2])
            keeps = None if seed is None else keep(seed, sizes, dropout_p, query.device)
            out, lse, weights = _dense(query, key, value, mask, key_padding, keeps, *shared)
            weights = query.new_zeros(0) if return_weights == 0 else weights.mean(1) if return_weights == 2 else weights
        return _laid_out_like(out, query).to(given), lse, weights


def _computed(t: Any) -> Any:
    """The same in the dtype that it is computed in: half precision in float32."""
    return t.float() if t is not None and t.dtype in (torch.float16, torch.bfloat16) else t


def _sequences(cu_seqlens_q: Tensor, cu_seqlens_k: Tensor) -> Iterator[tuple[slice, slice]]:
    ends = zip(cu_seqlens_q.tolist(), cu_seqlens_k.tolist(), strict=True)
    q0, k0 = next(ends)
    for q1, k1 in ends:
        yield slice(q0, q1), slice(k0, k1)
        q0, k0 = q1, k1


def _dense(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    key_padding: Tensor | None,
    keeps: Tensor | None,
    slopes: Tensor | None,
    scale: float,
    softcap: float,
    left: int,
    right: int,
    bottom_right: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    N, H, L, S = *query.shape[:3], key.shape[2]
    seen = torch.ones((), dtype=torch.bool, device=query.device)
    if (bounded := visible(L, S, left, right, bottom_right, query.device)) is not None:
        seen = bounded
    if key_padding is not None:
        seen = seen & ~key_padding[:, None, None]
    if mask is not None:
        seen = seen & (mask if mask.dtype == torch.bool else mask != -math.inf)
    seen = seen.expand(N, H, L, S)
    group = H // max(key.shape[1], 1)
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    # Whatever stands where no query looks: in gradients, too, 0 * inf would be NaN.
    unseen = ~seen.any(2).unsqueeze(-1)
    key, value = key.masked_fill(unseen, 0.0), value.masked_fill(unseen, 0.0)
    scores = query @ key.transpose(-1, -2) * scale
    if softcap > 0:
        scores = softcap * torch.tanh(scores / softcap)
    if slopes is not None:
        distance = _ahead(L, S, bottom_right, query.device).abs().to(query.dtype)
        scores = scores - slopes.to(query.dtype).view(-1, 1, 1) * distance
    if mask is not None and mask.dtype != torch.bool:
        scores = scores + mask
    seen = seen & (scores != -math.inf)  # those that overflowed count for nothing, either
    anything = seen.any(-1, keepdim=True)
    # Not a sum with -inf, which a NaN in a key that is left out would survive.
    scores = torch.where(anything, torch.where(seen, scores, -math.inf), 0.0)
    lse = torch.where(anything.squeeze(-1), scores.logsumexp(-1), -math.inf)
    # Not exp(score - lse): where scores are large, nothing is left of the sum's logarithm in lse.
    weights = scores.softmax(-1).masked_fill(~seen, 0.0)
    if keeps is not None:
        weights = weights * keeps.to(weights.dtype)
    # A value that is left out counts for nothing, whatever it is: 0 * inf would be NaN.
    finite = value.isfinite()
    reached = (seen.to(value.dtype) @ (~finite).to(value.dtype)) > 0
    out = weights @ torch.where(finite, value, 0.0)
    out = torch.where(reached, weights @ value, out)
    return out, lse, weights


def _laid_out_like(t: Tensor, example: Tensor) -> Tensor:
    """t with heads before or after the places in memory, as they are in the example."""
    if example.stride(1) < example.stride(2):
        return t.transpose(1, 2).contiguous().transpose(1, 2)
    return t.contiguous()


def _as_given(device: torch.device) -> AbstractContextManager:
    """No autocast: the dtypes are what to compute in."""
    if torch.amp.is_autocast_available(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def backward(
    dout: Tensor | None,
    dlse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    key_padding: Tensor | None,
    slopes: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    seed: Tensor | None,
    scale: float,
    softcap: float,
    dropout_p: float,
    left: int,
    right: int,
    bottom_right: bool,
    out: Tensor,
    lse: Tensor,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value and mask, without elements where `needs` says no: those of `forward`."""
    tensors = [None if t is None else t.detach() for t in (query, key, value, mask)]
    wanted = [t.requires_grad_() for t, need in zip(tensors, needs, strict=True) if need and t is not None]
    options = (slopes, cu_seqlens_q, cu_seqlens_k, seed, scale, softcap, dropout_p, left, right, bottom_right)
    arguments: Any = (*tensors, key_padding, *options, 0)
    # An op's kernel may be called with autograd's keys switched off, as in torch.compile's graphs.
    switched_off, keys = torch._C._SetExcludeDispatchKeyGuard, torch._C.DispatchKey
    autograd, views = switched_off(keys.AutogradFunctionality, False), switched_off(keys.ADInplaceOrView, False)
    with torch.enable_grad(), autograd, views, _as_given(query.device):
        outputs = forward(*arguments)
        assert not wanted or outputs[0].requires_grad
        # lse does not depend on value.
        sent = [(o, g) for o, g in zip(outputs, (dout, dlse), strict=False) if g is not None and o.requires_grad]
        given = ([o for o, _ in sent], wanted, [g for _, g in sent])
        found = iter(torch.autograd.grad(*given, materialize_grads=True) if wanted else ())
    dquery, dkey, dvalue = (
        _laid_out_like(next(found), t) if need else out.new_empty(0)
        for t, need in zip((query, key, value), needs, strict=False)
    )
    return dquery, dkey, dvalue, next(found).contiguous() if needs[3] else out.new_empty(0)
