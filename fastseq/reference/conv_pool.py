"""Convolution, ReLU and max-pooling, as they are written down.

For output channel o, with the input x padded by zeros, and windows of P_h x P_w pixels side by side (LeCun et al. 1998,
but for ReLU and the maximum: Krizhevsky et al. 2012):

    a[o, i, j] = bias[o] + sum over c, u, v of weight[o, c, u, v] x[c, S_h i + u, S_w j + v]
    y[o, r, s] = max(0, max over p, q of a[o, P_h r + p, P_w s + q])        p < P_h, q < P_w

What is left over at the lower and the right edge, since windows must be whole, does not count. The tape is a number for
each y: the `position` P_w p + q of the largest pixel in its window, the first one of several; SHUT where y is 0. NaN is
larger than any number, and the last NaN counts, as in torch. So

    da[o, P_h r + p, P_w s + q] = dy[o, r, s] if P_w p + q is the position of y[o, r, s], else 0
    dbias[o] = sum over i, j of da[o, i, j]
    dweight[o, c, u, v] = sum over i, j of da[o, i, j] x[c, S_h i + u, S_w j + v]
    dx[c, m, n] = sum over o, u, v of weight[o, c, u, v] da[o, i, j] with S_h i + u = m and S_w j + v = n
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_input, conv2d_weight

SHUT = 255


def pooled(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: list[int], padding: list[int], pool: list[int]
) -> Tensor:
    """y alone, for whatever torch does with functions."""
    return F.max_pool2d(F.conv2d(x, weight, bias, stride, padding).relu(), pool)


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    pool: list[int],
    save_tape: bool,
) -> tuple[Tensor, Tensor]:
    """See `fastseq.ops.conv_pool.Arguments`."""
    a = F.conv2d(x, weight, bias, stride, padding)
    y, pixels = F.max_pool2d(a.relu(), pool, return_indices=True)
    y = y.contiguous(memory_format=memory_format(x))
    if not save_tape:
        return y, x.new_empty(0, dtype=torch.uint8)
    rows, columns = pixels // a.shape[3], pixels % a.shape[3]
    positions = torch.where(y <= 0, SHUT, rows % pool[0] * pool[1] + columns % pool[1])
    return y, positions.permute(0, 2, 3, 1).to(torch.uint8).contiguous()


def backward(
    dy: Tensor,
    positions: Tensor,
    x: Tensor,
    weight: Tensor,
    stride: list[int],
    padding: list[int],
    pool: list[int],
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias, without elements where `needs` says no."""
    pixels = torch.arange(pool[0] * pool[1], device=x.device)
    given = torch.where(positions[..., None] == pixels, dy.permute(0, 2, 3, 1)[..., None], 0.0)
    B, rows, columns, O, _ = given.shape
    da = given.view(B, rows, columns, O, *pool).permute(0, 3, 1, 4, 2, 5)
    da = da.reshape(B, O, rows * pool[0], columns * pool[1])
    height, width = ((x.shape[2 + d] + 2 * padding[d] - weight.shape[2 + d]) // stride[d] + 1 for d in range(2))
    da = F.pad(da, (0, width - da.shape[3], 0, height - da.shape[2]))
    dx, dweight = (x.new_empty(0) for _ in range(2))
    if needs[0]:
        dx = conv2d_input(x.shape, weight, da, stride, padding)
        dx = dx.contiguous(memory_format=memory_format(x))
    if needs[1]:
        dweight = conv2d_weight(x, weight.shape, da, stride, padding).contiguous()
    return dx, dweight, da.sum((0, 2, 3)) if needs[2] else x.new_empty(0)


def memory_format(x: Tensor) -> torch.memory_format:
    """That of results: x's."""
    is_last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.channels_last if is_last else torch.contiguous_format
