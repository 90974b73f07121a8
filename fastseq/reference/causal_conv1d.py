"""Depthwise causal convolution in time with a state to stream it, as it is written down.

With e = [state, x], the K - 1 inputs before the first and those of this call, for each row b and channel c:

    a[t] = bias + sum_k weight[k] e[t + k]           which sees x up to time t and nothing of later ones
    y[t] = a[t], or silu(a[t]) = a[t] s(a[t])        s(a) = 1 / (1 + exp(-a))
    final = e[T], ..., e[T + K - 2]                  the last K - 1 inputs, the state of the next call

That is torch's `conv1d` with groups=C of an input padded on the left, as in Mamba (Gu and Dao 2023, arXiv:2312.00752)
and Hyena (Poli et al. 2023, arXiv:2302.10866). Backwards, with da = dy, or dy s(a) (1 + a s(-a)):

    de[i] = sum_k weight[k] da[i - k] + dfinal[i - T]          terms without an element in da or dfinal are 0
    [dstate, dx] = de,  dweight[k] = sum_bt da[t] e[t + k],  dbias = sum_bt da[t]
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor | None, silu: bool) -> tuple[Tensor, Tensor]:
    """See `fastseq.ops.causal_conv1d.Arguments` and `Outputs`."""
    e = _extended(x, weight, state)
    a = _convolved(_computed(e), weight, bias)
    y = (a * torch.sigmoid(a) if silu else a).to(x.dtype)
    return _as_laid_out(y, x), e[..., x.shape[2] :].contiguous()


def backward(
    dy: Tensor,
    dfinal: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor | None,
    silu: bool,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weight, bias and state, without elements where `needs` says no."""
    T, K = x.shape[2], weight.shape[1]
    e, da, w = _computed(_extended(x, weight, state)), _computed(dy), _computed(weight)
    if silu:
        a = _convolved(e, weight, bias)
        da = da * torch.sigmoid(a) * (1 + a * torch.sigmoid(-a))
    dx, dweight, dbias, dstate = (t.new_empty(0) for t in (x, weight, x if bias is None else bias, x))
    if needs[0] or needs[3]:
        padded = F.pad(da, (K - 1, K - 1))
        de = sum(
            (w[:, k, None] * padded[..., K - 1 - k : K - 1 - k + T + K - 1] for k in range(K)), torch.zeros_like(e)
        )
        if dfinal is not None:
            de = de + F.pad(_computed(dfinal), (T, 0))
        if needs[0]:
            dx = _as_laid_out(de[..., K - 1 :].to(x.dtype), x)
        if needs[3]:
            dstate = de[..., : K - 1].to(x.dtype).contiguous()
    if needs[1]:
        dweight = torch.stack([(da * e[..., k : k + T]).sum((0, 2)) for k in range(K)], 1).to(weight.dtype)
    if needs[2] and bias is not None:
        dbias = da.sum((0, 2)).to(bias.dtype)
    return dx, dweight, dbias, dstate


def _computed(t: Tensor) -> Tensor:
    """The same in the dtype that it is computed in: half precision in float32."""
    return t.float() if t.dtype in (torch.float16, torch.bfloat16) else t


def _extended(x: Tensor, weight: Tensor, state: Tensor | None) -> Tensor:
    """[B, C, K-1+T]: the inputs before the first, zeros if there were none, and those of this call."""
    return F.pad(x, (weight.shape[1] - 1, 0)) if state is None else torch.cat([state, x], 2)


def _convolved(e: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    K = weight.shape[1]
    T, w = e.shape[2] - (K - 1), _computed(weight)
    a = sum((w[:, k, None] * e[..., k : k + T] for k in range(1, K)), w[:, 0, None] * e[..., :T])
    return a if bias is None else a + _computed(bias)[:, None]


def _as_laid_out(t: Tensor, x: Tensor) -> Tensor:
    """The same values in memory as x has them, channel by channel or time by time."""
    by_time = x.stride(1) == 1 and x.stride(2) != 1
    return t.transpose(1, 2).contiguous().transpose(1, 2) if by_time else t.contiguous()
