"""Bias, activation, gate and dropout, as they are written down.

With a = x + bias, element by element:

    y = act(a) * up * keep      up only where there is a gate (SwiGLU, GEGLU, ReGLU: Shazeer 2020, arXiv:2002.05202),
                                keep of `fastseq.reference.dropout`, for one matrix, where there is dropout

    identity    act(a) = a                    slope 1
    relu        act(a) = max(a, 0)            slope 1 where a > 0, else 0
    gelu        act(a) = a Phi(a)             slope Phi(a) + a phi(a)        (Hendrycks & Gimpel, arXiv:1606.08415)
    gelu_tanh   act(a) = a s(2u)              slope s(2u) + a s(2u) s(-2u) 2u'
    silu        act(a) = a s(a)               slope s(a) (1 + a s(-a))       (Elfwing et al., arXiv:1702.03118)

where Phi(a) = erfc(-a / sqrt 2) / 2 is the normal distribution and phi its density, s(a) = 1 / (1 + exp(-a)), and
u = sqrt(2 / pi) (a + 0.044715 a^3), so that s(2u) = (1 + tanh(u)) / 2. Of negative a nothing cancels in these forms.
"""

import math

import torch
from torch import Tensor

from fastseq.reference.dropout import keep

IDENTITY, RELU, GELU, GELU_TANH, SILU = range(5)


def forward(
    x: Tensor, up: Tensor | None, bias: Tensor | None, seed: Tensor | None, kind: int, dropout_p: float
) -> Tensor:
    """See `fastseq.ops.activation.Arguments`."""
    y = _activated(_biased(x, bias), kind)
    if up is not None:
        y = y * _computed(up)
    if dropout_p > 0 and seed is not None:
        y = y * keep(seed, x.shape, dropout_p, x.device).to(y.dtype)
    return y.to(x.dtype).contiguous()


def backward(
    dy: Tensor,
    x: Tensor,
    up: Tensor | None,
    bias: Tensor | None,
    seed: Tensor | None,
    kind: int,
    dropout_p: float,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, up and bias, without elements where `needs` says no."""
    a, given = _biased(x, bias), _computed(dy)
    if dropout_p > 0 and seed is not None:
        given = given * keep(seed, x.shape, dropout_p, x.device).to(given.dtype)
    da = given if up is None else given * _computed(up)
    da = torch.where(a <= 0, 0.0, da) if kind == RELU else da * _slope(a, kind)
    dx = da.to(x.dtype).contiguous() if needs[0] else x.new_empty(0)
    dup = (given * _activated(a, kind)).to(x.dtype).contiguous() if needs[1] else x.new_empty(0)
    return dx, dup, da.sum(0).to(bias.dtype) if needs[2] and bias is not None else x.new_empty(0)


def _computed(t: Tensor) -> Tensor:
    """The same in the dtype that it is computed in: half precision in float32."""
    return t.float() if t.dtype in (torch.float16, torch.bfloat16) else t


def _biased(x: Tensor, bias: Tensor | None) -> Tensor:
    return _computed(x) if bias is None else _computed(x) + _computed(bias)


def _activated(a: Tensor, kind: int) -> Tensor:
    if kind == RELU:
        return a.relu()
    if kind == GELU:
        return a * _normal(a)
    if kind == GELU_TANH:
        return a * torch.sigmoid(2 * _inner(a))
    return a * torch.sigmoid(a) if kind == SILU else a.clone()


def _slope(a: Tensor, kind: int) -> Tensor:
    if kind == GELU:
        return _normal(a) + a * torch.exp(-a * a / 2) / math.sqrt(2 * math.pi)
    if kind == GELU_TANH:
        s, rest = torch.sigmoid(2 * _inner(a)), torch.sigmoid(-2 * _inner(a))
        return s + a * s * rest * 2 * math.sqrt(2 / math.pi) * (1 + 3 * 0.044715 * a * a)
    return torch.sigmoid(a) * (1 + a * torch.sigmoid(-a)) if kind == SILU else torch.ones_like(a)


def _normal(a: Tensor) -> Tensor:
    return torch.erfc(-a * math.sqrt(0.5)) / 2


def _inner(a: Tensor) -> Tensor:
    return math.sqrt(2 / math.pi) * (a + 0.044715 * a * a * a)
