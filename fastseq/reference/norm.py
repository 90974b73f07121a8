"""Dropout, a residual and normalisation of the sum, as it is written down.

For a row of E columns, with mean(.) over its columns:

    total = residual + keep * x                   keep: `fastseq.reference.dropout`, one matrix of all rows
    LayerNorm (Ba et al. 2016, arXiv:1607.06450):
        rstd = 1 / sqrt(mean((total - mean(total))^2) + eps);   normal = (total - mean(total)) * rstd
    RMSNorm (Zhang and Sennrich 2019, arXiv:1910.07467):
        rstd = 1 / sqrt(mean(total^2) + eps);                   normal = total * rstd
    y = normal * weight + bias

In half precision total is rounded before it is normalised, so that backward, which reads it, sees the same. Backward,
with g = dy * weight:

    dresidual = dtotal + rstd * (g - mean(g) - normal * mean(g * normal)),   without mean(g) in RMSNorm
    dx = keep * dresidual;   dweight = sum over rows of dy * normal;   dbias = sum over rows of dy
"""

import torch
from torch import Tensor

from fastseq.reference.dropout import keep

NONE, LAYER, RMS = range(3)


def forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    seed: Tensor | None,
    kind: int,
    eps: float,
    dropout_p: float,
    save_total: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `fastseq.ops.norm.Arguments` and `Outputs`."""
    total = _computed(x)
    if seed is not None:
        total = total * keep(seed, x.shape, dropout_p, x.device).to(total.dtype)
    if residual is not None:
        total = residual + total
    total = total.to(x.dtype)
    mean, rstd = statistics(total, kind, eps)
    y = x.new_empty(0)
    if kind != NONE:
        y = _normal(total, mean, rstd, kind)
        y = y if weight is None else y * weight
        y = (y if bias is None else y + bias).to(x.dtype)
    if not save_total or (residual is None and seed is None):
        total = x.new_empty(0)
    return y.contiguous(), total.contiguous(), mean, rstd


def statistics(total: Tensor, kind: int, eps: float) -> tuple[Tensor, Tensor]:
    """[rows] mean and rstd of a kind, without elements where it has none."""
    wide = _computed(total)
    nothing = wide.new_empty(0)
    if kind == NONE:
        return nothing, nothing.clone()
    mean = wide.mean(-1) if kind == LAYER else nothing
    deviation = wide - mean.unsqueeze(-1) if kind == LAYER else wide
    return mean, (deviation.square().mean(-1) + eps).rsqrt()


def _normal(total: Tensor, mean: Tensor, rstd: Tensor, kind: int) -> Tensor:
    wide = _computed(total)
    return (wide - mean.unsqueeze(-1) if kind == LAYER else wide) * rstd.unsqueeze(-1)


def _computed(t: Tensor) -> Tensor:
    """The same in the dtype that it is computed in: half precision in float32."""
    return t.float() if t.dtype in (torch.float16, torch.bfloat16) else t


def backward(
    dy: Tensor | None,
    dtotal: Tensor | None,
    total: Tensor,
    weight: Tensor | None,
    seed: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    kind: int,
    dropout_p: float,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, residual, weight and bias, without elements where `needs` says no: those of `forward`."""
    wide = _computed(total)
    weights = total.dtype if weight is None else weight.dtype
    given = torch.zeros_like(wide) if dtotal is None else _computed(dtotal)
    dweight = dbias = wide.new_zeros(wide.shape[1])
    if dy is not None:
        own = _computed(dy)
        normal = _normal(total, mean, rstd, kind)
        dweight, dbias = (own * normal).sum(0), own.sum(0)
        g = own if weight is None else own * weight
        along_row = normal * (g * normal).mean(-1, keepdim=True)
        along_ones = g.mean(-1, keepdim=True) if kind == LAYER else 0.0
        given = given + rstd.unsqueeze(-1) * (g - along_ones - along_row)
    dx = given
    if seed is not None:
        dx = dx * keep(seed, wide.shape, dropout_p, wide.device).to(dx.dtype)
    grads = ((dx, total.dtype), (given, total.dtype), (dweight, weights), (dbias, weights))
    dx, dresidual, dweight, dbias = (
        # Each its own, which one op must not give twice.
        g.to(dtype).clone(memory_format=torch.contiguous_format) if need else total.new_empty(0, dtype=dtype)
        for (g, dtype), need in zip(grads, needs, strict=True)
    )
    return dx, dresidual, dweight, dbias
