"""Softmax cross entropy with class indices, as it is written down; it is `torch.nn.functional.cross_entropy`'s.

For a row x of V logits with the target t, weights w of the classes (ones if there are none) and label smoothing e
(Szegedy et al. 2016, arXiv:1512.00567):

    lse  = log sum_c exp(x_c);   p_c = exp(x_c - lse)
    loss = (1 - e) w_t (lse - x_t) + e/V sum_c w_c (lse - x_c)
    dx_c = dloss ((1 - e) w_t (p_c - [c = t]) + e/V (p_c sum_k w_k - w_c))

The second term is there if e > 0. A row whose target is ignored has zeros for all of them, whatever its logits are. One
with a logit that is NaN or +inf has NaN.
"""

import math

import torch
from torch import Tensor


def forward(
    logits: Tensor, target: Tensor, weight: Tensor | None, label_smoothing: float, ignore_index: int
) -> tuple[Tensor, Tensor]:
    """See `fastseq.ops.cross_entropy.Arguments` and `Outputs`."""
    ignored = target == ignore_index
    x = _computed(logits).masked_fill(ignored.unsqueeze(-1), 0.0)
    of_classes = -x.log_softmax(-1)
    if weight is not None:
        of_classes = of_classes * weight
    loss = of_classes.gather(-1, _places(target, ignored)).squeeze(-1)
    if label_smoothing > 0:
        loss = (1 - label_smoothing) * loss + label_smoothing / x.shape[-1] * of_classes.sum(-1)
    lse = x.logsumexp(-1)
    lse = lse.masked_fill(lse == math.inf, math.nan)
    return loss.masked_fill(ignored, 0.0), lse.masked_fill(ignored, 0.0)


def backward(
    dloss: Tensor,
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    lse: Tensor,
    label_smoothing: float,
    ignore_index: int,
) -> Tensor:
    """The gradient of logits, in their dtype."""
    ignored = target == ignore_index
    x, at = _computed(logits).masked_fill(ignored.unsqueeze(-1), 0.0), _places(target, ignored)
    weight = x.new_ones(x.shape[-1]) if weight is None else weight
    own, share = (1 - label_smoothing) * weight[at], label_smoothing / x.shape[-1]
    # Not exp(x - lse): where logits are large, nothing is left of the sum's logarithm in lse.
    dx = (own + share * weight.sum()) * x.softmax(-1) - share * weight
    dx = dx.scatter_add(-1, at, -own) * dloss.unsqueeze(-1)
    return dx.masked_fill(ignored.unsqueeze(-1), 0.0).to(logits.dtype)


def _computed(logits: Tensor) -> Tensor:
    """The same in the dtype that it is computed in: half precision in float32."""
    return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits


def _places(target: Tensor, ignored: Tensor) -> Tensor:
    """[rows, 1] where each row's target is; anywhere if it is ignored."""
    return target.masked_fill(ignored, 0).unsqueeze(-1)
